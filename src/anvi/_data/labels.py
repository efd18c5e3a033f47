"""Labels: the levels of cell types, from coarse to fine, and what the user says of each cell."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from . import containers, slots
from .containers import Data, Source

if TYPE_CHECKING:
    from .setup import Setup

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

    def ending(self, number: int) -> str:
        """What the names of slots end with at a level; "" at the finest."""
        return "" if number == self.finest else f"_{self.names[number]}"

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
        codes, sets = np.stack([self.codes(number) for number in range(len(self.names))])[:, None], self.sets()
        least, most = np.where(sets, codes, codes.max() + 1).min(2), np.where(sets, codes, -1).max(2)
        return np.where(least == most, least, -1)

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
    # what lies under what: by the cells, then by the tree
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
    above = _ancestors(frame, nodes, found, keys)
    # classes: what is above nothing, and of one column
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
    # what may have been meant otherwise
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


def _ancestors(
    frame: pd.DataFrame, nodes: list[set[str]], found: list[dict[str, dict[int, str]]], keys: list[str]
) -> list[dict[str, dict[int, str]]]:
    """What each value is at coarser levels: seen, or seen of its parent, or a name that stands at both."""
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
    return above


def _examples(frame: pd.DataFrame, values: dict[int, str]) -> str:
    """How many cells have these values, and the names of some."""
    cells = frame.index[np.logical_and.reduce([frame[level] == value for level, value in values.items()])]
    return f"{len(cells)} cells: {containers.listed(map(repr, cells), 3)}"


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
        node, below = start, set()
        while node in parent_of and node not in below:
            below.add(node)
            node = parent_of[node]
        if node in below:
            raise ValueError(f"label_tree: '{node}' is above itself.")
    return edges


def unknown_in_tree(tree: Tree, columns: Iterable[pd.Series]) -> list[str]:
    """What to say of names of a tree that nothing lies under and that no cell has: mostly slips of the pen."""
    edges, there = _edges(tree), {value for column in columns for value in column.dropna().unique()}
    strange = {child for _, child in edges} - {parent for parent, _ in edges} - there
    verb = "is" if len(strange) == 1 else "are"
    shown = containers.listed(map(repr, sorted(strange)))
    return [f"label_tree: {shown} {verb} no label of any cell, and left out"] if strange else []


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


# reading the columns of labels --------------------------------------------------------------------------------------

MEAN_NO_LABEL = {
    *("", "nan", "none", "na", "n/a", "<na>", "null", "unknown", "unlabeled", "unlabelled", "unassigned", "undefined"),
    *("not assigned", "unannotated", "undetermined", "unclassified", "not available", "n.a.", "#n/a", "?", "-"),
    "-1",  # pandas' code of a missing value
}
"""Labels, in lower case, that most likely say that a cell has none."""


class Known(NamedTuple):
    """What the user says of the cells."""

    text: np.ndarray  # (cells,) the finest value of each, NaN where there is none
    row: np.ndarray  # (cells,) which classes it leaves open, a row of Levels.sets; all where the model has no such name
    strange: np.ndarray  # (cells,) bool, whether the model has no such name at any level


def tell_strange(known: Known, who: str, done: str) -> None:
    """Say which labels are no name of the model's, and what is done with their cells."""
    counts = pd.Series(known.text[known.strange]).value_counts()
    if len(counts):
        names = containers.listed(f"{name!r} ({count} cells)" for name, count in counts.items())
        logger.warning(
            f"{who} has no class {names}; these cells are {done} as unlabelled, and their labels stay as they are"
        )


def label_keys(labels_key: str | Sequence[str] | None) -> tuple[str | None, tuple[str, ...]]:
    """The finest column of labels, and all of them, coarse to fine, where there are several."""
    if labels_key is None or isinstance(labels_key, str):
        return labels_key, ()
    keys = tuple(labels_key)
    if not keys or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise TypeError(f"labels_key takes a column, or a list of different ones, coarse to fine; got {labels_key!r}.")
    return keys[-1], keys if len(keys) > 1 else ()


def find_levels(
    source: Source, key: str | None, columns: tuple[str, ...], tree: Tree | None, unlabeled: str, mods, cells: pd.Index
) -> LabelLevels:
    """Every level of the labels, the last being the classes; none without labels."""
    if key is None:
        if tree is not None:
            raise ValueError("label_tree needs labels_key=, the column whose values it is made of.")
        return ()
    found = {name: label_column(source, name, unlabeled, mods).reindex(cells) for name in columns or (key,)}
    for name, column in found.items():
        _check_labels(column, name, unlabeled, alone=not columns and tree is None)
    if columns:
        levels = levels_of_columns(found, tree)
    elif tree is not None:
        levels = levels_of_tree(found[key], tree, key)
    else:
        return ((key, tuple(sorted(pd.factorize(found[key])[1]))),)
    if len(levels[-1][1]) < 2:
        raise ValueError(
            f"labels_key={list(columns) or key!r}: fewer than two classes leave nothing to tell apart. "
            "Give at least two, or use tl.totalvi or tl.scvi."
        )
    return levels


def _check_labels(column: pd.Series, key: str, unlabeled: str, *, alone: bool) -> None:
    """Raise a ValueError if a column, the only one or one of several, does not do for labels; warn of odd values."""
    counts = column.value_counts()
    if counts.empty:
        raise ValueError(
            f"labels_key='{key}' has no labelled cell: every value is missing, '' or '{unlabeled}'. "
            "Without labels use tl.totalvi or tl.scvi."
        )
    if len(counts) == 1 and alone:
        raise ValueError(
            f"labels_key='{key}' has a single label, '{counts.index[0]}': there is nothing to tell apart. "
            "Give at least two, or use tl.totalvi or tl.scvi."
        )
    for value, n in counts.items():
        if str(value).strip().casefold() in MEAN_NO_LABEL:
            logger.warning(
                f"labels_key='{key}': {n} cells are labelled '{value}', which is taken as a cell type like any other. "
                f"If it means that they have no label: unlabeled_category='{value}', or set them to NaN"
            )
    written = pd.Index(counts.index).map(slots.column_name)
    if written.has_duplicates:
        alike = " and ".join(map(repr, counts.index[written.duplicated(keep=False)][:2]))
        raise ValueError(f"labels_key='{key}': {alike} are the same in a file, which cannot hold '/'; rename one.")


def label_column(data: Source | Data, key: str, unlabeled: str, mods: tuple[str, ...]) -> pd.Series:
    """Labels as text, NaN where a cell is not labelled: missing, "" or the unlabelled category."""
    column = Source.of(data).text(key, "labels_key", mods)
    return column.where(column != containers.as_name(unlabeled), np.nan)


def read_labels(data: Source | Data, setup: "Setup", cells: pd.Index) -> Known:
    """Labels of the cells; the finest value of each counts that the model knows.

    Raises
    ------
    KeyError, ValueError
        If a column is not there, or cells have a label that does not lie under their coarser one.
    """
    source, levels = Source.of(data), setup.levels
    keys = setup.label_columns or (setup.labels_key,)
    sets, text = levels.sets(), np.full(len(cells), np.nan, dtype=object)
    inside = sets.astype(float) @ (~sets).T == 0  # (sets, sets) whether what one leaves open, the other does, too
    nothing = len(setup.classes)  # the row of cells that may be anything
    row, strange = np.full(len(cells), nothing), np.zeros(len(cells), dtype=bool)
    for number, key in reversed(list(enumerate(keys))):  # fine to coarse
        column = label_column(source, key, setup.unlabeled_category, setup.mods).reindex(cells)
        code, values = pd.factorize(column)  # each value once; -1, the last place below, without a label
        place = levels.rows(values, number if len(keys) == len(levels.names) else None)
        here = np.array([*(place.get(value, nothing) for value in values), nothing])[code]
        names, finest = np.array([*values, np.nan], dtype=object)[code], pd.isna(text)
        strange |= finest & np.array([*(value not in place for value in values), False])[code]
        at_odds = ~inside[row, here] & (row != nothing)
        if at_odds.any():
            first = at_odds.argmax()
            raise ValueError(
                f"labels_key: {at_odds.sum()} cells have a '{key}' that does not go with what is finer "
                f"(first: '{cells[first]}', '{names[first]}' and '{text[first]}'); correct them, or set one to NaN."
            )
        row = np.where(row == nothing, here, row)
        text = np.where(finest, names, text)
    return Known(text, row, strange)


def labels_at(
    data: Source | Data, setup: "Setup", cells: pd.Index, labels_key: str | None = None, level: str | None = None
) -> pd.Series:
    """What cells are at a level by the labels of a fit, or by another column, as text; NaN where these do not say."""
    number = setup.levels.position(level)
    if labels_key not in (None, setup.labels_key):
        setup = replace(setup, labels_key=labels_key, label_columns=())
    known = read_labels(data, setup, cells)
    code = setup.levels.known()[number, known.row]
    names = np.array([*setup.levels.groups(number), np.nan], dtype=object)[code]
    strange = (known.row == len(setup.classes)) & ~pd.isna(known.text)
    return pd.Series(np.where(strange, known.text, names), cells)


def known_labels(data: Source | Data, setup: "Setup", cells: pd.Index) -> Known | None:
    """What the user says of the cells; None without a usable column: labels are no need."""
    if setup.labels_key is None:
        return None
    source = Source.of(data)
    try:
        return read_labels(source, setup, cells)
    except KeyError as error:
        if any(key in part.obs for part in source.parts for key in setup.label_columns):  # some of several
            logger.warning(f"labels are left out: {error.args[0]}")
        return None
    except ValueError as error:  # two copies that disagree
        logger.warning(f"labels are left out: {error}")
        return None
