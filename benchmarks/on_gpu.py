"""Measurements that want a GPU and no other package: growth, a million cells, queries, kernels of a step.

`benchmarks/on_gpu.sh` runs them all, beside the tests and vs_scvi.py; one by one::

    python benchmarks/on_gpu.py million --out benchmarks/results/gpu_million.json

With `--rehearse` everything is small and runs on the pretend device of the tests, which shows that it runs and no time.
"""

import argparse
import contextlib
import json
import os
import platform
import runpy
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import anvi as av
from anvi._data.batches import Minibatches
from anvi._data.cells import CSR, Cells
from anvi._data.select import find_features
from anvi._data.setup import Setup
from anvi._fit import loop
from anvi._fit.plan import Plan
from anvi._fit.start import make_config, make_network
from anvi._model import Model
from anvi._posterior.expected import expected_expression
from anvi._runtime import Stop, Threads
from anvi.nn import Weights

HERE = Path(__file__).parent
MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")
AXES = {  # as growth.py has them
    "cells": ("scanvi", (1_000, 4_000, 16_000)),
    "labels": ("scanvi", (10, 100, 300)),
    "genes": ("scanvi", (2_000, 6_000, 20_000)),
    "batches": ("scanvi", (1, 20, 200)),
    "proteins": ("totalanvi", (14, 60, 250)),
}
BASE = {"cells": 2_000, "genes": 2_000, "proteins": 14, "labels": 10, "batches": 2}
INSTEAD = {"labels": {"cells": 10_000, "proteins": 300}}
SMALL = {"cells": 300, "genes": 60, "proteins": 12, "labels": 4, "batches": 2}


def seconds_of(what) -> float:
    """Seconds of a call, with all that it asked of the device."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    what()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def side(model: str, batch_size: int, sizes: dict[str, int], objective: str = "bound"):
    """anvi's side of vs_scvi.py on simulated counts."""
    sys.path.insert(0, str(HERE))
    import vs_scvi

    keys = {"data": None, "batch_key": "batch", "labels_key": "cell_type", "device": "cuda"}
    threads = torch.get_num_threads()
    options = Namespace(model=model, batch_size=batch_size, objective=objective, threads=threads, **keys, **sizes)
    return vs_scvi.Ours(vs_scvi.read_data(options), options)


def growth(rehearse: bool) -> dict:
    """Microseconds per cell of an epoch while one size grows; the first epochs, which capture, are not counted."""
    rows = []
    for axis, (model, values) in AXES.items():
        for value in values:
            sizes = SMALL if rehearse else BASE | INSTEAD.get(axis, {}) | {axis: value}
            torch.cuda.reset_peak_memory_stats()
            ours = side(model, 128, sizes)
            taken = [ours.epoch()[0] for _ in range(2 if rehearse else 5)][1:]
            per_cell = 1e6 * statistics.median(taken) / len(ours.train_cells)
            peak = round(torch.cuda.max_memory_allocated() / 2**20)
            rows.append({"axis": axis, "size": value, "model": model, "us_per_cell": per_cell, "peak_MiB": peak})
            print(f"{axis:>9} {value:>7} {model:>10} {per_cell:9.2f} us a cell {peak:>7} MiB", flush=True)
            if rehearse:
                break
    return {"rows": rows}


def simulate(n_cells: int, n_genes: int, n_proteins: int, n_classes: int, n_batches: int, density: float):
    """Counts of classes and batches made on the device, block by block: cells as :func:`read_cells` gives them."""
    device = torch.device("cuda", torch.cuda.current_device())
    noise = torch.Generator(device).manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=noise, device=device)

    label = (uniform(n_cells) * n_classes).long()
    batch = (uniform(n_cells) * n_batches).long()
    # every class has genes of its own, which are seen four times as often
    seen = (uniform(n_genes) * 2 * density)[None] * torch.where(uniform(n_classes, n_genes) < 0.05, 4.0, 1.0)
    columns, values, lengths, library = [], [], [], []
    for rows in torch.arange(n_cells, device=device).split(10_000):
        there = uniform(len(rows), n_genes) < seen[label[rows]]
        there[:, 0] = True  # no cell is empty
        counts = there * (1 + (-2 * (1 - uniform(len(rows), n_genes)).log()).floor())  # 1 and more, falling off; finite
        columns.append(there.nonzero()[:, 1].int())
        values.append(counts[there])
        lengths.append(there.sum(1))
        library.append(counts.sum(1))
    indptr = torch.cat([torch.zeros(1, dtype=torch.long, device=device), torch.cat(lengths).cumsum(0)])
    foreground = torch.where(uniform(n_classes, n_proteins) < 0.3, 60.0, 5.0)[label]
    y = torch.poisson(foreground * (0.5 + uniform(n_cells, n_proteins)), generator=noise)
    zeros = torch.zeros(n_cells, dtype=torch.long, device=device)
    cells = Cells(
        names=np.array([f"cell_{i:07d}" for i in range(n_cells)], dtype=object),
        x=CSR(indptr, torch.cat(columns), torch.cat(values), n_genes),
        x_row=torch.arange(n_cells, device=device),
        y=y,
        mask_table=torch.ones(1, n_proteins, dtype=torch.bool, device=device),
        mask_row=zeros,
        batch=batch,
        panel=zeros,
        codes=batch[:, None],
        continuous=None,
        log_library=torch.cat(library).log()[:, None],
        label=torch.where(uniform(n_cells) < 0.5, label, -1),  # half of the cells are labelled
    )
    setup = Setup(
        genes=tuple(f"gene_{i}" for i in range(n_genes)),
        proteins=tuple(f"protein_{i}" for i in range(n_proteins)),
        batch_key="batch",
        batches=tuple(f"batch_{i}" for i in range(n_batches)),
        labels_key="cell_type",
        classes=tuple(f"class_{i}" for i in range(n_classes)),
        panels=("panel",),
        measured=((True,) * n_proteins,),
    )
    return cells, setup


def million(rehearse: bool) -> dict:
    """1,000,000 cells x 4,000 genes at 8 %: memory, steps, an epoch, the share of validation, denoising."""
    n_cells, n_genes, n_denoised = (600, 60, 200) if rehearse else (1_000_000, 4_000, 100_000)
    result = {"cells": n_cells, "genes": n_genes, "proteins": 12 if rehearse else 100, "classes": 6}
    made = []
    result["simulate_s"] = seconds_of(lambda: made.extend(simulate(n_cells, n_genes, result["proteins"], 6, 10, 0.08)))
    cells, setup = made
    result["entries"] = len(cells.x.values)
    result["cells_MiB"] = round(torch.cuda.memory_allocated() / 2**20)
    device, index = cells.label.device, torch.randperm(n_cells, generator=loop.generator(0))
    train, validation = index[: n_cells * 9 // 10].sort().values, index[n_cells * 9 // 10 :].sort().values
    for batch_size in (128, 1_024):
        torch.cuda.reset_peak_memory_stats()
        network = make_network(make_config("totalanvi", setup, {}), cells, 0).to(device)
        plan = Plan(batch_size=batch_size).for_cells(len(train), warm_start=False, transfer=True)
        state = loop._start(network, cells, plan, 0, device)
        minibatches = Minibatches(cells, train, batch_size, loop._labelled_size(network, plan), state.shuffle)
        group, run = loop._adversary_groups(cells), loop._runner(network, cells, state.ranks)
        drawn = []
        row = {"plan_s": seconds_of(lambda minibatches=minibatches, drawn=drawn: drawn.extend(minibatches.plan()))}
        weights = Weights(0.5, 1.0, 50.0)
        arguments = (state, run, minibatches, drawn, group, weights, plan, Threads(device), Stop())
        seconds_of(lambda: loop._train_epoch(*arguments[:3], drawn[:5], *arguments[4:]))  # captures  # noqa: B023
        done: list = []
        row["epoch_s"] = seconds_of(lambda arguments=arguments, done=done: done.append(loop._train_epoch(*arguments)))
        row["train_loss"] = done[0][0]["train_loss"]  # there is none if a step was not finite
        row["ms_per_step"] = 1e3 * row["epoch_s"] / len(drawn)
        order = loop.labelled_first(cells, validation.to(device))
        row["validation_s"] = seconds_of(
            lambda network=network, order=order, plan=plan: loop._validate(network, cells, order, plan, 0)
        )
        row["validation_share"] = row["validation_s"] / (row["validation_s"] + row["epoch_s"] + row["plan_s"])
        row["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
        result[f"batch_{batch_size}"] = row
        print(batch_size, row, flush=True)
    network.zero_grad(set_to_none=True)
    model = Model("totalanvi", setup, network.eval(), pd.DataFrame({"epoch": [0]}), {})
    some = first_cells(cells, n_denoised)
    taken = seconds_of(lambda: expected_expression(model, some, find_features(setup)))
    result["denoise_cells_per_s"] = n_denoised / taken
    return result


def first_cells(cells: Cells, n: int) -> Cells:
    """The first cells of a data set; their counts stay in the table of all."""
    from dataclasses import replace

    names = ("x_row", "y", "mask_row", "batch", "panel", "codes", "log_library", "label")
    return replace(cells, names=cells.names[:n], **{name: getattr(cells, name)[:n] for name in names})


def queries(rehearse: bool) -> dict:
    """Seconds of the verbs that ask a fitted TotalANVI; the second of two calls counts."""
    n_cells, n_genes = (300, 60) if rehearse else (20_000, 4_000)
    mdata = av.datasets.synthetic_cite(n_cells, n_genes=n_genes, n_proteins=12 if rehearse else 100)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2, device="cuda")
    verbs = {
        "latent": lambda: av.tl.latent(mdata, inplace=False),
        "predict": lambda: av.tl.predict(mdata, inplace=False),
        "denoise": lambda: av.tl.denoise(mdata, inplace=False),
        "denoise, all batches": lambda: av.tl.denoise(mdata, transform_batch="all", inplace=False),
        "foreground": lambda: av.tl.foreground(mdata, inplace=False),
        "posterior predictive": lambda: av.tl.posterior_predictive(mdata),
        "DE, 5,000 pairs": lambda: av.tl.differential_expression(mdata, "cell_type", inplace=False),
        "elbo": lambda: av.metrics.elbo(mdata),
    }
    result = {"cells": n_cells, "genes": n_genes, "seconds": {}}
    for name, verb in verbs.items():
        result["seconds"][name] = [seconds_of(verb) for _ in range(2)][-1]
        print(f"{name:24s} {result['seconds'][name]:8.2f} s", flush=True)
    return result


def fit(rehearse: bool) -> dict:
    """Seconds of a whole default fit by the verb, answers written, and of the same once more."""
    n_cells, n_genes = (300, 60) if rehearse else (10_000, 4_000)
    mdata = av.datasets.synthetic_cite(n_cells, n_genes=n_genes, n_proteins=12 if rehearse else 100)
    options = {"max_epochs": 2} if rehearse else {}
    result = {"cells": n_cells, "genes": n_genes}
    for model in ("totalanvi", "scanvi"):
        verb = getattr(av.tl, model)
        keys = {"batch_key": "batch", "labels_key": "cell_type", "device": "cuda"} | options
        result[model] = [seconds_of(lambda verb=verb, keys=keys: verb(mdata, **keys)) for _ in range(2)]
        result[f"{model}_epochs"] = len(av.get.history(mdata, model=model))
        print(model, result[model], flush=True)
    return result


def kernels(rehearse: bool) -> dict:
    """Kernels of a replayed step, the thirty that take longest, milliseconds on the device and on the host."""
    result = {}
    sizes = SMALL if rehearse else {"cells": 10_000, "genes": 4_000, "proteins": 100, "labels": 6, "batches": 2}
    for model in MODELS:
        ours = side(model, 128, sizes)
        ours.epoch()
        choices = ours.minibatches.plan()[:20]
        weights = Weights(1.0, 1.0, 50.0)

        def replays(ours=ours, choices=choices, weights=weights):
            for choice in choices:
                ours.run(ours.state, ours.cells, choice, ours.group, weights, ours.plan, fooling=False)

        replays()  # without the adversary a graph of its own is captured
        row = {"ms_per_step": 1e3 * seconds_of(replays) / len(choices), "graph": ours.run.graph is not None}
        begun = time.perf_counter()
        replays()
        row["host_ms_per_step"] = 1e3 * (time.perf_counter() - begun) / len(choices)
        torch.cuda.synchronize()
        if rehearse:
            row["kernels_per_step"] = ours.run.graph.n_kernels
        else:
            row |= _profiled(replays, len(choices))
        for precision in ("tf32", "bf16"):
            with av.settings.override(precision=precision):
                ours.run = loop._runner(ours.state.network, ours.cells, ours.state.ranks)
                replays()
                row[f"ms_per_step_{precision}"] = 1e3 * seconds_of(replays) / len(choices)
        result[model] = row
        print(model, json.dumps(row, indent=1), flush=True)
    return result


def _profiled(replays, n: int) -> dict:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        replays()
        torch.cuda.synchronize()
    spent, times = Counter(), Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.device_time
            times[event.name] += 1
    return {
        "kernels_per_step": sum(times.values()) / n,
        "device_ms_per_step": sum(spent.values()) / n / 1e3,
        "top": [
            {"name": name[:120], "us_per_step": us / n, "per_step": times[name] / n}
            for name, us in spent.most_common(30)
        ],
    }


def steps(rehearse: bool) -> dict:
    """Ten steps of each model and nothing else: for compute-sanitizer."""
    for model in MODELS:
        ours = side(model, 64, SMALL)
        for choice in ours.minibatches.plan()[:10] * (3 if rehearse else 2):
            ours.run(ours.state, ours.cells, choice, ours.group, Weights(1.0, 1.0, 50.0), ours.plan, fooling=False)
        torch.cuda.synchronize()
    return {"models": list(MODELS)}


WHAT = {"growth": growth, "million": million, "queries": queries, "fit": fit, "kernels": kernels, "steps": steps}


def machine(rehearse: bool) -> dict:
    """Where and with what this was run."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "rehearsed": rehearse,
        "device": torch.cuda.get_device_name(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("anvi", "torch", "numpy")} | {"cuda": torch.version.cuda},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*WHAT, "script"], help="script: another one, after --")
    parser.add_argument("--rehearse", action="store_true", help="small, on the pretend device of the tests")
    parser.add_argument("--out", type=Path)
    own, script = sys.argv[1:], []
    if "--" in own:
        own, script = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    av.settings.verbosity, av.settings.progress = 0, False
    with contextlib.ExitStack() as stack:
        if options.rehearse:
            sys.path.insert(0, str(HERE.parent / "tests"))
            from pretend_cuda import Machine

            stack.enter_context(Machine())
        if options.what == "script":
            sys.argv = script
            runpy.run_path(script[0], run_name="__main__")
            return
        av.settings.device = "cuda"
        result = machine(options.rehearse) | WHAT[options.what](options.rehearse)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
