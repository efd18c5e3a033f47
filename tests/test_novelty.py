"""Distances to the centres of classes, beside loops; a type that was left out is found."""

import json
from dataclasses import replace

import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import quiet_mudata
from safetensors.torch import save
from sklearn.metrics import roc_auc_score

import anvi as av
from anvi._data.cells import read_cells
from anvi._model import Landmarks
from anvi._posterior import confidence, encode


def test_scores_by_a_loop(labelled):
    model = av.get.model(labelled)
    cells = read_cells(labelled, model.setup, labels=True)
    found_by = encode.embed(model, cells)
    latent, proba = found_by.mean, found_by.proba.astype(float)
    found = confidence.novelties(model, cells, found_by, 0.05)[-1]
    marks = model.landmarks
    centre, whiten, quantiles = (part.numpy().astype(float) for part in (marks.centre, marks.whiten, marks.quantiles))
    measured, batch = cells.measured.any(1).numpy(), cells.batch.numpy()

    def plain(i: int) -> float:
        kind = 0 if measured[i] else 1
        precision = whiten[kind] @ whiten[kind].T
        squares = [(latent[i] - mean) @ precision @ (latent[i] - mean) for mean in centre[kind]]
        entropy = -sum(p * np.log(p) for p in proba[i] if p > 0) / np.log(len(proba[i]))
        return np.sqrt(min(squares)) * (1 + entropy) / quantiles[kind, 95]

    every = np.array([plain(i) for i in range(len(cells))])
    for i in (0, 5, 900, 1_999):
        kind = 0 if measured[i] else 1
        alike = (batch == batch[i]) & (measured == measured[i])
        assert alike.sum() >= confidence.MIN_BATCH
        unit = np.quantile(every[alike], 0.25) / (quantiles[kind, 25] / quantiles[kind, 95])
        assert found.score[i] == pytest.approx(every[i] / np.clip(unit, 1, confidence.LONGEST_UNIT), rel=1e-3)
        assert encode.kind_of(model, cells)[i] == kind


def test_a_batch_that_is_off_as_a_whole_is_measured_by_a_longer_unit(labelled):
    model = av.get.model(labelled)
    cells = read_cells(labelled, model.setup)
    cells = replace(cells, batch=torch.zeros_like(cells.batch), mask_table=torch.zeros_like(cells.mask_table))
    near = model.landmarks.centre[-1, 0].numpy()
    # every cell at a distance of its own from one centre, spread as that of held-out cells
    place = np.linspace(0, 100, len(cells))
    distance = np.interp(place, np.arange(101), model.landmarks.quantiles[-1].numpy())
    last = model.landmarks
    even = torch.eye(len(near))[None]
    marks = Landmarks(last.quantiles[-1:], last.own[-1:], torch.from_numpy(near)[None, None], even)
    alone = replace(model, landmarks=marks)

    def rejected(factor: float) -> float:
        latent = np.tile(near, (len(cells), 1))
        latent[:, 0] += factor * distance
        sure = np.eye(len(model.classes), dtype=np.float32)[np.zeros(len(cells), dtype=int)]
        return confidence.novelties(alone, cells, encode.Embedding(latent, sure), 0.05)[-1].beyond.mean()

    assert rejected(1.0) == pytest.approx(0.05, abs=0.005)
    assert rejected(1.3) == pytest.approx(0.05, abs=0.005)  # all are farther, none for its type
    assert rejected(4.0) > 0.5  # too far for that: new types


def test_the_limit_keeps_the_stated_share_of_held_out_cells():
    scores = np.linspace(0, 3, 1_001, dtype=np.float32)  # of held-out cells, evenly spread
    quantiles = np.tile(np.quantile(scores, np.linspace(0, 1, 101)), (2, 1))
    kind = np.zeros(len(scores), dtype=int)
    for share in (0.01, 0.05, 0.123, 0.5):
        assert confidence.beyond(scores, kind, quantiles, share).mean() == pytest.approx(
            share, abs=2e-3
        )  # a grid of 1,001
    assert not confidence.beyond(scores, kind, quantiles, 0).any()


def test_a_type_without_labels_is_far(labelled):
    truth, score = labelled.obs["true_cell_type"].astype(str), labelled.obs["totalanvi_novelty"]
    hidden = labelled.obs["known"].astype(str) == "Unknown"
    assert roc_auc_score((truth == "B")[hidden], score[hidden]) > 0.9
    rng = np.random.default_rng(0)
    shuffled = rng.permutation((truth == "B")[hidden])
    # the standard error of an AUROC of chance with 200 of 700 cells is about .025
    assert abs(roc_auc_score(shuffled, score[hidden]) - 0.5) < 0.1


def test_unassigned_is_a_label_and_never_a_prediction(labelled):
    labels, far = labelled.obs["totalanvi_label"].astype(str), labelled.obs["totalanvi_novelty"] > 1
    known = labelled.obs["known"].astype(str)
    assert ((labels == "Unassigned") == (far & (known == "Unknown"))).all() and (labels == "Unassigned").any()
    assert "Unassigned" not in set(labelled.obs["totalanvi_prediction"])
    assert (labels[known != "Unknown"] == known[known != "Unknown"]).all()


def test_predict_takes_another_share(labelled):
    copy = labelled.copy()
    av.tl.predict(copy, false_rejects=0)
    assert "Unassigned" not in set(copy.obs["totalanvi_label"])
    av.tl.predict(copy, false_rejects=0.3)
    assert (copy.obs["totalanvi_label"] == "Unassigned").sum() > (labelled.obs["totalanvi_label"] == "Unassigned").sum()
    with pytest.raises(ValueError, match="false_rejects=1.5"):
        av.tl.predict(copy, false_rejects=1.5)


def test_the_same_share_of_every_class_is_looked_at(monkeypatch):
    rng = np.random.default_rng(0)
    label = torch.from_numpy(rng.choice([-1, 0, 1, 2], 1_000, p=[0.2, 0.6, 0.19, 0.01]))
    index = torch.arange(500)
    of_class = torch.bincount(label[:500][label[:500] >= 0])
    everyone = confidence.of_every_class(label, index, torch.Generator().manual_seed(0))
    assert sorted(everyone.tolist()) == np.flatnonzero(label[:500].numpy() >= 0).tolist()
    monkeypatch.setattr(confidence, "CELLS", 60)
    chosen = confidence.of_every_class(label, index, torch.Generator().manual_seed(0))
    assert torch.equal(torch.bincount(label[chosen]), of_class.clamp(max=20))
    assert len(set(chosen.tolist())) == len(chosen) and set(chosen.tolist()) <= set(everyone.tolist())


def test_centres_and_scatter_by_numpy():
    """All cells of every class: the within-class covariance; some of a class count for those that are left out."""
    rng = np.random.default_rng(0)
    label = rng.choice(3, 3_000, p=[0.7, 0.29, 0.01])
    z = 5 * rng.standard_normal((4, 3))[label] + rng.standard_normal((3_000, 3)) @ np.array(
        [[3, 0, 0], [1, 1, 0], [0, 0, 0.1]]
    )
    z[label == 1] *= [1, 2, 1]  # classes that scatter differently
    means = np.stack([z[label == code].mean(0) for code in range(3)])
    inside = (z - means[label]).T @ (z - means[label])
    expected = (inside + 3 * np.eye(3) * np.trace(inside) / 3_000 / 3) / 3_003
    frequency = torch.bincount(torch.from_numpy(label))
    centre, whiten = confidence._centres(torch.from_numpy(z), torch.from_numpy(label), frequency)
    np.testing.assert_allclose(centre, means, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.inv(whiten.double() @ whiten.double().T), expected, rtol=1e-4, atol=1e-6)
    # with a tenth of the largest class, each class still counts as it is frequent
    some = (label != 0) | (rng.random(3_000) < 0.1)
    _, of_some = confidence._centres(torch.from_numpy(z[some]), torch.from_numpy(label[some]), frequency)
    within = sum(np.cov(z[some & (label == k)].T, bias=True) * int(frequency[k]) / 3_000 for k in range(3))
    expected = (some.sum() * within + 3 * np.eye(3) * np.trace(within) / 3) / (some.sum() + 3)
    np.testing.assert_allclose(np.linalg.inv(of_some.double() @ of_some.double().T), expected, rtol=1e-4, atol=1e-6)


def test_one_cell_of_each_class_has_no_scatter_to_speak_of():
    z = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    centre, whiten = confidence._centres(z, torch.tensor([0, 4]), torch.tensor([1, 0, 0, 0, 1]))
    assert torch.equal(centre, z) and bool(whiten.isfinite().all())


def test_a_direction_in_which_classes_hardly_scatter_counts_for_more():
    """What the distance to the nearest cells misses: a small step off in a tight direction."""
    rng = np.random.default_rng(0)
    label = torch.from_numpy(rng.choice(2, 400))
    z = torch.from_numpy((rng.standard_normal((400, 2)) * [5, 0.1]).astype(np.float32))
    centre, whiten = confidence._centres(z, label, torch.bincount(label))
    sure = np.ones((2, 1), dtype=np.float32)
    along, across = confidence._strangeness(np.array([[6, 0], [0, 1]], dtype=np.float32), sure, centre, whiten)
    assert across > 3 * along  # six times as near by the ruler


def of_schema_1(labelled):
    """The model as it was stored when landmarks were single cells."""
    model = av.get.model(labelled)
    weights = {name: value for name, value in model.weights().items() if name not in CENTRES}
    weights["landmarks.latent"] = torch.zeros(2, 30, 20)
    return av.Model.from_parts(model.facts() | {"schema": 1}, weights, model.history), weights


CENTRES = ("landmarks.centre", "landmarks.whiten")


def test_a_model_of_schema_1_stays_the_same_and_tells_nothing_of_novelty(labelled, caplog):
    earlier, weights = of_schema_1(labelled)
    assert earlier.weights().keys() == weights.keys()  # and with them the fingerprint, by which minified data know it
    copy = labelled.copy()
    copy.uns["totalanvi"]["model"] = {  # as it was stored before there were checksums
        "config": json.dumps(earlier.facts() | {"schema": 1}),
        "weights": np.frombuffer(save(earlier.weights()), dtype=np.uint8).copy(),
        "format": "anvi safetensors",
    }
    av.tl.predict(copy, coverage=0.9)  # the cells of prediction sets are still there
    assert "of an earlier anvi: no novelty" in caplog.text
    assert "totalanvi_novelty" not in copy.obs and "Unassigned" not in set(copy.obs["totalanvi_label"])
    pd.testing.assert_series_equal(copy.obs["totalanvi_prediction"], labelled.obs["totalanvi_prediction"])


def test_minified_data_of_schema_1_still_answer(labelled, tmp_path):
    earlier, _ = of_schema_1(labelled)
    copy = labelled.copy()
    copy.uns["totalanvi"]["model"] = earlier.to_slot()
    small = av.tl.minify(copy, copy=True)
    with quiet_mudata():
        small.write_h5mu(tmp_path / "small.h5mu")
        back = mudata.read_h5mu(tmp_path / "small.h5mu")
    av.tl.predict(back)
    pd.testing.assert_series_equal(back.obs["totalanvi_prediction"], labelled.obs["totalanvi_prediction"])


@pytest.mark.parametrize(
    "changed",
    [
        {"centre": torch.zeros(2, 5, 19)},
        {"centre": torch.zeros(2, 0, 20)},
        {"centre": torch.zeros(1, 5, 20)},
        {"centre": torch.zeros(5)},
        {"centre": torch.full((2, 5, 20), torch.nan)},
        {"centre": torch.zeros(2, 5, 20, dtype=torch.float64)},
        {"centre": None},
        {"whiten": torch.zeros(2, 20, 19)},
        {"whiten": torch.full((2, 20, 20), torch.inf)},
        {"quantiles": torch.zeros(1, 101)},
        {"quantiles": torch.zeros(2, 2)},
        {"quantiles": -torch.ones(2, 101)},
        {"quantiles": torch.arange(202.0).flip(0).view(2, 101)},
        {"quantiles": torch.zeros(2, 101, dtype=torch.int32)},
        {"own": torch.zeros(2, 3, 10)},
        {"own": torch.zeros(7)},
        {"own": torch.tensor(1.0)},
        {"stranger": torch.zeros(1)},
    ],
)
def test_landmarks_that_do_not_fit_are_refused(labelled, changed):
    model = av.get.model(labelled)
    weights = model.weights() | {f"landmarks.{name}": value for name, value in changed.items()}
    weights = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match="damaged"):
        av.Model.from_parts(model.facts(), weights, model.history)


def test_a_score_does_not_depend_on_who_else_is_asked():
    """A tight direction far from the origin, where a matrix product would cancel."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 20)).astype(np.float32)
    z[:, 0] = 3 + 1e-4 * z[:, 0]
    label = torch.from_numpy(rng.choice(4, 500))
    centre, whiten = confidence._centres(torch.from_numpy(z), label, torch.bincount(label) * 2_000)
    whiten[0, 0] = 1e4  # as of so many cells that nothing is added
    sure = np.ones((500, 1), dtype=np.float32)
    together = confidence._strangeness(z, sure, centre, whiten)
    alone = torch.cat([confidence._strangeness(z[i : i + 1], sure[:1], centre, whiten) for i in range(50)])
    np.testing.assert_allclose(together[:50], alone, rtol=1e-5)


def test_a_model_without_landmarks_says_nothing(labelled):
    model = replace(av.get.model(labelled), landmarks=None)
    cells = read_cells(labelled, model.setup)
    nowhere = np.zeros((len(cells), 20))
    assert confidence.novelties(model, cells, encode.Embedding(nowhere, nowhere[:, :1] + 1), 0.05) is None
