"""Attributions of class logits to genes and proteins: integrated and expected gradients, baselines, sums over cells.

Source: spec section 5.1.
"""

from __future__ import annotations

import math
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
from anvi._data.cells import Cells
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

MOST_HELD = 50_000
"""Cells of a streamed file that are kept in memory to be explained, at most, those that others displace included."""

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


class Survey(NamedTuple):
    """What one pass over all cells tells, before any is explained."""

    predicted: Tensor  # (cells,) code of the predicted class, or group of classes, at the posterior mean; on the CPU
    profiles: Means  # of the classes, or of the groups if the baseline is one of them


@torch.no_grad()
def survey(
    model: Model,
    cells: Cells,
    groups: ExplainedGroups,
    baseline: str | int,
    n_cells: int | None,
    number: Tensor,  # (cells,) on the CPU: of each group the cells with the lowest numbers are chosen
    members: Tensor | None = None,  # (groups, classes) bool, where groups of classes are explained
) -> Survey:
    """Predict every cell, sum up the profiles of baselines, and keep the counts of cells that may be chosen later."""
    classify, device = model.network.labels.classify, cells.label.device
    n_classes = len(members) if members is not None else model.config.n_labels
    predicted = torch.empty(len(cells), dtype=torch.long)
    profiles = Means(cells, max(n_classes, len(groups.names)))
    # of which the counts are kept: cells to explain have RNA, references have proteins before others
    explained = _Lowest(len(groups.names), n_cells, len(groups.chosen), len(cells))
    references = _Lowest(n_classes, 0 if isinstance(baseline, str) else baseline, n_classes, len(cells))
    chosen = torch.tensor(groups.chosen, device=device)
    by_group = isinstance(baseline, str) and baseline not in WORDS
    for block in blocks(model, cells):
        code = of_groups(classify(block.q_z.mean, Draws()), members).argmax(1)
        predicted[block.rows] = code.cpu()
        own = code if groups.code is None else groups.code[block.rows].to(device)
        if cells.has_rna is not None:  # a cell without any has no profile, explains nothing and is no reference
            own, code = (part.where(cells.has_rna[block.index], -1) for part in (own, code))
        profiles.add(block.batch, own if by_group else code)
        if cells.streamed:
            behind = 0 if cells.has_protein is None else ~cells.has_protein[block.index].cpu()
            likely = explained.add(own.where(torch.isin(own, chosen), -1).cpu(), number[block.rows])
            likely |= references.add(code.cpu(), 1 - number[block.rows] + behind)
            cells.x.hold(cells.x_row[block.index[likely.to(device)]])
    return Survey(predicted, profiles)


class _Lowest:
    """The cells with the `n` lowest numbers of every group, among all that have come by."""

    def __init__(self, n_groups: int, n: int | None, n_asked: int, n_cells: int):
        # of those that come by, so many are among them for a while; of very many none is kept: they are read again
        kept = math.inf if n is None else n * n_asked
        kept *= 1 + math.log(max(1.0, n_cells / max(1, kept)))
        n = 0 if n is None or kept > MOST_HELD else n
        self.numbers = torch.full((n_groups, n), torch.inf)

    def add(self, group: Tensor, number: Tensor) -> Tensor:
        """Which of some more cells are among them now `(cells,)` bool."""
        if not self.numbers.numel():
            return torch.zeros_like(group, dtype=torch.bool)
        for code in group[group >= 0].unique().tolist():
            both = torch.cat([self.numbers[code], number[group == code]])
            self.numbers[code] = both.sort().values[: self.numbers.shape[1]]
        return (number <= self.numbers[group, -1]) & (group >= 0)


def sample(group: Tensor, n_cells: int | None, number: Tensor) -> Tensor:
    """The `n_cells` cells of each group with the lowest numbers, sorted; None: all. Cells of group -1 are left out."""
    chosen = []
    for code in group[group >= 0].unique().tolist():
        members = (group == code).nonzero().squeeze(1)
        chosen.append(members if n_cells is None else members[number[members].argsort()[:n_cells]])
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


class Means:
    """Mean counts of groups of cells, summed up block by block."""

    def __init__(self, cells: Cells, n_groups: int):
        device, n_proteins = cells.label.device, 0 if cells.y is None else cells.y.shape[1]
        self.n_cells = torch.zeros(n_groups, 1, dtype=torch.float64, device=device)
        self.rna = torch.zeros(n_groups, cells.x.n_columns, dtype=torch.float64, device=device)
        self.protein, self.n_measured = (
            torch.zeros(n_groups, n_proteins, dtype=torch.float64, device=device) for _ in range(2)
        )

    def add(self, batch: Batch, group: Tensor) -> None:
        """Count in some cells, `group` `(cells,)` being theirs, -1 for none."""
        n_groups, n_genes = self.rna.shape
        known = group >= 0
        self.n_cells += group[known].bincount(minlength=n_groups)[:, None]
        row, column, count = (part[known[batch.entries.row]] for part in batch.entries)
        self.rna.view(-1).index_add_(0, group[row] * n_genes + column, count.double())
        if batch.y is not None:
            self.protein.index_add_(0, group[known], (batch.y * batch.measured)[known].double())
            self.n_measured.index_add_(0, group[known], batch.measured[known].double())

    def profiles(self, scaled: bool = True) -> tuple[Tensor, Tensor | None]:
        """Means relative to their sum (`scaled`) or as they are: RNA `(groups, genes)`, proteins or None.

        NaN for groups without cells, and for proteins that were measured in none of a group's cells.
        """
        rna, protein = self.rna / self.n_cells, self.protein / self.n_measured  # 0 / 0: NaN
        if scaled:
            rna = rna / rna.sum(1, keepdim=True)
            protein = protein / protein.nansum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return rna.float(), protein.float() if protein.shape[1] else None


def mean_over(profiles: Tensor, chosen: Tensor) -> Tensor:
    """Mean of profiles `(groups, features)` over sets of groups `(sets, groups)`; NaN where none knows the feature."""
    known = ~profiles.isnan()
    weight = chosen.to(profiles.dtype)
    return (weight @ profiles.nan_to_num(0.0)) / (weight @ known.to(profiles.dtype))


def draw_references(
    group: Tensor,  # (cells,) group of each cell, -1 for none
    chosen: Tensor,  # (sets, groups) bool
    n: int,
    number: Tensor,  # (cells,) those with the lowest come first
    generator: torch.Generator,
    eligible: Tensor | None = None,  # (cells,) bool
) -> Tensor:
    """Cells for each set of groups, the groups in turn `(sets, n)`; twice the same only where cells are few."""
    out = torch.empty(len(chosen), n, dtype=torch.long)
    members = []
    for code in range(chosen.shape[1]):
        inside = group == code
        better = inside if eligible is None else inside & eligible
        some = (better if better.any() else inside).nonzero().squeeze(1)
        members.append(some[number[some].argsort()])
    for row, groups in enumerate(chosen):
        pools = [members[code] for code in groups.nonzero().squeeze(1).tolist() if len(members[code])]
        order = torch.randperm(len(pools), generator=generator).tolist()
        turn = torch.arange(-(-n // len(pools)))
        out[row] = torch.stack([pools[i][turn % len(pools[i])] for i in order], dim=1).view(-1)[:n]
    return out


class ExplainedCells(NamedTuple):
    """Which cells are explained, and what about them."""

    cells: Cells
    index: Tensor  # (explained,) positions in the cells, on the CPU
    groups: ExplainedGroups
    contrast: Contrast
    predicted: Tensor  # (cells,) codes of predicted classes, on the CPU; -1 for cells without RNA
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


WORDS = {"zero": "no counts", "each": "every other class", "rest": "all other classes together"}
"""What `baseline` may be beside a number and the name of a group."""


def check_baseline(baseline: str | int, groups: ExplainedGroups) -> None:
    """Raise a ValueError if it is neither a number, a word nor the name of a group with cells."""
    names = groups.names
    if baseline in WORDS:
        warn_of_word("baseline", baseline, names, WORDS[baseline])
    elif isinstance(baseline, str) and baseline not in names:
        listed = ", ".join(map(repr, names))
        raise ValueError(f"baseline='{baseline}' is not 'each', 'rest', 'zero', a number or a group: {listed}.")
    elif isinstance(baseline, str) and groups.code is not None and not (groups.code == names.index(baseline)).any():
        raise ValueError(f"baseline: there is no cell in the group '{baseline}'.")


def find_baselines(
    explained: ExplainedCells, baseline: str | int, profiles: Means, number: Tensor, seed: int
) -> Baselines:
    """The baselines of every explained cell; of references those with the highest numbers `(cells,)`."""
    cells, groups, scaled = explained.cells, explained.groups, explained.scaled
    device = cells.label.device
    if baseline == "zero":
        return Zero()
    rna, protein = profiles.profiles(scaled)
    if isinstance(baseline, str) and baseline not in WORDS:
        row = torch.full((len(explained.index), 1), groups.names.index(baseline), device=device)
        if not profiles.n_cells[row[0]]:
            raise ValueError(f"baseline: there is no cell with RNA in the group '{baseline}'.")
        return Profiles(rna, protein, row, scaled)
    n_classes = len(explained.classes)
    sets, row = _other_classes(explained)  # (sets, classes) and (explained,)
    rna, protein = rna[:n_classes], None if protein is None else protein[:n_classes]
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
    index = draw_references(explained.predicted, sets, int(baseline), 1 - number, generator, stained).to(device)
    cells.x.hold(cells.x_row[index.flatten()])  # each comes with every cell that is explained
    return References(cells, index, row.to(device), protein, scaled)


def _other_classes(explained: ExplainedCells) -> tuple[Tensor, Tensor]:
    """Sets of classes to compare with `(sets, classes)`, and the set of every explained cell `(explained,)`."""
    present = torch.zeros(len(explained.classes), dtype=torch.bool)
    present[explained.predicted[explained.predicted >= 0].unique()] = True
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
