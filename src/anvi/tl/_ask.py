"""What the verbs that ask a fitted model have in common: find the model, read the cells as it wants them."""

from typing import NamedTuple

from anvi._data.cells import Cells, read_cells
from anvi._data.containers import Data
from anvi._data.setup import Setup
from anvi._find import resolve
from anvi._model import Model
from anvi.settings import choose_device


class Asked(NamedTuple):
    """A model and the cells that it is asked about, both on the device."""

    model: Model
    key: str  # prefix of the model's slots
    setup: Setup  # how the cells were read
    cells: Cells


def ask(
    data: Data,
    model: str | Model | None,
    *,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    labels: bool = False,
) -> Asked:
    """Find the model that an argument means, and read the data for it.

    Parameters
    ----------
    data
        The fitted object, or another one with the same features.
    model
        Key, folder, :class:`~anvi.Model`, or None for the only fitted model in `data`.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    labels
        Whether to read the labels, too.
    """
    fitted, key = resolve(data, model)
    setup = fitted.setup.elsewhere(rna_mod=rna_mod, prot_mod=prot_mod, prot_obsm=prot_obsm)
    where = choose_device(device)
    cells = read_cells(data, setup, labels=labels).to(where)
    return Asked(fitted.on(where), key, setup, cells)
