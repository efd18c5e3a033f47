"""Questions to a fitted model: model and cells in, arrays out, chunk by chunk on the device."""

from typing import NamedTuple

import numpy as np
import torch

from ._data.batches import chunks
from ._data.cells import Cells
from ._model import Model
from .nn import Draws

CHUNK = 2_048
"""Cells per pass; bounds the memory of a query, changes nothing in its result."""


class Embedding(NamedTuple):
    """What the encoder says of each cell."""

    mean: np.ndarray  # (cells, latent) posterior mean
    var: np.ndarray  # (cells, latent) posterior variance
    proba: np.ndarray | None  # (cells, classes)


@torch.no_grad()
def embed(model: Model, cells: Cells, *, sample_seed: int | None = None) -> Embedding:
    """Encode and classify all cells in one pass.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        Read with the model's setup.
    sample_seed
        None classifies the posterior mean; a seed classifies one posterior sample.

    Returns
    -------
    Arrays in the order of the cells. A logistic-normal latent is returned as the softmax of the mean.
    """
    network = model.network.eval()
    device = cells.label.device
    draws = Draws()
    noise = None if sample_seed is None else Draws(torch.Generator(device).manual_seed(sample_seed))
    means, variances, probabilities = [], [], []
    for batch in chunks(cells, torch.arange(len(cells), device=device), CHUNK):
        q_z = network.encode(batch, draws)
        means.append(network.to_latent(q_z.mean).cpu())
        variances.append(q_z.var.cpu())
        if network.labels is not None:
            z = q_z.mean if noise is None else q_z.sample(noise)
            probabilities.append(network.labels.classify(z, draws).softmax(-1).cpu())
    return Embedding(
        mean=torch.cat(means).numpy(),
        var=torch.cat(variances).numpy(),
        proba=torch.cat(probabilities).numpy() if probabilities else None,
    )


@torch.no_grad()
def latent_samples(model: Model, cells: Cells, n_samples: int, seed: int) -> np.ndarray:
    """Samples of the latent posterior `(samples, cells, latent)`."""
    network = model.network.eval()
    device = cells.label.device
    draws = Draws(torch.Generator(device).manual_seed(seed))
    parts = []
    for batch in chunks(cells, torch.arange(len(cells), device=device), CHUNK):
        q_z = network.encode(batch, Draws())
        parts.append(torch.stack([network.to_latent(q_z.sample(draws)) for _ in range(n_samples)]).cpu())
    return torch.cat(parts, dim=1).numpy()


class ProteinReadout(NamedTuple):
    """What the decoder says of the proteins of each cell, measured or not."""

    rate: np.ndarray  # (cells, proteins) expected count: the mean of background and foreground, weighed
    foreground: np.ndarray  # (cells, proteins) probability that a count is foreground


@torch.no_grad()
def read_proteins(model: Model, cells: Cells) -> ProteinReadout:
    """Expected protein counts and foreground probabilities at the posterior mean."""
    network = model.network.eval()
    rates, foregrounds = [], []
    for batch in chunks(cells, torch.arange(len(cells), device=cells.label.device), CHUNK):
        z = network.to_latent(network.encode(batch, Draws()).mean)
        protein = network.decode(z, batch, Draws())[1]
        background = protein.mixing.sigmoid()
        rates.append((background * protein.log_back.exp() + (1 - background) * protein.log_fore.exp()).cpu())
        foregrounds.append((1 - background).cpu())
    return ProteinReadout(torch.cat(rates).numpy(), torch.cat(foregrounds).numpy())
