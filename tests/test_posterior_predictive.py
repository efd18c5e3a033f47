"""Draws against the moments of the likelihood by hand, blocks and chunks, zarr, and against the data."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from anndata import AnnData
from helpers import assert_same, cite, contents, mudata_of
from queries import by_hand

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._posterior import encode, predictive
from anvi.nn import VAE

SOME = [0, 123, 299]


def at_the_mean(monkeypatch):
    """Decode the posterior mean, so that the moments of a draw can be written down."""
    monkeypatch.setattr(predictive, "sample_z", lambda model, block, *_: model.network.to_latent(block.q_z.mean))


def moments(mean, within, n) -> tuple[np.ndarray, np.ndarray]:
    """Tolerances of a mean and of a variance of `n` draws, five standard errors; heavy tails get a kurtosis of 40."""
    return 5 * np.sqrt(within / n) + 1e-4 * mean, 5 * within * np.sqrt(42 / n) + 1e-4


@pytest.mark.parametrize("key", ["scvi", "totalvi"])
@pytest.mark.parametrize("code", [None, 2])
def test_against_the_likelihood_by_hand(fitted, monkeypatch, key, code):
    at_the_mean(monkeypatch)
    model = av.get.model(fitted, key)
    cells = read_cells(fitted, model.setup)
    batch = take(cells, torch.tensor(SOME))
    few = fitted[cells.names[SOME]].copy()
    n = 1_500
    to = None if code is None else f"batch_{code}"
    drawn = av.tl.posterior_predictive(few, model=model, n_samples=n, transform_batch=to)
    assert drawn["rna"].dims == ("sample", "obs", "rna_var")
    for i, row in enumerate(SOME):
        hand = by_hand(model, batch, i, code)
        x = drawn["rna"].sel(obs=cells.names[row]).values.astype(float)
        mean = hand.library * hand.share
        var = mean + mean**2 / hand.theta
        if hand.zero is not None:  # scvi: zinb
            kept = 1 - hand.zero
            mean, var = kept * mean, kept * var + kept * hand.zero * mean**2
        off, spread = moments(mean, var, n)
        assert (np.abs(x.mean(0) - mean) < off).all() and (np.abs(x.var(0) - var) < spread).all()
        if key == "scvi":
            continue
        y = drawn["prot"].sel(obs=cells.names[row]).values.astype(float)
        back, s2 = hand.back_mean, hand.back_sd**2
        first, second = np.exp(back + s2 / 2), np.exp(2 * back + 2 * s2)  # E[beta], E[beta^2]
        pi, f = hand.background, hand.factor
        mean = first * (pi + (1 - pi) * f)
        of_squares = second * (pi + (1 - pi) * f**2)
        var = mean + of_squares * (1 + 1 / hand.phi) - mean**2
        off, spread = moments(mean, var, n)
        assert (np.abs(y.mean(0) - mean) < off).all() and (np.abs(y.var(0) - var) < spread).all()


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "normal"])
def test_other_likelihoods(monkeypatch, likelihood):
    at_the_mean(monkeypatch)
    mdata = cite()
    av.tl.scvi(mdata, gene_likelihood=likelihood, max_epochs=1)
    n = 1_500
    parameters = av.get.likelihood_parameters(mdata)
    few = mdata[mdata.obs_names[:3]].copy()
    drawn = av.tl.posterior_predictive(few, model=av.get.model(mdata), n_samples=n)["rna"]
    mean = parameters["rna_mean"].sel(obs=few.obs_names.to_numpy(dtype=str)).values
    within = {
        "nb": lambda: mean + mean**2 / parameters["rna_theta"].values,
        "poisson": lambda: mean,
        "normal": lambda: np.broadcast_to(parameters["rna_scale"].values ** 2, mean.shape),
    }[likelihood]()
    off, spread = moments(mean, within, n)
    assert (np.abs(drawn.values.mean(0, dtype=float) - mean) < off).all()
    assert (np.abs(drawn.values.astype(float).var(0) - within) < spread).all()
    whole = np.array_equal(drawn, np.round(drawn))
    assert whole == (likelihood != "normal") and (drawn.min() >= 0) == (likelihood != "normal")


def test_latent_vectors_background_and_library_are_drawn(fitted, monkeypatch):
    """The variance over draws holds that of what is drawn before the count: without it, it is smaller."""
    mdata = cite()
    av.tl.totalvi(mdata, batch_key="batch", library="latent", max_epochs=1)
    model = av.get.model(mdata)
    model.network.encoder.log_var.bias.data += 2  # widen what is drawn, so that it shows
    model.network.library_encoder.log_var.bias.data += 2
    few = mdata[:20].copy()
    spread = {"all": av.tl.posterior_predictive(few, model=model, n_samples=200)}
    with monkeypatch.context() as patch:
        at_the_mean(patch)
        spread["no z"] = av.tl.posterior_predictive(few, model=model, n_samples=200)
    model.network.library_encoder.log_var.bias.data -= 20
    spread["no library"] = av.tl.posterior_predictive(few, model=model, n_samples=200)
    model.network.protein.back_scale.bias.data -= 20
    spread["no background"] = av.tl.posterior_predictive(few, model=model, n_samples=200)
    rna, prot = (
        {name: float(found[mod].var("sample").sum()) for name, found in spread.items()} for mod in ("rna", "prot")
    )
    assert rna["no z"] < 0.95 * rna["all"] and rna["no library"] < 0.95 * rna["all"]
    assert prot["no z"] < 0.99 * prot["all"] and prot["no background"] < 0.95 * prot["no library"]


def test_efficiency_of_imported_models_is_applied(fitted, monkeypatch):
    at_the_mean(monkeypatch)
    mdata = cite()
    av.tl.totalvi(mdata, batch_key="batch", objective="scvi-tools", max_epochs=1)
    model = av.get.model(mdata)
    efficiency = model.network.protein.log_efficiency
    efficiency.data.zero_()
    one = av.tl.posterior_predictive(mdata, model=model, modality="prot", n_samples=50)["prot"].mean("sample")
    rates = av.tl.denoise(mdata, model=model, modality="prot", inplace=False)["prot"]
    efficiency.data[1] = np.log(0.25)
    other = av.tl.posterior_predictive(mdata, model=model, modality="prot", n_samples=50)["prot"].mean("sample")
    ratio = (other.mean("prot_var") / one.mean("prot_var")).to_series()
    by_batch = ratio.groupby(mdata.obs["batch"].loc[ratio.index].astype(str)).mean()
    np.testing.assert_allclose(by_batch, [1, 0.25, 1], rtol=0.05)
    same = av.tl.denoise(mdata, model=model, modality="prot", inplace=False)["prot"]
    np.testing.assert_array_equal(rates, same)  # and left out of rates


# what is drawn ----------------------------------------------------------------------------------------------------


def test_the_chunk_changes_nothing(fitted, monkeypatch):
    whole = av.tl.posterior_predictive(fitted, model="totalvi", n_samples=3)
    monkeypatch.setattr(encode, "CHUNK", 7)
    parts = av.tl.posterior_predictive(fitted, model="totalvi", n_samples=3)
    assert parts.identical(whole)
    assert not whole["rna"][0].equals(whole["rna"][1])
    other = av.tl.posterior_predictive(fitted, model="totalvi", n_samples=3, random_state=1)
    assert not np.array_equal(whole["rna"], other["rna"])


def test_the_first_samples_do_not_depend_on_how_many_are_drawn(fitted):
    five, two = (av.tl.posterior_predictive(fitted, model="scvi", n_samples=n)["rna"] for n in (5, 2))
    np.testing.assert_array_equal(five[:2], two)


def test_batches_are_an_axis_and_counts_stay_counts(fitted):
    drawn = av.tl.posterior_predictive(fitted, model="totalanvi", n_samples=2, transform_batch="all")
    for mod, n in (("rna", 60), ("prot", 20)):
        assert drawn[mod].dims == ("batch", "sample", "obs", f"{mod}_var") and drawn[mod].shape == (3, 2, 300, n)
        np.testing.assert_array_equal(drawn[mod], np.round(drawn[mod]))
        assert not drawn[mod][0].equals(drawn[mod][1])
    assert drawn["batch"].values.tolist() == ["batch_0", "batch_1", "batch_2"]
    assert drawn["rna"].dtype == np.float32


def test_one_modality_or_some_features(fitted, monkeypatch):
    both = av.tl.posterior_predictive(fitted, model="totalvi")
    heads = []
    forward = type(av.get.model(fitted, "scvi").network.rna.scale).forward
    monkeypatch.setattr(
        type(av.get.model(fitted, "scvi").network.rna.scale),
        "forward",
        lambda self, h, codes, columns=None: heads.append(columns is not None) or forward(self, h, codes, columns),
    )
    some = av.tl.posterior_predictive(fitted, model="scvi", features=["G009", "G002"])
    assert any(heads)  # the extra zeros of two genes, not of all
    assert some["rna"].shape == (1, 300, 2) and some["rna_var"].values.tolist() == ["G009", "G002"]
    monkeypatch.undo()
    for name in ("decode_share", "decode_rna"):
        monkeypatch.setattr(VAE, name, lambda *args, **options: pytest.fail("genes were decoded"))
    alone = av.tl.posterior_predictive(fitted, model="totalvi", modality="prot")
    assert list(alone) == ["prot"]
    np.testing.assert_array_equal(alone["prot"], both["prot"])


def test_the_encoder_runs_once_per_block(fitted, monkeypatch):
    seen = []
    encode_cells = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda *args: seen.append(1) or encode_cells(*args))
    av.tl.posterior_predictive(fitted, model="totalvi", n_samples=4, transform_batch="all")
    assert len(seen) == -(-300 // encode.NOISE_BLOCK)


def test_nothing_is_written(fitted):
    before = contents(fitted)
    av.tl.posterior_predictive(fitted, model="totalvi")
    for slot, value in contents(fitted).items():
        assert_same(value, before[slot], slot)


def test_dispersion_by_label_reads_labels():
    mdata = cite()
    av.tl.scanvi(mdata, dispersion="gene-label", gene_likelihood="nb", max_epochs=1)
    model = av.get.model(mdata)
    theta = model.network.rna.log_theta
    theta.data.fill_(5.0)
    theta.data[model.classes.index("B")] = -4.0  # counts of labelled B cells vary wildly
    drawn = av.tl.posterior_predictive(mdata, model=model, n_samples=30)["rna"]
    spread = drawn.var("sample").sum("rna_var").to_series()
    is_b = (mdata.obs["cell_type"] == "B").loc[spread.index]
    assert spread[is_b].median() > 5 * spread[~is_b].median()


# zarr -------------------------------------------------------------------------------------------------------------


def strange(mdata):
    """The same cells, with another modality that has cells of its own in between."""
    names = ["aaa", *mdata["rna"].obs_names[:3], "cell_00150x"]
    atac = AnnData(np.ones((5, 1), dtype=np.float32), pd.DataFrame(index=names), pd.DataFrame(index=["peak"]))
    out = mudata_of({"atac": atac, "rna": mdata["rna"], "prot": mdata["prot"]})
    out = out[np.sort(out.obs_names)].copy()
    out["rna"].obs["batch"] = mdata.obs["batch"].loc[out["rna"].obs_names]
    return out


@pytest.mark.parametrize("batches", [None, "all"])
def test_zarr_holds_the_same(fitted, tmp_path, batches, monkeypatch):
    monkeypatch.setattr(sys.modules["anvi.tl.posterior_predictive"], "CHUNK_BYTES", 100_000)  # several chunks
    monkeypatch.setattr(predictive, "NOISE_BLOCK", 64)
    options = {"model": "totalvi", "n_samples": 3, "transform_batch": batches}
    memory = av.tl.posterior_predictive(fitted, **options)
    stored = av.tl.posterior_predictive(fitted, out=tmp_path / "x.zarr", **options)
    xr.testing.assert_identical(stored.load(), memory)
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "x.zarr", chunks=None, consolidated=False).load(), memory)


def test_zarr_of_cells_outside_the_model(fitted, tmp_path):
    model, mdata = av.get.model(fitted, "totalvi"), strange(fitted)
    memory = av.tl.posterior_predictive(mdata, model=model)
    stored = av.tl.posterior_predictive(mdata, model=model, out=str(tmp_path / "x.zarr"))
    assert stored["obs"].values.tolist() == mdata.obs_names.tolist()
    xr.testing.assert_identical(stored.load(), memory)
    assert np.isnan(memory["rna"].sel(obs=["aaa", "cell_00150x"])).all()
    assert np.isfinite(memory["rna"].drop_sel(obs=["aaa", "cell_00150x"])).all()


def test_zarr_is_not_overwritten(fitted, tmp_path, monkeypatch):
    (tmp_path / "x.zarr").mkdir()
    monkeypatch.setattr(VAE, "encode", lambda *args: pytest.fail("cells were encoded"))
    with pytest.raises(FileExistsError, match="x.zarr' is there already"):
        av.tl.posterior_predictive(fitted, model="scvi", out=tmp_path / "x.zarr")


def test_zarr_holds_a_block_in_memory_at_a_time(fitted, tmp_path):
    """Peak of what numpy and Python hold beyond the start: a fraction of the answer, which is 14 MB."""
    import tracemalloc

    av.tl.posterior_predictive(fitted, model="totalvi", n_samples=1, out=tmp_path / "warm.zarr")
    tracemalloc.start()
    av.tl.posterior_predictive(fitted, model="totalvi", n_samples=150, out=tmp_path / "x.zarr")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_samples": 0}, "n_samples=0"),
        ({"transform_batch": "x"}, "no batch 'x'"),
        ({"modality": "prot", "model": "scvi"}, "modality='prot' is not in the model"),
    ],
)
def test_errors(fitted, options, match):
    with pytest.raises(ValueError, match=match):
        av.tl.posterior_predictive(fitted, **{"model": "totalvi"} | options)


# truth ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_against_the_data():
    """Means and variances of features across cells, drawn over measured; scvi-tools draws proteins 2.5 times too large.

    A default fit of 2,000 cells (334 epochs) measured 1.01 and 0.98 for the means, 1.10 and 0.97 for the variances: a
    posterior mean that has not found all of a gene's structure leaves the rest to its dispersion. A fit of 600 cells
    that is cut short after 150 epochs has variances of 1.36.
    """
    mdata = cite(2_000)
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        av.tl.totalvi(mdata, batch_key="batch", panel_key="panel")
    drawn = av.tl.posterior_predictive(mdata, n_samples=10)
    x = mdata["rna"].X.toarray()
    seen = x.mean(0) > 0.5  # of rarer genes, chance decides
    y = mdata["prot"].to_df()
    y_drawn = drawn["prot"].sel(obs=y.index.to_numpy(dtype=str)).where(np.isfinite(y.to_numpy()))
    ratios = {
        "rna mean": drawn["rna"].mean(["sample", "obs"]).values[seen] / x.mean(0)[seen],
        "rna var": drawn["rna"].var("obs").mean("sample").values[seen] / x.var(0)[seen],
        "prot mean": y_drawn.mean(["sample", "obs"]).values / y.mean().to_numpy(),
        "prot var": y_drawn.var("obs").mean("sample").values / y.var(ddof=0).to_numpy(),
    }
    for name, low, high in (
        ("rna mean", 0.95, 1.05),
        ("prot mean", 0.95, 1.05),
        ("rna var", 0.85, 1.2),
        ("prot var", 0.85, 1.2),
    ):
        assert low < np.median(ratios[name]) < high, (name, ratios[name])
    assert (ratios["prot mean"] < 1.3).all()
    # control: the moments of shuffled features are others
    shuffled = np.random.default_rng(0).permutation(20)
    assert np.abs(np.log(y_drawn.mean(["sample", "obs"]).values[shuffled] / y.mean().to_numpy())).mean() > 0.3
    # cell by cell: the library is the cell's own
    totals = np.corrcoef(drawn["rna"].sum("rna_var").mean("sample"), x.sum(1))[0, 1]
    assert totals > 0.9
