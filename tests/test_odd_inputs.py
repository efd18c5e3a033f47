"""What people hand in: each of these inputs is answered rightly, or refused with words that say what to do."""

import os
import random
import re
import warnings
from functools import partial

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import cite, mudata_of, quiet_mudata
from matplotlib.colors import to_rgb
from scipy import sparse

import anvi as av
from anvi._data.query import match_genes

FIT = {"max_epochs": 1, "n_hidden": 8, "n_latent": 3}


@pytest.fixture(scope="module")
def base():
    """A small data set, and a labelled model of it."""
    mdata = cite(300)
    mdata.obs["day"] = pd.Categorical(np.arange(300) % 2 + 1)
    with av.settings.override(verbosity=0, progress=False, device="cpu", n_threads=1):
        av.tl.totalanvi(mdata, batch_key="day", **FIT)
    return mdata


# what a batch column may look like in a query of a model that knows the days 1 and 2: all are the same ----------------

DAYS = np.arange(300) % 2 + 1
SAME = {
    "ints": DAYS,
    "floats": DAYS.astype(float),
    "float32": DAYS.astype(np.float32),
    "text": DAYS.astype(str),
    "text of floats": DAYS.astype(float).astype(str),
    "text with blanks": np.char.add(DAYS.astype(str), " "),
    "categories of ints": pd.Categorical(DAYS),
    "categories of floats": pd.Categorical(DAYS.astype(float)),
    "categories of text of floats": pd.Categorical(DAYS.astype(float).astype(str)),
    "Int64": pd.array(DAYS, dtype="Int64"),
    "string": pd.array(DAYS.astype(str), dtype="string"),
    "objects of several types": np.array([1, 2.0, "1", "2.0"] * 75, dtype=object),
    "bytes": np.array([b"1", b"2"] * 150, dtype=object),
    "ordered categories, one of them empty": pd.Categorical(DAYS, [3, 2, 1], ordered=True),
}


@pytest.mark.parametrize("values", SAME.values(), ids=SAME)
@pytest.mark.filterwarnings("ignore")
def test_categories_written_differently_are_the_same(base, values):
    query = base.copy()
    query.obs["day"] = values
    av.tl.latent(query, model=av.get.model(base), key_added="z")
    np.testing.assert_array_equal(query.obsm["X_z"], base.obsm["X_totalanvi"])
    if isinstance(values, np.ndarray) and values.dtype == object:
        return  # mudata cannot hold these in a copy
    av.tl.map_query(query, base, key_added="m", max_epochs=0)
    assert list(query.uns["m"]["reference"]["new_batches"]) == []
    np.testing.assert_allclose(query.obsm["X_m"], base.obsm["X_totalanvi"], atol=1e-5)


@pytest.mark.parametrize("values", SAME.values(), ids=SAME)
def test_a_fit_calls_them_the_same(values):
    adata = cite(300)["rna"].copy()
    adata.obs["day"] = values
    assert av._data.setup.find_setup(adata, proteins=False, batch_key="day").batches == ("1", "2")


# arguments, each with the words of its error --------------------------------------------------------------------------

TABLE = pd.DataFrame({"a": [1, 2]})
BAD = {
    "use_gpu": ({"use_gpu": True}, TypeError, "device='cuda'"),
    "accelerator": ({"accelerator": "gpu"}, TypeError, "device='cuda'"),
    "n_epochs": ({"n_epochs": 3}, TypeError, "max_epochs"),
    "a switch that is text": ({"early_stopping": "no"}, TypeError, "early_stopping='no' must be True or False"),
    "copy of text": ({"copy": "False"}, TypeError, "copy='False' must be True or False"),
    "encode_covariates of a number": ({"encode_covariates": 2}, TypeError, "encode_covariates=2 must be"),
    "weight_decay": ({"weight_decay": 1e18}, ValueError, "weight_decay=1e\\+18"),
    "weight_decay below 0": ({"weight_decay": -1.0}, ValueError, "weight_decay"),
    "lr of text": ({"lr": "fast"}, TypeError, "lr='fast' must be a number"),
    "lr of 1000": ({"lr": 1000}, ValueError, "at most 1"),
    "lr NaN": ({"lr": float("nan")}, ValueError, "lr="),
    "train_size of text": ({"train_size": "most"}, TypeError, "train_size='most' must be a number"),
    "train_size None-like": ({"train_size": [0.9]}, TypeError, "train_size="),
    "max_epochs of text": ({"max_epochs": "10"}, TypeError, "max_epochs"),
    "batch_size of 0": ({"batch_size": 0}, ValueError, "batch_size"),
    "protein_weight infinite": ({"protein_weight": float("inf")}, ValueError, "protein_weight"),
    "key_added of a list": ({"key_added": ["a"]}, TypeError, "key_added"),
    "key_added of nothing": ({"key_added": ""}, ValueError, "key_added"),
    "key_added of a table": ({"key_added": TABLE}, TypeError, "key_added"),
    "key_added with a slash": ({"key_added": "a/b"}, ValueError, "without '/'"),
    "key_added of a blank": ({"key_added": " "}, ValueError, "blanks at its ends"),
    "key_added of two lines": ({"key_added": "a\nb"}, ValueError, "line breaks"),
    "batch_key of a list": ({"batch_key": ["day"]}, TypeError, "batch_key= takes one name"),
    "batch_key of a column": ({"batch_key": pd.Series([1])}, TypeError, "batch_key"),
    "batch_key misspelt": ({"batch_key": "bach"}, KeyError, "Did you mean 'batch'"),
    "batch_key of lists": ({"batch_key": "lists"}, TypeError, "batch_key='lists' is no column of names"),
    "labels of arrays": ({"labels_key": "arrays"}, TypeError, "labels_key='arrays' is no column of names"),
    "covariates of a number": ({"categorical_covariate_keys": 3}, TypeError, "takes a list of names; got int: 3"),
    "covariates of text": ({"continuous_covariate_keys": "age"}, TypeError, "takes a list of names, e.g."),
    "covariates of numbers": ({"categorical_covariate_keys": [3]}, TypeError, "takes a list of column names"),
    "a continuous covariate of text": ({"continuous_covariate_keys": ["batch"]}, ValueError, "not a finite number"),
    "layer of a list": ({"layer": ["counts"]}, TypeError, "layer="),
    "layer that is not there": ({"layer": "count"}, KeyError, "layer="),
    "rna_mod of a list": ({"rna_mod": ["rna"]}, TypeError, "rna_mod"),
    "rna_mod that is not there": ({"rna_mod": "gex"}, KeyError, "'rna', 'prot'"),
    "prot_obsm on a MuData": ({"prot_obsm": "protein"}, ValueError, "prot_mod="),
    "init of a number": ({"init": 3}, TypeError, "init= takes"),
    "init of a table": ({"init": TABLE}, TypeError, "init= takes"),
    "init that is not there": ({"init": "nowhere"}, KeyError, "init='nowhere'"),
    "checkpoint of a number": ({"checkpoint": 3}, TypeError, "checkpoint= takes a path; got int: 3"),
    "checkpoint of a table": ({"checkpoint": TABLE}, TypeError, "checkpoint="),
    "device of text": ({"device": "gpu"}, ValueError, "device='gpu'"),
    "device of a list": ({"device": ["cpu"]}, TypeError, "device="),
    "random_state of text": ({"random_state": "x"}, TypeError, "random_state"),
    "max_minutes of text": ({"max_minutes": "5"}, TypeError, "max_minutes"),
    "unlabelled of None": ({"unlabeled_category": None}, TypeError, "leave it out"),
    "unlabelled of a list": ({"unlabeled_category": ["Unknown"]}, TypeError, "unlabeled_category"),
    "labels of one value": ({"labels_key": "one"}, ValueError, "nothing to tell apart"),
    "labels that are all missing": ({"labels_key": "none"}, ValueError, "tl.totalvi"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_arguments_of_fits(case, no_training):
    options, error, words = case
    mdata = cite(100)
    mdata.obs["lists"] = pd.Series([[1]] * 100, mdata.obs_names)
    mdata.obs["arrays"] = pd.Series([np.ones(1)] * 100, mdata.obs_names)
    mdata.obs["one"], mdata.obs["none"] = "B", np.nan
    with pytest.raises(error, match=words):
        av.tl.totalanvi(mdata, **{"max_epochs": 1} | options)
    assert not any(str(slot).startswith(("totalanvi", "X_")) for slot in (*mdata.obsm, *mdata.uns, *mdata.obs))


ASKED = {
    "features of a number": (
        lambda m: av.tl.denoise(m, features=3),
        TypeError,
        "features= takes a list of names; got int: 3",
    ),
    "features of text": (lambda m: av.tl.denoise(m, features="G001"), TypeError, "features="),
    "batch of an object": (
        lambda m: av.tl.denoise(m, transform_batch=object()),
        TypeError,
        "transform_batch",
    ),
    "transform_batch unknown": (lambda m: av.tl.denoise(m, transform_batch="3"), ValueError, "'1', '2'"),
    "model of a number": (lambda m: av.tl.denoise(m, model=3), TypeError, "model= takes"),
    "model of a table": (lambda m: av.tl.denoise(m, model=TABLE), TypeError, "model= takes"),
    "model of a list": (lambda m: av.tl.latent(m, model=["totalanvi"]), TypeError, "model= takes"),
    "inplace of text": (lambda m: av.tl.predict(m, inplace="yes"), TypeError, "inplace='yes' must be"),
    "soft of a number": (lambda m: av.tl.predict(m, soft=3), TypeError, "soft=3 must be"),
    "coverage of text": (lambda m: av.tl.predict(m, coverage="high"), TypeError, "coverage='high'"),
    "false_rejects of text": (lambda m: av.tl.predict(m, false_rejects="few"), TypeError, "false_rejects='few'"),
    "rejects of a model that cannot": (
        lambda m: av.tl.predict(m, false_rejects=0.1),
        ValueError,
        "lower train_size",
    ),
    "min_genes of text": (lambda m: av.tl.map_query(m.copy(), m, min_genes="all"), TypeError, "min_genes='all'"),
    "groups of an object": (lambda m: av.tl.differential_expression(m, "day", groups=object()), TypeError, "groups="),
    "groups unknown": (lambda m: av.tl.differential_expression(m, "day", groups=[7]), ValueError, "'7'"),
    "panels of a list": (lambda m: av.pp.panels(m, panels=["P01"]), TypeError, "panels="),
    "use_gpu of a question": (lambda m: av.tl.latent(m, use_gpu=True), TypeError, "device='cuda'"),
    "prot_obsm on a MuData": (lambda m: av.tl.latent(m, prot_obsm="x"), ValueError, "prot_mod="),
    "a reference of a number": (lambda m: av.tl.map_query(m, 3), TypeError, "MuData"),
}


@pytest.mark.parametrize("case", ASKED.values(), ids=ASKED)
def test_arguments_of_questions(base, case):
    ask, error, words = case
    with pytest.raises(error, match=words):
        ask(base.copy())


class Folder(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


def test_any_path_will_do(base, tmp_path):
    av.write_model(base, Folder(tmp_path / "m"))
    for path in (Folder(tmp_path / "m"), tmp_path / "m", str(tmp_path / "m")):
        query = base.copy()
        av.tl.latent(query, model=path, key_added="z")
        np.testing.assert_array_equal(query.obsm["X_z"], base.obsm["X_totalanvi"])


@pytest.mark.parametrize("day", [1, 1.0, "1", "1.0", np.int64(1), [1.0, 2], np.array([1, 2])], ids=range(7))
def test_batches_named_by_numbers(base, day):
    wanted = [str(int(float(one))) for one in np.atleast_1d(np.array(day, dtype=object))]
    wanted = wanted[0] if len(wanted) == 1 else wanted
    found, expected = (av.tl.denoise(base, transform_batch=one, features=["G001"]).to_numpy() for one in (day, wanted))
    np.testing.assert_array_equal(found, expected)


# values ---------------------------------------------------------------------------------------------------------------

VALUES = {
    "complex": (lambda x: x.astype(complex), "complex"),
    "text": (lambda x: x.astype(str), "type"),
    "3e38": (lambda x: np.where(x == x.max(), np.float32(3e38), x), "too large values"),
    "infinite": (lambda x: np.where(x == x.max(), np.inf, x), "infinite"),
    "negative": (lambda x: -x, "negative"),
    "halves": (lambda x: x / 2, "non-integer"),
    "log1p": (np.log1p, "logarithms"),
    "rounded log1p": (lambda x: np.rint(np.log1p(1e4 * x / x.sum(1, keepdims=True))), "no counts"),
    "empty": (lambda x: x * 0, "without a single count"),
    "dates": (lambda x: np.full(x.shape, np.datetime64("2020-01-01")), "type"),
}


@pytest.mark.parametrize("case", VALUES.values(), ids=VALUES)
@pytest.mark.filterwarnings("ignore")
def test_values(case, no_training):
    change, words = case
    adata = cite(300)["rna"].copy()
    adata.layers["odd"] = change(adata.X.toarray())
    with pytest.raises((ValueError, TypeError), match=words):
        av.tl.scvi(adata, layer="odd", max_epochs=1)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.float16, np.float64, bool])
@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_array], ids=["dense", "csr", "csc"])
def test_counts_of_any_type(kind, make):
    adata = cite(100)["rna"].copy()
    counts = np.minimum(adata.X.toarray(), 1 if kind is bool else 100).astype(kind)
    counts[:, 0] = 1
    adata.X = make(counts) if kind is not np.float16 or make is np.asarray else counts
    av.tl.scvi(adata, **FIT)
    expected = AnnData(counts.astype(np.float32), obs=adata.obs[[]], var=adata.var[[]])
    av.tl.scvi(expected, **FIT)
    np.testing.assert_array_equal(adata.obsm["X_scvi"], expected.obsm["X_scvi"])


# columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [[[1]] * 100, [{"a": 1}] * 100, [(1, 2)] * 100, [np.ones(2)] * 100])
def test_other_columns_may_hold_anything(column, no_training):
    """They are not asked for: a misspelt key is told, and a fit starts."""
    mdata = cite(100)
    mdata.obs["odd"] = pd.Series(column, mdata.obs_names)
    mdata.obs[0] = 1
    with pytest.raises(KeyError, match=r"labels_key='cell_typ'.*Did you mean 'cell_type'"):
        av.tl.totalanvi(mdata, "cell_typ", max_epochs=1)
    with pytest.raises(pytest.fail.Exception, match="training was reached"):
        av.tl.totalanvi(mdata, max_epochs=1)


# what is the user's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["prediction", "confidence", "margin", "entropy", "novelty", "label", "split"])
def test_columns_of_the_user_are_kept(column, no_training):
    mdata = cite(100)
    mdata.obs[f"totalanvi_{column}"] = "mine"
    with pytest.raises(ValueError, match=rf"obs\['totalanvi_{column}'\] would be overwritten.*key_added="):
        av.tl.totalanvi(mdata, max_epochs=1)
    with pytest.raises(pytest.fail.Exception, match="training was reached"):
        av.tl.totalanvi(mdata, max_epochs=1, key_added="other")
    del mdata.obs[f"totalanvi_{column}"]
    with pytest.raises(pytest.fail.Exception, match="training was reached"):
        av.tl.totalanvi(mdata, max_epochs=1)


@pytest.mark.parametrize("slot", ["X_totalvi", "totalvi_proba", "totalvi_prot_denoised"])
def test_arrays_of_the_user_are_kept(slot, no_training):
    mdata = cite(100)
    mdata.obsm[slot] = np.ones((100, 2))
    with pytest.raises(ValueError, match=rf"obsm\['{slot}'\] would be overwritten"):
        av.tl.totalvi(mdata, max_epochs=1)


@pytest.mark.parametrize(
    ("ask", "where"),
    [
        (lambda m: av.tl.denoise(m), "totalanvi_denoised"),
        (lambda m: av.tl.denoise(m, key_added="mine"), "mine_denoised"),
        (lambda m: av.tl.foreground(m), "totalanvi_foreground"),
        (lambda m: av.tl.latent(m, key_added="umap"), "X_umap"),
        (lambda m: av.tl.feature_correlation(m, n_samples=2), "totalanvi_correlation"),
    ],
)
def test_answers_do_not_overwrite_what_others_wrote(base, ask, where):
    mdata = base.copy()
    free = base.copy()
    ask(free)
    ask(free)  # its own answer is replaced
    if where.startswith("X_"):
        mdata.obsm[where] = np.ones((300, 2))
    elif where.endswith("correlation"):
        mdata.varp[where] = np.ones((mdata.n_vars, mdata.n_vars))
    else:
        mdata["prot"].layers[where] = np.ones(mdata["prot"].shape)
    with pytest.raises(ValueError, match=rf"\['{where}'\] would be overwritten"):
        ask(mdata)


explained = partial(av.tl.attributions, n_cells=3, baseline="zero", per_cell=True)
OWN_OF_QUESTIONS = {
    "minify, mean": (lambda m: av.tl.minify(m), "", "obsm", "totalanvi_qz_mean"),
    "minify, sum": (lambda m: av.tl.minify(m), "", "obs", "totalanvi_library"),
    "minify, panels": (lambda m: av.tl.minify(m, keep_counts=True), "", "obs", "totalanvi_measured"),
    "attributions": (lambda m: explained(m), "rna", "varm", "totalanvi_attributions"),
    "of proteins": (lambda m: explained(m), "prot", "uns", "totalanvi_attributions"),
    "under a key": (lambda m: explained(m, key_added="mine"), "prot", "varm", "mine_attributions"),
    "single cells": (lambda m: explained(m), "rna", "layers", "totalanvi_attributions"),
    "what of a cell": (lambda m: explained(m), "prot", "obs", "totalanvi_explained"),
}


def put(part, table: str, name: str):
    """Something of the user's own in a slot; what lies there then."""
    n_obs, n_vars = part.shape
    shape = {"obs": n_obs, "obsm": (n_obs, 2), "varm": (n_vars, 2), "layers": (n_obs, n_vars), "uns": 3}[table]
    getattr(part, table)[name] = np.ones(shape)
    return np.asarray(getattr(part, table)[name]).copy()


@pytest.mark.parametrize(("ask", "mod", "table", "name"), OWN_OF_QUESTIONS.values(), ids=OWN_OF_QUESTIONS)
def test_no_question_and_no_fit_takes_a_slot_of_the_users(base, no_training, ask, mod, table, name):
    mdata, free = base.copy(), base.copy()
    ask(free)
    kept = free.copy()
    if "qz_" not in name and "library" not in name and "_measured" not in name:
        ask(free)  # its own answer is replaced
    part = mdata[mod] if mod else mdata
    before = put(part, table, name)
    where = rf"mdata\['{mod}'\]\." if mod else ""
    told = rf"^{where}{table}\['{name}'\] would be overwritten, and nothing says that anvi wrote it"
    with pytest.raises(ValueError, match=told):
        ask(mdata)
    if "mine" not in name:
        for again in (mdata, cite(100)):
            if again is not mdata:
                put(again[mod] if mod else again, table, name)
            with pytest.raises(ValueError, match=told):
                av.tl.totalanvi(again, batch_key="day" if again is mdata else None, **FIT)
    av.tl.predict(mdata)
    np.testing.assert_array_equal(getattr(part, table)[name], before)
    if not kept.uns["totalanvi"].get("minified"):
        with pytest.raises(pytest.fail.Exception, match="training was reached"):  # answers of anvi's own may go
            av.tl.totalanvi(kept, batch_key="day", **FIT)


def test_keys_whose_slots_have_one_name_leave_each_other_alone(base):
    """`rna_denoised` of "x" and `denoised` of "x_rna": the one is a table, the other a layer."""
    mdata = base.copy()
    av.tl.scvi(mdata, key_added="x_rna", **FIT)
    av.tl.denoise(mdata, model="x_rna")
    layer = mdata["rna"].layers["x_rna_denoised"].copy()
    for _ in range(2):
        av.tl.totalvi(mdata, key_added="x", **FIT)
        av.tl.denoise(mdata, model="x")
    np.testing.assert_array_equal(mdata["rna"].layers["x_rna_denoised"], layer)
    table = av.get.table(mdata, "x_prot_denoised")
    av.tl.scvi(mdata, key_added="x_rna", **FIT)
    pd.testing.assert_frame_equal(av.get.table(mdata, "x_prot_denoised"), table)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("asked", ["latent", "predict", "sets", "denoise", "attributions", "minify"])
def test_a_joined_object_whose_notes_are_lost_is_asked_and_fitted_anew(asked, mapped):
    with av.settings.override(verbosity=0, progress=False):
        rna = cite(300)["rna"].copy()
        rna.obs["cell_type"] = cite(300).obs["true_cell_type"].reindex(rna.obs_names).to_numpy()
        av.tl.scanvi(rna, "cell_type", train_size=0.6, **FIT)
        questions = {
            "latent": av.tl.latent,
            "predict": av.tl.predict,
            "sets": partial(av.tl.predict, coverage=0.9),
            "denoise": av.tl.denoise,
            "attributions": explained,
            "minify": partial(av.tl.minify, keep_counts=True),
        }
        for question in questions.values():
            question(rna)
        joined = anndata.concat([rna[:150], rna[150:]])
        assert "scanvi" not in joined.uns
        if mapped:  # without epochs there are no training cells, by which a fit could be told
            del joined.obs["scanvi_split"]
        questions[asked](joined, model=av.get.model(rna))
        assert ("scanvi_sets" in joined.obsm) != (asked == "predict")  # which is of another prediction then
        av.tl.scanvi(joined, "cell_type", **FIT)
    assert "scanvi_sets" not in joined.obsm and "scanvi_qz_mean" not in joined.obsm


def test_a_fit_replaces_what_an_earlier_one_and_its_answers_wrote(base):
    mdata = base.copy()
    av.tl.denoise(mdata)
    av.tl.totalanvi(mdata, batch_key="day", **FIT)
    assert "totalanvi_denoised" not in mdata["rna"].layers


# what a caller has set in torch ---------------------------------------------------------------------------------------

QUESTIONS = {
    "denoise": lambda m: av.tl.denoise(m, inplace=False)["rna"].values,
    "foreground": lambda m: av.tl.foreground(m, inplace=False).to_numpy(),
    "predict": lambda m: av.tl.predict(m, inplace=False).to_numpy(),
    "latent": lambda m: av.tl.latent(m, inplace=False),
    "correlation": lambda m: av.tl.feature_correlation(m, n_samples=2, inplace=False).to_numpy(),
    "attributions": lambda m: (
        av.tl.attributions(m, n_cells=3, baseline="zero"),
        av.get.attributions(m)["prot"].values,
    )[1],
    "markers": lambda m: av.tl.differential_expression(m, "day", n_samples=20, inplace=False)["rna"]["logfoldchanges"],
    "draws": lambda m: av.tl.posterior_predictive(m, n_samples=1)["rna"].values,
    "elbo": lambda m: list(av.metrics.elbo(m).values()),
    "likelihood": lambda m: av.get.likelihood_parameters(m)["rna_mean"].values,
    "query": lambda m: (av.tl.map_query(m, m.copy(), key_added="q", max_epochs=1), m.obsm["X_q"])[1],
    "minify": lambda m: (av.tl.minify(m), m.obsm["totalanvi_qz_var"])[1],
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.filterwarnings("ignore")
def test_questions_do_not_depend_on_the_callers_torch(base, question):
    expected = question(base.copy())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.device("meta"):
            found = question(base.copy())
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_too_few_labelled_validation_cells_are_told_once(caplog):
    mdata = cite(100)
    with warnings.catch_warnings(), quiet_mudata():
        warnings.simplefilter("ignore")
        av.tl.totalanvi(mdata, **FIT)
    (line,) = [record for record in caplog.records if "labelled validation cells" in record.message]
    assert line.levelname == "WARNING" and "nothing is 'Unassigned'" in line.message
    assert "totalanvi_novelty" not in mdata.obs  # nothing half: neither scores nor temperatures
    assert "temperature" not in av.get.model(mdata).info


def test_questions_go_on_after_two_queries_are_put_together():
    """`concat` drops uns, which says that the answers are ours; labels and predictions say so, too."""
    rna = cite(200)["rna"].copy()
    rna.obs["cell_type"] = cite(200).obs["true_cell_type"]
    av.tl.scanvi(rna, max_epochs=1)
    model, parts = av.get.model(rna), [rna[:80].copy(), rna[80:].copy()]
    for part in parts:
        for table in (part.uns, part.obsm):
            table.clear()
        part.obs = part.obs[[]]
        av.tl.predict(part, model=model)
        av.tl.latent(part, model=model)
    both = anndata.concat(parts)
    av.tl.predict(both, model=model)
    av.tl.latent(both, model=model)
    assert "X_scanvi" in both.obsm and both.n_obs == 200


def test_no_verb_moves_the_callers_random_numbers(base, tmp_path):
    """mudata draws names of columns from Python's `random` whenever it makes, copies or updates an object."""

    def left_out(mdata):
        with pytest.raises(ValueError, match="too few validation cells"):
            av.metrics.novelty(mdata, classes=["B"], max_epochs=1)

    base.write(tmp_path / "x.h5mu")
    asked = {
        "copy of a fit": lambda: av.tl.scvi(base, copy=True, max_epochs=1, key_added="other"),
        "copy of a query": lambda: av.tl.map_query(base, base, copy=True, key_added="q", max_epochs=0),
        "copy of names": lambda: av.pp.panels(base, "day", harmonize=True, copy=True),
        "aligned": lambda: av.pp.align_query(base, base),
        "simulated": lambda: cite(100),
        "file": lambda: av.pp.panels(tmp_path / "x.h5mu", "day"),
        "left out": lambda: left_out(base),
    }
    for name, ask in asked.items():
        states = [random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask()
        for before, after in zip(
            states, [random.getstate(), np.random.get_state()[1], torch.random.get_rng_state()], strict=True
        ):
            assert np.array_equal(np.asarray(before, dtype=object), np.asarray(after, dtype=object)), name


def test_copies_are_made_where_warnings_are_errors(base):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        av.tl.latent(base, key_added="z", inplace=False)
        copy = av.tl.map_query(base, base, copy=True, key_added="q", max_epochs=0)
    assert "X_q" in copy.obsm


# texts that look the same ---------------------------------------------------------------------------------------------


def test_texts_that_look_the_same_are_the_same():
    """Blanks that do not break, two of them, and accents in one sign or in two: one batch, one class, one group."""
    names = ["é T", "e\u0301 T", "\u00e9\u00a0T", "e\u0301  T", " é\tT", "\u202f\u00e9\u2009T "]
    mdata = cite(300)
    mdata.obs["batch"] = [names[i % 6] if i % 2 else "other" for i in range(300)]
    mdata.obs["cell_type"] = [names[i % 6] if i % 3 else "B" for i in range(300)]
    av.tl.totalanvi(mdata, batch_key="batch", **FIT)
    setup = av.get.model(mdata).setup
    assert setup.batches == ("other", "é T") and setup.classes == ("B", "é T")
    av.tl.differential_expression(mdata, "cell_type", n_samples=20)
    assert set(av.get.de(mdata)["group"]) == {"B", "é T"}
    av.tl.attributions(mdata, groupby="cell_type", n_cells=2, n_steps=2, baseline="zero")
    assert mdata["rna"].varm["totalanvi_attributions"]["é T"].notna().all()


def test_groups_that_are_numbers_are_explained(base):
    mdata = base.copy()
    mdata.obs["cluster"] = pd.Categorical(np.arange(300) % 2 + 1.0)  # as a join leaves them
    av.tl.attributions(mdata, groupby="cluster", n_cells=2, n_steps=2, baseline="zero")
    assert list(mdata["prot"].varm["totalanvi_attributions"]) == ["1", "2"]


# columns that anvi has put into modalities ----------------------------------------------------------------------------

RANK = {
    "attributions": lambda m: av.tl.attributions(m, groupby="cluster", n_cells=2, n_steps=2, baseline="zero"),
    "markers": lambda m: av.tl.differential_expression(m, "cluster", n_samples=20),
}


@pytest.mark.parametrize("then", ["attributions", "markers", "fit"])
@pytest.mark.parametrize("first", RANK)
@pytest.mark.filterwarnings("ignore")
def test_a_column_may_change_after_it_was_ranked_by(base, first, then, tmp_path):
    """Rankings put a copy into each modality, as scanpy's plots want it; the user changes their own alone."""
    mdata = base.copy()
    mdata.obs["cluster"] = np.where(np.arange(300) % 2, "a", "b")
    RANK[first](mdata)
    mdata.write(tmp_path / "x.h5mu")  # what is pushed is known from a file, too
    mdata = mudata.read_h5mu(tmp_path / "x.h5mu")
    mdata.obs["cluster"] = np.where(np.arange(300) % 3, "c", "d")
    if then == "fit":
        av.tl.totalanvi(mdata, "cluster", key_added="again", **FIT)
        assert av.get.model(mdata, "again").classes == ("c", "d")
        return
    RANK[then](mdata)
    key = {"attributions": "totalanvi_attributions", "markers": "rank_genes_groups"}[then]
    for part in mdata.mod.values():
        column = part.uns[key]["params"]["groupby"]
        assert part.uns[key]["names"].dtype.names == ("c", "d")
        expected = mdata.obs["cluster"].reindex(part.obs_names).astype(str)
        assert (part.obs[column].astype(str) == expected).all()


def test_a_column_of_a_modality_that_is_the_users_own_still_counts(base):
    mdata = base.copy()
    mdata.obs["cluster"] = np.where(np.arange(300) % 2, "a", "b")
    mdata["rna"].obs["cluster"] = np.where(np.arange(300) % 3, "a", "b")
    with pytest.raises(ValueError, match="two copies that disagree"):
        RANK["attributions"](mdata)


@pytest.mark.parametrize("names", [(".", "_index"), ("names", "scores")])
def test_groups_of_any_name_can_be_written(base, names, tmp_path):
    mdata = base.copy()
    mdata.obs["cluster"] = np.where(np.arange(300) % 2, *names)
    RANK["markers"](mdata)
    with quiet_mudata():
        mdata.write(tmp_path / "x.h5mu")
        assert set(av.get.de(mudata.read_h5mu(tmp_path / "x.h5mu"))["group"]) == set(names)
    if "." in names:
        with pytest.raises(ValueError, match="cannot be written to a file; rename it"):
            RANK["attributions"](mdata)


# genes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Index, pd.Series], ids=str)
def test_genes_in_any_kind_of_list(kind, no_training):
    adata = cite(100)["rna"].copy()
    with pytest.raises(pytest.fail.Exception, match="training was reached"):
        av.tl.scvi(adata, genes=kind([f"G{i:03d}" for i in range(1, 51)]), max_epochs=1)


def test_a_single_gene():
    mdata = mudata_of({"rna": cite(100)["rna"][:, :1].copy(), "prot": cite(100)["prot"].copy()}, cite(100))
    mdata["rna"].X = np.random.default_rng(0).poisson(3, (100, 1)).astype(np.float32) + np.float32(1)
    av.tl.totalvi(mdata, **FIT)
    assert np.isfinite(mdata.obsm["X_totalvi"]).all()


def test_zeros_of_an_outer_join_are_told(caplog):
    first = cite(300)["rna"].copy()
    second = first[:, :30].copy()
    second.obs_names += "-2"
    joined = anndata.concat([first, second], join="outer", label="lane")
    assert any("are zero in all cells of '1'" in note for note in av.pp.check(joined, batch_key="lane").notes)
    av.tl.scvi(joined, batch_key="lane", **FIT)
    assert "genes that other batches express (G0" in caplog.text and "join='inner'" in caplog.text
    caplog.clear()
    inner = anndata.concat([first, second], join="inner", label="lane")
    av.tl.scvi(inner, batch_key="lane", **FIT)
    assert "zero in all cells" not in caplog.text
    # a single cell that has them, behind those that are looked at first, and they are no longer missing
    joined.X = joined.X.toarray()
    joined.X[-1, 30:] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anvi._data.cells.ABSENT_CELLS", 200)
        assert not any("are zero in all" in note for note in av.pp.check(joined, batch_key="lane").notes)


# objects put together in other ways than they are meant ---------------------------------------------------------------


def _turned(mdata, name):
    part = mdata[name].T.copy()
    return mudata_of({"rna": mdata["rna"].copy(), "prot": mdata["prot"].copy()} | {name: part}, like=mdata)


@pytest.mark.parametrize("name", ["rna", "prot"])
@pytest.mark.parametrize("keys", [{}, {"batch_key": "batch"}])
def test_a_modality_with_its_cells_in_columns(name, keys, no_training):
    other = "prot" if name == "rna" else "rna"
    with pytest.raises(ValueError, match=rf"mdata\['{name}'\] has cells in its columns") as error:
        av.tl.totalvi(_turned(cite(100), name), **keys)
    mdata, scope = _turned(cite(100), name), {"mudata": mudata}
    scope["mdata"] = mdata
    exec(str(error.value).partition("columns of obs: ")[2], scope)  # as it says
    assert scope["mdata"][name].n_obs == cite(100)[name].n_obs and scope["mdata"][other] is mdata[other]


def test_a_protein_with_the_name_of_a_gene_does_not_turn_the_blame(no_training):
    """Proteins turned round, one of them called as a gene is: it is theirs, not the RNA's."""
    mdata = cite(100)
    mdata["prot"].var_names = ["G001", *mdata["prot"].var_names[1:]]
    with pytest.raises(ValueError, match=r"mdata\['prot'\] has cells in its columns"):
        av.tl.totalvi(_turned(mdata, "prot"))


def test_barcodes_in_the_columns_of_an_anndata(no_training):
    adata = cite(100)["rna"].copy()
    rng = np.random.default_rng(0)
    adata.obs_names = ["".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(adata.n_obs)]
    with pytest.raises(ValueError, match=r"adata = adata\.T\.copy\(\)"):
        av.tl.scvi(adata.T.copy())


def test_antibodies_that_end_in_an_oligonucleotide_are_no_cells():
    mdata = cite(100)
    mdata["prot"].var_names = [f"CD{i}-CTCATTGTAACTCCT" for i in range(mdata["prot"].n_vars)]
    assert av.pp.check(mdata).ok


def test_cells_named_otherwise_are_told_before_what_their_columns_lack(no_training):
    mdata = cite(100)
    mdata["prot"].obs_names = mdata["prot"].obs_names + "-1"
    mdata = mudata_of(dict(mdata.mod), like=mdata)
    with pytest.raises(ValueError, match="None of the .* cells that have proteins is among"):
        av.tl.totalanvi(mdata, batch_key="batch")


def test_a_modality_that_no_file_gives_back(no_training):
    mdata = cite(100)
    mdata = mudata_of({"rna": mdata["rna"], "prot/adt": mdata["prot"]}, like=mdata)
    with pytest.raises(ValueError, match="prot_mod='prot/adt'.*rename it"):
        av.tl.totalvi(mdata, prot_mod="prot/adt")


@pytest.mark.parametrize(
    "keys",
    [
        {"batch_key": "cell_type"},
        {"categorical_covariate_keys": ["cell_type"]},
        {"labels_key": ["batch", "cell_type"], "batch_key": "batch"},
        {"panel_key": "cell_type"},
        {"batch_key": "batch", "categorical_covariate_keys": ["batch"]},
        {"categorical_covariate_keys": ["batch", "batch"]},
    ],
    ids=str,
)
def test_a_column_with_two_meanings(keys, no_training):
    with pytest.raises(ValueError, match="named twice among labels, batch"):
        av.tl.totalanvi(cite(100), **keys)


def test_the_panel_may_be_the_batch_or_a_covariate():
    assert av.pp.check(cite(100), batch_key="batch", panel_key="batch").ok
    av.tl.totalvi(cite(100), batch_key="batch", panel_key="panel", categorical_covariate_keys=["panel"], max_epochs=1)


# what is taken, with a word -------------------------------------------------------------------------------------------


def _barcode_as_batch(mdata):
    mdata.obs["batch"] = list(mdata.obs_names)


def _seen_or_not(mdata):
    mdata["rna"].X = mdata["rna"].X.astype(bool)


def _tags(mdata):
    names = list(mdata["prot"].var_names)
    names[:5] = ["HTO_1", "TotalSeq-B0251 Hashtag 1", "hashtag4-TotalC", "unmapped", "CMO301"]
    mdata["prot"].var_names = names


REMARKS = {
    "a batch for each cell": (_barcode_as_batch, "300 of 300 batches have fewer than 10 cells"),
    "seen or not": (_seen_or_not, "no RNA count is above 1"),
    "tags of samples": (_tags, "5 proteins are by their names tags of samples.*'targets'"),
}


@pytest.mark.parametrize("case", REMARKS.values(), ids=REMARKS)
def test_remarks_of_a_fit_and_of_the_check(case, caplog):
    change, words = case
    mdata = cite(300, rna_only_batch=False)
    usual = av.pp.check(mdata, batch_key="batch", labels_key=None).notes
    change(mdata)
    report = av.pp.check(mdata, batch_key="batch", labels_key=None)
    assert report.ok
    (note,) = set(report.notes) - set(usual)
    assert re.search(words, note)
    av.tl.totalvi(mdata, batch_key="batch", **FIT)
    assert note in caplog.messages


def test_tags_are_no_targets():
    mdata = cite(100)
    _tags(mdata)
    av.tl.totalvi(mdata, proteins="targets", **FIT)
    assert mdata.uns["totalvi"]["features"]["prot"] == list(mdata["prot"].var_names[5:])


@pytest.mark.parametrize(
    "name",
    ["CD45", "HLA-DR", "TotalSeq-B0034 CD3", "HTO", "CMKLR1", "HTR1A", "Hashtag 10", "IgG1 control", "HashtagA"]
    + ["anti-mouse Hashtag 1", "Ms.Hashtag2_TotalSeqC"],
)
def test_which_names_are_tags(name):
    assert av._data.antibodies.names_no_target(name) == (name == "HTO" or "Hashtag" in name)


def test_groups_of_few_cells_are_told(base, caplog):
    mdata = base.copy()
    mdata.obs["g"] = ["lonely", *["other"] * 299]
    av.tl.differential_expression(mdata, "g", n_samples=20)
    assert any("1 of 2 groups have fewer than 10 cells ('lonely' (1))" in text for text in caplog.messages)


def test_results_of_groups_that_are_numbers(base):
    mdata = base.copy()
    mdata.obs["leiden"] = np.arange(300) % 3
    av.tl.differential_expression(mdata, "leiden", n_samples=20)
    av.tl.attributions(mdata, groupby="leiden", groups=[0, 2], baseline="zero", n_cells=5, n_steps=5)
    pd.testing.assert_frame_equal(av.get.de(mdata, 0), av.get.de(mdata, "0"))
    pd.testing.assert_frame_equal(av.get.de(mdata, [0, 1.0]), av.get.de(mdata, ["0", "1"]))
    assert len(av.pl.attributions(mdata, 0))


# settings, places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [{"verbosity": "info"}, {"n_threads": 0}, {"n_threads": True}, {"progress": "yes"}, {"stream_above": "a"}]
    + [{"stream_above": float("nan")}, {"data_dir": 3}, {"precision": "fp16"}],
    ids=str,
)
def test_settings_are_looked_at_when_they_are_made(option):
    ((name, value),) = option.items()
    before = getattr(av.settings, name)
    with pytest.raises(ValueError, match=f"settings.{name}="):
        setattr(av.settings, name, value)
    with pytest.raises(ValueError, match=f"settings.{name}="), av.settings.override(**option):
        pass
    assert getattr(av.settings, name) == before


def test_the_users_home(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    av.write_model(base, "~/model")
    assert av.read_model("~/model").classes == av.get.model(base).classes
    av.pl.history(base, save="~/history.png")
    av.pl.report(base, "~/report.html")
    av.tl.posterior_predictive(base[:20].copy(), out="~/counts.zarr")
    with quiet_mudata():
        base.write("small.h5mu")
    av.tl.predict("~/small.h5mu", model="~/model", key_added="again")
    query = cite(100, random_state=1)
    av.tl.map_query(query, "~/model", max_epochs=0)
    av.tl.totalvi(query, checkpoint="~/fit.ckpt", **FIT)
    assert not (tmp_path / "~").exists()
    assert {"model", "history.png", "report.html", "counts.zarr"} <= {path.name for path in tmp_path.iterdir()}


def test_places_for_pictures(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder: name a file in it"):
        av.pl.history(base, save=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder that is there: make .*nowhere"):
        av.pl.history(base, save=tmp_path / "nowhere" / "x.png")
    with pytest.raises(TypeError, match="save= takes a path"):
        av.pl.history(base, save=True)
    assert not list(tmp_path.iterdir())


def test_too_many_arguments_are_python_s_to_tell(no_training):
    with pytest.raises(TypeError, match="positional arguments"):
        av.tl.totalanvi(cite(100), "cell_type", "batch")


def test_classes_that_are_batches_by_another_name_are_told(caplog):
    mdata = cite()
    of_batch = {"batch_0": "sorted T", "batch_1": "sorted B"}
    mdata.obs["sorted"] = mdata.obs["batch"].astype(str).map(of_batch)
    av.tl.totalanvi(mdata, "sorted", batch_key="batch", max_epochs=1)
    assert "every batch has labels of one class" in caplog.text
    caplog.clear()
    mdata.obs.loc[mdata.obs_names[mdata.obs["batch"] == "batch_2"][0], "sorted"] = "sorted T"  # still one of each
    mdata.obs.loc[mdata.obs_names[mdata.obs["batch"] == "batch_1"][0], "sorted"] = "sorted T"
    av.tl.totalanvi(mdata, "sorted", batch_key="batch", max_epochs=1)
    assert "every batch has labels of one class" not in caplog.text


def test_a_batch_without_a_protein_count_in_a_panel_of_others_is_told(caplog):
    mdata = cite(missing="zero")
    mdata.obs["kit"] = np.where(np.arange(mdata.n_obs) % 2, "one", "two")  # stained and unstained cells in each
    av.tl.totalvi(mdata, batch_key="batch", panel_key="kit", max_epochs=1)
    assert "batch 'batch_2' has no protein count at all" in caplog.text
    caplog.clear()
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)  # not measured, by the rule
    assert "no protein count at all" not in caplog.text


# what other people's objects hold ---------------------------------------------------------------------------------


def fitted(mdata, **options):
    """The class probabilities of a short fit."""
    av.tl.totalanvi(mdata, **FIT | options)
    return av.get.proba(mdata)


@pytest.mark.parametrize("kind", ["datetime64", "timedelta64"])
@pytest.mark.filterwarnings("ignore")
def test_dates_mean_the_same_in_every_unit_and_a_missing_one_is_missing(kind):
    mdata = cite(300)
    days = np.arange(300) % 50
    mdata.obs["when"] = (days * 86_400 * 10**9).astype(f"{kind}[ns]")
    av.tl.totalanvi(mdata, continuous_covariate_keys=["when"], **FIT)
    asked = av.tl.predict(mdata, inplace=False)
    mdata.obs["when"] = (days * 86_400).astype(f"{kind}[s]")
    pd.testing.assert_frame_equal(av.tl.predict(mdata, inplace=False), asked)
    mdata.obs.loc[mdata.obs_names[5], "when"] = pd.NaT
    with pytest.raises(ValueError, match=f"'when' is not a finite number in 1 cells .first: '{mdata.obs_names[5]}'"):
        av.tl.predict(mdata, inplace=False)


def test_dates_are_no_size_factors():
    mdata = cite(100)
    mdata.obs["when"] = pd.date_range("2020", periods=100)
    with pytest.raises(ValueError, match="size_factor_key: 'when' holds dates"):
        av.tl.totalanvi(mdata, size_factor_key="when", **FIT)


def test_a_batch_whose_cells_are_called_otherwise_in_the_proteins_is_told():
    whole = cite(300)
    rna, prot = whole["rna"].copy(), whole["prot"].copy()
    rna.obs_names = rna.obs_names + "-1"
    prot.obs_names = [name if i < 100 else f"{name}-1" for i, name in enumerate(prot.obs_names)]
    mdata = mudata_of({"rna": rna, "prot": prot})
    labels = whole.obs["cell_type"].astype(str)
    mdata.obs["cell_type"] = labels.reindex([name.removesuffix("-1") for name in mdata.obs_names]).to_numpy()
    notes = " ".join(av.pp.check(mdata).notes)
    assert "100 of the 100 cells with proteins alone are named like cells with RNA alone" in notes
    assert "named like" not in " ".join(av.pp.check(whole).notes)
    rna.obs_names = [*rna.obs_names[:-1], f"{prot.obs_names[0]}-2"]  # of two lanes that share a barcode
    again = mudata_of({"rna": rna, "prot": prot})
    again.obs["cell_type"] = "B"
    assert "99 of the 101 cells with" in " ".join(av.pp.check(again, labels_key=None).notes)
    # lanes: other cells under barcodes of which few recur
    other = prot[:100].copy()
    other.obs_names = [f"other{i}" for i in range(98)] + ["cell_98-2", "cell_99-2"]
    rna.obs_names = [f"cell_{i}-1" for i in range(300)]
    mdata = mudata_of({"rna": rna, "prot": other})
    mdata.obs["cell_type"] = "B"
    assert "named like" not in " ".join(av.pp.check(mdata, labels_key=None).notes)


@pytest.mark.parametrize("name", ["-1", "#N/A", "n.a.", "Unclassified"])
def test_more_words_for_no_label_are_told(name, caplog):
    mdata = cite(200)
    mdata.obs["cell_type"] = mdata.obs["cell_type"].astype(str).replace({"Unknown": name})
    av.pp.check(mdata)
    assert f"are labelled '{name}'" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_masked_proteins_were_not_measured():
    masked, missing = cite(200), cite(200)
    values = np.asarray(masked["prot"].X, dtype=np.float32)
    gone = np.zeros(values.shape, dtype=bool)
    gone[:, 0] = True
    masked["prot"].X = np.ma.array(values, mask=gone)
    missing["prot"].X = np.where(gone, np.nan, values)
    pd.testing.assert_frame_equal(fitted(masked), fitted(missing))


def test_proteins_that_were_only_seen_or_not_are_told():
    mdata = cite(200)
    assert not any("no protein count is above 1" in note for note in av.pp.check(mdata).notes)
    values = np.asarray(mdata["prot"].X)
    mdata["prot"].X = (values > np.median(values, 0)).astype(np.float32)
    assert any("no protein count is above 1" in note for note in av.pp.check(mdata).notes)


@pytest.mark.filterwarnings("ignore")
def test_autocast_of_the_caller_does_not_matter(base):
    outside = av.tl.predict(base, inplace=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pd.testing.assert_frame_equal(av.tl.predict(base, inplace=False), outside)
        inside = fitted(cite(200))
        assert torch.is_autocast_enabled("cpu")
    pd.testing.assert_frame_equal(inside, fitted(cite(200)))


def test_the_remedy_for_names_that_end_a_line_runs():
    mdata = cite(100)
    prot = mdata["prot"].copy()
    prot.obs_names = prot.obs_names + "\r"
    mdata = mudata_of({"rna": mdata["rna"].copy(), "prot": prot})
    mdata.obs["cell_type"] = np.where(np.arange(mdata.n_obs) % 2, "B", "T")
    with pytest.raises(ValueError, match="Make them the same") as found:
        av.tl.totalanvi(mdata, **FIT)
    names = {"mdata": mdata, "mudata": mudata}
    exec(str(found.value).partition("Make them the same: ")[2].rstrip("."), names)
    assert list(names["mdata"].obs_names) == list(mdata["rna"].obs_names)


@pytest.mark.filterwarnings("ignore")
def test_the_remedy_for_a_query_cell_without_counts_of_the_model_runs():
    reference, mdata = cite(200), cite(100)
    av.tl.totalanvi(reference, genes=list(reference["rna"].var_names[:20]), **FIT)
    counts = np.asarray(mdata["rna"].to_df())
    counts[7, :20], counts[7, 30] = 0, 9
    mdata["rna"].X = counts
    with pytest.raises(ValueError, match="leave these cells out") as found:
        av.tl.map_query(mdata, reference, max_epochs=0)
    names = {"mdata": mdata}
    exec(str(found.value).partition("leave these cells out: ")[2], names)
    assert set(mdata.obs_names) - set(names["mdata"].obs_names) == {mdata.obs_names[7]}


def test_what_is_gone_of_a_minified_object_is_named(base):
    mdata = base.copy()
    av.tl.minify(mdata)
    mdata.obs["totalanvi_library"] = mdata.obs["totalanvi_library"].where(np.arange(300) != 3)
    with pytest.raises(
        ValueError, match=rf"obs\['totalanvi_library'\] has no number for 1 cells .first: '{mdata.obs_names[3]}'"
    ):
        av.tl.denoise(mdata, inplace=False)


@pytest.mark.parametrize("stderr", [None, type("Sink", (), {"write": lambda self, text: len(text)})()])
def test_a_program_without_a_console_can_fit(stderr, monkeypatch):
    monkeypatch.setattr("sys.stderr", stderr)
    with av.settings.override(progress="auto"):
        av.tl.totalanvi(cite(100), **FIT)


def test_cells_without_a_name_are_told():
    adata = cite(100)["rna"].copy()
    names = adata.obs_names.to_series().astype(object)
    names.iloc[3] = np.nan
    adata.obs_names = pd.Index(names)
    with pytest.raises(ValueError, match="has no name for 1 of 100 cells"):
        av.tl.scvi(adata, **FIT)
    assert "has no name for 1 of 100 cells" in str(av.pp.check(adata, labels_key=None))


@pytest.mark.filterwarnings("ignore")
def test_a_mudata_inside_a_mudata_is_told():
    mdata = cite(100)
    nested = mudata.MuData({"rna": mudata.MuData({"gex": mdata["rna"].copy()}), "prot": mdata["prot"].copy()})
    with pytest.raises(TypeError, match=r"mdata\['rna'\] is a MuData itself"):
        av.tl.totalanvi(nested, **FIT)


@pytest.mark.parametrize(
    "as_written", [lambda hex_: hex_.encode(), lambda hex_: tuple(to_rgb(hex_)), str], ids=["bytes", "rgb", "text"]
)
def test_colours_of_classes_may_be_bytes_or_numbers(as_written):
    mdata = cite(200)
    mdata.obs["cell_type"] = mdata.obs["cell_type"].astype("category")
    names = list(mdata.obs["cell_type"].cat.categories)
    chosen = [f"#{i:02x}00ff" for i in range(len(names))]
    mdata.uns["cell_type_colors"] = [as_written(one) for one in chosen]
    av.tl.totalanvi(mdata, **FIT)
    of_class = dict(zip(names, chosen, strict=True))
    classes = mdata.obs["totalanvi_prediction"].cat.categories
    assert list(mdata.uns["totalanvi_prediction_colors"]) == [of_class[name] for name in classes]
    av.pl.predictions(mdata, show=False)


# what an analyst with real data meets -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_groups_that_are_batches_are_told_before_their_difference_is_taken_out(base, caplog):
    mdata = base.copy()
    mdata.obs["stimulated"] = np.where(mdata.obs["day"].astype(str) == "1", "yes", "no")
    ask = {"groupby": "stimulated", "groups": ["yes"], "reference": "no", "n_samples": 50, "inplace": False}
    av.tl.differential_expression(mdata, **ask, batch_correction=False)
    assert "no batch of 'day'" not in caplog.text
    av.tl.differential_expression(mdata, **ask)
    assert "'yes': no batch of 'day' has cells of the group" in caplog.text
    caplog.clear()
    mdata.obs.loc[mdata.obs_names[:2], "stimulated"] = ["no", "yes"]
    av.tl.differential_expression(mdata, **ask)
    assert "no batch of 'day'" not in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_labels_of_cells_with_proteins_alone_are_counted(caplog):
    whole = cite(300)
    mdata = mudata_of({"rna": whole["rna"][:150].copy(), "prot": whole["prot"].copy()})
    alone = ~mdata.obs_names.isin(mdata["rna"].obs_names)
    labels = whole.obs["true_cell_type"].astype(str).reindex(mdata.obs_names)
    mdata.obs["cell_type"] = labels.where(alone, "Unknown")
    report = av.pp.check(mdata)
    assert report.labels.sum() == alone.sum()
    assert set(report.labels.index) == set(labels[alone])
    av.tl.totalanvi(mdata, **FIT)
    assert "0 labelled validation cells with RNA" in caplog.text


def test_a_name_that_may_be_two_antibodies_is_told():
    mdata = cite(300)
    names = ["PD-1", "PD-1 (CD279)", "PD1 (CD279)", *mdata["prot"].var_names[3:]]
    counts = np.array(mdata["prot"].X, dtype=np.float32)
    first = (mdata.obs["batch"].reindex(mdata["prot"].obs_names) == "batch_0").to_numpy()
    counts[np.ix_(~first, [0])], counts[np.ix_(first, [1, 2])] = np.nan, np.nan
    prot = AnnData(counts, mdata["prot"].obs, pd.DataFrame(index=names))
    mdata = mudata_of({"rna": mdata["rna"].copy(), "prot": prot})
    mdata.obs[["batch", "cell_type"]] = cite(300).obs[["batch", "cell_type"]]
    notes = " ".join(av.pp.check(mdata, batch_key="batch").notes)
    assert "antibodies may stand in several columns: 'PD-1 (CD279)' of" in notes
    assert "may stand in several columns" not in " ".join(av.pp.check(cite(300), batch_key="batch").notes)


@pytest.mark.filterwarnings("ignore")
def test_names_that_r_has_written_are_those_of_the_model():
    reference, query = cite(300), cite(300)
    reference["rna"].var_names = [f"HLA-{name}" if i < 8 else name for i, name in enumerate(reference["rna"].var_names)]
    reference.update_var()
    av.tl.totalanvi(reference, **FIT)
    expected = av.tl.predict(reference, inplace=False)
    query["rna"].var_names = reference["rna"].var_names.str.replace("-", ".")
    query.update_var()
    av.tl.map_query(query, reference, max_epochs=0)
    pd.testing.assert_frame_equal(av.get.proba(query), expected, check_names=False)


def test_counts_in_another_table_are_named():
    mdata = cite(200)
    prot = mdata["prot"]
    adata = mdata["rna"][prot.obs_names].copy()
    adata.obs["cell_type"] = mdata.obs["cell_type"].reindex(adata.obs_names)
    counts = pd.DataFrame(np.asarray(prot.X, dtype=float), prot.obs_names, prot.var_names)
    adata.obsm["counts"], adata.obsm["clr"] = counts, np.log1p(counts).sub(np.log1p(counts).mean(axis=1), axis=0)
    with pytest.raises(ValueError, match="Counts seem to be in obsm.'counts'.: pass prot_obsm='counts'"):
        av.tl.totalanvi(adata, prot_obsm="clr", **FIT)
    av.tl.totalanvi(adata, prot_obsm="counts", **FIT)


@pytest.mark.filterwarnings("ignore")
def test_next_commands_of_questions_about_other_objects(base, caplog):
    query = cite(300)
    query.obs = pd.DataFrame({"day": "new"}, query.obs_names)
    av.tl.map_query(query, base, max_epochs=0)
    av.metrics.criticism(query, n_samples=2)
    assert "'de' is left out: no labels of 'totalanvi' are known" in caplog.text
    # a layer that the query lacks
    own = base.copy()
    own["prot"].layers["counts"] = own["prot"].X.copy()
    av.tl.totalanvi(own, layer={"prot": "counts"}, key_added="own", **FIT)
    mdata = cite(300)
    with pytest.raises(KeyError, match="layer='counts' is not in") as found:
        av.tl.predict(mdata, model=av.get.model(own, "own"))
    exec(found.value.args[0].partition("has the counts: ")[2], {"mdata": mdata})
    av.tl.predict(mdata, model=av.get.model(own, "own"))
    # queries and groups
    mdata.obs["orig.ident"] = "x"
    with pytest.raises(ValueError, match="in backticks: `orig.ident`"):
        av.tl.differential_expression(mdata, groups={"g": "orig.ident == 'x'"}, model=av.get.model(own, "own"))
    nobody = next(name for name in base.uns["totalanvi"]["classes"])
    rest = base[(base.obs["totalanvi_prediction"] != nobody).to_numpy()].copy()
    with pytest.raises(ValueError, match=f"groups '{nobody}' of 'totalanvi_prediction': groupby= names another"):
        av.tl.attributions(rest, groups=[nobody])


def test_a_gene_that_is_found_by_its_name_is_not_given_to_another():
    """Dots for hyphens are R's; letters of other alphabets stay letters, and an exact name goes first."""
    rna = AnnData(np.ones((2, 3), dtype=np.float32), var=pd.DataFrame(index=["HLA-A", "CD3", "\u03b2Try"]))
    assert list(match_genes(("HLA-A", "HLA.A", "CD3", "\u03b1Try"), rna, None, "data").column) == [0, -1, 1, -1]
    rna.var_names = ["HLA.A", "MT.CO1", "Y_RNA"]
    assert list(match_genes(("HLA-A", "MT-CO1", "Y-RNA"), rna, None, "data").column) == [0, 1, 2]


@pytest.mark.parametrize("colors", [np.arange(5), [np.nan] * 5, [(255, 0, 0)] * 5, "none"], ids=str)
def test_what_is_no_colour_stops_no_fit(colors):
    mdata = cite(200)
    mdata.obs["cell_type"] = mdata.obs["cell_type"].astype("category")
    mdata.uns["cell_type_colors"] = colors
    av.tl.totalanvi(mdata, **FIT)


def test_dates_beyond_nanoseconds_are_told():
    mdata = cite(100)
    mdata.obs["when"] = np.array(["9999-12-31", "2024-01-01"] * (mdata.n_obs // 2), dtype="datetime64[s]")
    with pytest.raises(ValueError, match="'when' has dates or durations that are more than 292 years"):
        av.tl.totalanvi(mdata, continuous_covariate_keys=["when"], **FIT)
    mdata.obs["when"] = pd.date_range("2020", periods=mdata.n_obs, tz="Europe/Berlin")
    av.tl.totalanvi(mdata, continuous_covariate_keys=["when"], **FIT)
