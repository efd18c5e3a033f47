"""pl.criticism: what is drawn is what lies in the slots, also after a file."""

import numpy as np
import pytest
from helpers import cite

import anvi as av

CHECKS = ["CV of cells", "CV of features", "share of zeros", "place among the draws", "differences between groups"]


@pytest.fixture(scope="module")
def checked():
    """Checks of both definitions, under two keys; a class with "/"."""
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = cite()
        for column in ("cell_type", "true_cell_type"):
            mdata.obs[column] = mdata.obs[column].cat.rename_categories({"NK": "NK/T"})
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
        options = {"n_samples": 2, "groupby": "true_cell_type"}
        av.metrics.criticism(mdata, **options)
        av.metrics.criticism(mdata, key_added="other", definition="scvi", **options)
    return mdata


def points(ax) -> np.ndarray:
    """All points of scatters in Axes (points, 2)."""
    return np.concatenate([np.asarray(part.get_offsets()) for part in ax.collections])


def test_what_is_drawn_is_what_lies_there(checked):
    axes = av.pl.criticism(checked, model="totalanvi", show=False)
    assert axes.shape == (2, 5)
    tables = checked.uns["totalanvi"]["criticism"]
    for mod, line in zip(("rna", "prot"), axes, strict=True):
        part = {name: rows[rows["modality"] == mod] for name, rows in tables.items() if name not in ("params",)}
        assert [ax.get_title() for ax in line] == [f"{mod}: {check}" for check in CHECKS]
        cells = part["cells"][["cv_data", "cv_model"]].to_numpy()
        np.testing.assert_allclose(sorted(map(tuple, points(line[0]))), sorted(map(tuple, cells)))
        for ax, what in ((line[1], "cv"), (line[2], "zero")):
            drawn, stored = points(ax), part["features"][[f"{what}_data", f"{what}_model"]].to_numpy()
            np.testing.assert_allclose(drawn, stored)
            assert ax.get_xlim() == ax.get_ylim()
        heights = [bar.get_height() for bar in line[3].patches]
        np.testing.assert_allclose(heights, part["ranks"]["all"])
        roc = next(drawn for drawn in line[4].lines if drawn.get_label() == "ROC-AUC")
        np.testing.assert_allclose(roc.get_xdata(), part["de"]["roc_auc"])
        names = [text.get_text() for text in line[4].get_yticklabels()]
        assert names == [f"{g} ({n:,})" for g, n in zip(part["de"]["group"], part["de"]["cells"], strict=True)]
        said = {text.get_text() for ax in line for text in ax.texts}
        wanted = part["verdict"].iloc[0]
        assert f"Pearson {wanted['value']:.3g}: {wanted['verdict']}" in said


def test_the_other_definition_is_titled_as_what_it_is(checked):
    axes = av.pl.criticism(checked, model="other", modality="rna", show=False)
    assert axes.shape == (1, 5)
    assert axes[0, 2].get_title() == "rna: share of non-zeros"
    assert axes[0, 3].get_title() == "rna: inside intervals of the draws"


def test_what_is_refused(checked):
    with pytest.raises(ValueError, match="checks of several fits: 'totalanvi', 'other'"):
        av.pl.criticism(checked)
    with pytest.raises(KeyError, match="modality='atac' was not checked; there are: 'rna', 'prot'"):
        av.pl.criticism(checked, model="totalanvi", modality="atac")
    with pytest.raises(KeyError, match=r"run av\.metrics\.criticism"):
        av.pl.criticism(cite(60))
