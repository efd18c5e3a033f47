"""Probabilities that mean what they say: temperatures for held-out labelled cells seen as queries are seen.

A query differs from the reference: it is shallower or of other efficiencies, and often has no proteins. A temperature
that suits held-out cells as they are makes a model too sure of such cells. So held-out cells are thinned first, once
with and once without their proteins, and the temperature is fitted to all of that together. Source: Guo et al. 2017, On
calibration of modern neural networks.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from anvi._data.cells import Cells
from anvi._data.reliability import reliability
from anvi._data.shifted import Shift, shifted
from anvi._model import Model
from anvi.nn import Draws

from . import encode
from .prediction_sets import own_probability

FITTED_ON = (Shift(1.0, 0.0), Shift(0.7, 0.3), Shift(0.4, 0.4))
"""What held-out cells are put through before the temperature is fitted."""
JUDGED_ON = (Shift(0.85, 0.5), Shift(0.55, 0.2), Shift(0.3, 0.3))
"""What they are put through, with other efficiencies, to say how good it is; never used for fitting."""
MIN_CELLS = 20
"""Held-out labelled cells below which nothing is fitted."""
PRIOR_SPREAD = 0.5
"""Standard deviation of the log temperature around 0 before any cell is seen: few cells move it little."""


class Calibration(NamedTuple):
    """Temperatures of a model, and what they do on shifts that they were not fitted on."""

    temperature: dict[str, float]  # by encode.GROUPS
    table: pd.DataFrame  # a row per group, "before" or "after", and bin of confidence
    own: Tensor  # (groups, classes, cells) what held-out cells give their own class, see prediction_sets


@torch.no_grad()
def calibrate(model: Model, cells: Cells, held_out: Tensor, seed: int) -> Calibration | None:
    """Fit the temperatures of a model.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        The cells of the fit, with labels.
    held_out
        Positions of those that were not trained on.
    seed
        Of the shifts.

    Returns
    -------
    None if too few held-out cells are labelled.
    """
    known = held_out[cells.label[held_out] >= 0]
    if len(known) < MIN_CELLS:
        return None
    temperature, tables, own = {}, [], []
    one_shift = torch.arange(len(known)) % len(FITTED_ON) * len(known) + torch.arange(len(known))  # of every cell
    for proteins in (True, False) if model.config.has_protein else (False,):
        name = encode.GROUPS[proteins]
        fit_logits, fit_target = _seen(model, cells, known, FITTED_ON, proteins, seed)
        logits, target = _seen(model, cells, known, JUDGED_ON, proteins, seed + 1)
        temperature[name] = fit_temperature(fit_logits, fit_target)
        proba = (fit_logits[one_shift].float() / temperature[name]).softmax(-1)  # rounded as those of a query are
        own.append(own_probability(proba, fit_target[one_shift], seed))
        for when, t in (("before", 1.0), ("after", temperature[name])):
            confidence, predicted = (logits / t).softmax(-1).max(-1)
            table = reliability(confidence.numpy(), (predicted == target).numpy())
            tables.append(table.assign(cells_seen=name, when=when))
    return Calibration(temperature, pd.concat(tables, ignore_index=True), torch.stack(own))


def _seen(model: Model, cells: Cells, index: Tensor, shifts: tuple[Shift, ...], proteins: bool, seed: int):
    """Logits and classes of some cells under several shifts, one after the other."""
    logits, target = [], []
    for i, shift in enumerate(shifts):
        as_query = shifted(cells, index, shift._replace(proteins=proteins), encode.block_seed(seed, i, proteins))
        logits += [model.network.labels.classify(block.q_z.mean, Draws()) for block in encode.blocks(model, as_query)]
        target.append(as_query.label)
    return torch.cat(logits).double().cpu(), torch.cat(target).cpu()


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The most probable temperature, with a prior around 1 that a few hundred cells overrule.

    Parameters
    ----------
    logits
        `(cells, classes)`.
    target
        Class codes `(cells,)`.
    """

    def loss(log_t: float) -> float:
        surprise = float(torch.nn.functional.cross_entropy(logits / np.exp(log_t), target, reduction="sum"))
        return surprise + 0.5 * (log_t / PRIOR_SPREAD) ** 2

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20.0), np.log(20.0)), method="bounded").x))
