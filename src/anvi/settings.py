"""Where to compute, how much to say, where data lie: one object, `av.settings`."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from importlib.util import find_spec
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")


@dataclass
class Settings:
    """Options that hold for every call; change them by assignment or for a while with :meth:`override`.

    Examples
    --------
    >>> import anvi as av
    >>> av.settings.verbosity = 0  # warnings only
    >>> with av.settings.override(n_threads=1):
    ...     mdata = av.datasets.synthetic_cite(300, n_genes=60)
    """

    device: str = "auto"
    """"auto" (CUDA where there is one, else the CPU) or the name of a torch device such as "cuda:1" or "mps"."""
    progress: Literal["auto", True, False] = "auto"
    """Progress of a fit: a bar in notebooks and terminals, one line per tenth elsewhere; False is silent."""
    verbosity: int = 1
    """0: warnings only, 1: what was found in the data and which slots were written."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Arithmetic of the matrix products of a fit: "tf32" (GPU) and "bf16" (GPU, and CPUs that have it) trade digits for
    speed; likelihoods, norms and sums stay in float32."""
    n_threads: int | None = None
    """CPU threads of a verb; None: cores that are usable and idle, and for fits what their first steps tell. The last
    digits of a fit depend on it."""
    stream_above: float = 0.25
    """Share of the memory (of the machine or the process's control group, and of the GPU) that the compact RNA counts
    of a fit may take; more of them stay in their file, and every epoch reads them (`stream=None`)."""
    data_dir: str | None = os.environ.get("ANVI_DATA_DIR")
    """Folder with the real data sets of `anvi.datasets`."""

    def __setattr__(self, name: str, value) -> None:
        self._check(name, value)
        inside = _OVERRIDES.get() or {}
        if name in inside:  # until the block ends
            inside[name] = value
        else:
            object.__setattr__(self, name, value)

    def __getattribute__(self, name: str):
        inside = _OVERRIDES.get() or {}
        return inside[name] if name in inside else object.__getattribute__(self, name)

    @contextmanager
    def override(self, **options) -> Iterator[Settings]:
        """Change options inside a `with` block, for this thread alone, and put them back, also after an error.

        Examples
        --------
        >>> import anvi as av
        >>> with av.settings.override(progress=False, verbosity=0):
        ...     pass
        """
        for name, value in options.items():
            self._check(name, value)
        token = _OVERRIDES.set((_OVERRIDES.get() or {}) | options)
        try:
            yield self
        finally:
            _OVERRIDES.reset(token)

    def _check(self, name: str, value: object) -> None:
        if name not in _NAMES:
            raise AttributeError(f"settings has no option '{name}'; there are: {', '.join(_NAMES)}.")
        if name == "device" and value != "auto":
            _device_named(value, "settings.device")
        if name in _ALLOWED and not _ALLOWED[name][1](value):
            raise ValueError(f"settings.{name}={value!r:.80} is not {_ALLOWED[name][0]}.")


def _from(least: float, value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value >= least


_ALLOWED: dict[str, tuple[str, Callable[[object], bool]]] = {
    "progress": ("one of 'auto', True, False", lambda value: value in ("auto", True, False)),
    "verbosity": ("0 for warnings only, 1 for all", lambda value: isinstance(value, Integral) and value >= 0),
    "precision": ("one of 'float32', 'tf32', 'bf16'", lambda value: value in ("float32", "tf32", "bf16")),
    "n_threads": ("None, or a whole number from 1 on", lambda value: value is None or _from(1, value, Integral)),
    "stream_above": ("a share of the memory, from 0 on", lambda value: _from(0, value, Real)),
    "data_dir": ("a folder, or None", lambda value: isinstance(value, str | os.PathLike | None)),
}
_OVERRIDES: ContextVar[dict | None] = ContextVar("anvi_settings", default=None)
_NAMES = tuple(field.name for field in fields(Settings))
settings = Settings()


def choose_device(device: str = "auto") -> torch.device:
    """Turn "auto" into a device: the argument, then `settings.device`, then CUDA where there is one, else the CPU.

    Apple's MPS is never chosen by itself: it has been seen to give NaN where the CPU does not. Ask for it by name.
    """
    import torch

    name = settings.device if device == "auto" else device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _device_named(name, "device")
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(chosen.type)
    if there is not None and not there():
        kind = chosen.type.upper()
        raise ValueError(f"device='{name}' was asked for, but torch sees no {kind} device here; use device='cpu'.")
    if chosen.type == "cuda" and chosen.index is None:  # named in full, so that it compares equal to that of a tensor
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def _device_named(name: object, argument: str) -> torch.device:
    """A device of torch, be it here or not."""
    import torch

    try:
        return torch.device(name)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{argument}={name!r:.80} is not a torch device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error


class _Handler(logging.StreamHandler):
    """Prints our lines where nobody has set up logging; an application with handlers of its own gets the records."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr  # looked up each time: notebooks and tests replace it
            super().emit(record)


logger = logging.getLogger("anvi")
if not logger.handlers:
    _handler = _Handler()
    _handler.setFormatter(logging.Formatter("anvi: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.addFilter(lambda record: record.levelno >= logging.WARNING or settings.verbosity > 0)


class Progress:
    """Shows the epochs of a fit.

    Parameters
    ----------
    total
        Planned epochs.
    done
        Epochs that an earlier run has already made.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.done, self.first = total, done, done
        self.bar = None
        self.lines = False

    def __enter__(self) -> Progress:
        self.start = time.monotonic()
        if _shows_bars():
            self.bar = _bar(total=self.total, initial=self.done, desc="fit", unit="epoch")
        else:
            self.lines = settings.progress == "auto"
        return self

    def advance(self, row: dict[str, float]) -> None:
        """Show one more finished epoch."""
        self.done += 1
        shown = {name: row[name] for name in ("train_loss", "validation_loss") if name in row}
        if "validation_accuracy" in row:
            shown["validation_accuracy"] = row["validation_accuracy"]
        if self.bar is not None:
            brief = [f"{name.replace('train_', '').removesuffix('_loss')} {value:.4g}" for name, value in shown.items()]
            self.bar.set_postfix_str(", ".join(brief).replace("validation_accuracy", "accuracy"), refresh=False)
            self.bar.update()
        elif self.lines and (
            self.done * 10 // self.total > (self.done - 1) * 10 // self.total or self.done == self.first + 1
        ):
            left = (time.monotonic() - self.start) / (self.done - self.first) * (self.total - self.done)
            values = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            logger.info(f"epoch {self.done}/{self.total}: {values}; at most {left:.0f} s left")

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


def warn(message: str) -> None:
    """Warn, pointing at the first line outside this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(("anvi.", "contextlib")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def with_bar(parts: Iterable[Part], total: int, what: str, size: Callable[[Part], int]) -> Iterator[Part]:
    """Hand on the parts of an answer, with a bar over cells where somebody looks."""
    with bar(total, what, "cell") as advance:
        for part in parts:
            yield part
            advance(size(part))


@contextmanager
def bar(total: int, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar where somebody looks; gives what moves it on."""
    with _bar(total=total, desc=what, unit=unit, disable=not _shows_bars()) as shown:
        yield shown.update


def _bar(**options):
    """A bar of tqdm: a widget in notebooks that have them, else a line in which the bar itself has room."""
    if _in_notebook() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm

        return tqdm(**options)
    from tqdm import tqdm

    line = "{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    return tqdm(**options, bar_format=line)


def _shows_bars() -> bool:
    if not hasattr(sys.stderr, "isatty"):  # of a program without a console
        return False
    return settings.progress is True or (settings.progress == "auto" and (_in_notebook() or sys.stderr.isatty()))


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
