"""How the cost of training grows: cells, labels, genes, batches and proteins, each varied alone, beside scvi-tools.

Runs vs_scvi.py once per size on simulated counts and prints microseconds per cell, anvi's and where it can run
scvi-tools', with their growth from one size to the next: the exponent b of cost ~ size^b, 1 being linear::

    python benchmarks/growth.py --out benchmarks/results/growth_cpu.json
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

BASE = {"cells": 2_000, "genes": 2_000, "proteins": 14, "labels": 10, "batches": 2}
INSTEAD = {"labels": {"cells": 10_000, "proteins": 300}}
"""What else is different along an axis: every class needs cells in every batch."""
SIZES = {
    "cells": ("scanvi", (1_000, 4_000, 16_000)),
    "labels": ("scanvi", (10, 100, 300)),
    "genes": ("scanvi", (2_000, 6_000, 20_000)),
    "batches": ("scanvi", (1, 20, 200)),
    "proteins": ("totalanvi", (14, 60, 250)),
}
PEER_MAX = {"labels": 100}
"""Beyond this the peer is left out: it evaluates every label for every cell of the minibatch."""


def measure(model: str, sizes: dict[str, int], peer: bool, threads: int) -> dict:
    """The result of one run of vs_scvi.py."""
    script = Path(__file__).with_name("vs_scvi.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(script), "--model", model, "--epochs", "2", "--threads", str(threads)]
        command += ["--objective", "scvi-tools" if peer else "bound", "--out", str(out)]
        command += [] if peer else ["--no-peer"]
        for name, value in sizes.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--axes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for axis in options.axes:
        model, values = SIZES[axis]
        head = f"{axis:>8} {'anvi':>9} {'growth':>7} {'default':>9} {'scvi-tools':>11} {'growth':>7}"
        print(f"\n{model}, microseconds per cell\n{head}")
        last = None
        for value in values:
            sizes = BASE | INSTEAD.get(axis, {}) | {axis: value}
            with_peer = value <= PEER_MAX.get(axis, math.inf)
            row = {"axis": axis, "size": value, "model": model}
            if with_peer:
                found = measure(model, sizes, True, options.threads)
                row |= {"anvi": 1e6 / found["anvi_cells_per_s"], "scvi-tools": 1e6 / found["peer_cells_per_s"]}
            found = measure(model, sizes, False, options.threads)
            row |= {"anvi, default objective": 1e6 / found["anvi_cells_per_s"], "peak_MiB": found["peak_memory_MiB"]}
            results.append(row)
            print(f"{value:>8} " + line(row, last), flush=True)
            last = row
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps({"command": " ".join(sys.argv), "rows": results}, indent=1) + "\n")


def line(row: dict, last: dict | None) -> str:
    """One row of the table."""

    def number(name: str) -> str:
        return f"{row[name]:.0f}" if name in row else "-"

    def growth(name: str) -> str:
        if last is None or name not in row or name not in last:
            return "-"
        steps = math.log(row["size"] / last["size"]) if last["size"] else 1
        return f"{math.log(row[name] / last[name]) / steps:.2f}"

    return (
        f"{number('anvi'):>9} {growth('anvi'):>7} {number('anvi, default objective'):>9} "
        f"{number('scvi-tools'):>11} {growth('scvi-tools'):>7}"
    )


if __name__ == "__main__":
    main()
