"""None of these: how far a cell lies from the labelled cells that the model knows, and how undecided it is.

Distances are taken in the latent space to landmarks, some labelled training cells of every class. Cells without
proteins are compared to landmarks whose proteins were hidden as well. A cell between two classes is stranger than one
as far away beside a single class, so the distance is lengthened by the entropy of its probabilities, at most twofold.
What is far is told by held-out labelled cells seen as queries are seen: a score of 1 is what 5 % of them exceed. A
batch whose nearest cells lie farther away than those of the held-out cells is off as a whole, which says nothing of
types, and is measured by a longer unit. Source: k-nearest-neighbour detection of out-of-distribution cases, Sun et al.
2022.
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

PER_CLASS = 100
"""Landmarks of a class, at most."""
MIN_CELLS = 50
"""Held-out labelled cells below which there is no telling what is far."""
NEIGHBOURS = 5
MIN_BATCH = 100
"""Cells of a batch below which its distances are taken as they are."""
LONGEST_UNIT = 1.5
"""How much longer the unit of a batch may be; a batch of new types alone must not pass for one that is merely off."""
FALSE_REJECTS = 0.05
"""Share of held-out labelled cells that a score above 1 would reject."""


class Novelty(NamedTuple):
    """What the landmarks say of some cells."""

    score: np.ndarray  # (cells,) 1 is the default threshold
    kind: np.ndarray  # (cells,) which landmarks: with or without proteins
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
    """Choose the landmarks of a model and see how far held-out labelled cells lie from them.

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
    kinds = (True, False) if model.config.has_protein else (False,)
    latent, quantiles = [], []
    for proteins in kinds:
        seen = shifted(cells, chosen, Shift(proteins=proteins), seed)
        marks = torch.from_numpy(encode.embed(model, seen).mean)
        scores = []
        for i, shift in enumerate(FITTED_ON):
            as_query = shifted(cells, known, shift._replace(proteins=proteins), encode.block_seed(seed, i, proteins))
            found = encode.embed(model, as_query)
            scores.append(_strangeness(found.mean, found.proba, marks))
        grid = torch.linspace(0, 1, 101, dtype=torch.float64)
        latent.append(marks)
        quantiles.append(torch.quantile(torch.cat(scores).double(), grid).float())
    return Landmarks(torch.stack(latent), torch.stack(quantiles), own)


def _of_every_class(label: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Up to `PER_CLASS` of the labelled cells among `index` from every class."""
    index = index[label[index] >= 0].cpu()
    index = index[torch.randperm(len(index), generator=generator)]
    code = label.cpu()[index]
    parts = [index[code == c][:PER_CLASS] for c in code.unique()]
    return torch.cat(parts).sort().values.to(label.device)


def _strangeness(latent: np.ndarray, proba: np.ndarray, marks: Tensor) -> Tensor:
    """Mean distance to the nearest landmarks, times 1 for a decided and 2 for an undecided cell `(cells,)`."""
    n, p = min(NEIGHBOURS, len(marks)), torch.from_numpy(proba)
    parts = torch.from_numpy(latent).split(4_096)
    distance = torch.cat([torch.cdist(part, marks).topk(n, largest=False).values.mean(1) for part in parts])
    return distance * (1 - torch.xlogy(p, p).sum(1) / np.log(max(2, p.shape[1])))


@torch.no_grad()
def novelty(model: Model, cells: Cells, latent: np.ndarray, proba: np.ndarray) -> Novelty | None:
    """Score cells by their latent vectors and class probabilities; None where the model has no landmarks.

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
    if model.landmarks is None:
        return None
    marks, quantiles = model.landmarks.latent, model.landmarks.quantiles
    kind = torch.from_numpy(encode.kind_of(model, cells))  # (cells,) which set of landmarks
    strangeness = torch.zeros(len(cells))
    for i, some in enumerate(marks):
        here = (kind == i).numpy()
        strangeness[kind == i] = _strangeness(latent[here], proba[here], some)
    place = round((1 - FALSE_REJECTS) * 100)
    unit = quantiles[:, place, None].clamp(min=1e-12)  # (kinds, 1)
    score, scores = strangeness / unit[kind, 0], quantiles / unit
    for batch in cells.batch.unique().tolist():
        for i in range(len(marks)):
            some = ((cells.batch == batch).cpu()) & (kind == i)
            if int(some.sum()) >= MIN_BATCH:
                longer = float(score[some].quantile(0.25) / scores[i, 25].clamp(min=1e-12))
                score[some] /= min(max(1.0, longer), LONGEST_UNIT)
    return Novelty(score.numpy(), kind.numpy(), scores.numpy())
