"""Read what `torch.save` wrote without unpickling it: nothing that the file names is imported or called.

A pickle is a program, and the files of scvi-tools need its full power, so `torch.load(weights_only=True)` refuses them.
Here the program is run by an interpreter of our own, in which a name such as `numpy.ndarray` is looked up in a table
that holds a few functions of this file, all of which make plain data. A name that is not in the table ends the reading.
Source: spec section 7.3.
"""

import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from anvi._files import reading

_STORAGES = {
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
    "torch LongStorage": "<i8",
    "torch BoolStorage": "?",
}
# The training history and, in object arrays, indices: read past, and not kept.
_INERT = {
    "builtins bytearray",
    "builtins slice",
    "pandas DataFrame",  # pandas 3 has other names for the same things, and text from pyarrow where that is there
    "pandas Index",
    "pandas RangeIndex",
    "pandas Series",
    "pandas StringDtype",
    "pandas._libs.arrays __pyx_unpickle_NDArrayBacked",
    "pandas._libs.internals _unpickle_block",
    "pandas.arrays ArrowStringArray",
    "pandas.arrays StringArray",
    "pandas.core.frame DataFrame",
    "pandas.core.indexes.base Index",
    "pandas.core.indexes.base _new_Index",
    "pandas.core.indexes.numeric Float64Index",
    "pandas.core.indexes.numeric Int64Index",
    "pandas.core.indexes.range RangeIndex",
    "pandas.core.internals.blocks new_block",
    "pandas.core.internals.managers BlockManager",
    "pandas.core.internals.managers SingleBlockManager",
    "pyarrow.lib _restore_array",
    "pyarrow.lib py_buffer",
    "pyarrow.lib type_for_alias",
}
_PRIMITIVES = (str, int, float, bool, type(None))
# No saved model comes near these: one of 60,000 genes has some 250,000 instructions, 1,000 records and is 12 deep.
MAX_INSTRUCTIONS = 2_000_000
MAX_CONTAINERS = 200_000
MAX_MEMO = 1_000_000
MAX_NESTING = 100
MAX_VALUES = 5_000_000
"""Values in the result, what is shared counted as often as it is met: who walks through it meets it so often."""
MAX_RECORDS = 100_000
_ZIP_HEADER = 30  # bytes before a record, its name not counted


class Inert:
    """Stands for an object that is of no use here."""

    __slots__ = ()


def read_model_pt(path: Path) -> object:
    """Read a file of `torch.save`: dicts, lists, tuples, numbers, text and numpy arrays (also in place of tensors)."""
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            return _Interpreter(_Records(archive, path)).run()
    except ValueError as error:
        if not isinstance(error.__cause__, zipfile.BadZipFile | EOFError | RuntimeError):  # RuntimeError: encrypted
            raise
        raise ValueError(
            f"{path} is not a whole file of torch's zip format ({error.__cause__}). If it is complete, then a very old "
            "scvi-tools saved it: load it there and save it again with a newer one."
        ) from error.__cause__


class _Records:
    """The records of the zip file by the name that they have inside its one folder."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self.archive = archive
        self.path = path
        self._check_bounds()
        programs = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"{path} was not written by torch.save: it holds {len(programs) or 'no'} data.pkl.")
        self.folder = programs[0].removesuffix("data.pkl")
        there = f"{self.folder}byteorder" in archive.namelist()
        self.byteorder = ">" if there and self.read("byteorder").strip() == b"big" else "<"

    def _check_bounds(self) -> None:
        """Raise unless the records lie one behind the other inside the file, and so are together no larger than it."""
        records, end = sorted(self.archive.infolist(), key=lambda info: info.header_offset), 0
        if len(records) > MAX_RECORDS:
            raise ValueError(f"{self.path} is damaged: it claims to hold {len(records):,} records.")
        for info in records:
            if info.header_offset < end:
                raise ValueError(f"{self.path} is damaged: its record '{info.filename}' overlaps another.")
            end = info.header_offset + _ZIP_HEADER + info.compress_size
        if end > self.path.stat().st_size:
            raise ValueError(f"{self.path} is damaged: its records are larger than the file.")

    def read(self, name: str) -> bytes:
        """One record; torch never compresses, so nothing can be larger than the file."""
        try:
            info = self.archive.getinfo(self.folder + name)
        except KeyError:
            raise ValueError(f"{self.path} is damaged: it lacks the record '{name}'.") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{self.path}: the record '{name}' is compressed, which torch never does.")
        if info.file_size != info.compress_size:
            raise ValueError(f"{self.path} is damaged: the record '{name}' has two sizes.")
        return self.archive.read(info)


class _Refused(Exception):
    """The file asks for more than data."""


class _Global:
    """A name in the pickle that is known to the table; cannot be called."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _Interpreter:
    """Runs the pickle program on a stack of plain data; knows the instructions of protocols 2 to 5 that make data."""

    def __init__(self, records: _Records):
        self.records = records
        self.stack: list = []
        self.below: list[list] = []  # the stacks under each mark
        self.memo: dict[int, object] = {}
        self.storages: dict[str, np.ndarray] = {}
        self.n_containers = 0
        # bytes that may still be copied: what the memo holds can be asked for again and again in a few bytes
        self.room = 4 * records.path.stat().st_size + 2**20

    def run(self) -> object:
        """The object that the program makes."""
        path = self.records.path
        try:
            for n, (opcode, argument, _) in enumerate(pickletools.genops(self.records.read("data.pkl"))):
                if opcode.name == "STOP":
                    return _bounded(self.stack.pop())
                if n >= MAX_INSTRUCTIONS or self.n_containers >= MAX_CONTAINERS or len(self.memo) >= MAX_MEMO:
                    raise _Refused("its pickle is larger than that of any model")
                self._step(opcode.name, argument)
        except _Refused as refusal:
            raise ValueError(f"{path} is refused, and nothing in it was run: {refusal}.") from None
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error) as error:
            raise ValueError(f"{path} is damaged: its data.pkl makes no sense ({error}).") from error
        raise ValueError(f"{path} is damaged: its data.pkl has no end.")

    def _copies(self, n_bytes: int) -> None:
        self.room -= n_bytes
        if self.room < 0:
            raise _Refused("its pickle asks for far more memory than the file has bytes")

    def _step(self, name: str, argument) -> None:
        if name in _LITERALS:
            if type(argument) is int and abs(argument) >= 2**1024:
                raise _Refused("its pickle holds a number of more than 1,024 bits")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.n_containers += name.startswith("EMPTY")
            self.stack.append(_CONSTANTS[name]())
        elif name in _LAST_AS_TUPLE:
            self.n_containers += 1
            n = _LAST_AS_TUPLE[name]
            if len(self.stack) < n:
                raise IndexError("a tuple of more values than there are")
            self.stack[-n:] = [tuple(self.stack[-n:])]
        elif name in _FILLS:
            kind, fill, n = _FILLS[name]
            items = self._since_mark() if n is None else [self.stack.pop() for _ in range(n)][::-1]
            if type(self.stack[-1]) is not kind:
                raise TypeError(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} is filled")
            fill(self.stack[-1], items)
        elif name not in ("PROTO", "FRAME"):
            action = getattr(self, f"_{name.lower()}", None)
            if action is None:
                raise _Refused(f"its pickle uses the instruction {name}, which data do not need")
            action(argument)

    def _mark(self, _) -> None:
        self.n_containers += 1
        self.below.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _pop(self, _) -> None:
        self.stack.pop()

    def _pop_mark(self, _) -> None:
        self._since_mark()

    def _tuple(self, _) -> None:
        items = tuple(self._since_mark())
        self.stack.append(items)

    def _binput(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    def _memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    _long_binput, _long_binget = _binput, _binget

    # names, and what is done with them

    def _global(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def _stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise _Refused("its pickle names something by a value that is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        if len(module) + len(name) > 200:
            raise _Refused("its pickle asks for a name of more than 200 letters")
        # __builtin__ is what protocol 2 writes, numpy.core what numpy wrote before version 2
        full = re.sub(r"^__builtin__ ", "builtins ", re.sub(r"^numpy\.core\.", "numpy._core.", f"{module} {name}"))
        if full not in _CONSTRUCTORS and full not in _STORAGES and full not in _INERT:
            raise _Refused(
                f"its pickle asks for '{module}.{name}', which is not among the plain data that a scvi-tools model is "
                "made of (a callable that was passed to the model, such as var_activation, cannot be imported)"
            )
        self.stack.append(_Global(full))

    def _reduce(self, _) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _Refused("its pickle calls something that is not a name")
        if function.name in _STORAGES:
            raise _Refused(f"its pickle calls '{function.name.replace(' ', '.')}'")
        self.n_containers += 1
        if arguments and isinstance(arguments[-1], list | tuple | str | bytes):
            self._copies(64 * max((len(part) for part in arguments if isinstance(part, list | tuple)), default=0))
            self._copies(max((len(part) for part in arguments if isinstance(part, str | bytes)), default=0))
        inert = function.name in _INERT
        self.stack.append(Inert() if inert else _CONSTRUCTORS[function.name](*arguments))

    _newobj = _reduce

    def _build(self, _) -> None:
        """Fill an array with its numbers; what would be put into anything else is of no use."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            self._copies(8 * len(state[4]) if isinstance(state[4], list) else len(state[4]))
            _fill(target, state)
        elif isinstance(target, np.dtype):
            if state[1] == ">":
                raise ValueError("an array with its bytes in reverse order")
        elif not isinstance(target, Inert | dict):
            raise _Refused(f"its pickle fills a {type(target).__name__}")

    def _binpersid(self, _) -> None:
        """The numbers of a tensor, which lie in a record of their own."""
        kind, storage, key, _, n = self.stack.pop()
        if kind != "storage" or type(storage) is not _Global or storage.name not in _STORAGES:
            raise _Refused(f"a tensor is stored as {getattr(storage, 'name', type(storage).__name__)!r}")
        if type(key) is not str or not re.fullmatch(r"[0-9]{1,9}", key):
            raise ValueError(f"{_shown(key)} is not the name of a record of numbers")
        _check_natural(n)
        if key not in self.storages:
            dtype = np.dtype(_STORAGES[storage.name]).newbyteorder(self.records.byteorder)
            values = np.frombuffer(self.records.read(f"data/{key}"), dtype)
            self.storages[key] = values.astype(dtype.newbyteorder("="), copy=False)
        if len(self.storages[key]) < n:
            raise ValueError(f"the record 'data/{key}' holds {len(self.storages[key])} numbers of {n}")
        self.stack.append(self.storages[key])


def _pairs(items: list) -> zip:
    keys = items[::2]
    for key in keys:  # hashing a deeply nested tuple would overflow the interpreter's stack
        parts = key if isinstance(key, tuple) and len(key) < 10 else (key,)
        if not all(isinstance(part, str | bytes | int | float | None) for part in parts):
            raise ValueError(f"a dictionary key of type {type(key).__name__}")
        if any(isinstance(part, int) and abs(part) >= 2**63 for part in parts):  # they can be made to collide
            raise ValueError("a dictionary key of more than 64 bits")
    return zip(keys, items[1::2], strict=True)


def _ordered_dict(pairs: list | tuple = ()) -> dict:
    """A dict of pairs, as OrderedDict takes them."""
    many = list | tuple
    if not isinstance(pairs, many) or not all(isinstance(pair, many) and len(pair) == 2 for pair in pairs):
        raise ValueError("an OrderedDict of what is no pairs")
    return dict(_pairs([part for pair in pairs for part in pair]))


def _shown(value: object) -> str:
    """A value for a message; one of many parts only by its type, since parts can be shared without end."""
    return f"{value!r:.50}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _size(value: object, known: dict[int, int]) -> int:
    """How much a value that is no container has to be read: one, and more for text."""
    if isinstance(value, str | bytes):
        return 1 + len(value) // 16
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        known[id(value)] = value.size + sum(len(part) // 16 for part in value.flat if isinstance(part, str))
        return known[id(value)]
    return 1


def _bounded(result: object) -> object:
    """The result, if whoever walks through it comes to an end: neither deep, nor in itself, nor shared without end."""
    sizes: dict[int, int] = {}  # values inside, by container
    open_ids: set[int] = set()
    todo: list[tuple[object, bool]] = [(result, False)]
    while todo:
        value, seen = todo.pop()
        if not isinstance(value, list | tuple | dict):
            continue
        inside = value.values() if isinstance(value, dict) else value
        if seen:
            open_ids.discard(id(value))
            sizes[id(value)] = 1 + sum(sizes.get(id(part)) or _size(part, sizes) for part in inside)
            if sizes[id(value)] > MAX_VALUES:
                raise _Refused("its pickle shares its parts so often that nobody could walk through them")
        elif id(value) in open_ids:
            raise _Refused("its pickle holds an object that is inside itself")
        elif id(value) not in sizes:
            open_ids.add(id(value))
            if len(open_ids) > MAX_NESTING:
                raise _Refused(f"its pickle is nested more than {MAX_NESTING} deep")
            todo.append((value, True))
            todo += [(part, False) for part in inside if isinstance(part, list | tuple | dict)]
    return result


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_LAST_AS_TUPLE = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# what is filled, how, and by how many values of the stack; None: all since the mark
_FILLS: dict[str, tuple[type, Callable, int | None]] = {
    "APPEND": (list, list.extend, 1),
    "APPENDS": (list, list.extend, None),
    "SETITEM": (dict, lambda target, items: target.update(_pairs(items)), 2),
    "SETITEMS": (dict, lambda target, items: target.update(_pairs(items)), None),
}


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    """A view of a storage; checked here, because numpy would look beyond its end."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or len(size) != len(stride):
        raise ValueError("a tensor that is not a view of numbers")
    _check_natural(offset, *size, *stride)
    if math.prod(size) > len(storage):
        raise ValueError("a tensor that is larger than its numbers")
    if math.prod(size) == 0:
        return np.zeros(size, storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(storage):
        raise ValueError("a tensor that goes beyond its numbers")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _check_natural(*numbers: int) -> None:
    if len(numbers) > 200 or any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise ValueError("a shape that is none")


def _dtype(code: str, *_) -> np.dtype:
    if type(code) is not str or not re.fullmatch(r"[<|=]?(\?|[bifuO]\d{0,2}|[SU][1-9]\d{0,5})", code):
        raise _Refused(f"an array has the type {_shown(code)}")
    return np.dtype(code)


def _new_array(*_) -> np.ndarray:
    return np.empty(0, dtype=bool)


def _fill(array: np.ndarray, state: tuple) -> None:
    _, shape, dtype, fortran, values = state
    _check_natural(*shape)
    n = math.prod(shape)
    if array.size:  # it may have views by now, which numpy would leave without memory
        raise ValueError("an array that is filled twice")
    if dtype.hasobject:
        if not isinstance(values, list) or len(values) != n:
            raise ValueError("an array of objects without its objects")
        strange = {type(value).__name__ for value in values if type(value) not in _PRIMITIVES}
        if strange:
            raise _Refused(f"an array holds objects of the type {', '.join(sorted(strange))}")
    elif not isinstance(values, bytes) or len(values) != n * dtype.itemsize:
        raise ValueError("an array without its numbers")
    array.__setstate__((1, shape, dtype, bool(fortran), values))


def _scalar(dtype: np.dtype, value: bytes = b"") -> object:
    if dtype.hasobject or len(value) != dtype.itemsize:
        raise ValueError("a number without its value")
    return np.frombuffer(value, dtype)[0].item()


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise _Refused(f"bytes in the encoding {_shown(encoding)}")
    return text.encode("latin1")


_CONSTRUCTORS: dict[str, Callable] = {
    "_codecs encode": _encoded,
    "builtins bytes": lambda: b"",
    "builtins dict": lambda: {},
    "collections OrderedDict": _ordered_dict,
    "collections defaultdict": lambda factory=None: {},
    "numpy dtype": _dtype,
    "numpy ndarray": _new_array,
    "numpy._core.multiarray _reconstruct": _new_array,
    "numpy._core.multiarray scalar": _scalar,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
}
