"""The step as a CUDA graph: same signature and same numbers as the eager one, without its launches one by one.

What changes from step to step (cells, weights, the warm-up weight) is copied into tensors that stay where they are; the
graph reads them there. Learning rate and optimiser state are tensors, too, and the noise comes from a generator that
the graph knows. Where no graph can be had, steps stay eager, which is slower and otherwise the same.
"""

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from anvi._data.batches import StepCells
from anvi._data.cells import Cells
from anvi.nn import Weights

from .plan import Plan
from .step import Capacity, State, StepResult, run_step

logger = logging.getLogger("anvi")

EAGER_STEPS = 3
"""Steps that run eagerly before one is captured: libraries choose their kernels and the optimiser makes its state."""


class CapturedStep:
    """Runs steps like :func:`run_step`; the first few eagerly, then by replaying a captured one.

    A graph holds for one set of shapes, one room for counts, and with or without the adversary; when one of these
    changes, a new one is captured.

    Parameters
    ----------
    device
        Where the cells are: graphs and streams belong to a device, which need not be the current one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)  # one for all: the libraries keep a workspace for every stream
        self.graph: torch.cuda.CUDAGraph | None = None
        self.n_eager = 0
        self.room = Capacity(0, 0)
        self.fooling: bool | None = None
        self.gave_up = False

    def __call__(
        self,
        state: State,
        cells: Cells,
        choice: StepCells,
        group: Tensor,
        weights: Weights,
        plan: Plan,
        *,
        fooling: bool,
    ) -> StepResult:
        """One step; see :func:`run_step`. What it returns is overwritten by the next."""
        fits = choice.n_entries <= self.room.entries and choice.n_balanced_entries <= self.room.balanced_entries
        if fooling != self.fooling or not fits:
            self.graph, self.n_eager, self.fooling = None, 0, fooling
            self.room = Capacity(*(_with_reserve(n) for n in (choice.n_entries, choice.n_balanced_entries)))
        with torch.cuda.device(self.device):
            if self.n_eager >= EAGER_STEPS and self.graph is None and not self.gave_up:
                self._capture(state, cells, choice, group, weights, plan, fooling)
            if self.graph is None:
                self.n_eager += 1
                return self._beside(state, cells, choice, group, weights, plan, fooling)
            self._copy_in(choice, weights)
            self.graph.replay()
            return self.done

    def _beside(self, state, cells, choice, group, weights, plan, fooling) -> StepResult:
        """An eager step on the capturing stream, as capture wants it before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            done = run_step(state, cells, choice, group, weights, plan, fooling=fooling, room=self.room)
        torch.cuda.current_stream().wait_stream(self.stream)
        return done

    def _capture(self, state, cells, choice, group, weights, plan, fooling) -> None:
        """Record a step; nothing of the state changes, also where it fails, and then there is no graph."""
        self.choice = choice._replace(
            index=choice.index.clone(),
            weight=choice.weight.clone(),
            balanced=None if choice.balanced is None else choice.balanced.clone(),
        )
        self.kl = torch.zeros((), device=choice.index.device)
        self._copy_in(choice, weights)
        still = weights._replace(kl=self.kl)
        _forget_gradients(state)  # they then live in the memory of the graph
        noise_before, stream_before = state.noise.get_state(), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # later versions of torch find the generators themselves, and say so
            graph.register_generator_state(state.noise)
        try:
            with _no_collection(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.done = run_step(state, cells, self.choice, group, still, plan, fooling=fooling, room=self.room)
        except RuntimeError as error:  # out of memory, too, and what CUDA refuses inside a capture
            cause = error.__context__ or error  # ending a capture that has failed raises an error of its own
            reason = f"{type(cause).__name__}: {(str(cause) or 'no reason given').splitlines()[0]}"
        else:
            self.graph = graph
            return
        logger.warning(f"no CUDA graph of a step ({reason}): the fit goes on step by step, several times slower")
        self.gave_up, self.done = True, None
        torch.cuda.set_stream(stream_before)  # the failed capture has left its own
        _forget_gradients(state)
        # a generator that was part of a failed capture may refuse to draw
        state.noise = torch.Generator(state.noise.device)
        state.noise.set_state(noise_before)
        del graph
        torch.cuda.empty_cache()

    def _copy_in(self, choice: StepCells, weights: Weights) -> None:
        self.choice.index.copy_(choice.index)
        self.choice.weight.copy_(choice.weight)
        if choice.balanced is not None:
            self.choice.balanced.copy_(choice.balanced)
        self.kl.fill_(weights.kl)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and not inside: what belongs to CUDA must not be freed while a graph is captured."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _forget_gradients(state: State) -> None:
    for optimizer in (state.optimizer, state.adversary_optimizer):
        if optimizer is not None:
            optimizer.forget_gradients()


def _with_reserve(n: int) -> int:
    """A sixteenth more than the largest step of an epoch, in steps of 1,024, so that few epochs need more."""
    return -(-n * 17 // 16 // 1_024) * 1_024 if n else 0
