"""What is drawn against varp, which features and in which order, errors, and the layout."""

import numpy as np
import pandas as pd
import pytest
from helpers import assert_whole, cite, mudata_of
from matplotlib.colors import same_color

import anvi as av
from anvi.pl.correlation import PROTEIN, _order


@pytest.fixture
def mdata(fitted):
    """With correlations of a joint model and of an RNA model."""
    av.tl.feature_correlation(fitted, model="totalvi", n_samples=1)
    av.tl.feature_correlation(fitted, model="scvi", n_samples=1)
    return fitted


def drawn(data, **options) -> pd.DataFrame:
    """The matrix as it is drawn, with its tick labels."""
    ax = av.pl.correlation(data, show=False, **options)
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == [text.get_text() for text in ax.get_xticklabels()]
    return pd.DataFrame(ax.images[0].get_array().filled(np.nan), names, names)


def test_what_is_drawn_is_what_is_stored(mdata):
    names = ["G003", "P02", "G007", "P11", "G050"]
    stored = pd.DataFrame(mdata.varp["totalvi_correlation"], mdata.var_names, mdata.var_names).astype(float)
    found = drawn(mdata, model="totalvi", features=names)
    assert sorted(found.index) == sorted(names)
    pd.testing.assert_frame_equal(found, stored.loc[found.index, found.columns], check_names=False)
    ax = av.pl.correlation(mdata, model="totalvi", features=names, show=False)
    for text in ax.get_yticklabels():
        assert same_color(text.get_color(), PROTEIN if text.get_text().startswith("P") else "black")
    assert ax.images[0].get_clim() == (-1, 1)


def test_of_all_features_the_proteins_and_the_gene_that_goes_with_each(mdata):
    stored = pd.DataFrame(mdata.varp["totalvi_correlation"], mdata.var_names, mdata.var_names)
    proteins = mdata["prot"].var_names
    partners = stored.loc[proteins, mdata["rna"].var_names].idxmax(axis=1)
    assert set(drawn(mdata, model="totalvi").index) == set(proteins) | set(partners)
    genes = pd.DataFrame(mdata["rna"].varp["scvi_correlation"], mdata["rna"].var_names, mdata["rna"].var_names)
    largest = (genes.astype(float) ** 2).mean().nlargest(40).index
    assert set(drawn(mdata, model="scvi").index) == set(largest)


def test_features_that_go_together_stand_together():
    """Two blocks, shuffled."""
    block = np.arange(20) % 2
    table = np.where(block[:, None] == block, 0.8, -0.1)
    np.fill_diagonal(table, 1)
    shuffled = np.random.default_rng(0).permutation(20)
    order = block[shuffled][_order(table[np.ix_(shuffled, shuffled)])]
    assert np.abs(np.diff(order)).sum() == 1
    table[3] = table[:, 3] = np.nan
    assert sorted(_order(table)) == list(range(20))
    assert _order(table[:2, :2]).tolist() == [0, 1]


@pytest.mark.parametrize("names", [("rna", "prot"), ("gex", "adt")])
def test_a_correlation_under_another_prefix(names):
    """`key_added`, and a model that is not in the object, leave no fit beside the slot."""
    source = cite()
    source = mudata_of(dict(zip(names, (source["rna"], source["prot"]), strict=True)), like=source)
    av.tl.totalvi(source, rna_mod=names[0], prot_mod=names[1], max_epochs=1)
    av.tl.feature_correlation(source, n_samples=1)
    av.tl.feature_correlation(source, n_samples=1, key_added="mine")
    pd.testing.assert_frame_equal(drawn(source, model="mine"), drawn(source))
    model = av.get.model(source)
    del source.uns["totalvi"], source.varp["totalvi_correlation"]
    av.tl.feature_correlation(source, model=model, n_samples=1, key_added="mine")
    assert "P01" in drawn(source)
    with pytest.raises(KeyError, match="model='other' is no fitted model"):
        av.pl.correlation(source, model="other", show=False)


def test_shared_names():
    mdata = cite()
    mdata["prot"].var_names = ["G001", *mdata["prot"].var_names[1:]]
    mdata = mudata_of({"rna": mdata["rna"], "prot": mdata["prot"]})
    av.tl.totalvi(mdata, max_epochs=1)
    av.tl.feature_correlation(mdata, n_samples=1)
    found = drawn(mdata, features=["rna:G001", "prot:G001", "G002"])
    assert set(found.index) == {"rna:G001", "prot:G001", "G002"}
    assert found.loc["rna:G001", "prot:G001"] == pytest.approx(float(mdata.varp["totalvi_correlation"][0, 60]))
    with pytest.raises(ValueError, match="write 'rna:G001' or 'prot:G001'"):
        av.pl.correlation(mdata, features=["G001", "G002"])


def test_errors(fitted):
    with pytest.raises(KeyError, match=r"varp\['totalvi_correlation'\].*av.tl.feature_correlation"):
        av.pl.correlation(fitted, model="totalvi")
    av.tl.feature_correlation(fitted, model="totalvi", n_samples=1)
    with pytest.raises(KeyError, match="there is no 'CD3'"):
        av.pl.correlation(fitted, model="totalvi", features=["CD3", "G001"])
    with pytest.raises(ValueError, match="at least two names"):
        av.pl.correlation(fitted, model="totalvi", features=["G001"])


@pytest.mark.parametrize(
    ("model", "features"),
    [
        ("totalvi", None),
        ("scvi", None),
        ("totalvi", [f"G{i:03d}" for i in range(1, 33)]),
        ("totalvi", ["G001", "P02"]),
        ("totalvi", ["G001", "P02", "G007"]),
    ],
)
def test_layout(mdata, model, features):
    """Nothing is cut off, however much there is to draw."""
    fig = av.pl.correlation(mdata, model=model, features=features, return_fig=True)
    assert_whole(fig)
