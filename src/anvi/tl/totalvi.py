"""tl.totalvi."""

from pathlib import Path
from typing import Literal, Unpack

from anvi._data.containers import Data
from anvi.nn.config import Dispersion, GeneLikelihood

from ._docs import documented
from ._fit import Options, RandomState, Where, run_fit


@documented(
    name="totalvi",
    n_latent="20",
    likelihood="nb",
    normal="",
    label_dispersion="",
)
def totalvi(
    data: Data,
    *,
    panel_key: str | None = None,
    missing: Literal["auto", "nan"] = "auto",
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
    """Fit totalVI: a joint latent space of RNA and protein counts, with protein background told from foreground.

    Parameters
    ----------
    {data}
    {panels}
    {mods}
    {fit}

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following fields, in `data`.

    `obsm['X_totalvi' | 'X_' + key_added]` : float32 array (cells, n_latent)
        Posterior mean of the latent space.
    `obs['totalvi_split']` : categorical
        "train" or "validation".
    `uns['totalvi']` : dict
        `params`, `classes`, `features`, `batches`, `panels`, `history` (one row per epoch, nats per cell) and `model`
        (JSON and safetensors bytes), from which every other verb works.

    Raises
    ------
    {raises}

    Notes
    -----
    Source: Gayoso et al., Nature Methods 2021.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, batch_key="batch", max_epochs=2)
    >>> mdata.obsm["X_totalvi"].shape
    (300, 20)
    """
    where = Where(
        labels_key=None,
        unlabeled_category="Unknown",
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
        **model_kwargs,
    }
    return run_fit(
        data,
        "totalvi",
        where,
        options,
        device=device,
        random_state=random_state,
        key_added=key_added,
        copy=copy,
        checkpoint=checkpoint,
    )
