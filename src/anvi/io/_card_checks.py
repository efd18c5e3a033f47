"""The metrics of a model card: the tables that `metrics.criticism` left, and the scores of the predictions."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from anvi._data import slots
from anvi._data.containers import Data
from anvi._model import Model

_NONE = "Not checked: `av.metrics.criticism(data)` writes the checks that belong here."
_AGREEMENT = {
    "mae": "Mean absolute error",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "r2": "R²",
    "ratio": "Median of model / data",
    "replicate": "Pearson of one draw with the others",
}
_TITLES = {
    "cv_cell": "### Coefficient of variation of cells",
    "cv_gene": "### Coefficient of variation of features",
    "zero_fraction": "### Share of zeros",
    "calibration": "### Calibration",
    "de": "### Differential expression",
}
_TEXTS = {
    "cv_cell": "Over the features of each cell, in its data and in its draws. Where the squared Pearson correlation is "
    "below 0.4, counts drawn from the model should not be analysed further; the latent space may still be useful.",
    "cv_gene": "Over the cells, of each gene and each protein.",
    "zero_fraction": "Of each gene and each protein over the cells.",
    "calibration": "Share of counts inside central intervals of their draws, ties spread evenly; the error is the "
    "total variation distance of their places among the draws from level ones.",
    "de": "Each group of cells against the rest, in the data and in one draw, by a Wilcoxon rank sum test: overlap of "
    "the top features (F1), log fold changes, and how well the draw's scores find the features that are higher in the "
    "data (ROC-AUC, PR-AUC).",
}
_SCVI_TEXTS = {
    "zero_fraction": "Of non-zeros, in fact, as scvi-tools has it.",
    "calibration": "Share of counts between quantiles of their draws, zeros and edges included; the error is the sum "
    "of squared differences from the levels.",
    "de": "Each group of cells against the rest, in the data and in one draw, by a t-test; features that differ in "
    "either direction count as true.",
}


def checks(data: Data | None, model: Model, key: str | None) -> list[str]:
    """The paragraphs of the metrics, as far as the object has them."""
    if data is None:
        return [_NONE]
    found = slots.home(data, model.setup).uns.get(key, {}).get("criticism")
    parts = _criticism(found) if isinstance(found, Mapping) else [_NONE]
    return parts + _classification(data, model, key)


def _criticism(found: Mapping) -> list[str]:
    params = found.get("params", {})
    definition, n_samples = str(params.get("definition", "anvi")), params.get("n_samples", "?")
    whose = "those of scvi-tools" if definition == "scvi" else "anvi's"
    parts = [
        f"Counts drawn from the model, {n_samples} times for every cell, against the data; definitions are {whose}."
    ]
    if "verdict" in found:
        shown = found["verdict"][
            ["modality", "metric", "statistic", "cells", "value", "threshold", "verdict", "source"]
        ]
        parts += ["### Verdicts", table(shown)]
    texts = _TEXTS | (_SCVI_TEXTS if definition == "scvi" else {})
    for name, title in _TITLES.items():
        if name in found:
            parts += [title, texts[name], table(_shown(name, pd.DataFrame(found[name])))]
    return parts


def _shown(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """A table as a card has it: training and validation apart where cells are compared, all cells otherwise."""
    if name == "de":
        return rows.rename(columns={"cells": "n_cells"})
    if name == "calibration":
        rows = rows[rows["statistic"].astype(str) != "n"]
        level = [f"inside {x:.0%}" if np.isfinite(x) else "error" for x in rows["level"].astype(float)]
        return pd.DataFrame({"modality": rows["modality"], "statistic": level, "value": rows["all"]})
    rows = rows[rows["statistic"].astype(str).isin(list(_AGREEMENT))]
    statistic = rows["statistic"].astype(str).map(_AGREEMENT)
    apart = name == "cv_cell" and rows["validation"].notna().any()
    columns = ["train", "validation"] if apart else ["all"]
    names = {"train": "training", "validation": "validation", "all": "value"}
    shown = {names[column]: rows[column] for column in columns}
    return pd.DataFrame({"modality": rows["modality"], "statistic": statistic} | shown)


def _classification(data: Data, model: Model, key: str) -> list[str]:
    """Scores on validation cells, where the model has predictions and the object has labels for them."""
    if not model.config.has_labels:
        return []
    from anvi.metrics import classification

    try:
        scores = classification(data, model=key)
    except (KeyError, ValueError):  # labels, split or predictions are not in this object: there is nothing to say
        return []
    columns = ["cells", "accuracy", "precision", "recall", "f1", "confidence", "ece"]
    shown = scores[columns].rename_axis("class").reset_index()
    text = (
        "On validation cells with a label; over all classes, F1 is the macro F1 and ECE the expected calibration error."
    )
    return ["### Classification", text, table(shown)]


def table(rows: pd.DataFrame) -> str:
    """A DataFrame as a Markdown table: three digits, missing values empty, text that cannot break out of its cell."""
    lines = [[str(name) for name in rows.columns], ["---"] * rows.shape[1]]
    lines += [[_cell(value) for value in row] for row in rows.astype(object).itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.3g}" if np.isfinite(value) else ""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
