"""The process that a verb runs in: CPU threads, default dtype and device, grad mode; set for its while and put back."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch

from .settings import settings

logger = logging.getLogger("anvi")

_Verb = TypeVar("_Verb", bound=Callable)

ROUNDS = 4
"""Steps that are timed with each number of threads; the first is not counted, for it starts the threads."""
SLOWER = 2.0
"""How many times as long as when they were chosen steps may take before the number of threads is measured anew."""
WORTH = 0.9
"""More threads must take at most this share of the time of fewer: near a draw, the cores are better left to others."""


# the caller's torch -----------------------------------------------------------------------------------------------

_LOCK = threading.Lock()
_CALLERS_THREADS: ContextVar[int | None] = ContextVar("anvi_threads", default=None)
_USERS = {"count": 0, "dtype": torch.float32}


@contextmanager
def own_torch() -> Iterator[None]:
    """Run a verb in float32 on the CPU by default, with gradients on, whatever the caller has set; then put it back.

    The default dtype belongs to the whole process: with several threads inside, the last one out puts it back.
    """
    with _LOCK:
        if not _USERS["count"]:
            _USERS["dtype"] = torch.get_default_dtype()
        _USERS["count"] += 1
        torch.set_default_dtype(torch.float32)
    before, gpu = torch.get_num_threads(), torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    token = _CALLERS_THREADS.set(_CALLERS_THREADS.get() or before)  # of the outermost verb
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):  # what is rounded is `settings.precision`
                stack.enter_context(torch.autocast(kind, enabled=False))
            # torch.get_default_device does not see a `with torch.device(...)` before torch 2.7
            if torch.empty(0).device.type != "cpu":  # costs time at every call of torch: only where it is needed
                stack.enter_context(torch.device("cpu"))
            _set_threads(settings.n_threads or idle_cores(before))
            yield
    finally:
        _CALLERS_THREADS.reset(token)
        _set_threads(before)
        if torch.cuda.is_initialized() and torch.cuda.current_device() != gpu:
            torch.cuda.set_device(gpu)
        with _LOCK:
            _USERS["count"] -= 1
            if not _USERS["count"]:
                torch.set_default_dtype(_USERS["dtype"])


def made_current(device: torch.device) -> torch.device:
    """The device, the current one until the verb ends: Triton launches kernels there, wherever the tensors are."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def verb(function: _Verb) -> _Verb:
    """A public function that runs on torch, in its own state of it."""
    return own_torch()(function)  # type: ignore[return-value]


def _set_threads(n: int) -> None:
    if n != torch.get_num_threads():
        torch.set_num_threads(n)


def processes() -> tuple[int, int]:
    """The number of this process, from 0, among those of torch.distributed or torchrun, and how many they are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


# threads ----------------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores that this process may use: by affinity, the quota of its control group and `OMP_NUM_THREADS`, if any.

    The latter is asked anew: scanpy starts numba, which sets another number of threads for torch, too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, math.ceil(min(cores, _quota(), int(wanted) if wanted.isdecimal() and int(wanted) else math.inf)))


ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where control groups are, and which those of this process are."""


def _control_groups(controller: str, root: Path = ROOT, own: Path = OWN) -> set[Path]:
    """Folders of the control groups of this process (versions 1 and 2)."""
    folders = {root, root / controller}
    try:
        for line in own.read_text().splitlines():  # "0::/user.slice" or "4:cpu,cpuacct:/docker/..."
            path = line.split(":", 2)[2].lstrip("/")
            folders |= {
                base / parent for base in (root, root / controller) for parent in (Path(path), *Path(path).parents)
            }
    except (OSError, IndexError):
        pass
    return folders


def _quota(root: Path = ROOT, own: Path = OWN) -> float:
    """Cores that the control groups of this process allow; infinite without a limit."""
    limits = [math.inf]
    for folder in _control_groups("cpu", root, own):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1"):
                limits.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue
    return min(limits)


def usable_memory(device: torch.device, root: Path = ROOT, own: Path = OWN) -> float:
    """Bytes of memory for this process: its part of the machine's or of its control group's, and the device's."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes()[1] > 1 else 1
    limits = [math.inf]
    try:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not Unix
        pass
    for folder in _control_groups("memory", root, own):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(float((folder / name).read_text()))
            except (OSError, ValueError):  # "max"
                continue
    return min(min(limits) / sharing, torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf)


def idle_cores(limit: int) -> int:
    """At most `limit`, and as many as are usable and not busy with the work of others right now; at least one."""
    most = min(limit, usable_cores())
    if most == 1:
        return 1
    try:
        running = []
        for _ in range(5):
            stat = Path("/proc/stat").read_text()
            running.append(int(stat.split("procs_running ", 1)[1].split(None, 1)[0]) - 1)  # but for ourselves
            time.sleep(0.001)
    except (OSError, IndexError, ValueError):  # not Linux
        return most
    return max(1, min(most, (os.cpu_count() or 1) - int(statistics.median(running))))


def give_back_memory() -> None:
    """Hand memory that was freed back to the system: glibc keeps it, 0.2 GB after a million cells were read."""
    with suppress(AttributeError, OSError, TypeError):  # other systems need no asking
        ctypes.CDLL(None).malloc_trim(0)


class Threads:
    """The number of CPU threads of a fit: measured on its own first steps, and again when these have become slow.

    With more threads than idle cores, a step waits for the slowest of them at each of its operations: on a busy machine
    two threads have been seen to take six times as long as one. `settings.n_threads` or a limit of one settles it.
    """

    def __init__(self, device: torch.device, chosen: int = 0):
        # not what was idle when the verb began: that may change
        limit = min(_CALLERS_THREADS.get() or torch.get_num_threads(), usable_cores())
        self.n = chosen or settings.n_threads or limit
        halved = [limit >> i for i in range(limit.bit_length())][::-1]  # from one to the limit
        self.candidates = [] if device.type != "cpu" or chosen or settings.n_threads else halved
        if len(self.candidates) == 1:
            self.candidates = []
        self.times: dict[int, list[float]] = {}
        self.measuring = bool(self.candidates)
        self.usual = math.inf
        self.recent: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step: sets the threads, and takes the time where that is needed."""
        n = min(self.candidates, key=lambda n: len(self.times.get(n, ()))) if self.measuring else self.n
        _set_threads(n)
        begun = time.perf_counter()
        yield
        taken = time.perf_counter() - begun
        if not self.measuring:
            self.recent.append(taken)
            return
        self.times.setdefault(n, []).append(taken)
        if all(len(self.times.get(n, ())) >= ROUNDS for n in self.candidates):
            self._choose()

    def _choose(self) -> None:
        median = {n: statistics.median(self.times[n][1:]) for n in self.candidates}
        best = self.candidates[0]
        for n in self.candidates[1:]:  # from few to many
            best = n if median[n] < WORTH * median[best] else best
        self.n, self.usual, self.measuring, self.times = best, median[best], False, {}
        told = ", ".join(f"{n}: {1000 * median[n]:.0f} ms" for n in self.candidates)
        logger.info(f"training with {best} of {self.candidates[-1]} threads (a step takes with {told})")

    def epoch(self) -> None:
        """After an epoch: measure anew where its steps took much longer than when the threads were chosen."""
        if self.candidates and self.recent and statistics.median(self.recent) > SLOWER * self.usual:
            self.measuring = True
        self.recent = []


# stopping ---------------------------------------------------------------------------------------------------------


class Stop:
    """Whether a fit shall end before its time: Ctrl-C was pressed, or its minutes are over.

    The first Ctrl-C ends a fit after the step that is running, with the best weights so far; a second one raises
    KeyboardInterrupt at once. Signals reach the main thread only; a fit elsewhere just watches the clock.
    """

    REASONS = (None, "max_minutes", "Ctrl-C")

    def __init__(self, deadline: float = math.inf, agree: Callable[[int], int] = int):
        self.deadline = deadline  # of time.monotonic()
        self.agree = agree  # the largest number, of a reason, that any process of the fit has
        self.pressed = False
        self.before = None

    @property
    def reason(self) -> str | None:
        """Why the fit shall end: "Ctrl-C" or "max_minutes"; None: it shall not."""
        return self.REASONS[self.agree(2 if self.pressed else int(time.monotonic() >= self.deadline))]

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            there = signal.getsignal(signal.SIGINT)
            if there is signal.default_int_handler:  # an application that has its own keeps it
                self.before = there
                signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            signal.default_int_handler(number, frame)
        self.pressed = True
        logger.warning("Ctrl-C: the fit ends after this step and keeps its best weights; press again to stop at once")

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
