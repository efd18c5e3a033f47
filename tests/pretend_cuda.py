"""A pretend CUDA machine: tensors that say cuda:0, compute on the CPU, and refuse what a GPU refuses.

Values are those of the CPU, rules are those of CUDA: tensors of two devices do not mix, a generator belongs to its
device, nothing turns into numpy by itself, a copy that is not waited for has not arrived, and inside a capture nothing
may wait, cross over to the host or draw from a generator that the graph does not know. A graph records the operators
that ran on the capturing stream, leaves the tensors as they were, and runs the operators again when it is replayed.

    with Machine() as machine:
        network.to("cuda")  # and so on; machine.graphs, machine.waits and machine.allocated() tell what happened

What it cannot show: time, rounding, races between streams, and whether a kernel exists. For torch itself the tensors
are on its meta device, which is why autograd runs them like CPU tensors, and why autocast leaves them alone.
"""

import contextlib
import importlib
import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
WAITS = {  # operators of which the host must know a value or a shape
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
SILENT_WRITES = {"running_mean", "running_var"}
"""Arguments that batch norms write to although their schema does not say so."""


class CaptureError(RuntimeError):
    """What CUDA says when something that may not be captured is tried; it also spoils the capture."""


class CudaTensor(Tensor):
    """A tensor on a pretend device; `raw` has its values."""

    @staticmethod
    def __new__(cls, raw: Tensor, where: torch.device):
        """Wrap a CPU tensor."""
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device("meta"),
        )
        self.raw, self.at = raw, where
        _machine().living.add(self)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    __hash__ = Tensor.__hash__

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """All operators go through the machine."""
        return _machine().run(func, args, kwargs or {})

    device = property(lambda self: self.at)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)
    data = property(lambda self: self.detach())

    def __repr__(self, **_):
        return f"CudaTensor({self.raw!r}, {self.at})"

    def get_device(self):
        return self.at.index

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def data_ptr(self):
        return self.raw.data_ptr()

    def is_pinned(self, *_):
        return False

    def to(self, *args, **kwargs):
        """As torch has it: the tensor itself where nothing is to change."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        same = device is None or device.type == "meta" or _machine().full(device) == self.at
        if same and dtype in (None, self.dtype) and not kwargs.get("copy"):
            return self
        return _to(self, *args, **kwargs)

    def cpu(self):
        return self.to("cpu")

    def cuda(self, device=None):
        return self.to(torch.device("cuda") if device is None else device)

    def item(self):
        return _machine().run(aten._local_scalar_dense.default, (self.detach(),), {})

    def __bool__(self):
        return bool(self.item())

    def __int__(self):
        return int(self.item())

    def __float__(self):
        return float(self.item())

    def __index__(self):
        return int(self.item())

    def tolist(self):
        return self.detach().cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError(
            f"can't convert {self.at} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    __array__ = numpy

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, _):
        raise TypeError("a tensor of a pretend device is not pickled")


def _to(tensor: Tensor, *args, **kwargs) -> Tensor:
    """`Tensor.to` with the device's number, which torch without CUDA cannot ask for."""
    if args and isinstance(args[0], str | torch.device | int) and not isinstance(args[0], bool):
        args = (_machine().full(args[0]), *args[1:])
    elif kwargs.get("device") is not None:
        kwargs = kwargs | {"device": _machine().full(kwargs["device"])}
    return torch._C.TensorBase.to(tensor, *args, **kwargs)


def _numbered(make):
    """A function of torch that is given the device's number."""

    def numbered(*args, device=None, **kwargs):
        return make(*args, device=None if device is None else _machine().full(device), **kwargs)

    return numbered


class _CudaGenerator(torch._C.Generator):
    """A generator of a pretend device; its numbers are those of a CPU generator of the same seed."""

    def __new__(cls, where: torch.device):
        self = super().__new__(cls)
        self.at, self.stuck = where, False
        _machine().generators[self._cdata] = self  # operators are handed another object of the same generator
        return self

    def __init__(self, where: torch.device):
        pass

    @property
    def device(self):
        return self.at


class Generator:
    """Stands in for `torch.Generator`, which it makes for the CPU."""

    real = torch.Generator

    def __new__(cls, device="cpu"):
        device = torch.device(device)
        return _CudaGenerator(_machine().full(device)) if device.type == "cuda" else cls.real(device)


class Stream:
    """A queue of a device; what is put in runs at once, but copies to the host arrive only when they are waited for."""

    def __init__(self, device=None, priority=0, **_):
        self.device = _machine().full(torch.device("cuda") if device is None else device)
        self.device_index = self.device.index

    def wait_stream(self, other):
        if other.device != self.device:  # allowed, but it orders nothing on either device
            _machine().n_across += 1
        _machine().refuse_in_capture("wait_stream", waits=False, outside=self)

    def wait_event(self, _):
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        _machine().wait("stream")

    def query(self):
        return True


class Event:
    """Knows which copies to the host were on their way when it was recorded."""

    def __init__(self, *_, **__):
        self.sent = []

    def record(self, stream=None):
        self.sent = list(_machine().sent)

    def wait(self, stream=None):
        pass

    def query(self):
        return not any(copy in _machine().sent for copy in self.sent)

    def synchronize(self):
        _machine().wait("event", self.sent)

    def elapsed_time(self, _):
        return 1.0


@dataclass(eq=False)
class _Sent:
    """A copy to pinned memory that has not arrived."""

    place: Tensor
    values: Tensor


@dataclass
class _Operator:
    """One recorded operator."""

    func: object
    args: tuple
    kwargs: dict
    out: object
    is_view: bool


class CUDAGraph:
    """Records what runs on the capturing stream; see :class:`Machine`."""

    def __init__(self, keep_graph: bool = False):
        self.operators: list[_Operator] = []
        self.generators: list[_CudaGenerator] = []
        self.n_replays, self.stream, self.spoilt = 0, None, False
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # what storages from outside held before the capture
        self._inside: set[int] = set()
        self._states: list = []
        _machine().graphs.append(self)

    @property
    def n_kernels(self) -> int:
        """Operators that are more than another view of a tensor: about the kernels of a replay."""
        return sum(not operator.is_view for operator in self.operators)

    def register_generator_state(self, generator):
        if _machine().register_warns:
            warnings.warn("generators are found by themselves", FutureWarning, stacklevel=2)
        self.generators.append(generator)

    def pool(self):
        return (0, id(self))

    def reset(self):
        self.operators = []

    def capture_begin(self, pool=None, capture_error_mode="global", check_input_liveness=False):
        machine = _machine()
        self.mode, self.stream = capture_error_mode, machine.current_stream()
        if machine.capturing is not None:
            raise CaptureError("a capture is under way")
        if self.stream is machine.default_stream():
            raise CaptureError("CUDA graphs must be captured on a non-default stream")
        self._states = [generator.get_state() for generator in self.generators]
        machine.capturing, self.n_left = self, machine.fail_after
        machine.n_captures += 1

    def capture_end(self):
        machine = _machine()
        machine.capturing = None
        if self.stream is not machine.current_stream():
            raise CaptureError("Capture must end on the same stream it began on.")
        for storage, before in self._before.values():  # nothing has run: that is what the replays are for
            storage.copy_(before)
        for generator, state in zip(self.generators, self._states, strict=True):
            generator.set_state(state)
            generator.stuck = self.spoilt
        if self.spoilt:
            raise CaptureError("operation failed due to a previous error during capture")
        if not self.operators:
            warnings.warn("The CUDA Graph is empty.", UserWarning, stacklevel=3)
        for operator in self.operators:  # nobody may read a result before the first replay
            for out in _parts(operator.out):
                if isinstance(out, Tensor) and _key(out) in self._inside:
                    _spoil(out)
        self._before, self._states = {}, []

    def replay(self):
        machine = _machine()
        if machine.capturing is not None:
            raise CaptureError("a graph is replayed inside a capture")
        self.n_replays += 1
        with no_dispatch(), torch.no_grad():
            for operator in self.operators:
                if operator.is_view:
                    continue
                new = operator.func(*operator.args, **operator.kwargs)
                for old, value in zip(_parts(operator.out), _parts(new), strict=True):
                    if isinstance(old, Tensor) and _key(old) in self._inside and old.numel():
                        old.copy_(value)

    def note(self, func, args, kwargs, run):
        """Run an operator as part of the capture, and keep what it needs to be run again."""
        if self.n_left is not None:
            self.n_left -= 1
            if self.n_left < 0:
                raise _machine().failure
        with no_dispatch():
            return self._note(func, args, kwargs, run)

    def _note(self, func, args, kwargs, run):
        given = {_key(part) for part in _parts((*args, *kwargs.values())) if isinstance(part, Tensor)}
        for written in _written(func, args, kwargs):
            if _key(written) not in self._inside and _key(written) not in self._before:
                storage = torch.empty(0, dtype=torch.uint8).set_(written.untyped_storage())
                self._before[_key(written)] = storage, storage.clone()
        args, kwargs = _mapped(_alias, args), _mapped(_alias, kwargs)  # before anybody changes a shape in place
        out = run()
        self._inside |= {_key(part) for part in _parts(out) if isinstance(part, Tensor)} - given
        self.operators.append(_Operator(func, args, kwargs, _mapped(_alias, out), _is_view(func)))
        return out


@dataclass
class Wait:
    """The host waited for the device, or copied between the two."""

    what: str
    line: str  # of the package's code

    def __str__(self) -> str:
        return f"{self.what} at {self.line}"


_RUNNING: list["Machine"] = []


def _machine() -> "Machine":
    if not _RUNNING:
        raise RuntimeError("a pretend tensor is used outside of its Machine")
    return _RUNNING[-1]


@dataclass(eq=False)
class Machine(TorchDispatchMode):
    """A machine with pretend GPUs; a context manager, inside which torch takes it for CUDA."""

    n_devices: int = 2
    fail_after: int | None = None  # operators after which the next captures fail
    failure: Exception = field(default_factory=lambda: torch.OutOfMemoryError("CUDA out of memory (pretended)"))
    register_warns: bool = False  # as later versions of torch do, which find the generators themselves

    def __post_init__(self):
        super().__init__()
        self.graphs: list[CUDAGraph] = []
        self.waits: list[Wait] = []
        self.living: weakref.WeakSet[CudaTensor] = weakref.WeakSet()
        self.capturing: CUDAGraph | None = None
        self.n_captures = 0
        self.n_across = 0
        self.n_elsewhere = 0  # operators on another device than the current one, where Triton would launch
        self.current = 0
        self.generators: dict[int, _CudaGenerator] = {}
        self.streams: dict[int, Stream] = {}
        self.defaults: dict[int, Stream] = {}
        self.sent: list[_Sent] = []
        self.pinned: set[int] = set()
        self.strict = False
        self._patches = contextlib.ExitStack()

    # what torch is told -------------------------------------------------------------------------------------------

    def __enter__(self):
        if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
            pytest.skip(f"torch {torch.__version__} does not let a device be pretended")
        _RUNNING.append(self)
        for i in range(self.n_devices):
            self.streams[i] = self.defaults[i] = Stream(torch.device("cuda", i))
        for owner, name, value in self._replacements():
            self._patches.enter_context(_replaced(owner, name, value))
        torch._C._set_only_lift_cpu_tensors(True)
        torch._C._ensureCUDADeviceGuardSet()
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        self._patches.close()
        _RUNNING.remove(self)

    def _replacements(self):
        cuda = torch.cuda
        clip, adam = (importlib.import_module(name) for name in ("torch.nn.utils.clip_grad", "torch.optim.adam"))
        yield from [
            (torch, "Generator", Generator),
            (Tensor, "to", _to),
            *((torch, name, _numbered(getattr(torch, name))) for name in ("tensor", "as_tensor")),
            (cuda, "Stream", Stream),
            (cuda, "Event", Event),
            (cuda, "CUDAGraph", CUDAGraph),
            (cuda.graphs, "CUDAGraph", CUDAGraph),
            (cuda.graph, "default_capture_stream", None),
            (cuda, "_lazy_init", lambda: None),
            (cuda, "is_initialized", lambda: True),
            (cuda, "is_available", lambda: True),
            (cuda, "is_bf16_supported", lambda *_, **__: True),
            (cuda, "device_count", lambda: self.n_devices),
            (cuda, "current_device", lambda: self.current),
            (cuda, "set_device", lambda device: self._exchange(self.full(device).index)),
            (cuda, "_exchange_device", self._exchange),
            (cuda, "_maybe_exchange_device", self._exchange),
            (cuda, "current_stream", self.current_stream),
            (cuda, "default_stream", self.default_stream),
            (cuda, "set_stream", self.set_stream),
            (cuda, "synchronize", lambda device=None: self.wait("synchronize")),
            (cuda, "empty_cache", lambda: None),
            (cuda, "is_current_stream_capturing", lambda: self.capturing is not None),
            (cuda, "memory_allocated", lambda device=None: self.allocated()),
            (cuda, "max_memory_allocated", lambda device=None: self.allocated()),
            (cuda, "reset_peak_memory_stats", lambda device=None: None),
            (cuda, "mem_get_info", lambda device=None: (8 * 2**30, 16 * 2**30)),
            (cuda, "get_device_name", lambda device=None: "pretend GPU"),
            (cuda, "set_sync_debug_mode", lambda mode: setattr(self, "strict", mode in ("error", 2))),
            (torch._C, "_host_emptyCache", lambda: None),
            (clip, "_has_foreach_support", lambda *_: True),
            (clip, "_device_has_foreach_support", lambda *_: True),
            (adam, "_device_dtype_check_for_fused", lambda *_, **__: None),
        ]

    def full(self, device) -> torch.device:
        """A device with its number."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        if index >= self.n_devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def _exchange(self, index: int) -> int:
        before = self.current
        if index >= 0:
            self.current = index
        return before

    def current_stream(self, device=None) -> Stream:
        return self.streams[self.full("cuda" if device is None else device).index]

    def default_stream(self, device=None) -> Stream:
        return self.defaults[self.full("cuda" if device is None else device).index]

    def set_stream(self, stream: Stream) -> None:
        self.current = stream.device_index  # as torch does: the device comes along
        self.streams[stream.device_index] = stream

    # what happened ------------------------------------------------------------------------------------------------

    @property
    def n_replays(self) -> int:
        return sum(graph.n_replays for graph in self.graphs)

    def allocated(self) -> int:
        """Bytes of the tensors that anybody still holds."""
        return sum({_key(one.raw): one.raw.untyped_storage().nbytes() for one in list(self.living)}.values())

    def wait(self, what: str, copies: list[_Sent] | None = None) -> None:
        """The host waits: copies arrive."""
        self.refuse_in_capture(what)
        self.waits.append(Wait(what, _line()))
        if self.strict and what != "event":
            raise RuntimeError(f"called a synchronizing CUDA operation: {self.waits[-1]}")
        for copy in list(self.sent) if copies is None else copies:
            if copy in self.sent:
                copy.place.copy_(copy.values)
                self.sent.remove(copy)

    def refuse_in_capture(self, what: str, *, waits: bool = True, outside: Stream | None = None) -> None:
        """Raise, and spoil the capture, if one is under way."""
        if self.capturing is not None and (waits or outside is not self.capturing.stream):
            self.capturing.spoilt = True
            raise CaptureError(f"operation not permitted when stream is capturing: {what} at {_line()}")

    # operators ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args: tuple, kwargs: dict):
        """One operator: whether CUDA would take it, then its values."""
        flat = _parts((*args, *kwargs.values()))
        ours = [part for part in flat if type(part) is CudaTensor]
        where = self._place(kwargs.get("device"), ours)
        self._check_generator(func, flat, where if where is not None else torch.device("cpu"))
        if where is None or (not ours and where.type != "cuda"):
            return self._on_host(func, args, kwargs)
        self._check_devices(func, args, kwargs, ours, flat, where)
        self.n_elsewhere += where.type == "cuda" and where.index != self.current
        wrapped = {id(part.raw): part for part in ours}
        plain_args, plain_kwargs = _mapped(_unwrapped, args), _mapped(_unwrapped, kwargs)
        if "device" in kwargs and kwargs["device"] is not None:
            plain_kwargs["device"] = torch.device("cpu")
        plain_kwargs.pop("pin_memory", None)
        if func is aten.copy_.default and not isinstance(args[0], CudaTensor):
            return self._to_host(args[0], plain_args[1], kwargs.get("non_blocking") or (len(args) > 2 and args[2]))

        def compute():
            with no_dispatch():
                return func(*plain_args, **plain_kwargs)

        recorded = self.capturing is not None and self.current_stream(where) is self.capturing.stream
        out = self.capturing.note(func, plain_args, plain_kwargs, compute) if recorded else compute()
        for part in ours:
            _follow(part)

        def wrap(part):
            if not isinstance(part, Tensor) or where.type != "cuda":
                return part
            return wrapped[id(part)] if id(part) in wrapped else CudaTensor(part, where)

        return _mapped(wrap, out)

    def _place(self, asked, ours: list[CudaTensor]) -> torch.device | None:
        """The device of the result; None if no pretend device has anything to do with it."""
        if asked is None:
            return ours[0].at if ours else None
        asked = torch.device(asked)
        if asked.type == "cuda":
            return self.full(asked)
        if asked.type == "meta":  # what torch takes our tensors for, unless somebody really wants that device
            if ours:
                return ours[0].at
            return None if torch.get_default_device().type == "meta" else self.full("cuda")
        return asked if ours else None

    def _on_host(self, func, args, kwargs):
        """An operator of CPU tensors alone; only pinned memory is of interest."""
        out = func(*args, **(kwargs | {"pin_memory": False} if kwargs.get("pin_memory") else kwargs))
        if kwargs.get("pin_memory") or func is aten._pin_memory.default:
            self.pinned.add(_key(out))
        return out

    def _to_host(self, place: Tensor, values: Tensor, non_blocking: bool) -> Tensor:
        """`place.copy_(values)` into host memory: at once and with a wait, or later, where the memory is pinned."""
        if non_blocking and _key(place) in self.pinned:
            self.refuse_in_capture("copy to pinned memory")
            self.sent.append(_Sent(place, values.detach().clone()))
            _spoil(place)
        else:
            self.wait("copy to the host")
            place.copy_(values)
        return place

    def _check_generator(self, func, flat: list, where: torch.device) -> None:
        for generator in (part for part in flat if isinstance(part, torch._C.Generator)):
            generator = self.generators.get(generator._cdata, generator)
            if generator.device != where:
                raise RuntimeError(f"Expected a '{where}' device type for generator but found '{generator.device}'")
            if where.type != "cuda":
                continue
            if generator.stuck:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            if self.capturing is not None and generator not in self.capturing.generators:
                self.capturing.spoilt = True
                raise CaptureError(f"{func} at {_line()} draws from a generator that the graph does not know")

    def _check_devices(self, func, args, kwargs, ours, flat, where: torch.device) -> None:
        others = [part for part in flat if isinstance(part, Tensor) and not isinstance(part, CudaTensor)]
        packet = func.overloadpacket
        if func is aten._to_copy.default:
            if ours and where.type == "cpu":
                self.wait("copy to the host")
            elif others:
                self.refuse_in_capture("copy from the host")
                self.waits.append(Wait("copy from the host", _line()))
            return
        if func is aten.copy_.default:
            if isinstance(args[0], CudaTensor) and others:
                self.refuse_in_capture("copy from the host")
                self.waits.append(Wait("copy from the host", _line()))
            return
        if packet in INDEXING and isinstance(args[0], CudaTensor):
            of_index = [part for part in args[1] if isinstance(part, Tensor)]
            if any(part.device.type == "meta" and not isinstance(part, CudaTensor) for part in of_index):
                raise RuntimeError(f"a list as an index has no values here: make a tensor of it ({_line()})")
            if any(part.dtype in (torch.bool, torch.uint8) for part in of_index):
                self.wait(f"{packet} with a mask")
            if any(not isinstance(part, CudaTensor) for part in of_index):
                self.wait(f"{packet} with an index on the host")
            others = [part for part in others if not any(part is index for index in of_index)]
        elif func is aten.repeat_interleave.Tensor:
            if kwargs.get("output_size") is None:
                self.wait(str(packet))
        elif packet in WAITS:
            self.wait(str(packet))
        if any(part.at != ours[0].at for part in ours) or any(part.dim() for part in others):
            places = sorted({str(part.device) for part in (*ours, *others)})
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {', '.join(places)}! "
                f"({func} at {_line()})"
            )
        if others:  # a number on the host is handed to the kernel, and a graph would keep it for good
            self.refuse_in_capture(f"a number on the host in {packet}")


def _parts(value) -> list:
    """What is in lists in lists; faster than torch's own, which knows more."""
    if type(value) not in (tuple, list):
        return [value]
    found = []
    for part in value:
        if type(part) in (tuple, list):
            found += _parts(part)
        else:
            found.append(part)
    return found


def _mapped(function, value):
    """The same lists in lists of what a function makes of the rest."""
    if type(value) in (tuple, list):
        return type(value)([_mapped(function, part) for part in value])
    if type(value) is dict:
        return {name: _mapped(function, part) for name, part in value.items()}
    return function(value)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _unwrapped(part):
    return part.raw if isinstance(part, CudaTensor) else part


def _alias(part):
    """The same memory with the shape of now."""
    return part.as_strided(part.size(), part.stride(), part.storage_offset()) if isinstance(part, Tensor) else part


def _is_view(func) -> bool:
    """Whether the result is another look at an argument; views that change the argument itself are run once."""
    aliases = [part.alias_info for part in func._schema.returns if part.alias_info is not None]
    return bool(aliases) and (not any(alias.is_write for alias in aliases) or torch.Tag.inplace_view in func.tags)


def _written(func, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The tensors that an operator writes to."""
    for i, argument in enumerate(func._schema.arguments):
        info = argument.alias_info
        if (info is not None and info.is_write) or argument.name in SILENT_WRITES:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (part for part in _parts(value) if isinstance(part, Tensor))


def _follow(tensor: CudaTensor) -> None:
    """Give a tensor the shape that an operator in place has given its values."""
    raw = tensor.raw
    if tensor.size() != raw.size() or tensor.stride() != raw.stride():
        with no_dispatch():
            torch.ops.aten.as_strided_.default(tensor, raw.size(), raw.stride(), raw.storage_offset())


def _spoil(tensor: Tensor) -> None:
    """Fill memory that holds nothing yet with what cannot be mistaken for a result."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def _line() -> str:
    """The line of the package that is at work."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/anvi/" in name and "/site-packages/torch/" not in name:
            return f"{name.rpartition('/anvi/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@contextlib.contextmanager
def _replaced(owner, name: str, value):
    own, before = name in vars(owner), getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
