"""What is drawn against the table that was written; scanpy's own results, files, errors and the layout."""

import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from helpers import assert_whole, mudata_of
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

import anvi as av
from anvi._data.rankings import Ranked, build_ranking
from anvi.pl.differential_expression import HIGHER, LOWER, OTHER

KEY = "rank_genes_groups"
SLASH = "NK/T"


def ranking(names, groups, seed: int = 0, **params) -> dict:
    """Any result of this shape: about a third of the features called, half of them lower."""
    rng = np.random.default_rng(seed)
    columns = {}
    for group in groups:
        lfc, rate = rng.normal(0, 2, len(names)), rng.uniform(0, 0.15, len(names))
        extras = {"proba_de": (1 - rate).astype(np.float32)}
        columns[group] = Ranked(lfc, lfc, rate / 2, rate, extras)
    return build_ranking(columns, list(names), {"groupby": "g", "reference": "rest", "fdr": 0.05} | params)


@pytest.fixture
def mdata():
    """Results that nobody computed, in both modalities, and no model at all."""
    mods = {}
    for seed, (mod, letter, n) in enumerate((("rna", "G", 60), ("prot", "P", 20))):
        mods[mod] = AnnData(np.zeros((4, n), np.float32))
        mods[mod].var_names = [f"{letter}{i}" for i in range(n)]
        mods[mod].uns[KEY] = ranking(mods[mod].var_names, ["B", SLASH, "pDC"], seed)
    return mudata_of(mods)


def points(ax) -> dict[str, np.ndarray]:
    """Positions of the dots of a volcano by colour."""
    return {to_hex(dots.get_facecolors()[0]): np.asarray(dots.get_offsets()) for dots in ax.collections[:3]}


@pytest.mark.parametrize("mod", ["rna", "prot"])
def test_a_volcano_has_every_feature_in_its_colour(mdata, mod):
    ax = av.pl.differential_expression(mdata, SLASH, modality=mod, show=False)
    wanted = {HIGHER: [], LOWER: [], OTHER: []}
    for row in av.get.de(mdata, SLASH, mod).itertuples():
        color = OTHER if row.pvals_adj > 0.05 else HIGHER if row.logfoldchanges > 0 else LOWER
        wanted[color].append((row.logfoldchanges, -np.log10(row.pvals_adj)))
    found = points(ax)
    assert sum(map(len, wanted.values())) == mdata[mod].n_vars and all(map(len, wanted.values()))
    for color, dots in wanted.items():
        np.testing.assert_allclose(found[color], dots, rtol=1e-5)
    assert ax.get_title() == f"{SLASH} ({mod})" and "NK/T / rest" in ax.get_xlabel()
    # called features are above the line
    line = ax.lines[0].get_ydata()[0]
    assert line == pytest.approx(-np.log10(0.05)) and found[HIGHER][:, 1].min() >= line > found[OTHER][:, 1].max()


def test_the_surest_called_features_are_named(mdata):
    ax = av.pl.differential_expression(mdata, "B", modality="rna", n_features=3, show=False)
    table = av.get.de(mdata, "B", "rna")
    called = table[table["is_de"]]
    higher = called[called["logfoldchanges"] > 0]["names"].head(3)
    lower = called[called["logfoldchanges"] < 0]["names"].tail(3)
    assert {text.get_text() for text in ax.texts} == {*higher, *lower}
    for text in ax.texts:
        row = table.set_index("names").loc[text.get_text()]
        np.testing.assert_allclose(text.xy, (row["logfoldchanges"], -np.log10(row["pvals_adj"])), rtol=1e-5)


def test_dots_are_the_table(mdata):
    axes = av.pl.differential_expression(mdata, kind="dot", n_features=2, show=False)
    for ax, mod in zip(axes, ("rna", "prot"), strict=True):
        table = av.get.de(mdata, modality=mod)
        features = [text.get_text() for text in ax.get_xticklabels()]
        firsts = [name for group in ("B", SLASH, "pDC") for name in table[table["group"] == group]["names"][:2]]
        assert features == list(dict.fromkeys(firsts))
        groups = [text.get_text() for text in ax.get_yticklabels()]
        assert groups == ["B", SLASH, "pDC"]
        dots = ax.collections[0]
        by_place = table.set_index(["group", "names"])
        assert len(dots.get_offsets()) == len(groups) * len(features)
        sizes, shades, rings = dots.get_sizes(), dots.get_array(), dots.get_edgecolors()
        largest = by_place["proba_de"].max()
        for i, (x, y) in enumerate(dots.get_offsets()):
            row = by_place.loc[groups[round(y)], features[round(x)]]
            assert shades[i] == pytest.approx(row["logfoldchanges"])
            assert (rings[i][3] > 0) == row["is_de"]
            assert sizes[i] / sizes.max() == pytest.approx((row["proba_de"] / largest) ** 2, rel=0.02)


def test_a_result_of_scanpy_and_proteins_of_an_anndata():
    rng = np.random.default_rng(0)
    adata = AnnData(np.abs(rng.normal(size=(60, 12))).astype(np.float32))
    adata.obs["g"] = np.repeat(["a", "b"], 30)
    adata.X[:30, 0] += 5
    sc.tl.rank_genes_groups(adata, "g", method="t-test")
    ax = av.pl.differential_expression(adata, "a", show=False)
    assert {text.get_text() for text in ax.texts} >= {"0"} and len(points(ax)[HIGHER]) >= 1
    av.pl.differential_expression(adata, kind="dot", show=False)
    adata.uns[f"{KEY}_prot"] = ranking(["P1", "P2"], ["a", "b"])
    titles = [ax.get_title() for ax in av.pl.differential_expression(adata, show=False)]
    assert titles == ["a (rna)", "a (prot)", "b (rna)", "b (prot)"]


def test_certainty_without_end_and_features_that_do_not_change():
    adata = AnnData(np.zeros((2, 4), np.float32))
    numbers = np.array([3.0, 0.0, np.nan, -1.0])
    adata.uns[KEY] = build_ranking(
        {"a": Ranked(numbers, numbers, np.zeros(4), np.zeros(4))}, list("wxyz"), {"reference": "rest"}
    )
    for kind in ("volcano", "dot"):
        fig = av.pl.differential_expression(adata, kind=kind, return_fig=True)
        fig.draw_without_rendering()


def test_very_many_groups_stand_side_by_side(tmp_path):
    names = [f"G{i}" for i in range(30)]
    adata = AnnData(np.zeros((2, 30), np.float32))
    adata.uns[KEY] = ranking(names, [f"type {i}" for i in range(40)])
    ax = av.pl.differential_expression(adata, show=False)
    assert [text.get_text() for text in ax.get_xticklabels()] == [f"type {i}" for i in range(40)]
    table = av.get.de(adata)
    for place, (_, part) in enumerate(table.groupby("group", observed=True)):
        drawn = [c.get_offsets() for c in ax.collections[3 * place : 3 * place + 3]]
        wanted = [part[~part["is_de"]], part[part["is_de"] & (part["logfoldchanges"] > 0)]]
        for points, rows in zip(drawn, wanted, strict=False):
            np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(rows["logfoldchanges"]), rtol=1e-6)
            assert ((points[:, 0] > place - 0.31) & (points[:, 0] < place + 0.01)).all()
    named = {text.get_text() for text in ax.texts}
    assert (
        table[table["is_de"] & (table["logfoldchanges"] > 0)]
        .groupby("group", observed=True)
        .head(3)["names"]
        .isin(named)
        .all()
    )
    ax = av.pl.differential_expression(adata, kind="dot", show=False)
    assert len(ax.get_yticks()) == 40


def test_errors(mdata):
    with pytest.raises(ValueError, match="kind='bar' is not one of 'volcano', 'dot'"):
        av.pl.differential_expression(mdata, kind="bar")
    with pytest.raises(
        KeyError, match="'NK' is no group of uns\\['rank_genes_groups'\\] of 'rna'; it has B, NK/T, pDC"
    ):
        av.pl.differential_expression(mdata, "NK")
    with pytest.raises(ValueError, match="ax= must hold 2 Axes"):
        av.pl.differential_expression(mdata, "B", ax=plt.subplots()[1])
    for wrong in ({"modality": "atac"}, {"key": "other"}):
        with pytest.raises(KeyError, match=r"run av\.tl\.differential_expression\(data, groupby\) first"):
            av.pl.differential_expression(mdata, **wrong)


@pytest.mark.parametrize("kind", ["volcano", "dot"])
@pytest.mark.parametrize("groups", [["B"], ["B", SLASH, "pDC"]], ids=len)
def test_layout(mdata, kind, groups):
    """Nothing is cut off, however much there is to draw."""
    fig = av.pl.differential_expression(mdata, groups, kind=kind, return_fig=True)
    assert_whole(fig)
