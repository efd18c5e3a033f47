"""metrics.novelty: the classes are left out, the rest of the fit is as it was."""

import importlib

import numpy as np
import pytest

import anvi as av


@pytest.fixture(scope="module")
def fitted():
    mdata = av.datasets.synthetic_cite(1_500, n_genes=120)
    av.tl.scanvi(mdata, batch_key="batch", max_epochs=80, train_size=0.8, adam_eps=2e-8, dropout_encoder=0.11)
    return mdata


def test_a_type_that_is_left_out_stands_out(fitted):
    before = set(fitted["rna"].obs), set(fitted["rna"].uns), set(fitted.obs)
    table = av.metrics.novelty(fitted, classes=["B", "NK"])
    assert list(table.index) == ["B", "NK"]
    labels = fitted.obs["cell_type"].astype(str)
    assert table["cells"].tolist() == [(labels == "B").sum(), (labels == "NK").sum()]
    assert (table["auroc"] > 0.85).all() and (table["false_rejects"] < 0.2).all()
    assert not set(table["taken_for"]) & {"nan"} and table.loc["B", "taken_for"] != "B"
    assert (set(fitted["rna"].obs), set(fitted["rna"].uns), set(fitted.obs)) == before


def test_the_fit_is_made_as_it_was(fitted, monkeypatch):
    seen = {}

    def spy(name, data, *, model_kwargs, labels_key, **arguments):
        seen.update(model_kwargs, name=name, labels=set(data["rna"].obs[labels_key]), where=arguments)
        raise InterruptedError

    monkeypatch.setattr(importlib.import_module("anvi.metrics.novelty"), "run_fit", spy)
    with pytest.raises(InterruptedError):
        av.metrics.novelty(fitted, classes=["B"], max_epochs=3)
    options = (seen["name"], seen["dropout_encoder"], seen["adam_eps"], seen["max_epochs"])
    assert options == ("scanvi", 0.11, 2e-8, 3)
    assert "B" not in seen["labels"] and {"Unknown", "NK"} <= seen["labels"]
    assert seen["where"]["batch_key"] == "batch"


def test_what_cannot_be_left_out(fitted):
    with pytest.raises(KeyError, match="'Martian' is no class of the model"):
        av.metrics.novelty(fitted, classes=["Martian"])
    mdata = av.datasets.synthetic_cite(200, n_genes=40)
    av.tl.scvi(mdata, max_epochs=1)
    with pytest.raises(ValueError, match="has no labels"):
        av.metrics.novelty(mdata)


def test_chance_is_chance(fitted):
    """With labels shuffled there is nothing to stand out."""
    rng = np.random.default_rng(0)
    shuffled = fitted.copy()
    known = (shuffled.obs["cell_type"].astype(str) != "Unknown").to_numpy()
    labels = shuffled.obs["cell_type"].astype(str).to_numpy().copy()
    labels[known] = rng.permutation(labels[known])
    shuffled.obs["cell_type"] = labels
    av.tl.scanvi(shuffled, batch_key="batch", max_epochs=4, train_size=0.8)
    # some 100 cells against some 150: the standard error of an AUROC of chance is about .04
    assert abs(av.metrics.novelty(shuffled, classes=["B"]).loc["B", "auroc"] - 0.5) < 0.16


def test_a_joint_fit_is_made_of_the_same_proteins():
    mdata = av.datasets.synthetic_cite(600, n_genes=40, n_proteins=8)
    chosen = [f"P{i:02}" for i in range(1, 6)]
    av.tl.totalanvi(mdata, proteins=chosen, batch_key="batch", max_epochs=2, train_size=0.6)
    fits = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anvi.tl._fit.write_fit", lambda data, key, model, *rest, **more: fits.append(model))
        with pytest.raises(ValueError, match="Without 'B' too few"):  # nothing was written
            av.metrics.novelty(mdata, classes=["B"], max_epochs=1)
    assert fits[0].setup.proteins == tuple(chosen)
