"""Plots: figures from slots only, so they work on a file that was written and read back."""

from .attributions import attributions
from .calibration import calibration
from .confusion import confusion
from .correlation import correlation
from .criticism import criticism
from .differential_expression import differential_expression
from .embedding import embedding
from .foreground import foreground
from .history import history
from .panels import panels
from .predictions import predictions
from .report import report

__all__ = [
    "attributions",
    "calibration",
    "confusion",
    "correlation",
    "criticism",
    "differential_expression",
    "embedding",
    "foreground",
    "history",
    "panels",
    "predictions",
    "report",
]
