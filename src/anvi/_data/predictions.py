"""What a model says of the cell types, in the slots."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from . import containers, slots


class Far(NamedTuple):
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
    far: Far | None = None,
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
