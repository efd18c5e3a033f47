import ast
import json
import re
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from helpers import assert_same, assert_whole, cite, contents, quiet_mudata
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from mudata import MuData, read_h5mu, read_zarr

import anvi as av
from anvi._data import fits as stored
from anvi.pl import _figure
from anvi.pl.correlation import PROTEIN
from anvi.pl.criticism import VERDICTS
from anvi.pl.differential_expression import HIGHER, LOWER
from anvi.pl.history import robust_limits

SLASH = "NK/T"
OF_A_FIT = {"model": "totalanvi"}
PLOTS = {
    "predictions": partial(av.pl.predictions, **OF_A_FIT),
    "history": partial(av.pl.history, **OF_A_FIT),
    "confusion": partial(av.pl.confusion, **OF_A_FIT),
    "panels": partial(av.pl.panels, **OF_A_FIT),
    "calibration": partial(av.pl.calibration, **OF_A_FIT),
    "correlation": partial(av.pl.correlation, **OF_A_FIT),
    "foreground": partial(av.pl.foreground, proteins=["P03", "P07"], **OF_A_FIT),
    "criticism": partial(av.pl.criticism, **OF_A_FIT),
    "attributions, heatmap": partial(av.pl.attributions, kind="heatmap", **OF_A_FIT),
    "attributions, bar": partial(av.pl.attributions, group=["B", SLASH], kind="bar", **OF_A_FIT),
    "attributions, dot": partial(av.pl.attributions, kind="dot", **OF_A_FIT),
    "differential expression, volcano": partial(av.pl.differential_expression, group=SLASH, kind="volcano"),
    "differential expression, dot": partial(av.pl.differential_expression, kind="dot"),
    "embedding": partial(av.pl.embedding, color="rna:G001"),
}
EVERY_PLOT = pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)


@pytest.fixture(scope="module")
def fits() -> MuData:
    """totalanvi and all that is drawn of it, scanvi in the RNA modality, a class with "/": never written to."""
    mdata = cite(600)
    for column in ("cell_type", "true_cell_type"):
        mdata.obs[column] = mdata.obs[column].cat.rename_categories({"NK": SLASH})
    with warnings.catch_warnings(), av.settings.override(progress=False, device="cpu", verbosity=0):
        warnings.filterwarnings("ignore", message="Class names with '/'")
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=6, train_size=0.8)
        av.tl.foreground(mdata)
        av.tl.feature_correlation(mdata, n_samples=1)
        av.tl.attributions(mdata, n_cells=5, n_steps=5)
        av.tl.differential_expression(mdata, "true_cell_type", n_samples=100)
        av.metrics.criticism(mdata, n_samples=2)
        av.tl.scanvi(mdata, batch_key="batch", max_epochs=2)
    rng = np.random.default_rng(0)
    mdata.obsm["X_umap"] = rng.normal(size=(600, 2)).astype(np.float32)
    return mdata


@pytest.fixture
def mdata(fits) -> MuData:
    """A copy that may be changed."""
    return fits.copy()


@pytest.fixture(scope="module")
def from_file(fits, tmp_path_factory) -> MuData:
    """The same, written and read."""
    path = tmp_path_factory.mktemp("pl") / "fits.h5mu"
    with quiet_mudata():
        fits.write(path)
        return read_h5mu(path)


@pytest.fixture(scope="module")
def from_zarr(fits, tmp_path_factory) -> MuData:
    path = tmp_path_factory.mktemp("pl") / "fits.zarr"
    with quiet_mudata():
        fits.write_zarr(path)
        return read_zarr(path)


@pytest.fixture(scope="module")
def adata(fits) -> AnnData:
    """The RNA modality alone, with the labels: an AnnData that was fitted."""
    adata = fits["rna"].copy()
    adata.obs["cell_type"] = fits.obs["cell_type"]
    return adata


def fake(n_obs=400, n_classes=30, n_proteins=200, n_panels=4) -> MuData:
    """What a fit leaves behind, without a fit: as many classes, proteins and cells as one likes."""
    rng = np.random.default_rng(0)
    classes = sorted([SLASH, *(f"type {i}" for i in range(n_classes - 1))])
    truth = rng.integers(n_classes, size=n_obs)
    guess = np.where(rng.random(n_obs) < 0.8, truth, rng.integers(n_classes, size=n_obs))
    cells = pd.Index([f"c{i}" for i in range(n_obs)])
    panels = [f"panel {i}" for i in range(n_panels)]
    panel = rng.integers(n_panels, size=n_obs)
    mods = {
        "rna": AnnData(np.zeros((n_obs, 3), np.float32), obs=pd.DataFrame(index=cells)),
        "prot": AnnData(
            np.zeros((n_obs, n_proteins), np.float32),
            obs=pd.DataFrame(index=cells),
            var=pd.DataFrame(index=[f"P{i}" for i in range(n_proteins)]),
        ),
    }
    mods["rna"].var_names = ["P0", "G1", "G2"]
    with quiet_mudata():
        mdata = MuData(mods)
    labels = np.array(classes, dtype=object)[truth]
    labels[rng.random(n_obs) < 0.5] = "Unknown"
    mdata.obs["cell_type"] = pd.Categorical(labels)
    mdata.obs["batch"] = pd.Categorical.from_codes(panel, panels)
    mdata.obs["totalanvi_prediction"] = pd.Categorical.from_codes(guess, classes)
    mdata.obs["totalanvi_confidence"] = rng.random(n_obs).astype(np.float32)
    mdata.obs["totalanvi_split"] = pd.Categorical(np.where(rng.random(n_obs) < 0.3, "validation", "train"))
    mdata.obsm["X_totalanvi"] = rng.normal(size=(n_obs, 5)).astype(np.float32)
    mdata.obsm["X_umap"] = rng.normal(size=(n_obs, 2)).astype(np.float32)
    measured = rng.random((n_panels, n_proteins)) < 0.7
    setup = {
        "proteins": list(mods["prot"].var_names),
        "rna_mod": "rna",
        "prot_mod": "prot",
        "batch_key": "batch",
        "panel_key": None,
        "labels_key": "cell_type",
        "unlabeled_category": "Unknown",
        "classes": classes,
        "panels": panels,
        "measured": measured.tolist(),
    }
    mdata.uns["totalanvi"] = {"model": {"config": json.dumps({"setup": setup})}}
    return mdata


def color_of_points(ax: Axes, cells: np.ndarray, plane: np.ndarray) -> list[str]:
    """The colour in which cells of known coordinates are drawn."""
    drawn = {}
    for points in ax.collections:
        if len(points.get_offsets()):
            colors = np.broadcast_to(points.get_facecolors(), (len(points.get_offsets()), 4))
            drawn |= {tuple(xy): to_hex(color) for xy, color in zip(points.get_offsets().tolist(), colors, strict=True)}
    return [drawn[tuple(plane[cell].astype(float).tolist())] for cell in cells]


def legend_names(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


# --- what holds for all plots


def pixels(fig: Figure) -> np.ndarray:
    fig.set_dpi(50)
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba()).copy()


@EVERY_PLOT
def test_every_plot_is_whole_writes_nothing_and_is_the_same_from_files(draw, fits, from_file, from_zarr):
    before = contents(fits)
    fig = draw(fits, return_fig=True)
    assert isinstance(fig, Figure)
    assert_same(contents(fits), before)
    picture = pixels(fig)
    assert_whole(fig)
    assert picture.std() > 5  # there is something to be seen
    for data in (from_file, from_zarr):
        np.testing.assert_array_equal(pixels(draw(data, return_fig=True)), picture)


@EVERY_PLOT
def test_the_users_axes_are_used(draw, fits):
    n = np.size(draw(fits, show=False))
    fig, given = plt.subplots(1, n, squeeze=False)
    open_before = plt.get_fignums()
    axes = draw(fits, ax=given.ravel()[0] if n == 1 else list(given.ravel()))
    assert list(np.ravel(axes)) == list(given.ravel()) and plt.get_fignums() == open_before
    if draw.func is not av.pl.embedding:  # scanpy answers for that
        with pytest.raises(ValueError, match=f"{n} Axes"):
            draw(fits, ax=list(plt.subplots(1, n + 1)[1]))


@pytest.mark.parametrize("plot", ["predictions", "history", "confusion"])
def test_a_model_of_one_modality(plot, fits, from_file):
    for data in (fits, from_file):
        before = contents(data)
        assert isinstance(getattr(av.pl, plot)(data, model="scanvi", return_fig=True), Figure)
        assert_same(contents(data), before)


@pytest.mark.parametrize("plot", ["predictions", "history", "confusion"])
def test_anndata(plot, adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    for data in (adata, read_h5ad(tmp_path / "a.h5ad")):
        before = contents(data)
        assert isinstance(getattr(av.pl, plot)(data, return_fig=True), Figure)
        assert_same(contents(data), before)


@EVERY_PLOT
def test_returns_axes_without_a_screen_and_none_when_shown(draw, fits, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    axes = draw(fits)
    assert all(isinstance(ax, Axes) for ax in np.ravel(axes))
    assert not shown and plt.get_fignums() == [1]  # one figure, no more
    assert draw(fits, show=True) is None
    assert shown == [True]


def test_show_none_shows_where_there_is_a_screen(monkeypatch):
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    assert _figure.can_show(own=True)
    assert not _figure.can_show(own=False)  # a figure of the user, who shows it when it is complete


@EVERY_PLOT
def test_nothing_there_names_the_next_command(draw):
    options = {name: value for name, value in draw.keywords.items() if name != "model"}
    with pytest.raises(KeyError, match=r"run (av\.(tl|metrics)\.\w+|sc\.pp\.neighbors)\("):
        draw.func(cite(), **options)
    assert not plt.get_fignums()


@pytest.mark.parametrize("plot", ["predictions", "history", "confusion"])
def test_several_fits_are_listed(plot, fits):
    with pytest.raises(ValueError, match="'totalanvi', 'scanvi'"):
        getattr(av.pl, plot)(fits)
    with pytest.raises(KeyError, match="'other' is no fitted model of this object; there are: 'totalanvi', 'scanvi'"):
        getattr(av.pl, plot)(fits, model="other")
    with pytest.raises(TypeError, match="model= takes one name, a str; got int: 3"):
        getattr(av.pl, plot)(fits, model=3)
    assert not plt.get_fignums()


def test_a_prefix_without_an_answer_names_the_slot(fits):
    query = cite(60)
    predicted = (
        fits.mod["rna"]
        .obs[["scanvi_prediction", "scanvi_confidence"]]
        .set_axis(["other_prediction", "other_confidence"], axis=1)
    )
    query.obs[list(predicted.columns)] = predicted.iloc[:60].set_axis(query.obs_names)
    for plot, slot in (("foreground", "obsm['other_prot_foreground']"), ("correlation", "varp['other_correlation']")):
        with pytest.raises(KeyError, match=re.escape(f"There is no mdata.{slot}; run av.tl.")):
            getattr(av.pl, plot)(query, model="other")
    with pytest.raises(ValueError, match="model='scanvi' has no proteins"):
        av.pl.foreground(fits, model="scanvi")
    assert not plt.get_fignums()


@EVERY_PLOT
def test_only_mudata_and_anndata(draw):
    with pytest.raises(TypeError, match="MuData or an AnnData"):
        draw(pd.DataFrame())


def test_plots_need_neither_torch_nor_the_model():
    folder = Path(av.pl.__file__).parent
    for file in folder.glob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not any(name.split(".")[0] == "torch" or name.endswith("_model") for name in names), file.name
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        heavy = {"matplotlib", "scanpy"}
        assert not any((getattr(node, "module", None) or node.names[0].name).split(".")[0] in heavy for node in top)


def test_dicts_of_others_are_not_fits():
    adata = AnnData(np.zeros((3, 2), np.float32))
    adata.uns["theirs"] = {"model": {"config": "yaml: yes"}}
    adata.uns["plain"] = {"model": "a name"}
    assert stored.stored_fits(adata) == {}
    adata.uns["broken"] = {"model": {"config": "{", "weights": np.zeros(3)}}
    with pytest.raises(ValueError, match=r"uns\['broken'\] is damaged"):
        stored.stored_fits(adata)


# --- predictions


def test_predictions_have_one_colour_per_class_in_both_panels(fits):
    labels, prediction, _ = av.pl.predictions(fits, model="totalanvi")
    plane = fits.obsm["X_umap"]
    agree = np.flatnonzero(fits.obs["cell_type"].astype(str) == fits.obs["totalanvi_prediction"].astype(str))
    assert len(agree)
    assert color_of_points(labels, agree, plane) == color_of_points(prediction, agree, plane)
    names = fits.obs["totalanvi_prediction"].to_numpy(dtype=object)
    colors = color_of_points(prediction, np.arange(len(names)), plane)
    assert len(set(zip(names, colors, strict=True))) == len(set(names)) == len(set(colors))


def test_predictions_use_stored_colours(mdata):
    categories = mdata.obs["cell_type"].cat.categories
    mdata.uns["cell_type_colors"] = [to_hex(color) for color in plt.cm.tab20.colors[: len(categories)]]
    axes = av.pl.predictions(mdata, model="totalanvi")
    wanted = dict(zip(categories, mdata.uns["cell_type_colors"], strict=True))
    names = mdata.obs["totalanvi_prediction"].to_numpy(dtype=object)
    assert color_of_points(axes[1], np.arange(600), mdata.obsm["X_umap"]) == [wanted[name] for name in names]


def test_unlabelled_cells_are_grey_and_under_the_others(fits):
    ax = av.pl.predictions(fits, model="totalanvi")[0]
    unlabelled = np.flatnonzero((fits.obs["cell_type"] == "Unknown").to_numpy())
    assert set(color_of_points(ax, unlabelled, fits.obsm["X_umap"])) == {_figure.UNLABELLED}
    assert len(ax.collections[0].get_offsets()) == len(unlabelled)  # drawn first
    assert f"({600 - len(unlabelled)} of 600 labelled)" in ax.get_title()
    assert SLASH in legend_names(av.pl.predictions(fits, model="totalanvi")[1])


def test_without_umap_the_latent_space_is_drawn_and_named(mdata):
    del mdata.obsm["X_umap"]
    axes = av.pl.predictions(mdata, model="totalanvi")
    assert axes[0].get_xlabel().startswith("totalanvi latent PC1 (")
    latent = mdata.obsm["X_totalanvi"].astype(float)
    centred = latent - latent.mean(0)
    drawn = np.concatenate([points.get_offsets() for points in axes[1].collections])
    variance = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    np.testing.assert_allclose((drawn**2).sum(0), variance[:2], rtol=1e-5)
    axes = av.pl.predictions(mdata, model="scanvi")
    assert axes[0].get_xlabel().startswith("scanvi latent PC1 (")
    del mdata.obsm["X_totalanvi"]
    with pytest.raises(KeyError, match=r"obsm\['X_totalanvi'\]; run av\.tl\.latent"):
        av.pl.predictions(mdata, model="totalanvi")


def test_umap_under_either_name_and_in_a_modality(mdata):
    plane = mdata.obsm.pop("X_umap")
    mdata.obsm["umap"] = plane
    assert av.pl.predictions(mdata, model="totalanvi")[0].get_xlabel() == "UMAP1"
    del mdata.obsm["umap"]
    mdata["rna"].obsm["X_umap"] = plane
    for options in ({"model": "scanvi"}, {"model": "scanvi", "basis": "rna:umap"}, {"model": "totalanvi"}):
        assert av.pl.predictions(mdata, **options)[0].get_xlabel() == "UMAP1"
    assert av.pl.predictions(mdata, model="scanvi", basis="X_totalanvi")[0].get_xlabel() == "totalanvi 1"
    with pytest.raises(KeyError, match=r"obsm\['X_tsne'\] or obsm\['tsne'\]"):
        av.pl.predictions(mdata, model="scanvi", basis="tsne")


@pytest.mark.parametrize("n_classes", [6, 30, 100])
def test_legend_is_outside_and_whole(n_classes):
    fig = av.pl.predictions(fake(1500, n_classes), return_fig=True)
    assert_whole(fig)
    panels = [ax for ax in fig.axes if ax.get_title()]
    legend = panels[1].get_legend()
    box = legend.get_window_extent()
    assert not any(ax.get_window_extent().overlaps(box) for ax in panels)
    assert len(legend.get_texts()) == n_classes + 1  # and cells without a label
    assert len({to_hex(handle.get_color()) for handle in legend.legend_handles}) == n_classes + 1
    widths = [ax.get_window_extent().width for ax in panels]
    assert max(widths) < 1.05 * min(widths) and min(widths) > 300


def test_a_query_without_labels_has_two_panels(mdata):
    query = mdata.copy()
    del query.obs["cell_type"]
    axes = av.pl.predictions(query, model="totalanvi")
    assert [ax.get_title() for ax in axes] == ["totalanvi prediction", "totalanvi confidence"]
    with pytest.raises(KeyError, match="labels_key='tpye' was found in none"):
        av.pl.predictions(mdata, model="totalanvi", labels_key="tpye")


def test_predictions_of_a_model_from_elsewhere(mdata):
    reference, query = mdata, cite(300)
    model = av.get.model(reference, "totalanvi")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Class names with '/'")
        av.tl.predict(query, model=model)
    query.obsm["X_umap"] = np.random.default_rng(0).normal(size=(300, 2))
    assert len(av.pl.predictions(query)) == 2
    assert len(av.pl.predictions(query, model="totalanvi", labels_key="cell_type")) == 3
    av.pl.confusion(query, labels_key="true_cell_type", split=None)
    with pytest.raises(KeyError, match="labels_key="):
        av.pl.confusion(query, split=None)
    with pytest.raises(KeyError, match=r"obs\['totalanvi_split'\]"):
        av.pl.confusion(query, labels_key="true_cell_type")


def test_missing_predictions_name_the_slot_and_the_command(mdata):
    del mdata.obs["totalanvi_prediction"]
    for plot in (av.pl.predictions, av.pl.confusion):
        with pytest.raises(
            KeyError, match=r"mdata\.obs\['totalanvi_prediction'\]; run av\.tl\.predict\(data, model='to"
        ):
            plot(mdata, model="totalanvi")
    fit = fake()
    config = json.loads(fit.uns["totalanvi"]["model"]["config"])
    config["setup"]["classes"] = []
    fit.uns["totalanvi"]["model"]["config"] = json.dumps(config)
    with pytest.raises(KeyError, match="fitted without labels"):
        av.pl.predictions(fit)


def test_cells_outside_the_model_are_left_out(mdata):
    mdata.obsm["X_umap"][:50] = np.nan
    mdata.obs.loc[mdata.obs_names[50:60], "totalanvi_prediction"] = np.nan
    mdata.obs.loc[mdata.obs_names[50:60], "totalanvi_confidence"] = np.nan
    axes = av.pl.predictions(mdata, model="totalanvi")
    assert [sum(len(points.get_offsets()) for points in ax.collections) for ax in axes] == [550] * 3
    assert len(axes[1].collections[0].get_offsets()) == 10  # grey
    mdata.obsm["X_umap"][:] = np.nan
    with pytest.raises(ValueError, match="No cell has coordinates"):
        av.pl.predictions(mdata, model="totalanvi")


def test_points_depend_on_the_number_of_cells():
    few, many = _figure.point_style(500), _figure.point_style(200_000)
    assert few["s"] > many["s"] and few["alpha"] > many["alpha"]
    assert not _figure.point_style(10_000)["rasterized"] and _figure.point_style(10_001)["rasterized"]


def test_what_the_users_axes_are_for_is_said(fits):
    with pytest.raises(ValueError, match="ax= must hold 3 Axes, one for each of labels, prediction, confidence; got 1"):
        av.pl.predictions(fits, model="totalanvi", ax=plt.subplots()[1])


# --- colours


@pytest.mark.parametrize("n", [1, 20, 21, 28, 29, 102])
def test_class_colors_are_distinct(n):
    names = [f"t{i}" for i in range(n)]
    colors = _figure.class_colors(names, {})
    assert len(set(colors.values())) == n and list(colors) == names
    known = _figure.class_colors(names, {"t0": "#1f77b4"})
    assert known["t0"] == "#1f77b4" and len(set(known.values())) >= min(n, 101)


def test_stored_colors_need_one_for_each_category(mdata):
    assert _figure.stored_colors(mdata, "cell_type") == {}
    mdata.uns["cell_type_colors"] = ["#000000"]
    assert _figure.stored_colors(mdata, "cell_type") == {}
    mdata["rna"].uns["x_colors"] = np.array(["#000000", "#ffffff"], dtype=object)
    mdata["rna"].obs["x"] = pd.Categorical(["a", "b"] * 300)
    assert _figure.stored_colors(mdata, "rna:x") == {"a": "#000000", "b": "#ffffff"}
    assert _figure.stored_colors(mdata, "x", ("rna", "prot")) == {"a": "#000000", "b": "#ffffff"}


# --- history


def test_history_draws_every_term_and_marks_the_best_epoch(fits):
    axes = av.pl.history(fits, model="totalanvi")
    table = fits.uns["totalanvi"]["history"]
    recorded = {name.partition("_")[2] for name in table if name.startswith(("train_", "validation_"))}
    assert len(axes) == len(recorded)
    assert [ax.get_title() for ax in axes[:3]] == ["loss", "ELBO", "accuracy (labelled cells)"]
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    np.testing.assert_array_equal(lines["train"].get_ydata(), table["train_loss"])
    np.testing.assert_array_equal(lines["validation"].get_ydata(), table["validation_loss"])
    best = fits.uns["totalanvi"]["params"]["best_epoch"]
    legend = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert legend == ["train", "validation", f"best, kept: epoch {best}"]


def test_history_shades_the_warmup(mdata):
    table = mdata.uns["totalanvi"]["history"]
    weights = np.full(len(table), 0.6)
    weights[:2] = 0.2, 0.4
    mdata.uns["totalanvi"]["history"] = table.assign(kl_weight=weights)
    axes = av.pl.history(mdata, model="totalanvi")
    assert axes[0].figure.legends[0].get_texts()[-1].get_text() == "warm-up"
    shaded = axes[0].patches[0].get_extents().transformed(axes[0].transData.inverted())  # of any kind of patch
    assert shaded.width == pytest.approx(2)  # two epochs of less weight than the last


def test_history_of_chosen_terms(fits):
    assert isinstance(av.pl.history(fits, model="scanvi", terms="elbo"), Axes)
    assert len(av.pl.history(fits, model="scanvi", terms=["loss", "kl_z"])) == 2
    with pytest.raises(KeyError, match=r"\['kl_w'\] were not recorded in this fit; there are: 'loss', 'elbo'"):
        av.pl.history(fits, model="scanvi", terms=["loss", "kl_w"])
    mdata = fake()
    with pytest.raises(KeyError, match=r"mdata\.uns\['totalanvi'\]\['history'\]"):
        av.pl.history(mdata)


def test_history_without_an_epoch(mdata):
    table = mdata.uns["totalanvi"]["history"]
    for empty in (table.iloc[:0], table.iloc[:0, :0]):
        mdata.uns["totalanvi"]["history"] = empty
        with pytest.raises(ValueError, match="ran no epoch"):
            av.pl.history(mdata, model="totalanvi")


def test_history_of_one_epoch_without_validation_cells(mdata):
    table = mdata.uns["totalanvi"]["history"].iloc[:1]
    table = table[[name for name in table if not name.startswith("validation")]]
    mdata.uns["totalanvi"]["history"] = table
    fig = av.pl.history(mdata, model="totalanvi", terms="loss", return_fig=True)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["train"]
    assert_whole(fig)


def test_early_values_do_not_squash_the_rest(mdata):
    n = 100
    loss = 300 + 5 * np.random.default_rng(0).normal(size=n)
    loss[:3] = 50_000, 9_000, 2_000
    mdata.uns["totalanvi"]["history"] = pd.DataFrame({"epoch": range(n), "train_loss": loss, "kl_weight": 1.0})
    ax = av.pl.history(mdata, model="totalanvi", terms="loss")
    low, high = ax.get_ylim()
    assert 250 < low < loss.min() and loss[3:].max() < high < 400
    assert ["↑ 5e+04"] == [text.get_text() for text in ax.texts]


def test_robust_limits():
    steady = np.linspace(1, 2, 50)
    assert robust_limits(steady, steady) == (1, 2)
    assert robust_limits(np.append(1e6, steady), steady) == (1, 2)
    assert robust_limits(np.append(-1e6, steady), steady) == (1, 2)
    late = np.append(steady, 1e6)  # what happens late is never hidden
    assert robust_limits(late, late) == (1, 1e6)
    assert robust_limits(np.array([np.nan]), np.array([np.nan])) == (0, 1)
    assert robust_limits(np.array([np.nan, 3.0]), np.array([3.0])) == (3, 3)


# --- confusion


def numbers(ax: Axes) -> dict[tuple[float, float], str]:
    return {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in ax.texts}


def test_confusion_counts_labelled_validation_cells_only(fits):
    obs, classes = fits.obs, list(fits.uns["totalanvi"]["classes"])
    kept = (obs["totalanvi_split"] == "validation") & (obs["cell_type"] != "Unknown")
    ax = av.pl.confusion(fits, model="totalanvi", normalize=False)
    wanted = {}
    for true, guess in zip(obs["cell_type"][kept], obs["totalanvi_prediction"][kept], strict=True):
        cell = classes.index(true), classes.index(guess)
        wanted[cell] = wanted.get(cell, 0) + 1
    assert numbers(ax) == {cell: str(n) for cell, n in wanted.items()}
    n_cells = obs["cell_type"][kept].value_counts()
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"{name} ({n_cells[name]})" for name in classes]
    assert f"{kept.sum()} labelled" in ax.get_title()
    shares = numbers(av.pl.confusion(fits, model="totalanvi"))
    assert shares == {(i, j): f"{n / n_cells[classes[i]]:.2f}" for (i, j), n in wanted.items()}


def test_confusion_with_other_truth_of_all_cells(fits):
    ax = av.pl.confusion(fits, model="scanvi", labels_key="true_cell_type", split=None)
    right = (fits.obs["true_cell_type"] == fits["rna"].obs["scanvi_prediction"].astype(str)).mean()
    assert f"600 labelled, accuracy {right:.2f}" in ax.get_title()
    classes = fits.uns["totalanvi"]["classes"]
    truth, guess = fits.obs["true_cell_type"], fits["rna"].obs["scanvi_prediction"]
    recall = [f"{(guess[truth == name] == name).mean():.2f}" for name in classes]
    (bars,) = ax.child_axes
    assert [text.get_text() for text in bars.texts] == recall


def test_labels_that_the_model_does_not_know_are_rows(mdata):
    label = mdata.obs["cell_type"].astype(object)
    label[label == "B"] = "plasma"
    mdata.obs["cell_type"] = pd.Categorical(label)
    ax = av.pl.confusion(mdata, model="totalanvi", split=None)
    assert [text.get_text().rpartition(" ")[0] for text in ax.get_yticklabels()][-1] == "plasma"
    texts = [text.get_text() for text in ax.child_axes[0].texts]
    assert texts[-1] == "0.00" and texts[0] == "no cells"
    av.pl.predictions(mdata, model="totalanvi")


def test_confusion_without_such_cells(mdata):
    mdata.obs["totalanvi_split"] = pd.Categorical(["train"] * 600)
    with pytest.raises(ValueError, match=r"split='validation' has no labelled cell.*'train' \(600 cells\)"):
        av.pl.confusion(mdata, model="totalanvi")
    mdata.obs["cell_type"] = "Unknown"
    with pytest.raises(ValueError, match="No cell with a prediction has a label in 'cell_type'"):
        av.pl.confusion(mdata, model="totalanvi", split=None)
    assert not plt.get_fignums()


@pytest.mark.parametrize("n_classes", [2, 20, 30])
def test_confusion_of_many_classes(n_classes):
    fig = av.pl.confusion(fake(1000, n_classes), return_fig=True)
    assert_whole(fig)
    ax = fig.axes[0]
    assert bool(ax.texts) == (n_classes <= 20)
    labels = [text.get_window_extent() for text in ax.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in zip(labels[:-1], labels[1:], strict=True))


# --- panels


def test_panels_of_a_fit(fits):
    ax = av.pl.panels(fits)  # scanvi has no proteins: only one fit is meant
    setup = json.loads(fits.uns["totalanvi"]["model"]["config"])["setup"]
    image = ax.images[0].get_array()
    names = [text.get_text() for text in ax.get_xticklabels()]
    measured = np.array(setup["measured"])[:, [setup["proteins"].index(name) for name in names]]
    np.testing.assert_array_equal(image, measured)
    n_cells = fits.obs["batch"].value_counts()
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"{b} ({n_cells[b]} cells)" for b in setup["batches"]]
    assert [text.get_text() for text in ax.texts] == ["20 of 20", "15 of 20", "none"]
    with pytest.raises(ValueError, match="'scanvi' has no proteins"):
        av.pl.panels(fits, model="scanvi")
    with pytest.raises(ValueError, match="panel_key='cell_type' names none of the panels"):
        av.pl.panels(fits, panel_key="cell_type")


def test_panels_from_the_table_without_a_fit():
    mdata = cite()
    mdata["prot"].varm["measured"] = pd.DataFrame(
        {"batch_0": [True] * 20, "batch_1": [False] * 5 + [True] * 15}, index=mdata["prot"].var_names
    )
    ax = av.pl.panels(mdata)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["batch_0", "batch_1"]
    assert [text.get_text() for text in ax.texts] == ["20 of 20", "15 of 20"]
    ax = av.pl.panels(mdata, panel_key="batch")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["batch_0 (100 cells)", "batch_1 (100 cells)"]
    del mdata["prot"].varm["measured"]
    with pytest.raises(KeyError, match=r"varm\['measured'\]; run av\.tl\.totalanvi\(mdata\), or av\.pp\.panels"):
        av.pl.panels(mdata)


def test_cells_without_proteins_are_told_from_the_others():
    mdata = cite()
    mdata["prot"].varm["measured"] = pd.DataFrame({"all": [True] * 20}, index=mdata["prot"].var_names)
    ax = av.pl.panels(mdata)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["all (300 cells, 200 stained)"]


@pytest.mark.parametrize(("n_proteins", "n_panels"), [(14, 2), (14, 1), (80, 3), (200, 20)])
def test_panels_of_any_size(n_proteins, n_panels):
    fig = av.pl.panels(fake(300, 6, n_proteins, n_panels), return_fig=True)
    assert_whole(fig)
    ax = fig.axes[0]
    names = [text.get_text() for text in ax.get_xticklabels()]
    assert (len(names) == n_proteins) == (n_proteins <= 80)
    if n_proteins <= 80:
        boxes = [text.get_window_extent() for text in ax.get_xticklabels()]
        assert not any(a.overlaps(b) for a, b in zip(boxes[:-1], boxes[1:], strict=True))
    else:
        assert all(name.isdigit() for name in names)


# --- embedding


def test_embedding_of_one_name_in_two_modalities():
    mdata = fake()
    mdata["rna"].X[:, 0] = np.arange(400)
    mdata["prot"].X[:, 0] = np.arange(400)[::-1]
    axes = av.pl.embedding(mdata, color=["rna:P0", "prot:P0", "cell_type"])
    assert [ax.get_title() for ax in axes] == ["rna:P0", "prot:P0", "cell_type"]
    for ax, values in zip(axes[:2], (np.arange(400), np.arange(400)[::-1]), strict=True):
        points = ax.collections[0]
        drawn = {tuple(xy): value for xy, value in zip(points.get_offsets().tolist(), points.get_array(), strict=True)}
        assert [drawn[tuple(xy)] for xy in mdata.obsm["X_umap"].astype(float).tolist()] == values.tolist()
    with pytest.raises(ValueError, match="'P0' is in several modalities; name one: 'rna:P0' or 'prot:P0'"):
        av.pl.embedding(mdata, color="P0")


def test_embedding_reads_columns_and_features_of_any_part(mdata):
    rna = mdata["rna"]
    rna.obs["depth"] = np.asarray(rna.X.sum(1)).ravel()
    mdata["prot"].obs["flag"] = [True, False] * (mdata["prot"].n_obs // 2)
    rna.layers["twice"] = rna.X * 2
    names = ["depth", "rna:depth", "flag", "G001", "P01", "batch", "rna:scanvi_prediction", "totalanvi_confidence"]
    axes = av.pl.embedding(mdata, color=names)
    assert [ax.get_title() for ax in axes] == names
    ax = av.pl.embedding(mdata, color="G001", layer={"rna": "twice"}, sort_order=False)
    np.testing.assert_array_equal(ax.collections[0].get_array(), 2 * rna[:, "G001"].X.toarray().ravel())
    absent = av.pl.embedding(mdata, color="P01", sort_order=False).collections[0].get_array()
    stained = mdata.obs_names.isin(mdata["prot"].obs_names)
    np.testing.assert_array_equal(np.ma.getmaskarray(absent) | np.isnan(np.asarray(absent)), ~stained)
    with pytest.raises(KeyError, match="'rna:GO01' is neither an obs column nor a feature. Did you mean 'rna:G0"):
        av.pl.embedding(mdata, color="rna:GO01")
    with pytest.raises(KeyError, match="layer='none'"):
        av.pl.embedding(mdata, color="G001", layer="none")


def test_embedding_takes_its_basis_from_any_part(mdata, adata):
    assert av.pl.embedding(mdata, "X_totalanvi").get_xlabel() == "totalanvi1"
    assert av.pl.embedding(mdata, "totalanvi").get_xlabel() == "totalanvi1"
    assert av.pl.embedding(mdata, "scanvi", "prot:P01").get_xlabel() == "scanvi1"
    assert av.pl.embedding(mdata, "rna:X_scanvi", "cell_type").get_xlabel() == "scanvi1"
    assert av.pl.embedding(adata, "scanvi", ["G001", "scanvi_prediction"])[0].get_xlabel() == "scanvi1"
    with pytest.raises(KeyError, match=r"obsm\['X_rna'\]"):  # a mask of cells, not coordinates
        av.pl.embedding(mdata, "rna")
    with pytest.raises(KeyError, match=r"run sc\.pp\.neighbors.* and sc\.tl\.umap"):
        av.pl.embedding(adata)
    for mod in mdata.mod.values():
        mod.obsm["X_pca"] = np.zeros((mod.n_obs, 2))
    with pytest.raises(ValueError, match="name one: 'rna:pca', 'prot:pca'"):
        av.pl.embedding(mdata, "pca")


def test_embedding_keeps_colours_as_scanpy_does_and_nothing_else(mdata):
    before = contents(mdata)
    av.pl.embedding(mdata, color=["cell_type", "rna:scanvi_prediction", "rna:G001"])
    after = contents(mdata)
    assert set(after) - set(before) == {"uns cell_type_colors", "rna uns scanvi_prediction_colors"}
    assert_same({name: after[name] for name in before}, before)
    av.pl.embedding(mdata, color=["cell_type", "totalanvi_confidence"])
    assert_same(contents(mdata), after)
    view = mdata[:100]
    av.pl.embedding(view, color="totalanvi_prediction")
    assert view.is_view and "totalanvi_prediction_colors" not in view.uns
    av.pl.embedding(mdata, color="cell_type", palette=["#000000"] * 7)
    assert set(mdata.uns["cell_type_colors"]) == {"#000000"}


def test_no_cells_are_no_plot(mdata):
    empty = mdata[:0].copy()
    for plot in (lambda: av.pl.embedding(empty, "X_umap"), lambda: av.pl.predictions(empty, model="scanvi")):
        with pytest.raises(ValueError, match="has no cells"):
            plot()


def test_embedding_passes_arguments_on(mdata):
    ax = av.pl.embedding(mdata, color="rna:G001", title="a title", vmax=3, mask_obs=np.arange(600) < 300)
    assert ax.get_title() == "a title" and ax.collections[0].norm.vmax == 3
    _, own = plt.subplots()
    assert av.pl.embedding(mdata, color="batch", ax=own) is own
    assert isinstance(av.pl.embedding(mdata, color="batch", return_fig=True), Figure)
    for name in ("use_raw", "gene_symbols"):
        with pytest.raises(TypeError, match=f"no argument {name}="):
            av.pl.embedding(mdata, color="batch", **{name: "x"})
    open_before = plt.get_fignums()
    with pytest.raises(AttributeError):
        av.pl.embedding(mdata, color="batch", no_such_argument=3)
    assert plt.get_fignums() == open_before


def test_embedding_draws_edges(mdata):
    graph = np.zeros((600, 600))
    graph[0, 1] = graph[1, 0] = 1
    mdata.obsp["connectivities"] = mdata.obsp["distances"] = graph
    mdata.uns["neighbors"] = {"connectivities_key": "connectivities", "distances_key": "distances", "params": {}}
    ax = av.pl.embedding(mdata, color="batch", edges=True)
    assert len(ax.collections) > 1


def test_embedding_legends_are_whole_and_do_not_lie_over_panels():
    mdata = fake(300, 30)
    for color in (["cell_type"], ["cell_type", "totalanvi_prediction", "batch"]):
        fig = av.pl.embedding(mdata, color=color, return_fig=True)
        assert_whole(fig)
        for ax in fig.axes:
            box = ax.get_legend().get_window_extent()
            assert not any(other.get_window_extent().overlaps(box) for other in fig.axes)


# every plot -------------------------------------------------------------------------------------------------------
def test_every_plot_can_write_itself(tmp_path):
    """One place does it; here one plot, and the signature of all."""
    import inspect

    for name in set(av.pl.__all__) - {"report"}:
        parameters = inspect.signature(getattr(av.pl, name)).parameters
        assert parameters["save"].default is None, name
        assert "save=save" in inspect.getsource(getattr(av.pl, name)), name


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_save_writes_a_file_of_the_kind_that_its_ending_says(fits, tmp_path, ending):
    path = tmp_path / f"history.{ending}"
    av.pl.history(fits, model="totalanvi", show=False, save=path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"%PDF-", b"<?xml")
    av.pl.embedding(fits, "X_totalanvi", "cell_type", show=False, save=str(tmp_path / f"e.{ending}"))
    assert (tmp_path / f"e.{ending}").stat().st_size > 1000
    with pytest.raises(FileNotFoundError):
        av.pl.history(fits, model="totalanvi", show=False, save=tmp_path / "no" / "folder.png")


# columns of obsm --------------------------------------------------------------------------------------------------
def test_embedding_draws_columns_of_obsm(fits):
    proba = av.get.proba(fits, model="totalanvi")
    name = next(name for name in proba if "/" in name)
    fits["rna"].obsm["scores"] = pd.DataFrame({"a/b": np.arange(fits["rna"].n_obs)}, fits["rna"].obs_names)
    wanted = [f"totalanvi_proba:{name}", "X_totalanvi:1", "rna:scores:a/b"]
    axes = av.pl.embedding(fits, "X_totalanvi", wanted, sort_order=False, show=False)
    drawn = [np.ma.getdata(ax.collections[0].get_array()) for ax in axes]
    np.testing.assert_allclose(drawn[0], proba[name], rtol=1e-6)
    np.testing.assert_allclose(drawn[1], fits.obsm["X_totalanvi"][:, 1], rtol=1e-6)
    np.testing.assert_allclose(drawn[2], fits["rna"].obsm["scores"]["a/b"])
    with pytest.raises(KeyError, match=rf"Did you mean 'totalanvi_proba:{name}'"):
        av.pl.embedding(fits, "X_totalanvi", f"totalanvi_probs:{name}", show=False)
    for wrong in ("X_totalanvi:99", "X_totalanvi:one", "totalanvi_proba:none"):
        with pytest.raises(KeyError, match="neither an obs column nor a feature"):
            av.pl.embedding(fits, "X_totalanvi", wrong, show=False)


def test_class_names_with_a_slash_are_found_in_obsm(mdata):
    mdata.obsm["X_p"], mdata.obsm["proba"] = (
        np.zeros((mdata.n_obs, 2)),
        pd.DataFrame({"NK|T": np.linspace(0, 1, mdata.n_obs)}, index=mdata.obs_names),
    )
    assert av.pl.embedding(mdata, "p", "proba:NK/T", show=False).get_title() == "proba:NK/T"


def test_colours_of_features_end_at_a_percentile_unless_they_are_given(mdata):
    rng = np.random.default_rng(0)
    rna = mdata["rna"]
    mdata.obsm["X_p"] = rng.normal(size=(mdata.n_obs, 2))
    values = rng.poisson(5, rna.n_obs).astype(np.float32)
    values[0] = 1000
    rna.layers["x"] = np.tile(values[:, None], (1, rna.n_vars))
    rna.layers["rare"] = np.zeros_like(rna.layers["x"])
    rna.layers["rare"][0] = 3
    rna.obs["score"] = values
    gene = f"rna:{rna.var_names[0]}"

    def limits(color, **options):
        return av.pl.embedding(mdata, "p", color, show=False, **options).collections[0].get_clim()

    assert limits(gene, layer="x") == (values.min(), pytest.approx(np.quantile(values, 0.99)))
    assert limits(gene, layer="x", vmax=50)[1] == 50 and limits(gene, layer="x", vmax="p50")[1] == np.median(values)
    assert limits(gene, layer="x", vmin="p10")[0] == np.quantile(values, 0.1)
    assert limits(gene, layer="rare") == (0, 3)  # the only cell is to be seen
    assert limits("rna:score")[1] == 1000  # a column of the user's is drawn as it is


def test_figures_of_many_panels_fit_a_page_and_rcparams_count(mdata):
    from matplotlib import rc_context

    mdata.obsm["X_p"] = np.random.default_rng(0).normal(size=(mdata.n_obs, 2))
    eight = [f"rna:{name}" for name in mdata["rna"].var_names[:7]] + ["cell_type"]
    assert av.pl.embedding(mdata, "p", eight, return_fig=True).get_figwidth() < 17
    with rc_context({"figure.figsize": (2, 2)}):
        assert av.pl.embedding(mdata, "p", eight[0], return_fig=True).get_figheight() == 2


def test_cells_of_no_type_are_grey(labelled):
    from anvi._data.slots import UNASSIGNED_COLOR

    labelled.obs["totalanvi_label"] = pd.Categorical(
        ["Unassigned"] * 5 + list(labelled.obs["totalanvi_label"][5:].astype(str))
    )
    labelled.uns.pop("totalanvi_label_colors", None)
    av.pl.embedding(labelled, "X_totalanvi", "totalanvi_label", show=False)
    names = list(labelled.obs["totalanvi_label"].cat.categories)
    colors = dict(zip(names, labelled.uns["totalanvi_label_colors"], strict=True))
    assert colors["Unassigned"] == UNASSIGNED_COLOR and len(set(colors.values())) == len(names)


@pytest.mark.filterwarnings("ignore:Class names")
def test_predictions_with_unassigned_cells_keep_the_labels_colours(mdata):
    av.tl.scanvi(mdata, max_epochs=1)
    names = list(av.get.model(mdata, "scanvi").classes)
    from anvi._data import slots
    from anvi._data.predictions import write_colors

    home = mdata["rna"]
    home.obs["scanvi_label"] = pd.Categorical(["Unassigned"] * home.n_obs, categories=[*names, "Unassigned"])
    colors = [f"#0000{i:02x}" for i in range(len(names))]
    write_colors(slots.Writer(mdata, home, "rna", home.obs_names), "scanvi", tuple(names), colors)
    assert home.uns["scanvi_label_colors"] == [*colors, slots.UNASSIGNED_COLOR]


@pytest.mark.parametrize("color", [PROTEIN, HIGHER, LOWER, *VERDICTS.values()])
def test_coloured_letters_can_be_read_on_white_and_on_black(color):
    """At the contrast of 4.5 that WCAG 2.1 asks of text."""
    share = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = np.dot([0.2126, 0.7152, 0.0722], share)
    assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) >= 4.5


# two names that differ where they are cut ---------------------------------------------------------------------------

NAIVE = [f"naive thymus-derived CD{i}-positive, alpha-beta T cell" for i in (4, 8)]  # of the Cell Ontology


def test_names_that_are_cut_stay_apart():
    shorten, shorten_each = _figure.shorten, _figure.shorten_each
    assert shorten(NAIVE[0]) == shorten(NAIVE[1])
    short = shorten_each([*NAIVE, "B cell", "x" * 60])
    assert len(set(short)) == 4 and short[2:] == ["B cell", shorten("x" * 60)] and len(short[0]) < len(NAIVE[0])
    assert shorten_each(["B", "B"]) == ["B", "B"]
    ids = [f"ENSG{i:011d}" for i in range(20_000)]  # cut to 14 signs many are the same
    assert len(set(shorten_each(ids, 14))) == 20_000


def test_plots_tell_classes_of_long_names_apart():
    mdata = cite(200, labeled_fraction=1.0)
    mdata.obs["cell_type"] = mdata.obs["true_cell_type"].cat.rename_categories({"CD4 T": NAIVE[0], "CD8 T": NAIVE[1]})
    av.tl.totalanvi(mdata, max_epochs=1, n_hidden=8)
    av.tl.differential_expression(mdata, "cell_type", n_samples=50)
    ax = av.pl.confusion(mdata, split=None, show=False)
    columns = [text.get_text() for text in ax.get_xticklabels()]
    dots = av.pl.differential_expression(mdata, kind="dot", show=False)[0]
    legend = av.pl.embedding(mdata, "X_totalanvi", color="cell_type", show=False).get_legend().get_texts()
    for names in (columns, [text.get_text() for text in dots.get_yticklabels()], [text.get_text() for text in legend]):
        assert len(set(names)) == len(names)
    plt.close("all")
