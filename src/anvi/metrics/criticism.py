"""metrics.criticism: are the counts that a model draws like the counts that it was given?"""

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from anvi._arguments import RandomState
from anvi._backed import on_file
from anvi._data import slots
from anvi._data.containers import Data, Source
from anvi._data.fits import stored_fits
from anvi._data.labels import labels_at
from anvi._find import find_model
from anvi._model import Model
from anvi._runtime import verb
from anvi.tl._ask import Context, ask

from . import _ppc

logger = logging.getLogger("anvi")

METRICS = ("cv", "zero_fraction", "calibration", "de")


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
    if max_cells is not None and (not isinstance(max_cells, int | np.integer) or max_cells < 1):
        raise ValueError(f"max_cells={max_cells!r} must be a whole number, at least 1; None: all.")
    # what is looked at, and in which groups
    metrics, rules = _check_metrics(metrics), _ppc.DEFINITIONS[definition]
    fitted = find_model(data, model)[0]
    fitted.setup.levels.position(level)
    if groupby is not None:
        Source(data).column(groupby, "groupby", tuple(getattr(data, "mod", ())))
    asked = ask(**locals(), counts=True)
    groups = _find_groups(asked, groupby, level, rules) if "de" in metrics else None
    if "de" in metrics and groups is None:
        metrics = tuple(name for name in metrics if name != "de")
        if not metrics:
            raise ValueError("There are no groups to compare, and nothing else was asked for; name them: groupby=...")
    # data and draws side by side
    seed, split = asked.seed, _split(data, asked)
    keep = _cells_to_keep(asked, groups, None if rules.every_cell else max_cells, seed, rules)
    calibration = rules.calibration if "calibration" in metrics else None
    found = _ppc.gather(
        asked.model, asked.cells, split, keep, n_samples, seed, calibration=calibration, mask=rules.masked
    )
    # tables and verdicts
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
    with asked.writer(asked.cells.names) as out:
        out.params(asked.to, "criticism", {**result, "params": params})
    return None


def _check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    metrics = tuple(metrics)
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics={list(metrics)} must be some of {', '.join(map(repr, METRICS))}.")
    return tuple(name for name in METRICS if name in metrics)


def _find_groups(
    asked: Context, groupby: str | None, level: str | None, definition: _ppc.Definition
) -> pd.Categorical | None:
    """Group of each cell, missing for those without one; None, and a word about it, where nothing was asked for."""
    setup, key = asked.setup, groupby or asked.setup.labels_key
    hint = "Name a column with clusters or types: groupby=..."
    if key is None:
        why = f"no labels of '{asked.key}' are known" if setup.classes else "the model has no labels"
        logger.info(f"'de' is left out: {why}. {hint}")
        return None
    try:
        column = asked.source.text(key, "groupby", setup.mods)
        if groupby is None and setup.label_levels:
            column = labels_at(asked.source, setup, pd.Index(asked.cells.names), None, level)
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
    asked: Context, groups: pd.Categorical | None, n: int | None, seed: int, definition: _ppc.Definition
) -> tuple[np.ndarray, np.ndarray]:
    """Cells whose RNA, and whose proteins, are tested between groups."""
    everyone = np.ones(len(asked.cells), dtype=bool)
    if groups is None:
        return ~everyone, ~everyone
    stained = everyone
    if asked.cells.mask_table is not None and definition.masked:
        stained = asked.cells.has_protein.cpu().numpy()
    return _ppc.choose_cells(groups, everyone, n, seed), _ppc.choose_cells(groups, stained, n, seed)


# tables: plain columns, so that a file can hold them -----------------------------------------------------------------

CARD = "rule of thumb on scvi-hub's model cards, where it is meant for the squared Pearson"
OWN = "anvi's own, see docs/metrics.md"


class Rule(NamedTuple):
    """What a statistic must reach."""

    metric: str
    statistic: str
    kind: Literal["at least", "at most", "within"]  # the latter: a factor of 1
    passes: float
    warns: float  # worse than this is a failure
    source: str


RULES = (
    Rule("cv_cell", "pearson", "at least", 0.4, 0.4, CARD),
    Rule("cv_cell", "ratio", "within", 1.1, 1.2, OWN),
    Rule("cv_gene", "pearson", "at least", 0.8, 0.4, OWN),
    Rule("cv_gene", "ratio", "within", 1.1, 1.2, OWN),
    Rule("zero_fraction", "mae", "at most", 0.02, 0.05, OWN),
    Rule("calibration", "error", "at most", 0.05, 0.1, OWN),
    Rule("de", "roc_auc", "at least", 0.9, 0.75, OWN),
)


class Verdict(NamedTuple):
    """The verdict on one statistic of one modality."""

    modality: str
    metric: str
    statistic: str
    cells: str  # whose number it is: "validation", "all", or "grouped" for those with a group
    value: float
    threshold: str
    verdict: str  # "pass", "warn", "fail", or "unknown" where there is no number
    source: str

    def __str__(self) -> str:
        what = f"{self.modality} {self.metric} {self.statistic} ({self.cells} cells)"
        return f"{what} {self.value:.3g}: {self.verdict} ({self.threshold}; {self.source})"


def judge(modality: str, numbers: dict[tuple[str, str], tuple[float, str]]) -> list[Verdict]:
    """The verdicts on one modality."""
    lines = []
    for rule in RULES:
        if (rule.metric, rule.statistic) in numbers:
            value, cells = numbers[rule.metric, rule.statistic]
            known = (modality, rule.metric, rule.statistic, cells, value)
            lines.append(Verdict(*known, _threshold(rule), _grade(value, rule), rule.source))
    return lines


def _grade(value: float, rule: Rule) -> str:
    if not np.isfinite(value):
        return "unknown"
    if rule.kind == "at least":
        return "pass" if value >= rule.passes else "warn" if value >= rule.warns else "fail"
    if rule.kind == "within":
        value = max(value, 1 / value) if value > 0 else np.inf
    return "pass" if value <= rule.passes else "warn" if value <= rule.warns else "fail"


def _threshold(rule: Rule) -> str:
    fold = "-fold" if rule.kind == "within" else ""
    text = f"{rule.kind} {rule.passes:g}{fold}"
    toward = "down" if rule.kind == "at least" else "up"
    return text if rule.passes == rule.warns else f"{text}, warns {toward} to {rule.warns:g}{fold}"


LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Central intervals whose shares are listed."""
SHOWN_CELLS = 2_000
"""Cells per modality that are listed one by one, for figures."""
COLUMNS = {"all": [0, 1, 2], "train": [0], "validation": [1]}  # splits of each column


class Check(NamedTuple):
    """What was seen of one modality, and what its features are called."""

    modality: str
    features: tuple[str, ...]
    seen: _ppc.Gathered
    kept: np.ndarray  # (cells,) bool: cells that are compared between groups


def tables(
    checks: list[Check],
    cells: np.ndarray,
    split: np.ndarray,  # (cells,) codes of the splits
    groups: pd.Categorical | None,
    metrics: tuple[str, ...],
    definition: _ppc.Definition,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """All tables by name; those that were not asked for are not there."""
    found: dict[str, list[pd.DataFrame]] = {}
    lines = []
    for check in checks:
        seen, parts = check.seen, {}
        if "cv" in metrics:
            parts["cv_cell"] = _cell_table(seen, split, definition)
            parts["cv_gene"] = _feature_table(seen, "cv", definition)
            parts["cells"] = _listed_cells(seen, cells, split, seed)
        if "zero_fraction" in metrics:
            parts["zero_fraction"] = _feature_table(seen, "zero_fraction", definition)
        if "cv" in metrics or "zero_fraction" in metrics:
            parts["features"] = _listed_features(check, definition)
        if seen.ranks is not None:
            parts["calibration"], parts["ranks"] = _rank_tables(seen)
        if seen.hits is not None:
            parts["calibration"] = _quantile_table(seen)
        if "de" in metrics:
            parts["de"] = _ppc.compare_groups(seen.kept(), groups[check.kept], definition)
        lines += judge(check.modality, _numbers(parts, definition))
        for name, part in parts.items():
            part.insert(0, "modality", check.modality)
            found.setdefault(name, []).append(part)
    verdicts = pd.DataFrame(lines, columns=list(Verdict._fields))
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()} | {"verdict": verdicts}
    # text, object or str in pandas 3, as categories: every file format has them
    texts = {name: part.columns[[*map(pd.api.types.is_string_dtype, part.dtypes)]] for name, part in joined.items()}
    return {name: part.astype(dict.fromkeys(texts[name], "category")) for name, part in joined.items()}


def _compare(data: np.ndarray, model: np.ndarray, definition: _ppc.Definition) -> _ppc.Agreement:
    """Agreement by a definition; scvi-tools takes the model for the truth, and fails where the model has no value."""
    if definition.data_are_truth:
        return _ppc.agreement(data, model)
    if not np.isfinite(model).all():
        return _ppc.Agreement(0, *[np.nan] * 5)
    data = np.nan_to_num(data)
    return _ppc.agreement(data, model)._replace(r2=_ppc.agreement(model, data).r2)


def _statistics(columns: dict[str, dict[str, float]]) -> pd.DataFrame:
    """A row per statistic from a dict of statistics per column."""
    return pd.DataFrame(columns).rename_axis("statistic").reset_index()


def _cell_table(seen: _ppc.Gathered, split: np.ndarray, definition: _ppc.Definition) -> pd.DataFrame:
    columns = {}
    for name, codes in COLUMNS.items():
        here = np.isin(split, codes)
        columns[name] = _compare(seen.cell_data[here], seen.cell_model[here], definition)._asdict()
        columns[name]["replicate"] = _ppc.agreement(seen.cell_first[here], seen.cell_others[here]).pearson
    return _statistics(columns)


def _feature_values(
    seen: _ppc.Gathered, what: str, splits: list[int], definition: _ppc.Definition
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of every feature: of the data, and of the draws, their mean over those that have one."""
    data = getattr(seen.data, what)(splits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)  # a feature that no draw has
        model = np.nanmean([getattr(draw, what)(splits) for draw in seen.draws], axis=0)
    if what == "zero_fraction" and not definition.zeros:
        return 1 - data, 1 - model
    return data, model


def _feature_table(seen: _ppc.Gathered, what: str, definition: _ppc.Definition) -> pd.DataFrame:
    columns = {}
    for name, codes in COLUMNS.items():
        data, model = _feature_values(seen, what, codes, definition)
        columns[name] = _compare(data, model, definition)._asdict()
        if what == "zero_fraction":
            columns[name] |= {"data": _ppc.mean_of(data), "model": _ppc.mean_of(model)}
    return _statistics(columns)


def _rank_tables(seen: _ppc.Gathered) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Shares inside central intervals with the error and the number of entries, and shares of the places."""
    inside, places = {}, {}
    for name, codes in COLUMNS.items():
        ranks, n = seen.ranks.ranks(codes)
        places[name] = ranks
        error = np.abs(ranks - 1 / len(ranks)).sum() / 2
        inside[name] = [*(_ppc.coverage(ranks, level) for level in LEVELS), error, n]
    level = [*LEVELS, np.nan, np.nan]
    statistic = [*["inside"] * len(LEVELS), "error", "n"]
    return (
        pd.DataFrame({"statistic": statistic, "level": level, **inside}),
        pd.DataFrame({"place": np.arange(seen.n_samples + 1), **places}),
    )


def _quantile_table(seen: _ppc.Gathered) -> pd.DataFrame:
    """scvi-tools' intervals; its error is the sum of squared differences between share and level."""
    widths = 1 - 2 * np.array(seen.hits.TAILS)
    columns = {}
    for name, codes in COLUMNS.items():
        shares, n = seen.hits.shares(codes)
        columns[name] = [*shares, ((shares - widths) ** 2).sum(), n]
    statistic = [*["inside"] * len(widths), "error", "n"]
    return pd.DataFrame({"statistic": statistic, "level": [*widths, np.nan, np.nan], **columns})


def _listed_features(check: Check, definition: _ppc.Definition) -> pd.DataFrame:
    cv, zeros = (_feature_values(check.seen, what, [0, 1, 2], definition) for what in ("cv", "zero_fraction"))
    columns = {"cv_data": cv[0], "cv_model": cv[1], "zero_data": zeros[0], "zero_model": zeros[1]}
    return pd.DataFrame({"feature": list(check.features)} | columns)


def _listed_cells(seen: _ppc.Gathered, cells: np.ndarray, split: np.ndarray, seed: int) -> pd.DataFrame:
    some = np.flatnonzero(np.isfinite(seen.cell_data))
    if len(some) > SHOWN_CELLS:
        some = np.sort(np.random.default_rng(seed).choice(some, SHOWN_CELLS, replace=False))
    columns = {"cv_data": seen.cell_data[some], "cv_model": seen.cell_model[some]}
    return pd.DataFrame({"cell": list(map(str, cells[some])), "split": np.array(_ppc.SPLITS)[split[some]]} | columns)


def _numbers(parts: dict[str, pd.DataFrame], definition: _ppc.Definition) -> dict[tuple[str, str], tuple[float, str]]:
    """What is judged: by metric and statistic, the value and whose it is."""
    found = {}
    for metric in definition.judged:
        if metric not in parts:
            continue
        rows = parts[metric][parts[metric]["statistic"] != "inside"].set_index("statistic")
        held_out = metric == "cv_cell" and np.isfinite(rows.loc["pearson", "validation"])
        column = "validation" if held_out else "all"
        found |= {(metric, str(name)): (float(rows.loc[name, column]), column) for name in rows.index}
    if definition.only_pearson:
        return {name: value for name, value in found.items() if name[1] == "pearson"}
    if "de" in parts:
        found["de", "roc_auc"] = (float(parts["de"]["roc_auc"].mean()), "grouped")
    return found
