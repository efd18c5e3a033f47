"""Every slot name, and the one writer for each. Nothing else in the package writes into the user's object.

Results of a joint model go to the global slots of a MuData, those of an RNA model to its modality, with obs columns
mirrored as `rna:...`. An AnnData gets the same names in itself.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from . import containers
from .containers import Data


def in_modality(values: np.ndarray, cells: pd.Index, features: Sequence[str], part: AnnData) -> np.ndarray:
    """`(cells, features)` as float32 of the modality's shape; not copied if nothing moves."""
    row = cells.get_indexer(part.obs_names)
    column = pd.Index(features).get_indexer(part.var_names.astype(str))
    if np.array_equal(row, np.arange(len(cells))) and np.array_equal(column, np.arange(len(features))):
        return values.astype(np.float32, copy=False)
    if sparse.issparse(values):
        return _csr_in_modality(values, row, column)
    out = np.full((len(row), len(column)), np.nan, dtype=np.float32)
    inside, known = np.flatnonzero(row >= 0), np.flatnonzero(column >= 0)
    for first in range(0, len(inside), 1024):  # in pieces: the values may be all that memory holds twice
        rows = inside[first : first + 1024]
        out[np.ix_(rows, known)] = values[np.ix_(row[rows], column[known])]
    return out


def _csr_in_modality(values: sparse.csr_matrix, row: np.ndarray, column: np.ndarray) -> sparse.csr_matrix:
    """A sparse matrix stays one: nothing, instead of NaN, where the modality has other cells or features."""
    wider = sparse.hstack([values, sparse.csr_matrix((values.shape[0], 1))], format="csr")  # place -1 is the last one
    longer = sparse.vstack([wider[:, column], sparse.csr_matrix((1, len(column)))], format="csr")
    return longer[row].astype(np.float32)


def in_varp(values: np.ndarray, features: Mapping[str, Sequence[str]], part: Data) -> np.ndarray:
    """`(features, features)`, one modality after the other, as float32 of the shape of the object's varp.

    An AnnData has room for the first modality's features only.
    """
    place, start = np.full(part.n_vars, -1), 0  # (features of the object,) -1: not among the values
    for mod, names in features.items():
        if isinstance(part, AnnData):
            place = pd.Index(names).get_indexer(part.var_names.astype(str))
            break
        if mod in part.mod:
            own = np.asarray(part.varmap[mod], dtype=np.int64).reshape(-1) - 1  # stored from 1; 0: of another modality
            found = pd.Index(names).get_indexer(part.mod[mod].var_names.astype(str))
            known = (own >= 0) & (found[own] >= 0)
            place[known] = start + found[own[known]]
        start += len(names)
    inside = np.flatnonzero(place >= 0)
    if np.array_equal(place, np.arange(len(values))):
        return values.astype(np.float32, copy=False)
    out = np.full((len(place), len(place)), np.nan, dtype=np.float32)
    out[np.ix_(inside, inside)] = values[np.ix_(place[inside], place[inside])]
    return out


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


def margin(key: str) -> str:
    """`obs` slot of the difference between the two highest probabilities."""
    return f"{key}_margin"


def entropy(key: str) -> str:
    """`obs` slot of the entropy of the probabilities, from 0 (sure) to 1 (all alike)."""
    return f"{key}_entropy"


def novelty(key: str) -> str:
    """`obs` slot of the distance to what the model knows, 1 being far."""
    return f"{key}_novelty"


def label(key: str) -> str:
    """`obs` slot of the user's label where there is one, else of the predicted class or `UNASSIGNED`."""
    return f"{key}_label"


def split(key: str) -> str:
    """`obs` slot of training and validation cells."""
    return f"{key}_split"


def proba(key: str) -> str:
    """`obsm` slot of class probabilities."""
    return f"{key}_proba"


def sets(key: str) -> str:
    """`obsm` slot of prediction sets: the classes that a cell may well be."""
    return f"{key}_sets"


def measured() -> str:
    """`varm` slot of the panel table."""
    return "measured"


def batch(key: str) -> str:
    """`obs` slot of the batch that a mapped cell was taken for, where the query has no column that says it in full."""
    return f"{key}_batch"


def panel(key: str) -> str:
    """`obs` slot of the panel of a mapped cell, where the query has no column that says it in full."""
    return f"{key}_panel"


def covariate(key: str, name: str) -> str:
    """`obs` slot of a covariate of a mapped cell, where the query has no column that says it in full."""
    return f"{key}_covariate_{name.replace(':', '_')}"


def denoised(key: str) -> str:
    """`layers` slot of denoised expression, in each modality."""
    return f"{key}_denoised"


def prot_denoised(key: str) -> str:
    """`obsm` slot of denoised proteins of every cell, stained or not."""
    return f"{key}_prot_denoised"


def foreground(key: str) -> str:
    """`layers` slot of foreground probabilities, in the protein modality."""
    return f"{key}_foreground"


def prot_foreground(key: str) -> str:
    """`obsm` slot of the foreground probabilities of every cell, stained or not."""
    return f"{key}_prot_foreground"


def correlation(key: str) -> str:
    """`varp` slot of the correlation of features."""
    return f"{key}_correlation"


def attributions(key: str) -> str:
    """`varm`, `uns` and `layers` slot of attributions, in each modality."""
    return f"{key}_attributions"


def explained(key: str) -> str:
    """`obs` slot, in each modality, of what was explained of a cell whose own attributions were kept."""
    return f"{key}_explained"


def qz_mean(key: str) -> str:
    """`obsm` slot of the posterior mean of the latent vector, before the softmax of a logistic-normal one."""
    return f"{key}_qz_mean"


def qz_var(key: str) -> str:
    """`obsm` slot of its variance."""
    return f"{key}_qz_var"


def library(key: str) -> str:
    """`obs` slot of the summed RNA counts."""
    return f"{key}_library"


def mask_code(key: str) -> str:
    """`obs` slot of the code that tells which proteins were measured in a cell whose counts are gone."""
    return f"{key}_measured"


_RESULTS = ("denoised", "prot_denoised", "foreground", "prot_foreground", "correlation", "qz_mean", "qz_var")
_RESULTS += ("attributions", "attributions_prot", "explained")
"""What queries write as `{key}_{result}` into obsm, layers, varm or varp; a new fit under the key removes them."""
ANSWERS = ("denoise", "foreground", "correlation", "posterior", "minified", "criticism")
"""Entries that queries add to `uns[key]`; there may be no fit beside them, where the model came from elsewhere."""


UNASSIGNED = "Unassigned"
"""Label of a cell that lies too far from every class that the model knows."""


def clean_key(key: str) -> str:
    """A prefix for slots: a leading `X_` is dropped, "/" and ":" are refused."""
    key = key.removeprefix("X_")
    if not key or "/" in key or ":" in key:
        raise ValueError(f"key_added='{key}' must be a plain name without '/' and ':'.")
    return key


def column_name(name: str) -> str:
    """A class name as a DataFrame column: files cannot hold "/" there."""
    return name.replace("/", "|")


def only_answers(entry) -> bool:
    """Whether an entry of `uns` holds nothing but what queries note: a fit may take its place."""
    return isinstance(entry, Mapping) and set(entry) <= set(ANSWERS)


def is_fit(entry) -> bool:
    """Whether an entry of `uns` is what a fit has written, with its model or without."""
    return isinstance(entry, Mapping) and {"params", "classes", "features"} <= set(entry)


def remove(part: Data, *names: str) -> None:
    """Delete what lies under these names in a part, in whatever kind of slot."""
    tables = [part.obs, part.obsm, part.varm, part.varp, part.uns]
    tables += [part.layers] if isinstance(part, AnnData) else []
    for table, name in itertools.product(tables, names):
        if name in table:
            del table[name]


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
        ours = (label(key),) if prediction(key) in self.home.obs else ()  # without predictions it is the user's own
        scores = (confidence(key), margin(key), entropy(key), novelty(key))
        self.drop_obs(*ours, prediction(key), *scores, split(key), library(key), mask_code(key))
        own_sets = (sets(key),) if ours else ()
        remove(self.home, latent(key), proba(key), *own_sets, *(f"{slot}_colors" for slot in (*ours, prediction(key))))
        for part in (self.data, *(self.data.mod.values() if isinstance(self.data, MuData) else ())):
            pushed = [prediction(key)] if self.home is self.data is not part else []
            remove(part, *(f"{key}_{result}" for result in _RESULTS), *pushed)

    def drop_obs(self, *columns: str) -> None:
        """Remove columns, and where they are repeated, if they are there."""
        for slot in columns:
            for table, name in ((self.home, slot), (self.data, f"{self.mirror}:{slot}")):
                if name in table.obs:
                    del table.obs[name]

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

    @contextmanager
    def columns(self, columns: Mapping[str, pd.Series]) -> Iterator[None]:
        """Categorical columns that are there inside the block, and stay unless it fails."""
        before = [(part, part.obs.copy()) for part in (self.home, *([] if self.mirror is None else [self.data]))]
        for slot, column in columns.items():
            self.obs(slot, pd.Categorical(column.reindex(self.cells)))
        try:
            yield
        except BaseException:
            for part, obs in before:
                part.obs = obs
            raise

    def layer(self, mod: str, slot: str, values: np.ndarray, features: Sequence[str]) -> None:
        """Float32 array of a modality's shape, NaN for its cells and features that are not among the values.

        Parameters
        ----------
        mod
            The modality; an AnnData is its own only one.
        slot
            Name of the layer.
        values
            `(cells, features)`, cells in the order of the writer.
        features
            Names of the features, in the order of the values.
        """
        home = modality_of(self.data, mod)
        home.layers[slot] = in_modality(values, self.cells, features, home)
        self.written.append(self._named(mod, f"layers['{slot}']"))

    def varm(self, mod: str, slot: str, table: pd.DataFrame) -> None:
        """A DataFrame of a modality's features, missing for those that are not in its index."""
        home = modality_of(self.data, mod)
        home.varm[slot] = table.reindex(home.var_names)
        self.written.append(self._named(mod, f"varm['{slot}']"))

    def varp(self, slot: str, values: np.ndarray, features: Mapping[str, Sequence[str]]) -> None:
        """Float32 array (features, features), all modalities together, NaN for features that are not among the values.

        Parameters
        ----------
        slot
            Name in varp.
        values
            Square, features in the order of `features`, one modality after the other.
        features
            Names by modality. An AnnData has room for the first modality's only.
        """
        self.home.varp[slot] = in_varp(values, features, self.home)
        self.written.append(f"varp['{slot}']")

    def uns(self, slot: str, value) -> None:
        """Anything that a file can hold."""
        self.home.uns[slot] = value
        self.written.append(f"uns['{slot}']")

    def params(self, key: str, query: str, values: dict) -> None:
        """How a query was asked, beside the fit in `uns[key]`; values are flat, or flat per modality."""
        self.home.uns[key] = dict(self.home.uns.get(key, {})) | {query: values}
        self.written.append(f"uns['{key}']['{query}']")

    def _named(self, mod: str, slot: str) -> str:
        """A slot as a user would write it; those in home are named without their modality."""
        return slot if modality_of(self.data, mod) is self.home else f"mdata['{mod}'].{slot}"

    def log(self) -> None:
        """One line that lists what was written."""
        where = "" if self.mirror is None else f" of mdata['{self.mirror}']"
        logger.info(f"written{where}: {', '.join(self.written)}")


def home(data: Data, setup) -> Data:
    """The part of `data` that holds a model's results: itself for a joint model, the RNA modality for the others."""
    return data if setup.joint or isinstance(data, AnnData) else data.mod[setup.rna_mod]


def modality_of(data: Data, mod: str) -> AnnData:
    """A modality of the object, or the AnnData itself."""
    return data if isinstance(data, AnnData) else data.mod[mod]


def writer(data: Data, setup, cells: np.ndarray) -> Writer:
    """The writer for a model's results, values coming in the order of `cells`."""
    part = home(data, setup)
    return Writer(data, part, None if part is data else setup.rna_mod, cells)


def own(data: Data, copy: bool) -> Data:
    """The object to write to: the user's, or its copy; a view becomes an object of its own, with a warning."""
    if copy:
        return data.copy()
    if data.is_view:
        containers.warn(
            "The object is a view: the results are in the subset, not in the object that it was cut from. "
            "Use .copy() on the subset to be explicit."
        )
        data.obs = data.obs.copy()  # assigning to a view makes it an object of its own
    for part in data.mod.values() if isinstance(data, MuData) else ():
        if part.is_view:  # MuData({"rna": rna[:, genes]}) holds one
            part.obs = part.obs.copy()
    return data
