import logging
from dataclasses import replace
from functools import cache

import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import cite, dense, mudata_of, permuted, quiet_mudata
from scipy import sparse

import anvi as av
from anvi._data import containers
from anvi._data.batches import take
from anvi._data.cells import CSR, Cells, read_cells
from anvi._data.containers import compact
from anvi._data.setup import find_setup
from anvi.tl import _fit


@pytest.fixture(scope="module")
def mdata():
    """Shared by the tests of this file: never written to."""
    return cite()


def read(data, labels=True, **where) -> Cells:
    return read_cells(data, find_setup(data, proteins=where.pop("proteins", True), **where), labels=labels)


def rna_counts(cells: Cells) -> np.ndarray:
    return cells.x.dense(cells.x_row)[0].numpy()


def assert_equal_cells(one: Cells, other: Cells):
    """Raise unless both say the same of every cell, bit for bit."""
    np.testing.assert_array_equal(one.names, other.names)
    np.testing.assert_array_equal(rna_counts(one), rna_counts(other))
    for name in ("y", "measured", "batch", "panel", "codes", "continuous", "log_library", "label"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and torch.equal(a, b), name


# every way in which counts are kept -------------------------------------------------------------------------------

FORMS = {
    "dense": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "layer": lambda x: x,
}
MISSING = ("complete", "nan", "absent", "zero", "declared")


@cache
def grid_source(missing: str, n_proteins: int):
    return cite(
        60,
        n_genes=20,
        n_proteins=n_proteins,
        rna_only_batch=missing != "complete",
        n_panels=1 if missing == "complete" else 2,
        missing=missing if missing in ("nan", "zero") else "absent",
    )


@cache
def grid_reference(missing: str, n_proteins: int) -> Cells:
    return read(grid_data(missing, n_proteins)[0], labels_key="cell_type", batch_key="batch")


def grid_data(missing: str, n_proteins: int, prot_form: str = "dense", rna_form: str = "csr"):
    """A data set with the given kind of missing proteins, in the given forms."""
    source = grid_source(missing, n_proteins)
    rna, prot = source["rna"].copy(), source["prot"].copy()
    if missing == "declared":
        truth = source.uns["truth"]["measured"]
        prot.varm["measured"] = pd.DataFrame(
            {"batch_0": truth["panel_0"], "batch_1": truth["panel_1"], "batch_2": truth["panel_0"]}
        )
        prot.X = np.nan_to_num(prot.X, nan=3.0)  # what was not measured holds nonsense
    for adata, form in ((rna, rna_form), (prot, prot_form)):
        counts = FORMS[form](dense(adata.X))
        if form == "layer":
            adata.layers["raw"], adata.X = counts, np.log1p(counts)
        else:
            adata.X = counts
    layer = {mod: "raw" for mod, form in (("rna", rna_form), ("prot", prot_form)) if form == "layer"}
    return mudata_of({"rna": rna, "prot": prot}, source), layer


@pytest.mark.parametrize("n_proteins", [8, 14])
@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "dense"])
def test_protein_forms_and_missing_proteins(form, missing, n_proteins):
    data, layer = grid_data(missing, n_proteins, prot_form=form)
    cells = read(data, layer=layer, labels_key="cell_type", batch_key="batch")
    assert_equal_cells(cells, grid_reference(missing, n_proteins))


@pytest.mark.parametrize("form", FORMS)
def test_rna_forms(form):
    data, layer = grid_data("absent", 14, rna_form=form)
    cells = read(data, layer=layer, labels_key="cell_type", batch_key="batch")
    assert_equal_cells(cells, grid_reference("absent", 14))


@pytest.mark.parametrize("missing", ["nan", "zero", "declared"])
def test_all_ways_of_saying_not_measured_are_one(missing):
    """Absent cells, NaN, zero panels and a declared table give the same mask and the same counts."""
    assert_equal_cells(grid_reference(missing, 14), grid_reference("absent", 14))


def as_anndata(mdata, kind: str) -> tuple[AnnData, dict]:
    adata = mdata["rna"].copy()
    for name in mdata.obs:
        adata.obs[name] = mdata.obs[name]
    table = mdata["prot"].to_df().reindex(adata.obs_names)
    if kind == "frame":
        adata.obsm["protein"] = table
    else:
        adata.obsm["protein"] = table.to_numpy() if kind == "array" else sparse.csr_matrix(table.fillna(0).to_numpy())
        adata.uns["protein_names"] = list(table.columns)
    return adata, {"prot_obsm": "protein"}


@pytest.mark.parametrize("kind", ["frame", "array"])
def test_anndata_is_read_as_mudata_is(mdata, kind):
    adata, where = as_anndata(mdata, kind)
    keys = {"labels_key": "cell_type", "batch_key": "batch"}
    assert_equal_cells(read(adata, **keys, **where), read(mdata, **keys))


def test_sparse_proteins_in_obsm(mdata):
    dense_one, where = as_anndata(mdata, "array")
    sparse_one, _ = as_anndata(mdata, "sparse")
    dense_one.obsm["protein"] = np.nan_to_num(dense_one.obsm["protein"])
    assert_equal_cells(read(sparse_one, batch_key="batch", **where), read(dense_one, batch_key="batch", **where))


def test_array_without_names_gets_numbers(mdata):
    adata, where = as_anndata(mdata, "array")
    del adata.uns["protein_names"]
    assert find_setup(adata, proteins=True, **where).proteins[:2] == ("protein_0", "protein_1")
    adata.uns["protein_names"] = ["a", "b"]
    with pytest.raises(ValueError, match=r"uns\['protein_names'\] has 2 names for 20 proteins"):
        find_setup(adata, proteins=True, **where)


# against loops ----------------------------------------------------------------------------------------------------


def test_every_cell_against_the_users_object(mdata):
    rng = np.random.default_rng(1)
    data = mudata_of({"rna": permuted(mdata["rna"], 1), "prot": permuted(mdata["prot"], 2)}, mdata)
    data.obs["donor"] = [f"d{i % 3}" for i in range(300)]
    data.obs["percent"] = rng.random(300)
    keys = {"labels_key": "cell_type", "batch_key": "batch", "panel_key": "panel"}
    setup = find_setup(
        data, proteins=True, categorical_covariate_keys=["donor"], continuous_covariate_keys=["percent"], **keys
    )
    cells = read_cells(data, setup, labels=True)
    x = rna_counts(cells)
    assert len(cells) == 300 and sorted(cells.names) == list(cells.names)
    for i, name in enumerate(cells.names):
        counts = dense(data["rna"][name].X)[0]
        np.testing.assert_array_equal(x[i], counts)
        assert cells.log_library[i, 0] == np.float32(np.log(counts.sum(dtype=np.float64)))
        row = data.obs.loc[name]
        assert setup.batches[cells.batch[i]] == row["batch"]
        # the table of covariates: three batches, then three donors
        assert cells.codes[i].tolist() == [setup.batches.index(row["batch"]), 3 + int(row["donor"][1])]
        assert cells.continuous[i].tolist() == [np.float32(row["percent"])]
        label = int(cells.label[i])
        assert (setup.classes[label] if label >= 0 else "Unknown") == row["cell_type"]
        proteins = data["prot"][name].X[0] if name in data["prot"].obs_names else np.full(20, np.nan)
        np.testing.assert_array_equal(cells.measured[i].numpy(), ~np.isnan(proteins))
        np.testing.assert_array_equal(cells.y[i].numpy(), np.nan_to_num(proteins))
        if name in data["prot"].obs_names:
            assert setup.panels[cells.panel[i]] == row["panel"]


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_csr_against_scipy(seed):
    rng = np.random.default_rng(seed)
    matrix = (rng.random((40, 23)) * (rng.random((40, 23)) < 0.2)).astype(np.float32)
    matrix = sparse.csr_matrix(matrix * (rng.random((40, 1)) < 0.8))  # some rows are empty
    csr = CSR(*(torch.from_numpy(part) for part in (matrix.indptr.astype(np.int64), matrix.indices, matrix.data)), 23)
    for rows in (rng.integers(0, 40, 100), np.arange(40)[::-1].copy(), np.array([7]), np.array([], dtype=np.int64)):
        found, entries = csr.dense(torch.from_numpy(rows))
        expected = matrix[rows].toarray()
        np.testing.assert_array_equal(found.numpy(), expected)
        again = np.zeros_like(expected)
        again[entries.row.numpy(), entries.column.numpy()] = entries.count.numpy()
        np.testing.assert_array_equal(again, expected)
        assert found.dtype == torch.float32 and found.shape == (len(rows), 23)


# compact in memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, kind",
    [
        ([], "uint8"),
        ([1, 255], "uint8"),
        ([1, 256], "uint16"),
        ([65_535], "uint16"),
        ([65_536], "float32"),
        ([0.5], "float32"),
        ([-1.0], "float32"),
        ([np.nan], "float32"),
        ([np.inf], "float32"),
    ],
)
@pytest.mark.parametrize("given", ["float32", "float64", "int64"])
def test_counts_take_the_smallest_type_that_holds_them(values, kind, given):
    if given == "int64" and not all(float(value).is_integer() for value in values):
        pytest.skip("no integers")
    array = np.array(values, dtype=given)
    assert compact(array).dtype == kind
    np.testing.assert_array_equal(compact(array), array.astype(np.float32))


@pytest.mark.parametrize("largest, kind", [(255, "uint8"), (300, "uint16"), (40_000, "uint16"), (1e6, "float32")])
def test_cells_are_compact(mdata, largest, kind):
    data = mdata.copy()
    x, y = dense(data["rna"].X).copy(), data["prot"].X.copy()
    x[3, 2] = y[5, 4] = largest
    data["rna"].X, data["prot"].X = sparse.csr_matrix(np.minimum(x, largest)), np.minimum(y, largest)
    cells, kind = read(data), getattr(torch, kind)
    assert (cells.x.indices.dtype, cells.x.values.dtype, cells.y.dtype) == (torch.int16, kind, kind)
    order = data["rna"].obs_names.get_indexer(cells.names)
    np.testing.assert_array_equal(rna_counts(cells), dense(data["rna"].X)[order])
    batch = take(cells, torch.arange(len(cells)))
    assert batch.x.dtype == batch.y.dtype == batch.entries.count.dtype == torch.float32
    assert batch.entries.column.dtype == torch.int64 and batch.y.max() == largest == batch.x.max()


def test_many_genes_have_longer_indices():
    matrix = sparse.csr_matrix(([1.0, 2.0], [40_000, 3], [0, 1, 2]), shape=(2, 40_001))
    cells = read(AnnData(matrix, obs=pd.DataFrame(index=["a", "b"])), proteins=False)
    assert cells.x.indices.dtype == torch.int32
    np.testing.assert_array_equal(rna_counts(cells), matrix.toarray())


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_reading_by_pieces_changes_nothing(mdata, tmp_path, monkeypatch, form, where):
    data = mudata_of({"rna": mdata["rna"].copy(), "prot": mdata["prot"].copy()}, mdata)
    counts = dense(mdata["rna"].X).copy()
    counts[-1, 0] = 1_000  # the type grows on the way
    data["rna"].X = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[form](counts)
    keys = {"labels_key": "cell_type", "batch_key": "batch"}
    whole = read(data, **keys)
    if where == "file":
        with quiet_mudata():
            data.write_h5mu(tmp_path / "data.h5mu", compression="gzip")
            data = mudata.read_h5mu(tmp_path / "data.h5mu", backed="r")
    for piece in (1, 500, 100_000):
        monkeypatch.setattr(containers, "PIECE", piece)
        assert_equal_cells(read(data, **keys), whole)


def test_an_offence_in_a_later_piece_is_found_and_named(mdata, monkeypatch):
    monkeypatch.setattr(containers, "PIECE", 1_000)
    data = mdata.copy()
    x = dense(data["rna"].X).copy()
    x[70, 3] = x[72, 4] = 0.5
    data["rna"].X = x
    named = rf"0.5 at cell '{data['rna'].obs_names[70]}', feature '{data['rna'].var_names[3]}'"
    with pytest.raises(ValueError, match=rf"{named}, and \d more among the first \d+ cells\. "):
        read(data)


@pytest.mark.parametrize(
    "name, likelihood",
    [("scvi", "nb"), ("scvi", "normal"), ("scanvi", "nb"), ("totalvi", "nb"), ("totalanvi", "nb")],
)
def test_fits_of_compact_counts_are_those_of_wide_ones(mdata, monkeypatch, name, likelihood):
    """Bit for bit: everything is widened in the minibatch."""
    data = mdata.copy()
    x, data["prot"].X = dense(data["rna"].X).copy(), np.minimum(data["prot"].X, 400)
    x[0, 0] = data["prot"].X[1, 1] = 400
    data["rna"].X = np.log1p(x) if likelihood == "normal" else x
    options = {"max_epochs": 2, "batch_key": "batch", "gene_likelihood": likelihood, "copy": True}
    compact_fit = getattr(av.tl, name)(data, **options)

    def wide(*args, **kwargs):
        cells = read_cells(*args, **kwargs)
        assert cells.y is None or cells.y.dtype == torch.uint16
        assert cells.x.values.dtype == (torch.float32 if likelihood == "normal" else torch.uint16)
        x = cells.x._replace(indices=cells.x.indices.int(), values=cells.x.values.float())
        return replace(cells, x=x, y=None if cells.y is None else cells.y.float())

    monkeypatch.setattr(_fit, "read_cells", wide)
    wide_fit = getattr(av.tl, name)(data, **options)
    one, other = (av.get.model(fit, name) for fit in (compact_fit, wide_fit))
    pd.testing.assert_frame_equal(one.history, other.history)
    for weight, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[weight]), weight


# order changes nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["rna", "prot", "both", "mdata"])
def test_order_of_rows(mdata, which):
    mods = {name: mdata[name] for name in ("rna", "prot")}
    for i, name in enumerate(mods):
        if which in (name, "both"):
            mods[name] = permuted(mods[name], i)
    shuffled = mudata_of(mods, mdata)
    if which == "mdata":
        shuffled = mdata[np.random.default_rng(3).permutation(300)].copy()
    keys = {"labels_key": "cell_type", "batch_key": "batch"}
    assert_equal_cells(read(shuffled, **keys), read(mdata, **keys))


def test_order_of_modalities(mdata):
    swapped = mudata_of({"prot": mdata["prot"], "rna": mdata["rna"]}, mdata)
    assert_equal_cells(read(swapped, batch_key="batch"), read(mdata, batch_key="batch"))


# numbers and codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        np.arange(300) % 3,
        np.arange(300) % 2 == 0,
        pd.array(np.arange(300) % 3, dtype="Int64"),
        pd.array(np.arange(300) % 2 == 0, dtype="boolean"),
        pd.Categorical(np.arange(300) % 3),
        pd.Categorical((np.arange(300) % 3).astype(str)),
        np.linspace(-1, 1, 300),
    ],
    ids=["int", "bool", "Int64", "boolean", "int category", "text category", "float"],
)
def test_continuous_covariates_of_every_type(mdata, values):
    data = mdata.copy()
    data.obs["k"] = values
    cells = read(data, continuous_covariate_keys=["k"])
    expected = data.obs["k"].astype(float).to_numpy(dtype=np.float32)  # rows are sorted by name already
    np.testing.assert_array_equal(cells.continuous[:, 0].numpy(), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, "high"])
def test_continuous_covariates_must_be_finite_numbers(mdata, bad):
    data = mdata.copy()
    data.obs["k"] = pd.Series([1.0] * 299 + [bad], data.obs_names, dtype=object)
    with pytest.raises(ValueError, match=r"continuous_covariate_keys: 'k' is not a finite number in 1 cells \(first"):
        read(data, continuous_covariate_keys=["k"])


def test_size_factor_takes_the_place_of_the_library(mdata):
    data = mdata.copy()
    data.obs["sf"] = np.linspace(0.5, 2, 300)
    cells = read(data, size_factor_key="sf")
    np.testing.assert_array_equal(cells.log_library[:, 0].numpy(), np.log(np.float32(data.obs["sf"])))
    data.obs.loc[data.obs_names[4], "sf"] = 0
    with pytest.raises(ValueError, match=r"size_factor_key: 'sf' must be positive, cell 'cell_00005' is not"):
        read(data, size_factor_key="sf")


def test_a_single_category_injects_nothing(mdata):
    data = mdata.copy()
    data.obs["one"] = "a"
    assert read(data, categorical_covariate_keys=["one"]).codes is None
    assert read(data, batch_key="batch", categorical_covariate_keys=["one"]).codes.shape == (300, 1)


def test_labels_are_read_when_asked_only(mdata):
    assert (read(mdata, labels=False, labels_key="cell_type").label == -1).all()
    assert (read(mdata, labels_key="cell_type").label >= 0).sum() == 100


# another data set, seen with the eyes of the first -------------------------------------------------------------


def test_genes_by_name(mdata):
    setup = find_setup(mdata, proteins=True, batch_key="batch")
    order = np.random.default_rng(0).permutation(60)
    more = AnnData(np.ones((300, 2), dtype=np.float32), var=pd.DataFrame(index=["X1", "X2"]))
    wider = AnnData(
        sparse.csr_matrix(np.hstack([dense(mdata["rna"].X)[:, order], more.X])),
        obs=pd.DataFrame(index=mdata.obs_names),
        var=pd.DataFrame(index=[*mdata["rna"].var_names[order], *more.var_names]),
    )
    query = mudata_of({"rna": wider, "prot": mdata["prot"]}, mdata)
    assert_equal_cells(read_cells(query, setup), read_cells(mdata, setup))  # the library counts the model's genes only


def test_absent_genes_are_an_error(mdata):
    setup = find_setup(mdata, proteins=False)
    with pytest.raises(
        ValueError, match=r"mdata\['rna'\] lacks 10 of the model's 60 genes \(G001, G002, G003, \.\.\.\)"
    ):
        read_cells(mdata[:, mdata.var_names[10:]].copy(), setup)


def test_proteins_by_name(mdata):
    setup = find_setup(mdata, proteins=True, batch_key="batch")
    order = np.random.default_rng(0).permutation(20)
    query = mudata_of({"rna": mdata["rna"], "prot": mdata["prot"][:, order].copy()}, mdata)
    assert_equal_cells(read_cells(query, setup), read_cells(mdata, setup))


def test_proteins_that_a_query_lacks_are_not_measured(mdata, caplog):
    setup = find_setup(mdata, proteins=True, batch_key="batch")
    query = mudata_of({"rna": mdata["rna"], "prot": mdata["prot"][:, 5:].copy()}, mdata)
    with caplog.at_level(logging.INFO, "anvi"):
        cells, full = read_cells(query, setup), read_cells(mdata, setup)
    assert "5 of the model's 20 proteins are not in mdata['prot'].X: not measured" in caplog.text
    assert not cells.measured[:, :5].any() and not cells.y[:, :5].any()
    assert torch.equal(cells.measured[:, 5:], full.measured[:, 5:]) and torch.equal(cells.y[:, 5:], full.y[:, 5:])


@pytest.mark.parametrize("how", ["no modality", "no cells", "AnnData"])
def test_a_query_without_proteins(mdata, how):
    """No protein modality, one without cells, or RNA alone: all the same."""
    setup = find_setup(mdata, proteins=True, panel_key="panel")
    query = {
        "no modality": lambda: mudata_of({"rna": mdata["rna"]}),
        "no cells": lambda: mudata_of({"rna": mdata["rna"], "prot": mdata["prot"][:0].copy()}, mdata),
        "AnnData": lambda: mdata["rna"],
    }[how]()
    cells = read_cells(query, setup)
    assert cells.y.shape == (300, 20) and not cells.measured.any() and not cells.y.any()
    np.testing.assert_array_equal(rna_counts(cells), rna_counts(read(mdata)))


def test_cells_of_no_known_panel_measured_what_is_not_nan(mdata):
    setup = find_setup(mdata, proteins=True, panel_key="panel")
    query = mdata.copy()
    query.obs["panel"] = None
    cells = read_cells(query, setup)
    counts = mdata["prot"].to_df().reindex(cells.names).to_numpy()
    np.testing.assert_array_equal(cells.measured.numpy(), ~np.isnan(counts))


@pytest.mark.parametrize("key", ["batch_key", "categorical_covariate_keys"])
def test_unknown_categories(mdata, key):
    setup = find_setup(mdata, proteins=False, **{key: "batch" if key == "batch_key" else ["batch"]})
    query = mdata.copy()
    query.obs["batch"] = query.obs["batch"].cat.rename_categories({"batch_1": "new"})
    with pytest.raises(
        ValueError, match=rf"{key}: 'batch' holds 'new', which the model has not seen; it knows 'batch_0'"
    ):
        read_cells(query, setup)
    query.obs["batch"] = query.obs["batch"].cat.remove_categories(["new"])
    with pytest.raises(ValueError, match=f"{key}: 'batch' has no value for .* cells .first: 'cell_.*fill them in"):
        read_cells(query, setup)


# the user's arrays ------------------------------------------------------------------------------------------------


def test_read_only_arrays_are_fine(mdata):
    data = mdata.copy()
    matrix = data["rna"].X
    for array in (matrix.data, matrix.indices, matrix.indptr, data["prot"].X):
        array.flags.writeable = False
    assert_equal_cells(read(data), read(mdata))


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_a_backed_object_is_read(mdata, tmp_path, form):
    data = mudata_of({"rna": mdata["rna"].copy(), "prot": mdata["prot"].copy()}, mdata)
    data["rna"].X = FORMS[form](mdata["rna"].X.toarray())
    with quiet_mudata():
        data.write_h5mu(tmp_path / "data.h5mu")
        backed = mudata.read_h5mu(tmp_path / "data.h5mu", backed="r")
    keys = {"labels_key": "cell_type", "batch_key": "batch"}
    assert_equal_cells(read(backed, **keys), read(mdata, **keys))
    backed.file.close()


def test_moving_keeps_everything(mdata):
    cells = read(mdata, labels_key="cell_type", batch_key="batch")
    assert_equal_cells(cells.to(torch.device("cpu")), cells)
    assert cells.to(torch.device("meta")).y.device.type == "meta"
    assert cells.to(torch.device("meta")).x.values.device.type == "meta"
