"""Plots: figures from slots only, so they work on a file that was written and read back.

::

    predictions              labels, predictions and confidence on a map
    confusion                held-out labelled cells, class by class
    calibration              whether confidence means what it says
    report                   everything about a fit on one HTML page
    history                  the course of a fit, term by term
    criticism                drawn counts beside the data
    panels                   panels x proteins
    foreground               counts of each protein, divided into background and foreground
    correlation              features that go together, side by side
    differential_expression  volcanoes, and the first features of each group
    attributions             heat maps, bars, dots, one cell
    embedding                scanpy's embedding with "rna:CD4" and "prot:CD4" together
    _figure                  what figures share: axes, colours, point sizes, coordinates
"""

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
