"""Imputed proteins against counts that were held back, beside nearest neighbours; and foreground where it belongs.

From `datasets.pbmc_cite()`, the proteins of a random third of the stained cells are removed, with their labels (these
would tell of the proteins). Models are fitted with default settings to what is left; `tl.denoise` imputes the held-back
cells, and every protein's imputed values are correlated with its counts across these cells. Beside it: the mean of the
log1p counts of the nearest stained cells by principal components of RNA (scanpy's usual steps), and, as a control, the
model's own values in shuffled order. Last, `tl.foreground` of three lineage markers in the cell types where they belong
and where they do not, in stained and in held-back cells::

    ANVI_DATA_DIR=... python benchmarks/imputation.py --out benchmarks/results/imputation_pbmc.json
"""

import argparse
import json
import platform
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

import anvi as av

LABELS, UNLABELED, BATCH = "cell_type", "Unknown", "batch"
N_NEIGHBORS, N_COMPONENTS = 15, 50
T_CELLS = ("CD4 Naive", "CD4 Memory", "CD8 Naive", "CD8 Memory", "Treg", "MAIT", "gdT")
MARKERS = {  # where each belongs, and types that are counted on neither side
    "CD14": (("CD14 Mono",), ("CD16 Mono", "cDC")),
    "CD3": (T_CELLS, ()),
    "CD19": (("B Naive", "B Memory"), ()),
}


def held_back(mdata: mudata.MuData, seed: int) -> tuple[mudata.MuData, pd.Index]:
    """The same object without proteins and labels of a random third of its stained cells; and their names."""
    stained = mdata["prot"].obs_names
    hidden = stained[np.random.default_rng(seed).permutation(len(stained)) < len(stained) // 3]
    out = mudata.MuData({"rna": mdata["rna"].copy(), "prot": mdata["prot"][~stained.isin(hidden)].copy()})
    out.obs[BATCH] = mdata.obs[BATCH].reindex(out.obs_names)
    labels = mdata.obs[LABELS].reindex(out.obs_names)
    out.obs[LABELS] = labels.mask(labels.index.isin(hidden), UNLABELED)
    return out, hidden


def neighbours(mdata: mudata.MuData, hidden: pd.Index) -> pd.DataFrame:
    """Mean log1p counts of the nearest stained cells by principal components of RNA `(held back, proteins)`."""
    import scanpy as sc
    from sklearn.neighbors import KNeighborsRegressor

    stained = mdata["prot"].obs_names
    rna = mdata["rna"][stained.union(hidden)].copy()  # of one batch: what is asked of it is easy
    sc.pp.normalize_total(rna)
    sc.pp.log1p(rna)
    sc.pp.highly_variable_genes(rna, n_top_genes=min(2_000, rna.n_vars))
    rna = rna[:, rna.var["highly_variable"]].copy()
    sc.pp.scale(rna, max_value=10)
    sc.pp.pca(rna, n_comps=N_COMPONENTS)
    place = pd.DataFrame(rna.obsm["X_pca"], rna.obs_names)
    counts = np.log1p(mdata["prot"].to_df())
    found = KNeighborsRegressor(N_NEIGHBORS).fit(place.loc[stained], counts).predict(place.loc[hidden])
    return pd.DataFrame(found, hidden, counts.columns)


def scores(found: pd.DataFrame, truth: pd.DataFrame) -> dict:
    """Correlations of every protein across cells: Pearson's of log1p values, Spearman's."""
    by_protein = {
        name: {
            "pearson": float(np.corrcoef(found[name], truth[name])[0, 1]),
            "spearman": float(spearmanr(found[name], truth[name]).statistic),
        }
        for name in truth
    }
    table = pd.DataFrame(by_protein)
    return {"mean": table.mean(axis=1).to_dict(), "by_protein": by_protein}


def where_it_belongs(probability: pd.DataFrame, labels: pd.Series) -> dict:
    """Mean foreground probability of each marker in the types where it belongs and where it does not."""
    out = {}
    for marker, (belongs, either) in MARKERS.items():
        inside = labels.isin(belongs)
        outside = ~inside & ~labels.isin([*either, UNLABELED])
        by_type = probability[marker].groupby(labels.astype(str)).mean()
        out[marker] = {
            "belongs": float(probability[marker][inside].mean()),
            "elsewhere": float(probability[marker][outside].mean()),
            "by_type": by_type.round(4).to_dict(),
        }
    return out


def ask(mdata: mudata.MuData, name: str, hidden: pd.Index, truth: pd.DataFrame, labels: pd.Series, options) -> dict:
    """Fit one model to what is left and score it; prints as it goes."""
    begun = time.perf_counter()
    fit = getattr(av.tl, name)
    fit(mdata, batch_key=BATCH, max_epochs=options.max_epochs, random_state=options.seed, device=options.device)
    seconds, epochs = time.perf_counter() - begun, len(av.get.history(mdata, model=name))
    print(f"{name}: {epochs} epochs, {seconds:.0f} s")
    asked = {"model": name, "modality": "prot", "inplace": False, "device": options.device}
    tables = {}
    for what, background in ((name, True), (f"{name}, foreground alone", False)):
        found = av.tl.denoise(mdata, include_background=background, **asked)["prot"]
        tables[what] = np.log1p(found.to_pandas().loc[hidden, truth.columns])
    shuffled = np.random.default_rng(options.seed).permutation(len(hidden))
    tables[f"{name}, shuffled"] = tables[name].iloc[shuffled].set_axis(hidden)
    rows = {what: scores(table, truth) for what, table in tables.items()}
    for what, row in rows.items():
        tell(what, row)
    probability = av.tl.foreground(mdata, model=name, inplace=False, device=options.device)
    stained = mdata["prot"].obs_names
    markers = {
        which: where_it_belongs(probability.loc[cells], labels.loc[cells])
        for which, cells in (("stained", stained), ("held back", hidden))
    }
    for which, found in markers.items():
        line = ", ".join(f"{m} {row['belongs']:.2f} (elsewhere {row['elsewhere']:.3f})" for m, row in found.items())
        print(f"  foreground, {which:9s}  {line}", flush=True)
    return {"epochs": epochs, "seconds": round(seconds, 1), "imputation": rows, "foreground": markers}


def tell(what: str, row: dict) -> None:
    """Means over proteins, in one line."""
    mean = row["mean"]
    print(f"  {what:32s} Pearson of log1p {mean['pearson']:.3f}   Spearman {mean['spearman']:.3f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="pbmc_citeseq.h5mu or its folder; default: ANVI_DATA_DIR")
    parser.add_argument("--models", nargs="+", choices=("totalanvi", "totalvi"), default=["totalanvi"])
    parser.add_argument("--max-epochs", type=int, help="default: what a fit chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    av.settings.verbosity = 0
    whole = av.datasets.pbmc_cite(options.data)
    mdata, hidden = held_back(whole, options.seed)
    truth = np.log1p(whole["prot"].to_df().loc[hidden])
    print(f"proteins of {len(hidden)} of {whole['prot'].n_obs} stained cells held back")
    beside = scores(neighbours(mdata, hidden), truth)
    tell(f"{N_NEIGHBORS} neighbours on {N_COMPONENTS} PCs", beside)
    torch.set_num_threads(options.threads)  # now: importing scanpy has set it
    models = {name: ask(mdata, name, hidden, truth, whole.obs[LABELS], options) for name in options.models}
    if options.out is not None:
        result = {
            "options": {name: getattr(options, name) for name in ("models", "max_epochs", "seed", "device", "threads")},
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("anvi", "torch", "scanpy", "scikit-learn")},
            "held_back": len(hidden),
            "neighbours": beside,
            "models": models,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
