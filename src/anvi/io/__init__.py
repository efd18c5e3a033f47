"""Models from and to files and hubs."""

from anvi._folder import read_model
from anvi._hub import data_from_hub, from_hub, push_to_hub

from ._card import model_card
from ._scvi_tools import from_scvi_tools
from ._write import write_model

__all__ = [
    "data_from_hub",
    "from_hub",
    "from_scvi_tools",
    "model_card",
    "push_to_hub",
    "read_model",
    "write_model",
]
