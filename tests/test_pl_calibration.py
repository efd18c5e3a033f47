"""pl.calibration: what is drawn, from the slot alone."""

import pandas as pd
import pytest

import anvi as av


@pytest.fixture(scope="module")
def fitted():
    mdata = av.datasets.synthetic_cite(1_200, n_genes=60)
    av.tl.totalanvi(mdata, max_epochs=2, train_size=0.8)
    av.tl.scanvi(mdata, max_epochs=2, train_size=0.8)
    return mdata


def drawn(ax) -> dict[str, pd.DataFrame]:
    return {
        points.get_label().split(":")[0]: pd.DataFrame(points.get_offsets(), columns=["confidence", "accuracy"])
        for points in ax.collections
    }


def test_points_are_the_table(fitted):
    table = fitted.uns["totalanvi"]["calibration"]
    axes = av.pl.calibration(fitted, model="totalanvi", show=False)
    for ax, name in zip(axes, ("with_proteins", "without_proteins"), strict=True):
        for when, points in drawn(ax).items():
            part = table[(table["cells_seen"] == name) & (table["when"] == when)]
            pd.testing.assert_frame_equal(points, part[["confidence", "accuracy"]].reset_index(drop=True))


def test_an_rna_model_has_one_axes(fitted):
    ax = av.pl.calibration(fitted, model="scanvi", show=False)
    assert set(drawn(ax)) == {"before", "after"}
    assert av.pl.calibration(fitted, model="scanvi", ax=ax, show=False) is ax


def test_two_axes_are_needed_for_a_joint_model(fitted):
    ax = av.pl.calibration(fitted, model="scanvi", show=False)
    with pytest.raises(ValueError, match="2 Axes"):
        av.pl.calibration(fitted, model="totalanvi", ax=ax)


def test_what_is_missing_is_named(fitted):
    bare = fitted.copy()
    del bare.uns["totalanvi"]["calibration"]
    with pytest.raises(KeyError, match=r"uns\['totalanvi'\]\['calibration'\]"):
        av.pl.calibration(bare, model="totalanvi")
