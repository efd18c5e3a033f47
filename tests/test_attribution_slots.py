"""Attributions in slots: what is written where, what scanpy and files make of it, what is refused."""

import re
import warnings

import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad
from helpers import assert_same, cite, contents, dense, quiet_mudata

import anvi as av

SLASH = "NK/T"
SLOT = "totalanvi_attributions"
QUICK = {"n_cells": 8, "n_steps": 4}


@pytest.fixture(scope="module")
def fits():
    """TotalANVI, scANVI and totalVI with a class "NK/T"; never written to."""
    mdata = cite(300)
    for column in ("cell_type", "true_cell_type"):
        mdata.obs[column] = mdata.obs[column].cat.rename_categories({"NK": SLASH})
    with warnings.catch_warnings(), av.settings.override(progress=False, device="cpu", verbosity=0):
        warnings.filterwarnings("ignore", message="Class names with '/'")
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=8)
        av.tl.scanvi(mdata, batch_key="batch", max_epochs=2)
        av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    return mdata


@pytest.fixture
def mdata(fits):
    return fits.copy()


def joint_adata(mdata):
    """The same cells as one AnnData, proteins as a table in obsm."""
    adata = mdata["rna"].copy()
    adata.obs["cell_type"], adata.obs["batch"] = mdata.obs["cell_type"], mdata.obs["batch"]
    adata.obsm["protein"] = mdata["prot"].to_df().reindex(adata.obs_names)
    return adata


# what is written --------------------------------------------------------------------------------------------------


def test_slots_hold_the_dataset_and_nothing_else_is_touched(mdata):
    before = contents(mdata)
    found = av.tl.attributions(mdata, model="totalanvi", per_cell=True, inplace=False, **QUICK)
    for slot, value in contents(mdata).items():
        assert_same(value, before[slot], slot)
    av.tl.attributions(mdata, model="totalanvi", per_cell=True, **QUICK)
    after = contents(mdata)
    for slot, value in before.items():
        left = after.pop(slot)
        if slot in ("rna obs", "prot obs"):
            left = left.drop(columns=["totalanvi_prediction", "totalanvi_explained"])
        assert_same(left, value, slot)
    kinds = (f"uns {SLOT}", f"varm {SLOT}", f"layers {SLOT}")
    assert set(after) == {f"{mod} {kind}" for mod in ("rna", "prot") for kind in kinds}
    assert av.get.attributions(mdata, per_cell=True).equals(found)
    classes = list(found["class"].values)
    assert classes == mdata.uns["totalanvi"]["classes"] and SLASH in classes
    for mod in ("rna", "prot"):
        table, stored = mdata[mod].varm[SLOT], mdata[mod].uns[SLOT]
        assert table.shape == (mdata[mod].n_vars, 6) and list(table) == [c.replace("/", "|") for c in classes]
        np.testing.assert_allclose(table.to_numpy(), found[mod].values.T, rtol=1e-6)
        for name in classes:
            assert sorted(stored["names"][name]) == sorted(mdata[mod].var_names)
            scores, unknown = stored["scores"][name], np.isnan(stored["scores"][name])
            assert (np.diff(scores[~unknown]) <= 0).all() and (np.diff(unknown.astype(int)) >= 0).all()
            by_name = pd.Series(stored["attributions"][name], stored["names"][name])[mdata[mod].var_names]
            np.testing.assert_array_equal(by_name, found[mod].sel({"class": name}))
            assert (scores <= stored["attributions"][name])[~unknown].all()
        assert len(stored["params"]["n_cells"]) == len(stored["params"]["delta"]) == 6
        assert stored["params"]["baseline"] == "each" and stored["params"]["random_state"] == 0
        explained = mdata[mod].obs["totalanvi_explained"]
        layer = dense(mdata[mod].layers[SLOT])
        single = found[f"{mod}_per_cell"].sel(obs=explained.index[explained.notna()].to_list()).values
        np.testing.assert_array_equal(layer[explained.notna()], single)
        if mod == "rna":
            assert explained.notna().sum() == found.sizes["obs"] and not layer[explained.isna()].any()


def test_cells_of_an_earlier_call_go(mdata):
    av.tl.attributions(mdata, model="totalanvi", per_cell=True, **QUICK)
    av.tl.attributions(mdata, model="totalanvi", **QUICK)
    for mod in ("rna", "prot"):
        assert SLOT not in mdata[mod].layers and "totalanvi_explained" not in mdata[mod].obs
    with pytest.raises(KeyError, match="per_cell=True"):
        av.get.attributions(mdata, per_cell=True)


def test_the_same_cells_and_numbers_in_one_table(mdata):
    """An AnnData with proteins in obsm gives what the MuData gives."""
    adata = joint_adata(mdata)
    model = av.get.model(mdata, "totalanvi")
    options = {"per_cell": True} | QUICK
    wanted = av.tl.attributions(mdata, model=model, inplace=False, **options)
    adata.uns["totalanvi"] = mdata.uns["totalanvi"]
    av.tl.attributions(adata, prot_obsm="protein", model="totalanvi", **options)
    assert {SLOT, f"{SLOT}_prot"} <= set(adata.uns) and SLOT in adata.varm and SLOT in adata.layers
    assert adata.obsm[SLOT].shape == (300, 20)
    found = av.get.attributions(adata, per_cell=True)
    for name in ("rna", "prot", "rna_presence", "prot_presence", "prot_per_cell"):
        dims = wanted[name].dims
        one = found[name].sel({d: wanted[d].values for d in dims if d in ("obs", "prot_var")})
        np.testing.assert_allclose(one.values, wanted[name].values, rtol=1e-4, atol=1e-5)


def test_a_protein_with_a_slash_in_one_table(mdata):
    adata = joint_adata(mdata)
    proteins = [f"{name}/x" if i == 0 else name for i, name in enumerate(adata.obsm["protein"])]
    adata.obsm["protein"].columns = proteins
    with warnings.catch_warnings(), av.settings.override(progress=False, device="cpu", verbosity=0):
        warnings.filterwarnings("ignore", message="Class names with '/'")
        av.tl.totalanvi(adata, prot_obsm="protein", batch_key="batch", max_epochs=1)
    options = {"model": "totalanvi", "per_cell": True} | QUICK
    wanted = av.tl.attributions(adata, inplace=False, **options)["prot_per_cell"]
    av.tl.attributions(adata, **options)
    found = av.get.attributions(adata, per_cell=True)["prot_per_cell"]
    assert set(found["prot_var"].values) == set(proteins)
    assert found.sel(obs=wanted["obs"], prot_var=wanted["prot_var"]).equals(wanted)
    assert av.pl.attributions(adata, cell=str(found["obs"].values[0]), show=False) is not None


def test_what_only_looks_like_an_earlier_call_stays(mdata):
    """A second call would take it away, for the ranking of the first then lies beside it."""
    rna = mdata["rna"]
    rna.obs["variance_explained"], rna.layers["variance_attributions"] = 0.5, rna.X.copy()
    for taken in ("layers['variance_attributions']", "obs['variance_explained']"):
        with pytest.raises(ValueError, match=rf"mdata\['rna'\]\.{re.escape(taken)} would be overwritten"):
            av.tl.attributions(mdata, model="totalanvi", key_added="variance", **QUICK)
        assert (rna.obs["variance_explained"] == 0.5).all()
        rna.layers.pop("variance_attributions", None)


def test_an_rna_model_writes_to_rna_alone(mdata):
    av.tl.attributions(mdata, model="scanvi", **QUICK)
    assert "scanvi_attributions" in mdata["rna"].uns and "scanvi_attributions" not in mdata["prot"].uns
    assert set(av.get.attributions(mdata).dims) == {"class", "rna_var"}
    adata = mdata["rna"].copy()
    adata.obs["batch"] = mdata.obs["batch"]
    av.tl.attributions(adata, model="scanvi", key_added="again", **QUICK)
    assert av.get.attributions(adata, model="again").equals(av.get.attributions(mdata))


def test_a_view_becomes_an_object_of_its_own(mdata):
    before = contents(mdata)
    part = mdata[mdata.obs["batch"] == "batch_0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        av.tl.attributions(part, model="totalanvi", **QUICK)
    assert SLOT in part["rna"].uns
    for slot, value in contents(mdata).items():
        assert_same(value, before[slot], slot)


def test_a_column_of_the_modality_is_not_replaced(mdata):
    own = pd.Categorical(np.where(np.arange(300) % 2, "odd", "even"))
    mdata["rna"].obs["totalanvi_prediction"] = own
    av.tl.attributions(mdata, model="totalanvi", **QUICK)
    assert (mdata["rna"].obs["totalanvi_prediction"] == own).all()
    assert mdata["rna"].uns[SLOT]["params"]["groupby"] == f"{SLOT}_groups"
    assert list(mdata["rna"].obs[f"{SLOT}_groups"].cat.categories) == mdata.uns["totalanvi"]["classes"]


def test_groups_of_a_column_with_gaps(mdata):
    kind = mdata.obs["true_cell_type"].astype(object).where(np.arange(300) % 3 > 0)
    mdata.obs["kind"] = pd.Categorical(kind)
    found = av.tl.attributions(
        mdata, model="totalanvi", groupby="kind", groups=["B", SLASH], per_cell=True, inplace=False, n_cells=5
    )
    chosen = pd.Series(found["n_cells"].values, found["class"].values)
    assert chosen[["B", SLASH]].tolist() == [5, 5] and chosen.drop(["B", SLASH]).eq(0).all()
    assert set(mdata.obs["kind"][found["obs"].values]) == {"B", SLASH}


# files and scanpy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["h5mu", "zarr"])
def test_survives_a_file(mdata, tmp_path, ending):
    av.tl.attributions(mdata, model="totalanvi", per_cell=True, **QUICK)
    path = tmp_path / f"data.{ending}"
    with quiet_mudata():
        mdata.write(path) if ending == "h5mu" else mdata.write_zarr(path)
        back = mudata.read_h5mu(path) if ending == "h5mu" else mudata.read_zarr(path)
    wanted, found = (av.get.attributions(data, per_cell=True) for data in (mdata, back))
    assert found["class"].values.tolist() == wanted["class"].values.tolist()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name].values, values.values, err_msg=name)


def test_survives_a_file_as_one_table(mdata, tmp_path):
    adata = joint_adata(mdata)
    adata.uns["totalanvi"] = mdata.uns["totalanvi"]
    av.tl.attributions(adata, prot_obsm="protein", model="totalanvi", per_cell=True, **QUICK)
    adata.write_h5ad(tmp_path / "data.h5ad")
    back = read_h5ad(tmp_path / "data.h5ad")
    wanted, found = (av.get.attributions(data, per_cell=True) for data in (adata, back))
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name].values, values.values, err_msg=name)


def test_scanpy_reads_and_draws_it(mdata):
    import scanpy as sc

    av.tl.attributions(mdata, model="totalanvi", **QUICK)
    for mod in ("rna", "prot"):
        table = sc.get.rank_genes_groups_df(mdata[mod], group=SLASH, key=SLOT)
        assert table["names"].tolist() == list(mdata[mod].uns[SLOT]["names"][SLASH])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sc.pl.rank_genes_groups(mdata[mod], key=SLOT, show=False)
            sc.pl.rank_genes_groups_dotplot(mdata[mod], key=SLOT, n_genes=2, dendrogram=False, show=False)


# what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"model": "totalvi"}, ValueError, "totalvi.*no labels; fit tl.scanvi or tl.totalanvi"),
        ({"target": "Bee"}, KeyError, "no class 'Bee'; it has 'B', "),
        ({"target": ("B", "B")}, ValueError, "pair of different ones"),
        ({"target": ("B", "CD4 T", "pDC")}, ValueError, "pair of different ones"),
        ({"target": 3}, TypeError, "target= takes one name, a str, or a list of names; got int: 3"),
        ({"groups": "B"}, TypeError, r"groups=\['B'\]"),
        ({"groups": []}, ValueError, r"groups=\[\] names none"),
        ({"groups": ["Bee"]}, KeyError, "no 'Bee' in 'totalanvi_prediction'"),
        ({"groupby": "nowhere"}, KeyError, "groupby='nowhere'"),
        ({"baseline": "nothing"}, ValueError, "not 'each', 'rest', 'zero', a number or a group: 'B'"),
        ({"baseline": 0}, ValueError, "baseline=0 must be a whole number"),
        ({"baseline": 2.5}, ValueError, "baseline=2.5 must be a whole number"),
        ({"n_steps": 0}, ValueError, "n_steps=0"),
        ({"n_cells": -1}, ValueError, "n_cells=-1"),
        ({"model": "unknown"}, KeyError, "unknown"),
    ],
)
def test_wrong_questions_are_refused_before_any_work(mdata, monkeypatch, options, error, match):
    monkeypatch.setattr("anvi._posterior.attribute.integrate", lambda *args: pytest.fail("work was begun"))
    before = contents(mdata)
    with pytest.raises(error, match=match):
        av.tl.attributions(mdata, **{"model": "totalanvi"} | options)
    assert set(contents(mdata)) == set(before)


def test_a_class_without_others_has_nothing_to_be_compared_with(mdata):
    alone = mdata[mdata.obs["totalanvi_prediction"] == "CD4 T"].copy()
    with pytest.raises(ValueError, match="No cell is predicted to be any class but 'CD4 T'.*baseline='zero'"):
        av.tl.attributions(alone, model="totalanvi", **QUICK)
    found = av.tl.attributions(alone, model="totalanvi", baseline="zero", inplace=False, **QUICK)
    assert found["n_cells"].values.tolist() == [8 * (name == "CD4 T") for name in found["class"].values]


def test_which_of_several(mdata):
    with pytest.raises(KeyError, match=r"run av.tl.attributions\(data\) first"):
        av.get.attributions(mdata)
    av.tl.attributions(mdata, model="totalanvi", **QUICK)
    av.tl.attributions(mdata, model="totalanvi", key_added="zero", baseline="zero", **QUICK)
    with pytest.raises(ValueError, match="several attributions: 'totalanvi', 'zero'"):
        av.get.attributions(mdata)
    assert av.get.attributions(mdata, model="zero").attrs["baseline"] == "zero"
    with pytest.raises(KeyError, match="'other' is no attribution of this object; there are: 'totalanvi', 'zero'"):
        av.get.attributions(mdata, model="other")
