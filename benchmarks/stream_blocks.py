"""What shuffling by blocks costs: streamed fits of a file that is sorted by cell type and batch, over block sizes.

    python benchmarks/stream_blocks.py --out benchmarks/results/stream_blocks.json

Simulated CITE-seq. A fifth of the cells is set aside, without labels, and never seen by a fit; of the others, in a
file in the order of their types and batches (the worst case), half are labelled. Fits differ in how many blocks of how
many cells are in memory together, or shuffle all cells (`stream=False`); the cells set aside say how good they are.
"""

import argparse
import json
import platform
import tempfile
import time
import warnings
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import f1_score

import anvi as av
from anvi import _stream

WAYS = ((16, 64), (16, 16), (16, 4), (16, 1), (64, 16), (64, 4), (64, 1))
"""Cells of a block, and blocks that are in memory together; a large file has blocks of 1,000, about 60 together."""


def simulated(n: int, seed: int, folder: Path) -> mudata.MuData:
    """Write the sorted file, and return the cells that are set aside."""
    mdata = av.datasets.synthetic_cite(n, n_genes=200, n_classes=12, random_state=seed)
    aside = np.random.default_rng(seed).random(n) < 0.2
    query, known = mdata[aside].copy(), mdata[~aside]
    order = known.obs.assign(cell=known.obs_names).sort_values(["true_cell_type", "batch", "cell"])["cell"]
    mods = {
        name: part[[cell for cell in order if cell in set(part.obs_names)]].copy() for name, part in known.mod.items()
    }
    ordered = mudata.MuData(mods)
    for name, column in known.obs.items():
        ordered.obs[name] = column.reindex(ordered.obs_names)
    ordered.write_h5mu(folder / "sorted.h5mu")
    return query


def fit(path: Path, query: mudata.MuData, way: tuple[int, int] | None, epochs: int, seed: int) -> dict:
    """Fit, and score the cells that are set aside."""
    if way is not None:
        _stream.BLOCK, _stream.MIXED, _stream.CHUNKS = way[0], way[0] * way[1], 1
    begun = time.process_time()
    data = av.tl.totalanvi(
        path, batch_key="batch", max_epochs=epochs, random_state=seed, stream=way is not None, copy=True, n_hidden=64
    )
    seconds, model = time.process_time() - begun, av.get.model(data)
    asked = query.copy()
    av.tl.predict(asked, model=model)
    truth, said = (asked.obs[name].astype(str) for name in ("true_cell_type", "totalanvi_prediction"))
    history = av.get.history(data)
    return {
        "block": None if way is None else way[0],
        "together": None if way is None else way[1],
        "seed": seed,
        "accuracy": float((truth == said).mean()),
        "macro_f1": float(f1_score(truth, said, average="macro")),
        "bound": float(av.metrics.elbo(asked, model=model, use_labels=False)["elbo"]),
        "validation_loss": float(history["validation_loss"].min()),
        "epochs": len(history),
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=4_000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    av.settings.verbosity, av.settings.progress = 0, False
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            query = simulated(options.cells, seed, Path(folder))
            for way in (None, *WAYS):
                rows.append(fit(Path(folder) / "sorted.h5mu", query, way, options.epochs, seed))
                print(json.dumps(rows[-1]), flush=True)
                if options.out is not None:
                    facts = {"cells": options.cells, "torch": torch.__version__, "python": platform.python_version()}
                    command = f"python benchmarks/stream_blocks.py --cells {options.cells} --epochs {options.epochs}"
                    facts |= {"command": f"{command} --seeds {options.seeds}", "rows": rows}
                    options.out.write_text(json.dumps(facts, indent=1))
    table = pd.DataFrame(rows).fillna({"block": 0, "together": 0})
    scores = table.groupby(["block", "together"])[["accuracy", "macro_f1", "bound", "validation_loss"]]
    print(scores.mean().round(4))


if __name__ == "__main__":
    main()
