"""One fit in several processes: who they are, which cells each takes in a step, and what they add up.

Every process (a rank) reads the data and starts from the same weights. It takes its share of each minibatch; weights of
cells, gradients and the sums of batch norms are added up over all ranks, none is averaged. So a step is the one that a
single process would make of the same minibatch, but for its noise, and all ranks keep equal weights. The first rank
alone validates, writes the checkpoint and has the answers.
"""

import hashlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from anvi._data.batches import StepCells
from anvi._runtime import processes
from anvi.nn.layers import BatchNorm
from anvi.nn.objective import Counted
from anvi.settings import settings

logger = logging.getLogger("anvi")

WAIT = timedelta(minutes=10)
"""How long a rank waits for another before it gives the fit up; one that has died is noticed at once."""

MEET = timedelta(minutes=1)
"""How long a rank waits for the others to begin their first fit; later, one may still make the answers of the last."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a fit, seen from one of them; alone, it adds up nothing."""

    device: torch.device
    rank: int = 0
    size: int = 1
    host: Any = None  # the process group for what lies on the CPU
    group: Any = None  # and for what lies on the device

    def share(self, choice: StepCells) -> StepCells:
        """The part of a step's cells that is this rank's, labelled cells first."""
        if self.size == 1:
            return choice

        def own(part: Tensor) -> Tensor:
            return part.tensor_split(self.size)[self.rank]

        n = choice.n_labelled
        labelled = own(choice.index[:n])
        return choice._replace(
            index=torch.cat([labelled, own(choice.index[n:])]),
            weight=torch.cat([own(choice.weight[:n]), own(choice.weight[n:])]),
            balanced=None if choice.balanced is None else own(choice.balanced),
            n_labelled=len(labelled),
        )

    def counted(self, weight: Tensor, target_weight: Tensor | None) -> Counted:
        """How many cells of a step count, on all ranks."""
        sums = [part.sum() for part in (weight, target_weight) if part is not None]
        if self.size > 1:
            sums = list(self.add_up(torch.stack(sums)))
        return Counted(sums[0], sums[1] if len(sums) > 1 else None)

    def add_up(self, value: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place."""
        if self.size > 1:
            with _lost():
                dist.all_reduce(value, group=self.group)
        return value

    def add_up_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add up gradients over the ranks, in place and all at once."""
        if self.size > 1:
            together = self.add_up(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for gradient, part in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        with _lost():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        return int(found)

    def of_first(self, fact: Callable[[], bytes]) -> bytes:
        """What the first rank finds, on all ranks."""
        if self.size == 1:
            return fact()
        found = bytearray(fact() if self.rank == 0 else b"")
        told = torch.zeros(self.largest(len(found)), dtype=torch.uint8)
        if found:
            told.copy_(torch.frombuffer(found, dtype=torch.uint8))
        with _lost():
            dist.broadcast(told, 0, group=self.host)
        return told.numpy().tobytes()

    def check_same(self, fingerprint: str) -> None:
        """Raise a ValueError unless all ranks have the same cells, options and first weights."""
        if self.size == 1:
            return
        own = torch.frombuffer(bytearray(hashlib.sha256(fingerprint.encode()).digest()), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _lost():
            dist.all_gather(found, own, group=self.host)
        other = [rank for rank, one in enumerate(found) if not torch.equal(one, found[0])]
        if other:
            raise ValueError(
                f"Process {other[0]} has other cells, counts, options or seeds than process 0: all processes of a fit "
                "must read the same file and be given the same arguments, random_state as a number and stream= among "
                "them. Fits of their own are started without torchrun."
            )

    def own_noise(self, noise: torch.Generator, *moment: int) -> None:
        """Noise of their own for all but the first rank, whose is that of a single process and of checkpoints."""
        if self.rank:
            noise.manual_seed(int(np.random.SeedSequence([*moment, self.rank]).generate_state(1)[0]))

    @contextmanager
    def together(self, *networks: nn.Module | None) -> Iterator[None]:
        """Start from the first rank's weights, and normalise by the minibatch of all ranks for a while."""
        if self.size == 1:
            yield
            return
        parts = [part for network in networks if network is not None for part in network.modules()]
        for part in parts:
            for value in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                with _lost():
                    dist.broadcast(value.detach(), 0, group=self.group)
        norms = [part for part in parts if isinstance(part, BatchNorm)]
        for norm in norms:
            norm.total = lambda value: _Sum.apply(value, self)
        try:
            yield
        finally:
            for norm in norms:
                norm.total = None


class _Sum(torch.autograd.Function):
    """A sum over the ranks; every rank's loss depends on it, so its gradient is such a sum, too."""

    @staticmethod
    def forward(ctx, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.add_up(value.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return ctx.ranks.add_up(gradient.clone(memory_format=torch.contiguous_format)), None


def meet() -> None:
    """Meet the other ranks before anything is read.

    Raises
    ------
    ConnectionError
        If this is the first fit of this process and not all others begin one within `MEET`.
    """
    if processes()[1] > 1:
        _meet()


@cache
def _meet() -> None:
    """Join a group that exists or make it, once."""
    rank, size = processes()
    try:
        if dist.is_initialized():
            dist.destroy_process_group(dist.new_group(backend="gloo", timeout=MEET))
            return
        store = next(dist.rendezvous("env://"))[0]  # what torchrun has opened for all
        store.set(f"anvi/{rank}", "")
        try:
            store.wait([f"anvi/{other}" for other in range(size)], MEET)
        except RuntimeError:
            store.delete_key(f"anvi/{rank}")  # so that whoever comes later does not wait for this one
            raise
    except RuntimeError as error:
        raise ConnectionError(
            f"Process {rank} began a fit, and not all of the {size} processes did so within {MEET.total_seconds():.0f} "
            "s. All must make the same call, with no 'if rank == 0' around it; a fit of one alone is started without "
            "torchrun and without init_process_group."
        ) from error
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=WAIT)  # a process can do so once


@contextmanager
def found(device: torch.device, checkpoint: Path | None) -> Iterator[Ranks]:
    """The ranks of this fit: those of the process group that is there, or those that torchrun has started.

    Parameters
    ----------
    device
        Where a single process would compute; of several GPUs, each rank takes its own.
    checkpoint
        What to go on from when a rank is lost.

    Raises
    ------
    ConnectionError
        If a rank dies, or does not answer for `WAIT`; the message says how to go on.
    """
    with nullcontext(Ranks(device)) if processes()[1] == 1 else _group(device, checkpoint) as ranks:
        yield ranks


@contextmanager
def _group(device: torch.device, checkpoint: Path | None) -> Iterator[Ranks]:
    """Meet the other ranks, and part when the fit is done."""
    rank, size = processes()
    device = _own_gpu(rank) if device.type == "cuda" and "LOCAL_RANK" in os.environ else device
    groups = []
    try:
        with _lost():
            groups += [dist.new_group(backend="gloo", timeout=WAIT)]
            groups += [dist.new_group(backend="nccl", timeout=WAIT)] if device.type == "cuda" else []
        logger.info(f"{size} processes share every minibatch")
        with _told_to_end():
            yield Ranks(device, rank, size, groups[0], groups[-1])
            with _lost():
                dist.barrier(groups[0])
    except ConnectionError as error:
        saved = checkpoint is not None and (rank > 0 or checkpoint.exists())
        goes_on = f"The same command, with any number of processes, goes on from {checkpoint}."
        if not saved:
            goes_on = "Nothing was saved yet: checkpoint= keeps the fit after every epoch."
        raise ConnectionError(f"{error} {goes_on}") from error
    finally:
        for group in groups:  # so that nobody waits for a rank that has failed
            dist.destroy_process_group(group)


def _own_gpu(rank: int) -> torch.device:
    """The GPU of this rank on its machine."""
    local, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= n:
        raise ValueError(f"Process {rank} has no GPU: there are {n} here. Use --nproc-per-node={n}, or device='cpu'.")
    torch.cuda.set_device(local)  # on which kernels are launched; the process has no other
    return torch.device("cuda", local)


@contextmanager
def _lost() -> Iterator[None]:
    """Turn what the libraries say when another rank does not answer into an error that says it."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error) or "no reason given").splitlines()[0].split(".cc:")[-1].split("] ", 1)[-1].split(". ")[0]
        raise ConnectionError(
            f"Another process of this fit has ended, or did not answer for {WAIT.total_seconds():.0f} s ({reason}). "
            "All must make the same call; a fit of one alone is started without the others."
        ) from error


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Let SIGTERM, by which torchrun ends all ranks when one has died, end a fit with an error."""

    def end(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise ConnectionError("This process of the fit was told to end (SIGTERM), as when another one has died.")

    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def one_voice() -> Iterator[None]:
    """Let the first process alone say what it does: the others would say the same."""
    if processes()[0] == 0:
        yield
        return
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with settings.override(progress=False):
            yield
    finally:
        logger.setLevel(level)
