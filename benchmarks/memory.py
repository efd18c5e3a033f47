"""Peak resident memory of a fit beside what it cannot do without: the sparse counts, the weights and Adam's moments.

    python benchmarks/memory.py --cells 200000 --genes 4000

Counts are random, a tenth of them not zero, and lie in an .h5ad file that a fresh process reads and fits for one epoch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

MB = 1e6


def write_counts(path: Path, cells: int, genes: int, density: float) -> float:
    """Write random counts; returns the megabytes of their CSR matrix."""
    import anndata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(0)
    per_cell = np.maximum(1, rng.poisson(density * genes, cells))
    indptr = np.concatenate([[0], np.cumsum(per_cell)]).astype(np.int32)
    indices = np.concatenate([np.sort(rng.choice(genes, n, replace=False)) for n in per_cell]).astype(np.int32)
    values = (1 + rng.poisson(0.5, len(indices))).astype(np.float32)
    x = sparse.csr_matrix((values, indices, indptr), shape=(cells, genes))
    obs = pd.DataFrame({"cell_type": pd.Categorical(rng.choice(["a", "b", "c"], cells))}, np.arange(cells).astype(str))
    anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)])).write_h5ad(path)
    return (indptr.nbytes + indices.nbytes + values.nbytes) / MB


def peak() -> float:
    """Largest resident memory of this process so far, in megabytes (`ru_maxrss` has the parent's in it)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1_024 / MB


def fit(path: str, model: str, threads: int) -> None:
    """In a process of its own: read, fit, and print the peaks as JSON."""
    import anndata
    import torch

    import anvi as av

    torch.set_num_threads(threads)
    av.settings.progress = False
    av.settings.verbosity = 0
    tiny = anndata.AnnData(np.ones((64, 20), dtype=np.float32))  # what importing, compiling and a first fit take
    tiny.obs["cell_type"] = ["a", "b"] * 32
    getattr(av.tl, model)(tiny, max_epochs=1)
    peaks = {"before": peak()}
    adata = anndata.read_h5ad(path)
    peaks["read"] = peak()
    getattr(av.tl, model)(adata, max_epochs=1)
    peaks["fit"] = peak()
    network = av.get.model(adata).network
    peaks["weights"] = sum(value.numel() * value.element_size() for value in network.state_dict().values()) / MB
    print(json.dumps(peaks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=4_000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--model", choices=("scvi", "scanvi"), default="scanvi")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fit(options.child, options.model, options.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.h5ad"
        counts = write_counts(path, options.cells, options.genes, options.density)
        command = [sys.executable, __file__, "--child", str(path), "--model", options.model]
        command += ["--threads", str(options.threads)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(answer.stdout.strip().splitlines()[-1])
    needed = counts + 3 * found["weights"]  # weights and two moments
    for name in ("read", "fit"):
        found[f"{name}_over_needed"] = (found[name] - found["before"]) / needed
    found |= {"counts": counts, "needed": needed, "cells": options.cells, "genes": options.genes}
    print(f"{options.model}, {options.cells:,} cells x {options.genes:,} genes, megabytes")
    print(f"counts {counts:.0f}, weights and Adam's moments {3 * found['weights']:.0f}")
    for name, text in (("before", "something tiny"), ("read", "reading"), ("fit", "the fit")):
        print(f"peak after {text}: {found[name]:.0f}")
    print(f"beyond the first, over what is needed: {found['read_over_needed']:.2f} and {found['fit_over_needed']:.2f}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found | {"command": " ".join(sys.argv)}, indent=1))


if __name__ == "__main__":
    main()
