"""metrics.novelty: would cells of a type that nobody labelled be noticed?"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd

from anvi._backed import on_file, quiet_mudata
from anvi._data import slots
from anvi._data.containers import Data, as_names, check_type
from anvi._data.labels import label_column
from anvi._data.setup import Setup
from anvi._find import find_model
from anvi._fit.plan import Plan
from anvi._fit.start import NO_OPTIONS
from anvi._model import Model
from anvi._runtime import verb
from anvi.nn import Config
from anvi.tl._fit import foreign_options, run_fit

LEFT_OUT = "anvi_left_out"
"""Column of labels without one class, in the copies that are fitted."""


@verb
@on_file
def novelty(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    classes: Sequence[str] | None = None,
    max_epochs: int | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """Leave one cell type out: fit again without its labels, and see whether its cells stand out.

    For every class the model is fitted again, with the options of the fit, to a copy of the data in which no cell of
    the class has a label. A score that knows what it does not know is high for these cells and low for validation cells
    of the other classes. This takes as many fits as there are classes; name some, or pass a lower `max_epochs`.

    Parameters
    ----------
    data
        The fitted object, with counts.
    model
        Key or :class:`~anvi.Model` with labels; None: the only fitted model in `data`.
    classes
        Which types to leave out; None: all.
    max_epochs
        Epochs of each fit; None: as many as the fit had.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.

    Returns
    -------
    DataFrame with a row per class that was left out. Columns:

    `cells`
        Labelled cells of the class.
    `auroc`
        Of the novelty score: these cells against labelled validation cells of all other classes.
    `rejected`, `false_rejects`
        Share of these cells, and of those validation cells, with a score above 1.
    `taken_for`
        The class that most of them are predicted to be.

    Raises
    ------
    KeyError, ValueError
        If there is no such model or class, the model has no labels, or too few cells are labelled to tell.

    Notes
    -----
    For each class, a copy of the data without its labels is fitted anew with the options and the seed of the model, and
    the class's cells are scored as in `obs['{key}_novelty']`. Nothing is written.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(1200, n_genes=60)
    >>> av.tl.scanvi(mdata, max_epochs=2, train_size=0.8)
    >>> table = av.metrics.novelty(mdata, classes=["B"])
    >>> list(table.columns)
    ['cells', 'auroc', 'rejected', 'false_rejects', 'taken_for']
    """
    check_type(data)
    fitted, key = find_model(data, model)
    fitted = replace(fitted, setup=fitted.setup.elsewhere(rna_mod=rna_mod, prot_mod=prot_mod, prot_obsm=prot_obsm))
    if not fitted.config.has_labels:
        raise ValueError(f"The model '{key}' ({fitted.name}) has no labels, so none can be left out.")
    classes = fitted.classes if classes is None else as_names(classes)
    if strangers := sorted(set(classes) - set(fitted.classes)):
        raise KeyError(f"classes: '{strangers[0]}' is no class of the model; it has {', '.join(fitted.classes)}.")
    rows = {name: _leave_out(data, fitted, name, max_epochs, device) for name in classes}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("left_out")


def _leave_out(data: Data, fitted: Model, name: str, max_epochs: int | None, device: str) -> dict:
    from sklearn.metrics import roc_auc_score

    setup, key = fitted.setup, "anvi_left_out"
    with quiet_mudata():
        copy = data.copy()
    labels = label_column(copy, setup.labels_key, setup.unlabeled_category, setup.mods)
    cells = slots.home(copy, setup).obs_names
    left = labels.where(labels != name).reindex(cells).fillna(setup.unlabeled_category)
    slots.writer(copy, setup, cells).obs(LEFT_OUT, pd.Categorical(left))
    options = _options(fitted) | ({} if max_epochs is None else {"max_epochs": max_epochs})
    run_fit(
        fitted.name,
        copy,
        model_kwargs=options,
        device=device,
        random_state=int(fitted.info.get("random_state", 0)),
        key_added=key,
        **_setup_arguments(setup),
    )
    home = slots.home(copy, setup)
    if slots.novelty(key) not in home.obs:
        raise ValueError(f"Without '{name}' too few validation cells are labelled to say what is far.")
    true, score = labels.reindex(home.obs_names), home.obs[slots.novelty(key)]
    of_class = (true == name).to_numpy()
    others = ((home.obs[slots.split(key)] == "validation") & true.notna()).to_numpy() & ~of_class
    return {
        "cells": int(of_class.sum()),
        "auroc": float(roc_auc_score(of_class[of_class | others], score[of_class | others])),
        "rejected": float((score[of_class] > 1).mean()),
        "false_rejects": float((score[others] > 1).mean()),
        "taken_for": str(home.obs[slots.prediction(key)][of_class].mode()[0]),
    }


def _options(fitted: Model) -> dict:
    """Options of the network and of the training, as they were."""
    config = fitted.config.to_dict()
    network = {field.name: config[field.name] for field in fields(Config) if field.name not in NO_OPTIONS}
    training = {field.name: fitted.info.get(field.name) for field in fields(Plan)}
    foreign = foreign_options(fitted.name)
    return {name: value for name, value in (network | training).items() if value is not None and name not in foreign}


def _setup_arguments(setup: Setup) -> dict:
    """Where things are, as the fit was told, but for the labels."""
    places = ((setup.rna_mod, setup.rna_layer), (setup.prot_mod, setup.prot_layer))
    layers = {mod: layer for mod, layer in places if layer}
    covariates = [key for key, _ in setup.categorical]
    same = ("genes", "unlabeled_category", "batch_key", "panel_key", "missing", "size_factor_key", "rna_mod")
    same += ("prot_mod", "prot_obsm", *(["proteins"] if setup.joint else []))
    told = {name: getattr(setup, name) for name in same}
    return told | {
        "labels_key": LEFT_OUT,
        "layer": layers or None,
        "categorical_covariate_keys": covariates or None,
        "continuous_covariate_keys": list(setup.continuous) or None,
    }
