"""The numbers and gradients of `likelihoods.py` summed per cell, special functions only where a count is not zero.

About nine in ten RNA counts are zero, and there the log-gamma terms of a negative binomial cancel. What is left for
every entry is one exponential and one logarithm; the backward pass is written out, in place. Source: spec 2.1, 2.2.
Tests hold each function to its definition in value and gradient.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, softplus

from .batch import Entries


def nb(entries: Entries, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """Log-probability of each cell's counts under negative binomials, summed over genes.

    Parameters
    ----------
    entries
        All non-zero counts.
    log_mean
        `(cells, genes)`.
    log_theta
        Log inverse dispersion `(genes,)` or `(cells, genes)`.

    Returns
    -------
    `(cells,)`, in nats.
    """
    return _NB.apply(*entries, log_mean, log_theta)


def zinb(entries: Entries, log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor) -> Tensor:
    """Like :func:`nb`, with sigmoid(zero_logits) `(cells, genes)` of the draws replaced by zero."""
    return _ZINB.apply(*entries, log_mean, log_theta, zero_logits)


def poisson(entries: Entries, log_mean: Tensor) -> Tensor:
    """Log-probability of each cell's counts under Poissons, summed over genes `(cells,)`."""
    row, column, count = entries
    at_entries = count * log_mean[row, column] - torch.lgamma(count + 1)
    return _per_cell(at_entries, row, len(log_mean)) - log_mean.exp().sum(-1)


def _per_cell(values: Tensor, row: Tensor, cells: int) -> Tensor:
    return values.new_zeros(cells).index_add_(0, row, values)


def _at(theta: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Per-gene or per-entry values at the non-zero counts."""
    return theta[column] if theta.dim() == 1 else theta[row, column]


def _add_at(dense: Tensor, row: Tensor, column: Tensor, values: Tensor) -> Tensor:
    """Add values at the non-zero counts, in place."""
    position = row * dense.shape[1] + column
    return dense.view(-1).index_add_(0, position, values).view_as(dense)


def _count_terms(row, column, count, log_mean: Tensor, log_sum: Tensor, theta: Tensor) -> Tensor:
    """X (log mean - log(mean + theta)) + log Gamma(x + theta) - log Gamma(theta) - log Gamma(x + 1), where x > 0."""
    gammas = torch.lgamma(count + _at(theta, row, column)) - _at(torch.lgamma(theta), row, column)
    return count * (log_mean[row, column] - log_sum[row, column]) + gammas - torch.lgamma(count + 1)


def _theta_at_entries(row, column, count, theta: Tensor, inverse: Tensor) -> Tensor:
    """Derivative of the count terms with respect to theta, where x > 0."""
    digammas = torch.digamma(count + _at(theta, row, column)) - _at(torch.digamma(theta), row, column)
    return digammas - count * inverse[row, column]


class _NB(Function):
    @staticmethod
    def forward(ctx, row, column, count, log_mean: Tensor, log_theta: Tensor) -> Tensor:
        theta = log_theta.exp()
        total = log_mean.exp().add_(theta)  # mean + theta (cells, genes)
        log_sum = total.log()
        out = _per_cell(_count_terms(row, column, count, log_mean, log_sum, theta), row, len(log_mean))
        # what every entry has, zero or not: theta (log theta - log(mean + theta))
        if theta.dim() == 1:
            out += torch.dot(theta, log_theta) - log_sum @ theta
        else:
            out += (theta * (log_theta - log_sum)).sum(-1)
        ctx.save_for_backward(row, column, count, log_theta, theta, total, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (cells,)
        row, column, count, log_theta, theta, total, log_sum = ctx.saved_tensors
        inverse = total.reciprocal()
        ratio = inverse * theta  # theta / (mean + theta)
        grad_log_mean = grad_log_theta = None
        if ctx.needs_input_grad[4]:
            at_entries = _theta_at_entries(row, column, count, theta, inverse) * grad[row]
            if theta.dim() == 1:
                dense = (log_theta + 1) * grad.sum() - grad @ log_sum - grad @ ratio
                grad_log_theta = dense.index_add_(0, column, at_entries).mul_(theta)
            else:
                dense = (log_theta + 1 - log_sum).sub_(ratio).mul_(grad[:, None])
                grad_log_theta = _add_at(dense, row, column, at_entries).mul_(theta)
        if ctx.needs_input_grad[3]:
            # theta (x - mean) / (mean + theta) = ratio (x + theta) - theta
            dense = (ratio - 1).mul_(theta)
            grad_log_mean = _add_at(dense, row, column, count * ratio[row, column]).mul_(grad[:, None])
        return None, None, None, grad_log_mean, grad_log_theta


class _ZINB(Function):
    @staticmethod
    def forward(ctx, row, column, count, log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor) -> Tensor:
        theta = log_theta.exp()
        total = log_mean.exp().add_(theta)
        log_sum = total.log()
        # log NB(0) relative to the log odds of an extra zero
        t = (log_theta - log_sum).mul_(theta).sub_(zero_logits)
        present = (count > 0).to(t.dtype)
        terms = _count_terms(row, column, count, log_mean, log_sum, theta)
        at_entries = present * (terms + logsigmoid(t[row, column]))
        out = (softplus(t) - softplus(-zero_logits)).sum(-1) + _per_cell(at_entries, row, len(log_mean))
        ctx.save_for_backward(row, column, count, present, log_theta, theta, total, log_sum, t, zero_logits)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (cells,)
        row, column, count, present, log_theta, theta, total, log_sum, t, zero_logits = ctx.saved_tensors
        inverse = total.reciprocal()
        ratio = inverse * theta
        # share of the zeros that the negative binomial explains; 1 where a count is there
        weight = _add_at(t.sigmoid(), row, column, present * torch.sigmoid(-t[row, column]))
        grad_log_mean = grad_log_theta = grad_zero = None
        if ctx.needs_input_grad[4]:
            dense = (log_theta + 1 - log_sum).sub_(ratio).mul_(weight)
            _add_at(dense, row, column, _theta_at_entries(row, column, count, theta, inverse)).mul_(theta)
            grad_log_theta = grad @ dense if theta.dim() == 1 else dense.mul_(grad[:, None])
        if ctx.needs_input_grad[5]:
            grad_zero = torch.sigmoid(-zero_logits).sub_(weight).mul_(grad[:, None])
        if ctx.needs_input_grad[3]:
            dense = (ratio - 1).mul_(theta).mul_(weight)
            grad_log_mean = _add_at(dense, row, column, count * ratio[row, column]).mul_(grad[:, None])
        return None, None, None, grad_log_mean, grad_log_theta, grad_zero
