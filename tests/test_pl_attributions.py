"""Pictures of attributions: they show what is in the slots, whatever the object."""

import warnings

import numpy as np
import pytest
from helpers import assert_whole, cite, quiet_mudata
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from mudata import read_h5mu

import anvi as av

KINDS = ("heatmap", "bar", "dot")
SLASH = "NK/T"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Attributions, single cells too, of a model with a class "NK/T": written, read back, never changed."""
    mdata = cite(600, random_state=3)
    for column in ("cell_type", "true_cell_type"):
        mdata.obs[column] = mdata.obs[column].cat.rename_categories({"NK": SLASH})
    path = tmp_path_factory.mktemp("pl") / "data.h5mu"
    with warnings.catch_warnings(), av.settings.override(progress=False, device="cpu", verbosity=0):
        warnings.filterwarnings("ignore", message="Class names with '/'")
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=15)
        av.tl.attributions(mdata, n_cells=20, per_cell=True)
        with quiet_mudata():
            mdata.write(path)
            return read_h5mu(path)


def labels(ax: Axes, axis: str = "y") -> list[str]:
    return [text.get_text() for text in getattr(ax, f"get_{axis}ticklabels")()]


@pytest.mark.parametrize("kind", KINDS)
def test_small_figures_are_whole(written, kind):
    for n_features in (1, 3):
        fig = av.pl.attributions(written, SLASH, kind=kind, n_features=n_features, return_fig=True)
        assert_whole(fig)


@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_those_of_the_classes(written, kind):
    mdata = written.copy()
    classes = av.get.attributions(mdata)["class"].values.tolist()
    wanted = ["#111111", "#222222", "#333333", "#444444", "#555555", "#666666"]
    mdata.uns["totalanvi_prediction_colors"] = wanted
    axes = av.pl.attributions(mdata, kind=kind, show=False)
    if kind == "bar":
        found = [to_hex(row[0].patches[-1].get_facecolor()) for row in axes]
    else:
        spots = [
            c for c in axes[0].collections if len(c.get_offsets()) == len(classes) and len(c.get_facecolors()) == 6
        ]
        found = [to_hex(color) for color in spots[-1].get_facecolors()]
    assert found == wanted


def test_bars_are_the_means(written):
    found = av.get.attributions(written)
    axes = av.pl.attributions(written, [SLASH, "B"], kind="bar", n_features=5, show=False)
    assert axes.shape == (2, 2)
    for row, name in zip(axes, ("B", SLASH), strict=True):  # in the order of the ranking
        assert row[0].get_title(loc="left") == f"{name}: rna"
        for ax, mod in zip(row, ("rna", "prot"), strict=True):
            scores = found[f"{mod}_presence"].sel({"class": name}).to_pandas()  # what marks the class
            wanted = scores.nlargest(5).index.tolist()
            assert labels(ax) == wanted
            pale, full = ax.patches[:5], ax.patches[5:]
            mean = found[mod].sel({"class": name, f"{mod}_var": wanted}).values
            ends = [bar.get_x() + bar.get_width() for bar in pale]
            np.testing.assert_allclose(ends, mean, rtol=1e-5, atol=1e-6)
            presence = found[f"{mod}_presence"].sel({"class": name, f"{mod}_var": wanted}).values
            np.testing.assert_allclose([bar.get_width() for bar in full], presence, rtol=1e-5, atol=1e-6)


def test_a_heatmap_shows_the_means(written):
    found = av.get.attributions(written)
    axes = av.pl.attributions(written, kind="heatmap", n_features=2, show=False)
    for ax, mod in zip(axes, ("rna", "prot"), strict=True):
        names = labels(ax)
        shown = np.asarray(ax.images[0].get_array())
        np.testing.assert_allclose(shown, found[mod].sel({f"{mod}_var": names}).values.T, rtol=1e-6)
        for name in found["class"].values:  # two features of each class, at least
            best = found[f"{mod}_presence" if mod == "rna" else mod].sel({"class": name}).to_pandas().nlargest(2)
            assert set(best.index) <= set(names)
        assert labels(ax, "x") == found["class"].values.tolist()
        low, high = ax.images[0].get_clim()
        assert low == -high  # white is nothing


def test_areas_of_dots_are_attributions(written):
    found = av.get.attributions(written)
    axes = av.pl.attributions(written, "B", kind="dot", n_features=4, show=False)
    names = labels(axes[0], "x")
    means = found["rna"].sel({"class": "B", "rna_var": names}).values
    dots = max(axes[0].collections, key=lambda c: len(c.get_offsets()))
    columns = np.asarray(dots.get_offsets())[:, 0].astype(int)
    np.testing.assert_allclose(dots.get_sizes(), 150 * np.abs(means[columns]) / np.abs(means).max(), rtol=1e-5)


def test_one_cell(written):
    found = av.get.attributions(written, per_cell=True)
    name = written["prot"].obs["totalanvi_explained"].dropna().index[0]
    axes = av.pl.attributions(written, cell=name, n_features=6, show=False)
    for ax, mod in zip(axes, ("rna", "prot"), strict=True):
        values = found[f"{mod}_per_cell"].sel(obs=name).to_pandas()
        wanted = values[values.abs().nlargest(6).index].sort_values(ascending=False)
        assert [text.split(" (")[0] for text in labels(ax)] == wanted.index.tolist()
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], wanted, rtol=1e-5)
        counts = written[mod][name].to_df().iloc[0][wanted.index]
        assert [float(text.split(" (")[1][:-1]) for text in labels(ax)] == counts.round(0).tolist()
    assert_whole(axes[0].figure)
    measured = set(written["prot"].obs_names)
    alone = next(cell for cell in found["obs"].values if cell not in measured)
    assert len(av.pl.attributions(written, cell=alone, show=False)) == 1  # RNA only


def test_an_rna_model_has_one_panel_and_one_table_two(written):
    rna = written["rna"].copy()
    assert av.pl.attributions(rna, show=False).shape == (1,)
    mdata = written.copy()
    adata = mdata["rna"].copy()
    adata.uns["totalanvi_attributions_prot"] = mdata["prot"].uns["totalanvi_attributions"]
    for kind in KINDS:
        axes = av.pl.attributions(adata, kind=kind, show=False)
        assert axes.shape == ((6, 2) if kind == "bar" else (2,))


def test_a_contrast_says_so():
    mdata = cite(300)
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=8)
        av.tl.attributions(mdata, target=("B", "CD4 T"), n_cells=5, n_steps=5)
    fig = av.pl.attributions(mdata, kind="bar", return_fig=True)
    assert fig.get_suptitle().startswith("why B and not CD4 T")
    titles = [ax.get_title(loc="left") for ax in fig.axes if ax.get_visible()]
    assert [title for title in titles if ":" in title] == ["B: rna", "CD4 T: rna"]
    with pytest.raises(KeyError, match="'pDC' was not explained"):
        av.pl.attributions(mdata, "pDC")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kind": "violin"}, ValueError, "not one of 'heatmap', 'bar', 'dot'"),
        ({"group": "Bee"}, KeyError, "there is no 'Bee'; there are 'B', "),
        ({"group": []}, ValueError, r"group=\[\] names none"),
        ({"n_features": 0}, ValueError, "n_features=0 must be a whole number"),
        ({"kind": "bar", "n_features": -1}, ValueError, "n_features=-1 must be a whole number"),
        ({"cell": "nobody"}, KeyError, "'nobody' was not explained"),
        ({"model": "other"}, KeyError, "'other' is no attribution of this object; there are: 'totalanvi'"),
    ],
)
def test_what_is_not_there_is_said(written, options, error, match):
    with pytest.raises(error, match=match):
        av.pl.attributions(written, show=False, **options)
    assert plt.get_fignums() == []
