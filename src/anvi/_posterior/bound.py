"""Evidence lower bound, term by term, and the marginal likelihood that it bounds, by importance sampling."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.batches import take
from anvi._data.cells import Cells
from anvi._model import Model
from anvi.nn import VAE, Batch, Config, Draws, Gaussian
from anvi.nn.likelihoods import log_normal_density
from anvi.nn.objective import negative_elbo
from anvi.nn.protein import ProteinRates

from . import encode
from .encode import Block, block_seed, blocks

BACKGROUNDS = 10
"""Draws of the protein background per draw of the rest in :func:`marginal`: decoding is what costs, these do not."""


class Noise(NamedTuple):
    """Standard normal noise for one draw of everything that the bound samples."""

    z: Tensor  # (cells, latent)
    library: Tensor | None  # (cells, 1)
    back: Tensor | None  # (cells, n_back x proteins)
    u: Tensor | None  # (cells, classes x latent)


def _widths(config: Config, n_back: int = 1) -> tuple[int, int, int, int]:
    """How many numbers a cell takes for each part of a draw; 0 for what a model does not have."""
    library = 1 if config.library == "latent" else 0
    return config.n_latent, library, n_back * config.n_proteins, config.n_labels * config.n_latent


def draw_noise(config: Config, seed: int, sample: int, index: Tensor, n_back: int = 1) -> Noise:
    """Noise of cells by their places: the same whichever others are asked about, and in whichever chunk they come."""
    widths = _widths(config, n_back)
    drawn = encode.noise(seed, sample, index, sum(widths), index.device)
    return Noise(*(part if width else None for width, part in zip(widths, drawn.split(widths, dim=1), strict=True)))


class _GivenNoise(Draws):
    """Hands out noise that was drawn before, in the order in which the network asks for it."""

    def __init__(self, *noise: Tensor | None):
        super().__init__()
        self.noise = iter([part for part in noise if part is not None])

    def normal(self, like: Tensor) -> Tensor:
        return next(self.noise).view_as(like)


class Bound(NamedTuple):
    """The evidence lower bound and what it costs, per cell and in nats; None where a model has no such term."""

    elbo: np.ndarray  # (cells,) minus the sum of the others
    reconstruction_rna: np.ndarray  # (cells,) -log p(x|z)
    reconstruction_protein: np.ndarray | None  # (cells,) -log p(y|z) over measured proteins
    kl_z: np.ndarray  # (cells,)
    kl_u: np.ndarray | None  # (cells,)
    kl_label: np.ndarray | None  # (cells,)
    kl_library: np.ndarray | None  # (cells,)
    kl_background: np.ndarray | None  # (cells,)
    penalty: np.ndarray | None  # (cells,)


@torch.no_grad()
def bound(model: Model, cells: Cells, index: Tensor, n_samples: int, seed: int) -> Bound:
    """The full bound of cells, no term weighed, averaged over draws."""
    network = model.network.eval()
    present: list[str] = []
    total = torch.zeros(0)
    for rows in torch.arange(len(index), device=index.device).split(encode.CHUNK):
        rows = rows[torch.argsort((cells.label[index[rows]] < 0).long(), stable=True)]  # as the network wants them
        here = index[rows]
        batch = take(cells, here, n_labelled=int((cells.label[here] >= 0).sum()))
        for sample in range(n_samples):
            noise = draw_noise(model.config, seed, sample, here if cells.rank is None else cells.rank[here])
            u = _rows_of_u(noise.u, batch, model.config)
            terms = network.terms(batch, None, _GivenNoise(noise.z, noise.library, noise.back, u))
            if not present:
                present = [name for name in Bound._fields[1:] if getattr(terms, name) is not None]
                total = torch.zeros(1 + len(present), len(index), dtype=torch.float64, device=index.device)
            parts = [-negative_elbo(terms), *(getattr(terms, name) for name in present)]
            total[:, rows] += torch.stack(parts).double() / n_samples
    found = dict(zip(("elbo", *present), total.cpu().numpy(), strict=True))
    return Bound(*(found.get(name) for name in Bound._fields))


def _rows_of_u(u: Tensor | None, batch: Batch, config: Config) -> Tensor | None:
    """Noise of u as the label part asks for it: one row for a labelled cell, one per class for the others."""
    if u is None:
        return None
    n = 0 if config.objective == "scvi-tools" else batch.n_labelled
    u = u.reshape(len(u), config.n_labels, config.n_latent)
    own = u[torch.arange(n, device=u.device), batch.label[:n]]
    return torch.cat([own, u[n:].flatten(0, 1)])


class Marginal(NamedTuple):
    """An estimate of the log-likelihood of each cell, and how far it can be trusted."""

    log_likelihood: np.ndarray  # (cells,) nats
    effective_samples: np.ndarray  # (cells,) between 1 and the number of draws


@torch.no_grad()
def marginal(model: Model, cells: Cells, index: Tensor, n_samples: int, seed: int) -> Marginal:
    """The log-likelihood of cells by importance sampling from the approximate posterior.

    The parameters are those of :func:`bound`. For a labelled cell it is the likelihood of its counts and its label.
    Given z, proteins are independent of each other, so the background of each is averaged over draws of its own; a
    joint draw of all of them would hardly ever suit every protein. Source: spec section 6, B3 and B4.
    """
    sums, squares = [], []
    for block in blocks(model, cells, index):
        q_library = model.network.q_library(block.batch)
        log_sum = torch.full((len(block.index),), -math.inf, dtype=torch.float64, device=index.device)
        log_square = log_sum.clone()
        for sample in range(n_samples):
            place = block.index if cells.rank is None else cells.rank[block.index]
            noise = draw_noise(model.config, seed, sample, place, BACKGROUNDS)
            log_weight = _log_weight(model.network, block, q_library, noise)
            log_sum = torch.logaddexp(log_sum, log_weight)
            log_square = torch.logaddexp(log_square, 2 * log_weight)
        sums.append(log_sum)
        squares.append(log_square)
    log_sum, log_square = torch.cat(sums), torch.cat(squares)
    return Marginal(
        log_likelihood=(log_sum - math.log(n_samples)).cpu().numpy(),
        effective_samples=(2 * log_sum - log_square).exp().cpu().numpy(),
    )


def _log_weight(network: VAE, block: Block, q_library: Gaussian | None, noise: Noise) -> Tensor:
    """Log of p(cell, everything drawn) / q(everything drawn) for one draw `(cells,)`."""
    batch, config = block.batch, network.config
    sample, log_q = _sample(block.q_z, noise.z)
    log_weight = _log_prior(network, sample, batch, noise.u) - log_q
    log_library = batch.log_library
    if q_library is not None:
        log_library, log_q = _sample(q_library, noise.library)
        mean, var = network.library_mean[batch.batch, None], network.library_var[batch.batch, None]
        log_weight += log_normal_density(log_library, mean, var).sum(-1).double() - log_q
        log_library = log_library.clamp(max=15) if config.has_protein else log_library
    rna, protein = network.decode(network.to_latent(sample), batch, Draws())
    log_weight += network.rna.log_prob(batch, rna, log_library, config.eps).double()
    return log_weight if protein is None else log_weight + _log_proteins(network, protein, batch, noise.back)


def _log_proteins(network: VAE, rates: ProteinRates, batch: Batch, noise: Tensor) -> Tensor:
    """Log of the estimated p(y|z) over measured proteins, the background of each integrated by itself `(cells,)`."""
    part, zero = network.protein, batch.y.new_zeros(())
    y, prior_var = torch.where(batch.measured, batch.y, zero), (2 * part.prior_log_scale).exp()[batch.panel]
    factor, log_ratios = rates.log_fore - rates.log_back, []
    for draw in noise.view(len(noise), -1, part.prior_mean.shape[1]).unbind(1):
        log_back = rates.back_mean + rates.back_scale * draw
        drawn = rates._replace(log_back=log_back, log_fore=log_back + factor)
        log_p = log_normal_density(log_back, part.prior_mean[batch.panel], prior_var)
        log_q = log_normal_density(log_back, rates.back_mean, rates.back_scale.square())
        log_ratios.append(part.log_prob(y, drawn, batch.batch, network.config.eps) + log_p - log_q)
    per_protein = torch.stack(log_ratios).logsumexp(0) - math.log(len(log_ratios))
    return torch.where(batch.measured, per_protein, zero).sum(-1).double()


def _sample(q: Gaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A draw of `q` and its log-density `(cells,)`."""
    sample = q.mean + q.var.sqrt() * noise
    return sample, log_normal_density(sample, q.mean, q.var).sum(-1).double()


def _log_prior(network: VAE, z: Tensor, batch: Batch, noise: Tensor | None) -> Tensor:
    """Log-density of z under the model's own prior, or an estimate that is right on average `(cells,)`.

    Without labels that is N(0, I). With labels, p(z) = sum_c p(c) E[p(z|u,c) p(u) / q(u|z,c)] over u ~ q(u|z,c), of
    which a cell whose label is known keeps the summand of its own class, or those of the classes that it leaves open.
    """
    if network.labels is None:
        return log_normal_density(z, torch.zeros_like(z), torch.ones_like(z)).sum(-1).double()
    part, n_classes = network.labels, network.labels.n_labels
    z_row = z.repeat_interleave(n_classes, 0)  # (cells x classes, latent)
    class_of_row = torch.arange(n_classes, device=z.device).repeat(len(z))[:, None]
    u, log_q = _sample(part.encode_u(z_row, class_of_row, Draws()), noise.reshape(len(z_row), -1))
    p_z = part.decode_u(u, class_of_row, Draws())
    log_ratio = log_normal_density(u, torch.zeros_like(u), torch.ones_like(u)).sum(-1).double() - log_q
    log_joint = log_normal_density(z_row, p_z.mean, p_z.var).sum(-1).double() + log_ratio
    by_class = log_joint.view(len(z), n_classes) + part.log_prior.log_softmax(-1).double()
    if batch.allowed is not None:
        by_class = by_class.masked_fill(~batch.allowed, -math.inf)
    own = by_class.gather(1, batch.label.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(batch.label >= 0, own, by_class.logsumexp(-1))


# importance weights of differential expression: sampling importance resampling ---------------------------------------

N_PROPOSALS = 20
"""Samples of a cell's approximate posterior among which one is chosen."""
Z, BACK, _LIBRARY, _U, _CHOICE = range(5)
"""What noise is for."""


def noise_for(seed: int, population: int, what: int, sample: int, rows: slice, width: int, device) -> Tensor:
    """Noise that belongs to some draws of a population `(rows, width)`, in whichever chunk they come."""
    return encode.noise(block_seed(seed, population, what), sample, rows, width, device)


class Resampled(NamedTuple):
    """One sample per draw."""

    z: Tensor  # (draws, latent)
    pick: Tensor  # (draws,) which of the samples it is
    effective: Tensor  # (draws,) how many samples share the weight, between 1 and N_PROPOSALS


@torch.no_grad()
def resample(model: Model, cells: Cells, index: Tensor, seed: int, population: int) -> Resampled:
    """One latent vector per drawn cell, chosen among several samples of q(z|x) in proportion to their weights.

    The weight of a sample is p(cell, sample) / q(sample), so what is chosen follows the model's own posterior the more
    closely the more samples there are (Rubin 1987, sampling importance resampling). Every draw is weighed by itself, so
    no cell is lost, however unlikely its counts.
    """
    parts = []
    for block in blocks(model, cells, index):
        q_library = model.network.q_library(block.batch)
        noises, log_weights = [], []
        for sample in range(N_PROPOSALS):
            drawn = (
                noise_for(seed, population, what, sample, block.rows, width, index.device) if width else None
                for what, width in zip((Z, _LIBRARY, BACK, _U), _widths(model.config), strict=True)
            )
            noise = Noise(*drawn)
            noises.append(noise.z)
            log_weights.append(_log_weight(model.network, block, q_library, noise))
        weight = truncated(torch.stack(log_weights, dim=1))  # (draws, samples)
        level = torch.special.ndtr(noise_for(seed, population, _CHOICE, 0, block.rows, 1, index.device))  # uniform
        pick = (weight.cumsum(1) < level).sum(1).clamp(max=N_PROPOSALS - 1)
        noise_z = torch.stack(noises, dim=1)[torch.arange(len(pick), device=index.device), pick]
        z = model.network.to_latent(block.q_z.mean + block.q_z.var.sqrt() * noise_z)
        parts.append(Resampled(z, pick, 1 / weight.square().sum(1)))
    return Resampled(*(torch.cat(part) for part in zip(*parts, strict=True)))


def truncated(log_weight: Tensor) -> Tensor:
    """Weights that sum to 1 along the last axis, cut from above at sqrt(n) times their mean first.

    Source: Ionides 2008, Truncated importance sampling.
    """
    n = log_weight.shape[-1]
    log_mean = log_weight.logsumexp(-1, keepdim=True) - math.log(n)
    return torch.minimum(log_weight, log_mean + 0.5 * math.log(n)).softmax(-1)
