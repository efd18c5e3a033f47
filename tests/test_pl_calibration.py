"""pl.calibration: what is drawn, from the slot alone."""

import pandas as pd
import pytest

import anvi as av


def drawn(ax) -> dict[str, pd.DataFrame]:
    return {
        points.get_label().split(":")[0]: pd.DataFrame(points.get_offsets(), columns=["confidence", "accuracy"])
        for points in ax.collections
    }


def test_points_are_the_table(labelled):
    table = labelled.uns["totalanvi"]["calibration"]
    axes = av.pl.calibration(labelled, model="totalanvi", show=False)
    for ax, name in zip(axes, ("with_proteins", "without_proteins"), strict=True):
        for when, points in drawn(ax).items():
            part = table[(table["cells_seen"] == name) & (table["when"] == when)]
            pd.testing.assert_frame_equal(points, part[["confidence", "accuracy"]].reset_index(drop=True))


def test_an_rna_model_has_one_axes(labelled):
    av.tl.scanvi(labelled, "known", max_epochs=1, train_size=0.8)
    ax = av.pl.calibration(labelled, model="scanvi", show=False)
    assert set(drawn(ax)) == {"before", "after"}


def test_what_is_missing_is_named(labelled):
    del labelled.uns["totalanvi"]["calibration"]
    with pytest.raises(KeyError, match=r"uns\['totalanvi'\]\['calibration'\]"):
        av.pl.calibration(labelled, model="totalanvi")
