"""pp.check finds every problem at once and writes nothing; pp.panels writes what the fits then read."""

import numpy as np
import pandas as pd
import pytest
from helpers import cite

import anvi as av


@pytest.fixture
def mdata():
    return cite(300)


def test_check_is_content_with_good_data_and_writes_nothing(mdata):
    before = (list(mdata.obs), list(mdata.uns), list(mdata.obsm), [list(mod.obs) for mod in mdata.mod.values()])
    report = av.pp.check(mdata, batch_key="batch")
    assert report.ok
    assert report.problems == []
    assert report.cells_per_batch.to_dict() == {"batch_0": 100, "batch_1": 100, "batch_2": 100}
    assert report.panels.sum().to_dict() == {"batch_0": 20, "batch_1": 15, "batch_2": 0}
    labelled = mdata.obs["cell_type"][mdata.obs["cell_type"] != "Unknown"].astype(str).value_counts()
    assert report.labels.to_dict() == labelled.to_dict()
    assert "ready to fit" in repr(report)
    assert before == (list(mdata.obs), list(mdata.uns), list(mdata.obsm), [list(mod.obs) for mod in mdata.mod.values()])


def test_check_says_what_a_bug_report_needs(mdata):
    report = av.pp.check(mdata)
    assert f"anvi {av.__version__}, torch " in repr(report)
    assert all(name in report.session for name in ("mudata", "torch", "numpy", "Python", "CPU"))


def test_a_package_from_a_folder_that_is_gone(mdata, monkeypatch):
    """A stale editable installation of whatever package stops the listing of versions."""

    def list_versions(**options):
        raise FileNotFoundError(2, "No such file or directory", "/old/src")

    monkeypatch.setattr("session_info2.session_info", list_versions)
    said = av.pp.check(mdata).session
    assert "'/old/src': a package was installed from a folder that is gone" in said and "pip list" in said


def test_check_finds_every_problem_in_one_go(mdata):
    mdata["rna"].X[0, 0] = -1
    report = av.pp.check(mdata, labels_key="celltype", batch_key="bach")
    text = repr(report)
    assert len(report.problems) == 3
    assert "labels_key='celltype'" in text
    assert "Did you mean 'batch'" in text
    assert "negative" in text
    assert not report.ok


def test_check_notes_slashes_rare_classes_and_shared_names(mdata):
    mdata.obs["cell_type"] = mdata.obs["cell_type"].cat.rename_categories({"NK": "NK/T"})
    mdata["rna"].var_names = ["P01", *mdata["rna"].var_names[1:]]
    notes = " ".join(av.pp.check(mdata).notes)
    assert "'/'" in notes
    assert "fewer than 10" in notes
    assert "P01" in notes


def test_check_without_labels_and_on_anndata(mdata):
    assert av.pp.check(mdata["rna"], labels_key=None).ok
    assert "prot_obsm" not in repr(av.pp.check(mdata["rna"], labels_key=None))


@pytest.mark.parametrize("missing", ["nan", "zero", "absent"])
def test_panels_recovers_the_truth_however_it_is_stored(missing):
    mdata = av.datasets.synthetic_cite(300, n_genes=60, missing=missing)
    assert av.pp.panels(mdata, "panel") is None
    table = mdata["prot"].varm["measured"]
    truth = mdata.uns["truth"]["measured"]
    pd.testing.assert_frame_equal(table[list(truth.columns)], truth, check_names=False)
    assert not table.get("none", pd.Series(False)).any()


def test_panels_by_hand_and_zeros_kept():
    mdata = av.datasets.synthetic_cite(300, n_genes=60, missing="zero")
    out = av.pp.panels(mdata, "batch", panels={"batch_0": ["P01", "P02"]}, missing="nan", copy=True)
    assert "measured" not in mdata["prot"].varm
    table = out["prot"].varm["measured"]
    assert list(table.index[table["batch_0"]]) == ["P01", "P02"]
    assert table["batch_1"].all()  # zeros are data


def test_a_fit_reads_the_declared_panels():
    mdata = cite(300)
    av.pp.panels(mdata, "batch", panels={"batch_0": ["P01", "P02", "P03"]})
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    setup = av.get.model(mdata).setup
    assert np.array(setup.measured).sum(1).tolist() == [3, 15, 0]


@pytest.mark.parametrize("keys", [{"batch_key": "batch"}, {"batch_key": "batch", "panel_key": "panel"}])
def test_check_looks_at_labels_and_batches_beside_the_declared_panels(mdata, keys):
    av.pp.panels(mdata, keys.get("panel_key", "batch"))
    report = av.pp.check(mdata, **keys)
    assert report.problems == []
    assert not report.labels.empty
    report = av.pp.check(mdata, **keys | {"labels_key": "celltype"})
    assert len(report.problems) == 1 and "labels_key='celltype'" in report.problems[0]
    assert len(report.cells_per_batch) == 3


def test_panels_refuses_what_is_not_there(mdata):
    with pytest.raises(KeyError, match="panels names 'x'"):
        av.pp.panels(mdata, "batch", panels={"x": []})
    with pytest.raises(KeyError, match="proteins that are not there: 'P99'"):
        av.pp.panels(mdata, "batch", panels={"batch_0": ["P99"]})
    with pytest.raises(TypeError, match="MuData"):
        av.pp.panels(mdata["rna"])


def test_a_check_tells_of_a_panel_without_counts_once(caplog):
    mdata = cite(300)
    mdata["prot"].X[(mdata.obs["batch"].reindex(mdata["prot"].obs_names) == "batch_1").to_numpy()] = 0
    with caplog.at_level("INFO", logger="anvi"):
        av.pp.check(mdata, batch_key="batch")
    assert sum("panel 'batch_1'" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("said", ["yes", "False", None, np.nan, pd.NA])
def test_who_measured_what_is_true_or_false(said):
    mdata = cite(300, n_panels=1, rna_only_batch=False)
    table = pd.DataFrame(True, index=mdata["prot"].var_names, columns=["batch_0", "batch_1", "batch_2"])
    table.loc["P01", "batch_0"] = False
    for known in (table, table.astype(int), table.astype("boolean")):
        mdata["prot"].varm["measured"] = known
        assert av.pp.check(mdata, batch_key="batch").panels["batch_0"].sum() == 19
    table = table.astype(object)
    table.loc["P02", "batch_1"] = said
    mdata["prot"].varm["measured"] = table
    with pytest.raises(ValueError, match=r"varm\['measured'\] is .* for protein 'P02' and panel 'batch_1'; True"):
        av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    reference = cite(300, n_panels=1, rna_only_batch=False)
    av.tl.totalvi(reference, batch_key="batch", max_epochs=1)
    with pytest.raises(ValueError, match=r"varm\['measured'\] is .* for protein 'P02' and panel 'batch_1'; True"):
        av.tl.map_query(mdata, reference, max_epochs=0)


def test_marks_that_are_dropped_are_told(caplog):
    mdata = cite(300, n_panels=1, rna_only_batch=False)
    table = pd.DataFrame(True, index=mdata["prot"].var_names, columns=["batch_0", "batch_1", "batch_2"])
    table.loc["P01", "batch_0"] = False
    mdata["prot"].varm["measured"] = table
    av.pp.panels(mdata, "batch")
    assert any("marked 'P01' of panel 'batch_0' as not measured" in message for message in caplog.messages)
    caplog.clear()
    av.pp.panels(mdata, "batch")
    assert not [message for message in caplog.messages if "marked" in message]


def test_columns_of_an_antibody_sheet_stay():
    mdata = cite(300)
    mdata["prot"].var["clone"] = "mine"
    with pytest.raises(ValueError, match=r"var\['clone'\] would be overwritten") as told:
        av.pp.panels(mdata, "batch", harmonize=True)
    exec(str(told.value).partition("Rename it: ")[2], {"mdata": mdata})
    for _ in range(2):  # what is ours is written again
        av.pp.panels(mdata, "batch", harmonize=True)
    assert mdata["prot"].var["my_clone"].eq("mine").all() and "clone" in mdata["prot"].var
