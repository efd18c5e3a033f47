"""anvi beside scmidas on its own example: four samples, 500 genes and 224 proteins, some cells without either.

    ANVI_DATA_DIR=... python benchmarks/vs_midas.py --midas-python PATH --seeds 5 --out benchmarks/results/vs_midas.json

The example of scmidas (`mosaic_224.h5mu`) has a sample with RNA alone, one with proteins alone, and two with both. To
know the truth of what is imputed, the second of these is shown as two batches: half of its cells lose their proteins,
the others their RNA. Only the first has labels. Both sides are fitted to all cells by their defaults
(`scmidas.integrate`, also with more epochs, for it calls its 65 a choice for a minute's demonstration). scmidas, which
knows no labels, is asked for its latent space; so labels are those of the 15 nearest labelled cells on both sides;
`totalvi` has not seen them either. scmidas pins older libraries: PATH is the interpreter of an environment of its own;
this script is its client there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mudata
import numpy as np

PAIRED, SPLIT = "p3_0", "p4_0"
K = 15


def pose(folder: Path, seed: int) -> mudata.MuData:
    """The example with the cells of one sample divided between the modalities; the truth is with the caller."""
    from anndata import AnnData

    shipped = mudata.read_h5mu(folder / "mosaic_224.h5mu")
    rna, adt = shipped["rna"], shipped["adt"]
    cells = rna.obs_names[rna.obs["batch"] == SPLIT]
    half = np.random.default_rng(seed).permutation(len(cells)) < len(cells) // 2
    parts = {}
    for name, part, lost in (("rna", rna, cells[half]), ("adt", adt, cells[~half])):
        part = part[~part.obs_names.isin(lost)]
        batch = part.obs["batch"].astype(str).where(~part.obs_names.isin(cells), f"{SPLIT}_{name}")
        parts[name] = AnnData(part.X.copy(), part.obs[[]].assign(batch=batch.to_numpy()), part.var[[]])
    mdata = mudata.MuData(parts)
    of_all = [parts[name].obs["batch"] for name in parts]
    mdata.obs["batch"] = of_all[0].reindex(mdata.obs_names).fillna(of_all[1].reindex(mdata.obs_names)).to_numpy()
    labels = shipped.obs["celltype"].astype(str).reindex(mdata.obs_names)
    mdata.obs["label"] = labels.where(mdata.obs["batch"] == PAIRED, "Unknown").to_numpy()
    return mdata


def answer_midas(path: Path, out: Path, seed: int, epochs: int) -> None:
    """Runs in the other environment: latent space and imputed values of every cell."""
    import scmidas

    mdata, begun = mudata.read_h5mu(path), time.process_time()
    with tempfile.TemporaryDirectory() as models:
        model = scmidas.integrate(mdata, seed=seed, max_epochs=epochs, accelerator="cpu", save_model_path=models)
    seconds = time.process_time() - begun
    values = {name: model.get_imputed_values(modality=name) for name in ("rna", "adt")}
    np.savez(out, latent=mdata.obsm["X_midas"], cells=mdata.obs_names.to_numpy(str), seconds=seconds, **values)


def answer_anvi(mdata: mudata.MuData, model: str, seed: int) -> dict:
    """The same of a default fit of anvi."""
    import anvi as av

    begun, keys = time.process_time(), {"batch_key": "batch", "random_state": seed}
    if model == "totalanvi":
        av.tl.totalanvi(mdata, "label", prot_mod="adt", **keys)
    else:
        av.tl.totalvi(mdata, prot_mod="adt", **keys)
    seconds = time.process_time() - begun
    found = av.tl.denoise(mdata, model=model, include_background=True, inplace=False)
    values = {name: found[name].to_pandas()[mdata[name].var_names].to_numpy() for name in ("rna", "adt")}
    return {"latent": np.asarray(mdata.obsm[f"X_{model}"]), "seconds": seconds, **values}


def score(shipped: mudata.MuData, mdata: mudata.MuData, answer: dict) -> dict[str, float]:
    """Labels by neighbours in every sample without labels, imputed values of the divided sample, mixing of batches."""
    from real_tasks import correlation
    from scipy.stats import rankdata
    from sklearn.metrics import f1_score
    from sklearn.neighbors import KNeighborsClassifier
    from transfer import mixing

    batch, truth = mdata.obs["batch"].to_numpy(), shipped.obs["celltype"].astype(str)[mdata.obs_names].to_numpy()
    latent, known = answer["latent"], batch == PAIRED
    neighbours = KNeighborsClassifier(K).fit(latent[known], truth[known])
    scores = {"seconds": float(answer["seconds"])}
    for name, rows in (("rna alone", ("p1_0", f"{SPLIT}_rna")), ("proteins alone", ("p2_0", f"{SPLIT}_adt"))):
        at = np.isin(batch, rows)
        guess = neighbours.predict(latent[at])
        scores[f"accuracy, {name}"] = float((guess == truth[at]).mean())
        scores[f"macro_f1, {name}"] = float(f1_score(truth[at], guess, average="macro", labels=np.unique(truth[at])))
    for name, rows in (("adt", f"{SPLIT}_rna"), ("rna", f"{SPLIT}_adt")):
        at = batch == rows
        real = shipped[name][mdata.obs_names[at]].X
        real = np.asarray(real.todense() if hasattr(real, "todense") else real, dtype=float)
        guess = np.clip(answer[name][at], 0, None)
        if name == "rna":  # shares of a cell, for one side imputes counts and the other shares
            real, guess = (1e4 * values / values.sum(1, keepdims=True) for values in (real, guess))
        pairs = [(a, b) for a, b in zip(np.log1p(real).T, np.log1p(guess).T, strict=True) if a.std() > 0]
        scores[f"pearson, {name}"] = float(np.mean([correlation(a, b) for a, b in pairs]))
        scores[f"spearman, {name}"] = float(np.mean([correlation(rankdata(a), rankdata(b)) for a, b in pairs]))
    for name in np.unique(batch):
        scores[f"mixing, {name}"] = mixing(latent, batch == name)
    scores["mixing"] = float(np.mean([scores.pop(f"mixing, {name}") for name in np.unique(batch)]))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--midas-python", help="interpreter of an environment with scmidas")
    parser.add_argument("--epochs", default="65,1000", help="of scmidas, separated by ','")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)  # file, answers, seed, epochs
    arguments = parser.parse_args()
    if arguments.client:
        path, out, seed, epochs = arguments.client
        return answer_midas(Path(path), Path(out), int(seed), int(epochs))
    import pandas as pd

    import anvi as av

    av.settings.progress = False
    folder = Path(os.environ["ANVI_DATA_DIR"])
    shipped, rows = mudata.read_h5mu(folder / "mosaic_224.h5mu"), []
    for seed in range(arguments.seeds):
        mdata, answers = pose(folder, seed), {}
        with tempfile.TemporaryDirectory() as parts:
            mdata.write(Path(parts) / "cells.h5mu")
            for epochs in arguments.epochs.split(",") if arguments.midas_python else ():
                command = [arguments.midas_python, __file__, "--client", "cells.h5mu", "answer.npz", str(seed), epochs]
                subprocess.run(command, check=True, cwd=parts, stdout=subprocess.DEVNULL)
                with np.load(Path(parts) / "answer.npz") as found:
                    order = pd.Index(found["cells"]).get_indexer(mdata.obs_names)
                    whole = {name: found[name][order] for name in ("latent", "rna", "adt")}
                    answers[f"scmidas, {epochs} epochs"] = whole | {"seconds": found["seconds"]}
        answers |= {f"anvi {name}": answer_anvi(mdata.copy(), name, seed) for name in ("totalvi", "totalanvi")}
        for method, answer in answers.items():
            rows.append({"seed": seed, "method": method, **score(shipped, mdata, answer)})
            print(json.dumps(rows[-1]), flush=True)
        if arguments.out is not None:
            facts = {"command": " ".join(["python", *sys.argv]), "anvi": av.__version__}
            arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    table = pd.DataFrame(rows).drop(columns="seed").groupby("method", sort=False).agg(["mean", "std"]).T
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
