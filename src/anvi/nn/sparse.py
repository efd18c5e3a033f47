"""The numbers and gradients of `likelihoods.py` summed per cell, log-gammas only where a count is not zero.

About nine in ten RNA counts are zero, and there the log-gamma terms of a negative binomial cancel: with
r = mean / theta, every entry has -theta log1p(r), and only a count adds more. Values and derivatives are worked out
together, in one pass over blocks of cells that stay in the processor's cache, with the counts filled in; the softmax of
the gene shares is part of it. Source: spec 2.1, 2.2, 2.5. Tests hold each function to its definition in value and
gradient.
"""

import logging
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import likelihoods
from .config import Entries

logger = logging.getLogger("anvi")

BLOCK = 65_536
"""Entries of a matrix that a thread works on at a time on a CPU, so that what belongs to them stays in its cache."""


def nb(
    entries: Entries,
    log_mean: Tensor,
    log_theta: Tensor,
    zero_logits: Tensor | None = None,
    *,
    log_library: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Log-probability of each cell's counts under (zero-inflated) negative binomials, summed over genes.

    Parameters
    ----------
    entries
        All non-zero counts.
    log_mean
        `(cells, genes)`. With `log_library`, logits whose softmax over genes, times the library, is the mean.
    log_theta
        Log inverse dispersion `(genes,)` or `(cells, genes)`.
    zero_logits
        `(cells, genes)`: so many of the draws, as a sigmoid, are replaced by zero; None: no extra zeros.
    log_library
        Log library size `(cells, 1)`, or None where `log_mean` is the mean's logarithm.
    eps
        Added to the mean inside its logarithm, as the incumbent does.

    Returns
    -------
    `(cells,)`, in nats.
    """
    if (kernels := kernels_for(log_mean)) is not None:
        return kernels.nb(entries, log_mean, log_theta, zero_logits, log_library=log_library, eps=eps)
    return _NegativeBinomial.apply(*entries, log_mean, log_theta, zero_logits, log_library, eps)


def nb_mixture(y: Tensor, log_background: Tensor, log_foreground: Tensor, log_phi: Tensor, mixing: Tensor) -> Tensor:
    """Log-probability of every protein count `(cells, proteins)`, as :func:`likelihoods.nb_mixture` defines it.

    `log_phi` is `(proteins,)` or `(cells, proteins)`, everything else `(cells, proteins)`.
    """
    if (kernels := kernels_for(y)) is not None:
        return kernels.nb_mixture(y, log_background, log_foreground, log_phi, mixing)
    return _Mixture.apply(y, log_background, log_foreground, log_phi, mixing)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """`kernels.py` if it can take this tensor: one launch where torch needs many; None on a CPU or without Triton."""
    return _kernels(tensor.device) if tensor.is_cuda and tensor.dtype in _STEPS else None


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels if they compile on this device, which takes a compiler of C, too."""
    if torch.version.cuda is None or find_spec("triton") is None:
        return None
    try:
        from . import kernels

        x = torch.ones(1, 2, device=device)
        kernels.nb_mixture(x, x, x, x[0], x)
    except Exception as error:  # noqa: BLE001 whatever is wrong with an installation
        logger.warning(f"no Triton kernels ({type(error).__name__}: {error}): steps take longer, numbers are the same")
        return None
    return kernels


def log_normal_density(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Log-density of every row of `z` under N(mean, var), all `(rows, width)`, summed over its columns `(rows,)`."""
    if (kernels := kernels_for(z)) is not None:
        return kernels.log_normal_density(z, mean, var)
    return likelihoods.log_normal_density(z, mean, var).sum(-1)


def kl_standard_normal(mean: Tensor, var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)), both `(rows, width)`, summed over columns `(rows,)`."""
    if (kernels := kernels_for(mean)) is not None:
        return kernels.kl_standard_normal(mean, var)
    return likelihoods.kl_standard_normal(mean, var).sum(-1)


def kl_normal(mean: Tensor, scale: Tensor, prior_mean: Tensor, prior_scale: Tensor) -> Tensor:
    """KL(N(mean, scale²) || N(prior_mean, prior_scale²)) of each number, all of one shape."""
    if (kernels := kernels_for(mean)) is not None:
        return kernels.kl_normal(mean, scale, prior_mean, prior_scale)
    return likelihoods.kl_normal(mean, scale, prior_mean, prior_scale)


def rows(table: Tensor, code: Tensor) -> Tensor:
    """The rows `code` of a table of parameters; on a GPU without a backward pass that sorts."""
    if (kernels := kernels_for(table)) is None:
        return table[code]
    return kernels.add_rows(table.new_zeros(len(code), table.shape[1]), table, code)


def poisson(entries: Entries, log_mean: Tensor) -> Tensor:
    """Log-probability of each cell's counts under Poissons, summed over genes `(cells,)`."""
    row, column, count = entries
    at_entries = count * log_mean[row, column] - torch.lgamma(count + 1)
    return _per_cell(at_entries, row, len(log_mean)) - log_mean.exp().sum(-1)


class Coefficient(NamedTuple):
    """log Gamma(x + theta) - log Gamma(theta) - log Gamma(x + 1), and its derivative by log theta."""

    value: Tensor
    by_log_theta: Tensor


def coefficient(count: Tensor, theta: Tensor) -> Coefficient:
    """The binomial coefficient of a negative binomial, in logarithms; about 0 for a count of 0.

    Written with log-gammas it loses its digits where a count or theta is large. Here each argument is moved a few steps
    up, where Stirling's series is exact to the last digit, and what is large in the series cancels on paper. It is
    plain arithmetic, which is also several times faster than the special functions.
    """
    n_steps = _STEPS[count.dtype]
    # Gamma(z) = Gamma(z + 4) / (z (z + 1) (z + 2) (z + 3)) for z = x + theta, theta and x + 1
    steps, slope = None, None
    for first in range(0, n_steps, 4):  # a product of all eight could overflow
        factor = None
        for j in range(first, first + 4):
            low = theta + j
            share = low / (low + count)
            missing = (1 - share).div_(low)
            slope = missing if slope is None else slope.add_(missing)
            share = share.mul_(count + (1 + j))
            factor = share if factor is None else factor.mul_(share)
        steps = factor.log_() if steps is None else steps.add_(factor.log_())
    low, one = theta + n_steps, count + (n_steps + 1)
    smaller, larger = torch.minimum(low, one), torch.maximum(low, one)
    high = low + count  # larger + smaller - n_steps - 1
    low_gamma, low_digamma = _stirling_tails(low)
    high_gamma, high_digamma = _stirling_tails(high)
    log_high = high.log()
    value = torch.log1p((smaller - (n_steps + 1)).div_(larger)).mul_(larger - 0.5)
    value.add_((log_high - smaller.log()).mul_(smaller - 0.5)).sub_(log_high, alpha=n_steps + 0.5)
    value.add_(high_gamma).sub_(low_gamma).sub_(_stirling_tails(one)[0]).add_(steps)
    value.add_(n_steps + 1 - likelihoods.HALF_LOG_2PI)
    return Coefficient(value, torch.log1p(count / low).add_(high_digamma).sub_(low_digamma).add_(slope).mul_(theta))


_STEPS = {torch.float32: 4, torch.float64: 8}
_GAMMA = {torch.float32: (1 / 12, -1 / 360, 1 / 1260), torch.float64: (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)}
_DIGAMMA = {
    torch.float32: (-1 / 12, 1 / 120, -1 / 252),
    torch.float64: (-1 / 12, 1 / 120, -1 / 252, 1 / 240, -1 / 132),
}


def _stirling_tails(z: Tensor) -> tuple[Tensor, Tensor]:
    """What log-gamma and digamma have beyond their leading logarithms: to 1e-8 for z >= 4, to 1e-13 for z >= 8."""
    inverse = z.reciprocal()
    square = inverse.square()
    gamma = _polynomial(square, _GAMMA[z.dtype]).mul_(inverse)
    digamma = _polynomial(square, _DIGAMMA[z.dtype]).mul_(square).sub_(inverse, alpha=0.5)
    return gamma, digamma


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """The sum of c_k x^k."""
    *rest, last = coefficients
    total = x * last
    for coefficient in rest[:0:-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(rest[0])


def _per_cell(values: Tensor, row: Tensor, cells: int) -> Tensor:
    return values.new_zeros(cells).index_add_(0, row, values)


def _softplus(t: Tensor) -> Tensor:
    """As torch has it, but several times faster on a CPU."""
    return t.abs().neg_().exp_().log1p_().add_(t.clamp(min=0))


def _coefficients(entries: Entries, flat: Tensor, log_theta: Tensor) -> Coefficient:
    """The coefficient of every entry; zeros among them have none."""
    place = entries.column if log_theta.dim() == 1 else flat
    value, by_log_theta = coefficient(entries.count, log_theta.exp().reshape(-1).index_select(0, place))
    return Coefficient(value.mul_(entries.count > 0), by_log_theta)


def _filled(like: Tensor, flat: Tensor, values: Tensor) -> Tensor:
    """Zeros of the shape of `like` with the values added at their places."""
    out = torch.zeros_like(like)
    out.view(-1).scatter_add_(0, flat, values)
    return out


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Blocks of rows that fit the cache; all rows at once on an accelerator."""
    cells, genes = matrix.shape
    size = max(1, BLOCK * torch.get_num_threads() // genes) if matrix.device.type == "cpu" else max(1, cells)
    return (slice(start, min(start + size, cells)) for start in range(0, cells, size))


class _Theta(NamedTuple):
    """log theta, -theta and 1 / theta, `(genes,)` or `(cells, genes)`."""

    log: Tensor
    negative: Tensor
    reciprocal: Tensor  # cut at the root of the largest number, as means are: their product stays finite

    @classmethod
    def of(cls, log_theta: Tensor) -> "_Theta":
        limit = torch.finfo(log_theta.dtype).max ** 0.5
        return cls(log_theta, log_theta.exp().neg_(), log_theta.neg().exp_().clamp_(max=limit))


class _NegativeBinomial(Function):
    """Value and derivatives in one pass; with zero logits zero-inflated, with a log library on top of a softmax."""

    @staticmethod
    def forward(ctx, row, column, count, log_mean, log_theta, zero_logits, log_library, eps):
        cells, genes = log_mean.shape
        flat = row * genes + column
        choose = _coefficients(Entries(row, column, count), flat, log_theta)
        # block by block the coefficients turn into the derivative by log theta, the counts into that by the zero logits
        x, by_theta = _filled(log_mean, flat, count), _filled(log_mean, flat, choose.value)
        value, by_mean = log_mean.new_empty(cells), torch.empty_like(log_mean)
        by_library = None if log_library is None else log_mean.new_empty(cells)
        theta, room = _Theta.of(log_theta) if log_theta.dim() == 1 else None, None
        for rows in _blocks(log_mean):
            if room is None:  # for the first block, which is the largest
                room = log_mean.new_empty(4 if zero_logits is None else 6, rows.stop, genes)
            room = room[:, : rows.stop - rows.start]
            log_mean_of_rows, *scratch = room
            if log_library is None:
                log_mean_of_rows.copy_(log_mean[rows])
            else:
                torch.log_softmax(log_mean[rows], -1, out=log_mean_of_rows)
                torch.exp(log_mean_of_rows, out=by_mean[rows])  # the shares of the genes
                log_mean_of_rows.add_(log_library[rows])
            zero = None if zero_logits is None else zero_logits[rows]
            theta_of_rows = _Theta.of(log_theta[rows]) if theta is None else theta
            value[rows], gain = _evaluate(x[rows], log_mean_of_rows, theta_of_rows, zero, eps, by_theta[rows], *scratch)
            if log_library is None:
                by_mean[rows] = gain
            else:  # through the softmax: what a cell's genes gain together, they lose in proportion to their shares
                by_library[rows] = gain.sum(1)
                by_mean[rows].mul_(-by_library[rows, None]).add_(gain)
        ctx.save_for_backward(row, column, flat, choose.by_log_theta)
        ctx.theta_of_gene = log_theta.dim() == 1
        # the backward pass overwrites these, and is hence possible once
        ctx.dense = (by_mean, by_theta, None if zero_logits is None else x, by_library)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (cells,)
        row, column, flat, by_theta_of_entries = ctx.saved_tensors
        by_mean, by_theta, by_zero, by_library = ctx.dense
        del ctx.dense
        of_cell, grad_log_theta = grad[:, None], None
        if ctx.needs_input_grad[4]:
            of_entries = by_theta_of_entries * grad.index_select(0, row)
            if ctx.theta_of_gene:
                grad_log_theta = (grad @ by_theta).scatter_add_(0, column, of_entries)
            else:
                grad_log_theta = by_theta.mul_(of_cell)
                grad_log_theta.view(-1).scatter_add_(0, flat, of_entries)
        grad_zero = None if by_zero is None else by_zero.mul_(of_cell)
        grad_library = None if by_library is None else (grad * by_library)[:, None]
        return None, None, None, by_mean.mul_(of_cell), grad_log_theta, grad_zero, grad_library, None


def _evaluate(x, log_mean, theta: _Theta, zero_logits, eps, by_theta, mean, ratio, log_one_more, t=None, log=None):
    """A block of negative binomials: the log-probability of each cell and what it gains by each log mean.

    With r = mean / theta and the coefficient c:

        log p             = c + x log(r / (1 + r)) - theta log(1 + r)
        d / d log mean    = (x - mean) / (1 + r)
        d / d log theta   = -theta log(1 + r) - d / d log mean, and that of c, which is not added here

    Extra zeros have a share in the zeros, and both derivatives are multiplied by what the binomial explains of an
    entry: 1 of a count. All matrices are `(cells, genes)` and are overwritten, but for theta and the zero logits.
    `by_theta` comes with the coefficients and goes with the derivative by log theta; `x` goes with that by the zero
    logits if there are any; from `mean` on they are room to work in.
    """
    torch.exp(log_mean, out=mean).clamp_(max=torch.finfo(mean.dtype).max ** 0.5)
    if eps:
        chain = mean / (mean + eps)  # d log(mean + eps) / d log mean
        torch.log(mean.add_(eps), out=log_mean)
    torch.mul(mean, theta.reciprocal, out=ratio)
    torch.log1p(ratio, out=log_one_more)
    kept = ratio.add_(1).reciprocal_()  # 1 / (1 + r)
    # log(r / (1 + r)), cut so that a mean of 0 is no NaN where the count is 0, too
    log_lost = log_mean.sub_(theta.log).sub_(log_one_more).clamp_(min=torch.finfo(mean.dtype).min, max=0)
    log_prob = by_theta.addcmul_(x, log_lost)
    as_zero = log_one_more.mul_(theta.negative)  # log-probability of a zero, part of that of any count
    gain = torch.sub(x, mean, out=log_mean).mul_(kept)
    if zero_logits is None:
        total = log_prob.add_(as_zero).sum(1)
    else:
        # a zero is the binomial's or an extra one: log(sigmoid(z) + sigmoid(-z) e^a) = softplus(a - z) - softplus(-z),
        # where softplus(t) = t - log sigmoid(t). A count cannot be an extra one: it has t in place of softplus(t).
        # With 1e20 x added to t, far more than any t, the sigmoid is 1 there and its logarithm 0
        torch.sub(as_zero, zero_logits, out=t)
        log_prob.add_(t)
        explained = torch.sigmoid(t.add_(x, alpha=1e20), out=ratio)  # by the negative binomial
        log_prob.sub_(_log_sigmoid(t, explained, log))
        extra = torch.sigmoid(zero_logits, out=t)
        total = log_prob.add_(_log_sigmoid(zero_logits, extra, log)).sum(1)
        gain.mul_(explained)
        as_zero.mul_(explained)
        torch.sub(1, extra.add_(explained), out=x)
    torch.sub(as_zero, gain, out=by_theta)
    return total, gain.mul_(chain) if eps else gain


def _log_sigmoid(t: Tensor, sigmoid: Tensor, out: Tensor) -> Tensor:
    """The logarithm of a sigmoid that is known, and `t` itself where the sigmoid is too small to be told from 0."""
    torch.clamp(sigmoid, min=torch.finfo(sigmoid.dtype).tiny, out=out).log_()
    return torch.minimum(t, out, out=out)


class _Mixture(Function):
    @staticmethod
    def forward(ctx, y, log_background, log_foreground, log_phi, mixing):
        phi = log_phi.exp()
        choose = coefficient(y, phi.expand_as(y))
        background, foreground = (_Component.of(y, part, phi, log_phi) for part in (log_background, log_foreground))
        odds = background.value - foreground.value + mixing
        # log(sigmoid(m) e^b + sigmoid(-m) e^f)
        value = foreground.value + _softplus(odds) - _softplus(mixing) + choose.value
        share = odds.sigmoid_()  # of the background in this count
        by_phi = choose.by_log_theta + torch.lerp(foreground.by_phi, background.by_phi, share)
        by_foreground = (1 - share).mul_(foreground.by_mean)
        ctx.dense = (share * background.by_mean, by_foreground, by_phi, share - mixing.sigmoid())
        ctx.phi_of_protein = log_phi.dim() == 1
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (cells, proteins)
        by_background, by_foreground, by_phi, by_mixing = (part.mul_(grad) for part in ctx.dense)
        del ctx.dense
        return None, by_background, by_foreground, by_phi.sum(0) if ctx.phi_of_protein else by_phi, by_mixing


class _Component(NamedTuple):
    """A negative binomial without the factorials, and its derivatives by log mean and log phi."""

    value: Tensor
    by_mean: Tensor
    by_phi: Tensor

    @classmethod
    def of(cls, y: Tensor, log_mean: Tensor, phi: Tensor, log_phi: Tensor) -> "_Component":
        log_ratio = log_mean - log_phi
        one_more = _softplus(log_ratio)
        kept = torch.sigmoid(-log_ratio)  # phi / (mean + phi)
        lost = phi * (1 - kept)
        by_mean = y * kept - lost
        return cls(y * (log_ratio - one_more) - phi * one_more, by_mean, lost - phi * one_more - y * kept)
