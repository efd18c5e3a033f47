"""Posterior predictive checks: draws gathered in one pass over cells, and the statistics that data and draws share."""

import warnings
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
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
        return _ratio(self.zeros[splits].sum(0), self.n[splits].sum(0))


def _cv(n: np.ndarray, total: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Population standard deviation over mean, from sums."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / n
        cv = np.sqrt(np.clip(square / n - mean**2, 0, None)) / mean
    return np.where(mean == 0, np.nan, cv)


def cell_cv(values: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Coefficient of variation of each cell over its measured features `(cells,)`; NaN where the mean is 0."""
    return _cv(measured.sum(1), values.sum(1), (values**2).sum(1))


class RankCounts:
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


def mean_of(values: np.ndarray) -> float:
    """Mean of the finite values; NaN without any."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


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
        self.ranks = RankCounts(n_samples) if calibration == "ranks" else None
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
                measured = cells.measured_of(rows).cpu().numpy() if mask else np.ones(y.shape, dtype=bool)
                prot.start(rows, y, measured, split[rows])
        rna.add(drawn.step, drawn.rna.numpy())
        if prot is not None:
            prot.add(drawn.step, drawn.prot.numpy())
    return rna, prot


# groups of cells: do draws differ between them where the data do? the same test on both ------------------------------

MIN_CELLS = 3
"""Cells that a group must have to be tested."""
TARGET = 1e4
"""Counts to which cells are scaled before the logarithm."""


def choose_cells(groups: pd.Categorical, eligible: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """Which cells are tested: eligible ones with a group, at most `n` of each `(cells,)` bool."""
    chosen = np.zeros(len(groups), dtype=bool)
    rng = np.random.default_rng(seed)
    for code in range(len(groups.categories)):
        members = np.flatnonzero((groups.codes == code) & eligible)
        chosen[members if n is None or len(members) <= n else rng.choice(members, n, replace=False)] = True
    return chosen


def compare_groups(kept: KeptDraws, groups: pd.Categorical, definition: Definition) -> pd.DataFrame:
    """How well the draw reproduces what sets each group apart from the rest.

    Returns one row per group, the largest first: group, gene_f1, lfc_mae, lfc_pearson, lfc_spearman, roc_auc, pr_auc,
    cells. Groups of fewer than three cells have no numbers.
    """
    data = _test(kept.data, kept.measured, groups, definition.method)
    draw = _test(kept.draw, kept.measured, groups, definition.method)
    cells = pd.Series(groups).value_counts()
    rows = []
    for group in groups.categories:
        scores = Scores() if group not in data or group not in draw else _score(data[group], draw[group], definition)
        rows.append({"group": str(group), **scores._asdict(), "cells": int(cells[group])})
    return pd.DataFrame(rows).sort_values("cells", ascending=False, kind="stable", ignore_index=True)


def log_normalised(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Counts scaled to 10,000 per cell, then log(1 + x)."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    out = counts.astype(np.float32, copy=True)
    out.data *= np.repeat(TARGET / np.where(total == 0, 1, total), np.diff(out.indptr)).astype(np.float32)
    return out.log1p()


def _test(
    counts: sparse.csr_matrix, measured: np.ndarray | None, groups: pd.Categorical, method: str
) -> dict[str, pd.DataFrame]:
    """Scanpy's test of each group against the rest: per group, a row per feature in the order of the scores.

    Features that were measured in the same cells are tested together, in these cells.
    """
    if measured is None:
        return _scanpy_test(log_normalised(counts), groups, method)
    values = log_normalised(counts).tocsc()
    found: dict[str, list[pd.DataFrame]] = {}
    packed = np.packbits(measured, axis=0).T  # (features, bytes)
    _, first, pattern = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    pattern = pattern.reshape(-1)
    for number, feature in enumerate(first):
        columns, cells = np.flatnonzero(pattern == number), np.flatnonzero(measured[:, feature])
        for group, table in _scanpy_test(values[:, columns].tocsr()[cells], groups[cells], method).items():
            found.setdefault(group, []).append(table.set_axis(columns[table.index]))
    return {group: _joined(tables) for group, tables in found.items()}


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    if len(tables) == 1:
        return tables[0]
    from scipy.stats import false_discovery_control

    table = pd.concat(tables).sort_values("scores", ascending=False, kind="stable")
    return table.assign(pvals_adj=false_discovery_control(table["pvals"].fillna(1)))


def _scanpy_test(values: sparse.csr_matrix, groups: pd.Categorical, method: str) -> dict[str, pd.DataFrame]:
    """Per group, a row per feature (by its number) in the order of the scores; none for groups of too few cells."""
    import scanpy as sc
    from anndata import AnnData

    sizes = pd.Series(groups).value_counts()
    large = [group for group in groups.categories if sizes[group] >= MIN_CELLS]
    if len(large) == 0 or len(groups) - sizes.max() < MIN_CELLS:
        return {}
    obs = pd.DataFrame({"group": groups}, index=np.arange(len(groups)).astype(str))
    adata = AnnData(values, obs=obs, var=pd.DataFrame(index=np.arange(values.shape[1]).astype(str)))
    n_threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fragmented tables and of logarithms of 0: genes that a group does not have
        sc.tl.rank_genes_groups(adata, "group", groups=large, use_raw=False, method=method)
    torch.set_num_threads(n_threads)  # numba, which scanpy starts, sets it for torch, too
    tables = {}
    for group in large:
        inside = np.asarray(groups == group)
        seen = np.logical_and(*(np.diff(values[cells].tocsc().indptr) > 0 for cells in (inside, ~inside)))
        table = sc.get.rank_genes_groups_df(adata, group=group)
        table = table.set_index(table.pop("names").astype(int))
        tables[group] = table.assign(seen=seen[table.index])
    return tables


class Scores(NamedTuple):
    """How well one group's differences are reproduced."""

    gene_f1: float = np.nan
    lfc_mae: float = np.nan
    lfc_pearson: float = np.nan
    lfc_spearman: float = np.nan
    roc_auc: float = np.nan
    pr_auc: float = np.nan


def _score(data: pd.DataFrame, draw: pd.DataFrame, definition: Definition) -> Scores:
    from sklearn.metrics import average_precision_score, roc_auc_score

    n_top = top_features(len(data), definition.least_top)
    overlap = len(set(data.index[:n_top]) & set(draw.index[:n_top]))
    draw = draw.reindex(data.index)
    compared = (data["seen"] & draw["seen"].astype(bool)).to_numpy() if definition.seen_only else slice(None)
    fold = agreement(*(table["logfoldchanges"].to_numpy(float)[compared] for table in (data, draw)))
    true, score = truth(data, n_top, definition), draw["scores"].to_numpy(float)
    known = np.isfinite(score)
    true, score = true[known], score[known]
    both = 0 < true.sum() < len(true)
    return Scores(
        gene_f1=overlap / n_top if n_top else np.nan,
        lfc_mae=fold.mae,
        lfc_pearson=fold.pearson,
        lfc_spearman=fold.spearman,
        roc_auc=float(roc_auc_score(true, score)) if both else np.nan,
        pr_auc=float(average_precision_score(true, score)) if both else np.nan,
    )


def top_features(n_features: int, least: int) -> int:
    """How many of the first features of data and draw are held against each other: 100, or a tenth of the features."""
    return min(100, max(n_features // 10, min(least, n_features)))


def truth(data: pd.DataFrame, n_top: int, definition: Definition) -> np.ndarray:
    """Which features set the group apart in the data; the first ones if that is none, or more than half of them."""
    p = data["pvals_adj"].to_numpy(float)
    true = p < definition.alpha
    if definition.one_sided:
        true &= data["scores"].to_numpy(float) > 0
    if not true.any() or true.mean() > 0.5:
        # the rows are in the order of the scores
        first = np.arange(len(p)) if definition.one_sided else np.argsort(p)
        true = np.isin(np.arange(len(p)), first[:n_top])
    return true
