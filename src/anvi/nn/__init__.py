"""The network that all four models share, in plain torch; imports nothing but torch."""

from .batch import Batch, Entries
from .config import PRESETS, Config
from .layers import Draws, Gaussian
from .objective import Weights, loss, negative_elbo
from .vae import VAE, Terms

__all__ = [
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
