"""Preprocessing: look at data before a fit, say which panel measured which protein, give a query a model's features.

::

    check        look at an object as a fit would
    panels       write down which panel measured which protein
    align_query  a query with exactly the features of a model
"""

from .align_query import align_query
from .check import Report, check
from .panels import panels

__all__ = ["Report", "align_query", "check", "panels"]
