"""Slots: the contract as a table, and the door out. Nothing else in the package writes into the user's object.

Results of a joint model go to the global slots of a MuData, those of an RNA model to its modality, with obs columns
mirrored as `rna:...`. An AnnData gets the same names in itself.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from anvi._backed import in_zarr, lies_in_file, quiet_mudata
from anvi.settings import warn

from .antibodies import renamed
from .containers import Data

logger = logging.getLogger("anvi")

# name, by the key of the model  # where (type): what lies there; docs/slots.md shows the same table
latent = "X_{}".format  # obsm (float32 array): latent space, the posterior mean
prediction = "{}_prediction".format  # obs (categorical): most probable class
confidence = "{}_confidence".format  # obs (float32): probability of the predicted class
level_prediction = "{}_prediction_{}".format  # obs (categorical): most probable group at a coarser level of the labels
level_confidence = "{}_confidence_{}".format  # obs (float32): its probability, the sum of those of its classes
level_novelty = "{}_novelty_{}".format  # obs (float32): distance to what the model knows at that level
margin = "{}_margin".format  # obs (float32): difference between the two highest probabilities
entropy = "{}_entropy".format  # obs (float32): entropy of the probabilities, from 0 (sure) to 1 (all alike)
novelty = "{}_novelty".format  # obs (float32): distance to what the model knows, 1 being far
label = "{}_label".format  # obs (categorical): the user's label where there is one, else the prediction or "Unassigned"
split = "{}_split".format  # obs (categorical): training and validation cells
proba = "{}_proba".format  # obsm (table): class probabilities
sets = "{}_sets".format  # obsm (table): prediction sets, 1 for the classes that a cell may well be
names_of = "{}_names".format  # uns (str array): exact names of the columns of a table, `{key}` being its slot
measured = "measured".format  # varm (DataFrame): which panel measured which protein; in the protein modality
batch = "{}_batch".format  # obs (categorical): batch of a mapped cell, where the query does not say it in full
panel = "{}_panel".format  # obs (categorical): panel of a mapped cell, where the query does not say it in full
covariate = "{}_covariate_{}".format  # obs (categorical): covariate of a mapped cell, where the query does not say it
denoised = "{}_denoised".format  # layers (float32 array): denoised expression, in each modality
rna_denoised = "{}_rna_denoised".format  # obsm (table): denoised genes of every cell, where some have no RNA
prot_denoised = "{}_prot_denoised".format  # obsm (table): denoised proteins of every cell, stained or not
prot_lower = "{}_prot_lower".format  # obsm (table): lower ends of the intervals of imputed proteins
prot_upper = "{}_prot_upper".format  # obsm (table): their upper ends
foreground = "{}_foreground".format  # layers (float32 array): foreground probabilities, in the protein modality
prot_foreground = "{}_prot_foreground".format  # obsm (table): foreground probabilities of every cell
correlation = "{}_correlation".format  # varp (float32 array): correlation of features
attributions = "{}_attributions".format  # varm, uns, layers (DataFrame, dict, float32 array): why a class, per modality
attributions_prot = "{}_attributions_prot".format  # uns (dict): those of the proteins of an AnnData
attributed = "{}_attributions_groups".format  # obs (categorical): groups that were explained, where no column has them
explained = "{}_explained".format  # obs (categorical): what was explained of a cell whose attributions were kept
qz_mean = "{}_qz_mean".format  # obsm (float32 array): mean of the latent posterior, before the softmax of "ln"
qz_var = "{}_qz_var".format  # obsm (float32 array): its variance
rna_view = "{}_rna_view".format  # obsm (float32 array): what proteins are imputed by, of a cell whose counts are gone
library = "{}_library".format  # obs (float32): summed RNA counts
mask_code = "{}_measured".format  # obs (categorical): which proteins were measured in a cell whose counts are gone


def of_predictions(key: str) -> tuple[str, ...]:
    """Slots of what is said of cell types, the one first that fits without labels leave alone."""
    return tuple(slot(key) for slot in (label, prediction, confidence, margin, entropy, novelty, proba))


def of_question(question: str, key: str) -> list[tuple[str, str]]:
    """Table and name of each slot that a question is answered in, by its entry in `uns[key]`."""
    return [(table, slot(key)) for table, named in ANSWERED_IN[question].items() for slot in named]


ANSWERED_IN: dict[str, dict[str, tuple[Callable[..., str], ...]]] = {
    "latent": {"obsm": (latent,)},
    "denoise": {"layers": (denoised,), "obsm": (rna_denoised, prot_denoised, prot_lower, prot_upper)},
    "foreground": {"layers": (foreground,), "obsm": (prot_foreground,)},
    "correlation": {"varp": (correlation,)},
    "posterior": {"obsm": (qz_mean, qz_var, rna_view), "obs": (library, mask_code)},
    "sets": {"obsm": (sets,)},
    "attributions": dict.fromkeys(("varm", "layers", "obsm"), (attributions,))
    | {"uns": (attributions, attributions_prot), "obs": (explained, attributed)},
}
"""Slots of answers, which a new fit removes; anvi's where `uns[key]` has the question, or there is a ranking."""
ANSWERS = ("latent", "denoise", "foreground", "correlation", "posterior", "minified", "criticism", "sets")
"""Entries that questions add to `uns[key]`; there may be no fit beside them, where the model came from elsewhere."""
LARGE = 50e6
"""Bytes of a slot above which its size is told."""
UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""What text in a file cannot have in it: it ends there, or is no text."""
LONGEST_NAME = 255
"""Bytes that the name of a folder may have, which slots, columns and fields of tables are in zarr."""
NO_COLUMNS = (".", "..", "_index")
"""Names that mean something else in HDF5, zarr or anndata."""
UNASSIGNED, UNASSIGNED_COLOR = "Unassigned", "#b3b3b3"
"""Label of a cell that lies too far from every class that the model knows, and its colour."""


def clean_key(key: str) -> str:
    """A prefix for slots: a leading `X_` is dropped, "/" and ":" are refused."""
    if not isinstance(key, str):
        raise TypeError(f"key_added={key!r:.80} must be a name, a str.")
    key = key.removeprefix("X_")
    if key != key.strip() or not key.isprintable() or not key or "/" in key or ":" in key:
        raise ValueError(
            f"key_added={key!r} must be a plain name without '/' and ':', line breaks, and blanks at its ends."
        )
    check_storable([key], "key_added", columns=True)
    return key


def check_storable(names: Iterable[str], where: str, *, columns: bool = False) -> None:
    """Raise a ValueError at a name that no file can hold, or hold as a column: it would be lost in writing."""
    for name in names:
        if UNSTORABLE.search(name) or (columns and name in NO_COLUMNS):
            raise ValueError(f"{where}: the name {name!a:.80} cannot be written to a file; rename it.")


def check_short(data: Data, names: Iterable[str], where: str) -> None:
    """Raise a ValueError at a name that is to be that of a folder, as in an object of zarr, and is too long for it."""
    for name in names if in_zarr(data) else ():
        if (n := len(column_name(name).encode())) > LONGEST_NAME:
            raise ValueError(
                f"{where}: the name '{name[:40]}...' has {n} bytes, and a .zarr, where it is to name a folder, has "
                f"room for {LONGEST_NAME}: shorten it, or use a .h5mu or .h5ad file, which has no such bound."
            )


def check_short_enough(data: Data, setup, key: str) -> None:
    """Raise a ValueError at a slot of a model, or a column of its tables, whose name is too long for a zarr."""
    part = home(data, setup)
    names = [names_of(prot_foreground(key)), *(level_confidence(key, level) for level, _ in setup.label_levels)]
    names += [] if part is data else [f"{setup.rna_mod}:{confidence(key)}"]
    check_short(data, names, f"key_added='{key:.40}'")
    if isinstance(part, AnnData):  # whose tables are DataFrames
        check_short(data, setup.classes, f"labels_key='{setup.labels_key}'")
        check_short(data, setup.proteins, "names of proteins")


def column_name(name: str) -> str:
    """A class name as a DataFrame column: files cannot hold "/" there."""
    return name.replace("/", "|")


def file_columns(names: Iterable[str]) -> list[str]:
    """Names as columns of a DataFrame that files can hold: "/" is "|" there, and no two are the same."""
    names = list(names)
    taken = {name for name in names if "/" not in name}
    found = []
    for name in names:
        column = column_name(name)
        while column != name and column in taken:
            column += "_"
        taken.add(column)
        found.append(column)
    return found


class ArrayTable(np.ndarray):
    """A table of a MuData: an array, which mudata can bring up to date, that answers code written for a DataFrame."""

    columns: pd.Index | None = None

    @classmethod
    def of(cls, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """The values with exact names of their columns; a plain array where anndata could not write more than that."""
        if not _written_as_arrays():
            return values
        made = values.view(cls)
        made.columns = pd.Index(names)
        return made

    def __array_finalize__(self, like):
        self.columns = None

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if isinstance(found, ArrayTable) and found.ndim == 2 and not isinstance(key, tuple):  # rows alone
            found.columns = self.columns
        return found

    def copy(self, order="C"):
        """Another one, with the names."""
        made = super().copy(order)
        made.columns = self.columns
        return made

    def to_numpy(self) -> np.ndarray:
        """The numbers."""
        return np.array(self)

    @property
    def values(self) -> np.ndarray:
        """The numbers."""
        return self.to_numpy()


@cache
def _written_as_arrays() -> bool:
    """Tell anndata to write such a table as the array that it is; False where its writers are kept in another way."""
    try:
        from anndata._io.specs.registry import _REGISTRY

        for (group, source, modifiers), write in list(_REGISTRY.write.items()):
            if source is np.ndarray:
                _REGISTRY.write[group, ArrayTable, modifiers] = write
        _REGISTRY.write_specs[ArrayTable] = _REGISTRY.write_specs[np.ndarray]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def table(part: Data, slot: str, known: Iterable[str] = ()) -> pd.DataFrame:
    """A table in obsm with the exact names of its columns, whether it is stored as a DataFrame or as an array.

    Parameters
    ----------
    part
        Where it lies.
    slot
        Its name in obsm.
    known
        Exact names that its columns may have, for a DataFrame of an earlier release.
    """
    stored = part.obsm[slot]
    names = exact_columns(stored, part.uns.get(names_of(slot)), known)
    if names is None:
        raise KeyError(
            f"obsm['{slot}'] is an array whose columns have no names: uns['{names_of(slot)}'] is not there, or not one "
            "for each. Ask for it anew, or put it back from the object that it came from."
        )
    return pd.DataFrame(np.array(stored), index=part.obs_names, columns=names)


def exact_columns(stored, names, known: Iterable[str] = ()) -> list[str] | None:
    """Exact names of the columns of a stored table: those beside it if they are its, else its own; None: unknown."""
    names = None if names is None else [str(name) for name in np.atleast_1d(np.asarray(names, dtype=object))]
    if not isinstance(stored, pd.DataFrame):
        return names if names is not None and len(names) == stored.shape[1] else None
    if names is not None and file_columns(names) == list(stored.columns):
        return names
    known = list(known)
    exact = dict(zip(file_columns(known), known, strict=True))
    return [exact.get(str(column), str(column)) for column in stored.columns]


def only_answers(entry) -> bool:
    """Whether an entry of `uns` holds nothing but what queries note: a fit may take its place."""
    return isinstance(entry, Mapping) and set(entry) <= set(ANSWERS)


def is_fit(entry) -> bool:
    """Whether an entry of `uns` is what a fit has written, with its model or without."""
    return isinstance(entry, Mapping) and {"params", "classes", "features"} <= set(entry)


def is_attributions(entry) -> bool:
    """Whether an entry of `uns` is the ranking of features that attributions are, as far as its parameters say."""
    return isinstance(entry, Mapping) and "baseline" in entry.get("params", ())


def _made_from(entry, key: str) -> bool:
    """Whether an entry of `uns` is a graph of neighbours in the latent space of a fit, or a ranking by its model."""
    params = entry.get("params") if isinstance(entry, Mapping) else None
    if not isinstance(params, Mapping):
        return False
    ranking = params.get("corr_method") == "posterior-fdr" and params.get("model") == key
    return ranking or params.get("use_rep") == latent(key)


def levels_of(part: Data, key: str) -> list[str]:
    """Columns of obs that a fit whose labels have several levels has for the coarser ones."""
    entry = part.uns.get(key)
    levels = list(entry["label_levels"].columns[:-1]) if is_fit(entry) and "label_levels" in entry else []
    return [slot(key, level) for level in levels for slot in (level_prediction, level_confidence, level_novelty)]


def remove(part: Data, *names: str, only: str | None = None) -> None:
    """Delete what lies under these names in a part, in any kind of slot or in one, and the names of its columns."""
    for kind, table in [("obs", part.obs), *_tables(part)]:
        gone = list(names) if only in (None, kind) else []
        gone += map(names_of, names) if kind == "uns" and only in (None, "obsm") else ()
        for name in [name for name in gone if name in table]:
            del table[name]


@contextmanager
def all_or_nothing(data: Data) -> Iterator[None]:
    """Put the object back as it was before the block if anything fails inside, an interruption included."""
    parts = [data, *data.mod.values()] if isinstance(data, MuData) else [data]
    before = [(part, part.obs.copy(deep=False), {name: dict(table) for name, table in _tables(part)}) for part in parts]
    matrices = [(part, part.X, part.raw) for part in parts if isinstance(part, AnnData) and not part.isbacked]
    try:
        yield
    except BaseException:
        for part, obs, tables in before:
            part.obs = obs
            for name, table in _tables(part):
                old = tables[name]
                if list(table) == list(old) and all(table[slot] is value for slot, value in old.items()):
                    continue
                for slot in list(table):
                    del table[slot]
                for slot, value in old.items():
                    table[slot] = value
        for part, values, raw in matrices:
            if part.X is not values:
                part.X = values
            if raw is not None and part.raw is None:
                part.raw = raw.to_adata()
        raise


def _tables(part: Data) -> list[tuple[str, MutableMapping]]:
    """Everything of a part that holds slots by name, but obs."""
    names = ["obsm", "varm", "varp", "uns"] + (["layers"] if isinstance(part, AnnData) else [])
    return [(name, getattr(part, name)) for name in names]


def write_measured(prot: AnnData, panels: pd.DataFrame) -> None:
    """Write who measured what, proteins x panels, into the protein modality."""
    prot.varm[measured()] = panels.set_axis(file_columns(map(str, panels.columns)), axis=1)
    prot.uns[names_of(measured())] = np.array(panels.columns, dtype=object)


def read_measured(prot: AnnData) -> pd.DataFrame | None:
    """Who measured what, proteins x panels, with the exact names of the panels."""
    stored = prot.varm.get(measured())
    if not isinstance(stored, pd.DataFrame):
        return stored
    return stored.set_axis(exact_columns(stored, prot.uns.get(names_of(measured()))), axis=1)


class Writer:
    """Writes results for some cells of an object into their slots and says which: `with writer(...) as out: ...`.

    If anything fails inside the block, the object is as it was before.

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
        self.in_order = self.cells.equals(home.obs_names)
        # (cells of home,)
        self.row = np.arange(len(cells)) if self.in_order else self.cells.get_indexer(home.obs_names)
        self.written: list[str] = []

    def __enter__(self) -> "Writer":
        self._guard = all_or_nothing(self.data)
        self._guard.__enter__()
        return self

    def __exit__(self, *failure) -> None:
        self._guard.__exit__(*failure)
        if failure[0] is None:
            where = "" if self.mirror is None else f" of mdata['{self.mirror}']"
            logger.info(f"written{where}: {', '.join(self.written)}")

    def clear(self, key: str) -> None:
        """Remove what an earlier fit wrote under the same key, so that nothing stale stands beside the new."""
        ours = (label(key),) if prediction(key) in self.home.obs else ()  # without predictions it is the user's own
        scores = (confidence(key), margin(key), entropy(key), novelty(key))
        self.drop_obs(*levels_of(self.home, key))
        self.drop_obs(*ours, prediction(key), *scores, split(key), library(key), mask_code(key))
        remove(self.home, latent(key), proba(key), *(f"{slot}_colors" for slot in (*ours, prediction(key))))
        mods = self.data.mod if isinstance(self.data, MuData) else {}
        for part in (self.data, *mods.values()):
            for table, slot in (place for one in ANSWERED_IN if one != "latent" for place in of_question(one, key)):
                remove(part, slot, only=table)  # `rna_denoised` of "x" has the name of `denoised` of "x_rna"
        for part in self.others:
            remove(part, *ours, prediction(key), *scores, split(key))
        self._drop_pulled(*ours, prediction(key), *scores, split(key), explained(key))
        named = {"": self.data.uns} | {f"mdata['{mod}'].": part.uns for mod, part in mods.items()}
        stale = [f"{where}uns['{name}']" for where, uns in named.items() for name in uns if _made_from(uns[name], key)]
        if stale:
            logger.warning(f"{', '.join(stale)}, and what was made of it, is of the earlier fit '{key}': make it anew")

    @property
    def others(self) -> list[AnnData]:
        """The modalities, where results lie beside them: `mdata.push_obs` copies columns there."""
        return list(self.data.mod.values()) if isinstance(self.data, MuData) and self.home is self.data else []

    @property
    def in_frames(self) -> bool:
        """Whether tables are DataFrames here."""
        return isinstance(self.home, AnnData)

    def drop_obs(self, *columns: str) -> None:
        """Remove columns, and where they are repeated, if they are there."""
        for slot in columns:
            for table, name in ((self.home, slot), (self.data, f"{self.mirror}:{slot}")):
                if name in table.obs:
                    del table.obs[name]
        self._drop_pulled(*columns)

    def _drop_pulled(self, *columns: str) -> None:
        """Remove what mudata's `update` and `pull_obs` made of copies in the modalities: it would stay as it was."""
        mods = self.data.mod if self.others else ()
        for name in {f"{mod}:{slot}" for mod in mods for slot in columns} & set(self.data.obs.columns):
            del self.data.obs[name]

    def obsm(self, slot: str, values: np.ndarray, names: Sequence[str] | None = None) -> None:
        """A float32 array, or a table of columns with these exact names; NaN for cells outside the model.

        In a MuData, a table is an array: mudata 0.3 cannot bring a DataFrame up to date. Values that have the order of
        the object are not copied.
        """
        out: np.ndarray | pd.DataFrame = values.astype(np.float32, copy=False)
        if not self.in_order:
            out = np.full((len(self.row), values.shape[1]), np.nan, dtype=np.float32)
            inside = np.flatnonzero(self.row >= 0)  # the others, at -1, are not in the model
            for rows in np.array_split(inside, -(-len(inside) // 65_536) or 1):  # all at once would be a copy
                out[rows] = values[self.row[rows]]
        if names is not None:
            self.home.uns[names_of(slot)] = np.array(names, dtype=object)
            framed = self.in_frames
            out = pd.DataFrame(out, self.home.obs_names, file_columns(names)) if framed else ArrayTable.of(out, names)
        self.home.obsm[slot] = out
        self.written.append(f"obsm['{slot}']")

    def obs(self, slot: str, values: np.ndarray | pd.Categorical) -> None:
        """A float32 or categorical column, missing for cells outside the model."""
        series = pd.Series(values, index=self.cells)
        self.home.obs[slot] = series.reindex(self.home.obs_names)
        for part in self.others:
            if slot in part.obs:  # a copy that mdata.push_obs made
                part.obs[slot] = series.reindex(part.obs_names)
        self._drop_pulled(slot)
        if self.mirror is not None:
            self.data.obs[f"{self.mirror}:{slot}"] = series.reindex(self.data.obs_names)
        self.written.append(f"obs['{slot}']")

    def column(self, slot: str, values: pd.Series) -> None:
        """A categorical column of the values of each cell by name."""
        self.obs(slot, pd.Categorical(values.reindex(self.cells)))

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
        self.written.append(self._named(mod, f"layers['{slot}']") + _size(home.layers[slot]))

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
        self.written.append(f"varp['{slot}']" + _size(self.home.varp[slot]))

    def uns(self, slot: str, value) -> None:
        """Anything that a file can hold."""
        self.home.uns[slot] = value
        self.written.append(f"uns['{slot}']")

    def params(self, key: str, question: str, values: dict | bool | None) -> None:
        """How a question was asked, beside the fit in `uns[key]`; flat or flat per modality; None: forgotten."""
        entry = dict(self.home.uns.get(key, {}))
        if values is None:
            if entry.pop(question, None) is not None:
                self.home.uns[key] = entry
            return
        self.home.uns[key] = entry | {question: values}
        self.written.append(f"uns['{key}']['{question}']")

    def _named(self, mod: str, slot: str) -> str:
        """A slot as a user would write it; those in home are named without their modality."""
        return slot if modality_of(self.data, mod) is self.home else f"mdata['{mod}'].{slot}"


def _size(values) -> str:
    """The size of what was written, where a file will feel it."""
    n_bytes = sum(part.nbytes for part in (values.data, values.indices)) if sparse.issparse(values) else values.nbytes
    return f" ({n_bytes / 1e6:,.0f} MB)" if n_bytes > LARGE else ""


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


def writer_into(part: Data, cells: np.ndarray | None = None) -> Writer:
    """The writer into a part itself, for values of all of its cells in their order, or of these."""
    return Writer(part, part, None, part.obs_names.to_numpy() if cells is None else cells)


def own(data: Data, copy: bool) -> Data:
    """The object to write to: the user's, or its copy; a view becomes an object of its own, with a warning."""
    if copy and lies_in_file(data):
        raise ValueError(
            "copy=True would read all counts of this object from its file: leave it out, or pass the path."
        )
    if copy:
        with quiet_mudata():
            return data.copy()
    if data.is_view:
        warn(
            "The object is a view: the results are in the subset, not in the object that it was cut from. "
            "Use .copy() on the subset to be explicit."
        )
        data.obs = data.obs.copy()  # assigning to a view makes it an object of its own
    for part in data.mod.values() if isinstance(data, MuData) else ():
        if part.is_view:  # MuData({"rna": rna[:, genes]}) holds one
            part.obs = part.obs.copy()
    return data


def in_modality(values: np.ndarray, cells: pd.Index, features: Sequence[str], part: AnnData) -> np.ndarray:
    """`(cells, features)` as float32 of the modality's shape; not copied if nothing moves."""
    row = cells.get_indexer(part.obs_names)
    column = pd.Index(renamed(features, part.var_names)).get_indexer(part.var_names.astype(str))
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
            found = pd.Index(renamed(names, part.mod[mod].var_names)).get_indexer(part.mod[mod].var_names.astype(str))
            known = (own >= 0) & (found[own] >= 0)
            place[known] = start + found[own[known]]
        start += len(names)
    inside = np.flatnonzero(place >= 0)
    if np.array_equal(place, np.arange(len(values))):
        return values.astype(np.float32, copy=False)
    out = np.full((len(place), len(place)), np.nan, dtype=np.float32)
    out[np.ix_(inside, inside)] = values[np.ix_(place[inside], place[inside])]
    return out
