"""Fold changes of pairs, against loops over pairs and genes."""

import math
import statistics

import numpy as np
import pytest
import torch
from helpers import cite

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._posterior import differential
from anvi._posterior.differential import Comparison, Options, compare, evidence, strata
from anvi._posterior.encode import in_batch
from anvi.nn import Draws
from anvi.nn.protein import ProteinRates

N = 40  # pairs


@pytest.fixture(scope="module")
def asked():
    """A small joint model of three batches, the last without proteins; its cells and their types."""
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = cite()
        av.tl.totalvi(mdata, batch_key="batch", n_latent=3, n_hidden=8, max_epochs=2)
    model = av.get.model(mdata)
    cells = read_cells(mdata, model.setup)
    types = mdata.obs["true_cell_type"].astype(str).reindex(cells.names).to_numpy()
    return model, cells, types


def two(types) -> tuple[list[np.ndarray], list[Comparison]]:
    """NK against B: the reference of every pair is the second population."""
    return strata([types == "NK"], [types == "B"])


def naive(model, cells, draws, kind: str, *, batch_correction: bool) -> np.ndarray:
    """Expression of every draw `(populations, draws, features)`, decoded one by one; NaN where nothing is known."""
    measured = np.array(model.setup.measured)  # (batches, proteins)
    noise = draws.background_noise(slice(0, draws.n_draws), model.config.n_proteins).numpy()
    out = []
    for population in range(len(draws.index)):
        rows = []
        for i in range(draws.n_draws):
            batch = take(cells, draws.index[population, i : i + 1])
            z = draws.z[population, i : i + 1]
            if kind == "genes":
                batch = in_batch(model, batch, i % 3) if batch_correction else batch
                rows.append(model.network.decode(z, batch, Draws())[0].log_scale[0].double().exp().numpy())
                continue
            row, decoded = [], {}
            for protein in range(model.config.n_proteins):
                batches = np.flatnonzero(measured[:, protein])
                code = int(batches[i % len(batches)]) if batch_correction else int(batch.batch)
                if code not in decoded:
                    rates = model.network.decode(z, in_batch(model, batch, code), Draws())[1]
                    decoded[code] = {name: getattr(rates, name)[0].tolist() for name in ProteinRates._fields[:5]}
                rates = {name: values[protein] for name, values in decoded[code].items()}
                beta = math.exp(rates["back_mean"] + rates["back_scale"] * noise[population, i, protein])
                factor = math.exp(rates["log_fore"] - rates["log_back"])
                background = 1 / (1 + math.exp(-rates["mixing"]))
                known = measured[code, protein]
                row.append(beta * factor * (1 - background) + 0.1 if known else math.nan)
            rows.append(np.array(row))
        out.append(rows)
    return np.array(out)


def loops(one, other, mode: str, delta: float, c: float) -> dict[str, np.ndarray]:
    """The summary, feature by feature and pair by pair."""
    out = {"group_mean": [], "reference_mean": [], "lfc_mean": [], "lfc_std": [], "up": [], "down": []}
    for feature in range(one.shape[1]):
        lfcs, up, down, known = [], 0, 0, []
        for a, b in zip(one[:, feature], other[:, feature], strict=True):
            if math.isnan(a) or math.isnan(b):
                continue
            lfc = math.log2(a + c) - math.log2(b + c)
            lfcs.append(lfc)
            known.append((a, b))
            up += lfc >= delta if mode == "change" else a > b
            down += lfc < -delta if mode == "change" else a < b
        out["group_mean"].append(statistics.fmean(a for a, _ in known))
        out["reference_mean"].append(statistics.fmean(b for _, b in known))
        out["lfc_mean"].append(statistics.fmean(lfcs))
        out["lfc_std"].append(statistics.pstdev(lfcs))
        out["up"].append(up / len(lfcs))
        out["down"].append(down / len(lfcs))
    return {name: np.array(values) for name, values in out.items()}


@pytest.mark.parametrize("kind", ["genes", "proteins"])
@pytest.mark.parametrize("mode", ["change", "vanilla"])
@pytest.mark.parametrize("batch_correction", [True, False])
@torch.no_grad()
def test_equal_to_a_loop_over_pairs(asked, kind, mode, batch_correction):
    model, cells, types = asked
    populations, comparisons = two(types)
    draws = differential.draw_posterior(model, cells, populations, N, 0)
    expression = naive(model, cells, draws, kind, batch_correction=batch_correction)
    c = 1e-3 if kind == "genes" else 0.0
    values = getattr(differential, kind)(model, cells, draws, batch_correction=batch_correction)
    # a threshold near which no pair lies: float32 and float64 then count the same pairs
    lfc = np.log2(expression[0] + c) - np.log2(expression[1] + c)
    delta = next(d for d in np.linspace(0.2, 0.3, 101) if np.nanmin(np.abs(np.abs(lfc) - d)) > 1e-5)
    found = compare(values, expression.shape[2], draws, comparisons, Options(mode, delta, c, 0))
    wanted = loops(*expression, mode, delta, c)
    for name, value in wanted.items():
        # float32 sums of a few tens of numbers of order one
        np.testing.assert_allclose(getattr(found, name)[0], value, rtol=1e-4, atol=2e-5, err_msg=name)
    assert found.delta == (delta if mode == "change" else None)


@torch.no_grad()
def test_blocks_change_nothing(asked, monkeypatch):
    model, cells, types = asked
    populations, comparisons = strata(*one_against_rest(types))
    results = []
    for budget in (2**22, 1):  # all pairs at once; eight at a time
        monkeypatch.setattr(differential, "BUDGET", budget)
        draws = differential.draw_posterior(model, cells, populations, N, 0)
        results.append(
            [
                compare(
                    getattr(differential, kind)(model, cells, draws, batch_correction=True),
                    n,
                    draws,
                    comparisons,
                    Options("change", 0.25, c, 0),
                )
                for kind, n, c in (("genes", 60, 1e-5), ("proteins", 20, 0.0))
            ]
        )
    for whole, parts in zip(*results, strict=True):
        for name in ("lfc_mean", "lfc_std", "up", "down"):
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_held_at_a_time_does_not_grow_with_pairs_or_cells(asked, monkeypatch):
    """Blocks of pairs are asked for one after the other, each once, and none is larger than the budget."""
    model, cells, types = asked
    populations, comparisons = strata(*one_against_rest(types))
    monkeypatch.setattr(differential, "BUDGET", 50_000)
    largest = []
    for n_pairs in (100, 1000):
        draws = differential.draw_posterior(model, cells, populations, n_pairs, 0)
        values, seen = differential.genes(model, cells, draws, batch_correction=True), []

        def counted(rows, values=values, seen=seen):
            seen.append(rows)
            return values(rows)

        compare(counted, 60, draws, comparisons, Options("change", 0.25, 1e-5, 0))
        assert [i for rows in seen for i in range(rows.start, rows.stop)] == list(range(n_pairs))
        largest.append(max(rows.stop - rows.start for rows in seen))
    # 256 numbers: what the hidden layers hold for a draw
    assert largest[0] == largest[1] <= 50_000 / (len(populations) * 256)


def one_against_rest(types) -> tuple[list[np.ndarray], list[np.ndarray]]:
    inside = [types == name for name in np.unique(types)]
    return inside, [~mask for mask in inside]


# populations --------------------------------------------------------------------------------------------------------


def covers(populations, comparisons, inside, outside) -> None:
    """Every group is its population, and every reference the cells of its mixture in proportion to their number."""
    for comparison, mask, other in zip(comparisons, inside, outside, strict=True):
        np.testing.assert_array_equal(populations[comparison.group], np.flatnonzero(mask))
        parts = [populations[p] for p in comparison.reference]
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.flatnonzero(other))
        np.testing.assert_allclose(comparison.share, [len(part) / other.sum() for part in parts])


def test_populations_of_groups_that_do_not_overlap_are_shared():
    types = np.random.default_rng(0).choice(list("abcd"), 50)
    inside, outside = one_against_rest(types)
    populations, comparisons = strata(inside, outside)
    assert len(populations) == 4  # no rest is drawn
    covers(populations, comparisons, inside, outside)
    populations, comparisons = strata(inside[:2], outside[:2])
    assert len(populations) == 3  # all others together
    covers(populations, comparisons, inside[:2], outside[:2])
    nobody = types == "d"
    without = [mask & ~nobody for mask in outside[:2]]
    populations, comparisons = strata(inside[:2], without)
    covers(populations, comparisons, inside[:2], without)
    pairwise = [types == "c"] * 2
    populations, comparisons = strata(inside[:2], pairwise)
    covers(populations, comparisons, inside[:2], pairwise)
    assert not any(np.isin(np.flatnonzero(nobody), part).any() for part in populations)


def test_populations_of_groups_that_overlap_are_apart():
    rng = np.random.default_rng(0)
    inside = [rng.random(50) < 0.5 for _ in range(3)]
    outside = [~mask for mask in inside]
    populations, comparisons = strata(inside, outside)
    assert len(populations) == 6
    covers(populations, comparisons, inside, outside)
    # groups apart, but references that cut through groups
    types = rng.choice(list("abc"), 50)
    inside, outside = [types == "a", types == "b"], [rng.random(50) < 0.5] * 2
    outside = [mask & ~group for mask, group in zip(outside, inside, strict=True)]
    covers(*strata(inside, outside), inside, outside)


@torch.no_grad()
def test_a_shared_rest_is_as_good_as_one_drawn_for_itself(asked):
    model, cells, types = asked
    inside, outside = one_against_rest(types)
    n, how = 3000, Options("change", 0.25, 1e-4, 0)
    alone = [np.flatnonzero(mask) for pair in zip(inside, outside, strict=True) for mask in pair]
    apart = [Comparison(2 * i, (2 * i + 1,), (1.0,)) for i in range(len(inside))]
    results = []
    for seed, (populations, comparisons) in enumerate([strata(inside, outside), (alone, apart)]):
        draws = differential.draw_posterior(model, cells, populations, n, seed)
        values = differential.genes(model, cells, draws, batch_correction=True)
        results.append(compare(values, 60, draws, comparisons, how))
    shared, own = results
    # 360 differences of two means over 3,000 pairs each: within 4.5 standard errors
    error = np.sqrt((shared.lfc_std**2 + own.lfc_std**2) / n)
    assert (np.abs(shared.lfc_mean - own.lfc_mean) < 4.5 * error + 1e-6).all()
    p = (shared.up + own.up) / 2
    assert (np.abs(shared.up - own.up) < 4.5 * np.sqrt(2 * p * (1 - p) / n) + 3 / n).all()


def test_reference_of_a_pair_is_drawn_by_share(asked):
    model, cells, types = asked
    populations, _ = strata(*one_against_rest(types))
    draws = differential.draw_posterior(model, cells, populations, 4000, 0)
    partner = differential._partners(draws, [Comparison(0, (1, 4), (0.2, 0.8))], 0)[0].numpy()
    assert set(partner) == {1, 4}
    # binomial: sd 0.006
    assert abs((partner == 4).mean() - 0.8) < 0.025


# thresholds and pseudocounts ----------------------------------------------------------------------------------------


def test_threshold_is_that_of_a_mixture_and_at_least_a_tenth():
    rng = np.random.default_rng(0)
    # three well separated clusters: 0.6 x mean(|-3|, |5|) = 2.4
    means = np.concatenate([rng.normal(mean, 0.01, 200) for mean in (-3, 0, 5)])
    assert differential.estimate_delta(means, 0) == pytest.approx(2.4, abs=0.01)
    assert differential.estimate_delta(rng.normal(0, 0.01, 500), 0) == 0.1
    assert differential.estimate_delta(np.zeros(5), 0) == 0.1
    assert differential.estimate_delta(means, 7) == differential.estimate_delta(means, 7)


@torch.no_grad()
def test_threshold_is_estimated_once_and_the_one_that_is_used(asked, monkeypatch):
    model, cells, types = asked
    populations, comparisons = strata(*one_against_rest(types))
    draws = differential.draw_posterior(model, cells, populations, N, 0)
    calls, real = [], differential.estimate_delta
    monkeypatch.setattr(differential, "estimate_delta", lambda *args: calls.append(real(*args)) or calls[-1])
    values = differential.genes(model, cells, draws, batch_correction=True)
    found = compare(values, 60, draws, comparisons, Options("change", None, 1e-5, 0))
    assert calls == [found.delta]
    again = compare(values, 60, draws, comparisons, Options("change", found.delta, 1e-5, 0))
    np.testing.assert_array_equal(found.up, again.up)


@torch.no_grad()
def test_pseudocounts_of_the_incumbent(asked, monkeypatch):
    monkeypatch.setattr(differential, "RARE", 0.3)
    model, cells, types = asked
    populations, comparisons = two(types)
    counts = differential.Counts(cells, populations)
    with counts.taken():
        draws = differential.draw_posterior(model, cells, populations, N, 0)
    rare = counts.of(comparisons, proteins=False).rare
    x = cells.x.dense(cells.x_row)[0].numpy()
    wanted, largest = [], []
    for side, population in enumerate(populations):
        hardly_seen = [x[population, gene].mean() < 0.3 for gene in range(60)]
        np.testing.assert_array_equal(rare[side, 0], hardly_seen)
        assert 3 < sum(hardly_seen) < 57
        share = naive(model, cells, draws, "genes", batch_correction=True)[side]
        largest.append([share[:, gene].max() for gene in range(60) if hardly_seen[gene]])
        wanted.append(np.quantile(largest[-1], 0.9) / 60)
    values = differential.genes(model, cells, draws, batch_correction=True)
    found = compare(values, 60, draws, comparisons, Options("change", 0.25, math.nan, 0), rare=rare)
    np.testing.assert_allclose(found.pseudocount, [max(wanted)], rtol=1e-4)
    again = compare(values, 60, draws, comparisons, Options("change", 0.25, max(wanted), 0))
    np.testing.assert_allclose(found.lfc_mean, again.lfc_mean, rtol=1e-4, atol=1e-6)
    none = compare(values, 60, draws, comparisons, Options("change", 0.25, math.nan, 0), rare=np.zeros_like(rare))
    np.testing.assert_allclose(none.pseudocount, 1e-10)


# evidence -----------------------------------------------------------------------------------------------------------


def test_evidence_is_what_the_definitions_say():
    rng = np.random.default_rng(0)
    up = rng.integers(0, 101, (2, 30)) / 100
    down = np.minimum(rng.integers(0, 101, (2, 30)) / 100, 1 - up)
    up[0, 0], down[0, 0] = 1.0, 0.0
    none = np.zeros((2, 30))
    for delta in (0.25, None):
        found = evidence(differential.Change(none, none, none, none, up, down, delta, np.zeros(2)), 100)
        for row in range(2):
            errors = [max(1 - max(u, d), 0.005) for u, d in zip(up[row], down[row], strict=True)]
            for feature in range(30):
                p = max(up[row, feature], down[row, feature])
                odds = p if delta is not None else up[row, feature]
                assert found.proba_de[row, feature] == p
                assert found.error[row, feature] == pytest.approx(errors[feature])
                assert found.bayes_factor[row, feature] == pytest.approx(
                    math.log(odds + 1e-8) - math.log(1 - odds + 1e-8)
                )
            # calling everything up to the k-th surest feature: the mean of its errors
            order = sorted(range(30), key=lambda feature: (errors[feature], feature))
            for k, feature in enumerate(order):
                mean = statistics.fmean(errors[other] for other in order[: k + 1])
                assert found.expected_fdr[row, feature] == pytest.approx(mean)
    assert found.error.min() == 0.005 and np.isfinite(found.bayes_factor).all()


def test_a_feature_of_which_no_pair_is_known_has_not_changed(asked):
    model, cells, types = asked
    populations, comparisons = two(types)
    draws = differential.draw_posterior(model, cells, populations, N, 0)

    def values(rows):
        out = torch.rand(2, rows.stop - rows.start, 3)
        out[0, :, 1] = torch.nan
        out[1, ::2, 2] = torch.nan
        return out

    for mode in ("change", "vanilla"):
        found = compare(values, 3, draws, comparisons, Options(mode, 0.0, 0.1, 0))
        assert np.isfinite(found.lfc_mean).all() and np.isfinite(found.lfc_std).all()
        assert found.lfc_mean[0, 1] == found.up[0, 1] == found.down[0, 1] == 0
        assert np.isnan(found.group_mean[0]).tolist() == [False, True, False]
        assert np.isnan(found.reference_mean[0]).tolist() == [False, True, False]
        assert found.up[0, 2] + found.down[0, 2] == 1  # of the pairs that are known
