"""tl.attributions."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from anvi._arguments import RandomState
from anvi._backed import on_file
from anvi._data import rankings, slots
from anvi._data.containers import Data, Source, check_natural
from anvi._data.select import ExplainedGroups, find_contrast, find_explained_groups
from anvi._model import Model
from anvi._posterior import attribute
from anvi._posterior.attribute import ExplainedCells, SingleCells, check_baseline, find_baselines
from anvi._posterior.encode import block_seed
from anvi._runtime import verb
from anvi.settings import with_bar

from ._ask import Context, ask

if TYPE_CHECKING:
    import xarray as xr


logger = logging.getLogger("anvi")


@verb
@on_file
def attributions(
    data: Data,
    *,
    model: str | Path | Model | None = None,
    groupby: str | None = None,
    groups: Sequence[str] | None = None,
    target: str | tuple[str, str] | None = None,
    level: str | None = None,
    baseline: str | int = "each",
    n_steps: int | None = None,
    n_cells: int | None = 200,
    per_cell: bool = False,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    inplace: bool = True,
) -> xr.Dataset | None:
    """Why cells are called what they are called: integrated gradients of class logits, by gene and protein.

    Of a cell with counts x, and a baseline b, gene or protein i gets (x_i - b_i) times the mean of the logit's
    derivative by i along the straight line from b to x. The attributions of a cell sum to logit(x) - logit(b): they say
    how many logits each feature contributes, for (above 0) or against (below 0). A feature may contribute by its
    presence (x_i > b_i: CD19 in a B cell) or by its absence (CD3 in a B cell); rankings are by presence, tables hold
    both together. The logit is that of the full encoder and classifier at the posterior mean, without the
    labelled neighbours that have a say in predictions; covariates and the mask of measured proteins are held fixed.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same genes.
    model
        Key, folder or :class:`~anvi.Model` with labels; None: the only fitted model in `data`.
    groupby
        Column of obs with the groups that attributions are averaged over; None: the predicted class.
    groups
        Which of them to explain, by their cells with RNA; None: all, or with a contrast and no `groupby` its two
        classes. The others are NaN.
    target
        What is explained. None: of each cell, its predicted class. A class: its logit, in all cells. Two classes, as in
        `("CD4 Naive", "CD4 Memory")`: why the first and not the second, the difference of their logits.
    level
        Of labels that have several: classes are the names at that level, so that "why T, and not NK" can be asked; the
        logit of a group is the log of the sum of the exponentials of those of its classes. None: the finest.
    baseline
        What cells are compared with. `"each"`: the means of the other predicted classes, a line from each, averaged (in
        a contrast: the mean of the second class). `"rest"`: one line from the mean of these means. The name of a group:
        its mean. A number: so many lines, each from a random cell of the other classes (expected gradients). All of
        these are scaled to the cell's library size and to its protein total. `"zero"`: no counts, so that what makes a
        deep cell differ from an empty one is attributed, too.
    n_steps
        Points on each line; None: 50 on a single line, 20 on each of several. Cells whose attributions miss their sum
        by more than 1 % get twice as many, and again, up to 32 times as many.
    n_cells
        Random cells of each group that are explained; None: all.
    per_cell
        Also keep the attributions of each of these cells.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of the choice of cells.
    key_added
        Prefix of the slots; default: the model's key.
    inplace
        Write the slots; False returns what :func:`anvi.get.attributions` would.

    Returns
    -------
    None or a Dataset. Sets in each modality (an RNA model in its own):

    `varm['{key}_attributions']` : DataFrame (features, groups)
        Mean attribution in logits, NaN for features outside the model and proteins that were not measured in the group
        ("/" in a name is "|" in the column).
    `uns['{key}_attributions']` : dict
        The shape of `rank_genes_groups`, which scanpy's plots take (`key='{key}_attributions'`). `scores`: the part of
        the mean attribution that is due to presence: what counts above the baseline bring, less what it costs cells to
        be below it. `attributions`: the whole mean, with its `standard_errors` and numbers of `cells`. `params`: how it
        was asked and, per group, the number of cells (`n_cells`), the mean difference of the target to its baseline
        (`difference`), the mean absolute error of the attributions' sum (`delta`) and the share of cells where it is
        below 1 % (`complete`).
    `obs[groupby]` : categorical
        Where the modality does not have it, since scanpy looks for it there; where it has another column of that name,
        or the classifier's classes are not those of `obs['{key}_prediction']`, in which neighbours have a say, it is
        `obs['{key}_attributions_groups']`.
    `layers['{key}_attributions']` : float32 (cells, features), csr for RNA
        With `per_cell`. RNA rows of other cells are empty, protein entries NaN where not measured.
    `obs['{key}_explained']` : categorical
        With `per_cell`: what was explained of each cell, missing for the others.

    In an AnnData, proteins are in `uns['{key}_attributions_prot']` and `obsm['{key}_attributions']`.

    Raises
    ------
    KeyError, ValueError
        If there is no such model, it has no labels, counts are gone, or a class, group or argument is not there.

    Notes
    -----
    Source: Sundararajan et al. 2017; expected gradients: Erion et al. 2021. The numbers of captum's
    `IntegratedGradients` with the midpoint rule (the derivative of a network of ReLUs jumps, so rules of higher order
    need more points); with `baseline="zero"` the points are denser near zero.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> av.tl.attributions(mdata, n_cells=10, n_steps=10)
    >>> mdata["prot"].varm["totalanvi_attributions"].shape
    (20, 6)
    """
    for argument, number in {"n_steps": n_steps, "n_cells": n_cells}.items():
        if number is not None:
            check_natural(number, argument)
    if not isinstance(baseline, str):
        check_natural(baseline, "baseline")
    # which classes, against what, by which groups
    asked = ask(**locals(), counts=True, answer="attributions")
    fitted, key, setup, cells, seed = asked.model, asked.key, asked.setup, asked.cells, asked.seed
    if not fitted.config.has_labels:
        raise ValueError(
            f"The model '{key}' ({fitted.name}) has no labels; fit tl.scanvi or tl.totalanvi to explain classes."
        )
    levels = setup.levels
    number = levels.position(level)
    classes, members = levels.groups(number), None
    if number < levels.finest:
        members = torch.from_numpy(np.equal.outer(np.arange(len(classes)), levels.codes(number))).to(cells.label.device)
    aim = find_contrast(target, classes)
    if n_steps is None:
        several = not isinstance(baseline, str) or (baseline == "each" and aim.against is None)
        n_steps = 20 if several else 50
    column = f"{slots.prediction(key)}{levels.ending(number)}"
    found = find_explained_groups(asked.source, setup, cells, groupby, groups, aim, column, classes)
    check_baseline(baseline, found)
    if inplace:
        rankings.check_writable(data, found.names, f"uns['{slots.attributions(asked.to)}']")
    # which cells: those whose random number is low in their group
    lot = torch.rand(len(cells), generator=torch.Generator().manual_seed(block_seed(seed, 0)))
    lot = lot if cells.rank is None else lot[cells.rank.cpu()]
    seen = attribute.survey(fitted, cells, found, baseline, n_cells, lot, members)
    found = found._replace(code=seen.predicted if found.code is None else found.code).checked()
    pool = torch.where(torch.isin(found.code, torch.tensor(found.chosen)), found.code, -1)
    predicted = seen.predicted
    if cells.has_rna is not None:  # what is not there contributes nothing
        pool, predicted = (torch.where(cells.has_rna.cpu(), part, -1) for part in (pool, predicted))
    index = attribute.sample(pool, n_cells, lot)
    question = ExplainedCells(cells, index, found, aim, predicted, classes, setup.counts)
    starts = find_baselines(question, baseline, seen.profiles, lot, seed)

    # sums over the cells of every group
    totals = attribute.Totals(len(found.names), len(setup.genes), len(setup.proteins))
    kept, code = SingleCells(), found.code.numpy()
    stream = attribute.explain(
        fitted, cells, index.to(cells.label.device), question.weights(), starts, n_steps, members
    )
    for part in with_bar(stream, len(index), "attributions", lambda part: len(part.index)):
        totals.add(part, code[part.index.cpu().numpy()])
        if per_cell:
            kept.add(part)
    summary = totals.summary()
    _tell_if_incomplete(summary, n_steps)

    # into a Dataset or the slots
    told = {
        "groupby": found.column,
        "reference": str(baseline),
        "model": key,
        "target": None if aim.target is None else classes[aim.target],
        "against": None if aim.against is None else classes[aim.against],
        "baseline": str(baseline),
        "n_steps": int(n_steps),
        "random_state": seed,
    }
    if inplace:
        slots.own(data, False)
    parts = _by_modality(asked, found, summary, told)
    single = kept.of(question, setup)[: len(parts)] if per_cell else []
    if not inplace:
        return rankings.attributions_dataset(parts, [one.table() for one in single])
    grouping = pd.Series(pd.Categorical.from_codes(code, list(found.names)), cells.names, name=found.column)
    if groupby is None:  # the classifier's classes, which are not what is written where neighbours have a say in that
        written = slots.home(data, setup).obs.get(found.column, pd.Series(dtype=object)).reindex(cells.names)
        grouping.name = found.column if written.astype(object).equals(grouping.astype(object)) else None
    with slots.all_or_nothing(data):
        for part, one in itertools.zip_longest(parts, single):
            names = rankings.write_attributions(part, asked.to, grouping, one)
            logger.info(f"written of {part.mod}: {', '.join(names)}")
    return None


def _by_modality(
    asked: Context, groups: ExplainedGroups, summary: attribute.Summary, params: dict
) -> list[rankings.AttributionSlots]:
    """The attributions of each modality that is in the object, not yet written."""
    source, setup = Source(asked.source.data), asked.setup
    params = params | {name: getattr(summary, name).tolist() for name in ("n_cells", "difference", "delta", "complete")}
    told = params | {"modality": "rna", "layer": setup.rna_layer}
    stored = rankings.attribution_ranking(*summary.rna, setup.genes, groups.names, told)
    found = [rankings.AttributionSlots(setup.rna_mod, source.modality(setup.rna_mod, "rna_mod"), stored)]
    if summary.protein is not None and (source.alone or setup.prot_mod in source.mods):
        told = params | {"modality": "prot", "layer": setup.prot_layer}
        stored = rankings.attribution_ranking(*summary.protein, setup.proteins, groups.names, told)
        home = source.modality(setup.prot_mod, "prot_mod")
        found.append(rankings.AttributionSlots(setup.prot_mod, home, stored, beside=source.alone))
    return found


def _tell_if_incomplete(summary: attribute.Summary, n_steps: int) -> None:
    """Say so where even several times the points do not suffice."""
    share = float(np.nansum(summary.complete * summary.n_cells) / summary.n_cells.sum())
    if share < 0.99:
        logger.info(
            f"the attributions of {1 - share:.1%} of the cells miss their sum by more than {attribute.TOLERANCE:.0%}; "
            f"n_steps={2 * n_steps} would bring them closer"
        )
