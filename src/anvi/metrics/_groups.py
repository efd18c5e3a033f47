"""Do draws differ between groups of cells where the data do? The same test on both, group by group.

Source: spec sections 5.5 and 6 (B17).
"""

import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from ._ppc import Definition, KeptDraws, agreement

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
