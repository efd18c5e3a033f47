"""What coarse labels are worth: fits that use them beside fits that throw them away, and beside fits that know all.

    ANVI_DATA_DIR=... python benchmarks/coarse_labels.py --out benchmarks/results/coarse_labels.json
    ANVI_DATA_DIR=... python benchmarks/coarse_labels.py --tasks "pbmc, 70 %" --seeds 1

A task is made of labelled cells. A part of them (`TEST`) loses its labels and is what is scored. Of the others a share
keeps a coarse label alone. Three arms see the same cells and take as many steps: "levels" is told both columns, "thrown
away" the fine one, "all fine" the truth of the coarse ones, too. Also: two references that complement each other beside
either alone; the share of wrong labels beside the one that was promised, in held-out cells and in other samples;
and cells of a type, or a lineage, that nobody has labelled.
"""

import argparse
import json
import os
import platform
import time
import warnings
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import real_tasks
import torch
from mudata import MuData
from scipy import stats
from sklearn.metrics import f1_score

import anvi as av

TEST = 0.4
"""Share of the cells that are scored."""
MOST = 1_200
"""Cells of PBMC that take part, drawn anew for every seed; `--cells` takes others."""
real_tasks.N_GENES = 500  # `--genes` takes others
LINEAGES = {
    "pbmc": {
        "T": ["CD4 Naive", "CD4 Memory", "CD8 Naive", "CD8 Memory", "MAIT", "Treg", "gdT"],
        "B": ["B Naive", "B Memory"],
        "NK": ["NK"],
        "monocyte": ["CD14 Mono", "CD16 Mono"],
        "DC": ["cDC", "pDC"],
    },
    "mosaic": {"T": ["CD4 T", "CD8 T", "other T"], "myeloid": ["Mono", "DC"]},
}
ARMS = ("levels", "thrown away", "all fine")
PROMISES = (0.8, 0.9, 0.95)


def read(name: str, seed: int) -> tuple[MuData, pd.Series, pd.Series]:
    """Cells of a data set, their fine and their coarse type."""
    rng = np.random.default_rng(seed)
    if name == "simulated":
        mdata = av.datasets.synthetic_cite(1_200, n_genes=200, n_classes=12, random_state=seed)
        fine = mdata.obs["true_cell_type"].astype(str)
        groups = {f"group {i}": list(part) for i, part in enumerate(np.array_split(sorted(set(fine)), 4))}
    else:
        file = {"pbmc": "pbmc_citeseq", "mosaic": "mosaic_224"}[name]
        mdata = mudata.read_h5mu(Path(os.environ["ANVI_DATA_DIR"]) / f"{file}.h5mu")
        fine, groups = mdata.obs["celltype" if name == "mosaic" else "cell_type"].astype(str), LINEAGES[name]
        if name == "mosaic":
            mdata = MuData(
                {"rna": mdata["rna"], "prot": mdata["adt"][mdata["adt"].obs_names.isin(mdata["rna"].obs_names)]}
            )
            mdata.obs["batch"] = mdata["rna"].obs["batch"].reindex(mdata.obs_names)
        known = mdata.obs_names[~fine.reindex(mdata.obs_names).isin(["Unknown", "nan"])]
        if name == "pbmc":
            known = known[np.sort(rng.permutation(len(known))[:MOST])]
        mdata = mdata[known].copy()
        rna = mdata["rna"]
        mdata = MuData({"rna": rna[:, real_tasks.variable(rna)].copy(), "prot": mdata["prot"].copy()})[known].copy()
        source = mudata.read_h5mu(Path(os.environ["ANVI_DATA_DIR"]) / f"{file}.h5mu").obs
        mdata.obs["batch"] = source["batch"].reindex(known).astype(str)
    fine = fine.reindex(mdata.obs_names)
    above = {child: parent for parent, children in groups.items() for child in children}
    return mdata, fine, fine.map(lambda value: above.get(value, value))


def fit(mdata: MuData, labels_key, seed: int, options: dict) -> float:
    """One fit; the seconds that it took. The slots are called the same whichever model it is."""
    method, options = options["method"], {name: value for name, value in options.items() if name != "method"}
    begun = time.perf_counter()
    places = {"batch_key": "batch", "key_added": "fit"}
    # a fifth is held out: with a tenth, 30 % of the labels of so few cells are too few to promise anything by
    getattr(av.tl, method)(mdata, labels_key, random_state=seed, train_size=0.8, **places, **options)
    return time.perf_counter() - begun


def obs_of(mdata: MuData, slot: str) -> pd.Series:
    """A column that a fit or a query wrote."""
    part = mdata if slot in mdata.obs else mdata["rna"]
    column = part.obs[slot].reindex(mdata.obs_names)
    return column if pd.api.types.is_numeric_dtype(column) else column.astype(str)


def score(truth: pd.Series, predicted: pd.Series) -> dict[str, float]:
    truth, predicted = truth.to_numpy(str), predicted.to_numpy(str)
    f1 = f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0)
    return {"accuracy": float((truth == predicted).mean()), "macro_f1": float(f1)}


def errors(mdata: MuData, cells, fine: pd.Series, coarse: pd.Series) -> dict[str, float]:
    """Shares of wrong labels, of labels at each level, and of none, at each promise."""
    found = {}
    for promise in PROMISES:
        av.tl.predict(mdata, confidence=promise)
        label = obs_of(mdata, "fit_label")[cells]
        table = av.get.model(mdata).setup.levels.table
        none, at_fine = (label == "Unassigned").to_numpy(), label.isin(table[-1]).to_numpy()
        right = np.where(at_fine, label == fine[cells], label == coarse[cells])
        found[f"error at {promise}"] = float((~right[~none]).mean())
        found[f"error of fine at {promise}"] = float((~right[at_fine]).mean())
        at_coarse = ~none & ~at_fine
        found[f"error of coarse at {promise}"] = float((~right[at_coarse]).mean()) if at_coarse.any() else float("nan")
        found |= {f"fine at {promise}": float(at_fine.mean()), f"coarse at {promise}": float(at_coarse.mean())}
    return found


def coarse_labels(name: str, share: float, seed: int, options: dict) -> list[dict]:
    """The three arms on one data set."""
    mdata, fine, coarse = read(name, seed)
    rng = np.random.default_rng(100 + seed)
    test = rng.random(mdata.n_obs) < TEST
    only_coarse = ~test & (rng.random(mdata.n_obs) < share)
    for value in fine.unique():  # a type needs some fine label to be known at all
        there = np.flatnonzero((fine == value).to_numpy() & ~test)
        if len(there) and only_coarse[there].all():
            only_coarse[there[:2]] = False
    rows = []
    for arm in ARMS:
        mdata.obs["lineage"] = coarse.where(~test)
        mdata.obs["subtype"] = fine.where(~test & ((arm == "all fine") | ~only_coarse))
        seconds = fit(mdata, ["lineage", "subtype"] if arm == "levels" else "subtype", seed, options)
        predicted = obs_of(mdata, "fit_prediction")
        label = obs_of(mdata, "fit_label")
        row = {"arm": arm, "seconds": seconds, "epochs": len(av.get.history(mdata))}
        row |= {
            "n_fine": int((~test & ~only_coarse).sum()),
            "n_coarse": int(only_coarse.sum()),
            "n_test": int(test.sum()),
        }
        row |= score(fine[test], predicted[test])
        up = dict(zip(fine, coarse, strict=True))
        row["accuracy_coarse"] = float((predicted[test].map(up) == coarse[test]).mean())
        if arm != "all fine":  # cells that have a coarse label: what the fit makes of them
            av.tl.predict(mdata, false_rejects=0)
            label = obs_of(mdata, "fit_label")
            row["accuracy_refined"] = float((label == fine)[only_coarse].mean())
        if arm == "levels":
            row["accuracy_coarse"] = float((obs_of(mdata, "fit_prediction_lineage") == coarse)[test].mean())
            if av.get.model(mdata).landmarks is not None:  # enough held-out labels to promise by
                row |= errors(mdata, mdata.obs_names[test], fine, coarse)
        rows.append(row)
    return rows


def two_references(seed: int, options: dict) -> list[dict]:
    """One reference with fine T cells, one with fine B cells, both without the other; a third part is the query."""
    mdata, fine, coarse = read("pbmc", seed)
    part = np.random.default_rng(200 + seed).permutation(mdata.n_obs) % 3
    mdata.obs["batch"] = np.array(["one", "other", "query"])[part]
    hidden = ((part == 0) & (coarse == "B")) | ((part == 1) & (coarse == "T"))
    rows = []
    for arm, keep in (("both", part >= 0), ("fine T alone", part != 1), ("fine B alone", part != 0)):
        some = mdata[mdata.obs_names[keep]].copy()
        query = (some.obs["batch"] == "query").to_numpy()
        some.obs["lineage"] = coarse[keep].where(~query)
        some.obs["subtype"] = fine[keep].where(~query & ~hidden.to_numpy()[keep])
        seconds = fit(some, ["lineage", "subtype"], seed, options)
        truth, predicted = fine[keep][query], obs_of(some, "fit_prediction")[query]
        row = {"arm": arm, "seconds": seconds} | score(truth, predicted)
        for lineage in ("T", "B"):
            inside = (coarse[keep][query] == lineage).to_numpy()
            row[f"accuracy of {lineage}"] = float((truth == predicted)[inside].mean())
        rows.append(row)
    return rows


def across_samples(seed: int, options: dict) -> list[dict]:
    """A reference of one sample, 70 % of its fine labels coarse; other samples are mapped, and labels promised."""
    mdata, fine, coarse = read("mosaic", seed)
    batch = mdata.obs["batch"].to_numpy(str)
    reference = mdata[mdata.obs_names[batch == "p4_0"]].copy()
    names = reference.obs_names
    rng = np.random.default_rng(300 + seed)
    reference.obs["lineage"] = coarse[names]
    reference.obs["subtype"] = fine[names].where(rng.random(len(names)) < 0.3)
    fit(reference, ["lineage", "subtype"], seed, options)
    rows = []
    for sample in ("p3_0", "p1_0"):
        query = mdata[mdata.obs_names[batch == sample]].copy()
        av.tl.map_query(query, reference, random_state=seed)
        cells = query.obs_names
        row = {"arm": sample} | score(fine[cells], obs_of(query, "fit_prediction"))
        row["accuracy_coarse"] = float((obs_of(query, "fit_prediction_lineage") == coarse[cells]).mean())
        rows.append(row | errors(query, cells, fine, coarse))
    return rows


def unknown(left_out: str, seed: int, options: dict) -> list[dict]:
    """Cells of a type, or of a whole lineage, that has no label: what they and the others are called."""
    mdata, fine, coarse = read("pbmc", seed)
    test = np.random.default_rng(400 + seed).random(mdata.n_obs) < TEST
    new = ((fine == left_out) | (coarse == left_out)).to_numpy()
    kept = test | ~new  # the reference has none of them
    mdata = mdata[mdata.obs_names[kept]].copy()
    fine, coarse, new, test = (part[kept] for part in (fine, coarse, new, test))
    mdata.obs["lineage"], mdata.obs["subtype"] = coarse.where(~test & ~new), fine.where(~test & ~new)
    fit(mdata, ["lineage", "subtype"], seed, options)
    label = obs_of(mdata, "fit_label")
    rows = []
    for arm, cells in ((f"{left_out}, new", new), ("known", test & ~new)):
        at = label[cells]
        row = {"arm": arm, "cells": int(cells.sum()), "unassigned": float((at == "Unassigned").mean())}
        row["lineage alone, right"] = float((at == coarse[cells]).mean() if set(at) else 0)
        row["fine, right"] = float((at == fine[cells]).mean())
        row["lineage alone, wrong"] = float((at.isin(set(coarse) - set(fine)) & (at != coarse[cells])).mean())
        for level in ("", "_lineage"):
            row[f"novel{level}"] = float((obs_of(mdata, f"fit_novelty{level}")[cells] > 1).mean())
        rows.append(row)
    return rows


TASKS = {
    "pbmc, 70 %": lambda seed, options: coarse_labels("pbmc", 0.7, seed, options),
    "pbmc, 97 %": lambda seed, options: coarse_labels("pbmc", 0.97, seed, options),
    "simulated, 70 %": lambda seed, options: coarse_labels("simulated", 0.7, seed, options),
    "mosaic, 70 %": lambda seed, options: coarse_labels("mosaic", 0.7, seed, options),
    "two references": two_references,
    "across samples": across_samples,
    "without Treg": lambda seed, options: unknown("Treg", seed, options),
    "without MAIT": lambda seed, options: unknown("MAIT", seed, options),
    "without B": lambda seed, options: unknown("B", seed, options),
}


def summary(rows: list[dict]) -> list[str]:
    """Means over seeds, and differences to "thrown away" with their intervals."""
    table, lines = pd.DataFrame(rows), []
    for task, part in table.groupby("task", sort=False):
        numbers = part.drop(columns=["task"]).groupby("arm", sort=False).mean(numeric_only=True).drop(columns="seed")
        lines.append(
            f"{task} ({part['seed'].nunique()} seeds)\n{numbers.dropna(axis=1, how='all').round(3).T.to_string()}"
        )
        if "thrown away" not in set(part["arm"]):
            continue
        for measure in ("accuracy", "macro_f1", "accuracy_coarse", "accuracy_refined"):
            wide = part.pivot(index="seed", columns="arm", values=measure)
            for arm in ("levels", "all fine"):
                gain = (wide[arm] - wide["thrown away"]).dropna()
                if len(gain) < 2:
                    continue
                half = stats.t.ppf(0.975, len(gain) - 1) * gain.std() / np.sqrt(len(gain))
                lines.append(f"  {measure}: {arm} - thrown away = {gain.mean():+.4f} ± {half:.4f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=";".join(TASKS), help="names separated by ';'")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--method", choices=("scanvi", "totalanvi"), default="scanvi")
    parser.add_argument("--max-epochs", type=int, default=None)
    parser.add_argument("--cells", type=int, default=MOST)
    parser.add_argument("--genes", type=int, default=real_tasks.N_GENES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    globals()["MOST"], real_tasks.N_GENES = given.cells, given.genes
    warnings.filterwarnings("ignore")
    av.settings.progress, av.settings.verbosity = False, 0
    torch.set_num_threads(1)
    av.settings.n_threads = 1
    options: dict = {"method": given.method, "device": given.device} | (
        {} if given.max_epochs is None else {"max_epochs": given.max_epochs}
    )
    rows = []
    if given.out is not None and given.out.exists():
        rows = json.loads(given.out.read_text())["rows"]
    done = {(row["task"], row["seed"]) for row in rows}
    for seed in range(given.seeds):
        for task in given.tasks.split(";"):
            if (task, seed) in done:
                continue
            found = [{"task": task, "seed": seed} | row for row in TASKS[task](seed, options)]
            rows += found
            for row in found:
                print(
                    {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()},
                    flush=True,
                )
            if given.out is not None:
                machine = {"device": given.device, "machine": platform.machine(), "anvi": av.__version__}
                given.out.write_text(json.dumps({"options": options, "about": machine, "rows": rows}, indent=1))
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
