"""pl.calibration: what is drawn, from the slot alone."""

import numpy as np
import pandas as pd
import pytest

import anvi as av
from anvi.pl.calibration import merged


def drawn(ax) -> dict[str, pd.DataFrame]:
    return {
        points.get_label().split(":")[0]: pd.DataFrame(points.get_offsets(), columns=["confidence", "accuracy"])
        for points in ax.collections
        if ": ECE" in points.get_label()  # lines are intervals
    }


def test_points_are_the_table_with_small_bins_joined(labelled):
    table = labelled.uns["totalanvi"]["calibration"]
    axes = av.pl.calibration(labelled, model="totalanvi", show=False)
    for ax, name in zip(axes, ("with_proteins", "without_proteins"), strict=True):
        for when, points in drawn(ax).items():
            part = table[(table["cells_seen"] == name) & (table["when"] == when)]
            wanted = merged(part)
            assert wanted["cells"].min() >= 30 and wanted["cells"].sum() == part["cells"].sum()
            right = [(some["cells"] * some["accuracy"]).sum() for some in (wanted, part)]
            assert right[0] == pytest.approx(right[1])
            pd.testing.assert_frame_equal(points, wanted[["confidence", "accuracy"]])


def test_bins_are_joined_upwards_and_the_last_few_downwards():
    table = pd.DataFrame({"cells": [10, 25, 40, 5], "confidence": [0.1, 0.3, 0.6, 0.9], "accuracy": [0, 0.4, 0.5, 1]})
    found = merged(table)
    np.testing.assert_allclose(found["cells"], [35, 45])
    np.testing.assert_allclose(found["confidence"], [(1 + 7.5) / 35, (24 + 4.5) / 45])
    np.testing.assert_allclose(found["accuracy"], [10 / 35, 25 / 45])
    few = merged(table.iloc[:1])
    assert few["cells"].tolist() == [10]


def test_intervals_are_wilsons():
    from scipy.stats import binomtest

    table = pd.DataFrame({"cells": [40, 80], "confidence": [0.3, 0.9], "accuracy": [0.25, 1.0]})
    for row in merged(table).itertuples():
        expected = binomtest(round(row.cells * row.accuracy), int(row.cells)).proportion_ci(method="wilson")
        assert (row.low, row.high) == pytest.approx(tuple(expected), abs=1e-4)


def test_an_rna_model_has_one_axes(labelled):
    av.tl.scanvi(labelled, "known", max_epochs=1, train_size=0.8)
    ax = av.pl.calibration(labelled, model="scanvi", show=False)
    assert set(drawn(ax)) == {"before", "after"}


def test_what_is_missing_is_named(labelled):
    del labelled.uns["totalanvi"]["calibration"]
    with pytest.raises(KeyError, match=r"uns\['totalanvi'\]\['calibration'\]"):
        av.pl.calibration(labelled, model="totalanvi")
