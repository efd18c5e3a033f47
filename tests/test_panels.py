import logging

import numpy as np
import pandas as pd
import pytest
from helpers import cite

import anvi as av
from anvi._data.cells import read_cells
from anvi._data.counts import Proteins
from anvi._data.setup import find_panels, find_setup

NAN = np.nan
# two panels; protein d is NaN throughout panel one, c is zero throughout panel two
COUNTS = np.array([[1, 0, 2, NAN], [0, 5, 0, NAN], [3, NAN, 0, 4], [0, 2, 0, 0]], dtype=np.float32)
PANEL = pd.Series(["one", "one", "two", "two"])


def proteins(counts=COUNTS, declared=None) -> Proteins:
    names = tuple("abcd")[: counts.shape[1]]
    return Proteins(pd.Index([f"c{i}" for i in range(len(counts))]), names, counts, declared, "prot.X")


def test_nan_throughout_and_zero_throughout():
    measured = find_panels(proteins(), PANEL, ("one", "two"), "auto")
    np.testing.assert_array_equal(measured, [[True, True, True, False], [True, True, False, True]])


def test_zeros_are_data_when_asked():
    measured = find_panels(proteins(), PANEL, ("one", "two"), "nan")
    np.testing.assert_array_equal(measured, [[True, True, True, False], [True, True, True, True]])


def test_a_zero_among_nan_is_not_a_measurement():
    """A protein with nothing but NaN and zeros in a panel is all-zero there."""
    counts = np.array([[1, 0], [2, NAN]], dtype=np.float32)
    assert find_panels(proteins(counts), None, ("all",), "auto").tolist() == [[True, False]]
    assert find_panels(proteins(counts), None, ("all",), "nan").tolist() == [[True, True]]


def test_proteins_taken_as_missing_are_named(caplog):
    with caplog.at_level(logging.INFO, "anvi"):
        find_panels(proteins(), PANEL, ("one", "two"), "auto")
    assert "panel 'two': 1 proteins are zero in all of its 2 cells and taken as not measured: c" in caplog.text
    assert "panel 'one'" not in caplog.text  # what is NaN was said by the user
    caplog.clear()
    find_panels(proteins(), PANEL, ("one", "two"), "nan")
    assert not caplog.records


def test_a_panel_without_cells_measured_nothing():
    measured = find_panels(proteins(), PANEL, ("none", "one", "two"), "auto")
    np.testing.assert_array_equal(measured[0], [False] * 4)


def test_declared_panels_win_over_counts():
    declared = pd.DataFrame({"one": [True, False, True, True], "two": True}, index=list("abcd"))
    measured = find_panels(proteins(declared=declared), PANEL, ("one", "two"), "nan")
    np.testing.assert_array_equal(measured, [[True, False, True, False], [True, True, True, True]])


def test_a_single_declared_column_is_the_single_panel():
    declared = pd.DataFrame({"whatever": [True, True, False, True]}, index=list("abcd"))
    measured = find_panels(proteins(declared=declared), None, ("all",), "nan")
    np.testing.assert_array_equal(measured, [[True, True, False, True]])


def test_declared_without_a_panel_of_the_fit():
    declared = pd.DataFrame({"one": [True] * 4}, index=list("abcd"))
    with pytest.raises(ValueError, match=r"no column for panel 'two', only 'one'.*pp.panels again"):
        find_panels(proteins(declared=declared), PANEL, ("one", "two"), "auto")
    with pytest.raises(TypeError, match="must be a DataFrame"):
        find_panels(proteins(declared=np.ones((4, 2), dtype=bool)), PANEL, ("one", "two"), "auto")


def test_a_panel_that_measured_nothing_need_not_be_declared():
    counts = np.vstack([COUNTS, np.full((1, 4), NAN, dtype=np.float32)])
    declared = pd.DataFrame({"one": [True] * 4, "two": [True] * 4}, index=list("abcd"))
    panel = pd.Series([*PANEL, "none"])
    measured = find_panels(proteins(counts, declared), panel, ("none", "one", "two"), "nan")
    assert measured.any(1).tolist() == [False, True, True]


def by_loop(mdata, panels: pd.Series, missing: str, declared: pd.DataFrame | None) -> pd.DataFrame:
    """The measured-mask of every cell, cell by cell and protein by protein."""
    prot = mdata["prot"]
    mask = pd.DataFrame(False, index=mdata.obs_names, columns=prot.var_names)
    counts = prot.to_df()
    for cell in prot.obs_names:
        for protein in prot.var_names:
            of_panel = counts.loc[(panels.reindex(prot.obs_names) == panels[cell]).to_numpy(), protein]
            mask.loc[cell, protein] = (
                not np.isnan(counts.loc[cell, protein])
                and (missing == "nan" or bool((of_panel.fillna(0) != 0).any()))
                and (declared is None or bool(declared.loc[protein, panels[cell]]))
            )
    return mask


@pytest.mark.parametrize("missing", ["auto", "nan"])
@pytest.mark.parametrize("key", ["batch", "panel"])
@pytest.mark.parametrize("is_declared", [False, True], ids=["undeclared", "declared"])
def test_mask_of_each_cell_against_a_loop(missing, key, is_declared):
    mdata = cite(40, n_classes=3, n_proteins=12, n_genes=20)
    prot = mdata["prot"]
    prot.X[:, 3] = np.where(mdata.obs.loc[prot.obs_names, key].to_numpy() == mdata.obs[key].iloc[0], 0, prot.X[:, 3])
    prot.X[5, 7] = NAN
    declared = None
    if is_declared:
        declared = pd.DataFrame(True, index=prot.var_names, columns=sorted(mdata.obs[key].unique()))
        declared.iloc[11, 1] = False
        prot.varm["measured"] = declared
    setup = find_setup(mdata, proteins=True, missing=missing, **{f"{key}_key": key})
    cells = read_cells(mdata, setup)
    expected = by_loop(mdata, mdata.obs[key], missing, declared).loc[cells.names].to_numpy()
    np.testing.assert_array_equal(cells.measured.numpy(), expected)
    assert len(cells.mask_table) == len(np.unique(expected, axis=0))  # one row per pattern
    counts = prot.to_df().reindex(cells.names).to_numpy()
    np.testing.assert_array_equal(cells.y.numpy(), np.where(expected, counts, 0))


def test_zero_by_chance_in_a_query_is_a_measurement():
    """A few cells in which a protein happens to be zero keep the panel that was seen in the fit."""
    mdata = cite()
    setup = find_setup(mdata, proteins=True, batch_key="batch")
    few = mdata[mdata["prot"].obs_names[:4]].copy()
    few["prot"].X[:, 0] = 0
    cells = read_cells(few, setup)
    row = {name: np.array(measured) for name, measured in zip(setup.panels, setup.measured, strict=True)}
    for name, measured in zip(cells.names, cells.measured.numpy(), strict=True):
        np.testing.assert_array_equal(measured, row[few.obs.loc[name, "batch"]] & ~np.isnan(few["prot"][name].X[0]))
    assert cells.measured[:, 0].all()


def test_a_panel_that_the_model_has_not_seen_is_worked_out():
    """The rules of the fit hold for it: NaN, declared, zero throughout."""
    mdata = cite()
    setup = find_setup(mdata, proteins=True, panel_key="panel")
    query = mdata.copy()
    query.obs["panel"] = "new"
    query["prot"].X[:, 0] = 0
    query["prot"].X[:, 1] = NAN
    cells = read_cells(query, setup)
    stained = np.isin(cells.names, query["prot"].obs_names)
    assert not cells.measured[:, :2].any() and not cells.measured[~stained].any()
    assert cells.measured[stained][:, 2:].any(0).all()


def test_panels_that_name_none_are_told():
    mdata = cite(60)
    with pytest.raises(ValueError, match="panels={} names no panel"):
        av.pp.panels(mdata, "batch", panels={})
    assert "measured" not in mdata["prot"].varm


def test_no_protein_measured_at_all():
    mdata = cite()
    mdata["prot"].X[:] = 0
    with pytest.raises(ValueError, match=r"No protein was measured.*tl\.scvi or tl\.scanvi"):
        find_setup(mdata, proteins=True)
    assert find_setup(mdata, proteins=True, missing="nan").proteins
