"""Where to compute, how much to say, where data lie: one object, `av.settings`."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass
class Settings:
    """Options that hold for every call; change them by assignment or for a while with :meth:`override`."""

    device: str = "auto"
    """"auto" (CUDA where there is one, else the CPU) or the name of a torch device such as "cuda:1" or "mps"."""
    progress: Literal["auto", True, False] = "auto"
    """Progress of a fit: a bar in notebooks and terminals, one line per tenth elsewhere; False is silent."""
    verbosity: int = 1
    """0: warnings only, 1: what was found in the data and which slots were written."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Arithmetic of the matrix products of a fit: "tf32" (GPU) and "bf16" (GPU, and CPUs that have it) trade digits for
    speed; likelihoods, norms and sums stay in float32."""
    data_dir: str | None = os.environ.get("ANVI_DATA_DIR")
    """Folder with the real data sets of :mod:`anvi.datasets`."""

    def __setattr__(self, name: str, value) -> None:
        if name not in _NAMES:
            raise AttributeError(f"settings has no option '{name}'; there are: {', '.join(_NAMES)}.")
        object.__setattr__(self, name, value)

    @contextmanager
    def override(self, **options) -> Iterator["Settings"]:
        """Change options inside a `with` block and put them back, also after an error.

        Examples
        --------
        >>> import anvi as av
        >>> with av.settings.override(progress=False, verbosity=0):
        ...     pass
        """
        before = {name: getattr(self, name) for name in options if name in _NAMES}
        try:
            for name, value in options.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)


_NAMES = tuple(field.name for field in fields(Settings))
settings = Settings()


def choose_device(device: str = "auto") -> "torch.device":
    """Turn "auto" into a device: the argument, then `settings.device`, then CUDA where there is one, else the CPU.

    Apple's MPS is never chosen by itself: it has been seen to give NaN where the CPU does not. Ask for it by name.
    """
    import torch

    name = settings.device if device == "auto" else device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device='{name}' is not a torch device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device='{name}' was asked for, but torch sees no CUDA device here; use device='cpu'.")
    return chosen


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
