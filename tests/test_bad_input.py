"""What a user can get wrong, and what is said about it: before training, with the slot, the cells and the next step."""

import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from helpers import cite, dense, mudata_of
from mudata import MuData
from scipy import sparse

import anvi as av

pytestmark = pytest.mark.usefixtures("no_training")

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")


@pytest.fixture
def mdata():
    return cite()


def fit(data, name="totalanvi", **options):
    getattr(av.tl, name)(data, **options)


# labels -----------------------------------------------------------------------------------------------------------


def test_no_label_column(mdata):
    with pytest.raises(KeyError) as caught:
        fit(mdata, labels_key="celltype")
    message = str(caught.value)
    assert "labels_key='celltype' was found in none of mdata.obs, mdata['rna'].obs, mdata['prot'].obs" in message
    assert "Did you mean 'cell_type'" in message
    assert "Categorical columns there: 'batch', 'panel', 'cell_type', 'true_cell_type'" in message


def test_default_label_column_is_not_there(mdata):
    del mdata.obs["cell_type"]
    with pytest.raises(KeyError, match=r"labels_key='cell_type' was found in none of .*'true_cell_type'"):
        fit(mdata)


@pytest.mark.parametrize("mark", ["Unknown", "", None, np.nan])
def test_no_labelled_cell(mdata, mark):
    mdata.obs["cell_type"] = pd.Series([mark] * 300, mdata.obs_names, dtype=object)
    with pytest.raises(
        ValueError, match=r"no labelled cell: every value is missing, '' or 'Unknown'.*tl\.totalvi or tl\.scvi"
    ):
        fit(mdata)


def test_a_single_label(mdata):
    mdata.obs["cell_type"] = ["B"] * 200 + ["Unknown"] * 100
    with pytest.raises(
        ValueError, match=r"a single label, 'B': there is nothing to tell apart.*tl\.totalvi or tl\.scvi"
    ):
        fit(mdata)


# counts -----------------------------------------------------------------------------------------------------------


def spoil(mdata, mod, value):
    counts = dense(mdata[mod].X).copy()
    counts[3, 5] = value
    mdata[mod].X = sparse.csr_matrix(counts) if mod == "rna" else counts


@pytest.mark.parametrize(
    ("value", "kind"), [(-2, "negative"), (np.nan, "NaN"), (np.inf, "infinite"), (0.5, "non-integer")]
)
@pytest.mark.parametrize("name", MODELS)
def test_rna_that_is_no_count(mdata, name, value, kind):
    spoil(mdata, "rna", value)
    with pytest.raises(ValueError, match=rf"mdata\['rna'\]\.X holds {kind} values .*cell 'cell_00004', feature 'G006'"):
        fit(mdata, name)


@pytest.mark.parametrize(("value", "kind"), [(-2, "negative"), (np.inf, "infinite"), (0.5, "non-integer")])
@pytest.mark.parametrize("name", ["totalvi", "totalanvi"])
def test_proteins_that_are_no_counts(mdata, name, value, kind):
    spoil(mdata, "prot", value)
    cell = mdata["prot"].obs_names[3]
    with pytest.raises(ValueError, match=rf"mdata\['prot'\]\.X holds {kind} values .*cell '{cell}', feature 'P06'"):
        fit(mdata, name)


@pytest.mark.parametrize("mod", ["rna", "prot"])
def test_the_layer_with_counts_is_suggested(mdata, mod):
    mdata[mod].layers["my_counts"] = mdata[mod].X.copy()
    mdata[mod].X = np.log1p(mdata[mod].X)
    with pytest.raises(
        ValueError, match=rf"mdata\['{mod}'\]\.X holds non-integer.*pass layer={{'{mod}': 'my_counts'}}\. "
    ):
        fit(mdata)
    with pytest.raises(pytest.fail.Exception, match="training was reached"):
        fit(mdata, layer={mod: "my_counts"})


def test_the_layer_with_counts_of_an_anndata(mdata):
    adata = mdata["rna"].copy()
    adata.layers["my_counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    with pytest.raises(ValueError, match=r"data\.X holds non-integer.*pass layer='my_counts'\. "):
        fit(adata, "scvi")


def test_empty_cells(mdata):
    counts = dense(mdata["rna"].X).copy()
    counts[[4, 9]] = 0
    mdata["rna"].X = sparse.csr_matrix(counts)
    told = r"2 cells without a single count \('cell_00005', 'cell_00010'\).*~mdata.obs_names.isin\(\['cell_00005', '"
    with pytest.raises(ValueError, match=told):
        fit(mdata)


def test_no_values_at_all(mdata):
    mdata["rna"].layers["raw"] = mdata["rna"].X
    mdata["rna"].X = None
    with pytest.raises(ValueError, match=r"mdata\['rna'\]\.X is empty; pass layer=\.\.\. \(.*'raw'"):
        fit(mdata)


def test_no_layer_of_that_name(mdata):
    mdata["rna"].layers["counts"] = mdata["rna"].X.copy()
    with pytest.raises(KeyError, match=r"layer='count' is not in mdata\['rna'\]\.layers; there are: .*'counts'"):
        fit(mdata, layer={"rna": "count"})
    with pytest.raises(KeyError, match=r"layer='counts' is not in mdata\['prot'\]\.layers; there are: none"):
        fit(mdata, layer="counts")
    with pytest.raises(KeyError, match=r"layer= names 'rma', which is no modality; there are: 'rna', 'prot'"):
        fit(mdata, layer={"rma": "counts"})


# names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mod", ["rna", "prot"])
@pytest.mark.parametrize("axis", ["obs", "var"])
def test_repeated_names(mdata, mod, axis):
    parts = {name: mdata[name].copy() for name in ("rna", "prot")}
    names = list(getattr(parts[mod], f"{axis}_names"))
    names[1] = names[0]
    setattr(parts[mod], f"{axis}_names", names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata and mudata say so, too
        mdata = MuData(parts)
        mdata.obs["cell_type"] = [["B", "T"][i % 2] for i in range(mdata.n_obs)]
    with pytest.raises(ValueError, match=rf"mdata\['{mod}'\]\.{axis}_names has 1 repeated .* names \('{names[0]}'\)"):
        fit(mdata)


def test_repeated_names_in_anndata(mdata):
    adata = mdata["rna"].copy()
    names = list(adata.obs_names)
    names[1] = names[0]
    with pytest.warns(UserWarning, match="not unique"):
        adata.obs_names = names
        adata.obs["x"] = 1
        adata = adata.copy()
    with pytest.raises(
        ValueError, match=r"data\.obs_names has 1 repeated cell names.*run data\.obs_names_make_unique\(\)"
    ):
        fit(adata, "scvi")
    adata = mdata["rna"].copy()
    table = av.get.table(mdata, "true_protein_counts").copy()
    table.columns = ["P"] * 20
    adata.obsm["protein"] = table
    with pytest.raises(ValueError, match=r"adata\.obsm\['protein'\] has 1 repeated protein names \('P'\)\. .* rename"):
        fit(adata, "totalvi", prot_obsm="protein")


def test_a_gene_and_a_protein_of_the_same_name_are_fine(mdata):
    prot = mdata["prot"].copy()
    prot.var_names = ["G001", *prot.var_names[1:]]
    mdata = mudata_of({"rna": mdata["rna"], "prot": prot}, mdata)
    with pytest.raises(pytest.fail.Exception, match="training was reached"):
        fit(mdata)


# cells ------------------------------------------------------------------------------------------------------------


def test_cells_with_neither_rna_nor_proteins(mdata):
    mdata = mudata_of({"rna": mdata["rna"][10:].copy(), "prot": mdata["prot"].copy()}, mdata)
    alone = mdata["prot"].obs_names.difference(mdata["rna"].obs_names)
    assert len(alone) > 1
    x = mdata["prot"].X.astype(np.float32)
    x[mdata["prot"].obs_names.get_loc(alone[1])] = np.nan
    mdata["prot"].X = x
    with pytest.raises(ValueError, match=rf"1 cells have neither RNA nor .* \(first: '{alone[1]}'\)\. Leave") as error:
        fit(mdata)
    exec(str(error.value).partition("RNA: ")[2])  # as it is advised
    assert mdata["prot"].obs_names.isin(mdata["rna"].obs_names).all()
    with pytest.raises(pytest.fail.Exception, match="training was reached"):
        fit(mdata)


def test_too_few_cells(mdata):
    one, none = mdata[:1].copy(), mdata[:0].copy()
    for name in ("scvi", "totalvi"):
        stained = mdata[mdata["prot"].obs_names[:1]].copy() if name == "totalvi" else one
        with pytest.raises(ValueError, match="1 cells leave 1 to train on; at least two are needed"):
            fit(stained, name)
        with pytest.raises(ValueError, match=r"mdata\['rna'\] has no cells"):
            fit(none, name)
    with pytest.raises(ValueError, match="has a single label|has no labelled cell"):
        fit(mdata[mdata.obs_names[:1]].copy(), labels_key="true_cell_type")


def test_no_genes(mdata):
    with pytest.raises(ValueError, match="data has no genes"):
        fit(mdata["rna"][:, :0].copy(), "scvi")


def test_train_size_that_leaves_too_little(mdata):
    with pytest.raises(ValueError, match="300 cells leave 1 to train on"):
        fit(mdata, "scvi", train_size=1e-9)


# columns ----------------------------------------------------------------------------------------------------------


def test_copies_that_disagree(mdata):
    mdata["rna"].obs["batch"] = mdata.obs["batch"].cat.rename_categories({"batch_0": "x"})
    message = r"batch_key='batch' has two copies that disagree in 100 cells: .* in mdata\.obs and .* in mdata\['rna'\]"
    with pytest.raises(ValueError, match=message):
        fit(mdata, batch_key="batch")
    mdata["prot"].obs["cell_type"] = "B"
    with pytest.raises(ValueError, match=r"labels_key='cell_type' has two copies that disagree"):
        fit(mdata)


@pytest.mark.parametrize("key", ["batch_key", "panel_key", "size_factor_key", "categorical_covariate_keys"])
def test_no_column_of_that_name(mdata, key):
    value = ["bach"] if key.endswith("keys") else "bach"
    with pytest.raises(KeyError, match=rf"{key}='bach' was found in none of mdata.obs.*Did you mean 'batch'"):
        fit(mdata, **{key: value})


def test_batch_that_is_missing_for_some_cells(mdata):
    mdata.obs["batch"] = mdata.obs["batch"].cat.remove_categories(["batch_1"])
    with pytest.raises(ValueError, match=r"batch_key: 'batch' has no value for 100 cells \(first: .*fill them in"):
        fit(mdata, batch_key="batch")


def test_panel_that_is_missing_for_stained_cells(mdata):
    mdata.obs["panel"] = mdata.obs["panel"].cat.remove_categories(["panel_1"])
    with pytest.raises(ValueError, match=r"panel_key='panel' is missing for 100 cells that have proteins"):
        fit(mdata, panel_key="panel")


@pytest.mark.parametrize("key", ["categorical_covariate_keys", "continuous_covariate_keys"])
def test_a_name_in_place_of_a_list(mdata, key):
    with pytest.raises(TypeError, match=rf"{key} takes a list of names, e\.g\. {key}=\['batch'\]"):
        fit(mdata, **{key: "batch"})


# the object -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, np.ones((3, 3)), pd.DataFrame({"a": [1]})], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("name", [*MODELS, "predict", "latent"])
def test_neither_mudata_nor_anndata(data, name):
    with pytest.raises(TypeError, match=f"Expected a MuData or an AnnData, got {type(data).__name__}"):
        getattr(av.tl, name)(data)


@pytest.mark.parametrize("name", [*MODELS, "predict", "latent"])
def test_no_such_file(name):
    with pytest.raises(FileNotFoundError, match=r"There is no \.h5mu or \.h5ad or \.zarr file cite\.h5mu"):
        getattr(av.tl, name)("cite.h5mu")


def test_no_such_modality(mdata):
    for name, mod, argument in (
        ("scvi", "rna", "rna_mod"),
        ("totalvi", "prot", "prot_mod"),
        ("totalanvi", "rna", "rna_mod"),
    ):
        mods = {"gex" if key == mod else key: mdata[key] for key in ("rna", "prot")}
        with pytest.raises(KeyError, match=rf"no modality '{mod}'; it has .*'gex'.*{argument}=\.\.\."):
            fit(mudata_of(mods, mdata), name)


def test_proteins_of_an_anndata_must_be_named(mdata):
    adata = mdata["rna"].copy()
    adata.obs = mdata.obs.copy()
    adata.obsm["X_pca"] = np.ones((300, 2))
    for name in ("totalvi", "totalanvi"):
        with pytest.raises(ValueError, match=r"An AnnData needs prot_obsm=\.\.\..*In obsm there are: X_pca"):
            fit(adata, name)
        with pytest.raises(KeyError, match=r"prot_obsm='adt' is not in adata\.obsm; there are: X_pca"):
            fit(adata, name, prot_obsm="adt")


def test_nothing_measured(mdata):
    with pytest.raises(ValueError, match=r"No protein was measured in any cell .*use tl\.scvi or tl\.scanvi"):
        fit(mdata[mdata.obs["batch"] == "batch_2"].copy(), "totalvi")


# options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_unknown_option(mdata, name):
    with pytest.raises(TypeError, match=r"There is no option 'n_hiden'\. Did you mean 'n_hidden'"):
        fit(mdata, name, n_hiden=3)
    with pytest.raises(TypeError, match="There is no option 'zzz'"):
        fit(mdata, name, zzz=3)
    with pytest.raises(TypeError, match="There is no option 'panel'"):
        fit(mdata, name, panel=None)  # unknown is unknown, whatever its value
    with pytest.raises(TypeError, match="Did you mean 'unlabeled_category'"):  # not 'labelled_batch_size'
        fit(mdata, "totalanvi", unlabelled_category="Unknown")


def test_an_argument_of_another_fit_says_of_which(mdata):
    with pytest.raises(
        TypeError, match=r"tl\.totalvi has no option 'labels_key': .* labels \(tl\.scanvi, tl\.totalanvi"
    ):
        fit(mdata, "totalvi", labels_key="cell_type")
    with pytest.raises(
        TypeError, match=r"tl\.scvi has no option 'panel_key': .* proteins \(tl\.totalvi, tl\.totalanvi"
    ):
        fit(mdata, "scvi", panel_key="panel")


@pytest.mark.parametrize("size", ["n_genes", "n_labels", "n_batches", "n_panels", "n_categories"])
def test_sizes_are_no_options(mdata, size):
    with pytest.raises(TypeError, match=f"There is no option '{size}'"):
        fit(mdata, **{size: 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is not a torch device"),
        ({"key_added": "a/b"}, "key_added='a/b' must be a plain name without '/'"),
        ({"key_added": "rna:a"}, "key_added='rna:a' must be a plain name"),
        ({"train_size": 0}, "train_size=0 must be above 0 and at most 1"),
        ({"train_size": 1.5}, "train_size=1.5 must be above 0 and at most 1"),
        ({"train_size": 1.0}, "train_size=1 leaves no validation cells"),
        ({"max_epochs": 0}, "max_epochs=0 must be at least 1"),
        ({"batch_size": 1}, "batch_size=1 leaves batch norm nothing"),
        ({"lr": -1.0}, "lr=-1.0 must be above 0"),
        ({"missing": "zeros"}, "missing='zeros' is not one of 'auto', 'nan'"),
        ({"train": "nets"}, "train='nets' is not one of 'all', 'label_nets'"),
        ({"train": "label_nets"}, "train='label_nets' needs init="),
        ({"gene_likelihood": "gaussian"}, "gene_likelihood='gaussian' is not one of 'nb', 'zinb'"),
        ({"label_prior": "flat"}, "label_prior='flat' is not one of 'uniform'"),
        ({"n_latent": 0}, "n_latent=0 must be at least 1"),
        ({"n_latent": 2.5}, "n_latent=2.5 must be a whole number"),
        ({"dropout_encoder": 1.0}, "dropout_encoder=1.0 must be at least 0 and below 1"),
        ({"latent_distribution": "ln"}, "not built: latent_distribution='ln' with labels"),
        ({"gene_likelihood": "normal"}, "not built: gene_likelihood='normal' outside scvi"),
        ({"deeply_inject_covariates": False}, "not built: deeply_inject_covariates=False with proteins"),
    ],
    ids=str,
)
def test_option_out_of_range(mdata, options, message):
    with pytest.raises(ValueError, match=message):
        fit(mdata, **options)


def test_cuda_where_there_is_none(mdata, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda' was asked for, but torch sees no CUDA device here"):
        fit(mdata, device="cuda")
    with av.settings.override(device="cuda"), pytest.raises(ValueError, match="use device='cpu'"):
        fit(mdata)


def test_a_second_positional_argument_that_is_no_key(mdata):
    with pytest.raises(TypeError, match="positional argument"):
        av.tl.totalvi(mdata, "batch")


# questions to a model ---------------------------------------------------------------------------------------------


def test_query_lacks_genes(fitted):
    query = fitted[:, fitted.var_names[5:]].copy()
    for name in ("predict", "latent"):
        with pytest.raises(
            ValueError, match=r"mdata\['rna'\] lacks 5 of the model's 60 genes \(G001, G002, G003, \.\.\.\)"
        ):
            getattr(av.tl, name)(query, model="totalanvi")


def test_query_has_genes_in_another_order_and_more(fitted):
    order = np.random.default_rng(0).permutation(60)
    rna = fitted["rna"][:, order].copy()
    query = mudata_of({"rna": rna, "prot": fitted["prot"]}, fitted)
    expected = av.get.table(fitted, "totalanvi_proba")
    model = av.get.model(fitted, "totalanvi")
    pd.testing.assert_frame_equal(av.tl.predict(query, model=model, inplace=False), expected, check_exact=True)


def test_query_of_an_unknown_batch(fitted):
    fitted.obs["batch"] = fitted.obs["batch"].cat.rename_categories({"batch_2": "new"})
    with pytest.raises(
        ValueError, match=r"batch_key: 'batch' holds 'new', which the model has not seen; it knows 'batch_0'"
    ):
        av.tl.predict(fitted, model="totalanvi")


def test_query_without_the_batch_column(fitted):
    del fitted.obs["batch"]
    with pytest.raises(KeyError, match="batch_key='batch' was found in none of"):
        av.tl.predict(fitted, model="totalanvi")


def test_query_that_is_no_count(fitted):
    fitted["rna"].X = np.log1p(fitted["rna"].X)
    with pytest.raises(ValueError, match=r"mdata\['rna'\]\.X holds non-integer values"):
        av.tl.predict(fitted, model="totalanvi")


def test_query_with_repeated_cells(fitted):
    model = av.get.model(fitted, "scanvi")
    adata = fitted["rna"].copy()
    adata.obs["batch"] = fitted.obs["batch"]
    with pytest.warns(UserWarning, match="not unique"):
        adata.obs_names = ["a"] * 300
        adata.obs["x"] = 1
        adata = adata.copy()
    with pytest.raises(ValueError, match=r"obs_names has 1 repeated cell names \('a'\)"):
        av.tl.predict(adata, model=model)


def test_no_labels_to_predict(fitted):
    for name in ("scvi", "totalvi"):
        with pytest.raises(
            ValueError, match=rf"The model '{name}' \({name}\) has no labels; fit tl\.scanvi or tl\.totalanvi"
        ):
            av.tl.predict(fitted, model=name)


def test_several_models(fitted):
    for verb in (av.tl.predict, av.tl.latent, av.get.proba, av.get.history):
        with pytest.raises(ValueError, match=r"There are several fitted models: .*'totalanvi'.*Name one: model=\.\.\."):
            verb(fitted)


def test_no_model(mdata):
    for verb in (av.tl.predict, av.tl.latent, av.get.proba, av.get.history):
        with pytest.raises(
            KeyError, match=r"There is no fitted model in this object; run av\.tl\.totalanvi\(mdata\) first"
        ):
            verb(mdata)
        with pytest.raises(KeyError, match="model='totalanvi' is no fitted model of this object.* there are: none"):
            verb(mdata, model="totalanvi")


def test_bad_key_of_an_answer(fitted):
    for verb in (av.tl.predict, av.tl.latent):
        with pytest.raises(ValueError, match="key_added='a/b' must be a plain name"):
            verb(fitted, model="totalanvi", key_added="a/b")


def test_damaged_model(fitted):
    stored = fitted.uns["totalanvi"]["model"]
    stored["weights"] = stored["weights"][:-10]
    with pytest.raises(ValueError, match="The stored model is damaged .*Fit again"):
        av.tl.predict(fitted, model="totalanvi")
    stored["config"] = stored["config"][:-10]
    with pytest.raises(ValueError, match="The stored model is damaged .*Fit again"):
        av.get.model(fitted, "totalanvi")


def test_model_of_a_newer_version(fitted):
    stored = fitted.uns["totalanvi"]["model"]
    stored["config"] = json.dumps(json.loads(stored["config"]) | {"schema": 99})
    with pytest.raises(ValueError, match=r"stored by a newer anvi \(schema 99, this one reads up to 5\)"):
        av.tl.latent(fitted, model="totalanvi")


# what is fine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
def test_two_cells_reach_training(mdata, n):
    few = mdata[mdata["prot"].obs_names[:n]].copy()
    few.obs["cell_type"] = ["A", "B", "B"][:n]
    for name in MODELS:
        with pytest.raises(pytest.fail.Exception, match="training was reached"):
            fit(few, name)


def test_a_label_with_a_single_cell_reaches_training(mdata):
    mdata.obs["cell_type"] = ["A"] + ["B", "C"] * 100 + ["Unknown"] * 99
    with pytest.raises(pytest.fail.Exception, match="training was reached"):
        fit(mdata)


@pytest.mark.parametrize(
    ("name", "option", "models"),
    [
        ("scvi", {"linear_classifier": True}, "labels (tl.scanvi, tl.totalanvi)"),
        ("totalvi", {"labelled_batch_size": 8}, "labels (tl.scanvi, tl.totalanvi)"),
        ("scanvi", {"hide_proteins": 0.5}, "proteins (tl.totalvi, tl.totalanvi)"),
        ("scvi", {"protein_weight": 2.0}, "proteins (tl.totalvi, tl.totalanvi)"),
    ],
)
def test_an_option_of_another_model_is_refused_by_name(name, option, models):
    with pytest.raises(
        TypeError, match=re.escape(f"no option '{next(iter(option))}': it belongs to models with {models}")
    ):
        getattr(av.tl, name)(cite(), max_epochs=1, **option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_likelihood": "normal", "thin_counts": 0.5}, "thin_counts thins counts"),
        ({"objective": "scvi-tools", "max_kl_weight": 0.5}, "as scvi-tools does"),
    ],
    ids=str,
)
def test_training_options_that_mean_nothing_for_the_network(options, message):
    mdata = av.datasets.synthetic_cite(200, n_genes=60)
    with pytest.raises(ValueError, match=message):
        av.tl.scvi(mdata, max_epochs=1, **options)


@pytest.mark.parametrize(
    "ask",
    [
        av.tl.predict,
        av.tl.denoise,
        av.tl.posterior_predictive,
        av.tl.feature_correlation,
        av.metrics.elbo,
        av.metrics.marginal_likelihood,
        av.metrics.criticism,
        lambda data, model: av.tl.map_query(data, model, key_added="mapped"),
    ],
)
def test_nobody_to_ask_about(fitted, ask):
    """As a loop over groups of cells may come to it."""
    model = av.get.model(fitted, "totalanvi")
    none = fitted[:0].copy()
    before = list(none.uns), list(none.obsm)
    with pytest.raises(ValueError, match=r"mdata\['rna'\] has no cells"):
        ask(none, model=model)
    assert (list(none.uns), list(none.obsm)) == before
