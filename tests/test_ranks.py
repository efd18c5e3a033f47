"""One fit in several processes: gradients, norms and noise; resuming with more and fewer; processes that are lost.

The processes run tests/processes.py, two of them and then three, once for the whole module.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mudata
import numpy as np
import processes
import pytest
import torch
from helpers import cite
from safetensors.torch import load_file
from torch import distributed as dist
from torch.nn import functional

import anvi as av
from anvi import _backed, _runtime
from anvi.__main__ import main
from anvi._data.batches import Minibatches
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._fit import loop, ranks, step
from anvi.nn.layers import BatchNorm

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
SECONDS = 300  # for all tasks of some processes; they take 10 on an idle machine
TASKS = {
    2: ["norms", "steps", "fits", "streams", "resumes", "differs", "minutes"],
    3: ["norms", "steps", "goes_on", "fails", "sleeps", "dies"],
}
SIZES = pytest.mark.parametrize("size", TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run all tasks; what they found lies in files named TASK-RANK-SIZE."""
    folder = tmp_path_factory.mktemp("ranks")
    for size, tasks in TASKS.items():
        started = []
        for rank in range(size):
            command = [sys.executable, processes.__file__, str(rank), str(size), str(folder), *tasks]
            with (folder / f"log-{rank}-{size}").open("w") as log:
                path = os.pathsep.join([str(Path(av.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
                environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
                started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        try:
            codes = [one.wait(SECONDS) for one in started]
        finally:
            for one in started:
                one.kill()
        wanted = [0] * size if size == 2 else [0, 0, -signal.SIGKILL]
        logs = "\n".join((folder / f"log-{rank}-{size}").read_text()[-3_000:] for rank in range(size))
        assert codes == wanted, logs
    return folder


def told(folder, task: str, size: int) -> list[dict]:
    """What each process wrote."""
    files = [folder / f"{task}-{rank}-{size}" for rank in range(size) if (folder / f"{task}-{rank}-{size}").exists()]
    return [load_file(file) if task in ("norms", "steps") else json.loads(file.read_text()) for file in files]


# arithmetic -------------------------------------------------------------------------------------------------------


@SIZES
def test_a_shared_norm_is_that_of_all_rows(folder, size):
    rows = torch.randn(11, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    rows.requires_grad_()
    mean, var = torch.zeros(5), torch.ones(5)
    scale, shift = torch.linspace(0.5, 2, 5).requires_grad_(), torch.linspace(-1, 1, 5).requires_grad_()
    out = functional.batch_norm(rows, mean, var, scale, shift, training=True, momentum=0.01, eps=1e-3)
    (torch.arange(11.0)[:, None] * out.square()).sum().backward()
    found = told(folder, "norms", size)
    for name, wanted in (("out", out), ("rows", rows.grad)):
        torch.testing.assert_close(torch.cat([one[name] for one in found]), wanted, rtol=1e-5, atol=2e-5)
    for one in found:
        for name, wanted in (
            ("weight", scale.grad),
            ("bias", shift.grad),
            ("running_mean", mean),
            ("running_var", var),
        ):
            torch.testing.assert_close(one[name], wanted, rtol=1e-5, atol=1e-5)


def test_rows_far_from_zero_keep_their_variance():
    """Where float32 would leave nothing of a difference of squares."""
    rows = 1e4 + torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    one, other = BatchNorm(3), BatchNorm(3)
    other.total = lambda sums: sums
    torch.testing.assert_close(other(rows), one(rows), rtol=0, atol=2e-3)  # what float32 keeps of rows of this size


@SIZES
@pytest.mark.parametrize("name", processes.CASES)
def test_a_shared_step_is_that_of_one_process(folder, size, name, monkeypatch):
    """Loss, sums, gradients, running statistics, without noise: sums over cells, not averages over processes."""
    monkeypatch.setattr(step, "Draws", processes.Still)
    alone = processes.gradients(name, ranks.Ranks(torch.device("cpu")))
    found = told(folder, "steps", size)
    assert {key.partition("/")[2] for key in found[0] if key.startswith(f"{name}/")} == set(alone)
    for what, wanted in alone.items():
        own = [one[f"{name}/{what}"] for one in found]
        assert all(torch.equal(one, own[0]) for one in own)
        assert (own[0] - wanted).norm() < 1e-5 * wanted.norm(), what  # float32 in another order


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_are_the_minibatch(size):
    mdata = cite(200)
    cells = read_cells(mdata, find_setup(mdata, proteins=True, labels_key="cell_type", batch_key="batch"), labels=True)
    arguments = cells, torch.arange(200), 6, 2
    minibatches = Minibatches(*arguments, loop.generator(0), size)
    assert minibatches.labelled_size >= size
    alone = Minibatches(*arguments, loop.generator(0)).plan()
    for choice, lonely in zip(minibatches.plan(), alone, strict=True):
        shares = [ranks.Ranks(torch.device("cpu"), rank, size).share(choice) for rank in range(size)]
        for part in ("index", "weight", "balanced"):
            together = torch.cat([getattr(share, part) for share in shares]).sort().values
            assert torch.equal(together, getattr(choice, part).sort().values)
        assert size <= choice.n_labelled <= len(choice.index) - size
        for share in shares:
            known = cells.label[share.index] >= 0
            assert 0 < share.n_labelled == known.sum() < len(known) and known[: share.n_labelled].all()
        # and those that count are those of one process
        assert set(choice.index[choice.weight > 0].tolist()) == set(lonely.index[lonely.weight > 0].tolist())


# whole fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["totalvi", "totalanvi"])
def test_all_processes_end_with_equal_weights(folder, name):
    first, second = (one[name] for one in told(folder, "fits", 2))
    assert first["weights"] == second["weights"] and len(first["weights"]) > 10_000
    assert first["history"] == second["history"]
    assert np.isfinite(first["weights"]).all()


@pytest.mark.parametrize("name", ["totalvi", "totalanvi"])
def test_the_loss_curve_is_that_of_one_process(folder, name):
    alone, (together, _) = processes.fit(name), (one[name] for one in told(folder, "fits", 2))
    for column in ("train_loss", "validation_loss", "train_elbo"):
        np.testing.assert_allclose(
            together["history"][column], alone["history"][column], rtol=0.05
        )  # seeds differ by 3 %
    assert together["history"]["lr"] == alone["history"]["lr"]
    assert together["noises"][0] == alone["noises"][0]  # the first process draws from the stream of one


def test_streamed_cells_are_shared_like_others(folder):
    first, second = told(folder, "streams", 2)
    assert first["weights"] == second["weights"]
    wanted = told(folder, "fits", 2)[0]["totalvi"]["history"]  # of other minibatches
    np.testing.assert_allclose(first["history"]["train_loss"], wanted["train_loss"], rtol=0.1)
    assert av.get.model(av.io.open_backed(folder / "cells.h5mu"), "totalvi").info["streamed"]


def test_every_process_has_noise_of_its_own(folder):
    noises = [one["totalvi"]["noises"] for one in told(folder, "fits", 2)]
    assert len(set(noises[0]) | set(noises[1])) == len(noises[0]) + len(noises[1]) == 2 * 4 * 3


def test_the_first_process_has_the_answers(folder):
    first, second = told(folder, "fits", 2)
    assert "totalanvi" in first["totalanvi"]["slots"] and "totalanvi" not in second["totalanvi"]["slots"]


def test_minutes_that_are_over_for_one_are_over_for_all(folder):
    first, second = told(folder, "minutes", 2)
    assert len(first["history"]["epoch"]) == 1 and first["weights"] == second["weights"]
    assert len(first["noises"]) == len(second["noises"]) == 1
    assert (first["rows"], second["rows"]) == (1, 0)


def test_other_options_are_refused(folder):
    for one in told(folder, "differs", 2):
        assert one["kind"] == "ValueError" and "Process 1 has other cells, counts, options or seeds" in one["error"]


# checkpoints ------------------------------------------------------------------------------------------------------


def test_a_fit_goes_on_with_as_many(folder):
    first, second = told(folder, "resumes", 2)
    assert first["again"]["weights"] == first["whole"]["weights"] == second["again"]["weights"]
    assert first["again"]["history"] == first["whole"]["history"]


def test_a_fit_goes_on_with_more(folder):
    """Two began, three end it, and the file is where the first process is."""
    found = told(folder, "goes_on", 3)
    assert all(one["weights"] == found[0]["weights"] for one in found)
    assert_goes_on(found[0]["history"], told(folder, "resumes", 2)[0]["whole"]["history"])
    assert not (folder / "elsewhere.ckpt").exists()


@pytest.mark.parametrize("name", ["kept", "dead"])
def test_a_fit_goes_on_with_one(folder, tmp_path, name):
    """Two began, or three of which one was killed."""
    shutil.copy(folder / f"{name}.ckpt", tmp_path / "one.ckpt")
    found = processes.fit("scanvi", checkpoint=tmp_path / "one.ckpt")
    assert_goes_on(found["history"], told(folder, "resumes", 2)[0]["whole"]["history"], exactly=name == "kept")
    assert len(found["noises"]) == 2 * 3  # two epochs of three steps


def assert_goes_on(history: dict, whole: dict, *, exactly: bool = True) -> None:
    """Two epochs of the fit before, and two that are like those that it would have made."""
    assert len(history["train_loss"]) == 4
    if exactly:
        assert history["train_loss"][:2] == whole["train_loss"][:2]
        assert history["train_loss"][2:] != whole["train_loss"][2:]  # with other noise
    np.testing.assert_allclose(history["train_loss"], whole["train_loss"], rtol=0.05)


# lost processes ---------------------------------------------------------------------------------------------------


def test_a_killed_process_ends_all_and_leaves_a_checkpoint(folder):
    found = told(folder, "dies", 3)
    assert len(found) == 2
    for one in found:
        assert one["kind"] == "ConnectionError" and "Another process of this fit has ended" in one["error"]
        assert f"any number of processes, goes on from {folder / 'dead.ckpt'}" in one["error"]


def test_nobody_waits_for_a_process_that_fails(folder):
    first, second, third = told(folder, "fails", 3)
    assert second["kind"] == "Ended"
    for one in (first, third):
        assert one["kind"] == "ConnectionError" and "Nothing was saved yet: checkpoint= keeps" in one["error"]
        assert "did not answer for 600 s" in one["error"] and one["seconds"] < 60


def test_nobody_waits_forever(folder):
    first, second, third = told(folder, "sleeps", 3)
    assert all(one["kind"] == "ConnectionError" for one in (first, second, third))
    assert "did not answer for 2 s (Timed out waiting 2000ms" in first["error"]


LONELY = """
import sys, time
from datetime import timedelta
from helpers import cite
from torch import distributed as dist
import anvi as av
from anvi._fit import ranks
ranks.MEET = timedelta(seconds=2)
if sys.argv[1] == "group":
    dist.init_process_group("gloo")
rank = ranks.processes()[0]
data = cite(60)
begun = time.monotonic()
if rank == 0:
    try:
        av.tl.scvi(data, max_epochs=1, device="cpu")
    except ConnectionError as error:
        print(f"{time.monotonic() - begun:.0f} s: {error}")
else:
    time.sleep(6)
"""


@pytest.mark.parametrize("how", ["torchrun", "group"])
def test_a_process_that_fits_alone_is_told_soon(tmp_path, how):
    (tmp_path / "lonely.py").write_text(LONELY)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(tmp_path / "lonely.py"), how]
    paths = [str(Path(av.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    seconds, _, told = done.stdout.partition(" s: ")
    assert int(seconds) < 60, done.stderr
    assert told.startswith("Process 0 began a fit, and not all of the 2 processes did so within 2 s")
    assert "no 'if rank == 0' around it" in told


def test_who_gave_up_is_not_waited_for(second, monkeypatch):
    """What a rank that waited in vain has left at the meeting place is taken away: a late one must not find it."""
    left = set()

    class Place:
        def set(self, key, _):
            left.add(key)

        def wait(self, *_):
            raise RuntimeError("Socket Timeout")

        def delete_key(self, key):
            left.remove(key)

    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(Place(), 1, 2)]))
    ranks._meet.cache_clear()
    with pytest.raises(ConnectionError, match="Process 1 began a fit"):
        ranks.meet()
    assert not left


def test_being_told_to_end_is_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConnectionError, match="told to end"), ranks._told_to_end():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before


# command line and files -------------------------------------------------------------------------------------------


def test_torchrun(tmp_path):
    """Two processes of the command line: one answer, one file."""
    cite(200).write(tmp_path / "cells.h5mu")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "anvi", "fit", "--json"]
    options = ["--max-epochs", "1", "--device", "cpu", "--method", "totalvi", "--batch-key", "batch"]
    environment = os.environ | {"PYTHONPATH": str(Path(av.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    files = [str(tmp_path / "cells.h5mu"), str(tmp_path / "fitted.h5mu")]
    done = subprocess.run(
        [*command, *files, *options], capture_output=True, text=True, env=environment, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["info"]["processes"] == 2
    assert done.stderr.count("2 processes share every minibatch") == done.stderr.count("anvi: written") == 1
    assert av.get.model(av.io.open_backed(tmp_path / "fitted.h5mu"), "totalvi").info["epochs"] == 1


@pytest.fixture
def second(monkeypatch):
    """This process as the second of two that torchrun has started."""
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)


def test_only_fits_run_in_several(second, tmp_path, capsys):
    assert _runtime.processes() == (1, 2)
    assert main(["check", str(tmp_path / "cells.h5mu")]) == 2
    assert "check runs in one process: start it without torchrun" in capsys.readouterr().err


def test_one_process_answers_in_json(second, tmp_path, monkeypatch, capsys):
    command = ["fit", str(tmp_path / "none.h5mu"), str(tmp_path / "out.h5mu"), "--json"]
    assert main(command) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.startswith("anvi: process 1: ") and told.err.count("\n") == 1
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 2
    told = capsys.readouterr()
    assert "none.h5mu" in json.loads(told.out)["error"] and not told.err.startswith("anvi: process")


def test_the_second_process_saves_nothing_of_a_fit(tmp_path, monkeypatch):
    path = tmp_path / "cells.h5mu"
    cite(60).write(path)
    before = path.stat().st_mtime_ns, path.read_bytes()
    for rank in (1, 0):
        monkeypatch.setattr(_backed, "processes", lambda rank=rank: (rank, 2))
        _backed.on_file_together(lambda data: data.obs.insert(0, "new", 1))(path)
        assert ((path.stat().st_mtime_ns, path.read_bytes()) == before) == (rank == 1)
    monkeypatch.setattr(_backed, "processes", lambda: (1, 2))
    _backed.on_file(lambda data: data.obs.insert(0, "asked", 1))(path)  # a question of its own: nobody else saves it
    assert "asked" in mudata.read_h5mu(path).obs


def test_the_second_process_is_silent(second, caplog):
    with caplog.at_level(logging.INFO, "anvi"), ranks.one_voice():
        assert av.settings.progress is False
        logging.getLogger("anvi").warning("heard")
    assert not caplog.records and logging.getLogger("anvi").level == logging.INFO


def test_every_process_has_a_gpu_of_its_own(second, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks._own_gpu(1) == torch.device("cuda", 1) and current == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"Process 1 has no GPU: there are 1 here\. Use --nproc-per-node=1"):
        ranks._own_gpu(1)
