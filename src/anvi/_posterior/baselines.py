"""Where the lines of integrated gradients start: no counts, the mean of some classes, or the counts of other cells.

All but the first are scaled to the depth of the cell that is explained, so that depth is not what is attributed: RNA to
its library size, proteins to its total over what was measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anvi._data.batches import take
from anvi._data.cells import Cells
from anvi.nn import Batch

from .attribute import BLOCK
from .integrate import Baseline


@dataclass(frozen=True)
class Zero:
    """No counts at all: the depth of a cell is attributed along with what it expresses."""

    def __call__(self, batch: Batch, places: Tensor) -> Iterator[Baseline]:
        """One baseline for every cell."""
        yield Baseline(None, None)


@dataclass(frozen=True, eq=False)
class Profiles:
    """Expression profiles, one or more for each cell.

    Parameters
    ----------
    rna
        `(profiles, genes)` counts in any unit.
    protein
        `(profiles, proteins)` counts in any unit, NaN where unknown; None without proteins.
    row
        `(cells to explain, baselines)` the profiles of each.
    scaled
        Whether profiles are brought to the depth of the cell.
    """

    rna: Tensor
    protein: Tensor | None
    row: Tensor
    scaled: bool = True

    def __call__(self, batch: Batch, places: Tensor) -> Iterator[Baseline]:
        """As many baselines as a cell has profiles."""
        for row in self.row[places].T:
            yield start_at(batch, self.rna[row], None if self.protein is None else self.protein[row], self.scaled)


@dataclass(frozen=True, eq=False)
class References:
    """Several cells, each of which is a baseline: expected gradients.

    Parameters
    ----------
    cells
        The data set that they are from.
    index
        `(sets, references)` positions of the reference cells.
    row
        `(cells to explain,)` the set of each.
    protein
        `(sets, proteins)` stands in for proteins that a reference cell was not measured for, in units of the sum over
        all proteins; None without proteins.
    scaled
        Whether their counts are brought to the depth of the cell.
    """

    cells: Cells
    index: Tensor
    row: Tensor
    protein: Tensor | None
    scaled: bool = True

    def __call__(self, batch: Batch, places: Tensor) -> Iterator[Baseline]:
        """As many baselines as there are references in a set."""
        row = self.row[places]
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
    """Mean counts of groups of cells, relative to their sum (`scaled`), block by block.

    Parameters
    ----------
    cells
        A data set.
    group
        `(cells,)` group of each, -1 for none.
    n_groups
        Number of groups.
    scaled
        Whether each profile is divided by its sum.

    Returns
    -------
    RNA `(groups, genes)` and proteins `(groups, proteins)` or None; NaN for groups without cells, and for proteins that
    were measured in none of a group's cells.
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
    """Mean of the chosen profiles, every group counting the same.

    Parameters
    ----------
    profiles
        `(groups, features)`, NaN where unknown.
    chosen
        `(sets, groups)` bool.

    Returns
    -------
    `(sets, features)`, NaN where no chosen group knows the feature.
    """
    known = ~profiles.isnan()
    weight = chosen.to(profiles.dtype)
    return (weight @ profiles.nan_to_num(0.0)) / (weight @ known.to(profiles.dtype))


def draw_references(
    group: Tensor, chosen: Tensor, n: int, generator: torch.Generator, eligible: Tensor | None = None
) -> Tensor:
    """Draw `n` cells for each set of groups, the groups in turn `(sets, n)`; with replacement only where cells are few.

    Parameters
    ----------
    group
        `(cells,)` group of each cell, -1 for none; on the CPU.
    chosen
        `(sets, groups)` bool; each set has a group with cells.
    n
        References per set.
    generator
        CPU generator.
    eligible
        `(cells,)` bool: cells to draw from where a group has any of them.
    """
    out = torch.empty(len(chosen), n, dtype=torch.long)
    members = []
    for code in range(chosen.shape[1]):
        inside = group == code
        better = inside if eligible is None else inside & eligible
        members.append((better if better.any() else inside).nonzero().squeeze(1))
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
