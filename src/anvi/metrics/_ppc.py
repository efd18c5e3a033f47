"""Posterior predictive checks: draws gathered in one pass over cells, and the statistics that data and draws share."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse

from anvi._data.cells import Cells
from anvi._data.select import find_features
from anvi._model import Model
from anvi._posterior.expected import Sweep
from anvi._posterior.predictive import draw_counts
from anvi.settings import with_bar

SPLITS = ("train", "validation", "other")
"""Cells by what the fit did with them; running sums keep them apart."""


class Sums:
    """Running sums over cells for every feature, kept apart by split; float64, since squares of counts are long."""

    def __init__(self, n_features: int):
        shape = (len(SPLITS), n_features)
        self.n, self.total, self.square, self.zeros = (np.zeros(shape) for _ in range(4))

    def add(self, values: np.ndarray, measured: np.ndarray, split: np.ndarray) -> None:
        """Add cells: float64 `values`, 0 where not `measured` `(cells, features)`, and split codes `(cells,)`."""
        for code in np.unique(split):
            here = split == code
            self.n[code] += measured[here].sum(0)
            self.total[code] += values[here].sum(0)
            self.square[code] += (values[here] ** 2).sum(0)
            self.zeros[code] += ((values[here] == 0) & measured[here]).sum(0)

    def cv(self, splits: list[int]) -> np.ndarray:
        """Coefficient of variation of each feature over the cells of some splits; NaN where the mean is 0."""
        return _cv(*(part[splits].sum(0) for part in (self.n, self.total, self.square)))

    def zero_fraction(self, splits: list[int]) -> np.ndarray:
        """Share of zeros of each feature; NaN where no cell was measured."""
        n, zeros = self.n[splits].sum(0), self.zeros[splits].sum(0)
        return np.divide(zeros, n, out=np.full(len(n), np.nan), where=n > 0)


def _cv(n: np.ndarray, total: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Population standard deviation over mean, from sums."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / n
        cv = np.sqrt(np.clip(square / n - mean**2, 0, None)) / mean
    return np.where(mean == 0, np.nan, cv)


def cell_cv(values: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Coefficient of variation of each cell over its measured features `(cells,)`; NaN where the mean is 0."""
    return _cv(measured.sum(1), values.sum(1), (values**2).sum(1))


class Ranks:
    """Where each value stands among its draws: counted per pair (draws below it, draws equal to it) and split.

    If data and draws come from the same distribution, a value is equally likely to take any of the S + 1 places among
    its S draws and itself, ties broken at random; so this is a test at any number of draws, also of counts. Entries
    that equal all of their draws (most zeros) take every place alike whatever the model: they are not counted.
    """

    def __init__(self, n_samples: int):
        self.n_samples = n_samples
        self.counts = np.zeros((len(SPLITS), n_samples + 1, n_samples + 1), dtype=np.int64)  # (.., below, equal)

    def add(self, below: np.ndarray, equal: np.ndarray, measured: np.ndarray, split: np.ndarray) -> None:
        """Add cells: numbers of draws below and equal to each entry `(cells, features)`."""
        side = self.n_samples + 1
        code = (split[:, None] * side + below) * side + equal
        telling = measured & (equal < self.n_samples)
        self.counts += np.bincount(code[telling], minlength=self.counts.size).reshape(self.counts.shape)

    def ranks(self, splits: list[int]) -> tuple[np.ndarray, int]:
        """Share of entries in each of the S + 1 places, ties spread evenly, and the number of entries."""
        side = self.n_samples + 1
        counts = self.counts[splits].sum(0)
        below, equal = np.nonzero(counts)
        weight = counts[below, equal] / (equal + 1)
        steps = np.bincount(below, weight, side + 1) - np.bincount(below + equal + 1, weight, side + 1)
        n = int(counts.sum())
        return (np.cumsum(steps)[:side] / n if n else np.full(side, np.nan)), n


def coverage(ranks: np.ndarray, level: float) -> float:
    """Share of entries inside the central interval of a level.

    A place r of S + 1 is spread over (r / (S + 1), (r + 1) / (S + 1)), so that the share is the level at any S if
    places are equally likely.
    """
    n = len(ranks)
    left = np.arange(n) / n
    inside = np.minimum(left + 1 / n, (1 + level) / 2) - np.maximum(left, (1 - level) / 2)
    return float((ranks * np.clip(inside, 0, None)).sum() * n)


class Agreement(NamedTuple):
    """How well model values follow data values."""

    n: int  # pairs in which both are defined
    mae: float
    pearson: float
    spearman: float
    r2: float  # 1 - residual / total sum of squares, the data as truth
    ratio: float  # median of model over data


def agreement(data: np.ndarray, model: np.ndarray) -> Agreement:
    """Compare two vectors where both are finite; NaN where there is nothing to compare."""
    from scipy.stats import rankdata

    both = np.isfinite(data) & np.isfinite(model)
    data, model = data[both], model[both]
    if len(data) < 2:
        return Agreement(len(data), *[float("nan")] * 5)
    spread = ((data - data.mean()) ** 2).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.median((model / data)[data != 0]) if (data != 0).any() else np.nan
        r2 = 1 - ((data - model) ** 2).sum() / spread if spread > 0 else np.nan
    return Agreement(
        n=len(data),
        mae=float(np.abs(data - model).mean()),
        pearson=_pearson(data, model),
        # in single precision: genes of equal counts are equal, whatever the last digit of their sums says
        spearman=_pearson(rankdata(data.astype(np.float32)), rankdata(model.astype(np.float32))),
        r2=float(r2),
        ratio=float(ratio),
    )


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm > 0 else float("nan")


# definitions: what scvi-tools' criticism report does in another way -------------------------------------------------


class Definition(NamedTuple):
    """What a definition of the checks decides; the defaults are anvi's."""

    calibration: Literal["ranks", "quantiles"] = "ranks"  # where values stand among draws, or scvi-tools' intervals
    masked: bool = True  # whether what was not measured is left out; else it is taken for the zero that stands there
    data_are_truth: bool = True  # whether R2 takes the data for the truth, and a feature that no draw has is left out
    zeros: bool = True  # whether shares of zeros are compared, or of non-zeros
    judged: tuple[str, ...] = ("cv_cell", "cv_gene", "zero_fraction", "calibration")  # metrics with a verdict
    only_pearson: bool = False  # whether verdicts are on correlations alone: scvi-tools' cards have no other rule
    labelled: bool = True  # whether cells without a label are left out of the groups
    every_cell: bool = False  # whether all cells of a group are tested
    method: str = "wilcoxon"  # of scanpy's rank_genes_groups
    alpha: float = 0.05  # adjusted p-value below which a difference in the data counts as true
    one_sided: bool = True  # whether only features that are higher in the group count as true, as the score has it
    least_top: int = 3  # of the features at the top of both lists, however few there are
    seen_only: bool = True  # whether fold changes are compared only where no mean is 0, in data and draw


SCVI = {"calibration": "quantiles", "masked": False, "data_are_truth": False, "zeros": False, "judged": ("cv_cell",)}
SCVI |= {"only_pearson": True, "labelled": False, "every_cell": True}
SCVI |= {"method": "t-test", "alpha": 0.2, "one_sided": False, "least_top": 0, "seen_only": False}
DEFINITIONS = {"anvi": Definition(), "scvi": Definition(**SCVI)}


class QuantileHits:
    """scvi-tools' calibration: how many entries lie between interpolated quantiles of their draws, edges included.

    Zeros count like all other entries, so that numbers are close to 1 where most counts are 0.
    """

    TAILS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175)

    def __init__(self, n_samples: int):
        self.n_samples = n_samples
        self.counts = np.zeros((len(SPLITS), len(self.TAILS)), dtype=np.int64)
        self.n = np.zeros(len(SPLITS), dtype=np.int64)

    def add(self, x: np.ndarray, draws: np.ndarray, split: np.ndarray) -> None:
        """Add cells: data `(cells, features)` and their draws `(samples, cells, features)`."""
        ordered = np.sort(draws, axis=0)
        hits = [((x >= _quantile(ordered, p)) & (x <= _quantile(ordered, 1 - p))).sum(1) for p in self.TAILS]
        np.add.at(self.counts, split, np.stack(hits, axis=1))
        np.add.at(self.n, split, x.shape[1])

    def shares(self, splits: list[int]) -> tuple[np.ndarray, int]:
        """Share of entries inside each interval, the widest first, and the number of entries."""
        n = int(self.n[splits].sum())
        counts = self.counts[splits].sum(0)
        return (counts / n if n else np.full(len(self.TAILS), np.nan)), n


def _quantile(ordered: np.ndarray, p: float) -> np.ndarray:
    """Quantile along the first axis of sorted values, linear between neighbours."""
    rank = p * (len(ordered) - 1)
    low = min(int(rank), len(ordered) - 1)
    below, above = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    return below + (rank - low) * (above - below)


# one pass over the cells ----------------------------------------------------------------------------------------------


class KeptDraws(NamedTuple):
    """Cells whose counts and whose first draw are kept, for tests between groups."""

    data: sparse.csr_matrix  # (kept cells, features)
    draw: sparse.csr_matrix  # (kept cells, features)
    measured: np.ndarray | None  # (kept cells, features) bool; None: everything was


class Gathered:
    """What a pass has gathered of one modality."""

    def __init__(
        self,
        n_cells: int,
        n_features: int,
        n_samples: int,
        keep: np.ndarray,  # (cells,) bool: cells that are kept whole
        calibration: Literal["ranks", "quantiles"] | None,
        *,
        masked: bool,  # whether some entries may not be measured
    ):
        self.n_samples, self._masked = n_samples, masked
        self.data = Sums(n_features)
        self.draws = [Sums(n_features) for _ in range(n_samples)]
        self.cell_data = np.full(n_cells, np.nan)  # (cells,) coefficient of variation
        self.cell_first = np.full(n_cells, np.nan)  # (cells,) that of the first draw
        self._cell_sum, self._cell_n = np.zeros(n_cells), np.zeros(n_cells)
        self.ranks = Ranks(n_samples) if calibration == "ranks" else None
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
        if self.ranks is not None:
            self._below += draw < self._x
            self._equal += draw == self._x
        if self.hits is not None:
            self._stack.append(draw)
        if step == 0:
            self.cell_first[self._rows] = cv
            chosen = self._keep[self._rows]
            counts = (sparse.csr_matrix(part[chosen], dtype=np.float32) for part in (self._x, values))
            self._parts.append((*counts, self._measured[chosen]))
        if step == self.n_samples - 1 and self.ranks is not None:
            self.ranks.add(self._below, self._equal, self._measured, self._split)
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

    def kept(self) -> KeptDraws:
        """The cells that were kept, in the order of the pass."""
        data, draw, measured = zip(*self._parts, strict=True)
        return KeptDraws(
            sparse.vstack(data, format="csr"),
            sparse.vstack(draw, format="csr"),
            np.concatenate(measured) if self._masked else None,
        )


def _ratio(total: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


def gather(
    model: Model,
    cells: Cells,
    split: np.ndarray,  # (cells,) code of each cell's split
    keep: tuple[np.ndarray, np.ndarray],  # (cells,) bool, for RNA and for proteins
    n_samples: int,
    seed: int,
    *,
    calibration: Literal["ranks", "quantiles"] | None,
    mask: bool = True,
) -> tuple[Gathered, Gathered | None]:
    """Draw every cell `n_samples` times and look at data and draws side by side, block by block.

    Returns RNA, and proteins where the model has them.
    """
    setup, config = model.setup, model.config
    n = len(cells)
    rna = Gathered(n, config.n_genes, n_samples, keep[0], calibration, masked=cells.has_rna is not None)
    prot = Gathered(n, config.n_proteins, n_samples, keep[1], calibration, masked=mask) if config.has_protein else None
    sweep = Sweep(n_samples=n_samples, at_mean=False, average=False, seed=seed)
    index = torch.arange(len(cells), device=cells.label.device)
    stream = draw_counts(model, cells, find_features(setup), sweep, index)
    for drawn in with_bar(stream, len(cells) * n_samples, "draw", lambda drawn: drawn.rows.stop - drawn.rows.start):
        rows = drawn.rows
        if drawn.step == 0:
            x = cells.x.dense(cells.x_row[rows])[0].cpu().numpy()
            there = np.ones(x.shape, dtype=bool)
            if cells.has_rna is not None:
                there &= cells.has_rna[rows].cpu().numpy()[:, None]
            rna.start(rows, x, there, split[rows])
            if prot is not None:
                y = cells.proteins(index[rows]).cpu().numpy()
                measured = (
                    cells.mask_table[cells.mask_row[rows]].cpu().numpy() if mask else np.ones(y.shape, dtype=bool)
                )
                prot.start(rows, y, measured, split[rows])
        rna.add(drawn.step, drawn.rna.numpy())
        if prot is not None:
            prot.add(drawn.step, drawn.prot.numpy())
    return rna, prot
