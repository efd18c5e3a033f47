"""The step as a CUDA graph: same signature and same numbers as the eager one, without its launches one by one.

What changes from step to step (cells, weights, the warm-up weight) is copied into tensors that stay where they are; the
graph reads them there. Learning rate and optimiser state are tensors, too, and the noise comes from a generator that
the graph knows.
"""

import torch
from torch import Tensor

from anvi._data.batches import StepCells
from anvi._data.cells import Cells
from anvi.nn import Weights

from .plan import Plan
from .step import Capacity, State, StepResult, run_step

EAGER_STEPS = 3
"""Steps that run eagerly before one is captured: libraries choose their kernels and the optimiser makes its state."""


class CapturedStep:
    """Runs steps like :func:`run_step`; the first few eagerly, then by replaying a captured one.

    A graph holds for one set of shapes, one room for counts, and with or without the adversary; when one of these
    changes, a new one is captured.
    """

    def __init__(self):
        self.graph: torch.cuda.CUDAGraph | None = None
        self.n_eager = 0
        self.room = Capacity(0, 0)
        self.fooling: bool | None = None

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
        if self.n_eager < EAGER_STEPS:
            self.n_eager += 1
            return self._beside(state, cells, choice, group, weights, plan, fooling)
        if self.graph is None:
            self._capture(state, cells, choice, group, weights, plan, fooling)
        self._copy_in(choice, weights)
        self.graph.replay()
        return self.done

    def _beside(self, state, cells, choice, group, weights, plan, fooling) -> StepResult:
        """An eager step on a stream of its own, as capture wants it before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            done = run_step(state, cells, choice, group, weights, plan, fooling=fooling, room=self.room)
        torch.cuda.current_stream().wait_stream(stream)
        return done

    def _capture(self, state, cells, choice, group, weights, plan, fooling) -> None:
        self.choice = choice._replace(
            index=choice.index.clone(),
            weight=choice.weight.clone(),
            balanced=None if choice.balanced is None else choice.balanced.clone(),
        )
        self.kl = torch.zeros((), device=choice.index.device)
        self._copy_in(choice, weights)
        still = weights._replace(kl=self.kl)
        state.optimizer.zero_grad(set_to_none=True)  # gradients then live in the memory of the graph
        if state.adversary is not None:
            state.adversary_optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(state.noise)
        with torch.cuda.graph(self.graph):
            self.done = run_step(state, cells, self.choice, group, still, plan, fooling=fooling, room=self.room)

    def _copy_in(self, choice: StepCells, weights: Weights) -> None:
        self.choice.index.copy_(choice.index)
        self.choice.weight.copy_(choice.weight)
        if choice.balanced is not None:
            self.choice.balanced.copy_(choice.balanced)
        self.kl.fill_(weights.kl)


def _with_reserve(n: int) -> int:
    """A quarter more, in steps of 1,024, so that few steps of a fit need more room than the first."""
    return -(-n * 5 // 4 // 1_024) * 1_024 if n else 0
