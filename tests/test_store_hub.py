"""io.push_to_hub, io.from_hub, io.data_from_hub, references by name: a hub on this machine, never the network."""

import socket
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from fake_hub import serve
from helpers import quiet_mudata
from huggingface_hub import constants

import anvi as av
from anvi import _store

FILES = {"README.md", "config.json", "history.csv", "model.safetensors"}


@pytest.fixture(scope="module")
def hub():
    with serve() as running:
        yield running


@pytest.fixture
def here(hub, monkeypatch):
    """Arguments for the hub of this machine; any other host has no address."""
    find = socket.getaddrinfo

    def local_only(host, *args, **options):
        if host not in ("127.0.0.1", b"127.0.0.1"):
            pytest.fail(f"{host} was asked for")
        return find(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local_only)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # else it asks its maker what runs it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hub.files.clear()
    hub.requests.clear()
    return {"endpoint": hub.endpoint, "token": "hf_made_up"}


@pytest.fixture
def folder(fitted, tmp_path):
    av.write_model(fitted, tmp_path / "model", model="totalanvi")
    return tmp_path / "model"


def test_a_model_goes_there_and_back(hub, here, fitted, folder, tmp_path):
    (folder / "thesis.txt").write_text("all my work")
    address = av.io.push_to_hub(folder, "lab/cite", private=True, **here)
    assert address == f"{hub.endpoint}/lab/cite/commit/{hub.revision('lab/cite')}"
    assert hub.private["lab/cite"]
    assert set(hub.files["lab/cite"]) == FILES
    assert hub.files["lab/cite"]["README.md"] == (folder / "README.md").read_bytes()
    model = av.io.from_hub("lab/cite", cache_dir=tmp_path / "cache", **here)
    ours = av.tl.predict(fitted, model="totalanvi", inplace=False)
    np.testing.assert_array_equal(av.tl.predict(fitted, model=model, inplace=False), ours)


def test_small_data_go_with_it(hub, here, fitted, folder, tmp_path):
    """The whole workflow: minify, share, and elsewhere ask without a count."""
    for key in ("scvi", "scanvi", "totalvi"):
        part = fitted if key == "totalvi" else fitted["rna"]
        del part.uns[key]
    denoised = av.tl.denoise(fitted, inplace=False, features=list(fitted["prot"].var_names[:3]))
    compared = {"groupby": "true_cell_type", "n_samples": 200, "inplace": False}
    tables = av.tl.differential_expression(fitted, **compared)
    expected = av.tl.predict(fitted, inplace=False)
    small = av.tl.minify(fitted, copy=True)
    assert small["rna"].X.nnz == 0
    av.write_model(small, folder, overwrite=True)
    assert "**Data is minified**: True" in (folder / "README.md").read_text()
    av.io.push_to_hub(folder, "lab/small", data=small, **here)
    assert set(hub.files["lab/small"]) == FILES | {"data.h5mu"}
    with quiet_mudata():
        back = av.io.data_from_hub("lab/small", cache_dir=tmp_path / "cache", **here)
    model = av.io.from_hub("lab/small", cache_dir=tmp_path / "cache", **here)
    np.testing.assert_array_equal(av.tl.predict(back, model=model, inplace=False), expected)
    again = av.tl.denoise(back, inplace=False, features=list(fitted["prot"].var_names[:3]))
    np.testing.assert_allclose(again, denoised, rtol=1e-5)
    for mod, found in av.tl.differential_expression(back, **compared).items():
        # raw counts and shares are the one thing that needs counts
        pd.testing.assert_frame_equal(found, tables[mod].filter(regex="^(?!count_|pct_nz_)"), rtol=1e-4)


def test_an_anndata_goes_with_it(hub, here, fitted, tmp_path):
    av.write_model(fitted, tmp_path / "rna", model="scvi")
    av.io.push_to_hub(tmp_path / "rna", "lab/rna", data=fitted["rna"], **here)
    back = av.io.data_from_hub("lab/rna", cache_dir=tmp_path / "cache", **here)
    assert isinstance(back, anndata.AnnData) and back.shape == fitted["rna"].shape


def test_data_of_an_earlier_upload_do_not_stay_in_the_way(hub, here, fitted, tmp_path):
    av.write_model(fitted, tmp_path / "rna", model="scvi")
    av.io.push_to_hub(tmp_path / "rna", "lab/twice", data=fitted, **here)
    av.io.push_to_hub(tmp_path / "rna", "lab/twice", **here)
    assert set(hub.files["lab/twice"]) == FILES | {"data.h5mu"}
    av.io.push_to_hub(tmp_path / "rna", "lab/twice", data=fitted["rna"], **here)
    assert set(hub.files["lab/twice"]) == FILES | {"data.h5ad"}
    assert isinstance(av.io.data_from_hub("lab/twice", cache_dir=tmp_path / "cache", **here), anndata.AnnData)


def test_only_files_with_known_names_are_fetched(hub, here, folder, tmp_path):
    """A repository may hold anything; a pickle in it never reaches this machine."""
    av.io.push_to_hub(folder, "lab/odd", **here)
    hub.files["lab/odd"]["model.pt"] = b"cos\nsystem\n(S'touch pwned'\ntR."
    hub.files["lab/odd"]["setup.py"] = b"raise SystemExit"
    hub.requests.clear()
    av.io.from_hub("lab/odd", cache_dir=tmp_path / "cache", **here)
    assert not any("model.pt" in line or "setup.py" in line for line in hub.requests)
    assert {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")} == FILES


def test_what_was_tampered_with_is_refused(hub, here, folder, tmp_path):
    av.io.push_to_hub(folder, "lab/bad", **here)
    weights = bytearray(hub.files["lab/bad"]["model.safetensors"])
    weights[-1] ^= 1
    hub.files["lab/bad"]["model.safetensors"] = bytes(weights)
    with pytest.raises(ValueError, match="truncated or was edited"):
        av.io.from_hub("lab/bad", cache_dir=tmp_path / "cache", **here)


def test_a_repository_without_a_model_or_data(hub, here, folder, tmp_path):
    hub.files["lab/empty"] = {"README.md": b"# nothing"}
    with pytest.raises(FileNotFoundError, match="'lab/empty' holds no model of anvi"):
        av.io.from_hub("lab/empty", cache_dir=tmp_path / "cache", **here)
    with pytest.raises(FileNotFoundError, match=r"neither data\.h5mu nor data\.h5ad"):
        av.io.data_from_hub("lab/empty", cache_dir=tmp_path / "cache", **here)


def test_nothing_is_sent_that_is_no_model(hub, here, folder, tmp_path):
    model = av.io.read_model(folder)
    (folder / "history.csv").write_text("epoch\n")
    with pytest.raises(ValueError, match=r"history\.csv is truncated or was edited"):
        av.io.push_to_hub(folder, "lab/x", **here)
    with pytest.raises(FileNotFoundError, match="no model folder of anvi"):
        av.io.push_to_hub(tmp_path, "lab/x", **here)
    with pytest.raises(TypeError, match="Expected a MuData or an AnnData"):
        av.io.push_to_hub(folder, "lab/x", data="data.h5mu", **here)
    with pytest.raises(TypeError, match="path= takes a path; got Model"):
        av.io.push_to_hub(model, "lab/x", **here)
    assert hub.requests == []


@pytest.fixture
def default_hub(here, monkeypatch, tmp_path):
    """The hub of this machine as the one that is asked where none is named."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here["endpoint"])
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", here["endpoint"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return here


@pytest.fixture
def query(fitted):
    with quiet_mudata():
        return fitted[:60].copy()


def test_queries_are_mapped_onto_a_model_by_its_name(default_hub, query, folder, caplog):
    av.io.push_to_hub(folder, "lab/cite-1.0", **default_hub)
    asked = {"max_epochs": 0, "key_added": "mapped", "copy": True}
    with caplog.at_level("INFO", logger="anvi"):
        by_name = av.tl.map_query(query, "lab/cite-1.0", **asked)
    assert "asking the hub" in caplog.text
    by_folder = av.tl.map_query(query, folder, **asked)
    np.testing.assert_array_equal(by_name.obsm["X_mapped"], by_folder.obsm["X_mapped"])
    aligned = av.pp.align_query(query, "lab/cite-1.0")
    assert list(aligned["rna"].var_names) == list(av.read_model(folder).setup.genes)


def test_a_folder_of_that_name_comes_first(default_hub, hub, query, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    folder.rename(tmp_path / "lab" / "cite")
    av.pp.align_query(query, "lab/cite")
    assert hub.requests == []


@pytest.mark.parametrize(
    "missing", ["lab/q.h5mu", "lab/q.H5", "model", "a/b/c", "/lab/cite", "./cite", "lab/..", "lab/", Path("lab/cite")]
)
def test_what_cannot_be_a_name_on_the_hub_is_not_asked_for(default_hub, hub, query, missing):
    with pytest.raises(FileNotFoundError, match="is neither a folder"):
        av.pp.align_query(query, missing)
    assert hub.requests == []


def test_a_slip_in_the_name_of_a_folder_stays_here(default_hub, hub, query, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(FileNotFoundError, match="'models/pbmc2' is neither a folder"):
        av.pp.align_query(query, "models/pbmc2")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["lab/a--b", "lab/cite.git", f"lab/{100 * 'x'}"])
def test_names_that_the_hub_does_not_take(default_hub, query, name):
    with pytest.raises(FileNotFoundError, match="no model of the hub could be had"):
        av.pp.align_query(query, name)


def test_a_repository_without_a_model_is_no_reference(default_hub, hub, query):
    hub.files["lab/empty"] = {"README.md": b"# nothing"}
    with pytest.raises(FileNotFoundError, match="'lab/empty' holds no model of anvi"):
        av.pp.align_query(query, "lab/empty")


def test_a_damaged_model_of_the_hub_is_called_so(default_hub, hub, query, folder):
    av.io.push_to_hub(folder, "lab/cite", **default_hub)
    hub.files["lab/cite"]["model.safetensors"] = b"nothing"
    with pytest.raises(ValueError, match="damaged|checksum"):
        av.pp.align_query(query, "lab/cite")


def test_a_reference_that_is_nowhere(default_hub, query, monkeypatch):
    with pytest.raises(FileNotFoundError, match="'lab/nothing' is no folder here, and no model of the hub"):
        av.pp.align_query(query, "lab/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'anvi\[hub\]'"):
        av.pp.align_query(query, "lab/nothing")


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'anvi\[hub\]'"):
        av.io.push_to_hub(folder, "lab/x")
    assert "huggingface_hub" not in vars(_store)
