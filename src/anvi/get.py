"""Tidy answers from what lies in the slots, class names exact."""

from pathlib import Path

import pandas as pd

from ._data import slots
from ._data.containers import Data
from ._find import resolve
from ._model import Model

__all__ = ["history", "model", "proba"]


def model(data: Data, key: str | None = None) -> Model:
    """The fitted model that lies in an object.

    Parameters
    ----------
    data
        A fitted MuData or AnnData.
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
    return resolve(data, key, "key")[0]


def proba(data: Data, *, model: str | Path | Model | None = None) -> pd.DataFrame:
    """Class probabilities as they were written, with the exact class names.

    Parameters
    ----------
    data
        An object with `obsm['{key}_proba']`.
    model
        Key or :class:`~anvi.Model`; None: the only fitted model there.

    Returns
    -------
    DataFrame (cells, classes).

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
    fitted, key = resolve(data, model)
    if not fitted.config.has_labels:
        raise ValueError(f"The model '{key}' ({fitted.name}) has no labels and hence no probabilities.")
    part = slots.home(data, fitted.setup)
    if slots.proba(key) not in part.obsm:
        raise KeyError(f"There is no obsm['{slots.proba(key)}']; run av.tl.predict(data, model='{key}') first.")
    table = part.obsm[slots.proba(key)].copy()
    table.columns = list(fitted.classes)
    return table


def history(data: Data, *, model: str | Path | Model | None = None) -> pd.DataFrame:
    """The course of a fit: one row per epoch, every term in nats per cell, training and validation.

    Parameters
    ----------
    data
        A fitted object.
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
    return resolve(data, model)[0].history.copy()
