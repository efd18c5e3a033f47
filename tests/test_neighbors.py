"""Labels of neighbours beside the classifier: by a loop, held-out cells apart, in files, mapped and minified data."""

from dataclasses import replace

import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import cite, quiet_mudata
from scipy.optimize import minimize_scalar

import anvi as av
from anvi._data.cells import read_cells
from anvi._model import Neighbors
from anvi._posterior import confidence, encode
from anvi.nn import Draws


def asked(mdata):
    """The model, its cells, their latent vectors, and the classifier's logits."""
    model = av.get.model(mdata)
    cells = read_cells(mdata, model.setup, labels=True)
    z = torch.from_numpy(encode.posterior(model, cells)[0])
    with torch.no_grad():
        return model, cells, z.numpy(), model.network.labels.classify(z, Draws()).numpy().astype(float)


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_the_mean_by_a_loop(labelled):
    model, cells, z, logits = asked(labelled)
    proba = av.get.proba(labelled).loc[cells.names].to_numpy()
    near = Neighbors(*(part.numpy() for part in model.neighbors))
    temperature, k = model.info["temperature"], model.info["n_neighbors"]
    assert k == 5
    measured = cells.measured.any(1).numpy()
    for i in (0, 3, 711, 1_400, 1_999):
        order = np.argsort(((near.latent - z[i]) ** 2).sum(1))[:k]
        shares = np.zeros(len(model.classes))
        for j in order:
            shares[near.label[j]] += near.weight[j]
        own = softmax(logits[i] / temperature["with_proteins" if measured[i] else "without_proteins"])
        np.testing.assert_allclose(proba[i], (own + shares / shares.sum()) / 2, atol=1e-5)


def test_the_neighbours_are_labelled_training_cells(labelled):
    model, cells, z, _ = asked(labelled)
    split = labelled.obs["totalanvi_split"].reindex(cells.names).to_numpy()
    there = np.flatnonzero((split == "train") & (cells.label.numpy() >= 0))
    assert len(model.neighbors.label) == len(there)
    np.testing.assert_array_equal(model.neighbors.label, cells.label[there])
    np.testing.assert_allclose(model.neighbors.latent, z[there], atol=1e-5)
    assert (model.neighbors.weight == 1).all()
    nearest = torch.cdist(torch.from_numpy(z[split == "validation"]), model.neighbors.latent).amin(1)
    assert (nearest > 0).all()  # no held-out cell is a neighbour of its own


def test_of_many_cells_each_stands_for_several(labelled, monkeypatch):
    model, cells, _, _ = asked(labelled)
    train = torch.from_numpy(np.flatnonzero(labelled.obs["totalanvi_split"].reindex(cells.names) == "train"))
    monkeypatch.setattr(confidence, "CELLS", 200)
    few = confidence.with_neighbors(model, cells, train, 0).neighbors
    every = cells.label[train][cells.label[train] >= 0].bincount()
    assert len(few.label) == int(every.clamp(max=200 // len(every)).sum()) < int(every.sum())
    stood_for = torch.zeros(len(every)).index_add_(0, few.label, few.weight)
    torch.testing.assert_close(stood_for, every.float())


def test_the_temperature_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(300, 4)) * 3, rng.integers(0, 4, 300)
    shares = rng.dirichlet(np.ones(4), size=300)
    votes = encode.Votes(torch.from_numpy(logits), torch.from_numpy(shares))
    found = confidence.fit_temperature(votes, torch.from_numpy(target))

    def surprise(log_t: float) -> float:
        mean = (softmax(logits / np.exp(log_t)) + shares) / 2
        return -np.log(mean[np.arange(300), target]).sum() + 0.5 * (log_t / 0.5) ** 2

    best = minimize_scalar(surprise, bounds=(-3, 3), method="bounded").x
    assert np.log(found) == pytest.approx(best, abs=1e-3)
    alone = confidence.fit_temperature(votes._replace(shares=None), torch.from_numpy(target))
    assert found != pytest.approx(alone, rel=1e-2)


@pytest.mark.parametrize("options", [{"n_neighbors": 0}, {"objective": "scvi-tools"}], ids=str)
def test_the_classifier_alone(options):
    mdata = av.datasets.synthetic_cite(600, n_genes=60)
    av.tl.totalanvi(mdata, max_epochs=2, train_size=0.8, **options)
    model, cells, _, logits = asked(mdata)
    assert model.neighbors is None and "temperature" in model.info
    measured = cells.measured.any(1).numpy()
    t = model.info["temperature"]
    t = np.where(measured, t["with_proteins"], t["without_proteins"])[:, None]
    np.testing.assert_allclose(av.get.proba(mdata).loc[cells.names], softmax(logits / t), atol=1e-5)


def test_few_labelled_cells_are_not_asked():
    mdata = cite()
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1)
    assert av.get.model(mdata).neighbors is None


def test_wrong_numbers_of_neighbours(no_training):
    for wrong, error in ((-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="n_neighbors"):
            av.tl.totalanvi(cite(), n_neighbors=wrong)
    with pytest.raises(TypeError, match="belongs to models with labels"):
        av.tl.totalvi(cite(), n_neighbors=5)


def test_models_of_schema_3_have_the_classifier_alone_and_say_so(labelled, caplog):
    model = av.get.model(labelled)
    weights = {name: value for name, value in model.weights().items() if not name.startswith("neighbors.")}
    info = {name: value for name, value in model.info.items() if name != "n_neighbors"}
    earlier = av.Model.from_parts(model.facts() | {"schema": 3, "info": info}, weights, model.history)
    copy = labelled.copy()
    assert "earlier anvi" not in caplog.text
    copy.uns["totalanvi"]["model"] = earlier.to_slot()
    av.tl.predict(copy)
    assert "its classifier labels cells alone" in caplog.text
    _, cells, _, logits = asked(labelled)
    t = encode.temperatures(model, cells).numpy()
    np.testing.assert_allclose(av.get.proba(copy).loc[cells.names], softmax(logits / t), atol=1e-5)
    query = mudata.MuData({mod: labelled[mod][labelled["prot"].obs_names[:100]].copy() for mod in ("rna", "prot")})
    query.obs["batch"] = "batch_0"
    caplog.clear()
    av.tl.map_query(query, earlier, max_epochs=0)
    assert "its classifier labels cells alone" in caplog.text and av.get.model(query).neighbors is None


def test_files_and_minified_data_answer_the_same(labelled, tmp_path):
    before = av.tl.predict(labelled, inplace=False)
    av.write_model(labelled, tmp_path / "model")
    folder = av.read_model(tmp_path / "model")
    small = av.tl.minify(labelled, copy=True)
    with quiet_mudata():
        small.write_h5mu(tmp_path / "small.h5mu")
        small = mudata.read_h5mu(tmp_path / "small.h5mu")
    pd.testing.assert_frame_equal(av.tl.predict(labelled, model=folder, inplace=False), before)
    pd.testing.assert_frame_equal(av.tl.predict(small, inplace=False), before)
    weights = av.get.model(labelled).weights()
    assert weights["neighbors.label"].dtype == torch.int64
    assert folder.fingerprint() == av.get.model(labelled).fingerprint()
    alone = replace(folder, neighbors=None)
    assert alone.fingerprint() != folder.fingerprint()
    assert abs(av.tl.predict(labelled, model=alone, inplace=False) - before).to_numpy().max() > 0.05


def test_a_mapped_query_asks_the_cells_of_the_reference(labelled):
    new = labelled.obs["batch"] == "batch_1"
    reference, query = labelled, labelled[new].copy()
    query = mudata.MuData({mod: query[mod].copy() for mod in ("rna", "prot")})
    query.obs["batch"] = "new"
    av.tl.map_query(query, reference, max_epochs=1)
    mapped, model = av.get.model(query), av.get.model(reference)
    assert mapped.info["n_neighbors"] == 5
    for own, of in zip(mapped.neighbors, model.neighbors, strict=True):
        assert torch.equal(own, of)
    proba = av.get.proba(query)
    alone = av.tl.predict(query, model=replace(mapped, neighbors=None), inplace=False)
    assert abs(proba - alone).to_numpy().max() > 0.05
    # a network that is trained as a whole puts cells elsewhere
    av.tl.map_query(query, reference, max_epochs=1, freeze="none")
    assert av.get.model(query).neighbors is None


@pytest.mark.parametrize(
    "changed",
    [
        {"latent": torch.zeros(3, 19)},
        {"latent": torch.full((3, 20), torch.nan)},
        {"latent": torch.zeros(3, 20, dtype=torch.float64)},
        {"label": torch.tensor([0, 1, 99])},
        {"label": torch.tensor([0, -1, 1])},
        {"label": torch.tensor([0.0, 1.0, 1.0])},
        {"label": torch.tensor([0, 1])},
        {"weight": torch.zeros(3)},
        {"weight": torch.tensor([1.0, 1.0, torch.inf])},
        {"weight": None},
        {"n_neighbors": 0},
        {"n_neighbors": 2.5},
        {"n_neighbors": None},
        {"n_neighbors": True},
        {"stranger": torch.zeros(3)},
    ],
    ids=str,
)
def test_cells_that_do_not_fit_are_refused(labelled, changed):
    model = av.get.model(labelled)
    good = {"latent": torch.zeros(3, 20), "label": torch.tensor([0, 1, 1]), "weight": torch.ones(3)}
    facts = model.facts()
    facts["info"] = facts["info"] | {name: changed[name] for name in ("n_neighbors",) if name in changed}
    parts = good | {name: value for name, value in changed.items() if name != "n_neighbors"}
    weights = model.weights() | {f"neighbors.{name}": value for name, value in parts.items()}
    weights = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match="damaged"):
        av.Model.from_parts(facts, weights, model.history)


def test_any_number_of_neighbours_of_few_cells(labelled):
    model = av.get.model(labelled)
    cells = read_cells(labelled, model.setup)
    three = Neighbors(*(part[:3] for part in model.neighbors))
    proba = encode.embed(replace(model, neighbors=three), cells).proba
    np.testing.assert_allclose(proba.sum(1), 1, atol=1e-5)
