"""How far a fit is: a bar in notebooks and terminals, a line per tenth elsewhere, nothing when asked."""

import logging
import sys
import time

from anvi.settings import settings

logger = logging.getLogger("anvi")


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

    def __enter__(self) -> "Progress":
        self.start = time.monotonic()
        if settings.progress is True or (settings.progress == "auto" and (_in_notebook() or sys.stderr.isatty())):
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, initial=self.done, desc="fit", unit="epoch")
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
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
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


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
