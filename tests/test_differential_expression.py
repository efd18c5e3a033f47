"""The verb: what it writes, what scanpy makes of it, what it refuses, and whether it finds what is there."""

import importlib
import inspect
import logging
import math

import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from helpers import assert_same, cite, contents, quiet_mudata
from matplotlib import pyplot as plt

import anvi as av
from anvi._posterior import differential

KEY = "rank_genes_groups"
SLASH = "NK/T"
FEW = {"n_samples": 60}


@pytest.fixture
def mdata(fitted):
    """Four models; a type with "/" in its name."""
    fitted.obs["kind"] = fitted.obs["true_cell_type"].cat.rename_categories({"NK": SLASH})
    return fitted


def test_signature_is_the_documented_one():
    parameters = inspect.signature(av.tl.differential_expression).parameters
    assert list(parameters)[:2] == ["data", "groupby"]
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    for name, default in {
        "groups": "all",
        "reference": "rest",
        "model": None,
        "modality": None,
        "mode": "change",
        "delta": 0.25,
        "fdr": 0.05,
        "batch_correction": True,
        "n_samples": 5000,
        "weights": "uniform",
        "random_state": 0,
        "key_added": KEY,
        "inplace": True,
    }.items():
        assert defaults[name] == default


def test_what_is_written(mdata, caplog):
    before = contents(mdata)
    with caplog.at_level(logging.INFO, "anvi"):
        assert av.tl.differential_expression(mdata, "kind", model="totalanvi", **FEW) is None
    assert "written to 'rna': obs['kind'], uns['rank_genes_groups']" in caplog.text
    after = contents(mdata)
    kinds = mdata.obs["kind"].cat.categories.tolist()
    for mod, features in (("rna", mdata["rna"].var_names), ("prot", mdata["prot"].var_names)):
        stored = mdata[mod].uns[KEY]
        for column in (
            "names",
            "scores",
            "logfoldchanges",
            "pvals",
            "pvals_adj",
            "proba_de",
            "bayes_factor",
            "lfc_std",
            "mean_group",
            "mean_reference",
            "count_group",
            "count_reference",
            "pct_nz_group",
            "pct_nz_reference",
        ):
            assert list(stored[column].dtype.names) == kinds
            for kind in kinds:
                if column == "names":
                    assert sorted(stored[column][kind]) == sorted(features)
                elif mod == "rna" or not column.startswith(("count", "pct")):  # no cell may have been measured
                    assert np.isfinite(stored[column][kind]).all()
        for kind in kinds:
            assert (np.diff(stored["scores"][kind]) <= 0).all()
            proba = stored["proba_de"][kind].astype(float)
            np.testing.assert_allclose(stored["pvals"][kind], np.maximum(1 - proba, 0.5 / 60), rtol=1e-5, atol=1e-7)
            depth = 1e4 if mod == "rna" else 1.0
            sides = (np.log1p(depth * np.maximum(stored[f"mean_{side}"][kind], 0)) for side in ("group", "reference"))
            higher = np.subtract(*sides)
            scores, same = stored["scores"][kind], np.sign(higher) == np.sign(stored["logfoldchanges"][kind])
            assert same.any() and (scores * higher >= -1e-6).all() and (np.abs(scores) <= np.abs(higher) + 1e-6).all()
            sure = same & (proba > 0.6)  # then this is the probability of the direction
            np.testing.assert_allclose(scores[sure], (higher * proba)[sure], rtol=1e-3, atol=1e-5)
        params = stored["params"]
        wanted = {"groupby": "kind", "reference": "rest", "method": "anvi", "use_raw": False, "mode": "change"}
        wanted |= {"corr_method": "posterior-fdr", "delta": 0.25, "fdr": 0.05, "n_samples": 60, "model": "totalanvi"}
        assert {name: params[name] for name in wanted} == wanted
        assert (mdata[mod].obs["kind"] == mdata.obs["kind"].reindex(mdata[mod].obs_names)).all()
    assert mdata["prot"].uns[KEY]["params"]["pseudocounts"] == 0.1
    # nothing else was touched
    for slot, value in before.items():
        if slot in ("rna obs", "prot obs"):
            after[slot] = after[slot].drop(columns="kind")
        assert_same(after.pop(slot), value, slot)
    assert set(after) == {f"rna uns {KEY}", f"prot uns {KEY}"}


def test_default_pseudocount_is_a_twentieth_of_a_count_of_a_median_library(mdata):
    av.tl.differential_expression(mdata, "kind", model="scvi", **FEW)
    depth = np.median(np.asarray(mdata["rna"].X.sum(1)))
    assert mdata["rna"].uns[KEY]["params"]["pseudocounts"] == pytest.approx(0.05 / depth, rel=1e-3)
    av.tl.differential_expression(mdata, "kind", model="scvi", pseudocounts=1e-3, **FEW)
    assert mdata["rna"].uns[KEY]["params"]["pseudocounts"] == pytest.approx(1e-3)
    av.tl.differential_expression(mdata, "kind", model="scvi", pseudocounts="scvi", **FEW)
    assert mdata["rna"].uns[KEY]["params"]["pseudocounts"].shape == (6,)


SCANPY = {
    "rank_genes_groups": lambda part: sc.pl.rank_genes_groups(part, show=False),
    "violin": lambda part: sc.pl.rank_genes_groups_violin(part, show=False, n_genes=2),
    "lfc": lambda part: sc.pl.rank_genes_groups_dotplot(
        part, show=False, n_genes=2, values_to_plot="logfoldchanges", dendrogram=False
    ),
    "log10": lambda part: sc.pl.rank_genes_groups_matrixplot(
        part, show=False, n_genes=2, values_to_plot="log10_pvals_adj", dendrogram=False
    ),
    "filter": lambda part: sc.tl.filter_rank_genes_groups(part, min_fold_change=0.1, use_raw=False),
} | {
    kind: lambda part, kind=kind: getattr(sc.pl, f"rank_genes_groups_{kind}")(
        part, show=False, n_genes=2, dendrogram=False
    )
    for kind in ("dotplot", "matrixplot", "stacked_violin", "heatmap", "tracksplot")
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["memory", *(pytest.param(form, marks=pytest.mark.slow) for form in ("h5mu", "zarr"))])
def test_every_scanpy_plot_draws_it(mdata, form, tmp_path):
    av.tl.differential_expression(mdata, "kind", model="totalanvi", **FEW)
    wanted = av.get.de(mdata)
    if form == "h5mu":
        mdata.write(tmp_path / "m.h5mu")
        mdata = mudata.read_h5mu(tmp_path / "m.h5mu")
    elif form == "zarr":
        mdata.write_zarr(tmp_path / "m.zarr")
        mdata = mudata.read_zarr(tmp_path / "m.zarr")
    pd.testing.assert_frame_equal(av.get.de(mdata), wanted)
    for mod in ("rna", "prot"):
        theirs = sc.get.rank_genes_groups_df(mdata[mod], None)
        ours = av.get.de(mdata, modality=mod)
        for column in theirs:
            assert theirs[column].tolist() == ours[column].tolist()
        for name, draw in SCANPY.items():
            try:
                draw(mdata[mod])
            except Exception as error:
                raise AssertionError(f"{name} of {mod}") from error
            plt.close("all")
    # from X, scanpy's dendrogram fails on sparse counts
    sc.tl.dendrogram(mdata["rna"], "kind", use_rep="X_scanvi")
    sc.pl.rank_genes_groups_heatmap(mdata["rna"], show=False, n_genes=2)


def test_means_are_expression_without_what_is_added_to_compare_it(mdata, monkeypatch):
    options = {"model": "totalanvi", "inplace": False} | FEW
    found = av.tl.differential_expression(mdata, "kind", **options)
    genes = found["rna"].groupby("group", observed=True)[["mean_group", "mean_reference"]].sum()
    np.testing.assert_allclose(genes, 1.0, rtol=1e-5)  # shares
    monkeypatch.setattr(differential, "PRIOR_COUNT", 5.0)
    more = av.tl.differential_expression(mdata, "kind", modality="prot", **options)["prot"]
    by = ["group", "names"]
    one, other = (table.sort_values(by).set_index(by) for table in (found["prot"], more))
    for side in ("mean_group", "mean_reference"):
        np.testing.assert_allclose(one[side], other[side], rtol=1e-4, atol=1e-5)
    assert (one["mean_group"] > one["mean_reference"])[one["is_de"] & (one["logfoldchanges"] > 1)].all()


def test_tables(mdata):
    tables = av.tl.differential_expression(mdata, "kind", model="totalanvi", inplace=False, **FEW)
    assert list(tables) == ["rna", "prot"] and KEY not in mdata["rna"].uns
    av.tl.differential_expression(mdata, "kind", model="totalanvi", **FEW)
    whole = av.get.de(mdata)
    assert whole.columns[:3].tolist() == ["modality", "group", "names"]
    assert len(whole) == 6 * (60 + 20)
    for mod, table in tables.items():
        part = whole[whole["modality"] == mod].drop(columns="modality").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, table)
        assert (table["is_de"] == (table["pvals_adj"] <= 0.05)).all()
    one = av.get.de(mdata, SLASH, "prot")
    assert len(one) == 20 and set(one["group"]) == {SLASH}
    assert av.get.de(mdata, [SLASH, "B"])["group"].cat.categories.tolist() == [SLASH, "B"]
    with pytest.raises(KeyError, match="'NK' is no group"):
        av.get.de(mdata, "NK")
    for wrong in ({"modality": "atac"}, {"key": "other"}):
        with pytest.raises(KeyError, match=r"run av\.tl\.differential_expression"):
            av.get.de(mdata, **wrong)


def test_models_and_modalities(mdata):
    both = av.tl.differential_expression(mdata, "kind", model="totalanvi", inplace=False, **FEW)
    only = av.tl.differential_expression(mdata, "kind", model="totalanvi", modality="prot", inplace=False, **FEW)
    assert list(only) == ["prot"]
    pd.testing.assert_frame_equal(only["prot"], both["prot"])
    for model in ("scvi", "scanvi"):
        assert list(av.tl.differential_expression(mdata, "kind", model=model, inplace=False, **FEW)) == ["rna"]
    with pytest.raises(ValueError, match="modality='prot' is not in the model; it has 'rna'"):
        av.tl.differential_expression(mdata, "kind", model="scvi", modality="prot")


def test_anndata_keeps_proteins_beside_genes(tmp_path):
    mdata = cite()
    adata = mdata["rna"].copy()
    adata.obs = mdata.obs.loc[adata.obs_names].copy()
    adata.obsm["protein"] = mdata["prot"].to_df().reindex(adata.obs_names)
    av.tl.totalvi(adata, batch_key="batch", prot_obsm="protein", max_epochs=2)
    av.tl.differential_expression(adata, "true_cell_type", **FEW)
    assert set(adata.uns[f"{KEY}_prot"]["names"]["NK"]) == set(mdata["prot"].var_names)
    assert set(av.get.de(adata)["modality"]) == {"rna", "prot"}
    assert len(av.get.de(adata, modality="prot")) == 6 * 20
    assert len(sc.get.rank_genes_groups_df(adata, "NK", key=f"{KEY}_prot")) == 20
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = sc.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(av.get.de(back), av.get.de(adata))


def test_a_view_gets_the_result_and_its_parent_does_not(mdata):
    view = mdata[mdata.obs["batch"] != "batch_2"]
    with quiet_mudata(), pytest.warns(UserWarning, match="is a view"):
        av.tl.differential_expression(view, "kind", model="totalanvi", **FEW)
    assert KEY in view["rna"].uns and KEY in view["prot"].uns
    assert KEY not in mdata["rna"].uns and "kind" not in mdata["rna"].obs


def test_order_of_cells_and_of_modalities_changes_nothing(mdata):
    with quiet_mudata():
        other = mdata[np.random.default_rng(0).permutation(mdata.n_obs)].copy()
    masks = {"a": mdata.obs["kind"] == "B", "b": np.asarray(mdata.obs["batch"] == "batch_0")}
    turned = {"a": masks["a"], "b": "batch == 'batch_0'"}
    for one, two in ((("kind",), ("kind",)), ((None,), (None,))):
        chosen = ({}, {}) if one[0] else ({"groups": masks}, {"groups": turned})
        tables = [
            av.tl.differential_expression(data, *args, model="totalanvi", inplace=False, **FEW, **options)
            for data, args, options in zip((mdata, other), (one, two), chosen, strict=True)
        ]
        for mod in ("rna", "prot"):
            pd.testing.assert_frame_equal(tables[0][mod], tables[1][mod])


def test_masks_that_overlap_and_masks_that_do_not(mdata):
    groups = {"early B": "kind == 'B' and batch == 'batch_0'", "B": "kind == 'B'"}
    av.tl.differential_expression(mdata, groups=groups, model="totalanvi", **FEW)
    params = mdata["rna"].uns[KEY]["params"]
    assert params["groupby"] == f"{KEY}_groups" not in mdata["rna"].obs
    assert sc.get.rank_genes_groups_df(mdata["rna"], None)["group"].unique().tolist() == list(groups)
    apart = {"B in 0": groups["early B"], "B in 1": "kind == 'B' and batch == 'batch_1'"}
    av.tl.differential_expression(mdata, groups=apart, reference="B in 1", model="totalanvi", **FEW)
    assert list(mdata["rna"].uns[KEY]["names"].dtype.names) == ["B in 0"]
    assert mdata["rna"].uns[KEY]["params"]["reference"] == "B in 1"
    assert mdata["rna"].obs[f"{KEY}_groups"].cat.categories.tolist() == [*apart, "rest"]
    sc.pl.rank_genes_groups_dotplot(mdata["rna"], show=False, n_genes=2, dendrogram=False)
    plt.close("all")


def test_replacing_is_logged_and_what_is_no_result_is_kept(mdata, caplog):
    rna = mdata["rna"]
    rna.obs["kind"] = mdata.obs["kind"].reindex(rna.obs_names)
    copy = rna.copy()
    sc.pp.log1p(copy)
    sc.tl.rank_genes_groups(copy, "kind", method="t-test")
    rna.uns[KEY] = copy.uns[KEY]
    with caplog.at_level(logging.INFO, "anvi"):
        av.tl.differential_expression(mdata, "kind", model="totalanvi", **FEW)
    assert caplog.text.count("held a result of 't-test', which is replaced") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO, "anvi"):
        av.tl.differential_expression(mdata, "kind", model="totalanvi", **FEW)
    assert "replaced" not in caplog.text
    rna.uns["mine"] = {"a": 1}
    with pytest.raises(ValueError, match=r"uns\['mine'\] holds something that is no ranking"):
        av.tl.differential_expression(mdata, "kind", model="totalanvi", key_added="mine")
    assert rna.uns["mine"] == {"a": 1}


def test_a_stale_copy_of_the_column_is_no_obstacle(mdata):
    av.tl.differential_expression(mdata, "kind", model="totalanvi", **FEW)
    mdata.obs["kind"] = mdata.obs["kind"].cat.rename_categories({"B": "B cell"})
    av.tl.differential_expression(mdata, "kind", model="totalanvi", **FEW)
    assert "B cell" in mdata["prot"].uns[KEY]["names"].dtype.names
    assert "B cell" in mdata["prot"].obs["kind"].cat.categories


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "changes"}, "mode='changes' is not one of 'change', 'vanilla'"),
        ({"delta": -1}, "delta=-1 must be None or at least 0"),
        ({"fdr": 0}, "fdr=0 must be between 0 and 1"),
        ({"pseudocounts": 0}, "pseudocounts=0 must be None, above 0"),
        ({"pseudocounts": "scv"}, "pseudocounts='scv' is not a number, nor one of 'scvi'"),
        ({"n_samples": 0}, "n_samples=0 must be a whole number, at least 1"),
        ({"n_samples": 2.5}, "n_samples=2.5 must be a whole number"),
        ({"weights": "some"}, "weights='some' is not one of 'uniform', 'importance'"),
        ({"key_added": "a/b"}, "plain name"),
        ({"groups": ["X"]}, "no cells with the value 'X'"),
        ({"modality": "atac"}, "modality='atac' is not in the model; it has 'rna' and 'prot'"),
    ],
)
def test_refused_before_any_work(mdata, monkeypatch, options, match):
    module = importlib.import_module("anvi.tl._ask")
    monkeypatch.setattr(module, "read_cells", lambda *args, **kwargs: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=match):
        av.tl.differential_expression(mdata, "kind", model="totalanvi", **options)


def test_an_object_without_proteins_is_asked_about_genes(mdata, caplog):
    with quiet_mudata():
        query = mudata.MuData({"rna": mdata["rna"].copy()})
    query.obs["kind"], query.obs["batch"] = mdata.obs["kind"], mdata.obs["batch"]
    with caplog.at_level(logging.INFO, "anvi"):
        av.tl.differential_expression(query, "kind", model=av.get.model(mdata, "totalanvi"), **FEW)
    assert "no modality 'prot'" in caplog.text and KEY in query["rna"].uns
    tables = av.tl.differential_expression(query, "kind", model=av.get.model(mdata, "totalanvi"), inplace=False, **FEW)
    assert len(tables["prot"]) == 6 * 20


def test_reported_threshold_is_the_one_that_was_used(mdata, monkeypatch):
    found = []
    real = differential.estimate_delta
    monkeypatch.setattr(differential, "estimate_delta", lambda *args: found.append(real(*args)) or found[-1])
    av.tl.differential_expression(mdata, "kind", model="totalanvi", delta=None, **FEW)
    assert found == [mdata[mod].uns[KEY]["params"]["delta"] for mod in ("rna", "prot")]
    once = av.get.de(mdata, modality="rna")
    av.tl.differential_expression(mdata, "kind", model="totalanvi", modality="rna", delta=found[0], **FEW)
    pd.testing.assert_frame_equal(av.get.de(mdata, modality="rna"), once)


def test_vanilla_and_importance(mdata):
    av.tl.differential_expression(mdata, "kind", model="totalanvi", mode="vanilla", **FEW)
    params, table = mdata["rna"].uns[KEY]["params"], av.get.de(mdata, modality="rna")
    assert params["delta"] is None
    assert (table["proba_de"] >= 0.5 - 1e-6).all()  # one side or the other is higher
    assert (np.sign(table["bayes_factor"]) == np.sign(table["logfoldchanges"]))[table["proba_de"] > 0.8].all()
    uniform = av.tl.differential_expression(mdata, "kind", model="totalanvi", inplace=False, n_samples=40)
    weighed = av.tl.differential_expression(
        mdata, "kind", model="totalanvi", weights="importance", inplace=False, n_samples=40
    )
    assert not uniform["rna"]["logfoldchanges"].equals(weighed["rna"]["logfoldchanges"])


def test_seeds(mdata):
    tables = [
        av.tl.differential_expression(mdata, "kind", model="scvi", random_state=seed, inplace=False, **FEW)["rna"]
        for seed in (0, 0, 1)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0].equals(tables[2])
    with pytest.raises(KeyError, match=KEY):
        av.get.de(mdata)


# truth --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known():
    """Cells whose fold changes are known, and a joint model of them."""
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = cite(2000, n_genes=400)
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=40)
    return mdata


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"delta": None}, {"batch_correction": False}], ids=str)
def test_markers_are_found_at_the_false_discovery_rate_that_was_asked_for(known, options):
    table = av.tl.differential_expression(known, "true_cell_type", inplace=False, **options)["rna"]
    truth, markers = known["rna"].varm["true_lfc"], known["rna"].varm["true_markers"]
    called = table[table["is_de"]]
    lfc = np.array([truth.loc[name, group] for name, group in zip(called["names"], called["group"], strict=True)])
    wrong = (np.abs(lfc) < 0.25) | (np.sign(lfc) != np.sign(called["logfoldchanges"]))
    # the nominal rate and two standard deviations of a binomial count of that many calls
    assert wrong.mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(called))
    is_marker = np.array(
        [markers.loc[name, group] for name, group in zip(called["names"], called["group"], strict=True)]
    )
    common = (called["group"] != "pDC").to_numpy()  # 2 % of the cells
    n_common = int(markers.drop(columns="pDC").to_numpy().sum())
    assert (is_marker & common).sum() >= 0.95 * n_common
    order = table[table["group"] == "NK"]
    assert np.corrcoef(order["logfoldchanges"], truth["NK"].reindex(order["names"]))[0, 1] > 0.8


@pytest.mark.slow
def test_marker_proteins_are_found(known):
    table = av.tl.differential_expression(known, "true_cell_type", modality="prot", inplace=False)["prot"]
    markers = known["prot"].varm["true_markers"]
    up = table[table["is_de"] & (table["logfoldchanges"] > 0)]
    right = [bool(markers.loc[name, group]) for name, group in zip(up["names"], up["group"], strict=True)]
    assert sum(right) >= 0.8 * markers.to_numpy().sum()
    assert len(right) - sum(right) <= 0.05 * len(right) + 2 * math.sqrt(0.05 * 0.95 * len(right))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["change", "vanilla"])
def test_shuffled_labels_have_next_to_nothing(known, mode):
    for seed in range(3):
        shuffled = np.random.default_rng(seed).permutation(known.obs["true_cell_type"].astype(str))
        groups = {name: shuffled == name for name in np.unique(shuffled)}
        tables = av.tl.differential_expression(known, groups=groups, mode=mode, inplace=False)
        assert sum(table["is_de"].sum() for table in tables.values()) == 0


def test_what_the_counts_say_by_a_loop():
    """Means and shares of cells with any count, of measured cells alone, groups that overlap included."""
    mdata = cite()
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    groups = {"B": "true_cell_type == 'B'", "first": np.arange(mdata.n_obs) < 150}
    tables = av.tl.differential_expression(mdata, groups=groups, n_samples=20, inplace=False)
    inside = {"B": (mdata.obs["true_cell_type"] == "B").to_numpy(), "first": np.arange(mdata.n_obs) < 150}
    counts = {
        "rna": mdata["rna"].to_df().reindex(mdata.obs_names),
        "prot": mdata["prot"].to_df().reindex(mdata.obs_names),  # NaN where there is no row
    }
    panel = np.array(av.get.model(mdata).setup.measured)[mdata.obs["batch"].cat.codes]
    counts["prot"] = counts["prot"].where(panel)
    for mod, table in tables.items():
        for name, mask in inside.items():
            rows = table[table["group"] == name].set_index("names")
            for feature in rows.index[:5]:
                for side, cells in (("group", mask), ("reference", ~mask)):
                    values = counts[mod][feature].to_numpy(dtype=float)[cells]
                    values = values[~np.isnan(values)]
                    assert rows.loc[feature, f"count_{side}"] == pytest.approx(values.mean(), rel=1e-5)
                    assert rows.loc[feature, f"pct_nz_{side}"] == pytest.approx((values > 0).mean(), rel=1e-5)


def test_scanpy_reads_the_shares_of_cells():
    mdata = cite()
    av.tl.totalvi(mdata, max_epochs=1)
    av.tl.differential_expression(mdata, "true_cell_type", n_samples=20)
    ours = av.get.de(mdata, "B", "rna").set_index("names")
    table = sc.get.rank_genes_groups_df(mdata["rna"], "B").set_index("names")
    np.testing.assert_allclose(table["pct_nz_group"], ours["pct_nz_group"].reindex(table.index), rtol=1e-6)
    np.testing.assert_allclose(table["pct_nz_reference"], ours["pct_nz_reference"].reindex(table.index), rtol=1e-6)


def test_markers_that_are_expressed_come_before_rare_ones():
    """Two genes change as much and as surely; the one that many cells express is the better marker."""
    from anvi.tl.differential_expression import marker_score

    def change(group, reference, up, down):
        parts = (np.array([part]) for part in (group, reference, [1.0] * 4, [0.1] * 4, up, down))
        return differential.Change(*parts, 0.25, np.zeros(1))

    found = change([1e-3, 1e-5, 1e-3, 1e-6], [1e-4, 1e-6, 1e-4, 1e-4], [1, 1, 0.5, 0], [0, 0, 0.1, 0.9])
    score = marker_score(found, 1e4)[0]
    assert score[0] > 5 * score[1] > 0 and score[2] == pytest.approx(score[0] / 2) and score[3] < 0


def test_minified_data_have_no_counts_to_tell_of():
    mdata = cite()
    av.tl.totalvi(mdata, max_epochs=1)
    av.tl.minify(mdata)
    av.tl.differential_expression(mdata, "true_cell_type", n_samples=20)
    assert "pct_nz_group" not in av.get.de(mdata) and "pts" not in mdata["rna"].uns["rank_genes_groups"]
