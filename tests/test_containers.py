import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import cite, dense, mudata_of
from scipy import sparse

from anvi._data import containers, counts
from anvi._data.cells import read_cells
from anvi._data.containers import Source, unique_names
from anvi._data.counts import canonical, stored_counts
from anvi._data.setup import find_setup

MODS = ("rna", "prot")


@pytest.fixture
def mdata():
    return cite()


def text(data, key, argument="batch_key"):
    return Source(data).text(key, argument, MODS)


def test_only_mudata_and_anndata_are_data(mdata):
    for data in (mdata, mdata["rna"]):
        containers.check_type(data)
    for data in (None, "file.h5mu", mdata.obs, np.zeros((2, 2))):
        with pytest.raises(TypeError, match="Expected a MuData or an AnnData, got"):
            containers.check_type(data)


def test_modality_by_name_or_the_anndata_itself(mdata):
    assert Source(mdata).modality("prot", "prot_mod") is mdata["prot"]
    assert Source(mdata["rna"]).modality("whatever", "rna_mod") is mdata["rna"]
    with pytest.raises(KeyError, match=r"no modality 'adt'; it has 'rna', 'prot'.*prot_mod="):
        Source(mdata).modality("adt", "prot_mod")


def test_layer_is_a_name_a_dict_or_none():
    assert containers.layer_of(None, "rna") is None
    assert containers.layer_of("counts", "rna") == "counts"
    assert containers.layer_of({"rna": "counts"}, "rna") == "counts"
    assert containers.layer_of({"rna": "counts"}, "prot") is None


def test_matrix_names_what_there_is(mdata):
    rna = mdata["rna"]
    assert stored_counts(rna, None, "rna") is rna.X
    assert stored_counts(rna, "true_rate", "rna") is rna.layers["true_rate"]
    with pytest.raises(KeyError, match=r"layer='counts' is not in rna.layers; there are: 'true_scale', 'true_rate'"):
        stored_counts(rna, "counts", "rna")
    with pytest.raises(ValueError, match=r"rna.X is empty; pass layer=... \('raw' are there\)"):
        stored_counts(AnnData(layers={"raw": np.ones((2, 2))}), None, "rna")


COUNTS = np.array([[0, 3, 0], [2, 0, 1]])


@pytest.mark.parametrize(
    "form",
    [
        COUNTS,
        COUNTS.astype(np.uint16),
        COUNTS.astype(np.float64),
        sparse.csr_matrix(COUNTS),
        sparse.csc_matrix(COUNTS),
        sparse.coo_matrix(COUNTS),
        sparse.csr_array(COUNTS),
        pd.DataFrame(COUNTS),
    ],
    ids=["int", "uint16", "float64", "csr", "csc", "coo", "csr_array", "frame"],
)
def test_any_form_becomes_the_same_csr(form):
    csr = canonical(form, "X")
    assert csr.dtype == np.float32 and csr.has_canonical_format and sparse.issparse(csr) and csr.format == "csr"
    np.testing.assert_array_equal(csr.toarray(), COUNTS)


def test_unsorted_and_repeated_entries_are_put_right_without_touching_the_users():
    raw = sparse.csr_matrix((np.float32([1, 2, 5]), np.int32([2, 0, 2]), np.int32([0, 3, 3])), shape=(2, 3))
    before = raw.indices.copy()
    csr = canonical(raw, "X")
    np.testing.assert_array_equal(csr.toarray(), [[2, 0, 6], [0, 0, 0]])
    np.testing.assert_array_equal(csr.indices, [0, 2])
    np.testing.assert_array_equal(raw.indices, before)


def test_float32_csr_is_not_copied():
    raw = sparse.csr_matrix(COUNTS.astype(np.float32))
    assert np.shares_memory(canonical(raw, "X").data, raw.data)


def test_repeated_names():
    unique_names(pd.Index(["a", "b"]), "mdata['rna'].obs_names", "cell")
    with pytest.raises(ValueError, match=r"obs_names has 1 repeated cell names \('a'\).*obs_names_make_unique\(\)"):
        unique_names(pd.Index(["a", "b", "a", "a"]), "mdata['rna'].obs_names", "cell")


class TestPlaces:
    def test_mdata_rna_and_prot_obs(self, mdata):
        mdata["rna"].obs["in_rna"] = mdata.obs["batch"]
        mdata["prot"].obs["in_prot"] = mdata.obs["batch"].reindex(mdata["prot"].obs_names)
        np.testing.assert_array_equal(text(mdata, "batch"), text(mdata, "in_rna"))
        found = text(mdata, "in_prot")
        assert list(found.index) == list(mdata.obs_names)
        has = found.index.isin(mdata["prot"].obs_names)
        assert 0 < has.sum() < len(has) and (found.notna() == has).all()
        np.testing.assert_array_equal(found[has], mdata.obs.loc[has, "batch"].astype(str))

    def test_prefix_means_one_place(self, mdata):
        mdata["rna"].obs["batch"] = "of_rna"
        with pytest.raises(ValueError, match="disagree"):
            text(mdata, "batch")
        assert set(text(mdata, "rna:batch")) == {"of_rna"}

    def test_a_global_column_with_a_prefix_is_found_too(self, mdata):
        mdata.obs["rna:pulled"] = mdata.obs["batch"]
        np.testing.assert_array_equal(text(mdata, "rna:pulled"), text(mdata, "batch"))

    def test_anndata(self, mdata):
        rna = mdata["rna"].copy()
        rna.obs["rna:batch"] = "one"
        assert set(text(rna, "rna:batch")) == {"one"}
        with pytest.raises(KeyError, match=r"was found in none of data\.obs\."):
            text(rna, "batch")

    def test_not_found_lists_places_neighbours_and_candidates(self, mdata):
        mdata["rna"].obs["lane"] = pd.Categorical(np.arange(300) % 2)
        mdata.obs["percent"] = np.linspace(0, 1, 300)
        with pytest.raises(KeyError) as caught:
            text(mdata, "bach")
        message = str(caught.value)
        assert "batch_key='bach' was found in none of mdata.obs, mdata['rna'].obs, mdata['prot'].obs" in message
        assert "Did you mean 'batch'" in message and "'cell_type'" in message and "'lane'" in message
        assert "percent" not in message  # a float is no category


class TestCopies:
    def test_agreeing_copies_are_one_column(self, mdata):
        mdata["rna"].obs["batch"] = mdata.obs["batch"].astype(str)  # text and category say the same
        mdata["prot"].obs["batch"] = mdata.obs["batch"].reindex(mdata["prot"].obs_names)
        np.testing.assert_array_equal(text(mdata, "batch"), mdata.obs["batch"].astype(str))

    def test_disagreement_names_both_and_the_cell(self, mdata):
        mdata["rna"].obs["batch"] = mdata.obs["batch"].astype(str)
        cell = mdata.obs_names[7]
        mdata["rna"].obs.loc[cell, "batch"] = "another"
        with pytest.raises(ValueError) as caught:
            text(mdata, "batch")
        message = str(caught.value)
        for part in (
            f"disagree in 1 cells: cell '{cell}'",
            "'another' in mdata['rna'].obs",
            "in mdata.obs",
            "'rna:batch'",
        ):
            assert part in message

    def test_the_third_copy_is_compared_too(self, mdata):
        mdata["rna"].obs["k"] = "a"
        mdata["prot"].obs["k"] = "b"
        mdata.obs["k"] = pd.Series(np.nan, mdata.obs_names, dtype=object)
        with pytest.raises(ValueError, match=r"disagree in 200 cells.*in mdata\['prot'\]\.obs"):
            text(mdata, "k")

    def test_a_copy_fills_what_another_lacks(self, mdata):
        half = mdata.obs["batch"].astype(object)
        half[mdata.obs_names[:150]] = np.nan
        mdata.obs["k"] = half
        mdata["rna"].obs["k"] = mdata.obs["batch"]
        np.testing.assert_array_equal(text(mdata, "k"), mdata.obs["batch"].astype(str))

    def test_order_of_a_modality_does_not_matter(self, mdata):
        prot = mdata["prot"][::-1].copy()
        prot.obs["batch"] = mdata.obs["batch"].reindex(prot.obs_names)
        np.testing.assert_array_equal(
            text(mudata_of({"rna": mdata["rna"], "prot": prot}, mdata), "batch"), text(mdata, "batch")
        )

    def test_integers_turned_to_floats_by_missing_cells_are_the_same_integers(self, mdata):
        lane = pd.Series(np.arange(300) % 3, mdata.obs_names)
        mdata.obs["lane"] = lane.where(np.arange(300) >= 100).astype(float)  # what a pull leaves of it
        mdata["rna"].obs["lane"] = lane
        mdata["prot"].obs["lane"] = pd.array(lane.reindex(mdata["prot"].obs_names), dtype="Int64")
        np.testing.assert_array_equal(text(mdata, "lane"), lane.astype(str))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 1], ["1", "2", "1"]),
        ([True, False, True], ["True", "False", "True"]),
        ([1.0, np.nan, 2.0], ["1", np.nan, "2"]),
        ([1.5, np.nan, 2.0], ["1.5", np.nan, "2"]),
        (pd.array([1, None, 2], dtype="Int64"), ["1", np.nan, "2"]),
        (pd.array([True, None, False], dtype="boolean"), ["True", np.nan, "False"]),
        (pd.array(["a", None, ""], dtype="string"), ["a", np.nan, np.nan]),
        (pd.Categorical(["a", None, "b"]), ["a", np.nan, "b"]),
        (pd.Categorical([1, None, 2]), ["1", np.nan, "2"]),
        (pd.Categorical([1.0, None, 2.0]), ["1", np.nan, "2"]),
        (["1.0", "2.", "-0.0"], ["1", "2", "0"]),
        (np.array([1, True, "TRUE"], dtype=object), ["1", "True", "True"]),
        (["01", "1.50", " a "], ["01", "1.50", "a"]),
        ([b"a", None, "a"], ["a", np.nan, "a"]),
        (pd.to_datetime(["2020-01-02", None, "2021-01-02"]), ["2020-01-02", np.nan, "2021-01-02"]),
        (["a", None, ""], ["a", np.nan, np.nan]),
    ],
    ids=[
        "int",
        "bool",
        "whole floats",
        "floats",
        "Int64",
        "boolean",
        "string",
        "category",
        "int category",
        "float category",
        "text floats",
        "mixed",
        "text",
        "bytes",
        "days",
        "object",
    ],
)
def test_every_type_as_text(values, expected):
    adata = AnnData(np.ones((3, 2), dtype=np.float32))
    adata.obs["k"] = values
    assert text(adata, "k").fillna("missing").tolist() == pd.Series(expected).fillna("missing").tolist()


def test_categorical_candidates(mdata):
    mdata.obs["id"] = [f"cell {i}" for i in range(300)]
    mdata.obs["constant"] = "x"
    mdata.obs["share"] = np.linspace(0, 1, 300)
    found = Source(mdata).columns_like(MODS, numbers=False)
    assert {"batch", "panel", "cell_type"} <= set(found)
    assert not {"id", "constant", "share"} & set(found)


def test_column_follows_obs_names_of_the_object(mdata):
    shuffled = mdata[np.random.default_rng(0).permutation(300)].copy()
    found = Source(shuffled).column("batch", "batch_key", MODS)
    assert list(found.index) == list(shuffled.obs_names)
    np.testing.assert_array_equal(found, mdata.obs["batch"].reindex(shuffled.obs_names))
    assert dense(shuffled["rna"].X).shape == (300, 60)


def test_a_source_reads_what_it_is_asked_for_once(monkeypatch):
    mdata, checked = cite(), []
    monkeypatch.setattr(counts, "check_counts", lambda *given, **_: checked.append(given[3]))
    source = Source(mdata)
    setup = find_setup(source, proteins=True, batch_key="batch", labels_key="cell_type")
    read_cells(source, setup, labels=True)
    assert checked == ["mdata['prot'].X"]
    assert source.text("batch", "batch_key", MODS) is source.text("batch", "panel_key", MODS)
    assert Source.of(source) is source


def test_columns_that_a_source_is_given_stand_for_those_of_the_object(mdata):
    given = pd.Series("mine", index=mdata.obs_names[5:])
    source = Source(mdata, {"batch": given, "new": given})
    for key in ("batch", "new"):
        column = source.text(key, "batch_key", MODS)
        assert list(column.index) == list(mdata.obs_names) and column.isna().sum() == 5
    assert set(mdata.obs["batch"]) != {"mine"} and "new" not in mdata.obs
