"""pp.panels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
from mudata import MuData

from anvi._data import containers, slots
from anvi._data.containers import Source
from anvi._data.counts import find_proteins
from anvi._data.setup import Setup, find_panels


def panels(
    data: MuData,
    panel_key: str | None = None,
    *,
    panels: Mapping[str, Sequence[str]] | None = None,
    missing: Literal["auto", "nan"] = "auto",
    layer: str | dict[str, str] | None = None,
    rna_mod: str = "rna",
    prot_mod: str = "prot",
    copy: bool = False,
) -> MuData | None:
    """Write down which antibody panel measured which protein; every fit reads it.

    Parameters
    ----------
    data
        MuData with protein counts.
    panel_key
        Column with the panel of each cell (found in `mdata.obs` or a modality's obs); use the same in the fit, or the
        batch column if panels follow batches. None: one panel, called "all".
    panels
        For each panel the names of the proteins that it measured, where you know better than the counts. Panels that
        are not named here are worked out from the counts.
    missing
        "auto": proteins that are NaN, or zero in all cells of a panel, were not measured. "nan": only NaN ones.
    layer
        Layer with raw counts; a dict gives one per modality; None takes `.X`.
    rna_mod, prot_mod
        Names of the modalities.
    copy
        Return a new object instead of writing into `data`.

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following field.

    `mdata['prot'].varm['measured']` : DataFrame (proteins, panels)
        True where the panel measured the protein.

    Raises
    ------
    KeyError, ValueError
        If the column, a panel or a protein is not there.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60, missing="zero")
    >>> av.pp.panels(mdata, "batch")
    >>> mdata["prot"].varm["measured"].sum().to_dict()
    {'batch_0': 20, 'batch_1': 15, 'batch_2': 0}
    """
    source = Source(data)
    prot = source.modality(prot_mod, "prot_mod")
    if source.alone:
        raise TypeError("pp.panels works on a MuData; in an AnnData mark what was not measured with NaN in obsm.")
    rna = source.modality(rna_mod, "rna_mod")
    setup = Setup(
        tuple(rna.var_names),
        rna_mod=rna_mod,
        prot_mod=prot_mod,
        prot_layer=containers.layer_of(layer, prot_mod),
    )
    proteins = replace(find_proteins(source, setup), declared=None)  # what was declared before does not count here
    panel_of_cell, names = None, ("all",)
    if panel_key is not None:
        panel_of_cell = source.text(panel_key, "panel_key", setup.mods)
        names = tuple(sorted(panel_of_cell.dropna().unique()))
        panel_of_cell = panel_of_cell.loc[proteins.cells]
    names, measured = find_panels(proteins, panel_of_cell, names, missing)
    table = pd.DataFrame(measured.T, index=prot.var_names, columns=list(names))
    for name, members in (panels or {}).items():
        table[name] = _declared(name, members, table)
    data = slots.own(data, copy)
    data.mod[prot_mod].varm[slots.measured()] = table
    return data if copy else None


def _declared(panel: str, members: Sequence[str], table: pd.DataFrame) -> np.ndarray:
    if panel not in table.columns:
        raise KeyError(f"panels names '{panel}', but the panels are {', '.join(map(repr, table.columns))}.")
    strangers = [name for name in members if name not in table.index]
    if strangers:
        raise KeyError(f"panels['{panel}'] names proteins that are not there: {', '.join(map(repr, strangers[:5]))}.")
    return table.index.isin(list(members))
