"""What latent vectors mean in genes and proteins."""

from typing import NamedTuple

import numpy as np
import torch

from anvi._data.cells import Cells
from anvi._model import Model
from anvi.nn import Batch, Draws

from .encode import blocks


def in_batch(model: Model, batch: Batch, code: int) -> Batch:
    """The same cells as if they came from another batch; the encoder never sees this."""
    codes = batch.codes
    if model.config.n_batches > 1:  # a single batch injects nothing
        codes = codes.clone()
        codes[:, 0] = code  # batch comes first among the covariates
    return batch._replace(batch=torch.full_like(batch.batch, code), codes=codes)


class ProteinReadout(NamedTuple):
    """What the decoder says of the proteins of each cell, measured or not."""

    rate: np.ndarray  # (cells, proteins) expected count: the mean of background and foreground, weighed
    foreground: np.ndarray  # (cells, proteins) probability that a count is foreground


@torch.no_grad()
def read_proteins(model: Model, cells: Cells) -> ProteinReadout:
    """Expected protein counts and foreground probabilities at the posterior mean."""
    network = model.network
    rates, foregrounds = [], []
    for block in blocks(model, cells):
        protein = network.decode_protein(network.to_latent(block.q_z.mean), block.batch, Draws())
        background = protein.mixing.sigmoid()
        rates.append((background * protein.log_back.exp() + (1 - background) * protein.log_fore.exp()).cpu())
        foregrounds.append((1 - background).cpu())
    return ProteinReadout(torch.cat(rates).numpy(), torch.cat(foregrounds).numpy())
