"""Expected expression against the network written as loops, what is run and what is not, and known truth."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import assert_same, cite, contents, mudata_of, permuted, quiet_mudata
from mudata import read_h5mu
from queries import by_hand, well_fitted

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._posterior import encode
from anvi.nn import VAE
from anvi.nn.rna import RNADecoder

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")
SOME = [0, 123, 299]


def answer(mdata, key, **options) -> dict[str, pd.DataFrame]:
    """What denoise returns, per modality."""
    found = av.tl.denoise(mdata, model=key, inplace=False, **options)
    return {mod: pd.DataFrame(found[mod].values, found["obs"].values, found[f"{mod}_var"].values) for mod in found}


def hands(mdata, key, code=None):
    """Some cells by hand, by their names."""
    model = av.get.model(mdata, key)
    cells = read_cells(mdata, model.setup)
    batch = take(cells, torch.tensor(SOME))
    return {cells.names[n]: by_hand(model, batch, i, code) for i, n in enumerate(SOME)}


# numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", MODELS)
def test_against_loops(fitted, key):
    """float32 through three layers: 1e-4."""
    decoder = replace(av.get.model(fitted, key), imputation=None)
    observed = answer(fitted, decoder, library_size="observed", include_background=True)
    moved = answer(fitted, key, transform_batch="batch_2", library_size=1e4)
    for name, hand in hands(fitted, key).items():
        np.testing.assert_allclose(observed["rna"].loc[name], hand.library * hand.share, rtol=1e-4)
        if "total" in key:
            np.testing.assert_allclose(observed["prot"].loc[name], hand.protein(True), rtol=1e-4)
    for name, hand in hands(fitted, key, code=2).items():
        np.testing.assert_allclose(moved["rna"].loc[name], 1e4 * hand.share, rtol=1e-4)
        if "total" in key:
            np.testing.assert_allclose(moved["prot"].loc[name], hand.protein(False), rtol=1e-4)
    assert ("prot" in moved) == ("total" in key)


def test_latent_library():
    mdata = cite()
    av.tl.totalvi(mdata, batch_key="batch", library="latent", max_epochs=1)
    found = answer(mdata, None, library_size="latent", modality="rna")["rna"]
    sizes = av.get.library_size(mdata)
    for name, hand in hands(mdata, None).items():
        np.testing.assert_allclose(found.loc[name], hand.library * hand.share, rtol=1e-4)
        np.testing.assert_allclose(sizes[name], hand.library, rtol=1e-4)


def test_latent_library_of_a_model_that_takes_it_as_observed(fitted):
    observed, latent = (answer(fitted, "totalvi", modality="rna", library_size=size) for size in ("observed", "latent"))
    pd.testing.assert_frame_equal(observed["rna"], latent["rna"])
    np.testing.assert_allclose(observed["rna"].sum(axis=1), fitted["rna"].X.sum(1).A1, rtol=1e-4)


def test_the_library_is_multiplied_once(fitted):
    """Two batches and a library of 10: rows sum to 10, not to 55 as in scvi-tools 1.5."""
    two = ["batch_0", "batch_2"]
    np.testing.assert_allclose(
        answer(fitted, "totalvi", transform_batch=two, library_size=10)["rna"].sum(axis=1), 10, rtol=1e-5
    )
    np.testing.assert_allclose(
        answer(fitted, "scvi", transform_batch="all", library_size=10)["rna"].sum(axis=1), 10, rtol=1e-5
    )


@pytest.mark.parametrize("verb", [av.tl.denoise, av.tl.foreground, av.tl.posterior_predictive, av.metrics.elbo])
def test_no_samples_are_no_number_of_samples(fitted, verb):
    with pytest.raises(TypeError, match="n_samples=None must be a whole number; leave it out for n_samples="):
        verb(fitted, model="totalvi", n_samples=None)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_several_batches_are_the_mean_of_each(fitted, n_samples):
    names = ["batch_2", "batch_0"]
    both = answer(fitted, "totalvi", transform_batch=names, n_samples=n_samples)
    each = [answer(fitted, "totalvi", transform_batch=name, n_samples=n_samples) for name in names]
    for mod in ("rna", "prot"):
        np.testing.assert_allclose(both[mod], (each[0][mod] + each[1][mod]) / 2, rtol=1e-4)
    assert not np.allclose(each[0]["rna"], each[1]["rna"], rtol=1e-3)
    every = av.tl.denoise(fitted, model="totalvi", transform_batch="all", n_samples=n_samples, return_mean=False)
    assert every["batch"].values.tolist() == ["batch_0", "batch_1", "batch_2"]
    kept = every["rna"].sel(batch=names)
    np.testing.assert_allclose(
        kept.mean([dim for dim in ("batch", "sample") if dim in kept.dims]), both["rna"], rtol=1e-4
    )


def test_samples_are_the_decoded_samples_of_the_posterior(fitted, monkeypatch):
    """With the noise switched off, samples are the posterior mean; with it, the mean of many comes near."""
    at_mean = answer(fitted, "scvi")["rna"]
    three = av.tl.denoise(fitted, model="scvi", n_samples=3, return_mean=False)["rna"]
    assert three.dims == ("sample", "obs", "rna_var") and not np.allclose(three[0], three[1], rtol=1e-2)
    np.testing.assert_allclose(answer(fitted, "scvi", n_samples=3)["rna"], three.mean("sample"), rtol=1e-5)
    np.testing.assert_array_equal(
        answer(fitted, "scvi", n_samples=3)["rna"], answer(fitted, "scvi", n_samples=3)["rna"]
    )
    other = answer(fitted, "scvi", n_samples=3, random_state=1)["rna"]
    assert not np.allclose(other, three.mean("sample"), rtol=1e-4)
    monkeypatch.setattr(
        encode, "noise", lambda seed, sample, rows, width, device: torch.zeros(rows.stop - rows.start, width)
    )
    np.testing.assert_allclose(answer(fitted, "scvi", n_samples=2)["rna"], at_mean, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"n_samples": 3, "transform_batch": "all"}, {"features": ["P01", "G003"]}])
def test_the_chunk_changes_nothing(fitted, monkeypatch, options):
    whole = av.tl.denoise(fitted, model="totalvi", inplace=False, **options)
    monkeypatch.setattr(encode, "CHUNK", 7)
    parts = av.tl.denoise(fitted, model="totalvi", inplace=False, **options)
    for mod in whole:  # float32 products of another size may round otherwise in the last digits
        np.testing.assert_allclose(parts[mod], whole[mod], rtol=1e-4)


def test_the_order_of_cells_changes_nothing(fitted):
    other = mudata_of({"rna": permuted(fitted["rna"], 1), "prot": permuted(fitted["prot"], 2)}, fitted)
    model = av.get.model(fitted, "totalvi")
    one, same = (av.tl.denoise(data, model=model, n_samples=2, inplace=False) for data in (fitted, other))
    assert same["obs"].values.tolist() == other.obs_names.tolist() != fitted.obs_names.tolist()
    for mod in ("rna", "prot"):
        np.testing.assert_array_equal(same[mod].sel(obs=one["obs"]), one[mod])


# what is asked for ------------------------------------------------------------------------------------------------


def test_some_features(fitted):
    whole = answer(fitted, "totalvi")
    table = av.tl.denoise(fitted, model="totalvi", features=["P05", "rna:G007", "G001"])
    assert table.columns.tolist() == ["P05", "rna:G007", "G001"] and table.index.equals(fitted.obs_names)
    np.testing.assert_allclose(table["P05"], whole["prot"]["P05"], rtol=1e-5)
    np.testing.assert_allclose(table[["rna:G007", "G001"]], whole["rna"][["G007", "G001"]], rtol=1e-4)


def calls(monkeypatch, owner, *names) -> dict[str, list]:
    """The arguments of each call of some methods, as they happen."""
    seen = {name: [] for name in names}
    for name in names:

        def spy(self, *args, _name=name, _method=getattr(owner, name), **options):
            seen[_name].append((args, options))
            return _method(self, *args, **options)

        monkeypatch.setattr(owner, name, spy)
    return seen


def test_the_encoder_runs_once_per_chunk(fitted, monkeypatch):
    seen = calls(monkeypatch, VAE, "encode")
    monkeypatch.setattr(encode, "CHUNK", 100)
    av.tl.denoise(fitted, model="totalvi", transform_batch="all", n_samples=4)
    assert len(seen["encode"]) == 3


def test_only_what_is_asked_for_is_decoded(fitted, monkeypatch):
    network = calls(monkeypatch, VAE, "decode_share", "decode_protein", "decode_rna")
    av.tl.denoise(fitted, model="totalvi", modality="prot")
    assert not network["decode_share"] and network["decode_protein"]
    network["decode_protein"].clear()
    av.tl.denoise(fitted, model="totalvi", modality="rna")
    assert network["decode_share"] and not network["decode_protein"]
    av.tl.denoise(fitted, model="totalvi", features=["G001"])
    assert not network["decode_protein"] and not network["decode_rna"]
    # neither the extra zeros nor the dispersions have any part in it
    decoder = calls(monkeypatch, RNADecoder, "_log_theta")
    zero = av.get.model(fitted, "scvi").network.rna.zero
    assert zero is not None
    heads = calls(monkeypatch, type(zero), "forward")
    av.tl.denoise(fitted, model="scvi", features=["G001", "G002"])
    assert not decoder["_log_theta"]
    assert sum(args[1] is not None and len(args) > 2 for args, _ in heads["forward"]) == 0  # no head by columns
    assert len(heads["forward"]) == 1 + 2 + 1 + 1  # encoder, its two heads, decoder, shares


# slots ------------------------------------------------------------------------------------------------------------


def test_slots_of_a_joint_model(fitted):
    expected = answer(fitted, "totalvi")
    av.tl.denoise(fitted, model="totalvi")
    layer = fitted["rna"].layers["totalvi_denoised"]
    assert type(layer) is np.ndarray and layer.dtype == np.float32
    np.testing.assert_array_equal(layer, expected["rna"].loc[fitted["rna"].obs_names])
    table = av.get.table(fitted, "totalvi_prot_denoised")
    assert isinstance(table, pd.DataFrame) and (table.dtypes == np.float32).all() and np.isfinite(table).all(axis=None)
    np.testing.assert_array_equal(table, expected["prot"].loc[fitted.obs_names])
    prot = fitted["prot"]
    assert prot.n_obs < fitted.n_obs
    np.testing.assert_array_equal(prot.layers["totalvi_denoised"], table.loc[prot.obs_names, prot.var_names])
    told = fitted.uns["totalvi"]["denoise"]
    assert told["prot"].pop("imputed").shape == (20,)
    assert told == {
        "rna": {"transform_batch": None, "n_samples": 1, "random_state": 0, "library_size": 1.0},
        "prot": {"transform_batch": None, "n_samples": 1, "random_state": 0, "include_background": False},
    }


def test_slots_of_an_rna_model(fitted):
    before = set(fitted.obsm) | set(fitted.uns)
    av.tl.denoise(fitted, model="scanvi", key_added="mine")
    assert fitted["rna"].layers["mine_denoised"].shape == (300, 60)
    assert fitted["rna"].uns["mine"]["denoise"]["rna"]["library_size"] == 1.0
    assert set(fitted.obsm) | set(fitted.uns) == before and "mine_denoised" not in fitted["prot"].layers


def test_one_modality_leaves_the_other_alone(fitted):
    av.tl.denoise(fitted, model="totalvi", library_size=1e4)
    before = fitted["rna"].layers["totalvi_denoised"].copy()
    av.tl.denoise(fitted, model="totalvi", modality="prot", include_background=True, transform_batch=["batch_0"])
    np.testing.assert_array_equal(fitted["rna"].layers["totalvi_denoised"], before)
    params = fitted.uns["totalvi"]["denoise"]
    assert params["rna"]["library_size"] == 1e4 and params["rna"]["transform_batch"] is None
    assert params["prot"]["include_background"] and params["prot"]["transform_batch"] == ["batch_0"]


@pytest.mark.parametrize("options", [{"features": ["G001"]}, {"return_mean": False}, {"inplace": False}])
def test_what_is_returned_is_not_stored(fitted, options):
    before = contents(fitted)
    assert av.tl.denoise(fitted, model="totalvi", **options) is not None
    for slot, value in contents(fitted).items():
        assert_same(value, before[slot], slot)


def test_files(fitted, tmp_path):
    av.tl.denoise(fitted, model="totalvi", transform_batch="all")
    av.tl.denoise(fitted, model="scvi")
    with quiet_mudata():
        fitted.write(tmp_path / "x.h5mu")
        back = read_h5mu(tmp_path / "x.h5mu")
    for key in ("totalvi", "scvi"):
        pd.testing.assert_frame_equal(av.get.denoised(back, model=key), av.get.denoised(fitted, model=key))
    assert list(back.uns["totalvi"]["denoise"]["rna"]["transform_batch"]) == ["batch_0", "batch_1", "batch_2"]


def test_a_new_fit_removes_what_it_makes_stale(fitted):
    av.tl.denoise(fitted, model="totalvi")
    av.tl.denoise(fitted, model="scvi")
    av.tl.totalvi(fitted, batch_key="batch", max_epochs=1)
    assert "totalvi_prot_denoised" not in fitted.obsm and "denoise" not in fitted.uns["totalvi"]
    assert "totalvi_denoised" not in fitted["rna"].layers and "totalvi_denoised" not in fitted["prot"].layers
    assert "scvi_denoised" in fitted["rna"].layers


def test_anndata():
    source = cite()
    adata = source["rna"].copy()
    adata.obs["batch"] = source.obs["batch"]
    adata.obsm["protein"] = source["prot"].to_df().reindex(adata.obs_names).rename(columns={"P01": "HLA/A"})
    av.tl.totalvi(adata, batch_key="batch", prot_obsm="protein", max_epochs=1)
    av.tl.denoise(adata)
    assert adata.layers["totalvi_denoised"].shape == (300, 60)
    assert adata.obsm["totalvi_prot_denoised"].columns[0] == "HLA|A"  # files cannot hold "/"
    assert av.get.table(adata, "totalvi_prot_denoised").columns[0] == "HLA/A"
    table = av.get.denoised(adata, ["G002", "HLA/A", "prot:P02"])
    assert table.columns.tolist() == ["G002", "HLA/A", "prot:P02"]
    np.testing.assert_array_equal(table["HLA/A"], adata.obsm["totalvi_prot_denoised"]["HLA|A"])
    np.testing.assert_array_equal(table["G002"], adata.layers["totalvi_denoised"][:, 1])


def test_other_data(fitted):
    """Cells of a modality that the model does not know, genes that it does not know, no proteins at all: NaN."""
    model = av.get.model(fitted, "totalvi")
    whole = answer(fitted, "totalvi")
    rna = permuted(fitted["rna"], 5)[:50, ::-1].copy()
    extra = AnnData(np.ones((50, 1), dtype=np.float32), rna.obs[[]], pd.DataFrame(index=["new"]))
    rna = AnnData(np.hstack([extra.X, rna.X.toarray()]), rna.obs[[]], pd.DataFrame(index=["new", *rna.var_names]))
    atac = AnnData(np.ones((2, 1), dtype=np.float32), pd.DataFrame(index=["stranger", rna.obs_names[0]]))
    atac.var_names = ["peak"]
    query = mudata_of({"atac": atac, "rna": rna})
    query.obs["batch"] = fitted.obs["batch"].reindex(query.obs_names).astype(object)
    query["rna"].obs["batch"] = fitted.obs["batch"].loc[rna.obs_names]
    av.tl.denoise(query, model=model)
    layer = pd.DataFrame(query["rna"].layers["totalvi_denoised"], rna.obs_names, rna.var_names)
    assert layer["new"].isna().all()
    np.testing.assert_allclose(layer[whole["rna"].columns], whole["rna"].loc[rna.obs_names], rtol=0.2)  # proteins gone
    table = av.get.table(query, "totalvi_prot_denoised")
    assert table.loc["stranger"].isna().all() and np.isfinite(table.drop("stranger")).all(axis=None)
    returned = av.tl.denoise(query, model=model, features=["G001", "P02"])
    assert returned.loc["stranger"].isna().all() and returned.index.equals(query.obs_names)
    kept = av.tl.denoise(query, model=model, return_mean=False, n_samples=2)
    assert np.isnan(kept["rna"].sel(obs="stranger")).all() and np.isfinite(kept["prot"].drop_sel(obs="stranger")).all()
    assert set(query.uns["totalvi"]) == {"denoise"}


def test_a_fit_may_follow_a_query(fitted):
    query = cite(random_state=3)
    av.tl.denoise(query, model=av.get.model(fitted, "totalvi"))
    av.tl.totalvi(query, batch_key="batch", max_epochs=1)
    assert "model" in query.uns["totalvi"] and "totalvi_prot_denoised" not in query.obsm
    query.uns["mine"] = {"denoise": {}, "something": 1}
    with pytest.raises(ValueError, match="holds something that is no model"):
        av.tl.totalvi(query, batch_key="batch", max_epochs=1, key_added="mine")


def test_a_view(fitted):
    part = fitted[fitted.obs["batch"] == "batch_0"]
    with quiet_mudata(), pytest.warns(UserWarning, match="is a view"):
        av.tl.denoise(part, model="totalvi")
    assert av.get.table(part, "totalvi_prot_denoised").shape == (100, 20)
    assert "totalvi_denoised" not in fitted["rna"].layers


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"transform_batch": "batch_9"}, "no batch 'batch_9'; it has 'batch_0', 'batch_1', 'batch_2'"),
        ({"transform_batch": []}, r"transform_batch=\[\] names none; leave it out for transform_batch=None"),
        ({"transform_batch": ["batch_0", "batch_0"]}, "several different"),
        ({"library_size": "median"}, "library_size='median' is not a number, nor one of 'observed', 'latent'"),
        ({"library_size": 0}, "library_size=0 must be a positive number"),
        ({"n_samples": 0}, "n_samples=0 must be"),
        ({"n_samples": 2.5}, "n_samples=2.5 must be"),
        ({"modality": "atac"}, "modality='atac' is not in the model"),
    ],
)
def test_errors_come_before_work(fitted, monkeypatch, options, match):
    monkeypatch.setattr(VAE, "encode", lambda *args: pytest.fail("cells were encoded"))
    with pytest.raises(ValueError, match=match):
        av.tl.denoise(fitted, model="totalvi", **options)


# truth ------------------------------------------------------------------------------------------------------------


def median_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Median over features of the correlation of logarithms across cells."""
    columns = zip(np.log1p(one).T, np.log1p(other).T, strict=True)
    return float(np.median([np.corrcoef(a, b)[0, 1] for a, b in columns if a.std() and b.std()]))


@pytest.mark.slow
def test_truth():
    """Measured 0.85 (raw counts 0.41), 0.76 stained, 0.69 hidden; the background of a cell cannot be imputed."""
    mdata = well_fitted()
    av.tl.denoise(mdata, library_size="observed", include_background=True)
    rng = np.random.default_rng(0)
    rna, truth = mdata["rna"].layers["totalvi_denoised"], mdata["rna"].layers["true_rate"]
    assert median_correlation(rna, truth) > 0.75 > 0.5 > median_correlation(mdata["rna"].X.toarray(), truth)
    assert abs(median_correlation(rna[rng.permutation(len(rna))], truth)) < 0.2
    hidden = ~mdata.obs_names.isin(mdata["prot"].obs_names)
    prot, truth = (av.get.table(mdata, key).to_numpy() for key in ("totalvi_prot_denoised", "true_protein_rate"))
    assert hidden.sum() == 200
    for cells, least in ((~hidden, 0.65), (hidden, 0.55)):
        assert median_correlation(prot[cells], truth[cells]) > least
        assert abs(median_correlation(prot[cells][rng.permutation(cells.sum())], truth[cells])) < 0.2
    # the background is what most of a measured count is, in most cells
    stained = mdata["prot"].to_df().reindex(mdata.obs_names[~hidden]).to_numpy()
    seen = np.isfinite(stained).all(0)
    fore_only = av.tl.denoise(mdata, modality="prot", inplace=False)["prot"].values[~hidden]
    assert (fore_only <= prot[~hidden]).all()
    with_background = median_correlation(prot[~hidden][:, seen], stained[:, seen])
    assert with_background > median_correlation(fore_only[:, seen], stained[:, seen])


def test_get_denoised(fitted):
    with pytest.raises(
        KeyError, match=r"no layers\['totalvi_denoised'\]; run av.tl.denoise\(data, model='totalvi'\) first"
    ):
        av.get.denoised(fitted, model="totalvi")
    av.tl.denoise(fitted, model="totalvi", modality="rna")
    assert av.get.denoised(fitted, model="totalvi").shape == (300, 60)
    with pytest.raises(KeyError, match=r"no obsm\['totalvi_prot_denoised'\]"):
        av.get.denoised(fitted, ["P01"], model="totalvi")
    av.tl.denoise(fitted, model="totalvi", key_added="mine")
    assert av.get.denoised(fitted, model="totalvi", key_added="mine").shape == (300, 80)


def test_get_denoised_with_shared_names():
    mdata = cite()
    mdata["prot"].var_names = ["G001", *mdata["prot"].var_names[1:]]
    mdata = mudata_of({"rna": mdata["rna"], "prot": mdata["prot"]})
    av.tl.totalvi(mdata, max_epochs=1)
    av.tl.denoise(mdata)
    table = av.get.denoised(mdata)
    assert table.columns.is_unique and table.columns[[0, 1, 60, 61]].tolist() == [
        "rna:G001",
        "G002",
        "prot:G001",
        "P02",
    ]
    np.testing.assert_array_equal(table["prot:G001"], av.get.table(mdata, "totalvi_prot_denoised")["G001"])
    with pytest.raises(ValueError, match="'G001' is in several modalities"):
        av.get.denoised(mdata, ["G001"])


def test_get_denoised_of_an_object_that_has_lost_genes(fitted):
    """A gene that is gone has no values, least of all those of another gene."""
    av.tl.denoise(fitted, model="totalvi")
    before = av.get.denoised(fitted, model="totalvi")
    mods = {"rna": fitted["rna"][:, 30:5:-1].copy(), "prot": fitted["prot"]}
    less = mudata_of(mods, like=fitted)
    less.uns["totalvi"] = fitted.uns["totalvi"]
    less.obsm["totalvi_prot_denoised"] = av.get.table(fitted, "totalvi_prot_denoised").loc[less.obs_names]
    gone, kept = fitted["rna"].var_names[0], fitted["rna"].var_names[10]
    table = av.get.denoised(less, model="totalvi")
    assert set(table) == {*less["rna"].var_names, *fitted["prot"].var_names}
    pd.testing.assert_frame_equal(table, before.loc[table.index, table.columns])
    pd.testing.assert_frame_equal(av.get.denoised(less, ["P01", kept], model="totalvi"), before[["P01", kept]])
    with pytest.raises(KeyError, match=f"'{gone}' is no longer among the genes"):
        av.get.denoised(less, [kept, gone], model="totalvi")


def test_a_batch_of_numbers_is_named_by_its_number():
    mdata = cite()
    mdata.obs["run"] = mdata.obs["batch"].cat.codes.to_numpy()
    av.tl.totalvi(mdata, batch_key="run", max_epochs=1)
    one, same = (av.tl.denoise(mdata, transform_batch=name, inplace=False) for name in ("1", 1))
    np.testing.assert_array_equal(one["rna"], same["rna"])
    assert "batch" not in av.tl.denoise(mdata, transform_batch=np.int64(1), return_mean=False).dims
    with pytest.raises(ValueError, match="no batch '7'"):
        av.tl.denoise(mdata, transform_batch=7)
