"""The network in plain PyTorch: tensors to terms of the bound; imports torch only, and on CUDA Triton.

::

    config       sizes and options, the four presets, what is refused; a minibatch
    likelihoods  NB, ZINB, Poisson, protein mixture, divergences and draws: the definitions
    sparse       the same, special functions only at non-zero counts
    kernels      the same again, and what else takes many launches on CUDA, as Triton kernels
    kernels_latent  of them those of latent variables
    layers       linear, norm, activation, dropout, with covariates injected
    rna          RNA part
    protein      protein part: background, foreground, mixture
    labels       label part: classifier, q(u|z,c), p(z|u,c)
    vae          the parts joined; the terms of the bound, those of unmeasured proteins left out
    objective    from terms to the number that is minimised

`config.Batch` says what each tensor of a minibatch is. "The incumbent" is scvi-tools.
"""

from .config import PRESETS, Batch, Config, Entries
from .layers import Draws, Gaussian
from .objective import Weights, loss, negative_elbo
from .vae import DIVERGENCES, VAE, Terms

__all__ = [
    "DIVERGENCES",
    "PRESETS",
    "VAE",
    "Batch",
    "Config",
    "Draws",
    "Entries",
    "Gaussian",
    "Terms",
    "Weights",
    "loss",
    "negative_elbo",
]


def __dir__() -> list[str]:
    return __all__
