"""What the verbs that ask a fitted model have in common: find the model, read the cells as it wants them."""

from typing import NamedTuple

from anvi._data import slots
from anvi._data.cells import Cells, read_cells
from anvi._data.containers import Data, check_type
from anvi._data.minified import is_minified, read_stored
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
    labels: bool | None = False,
    counts: bool = False,
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
        Whether to read the labels, too; None: if the likelihood needs them.
    counts
        Whether the question is about the counts themselves, so that the posterior in minified data is no answer.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, the data do not fit it, or counts are needed that `tl.minify` has dropped.
    """
    check_type(data)
    fitted, key = resolve(data, model)
    setup = fitted.setup.elsewhere(rna_mod=rna_mod, prot_mod=prot_mod, prot_obsm=prot_obsm)
    where = choose_device(device)
    labels = fitted.config.dispersion == "gene-label" if labels is None else labels
    stored = None
    if is_minified(data, setup, key):
        if counts:
            raise ValueError(
                f"This needs counts, and av.tl.minify has dropped those of this object (uns['{key}']['minified']); "
                f"only the posterior is left, in obsm['{slots.qz_mean(key)}']. Ask the object from before, or minify "
                "with keep_counts=True."
            )
        stored = read_stored(data, setup, key, fitted.fingerprint())
    cells = read_cells(data, setup, labels=labels, stored=stored).to(where)
    return Asked(fitted.on(where), key, setup, cells)
