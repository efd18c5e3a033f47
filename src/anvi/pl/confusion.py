"""pl.confusion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.fits import Fit, resolve_fit
from anvi._data.predictions import warn_of_strangers

from ._figure import UNLABELLED, axes_for, finish, shorten_each, text_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MAX_NUMBERS = 20  # classes up to which each cell has room for a number


@on_file_to_look_at
def confusion(
    data: Data,
    *,
    model: str | None = None,
    labels_key: str | None = None,
    split: Literal["validation", "train", "test"] | None = "validation",
    normalize: bool = True,
    level: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Axes | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Labels against predictions: rows are true classes, columns predicted ones, bars the recall of each class.

    Only cells that have a label are counted. By default these are the validation cells: the model has seen the labels
    of the training cells, so those say little about how well it predicts.

    Parameters
    ----------
    data
        MuData or AnnData with predictions.
    model
        Key of the fit; None: the only one there.
    labels_key
        Column with the true classes, found as the fit finds it; missing values, "" and the fit's unlabelled category
        are left out. None: that of the fit.
    split
        Which cells to count, by `obs['{key}_split']`; None: all.
    normalize
        Draw shares of each row; False: numbers of cells.
    level
        Of labels that have several: that level; None: the classes.
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
        If nothing was fitted or predicted, or a column is not there.
    ValueError
        If there are several fits and none is named, or the split has no labelled cell.

    Notes
    -----
    Reads `obs['{key}_prediction']`, `obs['{key}_confidence']`, `obs['{key}_split']`, the labels and `uns[key]`.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> ax = av.pl.confusion(mdata, show=False)
    >>> ax = av.pl.confusion(mdata, labels_key="true_cell_type", split=None, show=False)
    """
    fit = resolve_fit(data, model, predictions=True)
    table = _count(fit, labels_key, split, level)
    n_rows, n_columns = table.shape
    fig, (ax,), own = axes_for(ax, 1, "the matrix", _side(n_columns) + 3.2, _side(n_rows) + 1.6)
    # share of each true class that was recognised: NaN where it has no cell, 0 where the model does not know it
    right = np.array([table.loc[name, name] if name in table.columns else 0 for name in table.index], dtype=float)
    n_true = table.sum(axis=1).to_numpy(dtype=float)
    recall = np.divide(right, n_true, out=np.full(len(table), np.nan), where=n_true > 0)
    image = _draw_matrix(ax, table, normalize)
    _draw_recall(ax, recall)
    if max(table.shape) > MAX_NUMBERS:
        bar = fig.colorbar(image, ax=ax, shrink=0.35, anchor=(0, 1), aspect=18, pad=0.02)
        bar.set_label("share of the row" if normalize else "cells", fontsize=9)
        bar.outline.set_visible(False)
    n = table.to_numpy().sum()
    ax.set_title(
        f"{fit.key}{'' if level is None else f', {level}'}, {'all' if split is None else split} cells\n"
        f"{n:,} labelled, accuracy {right.sum() / n:.2f}, mean recall {np.nanmean(recall):.2f}",
        fontsize=10,
    )
    return finish(fig, ax, show=show, save=save, return_fig=return_fig, own=own)


def _side(n_classes: int) -> float:
    """Inches of the matrix: beyond 25 classes it grows less, to what a name in small print needs."""
    return max(2.6, 0.36 * min(n_classes, 25) + 0.05 * max(n_classes - 25, 0))


def _count(fit: Fit, labels_key: str | None, split: str | None, level: str | None) -> pd.DataFrame:
    """Cells by true class (rows) and predicted class (columns), as many rows as classes and in the same order.

    Labels that the model does not know are further rows, predictions that it does not know further columns.
    """
    labels_key = labels_key or fit.setup.get("labels_key")
    if labels_key is None:
        raise KeyError("The predictions do not say which column holds the true classes; name it: labels_key=...")
    frame = pd.DataFrame({"true": fit.labels(labels_key, level), "predicted": fit.prediction(level).astype(object)})
    inside = pd.Series(True, index=frame.index) if split is None else fit.split() == split
    frame = frame[inside.to_numpy(dtype=bool)].dropna()
    if frame.empty:
        if split is None:
            raise ValueError(f"No cell with a prediction has a label in '{labels_key}'.")
        sizes = fit.split().value_counts()
        there = ", ".join(f"'{name}' ({n} cells)" for name, n in sizes[sizes > 0].items())
        raise ValueError(
            f"split='{split}' has no labelled cell in '{labels_key}'; the fit has {there}. Take another split= (None: "
            "all cells), or fit again with more labelled cells and train_size below 1."
        )
    classes = fit.groups(level)
    column = slots.prediction(fit.key)
    warn_of_strangers(frame["true"], frame["predicted"], classes, labels_key if level is None else level, column)
    rows, columns = ([*classes, *sorted(set(frame[name]).difference(classes))] for name in ("true", "predicted"))
    counts = pd.crosstab(frame["true"], frame["predicted"])
    return counts.reindex(index=rows, columns=columns, fill_value=0)


def _draw_matrix(ax: Axes, table: pd.DataFrame, normalize: bool) -> AxesImage:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    counts = table.to_numpy(dtype=float)
    n = counts.sum(axis=1, keepdims=True)
    values = np.divide(counts, n, out=np.full(counts.shape, np.nan), where=n > 0) if normalize else counts
    cmap = colormaps["Blues"].with_extremes(bad=UNLABELLED)
    norm = Normalize(0, 1 if normalize else max(1.0, counts.max()))
    n_rows, n_columns = values.shape
    image = ax.imshow(np.ma.masked_invalid(values), cmap=cmap, norm=norm, aspect="auto")
    size = 9 if max(n_rows, n_columns) <= 12 else 7
    ax.set_xticks(range(n_columns), shorten_each(table.columns), fontsize=size)
    flat = n_columns <= 6 and max(map(len, table.columns)) <= 4
    ax.tick_params(axis="x", rotation=0 if flat else 90)
    rows = [f"{name} ({int(total):,})" for name, total in zip(shorten_each(table.index), n[:, 0], strict=True)]
    ax.set_yticks(range(n_rows), rows, fontsize=size)
    ax.tick_params(length=0)
    ax.set(xlabel="predicted", ylabel="true (cells)")
    # thin lines between cells, so that a value can be followed to its row and column
    ax.set_xticks(np.arange(0.5, n_columns - 1), minor=True)
    ax.set_yticks(np.arange(0.5, n_rows - 1), minor=True)
    ax.grid(which="minor", color="0.88", linewidth=0.5)
    ax.tick_params(which="minor", length=0)
    if max(n_rows, n_columns) > MAX_NUMBERS:
        return image
    for row, column in zip(*np.nonzero(counts), strict=True):
        value = values[row, column]
        text = f"{value:.2f}" if normalize else f"{int(value):,}"
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color=text_color(cmap(norm(value))))
    return image


def _draw_recall(ax: Axes, recall: np.ndarray) -> None:
    """Bars on the right of the matrix, row by row."""
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    # as wide in inches whatever the matrix is: counted from its right side, in height as high as it is
    inches = ax.figure.dpi_scale_trans + ScaledTranslation(1, 0, ax.transAxes)
    place = blended_transform_factory(inches, ax.transAxes)
    bars = ax.inset_axes([0.1, 0, 0.8, 1], transform=place, sharey=ax)
    rows = np.arange(len(recall))
    bars.barh(rows, np.nan_to_num(recall), height=0.75, color="#6baed6")
    for row, value in zip(rows, recall, strict=True):
        text = "no cells" if np.isnan(value) else f"{value:.2f}"
        bars.text(0.04, row, text, va="center", fontsize=7 if len(recall) <= 40 else 6, color="0.1")
    bars.set_xlim(0, 1)
    bars.set_xticks([0, 1], ["0", "1"], fontsize=7)
    bars.tick_params(axis="y", which="both", left=False, labelleft=False)
    bars.spines[["top", "right", "left"]].set_visible(False)
    bars.set_xlabel("recall", fontsize=9)  # below: a long title of the matrix reaches over the bars
