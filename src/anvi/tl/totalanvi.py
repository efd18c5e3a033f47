"""tl.totalanvi."""

from pathlib import Path
from typing import Literal, Unpack

from anvi._data.containers import Data
from anvi._model import Model
from anvi.nn.config import Dispersion, GeneLikelihood

from ._docs import documented
from ._fit import Options, RandomState, Where, run_fit


@documented(
    name="totalanvi",
    n_latent="20",
    likelihood="nb",
    normal="",
    label_dispersion='"gene-label", ',
)
def totalanvi(
    data: Data,
    labels_key: str = "cell_type",
    *,
    unlabeled_category: str = "Unknown",
    panel_key: str | None = None,
    missing: Literal["auto", "nan"] = "auto",
    init: str | Model | None = None,
    train: Literal["all", "label_nets"] = "all",
    classification_ratio: float = 50.0,
    label_prior: Literal["uniform", "empirical", "learned"] = "uniform",
    linear_classifier: bool = False,
    rna_mod: str = "rna",
    prot_mod: str = "prot",
    prot_obsm: str | None = None,
    batch_key: str | None = None,
    layer: str | dict[str, str] | None = None,
    categorical_covariate_keys: list[str] | None = None,
    continuous_covariate_keys: list[str] | None = None,
    size_factor_key: str | None = None,
    n_latent: int | None = None,
    gene_likelihood: GeneLikelihood | None = None,
    dispersion: Dispersion | None = None,
    max_epochs: int | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    train_size: float = 0.9,
    early_stopping: bool = True,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    copy: bool = False,
    checkpoint: str | Path | None = None,
    **model_kwargs: Unpack[Options],
) -> Data | None:
    """Fit TotalANVI: RNA and protein counts and partly known cell types; predict the type of every cell.

    Cells without proteins, with another panel, or with NaN in place of a protein all take part; what was not
    measured is masked in input and likelihood alike.

    Parameters
    ----------
    {data}
    {labels}
    {panels}
    {mods}
    {fit}

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following fields, in `data`.

    `obsm['X_totalanvi' | 'X_' + key_added]` : float32 array (cells, n_latent)
        Posterior mean of the latent space.
    `obs['totalanvi_prediction']` : categorical
        Most probable cell type of every cell.
    `obs['totalanvi_confidence']` : float32
        Its probability, calibrated on validation cells.
    `obs['totalanvi_margin']`, `obs['totalanvi_entropy']`, `obs['totalanvi_novelty']` : float32
        Lead over the second class; entropy of all probabilities (0 to 1); distance to labelled cells (1 is far).
    `obs['totalanvi_label']` : categorical
        The cell's own label where it has one; else "Unassigned" where its novelty is above 1, else the prediction.
    `obsm['totalanvi_proba']` : DataFrame (cells, classes)
        All class probabilities.
    `uns['totalanvi_prediction_colors']`, `uns['totalanvi_label_colors']` : list of str
        The labels' colours, where they have any.
    `obs['totalanvi_split']` : categorical
        "train" or "validation".
    `uns['totalanvi']` : dict
        `params`, `classes`, `features`, `batches`, `panels`, `history` (one row per epoch, nats per cell) and `model`
        (JSON and safetensors bytes), from which every other verb works.

    Raises
    ------
    {raises}

    Notes
    -----
    Source: the TotalANVI model, totalVI's decoder under scANVI's latent hierarchy; the objective conditions a labelled
    cell on its own label.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    >>> mdata.obsm["X_totalanvi"].shape
    (300, 20)
    """
    where = Where(
        labels_key=labels_key,
        unlabeled_category=unlabeled_category,
        batch_key=batch_key,
        panel_key=panel_key,
        missing=missing,
        layer=layer,
        categorical_covariate_keys=categorical_covariate_keys,
        continuous_covariate_keys=continuous_covariate_keys,
        size_factor_key=size_factor_key,
        rna_mod=rna_mod,
        prot_mod=prot_mod,
        prot_obsm=prot_obsm,
    )
    options = {
        "n_latent": n_latent,
        "gene_likelihood": gene_likelihood,
        "dispersion": dispersion,
        "max_epochs": max_epochs,
        "batch_size": batch_size,
        "lr": lr,
        "train_size": train_size,
        "early_stopping": early_stopping,
        "classification_ratio": classification_ratio,
        "label_prior": label_prior,
        "linear_classifier": linear_classifier,
        **model_kwargs,
    }
    return run_fit(
        data,
        "totalanvi",
        where,
        options,
        init=init,
        train=train,
        device=device,
        random_state=random_state,
        key_added=key_added,
        copy=copy,
        checkpoint=checkpoint,
    )
