"""Counts and rates drawn from a fitted model: a latent vector per sample, then one draw from the likelihood.

Cells are taken in blocks of a fixed size, each with a generator of its own, so that a draw depends on the seed and on
the place of a cell among those that were asked for, and on nothing else. Source: spec sections 2.6 and 5.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._data.features import Features
from anvi._model import Model
from anvi.nn import Batch, Draws, sampling

from .decode import in_batch
from .denoise import Sweep
from .encode import NOISE_BLOCK, Block, block_seed, blocks, sample_z

_RNA, _PROTEIN, _LIBRARY = range(3)  # what a generator is for


class Piece(NamedTuple):
    """A draw for some consecutive cells; None where no feature of the kind was asked for."""

    step: int  # number of the sample, after that of the batch
    rows: slice  # places of the cells among those that were asked for
    rna: Tensor | None  # (cells, genes) counts
    prot: Tensor | None  # (cells, proteins) counts


@torch.no_grad()
def draw_counts(model: Model, cells: Cells, features: Features, sweep: Sweep, index: Tensor) -> Iterator[Piece]:
    """Draw counts from the posterior predictive distribution.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        Read with the model's setup.
    features
        Which genes and proteins; the decoder of a kind that is not asked for is not run.
    sweep
        Batches (each apart, never averaged) and number of samples.
    index
        Positions in `cells`, in the order in which answers are wanted.

    Notes
    -----
    Everything that the likelihood has is drawn or used: the log background of a protein from its posterior, a latent
    library size from its own, extra zeros, per-batch efficiencies of imported models.
    """
    columns = [_tensor(places, cells.label.device) for places in (features.genes, features.proteins)]
    for block in blocks(model, cells, index, size=NOISE_BLOCK):
        for step, (code, sample) in enumerate(_each(sweep)):
            z = sample_z(model, block, sweep.seed, sample)
            batch = block.batch if code is None else in_batch(model, block.batch, code)
            rna = prot = None
            if features.has_genes:
                log_library = _draw_library(model, block, sweep.seed, sample)
                generator = generator_of(block, sweep.seed, step, _RNA)
                rna = _draw_rna(model, z, batch, log_library, columns[0], generator).cpu()
            if features.has_proteins:
                generator = generator_of(block, sweep.seed, step, _PROTEIN)
                prot = _draw_proteins(model, z, batch, columns[1], generator).cpu()
            yield Piece(step, block.rows, rna, prot)


def _tensor(places: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if places is None else torch.from_numpy(places).to(device)


def _each(sweep: Sweep) -> list[tuple[int | None, int]]:
    """Batch and number of the sample of every step."""
    return [(code, sample) for code in sweep.codes or (None,) for sample in range(sweep.n_samples)]


def generator_of(block: Block, seed: int, step: int, what: int) -> torch.Generator:
    """The generator of one block of cells, one step and one kind of noise."""
    number = block.start // NOISE_BLOCK
    return torch.Generator(block.q_z.mean.device).manual_seed(block_seed(seed, step, number, what))


def _draw_library(model: Model, block: Block, seed: int, sample: int) -> Tensor:
    """Log library size `(cells, 1)`."""
    q = model.network.q_library(block.batch)
    if q is None:
        return block.batch.log_library
    return q.sample(Draws(generator_of(block, seed, sample, _LIBRARY)))


def _draw_rna(
    model: Model, z: Tensor, batch: Batch, log_library: Tensor, columns: Tensor | None, generator: torch.Generator
) -> Tensor:
    rates = model.network.decode_rna(z, batch, Draws(), columns=columns)
    mean, likelihood = (log_library + rates.log_scale).exp(), model.config.gene_likelihood
    if likelihood == "poisson":
        return sampling.poisson(mean, generator)
    theta = rates.log_theta.exp()
    if likelihood == "normal":
        return sampling.normal(mean, theta, generator)
    if likelihood == "zinb":
        return sampling.zinb(mean, theta, rates.zero_logits, generator)
    return sampling.nb(mean, theta, generator)


def _draw_proteins(model: Model, z: Tensor, batch: Batch, columns: Tensor | None, generator: torch.Generator) -> Tensor:
    part = model.network.protein
    rates = model.network.decode_protein(z, batch, Draws(generator))
    from_background = sampling.bernoulli(rates.mixing.sigmoid(), generator)
    log_mean = torch.where(from_background, rates.log_back, rates.log_fore)
    if part.log_efficiency is not None:
        log_mean = log_mean + part.log_efficiency[batch.batch]
    counts = sampling.nb(log_mean.exp(), rates.log_phi.exp(), generator)
    return counts if columns is None else counts[:, columns]


def draw_rates(model: Model, block: Block, features: Features, code: int | None, sample: int, seed: int) -> Tensor:
    """One draw of what is behind the counts of a block: gamma rates of genes, then foreground rates of proteins.

    Returns
    -------
    `(cells, genes + proteins)`, genes as shares of the library. The counts of a gene are Poisson draws of its rate; a
    protein that is background in the draw is 0. A gene likelihood without a gamma in it gives the share itself.
    """
    network, parts = model.network, []
    z = sample_z(model, block, seed, sample)
    batch = block.batch if code is None else in_batch(model, block.batch, code)
    columns = [_tensor(places, z.device) for places in (features.genes, features.proteins)]
    if features.has_genes:
        generator = generator_of(block, seed, sample, _RNA)
        if model.config.gene_likelihood in ("poisson", "normal"):
            parts.append(network.decode_share(z, batch, Draws(), columns[0]))
        else:
            rates = network.decode_rna(z, batch, Draws(), columns=columns[0])
            parts.append(sampling.gamma(rates.log_theta.exp(), rates.log_scale.exp(), generator))
    if features.has_proteins:
        generator = generator_of(block, seed, sample, _PROTEIN)
        rates = network.decode_protein(z, batch, Draws(generator))
        from_background = sampling.bernoulli(rates.mixing.sigmoid(), generator)
        value = sampling.gamma(rates.log_phi.exp(), rates.log_fore.exp(), generator).masked_fill_(from_background, 0)
        parts.append(value if columns[1] is None else value[:, columns[1]])
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
