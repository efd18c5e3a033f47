"""pl.foreground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from anvi._backed import on_file_to_look_at
from anvi._data import containers, slots
from anvi._data.containers import Data, Source, in_memory
from anvi._data.counts import matrix_name, stored_counts
from anvi._data.fits import Fit, missing

from ._figure import axes_for, finish, fit_or_prefix, not_emptied, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PROTEINS = 24  # drawn unless they are named
COLUMNS = 5
BACKGROUND, FOREGROUND = "#c4c4c4", "#d1495b"


@on_file_to_look_at
def foreground(
    data: Data,
    *,
    model: str | None = None,
    proteins: Sequence[str] | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Sequence[Axes] | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure | None:
    """Counts of each protein, divided into background and foreground as the model sees them.

    Every measured count is divided in proportion to the cell's foreground probability. A protein that is well told
    apart has its grey hill on the left and its red one on the right; red under the grey hill, or a title far from
    what is known of the cells, asks for a closer look.

    Parameters
    ----------
    data
        An object with protein counts in which :func:`anvi.tl.denoise` has written its slots.
    model
        Key of the fit, or prefix of the slots; None: the only one there.
    proteins
        Names of those to draw; None: all, of more than 24 those whose probabilities differ most between cells.
    prot_mod, prot_obsm
        Where the protein counts are in `data`; None: where they were in the fitted object.
    show
        Show the figure instead of returning Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into, one per protein.
    return_fig
        Return the figure.

    Returns
    -------
    Array of Axes, the figure with `return_fig`, or None if it was shown.

    Raises
    ------
    KeyError
        If the slot, the counts or a protein are not there; the message names the command that writes the slot.
    ValueError
        If there are several fits and none is named, the fit has no proteins, or `tl.minify` has dropped the counts.

    Notes
    -----
    Reads `obsm['{key}_prot_foreground']`, the protein counts, and from `uns[key]` who measured what. The percentage in
    a title is the mean probability of the cells in which the protein was measured.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, panel_key="panel", max_epochs=2)
    >>> av.tl.foreground(mdata)
    >>> axes = av.pl.foreground(mdata, proteins=["P01", "P02"], show=False)
    """
    fit = fit_or_prefix(data, model, "obsm", slots.prot_foreground(""), joint=True)
    if fit.setup and not fit.joint:
        raise ValueError(f"model='{fit.key}' has no proteins; fit tl.totalvi or tl.totalanvi to have a foreground.")
    elsewhere = {"prot_mod": prot_mod, "prot_obsm": prot_obsm}
    fit = replace(fit, setup=fit.setup | {name: where for name, where in elsewhere.items() if where is not None})
    slot = slots.prot_foreground(fit.key)
    if slot not in fit.home.obsm:
        raise missing(f"{fit.where}.obsm['{slot}']", fit.asking("foreground"))
    table = slots.table(fit.home, slot, map(str, fit.setup.get("proteins", ())))  # (cells, proteins)
    counts = _measured_counts(fit).reindex(index=table.index, columns=table.columns)
    chosen = _chosen(table, counts, None if proteins is None else list(proteins))
    n_rows = -(-len(chosen) // COLUMNS)
    n_columns = -(-len(chosen) // n_rows)  # six as two rows of three, not of five and one
    size = 2.1 * n_columns + 0.4, 1.7 * n_rows + 0.8
    fig, axes, own = axes_for(ax, len(chosen), "the proteins", *size, n_rows, n_columns)
    for one, name in zip(axes, chosen, strict=True):
        _draw(one, counts[name].to_numpy(), table[name].to_numpy(), name)
    if own:
        for one in axes[::n_columns]:
            one.set_ylabel("cells", fontsize=8)
        for one in axes[-n_columns:]:
            one.set_xlabel("count + 1", fontsize=8)
        _legend(fig, fit.key)
    return finish(fig, np.array(axes, dtype=object), show=show, save=save, return_fig=return_fig, own=own)


def _measured_counts(fit: Fit) -> pd.DataFrame:
    """Protein counts `(cells with proteins, proteins)`, NaN where not measured."""
    setup, data = fit.setup, fit.data
    if Source(data).alone:
        slot = setup.get("prot_obsm")
        if slot not in data.obsm:
            raise missing(f"adata.obsm['{slot}']", "put the protein counts there, or pass prot_obsm=,")
        names, values, where = setup["proteins"], data.obsm[slot], f"data.obsm['{slot}']"
        cells = data.obs_names
    else:
        mod = setup.get("prot_mod", "prot")
        if mod not in data.mod:
            raise missing(f"modality '{mod}'", "add the protein counts that are to be divided, or pass prot_mod=,")
        part = data.mod[mod]
        names, cells = part.var_names.astype(str), part.obs_names
        layer, where = setup.get("prot_layer"), f"mdata['{mod}']"
        values = in_memory(stored_counts(part, layer, where))
        where = f"{where}.{matrix_name(layer)}"
    values = not_emptied(values, where)
    values = values.toarray() if sparse.issparse(values) else np.asarray(values)
    table = pd.DataFrame(np.array(values, dtype=float), cells, list(names))
    return table.where(_panel_mask(fit, table))


def _panel_mask(fit: Fit, table: pd.DataFrame) -> pd.DataFrame:
    """Whether the panel of each cell measured each protein; a zero of another panel is no count."""
    setup = fit.setup
    key = setup.get("panel_key") or setup.get("batch_key")
    measured = np.array(setup.get("measured", ()), dtype=bool)
    everything = pd.DataFrame(True, table.index, table.columns)
    if not measured.size:
        return everything
    by_panel = pd.DataFrame(measured, list(map(str, setup["panels"])), list(map(str, setup["proteins"])))
    if key is None:
        panel = pd.Series(by_panel.index[0], table.index)
    else:
        try:
            panel = containers.Source(fit.data).text(key, "panel_key", fit.mods).reindex(table.index)
        except KeyError:  # other data than those of the fit
            return everything
    row, column = by_panel.index.get_indexer(panel), by_panel.columns.get_indexer(table.columns)
    known = (row >= 0)[:, None] & (column >= 0)  # of another panel, or of a protein outside the model: as it stands
    return everything.where(~known, by_panel.to_numpy()[np.ix_(row, column)])


def _chosen(table: pd.DataFrame, counts: pd.DataFrame, proteins: Sequence[str] | None) -> list[str]:
    """Names of the proteins that are drawn."""
    if proteins is not None:
        unknown = [name for name in proteins if name not in table]
        if unknown:
            raise KeyError(f"proteins: the model has no '{unknown[0]}'; it has {containers.listed(table.columns, 12)}.")
        return list(proteins)
    drawn = [name for name in table if counts[name].notna().any()]
    if not drawn:
        raise ValueError("No protein of the model was measured in these cells: there are no counts to draw.")
    if len(drawn) > MAX_PROTEINS:
        spread = table[drawn].std().sort_values(ascending=False, kind="stable")
        drawn = [name for name in drawn if name in set(spread.index[:MAX_PROTEINS])]
    return drawn


def _draw(ax: Axes, counts: np.ndarray, probability: np.ndarray, name: str) -> None:
    known = np.isfinite(counts) & np.isfinite(probability)
    value, weight = counts[known] + 1, probability[known]
    title = f"{shorten(name, 18)}: not measured"
    if known.any():
        # whole counts: edges lie between them, so that low bins hold one count each and none stays empty
        edges = np.unique(np.round(np.geomspace(1, value.max() + 1, 36))) - 0.5
        fore, _ = np.histogram(value, edges, weights=weight)
        back, _ = np.histogram(value, edges, weights=1 - weight)
        ax.stairs(back, edges, fill=True, color=BACKGROUND)
        ax.stairs(back + fore, edges, baseline=back, fill=True, color=FOREGROUND)
        title = f"{shorten(name, 18)}: {weight.mean():.0%}"
    ax.set_xscale("log")
    ax.set_title(title, fontsize=9)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(fig: Figure, key: str) -> None:
    from matplotlib.patches import Patch

    names = {BACKGROUND: "background", FOREGROUND: f"foreground ({shorten(key, 16)})"}
    handles = [Patch(color=color, label=name) for color, name in names.items()]
    n_columns = 2 if fig.get_figwidth() > 4 else 1
    fig.legend(handles=handles, loc="outside upper left", ncols=n_columns, fontsize=8, frameon=False)
