"""Objects that stay in their file: every verb on a path or a backed object gives what it gives in memory."""

import inspect
import shutil
from contextlib import nullcontext
from pathlib import Path

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import read_elem, write_elem
from helpers import cite, dense, mudata_of, quiet_mudata, with_peak
from scipy import sparse

import anvi as av
from anvi import _backed
from anvi._backed import in_file, open_backed, save_backed
from anvi._data import containers
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup

pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Cannot join columns"),
]
FIT = {"batch_key": "batch", "max_epochs": 2, "n_hidden": 16}


@pytest.fixture(scope="module")
def mdata():
    """Counts in a layer, X being something else, a graph of cells, and raw; never written to."""
    mdata = cite(200, n_genes=40, n_proteins=12)
    rna = mdata["rna"]
    rna.layers["counts"] = sparse.csr_matrix(rna.X)
    rna.raw = rna.copy()
    rna.obsp["graph"] = sparse.identity(rna.n_obs, format="csr")
    mdata.uns["mine"] = {"a": "b"}
    return mdata


@pytest.fixture(scope="module")
def stored(mdata, tmp_path_factory):
    """The object in files, which nobody writes to."""
    folder = tmp_path_factory.mktemp("stored")
    with quiet_mudata():
        mdata.write_h5mu(folder / "data.h5mu", compression="gzip")
        mdata.write_zarr(folder / "data.zarr")
    return folder


@pytest.fixture(params=["h5mu", "zarr"])
def path(request, stored, tmp_path):
    """The object in a file of one's own."""
    copy = shutil.copytree if request.param == "zarr" else shutil.copy
    return Path(copy(stored / f"data.{request.param}", tmp_path / f"data.{request.param}"))


def read(path):
    with quiet_mudata():
        return mudata.read_zarr(path) if path.suffix == ".zarr" else mudata.read_h5mu(path)


def same(one, other):
    """Raise unless two objects hold the same in all slots of all parts; models but for time and place."""
    assert list(one.mod) == list(other.mod)
    for a, b in ((one, other), *((one[mod], other[mod]) for mod in one.mod)):
        columns = sorted(set(a.obs) & set(b.obs))
        assert set(a.obs) ^ set(b.obs) == set()
        pd.testing.assert_frame_equal(a.obs[columns], b.obs[columns], check_categorical=False)
        for slot in ("obsm", "varm", "obsp", "varp"):
            assert set(getattr(a, slot)) == set(getattr(b, slot)), slot
            for name, value in getattr(a, slot).items():
                theirs = getattr(b, slot)[name]
                if isinstance(value, pd.DataFrame):
                    pd.testing.assert_frame_equal(value, theirs)
                else:
                    np.testing.assert_array_equal(dense(value), dense(theirs))
        assert set(a.uns) == set(b.uns)
    for mod in one.mod:
        np.testing.assert_array_equal(dense(one[mod].X), dense(other[mod].X))
        assert set(one[mod].layers) == set(other[mod].layers)
        for name, value in one[mod].layers.items():
            np.testing.assert_array_equal(dense(value), dense(other[mod].layers[name]))
        if one[mod].raw is not None:  # which mudata does not read from zarr
            np.testing.assert_array_equal(dense(one[mod].raw.X), dense(other[mod].raw.X))


def test_matrices_stay_in_the_file(path, mdata):
    data = open_backed(path)
    assert data.shape == mdata.shape and list(data.mod) == list(mdata.mod)
    assert all(in_file(matrix) for matrix in (data["rna"].X, data["rna"].layers["counts"], data["prot"].X))
    assert in_file(data["rna"].obsp["graph"]) and not in_file(mdata["rna"].X)
    assert data.uns["mine"] == {"a": "b"}


def test_saving_what_was_not_touched_changes_nothing(path, mdata):
    save_backed(open_backed(path))
    same(read(path), mdata)
    assert not list(path.parent.glob(".*"))


def test_compression_is_kept(mdata, tmp_path):
    path, out = tmp_path / "data.h5mu", tmp_path / "out.h5mu"
    with quiet_mudata():
        mdata.write_h5mu(path, compression="lzf")
    save_backed(open_backed(path), out)
    with h5py.File(out) as file:
        assert file["mod/rna/X/data"].compression == file["mod/rna/layers/counts/indices"].compression == "lzf"
        assert out.read_bytes()[:6] == b"MuData" == path.read_bytes()[:6]


@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_a_fit_of_a_path_is_that_of_the_object(path, mdata, name):
    expected = mdata.copy()
    with quiet_mudata():
        getattr(av.tl, name)(expected, layer={"rna": "counts"}, **FIT)
        assert getattr(av.tl, name)(path, layer={"rna": "counts"}, **FIT) is None
        found = read(path)
        same(found, expected)
        one, other = (av.get.model(data, name) for data in (found, expected))
    assert one.history.equals(other.history)
    # and the model in the file answers, from there
    with quiet_mudata():
        latent = av.tl.latent(path, inplace=False)
        av.tl.denoise(path, features=list(mdata["rna"].var_names[:3]))
        av.tl.denoise(expected, features=list(mdata["rna"].var_names[:3]))
    np.testing.assert_array_equal(
        latent, expected.obsm[f"X_{name}"] if name == "totalanvi" else expected["rna"].obsm["X_scanvi"]
    )
    same(read(path), expected)


def test_an_object_opened_by_mudata_or_anndata(mdata, tmp_path):
    expected = mdata.copy()
    with quiet_mudata():
        mdata.write_h5mu(tmp_path / "data.h5mu")
        data = mudata.read_h5mu(tmp_path / "data.h5mu", backed="r")
        for one in (expected, data):
            av.tl.totalanvi(one, **FIT)
        with pytest.raises(ValueError, match="copy=True would read all counts"):
            av.tl.totalanvi(data, copy=True, **FIT)
        save_backed(data, tmp_path / "out.h5mu")
        same(read(tmp_path / "out.h5mu"), expected)
        assert "totalanvi" not in read(tmp_path / "data.h5mu").uns
    rna = mdata["rna"].copy()
    rna.obs["batch"] = mdata.obs["batch"]
    rna.write_h5ad(tmp_path / "data.h5ad")
    backed = anndata.read_h5ad(tmp_path / "data.h5ad", backed="r")
    for one in (rna, backed, tmp_path / "data.h5ad"):
        av.tl.scvi(one, **FIT)
    save_backed(backed, tmp_path / "out.h5ad")
    for file in ("data.h5ad", "out.h5ad"):
        found = anndata.read_h5ad(tmp_path / file)
        np.testing.assert_array_equal(found.obsm["X_scvi"], rna.obsm["X_scvi"])
        np.testing.assert_array_equal(dense(found.raw.X), dense(rna.raw.X))


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_reading_takes_the_memory_of_a_block_and_of_what_is_kept(tmp_path, monkeypatch, form):
    counts = sparse.random(20_000, 300, 0.2, "csr", dtype=np.float32, random_state=0)
    counts.data[:] = 1
    counts = sparse.hstack([sparse.csr_matrix(np.ones((20_000, 1), np.float32)), counts[:, 1:]], "csr")  # none is empty
    data = anndata.AnnData({"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[form])
    data.var["highly_variable"] = np.arange(300) % 10 == 0
    data.write_h5ad(tmp_path / "data.h5ad", compression="lzf")
    n_bytes = counts.data.nbytes + counts.indices.nbytes  # 9.6 MB; a tenth of it is kept
    del data, counts
    monkeypatch.setattr(containers, "PIECE", 50_000)
    data = open_backed(tmp_path / "data.h5ad")
    setup = find_setup(data, proteins=False)
    cells, peak = with_peak(lambda: read_cells(data, setup))
    assert cells.x.n_columns == 30 and len(cells.x.values) == pytest.approx((0.2 * 29 + 1) * 20_000, rel=0.02)
    names = 20_000 * 100  # what names of cells and their tables take
    assert peak < (2.5 if form == "csc" else 0.35) * n_bytes + names


def test_a_copy_leaves_the_file_as_it_is(path):
    with quiet_mudata():
        before = open_backed(path).obs
        data = av.tl.scvi(path, copy=True, **FIT)
        assert "X_scvi" in data["rna"].obsm and in_file(data["rna"].X)
        assert "X_scvi" not in open_backed(path)["rna"].obsm and open_backed(path).obs.equals(before)


@pytest.mark.parametrize("space", ["tl", "pp", "metrics", "get", "pl"])
def test_every_function_of_an_object_takes_its_file(space):
    module = getattr(av, space)
    for name in module.__all__:
        function = getattr(module, name)
        first = next(iter(inspect.signature(function).parameters), None) if inspect.isfunction(function) else None
        assert first not in ("data", "query") or hasattr(function, "__wrapped__"), name


def test_looking_at_a_file_leaves_it_as_it_is(stored, tmp_path):
    path = Path(shutil.copy(stored / "data.h5mu", tmp_path))
    with quiet_mudata():
        av.tl.totalanvi(path, **FIT)
        before = path.read_bytes()
        assert len(av.get.history(path)) == 2 and len(av.get.proba(str(path))) == 200
        assert av.pl.history(path, show=False, return_fig=True) is not None
        assert av.pl.embedding(path, basis="X_totalanvi", color=av.get.model(path).setup.genes[0], show=True) is None
    assert path.read_bytes() == before


def test_a_file_is_never_half_written(path, monkeypatch, mdata):
    """Whatever fails, wherever: the file is the one from before, and nothing lies beside it."""
    original, done = _backed.write_elem, []

    def failing(*args, **kwargs):
        done.append(args)
        if len(done) == at:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(_backed, "write_elem", failing)
    with quiet_mudata():
        data, at = open_backed(path), 0
        data.obsm["new"] = np.ones((data.n_obs, 2))
        save_backed(data, path.with_name(f"other{path.suffix}"))
        n = len(done)
        for at in range(1, n + 1, 9):  # noqa: B007 -- `failing` looks at it
            done.clear()
            with pytest.raises(OSError, match="No space left"):
                save_backed(data)
            same(read(path), mdata)
            assert {place.name for place in path.parent.iterdir()} == {path.name, f"other{path.suffix}"}
    assert n > 20


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .h5mu or .h5ad or .zarr file .*none.h5mu"):
        av.tl.totalanvi(tmp_path / "none.h5mu")
    (tmp_path / "bad.h5mu").write_bytes(b"nothing")
    with pytest.raises((OSError, ValueError), match="bad.h5mu"):
        av.tl.totalanvi(str(tmp_path / "bad.h5mu"))
    with pytest.raises(ValueError, match="No matrix of this object lies in a file"):
        save_backed(cite(60))


def test_a_file_of_another_kind_than_its_name(mdata, tmp_path):
    one, other = tmp_path / "one.h5mu", tmp_path / "other.h5ad"
    folder, file = tmp_path / "folder.h5mu", tmp_path / "file.zarr"
    with quiet_mudata():
        mdata["rna"].write(one)
        mdata.write(other)
        mdata.write_zarr(folder)
        mdata.write(file)
    for path, told in (
        (one, "holds an AnnData: rename it to one.h5ad"),
        (other, "holds a MuData: rename it to other.h5mu"),
        (folder, "is a folder: rename it to end in .zarr"),
        (file, "is a file, and a .zarr is a folder"),
    ):
        with pytest.raises(ValueError, match=f"{path.name} {told}") as refused:
            av.tl.scvi(path)
        assert "damaged" not in str(refused.value)
    with h5py.File(one, "r+") as root:  # a group of its owner's makes no MuData of it
        root.create_group("mod/mine")
    assert open_backed(one.rename(tmp_path / "one.h5ad")).shape == mdata["rna"].shape
    assert open_backed(other.rename(tmp_path / "other.h5mu")).shape == mdata.shape


def test_a_file_that_is_refused_can_be_mended_while_the_error_is_kept(tmp_path):
    with h5py.File(tmp_path / "bad.h5mu", "w") as file:
        file["obs"] = 3
    with pytest.raises(ValueError, match="it has no modality") as kept:
        open_backed(tmp_path / "bad.h5mu")
    cite(60).write(tmp_path / "bad.h5mu")
    assert kept.value.__traceback__ is not None and open_backed(tmp_path / "bad.h5mu").n_obs == 60


def test_text_as_pandas_3_writes_it_is_saved_under_older_ones(mdata, tmp_path):
    """Else a fit of hours would end in anndata's refusal to write what it has read."""
    path, again = tmp_path / "data.h5mu", tmp_path / "again.h5mu"
    mdata.write(path)
    with h5py.File(path, "r+") as file, anndata.settings.override(allow_write_nullable_strings=True):
        for place in ("obs", "mod/rna/obs", "mod/prot/obs"):
            names = pd.array(read_elem(file[place]).index.to_numpy(dtype=object), dtype="string")
            del file[place]["_index"]
            write_elem(file[place], "_index", names)
    av.tl.scvi(path, max_epochs=1, n_hidden=16)
    assert av.get.model(open_backed(path)).name == "scvi"
    save_backed(read(path), again)  # no matrix lies in a file
    assert [*read(again).obs_names] == [*mdata.obs_names]


def test_another_kind_of_file_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        save_backed(open_backed(path), tmp_path / "out.h5ad")


def test_columns_that_mudata_repeats_are_not_stored_again(mdata, tmp_path):
    """They come back by reading, and would else double the table of cells."""
    data = mudata_of({"rna": mdata["rna"].copy(), "prot": mdata["prot"].copy()})
    data["rna"].obs["depth"] = 1.0
    with quiet_mudata():
        data.update()
        data.write_h5mu(tmp_path / "data.h5mu")
        av.tl.scvi(tmp_path / "data.h5mu", max_epochs=1, n_hidden=16)
    with h5py.File(tmp_path / "data.h5mu") as file:
        columns = list(file["obs"].attrs["column-order"])
    assert "rna:depth" not in columns and "rna:scvi_split" in columns


def test_a_file_that_a_verb_has_looked_at_can_be_written_again(mdata, tmp_path):
    file = tmp_path / "a.h5mu"
    mdata.write(file)
    av.pp.check(file, batch_key="batch")
    mdata.write(file)
    with pytest.raises(KeyError):
        av.tl.scvi(file, batch_key="nope", max_epochs=1)
    mdata.write(file)


def test_raw_stays_where_x_is_not_there(mdata, tmp_path):
    adata = mdata["rna"].copy()
    adata.raw = adata
    adata.layers["counts"], adata.X = adata.X.copy(), None
    adata.write(tmp_path / "a.h5ad")
    av.tl.scvi(tmp_path / "a.h5ad", layer="counts", max_epochs=1)
    assert anndata.read_h5ad(tmp_path / "a.h5ad").raw is not None


@pytest.mark.parametrize("ending", ["h5mu", "h5ad", "zarr"])
def test_what_its_owner_keeps_in_a_file_stays_there(mdata, tmp_path, ending):
    """Groups, arrays, links and files beside those of anndata and mudata, wherever these look for theirs."""
    path, parts = tmp_path / f"data.{ending}", ["", "mod/rna"]
    with quiet_mudata():
        if ending == "h5ad":
            mdata["rna"].write(path)
            parts = [""]
        else:
            mdata.write_zarr(path) if ending == "zarr" else mdata.write(path)
    with zarr_or_hdf5(path, "a") as root:
        for part in parts:
            group = root[part] if part else root
            write_elem(group, "notes", {"of": {"whom": np.arange(3)}, "why": "text"})
            group["notes"].attrs["by"] = "me"
            write_elem(group, "odd", np.arange(4))
            # names that anndata or mudata use, but not here
            for name in ("mod", "obsmap") if part or ending == "h5ad" else ("layers", "raw"):
                write_elem(group.require_group(name), "mine", np.arange(5))
            if ending != "zarr":
                group["link"], group["far"] = h5py.SoftLink("/obs"), h5py.ExternalLink("other.h5", "/nothing")
    if ending == "zarr":
        (path / "README.txt").write_text("mine")
        (path / "pictures").mkdir()
        (path / "pictures" / "one.png").write_bytes(b"png")
    av.tl.scvi(path, layer={"rna": "counts"} if parts[1:] else "counts", **(FIT | {"batch_key": None}))
    with zarr_or_hdf5(path, "r") as root:
        for part in parts:
            group = root[part] if part else root
            assert read_elem(group["notes"])["why"] == "text" and group["notes"].attrs["by"] == "me"
            assert read_elem(group["notes/of/whom"]).tolist() == [0, 1, 2] and group["odd"].shape == (4,)
            for name in ("mod", "obsmap") if part or ending == "h5ad" else ("layers", "raw"):
                assert group[f"{name}/mine"].shape == (5,)
            if ending != "zarr":
                assert group.get("link", getlink=True).path == "/obs"
                assert group.get("far", getlink=True).filename == "other.h5"
        assert "scvi" in root[f"{parts[-1]}/uns"]
    if ending == "zarr":
        assert (path / "README.txt").read_text() == "mine"
        assert (path / "pictures" / "one.png").read_bytes() == b"png"


def zarr_or_hdf5(path: Path, mode: str):
    """The root of a file, for a with statement."""
    return nullcontext(zarr.open_group(str(path), mode=mode)) if path.suffix == ".zarr" else h5py.File(path, mode)


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize("form", ["h5mu", "h5ad", "zarr", "zarr of an AnnData"])
def test_counts_in_a_layer_where_there_is_no_x(mdata, tmp_path, form):
    """What mudata writes for a missing X is no matrix."""
    without = mdata.copy()
    del without["rna"].raw
    for part in without.mod.values():
        part.layers["counts"], part.X = part.X.copy(), None
    path = tmp_path / f"data.{form.partition(' ')[0]}"
    data = without["rna"] if form in ("h5ad", "zarr of an AnnData") else without
    with quiet_mudata():
        data.write_zarr(path) if path.suffix == ".zarr" else data.write(path)
    av.tl.scvi(path, layer="counts", **(FIT | {"batch_key": None}))
    av.tl.scvi(data, layer="counts", **(FIT | {"batch_key": None}))
    found, home = open_backed(path), data if data is not without else data["rna"]
    found = found["rna"] if data is without else found
    assert found.X is None and in_file(found.layers["counts"])
    np.testing.assert_array_equal(found.obsm["X_scvi"], home.obsm["X_scvi"])


def test_what_another_has_written_meanwhile_is_kept(tmp_path, caplog):
    path = tmp_path / "cells.h5mu"
    cite(60).write(path)
    path.chmod(0o640)

    @_backed.on_file
    def mark(data, name, meanwhile=lambda: None):
        meanwhile()
        data.obs.insert(0, name, 1)

    mark(path, "outer", lambda: mark(path, "inner"))
    assert "inner" in mudata.read_h5mu(path).obs and "outer" not in mudata.read_h5mu(path).obs
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("cells*.h5mu")} == {0o640}
    assert "outer" in mudata.read_h5mu(tmp_path / "cells-1.h5mu").obs and "cells-1.h5mu" in caplog.text
    with pytest.raises(FileNotFoundError, match="cells.h5mu is gone"):
        mark(path, "lost", path.unlink)
