"""Prediction sets hold the true class as often as they say, beside a loop over ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import anvi as av
from anvi._posterior import confidence
from anvi._posterior.confidence import PER_CLASS, merged_classes, own_probability, thresholds


def test_own_probabilities_by_a_loop():
    rng = np.random.default_rng(0)
    proba, target = rng.dirichlet(np.ones(3), size=120), rng.integers(0, 2, 120)
    own = own_probability(torch.from_numpy(proba), torch.from_numpy(target), seed=0)
    assert own.shape == (3, PER_CLASS)
    for code in range(3):
        expected = sorted(proba[i, code] for i in range(120) if target[i] == code)
        np.testing.assert_allclose(own[code, : len(expected)], expected, rtol=1e-6)
        assert own[code, len(expected) :].isnan().all()


def test_of_many_cells_a_random_part_is_kept():
    target = torch.zeros(3 * PER_CLASS, dtype=torch.long)
    proba = torch.linspace(0, 1, len(target))[:, None]
    own = own_probability(proba, target, seed=0)
    # the mean of 200 of 600 uniform numbers has a standard error of .017
    assert own.isfinite().all() and float(own.mean()) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("n", [5, 19, 60])
@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_a_new_cell_is_covered_as_often_as_stated(n, coverage):
    rng = np.random.default_rng(1)
    repeats, covered = 4_000, 0
    for _ in range(repeats):
        values = np.sort(rng.random(n + 1).astype(np.float32))
        new = rng.integers(n + 1)
        own = torch.full((1, PER_CLASS), torch.nan)
        own[0, :n] = torch.from_numpy(np.delete(values, new))
        covered += values[new] >= float(thresholds(own, coverage, merged_classes(np.array([n]), coverage))[0])
    share, error = covered / repeats, 3 * np.sqrt(0.25 / repeats)
    assert coverage - error <= share <= coverage + 1 / (n + 1) + error


@pytest.mark.parametrize(
    ("held_out", "coverage", "merged"),
    [
        ([9, 9, 50], 0.9, []),  # of 9 and a new one each is the lowest once in ten times
        ([8, 40, 50], 0.9, [0, 1]),  # too few alone: with the next smallest
        ([0, 5, 4, 50, 60], 0.9, [0, 1, 2]),  # enough together
        ([3, 3, 3, 3], 0.9, [0, 1, 2, 3]),
        ([19, 18, 200], 0.95, [0, 1]),
        ([3, 3], 0.9, [0, 1]),  # never enough
        ([1, 1], 0.5, []),
    ],
)
def test_which_classes_share_a_threshold(held_out, coverage, merged):
    assert np.flatnonzero(merged_classes(np.array(held_out), coverage)).tolist() == merged


def test_rare_classes_are_covered_together_as_often_as_stated():
    rng, coverage, repeats = np.random.default_rng(2), 0.9, 3_000
    sizes, middle = (5, 3, 4), (0.5, 0.7, 0.9)  # of what cells of the classes give their own
    covered = n = 0
    for _ in range(repeats):
        # a cell of any of the classes is new, as likely as any other
        code = np.repeat(np.arange(3), sizes)
        values = np.clip(rng.normal(np.array(middle)[code], 0.1), 0, 1).astype(np.float32)
        new = rng.integers(len(code))
        own = torch.full((4, PER_CLASS), torch.nan)
        own[3, :60] = torch.from_numpy(rng.random(60).astype(np.float32)).sort().values
        for c in range(3):
            kept = values[(code == c) & (np.arange(len(code)) != new)]
            own[c, : len(kept)] = torch.from_numpy(np.sort(kept))
        merged = merged_classes(own.isfinite().sum(1).numpy(), coverage)
        assert merged.tolist() == [True, True, True, False]
        limit = thresholds(own, coverage, merged)
        together = np.sort(np.delete(values, new))[0]  # of eleven and a new one, one in ten
        lowest = [min(together, float(own[c].nan_to_num(2).min())) for c in range(3)]
        np.testing.assert_array_equal(limit[:3].numpy(), np.array(lowest, np.float32))
        covered, n = covered + (values[new] >= float(limit[code[new]])), n + 1
    assert covered / n >= coverage - 3 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_a_class_with_few_held_out_cells_alone_is_covered_as_its_number_allows(n):
    rng, repeats = np.random.default_rng(3), 4_000
    covered = 0
    for _ in range(repeats):
        values, new = rng.random(n + 1).astype(np.float32), rng.integers(n + 1)
        own = torch.full((2, PER_CLASS), torch.nan)
        own[0, :n], own[1, :50] = torch.from_numpy(np.delete(values, new)), 0.999  # the others are all sure
        covered += values[new] >= float(thresholds(own, 0.95, np.array([True, True]))[0])
    assert covered / repeats >= n / (n + 1) - 3 * np.sqrt(0.25 / repeats)


def test_with_too_few_cells_in_all_nothing_is_left_out():
    own = torch.full((2, PER_CLASS), torch.nan)
    own[:, :3] = 0.9
    assert thresholds(own, 0.95, merged_classes(np.array([3, 3]), 0.95)).tolist() == [0, 0]


def test_rare_classes_are_in_few_sets_and_a_set_can_be_empty(labelled, caplog):
    """`labelled` has a class with few held-out cells, which is in all sets if it may never be left out."""
    model = av.get.model(labelled)
    held_out = model.landmarks.own[0].isfinite().sum(1).numpy()
    rare = [name for name, n in zip(model.classes, held_out, strict=True) if n < 19]
    assert rare
    with caplog.at_level("INFO", "anvi"):
        av.tl.predict(labelled, coverage=0.95)
    told = [line for line in caplog.messages if "too few cells were held out" in line]
    assert len(told) == 1 and all(name in told[0] for name in rare)
    promise = labelled.uns["totalanvi"]["sets"]["promise"]
    np.testing.assert_array_equal(promise["held_out"], held_out)
    for name, row in promise.iterrows():
        n = row["held_out"]
        assert row["coverage"] == pytest.approx(0.95 if n >= 19 else n / (n + 1))
        assert set(rare) <= set(row["together"].split(" + ")) if name in rare else name in row["together"]
    sets = av.get.table(labelled, "totalanvi_sets")
    assert (sets[rare].mean() < 0.3).all()
    # cells of no class: counts that are shuffled among genes
    strange = labelled.copy()
    rng = np.random.default_rng(0)
    x = np.asarray(strange["rna"].X.todense() if hasattr(strange["rna"].X, "todense") else strange["rna"].X)
    strange["rna"].X = x[:, rng.permutation(x.shape[1])]
    strange.mod["prot"].X = strange["prot"].X[:, rng.permutation(strange["prot"].n_vars)]
    av.tl.predict(strange, model=model, coverage=0.6)
    assert (np.asarray(strange.obsm["totalanvi_sets"]).sum(axis=1) == 0).any()


def test_sets_cover_the_truth_and_grow_with_the_coverage(labelled):
    validation = (labelled.obs["totalanvi_split"] == "validation").to_numpy()
    truth = labelled.obs["true_cell_type"].astype(str)
    sizes = []
    for coverage in (0.6, 0.8, 0.95):
        av.tl.predict(labelled, coverage=coverage)
        sets = av.get.table(labelled, "totalanvi_sets")
        assert set(np.unique(sets)) <= {0, 1}
        sizes.append(float(sets.to_numpy().sum(1).mean()))
        for name in sets:
            of_class = validation & (truth == name).to_numpy()
            n = int(of_class.sum())
            least = float(labelled.uns["totalanvi"]["sets"]["promise"].loc[name, "coverage"])
            # cells as they are, which is easier than thinned ones; two standard errors of n cells and n held-out ones
            assert sets.loc[of_class, name].mean() >= least - 2 * np.sqrt(2 * least * (1 - least) / n)
    assert sizes[0] < sizes[1] < sizes[2] < len(sets.columns)
    returned = av.tl.predict(labelled, coverage=0.95, inplace=False)
    np.testing.assert_array_equal(returned, labelled.obsm["totalanvi_sets"])


def test_another_prediction_takes_the_sets_away(labelled):
    av.tl.predict(labelled, coverage=0.9)
    assert labelled.uns["totalanvi"]["sets"]["coverage"] == 0.9
    av.tl.predict(labelled)
    assert "totalanvi_sets" not in labelled.obsm and "sets" not in labelled.uns["totalanvi"]


def test_a_refit_takes_the_sets_away_and_no_fit_the_users_own():
    mdata = av.datasets.synthetic_cite(900, n_genes=60)
    mine = np.ones((900, 2), dtype=np.float32)
    mdata["rna"].obsm["scanvi_sets"] = mine
    with pytest.raises(ValueError, match=r"obsm\['scanvi_sets'\] would be overwritten.*rename it"):
        av.tl.scanvi(mdata, max_epochs=1, train_size=0.7)
    np.testing.assert_array_equal(mdata["rna"].obsm["scanvi_sets"], mine)
    mdata["rna"].obsm["mine"] = mdata["rna"].obsm.pop("scanvi_sets")
    av.tl.scanvi(mdata, max_epochs=1, train_size=0.7)
    av.tl.predict(mdata, coverage=0.9)
    assert av.get.table(mdata["rna"], "scanvi_sets").shape[1] > 2
    av.tl.scanvi(mdata, max_epochs=1, train_size=0.7)
    assert "scanvi_sets" not in mdata["rna"].obsm


def test_a_model_stored_without_sets_still_loads(labelled):
    model = av.get.model(labelled)
    weights = {name: value for name, value in model.weights().items() if name != "landmarks.own"}
    back = av.Model.from_parts(model.facts(), weights, model.history)
    assert back.landmarks.own is None and "landmarks.own" not in back.weights()
    with pytest.raises(ValueError, match="keeps no labelled validation cells"):
        av.tl.predict(labelled, model=back, coverage=0.9)


def test_sets_survive_a_file_and_come_from_a_model_alone(labelled, tmp_path):
    import mudata

    av.tl.predict(labelled, coverage=0.9)
    labelled.write(tmp_path / "x.h5mu")
    back = mudata.read(tmp_path / "x.h5mu")
    before = av.get.table(labelled, "totalanvi_sets").to_numpy()
    np.testing.assert_array_equal(back.obsm["totalanvi_sets"], before)
    av.write_model(labelled, tmp_path / "model")
    again = av.tl.predict(back, model=av.read_model(tmp_path / "model"), coverage=0.9, inplace=False)
    np.testing.assert_array_equal(again, before)


@pytest.mark.parametrize("coverage", [0, 0.999, 1, 1.5, -0.1])
def test_bad_coverage(labelled, coverage):
    with pytest.raises(ValueError, match="share of cells"):
        av.tl.predict(labelled, coverage=coverage)


def test_a_model_without_held_out_labels_says_so():
    mdata = av.datasets.synthetic_cite(200, n_genes=60)
    av.tl.totalanvi(mdata, max_epochs=1)
    with pytest.raises(ValueError, match="keeps no labelled validation cells"):
        av.tl.predict(mdata, coverage=0.9)


def test_slashes_in_class_names_are_told_for_the_sets_too():
    mdata = av.datasets.synthetic_cite(900, n_genes=60)
    mdata.obs["cell_type"] = mdata.obs["cell_type"].astype(str).replace({"NK": "NK/T"})
    with pytest.warns(UserWarning, match=r"columns of obsm\['scanvi_proba'\], since"):
        av.tl.scanvi(mdata, max_epochs=1, train_size=0.7)
    with pytest.warns(UserWarning, match=r"columns of obsm\['scanvi_sets'\], since"):
        av.tl.predict(mdata, coverage=0.9, soft=False)
    assert "NK/T" in av.get.table(mdata["rna"], "scanvi_sets") and "NK|T" in mdata["rna"].obsm["scanvi_sets"]
    assert "scanvi_proba" not in mdata["rna"].obsm
    assert "NK/T" in av.tl.predict(mdata, coverage=0.9, inplace=False)


def test_a_class_that_one_kind_of_cell_was_not_held_out_of_is_left_out_of_no_set(monkeypatch):
    """Cells without RNA: what is promised of a class is promised of them, too."""
    own = torch.linspace(0.2, 1, 40).expand(2, 3, 40).clone()  # (kinds, classes, held-out cells)
    own[1, 2] = torch.nan
    model = SimpleNamespace(landmarks=SimpleNamespace(own=own), classes=("a", "b", "c"))
    monkeypatch.setattr(confidence.encode, "kind_of", lambda model, cells: np.array([0, 1]))
    sets = confidence.prediction_sets(model, None, np.array([[0.0, 0.1, 0.9]] * 2), 0.9)
    assert sets.inside.tolist() == [[False, False, True]] * 2
    assert sets.promise["held_out"].tolist() == [40, 40, 0] and sets.promise["coverage"]["c"] == 0


def test_sets_of_the_users_own_are_kept(labelled):
    mdata = labelled.copy()
    mdata.obsm["totalanvi_sets"] = mine = np.full((mdata.n_obs, 2), 3.0)
    with pytest.raises(ValueError, match=r"obsm\['totalanvi_sets'\] would be overwritten.*key_added="):
        av.tl.predict(mdata, coverage=0.9)
    av.tl.predict(mdata)
    np.testing.assert_array_equal(mdata.obsm["totalanvi_sets"], mine)
    av.tl.predict(mdata, coverage=0.9, key_added="other")
    av.tl.predict(mdata, coverage=0.6, key_added="other")  # its own are replaced
    assert mdata.uns["other"]["sets"]["coverage"] == 0.6
