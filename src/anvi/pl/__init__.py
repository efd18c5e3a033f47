"""Plots: figures from slots only, so they work on a file that was written and read back."""

from .confusion import confusion
from .embedding import embedding
from .history import history
from .panels import panels
from .predictions import predictions

__all__ = ["confusion", "embedding", "history", "panels", "predictions"]
