"""metrics.elbo, metrics.marginal_likelihood, metrics.reconstruction_error: how well a model explains counts."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from anvi._arguments import RandomState
from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data, Source
from anvi._data.labels import known_labels, tell_strange
from anvi._find import find_model
from anvi._model import Model
from anvi._posterior.bound import Marginal, bound, marginal
from anvi._posterior.encode import CHUNK
from anvi._runtime import verb
from anvi.settings import with_bar
from anvi.tl._ask import Context, ask

logger = logging.getLogger("anvi")


@verb
@on_file
def elbo(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    split: str | None = None,
    n_samples: int = 1,
    use_labels: bool = True,
    per_cell: bool = False,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
) -> dict[str, float] | pd.DataFrame:
    """The full evidence lower bound and all of its terms, in nats per cell; a higher bound is better.

    Nothing is weighed or left out: `elbo` is minus the sum of all other entries, which are costs. Unlike scvi-tools'
    numbers for models with labels, the reconstruction is the likelihood alone, and the bound has the terms of z and of
    the library size.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same features.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    split
        "train" or "validation": only these cells, as `obs['{key}_split']` has them; None: all.
    n_samples
        Draws of the latent variables per cell; the bound is their mean. More make it less noisy, not higher.
    use_labels
        True, as in training: a labelled cell is conditioned on its own label, and its bound is one of
        log p(counts, label); that of an unlabelled cell is one of log p(counts). False takes every cell for unlabelled:
        the column need not be there, and models with and without labels can be compared. (Fits with
        `objective="scvi-tools"` never condition on the label.)
    per_cell
        Return a row per cell instead of means.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the draws. A cell gets the same draws whichever other cells are asked about.

    Returns
    -------
    A dict of means over cells, or with `per_cell` a DataFrame (cells, terms) in the order of `obs_names`, without cells
    that are outside the model or the split. Entries: `elbo`; `reconstruction_rna` and `reconstruction_protein`, minus
    the log-likelihood of the counts (of the measured proteins); `kl_z`, `kl_u`, `kl_label`, `kl_library` and
    `kl_background`, the divergences; `penalty`, which only `objective="scvi-tools"` has with proteins. Terms that the
    model does not have are left out.

    Raises
    ------
    KeyError, ValueError
        If there is no such model or split, the data do not fit the model, or their counts were dropped by `tl.minify`.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> list(av.metrics.elbo(mdata, split="validation"))[:4]
    ['elbo', 'reconstruction_rna', 'reconstruction_protein', 'kl_z']
    """
    if use_labels:
        _check_labels(data, model)
    asked = ask(**locals(), labels=use_labels, counts=True)
    index = _cells_of(asked, split)
    if use_labels:
        _tell_labels(asked, index)
    found = bound(asked.model, asked.cells, index, n_samples, asked.seed)
    present = {name: values for name, values in found._asdict().items() if values is not None}
    return _answer(asked, index, present, per_cell)


@verb
@on_file
def reconstruction_error(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    split: str | None = None,
    n_samples: int = 1,
    per_cell: bool = False,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
) -> dict[str, float] | pd.DataFrame:
    """Minus the log-likelihood of the counts given the latent space, by modality, in nats per cell; lower is better.

    The expectation over the posterior of everything latent, and nothing else: no divergence is part of it. Labels are
    looked at only where dispersions depend on them.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same features.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    split
        "train" or "validation": only these cells, as `obs['{key}_split']` has them; None: all.
    n_samples
        Draws of the latent variables per cell; the error is their mean.
    per_cell
        Return a row per cell instead of means.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the draws, which are those of :func:`elbo`.

    Returns
    -------
    A dict with `rna` and, in joint models, `protein`, means over cells; or with `per_cell` a DataFrame (cells,
    modalities) in the order of `obs_names`. `protein` sums over the measured proteins of a cell, and is NaN (and left
    out of the mean) where none was, as is `rna` where there is no RNA; in `elbo`, such a cell counts as 0.

    Raises
    ------
    KeyError, ValueError
        If there is no such model or split, the data do not fit the model, or their counts were dropped by `tl.minify`.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> sorted(av.metrics.reconstruction_error(mdata))
    ['protein', 'rna']
    """
    asked = ask(**locals(), labels=None, counts=True)
    index = _cells_of(asked, split)
    found = bound(asked.model, asked.cells, index, n_samples, asked.seed)
    rna = True if asked.cells.has_rna is None else asked.cells.has_rna[index].cpu().numpy()
    present = {"rna": np.where(rna, found.reconstruction_rna, np.nan)}
    if found.reconstruction_protein is not None:
        some = asked.cells.has_protein[index].cpu().numpy()
        present["protein"] = np.where(some, found.reconstruction_protein, np.nan)
        if not per_cell and not some.all():
            logger.info(
                f"protein: mean over the {some.sum()} of {len(some)} cells that have any; in metrics.elbo the others "
                "count as 0"
            )
    return _answer(asked, index, present, per_cell)


@verb
@on_file
def marginal_likelihood(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    split: str | None = None,
    n_samples: int = 100,
    use_labels: bool = False,
    per_cell: bool = False,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
) -> dict[str, float] | pd.DataFrame:
    """Estimate the log-likelihood of cells, everything latent integrated out, in nats per cell; higher is better.

    Importance sampling: the log of the mean over draws of p(counts, latents) / q(latents), latents being z, and where
    the model has them the library size, the background of every measured protein, and for each class its u. A model
    with labels is taken at its word: its prior of z is that of the class mixture, not N(0, I). Source: Burda et
    al. 2016.

    The estimate of a cell is below the truth on average and rises with `n_samples`, so compare numbers of equal
    `n_samples` only. A cell whose `effective_samples` is close to 1 rests on a single draw.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same features.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    split
        "train" or "validation": only these cells, as `obs['{key}_split']` has them; None: all.
    n_samples
        Draws per cell. Every draw decodes every cell once: the costly part.
    use_labels
        False: log p(counts) of every cell, which can be compared between models with and without labels. True: of a
        labelled cell, log p(counts, label).
    per_cell
        Return a row per cell instead of means.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the draws. A cell gets the same draws whichever other cells are asked about.

    Returns
    -------
    A dict of means over cells, or with `per_cell` a DataFrame (cells, 2) in the order of `obs_names`, of
    `log_likelihood` and `effective_samples` (from 1 to `n_samples`).

    Raises
    ------
    KeyError, ValueError
        If there is no such model or split, the data do not fit the model, or their counts were dropped by `tl.minify`.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> likelihood = av.metrics.marginal_likelihood(mdata, n_samples=10)["log_likelihood"]
    >>> likelihood > av.metrics.elbo(mdata, use_labels=False, n_samples=10)["elbo"]
    True
    """
    if use_labels:
        _check_labels(data, model)
    asked = ask(**locals(), labels=use_labels, counts=True)
    index = _cells_of(asked, split)
    if use_labels:
        _tell_labels(asked, index)
    parts = (marginal(asked.model, asked.cells, some, n_samples, asked.seed) for some in index.split(CHUNK))
    parts = list(with_bar(parts, len(index), "marginal likelihood", lambda part: len(part.log_likelihood)))
    found = dict(zip(Marginal._fields, map(np.concatenate, zip(*parts, strict=True)), strict=True))
    return _answer(asked, index, found, per_cell)


def _tell_labels(asked: Context, index: Tensor) -> None:
    """Say which labels the model does not know, so that their cells count as if they had none."""
    known = known_labels(asked.source, asked.setup, pd.Index(asked.cells.names[index.cpu().numpy()]))
    if known is not None:
        tell_strange(known, f"labels_key='{asked.setup.labels_key}': the model", "scored")


def _check_labels(data: Data, model: str | Path | Model | None) -> None:
    """Raise a KeyError if the labels of the fit are not in an object."""
    source, setup = Source(data), find_model(data, model)[0].setup
    for key in filter(None, setup.label_columns or (setup.labels_key,)):
        try:
            source.column(key, "labels", tuple(source.mods))
        except KeyError as error:
            raise KeyError(
                f"The labels of the fit, '{key}', are not in this object; use_labels=False does without them."
            ) from error


def _cells_of(asked: Context, split: str | None) -> Tensor:
    """Positions of the cells of a split among all that were read; None: of all."""
    device = asked.cells.label.device
    if split is None:
        return torch.arange(len(asked.cells), device=device)
    obs, slot = slots.home(asked.source.data, asked.setup).obs, slots.split(asked.key)
    if slot not in obs:
        raise KeyError(f"split='{split}' needs obs['{slot}'], which the fit writes; it is not in this object.")
    of_cell = obs[slot].reindex(asked.cells.names)
    index = np.flatnonzero((of_cell == split).to_numpy())
    if not len(index):
        there = ", ".join(map(repr, of_cell.dropna().unique()))
        raise ValueError(f"split='{split}': no cell of obs['{slot}'] is in it; there are: {there or 'none'}.")
    return torch.from_numpy(index).to(device)


def _answer(asked: Context, index: Tensor, columns: dict[str, np.ndarray], per_cell: bool):
    """Means over cells, or a table of cells in the order of the object."""
    table = pd.DataFrame(columns, index=asked.cells.names[index.cpu().numpy()])
    if not per_cell:
        return {name: float(mean) for name, mean in table.mean().items()}
    return table.loc[asked.obs_names[asked.obs_names.isin(table.index)]]
