"""Labels and proteins of real query cells, whose truth is known, by many read-outs of one fit and by plain baselines.

    ANVI_DATA_DIR=... python benchmarks/real_tasks.py --tasks choose --seeds 3 --out benchmarks/results/real_choose.json
    ANVI_DATA_DIR=... python benchmarks/real_tasks.py --tasks report --seeds 5 --out benchmarks/results/real_report.json
    python benchmarks/real_tasks.py --show benchmarks/results/real_report.json

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
from scipy.stats import rankdata, t
from sklearn.metrics import f1_score

import anvi as av

N_MOST = 2_000
"""Cells of an experiment that take part, drawn anew for every seed."""
N_GENES = 1_500
"""Most variable genes of the reference, which alone are shown."""
KITS = {"pbmc": "pbmc10k_totalseqB", "malt": "malt_totalseqB", "eccite": "eccite_ctrl"}


@dataclass(frozen=True)
class Task:
    """What is reference, what is query, and what of the query's proteins is hidden."""

    reference: str  # or several: "pbmc + eccite"
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
    "pbmc + eccite to malt": Task("pbmc + eccite", "malt"),
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
    "pbmc + malt to eccite": Task("pbmc + malt", "eccite"),
    "malt + eccite to pbmc": Task("malt + eccite", "pbmc"),
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
    references = task.reference.split(" + ")
    names = references if task.query in references else [*references, task.query]
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


# answers: many read-outs of one fit, and baselines -------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a method says; None where it says nothing of the kind."""

    proba: pd.DataFrame | None = None  # (query cells, classes)
    log_proteins: np.ndarray | None = None  # (cells, proteins) log1p of imputed counts
    interval: tuple[np.ndarray, np.ndarray] | None = None  # (cells, proteins) each, in counts; meant to hold 90 %


def anvi_answers(problem: Problem, seed: int, options: dict) -> tuple[dict[str, Answer], float]:
    """One default fit of TotalANVI, and everything that is read out of it; and the seconds of the fit."""
    mdata, begun = problem.mdata, time.perf_counter()
    av.tl.totalanvi(mdata, "label", batch_key="batch", random_state=seed, **options)
    seconds = time.perf_counter() - begun
    whole = {"modality": "prot", "include_background": True, "inplace": False}
    reference = str(mdata.obs["batch"].iloc[np.flatnonzero(~problem.query)[0]])
    from anvi import _model

    model = av.get.model(mdata)
    bare = _model.Model(model.name, model.setup, model.network, model.history, model.info)  # decodes everything
    columns = list(mdata["prot"].var_names)

    def decoded(**where) -> np.ndarray:
        return np.log1p(
            av.tl.denoise(mdata, **{"model": bare, **whole, **where})["prot"].to_pandas()[columns].to_numpy()
        )

    names, latent = mdata.obs_names[problem.query], np.asarray(mdata.obsm["X_totalanvi"])
    proba = av.get.proba(mdata).loc[names]
    near = neighbour_labels(problem, latent, proba.columns, 5)
    classifier = av.tl.predict(mdata, model=bare, inplace=False).loc[names]  # at the temperature of the mean
    answers = {
        "classifier, decoder": Answer(classifier, decoded()),
        "decoder, reference's batch": Answer(None, decoded(transform_batch=reference)),
        "neighbours in latent": Answer(near, neighbour_proteins(problem, latent, 30)),
    }
    try:
        found = av.tl.denoise(mdata, model=model, return_interval=0.9, **whole)
        ends = tuple(found[name].to_pandas()[columns].to_numpy() for name in ("prot_lower", "prot_upper"))
        answers["default"] = Answer(proba, np.log1p(found["prot"].to_pandas()[columns].to_numpy()), ends)
    except ValueError:  # nothing to impute: the decoder is the default
        answers["default"] = Answer(proba, answers["classifier, decoder"].log_proteins)
    return answers, seconds


def baseline_answers(problem: Problem) -> dict[str, Answer]:
    """Logistic regression for labels and the 30 nearest for labels and proteins, on components."""
    from sklearn.linear_model import LogisticRegression

    pcs, labels = components(problem), problem.mdata.obs["label"].to_numpy().astype(str)
    known = labels != "Unknown"
    classifier = LogisticRegression(max_iter=2_000).fit(pcs[known], labels[known])
    names = problem.mdata.obs_names[problem.query]
    proba = pd.DataFrame(classifier.predict_proba(pcs[problem.query]), names, classifier.classes_)
    near = neighbour_labels(problem, pcs, classifier.classes_, 30)
    return {"logistic regression": Answer(proba), "kNN on PCs": Answer(near, neighbour_proteins(problem, pcs, 30))}


def neighbour_proteins(problem: Problem, space: np.ndarray, k: int) -> np.ndarray:
    """Mean log1p counts of the nearest reference cells `(cells, proteins)`."""
    from sklearn.neighbors import KNeighborsRegressor

    reference = ~problem.query
    values = np.log1p(problem.y[reference])
    return KNeighborsRegressor(min(k, len(values))).fit(space[reference], values).predict(space)


def neighbour_labels(problem: Problem, space: np.ndarray, classes, k: int) -> pd.DataFrame:
    """Shares of the classes among the nearest labelled cells `(query cells, classes)`."""
    from sklearn.neighbors import KNeighborsClassifier

    labels = problem.mdata.obs["label"].to_numpy().astype(str)
    known = labels != "Unknown"
    model = KNeighborsClassifier(k).fit(space[known], labels[known])
    proba = pd.DataFrame(
        model.predict_proba(space[problem.query]), problem.mdata.obs_names[problem.query], model.classes_
    )
    return proba.reindex(columns=classes, fill_value=0.0)


def components(problem: Problem) -> np.ndarray:
    """50 principal components of log-normalised genes, scaled within each batch (query and reference of one)."""
    import scanpy as sc

    rna = problem.mdata["rna"].copy()
    sc.pp.normalize_total(rna, target_sum=1e4)
    sc.pp.log1p(rna)
    x = np.asarray(rna.X.todense())
    batch = problem.mdata.obs["batch"].to_numpy()
    groups = [problem.query, ~problem.query] if len(set(batch)) == 1 else [batch == name for name in set(batch)]
    for rows in groups:
        x[rows] = (x[rows] - x[rows].mean(0)) / (x[rows].std(0) + 1e-6)
    rna.X = np.clip(x, -10, 10)
    sc.pp.pca(rna, n_comps=50)
    return rna.obsm["X_pca"]


# scores ---------------------------------------------------------------------------------------------------------------


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where a side is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else 0.0


def score(problem: Problem, answer: Answer) -> dict[str, float]:
    """All measures of one answer, over query cells and hidden proteins."""
    scores = {}
    truth = problem.truth[problem.query]
    if answer.proba is not None and problem.labelled and (truth != "Unknown").any():
        known = truth != "Unknown"
        proba, classes = answer.proba.to_numpy(dtype=float)[known], answer.proba.columns.to_numpy().astype(str)
        truth, predicted = truth[known], classes[proba.argmax(1)]
        right = predicted == truth
        code = pd.Index(classes).get_indexer(truth)
        hot = np.zeros_like(proba)
        hot[np.flatnonzero(code >= 0), code[code >= 0]] = 1
        bins = np.minimum((proba.max(1) * 10).astype(int), 9)
        gaps = [abs(right[bins == i].mean() - proba.max(1)[bins == i].mean()) * (bins == i).mean() for i in set(bins)]
        scores |= {
            "accuracy": float(right.mean()),
            "macro_f1": float(f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0)),
            "ece": float(sum(gaps)),
            "brier": float(((proba - hot) ** 2).sum(1).mean()),
        }
    hidden = problem.hidden
    if answer.log_proteins is not None and hidden.any():
        real, guess = np.log1p(np.where(hidden, problem.y, 0)), answer.log_proteins
        columns = [(real[rows, j], guess[rows, j]) for j, rows in enumerate(hidden.T) if rows.sum() > 4]
        columns = [(a, b) for a, b in columns if a.std() > 0]
        scores["pearson"] = float(np.mean([correlation(a, b) for a, b in columns]))
        scores["spearman"] = float(np.mean([correlation(rankdata(a), rankdata(b)) for a, b in columns]))
        cells = [(real[i, some], guess[i, some]) for i, some in enumerate(hidden) if some.sum() > 4]
        if cells:
            scores["pearson_cell"] = float(np.mean([correlation(a, b) for a, b in cells]))
            scores["spearman_cell"] = float(np.mean([correlation(rankdata(a), rankdata(b)) for a, b in cells]))
        scores["rmse"] = float(np.sqrt(((real - guess)[hidden] ** 2).mean()))
    if answer.interval is not None and hidden.any():
        lower, upper = answer.interval
        inside = (problem.y >= lower - 1e-4) & (problem.y <= upper + 1e-4)
        scores["held"] = float(inside[hidden].mean())
    return scores


SHOWN = ("accuracy", "macro_f1", "ece", "brier", "pearson", "spearman", "pearson_cell", "spearman_cell", "rmse", "held")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="report", help="'choose', 'report' or names separated by ';'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--option", action="append", default=[], help="name=value, passed to the fits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="only print the tables of a file that --out has written")
    arguments = parser.parse_args()
    if arguments.show is not None:
        return print(table(pd.DataFrame(json.loads(arguments.show.read_text())["rows"])))
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    av.settings.progress = False
    options = {name: ast.literal_eval(value) for name, value in (text.split("=", 1) for text in arguments.option)}
    names = {"choose": list(CHOOSE), "report": list(REPORT)}.get(arguments.tasks, arguments.tasks.split(";"))
    samples, rows = read_samples(Path(os.environ["ANVI_DATA_DIR"])), []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in names:
            problem = pose(samples, (CHOOSE | REPORT)[name], seed)
            answers = baseline_answers(problem)
            of_anvi, seconds = anvi_answers(problem, seed, options)
            for method, answer in (answers | of_anvi).items():
                row = {"task": name, "seed": seed, "method": method, **score(problem, answer)}
                rows.append(row | ({"seconds": round(seconds, 1)} if method in of_anvi else {}))
                shown = ", ".join(f"{key} {row[key]:.3f}" for key in SHOWN if key in row)
                print(f"{name}, seed {seed}, {method}: {shown}", flush=True)
            if arguments.out is not None:
                facts = {"options": options, "anvi": av.__version__, "torch": torch.__version__}
                facts |= {"python": platform.python_version(), "command": " ".join(sys.argv)}
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))
    print(table(pd.DataFrame(rows)))


COMPARED = {
    "kNN on PCs": ("pearson", "spearman", "pearson_cell", "spearman_cell", "macro_f1"),
    "logistic regression": ("accuracy", "macro_f1"),
}
"""What the default is compared with, and by which measures."""


def table(rows: pd.DataFrame) -> str:
    """Means over seeds by task and method; and how far the default is ahead, paired, with a 95 % interval."""
    shown = [name for name in SHOWN if name in rows]
    parts = [rows.groupby(["task", "method"], sort=False)[shown].mean().round(3).to_string(na_rep="")]
    for other, measures in COMPARED.items():
        for name in [name for name in measures if name in rows]:
            wide = rows.pivot_table(index=["task", "seed"], columns="method", values=name)
            ahead = (wide["default"] - wide[other]).dropna() if other in wide else pd.Series(dtype=float)
            by_task = ahead.groupby("task", sort=False).agg(["mean", "std", "count"])
            half = t.ppf(0.975, (by_task["count"] - 1).clip(lower=1)) * by_task["std"] / np.sqrt(by_task["count"])
            lines = [f"{task}: {by_task['mean'][task]:+.3f} +- {half[task]:.3f}" for task in by_task.index]
            parts += [f"\n{name}, default ahead of {other}\n" + "\n".join(lines)] if lines else []
    return "\n".join(parts)


if __name__ == "__main__":
    main()
