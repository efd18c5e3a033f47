"""pl.panels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData

from anvi._backed import on_file_to_look_at
from anvi._data import containers, slots
from anvi._data.containers import Data, Source
from anvi._data.fits import FIT_COMMAND, missing, resolve_fit, stored_fits

from ._figure import UNLABELLED, axes_for, finish, shorten_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMES = 80  # proteins up to which each can be named
MEASURED = "#3182bd"


@on_file_to_look_at
def panels(
    data: Data,
    *,
    model: str | None = None,
    panel_key: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Axes | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Which panel (or batch) measured which protein, and how many cells have it.

    Proteins are sorted by the panels that measured them, so that each pattern is one block; numbers on the right count
    the proteins of a panel. With more than 80 proteins, the blocks are counted instead of named.

    Parameters
    ----------
    data
        A MuData or AnnData that was fitted with proteins, or a MuData with `prot.varm['measured']`.
    model
        Key of the fit; None: the only one with proteins. Without a fit, the table in `prot.varm['measured']` is drawn.
    panel_key
        Column with the panel of each cell, for counting cells. None: that of the fit.
    show
        Show the figure instead of returning the Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into.
    return_fig
        Return the figure.

    Returns
    -------
    Axes, the figure with `return_fig`, or None if it was shown.

    Raises
    ------
    KeyError
        If there is neither a fit with proteins nor a table of panels, or the column is not there.
    ValueError
        If there are several such fits and none is named, the named one has no proteins, or `panel_key` names none of
        the panels.

    Notes
    -----
    Reads `uns[key]['model']` or `mdata['prot'].varm['measured']`, and the column of panels.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, panel_key="panel", max_epochs=2)
    >>> ax = av.pl.panels(mdata, show=False)
    """
    table, panel_key, mods, title, prot = _table(data, model, panel_key)
    n_cells = _cells(data, table, panel_key, mods, prot)
    # panels that measured most first, then by pattern: equal columns become neighbours
    order = np.lexsort([*(~table.to_numpy())[::-1], -table.to_numpy().sum(0)])
    table = table.iloc[:, order]
    n_panels, n_proteins = table.shape
    width = float(np.clip(0.19 * n_proteins, 3.0, 13.0)) if n_proteins <= MAX_NAMES else 8.0
    height = float(np.clip(0.3 * n_panels, 0.7, 10.0))
    fig, (ax,), own = axes_for(ax, 1, "the table", width + 2.4, height + 1.6)
    _draw_table(ax, table)
    _label_rows(ax, table, n_cells)
    if n_proteins <= MAX_NAMES:
        size = 8 if n_proteins <= 40 else 7
        ax.set_xticks(range(n_proteins), shorten_each(table.columns, 20), rotation=90, fontsize=size)
        ax.set_xlabel(f"{n_proteins} proteins", fontsize=9)
    else:
        _count_blocks(ax, table)
        ax.set_xlabel(f"{n_proteins} proteins, in blocks of the same panels", fontsize=9)
    _legend(ax, title)
    return finish(fig, ax, show=show, save=save, return_fig=return_fig, own=own)


def _table(
    data: Data, model: str | None, panel_key: str | None
) -> tuple[pd.DataFrame, str | None, tuple[str, ...], str, AnnData | None]:
    """Panels x proteins, the column of panels, where to look for it, what to call the table, the protein modality."""
    if model is not None:
        fit = resolve_fit(data, model)
        if not fit.joint:
            raise ValueError(f"model='{model}' has no proteins; fit tl.totalvi or tl.totalanvi to have panels.")
    elif any(fit.joint for fit in stored_fits(data).values()):
        fit = resolve_fit(data, None, joint=True)
    else:
        return _declared(data, panel_key)
    setup = fit.setup
    table = pd.DataFrame(
        np.array(setup["measured"], dtype=bool).reshape(len(setup["panels"]), len(setup["proteins"])),
        index=list(map(str, setup["panels"])),
        columns=list(map(str, setup["proteins"])),
    )
    prot = Source(data).mods.get(setup["prot_mod"])
    return table, panel_key or setup["panel_key"] or setup["batch_key"], fit.mods, f"proteins of {fit.key}", prot


def _declared(data: Data, panel_key: str | None):
    """The same from what :func:`anvi.pp.panels` wrote."""
    slot = slots.measured()
    for mod, part in Source(data).mods.items():
        table = slots.read_measured(part)
        if isinstance(table, pd.DataFrame):
            table = table.astype(bool).T.rename(index=str, columns=str)
            return table, panel_key, tuple(dict.fromkeys((mod, *data.mod))), f"mdata['{mod}'].varm['{slot}']", part
    raise missing(
        f"fit with proteins and no mdata['prot'].varm['{slot}']",
        f"run {FIT_COMMAND}, or av.pp.panels(mdata) to see panels before a fit,",
    )


def _cells(
    data: Data, table: pd.DataFrame, panel_key: str | None, mods: tuple[str, ...], prot: AnnData | None
) -> dict[str, str] | None:
    """How many cells a panel has, and how many of them have proteins; None if nothing says which panel a cell has."""
    if panel_key is not None:
        column = containers.Source(data).text(panel_key, "panel_key", mods)
        if not column.isin(table.index).any():
            listed = ", ".join(map(repr, table.index[:6]))
            raise ValueError(f"panel_key='{panel_key}' names none of the panels: they are {listed}.")
    elif len(table) == 1:
        column = pd.Series(table.index[0], index=data.obs_names)
    else:
        return None
    n_cells = column.value_counts().reindex(table.index, fill_value=0)
    stained = (
        n_cells if prot is None else column.reindex(prot.obs_names).value_counts().reindex(table.index, fill_value=0)
    )
    return {
        name: f"{n_cells[name]:,} cells" + (f", {stained[name]:,} stained" if 0 < stained[name] < n_cells[name] else "")
        for name in table.index
    }


def _draw_table(ax: Axes, table: pd.DataFrame) -> None:
    from matplotlib.colors import ListedColormap

    n_panels, n_proteins = table.shape
    ax.imshow(
        table.to_numpy(dtype=float),
        cmap=ListedColormap([UNLABELLED, MEASURED]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
    )
    ax.set_yticks(np.arange(0.5, n_panels - 1), minor=True)
    if n_proteins <= MAX_NAMES:
        ax.set_xticks(np.arange(0.5, n_proteins - 1), minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def _label_rows(ax: Axes, table: pd.DataFrame, n_cells: dict[str, str] | None) -> None:
    """Panels and their cells on the left, their proteins on the right."""
    n_panels, n_proteins = table.shape
    size = 9 if n_panels <= 20 else 7
    names = shorten_each(table.index)
    if n_cells is not None:
        names = [f"{short} ({n_cells[name]})" for short, name in zip(names, table.index, strict=True)]
    ax.set_yticks(range(n_panels), names, fontsize=size)
    for row, count in enumerate(table.to_numpy().sum(1)):
        ax.annotate(
            f"{count} of {n_proteins}" if count else "none",
            (1, row),
            xycoords=ax.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=size,
        )


def _count_blocks(ax: Axes, table: pd.DataFrame) -> None:
    """Number of proteins in each block of columns with the same pattern, under the blocks that have room for it."""
    values = table.to_numpy()
    edges = np.flatnonzero((values[:, 1:] != values[:, :-1]).any(0)) + 1
    edges = [0, *edges.tolist(), values.shape[1]]
    wide = [(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if b - a >= 0.03 * values.shape[1]]
    ax.set_xticks([(a + b - 1) / 2 for a, b in wide], [str(b - a) for a, b in wide], fontsize=8)
    for edge in edges[1:-1]:
        ax.axvline(edge - 0.5, color="white", linewidth=0.8)


def _legend(ax: Axes, title: str) -> None:
    from matplotlib.patches import Patch

    ax.legend(
        handles=[Patch(color=MEASURED, label="measured"), Patch(color=UNLABELLED, label="not measured")],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        fontsize=8,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1,
    )
    ax.set_title(title, fontsize=10, loc="left", pad=20)  # above the legend
