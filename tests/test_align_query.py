"""A query with the genes and proteins of a model, and nothing else changed."""

import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import assert_same, cite, contents, dense, mudata_of, permuted, quiet_mudata
from scipy import sparse

import anvi as av
from anvi._data.query import match_genes


@pytest.fixture(scope="module")
def model():
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        reference = cite()
        av.tl.totalvi(reference, batch_key="batch", max_epochs=1)
    return av.get.model(reference)


@pytest.fixture
def query():
    """Cells of another draw in another order: genes G051 to G060 and proteins P16 to P20 are missing."""
    whole = cite(200, random_state=1)
    rna = whole["rna"][:, np.random.default_rng(0).permutation(50)].copy()
    rna.layers["raw"] = rna.X.copy()
    rna.var_names = [name if name != "G007" else "unheard of" for name in rna.var_names]
    prot = whole["prot"][:, np.arange(14, -1, -1)].copy()
    prot.var_names = [name if name != "P03" else "isotype" for name in prot.var_names]
    query = mudata_of({"rna": rna, "prot": permuted(prot, 1)}, whole)
    query.obsm["X_mine"] = np.arange(400.0).reshape(200, 2)
    query.obsm["table"] = pd.DataFrame({"a": range(200)}, index=query.obs_names)
    query.uns["mine"] = {"a": 1}
    return query


def by_name(adata: AnnData, names, layer=None) -> pd.DataFrame:
    """Counts by name of cell and feature, features that are not there as zeros, name by name."""
    matrix = dense(adata.X if layer is None else adata.layers[layer])
    table = {name: matrix[:, list(adata.var_names).index(name)] for name in names if name in adata.var_names}
    return pd.DataFrame({name: table.get(name, np.zeros(len(matrix))) for name in names}, index=adata.obs_names)


def test_genes(model, query):
    before = contents(query)
    aligned = av.pp.align_query(query, model)
    assert_same(contents(query), before)
    rna = aligned["rna"]
    assert tuple(rna.var_names) == model.setup.genes and sparse.issparse(rna.X)
    missing = {"G007", *(f"G{i:03d}" for i in range(51, 61))}
    assert set(rna.var_names[rna.var["anvi_padded"]]) == missing
    for layer in (None, "raw"):
        expected = by_name(query["rna"], model.setup.genes, layer)
        found = pd.DataFrame(dense(rna.X if layer is None else rna.layers[layer]), rna.obs_names, rna.var_names)
        pd.testing.assert_frame_equal(
            found.loc[expected.index], expected, check_dtype=False, check_names=False, check_column_type=False
        )


def test_proteins(model, query):
    aligned = av.pp.align_query(query, model)
    prot = aligned["prot"]
    assert tuple(prot.var_names) == model.setup.proteins
    missing = prot.var["anvi_padded"].to_numpy()
    assert set(prot.var_names[missing]) == {"P03", *(f"P{i}" for i in range(16, 21))}
    assert np.isnan(prot.X[:, missing]).all()
    theirs = pd.DataFrame(query["prot"].X, query["prot"].obs_names, query["prot"].var_names)
    kept = prot.var_names[~missing]
    found = pd.DataFrame(prot.X[:, ~missing], prot.obs_names, kept)
    pd.testing.assert_frame_equal(found.loc[theirs.index], theirs[kept], check_column_type=False)
    measured = prot.varm["measured"]
    assert list(measured) == ["batch_0", "batch_1", "batch_2"] and not measured.loc[missing].any(axis=None)
    # those that are measured are those that somebody has a count of
    for batch in ("batch_0", "batch_1"):
        rows = aligned.obs["batch"].reindex(prot.obs_names).to_numpy() == batch
        np.testing.assert_array_equal(measured[batch], ~np.isnan(prot.X[rows]).all(0))


def test_what_the_query_says_of_its_panels_is_kept(model, query):
    table = pd.DataFrame(True, index=query["prot"].var_names, columns=["batch_0", "batch_1"])
    table.loc["P05", "batch_0"] = False
    query["prot"].varm["measured"] = table
    found = av.pp.align_query(query, model)["prot"].varm["measured"]
    assert list(found) == list(table) and not found.loc["P05", "batch_0"] and found.loc["P05", "batch_1"]
    assert not found.loc[["P03", "P16"]].any(axis=None) and found.dtypes.eq("bool").all()


def test_cells_and_what_is_known_of_them_stay(model, query):
    aligned = av.pp.align_query(query, model)
    assert set(aligned.obs_names) == set(query.obs_names)
    pd.testing.assert_frame_equal(aligned.obs.loc[query.obs_names, query.obs.columns], query.obs)
    row = aligned.obs_names.get_indexer(query.obs_names)
    np.testing.assert_array_equal(aligned.obsm["X_mine"][row], query.obsm["X_mine"])
    pd.testing.assert_frame_equal(aligned.obsm["table"].loc[query.obs_names], query.obsm["table"])
    assert aligned.uns["mine"] == {"a": 1} and aligned.uns["mine"] is not query.uns["mine"]
    assert set(aligned["prot"].obs_names) == set(query["prot"].obs_names) < set(aligned.obs_names)


def test_it_survives_a_file(model, query, tmp_path):
    aligned = av.pp.align_query(query, model)
    with quiet_mudata():
        aligned.write_h5mu(tmp_path / "a.h5mu")
        again = mudata.read_h5mu(tmp_path / "a.h5mu")
    np.testing.assert_array_equal(again["rna"].var["anvi_padded"], aligned["rna"].var["anvi_padded"])
    assert (again["prot"].varm["measured"] == aligned["prot"].varm["measured"]).all(axis=None)


@pytest.mark.parametrize("form", [np.asarray, sparse.csc_matrix, sparse.csr_matrix])
def test_dense_and_sparse(model, query, form):
    expected = dense(av.pp.align_query(query, model)["rna"].X)
    query["rna"].X = form(query["rna"].X.toarray())
    found = av.pp.align_query(query, model)["rna"].X
    assert sparse.issparse(found) == (form is not np.asarray)
    np.testing.assert_array_equal(dense(found), expected)


def test_rna_alone_and_anndata(model, query):
    alone = av.pp.align_query(mudata_of({"rna": query["rna"]}, query), model)
    assert list(alone.mod) == ["rna"]
    adata = query["rna"].copy()
    aligned = av.pp.align_query(adata, model)
    assert isinstance(aligned, AnnData)
    np.testing.assert_array_equal(dense(aligned.X), dense(alone["rna"].X))
    prot = query["prot"]
    adata.obsm["adt"] = pd.DataFrame(prot.X, prot.obs_names, prot.var_names).reindex(adata.obs_names)
    table = av.pp.align_query(adata, model, prot_obsm="adt").obsm["adt"]
    assert tuple(table.columns) == model.setup.proteins and table["P16"].isna().all()
    pd.testing.assert_series_equal(table["P01"], adata.obsm["adt"]["P01"])


def test_names_in_a_column(model, query):
    expected = dense(av.pp.align_query(query, model)["rna"].X)
    query["rna"].var["symbol"] = query["rna"].var_names
    query["rna"].var_names = [f"ENSG{i:011d}" for i in range(50)]
    np.testing.assert_array_equal(dense(av.pp.align_query(query, model, gene_key="symbol")["rna"].X), expected)
    with pytest.raises(ValueError, match=r"0 of the reference's 60 genes.*pass gene_key='symbol'"):
        av.pp.align_query(query, model)


def test_errors(model, query):
    few = mudata_of({"rna": query["rna"][:, :10].copy()}, query)
    with pytest.raises(ValueError, match="at least 50% are needed"):
        av.pp.align_query(few, model)
    assert av.pp.align_query(few, model, min_genes=0.1)["rna"].n_vars == 60
    query["prot"].var_names = [f"antibody {i}" for i in range(15)]
    with pytest.raises(ValueError, match="None of the model's 20 proteins"):
        av.pp.align_query(query, model)
    with pytest.raises(TypeError, match="Expected a MuData or an AnnData"):
        av.pp.align_query(np.zeros(3), model)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        av.pp.align_query(query, "nowhere")


@pytest.mark.parametrize("prefix", ["rna:", "rna_", "gex:", "GRCh38_", "GRCh38______", "hg38-"])
def test_genes_with_a_prefix(model, query, prefix):
    expected = dense(av.pp.align_query(query, model)["rna"].X)
    mixed = query["rna"].var_names.astype(str)
    for names in (prefix + mixed, [prefix + name if i % 2 else name for i, name in enumerate(mixed)]):
        query["rna"].var_names = names
        np.testing.assert_array_equal(dense(av.pp.align_query(query, model)["rna"].X), expected)


def test_genes_that_prefixes_alone_tell_apart_are_missing(model, query, caplog):
    """Two genomes in one matrix: nobody can say which of two G001 is meant."""
    names = "GRCh38_" + query["rna"].var_names.astype(str)
    query["rna"].var_names = [*names[:-1], "hg19_G001"]
    aligned = av.pp.align_query(query, model)["rna"]
    assert aligned.var["anvi_padded"]["G001"] and not aligned.var["anvi_padded"]["G002"]
    assert "1 genes are ambiguous" in caplog.text and "G001" in caplog.text
    genes = ("ENSG00000000001.3", "ENSG00000000002.1")
    rna = AnnData(np.ones((1, 2)), var=pd.DataFrame(index=["GRCh38_ENSG00000000002.7", "GRCh38_ENSG00000000001.4"]))
    assert match_genes(genes, rna, None, "rna").column.tolist() == [1, 0]
