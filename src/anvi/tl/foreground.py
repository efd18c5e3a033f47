"""tl.foreground."""

from collections.abc import Sequence

import pandas as pd

from anvi._data import slots
from anvi._data.containers import Data
from anvi._find import key_to_write
from anvi._model import Model
from anvi._posterior import denoise
from anvi._posterior.denoise import Sweep

from ._ask import ask
from ._fit import RandomState, seed_of
from ._queries import check_samples, find_batches, rna_names, rows_of, table
from .denoise import write_proteins


def foreground(
    data: Data,
    *,
    model: str | Model | None = None,
    transform_batch: str | Sequence[str] | None = None,
    n_samples: int = 1,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    inplace: bool = True,
) -> pd.DataFrame | None:
    r"""Probability that what is counted of a protein is on the cell, and not background.

    It is :math:`1 - \sigma(m)`, the weight of the foreground in the mixture that the decoder gives for the cell's place
    in the latent space. It says what to expect of such a cell before its own count is looked at, so unstained cells
    have one, too.

    Parameters
    ----------
    data
        The fitted object, or another one with the same genes (matched by name, in any order). Proteins need not be
        there.
    model
        Key, folder or :class:`~anvi.Model` with proteins; None: the only fitted model in `data`.
    transform_batch
        Decode as if every cell came from this batch; a list or "all" averages over batches. None: each cell's own.
    n_samples
        1 decodes the mean of the latent posterior; more averages over so many posterior samples.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the samples.
    key_added
        Prefix of the slots; default: the model's key.
    inplace
        Write the slots; False returns the table instead.

    Returns
    -------
    None, or a DataFrame (cells, proteins), NaN for cells outside the model. Sets:

    `mdata.obsm['{key}_prot_foreground']` : DataFrame (cells, proteins)
        Of every cell, whether stained or not ("/" in a name is "|" in the column).
    `mdata['prot'].layers['{key}_foreground']` : float32 array (cells, proteins)
        The same for the cells of the protein modality; an AnnData has no place for it.
    `uns[key]['foreground']` : dict
        How it was asked for.

    Raises
    ------
    KeyError, ValueError
        If there is no such model or batch, the model has no proteins, or genes are missing.

    Notes
    -----
    Source: Gayoso et al., Nature Methods 2021.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.foreground(mdata)
    >>> mdata.obsm["totalvi_prot_foreground"].shape
    (300, 20)
    """
    n_samples = check_samples(n_samples)
    fitted, key, setup, cells = ask(data, model, rna_mod=rna_mod, prot_mod=prot_mod, prot_obsm=prot_obsm, device=device)
    if not fitted.config.has_protein:
        raise ValueError(
            f"The model '{key}' ({fitted.name}) has no proteins; fit tl.totalvi or tl.totalanvi to tell their "
            "foreground from background."
        )
    batches = find_batches(setup, transform_batch)
    key = key_to_write(data, fitted, key, key_added) if inplace else key
    sweep = Sweep(batches.codes, n_samples, at_mean=n_samples == 1, seed=seed_of(random_state))
    names = rna_names(data, setup)
    values = denoise.foreground(fitted, cells, sweep, rows_of(names, cells))
    if not inplace:
        return table(values, names, setup.proteins, data, setup)
    data = slots.own(data, False)
    out = slots.writer(data, setup, names)
    write_proteins(out, slots.prot_foreground(key), slots.foreground(key), setup, values)
    asked = None if batches.codes is None else [setup.batches[code] for code in batches.codes]
    out.params(key, "foreground", {"transform_batch": asked, "n_samples": n_samples, "random_state": sweep.seed})
    out.log()
    return None
