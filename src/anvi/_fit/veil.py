"""What the encoder is shown of the cells of a step: less than there is, as in the queries that will come.

A query is often shallower than the reference, of other efficiencies, and without proteins. An encoder that has seen
such cells, while the likelihood explained all their counts, knows what to make of them.
"""

import torch
from torch import Tensor

from anvi.nn import Batch
from anvi.nn.batch import Entries

from .plan import Plan

SHALLOWEST = 0.3
"""Least share of its counts that a thinned cell keeps; the most is all of them."""
SPREAD = 0.3
"""Standard deviation of the log efficiency of a gene; drawn for every step, and the same in all its cells."""


def veil(batches: list[Batch], n_genes: int, plan: Plan, noise: torch.Generator) -> list[Batch]:
    """The minibatches of a step with some counts and proteins hidden from the encoder.

    Parameters
    ----------
    batches
        One or two minibatches.
    n_genes
        Genes of the data.
    plan
        Options of the fit: `thin_counts` and `hide_proteins`, shares of cells.
    noise
        On the device.
    """
    if plan.hide_proteins > 0 and batches[0].y is not None:
        batches = [_without_proteins(batch, plan.hide_proteins, noise) for batch in batches]
    if plan.thin_counts > 0:
        log_efficiency = SPREAD * torch.empty(n_genes, device=noise.device).normal_(generator=noise)
        batches = [_thinned(batch, plan.thin_counts, log_efficiency.exp(), noise) for batch in batches]
    return batches


def _without_proteins(batch: Batch, share: float, noise: torch.Generator) -> Batch:
    seen = torch.empty_like(batch.weight).uniform_(generator=noise) >= share  # (cells,)
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
