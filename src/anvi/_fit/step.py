"""One step of a fit: the same function runs eagerly and inside a CUDA graph."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.adam import adam

from anvi._data.batches import StepCells, take
from anvi._data.cells import Cells
from anvi.nn import DIVERGENCES, VAE, Batch, Terms, Weights, loss
from anvi.nn.config import Entries
from anvi.nn.layers import Draws, Linear, Stack
from anvi.nn.objective import classification_loss
from anvi.settings import settings

from .plan import Plan
from .ranks import Ranks


class Adversary(nn.Module):
    """Predicts the batch (or panel) of a cell from its latent vector.

    Parameters
    ----------
    n_latent
        Width of the latent space.
    n_groups
        How many batches or panels.
    generator
        Source of the initial weights.
    """

    def __init__(self, n_latent: int, n_groups: int, generator: torch.Generator):
        super().__init__()
        self.stack = Stack(n_latent, 32, 2, dropout=0.1)
        self.head = Linear(32, n_groups)
        for module in self.modules():
            if isinstance(module, Linear):
                module.reset(generator)

    def forward(self, z: Tensor, draws: Draws) -> Tensor:
        """Log-probabilities of the groups `(cells, groups)`."""
        return self.head(self.stack(z, None, draws), None).log_softmax(-1)

    def fooling_loss(
        self, z: Tensor, group: Tensor, weight: Tensor, draws: Draws, n_cells: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy to a uniform guess among the other groups: small when the group does not show."""
        log_p = self(z, draws)
        of_others = log_p.sum(1) - log_p.gather(1, group[:, None]).squeeze(1)
        per_cell = -of_others / (log_p.shape[1] - 1)
        return (weight * per_cell).sum() / (weight.sum() if n_cells is None else n_cells)

    def own_loss(self, z: Tensor, group: Tensor, weight: Tensor, draws: Draws, n_cells: Tensor | None = None) -> Tensor:
        """Cross-entropy of the classifier itself; no gradient reaches the latent vectors."""
        per_cell = functional.cross_entropy(self(z.detach(), draws), group, reduction="none")
        return (weight * per_cell).sum() / (weight.sum() if n_cells is None else n_cells)


class Slot(NamedTuple):
    """What Adam knows of a parameter."""

    step: Tensor  # () how many it has made
    exp_avg: Tensor  # mean of the gradient, in the shape of the parameter
    exp_avg_sq: Tensor  # and of its square


class Adam:
    """Adam (Kingma and Ba 2015), fused: the step of `torch.optim.Adam`.

    Making one of torch's loads its compiler, 0.8 s and 80 MB in every process.

    Parameters
    ----------
    parameters
        What to train.
    rate
        Learning rate.
    eps, weight_decay
        As in torch.
    """

    def __init__(self, parameters: Iterable[Tensor], rate: float, eps: float = 1e-8, weight_decay: float = 0.0):
        self.parameters, self.eps, self.weight_decay = list(parameters), eps, weight_decay
        self.on_gpu = self.parameters[0].is_cuda
        self.rate = torch.tensor(rate, device=self.parameters[0].device) if self.on_gpu else rate
        self.slots: dict[int, Slot] = {}  # of parameters that have had a gradient

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        if isinstance(self.rate, Tensor):  # a graph reads it from this place
            self.rate.fill_(rate)
        else:
            self.rate = rate

    def forget_gradients(self) -> None:
        """Let go of all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, gradient_scale: Tensor | None = None) -> None:
        """Follow the gradients, divided by a scale on the way."""
        with_gradient = [i for i, one in enumerate(self.parameters) if one.grad is not None]
        for i in set(with_gradient) - set(self.slots):
            self.slots[i] = self._new_slot(i)
        trained, slots = [self.parameters[i] for i in with_gradient], [self.slots[i] for i in with_gradient]
        adam(
            params=trained,
            grads=[one.grad for one in trained],
            exp_avgs=[slot.exp_avg for slot in slots],
            exp_avg_sqs=[slot.exp_avg_sq for slot in slots],
            max_exp_avg_sqs=[],
            state_steps=[slot.step for slot in slots],
            fused=True,
            capturable=self.on_gpu,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.rate,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
            grad_scale=gradient_scale,
        )

    def _new_slot(self, i: int) -> Slot:
        like = self.parameters[i]
        return Slot(like.new_zeros(()), torch.zeros_like(like), torch.zeros_like(like))

    def state_dict(self) -> dict[str, Tensor]:
        """What it knows, by number of the parameter and name."""
        return {f"{i}/{name}": value for i, slot in self.slots.items() for name, value in slot._asdict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Know what another one knew; its own tensors stay where they are."""
        known = {int(name.partition("/")[0]) for name in state}
        self.slots = {i: self.slots.get(i) or self._new_slot(i) for i in known}
        for name, value in self.state_dict().items():
            value.copy_(state[name])


TERMS = ("reconstruction_rna", "reconstruction_protein", *DIVERGENCES)


@dataclass
class State:
    """All that changes in a fit, and all that a checkpoint keeps."""

    network: VAE
    optimizer: Adam
    adversary: Adversary | None
    adversary_optimizer: Adam | None
    shuffle: torch.Generator  # CPU
    noise: torch.Generator  # on the device
    ranks: Ranks  # which a checkpoint does not keep
    epoch: int = 0
    lr_scale: float = 1.0
    retries: int = 0
    best_loss: float = float("inf")
    best_epoch: int = -1
    best_weights: dict[str, Tensor] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False
    n_threads: int = 0  # that were measured to be best; 0: not yet

    @property
    def parts(self) -> dict[str, nn.Module | Adam]:
        """What has a `state_dict`."""
        names = ("network", "optimizer", "adversary", "adversary_optimizer")
        return {name: part for name in names if (part := getattr(self, name)) is not None}


class Capacity(NamedTuple):
    """Places for non-zero counts, the same in every step that a graph replays."""

    entries: int
    balanced_entries: int


class StepResult(NamedTuple):
    """What is known after a step, on the device."""

    loss: Tensor  # ()
    names: tuple[str, ...]  # of the sums
    numbers: Tensor  # (1 + sums,) the loss and the sums of every term over the cells


_PRODUCTS = threading.Lock()
"""Held by the step of one thread: torch has one precision of products for the whole process."""


@contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """Matrix products as `settings.precision` says, whatever another thread's says; all else stays in float32."""
    if device.type == "cpu":  # which has no tf32
        yield
        return
    tf32, products = settings.precision == "tf32", torch.backends.cuda.matmul
    # torch refuses the older name once somebody has used the newer one, which torch 2.6 does not have
    name, value = ("fp32_precision", "tf32") if hasattr(products, "fp32_precision") else ("allow_tf32", True)
    with _PRODUCTS:
        before = getattr(products, name) if tf32 else None
        try:
            if tf32:
                setattr(products, name, value)
            yield
        finally:
            if tf32:
                setattr(products, name, before)


def run_step(
    state: State,
    cells: Cells,
    choice: StepCells,
    group: Tensor,
    weights: Weights,
    plan: Plan,
    *,
    fooling: bool,
    room: Capacity | None = None,
) -> StepResult:
    """Take the minibatches of one step from the cells, and update the network and the adversary with them.

    With `room`, every shape is known before and nothing waits for the device: this is what a CUDA graph captures.

    Parameters
    ----------
    state
        What changes.
    cells
        All cells, on the device.
    choice
        Which of them.
    group
        `(all cells,)`, what the adversary tells apart.
    weights
        How the terms are weighed; the divergences by a number or a tensor on the device.
    plan
        Options of the fit.
    fooling
        Whether the adversary takes part.
    room
        How many non-zero counts to make room for; None: as many as there are.
    """
    dense, (entries, balanced_entries) = state.network.needs_dense_counts, room or (None, None)
    batch = take(cells, choice.index, choice.weight, choice.n_labelled, dense=dense, room=entries)
    labelled = None
    if choice.balanced is not None:
        labelled = take(cells, choice.balanced, None, len(choice.balanced), dense=dense, room=balanced_entries)
    batch, *rest = augment(
        [batch] if labelled is None else [batch, labelled],
        cells.x.n_columns,
        state.noise,
        hide_proteins=plan.hide_proteins,
        thin_counts=plan.thin_counts,
        hide_rna=plan.hide_rna,
    )
    labelled = rest[0] if rest else None
    with arithmetic(cells.label.device):
        of_cells = group[choice.index] if fooling else None
        terms, value, surprise = step(state, batch, labelled, of_cells, weights, plan)
    sums = summarise(terms, batch, surprise)
    # one vector, made where a graph can take it up, so that the loop has one thing to keep
    return StepResult(value, tuple(sums), torch.stack([value, *(part.to(value.dtype) for part in sums.values())]))


def step(
    state: State, batch: Batch, labelled: Batch | None, group: Tensor | None, weights: Weights, plan: Plan
) -> tuple[Terms, Tensor, Tensor | None]:
    """One update of the network, and of the adversary, where there are groups for it to tell apart.

    Returns
    -------
    The terms of the minibatch, the detached loss, and the sum of the cross-entropy over its labelled cells, if at hand.
    """
    network, draws = state.network, Draws(state.noise)
    # for the forward pass alone: the backward pass takes each product in the precision of its forward one
    rounded, kind = settings.precision == "bf16", batch.label.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=rounded, cache_enabled=False):
        terms = network.terms(batch, labelled, draws)
        counted = state.ranks.counted(batch.weight, terms.target_weight)
        surprise = None if terms.logits is None else classification_loss(terms, weights.smoothing, counted.labelled)
        total = objective = loss(terms, batch.weight, weights, network.config, counted, surprise)
        if group is not None:  # fades as the divergences gain weight, as published; where these stop early, it stays
            state.adversary.train()
            seen = terms.z, group, batch.weight, draws, counted.cells
            total = objective + (1 - weights.kl) * state.adversary.fooling_loss(*seen)
    state.optimizer.forget_gradients()
    total.backward(inputs=state.optimizer.parameters)  # no gradient of the adversary: it has a loss of its own
    gradients = [parameter.grad for parameter in state.optimizer.parameters if parameter.grad is not None]
    state.ranks.add_up_gradients(gradients)
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    state.optimizer.step((norm / plan.max_grad_norm).clamp(min=1))  # clipping without a pass of its own
    if group is not None:
        state.adversary_optimizer.forget_gradients()
        state.adversary.own_loss(*seen).backward()
        state.ranks.add_up_gradients([parameter.grad for parameter in state.adversary.parameters()])
        state.adversary_optimizer.step()
    # a gradient that is not finite has spoilt the weights as much as a loss would have
    value = objective.detach() + 0 * norm
    return terms, value, None if surprise is None or weights.smoothing else surprise.detach() * counted.labelled


def summarise(terms: Terms, batch: Batch, surprise: Tensor | None = None) -> dict[str, Tensor]:
    """Weighted sums over the cells of a minibatch, on the device; `surprise` is that of the cross-entropy, if known."""
    weight = batch.weight
    per_cell = {"cells": torch.ones_like(weight)}
    per_cell |= {name: value for name in TERMS if (value := getattr(terms, name)) is not None}
    together = (weight * torch.stack(list(per_cell.values())).detach()).sum(1)  # one sum instead of one for each
    sums = dict(zip(per_cell, together.unbind(), strict=True))
    if terms.logits is None:
        return sums
    best = terms.logits.argmax(1)
    right = best == terms.target
    if terms.target_allowed is not None:
        right = terms.target_allowed.gather(1, best[:, None]).squeeze(1)
    n, right = terms.target_weight.sum(), terms.target_weight * right  # padding counts for nothing
    surprise = classification_loss(terms).detach() * n if surprise is None else surprise
    return sums | {"labelled": n, "classification_loss": surprise, "accuracy": right.sum()}


# input augmentation: counts thinned, efficiencies per gene, proteins and RNA hidden ----------------------------------

SHALLOWEST = 0.3
"""Least share of its counts that a thinned cell keeps; the most is all of them."""
SPREAD = 0.3
"""Standard deviation of the log efficiency of a gene; drawn for every step, and the same in all its cells."""


def augment(
    batches: list[Batch],
    n_genes: int,
    noise: torch.Generator,
    *,
    hide_proteins: float,
    thin_counts: float,
    hide_rna: float = 0.0,
) -> list[Batch]:
    """The minibatches of a step with some counts, proteins and RNA hidden from the encoder.

    Parameters
    ----------
    batches
        One or two minibatches.
    n_genes
        Genes of the data.
    noise
        On the device.
    hide_proteins, thin_counts, hide_rna
        Shares of the cells whose proteins, some of whose counts, and whose RNA are hidden; no cell loses both.
    """
    if hide_proteins > 0 and batches[0].y is not None:
        batches = [_without_proteins(batch, hide_proteins, noise) for batch in batches]
    if thin_counts > 0:
        log_efficiency = SPREAD * torch.empty(n_genes, device=noise.device).normal_(generator=noise)
        batches = [_thinned(batch, thin_counts, log_efficiency.exp(), noise) for batch in batches]
    if hide_rna > 0 and batches[0].y is not None:
        batches = [_without_rna(batch, hide_rna, noise) for batch in batches]
    return batches


def _without_rna(batch: Batch, share: float, noise: torch.Generator) -> Batch:
    shown = batch.measured if batch.shown is None else batch.shown
    hidden = torch.empty_like(batch.weight).uniform_(generator=noise) < share  # (cells,)
    hidden &= shown.any(1)
    entries = batch.seen or (Entries.of(batch.x) if batch.entries is None else batch.entries)
    return batch._replace(seen=entries._replace(count=entries.count.where(~hidden[entries.row], 0.0)))


def _without_proteins(batch: Batch, share: float, noise: torch.Generator) -> Batch:
    seen = torch.empty_like(batch.weight).uniform_(generator=noise) >= share  # (cells,)
    seen = seen if batch.has_rna is None else seen | ~batch.has_rna
    return batch._replace(shown=batch.measured & seen[:, None])


def _thinned(batch: Batch, share: float, efficiency: Tensor, noise: torch.Generator) -> Batch:
    """Keep each count with a probability of its cell and gene.

    Instead of binomial numbers, which are slow to draw, rounded normal ones of the same mean and variance: counts of 1
    are kept as often to within a few percent, and so is what large counts lose.
    """
    row, column, count = Entries.of(batch.x) if batch.entries is None else batch.entries
    thinned = torch.empty_like(batch.weight).uniform_(generator=noise) < share  # (cells,)
    depth = torch.empty_like(batch.weight).uniform_(SHALLOWEST, 1.0, generator=noise)
    kept = torch.where(thinned[row], depth[row] * efficiency[column], 1.0).clamp_(max=1)  # (entries,)
    mean = count * kept
    fewer = torch.empty_like(mean).normal_(generator=noise).mul_((mean * (1 - kept)).sqrt_()).add_(mean)
    return batch._replace(seen=Entries(row, column, torch.minimum(fewer.round_().clamp_(min=0), count)))
