"""metrics.classification: how well cell types are predicted, and whether confidence is what it says."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data, Source
from anvi._data.fits import asking
from anvi._data.labels import label_column, labels_at
from anvi._data.predictions import expected_error, reliability, warn_of_strangers
from anvi._data.select import as_mask, mask_of
from anvi._data.setup import Setup
from anvi._find import find_model
from anvi._model import Model

from ._ppc import mean_of

OVERALL = "overall"
"""Name of the row over all classes."""


@on_file
def classification(
    data: Data,
    labels_key: str | None = None,
    *,
    model: str | Path | Model | None = None,
    prediction: str | None = None,
    split: str | None = "validation",
    cells: Sequence | None = None,
    level: str | None = None,
) -> pd.DataFrame:
    """Accuracy, macro F1, precision and recall of every class, and calibration of the confidence.

    Works from slots, without a pass of the model. Cells without a label or without a prediction are not counted; by
    default only validation cells are, since the model has seen the labels of the others.

    Parameters
    ----------
    data
        Object with predictions.
    labels_key
        Column with the true classes. None: the labels of the fit.
    model
        Key or :class:`~anvi.Model`, which says where the predictions are; None: the only fitted model in `data`.
    prediction
        Another column with predictions, of any method: no model is needed then. If its name ends in `_prediction`, its
        confidence and split are looked for beside it.
    split
        "validation", "train" or "test" as the fit wrote it; None: all cells.
    cells
        Names of cells, or a mask over `data.obs_names`; they are taken whatever their split.
    level
        Of labels that have several: the predictions and labels of that level are compared; cells with a coarse label
        count there. None: the classes.

    Returns
    -------
    DataFrame with a row per class and a first row "overall" (a class of that name has the row "overall (class)").
    Columns:

    `cells`, `predicted`
        How many cells have the class, and how many are predicted to.
    `precision`, `recall`, `f1`
        Of the class, 0 where it was never predicted; overall, their mean over the classes that any cell has (macro F1).
    `accuracy`
        Overall, the share of cells that are predicted right.
    `confidence`
        Mean probability of what was predicted, over the cells that have the class.
    `ece`
        Overall, the expected calibration error: the difference between accuracy and mean confidence in 15 bins of
        confidence of equal width, averaged over cells.

    Classes that the prediction does not know count as wrong; classes that no cell has come last, with recall NaN.

    Raises
    ------
    KeyError
        If there is no such model or column.
    ValueError
        If no cell with label and prediction is left.

    Notes
    -----
    Reads `obs['{key}_prediction']`, `obs['{key}_confidence']`, `obs['{key}_split']` and the labels. ECE: Guo et al.
    2017, On calibration of modern neural networks.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> table = av.metrics.classification(mdata)
    >>> table.index[0], bool(0 <= table.loc["overall", "f1"] <= 1)
    ('overall', True)
    >>> table = av.metrics.classification(mdata, "true_cell_type", split=None)
    """
    source = Source(data)
    where = _where(data, model, prediction, level)
    true_from, labels_key = labels_key, labels_key or where.labels_key
    if labels_key is None:
        raise ValueError("There are no labels to hold predictions against; name their column: labels_key=...")
    table = pd.DataFrame(
        {
            "true": label_column(source, labels_key, where.unlabeled, where.mods)
            if where.setup is None
            else labels_at(source, where.setup, source.obs_names, true_from, level),
            "predicted": source.text(where.prediction, "prediction", where.mods),
            "confidence": _confidence(source, where),
        },
        index=data.obs_names,
    )
    table = table[_chosen(source, where, split, cells)].dropna(subset=["true", "predicted"])
    if table.empty:
        what = "the given cells have" if cells is not None else f"split={split!r} has"
        raise ValueError(
            f"No cell with a label in '{labels_key}' and a prediction in '{where.prediction}' is left: {what} none. "
            "Take other cells (split=None: all)."
        )
    if where.setup is not None:
        warn_of_strangers(
            table["true"], table["predicted"], where.classes, true_from or level or labels_key, where.prediction
        )
    return score(*(table[name].to_numpy() for name in ("true", "predicted", "confidence")), where.classes)


class _Where(NamedTuple):
    """Where predictions lie, and what goes with them."""

    prediction: str
    confidence: str | None
    split: str | None
    labels_key: str | None
    unlabeled: str
    mods: tuple[str, ...]
    classes: tuple[str, ...]
    setup: Setup | None  # of the model; None where a column was named


def _where(data: Data, model: str | Path | Model | None, prediction: str | None, level: str | None) -> _Where:
    """The model's slots, or a column that was named; a modality's columns are named as its own."""
    if prediction is not None:
        stem = prediction.removesuffix(slots.prediction(""))
        beside = (slots.confidence(stem), slots.split(stem)) if stem != prediction else (None, None)
        mods = tuple(getattr(data, "mod", ()))
        if level is not None:
            raise ValueError("level= is for the predictions of a model; name the column of that level: prediction=...")
        return _Where(prediction, *beside, None, Setup(()).unlabeled_category, mods, (), None)
    fitted, key = find_model(data, model)
    setup = fitted.setup
    if not setup.classes:
        raise ValueError(
            f"The model '{key}' ({fitted.name}) has no labels, so it predicts none; name a column: prediction=..."
        )
    home = slots.home(data, setup)
    prefix = "" if home is data else f"{setup.rna_mod}:"
    number = setup.levels.position(level)
    ending = setup.levels.ending(number)
    names = (f"{slots.prediction(key)}{ending}", f"{slots.confidence(key)}{ending}", slots.split(key))
    if names[0] not in home.obs:
        raise KeyError(f"There is no obs['{names[0]}']; {asking(data, 'predict', key)} first.")
    names = (prefix + name for name in names)
    return _Where(*names, setup.labels_key, setup.unlabeled_category, setup.mods, setup.levels.groups(number), setup)


def _confidence(source: Source, where: _Where) -> np.ndarray:
    """Confidence of every cell of the object, NaN where there is none."""
    with suppress(KeyError):
        if where.confidence is not None:
            return source.column(where.confidence, "prediction", where.mods).to_numpy(dtype=float, na_value=np.nan)
    return np.full(len(source.obs_names), np.nan)


def _chosen(source: Source, where: _Where, split: str | None, cells: Sequence | None) -> np.ndarray:
    """Which cells of the object are counted."""
    if cells is not None:
        asked, cells = cells, mask_of(cells, source.obs_names, "cells")
        if cells.dtype == bool:
            return cells
        unknown = pd.Index(cells).difference(source.obs_names)
        if len(unknown):
            hint = "" if cells.dtype.kind in "US" else f" {as_mask(asked, source.obs_names, 'cells')}."
            raise KeyError(f"cells: {len(unknown)} are not in the object (first: '{unknown[0]}').{hint}")
        return source.obs_names.isin(cells)
    if split is None:
        return np.ones(len(source.obs_names), dtype=bool)
    if where.split is None:
        raise KeyError(
            f"'{where.prediction}' has no split beside it; say which cells: split=None for all, or cells=..."
        )
    try:
        column = source.text(where.split, "split", where.mods)
    except KeyError as error:
        raise KeyError(f"split='{split}' needs obs['{where.split}'], which a fit writes; split=None: all.") from error
    return (column == split).to_numpy()


def score(true: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, classes: Sequence[str] = ()) -> pd.DataFrame:
    """The table of :func:`classification` from arrays `(cells,)`, `classes` first; confidence may be NaN throughout."""
    names = [*classes, *sorted((set(true) | set(predicted)) - set(classes))]
    names.sort(key=lambda name: name not in set(true))  # stable: those that no cell has come last
    rows = {}
    for name in names:
        has, called = true == name, predicted == name
        right = (has & called).sum()
        rows[name] = {
            "cells": has.sum(),
            "predicted": called.sum(),
            "precision": right / max(called.sum(), 1),
            "recall": right / has.sum() if has.any() else np.nan,
            "f1": 2 * right / (has.sum() + called.sum()) if has.any() else np.nan,
            "accuracy": np.nan,
            "confidence": mean_of(confidence[has]),
            "ece": np.nan,
        }
    present, known = [row for row in rows.values() if row["cells"]], np.isfinite(confidence)
    overall = {"cells": len(true), "predicted": len(true)}
    overall |= {name: np.mean([row[name] for row in present]) for name in ("precision", "recall", "f1")}
    overall |= {
        "accuracy": (true == predicted).mean(),
        "confidence": mean_of(confidence),
        "ece": expected_error(reliability(confidence[known].astype(float), (true == predicted)[known])),
    }
    names = [f"{OVERALL} (class)" if name == OVERALL else name for name in names]
    table = pd.DataFrame([overall, *rows.values()], index=[OVERALL, *names])
    return table.astype({"cells": int, "predicted": int})
