"""None of these: how far a cell lies from the labelled cells that the model knows, and how undecided it is.

Distances are taken in the latent space to the centre of the nearest class, in units of how far the cells of a class
scatter about its centre in that direction (Mahalanobis' distance, one covariance for all classes). Cells without
proteins are held against the centres and the scatter of cells whose proteins were hidden as well. A cell between two
classes is stranger than one as far away beside a single class, so the distance is lengthened by the entropy of its
probabilities, at most twofold. What is far is told by held-out labelled cells seen as queries are seen: a score of 1 is
what 5 % of them exceed. A batch whose nearest cells lie farther away than those of the held-out cells is off as a
whole, which says nothing of types, and is measured by a longer unit. Source: Lee et al. 2018, A simple unified
framework for detecting out-of-distribution samples.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._data.shifted import Shift, shifted
from anvi._model import Landmarks, Model

from . import encode
from .calibration import FITTED_ON

CELLS = 5_000
"""Labelled training cells that are looked at, at most, or one of every class; as many of each where there are."""
MIN_CELLS = 50
"""Held-out labelled cells below which there is no telling what is far."""
MIN_BATCH = 100
"""Cells of a batch below which its distances are taken as they are."""
LONGEST_UNIT = 1.5
"""How much longer the unit of a batch may be; a batch of new types alone must not pass for one that is merely off."""
FALSE_REJECTS = 0.05
"""Share of held-out labelled cells that a score above 1 would reject."""


class Novelty(NamedTuple):
    """What the landmarks say of some cells."""

    score: np.ndarray  # (cells,) 1 is the default threshold
    kind: np.ndarray  # (cells,) which landmarks: of cells with proteins or without
    quantiles: np.ndarray  # (kinds, 101) scores of held-out labelled cells

    def unassigned(self, false_rejects: float) -> np.ndarray:
        """Cells that are farther away than all but this share of held-out labelled cells `(cells,)`."""
        if false_rejects == 0:
            return np.zeros(len(self.score), dtype=bool)
        grid = np.linspace(0, 1, self.quantiles.shape[1])
        limit = np.array([np.interp(1 - false_rejects, grid, scores) for scores in self.quantiles])
        return self.score > limit[self.kind]


@torch.no_grad()
def place_landmarks(
    model: Model, cells: Cells, trained: Tensor, held_out: Tensor, own: Tensor, seed: int
) -> Landmarks | None:
    """Find the landmarks of a model and see how far held-out labelled cells lie from them.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        The cells of the fit, with labels.
    trained, held_out
        Positions of training and of validation cells.
    own
        What held-out cells give their own class, kept beside the landmarks.
    seed
        Of the choice and the shifts.

    Returns
    -------
    None if too few held-out cells are labelled.
    """
    known = held_out[cells.label[held_out] >= 0]
    if len(known) < MIN_CELLS:
        return None
    chosen = _of_every_class(cells.label, trained, torch.Generator().manual_seed(seed))
    frequency = cells.label[trained][cells.label[trained] >= 0].bincount().cpu()  # (classes,)
    kinds = (True, False) if model.config.has_protein else (False,)
    found = [_place(model, cells, chosen, known, frequency, proteins, seed) for proteins in kinds]
    centre, whiten, quantiles = (torch.stack(part) for part in zip(*found, strict=True))
    return Landmarks(quantiles, own, centre, whiten)


def _place(
    model: Model, cells: Cells, chosen: Tensor, known: Tensor, frequency: Tensor, proteins: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, whitening and quantiles of cells with or without proteins."""
    as_it_is = encode.embed(model, shifted(cells, chosen, Shift(proteins=proteins), seed))
    centre, whiten = _centres(torch.from_numpy(as_it_is.mean), cells.label[chosen].cpu(), frequency)
    scores = []
    for i, shift in enumerate(FITTED_ON):
        as_query = shifted(cells, known, shift._replace(proteins=proteins), encode.block_seed(seed, i, proteins))
        found = encode.embed(model, as_query)
        scores.append(_strangeness(found.mean, found.proba, centre, whiten))
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    return centre, whiten, torch.quantile(torch.cat(scores).double(), grid).float()


def _of_every_class(label: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Some of the labelled cells among `index`, as many of every class where there are: `CELLS`, or one of each."""
    index = index[label[index] >= 0].cpu()
    index = index[torch.randperm(len(index), generator=generator)]
    code = label.cpu()[index]
    classes = code.unique()
    per_class = max(1, CELLS // len(classes))
    parts = [index[code == c][:per_class] for c in classes]
    return torch.cat(parts).sort().values.to(label.device)


def _centres(latent: Tensor, label: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of every class, and what makes the scatter about them 1 in every direction: `Landmarks.centre, .whiten`.

    The covariance is that of all classes together, each as it is frequent, with as many cells of equal scatter in every
    direction added as there are dimensions.
    """
    classes, code = label.unique(return_inverse=True)
    z, n = latent.double(), code.bincount()
    centre = torch.zeros(len(classes), z.shape[1], dtype=z.dtype).index_add_(0, code, z) / n[:, None]
    off, weight = z - centre[code], (frequency[classes] / n).double()[code]
    weight *= len(z) / weight.sum()  # how many cells each one stands for, of as many as are looked at
    scatter, total, n_latent = off.T @ (off * weight[:, None]), len(z), z.shape[1]
    even = (scatter.trace() / total / n_latent).clamp(min=1e-12) * torch.eye(n_latent, dtype=z.dtype)
    covariance = (scatter + n_latent * even) / (total + n_latent)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    return centre.float(), whiten.float()


def _strangeness(latent: np.ndarray, proba: np.ndarray, centre: Tensor, whiten: Tensor) -> Tensor:
    """Distance to the nearest centre, times 1 for a decided and 2 for an undecided cell `(cells,)`."""
    z, p = torch.from_numpy(latent) @ whiten, torch.from_numpy(proba)
    # by differences: what a matrix product gives cancels where whitened numbers are large
    exactly = "donot_use_mm_for_euclid_dist"
    distance = torch.cat([torch.cdist(part, centre @ whiten, compute_mode=exactly).amin(1) for part in z.split(4_096)])
    return distance * (1 - torch.xlogy(p, p).sum(1) / np.log(max(2, p.shape[1])))


@torch.no_grad()
def novelty(model: Model, cells: Cells, latent: np.ndarray, proba: np.ndarray) -> Novelty | None:
    """Score cells by their latent vectors and class probabilities; None where the model has no centres of classes.

    Parameters
    ----------
    model
        The model.
    cells
        The cells, in the order of the arrays.
    latent
        Posterior means `(cells, latent)`.
    proba
        Calibrated probabilities `(cells, classes)`.
    """
    if model.landmarks is None or model.landmarks.centre is None:
        return None
    centre, whiten, quantiles = model.landmarks.centre, model.landmarks.whiten, model.landmarks.quantiles
    kind = torch.from_numpy(encode.kind_of(model, cells))  # (cells,) which set of landmarks
    strangeness = torch.zeros(len(cells))
    for i in range(len(quantiles)):
        here = (kind == i).numpy()
        strangeness[kind == i] = _strangeness(latent[here], proba[here], centre[i], whiten[i])
    place = round((1 - FALSE_REJECTS) * 100)
    unit = quantiles[:, place, None].clamp(min=1e-12)  # (kinds, 1)
    score, scores = strangeness / unit[kind, 0], quantiles / unit
    for batch in cells.batch.unique().tolist():
        for i in range(len(quantiles)):
            some = ((cells.batch == batch).cpu()) & (kind == i)
            if int(some.sum()) >= MIN_BATCH:
                longer = float(score[some].quantile(0.25) / scores[i, 25].clamp(min=1e-12))
                score[some] /= min(max(1.0, longer), LONGEST_UNIT)
    return Novelty(score.numpy(), kind.numpy(), scores.numpy())
