"""A short run of the fuzzer and of the kills, always the same; `python tests/fuzz.py --minutes 10` is the long one."""

import os
import shutil
import signal
import time
from collections import Counter

import fuzz
import numpy as np
import pytest

import anvi as av

FILES, KILLS = 40, 12


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    with av.settings.override(progress=False, device="cpu", verbosity=0, n_threads=1):
        return fuzz.make_kinds(tmp_path_factory.mktemp("fuzz"))


def test_spoilt_files_give_the_right_answer_or_an_error_of_our_own(kinds, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # what a file would execute would leave its trace here
    verdicts, bad = Counter(), []
    for number, sort, outcome in fuzz.fuzz(kinds, 0, lambda number: number < FILES):
        verdicts[outcome.verdict] += 1
        if outcome.verdict not in fuzz.OK:
            bad.append(f"{number} {sort}: {outcome}")
        assert outcome.megabytes < 1_000, (number, sort, outcome)
    assert bad == []
    assert verdicts["refused"] > FILES / 2
    assert list(tmp_path.iterdir()) == []


def test_the_fuzzer_sees_what_it_is_for(kinds, monkeypatch):
    """A reader that dies, one that hangs, one that answers otherwise, and one with an error of a library."""
    slot = kinds["slot"]
    slot.reset()
    whole = slot.read()
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    for read, verdict in (
        (lambda: whole, "right"),
        (lambda: whole + b"1", "changed"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "crash"),
        (lambda: time.sleep(30), "hang"),
        (lambda: all(True for _ in iter(int, 1)), "hang"),
        (lambda: int("x"), "raw"),
        (lambda: np.zeros(2**40), "raw"),
    ):
        monkeypatch.setattr(slot, "read", read)
        assert fuzz.examine(slot, whole, other_may_be_right=False).verdict == verdict


@pytest.mark.parametrize("name", ["folder", "folder, no exchange", "checkpoint", "file"])
def test_a_killed_writer_leaves_the_newest_state(kinds, tmp_path, name):
    write, read = fuzz.make_writers(kinds, tmp_path)[name]
    for seed in range(KILLS // 4):
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert fuzz.kill_writer(write, read, np.random.default_rng(seed)) == ""


def test_a_writer_that_tears_is_seen(tmp_path):
    file = tmp_path / "file"

    def write(number: int) -> None:
        file.write_bytes(b"")
        file.write_bytes(f"{number:09d}".encode() * 500_000)

    def read() -> int:
        raw = file.read_bytes()
        return int(raw[:9]) if len(raw) == 4_500_000 else -1

    assert any(fuzz.kill_writer(write, read, np.random.default_rng(seed)) for seed in range(40))
