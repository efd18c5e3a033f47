"""Imputation of proteins that a batch did not measure: nearest measured cells, and a regression on RNA, together.

The decoder is good where cells with proteins lie and poor beside them, which is where cells without lie. So a protein
that nothing of a cell's batch was measured for is not decoded. Cells that were measured, as the encoder sees them
without their proteins, are kept with the model; log counts are averaged over the nearest of them in the joint space of
latent vectors and principal components of RNA, and this mean is averaged in turn with a ridge regression on the
components alone, which holds where no measured cell is near: 2/3 mean of the 30 nearest + 1/3 ridge regression.

Of a cell with other proteins, of which neighbours by RNA know nothing, it is the mean of that and of what is decoded.
Components are taken of log-normalised genes, each standardised within its batch. Held-out measured cells tell how far
off this is: intervals are split-conformal, with the scatter of the neighbours for a unit (Lei et al. 2018,
Distribution-free predictive inference for regression). These are cells of batches that the neighbours are from, too.
Of a batch that measured nothing of a protein, counts may lie elsewhere as a whole: how far, each measured batch tells
by what the others predict of it, and intervals are so much wider. That variance is moderated over proteins, so that two
batches tell something (Smyth 2004, Linear models and empirical Bayes methods).
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor

from anvi._data.cells import Cells
from anvi._model import Imputation, Model

from . import encode
from .confidence import at_most
from .encode import Block, in_batch
from .expected import protein_value

logger = logging.getLogger("anvi")

LANDMARKS = 5_000
"""Measured training cells that are kept, at most: some MB beside the weights."""
HELD_OUT = 5_000
"""Held-out measured cells that the intervals are told by, at most."""
MIN_HELD_OUT = 50
"""Held-out cells below which the landmarks themselves tell, each without itself."""
N_GENES, N_COMPONENTS, ITERATIONS = 2_000, 50, 7
N_NEIGHBORS, NEAR = 30, 2 / 3
"""How many neighbours, and their weight beside the regression; chosen in benchmarks/real_tasks.py."""
PENALTIES = (0.1, 0.3, 1.0, 3.0)
"""Of the regression, in units of the mean squared length of a cell's components; leaving one out chooses."""
PRIOR_CELLS = 10
"""Cells like the average batch that every batch is taken to have more, so that one of few cells has a scale."""
LEAST_SPREAD = 0.25
"""Least scatter of neighbours, in units of the scatter of all landmarks."""
N_BATCHES, ALIGNED = 20, 2_000
"""Batches that are put on one scale together, at most (those with most landmarks), and of how many landmarks in all."""
ROUNDS = 4
"""How often, each time by others that are nearer to it."""
MIN_SHARED = 5
"""Proteins that two batches must share beside the one in question, for one to say something of the other."""
LEAST_OFF = 0.1
"""Log counts by which batches of the same kit may differ by chance."""
PRIOR_DF = 4
"""Degrees of freedom of the prior of a protein's variance between batches, which is that of the mean protein."""
FARTHEST = 10.0
"""Standard deviations at which a standardised gene is cut off."""


class Imputed(NamedTuple):
    """Proteins of some cells that their batches did not measure."""

    value: np.ndarray  # (cells, proteins) counts, NaN where nothing is to impute
    lower: np.ndarray | None = None  # (cells, proteins) ends of the interval, in counts with background
    upper: np.ndarray | None = None


class _View(NamedTuple):
    """What is known of the RNA of some cells."""

    latent: Tensor  # (cells, latent), encoded without proteins
    components: Tensor  # (cells, components)


@torch.no_grad()
def with_imputation(model: Model, cells: Cells, train: Tensor, validation: Tensor, seed: int) -> Model:
    """The model with what it imputes proteins by; not without proteins or counts, or with the incumbent's objective."""
    if not model.config.has_protein or not model.setup.counts or model.config.objective != "bound":
        return model
    device, generator = cells.label.device, torch.Generator().manual_seed(seed)
    some = cells.has_protein
    some = some if cells.has_rna is None else some & cells.has_rna
    kept, held_out = (
        at_most(n, part.to(device)[some[part.to(device)]], generator)
        for n, part in ((LANDMARKS, train), (HELD_OUT, validation))
    )
    if len(kept) <= N_NEIGHBORS:
        return model
    everybody = at_most(LANDMARKS, _with_rna(cells), generator)
    cells.x.let_go()  # of training: one pass over all cells follows
    genes, center, scale = _moments(cells, model.config.n_batches)
    cells.x.hold(cells.x_row[torch.cat([kept, held_out, everybody])])
    part = Imputation(
        genes=genes,
        center=center,
        scale=scale,
        y=torch.where(cells.measured_of(kept), cells.proteins(kept).log1p(), torch.nan),
        batch=cells.batch[kept],
        measured=_measured(cells, model.config.n_batches),
        **dict.fromkeys(("loading", "latent", "components", "slope", "intercept", "residuals"), torch.zeros(0)),
    )
    part = part._replace(loading=_loading(torch.cat(list(_standardised(cells, everybody, part))), seed))
    view = _view(model, part, cells, kept)
    part = _aligned(part._replace(latent=view.latent, components=view.components))
    alone = len(held_out) < MIN_HELD_OUT
    index = kept if alone else held_out
    found, spread = _predict(part, view if alone else _view(model, part, cells, index), leave_out=alone)
    found += part.offset[cells.batch[index]]
    off = (torch.where(cells.measured_of(index), cells.proteins(index).log1p(), torch.nan) - found) / spread
    grid = torch.linspace(0, 1, 101, dtype=torch.float64, device=device)
    residuals = torch.nanquantile(off.double(), grid, dim=0).float().T.contiguous()  # (proteins, 101)
    part = part._replace(residuals=residuals.nan_to_num(0.0))
    return replace(model, imputation=_on(part, torch.device("cpu")))


@dataclass(frozen=True, eq=False)
class Imputing:
    """Imputes the proteins of cells whose batches did not measure them, block by block."""

    model: Model
    part: Imputation  # what the model imputes by, on the device
    cells: Cells
    rows: Tensor  # (cells,) row of each cell in the answer
    where: Tensor  # (cells, proteins) bool, what is imputed
    out: list[Tensor]  # (cells, proteins) counts and, if there is a coverage, ends of intervals
    include_background: bool  # or the share of the count that the decoder takes for foreground
    coverage: float | None  # how often the interval is to hold a measured count

    @classmethod
    def of(
        cls, model: Model, cells: Cells, rows: Tensor, include_background: bool = True, coverage: float | None = None
    ) -> "Imputing | None":
        """Begin; None where nothing is to impute, or the model cannot."""
        part = model.imputation
        if part is None or (cells.q_mean is not None and cells.rna_view is None):
            return None
        where = _to_impute(part, cells)
        if not where.any():
            return None
        if coverage is not None:
            _tell_of_scale(model, part, where & ~part.measured[cells.batch.cpu()])
            if n_decoded := int((~cells.measured.cpu() & ~where).any(1).sum()):
                logger.warning(
                    f"return_interval: {n_decoded} cells lack proteins that are decoded, and these have no interval "
                    "(NaN): others of their batch have them (a batch for each panel gives these one), the cells have "
                    "no RNA, or too few cells were measured"
                )
        out = [torch.full(where.shape, torch.nan) for _ in range(1 if coverage is None else 3)]
        return cls(model, _on(part, cells.label.device), cells, rows.cpu(), where, out, include_background, coverage)

    @torch.no_grad()
    def add(self, block: Block) -> None:
        """Impute some cells; in whole blocks of :func:`anvi._posterior.encode.blocks`, as minified data have it."""
        model, part, cells, where = self.model, self.part, self.cells, self.where[block.rows]
        if not where.any():
            return
        some = where.any(1).to(block.index.device)
        index = block.index[some]
        batch, partly = cells.batch[index], cells.has_protein[index]
        # log counts: of neighbours and regression, on the scale of the batch; with other proteins of the decoder, too
        found, spread = _predict(part, _view(model, part, cells, index))
        if part.offset is not None:
            found += part.offset[batch]
        if partly.any():
            decoded = _decoded(model, block, None, True)[some].log1p()
            found = torch.where(partly[:, None], (found + decoded) / 2, found)
        # counts, and the ends of their intervals
        values = [found.clamp(min=0).expm1()]
        if not self.include_background:
            values[0] *= _foreground_share(model, part, block)[some]
        if self.coverage is not None:
            share = torch.where(partly, 0.5, 1.0)[:, None]  # what is decoded knows how much the batch counts
            values += _interval(part, batch, found, spread, share, self.coverage)
        rows, where = self.rows[block.rows][some.cpu()], where[some.cpu()]
        for out, one in zip(self.out, values, strict=True):
            out[rows] = one.cpu().where(where, torch.nan)

    @property
    def found(self) -> Imputed:
        """What was imputed."""
        return Imputed(*(part.numpy() for part in self.out))


@torch.no_grad()
def stored_view(model: Model, cells: Cells) -> np.ndarray | None:
    """What minified data keep for :class:`Imputing` `(cells, latent + components)`; None where nothing is imputed."""
    if model.imputation is None:
        return None
    some = _to_impute(model.imputation, cells).any(1)
    if not some.any():
        return None
    part = _on(model.imputation, cells.label.device)
    out = torch.full((len(cells), part.latent.shape[1] + part.components.shape[1]), torch.nan)
    for index in torch.arange(len(cells)).split(encode.CHUNK):  # as they are imputed
        index = index[some[index]]
        if len(index):
            out[index] = torch.cat(_view(model, part, cells, index.to(cells.label.device)), dim=1).cpu()
    return out.numpy()


def widened(imputation: Imputation | None, genes: np.ndarray, cells: Cells, n_batches: int) -> Imputation | None:
    """The same for a mapped model: for `genes` by their positions in the reference, with rows for new batches."""
    if imputation is None:
        return None
    order = {int(gene): i for i, gene in enumerate(genes)}
    there = torch.tensor([int(gene) in order for gene in imputation.genes])
    place = torch.tensor([order[int(gene)] for gene in imputation.genes[there]], dtype=torch.long)
    n_before = len(imputation.center)
    center, scale = imputation.center[:, there], imputation.scale[:, there]
    own, spread = _moments_of(cells, place, n_batches, center.mean(0), scale.square().mean(0))
    measured = _measured(cells, n_batches)
    measured[:n_before] |= imputation.measured
    return imputation._replace(
        genes=place,
        center=torch.cat([center, own[n_before:]]),
        scale=torch.cat([scale, spread[n_before:]]),
        offset=_with_rows(imputation.offset, n_batches, 0.0),
        apart=_with_rows(imputation.apart, n_batches, 1.0),
        loading=imputation.loading[there],
        measured=measured,
    )


def _with_rows(table: Tensor | None, n: int, value: float) -> Tensor | None:
    """Rows for new batches behind those of a reference."""
    return None if table is None else torch.cat([table, table.new_full((n - len(table), *table.shape[1:]), value)])


@torch.no_grad()
def told_by_query(model: Model, cells: Cells) -> Imputation | None:
    """What a mapped model imputes by, with offsets of batches that measured proteins in the query alone."""
    if model.imputation is None or model.imputation.offset is None:
        return model.imputation
    part = _on(model.imputation, cells.label.device)
    n_measured = _n_measured(part)
    offset, new, with_rna = part.offset.where(n_measured > N_NEIGHBORS, torch.nan), [], _with_rna(cells)
    known = (~offset.isnan()).any(1).nonzero().squeeze(1).tolist()  # batches of the reference, on its scale
    with_both = with_rna[cells.has_protein[with_rna]]
    for code in cells.batch[with_both].unique().tolist():
        if n_measured[code].any():  # the reference knows its scale
            continue
        index = at_most(ALIGNED, with_both[cells.batch[with_both] == code], torch.Generator().manual_seed(code))
        cells.x.hold(cells.x_row[index])
        found, _ = _near(part, _view(model, part, cells, index))
        error = torch.where(cells.measured_of(index), cells.proteins(index).log1p() - found, torch.nan)
        n_measured[code] = (~error.isnan()).sum(0)
        few = torch.minimum((~part.y.isnan()).sum(0), n_measured[code]) <= N_NEIGHBORS
        offset[code] = error.nanmean(0).masked_fill(few, torch.nan)
        new.append(code)
    added = torch.tensor(new, dtype=torch.long, device=offset.device)
    if not offset[added].isfinite().any():
        return model.imputation
    if part.between is None:  # one batch was measured; the new ones say how far from it others may be
        between = offset[added].square().nanmean().sqrt().expand(part.y.shape[1]).contiguous()
        part = part._replace(between=between, apart=_unknown(_n_measured(part)))
    whole, apart = part.offset.clone(), part.apart.clone()
    for code in new:  # each beside the reference alone, which keeps its own
        codes = torch.tensor([code, *known], device=offset.device)
        told = _completed(part._replace(apart=_unknown(n_measured)), codes, offset[codes])
        whole[code], apart[code] = told.offset[code], told.apart[code]
    return _on(part._replace(offset=whole, apart=apart), torch.device("cpu"))


def _to_impute(imputation: Imputation, cells: Cells) -> Tensor:
    """Proteins to impute `(cells, proteins)` bool: all of cells without any, else what the batch never measured.

    None of cells without RNA, of which neighbours by RNA know nothing: theirs are decoded.
    """
    possible, some = (~imputation.y.isnan()).sum(0) > N_NEIGHBORS, cells.has_protein.cpu()
    never = ~(imputation.measured[cells.batch.cpu()] & some[:, None])
    rna = True if cells.has_rna is None else cells.has_rna.cpu()[:, None]
    return never & possible & ~cells.measured.cpu() & rna


def _with_rna(cells: Cells) -> Tensor:
    """Positions of the cells with RNA."""
    everyone = torch.arange(len(cells), device=cells.label.device)
    return everyone[cells.with_rna]


def _measured(cells: Cells, n_batches: int) -> Tensor:
    """Which proteins were measured in any cell of a batch `(batches, proteins)` bool, on the CPU."""
    table = torch.zeros(n_batches, cells.mask_table.shape[1], dtype=torch.bool)
    pairs = torch.stack([cells.batch, cells.mask_row], dim=1).unique(dim=0).cpu()
    for code, row in pairs.tolist():
        table[code] |= cells.mask_table[row].cpu()
    return table


def _log_normalised(cells: Cells, index: Tensor, genes: Tensor) -> Tensor:
    """Log counts per 10,000 `(cells, genes)`."""
    x = cells.x.dense(cells.x_row[index])[0]
    return (x[:, genes] * (1e4 / x.sum(1, keepdim=True).clamp(min=1))).log1p()


def _moments(cells: Cells, n_batches: int) -> tuple[Tensor, Tensor, Tensor]:
    """The most variable genes, and their means and standard deviations in every batch."""
    every = torch.arange(cells.x.n_columns, device=cells.label.device)
    zero = torch.zeros(len(every), device=every.device)
    center, scale = _moments_of(cells, every, n_batches, None, zero)
    weight = cells.batch[_with_rna(cells)].bincount(minlength=n_batches).to(scale.dtype)
    within = (scale.square() * weight[:, None]).sum(0) / weight.sum()
    genes = within.topk(min(N_GENES, len(within))).indices.sort().values
    return genes, center[:, genes], scale[:, genes]


def _moments_of(cells: Cells, genes: Tensor, n_batches: int, mean: Tensor | None, var: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of genes in every batch, a few cells like the average one added to each."""
    device = cells.label.device
    n = torch.zeros(n_batches, 1, dtype=torch.float64, device=device)
    first, second = (torch.zeros(n_batches, len(genes), dtype=torch.float64, device=device) for _ in range(2))
    for index in _with_rna(cells).split(encode.CHUNK // 4):  # in double precision
        x, batch = _log_normalised(cells, index, genes).double(), cells.batch[index]
        n.index_add_(0, batch, torch.ones(len(index), 1, dtype=n.dtype, device=device))
        first.index_add_(0, batch, x)
        second.index_add_(0, batch, x.square())
    if mean is None:
        mean = first.sum(0) / n.sum()
        var = second.sum(0) / n.sum() - mean.square()
    mean, var = mean.to(device).double(), var.to(device).double()
    center = (first + PRIOR_CELLS * mean) / (n + PRIOR_CELLS)
    square = (second + PRIOR_CELLS * (var + mean.square())) / (n + PRIOR_CELLS)
    return center.float(), (square - center.square()).clamp(min=1e-12).sqrt().float()


def _standardised(cells: Cells, index: Tensor, part: Imputation) -> Iterator[Tensor]:
    """Log-normalised genes in units of their scatter within the batch `(cells, genes)`, chunk by chunk."""
    for some in index.split(encode.CHUNK):
        batch, x = cells.batch[some], _log_normalised(cells, some, part.genes)
        yield ((x - part.center[batch]) / (part.scale[batch] + 1e-6)).clamp_(-FARTHEST, FARTHEST)


def _loading(x: Tensor, seed: int) -> Tensor:
    """Genes of the principal components `(genes, components)`, by subspace iteration from a random start.

    Halko, Martinsson and Tropp 2011, Finding structure with randomness. As scikit-learn has it, which takes half a
    second and 80 MB to come.
    """
    n = max(1, min(N_COMPONENTS, *(size - 1 for size in x.shape)))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(x.shape[1], min(n + 10, *x.shape), generator=generator).to(x)
    basis = torch.linalg.qr(x @ start).Q  # (cells, components and ten)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(x @ torch.linalg.qr(x.T @ basis).Q).Q
    _, _, genes = torch.linalg.svd(basis.T @ x, full_matrices=False)
    return genes[:n].T.contiguous()


def _view(model: Model, part: Imputation, cells: Cells, index: Tensor) -> _View:
    """Latent vectors without proteins, and components, of some cells."""
    if cells.rna_view is not None:
        stored, n_latent = cells.rna_view[index], part.latent.shape[1]
        return _View(stored[:, :n_latent], stored[:, n_latent:])
    blind = replace(cells, mask_table=torch.zeros_like(cells.mask_table[:1]), mask_row=torch.zeros_like(cells.mask_row))
    latent = [model.network.to_latent(block.q_z.mean) for block in encode.blocks(model, blind, index)]
    components = [x @ part.loading for x in _standardised(cells, index, part)]
    return _View(torch.cat(latent), torch.cat(components))


def _patterns(y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Proteins that were measured in the same cells: `(cells,)` bool, and the columns."""
    patterns, group = (~y.isnan()).unique(dim=1, return_inverse=True)
    return [(patterns[:, i], (group == i).nonzero().squeeze(1)) for i in range(patterns.shape[1])]


def _ridge(components: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes `(components, proteins)` and intercepts `(proteins,)`; the penalty of each protein by leaving one out."""
    slope, intercept = components.new_zeros(components.shape[1], y.shape[1]), components.new_zeros(y.shape[1])
    for there, columns in _patterns(y):
        if int(there.sum()) <= N_NEIGHBORS:
            continue
        c, values = components[there].double(), y[there][:, columns].double()
        mean_c, mean_y = c.mean(0), values.mean(0)
        c, values = c - mean_c, values - mean_y
        length, axes = torch.linalg.eigh(c.T @ c)
        rotated, unit = c @ axes, c.square().sum() / len(c)
        best, chosen = values.new_full((len(columns),), torch.inf), values.new_zeros(len(mean_c), len(columns))
        for penalty in PENALTIES:
            shrunk = (length + penalty * unit).reciprocal()
            beta = axes @ (shrunk[:, None] * (rotated.T @ values))
            leverage = rotated.square() @ shrunk + 1 / len(c)
            error = ((values - c @ beta) / (1 - leverage).clamp(min=1e-6)[:, None]).square().mean(0)
            chosen, best = torch.where(error < best, beta, chosen), torch.minimum(error, best)
        slope[:, columns] = chosen.float()
        intercept[columns] = (mean_y - mean_c @ chosen).float()
    return slope, intercept


def _joint(part: Imputation, view: _View) -> Tensor:
    """Latent vectors beside components, both of the scatter that landmarks have `(cells, latent + components)`."""
    pairs = ((view.latent, part.latent), (view.components, part.components))
    return torch.cat([(own - of.mean(0)) / of.var(0).sum().clamp(min=1e-12).sqrt() for own, of in pairs], dim=1)


def _predict(part: Imputation, view: _View, leave_out: bool = False) -> tuple[Tensor, Tensor]:
    """Log counts of proteins `(cells, proteins)` and how their neighbours scatter; 0 where too few were measured."""
    mean, spread = _near(part, view, leave_out)
    line = part.intercept + view.components @ part.slope
    return NEAR * mean + (1 - NEAR) * line, spread


def _near(part: Imputation, view: _View, leave_out: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and scatter of the log counts of the nearest landmarks that were measured `(cells, proteins)`.

    With `leave_out`, the cells are the landmarks, and none is a neighbour of its own.
    """
    landmarks, cells = _joint(part, _View(part.latent, part.components)), _joint(part, view)
    mean, var = (torch.zeros(len(cells), part.y.shape[1], device=cells.device) for _ in range(2))
    for there, columns in _patterns(part.y):
        if int(there.sum()) <= N_NEIGHBORS:
            continue
        place, values = there.nonzero().squeeze(1), part.y[there][:, columns]
        # the scatter of all of them bounds that of a few from below: thirty zeros do not mean that no count can come
        floor = values.var(0) * LEAST_SPREAD**2
        for rows in torch.arange(len(cells), device=cells.device).split(encode.CHUNK):
            distance = torch.cdist(cells[rows], landmarks[place])
            if leave_out:
                distance.masked_fill_(rows[:, None] == place, torch.inf)
            near = values[distance.topk(N_NEIGHBORS, largest=False).indices]  # (cells, neighbours, columns)
            mean[rows[:, None], columns], var[rows[:, None], columns] = near.mean(1), near.var(1) + floor
    return mean, var.sqrt().clamp(min=1e-6)


def _interval(
    part: Imputation, batch: Tensor, found: Tensor, spread: Tensor, share: Tensor, coverage: float
) -> list[Tensor]:
    """Ends of the intervals about log counts `(cells, proteins)`, in counts, of which neighbours have a `share`."""
    middle, ends = _level(part.residuals, 0.5) * spread, []
    df = PRIOR_DF + (_n_measured(part) > 0).sum(0).cpu().numpy() - 1  # of the batches that tell of a protein
    for level in ((1 - coverage) / 2, (1 + coverage) / 2):
        off = _level(part.residuals, level) * spread - middle
        if part.between is not None:  # what is off in the whole batch does not depend on the cell
            elsewhere = part.apart[batch] * part.between * torch.from_numpy(special.stdtrit(df, level)).to(part.between)
            off = off.hypot(share * elsewhere) * (1 if level > 0.5 else -1)
        ends.append((found + middle + off).clamp(min=0).expm1())
    return ends


def _tell_of_scale(model: Model, part: Imputation, where: Tensor) -> None:
    """Say when nothing tells how far batches are off that did not measure some proteins `(cells, proteins)`."""
    names = [model.setup.proteins[i] for i in where.any(0).nonzero().squeeze(1).tolist()]
    if not names or part.between is not None:
        return
    which = f"{len(names)} proteins ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    why = "measured batches are too small or share too few proteins to be compared, or an earlier anvi fitted the model"
    if len(batches := part.batch.unique()) == 1:
        why = f"the only measured batch is '{model.setup.batches[int(batches)]}'; a second one in the fit would tell"
    logger.warning(
        f"return_interval: intervals of {which} hold for cells stained and sequenced as the measured ones were. How "
        f"far the counts of another kit lie from theirs, nothing tells: {why}"
    )


# scales of batches ----------------------------------------------------------------------------------------------------


def _aligned(part: Imputation) -> Imputation:
    """The same with log counts of all batches on one scale, the regression on them, and how far batches are apart.

    Kits count the same protein on scales that differ manyfold, and the mean of neighbours from several would say which
    kits they are from. What a batch is off by is its mean error as the neighbours from others have it.
    """
    y, count = part.y, part.batch.bincount()
    codes = count.argsort(descending=True, stable=True)[: min(N_BATCHES, int((count > N_NEIGHBORS).sum()))]
    large = codes.tolist()
    offset = torch.zeros(len(part.measured), y.shape[1], device=y.device)
    # as many landmarks of each batch, so that all have the same share in the mean of the others
    generator = torch.Generator().manual_seed(0)
    some = [at_most(ALIGNED // len(codes), (part.batch == code).nonzero().squeeze(1), generator) for code in large]
    sample = _only(part, torch.cat(some)) if len(codes) > 1 else None
    told = torch.zeros(len(codes), y.shape[1], dtype=torch.bool, device=y.device)
    for _ in range(ROUNDS if sample is not None else 0):
        shift = torch.stack([_error_from_others(sample, code).nanmean(0) for code in large])
        told = ~shift.isnan() & ((~shift.isnan()).sum(0) > 1)  # (codes, proteins): of this and of other batches
        n = told.sum(0)
        step = (shift * (n - 1) / n).where(told, 0.0)  # the others' mean has a share of it
        offset[codes] += step - (step.sum(0) / n).where(told, 0.0)
        sample = sample._replace(y=y[torch.cat(some)] - offset[sample.batch])
    # what a batch alone has measured is off by what the batch is off on average
    n_measured = _n_measured(part)  # (batches, proteins) landmarks
    known = told | ((n_measured[codes] > N_NEIGHBORS) & (told.sum(1, keepdim=True) >= MIN_SHARED))
    mean = (offset[codes] * told).sum(1, keepdim=True) / told.sum(1, keepdim=True)
    offset[codes] = offset[codes].where(told | ~known, mean)
    # smaller batches, as those have it
    rest = ~torch.isin(part.batch, codes)
    if len(codes) and rest.any():
        of_large = _only(part._replace(y=y - offset[part.batch]), (~rest).nonzero().squeeze(1))
        found, _ = _near(of_large, _View(part.latent[rest], part.components[rest]))
        error = (y[rest] - found).masked_fill((~of_large.y.isnan()).sum(0) <= N_NEIGHBORS, torch.nan)
        for code in part.batch[rest].unique().tolist():
            own = error[part.batch[rest] == code]
            offset[code] = own.nansum(0) / ((~own.isnan()).sum(0) + PRIOR_CELLS)
    part = part._replace(y=y - offset[part.batch], offset=offset)
    slope, intercept = _ridge(part.components, part.y)
    part = part._replace(slope=slope, intercept=intercept)
    if not told.any():
        return part
    # a new batch scatters as offsets do, and about their mean, which does, too; and errors more than within a batch
    sample = sample._replace(y=y[torch.cat(some)] - offset[sample.batch])
    within = (sample.y - _near(sample, _View(sample.latent, sample.components), leave_out=True)[0]).square().nanmean(0)
    error = torch.stack([_error_from_others(sample, code).square().nanmean(0) for code in large])
    excess = (error - within).nanmean(0).clamp(min=0).nan_to_num()
    variance = (offset[codes].where(told, 0.0).square().sum(0) / (n - 1) * (1 + 1 / n)).where(n > 1, torch.nan) + excess
    df = (n - 1).clamp(min=0)
    between = ((df * variance.nan_to_num() + PRIOR_DF * variance.nanmean()) / (df + PRIOR_DF)).sqrt()
    apart = _unknown(n_measured)
    return _completed(part._replace(between=between, apart=apart), codes, offset[codes].where(known, torch.nan))


def _only(part: Imputation, index: Tensor) -> Imputation:
    """The same with some of the landmarks."""
    fields = ("y", "latent", "components", "batch")
    return part._replace(**{name: getattr(part, name)[index] for name in fields})


def _n_measured(part: Imputation) -> Tensor:
    """How many landmarks of a batch have a protein `(batches, proteins)`."""
    n = torch.zeros(part.measured.shape, dtype=torch.long, device=part.y.device)
    return n.index_add_(0, part.batch, (~part.y.isnan()).long())


def _unknown(n_measured: Tensor) -> Tensor:
    """What is left of not knowing a batch's scale after so many cells: a cell scatters about as a batch does."""
    return (1 + n_measured).rsqrt().masked_fill(n_measured > N_NEIGHBORS, 0.0)


def _completed(part: Imputation, codes: Tensor, offset: Tensor) -> Imputation:
    """The same with offsets of batches `(codes, proteins)`, what they did not measure (NaN) told by the others."""
    guess, variance = _from_others(offset)
    whole, apart, lacking = part.offset.clone(), part.apart.clone(), offset.isnan()
    whole[codes] = offset.where(~lacking, guess).nan_to_num()
    share = (variance.sqrt() / part.between).clamp(max=1).nan_to_num(1.0)
    apart[codes] = torch.minimum(apart[codes], share).where(lacking, apart[codes])
    return part._replace(offset=whole, apart=apart)


def _from_others(offset: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of batches `(batches, proteins)` as others tell them, and the variance of what they tell.

    From another batch it is as far as it is on average in the other proteins that both measured, give or take how these
    scatter; who scatters less counts for more. What is claimed is moderated: the scatter of few proteins towards that
    of all pairs of batches, as logarithms, for there may be two batches of one kit among many. NaN is what was not
    measured, or where no batch shares enough.
    """
    off = offset[:, None] - offset  # (batches, others, proteins)
    n = (~off.isnan()).sum(2, keepdim=True) - (~off.isnan()).int()
    mean, square = ((part.nansum(2, keepdim=True) - part.nan_to_num()) / n for part in (off, off.square()))
    variance = (square - mean.square()).clamp(min=0) * n / (n - 1) + LEAST_OFF**2
    usable = (n >= MIN_SHARED) & ~torch.eye(len(off), device=off.device).bool()[:, :, None]
    prior = variance.log().where(usable, torch.nan).nanmean().exp()
    usable = usable & ~offset.isnan()
    weight = (1 / variance).where(usable, 0.0)
    variance = (variance * (n - 1) + PRIOR_DF * prior) / (n - 1 + PRIOR_DF) * (n + 1) / n  # of another protein
    told = (offset + mean).where(usable, 0.0), variance.where(usable, 0.0)
    return tuple((weight * value).sum(1) / weight.sum(1) for value in told)


def _error_from_others(part: Imputation, code: int) -> Tensor:
    """What log counts of a batch's landmarks are above their neighbours from others `(its landmarks, proteins)`."""
    own = part.batch == code
    others = part._replace(y=part.y.masked_fill(own[:, None], torch.nan))
    found, _ = _near(others, _View(part.latent[own], part.components[own]))
    few = torch.minimum((~others.y.isnan()).sum(0), (~part.y[own].isnan()).sum(0)) <= N_NEIGHBORS
    return (part.y[own] - found).masked_fill(few, torch.nan)


def _on(part: Imputation, device: torch.device) -> Imputation:
    """The same on a device."""
    return Imputation(*(None if tensor is None else tensor.to(device) for tensor in part))


def _foreground_share(model: Model, part: Imputation, block: Block) -> Tensor:
    """The decoder's share of foreground `(cells, proteins)`, in the batch that most landmarks are from."""
    share = torch.zeros(len(block.index), part.y.shape[1], device=block.index.device)
    for there, columns in _patterns(part.y):
        if there.any():
            code = int(part.batch[there].mode().values)
            whole = _decoded(model, block, code, True)[:, columns].clamp(min=1e-12)
            share[:, columns] = _decoded(model, block, code, False)[:, columns] / whole
    return share


def _decoded(model: Model, block: Block, code: int | None, include_background: bool) -> Tensor:
    """What the decoder says of a block `(cells, proteins)`, in a batch or their own."""
    batch = in_batch(model, block.batch, code)
    return protein_value(model, model.network.to_latent(block.q_z.mean), batch, None, include_background)


def _level(residuals: Tensor, level: float) -> Tensor:
    """Quantile of the held-out residuals of every protein `(proteins,)`."""
    place = level * (residuals.shape[1] - 1)
    low = min(int(place), residuals.shape[1] - 2)
    return residuals[:, low] + (place - low) * (residuals[:, low + 1] - residuals[:, low])
