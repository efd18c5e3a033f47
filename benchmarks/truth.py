"""What a fit to simulated cells recovers of their truth; each figure beside the same with the truth shuffled.

    python benchmarks/truth.py --cells 2000 --genes 60

totalVI with default settings. Printed as a table; JSON with `--out`.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from mudata import MuData
from sklearn.metrics import roc_auc_score

import anvi as av

MIN_CORRELATION = 0.25  # of the truth: weaker ones have no clear sign


def median_correlation(found: np.ndarray, true: np.ndarray) -> float:
    """Median over features of the correlation of logarithms; `(cells, features)` each."""
    pairs = zip(np.log1p(found).T, np.log1p(true).T, strict=True)
    return float(np.median([np.corrcoef(a, b)[0, 1] for a, b in pairs if a.std() > 0 and b.std() > 0]))


def expression(mdata: MuData, hidden: np.ndarray, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Denoised genes, and proteins of cells with (`~hidden`) and without them."""
    av.tl.denoise(mdata, library_size="observed", include_background=True)
    genes, rate = mdata["rna"].layers["totalvi_denoised"], mdata["rna"].layers["true_rate"]
    counts = mdata["rna"].X.toarray()
    found = {
        "genes, denoised": (median_correlation(genes, rate), median_correlation(rng.permutation(genes), rate)),
        "genes, raw counts": (median_correlation(counts, rate), median_correlation(rng.permutation(counts), rate)),
    }
    proteins, truth = (av.get.table(mdata, name).to_numpy() for name in ("totalvi_prot_denoised", "true_protein_rate"))
    for name, cells in (("stained", ~hidden), ("not stained", hidden)):
        shuffled = median_correlation(rng.permutation(proteins[cells]), truth[cells])
        found[f"proteins, {name}"] = (median_correlation(proteins[cells], truth[cells]), shuffled)
    return found


def foreground(mdata: MuData, hidden: np.ndarray, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Area under the ROC of the foreground of marker proteins, mean over proteins."""
    av.tl.foreground(mdata)
    markers = mdata["prot"].var_names[mdata["prot"].varm["true_markers"].any(axis=1)]
    score, truth = (
        av.get.table(mdata, "totalvi_prot_foreground")[markers],
        av.get.table(mdata, "true_foreground")[markers],
    )
    found = {}
    for name, cells in (("stained", ~hidden), ("not stained", hidden)):
        true, called = truth[cells].to_numpy(), score[cells].to_numpy()
        areas = [roc_auc_score(a, b) for a, b in zip(true.T, called.T, strict=True)]
        chance = [roc_auc_score(rng.permutation(a), b) for a, b in zip(true.T, called.T, strict=True)]
        found[f"foreground AUROC, {name}"] = (float(np.mean(areas)), float(np.mean(chance)))
    return found


def signs(mdata: MuData, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Share of the clear correlations of marker genes and proteins that have the right sign."""
    genes, proteins = (list(part.var_names[part.varm["true_markers"].any(axis=1)]) for part in mdata.mod.values())
    rates = pd.DataFrame(mdata["rna"].layers["true_scale"], mdata.obs_names, mdata["rna"].var_names)[genes]
    true = pd.concat([rates, av.get.table(mdata, "true_protein_rate")[proteins]], axis=1).corr("spearman").to_numpy()
    found = av.tl.feature_correlation(mdata, features=genes + proteins, n_samples=5).values
    pairs = np.triu_indices(len(true), 1)
    true, found = true[pairs], found[pairs]
    clear = np.abs(true) > MIN_CORRELATION
    right = [float((np.sign(one) == np.sign(true))[clear].mean()) for one in (found, rng.permutation(found))]
    return {"clear correlations of the right sign": tuple(right)}


def moments(mdata: MuData, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Mean and variance of drawn counts over those of the data, median over features; and of shuffled features."""
    drawn = av.tl.posterior_predictive(mdata, n_samples=10)
    x = mdata["rna"].X.toarray()
    seen = x.mean(0) > 0.5  # of rarer genes, chance decides
    y = mdata["prot"].to_df()
    proteins = drawn["prot"].sel(obs=y.index.to_numpy(dtype=str)).where(np.isfinite(y.to_numpy()))
    sides = {
        "mean of genes": (drawn["rna"].mean(["sample", "obs"]).values[seen], x.mean(0)[seen]),
        "variance of genes": (drawn["rna"].var("obs").mean("sample").values[seen], x.var(0)[seen]),
        "mean of proteins": (proteins.mean(["sample", "obs"]).values, y.mean().to_numpy()),
        "variance of proteins": (proteins.var("obs").mean("sample").values, y.var(ddof=0).to_numpy()),
    }
    return {
        f"drawn / measured, {name}": (float(np.median(a / b)), float(np.median(rng.permutation(a) / b)))
        for name, (a, b) in sides.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=2_000)
    parser.add_argument("--genes", type=int, default=60)
    parser.add_argument("--max-epochs", type=int, help="default: what a fit chooses")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    av.settings.progress = False
    av.settings.verbosity = 0
    mdata = av.datasets.synthetic_cite(options.cells, n_genes=options.genes)
    av.tl.totalvi(mdata, batch_key="batch", panel_key="panel", max_epochs=options.max_epochs)
    rng, hidden = np.random.default_rng(0), ~mdata.obs_names.isin(mdata["prot"].obs_names)
    found = expression(mdata, hidden, rng) | foreground(mdata, hidden, rng) | signs(mdata, rng) | moments(mdata, rng)
    for name, (value, shuffled) in found.items():
        print(f"{name:40s} {value:6.2f}   shuffled {shuffled:6.2f}")
    if options.out:
        epochs = mdata.uns["totalvi"]["params"]["epochs"]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"command": " ".join(sys.argv), "epochs": epochs, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
