"""Temperatures and reliability, beside a search over a grid and loops."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import cite

import anvi as av
from anvi._data.predictions import BINS, expected_error, reliability
from anvi._posterior import confidence, encode


def problem(n: int = 4_000, true_temperature: float = 2.0, seed: int = 0):
    """Logits that are too sure by a known factor."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(size=(n, 5)) * 2
    proba = np.exp(honest) / np.exp(honest).sum(1, keepdims=True)
    target = np.array([rng.choice(5, p=row) for row in proba])
    return torch.from_numpy(honest * true_temperature), torch.from_numpy(target)


@pytest.mark.parametrize("true_temperature", [0.5, 1.3, 2.0, 4.0])
def test_the_temperature_is_found(true_temperature):
    logits, target = problem(true_temperature=true_temperature)
    found = confidence.fit_temperature(encode.Votes(logits, None), target)
    # the standard error of a temperature from 4,000 cells is about 3 %
    assert found == pytest.approx(true_temperature, rel=0.1)
    grid = np.linspace(0.2, 8, 781)
    losses = [
        -np.log((torch.softmax(logits / t, 1).numpy() + 1e-300)[np.arange(len(target)), target]).mean() for t in grid
    ]
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=0.011)


def test_few_cells_move_the_temperature_little():
    logits, target = problem(true_temperature=4.0)
    few, more, many = (confidence.fit_temperature(encode.Votes(logits[:n], None), target[:n]) for n in (3, 30, 3_000))
    assert abs(np.log(few)) < np.log(more) < np.log(many)
    log_t = np.linspace(-3, 3, 60_001)
    surprise = [
        -np.log(torch.softmax(logits[:30] / np.exp(t), 1).numpy()[np.arange(30), target[:30]]).sum() for t in log_t
    ]
    best = log_t[np.argmin(np.array(surprise) + 0.5 * (log_t / 0.5) ** 2)]
    assert np.log(more) == pytest.approx(best, abs=1e-3)


def test_reliability_by_a_loop():
    rng = np.random.default_rng(1)
    proba = rng.dirichlet(np.ones(4), size=500)
    target = rng.integers(0, 4, 500)
    table = reliability(proba.max(1), proba.argmax(1) == target)
    error = 0.0
    for b in range(BINS):
        inside = [i for i in range(500) if min(int(proba[i].max() * BINS), BINS - 1) == b]
        row = table[table["bin"] == b]
        assert len(row) == bool(inside)
        if inside:
            sure = np.mean([proba[i].max() for i in inside])
            accuracy = np.mean([proba[i].argmax() == target[i] for i in inside])
            np.testing.assert_allclose(row[["cells", "confidence", "accuracy"]], [[len(inside), sure, accuracy]])
            error += len(inside) / 500 * abs(sure - accuracy)
    assert expected_error(table) == pytest.approx(error)


def test_a_fit_writes_reliability_before_and_after(labelled):
    table = labelled.uns["totalanvi"]["calibration"]
    assert set(table["cells_seen"]) == {"with_proteins", "without_proteins"} and set(table["when"]) == {
        "before",
        "after",
    }
    counts = table.groupby(["cells_seen", "when"])["cells"].sum()
    assert counts.nunique() == 1 and counts.iloc[0] % len(confidence.JUDGED_ON) == 0
    assert min(av.get.model(labelled).info["temperature"].values()) > 0


def test_cells_get_the_temperature_of_their_kind(labelled):
    model = replace(av.get.model(labelled), neighbors=None)
    model.info["temperature"] = {"with_proteins": 2.0, "without_proteins": 5.0}
    soft = av.tl.predict(labelled, model=model, inplace=False)
    model.info["temperature"] = None
    raw = av.tl.predict(labelled, model=model, inplace=False)
    measured = pd.Series(labelled.obs["batch"] != "batch_2", raw.index)  # the last batch has RNA only
    assert measured.any() and not measured.all()
    for kind, t in ((measured, 2.0), (~measured, 5.0)):
        expected = raw[kind] ** (1 / t)
        expected = expected.div(expected.sum(axis=1), axis=0)
        np.testing.assert_allclose(soft[kind], expected, atol=2e-5)
    assert (soft.idxmax(axis=1) == raw.idxmax(axis=1)).all()


def test_margin_and_entropy_by_hand(labelled):
    proba, obs = av.get.proba(labelled).to_numpy(), labelled.obs
    for i in (0, 700, 1_499):
        first, second = sorted(proba[i])[::-1][:2]
        assert obs["totalanvi_margin"].iloc[i] == pytest.approx(first - second, abs=1e-5)
        terms = [p * np.log(p) for p in proba[i] if p > 0]
        assert obs["totalanvi_entropy"].iloc[i] == pytest.approx(-sum(terms) / np.log(proba.shape[1]), abs=1e-4)


def test_few_labelled_cells_leave_probabilities_as_they_are(caplog):
    mdata = cite()
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1)
    assert "probabilities are not calibrated" in caplog.text
    model = av.get.model(mdata)
    assert "temperature" not in model.info and model.landmarks is None
    assert encode.temperatures(model, None) is None
    assert "totalanvi_novelty" not in mdata.obs


def test_it_survives_a_file(labelled, tmp_path):
    import mudata

    labelled.write(tmp_path / "x.h5mu")
    back = mudata.read(tmp_path / "x.h5mu")
    av.tl.predict(back)
    pd.testing.assert_frame_equal(av.get.proba(back), av.get.proba(labelled), atol=1e-6)
    pd.testing.assert_series_equal(back.obs["totalanvi_novelty"], labelled.obs["totalanvi_novelty"], rtol=1e-4)
    assert len(back.uns["totalanvi"]["calibration"]) == len(labelled.uns["totalanvi"]["calibration"])


def test_of_many_held_out_cells_some_will_do():
    index = torch.arange(10, 10_010)
    chosen = confidence.at_most(500, index, torch.Generator().manual_seed(0))
    assert len(chosen.unique()) == 500 and torch.equal(chosen, chosen.sort().values)
    assert 4_000 < float(chosen.double().mean()) < 6_000  # the standard error of the mean of 500 is 130
    assert torch.equal(confidence.at_most(20_000, index, torch.Generator().manual_seed(0)), index)
