"""get.likelihood_parameters and get.library_size: what a model says of cells, asked like the verbs of `tl`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.features import find_features
from anvi._model import Model
from anvi._posterior import parameters

from ._ask import ask
from ._queries import rna_names, rows_of

if TYPE_CHECKING:
    import xarray as xr


def likelihood_parameters(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    modality: str | None = None,
    features: Sequence[str] | None = None,
    device: str = "auto",
) -> xr.Dataset:
    r"""Parameters of the likelihood of every count, at the posterior mean of each cell.

    A count of gene :math:`g` in cell :math:`n` is negative binomial of mean `rna_mean` and inverse dispersion
    `rna_theta`, replaced by zero with `rna_zero_probability` ("zinb"); Poisson of mean `rna_mean`; or normal with the
    standard deviation `rna_scale`. That of a protein is negative binomial with inverse dispersion `prot_phi` and the
    mean :math:`\beta` with `prot_background_probability`, else :math:`\beta f`, where :math:`\log \beta` is normal.

    Parameters
    ----------
    data
        The fitted object, or another one with the same features.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    modality
        Name of the only modality; None: all of the model.
    features
        These alone: names, `"rna:CD4"` and `"prot:CD4"` where a gene and a protein share one.
    device
        "auto" or a torch device.

    Returns
    -------
    Dataset of (variables that a model does not have are not there)

    `rna_mean` (obs, rna_var)
        Expected count, without extra zeros.
    `rna_theta` (rna_var), (batch, rna_var), (label, rna_var) or (obs, rna_var)
        As the dispersion is "gene", "gene-batch", "gene-label" or "gene-cell"; `rna_scale` for "normal".
    `rna_zero_probability` (obs, rna_var)
        Of an extra zero.
    `prot_background_log_mean`, `prot_background_log_scale` (obs, prot_var)
        Of the normal posterior of the log background.
    `prot_foreground_factor`, `prot_background_probability` (obs, prot_var)
        How far the foreground is above the background, and the weight of the background.
    `prot_phi` (prot_var) or (batch, prot_var)
        Inverse dispersion.
    `prot_prior_log_mean`, `prot_prior_log_scale` (panel, prot_var)
        The prior of the log background.
    `prot_efficiency` (batch, prot_var)
        Multiplies the means of models of scvi-tools that have it.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, modality or feature, or the data do not fit it.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.scvi(mdata, max_epochs=2)
    >>> av.get.likelihood_parameters(mdata, features=["G001"])["rna_zero_probability"].dims
    ('obs', 'rna_var')
    """
    import xarray as xr

    fitted, _, setup, cells = ask(data, model, device=device, labels=None)
    wanted = find_features(setup, features, modality)
    names = rna_names(data, setup)
    rows = rows_of(names, cells)
    obs = slots.home(data, setup).obs_names
    labels = (*setup.classes, setup.unlabeled_category) if setup.classes else None
    coords = {
        "batch": list(setup.batches),
        "label": None if labels is None else list(labels),
        "panel": list(setup.panels),
        "obs": names.to_numpy(dtype=str),
    }
    found = {}
    if wanted.has_genes:
        found[setup.rna_mod] = wanted.gene_names, parameters.gene_parameters(fitted, cells, wanted, rows)
    if wanted.has_proteins:
        found[setup.prot_mod] = wanted.protein_names, parameters.protein_parameters(fitted, cells, wanted, rows)
    arrays = {}
    for mod, (features_of_mod, of_mod) in found.items():
        for name, (axis, values) in of_mod.items():
            dims = (f"{mod}_var",) if axis is None else (axis, f"{mod}_var")
            labelled = {f"{mod}_var": list(features_of_mod)}
            if axis is not None and coords[axis] is not None:
                labelled[axis] = coords[axis]
            arrays[f"{mod}_{name}"] = xr.DataArray(values, labelled, dims)
    out = xr.Dataset(arrays)
    return out if obs.equals(names) else out.reindex(obs=obs.to_numpy(dtype=str))


def library_size(data: Data, *, model: str | Path | Model | None = None, device: str = "auto") -> pd.Series:
    """The library size that a model reckons with: the posterior mean where it is latent, else what was observed.

    Parameters
    ----------
    data
        The fitted object, or another one with the same features.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    device
        "auto" or a torch device.

    Returns
    -------
    Series of counts (cells), or of size factors for a model that was fitted with them; NaN outside the model.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, or the data do not fit it.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.scvi(mdata, library="latent", max_epochs=2)
    >>> bool((av.get.library_size(mdata) > 0).all())
    True
    """
    fitted, key, setup, cells = ask(data, model, device=device)
    names = rna_names(data, setup)
    values = parameters.library_sizes(fitted, cells, rows_of(names, cells))
    return pd.Series(values, names, name=f"{key}_library_size").reindex(slots.home(data, setup).obs_names)
