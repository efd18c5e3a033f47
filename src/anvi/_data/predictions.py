"""What a model says of the cell types, in the slots; reliability of confidence."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from anvi.settings import warn

from . import containers, slots
from .containers import Data, Source
from .labels import Known, Levels

logger = logging.getLogger("anvi")


def colors_of(data: Source | Data, labels_key: str, classes: tuple[str, ...]) -> list[str] | None:
    """Colours of the classes in the first part whose column of that name has one for each; None if there is none."""
    parts = Source.of(data).parts
    names = dict.fromkeys((labels_key, labels_key.partition(":")[2]))  # "rna:cell_type" may be coloured as "cell_type"
    for part, name in itertools.product(parts, names):
        colors, column = part.uns.get(f"{name}_colors"), part.obs.get(name)
        if colors is None or column is None or not isinstance(column.dtype, pd.CategoricalDtype):
            continue
        color_of = dict(zip(map(containers.as_name, column.cat.categories), as_colors(colors), strict=False))
        if all(name in color_of for name in classes):
            return [color_of[name] for name in classes]
    return None


def as_colors(stored: Any) -> list[str]:
    """Colours of `uns` as text: bytes are read, and numbers of red, green and blue, which scanpy draws, become hex."""
    from matplotlib.colors import to_hex

    found = []
    for one in [stored] if isinstance(stored, str | bytes) or np.ndim(stored) == 0 else stored:
        text = one.decode("utf-8", "replace") if isinstance(one, bytes) else one
        try:
            found.append(str(text) if isinstance(text, str) else to_hex(text, keep_alpha=len(text) == 4))
        except (TypeError, ValueError):  # no colour: whoever draws says so
            found.append(str(text))
    return found


def write_colors(out: slots.Writer, key: str, classes: tuple[str, ...], colors: list[str]) -> None:
    """Colours for the predictions and, unless the user's labels go beyond the classes, for the labels."""
    out.uns(f"{slots.prediction(key)}_colors", colors)
    labels = list(out.home.obs[slots.label(key)].cat.categories)
    if labels in (list(classes), [*classes, slots.UNASSIGNED]):
        out.uns(f"{slots.label(key)}_colors", [*colors, slots.UNASSIGNED_COLOR][: len(labels)])


def warn_of_strangers(
    true: pd.Series | None, predicted: pd.Series, classes: Sequence[str], labels_key: str, column: str
) -> None:
    """Warn of labels and of predictions that are no class of the model: of other data, of another fit, or renamed."""
    for values, what, so in (
        (true, f"labels in '{labels_key}'", "their cells count as wrong"),
        (predicted, f"values of obs['{column}']", "renamed, or of another fit; av.tl.predict(data) writes it anew"),
    ):
        if values is not None and len(strange := values[~values.isin(classes)]):
            names = containers.listed(map(repr, strange.unique()), 5)
            logger.warning(
                f"{what} that are no class of the model: {names} ({len(strange)} of {len(values)} cells): {so}"
            )


class NoveltyScores(NamedTuple):
    """How far cells lie from everything that a model knows."""

    score: np.ndarray  # (cells,)
    beyond: np.ndarray  # (cells,) bool, beyond the limit


BLOCK = 65_536
"""Cells whose probabilities are ordered at a time: of a million, copies of the whole would cost gigabytes."""


def write_predictions(
    out: slots.Writer,
    key: str,
    levels: Levels,
    probabilities: np.ndarray,
    *,
    soft: bool,
    known: Known | None = None,
    far: tuple[NoveltyScores, ...] | None = None,
    limits: np.ndarray | None = None,
    sets: np.ndarray | None = None,
) -> None:
    """Write what a model says of the cell types.

    Parameters
    ----------
    out, key
        Where to.
    levels
        Exact class names, and what they are called at coarser levels.
    probabilities
        `(cells, classes)`.
    soft
        Whether all probabilities are wanted.
    known
        What the user says of each cell; the label is that, or finer.
    far
        At each level, how far cells are from what it knows.
    limits
        Least probability of a label at each level `(cells, levels)`; None: any will do.
    sets
        Which classes each cell may be `(cells, classes)` bool.
    """
    classes = levels.table[-1]
    again = slots.prediction(key) in out.home.obs  # then what is not wanted now is of another prediction
    # what is most probable at each level, and how sure that is
    numbers = range(levels.finest, -1, -1)  # the classes first
    for number in numbers:
        ending, sums = levels.ending(number), levels.sums(probabilities, number)
        column = pd.Categorical.from_codes(sums.argmax(1), categories=list(levels.groups(number)))
        out.obs(f"{slots.prediction(key)}{ending}", column)
        out.obs(f"{slots.confidence(key)}{ending}", sums.max(1).astype(np.float32))
    if len(classes) > 1:
        margin, entropy = (np.zeros(len(probabilities), dtype=np.float32) for _ in range(2))
        for start in range(0, len(probabilities), BLOCK):
            rows = slice(start, start + BLOCK)
            ordered = np.sort(probabilities[rows], axis=1)
            margin[rows] = ordered[:, -1] - ordered[:, -2]
            entropy[rows] = -(ordered * np.log(np.clip(ordered, 1e-30, None))).sum(1)
        out.obs(slots.margin(key), margin)
        out.obs(slots.entropy(key), entropy / np.float32(np.log(len(classes))))
    # how far cells are from what is known, and the label that follows
    for number in numbers:
        slot = f"{slots.novelty(key)}{levels.ending(number)}"
        if far is not None:
            out.obs(slot, far[number].score.astype(np.float32))
        elif again:
            out.drop_obs(slot)
    out.obs(slots.label(key), _named(levels, probabilities, known, far, limits))
    if out.home is out.data and not Source(out.data).alone:
        columns = [slots.prediction(key), slots.label(key)]
        logger.info(f"for plots of one modality: mdata.push_obs(columns={columns})")
    # tables of all classes
    tables = []
    for slot, table in ((slots.proba(key), probabilities if soft else None), (slots.sets(key), sets)):
        if table is not None:
            out.obsm(slot, table, classes)
            tables.append(f"obsm['{slot}']")
        elif again and slot in out.home.obsm and (slot != slots.sets(key) or "sets" in out.home.uns.get(key, "sets")):
            slots.remove(out.home, slot)
    if tables and out.in_frames and any("/" in name for name in classes):
        warn(
            f"Class names with '/' are written with '|' in the columns of {' and '.join(tables)}, since files cannot "
            f"hold '/' there; obs['{slots.prediction(key)}'] and get.proba() have the exact names."
        )


def _named(
    levels: Levels,
    probabilities: np.ndarray,
    known: Known | None,
    far: tuple[NoveltyScores, ...] | None,
    limits: np.ndarray | None,
) -> pd.Categorical:
    """Label of each cell `(cells,)`: what it is called at the deepest level at which it is known, or near and sure."""
    classes, numbers = levels.table[-1], range(len(levels.names))
    names = pd.Index([*classes, slots.UNASSIGNED, *(name for number in numbers for name in levels.groups(number))])
    if known is not None:
        certain, allowed = levels.known(), levels.sets()  # (levels, sets), (sets, classes)
        names = names.append(pd.Index(known.text[known.strange], dtype=object))
    names = names.unique()
    code = np.full(len(probabilities), names.get_loc(slots.UNASSIGNED))
    for start in range(0, len(code), BLOCK):
        rows = slice(start, start + BLOCK)
        inside = probabilities[rows]
        if known is not None:
            inside = np.where(allowed[known.row[rows]], np.maximum(inside, 1e-30), 0)
            inside = inside / inside.sum(1, keepdims=True)
        for number in numbers:
            sums = levels.sums(inside, number)
            good = np.ones(len(sums), dtype=bool) if limits is None else sums.max(1) >= limits[rows, number]
            if far is not None:
                good &= ~far[number].beyond[rows]
            if known is not None:
                good |= certain[number, known.row[rows]] >= 0
            code[rows][good] = names.get_indexer(levels.groups(number))[sums.argmax(1)[good]]
    if known is not None:
        code[known.strange] = names.get_indexer(known.text[known.strange])
    others = sorted(set(names[np.unique(code)]) - set(classes))
    return pd.Categorical.from_codes(code, names).set_categories([*classes, *others])


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
