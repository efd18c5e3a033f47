"""Tools: verbs that train a model or ask it, and write what they learn into slots."""

from .attributions import attributions
from .denoise import denoise
from .differential_expression import differential_expression
from .feature_correlation import feature_correlation
from .foreground import foreground
from .latent import latent
from .map_query import map_query
from .minify import minify
from .posterior_predictive import posterior_predictive
from .predict import predict
from .scanvi import scanvi
from .scvi import scvi
from .totalanvi import totalanvi
from .totalvi import totalvi

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
