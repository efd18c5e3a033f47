import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import cite, quiet_mudata, resealed

import anvi as av
from anvi._data.fits import stored_fits
from anvi._find import find_model
from anvi._model import SCHEMA, Model

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")


def home(mdata, key):
    return mdata["rna"] if key in ("scvi", "scanvi") else mdata


@pytest.mark.parametrize("key", MODELS)
def test_slot_and_back(fitted, key):
    model = av.get.model(fitted, key)
    slot = model.to_slot()
    assert sorted(slot) == ["config", "format", "weights"]
    assert slot["weights"].dtype == np.uint8 and slot["weights"].flags.writeable
    again = Model.from_slot(slot, model.history)
    assert (again.name, again.setup, again.config, again.info) == (key, model.setup, model.config, model.info)
    assert not again.network.training
    ours, theirs = model.network.state_dict(), again.network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_config_is_plain_json_without_data(fitted):
    slot = fitted.uns["totalanvi"]["model"]
    stored = json.loads(slot["config"])
    assert sorted(stored) == ["config", "info", "name", "schema", "setup"] and stored["schema"] == SCHEMA
    assert not [name for name in fitted.obs_names if name in slot["config"]]  # no cell is in it


def test_repr_is_one_line(fitted):
    text = repr(av.get.model(fitted, "totalanvi"))
    assert (
        text.startswith("Model totalanvi: 60 genes, 20 proteins, 6 classes, 20 latent dimensions") and "\n" not in text
    )
    assert "proteins" not in repr(av.get.model(fitted, "scvi")) and "classes" not in repr(av.get.model(fitted, "scvi"))


def test_fitted_models_are_found_where_they_are(fitted):
    found = stored_fits(fitted)
    assert sorted(found) == sorted(MODELS)
    for key in MODELS:
        assert found[key].home is home(fitted, key)
    assert sorted(stored_fits(fitted["rna"])) == ["scanvi", "scvi"]
    fitted.uns["other"] = {"model": "a string"}
    fitted.uns["another"] = {"model": {"x": 1}}
    assert sorted(stored_fits(fitted)) == sorted(MODELS)


class TestResolve:
    def test_the_only_one(self):
        mdata = cite()
        av.tl.scvi(mdata, max_epochs=1, key_added="mine")
        model, key = find_model(mdata, None)
        assert (model.name, key) == ("scvi", "mine")

    def test_several(self, fitted):
        with pytest.raises(
            ValueError, match=r"several fitted models: 'totalvi', 'totalanvi', 'scvi', 'scanvi'.*model="
        ):
            find_model(fitted, None)

    def test_none(self):
        with pytest.raises(KeyError, match="no fitted model in this object; run av.tl.totalanvi"):
            find_model(cite(), None)

    def test_unknown(self, fitted):
        with pytest.raises(
            KeyError, match=r"model='totalanvy' is no fitted model of this object and no folder; there are: 'totalvi'"
        ):
            find_model(fitted, "totalanvy")

    def test_model_object_needs_no_fit_in_the_data(self, fitted):
        model = av.get.model(fitted, "totalanvi")
        assert find_model(cite(), model) == (model, "totalanvi")

    def test_no_data(self):
        with pytest.raises(TypeError, match="Expected a MuData or an AnnData, got str"):
            find_model("file.h5mu", None)


def config(slot, *without, **changes):
    stored = json.loads(slot["config"]) | changes
    return json.dumps({name: value for name, value in stored.items() if name not in without})


DAMAGES = {
    "no weights": lambda slot: slot.pop("weights"),
    "no config": lambda slot: slot.pop("config"),
    "half the weights": lambda slot: slot.update(weights=slot["weights"][: len(slot["weights"]) // 2]),
    "no bytes": lambda slot: slot.update(weights=slot["weights"][:0]),
    "other bytes": lambda slot: slot.update(weights=np.zeros(100, dtype=np.uint8)),
    "weights of another type": lambda slot: slot.update(weights=None),
    "half the config": lambda slot: slot.update(config=slot["config"][:100]),
    "a list for a config": lambda slot: slot.update(config="[1, 2]"),
    "no setup": lambda slot: slot.update(config=config(slot, "setup")),
    "a broken setup": lambda slot: slot.update(config=config(slot, setup={"proteins": []})),
    "a broken network": lambda slot: slot.update(config=config(slot, config={"n_hidden": 3})),
    "no facts": lambda slot: slot.update(config=json.dumps({"schema": 1})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged(fitted, damage):
    model = av.get.model(fitted, "totalanvi")
    slot = dict(fitted.uns["totalanvi"]["model"])
    damage(slot)
    with pytest.raises(ValueError, match="stored model is damaged.*Fit again|file is incomplete"):
        Model.from_slot(slot, model.history)


def test_weights_of_another_network(fitted):
    slot = dict(fitted.uns["totalanvi"]["model"]) | {"weights": fitted["rna"].uns["scvi"]["model"]["weights"]}
    slot = resealed(slot)
    with pytest.raises(ValueError, match="stored weights do not fit the stored configuration"):
        Model.from_slot(slot, pd.DataFrame())


@pytest.mark.parametrize("where", ["schema", "setup", "config"])
def test_stored_by_a_newer_version(fitted, where):
    slot = dict(fitted.uns["totalanvi"]["model"])
    stored = json.loads(slot["config"])
    changes = {"schema": SCHEMA + 1} if where == "schema" else {where: stored[where] | {"new_option": 1}}
    slot["config"] = config(slot, **changes)
    slot = slot if where == "schema" else resealed(slot)
    with pytest.raises(ValueError, match="newer anvi"):
        Model.from_slot(slot, pd.DataFrame())


def test_no_history_is_no_reason_to_fail(fitted):
    del fitted.uns["totalanvi"]["history"]
    assert len(av.get.model(fitted, "totalanvi").history) == 0
    av.tl.predict(fitted, model="totalanvi")


# what becomes of it in the hands of others ------------------------------------------------------------------------


def answers(mdata, key="totalanvi", model=None):
    """What a model says of all cells, from what lies in the object."""
    proba = av.tl.predict(mdata, model=model or key, inplace=False)
    return proba, av.tl.latent(mdata, model=model or key, inplace=False)


def assert_same_answers(one, other):
    pd.testing.assert_frame_equal(one[0], other[0], check_exact=True)
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("key", ["scanvi", "totalanvi"])
@pytest.mark.parametrize("change", ["copy", "update", "concatenated uns"])
def test_answers_survive(fitted, key, change):
    before = answers(fitted, key)
    if change == "copy":
        fitted = fitted.copy()
    elif change == "update":
        with quiet_mudata():
            fitted.update()
    else:
        fitted.uns["mine"] = {"model": 1}
    assert_same_answers(answers(fitted, key), before)


@pytest.mark.parametrize("key", ["scanvi", "totalanvi"])
def test_answers_of_a_subset_are_those_of_the_whole(fitted, key):
    proba, latent = answers(fitted, key)
    chosen = fitted.obs_names[::3]
    subset = fitted[chosen].copy()
    found = answers(subset, key)
    np.testing.assert_allclose(found[0], proba.loc[chosen], atol=1e-6)
    np.testing.assert_allclose(found[1], latent[::3], atol=1e-5)
    assert list(found[0].index) == list(subset.obs_names)


def test_answers_do_not_depend_on_the_order_of_cells(fitted):
    proba, latent = answers(fitted)
    order = np.random.default_rng(0).permutation(300)
    found = answers(fitted[order].copy())
    pd.testing.assert_frame_equal(found[0], proba.iloc[order], check_exact=True)
    np.testing.assert_array_equal(found[1], latent[order])


def test_answers_say_what_the_fit_wrote(fitted):
    proba, latent = answers(fitted)
    np.testing.assert_array_equal(proba, fitted.obsm["totalanvi_proba"])
    np.testing.assert_array_equal(latent, fitted.obsm["X_totalanvi"])


def test_sizes_that_do_not_fit_the_weights_take_no_memory():
    """A stranger's file could ask for more memory than there is; its weights cannot."""
    mdata = av.datasets.synthetic_cite(60, n_genes=30)
    av.tl.scvi(mdata, max_epochs=1)
    model = av.get.model(mdata)
    facts = model.facts()
    facts["config"] = facts["config"] | {"n_hidden": 10**9}  # a layer of four exabytes
    with pytest.raises(ValueError, match="n_hidden=1000000000 must be at most 100,000"):
        type(model).from_parts(facts, model.weights(), model.history)
    facts["config"] = facts["config"] | {"n_hidden": 100_000, "n_layers_encoder": 100}  # some terabytes
    with pytest.raises(ValueError, match="do not fit the stored configuration"):
        type(model).from_parts(facts, model.weights(), model.history)
