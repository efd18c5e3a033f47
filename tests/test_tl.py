import logging

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from helpers import cite, mudata_of, permuted

import anvi as av
from anvi._data.cells import read_cells
from anvi._posterior import encode

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")


def home(mdata, name):
    return mdata if "total" in name else mdata["rna"]


def run(name, data, **options):
    getattr(av.tl, name)(data, **{"batch_key": "batch", "max_epochs": 2} | options)
    return data


def latent_by_name(mdata, name) -> pd.DataFrame:
    return pd.DataFrame(home(mdata, name).obsm[f"X_{name}"], home(mdata, name).obs_names)


# the same data, told in another way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents():
    """What each model makes of the data as they stand."""
    with av.settings.override(progress=False, device="cpu"):
        mdata = cite()
        return {name: latent_by_name(run(name, mdata), name) for name in MODELS}


REORDERED = {
    "rna": lambda m: mudata_of({"rna": permuted(m["rna"], 1), "prot": m["prot"]}, m),
    "prot": lambda m: mudata_of({"rna": m["rna"], "prot": permuted(m["prot"], 2)}, m),
    "both": lambda m: mudata_of({"rna": permuted(m["rna"], 1), "prot": permuted(m["prot"], 2)}, m),
    "mdata": lambda m: m[np.random.default_rng(3).permutation(m.n_obs)].copy(),
    "modalities": lambda m: mudata_of({"prot": m["prot"], "rna": m["rna"]}, m),
}


@pytest.mark.parametrize(("which", "name"), [*((which, "totalanvi") for which in REORDERED), ("both", "scanvi")])
def test_the_order_of_rows_changes_nothing(latents, which, name):
    mdata = REORDERED[which](cite())
    found = latent_by_name(run(name, mdata), name)
    assert which in ("prot", "modalities") or list(found.index) != list(latents[name].index)
    np.testing.assert_array_equal(found.loc[latents[name].index], latents[name])


@pytest.mark.parametrize("place", ["rna", "prot and rna", "rna: explicit"])
def test_where_the_columns_are_changes_nothing(latents, place):
    mdata = cite()
    columns = {name: mdata.obs.pop(name) for name in ("batch", "cell_type")}
    for name, column in columns.items():
        mdata["rna"].obs[name] = column
        if place == "prot and rna":
            mdata["prot"].obs[name] = column.astype(str).reindex(mdata["prot"].obs_names)
    prefix = "rna:" if place == "rna: explicit" else ""
    run("totalanvi", mdata, batch_key=f"{prefix}batch", labels_key=f"{prefix}cell_type")
    np.testing.assert_array_equal(latent_by_name(mdata, "totalanvi"), latents["totalanvi"])


@pytest.mark.parametrize("missing", ["nan", "zero"])
def test_how_missing_proteins_are_told_changes_nothing(latents, missing):
    mdata = run("totalanvi", cite(missing=missing))
    np.testing.assert_array_equal(latent_by_name(mdata, "totalanvi"), latents["totalanvi"])


def test_what_stands_in_place_of_unmeasured_proteins_changes_nothing(latents):
    mdata = cite()
    truth = mdata.uns["truth"]["measured"]
    mdata["prot"].varm["measured"] = pd.DataFrame(
        {"batch_0": truth["panel_0"], "batch_1": truth["panel_1"]}, index=mdata["prot"].var_names
    ).assign(batch_2=True)
    mdata["prot"].X = np.nan_to_num(mdata["prot"].X, nan=12345.0)
    run("totalanvi", mdata)
    np.testing.assert_array_equal(latent_by_name(mdata, "totalanvi"), latents["totalanvi"])


@pytest.mark.parametrize("mark", ["", None, "no idea"])
def test_how_unlabelled_cells_are_marked_changes_nothing(latents, mark):
    mdata = cite()
    labels = mdata.obs["cell_type"].astype(object)
    mdata.obs["cell_type"] = labels.where(labels != "Unknown", mark)
    run("totalanvi", mdata, unlabeled_category="no idea")
    np.testing.assert_array_equal(latent_by_name(mdata, "totalanvi"), latents["totalanvi"])


def test_counts_in_a_layer_change_nothing(latents):
    mdata = cite()
    for mod in ("rna", "prot"):
        mdata[mod].layers["raw"] = mdata[mod].X.copy()
        mdata[mod].X = np.log1p(mdata[mod].X)
    run("totalanvi", mdata, layer="raw")
    np.testing.assert_array_equal(latent_by_name(mdata, "totalanvi"), latents["totalanvi"])
    stored = av.get.model(mdata).setup
    assert (stored.rna_layer, stored.prot_layer) == ("raw", "raw")
    av.tl.predict(mdata)  # finds the layer again


# options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_covariates_and_size_factor(name):
    mdata = cite()
    mdata.obs["donor"] = np.arange(300) % 4
    mdata["rna"].obs["percent"] = np.linspace(0, 1, 300)
    mdata.obs["sf"] = np.linspace(0.5, 2, 300)
    run(
        name,
        mdata,
        categorical_covariate_keys=["donor", "panel"],
        continuous_covariate_keys=["percent"],
        size_factor_key="sf",
    )
    model = av.get.model(mdata)
    assert model.config.n_categories == (4, 3) and model.config.n_continuous == 1
    assert model.config.library == "size_factor" and model.config.covariate_sizes == (3, 4, 3)
    del mdata["rna"].obs["percent"]
    with pytest.raises(KeyError, match="continuous_covariate_keys='percent' was found in none of"):
        av.tl.latent(mdata)


def test_a_covariate_changes_the_answer():
    mdata = cite()
    mdata.obs["donor"] = np.arange(300) % 4
    run("scvi", mdata, categorical_covariate_keys=["donor"])
    before = av.tl.latent(mdata, inplace=False)
    mdata.obs["donor"] = (mdata.obs["donor"] + 1) % 4
    assert np.abs(av.tl.latent(mdata, inplace=False) - before).max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"n_latent": 3, "n_hidden": 16, "n_layers_encoder": 2},
        {"gene_likelihood": "nb", "dispersion": "gene-batch"},
        {"gene_likelihood": "poisson", "linear_classifier": True},
        {"dispersion": "gene-cell", "label_prior": "learned"},
        {"dispersion": "gene-label", "label_prior": "empirical"},
        {"library": "latent", "use_layer_norm": "both", "use_batch_norm": "none"},
        {"objective": "scvi-tools"},
        {"encode_covariates": False},
        {"classification_ratio": 0.0},
        {"labelled_batch_size": 0},
        {"train_size": 1.0, "early_stopping": False},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_options_reach_the_model(name, options):
    mdata = run(name, cite(), max_epochs=1, **options)
    model = av.get.model(mdata)
    for option, value in options.items():
        found = getattr(model.config, option, model.info.get(option))
        assert found == value, option
    assert np.isfinite(home(mdata, name).obsm[f"X_{name}"]).all()


@pytest.mark.parametrize("name", ["scvi", "totalvi"])
def test_logistic_normal_latent_sums_to_one(name):
    mdata = run(name, cite(), latent_distribution="ln")
    latent = home(mdata, name).obsm[f"X_{name}"]
    np.testing.assert_allclose(latent.sum(1), 1, rtol=1e-5)
    assert (latent >= 0).all()


def test_normal_likelihood_takes_what_is_no_count():
    mdata = cite()
    mdata["rna"].X = np.log1p(mdata["rna"].X)
    run("scvi", mdata, gene_likelihood="normal")
    assert not av.get.model(mdata).setup.counts
    av.tl.latent(mdata)


def test_numbers_of_numpy_are_numbers():
    mdata = run(
        "totalanvi",
        cite(),
        max_epochs=np.int64(1),
        n_latent=np.int32(4),
        lr=np.float32(1e-3),
        early_stopping=np.bool_(False),
        random_state=np.int64(3),
    )
    assert av.get.model(mdata).config.n_latent == 4 and av.get.model(mdata).info["random_state"] == 3


def test_random_state():
    def latent(state):
        return run("scvi", cite(), random_state=state)["rna"].obsm["X_scvi"]

    zero = latent(0)
    np.testing.assert_array_equal(latent(0), zero)
    assert (latent(1) != zero).any()
    generator = np.random.default_rng(0)
    one, other = latent(generator), latent(generator)
    assert (one != other).any()  # a generator moves on
    np.testing.assert_array_equal(latent(np.random.default_rng(0)), one)
    assert (latent(None) != latent(None)).any()
    for state in (-1, 0.5, "0"):
        with pytest.raises(TypeError, match="random_state=.*(non-negative int|takes a whole number)"):
            latent(state)


def test_what_was_found_in_the_data_is_said(caplog):
    with caplog.at_level(logging.INFO, "anvi"):
        run("totalanvi", cite(), max_epochs=1)
    text = caplog.text
    for part in (
        "300 cells",
        "60 genes",
        "20 proteins (200 cells have some)",
        "3 batches",
        "6 classes (100 cells labelled)",
    ):
        assert part in text
    assert "few labelled cells of CD14 Mono (8), pDC (2); expect poor recall there" in text


@pytest.mark.parametrize("missing", ["absent", "nan", "zero"])
@pytest.mark.parametrize("n_proteins", [8, 14])
@pytest.mark.parametrize("name", ["totalvi", "totalanvi"])
def test_fit_and_query_with_partial_panels(name, n_proteins, missing):
    mdata = run(name, cite(120, n_proteins=n_proteins, missing=missing), max_epochs=1)
    query = mudata_of({"rna": mdata["rna"], "prot": mdata["prot"][:, 3:].copy()}, mdata)
    latent = av.tl.latent(query, model=av.get.model(mdata), inplace=False)
    assert np.isfinite(latent).all() and (latent != mdata.obsm[f"X_{name}"]).any()


@pytest.mark.parametrize("fraction", [1.0, 0.05])
def test_fully_and_hardly_labelled(fraction):
    mdata = run("totalanvi", cite(rna_only_batch=False, labeled_fraction=fraction), max_epochs=2)
    n_labelled = mdata.uns["totalanvi"]["params"]["n_labelled"]
    assert n_labelled == 300 if fraction == 1 else n_labelled < 30
    assert np.isfinite(mdata.uns["totalanvi"]["history"]).all(axis=None)


def test_every_batch_size_works():
    """The last minibatch would hold a single cell: n % size == 1."""
    for size in (2, 269, 135, 1000):
        run("scanvi", cite(), batch_size=size, max_epochs=1)


# predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_predict_repeats_the_fit(fitted, name):
    part = home(fitted, name)
    before = part.obsm.pop(f"{name}_proba"), part.obs.pop(f"{name}_prediction"), part.obs.pop(f"{name}_confidence")
    assert av.tl.predict(fitted, model=name) is None
    np.testing.assert_array_equal(part.obsm[f"{name}_proba"], before[0])
    pd.testing.assert_series_equal(part.obs[f"{name}_prediction"], before[1])
    pd.testing.assert_series_equal(part.obs[f"{name}_confidence"], before[2], check_exact=True)


@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_predict_leaves_what_the_user_gave(fitted, name):
    """A label that the model has never heard of is one, too; a missing one is where the prediction goes."""
    given = fitted.obs["cell_type"].astype(str)
    given[:3], given[3:6], given[6:9] = "odd", "", None
    fitted.obs["cell_type"] = given
    before = fitted.obs["cell_type"].copy()
    del home(fitted, name).obs[f"{name}_label"]
    av.tl.predict(fitted, model=name)
    pd.testing.assert_series_equal(fitted.obs["cell_type"], before)
    label, prediction = (home(fitted, name).obs[f"{name}_{what}"] for what in ("label", "prediction"))
    assert list(label.cat.categories) == [*prediction.cat.categories, "odd"]
    for cell, said in before.items():
        assert label[cell] == (prediction[cell] if pd.isna(said) or said in ("", "Unknown") else said)


def test_labels_of_an_object_without_labels_are_the_predictions(fitted, caplog):
    model = av.get.model(fitted, "totalanvi")
    bare, torn = cite(), cite()
    del bare.obs["cell_type"]
    torn["rna"].obs["cell_type"] = "B"  # and something else in mdata.obs
    for data in (bare, torn):
        av.tl.predict(data, model=model)
        assert (data.obs["totalanvi_label"] == data.obs["totalanvi_prediction"]).all()
    assert "labels are left out: labels_key='cell_type' has two copies that disagree" in caplog.text


def test_predict_returns(fitted):
    soft = av.tl.predict(fitted, model="totalanvi", inplace=False)
    hard = av.tl.predict(fitted, model="totalanvi", inplace=False, soft=False)
    pd.testing.assert_frame_equal(soft, av.get.table(fitted, "totalanvi_proba"), check_exact=True)
    assert isinstance(hard, pd.Series) and (hard == fitted.obs["totalanvi_prediction"]).all()
    assert list(hard.cat.categories) == list(soft.columns)


def test_predict_under_another_key(fitted):
    before = av.get.table(fitted, "totalanvi_proba").copy()
    av.tl.predict(fitted, model="totalanvi", key_added="X_mine", soft=False)
    assert "mine_prediction" in fitted.obs and "mine_confidence" in fitted.obs and "mine_proba" not in fitted.obsm
    pd.testing.assert_frame_equal(av.get.table(fitted, "totalanvi_proba"), before)


def test_predict_a_sample(fitted):
    def sample(seed):
        return av.tl.predict(fitted, model="totalanvi", inplace=False, use_posterior_mean=False, random_state=seed)

    pd.testing.assert_frame_equal(sample(0), sample(0), check_exact=True)
    mean = av.tl.predict(fitted, model="totalanvi", inplace=False)
    assert (sample(0) != sample(1)).any(axis=None) and (sample(0) != mean).any(axis=None)


def test_labels_are_not_needed_to_predict(fitted):
    expected = av.get.table(fitted, "totalanvi_proba").copy()
    del fitted.obs["cell_type"]
    av.tl.predict(fitted, model="totalanvi")
    pd.testing.assert_frame_equal(av.get.table(fitted, "totalanvi_proba"), expected, check_exact=True)


def test_a_query_of_rna_alone(fitted):
    model = av.get.model(fitted, "totalanvi")
    alone = mudata_of({"rna": fitted["rna"]}, fitted)
    expected = av.tl.predict(alone, model=model, inplace=False)
    assert expected.index.equals(fitted.obs_names)
    without = ~fitted.obs_names.isin(fitted["prot"].obs_names)
    proba = av.get.table(fitted, "totalanvi_proba")
    np.testing.assert_allclose(expected[without], proba[without], atol=1e-6)
    assert np.abs(expected[~without] - proba[~without]).max(axis=None) > 1e-3  # there the proteins did say something
    adata = fitted["rna"].copy()
    adata.obs["batch"] = fitted.obs["batch"]
    np.testing.assert_array_equal(av.tl.predict(adata, model=model, inplace=False), expected)


def test_predict_does_not_change_the_model(fitted):
    before = fitted.uns["totalanvi"]["model"]["weights"].copy()
    av.tl.predict(fitted, model="totalanvi", use_posterior_mean=False)
    np.testing.assert_array_equal(fitted.uns["totalanvi"]["model"]["weights"], before)
    model = av.get.model(fitted, "totalanvi")
    state = {name: value.clone() for name, value in model.network.state_dict().items()}
    av.tl.predict(fitted, model=model)
    assert all(torch.equal(value, model.network.state_dict()[name]) for name, value in state.items())


# latent -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_latent_repeats_the_fit(fitted, name):
    part = home(fitted, name)
    expected = part.obsm.pop(f"X_{name}")
    assert av.tl.latent(fitted, model=name) is None
    np.testing.assert_array_equal(part.obsm[f"X_{name}"], expected)
    returned = av.tl.latent(fitted, model=name, inplace=False)
    np.testing.assert_array_equal(returned, expected)
    assert returned.dtype == np.float32


def test_latent_under_another_key(fitted):
    av.tl.latent(fitted, model="totalvi", key_added="mine")
    np.testing.assert_array_equal(fitted.obsm["X_mine"], fitted.obsm["X_totalvi"])


def test_latent_samples(fitted):
    shuffled = fitted[np.random.default_rng(0).permutation(300)].copy()
    before = list(shuffled.obsm)
    samples = av.tl.latent(shuffled, model="totalvi", n_samples=200)
    assert isinstance(samples, xr.DataArray) and samples.dims == ("sample", "obs", "latent")
    assert samples.shape == (200, 300, 20) and list(shuffled.obsm) == before
    assert samples.coords["obs"].values.tolist() == shuffled.obs_names.tolist()
    model = av.get.model(shuffled, "totalvi")
    _, var = encode.posterior(model, read_cells(shuffled, model.setup))
    scale = pd.DataFrame(np.sqrt(var), sorted(shuffled.obs_names)).loc[shuffled.obs_names]
    error = np.abs(samples.mean("sample") - shuffled.obsm["X_totalvi"]) / scale
    assert float(error.max()) < 5.5 / np.sqrt(200)  # of 6,000 standard normal means
    np.testing.assert_allclose((samples.std("sample") / scale).mean(), 1, atol=0.01)
    again = av.tl.latent(shuffled, model="totalvi", n_samples=200)
    xr.testing.assert_identical(samples, again)
    assert (av.tl.latent(shuffled, model="totalvi", n_samples=200, random_state=1) != samples).any()


def test_number_of_samples(fitted):
    with pytest.raises(ValueError, match="n_samples=0 must be a whole number, at least 1"):
        av.tl.latent(fitted, model="totalvi", n_samples=0)
    with pytest.raises(ValueError, match="n_samples=2.5 must be a whole number"):
        av.tl.latent(fitted, model="totalvi", n_samples=2.5)


def test_answers_do_not_depend_on_the_chunk(fitted, monkeypatch):
    expected = av.tl.latent(fitted, model="totalanvi", inplace=False)
    monkeypatch.setattr(encode, "CHUNK", 37)
    np.testing.assert_allclose(av.tl.latent(fitted, model="totalanvi", inplace=False), expected, atol=1e-5)


def test_several_models_live_side_by_side(fitted):
    before = {name: home(fitted, name).obsm[f"X_{name}"].copy() for name in MODELS}
    run("totalanvi", fitted, key_added="second", random_state=5)
    for name in MODELS:
        np.testing.assert_array_equal(home(fitted, name).obsm[f"X_{name}"], before[name])
        np.testing.assert_array_equal(av.tl.latent(fitted, model=name, inplace=False), before[name])
    assert (fitted.obsm["X_second"] != before["totalanvi"]).any()
