"""metrics.criticism against loops over cells; models that are right and models that are broken."""

import json
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import assert_same, cite, contents, dense, quiet_mudata
from mudata import MuData
from scipy import sparse, stats
from sklearn import metrics as sk

import anvi as av
from anvi._data.cells import read_cells
from anvi._data.select import find_features
from anvi._posterior.expected import Sweep
from anvi._posterior.predictive import CountDraws, draw_counts
from anvi.metrics import _ppc
from anvi.metrics._ppc import (
    DEFINITIONS,
    Gathered,
    KeptDraws,
    QuantileHits,
    RankCounts,
    Sums,
    agreement,
    cell_cv,
    choose_cells,
    compare_groups,
    coverage,
    log_normalised,
    truth,
)
from anvi.metrics.criticism import METRICS, Check, judge, tables

ALL = [0, 1, 2]


def counts(shape: tuple[int, ...], seed: int, mean: float = 2.0) -> np.ndarray:
    """Overdispersed counts."""
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(1.0, mean, shape)).astype(np.float32)


def cv_of(values) -> float:
    """Population standard deviation over mean."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0 or values.mean() == 0:
        return float("nan")
    return float(np.sqrt(((values - values.mean()) ** 2).mean()) / values.mean())


# statistics -------------------------------------------------------------------------------------------------------


def test_running_sums_equal_loops_over_features():
    x, rng = counts((50, 6), 0), np.random.default_rng(1)
    x[:, 3] = 0  # a gene that nobody has
    measured, split = rng.random(x.shape) < 0.7, rng.integers(0, 3, 50)
    measured[:, 5] = False  # a protein that nobody measured
    sums = Sums(6)
    for rows in (slice(0, 20), slice(20, 50)):
        sums.add(x[rows] * measured[rows].astype(float), measured[rows], split[rows])
    for splits in (ALL, [0], [1, 2]):
        here = np.isin(split, splits)
        for g in range(6):
            seen = x[here & measured[:, g], g]
            np.testing.assert_allclose(sums.cv(splits)[g], cv_of(seen), rtol=1e-10)
            expected = np.nan if not len(seen) else (seen == 0).mean()
            np.testing.assert_allclose(sums.zero_fraction(splits)[g], expected, rtol=1e-12)
    expected = [cv_of(x[i][measured[i]]) for i in range(50)]
    np.testing.assert_allclose(cell_cv(x * measured.astype(float), measured), expected, rtol=1e-10)


def places_of(x: np.ndarray, draws: np.ndarray, measured: np.ndarray, split: np.ndarray) -> RankCounts:
    places = RankCounts(len(draws))
    below, equal = (draws < x).sum(0), (draws == x).sum(0)
    places.add(below, equal, measured, split)
    return places


def test_places_equal_a_loop_over_entries():
    x, draws = counts((12, 5), 0), counts((3, 12, 5), 1)
    rng = np.random.default_rng(2)
    measured, split = rng.random(x.shape) < 0.8, rng.integers(0, 3, 12)
    places = places_of(x, draws, measured, split)
    for splits in (ALL, [1]):
        weight, n = np.zeros(4), 0
        for i, g in np.argwhere(measured):
            equal = [int(draws[s, i, g] == x[i, g]) for s in range(3)]
            if split[i] not in splits or sum(equal) == 3:
                continue
            n += 1
            lowest = sum(draws[s, i, g] < x[i, g] for s in range(3))
            for place in range(lowest, lowest + sum(equal) + 1):
                weight[place] += 1 / (sum(equal) + 1)
        ranks, found = places.ranks(splits)
        assert found == n > 0
        np.testing.assert_allclose(ranks, weight / n, rtol=1e-12)


def test_coverage_equals_a_fine_grid():
    ranks = np.array([0.1, 0.2, 0.4, 0.25, 0.05])
    grid = (np.arange(100_000) + 0.5) / 100_000  # uniform within each of the five places
    density = ranks[(grid * 5).astype(int)] * 5
    for level in (0.3, 0.5, 0.8, 0.95):
        inside = (grid > (1 - level) / 2) & (grid < (1 + level) / 2)
        assert coverage(ranks, level) == pytest.approx(density[inside].sum() / 100_000, abs=1e-4)


@pytest.mark.parametrize("n_samples", [1, 5, 30])
def test_counts_from_the_same_distribution_take_every_place_alike(n_samples):
    """Also where most are zero, and at any number of draws."""
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(-1, 1.5, (1, 400)))
    x, draws = rng.poisson(rate, (200, 400)), rng.poisson(rate, (n_samples, 200, 400))
    everything = np.ones(x.shape, dtype=bool)
    ranks, n = places_of(x, draws, everything, np.zeros(200, dtype=int)).ranks(ALL)
    # n entries in S + 1 places: a share has a standard error of at most sqrt(1 / (S + 1) / n); 5 of them
    np.testing.assert_allclose(ranks, 1 / (n_samples + 1), atol=5 * np.sqrt(1 / (n_samples + 1) / n))
    narrow = rng.binomial(2 * np.ceil(rate).astype(int), rate / np.ceil(rate) / 2, draws.shape)
    ranks, _ = places_of(x, narrow, everything, np.zeros(200, dtype=int)).ranks(ALL)
    if n_samples > 1:
        assert ranks[0] > 1.05 * ranks[1:-1].mean() and ranks[-1] > 1.05 * ranks[1:-1].mean()
        assert coverage(ranks, 0.5) < 0.49


def test_quantile_hits_are_those_of_numpy():
    x, draws = counts((20, 7), 0), counts((6, 20, 7), 1)
    split = np.array([0, 1] * 10)
    hits = QuantileHits(6)
    for rows in (slice(0, 8), slice(8, 20)):
        hits.add(x[rows], draws[:, rows], split[rows])
    shares, n = hits.shares([1])
    assert n == 70
    for share, p in zip(shares, hits.TAILS, strict=True):
        low, high = np.quantile(draws, p, axis=0), np.quantile(draws, 1 - p, axis=0)
        # an interpolated edge that falls on a count may round to either side: none does here
        assert share == pytest.approx(((x >= low) & (x <= high))[split == 1].mean())


def test_agreement_is_that_of_scipy_and_scikit_learn():
    rng = np.random.default_rng(0)
    data = rng.gamma(2, 1, 60).round(1)
    model = data * rng.gamma(9, 1 / 9, 60)
    found = agreement(np.append(data, [np.nan, 1, 2]), np.append(model, [1, np.nan, np.inf]))
    assert found.n == 60
    assert found.mae == pytest.approx(sk.mean_absolute_error(data, model))
    assert found.pearson == pytest.approx(stats.pearsonr(data, model)[0])
    assert found.spearman == pytest.approx(stats.spearmanr(data, model)[0])
    assert found.r2 == pytest.approx(sk.r2_score(data, model)) != pytest.approx(sk.r2_score(model, data))
    assert found.ratio == pytest.approx(np.median([m / d for m, d in zip(model, data, strict=True) if d]))
    assert agreement(np.ones(5), np.arange(5.0)).pearson is not None
    assert np.isnan(agreement(np.ones(5), np.arange(5.0)).pearson)
    assert np.isnan(agreement(np.array([1.0]), np.array([1.0])).mae)


# groups -----------------------------------------------------------------------------------------------------------


def grouped(seed: int = 0, n: int = 120, g: int = 40) -> tuple[KeptDraws, pd.Categorical]:
    """Three groups with their own genes, and a draw in which the third group's are gone."""
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 3, n)
    rate = np.full((3, g), 1.5)
    for c in range(3):
        rate[c, 4 * c : 4 * c + 4] = 8
    rate[:, 35:] = 0.01  # genes that are hardly seen
    data = rng.poisson(rate[code])
    rate[2] = rate[:2].mean(0)
    draw = rng.poisson(rate[code])
    parts = [sparse.csr_matrix(part, dtype=np.float32) for part in (data, draw)]
    return KeptDraws(*parts, None), pd.Categorical.from_codes(code, ["a", "b/c", "d"])


def test_group_scores_equal_a_test_gene_by_gene():
    kept, groups = grouped()
    table = compare_groups(kept, groups, DEFINITIONS["anvi"]).set_index("group")
    assert list(table["cells"]) == sorted(table["cells"], reverse=True) and set(table.index) == {"a", "b/c", "d"}
    values = [np.log1p(m / m.sum(1, keepdims=True) * 1e4) for m in (dense(kept.data), dense(kept.draw))]
    np.testing.assert_allclose(dense(log_normalised(kept.data)), values[0], rtol=1e-5)
    for group in table.index:
        inside = np.asarray(groups == group)
        z, p, lfc, seen = np.zeros((2, 40)), np.zeros((2, 40)), np.zeros((2, 40)), np.ones(40, dtype=bool)
        for k, v in enumerate(values):
            for gene in range(40):
                result = stats.ranksums(v[inside, gene], v[~inside, gene])
                z[k, gene], p[k, gene] = result.statistic, result.pvalue
                mean_in, mean_out = np.expm1(v[inside, gene].mean()), np.expm1(v[~inside, gene].mean())
                seen[gene] &= mean_in > 0 and mean_out > 0
                lfc[k, gene] = np.log2((mean_in + 1e-9) / (mean_out + 1e-9))
        true = (stats.false_discovery_control(p[0]) < 0.05) & (z[0] > 0)
        assert 0 < true.sum() <= 20
        row = table.loc[group]
        assert row["roc_auc"] == pytest.approx(sk.roc_auc_score(true, z[1]), abs=1e-6)
        assert row["pr_auc"] == pytest.approx(sk.average_precision_score(true, z[1]), abs=1e-6)
        assert row["lfc_mae"] == pytest.approx(np.abs(lfc[0] - lfc[1])[seen].mean(), rel=1e-4)
        assert row["lfc_pearson"] == pytest.approx(stats.pearsonr(lfc[0][seen], lfc[1][seen])[0], rel=1e-4)
        assert row["lfc_spearman"] == pytest.approx(stats.spearmanr(lfc[0][seen], lfc[1][seen])[0], rel=1e-3)
        top = [set(np.argsort(-z[k], kind="stable")[:4]) for k in range(2)]
        assert row["gene_f1"] == pytest.approx(len(top[0] & top[1]) / 4, abs=0.26)  # equal scores may swap one
    assert table.loc["a", "roc_auc"] > 0.95 > 0.8 > table.loc["d", "roc_auc"]


def test_truth_is_one_sided_as_the_score_and_never_empty():
    rows = pd.DataFrame({"scores": [5.0, 2.0, 0.1, -4.0], "pvals_adj": [0.001, 0.03, 0.9, 0.0001]})
    assert truth(rows, 1, DEFINITIONS["anvi"]).tolist() == [True, True, False, False]
    assert truth(rows, 1, DEFINITIONS["scvi"]).tolist() == [
        False,
        False,
        False,
        True,
    ]  # three of four: the smallest p-value
    nothing = rows.assign(pvals_adj=1.0)
    assert truth(nothing, 1, DEFINITIONS["anvi"]).tolist() == [True, False, False, False]


def test_proteins_are_tested_in_the_cells_that_measured_them():
    kept, groups = grouped()
    measured = np.ones((120, 40), dtype=bool)
    measured[:50, :10] = False
    hidden = [sparse.csr_matrix(dense(part) * measured) for part in (kept.data, kept.draw)]
    found = compare_groups(KeptDraws(*hidden, measured), groups, DEFINITIONS["anvi"]).set_index("group")
    values = [np.log1p(dense(m) / dense(m).sum(1, keepdims=True) * 1e4) for m in hidden]
    inside = np.asarray(groups == "a")
    z, p = np.zeros((2, 40)), np.zeros(40)
    for gene in range(40):
        here = measured[:, gene]
        for k, v in enumerate(values):
            z[k, gene], pvalue = stats.ranksums(v[inside & here, gene], v[~inside & here, gene])
            p[gene] = pvalue if k == 0 else p[gene]
    true = (stats.false_discovery_control(p) < 0.05) & (z[0] > 0)
    assert found.loc["a", "roc_auc"] == pytest.approx(sk.roc_auc_score(true, z[1]), abs=1e-6)


def test_small_groups_have_no_numbers_and_cells_are_bounded():
    kept, groups = grouped()
    few = groups.add_categories("tiny").copy()
    few[:2] = "tiny"
    table = compare_groups(kept, few, DEFINITIONS["anvi"]).set_index("group")
    assert table.loc["tiny", "cells"] == 2 and np.isnan(table.loc["tiny", "roc_auc"])
    assert table.drop(index="tiny").notna().all(axis=None)
    eligible = np.arange(120) % 2 == 0
    chosen = choose_cells(groups, eligible, 10, 0)
    assert not chosen[~eligible].any()
    assert pd.Series(groups[chosen]).value_counts().tolist() == [10, 10, 10]
    assert choose_cells(groups, eligible, None, 0).sum() == 60


# the verb ---------------------------------------------------------------------------------------------------------


def draws_of(mdata, key: str, n_samples: int, seed: int = 0):
    """Cells, and the draws that the verb makes (samples, cells, features)."""
    model = av.get.model(mdata, key)
    cells = read_cells(mdata, model.setup)
    sweep = Sweep(n_samples=n_samples, at_mean=False, average=False, seed=seed)
    rna = np.zeros((n_samples, len(cells), len(model.setup.genes)), dtype=np.float32)
    prot = np.zeros((n_samples, len(cells), len(model.setup.proteins)), dtype=np.float32)
    for piece in draw_counts(model, cells, find_features(model.setup), sweep, torch.arange(len(cells))):
        rna[piece.step, piece.rows] = piece.rna
        if piece.prot is not None:
            prot[piece.step, piece.rows] = piece.prot
    return cells, rna, prot


def row(table: pd.DataFrame, modality: str, statistic: str) -> pd.Series:
    found = table[(table["modality"] == modality) & (table["statistic"] == statistic)]
    assert len(found) == 1
    return found.iloc[0]


def test_tables_equal_loops_over_the_draws(fitted):
    before = contents(fitted)
    result = av.metrics.criticism(fitted, model="totalanvi", n_samples=3, random_state=4, inplace=False)
    assert_same(contents(fitted), before)
    cells, rna, prot = draws_of(fitted, "totalanvi", 3, 4)
    split = fitted.obs["totalanvi_split"].reindex(cells.names).astype(str).to_numpy()
    x = dense(fitted["rna"].X)[fitted["rna"].obs_names.get_indexer(cells.names)]
    y, measured = cells.y.numpy(), cells.measured.numpy()
    assert 0 < measured.mean() < 1
    for mod, data, draws, mask in (("rna", x, rna, np.ones(x.shape, bool)), ("prot", y, prot, measured)):
        for column in ("all", "train", "validation"):
            here = np.ones(len(x), bool) if column == "all" else split == column
            data_cv = [cv_of(data[i][mask[i]]) for i in np.flatnonzero(here)]
            draw_cv = [
                np.nanmean([cv_of(draw[i][mask[i]]) for draw in draws]) if mask[i].any() else np.nan
                for i in np.flatnonzero(here)
            ]
            for name, value in agreement(np.array(data_cv), np.array(draw_cv))._asdict().items():
                assert row(result["cv_cell"], mod, name)[column] == pytest.approx(value, rel=1e-6), name
            for table, what in (("cv_gene", cv_of), ("zero_fraction", lambda values: (values == 0).mean())):
                pair = np.full((2, data.shape[1]), np.nan)
                for g in range(data.shape[1]):
                    seen = here & mask[:, g]
                    found = [what(draw[seen, g]) for draw in draws]
                    if seen.any():
                        pair[0, g] = what(data[seen, g])
                        pair[1, g] = np.nanmean(found) if np.isfinite(found).any() else np.nan
                for name, value in agreement(*pair)._asdict().items():
                    assert row(result[table], mod, name)[column] == pytest.approx(value, rel=1e-6), (table, name)
            places = places_of(data, draws, mask & here[:, None], np.zeros(len(x), dtype=int))
            ranks, n = places.ranks(ALL)
            shares = result["ranks"][result["ranks"]["modality"] == mod]
            np.testing.assert_allclose(shares[column], ranks, rtol=1e-9)
            assert row(result["calibration"], mod, "n")[column] == n
            error = np.abs(ranks - 1 / 4).sum() / 2
            assert row(result["calibration"], mod, "error")[column] == pytest.approx(error)
    first = result["de"][result["de"]["modality"] == "rna"]
    labels = fitted.obs["cell_type"].astype(str).reindex(cells.names).to_numpy()
    known = labels != "Unknown"
    kept = KeptDraws(*(sparse.csr_matrix(part[known]) for part in (x, rna[0])), None)
    pd.testing.assert_frame_equal(
        first.drop(columns="modality").astype({"group": str}).reset_index(drop=True),
        compare_groups(kept, pd.Categorical(labels[known]), DEFINITIONS["anvi"]),
    )


@pytest.mark.parametrize("ending", ["h5mu", "zarr"])
def test_slots_survive_a_file(fitted, tmp_path, ending):
    name = {"NK": "NK/T"}
    fitted.obs["cell_type"] = fitted.obs["cell_type"].cat.rename_categories(name)
    av.metrics.criticism(fitted, model="totalanvi", groupby="cell_type", n_samples=2)
    stored = fitted.uns["totalanvi"]["criticism"]
    assert "NK/T" in set(stored["de"]["group"])
    assert stored["params"] == {
        "metrics": ["cv", "zero_fraction", "calibration", "de"],
        "definition": "anvi",
        "groupby": "cell_type",
        "n_samples": 2,
        "max_cells": 1000,
        "random_state": 0,
    }
    small = AnnData(np.ones((2, 2), dtype=np.float32))
    with quiet_mudata():
        small = MuData({"rna": small})
        small.uns["totalanvi"] = {"criticism": stored}
        file = tmp_path / f"x.{ending}"
        (small.write if ending == "h5mu" else small.write_zarr)(file)
        back = (mudata.read_h5mu if ending == "h5mu" else mudata.read_zarr)(file).uns["totalanvi"]["criticism"]
    assert set(back) == set(stored) and len(stored) == 10
    for name, table in stored.items():
        if name == "params":
            continue
        assert list(back[name].columns) == list(table.columns)
        for column in table:
            if pd.api.types.is_numeric_dtype(table[column]):
                np.testing.assert_array_equal(back[name][column].to_numpy(), table[column].to_numpy())
            else:
                assert list(map(str, back[name][column])) == list(map(str, table[column]))


def test_rna_models_and_models_without_labels(fitted, caplog):
    with caplog.at_level("INFO", "anvi"):
        av.metrics.criticism(fitted, model="scvi", n_samples=2)
    assert "'de' is left out: the model has no labels" in caplog.text
    assert "rna cv_cell pearson (validation cells)" in caplog.text
    stored = fitted["rna"].uns["scvi"]["criticism"]
    assert "de" not in stored and set(stored["verdict"]["modality"]) == {"rna"}
    assert stored["params"]["metrics"] == ["cv", "zero_fraction", "calibration"]
    texts = ["modality", "metric", "statistic", "cells", "threshold", "source", "verdict"]  # whatever pandas calls text
    assert {str(stored["verdict"][name].dtype) for name in texts} == {"category"}
    av.metrics.criticism(fitted, model="scvi", n_samples=1, groupby="batch", metrics=["de"])
    stored = fitted["rna"].uns["scvi"]["criticism"]
    assert set(stored["de"]["group"]) == set(fitted.obs["batch"])
    assert set(stored) == {"de", "verdict", "params"}


def test_cells_of_another_object_are_neither_trained_nor_validated_on(fitted):
    query = cite(120, random_state=3)
    model = av.get.model(fitted, "totalanvi")
    av.metrics.criticism(query, model=model, n_samples=1, groupby="true_cell_type")
    table = query.uns["totalanvi"]["criticism"]["cv_cell"]
    assert row(table, "rna", "n")[["all", "train", "validation"]].tolist() == [120, 0, 0]
    assert set(query.uns["totalanvi"]["criticism"]["verdict"]["cells"]) == {"all", "grouped"}
    with pytest.raises(ValueError, match="has a fit of its own under 'totalanvi'"):
        other = cite(random_state=1)
        av.tl.totalanvi(other, batch_key="batch", max_epochs=1)
        av.metrics.criticism(other, model=model, n_samples=1)
    found = av.metrics.criticism(other, model=model, n_samples=1, inplace=False)
    assert row(found["cv_cell"], "rna", "n")["train"] == 0  # the split in the object is that of the other fit


def test_what_is_refused(fitted):
    with pytest.raises(ValueError, match="metrics=\\['cvs'\\] must be some of 'cv', 'zero_fraction'"):
        av.metrics.criticism(fitted, model="totalanvi", metrics=["cvs"])
    with pytest.raises(TypeError, match="metrics=\\['cv'\\]"):
        av.metrics.criticism(fitted, model="totalanvi", metrics="cv")
    with pytest.raises(ValueError, match="definition='scvi-tools'"):
        av.metrics.criticism(fitted, model="totalanvi", definition="scvi-tools")
    with pytest.raises(ValueError, match="n_samples=0"):
        av.metrics.criticism(fitted, model="totalanvi", n_samples=0)
    for max_cells in (0, -1, 2.5):
        with pytest.raises(ValueError, match="max_cells="):
            av.metrics.criticism(fitted, model="totalanvi", max_cells=max_cells)
    with pytest.raises(ValueError, match="no groups to compare"):
        av.metrics.criticism(fitted, model="scvi", metrics=["de"])
    with pytest.raises(KeyError, match="groupby='clusters'"):
        av.metrics.criticism(fitted, model="totalanvi", groupby="clusters")
    fitted.obs["one"] = "same"
    with pytest.raises(ValueError, match="groupby='one' has fewer than two groups"):
        av.metrics.criticism(fitted, model="totalanvi", groupby="one")
    with pytest.raises(ValueError, match="There are several fitted models"):
        av.metrics.criticism(fitted)


# scvi-tools -------------------------------------------------------------------------------------------------------


def test_the_numbers_of_scvi_tools():
    """Golden numbers of its criticism, from the same counts and draws (golden/criticism/make.py)."""
    folder = Path(__file__).parent / "golden" / "criticism"
    expected = json.loads((folder / "expected.json").read_text())
    with np.load(folder / "given.npz", allow_pickle=False) as file:
        x, draws, group, split = (file[name].astype(int) for name in ("x", "draws", "group", "split"))
    everyone, measured = np.ones(len(x), dtype=bool), np.ones(x.shape, dtype=bool)
    seen = Gathered(*x.shape, len(draws), everyone, "quantiles", masked=False)
    for rows in (slice(0, 64), slice(64, len(x))):
        seen.start(rows, x[rows].astype(np.float32), measured[rows], split[rows])
        for step, draw in enumerate(draws):
            seen.add(step, draw[rows].astype(np.float32))
    groups = pd.Categorical.from_codes(group, ["a", "b", "c"])
    check = Check("rna", tuple(f"gene{i}" for i in range(x.shape[1])), seen, everyone)
    names = np.arange(len(x)).astype(str)
    found = tables([check], names, split, groups, METRICS, DEFINITIONS["scvi"], 0)
    for table in ("cv_cell", "cv_gene"):
        for column, statistics in expected[table].items():
            for name, value in statistics.items():
                # it computes in single precision
                assert row(found[table], "rna", name)[column] == pytest.approx(value, rel=2e-5), (table, column, name)
    for column, name in (("zero_data", "data"), ("zero_model", "model")):
        np.testing.assert_allclose(found["features"][column], expected["zero_fraction"][name], atol=1e-7)
    assert row(found["calibration"], "rna", "error")["all"] == pytest.approx(expected["calibration"], rel=1e-5)
    assert found["de"]["group"].tolist() == [line["group"] for line in expected["de"]]
    for line, told in zip(found["de"].itertuples(index=False), expected["de"], strict=True):
        assert line.cells == told["n_cells"]
        for name in ("gene_f1", "lfc_mae", "lfc_pearson", "lfc_spearman", "roc_auc", "pr_auc"):
            assert getattr(line, name) == pytest.approx(told[name], rel=1e-4), name
    other = tables([check], names, split, groups, ("cv", "zero_fraction", "de"), DEFINITIONS["anvi"], 0)
    assert row(other["cv_gene"], "rna", "r2")["all"] != pytest.approx(expected["cv_gene"]["all"]["r2"], rel=1e-3)


# verdicts ---------------------------------------------------------------------------------------------------------


def test_verdicts():
    numbers = {
        ("cv_cell", "pearson"): (0.4, "validation"),
        ("cv_cell", "ratio"): (0.85, "validation"),
        ("cv_gene", "ratio"): (0.5, "all"),
        ("calibration", "error"): (0.05, "all"),
        ("zero_fraction", "mae"): (np.nan, "all"),
        ("de", "roc_auc"): (0.7, "grouped"),
    }
    lines = judge("rna", numbers)
    verdicts = {(line.metric, line.statistic): line.verdict for line in lines}
    assert verdicts == {
        ("cv_cell", "pearson"): "pass",
        ("cv_cell", "ratio"): "warn",
        ("cv_gene", "ratio"): "fail",
        ("zero_fraction", "mae"): "unknown",
        ("calibration", "error"): "pass",
        ("de", "roc_auc"): "fail",
    }
    assert str(lines[0]) == (
        "rna cv_cell pearson (validation cells) 0.4: pass (at least 0.4; rule of thumb on scvi-hub's model cards, "
        "where it is meant for the squared Pearson)"
    )


def verdicts_of(result: dict[str, pd.DataFrame]) -> dict[str, str]:
    """The worst verdict of each check, by modality and metric."""
    order, worst = ["unknown", "pass", "warn", "fail"], {}
    for line in result["verdict"].itertuples(index=False):
        name = f"{line.modality} {line.metric}"
        worst[name] = max(worst.get(name, "unknown"), line.verdict, key=order.index)
    return worst


@pytest.fixture
def true_draws(monkeypatch):
    """Replace the draws of a model by draws from the process that made the data, or from a broken one."""

    def use(mdata, *, genes=False, cells=False, theta=1.0):
        rng = np.random.default_rng(0)
        names = np.sort(mdata["rna"].obs_names.to_numpy().astype(object))
        rate = mdata["rna"].layers["true_rate"][mdata["rna"].obs_names.get_indexer(names)]
        prot = av.get.table(mdata, "true_protein_rate").loc[names].to_numpy()
        shape = [mdata["rna"].var["true_theta"].to_numpy() * theta, mdata["prot"].var["true_theta"].to_numpy() * theta]
        if genes:  # the decoder's output rows in another order
            rate, prot = (part[:, rng.permutation(part.shape[1])] for part in (rate, prot))
        if cells:  # decoded from the latent vectors of other cells
            order = rng.permutation(len(rate))
            rate, prot = rate[order] / rate[order].sum(1, keepdims=True) * rate.sum(1, keepdims=True), prot[order]

        def draw(part, dispersion):
            return torch.from_numpy(rng.poisson(part * rng.gamma(dispersion, 1 / dispersion, part.shape))).float()

        def pieces(model, cells, features, sweep, index):
            for start in range(0, len(names), 256):
                rows = slice(start, min(start + 256, len(names)))
                for step in range(sweep.n_samples):
                    yield CountDraws(step, rows, draw(rate[rows], shape[0]), draw(prot[rows], shape[1]))

        monkeypatch.setattr(_ppc, "draw_counts", pieces)

    return use


BROKEN = {
    # gene-wise numbers go to the wrong genes; the CV of a cell over genes does not know their order
    "genes": ({"genes": True}, {"cv_gene", "zero_fraction", "calibration", "de"}, set()),
    # every gene is right on average, and no cell is: only what looks at single cells or groups can tell
    "cells": ({"cells": True}, {"cv_cell", "de"}, {"cv_gene", "zero_fraction"}),
    # the noise is wrong, the means are right: groups still differ where they should
    "too noisy": ({"theta": 0.1}, {"cv_cell", "cv_gene", "zero_fraction", "calibration"}, {"de"}),
}


@pytest.fixture(scope="module")
def simulated():
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = av.datasets.synthetic_cite(1_000, n_genes=200)
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1)
    return mdata


def test_the_true_process_passes(simulated, true_draws):
    true_draws(simulated)
    found = verdicts_of(av.metrics.criticism(simulated, inplace=False))
    metrics = ("cv_cell", "cv_gene", "zero_fraction", "calibration", "de")
    assert found == {f"{mod} {metric}": "pass" for mod in ("rna", "prot") for metric in metrics}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_process_fails_the_right_checks(simulated, true_draws, kind):
    how, fails, passes = BROKEN[kind]
    true_draws(simulated, **how)
    found = verdicts_of(av.metrics.criticism(simulated, inplace=False))
    assert {metric for metric in fails if found[f"rna {metric}"] != "fail"} == set()
    assert {metric for metric in passes if found[f"rna {metric}"] != "pass"} == set()
    assert {metric for metric in passes if found[f"prot {metric}"] != "pass"} == set()


@pytest.mark.slow
def test_a_good_model_passes_and_broken_weights_fail():
    """The same with a fitted network whose weights are then broken."""
    mdata = av.datasets.synthetic_cite(2_000)
    av.tl.totalanvi(mdata, batch_key="batch", panel_key="panel", max_epochs=60)
    good = verdicts_of(av.metrics.criticism(mdata, inplace=False))
    assert set(good.values()) == {"pass"}
    shuffled = av.get.model(mdata)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head = shuffled.network.rna.scale
        for values, dim in ((head.weight, 0), (head.bias, 0), (head.covariates, 1)):
            values.copy_(values.index_select(dim, order))
    found = verdicts_of(av.metrics.criticism(mdata, model=shuffled, inplace=False))
    assert {m for m in ("cv_gene", "zero_fraction", "calibration", "de") if found[f"rna {m}"] == "fail"} == {
        "cv_gene",
        "zero_fraction",
        "calibration",
        "de",
    }
    noisy = av.get.model(mdata)
    with torch.no_grad():
        noisy.network.rna.log_theta -= np.log(10)  # as docs/metrics.md has it
        noisy.network.protein.log_phi -= np.log(10)
    found = verdicts_of(av.metrics.criticism(mdata, model=noisy, inplace=False))
    for mod in ("rna", "prot"):
        assert {
            m for m in ("cv_cell", "cv_gene", "zero_fraction", "calibration") if found[f"{mod} {m}"] != "fail"
        } == set()
        assert found[f"{mod} de"] == "pass"
