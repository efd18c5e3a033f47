"""Label transfer and imputation on query tasks with known truth, anvi beside plain baselines and scvi-tools.

    ANVI_DATA_DIR=... python benchmarks/transfer.py --tasks report --seeds 3 --methods totalanvi,linear,knn
    python benchmarks/transfer.py --tasks choose --option hide_proteins=0.5 --out benchmarks/results/transfer_hide.json

Every task is made from the labelled cells of one batch of real CITE-seq: some of its cells become a query, seen as
another experiment would have seen them, without labels. Settings may be chosen on the tasks in `CHOOSE`, and how
novelty is told on those in `MORE`; only those in `REPORT` are reported.
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
from scipy.stats import chi2
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score, silhouette_score
from sklearn.neighbors import KNeighborsRegressor, NearestNeighbors

import anvi as av
from anvi._data.predictions import expected_error, reliability

N_QUERY = 1_500


@dataclass(frozen=True)
class Task:
    """How reference and query differ."""

    query_depth: float = 1.0  # share of counts kept in the query
    reference_depth: float = 1.0
    spread: float = 0.0  # standard deviation of log efficiencies per gene in the thinner part
    proteins: float = 0.0  # share of the panel that the query has
    rare: int | None = None  # labelled cells left of the four rarest classes
    labels: float = 1.0  # share of reference cells that are labelled
    left_out: int | None = None  # which class, by size, the reference knows nothing of


CHOOSE = {
    "shallow": Task(query_depth=0.55, spread=0.4),
    "deep": Task(reference_depth=0.55, spread=0.4),
    "half panel": Task(proteins=0.5, query_depth=0.7, spread=0.3),
    "labels 5 %": Task(labels=0.05),
    "without the 3rd class": Task(left_out=3),
}
REPORT = {
    "random split": Task(),
    "shallow, 40 %": Task(query_depth=0.4, spread=0.5),
    "shallow, 70 %": Task(query_depth=0.7, spread=0.3),
    "deep, 40 %": Task(reference_depth=0.4, spread=0.5),
    "rare classes of 5": Task(rare=5, query_depth=0.7, spread=0.3),
    "labels 1 %": Task(labels=0.01),
    "labels 20 %": Task(labels=0.2),
    "without the 1st class": Task(left_out=1, query_depth=0.7, spread=0.3),
    "without the 6th class": Task(left_out=6),
}
MORE = {
    "without the 2nd class": Task(left_out=2, query_depth=0.7, spread=0.3),
    "without the 4th class": Task(left_out=4, query_depth=0.7, spread=0.3),
    "without the 5th class": Task(left_out=5),
    "without the 7th class": Task(left_out=7),
    "without the 8th class": Task(left_out=8, query_depth=0.7, spread=0.3),
    "without the 9th class": Task(left_out=9),
    "without the 10th class": Task(left_out=10, query_depth=0.7, spread=0.3),
}
"""For choosing how novelty is told; by name only."""


@dataclass(frozen=True)
class Problem:
    """A task on data: what methods see, and the truth."""

    mdata: MuData  # obs: batch (reference, query), cell_type (Unknown where hidden)
    query: np.ndarray  # (cells,) bool
    truth: np.ndarray  # (cells,) class names
    novel: np.ndarray  # (cells,) bool, of a class that the reference does not have
    proteins: np.ndarray  # (cells, proteins) measured values
    hidden: np.ndarray  # (proteins,) bool, not measured in the query


@dataclass(frozen=True)
class Answer:
    """What a method says of the query cells."""

    proba: pd.DataFrame  # (query cells, classes)
    imputed: np.ndarray | None = None  # (query cells, proteins)
    novelty: np.ndarray | None = None  # (query cells,)
    latent: np.ndarray | None = None  # (cells, latent), reference and query


def labelled_part(path: Path) -> MuData:
    """Cells with labels and proteins."""
    mdata = mudata.read(path)
    known = mdata.obs["cell_type"].astype(str).isin({"nan", "Unknown", ""})
    cells = mdata.obs_names[~known & mdata.obs_names.isin(mdata["prot"].obs_names)]
    return mdata[cells].copy()


def pose(source: MuData, task: Task, seed: int) -> Problem:
    """Make a problem of a task."""
    rng = np.random.default_rng(seed)
    truth = source.obs["cell_type"].astype(str).to_numpy()
    query = np.zeros(len(truth), dtype=bool)
    query[rng.permutation(len(truth))[:N_QUERY]] = True
    rna, prot = source["rna"].copy(), source["prot"].copy()
    x, y = rna.X.tocsr().astype(np.float32), np.asarray(prot.X.todense() if hasattr(prot.X, "todense") else prot.X)
    for rows, depth in ((query, task.query_depth), (~query, task.reference_depth)):
        if depth < 1:
            efficiency = np.clip(depth * np.exp(task.spread * rng.standard_normal(x.shape[1])), 0, 1)
            at = np.repeat(rows, np.diff(x.indptr))
            x.data[at] = rng.binomial(x.data[at].astype(int), efficiency[x.indices[at]])
    x.eliminate_zeros()
    rna.X = x
    sizes = pd.Series(truth).value_counts()
    keep, label = np.ones(len(truth), dtype=bool), np.where(query, "Unknown", truth).astype(object)
    novel = np.zeros(len(truth), dtype=bool)
    if task.left_out is not None:
        novel = truth == sizes.index[task.left_out - 1]
        keep &= query | ~novel
    if task.rare is not None:
        for name in sizes.index[-4:]:
            there = np.flatnonzero(~query & (truth == name))
            keep[rng.permutation(there)[task.rare :]] = False
    if task.labels < 1:
        label[~query & (rng.random(len(truth)) > task.labels)] = "Unknown"
    hidden = np.zeros(y.shape[1], dtype=bool)
    hidden[rng.permutation(y.shape[1])[: round((1 - task.proteins) * y.shape[1])]] = True
    seen = y.astype(np.float32)
    seen[np.ix_(query, hidden)] = np.nan
    prot.X = seen
    mdata = MuData({"rna": rna[keep].copy(), "prot": prot[keep & ~(query & hidden.all())].copy()})
    mdata.obs["batch"] = np.where(query, "query", "reference")[keep]
    mdata.obs["cell_type"] = label[keep].astype(str)
    return Problem(mdata, query[keep], truth[keep], novel[keep], y[keep], hidden)


# methods ----------------------------------------------------------------------------------------------------------


def totalanvi(problem: Problem, seed: int, options: dict) -> Answer:
    """anvi's joint model, query cells in the fit."""
    mdata = problem.mdata.copy()
    av.tl.totalanvi(mdata, batch_key="batch", random_state=seed, **options)
    av.tl.denoise(mdata, modality="prot", include_background=True)
    names = mdata.obs_names[problem.query]
    novelty = mdata.obs.loc[names, "totalanvi_novelty"].to_numpy() if "totalanvi_novelty" in mdata.obs else None
    imputed = av.get.table(mdata, "totalanvi_prot_denoised").loc[names].to_numpy()
    return Answer(av.get.proba(mdata).loc[names], imputed, novelty, np.asarray(mdata.obsm["X_totalanvi"]))


def scanvi(problem: Problem, seed: int, options: dict) -> Answer:
    """anvi's RNA model, query cells in the fit."""
    mdata = problem.mdata.copy()
    av.tl.scanvi(mdata, batch_key="batch", random_state=seed, **options)
    part = mdata["rna"]
    names = part.obs_names[problem.query]
    novelty = part.obs.loc[names, "scanvi_novelty"].to_numpy() if "scanvi_novelty" in part.obs else None
    return Answer(av.get.proba(mdata).loc[names], None, novelty, np.asarray(part.obsm["X_scanvi"]))


def mapped_totalanvi(problem: Problem, seed: int, options: dict) -> Answer:
    """anvi's joint model fitted to the reference alone, query cells mapped onto it afterwards."""
    reference, query = problem.mdata[~problem.query].copy(), problem.mdata[problem.query].copy()
    av.tl.totalanvi(reference, batch_key="batch", random_state=seed, **options)
    av.tl.map_query(query, reference, random_state=seed)
    av.tl.denoise(query, modality="prot", include_background=True)
    novelty = query.obs["totalanvi_novelty"].to_numpy() if "totalanvi_novelty" in query.obs else None
    latent = np.zeros((problem.mdata.n_obs, query.obsm["X_totalanvi"].shape[1]))
    latent[problem.query], latent[~problem.query] = query.obsm["X_totalanvi"], reference.obsm["X_totalanvi"]
    return Answer(av.get.proba(query), av.get.table(query, "totalanvi_prot_denoised").to_numpy(), novelty, latent)


def scvi_tools_totalanvi(problem: Problem, seed: int, options: dict) -> Answer:
    """The incumbent's joint model with its own defaults."""
    import scvi

    scvi.settings.seed = seed
    mdata = problem.mdata.copy()
    rna = mdata["rna"].copy()
    prot = np.zeros((rna.n_obs, mdata["prot"].n_vars), dtype=np.float32)
    prot[rna.obs_names.get_indexer(mdata["prot"].obs_names)] = np.nan_to_num(np.asarray(mdata["prot"].X))
    rna.obsm["protein"] = pd.DataFrame(prot, index=rna.obs_names, columns=mdata["prot"].var_names)
    rna.obs["batch"], rna.obs["cell_type"] = mdata.obs["batch"].to_numpy(), mdata.obs["cell_type"].to_numpy()
    model_class = scvi.external.TOTALANVI
    model_class.setup_anndata(rna, "protein", labels_key="cell_type", unlabeled_category="Unknown", batch_key="batch")
    model = model_class(rna)
    model.train(enable_progress_bar=False, **options)
    proba = model.predict(soft=True)
    _, imputed = model.get_normalized_expression(n_samples=1, return_mean=True, include_protein_background=True)
    latent = model.get_latent_representation()
    return Answer(proba.loc[rna.obs_names[problem.query]], imputed.to_numpy()[problem.query], None, latent)


def components(problem: Problem) -> np.ndarray:
    """50 principal components of log-normalised genes, scaled within each batch."""
    import scanpy as sc

    rna = problem.mdata["rna"].copy()
    sc.pp.normalize_total(rna, target_sum=1e4)
    sc.pp.log1p(rna)
    x = rna.X.toarray()
    for rows in (problem.query, ~problem.query):
        x[rows] = (x[rows] - x[rows].mean(0)) / (x[rows].std(0) + 1e-6)
    rna.X = np.clip(x, -10, 10)
    sc.pp.pca(rna, n_comps=50)
    return rna.obsm["X_pca"]


def linear(problem: Problem, seed: int, options: dict) -> Answer:
    """Logistic regression for labels and the 15 nearest neighbours for proteins, both on components."""
    pcs, labels = components(problem), problem.mdata.obs["cell_type"].to_numpy().astype(str)
    known = labels != "Unknown"
    classifier = LogisticRegression(max_iter=2_000).fit(pcs[known], labels[known])
    proba = classifier.predict_proba(pcs[problem.query])
    reference = ~problem.query
    neighbours = KNeighborsRegressor(15).fit(pcs[reference], np.log1p(problem.proteins[reference]))
    imputed = np.expm1(neighbours.predict(pcs[problem.query]))
    names = problem.mdata.obs_names[problem.query]
    return Answer(pd.DataFrame(proba, names, classifier.classes_), imputed, 1 - proba.max(1), pcs)


def majority(problem: Problem, seed: int, options: dict) -> Answer:
    """The commonest class for everybody."""
    labels = problem.mdata.obs["cell_type"][problem.mdata.obs["cell_type"] != "Unknown"]
    share = labels.value_counts(normalize=True)
    names = problem.mdata.obs_names[problem.query]
    return Answer(pd.DataFrame(np.tile(share.to_numpy(), (len(names), 1)), names, share.index.astype(str)))


METHODS = {f.__name__: f for f in (totalanvi, mapped_totalanvi, scanvi, scvi_tools_totalanvi, linear, majority)}


# scores -----------------------------------------------------------------------------------------------------------


def score(problem: Problem, answer: Answer) -> dict[str, float]:
    """All measures of one answer; labels over cells of classes that the reference has."""
    query, novel = problem.truth[problem.query], problem.novel[problem.query]
    classes, proba = answer.proba.columns.to_numpy().astype(str), answer.proba.to_numpy(dtype=float)
    predicted = classes[proba.argmax(1)]
    known = ~novel
    code = pd.Index(classes).get_indexer(query)
    hot = np.zeros_like(proba)
    hot[np.flatnonzero(code >= 0), code[code >= 0]] = 1
    scores = {
        "accuracy": float((predicted == query)[known].mean()),
        "macro_f1": float(f1_score(query[known], predicted[known], average="macro", zero_division=0)),
        "ece": expected_error(reliability(proba[known].max(1), (predicted == query)[known])),
        "brier": float(((proba - hot)[known] ** 2).sum(1).mean()),
    }
    for name in np.unique(query[known]):
        scores[f"recall {name}"] = float((predicted == query)[known & (query == name)].mean())
    if answer.imputed is not None and problem.hidden.any():
        truth = np.log1p(problem.proteins[problem.query][:, problem.hidden])
        guess = np.log1p(np.clip(answer.imputed[:, problem.hidden], 0, None))
        pairs = list(zip(truth.T, guess.T, strict=True))
        scores["pearson"] = float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))
        ranks = [(pd.Series(a).rank(), pd.Series(b).rank()) for a, b in pairs]
        scores["spearman"] = float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in ranks]))
    if answer.novelty is not None and novel.any():
        scores["novelty_auroc"] = float(roc_auc_score(novel, answer.novelty))
    if answer.latent is not None:
        scores["mixing"] = mixing(answer.latent, problem.query)
        scores["silhouette"] = float(silhouette_score(answer.latent, problem.truth, sample_size=2_000, random_state=0))
    return scores


def mixing(latent: np.ndarray, query: np.ndarray, k: int = 50) -> float:
    """Share of cells whose k neighbours have the query share of the data, by a chi-square test at 5 % (as in kBET)."""
    near = NearestNeighbors(n_neighbors=k + 1).fit(latent).kneighbors(latent, return_distance=False)[:, 1:]
    found, expected = query[near].sum(1), k * query.mean()
    statistic = (found - expected) ** 2 / expected + (found - expected) ** 2 / (k - expected)
    return float((chi2.sf(statistic, 1) > 0.05).mean())


SHOWN = ("accuracy", "macro_f1", "ece", "brier", "pearson", "spearman", "novelty_auroc", "mixing", "silhouette")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="report", help="'choose', 'report' or names separated by ';'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", default="totalanvi,linear,majority")
    parser.add_argument("--option", action="append", default=[], help="name=value, passed to the fits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    av.settings.progress = False
    options = {name: ast.literal_eval(value) for name, value in (text.split("=", 1) for text in arguments.option)}
    every = CHOOSE | REPORT | MORE
    names = {"choose": list(CHOOSE), "report": list(REPORT)}.get(arguments.tasks, arguments.tasks.split(";"))
    source = labelled_part(Path(os.environ["ANVI_DATA_DIR"]) / "pbmc_citeseq.h5mu")
    rows = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in names:
            problem = pose(source, every[name], seed)
            for method in arguments.methods.split(","):
                begun = time.perf_counter()
                answer = METHODS[method](problem, seed, options if "anvi" in method else {})
                row = {"task": name, "seed": seed, "method": method, **score(problem, answer)}
                rows.append(row | {"seconds": round(time.perf_counter() - begun, 1)})
                shown = ", ".join(f"{key} {row[key]:.3f}" for key in SHOWN if key in row)
                print(f"{name}, seed {seed}, {method}: {shown}", flush=True)
                if arguments.out is not None:
                    facts = {"options": options, "anvi": av.__version__, "torch": torch.__version__}
                    facts |= {"python": platform.python_version(), "command": " ".join(sys.argv)}
                    arguments.out.parent.mkdir(parents=True, exist_ok=True)
                    arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))
    table = pd.DataFrame(rows)
    shown = [name for name in SHOWN if name in table]
    mean = table.groupby("method")[shown].mean()
    by_seed = table.groupby(["method", "seed"])[shown].mean().groupby("method").std()
    print("\nmean over tasks (standard deviation over seeds of that mean)")
    print((mean.round(3).astype(str) + " (" + by_seed.round(3).astype(str) + ")").T.to_string())


if __name__ == "__main__":
    main()
