"""The process that a verb runs in: threads, the caller's torch, Ctrl-C and the clock."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from helpers import cite

import anvi as av
from anvi import _runtime
from anvi._fit import loop, step

# threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 100000"}, 1.0),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu.max": "rubbish"}, math.inf),
    ],
)
def test_quota_of_the_control_group(tmp_path, files, cores):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _runtime._quota(tmp_path, own) == cores
    assert _runtime._quota(tmp_path / "nowhere", tmp_path / "none") == math.inf


@pytest.mark.parametrize(
    "files, most",
    [
        ({"memory.max": "max\n"}, math.inf),
        ({"a/memory.max": "3000000\n", "a/b/memory.max": "2000000\n"}, 2e6),
        ({"memory/a/memory.limit_in_bytes": "1000000\n"}, 1e6),
        ({"memory.max": "rubbish"}, math.inf),
    ],
)
def test_memory_of_the_control_group(tmp_path, files, most, monkeypatch):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n4:memory:/a/b\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert _runtime.usable_memory(torch.device("cpu"), tmp_path, own) == min(machine, most)
    assert _runtime.usable_memory(torch.device("cpu")) <= machine
    alone = _runtime.usable_memory(torch.device("cpu"))
    monkeypatch.setattr(_runtime, "processes", lambda: (1, 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _runtime.usable_memory(torch.device("cpu")) == alone / 4


def test_cores_are_those_of_affinity_and_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for quota, cores in ((math.inf, 8), (1.5, 2), (0.3, 1), (20.0, 8)):
        monkeypatch.setattr(_runtime, "_quota", lambda quota=quota: quota)
        assert _runtime.usable_cores() == cores
    monkeypatch.setattr(_runtime, "_quota", lambda: 1.0)
    assert _runtime.idle_cores(4) == 1


def test_numba_does_not_lift_the_limit_of_the_environment(monkeypatch):
    """scanpy starts it, and it sets as many threads as there are cores, for torch, too."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(_runtime, "_quota", lambda: math.inf)
    for said, cores in (("3", 3), ("16", 8), ("", 8), ("4,2", 8), ("0", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert _runtime.usable_cores() == cores


@pytest.fixture
def four_cores(monkeypatch):
    """A machine with four cores, of which torch uses all; nothing is really started."""
    state = {"n": 4, "now": 0.0}
    monkeypatch.setattr(_runtime, "usable_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["n"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(n=n))
    monkeypatch.setattr(time, "perf_counter", lambda: state["now"])
    with av.settings.override(n_threads=None):
        yield state


def steps(threads, state, times, n):
    """Make steps that take as long as `times` says of their threads; how many threads each had."""
    had = []
    for _ in range(n):
        with threads.step():
            had.append(state["n"])
            state["now"] += times[state["n"]]
    return had


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({1: 4.0, 2: 2.0, 4: 1.0}, 4),
        ({1: 1.0, 2: 3.0, 4: 9.0}, 1),
        ({1: 3.0, 2: 1.0, 4: 6.0}, 2),
        ({1: 1.0, 2: 0.95, 4: 0.93}, 1),
    ],
)
def test_a_fit_takes_the_threads_with_which_its_steps_are_fastest(four_cores, times, best):
    threads = _runtime.Threads(torch.device("cpu"))
    had = steps(threads, four_cores, times, 12)
    assert [had.count(n) for n in (1, 2, 4)] == [_runtime.ROUNDS] * 3
    assert set(steps(threads, four_cores, times, 5)) == {best} and threads.n == best
    threads.epoch()
    assert not threads.measuring
    steps(threads, four_cores, dict.fromkeys(times, 3 * times[best]), 5)  # somebody else came
    threads.epoch()
    assert threads.measuring


def test_what_settles_the_threads(four_cores):
    with av.settings.override(n_threads=3):
        assert set(steps(_runtime.Threads(torch.device("cpu")), four_cores, {3: 1.0}, 20)) == {3}
    assert set(steps(_runtime.Threads(torch.device("cpu"), chosen=2), four_cores, {2: 1.0}, 20)) == {2}
    four_cores["n"] = 1  # OMP_NUM_THREADS=1
    assert set(steps(_runtime.Threads(torch.device("cpu")), four_cores, {1: 1.0}, 20)) == {1}


def test_a_fit_may_use_cores_that_were_busy_when_it_began(four_cores, monkeypatch):
    monkeypatch.setattr(_runtime, "idle_cores", lambda limit: 1)
    with _runtime.own_torch():
        assert four_cores["n"] == 1
        assert _runtime.Threads(torch.device("cpu")).candidates == [1, 2, 4]
    assert four_cores["n"] == 4


# the caller's torch -----------------------------------------------------------------------------------------------


def latent(**options):
    mdata = cite(200)
    av.tl.totalanvi(mdata, max_epochs=1, batch_key="batch", **options)
    return mdata.obsm["X_totalanvi"]


def test_the_callers_torch_makes_no_difference_and_is_put_back():
    expected = latent()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.device("meta"):
            found = latent()
            assert torch.is_inference_mode_enabled() and torch.empty(1).device.type == "meta"
        with torch.no_grad():
            again = latent()
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again, expected)


def test_threads_inside_put_the_callers_dtype_back_together():
    torch.set_default_dtype(torch.float64)
    inside, leave = threading.Barrier(2), threading.Event()

    def first():
        with _runtime.own_torch():
            inside.wait()

    def second():
        with _runtime.own_torch():
            inside.wait()
            leave.wait()
            assert torch.get_default_dtype() == torch.float32

    try:
        both = [threading.Thread(target=target) for target in (first, second)]
        for thread in both:
            thread.start()
        both[0].join()
        leave.set()
        both[1].join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_settings_of_a_block_are_those_of_its_thread():
    seen, inside, done = [], threading.Event(), threading.Event()

    def other():
        with av.settings.override(verbosity=7):
            inside.set()
            done.wait()
            seen.append(av.settings.verbosity)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    before = av.settings.verbosity
    with av.settings.override(verbosity=3):
        done.set()
        thread.join()
        assert av.settings.verbosity == 3
        av.settings.verbosity = 4  # until the block ends
        assert av.settings.verbosity == 4
    assert before != 7 and av.settings.verbosity == before and seen == [7]


# ending a fit -----------------------------------------------------------------------------------------------------


def press_in_epoch(monkeypatch, epoch, times=1):
    """Have Ctrl-C pressed in the middle of an epoch."""
    original, left = loop.run_step, [times]

    def step(state, *args, **options):
        if state.epoch == epoch and left[0]:
            left[0] -= 1
            signal.raise_signal(signal.SIGINT)
        return original(state, *args, **options)

    monkeypatch.setattr(loop, "run_step", step)


@pytest.fixture(autouse=True)
def _as_in_the_foreground():
    """A shell starts what runs in the background deaf to Ctrl-C, which processes hand on to those that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_fit_with_its_best_weights(monkeypatch, caplog):
    mdata = cite(600)
    press_in_epoch(monkeypatch, epoch=2)
    av.tl.totalanvi(mdata, max_epochs=20, batch_key="batch")
    history = av.get.history(mdata)
    assert len(history) == 3 and "Ctrl-C ended the fit in epoch 3 of 20" in caplog.text
    assert str(mdata.uns["totalanvi"]["params"]["ended"]) == "Ctrl-C"
    assert np.isfinite(mdata.obsm["X_totalanvi"]).all()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once():
    stop = _runtime.Stop()
    with pytest.raises(KeyboardInterrupt), stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "Ctrl-C"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_fit_goes_on_from_its_checkpoint(monkeypatch, tmp_path):
    whole = cite(600)
    options = {"max_epochs": 5, "batch_key": "batch"}
    av.tl.totalanvi(whole, **options)
    mdata = cite(600)
    with monkeypatch.context() as patch:
        press_in_epoch(patch, epoch=2)
        av.tl.totalanvi(mdata, checkpoint=tmp_path / "fit", key_added="cut", **options)
    av.tl.totalanvi(mdata, checkpoint=tmp_path / "fit", **options)
    np.testing.assert_array_equal(mdata.obsm["X_totalanvi"], whole.obsm["X_totalanvi"])
    assert len(av.get.history(mdata, model="totalanvi")) == 5 and "ended" not in mdata.uns["totalanvi"]["params"]


def test_threads_may_differ_in_precision():
    """torch has one switch for all: the step of one thread must not round the products of another, nor leave it on."""
    products, gpu = torch.backends.cuda.matmul, torch.device("cuda")
    name = "fp32_precision" if hasattr(products, "fp32_precision") else "allow_tf32"
    before, inside, done, seen = getattr(products, name), threading.Event(), threading.Event(), {}

    def rounded(number):
        with av.settings.override(precision="tf32"), step.arithmetic(gpu):
            seen[number] = getattr(products, name)
            inside.set()
            done.wait(0.3)  # another thread has time to get in between

    def exact():
        inside.wait(10)
        with av.settings.override(precision="float32"), step.arithmetic(gpu):
            seen["exact"] = getattr(products, name)

    threads = [
        threading.Thread(target=target, args=args) for target, args in ((rounded, (1,)), (rounded, (2,)), (exact, ()))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen[1] == seen[2] != before and seen["exact"] == before == getattr(products, name)


def test_max_minutes(caplog):
    mdata = cite(600)
    begun = time.monotonic()
    av.tl.scvi(mdata, max_epochs=10_000, early_stopping=False, max_minutes=0.05)
    assert time.monotonic() - begun < 30 and len(av.get.history(mdata)) < 10_000
    assert "max_minutes ended the fit in epoch" in caplog.text
    with pytest.raises(ValueError, match="max_minutes=0 must be above 0"):
        av.tl.scvi(mdata, max_minutes=0)


def test_an_application_keeps_its_own_handler():
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGINT, own)
    try:
        with _runtime.Stop():
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_in_a_process(tmp_path):
    """As a user would see it: one SIGINT, and the file is written all the same."""
    code = textwrap.dedent(f"""
        import anvi as av
        mdata = av.datasets.synthetic_cite(600, n_genes=100)
        av.settings.progress = "auto"
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=100_000, early_stopping=False)
        mdata.write({str(tmp_path / "x.h5mu")!r})
    """)
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stderr if "epoch 1/" in line)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(120) == 0 and "the fit ends after this step" in told
    assert (tmp_path / "x.h5mu").exists()
