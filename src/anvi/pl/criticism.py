"""pl.criticism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data.containers import Data, Source
from anvi._data.fits import missing

from ._figure import axes_for, finish, shorten_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICTS = {"pass": "#2c8652", "warn": "#b85c00", "fail": "#d43d3d", "unknown": "#767676"}
SPLITS = {"train": "#1f77b4", "validation": "#ff7f0e", "other": "0.55"}
TITLES = {
    "cv_cell": "CV of cells",
    "cv_gene": "CV of features",
    "zero_fraction": "share of zeros",
    "calibration": "place among the draws",
    "de": "differences between groups",
}
OTHER_TITLES = {"zero_fraction": "share of non-zeros", "calibration": "inside intervals of the draws"}
STATISTICS = {
    "pearson": "Pearson",
    "ratio": "model / data",
    "mae": "mean difference",
    "error": "error",
    "roc_auc": "ROC-AUC",
}
SCORES = {"roc_auc": ("o", "ROC-AUC"), "gene_f1": ("s", "F1 of the top"), "lfc_pearson": ("^", "LFC Pearson")}
MAX_GROUPS = 30


@on_file_to_look_at
def criticism(
    data: Data,
    *,
    model: str | None = None,
    modality: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure | None:
    """The posterior predictive checks of a fit, with their verdicts: a row per modality, a panel per check.

    Points on the diagonal are cells or features whose draws are like their data. Bars of the places are level in a
    model that draws from the distribution of the data: high at both ends where draws vary too little, in the middle
    where they vary too much, at one end where they are too low (right) or too high (left).

    Parameters
    ----------
    data
        An object in which `metrics.criticism` has written.
    model
        Key of the slot; None: the only one there.
    modality
        Name of the only modality to draw; None: all.
    show
        Show the figure instead of returning Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into, one per panel, modality by modality.
    return_fig
        Return the figure.

    Returns
    -------
    Array of Axes (modalities, checks), the figure with `return_fig`, or None if it was shown.

    Raises
    ------
    KeyError
        If there are no checks in the object, or none of the modality.
    ValueError
        If there are checks of several fits and none is named, or the number of Axes is wrong.

    Notes
    -----
    Reads `uns[key]['criticism']`.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> av.metrics.criticism(mdata, n_samples=2)
    >>> axes = av.pl.criticism(mdata, show=False)
    """
    key, tables = _find(data, model)
    verdict = pd.DataFrame(tables["verdict"]).astype({"modality": str, "metric": str, "statistic": str, "verdict": str})
    checks = [name for name in TITLES if name in tables]
    mods = list(dict.fromkeys(pd.DataFrame(tables[checks[0]])["modality"].astype(str)))
    if modality is not None:
        if modality not in mods:
            raise KeyError(f"modality='{modality}' was not checked; there are: {', '.join(map(repr, mods))}.")
        mods = [modality]
    panels = [(mod, name) for mod in mods for name in checks]
    what, size = ", ".join(f"{mod} {name}" for mod, name in panels), (2.9 * len(checks) + 0.6, 2.9 * len(mods) + 0.4)
    fig, axes, own = axes_for(ax, len(panels), what, *size, len(mods), len(checks))
    if own:
        fig.suptitle(f"{key}: counts drawn from the model against the data", fontsize=11)
    of_scvi_tools = str(tables.get("params", {}).get("definition")) == "scvi"
    titles = TITLES | OTHER_TITLES if of_scvi_tools else TITLES
    for (mod, name), one in zip(panels, axes, strict=True):
        part = {
            table: rows[rows["modality"].astype(str) == mod]
            for table, rows in tables.items()
            if table not in ("verdict", "params")
        }
        _PANELS[name](one, part, name)
        _title(one, f"{mod}: {titles[name]}", verdict[(verdict["modality"] == mod) & (verdict["metric"] == name)])
    grid = np.array(axes, dtype=object).reshape(len(mods), len(checks))
    return finish(fig, grid, show=show, save=save, return_fig=return_fig, own=own)


def _find(data: Data, model: str | None) -> tuple[str, Mapping]:
    """Key and tables of the checks that are meant."""
    found = {
        key: value["criticism"]
        for part in Source(data).parts
        for key, value in part.uns.items()
        if isinstance(value, Mapping) and isinstance(value.get("criticism"), Mapping)
    }
    if model is None and len(found) > 1:
        raise ValueError(f"There are checks of several fits: {', '.join(map(repr, found))}. Name one: model=...")
    key = next(iter(found), None) if model is None else model
    if key not in found:
        argument = "" if model is None else f", model='{model}'"
        raise missing(f"uns['{model or 'totalanvi'}']['criticism']", f"run av.metrics.criticism(data{argument})")
    return key, found[key]


def _title(ax: Axes, title: str, lines: pd.DataFrame) -> None:
    """Title, and below it what was judged, in the colour of its worst verdict."""
    ax.set_title(title, fontsize=10, pad=6 + 11 * len(lines))
    for i, line in enumerate(lines.itertuples(index=False)):
        text = f"{STATISTICS.get(line.statistic, line.statistic)} {line.value:.3g}: {line.verdict}"
        height = 4 + 11 * (len(lines) - 1 - i)
        ax.annotate(
            text,
            (0.5, 1),
            (0, height),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=VERDICTS.get(line.verdict, VERDICTS["unknown"]),
        )
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_cells(ax: Axes, part: Mapping, name: str) -> None:
    cells = part["cells"]
    split = cells["split"].astype(str)
    for kind, color in SPLITS.items():
        here = cells[split == kind]
        if len(here):
            ax.scatter(here["cv_data"], here["cv_model"], s=5, alpha=0.6, linewidths=0, color=color, label=kind)
    _diagonal(ax, cells["cv_data"], cells["cv_model"], log=True)
    if split.nunique() > 1:
        ax.legend(fontsize=7, frameon=False, markerscale=2, handletextpad=0.1, loc="lower right")


def _draw_features(ax: Axes, part: Mapping, name: str) -> None:
    what = "cv" if name == "cv_gene" else "zero"
    data, model = part["features"][f"{what}_data"], part["features"][f"{what}_model"]
    size = 6 if len(data) > 100 else 14
    ax.scatter(data, model, s=size, alpha=0.6, linewidths=0, color="#707070", rasterized=len(data) > 10_000)
    _diagonal(ax, data, model, log=what == "cv")


def _diagonal(ax: Axes, data: pd.Series, model: pd.Series, *, log: bool) -> None:
    """Equal limits and scales on both axes, and the line on which model and data agree."""
    values = np.concatenate([data, model]).astype(float)
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = (values.min(), values.max()) if len(values) else (0.1, 1.0)
    if log:
        ax.set(xscale="log", yscale="log")
        low, high = low / 1.15, high * 1.15
        _few_ticks(ax, low, high)
    else:
        margin = 0.04 * (high - low) or 0.05
        low, high = low - margin, high + margin
    ax.plot([low, high], [low, high], color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlim=(low, high), ylim=(low, high), box_aspect=1)
    ax.set_xlabel("data", fontsize=9)
    ax.set_ylabel("drawn", fontsize=9)


def _few_ticks(ax: Axes, low: float, high: float) -> None:
    """Plain numbers on a logarithmic scale that may not even span a decade."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    steps = (1, 2, 5) if high / low < 100 else (1,)
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = [tick for decade in decades for tick in decade * np.array(steps) if low <= tick <= high]
    if len(ticks) < 2:
        ticks = list(np.linspace(low, high, 4)[1:-1].round(2))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_calibration(ax: Axes, part: Mapping, name: str) -> None:
    if "ranks" not in part:
        _draw_intervals(ax, part["calibration"])
        return
    ranks = part["ranks"]
    ax.bar(ranks["place"], ranks["all"], color="#9ecae1", width=0.9)
    if ranks["validation"].notna().all():
        ax.plot(ranks["place"], ranks["validation"], "_", color=SPLITS["validation"], markersize=14, label="validation")
        ax.legend(fontsize=7, loc="lower center", framealpha=0.85, edgecolor="none")
    ax.axhline(1 / len(ranks), color="0.5", linestyle="--", linewidth=1)
    ax.set_xlabel("draws below the count", fontsize=9)
    ax.set_ylabel("share of counts", fontsize=9)
    if len(ranks) <= 12:
        ax.set_xticks(ranks["place"])
    ax.set_box_aspect(1)


def _draw_intervals(ax: Axes, table: pd.DataFrame) -> None:
    inside = table[table["statistic"].astype(str) == "inside"]
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, zorder=0)
    ax.plot(inside["level"], inside["all"], "o-", color="#1f77b4", markersize=4)
    ax.set(xlim=(0, 1), ylim=(0, 1.03))
    ax.set_xlabel("level of the interval", fontsize=9)
    ax.set_ylabel("share of counts inside", fontsize=9)
    ax.set_box_aspect(1)


def _draw_groups(ax: Axes, part: Mapping, name: str) -> None:
    table = part["de"].iloc[:MAX_GROUPS]
    rows = np.arange(len(table))
    for column, (marker, label) in SCORES.items():
        ax.plot(table[column].astype(float), rows, marker, markersize=4.5, alpha=0.85, label=label)
    names = [
        f"{group} ({cells:,})"
        for group, cells in zip(shorten_each(table["group"], 20), table["cells"].astype(int), strict=True)
    ]
    ax.set_yticks(rows, names)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlim(min(0, np.nanmin(table[list(SCORES)].to_numpy(float), initial=0)) - 0.04, 1.04)
    ax.grid(axis="y", color="0.5", alpha=0.2, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel("data against one draw", fontsize=9)
    below = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.2), "ncols": len(SCORES)}  # points may lie anywhere
    ax.legend(fontsize=7, frameon=False, handletextpad=0.0, columnspacing=0.8, **below)


_PANELS = {
    "cv_cell": _draw_cells,
    "cv_gene": _draw_features,
    "zero_fraction": _draw_features,
    "calibration": _draw_calibration,
    "de": _draw_groups,
}
