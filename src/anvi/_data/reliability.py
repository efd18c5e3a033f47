"""Whether confidence is what it says: cells by confidence, and the mean distance between confidence and accuracy."""

import numpy as np
import pandas as pd

BINS = 15
"""Bins of equal width into which confidence is cut; the number of Guo et al. 2017."""


def reliability(confidence: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """Cells by confidence in bins (0, 1/n], (1/n, 2/n], ...; only bins with cells.

    Parameters
    ----------
    confidence
        Probability of what was predicted `(cells,)`.
    right
        Whether it is so `(cells,)`.

    Returns
    -------
    DataFrame with `bin`, `cells`, mean `confidence`, and `accuracy`, the share that is right.
    """
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    place = np.searchsorted(edges, confidence, side="left")
    table = pd.DataFrame({"bin": place, "confidence": confidence, "accuracy": np.asarray(right, dtype=float)})
    means = table.groupby("bin").mean()
    means.insert(0, "cells", table.groupby("bin").size())
    return means.reset_index()


def expected_error(table: pd.DataFrame) -> float:
    """Expected calibration error: the mean over cells of |accuracy - confidence| of their bin; NaN without cells."""
    gap = (table["accuracy"] - table["confidence"]).abs() * table["cells"]
    return float(gap.sum() / table["cells"].sum()) if len(table) else float("nan")
