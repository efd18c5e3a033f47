"""Files that anvi stores: whole whatever moment a process dies, checked when they are read, and named in every error.

A file or folder is written under a unique name beside its place, forced to the disk, and takes the place in one step.
Where the system cannot exchange two folders, the order is: the new one is called `.NAME.next`, the old one becomes
`.NAME.before`, the new one becomes NAME, the old one goes. :func:`newest` finds the newest whole one at every moment.
"""

import ctypes
import errno
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("anvi")

ENDINGS = (".h5mu", ".h5ad", ".zarr")
"""How files with an object end."""
LOCK_SECONDS = 60.0
"""How long to wait for another writer."""
STALE_SECONDS = 86_400.0
"""Age at which nobody can still be writing a temporary file."""
MAX_JSON_BYTES, MAX_JSON_NESTING, MAX_JSON_VALUES = 2**26, 64, 8_000_000
"""Bounds of JSON; a model of 60,000 genes and 1,000 panels of 300 proteins has 5 MB, 8 levels and 400,000 values."""
MAX_COMPRESSION = 1_100
"""How much smaller deflate can make what it stores, at best."""
HDF5_SECONDS = 60.0
"""Time to read an HDF5 file, and as much more as 16 MB a second take."""
SEAL = "sha256"
"""Entry of a safetensors file's metadata."""


# errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Turn whatever goes wrong while `name` is read into an OSError or a ValueError that names it and says why."""
    try:
        yield
    except OSError as error:
        raise _named(error, name, "be read") from error
    except MemoryError as error:
        raise ValueError(f"{name} cannot be read: it asks for more memory than there is.") from error
    except Exception as error:  # of libraries: whatever they raise at bytes that make no sense
        if type(error) is ValueError and str(name) in str(error):
            raise
        raise ValueError(f"{name} is damaged or no such file ({_reason(error)}).") from error


@contextmanager
def writing(name: object) -> Iterator[None]:
    """Turn whatever goes wrong while `name` is written into an OSError or a ValueError that names it and says why."""
    try:
        yield
    except OSError as error:
        raise _named(error, name, "be written") from error
    except (MemoryError, RuntimeError, SystemError, TypeError, ValueError, LookupError, AttributeError) as error:
        if type(error) is ValueError and str(name) in str(error):
            raise
        raise ValueError(f"{name} cannot be written ({_reason(error)}).") from error


def _named(error: OSError, name: object, done: str) -> OSError:
    """The same kind of error with the name in it."""
    if str(name) in str(error):
        return error
    text = f"{name} cannot {done}: {error.strerror or _reason(error)}"
    return type(error)(error.errno, text) if error.errno is not None else type(error)(text)


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]} ..."


# writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A name beside `path` for a file or a folder; what is written there takes its place if the block ends well.

    Parameters
    ----------
    path
        The place, or a link to it; what lies there stays whole until the new one is on the disk, and goes in the same
        step. Then the name is there already, empty and its owner's alone, and the new one gets the modes of the old.
    suffix
        End of the temporary name, for writers that look at it.
    """
    path = Path(os.path.realpath(path))  # a link stays one; a change of directory in between must not matter
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.part{suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path)
            if (old := newest(path)).exists():  # nobody else may read on the way what only its owner may read
                part.mkdir(0o700) if old.is_dir() else part.touch(0o600)
            yield part
            keep_modes(old, part)
            _to_disk(part)
            with _locked(path.parent):
                _take_place(part, path)
    finally:
        _remove(part)


def write_bytes(path: Path, raw: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(raw)


def newest(path: Path) -> Path:
    """Where the newest whole folder lies: in its place, unless a writer died between the two steps of an exchange."""
    places = (path, *(path.with_name(f".{path.name}.{which}") for which in ("next", "before")))
    return next((place for place in places if os.path.lexists(place)), path)


def _take_place(part: Path, path: Path) -> None:
    """Put a file or folder in its place; only a folder over a folder takes more than one step."""
    following, before = (path.with_name(f".{path.name}.{which}") for which in ("next", "before"))
    if not path.is_dir() or path.is_symlink() or not part.is_dir():
        os.replace(part, path)
    elif _exchange(part, path):
        pass  # the old one now lies under the name that is removed
    else:
        _discard(following)
        os.rename(part, following)
        _discard(before)
        os.rename(path, before)
        os.rename(following, path)
    _sync(path.parent)
    for left in (following, before):  # of this exchange, or of one that was cut short
        _discard(left)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "linux":
            return ctypes.CDLL(None).renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(*names, 2) == 0  # RENAME_SWAP
    except (AttributeError, OSError):  # a C library without it
        pass
    return False


def keep_modes(old: Path, part: Path) -> None:
    """Give a file, or a folder and what is in it, owner and mode of what lies under the same names in the old one."""
    for entry in [*part.rglob("*"), part]:  # a folder that may not be written comes after what is in it
        was = old / entry.relative_to(part)
        if was.exists() and was.is_dir() == entry.is_dir() and not entry.is_symlink():
            for owner in (was.stat().st_uid, -1):  # the group alone where we may not give the file to others
                with suppress(AttributeError, OSError):  # Windows has no such thing
                    os.chown(entry, owner, was.stat().st_gid)
                    break
            with suppress(OSError):  # a file system without modes
                shutil.copymode(was, entry)


def _to_disk(part: Path) -> None:
    """Force a file, or a folder with its files, to the disk."""
    for entry in sorted(part.iterdir()) if part.is_dir() else ():
        _sync(entry)
    _sync(part)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
            raise
    finally:
        os.close(handle)


def _remove_stale(path: Path) -> None:
    """Remove what writers that were killed left beside a path, a day ago or earlier."""
    for part in path.parent.glob(f".{glob.escape(path.name[:100])}.*.part*"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                _remove(part)


def _discard(path: Path) -> None:
    """Remove what lies under a name that :func:`newest` looks at, so that it is never found half removed."""
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    with suppress(OSError):
        os.rename(path, part)
    _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


# locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only one who puts things in their place in a folder; no file is left behind."""
    handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if handle is not None and not _lock(handle, LOCK_SECONDS):
            raise TimeoutError(f"another process has been writing into {folder} for {LOCK_SECONDS:.0f} s")
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def only_writer(path: Path | None) -> Iterator[None]:
    """Be the only one who writes a file, for as long as the block lasts; a ValueError if another does."""
    if path is None or fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _own_lock(lock)
    if handle is None:
        raise ValueError(f"Another fit writes {path} at this moment. Give this one a checkpoint= of its own.")
    try:
        yield
    finally:
        _remove(lock)
        os.close(handle)


def _own_lock(lock: Path) -> int | None:
    """An open and locked file; None if another has it."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(handle, 0.0):
            os.close(handle)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                return handle
        os.close(handle)  # its owner removed it in between


def _lock(handle: int, seconds: float) -> bool:
    """Lock an open file or folder; True also where the file system has no locks."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        except OSError:
            return True


# contents ---------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> object:
    """JSON of a stranger: bounded in size and depth before anything is made of it; a ValueError otherwise."""
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"its JSON has {len(text):,} bytes, more than any model needs")
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)
    if outside.count(",") + outside.count("[") + outside.count("{") > MAX_JSON_VALUES:
        raise ValueError("its JSON holds more values than any model needs")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", outside):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_JSON_NESTING:
            raise ValueError(f"its JSON is nested more than {MAX_JSON_NESTING} deep")
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its JSON has two entries of one name")
    return found


def check_hdf5(path: Path) -> None:
    """Raise a ValueError unless all that an HDF5 file holds lies in it, can be read, and is no larger than it can be.

    HDF5 can point into other files, which whoever reads it would read as if they were part of it. And its library can
    die or never come back when a file is corrupt, so another process reads all of it first.
    """
    with reading(path):
        size = path.stat().st_size
    if not Path(sys.executable or "").name.startswith("python"):  # inside another program
        _read_hdf5(path)
        return
    seconds = HDF5_SECONDS + size / 2**24
    try:  # -P: the folder of this file is none to import from
        done = subprocess.run(
            [sys.executable, "-P", __file__, path], capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{path} is refused: HDF5 was not done with it after {seconds:.0f} s.") from error
    if done.returncode:
        told = done.stderr.strip().splitlines()
        raise ValueError(told[-1] if done.returncode == 3 and told else f"{path} is damaged: HDF5 dies of it.")


def _read_hdf5(path: Path) -> None:
    """Read all that is in an HDF5 file, and raise a ValueError at what is not in it."""
    import h5py

    with reading(path), h5py.File(path, "r") as file:
        seen, todo = set(), [("", file)]
        while todo:
            where, part = todo.pop()
            address = h5py.h5o.get_info(part.id).addr
            if address in seen:
                continue
            seen.add(address)
            for name in part.attrs:
                part.attrs[name]
            if isinstance(part, h5py.Dataset):
                _read_dataset(part, f"{path} is refused: '{where}'")
            for name in part if isinstance(part, h5py.Group) else ():
                if not isinstance(part.get(name, getlink=True), h5py.HardLink):
                    raise ValueError(f"{path} is refused: '{where}/{name}' points to another place or file.")
                todo.append((f"{where}/{name}", part[name]))


def _read_dataset(dataset, refused: str) -> None:
    """Read a dataset by parts of its first axis, once it is known to be no larger than its bytes can be."""
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{refused} has its numbers in another file.")
    stored, claimed = dataset.id.get_storage_size(), (dataset.size or 0) * dataset.dtype.itemsize
    if claimed > MAX_COMPRESSION * stored + 2**20:
        raise ValueError(f"{refused} claims {claimed:,} bytes and stores {stored:,}.")
    if not dataset.shape:
        dataset[()]
    elif claimed:
        rows = max(1, 2**25 * dataset.shape[0] // claimed)
        if dataset.chunks is not None:  # whole chunks, which are unpacked as a whole
            rows = -(-rows // dataset.chunks[0]) * dataset.chunks[0]
        for start in range(0, dataset.shape[0], rows):
            dataset[start : start + rows]


def sealed(raw: bytes, beside: str = "") -> bytes:
    """Safetensors bytes with a checksum over all tensors, names and metadata, and over a text that is kept beside."""
    header, body = _split(raw)
    metadata = {name: value for name, value in header.get("__metadata__", {}).items() if name != SEAL}
    header["__metadata__"] = metadata | {SEAL: _digest(header, metadata, body, beside)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, body))


def unsealed(raw: bytes, beside: str = "", *, required: bool = False) -> dict[str, str]:
    """The metadata of safetensors bytes, checked against their checksum; without one only where it is not required.

    Raises
    ------
    ValueError
        If it is another than that of what is there.
    """
    header, body = _split(raw)
    metadata = dict(header.get("__metadata__") or {})
    found = metadata.pop(SEAL, None)
    if found is None and required:
        raise ValueError("it has no checksum")
    if found is not None and found != _digest(header, metadata, body, beside):
        raise ValueError("its checksum is not that of what it holds: it is damaged or was edited")
    return metadata


def _split(raw: bytes) -> tuple[dict, memoryview]:
    """Header and numbers of safetensors bytes."""
    n = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 + n:
        raise ValueError("it is cut short")
    header = parse_json(raw[8 : 8 + n])
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its header is none of safetensors")
    return header, memoryview(raw)[8 + n :]


def _digest(header: dict, metadata: dict, body: memoryview, beside: str) -> str:
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps([tensors, metadata, beside], sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()


if __name__ == "__main__":  # the process of check_hdf5
    try:
        _read_hdf5(Path(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.stderr.write(" ".join(str(error).split()))
        os._exit(3)
