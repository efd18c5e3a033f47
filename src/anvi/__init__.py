"""anvi: semi-supervised variational models of CITE-seq, MuData in and MuData out.

The flow, which is also the order of the files::

    MuData -> setup -> cells -> batches -> vae -> terms -> loop -> Model -> posterior -> slots -> MuData -> get, pl

`tl` holds the verbs that train and ask, `pp` looks at data before, `pl` draws, `get` hands out what was written,
`io` reads and writes models, `nn` is the network, `datasets` has data with known truth. (Not related to the
microbial platform anvi'o.)
"""

from importlib.metadata import version

from . import datasets, get, io, nn, pl, pp, tl
from ._model import Model
from .io import read_model, write_model
from .settings import settings

__version__ = version("anvi")
__all__ = [
    "Model",
    "__version__",
    "datasets",
    "get",
    "io",
    "nn",
    "pl",
    "pp",
    "read_model",
    "settings",
    "tl",
    "write_model",
]
