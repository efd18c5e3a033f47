"""Prediction sets hold the true class as often as they say, beside a loop over ranks."""

import numpy as np
import pytest
import torch

import anvi as av
from anvi._posterior.confidence import PER_CLASS, own_probability, thresholds


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
        covered += values[new] >= float(thresholds(own, coverage)[0])
    share, error = covered / repeats, 3 * np.sqrt(0.25 / repeats)
    assert coverage - error <= share <= coverage + 1 / (n + 1) + error


def test_a_class_without_held_out_cells_is_never_left_out():
    own = torch.full((2, PER_CLASS), torch.nan)
    own[0, :150] = torch.linspace(0.5, 1, 150)
    low, none = thresholds(own, 0.9).tolist()
    assert low == pytest.approx(float(own[0, 14])) and none == 0


def test_sets_cover_the_truth_and_grow_with_the_coverage(labelled):
    validation = (labelled.obs["totalanvi_split"] == "validation").to_numpy()
    truth = labelled.obs["true_cell_type"].astype(str)
    sizes = []
    for coverage in (0.6, 0.8, 0.95):
        av.tl.predict(labelled, coverage=coverage)
        sets = labelled.obsm["totalanvi_sets"]
        assert set(np.unique(sets)) <= {0, 1}
        sizes.append(float(sets.to_numpy().sum(1).mean()))
        for name in sets:
            of_class = validation & (truth == name).to_numpy()
            n = int(of_class.sum())
            # cells as they are, which is easier than thinned ones; two standard errors of n cells and n held-out ones
            assert sets.loc[of_class, name].mean() >= coverage - 2 * np.sqrt(2 * coverage * (1 - coverage) / n)
    assert sizes[0] < sizes[1] < sizes[2] < len(sets.columns)
    returned = av.tl.predict(labelled, coverage=0.95, inplace=False)
    np.testing.assert_array_equal(returned, labelled.obsm["totalanvi_sets"])


def test_another_prediction_takes_the_sets_away(labelled):
    av.tl.predict(labelled, coverage=0.9)
    av.tl.predict(labelled)
    assert "totalanvi_sets" not in labelled.obsm


def test_a_refit_takes_the_sets_away_and_leaves_the_users_own():
    mdata = av.datasets.synthetic_cite(900, n_genes=60)
    mine = np.ones((900, 2), dtype=np.float32)
    mdata["rna"].obsm["scanvi_sets"] = mine
    av.tl.scanvi(mdata, max_epochs=1, train_size=0.7)
    np.testing.assert_array_equal(mdata["rna"].obsm["scanvi_sets"], mine)
    av.tl.predict(mdata, coverage=0.9)
    assert mdata["rna"].obsm["scanvi_sets"].shape[1] > 2
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
    before = labelled.obsm["totalanvi_sets"].to_numpy()
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
    assert "NK|T" in mdata["rna"].obsm["scanvi_sets"] and "scanvi_proba" not in mdata["rna"].obsm
    assert "NK/T" in av.tl.predict(mdata, coverage=0.9, inplace=False)
