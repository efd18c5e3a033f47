"""Questions about counts that stay in their file: the answers of memory, bit for bit, in few passes, little memory."""

import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from helpers import cite, mudata_of, quiet_mudata, with_peak
from scipy import sparse

import anvi as av
from anvi import _stream
from anvi._backed import open_backed
from anvi._data import containers
from anvi._data.cells import read_cells
from anvi._posterior import attribute, differential, encode

pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Cannot join columns"),
]
N = 240
KINDS = ["data.h5mu", "dense.h5mu", "data.zarr", "genes.h5mu"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of about 40 rows, chunks of cells that end elsewhere."""
    monkeypatch.setattr(containers, "PIECE", 800)
    monkeypatch.setattr(_stream, "KEPT", 128)
    monkeypatch.setattr(encode, "CHUNK", 64)
    monkeypatch.setattr(differential, "CHUNK", 64)
    monkeypatch.setattr(encode, "NOISE_BLOCK", 32)
    monkeypatch.setattr("anvi._posterior.predictive.NOISE_BLOCK", 32)
    monkeypatch.setattr(attribute, "BLOCK", 32)


@pytest.fixture(scope="module")
def fitted():
    """A fitted object; some of its cells have no RNA, some no proteins."""
    mdata = cite(N, n_genes=40, n_proteins=12)
    rna = mdata["rna"]
    rna.X = sparse.csr_matrix(rna.X)
    kept = np.sort(rna.obs_names)[:-20]
    with quiet_mudata():
        mdata = mudata_of(
            {"rna": rna[kept].copy(), "prot": mdata["prot"][np.sort(mdata["prot"].obs_names)].copy()}, mdata
        )
        options = {"labels_key": "true_cell_type", "max_epochs": 30, "n_hidden": 16, "lr": 2e-2}
        av.tl.totalanvi(mdata, batch_key="batch", **options)
    alone = ~mdata.obs_names.isin(mdata["rna"].obs_names)
    assert 0 < alone.sum() < 20
    return mdata


@pytest.fixture(scope="module")
def stored(fitted, tmp_path_factory):
    """The object in files of several kinds, which nobody writes to."""
    folder = tmp_path_factory.mktemp("stored")
    mdata = fitted.copy()
    with quiet_mudata():
        mdata.write_h5mu(folder / "data.h5mu", compression="gzip")
        mdata.write_zarr(folder / "data.zarr")
        for name, values in (("data", mdata["rna"].X.data), ("indices", mdata["rna"].X.indices)):
            group = zarr.open_group(str(folder / "data.zarr"), mode="r+")["mod/rna/X"]
            del group[name]
            (getattr(group, "create_array", None) or group.create_dataset)(name, data=values, chunks=(300,))
        rna = mdata["rna"]
        more = sparse.random(rna.n_obs, 7, 0.5, "csr", dtype=np.float32, random_state=0)
        other = anndata.AnnData(
            sparse.hstack([rna.X, more], "csr"),
            obs=rna.obs,
            var=pd.DataFrame(index=[*rna.var_names, *(f"other {i}" for i in range(7))]),
        )
        turned = np.random.default_rng(1).permutation(other.n_vars)
        more_genes = mudata_of({"rna": other[:, turned].copy(), "prot": mdata["prot"]}, mdata)
        more_genes.uns.update(mdata.uns)
        more_genes.write_h5mu(folder / "genes.h5mu")
        mdata["rna"].X = mdata["rna"].X.toarray()
        mdata.write_h5mu(folder / "dense.h5mu")
    with h5py.File(folder / "dense.h5mu", "r+") as file:
        values, attributes = file["mod/rna/X"][:], dict(file["mod/rna/X"].attrs)
        del file["mod/rna/X"]
        file.create_dataset("mod/rna/X", data=values, chunks=(20, 40), compression="gzip").attrs.update(attributes)
    return folder


def ask(name: str, data, model, tmp_path: Path):
    """What a verb answers about an object."""
    few = {"model": model, "random_state": 3}
    return {
        "latent": lambda: av.tl.latent(data, model=model, inplace=False),
        "latent samples": lambda: av.tl.latent(data, n_samples=2, **few),
        "predict": lambda: av.tl.predict(data, model=model, inplace=False),
        "predict samples": lambda: av.tl.predict(data, use_posterior_mean=False, inplace=False, **few),
        "denoise": lambda: av.tl.denoise(data, features=["G001", "P02", "G030"], **few),
        "denoise as in": lambda: av.tl.denoise(
            data, features=["G001", "P02"], transform_batch="all", n_samples=2, library_size="observed", **few
        ),
        "impute": lambda: av.tl.denoise(data, modality="prot", inplace=False, **few),
        "foreground": lambda: av.tl.foreground(data, inplace=False, **few),
        "attributions": lambda: av.tl.attributions(data, n_steps=4, n_cells=9, per_cell=True, inplace=False, **few),
        "attributions of all": lambda: av.tl.attributions(
            data, groupby="batch", baseline="batch_1", n_cells=None, n_steps=2, inplace=False, **few
        ),
        "expected gradients": lambda: av.tl.attributions(data, n_steps=4, n_cells=5, baseline=3, inplace=False, **few),
        "differential": lambda: av.tl.differential_expression(
            data, groupby="true_cell_type", n_samples=100, inplace=False, **few
        ),
        "importance": lambda: av.tl.differential_expression(
            data, groupby="true_cell_type", n_samples=50, weights="importance", inplace=False, **few
        ),
        "differential as scvi": lambda: av.tl.differential_expression(
            data, groupby="true_cell_type", groups=["B", "NK"], n_samples=9, pseudocounts="scvi", inplace=False, **few
        ),
        "correlation": lambda: av.tl.feature_correlation(data, n_samples=2, inplace=False, **few),
        "draws": lambda: av.tl.posterior_predictive(data, n_samples=2, **few),
        "draws in a store": lambda: av.tl.posterior_predictive(
            data, n_samples=2, out=tmp_path / f"{id(data)}.zarr", **few
        ).load(),
        "criticism": lambda: av.metrics.criticism(data, n_samples=3, groupby="true_cell_type", inplace=False, **few),
        "elbo": lambda: av.metrics.elbo(data, per_cell=True, n_samples=2, **few),
        "likelihood": lambda: av.metrics.marginal_likelihood(data, per_cell=True, n_samples=2, **few),
        "parameters": lambda: av.get.likelihood_parameters(data, model=model),
        "library": lambda: av.get.library_size(data, model=model),
    }[name]()


PASSES = {
    "attributions of all": 2,  # what they are compared with must be known before the first is explained
}
"""Passes over the file, at most; of all others 1."""
VERBS = [
    *("latent", "latent samples", "predict", "predict samples", "denoise", "denoise as in", "impute", "foreground"),
    *(
        "attributions",
        "expected gradients",
        "differential",
        "importance",
        "differential as scvi",
        "correlation",
        "draws",
        "draws in a store",
    ),
    *("criticism", "elbo", "likelihood", "parameters", "library"),
]


def same(one, other, rtol: float = 0.0) -> None:
    """Raise unless two answers are the same, bit for bit or nearly."""
    assert type(one) is type(other)
    close = {"check_exact": True} if not rtol else {"rtol": rtol, "atol": rtol}
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key], rtol)
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, **close)
    elif isinstance(one, pd.Series):
        pd.testing.assert_series_equal(one, other, **close)
    elif isinstance(one, xr.Dataset | xr.DataArray):
        one = one.sel({dim: other[dim] for dim in other.coords if dim.endswith("_var")})
        xr.testing.assert_identical(one, other) if not rtol else xr.testing.assert_allclose(one, other, rtol, rtol)
    elif isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            same(a, b, rtol)
    else:
        np.testing.assert_allclose(one, other, rtol, rtol)


def reading(monkeypatch) -> list[slice]:
    """Rows that are read from a file from now on."""
    original, seen = containers.row_reader, []

    def reader(matrix, where, indptr):
        read = original(matrix, where, indptr)
        return lambda rows: (seen.append(rows) if where.startswith(("mdata['rna']", "data.X")) else None, read(rows))[1]

    monkeypatch.setattr(containers, "row_reader", reader)
    return seen


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_memory(fitted, stored, tmp_path, monkeypatch, verb, kind):
    expected = ask(verb, fitted, av.get.model(fitted), tmp_path)
    data, seen = open_backed(stored / kind), reading(monkeypatch)
    same(ask(verb, data, av.get.model(fitted), tmp_path), expected)
    n_read = sum(rows.stop - rows.start for rows in seen)
    assert len({rows.start for rows in seen}) >= 4
    assert n_read <= PASSES.get(verb, 1) * fitted["rna"].n_obs, n_read / fitted["rna"].n_obs


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("correlation", "criticism")])
def test_a_file_in_another_order(fitted, tmp_path, monkeypatch, verb):
    """The same cells are drawn, with the same noise; sums of float32 come in another order."""
    order = np.random.default_rng(0).permutation(fitted["rna"].n_obs)
    with quiet_mudata():
        mdata = mudata_of({"rna": fitted["rna"][order].copy(), "prot": fitted["prot"]}, fitted)
        mdata.uns.update(fitted.uns)
        mdata.write_h5mu(tmp_path / "other.h5mu")
    seen = reading(monkeypatch)
    found = ask(verb, open_backed(tmp_path / "other.h5mu"), av.get.model(fitted), tmp_path)
    assert sum(rows.stop - rows.start for rows in seen) <= PASSES.get(verb, 1) * mdata["rna"].n_obs
    same(found, ask(verb, mdata, av.get.model(fitted), tmp_path), 5e-3)


def test_counts_of_groups_are_those_of_the_cells_that_have_any(fitted):
    """By pandas; some cells have no RNA, some no proteins, and are in no mean of these."""
    found = av.tl.differential_expression(fitted, "true_cell_type", n_samples=20, inplace=False)
    kind, n_lacking = fitted.obs["true_cell_type"], 0
    for mod in ("rna", "prot"):
        counts = fitted[mod].to_df()
        if mod == "prot":
            counts = counts.where(read_cells_measured(fitted).reindex(counts.index)[counts.columns])
        table = found[mod].set_index(["group", "names"])
        for group in kind.unique():
            for side, names in (("group", kind.index[kind == group]), ("reference", kind.index[kind != group])):
                own = counts.reindex(names.intersection(counts.index))
                n_lacking += len(names) - len(own)
                rows = table.loc[group].reindex(counts.columns)
                np.testing.assert_allclose(rows[f"count_{side}"], own.mean(), rtol=1e-5)
                np.testing.assert_allclose(rows[f"pct_nz_{side}"], (own > 0).sum() / own.notna().sum(), rtol=1e-5)
    assert n_lacking


@pytest.mark.parametrize("baseline", ["each", 3])
def test_cells_without_rna_are_no_baseline(fitted, baseline):
    """Attributions are those of an object in which such cells never were."""
    alone = ~fitted.obs_names.isin(fitted["rna"].obs_names)
    options = {"n_cells": None, "n_steps": 2, "inplace": False, "model": av.get.model(fitted)}
    fitted.obs["alone"] = np.where(alone, "yes", "no")
    with pytest.raises(ValueError, match="baseline: there is no cell with RNA in the group 'yes'"):
        av.tl.attributions(fitted, groupby="alone", baseline="yes", **options)
    found = av.tl.attributions(fitted, baseline=baseline, **options)
    assert not found["rna"].sel({"class": found["class"][found["n_cells"].values > 0]}).isnull().any()
    if baseline == "each":
        with quiet_mudata():
            without = fitted[~alone].copy()
        xr.testing.assert_allclose(found["rna"], av.tl.attributions(without, **options)["rna"], 1e-4, 1e-5)


def read_cells_measured(mdata) -> pd.DataFrame:
    """Which proteins of which cells were measured."""
    model = av.get.model(mdata)
    cells = read_cells(mdata, model.setup)
    return pd.DataFrame(cells.measured.numpy(), cells.names, list(model.setup.proteins))


@pytest.mark.parametrize("verb", ["latent", "denoise", "draws", "differential"])
def test_a_view_and_an_anndata(fitted, stored, tmp_path, verb):
    model = av.get.model(fitted)
    few = fitted["rna"].obs_names[20:170:2]
    with quiet_mudata():
        same(
            ask(verb, open_backed(stored / "data.h5mu")[few], model, tmp_path), ask(verb, fitted[few], model, tmp_path)
        )
    rna = fitted["rna"].copy()
    rna.obs["batch"], rna.obs["true_cell_type"] = fitted.obs["batch"], fitted.obs["true_cell_type"]
    rna.write_h5ad(tmp_path / "rna.h5ad")
    same(ask(verb, open_backed(tmp_path / "rna.h5ad"), model, tmp_path), ask(verb, rna, model, tmp_path))


def spoilt(stored, tmp_path, change) -> Path:
    """The file with other counts."""
    path = Path(shutil.copy(stored / "data.h5mu", tmp_path / "spoilt.h5mu"))
    with h5py.File(path, "r+") as file:
        change(file["mod/rna/X"])
    return path


def half(x):
    x["data"][-1] = 0.5


def negative(x):
    x["data"][-1] = -1


def empty(x):
    x["data"][x["indptr"][-2] :] = 0


def beside(x):
    x["indices"][-1] = 10**6


@pytest.mark.parametrize("verb", VERBS)
def test_a_bad_count_is_an_error_of_every_verb(fitted, stored, tmp_path, verb):
    path = spoilt(stored, tmp_path, half)
    with pytest.raises(ValueError, match=r"mdata\['rna'\].X holds non-integer values .* 0.5 at cell"):
        ask(verb, open_backed(path), av.get.model(fitted), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["spoilt.h5mu"]


@pytest.mark.parametrize(
    "change, match",
    [
        (negative, "holds negative values"),
        (empty, "has 1 cells without a single count"),
        (beside, "is corrupt: it has an entry at place 1000000"),
    ],
)
def test_every_check_of_memory_comes_before_anything_is_written(fitted, stored, tmp_path, change, match):
    path = spoilt(stored, tmp_path, change)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        av.tl.predict(path, model=av.get.model(fitted))
    assert path.read_bytes() == before
    data = open_backed(path)
    before = data.obsm["X_totalanvi"]
    with pytest.raises(ValueError, match=match):
        av.tl.latent(data, model=av.get.model(fitted))
    assert data.obsm["X_totalanvi"] is before


def test_a_file_that_changes_between_passes(fitted, stored, tmp_path, monkeypatch):
    original, times = containers.row_reader, []

    def reader(matrix, where, indptr):
        def read(rows):
            piece = original(matrix, where, indptr)(rows)
            times.append(rows.start)
            if where == "mdata['rna'].X" and times.count(rows.start) == 2:
                piece.data[0] += 1
            return piece

        return read

    monkeypatch.setattr(containers, "row_reader", reader)
    with pytest.raises(ValueError, match="is not what it was when this began"):
        ask("attributions of all", open_backed(stored / "data.h5mu"), av.get.model(fitted), tmp_path)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Files of few and of many cells with many counts each, and a model."""
    folder = tmp_path_factory.mktemp("wide")
    counts = sparse.random(1_500, 400, 0.5, "csr", dtype=np.float32, random_state=0)
    counts.data = np.random.default_rng(0).poisson(1, counts.nnz).astype(np.float32) + 1
    names = [f"gene {i}" for i in range(400)]
    small = anndata.AnnData(counts, var=pd.DataFrame(index=names))
    small.obs["cell_type"] = np.array(["a", "b", "c"])[np.arange(1_500) % 3]
    av.tl.scanvi(small, labels_key="cell_type", max_epochs=1, n_hidden=8, n_latent=4)
    model = av.get.model(small)
    paths = []
    for times in (1, 4):
        data = anndata.AnnData(sparse.vstack([counts] * times, "csr"), var=small.var)
        data.obs["cell_type"] = np.array(["a", "b", "c"])[np.arange(data.n_obs) % 3]
        data.write_h5ad(path := folder / f"{times}.h5ad")
        paths.append(path)
    return paths, model


@pytest.mark.parametrize("verb", ["latent", "predict", "denoise", "attributions", "differential", "criticism", "draws"])
def test_memory_does_not_grow_with_the_counts(wide, tmp_path, monkeypatch, verb):
    monkeypatch.setattr(containers, "PIECE", 40_000)
    (few, many), model = wide
    ask_about = {
        "latent": lambda data: av.tl.latent(data, model=model, inplace=False),
        "predict": lambda data: av.tl.predict(data, model=model),
        "denoise": lambda data: av.tl.denoise(data, model=model, features=["gene 3", "gene 5"]),
        "attributions": lambda data: av.tl.attributions(data, model=model, n_cells=5, n_steps=2, baseline="zero"),
        "differential": lambda data: av.tl.differential_expression(
            data, model=model, groupby="cell_type", n_samples=50, inplace=False
        ),
        "criticism": lambda data: av.metrics.criticism(
            data, model=model, groupby="cell_type", n_samples=2, max_cells=20, inplace=False
        ),
        "draws": lambda data: av.tl.posterior_predictive(
            data, model=model, n_samples=1, features=["gene 3"], out=tmp_path / f"{data.n_obs}.zarr"
        ),
    }[verb]
    ask_about(open_backed(few))  # what is imported and cached
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    _, first = with_peak(lambda: ask_about(open_backed(few)))
    _, second = with_peak(lambda: ask_about(open_backed(many)))
    per_cell = (second - first) / 4_500
    assert per_cell < 350, per_cell  # bytes, of names, codes and answers; compact counts alone take 600
