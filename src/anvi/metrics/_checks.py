"""Statistics of a posterior predictive check, streamed over cells: what data and draws have in common.

Pure functions and running sums on arrays.
Source: spec section 5.5; ranks among draws: Czado, Gneiting & Held 2009 (the non-randomised PIT of counts).
"""

from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation", "other")
"""Cells by what the fit did with them; running sums keep them apart."""


class Sums:
    """Running sums over cells for every feature, kept apart by split; float64, since squares of counts are long.

    Parameters
    ----------
    n_features
        Number of features.
    """

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


class Places:
    """Where each value stands among its draws: counted per pair (draws below it, draws equal to it) and split.

    If data and draws come from the same distribution, a value is equally likely to take any of the S + 1 places among
    its S draws and itself, ties broken at random; so this is a test at any number of draws, also of counts. Entries
    that equal all of their draws (most zeros) take every place alike whatever the model: they are not counted.

    Parameters
    ----------
    n_samples
        Number of draws of each entry.
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


class QuantileHits:
    """scvi-tools' calibration: how many entries lie between interpolated quantiles of their draws, edges included.

    Zeros count like all other entries, so that numbers are close to 1 where most counts are 0.

    Parameters
    ----------
    n_samples
        Number of draws of each entry.
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
    place = p * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 1)
    below, above = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    return below + (place - low) * (above - below)


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
