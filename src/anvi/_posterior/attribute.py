"""Why a class: attributions of class logits to genes and proteins, cell by cell in blocks, and what they sum up to.

Source: spec section 5.1.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.batches import take
from anvi._data.cells import Cells
from anvi._model import Model
from anvi.nn import VAE, Batch, Draws

from .encode import blocks
from .integrate import Baseline, integrate, midpoints, of_rows

BLOCK = 256
"""Cells that are read at once; bounds the memory, changes nothing in the result."""

FROM_ZERO = 4
"""Power of :func:`midpoints` for lines from zero counts."""

DOUBLINGS = 5
"""How often the points on a cell's lines are doubled if its attributions are not complete."""

TOLERANCE = 0.01
"""Error of the sum of a cell's attributions, relative to what they should sum to, up to which they are complete."""


class Explained(NamedTuple):
    """Attributions of some cells, in logit units."""

    index: Tensor  # (cells,) positions in Cells
    rna: Tensor  # (cells, genes)
    rna_presence: Tensor  # (cells, genes) the part of it from lines on which the count rises
    protein: Tensor | None  # (cells, proteins) NaN where not measured
    protein_presence: Tensor | None  # (cells, proteins) NaN where not measured
    difference: Tensor  # (cells,) target at the cell minus target at its baseline, by the network itself

    @property
    def delta(self) -> Tensor:
        """Sum of the attributions minus what they should sum to `(cells,)`: the error of the quadrature."""
        total = self.rna.double().sum(1)
        if self.protein is not None:
            total = total + self.protein.double().nansum(1)
        return total - self.difference

    @property
    def complete(self) -> Tensor:
        """Whether this error is small against what they should sum to `(cells,)`."""
        return self.delta.abs() <= TOLERANCE * self.difference.abs()


Baselines = Callable[[Batch, Tensor], Iterator[Baseline]]
"""Gives for a minibatch, and the places of its cells among those to explain, one or more baselines."""


def explain(
    model: Model, cells: Cells, index: Tensor, target: Tensor, baselines: Baselines, n_steps: int
) -> Iterator[Explained]:
    """Attributions block by block; memory depends on :data:`BLOCK`, not on the number of cells.

    Parameters
    ----------
    model
        With labels, on the device of the cells.
    cells
        Read with the model's setup, with counts.
    index
        Positions of the cells to explain.
    target
        `(cells to explain, classes)`: what is explained is the logits times this. One class: 1 there; a contrast of two
        classes: 1 and -1.
    baselines
        Where the lines start; attributions are averaged over the baselines of a cell.
    n_steps
        Points on each line. Cells whose attributions are not complete get twice as many, up to :data:`DOUBLINGS` times.
    """
    network = model.network.eval()
    for places in torch.arange(len(index), device=index.device).split(BLOCK):
        batch = take(cells, index[places])
        # cells with as many genes together: the widest cell of a pass decides what all its cells cost
        order = (batch.x != 0).sum(1).argsort()
        places, batch = places[order], of_rows(batch, order)
        found = _average(network, batch, places, index[places], target[places], baselines, n_steps)
        for doubling in range(DOUBLINGS):
            short = (~found.complete).nonzero().squeeze(1)
            if not len(short):
                break
            some, steps = places[short], n_steps * 2 ** (doubling + 1)
            better = _average(network, of_rows(batch, short), some, index[some], target[some], baselines, steps)
            for old, new in zip(found, better, strict=True):
                if old is not None:
                    old[short] = new
        yield found


def _average(
    network: VAE, batch: Batch, places: Tensor, index: Tensor, target: Tensor, baselines: Baselines, n_steps: int
) -> Explained:
    """Attributions of a minibatch, averaged over its baselines."""
    rna, rna_presence = torch.zeros_like(batch.x), torch.zeros_like(batch.x)
    protein = None if batch.y is None else torch.zeros_like(batch.y)
    protein_presence = None if batch.y is None else torch.zeros_like(batch.y)
    start, n_lines = 0.0, 0
    for baseline in baselines(batch, places):
        rule = midpoints(n_steps, 1 if baseline.x is not None else FROM_ZERO)
        by_gene, by_protein = integrate(network, batch, baseline, target, rule)
        rna += by_gene
        rna_presence += by_gene if baseline.x is None else by_gene.where(batch.x > baseline.x, 0)
        if by_protein is not None:
            protein += by_protein
            protein_presence += by_protein if baseline.y is None else by_protein.where(batch.y > baseline.y, 0)
        start = start + _value(network, at(batch, baseline.x, baseline.y), target)
        n_lines += 1
    if protein is not None:
        protein, protein_presence = (
            torch.where(batch.measured, part / n_lines, torch.nan) for part in (protein, protein_presence)
        )
    difference = _value(network, batch, target) - start / n_lines
    return Explained(index, rna / n_lines, rna_presence / n_lines, protein, protein_presence, difference)


def at(batch: Batch, x: Tensor | None, y: Tensor | None) -> Batch:
    """The same cells, covariates and panels with other counts; None: without any."""
    x = torch.zeros_like(batch.x) if x is None else x
    if batch.y is not None:
        y = torch.zeros_like(batch.y) if y is None else y
    return batch._replace(x=x, y=y, entries=None)


@torch.no_grad()
def _value(network: VAE, batch: Batch, target: Tensor) -> Tensor:
    return (network.logits(batch, Draws()).double() * target).sum(1)


@torch.no_grad()
def predict(model: Model, cells: Cells) -> Tensor:
    """Code of the predicted class of every cell `(cells,)`, at the posterior mean."""
    labels = model.network.labels
    return torch.cat([labels.classify(block.q_z.mean, Draws()).argmax(1) for block in blocks(model, cells)])


def sample(group: Tensor, n_cells: int | None, generator: torch.Generator) -> Tensor:
    """Up to `n_cells` random cells of each group, sorted; None: all. Cells of group -1 are left out.

    `group` `(cells,)` and the generator are on the CPU.
    """
    chosen = []
    for code in group[group >= 0].unique().tolist():
        members = (group == code).nonzero().squeeze(1)
        if n_cells is not None and len(members) > n_cells:
            members = members[torch.randperm(len(members), generator=generator)[:n_cells]]
        chosen.append(members)
    return torch.cat(chosen).sort().values if chosen else torch.zeros(0, dtype=torch.long)


class Mean(NamedTuple):
    """Attributions of one modality, averaged over the cells of each group, in logit units."""

    mean: np.ndarray  # (groups, features) NaN without a cell
    presence: np.ndarray  # (groups, features) the part of it that is due to the feature being there
    error: np.ndarray  # (groups, features) standard error of the mean; NaN below two cells
    n_cells: np.ndarray  # (groups, features) how many cells: those that were measured


class Summary(NamedTuple):
    """What the attributions of each group of cells amount to."""

    rna: Mean
    protein: Mean | None
    n_cells: np.ndarray  # (groups,)
    difference: np.ndarray  # (groups,) mean of the target at the cells minus at their baselines
    delta: np.ndarray  # (groups,) mean absolute error of the attributions' sum
    complete: np.ndarray  # (groups,) share of cells whose attributions are complete


class Totals:
    """Sums over cells, group by group: what is kept of the attributions while they stream by."""

    def __init__(self, n_groups: int, n_genes: int, n_proteins: int):
        self.rna = np.zeros((4, n_groups, n_genes))  # number of cells, sums, sums of squares, sums of presence
        self.protein = np.zeros((4, n_groups, n_proteins))
        self.cells = np.zeros((4, n_groups))  # number, difference, error, complete

    def add(self, part: Explained, group: np.ndarray) -> None:
        """Count in some cells, `group` `(cells,)` being theirs."""
        inside = np.equal.outer(np.arange(self.rna.shape[1]), group).astype(float)  # (groups, cells)
        self.rna += _sums(inside, part.rna, part.rna_presence)
        if part.protein is not None:
            self.protein += _sums(inside, part.protein, part.protein_presence)
        numbers = (torch.ones_like(part.difference), part.difference, part.delta.abs(), part.complete)
        self.cells += torch.stack([number.double().cpu() for number in numbers]).numpy() @ inside.T

    def summary(self) -> Summary:
        """Means and standard errors of what was counted in."""
        with np.errstate(invalid="ignore"):
            rest = self.cells[1:] / self.cells[0]  # 0 / 0: NaN
        protein = _mean(self.protein) if self.protein.shape[2] else None
        return Summary(_mean(self.rna), protein, self.cells[0].astype(int), *rest)


def _sums(inside: np.ndarray, values: Tensor, presence: Tensor) -> np.ndarray:
    values, presence = values.double().cpu().numpy(), presence.double().cpu().numpy()
    known = ~np.isnan(values)
    values, presence = np.where(known, values, 0), np.where(known, presence, 0)
    return np.stack([inside @ part for part in (known, values, values**2, presence)])


def _mean(sums: np.ndarray) -> Mean:
    """Means of a modality.

    What counts above the baseline bring, less what it costs other cells of the group to be below it. The latter keeps
    down features that merely scatter about the baseline, as those do that follow depth: gains and losses cancel there.
    """
    n, total, squares, presence = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n  # 0 / 0: NaN
        variance = np.maximum(squares - n * mean**2, 0) / np.where(n > 1, n - 1, np.nan)
        return Mean(mean, np.minimum(presence / n, mean), np.sqrt(variance / n), n.astype(int))
