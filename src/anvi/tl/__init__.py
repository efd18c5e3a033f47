"""Tools: verbs that train a model or ask it, and write what they learn into slots."""

from .latent import latent
from .predict import predict
from .scanvi import scanvi
from .scvi import scvi
from .totalanvi import totalanvi
from .totalvi import totalvi

__all__ = ["latent", "predict", "scanvi", "scvi", "totalanvi", "totalvi"]
