"""Tools: verbs that train a model or ask it, and write what they learn into slots.

::

    fits                     totalanvi, totalvi, scanvi, scvi
    _fit                     what the fits have in common: read, check, train, write
    predict                  latent space of cells; cell types, prediction sets, novelty
    denoise                  expected expression, proteins imputed; foreground
    posterior_predictive     counts as the model expects them, into memory or a store; feature_correlation
    differential_expression  genes and proteins that differ between groups
    attributions             why a class: what genes and proteins contribute
    map_query                cells of new batches on a fitted model
    minify                   the posterior of each cell in the place of its counts
    _ask                     what all that ask a fitted model have in common
"""

from .attributions import attributions
from .denoise import denoise, foreground
from .differential_expression import differential_expression
from .fits import scanvi, scvi, totalanvi, totalvi
from .map_query import map_query
from .minify import minify
from .posterior_predictive import feature_correlation, posterior_predictive
from .predict import latent, predict

__all__ = [
    "attributions",
    "denoise",
    "differential_expression",
    "feature_correlation",
    "foreground",
    "latent",
    "map_query",
    "minify",
    "posterior_predictive",
    "predict",
    "scanvi",
    "scvi",
    "totalanvi",
    "totalvi",
]


def __dir__() -> list[str]:
    return __all__
