"""What one process of a fit in several does for tests/test_ranks.py: python processes.py RANK SIZE FOLDER TASK..."""

import json
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from helpers import cite
from safetensors.torch import save_file
from torch import distributed as dist

import anvi as av
from anvi._data.batches import Minibatches, split
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._fit import loop, ranks, step
from anvi._fit.plan import Plan
from anvi._fit.start import make_config, make_network
from anvi.nn import Draws, Weights
from anvi.nn.layers import BatchNorm
from anvi.tl import _fit

ALL_CELLS = {"hide_proteins": 0.0, "thin_counts": 0.0, "hide_rna": 0.0}
CASES = {  # model: options of network and training
    "scvi": ("scvi", {}, {}),
    "scanvi": ("scanvi", {"library": "latent"}, {}),
    "totalvi": ("totalvi", {"objective": "scvi-tools"}, {"adversary": True}),
    "totalanvi": ("totalanvi", {}, {"label_smoothing": 0.1}),
    "own labels": ("totalanvi", {}, {"labelled_batch_size": 0}),
    "one label": ("scanvi", {"objective": "scvi-tools"}, {"labelled_batch_size": 1}),
}
FIT = {"batch_key": "batch", "max_epochs": 4, "batch_size": 120}


class Still(Draws):
    """No noise and no dropout, so that a step depends on its cells alone."""

    def normal(self, like):
        return torch.zeros_like(like)

    def keep(self, like, rate):
        return torch.ones_like(like)


class Ended(Exception):
    """What is raised within a fit."""


def gradients(name: str, group: ranks.Ranks) -> dict[str, torch.Tensor]:
    """Gradients, sums and running statistics after one step without noise, all in one vector each."""
    model, network_options, options = CASES[name]
    mdata = cite(400, n_proteins=12)
    labels = "cell_type" if model.endswith("anvi") else None
    setup = find_setup(mdata, proteins=model.startswith("total"), labels_key=labels, batch_key="batch")
    cells = read_cells(mdata, setup, labels=True)
    network = make_network(make_config(model, setup, network_options), cells, 0)
    train, _ = split(cells, 0.9, loop.generator(0))
    plan = Plan(batch_size=53, **ALL_CELLS, **options).for_cells(len(train), warm_start=False)
    state = loop._start(network, cells, plan, 0, torch.device("cpu"), group)
    size = loop._labelled_size(network, plan)
    minibatches = Minibatches(cells, train, 53, size, state.shuffle, 3)  # the same for one, two and three
    choice = minibatches.plan()[-1]  # with padding
    assert float(choice.weight.min()) == 0.0
    groups, weights = loop._adversary_groups(cells), Weights(0.5, smoothing=plan.label_smoothing)
    network.train()
    with group.together(network, state.adversary):
        fooling = state.adversary is not None
        done = step.run_step(state, cells, group.share(choice), groups, weights, plan, fooling=fooling)
    found = {"numbers": group.add_up(done.numbers.clone())}
    for what, part in (("network", network), ("adversary", state.adversary)):
        if part is not None:
            of = [one.grad for one in part.parameters() if one.grad is not None]
            found[what] = torch.cat([one.flatten() for one in of])
            found[f"{what} buffers"] = torch.cat([one.flatten() for one in part.buffers()])
    return found


def norm(rows: torch.Tensor, weight: torch.Tensor, group: ranks.Ranks) -> dict[str, torch.Tensor]:
    """A batch norm of a rank's rows in value, gradients and statistics."""
    part = BatchNorm(rows.shape[1])
    with torch.no_grad():
        part.weight.copy_(torch.linspace(0.5, 2, rows.shape[1]))
        part.bias.copy_(torch.linspace(-1, 1, rows.shape[1]))
    rows = rows.clone().requires_grad_()
    with group.together(part):
        out = part(rows)
        (weight * out.square()).sum().backward()
    group.add_up_gradients([part.weight.grad, part.bias.grad])
    return {"out": out, "rows": rows.grad, "weight": part.weight.grad, "bias": part.bias.grad} | dict(
        part.named_buffers()
    )


def fit(name: str, data=None, within: tuple = (), **options) -> dict:
    """A fit; its history, and weights as this rank has them; `within` an epoch, from 0, something happens."""
    kept, noises, original, run = {}, [], _fit.fit, loop.run_step

    def keep(network, *args, **kwargs):
        history = original(network, *args, **kwargs)
        kept["weights"] = torch.cat([value.flatten().float() for value in network.state_dict().values()])
        kept["history"] = history.to_dict("list")
        return history

    def note(state, *args, **kwargs):
        noises.append(state.noise.get_state().sum().item())
        if within and state.epoch == within[0]:
            within[1]()
        return run(state, *args, **kwargs)

    _fit.fit, loop.run_step = keep, note
    data = cite(400) if data is None else data
    try:
        getattr(av.tl, name)(data, **FIT | options)
    finally:
        _fit.fit, loop.run_step = original, run
    parts = [] if isinstance(data, Path) else [data, *data.mod.values()]
    return kept | {"noises": noises, "slots": sorted(slot for part in parts for slot in part.uns)}


def ended():
    raise Ended


class Process:
    """The tasks; each returns what JSON can hold, or tensors."""

    def __init__(self, rank: int, size: int, folder: Path):
        self.rank, self.size, self.folder = rank, size, folder

    def norms(self) -> dict:
        rows = torch.randn(11, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
        weight = torch.arange(11.0)[:, None]
        together = ranks.Ranks(torch.device("cpu"), self.rank, self.size, dist.group.WORLD, dist.group.WORLD)
        own = (part.tensor_split(self.size)[self.rank] for part in (rows, weight))
        return norm(*own, together)

    def steps(self) -> dict:
        together = ranks.Ranks(torch.device("cpu"), self.rank, self.size, dist.group.WORLD, dist.group.WORLD)
        found = {}
        for name in CASES:
            found |= {f"{name}/{what}": value for what, value in gradients(name, together).items()}
        return found

    def fits(self) -> dict:
        return {name: fit(name) for name in ("totalvi", "totalanvi")}

    def streams(self) -> dict:
        """A file that all read in every epoch, and the first writes into."""
        path = self.folder / "cells.h5mu"
        if self.rank == 0:
            cite(400).write(path)
        dist.barrier()
        return fit("totalvi", data=path, stream=True)

    def resumes(self) -> dict:
        """A fit that ended in its third epoch, and goes on."""
        path = self.folder / "two.ckpt"
        try:
            fit("scanvi", checkpoint=path, within=(2, ended))
        except Ended:
            pass
        dist.barrier()
        if self.rank == 0:
            (self.folder / "kept.ckpt").write_bytes(path.read_bytes())
        return {"again": fit("scanvi", checkpoint=path), "whole": fit("scanvi")}

    def goes_on(self) -> dict:
        """What two processes began."""
        path = self.folder / "three.ckpt"
        if self.rank == 0:  # nobody else needs the file
            path.write_bytes((self.folder / "kept.ckpt").read_bytes())
        return fit("scanvi", checkpoint=path if self.rank == 0 else self.folder / "elsewhere.ckpt")

    def differs(self) -> dict:
        return self.refused(random_state=self.rank)

    def minutes(self) -> dict:
        """The time of one process is over; the first alone calls back."""
        rows = []
        found = fit("scvi", max_minutes=1e-6 if self.rank else 1e6, callback=rows.append)
        return found | {"rows": len(rows)}

    def fails(self) -> dict:
        """An error of one process; no other waits for it."""
        return self.refused(within=(1, ended) if self.rank == 1 else ())

    def sleeps(self) -> dict:
        ranks.WAIT = timedelta(seconds=2)
        return self.refused(within=(1, lambda: time.sleep(4)) if self.rank == 1 else ())

    def dies(self) -> dict:
        """The last task of all."""
        last = self.rank == self.size - 1
        dead = (2, lambda: os.kill(os.getpid(), signal.SIGKILL)) if last else ()
        return self.refused(checkpoint=self.folder / "dead.ckpt", within=dead)

    def refused(self, **options) -> dict:
        begun = time.monotonic()
        try:
            fit("scanvi", **options)
        except (ConnectionError, Ended, ValueError) as error:
            return {"error": str(error), "kind": type(error).__name__, "seconds": time.monotonic() - begun}
        return {"error": None}


def main() -> None:
    rank, size, folder, *tasks = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    av.settings.progress, av.settings.device, av.settings.n_threads = False, "cpu", 1
    step.Draws, draws = Still, step.Draws
    process = Process(int(rank), int(size), Path(folder))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{size}",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=60),
    )
    for task in tasks:
        step.Draws = Still if task == "steps" else draws
        found = getattr(process, task)()
        if task in ("norms", "steps"):
            save_file(
                {name: value.detach().contiguous() for name, value in found.items()},
                Path(folder) / f"{task}-{rank}-{size}",
            )
        else:
            told = json.dumps(found, default=lambda tensor: tensor.tolist())
            (Path(folder) / f"{task}-{rank}-{size}").write_text(told)
    os._exit(0)  # what is left of a group whose process has died would wait


if __name__ == "__main__":
    main()
