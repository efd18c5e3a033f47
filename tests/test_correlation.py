"""Correlations against numpy and scipy on the same rows, how much is in memory, slots, and known truth."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_same, cite, contents, quiet_mudata
from mudata import read_h5mu
from queries import well_fitted
from scipy import stats

import anvi as av
from anvi._data.cells import read_cells
from anvi._data.select import find_features
from anvi._posterior import encode, predictive
from anvi._posterior.predictive import draw_rates, pearson
from anvi.nn import VAE


def rows_by_hand(mdata, key, names, n_samples, code=None) -> pd.DataFrame:
    """All draws of all cells, one after the other, by the function that draws them for a block."""
    model = av.get.model(mdata, key)
    cells, wanted = read_cells(mdata, model.setup, labels=True), find_features(model.setup, names)
    with torch.no_grad():
        parts = [
            draw_rates(model, block, wanted, code, sample, seed=0)
            for block in encode.blocks(model, cells, size=encode.NOISE_BLOCK)
            for sample in range(n_samples)
        ]
    return pd.DataFrame(torch.cat(parts).numpy(), columns=[*wanted.gene_names, *wanted.protein_names])


# numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [1, 4])  # scvi-tools fails with one
@pytest.mark.parametrize("key", ["scvi", "totalvi"])
def test_against_numpy_and_scipy(fitted, key, n_samples):
    names = ["G003", "G001", "G050", *(["P02", "P11"] if key == "totalvi" else [])]
    rows = rows_by_hand(fitted, key, names, n_samples)
    assert rows.shape == (300 * n_samples, len(names))
    for method in ("pearson", "spearman"):
        found = av.tl.feature_correlation(fitted, model=key, features=names, n_samples=n_samples, method=method)
        np.testing.assert_allclose(found, rows.corr(method), atol=1e-5)
    # the draws are gamma: more spread than the share itself, and never negative
    share = av.tl.denoise(fitted, model=key, features=names[:3])
    assert (rows.iloc[:, :3].std() > 1.5 * share.std().to_numpy()).all() and (rows >= 0).all(axis=None)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_batches_are_averaged_and_the_encoder_runs_once(fitted, monkeypatch, method):
    names = ["G003", "G001", "P02"]
    seen = []
    encode_cells = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda *args: seen.append(1) or encode_cells(*args))
    found = av.tl.feature_correlation(
        fitted, model="totalvi", features=names, n_samples=2, method=method, transform_batch=["batch_2", "batch_0"]
    )
    assert len(seen) == -(-300 // encode.NOISE_BLOCK)
    each = [rows_by_hand(fitted, "totalvi", names, 2, code).corr(method) for code in (2, 0)]
    np.testing.assert_allclose(found, (each[0] + each[1]) / 2, atol=1e-5)


@pytest.mark.parametrize("sizes", [[5], [3, 1, 900, 2_000, 2_048, 7]])
def test_pearson_from_sums(sizes):
    """Columns of very different size, far from zero, constant, or all zero at first."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(sum(sizes), 6)) @ rng.normal(size=(6, 6))
    rows = (rows * [1, 1e-8, 1e6, 1, 1, 1] + [0, 1e-7, 1e8, 0, 0, 0]).astype(np.float32)
    rows[:, 4] = 3.7
    rows[: sizes[0], 5] = 0 if len(sizes) > 1 else rows[: sizes[0], 5]
    found = pearson(np.split(rows, np.cumsum(sizes)[:-1]))
    with np.errstate(invalid="ignore"):
        truth = np.corrcoef(rows.astype(np.float64).T)
    truth[4] = truth[:, 4] = np.nan
    np.testing.assert_allclose(found, truth, atol=1e-5)


def test_ranks_share_their_mean(monkeypatch):
    rng = np.random.default_rng(0)
    rows = rng.poisson(1.0, (500, 7)).astype(np.float32)
    monkeypatch.setattr(predictive, "RANKED_AT_ONCE", 3)
    monkeypatch.setattr(predictive, "ROWS_AT_ONCE", 100)
    found = pearson(predictive._ranks(np.array_split(rows.copy(), 9), 500))
    np.testing.assert_allclose(found, stats.spearmanr(rows).statistic, atol=1e-5)


def test_the_chunk_changes_nothing(fitted, monkeypatch):
    whole = av.tl.feature_correlation(fitted, model="totalvi", inplace=False, n_samples=2)
    monkeypatch.setattr(encode, "CHUNK", 7)
    assert av.tl.feature_correlation(fitted, model="totalvi", inplace=False, n_samples=2).identical(whole)


def test_other_likelihoods_correlate_the_rates():
    mdata = cite()
    av.tl.scvi(mdata, gene_likelihood="poisson", max_epochs=1)
    rows = rows_by_hand(mdata, None, ["G001", "G002"], 3)
    model, name = av.get.model(mdata), "G001"
    samples = av.tl.denoise(mdata, n_samples=3, return_mean=False, features=[name])["rna"]
    wide = samples.sel(rna_var=name).transpose("obs", "sample").sortby("obs").values
    first = rows[name].to_numpy()[: 256 * 3].reshape(3, 256).T  # blocks of 256 cells, a sample after the other
    np.testing.assert_allclose(first, wide[:256], rtol=1e-4)
    assert model.config.gene_likelihood == "poisson"


# cells and memory -------------------------------------------------------------------------------------------------


def test_cells_are_drawn_at_random(fitted, monkeypatch):
    seen = []
    draw = predictive.draw_rates
    monkeypatch.setattr(
        predictive, "draw_rates", lambda model, block, *args: seen.append(len(block.index)) or draw(model, block, *args)
    )
    few = av.tl.feature_correlation(fitted, model="scvi", features=["G001", "G002"], n_cells=40, n_samples=3)
    assert sum(seen) == 40 * 3
    same = av.tl.feature_correlation(fitted, model="scvi", features=["G001", "G002"], n_cells=40, n_samples=3)
    assert few.identical(same)
    seen.clear()
    av.tl.feature_correlation(fitted, model="scvi", features=["G001", "G002"], n_cells=None, n_samples=3)
    assert sum(seen) == 300 * 3


def test_the_data_that_are_given_are_the_data_that_count(fitted):
    """scvi-tools looks at the training data whatever it is given."""
    model = av.get.model(fitted, "scvi")
    part = fitted[fitted.obs["batch"] == "batch_0"].copy()
    names = ["G003", "G001", "G050"]
    whole = av.tl.feature_correlation(fitted, model=model, features=names, n_samples=2)
    subset = av.tl.feature_correlation(part, model=model, features=names, n_samples=2)
    assert not np.allclose(whole, subset, atol=1e-3)


# slots ------------------------------------------------------------------------------------------------------------


def test_slots_of_a_joint_model(fitted, tmp_path):
    expected = av.tl.feature_correlation(fitted, model="totalvi", n_samples=2, inplace=False)
    assert expected.dims == ("feature", "feature_") and set(expected["modality"].values) == {"rna", "prot"}
    before = contents(fitted)
    av.tl.feature_correlation(fitted, model="totalvi", n_samples=2, features=["G001", "P01"])
    for slot, value in contents(fitted).items():
        assert_same(value, before[slot], slot)
    av.tl.feature_correlation(fitted, model="totalvi", n_samples=2)
    with quiet_mudata():
        fitted.write(tmp_path / "x.h5mu")
        back = read_h5mu(tmp_path / "x.h5mu")
    for mdata in (fitted, back):
        matrix = mdata.varp["totalvi_correlation"]
        assert matrix.dtype == np.float32 and mdata.var_names.tolist() == expected["feature"].values.tolist()
        np.testing.assert_array_equal(matrix, expected)
        np.testing.assert_allclose(np.diagonal(matrix), 1, rtol=1e-6)
        np.testing.assert_array_equal(matrix, matrix.T)
        asked = {"method": "spearman", "n_samples": 2, "n_cells": 300, "random_state": 0}
        stored = dict(mdata.uns["totalvi"]["correlation"])
        assert stored.pop("transform_batch", None) is None  # of which anndata 0.11 writes nothing
        assert stored == asked | {"rna_mod": "rna", "prot_mod": "prot"}
    av.tl.totalvi(fitted, batch_key="batch", max_epochs=1)
    assert "totalvi_correlation" not in fitted.varp


def test_slots_of_an_rna_model(fitted):
    av.tl.feature_correlation(fitted, model="scanvi", n_samples=1)
    assert fitted["rna"].varp["scanvi_correlation"].shape == (60, 60) and "scanvi_correlation" not in fitted.varp


def test_features_outside_the_model_are_nan(fitted):
    model = av.get.model(fitted, "scvi")
    rna = fitted["rna"]
    wider = cite(n_genes=63)["rna"]
    wider.obs["batch"] = fitted.obs["batch"].to_numpy()
    wider.var_names = ["new", *rna.var_names[::-1], "newer", "newest"]
    av.tl.feature_correlation(wider, model=model, n_samples=1)
    matrix = pd.DataFrame(wider.varp["scvi_correlation"], wider.var_names, wider.var_names)
    outside = ["new", "newer", "newest"]
    assert matrix[outside].isna().all(axis=None) and matrix.loc[outside].isna().all(axis=None)
    inside = matrix.drop(index=outside, columns=outside)
    assert np.isfinite(inside).all(axis=None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "kendall"}, "method='kendall' is not one of 'spearman', 'pearson'"),
        ({"n_cells": 2}, "n_cells=2 must be at least 3"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"transform_batch": "x"}, "no batch 'x'"),
    ],
)
def test_errors(fitted, monkeypatch, options, match):
    monkeypatch.setattr(VAE, "encode", lambda *args: pytest.fail("cells were encoded"))
    with pytest.raises(ValueError, match=match):
        av.tl.feature_correlation(fitted, model="totalvi", **options)


# truth ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_truth(method):
    """Signs of clear correlations of marker genes and proteins; measured 0.98 (spearman) and 1.00 (pearson)."""
    mdata = well_fitted()
    genes = mdata["rna"].var_names[mdata["rna"].varm["true_markers"].any(axis=1)].tolist()
    proteins = mdata["prot"].var_names[mdata["prot"].varm["true_markers"].any(axis=1)].tolist()
    truth = pd.concat(
        [
            pd.DataFrame(mdata["rna"].layers["true_scale"], mdata.obs_names, mdata["rna"].var_names)[genes],
            av.get.table(mdata, "true_protein_rate")[proteins],
        ],
        axis=1,
    ).corr(method)
    found = av.tl.feature_correlation(mdata, features=genes + proteins, method=method, n_samples=5).to_pandas()
    upper = np.triu_indices(len(truth), 1)
    truth, found = (
        (np.sign(truth.to_numpy()[upper]) * (np.abs(truth.to_numpy()[upper]) > 0.25)),
        found.to_numpy()[upper],
    )
    clear = truth != 0
    assert clear.sum() > 50
    agree = (np.sign(found[clear]) == truth[clear]).mean()
    assert agree > 0.9, agree
    shuffled = np.random.default_rng(0).permutation(found)
    assert (np.sign(shuffled[clear]) == truth[clear]).mean() < 0.75
