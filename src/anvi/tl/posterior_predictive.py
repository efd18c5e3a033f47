"""tl.posterior_predictive and tl.feature_correlation: what is drawn of a fitted model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch

from anvi._arguments import RandomState
from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data
from anvi._files import replacing
from anvi._model import Model
from anvi._posterior.encode import NOISE_BLOCK
from anvi._posterior.expected import Sweep
from anvi._posterior.predictive import CountDraws, correlation, draw_counts
from anvi._runtime import verb
from anvi.settings import with_bar

from ._ask import Axes, Context, ask

if TYPE_CHECKING:
    import xarray as xr


@verb
@on_file
def posterior_predictive(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    modality: str | None = None,
    n_samples: int = 1,
    transform_batch: str | int | bool | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    out: str | Path | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
) -> xr.Dataset:
    """Draw counts that the model expects to see in every cell: data to hold against the data.

    For each sample and cell, a latent vector is drawn from the posterior, with it the log background of each protein
    (and the library size, where that is latent), and then one count per feature from the likelihood, extra zeros and
    the mixture of background and foreground included.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same genes (matched by name, in any order).
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    modality
        Name of the only modality to draw; None: all of the model. The decoder of the other is not run.
    n_samples
        Draws per cell.
    transform_batch
        Draw as if every cell came from this batch; a list or "all" gives an axis of batches, so that a count stays a
        count. None: each cell's own batch.
    features
        Draw these alone: names, `"rna:CD4"` and `"prot:CD4"` where a gene and a protein share one.
    out
        A zarr store to write to while drawing, which must not exist yet; memory then holds a few hundred cells. The
        Dataset that is returned reads from it.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the draws. With the same seed, cells in the same order and the same features get the same draws.

    Returns
    -------
    Dataset of float32 `rna` (batch, sample, obs, rna_var) and `prot` (batch, sample, obs, prot_var) in the order of
    `obs_names`, the axis `batch` only where `transform_batch` is a list or "all"; NaN for cells outside the model.
    Nothing is stored in `data`.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, batch, modality or feature, genes are missing, or an argument is out of its range.
    FileExistsError
        If `out` is there already.

    Notes
    -----
    Source: Lopez et al. 2018; Gayoso et al. 2021. Proteins are drawn for every cell, whether stained or not. Per-batch
    efficiencies of a model of scvi-tools are applied, since its likelihood has them.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.posterior_predictive(mdata, n_samples=3)["prot"].shape
    (3, 300, 20)
    """
    out = None if out is None else Path(out).expanduser()
    if out is not None and out.exists():
        raise FileExistsError(f"out='{out}' is there already, and is left alone: name another store.")
    asked = ask(**locals(), labels=None)
    sweep = Sweep(asked.batches.codes, n_samples, at_mean=False, average=False, seed=asked.seed)
    axes, obs, cells = Axes(asked.batches.names, n_samples), asked.obs_names, asked.cells
    index = pd.Index(cells.names).get_indexer(obs)  # (obs,) -1: outside the model
    rows = np.flatnonzero(index >= 0)
    inside = torch.from_numpy(index[rows]).to(cells.label.device)
    pieces = with_bar(
        draw_counts(asked.model, cells, asked.features, sweep, inside),
        sweep.n_steps * len(inside),
        "draw",
        lambda piece: piece.rows.stop - piece.rows.start,
    )
    dims, coords = asked.dims(axes), asked.coordinates(axes)
    if out is not None:
        return stream(out, pieces, rows, dims, coords, axes.shape)
    import xarray as xr

    shapes = {mod: (*axes.shape, len(obs), len(coords[f"{mod}_var"])) for mod in dims}
    arrays = {mod: np.full(shape, np.nan, dtype=np.float32) for mod, shape in shapes.items()}
    flat = {mod: array.reshape(-1, *array.shape[-2:]) for mod, array in arrays.items()}  # (steps, obs, features)
    for piece in pieces:
        drawn = [part for part in (piece.rna, piece.prot) if part is not None]
        for array, part in zip(flat.values(), drawn, strict=True):
            array[piece.step, rows[piece.rows]] = part
    return xr.Dataset({mod: (dims[mod], array) for mod, array in arrays.items()}, coords)


CHUNK_BYTES = 4 * 2**20
"""About the size of a chunk on disk before it is compressed."""


def stream(
    path: Path,  # of a store that does not exist yet
    pieces: Iterable[CountDraws],  # in ascending order of cells
    rows: np.ndarray,  # of each cell that was asked for; rows in between stay NaN
    dims: dict[str, tuple[str, ...]],  # of each variable
    coords: dict[str, np.ndarray],  # of each dimension but the samples
    leading: tuple[int, ...],  # lengths of the leading axes
) -> xr.Dataset:
    """Write pieces as they come and return a Dataset that reads from the store."""
    import xarray as xr
    import zarr

    # the second format: every version of zarr reads it, and the third has no settled form for text yet
    second = {} if zarr.__version__.startswith("2.") else {"zarr_format": 2}
    with replacing(path) as store:  # counts in a file are checked as they are read
        xr.Dataset(coords=coords).to_zarr(store, mode="w-", consolidated=False, **second)
        group = zarr.open_group(str(store), mode="r+")
        arrays = [
            _create(group, mod, names, (*leading, len(coords["obs"]), len(coords[names[-1]])))
            for mod, names in dims.items()
        ]
        for piece in pieces:
            where = np.unravel_index(piece.step, leading)
            here = rows[piece.rows]
            parts = [part for part in (piece.rna, piece.prot) if part is not None]
            for array, part in zip(arrays, parts, strict=True):
                whole = np.full((here[-1] + 1 - here[0], part.shape[1]), np.nan, dtype=np.float32)
                whole[here - here[0]] = part
                array[(*map(int, where), slice(int(here[0]), int(here[-1]) + 1))] = whole
    return xr.open_zarr(path, consolidated=False, chunks=None)


def _create(group, name: str, dims: tuple[str, ...], shape: tuple[int, ...]):
    """An array of NaN in chunks of whole blocks of cells, its dimensions named as xarray wants it."""
    n_blocks = max(1, CHUNK_BYTES // (4 * NOISE_BLOCK * shape[-1]))
    chunks = (*(1 for _ in shape[:-2]), min(n_blocks * NOISE_BLOCK, max(shape[-2], 1)), shape[-1])
    create = group.create_array if hasattr(group, "create_array") else group.create_dataset  # zarr 3, zarr 2
    array = create(name, shape=shape, chunks=chunks, dtype="float32", fill_value=np.nan)
    array.attrs["_ARRAY_DIMENSIONS"] = list(dims)
    return array


@verb
@on_file
def feature_correlation(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    features: Sequence[str] | None = None,
    n_samples: int = 10,
    method: Literal["spearman", "pearson"] = "spearman",
    transform_batch: str | int | bool | Sequence[str] | None = None,
    n_cells: int | None = 2_000,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    inplace: bool = True,
) -> xr.DataArray | None:
    """Correlation of genes and proteins with the noise of counting and the library size left out.

    What is correlated are draws of the rates behind the counts: for each cell and sample a latent vector from its
    posterior, and then a gamma rate per feature, of which the counts would be Poisson. A protein that is background in
    the draw is 0. The draws of all cells are pooled, so that the correlation is across cells and types.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same genes (matched by name, in any order).
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    features
        Return the correlation of these alone: names, `"rna:CD4"` and `"prot:CD4"` where a gene and a protein share
        one. None: all, written to a slot. Each pair of features takes about 16 bytes while the matrix is made and four
        in the slot: for 20,000 genes 6.4 and 1.6 GB.
    n_samples
        Draws per cell.
    method
        "spearman" or "pearson".
    transform_batch
        Decode as if every cell came from this batch, so that differences between batches do not correlate features; a
        list or "all" averages the correlations of several batches. None: each cell's own.
    n_cells
        Cells that are drawn at random, without replacement, for a correlation whose standard error is about
        `1 / sqrt(n_cells)` at most. None: all cells. "spearman" keeps `n_cells * n_samples` rows of four bytes per
        feature in memory; "pearson" keeps sums only.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of cells and draws.
    key_added
        Prefix of the slot; default: the model's key.
    inplace
        Write the slot; False returns the DataArray.

    Returns
    -------
    None; with `features` or `inplace=False` a DataArray `(feature, feature_)` with the coordinates `modality` and
    `modality_`. A feature that never changes has NaN. Without `features`, `inplace` sets:

    `mdata.varp['{key}_correlation']` : float32 array (features, features)
        NaN outside the model's features. For an RNA model in `mdata['rna']`; in an AnnData, of the genes only.
    `uns[key]['correlation']` : dict
        How it was asked for.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, batch or feature, genes are missing, or an argument is out of its range.

    Notes
    -----
    Source: Gayoso et al., Nature Methods 2021. A gene likelihood without a gamma in it ("poisson", "normal") gives
    correlations of the expected expression itself.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.feature_correlation(mdata, features=["G001", "G002", "P01"]).shape
    (3, 3)
    """
    if n_cells is not None and n_cells < 3:
        raise ValueError(f"n_cells={n_cells} must be at least 3, or None for all cells.")
    inplace = inplace and features is None
    asked = ask(**locals(), answer="correlation", labels=None)
    sweep = Sweep(asked.batches.codes, n_samples, at_mean=False, average=False, seed=asked.seed)
    cells, setup = asked.cells, asked.setup
    index = np.arange(len(cells))
    if n_cells is not None and n_cells < len(cells):
        index = np.sort(np.random.default_rng(sweep.seed).choice(len(cells), n_cells, replace=False))
    index = torch.from_numpy(index).to(cells.label.device)

    def watch(blocks):
        return with_bar(blocks, len(index), "correlation", lambda block: len(block.q_z.mean))

    matrix = correlation(asked.model, cells, asked.features, sweep, index, method, watch)
    if not inplace:
        return _array(matrix, asked)
    names = {setup.rna_mod: setup.genes} | ({setup.prot_mod: setup.proteins} if setup.joint else {})
    told = {
        "method": method,
        "n_samples": n_samples,
        "n_cells": len(index),
        "transform_batch": asked.batches_asked,
        "random_state": asked.seed,
        "rna_mod": setup.rna_mod,
        "prot_mod": setup.prot_mod,
    }
    with asked.writer() as out:
        out.varp(slots.correlation(asked.to), matrix, names)
        out.params(asked.to, "correlation", told)
    return None


def _array(matrix: np.ndarray, asked: Context) -> xr.DataArray:
    """Features as and in the order in which they were asked for; a name that is a gene's and a protein's gets both."""
    import xarray as xr

    wanted = asked.features
    mods, names = zip(*((mod, name) for mod, names in asked.by_mod.items() for name in names), strict=True)
    if wanted.asked is not None:
        matrix, mods = matrix[np.ix_(wanted.order, wanted.order)], [mods[i] for i in wanted.order]
        names = list(wanted.asked)
    elif len(set(names)) < len(names):
        names = [f"{mod}:{name}" for mod, name in zip(mods, names, strict=True)]
    names, mods = list(names), list(mods)
    coords = {"feature": names, "feature_": names, "modality": ("feature", mods), "modality_": ("feature_", mods)}
    return xr.DataArray(matrix, dims=("feature", "feature_"), coords=coords, name="correlation")
