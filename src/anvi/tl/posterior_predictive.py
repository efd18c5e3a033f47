"""tl.posterior_predictive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from anvi._backed import on_file
from anvi._data.containers import Data
from anvi._data.select import check_samples
from anvi._model import Model
from anvi._posterior.encode import NOISE_BLOCK
from anvi._posterior.expected import Sweep
from anvi._posterior.predictive import CountDraws, draw_counts
from anvi._runtime import verb
from anvi.settings import with_bar

from ._ask import Axes, ask
from ._fit import RandomState

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
    transform_batch: str | Sequence[str] | None = None,
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
    n_samples = check_samples(n_samples)
    out = None if out is None else Path(out).expanduser()
    if out is not None and out.exists():
        raise FileExistsError(f"out='{out}' is there already; delete it or name another store.")
    asked = ask(
        data,
        model,
        features=features,
        modality=modality,
        transform_batch=transform_batch,
        where=(rna_mod, prot_mod, prot_obsm),
        device=device,
        random_state=random_state,
        labels=None,
    )
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
    xr.Dataset(coords=coords).to_zarr(path, mode="w-", consolidated=False, **second)
    group = zarr.open_group(str(path), mode="r+")
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
