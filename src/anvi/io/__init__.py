"""Models from and to files and hubs.

::

    _card        write_model and model_card: prose, facts and metrics of a model
    _scvi_tools  from_scvi_tools: a model of scvi-tools, its registry as a Setup, its weights under our names
    _model_pt    its file, read without unpickling
"""

from anvi._backed import open_backed, save_backed
from anvi._store import data_from_hub, from_hub, push_to_hub, read_model

from ._card import model_card, write_model
from ._scvi_tools import from_scvi_tools

__all__ = [
    "data_from_hub",
    "from_hub",
    "from_scvi_tools",
    "model_card",
    "open_backed",
    "push_to_hub",
    "read_model",
    "save_backed",
    "write_model",
]
