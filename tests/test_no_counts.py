"""Values that are no counts: each kind has its remedy, which works as it is written; rounding makes none of them."""

import os
import warnings
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from helpers import cite, quiet_mudata
from scipy import sparse

import anvi as av
from anvi._data.counts import made_whole

FILES = sorted(Path(os.environ["ANVI_DATA_DIR"]).glob("*.h5mu")) if "ANVI_DATA_DIR" in os.environ else []


def rna(n_obs: int = 300, **options):
    return cite(n_obs, **options)["rna"].copy()


def normalised(adata, target=1e4, log=True):
    sc.pp.normalize_total(adata, target_sum=target)
    if log:
        sc.pp.log1p(adata)
    return adata


def told(data, fit=av.tl.scvi, **options) -> str:
    """The error of a fit, which `pp.check` must give, too."""
    with pytest.raises((ValueError, KeyError, TypeError)) as error:
        fit(data, max_epochs=1, **options)
    assert str(error.value.args[0]) in av.pp.check(data, labels_key=None).problems
    return str(error.value.args[0])


def followed(message: str, mark: str, **names):
    """What the names are after the command of a message was run."""
    names |= {"numpy": np, "sc": sc}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(message.split(mark)[1].strip().rstrip("."), names)
    return names


@pytest.mark.parametrize("target", [1e4, 1e6, None])
@pytest.mark.parametrize("n_genes", [60, 2000])
@pytest.mark.parametrize("dense", [False, True])
def test_rounded_logarithms(target, n_genes, dense):
    adata = normalised(rna(300, n_genes=n_genes), target)
    assert "look like logarithms" in told(adata) and "rint" not in told(adata)
    values = np.rint(adata.X.toarray())
    adata.X = values if dense else sparse.csr_matrix(values)
    message = told(adata)
    assert "whole numbers that are no counts: none is above" in message and "rint" not in message


@pytest.mark.parametrize("layer", ["counts", None])
def test_where_the_counts_are_is_told_of_rounded_values_too(layer):
    adata = rna()
    if layer is None:
        adata.raw = adata.copy()
    else:
        adata.layers[layer] = adata.X.copy()
    expected = adata.X.toarray()
    normalised(adata)
    adata.X = np.rint(adata.X.toarray())
    message = told(adata)
    if layer is None:
        after = followed(message, "Counts seem to be in .raw:", data=adata)
        np.testing.assert_array_equal(after["data"].X.toarray(), expected)
        av.tl.scvi(after["data"], max_epochs=1)
    else:
        assert "pass layer='counts'" in message


def test_a_layer_of_rounded_logarithms_is_not_suggested():
    adata = normalised(rna())
    adata.layers["rounded"] = sparse.csr_matrix(np.rint(adata.X.toarray()))
    assert "rounded" not in told(adata)


def test_normalised_values():
    adata = normalised(rna(300, n_genes=500), log=False)
    assert "normalised by totals" in told(adata) and "rint" not in told(adata)
    adata.X = np.rint(adata.X.toarray())
    assert "the totals of all cells are nearly the same" in told(adata)


def test_centred_values():
    adata = normalised(rna())
    adata.X = adata.X.toarray()
    sc.pp.scale(adata)
    message = told(adata)
    assert "scaled or centred" in message and "numpy.rint" not in message


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_an_outer_join(joint):
    mdata = cite(300)
    one, other = mdata["rna"][:150].copy(), mdata["rna"][150:, 6:].copy()
    joined = anndata.concat([one.copy(), other], join="outer", fill_value=np.nan)
    joined.X = joined.X.toarray() if sparse.issparse(joined.X) else joined.X
    if joint:
        mdata.mod["rna"] = joined[mdata["rna"].obs_names].copy()
        mdata.update()
        message = told(mdata, av.tl.totalvi)
        after = followed(message, "keep those of all:", mdata=mdata)["mdata"]
        av.tl.totalvi(after, max_epochs=1)
        assert after["rna"].n_vars == 54
    else:
        after = followed(told(joined), "keep those of all:", data=joined)["data"]
        av.tl.scvi(after, max_epochs=1)
        assert after.n_vars == 54


@pytest.mark.parametrize("corrected", [False, True])
def test_values_that_may_be_rounded(corrected):
    adata = rna()
    if corrected:  # as SoupX leaves them
        adata.X = sparse.csr_matrix(adata.X.toarray() * np.random.default_rng(0).uniform(0.8, 1, adata.shape))
    else:
        adata.X = sparse.csr_matrix(np.expm1(np.log1p(adata.X.toarray().astype(np.float32))))
    message = told(adata)
    after = followed(message, "can be rounded:" if corrected else "as after expm1:", data=adata)["data"]
    assert "1 at cell" not in message  # enough digits to see that it is none
    av.tl.scvi(after, max_epochs=1)


def test_rounded_protein_values():
    mdata = cite(300)
    counts = np.asarray(mdata["prot"].X)
    mdata["prot"].X = np.rint(np.log1p(counts))
    assert "mdata['prot'].X holds whole numbers that are no counts" in told(mdata, av.tl.totalvi)


@pytest.mark.parametrize("rate", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("n_cells", [50, 300])
def test_the_least_variable_counts_are_counts(rate, n_cells):
    """Poisson counts of cells that are all alike, in many genes: no counts vary less."""
    for seed in range(5):
        assert made_whole(np.random.default_rng(seed).poisson(rate, (n_cells, 2000))) is None


def test_counts_drawn_down_to_one_total_are_counts():
    adata = rna(300, n_genes=500)
    adata = adata[np.asarray(adata.X.sum(1)).ravel() >= 500].copy()
    sc.pp.downsample_counts(adata, counts_per_cell=500)
    assert np.asarray(adata.X.sum(1)).std() == 0 and made_whole(adata.X) is None
    assert made_whole((adata.X > 0).astype(float)) is None  # nor is there anything against presence alone


@pytest.mark.data
@pytest.mark.skipif(not FILES, reason="ANVI_DATA_DIR has no h5mu")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_real_counts_are_counts(path):
    with quiet_mudata():
        real = mudata.read_h5mu(path)
    for part in real.mod.values():
        for n in (50, 200, 2000):
            assert made_whole(part.X[:n]) is None
            assert made_whole(part.X[:n, :20]) is None
            x = part.X[:n].toarray() if sparse.issparse(part.X) else np.asarray(part.X[:n])
            thin = np.random.default_rng(0).binomial(np.nan_to_num(x).astype(int), 0.1)
            assert made_whole(thin) is None


@pytest.mark.parametrize("gene_key", [None, "gene_ids"])
def test_a_query_whose_symbols_repeat(gene_key, caplog):
    """Such genes count as missing, with a word; the others answer as if these were not there."""
    mdata = cite(300)
    reference, query = mdata[:200].copy(), mdata["rna"][200:].copy()
    names = list(query.var_names)
    query.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(60)]
    part = reference["rna"].copy()
    part.obs["cell_type"] = reference.obs["cell_type"].reindex(part.obs_names)
    if gene_key:
        part.var_names = query.var["gene_ids"]
    av.tl.scanvi(part, max_epochs=1)
    without = query[:, 2:].copy()
    av.tl.map_query(without, part, gene_key=gene_key, max_epochs=0)
    query.var_names = [names[0], names[0], *names[2:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        av.tl.map_query(query, part, gene_key=gene_key, max_epochs=0)
        assert "count as missing" in caplog.text or "counts as missing" in caplog.text
        np.testing.assert_allclose(query.obsm["X_scanvi"], without.obsm["X_scanvi"], atol=1e-6)
        assert query.uns["scanvi"]["reference"]["genes_matched"] == pytest.approx(100 * 58 / 60, abs=0.01)
        av.tl.denoise(query)
        assert np.isnan(query.layers["scanvi_denoised"][:, :2]).all()
        assert isinstance(av.get.denoised(query), pd.DataFrame)
        assert av.pp.align_query(query, part, gene_key=gene_key).n_vars == 60
        av.tl.predict(query, model=av.get.model(query))


@pytest.mark.parametrize("kept", ["all", "common genes"])
def test_counts_drawn_down_to_one_total_that_a_few_cells_miss(kept):
    rng = np.random.default_rng(0)
    adata = anndata.AnnData(rng.poisson(rng.gamma(1, 10, (1, 400)) * rng.gamma(20, 0.05, (500, 1))).astype(np.float32))
    totals = adata.X.sum(1)
    sc.pp.downsample_counts(adata, counts_per_cell=int(np.sort(totals)[2]))
    if kept == "common genes":
        sc.pp.filter_genes(adata, min_cells=3)
    assert made_whole(adata.X) is None


def test_one_constant_feature_condemns_nothing():
    rng = np.random.default_rng(0)
    for counts, column, value in ((rng.poisson(0.4, (300, 60)), 0, 1), (rng.poisson(1.5, (300, 14)), 3, 2)):
        counts[:, column] = value
        assert made_whole(counts.astype(np.float32)) is None


@pytest.mark.parametrize(("n_genes", "target", "keep"), [(60, 1e6, 40), (500, 1e4, 300)])
def test_normalised_values_of_some_genes_are_not_to_be_rounded(n_genes, target, keep):
    mdata = cite(300, n_genes=n_genes)
    sc.pp.normalize_total(mdata["rna"], target_sum=target)
    rna = mdata["rna"][:, :keep].copy()
    with pytest.raises(ValueError, match="They look normalised by totals of cells; rounding makes no counts of them"):
        av.tl.scvi(rna, max_epochs=1)


def test_a_protein_that_nobody_measured_hides_no_totals():
    values = np.random.default_rng(0).poisson(30, (200, 20)).astype(np.float32) + 30
    values = np.rint(values / values.sum(1, keepdims=True) * 10_000)
    values[:, 0] = np.nan
    rounded = np.rint(values / np.nansum(values, 1, keepdims=True) * 10_000)
    assert "the totals of all cells are nearly the same" in made_whole(rounded)
    assert "the totals of all cells are nearly the same" in made_whole(np.nan_to_num(rounded).astype(np.float16))


@pytest.mark.parametrize("corrected", [slice(200, None), slice(0, None, 7), slice(0, 1)])
def test_corrected_counts_of_some_cells_can_be_rounded(corrected):
    adata = cite(300, n_genes=200)["rna"].copy()
    counts = adata.X.toarray()
    counts[corrected] *= np.random.default_rng(0).uniform(0.8, 1.0, counts[corrected].shape)
    adata.X = sparse.csr_matrix(counts)
    with pytest.raises(ValueError, match="corrected counts .SoupX. can be rounded"):
        av.tl.scvi(adata, max_epochs=1)
