"""Every slot name, and the one writer for each. Nothing else in the package writes into the user's object.

Results of a joint model go to the global slots of a MuData, those of an RNA model to its modality, with obs columns
mirrored as `rna:...`. An AnnData gets the same names in itself.
"""

import itertools
import logging
import sys
import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from .containers import Data

logger = logging.getLogger("anvi")


def latent(key: str) -> str:
    """`obsm` slot of the latent space."""
    return f"X_{key}"


def prediction(key: str) -> str:
    """`obs` slot of the predicted class."""
    return f"{key}_prediction"


def confidence(key: str) -> str:
    """`obs` slot of the predicted class's probability."""
    return f"{key}_confidence"


def split(key: str) -> str:
    """`obs` slot of training and validation cells."""
    return f"{key}_split"


def proba(key: str) -> str:
    """`obsm` slot of class probabilities."""
    return f"{key}_proba"


def measured() -> str:
    """`varm` slot of the panel table."""
    return "measured"


def clean_key(key: str) -> str:
    """A prefix for slots: a leading `X_` is dropped, "/" and ":" are refused."""
    key = key.removeprefix("X_")
    if not key or "/" in key or ":" in key:
        raise ValueError(f"key_added='{key}' must be a plain name without '/' and ':'.")
    return key


def column_name(name: str) -> str:
    """A class name as a DataFrame column: files cannot hold "/" there."""
    return name.replace("/", "|")


class Writer:
    """Writes results for some cells of an object into their slots and says which.

    Parameters
    ----------
    data
        MuData or AnnData that is written to.
    home
        The part that gets the results: `data` itself, or a modality.
    mirror
        Prefix under which obs columns are repeated in `data.obs`; None where home is data.
    cells
        Names of the cells, in the order in which values will come.
    """

    def __init__(self, data: Data, home: Data, mirror: str | None, cells: np.ndarray):
        self.data, self.home, self.mirror = data, home, mirror
        self.cells = pd.Index(cells)
        self.row = self.cells.get_indexer(home.obs_names)  # (cells of home,) -1: not in the model
        self.written: list[str] = []

    def clear(self, key: str) -> None:
        """Remove what an earlier fit wrote under the same key, so that nothing stale stands beside the new."""
        for slot in (prediction(key), confidence(key), split(key)):
            for table, name in ((self.home, slot), (self.data, f"{self.mirror}:{slot}")):
                if name in table.obs:
                    del table.obs[name]
        for slot in (latent(key), proba(key)):
            if slot in self.home.obsm:
                del self.home.obsm[slot]
        self.home.uns.pop(f"{prediction(key)}_colors", None)

    def obsm(self, slot: str, values: np.ndarray, columns: list[str] | None = None) -> None:
        """Float32 array or DataFrame, NaN for cells outside the model."""
        out = np.full((len(self.row), values.shape[1]), np.nan, dtype=np.float32)
        inside = self.row >= 0
        out[inside] = values[self.row[inside]]
        self.home.obsm[slot] = out if columns is None else pd.DataFrame(out, index=self.home.obs_names, columns=columns)
        self.written.append(f"obsm['{slot}']")

    def obs(self, slot: str, values: np.ndarray | pd.Categorical) -> None:
        """A float32 or categorical column, missing for cells outside the model."""
        series = pd.Series(values, index=self.cells)
        self.home.obs[slot] = series.reindex(self.home.obs_names)
        if self.mirror is not None:
            self.data.obs[f"{self.mirror}:{slot}"] = series.reindex(self.data.obs_names)
        self.written.append(f"obs['{slot}']")

    def uns(self, slot: str, value) -> None:
        """Anything that a file can hold."""
        self.home.uns[slot] = value
        self.written.append(f"uns['{slot}']")

    def log(self) -> None:
        """One line that lists what was written."""
        where = "" if self.mirror is None else f" of mdata['{self.mirror}']"
        logger.info(f"written{where}: {', '.join(self.written)}")


def home(data: Data, setup) -> Data:
    """The part of `data` that holds a model's results: itself for a joint model, the RNA modality for the others."""
    return data if setup.joint or isinstance(data, AnnData) else data.mod[setup.rna_mod]


def writer(data: Data, setup, cells: np.ndarray) -> Writer:
    """The writer for a model's results, values coming in the order of `cells`."""
    part = home(data, setup)
    return Writer(data, part, None if part is data else setup.rna_mod, cells)


def in_order_of(data: Data, setup, cells: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values in the order of the object's `obs_names`, NaN for cells outside the model."""
    return pd.DataFrame(values, index=cells).reindex(home(data, setup).obs_names).to_numpy()


def write_predictions(
    out: Writer, key: str, classes: tuple[str, ...], probabilities: np.ndarray, *, soft: bool
) -> None:
    """Predicted class, its probability and all probabilities."""
    best = probabilities.argmax(1)
    out.obs(prediction(key), pd.Categorical.from_codes(best, categories=list(classes)))
    out.obs(confidence(key), probabilities.max(1).astype(np.float32))
    if soft:
        if any("/" in name for name in classes):
            _warn(
                f"Class names with '/' are written with '|' in the columns of obsm['{proba(key)}'], since files cannot "
                f"hold '/' there; obs['{prediction(key)}'] and get.proba() have the exact names."
            )
        out.obsm(proba(key), probabilities, [column_name(name) for name in classes])
    elif proba(key) in out.home.obsm:
        del out.home.obsm[proba(key)]  # of another prediction


def copy_colors(out: Writer, labels_key: str, classes: tuple[str, ...], key: str) -> None:
    """Give a class the same colour in the predictions as in the labels, where the labels have colours."""
    parts = [out.data, *(out.data.mod.values() if isinstance(out.data, MuData) else ())]
    names = dict.fromkeys((labels_key, labels_key.partition(":")[2]))  # "rna:cell_type" may be coloured as "cell_type"
    for part, name in itertools.product(parts, names):
        colors, column = part.uns.get(f"{name}_colors"), part.obs.get(name)
        if colors is None or column is None or not isinstance(column.dtype, pd.CategoricalDtype):
            continue
        color_of = dict(zip(map(str, column.cat.categories), map(str, colors), strict=False))
        if all(name in color_of for name in classes):
            out.uns(f"{prediction(key)}_colors", [color_of[name] for name in classes])
            return


def _warn(message: str) -> None:
    """Warn, pointing at the first line outside this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("anvi."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def own(data: Data, copy: bool) -> Data:
    """The object to write to: the user's, or its copy; a view becomes an object of its own, with a warning."""
    if copy:
        return data.copy()
    if data.is_view:
        _warn(
            "The object is a view: the results are in the subset, not in the object that it was cut from. "
            "Use .copy() on the subset to be explicit."
        )
        data.obs = data.obs.copy()  # assigning to a view makes it an object of its own
    return data
