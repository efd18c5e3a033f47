"""A model as a folder: the same answers after reading, nothing of any cell inside, damage named."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import cite

import anvi as av
from anvi._model import SCHEMA
from anvi._store import _checksum_of_facts

RELEASED = Path(__file__).parent / "released"
"""Folders written by earlier releases; every later one must read them."""


@pytest.fixture
def folder(fitted, tmp_path):
    av.write_model(fitted, tmp_path / "model", model="totalanvi")
    return tmp_path / "model"


@pytest.mark.parametrize("key", ["scvi", "scanvi", "totalvi", "totalanvi"])
def test_same_answers_after_reading(fitted, tmp_path, key):
    av.write_model(fitted, tmp_path / "model", model=key)
    model = av.read_model(tmp_path / "model")
    assert model.name == key
    ours = av.tl.latent(fitted, model=key, inplace=False)
    np.testing.assert_array_equal(av.tl.latent(fitted, model=model, inplace=False), ours)
    np.testing.assert_array_equal(av.tl.latent(fitted, model=str(tmp_path / "model"), inplace=False), ours)
    assert model.setup == av.get.model(fitted, key).setup
    assert model.config == av.get.model(fitted, key).config
    np.testing.assert_allclose(model.history, av.get.history(fitted, model=key), rtol=1e-12)


def test_the_files_and_nothing_of_any_cell(fitted, folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "history.csv",
        "model.safetensors",
    ]
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert not any(name.encode() in everything for name in fitted.obs_names)
    assert "av.read_model" in (folder / "README.md").read_text()


def test_nothing_is_overwritten_unasked(fitted, folder, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        av.write_model(fitted, folder, model="totalvi")
    av.write_model(fitted, folder, model="totalvi", overwrite=True)
    assert av.read_model(folder).name == "totalvi"
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("all my work")
    with pytest.raises(FileExistsError, match="left alone"):
        av.write_model(fitted, other, model="totalvi", overwrite=True)
    (other / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="left alone"):
        av.write_model(fitted, other, model="totalvi", overwrite=True)
    (folder / "chapter2.txt").write_text("more work")
    with pytest.raises(FileExistsError, match="chapter2.txt"):
        av.write_model(fitted, folder, model="totalvi", overwrite=True)
    assert (other / "chapter1.txt").read_text() == "all my work"
    assert (folder / "chapter2.txt").read_text() == "more work"


def test_a_model_without_data_can_be_written(fitted, tmp_path):
    av.write_model(av.get.model(fitted, "scvi"), tmp_path / "model")
    assert av.read_model(tmp_path / "model").name == "scvi"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "history.csv"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        av.read_model(folder)


def edit(folder, **changes):
    """Change the configuration and its checksum with it, as a careful hand would."""
    facts = json.loads((folder / "config.json").read_text())
    checksums = facts.pop("sha256")
    facts |= changes
    checksums["config.json"] = _checksum_of_facts(facts)
    (folder / "config.json").write_text(json.dumps(facts | {"sha256": checksums}))


@pytest.mark.parametrize("name", ["model.safetensors", "history.csv"])
def test_truncated_or_edited_files(folder, name):
    raw = (folder / name).read_bytes()
    for damaged in (raw[:-8], raw[:-1] + bytes([raw[-1] ^ 1]), b""):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is truncated or was edited"):
            av.read_model(folder)


def test_truncated_or_edited_configuration(folder):
    text = (folder / "config.json").read_text()
    for damaged in (text[: len(text) // 2], "[1]", ""):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="config.json is damaged"):
            av.read_model(folder)
    facts = json.loads(text)
    facts["setup"]["classes"] = facts["setup"]["classes"][::-1]  # every name on another class
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="config.json is truncated or was edited"):
        av.read_model(folder)


def test_a_configuration_that_does_not_fit_the_weights(folder):
    facts = json.loads((folder / "config.json").read_text())
    edit(folder, config=facts["config"] | {"n_hidden": 7})
    with pytest.raises(ValueError, match="do not fit the stored configuration"):
        av.read_model(folder)
    edit(folder, config=facts["config"] | {"n_wings": 2})
    with pytest.raises(ValueError, match="n_wings"):
        av.read_model(folder)
    edit(folder, config=None)
    with pytest.raises(ValueError, match="damaged"):
        av.read_model(folder)
    edit(folder, config=facts["config"], setup=facts["setup"] | {"classes": facts["setup"]["classes"][1:]})
    with pytest.raises(ValueError, match="its network has 6 labels, its setup 5"):
        av.read_model(folder)


def test_a_careful_hand_cannot_make_it_fail_otherwise(folder):
    """Files of a stranger with checksums that fit: whatever is wrong with them is said in a ValueError."""
    text = (folder / "config.json").read_text()
    facts = json.loads(text)
    changes = [{"schema": "x"}, {"schema": None}, {"name": "evil"}, {"name": []}, {"info": []}, {"setup": []}]
    for change in changes:
        edit(folder, **change)
        with pytest.raises(ValueError, match="damaged"):
            av.read_model(folder)
        (folder / "config.json").write_text(text)
    for odd in ("[" * 100_000, json.dumps(facts | {"sha256": []})):
        (folder / "config.json").write_text(odd)
        with pytest.raises(ValueError, match="config.json is damaged"):
            av.read_model(folder)
    for odd in (b"", b"junk" * 10, (2**62).to_bytes(8, "little") + b"{}"):
        (folder / "model.safetensors").write_bytes(odd)
        checksums = facts["sha256"] | {"model.safetensors": hashlib.sha256(odd).hexdigest()}
        (folder / "config.json").write_text(json.dumps(facts | {"sha256": checksums}))
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            av.read_model(folder)


def test_a_newer_schema_is_refused(folder):
    edit(folder, schema=SCHEMA + 1)
    with pytest.raises(ValueError, match="newer anvi"):
        av.read_model(folder)


@pytest.mark.parametrize("released", sorted(RELEASED.iterdir()), ids=lambda path: path.name)
def test_folders_of_earlier_releases_are_read(released, tmp_path):
    """The numbers beside the folder were written with it; another machine may round the last digits otherwise."""
    copy = tmp_path / "model"
    shutil.copytree(released, copy)
    expected = np.load(copy / "expected.npz")
    model = av.read_model(copy)
    mdata = cite(int(expected["n_obs"]))
    names = list(mdata.obs_names)
    proba = av.tl.predict(mdata, model=model, inplace=False)
    rows = [names.index(name) for name in expected["cells"].astype(str)]
    np.testing.assert_allclose(proba.to_numpy()[rows], expected["proba"], atol=1e-5)


def test_an_imported_model_survives(tmp_path):
    model = av.io.from_scvi_tools(Path(__file__).parent / "golden" / "checkpoints" / "scvi")
    av.write_model(model, tmp_path / "model")
    back = av.read_model(tmp_path / "model")
    assert back.setup == model.setup
    for name, value in model.weights().items():
        np.testing.assert_array_equal(back.weights()[name], value)
