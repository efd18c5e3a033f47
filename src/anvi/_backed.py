"""Objects that stay in their file: opened without their matrices, and saved without reading them.

`X`, layers and `obsp` of what :func:`open_backed` opens are read when somebody asks for them, by blocks of rows; all
else is in memory. :func:`save_backed` copies those matrices as they are stored and writes all else anew, into a file
that takes its place when it is whole. Both also take what `mudata.read_h5mu(path, backed="r")` has opened.
"""

import functools
import inspect
import itertools
import logging
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import anndata
import h5py
import pandas as pd
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem, sparse_dataset, write_elem
from mudata import MuData

from ._arguments import checked
from ._files import ENDINGS, keep_modes, reading, replacing
from ._runtime import processes

logger = logging.getLogger("anvi")

TABLES = ("obs", "var", "uns", "obsm", "varm", "obsp", "varp")
"""What a part of an object holds beside its matrices; a MuData has `obsmap` and `varmap`, too."""
OF_ZARR = {".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json"}
OF_ADATA, OF_MDATA = {*TABLES, "layers", "X", "raw", *OF_ZARR}, {*TABLES, "obsmap", "varmap", "mod", "raw", *OF_ZARR}
"""What anndata, mudata and zarr put into a group of a file; all else in it is its owner's."""
Verb = TypeVar("Verb", bound=Callable)


def in_file(matrix: object) -> bool:
    """Whether a matrix lies in a file and is read when it is asked for."""
    return isinstance(matrix, CSRDataset | CSCDataset) or type(matrix).__module__.partition(".")[0] in ("h5py", "zarr")


@contextmanager
def quiet_mudata() -> Iterator[None]:
    """Let mudata make, copy or update an object without its words of columns, or a draw from the caller's `random`."""
    drawn = random.getstate()
    try:
        with warnings.catch_warnings():  # of columns that will not be pulled up in future; nothing here needs them
            warnings.filterwarnings("ignore", category=FutureWarning, module="mudata")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="mudata")  # pandas 3.1, of inplace=
            warnings.filterwarnings("ignore", message=r"From 0\.4 \.update", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Cannot join columns with the same name", category=UserWarning)
            warnings.filterwarnings("ignore", message="var_names are not unique", category=UserWarning)  # between steps
            yield
    finally:
        random.setstate(drawn)


@checked
def open_backed(path: str | Path) -> MuData | AnnData:
    """Open a `.h5mu`, `.h5ad` or `.zarr` file; matrices stay there until they are asked for.

    Parameters
    ----------
    path
        The file; it is not changed.

    Returns
    -------
    MuData or AnnData whose `X`, layers and `obsp` lie in the file; all else is in memory. Every verb takes it.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or it does not end as one with an object does.
    OSError, ValueError
        If it cannot be read, or is of another kind than its name says.

    Examples
    --------
    >>> import anvi as av
    >>> av.datasets.synthetic_cite(300, n_genes=60).write("counts.h5mu")  # doctest: +SKIP
    >>> mdata = av.io.open_backed("counts.h5mu")  # doctest: +SKIP
    >>> av.tl.totalanvi(mdata, batch_key="batch")  # doctest: +SKIP
    >>> av.io.save_backed(mdata, "fitted.h5mu")  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    if path.suffix not in ENDINGS or not path.exists():
        raise FileNotFoundError(f"There is no {' or '.join(ENDINGS)} file {path}.")
    if path.is_dir() and path.suffix != ".zarr":
        raise ValueError(f"{path} is a folder: rename it to end in .zarr, if it is one of zarr.")
    if not path.is_dir() and path.suffix == ".zarr":
        raise ValueError(
            f"{path} is a file, and a .zarr is a folder: rename it to end in .h5mu or .h5ad, if it is one."
        )
    with reading(path):
        if path.suffix == ".zarr":
            import zarr

            return _whole(zarr.open_group(str(path), mode="r"), path)
        with ExitStack() as opened:  # what is refused is closed: nobody could write it while the error is kept
            data = _whole(opened.enter_context(h5py.File(path, "r")), path)
            opened.pop_all()
            return data


def _whole(root, path: Path) -> MuData | AnnData:
    """The object of an open file."""
    kind = root.attrs.get("encoding-type")
    several = kind == "MuData" or ("mod" in root and kind != "anndata")
    alone = not several and {"obs", "var"} <= set(root)
    if (path.suffix == ".h5ad" and several) or (path.suffix == ".h5mu" and alone):
        what, ending = ("a MuData", ".h5mu") if several else ("an AnnData", ".h5ad")
        raise ValueError(f"{path} holds {what}: rename it to {path.with_suffix(ending).name}")
    if "mod" not in root and (several or path.suffix == ".h5mu"):
        raise ValueError("it has no modality")
    if not several:
        return _modality(root) if "encoding-type" in root.attrs else anndata.read_h5ad(path)
    names = list(root["mod"].attrs.get("mod-order", root["mod"]))
    others = {
        name: _elements(root[name]) if name == "obsp" else read_elem(root[name])
        for name in (*TABLES, "obsmap", "varmap")
        if name in root
    }
    mods = {name: _modality(root["mod"][name], others["obs"].index) for name in names}
    with quiet_mudata():
        return MuData(mods, axis=int(root.attrs.get("axis", 0)), **others)


def _modality(group, cells: pd.Index | None = None) -> AnnData:
    """A modality; where it has just the cells of the object, their names are kept once."""
    own = {name: read_elem(group[name]) for name in TABLES if name in group and name != "obsp"}
    if cells is not None and own["obs"].index.equals(cells):
        own["obs"].index = cells
    lazily = {name: _elements(group[name]) for name in ("layers", "obsp") if name in group}
    no_x = "X" not in group or group["X"].attrs.get("encoding-type") == "null"  # which mudata writes
    return AnnData(None if no_x else _matrix(group["X"]), **own, **lazily)


def _elements(group) -> dict:
    return {name: _matrix(group[name]) for name in group}


def _matrix(element):
    """A dataset as it is, a sparse matrix as one whose parts are read when they are needed."""
    return element if hasattr(element, "shape") else sparse_dataset(element)


@checked
def save_backed(data: MuData | AnnData, path: str | Path | None = None) -> None:
    """Write an object whose matrices lie in a file, without reading them; the file is whole or not there at all.

    Parameters
    ----------
    data
        Opened by :func:`open_backed`, or with `backed="r"`.
    path
        File to write, of the kind of the one that the matrices lie in; None: that one itself.

    Returns
    -------
    None.

    Raises
    ------
    ValueError
        If no matrix of the object lies in a file, or in one of another kind.
    OSError
        If it cannot be written.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.io.open_backed("fitted.h5mu")  # doctest: +SKIP
    >>> av.tl.foreground(mdata)  # doctest: +SKIP
    >>> av.io.save_backed(mdata)  # the same file, with the answer in it  # doctest: +SKIP
    """
    lying = _lying(data)
    # text of pandas 3, as a file may have brought it: under pandas 2 anndata writes it only with leave
    leave = anndata.settings.override(allow_write_nullable_strings=True) if pd.__version__[0] == "2" else nullcontext()
    if not lying and path is None:
        raise ValueError("No matrix of this object lies in a file: name the one to write, path=...")
    if not lying:
        with leave, replacing(Path(path), Path(path).suffix) as part:
            data.write_zarr(part) if Path(path).suffix == ".zarr" else data.write(part)
        return
    at_home, old = _home(lying[0])
    path = at_home if path is None else Path(path).expanduser()
    if path.suffix != at_home.suffix:
        raise ValueError(f"{path} must end in {at_home.suffix}, as {at_home}: matrices are copied as they are stored.")
    with leave, replacing(path, path.suffix) as part:
        if isinstance(old, h5py.File):
            header = old.userblock_size  # by which mudata knows its files
            with h5py.File(part, "w", userblock_size=header) as new:
                _write(data, old, new)
            with at_home.open("rb") as before, part.open("r+b") as file:
                file.write(before.read(header))
        else:
            import zarr

            form = {"zarr_format": old.metadata.zarr_format} if hasattr(old, "metadata") else {}  # zarr 2 has one
            _write(data, old, zarr.open_group(str(part), mode="a", **form))


def _parts(data: MuData | AnnData) -> dict[str, Any]:
    """The object under "", and its modalities under the names of their groups."""
    return {"": data} | {f"mod/{name}": part for name, part in getattr(data, "mod", {}).items()}


def lies_in_file(data: MuData | AnnData) -> bool:
    """Whether a matrix of an object lies in a file."""
    return bool(_lying(data))


def in_zarr(data: MuData | AnnData) -> bool:
    """Whether that file is zarr's."""
    return any(_home(matrix)[0].suffix == ".zarr" for matrix in _lying(data))


def _lying(data: MuData | AnnData) -> list:
    """The matrices of an object that lie in a file."""
    return [one for part in _parts(data).values() for one in (part.X, *(part.layers or {}).values()) if in_file(one)]


def name_of_file(matrix) -> str:
    """The file that a matrix lies in, for messages."""
    element = getattr(matrix, "group", matrix)
    if hasattr(element, "file"):
        return str(element.file.filename)
    return str(getattr(element.store, "root", getattr(element.store, "path", element.store)))


def _home(matrix) -> tuple[Path, Any]:
    """The file that a matrix lies in, and its root."""
    element = getattr(matrix, "group", matrix)
    if hasattr(element, "file"):
        return Path(element.file.filename), element.file
    import zarr

    return _folder(element.store), zarr.open_group(element.store, mode="r")


def _folder(store) -> Path:
    """The folder of a store of zarr, which zarr 2 calls its path."""
    return Path(store.root if hasattr(store, "root") else store.path)


def _write(data: MuData | AnnData, old, new) -> None:
    """Write all parts: what lies in a file as it lies there, all else anew."""
    pulled = {
        f"{name.removeprefix('mod/')}:{column}"
        for name in _parts(data)
        if name and name in old
        for column in old[name]["obs"].attrs["column-order"]
    }
    if hasattr(data, "mod"):  # columns that mudata repeats by itself
        pulled -= set(old["obs"].attrs["column-order"])
    for name, part in _parts(data).items():
        group = new.require_group(name) if name else new
        for table in (*TABLES, "obsmap", "varmap", "layers"):
            value = getattr(part, table, None)
            if isinstance(value, pd.DataFrame):
                frame = value.drop(columns=pulled & set(value)).copy()
                part.strings_to_categoricals(frame)  # in place
                write_elem(group, table, frame)
            elif value is not None:
                stored = {key: item for key, item in value.items() if key and in_file(item)}  # None: X of anndata 0.13
                write_elem(group, table, {key: item for key, item in value.items() if key and key not in stored})
                for key, item in stored.items():
                    _copy(item, group[table], key)
        if in_file(part.X):
            _copy(part.X, group, "X")
        elif part.X is not None:
            write_elem(group, "X", part.X)
        if (raw := f"{name}/raw".lstrip("/")) in old:
            _copy(old[raw], group, "raw")
        if not name or name in old:
            before = old[name] if name else old
            group.attrs.update(dict(before.attrs))
            _keep_own(before, group, OF_MDATA if hasattr(part, "mod") else OF_ADATA)
    if hasattr(data, "mod"):
        new["mod"].attrs["mod-order"] = list(data.mod)


def _keep_own(old, new, others: set[str]) -> None:
    """Copy what lies in a group beside what anndata and mudata put there: groups, arrays, links; in zarr also files."""
    if isinstance(old, h5py.Group):
        for name in old.keys() - others:
            link = old.get(name, getlink=True)
            if isinstance(link, h5py.HardLink):
                new.copy(old[name], new, name)
            else:  # wherever it points
                new[name] = link
        return
    here, there = (_folder(group.store) / group.path for group in (old, new))
    for entry in [entry for entry in here.iterdir() if entry.name not in others]:
        if entry.is_dir():
            shutil.copytree(entry, there / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, there / entry.name, follow_symlinks=False)


def _copy(matrix, group, name: str) -> None:
    """Copy a matrix as it is stored, compressed or not."""
    element = getattr(matrix, "group", matrix)
    if hasattr(element, "file"):
        group.copy(element, group, name)
    else:
        shutil.copytree(_folder(element.store) / element.path, _folder(group.store) / group.path / name)


def on_file(verb: Verb, *, saves: bool = True, together: bool = False) -> Verb:
    """Let a verb take the path of a file: it is opened, and what the verb has written is saved into it.

    Where several processes answer `together`, as in a fit, the first one saves.
    """
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def opened(*args, **kwargs):
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:  # of which Python says more
            return verb(*args, **kwargs)
        name, path = next(iter(given.arguments.items()))
        if not isinstance(path, str | Path):
            return verb(*args, **kwargs)
        path = Path(path).expanduser()
        data, opened_as = open_backed(path), _stamp(path)
        given.arguments[name] = data
        copy = given.arguments.get("copy", False)
        if copy:  # of what is in memory: the file stays as it is
            given.arguments["copy"] = False
        answer = None
        try:
            answer = verb(*given.args, **given.kwargs)
            if answer is None and saves and not copy and not (together and processes()[0]):
                place = path if _stamp(path) == opened_as else _beside(path)
                save_backed(data, place)
                if place != path:
                    keep_modes(path, place)
        finally:
            if not copy and answer is not data and path.suffix != ".zarr":  # whoever wrote it may write it again
                for matrix in _lying(data):
                    if isinstance(root := _home(matrix)[1], h5py.File):
                        root.close()
                        break
        return data if copy else answer

    return checked(opened)  # type: ignore[return-value]


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells whether a file was written since."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is gone, though it was there when this call began: its answers are not saved. Put it back and "
            "make the same call again; a fit with checkpoint= is not trained anew."
        )
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _beside(path: Path) -> Path:
    """Where answers go if somebody else has written the file meanwhile: both are kept."""
    names = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(1))
    free = next(one for one in names if not one.exists())
    logger.warning(f"{path} was written by something else while this ran: the answers are in {free}")
    return free


on_file_to_look_at = functools.partial(on_file, saves=False)
on_file_together = functools.partial(on_file, together=True)
