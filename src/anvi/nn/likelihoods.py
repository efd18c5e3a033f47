"""The likelihoods and divergences, as one would write them on paper; `sparse.py` holds the fast twins.

Everything is element by element and in log space: a mean enters as its logarithm, so no small constant is needed
inside a logarithm. Sums over features and masks are the caller's. Source: spec section 2; Lopez et al. 2018 (ZINB),
Gayoso et al. 2021 (protein mixture).
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

HALF_LOG_2PI = 0.918938533204672742


def poisson(x: Tensor, log_mean: Tensor) -> Tensor:
    """Log-probability of counts `x` under Poisson(exp(log_mean))."""
    return x * log_mean - log_mean.exp() - torch.lgamma(x + 1)


def nb(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """Log-probability of counts `x` under a negative binomial of variance mean + mean² / theta."""
    theta = log_theta.exp()
    log_sum = torch.logaddexp(log_mean, log_theta)  # log(mean + theta)
    return (
        theta * (log_theta - log_sum)
        + x * (log_mean - log_sum)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )


def zinb(x: Tensor, log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor) -> Tensor:
    """Log-probability of counts `x` when sigmoid(zero_logits) of the draws are replaced by zero."""
    kept = nb(x, log_mean, log_theta) - softplus(zero_logits)  # log of (1 - pi) NB(x)
    extra_zero = -softplus(-zero_logits)  # log of pi
    return torch.where(x > 0, kept, torch.logaddexp(extra_zero, kept))


def normal(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-density of `x` under a normal of standard deviation exp(log_scale)."""
    return -0.5 * ((x - mean) / log_scale.exp()).square() - log_scale - HALF_LOG_2PI


def nb_mixture(y: Tensor, log_background: Tensor, log_foreground: Tensor, log_phi: Tensor, mixing: Tensor) -> Tensor:
    """Log-probability of protein counts `y`: background with probability sigmoid(mixing), else foreground."""
    from_background = nb(y, log_background, log_phi) - softplus(-mixing)
    from_foreground = nb(y, log_foreground, log_phi) - softplus(mixing)
    return torch.logaddexp(from_background, from_foreground)


def log_normal_density(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Log-density of `z` under N(mean, var), `var` being a variance."""
    return -0.5 * ((z - mean).square() / var + var.log()) - HALF_LOG_2PI


def kl_standard_normal(mean: Tensor, var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)), `var` being a variance."""
    return 0.5 * (var + mean.square() - 1 - var.log())


def kl_normal(mean: Tensor, scale: Tensor, prior_mean: Tensor, prior_scale: Tensor) -> Tensor:
    """KL(N(mean, scale²) || N(prior_mean, prior_scale²)), both scales being standard deviations."""
    ratio = (scale / prior_scale).square()
    return 0.5 * (ratio + ((mean - prior_mean) / prior_scale).square() - 1 - ratio.log())


def kl_categorical(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL of two categorical distributions, given their log-probabilities along the last axis."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


MAX_RATE = 1e8
"""Rates are cut here: counts beyond it are not exact in float32 anyway."""


def sample_gamma(shape: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma of the given shape and mean; of the size of `mean`."""
    # the public gamma of torch takes its noise from the global generator
    draw = torch._standard_gamma(shape.expand_as(mean).contiguous(), generator=generator)
    return draw * (mean / shape)


def sample_poisson(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Poisson counts."""
    return torch.poisson(mean.clamp(max=MAX_RATE), generator=generator)


def sample_nb(mean: Tensor, theta: Tensor, generator: torch.Generator) -> Tensor:
    """Negative binomial counts of variance mean + mean² / theta."""
    return sample_poisson(sample_gamma(theta, mean, generator), generator)


def sample_bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:
    """True with the given probabilities."""
    return torch.rand(probability.shape, generator=generator, device=probability.device) < probability


def sample_zinb(mean: Tensor, theta: Tensor, zero_logits: Tensor, generator: torch.Generator) -> Tensor:
    """Negative binomial counts of which sigmoid(zero_logits) are replaced by zero."""
    counts = sample_nb(mean, theta, generator)
    return counts.masked_fill_(sample_bernoulli(zero_logits.sigmoid(), generator), 0)


def sample_normal(mean: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values of standard deviation `scale`."""
    return mean + scale * torch.randn(mean.shape, generator=generator, device=mean.device)
