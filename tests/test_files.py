"""What is written is whole whatever happens, what is read is bounded, and every error names the file."""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from helpers import assert_same, cite, contents, quiet_mudata, resealed
from safetensors.torch import load, save
from scipy import sparse

import anvi as av
from anvi import _files
from anvi._data import slots
from anvi._data.counts import canonical, whole
from anvi._files import check_hdf5, parse_json, reading, replacing, sealed, unsealed, write_bytes, writing
from anvi._model import Model
from anvi.io import from_scvi_tools
from anvi.io._model_pt import read_model_pt
from anvi.nn import Config

# writing ------------------------------------------------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_bytes(tmp_path / "file", b"old")
    with pytest.raises(ValueError, match="file cannot be written"), replacing(tmp_path / "file") as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert (tmp_path / "file").read_bytes() == b"old" and names(tmp_path) == {"file"}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda one, other: False)
    for text in ("old", "new"):
        with replacing(tmp_path / "model") as part:
            part.mkdir(exist_ok=True)
            (part / text).write_text(text)
    assert names(tmp_path) == {"model"} and names(tmp_path / "model") == {"new"}


@pytest.mark.parametrize(
    "step", [1, 2, 3, 4, 5, 6]
)  # the fourth takes the old one away, the fifth puts the new one there
def test_without_an_exchange_the_newest_whole_folder_is_found_at_every_step(fitted, tmp_path, monkeypatch, step):
    """C2: killed between the two renames, the old model was lost."""
    monkeypatch.setattr(_files, "_exchange", lambda one, other: False)
    path = tmp_path / "model"
    av.write_model(fitted, path, model="scvi")
    rename, done = os.rename, []

    def dies(*arguments):
        done.append(arguments)
        if len(done) == step:
            raise SystemExit
        rename(*arguments)

    monkeypatch.setattr(os, "rename", dies)
    monkeypatch.setattr(_files, "_remove", lambda path: None)  # a killed process tidies nothing up
    with pytest.raises(SystemExit):
        av.write_model(fitted, path, model="totalvi", overwrite=True)
    monkeypatch.undo()
    assert av.read_model(path).name == ("totalvi" if step >= 5 else "scvi")
    av.write_model(fitted, path, model="scanvi", overwrite=True)
    assert av.read_model(path).name == "scanvi"


def test_a_killed_exchange_leaves_a_whole_model(fitted, tmp_path, monkeypatch):
    path = tmp_path / "model"
    av.write_model(fitted, path, model="scvi")

    def dies(*arguments):
        raise SystemExit

    monkeypatch.setattr(_files, "_take_place", dies)
    with pytest.raises(SystemExit):
        av.write_model(fitted, path, model="totalvi", overwrite=True)
    assert av.read_model(path).name == "scvi"


def test_what_killed_writers_left_goes_after_a_day(tmp_path):
    old, young = tmp_path / ".file.1-ab.part", tmp_path / ".file.2-cd.part"
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    write_bytes(tmp_path / "file", b"whole")
    assert names(tmp_path) == {"file", young.name}


def test_two_fits_cannot_share_a_checkpoint(tmp_path):
    """C7."""
    with _files.only_writer(tmp_path / "fit"):
        with pytest.raises(ValueError, match="Another fit writes .*fit at this moment"):
            av.tl.scvi(cite(60), max_epochs=1, checkpoint=tmp_path / "fit")
    av.tl.scvi(cite(60), max_epochs=1, checkpoint=tmp_path / "fit")
    assert names(tmp_path) == {"fit"}


def test_a_full_disk_is_told_with_the_name(fitted, tmp_path):
    """C10: an error of safetensors without a path."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import anvi as av
from helpers import cite
mdata = cite(60)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    av.tl.scvi(mdata, max_epochs=1, checkpoint={str(tmp_path / "fit")!r})
except OSError as error:
    print(type(error).__name__, error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("OSError") and str(tmp_path / "fit") in told
    assert names(tmp_path) == set()


# contents -----------------------------------------------------------------------------------------------------------


def test_a_seal_is_over_tensors_names_metadata_and_what_lies_beside():
    raw = sealed(save({"a": torch.zeros(3), "b": torch.ones(2)}, {"state": "7"}), "beside")
    assert unsealed(raw, "beside", required=True) == {"state": "7"}
    assert {name: value.tolist() for name, value in load(raw).items()} == {"a": [0, 0, 0], "b": [1, 1]}
    for place in range(8, len(raw)):
        spoilt = bytearray(raw)
        spoilt[place] ^= 1
        try:
            assert unsealed(bytes(spoilt), "beside", required=True) == {"state": "7"}
            assert raw[place : place + 1].isspace()  # blanks between the parts of the header
        except ValueError:
            pass
    for text in ("", "besides"):
        with pytest.raises(ValueError, match="checksum"):
            unsealed(raw, text)
    with pytest.raises(ValueError, match="no checksum"):
        unsealed(save({"a": torch.zeros(3)}), required=True)
    assert unsealed(save({"a": torch.zeros(3)})) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested"),
        ('{"a": 1, "a": 2}', "two entries"),
        ("[" + "[]," * 9_000_000 + "1]", "more values"),
        (" " * (2**26 + 1), "bytes"),
        (b"\xff", "utf-8"),
    ],
    ids=["deep", "deep dict", "twice", "wide", "large", "no text"],
)
def test_json_is_bounded_before_anything_is_made_of_it(text, told):
    """C9."""
    with pytest.raises(ValueError, match=told):
        parse_json(text)


def test_brackets_in_text_are_no_nesting():
    assert parse_json(json.dumps({"[" * 500: '\\"{' * 500})) == {"[" * 500: '\\"{' * 500}


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyError("x"), MemoryError(), RecursionError(), OSError(28, "full")], ids=repr
)
def test_every_error_names_the_file(error):
    with pytest.raises((ValueError, OSError), match="some/file"), reading("some/file"):
        raise error


# models -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slot(fitted):
    return dict(fitted.uns["totalanvi"]["model"])


def spoil(slot, **tensors) -> dict:
    weights = load(slot["weights"].tobytes())
    weights |= {name: change(weights[name]) for name, change in tensors.items()}
    return resealed(slot | {"weights": np.frombuffer(save(weights), dtype=np.uint8)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda value: torch.full_like(value, torch.nan), "NaN or infinite"),
        (lambda value: value.double(), "float64"),
        (lambda value: value.half(), "float16"),
    ],
    ids=["NaN", "float64", "float16"],
)
def test_weights_are_finite_and_float32(slot, change, told):
    """A13."""
    with pytest.raises(ValueError, match=f"'rna.scale.bias' .*{told}"):
        Model.from_slot(spoil(slot, **{"rna.scale.bias": change}), pd.DataFrame())


def test_variances_of_norms_are_not_negative(slot):
    """The probabilities would be NaN."""
    name = "encoder.stack.norm.0.running_var"
    with pytest.raises(ValueError, match=f"'{name}' holds a negative variance"):
        Model.from_slot(spoil(slot, **{name: lambda value: -value}), pd.DataFrame())


@pytest.mark.parametrize(("name", "value"), [("encoder.mean.weight", 3e38), ("encoder.log_var.bias", 200.0)])
def test_what_is_not_finite_is_no_answer(slot, fitted, name, value):
    """Weights can be finite and too large; samples of an infinite variance are NaN in every answer."""
    changed = spoil(slot, **{name: lambda weight: torch.full_like(weight, value)})
    model = Model.from_slot(changed, pd.DataFrame())
    for verb in (av.tl.latent, av.tl.predict, functools.partial(av.tl.denoise, n_samples=2, inplace=False)):
        with pytest.raises(ValueError, match="gives no finite latent .* for the cell 'cell_"):
            verb(fitted, model=model)
    query = fitted.copy()
    with pytest.raises(ValueError, match="gives no finite latent .* for the cell 'cell_"):
        av.tl.map_query(query, model, key_added="mapped")
    assert "mapped" not in query.uns and "X_mapped" not in query.obsm


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), None, "1", True], ids=repr)
def test_temperatures_are_positive(slot, temperature):
    """A13: a confidence of NaN."""
    facts = json.loads(slot["config"])
    facts["info"]["temperature"] = {"with_proteins": 1.0, "without_proteins": temperature}
    slot = resealed(slot | {"config": json.dumps(facts)})
    with pytest.raises(ValueError, match="temperatures are not positive"):
        Model.from_slot(slot, pd.DataFrame())


def test_a_flipped_bit_of_a_slot_is_seen(slot, fitted):
    rng = np.random.default_rng(0)
    history = fitted.uns["totalanvi"]["history"]
    for place in rng.integers(0, len(slot["weights"]), 40):
        weights = slot["weights"].copy()
        weights[place] ^= 1 << rng.integers(8)
        with pytest.raises(ValueError, match="damaged"):
            Model.from_slot(slot | {"weights": weights}, history)
    config = slot["config"].replace('"n_latent": ', '"n_latent":  ')
    with pytest.raises(ValueError, match="checksum"):
        Model.from_slot(slot | {"config": config}, history)
    with pytest.raises(ValueError, match="format"):
        Model.from_slot(slot | {"format": "anvi safetensors, seale"}, history)


def test_the_error_of_a_slot_names_it(fitted):
    fitted.uns["totalanvi"]["model"]["weights"][-1] ^= 1
    with pytest.raises(ValueError, match=r"uns\['totalanvi'\]\['model'\]"):
        av.tl.latent(fitted, model="totalanvi")


@pytest.mark.parametrize("history", ["a text", [1, 2], pd.DataFrame({"a": ["x", "y"]})], ids=["text", "list", "words"])
def test_a_history_is_a_table_of_numbers(slot, history):
    """C9."""
    with pytest.raises(ValueError, match="history is no table of numbers"):
        Model.from_slot(slot, history)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_layers_encoder", 200_000),
        ("n_layers_decoder", 10**9),
        ("n_hidden", 10**9),
        ("n_genes", 10**12),
        ("n_batches", 0),
        ("n_labels", -1),
        ("n_categories", [2, 10**9]),
        ("n_categories", [2] * 2_000),
        ("n_latent", True),
        ("dropout_u", "0.5"),
        ("efficiency", "yes"),
        ("n_proteins", 1.5),
    ],
    ids=repr,
)
def test_a_configuration_is_bounded(option, value):
    """C9: 200,000 layers took 12 seconds."""
    begun = time.monotonic()
    with pytest.raises(ValueError, match=option):
        Config.from_dict({"n_genes": 5} | {option: value})
    assert time.monotonic() - begun < 1


def test_the_error_of_a_history_names_the_file(fitted, tmp_path):
    """C9."""
    import hashlib

    av.write_model(fitted, tmp_path / "model", model="scvi")
    raw = b'a,b\n1,2,3\n4\n"'
    (tmp_path / "model" / "history.csv").write_bytes(raw)
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    facts["sha256"]["history.csv"] = hashlib.sha256(raw).hexdigest()
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="history.csv"):
        av.read_model(tmp_path / "model")


# model.pt -----------------------------------------------------------------------------------------------------------


def model_pt(path: Path, program: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path / "model.pt", "w") as file:
        for name, data in {"data.pkl": program, **records}.items():
            file.writestr(f"model/{name}", data)
    return path / "model.pt"


ORDERED = b"ccollections\nOrderedDict\n"
SHARED = b"K\x01\x85" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(90))  # a tuple of a tuple twice, 90 times
PROGRAMS = {
    "a deep tuple as a key of an OrderedDict": ORDERED + b"]K\x01" + b"\x85" * 400_000 + b"K\x01\x86a\x85R.",
    "shared tuples as a key of an OrderedDict": ORDERED + b"]" + SHARED + b"K\x01\x86a\x85R.",
    "shared tuples as a value": b"}X\x01\x00\x00\x00a" + SHARED + b"s.",
    "shared tuples as the class of a model": b"}X\x0a\x00\x00\x00model_name" + SHARED + b"s.",
    "shared tuples as the name of a record": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + SHARED
    + b"X\x03\x00\x00\x00cpuK\x01tQ.",
    "deep lists": b"]" * 150 + b"a" * 149 + b".",
    "a list in itself": b"]q\x00h\x00a.",
    "many empty dicts": b"(" + b"}" * 30_000_000 + b"l.",
    "many marks": b"(" * 3_000_000 + b".",
    "a large memo": b"K\x01" + b"".join(b"r" + i.to_bytes(4, "little") for i in range(1_100_000)) + b".",
    "bytes again and again": b"X\x00\x00\x10\x00"
    + b"x" * 2**20
    + b"q\x000"
    + b"".join(b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" for _ in range(400))
    + b".",
    "a long key again and again": b"(" + b"K\x01" * 50_000 + b"tq\x000}" + b"h\x00K\x01s" * 50_000 + b".",
    "a huge number as a key": b"}\x8a\xff" + b"\x7f" * 255 + b"K\x01s.",
    "numbers that collide": b"}\x8a\x0c" + b"\x7f" * 12 + b"K\x01s.",
    "a long name": b"\x80\x04X\x00\x00\x10\x00" + b"x" * 2**20 + b"X\x01\x00\x00\x00y\x93.",
}


def refused_in_bounds(read, path: Path) -> bool:
    """Whether a reader raises a ValueError that names the file, in a process of its own with 20 s and 600 MB."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 600 * 2**20,) * 2)
        try:
            read(path)
        except ValueError as error:
            os._exit(0 if path.name in str(error) and "memory than there is" not in str(error) else 3)
        except BaseException:  # noqa: BLE001
            os._exit(2)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_pickle_has_bounds(tmp_path, case):
    """C1: a process that dies or hangs, 2.6 GB."""
    assert refused_in_bounds(read_model_pt, model_pt(tmp_path, b"\x80\x02" + PROGRAMS[case]))


def test_records_cannot_overlap(tmp_path):
    path = model_pt(tmp_path, b"\x80\x02}.", **{"data/0": b"x" * 1000, "data/1": b"y" * 1000})
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"model/data/{i}").header_offset for i in range(2))
    entry = raw.rindex(b"model/data/1") - 46 + 42  # where the central directory says where the second one lies
    path.write_bytes(raw[:entry] + first.to_bytes(4, "little") + raw[entry + 4 :])
    assert second != first
    with pytest.raises(ValueError, match="model.pt is damaged: its record 'model/data/1' overlaps another|Overlap"):
        read_model_pt(path)


def test_a_layer_without_inputs_takes_no_memory(tmp_path):
    """C1: 1.3 GB for a first layer of no numbers."""
    from checkpoints import content_of, saved

    content = content_of("totalvi")
    content["model_state_dict"]["encoder.encoder.fc_layers.Layer 0.0.weight"] = torch.zeros(20_000, 0)
    assert refused_in_bounds(from_scvi_tools, saved(content, tmp_path))


def test_weights_of_scvi_tools_are_finite(tmp_path):
    from checkpoints import content_of, saved

    content = content_of("scvi")
    content["model_state_dict"]["px_r"][0] = torch.nan
    with pytest.raises(ValueError, match=r"model.pt cannot be opened.*'rna.log_theta' holds NaN"):
        from_scvi_tools(saved(content, tmp_path))


# counts -------------------------------------------------------------------------------------------------------------


def broken(part: str, change, form=sparse.csr_matrix):
    counts = form(np.array([[1, 0, 2], [0, 3, 0]], dtype=np.float32))
    changed = change(getattr(counts, part).copy())
    setattr(counts, part, changed)
    return counts


def put(place: int, value: int):
    def change(values):
        values[place] = value
        return values

    return change


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix], ids=["csr", "csc"])
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("indices", put(0, -1)),
        ("indices", put(-1, 10**8)),
        ("indices", put(0, 3)),
        ("indptr", put(1, 9)),
        ("indptr", put(0, 1)),
        ("indptr", put(1, -(2**31))),
        ("indptr", lambda values: values.astype(np.int8)),
        ("indptr", put(-1, 2**30)),
        ("indptr", lambda values: values[:-1]),
        ("indices", lambda values: values[:-1]),
        ("indices", lambda values: values.astype(np.float64)),
        ("data", lambda values: values[:-1]),
        ("data", lambda values: values.astype(np.complex64)),
    ],
    ids=[
        "-1",
        "10**8",
        "3",
        "descends",
        "not 0",
        "far below",
        "bytes",
        "far end",
        "short pointer",
        "short",
        "floats",
        "few values",
        "complex",
    ],
)
def test_a_corrupt_sparse_matrix_is_refused(form, part, change):
    """A15: another cell's latent, or a dead process."""
    with pytest.raises(ValueError, match=r"^data\.X (is corrupt|holds values of the type)"):
        whole(broken(part, change, form), "data.X")


@pytest.mark.parametrize("where", ["rna", "prot"])
def test_a_corrupt_file_is_refused(where, fitted, tmp_path):
    """A15, from the file to the verb."""
    fitted[where].X = sparse.csr_matrix(
        np.nan_to_num(np.asarray(fitted[where].X.todense() if sparse.issparse(fitted[where].X) else fitted[where].X))
    )
    fitted.write_h5mu(tmp_path / "data.h5mu")
    with h5py.File(tmp_path / "data.h5mu", "r+") as file:
        file[f"mod/{where}/X/indices"][3] = 10**8
    import mudata

    mdata = mudata.read_h5mu(tmp_path / "data.h5mu")
    with pytest.raises(ValueError, match=rf"mdata\['{where}'\]\.X is corrupt: it has an entry at place 100000000"):
        av.tl.latent(mdata, model="totalanvi")


def test_stored_zeros_change_nothing():
    """A12: thinning drew once for every stored zero."""
    mdata = cite(80)
    counts = sparse.csr_matrix(mdata["rna"].X)
    with_zeros = counts.copy()
    rows = np.repeat(np.arange(80), 3)
    extra = sparse.csr_matrix((np.ones(240), (rows, np.tile([1, 5, 9], 80))), shape=counts.shape)
    with_zeros = (counts + extra).tocsr()
    with_zeros.data = np.asarray(counts[with_zeros.nonzero()]).ravel().astype(np.float32)
    assert (with_zeros.data == 0).any() and (with_zeros != counts).nnz == 0
    assert (canonical(with_zeros, "X").data != 0).all()
    latents = []
    for given in (counts, with_zeros):
        data = mdata.copy()
        data["rna"].X = given
        av.tl.totalanvi(data, max_epochs=1)
        latents.append(data.obsm["X_totalanvi"])
    np.testing.assert_array_equal(*latents)


def test_sound_counts_share_their_memory():
    counts = sparse.csr_matrix(np.array([[1, 0, 2], [0, 3, 0]], dtype=np.float32))
    assert np.shares_memory(canonical(counts, "X").data, counts.data)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, MemoryError, SystemError, ValueError])
def test_every_error_of_a_writer_names_the_file(error):
    with (
        pytest.raises(ValueError, match=f"place/name cannot be written .{error.__name__}: .?of a library"),
        writing("place/name"),
    ):
        raise error("of a library")


# HDF5 ---------------------------------------------------------------------------------------------------------------


def point_elsewhere(file: h5py.File, how: str, secret: Path) -> None:
    if how == "external link":
        file["uns/x"] = h5py.ExternalLink(str(secret), "/")
    elif how == "soft link":
        file["uns/x"] = h5py.SoftLink("/X")
    elif how == "external storage":
        file["uns"].create_dataset("x", (4,), "u1", external=[(str(secret), 0, 4)])
    elif how == "virtual":
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "data", (4,))
        file["uns"].create_virtual_dataset("x", layout)
    else:
        file["uns"].create_dataset("x", (10**6, 10**6), "f4", chunks=(100, 100))


@pytest.mark.parametrize("how", ["external link", "soft link", "external storage", "virtual", "no numbers"])
def test_hdf5_cannot_point_elsewhere(tmp_path, how):
    """C4: local files were read as part of a stranger's."""
    secret = tmp_path / "secret"
    with h5py.File(secret, "w") as file:
        file["data"] = np.arange(4, dtype=np.float32)
    path = tmp_path / "data.h5ad"
    AnnData(np.ones((3, 2), dtype=np.float32), uns={"y": 1}).write_h5ad(path)
    check_hdf5(path)
    with h5py.File(path, "r+") as file:
        point_elsewhere(file, how, secret)
    with pytest.raises(ValueError, match=r"data\.h5ad is refused: '/uns/x'"):
        check_hdf5(path)


@pytest.mark.parametrize("ending", [".h5ad", ".h5mu"])
def test_data_of_a_hub_are_looked_at_before_they_are_read(fitted, tmp_path, ending, monkeypatch):
    """The door of `io.data_from_hub`: what is refused is never opened by what would follow it."""
    from anvi._store import read_data

    secret, path = tmp_path / "secret", tmp_path / f"data{ending}"
    with h5py.File(secret, "w") as file:
        file["data"] = np.arange(4, dtype=np.float32)
    with quiet_mudata():
        fitted.write(path) if ending == ".h5mu" else fitted["rna"].write_h5ad(path)
    with h5py.File(path, "r+") as file:
        point_elsewhere(file, "external link", secret)
    for reader in (anndata, mudata):
        for name in ("read_h5ad", "read_h5mu"):
            monkeypatch.setattr(reader, name, lambda *_: pytest.fail("it was read"), raising=False)
    with pytest.raises(ValueError, match="is refused: '/uns/x'"):
        read_data(path)


HOSTILE = {
    "counts that are not there": ("mod/rna/X", (300, 60), None),
    "counts in another file": ("mod/rna/X", None, "reference.h5mu"),
    "more counts than cells": ("mod/rna/X", (10**6, 10**6), "reference.h5mu"),
    "a model in another file": ("uns/totalanvi/model/weights", None, "reference.h5mu"),
    "a model that is not there": ("uns/totalanvi/model/weights", (10**6, 10**6), "weights|reference.h5mu"),
    "names of cells that are not there": ("obs/_index", (10**6, 10**6), "reference.h5mu"),
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE)
def test_a_local_file_as_a_reference(fitted, tmp_path, case):
    """It is read in this process: its counts not at all, all else gives the right answer or an error with its name."""
    where, shape, told = case
    path, secret, query = tmp_path / "reference.h5mu", tmp_path / "secret", fitted["rna"][:50].copy()
    secret.write_bytes(b"nothing of HDF5")
    with quiet_mudata():
        fitted.write(path)
    query.obs["batch"] = fitted.obs["batch"].reindex(query.obs_names)
    query.obs = query.obs[["batch"]]
    query.obsm.clear(), query.uns.clear()
    for name in filter(None, [*query.layers]):  # anndata 0.13 calls X the layer None
        del query.layers[name]
    with h5py.File(path, "r+") as file:
        del file[where]
        if shape is None:
            file[where] = h5py.ExternalLink(str(secret), "/")
        else:
            file.create_dataset(where, shape, "f4", chunks=True)
            file[where].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def ask(reference):
        answer = query.copy()
        av.tl.map_query(answer, reference, model="totalanvi", max_epochs=0)
        return answer.obsm["X_totalanvi"]

    if told is None:
        np.testing.assert_array_equal(ask(path), ask(fitted))
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError, KeyError), match=told):
        ask(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_file_that_hdf5_does_not_survive_is_refused(tmp_path, monkeypatch, how):
    """Its library may do either when a file is corrupt; it is read in another process first."""

    def another(command, **options):
        code = "import os; os.abort()" if how == "dies" else "import time; time.sleep(60)"
        return run([command[0], "-c", code], **options)

    run = subprocess.run
    monkeypatch.setattr(_files.subprocess, "run", another)
    monkeypatch.setattr(_files, "HDF5_SECONDS", 1.0)
    (tmp_path / "data.h5ad").write_bytes(b"x")
    told = "HDF5 dies of it" if how == "dies" else "HDF5 was not done with it"
    with pytest.raises(ValueError, match=rf"data\.h5ad is .*{told}"):
        check_hdf5(tmp_path / "data.h5ad")


def test_no_hdf5_is_told_with_its_name(tmp_path):
    (tmp_path / "data.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))
    with pytest.raises((ValueError, OSError), match=r"data\.h5ad"):
        check_hdf5(tmp_path / "data.h5ad")


def test_a_link_stays_one_and_what_it_points_at_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "far" / "old.html")
    _files.write_bytes(tmp_path / "link.html", b"new")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "far" / "old.html").read_text() == "new"
    assert [file.name for file in (tmp_path / "far").iterdir() if not file.name.startswith(".")] == ["old.html"]


def modes(path: Path) -> dict[str, int]:
    """Modes of a file, or of a folder and what is in it."""
    return {str(entry.relative_to(path)): entry.stat().st_mode & 0o7777 for entry in [path, *path.rglob("*")]}


@pytest.mark.skipif(os.name == "nt", reason="no modes")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_what_replaces_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "fit.checkpoint"
    write_bytes(path, b"old")
    umask = os.umask(0)
    os.umask(umask)
    assert modes(path) == {".": 0o666 & ~umask}  # a new one goes by the umask
    path.chmod(mode)
    with replacing(path) as part:
        assert modes(part) == {".": 0o600}  # nobody looks in on the way
        part.write_bytes(b"new")
    assert modes(path) == {".": mode} and path.read_bytes() == b"new"


@pytest.mark.skipif(os.name == "nt", reason="no modes")
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_what_replaces_a_folder_keeps_its_modes(fitted, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda one, other: False)
    path = tmp_path / "model"
    av.write_model(fitted, path, model="scvi")
    for entry in path.iterdir():
        entry.chmod(0o600)
    (path / "README.md").chmod(0o664)
    path.chmod(0o2750)
    before = modes(path)
    av.write_model(fitted, path, model="scvi", overwrite=True)
    assert modes(path) == before and before["config.json"] == 0o600


@pytest.mark.skipif(os.name == "nt", reason="no modes")
@pytest.mark.parametrize("ending", ["h5mu", "zarr"])
@pytest.mark.parametrize("kept", ["matrices", "none"])
def test_a_fit_in_a_file_keeps_its_modes(tmp_path, ending, kept):
    path, mdata = tmp_path / f"data.{ending}", cite(60)
    with quiet_mudata():
        mdata.write_zarr(path) if ending == "zarr" else mdata.write(path)
    for entry in [*path.rglob("*"), path]:
        entry.chmod(0o700 if entry.is_dir() else 0o600)
    before = modes(path)
    av.io.save_backed(av.io.open_backed(path) if kept == "matrices" else mdata, path)
    now = modes(path)
    assert {name: now[name] for name in before if name in now} == {name: before[name] for name in before if name in now}
    assert now["."] == before["."] and (ending != "zarr" or len(before.keys() & now.keys()) > 50)


def test_a_model_is_a_folder_and_data_are_a_file(fitted, tmp_path):
    with pytest.raises(ValueError, match="a model is a folder, and '.h5mu' is how files of data end"):
        av.write_model(fitted, tmp_path / "model.h5mu", model="scvi")
    (tmp_path / "data.h5mu").write_text("data")
    with pytest.raises(FileNotFoundError, match=r"Open it as data, then av\.get\.model\(data\)"):
        av.read_model(tmp_path / "data.h5mu")


def test_a_link_out_of_the_folder_is_not_sent(fitted, tmp_path):
    from anvi._store import _check_sources

    av.write_model(fitted, tmp_path / "model", model="scvi")
    _check_sources(tmp_path / "model", None)
    (tmp_path / "secret").write_text("password")
    (tmp_path / "model" / "README.md").unlink()
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="README.md is a link that leaves the folder"):
        _check_sources(tmp_path / "model", None)


def test_data_backed_by_a_file_that_points_elsewhere_are_not_sent(fitted, tmp_path):
    from anvi._store import _check_sources

    path = tmp_path / "data.h5ad"
    AnnData(np.ones((3, 2), dtype=np.float32), uns={"y": 1}).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["layers/x"] = h5py.SoftLink("/X")
    with pytest.raises(ValueError, match="is refused: '/layers/x'"):
        _check_sources(tmp_path, read_h5ad(path, backed="r"))


# names that are those of folders in zarr ------------------------------------------------------------------------------

LONG = "γ" * 150  # 300 bytes


@pytest.fixture
def in_zarr(tmp_path):
    """Writes cells as a zarr, and gives its path."""

    def write(change: str = "", kind: str = "MuData") -> Path:
        mdata = cite(80, n_genes=30, n_proteins=6)
        column = {"class": "cell_type", "batch": "batch"}.get(change)
        if column is not None:
            mdata.obs[column] = (
                mdata.obs[column].astype(str).where(mdata.obs[column] != mdata.obs[column].iloc[0], LONG)
            )
        if change == "protein":
            mdata["prot"].var_names = [LONG, *mdata["prot"].var_names[1:]]
        data = mdata
        if kind == "AnnData":
            data = mdata["rna"][mdata["prot"].obs_names].copy()
            data.obs = mdata.obs.loc[data.obs_names, ["batch", "cell_type"]].copy()
            data.obsm["prot"] = mdata["prot"].X.toarray() if sparse.issparse(mdata["prot"].X) else mdata["prot"].X
            data.uns["prot_names"] = np.array(mdata["prot"].var_names, dtype=object)
        with quiet_mudata(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Writing zarr v2 data")
            data.write_zarr(tmp_path / "data.zarr")
        return tmp_path / "data.zarr"

    return write


@pytest.mark.parametrize("verb, kind", [("scanvi", "AnnData"), ("scanvi", "MuData"), ("totalanvi", "AnnData")])
def test_a_class_that_is_too_long_for_zarr(in_zarr, verb, kind, no_training):
    path = in_zarr("class", kind)
    where = {"prot_obsm": "prot"} if verb == "totalanvi" else {}
    with pytest.raises(ValueError, match=r"labels_key='cell_type'.*has 300 bytes, and a \.zarr.*room for 255"):
        getattr(av.tl, verb)(path, batch_key="batch", max_epochs=1, **where)
    if kind == "AnnData":
        assert not av.pp.check(path, batch_key="batch", **where).ok


def test_a_protein_that_is_too_long_for_zarr(in_zarr, no_training):
    with pytest.raises(ValueError, match=r"names of proteins: the name 'γ+\.\.\.' has 300 bytes"):
        av.tl.totalvi(in_zarr("protein", "AnnData"), batch_key="batch", max_epochs=1, prot_obsm="prot")


def test_a_key_that_is_too_long_for_zarr(in_zarr, no_training):
    with pytest.raises(ValueError, match=r"key_added='k+': the name 'k+\.\.\.' has 262 bytes"):
        av.tl.totalanvi(in_zarr(), batch_key="batch", max_epochs=1, key_added="k" * 240)


def test_names_that_a_mudata_in_zarr_holds_and_a_ranking_does_not(in_zarr):
    """A MuData has its tables as arrays, so that a class may be as long as it likes."""
    path = in_zarr("class")
    av.tl.totalanvi(path, batch_key="batch", max_epochs=1)
    assert LONG in av.get.model(av.io.open_backed(path)).classes
    for verb, more in ((av.tl.differential_expression, {"groupby": "cell_type"}), (av.tl.attributions, {"n_cells": 9})):
        with pytest.raises(ValueError, match=r"uns\['\w+'\]: the name 'γ+\.\.\.' has 300 bytes"):
            verb(path, **more)
    groups = {"groupby": "cell_type", "groups": [LONG], "inplace": False, "n_samples": 2}
    assert av.tl.differential_expression(path, **groups) is not None
    with pytest.raises(ValueError, match="key_added='k+': the name 'k+.*has 256 bytes"):
        av.tl.differential_expression(path, groupby="batch", key_added="k" * 256)
    with pytest.raises(ValueError, match=r"panel_key='cell_type': the name 'γ+"):
        av.pp.panels(path, panel_key="cell_type")


# the object ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["obs", "obsm", "uns"])
def test_a_failed_write_leaves_the_object_as_it_was(fitted, monkeypatch, slot):
    """C5: a new latent beside the old model."""
    before = contents(fitted)

    def fails(*arguments, **options):
        raise KeyboardInterrupt

    write = getattr(slots.Writer, slot)
    monkeypatch.setattr(slots.Writer, slot, fails)
    with pytest.raises(KeyboardInterrupt):
        av.tl.totalanvi(fitted, max_epochs=1, random_state=7)
    if slot == "obs":
        with pytest.raises(KeyboardInterrupt):
            av.tl.predict(fitted, model="totalanvi")
    monkeypatch.setattr(slots.Writer, slot, write)
    assert_same(contents(fitted), before)


def test_minify_cut_short_leaves_an_object_that_answers(fitted, monkeypatch):
    """C6: emptied, and not marked."""
    from anvi._data import minified

    expected = av.tl.latent(fitted, model="totalanvi", inplace=False)
    empty, done = minified._empty, []

    def dies(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return empty(*arguments)

    monkeypatch.setattr(minified, "_empty", dies)
    with pytest.raises(KeyboardInterrupt):
        av.tl.minify(fitted, model="totalanvi")
    np.testing.assert_array_equal(av.tl.latent(fitted, model="totalanvi", inplace=False), expected)


# names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [".", "..", "a\0b", "a\ud800", "_index"], ids=ascii)
def test_a_key_that_no_file_can_hold_is_refused_at_the_start(key, no_training):
    """C8: the fit is gone after h5mu."""
    with pytest.raises(ValueError, match="key_added.*(cannot be written to a file|must be a plain name)"):
        av.tl.scvi(cite(60), key_added=key)


@pytest.mark.parametrize("name", [".", "a\0b", "a\ud800", "_index"], ids=ascii)
def test_a_class_that_no_file_can_hold_is_refused_at_the_start(name, no_training):
    mdata = cite(60)
    for part in (mdata, mdata["rna"]):
        if "cell_type" in part.obs:
            labels = part.obs["cell_type"].astype(object)
            part.obs["cell_type"] = pd.Series(
                np.where(np.arange(len(labels)) % 3 == 0, name, labels), labels.index, dtype=object
            )
    with pytest.raises(ValueError, match="labels_key='cell_type': the name .* cannot be written"):
        av.tl.scanvi(mdata)


@pytest.mark.parametrize("what", ["gene", "protein", "batch"])
def test_features_and_batches_that_no_file_can_hold(what, no_training):
    mdata = cite(60)
    if what == "batch":
        for part in (mdata, mdata["rna"]):
            if "batch" in part.obs:
                part.obs["batch"] = (part.obs["batch"].astype(str) + "\0x").astype("category")
    else:
        mod = mdata["rna" if what == "gene" else "prot"]
        mod.var_names = [f"{name}\0" if i == 3 else name for i, name in enumerate(mod.var_names)]
    with pytest.raises(ValueError, match="cannot be written to a file"):
        av.tl.totalvi(mdata, batch_key="batch")


# cards --------------------------------------------------------------------------------------------------------------

HOSTILE = (
    "![x](https://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "a\n\n# Heading\n\nb",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "`code` *bold* __strong__ ~~gone~~",
    "&lt;script&gt;",
    "\\| escaped",
)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_in_a_card_is_only_a_name(name):
    """C11: images and headings from the names of classes."""
    from anvi.io._card import markdown_table

    markdown = pytest.importorskip("markdown_it")
    html = (
        markdown.MarkdownIt("commonmark")
        .enable("table")
        .render(markdown_table(pd.DataFrame({"class": [name], "n": [3]})))
    )
    for tag in ("<img", "<a ", "<h1", "<em>", "<strong>", "<code>", "<s>", "<script"):
        assert tag not in html
    assert html.count("<td>") == 2


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_text_in_markdown_has_no_sign_that_means_anything(name):
    from anvi.io._card import as_code, as_text

    text = as_text(name)
    assert "\n" not in text and "<" not in text
    assert not [i for i, sign in enumerate(text) if sign in "`*[]|~" and (i == 0 or text[i - 1] != "\\")]
    code = as_code(f"`{name}``", cell=True)
    assert "\n" not in code and code.startswith("``` ") and code.endswith(" ```")


def test_a_report_escapes_the_names_of_classes(fitted, tmp_path):
    for part in (fitted, *fitted.mod.values()):
        for column in part.obs.columns:
            if isinstance(part.obs[column].dtype, pd.CategoricalDtype) and "pDC" in part.obs[column].cat.categories:
                part.obs[column] = part.obs[column].cat.rename_categories({"pDC": "<img src=x>"})
    fitted.uns["totalanvi"]["classes"] = [
        "<img src=x>" if name == "pDC" else name for name in fitted.uns["totalanvi"]["classes"]
    ]
    assert "<img src=x>" not in av.pl.report(fitted, model="totalanvi")


def test_an_address_holds_nothing_else(fitted):
    with pytest.raises(ValueError, match="is no address"):
        av.io.model_card(fitted, key="scvi", training_data_url="https://a.b) ![x](https://evil.example")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files to others")
def test_what_replaces_the_file_of_somebody_else_is_theirs(tmp_path):
    """As in containers, where root writes into the folders of users: else a private file would lock its owner out."""
    path = tmp_path / "private"
    path.write_bytes(b"old")
    os.chown(path, 1234, 1234)
    path.chmod(0o600)
    write_bytes(path, b"new")
    there = path.stat()
    assert (there.st_uid, there.st_gid, there.st_mode & 0o777, path.read_bytes()) == (1234, 1234, 0o600, b"new")
