"""Cells as if they came from elsewhere."""

import torch

from anvi._model import Model
from anvi.nn import Batch


def in_batch(model: Model, batch: Batch, code: int) -> Batch:
    """The same cells as if they came from another batch; the encoder never sees this."""
    codes = batch.codes
    if model.config.n_batches > 1:  # a single batch injects nothing
        codes = codes.clone()
        codes[:, 0] = code  # batch comes first among the covariates
    return batch._replace(batch=torch.full_like(batch.batch, code), codes=codes)
