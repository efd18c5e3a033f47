"""pp.panels."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from anvi._backed import on_file, quiet_mudata
from anvi._data import containers, slots
from anvi._data.antibodies import AMBIGUOUS, match_antibodies, match_kits
from anvi._data.containers import Source
from anvi._data.counts import find_proteins
from anvi._data.setup import Setup, find_panels

logger = logging.getLogger("anvi")


@on_file
def panels(
    data: MuData,
    panel_key: str | None = None,
    *,
    panels: Mapping[str, Sequence[str]] | None = None,
    harmonize: bool | Literal["show"] | Mapping[str, str] = False,
    missing: Literal["auto", "nan"] = "auto",
    layer: str | dict[str, str] | None = None,
    rna_mod: str = "rna",
    prot_mod: str = "prot",
    copy: bool = False,
) -> MuData | pd.DataFrame | None:
    """Write down which antibody panel measured which protein; every fit reads it. On request, join their names.

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
    harmonize
        Find the same antibody under the names of several panels (`CD8a`, `CD8_TotalSeqB`, `anti-human CD8 (SK1)`),
        one to one, and join its columns under the name that comes first; other names lose their affixes, and isotype
        controls are called by their class. "show" writes nothing and returns the table. A dict says what some names
        are to be called, before any rule: `{"PD1 (CD279)": "PD-1 (clone 2)"}`.
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
    With `harmonize="show"`, a DataFrame of one row a name and panel: `kit`, `name`, `normalised`, `target`, `clone`,
    `isotype`, `matched_to`, `how`, `new_name`. Else, depending on `copy`, returns or updates `data` with the following
    fields.

    `mdata['prot'].varm['measured']` : DataFrame (proteins, panels)
        True where the panel measured the protein.
    `mdata['prot'].var_names`, `mdata['prot'].var['original_names']`, `['target']`, `['clone']`, `['isotype']`
        With `harmonize`: the new names, the old ones (joined by "; "), and what they say.

    Raises
    ------
    KeyError, ValueError
        If the column, a panel or a protein is not there, `panels` is empty, or, with `harmonize`, more than one name of
        a panel could be the same antibody and no clone tells them apart.

    Notes
    -----
    What is compared, and the synonyms (genenames.org, hcdm.org), are in `anvi/_data/antibodies.py`.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60, missing="zero")
    >>> av.pp.panels(mdata, "batch")
    >>> mdata["prot"].varm["measured"].sum().to_dict()
    {'batch_0': 20, 'batch_1': 15, 'batch_2': 0}
    >>> mdata["prot"].var_names = [f"{name}_TotalSeqB" for name in mdata["prot"].var_names]
    >>> av.pp.panels(mdata, "batch", harmonize="show")["new_name"][0]
    'P01'
    """
    if panels is not None and not panels:
        raise ValueError("panels={} names no panel; leave it out to have all worked out from the counts.")
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
    measured = find_panels(proteins, panel_of_cell, names, missing)
    table = pd.DataFrame(measured.T, index=prot.var_names, columns=list(names))
    for name, members in (panels or {}).items():
        table[name] = _declared(name, members, table)
    slots.check_short(source.data, table.columns, f"panel_key='{panel_key}'")
    if harmonize is False:
        _tell_dropped(prot, table, missing, panels or {})
        data = slots.own(data, copy)
        slots.write_measured(data.mod[prot_mod], table)
        return data if copy else None

    # which antibody of one panel is which of another; the panel of the first cells names them
    order = list(names) if panel_of_cell is None else list(panel_of_cell.dropna().unique())
    kits = {name: list(table.index[table[name]]) for name in order if table[name].any()}
    stated = dict(harmonize) if isinstance(harmonize, Mapping) else {}
    strangers = [name for name in stated if name not in table.index]
    if strangers:
        raise KeyError(f"harmonize names proteins that are not there: {', '.join(map(repr, strangers[:5]))}.")
    found = match_kits(kits, stated)
    if harmonize == "show":
        return found
    _check_clear(found)
    own = [column for column in ADDED if column in prot.var]
    if own and "original_names" not in own:  # which harmonize writes first
        new = {column: f"my_{column}" for column in own}
        raise ValueError(
            f"mdata['{prot_mod}'].var['{own[0]}'] would be overwritten, and nothing says that anvi wrote it. "
            f"Rename it: mdata['{prot_mod}'].var.rename(columns={new}, inplace=True)"
        )
    _tell_dropped(prot, table, missing, panels or {})
    data = slots.own(data, copy)
    joined, table, first_names = _joined(data.mod[prot_mod], found, table, panel_of_cell)
    slots.write_measured(joined, table)
    with quiet_mudata():
        new_names, joined.var_names = joined.var_names, first_names
        data.mod[prot_mod] = joined
        data.update_var()  # mudata follows one step at a time: first columns go, then names change
        joined.var_names = new_names
        data.update_var()
    return data if copy else None


ADDED = ("original_names", "target", "clone", "isotype")
"""Columns of var that say what was joined."""


def _tell_dropped(prot: AnnData, table: pd.DataFrame, missing: str, panels: Mapping[str, Sequence[str]]) -> None:
    """Say which marks of not measured, which the counts do not show, a new table drops."""
    before = slots.read_measured(prot)
    if missing != "auto" or not isinstance(before, pd.DataFrame):  # zeros may well be meant to count from now on
        return
    kept = before.reindex(index=table.index, columns=table.columns)
    marked = [
        (name, panel)
        for panel in table
        if panel not in panels
        for name in table.index[table[panel] & kept[panel].eq(False)]
    ]
    if marked:
        shown = ", ".join(f"'{name}' of panel '{panel}'" for name, panel in marked[:4])
        logger.warning(
            f"varm['measured'] marked {shown}{', ...' * (len(marked) > 4)} as not measured, and there are counts: now "
            "measured. Marks that stay: NaN in the counts, or panels={panel: [proteins that it measured]}"
        )


def _check_clear(found: pd.DataFrame) -> None:
    """Raise if a name could be several antibodies, or a column would get two names; say what is kept apart."""
    unclear = found[found["how"].str.startswith(AMBIGUOUS)]
    if len(unclear):
        first = unclear.iloc[0]
        rivals = list(unclear[(unclear["kit"] == first["kit"]) & (unclear["how"] == first["how"])]["name"])
        same = (found["target"] if first["target"] else found["normalised"]) == (first["target"] or first["normalised"])
        options = list(found[same & (found["kit"] != first["kit"])]["new_name"].unique())
        said = dict(zip(rivals, [options[0], *(f"{options[0]} (clone {i})" for i in range(2, 9))], strict=False))
        raise ValueError(
            f"harmonize: '{first['name']}' of panel '{first['kit']}' is {first['how']}. Say what is what by names or "
            f"clones, e.g. harmonize={said}."
        )
    several = found.groupby("name")["new_name"].unique()
    for name, new in several[several.map(len) > 1].items():
        raise ValueError(
            f"harmonize: '{name}' would be {' and '.join(map(repr, new))}; say harmonize={{'{name}': ...}}."
        )
    for row in found[found["how"].str.startswith("kept apart")].itertuples(index=False):
        logger.warning(f"proteins: '{row.name}' of panel '{row.kit}' is {row.how}")


def _joined(
    prot: AnnData, found: pd.DataFrame, table: pd.DataFrame, panel_of_cell: pd.Series | None
) -> tuple[AnnData, pd.DataFrame, pd.Index]:
    """Proteins under their new names, columns of one antibody joined; who measured them; the columns' old names."""
    new_name = found.drop_duplicates("name").set_index("name")["new_name"].reindex(prot.var_names)
    for name in new_name.index[new_name.isna()]:  # measured nowhere
        new_name[name] = match_antibodies([name], found["new_name"].unique())["matched_to"][0] or name
    names = pd.Index(dict.fromkeys(new_name), dtype=object)
    group = names.get_indexer(new_name)  # (old columns,)
    namer = dict(zip(found["new_name"][::-1], found["name"][::-1], strict=True))  # the column that named each
    first = prot.var_names.get_indexer([namer.get(name, name) for name in names])
    joined = prot[:, first].copy()

    # where a later column is the one that a panel measured, its cells take the counts from there
    moves = [
        (column, group[column], panel)
        for column in np.setdiff1d(np.arange(prot.n_vars), first)
        for panel in table.columns[table.iloc[column].to_numpy(dtype=bool)]
    ]
    for slot in [None, *prot.layers]:
        old = prot.X if slot is None else prot.layers[slot]
        if old is None or not moves:
            continue
        counts = old.toarray() if sparse.issparse(old) else np.asarray(old)
        values = counts[:, first]
        for column, place, panel in moves:
            rows = (panel_of_cell == panel).to_numpy()
            values[rows, place] = counts[rows, column]
        values = type(old)(values) if sparse.issparse(old) else values
        if slot is None:
            joined.X = values
        else:
            joined.layers[slot] = values
    said = found.drop_duplicates("new_name").set_index("new_name").reindex(names)
    joined.var_names = names
    joined.var["original_names"] = ["; ".join(prot.var_names[group == place]) for place in range(len(names))]
    for column in ("target", "clone"):
        joined.var[column] = said[column].fillna("").astype(str).to_numpy()
    joined.var["isotype"] = said["isotype"].eq(True).to_numpy()
    changed = found[found["name"] != found["new_name"]].drop_duplicates("name")
    logger.info(
        f"proteins: {prot.n_vars} columns of {found['kit'].nunique()} panels are {len(names)} antibodies; "
        + (
            ", ".join(f"{old} -> {new}" for old, new in zip(changed["name"], changed["new_name"], strict=True))
            or "as named"
        )
    )
    if joined.var["isotype"].any():
        logger.info(f"isotype controls: {', '.join(names[joined.var['isotype']])}")
    measured = table.groupby(group, sort=True).any()
    return joined, measured.set_axis(names, axis=0), prot.var_names[first]


def _declared(panel: str, members: Sequence[str], table: pd.DataFrame) -> np.ndarray:
    if panel not in table.columns:
        raise KeyError(f"panels names '{panel}', but the panels are {', '.join(map(repr, table.columns))}.")
    strangers = [name for name in members if name not in table.index]
    if strangers:
        raise KeyError(f"panels['{panel}'] names proteins that are not there: {', '.join(map(repr, strangers[:5]))}.")
    return table.index.isin(list(members))
