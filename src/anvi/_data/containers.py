"""The door in: `Source` opens a MuData or an AnnData once per call; columns found in any obs, matrices by pieces."""

import datetime
import difflib
import logging
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from mudata import MuData
from scipy import sparse

from anvi._backed import in_file
from anvi._stream import block_edges
from anvi.settings import with_bar

Data: TypeAlias = MuData | AnnData
logger = logging.getLogger("anvi")

UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))
"""What no eye sees in a text, as `str.translate` takes it out: soft hyphens, spaces without width, byte order marks."""

PIECE = 4_000_000
"""Values of a matrix that are looked at together: reading and checking must not need as much memory as the counts."""


def check_type(data: object) -> None:
    """Raise a TypeError unless `data` is a MuData or an AnnData."""
    if not isinstance(data, MuData | AnnData):
        raise TypeError(f"Expected a MuData or an AnnData, got {type(data).__name__}.")


class Source:
    """A MuData or an AnnData, opened once per call: its parts under the names that a user would write.

    Columns of obs and protein counts are read and checked once and then kept, so the object must not change meanwhile.

    Parameters
    ----------
    data
        The user's object; it is read only.
    columns
        Columns of obs for all cells that the object does not have, or has otherwise: these are the ones that count.
    """

    def __init__(self, data: Data, columns: Mapping[str, pd.Series] | None = None):
        check_type(data)
        self.data = data
        self.mods: dict[str, AnnData] = dict(data.mod) if isinstance(data, MuData) else {}
        if nested := [f"mdata['{name}']" for name, part in self.mods.items() if isinstance(part, MuData)]:
            raise TypeError(f"{nested[0]} is a MuData itself. Take what is in it: MuData({{**{nested[0]}.mod, ...}}).")
        if isinstance(data, MuData) and data.axis == 1:
            raise ValueError("This MuData shares features (axis=1); cells must be shared: MuData(mdata.mod, axis=0).")
        self.columns = dict(columns or {})
        self._kept: dict[tuple, Any] = {}

    @classmethod
    def of(cls, data: "Data | Source") -> "Source":
        """The object opened, or the source that it is already."""
        return data if isinstance(data, Source) else cls(data)

    @property
    def alone(self) -> bool:
        """Whether this is an AnnData, which has no modalities."""
        return isinstance(self.data, AnnData)

    @property
    def obs(self) -> pd.DataFrame:
        """The global obs."""
        return self.data.obs

    @property
    def obs_names(self) -> pd.Index:
        """Names of all cells."""
        return self.data.obs_names

    @property
    def parts(self) -> list[Data]:
        """The object and its modalities."""
        return [self.data, *self.mods.values()]

    def once(self, name: tuple, read: Callable) -> Any:
        """What was read under a name before, or what `read` returns now."""
        if name not in self._kept:
            self._kept[name] = read()
        return self._kept[name]

    def modality(self, name: str, argument: str) -> AnnData:
        """One modality of a MuData, or the AnnData itself."""
        if isinstance(self.data, AnnData):
            return self.data
        if name not in self.mods:
            raise KeyError(
                f"This MuData has no modality '{name}'; it has {_quoted(self.mods)}. Name the right one: {argument}=..."
            )
        return self.mods[name]

    def name(self, mod: str) -> str:
        """How a user would write a modality."""
        return "data" if self.alone else f"mdata['{mod}']"

    def check_layer(self, layer: str | dict[str, str] | None, *, somewhere: bool = False) -> None:
        """Raise a KeyError if a dict of layers names a modality that is not there, or no part has a layer at all."""
        for mod in layer if isinstance(layer, dict) and not self.alone else ():
            if mod not in self.mods:
                raise KeyError(f"layer= names '{mod}', which is no modality; there are: {_quoted(self.mods)}.")
        there = {name for part in self.mods.values() or [self.data] for name in part.layers}  # type: ignore[union-attr]
        for name in filter(None, layer.values() if isinstance(layer, dict) else [layer]):
            if somewhere and name not in there:
                raise KeyError(f"layer='{name}' is nowhere; there are: {_quoted(sorted(filter(None, there)))}.")

    def column(self, key: str, argument: str, mods: tuple[str, ...]) -> pd.Series:
        """Find a column in `mdata.obs` or a modality's obs, for all cells of the object.

        Parameters
        ----------
        key
            Column name; `"rna:batch"` means the column `batch` of the modality `rna` and no other.
        argument
            The argument that named it, for messages.
        mods
            Modalities to look in, after `mdata.obs`.

        Returns
        -------
        Series indexed by `obs_names`; missing where no copy says anything.

        Raises
        ------
        KeyError
            If the column is nowhere; the message lists where it was looked for and what is there.
        ValueError
            If two copies disagree about a cell.
        """
        return self.once(("column", key, mods), lambda: self._merged(key, argument, mods))

    def text(self, key: str, argument: str, mods: tuple[str, ...]) -> pd.Series:
        """Like :meth:`column`, values as text, missing ones and "" as NaN."""

        def read() -> pd.Series:
            try:
                column = _as_text(self.column(key, argument, mods))
            except TypeError as error:
                raise TypeError(
                    f"{argument}='{key}' is no column of names: {error}. Write one name for each cell, e.g. "
                    f"joined: .map('/'.join)."
                ) from error
            return column.where(column != "", np.nan)

        return self.once(("text", key, mods), read)

    def own_column(self, key: str) -> tuple[AnnData, str] | None:
        """The modality and the column that "rna:batch" means; None if the key is no such name."""
        mod, _, rest = key.partition(":")
        return (self.mods[mod], rest) if rest and mod in self.mods and rest in self.mods[mod].obs else None

    def columns_like(self, mods: tuple[str, ...], numbers: bool) -> list[str]:
        """Names of obs columns of numbers, or of those that could be a label, a batch or a panel."""
        found = []
        for obs in self.tables(mods).values():
            for name in obs.columns:
                column = obs[name]
                if isinstance(column, pd.DataFrame) or (not numbers and pd.api.types.is_float_dtype(column.dtype)):
                    continue  # it stands twice, or is no category
                try:
                    most = len(column) * pd.api.types.is_numeric_dtype(column)
                    several = 1 < column.nunique() <= (most if numbers else max(2, min(1000, len(column) // 2)))
                except TypeError:  # of lists
                    continue
                if several and name not in found:
                    found.append(name)
        return found

    def _merged(self, key: str, argument: str, mods: tuple[str, ...]) -> pd.Series:
        """The copies of a column as one, after a check that they agree."""
        if key in self.columns:
            return self.columns[key].reindex(self.obs_names)
        own, tables, name = self.own_column(key), self.tables(mods, key), key
        if own is not None:
            tables, name = {f"mdata['{key.partition(':')[0]}'].obs": own[0].obs}, own[1]
        for table, obs in tables.items():
            if (obs.columns == name).sum() > 1:
                raise ValueError(
                    f"{argument}='{key}' stands twice in {table}, as joining tables can make it. Keep the first: "
                    f"{table} = {table}.loc[:, ~{table}.columns.duplicated()]"
                )
        copies = {table: obs[name] for table, obs in tables.items() if name in obs}
        if not copies:
            names = [str(name) for obs in tables.values() for name in obs.columns]
            numbers = argument in ("continuous_covariate_keys", "size_factor_key")
            hint = did_you_mean(str(key), names, cutoff=0.5)
            searched = ["mdata.obs", *(f"mdata['{mod}'].obs" for mod in mods)] if not self.alone else ["data.obs"]
            raise KeyError(
                f"{argument}='{key}' was found in none of {', '.join(searched)}.{hint} "
                f"{'Numeric' if numbers else 'Categorical'} columns there: {_quoted(self.columns_like(mods, numbers))}."
            )
        (first, merged), *others = copies.items()
        for second, column in others:
            shared = merged.index.intersection(column.index)
            differ = _differ(merged.loc[shared], column.loc[shared])
            if differ.any():
                cell = shared[differ][0]
                raise ValueError(
                    f"{argument}='{key}' has two copies that disagree in {differ.sum()} cells: cell '{cell}' is "
                    f"{merged[cell]!r} in {first} and {column[cell]!r} in {second}. "
                    f"Delete the wrong one (del {first}['{name}'], del {second}['{name}']), or name the one that you "
                    f"mean, where {argument}= is an argument: {argument}='{mods[0]}:{key}'."
                )
            merged = _whole(merged).astype(object).combine_first(_whole(column).astype(object))
        return merged.reindex(self.obs_names)

    def tables(self, mods: tuple[str, ...], key: str | None = None) -> dict[str, pd.DataFrame]:
        """The obs of the object and of some modalities, by name; without copies of a global column that anvi made."""
        if self.alone:
            return {"data.obs": self.obs}
        parts = {
            m: self.mods[m] for m in mods if m in self.mods and not (key in self.obs and pushed(self.mods[m], key))
        }
        return {"mdata.obs": self.obs} | {f"mdata['{m}'].obs": part.obs for m, part in parts.items()}


def pushed(part: AnnData, key: str) -> bool:
    """Whether a column of a modality is a copy that a ranking needed there; the user's own may have changed since."""
    told = [value["params"] for value in part.uns.values() if isinstance(value, Mapping) and "params" in value]
    return any(
        isinstance(one, Mapping) and bool(one.get("pushed", False)) and str(one.get("groupby")) == key for one in told
    )


def no_obsm_beside(source: Source, prot_obsm: str | None) -> None:
    """Raise a ValueError if `prot_obsm` names a table for an object whose proteins are a modality."""
    if prot_obsm is not None and not source.alone:
        raise ValueError(
            f"prot_obsm='{prot_obsm}' is for an AnnData; the proteins of a MuData are a modality: prot_mod=, one of "
            f"{_quoted(source.mods)}."
        )


def layer_of(layer: str | dict[str, str] | None, mod: str) -> str | None:
    """The layer that `layer` means for one modality; None is `.X`."""
    return layer.get(mod) if isinstance(layer, dict) else layer


def positions(wanted: pd.Index, names: pd.Index) -> tuple[np.ndarray, np.ndarray]:
    """Column of each wanted name, -1 for none; and whether several columns carry it."""
    repeated = names.duplicated(keep=False) | (names == "")
    unique = names[~repeated]
    at = unique.get_indexer(wanted)
    column = np.where(at >= 0, np.flatnonzero(~repeated)[at], -1) if len(unique) else np.full(len(wanted), -1)
    return column, wanted.isin(names[repeated & (names != "")])


CHECKED = 1_000_000
"""Values that are compared at a time."""


def lazy(matrix: object) -> bool:
    """Whether a matrix is read from a file, or computed by dask, when it is asked for."""
    return in_file(matrix) or hasattr(matrix, "dask")


def in_memory(counts):
    """A matrix of counts, read if it lies in a file, computed if it is dask's."""
    if hasattr(counts, "dask"):
        return counts.compute()
    if not in_file(counts):
        return counts
    return counts.to_memory() if hasattr(counts, "to_memory") else np.asarray(counts[:])


def by_rows(counts, where: str) -> Iterator[tuple[slice, Any]]:
    """All rows of stored counts, some at a time, in memory and whole; see :func:`pieces`."""
    if isinstance(counts, CSCDataset):
        logger.warning(
            f"{where} is stored by columns (CSC): slow to read, and turned in memory; better store it as CSR"
        )
        counts = _turned(counts, where)
    elif sparse.issparse(counts) and counts.format != "csr":
        counts = counts.tocsr()
    for rows, piece in pieces(counts, where):
        yield rows, whole(piece, where)


def pieces(matrix, where: str) -> Iterator[tuple[slice, Any]]:
    """All rows of a matrix, some at a time and in memory, in their order; with a bar where they come from a file.

    Parameters
    ----------
    matrix
        `(cells, features)`: dense, DataFrame or csr, in memory or in a file; dask's of any kind.
    where
        The slot, for messages.

    Yields
    ------
    Which rows, and these rows as they are stored.
    """
    indptr = _pointer(matrix, where)
    edges, read = _edges(matrix, indptr), row_reader(matrix, where, indptr)
    rows, n_rows = map(slice, edges[:-1].tolist(), edges[1:].tolist()), matrix.shape[0]
    parts = ((part, read(part)) for part in rows)
    bar = in_file(matrix) and n_rows > 0
    yield from with_bar(parts, n_rows, f"reading {where}", lambda one: one[0].stop - one[0].start) if bar else parts


def _edges(matrix, indptr: np.ndarray | None) -> np.ndarray:
    """Rows at which pieces of a matrix begin, and the end `(pieces + 1,)`."""
    n_rows, n_columns = matrix.shape
    if indptr is not None:
        ends = np.searchsorted(indptr, np.arange(PIECE, indptr[-1], PIECE), side="right")
    else:
        step = max(1, PIECE // max(1, n_columns))
        chunks = getattr(matrix, "chunks", None)
        if chunks is not None:  # a chunk is unpacked as a whole; dask's need not be of one size
            chunk = max(np.atleast_1d(chunks[0]))
            step = -(-step // chunk) * chunk
        ends = np.arange(step, n_rows, step)
    return np.unique([0, *np.minimum(ends, n_rows), n_rows])


def _pointer(matrix, where: str) -> np.ndarray | None:
    """The index pointer of a matrix by rows, checked; None if it is dense."""
    if not (isinstance(matrix, CSRDataset) or sparse.issparse(matrix)):
        return None
    indptr = np.asarray(matrix.group["indptr"][:]) if isinstance(matrix, CSRDataset) else matrix.indptr
    check_pointer(indptr, matrix.shape[0], where)
    return indptr


def row_reader(matrix, where: str, indptr: np.ndarray | None) -> Callable[[slice], Any]:
    """What reads rows of a matrix, as they are stored; `indptr` is its checked index pointer, None if it is dense."""

    def read(part: slice):
        if indptr is not None:
            inside = slice(int(indptr[part.start]), int(indptr[part.stop]))
            of = vars(matrix) if sparse.issparse(matrix) else matrix.group
            # views of what is in memory
            values, columns = np.asarray(of["data"][inside]), np.asarray(of["indices"][inside])
            if not len(values) == len(columns) == inside.stop - inside.start or columns.dtype.kind not in "iu":
                raise ValueError(f"{where} is corrupt: it has not the entries that its index pointer says.")
            pointer = indptr[part.start : part.stop + 1] - inside.start
            return sparse.csr_matrix((values, columns, pointer), shape=(part.stop - part.start, matrix.shape[1]))
        return matrix.iloc[part] if hasattr(matrix, "iloc") else in_memory(matrix[part])

    return read


def in_blocks(matrix, where: str, *, in_order: bool) -> tuple[np.ndarray, Callable[[slice], Any]]:
    """Rows at which blocks of a matrix in a file begin, and the end `(blocks + 1,)`; and what reads rows of it.

    What is read in its order comes in the pieces of :func:`pieces`, else in small blocks that can be shuffled.
    """
    indptr = _pointer(matrix, where)
    if in_order:
        return _edges(matrix, indptr), row_reader(matrix, where, indptr)
    chunks = (matrix if indptr is None else matrix.group["data"]).chunks or (1,)  # not in chunks: every value is one
    return block_edges(matrix.shape[0], chunks[0], indptr), row_reader(matrix, where, indptr)


def _turned(counts: CSCDataset, where: str) -> sparse.csr_matrix:
    """Counts that a file has by columns, by rows."""
    n_columns = counts.shape[1]
    indptr = np.asarray(counts.group["indptr"][:])
    check_pointer(indptr, n_columns, where)
    ends = np.searchsorted(indptr, np.arange(PIECE, indptr[-1], PIECE), side="right")
    edges = np.unique([0, *ends, n_columns]).tolist()
    parts = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        block = whole(counts[:, start:end], where).tocsr()
        parts.append(sparse.csr_matrix((compact(block.data), block.indices, block.indptr), shape=block.shape))
    return sparse.hstack(parts, format="csr")


def compact(values: np.ndarray) -> np.ndarray:
    """Values in the smallest of uint8, uint16 and float32 that holds them exactly; float32 where none does."""
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    for kind in (np.uint8, np.uint16):
        if low >= 0 and high <= np.iinfo(kind).max and (values.dtype.kind in "bu" or (values == np.rint(values)).all()):
            return values.astype(kind, copy=False)
    return values.astype(np.float32, copy=False)


def whole(counts, where: str):
    """A matrix as it came, once its parts are known to fit together: nothing indexes by it before.

    What reads a sparse matrix trusts its parts, so that those of a corrupt file would give other cells' counts, or end
    the process.

    Parameters
    ----------
    counts
        Dense, sparse or DataFrame `(cells, features)`.
    where
        The slot, for the message.

    Raises
    ------
    ValueError
        If values are no real numbers, or the parts of a sparse matrix contradict each other or its shape.
    """
    counts = counts.compute() if hasattr(counts, "dask") else counts
    if isinstance(counts, np.ma.MaskedArray):  # what is masked was not measured
        counts = np.ma.filled(counts.astype(np.float64), np.nan)
    if not sparse.issparse(counts):
        kinds = [np.asarray(counts).dtype] if not hasattr(counts, "dtypes") else [*counts.dtypes]
        for kind in {str(kind): kind for kind in kinds}.values():
            _check_kind(kind, where, "biufO")  # an array of objects may hold numbers
        return counts
    _check_kind(counts.dtype, where, "biuf")
    if counts.format not in ("csr", "csc"):  # made in memory; files have none
        return counts
    indptr, indices, values = counts.indptr, counts.indices, counts.data
    n_major, n_minor = counts.shape if counts.format == "csr" else counts.shape[::-1]
    if any(part.ndim != 1 or part.dtype not in (np.int32, np.int64) for part in (indptr, indices)):
        raise ValueError(f"{where} is corrupt: its index pointer or its indices are no row of integers.")
    check_pointer(indptr, n_major, where)
    if len(indices) != len(values) or indptr[-1] > len(values) or values.ndim != 1:
        raise ValueError(
            f"{where} is corrupt: {len(indices)} indices and {len(values)} values for {indptr[-1]} entries. "
            "Read the file again, or build the matrix anew."
        )
    used = indices[: indptr[-1]]
    for start in range(0, len(used), CHECKED):
        part = used[start : start + CHECKED]
        if part.min() < 0 or part.max() >= n_minor:
            wrong = int(part[(part < 0) | (part >= n_minor)][0])
            raise ValueError(
                f"{where} is corrupt: it has an entry at place {wrong} of {n_minor}. Read the file again, or build "
                "the matrix anew."
            )
    return counts


def _check_kind(kind, where: str, real: str) -> None:
    """Raise a ValueError unless values of a dtype, numpy's or pandas', are real numbers."""
    kind = getattr(kind, "subtype", kind)  # of pandas' sparse columns
    if getattr(kind, "kind", "O") not in real:
        raise ValueError(
            f"{where} holds values of the type {kind}, which are no counts. Convert them, e.g. .astype('float32')."
        )


def how_far(rows: slice, n: int) -> str:
    """What to say of a finding in some rows, when those behind them have not been looked at."""
    return f" among the first {rows.stop:,} cells" if rows.stop < n else ""


def check_pointer(indptr: np.ndarray, n_major: int, where: str) -> None:
    """Raise a ValueError unless the index pointer of a sparse matrix ascends from 0, once for every row and the end."""
    if len(indptr) != n_major + 1 or indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(
            f"{where} is corrupt: its index pointer has {len(indptr)} entries for {n_major} rows, or does not ascend "
            "from 0. Read the file again, or build the matrix anew."
        )


def unique_names(names: pd.Index, where: str, what: str) -> None:
    """Raise unless names are there and unique: cells and features are matched by name only."""
    if names.hasnans:
        raise ValueError(
            f"{where} has no name for {names.isna().sum()} of {len(names)} {what}s (NaN). Name them first."
        )
    repeated = names[names.duplicated()].unique()
    if len(repeated):
        remedy = f"run {where}_make_unique() first" if where.endswith("_names") else "rename them first"
        raise ValueError(
            f"{where} has {len(repeated)} repeated {what} names ({listed(map(repr, repeated), 3)}). "
            f"Names are what cells and features are matched by; {remedy}."
        )


def _differ(ours: pd.Series, theirs: pd.Series) -> np.ndarray:
    """Where both copies say something and not the same; numbers may have been stored in another precision."""
    both = ours.notna().to_numpy() & theirs.notna().to_numpy()
    if all(pd.api.types.is_numeric_dtype(column.dtype) for column in (ours, theirs)):
        one, other = (column.to_numpy(dtype=np.float64, na_value=np.nan) for column in (ours, theirs))
        return both & ~np.isclose(one, other, rtol=1e-5, atol=0)
    return both & (_as_text(ours).to_numpy() != _as_text(theirs).to_numpy())


def _whole(column: pd.Series) -> pd.Series:
    """Whole floats as integers: 1.0 is what is left of 1 where cells are missing."""
    if not pd.api.types.is_float_dtype(column.dtype):
        return column
    known = column.dropna()
    return column.astype("Int64") if ((known == known.round()) & (known.abs() < 2**53)).all() else column


def _as_text(column: pd.Series) -> pd.Series:
    """Values as text by the rule of :func:`as_name`, missing ones as NaN."""
    if column.dtype != object:  # each value once
        codes, values = pd.factorize(column)
        each = np.array([*map(as_name, values), np.nan], dtype=object)
        return pd.Series(each[codes], column.index, dtype=object, name=column.name)
    known: dict[tuple[type, object], object] = {}
    names = []
    for value in column.astype(object):
        key = (type(value), value if isinstance(value, Hashable) else id(value))
        if key not in known:
            known[key] = as_name(value)
        names.append(known[key])
    return pd.Series(names, column.index, dtype=object, name=column.name)


def as_name(value: object) -> object:
    """How a value of a column names a category, NaN if it is missing; the same however a file or a join has written it.

    1, 1.0 and "1.0" are "1"; True, "TRUE" and "true" are "True"; a day is its date; text loses blanks about it, several
    blanks of any kind are one, marks without width go, and a letter with an accent is the same in one sign or in two.

    Raises
    ------
    TypeError
        If it is a list, an array or a dict, which name nothing.
    """
    if isinstance(value, list | tuple | dict | set | np.ndarray):
        raise TypeError(f"it holds values of the type {type(value).__name__}, e.g. {value!r:.60}")
    if value is None or pd.isna(value):
        return np.nan
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, pd.Timestamp | datetime.datetime) and value == pd.Timestamp(value).normalize():
        value = pd.Timestamp(value).date()
    text = unicodedata.normalize("NFC", " ".join(str(value).translate(UNSEEN).split()))
    if _WHOLE.fullmatch(text):
        text = text.partition(".")[0]
        return "0" if text == "-0" else text
    return text.capitalize() if text.lower() in ("true", "false") else text


_WHOLE = re.compile(r"-?\d+\.0*")


def as_names(asked: object) -> list[str]:
    """One name or several, as text."""
    return [str(as_name(name)) for name in ([asked] if np.isscalar(asked) else asked)]  # type: ignore[attr-defined]


def codes_of(categories: Iterable[str], column: pd.Series) -> np.ndarray:
    """Position of each value of a text column among the categories of a model, -1 for none."""
    known = pd.Index(categories, dtype=object)
    plain = pd.Index([as_name(name) for name in known], dtype=object)  # earlier models have "1.0"
    return (plain if plain.is_unique else known).get_indexer(column)


def listed(names: Iterable[object], most: int = 8) -> str:
    """The first of some names, and dots where there are more."""
    names = list(names)
    return ", ".join(map(str, names[:most])) + ", ..." * (len(names) > most)


def _quoted(names: Iterable[str]) -> str:
    """Names of modalities or columns in quotes."""
    return listed((f"'{name}'" for name in names), 12) or "none"


def check_natural(number: int, argument: str) -> None:
    """Raise a ValueError unless something is a whole number above 0."""
    if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{argument}={number!r} must be a whole number, at least 1.")


def did_you_mean(name: str, there: Iterable[str], cutoff: float = 0.6) -> str:
    """Names that look like one that is not there, as a question behind an error; "" where none does."""
    near = difflib.get_close_matches(name, list(there), n=3, cutoff=cutoff)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def lend_rna(source: Source, setup) -> None:
    """Give a source that has proteins and nothing else an RNA modality without cells, to be asked by a joint model."""
    if setup.joint and set(source.mods) == {setup.prot_mod}:
        source.mods[setup.rna_mod] = AnnData(
            sparse.csr_matrix((0, len(setup.genes)), dtype=np.float32), var=pd.DataFrame(index=list(setup.genes))
        )


def cell_names(source: Source, rna_mod: str, prot_mod: str | None) -> pd.Index:
    """Names of all cells: those with RNA in their order, then those of `prot_mod` without; None: no such cells."""

    def read() -> pd.Index:
        names, there = source.modality(rna_mod, "rna_mod").obs_names, source.obs_names
        if not source.alone and prot_mod in source.mods:
            prot = source.mods[prot_mod].obs_names
            if not names.equals(prot) and len(prot.difference(names)):  # a million names are not sorted for nothing
                names = names.append(prot[~prot.isin(names)])
        if not names.equals(there) and len(absent := names[~names.isin(there)]):
            at = [mod for mod, row in source.data.obsmap.items() if np.all(row) and len(row) == len(there)]
            lost = "If its index was lost, and the order is as it was, give the names back"
            lost += f": mdata.obs.index = mdata['{at[0]}'].obs_names[mdata.obsmap['{at[0]}'] - 1]" if at else ""
            remedy = lost if len(there) >= len(names) else "mdata.update() adds them"
            row = f"no row for {len(absent)} of the {len(names)} cells (first: '{absent[0]}')"
            raise ValueError(f"mdata.obs has {row}. {remedy}.")
        return names

    return source.once(("cells", rna_mod, prot_mod), read)
