"""Draws from the likelihoods of `likelihoods.py`, element by element and from a generator of their own.

A negative binomial is a Poisson whose rate is gamma. Source: spec section 2.6.
"""

import torch
from torch import Tensor

MAX_RATE = 1e8
"""Rates are cut here: counts beyond it are not exact in float32 anyway."""


def gamma(shape: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma of the given shape and mean; of the size of `mean`."""
    # the public gamma of torch takes its noise from the global generator
    draw = torch._standard_gamma(shape.expand_as(mean).contiguous(), generator=generator)
    return draw * (mean / shape)


def poisson(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Poisson counts."""
    return torch.poisson(mean.clamp(max=MAX_RATE), generator=generator)


def nb(mean: Tensor, theta: Tensor, generator: torch.Generator) -> Tensor:
    """Negative binomial counts of variance mean + mean² / theta."""
    return poisson(gamma(theta, mean, generator), generator)


def bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:
    """True with the given probabilities."""
    return torch.rand(probability.shape, generator=generator, device=probability.device) < probability


def zinb(mean: Tensor, theta: Tensor, zero_logits: Tensor, generator: torch.Generator) -> Tensor:
    """Negative binomial counts of which sigmoid(zero_logits) are replaced by zero."""
    counts = nb(mean, theta, generator)
    return counts.masked_fill_(bernoulli(zero_logits.sigmoid(), generator), 0)


def normal(mean: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values of standard deviation `scale`."""
    return mean + scale * torch.randn(mean.shape, generator=generator, device=mean.device)
