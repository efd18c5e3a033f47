"""Distances to landmarks, beside loops; a type that was left out is found."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import anvi as av
from anvi._data.cells import read_cells
from anvi._model import Landmarks
from anvi._posterior import encode, novelty


@pytest.fixture(scope="module")
def fitted():
    """A fit whose reference lacks a type; the cells of the type are there without a label."""
    mdata = av.datasets.synthetic_cite(2_000, n_genes=150)
    truth = mdata.obs["true_cell_type"].astype(str).to_numpy()
    mdata.obs["known"] = np.where(truth == "B", "Unknown", truth)
    mdata.obs["known"] = mdata.obs["known"].where(mdata.obs["cell_type"].astype(str) != "Unknown", "Unknown")
    av.tl.totalanvi(mdata, "known", batch_key="batch", max_epochs=15, train_size=0.8)
    return mdata


def test_scores_by_a_loop(fitted):
    model = av.get.model(fitted)
    cells = read_cells(fitted, model.setup, labels=True)
    found_by = encode.embed(model, cells)
    latent, proba = found_by.mean, found_by.proba.astype(float)
    found = novelty.novelty(model, cells, latent, found_by.proba)
    marks, quantiles = model.landmarks.latent.numpy(), model.landmarks.quantiles.numpy()
    measured, batch = cells.measured.any(1).numpy(), cells.batch.numpy()

    def plain(i: int) -> float:
        kind = 0 if measured[i] else 1
        distances = sorted(np.linalg.norm(marks[kind] - latent[i], axis=1))[: novelty.NEIGHBOURS]
        entropy = -sum(p * np.log(p) for p in proba[i] if p > 0) / np.log(len(proba[i]))
        return np.mean(distances) * (1 + entropy) / quantiles[kind, 95]

    every = np.array([plain(i) for i in range(len(cells))])
    for i in (0, 5, 900, 1_999):
        kind = 0 if measured[i] else 1
        alike = (batch == batch[i]) & (measured == measured[i])
        assert alike.sum() >= novelty.MIN_BATCH
        unit = np.quantile(every[alike], 0.25) / (quantiles[kind, 25] / quantiles[kind, 95])
        assert found.score[i] == pytest.approx(every[i] / np.clip(unit, 1, novelty.LONGEST_UNIT), rel=1e-3)
        assert found.kind[i] == kind


def test_a_batch_that_is_off_as_a_whole_is_measured_by_a_longer_unit(fitted):
    model = av.get.model(fitted)
    cells = read_cells(fitted, model.setup)
    cells = replace(cells, batch=torch.zeros_like(cells.batch), mask_table=torch.zeros_like(cells.mask_table))
    near = model.landmarks.latent[-1, 0].numpy()
    # every cell at a distance of its own from one landmark, spread as that of held-out cells
    place = np.linspace(0, 100, len(cells))
    distance = np.interp(place, np.arange(101), model.landmarks.quantiles[-1].numpy())
    last = model.landmarks
    marks = Landmarks(torch.from_numpy(near)[None, None], last.quantiles[-1:], last.own[-1:])
    alone = replace(model, landmarks=marks)

    def rejected(factor: float) -> float:
        latent = np.tile(near, (len(cells), 1))
        latent[:, 0] += factor * distance
        sure = np.eye(len(model.classes), dtype=np.float32)[np.zeros(len(cells), dtype=int)]
        return novelty.novelty(alone, cells, latent, sure).unassigned(0.05).mean()

    assert rejected(1.0) == pytest.approx(0.05, abs=0.005)
    assert rejected(1.3) == pytest.approx(0.05, abs=0.005)  # all are farther, none for its type
    assert rejected(4.0) > 0.5  # too far for that: new types


def test_the_limit_keeps_the_stated_share_of_held_out_cells():
    scores = np.linspace(0, 3, 1_001, dtype=np.float32)  # of held-out cells, evenly spread
    quantiles = np.tile(np.quantile(scores, np.linspace(0, 1, 101)), (2, 1))
    some = novelty.Novelty(scores, np.zeros(len(scores), dtype=int), quantiles)
    for share in (0.01, 0.05, 0.123, 0.5):
        assert some.unassigned(share).mean() == pytest.approx(share, abs=2e-3)  # a grid of 1,001
    assert not some.unassigned(0).any()


def test_a_type_without_labels_is_far(fitted):
    truth, score = fitted.obs["true_cell_type"].astype(str), fitted.obs["totalanvi_novelty"]
    hidden = fitted.obs["known"].astype(str) == "Unknown"
    assert roc_auc_score((truth == "B")[hidden], score[hidden]) > 0.9
    rng = np.random.default_rng(0)
    shuffled = rng.permutation((truth == "B")[hidden])
    # the standard error of an AUROC of chance with 200 of 700 cells is about .025
    assert abs(roc_auc_score(shuffled, score[hidden]) - 0.5) < 0.1


def test_unassigned_is_a_label_and_never_a_prediction(fitted):
    labels, far = fitted.obs["totalanvi_label"].astype(str), fitted.obs["totalanvi_novelty"] > 1
    known = fitted.obs["known"].astype(str)
    assert ((labels == "Unassigned") == (far & (known == "Unknown"))).all() and (labels == "Unassigned").any()
    assert "Unassigned" not in set(fitted.obs["totalanvi_prediction"])
    assert (labels[known != "Unknown"] == known[known != "Unknown"]).all()


def test_predict_takes_another_share(fitted):
    copy = fitted.copy()
    av.tl.predict(copy, false_rejects=0)
    assert "Unassigned" not in set(copy.obs["totalanvi_label"])
    av.tl.predict(copy, false_rejects=0.3)
    assert (copy.obs["totalanvi_label"] == "Unassigned").sum() > (fitted.obs["totalanvi_label"] == "Unassigned").sum()
    with pytest.raises(ValueError, match="false_rejects=1.5"):
        av.tl.predict(copy, false_rejects=1.5)


def test_landmarks_are_labelled_training_cells_of_every_class(fitted):
    model = av.get.model(fitted)
    cells = read_cells(fitted, model.setup, labels=True)
    train = torch.from_numpy(np.flatnonzero(fitted.obs["totalanvi_split"].reindex(cells.names) == "train"))
    chosen = novelty._of_every_class(cells.label, train, torch.Generator().manual_seed(0))
    of_class = torch.bincount(cells.label[train][cells.label[train] >= 0]).clamp(max=novelty.PER_CLASS)
    assert torch.equal(torch.bincount(cells.label[chosen]), of_class)
    assert set(chosen.tolist()) <= set(train.tolist()) and len(chosen) == model.landmarks.latent.shape[1]


def test_a_model_without_landmarks_says_nothing(fitted):
    model = replace(av.get.model(fitted), landmarks=None)
    cells = read_cells(fitted, model.setup)
    assert novelty.novelty(model, cells, np.zeros((len(cells), 20)), np.ones((len(cells), 1))) is None
