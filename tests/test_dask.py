"""Counts that dask computes when they are asked for: chunks of any kind give what the same counts in memory do."""

import numpy as np
import pytest
from helpers import cite
from scipy import sparse

import anvi as av

da = pytest.importorskip("dask.array")
FIT = {"max_epochs": 1, "n_hidden": 8, "n_latent": 3}
KINDS = {
    "dense": np.asarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
}


def lazily(counts, kind, chunks):
    dense = counts.toarray() if sparse.issparse(counts) else np.asarray(counts)
    return da.from_array(dense, chunks=chunks).map_blocks(KINDS[kind])


@pytest.mark.parametrize("chunks", [(100, 60), (70, 25), ((10, 200, 90), (59, 1))], ids=["rows", "blocks", "uneven"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_of_lazy_counts(kind, chunks, monkeypatch):
    monkeypatch.setattr("anvi._data.containers.PIECE", 5_000)  # several reads
    adata = cite(300)["rna"].copy()
    other = adata.copy()
    other.X = lazily(adata.X, kind, chunks)
    for one in (adata, other):
        av.tl.scvi(one, **FIT)
    np.testing.assert_array_equal(other.obsm["X_scvi"], adata.obsm["X_scvi"])


ASKED = {
    "check": lambda m: av.pp.check(m).ok,
    "denoise": lambda m: av.tl.denoise(m, inplace=False)["rna"].values,
    "markers": lambda m: av.tl.differential_expression(m, "batch", n_samples=20, inplace=False)["prot"]["scores"],
    "criticism": lambda m: (av.metrics.criticism(m, n_samples=2), 0)[1],
    "attributions": lambda m: av.tl.attributions(m, n_cells=2, baseline="zero", inplace=False)["prot"].values,
    "mapping": lambda m: (av.tl.map_query(m, m.copy(), key_added="q", max_epochs=0), m.obsm["X_q"])[1],
    "aligned": lambda m: np.asarray(av.pp.align_query(m, m.copy())["rna"].X.sum(1)),
    "picture": lambda m: (av.pl.embedding(m, "umap", ["P01"]), 0)[1],
    "minified": lambda m: (av.tl.minify(m), m["rna"].X.nnz)[1],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_questions_about_lazy_counts(ask):
    mdata = cite(300)
    av.tl.totalanvi(mdata, **FIT)
    mdata.obsm["X_umap"] = mdata.obsm["X_totalanvi"][:, :2]
    lazy = mdata.copy()
    lazy["rna"].X = lazily(mdata["rna"].X, "csr", (100, 60))
    lazy["prot"].X = lazily(mdata["prot"].X, "dense", (100, 20))
    np.testing.assert_array_equal(ask(lazy), ask(mdata))
