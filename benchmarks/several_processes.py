"""One fit in several processes, on this machine and on two hosts; processes that are lost.

python benchmarks/several_processes.py --out benchmarks/results/several_processes_cpu.json [--parts curves lost hosts]

curves: TotalANVI of simulated cells in one process with three seeds, in two and in three processes: loss curves,
scores, seconds per epoch. lost: `torchrun -m anvi fit`, of which one process is killed; what the others say, and how
the fit goes on with one process and with three. hosts: two network namespaces joined by a pair of virtual cards (needs
root and `ip`), one process in each; the same numbers as two processes on one host; then the cable is cut. A run of each
is a process of its own, this file again with --worker.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ADDRESSES = "10.77.0.1", "10.77.0.2"
WAIT = 20
"""Seconds after which a worker gives up on one that does not answer (in anvi ten minutes, too long for a benchmark)."""


# a fit ------------------------------------------------------------------------------------------------------------


def worker(options: argparse.Namespace) -> None:
    """Fit simulated cells, alone or with others; the first process writes what came out."""
    import torch

    import anvi as av
    from anvi._fit import ranks
    from anvi._runtime import processes

    warnings.simplefilter("ignore")
    ranks.WAIT = timedelta(seconds=WAIT)
    av.settings.progress, av.settings.verbosity, av.settings.device = False, 0, "cpu"
    mdata = av.datasets.synthetic_cite(options.cells, n_genes=options.genes, n_proteins=40)
    times, begun = [time.monotonic()], time.monotonic()
    found = {"processes": processes()[1], "threads": torch.get_num_threads(), "random_state": options.seed}
    try:
        av.tl.totalanvi(
            mdata,
            batch_key="batch",
            max_epochs=options.epochs,
            batch_size=options.batch_size,
            early_stopping=False,
            random_state=options.seed,
            callback=lambda row: times.append(time.monotonic()),
        )
    except ConnectionError as error:
        found |= {"error": str(error), "seconds": round(time.monotonic() - begun, 1), "epochs": len(times) - 1}
    if processes()[0] == 0:
        if "error" not in found:
            history = av.get.model(mdata, "totalanvi").history
            unlabelled = (mdata.obs["cell_type"] == "Unknown").to_numpy()
            right = (
                mdata.obs["totalanvi_prediction"].astype(str) == mdata.obs["true_cell_type"].astype(str)
            ).to_numpy()
            found |= {
                "accuracy_of_unlabelled": round(float(right[unlabelled].mean()), 4),
                "seconds_per_epoch": round(float(np.median(np.diff(times))), 2),
                "best_seconds_per_epoch": round(float(np.diff(times).min()), 2),
            }
            for column in ("train_loss", "validation_loss", "validation_accuracy"):
                found[column] = [round(value, 4) for value in history[column]]
        options.out.write_text(json.dumps(found))
    os._exit(0 if "error" not in found else 1)  # what is left of a group that has lost a process would wait


def start(options, out: Path, *, n: int = 1, seed: int = 0, before: tuple = (), more: tuple = (), threads: int = 1):
    """Start a worker, or several with torchrun."""
    launch = [sys.executable] if n == 1 and not more else [*TORCHRUN, f"--nproc-per-node={n}", *more]
    facts = {"cells": options.cells, "genes": options.genes, "epochs": options.epochs, "batch-size": options.batch_size}
    arguments = [text for name, value in facts.items() for text in (f"--{name}", str(value))]
    command = [*before, *launch, __file__, "--worker", "--seed", str(seed), "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def run(options, folder: Path, name: str, **how) -> dict:
    """A worker's answer."""
    started = start(options, folder / name, **how)
    if started.wait():
        raise RuntimeError(f"{name} failed")
    found = json.loads((folder / name).read_text())
    print(f"{name}: {found['seconds_per_epoch']} s per epoch, accuracy {found['accuracy_of_unlabelled']}", flush=True)
    return found


# the parts --------------------------------------------------------------------------------------------------------


def curves(options, folder: Path) -> dict:
    """Loss curves of one process with some seeds and of several with the first of them."""
    runs = {f"one, seed {seed}": run(options, folder, f"one-{seed}", seed=seed) for seed in range(3)}
    runs |= {f"{n} processes, seed 0": run(options, folder, f"several-{n}", n=n) for n in (2, 3)}
    runs["2 processes, seed 1"] = run(options, folder, "several-2-1", n=2, seed=1)
    pairs = [("one, seed 0", f"one, seed {seed}") for seed in (1, 2)]
    pairs += [("one, seed 0", "2 processes, seed 0"), ("one, seed 0", "3 processes, seed 0")]
    pairs += [("one, seed 1", "2 processes, seed 1")]
    return {"runs": runs, "compared": {f"{one} | {other}": compared(runs[one], runs[other]) for one, other in pairs}}


def compared(one: dict, other: dict) -> dict:
    """Relative differences of the curves, mean over the epochs and at their end; and of the scores."""
    found = {}
    for column in ("train_loss", "validation_loss"):
        a, b = np.array(one[column]), np.array(other[column])
        found[column] = {"mean": round(float(np.abs(b / a - 1).mean()), 5), "last": round(float(b[-1] / a[-1] - 1), 5)}
    found["accuracy_of_unlabelled"] = round(other["accuracy_of_unlabelled"] - one["accuracy_of_unlabelled"], 4)
    return found


def lost(options, folder: Path) -> dict:
    """Kill the second of two processes of the command line, then go on with one and with three."""
    import anvi as av

    cells, checkpoint = folder / "cells.h5mu", folder / "fit.safetensors"
    av.datasets.synthetic_cite(2_000, n_genes=300, n_proteins=20).write(cells)
    arguments = ["-m", "anvi", "fit", str(cells), "--batch-key", "batch", "--max-epochs", "12", "--device", "cpu"]
    begun = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node=2", *arguments, str(folder / "never.h5mu"), "--checkpoint", str(checkpoint)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not checkpoint.exists() and begun.poll() is None:
        time.sleep(0.05)
    second = [pid for pid in children(begun.pid) if environment_of(pid).get("RANK") == "1"]
    os.kill(second[0], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = begun.communicate()
    found = {"seconds_to_the_end": round(time.monotonic() - killed, 1), "exit_code": begun.returncode}
    found["told"] = [line for line in errors.splitlines() if line.startswith("anvi: ") and "process" in line][-1:]
    found["answer_written"] = (folder / "never.h5mu").exists()
    for n in (1, 3):
        launch = [sys.executable] if n == 1 else [*TORCHRUN, f"--nproc-per-node={n}"]
        own, out = folder / f"again-{n}.safetensors", folder / f"again-{n}.h5mu"
        own.write_bytes(checkpoint.read_bytes())
        done = subprocess.run(
            [*launch, *arguments, str(out), "--checkpoint", str(own), "--json"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        history = av.get.model(av.io.open_backed(out), "totalanvi").history
        went_on = [line.rpartition(" after ")[2] for line in done.stderr.splitlines() if "going on from" in line]
        found[f"went on with {n}"] = {
            "after": went_on[0],
            "epochs": len(history),
            "processes": json.loads(done.stdout)["info"].get("processes", 1),
            "validation_loss": [round(value, 3) for value in history["validation_loss"]],
        }
    return found


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


def hosts(options, folder: Path) -> dict:
    """One process in each of two network namespaces; then a fit in which the cable between them is cut."""
    commands = ["ip link add anvi-a type veth peer name anvi-b"]
    for name, card, address in zip(("anvi-a", "anvi-b"), ("anvi-a", "anvi-b"), ADDRESSES, strict=True):
        commands += [f"ip netns add {name}", f"ip link set {card} netns {name}"]
        inside = f"ip netns exec {name} ip"
        commands += [
            f"{inside} addr add {address}/24 dev {card}",
            f"{inside} link set {card} up",
            f"{inside} link set lo up",
        ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return {"error": f"{error} {getattr(error, 'stderr', '')}".strip()}
    try:
        return joined(options, folder)
    finally:
        for name in ("anvi-a", "anvi-b"):
            subprocess.run(["ip", "netns", "del", name], check=False)


def joined(options, folder: Path) -> dict:
    def both(name: str) -> list[subprocess.Popen]:
        started = []
        for rank, space in enumerate(("anvi-a", "anvi-b")):
            before = ("ip", "netns", "exec", space, "env", f"GLOO_SOCKET_IFNAME={space}")
            more = ("--nnodes=2", f"--node-rank={rank}", f"--master-addr={ADDRESSES[0]}", "--master-port=29511")
            started.append(start(options, folder / name, before=before, more=more))
        return started

    for one in both("hosts"):
        if one.wait():
            raise RuntimeError("two hosts failed")
    found, here = json.loads((folder / "hosts").read_text()), run(options, folder, "here", n=2)
    print(
        f"two hosts: {found['seconds_per_epoch']} s per epoch, accuracy {found['accuracy_of_unlabelled']}", flush=True
    )
    same = all(found[name] == here[name] for name in ("train_loss", "validation_loss", "accuracy_of_unlabelled"))
    started, before = both("cut"), carried("anvi-a")
    while carried("anvi-a") - before < 1e8 and all(one.poll() is None for one in started):
        time.sleep(0.2)
    subprocess.run("ip netns exec anvi-a ip link set anvi-a down".split(), check=True)
    cut = time.monotonic()
    codes = [one.wait() for one in started]
    after_the_cut = {"seconds_to_the_end": round(time.monotonic() - cut, 1), "exit_codes": codes}
    after_the_cut["told"] = json.loads((folder / "cut").read_text()).get("error")
    return {"two hosts": found, "the same numbers as two processes of one host": same, "cut": after_the_cut}


def carried(space: str) -> int:
    """Bytes that the card of a namespace has sent."""
    told = subprocess.run(f"ip netns exec {space} ip -s -j link show {space}".split(), capture_output=True, check=True)
    return json.loads(told.stdout)[0]["stats64"]["tx"]["bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", choices=("curves", "lost", "hosts"), default=["curves", "lost", "hosts"])
    parser.add_argument("--cells", type=int, default=3_000)
    parser.add_argument("--genes", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.worker:
        worker(options)
    there = json.loads(options.out.read_text()) if options.out.exists() else {}
    facts = {name: getattr(options, name) for name in ("cells", "genes", "epochs", "batch_size")}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            there[part] = {"options": facts, "load": os.getloadavg()[1]} | globals()[part](options, Path(folder))
        options.out.write_text(json.dumps(there, indent=1) + "\n")


if __name__ == "__main__":
    main()
