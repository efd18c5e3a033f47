"""What a model says of the cell types, in the slots."""

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd

from . import containers, slots
from .containers import Data, Source


def colors_of(data: Source | Data, labels_key: str, classes: tuple[str, ...]) -> list[str] | None:
    """Colours of the classes in the first part whose column of that name has one for each; None if there is none."""
    parts = Source.of(data).parts
    names = dict.fromkeys((labels_key, labels_key.partition(":")[2]))  # "rna:cell_type" may be coloured as "cell_type"
    for part, name in itertools.product(parts, names):
        colors, column = part.uns.get(f"{name}_colors"), part.obs.get(name)
        if colors is None or column is None or not isinstance(column.dtype, pd.CategoricalDtype):
            continue
        color_of = dict(zip(map(str, column.cat.categories), map(str, colors), strict=False))
        if all(name in color_of for name in classes):
            return [color_of[name] for name in classes]
    return None


def write_colors(out: slots.Writer, key: str, classes: tuple[str, ...], colors: list[str]) -> None:
    """Colours for the predictions and, unless there are labels beyond the classes, for the labels."""
    out.uns(f"{slots.prediction(key)}_colors", colors)
    if list(out.home.obs[slots.label(key)].cat.categories) == list(classes):
        out.uns(f"{slots.label(key)}_colors", list(colors))


class NoveltyScores(NamedTuple):
    """How far cells lie from everything that a model knows."""

    score: np.ndarray  # (cells,)
    beyond: np.ndarray  # (cells,) bool, beyond the limit


def write_predictions(
    out: slots.Writer,
    key: str,
    classes: tuple[str, ...],
    probabilities: np.ndarray,
    *,
    soft: bool,
    known: pd.Series | None = None,
    far: NoveltyScores | None = None,
    sets: np.ndarray | None = None,
) -> None:
    """Write what a model says of the cell types.

    Parameters
    ----------
    out, key
        Where to.
    classes
        Exact class names.
    probabilities
        `(cells, classes)`.
    soft
        Whether all probabilities are wanted.
    known
        What the user says of each cell; the label where it says something.
    far
        How far cells are from the classes; the label of those beyond the limit is `slots.UNASSIGNED`.
    sets
        Which classes each cell may be `(cells, classes)` bool.
    """
    again = slots.prediction(key) in out.home.obs  # then what is not wanted now is of another prediction
    best = probabilities.argmax(1)
    out.obs(slots.prediction(key), pd.Categorical.from_codes(best, categories=list(classes)))
    ordered = np.sort(probabilities, axis=1)
    out.obs(slots.confidence(key), ordered[:, -1].astype(np.float32))
    named = pd.Series(np.asarray(classes, dtype=object)[best], out.cells)
    if len(classes) > 1:
        out.obs(slots.margin(key), (ordered[:, -1] - ordered[:, -2]).astype(np.float32))
        uncertain = -(ordered * np.log(np.clip(ordered, 1e-30, None))).sum(1) / np.log(len(classes))
        out.obs(slots.entropy(key), uncertain.astype(np.float32))
    if far is not None:
        out.obs(slots.novelty(key), far.score.astype(np.float32))
        named[far.beyond] = slots.UNASSIGNED
    elif again:
        out.drop_obs(slots.novelty(key))
    named = named if known is None else known.reindex(out.cells).astype(object).fillna(named)
    out.obs(slots.label(key), pd.Categorical(named, categories=[*classes, *sorted(set(named) - set(classes))]))
    columns, tables = [slots.column_name(name) for name in classes], []
    for slot, table in ((slots.proba(key), probabilities if soft else None), (slots.sets(key), sets)):
        if table is not None:
            out.obsm(slot, table, columns)
            tables.append(f"obsm['{slot}']")
        elif again and slot in out.home.obsm:
            del out.home.obsm[slot]
    if tables and any("/" in name for name in classes):
        containers.warn(
            f"Class names with '/' are written with '|' in the columns of {' and '.join(tables)}, since files cannot "
            f"hold '/' there; obs['{slots.prediction(key)}'] and get.proba() have the exact names."
        )


BINS = 15
"""Bins of equal width into which confidence is cut; the number of Guo et al. 2017."""


def reliability(confidence: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """Cells by confidence in bins (0, 1/n], (1/n, 2/n], ...; only bins with cells.

    Parameters
    ----------
    confidence
        Probability of what was predicted `(cells,)`.
    right
        Whether it is so `(cells,)`.

    Returns
    -------
    DataFrame with `bin`, `cells`, mean `confidence`, and `accuracy`, the share that is right.
    """
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    place = np.searchsorted(edges, confidence, side="left")
    table = pd.DataFrame({"bin": place, "confidence": confidence, "accuracy": np.asarray(right, dtype=float)})
    means = table.groupby("bin").mean()
    means.insert(0, "cells", table.groupby("bin").size())
    return means.reset_index()


def expected_error(table: pd.DataFrame) -> float:
    """Expected calibration error: the mean over cells of |accuracy - confidence| of their bin; NaN without cells."""
    gap = (table["accuracy"] - table["confidence"]).abs() * table["cells"]
    return float(gap.sum() / table["cells"].sum()) if len(table) else float("nan")
