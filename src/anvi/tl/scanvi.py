"""tl.scanvi."""

from pathlib import Path
from typing import Literal, Unpack

from anvi._data.containers import Data
from anvi._model import Model
from anvi.nn.config import Dispersion, GeneLikelihood

from ._docs import documented
from ._fit import Options, RandomState, Where, run_fit


@documented(
    name="scanvi",
    n_latent="10",
    likelihood="zinb",
    normal="",
    label_dispersion='"gene-label", ',
)
def scanvi(
    data: Data,
    labels_key: str = "cell_type",
    *,
    unlabeled_category: str = "Unknown",
    init: str | Model | None = None,
    train: Literal["all", "label_nets"] = "all",
    classification_ratio: float = 50.0,
    label_prior: Literal["uniform", "empirical", "learned"] = "uniform",
    linear_classifier: bool = False,
    rna_mod: str = "rna",
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
    """Fit scANVI: RNA counts and partly known cell types; predict the type of every cell.

    Parameters
    ----------
    {rna_data}
    {labels}
    {rna_mod}
    {fit}

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following fields, in `mdata['rna']` (obs repeated in
    `mdata.obs` as `rna:...`) or the AnnData.

    `obsm['X_scanvi' | 'X_' + key_added]` : float32 array (cells, n_latent)
        Posterior mean of the latent space.
    `obs['scanvi_prediction']` : categorical
        Most probable cell type of every cell.
    `obs['scanvi_confidence']` : float32
        Its probability, calibrated on validation cells.
    `obs['scanvi_margin']`, `obs['scanvi_entropy']`, `obs['scanvi_novelty']` : float32
        Lead over the second class; entropy of all probabilities (0 to 1); distance to labelled cells (1 is far).
    `obs['scanvi_label']` : categorical
        The cell's own label where it has one; else "Unassigned" where its novelty is above 1, else the prediction.
    `obsm['scanvi_proba']` : DataFrame (cells, classes)
        All class probabilities.
    `uns['scanvi_prediction_colors']`, `uns['scanvi_label_colors']` : list of str
        The labels' colours, where they have any.
    `obs['scanvi_split']` : categorical
        "train" or "validation".
    `uns['scanvi']` : dict
        `params`, `classes`, `features`, `batches`, `panels`, `history` (one row per epoch, nats per cell) and `model`
        (JSON and safetensors bytes), from which every other verb works.

    Raises
    ------
    {raises}

    Notes
    -----
    Source: Xu et al., Molecular Systems Biology 2021; the objective conditions a labelled cell on its own label.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.scanvi(mdata, batch_key="batch", max_epochs=2)
    >>> mdata["rna"].obsm["X_scanvi"].shape
    (300, 10)
    """
    where = Where(
        labels_key=labels_key,
        unlabeled_category=unlabeled_category,
        batch_key=batch_key,
        panel_key=None,
        missing="auto",
        layer=layer,
        categorical_covariate_keys=categorical_covariate_keys,
        continuous_covariate_keys=continuous_covariate_keys,
        size_factor_key=size_factor_key,
        rna_mod=rna_mod,
        prot_mod="prot",
        prot_obsm=None,
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
        "scanvi",
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
