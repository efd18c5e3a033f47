"""Confidence of predictions: calibration by temperature, conformal prediction sets, novelty (out-of-distribution)."""

import logging
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from anvi._data.cells import CSR, Cells
from anvi._data.predictions import NoveltyScores, reliability
from anvi._model import Landmarks, Model, Neighbors

from . import encode
from .encode import Embedding, Votes

logger = logging.getLogger("anvi")


class Shift(NamedTuple):
    """How another experiment differs."""

    depth: float = 1.0  # share of the counts that are kept, on average
    spread: float = 0.0  # standard deviation of the log efficiency of a gene or protein
    proteins: bool = True  # whether proteins are measured
    rna: bool = True  # whether RNA is


FITTED_ON = (Shift(1.0, 0.0), Shift(0.7, 0.3), Shift(0.4, 0.4))
"""What held-out cells are put through before the temperature is fitted."""
JUDGED_ON = (Shift(0.85, 0.5), Shift(0.55, 0.2), Shift(0.3, 0.3))
"""What they are put through, with other efficiencies, to say how good it is; never used for fitting."""
HELD_OUT = 5_000
"""Labelled validation cells that are thinned again and again; more would cost memory and tell no more."""


def calibrated(
    model: Model, cells: Cells, train: Tensor, validation: Tensor, seed: int
) -> tuple[Model, pd.DataFrame | None]:
    """The model with temperatures and landmarks of its validation cells, and the reliability of its probabilities.

    At each level of the labels; as it was where these cells are too few.
    """
    if not model.config.has_labels:
        return model, None
    train, validation = train.to(cells.label.device), validation.to(cells.label.device)
    known, told = (
        at_most(HELD_OUT, validation[code[validation] >= 0], torch.Generator().manual_seed(seed))
        for code in (cells.label, cells.told)
    )
    n_known = len(standing_for(encode.WITHOUT_PROTEINS, cells, known))
    if n_known < MIN_VALIDATION:
        rna = "" if cells.has_rna is None else " with RNA"
        logger.warning(
            f"{n_known} labelled validation cells{rna}, fewer than {MIN_VALIDATION}: probabilities are not calibrated, "
            "there is no novelty and nothing is 'Unassigned'. More labels help, or a lower train_size="
        )
        return model, None
    model = with_neighbors(model, cells, train, seed)
    temperature, table, own = calibrate(model, cells, known, seed)
    model = replace(model, info=model.info | {"temperature": temperature})
    marks = fit_landmarks(model, cells, train, known, own, seed)
    sure = [_sureness(model, cells, standing_for(kind, cells, known), kind, seed) for kind in temperature]
    most = max(part.shape[1] for part in sure)  # 0 is too little to be looked at
    marks = marks._replace(sure=torch.stack([functional.pad(part, (0, most - part.shape[1])) for part in sure]))
    if model.setup.label_levels:  # the groups of coarser levels, as the classes
        chosen = of_every_class(cells.told, train, torch.Generator().manual_seed(seed))
        cells.x.hold(cells.x_row[chosen])
        above = [_landmarks_above(model, cells, chosen, told, train, kind, seed) for kind in temperature]
        centre, whiten, quantiles = map(torch.stack, zip(*above, strict=True))
        marks = marks._replace(above_centre=centre, above_whiten=whiten, above_quantiles=quantiles)
        table = _reliability(model, table, cells, told, tuple(temperature), seed)
    return replace(model, landmarks=marks), table


def at_most(n: int, index: Tensor, generator: torch.Generator) -> Tensor:
    """So many of some cells, in their order."""
    chosen = torch.randperm(len(index), generator=generator)[:n].sort().values
    return index[chosen.to(index.device)]


def find_kinds(model: Model, cells: Cells, known: Tensor) -> tuple[str, ...]:
    """Kinds of cells that held-out cells can stand for; without RNA only where the model does without."""
    if not model.config.has_protein:
        return (encode.WITHOUT_PROTEINS,)
    alone = model.info.get("hide_rna") and len(standing_for(encode.WITHOUT_RNA, cells, known)) >= MIN_VALIDATION
    return encode.KINDS if alone else encode.KINDS[:2]


def standing_for(kind: str, cells: Cells, index: Tensor) -> Tensor:
    """Those of some cells that can be seen as cells of a kind: what has neither RNA nor proteins is no cell."""
    if kind == encode.WITHOUT_RNA:
        return index[cells.has_protein[index]]
    return index if cells.has_rna is None else index[cells.has_rna[index]]


def _shown(kind: str) -> Shift:
    """What is measured of the cells of a kind, all of their counts."""
    return Shift(proteins=kind != encode.WITHOUT_PROTEINS, rna=kind != encode.WITHOUT_RNA)


def as_query(cells: Cells, index: Tensor, shift: Shift, kind: str, seed: int, number: int) -> Cells:
    """Some cells as a query might have them: counts downsampled by a shift, with proteins and RNA or without."""
    whole = _shown(kind)
    shift = shift._replace(proteins=whole.proteins, rna=whole.rna)
    return downsampled(cells, index, shift, encode.block_seed(seed, number, (1, 0, 2)[encode.KINDS.index(kind)]))


def downsampled(cells: Cells, index: Tensor, shift: Shift, seed: int) -> Cells:
    """Some cells, counts thinned binomially with an efficiency of each gene and protein; library sizes follow."""
    generator = torch.Generator(index.device).manual_seed(seed)
    rows = cells.x_row[index]
    row, column, count = cells.x.entries(rows)
    before = torch.zeros(len(index), device=index.device).index_add_(0, row, count)
    kept = _efficiency(cells.x.n_columns, shift, generator)[column]
    count = torch.binomial(count, kept, generator=generator)
    after = torch.zeros(len(index), device=index.device).index_add_(0, row, count)
    length = cells.x.indptr[rows + 1] - cells.x.indptr[rows]
    indptr = torch.cat([length.new_zeros(1), length.cumsum(0)])
    names = ("mask_row", "batch", "panel", "codes", "continuous", "label", "label_row", "has_rna")
    parts = {name: part[index] for name in names if (part := getattr(cells, name)) is not None}
    mask_table = cells.mask_table
    if cells.y is not None:
        y = cells.proteins(index)
        kept = _efficiency(y.shape[1], shift, generator).expand_as(y)
        parts["y"] = torch.binomial(y, kept, generator=generator)
        if not shift.proteins:
            parts["y"], parts["mask_row"] = torch.zeros_like(parts["y"]), torch.zeros_like(parts["mask_row"])
            mask_table = torch.zeros_like(mask_table[:1])
    if not shift.rna:
        indptr, column, count = torch.zeros_like(indptr), column[:0], count[:0]
        parts["has_rna"] = torch.zeros_like(index, dtype=torch.bool)
    lost = after.clamp(min=1).log() - before.clamp(min=1).log()
    return replace(
        cells,
        names=cells.names[index.cpu().numpy()],
        x=CSR(indptr, column, count, cells.x.n_columns),
        x_row=torch.arange(len(index), device=index.device),
        mask_table=mask_table,
        log_library=cells.log_library[index] + lost[:, None],
        **parts,
    )


def _efficiency(n: int, shift: Shift, generator: torch.Generator) -> Tensor:
    """Probability that a count of a gene or protein is kept `(n,)`."""
    log_efficiency = shift.spread * torch.randn(n, generator=generator, device=generator.device)
    return (shift.depth * log_efficiency.exp()).clamp(max=1)  # no count is ever added


# calibration: temperature scaling -----------------------------------------------------------------------------------

MIN_VALIDATION = 20
"""Held-out labelled cells below which there are no temperatures, no prediction sets and no novelty."""
PRIOR_SPREAD = 0.5
"""Standard deviation of the log temperature around 0 before any cell is seen: few cells move it little."""


@torch.no_grad()
def calibrate(model: Model, cells: Cells, known: Tensor, seed: int) -> tuple[dict[str, float], pd.DataFrame, Tensor]:
    """Temperatures, their reliability on other shifts, and what the cells give their own class, of held-out cells."""
    temperature, tables, own = {}, [], []
    for kind in find_kinds(model, cells, known):
        # fit on some shifts
        some = standing_for(kind, cells, known)
        one_shift = torch.arange(len(some)) % len(FITTED_ON) * len(some) + torch.arange(len(some))  # of every cell
        votes, target = _votes(model, cells, some, FITTED_ON, kind, seed)
        temperature[kind] = fit_temperature(votes, target)
        # rounded as those of a query are
        proba = Votes(*(None if part is None else part[one_shift].float() for part in votes)).proba(temperature[kind])
        own.append(own_probability(proba, target[one_shift], seed))
        # judge on others
        votes, target = _votes(model, cells, some, JUDGED_ON, kind, seed + 1)
        for when, t in (("before", 1.0), ("after", temperature[kind])):
            confidence, predicted = votes.proba(t).max(-1)
            table = reliability(confidence.numpy(), (predicted == target).numpy())
            tables.append(table.assign(cells_seen=kind, when=when))
    return temperature, pd.concat(tables, ignore_index=True), torch.stack(own)


def _votes(
    model: Model, cells: Cells, index: Tensor, shifts: tuple[Shift, ...], kind: str, seed: int
) -> tuple[Votes, Tensor]:
    """What says of which class some cells are under several shifts `(shifts x cells, ...)`, and their classes."""
    near, parts, target = encode.neighbors_of(model), [], []
    for i, shift in enumerate(shifts):
        query = as_query(cells, index, shift, kind, seed, i)
        parts += [Votes.of(model, near, block.q_z.mean) for block in encode.blocks(model, query)]
        target.append(query.label)
    columns = (None if part[0] is None else torch.cat(part).double().cpu() for part in zip(*parts, strict=True))
    return Votes(*columns), torch.cat(target).cpu()


def fit_temperature(votes: Votes, target: Tensor) -> float:
    """The temperature that makes the classes of cells most probable; hundreds of cells overrule its prior around 1."""

    def loss(log_t: float) -> float:
        own = votes.proba(float(np.exp(log_t))).gather(1, target[:, None])
        return -float(own.clamp(min=1e-300).log().sum()) + 0.5 * (log_t / PRIOR_SPREAD) ** 2

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20.0), np.log(20.0)), method="bounded").x))


# label transfer from neighbours -------------------------------------------------------------------------------------


@torch.no_grad()
def with_neighbors(model: Model, cells: Cells, trained: Tensor, seed: int) -> Model:
    """The model with labelled training cells to ask beside its classifier; unless it is asked alone."""
    if not model.info.get("n_neighbors") or model.config.objective != "bound":
        return model
    chosen = of_every_class(cells.label, trained, torch.Generator().manual_seed(seed))
    cells.x.hold(cells.x_row[chosen])  # they are looked at again and again
    latent = torch.cat([block.q_z.mean for block in encode.blocks(model, cells, chosen)])
    label = cells.label[chosen]
    there, kept = cells.label[trained][cells.label[trained] >= 0].bincount(), label.bincount()
    return replace(model, neighbors=Neighbors(latent.cpu(), label.cpu(), (there / kept.clamp(min=1))[label].cpu()))


# conformal prediction sets ------------------------------------------------------------------------------------------

PER_CLASS = 200
"""Held-out cells of a class that are kept, at most."""
HIGHEST = 0.995
"""Coverage that so many cells can just tell from 1."""


def own_probability(proba: Tensor, target: Tensor, seed: int) -> Tensor:
    """What held-out cells give their own class `(classes, PER_CLASS)`, in ascending order, NaN behind the last."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(target), generator=generator)
    proba, target = proba[order], target[order]
    out = torch.full((proba.shape[1], PER_CLASS), torch.nan)
    for code in range(proba.shape[1]):
        own = proba[target == code, code][:PER_CLASS]
        out[code, : len(own)] = own.sort().values.float()
    return out


class PredictionSets(NamedTuple):
    """Which classes cells may be, and what is promised of that."""

    inside: np.ndarray  # (cells, classes) bool
    promise: pd.DataFrame  # (classes,) held_out cells, coverage of the class alone, those that reach all of it together


def prediction_sets(model: Model, cells: Cells, proba: np.ndarray, coverage: float) -> PredictionSets:
    """Which classes each cell may be, by its calibrated probabilities `(cells, classes)`."""
    own = model.landmarks.own  # (kinds, classes, held-out cells)
    there = own.isfinite().sum(2).numpy()  # (kinds, classes): a class may have been held out of one kind alone
    limits = [thresholds(some, coverage, merged_classes(n, coverage)) for some, n in zip(own, there, strict=True)]
    limit = torch.stack(limits).numpy()  # (kinds, classes)
    held_out = there[there.any(1)].min(0) if there.any() else there[0]  # what is promised, is promised of every kind
    merged = merged_classes(held_out, coverage)
    names = np.array(model.classes, dtype=object)
    alone = np.minimum(coverage, held_out / (held_out + 1))
    few = [f"{names[i]} ({alone[i]:.2g})" for i in np.flatnonzero(alone < coverage)]
    if (limit == 0).any():
        logger.warning(
            f"coverage={coverage} needs more than {held_out.sum()} held-out cells: some classes are in all sets"
        )
    elif few:
        logger.info(
            f"prediction sets: of {', '.join(few)} too few cells were held out for coverage={coverage} of each; it "
            f"holds of {', '.join(names[merged])} together"
        )
    together = np.where(merged, " + ".join(names[merged]), names)
    promise = {"held_out": held_out, "coverage": alone, "together": together}
    return PredictionSets(proba >= limit[encode.kind_of(model, cells)], pd.DataFrame(promise, pd.Index(names)))


def merged_classes(held_out: np.ndarray, coverage: float) -> np.ndarray:
    """Classes that are looked at together `(classes,)`: those with too few held-out cells, and next ones as needed.

    Of n cells and a new one the new is the lowest once in n + 1 times, so that n must be 1 / (1 - coverage) - 1.
    """
    least = math.ceil(1 / (1 - coverage) - 1 - 1e-9)
    merged = held_out < least
    for code in np.argsort(held_out, kind="stable"):
        if not merged.any() or held_out[merged].sum() >= least:
            break
        merged[code] = True
    return merged


def thresholds(own: Tensor, coverage: float, merged: np.ndarray) -> Tensor:
    """Probabilities below which a class is left out `(classes,)`.

    Of n held-out cells and a new one, each is as likely as the others to be among the k lowest. Of a merged class, the
    lower of what its own cells say (the lowest, if they are few: they then cover n / (n + 1) of its cells) and what the
    cells of all merged classes do; 0 where even these are too few.
    """

    def kth_lowest(values: Tensor, least: int) -> float:
        values = values[values.isfinite()].sort().values
        k = min(len(values), max(least, math.floor((len(values) + 1) * (1 - coverage) + 1e-9)))
        return float(values[k - 1]) if k > 0 else math.inf

    found = torch.tensor([kth_lowest(values, 1) for values in own])
    if merged.any():
        shared = torch.from_numpy(merged)
        together = kth_lowest(own[shared].flatten(), 0)
        found[shared] = found[shared].clamp(max=together if together < math.inf else 0.0)
    return found


# novelty: out-of-distribution detection -----------------------------------------------------------------------------

CELLS = 5_000
"""Labelled training cells that are looked at, at most, or one of every class; as many of each where there are."""
MIN_BATCH = 100
"""Cells of a batch below which its distances are taken as they are."""
LONGEST_UNIT = 1.5
"""How much longer the unit of a batch may be; a batch of new types alone must not pass for one that is merely off."""
FALSE_REJECTS = 0.05
"""Share of held-out labelled cells that a score above 1 would reject."""


@torch.no_grad()
def fit_landmarks(model: Model, cells: Cells, trained: Tensor, known: Tensor, own: Tensor, seed: int) -> Landmarks:
    """Landmarks of a model, and how far held-out labelled cells lie from them."""
    chosen = of_every_class(cells.label, trained, torch.Generator().manual_seed(seed))
    cells.x.hold(cells.x_row[chosen])
    frequency = cells.label[trained][cells.label[trained] >= 0].bincount().cpu()  # (classes,)
    found = []
    for kind in model.info["temperature"]:
        some, held_out = standing_for(kind, cells, chosen), standing_for(kind, cells, known)
        mean, queries = embedded(model, cells, some, held_out, kind, seed)
        found.append(
            centres_and_quantiles(mean, cells.label[some].cpu(), frequency, [(one.mean, one.proba) for one in queries])
        )
    most = max(len(centre) for centre, _, _ in found)  # a class of which no cell is of a kind has no centre there
    found = [(_filled_up(centre, most), *rest) for centre, *rest in found]
    centre, whiten, quantiles = (torch.stack(part) for part in zip(*found, strict=True))
    return Landmarks(quantiles, own, centre, whiten)


def embedded(
    model: Model, cells: Cells, chosen: Tensor, held_out: Tensor, kind: str, seed: int
) -> tuple[Tensor, list[Embedding]]:
    """Latent vectors `(cells, latent)` of training cells seen as a kind, and held-out cells under several shifts."""
    mean = encode.embed(model, downsampled(cells, chosen, _shown(kind), seed)).mean
    shifted = (as_query(cells, held_out, shift, kind, seed, i) for i, shift in enumerate(FITTED_ON))
    return torch.from_numpy(mean), [encode.embed(model, query) for query in shifted]


def centres_and_quantiles(
    mean: Tensor, code: Tensor, frequency: Tensor, queries: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres of groups and whitening, and 101 quantiles of how far queries (latent vectors, probabilities) are."""
    centre, whiten = _centres(mean, code, frequency)
    scores = torch.cat([_strangeness(latent, proba, centre, whiten) for latent, proba in queries])
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    return centre, whiten, torch.quantile(scores.double(), grid).float()


def _filled_up(centre: Tensor, n: int) -> Tensor:
    """So many centres, the first repeated, which brings no cell nearer to any `(n, latent)`."""
    return torch.cat([centre, centre[:1].expand(n - len(centre), -1)])


def of_every_class(label: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
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


def scored(
    cells: Cells, kind: Tensor, latent: np.ndarray, proba: np.ndarray, centre: Tensor, whiten: Tensor, quantiles: Tensor
) -> tuple[Tensor, Tensor]:
    """Distance of cells to centres, in units of how far held-out labelled cells lie `(cells,)`; theirs `(kinds, 101)`.

    `kind` `(cells,)` says which set of centres is that of a cell.
    """
    strangeness = torch.zeros(len(cells))
    for i in range(len(quantiles)):
        for some in (kind == i).nonzero().squeeze(1).split(encode.CHUNK):  # of all at once, copies would add up
            here = some.numpy()
            strangeness[some] = _strangeness(latent[here], proba[here], centre[i], whiten[i])
    unit = quantiles[:, round((1 - FALSE_REJECTS) * 100), None].clamp(min=1e-12)  # (kinds, 1)
    score, scores = strangeness / unit[kind, 0], quantiles / unit
    # a batch that is off as a whole is measured by a longer unit
    for batch in cells.batch.unique().tolist():
        for i in range(len(quantiles)):
            some = ((cells.batch == batch).cpu()) & (kind == i)
            if int(some.sum()) >= MIN_BATCH:
                longer = float(score[some].quantile(0.25) / scores[i, 25].clamp(min=1e-12))
                score[some] /= min(max(1.0, longer), LONGEST_UNIT)
    return score, scores


def beyond(score: np.ndarray, kind: np.ndarray, scores: np.ndarray, false_rejects: float) -> np.ndarray:
    """Cells that are farther away than all but this share of held-out labelled cells of their kind `(cells,)`."""
    grid = np.linspace(0, 1, scores.shape[1])
    limit = [np.interp(1 - false_rejects, grid, one) if false_rejects else np.inf for one in scores]
    return score > np.array(limit)[kind]


def _strangeness(latent: np.ndarray, proba: np.ndarray, centre: Tensor, whiten: Tensor) -> Tensor:
    """Distance to the nearest centre, times 1 for a decided and 2 for an undecided cell `(cells,)`."""
    z, p = torch.from_numpy(latent) @ whiten, torch.from_numpy(proba)
    # by differences: what a matrix product gives cancels where whitened numbers are large
    exactly = "donot_use_mm_for_euclid_dist"
    distance = torch.cat([torch.cdist(part, centre @ whiten, compute_mode=exactly).amin(1) for part in z.split(4_096)])
    return distance * (1 - torch.xlogy(p, p).sum(1) / np.log(max(2, p.shape[1])))


# labels at several levels: how sure a model must be at each, and how far cells are from what it knows there ----------

LEAST = 0.5
"""Probability below which no label is sure: above it a cell has one label at each level, each under the one before."""
NEVER = 2.0
"""A limit that no probability reaches."""


def _reliability(
    model: Model, finest: pd.DataFrame, cells: Cells, told: Tensor, kinds: tuple[str, ...], seed: int
) -> pd.DataFrame:
    """Reliability at every level, of thinnings that nothing was fitted on, before and after calibration."""
    levels, known = model.setup.levels, model.setup.levels.known()
    plain = replace(model, info={name: fact for name, fact in model.info.items() if name != "temperature"})
    tables = [finest.assign(level=levels.names[-1])]
    for kind in kinds:
        some = standing_for(kind, cells, told)
        for when, one in (("before", plain), ("after", model)):
            proba, code = [], []
            for i, shift in enumerate(JUDGED_ON):
                query = as_query(cells, some, shift, kind, seed + 1, i)
                proba.append(encode.embed(one, query).proba)
                code.append(known[:, query.label_row.cpu().numpy()])
            p, true = np.concatenate(proba), np.concatenate(code, axis=1)  # (cells, classes), (levels, cells)
            for number, level in enumerate(levels.coarser):
                sums, inside = levels.sums(p, number), true[number] >= 0
                found = reliability(sums.max(1)[inside], (sums.argmax(1) == true[number])[inside])
                tables.append(found.assign(cells_seen=kind, when=when, level=level))
    return pd.concat(tables, ignore_index=True)


# how sure is sure enough ----------------------------------------------------------------------------------------------


def _sureness(model: Model, cells: Cells, index: Tensor, kind: str, seed: int) -> Tensor:
    """Highest probability at each level `(levels, cells)` of held-out cells, each thinned once; negative if wrong."""
    levels, parts = model.setup.levels, []
    for i, shift in enumerate(FITTED_ON):
        query = as_query(cells, index[i :: len(FITTED_ON)], shift, kind, seed, i)
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


def _landmarks_above(model: Model, cells: Cells, chosen: Tensor, told: Tensor, train: Tensor, kind: str, seed: int):
    """Centres, whitening and quantiles `(coarser levels, ...)` of the groups, of cells of a kind."""
    levels, known = model.setup.levels, torch.from_numpy(model.setup.levels.known())
    chosen, told = (standing_for(kind, cells, part) for part in (chosen, told))
    mean, queries = embedded(model, cells, chosen, told, kind, seed)
    row, found = cells.label_row.cpu(), []
    for number in range(levels.finest):
        code = known[number][row]  # (cells,) -1 where the label leaves several groups open
        here, of_train, inside = code[chosen.cpu()], code[train.cpu()], (code[told.cpu()] >= 0).numpy()
        frequency = of_train[of_train >= 0].bincount(minlength=len(levels.groups(number)))
        some = [(one.mean[inside], levels.sums(one.proba[inside], number)) for one in queries]
        centre, *rest = centres_and_quantiles(mean[here >= 0], here[here >= 0], frequency, some)
        found.append((_filled_up(centre, len(levels.table[-1])), *rest))  # a level has fewer groups than classes
    return tuple(torch.stack(part) for part in zip(*found, strict=True))


@torch.no_grad()
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
    if marks is None or marks.centre is None:
        return None
    kind, found = torch.from_numpy(encode.kind_of(model, cells)), []
    for number in range(len(levels.names)):
        places = marks.centre, marks.whiten, marks.quantiles
        if number < levels.finest:
            places = (part[:, number] for part in (marks.above_centre, marks.above_whiten, marks.above_quantiles))
        score, scores = scored(cells, kind, embedding.mean, levels.sums(embedding.proba, number), *places)
        far = beyond(score.numpy(), kind.numpy(), scores.numpy(), false_rejects)
        found.append(NoveltyScores(score.numpy(), far))
    return tuple(found)
