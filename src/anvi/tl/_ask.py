"""What the verbs that ask a fitted model have in common: find the model, read the cells as it wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from anvi._data import slots
from anvi._data.cells import Cells, read_cells
from anvi._data.containers import Data, Source
from anvi._data.minified import is_minified, read_stored
from anvi._data.select import Features
from anvi._data.setup import Setup
from anvi._find import find_model
from anvi._model import Model
from anvi.settings import choose_device

if TYPE_CHECKING:
    import xarray as xr


class Context(NamedTuple):
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
) -> Context:
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
    source = Source(data)
    fitted, key = find_model(data, model)
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
    cells = read_cells(source, setup, labels=labels, stored=stored).to(where)
    return Context(fitted.on(where), key, setup, cells)


def rna_names(data: Data, setup: Setup) -> pd.Index:
    """Names of all cells in the order of the RNA modality, which is that of answers."""
    return Source(data).modality(setup.rna_mod, "rna_mod").obs_names


def rows_of(names: pd.Index, cells: Cells) -> torch.Tensor:
    """Row of each cell of the model in an answer whose rows have the given names."""
    return torch.from_numpy(names.get_indexer(cells.names))


def table(values: np.ndarray, names: pd.Index, columns: Sequence[str], data: Data, setup: Setup) -> pd.DataFrame:
    """A DataFrame in the order of the object's cells, NaN for those outside the model."""
    return pd.DataFrame(values, names, list(columns)).reindex(slots.home(data, setup).obs_names)


def asked_table(
    parts: Sequence[np.ndarray | None], wanted: Features, names: pd.Index, data: Data, setup: Setup
) -> pd.DataFrame:
    """Genes and proteins in one table, as and in the order in which they were asked for."""
    values = np.concatenate([part for part in parts if part is not None], axis=1)[:, wanted.order]
    return table(values, names, wanted.asked, data, setup)


class Axes(NamedTuple):
    """Leading axes of an answer in an xarray Dataset."""

    batches: tuple[str, ...] | None  # None: no such axis
    n_samples: int | None

    @property
    def dims(self) -> tuple[str, ...]:
        """Their names."""
        return (() if self.batches is None else ("batch",)) + (() if self.n_samples is None else ("sample",))

    @property
    def shape(self) -> tuple[int, ...]:
        """Their lengths."""
        batches = () if self.batches is None else (len(self.batches),)
        return batches if self.n_samples is None else (*batches, self.n_samples)


def dims_of(setup: Setup, wanted: Features, axes: Axes) -> dict[str, tuple[str, ...]]:
    """Dimensions of each variable of a Dataset."""
    mods = {setup.rna_mod: wanted.has_genes, setup.prot_mod: wanted.has_proteins}
    return {mod: (*axes.dims, "obs", f"{mod}_var") for mod, there in mods.items() if there}


def coordinates(setup: Setup, wanted: Features, axes: Axes, obs: pd.Index) -> dict[str, np.ndarray]:
    """Labels along each dimension; samples are numbered only by their place."""
    found = {"obs": obs.to_numpy(dtype=str)}
    if axes.batches is not None:
        found["batch"] = np.array(axes.batches, dtype=str)
    for mod, names in ((setup.rna_mod, wanted.gene_names), (setup.prot_mod, wanted.protein_names)):
        if names:
            found[f"{mod}_var"] = np.array(names, dtype=str)
    return found


def dataset(
    parts: Sequence[np.ndarray | None], wanted: Features, axes: Axes, names: pd.Index, data: Data, setup: Setup
) -> xr.Dataset:
    """A Dataset over the object's cells, NaN for those outside the model.

    Parameters
    ----------
    parts
        Genes and proteins, `(*axes, cells, features)`.
    wanted
        Which ones they are.
    axes
        The leading axes.
    names
        Cells of the parts.
    data, setup
        The object, and how it was read.
    """
    import xarray as xr

    obs = slots.home(data, setup).obs_names
    dims = dims_of(setup, wanted, axes)
    arrays = [part for part in parts if part is not None]
    if not obs.equals(names):
        place = names.get_indexer(obs)
        arrays = [_reordered(array, place) for array in arrays]
    variables = {mod: (dims[mod], array) for mod, array in zip(dims, arrays, strict=True)}
    return xr.Dataset(variables, coordinates(setup, wanted, axes, obs))


def _reordered(array: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Rows by their place, NaN where that is -1."""
    out = np.take(array, place, axis=-2)
    out[..., place < 0, :] = np.nan
    return out
