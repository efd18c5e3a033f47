"""Labels at several levels: how sure a model must be at each, and how far cells are from what it knows there."""

import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._data.predictions import NoveltyScores, reliability
from anvi._model import Landmarks, Model

from . import confidence, encode
from .encode import Embedding

logger = logging.getLogger("anvi")

LEAST = 0.5
"""Probability below which no label is sure: above it a cell has one label at each level, each under the one before."""
NEVER = 2.0
"""A limit that no probability reaches."""


@torch.no_grad()
def with_levels(
    model: Model, table: pd.DataFrame | None, cells: Cells, train: Tensor, validation: Tensor, seed: int
) -> tuple[Model, pd.DataFrame | None]:
    """The model with what its held-out labelled cells say at each level, and how reliable its probabilities are there.

    As they are where these cells are too few; `table` is the reliability at the finest level.
    """
    if model.landmarks is None:
        return model, table
    train, validation = train.to(cells.label.device), validation.to(cells.label.device)
    fine, told = (
        confidence.at_most(confidence.HELD_OUT, validation[code[validation] >= 0], torch.Generator().manual_seed(seed))
        for code in (cells.label, cells.told)
    )
    chosen = confidence.of_every_class(cells.told, train, torch.Generator().manual_seed(seed))
    cells.x.hold(cells.x_row[chosen])
    sure, above = [], []
    groups = confidence.kinds(model, cells, fine)
    for group in groups:
        some, some_told, some_chosen = (confidence.standing_for(group, cells, part) for part in (fine, told, chosen))
        sure.append(_sureness(model, cells, some, group, seed))
        if model.setup.label_levels:
            above.append(_landmarks(model, cells, some_chosen, some_told, train, group, seed))
    most = max(part.shape[1] for part in sure)  # 0 is too little to be looked at
    parts = {"sure": torch.stack([torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in sure])}
    if above:
        names = ("above_centre", "above_whiten", "above_quantiles")
        parts |= dict(zip(names, map(torch.stack, zip(*above, strict=True)), strict=True))
        table = _reliability(model, table, cells, told, groups, seed)
    return replace(model, landmarks=model.landmarks._replace(**parts)), table


def _reliability(
    model: Model, finest: pd.DataFrame, cells: Cells, told: Tensor, groups: tuple[str, ...], seed: int
) -> pd.DataFrame:
    """Reliability at every level, of thinnings that nothing was fitted on, before and after calibration."""
    levels, known = model.setup.levels, model.setup.levels.known()
    plain = replace(model, info={name: fact for name, fact in model.info.items() if name != "temperature"})
    tables = [finest.assign(level=levels.names[-1])]
    for group in groups:
        some = confidence.standing_for(group, cells, told)
        for when, one in (("before", plain), ("after", model)):
            proba, code = [], []
            for i, shift in enumerate(confidence.JUDGED_ON):
                query = confidence.as_query(cells, some, shift, group, seed + 1, i)
                proba.append(encode.embed(one, query).proba)
                code.append(known[:, query.label_row.cpu().numpy()])
            p, true = np.concatenate(proba), np.concatenate(code, axis=1)  # (cells, classes), (levels, cells)
            for number, level in enumerate(levels.coarser):
                sums, inside = levels.sums(p, number), true[number] >= 0
                found = reliability(sums.max(1)[inside], (sums.argmax(1) == true[number])[inside])
                tables.append(found.assign(cells_seen=group, when=when, level=level))
    return pd.concat(tables, ignore_index=True)


# how sure is sure enough ----------------------------------------------------------------------------------------------


def _sureness(model: Model, cells: Cells, index: Tensor, group: str, seed: int) -> Tensor:
    """Highest probability at each level `(levels, cells)` of held-out cells, each thinned once; negative if wrong."""
    levels, parts = model.setup.levels, []
    shifts = confidence.FITTED_ON
    for i, shift in enumerate(shifts):
        query = confidence.as_query(cells, index[i :: len(shifts)], shift, group, seed, i)
        proba, label = encode.embed(model, query).proba, query.label.cpu().numpy()
        of_levels = []
        for number in range(len(levels.names)):
            code, p = levels.codes(number), levels.sums(proba, number)
            of_levels.append(np.where(p.argmax(1) == code[label], p.max(1), -p.max(1)))
        parts.append(torch.from_numpy(np.stack(of_levels)).float())
    return torch.cat(parts, dim=1)


def limits(landmarks: Landmarks, share: float) -> np.ndarray:
    """Least probability at which a cell may be labelled at each level `(kinds, levels)`, so that so many are right.

    From the finest level up: as many held-out cells as can be are labelled there, of which, with one more that is
    wrong, no more are wrong than may be; the others go on to the next level. A level at which there are too few is not
    used: 19 right ones and none wrong are needed for 95 %.
    """
    kinds, n_levels, _ = landmarks.sure.shape
    found = np.full((kinds, n_levels), NEVER)
    for kind in range(kinds):
        sure, open_ = landmarks.sure[kind].numpy(), np.ones(landmarks.sure.shape[2], dtype=bool)
        for number in reversed(range(n_levels)):
            p = np.abs(sure[number])
            some = sure[number][open_ & (p >= LEAST)]
            some = some[np.argsort(-np.abs(some), kind="stable")]  # the surest first
            here, wrong = np.abs(some), (some < 0).cumsum()
            last = np.append(here[1:] < here[:-1], True)[: len(here)]  # those that are as sure go together
            good = np.flatnonzero(last & ((wrong + 1) / (np.arange(len(here)) + 2) <= 1 - share + 1e-9))
            if len(good):
                found[kind, number] = here[good[-1]]
            open_ &= p < found[kind, number]
    return found


# how far is far at each level -----------------------------------------------------------------------------------------


def _landmarks(model: Model, cells: Cells, chosen: Tensor, told: Tensor, train: Tensor, group: str, seed: int):
    """Centres, whitening and quantiles `(coarser levels, ...)` of the groups, of cells of a kind."""
    levels, known = model.setup.levels, torch.from_numpy(model.setup.levels.known())
    mean, queries = confidence.embedded(model, cells, chosen, told, group, seed)
    row, found = cells.label_row.cpu(), []
    for number in range(levels.finest):
        code = known[number][row]  # (cells,) -1 where the label leaves several groups open
        here, of_train, inside = code[chosen.cpu()], code[train.cpu()], (code[told.cpu()] >= 0).numpy()
        frequency = of_train[of_train >= 0].bincount(minlength=len(levels.groups(number)))
        some = [(one.mean[inside], levels.sums(one.proba[inside], number)) for one in queries]
        centre, *rest = confidence.landmarks(mean[here >= 0], here[here >= 0], frequency, some)
        most = len(levels.table[-1])  # the first again where a level has fewer: as near as it is
        found.append((torch.cat([centre, centre[:1].expand(most - len(centre), -1)]), *rest))
    return tuple(torch.stack(part) for part in zip(*found, strict=True))


def novelties(
    model: Model, cells: Cells, embedding: Embedding, false_rejects: float
) -> tuple[NoveltyScores, ...] | None:
    """Novelty of the cells at each level, coarse to fine; None where the model cannot tell."""
    marks, levels = model.landmarks, model.setup.levels
    if marks is not None and marks.centre is None:
        logger.warning(
            "the model is of an earlier anvi: no novelty, and nothing is 'Unassigned', until it is fitted again"
        )
    elif model.info.get("n_neighbors") is None and "temperature" in model.info:
        logger.warning(
            "the model is of an earlier anvi: its classifier labels cells alone, without the help of labelled "
            "neighbours, until it is fitted again"
        )
    finest = confidence.novelty(model, cells, embedding.mean, embedding.proba)
    if finest is None:
        return None
    found = []
    for number in range(levels.finest):
        places = (marks.above_centre[:, number], marks.above_whiten[:, number], marks.above_quantiles[:, number])
        proba = levels.sums(embedding.proba, number)
        found.append(confidence.scored(cells, model, embedding.mean, proba, *places))
    return tuple(NoveltyScores(one.score, one.unassigned(false_rejects)) for one in (*found, finest))
