"""pl.history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data.containers import Data
from anvi._data.fits import resolve_fit

from ._figure import axes_for, finish, ink

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"train": "#1f77b4", "validation": "#ff7f0e"}
TITLES = {
    "loss": "loss",
    "elbo": "ELBO",
    "accuracy": "accuracy (labelled cells)",
    "classification_loss": "classification loss",
    "reconstruction_rna": "RNA reconstruction",
    "reconstruction_protein": "protein reconstruction",
    "kl_z": "KL of z",
    "kl_u": "KL of u",
    "kl_label": "KL of the label",
    "kl_library": "KL of the library size",
    "kl_background": "KL of protein background",
}
N_COLUMNS = 4


@on_file_to_look_at
def history(
    data: Data,
    *,
    model: str | None = None,
    terms: str | Sequence[str] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    return_fig: bool = False,
) -> Axes | np.ndarray | Figure | None:
    """The course of a fit: loss, ELBO, its terms and the accuracy, for training and validation cells.

    The epochs of the warm-up, in which divergences have less than their full weight, are shaded: training losses of
    these epochs are not those of later ones. A dashed line marks the epoch with the lowest validation loss, whose
    weights were kept. The first epochs may lie far outside the others; they are then cut off at the frame and the
    figure says how far they reach.

    Parameters
    ----------
    data
        A fitted MuData or AnnData.
    model
        Key of the fit; None: the only one there.
    terms
        What to draw: columns of the history without `train_` and `validation_`, e.g. `"loss"` or `["loss", "elbo"]`.
        None: all that were recorded and are not zero throughout.
    show
        Show the figure instead of returning Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into, one per term: a single one with `terms="loss"`.
    return_fig
        Return the figure.

    Returns
    -------
    Array of Axes, or one if `terms` is a str; the figure with `return_fig`; None if it was shown.

    Raises
    ------
    KeyError
        If nothing was fitted, or a term was not recorded.
    ValueError
        If there are several fits and none is named, or the fit ran no epoch.

    Notes
    -----
    Reads `uns[key]['history']`, one row per epoch, counted from 1, in nats per cell.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> axes = av.pl.history(mdata, show=False)
    >>> one = av.pl.history(mdata, terms="loss", show=False)
    """
    fit = resolve_fit(data, model)
    table = pd.DataFrame(fit.stored("history"))
    wanted = [terms] if isinstance(terms, str) else terms if terms is None else list(terms)
    names = _terms(table, wanted)
    if not len(table) or not names:
        raise ValueError(f"'{fit.key}' ran no epoch (a mapping with max_epochs=0), so there is no course to draw.")
    n_columns = min(N_COLUMNS, len(names))
    n_rows = -(-len(names) // n_columns)
    size = max(4.2, 2.7 * n_columns), max(3.0, 2.15 * n_rows + 0.4)
    fig, axes, own = axes_for(ax, len(names), ", ".join(names), *size, n_rows, n_columns)
    for name, one in zip(names, axes, strict=True):
        _draw_term(one, table, name)
        if len(names) == 1 and name != "accuracy":
            one.set_ylabel("nats per cell", fontsize=8)
    _legend(fig if own else axes[0], table, fit.key)
    result = axes[0] if isinstance(terms, str) else np.array(axes, dtype=object)
    return finish(fig, result, show=show, save=save, return_fig=return_fig, own=own)


def _terms(table: pd.DataFrame, wanted: Sequence[str] | None) -> list[str]:
    """Names of what is drawn, those that say most first."""
    recorded = []
    for column in map(str, table.columns):
        kind, _, name = column.partition("_")
        if kind in COLORS and name not in recorded:
            recorded.append(name)
    if wanted is None:
        first = [name for name in ("loss", "elbo", "accuracy", "classification_loss") if name in recorded]
        rest = [name for name in recorded if name not in first]
        return first + [name for name in rest if any(column.any() for column in _series(table, name).values())]
    unknown = [name for name in wanted if name not in recorded]
    if unknown or not wanted:
        listed = ", ".join(map(repr, recorded))
        raise KeyError(f"terms={unknown or list(wanted)} were not recorded in this fit; there are: {listed}.")
    return list(wanted)


def _series(table: pd.DataFrame, name: str) -> dict[str, np.ndarray]:
    return {kind: table[f"{kind}_{name}"].to_numpy(dtype=float) for kind in COLORS if f"{kind}_{name}" in table.columns}


def _draw_term(ax: Axes, table: pd.DataFrame, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    epoch = table["epoch"].to_numpy()
    series = _series(table, name)
    for kind, values in series.items():
        marker = "o" if len(epoch) <= 15 else None  # a fit of one epoch is a point
        ax.plot(epoch, values, color=COLORS[kind], linewidth=1.4, marker=marker, markersize=2.5, label=kind)
    warm = _warm_up(table)
    if warm is not None:
        ax.axvspan(epoch[0] - 0.5, warm + 0.5, color="0.5", alpha=0.15, linewidth=0, zorder=0)
    best = _best_epoch(table)
    if best is not None:
        ax.axvline(best, color="0.5", linewidth=1, linestyle="--", zorder=1)
    ax.set_xlim(epoch[0] - 0.5, epoch[-1] + 0.5)
    if name == "accuracy":
        ax.set_ylim(-0.03, 1.03)
    else:
        _limit(ax, np.concatenate(list(series.values())), np.concatenate([v[len(v) // 2 :] for v in series.values()]))
    ax.set_title(TITLES.get(name, name.replace("_", " ")), fontsize=10)
    ax.set_xlabel("epoch", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    ax.spines[["top", "right"]].set_visible(False)


def _warm_up(table: pd.DataFrame) -> int | None:
    """The last epoch in which divergences have less weight than in the end."""
    warm = table.loc[table["kl_weight"] < table["kl_weight"].max(), "epoch"] if "kl_weight" in table else []
    return int(max(warm)) if len(warm) else None


def _best_epoch(table: pd.DataFrame) -> int | None:
    """The epoch whose weights were kept; without validation cells these are the last."""
    if "validation_loss" not in table:
        return None
    return int(table["epoch"].iloc[int(table["validation_loss"].to_numpy().argmin())])


def robust_limits(values: np.ndarray, late: np.ndarray) -> tuple[float, float]:
    """Limits that hold all late values, and of the others those that do not squash them.

    Tukey's far fences, three times the range of the middle half beyond it, tell what is far out. A cut that would gain
    little is not made: a curve that is whole is easier to read.
    """
    values, late = values[np.isfinite(values)], late[np.isfinite(late)]
    if not len(values):
        return 0.0, 1.0
    low, high = values.min(), values.max()
    first, third = np.quantile(values, [0.25, 0.75])
    reach = 3 * (third - first)
    cut_low = max(low, min(first - reach, late.min()))
    cut_high = min(high, max(third + reach, late.max()))
    if high - low > 2 * (cut_high - cut_low):
        # up to the last value that is kept, not up to the fence
        kept = values[(values >= cut_low) & (values <= cut_high)]
        low, high = kept.min(), kept.max()
    return float(low), float(high)


def _limit(ax: Axes, values: np.ndarray, late: np.ndarray) -> None:
    """Set the limits, and say what lies beyond them."""
    from matplotlib import rcParams

    low, high = robust_limits(values, late)
    margin = 0.05 * (high - low) or 0.05 * max(abs(high), 1.0)
    ax.set_ylim(low - margin, high + margin)
    finite = values[np.isfinite(values)]
    notes = []
    if len(finite) and finite.max() > high + margin:
        notes.append((f"↑ {finite.max():,.4g}", 0.97, "top"))
    if len(finite) and finite.min() < low - margin:
        notes.append((f"↓ {finite.min():,.4g}", 0.03, "bottom"))
    box = {"facecolor": rcParams["axes.facecolor"], "alpha": 0.8, "linewidth": 0, "pad": 1}
    for text, y, side in notes:
        ax.text(0.6, y, text, transform=ax.transAxes, ha="center", va=side, fontsize=8, color=ink(), bbox=box)


def _legend(where, table: pd.DataFrame, key: str) -> None:
    """Lines, shading and the best epoch, once for all panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [kind for kind in COLORS if any(str(column).startswith(f"{kind}_") for column in table.columns)]
    handles = [Line2D([], [], color=COLORS[kind], label=kind) for kind in kinds]
    best = _best_epoch(table)
    if best is not None:
        handles.append(Line2D([], [], color="0.5", linestyle="--", label=f"best, kept: epoch {best}"))
    if _warm_up(table) is not None:
        handles.append(Patch(color="0.5", alpha=0.15, label="warm-up"))
    if hasattr(where, "suptitle"):
        where.legend(
            handles=handles,
            loc="outside upper center",
            ncols=len(handles) if len(where.axes) > 1 else 2,
            fontsize=9,
            frameon=False,
            title=key if len(where.axes) == 1 else f"{key}: nats per cell",
        )
    else:
        where.legend(handles=handles, fontsize=8, framealpha=0.9, edgecolor="none")
