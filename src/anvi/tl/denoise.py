"""tl.denoise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from anvi._arguments import RandomState
from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data
from anvi._model import Model
from anvi._posterior import expected
from anvi._posterior.expected import Sweep, expected_expression
from anvi._posterior.imputation import Imputing
from anvi._runtime import verb

from ._ask import Axes, Context, ask

if TYPE_CHECKING:
    import xarray as xr


@verb
@on_file
def denoise(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    modality: str | None = None,
    transform_batch: str | int | bool | Sequence[str] | None = None,
    library_size: float | Literal["observed", "latent"] = 1.0,
    n_samples: int = 1,
    return_mean: bool = True,
    features: Sequence[str] | None = None,
    include_background: bool = False,
    return_interval: float | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    inplace: bool = True,
) -> pd.DataFrame | xr.Dataset | None:
    r"""Expected expression of every gene and protein in every cell, proteins of unstained cells imputed.

    Of a gene it is the share of the library, times `library_size`. Of a protein it is the expected count above
    background, :math:`(1 - \sigma(m)) \beta f`, or with `include_background` the whole expected count,
    :math:`\sigma(m) \beta + (1 - \sigma(m)) \beta f`, where :math:`\beta` is the background, :math:`f` how far the
    foreground is above it, and :math:`\sigma(m)` the probability of background.

    Proteins that nothing was measured of, neither in the cell's batch nor (for cells without any) in the cell, are not
    decoded but imputed: two thirds the mean log count of the 30 nearest measured cells, in latent vectors and principal
    components of RNA together, and one third a ridge regression on these components; for cells with other proteins, the
    mean of that and of the decoded log count. Counts of several measured batches are put on one scale first, for kits
    differ manyfold: on their mean, or of a cell whose batch measured the protein, on that of the batch. With
    `include_background` it is a count as measured cells have it; without, the decoder's share of foreground of that.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same genes (by name, in any order). Proteins need not be
        there.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    modality
        Name of the only modality to denoise; None: all of the model. The decoder of the other is not run.
    transform_batch
        Decode as if every cell came from this batch; a list or "all" averages over batches. None: each cell's own.
        The encoder always sees the true batch.
    library_size
        What the shares of the genes are multiplied by: a number of counts, "observed" (the cell's own library, or its
        size factor) or "latent" (the mean of the model's latent library size; the observed one where the model takes
        that as given). Proteins are in counts anyway.
    n_samples
        1 decodes the mean of the latent posterior: no noise, and the best imputation where it was measured. More
        averages over so many posterior samples.
    return_mean
        False keeps batches and samples apart and returns them.
    features
        Return these alone: names, `"rna:CD4"` and `"prot:CD4"` where a gene and a protein share one.
    include_background
        Count the background of a protein, too: closer to measured counts, and what to compare with them; without it,
        closer to what is on the cell.
    return_interval
        How often an interval is to hold the count that would have been measured, between 0 and 1: its ends are
        returned, too, for imputed proteins (NaN elsewhere). Of proteins that the cell's batch never measured they are
        wider by how far measured batches are apart, less so where the batch measured five other proteins; a warning
        tells where nothing is known of that, and where proteins are decoded. Another tissue is beyond what it knows.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the samples.
    key_added
        Prefix of the slots; default: the model's key.
    inplace
        Write the slots; False returns a Dataset instead.

    Returns
    -------
    None; with `features` a DataFrame (cells, features); with `return_mean=False` or `inplace=False` a Dataset of
    `rna` (batch, sample, obs, rna_var) and `prot` (batch, sample, obs, prot_var), with the axis `batch` where a list
    or "all" is kept apart, and `sample` where `n_samples` above 1 are. NaN for cells and features outside the model.
    Without `features` and with `return_mean`, `inplace` sets:

    `mdata['rna'].layers['{key}_denoised']` : float32 array (cells, genes)
        Genes, in units of `library_size`.
    `mdata.obsm['{key}_rna_denoised']` : table (cells, genes)
        Genes of every cell, where some cells have no RNA.
    `mdata.obsm['{key}_prot_denoised']` : table (cells, proteins)
        Proteins in counts, of every cell whether stained or not.
    `mdata['prot'].layers['{key}_denoised']` : float32 array (cells, proteins)
        The same for the cells of the protein modality; an AnnData has no place for it.
    `mdata.obsm['{key}_prot_lower']`, `mdata.obsm['{key}_prot_upper']` : table (cells, proteins)
        Ends of the interval, with `return_interval`; in a Dataset `prot_lower` and `prot_upper`.
    `uns[key]['denoise']` : dict
        By modality, how it was asked for; for proteins `imputed`, too: the share of cells in which each was imputed.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, batch, modality or feature, genes are missing, or an argument is out of its range.

    Notes
    -----
    What is averaged over samples or batches, or decoded as in another batch, comes from the decoder alone, and so does
    everything of models that an earlier anvi or scvi-tools fitted. How good imputation is on real
    queries, and where it fails: `docs/how_good.md`.

    Source: Lopez et al. 2018; Gayoso et al. 2021 (proteins). A per-batch efficiency of a model of scvi-tools is left
    out, as there: such proteins are in counts of a batch of efficiency 1.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.denoise(mdata)
    >>> mdata["rna"].layers["totalvi_denoised"].shape
    (300, 60)
    >>> av.tl.denoise(mdata, features=["G001", "P01"]).columns.tolist()
    ['G001', 'P01']
    """
    # what is asked, and of which cells
    library_size = _check_library(library_size)
    decodes_own = transform_batch is None and n_samples == 1 and return_mean
    _check_interval(return_interval, decodes_own and features is None)
    inplace = inplace and return_mean and features is None
    asked = ask(**locals(), answer="denoise")
    sweep = Sweep(asked.batches.codes, n_samples, at_mean=n_samples == 1, average=return_mean, seed=asked.seed)
    columns = slice(None) if asked.features.proteins is None else asked.features.proteins
    # proteins that were not measured around a cell come from cells where they were
    imputing = None
    if decodes_own and asked.features.has_proteins:
        imputing = Imputing.of(asked.model, asked.cells, asked.rows, include_background, return_interval)
    if return_interval is not None and imputing is None:
        raise ValueError(
            f"return_interval={return_interval} is for imputed proteins, and none is imputed here: the batch of every "
            "cell measured them, no cell has RNA, too few cells of the reference were measured, or the model cannot "
            "(an earlier anvi or scvi-tools fitted it)."
        )
    # expected counts
    answer = expected_expression(
        asked.model,
        asked.cells,
        asked.features,
        sweep,
        library_size=library_size,
        include_background=include_background,
        rows=asked.rows,
        beside=None if imputing is None else imputing.add,
    )
    imputed = None if imputing is None else imputing.found
    if imputed is not None:
        np.copyto(answer.prot, imputed.value[:, columns], where=~np.isnan(imputed.value[:, columns]))
    # into a table, a Dataset, or the slots
    if not inplace and return_mean and features is not None:
        return asked.features_table(answer)
    if not inplace:
        axes = Axes(None, None)
        if not return_mean:
            axes = Axes(asked.batches.names, n_samples if n_samples > 1 else None)
            answer = [None if part is None else part.reshape(*axes.shape, *part.shape[2:]) for part in answer]
        found = asked.dataset(answer, axes)
        if return_interval is not None:
            for name, values in (("prot_lower", imputed.lower), ("prot_upper", imputed.upper)):
                found[name] = (
                    found[asked.setup.prot_mod].dims,
                    asked.table(values[:, columns], asked.features.protein_names).to_numpy(),
                )
        return found

    setup = asked.setup
    told = {"transform_batch": asked.batches_asked, "n_samples": n_samples, "random_state": asked.seed}
    with asked.writer() as out:
        params = dict(out.home.uns.get(asked.to, {}).get("denoise", {}))  # of the other modality, asked before
        if answer.rna is not None:
            _write_rna(out, asked, answer.rna)
            params[setup.rna_mod] = told | {"library_size": library_size}
        if answer.prot is not None:
            _write_proteins(out, asked, slots.prot_denoised(asked.to), slots.denoised(asked.to), answer.prot)
            params[setup.prot_mod] = told | {"include_background": include_background}
            slots.remove(out.home, slots.prot_lower(asked.to), slots.prot_upper(asked.to))  # of another time
            if imputed is not None:
                params[setup.prot_mod]["imputed"] = (~np.isnan(imputed.value)).mean(0)
            if return_interval is not None:
                params[setup.prot_mod]["return_interval"] = return_interval
                out.obsm(slots.prot_lower(asked.to), imputed.lower, setup.proteins)
                out.obsm(slots.prot_upper(asked.to), imputed.upper, setup.proteins)
        out.params(asked.to, "denoise", params)
    return None


def _check_interval(coverage: float | None, possible: bool) -> None:
    if coverage is None:
        return
    if not 0 < coverage < 1:
        raise ValueError(f"return_interval={coverage!r} is a share of cells, above 0 and below 1; try 0.9.")
    if not possible:
        raise ValueError(
            "return_interval= gives the ends for imputed values alone: leave transform_batch, n_samples, features and "
            "return_mean as they are."
        )


def _check_library(library_size: float | str) -> float | str:
    if isinstance(library_size, str):
        return library_size
    if not 0 < library_size < np.inf:
        raise ValueError(f"library_size={library_size!r} must be a positive number, 'observed' or 'latent'.")
    return float(library_size)


def _write_rna(out: slots.Writer, asked: Context, values: np.ndarray) -> None:
    """Values of genes: of the cells of the RNA modality into its layers; where others have none, of all into obsm."""
    slots.remove(out.home, slots.rna_denoised(asked.to))
    if asked.cells.has_rna is not None:
        out.obsm(slots.rna_denoised(asked.to), values.copy(), list(asked.setup.genes))
    if asked.source.alone or asked.setup.rna_mod in out.data.mod:
        out.layer(asked.setup.rna_mod, slots.denoised(asked.to), values, asked.setup.genes)


def _write_proteins(out: slots.Writer, asked: Context, table: str, layer: str, values: np.ndarray) -> None:
    """Values of proteins: of every cell into obsm, and of the cells of the protein modality into its layers."""
    out.obsm(table, values.copy(), asked.setup.proteins)  # which the layer may not share
    if asked.setup.prot_mod in asked.source.mods:
        out.layer(asked.setup.prot_mod, layer, values, asked.setup.proteins)


@verb
@on_file
def foreground(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    transform_batch: str | int | bool | Sequence[str] | None = None,
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
        The fitted object or its file, or another one with the same genes (by name, in any order). Proteins need not be
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

    `mdata.obsm['{key}_prot_foreground']` : table (cells, proteins)
        Of every cell, whether stained or not.
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
    asked = ask(**locals(), answer="foreground")
    if not asked.model.config.has_protein:
        raise ValueError(
            f"The model '{asked.key}' ({asked.model.name}) has no proteins; fit tl.totalvi or tl.totalanvi to tell "
            "their foreground from background."
        )
    sweep = Sweep(asked.batches.codes, n_samples, at_mean=n_samples == 1, seed=asked.seed)
    values = expected.foreground(asked.model, asked.cells, sweep, asked.rows)
    if not inplace:
        return asked.table(values, asked.setup.proteins)
    told = {"transform_batch": asked.batches_asked, "n_samples": n_samples, "random_state": asked.seed}
    with asked.writer() as out:
        _write_proteins(out, asked, slots.prot_foreground(asked.to), slots.foreground(asked.to), values)
        out.params(asked.to, "foreground", told)
    return None
