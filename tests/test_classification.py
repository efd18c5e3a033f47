"""metrics.classification against scikit-learn and loops over cells."""

import mudata
import numpy as np
import pandas as pd
import pytest
from helpers import assert_same, cite, contents, quiet_mudata
from sklearn import metrics as sk

import anvi as av
from anvi._data.predictions import expected_error, reliability
from anvi.metrics.classification import score

CLASSES = ("B", "CD4 T", "NK/T", "pDC")


def drawn(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions that are right in 70 %, and some confidence."""
    rng = np.random.default_rng(seed)
    true = rng.choice(CLASSES, n, p=[0.6, 0.25, 0.1, 0.05]).astype(object)
    predicted = np.where(rng.random(n) < 0.7, true, rng.choice(CLASSES, n)).astype(object)
    return true, predicted, rng.random(n)


def expected_calibration_error(right, confidence, n_bins=15) -> float:
    """Cell by cell and bin by bin."""
    total = 0.0
    for b in range(n_bins):
        inside = [i for i, c in enumerate(confidence) if b / n_bins < c <= (b + 1) / n_bins]
        if inside:
            accuracy = sum(bool(right[i]) for i in inside) / len(inside)
            total += len(inside) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return total / len(confidence)


def test_scores_are_those_of_scikit_learn():
    true, predicted, confidence = drawn()
    table = score(true, predicted, confidence, CLASSES)
    assert list(table.index) == ["overall", *CLASSES]
    names = list(CLASSES)
    precision, recall, f1, cells = sk.precision_recall_fscore_support(true, predicted, labels=names)
    for column, values in (("precision", precision), ("recall", recall), ("f1", f1), ("cells", cells)):
        np.testing.assert_allclose(table.loc[names, column], values, rtol=1e-12)
    overall = table.loc["overall"]
    assert overall["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))
    assert overall["f1"] == pytest.approx(sk.f1_score(true, predicted, average="macro"))
    assert overall["recall"] == pytest.approx(sk.balanced_accuracy_score(true, predicted))
    assert overall["precision"] == pytest.approx(sk.precision_score(true, predicted, average="macro"))
    assert overall["ece"] == pytest.approx(expected_calibration_error(true == predicted, confidence))
    for name in names:
        assert table.loc[name, "confidence"] == pytest.approx(confidence[true == name].mean())
        assert table.loc[name, "predicted"] == (predicted == name).sum()


def test_classes_that_prediction_or_labels_do_not_have():
    true = np.array(["a", "a", "b", "new"], dtype=object)
    predicted = np.array(["a", "c", "b", "b"], dtype=object)
    table = score(true, predicted, np.full(4, np.nan), ("a", "b", "c"))
    assert list(table.index) == ["overall", "a", "b", "new", "c"]
    assert table.loc["new", "recall"] == 0 and table.loc["new", "f1"] == 0
    assert np.isnan(table.loc["c", "recall"]) and table.loc["c", "predicted"] == 1
    # the mean over classes that cells have: "c" is not one of them
    labels = ["a", "b", "new"]
    assert table.loc["overall", "f1"] == pytest.approx(
        sk.f1_score(true, predicted, labels=labels, average="macro", zero_division=0)
    )
    assert table[["confidence", "ece"]].isna().all(axis=None)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_with_confidence_on_the_edges_of_bins(seed):
    rng = np.random.default_rng(seed)
    confidence = np.concatenate([rng.random(200), np.arange(1, 16) / 15, [1.0, 1.0]])
    right = rng.random(len(confidence)) < 0.5
    assert expected_error(reliability(confidence, right)) == pytest.approx(
        expected_calibration_error(right, confidence)
    )


def test_confidence_that_is_what_it_says_has_no_error_and_certainty_that_is_not_has_all():
    assert expected_error(reliability(np.full(4, 0.5), np.array([True, True, False, False]))) == 0
    assert expected_error(reliability(np.ones(5), np.zeros(5, dtype=bool))) == 1


@pytest.mark.parametrize("key", ["scanvi", "totalanvi"])
def test_slots_of_a_fit(fitted, key):
    part = fitted if key == "totalanvi" else fitted["rna"]
    before = contents(fitted)
    table = av.metrics.classification(fitted, model=key)
    assert_same(contents(fitted), before)
    truth = fitted.obs["cell_type"].astype(str).reindex(part.obs_names)
    chosen = (part.obs[f"{key}_split"] == "validation") & (truth != "Unknown")
    prediction = part.obs[f"{key}_prediction"].astype(str)[chosen]
    assert table.loc["overall", "cells"] == chosen.sum() > 0
    assert table.loc["overall", "accuracy"] == pytest.approx((prediction == truth[chosen]).mean())
    confidence = part.obs[f"{key}_confidence"][chosen].to_numpy(float)
    right = (prediction == truth[chosen]).to_numpy()
    assert table.loc["overall", "ece"] == pytest.approx(expected_calibration_error(right, confidence), abs=1e-6)


def test_other_cells_other_labels_and_other_predictions(fitted):
    everyone = av.metrics.classification(fitted, "true_cell_type", model="totalanvi", split=None)
    assert everyone.loc["overall", "cells"] == fitted.n_obs
    names = fitted.obs_names[5:25]
    mask = np.isin(fitted.obs_names, names)
    by_name = av.metrics.classification(fitted, "true_cell_type", model="totalanvi", cells=names)
    by_mask = av.metrics.classification(fitted, "true_cell_type", model="totalanvi", cells=mask)
    pd.testing.assert_frame_equal(by_name, by_mask)
    assert by_name.loc["overall", "cells"] == 20
    named = av.metrics.classification(fitted, "true_cell_type", prediction="totalanvi_prediction", split=None)
    np.testing.assert_allclose(
        named.loc["overall"].to_numpy(float), everyone.loc["overall"].to_numpy(float), rtol=1e-12
    )
    fitted.obs["mine"] = fitted.obs["true_cell_type"]
    mine = av.metrics.classification(fitted, "true_cell_type", prediction="mine", split=None)
    assert mine.loc["overall", "accuracy"] == 1 and np.isnan(mine.loc["overall", "ece"])


def test_the_same_from_a_file(fitted, tmp_path):
    fitted.obs["cell_type"] = fitted.obs["cell_type"].cat.rename_categories({"NK": "NK/T"})
    fitted.obs["totalanvi_prediction"] = fitted.obs["totalanvi_prediction"].cat.rename_categories({"NK": "NK/T"})
    table = av.metrics.classification(fitted, model="totalanvi", split=None)
    assert "NK/T" in table.index
    fitted.write(tmp_path / "x.h5mu")
    with quiet_mudata():
        back = mudata.read_h5mu(tmp_path / "x.h5mu")
    pd.testing.assert_frame_equal(av.metrics.classification(back, model="totalanvi", split=None), table)


def test_what_is_refused(fitted):
    with pytest.raises(ValueError, match="There are several fitted models"):
        av.metrics.classification(fitted)
    with pytest.raises(ValueError, match="'totalvi' .* has no labels"):
        av.metrics.classification(fitted, model="totalvi")
    with pytest.raises(KeyError, match="labels_key='celltype'"):
        av.metrics.classification(fitted, "celltype", model="totalanvi")
    with pytest.raises(ValueError, match="split='test' has none"):
        av.metrics.classification(fitted, model="totalanvi", split="test")
    with pytest.raises(ValueError, match="labels_key="):
        av.metrics.classification(fitted, prediction="totalanvi_prediction")
    with pytest.raises(KeyError, match="no split beside it"):
        av.metrics.classification(fitted, "cell_type", prediction="true_cell_type")
    with pytest.raises(KeyError, match="first: 'nobody'"):
        av.metrics.classification(fitted, model="totalanvi", cells=["nobody"])
    with pytest.raises(ValueError, match="mask"):
        av.metrics.classification(fitted, model="totalanvi", cells=[True, False])
    with pytest.raises(TypeError, match="Expected a MuData or an AnnData"):
        av.metrics.classification(fitted.obs, model="totalanvi")
    del fitted.obs["totalanvi_prediction"]
    with pytest.raises(KeyError, match=r"run av\.tl\.predict"):
        av.metrics.classification(fitted, model="totalanvi")


def test_a_query_has_no_split(fitted):
    query = cite(200, random_state=5)
    av.tl.predict(query, model=av.get.model(fitted, "totalanvi"))
    with pytest.raises(KeyError, match="split=None"):
        av.metrics.classification(query, "true_cell_type", prediction="totalanvi_prediction")
    table = av.metrics.classification(query, "true_cell_type", prediction="totalanvi_prediction", split=None)
    assert table.loc["overall", "cells"] == 200 and np.isfinite(table.loc["overall", "ece"])
