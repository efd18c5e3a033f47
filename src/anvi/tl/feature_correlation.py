"""tl.feature_correlation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.select import check_samples
from anvi._model import Model
from anvi._posterior.expected import Sweep
from anvi._posterior.predictive import correlation
from anvi._runtime import verb
from anvi.settings import with_bar

from ._ask import Context, ask
from ._fit import RandomState

if TYPE_CHECKING:
    import xarray as xr


@verb
@on_file
def feature_correlation(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    features: Sequence[str] | None = None,
    n_samples: int = 10,
    method: Literal["spearman", "pearson"] = "spearman",
    transform_batch: str | Sequence[str] | None = None,
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
    n_samples = check_samples(n_samples)
    if method not in ("spearman", "pearson"):
        raise ValueError(f"method='{method}' is neither 'spearman' nor 'pearson'.")
    if n_cells is not None and n_cells < 3:
        raise ValueError(f"n_cells={n_cells} must be at least 3, or None for all cells.")
    inplace = inplace and features is None
    asked = ask(
        data,
        model,
        features=features,
        transform_batch=transform_batch,
        where=(rna_mod, prot_mod, prot_obsm),
        device=device,
        random_state=random_state,
        key_added=key_added,
        inplace=inplace,
        answer="correlation",
        labels=None,
    )
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
