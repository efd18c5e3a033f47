"""Samples of the latent vector that follow the model's own posterior more closely than the encoder's does."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._model import Model
from anvi.nn import Config, Draws

from . import encode
from .bound import Noise, _log_weight
from .encode import Block, block_seed, blocks

N_PROPOSALS = 20
"""Samples of a cell's approximate posterior among which one is chosen."""
Z, BACK, _LIBRARY, _U, _CHOICE = range(5)
"""What noise is for."""


def noise_for(seed: int, population: int, what: int, sample: int, rows: slice, width: int, device) -> Tensor:
    """Noise that belongs to some draws of a population `(rows, width)`, in whichever chunk they come."""
    return encode.noise(block_seed(seed, population, what), sample, rows, width, device)


class Chosen(NamedTuple):
    """One sample per draw."""

    z: Tensor  # (draws, latent)
    pick: Tensor  # (draws,) which of the samples it is
    effective: Tensor  # (draws,) how many samples share the weight, between 1 and N_PROPOSALS


@torch.no_grad()
def resample(model: Model, cells: Cells, index: Tensor, seed: int, population: int) -> Chosen:
    """One latent vector per drawn cell, chosen among several samples of q(z|x) in proportion to their weights.

    The weight of a sample is p(cell, sample) / q(sample), so what is chosen follows the model's own posterior the more
    closely the more samples there are (Rubin 1987, sampling importance resampling). Every draw is weighed by itself, so
    no cell is lost, however unlikely its counts.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        Read with the model's setup, with counts and without labels.
    index
        Positions of the drawn cells.
    seed, population
        What the noise is told by.
    """
    parts = []
    for block in blocks(model, cells, index):
        q_library = None
        if model.network.library_encoder is not None:
            q_library = model.network.library_encoder(model.network.features(block.batch), block.batch.codes, Draws())
        noises, log_weights = [], []
        for sample in range(N_PROPOSALS):
            noise = _noise_of(model.config, block, seed, population, sample)
            noises.append(noise.z)
            log_weights.append(_log_weight(model.network, block, q_library, noise))
        weight = truncated(torch.stack(log_weights, dim=1))  # (draws, samples)
        level = torch.special.ndtr(noise_for(seed, population, _CHOICE, 0, block.rows, 1, index.device))  # uniform
        pick = (weight.cumsum(1) < level).sum(1).clamp(max=N_PROPOSALS - 1)
        noise_z = torch.stack(noises, dim=1)[torch.arange(len(pick), device=index.device), pick]
        z = model.network.to_latent(block.q_z.mean + block.q_z.var.sqrt() * noise_z)
        parts.append(Chosen(z, pick, 1 / weight.square().sum(1)))
    return Chosen(*(torch.cat(part) for part in zip(*parts, strict=True)))


def truncated(log_weight: Tensor) -> Tensor:
    """Weights that sum to 1 along the last axis, cut from above at sqrt(n) times their mean first.

    Source: Ionides 2008, Truncated importance sampling.
    """
    n = log_weight.shape[-1]
    log_mean = log_weight.logsumexp(-1, keepdim=True) - math.log(n)
    return torch.minimum(log_weight, log_mean + 0.5 * math.log(n)).softmax(-1)


def _noise_of(config: Config, block: Block, seed: int, population: int, sample: int) -> Noise:
    """Noise of one sample of everything that the model draws for the cells of a block."""

    def part(what: int, width: int) -> Tensor | None:
        device = block.q_z.mean.device
        return noise_for(seed, population, what, sample, block.rows, width, device) if width else None

    u = part(_U, config.n_labels * config.n_latent)
    return Noise(
        z=part(Z, config.n_latent),
        library=part(_LIBRARY, 1 if config.library == "latent" else 0),
        back=part(BACK, config.n_proteins),
        u=None if u is None else u.reshape(-1, config.n_labels, config.n_latent),
    )
