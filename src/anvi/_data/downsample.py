"""Input augmentation: counts thinned, efficiencies per gene, proteins hidden; cells as another experiment saw them."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from anvi.nn import Batch
from anvi.nn.config import Entries

from .cells import CSR, Cells

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


class Shift(NamedTuple):
    """How another experiment differs."""

    depth: float = 1.0  # share of the counts that are kept, on average
    spread: float = 0.0  # standard deviation of the log efficiency of a gene or protein
    proteins: bool = True  # whether proteins are measured
    rna: bool = True  # whether RNA is


def downsampled(cells: Cells, index: Tensor, shift: Shift, seed: int) -> Cells:
    """Thin the counts of some cells binomially, each gene and protein with an efficiency of its own.

    Parameters
    ----------
    cells
        All cells, with their counts.
    index
        Positions of those that are wanted, in the order of the answer.
    shift
        How they are seen. An efficiency above 1 counts as 1: no count is ever added.
    seed
        Of efficiencies and thinning.

    Returns
    -------
    The cells, with names, labels and covariates as they are; the library size follows the counts.
    """
    generator = torch.Generator(index.device).manual_seed(seed)
    rows = cells.x_row[index]
    row, column, count = cells.x.entries(rows)
    before = torch.zeros(len(index), device=index.device).index_add_(0, row, count)
    count = _thin(count, _efficiency(cells.x.n_columns, shift, generator)[column], generator)
    after = torch.zeros(len(index), device=index.device).index_add_(0, row, count)
    length = cells.x.indptr[rows + 1] - cells.x.indptr[rows]
    indptr = torch.cat([length.new_zeros(1), length.cumsum(0)])
    parts = {
        name: None if part is None else part[index]
        for name in ("mask_row", "batch", "panel", "codes", "continuous", "label", "label_row", "has_rna")
        for part in [getattr(cells, name)]
    }
    mask_table = cells.mask_table
    if cells.y is not None:
        y = cells.proteins(index)
        parts["y"] = _thin(y, _efficiency(y.shape[1], shift, generator).expand_as(y), generator)
        if not shift.proteins:
            parts["y"], parts["mask_row"] = torch.zeros_like(parts["y"]), torch.zeros_like(parts["mask_row"])
            mask_table = torch.zeros_like(mask_table[:1])
    if not shift.rna:
        indptr, column, count = torch.zeros_like(indptr), column[:0], count[:0]
        parts["has_rna"] = torch.zeros_like(index, dtype=torch.bool)
    lost = after.clamp(min=1).log() - before.clamp(min=1).log()
    return replace(
        cells,
        names=cells.names[index.cpu().numpy()],
        x=CSR(indptr, column, count, cells.x.n_columns),
        x_row=torch.arange(len(index), device=index.device),
        mask_table=mask_table,
        log_library=cells.log_library[index] + lost[:, None],
        **parts,
    )


def _efficiency(n: int, shift: Shift, generator: torch.Generator) -> Tensor:
    """Probability that a count of a gene or protein is kept `(n,)`."""
    log_efficiency = shift.spread * torch.randn(n, generator=generator, device=generator.device)
    return (shift.depth * log_efficiency.exp()).clamp(max=1)


def _thin(count: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    return torch.binomial(count, kept, generator=generator)
