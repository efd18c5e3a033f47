"""The benchmarks run on what the package is today: they call what is private, and nothing else would tell."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import cite
from pretend_cuda import Machine

import anvi as av

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="a source distribution has no benchmarks")

SMALL = ["--cells", "300", "--genes", "60"]
NO_PEER = [*SMALL, "--proteins", "12", "--labels", "4", "--epochs", "1", "--batch-size", "64", "--no-peer"]
ALONE = {  # what runs on simulated counts and without another package
    "large": ["large.py", "--cells", "500", "--folder", "."],
    "memory": ["memory.py", "--cells", "500", "--genes", "60", "--threads", "1"],
    "truth": ["truth.py", "--cells", "200", "--genes", "40", "--max-epochs", "2"],
    "deletion": ["deletion.py", "fitted.h5mu", "--explained", "20", "--cells", "10", "--top", "5", "--figure", "a.png"],
    "markers": ["markers.py", "fitted.h5mu"],
} | {f"vs_scvi {model}": ["vs_scvi.py", *NO_PEER, "--model", model] for model in ("scvi", "totalanvi")}


def run(folder: Path, *command: str, seconds: float = 300) -> str:
    """What a script prints, started in a folder as a user would start it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


def test_what_they_import_is_there(tmp_path):
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    assert len(names) > 15
    run(tmp_path, "-c", f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import {', '.join(names)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the file of a fitted model in it."""
    path = tmp_path_factory.mktemp("benchmarks")
    mdata = cite(400)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    mdata.write(path / "fitted.h5mu")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ALONE.values(), ids=ALONE)
def test_those_that_need_no_other_package(folder, arguments):
    script, *rest = arguments
    assert run(folder, str(BENCHMARKS / script), *rest)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kernels", "million", "fit", "queries", "steps"])
def test_what_a_gpu_is_asked(tmp_path, what):
    out = tmp_path / "gpu.json"
    run(tmp_path, str(BENCHMARKS / "on_gpu.py"), what, "--rehearse", "--out", str(out))
    assert '"rehearsed": true' in out.read_text()


def test_counts_simulated_on_a_gpu_are_finite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import on_gpu

    def least(*shape, generator=None, device=None):  # zeros are among the numbers that are drawn, one among 17 million
        return torch.zeros(*shape, device=device)

    with Machine():
        monkeypatch.setattr(torch, "rand", least)
        cells, _ = on_gpu.simulate(20, 10, 3, 2, 2, 0.5)
        values = cells.x.values.cpu().numpy()
    assert len(values) == 20 and np.isfinite(values).all()
