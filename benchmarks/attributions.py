"""Time of integrated gradients beside scvi-tools: same weights, same cells, same steps, alternating in one run.

A model of scvi-tools is trained for a moment and opened with `io.from_scvi_tools`. Both sides are called as users call
them, `predict(ig_interpretability=True)` there and `tl.attributions(baseline="zero")` here; reading counts and
building tables count. Times are per cell and step asked for: the further steps that anvi takes where sums are not right
count against it. Beside them is how far sums of attributions are off on either side: the convergence delta, relative to
the difference of logits. Needs scvi-tools 1.5 in the environment, which anvi itself does not::

    python benchmarks/attributions.py --data pbmc_citeseq.h5mu --out benchmarks/results/attributions_cpu.json

Without `--data` the counts are simulated (`--cells`, `--genes`, `--proteins`).
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from anndata import AnnData
from queries import Sides, machine, prepare
from vs_scvi import PEERS

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._posterior.attribute import Zero, at, explain
from anvi.nn import Draws


class Asked(NamedTuple):
    """What both sides explain."""

    sides: Sides
    index: np.ndarray  # (cells,) positions in the peer's data
    subset: AnnData  # the same cells
    n_steps: int  # of the peer

    def by_peer(self) -> pd.DataFrame:
        """Mean attributions over all cells and classes: all that it gives."""
        return self.sides.peer.predict(
            self.sides.adata, indices=self.index, ig_interpretability=True, ig_args={"n_steps": self.n_steps}
        )[1]

    def by_anvi(self, n_steps: int, per_cell: bool = False) -> xr.Dataset:
        """Mean attributions per class."""
        return av.tl.attributions(
            self.subset,
            model=self.sides.ours,
            baseline="zero",
            n_steps=n_steps,
            n_cells=None,
            per_cell=per_cell,
            inplace=False,
        )


def deltas(asked: Asked, steps: Sequence[int], n: int) -> dict[str, list[float]]:
    """Relative errors of the sums of `n` cells' attributions from zero counts, by captum's rule and by ours."""
    from captum.attr import IntegratedGradients

    model = asked.sides.ours
    cells = read_cells(asked.subset, model.setup)
    index = torch.arange(min(n, len(cells.names)))
    batch, network = take(cells, index), model.network.eval()
    with torch.no_grad():
        code = network.logits(batch, Draws()).argmax(1)
    target = torch.nn.functional.one_hot(code, len(model.classes)).float()

    def logits(*counts):
        size = len(counts[0]) // len(index)
        many = {name: part.repeat(size, 1) for name, part in batch._asdict().items() if name in ("codes", "measured")}
        whole = batch._replace(entries=None, **{name: part for name, part in many.items() if part is not None})
        return network.logits(whole._replace(**dict(zip(("x", "y"), counts, strict=False))), Draws())

    ends = (batch.x,) if batch.y is None else (batch.x, batch.y)
    found = IntegratedGradients(logits).attribute(ends, target=code, n_steps=asked.n_steps, internal_batch_size=512)
    with torch.no_grad():
        change = ((network.logits(batch, Draws()) - network.logits(at(batch, None, None), Draws())) * target).sum(1)
    theirs = (sum(part.sum(1) for part in found) - change).abs() / change.abs()
    result = {"peer": theirs.tolist()}
    for n_steps in steps:
        parts = list(explain(model, cells, index, target, Zero(), n_steps))
        result[f"ours_{n_steps}"] = torch.cat([part.delta.abs() / part.difference.abs() for part in parts]).tolist()
    return result


def measure(asked: Asked, steps: Sequence[int], repeats: int) -> dict:
    """Alternate the peer and ours with several numbers of steps; the first round is not counted."""
    sides = {"peer": asked.by_peer} | {f"ours_{n}": partial(asked.by_anvi, n) for n in steps}
    times = {side: [] for side in sides}
    for round_ in range(repeats + 1):
        for side, ask in sides.items():
            if asked.sides.options.accelerator == "gpu":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            ask()
            if round_:
                times[side].append(time.perf_counter() - begun)
    delta = deltas(asked, steps, 128)
    n_steps = {"peer": asked.n_steps} | {f"ours_{n}": n for n in steps}
    return {side: _summary(times, side, n_steps[side], len(asked.index), delta[side]) for side in sides}


def _summary(times: dict[str, list[float]], side: str, n_steps: int, n_cells: int, delta: list[float]) -> dict:
    ratios = [peer / own for peer, own in zip(times["peer"], times[side], strict=True)]
    median = statistics.median(times[side])
    return {
        "n_steps": n_steps,
        "ratio_per_cell": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "milliseconds_per_cell": 1e3 * median / n_cells,
        "microseconds_per_cell_and_step": 1e6 * median / n_cells / n_steps,
        "relative_delta": {"mean": float(np.mean(delta)), "below_1%": float(np.mean(np.less(delta, 0.01)))},
        "all_seconds": times[side],
    }


def find_agreement(asked: Asked) -> float:
    """Correlation of the genes' means over all cells with scvi-tools' table."""
    theirs = asked.by_peer().drop_duplicates("feature", keep=False).set_index("feature")["attribution_mean"]
    ours = asked.by_anvi(asked.n_steps, per_cell=True)["rna_per_cell"].mean("obs").to_pandas()
    both = theirs.index.intersection(ours.index)
    return float(np.corrcoef(theirs[both], ours[both])[0, 1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .h5mu file with rna, prot, batch and cell_type")
    parser.add_argument("--cells", type=int, default=2_000, help="simulated cells")
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--proteins", type=int, default=20)
    parser.add_argument("--model", choices=[name for name in PEERS if name.endswith("anvi")], default="totalanvi")
    parser.add_argument("--epochs", type=int, default=1, help="of the peer's training")
    parser.add_argument("--explained", type=int, default=256, help="cells that are explained")
    parser.add_argument("--steps", type=int, default=50, help="of the peer")
    parser.add_argument("--our-steps", type=int, nargs="+", default=[50, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.peer_batch = 0
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(options.threads)
    av.settings.verbosity, av.settings.device = 0, "cuda" if options.accelerator == "gpu" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        sides = prepare(options, folder)
        torch.set_num_threads(options.threads)  # training may have changed it
        labelled = np.flatnonzero((sides.adata.obs["cell_type"] != "Unknown").to_numpy())  # in batches with proteins
        index = np.sort(np.random.default_rng(0).choice(labelled, options.explained, replace=False))
        asked = Asked(sides, index, sides.adata[index].copy(), options.steps)
        found = measure(asked, options.our_steps, options.repeats)
        agreement = find_agreement(asked)
    print(f"{options.model}, {options.explained} cells, {sides.adata.n_vars} genes")
    for side, row in found.items():
        ratio, delta = row["ratio_per_cell"], row["relative_delta"]
        print(
            f"{side:8s} {ratio['median']:5.1f}x ({ratio['min']:.1f} to {ratio['max']:.1f}) "
            f"{row['milliseconds_per_cell']:6.2f} ms a cell, {row['microseconds_per_cell_and_step']:6.1f} us a step; "
            f"relative delta {delta['mean']:.4f}, below 1 % in {delta['below_1%']:.1%} of the cells"
        )
    print(f"correlation of mean attributions: {agreement:.5f}")
    if options.out is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        settings["data"] = options.data.name if options.data else None
        del settings["out"]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"options": settings, "machine": machine(options), "agreement": agreement, "sides": found}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
