"""The desk: every verb that asks a fitted model comes here first, and gets a `Context` with all that it needs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from anvi._arguments import RandomState, seed_of
from anvi._data import slots
from anvi._data.cells import Cells, read_cells
from anvi._data.containers import Data, Source, cell_names, check_natural, lend_rna, listed, no_obsm_beside
from anvi._data.fits import check_no_own
from anvi._data.minified import is_minified, read_stored
from anvi._data.select import Batches, Features, Groups, Mask, find_batches, find_features, find_groups
from anvi._data.setup import Setup
from anvi._find import find_model, key_to_write
from anvi._model import Model
from anvi._posterior.differential import measured_in
from anvi._runtime import made_current
from anvi.settings import choose_device

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr


logger = logging.getLogger("anvi")


class Axes(NamedTuple):
    """Leading axes of an answer in an xarray Dataset."""

    batches: tuple[str, ...] | None  # None: no such axis
    n_samples: int | None

    @property
    def dims(self) -> tuple[str, ...]:
        """Their names."""
        return (() if self.batches is None else ("batch",)) + (() if self.n_samples is None else ("sample",))

    @property
    def shape(self) -> tuple[int, ...]:
        """Their lengths."""
        batches = () if self.batches is None else (len(self.batches),)
        return batches if self.n_samples is None else (*batches, self.n_samples)


@dataclass(frozen=True, eq=False)
class Context:
    """What a verb asks: which model about which cells and features, and where the answer goes."""

    source: Source
    model: Model  # on the device
    key: str  # prefix of the model's slots
    setup: Setup  # how the cells were read
    cells: Cells  # on the device
    features: Features
    batches: Batches  # to decode in
    groups: Groups | None
    seed: int
    to: str  # prefix of the slots that the answer goes to

    @property
    def names(self) -> pd.Index:
        """Names of all cells in the order of answers: that of the RNA modality, then those with proteins alone."""
        setup = self.setup
        return cell_names(self.source, setup.rna_mod, setup.mod_beside)

    @property
    def rows(self) -> torch.Tensor:
        """Row of each cell of the model in an answer `(cells,)`."""
        return torch.from_numpy(self.names.get_indexer(self.cells.names))

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells of the part that holds the model's results; there may be more than the model has."""
        return slots.home(self.source.data, self.setup).obs_names

    @property
    def batches_asked(self) -> list[str] | None:
        """Names of the batches to decode in, for the parameters of an answer."""
        return None if self.batches.codes is None else [self.setup.batches[code] for code in self.batches.codes]

    @property
    def by_mod(self) -> dict[str, tuple[str, ...]]:
        """Names of the features that are asked for, by modality."""
        found = {self.setup.rna_mod: self.features.gene_names, self.setup.prot_mod: self.features.protein_names}
        return {mod: names for mod, names in found.items() if names}

    def table(
        self, values: np.ndarray, columns: Sequence[str], cells: pd.Index | np.ndarray | None = None
    ) -> pd.DataFrame:
        """A DataFrame in the order of the object's cells, NaN for those outside the model."""
        return pd.DataFrame(values, self.names if cells is None else cells, list(columns)).reindex(self.obs_names)

    def features_table(self, parts: Sequence[np.ndarray | None]) -> pd.DataFrame:
        """Genes and proteins `(cells, features)` in one table, as and in the order in which they were asked for."""
        values = np.concatenate([part for part in parts if part is not None], axis=1)[:, self.features.order]
        return self.table(values, self.features.asked)

    def writer(self, cells: np.ndarray | None = None) -> slots.Writer:
        """The writer for an answer in the order of :attr:`names`, or of other cells; a view becomes an own object."""
        return slots.writer(slots.own(self.source.data, False), self.setup, self.names if cells is None else cells)

    def dims(self, axes: Axes) -> dict[str, tuple[str, ...]]:
        """Dimensions of each modality in a Dataset."""
        return {mod: (*axes.dims, "obs", f"{mod}_var") for mod in self.by_mod}

    def coordinates(self, axes: Axes) -> dict[str, np.ndarray]:
        """Labels along each dimension; samples are known by their number alone."""
        found = {"obs": self.obs_names.to_numpy(dtype=str)}
        if axes.batches is not None:
            found["batch"] = np.array(axes.batches, dtype=str)
        return found | {f"{mod}_var": np.array(names, dtype=str) for mod, names in self.by_mod.items()}

    def dataset(self, parts: Sequence[np.ndarray | None], axes: Axes) -> xr.Dataset:
        """Genes and proteins `(*axes, cells, features)` over the object's cells, NaN for those outside the model."""
        import xarray as xr

        arrays = [part for part in parts if part is not None]
        if not self.obs_names.equals(self.names):
            row = self.names.get_indexer(self.obs_names)
            arrays = [np.take(array, row, axis=-2) for array in arrays]
            for array in arrays:
                array[..., row < 0, :] = np.nan
        dims = self.dims(axes)
        variables = {mod: (dims[mod], array) for mod, array in zip(dims, arrays, strict=True)}
        return xr.Dataset(variables, self.coordinates(axes))


def ask(
    data: Data,
    model: str | Path | Model | None = None,
    *,
    features: Sequence[str] | None = None,
    modality: str | None = None,
    transform_batch: str | int | bool | Sequence[str] | None = None,
    n_samples: int = 1,
    grouping: tuple[str | None, str | Sequence[str] | Mapping[str, Mask], str] | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    inplace: bool = False,
    labels: bool | None = False,
    counts: bool = False,
    answer: str | None = None,
    **own,
) -> Context:
    """Settle a question: find the model, features, batches and groups, and read the cells as the model wants them.

    A verb hands on all of its arguments at its beginning, `ask(**locals())`.

    Parameters
    ----------
    data
        The fitted object, or another one with the same features.
    model
        Key, folder, :class:`~anvi.Model`, or None for the only fitted model in `data`.
    features, modality, transform_batch
        As in the verbs.
    n_samples
        How many samples are drawn of each cell, if any are; checked here.
    grouping
        `groupby`, `groups` and `reference` of a comparison; None: nothing is compared.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`.
    device
        "auto" or a torch device.
    random_state
        Seed of what is drawn.
    key_added, inplace
        Whether the answer is written, and under which prefix; None: the model's key.
    labels
        Whether to read the labels, too; None: if the likelihood needs them.
    answer
        What the answer is noted as in `uns`, so that what else lies in its slots is known to be the user's.
    counts
        Whether the question is about the counts themselves, so that the posterior in minified data is no answer.
    **own
        Further arguments of the verb, which are its own matter.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, feature, batch or group, the data do not fit the model, or counts are needed that
        `tl.minify` has dropped.
    """
    # which model, which features, batches and groups: wrong arguments are told before anything is read
    source = Source(data)
    check_natural(n_samples, "n_samples")
    fitted, key = find_model(source, model)
    no_obsm_beside(source, prot_obsm)
    setup = fitted.setup.elsewhere(rna_mod=rna_mod, prot_mod=prot_mod, prot_obsm=prot_obsm)
    lend_rna(source, setup)
    wanted, batches = find_features(setup, features, modality), find_batches(setup, transform_batch)
    groups = None if grouping is None else find_groups(source, setup, *grouping)
    to = key_to_write(source, fitted, key, key_added) if inplace else key
    if inplace and answer is not None:
        check_no_own(source, setup, to, answer)
    seed, on_device = seed_of(random_state), made_current(choose_device(device))
    # the cells, or what stands in for their counts
    stored = None
    if is_minified(source, setup, key):
        if counts:
            raise ValueError(
                f"This needs counts, and av.tl.minify has dropped those of this object (uns['{key}']['minified']); "
                f"only the posterior is left, in obsm['{slots.qz_mean(key)}']. Ask the object from before, or minify "
                "with keep_counts=True."
            )
        stored = read_stored(source, setup, key, fitted.fingerprint())
    labels = fitted.config.dispersion == "gene-label" if labels is None else labels
    tell_cells_without_rna(fitted, source, setup)
    check_columns(source, setup)
    cells = read_cells(source, setup, labels=labels, stored=stored, asked=True).to(on_device)
    if batches.codes is not None and wanted.has_proteins:
        tell_unmeasured(fitted, cells, batches.codes, wanted)
    return Context(source, fitted.on(on_device), key, setup, cells, wanted, batches, groups, seed, to)


def check_columns(source: Source, setup: Setup) -> None:
    """Raise a KeyError if a batch or category is not there; it says which the model knows, and what is left to do."""
    arguments = {setup.panel_key: "panel_key", setup.batch_key: "batch_key"}
    for key, known in ((setup.batch_key, setup.batches), (setup.panel_key, setup.panels), *setup.categorical):
        try:
            argument = arguments.get(key, "categorical_covariate_keys")
            if key is not None:
                source.text(key, argument, setup.mods)
        except KeyError as error:
            raise KeyError(
                f"{error.args[0]} The model knows {listed(map(repr, known), 10)}: write into obs['{key}'] which these "
                "cells are of, or map them as new: av.tl.map_query(query, reference)."
            ) from error


def tell_unmeasured(model: Model, cells: Cells, codes: Sequence[int], features: Features) -> None:
    """Warn where proteins are to be decoded as in batches that did not measure them."""
    setup, columns = model.setup, slice(None) if features.proteins is None else features.proteins
    by_batch = setup.panel_key is None and len(setup.measured) == len(setup.batches)
    codes = [code for code in codes if by_batch or (cells.batch == code).any()]  # of others nothing is known
    lacking = ~measured_in(model, cells).numpy()[codes][:, columns]  # (batches, proteins)
    if lacking.any():
        which = ", ".join(repr(setup.batches[code]) for code, row in zip(codes, lacking, strict=True) if row.any())
        names = list(itertools.compress(features.protein_names, lacking.any(0)))
        logger.warning(
            f"transform_batch: {len(names)} proteins ({listed(names, 4)}) were not measured in {which}, of which the "
            "model has not learnt what they look like there: take batches that measured them"
        )


def tell_cells_without_rna(model: Model, source: Source, setup: Setup) -> None:
    """Say that cells with proteins alone are outside of a model that has never seen any.

    Raises
    ------
    ValueError
        If no cell has RNA.
    """
    if not setup.joint or not setup.needs_rna:
        return
    with_rna = source.modality(setup.rna_mod, "rna_mod").n_obs
    alone = len(cell_names(source, setup.rna_mod, setup.prot_mod)) - with_rna
    told = f"the model '{model.key}' has never seen such a cell. Fit it again with hide_rna=0.5 to ask about them"
    if alone and not with_rna:
        raise ValueError(f"All {alone} cells have proteins and no RNA, and {told}.")
    if alone:
        logger.warning(f"{alone} cells have proteins and no RNA, and {told}; they get nothing")
