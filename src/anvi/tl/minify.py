"""tl.minify."""

import logging
from pathlib import Path

from anvi._backed import on_file
from anvi._data import minified, slots
from anvi._data.containers import Data
from anvi._data.fits import check_no_own, stored_fits
from anvi._find import find_model
from anvi._model import Model
from anvi._posterior import encode, imputation
from anvi._runtime import verb

from ._ask import Context, ask

logger = logging.getLogger("anvi")


@verb
@on_file
def minify(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    keep_counts: bool = False,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Put the posterior of every cell in the place of its counts: a small object that the model still answers about.

    Everything that starts from the latent space goes on as before and gives the same answers: `tl.latent`,
    `tl.predict` and what decodes. What looks at counts (fits, `metrics.elbo`, `metrics.marginal_likelihood`,
    `metrics.reconstruction_error`, attributions, other models) raises an error that says so.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same features.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`. Its library size must be observed or
        a size factor; with a latent one the counts must be kept.
    keep_counts
        Only write the posterior. Counts stay where they are, and the model goes on encoding them. When the object is
        minified for another model later, this one can still be asked.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    copy
        Return a minified copy; the object itself stays as it is.

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following fields.

    `obsm['{key}_qz_mean']`, `obsm['{key}_qz_var']` : float32 arrays (cells, latent)
        Mean and variance of the latent posterior.
    `obsm['{key}_rna_view']` : float32 array (cells, latent + components)
        What proteins are imputed by, where any are; NaN for cells where none are.
    `obs['{key}_library']` : float32
        Summed RNA counts of the model's genes.
    `obs['{key}_measured']` : categorical
        Which proteins were measured: rows of `uns['{key}']['posterior']['measured']`. Joint models only.
    `uns['{key}']['minified']` : bool
        Whether the counts are gone.

    Unless `keep_counts`, empty sparse matrices of equal shape replace X, the model's layer and all other layers of
    counts in the modalities that the model reads (and `obsm[prot_obsm]` of an AnnData, whose column names move to
    `uns`); their `raw` is dropped. The log lists each. Other layers, other modalities and all other slots stay. Columns
    of obs that the model reads (batch, covariates, size factor) are still read.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, the data do not fit it, the counts are gone already, the library size is latent, or
        the object is backed by a file.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> small = av.tl.minify(mdata, copy=True)
    >>> small["rna"].X.nnz
    0
    >>> bool((av.tl.latent(small, inplace=False) == av.tl.latent(mdata, inplace=False)).all())
    True
    """
    asked = ask(**locals(), counts=True)
    _check(data, asked, keep_counts)
    model_id, stored = asked.model.fingerprint(), _stored(asked)
    data = slots.own(data, copy)
    with slots.all_or_nothing(data):
        with slots.writer(data, asked.setup, stored.names) as out:
            minified.write_posterior(out, asked.setup, asked.key, model_id, stored)
        if not keep_counts:
            logger.info(f"emptied: {', '.join(minified.drop_counts(data, asked.setup))}")
    return data if copy else None


def _check(data: Data, asked: Context, keep_counts: bool) -> None:
    check_no_own(asked.source, asked.setup, asked.key, minified.POSTERIOR)
    there = stored_fits(asked.source, whole=True)
    if asked.key in there and find_model(asked.source, asked.key)[0].fingerprint() != asked.model.fingerprint():
        raise ValueError(
            f"This object has a fit of its own under '{asked.key}', which is not the model that was passed. "
            "Minify for the fit that is there, or a copy without it."
        )
    if keep_counts:
        return
    if asked.model.config.library == "latent":
        raise ValueError(
            "The model's library size is latent and encoded from counts, so nothing could be decoded without them. "
            "Minify with keep_counts=True, or fit with library='observed'."
        )
    if data.isbacked:
        raise ValueError("The object is backed by a file, whose counts would be lost; read it into memory first.")


def _stored(asked: Context) -> minified.Stored:
    """The posterior of all cells, and what else of their counts is still needed."""
    cells = asked.cells
    mean, var = encode.posterior(asked.model, cells)
    joint = cells.mask_table is not None
    return minified.Stored(
        names=cells.names,
        q_mean=mean,
        q_var=var,
        library=cells.x.sum_of(cells.x_row).numpy(),  # exact; 0 where there is no RNA
        mask_table=cells.mask_table.cpu().numpy() if joint else None,
        mask_row=cells.mask_row.cpu().numpy() if joint else None,
        rna_view=imputation.stored_view(asked.model, cells),
    )
