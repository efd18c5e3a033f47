"""Labels and proteins of real query cells, whose truth is known, by many read-outs of one fit and by plain baselines.

    ANVI_DATA_DIR=... python benchmarks/real_tasks.py --tasks choose --seeds 3 --out benchmarks/results/real_choose.json
    ANVI_DATA_DIR=... python benchmarks/real_tasks.py --tasks report --seeds 3 --out benchmarks/results/real_report.json

Three kits (PBMC 10k; a MALT tumour; ECCITE, 5-prime chemistry) and four samples with 224 proteins: query and reference
are other experiments, or parts of one with one protein after the other left out. A query loses its labels, and all its
proteins or one in each cell. Written down before any result was looked at: settings are chosen on the tasks in `CHOOSE`
(and on those of `transfer.py` of that name) and only those in `REPORT` are reported. In `CHOOSE`
ECCITE is never a query, and p3_0 never a reference.
"""

import argparse
import ast
import json
import os
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import torch
from mudata import MuData

import anvi as av

N_MOST = 2_000
"""Cells of an experiment that take part, drawn anew for every seed."""
N_GENES = 1_500
"""Most variable genes of the reference, which alone are shown."""
KITS = {"pbmc": "pbmc10k_totalseqB", "malt": "malt_totalseqB", "eccite": "eccite_ctrl"}


@dataclass(frozen=True)
class Task:
    """What is reference, what is query, and what of the query's proteins is hidden."""

    reference: str
    query: str  # the same name: half of the cells
    hide: str = "all"  # or "one": in each cell one protein, in turn


CHOOSE = {
    "pbmc to malt": Task("pbmc", "malt"),
    "malt to pbmc": Task("malt", "pbmc"),
    "eccite to malt": Task("eccite", "malt"),
    "p4_0 to p3_0": Task("p4_0", "p3_0"),
    "pbmc to malt, one": Task("pbmc", "malt", "one"),
    "malt to pbmc, one": Task("malt", "pbmc", "one"),
    "malt, one": Task("malt", "malt", "one"),
}
REPORT = {
    "pbmc to eccite": Task("pbmc", "eccite"),
    "eccite to pbmc": Task("eccite", "pbmc"),
    "malt to eccite": Task("malt", "eccite"),
    "p3_0 to p4_0": Task("p3_0", "p4_0"),
    "p3_0 to p1_0": Task("p3_0", "p1_0"),
    "p4_0 to p1_0": Task("p4_0", "p1_0"),
    "pbmc, one": Task("pbmc", "pbmc", "one"),
    "eccite, one": Task("eccite", "eccite", "one"),
    "pbmc to eccite, one": Task("pbmc", "eccite", "one"),
    "malt to eccite, one": Task("malt", "eccite", "one"),
}


@dataclass(frozen=True)
class Problem:
    """A task on data: what methods see, and the truth."""

    mdata: MuData  # obs: batch, label (Unknown where hidden); prot: NaN where hidden
    query: np.ndarray  # (cells,) bool
    truth: np.ndarray  # (cells,) class names; "Unknown" where nobody knows
    labelled: bool  # whether the labels are types, and not groups of the reference's proteins
    y: np.ndarray  # (cells, proteins) what was measured, NaN elsewhere
    hidden: np.ndarray  # (cells, proteins) bool: measured, but not shown

    @property
    def shown(self) -> np.ndarray:
        """What methods may see of the proteins `(cells, proteins)`."""
        return np.where(self.hidden, np.nan, self.y)


@dataclass(frozen=True)
class Sample:
    """Cells of one experiment."""

    rna: object  # AnnData
    y: pd.DataFrame | None  # (cells, proteins)
    label: np.ndarray


def read_samples(folder: Path) -> dict[str, Sample]:
    """Every experiment of the two files."""
    kits, mosaic = mudata.read_h5mu(folder / "three_kits.h5mu"), mudata.read_h5mu(folder / "mosaic_224.h5mu")
    samples = {}
    for name, kit in KITS.items():
        rows = (kits.obs["kit"] == kit).to_numpy()
        names = kits.obs_names[rows]
        y = kits["prot"][names].to_df().dropna(axis=1, how="all")
        samples[name] = Sample(kits["rna"][names].copy(), y, kits.obs.loc[names, "cell_type"].astype(str).to_numpy())
    rna, adt = mosaic["rna"], mosaic["adt"]
    for name in ("p1_0", "p3_0", "p4_0"):
        part = rna[rna.obs["batch"] == name].copy()
        y = adt[part.obs_names].to_df() if part.obs_names.isin(adt.obs_names).all() else None
        samples[name] = Sample(part, y, part.obs["celltype"].astype(str).to_numpy())
        part.obs = part.obs[[]]
    return samples


def pose(samples: dict[str, Sample], task: Task, seed: int) -> Problem:
    """Make a problem of a task."""
    rng = np.random.default_rng(seed)
    names = [task.reference] if task.reference == task.query else [task.reference, task.query]
    rnas, ys, labels, query = [], [], [], []
    for name in names:
        sample = samples[name]
        rows = np.sort(rng.permutation(sample.rna.n_obs)[:N_MOST])
        rnas.append(sample.rna[rows])
        ys.append(pd.DataFrame(index=rnas[-1].obs_names) if sample.y is None else sample.y.iloc[rows])
        labels.append(sample.label[rows])
        half = rng.permutation(len(rows)) < len(rows) // 2
        query.append(half if len(names) == 1 else np.full(len(rows), name == task.query))
    query, truth = np.concatenate(query), np.concatenate(labels)
    import anndata

    rna = anndata.concat(rnas, join="inner")
    rna = rna[:, variable(rna[~query])].copy()
    panel = [name for name in ys[0].columns if all(name in y or not y.shape[1] for y in ys)]  # what all have
    y = pd.concat([part.reindex(columns=panel) for part in ys]).to_numpy(dtype=np.float32)
    hidden = np.zeros(y.shape, dtype=bool)
    if task.hide == "all":
        hidden[query] = True
    else:
        at = np.flatnonzero(query)
        hidden[at, rng.permutation(len(at)) % len(panel)] = True
    hidden &= ~np.isnan(y)
    labelled = bool((truth[~query] != "Unknown").any())
    seen = np.where(query, "Unknown", truth)
    if not labelled:  # a user would name groups; these stand in for them
        from sklearn.cluster import KMeans
        from sklearn.preprocessing import scale

        groups = KMeans(6, n_init=3, random_state=seed).fit_predict(scale(np.log1p(y[~query])))
        seen[~query] = [f"group {i}" for i in groups]
    shown = pd.DataFrame(np.where(hidden, np.nan, y), rna.obs_names, panel)
    prot = anndata.AnnData(shown[shown.notna().any(axis=1)].astype(np.float32))
    prot.var_names, rna.var_names = panel, rna.var_names
    mdata = MuData({"rna": rna, "prot": prot})
    mdata = mdata[rna.obs_names].copy()
    batch = np.repeat(names, [part.n_obs for part in rnas])
    mdata.obs["batch"], mdata.obs["label"] = batch, seen.astype(str)
    return Problem(mdata, query, truth, labelled, y, hidden)


def variable(rna) -> np.ndarray:
    """The most variable log-normalised genes of the cells of a reference `(genes,)` bool."""
    import scanpy as sc

    rna = rna.copy()
    sc.pp.normalize_total(rna, target_sum=1e4)
    sc.pp.log1p(rna)
    variance = np.asarray(rna.X.todense()).var(0)
    return variance >= np.sort(variance)[-min(N_GENES, rna.n_vars)]


# what is read out: all arrays that read-outs of one fit are made of --------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """What a fit says, before any rule makes an answer of it."""

    both: np.ndarray  # (cells, latent) proteins seen where they are shown
    rna: np.ndarray  # (cells, latent) RNA alone
    own: np.ndarray  # (cells, proteins) decoded at `both` in each cell's own batch, with background
    rna_own: np.ndarray  # (cells, proteins) decoded at `rna`, own batch
    moved: np.ndarray  # (cells, proteins) decoded at `both` in the reference's batch
    proba: np.ndarray  # (cells, classes)
    classes: np.ndarray
    pcs: np.ndarray  # (cells, 50)
    seconds: float


def fit(problem: Problem, seed: int, options: dict) -> Fitted:
    """anvi's joint model with its defaults, and principal components."""
    from dataclasses import replace

    from anvi._posterior import encode
    from anvi.tl._ask import ask

    begun = time.perf_counter()
    mdata = problem.mdata
    av.tl.totalanvi(mdata, "label", batch_key="batch", random_state=seed, **options)
    seconds = time.perf_counter() - begun
    model, _, setup, cells = ask(mdata, None)
    order = pd.Index(cells.names).get_indexer(mdata.obs_names)
    both = encode.embed(model, cells)
    blind = replace(cells, mask_table=torch.zeros_like(cells.mask_table[:1]), mask_row=torch.zeros_like(cells.mask_row))
    rna = encode.embed(model, blind)
    column = pd.Index(setup.proteins).get_indexer(problem.mdata["prot"].var_names)
    values = []
    reference = setup.batches.index(problem.mdata.obs["batch"].iloc[np.flatnonzero(~problem.query)[0]])
    from anvi._data.features import find_features
    from anvi._posterior.denoise import Sweep, expected

    features = find_features(setup, None, setup.prot_mod)
    for part, sweep in ((cells, Sweep()), (blind, Sweep()), (cells, Sweep(codes=(reference,)))):
        values.append(expected(model, part, features, sweep, include_background=True).prot[order][:, column])
    classes = np.array(model.classes)
    pcs = components(problem)
    return Fitted(both.mean[order], rna.mean[order], *values, both.proba[order], classes, pcs, seconds)


def components(problem: Problem) -> np.ndarray:
    """50 principal components of log-normalised genes, scaled within each batch."""
    import scanpy as sc

    rna = problem.mdata["rna"].copy()
    sc.pp.normalize_total(rna, target_sum=1e4)
    sc.pp.log1p(rna)
    x = np.asarray(rna.X.todense())
    for rows in (problem.query, ~problem.query):
        x[rows] = (x[rows] - x[rows].mean(0)) / (x[rows].std(0) + 1e-6)
    rna.X = np.clip(x, -10, 10)
    sc.pp.pca(rna, n_comps=50)
    return rna.obsm["X_pca"]
