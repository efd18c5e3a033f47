"""The tables of a posterior predictive check: plain columns, so that a file can hold them."""

import warnings
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from ._groups import compare_groups
from ._ppc import SPLITS, Agreement, Definition, Gathered, agreement, coverage

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


METRICS = ("cv", "zero_fraction", "calibration", "de")
LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Central intervals whose shares are listed."""
SHOWN_CELLS = 2_000
"""Cells per modality that are listed one by one, for figures."""
COLUMNS = {"all": [0, 1, 2], "train": [0], "validation": [1]}  # splits of each column


class Check(NamedTuple):
    """What was seen of one modality, and what its features are called."""

    modality: str
    features: tuple[str, ...]
    seen: Gathered
    kept: np.ndarray  # (cells,) bool: cells that are compared between groups


def tables(
    checks: list[Check],
    cells: np.ndarray,
    split: np.ndarray,  # (cells,) codes of the splits
    groups: pd.Categorical | None,
    metrics: tuple[str, ...],
    definition: Definition,
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
            parts["de"] = compare_groups(seen.kept(), groups[check.kept], definition)
        lines += judge(check.modality, _numbers(parts, definition))
        for name, part in parts.items():
            part.insert(0, "modality", check.modality)
            found.setdefault(name, []).append(part)
    verdicts = pd.DataFrame(lines, columns=list(Verdict._fields))
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}
    return {name: _plain(part) for name, part in (joined | {"verdict": verdicts}).items()}


def _plain(part: pd.DataFrame) -> pd.DataFrame:
    """Text as categories: every file format has them."""
    return part.astype({name: "category" for name in part.columns if pd.api.types.is_object_dtype(part[name])})


def _compare(data: np.ndarray, model: np.ndarray, definition: Definition) -> Agreement:
    """Agreement by a definition; scvi-tools takes the model for the truth, and fails where the model has no value."""
    if definition.data_are_truth:
        return agreement(data, model)
    if not np.isfinite(model).all():
        return Agreement(0, *[np.nan] * 5)
    data = np.nan_to_num(data)
    return agreement(data, model)._replace(r2=agreement(model, data).r2)


def _statistics(columns: dict[str, dict[str, float]]) -> pd.DataFrame:
    """A row per statistic from a dict of statistics per column."""
    return pd.DataFrame(columns).rename_axis("statistic").reset_index()


def _cell_table(seen: Gathered, split: np.ndarray, definition: Definition) -> pd.DataFrame:
    columns = {}
    for name, codes in COLUMNS.items():
        here = np.isin(split, codes)
        columns[name] = _compare(seen.cell_data[here], seen.cell_model[here], definition)._asdict()
        columns[name]["replicate"] = agreement(seen.cell_first[here], seen.cell_others[here]).pearson
    return _statistics(columns)


def _feature_values(
    seen: Gathered, what: str, splits: list[int], definition: Definition
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of every feature: of the data, and of the draws, their mean over those that have one."""
    data = getattr(seen.data, what)(splits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)  # a feature that no draw has
        model = np.nanmean([getattr(draw, what)(splits) for draw in seen.draws], axis=0)
    if what == "zero_fraction" and not definition.zeros:
        return 1 - data, 1 - model
    return data, model


def _feature_table(seen: Gathered, what: str, definition: Definition) -> pd.DataFrame:
    columns = {}
    for name, codes in COLUMNS.items():
        data, model = _feature_values(seen, what, codes, definition)
        columns[name] = _compare(data, model, definition)._asdict()
        if what == "zero_fraction":
            columns[name] |= {"data": _mean(data), "model": _mean(model)}
    return _statistics(columns)


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def _rank_tables(seen: Gathered) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Shares inside central intervals with the error and the number of entries, and shares of the places."""
    inside, places = {}, {}
    for name, codes in COLUMNS.items():
        ranks, n = seen.ranks.ranks(codes)
        places[name] = ranks
        error = np.abs(ranks - 1 / len(ranks)).sum() / 2
        inside[name] = [*(coverage(ranks, level) for level in LEVELS), error, n]
    level = [*LEVELS, np.nan, np.nan]
    statistic = [*["inside"] * len(LEVELS), "error", "n"]
    return (
        pd.DataFrame({"statistic": statistic, "level": level, **inside}),
        pd.DataFrame({"place": np.arange(seen.n_samples + 1), **places}),
    )


def _quantile_table(seen: Gathered) -> pd.DataFrame:
    """scvi-tools' intervals; its error is the sum of squared differences between share and level."""
    widths = 1 - 2 * np.array(seen.hits.TAILS)
    columns = {}
    for name, codes in COLUMNS.items():
        shares, n = seen.hits.shares(codes)
        columns[name] = [*shares, ((shares - widths) ** 2).sum(), n]
    statistic = [*["inside"] * len(widths), "error", "n"]
    return pd.DataFrame({"statistic": statistic, "level": [*widths, np.nan, np.nan], **columns})


def _listed_features(check: Check, definition: Definition) -> pd.DataFrame:
    cv, zeros = (_feature_values(check.seen, what, [0, 1, 2], definition) for what in ("cv", "zero_fraction"))
    columns = {"cv_data": cv[0], "cv_model": cv[1], "zero_data": zeros[0], "zero_model": zeros[1]}
    return pd.DataFrame({"feature": list(check.features)} | columns)


def _listed_cells(seen: Gathered, cells: np.ndarray, split: np.ndarray, seed: int) -> pd.DataFrame:
    some = np.flatnonzero(np.isfinite(seen.cell_data))
    if len(some) > SHOWN_CELLS:
        some = np.sort(np.random.default_rng(seed).choice(some, SHOWN_CELLS, replace=False))
    columns = {"cv_data": seen.cell_data[some], "cv_model": seen.cell_model[some]}
    return pd.DataFrame({"cell": list(map(str, cells[some])), "split": np.array(SPLITS)[split[some]]} | columns)


def _numbers(parts: dict[str, pd.DataFrame], definition: Definition) -> dict[tuple[str, str], tuple[float, str]]:
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
