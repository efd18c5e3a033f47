"""From numbers to a verdict: what was asked of each, and where the threshold comes from."""

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

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


class Line(NamedTuple):
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


def judge(modality: str, numbers: dict[tuple[str, str], tuple[float, str]]) -> list[Line]:
    """The verdicts on one modality.

    Parameters
    ----------
    modality
        Its name.
    numbers
        Value and cells by metric and statistic; what is not there gets no line.
    """
    lines = []
    for rule in RULES:
        if (rule.metric, rule.statistic) in numbers:
            value, cells = numbers[rule.metric, rule.statistic]
            known = (modality, rule.metric, rule.statistic, cells, value)
            lines.append(Line(*known, _threshold(rule), _grade(value, rule), rule.source))
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


def table(lines: list[Line]) -> pd.DataFrame:
    """The lines as a table."""
    return pd.DataFrame(lines, columns=list(Line._fields))
