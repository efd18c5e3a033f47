"""Which genes a fit takes: those of var["highly_variable"], all, or a list; and what later verbs make of the choice."""

import json
import logging
import re
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from helpers import with_peak
from scipy import sparse

import anvi as av
from anvi.__main__ import main
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup

N_GENES, CHOSEN = 60, 25


@pytest.fixture
def mdata():
    mdata = av.datasets.synthetic_cite(300, n_genes=N_GENES)
    rng = np.random.default_rng(0)
    mdata["rna"].var["highly_variable"] = np.isin(np.arange(N_GENES), rng.permutation(N_GENES)[:CHOSEN])
    return mdata


def variable(mdata) -> list[str]:
    return list(mdata["rna"].var_names[mdata["rna"].var["highly_variable"]])


def only(mdata, genes):
    """The same object without the other genes."""
    out = mdata.copy()
    out.mod["rna"] = out["rna"][:, list(genes)].copy()
    out.update()
    return out


@pytest.mark.parametrize("name", ["scvi", "scanvi", "totalvi", "totalanvi"])
def test_a_fit_on_chosen_genes_is_the_fit_of_an_object_that_has_no_others(mdata, name):
    alone = only(mdata, variable(mdata))
    for data in (mdata, alone):
        getattr(av.tl, name)(data, batch_key="batch", max_epochs=2)
    model = av.get.model(mdata)
    assert model.setup.genes == tuple(variable(mdata)) and model.info["genes"] == "highly_variable"
    assert model.fingerprint() == av.get.model(alone).fingerprint()  # bit for bit
    assert av.get.model(alone).info["genes"] == "all"


def test_what_is_taken_is_said_in_one_line(mdata, caplog):
    with caplog.at_level(logging.INFO, "anvi"), av.settings.override(verbosity=1):
        av.tl.scvi(mdata, max_epochs=1)
    (line,) = [line for line in caplog.messages if "genes" in line]
    assert f"{CHOSEN} of {N_GENES} genes: those of var['highly_variable'] (genes='all' takes all)" in line
    assert line.replace("300 cells, ", "") in av.pp.check(mdata).facts


def test_all_and_a_list(mdata):
    names = list(mdata["rna"].var_names)
    assert find_setup(mdata, proteins=False, genes="all").genes == tuple(names)
    assert find_setup(mdata, proteins=False, genes=[names[7], names[2]]).genes == (names[2], names[7])
    assert find_setup(mdata, proteins=False, genes="highly_variable").genes == tuple(variable(mdata))
    av.tl.scvi(mdata, genes=names[:9], max_epochs=1)
    assert av.get.model(mdata).info["genes"] == "listed" and len(av.get.model(mdata).setup.genes) == 9


@pytest.mark.parametrize(
    "column",
    [
        pd.Series([True, None] * 30, dtype="boolean"),
        pd.Series([True, np.nan] * 30, dtype=object),
        pd.Series([True, False] * 30, dtype="category"),
        pd.Series([1, 0] * 30),
    ],
    ids=["nullable", "outer join", "categorical", "integers"],
)
def test_columns_of_other_types_that_say_yes_and_no(mdata, column):
    mdata["rna"].var["highly_variable"] = column.to_numpy() if column.dtype == object else column.array
    assert find_setup(mdata, proteins=False).genes == tuple(mdata["rna"].var_names[::2])


@pytest.mark.parametrize(
    ("genes", "column", "error", "message"),
    [
        ("hvg", None, ValueError, "genes='hvg' is not one of 'auto', 'highly_variable', 'all'"),
        (["G001", "G0002"], None, KeyError, r"genes: 1 are not in mdata\['rna'\].*'G0002'.*Did you mean 'G002'"),
        ([], None, ValueError, r"genes(=\[\])? names none; (leave it out for genes='auto'|genes='all' takes all 60)"),
        ("auto", [False] * N_GENES, ValueError, r"marks no gene; genes='all'"),
        ("auto", ["True"] * N_GENES, ValueError, "holds 'True': it must say True or False"),
        ("auto", np.linspace(0, 1, N_GENES), ValueError, "it must say True or False"),
    ],
)
def test_what_cannot_be_meant(mdata, no_training, genes, column, error, message):
    if column is not None:
        mdata["rna"].var["highly_variable"] = column
    with pytest.raises(error, match=message):
        av.tl.totalanvi(mdata, genes=genes)
    (problem,) = av.pp.check(mdata, genes=genes).problems
    assert re.search(message, problem)


def test_the_advice_for_a_missing_column_can_be_followed(mdata):
    del mdata["rna"].var["highly_variable"]
    assert len(find_setup(mdata, proteins=False).genes) == N_GENES  # "auto" does without
    with pytest.raises(KeyError, match="there is no") as found:
        find_setup(mdata, proteins=False, genes="highly_variable")
    command = re.search(r"sc\.\S+\(.*?\)", str(found.value)).group().replace("4000", "10")
    exec(command, {"sc": sc, "mdata": mdata})
    assert len(find_setup(mdata, proteins=False, genes="highly_variable").genes) == 10


def test_parity_takes_all_genes_as_scvi_tools_does(mdata):
    av.tl.scvi(mdata, objective="scvi-tools", max_epochs=1)
    assert len(av.get.model(mdata).setup.genes) == N_GENES
    av.tl.scvi(mdata, objective="scvi-tools", genes="highly_variable", max_epochs=1)
    assert len(av.get.model(mdata).setup.genes) == CHOSEN


def test_a_fit_that_starts_from_a_model_has_its_genes(mdata):
    av.tl.totalvi(mdata, genes="all", max_epochs=1)
    av.tl.totalanvi(mdata, init="totalvi", max_epochs=1)
    assert len(av.get.model(mdata, "totalanvi").setup.genes) == N_GENES
    with pytest.raises(ValueError, match="init= needs a model of the same genes"):
        av.tl.totalanvi(mdata, init="totalvi", genes="highly_variable", max_epochs=1)


def test_questions_are_about_the_models_genes_and_others_are_missing(mdata):
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    rna, inside = mdata["rna"], mdata["rna"].var["highly_variable"].to_numpy()
    av.tl.differential_expression(mdata, "true_cell_type", n_samples=100)
    assert set(av.get.de(mdata, modality="rna")["names"]) == set(variable(mdata))
    sc.pl.rank_genes_groups_dotplot(rna, n_genes=2, dendrogram=False, show=False)
    av.tl.attributions(mdata, n_cells=10)
    assert np.array_equal(rna.varm["totalanvi_attributions"].notna().any(axis=1), inside)
    av.pl.attributions(mdata, show=False)
    av.tl.denoise(mdata)
    assert np.array_equal(np.isfinite(rna.layers["totalanvi_denoised"]).all(0), inside)
    assert list(av.get.denoised(mdata).columns[:CHOSEN]) == variable(mdata)
    av.tl.feature_correlation(mdata, n_samples=2)
    assert np.isfinite(mdata.varp["totalanvi_correlation"]).any(0)[:N_GENES].tolist() == inside.tolist()
    with pytest.raises(KeyError, match="the model has no"):
        av.tl.denoise(mdata, features=[rna.var_names[~inside][0]])


def test_queries_need_no_such_column_and_cells_may_have_other_genes(mdata):
    query = only(mdata, variable(mdata))[:100].copy()
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    new = mdata[:50].copy()
    new["rna"].var["highly_variable"] = ~new["rna"].var["highly_variable"]  # of another data set
    av.tl.predict(new, model=av.get.model(mdata))
    whole = av.get.table(mdata, "totalanvi_proba").loc[new.obs_names]
    np.testing.assert_allclose(new.obsm["totalanvi_proba"], whole, atol=1e-5)
    av.tl.map_query(query, mdata, max_epochs=1)
    assert query.uns["totalanvi"]["reference"]["genes_matched"] == 100


def test_minified_data_keep_their_answers(mdata):
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    before = av.tl.denoise(mdata, inplace=False)
    av.tl.minify(mdata)
    after = av.tl.denoise(mdata, inplace=False)
    for mod in before:
        np.testing.assert_allclose(after[mod], before[mod], rtol=1e-3, atol=1e-5)


def test_leaving_a_type_out_fits_the_same_genes(mdata, monkeypatch):
    import importlib

    module, seen = importlib.import_module("anvi.metrics.novelty"), {}

    def spy(*args, **kwargs):
        seen.update(kwargs)
        raise RuntimeError

    av.tl.scanvi(mdata, max_epochs=1)
    mdata["rna"].var["highly_variable"] = ~mdata["rna"].var["highly_variable"]
    monkeypatch.setattr(module, "run_fit", spy)
    with pytest.raises(RuntimeError):
        av.metrics.novelty(mdata, classes=["B"])
    assert seen["genes"] == av.get.model(mdata).setup.genes


def test_a_checkpoint_of_other_genes_is_refused(mdata, tmp_path):
    av.tl.scvi(mdata, max_epochs=1, checkpoint=tmp_path / "fit.safetensors")
    with pytest.raises(ValueError, match="another fit"):
        av.tl.scvi(mdata, max_epochs=1, genes="all", checkpoint=tmp_path / "fit.safetensors")


def test_cells_without_a_count_of_the_chosen_genes_and_the_advice_for_them(mdata, no_training):
    rna = mdata["rna"]
    counts = sparse.csr_matrix(rna.X).toarray()
    counts[3, rna.var["highly_variable"].to_numpy()] = 0
    rna.X = sparse.csr_matrix(counts)
    with pytest.raises(ValueError, match=r"1 cells without a single count in the genes of the model") as found:
        av.tl.totalanvi(mdata)
    names = {"mdata": mdata, "numpy": np}
    exec(str(found.value).partition("leave these cells out: ")[2], names)
    assert rna.obs_names[3] not in names["mdata"].obs_names and names["mdata"].n_obs == 299
    assert av.pp.check(names["mdata"]).ok


def test_many_genes_and_few_cells_are_told_and_the_advice_works(caplog):
    counts = sparse.random(60, 10_500, 0.02, "csr", dtype=np.float32, random_state=0)
    counts.data = np.ceil(counts.data * 3)
    adata = AnnData(counts, layers={"counts": counts.copy()})
    adata.obs_names, adata.var_names = [f"c{i}" for i in range(60)], [f"g{i}" for i in range(10_500)]
    with caplog.at_level(logging.WARNING, "anvi"):
        av.tl.scvi(adata, layer="counts", max_epochs=1, n_hidden=8)
    (told,) = [line for line in caplog.messages if "10500 genes are many for 60 cells" in line]
    (note,) = av.pp.check(adata, labels_key=None, layer="counts").notes
    assert note == told
    exec(told.rpartition("themselves: ")[2], {"sc": sc, "adata": adata})
    assert av.pp.check(adata, labels_key=None, layer="counts").notes == []
    assert len(find_setup(adata, proteins=False, layer="counts").genes) == 4000


def test_of_other_genes_nothing_is_copied():
    counts = sparse.random(2_000, 3_000, 0.2, "csr", dtype=np.float32, random_state=0)
    counts.data[:] = 1
    adata = AnnData(counts.astype(np.float64))  # of another precision, so that all would be copied
    adata.var["highly_variable"] = np.arange(3_000) % 30 == 0
    setup = find_setup(adata, proteins=False)
    cells, peak = with_peak(lambda: read_cells(adata, setup))
    assert cells.x.n_columns == 100
    assert peak < adata.X.data.nbytes / 2


def test_the_command_line_takes_a_word_or_names(mdata, tmp_path, capsys):
    mdata.write(tmp_path / "in.h5mu")

    def facts(*options: str) -> str:
        main(["check", str(tmp_path / "in.h5mu"), "--json", *options])
        return " ".join(json.loads(capsys.readouterr().out)["facts"])

    assert f"{CHOSEN} of {N_GENES} genes" in facts()
    assert f"all {N_GENES} genes" in facts("--genes", "all")
    assert f"2 of {N_GENES} genes: those that genes= names" in facts("--genes", "G001", "G002")
    assert f"1 of {N_GENES} genes" in facts("--genes", "G001")


def test_the_page_on_what_comes_before_a_fit_works_as_it_stands(tmp_path, monkeypatch, capsys):
    """Its commands, in their order, from a file as Cell Ranger writes it to an object that is ready to fit."""
    page = Path(__file__).parents[1] / "docs" / "preprocessing.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    write_10x(tmp_path / "filtered_feature_bc_matrix.h5")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    mdata = names["mdata"]
    assert 0 < mdata["rna"].var["highly_variable"].sum() <= mdata["rna"].n_vars
    assert mdata.n_obs == 299  # one is debris
    assert capsys.readouterr().out.endswith("ready to fit\n")
    av.tl.totalvi(mdata, layer={"rna": "counts"}, max_epochs=1)


def write_10x(path: Path) -> None:
    """A file in the third format of Cell Ranger: 300 genes and 20 antibodies, one cell of which is debris."""
    mdata = av.datasets.synthetic_cite(300, n_genes=300, missing="zero", rna_only_batch=False)
    prot = np.nan_to_num(mdata["prot"].to_df().reindex(mdata.obs_names).to_numpy())
    genes = sparse.csr_matrix(mdata["rna"].X).toarray() * 4 + 1
    genes[5, 20:] = 0
    counts = sparse.csr_matrix(np.concatenate([genes, prot], axis=1), dtype=np.int32)  # (cells, features)
    names = [*mdata["rna"].var_names, *(f"{name}_TotalSeqB" for name in mdata["prot"].var_names)]
    kinds = ["Gene Expression"] * 300 + ["Antibody Capture"] * mdata["prot"].n_vars
    with h5py.File(path, "w") as file:
        matrix, features = file.create_group("matrix"), file.create_group("matrix/features")
        for name in ("data", "indices", "indptr"):
            matrix[name] = getattr(counts, name)
        matrix["shape"] = counts.shape[::-1]
        matrix["barcodes"] = np.array(list(mdata.obs_names), dtype="S")
        for name, values in (("id", names), ("name", names), ("feature_type", kinds), ("genome", ["x"] * len(names))):
            features[name] = np.array(values, dtype="S")
