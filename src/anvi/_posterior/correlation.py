"""Correlation of features over draws of what is behind their counts, in bounded memory. Source: spec section 5."""

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch

from anvi._data.cells import Cells
from anvi._data.features import Features
from anvi._model import Model

from .denoise import Sweep
from .encode import NOISE_BLOCK, Block, blocks
from .predictive import draw_rates

RANKED_AT_ONCE = 128
"""Columns that are ranked together: ranks need eight bytes and several copies while they are made."""
ROWS_AT_ONCE = 2_048
"""Rows that are multiplied together."""


@torch.no_grad()
def correlation(
    model: Model,
    cells: Cells,
    features: Features,
    sweep: Sweep,
    index: torch.Tensor,
    method: Literal["spearman", "pearson"],
) -> np.ndarray:
    """Correlate features across cells and posterior samples.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        Read with the model's setup.
    features
        Which genes and proteins.
    sweep
        Batches, whose matrices are averaged, and number of samples per cell.
    index
        Positions in `cells` of those that count.
    method
        "pearson" keeps sums only; "spearman" ranks all draws, `len(index) * n_samples` rows.

    Returns
    -------
    `(features, features)` float32, genes first; NaN for a feature that never changes.
    """
    # encoded once, whatever the number of batches; the counts are not needed any more
    encoded = [
        block._replace(batch=block.batch._replace(x=None, entries=None))
        for block in blocks(model, cells, index, size=NOISE_BLOCK)
    ]
    total = None
    for code in sweep.codes or (None,):
        rows = _draws(model, encoded, features, sweep, code)
        matrix = pearson(_ranks(rows, len(index) * sweep.n_samples) if method == "spearman" else rows)
        total = matrix if total is None else total + matrix
    return (total / len(sweep.codes or (None,))).astype(np.float32)


def _draws(
    model: Model, encoded: list[Block], features: Features, sweep: Sweep, code: int | None
) -> Iterator[np.ndarray]:
    """Rows to be correlated, block by block `(cells, features)`."""
    for block in encoded:
        for sample in range(sweep.n_samples):
            yield draw_rates(model, block, features, code, sample, sweep.seed).cpu().numpy()


def _ranks(parts: Iterable[np.ndarray], n_rows: int) -> Iterator[np.ndarray]:
    """The same rows, each value replaced by its rank in its column; equal values share their mean rank."""
    from scipy.stats import rankdata  # half of the time of `import anvi`, were it at the top

    rows, start = None, 0
    for part in parts:
        rows = np.empty((n_rows, part.shape[1]), dtype=np.float32) if rows is None else rows
        rows[start : start + len(part)] = part
        start += len(part)
    for first in range(0, rows.shape[1], RANKED_AT_ONCE):
        columns = slice(first, first + RANKED_AT_ONCE)
        rows[:, columns] = rankdata(rows[:, columns], axis=0)
    yield from np.split(rows, range(ROWS_AT_ONCE, n_rows, ROWS_AT_ONCE))


def pearson(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Correlation of the columns of all parts together, from their sums; NaN for a column that never changes.

    Columns are shifted and scaled by the first rows, so that float32 products lose nothing that counts.
    """
    n, shift, scale, total, cross = 0, None, None, None, None
    for part in _together(parts):
        if shift is None:
            shift, scale = part.mean(0, dtype=np.float64), part.std(0, dtype=np.float64)
            scale = np.where(scale > 1e-6 * np.abs(shift), scale, np.abs(shift))
            scale[scale == 0] = 1.0
            total, cross = np.zeros(len(shift)), np.zeros((len(shift), len(shift)))
        scaled = ((part - shift) / scale).astype(np.float32)
        n += len(part)
        total += scaled.sum(0, dtype=np.float64)
        cross += scaled.T @ scaled
    mean = total / n
    cross /= n
    cross -= np.outer(mean, mean)
    deviation = np.sqrt(np.diag(cross).clip(min=0))
    deviation[deviation < 1e-6] = np.nan
    cross /= deviation
    cross /= deviation[:, None]
    return cross


def _together(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Small parts joined to larger ones: each costs a pass over the whole matrix of products."""
    held = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= ROWS_AT_ONCE:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)
