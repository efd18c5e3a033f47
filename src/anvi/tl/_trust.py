"""What makes predictions trustworthy: calibrated probabilities, and knowing what the model does not know."""

import logging
from dataclasses import replace

import pandas as pd
import torch

from anvi._data.cells import Cells
from anvi._data.predictions import Far
from anvi._model import Model
from anvi._posterior.calibration import MIN_CELLS, calibrate
from anvi._posterior.encode import Embedding
from anvi._posterior.novelty import novelty, place_landmarks

logger = logging.getLogger("anvi")

HELD_OUT = 5_000
"""Labelled validation cells that are thinned again and again; more would cost memory and tell no more."""


def trusted(
    model: Model, cells: Cells, train: torch.Tensor, validation: torch.Tensor, seed: int
) -> tuple[Model, pd.DataFrame | None]:
    """The model with temperatures and landmarks, and the reliability of its probabilities.

    Parameters
    ----------
    model, cells
        As fitted, on one device.
    train, validation
        Positions of training and validation cells.
    seed
        Of what the held-out cells are put through.
    """
    if not model.config.has_labels:
        return model, None
    train, validation = train.to(cells.label.device), validation.to(cells.label.device)
    validation = _at_most(HELD_OUT, validation[cells.label[validation] >= 0], seed)
    found = calibrate(model, cells, validation, seed)
    if found is None:
        logger.info(f"fewer than {MIN_CELLS} labelled validation cells: probabilities are not calibrated")
        return model, None
    model = replace(model, info=model.info | {"temperature": found.temperature})
    return replace(model, landmarks=place_landmarks(model, cells, train, validation, found.own, seed)), found.table


def _at_most(n: int, index: torch.Tensor, seed: int) -> torch.Tensor:
    """So many of some cells, in their order."""
    chosen = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return index[chosen.to(index.device)]


def how_far(model: Model, cells: Cells, embedding: Embedding, false_rejects: float) -> Far | None:
    """Novelty of the cells, and which of them are beyond the limit; None where the model cannot tell."""
    if model.landmarks is not None and model.landmarks.centre is None:
        logger.warning(
            "the model is of an earlier anvi: no novelty, and nothing is 'Unassigned', until it is fitted again"
        )
    found = novelty(model, cells, embedding.mean, embedding.proba)
    return None if found is None else Far(found.score, found.unassigned(false_rejects))
