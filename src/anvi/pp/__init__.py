"""Preprocessing: look at data before a fit, and say which panel measured which protein."""

from .check import Report, check
from .panels import panels

__all__ = ["Report", "check", "panels"]
