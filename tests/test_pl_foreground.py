"""What the hills hold against sums by numpy, which proteins and cells are drawn, errors, and the layout."""

import numpy as np
import pandas as pd
import pytest
from helpers import assert_whole, cite, mudata_of
from matplotlib import pyplot as plt

import anvi as av


@pytest.fixture
def mdata(fitted):
    """With foreground probabilities of a joint model."""
    av.tl.foreground(fitted, model="totalvi")
    return fitted


def hills(ax) -> tuple[float, float]:
    """How many cells are background and foreground in one panel."""
    back, fore = (patch.get_data() for patch in ax.patches)
    np.testing.assert_array_equal(fore.baseline, back.values)  # one stands on the other
    return back.values.sum(), (fore.values - fore.baseline).sum()


def drawn(mdata, **options) -> dict[str, tuple[float, float]]:
    """Background and foreground cells by the name in the title."""
    axes = av.pl.foreground(mdata, model="totalvi", show=False, **options)
    return {ax.get_title().partition(":")[0]: hills(ax) for ax in axes}


@pytest.mark.parametrize("missing", ["absent", "nan", "zero"])
def test_every_measured_count_is_divided_by_its_probability(missing):
    """By numpy, over the cells whose panel has the protein; a zero of another panel is no count."""
    mdata = cite(missing=missing)
    av.tl.totalvi(mdata, batch_key="batch", panel_key="panel", max_epochs=1)
    av.tl.foreground(mdata)
    probability, panel = av.get.table(mdata, "totalvi_prot_foreground"), mdata.obs["panel"].astype(str)
    measured = mdata.uns["truth"]["measured"]
    found = drawn(mdata)
    assert list(found) == mdata["prot"].var_names.tolist()
    for name, (back, fore) in found.items():
        here = panel.isin(measured.columns[measured.loc[name]])
        np.testing.assert_allclose(fore, probability.loc[here, name].sum(), rtol=1e-5)
        np.testing.assert_allclose(back, (1 - probability.loc[here, name]).sum(), rtol=1e-5)


def test_hills_stand_over_their_counts(mdata):
    """The bins that a count falls in hold it: sums of counts by bin, by numpy."""
    (ax,) = av.pl.foreground(mdata, proteins=["P01"], model="totalvi", show=False)
    counts = mdata["prot"].to_df()["P01"]
    edges = ax.patches[0].get_data().edges
    expected, _ = np.histogram(counts.to_numpy() + 1, edges)
    np.testing.assert_allclose(ax.patches[1].get_data().values, expected, rtol=1e-5)  # float32 weights
    assert edges[0] <= 1 and edges[-1] > counts.max() + 1 and (np.diff(edges) >= 1).all()
    share = av.get.table(mdata, "totalvi_prot_foreground").loc[counts.index, "P01"].mean()
    assert ax.get_title() == f"P01: {share:.0%}"


def test_the_order_of_cells_changes_nothing(mdata):
    expected = drawn(mdata)
    prot = mdata["prot"][np.random.default_rng(0).permutation(mdata["prot"].n_obs)].copy()
    other = mudata_of({"rna": mdata["rna"], "prot": prot}, mdata)
    other.uns["totalvi"] = mdata.uns["totalvi"]
    other.obsm["totalvi_prot_foreground"] = av.get.table(mdata, "totalvi_prot_foreground").loc[other.obs_names]
    assert drawn(other) == expected


def test_some_proteins_in_the_order_that_is_asked_for(mdata):
    assert list(drawn(mdata, proteins=["P07", "P02"])) == ["P07", "P02"]
    with pytest.raises(KeyError, match="the model has no 'CD3'; it has P01, P02"):
        av.pl.foreground(mdata, model="totalvi", proteins=["CD3"])
    with pytest.raises(TypeError, match=r"proteins=\['P01'\]"):
        av.pl.foreground(mdata, model="totalvi", proteins="P01")


def test_of_many_proteins_those_that_differ_most_between_cells():
    mdata = cite(n_proteins=30)
    av.tl.totalvi(mdata, max_epochs=1)
    av.tl.foreground(mdata)
    most = av.get.table(mdata, "totalvi_prot_foreground").std().nlargest(24).index
    assert set(drawn(mdata)) == set(most) and list(drawn(mdata)) == sorted(most)


def test_an_anndata_and_names_with_a_slash():
    source = cite()
    adata = source["rna"].copy()
    adata.obsm["protein"] = source["prot"].to_df().reindex(adata.obs_names).rename(columns={"P01": "HLA/A"})
    av.tl.totalvi(adata, prot_obsm="protein", max_epochs=1)
    av.tl.foreground(adata)
    found = drawn(adata)
    assert next(iter(found)) == "HLA/A"
    known = adata.obsm["protein"]["HLA/A"].notna()
    np.testing.assert_allclose(sum(found["HLA/A"]), known.sum(), rtol=1e-6)


def test_a_model_from_elsewhere(mdata):
    """Slots under a prefix, without a fit beside them."""
    query = cite(random_state=1)
    av.tl.foreground(query, model=av.get.model(mdata, "totalvi"), key_added="mine")
    axes = av.pl.foreground(query, show=False)
    assert len(axes) == 20
    seen = query["prot"].to_df().notna().sum()
    for ax, name in zip(axes, seen.index, strict=True):
        np.testing.assert_allclose(sum(hills(ax)), seen[name], rtol=1e-6)


def test_minified_objects_have_no_counts_to_be_divided(mdata):
    small = av.tl.minify(mdata, model="totalvi", copy=True)
    with pytest.raises(ValueError, match=r"mdata\['prot'\].X is empty, as av.tl.minify leaves it"):
        av.pl.foreground(small, model="totalvi", show=False)
    source = cite()
    adata = source["rna"].copy()
    adata.obsm["protein"] = source["prot"].to_df().reindex(adata.obs_names)
    av.tl.totalvi(adata, prot_obsm="protein", max_epochs=1)
    av.tl.minify(adata)
    av.tl.foreground(adata)
    with pytest.raises(ValueError, match=r"data.obsm\['protein'\] is empty, as av.tl.minify leaves it"):
        av.pl.foreground(adata, show=False)


def test_errors(fitted):
    with pytest.raises(KeyError, match=r"obsm\['totalvi_prot_foreground'\].*av.tl.foreground\(data, model='totalvi'\)"):
        av.pl.foreground(fitted, model="totalvi")
    av.tl.foreground(fitted, model="totalvi")
    with pytest.raises(ValueError, match="ax= must hold 20 Axes"):
        av.pl.foreground(fitted, model="totalvi", ax=plt.subplots()[1])
    blind = mudata_of({"rna": fitted["rna"]}, fitted)
    blind.uns["totalvi"], blind.obsm["totalvi_prot_foreground"] = (
        fitted.uns["totalvi"],
        av.get.table(fitted, "totalvi_prot_foreground"),
    )
    with pytest.raises(KeyError, match="modality 'prot'"):
        av.pl.foreground(blind, model="totalvi")
    nobody = fitted[fitted.obs["batch"] == "batch_2"].copy()
    with pytest.raises((KeyError, ValueError), match="[Nn]o protein|modality 'prot'"):
        av.pl.foreground(nobody, model="totalvi")


@pytest.mark.parametrize("n", [1, 2, 6, 20])
def test_layout(mdata, n):
    """Nothing is cut off, and rows are even."""
    names = mdata["prot"].var_names[:n].tolist()
    fig = av.pl.foreground(mdata, model="totalvi", proteins=names, return_fig=True)
    assert_whole(fig)
    rows = pd.Series([round(ax.get_position().y0, 3) for ax in fig.axes[:n]])
    assert rows.value_counts().max() - rows.value_counts().min() <= 1
