import json

import numpy as np
import pandas as pd
import pytest
from helpers import cite, mudata_of

import anvi as av
from anvi._data.labels import label_column
from anvi._data.setup import Setup, find_setup


@pytest.fixture
def mdata():
    return cite()


def test_everything_is_found_once(mdata):
    mdata.obs["donor"] = np.arange(300) % 4
    mdata.obs["percent"] = np.linspace(0, 1, 300)
    setup = find_setup(
        mdata,
        proteins=True,
        labels_key="cell_type",
        batch_key="batch",
        panel_key="panel",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["percent"],
        size_factor_key="percent",
    )
    assert setup.genes == tuple(mdata["rna"].var_names) and setup.proteins == tuple(mdata["prot"].var_names)
    assert setup.batches == ("batch_0", "batch_1", "batch_2")
    assert setup.classes == ("B", "CD14 Mono", "CD4 T", "CD8 T", "NK", "pDC")  # sorted, without "Unknown"
    assert setup.categorical == (("donor", ("0", "1", "2", "3")),)
    assert setup.continuous == ("percent",) and setup.size_factor_key == "percent"
    assert setup.panels == ("panel_0", "panel_1")  # "none" is of cells without proteins
    truth = mdata.uns["truth"]["measured"]
    assert setup.measured == tuple(tuple(truth[panel]) for panel in ("panel_0", "panel_1"))
    assert setup.joint and setup.counts


def test_rna_models_do_not_look_at_proteins(mdata):
    mdata["prot"].X[0, 0] = -5
    setup = find_setup(mdata, proteins=False)
    assert setup.proteins == () and setup.panels == () and not setup.joint
    assert setup.batches == ("all",) and setup.classes == ()


def test_batches_are_panels_unless_a_panel_key_is_given(mdata):
    assert find_setup(mdata, proteins=True, batch_key="batch").panels == ("batch_0", "batch_1", "batch_2")
    assert find_setup(mdata, proteins=True).panels == ("all",)
    assert find_setup(mdata, proteins=True, batch_key="batch", panel_key="panel").panels[0] == "panel_0"


def test_json_and_back(mdata):
    setup = find_setup(
        mdata, proteins=True, labels_key="cell_type", batch_key="batch", categorical_covariate_keys=["panel"]
    )
    assert Setup.from_dict(json.loads(json.dumps(setup.to_dict()))) == setup


def test_entries_of_a_newer_version_are_refused(mdata):
    values = find_setup(mdata, proteins=False).to_dict() | {"gene_key": "ensembl"}
    with pytest.raises(ValueError, match=r"unknown entries \['gene_key'\].*newer anvi"):
        Setup.from_dict(values)


@pytest.mark.parametrize("mark", ["Unknown", "", None, np.nan, "none yet"])
def test_what_counts_as_unlabelled(mdata, mark):
    labels = mdata.obs["true_cell_type"].astype(object)
    labels[mdata.obs_names[:200]] = mark
    mdata.obs["ct"] = labels
    unlabeled = "none yet" if mark == "none yet" else "Unknown"
    column = label_column(mdata, "ct", unlabeled, ("rna", "prot"))
    assert column.isna().to_numpy().tolist() == [True] * 200 + [False] * 100
    assert mark not in find_setup(mdata, proteins=False, labels_key="ct", unlabeled_category=unlabeled).classes


def test_a_number_marks_unlabelled_cells(mdata):
    codes = mdata.obs["true_cell_type"].cat.codes.astype(int)
    mdata.obs["ct"] = codes.where(np.arange(300) >= 100, -1)
    for mark in (-1, "-1"):
        setup = find_setup(mdata, proteins=False, labels_key="ct", unlabeled_category=mark)
        assert setup.classes == ("0", "1", "2", "3", "4", "5")


def test_classes_are_those_of_cells_in_the_model(mdata):
    mdata["prot"].obs["ct"] = mdata.obs["true_cell_type"].reindex(mdata["prot"].obs_names)
    assert len(find_setup(mdata, proteins=True, labels_key="ct").classes) == 6


def test_unused_categories_are_no_classes_and_no_batches(mdata):
    for key in ("true_cell_type", "batch"):
        mdata.obs[key] = mdata.obs[key].cat.add_categories(["never"])
    setup = find_setup(mdata, proteins=False, labels_key="true_cell_type", batch_key="batch")
    assert "never" not in setup.classes + setup.batches


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.arange(300) % 2, ("0", "1")),
        (np.arange(300) % 2 == 0, ("False", "True")),
        (pd.array(np.arange(300) % 2, dtype="Int64"), ("0", "1")),
        (np.float64(np.arange(300) % 2), ("0", "1")),
        (pd.array(np.arange(300) % 2 == 0, dtype="boolean"), ("False", "True")),
    ],
    ids=["int", "bool", "Int64", "float", "boolean"],
)
def test_numbers_and_truth_values_as_batches(mdata, values, expected):
    mdata.obs["k"] = values
    assert find_setup(mdata, proteins=False, batch_key="k").batches == expected


def test_layer_of_each_modality(mdata):
    for mod in ("rna", "prot"):
        mdata[mod].layers["raw"] = mdata[mod].X.copy()
    setup = find_setup(mdata, proteins=True, layer={"prot": "raw"})
    assert (setup.rna_layer, setup.prot_layer) == (None, "raw")
    setup = find_setup(mdata, proteins=True, layer="raw")
    assert (setup.rna_layer, setup.prot_layer) == ("raw", "raw")
    with pytest.raises(KeyError, match=r"layer= names 'adt', which is no modality; there are: 'rna', 'prot'"):
        find_setup(mdata, proteins=True, layer={"adt": "raw"})


def test_cells_without_rna(mdata):
    mdata = mudata_of({"rna": mdata["rna"][50:].copy(), "prot": mdata["prot"]}, mdata)
    mdata.obs["k"] = mdata.obs_names.isin(mdata["rna"].obs_names)
    assert find_setup(mdata, proteins=True, batch_key="k").batches == ("False", "True")
    assert find_setup(mdata, proteins=False, batch_key="k").batches == ("True",)  # not those of an RNA model


@pytest.mark.parametrize("key", ["batch_key", "categorical_covariate_keys"])
def test_a_category_of_every_cell_must_be_known(mdata, key):
    mdata.obs["k"] = mdata.obs["batch"].astype(object).where(np.arange(300) != 7)
    with pytest.raises(ValueError, match=rf"{key}: 'k' has no value for 1 cells \(first: 'cell_00008'\)"):
        find_setup(mdata, proteins=False, **{key: "k" if key == "batch_key" else ["k"]})


def test_classes_that_a_file_could_not_tell_apart(mdata):
    mdata.obs["ct"] = mdata.obs["true_cell_type"].cat.rename_categories({"NK": "NK/T", "B": "NK|T"})
    with pytest.raises(ValueError, match=r"'NK\|T' and 'NK/T' .* rename one"):
        find_setup(mdata, proteins=False, labels_key="ct")


def test_other_names_of_the_modalities(mdata):
    renamed = mudata_of({"gex": mdata["rna"], "adt": mdata["prot"]}, mdata)
    renamed["gex"].obs["lane"] = "a"
    setup = find_setup(renamed, proteins=True, rna_mod="gex", prot_mod="adt", batch_key="gex:lane")
    assert setup.mods == ("gex", "adt") and setup.batches == ("a",)


def test_isotype_controls_are_left_out_on_request():
    mdata = cite()
    prot = mdata["prot"]
    controls = ["Mouse IgG2a isotype Ctrl", "IgG1-control", "Rat IgG2b, kappa"]
    rest = list(prot.var_names[3:])
    prot.var_names = [*controls[:2], *rest[:4], controls[2], *rest[4:]]
    assert find_setup(mdata, proteins="all").proteins == tuple(prot.var_names)
    assert find_setup(mdata, proteins="targets").proteins == tuple(rest)
    assert find_setup(mdata, proteins=[rest[2], rest[0]]).proteins == (rest[0], rest[2])  # in the order of the object
    for bad, error, match in (
        ("target", ValueError, "'all', 'targets'"),
        (["CD3"], KeyError, "not in mdata\\['prot'\\].X .first: 'CD3'"),
        ([], ValueError, "names none"),
    ):
        with pytest.raises(error, match=match):
            find_setup(mdata, proteins=bad)
    for bad in (None, True, False):
        with pytest.raises(TypeError, match="proteins="):
            av.tl.totalvi(mdata, proteins=bad, max_epochs=1)
    only = mudata_of({"rna": mdata["rna"].copy(), "prot": prot[:, controls].copy()})
    with pytest.raises(ValueError, match="every name is that of an isotype control"):
        find_setup(only, proteins="targets")


def test_a_fit_without_isotype_controls_is_that_of_an_object_without_them():
    mdata = cite()
    prot = mdata["prot"]
    prot.var_names = ["IgG1-control", *prot.var_names[1:]]
    without = mudata_of({"rna": mdata["rna"].copy(), "prot": prot[:, 1:].copy()})
    av.tl.totalvi(without, max_epochs=1)
    av.tl.totalvi(mdata, proteins="targets", max_epochs=1)
    assert np.array_equal(mdata.obsm["X_totalvi"], without.obsm["X_totalvi"])
    av.tl.denoise(mdata, modality="prot")
    layer = mdata["prot"].layers["totalvi_denoised"]
    assert np.isnan(layer[:, 0]).all() and np.isfinite(layer[:, 1:]).all()
