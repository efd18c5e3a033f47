"""Other people's data, once wrong answers without a word: covariates, size factors, labels, keys, tiny queries."""

import re
from functools import partial

import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from helpers import cite

import anvi as av
from anvi._data.setup import ALL_ZERO_CELLS, Setup
from anvi._fit.plan import Plan


def with_covariate(values, **options):
    mdata = cite(300)
    mdata.obs["age"] = values(np.random.default_rng(0).normal(size=300))
    av.tl.totalanvi(mdata, batch_key="batch", continuous_covariate_keys=["age"], max_epochs=2, **options)
    return mdata


def test_the_unit_of_a_continuous_covariate_does_not_matter():
    days, years = with_covariate(lambda z: 20_000 + 5_000 * z), with_covariate(lambda z: (20_000 + 5_000 * z) / 365.25)
    np.testing.assert_allclose(days.obsm["X_totalanvi"], years.obsm["X_totalanvi"], atol=1e-3)
    setup = av.get.model(days).setup
    ((mean, deviation),) = setup.continuous_scale
    assert mean == pytest.approx(days.obs["age"].mean()) and deviation == pytest.approx(days.obs["age"].std(ddof=0))
    assert Setup.from_dict(setup.to_dict()) == setup


def test_a_query_is_put_on_the_scale_of_the_fit():
    """One cell alone has a deviation of 0: its answer is that among the others."""
    mdata = with_covariate(lambda z: 20_000 + 5_000 * z)
    some = mdata[:40].copy()
    av.tl.latent(some, model=av.get.model(mdata), key_added="again")
    np.testing.assert_allclose(some.obsm["X_again"], mdata.obsm["X_totalanvi"][:40], atol=1e-4)


def test_covariates_of_the_published_objective_stay_as_they_are():
    mdata = with_covariate(lambda z: z, objective="scvi-tools")
    assert av.get.model(mdata).setup.continuous_scale == ()


def test_a_constant_covariate_is_left_out_with_a_word(caplog):
    mdata = with_covariate(lambda z: np.full(len(z), 2019.0))
    assert av.get.model(mdata).setup.continuous == ()
    assert "continuous covariate age: the same in all cells, but for rounding; left out" in caplog.text


@pytest.mark.parametrize("scale", [[(0.0, 0.0)], [(0.0, -1.0)], [(float("nan"), 1.0)], [(0.0,)], [], [("a", 1.0)]])
def test_a_damaged_scale_is_refused(scale):
    setup = Setup(genes=("a",), batches=("all",), continuous=("x", "y")).to_dict()
    with pytest.raises(ValueError, match="setup is damaged"):
        Setup.from_dict(setup | {"continuous_scale": [*scale, *scale, (0.0, 1.0)]})


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e3])
def test_the_unit_of_size_factors_does_not_matter(unit):
    def fit(unit):
        mdata = cite(300)
        totals = np.asarray(mdata["rna"].X.sum(1)).ravel()
        mdata["rna"].obs["size"] = totals * unit
        av.tl.scvi(mdata, size_factor_key="size", max_epochs=2)
        return mdata["rna"].obsm["X_scvi"], av.get.model(mdata)

    (expected, _), (found, model) = fit(1.0), fit(unit)
    # a few steps carry the rounding of the scale to 32 bits this far; a wrong unit moves the latent vectors by 1
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert model.setup.size_factor_scale == pytest.approx(1 / unit, rel=1e-4)


@pytest.mark.parametrize("value", ["nan", "None", "NA", "unknown", "unassigned", "Unassigned", "unlabeled"])
def test_labels_that_mean_none_are_told(value, caplog):
    mdata = cite(300)
    labels = mdata.obs["cell_type"].astype(str).replace("Unknown", value)
    mdata.obs["cell_type"] = labels
    report = str(av.pp.check(mdata, batch_key="batch"))
    n = (labels == value).sum()
    assert f"{n} cells are labelled '{value}'" in caplog.text and f"unlabeled_category='{value}'" in caplog.text
    caplog.clear()
    assert report and av.pp.check(mdata, unlabeled_category=value) is not None  # the advice
    assert "are labelled" not in caplog.text


@pytest.mark.parametrize("argument", ["unlabeled_category", "batch_key", "rna_mod"])
def test_keys_of_the_wrong_kind(argument, no_training):
    with pytest.raises(TypeError, match=argument):
        av.tl.totalanvi(
            cite(200), **{"batch_key": "batch", argument: [["Unknown"]]}
        )  # labels_key may be a list of names


def test_in_a_few_cells_a_protein_of_zeros_is_measured(fitted):
    """What a query says of a cell does not depend on whether another cell has a count of a rare protein."""
    model = av.get.model(fitted, "totalanvi")
    cells = fitted["prot"].obs_names[: ALL_ZERO_CELLS - 1]
    pair, alone = fitted[cells].copy(), fitted[cells[:1]].copy()
    for part in (pair, alone):
        av.tl.predict(part, model=model, key_added="few")
    np.testing.assert_allclose(
        np.asarray(av.get.table(pair, "few_proba"))[0], np.asarray(av.get.table(alone, "few_proba"))[0], atol=1e-5
    )


# names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["batch", "cell_type"])
def test_a_column_that_stands_twice(key, no_training):
    adata = cite(200)["rna"].copy()
    adata.obs["batch"], adata.obs["cell_type"] = "one", np.arange(200) % 3
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    adata.obs = pd.concat([adata.obs, adata.obs[[key]]], axis=1)
    with pytest.raises(ValueError, match=f"'{key}' stands twice in data.obs") as error:
        av.tl.scanvi(adata, batch_key="batch")
    exec(str(error.value).split("Keep the first: ")[1], {"data": adata})  # the advice
    assert "ready to fit" in str(av.pp.check(adata, batch_key="batch"))


@pytest.mark.parametrize("longer", ["rna", "prot"])
def test_barcodes_that_differ_by_a_suffix(longer, no_training):
    whole = av.datasets.synthetic_cite(200, n_genes=40, n_batches=1, n_panels=1, rna_only_batch=False)
    mods = {mod: whole[mod].copy() for mod in ("rna", "prot")}
    mods[longer].obs_names = [f"{name}-1" for name in mods[longer].obs_names]
    mdata = mudata.MuData(mods)
    with pytest.raises(ValueError, match="None of the 200 cells that have proteins") as error:
        av.tl.totalvi(mdata)
    there = {"mdata": mdata, "mudata": mudata}
    exec(str(error.value).split("Make them the same: ")[1].rstrip("."), there)
    assert "ready to fit" in str(av.pp.check(there["mdata"], labels_key=None))


@pytest.mark.parametrize("groups", [3, "3", [3], np.array([3])], ids=["number", "text", "list", "array"])
@pytest.mark.parametrize("reference", [4, "4"], ids=["number", "text"])
def test_groups_that_are_numbers(fitted, groups, reference):
    fitted.obs["leiden"] = np.arange(300) % 6
    options = {"model": "totalvi", "n_samples": 50, "inplace": False}
    found = av.tl.differential_expression(fitted, "leiden", groups=groups, reference=reference, **options)["rna"]
    assert list(found["group"].cat.categories) == ["3"]


def test_a_folder_of_scvi_tools_is_called_so(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="av.io.from_scvi_tools"):
        av.read_model(tmp_path)


# values that are no counts ----------------------------------------------------------------------------------------


def normalised(keep):
    adata = cite(200)["rna"].copy()
    if keep:
        adata.raw = adata.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def test_log_values_with_counts_in_raw(no_training):
    data = normalised(keep=True)
    with pytest.raises(ValueError, match="Counts seem to be in .raw: ") as error:
        av.tl.scvi(data)
    exec(str(error.value).split("in .raw: ")[1], {"data": data})
    assert "ready to fit" in str(av.pp.check(data, labels_key=None))


@pytest.mark.parametrize("scaled", [False, True])
def test_nobody_is_told_to_round_what_were_no_counts(scaled, no_training):
    data = normalised(keep=False)
    if scaled:
        data.X = data.X.toarray()
        sc.pp.scale(data)
    with pytest.raises(ValueError, match="scaled" if scaled else "logarithms") as error:
        av.tl.scvi(data)
    assert "rint" not in str(error.value)


def test_corrected_counts_may_be_rounded(no_training):
    data = cite(200)["rna"].copy()
    data.X = data.X.toarray() * 0.9
    data.X[0, 0] = 40.5
    with pytest.raises(ValueError, match="numpy.rint") as error:
        av.tl.scvi(data)
    exec(str(error.value).split("rounded: ")[1].rstrip("."), {"data": data, "numpy": np})
    data = data[np.asarray(data.X.sum(1)).ravel() > 0].copy()
    assert "ready to fit" in str(av.pp.check(data, labels_key=None))


# answers that were wrong, or to a question that nobody had asked, as public reports have them -------------------------


@pytest.fixture(scope="module")
def labelled():
    """A small data set with a labelled model, and a covariate in years."""
    mdata = cite(300)
    mdata.obs["age"] = 20.0 + np.arange(300) % 30
    mdata["rna"].obs["depth"] = np.asarray(mdata["rna"].X.sum(1)).ravel()
    mdata["rna"].obs.loc[mdata["rna"].obs_names[0], "depth"] *= 2  # so that their scale is not 1
    options = {"batch_key": "batch", "continuous_covariate_keys": ["age"], "size_factor_key": "depth"}
    with av.settings.override(verbosity=0, progress=False):
        av.tl.totalanvi(mdata, **options, max_epochs=2, n_hidden=16)
    return mdata


def test_a_covariate_in_another_unit_is_told(labelled, caplog):
    av.tl.latent(labelled, inplace=False)
    av.tl.latent(labelled[:1].copy(), inplace=False)
    assert "another unit" not in caplog.text
    query = labelled.copy()
    query.obs["age"] *= 365
    av.tl.predict(query)
    assert "covariate 'age' is 7300 to 1.788e+04 here and 34.5 +- 8.655 in the cells of the fit" in caplog.text


@pytest.mark.parametrize("unit", [1e-4, 100.0])
def test_size_factors_in_another_unit_are_told(labelled, unit, caplog):
    query = labelled.copy()
    query["rna"].obs["depth"] /= 10  # a shallow sample
    av.tl.denoise(query, features=["G001"], library_size="observed", inplace=False)
    assert "another unit" not in caplog.text
    query["rna"].obs["depth"] *= 10 * unit
    av.tl.denoise(query, features=["G001"], library_size="observed", inplace=False)
    assert "size factors 'depth' are" in caplog.text and "another unit" in caplog.text


@pytest.mark.parametrize("dtype", [bool, "boolean"])
def test_a_mask_of_cells_goes_by_their_names(labelled, dtype):
    mask = (labelled.obs["batch"] == "batch_0").astype(dtype)
    expected = av.metrics.classification(labelled, cells=labelled.obs_names[mask.to_numpy(dtype=bool)])
    for same in (mask, mask[::-1], mask.tolist(), mask.to_numpy(dtype=bool)):
        pd.testing.assert_frame_equal(av.metrics.classification(labelled, cells=same), expected)
    with pytest.raises(ValueError, match="cells is a Series whose index does not hold every cell"):
        av.metrics.classification(labelled, cells=mask[:-1])
    with pytest.raises(ValueError, match="cells has 299 entries"):
        av.metrics.classification(labelled, cells=mask.to_numpy(dtype=bool)[:-1])


def test_a_mask_with_missing_values_is_refused(labelled):
    mask = pd.Series(pd.array([True, None] * 150, dtype="boolean"), labelled.obs_names)
    for ask in (
        lambda: av.metrics.classification(labelled, cells=mask),
        lambda: av.tl.differential_expression(labelled, groups={"some": mask}, inplace=False),
    ):
        with pytest.raises(ValueError, match=r"missing values.*fillna"):
            ask()


def test_renamed_labels_are_told(labelled, caplog):
    mdata = labelled.copy()
    av.metrics.classification(mdata)
    assert "no class of the model" not in caplog.text
    mdata.obs["cell_type"] = mdata.obs["cell_type"].cat.rename_categories({"B": "B cells"})
    for ask in (av.metrics.classification, av.pl.confusion):
        caplog.clear()
        ask(mdata, split=None)
        assert "labels in 'cell_type' that are no class of the model: 'B cells' (" in caplog.text


def test_renamed_predictions_are_told_and_drawn(labelled, caplog):
    mdata = labelled.copy()
    mdata.obs["totalanvi_prediction"] = mdata.obs["totalanvi_prediction"].cat.rename_categories(
        lambda name: f"a {name}"
    )
    ax = av.pl.confusion(mdata, split=None, show=False)
    assert "100 labelled" in ax.get_title()  # they were left out of picture and number
    for ask in (av.metrics.classification, av.pl.confusion, av.get.proba):
        caplog.clear()
        ask(mdata)
        assert "'totalanvi_prediction'] that are no class of the model: 'a " in caplog.text


def test_probabilities_of_two_fits_are_not_joined_without_a_word(labelled, caplog):
    """mudata.concat puts the arrays of both under the names of the first."""
    other = labelled.copy()
    other.obs["cell_type"] = other.obs["cell_type"].cat.rename_categories({"B": "Zeta"})
    for part in other.mod.values():
        part.obs_names = "q" + part.obs_names
    other = mudata.MuData(dict(other.mod))
    for name in ("cell_type", "batch", "age"):
        values = labelled.obs[name].cat.rename_categories({"B": "Zeta"}) if name == "cell_type" else labelled.obs[name]
        other.obs[name] = values.set_axis("q" + values.index).reindex(other.obs_names)
    av.tl.totalanvi(other, batch_key="batch", max_epochs=1, n_hidden=8)
    other.obs.loc[other.obs_names[0], "totalanvi_prediction"] = "Zeta"
    both = mudata.concat([labelled, other], uns_merge="first")
    caplog.clear()
    av.get.proba(both)
    assert "no class of the model: 'Zeta'" in caplog.text


def test_words_that_are_names_of_the_user_s_too(labelled, caplog):
    mdata = labelled.copy()
    mdata.obs["group"] = mdata.obs["true_cell_type"].astype(str).replace({"B": "rest", "NK": "zero"})
    av.tl.differential_expression(mdata, "group", groups=["rest", "CD4 T"], n_samples=50, inplace=False)
    assert "reference='rest' means all other cells, not the group 'rest'" in caplog.text
    caplog.clear()
    av.tl.differential_expression(mdata, "group", groups=["CD4 T"], reference="zero", n_samples=50, inplace=False)
    assert "means" not in caplog.text
    av.tl.attributions(mdata, groupby="group", baseline="zero", n_cells=3, n_steps=2, inplace=False)
    assert "baseline='zero' means no counts, not the group 'zero'" in caplog.text


def test_a_batch_called_all():
    mdata = cite(120)
    mdata.obs["batch"] = mdata.obs["batch"].astype(str).replace({"batch_0": "all"})
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1, n_hidden=8)
    with pytest.raises(ValueError, match=r"\['all'\]"):
        av.tl.denoise(mdata, transform_batch="all", features=["G001"], inplace=False)
    one = av.tl.denoise(mdata, transform_batch=["all"], features=["G001"], inplace=False)
    every = av.tl.denoise(mdata, transform_batch=["all", "batch_1", "batch_2"], features=["G001"], inplace=False)
    assert not np.allclose(one, every)


def test_genes_of_another_kind_are_shown(labelled):
    mdata = labelled.copy()
    mdata["rna"].var_names = [f"ENSG{i:03d}" for i in range(60)]
    mdata.update()
    with pytest.raises(ValueError, match=r"\(G001, G002, G003, ...\).*\(here 'ENSG000', 'ENSG001'"):
        av.tl.latent(mdata, inplace=False)


def test_many_rare_classes_are_some_of_them(caplog):
    mdata = cite(120)
    mdata.obs["fine"] = [f"type {i % 40}" for i in range(120)]
    av.tl.totalanvi(mdata, "fine", max_epochs=1, n_hidden=8)
    assert "type 15 (3) and 32 more; expect" in caplog.text


def test_copies_in_the_modalities_follow_what_they_copy(labelled):
    mdata = labelled.copy()
    mdata["prot"].obs["batch"] = mdata.obs["batch"]
    columns = ["totalanvi_prediction", "totalanvi_label", "totalanvi_confidence"]
    mdata.push_obs(columns=columns)
    mdata.obs["cell_type"] = "Unknown"  # so that the label is the prediction
    av.tl.predict(mdata)
    for part in mdata.mod.values():
        for column in columns:
            assert part.obs[column].equals(mdata.obs[column].reindex(part.obs_names)), column
    mdata.obs["cell_type"] = labelled.obs["cell_type"]
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1, n_hidden=8, random_state=1)
    for part in mdata.mod.values():
        assert not {"totalanvi_split", "totalanvi_novelty"} & set(part.obs)
        for column in set(columns) & set(part.obs):
            assert part.obs[column].equals(mdata.obs[column].reindex(part.obs_names)), column


def test_what_was_made_of_an_earlier_fit_is_told(labelled, caplog):
    mdata = labelled.copy()
    sc.pp.neighbors(mdata, use_rep="X_totalanvi")
    av.tl.differential_expression(mdata, "cell_type", n_samples=50)
    sc.pp.normalize_total(other := mdata["rna"].copy())
    sc.tl.rank_genes_groups(other, "cell_type", key_added="scanpys")
    mdata["rna"].uns["scanpys"] = other.uns["scanpys"]
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1, n_hidden=8)
    assert "earlier fit" not in caplog.text
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1, n_hidden=8)
    slots = "uns['neighbors'], mdata['rna'].uns['rank_genes_groups'], mdata['prot'].uns['rank_genes_groups'], and what"
    assert f"{slots} was made of it, is of the earlier fit 'totalanvi'" in caplog.text


def test_labels_changed_after_the_fit_are_told(labelled, caplog):
    mdata = labelled.copy()
    av.tl.predict(mdata)
    assert "has no class" not in caplog.text
    mdata.obs["cell_type"] = mdata.obs["cell_type"].cat.rename_categories({"B": "B cell"})
    av.tl.predict(mdata)
    assert (
        "labels_key='cell_type': the model has no class 'B cell' (26 cells); these cells are predicted" in caplog.text
    )
    assert (mdata.obs["totalanvi_label"] == "B cell").sum() == 26


@pytest.mark.parametrize(
    "keys",
    [
        {"labels_key": "totalanvi_prediction"},
        {"labels_key": "totalanvi_label"},
        {"categorical_covariate_keys": ["totalanvi_split"]},
        {"continuous_covariate_keys": ["totalanvi_confidence"]},
    ],
)
def test_a_fit_does_not_learn_from_what_it_writes(labelled, keys):
    """Predictions held against themselves are right in all cells."""
    mdata = labelled.copy()
    mdata.obs["totalanvi_prediction"] = mdata.obs["true_cell_type"]  # two classes and more
    with pytest.raises(ValueError, match=r"write its own answers there.*key_added="):
        av.tl.totalanvi(mdata, **keys, max_epochs=1)
    av.tl.totalanvi(mdata, **keys, max_epochs=1, n_hidden=8, key_added="again")


def test_groups_and_colours_that_are_not_there(labelled):
    draw = partial(av.pl.embedding, labelled, "X_totalanvi", color=["true_cell_type", "P01"], show=False)
    draw(groups=["B", "NK"])
    with pytest.raises(KeyError, match="groups: 'Bee' is no value of what is coloured; there are.*'B'"):
        draw(groups=["Bee"])
    with pytest.raises(KeyError, match="palette has no colour for 'CD14 Mono'"):
        draw(palette={"B": "red"})


def test_columns_that_update_made_of_copies_do_not_outlive_a_fit(labelled):
    mdata = labelled.copy()
    columns = ["totalanvi_prediction", "totalanvi_label"]
    mdata.push_obs(columns=columns)
    av.tl.attributions(mdata, n_cells=3, n_steps=2, baseline="zero", per_cell=True)
    mdata.pull_obs()
    pulled = {f"rna:{column}" for column in [*columns, "totalanvi_explained"]}
    assert pulled <= set(mdata.obs.columns)
    mdata.obs["rna:of the user"] = 1
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1, n_hidden=8, random_state=1)
    assert not {name for name in mdata.obs if name.startswith(("rna:totalanvi", "prot:totalanvi"))}
    assert "rna:of the user" in mdata.obs
    mdata.push_obs(columns=columns)  # as the log advises
    mdata.pull_obs()
    av.tl.predict(mdata)
    assert not pulled & set(mdata.obs.columns)


def test_a_minibatch_is_not_larger_than_the_data():
    mdata = cite(100)
    plan = Plan(batch_size=10**9).for_cells(80, warm_start=False)
    assert (plan.batch_size, plan.labelled_batch_size) == (80, 40)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1, n_hidden=8, batch_size=10**9)
    assert "X_totalanvi" in mdata.obsm


@pytest.mark.parametrize("verb", ["scanvi", "totalanvi"])
def test_fits_that_learn_labels_want_some(verb):
    mdata = cite(60)
    with pytest.raises(ValueError, match="labels_key=None: name the column .* use tl.totalvi or tl.scvi"):
        getattr(av.tl, verb)(mdata, labels_key=None, max_epochs=1)
    for argument in ("rna_mod", "prot_mod"):
        with pytest.raises(TypeError, match=f"{argument}= takes one name, a str; got NoneType"):
            av.tl.totalanvi(mdata, **{argument: None}, max_epochs=1)


def test_modalities_renamed_after_the_fit(labelled):
    """Every verb and reader that needs to know where things are takes the new names."""
    mdata = mudata.MuData({"gex": labelled["rna"].copy(), "adt": labelled["prot"].copy()})
    mdata.obs = labelled.obs.loc[mdata.obs_names].copy()
    mdata.uns.update(labelled.uns)
    there = {"rna_mod": "gex", "prot_mod": "adt"}
    av.tl.denoise(mdata, **there)
    av.tl.foreground(mdata, **there)
    same = av.tl.denoise(labelled, inplace=False)
    found = av.get.denoised(mdata, **there)[list(labelled["rna"].var_names)]
    np.testing.assert_array_equal(found.reindex(labelled.obs_names), same["rna"])
    pd.testing.assert_series_equal(
        av.get.library_size(mdata, **there).reindex(labelled.obs_names), av.get.library_size(labelled)
    )
    assert "gex_mean" in av.get.likelihood_parameters(mdata, **there)
    assert len(av.pl.foreground(mdata, prot_mod="adt", show=False))
    with pytest.raises(KeyError, match="modality 'prot'; add the protein counts .* or pass prot_mod=, first"):
        av.pl.foreground(mdata, show=False)
    small = av.tl.minify(mdata, copy=True, **there)
    assert small["gex"].X.nnz == 0
    np.testing.assert_array_equal(
        av.tl.latent(small, inplace=False, **there), av.tl.latent(mdata, inplace=False, **there)
    )


def test_a_name_of_a_query_is_named_as_one(labelled):
    """The advice of readers that find no answer under a key runs, and then they do."""
    mdata, said = labelled.copy(), []
    av.tl.predict(mdata, key_added="second")
    for read in (
        lambda: av.pl.predictions(mdata, model="second", basis=None, show=False),
        lambda: av.get.denoised(mdata, ["G001"], key_added="second"),
        lambda: av.get.denoised(mdata, ["G001"]),
    ):
        with pytest.raises(KeyError) as error:
            read()
        (advice,) = re.findall(r"run (av\.tl\.\w+\(data, .*?\)) first", str(error.value))
        said.append(advice)
        exec(advice, {"av": av, "data": mdata})
        read()
    assert said[0] == "av.tl.latent(data, key_added='second')" and said[2] == "av.tl.denoise(data, model='totalanvi')"
    query = labelled[:80].copy()
    del query.obsm["X_totalanvi"], query.uns["totalanvi"]
    av.tl.predict(query, model=av.get.model(labelled))
    with pytest.raises(KeyError, match=r"run av.tl.latent\(data, model=..., key_added='totalanvi'\) first"):
        av.pl.predictions(query, show=False)
