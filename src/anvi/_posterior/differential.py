"""Differential expression: posterior draws of populations, fold changes of pairs, expected false discoveries."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells, in_order
from anvi._model import Model
from anvi.nn import Batch, Draws, Entries

from .bound import BACK, Z, noise_for, resample
from .encode import CHUNK, block_seed, blocks, in_batch

PRIOR_COUNT = 0.1
"""Added to the foreground count of a protein before it is compared, as the incumbent does."""

Values = Callable[[slice], Tensor]
"""Expression of some draws: rows to `(populations, rows, features)`, NaN where the model knows nothing."""


class PosteriorDraws(NamedTuple):
    """Cells of each population, drawn with replacement, and where their latent vectors fell."""

    index: Tensor  # (populations, draws) positions in Cells
    z: Tensor  # (populations, draws, latent)
    pick: Tensor  # (populations, draws) which of its samples was kept
    seed: int
    effective: float | None = None  # with importance weights: median number of samples that share the weight

    @property
    def n_draws(self) -> int:
        """Draws of each population."""
        return self.index.shape[1]

    def background_noise(self, rows: slice, width: int) -> Tensor:
        """Noise of the log background that belongs to the samples of some draws `(populations, rows, width)`."""
        parts = []
        for population, pick in enumerate(self.pick[:, rows]):
            part = torch.empty(len(pick), width, device=pick.device)
            for sample in pick.unique().tolist():
                noise = noise_for(self.seed, population, BACK, sample, rows, width, pick.device)
                part[pick == sample] = noise[pick == sample]
            parts.append(part)
        return torch.stack(parts)


@torch.no_grad()
def draw_posterior(
    model: Model, cells: Cells, populations: Sequence[np.ndarray], n_draws: int, seed: int, *, importance: bool = False
) -> PosteriorDraws:
    """Draw cells of each population and one latent vector for every draw."""
    device = cells.label.device
    rng = np.random.default_rng(seed)
    named = [in_order(torch.from_numpy(population), cells.rank).numpy() for population in populations]
    index = torch.from_numpy(np.stack([rng.choice(population, n_draws) for population in named])).to(device)
    if importance:
        cells.x.hold(cells.x_row[index.flatten()])  # drawn in any order
        chosen = [resample(model, cells, row, seed, p) for p, row in enumerate(index)]
        z, pick, effective = (torch.stack(part) for part in zip(*chosen, strict=True))
        return PosteriorDraws(index, z, pick, seed, float(effective.median()))
    unique, place = index.unique(return_inverse=True)
    posterior = [block.q_z for block in blocks(model, cells, unique)]
    mean, var = (torch.cat(part) for part in zip(*posterior, strict=True))
    everyone, width = slice(0, n_draws), mean.shape[1]
    noise = torch.stack([noise_for(seed, p, Z, 0, everyone, width, device) for p in range(len(index))])
    z = model.network.to_latent(mean[place] + var.sqrt()[place] * noise)
    return PosteriorDraws(index, z, torch.zeros_like(index), seed)


def genes(model: Model, cells: Cells, drawn: PosteriorDraws, *, batch_correction: bool) -> Values:
    """Shares of all genes in the drawn cells.

    With batch correction, draws are spread evenly over all batches and decoded as if they came from these: the i-th of
    every population from the same one.
    """
    target = torch.arange(drawn.n_draws, device=drawn.z.device) % model.config.n_batches if batch_correction else None

    def values(rows: slice) -> Tensor:
        batch = _as_if(model, _without_counts(cells, drawn.index[:, rows]), target, rows)
        share = model.network.decode_share(drawn.z[:, rows].flatten(0, 1), batch, Draws())
        return share.unflatten(0, (len(drawn.index), -1))

    return values


def proteins(model: Model, cells: Cells, drawn: PosteriorDraws, *, batch_correction: bool) -> Values:
    """Foreground counts of the proteins that any batch measured, in the drawn cells, plus :data:`PRIOR_COUNT`.

    Only batches in which a protein was measured have taught the model what it looks like there. With batch correction,
    its draws are spread over these; without, its value is NaN in cells of the others.
    """
    measured = measured_in(model, cells).to(drawn.z.device)  # (batches, proteins)
    draws = torch.arange(drawn.n_draws, device=drawn.z.device)
    patterns, pattern = measured.unique(dim=1, return_inverse=True)  # proteins that the same batches measured

    def decode(rows: slice, noise: Tensor, target: Tensor | None) -> Tensor:
        batch = _as_if(model, _without_counts(cells, drawn.index[:, rows]), target, rows)
        rates = model.network.decode_protein(drawn.z[:, rows].flatten(0, 1), batch, Draws())
        log_foreground = rates.log_fore + rates.back_scale * noise.flatten(0, 1)
        value = log_foreground.exp() * (-rates.mixing).sigmoid() + PRIOR_COUNT
        if target is None:
            value = value.masked_fill(~measured[batch.batch], torch.nan)
        return value.unflatten(0, (len(drawn.index), -1))

    def values(rows: slice) -> Tensor:
        noise = drawn.background_noise(rows, measured.shape[1])
        if not batch_correction:
            return decode(rows, noise, None)[..., measured.any(0)]
        out = torch.empty_like(noise)
        for number, column in enumerate(patterns.T):
            batches = column.nonzero().squeeze(1)
            if len(batches):
                mine = pattern == number
                out[..., mine] = decode(rows, noise, batches[draws % len(batches)])[..., mine]
        return out[..., measured.any(0)]

    return values


def measured_in(model: Model, cells: Cells) -> Tensor:
    """In which batches which proteins were measured `(batches, proteins)`.

    Where panels are not batches, the cells tell; of a protein that none of them has, all batches count, if any panel
    of the fit measured it.
    """
    setup, config = model.setup, model.config
    by_panel = torch.tensor(setup.measured)
    if setup.panel_key is None and len(by_panel) == config.n_batches:
        return by_panel
    seen = torch.zeros(config.n_batches, config.n_proteins, dtype=torch.bool)
    for code in range(config.n_batches):
        patterns = cells.mask_row[cells.batch == code].unique()
        seen[code] = cells.mask_table[patterns].any(0).cpu()
    return torch.where(seen.any(0), seen, by_panel.any(0))


def _without_counts(cells: Cells, index: Tensor) -> Batch:
    """What a decoder looks at: everything but counts."""
    flat = index.flatten()
    nothing = cells.log_library.new_empty(len(flat), 0)
    return Batch(
        x=nothing,
        y=None,
        measured=None,
        batch=cells.batch[flat],
        panel=None,
        codes=None if cells.codes is None else cells.codes[flat],
        continuous=None if cells.continuous is None else cells.continuous[flat],
        log_library=nothing,
        label=cells.label[flat],
        weight=nothing,
    )


def _as_if(model: Model, batch: Batch, target: Tensor | None, rows: slice) -> Batch:
    """The same cells as if each draw came from its target batch; None: from the cell's own."""
    return in_batch(
        model, batch, None if target is None else target[rows].repeat(len(batch.batch) // len(target[rows]))
    )


BUDGET, GPU_BUDGET = 2**22, 2**26
"""Numbers (populations x pairs x features) that are decoded at a time; bounds the memory, changes nothing else.

A GPU has hardly begun with what fits the cache of a CPU; with more than this it is no faster, and some have 8 GiB.
"""
PILOT = 1_000
"""Pairs from which a threshold is estimated."""
LEAST_DELTA, MOST_MEANS = 0.1, 50_000
LEAST_PSEUDOCOUNT = 1e-10
RARE = 0.01
"""Mean count below which a gene tells the incumbent's pseudocount."""


class Comparison(NamedTuple):
    """A population and what it is compared with: a mixture of others."""

    group: int
    reference: tuple[int, ...]
    share: tuple[float, ...]  # of each in the mixture, summing to 1


class Options(NamedTuple):
    """How features are compared."""

    mode: Literal["vanilla", "change"]
    delta: float | None
    pseudocount: float
    seed: int


class Change(NamedTuple):
    """The posterior of expression on both sides and of log2 fold changes, one row per comparison."""

    group_mean: np.ndarray  # (comparisons, features) mean over pairs, NaN where no pair is known
    reference_mean: np.ndarray  # (comparisons, features)
    lfc_mean: np.ndarray  # (comparisons, features)
    lfc_std: np.ndarray  # (comparisons, features)
    up: np.ndarray  # (comparisons, features) share of pairs in which the feature is higher, by delta in change mode
    down: np.ndarray  # (comparisons, features) and lower
    delta: float | None  # the threshold; None in vanilla mode
    pseudocount: np.ndarray  # (comparisons,)


def strata(inside: Sequence[np.ndarray], outside: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[Comparison]]:
    """Populations to draw from, of which groups and references `(cells,)` bool are made, and how these are compared.

    Where groups do not overlap, each is a population, and what is in none of them is another; the rest of a group is a
    mixture of the other populations, which need not be drawn again. Where they do, every group and every reference is a
    population of its own.
    """
    n = len(inside)
    code = np.where(np.any(outside, axis=0), n, -1)  # (cells,) stratum; n: in no group
    for number, mask in enumerate(inside):
        code[mask] = number
    whole = np.sum(inside, axis=0).max() <= 1
    sizes = np.bincount(code[code >= 0], minlength=n + 1)
    comparisons = []
    for number, mask in enumerate(outside):
        parts = np.bincount(code[mask], minlength=n + 1)
        whole &= bool(((parts == 0) | (parts == sizes)).all())
        reference = np.flatnonzero(parts)
        comparisons.append(Comparison(number, tuple(reference), tuple(parts[reference] / parts.sum())))
    if whole:
        populations = [np.flatnonzero(code == number) for number in range(n + 1)]
        return populations if sizes[n] else populations[:n], comparisons
    alone = [np.flatnonzero(mask) for pair in zip(inside, outside, strict=True) for mask in pair]
    return alone, [Comparison(2 * number, (2 * number + 1,), (1.0,)) for number in range(n)]


@torch.no_grad()
def compare(
    values: Values,
    n_features: int,
    drawn: PosteriorDraws,
    comparisons: Sequence[Comparison],
    options: Options,
    *,
    rare: np.ndarray | None = None,  # (2, comparisons, features) bool, with pseudocount="scvi"
) -> Change:
    """Compare the i-th draw of a group with the i-th draw of its reference, for all pairs and features.

    Populations are drawn once, however many comparisons they take part in. The reference of a pair is drawn from the
    mixture of the comparison. What is held at a time is a block of pairs.
    """
    pairs = _Pairs(values, n_features, drawn, comparisons, options.seed)
    offset = np.full(len(comparisons), options.pseudocount) if rare is None else estimate_pseudocounts(pairs, rare)
    delta = options.delta if options.mode == "change" else None
    if options.mode == "change" and delta is None:
        delta = estimate_delta(pairs.change(slice(0, PILOT), offset, np.inf).lfc_mean, options.seed)
    return pairs.change(slice(0, pairs.n_pairs), offset, delta)


def _partners(drawn: PosteriorDraws, comparisons: Sequence[Comparison], seed: int) -> Tensor:
    """From which population the reference of each pair comes `(comparisons, pairs)`."""
    rng = np.random.default_rng(block_seed(seed, 1))
    partner = [rng.choice(part.reference, drawn.n_draws, p=part.share) for part in comparisons]
    return torch.from_numpy(np.stack(partner)).to(drawn.z.device)


class _Pairs:
    """Both sides of every comparison, block by block."""

    def __init__(
        self, values: Values, n_features: int, drawn: PosteriorDraws, comparisons: Sequence[Comparison], seed: int
    ):
        self.values, self.n_features, self.comparisons = values, n_features, comparisons
        self.n_populations, self.n_pairs = drawn.index.shape
        self.partner = _partners(drawn, comparisons, seed)

    def blocks(self, rows: slice):
        """Yield comparison, group and reference `(rows, features)`; the reference is a copy that may be written to."""
        budget = GPU_BUDGET if self.partner.is_cuda else BUDGET
        step = max(8, budget // (self.n_populations * max(self.n_features, 256)))  # the hidden layers are wide, too
        stop = min(rows.stop, self.n_pairs)
        for start in range(rows.start, stop, step):
            part = slice(start, min(start + step, stop))
            value = self.values(part)  # (populations, rows, features)
            n = value.shape[1]
            row = torch.arange(n, device=value.device)
            flat = value.flatten(0, 1)
            for number, comparison in enumerate(self.comparisons):
                yield number, value[comparison.group], flat.index_select(0, self.partner[number, part] * n + row)

    def change(self, rows: slice, offset: np.ndarray, delta: float | None) -> Change:
        """What pairs come to, by sums over them; `delta` None counts in which of them the group is higher.

        A feature of which no pair is known has not changed.
        """
        shape = (7, len(self.comparisons), self.n_features)
        sums = torch.zeros(shape, dtype=torch.float64, device=self.partner.device)
        for number, group, reference in self.blocks(rows):
            sides = [group, reference.clone()]
            flag = torch.empty_like(group)  # numbers instead of bools: they are summed ten times as fast
            if delta is None:
                up, down = (compare(group, reference, out=flag).sum(0) for compare in (torch.gt, torch.lt))
            lfc = (group + offset[number]).div_(reference.add_(offset[number])).log2_()
            if delta is not None:
                up, down = torch.ge(lfc, delta, out=flag).sum(0), torch.lt(lfc, -delta, out=flag).sum(0)
            total, n = lfc.sum(0), torch.full_like(lfc[0], len(lfc))
            if total.isnan().any():  # pairs of which nothing is known are neither up nor down
                known = ~lfc.isnan()
                n, sides = known.sum(0), [side.where(known, 0.0) for side in sides]
                total = lfc.nan_to_num_(0.0).sum(0)
            sums[:, number] += torch.stack([n, *(side.sum(0) for side in sides), up, down, total, lfc.square_().sum(0)])
        group, reference = sums[1:3] / sums[0]
        up, down, mean, square = sums[3:] / sums[0].clamp(min=1)
        std = (square - mean.square()).clamp(min=0).sqrt()
        parts = (part.cpu().numpy() for part in (group, reference, mean, std, up, down))
        return Change(*parts, delta, offset)


def estimate_delta(lfc_mean: np.ndarray, seed: int) -> float:
    """A threshold between features that change and those that do not, from all mean fold changes together.

    A mixture of three normal distributions is fitted to them; the threshold is 0.6 of the mean distance of the outer
    two from zero, and at least 0.1. Source: spec section 5.2.
    """
    from sklearn.mixture import GaussianMixture

    means = lfc_mean.reshape(-1, 1)
    if len(means) > MOST_MEANS:
        means = np.random.default_rng(seed).choice(means, MOST_MEANS, replace=False)
    if len(np.unique(means)) < 3:
        return LEAST_DELTA
    mixture = GaussianMixture(3, random_state=seed % 2**32).fit(means)
    centers = np.sort(mixture.means_.ravel())
    return float(max(LEAST_DELTA, 0.6 * np.abs(centers[[0, -1]]).mean()))


def estimate_pseudocounts(pairs: _Pairs, rare: np.ndarray) -> np.ndarray:
    """The incumbent's pseudocount of each comparison `(comparisons,)`.

    Of the genes that are hardly seen on a side, the 0.9 quantile of the largest share in any draw; of the two sides the
    larger, over the number of genes, and at least 1e-10. Source: spec section 5.2.
    """
    largest = np.zeros(rare.shape)
    for number, *sides in pairs.blocks(slice(0, pairs.n_pairs)):
        for side, share in enumerate(sides):
            largest[side, number] = np.maximum(largest[side, number], share.amax(0).cpu().numpy())
    out = np.full(rare.shape[1], LEAST_PSEUDOCOUNT)
    for number in range(rare.shape[1]):
        for side in range(2):
            found = largest[side, number][rare[side, number]]
            if len(found):
                out[number] = max(out[number], np.quantile(found, 0.9) / rare.shape[2])
    return out


class CountMeans(NamedTuple):
    """What the counts themselves say on both sides `(comparisons, features)`, NaN where nothing was measured."""

    mean_group: np.ndarray
    mean_reference: np.ndarray
    share_group: np.ndarray  # of cells with at least one count
    share_reference: np.ndarray

    @property
    def rare(self) -> np.ndarray:
        """Features that are hardly seen in a group, and in its reference `(2, comparisons, features)` bool."""
        return np.stack([self.mean_group, self.mean_reference]) < RARE


class Counts:
    """Counts of genes and proteins, summed over populations.

    Within :meth:`taken`, genes are counted while the cells are read for whatever is done there.
    """

    def __init__(self, cells: Cells, populations: Sequence[np.ndarray]):
        self.cells, device = cells, cells.label.device
        which = torch.arange(len(populations)).repeat_interleave(torch.tensor([*map(len, populations)]))
        self.cell, self.group = torch.from_numpy(np.concatenate(populations)).to(device), which.to(device)
        n_proteins = 0 if cells.y is None else cells.y.shape[1]
        # counts, cells with any, cells that were measured (3, populations, features)
        self.genes, self.proteins = (
            torch.zeros(3, len(populations), n, dtype=torch.float64, device=device)
            for n in (cells.x.n_columns, n_proteins)
        )

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Count, once what is done meanwhile has read what it needs."""
        with self.cells.x.shown(self.cells.x_row[self.cell], self._add_genes):
            yield
        if self.proteins.shape[2]:
            for part, group in zip(self.cell.split(CHUNK), self.group.split(CHUNK), strict=True):
                measured = self.cells.measured_of(part)
                counts = self.cells.proteins(part) * measured
                for total, values in zip(self.proteins, (counts, counts > 0, measured), strict=True):
                    total.index_add_(0, group, values.double())

    def _add_genes(self, places: Tensor, entries: Entries) -> None:
        group, n_genes = self.group[places], self.genes.shape[2]
        place = group[entries.row] * n_genes + entries.column
        for total, values in zip(self.genes, (entries.count, entries.count > 0), strict=False):
            total.view(-1).index_add_(0, place, values.double())
        seen = group if self.cells.has_rna is None else group[self.cells.has_rna[self.cell[places]]]
        self.genes[2] += seen.bincount(minlength=len(self.genes[2]))[:, None]

    def of(self, comparisons: Sequence[Comparison], *, proteins: bool) -> CountMeans:
        """Mean counts, and shares of cells with any, of the groups and their references."""
        found = (self.proteins if proteins else self.genes).transpose(0, 1).cpu().numpy()  # (populations, 3, features)

        def side(parts: Sequence[int]) -> np.ndarray:
            total = sum(found[part] for part in parts)
            return np.where(total[2] > 0, total[:2] / np.maximum(total[2], 1), np.nan)

        sides = [(side([one.group]), side(one.reference)) for one in comparisons]
        group, reference = (np.stack(part, axis=1) for part in zip(*sides, strict=True))  # (2, comparisons, features)
        return CountMeans(group[0], reference[0], group[1], reference[1])


class Evidence(NamedTuple):
    """What the shares of pairs say of each feature `(comparisons, features)`."""

    proba_de: np.ndarray  # probability that it changes, in the direction that is more likely
    error: np.ndarray  # probability that calling it changed is wrong, never below half a pair
    expected_fdr: np.ndarray  # mean error of all features of the comparison that are called at least as surely
    bayes_factor: np.ndarray  # natural logarithm of the odds; vanilla: of being higher


def evidence(change: Change, n_pairs: int) -> Evidence:
    """Turn shares of pairs into probabilities, errors and the expected false discovery rate. Source: spec 5.2."""
    proba = np.maximum(change.up, change.down)
    odds_of = change.up if change.delta is None else proba
    error = np.maximum(1 - proba, 0.5 / n_pairs)
    return Evidence(
        proba_de=proba,
        error=error,
        expected_fdr=np.stack([running_mean(row) for row in error]),
        bayes_factor=np.log(odds_of + 1e-8) - np.log(1 - odds_of + 1e-8),
    )


def running_mean(error: np.ndarray) -> np.ndarray:
    """Mean of each error and all smaller ones: the false discovery rate to expect if everything up to it is called."""
    order = np.argsort(error, kind="stable")
    out = np.empty_like(error)
    out[order] = error[order].cumsum() / np.arange(1, len(error) + 1)
    return out
