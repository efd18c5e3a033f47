"""Tidy answers from what lies in the slots, class names exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ._backed import on_file
from ._data import containers, rankings, slots
from ._data.containers import Data
from ._data.fits import asking
from ._data.predictions import warn_of_strangers
from ._data.select import find_features
from ._find import find_model
from ._model import Model
from ._posterior import expected
from ._runtime import verb
from .tl._ask import ask

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "attributions",
    "batch_representation",
    "de",
    "denoised",
    "history",
    "library_size",
    "likelihood_parameters",
    "model",
    "proba",
    "table",
]


def __dir__() -> list[str]:
    return __all__


@verb
@on_file
def likelihood_parameters(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    modality: str | None = None,
    features: Sequence[str] | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
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
        The fitted object or its file, or another one with the same features.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data.uns`.
    modality
        Name of the only modality; None: all of the model.
    features
        These alone: names, `"rna:CD4"` and `"prot:CD4"` where a gene and a protein share one.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
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

    asked = ask(**locals(), labels=None)
    setup, wanted, names = asked.setup, asked.features, asked.names
    of_genes, of_proteins = expected.parameters(asked.model, asked.cells, wanted, asked.rows)
    coords = {
        "batch": list(setup.batches),
        "label": [*setup.classes, setup.unlabeled_category] if setup.classes else None,
        "panel": list(setup.panels),
        "obs": names.to_numpy(dtype=str),
    }
    arrays = {}
    for mod, features_of_mod, of_mod in (
        (setup.rna_mod, wanted.gene_names, of_genes),
        (setup.prot_mod, wanted.protein_names, of_proteins),
    ):
        for name, (axis, values) in of_mod.items():
            dims = (f"{mod}_var",) if axis is None else (axis, f"{mod}_var")
            labelled = {f"{mod}_var": list(features_of_mod)}
            if axis is not None and coords[axis] is not None:
                labelled[axis] = coords[axis]
            arrays[f"{mod}_{name}"] = xr.DataArray(values, labelled, dims)
    out = xr.Dataset(arrays)
    return out if asked.obs_names.equals(names) else out.reindex(obs=asked.obs_names.to_numpy(dtype=str))


@verb
@on_file
def library_size(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
) -> pd.Series:
    """The library size that a model reckons with: the posterior mean where it is latent, else what was observed.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same features.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data.uns`.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
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
    asked = ask(**locals())
    values = expected.library_sizes(asked.model, asked.cells, asked.rows)
    return pd.Series(values, asked.names, name=f"{asked.key}_library_size").reindex(asked.obs_names)


@on_file
def model(data: Data, key: str | None = None) -> Model:
    """The fitted model that lies in an object.

    Parameters
    ----------
    data
        A fitted MuData or AnnData; the model lies in `uns['{key}']['model']`.
    key
        Its key; None: the only one there.

    Returns
    -------
    :class:`~anvi.Model`, its network on the CPU and in eval mode.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, or several and none is named.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.get.model(mdata).name
    'totalvi'
    """
    return find_model(data, key, "key")[0]


@on_file
def proba(data: Data, *, model: str | Path | Model | None = None, level: str | None = None) -> pd.DataFrame:
    """Class probabilities as they were written, with the exact class names.

    Parameters
    ----------
    data
        An object with `obsm['{key}_proba']`.
    model
        Key or :class:`~anvi.Model`; None: the only fitted model there.
    level
        Of labels that have several: sums over the classes of each group. None: the classes.

    Returns
    -------
    DataFrame (cells, classes), or (cells, groups).

    Raises
    ------
    KeyError, ValueError
        If nothing was predicted yet, or the model has no labels.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> bool((abs(av.get.proba(mdata).sum(axis=1) - 1) < 1e-5).all())
    True
    """
    fitted, key = find_model(data, model)
    if not fitted.config.has_labels:
        raise ValueError(f"The model '{key}' ({fitted.name}) has no labels and hence no probabilities.")
    part = slots.home(data, fitted.setup)
    if slots.proba(key) not in part.obsm:
        raise KeyError(f"There is no obsm['{slots.proba(key)}']; {asking(data, 'predict', key)} first.")
    found = slots.table(part, slots.proba(key), fitted.classes)
    if (column := slots.prediction(key)) in part.obs:  # columns of two fits are joined without their names
        warn_of_strangers(None, part.obs[column].dropna().astype(str), fitted.classes, "", column)
    levels = fitted.setup.levels
    number = levels.position(level)
    return pd.DataFrame(levels.sums(found.to_numpy(), number), found.index, list(levels.groups(number)))


@on_file
def table(data: Data, slot: str) -> pd.DataFrame:
    """Any table in obsm that anvi wrote, with the exact names of its columns.

    In a MuData it is an array, since mudata 0.3 cannot bring a DataFrame up to date, and `uns["{slot}_names"]` has the
    names of its columns.

    Parameters
    ----------
    data
        The object, or a modality of it.
    slot
        Name in obsm: `"totalanvi_sets"`, `"totalanvi_prot_foreground"`, `"true_protein_rate"` ...

    Returns
    -------
    DataFrame (cells, columns), a copy.

    Raises
    ------
    KeyError
        If there is no such slot, or its columns have no names.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.get.table(mdata, "true_foreground")["P01"].unique().tolist()
    [0.0, 1.0]
    """
    parts = containers.Source(data).parts
    part = next((part for part in parts if slot in part.obsm), None)
    if part is None:
        there = [name for part in parts for name in part.obsm if slots.names_of(name) in part.uns]
        raise KeyError(f"There is no obsm['{slot}']; tables there are {', '.join(map(repr, there)) or 'none'}.")
    return slots.table(part, slot)


@on_file
def de(
    data: Data,
    group: str | int | bool | Sequence[str] | None = None,
    modality: str | None = None,
    *,
    key: str = "rank_genes_groups",
) -> pd.DataFrame:
    """Differential expression as one tidy table over groups and modalities.

    Parameters
    ----------
    data
        An object to which :func:`anvi.tl.differential_expression` has written, or `sc.tl.rank_genes_groups`.
    group
        One or several groups; None: all.
    modality
        Name of the only modality that is wanted; None: all that have a result. An AnnData has "rna", and "prot" for
        the proteins beside it.
    key
        Name of the slot: `mdata['{mod}'].uns['{key}']`.

    Returns
    -------
    DataFrame with a row per modality, group and feature, in rank order: `modality`, `group`, `names`, `scores`,
    `logfoldchanges` (log2), `pvals`, `pvals_adj`, and of anvi's results `proba_de`, `bayes_factor`, `lfc_std`,
    `mean_group`, `mean_reference` (expression on either side) and `is_de`: whether the feature may be called at the
    false discovery rate that was asked for.

    Raises
    ------
    KeyError
        If there is no such result or group.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.differential_expression(mdata, "true_cell_type", n_samples=200)
    >>> len(av.get.de(mdata, "NK", "prot"))
    20
    """
    tables = []
    for mod, stored, groups in rankings.chosen_rankings(data, group, modality, key):
        table = rankings.ranking_table(stored, groups)
        table.insert(0, "modality", mod)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@on_file
def batch_representation(data: Data, *, model: str | Path | Model | None = None) -> pd.DataFrame:
    """What a model has learnt of each batch: all numbers of it that stand for a batch, side by side.

    A batch shifts the units of each layer that it is injected into. Batches with similar rows are alike to the model;
    distances between rows can be clustered, or drawn by their principal components.

    Parameters
    ----------
    data
        A fitted object.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data.uns`.

    Returns
    -------
    DataFrame (batches, units), float32; the columns are layer and unit.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, or it was fitted to a single batch.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, batch_key="batch", max_epochs=2)
    >>> av.get.batch_representation(mdata).index.tolist()
    ['batch_0', 'batch_1', 'batch_2']
    """
    fitted, key = find_model(data, model)
    batches = list(fitted.setup.batches)
    if len(batches) < 2:
        raise ValueError(f"The model '{key}' was fitted to one batch; fit with batch_key= to tell several apart.")
    tables = {
        name.removesuffix(".covariates"): pd.DataFrame(rows[: len(batches)].numpy(), batches)  # batches come first
        for name, rows in fitted.network.state_dict().items()
        if name.endswith(".covariates") and not name.startswith("labels.")
    }
    return pd.concat(tables, axis=1, names=["layer", "unit"])


@on_file
def history(data: Data, *, model: str | Path | Model | None = None) -> pd.DataFrame:
    """The course of a fit: one row per epoch, every term in nats per cell, training and validation.

    Parameters
    ----------
    data
        A fitted object; read is `uns['{key}']['history']`.
    model
        Key or :class:`~anvi.Model`; None: the only fitted model there.

    Returns
    -------
    DataFrame (epochs, terms); `kl_weight` and `lr` are those of the epoch.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> len(av.get.history(mdata))
    2
    """
    return find_model(data, model)[0].history.copy()


@on_file
def denoised(
    data: Data,
    features: Sequence[str] | None = None,
    *,
    model: str | Path | Model | None = None,
    key_added: str | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
) -> pd.DataFrame:
    """Denoised genes and proteins as :func:`anvi.tl.denoise` wrote them, side by side and with their exact names.

    Parameters
    ----------
    data
        An object with `mdata['rna'].layers['{key}_denoised']` or `mdata.obsm['{key}_prot_denoised']`.
    features
        Names, `"rna:CD4"` and `"prot:CD4"` where a gene and a protein share one. None: all that were written and are
        still there; a name that a gene and a protein share then comes with its modality.
    model
        Key or :class:`~anvi.Model`; None: the only fitted model there.
    key_added
        Prefix of the slots, where it is not the model's key.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.

    Returns
    -------
    DataFrame (cells, features): genes in units of the `library_size` that was asked for, proteins in counts. NaN for
    cells outside the model.

    Raises
    ------
    KeyError, ValueError
        If nothing was denoised yet, there is no such model or feature, it has left the object, or a name means two.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.denoise(mdata)
    >>> av.get.denoised(mdata, ["P01", "G007"]).shape
    (300, 2)
    """
    fitted, key = find_model(data, model)
    setup = fitted.setup.elsewhere(rna_mod=rna_mod, prot_mod=prot_mod, prot_obsm=prot_obsm)
    key = key if key_added is None else key_added
    wanted = find_features(setup, features)
    home, tables = slots.home(data, setup), {}
    command = f"{asking(data, 'denoise', key)} first"
    whole = home.obsm.get(slots.rna_denoised(key))  # where some cells have no RNA
    rna = None if whole is not None else containers.Source(data).modality(setup.rna_mod, "rna_mod")
    if whole is not None:
        tables[setup.rna_mod] = slots.table(home, slots.rna_denoised(key), setup.genes)[list(wanted.gene_names)]
    elif slots.denoised(key) in rna.layers:
        column = containers.positions(pd.Index(wanted.gene_names), rna.var_names.astype(str))[0]
        there = [name for name, place in zip(wanted.gene_names, column, strict=True) if place >= 0]
        if features is not None and len(there) < len(column):
            gone = next(name for name in wanted.gene_names if name not in there)
            raise KeyError(f"features: '{gone}' is no longer among the genes of the object, nor are its values.")
        values = rna.layers[slots.denoised(key)][:, column[column >= 0]]
        tables[setup.rna_mod] = pd.DataFrame(values, rna.obs_names, there).reindex(home.obs_names)
    elif wanted.has_genes and features is not None:
        raise KeyError(f"There is no layers['{slots.denoised(key)}'] with genes; {command}.")
    if slots.prot_denoised(key) in home.obsm:
        table = slots.table(home, slots.prot_denoised(key), setup.proteins)
        tables[setup.prot_mod] = table[list(wanted.protein_names)]
    elif wanted.has_proteins and features is not None:
        raise KeyError(f"There is no obsm['{slots.prot_denoised(key)}']; {command}.")
    if not tables:
        raise KeyError(f"There is no layers['{slots.denoised(key)}']; {command}.")
    out = pd.concat(tables.values(), axis=1)
    if features is not None:
        return out.iloc[:, wanted.order].set_axis(list(wanted.asked), axis=1)
    mods = [mod for mod, table in tables.items() for _ in table]
    shared = out.columns.duplicated(keep=False)
    names = zip(mods, out.columns, shared, strict=True)
    return out.set_axis([f"{mod}:{name}" if both else name for mod, name, both in names], axis=1)


@on_file
def attributions(data: Data, *, model: str | None = None, per_cell: bool = False) -> xr.Dataset:
    """Why a class: what genes and proteins contribute to its logit, as :func:`anvi.tl.attributions` wrote it.

    Parameters
    ----------
    data
        An object with attributions: `mdata['{mod}'].varm['{key}_attributions']`, and `uns`, `layers` of that name.
    model
        Prefix of their slots: the model's key, or the `key_added` that was given; None: the only ones there.
    per_cell
        Also those of single cells, if they were kept.

    Returns
    -------
    Dataset with the dimensions `class` (exact names of the groups) and, for each modality, `{mod}_var`:

    `{mod}`
        Mean attribution in logits.
    `{mod}_presence`
        The part of it that is due to presence: what counts above the baseline bring, less what it costs cells to be
        below it; at the most the mean.
    `{mod}_error`, `{mod}_cells`
        Standard error of the mean, and the number of cells that were measured.
    `{mod}_per_cell`
        With `per_cell`: attributions of single cells (obs, {mod}_var), NaN where not measured.
    `n_cells`, `difference`, `delta`, `complete`
        Per class: cells, mean of what attributions should sum to, mean absolute error of their sum, and the share of
        cells where it is below 1 %.

    Raises
    ------
    KeyError, ValueError
        If there are none, or several and none is named.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> av.tl.attributions(mdata, n_cells=10)
    >>> av.get.attributions(mdata)["prot"].dims
    ('class', 'prot_var')
    """
    key, parts = rankings.resolve_attributions(data, model)
    single = [part.cells(key) for part in parts] if per_cell else []
    if any(table is None for table in single):
        raise KeyError(
            f"Attributions of single cells were not kept under '{key}'; run av.tl.attributions(data, per_cell=True)."
        )
    return rankings.attributions_dataset(parts, single)
