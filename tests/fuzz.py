"""Files that are spoilt, and writers that are killed: whatever the bytes and the moment, nothing worse happens.

Readers: a file is spoilt (bytes; or its content, with every checksum set right again, as a careful hand would), read
and asked for an answer in a process of its own, with a limit of time and of memory. What may come out is the right
answer or an error of anvi's own; not a dead process, no end, another answer, or an error out of a library.
Writers: a process writes one state after the other and is killed; the newest state that it had finished must be there.

    python tests/fuzz.py --minutes 10 --seed 1        # a long run, prints a table
"""

import argparse
import ast
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).parent))

from helpers import cite, quiet_mudata

import anvi as av
from anvi import _files
from anvi._fit import loop
from anvi._model import Model

SECONDS = 20
"""A reader that computes longer hangs, and one that waits for fifteen times as long."""
MEMORY = 3 * 2**30
"""Address space that a reader may add."""
OK = ("right", "refused")
FITS = {"max_epochs": 2, "n_hidden": 16, "n_latent": 4, "batch_key": "batch"}
ODD = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    -0.5,
    float("nan"),
    "",
    "x",
    ".",
    "\0",
    [],
    [[]],
    {},
    {"a": 1},
)
CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"


def _raises() -> set[tuple[str, int]]:
    """Where anvi raises errors, as its files were when this started."""
    found = set()
    for file in Path(av.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                found |= {(str(file), line) for line in range(node.lineno, node.end_lineno + 1)}
    return found


RAISES = _raises()


class Outcome(NamedTuple):
    """What came of one file."""

    verdict: str  # right, refused, crash, hang, changed, raw
    text: str
    seconds: float  # by the clock
    megabytes: float  # above what the process had before


# spoiling ---------------------------------------------------------------------------------------------------------


def spoilt_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    """Bytes with a few changes, most of them where lengths and headers are."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        n = len(data)
        if n < 16:
            return bytes(data)
        near = rng.random() < 0.4
        at = int(rng.integers(0, min(n, 512))) if near else int(rng.integers(0, n))
        size = int(min(n - at, 2 ** rng.integers(0, 10)))
        kind = rng.integers(0, 8)
        if kind <= 1:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2:
            data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x5B, 0x7B, 0x28, 0x2E]))
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[int(rng.integers(0, n)) :][:size]
        elif kind == 5:
            data[at : at + size] = bytes(size)
        elif kind == 6:
            value = int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**32, 2**40, 2**62]))
            data[at : at + 8] = value.to_bytes(8, "little")
        else:
            del data[at:]
    return bytes(data)


def spoilt_json(value, rng: np.random.Generator):
    """A JSON value with one entry, anywhere, replaced, taken away, doubled, or nested."""
    value = json.loads(json.dumps(value))
    here, path = value, []
    while isinstance(here, dict | list) and here and (not path or rng.random() < 0.75):
        key = list(here)[rng.integers(len(here))] if isinstance(here, dict) else int(rng.integers(len(here)))
        path.append((here, key))
        here = here[key]
    if not path:
        return value
    parent, key = path[-1]
    kind = rng.integers(0, 6)
    if kind <= 2:
        parent[key] = ODD[rng.integers(len(ODD))]
    elif kind == 3:
        del parent[key]
    elif kind == 4 and isinstance(parent, list):
        parent.append(parent[key])
    elif kind == 4:
        parent[f"{key}2"] = parent[key]
    else:
        for _ in range(int(rng.choice([1, 3, 70, 5_000]))):
            here = [here]
        parent[key] = here if isinstance(here, list) and _depth(here) < 900 else "deep"
    return value


def _depth(value) -> int:
    n = 0
    while isinstance(value, list) and value:
        value, n = value[0], n + 1
    return n


def spoilt_tensors(tensors: dict[str, torch.Tensor], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Tensors, one of them of another kind, size or name, or with an odd number in it."""
    tensors = {name: value.clone() for name, value in tensors.items()}
    name = list(tensors)[rng.integers(len(tensors))]
    value, kind = tensors[name], rng.integers(0, 8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[f"{name}2"] = value.clone()
    elif kind == 2:
        tensors[name] = value.double() if value.is_floating_point() else value.float()
    elif kind == 3:
        tensors[name] = value.half()
    elif kind == 4:
        tensors[name] = value[None].contiguous()
    elif kind == 5:
        tensors[name] = value[:0].contiguous() if value.ndim else torch.zeros(3)
    elif kind == 6:
        tensors[name] = value.flatten()[: max(1, value.numel() // 2)].clone()
    elif value.is_floating_point() and value.numel():
        value.view(-1)[rng.integers(value.numel())] = float(rng.choice([np.nan, np.inf, -np.inf, -1e30]))
    return tensors


# kinds of files ---------------------------------------------------------------------------------------------------


class Kind:
    """One kind of file: how a whole one is spoilt, and what a reader is asked."""

    def __init__(self, folder: Path):
        self.folder = folder

    def spoil(self, rng: np.random.Generator) -> tuple[str, bool]:
        """Write a spoilt one; its sort, and whether another answer than the whole one's may be right."""
        raise NotImplementedError

    def read(self) -> object:
        """What the reader gives, as something that can be compared."""
        raise NotImplementedError


def told(model: Model, mdata) -> bytes:
    """All that a model says of some cells; raises an error unless its probabilities are some."""
    with torch.inference_mode():
        latent, proba = (verb(mdata, model=model, inplace=False) for verb in (av.tl.latent, av.tl.predict))
    there = mdata.obs_names.isin(mdata["rna"].obs_names)  # else it gets nothing, and that is said
    latent, proba = latent[there], np.asarray(proba)[there]
    if not np.isfinite(latent).all() or not np.isfinite(proba).all() or abs(proba.sum(1) - 1).max() > 1e-4:
        raise ArithmeticError("answers that are none")
    return model.fingerprint().encode() + latent.tobytes() + proba.tobytes() + str(model.classes).encode()


class Slot(Kind):
    """A model inside a fitted object."""

    def __init__(self, folder: Path, whole, mdata):
        super().__init__(folder)
        self.whole, self.mdata = dict(whole.uns["totalanvi"]["model"]), mdata
        self.history = whole.uns["totalanvi"]["history"]

    def spoil(self, rng):
        slot, kind = dict(self.whole), rng.integers(0, 6)
        text, raw = slot["config"], slot["weights"].tobytes()
        if kind == 0:
            slot["config"] = spoilt_bytes(text.encode(), rng).decode("utf-8", errors="surrogateescape")
        elif kind <= 2:
            slot["weights"] = np.frombuffer(spoilt_bytes(raw, rng), dtype=np.uint8)
        elif kind == 3:
            slot["config"] = json.dumps(spoilt_json(json.loads(text), rng))
            slot["weights"] = np.frombuffer(_files.sealed(raw, slot["config"]), dtype=np.uint8)
        elif kind == 4:
            slot["weights"] = np.frombuffer(_files.sealed(save(spoilt_tensors(load(raw), rng)), text), dtype=np.uint8)
        else:
            name = list(slot)[rng.integers(len(slot))]
            slot[name] = ODD[rng.integers(len(ODD))]
        self.slot = slot
        return f"slot {('config bytes', 'bytes', 'bytes', 'config', 'tensors', 'entries')[kind]}", kind in (3, 4)

    def read(self):
        return told(Model.from_slot(self.slot, self.history), self.mdata)

    def reset(self):
        self.slot = self.whole


class Folder(Kind):
    """A folder of `write_model`."""

    def __init__(self, folder: Path, whole, mdata):
        super().__init__(folder)
        self.mdata = mdata
        self.path, self.before = folder / "model", folder / "whole"
        av.write_model(whole, self.before, model="totalanvi")

    def reset(self):
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.before, self.path)

    def spoil(self, rng):
        self.reset()
        name = ("config.json", "model.safetensors", "history.csv")[rng.integers(3)]
        file, kind = self.path / name, rng.integers(0, 3)
        raw = file.read_bytes()
        if kind == 0:
            file.write_bytes(spoilt_bytes(raw, rng))
            return f"folder {name} bytes", False
        facts = json.loads((self.path / "config.json").read_text())
        sums = facts.pop("sha256")
        if name == "config.json":
            facts = spoilt_json(facts, rng)
            facts = facts if isinstance(facts, dict) else {}
        elif name == "history.csv":
            file.write_bytes(spoilt_bytes(raw, rng))
        else:
            file.write_bytes(_files.sealed(save(spoilt_tensors(load(raw), rng))))
        import hashlib

        sums |= {name: hashlib.sha256((self.path / name).read_bytes()).hexdigest() for name in sums if name[0] != "c"}
        sums["config.json"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        (self.path / "config.json").write_text(json.dumps(facts | {"sha256": sums}))
        return f"folder {name} resealed", True

    def read(self):
        return told(av.read_model(self.path, device="cpu"), self.mdata)


class Checkpoint(Kind):
    """The checkpoint of a fit that is over; going on from it gives its weights."""

    def __init__(self, folder: Path, arguments, options):
        super().__init__(folder)
        self.arguments, self.options = arguments, options | {"checkpoint": folder / "fit"}
        self.path = folder / "fit"
        self.first = {name: value.clone() for name, value in arguments[0].state_dict().items()}
        loop.fit(*arguments, **self.options)
        self.raw = self.path.read_bytes()

    def reset(self):
        self.path.write_bytes(self.raw)
        self.arguments[0].load_state_dict(self.first)

    def spoil(self, rng):
        self.reset()
        kind = rng.integers(0, 4)
        if kind <= 1:
            self.path.write_bytes(spoilt_bytes(self.raw, rng))
            return "checkpoint bytes", False
        metadata, tensors = _files.unsealed(self.raw), load(self.raw)
        if kind == 2:
            tensors = spoilt_tensors(tensors, rng)
        else:
            metadata = {"state": json.dumps(spoilt_json(json.loads(metadata["state"]), rng))}
        self.path.write_bytes(_files.sealed(save(tensors, metadata)))
        return f"checkpoint {'tensors' if kind == 2 else 'state'} resealed", True

    def read(self):
        history = loop.fit(*self.arguments, **self.options)
        weights = b"".join(value.numpy().tobytes() for value in self.arguments[0].state_dict().values())
        return weights + history.to_csv().encode()


class ModelPt(Kind):
    """A model that scvi-tools has saved."""

    NAMES = ("scvi", "scanvi", "totalvi", "totalanvi", "totalvi_anndata")

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path = folder / "model.pt"
        self.whole = {name: (CHECKPOINTS / name / "model.pt").read_bytes() for name in self.NAMES}
        self.name = "totalanvi"

    def reset(self):
        self.path.write_bytes(self.whole[self.name])

    def spoil(self, rng):
        raw = self.whole[self.name]
        if rng.random() < 0.3:
            self.path.write_bytes(spoilt_bytes(raw, rng))
            return "model.pt bytes", False
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        program = next(name for name in records if name.endswith("data.pkl"))
        name = program if rng.random() < 0.8 else list(records)[rng.integers(len(records))]
        changed = spoilt_program(records[name], rng) if name == program else spoilt_bytes(records[name], rng)
        with zipfile.ZipFile(self.path, "w") as archive:
            for other, record in (records | {name: changed}).items():
                archive.writestr(other, record)
        return "model.pt program" if name == program else "model.pt record", True

    def read(self):
        model = av.io.from_scvi_tools(self.path)
        return b"".join(value.numpy().tobytes() for value in model.weights().values()) + str(model.setup).encode()


def spoilt_program(raw: bytes, rng: np.random.Generator) -> bytes:
    """A pickle program with bytes changed, or with hostile instructions put in."""
    if rng.random() < 0.5:
        return spoilt_bytes(raw, rng)
    n = int(2 ** rng.integers(0, 20))
    inserts = (
        b"(" * n,
        b"}" * n,
        b")" + b"\x85" * n,
        b"]" + b"\x94h\x00\x86" * min(n, 5_000),
        b"K\x01\x85"
        + b"".join(b"q" + bytes([i % 256]) + b"h" + bytes([i % 256]) + b"\x86" for i in range(min(n, 200))),
        b"ccollections\nOrderedDict\n]" + b"K\x01\x85" + b"\x85" * n + b"K\x01\x86a\x85R",
        b"c_codecs\nencode\nX" + struct.pack("<I", n) + b"x" * n + b"X\x06\x00\x00\x00latin1\x86R",
        b"\x8a\xff" + b"\x7f" * 255,
        b"cposix\nsystem\nX\x0b\x00\x00\x00touch pwned\x85R",
    )
    chosen = inserts[rng.integers(len(inserts))]
    if rng.random() < 0.4:
        return b"\x80\x02" + chosen + b"."
    at = int(rng.integers(2, len(raw)))
    return raw[:at] + chosen + raw[at:]


class H5mu(Kind):
    """A fitted object in a file."""

    def __init__(self, folder: Path, whole):
        super().__init__(folder)
        self.path, self.before = folder / "data.h5mu", folder / "whole.h5mu"
        with quiet_mudata():
            whole.write_h5mu(self.before)
        self.raw = self.before.read_bytes()

    def reset(self):
        self.path.write_bytes(self.raw)

    def spoil(self, rng):
        if rng.random() < 0.4:
            self.path.write_bytes(spoilt_bytes(self.raw, rng))
            return "h5mu bytes", True
        self.reset()
        with h5py.File(self.path, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            likely = [
                name for name in names if name.split("/")[-1] in ("indices", "indptr", "data", "weights", "config")
            ]
            name = (likely if rng.random() < 0.6 else names)[rng.integers(len(likely if len(likely) else names))]
            sort = _spoil_node(file, name, rng)
        return f"h5mu {sort}", True

    def read(self):
        from anvi._store import read_data

        with quiet_mudata():
            data = read_data(self.path)
            return told(av.get.model(data, "totalanvi"), data)


def _spoil_node(file: h5py.File, name: str, rng: np.random.Generator) -> str:
    node, kind = file[name], rng.integers(0, 6)
    if isinstance(node, h5py.Group) or kind == 0:
        which = rng.integers(0, 4)
        if which == 0:
            del file[name]
            return "taken away"
        if which == 1:
            del file[name]
            file[name] = h5py.ExternalLink("/etc/hostname", "/") if rng.random() < 0.5 else h5py.SoftLink("/mod")
            return "link"
        if which == 2 and len(node.attrs):
            attribute = list(node.attrs)[rng.integers(len(node.attrs))]
            node.attrs[attribute] = str(rng.choice(["x", "csr_matrix", "csc_matrix", "array", "dataframe", "0.9.9"]))
            return "attribute"
        del file[name]
        file[name] = np.arange(int(rng.integers(0, 9)))
        return "replaced"
    values = node[()]
    if node.shape == () or not node.size or values.dtype.kind not in "iufb":
        del file[name]
        file[name] = (0, 2**31, -0.5, 1e308, float("nan"), "x")[rng.integers(6)]
        return "value"
    flat = values.reshape(-1)
    if kind <= 3:
        at = int(rng.integers(len(flat)))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            odd = np.array([-1, 2**30, -(2**31), 10**8, np.nan, np.inf, 0.5, 255], dtype=float)
            flat[at] = odd[rng.integers(len(odd))].astype(values.dtype)
        node[...] = flat.reshape(values.shape)
        return "number"
    del file[name]
    file[name] = flat[: len(flat) // 2] if kind == 4 else values.astype(rng.choice(["f2", "f8", "i1", "i8"]))
    return "length" if kind == 4 else "type"


# running ----------------------------------------------------------------------------------------------------------


def examine(kind: Kind, whole: object, *, other_may_be_right: bool) -> Outcome:
    """Read in a process of its own."""
    begun = time.monotonic()
    into, out_of = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(into)
        _child(kind, whole, other_may_be_right, out_of)
    os.close(out_of)
    with os.fdopen(into, "rb") as pipe:
        raw = pipe.read()
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - begun
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Outcome(
            "hang" if number in (signal.SIGALRM, signal.SIGPROF) else "crash", signal.Signals(number).name, seconds, 0.0
        )
    verdict, text, megabytes = pickle.loads(raw) if raw else ("crash", f"exit {status}", 0.0)
    return Outcome(verdict, text, seconds, megabytes)


def _child(kind: Kind, whole: object, other_may_be_right: bool, pipe: int) -> None:
    verdict, text, before = "raw", "", _megabytes()
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: the machine may be busy with other things
        signal.setitimer(signal.ITIMER_REAL, 15 * SECONDS)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        warnings.simplefilter("ignore")
        try:
            found = kind.read()
            verdict = "right" if found == whole or other_may_be_right else "changed"
        except Exception as error:
            verdict, text = _judged(error), f"{type(error).__name__}: {error}"[:300]
            if verdict == "raw":
                text += " | " + " < ".join(
                    f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-6:-1]
                )
    finally:
        os.write(pipe, pickle.dumps((verdict, text, _megabytes() - before)))
        os._exit(0)


def _judged(error: Exception) -> str:
    """An error of anvi's own, with a sentence of anvi's, or one out of a library."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = (last.filename, last.lineno) in RAISES
    return "refused" if own and isinstance(error, ValueError | OSError | KeyError) else "raw"


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_kinds(folder: Path) -> dict[str, Kind]:
    """One whole file of every kind."""
    mdata = cite(400, n_genes=30)
    taken: list = []

    def spy(*arguments, **options):
        copy = type(arguments[0])(arguments[0].config)
        copy.load_state_dict(arguments[0].state_dict())
        taken.append(((copy, *arguments[1:]), options))
        return loop.fit(*arguments, **options)

    from anvi.tl import _fit

    before, _fit.fit = _fit.fit, spy
    try:
        av.tl.totalanvi(mdata, **FITS)
    finally:
        _fit.fit = before
    folders = {name: folder / name for name in ("slot", "folder", "checkpoint", "model.pt", "h5mu")}
    for path in folders.values():
        path.mkdir()
    some = mdata[:40].copy()
    return {
        "slot": Slot(folders["slot"], mdata, some),
        "folder": Folder(folders["folder"], mdata, some),
        "checkpoint": Checkpoint(folders["checkpoint"], *taken[0]),
        "model.pt": ModelPt(folders["model.pt"]),
        "h5mu": H5mu(folders["h5mu"], some),
    }


def fuzz(kinds: dict[str, Kind], seed: int, goes_on: Callable[[int], bool], keep: Path | None = None):
    """Spoil and read until told to stop; every outcome with its sort."""
    wholes = {}
    for name, kind in kinds.items():
        kind.reset()
        wholes[name] = kind.read()
    for number in itertools.count():
        if not goes_on(number):
            return
        name = list(kinds)[number % len(kinds)]
        rng = np.random.default_rng([seed, number])
        sort, other = kinds[name].spoil(rng)
        outcome = examine(kinds[name], wholes[name], other_may_be_right=other)
        if outcome.verdict not in OK and keep is not None and hasattr(kinds[name], "path"):
            path = kinds[name].path
            (shutil.copytree if path.is_dir() else shutil.copy)(path, keep / f"{number}-{path.name}")
        yield number, sort, outcome


# writers ----------------------------------------------------------------------------------------------------------


def kill_writer(write: Callable[[int], None], read: Callable[[], int], rng: np.random.Generator) -> str:
    """Kill a process that writes state after state; "" if the newest finished state, or a later one, is there."""
    into, out_of = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(into)
        try:
            for number in itertools.count(1):
                write(number)
                os.write(out_of, struct.pack("<q", number))
        finally:
            os._exit(1)
    os.close(out_of)
    with os.fdopen(into, "rb") as pipe:
        first = pipe.read(8)  # the first state is there
        time.sleep(float(rng.uniform(0.0, 0.08)))
        os.kill(child, signal.SIGKILL)
        raw = first + pipe.read()
    os.waitpid(child, 0)
    finished = struct.unpack("<q", raw[len(raw) // 8 * 8 - 8 : len(raw) // 8 * 8])[0] if len(raw) >= 8 else 0
    try:
        found = read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if found in (finished, finished + 1) else f"state {found} is there, {finished} was finished"


def make_writers(kinds: dict[str, Kind], folder: Path) -> dict[str, tuple[Callable, Callable]]:
    """What writes a numbered state and what reads its number, for every writer."""
    from dataclasses import replace

    model = av.read_model(kinds["folder"].before, device="cpu")
    card = "card"
    path = folder / "model"

    def numbered(number: int) -> Model:
        return replace(model, info=model.info | {"random_state": number})

    def write_folder(number: int) -> None:
        av.write_model(numbered(number), path, card=card, overwrite=True)

    def read_folder() -> int:
        return av.read_model(path, device="cpu").info["random_state"]

    def without_exchange(number: int) -> None:
        _files._exchange = lambda one, other: False
        write_folder(number)

    check = kinds["checkpoint"]
    fit, file = folder / "fit", folder / "page.html"
    check.reset()
    state = _state_of(check)

    def write_checkpoint(number: int) -> None:
        state.epoch, state.history = number, [{"epoch": float(i)} for i in range(number)]
        loop.save_checkpoint(fit, state, "x")

    def read_checkpoint() -> int:
        again = _state_of(check)
        loop.load_checkpoint(fit, fit.read_bytes(), again, "x")
        return again.epoch

    def write_file(number: int) -> None:
        _files.write_bytes(file, f"{number:09d}".encode() * 50_000)

    def read_file() -> int:
        raw = file.read_bytes()
        number = int(raw[:9])
        return number if raw == f"{number:09d}".encode() * 50_000 else -1

    return {
        "folder": (write_folder, read_folder),
        "folder, no exchange": (without_exchange, read_folder),
        "checkpoint": (write_checkpoint, read_checkpoint),
        "file": (write_file, read_file),
    }


def _state_of(check: Checkpoint):
    network, cells, _, _, plan = check.arguments
    return loop._start(network, cells, plan, check.options["random_state"], torch.device("cpu"))


def main() -> int:
    """A long run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that did harm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _files.HDF5_SECONDS = 10.0
    bad = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        av.settings.override(progress=False, device="cpu", verbosity=0, n_threads=1),
    ):
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        kinds = make_kinds(Path(folder))
        until, found, slowest, largest = time.monotonic() + 60 * options.minutes, Counter(), {}, {}
        for number, sort, outcome in fuzz(kinds, options.seed, lambda _: time.monotonic() < until, options.keep):
            found[sort.split()[0], sort, outcome.verdict] += 1
            slowest[sort] = max(slowest.get(sort, 0.0), outcome.seconds)
            largest[sort] = max(largest.get(sort, 0.0), outcome.megabytes)
            if outcome.verdict not in OK:
                bad += 1
                print(f"{number} {sort}: {outcome.verdict}: {outcome.text}", flush=True)
        verdicts = ("right", "refused", "changed", "raw", "crash", "hang")
        print(f"{'file':32}" + "".join(f"{verdict:>9}" for verdict in verdicts) + f"{'most s':>9}{'most MB':>9}")
        for sort in sorted({sort for _, sort, _ in found}):
            row = [sum(n for (_, s, v), n in found.items() if (s, v) == (sort, verdict)) for verdict in verdicts]
            print(f"{sort:32}" + "".join(f"{n:9}" for n in row) + f"{slowest[sort]:9.2f}{largest[sort]:9.0f}")
        print(f"{sum(found.values())} files, {bad} bad")
        print("executions:", sum(1 for _ in Path(folder).rglob("pwned")))
        writers = make_writers(kinds, Path(folder))
        failures, kills = [], Counter()
        for number in range(options.kills):
            name = list(writers)[number % len(writers)]
            for path in [path for name in ("model", "fit", "page.html") for path in Path(folder).glob(f"*{name}*")]:
                if path.name not in kinds:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            text = kill_writer(*writers[name], np.random.default_rng([options.seed, number]))
            kills[name] += 1
            if text:
                failures.append(f"{name}: {text}")
        print(f"kills: {dict(kills)}; failures: {len(failures)}", *failures, sep="\n")
    return 1 if bad or failures else 0


if __name__ == "__main__":
    sys.exit(main())
