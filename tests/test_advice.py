"""What messages advise: the next command does what it says when it is followed to the letter."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from helpers import cite
from scipy import sparse

import anvi as av

FIT = {"max_epochs": 1, "n_hidden": 8, "n_latent": 3}


@pytest.fixture(scope="module")
def fitted():
    """A small data set with a labelled model of it."""
    mdata = cite(300)
    with av.settings.override(verbosity=0, progress=False):
        av.tl.totalanvi(mdata, batch_key="batch", **FIT)
    return mdata


# what stands for a mask -----------------------------------------------------------------------------------------------

AS_MASK = {
    "zeros and ones": lambda b: b.astype(int).to_numpy(),
    "a list of them": lambda b: b.astype(int).tolist(),
    "a Series of them in another order": lambda b: b.astype(int).sort_values(),
    "objects": lambda b: b.astype(object).to_numpy(),
    "objects, some missing": lambda b: b[:200].reindex(b.index),
    "an array of these": lambda b: b[:200].reindex(b.index).to_numpy(),
    "zeros and ones, some missing": lambda b: b[:200].reindex(b.index).astype("Int64"),
    "names": lambda b: b.index[b],
    "a list of names": lambda b: list(b.index[b]),
    "positions": lambda b: np.flatnonzero(b),
}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("make", AS_MASK.values(), ids=AS_MASK)
def test_what_stands_for_a_mask_is_made_one(fitted, make):
    truth = fitted.obs["true_cell_type"] == "B"
    given, wanted = make(truth), truth & (np.arange(300) < 200) if "reindex" in make.__code__.co_names else truth
    with pytest.raises(TypeError, match=r"groups\['B'\] must be a boolean mask") as error:
        av.tl.differential_expression(fitted, groups={"B": given}, n_samples=50)
    (command,) = re.findall(r"(mask = .*)\.$", str(error.value))
    there = {"mask": given, "positions": given, "names": given, "np": np, "pd": pd, "data": fitted}
    exec(command, there)
    found = pd.Series(there["mask"], truth.index) if not isinstance(there["mask"], pd.Series) else there["mask"]
    pd.testing.assert_series_equal(found[truth.index], wanted, check_names=False)


def test_cells_of_a_score_that_are_no_mask(fitted):
    cells = (fitted.obs["true_cell_type"] == "B").astype(int).to_numpy()
    with pytest.raises(KeyError, match=r"cells: .* cells = pd.Series\(cells, data.obs_names\).astype\(bool\)"):
        av.metrics.classification(fitted, cells=cells, labels_key="true_cell_type")
    masked = pd.Series(cells, fitted.obs_names).astype(bool)
    assert len(av.metrics.classification(fitted, cells=masked, labels_key="true_cell_type"))


# layers of two modalities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, {"rna": "counts"}, {"prot": "raw"}])
def test_layers_that_are_named_one_after_the_other(first):
    """No advice takes back what an earlier one has named."""
    mdata, layer = cite(300), first
    for mod, name in (("rna", "counts"), ("prot", "raw")):
        mdata[mod].layers[name] = mdata[mod].X.copy()
        mdata[mod].X = np.log1p(np.asarray(mdata[mod].to_df())) - 1
    for _ in range(4):
        problems = av.pp.check(mdata, batch_key="batch", layer=layer).problems
        if not problems:
            break
        (advised,) = re.findall(r"pass layer=(\{.*?\})\.", problems[0])
        layer = eval(advised)
    assert layer == {"rna": "counts", "prot": "raw"} and not problems


# what a fit starts from -----------------------------------------------------------------------------------------------


def test_init_says_what_to_run():
    mdata = cite(300)
    fit = lambda init: av.tl.totalanvi(mdata, batch_key="batch", init=init, **FIT)
    with pytest.raises(KeyError, match=r"there are: none; run av.tl.totalvi\(data\) first, or pass another init="):
        fit("totalvi")
    av.tl.scvi(mdata, batch_key="batch", **FIT)
    with pytest.raises(ValueError, match=r"RNA alone cannot start .*: run av.tl.totalvi\(data\) .* init='totalvi'"):
        fit("scvi")
    av.tl.totalvi(mdata, batch_key="batch", **FIT)
    with pytest.raises(ValueError, match=r"with proteins cannot start .*: run av.tl.scvi\(data\) .* init='scvi'"):
        av.tl.scanvi(mdata, "true_cell_type", batch_key="batch", init="totalvi", **FIT)
    mdata.obs["batch"] = mdata.obs["batch"].astype(str).replace("batch_1", "new")
    with pytest.raises(ValueError, match=r"it has 3 \(only there: batch_1\), this fit 3 \(only here: new\)"):
        fit("totalvi")


def test_init_does_not_speak_of_genes(caplog):
    mdata = cite(300)
    av.tl.totalvi(mdata, **FIT)
    with caplog.at_level("INFO", "anvi"), av.settings.override(verbosity=2):
        av.tl.totalanvi(mdata, init="totalvi", **FIT)
    assert "genes= names" not in caplog.text and "60 of 60 genes: those that the model of init= has" in caplog.text


# which model, and which columns it wants ------------------------------------------------------------------------------


def test_a_file_of_a_fitted_object_is_no_model_yet(fitted, tmp_path):
    path, query = tmp_path / "fitted.h5mu", cite(300)
    fitted.write(path)
    with pytest.raises(KeyError, match=r"is a file of data: pass the model in it, av.get.model\('.*'\)") as error:
        av.tl.predict(query, model=str(path))
    (advised,) = re.findall(r"av\.get\.model\('.*?'\)", str(error.value))
    av.tl.predict(query, model=eval(advised))
    pd.testing.assert_series_equal(query.obs["totalanvi_prediction"], fitted.obs["totalanvi_prediction"])


def test_a_query_without_the_batch(fitted):
    query = cite(300)
    del query.obs["batch"]
    with pytest.raises(KeyError, match=r"knows 'batch_0', 'batch_1', 'batch_2': write into obs\['batch'\] .*map_query"):
        av.tl.predict(query, model=av.get.model(fitted))
    av.tl.map_query(query, fitted, max_epochs=0)
    query.obs["batch"] = "batch_0"
    av.tl.predict(query, model=av.get.model(fitted), key_added="again")


def test_a_covariate_that_is_not_there():
    mdata = cite(300)
    mdata.obs["age"], mdata.obs["n"] = 20.5 + np.arange(300) % 30, np.arange(300)
    for argument in ({"continuous_covariate_keys": ["years"]}, {"size_factor_key": "years"}):
        with pytest.raises(KeyError, match=r"Numeric columns there: 'age', 'n'\."):
            av.tl.totalvi(mdata, **argument, **FIT)
    with pytest.raises(KeyError, match=r"Categorical columns there: 'batch', .*'true_cell_type'\."):
        av.tl.totalvi(mdata, batch_key="years", **FIT)


# names of features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gene_key", [None, "symbol"])
def test_genes_with_blanks_behind_them(fitted, gene_key):
    query = cite(300)[:50].copy()
    query["rna"].var["symbol"] = [f"{name} " for name in query["rna"].var_names]
    query["rna"].var_names = [f"{name} " if gene_key is None else f"x{name}" for name in query["rna"].var_names]
    with pytest.raises(ValueError, match="agree but for blanks at the ends: ") as error:
        av.tl.map_query(query, fitted, gene_key=gene_key, max_epochs=0)
    exec(str(error.value).rpartition("ends: ")[2], {"mdata": query})
    av.tl.map_query(query, fitted, gene_key=gene_key, max_epochs=0)
    assert query.uns["totalanvi"]["reference"]["genes_matched"] == 100


@pytest.mark.parametrize("make", [np.asarray, list, pd.Series], ids=["array", "list", "Series"])
def test_a_mask_where_names_are_asked_for(fitted, make):
    mdata, mask = cite(300), make(np.arange(60) < 50)
    with pytest.raises(TypeError, match="genes= takes names, and this is a mask: genes=list") as error:
        av.tl.totalvi(mdata, genes=mask, **FIT)
    (advised,) = re.findall(r"genes=(list.*)", str(error.value))
    av.tl.totalvi(mdata, genes=eval(advised), **FIT)
    assert len(av.get.model(mdata).setup.genes) == 50
    mask = make(np.arange(20) < 12)
    with pytest.raises(TypeError, match=r"proteins=list\(mdata\['prot'\].var_names\[mask\]\)"):
        av.tl.totalvi(mdata, proteins=mask, **FIT)
    with pytest.raises(TypeError, match=r"features=list\(part.var_names\[mask\]\)"):
        av.tl.denoise(fitted, features=mask, inplace=False)


def test_colours_that_no_one_has_asked_for(fitted):
    """The raw counts of a protein are no denoised ones."""
    mdata, names = fitted.copy(), ["totalanvi_prot_denoised:P01", "totalanvi_prot_foreground:P01"]
    for name in names:
        with pytest.raises(KeyError, match=r"run av.tl.\w+\(data, model='totalanvi'\) first") as error:
            av.pl.embedding(mdata, "X_totalanvi", name, show=False)
        exec(re.findall(r"av\.tl.*\)", str(error.value))[0], {"av": av, "data": mdata})
        av.pl.embedding(mdata, "X_totalanvi", name, show=False)
    layer = {"rna": "totalanvi_denoised"}
    with pytest.raises(KeyError, match=r"no totalanvi_denoised; run av.tl.denoise\(data, model='totalanvi'\) first"):
        av.pl.embedding(fitted, "X_totalanvi", "G001", layer=layer, show=False)
    with pytest.raises(KeyError, match="nowhere"):
        av.pl.embedding(fitted, "X_totalanvi", "G001", layer="other", show=False)


# counts that are gone -------------------------------------------------------------------------------------------------


def test_emptied_counts_are_not_drawn(fitted):
    small = av.tl.minify(fitted, copy=True)
    for name, slot in (("G001", r"mdata\['rna'\].X"), ("prot:P01", r"mdata\['prot'\].X")):
        with pytest.raises(ValueError, match=f"{slot} is empty, as av.tl.minify leaves it; .* av.tl.denoise"):
            av.pl.embedding(small, "X_totalanvi", name, show=False)
    av.pl.embedding(small, "X_totalanvi", "totalanvi_prediction", show=False)
    av.tl.denoise(small)
    names = ["G001", "totalanvi_prot_denoised:P01"]
    av.pl.embedding(small, "X_totalanvi", names, layer={"rna": "totalanvi_denoised"}, show=False)


def test_emptied_counts_are_not_aligned():
    mdata = cite(300)
    av.tl.scvi(mdata, **FIT)
    small = av.tl.minify(mdata["rna"], copy=True)
    with pytest.raises(ValueError, match="data.X is empty: av.tl.minify dropped the counts"):
        av.pp.align_query(small, av.get.model(mdata))


# what the pages say ---------------------------------------------------------------------------------------------------


def test_the_dendrogram_of_the_page(fitted):
    """To the letter, for a class that nothing was predicted to be."""
    mdata = fitted.copy()
    mdata.obs["totalanvi_prediction"] = mdata.obs["true_cell_type"].cat.add_categories("nobody")
    av.tl.differential_expression(mdata, "totalanvi_prediction", n_samples=50)
    page = (Path(__file__).parents[1] / "docs" / "differential_expression.md").read_text("utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "sc.tl.dendrogram" in block]
    exec(textwrap.dedent(code), {"mdata": mdata, "sc": sc})
    assert "dendrogram_totalanvi_prediction" in mdata["rna"].uns
    page = (Path(__file__).parents[1] / "docs" / "hand_offs.md").read_text("utf-8")
    exec(re.findall(r"`(mdata.obs.*remove_unused_categories\(\))`", page)[0], {"mdata": mdata})
    sc.tl.dendrogram(mdata, "totalanvi_prediction", use_rep="X_totalanvi")


# notes of a check, which a fit tells, too -----------------------------------------------------------------------------


def told_by_both(caplog, mdata, **where):
    """Notes of a check that a fit logs word for word, and all that it notes."""
    notes = av.pp.check(mdata, **where).notes
    caplog.clear()
    with caplog.at_level("INFO", "anvi"), av.settings.override(verbosity=2):
        av.tl.totalanvi(mdata, **where, **FIT)
    return [note for note in notes if note in caplog.messages], notes


def test_names_of_a_tree_that_no_cell_has(caplog):
    mdata, tree = cite(300), {"T": ["CD4 T", "CD8  T", "CD9 T"]}
    both, _ = told_by_both(caplog, mdata, label_tree=tree)
    assert both == ["label_tree: 'CD8  T', 'CD9 T' are no label of any cell, and left out"]
    both, notes = told_by_both(caplog, mdata, label_tree={"L": ["T", "B"], "T": ["CD4 T", "CD8 T"]})
    assert not any("label_tree" in note for note in both + notes)


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "<NA>"])
def test_missing_values_as_text_are_told(caplog, text):
    mdata = cite(300)
    mdata.obs["b"] = mdata.obs["batch"].astype(str).replace("batch_1", text)
    n = (mdata.obs["b"] == text).sum()
    for where in ({"batch_key": "b"}, {"panel_key": "b"}):
        both, _ = told_by_both(caplog, mdata, **where)
        assert both[0].startswith(f"{[*where][0]}='b': {n} cells have the text '{text}', as .astype(str) makes it")
    assert not any("have the text" in note for note in av.pp.check(mdata, batch_key="batch").notes)


def test_missing_values_as_text_of_a_query_are_told(caplog):
    reference, query = cite(300), cite(100)
    av.tl.totalanvi(reference, batch_key="batch", **FIT)
    names = query.obs["batch"].astype(str)
    query.obs["batch"] = names.where(names != "batch_1", "nan")
    av.tl.map_query(query, reference, max_epochs=0)
    n = (query.obs["batch"] == "nan").sum()
    assert (
        len([line for line in caplog.messages if line.startswith(f"batch_key='batch': {n} cells have the text")]) == 1
    )
    caplog.clear()
    again = cite(100)
    av.tl.map_query(again, query, max_epochs=0)  # knows "nan", and has none
    assert not any("have the text" in line for line in caplog.messages)


def test_two_texts_that_are_one_number_are_told(caplog):
    mdata = cite(300)
    number = mdata.obs["batch"].astype(str).map({"batch_0": "1", "batch_1": "1.0", "batch_2": "1.1"})
    mdata.obs["b"], mdata.obs["whole"] = number, number.astype(float)
    for where in ({"batch_key": "b"}, {"panel_key": "b"}, {"labels_key": "b"}):
        both, _ = told_by_both(caplog, mdata, **where)
        assert f"{[*where][0]}='b': '1.0' and '1' are one category" in " ".join(both)
    _, notes = told_by_both(caplog, mdata, batch_key="whole")
    assert not any("are one category" in note for note in notes)


def test_a_check_sees_the_labels_that_a_fit_sees(caplog):
    mdata = cite(300)
    mdata.obs["label"] = mdata.obs["batch"].astype(str)
    both, _ = told_by_both(caplog, mdata, batch_key="batch", labels_key="label")
    assert both == ["every batch has labels of one class: what tells 'label' apart may be the batch"]


def test_iterators_of_names_and_what_is_no_mask():
    mdata = cite(200)
    genes = list(mdata["rna"].var_names[:20])
    av.tl.totalvi(mdata, genes=iter(genes), max_epochs=1)
    assert av.get.model(mdata).setup.genes == tuple(genes)
    assert av.tl.denoise(mdata, features=(name for name in genes[:3]), inplace=False).equals(
        av.tl.denoise(mdata, features=genes[:3], inplace=False)
    )
    for odd in (5, None, (True for _ in range(3))):
        with pytest.raises((TypeError, ValueError), match=r"groups\['B'\]"):
            av.tl.differential_expression(mdata, groups={"B": odd}, n_samples=20)


def test_zeros_that_are_counts_are_drawn():
    adata = cite(100)["rna"].copy()
    adata.obsm["X_map"] = np.random.default_rng(0).normal(size=(100, 2))
    adata.layers["none"] = sparse.csr_matrix(adata.shape, dtype=np.float32)
    assert av.pl.embedding(adata, "X_map", "G001", layer="none", show=False) is not None


def test_what_panels_would_drop_is_told_where_it_is_dropped(caplog):
    mdata = cite(300, n_panels=1, rna_only_batch=False)
    table = pd.DataFrame(True, index=mdata["prot"].var_names, columns=["batch_0", "batch_1", "batch_2"])
    table.loc["P01", "batch_0"] = False
    mdata["prot"].varm["measured"] = table
    av.pp.panels(mdata, "batch", harmonize="show")
    named = av.pp.panels(mdata, "batch", panels={"batch_0": list(table.index)}, copy=True)
    assert named["prot"].varm["measured"].loc["P01", "batch_0"]
    assert not [message for message in caplog.messages if "marked" in message]
    av.pp.panels(mdata, "batch", harmonize=True)
    del mdata["prot"].var["isotype"]
    av.pp.panels(mdata, "batch", harmonize=True)  # the others are ours
    assert "isotype" in mdata["prot"].var


# two steps, one after the other: what was written before stays true, and what is said next works ----------------------


def test_counts_that_were_normalised_after_the_fit_are_put_back_as_advised(fitted):
    mdata = fitted.copy()
    before = av.get.proba(mdata).copy()
    for mod in ("rna", "prot"):
        part = mdata[mod]
        part.layers["counts"] = part.X.copy()
        if mod == "rna":
            part.layers["X"] = mine = part.X.copy() * 2
        part.X = np.log1p(part.X.toarray() if sparse.issparse(part.X) else part.X)
        normalised = part.X.copy()
        with pytest.raises(ValueError, match=r"To ask a fit that has read X, put them back there: ") as told:
            av.tl.predict(mdata)
        exec(str(told.value).rpartition("put them back there: ")[2].rstrip("."), {"mdata": mdata})
        np.testing.assert_array_equal(part.layers["X_" if mod == "rna" else "X"], normalised)  # nothing is lost
    assert abs(mdata["rna"].layers["X"] - mine).max() == 0
    av.tl.predict(mdata)
    pd.testing.assert_frame_equal(av.get.proba(mdata), before)


def test_copies_that_disagree_are_told_what_any_verb_can_follow(fitted):
    mdata = fitted.copy()
    mdata["prot"].obs["batch"] = "x"
    with pytest.raises(ValueError, match="two copies that disagree") as told:
        av.tl.predict(mdata)
    advised = re.findall(r"del mdata\S*?\.obs\['batch'\]", str(told.value))
    assert advised == ["del mdata.obs['batch']", "del mdata['prot'].obs['batch']"]
    exec(advised[1], {"mdata": mdata})
    av.tl.predict(mdata)


def test_attributions_leave_predictions_and_what_was_compared_by_them():
    """The classifier's classes are other ones where neighbours have a say: they must not take the column's place."""
    mdata = cite(400)
    av.tl.totalanvi(mdata, batch_key="batch", n_neighbors=15, train_size=0.7, **FIT)
    classes = mdata.obs["totalanvi_prediction"].cat.categories
    mdata.obs["totalanvi_prediction"] = pd.Categorical(classes[np.arange(400) % len(classes)], classes)
    column = "totalanvi_prediction"
    av.tl.differential_expression(mdata, column, n_samples=20)
    av.tl.attributions(mdata, n_cells=3, baseline="zero")
    for mod in ("rna", "prot"):
        obs, uns = mdata[mod].obs, mdata[mod].uns
        assert (obs[column].astype(str) == mdata.obs[column].reindex(obs.index).astype(str)).all()
        assert uns["rank_genes_groups"]["params"]["groupby"] == column
        assert uns["totalanvi_attributions"]["params"]["groupby"] == "totalanvi_attributions_groups"
        assert not (obs["totalanvi_attributions_groups"].astype(str) == obs[column].astype(str)).all()
    sc.pl.rank_genes_groups_dotplot(mdata["rna"], n_genes=2, dendrogram=False, show=False)
    av.tl.totalanvi(mdata, batch_key="batch", **FIT)  # takes them away
    assert not any("totalanvi_attributions_groups" in mdata[mod].obs for mod in mdata.mod)


def test_labels_that_a_score_does_not_know_are_told(fitted, caplog):
    mdata = fitted.copy()
    known = mdata.obs["cell_type"].astype(str)
    mdata.obs["cell_type"] = known.where(known != "B", "my B")
    caplog.clear()
    for score in (av.metrics.elbo, lambda m: av.metrics.marginal_likelihood(m, use_labels=True, n_samples=2)):
        score(mdata)
        assert len([line for line in caplog.messages if f"no class 'my B' ({(known == 'B').sum()} cells)" in line]) == 1
        caplog.clear()
    scored = (mdata.obs["totalanvi_split"] == "validation").to_numpy() & (known == "B").to_numpy()
    av.metrics.elbo(mdata, split="validation")
    assert any(f"no class 'my B' ({scored.sum()} cells)" in line for line in caplog.messages) == scored.any()
    caplog.clear()
    av.metrics.elbo(mdata, use_labels=False)
    assert not [line for line in caplog.messages if "my B" in line]


def test_labels_that_were_edited_by_hand_are_not_overwritten(fitted, no_training):
    mdata = fitted.copy()
    mdata.obs["totalanvi_label"] = mdata.obs["totalanvi_label"].astype(str).replace("B", "B, looked at by hand")
    before = mdata.obs["totalanvi_label"].copy()
    for again in (av.tl.predict, lambda m: av.tl.totalanvi(m, batch_key="batch", **FIT)):
        with pytest.raises(ValueError, match=r"obs\['totalanvi_label'\] has names .*'B, looked at by hand'.*rename it"):
            again(mdata)
    pd.testing.assert_series_equal(mdata.obs["totalanvi_label"], before)
    mdata.obs["curated"] = mdata.obs.pop("totalanvi_label")
    av.tl.predict(mdata)
    # what the user says in the labels' own column is no edit
    mdata.obs["cell_type"] = mdata.obs["cell_type"].astype(str).replace("B", "my B")
    av.tl.predict(mdata)
    assert (mdata.obs["totalanvi_label"] == "my B").any()
    mdata.obs["cell_type"] = mdata.obs["cell_type"].replace("my B", "B")  # nor is what it was, once it is another
    av.tl.predict(mdata)
    assert not (mdata.obs["totalanvi_label"] == "my B").any()
    query = cite(100)
    query.obs["own"] = np.where(query.obs["cell_type"] == "B", "B cell", "Unknown")
    for _ in range(2):
        av.tl.map_query(query, fitted, labels_key="own", max_epochs=0)
    query.obs["own"] = "B"
    av.tl.map_query(query, fitted, labels_key="own", max_epochs=0)


def test_a_ranking_has_what_its_modality_has(fitted):
    """Of a query with a smaller panel: scanpy's plots look for every feature that is ranked."""
    query = av.datasets.synthetic_cite(200, n_genes=60, random_state=4)
    query.mod["prot"] = query["prot"][:, 3:15].copy()
    query.update()
    query.obs["batch"], query.obs["half"] = "new", np.where(np.arange(query.n_obs) % 2, "a", "b")
    av.tl.map_query(query, fitted, max_epochs=0)
    whole = av.tl.differential_expression(query, "half", n_samples=20, inplace=False)["prot"]
    av.tl.differential_expression(query, "half", n_samples=20)
    written = av.get.de(query, modality="prot")
    names = query["prot"].var_names
    assert set(written["names"]) == set(names) and len(whole) > len(written)
    kept = whole[whole["names"].isin(names)].reset_index(drop=True)
    for column in ("names", "scores", "logfoldchanges", "pvals_adj"):
        np.testing.assert_array_equal(written[column], kept[column])
    av.tl.attributions(query, groupby="half", baseline="zero", n_cells=5)
    assert set(query["prot"].uns["totalanvi_attributions"]["names"]["a"]) == set(names)
    assert list(query["prot"].varm["totalanvi_attributions"].dropna().index) == list(names)
    av.pl.attributions(query, show=False)
    for plot in (sc.pl.rank_genes_groups_dotplot, sc.pl.rank_genes_groups_matrixplot):
        plot(query["prot"], n_genes=4, dendrogram=False, show=False)
        plot(query["prot"], n_genes=4, dendrogram=False, show=False, key="totalanvi_attributions")


def test_a_fit_starts_from_another_whose_features_stood_in_another_order():
    mdata = cite(300)
    av.tl.totalvi(mdata, batch_key="batch", **FIT)
    turned = mdata.copy()
    for mod in ("rna", "prot"):
        turned.mod[mod] = turned[mod][:, ::-1].copy()
    turned.update()
    for data in (mdata, turned):
        av.tl.totalanvi(data, batch_key="batch", init="totalvi", **FIT)
    np.testing.assert_array_equal(turned[mdata.obs_names].obsm["X_totalanvi"], mdata.obsm["X_totalanvi"])
    one, other = (av.tl.denoise(data, model="totalanvi", inplace=False)["prot"].to_pandas() for data in (mdata, turned))
    pd.testing.assert_frame_equal(one, other.loc[one.index, one.columns])


def test_a_panel_column_that_is_gone_says_what_the_model_knows():
    mdata = cite(300)
    av.tl.totalanvi(mdata, batch_key="batch", panel_key="panel", **FIT)
    del mdata.obs["panel"]
    with pytest.raises(KeyError, match=r"panel_key='panel' was found in none.*The model knows 'panel_0', 'panel_1'"):
        av.tl.predict(mdata)
