"""pl.differential_expression."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data import rankings
from anvi._data.containers import Data, check_natural

from ._figure import RASTER_CELLS, axes_for, dot, finish, ink, legend_beside, shorten, shorten_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("anvi")

HIGHER, LOWER, OTHER = "#d53e2f", "#3878c0", "#c8c8c8"
MAX_PANELS = 8  # volcanoes that can still be read on a page; of more groups, all stand side by side in one panel
MAX_NAMES = 90  # features up to which each can be named
DOT = 130.0  # points² of a certain feature


class _Panel(NamedTuple):
    """One ranking of one modality."""

    mod: str
    params: Mapping
    table: pd.DataFrame  # of the groups that are drawn
    groups: list[str]

    @property
    def fdr(self) -> float:
        """The rate at which features are called."""
        return float(self.params.get("fdr", 0.05))


@on_file_to_look_at
def differential_expression(
    data: Data,
    group: str | int | bool | Sequence[str] | None = None,
    *,
    kind: Literal["volcano", "dot"] = "volcano",
    modality: str | None = None,
    n_features: int | None = None,
    key: str = "rank_genes_groups",
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    return_fig: bool = False,
) -> Axes | list[Axes] | Figure | None:
    """Features that differ between groups: all of a group by fold change and certainty, or the first of each group.

    A volcano has a dot per feature, mean log2 fold change against expected false discovery rate; those that are called
    at the rate of the result are coloured, and the first of either side named. Of more groups and modalities than eight
    volcanoes, one panel per modality has the groups side by side: a dot per feature at its fold change. A dot plot has
    a row per group and a column for each of their first features: colour is the fold change, size the probability of a
    change, and a ring says that the feature is called.

    Parameters
    ----------
    data
        An object to which :func:`anvi.tl.differential_expression` has written.
    group
        One or several groups; None: all.
    kind
        "volcano" or "dot".
    modality
        Name of the only modality to draw; None: all that have a result ("rna" and "prot" in an AnnData).
    n_features
        Volcano: features named on either side; None: 6, or 3 side by side. Dot plot: features per group, by descending
        score; None: as many as fit, from 1 to 5.
    key
        Slot in `uns`.
    show
        Show the figure instead of returning the Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into: one per group and modality for volcanoes, one per modality for dot plots and for groups side
        by side.
    return_fig
        Return the figure.

    Returns
    -------
    Axes (a list if there are several), the figure with `return_fig`, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such result, modality or group.
    ValueError
        If `kind` is neither.

    Notes
    -----
    Reads `uns[key]` of each modality.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.differential_expression(mdata, "true_cell_type", n_samples=200)
    >>> ax = av.pl.differential_expression(mdata, "NK", modality="rna", show=False)
    """
    if n_features is not None:
        check_natural(n_features, "n_features")
    panels = []
    for mod, stored, groups in rankings.chosen_rankings(data, group, modality, key):
        table = rankings.ranking_table(stored, groups)
        if "is_de" not in table:  # a result of another method
            table["is_de"] = table["pvals_adj"] <= 0.05
        panels.append(_Panel(mod, stored["params"], table, groups))
    fig, axes, own = (_volcanoes if kind == "volcano" else _dots)(panels, n_features, ax)
    return finish(fig, axes[0] if len(axes) == 1 else axes, show=show, save=save, return_fig=return_fig, own=own)


# volcanoes ----------------------------------------------------------------------------------------------------------
def _volcanoes(panels: list[_Panel], n_features: int | None, ax) -> tuple[Figure, list[Axes], bool]:
    drawn = [(panel, group) for group in panels[0].groups for panel in panels if group in panel.groups]
    if len(drawn) > MAX_PANELS and (ax is None or np.size(ax) == len(panels)):
        return _side_by_side(panels, 3 if n_features is None else n_features, ax)
    n_columns = min(len(drawn), 4 if len(panels) != 2 else 2 if len(drawn) <= 4 else 4)
    n_rows = -(-len(drawn) // n_columns)
    size = 3.5 * n_columns + 0.2, 3.0 * n_rows + 0.5
    fig, axes, own = axes_for(ax, len(drawn), "the groups and modalities", *size, n_rows, n_columns)
    for one, (panel, group) in zip(axes, drawn, strict=True):
        _volcano(one, panel, group, 6 if n_features is None else n_features)
    handles = _volcano_handles(panels[0].fdr)
    if own:
        fig.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8, frameon=False, handlelength=1.2)
    else:
        axes[0].legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.1), ncols=2, fontsize=7, frameon=False)
    return fig, axes, own


def _side_by_side(panels: list[_Panel], n_names: int, ax) -> tuple[Figure, list[Axes], bool]:
    """All groups of a modality in one panel, fold changes upwards."""
    n_groups = max(len(panel.groups) for panel in panels)
    longest = max(map(len, shorten_each(panels[0].groups, 24)))
    size = max(0.86 * n_groups + 1.0, 5.0), 3.6 * len(panels) + 0.07 * longest
    fig, axes, own = axes_for(ax, len(panels), "the modalities", *size, len(panels), 1)
    if own:
        handles = _volcano_handles(panels[0].fdr)[:3]
        fig.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8, frameon=False, handlelength=1.2)
    for one, panel in zip(axes, panels, strict=True):
        for place, group in enumerate(panel.groups):
            _strip(one, panel.table[panel.table["group"] == group], place, n_names)
        reference = shorten(str(panel.params["reference"]))
        one.set_title(f"{panel.mod}: every group / {reference}", fontsize=9, loc="left")
        one.set_ylabel("log2 fold change", fontsize=8)
        one.axhline(0, color="#d0d0d0", linewidth=0.6, zorder=0)
        one.set_xlim(-0.6, len(panel.groups) - 0.2)
        names = shorten_each(panel.groups, 24)
        one.set_xticks(range(len(names)), names if one is axes[-1] else [""] * len(names), rotation=90, fontsize=8)
        one.tick_params(labelsize=8, length=2)
        one.margins(y=0.1)
        one.spines[["top", "right"]].set_visible(False)
    return fig, axes, own


def _sides(table: pd.DataFrame, n_names: int) -> list[tuple[np.ndarray, str, np.ndarray]]:
    """A group's features not called, higher and lower: which `(features,)` bool, the colour, and those to name."""
    lfc, called = table["logfoldchanges"].to_numpy(dtype=float), table["is_de"].to_numpy(dtype=bool)
    higher, lower = called & (lfc > 0), called & (lfc <= 0)
    up, down = np.flatnonzero(higher), np.flatnonzero(lower)[::-1]  # features come by descending score
    return [(~called, OTHER, up[:0]), (higher, HIGHER, up[:n_names]), (lower, LOWER, down[:n_names])]


def _strip(ax: Axes, table: pd.DataFrame, place: int, n_names: int) -> None:
    """The features of one group, with the names of the first on either side."""
    lfc, names = table["logfoldchanges"].to_numpy(), table["names"].to_numpy()
    # spread by rank within the strip, so that the same plot comes out every time
    x = place - 0.3 + 0.3 * np.modf(np.arange(len(lfc)) * 0.6180339887)[0]
    reach = max(float(np.nanmax(np.abs(lfc), initial=0.5)), 0.5)
    for chosen, color, named in _sides(table, n_names):
        size = 3 if color == OTHER else 6
        ax.scatter(x[chosen], lfc[chosen], s=size, color=color, linewidths=0, rasterized=len(lfc) > 500)
        taken: list[float] = []
        for i in sorted(named, key=lambda i: -lfc[i]):  # from the top, none over another
            y = min([float(lfc[i]), *([taken[-1] - 0.11 * reach] if taken else [])])
            taken.append(y)
            ax.annotate(
                shorten(str(names[i]), 10),
                (x[i], lfc[i]),
                xytext=(place + 0.06, y),
                fontsize=6.5,
                color=color,
                va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "#909090", "shrinkA": 0, "shrinkB": 1},
            )


def _volcano(ax: Axes, panel: _Panel, group: str, n_names: int) -> None:
    table = panel.table[panel.table["group"] == group]
    lfc = table["logfoldchanges"].to_numpy(dtype=float)
    rate = table["pvals_adj"].to_numpy(dtype=float)
    positive = rate[rate > 0]
    height = -np.log10(np.maximum(rate, positive.min() if len(positive) else 1e-300))
    style = {"s": 9, "linewidths": 0, "alpha": 0.8, "rasterized": len(table) > RASTER_CELLS}
    sides = _sides(table, n_names)
    for chosen, color, _ in sides:
        ax.scatter(lfc[chosen], height[chosen], color=color, **style)
    ax.axhline(-np.log10(panel.fdr), color="#707070", linewidth=0.8, linestyle=":")
    ax.axvline(0, color="#d0d0d0", linewidth=0.6, zorder=0)
    reach = max(float(np.nanmax(np.abs(lfc), initial=0.0)), 0.5)
    top = max(float(np.nanmax(height, initial=0.0)), -np.log10(panel.fdr)) * 1.06
    ax.set(xlim=(-1.85 * reach, 1.85 * reach), ylim=(-0.04 * top, top))  # the names stand at both sides
    names = shorten_each(table["names"], 14)
    for _, color, named in sides:
        _name(ax, named, names, lfc, height, color)
    ax.set_title(f"{shorten(group, 26)} ({panel.mod})", fontsize=9)
    ax.set_xlabel(f"log2 fold change, {shorten(group, 12)} / {shorten(str(panel.params['reference']), 12)}", fontsize=8)
    ax.set_ylabel("-log10 expected FDR", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _name(ax: Axes, chosen: np.ndarray, names: list[str], lfc: np.ndarray, height: np.ndarray, color: str) -> None:
    """Names in a column at one side, the highest point's on top, each with a line to its point."""
    low, high = ax.get_ylim()
    right = color == HIGHER
    edge = ax.get_xlim()[1 if right else 0]
    for place, i in enumerate(sorted(chosen, key=lambda i: (-height[i], -abs(lfc[i])))):
        y = high - (0.04 + 0.075 * place) * (high - low)
        ax.annotate(
            names[i],
            (lfc[i], height[i]),
            xytext=(0.98 * edge, y),
            ha="right" if right else "left",
            va="center",
            fontsize=7,
            color=color,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#909090", "shrinkA": 1, "shrinkB": 1},
        )


def _volcano_handles(fdr: float) -> list:
    from matplotlib.lines import Line2D

    dots = (("higher", HIGHER), ("lower", LOWER), ("not called", OTHER))
    return [
        *(dot(label, 4, color=color) for label, color in dots),
        Line2D([], [], color="#707070", linewidth=0.8, linestyle=":", label=f"expected FDR {fdr:g}"),
    ]


# dot plots ----------------------------------------------------------------------------------------------------------
def _dots(panels: list[_Panel], n_features: int | None, ax) -> tuple[Figure, list[Axes], bool]:
    chosen = [_first_features(panel, n_features) for panel in panels]
    longest = max(map(len, shorten_each(panels[0].groups, 24)))
    width = float(np.clip(0.19 * max(map(len, chosen)), 2.4, 16.0)) + 0.075 * longest + 2.0
    height = max(float(np.clip(0.21 * len(panels[0].groups), 0.8, 16.0)) + 1.3, 2.6)
    fig, axes, own = axes_for(ax, len(panels), "the modalities", width, height * len(panels), len(panels), 1)
    for one, panel, features in zip(axes, panels, chosen, strict=True):
        _dot(one, panel, features)
    return fig, axes, own


def _first_features(panel: _Panel, n_features: int | None) -> list[str]:
    """The first features of each group, group by group, each once."""
    if n_features is None:
        n_features = int(np.clip(60 // len(panel.groups), 1, 5))
    firsts = panel.table.groupby("group", observed=True).head(n_features)
    return list(dict.fromkeys(firsts["names"]))


def _dot(ax: Axes, panel: _Panel, features: list[str]) -> None:
    from matplotlib.colors import TwoSlopeNorm

    table = panel.table[panel.table["names"].isin(features)]
    x, y = pd.Index(features).get_indexer(table["names"]), pd.Index(panel.groups).get_indexer(table["group"])
    lfc, called = table["logfoldchanges"].to_numpy(dtype=float), table["is_de"].to_numpy(dtype=bool)
    proba = (table["proba_de"] if "proba_de" in table else 1 - table["pvals"]).to_numpy(dtype=float)
    limit = max(float(np.nanquantile(np.abs(lfc), 0.98)) if len(lfc) else 1.0, 0.1)
    pitch = min(1.0, 13.0 / (0.19 * max(len(features), 1)), 13.0 / (0.21 * max(len(panel.groups), 1)))
    size = DOT * pitch**2
    dots = ax.scatter(
        x,
        y,
        s=size * np.clip(proba, 0.02, 1) ** 2,
        c=lfc,
        cmap="RdBu_r",
        norm=TwoSlopeNorm(0, -limit, limit),
        edgecolors=np.where(called, ink(), "none"),
        linewidths=0.6,
    )
    ax.set(xlim=(-0.7, len(features) - 0.3), ylim=(len(panel.groups) - 0.3, -0.7))
    font = 8 if len(panel.groups) <= 60 else 5
    ax.set_yticks(range(len(panel.groups)), shorten_each(panel.groups, 24), fontsize=font)
    if len(features) <= MAX_NAMES:
        font = 7 if len(features) <= 70 else 5.5
        ax.set_xticks(range(len(features)), shorten_each(features, 18), rotation=90, fontsize=font)
    else:
        ax.set_xticks([])
        ax.set_xlabel(f"{len(features)} features, the first of each group in turn", fontsize=8)
    ax.set_title(
        f"{panel.mod}: first features of each group / {shorten(str(panel.params['reference']))}", fontsize=9, loc="left"
    )
    ax.tick_params(length=2)
    # what colours, sizes and rings mean
    bar = ax.figure.colorbar(
        dots, ax=ax, fraction=0.04, shrink=0.6, aspect=12, pad=0.01, anchor=(0.0, 0.0), extend="both"
    )
    bar.set_label("log2 fold change", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    handles = [dot(f"{p:g}", size**0.5 * p, color="#a0a0a0") for p in (0.5, 0.75, 1.0)]
    handles.append(dot("called", size**0.5, markerfacecolor="none", markeredgecolor=ink(), markeredgewidth=0.6))
    legend_beside(ax, handles, "probability")
