"""anvi: semi-supervised variational models of CITE-seq, MuData in and MuData out.

The flow, which is also the order of the files::

    MuData -> setup -> cells -> batches -> vae -> terms -> loop -> Model -> posterior -> slots -> MuData -> get, pl

`tl` holds the verbs that train and ask, `pp` looks at data before, `metrics` says how good a model is, `pl` draws,
`get` hands out what was written, `io` reads and writes models, `nn` is the network, `datasets` has data with known
truth. (Not related to the microbial platform anvi'o.)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from .settings import settings

if TYPE_CHECKING:
    from . import datasets, get, io, metrics, nn, pl, pp, tl
    from ._model import Model
    from .io import read_model, write_model

__version__ = version("anvi")
__all__ = [
    "Model",
    "__version__",
    "datasets",
    "get",
    "io",
    "metrics",
    "nn",
    "pl",
    "pp",
    "read_model",
    "settings",
    "tl",
    "write_model",
]


def __getattr__(name: str):
    """Import a room when it is first entered: `import anvi` alone loads neither torch nor mudata."""
    if name not in __all__:
        raise AttributeError(f"module 'anvi' has no attribute '{name}'")
    source = {"Model": "._model", "read_model": ".io", "write_model": ".io"}.get(name)
    if source is None:
        return import_module(f".{name}", __name__)
    return getattr(import_module(source, __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
