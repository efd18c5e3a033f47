"""What the verbs that decode have in common: batches and samples that are asked for, tables and Datasets as answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from anvi._data import containers, slots
from anvi._data.cells import Cells
from anvi._data.containers import Data
from anvi._data.features import Features
from anvi._data.setup import Setup

if TYPE_CHECKING:
    import xarray as xr


class Batches(NamedTuple):
    """Batches that cells are to be decoded in."""

    codes: tuple[int, ...] | None  # None: each cell's own
    names: tuple[str, ...] | None  # where several may be meant, so that an answer that keeps them apart has an axis


def find_batches(setup: Setup, transform_batch: str | Sequence[str] | None) -> Batches:
    """The batches that `transform_batch` means.

    Raises
    ------
    ValueError
        If the model has no such batch, or the list is empty.
    """
    if transform_batch is None:
        return Batches(None, None)
    if np.isscalar(transform_batch):  # a batch of numbers may be named by one
        transform_batch = str(transform_batch)
    single = isinstance(transform_batch, str)
    if single and transform_batch == "all" and "all" not in setup.batches[1:]:
        return Batches(tuple(range(len(setup.batches))), setup.batches)
    names = (transform_batch,) if single else tuple(map(str, transform_batch))
    unknown = [name for name in names if name not in setup.batches]
    if unknown:
        listed = ", ".join(map(repr, setup.batches))
        raise ValueError(f"transform_batch: the model has no batch '{unknown[0]}'; it has {listed}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"transform_batch={list(names)} must name one batch or several different ones.")
    return Batches(tuple(map(setup.batches.index, names)), None if single else names)


def check_samples(n_samples: int) -> int:
    """A number of samples, or a ValueError."""
    if not isinstance(n_samples, int | np.integer) or isinstance(n_samples, bool) or n_samples < 1:
        raise ValueError(f"n_samples={n_samples!r} must be a whole number, at least 1.")
    return int(n_samples)


def rna_names(data: Data, setup: Setup) -> pd.Index:
    """Names of all cells in the order of the RNA modality, which is that of answers."""
    return containers.modality(data, setup.rna_mod, "rna_mod").obs_names


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
