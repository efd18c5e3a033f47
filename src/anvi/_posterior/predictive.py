"""Posterior predictive draws: a latent vector per sample, then one draw of the likelihood; correlations of features.

Cells are taken in blocks of a fixed size, each with a generator of its own, so that a draw depends on the seed and on
the place of a cell among those that were asked for, and on nothing else. Source: spec sections 2.6 and 5.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._data.select import Features
from anvi._model import Model
from anvi.nn import Batch, Draws, likelihoods

from .encode import NOISE_BLOCK, Block, block_seed, blocks, in_batch, sample_z
from .expected import Sweep, columns_of

_RNA, _PROTEIN, _LIBRARY = range(3)  # what a generator is for


class CountDraws(NamedTuple):
    """A draw for some consecutive cells; None where no feature of the kind was asked for."""

    step: int  # number of the sample, after that of the batch
    rows: slice  # ranks of the cells among those that were asked for
    rna: Tensor | None  # (cells, genes) counts
    prot: Tensor | None  # (cells, proteins) counts


@torch.no_grad()
def draw_counts(model: Model, cells: Cells, features: Features, sweep: Sweep, index: Tensor) -> Iterator[CountDraws]:
    """Draw counts from the posterior predictive distribution.

    Everything that the likelihood has is drawn or used: the log background of a protein from its posterior, a latent
    library size from its own, extra zeros, per-batch efficiencies of imported models.
    """
    genes, proteins = columns_of(features, cells.label.device)
    for block in blocks(model, cells, index, size=NOISE_BLOCK):
        each = [(code, sample) for code in sweep.each_code for sample in range(sweep.n_samples)]
        for step, (code, sample) in enumerate(each):
            z = sample_z(model, block, sweep.seed, sample)
            batch = in_batch(model, block.batch, code)
            rna = prot = None
            if features.has_genes:
                q_library, log_library = model.network.q_library(block.batch), block.batch.log_library
                if q_library is not None:
                    log_library = q_library.sample(Draws(generator_of(block, sweep.seed, sample, _LIBRARY)))
                generator = generator_of(block, sweep.seed, step, _RNA)
                rna = _draw_rna(model, z, batch, log_library, genes, generator).cpu()
            if features.has_proteins:
                generator = generator_of(block, sweep.seed, step, _PROTEIN)
                prot = _draw_proteins(model, z, batch, proteins, generator).cpu()
            yield CountDraws(step, block.rows, rna, prot)


def generator_of(block: Block, seed: int, step: int, what: int) -> torch.Generator:
    """The generator of one block of cells, one step and one kind of noise."""
    number = block.start // NOISE_BLOCK
    return torch.Generator(block.q_z.mean.device).manual_seed(block_seed(seed, step, number, what))


def _draw_rna(
    model: Model, z: Tensor, batch: Batch, log_library: Tensor, columns: Tensor | None, generator: torch.Generator
) -> Tensor:
    rates = model.network.decode_rna(z, batch, Draws(), columns=columns)
    mean, likelihood = (log_library + rates.log_scale).exp(), model.config.gene_likelihood
    if likelihood == "poisson":
        return likelihoods.sample_poisson(mean, generator)
    theta = rates.log_theta.exp()
    if likelihood == "normal":
        return likelihoods.sample_normal(mean, theta, generator)
    if likelihood == "zinb":
        return likelihoods.sample_zinb(mean, theta, rates.zero_logits, generator)
    return likelihoods.sample_nb(mean, theta, generator)


def _draw_proteins(model: Model, z: Tensor, batch: Batch, columns: Tensor | None, generator: torch.Generator) -> Tensor:
    part = model.network.protein
    rates = model.network.decode_protein(z, batch, Draws(generator))
    from_background = likelihoods.sample_bernoulli(rates.mixing.sigmoid(), generator)
    log_mean = torch.where(from_background, rates.log_back, rates.log_fore)
    if part.log_efficiency is not None:
        log_mean = log_mean + part.log_efficiency[batch.batch]
    counts = likelihoods.sample_nb(log_mean.exp(), rates.log_phi.exp(), generator)
    return counts if columns is None else counts[:, columns]


def draw_rates(model: Model, block: Block, features: Features, code: int | None, sample: int, seed: int) -> Tensor:
    """One draw of what is behind the counts of a block: gamma rates of genes, then foreground rates of proteins.

    Returns `(cells, genes + proteins)`, genes as shares of the library. The counts of a gene are Poisson draws of its
    rate; a protein that is background in the draw is 0. A gene likelihood without a gamma in it gives the share itself.
    """
    network, parts = model.network, []
    z = sample_z(model, block, seed, sample)
    batch = in_batch(model, block.batch, code)
    genes, proteins = columns_of(features, z.device)
    if features.has_genes:
        generator = generator_of(block, seed, sample, _RNA)
        if model.config.gene_likelihood in ("poisson", "normal"):
            parts.append(network.decode_share(z, batch, Draws(), genes))
        else:
            rates = network.decode_rna(z, batch, Draws(), columns=genes)
            parts.append(likelihoods.sample_gamma(rates.log_theta.exp(), rates.log_scale.exp(), generator))
    if features.has_proteins:
        generator = generator_of(block, seed, sample, _PROTEIN)
        rates = network.decode_protein(z, batch, Draws(generator))
        from_background = likelihoods.sample_bernoulli(rates.mixing.sigmoid(), generator)
        value = likelihoods.sample_gamma(rates.log_phi.exp(), rates.log_fore.exp(), generator).masked_fill_(
            from_background, 0
        )
        parts.append(value if proteins is None else value[:, proteins])
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


RANKED_AT_ONCE = 128
"""Columns that are ranked together: ranks need eight bytes and several copies while they are made."""
ROWS_AT_ONCE = 2_048
"""Rows that are multiplied together."""


@torch.no_grad()
def correlation(
    model: Model,
    cells: Cells,
    features: Features,
    sweep: Sweep,
    index: torch.Tensor,
    method: Literal["spearman", "pearson"],
    watch: Callable[[list[Block]], Iterable[Block]] = iter,
) -> np.ndarray:
    """Correlate features across cells and posterior samples.

    Returns `(features, features)` float32, genes first; NaN for a feature that never changes.
    """
    # encoded once, whatever the number of batches; the counts are not needed any more
    encoded = [
        block._replace(batch=block.batch._replace(x=None, entries=None))
        for block in blocks(model, cells, index, size=NOISE_BLOCK)
    ]
    total = None
    for code in sweep.each_code:
        rows = (
            draw_rates(model, block, features, code, sample, sweep.seed).cpu().numpy()  # (cells, features)
            for block in watch(encoded)
            for sample in range(sweep.n_samples)
        )
        matrix = pearson(_ranks(rows, len(index) * sweep.n_samples) if method == "spearman" else rows)
        total = matrix if total is None else total + matrix
    return (total / len(sweep.each_code)).astype(np.float32)


def _ranks(parts: Iterable[np.ndarray], n_rows: int) -> Iterator[np.ndarray]:
    """The same rows, each value replaced by its rank in its column; equal values share their mean rank."""
    from scipy.stats import rankdata  # half of the time of `import anvi`, were it at the top

    rows, start = None, 0
    for part in parts:
        rows = np.empty((n_rows, part.shape[1]), dtype=np.float32) if rows is None else rows
        rows[start : start + len(part)] = part
        start += len(part)
    for first in range(0, rows.shape[1], RANKED_AT_ONCE):
        columns = slice(first, first + RANKED_AT_ONCE)
        rows[:, columns] = rankdata(rows[:, columns], axis=0)
    yield from np.split(rows, range(ROWS_AT_ONCE, n_rows, ROWS_AT_ONCE))


def pearson(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Correlation of the columns of all parts together, from their sums; NaN for a column that never changes.

    Columns are shifted and scaled by the first rows, so that float32 products lose nothing that counts.
    """
    n, shift, scale, total, cross = 0, None, None, None, None
    for part in _together(parts):
        if shift is None:
            shift, scale = part.mean(0, dtype=np.float64), part.std(0, dtype=np.float64)
            scale = np.where(scale > 1e-6 * np.abs(shift), scale, np.abs(shift))
            scale[scale == 0] = 1.0
            total, cross = np.zeros(len(shift)), np.zeros((len(shift), len(shift)))
        scaled = ((part - shift) / scale).astype(np.float32)
        n += len(part)
        total += scaled.sum(0, dtype=np.float64)
        cross += scaled.T @ scaled
    mean = total / n
    cross /= n
    cross -= np.outer(mean, mean)
    deviation = np.sqrt(np.diag(cross).clip(min=0))
    deviation[deviation < 1e-6] = np.nan
    cross /= deviation
    cross /= deviation[:, None]
    return cross


def _together(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Small parts joined to larger ones: each costs a pass over the whole matrix of products."""
    held = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= ROWS_AT_ONCE:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)
