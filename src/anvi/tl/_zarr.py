"""Draws written to a zarr store as they come, in chunks that xarray reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anvi._posterior.encode import NOISE_BLOCK
from anvi._posterior.predictive import Piece

if TYPE_CHECKING:
    import xarray as xr

CHUNK_BYTES = 4 * 2**20
"""About the size of a chunk on disk before it is compressed."""


def stream(
    path: Path,
    pieces: Iterable[Piece],
    rows: np.ndarray,
    dims: dict[str, tuple[str, ...]],
    coords: dict[str, np.ndarray],
    leading: tuple[int, ...],
) -> xr.Dataset:
    """Write pieces as they come and return a Dataset that reads from the store.

    Parameters
    ----------
    path
        The store; it does not exist yet.
    pieces
        Draws, in ascending order of cells.
    rows
        Row of each cell that was asked for; rows in between stay NaN.
    dims
        Dimensions of each variable.
    coords
        Labels of each dimension but the samples.
    leading
        Lengths of the leading axes.
    """
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
