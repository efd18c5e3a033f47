"""Models from and to files."""

from anvi._folder import read_model

from ._scvi_tools import from_scvi_tools
from ._write import write_model

__all__ = ["from_scvi_tools", "read_model", "write_model"]
