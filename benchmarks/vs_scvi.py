"""Time of training beside scvi-tools: same data, architecture, batch size, likelihood, objective, optimiser, precision.

Epochs of the two alternate in one run, and so do their losses: after every epoch of scvi-tools comes one of anvi. The
first epochs of both are not counted. Needs scvi-tools 1.5 in the environment, which anvi itself does not::

    python benchmarks/vs_scvi.py --model totalanvi --out benchmarks/results/cpu_totalanvi.json

Without `--data` the counts are simulated (`--cells`, `--genes`, `--proteins`, `--labels`, `--batches`).
"""

import argparse
import json
import logging
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

import anndata
import mudata
import numpy as np
import torch

import anvi as av
from anvi._data.batches import Minibatches, split, take
from anvi._data.cells import Cells, read_cells
from anvi._data.setup import find_setup
from anvi._fit import loop
from anvi._fit.plan import Plan
from anvi._fit.start import make_config, make_network
from anvi._fit.step import run_step
from anvi._runtime import Stop, Threads
from anvi.nn import Weights

PEERS = {"scvi": "SCVI", "scanvi": "SCANVI", "totalvi": "TOTALVI", "totalanvi": "TOTALANVI"}
PEER_BATCH = {"scvi": 128, "scanvi": 128, "totalvi": 256, "totalanvi": 128}
PEER_LR = {"scvi": 1e-3, "scanvi": 1e-3, "totalvi": 4e-3, "totalanvi": 1e-3}
WARMUP = 400  # epochs; the peer's default, and ours here


def read_data(options) -> mudata.MuData:
    """The real file, or simulated counts of a chosen size; every cell has a row of proteins, RNA-only ones zeros."""
    if options.data:
        mdata = mudata.read(options.data)
    else:
        mdata = av.datasets.synthetic_cite(
            options.cells,
            n_genes=options.genes,
            n_proteins=options.proteins,
            n_classes=options.labels,
            n_batches=options.batches,
            n_panels=1,
            rna_only_batch=options.batches > 1,
        )
    return mdata


def for_peer(mdata: mudata.MuData, batch_key: str, labels_key: str) -> anndata.AnnData:
    """What scvi-tools takes: one AnnData with raw RNA counts and a dense protein table."""
    rna = mdata["rna"]
    proteins = np.zeros((rna.n_obs, mdata["prot"].n_vars), dtype=np.float32)
    row = mdata["prot"].obs_names.get_indexer(rna.obs_names)
    counts = mdata["prot"].X
    counts = np.nan_to_num(counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts))
    proteins[row >= 0] = counts[row[row >= 0]]
    obs = mdata.obs.loc[rna.obs_names, [batch_key, labels_key]].copy()
    obs[batch_key] = obs[batch_key].astype(str)
    obs[labels_key] = obs[labels_key].astype(object).fillna("Unknown").astype(str)
    adata = anndata.AnnData(X=rna.X.copy(), obs=obs)
    adata.var_names = rna.var_names
    adata.obsm["protein"] = proteins
    return adata


class Ours:
    """anvi's side: the package's own epoch, without validation, driven one epoch at a time."""

    def __init__(self, mdata, options):
        name, joint = options.model, options.model.startswith("total")
        labels_key = options.labels_key if name.endswith("anvi") else None
        setup = find_setup(mdata, proteins=joint, labels_key=labels_key, batch_key=options.batch_key)
        cells = read_cells(mdata, setup, labels=True)
        # the peer does not show the batch to the encoder of its RNA models
        literal = {"objective": "scvi-tools", "encode_covariates": joint}
        chosen = literal if options.objective == "scvi-tools" else {}
        network = make_network(make_config(name, setup, chosen), cells, 0).to(options.device)
        self.train_cells, _ = split(cells, 0.9, loop.generator(0))
        self.cells: Cells = cells.to(torch.device(options.device))
        labelled = options.batch_size if options.objective == "scvi-tools" else None
        self.plan = Plan(
            batch_size=options.batch_size,
            labelled_batch_size=labelled,
            adam_eps=0.01,
            lr=PEER_LR[name],
            hide_proteins=0.0,
        ).for_cells(len(self.train_cells), warm_start=False)
        self.state = loop._start(network, self.cells, self.plan, 0, torch.device(options.device))
        size = loop._labelled_size(network, self.plan)
        self.minibatches = Minibatches(self.cells, self.train_cells, options.batch_size, size, self.state.shuffle)
        self.group = loop._adversary_groups(self.cells)
        self.run = loop._runner(network, self.cells, self.state.ranks)
        self.threads = Threads(torch.device(options.device), options.threads)  # as the peer has them
        self.epochs = 0

    def epoch(self) -> tuple[float, float]:
        """Seconds of one epoch and its mean loss."""
        begun = time.perf_counter()
        weights = Weights(self.epochs / WARMUP, 1.0, 50.0)
        steps = self.minibatches.plan()
        parts = (self.state, self.run, self.minibatches, steps, self.group, weights, self.plan, self.threads, Stop())
        row, _ = loop._train_epoch(*parts)
        self.epochs += 1
        return time.perf_counter() - begun, row["train_loss"]

    def floor(self) -> float:
        """Milliseconds that the step's matrix products take alone, measured: forward, and two products backward."""
        with torch.no_grad():
            products = list(_products(self))
            operands = [
                (torch.randn(n, k, device=self.cells.label.device), torch.randn(k, m, device=self.cells.label.device))
                for n, k, m in products
            ]
            for a, b in operands:
                a @ b
            best = []
            for _ in range(5):
                begun = time.perf_counter()
                for a, b in operands:
                    a @ b
                if self.cells.label.is_cuda:
                    torch.cuda.synchronize()
                best.append(time.perf_counter() - begun)
        return 1e3 * min(best)

    def optimiser(self) -> float:
        """Milliseconds that the norm of the gradients and the fused optimiser take alone; this changes the weights."""
        gradients = [weight.grad for weight in self.state.network.parameters() if weight.grad is not None]
        best = []
        for _ in range(5):
            begun = time.perf_counter()
            torch.nn.utils.get_total_norm(gradients, foreach=True)
            self.state.optimizer.step()
            if self.cells.label.is_cuda:
                torch.cuda.synchronize()
            best.append(time.perf_counter() - begun)
        return 1e3 * min(best)


def _products(ours: Ours):
    """Shapes of all matrix products of one step, found by hooks on the linear layers."""
    shapes = []

    def note(module, inputs, _output):
        n = inputs[0].reshape(-1, inputs[0].shape[-1]).shape[0]
        m, k = module.weight.shape
        shapes.extend([(n, k, m), (m, n, k)])  # forward, gradient of the weight
        if inputs[0].requires_grad:
            shapes.append((n, m, k))  # gradient of the input

    handles = [
        module.register_forward_hook(note)
        for module in ours.state.network.modules()
        if type(module).__name__ == "Linear"
    ]
    with torch.enable_grad():
        choice = ours.minibatches.plan()[0]
        batch = take(ours.cells, choice.index, choice.weight, choice.n_labelled)
        extra = choice.balanced
        labelled = None if extra is None else take(ours.cells, extra, n_labelled=len(extra))
        ours.state.network.train()
        ours.state.network.terms(batch, labelled, av.nn.Draws(ours.state.noise))
    for handle in handles:
        handle.remove()
    return shapes


def make_peer(mdata, options):
    """The model of scvi-tools with its own defaults, set up but not trained."""
    import scvi

    scvi.settings.seed = 0
    adata = for_peer(mdata, options.batch_key, options.labels_key)
    name, chosen = options.model, getattr(scvi.model, PEERS[options.model], None)
    chosen = chosen or getattr(scvi.external, PEERS[name])
    keys = {"batch_key": options.batch_key}
    if name.startswith("total"):
        keys["protein_expression_obsm_key"] = "protein"
    if name.endswith("anvi"):
        keys |= {"labels_key": options.labels_key, "unlabeled_category": "Unknown"}
    chosen.setup_anndata(adata, **keys)
    return chosen(adata)


def alternate(peer, ours: Ours, options) -> list[dict]:
    """Train both, epoch by epoch in turn; the peer's trainer calls ours after each of its epochs."""
    from lightning.pytorch.callbacks import Callback

    rows = []

    class Alternate(Callback):
        def on_train_epoch_start(self, trainer, module):
            self.begun = time.perf_counter()

        def on_train_epoch_end(self, trainer, module):
            if options.device == "cuda":
                torch.cuda.synchronize()
            peer_seconds = time.perf_counter() - self.begun
            loss = float(trainer.callback_metrics["train_loss"])
            our_seconds, our_loss = ours.epoch()
            rows.append({"peer_s": peer_seconds, "anvi_s": our_seconds, "peer_loss": loss, "anvi_loss": our_loss})
            print(
                f"epoch {len(rows)}: scvi-tools {peer_seconds:.2f} s, anvi {our_seconds:.2f} s, "
                f"ratio {peer_seconds / our_seconds:.1f}; loss {loss:.1f} and {our_loss:.1f}",
                file=sys.stderr,
            )

    chosen = {"early_stopping": False} if options.model == "totalvi" else {}
    if options.model == "totalvi":
        chosen |= {"plan_kwargs": {"n_epochs_kl_warmup": WARMUP}, "reduce_lr_on_plateau": False}
    peer.train(
        max_epochs=options.epochs + options.warmup,
        batch_size=options.batch_size,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        callbacks=[Alternate()],
        enable_progress_bar=False,
        logger=False,
        **chosen,
    )
    return rows


def parts_of_step(ours: Ours) -> dict[str, float]:
    """Share of the operators in one of our epochs, by the profiler, in per cent of the operators' own time."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    gpu = ours.cells.label.is_cuda and ProfilerActivity.CUDA in supported_activities()
    ours.run = run_step  # a graph that was captured before the profiler began crashes inside CUPTI
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        ours.epoch()
    events = profiler.key_averages()
    spent = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) for e in events}
    total = sum(spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1])[:12]
    return {name: round(100 * value / total, 1) for name, value in top}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(PEERS), default="totalanvi")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, help="default: the peer's")
    parser.add_argument("--objective", choices=["scvi-tools", "bound"], default="scvi-tools")
    parser.add_argument("--data", default=None, help="an .h5mu file; default: simulated counts")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=4_000)
    parser.add_argument("--proteins", type=int, default=14)
    parser.add_argument("--labels", type=int, default=14)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="epochs of both that are not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-peer", action="store_true", help="time anvi alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.batch_size = options.batch_size or PEER_BATCH[options.model]
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    mdata = read_data(options)
    ours = Ours(mdata, options)
    if options.no_peer:
        rows = [
            dict(zip(("anvi_s", "anvi_loss"), ours.epoch(), strict=True))
            for _ in range(options.warmup + options.epochs)
        ]
    else:
        rows = alternate(make_peer(mdata, options), ours, options)
    counted = rows[options.warmup :]
    n_train = len(ours.train_cells)
    n_steps = -(-n_train // options.batch_size)
    ours_median = statistics.median(row["anvi_s"] for row in counted)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {options.threads} threads of {os.cpu_count()}",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "versions": {"anvi": version("anvi"), "torch": torch.__version__, "python": platform.python_version()},
        "cells": len(ours.cells),
        "anvi_cells_per_s": round(n_train / ours_median),
        "anvi_ms_per_step": round(1e3 * ours_median / n_steps, 2),
        "floor_ms_per_step": round(ours.floor(), 2),
        "epochs": counted,
    }
    if not options.no_peer:
        ratios = sorted(row["peer_s"] / row["anvi_s"] for row in counted)
        peer_median = statistics.median(row["peer_s"] for row in counted)
        result["versions"]["scvi-tools"] = version("scvi-tools")
        result["peer_cells_per_s"] = round(n_train / peer_median)
        result["peer_ms_per_step"] = round(1e3 * peer_median / n_steps, 2)
        result["ratio"] = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
    result["parts_percent"] = parts_of_step(ours)
    result["optimiser_ms_per_step"] = round(ours.optimiser(), 2)
    if not options.no_peer:  # what the ratio would be if all but the products and the optimiser took no time
        fixed = result["floor_ms_per_step"] + result["optimiser_ms_per_step"]
        result["ratio"]["limit"] = round(result["peer_ms_per_step"] / fixed, 1)
    if options.device == "cuda":
        result["peak_memory_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
    else:
        result["peak_memory_MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps({key: value for key, value in result.items() if key != "epochs"}, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
