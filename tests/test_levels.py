"""Labels at several levels: what is learned from the columns, what a fit makes of them, and what it answers."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import cite, contents, quiet_mudata

import anvi as av
from anvi._data import slots
from anvi._data.batches import Minibatches, split
from anvi._data.cells import read_cells
from anvi._data.labels import Known, Levels, levels_of_columns, levels_of_tree
from anvi._data.predictions import NoveltyScores, _named
from anvi._data.setup import find_setup
from anvi._model import Landmarks
from anvi._posterior.confidence import NEVER, limits

LINEAGE = {"B": "B", "CD4 T": "T", "CD8 T": "T", "NK": "NK", "CD14 Mono": "Myeloid", "pDC": "Myeloid"}
KEYS = ["lineage", "subtype"]
EXAMPLE = Levels(
    ("lineage", "cell_type", "subtype"),
    (("T", "T", "T", "B", "NK"), ("CD4", "CD4", "CD8", "B", "NK"), ("CD4 naive", "CD4 Tcm", "CD8", "B", "NK")),
)


def columns(*rows: tuple, keys=("lineage", "cell_type", "subtype")) -> dict[str, pd.Series]:
    frame = pd.DataFrame(rows, index=[f"cell {i}" for i in range(len(rows))], columns=list(keys)[: len(rows[0])])
    return {key: frame[key].astype(object).where(frame[key].notna(), np.nan) for key in frame}


def labelled(n_obs: int = 600, fine: float = 0.5, coarse: float = 0.8, seed: int = 0, **options):
    """Cells of which some have a subtype, others a lineage alone, others nothing."""
    mdata = cite(n_obs, **options)
    truth = mdata.obs["true_cell_type"].astype(str)
    rng = np.random.default_rng(seed)
    with quiet_mudata():
        mdata.obs["lineage"] = truth.map(LINEAGE).where(rng.random(n_obs) < coarse)
        mdata.obs["subtype"] = truth.where(rng.random(n_obs) < fine)
        mdata.obs["true_lineage"] = truth.map(LINEAGE)
    return mdata


# the hierarchy --------------------------------------------------------------------------------------------------------


def test_what_is_under_what_is_learned_from_cells_that_have_both():
    found = levels_of_columns(
        columns(
            ("T", "CD4", "CD4 naive"),
            ("T", "CD4", None),
            (None, "CD4", "CD4 Tcm"),  # T by way of CD4
            ("T", None, "gdT"),  # a cell type of its own
            ("T", "CD8", None),  # nothing finer: a class
            ("NK", None, None),
            (None, None, "HSC"),  # nothing coarser
            (None, "B", None),
        ),
        None,
    )
    assert Levels.of(found, (), None).table[-1] == ("B", "CD4 Tcm", "CD4 naive", "CD8", "HSC", "NK", "gdT")
    assert found[0] == ("lineage", ("B", "T", "T", "T", "HSC", "NK", "T"))
    assert found[1] == ("cell_type", ("B", "CD4", "CD4", "CD8", "HSC", "NK", "gdT"))


def test_a_name_at_two_levels_is_one_thing_unless_it_has_another_parent(caplog):
    two = columns(("NK", None), (None, "NK"), ("T", "CD4"), keys=KEYS)
    assert levels_of_columns(two, None) == (("lineage", ("T", "NK")), ("subtype", ("CD4", "NK")))
    with pytest.raises(ValueError, match="'NK' is a class of 'lineage'.* and another of 'subtype' under 'T'"):
        levels_of_columns(columns(("NK", None), ("T", "NK"), ("T", "CD4"), keys=KEYS), None)
    assert not caplog.records
    levels_of_columns(columns(("T", "T"), ("T", "CD4"), ("B", None), keys=KEYS), None)
    assert "'T' of 'subtype' is taken for a class beside 'CD4'" in caplog.text


def test_two_parents_are_named_with_their_cells():
    rows = [("T", "CD4"), ("T", "CD4"), ("B", "CD4"), ("B", "B naive")]
    with pytest.raises(ValueError) as error:
        levels_of_columns(columns(*rows, keys=KEYS), None)
    assert "'CD4' of 'subtype' has two parents in 'lineage': 'T' (2 cells: 'cell 0', 'cell 1')" in str(error.value)
    assert "and 'B' (1 cells: 'cell 2')" in str(error.value)
    with pytest.raises(
        ValueError, match=r"'a' of 'subtype' has two parents.*'B' \(1 cells: 'cell 2'\).*by way of 'CD4'"
    ):
        levels_of_columns(columns(("T", "CD4", None), (None, "CD4", "a"), ("B", None, "a")), None)


def test_a_tree_adds_to_what_cells_say():
    two = columns(("T", None), (None, "CD4"), (None, "CD8"), ("B", "B naive"), keys=KEYS)
    apart = levels_of_columns(two, None)
    assert apart[1][1] == ("B naive", "CD4", "CD8", "T")
    found = levels_of_columns(two, {"T": ["CD4", "CD8"]})
    assert found == (("lineage", ("B", "T", "T")), ("subtype", ("B naive", "CD4", "CD8")))
    with pytest.raises(ValueError, match=r"'B naive' under 'T', but 1 cells have 'B' in 'lineage' \(first: 'cell 3'\)"):
        levels_of_columns(two, {"T": ["B naive"]})
    with pytest.raises(KeyError, match="no column has 'CD4' with 'Tee' in a coarser one"):
        levels_of_columns(two, {"Tee": ["CD4"]})


def test_a_tree_for_a_single_column():
    labels = pd.Series(["T", "CD4 naive", "CD8", "B", "CD4", "NK", np.nan])
    tree = {"lymphoid": ["T", "B"], "T": ["CD4", "CD8"], "CD4": ["CD4 naive", "never seen"]}
    found = levels_of_tree(labels, tree, "rna:cell_type")
    assert found == (
        ("level_1", ("lymphoid", "lymphoid", "lymphoid", "NK")),
        ("level_2", ("B", "T", "T", "NK")),
        ("level_3", ("B", "CD4", "CD8", "NK")),
        ("cell_type", ("B", "CD4 naive", "CD8", "NK")),
    )
    for bad, error, message in (
        ({"a": ["b"], "b": ["a"]}, ValueError, "above itself"),
        ({"x": ["T"], "a": ["b", "x"], "b": ["a"]}, ValueError, "'a' is above itself"),  # T and x merely hang below
        ({"a": ["T"], "b": ["T"]}, ValueError, "'T' has two parents, 'a' and 'b'"),
        ({"T": "CD4"}, TypeError, "label_tree takes a dict"),
        ({"x": ["y"]}, KeyError, "none of its children is a value of 'cell_type'"),
    ):
        with pytest.raises(error, match=message):
            levels_of_tree(labels, bad, "cell_type")


def test_sets_and_what_is_certain_given_them():
    sets, known = EXAMPLE.sets(), EXAMPLE.known()
    assert sets.shape == (5 + 1 + 2, 5)  # T and CD4 are the only groups of several classes
    assert (sets[:5] == np.eye(5, dtype=bool)).all() and sets[5].all()
    for row, inside in enumerate(sets):
        for number in range(3):
            names = {EXAMPLE.table[number][c] for c in np.flatnonzero(inside)}
            expected = EXAMPLE.groups(number).index(*names) if len(names) == 1 else -1
            assert known[number, row] == expected
    assert EXAMPLE.rows(["T", "CD4", "B", "?"], None) == {"T": 6, "CD4": 7, "B": 3}
    p = np.random.default_rng(0).dirichlet(np.ones(5), 7)
    for number in range(3):
        for g, name in enumerate(EXAMPLE.groups(number)):
            expected = sum(p[:, c] for c in range(5) if EXAMPLE.table[number][c] == name)
            np.testing.assert_allclose(EXAMPLE.sums(p, number)[:, g], expected)


def test_cells_are_read_as_sets():
    mdata = labelled()
    setup = find_setup(mdata, proteins=False, labels_key=KEYS)
    assert setup.labels_key == "subtype" and setup.label_columns == tuple(KEYS)
    cells = read_cells(mdata, setup, labels=True)
    obs = mdata.obs.loc[cells.names]
    for n in range(len(cells)):
        fine, coarse = obs["subtype"].iloc[n], obs["lineage"].iloc[n]
        inside = {
            c for c in setup.classes if (fine != fine or c == fine) and (coarse != coarse or LINEAGE[c] == coarse)
        }
        assert {setup.classes[c] for c in cells.label_table[cells.label_row[n]].nonzero()[:, 0].tolist()} == inside
        assert bool(cells.told[n] >= 0) == (len(inside) < len(setup.classes))
        assert int(cells.label[n]) == (setup.classes.index(*inside) if len(inside) == 1 else -1)


def test_a_single_column_in_a_list_is_that_column():
    mdata = cite(200)
    one, other = (find_setup(mdata, proteins=False, labels_key=key) for key in ("cell_type", ["cell_type"]))
    assert one == other and not one.label_levels and read_cells(mdata, one, labels=True).label_table is None
    for bad in ([], ["cell_type", 3], ["cell_type", "cell_type"]):
        with pytest.raises(TypeError, match="labels_key takes a column, or a list of different ones"):
            find_setup(mdata, proteins=False, labels_key=bad)
    with pytest.raises((KeyError, ValueError), match="must be different columns|cell_type"):
        find_setup(mdata, proteins=False, labels_key=["cell_type", "rna:cell_type"])
    with pytest.raises(KeyError, match="celltype"):
        find_setup(mdata, proteins=False, labels_key=["celltype", "cell_type"])


# the fit --------------------------------------------------------------------------------------------------------------


def test_coarse_labels_come_as_often_as_classes():
    mdata = labelled()
    cells = read_cells(mdata, find_setup(mdata, proteins=False, labels_key=KEYS), labels=True)
    kinds = cells.told[cells.told >= 0].unique()
    n_fine = len(cells.label[cells.label >= 0].unique())
    minibatches = Minibatches(cells, torch.arange(len(cells)), 100, 10 * n_fine, torch.Generator().manual_seed(0))
    for choice in minibatches.plan():
        assert (cells.label_row[choice.balanced].bincount(minlength=len(cells.label_table))[kinds] == 10).all()
        assert (cells.label[choice.index[: choice.n_labelled]] >= 0).all()
    train, validation = split(cells, 0.8, torch.Generator().manual_seed(0))
    for kind in cells.label_row.unique():  # divided alike
        n = int((cells.label_row == kind).sum())
        assert abs(int((cells.label_row[validation] == kind).sum()) - 0.2 * n) <= 1


def test_levels_without_a_coarse_label_change_nothing():
    mdata = cite(300, n_proteins=8)
    truth = mdata.obs["true_cell_type"].astype(str)
    with quiet_mudata():
        mdata.obs["fine"] = mdata.obs["cell_type"].astype(str).replace("Unknown", np.nan)
        mdata.obs["coarse"] = truth.map(LINEAGE).where(mdata.obs["fine"].notna())
    options = {"batch_key": "batch", "max_epochs": 2, "n_hidden": 16}
    one = av.tl.totalanvi(mdata, "fine", copy=True, **options)
    two = av.tl.totalanvi(mdata, ["coarse", "fine"], copy=True, **options)
    for a, b in zip(one.uns["totalanvi"]["history"].items(), two.uns["totalanvi"]["history"].items(), strict=True):
        np.testing.assert_allclose(
            a[1], b[1], rtol=1e-2, atol=1e-2, err_msg=a[0]
        )  # float32, sums in other orders, Adam
    np.testing.assert_allclose(one.obsm["X_totalanvi"], two.obsm["X_totalanvi"], atol=2e-2)


@pytest.fixture(scope="module")
def fitted():
    mdata = labelled(1500, n_proteins=12)
    av.tl.totalanvi(mdata, KEYS, batch_key="batch", max_epochs=12, train_size=0.8, n_hidden=32)
    return mdata


def test_a_fit_answers_at_every_level(fitted):
    obs, proba = fitted.obs, av.get.proba(fitted)
    table = fitted.uns["totalanvi"]["label_levels"]
    assert list(table.columns) == KEYS and list(table.index) == list(proba.columns) == list(table["subtype"])
    sums = proba.T.groupby(table["lineage"]).sum().T
    np.testing.assert_allclose(obs["totalanvi_confidence_lineage"], sums.max(axis=1), rtol=1e-5)
    assert (obs["totalanvi_prediction_lineage"].astype(str) == sums.idxmax(axis=1)).all()
    hidden = obs["subtype"].isna() & obs["lineage"].isna()
    for level, truth in (("_lineage", "true_lineage"), ("", "true_cell_type")):
        right = (obs[f"totalanvi_prediction{level}"].astype(str) == obs[truth].astype(str))[hidden].mean()
        assert right > 0.85  # the commonest has .3
    assert obs["totalanvi_novelty_lineage"].notna().all()


def test_a_users_label_is_kept_or_refined(fitted):
    obs = fitted.obs
    given, label = obs["subtype"].notna(), obs["totalanvi_label"].astype(str)
    assert (label == obs["subtype"].astype(str))[given].all()
    coarse = obs["subtype"].isna() & obs["lineage"].notna()
    assert (label.map(lambda name: LINEAGE.get(name, name)) == obs["lineage"].astype(str))[coarse].all()
    assert (label == obs["true_cell_type"].astype(str))[coarse].mean() > 0.8


def test_levels_stay_in_files_and_models(fitted, tmp_path):
    fitted.write(tmp_path / "fitted.h5mu")
    import mudata

    with quiet_mudata():
        again = mudata.read(tmp_path / "fitted.h5mu")
    pd.testing.assert_frame_equal(
        again.uns["totalanvi"]["label_levels"].astype(str), fitted.uns["totalanvi"]["label_levels"].astype(str)
    )
    av.write_model(fitted, tmp_path / "model")
    model = av.read_model(tmp_path / "model", device="cpu")
    assert model.setup == av.get.model(fitted).setup and model.setup.levels.names == tuple(KEYS)
    query = fitted[:50].copy()
    av.tl.predict(query, model=model, confidence=0.9)
    av.tl.predict(fitted, confidence=0.9)
    assert (query.obs["totalanvi_label"].astype(str) == fitted.obs["totalanvi_label"].astype(str)[:50]).all()


def test_a_later_fit_leaves_no_column_of_a_level(fitted):
    mdata = fitted.copy()
    av.tl.totalanvi(mdata, "subtype", batch_key="batch", max_epochs=1, n_hidden=16)
    assert not [name for name in mdata.obs if name.endswith("_lineage") and name.startswith("totalanvi")]
    assert "label_levels" not in mdata.uns["totalanvi"]


@pytest.mark.parametrize("labels_key", ["mixed", ["lineage", "subtype"], "lineage"])
def test_a_query_with_coarse_labels(fitted, labels_key):
    query = labelled(200, fine=0.3, n_proteins=12, random_state=5)
    with quiet_mudata():
        query.obs["batch"] = "new"
        query.obs["mixed"] = query.obs["subtype"].astype(object).fillna(query.obs["lineage"])
    before = contents(fitted)
    av.tl.map_query(query, fitted, labels_key=labels_key, max_epochs=2)
    assert contents(fitted).keys() == before.keys()
    label, lineage = query.obs["totalanvi_label"].astype(str), query.obs["lineage"]
    up = label.map(lambda name: LINEAGE.get(name, name))
    assert (up == lineage)[lineage.notna()].all()
    if labels_key != "lineage":
        given = query.obs["subtype"].notna()
        assert (label == query.obs["subtype"].astype(str))[given].all()
    assert av.get.model(query).setup.levels == av.get.model(fitted).setup.levels


def test_labels_that_contradict_each_other_are_named(fitted):
    query = fitted[:40].copy()
    query.obs["lineage"], query.obs["subtype"] = "B", "B"
    query.obs.loc[query.obs_names[3], "subtype"] = "NK"
    with pytest.raises(ValueError, match=f"1 cells have a 'lineage' that does not go with.*'{query.obs_names[3]}'"):
        av.tl.map_query(query, fitted, labels_key=KEYS, max_epochs=1, key_added="mapped")


@pytest.mark.parametrize("method", ["scanvi", "totalanvi"])
@pytest.mark.parametrize(
    "options", [{"objective": "scvi-tools"}, {"labelled_batch_size": 0}, {"label_prior": "empirical"}], ids=str
)
def test_every_kind_of_fit_takes_levels(method, options):
    mdata = labelled(200)
    getattr(av.tl, method)(mdata, KEYS, max_epochs=2, n_hidden=8, **options)
    home = mdata if method == "totalanvi" else mdata["rna"]
    history = home.uns[method]["history"]
    assert np.isfinite(history.to_numpy()).all() and (history["train_accuracy"] <= 1).all()
    assert (history["validation_accuracy"] > 0).any()
    for found in (av.metrics.elbo(mdata), av.metrics.marginal_likelihood(mdata, n_samples=2)):
        assert all(np.isfinite(value) for value in found.values() if isinstance(value, float))


# answers --------------------------------------------------------------------------------------------------------------


def far_of(*beyond):
    return tuple(NoveltyScores(np.zeros(len(cells)), np.array(cells, dtype=bool)) for cells in beyond)


def test_the_label_is_the_deepest_name_that_holds():
    p = np.array(
        [[0.9, 0.05, 0.03, 0.01, 0.01], [0.5, 0.4, 0.05, 0.05, 0.0], [0.4, 0.1, 0.3, 0.1, 0.1], [0.3, 0, 0, 0.3, 0.4]]
    )
    assert list(_named(EXAMPLE, p, None, None, None)) == ["CD4 naive", "CD4 naive", "CD4 naive", "NK"]
    sure = np.full((4, 3), 0.8)
    assert list(_named(EXAMPLE, p, None, None, sure)) == ["CD4 naive", "CD4", "T", "Unassigned"]
    # a T cell, but none of these; and one like nothing
    far = far_of([0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1])
    assert list(_named(EXAMPLE, p, None, far, None)) == ["T", "CD4", "Unassigned", "Unassigned"]
    # what the user says is a floor, and rules others out
    text = pd.Series([np.nan, "T", "B", "odd"])
    known = Known(text, np.array([5, 6, 3, 5]), np.array([False, False, False, True]))
    assert list(_named(EXAMPLE, p, known, far, sure)) == ["T", "CD4", "B", "odd"]
    assert list(_named(EXAMPLE, p, known, None, None)) == ["CD4 naive", "CD4 naive", "B", "odd"]
    ruled_out = Known(pd.Series(["CD4"] * 4), np.full(4, 7), np.zeros(4, dtype=bool))
    assert _named(EXAMPLE, np.eye(5)[[4] * 4], ruled_out, None, None)[0] in ("CD4 naive", "CD4 Tcm")


def naive_limits(sure: np.ndarray, share: float) -> list[float]:
    """Every limit tried."""
    found, still = [], set(range(sure.shape[1]))
    for level in reversed(range(len(sure))):
        best = NEVER
        for limit in sorted({abs(sure[level, i]) for i in still if abs(sure[level, i]) >= 0.5}, reverse=True):
            inside = [i for i in still if abs(sure[level, i]) >= limit]
            if (sum(sure[level, i] < 0 for i in inside) + 1) / (len(inside) + 1) <= 1 - share + 1e-9:
                best = limit
        still -= {i for i in still if abs(sure[level, i]) >= best}
        found.insert(0, best)
    return found


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("n", [5, 60, 400])
def test_limits_against_all_that_were_tried(n, share):
    rng = np.random.default_rng(n)
    fine = rng.beta(3, 1, (2, n)).round(2)
    p = np.stack([np.minimum(1, fine + 0.2), np.minimum(1, fine + 0.1), fine], axis=1)
    right = rng.random((2, 1, n)) < p
    sure = np.where(right, p, -p).astype(np.float32)
    found = limits(Landmarks(torch.zeros(2, 101), sure=torch.from_numpy(sure)), share)
    for kind in range(2):
        np.testing.assert_allclose(found[kind], naive_limits(sure[kind], share), rtol=1e-6)


def test_the_promise_is_kept_on_other_cells():
    """Cells whose confidence is not calibrated at all; on new ones errors are as promised at every level."""
    rng = np.random.default_rng(0)

    def draw(n):
        fine = rng.beta(4, 1, n)
        p = np.stack([np.sqrt(fine), fine])
        wrong_fine = rng.random(n) > fine**2
        wrong = np.stack([wrong_fine & (rng.random(n) < 0.3), wrong_fine])
        return np.where(wrong, -p, p)

    for share in (0.8, 0.9, 0.95):
        errors = []
        for _ in range(40):
            found = limits(Landmarks(torch.zeros(1, 101), sure=torch.tensor(draw(1000)[None]).float()), share)[0]
            new = draw(2000)
            fine = np.abs(new[1]) >= found[1]
            coarse = ~fine & (np.abs(new[0]) >= found[0])
            errors.append([(new[1][fine] < 0).mean(), (new[0][coarse] < 0).mean() if coarse.any() else np.nan])
        # the largest set is chosen by its errors, which costs a little: within a hundredth on average
        assert (np.nanmean(errors, axis=0) < 1 - share + 0.01).all()


def test_confidence_needs_held_out_cells_and_a_share(fitted):
    with pytest.raises(ValueError, match="confidence=1.5 is a share"):
        av.tl.predict(fitted.copy(), confidence=1.5)
    few = labelled(100)
    av.tl.scanvi(few, KEYS, max_epochs=1, n_hidden=8)
    with pytest.raises(ValueError, match="keeps no labelled validation cells to promise anything by"):
        av.tl.predict(few, confidence=0.9)


def test_a_single_level_may_be_unsure_too():
    mdata = cite(1500, n_proteins=8)
    av.tl.scanvi(mdata, max_epochs=3, train_size=0.7, n_hidden=16)
    obs = mdata["rna"].obs
    unlabelled = mdata.obs["cell_type"].astype(str).reindex(obs.index) == "Unknown"
    shares = []
    for confidence in (0.6, 0.9, 0.99):
        av.tl.predict(mdata, confidence=confidence, false_rejects=0)
        shares.append((mdata["rna"].obs["scanvi_label"] == slots.UNASSIGNED)[unlabelled].mean())
    assert shares[0] <= shares[1] <= shares[2] and shares[2] > 0


@pytest.mark.parametrize(
    "change",
    [
        {"label_levels": (("lineage", ("T",)), ("subtype", ("a", "b")))},
        {"label_levels": (("lineage", ("T", "T")),)},
        {"label_levels": (("x", ("T", "T")), ("x", ("a", "b")))},
        {"label_levels": (("x", ("T", 3)), ("y", ("a", "b")))},
        {"label_levels": "ab"},
        {"label_columns": ("a", 3)},
    ],
    ids=str,
)
def test_levels_of_a_stranger_are_checked(change):
    from anvi._data.setup import Setup

    setup = Setup(genes=("g",), batches=("all",), labels_key="y", classes=("a", "b")).checked()
    good = {"label_levels": [["lineage", ["T", "T"]], ["y", ["a", "b"]]]}
    assert Setup.from_dict(setup.to_dict() | good).levels.coarser == ("lineage",)
    with pytest.raises(ValueError, match="The model's setup is damaged"):
        Setup.from_dict(setup.to_dict() | change)


def test_landmarks_of_a_stranger_are_checked(fitted):
    from anvi._model import _check_landmarks

    model = av.get.model(fitted)
    marks, n = model.landmarks, len(model.setup.levels.names)
    _check_landmarks(marks, model.config, n)
    for bad in (
        marks._replace(sure=marks.sure[:, :1]),
        marks._replace(sure=marks.sure * 2),
        marks._replace(sure=torch.full_like(marks.sure, torch.nan)),
        marks._replace(above_centre=None),
        marks._replace(above_quantiles=marks.above_quantiles.flip(-1)),
        marks._replace(above_whiten=marks.above_whiten[:, :, :1]),
    ):
        with pytest.raises(ValueError, match="The stored model is damaged"):
            _check_landmarks(bad, model.config, n)


# at a level -----------------------------------------------------------------------------------------------------------


def test_scores_at_a_level_against_loops(fitted):
    obs = fitted.obs
    for level, given in (("lineage", obs["lineage"].astype(object)), (None, obs["subtype"].astype(object))):
        if level is not None:  # a cell with a subtype has a lineage
            given = given.fillna(obs["subtype"].astype(object).map(LINEAGE))
        predicted = obs["totalanvi_prediction" + ("" if level is None else f"_{level}")].astype(str)
        inside = (obs["totalanvi_split"] == "validation") & given.notna()
        # a group of one class says which class it is
        if level is None:
            only = {name for name in LINEAGE.values() if list(LINEAGE.values()).count(name) == 1}
            given = given.where(given.notna() | ~obs["lineage"].isin(only), obs["lineage"].astype(object))
            inside = (obs["totalanvi_split"] == "validation") & given.notna()
        table = av.metrics.classification(fitted, level=level)
        assert table.loc["overall", "cells"] == inside.sum()
        assert table.loc["overall", "accuracy"] == pytest.approx((predicted == given)[inside].mean())
    hidden = av.metrics.classification(fitted, "true_cell_type", level="lineage", split=None)
    right = (obs["totalanvi_prediction_lineage"].astype(str) == obs["true_lineage"].astype(str)).mean()
    assert hidden.loc["overall", "accuracy"] == pytest.approx(right)
    with pytest.raises(KeyError, match="level='family' is no level of the labels; there are 'lineage', 'subtype'"):
        av.metrics.classification(fitted, level="family")
    with pytest.raises(ValueError, match="name the column of that level"):
        av.metrics.classification(fitted, "lineage", prediction="lineage", level="lineage")


def test_probabilities_at_a_level(fitted):
    table = av.get.proba(fitted, level="lineage")
    assert list(table.columns) == sorted(set(LINEAGE.values()))
    np.testing.assert_allclose(table.max(axis=1), fitted.obs["totalanvi_confidence_lineage"], rtol=1e-6)
    pd.testing.assert_frame_equal(av.get.proba(fitted, level="subtype"), av.get.proba(fitted))


def test_reliability_at_every_level(fitted):
    table = fitted.uns["totalanvi"]["calibration"]
    cells = table.groupby(["level", "cells_seen", "when"])["cells"].sum()
    assert cells.index.get_level_values("level").unique().sort_values().tolist() == sorted(KEYS)
    assert (cells["lineage"] > cells["subtype"]).all()  # coarse labels are held out, too
    for part in ("confidence", "accuracy"):
        assert table[part].between(0, 1 + 1e-6).all()


def test_pictures_and_report_of_a_level(fitted):
    ax = av.pl.confusion(fitted, level="lineage", show=False)
    assert "lineage" in ax.get_title() and len(ax.get_yticks()) == len(set(LINEAGE.values()))
    for level in (None, "lineage"):
        axes = av.pl.calibration(fitted, level=level, show=False)
        titles = ["with proteins", "RNA only"] if level is None else ["with proteins, lineage", "RNA only, lineage"]
        assert [ax.get_title() for ax in axes] == titles
    page = av.pl.report(fitted)
    assert "labels (lineage)" in page and "Validation cells, lineage" in page and "calibration, lineage, cells" in page


def test_why_a_lineage_and_not_another(fitted):
    found = av.tl.attributions(fitted, level="lineage", target=("T", "Myeloid"), n_cells=10, inplace=False)
    other = av.tl.attributions(fitted, target=("CD4 T", "CD8 T"), n_cells=10, inplace=False)
    assert list(found["group"].values if "group" in found.coords else found.coords[list(found.coords)[0]].values)
    assert found.attrs.keys() == other.attrs.keys()
    with pytest.raises(KeyError, match="the model has no class 'CD4 T'; it has 'B', 'Myeloid', 'NK', 'T'"):
        av.tl.attributions(fitted, level="lineage", target="CD4 T", inplace=False)
    mdata = fitted.copy()
    av.tl.attributions(mdata, level="lineage", n_cells=10)
    params, obs = mdata["rna"].uns["totalanvi_attributions"]["params"], mdata["rna"].obs
    # the classifier's groups; under the name of the predictions only where these are the same
    predicted = mdata.obs["totalanvi_prediction_lineage"].reindex(obs.index).astype(str)
    same = (obs[params["groupby"]].astype(str) == predicted).all()
    assert params["groupby"] == ("totalanvi_prediction_lineage" if same else "totalanvi_attributions_groups")
    # the attributions of a group sum to what the log-sum-exp of its logits gains
    assert np.nanmin(params["complete"]) > 0.9


def test_criticism_of_a_level(fitted):
    found = av.metrics.criticism(fitted, level="lineage", n_samples=1, metrics=["de"], inplace=False)
    assert set(found["de"]["group"]) == set(LINEAGE.values())


def test_levels_on_the_command_line(tmp_path):
    from anvi.__main__ import main

    labelled(200).write(tmp_path / "in.h5mu")
    tree = '{"T": ["CD4 T"]}'
    given = ["fit", str(tmp_path / "in.h5mu"), str(tmp_path / "out.h5mu"), "--labels-key", "lineage", "subtype"]
    assert main([*given, "--label-tree", tree, "--max-epochs", "1", "--set", "n_hidden=8", "--quiet"]) == 0
    import mudata

    with quiet_mudata():
        fitted = mudata.read(tmp_path / "out.h5mu")
    assert av.get.model(fitted).setup.label_columns == tuple(KEYS)
    again = ["predict", str(tmp_path / "out.h5mu"), str(tmp_path / "again.h5mu"), "--no-soft", "--quiet"]
    assert main(again) == 0
    assert main(["check", str(tmp_path / "in.h5mu"), "--labels-key", "lineage", "subtype"]) == 0


def test_check_tells_coarse_labels():
    report = av.pp.check(labelled(300), labels_key=KEYS)
    assert report.ok and any("have a coarse label alone" in fact for fact in report.facts)
    mdata = labelled(300)
    mdata.obs.loc[(mdata.obs["subtype"] == "CD4 T").idxmax(), "lineage"] = "B"
    assert any(
        "'CD4 T' of 'subtype' has two parents" in problem for problem in av.pp.check(mdata, labels_key=KEYS).problems
    )


def test_a_level_of_one_value_says_nothing_of_a_cell():
    """The level leaves all classes open: the label is the prediction, and the name is no stranger."""
    mdata = cite(300)
    mdata.obs["kind"] = "cell"
    fine = mdata.obs["true_cell_type"].astype(object).to_numpy(copy=True)
    fine[::2] = np.nan
    mdata.obs["type"] = pd.Series(fine, mdata.obs_names)
    av.tl.scanvi(mdata, labels_key=["kind", "type"], max_epochs=1)
    label = mdata["rna"].obs["scanvi_label"].astype(str)
    assert "cell" not in set(label)
    assert (label[1::2] == mdata.obs["type"].iloc[1::2].astype(str)).all()


def test_a_fine_label_that_the_model_does_not_know_stays(caplog):
    mdata = cite(300)
    types = mdata.obs["true_cell_type"].astype(str)
    mdata.obs["lineage"], mdata.obs["type"] = np.where(types.str.contains("T"), "T", "other"), types
    model = av.tl.scanvi(mdata, labels_key=["lineage", "type"], max_epochs=1, copy=True)
    query = mdata.copy()
    query.obs["type"] = types.where(types != "CD4 T", "Treg")
    av.tl.predict(query, model=av.get.model(model, "scanvi"), key_added="asked")
    label = query["rna"].obs["asked_label"].astype(str)
    assert (label[(types == "CD4 T").to_numpy()] == "Treg").all()


def test_an_only_child_is_told(caplog):
    columns = {"a": pd.Series(["T", "T", "B"]), "b": pd.Series(["CD4 T", np.nan, "B cell"])}
    levels_of_columns(columns, None)
    assert "1 cells are 'T' in 'a' with nothing finer, and 'CD4 T' is all that lies under it" in caplog.text


def test_a_query_that_has_only_some_of_the_columns_of_labels_is_told(caplog):
    mdata = cite(300)
    types = mdata.obs["true_cell_type"].astype(str)
    mdata.obs["lineage"], mdata.obs["type"] = np.where(types.str.contains("T"), "T", "other"), types
    av.tl.scanvi(mdata, labels_key=["lineage", "type"], max_epochs=1)
    model, query = av.get.model(mdata, "scanvi"), cite(300)
    av.tl.predict(query, model=model, key_added="asked")
    assert "labels are left out" not in caplog.text  # it has none: nothing to say
    query.obs["lineage"] = "T"
    av.tl.predict(query, model=model, key_added="again")
    assert "labels are left out: labels_key='type' was found in none of" in caplog.text
