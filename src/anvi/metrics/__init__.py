"""Metrics: how good a fitted model is, in numbers that can be compared."""

from .bound import elbo, marginal_likelihood, reconstruction_error
from .classification import classification
from .criticism import criticism
from .novelty import novelty

__all__ = ["classification", "criticism", "elbo", "marginal_likelihood", "novelty", "reconstruction_error"]
