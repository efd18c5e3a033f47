"""Does a class fall when its features are taken away? Deletion curves of a fitted model's attributions.

Features of both modalities are ranked for each class by `tl.attributions`, on some of its cells. In other cells of the
class the counts of the first k are set to zero, and the probability of the class that was predicted is looked at, and
its log odds against all others; beside it, with k random features that the cell expresses, and with the k of its
largest counts::

    python benchmarks/deletion.py fitted.h5mu --out benchmarks/results/deletion.json --figure docs/figures/deletion.png

The file holds a fitted model with labels. Nothing else than anvi is needed.
"""

import argparse
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mudata
import numpy as np
import torch
from torch import Tensor

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import Cells, read_cells
from anvi._posterior.attribute import at, sample
from anvi.nn import Batch, Draws

HOW = {"top": "top of its class", "largest": "largest counts", "random": "random expressed"}
COLORS = {"top": "#c0392b", "largest": "#2c6fbb", "random": "#777777"}


class Tried(NamedTuple):
    """Cells that lose features, and which class they were called at first."""

    cells: Cells
    index: Tensor  # (cells,)
    code: Tensor  # (cells,)


def rank(data, model: av.Model, key: str, options: argparse.Namespace) -> tuple[dict[str, Tensor], list[str]]:
    """Columns of (genes, proteins) of each class by their score, and the cells that were looked at."""
    found = av.tl.attributions(
        data, model=key, baseline=options.baseline, n_cells=options.explained, per_cell=True, inplace=False
    )
    mods = [(model.setup.rna_mod, model.setup.genes)]
    if model.setup.joint:
        mods.append((model.setup.prot_mod, model.setup.proteins))
    scores = np.concatenate(
        [found[f"{mod}_presence"].to_pandas()[list(names)].fillna(-np.inf).to_numpy() for mod, names in mods], axis=1
    )
    order = torch.from_numpy(np.argsort(-scores, axis=1, kind="stable"))
    return dict(zip(map(str, found["class"].values), order, strict=True)), found["obs"].values.astype(str).tolist()


@torch.no_grad()
def choose(model: av.Model, cells: Cells, seen: Sequence[str], options: argparse.Namespace) -> Tried:
    """Cells of each class that the ranking has not seen; those with proteins, if there are any."""
    network, everyone = model.network.eval(), torch.arange(len(cells))
    code = torch.cat([network.logits(take(cells, part), Draws()).argmax(1) for part in everyone.split(1_000)])
    free = torch.from_numpy(~np.isin(np.asarray(cells.names), seen))
    if model.setup.joint and cells.measured.any():
        free &= cells.measured.any(1)
    number = torch.rand(len(cells), generator=torch.Generator().manual_seed(0))
    index = sample(torch.where(free, code, -1), options.cells, number)
    return Tried(cells, index, code[index])


def without(batch: Batch, columns: Tensor) -> Batch:
    """The cells without the counts in some columns `(cells, k)` of genes and proteins side by side."""
    n_genes = batch.x.shape[1]
    both = batch.x if batch.y is None else torch.cat([batch.x, batch.y], 1)
    both = both.scatter(1, columns, 0.0)
    return at(batch, both[:, :n_genes], None if batch.y is None else both[:, n_genes:])


@torch.no_grad()
def curves(model: av.Model, tried: Tried, ranked: dict[str, Tensor], options: argparse.Namespace) -> dict:
    """Log odds of the class at first `(steps, cells)`, for each way of taking features away."""
    network, batch = model.network.eval(), take(tried.cells, tried.index)
    counts = batch.x if batch.y is None else torch.cat([batch.x, batch.y * batch.measured], 1)
    generator = torch.Generator().manual_seed(1)

    def course(order: Tensor) -> np.ndarray:
        kept = []
        for k in range(options.top + 1):
            logits = network.logits(without(batch, order[:, :k]), Draws()).double()
            own = torch.nn.functional.one_hot(tried.code, logits.shape[1]).bool()
            kept.append((logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)).numpy())
        return np.stack(kept)

    def at_random() -> Tensor:
        return (torch.rand(counts.shape, generator=generator) * (counts > 0)).argsort(1, descending=True)

    top = torch.stack([ranked[model.classes[code]][: options.top] for code in tried.code.tolist()])
    return {
        "top": course(top),
        "largest": course(counts.argsort(1, descending=True)[:, : options.top]),
        "random": np.concatenate([course(at_random()[:, : options.top]) for _ in range(options.repeats)], axis=1),
    }


def per_class(found: np.ndarray, code: np.ndarray, classes: Sequence[str]) -> dict[str, list[float]]:
    """Means over the cells of each class `(steps,)`."""
    code = np.tile(code, found.shape[1] // len(code))  # cells that lost random features several times
    return {classes[c]: found[:, code == c].mean(1).round(4).tolist() for c in np.unique(code)}


def draw(result: dict, path: Path) -> None:
    """The curves, averaged over classes, and every class at their end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    classes = list(result["probability"]["top"])
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 0.2 * len(classes) + 1.3), layout="constrained")
    for how, text in HOW.items():
        every, odds = (np.array(list(result[what][how].values())) for what in ("probability", "log_odds"))
        k = np.arange(every.shape[1])
        left.plot(k, every.mean(0), color=COLORS[how], label=text, marker="o", markersize=3)
        left.fill_between(k, *np.quantile(every, (0.25, 0.75), axis=0), color=COLORS[how], alpha=0.15, linewidth=0)
        right.scatter(odds[:, -1], range(len(classes)), color=COLORS[how], s=24, zorder=3)
    right.scatter(odds[:, 0], range(len(classes)), facecolors="none", edgecolors="black", s=40, label="at first")
    right.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="features set to zero", ylabel="probability of the class", ylim=(0, 1.03))
    left.set_title("mean of classes (band: quartiles)", fontsize=9, loc="left")
    right.set_yticks(range(len(classes)), classes, fontsize=8)
    right.set(xlabel="log odds of the class", ylim=(len(classes) - 0.5, -0.5))
    right.set_title(f"after {k[-1]} features", fontsize=9, loc="left")
    right.grid(axis="y", color="#eeeeee")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="an .h5mu file with a fitted model")
    parser.add_argument("--model", help="its key; default: the only one with labels")
    parser.add_argument("--baseline", default="each")
    parser.add_argument("--explained", type=int, default=100, help="cells per class that features are ranked by")
    parser.add_argument("--cells", type=int, default=50, help="other cells per class that lose features")
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="draws of random features")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/deletion.png"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    av.settings.verbosity, av.settings.device, begun = 0, "cpu", time.perf_counter()
    data = mudata.read(options.file)
    model = av.get.model(data, options.model)
    ranked, seen = rank(data, model, options.model, options)
    tried = choose(model, read_cells(data, model.setup), seen, options)
    found, code = curves(model, tried, ranked, options), tried.code.numpy()
    features = [*model.setup.genes, *model.setup.proteins]
    result = {
        "file": options.file.name,
        "model": model.name,
        "cells": {model.classes[c]: int((code == c).sum()) for c in np.unique(code)},
        "explained": len(seen),
        "probability": {h: per_class(1 / (1 + np.exp(-odds)), code, model.classes) for h, odds in found.items()},
        "log_odds": {how: per_class(odds, code, model.classes) for how, odds in found.items()},
        "features": {name: [features[i] for i in order[: options.top]] for name, order in ranked.items()},
        "still_called": {how: float((odds[-1] > 0).mean()) for how, odds in found.items()},
        "seconds": round(time.perf_counter() - begun, 1),
        "machine": {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("anvi", "torch", "numpy")},
        },
    }
    for how, text in HOW.items():
        proba, odds = (np.mean(list(result[what][how].values()), axis=0) for what in ("probability", "log_odds"))
        print(
            f"{text:18s} p {proba[0]:.3f} -> {proba[-1]:.3f}, log odds {odds[0]:.1f} -> {odds[-1]:.1f} after "
            f"{options.top}; p > 0.5 in {result['still_called'][how]:.1%}"
        )
    draw(result, options.figure)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
