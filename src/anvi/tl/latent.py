"""tl.latent."""

from pathlib import Path

from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.select import check_samples
from anvi._model import Model
from anvi._posterior import encode
from anvi._runtime import verb

from ._ask import ask
from ._fit import RandomState


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
    n_samples = None if n_samples is None else check_samples(n_samples)
    inplace = inplace and n_samples is None
    asked = ask(
        data,
        model,
        where=(rna_mod, prot_mod, prot_obsm),
        device=device,
        random_state=0 if n_samples is None else random_state,
        key_added=key_added,
        inplace=inplace,
        answer="latent",
    )
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
