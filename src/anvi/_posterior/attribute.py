"""Attributions of class logits to genes and proteins: integrated and expected gradients, baselines, sums over cells.

Source: spec section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from anvi._data import rankings
from anvi._data.batches import take
from anvi._data.cells import Cells, in_order
from anvi._data.select import Contrast, ExplainedGroups, warn_of_word
from anvi._data.setup import Setup
from anvi._model import Model
from anvi.nn import VAE, Batch, Draws

from .encode import block_seed, blocks
from .integrate import Baseline, integrate, midpoints, of_groups, of_rows

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
"""Gives for a minibatch, and the rows of its cells among those to explain, one or more baselines."""


def explain(
    model: Model,
    cells: Cells,
    index: Tensor,
    target: Tensor,  # (cells to explain, classes) what is explained is the logits times this
    baselines: Baselines,
    n_steps: int,
    members: Tensor | None = None,  # (groups, classes) bool, where groups of classes are explained
) -> Iterator[Explained]:
    """Attributions block by block; memory depends on :data:`BLOCK`, not on the number of cells."""
    network = model.network.eval()

    def averaged(batch: Batch, rows: Tensor, n_steps: int) -> Explained:
        """Attributions of a minibatch, averaged over its baselines."""
        rna, rna_presence = torch.zeros_like(batch.x), torch.zeros_like(batch.x)
        protein = None if batch.y is None else torch.zeros_like(batch.y)
        protein_presence = None if batch.y is None else torch.zeros_like(batch.y)
        start, n_lines = 0.0, 0
        for baseline in baselines(batch, rows):
            rule = midpoints(n_steps, 1 if baseline.x is not None else FROM_ZERO)
            by_gene, by_protein = integrate(network, batch, baseline, target[rows], rule, members)
            rna += by_gene
            rna_presence += by_gene if baseline.x is None else by_gene.where(batch.x > baseline.x, 0)
            if by_protein is not None:
                protein += by_protein
                protein_presence += by_protein if baseline.y is None else by_protein.where(batch.y > baseline.y, 0)
            start = start + _value(network, at(batch, baseline.x, baseline.y), target[rows], members)
            n_lines += 1
        if protein is not None:
            both = (protein, protein_presence)
            protein, protein_presence = (torch.where(batch.measured, part / n_lines, torch.nan) for part in both)
        difference = _value(network, batch, target[rows], members) - start / n_lines
        return Explained(index[rows], rna / n_lines, rna_presence / n_lines, protein, protein_presence, difference)

    for rows in torch.arange(len(index), device=index.device).split(BLOCK):
        batch = take(cells, index[rows])
        # cells with as many genes together: the widest cell of a pass decides what all its cells cost
        order = (batch.x != 0).sum(1).argsort()
        rows, batch = rows[order], of_rows(batch, order)
        found = averaged(batch, rows, n_steps)
        # lines of cells whose attributions are not complete get twice the points, and again
        for doubling in range(DOUBLINGS):
            short = (~found.complete).nonzero().squeeze(1)
            if not len(short):
                break
            better = averaged(of_rows(batch, short), rows[short], n_steps * 2 ** (doubling + 1))
            for old, new in zip(found, better, strict=True):
                if old is not None:
                    old[short] = new
        yield found


def at(batch: Batch, x: Tensor | None, y: Tensor | None) -> Batch:
    """The same cells, covariates and panels with other counts; None: without any."""
    x = torch.zeros_like(batch.x) if x is None else x
    if batch.y is not None:
        y = torch.zeros_like(batch.y) if y is None else y
    return batch._replace(x=x, y=y, entries=None)


@torch.no_grad()
def _value(network: VAE, batch: Batch, target: Tensor, members: Tensor | None) -> Tensor:
    return (of_groups(network.logits(batch, Draws()).double(), members) * target).sum(1)


@torch.no_grad()
def predict(model: Model, cells: Cells, members: Tensor | None = None) -> Tensor:
    """Code of the predicted class, or group of classes, of every cell `(cells,)`, at the posterior mean."""
    classify = model.network.labels.classify
    parts = (of_groups(classify(block.q_z.mean, Draws()), members) for block in blocks(model, cells))
    return torch.cat([part.argmax(1) for part in parts])


def sample(group: Tensor, n_cells: int | None, generator: torch.Generator, rank: Tensor | None = None) -> Tensor:
    """Up to `n_cells` random cells of each group, sorted; None: all. Cells of group -1 are left out.

    `group` `(cells,)` and the generator are on the CPU; `rank` is that of the cells.
    """
    chosen = []
    for code in group[group >= 0].unique().tolist():
        members = in_order((group == code).nonzero().squeeze(1), rank)
        if n_cells is not None and len(members) > n_cells:
            members = members[torch.randperm(len(members), generator=generator)[:n_cells]]
        chosen.append(members)
    return torch.cat(chosen).sort().values if chosen else torch.zeros(0, dtype=torch.long)


# sums over cells ------------------------------------------------------------------------------------------------------


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


# baselines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zero:
    """No counts at all: the depth of a cell is attributed along with what it expresses."""

    def __call__(self, batch: Batch, rows: Tensor) -> Iterator[Baseline]:
        """One baseline for every cell."""
        yield Baseline(None, None)


@dataclass(frozen=True, eq=False)
class Profiles:
    """Expression profiles, one or more for each cell."""

    rna: Tensor  # (profiles, genes) counts in any unit
    protein: Tensor | None  # (profiles, proteins) counts in any unit, NaN where unknown
    row: Tensor  # (cells to explain, baselines) the profiles of each
    scaled: bool = True  # whether profiles are brought to the depth of the cell

    def __call__(self, batch: Batch, rows: Tensor) -> Iterator[Baseline]:
        """As many baselines as a cell has profiles."""
        for row in self.row[rows].T:
            yield start_at(batch, self.rna[row], None if self.protein is None else self.protein[row], self.scaled)


@dataclass(frozen=True, eq=False)
class References:
    """Several cells, each of which is a baseline: expected gradients."""

    cells: Cells  # the data set that they are from
    index: Tensor  # (sets, references) positions of the reference cells
    row: Tensor  # (cells to explain,) the set of each
    protein: Tensor | None  # (sets, proteins) for those that a reference lacks, in units of the sum over all proteins
    scaled: bool = True  # whether their counts are brought to the depth of the cell

    def __call__(self, batch: Batch, rows: Tensor) -> Iterator[Baseline]:
        """As many baselines as there are references in a set."""
        row = self.row[rows]
        for column in self.index.T:
            reference = take(self.cells, column)  # (sets, ...)
            y = None if self.protein is None else _filled(reference, self.protein)[row]
            yield start_at(batch, reference.x[row], y, self.scaled)


def _filled(reference: Batch, protein: Tensor) -> Tensor:
    """Protein counts of reference cells, the gaps filled in from a profile in proportion."""
    zero = protein.new_zeros(())
    known = torch.where(reference.measured & ~protein.isnan(), protein, zero).sum(1, keepdim=True)
    counts = torch.where(reference.measured, reference.y, zero).sum(1, keepdim=True)
    unit = torch.where((known > 0) & (counts > 0), counts / known, 1.0)
    return torch.where(reference.measured, reference.y, protein * unit)


def start_at(batch: Batch, x: Tensor, y: Tensor | None, scaled: bool) -> Baseline:
    """Profiles of the cells of a minibatch as counts of the same depth.

    A protein that the profile does not know starts at the cell's own count: nothing can be said of it.
    """
    x = _to_total(x, batch.x.sum(1, keepdim=True)) if scaled else x
    if y is None:
        return Baseline(x, None)
    zero = y.new_zeros(())
    own = torch.where(batch.measured, batch.y, zero)
    known = batch.measured & ~y.isnan()
    y = torch.where(known, y, zero)
    y = _to_total(y, torch.where(known, own, zero).sum(1, keepdim=True)) if scaled else y
    return Baseline(x, torch.where(known, y, own))


def _to_total(profile: Tensor, total: Tensor) -> Tensor:
    return profile * (total / profile.sum(1, keepdim=True).clamp(min=torch.finfo(profile.dtype).tiny))


def mean_profiles(cells: Cells, group: Tensor, n_groups: int, scaled: bool = True) -> tuple[Tensor, Tensor | None]:
    """Mean counts of groups of cells, relative to their sum (`scaled`): RNA `(groups, genes)`, proteins or None.

    NaN for groups without cells, and for proteins that were measured in none of a group's cells.
    """
    device = group.device
    n_genes = cells.x.n_columns
    rna, n_cells = torch.zeros(n_groups, n_genes, device=device), torch.zeros(n_groups, 1, device=device)
    shape = (n_groups, 0 if cells.y is None else cells.y.shape[1])
    protein, n_measured = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    for part in (group >= 0).nonzero().squeeze(1).split(BLOCK):
        batch = take(cells, part)
        inside = torch.nn.functional.one_hot(group[part], n_groups).T.to(rna.dtype)  # (groups, cells)
        rna, n_cells = rna + inside @ batch.x, n_cells + inside.sum(1, keepdim=True)
        if batch.y is not None:
            measured = batch.measured.to(rna.dtype)
            protein, n_measured = protein + inside @ (batch.y * measured), n_measured + inside @ measured
    rna, protein = rna / n_cells, protein / n_measured  # 0 / 0: NaN
    if scaled:
        rna = rna / rna.sum(1, keepdim=True)
        protein = protein / protein.nansum(1, keepdim=True).clamp(min=torch.finfo(rna.dtype).tiny)
    return rna, None if cells.y is None else protein


def mean_over(profiles: Tensor, chosen: Tensor) -> Tensor:
    """Mean of profiles `(groups, features)` over sets of groups `(sets, groups)`; NaN where none knows the feature."""
    known = ~profiles.isnan()
    weight = chosen.to(profiles.dtype)
    return (weight @ profiles.nan_to_num(0.0)) / (weight @ known.to(profiles.dtype))


def draw_references(
    group: Tensor,  # (cells,) group of each cell, -1 for none
    chosen: Tensor,  # (sets, groups) bool
    n: int,
    generator: torch.Generator,
    eligible: Tensor | None = None,  # (cells,) bool
    rank: Tensor | None = None,  # (cells,)
) -> Tensor:
    """Draw cells for each set of groups, the groups in turn `(sets, n)`; with replacement only where cells are few."""
    out = torch.empty(len(chosen), n, dtype=torch.long)
    members = []
    for code in range(chosen.shape[1]):
        inside = group == code
        better = inside if eligible is None else inside & eligible
        members.append(in_order((better if better.any() else inside).nonzero().squeeze(1), rank))
    for row, groups in enumerate(chosen):
        pools = [members[code] for code in groups.nonzero().squeeze(1).tolist() if len(members[code])]
        order = torch.randperm(len(pools), generator=generator).tolist()
        turns = -(-n // len(pools))
        drawn = [_several(pools[i], turns, generator) for i in order]
        out[row] = torch.stack(drawn, dim=1).view(-1)[:n]
    return out


def _several(pool: Tensor, n: int, generator: torch.Generator) -> Tensor:
    rounds = -(-n // len(pool))
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)])[:n]


class ExplainedCells(NamedTuple):
    """Which cells are explained, and what about them."""

    cells: Cells
    index: Tensor  # (explained,) positions in the cells, on the CPU
    groups: ExplainedGroups
    contrast: Contrast
    predicted: Tensor  # (cells,) codes of predicted classes, on the CPU
    classes: tuple[str, ...]
    scaled: bool  # whether baselines are brought to a cell's depth: where values are counts

    @property
    def target(self) -> Tensor:
        """Code of the class that is explained, cell by cell `(explained,)`."""
        own = self.predicted[self.index]
        return own if self.contrast.target is None else torch.full_like(own, self.contrast.target)

    def weights(self) -> Tensor:
        """What the logits are multiplied by `(explained, classes)`."""
        weights = torch.nn.functional.one_hot(self.target, len(self.classes)).float()
        if self.contrast.against is not None:
            weights[:, self.contrast.against] = -1
        return weights.to(self.cells.label.device)

    def texts(self) -> pd.Categorical:
        """What is explained of each cell, in words."""
        if self.contrast.against is not None:
            text = f"{self.classes[self.contrast.target]}, not {self.classes[self.contrast.against]}"
            return pd.Categorical.from_codes(np.zeros(len(self.index), dtype=int), [text])
        return pd.Categorical.from_codes(self.target.numpy(), list(self.classes))


def find_baselines(explained: ExplainedCells, baseline: str | int, seed: int) -> Baselines:
    """The baselines of every explained cell."""
    cells, groups, scaled = explained.cells, explained.groups, explained.scaled
    device = cells.label.device
    words = {"zero": "no counts", "each": "every other class", "rest": "all other classes together"}
    if isinstance(baseline, str) and baseline in words:
        warn_of_word("baseline", baseline, groups.names, words[baseline])
    if isinstance(baseline, str) and baseline == "zero":
        return Zero()
    if isinstance(baseline, str) and baseline not in words:
        if baseline not in groups.names:
            listed = ", ".join(map(repr, groups.names))
            raise ValueError(f"baseline='{baseline}' is not 'each', 'rest', 'zero', a number or a group: {listed}.")
        inside = groups.code == groups.names.index(baseline)
        if not inside.any():
            raise ValueError(f"baseline: there is no cell in the group '{baseline}'.")
        profiles = mean_profiles(cells, torch.where(inside, 0, -1).to(device), 1, scaled)
        row = torch.zeros(len(explained.index), 1, dtype=torch.long, device=device)
        return Profiles(*profiles, row, scaled)
    sets, row = _other_classes(explained)  # (sets, classes) and (explained,)
    rna, protein = mean_profiles(cells, explained.predicted.to(device), len(explained.classes), scaled)
    if protein is not None:  # a class without a stained cell is taken for an average one
        every = mean_over(protein, torch.ones_like(sets[:1], device=device))
        protein = torch.where(protein.isnan(), every, protein)
    if baseline == "each":
        several = torch.stack([chosen.nonzero().squeeze(1) for chosen in sets])  # (sets, other classes)
        return Profiles(rna, protein, several[row].to(device), scaled)
    chosen = sets.to(device)
    protein = None if protein is None else mean_over(protein, chosen)
    if baseline == "rest":
        return Profiles(mean_over(rna, chosen), protein, row[:, None].to(device), scaled)
    generator = torch.Generator().manual_seed(block_seed(seed, 1))
    stained = None if cells.has_protein is None else cells.has_protein.cpu()
    index = draw_references(explained.predicted, sets, int(baseline), generator, stained, cells.rank)
    cells.x.hold(cells.x_row[index.flatten().to(device)])  # each comes with every cell that is explained
    return References(cells, index.to(device), row.to(device), protein, scaled)


def _other_classes(explained: ExplainedCells) -> tuple[Tensor, Tensor]:
    """Sets of classes to compare with `(sets, classes)`, and the set of every explained cell `(explained,)`."""
    present = torch.zeros(len(explained.classes), dtype=torch.bool)
    present[explained.predicted.unique()] = True
    if explained.contrast.against is None:
        needed, row = explained.target.unique(return_inverse=True)
        sets = present.repeat(len(needed), 1)
        sets[torch.arange(len(needed)), needed] = False
        what = f"any class but '{explained.classes[int(needed[0])]}'"
    else:
        row = torch.zeros(len(explained.index), dtype=torch.long)
        sets = torch.zeros_like(present)[None]
        sets[0, explained.contrast.against] = present[explained.contrast.against]
        what = f"'{explained.classes[explained.contrast.against]}'"
    if not sets.any(1).all():
        raise ValueError(
            f"No cell is predicted to be {what}, so there is nothing to compare with: pass baseline='zero' or, with "
            "groupby, the name of a group."
        )
    return sets, row


class SingleCells:
    """Attributions of single cells, as they are kept."""

    def __init__(self):
        self.index: list[np.ndarray] = []
        self.rna: list[sparse.csr_matrix] = []
        self.protein: list[np.ndarray] = []

    def add(self, part: Explained) -> None:
        """Keep some more cells."""
        self.index.append(part.index.cpu().numpy())
        self.rna.append(sparse.csr_matrix(part.rna.cpu().numpy()))
        if part.protein is not None:
            self.protein.append(part.protein.cpu().numpy())

    def of(self, explained: ExplainedCells, setup: Setup) -> list[rankings.CellAttributions]:
        """What was kept, modality by modality, cells in their order."""
        index = np.concatenate(self.index)
        order = np.argsort(index)
        names, texts = pd.Index(explained.cells.names[index[order]]), explained.texts()
        found = [rankings.CellAttributions(names, texts, sparse.vstack(self.rna, format="csr")[order], setup.genes)]
        if self.protein:
            found.append(rankings.CellAttributions(names, texts, np.concatenate(self.protein)[order], setup.proteins))
        return found
