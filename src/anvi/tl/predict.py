"""tl.predict and tl.latent: what classifier and encoder say of cells."""

from pathlib import Path

import numpy as np
import pandas as pd

from anvi._arguments import RandomState
from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.fits import check_no_own
from anvi._data.labels import known_labels, tell_strange
from anvi._data.predictions import write_predictions
from anvi._model import Model
from anvi._posterior import encode
from anvi._posterior.confidence import FALSE_REJECTS, HIGHEST, MIN_VALIDATION, limits, novelties, prediction_sets
from anvi._runtime import verb

from ._ask import ask


@verb
@on_file
def predict(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    soft: bool = True,
    use_posterior_mean: bool = True,
    false_rejects: float | None = None,
    coverage: float | None = None,
    confidence: float | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    inplace: bool = True,
) -> pd.Series | pd.DataFrame | None:
    """Predict the cell type of every cell, also of cells that the model has not seen; labels are not needed.

    The user's own columns stay as they are.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same genes (by name, in any order). Proteins it lacks
        count as not measured; so does the whole protein modality.
    model
        Key, folder or :class:`~anvi.Model` with labels; None: the only fitted model in `data`.
    soft
        Also write (or return) the probabilities of all classes.
    use_posterior_mean
        Classify the mean of the latent posterior; False: one sample of it.
    false_rejects
        Share of cells of known types that may be called "Unassigned" in `obs['{key}_label']`; 0 calls none so.
    coverage
        Also write (or return) prediction sets: the classes that a cell may be, its own among them in this share of
        cells, class by class, if they are to the model as held-out cells are that were thinned as queries often are.
        Of classes with fewer held-out cells than 1 / (1 - coverage) - 1 it holds together; of each alone, n / (n + 1).
    confidence
        Share of the labels in `obs['{key}_label']` that are to be right, at every level, on cells like the held-out
        ones: a cell is labelled at the finest level that is sure enough, else "Unassigned". None: at the finest.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the sample.
    key_added
        Prefix of the slots; default: the model's key.
    inplace
        Write the slots; False returns a DataFrame of sets (`coverage`), of probabilities (`soft`) or a Series of
        classes.

    Returns
    -------
    None, a Series or a DataFrame with exact class names. Sets:

    `obs['{key}_prediction']` : categorical
        Most probable class.
    `obs['{key}_confidence']` : float32
        Its probability: the mean of the classifier's and of the labels of the nearest labelled training cells,
        calibrated, where the fit had labelled validation cells enough; else the classifier's own.
    `obs['{key}_margin']`, `obs['{key}_entropy']` : float32
        Difference between the two highest probabilities; entropy of all, 0 for sure and 1 for all alike.
    `obs['{key}_novelty']` : float32
        Distance to the nearest class, by how far its cells scatter, lengthened where no class stands out; 5 % of
        held-out labelled cells score above 1.
    `obs['{key}_label']` : categorical
        What the user says of the cell, in the column that the model was fitted with, where there is one and it says
        something, a class of the model or not; else "Unassigned" where the novelty is too high; else the prediction.
        With labels at several levels: the name at the finest level at which the novelty is low and, with `confidence`,
        the model sure; among what the user's coarse label leaves open, and never coarser than that.
    `obs['{key}_prediction_{level}']`, `obs['{key}_confidence_{level}']`, `obs['{key}_novelty_{level}']`
        The same of the coarser levels, where there are any; probabilities are sums over classes.
    `obsm['{key}_proba']` : table (cells, classes)
        With `soft`: all probabilities.
    `obsm['{key}_sets']` : table (cells, classes)
        With `coverage`: 1 for the classes in the set of the cell, else 0; a cell without any fits no class.
    `uns[key]['sets']` : dict
        With `coverage`: `coverage`, and `promise`, for each class the held-out cells, what is promised of it alone, and
        with which classes together the coverage holds.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, it has no labels, genes are missing, a batch is unknown, a column of the user's own
        is where the labels go, or `coverage` is asked of a model with too few labelled validation cells.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> av.tl.predict(mdata, inplace=False).shape
    (300, 6)
    """
    random_state = 0 if use_posterior_mean else random_state
    asked = ask(**locals(), answer="predict")
    fitted, cells, key = asked.model, asked.cells, asked.key
    if false_rejects is not None and not 0 <= false_rejects < 1:
        raise ValueError(f"false_rejects={false_rejects!r:.80} is a share of cells: at least 0 and below 1.")
    if not fitted.config.has_labels:
        raise ValueError(
            f"The model '{key}' ({fitted.name}) has no labels; fit tl.scanvi or tl.totalanvi to predict them."
        )
    if false_rejects and (fitted.landmarks is None or fitted.landmarks.centre is None):
        raise ValueError(
            f"The model '{key}' cannot tell what is far from its classes: it had fewer than {MIN_VALIDATION} labelled "
            "validation cells, or is older. Leave false_rejects=None, or fit with more labels or a lower train_size."
        )
    if coverage is not None:
        _check_coverage(fitted, key, coverage)
        if inplace:
            check_no_own(asked.source, asked.setup, asked.to, "sets")
    if confidence is not None:
        _check_confidence(fitted, key, confidence)
    embedding = encode.embed(fitted, cells, sample_seed=None if use_posterior_mean else asked.seed)
    sets = None if coverage is None else prediction_sets(fitted, cells, embedding.proba, coverage)
    if not inplace:
        if sets is not None:
            return asked.table(sets.inside.astype(np.float32), fitted.classes, cells.names)
        table = asked.table(embedding.proba, fitted.classes, cells.names)
        if soft:
            return table
        return pd.Series(pd.Categorical(table.idxmax(axis=1), categories=fitted.classes), table.index)
    known = known_labels(asked.source, asked.setup, pd.Index(cells.names))
    if known is not None:
        tell_strange(known, f"labels_key='{asked.setup.labels_key}': the model", "predicted")
    far = novelties(fitted, cells, embedding, FALSE_REJECTS if false_rejects is None else false_rejects)
    least = None if confidence is None else limits(fitted.landmarks, confidence)[encode.kind_of(fitted, cells)]
    told = {"soft": soft, "known": known, "far": far, "limits": least, "sets": None if sets is None else sets.inside}
    with asked.writer(cells.names) as out:
        write_predictions(out, asked.to, fitted.setup.levels, embedding.proba, **told)
        out.params(asked.to, "sets", None if sets is None else {"coverage": coverage, "promise": sets.promise})
    return None


def _check_coverage(model: Model, key: str, coverage: float) -> None:
    if not 0 < coverage <= HIGHEST:
        raise ValueError(f"coverage={coverage!r:.80} is a share of cells: above 0, and at most {HIGHEST}.")
    if model.landmarks is None or model.landmarks.own is None:
        raise ValueError(
            f"The model '{key}' keeps no labelled validation cells to take prediction sets from: it had fewer than "
            f"{MIN_VALIDATION}, or is not anvi's. Leave coverage=None, or fit with more labels or a lower train_size."
        )


def _check_confidence(model: Model, key: str, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r:.80} is a share of labels: above 0 and below 1.")
    if model.landmarks is None or model.landmarks.sure is None:
        raise ValueError(
            f"The model '{key}' keeps no labelled validation cells to promise anything by: it had fewer than "
            f"{MIN_VALIDATION}, or is older. Leave confidence=None, or fit with more labels or a lower train_size."
        )


@verb
@on_file
def latent(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    n_samples: int | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    inplace: bool = True,
):
    """Place cells in the latent space of a fitted model; also cells that it has not seen.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same genes (matched by name, in any order).
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    n_samples
        None: the posterior mean. A number: so many samples of the posterior, returned and not stored.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the samples.
    key_added
        Prefix of the slot; default: the model's key.
    inplace
        Write the slot; False returns the array instead.

    Returns
    -------
    None, the array (cells, latent) in the order of `obs_names`, or a DataArray (sample, obs, latent). Sets:

    `obsm['X_{key}']` : float32 array (cells, latent)
        Posterior mean.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, genes are missing, or a batch is unknown.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.latent(mdata, n_samples=3).dims
    ('sample', 'obs', 'latent')
    """
    inplace = inplace and n_samples is None
    random_state = 0 if n_samples is None else random_state
    asked = ask(**locals() | {"n_samples": 1 if n_samples is None else n_samples}, answer="latent")
    if n_samples is not None:
        import xarray as xr

        samples = encode.latent_samples(asked.model, asked.cells, n_samples, asked.seed)
        coords = {"obs": asked.cells.names.astype(str)}
        samples = xr.DataArray(samples, dims=("sample", "obs", "latent"), coords=coords, name=asked.key)
        return samples.reindex(obs=asked.obs_names.astype(str).to_numpy())
    mean = encode.embed(asked.model, asked.cells).mean
    if not inplace:
        return asked.table(mean, range(mean.shape[1]), asked.cells.names).to_numpy()
    with asked.writer(asked.cells.names) as out:
        out.obsm(slots.latent(asked.to), mean)
        if not slots.is_fit(out.home.uns.get(asked.to)):
            out.params(asked.to, "latent", True)
    return None
