"""Models from and to files."""

from ._scvi_tools import from_scvi_tools

__all__ = ["from_scvi_tools"]
