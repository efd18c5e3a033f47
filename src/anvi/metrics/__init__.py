"""Metrics: how good a fitted model is, in numbers that can be compared.

::

    criticism       are drawn counts like the data? its tables and verdicts
    _ppc            its draws, gathered in one pass, their statistics, and tests between groups
    classification  are the predictions right?
    novelty         would cells of a type that nobody labelled be noticed?
    bound           elbo, marginal_likelihood, reconstruction_error
"""

from .bound import elbo, marginal_likelihood, reconstruction_error
from .classification import classification
from .criticism import criticism
from .novelty import novelty

__all__ = ["classification", "criticism", "elbo", "marginal_likelihood", "novelty", "reconstruction_error"]


def __dir__() -> list[str]:
    return __all__
