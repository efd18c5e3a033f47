"""One pass over cells and their draws: everything that a posterior predictive check needs to know of a modality."""

import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse

from anvi._data.cells import Cells
from anvi._data.features import find_features
from anvi._model import Model
from anvi._posterior.denoise import Sweep
from anvi._posterior.predictive import Piece, draw_counts
from anvi.settings import settings

from ._checks import Places, QuantileHits, Sums, cell_cv

Definition = Literal["anvi", "scvi"]
Calibration = Literal["ranks", "quantiles"] | None


class Kept(NamedTuple):
    """Cells whose counts and whose first draw are kept, for tests between groups."""

    data: sparse.csr_matrix  # (kept cells, features)
    draw: sparse.csr_matrix  # (kept cells, features)
    measured: np.ndarray | None  # (kept cells, features) bool; None: everything was


class Seen:
    """What a pass has gathered of one modality.

    Parameters
    ----------
    n_cells, n_features, n_samples
        Sizes.
    keep
        `(cells,)` bool: cells that are kept whole.
    calibration
        "ranks": where values stand among their draws; "quantiles": scvi-tools' intervals; None: neither.
    masked
        Whether some entries may not be measured.
    """

    def __init__(
        self,
        n_cells: int,
        n_features: int,
        n_samples: int,
        keep: np.ndarray,
        calibration: Calibration,
        *,
        masked: bool,
    ):
        self.n_samples, self._masked = n_samples, masked
        self.data = Sums(n_features)
        self.draws = [Sums(n_features) for _ in range(n_samples)]
        self.cell_data = np.full(n_cells, np.nan)  # (cells,) coefficient of variation
        self.cell_first = np.full(n_cells, np.nan)  # (cells,) that of the first draw
        self._cell_sum, self._cell_n = np.zeros(n_cells), np.zeros(n_cells)
        self.places = Places(n_samples) if calibration == "ranks" else None
        self.hits = QuantileHits(n_samples) if calibration == "quantiles" else None
        self._keep = keep
        self._parts: list[tuple] = []

    def start(self, rows: slice, x: np.ndarray, measured: np.ndarray, split: np.ndarray) -> None:
        """The data of some cells, 0 where not measured `(cells, features)`; their draws come next."""
        self._rows, self._x, self._measured, self._split = rows, x, measured, split
        values = x.astype(np.float64)
        self.data.add(values, measured, split)
        self.cell_data[rows] = cell_cv(values, measured)
        self._below, self._equal = np.zeros(x.shape, dtype=np.int32), np.zeros(x.shape, dtype=np.int32)
        self._stack: list[np.ndarray] = []

    def add(self, step: int, draw: np.ndarray) -> None:
        """One draw for the cells that were started; the last one ends them."""
        values = draw * self._measured.astype(np.float64)
        self.draws[step].add(values, self._measured, self._split)
        cv = cell_cv(values, self._measured)
        defined = np.isfinite(cv)
        self._cell_sum[self._rows] += np.where(defined, cv, 0)
        self._cell_n[self._rows] += defined
        if self.places is not None:
            self._below += draw < self._x
            self._equal += draw == self._x
        if self.hits is not None:
            self._stack.append(draw)
        if step == 0:
            self.cell_first[self._rows] = cv
            chosen = self._keep[self._rows]
            counts = (sparse.csr_matrix(part[chosen], dtype=np.float32) for part in (self._x, values))
            self._parts.append((*counts, self._measured[chosen]))
        if step == self.n_samples - 1 and self.places is not None:
            self.places.add(self._below, self._equal, self._measured, self._split)
        if step == self.n_samples - 1 and self.hits is not None:
            self.hits.add(self._x, np.stack(self._stack), self._split)

    @property
    def cell_model(self) -> np.ndarray:
        """Coefficient of variation of each cell's draws, their mean over the draws that have one `(cells,)`."""
        return _ratio(self._cell_sum, self._cell_n)

    @property
    def cell_others(self) -> np.ndarray:
        """The same over all draws but the first `(cells,)`, all NaN if there is no other."""
        first = np.isfinite(self.cell_first)
        return _ratio(self._cell_sum - np.where(first, self.cell_first, 0), self._cell_n - first)

    def kept(self) -> Kept:
        """The cells that were kept, in the order of the pass."""
        data, draw, measured = zip(*self._parts, strict=True)
        return Kept(
            sparse.vstack(data, format="csr"),
            sparse.vstack(draw, format="csr"),
            np.concatenate(measured) if self._masked else None,
        )


def _ratio(total: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


def gather(
    model: Model,
    cells: Cells,
    split: np.ndarray,
    keep: tuple[np.ndarray, np.ndarray],
    n_samples: int,
    seed: int,
    *,
    calibration: Calibration,
    mask: bool = True,
) -> tuple[Seen, Seen | None]:
    """Draw every cell `n_samples` times and look at data and draws side by side, block by block.

    Parameters
    ----------
    model, cells
        On the same device.
    split
        `(cells,)` code of each cell's split.
    keep
        `(cells,)` bool, for RNA and for proteins: cells that are kept whole.
    n_samples, seed
        Number of draws and what they depend on.
    calibration
        As in :class:`Seen`.
    mask
        Whether to leave out what was not measured; False takes it for the zero that stands there, as scvi-tools does.

    Returns
    -------
    RNA, and proteins where the model has them.
    """
    setup, config = model.setup, model.config
    n = len(cells)
    rna = Seen(n, config.n_genes, n_samples, keep[0], calibration, masked=False)
    prot = Seen(n, config.n_proteins, n_samples, keep[1], calibration, masked=mask) if config.has_protein else None
    sweep = Sweep(n_samples=n_samples, at_mean=False, average=False, seed=seed)
    index = torch.arange(len(cells), device=cells.label.device)
    pieces = draw_counts(model, cells, find_features(setup), sweep, index)
    for piece in _with_bar(pieces, len(cells) * n_samples):
        rows = piece.rows
        if piece.step == 0:
            x = cells.x.dense(cells.x_row[rows])[0].cpu().numpy()
            rna.start(rows, x, np.ones(x.shape, dtype=bool), split[rows])
            if prot is not None:
                y = cells.y[rows].cpu().numpy()
                measured = (
                    cells.mask_table[cells.mask_row[rows]].cpu().numpy() if mask else np.ones(y.shape, dtype=bool)
                )
                prot.start(rows, y, measured, split[rows])
        rna.add(piece.step, piece.rna.numpy())
        if prot is not None:
            prot.add(piece.step, piece.prot.numpy())
    return rna, prot


def _with_bar(pieces: Iterator[Piece], total: int) -> Iterator[Piece]:
    """Hand on the pieces, with a bar where somebody looks."""
    from tqdm.auto import tqdm

    shown = settings.progress is True or (settings.progress == "auto" and sys.stderr.isatty())
    with tqdm(total=total, desc="draw", unit="cell", disable=not shown) as bar:
        for piece in pieces:
            yield piece
            bar.update(piece.rows.stop - piece.rows.start)
