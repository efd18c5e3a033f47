"""Kernels of latent variables, one each way: the heads of an encoder, samples, divergences of the protein background.

Each does in one launch what torch does in three to ten; see `kernels.py`, which hands them on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 1_024
"""Numbers that a program works on."""


def heads(both: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Mean and variance `(rows, width)` of what both heads of an encoder give side by side `(rows, 2 width)`."""
    return _Heads.apply(both, floor)


def sample(mean: Tensor, var: Tensor, noise: Tensor) -> Tensor:
    """A draw, mean + sqrt(var) * noise, all of one shape."""
    return _Sample.apply(mean, var, noise)


def kl_normal(mean: Tensor, scale: Tensor, prior_mean: Tensor, prior_scale: Tensor) -> Tensor:
    """See :func:`likelihoods.kl_normal`; all of one shape."""
    return _KLNormal.apply(mean, scale, prior_mean, prior_scale)


def _grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, BLOCK),)


@triton.jit
def _heads(both, mean, var, n, width, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, left = at < n, at + at // width * width  # (row, column) of the left half
    tl.store(mean + at, tl.load(both + left, mask=inside, other=0), mask=inside)
    tl.store(var + at, tl.exp(tl.load(both + left + width, mask=inside, other=0)) + FLOOR, mask=inside)


@triton.jit
def _heads_backward(both, by_mean, by_var, out, n, width, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, left = at < n, at + at // width * width
    tl.store(out + left, tl.load(by_mean + at, mask=inside, other=0), mask=inside)
    slope = tl.exp(tl.load(both + left + width, mask=inside, other=0))
    tl.store(out + left + width, tl.load(by_var + at, mask=inside, other=0) * slope, mask=inside)


class _Heads(Function):
    @staticmethod
    def forward(ctx, both, floor):
        both = both.contiguous()
        mean, var = (both.new_empty(*both.shape[:-1], both.shape[-1] // 2) for _ in range(2))
        if mean.numel():
            _heads[_grid(mean.numel())](both, mean, var, mean.numel(), mean.shape[-1], FLOOR=floor, BLOCK=BLOCK)
        ctx.save_for_backward(both)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, by_mean: Tensor, by_var: Tensor):
        (both,) = ctx.saved_tensors
        out, n = torch.empty_like(both), by_mean.numel()
        if n:
            parts = by_mean.contiguous(), by_var.contiguous()
            _heads_backward[_grid(n)](both, *parts, out, n, by_mean.shape[-1], BLOCK=BLOCK)
        return out, None


@triton.jit
def _sample(mean, var, noise, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    far = tl.sqrt(tl.load(var + at, mask=inside, other=1)) * tl.load(noise + at, mask=inside, other=0)
    tl.store(out + at, tl.load(mean + at, mask=inside, other=0) + far, mask=inside)


@triton.jit
def _sample_backward(grad, var, noise, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    slope = tl.load(noise + at, mask=inside, other=0) / (2 * tl.sqrt(tl.load(var + at, mask=inside, other=1)))
    tl.store(out + at, tl.load(grad + at, mask=inside, other=0) * slope, mask=inside)


class _Sample(Function):
    @staticmethod
    def forward(ctx, mean, var, noise):
        mean, var, noise = (part.contiguous() for part in (mean, var, noise))
        out = torch.empty_like(mean)
        if out.numel():
            _sample[_grid(out.numel())](mean, var, noise, out, out.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(var, noise)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        var, noise = ctx.saved_tensors
        out = torch.empty_like(var)
        if out.numel():
            _sample_backward[_grid(out.numel())](grad.contiguous(), var, noise, out, out.numel(), BLOCK=BLOCK)
        return grad, out, None


@triton.jit
def _kl_normal(mean, scale, prior_mean, prior_scale, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    unit = tl.load(prior_scale + at, mask=inside, other=1)
    ratio = tl.load(scale + at, mask=inside, other=1) / unit
    far = (tl.load(mean + at, mask=inside, other=0) - tl.load(prior_mean + at, mask=inside, other=0)) / unit
    tl.store(out + at, 0.5 * (ratio * ratio + far * far - 1 - tl.log(ratio * ratio)), mask=inside)


@triton.jit
def _kl_normal_backward(
    grad, mean, scale, prior_mean, prior_scale, by_mean, by_scale, by_prior_mean, by_prior_scale, n, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    unit, own = tl.load(prior_scale + at, mask=inside, other=1), tl.load(scale + at, mask=inside, other=1)
    ratio, above = own / unit, tl.load(grad + at, mask=inside, other=0)
    far = (tl.load(mean + at, mask=inside, other=0) - tl.load(prior_mean + at, mask=inside, other=0)) / unit
    tl.store(by_mean + at, above * far / unit, mask=inside)
    tl.store(by_prior_mean + at, -above * far / unit, mask=inside)
    tl.store(by_scale + at, above * (ratio / unit - 1 / own), mask=inside)
    tl.store(by_prior_scale + at, above * (1 - ratio * ratio - far * far) / unit, mask=inside)


class _KLNormal(Function):
    @staticmethod
    def forward(ctx, *parts):
        whole = [part.contiguous() for part in parts]
        out = torch.empty_like(whole[0])
        if out.numel():
            _kl_normal[_grid(out.numel())](*whole, out, out.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(*whole)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        parts = ctx.saved_tensors
        slopes = [torch.empty_like(part) for part in parts]
        if grad.numel():
            _kl_normal_backward[_grid(grad.numel())](grad.contiguous(), *parts, *slopes, grad.numel(), BLOCK=BLOCK)
        return tuple(slopes)
