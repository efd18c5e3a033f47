"""Prediction sets: the classes that a cell may well be, its own among them at a stated rate.

Split conformal prediction, class by class: a class is left out of the set of a cell if the cell gives it less than all
but a few of the held-out cells of that class gave it. If a cell of some class is drawn as those were, it has its class
in the set with at least the stated probability, whatever the classifier. Source: Vovk 2012, Conditional validity of
inductive conformal predictors; Sadinle et al. 2019, Least ambiguous set-valued classifiers.
"""

import logging
import math

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._model import Model

from . import encode

logger = logging.getLogger("anvi")

PER_CLASS = 200
"""Held-out cells of a class that are kept, at most."""
HIGHEST = 0.995
"""Coverage that so many cells can just tell from 1."""


def own_probability(proba: Tensor, target: Tensor, seed: int) -> Tensor:
    """What held-out cells give their own class.

    Parameters
    ----------
    proba
        `(cells, classes)`.
    target
        Class codes `(cells,)`.
    seed
        Of the choice where a class has more than `PER_CLASS` cells.

    Returns
    -------
    `(classes, PER_CLASS)`, in ascending order, NaN behind the last.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(target), generator=generator)
    proba, target = proba[order], target[order]
    out = torch.full((proba.shape[1], PER_CLASS), torch.nan)
    for code in range(proba.shape[1]):
        own = proba[target == code, code][:PER_CLASS]
        out[code, : len(own)] = own.sort().values.float()
    return out


def thresholds(own: Tensor, coverage: float) -> Tensor:
    """Probabilities below which a class is left out `(classes,)`; 0 where too few held-out cells can tell.

    Of n held-out cells and a new one, each is as likely as the others to be among the k lowest.
    """
    found = torch.zeros(len(own))
    for code, values in enumerate(own):
        n = int(values.isfinite().sum())
        k = min(n, math.floor((n + 1) * (1 - coverage) + 1e-9))
        if k > 0:
            found[code] = values[k - 1]
    return found


def prediction_sets(model: Model, cells: Cells, proba: np.ndarray, coverage: float) -> np.ndarray:
    """Which classes each cell may be `(cells, classes)` bool.

    Parameters
    ----------
    model
        With landmarks.
    cells
        The cells, in the order of `proba`.
    proba
        Calibrated probabilities `(cells, classes)`.
    coverage
        How often the true class is to be in the set.
    """
    own = model.landmarks.own  # (kinds, classes, held-out cells)
    limit = torch.stack([thresholds(some, coverage) for some in own]).numpy()  # (kinds, classes)
    mute = [name for name, low in zip(model.classes, limit.min(0), strict=True) if low == 0]
    if mute:
        logger.info(f"too few held-out cells to leave out {', '.join(mute)}: in every set at coverage={coverage}")
    return proba >= limit[encode.kind_of(model, cells)]
