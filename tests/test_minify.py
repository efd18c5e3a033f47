"""tl.minify: the same answers from a small object, and clear words where counts are needed."""

import logging
import warnings

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import assert_same, cite, contents, dense, mudata_of, permuted, quiet_mudata
from mudata import MuData
from scipy import sparse

import anvi as av
from anvi._data import minified
from anvi._data.cells import read_cells
from anvi._posterior import encode
from anvi.tl._ask import ask

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")
WRITTEN = ("qz_mean", "qz_var", "library", "measured")


def part_of(data, name: str):
    """Where a model's slots are."""
    return data["rna"] if isinstance(data, MuData) and "total" not in name else data


def small(data, name: str, **options):
    return av.tl.minify(data, model=name, copy=True, **options)


def answers(data, name: str, model=None) -> dict[str, np.ndarray]:
    """What can be told from the latent space, cells in the order of the object."""
    asked = {"model": name if model is None else model}
    found = {
        "mean": av.tl.latent(data, inplace=False, **asked),
        "samples": av.tl.latent(data, n_samples=3, **asked).to_numpy(),
    }
    if "anvi" in name:
        found["proba"] = av.tl.predict(data, inplace=False, **asked).to_numpy()
        found["of a sample"] = av.tl.predict(data, inplace=False, use_posterior_mean=False, **asked).to_numpy()
    cells = ask(data, **asked).cells
    found["library"], found["names"] = cells.log_library.numpy(), cells.names
    if "total" in name:
        found["rate"] = av.tl.denoise(data, modality="prot", inplace=False, **asked)["prot"].to_numpy()
        found |= {"foreground": av.tl.foreground(data, inplace=False, **asked).to_numpy()}
        found["measured"] = cells.measured.numpy()
        found["panel"] = cells.panel.numpy()
    return found


def assert_same_answers(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for what, values in one.items():
        np.testing.assert_array_equal(values, other[what], err_msg=what)


@pytest.fixture(scope="module")
def adata():
    """One AnnData with proteins in obsm, NaN where there are none, and two models."""
    source = cite()
    adata = source["rna"].copy()
    adata.obs = source.obs.copy()
    adata.obsm["protein"] = source["prot"].to_df().reindex(adata.obs_names)
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        av.tl.scanvi(adata, batch_key="batch", max_epochs=1)
        av.tl.totalanvi(adata, batch_key="batch", prot_obsm="protein", max_epochs=1)
    return adata


# what is written and what is left ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_answer_is_the_same_to_the_bit(fitted, name):
    before = contents(fitted)
    lean = small(fitted, name)
    assert_same(contents(fitted), before)
    assert_same_answers(answers(lean, name), answers(fitted, name))
    mods = ("rna", "prot") if "total" in name else ("rna",)
    for mod in fitted.mod:
        assert lean[mod].shape == fitted[mod].shape
        assert (lean[mod].X.nnz == 0 and sparse.issparse(lean[mod].X)) if mod in mods else dense(lean[mod].X).any()


@pytest.mark.parametrize("name", MODELS)
def test_the_slots_hold_the_posterior_and_the_sums(fitted, name):
    lean = small(fitted, name)
    part, model = part_of(lean, name), av.get.model(fitted, name)
    mean, var = encode.posterior(model, read_cells(fitted, model.setup))
    cells = np.sort(fitted.obs_names.to_numpy(str))
    for slot, values in (("qz_mean", mean), ("qz_var", var)):
        written = part.obsm[f"{name}_{slot}"]
        assert written.dtype == np.float32
        np.testing.assert_array_equal(pd.DataFrame(written, index=part.obs_names).loc[cells], values)
    library = pd.Series(dense(fitted["rna"].X).sum(1), index=fitted["rna"].obs_names)
    written = part.obs[f"{name}_library"]
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written.loc[cells], library.loc[cells])
    assert part.uns[name]["minified"] is True
    if "total" in name:
        table = part.uns[name]["posterior"]["measured"]
        codes = part.obs[f"{name}_measured"].loc[cells].astype(str).astype(int)
        np.testing.assert_array_equal(table[codes], read_cells(fitted, model.setup).measured)
    else:
        assert f"{name}_measured" not in part.obs
        np.testing.assert_array_equal(lean.obs[f"rna:{name}_library"], written.reindex(lean.obs_names))


def test_nothing_else_is_touched(fitted):
    fitted.uns["mine"], fitted["rna"].uns["mine"] = {"a": [1, 2]}, "text"
    fitted["rna"].layers["lognorm"] = np.log1p(fitted["rna"].X)
    fitted.mod["atac"] = fitted["rna"].copy()
    with quiet_mudata():
        fitted.update()
        lean = small(fitted, "totalanvi")
    before, after = contents(fitted), contents(lean)
    new = {"obsm totalanvi_qz_mean", "obsm totalanvi_qz_var", "obsm totalanvi_rna_view"}
    assert set(after) - set(before) == new
    assert set(before) <= set(after)
    changed = {"rna X", "prot X", "obs", "uns totalanvi"}
    for slot in set(before) - changed:
        assert_same(after[slot], before[slot], slot)
    added = ["totalanvi_library", "totalanvi_measured"]
    pd.testing.assert_frame_equal(after["obs"].drop(columns=added), before["obs"])
    kept = {key: value for key, value in after["uns totalanvi"].items() if key not in ("minified", "posterior")}
    assert_same(kept, before["uns totalanvi"])


def test_counts_go_wherever_they_lie_and_the_log_says_where(caplog):
    mdata = cite()
    for mod in mdata.mod.values():
        mod.layers["counts"] = mod.X.copy()
        mod.layers["twice"] = mod.X.copy()
        mod.X = np.log1p(mod.X)
        mod.layers["lognorm"] = mod.X.copy()
    mdata["rna"].raw = mdata["rna"].copy()
    av.tl.totalvi(mdata, layer="counts", max_epochs=1)
    before = answers(mdata, "totalvi")
    with caplog.at_level(logging.INFO, logger="anvi"):
        av.tl.minify(mdata)
    for name, mod in mdata.mod.items():
        assert mod.X.nnz == 0 and mod.layers["counts"].nnz == 0 and mod.layers["twice"].nnz == 0
        assert dense(mod.layers["lognorm"]).any() and mod.raw is None
        for slot in ("X", "layers['counts']", "layers['twice']"):
            assert f"mdata['{name}'].{slot}" in caplog.text
    assert "mdata['rna'].raw" in caplog.text
    assert_same_answers(answers(mdata, "totalvi"), before)


def test_anndata(adata):
    for name in ("scanvi", "totalanvi"):
        lean = small(adata, name)
        assert lean.X.nnz == 0 and lean.shape == adata.shape
        assert_same_answers(answers(lean, name), answers(adata, name))
    assert sparse.issparse(lean.obsm["protein"]) and lean.obsm["protein"].shape == adata.obsm["protein"].shape
    assert list(lean.uns["protein_names"]) == list(adata.obsm["protein"].columns)
    assert lean.obsm["protein"].nnz == 0
    assert not sparse.issparse(small(adata, "scanvi").obsm["protein"])  # which scANVI does not read


def test_annotations_of_single_missing_values_and_of_absent_cells_are_kept():
    mdata = cite()
    counts = dense(mdata["prot"].X).astype(np.float32)
    counts[np.random.default_rng(0).random(counts.shape) < 0.05] = np.nan
    mdata["prot"].X = counts
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    model = av.get.model(mdata)
    measured = read_cells(mdata, model.setup).measured
    assert len(np.unique(measured.numpy(), axis=0)) > 50
    av.tl.minify(mdata)
    np.testing.assert_array_equal(ask(mdata, None).cells.measured, measured)


@pytest.mark.parametrize("options", [{"latent_distribution": "ln"}, {"size_factor_key": "size"}], ids=str)
def test_logistic_normal_and_size_factors(options):
    mdata = cite()
    mdata.obs["size"] = np.random.default_rng(0).uniform(0.5, 2, mdata.n_obs)
    av.tl.scvi(mdata, max_epochs=1, **options)
    assert_same_answers(answers(small(mdata, "scvi"), "scvi"), answers(mdata, "scvi"))


def test_samples_have_the_stored_variance(fitted):
    """A variance is a variance: scvi-tools takes it for a standard deviation here."""
    lean = small(fitted, "totalanvi")
    samples = av.tl.latent(lean, n_samples=300, model="totalanvi").to_numpy()
    ratio = samples.var(0) / lean.obsm["totalanvi_qz_var"]
    # 6,000 variances of 300 draws, each with a relative standard error of sqrt(2 / 300)
    assert abs(ratio.mean() - 1) < 0.01
    assert not np.allclose(lean.obsm["totalanvi_qz_var"], 1, atol=0.05)


def test_what_decodes_gives_the_same_numbers(fitted):
    lean = small(fitted, "totalanvi")
    genes = list(fitted["rna"].var_names[:4])
    questions = {
        "denoise": lambda data: av.tl.denoise(data, model="totalanvi", n_samples=2, inplace=False),
        "other batch": lambda data: av.tl.denoise(
            data, model="totalanvi", transform_batch="batch_1", library_size="observed", inplace=False
        ),
        "foreground": lambda data: av.tl.foreground(data, model="totalanvi", inplace=False),
        "predictive": lambda data: av.tl.posterior_predictive(data, model="totalanvi"),
        "correlation": lambda data: av.tl.feature_correlation(data, model="totalanvi", features=genes),
        "parameters": lambda data: av.get.likelihood_parameters(data, model="totalanvi"),
        "library": lambda data: av.get.library_size(data, model="totalanvi"),
    }
    for name, ask_it in questions.items():
        before, after = ask_it(fitted), ask_it(lean)
        if hasattr(before, "data_vars"):
            pairs = [(before[part], after[part]) for part in before.data_vars]
        else:
            pairs = [(before, after)]
        for one, other in pairs:
            np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=1e-6, err_msg=name)
    options = {"model": "totalanvi", "n_samples": 100, "inplace": False}
    before, after = (av.tl.differential_expression(data, "batch", **options) for data in (fitted, lean))
    for mod, table in before.items():
        counted = [f"{what}_{side}" for what in ("count", "pct_nz") for side in ("group", "reference")]
        pd.testing.assert_frame_equal(table.drop(columns=counted), after[mod], rtol=1e-6)
    av.tl.denoise(lean, model="totalanvi")
    assert np.isfinite(lean["rna"].layers["totalanvi_denoised"]).all()
    for verb in (av.tl.attributions, av.metrics.criticism):
        with pytest.raises(ValueError, match="needs counts"):
            verb(lean, model="totalanvi")
    for wants_counts in ({"weights": "importance"}, {"pseudocounts": "scvi"}):
        with pytest.raises(ValueError, match="needs counts"):
            av.tl.differential_expression(lean, "batch", **options, **wants_counts)


def test_counts_that_are_put_back_are_looked_at_again(fitted):
    lean = small(fitted, "totalanvi")
    for mod in fitted.mod:
        lean[mod].X = fitted[mod].X.copy()
    lean.uns["totalanvi"]["minified"] = False
    assert av.metrics.elbo(lean, model="totalanvi") == av.metrics.elbo(fitted, model="totalanvi")


# other objects ----------------------------------------------------------------------------------------------------


def size_of(path) -> int:
    """Bytes of a file or a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


@pytest.mark.parametrize("form", ["h5mu", "zarr"])
def test_a_written_object_is_small_and_answers(fitted, tmp_path, form):
    rng = np.random.default_rng(0)  # what makes files large: counts
    for part in (fitted, *fitted.mod.values()):
        for table in (part.varm, part.obsm, part.uns, part.layers if isinstance(part, AnnData) else {}):
            for slot in [slot for slot in table if slot and slot.startswith(("true", "truth", "totalvi", "sc"))]:
                del table[slot]
    for mod in fitted.mod.values():
        mod.layers["counts"] = sparse.csr_matrix(rng.poisson(5, (mod.n_obs, mod.n_vars)).astype(np.float32))
    lean = small(fitted, "totalanvi")
    before = answers(fitted, "totalanvi")
    for name, data in (("before", fitted), ("after", lean)):
        with quiet_mudata(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Writing zarr v2 data", category=UserWarning)
            data.write(tmp_path / name) if form == "h5mu" else data.write_zarr(tmp_path / name)
    sizes = [size_of(tmp_path / "before"), size_of(tmp_path / "after")]
    nonzero = fitted["rna"].X.nnz + fitted["rna"].layers["counts"].nnz
    # eight bytes each, less what proteins are imputed by (the same for any number of genes, and here there are few);
    # zarr compresses them, and what it writes of every array outweighs so few cells
    assert form == "zarr" or sizes[0] - sizes[1] > 6 * nonzero - lean.obsm["totalanvi_rna_view"].nbytes
    with quiet_mudata():
        back = mudata.read_h5mu(tmp_path / "after") if form == "h5mu" else mudata.read_zarr(tmp_path / "after")
    assert_same_answers(answers(back, "totalanvi"), before)
    with pytest.raises(ValueError, match="needs counts"):
        av.metrics.elbo(back, model="totalanvi")


def test_a_written_anndata_answers(adata, tmp_path):
    small(adata, "totalanvi").write_h5ad(tmp_path / "x")
    back = anndata.read_h5ad(tmp_path / "x")
    assert_same_answers(answers(back, "totalanvi"), answers(adata, "totalanvi"))


def test_a_model_folder_and_a_small_object_are_all_that_is_shared(fitted, tmp_path):
    before = answers(fitted, "totalanvi")
    av.write_model(fitted, tmp_path / "model", model="totalanvi")
    lean = small(fitted, "totalanvi")
    del lean.uns["totalanvi"]["model"], lean["rna"].uns["scvi"], lean["rna"].uns["scanvi"], lean.uns["totalvi"]
    lean.write(tmp_path / "x.h5mu")
    back = mudata.read(tmp_path / "x.h5mu")
    model = av.read_model(tmp_path / "model", device="cpu")
    assert_same_answers(answers(back, "totalanvi", model), before)
    np.testing.assert_array_equal(av.tl.latent(back, model=tmp_path / "model", inplace=False), before["mean"])


def test_cells_that_the_model_has_not_seen(fitted):
    new = cite(90)
    model = av.get.model(fitted, "totalanvi")
    lean = av.tl.minify(new, model=model, copy=True)
    assert_same_answers(answers(lean, "totalanvi", model), answers(new, "totalanvi", model))


def test_a_subset_and_another_order_of_cells(fitted):
    before = pd.DataFrame(answers(fitted, "totalvi")["mean"], index=fitted.obs_names)
    lean = small(fitted, "totalvi")
    part = lean[np.random.default_rng(0).permutation(lean.n_obs)[:50]].copy()
    after = av.tl.latent(part, model="totalvi", inplace=False)
    np.testing.assert_array_equal(after, before.loc[part.obs_names])
    for mod in ("rna", "prot"):
        lean.mod[mod] = permuted(lean[mod], 3)
    np.testing.assert_array_equal(av.tl.latent(lean, model="totalvi", inplace=False), before)
    shuffled = mudata_of({name: permuted(mod, 1) for name, mod in fitted.mod.items()}, like=fitted)
    shuffled.uns = fitted.uns
    lean = small(shuffled, "totalvi")
    np.testing.assert_array_equal(av.tl.latent(lean, model="totalvi", inplace=False), before.loc[lean.obs_names])
    sums = pd.Series(dense(fitted["rna"].X).sum(1), index=fitted["rna"].obs_names)
    np.testing.assert_array_equal(lean.obs["totalvi_library"], sums.loc[lean.obs_names])


def test_a_view_becomes_an_object_of_its_own(fitted):
    view = fitted[:100]
    with quiet_mudata(), pytest.warns(UserWarning, match="view"):
        av.tl.minify(view, model="totalanvi")
    assert view["rna"].X.nnz == 0 and dense(fitted["rna"].X).any() and "totalanvi_qz_mean" not in fitted.obsm
    np.testing.assert_array_equal(
        av.tl.latent(view, model="totalanvi", inplace=False),
        av.tl.latent(fitted[:100].copy(), model="totalanvi", inplace=False),
    )


# counts that stay -------------------------------------------------------------------------------------------------


def test_with_counts_everything_goes_on_as_before(fitted):
    before = {name: av.metrics.elbo(fitted, model=name) for name in MODELS}
    lean = small(fitted, "totalanvi", keep_counts=True)
    assert lean.uns["totalanvi"]["minified"] is False and "totalanvi_qz_mean" in lean.obsm
    for slot, values in contents(fitted).items():
        if slot not in ("obs", "uns totalanvi"):
            assert_same(contents(lean)[slot], values, slot)
    assert {name: av.metrics.elbo(lean, model=name) for name in MODELS} == before
    lean.obsm["totalanvi_qz_mean"][:] = 0  # the encoder speaks, not the slot
    assert_same_answers(answers(lean, "totalanvi"), answers(fitted, "totalanvi"))


def test_two_models_can_share_an_object_without_counts(fitted):
    before = {name: answers(fitted, name) for name in MODELS}
    for name in ("scanvi", "totalvi"):
        av.tl.minify(fitted, model=name, keep_counts=True)
    av.tl.minify(fitted, model="totalanvi")
    for name in ("scanvi", "totalvi", "totalanvi"):
        assert_same_answers(answers(fitted, name), before[name])
    with pytest.raises(ValueError, match="av.tl.minify dropped the counts"):
        av.tl.latent(fitted, model="scvi")


def test_a_new_fit_takes_the_posterior_of_the_old_away(fitted):
    av.tl.minify(fitted, model="totalanvi", keep_counts=True)
    av.tl.minify(fitted, model="scanvi", keep_counts=True)
    av.tl.totalanvi(fitted, batch_key="batch", max_epochs=1)
    av.tl.scanvi(fitted, batch_key="batch", max_epochs=1)
    for name in ("totalanvi", "scanvi"):
        part = part_of(fitted, name)
        there = [*part.obs, *part.obsm, *fitted.obs, *part.uns[name]]
        assert not [slot for slot in there if slot.startswith((f"{name}_qz", f"{name}_library", f"{name}_measured"))]
        assert "minified" not in part.uns[name]


# errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["elbo", "marginal_likelihood", "reconstruction_error"])
def test_metrics_of_counts_say_what_is_missing(fitted, adata, metric):
    for data, name in ((fitted, "totalanvi"), (fitted, "scvi"), (adata, "totalanvi")):
        with pytest.raises(ValueError, match=rf"needs counts.*uns\['{name}'\]\['minified'\].*keep_counts=True"):
            getattr(av.metrics, metric)(small(data, name), model=name)


def test_fits_checks_and_other_models_say_what_is_missing(fitted, adata, no_training):
    lean = small(fitted, "totalanvi")
    gone = (
        r"mdata\['(rna|prot)'\]\.X is empty: av\.tl\.minify dropped the counts of this object for the model 'totalanvi'"
    )
    for fit in (av.tl.scvi, av.tl.scanvi, av.tl.totalvi, av.tl.totalanvi):
        with pytest.raises(ValueError, match=gone):
            fit(lean, batch_key="batch")
    with pytest.raises(ValueError, match=gone):
        av.tl.totalanvi(lean, batch_key="batch", init="totalvi", key_added="second")
    with pytest.raises(ValueError, match=gone):
        av.tl.predict(lean, model="scanvi")
    with pytest.raises(ValueError, match=gone):
        av.tl.minify(lean, model="totalvi")
    with pytest.raises(ValueError, match="needs counts"):
        av.tl.minify(lean, model="totalanvi")
    with pytest.raises(ValueError, match=gone):
        av.pp.panels(lean, "batch")
    report = av.pp.check(lean, batch_key="batch")
    assert not report.ok and "av.tl.minify dropped the counts" in report.problems[0]
    with pytest.raises(ValueError, match=r"data\.(X|obsm\['protein'\]) is empty"):
        av.tl.totalvi(small(adata, "totalanvi"), prot_obsm="protein")
    # RNA alone is gone: proteins are there
    rna_only = small(fitted, "scvi")
    with pytest.raises(ValueError, match=r"mdata\['rna'\]\.X is empty.*'scvi'"):
        av.tl.latent(rna_only, model="totalanvi")


def test_data_that_were_always_empty_keep_their_own_error(fitted):
    fitted["rna"].X = sparse.csr_matrix(fitted["rna"].shape)
    with pytest.raises(ValueError, match="cells without a single count"):
        av.tl.latent(fitted, model="scvi")


def test_a_latent_library_size_needs_its_counts():
    mdata = cite()
    av.tl.scvi(mdata, library="latent", max_epochs=1)
    with pytest.raises(ValueError, match="library size is latent.*keep_counts=True"):
        av.tl.minify(mdata)
    assert dense(mdata["rna"].X).any() and "scvi_qz_mean" not in mdata["rna"].obsm
    av.tl.minify(mdata, keep_counts=True)
    assert "scvi_qz_mean" in mdata["rna"].obsm


def test_the_posterior_of_another_model_is_not_taken(fitted):
    other = cite()
    av.tl.totalanvi(other, batch_key="batch", max_epochs=1, random_state=7)
    model = av.get.model(other)
    with pytest.raises(ValueError, match="fit of its own under 'totalanvi'"):
        av.tl.minify(fitted, model=model)
    lean = small(fitted, "totalanvi")
    with pytest.raises(ValueError, match="minified for another model"):
        av.tl.latent(lean, model=model, inplace=False)


def test_damage_is_named(fitted):
    lean = small(fitted, "totalanvi")
    broken = lean.copy()
    del broken.obsm["totalanvi_qz_var"]
    with pytest.raises(KeyError, match=r"obsm\['totalanvi_qz_var'\] is gone"):
        av.tl.latent(broken, model="totalanvi")
    del lean.obs["totalanvi_measured"]
    with pytest.raises(KeyError, match=r"obs\['totalanvi_measured'\] is gone"):
        av.tl.latent(lean, model="totalanvi")
    missing = small(fitted, "scanvi")
    missing["rna"].obsm["scanvi_qz_mean"][5] = np.nan
    with pytest.raises(ValueError, match=rf"1 cells \(first: '{missing['rna'].obs_names[5]}'\)"):
        av.tl.latent(missing, model="scanvi")


def test_cells_that_came_later_are_named(fitted):
    lean = small(fitted, "totalanvi")
    new = cite(60)
    for mod in new.mod.values():
        mod.obs_names = "new_" + mod.obs_names
    with warnings.catch_warnings(), quiet_mudata():
        warnings.simplefilter("ignore")
        both = mudata_of({m: anndata.concat([lean[m], new[m]], join="inner") for m in ("rna", "prot")})
    table = pd.DataFrame(lean.obsm["totalanvi_qz_mean"], index=lean.obs_names)
    both.uns = lean.uns
    both.obs = both.obs.join(lean.obs[["batch", "totalanvi_library", "totalanvi_measured"]])
    for slot in ("totalanvi_qz_mean", "totalanvi_qz_var"):
        both.obsm[slot] = table.reindex(both.obs_names).to_numpy()
    with pytest.raises(ValueError, match=r"60 cells \(first: 'new_cell_00001'\) have nothing"):
        av.tl.latent(both, model="totalanvi")


def test_a_backed_object_is_not_emptied(fitted, tmp_path):
    fitted.write(tmp_path / "x.h5mu")
    with quiet_mudata():
        backed = mudata.read_h5mu(tmp_path / "x.h5mu", backed="r+")
    with pytest.raises(ValueError, match="backed by a file"):
        av.tl.minify(backed, model="totalanvi")
    backed.file.close()
    with quiet_mudata():
        assert dense(mudata.read(tmp_path / "x.h5mu")["rna"].X).any()


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="MuData or an AnnData"):
        av.tl.minify(pd.DataFrame())
    assert not minified.is_minified(AnnData(np.ones((2, 2))), av._data.setup.Setup(("a", "b")), "scvi")
