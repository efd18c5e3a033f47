"""Cell types: their levels, from coarse to fine, and what a model says of them, in the slots."""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from . import containers, slots
from .containers import Data, Source

logger = logging.getLogger("anvi")


LabelLevels = tuple[tuple[str, tuple[str, ...]], ...]
"""Levels of labels, coarse to fine: the name of each, and what every class is called there; at the last, itself."""


class Levels(NamedTuple):
    """What the classes of a model are called at each of its levels; at the last they are themselves."""

    names: tuple[str, ...]  # coarse to fine
    table: tuple[tuple[str, ...], ...]  # (levels, classes)

    @classmethod
    def of(cls, label_levels: LabelLevels, classes: Sequence[str], labels_key: str | None) -> "Levels":
        """From what a setup keeps; a model with a single column of labels has one level."""
        label_levels = label_levels or ((level_name(labels_key or ""), tuple(classes)),)
        return cls(tuple(name for name, _ in label_levels), tuple(tuple(row) for _, row in label_levels))

    @property
    def coarser(self) -> tuple[str, ...]:
        """Names of the levels above the classes."""
        return self.names[:-1]

    @property
    def finest(self) -> int:
        """Number of the last level."""
        return len(self.names) - 1

    def position(self, level: str | None) -> int:
        """Number of a level by its name; None: the finest."""
        if level is None:
            return self.finest
        if level not in self.names:
            raise KeyError(f"level='{level}' is no level of the labels; there are {', '.join(map(repr, self.names))}.")
        return self.names.index(level)

    def groups(self, number: int) -> tuple[str, ...]:
        """Names at a level, sorted; at the finest the classes in their order."""
        return self.table[-1] if number == self.finest else tuple(sorted(set(self.table[number])))

    def codes(self, number: int) -> np.ndarray:
        """Position among `groups` of every class `(classes,)`."""
        return pd.Index(self.groups(number)).get_indexer(self.table[number])

    def sums(self, probabilities: np.ndarray, number: int) -> np.ndarray:
        """Probabilities at a level `(cells, groups)` of those of the classes `(cells, classes)`."""
        if number == self.finest:
            return probabilities
        return probabilities @ np.eye(len(self.groups(number)), dtype=probabilities.dtype)[self.codes(number)]

    def sets(self) -> np.ndarray:
        """What a label may leave open `(sets, classes)` bool: each class alone, all of them, then the groups."""
        n = len(self.table[-1])
        rows = [*np.eye(n, dtype=bool), np.ones(n, dtype=bool)]
        for number in range(self.finest):
            rows += [self.codes(number) == code for code in range(len(self.groups(number)))]
        return np.array(list(dict.fromkeys(map(tuple, rows))), dtype=bool).reshape(-1, n)

    def known(self) -> np.ndarray:
        """Group that is certain given the set `(levels, sets)`, by position; -1 where it leaves several open."""
        return np.stack([_agreed(self.codes(number), self.sets()) for number in range(len(self.names))])

    def rows(self, values: Iterable[str], column: int | None) -> dict[str, int]:
        """Row among `sets` of each value that is a name at the level `column`, or else at the finest that has it."""
        place = {tuple(row): number for number, row in enumerate(self.sets())}
        order = [*([] if column is None else [column]), *range(self.finest, -1, -1)]
        found = {}
        for value in values:
            number = next((number for number in order if value in self.table[number]), None)
            if number is not None:
                found[value] = place[tuple(name == value for name in self.table[number])]
        return found


def _agreed(code: np.ndarray, sets: np.ndarray) -> np.ndarray:
    least, most = np.where(sets, code, len(code)).min(1), np.where(sets, code, -1).max(1)
    return np.where(least == most, least, -1)


def level_name(key: str) -> str:
    """What a level is called, by its column of obs."""
    return slots.column_name(key.rpartition(":")[2])


Tree = Mapping[str, Sequence[str]]


def levels_of_columns(columns: Mapping[str, pd.Series], tree: Tree | None) -> LabelLevels:
    """The levels of several columns of text, coarse to fine, NaN where a cell has no value.

    What is a child of what is taken from cells that have both and from `tree`. A value without a finer one is a class.

    Raises
    ------
    KeyError, ValueError
        If a value has two parents (the message names both, and cells), or the tree names what is not there.
    """
    keys = list(columns)
    names = tuple(map(level_name, keys))
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"labels_key={keys} must be different columns, coarse to fine: levels are called by them.")
    frame = pd.DataFrame(dict(enumerate(columns.values())))
    nodes = [set(frame[level].dropna()) for level in frame]
    found = [_parents(frame, level, keys) for level in frame]  # per level: value -> {coarser level: parent}
    for parent, child in _edges(tree):
        pairs = [(i, j) for j in frame for i in range(j) if parent in nodes[i] and child in nodes[j]]
        if not pairs:
            raise KeyError(
                f"label_tree: no column has '{child}' with '{parent}' in a coarser one; labels_key={keys} are read "
                "coarse to fine."
            )
        for i, j in pairs:
            other = found[j].setdefault(child, {}).setdefault(i, parent)
            if other != parent:
                cells = frame.index[(frame[j] == child) & (frame[i] == other)]
                raise ValueError(
                    f"label_tree has '{child}' under '{parent}', but {len(cells)} cells have '{other}' in '{keys[i]}' "
                    f"(first: '{cells[0]}'); correct one of them."
                )
    # what a value is at coarser levels: seen, or seen of its parent, or a name that stands at both
    above: list[dict[str, dict[int, str]]] = []
    for j in frame:
        above.append({})
        for value in sorted(nodes[j]):
            mine: dict[int, str] = {}
            for i in range(j - 1, -1, -1):
                by_parent = {above[k][parent][i]: k for k, parent in mine.items() if i in above[k][parent]}
                seen = found[j].get(value, {}).get(i)
                for other, k in by_parent.items():
                    if seen is not None and other != seen:
                        raise ValueError(
                            f"'{value}' of '{keys[j]}' has two parents in '{keys[i]}': cells say '{seen}' "
                            f"({_examples(frame, {j: value, i: seen})}), and '{other}' by way of '{mine[k]}' of "
                            f"'{keys[k]}'; correct these cells, or set one of their values to NaN."
                        )
                seen = seen or next(iter(by_parent), value if value in nodes[i] else None)
                if seen is not None:
                    mine[i] = seen
            above[j][value] = mine
    parents = {(i, parent) for level in above for mine in level.values() for i, parent in mine.items()}
    classes: dict[str, tuple[int, dict[int, str]]] = {}
    for j in frame:
        for value, mine in above[j].items():
            if (j, value) in parents:
                continue
            if value in classes:
                other = classes[value][0]
                raise ValueError(
                    f"'{value}' is a class of '{keys[other]}', with nothing finer below it, and another of '{keys[j]}' "
                    f"under {', '.join(map(repr, mine.values())) or 'nothing'}; rename one of them."
                )
            classes[value] = j, mine
    for value in sorted(set(classes)):
        j, mine = classes[value]
        beside = [other for other, (_, theirs) in classes.items() if other != value and value in theirs.values()]
        if value in mine.values() and beside:
            logger.warning(
                f"'{value}' of '{keys[j]}' is taken for a class beside {', '.join(map(repr, beside[:3]))}, and is "
                "also the name of all of them; where it means that nothing finer is known, set it to NaN"
            )
    for i, parent in sorted(parents):
        below = [value for value, (_, mine) in classes.items() if mine.get(i) == parent]
        only = (frame[i] == parent) & frame.loc[:, i + 1 :].isna().all(axis=1)
        if len(below) == 1 and below != [parent] and only.any():
            logger.warning(
                f"{only.sum()} cells are '{parent}' in '{keys[i]}' with nothing finer, and '{below[0]}' is all that "
                "lies under it, so they are taken for that; if they may be others, give these a name"
            )
    ordered = tuple(sorted(classes))
    return tuple((name, tuple(classes[value][1].get(i, value) for value in ordered)) for i, name in enumerate(names))


def _parents(frame: pd.DataFrame, level: int, keys: list[str]) -> dict[str, dict[int, str]]:
    """The parent at each coarser level of each value that some cell has together with one."""
    found: dict[str, dict[int, str]] = {}
    for i in range(level):
        pairs = frame[[i, level]].dropna().value_counts()  # the commonest first
        for parent, value in pairs.index:
            first = found.setdefault(value, {}).setdefault(i, parent)
            if first != parent:
                raise ValueError(
                    f"'{value}' of '{keys[level]}' has two parents in '{keys[i]}': '{first}' "
                    f"({_examples(frame, {level: value, i: first})}) and '{parent}' "
                    f"({_examples(frame, {level: value, i: parent})}). Correct these cells, set one of their values to "
                    "NaN, or rename what is two things."
                )
    return found


def _examples(frame: pd.DataFrame, values: dict[int, str]) -> str:
    """How many cells have these values, and the names of some."""
    cells = frame.index[np.logical_and.reduce([frame[level] == value for level, value in values.items()])]
    return f"{len(cells)} cells: {', '.join(map(repr, cells[:3]))}{', ...' if len(cells) > 3 else ''}"


def _edges(tree: Tree | None) -> list[tuple[str, str]]:
    """Parents and children of a tree, checked."""
    if tree is None:
        return []
    if not isinstance(tree, Mapping) or any(isinstance(c, str) or not isinstance(c, Sequence) for c in tree.values()):
        raise TypeError("label_tree takes a dict of names and lists of names, e.g. {'T': ['CD4 T', 'CD8 T']}.")
    edges = [(str(parent), str(child)) for parent, children in tree.items() for child in children]
    parent_of: dict[str, str] = {}
    for parent, child in edges:
        if parent_of.setdefault(child, parent) != parent:
            raise ValueError(f"label_tree: '{child}' has two parents, '{parent_of[child]}' and '{parent}'.")
    for start in parent_of:
        node, steps = start, 0
        while node in parent_of and steps <= len(parent_of):
            node, steps = parent_of[node], steps + 1
        if steps > len(parent_of):
            raise ValueError(f"label_tree: '{start}' is above itself.")
    return edges


def levels_of_tree(labels: pd.Series, tree: Tree, key: str) -> LabelLevels:
    """The levels of one column whose values are anywhere in a tree.

    Raises
    ------
    KeyError, ValueError
        If the tree is none, or has nothing to do with the column.
    """
    parent_of = {child: parent for parent, child in _edges(tree)}
    paths: dict[str, list[str]] = {}  # from the root to the value
    for value in sorted(set(labels.dropna())):
        path = [value]
        while path[0] in parent_of:
            path.insert(0, parent_of[path[0]])
        paths[value] = path
    above = {name for path in paths.values() for name in path[:-1]}
    classes = tuple(sorted(set(paths) - above))
    depth = max((len(paths[name]) for name in classes), default=1) - 1
    if not depth:
        raise KeyError(f"label_tree: none of its children is a value of '{key}'; there are {sorted(paths)[:5]}.")
    rows = [tuple(paths[name][min(i, len(paths[name]) - 1)] for name in classes) for i in range(depth)]
    return (*((f"level_{i + 1}", row) for i, row in enumerate(rows)), (level_name(key), classes))


def colors_of(data: Source | Data, labels_key: str, classes: tuple[str, ...]) -> list[str] | None:
    """Colours of the classes in the first part whose column of that name has one for each; None if there is none."""
    parts = Source.of(data).parts
    names = dict.fromkeys((labels_key, labels_key.partition(":")[2]))  # "rna:cell_type" may be coloured as "cell_type"
    for part, name in itertools.product(parts, names):
        colors, column = part.uns.get(f"{name}_colors"), part.obs.get(name)
        if colors is None or column is None or not isinstance(column.dtype, pd.CategoricalDtype):
            continue
        color_of = dict(zip(map(containers.as_name, column.cat.categories), map(str, colors), strict=False))
        if all(name in color_of for name in classes):
            return [color_of[name] for name in classes]
    return None


def write_colors(out: slots.Writer, key: str, classes: tuple[str, ...], colors: list[str]) -> None:
    """Colours for the predictions and, unless the user's labels go beyond the classes, for the labels."""
    out.uns(f"{slots.prediction(key)}_colors", colors)
    labels = list(out.home.obs[slots.label(key)].cat.categories)
    if labels in (list(classes), [*classes, slots.UNASSIGNED]):
        out.uns(f"{slots.label(key)}_colors", [*colors, slots.UNASSIGNED_COLOR][: len(labels)])


class NoveltyScores(NamedTuple):
    """How far cells lie from everything that a model knows."""

    score: np.ndarray  # (cells,)
    beyond: np.ndarray  # (cells,) bool, beyond the limit


class Known(NamedTuple):
    """What the user says of the cells."""

    text: pd.Series  # (cells,) the finest value of each, NaN where there is none
    row: np.ndarray  # (cells,) which classes it leaves open, a row of Levels.sets; all where the model has no such name
    strange: np.ndarray  # (cells,) bool, whether the model has no such name at any level


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
    best = probabilities.argmax(1)
    out.obs(slots.prediction(key), pd.Categorical.from_codes(best, categories=list(classes)))
    highest, margin, entropy = (np.zeros(len(best), dtype=np.float32) for _ in range(3))
    for start in range(0, len(best), BLOCK):
        rows = slice(start, start + BLOCK)
        ordered = np.sort(probabilities[rows], axis=1)
        highest[rows], margin[rows] = ordered[:, -1], ordered[:, -1] - ordered[:, -2] if len(classes) > 1 else 0
        entropy[rows] = -(ordered * np.log(np.clip(ordered, 1e-30, None))).sum(1)
    out.obs(slots.confidence(key), highest)
    for number, level in enumerate(levels.coarser):
        sums = levels.sums(probabilities, number)
        column = pd.Categorical.from_codes(sums.argmax(1), categories=list(levels.groups(number)))
        out.obs(slots.level_prediction(key, level), column)
        out.obs(slots.level_confidence(key, level), sums.max(1).astype(np.float32))
        if far is not None:
            out.obs(slots.level_novelty(key, level), far[number].score.astype(np.float32))
        elif again:
            out.drop_obs(slots.level_novelty(key, level))
    if len(classes) > 1:
        out.obs(slots.margin(key), margin)
        out.obs(slots.entropy(key), entropy / np.float32(np.log(len(classes))))
    if far is not None:
        out.obs(slots.novelty(key), far[-1].score.astype(np.float32))
    elif again:
        out.drop_obs(slots.novelty(key))
    named = _named(levels, probabilities, known, far, limits)
    out.obs(slots.label(key), pd.Categorical(named, categories=[*classes, *sorted(set(named) - set(classes))]))
    if out.home is out.data and not Source(out.data).alone:
        columns = [slots.prediction(key), slots.label(key)]
        logger.info(f"for plots of one modality: mdata.push_obs(columns={columns})")
    tables = []
    for slot, table in ((slots.proba(key), probabilities if soft else None), (slots.sets(key), sets)):
        if table is not None:
            out.obsm(slot, table, classes)
            tables.append(f"obsm['{slot}']")
        elif again and slot in out.home.obsm:
            slots.remove(out.home, slot)
    if tables and out.in_frames and any("/" in name for name in classes):
        containers.warn(
            f"Class names with '/' are written with '|' in the columns of {' and '.join(tables)}, since files cannot "
            f"hold '/' there; obs['{slots.prediction(key)}'] and get.proba() have the exact names."
        )


def _named(
    levels: Levels,
    probabilities: np.ndarray,
    known: Known | None,
    far: tuple[NoveltyScores, ...] | None,
    limits: np.ndarray | None,
) -> np.ndarray:
    """Label of each cell `(cells,)`: what it is called at the deepest level at which it is known, or near and sure."""
    told = None
    if known is not None:
        told, allowed = levels.known()[:, known.row], levels.sets()[known.row]  # (levels, cells), (cells, classes)
        inside = np.where(allowed, np.maximum(probabilities, 1e-30), 0)
        probabilities = inside / inside.sum(1, keepdims=True)
    named = np.full(len(probabilities), slots.UNASSIGNED, dtype=object)
    for number in range(len(levels.names)):
        sums = levels.sums(probabilities, number)
        good = np.ones(len(named), dtype=bool) if limits is None else sums.max(1) >= limits[:, number]
        if far is not None:
            good &= ~far[number].beyond
        if told is not None:
            good |= told[number] >= 0
        named[good] = np.asarray(levels.groups(number), dtype=object)[sums.argmax(1)[good]]
    if known is None:
        return named
    return np.where(known.strange, known.text.to_numpy(dtype=object), named)


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
