"""Counts that stay in their file during a fit: the same numbers as in memory, in an order that a seed decides."""

import os
import shutil
import threading
import zlib
from contextlib import nullcontext
from pathlib import Path

import anndata
import h5py
import mudata
import numpy as np
import pytest
import torch
import zarr
from helpers import cite, dense, mudata_of, quiet_mudata, with_peak
from scipy import sparse

import anvi as av
from anvi import _stream
from anvi._backed import open_backed
from anvi._data import batches, containers
from anvi._data.batches import Minibatches, split, take
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._posterior import encode
from anvi._stream import Streamed, block_edges

pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Cannot join columns"),
]
FIT = {"batch_key": "batch", "max_epochs": 2, "n_hidden": 16}
N = 400


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 32 rows, about four of them together."""
    monkeypatch.setattr(_stream, "BLOCK", 32)
    monkeypatch.setattr(_stream, "CHUNKS", 1)
    monkeypatch.setattr(_stream, "MIXED", 128)
    monkeypatch.setattr(_stream, "KEPT", 32, raising=False)


def in_chunks(group, **options):
    """Store values in chunks of 300."""
    for name in ("data", "indices"):
        values = group[name][:]
        del group[name]
        create = getattr(group, "create_array", None) or group.create_dataset
        create(name, data=values, chunks=(300,), **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One object in several kinds of files, which nobody writes to; the cells are in no order by name."""
    folder, mdata = tmp_path_factory.mktemp("stored"), cite(N, n_genes=40, n_proteins=12)
    rna = mdata["rna"]
    rna.X = sparse.csr_matrix(rna.X)
    rna.layers["dense"] = rna.X.toarray()
    rna.layers["csc"] = rna.X.tocsc()
    parts = mudata_of({"rna": rna[: N - 30].copy(), "prot": mdata["prot"].copy()}, mdata)  # some have proteins alone
    with quiet_mudata():
        for name in ("data.h5mu", "part.h5mu", "packed.h5mu"):
            part = parts if name == "part.h5mu" else mdata
            part.write_h5mu(folder / name, compression="gzip")
            with h5py.File(folder / name, "r+") as file:
                in_chunks(file["mod/rna/X"], compression="gzip" if name == "packed.h5mu" else None)
        mdata.write_zarr(folder / "data.zarr")
        in_chunks(zarr.open_group(str(folder / "data.zarr"), mode="r+")["mod/rna/X"])
    return folder


@pytest.fixture(params=["data.h5mu", "data.zarr", "part.h5mu", "dense"])
def read(request, stored):
    """A data set, streamed and in memory."""
    name = "data.h5mu" if request.param == "dense" else request.param
    data = open_backed(stored / name)
    layer = {"rna": "dense"} if request.param == "dense" else None
    setup = find_setup(data, proteins=True, layer=layer, labels_key="cell_type", batch_key="batch")
    return read_cells(data, setup, labels=True, most=0), read_cells(data, setup, labels=True)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("anvi-reading")]


def counted(x: Streamed) -> list[slice]:
    """What is read from now on."""
    seen, original = [], x.read
    x.read = lambda rows: (seen.append(rows), original(rows))[1]
    return seen


# blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 31, 32, 47, 49, 1_000])
@pytest.mark.parametrize("chunk", [1, 10, 1_000])
def test_blocks_are_all_rows_once(n, chunk):
    indptr = np.concatenate([[0], np.random.default_rng(0).integers(0, 20, n).cumsum()])
    for edges in (block_edges(n, chunk, None), block_edges(n, chunk, indptr)):
        assert edges[0] == 0 and edges[-1] == n and (np.diff(edges) > 0).all()
        assert len(edges) == 2 or np.diff(edges).min() >= 16
    step = -(-32 // chunk) * chunk
    assert set(block_edges(n, chunk, None)[:-1] % step) == {0}


def test_a_block_begins_with_the_first_row_of_a_chunk():
    indptr = np.arange(0, 3_001, 3)  # three values a row
    edges = block_edges(1_000, 100, indptr)
    begin = indptr[edges[:-1]]
    assert (begin % 100 < 3).all()  # the row before it, which begins in the chunk before, goes on into it
    assert np.diff(edges).max() <= 34 + 34 // 2 and block_edges(0, 100, np.zeros(1, np.int64)).tolist() == [0]


def test_every_chunk_is_read_about_once_in_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(_stream, "CHUNKS", 8)
    monkeypatch.setattr(_stream, "MIXED", 600)
    counts = sparse.random(5_000, 50, 0.3, "csr", dtype=np.float32, random_state=0)
    counts.data[:] = np.random.default_rng(0).poisson(2, counts.nnz) + 1
    counts = sparse.csr_matrix(counts + sparse.csr_matrix(np.eye(5_000, 50, dtype=np.float32)[np.arange(5_000) % 50]))
    anndata.AnnData(counts).write_h5ad(tmp_path / "data.h5ad")
    with h5py.File(tmp_path / "data.h5ad", "r+") as file:
        for name in ("data", "indices"):
            values = file["X"][name][:]
            del file["X"][name]
            file["X"].create_dataset(name, data=values, chunks=(500,), compression="gzip")
    data = open_backed(tmp_path / "data.h5ad")
    x = read_cells(data, find_setup(data, proteins=False), most=0).x
    indptr, touched = data.X.group["indptr"][:], []
    original = x.read

    def reading(rows):
        touched.extend(range(indptr[rows.start] // 500, (indptr[rows.stop] - 1) // 500 + 1))
        return original(rows)

    x.read = reading
    order = x.shuffled(torch.Generator().manual_seed(0))
    assert len(order) > 3
    with x.ahead(order):
        for blocks in order:
            x.entries(torch.cat([torch.arange(*x.edges[block : block + 2]) for block in blocks]))
    assert set(touched) == set(range(-(-counts.nnz // 500)))
    assert len(touched) <= 1.15 * len(set(touched))


# the same counts --------------------------------------------------------------------------------------------------


def test_streamed_counts_are_those_in_memory(read):
    streamed, resident = read
    assert streamed.streamed and not resident.streamed and len(streamed) == len(resident) > 300
    index = torch.randperm(len(streamed), generator=torch.Generator().manual_seed(0))
    same = torch.from_numpy(np.searchsorted(resident.names, streamed.names[index]))  # those by name

    def check(index, same):
        for dense_too in (True, False):
            one, other = take(streamed, index, dense=dense_too), take(resident, same, dense=dense_too)
            for name, ours, theirs in zip(one._fields, one, other, strict=True):
                if name == "entries":
                    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
                elif isinstance(ours, torch.Tensor):
                    assert torch.equal(ours, theirs), name

    check(index, same)  # read now
    streamed.x.hold(streamed.x_row[index[:100]])
    seen = counted(streamed.x)
    check(index[:100].flip(0), same[:100].flip(0))  # held
    assert not seen
    check(index[50:150], same[50:150])  # some held, some not
    assert seen


def test_what_the_smallest_type_does_not_hold(tmp_path):
    """Blocks have types of their own, and come together in one that holds all."""
    x = np.ones((200, 3), dtype=np.float32)
    x[70], x[150] = 300, 1e6
    anndata.AnnData(sparse.csr_matrix(x)).write_h5ad(tmp_path / "data.h5ad")
    data = open_backed(tmp_path / "data.h5ad")
    streamed = read_cells(data, find_setup(data, proteins=False), most=0).x
    kinds = {str(streamed.read(slice(start, start + 32)).values.numpy().dtype) for start in (0, 64, 128)}
    assert kinds == {"uint8", "uint16", "float32"}
    assert np.array_equal(streamed.dense(torch.arange(200))[0].numpy(), x)
    streamed.hold(torch.tensor([150, 3]))
    assert np.array_equal(streamed.dense(torch.tensor([3, 150]))[0].numpy(), x[[3, 150]])


# order ------------------------------------------------------------------------------------------------------------


def minibatches(cells, seed=0, labelled=16, drawn=0):
    train, validation = split(cells, 0.9, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    torch.rand(drawn, generator=generator)
    of = Minibatches(cells, train, 32, labelled, generator)
    cells.x.hold(cells.x_row[torch.cat([validation, *of.classes])])
    return of, train


def test_an_epoch_reads_every_block_once_and_has_every_cell_once(read):
    cells, _ = read
    of, train = minibatches(cells)
    seen = counted(cells.x)
    for epoch in range(2):
        seen.clear()
        steps = of.plan()
        assert 2 <= len(of.sets) <= 4 and sorted(sum(of.sets, [])) == list(range(cells.x.n_blocks))
        with of.reading():
            for choice in steps:
                batch = take(cells, choice.index, choice.weight, choice.n_labelled)
                assert (batch.label[: choice.n_labelled] >= 0).all() and (batch.label[choice.n_labelled :] < 0).all()
                assert len(choice.index) <= 33 and batch.weight.sum() > 0
                take(cells, choice.balanced, n_labelled=len(choice.balanced))
        assert not reading_threads()
        assert sorted(rows.start for rows in seen) == cells.x.edges[:-1].tolist(), epoch
        weight, index = torch.cat([c.weight for c in steps]), torch.cat([c.index for c in steps])
        assert sorted(index[weight == 1].tolist()) == train.tolist()


def test_a_set_whose_cells_are_all_held_is_passed_over(read):
    x = read[0].x
    sets = x.shuffled(torch.Generator().manual_seed(0))[::-1]
    rows = [torch.cat([torch.arange(*x.edges[block : block + 2]) for block in blocks]) for blocks in sets]
    x.hold(rows[0])
    seen = counted(x)
    with x.ahead(sets):
        for some in [part for one in rows for part in one[torch.randperm(len(one))].split(16)]:
            x.entries(some)
    assert sorted(part.start for part in seen) == x.edges[:-1].tolist()


def test_cells_of_far_blocks_meet(read):
    """A minibatch has cells of all blocks that are in memory, not of one."""
    cells, _ = read
    of, _ = minibatches(cells)
    steps = of.plan()
    blocks = [len(set(cells.x.block_of(cells.x_row[choice.index]).tolist()) - {cells.x.n_blocks}) for choice in steps]
    assert min(map(len, of.sets)) >= 3 or cells.x.n_blocks < 5
    assert np.mean(blocks) > 0.9 * np.mean(list(map(len, of.sets)))


def test_one_seed_gives_one_order_and_every_epoch_another(read):
    cells, _ = read
    (one, _), (again, _), (other, _) = (minibatches(cells, seed) for seed in (0, 0, 1))
    first, second = (torch.cat([choice.index for choice in one.plan()]) for _ in range(2))
    assert torch.equal(first, torch.cat([choice.index for choice in again.plan()]))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.cat([choice.index for choice in other.plan()]))


def test_labelled_cells_are_balanced_and_held(read, monkeypatch):
    cells, _ = read
    monkeypatch.setattr(batches, "HELD", 30)
    of, _ = minibatches(cells)
    n_classes = len(of.classes)
    assert all(len(members) <= 30 // n_classes for members in of.classes) and sum(map(len, of.classes)) > 20
    again, _ = minibatches(cells, drawn=7)
    assert all(map(torch.equal, of.classes, again.classes))  # also after an interruption
    seen = counted(cells.x)
    drawn = torch.cat([choice.balanced for choice in of.plan()])
    take(cells, drawn)
    assert not seen
    times = cells.label[drawn].bincount()
    assert times.max() - times.min() <= 1


def test_no_more_cells_validate_than_stay_in_memory(read, monkeypatch):
    streamed, resident = read
    monkeypatch.setattr(batches, "HELD", 20)
    assert 15 <= len(split(streamed, 0.5, torch.Generator())[1]) <= 20
    assert len(split(resident, 0.5, torch.Generator())[1]) == pytest.approx(len(resident) / 2, abs=5)


# fits -------------------------------------------------------------------------------------------------------------


def own(stored, tmp_path, name="data.h5mu"):
    """The file, to be written to."""
    copy = shutil.copytree if name.endswith("zarr") else shutil.copy
    return Path(copy(stored / name, tmp_path / f"{len(list(tmp_path.iterdir()))}_{name}"))


def fitted(path, name="totalanvi", **options):
    """The model of a streamed fit."""
    with quiet_mudata():
        getattr(av.tl, name)(path, **FIT | {"stream": True} | options)
        return av.get.model(path, options.get("key_added", name))


def equal(one, other):
    """Whether two models are the same, bit for bit."""
    assert one.history.equals(other.history)
    for (name, ours), theirs in zip(one.network.state_dict().items(), other.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("name", ["scvi", "scanvi", "totalvi", "totalanvi"])
def test_a_fit_from_the_file_is_that_of_held_counts(stored, tmp_path, monkeypatch, name):
    """Blocks, buffer and thread change no number: the same order with all counts held gives the same weights."""
    model = fitted(own(stored, tmp_path), name)
    assert model.info["streamed"] and not reading_threads()
    original = read_cells

    def hold_all(*args, **kwargs):
        found = original(*args, **kwargs)
        found.x.hold(torch.arange(len(found.x.indptr) - 1))
        monkeypatch.setattr(found.x, "read", None)
        monkeypatch.setattr(found.x, "ahead", lambda _: nullcontext())
        monkeypatch.setattr(found.x, "let_go", lambda: None)
        return found

    monkeypatch.setattr("anvi.tl._fit.read_cells", hold_all)
    equal(model, fitted(own(stored, tmp_path), name))


@pytest.mark.parametrize("name", ["data.h5mu", "data.zarr", "part.h5mu", "backed"])
def test_files_of_all_kinds(stored, tmp_path, name):
    if name == "backed":
        data = mudata.read_h5mu(stored / "data.h5mu", backed="r")
    else:
        data = own(stored, tmp_path, name)
    model = fitted(data, init=None, max_epochs=1)
    data = data if name == "backed" else open_backed(data)
    assert np.isfinite(model.history.to_numpy()).all() and np.isfinite(data.obsm["X_totalanvi"]).all()
    own_order = av.tl.latent(data, inplace=False)
    np.testing.assert_allclose(own_order, data.obsm["X_totalanvi"], atol=1e-4)  # each cell has its own


def test_dense_layers_and_other_genes(stored, tmp_path):
    one = fitted(own(stored, tmp_path), "scvi", layer={"rna": "dense"})
    assert one.info["streamed"] and np.isfinite(one.history.to_numpy()).all()
    genes = list(one.setup.genes[5:20])
    assert fitted(own(stored, tmp_path), "scvi", genes=genes).setup.genes == tuple(genes)


def test_it_learns_as_in_memory(tmp_path):
    mdata = cite(600, n_genes=60, n_proteins=12)
    order = np.argsort(mdata.obs["true_cell_type"].astype(str).to_numpy(), kind="stable")
    names = mdata.obs_names[order]
    with quiet_mudata():
        parts = {
            mod: part[[name for name in names if name in part.obs_names]].copy() for mod, part in mdata.mod.items()
        }
        mudata_of(parts, mdata).write_h5mu(tmp_path / "sorted.h5mu")
    right = {}
    for stream in (True, False):
        with quiet_mudata():
            path = Path(shutil.copy(tmp_path / "sorted.h5mu", tmp_path / f"{stream}.h5mu"))
            av.tl.totalanvi(path, batch_key="batch", max_epochs=12, n_hidden=32, stream=stream)
        obs = open_backed(path).obs
        hidden = obs["cell_type"] == "Unknown"
        right[stream] = (obs["totalanvi_prediction"].astype(str) == obs["true_cell_type"].astype(str))[hidden].mean()
    assert right[True] > 0.6 and right[True] > right[False] - 0.05, right  # by chance 0.2


def test_an_interrupted_fit_goes_on_with_the_same_cells(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "HELD", 40)
    whole = fitted(own(stored, tmp_path), max_epochs=4)
    path, rows = own(stored, tmp_path), []

    def interrupt(row):
        rows.append(row)
        if len(rows) == 2:
            raise RuntimeError("pulled out")

    with pytest.raises(RuntimeError, match="pulled out"):
        fitted(path, max_epochs=4, checkpoint=tmp_path / "checkpoint", callback=interrupt)
    assert not reading_threads()
    resumed = fitted(path, max_epochs=4, checkpoint=tmp_path / "checkpoint")
    equal(resumed, whole)
    with pytest.raises(ValueError, match="fit with stream=True, and this one has stream=False.*Pass stream=True to go"):
        fitted(own(stored, tmp_path), max_epochs=4, checkpoint=tmp_path / "checkpoint", stream=None)
    with pytest.raises(ValueError, match=r"belongs to another fit \(other cells"):
        fitted(own(stored, tmp_path), max_epochs=5, checkpoint=tmp_path / "checkpoint")
    fitted(own(stored, tmp_path), max_epochs=1, checkpoint=tmp_path / "held", stream=False)
    with av.settings.override(stream_above=1e-9), pytest.raises(ValueError, match="Pass stream=False to go on with it"):
        fitted(own(stored, tmp_path), max_epochs=1, checkpoint=tmp_path / "held", stream=None)


@pytest.mark.parametrize(
    "name, spoil, match",
    [
        ("data.h5mu", Path.unlink, "is gone.*a fit with checkpoint= is not trained anew"),
        ("data.h5mu", lambda path: os.truncate(path, 40_000), "something has written into .*Start again"),
        ("packed.h5mu", lambda path: os.truncate(path, 40_000), "cannot be read from .*checkpoint= goes on"),
        ("data.zarr", shutil.rmtree, "cannot be read from .*checkpoint= goes on"),
    ],
)
def test_a_file_that_goes_away_is_named(stored, tmp_path, name, spoil, match):
    """Deleted or cut off in the first epoch of three; what a deleted h5mu holds can be read to the end."""
    path = own(stored, tmp_path, name)
    with pytest.raises((OSError, ValueError), match=match) as told:
        fitted(path, max_epochs=3, callback=lambda row: spoil(path) if row["epoch"] == 1 else None)
    assert str(path) in str(told.value) and not reading_threads()
    if name != "data.h5mu" or "written" in match:
        assert "mdata['rna'].X" in str(told.value)


def test_surprises_end_the_thread_and_close_the_file(stored, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    path = own(stored, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("anvi._fit.loop.run_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fitted(path)
    assert not reading_threads()
    with h5py.File(path, "r+"):  # which nobody else has open
        pass
    model = fitted(path, max_minutes=1e-9)
    assert model.info["ended"] == "max_minutes" and not reading_threads()


def unreadable(piece):
    raise OSError("inflate() failed")


def cut_off(piece):
    raise zlib.error("Error -5 while decompressing data")


def another_count(piece):
    piece.data[5] += 1
    return piece


def no_such_gene(piece):
    piece.indices[5] = 10**6
    return piece


@pytest.mark.parametrize(
    "spoil, error, match",
    [
        (unreadable, OSError, r"mdata\['rna'\].X cannot be read from .*data.h5mu any more \(inflate"),
        (cut_off, OSError, r"mdata\['rna'\].X cannot be read from .*data.h5mu any more \(Error -5"),
        (another_count, ValueError, r"mdata\['rna'\].X is not what it was when this began \(cell '.*'\)"),
        (no_such_gene, ValueError, r"mdata\['rna'\].X is corrupt: it has an entry at place 1000000 of 40"),
    ],
)
def test_what_the_thread_runs_into_is_an_error_of_the_fit(stored, tmp_path, monkeypatch, spoil, error, match):
    original, spoilt = containers.row_reader, []

    def reader(matrix, where, indptr):
        def read(rows):
            piece = original(matrix, where, indptr)(rows)
            if threading.current_thread() is threading.main_thread():
                return piece
            spoilt.append(rows)
            return spoil(piece)

        return read

    monkeypatch.setattr(containers, "row_reader", reader)
    path = own(stored, tmp_path)
    with pytest.raises(error, match=match):
        fitted(path)
    assert spoilt and not reading_threads()
    with h5py.File(path, "r+"):
        pass


# when -------------------------------------------------------------------------------------------------------------


def test_by_itself_when_counts_would_take_too_much(stored, tmp_path, caplog):
    with caplog.at_level("INFO", "anvi"):
        assert "streamed" not in fitted(own(stored, tmp_path), stream=None, max_epochs=1).info
        assert "stream_above" not in caplog.text
        with av.settings.override(stream_above=1e-9):
            assert fitted(own(stored, tmp_path), stream=None, max_epochs=1).info["streamed"]
            assert caplog.text.count("more than 2") == 1 and "settings.stream_above" in caplog.text
            assert "streamed" not in fitted(own(stored, tmp_path), stream=False, max_epochs=1).info
            mdata = cite(60)
            av.tl.totalanvi(mdata, max_epochs=1, n_hidden=8)  # in memory, where counts are already


def test_what_cannot_be_streamed(stored, tmp_path):
    mdata = cite(60)
    with pytest.raises(ValueError, match=r"mdata\['rna'\].X is in memory.*mdata.write\('data.h5mu'\)"):
        av.tl.totalanvi(mdata, stream=True)
    with pytest.raises(ValueError, match=r"data.X is in memory.*data.write\('data.h5ad'\)"):
        av.tl.scvi(mdata["rna"], stream=True)
    with pytest.raises(ValueError, match=r"stored by columns \(CSC\).*tocsr"):
        fitted(own(stored, tmp_path), layer={"rna": "csc"})
    with pytest.raises(TypeError, match="stream='yes' must be True or False"):
        av.tl.totalanvi(mdata, stream="yes")


def test_counts_are_checked_as_ever(stored, tmp_path):
    path = own(stored, tmp_path)
    with h5py.File(path, "r+") as file:
        file["mod/rna/X/data"][-1] = 0.5
    with pytest.raises(ValueError, match=r"non-integer values where raw counts are expected: 0.5 at cell"):
        fitted(path)


def test_memory_does_not_grow_with_the_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "PIECE", 50_000)
    monkeypatch.setattr(batches, "HELD", 100)
    counts = sparse.random(30_000, 400, 0.3, "csr", dtype=np.float32, random_state=0)
    counts.data[:] = 1
    counts = sparse.hstack([sparse.csr_matrix(np.ones((30_000, 1), np.float32)), counts[:, 1:]], "csr")
    data = anndata.AnnData(counts)
    data.write_h5ad(tmp_path / "data.h5ad", compression="lzf")
    compact = 3 * counts.nnz  # bytes
    del data, counts
    data = open_backed(tmp_path / "data.h5ad")
    setup = find_setup(data, proteins=False)

    def an_epoch():
        streamed = read_cells(data, setup, most=0)
        of, _ = minibatches(streamed, labelled=0)
        with of.reading():
            for choice in of.plan():
                take(streamed, choice.index, dense=False)

    _, peak = with_peak(an_epoch)
    assert peak < 0.6 * compact, (peak, compact)


def test_from_the_command_line(stored, tmp_path):
    from anvi.__main__ import main

    out = tmp_path / "out.h5mu"
    options = ["--batch-key", "batch", "--max-epochs", "1", "--set", "n_hidden=16", "--stream", "--quiet"]
    assert main(["fit", str(stored / "data.h5mu"), str(out), *options]) == 0
    assert av.get.model(out).info["streamed"]
    assert dense(open_backed(out).obsm["X_totalanvi"]).shape[0] == N


def test_what_was_held_is_let_go(read):
    streamed, _ = read
    rows = torch.arange(0, 300, 7)
    expected = streamed.x.dense(rows)[0]
    streamed.x.hold(rows)
    seen = counted(streamed.x)
    streamed.x.dense(rows)
    assert not seen
    streamed.x.let_go()
    assert torch.equal(streamed.x.dense(rows)[0], expected) and seen
    assert not sum(len(part.values) for part in streamed.x._held)


def test_the_answers_of_a_fit_are_made_with_nothing_held(stored, tmp_path, monkeypatch):
    original, held = encode.embed, []

    def embed(model, cells, **options):
        if isinstance(cells.x, Streamed):
            held.append(sum(len(part.values) for part in cells.x._held))
        return original(model, cells, **options)

    monkeypatch.setattr(encode, "embed", embed)
    fitted(own(stored, tmp_path), max_epochs=1)
    assert held == [0]


@pytest.mark.parametrize("freeze", ["reference", "none"])
def test_a_mapping_from_the_file(stored, tmp_path, freeze):
    reference = cite(300, n_genes=40, n_proteins=12)
    with quiet_mudata():
        av.tl.totalanvi(reference, batch_key="batch", max_epochs=3, n_hidden=16)
        paths = [own(stored, tmp_path, "part.h5mu") for _ in range(2)]
        with h5py.File(paths[0]) as file:
            before = file["mod/rna/X/data"][:]
        for path, stream in zip(paths, (True, False), strict=True):
            options = {"freeze": freeze, "max_epochs": 2, "stream": stream}
            av.tl.map_query(path, reference, batch_key="panel", key_added="mapped", **options)
    one, other = (av.get.model(path, "mapped") for path in paths)
    assert one.info["streamed"] and "streamed" not in other.info and not reading_threads()
    assert one.setup.batches == other.setup.batches
    streamed, held = (open_backed(path).obsm["X_mapped"] for path in paths)
    known = np.isfinite(held)  # of cells with proteins alone the reference says nothing
    assert (np.isfinite(streamed) == known).all() and known.sum() > 0.9 * known.size
    assert np.corrcoef(streamed[known], held[known])[0, 1] > 0.9
    with h5py.File(paths[0]) as file:
        assert np.array_equal(file["mod/rna/X/data"][:], before)


def test_a_mapping_streams_by_itself(stored, tmp_path):
    reference = cite(300, n_genes=40, n_proteins=12)
    av.tl.scvi(reference["rna"], max_epochs=1, n_hidden=8)
    with quiet_mudata(), av.settings.override(stream_above=1e-9):
        av.tl.map_query(path := own(stored, tmp_path), reference, key_added="mapped", max_epochs=1)
    assert av.get.model(path, "mapped").info["streamed"]
    with pytest.raises(ValueError, match="is in memory"):
        av.tl.map_query(cite(60, n_genes=40), reference, key_added="mapped", stream=True)
