"""Arrays put in the order of an object's own cells and features, NaN where it has others."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from .containers import Data


def in_modality(values: np.ndarray, cells: pd.Index, features: Sequence[str], part: AnnData) -> np.ndarray:
    """`(cells, features)` as float32 of the modality's shape; not copied if nothing moves."""
    row = cells.get_indexer(part.obs_names)
    column = pd.Index(features).get_indexer(part.var_names.astype(str))
    if np.array_equal(row, np.arange(len(cells))) and np.array_equal(column, np.arange(len(features))):
        return values.astype(np.float32, copy=False)
    if sparse.issparse(values):
        return _csr_in_modality(values, row, column)
    out = np.full((len(row), len(column)), np.nan, dtype=np.float32)
    inside, known = np.flatnonzero(row >= 0), np.flatnonzero(column >= 0)
    for first in range(0, len(inside), 1024):  # in pieces: the values may be all that memory holds twice
        rows = inside[first : first + 1024]
        out[np.ix_(rows, known)] = values[np.ix_(row[rows], column[known])]
    return out


def _csr_in_modality(values: sparse.csr_matrix, row: np.ndarray, column: np.ndarray) -> sparse.csr_matrix:
    """A sparse matrix stays one: nothing, instead of NaN, where the modality has other cells or features."""
    wider = sparse.hstack([values, sparse.csr_matrix((values.shape[0], 1))], format="csr")  # place -1 is the last one
    longer = sparse.vstack([wider[:, column], sparse.csr_matrix((1, len(column)))], format="csr")
    return longer[row].astype(np.float32)


def in_varp(values: np.ndarray, features: Mapping[str, Sequence[str]], part: Data) -> np.ndarray:
    """`(features, features)`, one modality after the other, as float32 of the shape of the object's varp.

    An AnnData has room for the first modality's features only.
    """
    place, start = np.full(part.n_vars, -1), 0  # (features of the object,) -1: not among the values
    for mod, names in features.items():
        if isinstance(part, AnnData):
            place = pd.Index(names).get_indexer(part.var_names.astype(str))
            break
        if mod in part.mod:
            own = np.asarray(part.varmap[mod], dtype=np.int64).reshape(-1) - 1  # stored from 1; 0: of another modality
            found = pd.Index(names).get_indexer(part.mod[mod].var_names.astype(str))
            known = (own >= 0) & (found[own] >= 0)
            place[known] = start + found[own[known]]
        start += len(names)
    inside = np.flatnonzero(place >= 0)
    if np.array_equal(place, np.arange(len(values))):
        return values.astype(np.float32, copy=False)
    out = np.full((len(place), len(place)), np.nan, dtype=np.float32)
    out[np.ix_(inside, inside)] = values[np.ix_(place[inside], place[inside])]
    return out
