"""Which model an argument means, and that no verb buries another's results."""

import mudata
import numpy as np
import pandas as pd
import pytest
from helpers import cite, mudata_of

import anvi as av


def test_a_model_taken_out_writes_under_its_own_key(fitted):
    av.tl.totalvi(fitted, max_epochs=1, key_added="mine")
    before = fitted.obsm["X_totalvi"].copy()
    av.tl.latent(fitted, model=av.get.model(fitted, "mine"))
    np.testing.assert_array_equal(fitted.obsm["X_totalvi"], before)


def test_a_foreign_model_does_not_write_over_the_objects_own_fit(fitted):
    other = cite(random_state=1)
    av.tl.totalanvi(other, batch_key="batch", max_epochs=1)
    model = av.get.model(other)
    with pytest.raises(ValueError, match="a fit of its own under 'totalanvi'; pass key_added="):
        av.tl.predict(fitted, model=model)
    av.tl.predict(fitted, model=model, key_added="other")
    assert "other_prediction" in fitted.obs


def test_a_key_that_holds_something_else_is_refused(no_training):
    mdata = cite()
    mdata.uns["pca"] = {"params": 1}
    with pytest.raises(ValueError, match=r"uns\['pca'\] holds something that is no model"):
        av.tl.totalvi(mdata, key_added="pca")


QUERIES = {
    "latent": {},
    "predict": {},
    "denoise": {"modality": "rna"},
    "foreground": {},
    "feature_correlation": {"n_samples": 1, "n_cells": 20},
    "attributions": {"n_cells": 2, "n_steps": 2},
}


@pytest.mark.parametrize("verb", QUERIES)
def test_key_added_is_no_way_into_the_slots_of_another_fit(fitted, verb):
    before = fitted.obsm["X_totalvi"].copy()
    with pytest.raises(ValueError, match="under 'totalvi'.*another key_added="):
        getattr(av.tl, verb)(fitted, model="totalanvi", key_added="totalvi", **QUERIES[verb])
    np.testing.assert_array_equal(fitted.obsm["X_totalvi"], before)
    av.tl.latent(fitted, model="totalanvi", key_added="totalanvi")  # its own are its own


@pytest.mark.parametrize("theirs", ["a note", pd.DataFrame({"a": [1]}), {"params": {"n_neighbors": 15}}])
@pytest.mark.parametrize("verb", QUERIES)
def test_a_query_leaves_what_is_no_result_of_anvi_alone(fitted, verb, theirs):
    fitted.uns["mine"] = theirs
    slots = set(fitted.obsm), set(fitted.varp), set(fitted["rna"].layers)
    with pytest.raises(
        ValueError, match=r"uns\['mine'\] holds something that is no result of anvi.*another key_added="
    ):
        getattr(av.tl, verb)(fitted, model="totalanvi", key_added="mine", **QUERIES[verb])
    assert (set(fitted.obsm), set(fitted.varp), set(fitted["rna"].layers)) == slots
    assert type(fitted.uns["mine"]) is type(theirs) and len(fitted.uns["mine"]) == len(theirs)


def test_what_is_left_of_a_fit_without_its_model_may_be_written_to(fitted):
    model = av.get.model(fitted, "totalanvi")
    del fitted.uns["totalanvi"]["model"]
    av.tl.denoise(fitted, model=model, modality="prot")
    av.tl.denoise(fitted, model=model, modality="rna", key_added="totalanvi")
    assert set(fitted.uns["totalanvi"]["denoise"]) == {"rna", "prot"}


def test_a_key_of_a_model_elsewhere_in_the_object_is_refused(fitted, no_training):
    with pytest.raises(ValueError, match="another model under the key 'scvi'"):
        av.tl.totalvi(fitted, key_added="scvi")


def test_a_refit_leaves_nothing_stale():
    mdata = cite()
    mdata.uns["cell_type_colors"] = ["#000000"] * len(mdata.obs["cell_type"].cat.categories)
    av.tl.scanvi(mdata, max_epochs=1, key_added="m")
    assert "m_prediction" in mdata["rna"].obs and "rna:m_prediction" in mdata.obs
    av.tl.scvi(mdata, max_epochs=1, key_added="m")
    left = [
        name
        for name in (*mdata["rna"].obs, *mdata.obs, *mdata["rna"].obsm, *mdata["rna"].uns)
        if "m_p" in name or "m_label" in name
    ]
    assert left == []


@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_a_column_of_the_users_own_is_no_slot_for_labels(fitted, no_training, name):
    """Its name may well be that of the labels themselves."""
    model, mdata = av.get.model(fitted, name), cite()
    part = mdata["rna"] if name == "scanvi" else mdata
    part.obs[f"{name}_label"] = given = mdata.obs["cell_type"].astype(str)
    for labels_key in ("cell_type", f"{name}_label"):
        with pytest.raises(ValueError, match=rf"obs\['{name}_label'\] would be overwritten.*pass another key_added="):
            getattr(av.tl, name)(mdata, labels_key, batch_key="batch")
    with pytest.raises(ValueError, match="pass another key_added="):
        av.tl.predict(mdata, model=model)
    with pytest.raises(ValueError, match="pass another key_added="):
        av.tl.map_query(mdata, model)
    av.tl.predict(mdata, model=model, key_added="mine")
    assert part.obs[f"{name}_label"].equals(given) and "mine_label" in part.obs


def test_a_fit_without_labels_leaves_such_a_column():
    mdata = cite()
    mdata["rna"].obs["scvi_label"] = given = mdata.obs["cell_type"].astype(str)
    av.tl.scvi(mdata, max_epochs=1)
    assert mdata["rna"].obs["scvi_label"].equals(given)


def test_hard_predictions_take_old_probabilities_away(fitted):
    av.tl.predict(fitted, model="totalanvi", soft=False)
    assert "totalanvi_proba" not in fitted.obsm
    with pytest.raises(KeyError, match="run av.tl.predict"):
        av.get.proba(fitted, model="totalanvi")


def test_proteins_under_another_name_are_not_ignored(fitted):
    model = av.get.model(fitted, "totalanvi")
    query = mudata_of({"rna": fitted["rna"].copy(), "adt": fitted["prot"].copy()}, like=fitted)
    with pytest.raises(ValueError, match=r"seem to be in mdata\['adt'\]: pass prot_mod="):
        av.tl.predict(query, model=model)
    ours = av.tl.predict(fitted, model=model, inplace=False)
    np.testing.assert_array_equal(av.tl.predict(query, model=model, prot_mod="adt", inplace=False), ours)
    renamed = mudata_of({"rna": fitted["rna"].copy(), "prot": fitted["prot"].copy()}, like=fitted)
    renamed["prot"].var_names = [f"{name}_TotalSeqB" for name in renamed["prot"].var_names]
    np.testing.assert_array_equal(av.tl.predict(renamed, model=model, inplace=False), ours)  # only an affix
    renamed["prot"].var_names = [f"strange {i}" for i in range(20)]
    with pytest.raises(ValueError, match="None of the model's 20 proteins"):
        av.tl.predict(renamed, model=model)
    rna_only = mudata_of({"rna": fitted["rna"].copy()}, like=fitted)
    assert isinstance(rna_only, mudata.MuData)
    av.tl.predict(rna_only, model=model)


def test_random_state_of_a_sample(fitted):
    rng = np.random.default_rng(0)
    mean = av.tl.predict(fitted, model="totalanvi", inplace=False)
    for state in (rng, None, 3):
        one = av.tl.predict(fitted, model="totalanvi", use_posterior_mean=False, random_state=state, inplace=False)
        assert not np.allclose(one, mean)
    assert av.tl.latent(fitted, model="totalanvi", n_samples=2, random_state=None).shape == (2, 300, 20)
