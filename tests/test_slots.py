import json
import logging
import warnings
from contextlib import nullcontext

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from helpers import assert_same, cite, contents, mudata_of, permuted, quiet_mudata
from mudata import MuData

import anvi as av
from anvi._data import slots

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")
LATENT = {"scvi": 10, "scanvi": 10, "totalvi": 20, "totalanvi": 20}
CLASSES = ["B", "CD14 Mono", "CD4 T", "CD8 T", "NK", "pDC"]


def citeseq_anndata() -> AnnData:
    source = cite()
    adata = source["rna"].copy()
    adata.obs = source.obs.copy()
    adata.obsm["protein"] = source["prot"].to_df().reindex(adata.obs_names)
    return adata


def run(name, data, **options):
    if isinstance(data, AnnData) and "total" in name:
        options["prot_obsm"] = "protein"
    return getattr(av.tl, name)(data, **{"batch_key": "batch", "max_epochs": 1} | options)


def home(data, name):
    return data["rna"] if isinstance(data, MuData) and "total" not in name else data


@pytest.fixture(scope="module")
def anndatas():
    """AnnData fitted by each verb, filled as needed."""
    return {}


# the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["MuData", "AnnData"])
@pytest.mark.parametrize("name", MODELS)
class TestContract:
    @pytest.fixture
    def data(self, fitted, anndatas, name, kind):
        if kind == "MuData":
            return fitted
        if name not in anndatas:
            anndatas[name] = citeseq_anndata()
            run(name, anndatas[name], max_epochs=2)
        return anndatas[name]

    def test_latent(self, data, name, kind):
        latent = home(data, name).obsm[f"X_{name}"]
        assert type(latent) is np.ndarray and latent.dtype == np.float32 and latent.shape == (300, LATENT[name])
        assert np.isfinite(latent).all() and latent.std() > 0

    def test_split(self, data, name, kind):
        split = home(data, name).obs[f"{name}_split"]
        assert list(split.cat.categories) == ["train", "validation"] and split.notna().all()
        assert (split == "validation").sum() == 30

    def test_predictions(self, data, name, kind):
        part = home(data, name)
        if not name.endswith("anvi"):
            assert f"{name}_prediction" not in part.obs and f"{name}_proba" not in part.obsm
            return
        prediction, confidence = part.obs[f"{name}_prediction"], part.obs[f"{name}_confidence"]
        proba = av.get.table(part, f"{name}_proba")
        assert list(prediction.cat.categories) == CLASSES and not prediction.cat.ordered and prediction.notna().all()
        assert confidence.dtype == np.float32 and confidence.between(1 / 6, 1).all()
        assert isinstance(proba, pd.DataFrame) and list(proba.columns) == CLASSES
        assert (proba.dtypes == np.float32).all() and proba.index.equals(part.obs_names)
        np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-5)
        assert (proba.idxmax(axis=1) == prediction.astype(str)).all()
        np.testing.assert_array_equal(proba.max(axis=1), confidence)

    def test_label(self, data, name, kind):
        """The user's where there is one, cell by cell, else the prediction."""
        part = home(data, name)
        if not name.endswith("anvi"):
            assert f"{name}_label" not in part.obs
            return
        label, prediction = part.obs[f"{name}_label"], part.obs[f"{name}_prediction"]
        assert list(label.cat.categories) == CLASSES and label.notna().all()
        given = data.obs["cell_type"].astype(str)
        assert (given == "Unknown").sum() == 200
        for cell in data.obs_names:
            assert label[cell] == (prediction[cell] if given[cell] == "Unknown" else given[cell])
        assert (prediction.astype(str) != label.astype(str)).any()  # else this test would say nothing

    def test_uns(self, data, name, kind):
        stored = home(data, name).uns[name]
        assert sorted(stored) == ["batches", "classes", "features", "history", "model", "panels", "params"]
        labelled, joint = name.endswith("anvi"), "total" in name
        assert stored["classes"] == (CLASSES if labelled else [])
        assert stored["batches"] == ["batch_0", "batch_1", "batch_2"]
        assert stored["panels"] == (stored["batches"] if joint else [])
        assert list(stored["features"]) == (["rna", "prot"] if joint else ["rna"])
        assert stored["features"]["rna"] == list(cite()["rna"].var_names)
        if joint:
            assert stored["features"]["prot"] == list(cite()["prot"].var_names)
        history = stored["history"]
        assert isinstance(history, pd.DataFrame) and len(history) == 2
        assert history.select_dtypes("number").shape == history.shape
        assert stored["model"]["weights"].dtype == np.uint8 and json.loads(stored["model"]["config"])["name"] == name

    def test_params(self, data, name, kind):
        params = home(data, name).uns[name]["params"]
        assert all(value is None or isinstance(value, str | int | float | bool) for value in params.values())
        expected = {"method": name, "batch_key": "batch", "panel_key": None, "random_state": 0, "n_cells": 300}
        expected |= {"n_train": 270, "epochs": 2, "max_epochs": 2, "device": "cpu", "anvi": av.__version__}
        expected |= {"labels_key": "cell_type" if name.endswith("anvi") else None, "unlabeled_category": "Unknown"}
        assert {key: params[key] for key in expected} == expected
        assert params["n_labelled"] == (100 if name.endswith("anvi") else 0)
        assert params["best_epoch"] == home(data, name).uns[name]["history"]["validation_loss"].idxmin() + 1

    def test_nothing_in_bool(self, data, name, kind):
        """A bool array in obsm is silently corrupted when cells are added."""
        own = [value for key, value in home(data, name).obsm.items() if name in key]
        assert own and all(np.asarray(value).dtype == np.float32 for value in own)


@pytest.mark.parametrize("name", MODELS)
def test_mirror(name):
    """Columns of an RNA model are repeated in mdata.obs; not in a copy, where mudata 0.3 would pull them up itself."""
    data = cite()
    run(name, data)
    columns = [
        f"{name}_{what}"
        for what in ("split", *(("prediction", "confidence", "margin", "entropy", "label") if name == "scanvi" else ()))
    ]
    mirrored = [column for column in data.obs if column.startswith("rna:")]
    if "total" in name:
        assert not mirrored
        return
    assert sorted(mirrored) == sorted(f"rna:{column}" for column in columns)
    for column in columns:
        assert column not in data.obs  # never in both forms globally
        pd.testing.assert_series_equal(data.obs[f"rna:{column}"], data["rna"].obs[column], check_names=False)


def test_an_anndata_mirrors_nothing():
    adata = citeseq_anndata()
    run("scvi", adata)
    assert not [column for column in adata.obs if ":" in column]


def test_anndata_and_mudata_get_the_same_numbers():
    mdata = cite()
    adata = citeseq_anndata()
    for name in MODELS:
        run(name, mdata)
        run(name, adata)
        np.testing.assert_array_equal(home(mdata, name).obsm[f"X_{name}"], adata.obsm[f"X_{name}"])


# nothing else is touched ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["MuData", "AnnData"])
def test_nothing_else_is_touched(name, kind):
    mdata = cite()
    mdata["rna"].layers["raw"] = mdata["rna"].X.copy()
    mdata.uns["mine"] = {"a": [1, 2]}
    data = mdata if kind == "MuData" else citeseq_anndata()
    before = contents(data)
    assert run(name, data) is None
    after = contents(data)
    for slot, value in before.items():
        if isinstance(value, pd.DataFrame):
            added = [column for column in after[slot] if column not in value]
            assert all(name in column for column in added)
            after[slot] = after[slot].drop(columns=added)
        assert_same(after[slot], value, slot)
    added = [slot for slot in after if slot not in before]
    assert added and all(name in slot for slot in added)


@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
@pytest.mark.parametrize("kind", ["MuData", "AnnData"])
def test_copy_leaves_the_input_untouched(name, kind):
    data = cite() if kind == "MuData" else citeseq_anndata()
    before = contents(data)
    copied = run(name, data, copy=True)
    assert_same(contents(data), before)
    assert type(copied) is type(data) and f"X_{name}" in home(copied, name).obsm
    run(name, data)
    np.testing.assert_array_equal(home(copied, name).obsm[f"X_{name}"], home(data, name).obsm[f"X_{name}"])


# what `pytest.warns` does not expect it raises again, in the name of mudata's caller
MUDATA_SAYS = pytest.mark.filterwarnings(r"ignore:From 0\.4 \.update\(\):FutureWarning")


@MUDATA_SAYS
@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
@pytest.mark.parametrize("kind", ["MuData", "AnnData"])
def test_a_view_becomes_an_object_of_its_own(name, kind):
    parent = cite() if kind == "MuData" else citeseq_anndata()
    before = contents(parent)
    view = parent[parent.obs["batch"] != "batch_0"]
    assert view.is_view
    with pytest.warns(UserWarning, match=r"is a view: the results are in the subset.*\.copy\(\)") as caught:
        run(name, view)
    assert [warning.filename for warning in caught if "is a view" in str(warning.message)] == [__file__]
    assert not view.is_view and f"X_{name}" in home(view, name).obsm and name in home(view, name).uns
    assert_same(contents(parent), before)
    expected = parent[parent.obs["batch"] != "batch_0"].copy()
    run(name, expected)
    np.testing.assert_array_equal(home(view, name).obsm[f"X_{name}"], home(expected, name).obsm[f"X_{name}"])


@MUDATA_SAYS
def test_a_view_as_a_query(fitted):
    before = contents(fitted)
    view = fitted[:100]
    with pytest.warns(UserWarning, match="is a view") as caught:
        av.tl.predict(view, model="totalanvi", key_added="mine")
    assert [warning.filename for warning in caught if "is a view" in str(warning.message)] == [__file__]
    assert "mine_prediction" in view.obs
    assert_same(contents(fitted), before)
    view = fitted[:100]
    av.tl.predict(view, model="totalanvi", inplace=False)  # nothing is written: no warning
    assert view.is_view


def test_a_copy_of_a_view_needs_no_warning():
    copied = av.tl.scvi(cite()[:200], max_epochs=1, copy=True)
    assert copied["rna"].obsm["X_scvi"].shape == (200, 10)


def test_fitting_again_replaces(fitted):
    before = contents(fitted)
    run("totalanvi", fitted, max_epochs=2)
    after = contents(fitted)
    seconds = [state.pop("uns totalanvi")["params"].pop("seconds") for state in (before, after)]
    assert all(second >= 0 for second in seconds)
    assert_same(after, before)


# keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "expected"), [("mine", "mine"), ("X_mine", "mine"), ("a b.c", "a b.c")])
def test_key_added(key, expected):
    mdata = cite()
    run("totalanvi", mdata, key_added=key)
    assert f"X_{expected}" in mdata.obsm and f"{expected}_proba" in mdata.obsm and expected in mdata.uns
    assert f"{expected}_prediction" in mdata.obs and "totalanvi" not in mdata.uns
    assert mdata.uns[expected]["params"]["method"] == "totalanvi"


@pytest.mark.parametrize("key", ["a/b", "rna:x", "X_", "/"])
def test_bad_keys(key):
    with pytest.raises(ValueError, match="must be a plain name without '/' and ':'"):
        slots.clean_key(key)


def test_slot_names():
    names = [f("k") for f in (slots.latent, slots.prediction, slots.confidence, slots.split, slots.proba)]
    assert names == ["X_k", "k_prediction", "k_confidence", "k_split", "k_proba"]
    assert slots.measured() == "measured"


def test_what_was_written_is_said(caplog):
    mdata = cite()
    with caplog.at_level(logging.INFO, "anvi"):
        run("scvi", mdata)
        run("totalanvi", mdata)
    lines = [record.message for record in caplog.records if record.message.startswith("written")]
    assert lines[0] == "written of mdata['rna']: obsm['X_scvi'], obs['scvi_split'], uns['scvi']"
    for slot in ("obsm['X_totalanvi']", "obsm['totalanvi_proba']", "obs['totalanvi_prediction']", "uns['totalanvi']"):
        assert slot in lines[1]


@pytest.mark.parametrize("name", MODELS)
def test_a_modality_that_is_a_view(name):
    """As in MuData({"rna": rna[:, variable_genes]}), also when the view already holds results."""
    whole = cite()
    run(name, whole)
    mdata = mudata_of({"rna": whole["rna"][:, 10:], "prot": whole["prot"][:, 2:]}, whole)
    assert mdata["rna"].is_view
    run(name, mdata)
    assert not mdata["rna"].is_view and len(home(mdata, name).uns[name]["features"]["rna"]) == 50
    assert len(home(whole, name).uns[name]["features"]["rna"]) == 60


# colours ----------------------------------------------------------------------------------------------------------

PALETTE = [f"#{i}{i}{i}{i}{i}{i}" for i in range(7)]


@pytest.mark.parametrize("place", ["mdata", "rna", "rna: explicit", "prot"])
def test_a_class_keeps_its_colour(place):
    mdata = cite()
    labels = mdata.obs.pop("cell_type")
    part = mdata if place == "mdata" else mdata[place[:4].rstrip(":")]
    part.obs["ct"] = labels.reindex(part.obs_names)
    part.uns["ct_colors"] = np.array(PALETTE) if place == "rna" else PALETTE
    run("totalanvi", mdata, labels_key="rna:ct" if place == "rna: explicit" else "ct")
    colour_of = dict(zip(labels.cat.categories, PALETTE, strict=True))
    assert mdata.uns["totalanvi_prediction_colors"] == [colour_of[name] for name in CLASSES]
    assert mdata.uns["totalanvi_label_colors"] == [colour_of[name] for name in CLASSES]


def test_colours_of_an_rna_model():
    mdata = cite()
    mdata.uns["cell_type_colors"] = PALETTE
    run("scanvi", mdata)
    assert len(mdata["rna"].uns["scanvi_prediction_colors"]) == 6


@pytest.mark.parametrize("colours", [None, PALETTE[:3]], ids=["none", "too few"])
def test_no_colours(colours):
    mdata = cite()
    if colours:
        mdata.uns["cell_type_colors"] = colours
    run("totalanvi", mdata)
    assert "totalanvi_prediction_colors" not in mdata.uns


# files ------------------------------------------------------------------------------------------------------------


def write_and_read(data, path, form):
    """Through a file, without the truth of the synthetic data."""
    data = data.copy()
    for part in [data, *data.mod.values()] if isinstance(data, MuData) else [data]:
        for slots_of in (part.obsm, part.varm, part.layers if isinstance(part, AnnData) else {}, part.uns):
            for slot in [slot for slot in slots_of if slot and slot.startswith("tru")]:
                del slots_of[slot]
    file = path / f"data.{form}"
    with quiet_mudata(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Writing zarr v2 data", category=UserWarning)
        if isinstance(data, AnnData):
            data.write_h5ad(file) if form == "h5" else data.write_zarr(file)
            return anndata.read_h5ad(file) if form == "h5" else anndata.read_zarr(file)
        data.write_h5mu(file) if form == "h5" else data.write_zarr(file)
        return mudata.read_h5mu(file) if form == "h5" else mudata.read_zarr(file)


def answers(data, name):
    """All that a fitted model says."""
    found = [av.tl.latent(data, model=name, inplace=False)]
    return found + ([av.tl.predict(data, model=name, inplace=False)] if name.endswith("anvi") else [])


def assert_same_fit(one, other, name):
    """Raise unless the slots of a fit say the same in both objects."""
    one, other = home(one, name), home(other, name)
    np.testing.assert_array_equal(one.obsm[f"X_{name}"], other.obsm[f"X_{name}"])
    for column in one.obs:
        if name in column:
            assert one.obs[column].dtype == other.obs[column].dtype
            assert (one.obs[column] == other.obs[column]).all()
    for key in ("classes", "batches", "panels"):
        assert list(map(str, one.uns[name][key])) == list(map(str, other.uns[name][key]))
    params = one.uns[name]["params"]
    nothing = {fact: None for fact, value in other.uns[name]["params"].items() if value is None}  # not in anndata 0.11
    assert nothing | params == other.uns[name]["params"]
    np.testing.assert_array_equal(one.uns[name]["model"]["weights"], other.uns[name]["model"]["weights"])
    histories = [av.get.history(data, model=name).reset_index(drop=True) for data in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


@pytest.mark.parametrize("form", ["h5", "zarr"])
def test_mudata_through_a_file(fitted, tmp_path, form):
    fitted.uns["totalanvi_prediction_colors"] = PALETTE[:6]
    names = MODELS if form == "h5" else ("scanvi",)
    for name in set(MODELS) - set(names):
        del home(fitted, name).uns[name]
    back = write_and_read(fitted, tmp_path, form)
    for name in names:
        assert_same_fit(back, fitted, name)
        for one, other in zip(answers(back, name), answers(fitted, name), strict=True):
            np.testing.assert_array_equal(one, other)
        assert av.get.model(back, name).info == av.get.model(fitted, name).info
    proba = av.get.table(fitted["rna"], "scanvi_proba")
    pd.testing.assert_frame_equal(av.get.table(back["rna"], "scanvi_proba"), proba, check_exact=True)
    av.tl.predict(back, model="scanvi")  # writes into what was read
    pd.testing.assert_frame_equal(av.get.table(back["rna"], "scanvi_proba"), proba, check_exact=True)


def test_twice_through_a_file(fitted, tmp_path):
    back = write_and_read(fitted, tmp_path, "h5")
    (tmp_path / "again").mkdir()
    assert_same_fit(write_and_read(back, tmp_path / "again", "h5"), fitted, "totalanvi")


def test_anndata_through_a_file(tmp_path):
    adata = citeseq_anndata()
    run("totalanvi", adata)
    back = write_and_read(adata, tmp_path, "h5")
    assert_same_fit(back, adata, "totalanvi")
    for one, other in zip(answers(back, "totalanvi"), answers(adata, "totalanvi"), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("form", "name"), [("h5", "scanvi"), ("h5", "totalanvi"), ("zarr", "totalanvi")])
def test_a_class_with_a_slash(tmp_path, form, name):
    mdata = cite()
    mdata.obs["cell_type"] = mdata.obs["cell_type"].cat.rename_categories({"NK": "NK/T"})
    mdata.uns["cell_type_colors"] = PALETTE
    in_a_frame = home(mdata, name) is not mdata  # the names of an array are elsewhere, and exact
    told = pytest.warns(UserWarning, match=r"'/' are written with '\|' in the columns")
    with told if in_a_frame else nullcontext():
        run(name, mdata)
    back = write_and_read(mdata, tmp_path, form)
    for data in (mdata, back):
        part = home(data, name)
        assert list(av.get.table(part, f"{name}_proba").columns) == ["B", "CD14 Mono", "CD4 T", "CD8 T", "NK/T", "pDC"]
        assert not in_a_frame or "NK|T" in part.obsm[f"{name}_proba"]
        assert "NK/T" in part.obs[f"{name}_prediction"].cat.categories
        assert "NK/T" in list(part.uns[name]["classes"])
        assert list(av.get.proba(data).columns) == list(av.get.model(data).classes)
        assert "NK/T" in av.tl.predict(data, inplace=False).columns
    np.testing.assert_array_equal(av.get.proba(back), av.get.proba(mdata))
    for one, other in zip(answers(back, name), answers(mdata, name), strict=True):
        np.testing.assert_array_equal(one, other)
    told = pytest.warns(UserWarning, match="'/' are written with")
    with told if in_a_frame else nullcontext():
        av.tl.predict(back)
    av.tl.predict(back, soft=False)  # nothing to write with "|"


def test_a_gene_or_batch_with_a_slash(tmp_path):
    mdata = cite()
    mdata["rna"].var_names = [f"HLA/{i}" for i in range(60)]
    mdata = mudata_of({"rna": mdata["rna"], "prot": mdata["prot"]}, mdata)
    mdata.obs["batch"] = mdata.obs["batch"].cat.rename_categories({"batch_0": "a/b"})
    run("totalanvi", mdata)
    back = write_and_read(mdata, tmp_path, "h5")
    np.testing.assert_array_equal(answers(back, "totalanvi")[0], answers(mdata, "totalanvi")[0])


# what others do with the object -----------------------------------------------------------------------------------


def test_update_keeps_everything(fitted):
    before = contents(fitted)
    with quiet_mudata():
        fitted.update()
    after = contents(fitted)
    for slot, value in before.items():
        if slot == "obs":
            ours = [column for column in value if "vi_" in column]
            pd.testing.assert_frame_equal(after[slot][ours], value[ours], check_exact=True)
        elif "vi" in slot:
            assert_same(after[slot], value, slot)


def test_update_after_a_modality_lost_cells(fitted):
    before = pd.DataFrame(fitted.obsm["X_totalanvi"], fitted.obs_names)
    fitted.mod["prot"] = fitted["prot"][fitted["prot"].obs_names[50:]].copy()
    with quiet_mudata():
        fitted.update()
    np.testing.assert_array_equal(fitted.obsm["X_totalanvi"], before.loc[fitted.obs_names])
    assert list(av.get.table(fitted, "totalanvi_proba").index) == list(fitted.obs_names)
    av.tl.predict(fitted, model="totalanvi")


def test_subsets_keep_model_and_slots(fitted):
    chosen = fitted.obs_names[10:200:3]
    subset = fitted[chosen].copy()
    whole = pd.DataFrame(fitted.obsm["X_totalanvi"], fitted.obs_names)
    np.testing.assert_array_equal(subset.obsm["X_totalanvi"], whole.loc[chosen])
    pd.testing.assert_frame_equal(
        av.get.table(subset, "totalanvi_proba"), av.get.table(fitted, "totalanvi_proba").loc[chosen]
    )
    assert sorted(av.get.model(subset, name).name for name in MODELS) == sorted(MODELS)
    np.testing.assert_array_equal(
        subset.uns["totalanvi"]["model"]["weights"], fitted.uns["totalanvi"]["model"]["weights"]
    )


def test_a_copy_shares_nothing(fitted):
    copied = fitted.copy()
    before = contents(fitted)
    copied.uns["totalanvi"]["model"]["weights"][:] = 0
    copied.obsm["X_totalanvi"][:] = 0
    copied.obs["totalanvi_confidence"] = np.float32(0)
    assert_same(contents(fitted), before)


# cells outside the model ------------------------------------------------------------------------------------------


def test_cells_without_rna_get_nothing(fitted):
    """A query may hold cells with proteins alone: they are not in the model, their slots are missing values."""
    query = mudata_of({"rna": fitted["rna"][:250].copy(), "prot": fitted["prot"]}, fitted)
    assert len(query.obs_names) > 250
    av.tl.predict(query, model=av.get.model(fitted, "totalanvi"))
    av.tl.latent(query, model=av.get.model(fitted, "totalanvi"))
    inside = query.obs_names.isin(query["rna"].obs_names)
    prediction = query.obs["totalanvi_prediction"]
    assert (prediction.notna() == inside).all() and list(prediction.cat.categories) == CLASSES
    assert query.obs["totalanvi_confidence"].dtype == np.float32
    assert (np.isfinite(query.obsm["X_totalanvi"]).all(1) == inside).all()
    assert (av.get.table(query, "totalanvi_proba").notna().all(axis=1) == inside).all()


def test_an_rna_model_where_proteins_have_more_cells():
    mdata = cite()
    mdata = mudata_of({"rna": mdata["rna"][:250].copy(), "prot": mdata["prot"]}, mdata)
    run("scanvi", mdata)
    assert mdata["rna"].obsm["X_scanvi"].shape == (250, 10)
    mirrored = mdata.obs["rna:scanvi_prediction"]
    assert (mirrored.notna() == mdata.obs_names.isin(mdata["rna"].obs_names)).all()


def test_values_go_to_their_cells_whatever_the_order():
    mdata = cite()
    shuffled = mudata_of({"rna": permuted(mdata["rna"], 1), "prot": permuted(mdata["prot"], 2)}, mdata)
    for name in ("scanvi", "totalanvi"):
        run(name, mdata)
        run(name, shuffled)
        one, other = home(mdata, name), home(shuffled, name)
        row = one.obs_names.get_indexer(other.obs_names)
        assert (row != np.arange(300)).any()
        np.testing.assert_array_equal(other.obsm[f"X_{name}"], one.obsm[f"X_{name}"][row])
        np.testing.assert_array_equal(other.obsm[f"{name}_proba"], np.asarray(one.obsm[f"{name}_proba"])[row])
        for column in ("prediction", "confidence", "split"):
            np.testing.assert_array_equal(other.obs[f"{name}_{column}"], one.obs[f"{name}_{column}"].iloc[row])
    mirrored = shuffled.obs["rna:scanvi_prediction"].reindex(mdata.obs_names)
    np.testing.assert_array_equal(mirrored, mdata.obs["rna:scanvi_prediction"])


def test_values_in_the_order_of_the_object_are_not_copied():
    data = anndata.AnnData(np.ones((6, 3), np.float32))
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    slots.Writer(data, data, None, data.obs_names.to_numpy()).obsm("X_key", values)
    assert np.shares_memory(data.obsm["X_key"], values)
    slots.Writer(data, data, None, data.obs_names[::-1].to_numpy()).obsm("X_key", values)
    np.testing.assert_array_equal(data.obsm["X_key"], values[::-1])
    slots.Writer(data, data, None, data.obs_names[:2].to_numpy()).obsm("X_key", values[:2])
    np.testing.assert_array_equal(data.obsm["X_key"][:2], values[:2])
    assert np.isnan(data.obsm["X_key"][2:]).all()


def test_no_two_slots_are_one_array(fitted):
    with quiet_mudata():
        stained = fitted[fitted["prot"].obs_names].copy()
    av.tl.denoise(stained, model="totalanvi")
    av.tl.foreground(stained, model="totalanvi")
    for what in ("denoised", "foreground"):
        table, layer = stained.obsm[f"totalanvi_prot_{what}"], stained["prot"].layers[f"totalanvi_{what}"]
        np.testing.assert_array_equal(table, layer)
        assert not np.shares_memory(table, layer)


# scanpy -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:umap", "ignore::Warning:numba", "ignore:n_jobs value")
def test_scanpy_goes_on_from_here(fitted):
    sc.pp.neighbors(fitted, use_rep="X_totalanvi")
    sc.tl.umap(fitted)
    assert fitted.obsm["X_umap"].shape == (300, 2) and np.isfinite(fitted.obsm["X_umap"]).all()
