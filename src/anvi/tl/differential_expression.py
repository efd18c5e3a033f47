"""tl.differential_expression."""

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from anvi._arguments import RandomState
from anvi._backed import on_file
from anvi._data import rankings, slots
from anvi._data.containers import Data, listed
from anvi._data.select import REST, Mask
from anvi._model import Model
from anvi._posterior import differential
from anvi._posterior.bound import N_PROPOSALS
from anvi._runtime import verb
from anvi.settings import bar

from ._ask import Context, ask

logger = logging.getLogger("anvi")

METHOD = "anvi"
LEAST_COUNT = 0.05
"""Counts, in a cell of median library size, below which a gene is as good as absent."""
DEPTH = 1e4
"""Counts of a cell on whose scale genes are scored, as in scanpy's `normalize_total(target_sum=1e4)`."""


@verb
@on_file
def differential_expression(
    data: Data,
    groupby: str | None = None,
    *,
    groups: Literal["all"] | str | int | bool | Sequence[str] | Mapping[str, Mask] = "all",
    reference: str | float | bool = REST,
    model: str | Path | Model | None = None,
    modality: str | None = None,
    mode: Literal["change", "vanilla"] = "change",
    delta: float | None = 0.25,
    fdr: float = 0.05,
    batch_correction: bool = True,
    pseudocounts: float | Literal["scvi"] | None = None,
    n_samples: int = 5000,
    weights: Literal["uniform", "importance"] = "uniform",
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str = "rank_genes_groups",
    inplace: bool = True,
) -> dict[str, pd.DataFrame] | None:
    r"""Genes and proteins whose expression differs between groups of cells, by the posterior of a fitted model.

    Pairs of cells are drawn, one of the group and one of what it is compared with, and a latent vector from the
    posterior of each. Their expressions :math:`h` are decoded and compared, :math:`\beta = \log_2(h_1 + c) -
    \log_2(h_2 + c)`. In "change" mode a feature is called by the larger of the probabilities of :math:`\beta \ge
    \delta` and :math:`\beta < -\delta` over all pairs, in "vanilla" mode by that of :math:`h_1 > h_2` or
    :math:`h_1 < h_2`. Expression of a gene is its share of the cell's RNA; that of a protein its expected count above
    background, to which 0.1 is added.

    Parameters
    ----------
    data
        The fitted object or its file, or another one with the same features.
    groupby
        Column of the groups, found in `mdata.obs` or a modality's obs (`"rna:leiden"` is explicit). Cells without a
        value, with the model's unlabelled category or "Unassigned" belong to no group and to no rest, unless they are
        named in `groups`.
    groups
        "all", one or several values of the column; or without `groupby` a dict of names and boolean masks (in the
        order of `data.obs_names`, or a Series by name) or queries on obs, which may overlap.
    reference
        "rest" compares each group with all other cells that belong to a group; the name of a group compares with that.
    model
        Key, folder or :class:`~anvi.Model`; None: the only fitted model in `data`.
    modality
        Name of the only modality to look at; None: all that the model has.
    mode
        "change" asks whether a fold change is beyond `delta`, "vanilla" only which side is higher.
    delta
        Smallest log2 fold change that counts. None: estimated once per modality from all mean fold changes, see
        `params['delta']`.
    fdr
        Expected false discovery rate at which features count as differentially expressed; stored for readers and
        plots, it changes no number.
    batch_correction
        Spread the pairs evenly over all batches and decode both cells of a pair as if they came from its batch; for a
        protein, over the batches that measured it. False: every cell as of its own batch.
    pseudocounts
        :math:`c` for genes, on the scale of shares: a gene that is rarer than that on both sides does not change. None:
        what 0.05 counts are of a library of median size, 1e-5 at 5,000 counts. "scvi": the estimate of scvi-tools,
        which is close to none. The number that was used is in `params['pseudocounts']`.
    n_samples
        Pairs per comparison, at least one per batch. Only cells that are drawn are encoded.
    weights
        "importance" corrects the approximate posterior of every drawn cell by truncated importance weights; it takes
        twenty to thirty times as long.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in `data`; None: where they were in the fitted object.
    device
        "auto" or a torch device.
    random_state
        Seed of all draws.
    key_added
        Slot in `uns`.
    inplace
        Write the slots; False returns a table per modality.

    Returns
    -------
    None, or a dict of DataFrames as :func:`anvi.get.de` gives them. Sets in each modality (for an AnnData in itself,
    proteins under `'{key_added}_prot'`):

    `uns[key_added]` : dict
        In the shape of `sc.tl.rank_genes_groups`, features of each group by descending score: `names`; `scores`, the
        difference of log1p expression (of genes per 10,000 counts) times the probability of a change in that direction,
        so that what is sure, large and expressed comes first; `logfoldchanges`, the mean log2 fold change; `pvals`, the
        probability that a call is wrong (1 - `proba_de`, and never below half a pair); `pvals_adj`, its mean over all
        features that are at least as sure, hence the expected false discovery rate if these are called. Further
        `proba_de`, `bayes_factor` (natural log; vanilla: of being higher), `lfc_std`, and `mean_group` and
        `mean_reference`: mean expression on either side, shares of genes (with size factors, counts at size factor 1)
        and counts of proteins above background; and `params`. Of the counts themselves, if they are there:
        `count_group` and `count_reference`, their means, `pct_nz_group` and `pct_nz_reference`, shares of cells with
        any (of a protein, of the cells that were measured; background counts, too), and `pts` and `pts_rest` as scanpy
        has these.
    `obs[groupby]` : categorical
        Copied to the modality if it is not there, since scanpy's plots look for it; groups that came as masks, and
        groups whose name is taken by another column, are in `obs['{key_added}_groups']`.

    A result of another method in `uns[key_added]` is replaced, and the log says so.

    Raises
    ------
    KeyError, TypeError, ValueError
        If there is no such model, column or group, a group has no cells or nothing to be compared with, or an option
        is out of its range.

    Notes
    -----
    Lopez et al. 2018 (vanilla mode), Boyeau et al. 2019 (change mode), Gayoso et al. 2021 (proteins); see the user
    guide for what the numbers mean. Proteins that no batch measured are left out.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> av.tl.differential_expression(mdata, "cell_type", n_samples=200)
    >>> mdata["rna"].uns["rank_genes_groups"]["names"].dtype.names
    ('B', 'CD4 T', 'CD8 T', 'NK', 'CD14 Mono', 'pDC')
    >>> tables = av.tl.differential_expression(
    ...     mdata, groups={"B in batch 0": "cell_type == 'B' and batch == 'batch_0'"}, n_samples=200, inplace=False
    ... )
    >>> list(tables)
    ['rna', 'prot']
    """
    how = _How(mode, delta, fdr, batch_correction, pseudocounts, n_samples, weights)
    how.check()
    key_added = slots.clean_key(key_added)
    asked = ask(
        **locals() | {"inplace": False},  # what is written has a key of its own
        grouping=(groupby, groups, reference),
        labels=None,  # importance weights need the likelihood, which may be by label
        counts=weights == "importance" or pseudocounts == "scvi",
    )
    slot_of = dict.fromkeys(asked.by_mod, key_added)
    if asked.source.alone and asked.setup.prot_mod in slot_of:
        slot_of[asked.setup.prot_mod] = f"{key_added}_prot"
    if inplace:
        slots.check_short(data, slot_of.values(), f"key_added='{key_added:.40}'")
        rankings.check_writable(data, asked.groups.names, f"uns['{key_added:.40}']")
        slot_of = {mod: slot for mod, slot in slot_of.items() if _is_free(asked, mod, slot)}
    how = how._replace(n_samples=max(how.n_samples, asked.model.config.n_batches))
    by_mod = _rankings(asked, slot_of, how)
    if not inplace:
        return {mod: rankings.ranking_table(ranking) for mod, ranking in by_mod.items()}
    data = slots.own(data, False)
    found = asked.groups
    with slots.all_or_nothing(data):
        for mod, ranking in by_mod.items():
            out = slots.writer_into(slots.modality_of(data, mod))
            if slot_of[mod] == key_added:  # not the proteins of an AnnData, whose features are genes
                ranking = rankings.of_features(ranking, out.home.var_names, f"'{mod}'")
            ranking["params"] = (
                rankings.write_groups(out, found.key, found.column, f"{key_added}_groups") | ranking["params"]
            )
            out.uns(slot_of[mod], ranking)
            logger.info(f"written to '{mod}': {', '.join(out.written)}")
    return None


class _How(NamedTuple):
    """The options that decide what is computed."""

    mode: str
    delta: float | None
    fdr: float
    batch_correction: bool
    pseudocounts: float | Literal["scvi"] | None
    n_samples: int
    weights: str

    def check(self) -> None:
        """Raise a ValueError if an option is out of its range."""
        chosen = self.pseudocounts
        positive = chosen in (None, "scvi") or (not isinstance(chosen, str) and 0 < chosen < math.inf)
        for name, good, allowed in (
            ("delta", self.delta is None or 0 <= self.delta < math.inf, "None or at least 0"),
            ("fdr", 0 < self.fdr < 1, "between 0 and 1"),
            ("pseudocounts", positive, "None, above 0, or 'scvi'"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {allowed}.")


def _is_free(asked: Context, mod: str, slot: str) -> bool:
    """Whether the object has the modality of a result; an error if something lies in its slot that is no result."""
    if not asked.source.alone and mod not in asked.source.mods:
        logger.info(f"the object has no modality '{mod}': its result is computed with inplace=False only")
        return False
    there = asked.source.modality(mod, "modality").uns.get(slot)
    if there is None:
        return True
    if not rankings.is_ranking(there):
        raise ValueError(f"uns['{slot}'] holds something that is no ranking; pass another key_added=.")
    method = str(there["params"].get("method", "another method"))
    if method != METHOD:
        logger.info(f"uns['{slot}'] of '{mod}' held a result of '{method}', which is replaced")
    return True


def _rankings(asked: Context, mods: Iterable[str], how: _How) -> dict[str, dict]:
    """The ranking of each modality."""
    found = asked.groups
    row = asked.source.obs_names.get_indexer(asked.cells.names)
    inside, outside = ([mask[row] for mask in masks] for masks in (found.inside, found.outside))
    for name, *sides in zip(found.names, inside, outside, strict=True):
        if not all(side.any() for side in sides):
            raise ValueError(f"'{name}' or what it is compared with has no cells with RNA, which the model needs.")
    of_cells = asked.cells.batch.cpu().numpy()
    apart = [
        f"'{name}'"
        for name, *sides in zip(found.names, inside, outside, strict=True)
        if not np.isin(*(np.unique(of_cells[side]) for side in sides)).any()
    ]
    if apart and how.batch_correction and asked.setup.batch_key:
        logger.warning(
            f"{listed(apart)}: no batch of '{asked.setup.batch_key}' has cells of the group and of what it is compared "
            "with. What batches differ in is taken out, and so what is asked for; batch_correction=False leaves it in"
        )
    populations, comparisons = differential.strata(inside, outside)
    model, cells, weighed = asked.model, asked.cells, {"importance": how.weights == "importance"}
    counts = None
    if cells.q_mean is None and (asked.setup.counts or how.pseudocounts == "scvi"):  # else there are none, or no use
        counts = differential.Counts(cells, populations)
    with nullcontext() if counts is None else counts.taken():
        draws = differential.draw_posterior(model, cells, populations, how.n_samples, asked.seed, **weighed)
    if draws.effective is not None:
        logger.info(f"importance weights: {draws.effective:.1f} of {N_PROPOSALS} samples count, median over draws")
    params = {"reference": found.reference, "layer": None, "corr_method": "posterior-fdr", "model": asked.key}
    params |= how._asdict() | {"random_state": asked.seed}
    by_mod = {}
    for mod in mods:
        of_rna = mod == asked.setup.rna_mod
        counted = None if counts is None else counts.of(comparisons, proteins=not of_rna)
        names, result = _compared(asked, mod, counted, comparisons, draws, how)
        offset = differential.PRIOR_COUNT
        if of_rna:
            offset = result.pseudocount if how.pseudocounts == "scvi" else float(result.pseudocount[0])
        if how.mode == "change" and how.delta is None:
            logger.info(f"{mod}: delta={result.delta:.3f}, estimated from all mean fold changes")
        own = {"modality": mod, "delta": result.delta, "pseudocounts": offset}
        depth = DEPTH if of_rna and asked.setup.size_factor_key is None else 1.0
        if counted is not None and asked.setup.counts:
            kept = np.isin(asked.setup.genes if of_rna else asked.setup.proteins, names)
            counted = differential.CountMeans(*(part[:, kept] for part in counted))
        else:
            counted = None
        by_mod[mod] = _ranking(result, counted, found.names, names, how.n_samples, depth, params | own)
    return by_mod


def _compared(
    asked: Context,
    mod: str,
    counted: differential.CountMeans | None,
    comparisons: list[differential.Comparison],
    draws: differential.PosteriorDraws,
    how: _How,
) -> tuple[Sequence[str], differential.Change]:
    """Names of the features of a modality that the model knows, and how they change."""
    model, cells, setup = asked.model, asked.cells, asked.setup
    names, offset, rare = setup.genes, how.pseudocounts, None
    if mod == setup.rna_mod:
        if offset is None:
            offset = LEAST_COUNT / float(np.median(cells.sizes().exp().cpu().numpy()))
        elif offset == "scvi":
            rare, offset = counted.rare, math.nan
        values = differential.genes(model, cells, draws, batch_correction=how.batch_correction)
    else:
        measured = differential.measured_in(model, cells).any(0).cpu().numpy()
        names, offset = list(itertools.compress(setup.proteins, measured)), 0.0  # their values have theirs in them
        if len(names) < len(measured):
            logger.info(f"{len(measured) - len(names)} proteins that no batch measured are left out")
        values = differential.proteins(model, cells, draws, batch_correction=how.batch_correction)
    # some pairs are decoded once more to estimate thresholds
    pilot = differential.PILOT if how.mode == "change" and how.delta is None else 0
    every = how.n_samples * (2 if how.pseudocounts == "scvi" else 1) + min(pilot, how.n_samples)
    options = differential.Options(how.mode, how.delta, offset, asked.seed)
    with bar(every, f"differential expression, {mod}", "pair") as advance:

        def watched(rows: slice):
            advance(rows.stop - rows.start)
            return values(rows)

        result = differential.compare(watched, len(names), draws, comparisons, options, rare=rare)
    if mod == setup.rna_mod:
        return names, result
    means = {side: getattr(result, side) - differential.PRIOR_COUNT for side in ("group_mean", "reference_mean")}
    return names, result._replace(**means)


def _ranking(
    result: differential.Change,
    counts: differential.CountMeans | None,
    groups: Sequence[str],
    features: Sequence[str],
    n_pairs: int,
    depth: float,
    params: dict,
) -> dict:
    evidence = differential.evidence(result, n_pairs)
    extras = {"proba_de": evidence.proba_de, "bayes_factor": evidence.bayes_factor, "lfc_std": result.lfc_std}
    extras |= {"mean_group": result.group_mean, "mean_reference": result.reference_mean}
    if counts is not None:
        extras |= {"count_group": counts.mean_group, "count_reference": counts.mean_reference}
        extras |= {"pct_nz_group": counts.share_group, "pct_nz_reference": counts.share_reference}
    score = marker_score(result, depth)
    columns = {
        group: rankings.Ranked(
            scores=score[i],
            logfoldchanges=result.lfc_mean[i],
            pvals=evidence.error[i],
            pvals_adj=evidence.expected_fdr[i],
            extras={name: values[i].astype(np.float32) for name, values in extras.items()},
        )
        for i, group in enumerate(groups)
    }
    ranking = rankings.build_ranking(columns, features, {"method": METHOD} | params)
    if counts is not None and not any("/" in group or group in slots.NO_COLUMNS for group in groups):
        # columns of a table, which a file must hold
        for slot, share in (("pts", counts.share_group), ("pts_rest", counts.share_reference)):
            ranking[slot] = pd.DataFrame(share.T.astype(np.float32), list(features), list(groups))
    return ranking


def marker_score(result: differential.Change, depth: float) -> np.ndarray:
    """What makes a marker `(comparisons, features)`: a change that is sure, large and of something that is expressed.

    The difference of log1p mean expression times the probability of a change in its direction. The mean fold change
    over its deviation would put genes first that hardly any cell expresses.
    """
    higher = np.log1p(depth * np.clip(result.group_mean, 0, None)) - np.log1p(
        depth * np.clip(result.reference_mean, 0, None)
    )
    return np.nan_to_num(higher * np.where(higher > 0, result.up, result.down))
