"""The numbers and gradients of `likelihoods.py` summed per cell, special functions only where a count is not zero.

About nine in ten RNA counts are zero, and there the log-gamma terms of a negative binomial cancel: with
r = mean / theta, every entry has -theta log1p(r), and only a count adds more. Values and derivatives are worked out
together, in one pass over blocks of cells that stay in the processor's cache; the softmax of the gene shares is part of
it. Source: spec 2.1, 2.2, 2.5. Tests hold each function to its definition in value and gradient.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .batch import Entries

BLOCK = 65_536
"""Entries of a matrix that a thread works on at a time on a CPU, so that what belongs to them stays in its cache."""


def nb(
    entries: Entries, log_mean: Tensor, log_theta: Tensor, *, log_library: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """Log-probability of each cell's counts under negative binomials, summed over genes.

    Parameters
    ----------
    entries
        All non-zero counts.
    log_mean
        `(cells, genes)`. With `log_library`, logits whose softmax over genes, times the library, is the mean.
    log_theta
        Log inverse dispersion `(genes,)` or `(cells, genes)`.
    log_library
        Log library size `(cells, 1)`, or None where `log_mean` is the mean's logarithm.
    eps
        Added to the mean inside its logarithm, as the incumbent does.

    Returns
    -------
    `(cells,)`, in nats.
    """
    return _NegativeBinomial.apply(*entries, log_mean, log_theta, None, log_library, eps)


def zinb(
    entries: Entries,
    log_mean: Tensor,
    log_theta: Tensor,
    zero_logits: Tensor,
    *,
    log_library: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Like :func:`nb`, with sigmoid(zero_logits) `(cells, genes)` of the draws replaced by zero."""
    return _NegativeBinomial.apply(*entries, log_mean, log_theta, zero_logits, log_library, eps)


def nb_mixture(y: Tensor, log_background: Tensor, log_foreground: Tensor, log_phi: Tensor, mixing: Tensor) -> Tensor:
    """Log-probability of every protein count `(cells, proteins)`, as :func:`likelihoods.nb_mixture` defines it.

    `log_phi` is `(proteins,)` or `(cells, proteins)`, everything else `(cells, proteins)`.
    """
    return _Mixture.apply(y, log_background, log_foreground, log_phi, mixing)


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
    value.add_(n_steps + 1 - 0.918938533204672742)
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


def _softplus_difference(t: Tensor, z: Tensor) -> Tensor:
    """softplus(t) - softplus(-z), with one logarithm for both."""
    ratio = t.abs().neg_().exp_().add_(1).div_(z.abs().neg_().exp_().add_(1))
    return ratio.log_().add_(t.clamp(min=0)).sub_(z.neg().clamp_(min=0))


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Blocks of rows that fit the cache; all rows at once on an accelerator."""
    cells, genes = matrix.shape
    size = max(1, BLOCK * torch.get_num_threads() // genes) if matrix.device.type == "cpu" else max(1, cells)
    return (slice(start, start + size) for start in range(0, cells, size))


class _NegativeBinomial(Function):
    """Value and derivatives in one pass; with zero logits zero-inflated, with a log library on top of a softmax."""

    @staticmethod
    def forward(ctx, row, column, count, log_mean, log_theta, zero_logits, log_library, eps):
        flat = row * log_mean.shape[1] + column
        # by_mean: first the shares of the genes, then the derivative by the logits; or by log mean without a library
        by_mean, by_theta = torch.empty_like(log_mean), torch.empty_like(log_mean)
        by_zero = None if zero_logits is None else torch.empty_like(log_mean)
        to_log_mean = None  # what turns a cell's logits into log means
        if log_library is not None:
            to_log_mean = log_library.squeeze(1) - _softmax(log_mean, by_mean)
        at = _at_entries(Entries(row, column, count), flat, log_mean, to_log_mean, log_theta, zero_logits, eps)
        value, by_library = _per_cell(at.value, row, len(log_mean)), _per_cell(at.by_mean, row, len(log_mean))
        theta = log_theta.exp()
        for rows in _blocks(log_mean):
            part = _as_zeros(
                by_mean[rows] * log_library[rows].exp() if log_library is not None else log_mean[rows].exp(),
                theta if theta.dim() == 1 else theta[rows],
                None if zero_logits is None else zero_logits[rows],
                eps,
                by_theta[rows],
                None if by_zero is None else by_zero[rows],
            )
            value[rows] += part.value
            if log_library is None:
                by_mean[rows] = part.by_mean
            else:  # through the softmax: what a cell's genes gain together, they lose in proportion to their shares
                by_library[rows] += part.by_mean.sum(1)
                by_mean[rows].mul_(-by_library[rows, None]).add_(part.by_mean)
        by_mean.view(-1).index_add_(0, flat, at.by_mean)
        if by_zero is not None:
            by_zero.view(-1).index_add_(0, flat, at.by_zero)
        ctx.save_for_backward(row, column, flat, theta, at.by_theta)
        # the backward pass overwrites these, and is hence possible once
        ctx.dense = (by_mean, by_theta, by_zero, None if log_library is None else by_library)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (cells,)
        row, column, flat, theta, theta_at_entries = ctx.saved_tensors
        by_mean, by_theta, by_zero, by_library = ctx.dense
        del ctx.dense
        of_cell, grad_log_theta = grad[:, None], None
        if ctx.needs_input_grad[4]:
            theta_at_entries = theta_at_entries * grad[row]
            if theta.dim() == 1:
                grad_log_theta = (grad @ by_theta).mul_(theta).index_add_(0, column, theta_at_entries)
            else:
                grad_log_theta = by_theta.mul_(theta).mul_(of_cell)
                grad_log_theta.view(-1).index_add_(0, flat, theta_at_entries)
        grad_zero = None if by_zero is None else by_zero.mul_(of_cell)
        grad_library = None if by_library is None else (grad * by_library)[:, None]
        return None, None, None, by_mean.mul_(of_cell), grad_log_theta, grad_zero, grad_library, None


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Write the softmax over the last axis into `out`; return the logarithm of its denominator `(cells,)`."""
    log_total = logits.new_empty(len(logits), 1)
    for rows in _blocks(logits):
        peak = logits[rows].amax(1, keepdim=True)
        part = torch.sub(logits[rows], peak, out=out[rows]).exp_()
        total = part.sum(1, keepdim=True)
        part.mul_(total.reciprocal())
        log_total[rows] = peak + total.log_()
    return log_total.squeeze(1)


class _Part(NamedTuple):
    """What a block of entries, or the non-zero ones among them, give to the value and to its derivatives."""

    value: Tensor
    by_mean: Tensor  # by log mean
    by_theta: Tensor  # by log theta
    by_zero: Tensor | None  # by the zero logits


def _at_entries(entries: Entries, flat, log_mean, to_log_mean, log_theta, zero_logits, eps: float) -> _Part:
    """What the non-zero counts `(entries,)` have beyond what their entry has as a zero."""
    row, column, count = entries
    log_theta = log_theta[column] if log_theta.dim() == 1 else log_theta.reshape(-1)[flat]
    log_mean = log_mean.reshape(-1)[flat]
    if to_log_mean is not None:
        log_mean = log_mean + to_log_mean[row]
    chain = 1.0
    if eps:
        mean = log_mean.exp()
        log_mean, chain = (mean + eps).log(), mean / (mean + eps)
    theta, log_ratio = log_theta.exp(), log_mean - log_theta
    one_more = _softplus(log_ratio)  # log(1 + mean / theta)
    kept = torch.sigmoid(-log_ratio)  # theta / (mean + theta)
    choose, present = coefficient(count, theta), (count > 0).to(theta.dtype)
    value = present * (count * (log_ratio - one_more) + choose.value)
    by_mean, by_theta, by_zero = count * kept, choose.by_log_theta - count * kept, None
    if zero_logits is not None:
        t = -theta * one_more - zero_logits.reshape(-1)[flat]
        short = present * torch.sigmoid(-t)  # share of the zero that the extra zeros explain, and of a count not
        value = value - present * _softplus(-t)
        lost = theta * (1 - kept)
        by_mean, by_theta, by_zero = by_mean - short * lost, by_theta + short * (lost - theta * one_more), -short
    return _Part(value, by_mean * chain, by_theta, by_zero)


def _as_zeros(mean: Tensor, theta: Tensor, zero_logits: Tensor | None, eps: float, by_theta, by_zero) -> _Part:
    """What every entry of a block has as a zero; `mean` `(cells, genes)` is overwritten.

    `by_theta` (over theta) and `by_zero` are filled in place.
    """
    chain = None
    if eps:
        chain = mean / (mean + eps)
        mean.add_(eps)
    ratio = mean.div_(theta).clamp_(max=1e30)
    one_more = ratio.log1p()
    lost = ratio.div_(ratio + 1)  # mean / (mean + theta)
    torch.sub(lost, one_more, out=by_theta)
    if zero_logits is None:
        if theta.dim() == 2:
            value = one_more.mul_(theta).sum(1).neg_()
        else:
            with torch.autocast(theta.device.type, enabled=False):  # thousands of numbers do not add up in bfloat16
                value = -(one_more @ theta)
    else:
        t = one_more.mul_(theta).neg_().sub_(zero_logits)
        value = _softplus_difference(t, zero_logits).sum(1)
        explained = t.sigmoid_()  # share of the zeros that the negative binomial explains
        torch.sub(torch.sigmoid(-zero_logits), explained, out=by_zero)
        by_theta.mul_(explained)
        lost.mul_(explained)
    by_mean = lost.mul_(theta).neg_()
    return _Part(value, by_mean if chain is None else by_mean.mul_(chain), by_theta, by_zero)


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
