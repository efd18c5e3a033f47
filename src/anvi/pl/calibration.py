"""pl.calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data.containers import Data
from anvi._data.fits import missing, resolve_fit
from anvi._data.predictions import expected_error

from ._figure import axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"before": "#b0b0b0", "after": "#1f77b4"}
FEWEST = 30
"""Cells of a bin that is drawn: the share of fewer is known to a fifth at best."""
TITLES = {"with_proteins": "with proteins", "without_proteins": "RNA only"}


@on_file_to_look_at
def calibration(
    data: Data,
    *,
    model: str | None = None,
    level: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Axes | list[Axes] | None = None,
    return_fig: bool = False,
) -> Axes | list[Axes] | Figure | None:
    """Whether confidence means what it says: share of right predictions by confidence, before and after calibration.

    The cells are labelled validation cells, thinned as another experiment would have seen them, in ways that the
    calibration was not fitted on; once with their proteins and once without. On the diagonal, of the cells with
    confidence .8 eight in ten are right; below it the model is too sure. Neighbouring bins are joined until they have
    30 cells; lines are 95 % intervals, and dots are larger where there are more cells.

    Parameters
    ----------
    data
        MuData or AnnData with a labelled fit.
    model
        Key of the fit; None: the only one there.
    level
        Of labels that have several: that level; None: the classes.
    show
        Show the figure instead of returning the Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into, one for cells with proteins and one for cells without; a single one for an RNA model.
    return_fig
        Return the figure.

    Returns
    -------
    One Axes or a list of two, the figure with `return_fig`, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such fit, or its probabilities are not calibrated.
    ValueError
        If there are several fits and none is named.

    Notes
    -----
    Reads `uns[key]["calibration"]`.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(1200, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2, train_size=0.8)
    >>> axes = av.pl.calibration(mdata, show=False)
    """
    fit = resolve_fit(data, model, predictions=True)
    table = fit.home.uns.get(fit.key, {}).get("calibration")
    if table is None:
        raise missing(
            f"{fit.where}.uns['{fit.key}']['calibration']", "a fit with 20 labelled validation cells writes it"
        )
    if "level" in table:
        table = table[table["level"] == fit.levels.names[fit.levels.position(level)]]
    elif level is not None:
        fit.levels.position(level)
    groups = [name for name in TITLES if (table["cells_seen"] == name).any()]
    fig, axes, own = axes_for(ax, len(groups), "the kinds of cells", 3.4 * len(groups), 3.9)
    for part, name in zip(axes, groups, strict=True):
        title = TITLES[name] if len(groups) > 1 else fit.key
        _draw(part, table[table["cells_seen"] == name], title if level is None else f"{title}, {level}")
    axes[0].set_ylabel("share that is right")
    result = axes if len(axes) > 1 else axes[0]
    return finish(fig, result, show=show, save=save, return_fig=return_fig, own=own)


def _draw(ax: Axes, table: pd.DataFrame, title: str) -> None:
    ax.plot([0, 1], [0, 1], color="0.5", alpha=0.5, linewidth=1, zorder=0)
    for when, color in COLORS.items():
        part = table[table["when"] == when]
        error, part = expected_error(part), merged(part)
        x, y, low, high = (part[name] for name in ("confidence", "accuracy", "low", "high"))
        ax.plot(x, y, color=color, linewidth=1.2, zorder=2)
        ax.vlines(x, low, high, color=color, linewidth=1, alpha=0.6, zorder=1)
        cells = part["cells"].to_numpy(float)
        size = 8 + 60 * np.sqrt(cells / cells.max())  # by the number of cells, few still seen
        ax.scatter(x, y, s=size, color=color, label=f"{when}: ECE {error:.3f}", zorder=3, linewidths=0)
    ax.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence", aspect="equal")
    ax.set_title(title, fontsize=10)
    legend = ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([25])
    ax.spines[["top", "right"]].set_visible(False)


def merged(table: pd.DataFrame) -> pd.DataFrame:
    """Neighbouring bins joined until each has cells enough to say something; a last few join the bin before.

    Returns cells, mean confidence, accuracy, and the ends `low` and `high` of Wilson's 95 % interval of the latter.
    """
    rows, waiting = [], None
    for row in table.sort_values("confidence")[["cells", "confidence", "accuracy"]].to_numpy(dtype=float):
        waiting = row if waiting is None else _joined(waiting, row)
        if waiting[0] >= FEWEST:
            rows.append(waiting)
            waiting = None
    if waiting is not None:
        rows = [*rows[:-1], _joined(rows[-1], waiting)] if rows else [waiting]
    out = pd.DataFrame(rows, columns=["cells", "confidence", "accuracy"])
    n, p, z = out["cells"], out["accuracy"], 1.96
    middle, half = (p + z**2 / (2 * n)), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return out.assign(low=(middle - half) / (1 + z**2 / n), high=(middle + half) / (1 + z**2 / n))


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Two bins as one: cells summed, the rest averaged over cells."""
    cells = one[0] + other[0]
    return np.concatenate([[cells], (one[0] * one[1:] + other[0] * other[1:]) / cells])
