"""pl.attributions."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data import containers, rankings, slots
from anvi._data.containers import Data, as_names
from anvi._data.rankings import AttributionSlots

from . import _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 24  # features of a modality that are drawn all together; of more, those that are present in a class
ROW, LABEL = 0.19, 7.5  # inches of a feature, points of its name
BAR_COLUMNS = 3  # classes beside each other
AGAINST = "#b8b8b8"
PALE = 0.3  # opacity of what contributes by its absence


class _Table(NamedTuple):
    """What is drawn of one modality."""

    mod: str
    mean: pd.DataFrame  # (features, classes) attributions
    presence: pd.DataFrame  # (features, classes) by which features are chosen
    error: pd.DataFrame  # (features, classes)

    def first(self, group: str, n: int) -> list[str]:
        """Features that contribute most to a class by their presence: what marks it, not what marks others."""
        return self.presence[group].nlargest(n).index.tolist()

    def by_absence(self, names: Sequence[str]) -> np.ndarray:
        """Which attributions come mostly of absence `(names, classes)`."""
        presence, mean = (table.loc[names].to_numpy(dtype=float) for table in (self.presence, self.mean))
        return np.abs(mean - presence) > np.abs(presence)


@on_file_to_look_at
def attributions(
    data: Data,
    group: str | int | bool | Sequence[str] | None = None,
    *,
    kind: Literal["heatmap", "bar", "dot"] = "heatmap",
    cell: str | None = None,
    n_features: int | None = None,
    model: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure | None:
    """What genes and proteins contribute to the logit of each class, both modalities side by side.

    Drawn are mean attributions. A feature may contribute by its presence, with counts above the baseline (CD19 in a B
    cell), or by its absence (CD3 there): features are chosen by their presence, unless a modality has only a few, and
    what comes mostly of absence is marked. A heat map has a row per feature and a column per class; circles mark
    absence. Bars, with standard errors, are those of one class each; the pale part is absence. Dots have a row per
    class and an area for the attribution; rings are absence, what is grey speaks against the class.

    Parameters
    ----------
    data
        An object in which :func:`anvi.tl.attributions` has written its slots.
    group
        One or several classes; None: all that were explained.
    kind
        "heatmap", "bar" or "dot".
    cell
        Name of a cell whose own attributions were kept: the largest of them are drawn instead, for and against, with
        the cell's counts.
    n_features
        Features per class and modality; None: 10 bars, else 3, or all of a modality with up to 24.
    model
        Prefix of the slots: the model's key, or the `key_added` that was given; None: the only ones there.
    show
        Show the figure instead of returning Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into: one per modality, or with bars one per class and modality.
    return_fig
        Return the figure.

    Returns
    -------
    Array of Axes (RNA, proteins; with bars a row of these per class), the figure with `return_fig`, or None if it was
    shown.

    Raises
    ------
    KeyError
        If there are no attributions, or no such class or cell among them.
    ValueError
        If `kind`, `group` or `n_features` makes no sense, or there are several attributions and none is named.

    Notes
    -----
    Reads `uns['{key}_attributions']` of each modality, with `cell` `layers['{key}_attributions']` and
    `obs['{key}_explained']`, and the colours of the classes in `uns`, where there are any.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> av.tl.attributions(mdata, n_cells=10)
    >>> axes = av.pl.attributions(mdata, kind="dot", show=False)
    """
    if n_features is not None:
        containers.check_natural(n_features, "n_features")
    key, parts = rankings.resolve_attributions(data, model)
    groupby, mods = str(parts[0].params["groupby"]), (parts[0].mod,)
    known = _figure.stored_colors(data, groupby, mods) or _figure.stored_colors(parts[0].home, groupby)
    known = known or _figure.stored_colors(data, slots.prediction(key), mods)  # of groups in a column of their own
    colors = _figure.class_colors(parts[0].groups, known)
    if cell is not None:
        fig, axes, own = _draw_cell(key, parts, str(cell), n_features or 10, colors, ax)
    else:
        groups, title = _chosen(parts[0], group), _title(parts[0].params)
        shown = ("attributions", "scores", "standard_errors")
        tables = [_Table(part.mod, *(table[groups] for table in part.tables(shown))) for part in parts]
        if kind == "bar":
            fig, axes, own = _draw_bars(tables, groups, n_features or 10, colors, title, ax)
        else:
            chosen = [_choose(table, n_features) for table in tables]
            draw = _draw_heatmaps if kind == "heatmap" else _draw_dots
            fig, axes, own = draw(tables, chosen, colors, title, ax)
    return _figure.finish(fig, np.array(axes, dtype=object), show=show, save=save, return_fig=return_fig, own=own)


def _chosen(part: AttributionSlots, group: str | Sequence[str] | None) -> list[str]:
    """The classes to draw, in the order of the ranking."""
    n_cells = dict(zip(part.groups, np.asarray(part.params["n_cells"]), strict=True))
    if group is None:
        return [name for name in part.groups if n_cells[name]]
    wanted = as_names(group)
    for name in wanted:
        if name not in n_cells:
            raise KeyError(f"group: there is no '{name}'; there are {', '.join(map(repr, part.groups))}.")
        if not n_cells[name]:
            raise KeyError(f"group: '{name}' was not explained: it has no cells, or was not among groups=.")
    return [name for name in part.groups if name in wanted]


def _title(params: Mapping) -> str:
    """What was explained, and against what."""
    target, against, baseline = (params.get(name) for name in ("target", "against", "baseline"))
    what = "the predicted class" if target is None else str(target)
    if against is not None:
        return f"why {what} and not {against}"
    compared = {"each": "each other class", "rest": "the other classes", "zero": "no counts"}
    compared = compared.get(str(baseline), f"{baseline} cells" if str(baseline).isdigit() else str(baseline))
    return f"why {what}, compared with {compared}"


def _entitle(fig: Figure, title: str) -> None:
    fig.suptitle(textwrap.fill(title, int(12 * fig.get_figwidth())), fontsize=10)  # 12 letters an inch


def _choose(table: _Table, n_features: int | None) -> list[str]:
    """Features that contribute most to the classes, those of a class together, each once."""
    if n_features is None and len(table.mean) <= FEW:
        chosen = table.mean.index[table.mean.notna().any(axis=1)].tolist()
    else:
        firsts = [table.first(group, n_features or 3) for group in table.mean]
        chosen = list(dict.fromkeys(name for names in firsts for name in names))
    presence = table.presence.loc[chosen].fillna(-np.inf).to_numpy()
    order = np.lexsort([-presence.max(1), presence.argmax(1)])
    return [chosen[i] for i in order]


def _draw_heatmaps(tables: list[_Table], chosen: list[list[str]], colors: dict[str, str], title: str, ax):
    groups = list(tables[0].mean)
    rows = max(map(len, chosen))
    size = (0.26 * len(groups) + 1.9) * len(tables), ROW * rows + 1.6
    fig, axes, own = _figure.axes_for(ax, len(tables), "the modalities", *size)
    for one, table, names in zip(axes, tables, chosen, strict=True):
        values = table.mean.loc[names].to_numpy(dtype=float)
        limit = float(np.nanmax(np.abs(values), initial=1e-6))
        one.set_facecolor(_figure.UNLABELLED)  # where nothing was measured
        image = one.imshow(
            values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none", rasterized=True
        )
        absent = table.by_absence(names) & (np.abs(values) > 0.1 * limit)
        row, column = np.nonzero(absent)
        one.scatter(column, row, s=14, facecolors="none", edgecolors="black", linewidths=0.6)
        one.set_yticks(range(len(names)), _figure.shorten_each(names, 20), fontsize=LABEL)
        _name_classes(one, groups, colors, "x")
        one.tick_params(length=0)
        one.spines[:].set_visible(False)
        one.set_title(table.mod, fontsize=10, loc="left")
        bar = fig.colorbar(image, ax=one, location="bottom", shrink=0.7, aspect=25, pad=0.02)
        bar.set_label("attribution (logits)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    if own:
        _entitle(fig, f"{title} (circles: by absence)")
    return fig, axes, own


def _name_classes(ax: Axes, groups: list[str], colors: dict[str, str], axis: Literal["x", "y"]) -> None:
    """Names of classes along an axis, each with a spot of its colour."""
    names = _figure.shorten_each(groups, 24)
    size = 8 if len(groups) <= 20 else 6.5
    places, outside = np.arange(len(groups)), np.full(len(groups), -0.012)
    spots = {"s": 26, "marker": "s", "c": [colors[name] for name in groups], "clip_on": False, "linewidths": 0}
    if axis == "x":
        ax.set_xticks(places, names, rotation=90, fontsize=size)
        ax.tick_params(axis="x", pad=9)
        ax.scatter(places, outside, transform=ax.get_xaxis_transform(), **spots)
        ax.set_xlim(-0.5, len(groups) - 0.5)
    else:
        ax.set_yticks(places, names, fontsize=size)
        ax.tick_params(axis="y", pad=13)
        ax.scatter(outside, places, transform=ax.get_yaxis_transform(), **spots)


def _draw_dots(tables: list[_Table], chosen: list[list[str]], colors: dict[str, str], title: str, ax):
    groups = list(tables[0].mean)
    widths = [max(0.2 * len(names) + 0.4, 2.2) for names in chosen]  # at least that of the title
    size = sum(widths) + 2.2 + 0.9 * len(tables), 0.25 * len(groups) + 1.9
    fig, axes, own = _figure.axes_for(ax, len(tables), "the modalities", *size)
    if own:
        axes[0].get_gridspec().set_width_ratios(widths)
    for i, (one, table, names) in enumerate(zip(axes, tables, chosen, strict=True)):
        values = table.mean.loc[names].to_numpy(dtype=float).T  # (classes, features)
        largest = float(np.nanmax(np.abs(values), initial=1e-6))
        row, column = np.nonzero(np.abs(values) > 0.005 * largest)
        shown = values[row, column]
        edge = np.array([colors[groups[r]] if value > 0 else AGAINST for r, value in zip(row, shown, strict=True)])
        face = np.where(table.by_absence(names).T[row, column], "none", edge)
        one.scatter(column, row, s=150 * np.abs(shown) / largest, c=face, edgecolors=edge, linewidths=0.8)
        one.set_xticks(range(len(names)), _figure.shorten_each(names, 20), rotation=90, fontsize=LABEL)
        if i == 0 or not own:
            _name_classes(one, groups, colors, "y")
        else:  # the same rows as beside
            one.set_yticks(range(len(groups)), [])
        one.set(xlim=(-0.7, len(names) - 0.3), ylim=(len(groups) - 0.4, -0.6))
        one.tick_params(length=0)
        one.grid(axis="y", color="#808080", alpha=0.2, linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[:].set_color("#cccccc")
        one.set_title(table.mod, fontsize=9, loc="left")
        grey = {"color": "#707070", "markeredgewidth": 0.8}
        handles = [_figure.dot(f"{share * largest:.2g}", (150 * share) ** 0.5, **grey) for share in (0.1, 0.5, 1.0)]
        handles += [_figure.dot("by absence", 75**0.5, markerfacecolor="none", **grey)]
        handles += [_figure.dot("against", 75**0.5, **grey | {"color": AGAINST})]
        _figure.legend_beside(one, handles, "logits")
    if own:
        _entitle(fig, title)
    return fig, axes, own


def _draw_bars(tables: list[_Table], groups: list[str], n: int, colors: dict[str, str], title: str, ax):
    n_bars = [min(n, int(table.mean.notna().any(axis=1).sum())) for table in tables]
    beside = min(BAR_COLUMNS, len(groups))
    rows = -(-len(groups) // beside)
    size = 2.0 * len(tables) * beside, (ROW * max(3, *n_bars) + 0.5) * rows + 0.6
    n_axes = len(groups) * len(tables)
    fig, axes, own = _figure.axes_for(ax, n_axes, "the modalities of each class", *size, rows, beside * len(tables))
    axes = np.array(axes, dtype=object).reshape(len(groups), len(tables))
    if own:
        _entitle(fig, f"{title} (pale: by absence)")
        fig.supxlabel("attribution (logits)", fontsize=8)
    for row, group in zip(axes, groups, strict=True):
        for one, table, most in zip(row, tables, n_bars, strict=True):
            names = table.first(group, n)
            mean, presence, error = (part.loc[names, group].to_numpy() for part in table[1:])
            places = np.arange(len(names))
            one.barh(places, mean - presence, left=presence, color=colors[group], alpha=PALE)
            one.barh(places, presence, color=colors[group])
            one.errorbar(mean, places, xerr=np.nan_to_num(error), fmt="none", ecolor=_figure.ink(), elinewidth=0.8)
            _label_bars(one, _figure.shorten_each(names, 14), most)
            one.set_title(
                f"{_figure.shorten(group, 20)}: {table.mod}" if one is row[0] else table.mod, fontsize=8.5, loc="left"
            )
            if not len(names):
                one.text(0.5, 0.5, "not measured", transform=one.transAxes, ha="center", fontsize=8, color="grey")
    return fig, axes, own


def _label_bars(ax: Axes, names: Sequence[str], most: int) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=LABEL)
    ax.set_ylim(max(most, 1) - 0.4, -0.6)
    ax.axvline(0, color=_figure.ink(), linewidth=0.6)
    ax.tick_params(axis="x", labelsize=7)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _draw_cell(key: str, parts: list[AttributionSlots], cell: str, n: int, colors: dict[str, str], ax):
    """The largest attributions of one cell, for and against, with its counts."""
    found = []
    for part in parts:
        table = part.cells(key)
        if table is None:
            raise KeyError(
                f"Attributions of single cells were not kept under '{key}'; run av.tl.attributions(data, per_cell=True)"
            )
        if cell in table.index:
            found.append((part, table.loc[cell]))
    if not found:
        raise KeyError(f"cell: '{cell}' was not explained; pass n_cells=None to av.tl.attributions to explain all.")
    what = str(found[0][0].home.obs[slots.explained(key)][cell])
    fig, axes, own = _figure.axes_for(ax, len(found), "the modalities", 2.8 * len(found), ROW * n + 1.1)
    if own:
        _entitle(fig, f"{cell}: why {what} (counts)")
    for one, (part, values) in zip(axes, found, strict=True):
        largest = values.abs().nlargest(n).index
        shown = values[largest].sort_values(ascending=False)
        one.barh(range(len(shown)), shown, color=[colors.get(what, "#444444") if v > 0 else AGAINST for v in shown])
        counts = part.counts(cell, shown.index)
        names = _figure.shorten_each(shown.index, 14)
        _label_bars(one, [f"{name} ({count:.4g})" for name, count in zip(names, counts, strict=True)], n)
        missing = int(values.isna().sum())
        title = f"{part.mod}, {values.sum():+.1f} in all" + (f", {missing} not measured" if missing else "")
        one.set_title(title, fontsize=8.5, loc="left")
        one.set_xlabel("attribution (logits)", fontsize=8)
    return fig, axes, own
