"""A million cells from the command line: memory and time of `python -m anvi fit` on a file that stays where it is.

    python benchmarks/large.py --cells 1000000 --folder large
    python benchmarks/large.py --cells 1000000 --folder large --ask      questions to the file that this has written

Simulated CITE-seq, 2,000 genes and 50 proteins, three batches with an antibody panel each, 20 cell types of which 70 %
of the cells are labelled, goes to a gzip-compressed .h5mu in blocks; a fresh process fits TotalANVI for one epoch.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

GENES, PROTEINS, CLASSES, BLOCK = 2_000, 50, 20, 5_000
PANELS = {"full": range(50), "first": range(35), "last": range(15, 50)}  # proteins that each batch was stained for


def write_cells(path: Path, n: int) -> float:
    """Write so many simulated cells; returns non-zero counts per cell."""
    import anndata
    import h5py
    import mudata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(0)
    log_profile = rng.normal(0, 1.5, GENES) + rng.normal(0, 0.7, (CLASSES, GENES)) * (
        rng.random((CLASSES, GENES)) < 0.2
    )
    profile = np.exp(log_profile) / np.exp(log_profile).sum(1, keepdims=True)
    positive = rng.random((CLASSES, PROTEINS)) < 0.3
    truth, batch = rng.integers(CLASSES, size=n), rng.integers(len(PANELS), size=n)
    names = np.array([f"type {i}" for i in range(CLASSES)])
    labels = pd.Series(pd.Categorical.from_codes(np.where(rng.random(n) < 0.7, truth, CLASSES), [*names, "Unknown"]))
    obs = pd.DataFrame(
        {
            "cell_type": labels.array,
            "true_cell_type": pd.Categorical.from_codes(truth, names),
            "batch": pd.Categorical.from_codes(batch, list(PANELS)),
        },
        index=[f"cell {i}" for i in range(n)],
    )
    rna = anndata.AnnData(sparse.csr_matrix((n, GENES), dtype=np.float32), obs=obs[[]].copy())
    prot = anndata.AnnData(sparse.csr_matrix((n, PROTEINS), dtype=np.float32), obs=obs[[]].copy())
    rna.var_names, prot.var_names = [f"gene {i}" for i in range(GENES)], [f"protein {i}" for i in range(PROTEINS)]
    mdata = mudata.MuData({"rna": rna, "prot": prot})
    mdata.obs = obs
    mdata.write_h5mu(path)
    del mdata, rna, prot
    stained = np.zeros((len(PANELS), PROTEINS), dtype=bool)
    for row, proteins in enumerate(PANELS.values()):
        stained[row, list(proteins)] = True
    options = {"compression": "gzip", "compression_opts": 4, "chunks": (65_536,), "maxshape": (None,)}
    with h5py.File(path, "r+") as file:
        x = file["mod/rna/X"]
        del x["data"], x["indices"], x["indptr"], file["mod/prot/X"]
        values = x.create_dataset("data", (0,), "f4", **options)
        columns = x.create_dataset("indices", (0,), "i4", **options)
        y = file["mod/prot"].create_dataset(
            "X", (n, PROTEINS), "f4", chunks=(min(n, BLOCK), PROTEINS), compression="gzip"
        )
        y.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        lengths = []
        for start in range(0, n, BLOCK):
            of, kit = truth[start : start + BLOCK], batch[start : start + BLOCK]
            depth = 450 * np.exp(rng.normal(0, 0.3, (len(of), 1)))
            counts = sparse.csr_matrix(rng.poisson(depth * profile[of]).astype(np.float32))
            counts[counts.getnnz(1) == 0, 0] = 1
            lengths.append(counts.getnnz(1))
            for dataset, part in ((values, counts.data), (columns, counts.indices)):
                dataset.resize(len(dataset) + len(part), axis=0)
                dataset[-len(part) :] = part
            level = rng.poisson(np.where(positive[of], 60.0, 4.0) * np.exp(rng.normal(0, 0.3, (len(of), 1))))
            y[start : start + BLOCK] = level * stained[kit]
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        x.create_dataset("indptr", data=indptr.astype(np.int64))
    return float(indptr[-1] / n)


def fit(path: Path, out: Path, options: list[str]) -> dict:
    """Run the command in a process of its own; its peak memory, and when it said what."""
    command = [sys.executable, "-m", "anvi", "fit", str(path), str(out), "--overwrite", "--batch-key", "batch"]
    command += ["--max-epochs", "1", *options]
    begun, peak, said = time.monotonic(), 0.0, []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})

    def watch() -> None:
        nonlocal peak
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = status.read_text().partition("VmHWM:")[2].split()
            peak = max(peak, int(found[0]) * 1_024 / 1e9) if found else peak
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for line in process.stderr:
        said.append((time.monotonic() - begun, line.strip()))
        print(f"{said[-1][0]:7.1f} s  {peak:5.2f} GB  {line.strip()[:160]}", flush=True)
    watcher.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    at = {name: next(t for t, line in said if any(map(line.__contains__, words))) for name, words in WORDS.items()}
    end = time.monotonic() - begun
    return {
        "peak_gb": round(peak, 3),
        "reading_s": round(at["read"], 1),
        "epoch_s": round(at["epoch"] - at["read"], 1),  # with validation
        "predicting_s": round(at["written"] - at["epoch"], 1),  # with calibration and imputation
        "writing_s": round(end - at["written"], 1),
    }


WORDS = {"read": [" classes ("], "epoch": ["epoch 1/1", "ended the fit"], "written": ["written: "]}
"""What a fit says when it is that far; with --max-minutes it may end before the epoch does."""


def recovered(out: Path) -> float:
    """Share of the unlabelled cells whose predicted type is the true one."""
    import h5py
    from anndata.io import read_elem

    with h5py.File(out) as file:
        obs = read_elem(file["obs"])
    hidden = obs["cell_type"].astype(str) == "Unknown"
    return float((obs["totalanvi_prediction"].astype(str) == obs["true_cell_type"].astype(str))[hidden].mean())


QUESTIONS = {
    "latent": "av.tl.latent(data, inplace=False)",
    "predict": "av.tl.predict(data, inplace=False)",
    "denoise": "av.tl.denoise(data, features=['protein 0', 'gene 0'])",
    "differential expression": "av.tl.differential_expression(data, 'cell_type', inplace=False)",
    "attributions": "av.tl.attributions(data, inplace=False)",
    "attributions, references": "av.tl.attributions(data, baseline=20, n_steps=5, inplace=False)",
    "elbo": "av.metrics.elbo(data)",
}
ASKED = """
import resource, time
import anvi as av
data, begun = av.io.open_backed({path!r}), time.monotonic()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
opened = peak()
{question}
print(opened, peak(), time.monotonic() - begun)
"""


def ask(out: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of questions to the fitted file, each in a process of its own."""
    found = {}
    for name, question in QUESTIONS.items():
        code = ASKED.format(path=str(out), question=question)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        opened, peak, seconds = map(float, done.stdout.split())
        found[name] = {"opened_gb": round(opened, 2), "peak_gb": round(peak, 2), "seconds": round(seconds, 1)}
        print(f"{name:24}  {opened:5.2f} GB before, {peak:5.2f} GB at most, {seconds:6.1f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the file goes, and stays")
    parser.add_argument("--ask", action="store_true", help="do not fit, ask about the file that a fit has written")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options, others = parser.parse_known_args()
    path = options.folder / f"cells_{options.cells}.h5mu"
    if options.ask:
        found = {"cells": options.cells, "questions": ask(path.with_name(f"fitted_{options.cells}.h5mu"))}
        if options.out is not None:
            options.out.write_text(json.dumps(found | {"command": " ".join(sys.argv)}, indent=1))
        return
    begun = time.monotonic()
    if not path.exists():
        print(f"{write_cells(path, options.cells):.0f} non-zero counts per cell, {time.monotonic() - begun:.0f} s")
    out = path.with_name(f"fitted_{options.cells}.h5mu")
    found = fit(path, out, others) | {"unlabelled_right": round(recovered(out), 4)}
    sizes = {"file_gb": path.stat().st_size / 1e9, "fitted_gb": out.stat().st_size / 1e9}
    found |= {name: round(size, 3) for name, size in sizes.items()} | {"cells": options.cells}
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found | {"command": " ".join(sys.argv)}, indent=1))


if __name__ == "__main__":
    main()
