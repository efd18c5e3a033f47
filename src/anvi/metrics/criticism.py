"""metrics.criticism: are the counts that a model draws like the counts that it was given?"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data, Source
from anvi._data.fits import stored_fits
from anvi._data.labels import labels_at
from anvi._data.select import check_samples
from anvi._find import find_model, key_to_write
from anvi._model import Model
from anvi._runtime import verb
from anvi.tl._ask import Context, ask
from anvi.tl._fit import RandomState, seed_of

from ._groups import choose_cells
from ._ppc import DEFINITIONS, Definition, gather
from ._tables import METRICS, Check, Verdict, tables

logger = logging.getLogger("anvi")


@verb
@on_file
def criticism(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    groupby: str | None = None,
    level: str | None = None,
    n_samples: int = 5,
    metrics: Sequence[str] = METRICS,
    definition: Literal["anvi", "scvi"] = "anvi",
    max_cells: int | None = 1_000,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    inplace: bool = True,
) -> dict[str, pd.DataFrame] | None:
    """Posterior predictive checks: draw counts from the fitted model and hold them against the data.

    Every cell is drawn `n_samples` times, RNA and proteins, block by block, so that memory does not grow with the
    number of draws. `docs/metrics.md` has every definition, what the checks see and what they do not.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same features; it must hold counts.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    groupby
        Column with the groups of "de". None: the labels of the fit; "de" is left out where there are none.
    level
        Of labels that have several: the level whose groups "de" compares; None: the classes.
    n_samples
        Draws of every cell.
    metrics
        Some of "cv" (coefficients of variation of cells and of genes), "zero_fraction", "calibration" (where counts
        stand among their draws) and "de" (differences between groups).
    definition
        "anvi", or "scvi" for the numbers of scvi-tools' criticism report on the same draws: swapped R², shares of
        non-zeros, t-test, two-sided truth, zeros where a protein was not measured.
    max_cells
        Cells per group of "de", drawn at random, which bounds its memory; None, and with definition "scvi": all.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the draws.
    key_added
        Prefix of the slot; default: the model's key.
    inplace
        Write the slot; False returns the tables.

    Returns
    -------
    None, or a dict of DataFrames. Sets `uns[key]['criticism']`, this dict and `params`:

    `cv_cell`, `cv_gene`, `zero_fraction`
        Columns modality, statistic (`n`, `mae`, `pearson`, `spearman`, `r2`, `ratio`, ...), all, train, validation.
    `calibration`, `ranks`
        Shares of counts inside central intervals (modality, level, all, train, validation), and in each of the
        `n_samples + 1` places among their draws.
    `de`
        modality, group, gene_f1, lfc_mae, lfc_pearson, lfc_spearman, roc_auc, pr_auc, cells.
    `verdict`
        modality, metric, statistic, cells, value, threshold, verdict ("pass", "warn", "fail", "unknown"), source.
    `features`, `cells`
        For figures: CV and share of zeros of every gene and protein, CV of up to 2,000 cells, of data and of draws.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, metric or column, the data do not fit the model, or their counts were dropped by
        `tl.minify`.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> av.metrics.criticism(mdata, n_samples=2)
    >>> verdict = mdata.uns["totalanvi"]["criticism"]["verdict"]
    >>> list(verdict.columns)[:3]
    ['modality', 'metric', 'statistic']
    """
    n_samples = check_samples(n_samples)
    if max_cells is not None and (not isinstance(max_cells, int | np.integer) or max_cells < 1):
        raise ValueError(f"max_cells={max_cells!r} must be a whole number, at least 1; None: all.")
    metrics, rules = _check_metrics(metrics, definition), DEFINITIONS[definition]
    asked = ask(data, model, where=(rna_mod, prot_mod, prot_obsm), device=device, counts=True)
    groups = _find_groups(data, asked, groupby, level, rules) if "de" in metrics else None
    if "de" in metrics and groups is None:
        metrics = tuple(name for name in metrics if name != "de")
        if not metrics:
            raise ValueError("There are no groups to compare, and nothing else was asked for; name them: groupby=...")
    seed, split = seed_of(random_state), _split(data, asked)
    if inplace:
        key = key_to_write(data, asked.model, asked.key, key_added)
    keep = _cells_to_keep(asked, groups, None if rules.every_cell else max_cells, seed, rules)
    calibration = rules.calibration if "calibration" in metrics else None
    found = gather(asked.model, asked.cells, split, keep, n_samples, seed, calibration=calibration, mask=rules.masked)
    setup = asked.setup
    checks = [
        Check(mod, names, seen, kept)
        for mod, names, seen, kept in zip(
            (setup.rna_mod, setup.prot_mod), (setup.genes, setup.proteins), found, keep, strict=True
        )
        if seen is not None
    ]
    result = tables(checks, asked.cells.names, split, groups, metrics, rules, seed)
    for row in result["verdict"].itertuples(index=False):
        logger.info(str(Verdict(*row)))
    if not inplace:
        return result
    params = {
        "metrics": list(metrics),
        "definition": definition,
        "groupby": groupby,
        **({} if level is None else {"level": level}),
        "n_samples": n_samples,
        "max_cells": max_cells,
        "random_state": seed,
    }
    data = slots.own(data, False)
    with slots.writer(data, setup, asked.cells.names) as out:
        out.params(key, "criticism", {**result, "params": params})
    return None


def _check_metrics(metrics: Sequence[str], definition: str) -> tuple[str, ...]:
    if isinstance(metrics, str):
        raise TypeError(f"metrics takes a list of names, e.g. metrics=['{metrics}'].")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics={list(metrics)} must be some of {', '.join(map(repr, METRICS))}.")
    if definition not in DEFINITIONS:
        raise ValueError(f"definition='{definition}' is not one of 'anvi', 'scvi'.")
    return tuple(name for name in METRICS if name in metrics)


def _find_groups(
    data: Data, asked: Context, groupby: str | None, level: str | None, definition: Definition
) -> pd.Categorical | None:
    """Group of each cell, missing for those without one; None, and a word about it, where nothing was asked for."""
    setup, key = asked.setup, groupby or asked.setup.labels_key
    hint = "Name a column with clusters or types: groupby=..."
    if key is None:
        logger.info(f"'de' is left out: the model has no labels. {hint}")
        return None
    try:
        column = Source(data).text(key, "groupby", setup.mods)
        if groupby is None and setup.label_levels:
            column = labels_at(data, setup, pd.Index(asked.cells.names), None, level)
        elif level is not None:
            setup.levels.position(level)
    except KeyError:
        if groupby is not None:
            raise
        logger.info(f"'de' is left out: the labels of the fit, '{key}', are not in this object. {hint}")
        return None
    if definition.labelled:
        column = column.where(column != setup.unlabeled_category)
    groups = pd.Categorical(column.reindex(asked.cells.names))
    if len(groups.categories) > 1:
        return groups
    if groupby is not None:
        raise ValueError(f"groupby='{key}' has fewer than two groups, so there is no difference between groups.")
    logger.info(f"'de' is left out: '{key}' has fewer than two classes in this object. {hint}")
    return None


def _split(data: Data, asked: Context) -> np.ndarray:
    """What the fit did with each cell: 0 trained on, 1 validated on, 2 neither, or not known."""
    obs, slot = slots.home(data, asked.setup).obs, slots.split(asked.key)
    codes = np.full(len(asked.cells), 2)
    if slot not in obs or asked.key not in stored_fits(data, whole=True):
        return codes
    own = find_model(data, asked.key)[0]
    if own is not asked.model and json.dumps(own.facts()) != json.dumps(asked.model.facts()):
        return codes  # of another fit under the same key
    of_cell = obs[slot].astype(object).reindex(asked.cells.names).to_numpy()
    codes[of_cell == "train"] = 0
    codes[of_cell == "validation"] = 1
    return codes


def _cells_to_keep(
    asked: Context, groups: pd.Categorical | None, n: int | None, seed: int, definition: Definition
) -> tuple[np.ndarray, np.ndarray]:
    """Cells whose RNA, and whose proteins, are tested between groups."""
    everyone = np.ones(len(asked.cells), dtype=bool)
    if groups is None:
        return ~everyone, ~everyone
    stained = everyone
    if asked.cells.mask_table is not None and definition.masked:
        stained = asked.cells.mask_table.any(1)[asked.cells.mask_row].cpu().numpy()
    return choose_cells(groups, everyone, n, seed), choose_cells(groups, stained, n, seed)
