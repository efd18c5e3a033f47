"""Files of torch.save, read and not unpickled: plain data come out, hostile files are refused by name and not run."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoints import CHECKPOINTS, NAMES, saved

from anvi.io import from_scvi_tools
from anvi.io._model_pt import read_model_pt

# --- hostile and damaged files ---------------------------------------------------------------------------------------


class Hostile:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path: Path, program: bytes, **records: bytes) -> Path:
    """A file in torch's zip format around a pickle program."""
    with zipfile.ZipFile(path / "model.pt", "w") as file:
        for name, data in {"data.pkl": program, "byteorder": b"little", **records}.items():
            file.writestr(f"model/{name}", data)
    return path / "model.pt"


def text(value: str) -> bytes:
    """A short string as a pickle instruction."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize("text_from", ["plain", "arrow"])
def test_a_history_of_pandas_3_is_read_past(tmp_path, text_from):
    """Its pickles call a DataFrame by another name, and hold text in arrays of its own or of pyarrow."""
    program = (Path(__file__).parent / "golden" / f"pandas3_{text_from}.pkl").read_bytes()
    content = read_model_pt(archive(tmp_path, program))
    assert set(content["attr_dict"]) == {"history_", "names", "i"}
    assert content["attr_dict"]["names"].tolist() == ["a", "b"]


def hostile_programs(sentinel: Path) -> dict[str, tuple[bytes, str]]:
    """Programs that would create the sentinel file, and the name by which each has to be refused."""
    command = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w').close()"
    system = f"{os.system.__module__} system".split()
    call = b"\x93" + text(command) + b"\x85R."  # STACK_GLOBAL, the argument, a tuple of it, REDUCE, STOP
    old = f"c{system[0]}\nsystem\n".encode()
    memo = b"\x94"
    return {
        "os.system": (pickle.dumps(Hostile(os.system, command), 2), f"'{system[0]}.system'"),
        "builtins.eval": (pickle.dumps(Hostile(eval, code), 2), "'__builtin__.eval'"),
        "builtins.exec, protocol 5": (pickle.dumps(Hostile(exec, code), 5), "'builtins.exec'"),
        "builtins.getattr": (pickle.dumps(Hostile(getattr, "", "upper"), 4), "'builtins.getattr'"),
        "deep inside": (
            pickle.dumps({"attr_dict": {"init_params_": {"kwargs": [(Hostile(os.system, command),)]}}}, 2),
            f"'{system[0]}.system'",
        ),
        "as a key": (pickle.dumps({Hostile(os.system, command): 1}, 4), f"'{system[0]}.system'"),
        "in an object array": (
            pickle.dumps(np.array([Hostile(os.system, command)], dtype=object), 2),
            f"'{system[0]}.system'",
        ),
        "a class of torch": (pickle.dumps(torch.nn.Linear, 2), "'torch.nn.modules.linear.Linear'"),
        "torch's other loader": (
            b"\x80\x02ctorch.storage\n_load_from_bytes\nU\x01x\x85R.".replace(b"U\x01x", text("x")),
            "'torch.storage._load_from_bytes'",
        ),
        "names from the memo": (
            b"\x80\x04" + text(system[0]) + memo + b"0" + text("system") + memo + b"0h\x00h\x01" + call,
            f"'{system[0]}.system'",
        ),
        "a memo entry that is replaced": (
            # "numpy" is kept, replaced by "posix" under the same number, and taken out again
            b"\x80\x04"
            + text("numpy")
            + b"q\x05"
            + b"0"
            + text(system[0])
            + b"q\x05"
            + b"0h\x05"
            + text("system")
            + call,
            f"'{system[0]}.system'",
        ),
        "a name with a path in it": (
            b"\x80\x04" + text("builtins") + text("dict.fromkeys") + call,
            "builtins.dict.fromkeys",
        ),
        "an allowed module, another name": (b"\x80\x04" + text("numpy") + text("load") + call, "'numpy.load'"),
        "a pandas reader": (pickle.dumps(pd.read_pickle, 2), f"'{pd.read_pickle.__module__}.read_pickle'"),
        "a name that is no text": (b"\x80\x04K\x01K\x02" + call, "by a value that is no text"),
        "protocol 0": (
            b"(S'" + command.encode() + b"'\ni" + " ".join(system).replace(" ", "\n").encode() + b"\n.",
            "STRING",
        ),
        "INST": (b"(" + text(command) + b"i" + "\n".join(system).encode() + b"\n.", "INST"),
        "OBJ": (b"\x80\x02(" + old + text(command) + b"o.", f"'{system[0]}.system'"),
        "OBJ of an allowed name": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
        "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
        "PERSID": (b"Pmodule\n.", "PERSID"),
        "a call of what is no name": (b"\x80\x04" + text("system") + text(command) + b"\x85R.", "not a name"),
        "a call of a storage": (b"\x80\x02ctorch\nFloatStorage\n)R.", "'torch.FloatStorage'"),
        "arguments that are no tuple": (b"\x80\x02ccollections\nOrderedDict\n]R.", "not a name"),
        "a name that is filled": (b"\x80\x02ccollections\nOrderedDict\n}b.", "fills a _Global"),
        "a tensor of another storage": (
            b"\x80\x02(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x01tQ.",
            "'os.system'",
        ),
        "records outside": (
            b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + text("../secret") + text("cpu") + b"K\x01tQ.",
            "'../secret' is not the name of a record",
        ),
        "bytes in another encoding": (
            b"\x80\x02c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.",
            "encoding 'rot13'",
        ),
        "an array of records": (b"\x80\x02cnumpy\ndtype\n" + text("V8") + b"\x85R.", "type 'V8'"),
    }


HOSTILE = list(hostile_programs(Path("/nowhere")))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_not_run(tmp_path, case, monkeypatch):
    sentinel = tmp_path / "ran"
    program, name = hostile_programs(sentinel)[case]
    path = archive(tmp_path, program)
    forbid_unpickling(monkeypatch)
    with pytest.raises(ValueError, match="model.pt") as error:
        from_scvi_tools(path)
    assert name in str(error.value)
    assert not sentinel.exists()


def test_the_hostile_pickles_do_run_when_they_are_unpickled(tmp_path):
    """Otherwise the test above would say nothing."""
    for case in ("os.system", "builtins.eval", "deep inside", "names from the memo", "a memo entry that is replaced"):
        sentinel = tmp_path / case.replace(" ", "_")
        pickle.load(io.BytesIO(hostile_programs(sentinel)[case][0]))
        assert sentinel.exists(), case


def forbid_unpickling(monkeypatch) -> None:
    """Make every way of unpickling fail."""

    def never(*args, **kwargs):
        pytest.fail("something was unpickled")

    class Never(pickle._Unpickler):  # a class, since a module that is imported meanwhile may inherit from it
        __init__ = never

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(pickle, "Unpickler", Never)
    monkeypatch.setattr(pickle, "_Unpickler", Never)


def test_nothing_is_unpickled_when_a_good_file_is_opened(monkeypatch):
    forbid_unpickling(monkeypatch)
    assert from_scvi_tools(CHECKPOINTS / "totalanvi").name == "totalanvi"


def test_what_is_read_is_what_torch_reads():
    """With all of pickle's power, which these files are trusted with; but for the history, which is not kept."""
    for name in NAMES:
        path = CHECKPOINTS / name / "model.pt"
        theirs = torch.load(path, map_location="cpu", weights_only=False)
        ours = read_model_pt(path)
        for content in (ours, theirs):
            assert set(content["attr_dict"].pop("history_")) > {"elbo_train"}
        assert_same(ours, theirs)


def assert_same(ours, theirs) -> None:
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, torch.Tensor):
        np.testing.assert_array_equal(ours, theirs.numpy(), strict=True)
    elif isinstance(theirs, np.ndarray):
        np.testing.assert_array_equal(ours, theirs, strict=True)
    else:
        assert ours == theirs
        assert type(ours) is type(theirs)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2, 2**40, 2**70, 0.5, True, False, None, "ü", b"\x00\xff"], (1, "b"): ()},
        {"nested": [{}, [], ({"a": [()]},)], "many": list(range(300)), "long": "x" * 70_000},
        {"arrays": [np.arange(6).reshape(2, 3), np.asfortranarray(np.eye(3)), np.array([["a", None]], dtype=object)]},
        {"kinds": [np.array([True]), np.array([1.5], "f4"), np.array(["ab", "c"]), np.array([], "i8"), np.array(3)]},
        {"scalars": [np.float64(1.5), np.int32(-3), np.bool_(True), np.str_("x")]},
        {"tensors": [torch.arange(6.0).view(2, 3).T, torch.zeros(0, 3), torch.tensor(2), torch.ones(3).double()]},
        {"views": [torch.arange(12)[3:9:2], torch.ones(2, 2) > 0, torch.nn.Parameter(torch.ones(2))]},
    ],
    ids=["literals", "containers", "arrays", "kinds", "scalars", "tensors", "views"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_data_of_every_kind_is_read(tmp_path, value, protocol):
    path = saved(value, tmp_path, pickle_protocol=protocol)
    if "tensors" in value or "views" in value:
        (ours,), (theirs,) = read_model_pt(path).values(), value.values()
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other.detach().numpy(), strict=True)
    elif "scalars" in value:
        assert read_model_pt(path) == {"scalars": [1.5, -3, True, "x"]}
    elif "arrays" in value or "kinds" in value:
        (ours,), (theirs,) = read_model_pt(path).values(), value.values()
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    else:
        assert read_model_pt(path) == value


@pytest.mark.parametrize("value, kind", [({"a": 1}, "dict"), ([1], "list"), (np.float64(1), None), (b"x", "bytes")])
def test_an_array_of_objects_holds_text_and_numbers_only(tmp_path, value, kind):
    array = np.empty(2, dtype=object)
    array[1] = value
    path = saved([array], tmp_path)
    if kind is None:
        assert read_model_pt(path)[0].tolist() == [None, 1.0]
    else:
        with pytest.raises(ValueError, match=f"an array holds objects of the type {kind}"):
            read_model_pt(path)


def tensor(offset: int, size: int, stride: int, n: int) -> bytes:
    """A program that makes one tensor of record 0."""
    number = lambda value: b"J" + struct.pack("<i", value)
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(n) + b"tQ"
    shape = number(size) + b"\x85" + number(stride) + b"\x85"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape + b"\x89NtR."


def test_a_tensor_cannot_look_beyond_its_numbers(tmp_path):
    four = {"data/0": np.arange(4, dtype="<f4").tobytes()}
    assert read_model_pt(archive(tmp_path, tensor(1, 2, 2, 4), **four)).tolist() == [1.0, 3.0]
    for offset, size, stride, n in [
        (1, 4, 1, 4),
        (0, 3, 2, 4),
        (-1, 2, 1, 4),
        (0, 2, -1, 4),
        (0, 4, 0, 9),
        (0, 9, 0, 4),
    ]:
        with pytest.raises(ValueError, match="is damaged"):
            read_model_pt(archive(tmp_path, tensor(offset, size, stride, n), **four))
    with pytest.raises(ValueError, match="lacks the record 'data/0'"):
        read_model_pt(archive(tmp_path, tensor(0, 1, 1, 1)))


def test_an_array_is_filled_once_and_with_as_much_as_it_holds(tmp_path):
    empty = b"\x80\x02cnumpy\nndarray\n)R"
    dtype = b"cnumpy\ndtype\n" + text("f4") + b"\x85R"

    def fill(n: int, n_bytes: int) -> bytes:
        return (
            b"(K\x01J" + struct.pack("<i", n) + b"\x85" + dtype + b"\x89C" + bytes([n_bytes]) + bytes(n_bytes) + b"tb"
        )

    assert read_model_pt(archive(tmp_path, empty + fill(2, 8) + b".")).tolist() == [0.0, 0.0]
    for program in (fill(3, 8), fill(-2, 8), fill(2, 8) + fill(1, 4)):
        with pytest.raises(ValueError, match="is damaged"):
            read_model_pt(archive(tmp_path, empty + program + b"."))


def test_a_cut_file_is_damaged_wherever_it_is_cut(tmp_path):
    whole = (CHECKPOINTS / "scvi" / "model.pt").read_bytes()
    path = tmp_path / "model.pt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole file of torch's zip format"):
            from_scvi_tools(path)
    path.write_bytes(whole.replace(b"gene0", b"gene9", 1))
    with pytest.raises(ValueError, match="not a whole file"):  # the check sum
        from_scvi_tools(path)


def test_a_file_without_its_pickle_or_with_two_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/version", "3")
    with pytest.raises(ValueError, match=r"not written by torch\.save: it holds no data\.pkl"):
        from_scvi_tools(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("one/data.pkl", b"N.")
        file.writestr("two/data.pkl", b"N.")
    with pytest.raises(ValueError, match=r"it holds 2 data\.pkl"):
        from_scvi_tools(path)


def test_a_compressed_record_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model/data.pkl", b"N" * 10_000 + b".")
    with pytest.raises(ValueError, match="'data.pkl' is compressed"):
        from_scvi_tools(path)


def test_a_pickle_that_ends_early_or_makes_no_sense_is_damaged(tmp_path):
    for program in (
        b"",
        b"\x80\x02",
        b".",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02h\x05.",
        b"\x80\x02]}a",
        b"0.",
        b"\x80\x02(K\x01.",
    ):
        with pytest.raises(ValueError, match="model.pt"):
            from_scvi_tools(archive(tmp_path, program))


def test_no_damage_to_a_pickle_is_more_than_a_value_error(tmp_path):
    """A few bytes at random places: it is read as something else, or it is refused."""
    with zipfile.ZipFile(CHECKPOINTS / "scvi" / "model.pt") as file:
        program = file.read("model/data.pkl")
        records = {name.removeprefix("model/"): file.read(name) for name in file.namelist() if "/data/" in name}
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(program)
        for place in rng.integers(len(program), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        try:
            from_scvi_tools(archive(tmp_path, bytes(damaged), **records))
        except ValueError:
            refused += 1
    assert 0 < refused < 150
