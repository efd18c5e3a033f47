"""Who is in a group, who in its reference, and what is refused."""

import logging

import numpy as np
import pandas as pd
import pytest
from helpers import cite

from anvi._data.containers import Source
from anvi._data.rankings import Ranked, build_ranking, write_groups
from anvi._data.select import find_groups
from anvi._data.setup import find_setup
from anvi._data.slots import writer_into

NOTHING = Ranked(*(np.zeros(2) for _ in range(4)))


@pytest.fixture
def mdata():
    return cite()


@pytest.fixture
def setup(mdata):
    return find_setup(mdata, proteins=True, labels_key="cell_type", batch_key="batch")


def test_all_against_the_rest_without_the_unlabelled(mdata, setup, caplog):
    with caplog.at_level(logging.INFO, "anvi"):
        found = find_groups(Source(mdata), setup, "cell_type")
    labels = mdata.obs["cell_type"].astype(str).to_numpy()
    assert found.names == [name for name in mdata.obs["cell_type"].cat.categories if name != "Unknown"]
    for name, inside, outside in zip(found.names, found.inside, found.outside, strict=True):
        np.testing.assert_array_equal(inside, [label == name for label in labels])
        np.testing.assert_array_equal(outside, [label not in (name, "Unknown") for label in labels])
    assert f"{(labels == 'Unknown').sum()} cells without a group in 'cell_type'" in caplog.text


def test_missing_and_unassigned_cells_take_no_part_unless_they_are_named(mdata, setup):
    values = mdata.obs["true_cell_type"].astype(object).copy()
    values.iloc[:5], values.iloc[5:9], values.iloc[9:12] = np.nan, "Unassigned", ""
    mdata.obs["called"] = values
    found = find_groups(Source(mdata), setup, "called")
    assert "Unassigned" not in found.names
    assert not np.any(found.inside, axis=0)[:12].any() and not np.any(found.outside, axis=0)[:12].any()
    named = find_groups(Source(mdata), setup, "called", ["Unassigned"])
    assert named.names == ["Unassigned"] and named.inside[0].sum() == 4
    against = find_groups(Source(mdata), setup, "called", ["NK"], "Unassigned")
    assert against.outside[0].sum() == 4 and against.reference == "Unassigned"


def test_a_group_that_is_called_rest_is_a_group(mdata, setup):
    truth = mdata.obs["true_cell_type"].astype(str)
    mdata.obs["state"] = np.where(truth == "NK", "active", "rest")
    found = find_groups(Source(mdata), setup, "state")
    assert found.names == ["active", "rest"]
    np.testing.assert_array_equal(found.outside[1], truth == "NK")
    masks = find_groups(
        Source(mdata), setup, None, {"rest": (truth != "NK").to_numpy(), "NK": (truth == "NK").to_numpy()}
    )
    assert masks.names == ["rest", "NK"]
    np.testing.assert_array_equal(masks.outside[0], truth == "NK")


def test_some_groups_and_pairs(mdata, setup):
    truth = mdata.obs["true_cell_type"]
    some = find_groups(Source(mdata), setup, "true_cell_type", ["NK", "B"])
    assert some.names == ["NK", "B"]
    np.testing.assert_array_equal(some.outside[0], truth != "NK")  # the rest is everybody, not the named alone
    assert find_groups(Source(mdata), setup, "true_cell_type", "NK").names == ["NK"]
    pair = find_groups(Source(mdata), setup, "true_cell_type", reference="B")
    assert "B" not in pair.names and len(pair.names) == 5
    for outside in pair.outside:
        np.testing.assert_array_equal(outside, truth == "B")


def test_order_is_that_of_the_categories_and_numbers_are_sorted_by_value(mdata, setup):
    mdata.obs["cluster"] = np.arange(mdata.n_obs) % 11
    assert find_groups(Source(mdata), setup, "cluster").names == [str(i) for i in range(11)]
    mdata.obs["turned"] = mdata.obs["true_cell_type"].cat.reorder_categories(
        ["pDC", "NK", "B", "CD4 T", "CD8 T", "CD14 Mono"]
    )
    assert find_groups(Source(mdata), setup, "turned").names == ["pDC", "NK", "B", "CD4 T", "CD8 T", "CD14 Mono"]


def test_masks_and_queries(mdata, setup):
    rng = np.random.default_rng(0)
    some = rng.random(mdata.n_obs) < 0.3
    mdata["rna"].obs["depth"] = np.asarray(mdata["rna"].X.sum(1)).ravel()
    groups = {
        "array": some,
        "series": pd.Series(some, mdata.obs_names).sample(frac=1, random_state=0),
        "query": "true_cell_type == 'NK' and batch == 'batch_0'",
        "of a modality": "depth > 1000",
    }
    found = find_groups(Source(mdata), setup, None, groups)
    assert found.names == list(groups) and found.column is None  # they overlap
    np.testing.assert_array_equal(found.inside[0], some)
    np.testing.assert_array_equal(found.inside[1], some)
    np.testing.assert_array_equal(
        found.inside[2],
        [a == "NK" and b == "batch_0" for a, b in zip(mdata.obs["true_cell_type"], mdata.obs["batch"], strict=True)],
    )
    depth = mdata["rna"].obs["depth"].reindex(mdata.obs_names)
    np.testing.assert_array_equal(found.inside[3], [value > 1000 for value in depth])
    for inside, outside in zip(found.inside, found.outside, strict=True):
        np.testing.assert_array_equal(outside, ~inside)
    apart = find_groups(
        Source(mdata),
        setup,
        None,
        {"a": some, "b": "batch == 'batch_1'"} | {"a": some & (mdata.obs["batch"] != "batch_1")},
        "b",
    )
    assert apart.names == ["a"] and apart.column.cat.categories.tolist() == ["a", "b", "rest"]


@pytest.mark.parametrize(
    ("groupby", "groups", "reference", "error", "match"),
    [
        ("nothing", "all", "rest", KeyError, "groupby='nothing' was found in none of"),
        ("true_cell_type", ["NK", "Natural"], "rest", ValueError, "no cells with the value 'Natural'; it has 'B'"),
        ("true_cell_type", "all", "Natural", ValueError, "no cells with the value 'Natural'"),
        ("true_cell_type", ["NK"], "NK", ValueError, "groups and reference are both 'NK': there is nothing to compare"),
        (
            "true_cell_type",
            ["NK"],
            ["B", "pDC"],
            TypeError,
            "must name one group, or 'rest'. Several together are a mask",
        ),
        ("single", "all", "rest", ValueError, "a single group, 'one': there is nothing to compare"),
        ("empty", "all", "rest", ValueError, "no group: there is nothing to compare"),
        (None, "all", "rest", ValueError, "Name the column of the groups"),
        ("batch", {"a": "batch == 'batch_0'"}, "rest", ValueError, "leave one of the two out"),
        (None, {}, "rest", ValueError, "names no group"),
        (None, {"a": "batch == 'x'"}, "rest", ValueError, "The group 'a' has no cells"),
        (None, {"a": "batch != 'x'"}, "rest", ValueError, "no cells to compare 'a' with"),
        (None, {"a": "batch == 'batch_0'"}, "b", ValueError, "neither 'rest' nor one of the groups: 'a'"),
        (None, {"a": "batch == 'batch_0'"}, "a", ValueError, "'a' is the only group"),
        (None, {"a": "batc == 'batch_0'"}, "rest", ValueError, "groups\\['a'\\]: the query .* failed"),
        (None, {"a": [0, 1, 2]}, "rest", TypeError, "must be a boolean mask"),
        (None, {"a": [True, False]}, "rest", ValueError, "has 2 entries, the object has 300 cells"),
        (None, {"a": pd.Series([True], ["cell"])}, "rest", ValueError, "does not hold every cell"),
        (None, {"a": "batch == 'batch_0'", "b": "batch != 'batch_1'"}, "b", ValueError, "both in 'a' and in its ref"),
    ],
)
def test_what_is_refused(mdata, setup, groupby, groups, reference, error, match):
    mdata.obs["single"], mdata.obs["empty"] = "one", np.nan
    with pytest.raises(error, match=match):
        find_groups(Source(mdata), setup, groupby, groups, reference)


def test_the_column_is_pushed_once_and_follows_the_users(mdata, setup):
    rna, found = mdata["rna"], find_groups(Source(mdata), setup, "true_cell_type")
    params = write_groups(writer_into(rna), found.key, found.column, "own")
    assert params == {"groupby": "true_cell_type", "pushed": True}
    assert (rna.obs["true_cell_type"] == mdata.obs["true_cell_type"].reindex(rna.obs_names)).all()
    rna.uns["r"] = build_ranking({"NK": NOTHING}, ["x", "y"], {"groupby": "true_cell_type", "pushed": True})
    # the user annotates anew: our copy is stale, which is no reason for an error
    mdata.obs["true_cell_type"] = mdata.obs["true_cell_type"].cat.rename_categories({"NK": "ILC"})
    again = find_groups(Source(mdata), setup, "true_cell_type")
    assert "ILC" in again.names
    assert write_groups(writer_into(rna), again.key, again.column, "own") == {
        "groupby": "true_cell_type",
        "pushed": True,
    }
    assert (rna.obs["true_cell_type"] == "ILC").sum() == (mdata.obs["true_cell_type"] == "ILC").sum()


def test_a_column_of_the_users_is_never_written_over(mdata, setup):
    mdata["prot"].obs["true_cell_type"] = "another"
    before = mdata["prot"].obs.copy()
    truth = mdata.obs["true_cell_type"].copy()
    mdata["rna"].obs["true_cell_type"] = truth.reindex(mdata["rna"].obs_names)
    explicit = find_groups(Source(mdata), setup, "rna:true_cell_type")
    assert write_groups(writer_into(mdata["rna"]), explicit.key, explicit.column, "own")["groupby"] == "true_cell_type"
    assert write_groups(writer_into(mdata["prot"]), explicit.key, explicit.column, "own") == {
        "groupby": "own",
        "pushed": False,
    }
    pd.testing.assert_frame_equal(mdata["prot"].obs[before.columns], before)
    assert (mdata["prot"].obs["own"] == truth.reindex(mdata["prot"].obs_names)).all()


def test_clusters_that_are_numbers_get_a_column_of_text(mdata, setup):
    adata = mdata["rna"]
    adata.obs["cluster"] = np.arange(adata.n_obs) % 3
    found = find_groups(Source(adata), setup, "cluster")
    assert write_groups(writer_into(adata), found.key, found.column, "own") == {"groupby": "own", "pushed": False}
    assert adata.obs["own"].cat.categories.tolist() == ["0", "1", "2"]
    assert adata.obs["cluster"].dtype.kind == "i"
