"""The command line from file to file: what is written, what is said, and how it refuses."""

import argparse
import json
import os
import re
import subprocess
import sys

import anndata
import h5py
import mudata
import numpy as np
import pytest
from helpers import cite, quiet_mudata

import anvi as av
from anvi.__main__ import COMMANDS, _parser, main, plain


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Counts, a fitted file, and a query of one more batch."""
    folder = tmp_path_factory.mktemp("cli")
    with av.settings.override(progress=False, device="cpu", verbosity=0), quiet_mudata():
        whole = cite(400)
        in_query = (whole.obs["batch"] == "batch_1").to_numpy()
        mdata, query = whole[~in_query].copy(), whole[in_query].copy()
        mdata.write(folder / "counts.h5mu")
        query.write(folder / "query.h5mu")
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
        mdata.write(folder / "fitted.h5mu")
        av.write_model(mdata, folder / "model")
    return folder


def called(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def read(path):
    with quiet_mudata():
        return mudata.read_h5mu(path)


def test_fit_is_the_verb(files, tmp_path, capsys):
    out = tmp_path / "out.h5mu"
    options = ["--batch-key", "batch", "--max-epochs", 2, "--n-latent", 4, "--set", "n_hidden=16", "--set", "lr=0.01"]
    code, text, _ = called(capsys, "fit", files / "counts.h5mu", out, *options, "--random-state", 3, "--json")
    assert code == 0
    facts = json.loads(text)
    ours = read(files / "counts.h5mu")
    av.tl.totalanvi(ours, batch_key="batch", max_epochs=2, n_latent=4, n_hidden=16, lr=0.01, random_state=3)
    back = read(out)
    np.testing.assert_array_equal(back.obsm["X_totalanvi"], ours.obsm["X_totalanvi"])
    assert facts["file"] == str(out) and facts["model"] == facts["key"] == "totalanvi"
    assert facts["info"]["epochs"] == 2 and facts["info"]["random_state"] == 3
    counts = ours.obs["totalanvi_prediction"].value_counts()
    assert facts["predicted"] == {name: int(n) for name, n in counts.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5mu"]


def test_fit_of_rna_in_an_anndata(files, tmp_path, capsys):
    read(files / "counts.h5mu")["rna"].write_h5ad(tmp_path / "x.h5ad")
    out = tmp_path / "y.h5ad"
    code, text, _ = called(capsys, "fit", tmp_path / "x.h5ad", out, "--method", "scvi", "--max-epochs", 1, "--quiet")
    assert code == 0 and "under 'scvi'" in text
    assert av.get.model(anndata.read_h5ad(out)).name == "scvi"


@pytest.mark.parametrize("model", ["model", "fitted.h5mu"])
def test_predict_with_a_model_from_elsewhere(files, tmp_path, capsys, model):
    out, fitted = tmp_path / "out.h5mu", files / "fitted.h5mu"
    code, text, _ = called(capsys, "predict", files / "counts.h5mu", out, "--model", files / model, "--json")
    assert code == 0
    ours, found = read(fitted).obs["totalanvi_prediction"], read(out).obs["totalanvi_prediction"]
    assert (found.astype(str) == ours.astype(str)).all()
    assert sum(json.loads(text)["predicted"].values()) == len(found)


def test_one_of_several_models(files, tmp_path, capsys):
    both = read(files / "fitted.h5mu")
    av.tl.scanvi(both, batch_key="batch", max_epochs=1)
    both.write(tmp_path / "both.h5mu")
    command = ["predict", files / "counts.h5mu", tmp_path / "out.h5mu", "--model", tmp_path / "both.h5mu", "--json"]
    code, text, _ = called(capsys, *command)
    assert code == 1 and "several fitted models" in json.loads(text)["error"]
    code, text, _ = called(capsys, *command, "--model-key", "scanvi")
    assert code == 0 and json.loads(text)["model"] == "scanvi"


def test_predict_with_the_model_in_the_file(files, tmp_path, capsys):
    code, text, _ = called(
        capsys, "predict", files / "fitted.h5mu", tmp_path / "out.h5mu", "--key-added", "again", "--quiet"
    )
    assert code == 0 and "out.h5mu" in text
    back = read(tmp_path / "out.h5mu")
    assert (back.obs["again_prediction"].astype(str) == back.obs["totalanvi_prediction"].astype(str)).all()


@pytest.mark.parametrize("reference", ["model", "fitted.h5mu"])
def test_map(files, tmp_path, capsys, reference):
    out = tmp_path / "out.h5mu"
    code, text, _ = called(
        capsys, "map", files / "query.h5mu", files / reference, out, "--max-epochs", 1, "--json", "--quiet"
    )
    assert code == 0
    facts = json.loads(text)
    assert facts["reference"]["new_batches"] == ["batch_1"] and facts["reference"]["genes_matched"] == 100
    assert "X_totalanvi" in read(out).obsm


def test_check(files, capsys):
    code, text, _ = called(capsys, "check", files / "counts.h5mu", "--batch-key", "batch", "--json")
    facts = json.loads(text)
    assert code == 0 and facts["ok"] and facts["problems"] == []
    assert set(facts["cells_per_batch"]) == set(read(files / "counts.h5mu").obs["batch"])
    code, text, _ = called(capsys, "check", files / "counts.h5mu", "--labels-key", "nope", "--json")
    assert code == 1 and "nope" in json.loads(text)["problems"][0]
    assert "ready to fit" in called(capsys, "check", files / "counts.h5mu", "--batch-key", "batch")[1]


def test_card(files, tmp_path, capsys):
    code, text, _ = called(capsys, "card", files / "model", "--license", "mit", "--tissues", "blood", "bone marrow")
    assert code == 0 and text.startswith('---\nlicense: "mit"\n') and '- "tissue:bone marrow"' in text
    assert text == av.io.model_card(av.read_model(files / "model"), license="mit", tissues=["blood", "bone marrow"])
    out = tmp_path / "README.md"
    code, text, _ = called(capsys, "card", files / "fitted.h5mu", "--criticism", "--out", out, "--quiet")
    assert code == 0 and str(out) in text
    assert "### Verdicts" in out.read_text() and "### Classification" in out.read_text()
    assert called(capsys, "card", files / "fitted.h5mu", "--out", out)[0] == 2
    assert called(capsys, "card", files / "model", "--criticism")[0] == 2


REFUSED = {
    "no such file": (2, "predict none.h5mu out.h5mu", "there is no file none.h5mu"),
    "no such folder": (2, "predict counts.h5mu nowhere/out.h5mu", "there is no folder nowhere"),
    "another ending": (2, "predict counts.h5mu out.h5ad", "must end in .h5mu"),
    "not ours": (2, "check notes.txt", "must be a .h5mu or .h5ad file"),
    "there already": (2, "fit counts.h5mu fitted.h5mu", "--overwrite replaces it"),
    "not of this method": (
        2,
        "fit counts.h5mu out.h5mu --method scvi --labels-key x",
        "--labels-key is no option of scvi",
    ),
    "no value": (2, "fit counts.h5mu out.h5mu --set n_hidden", "NAME=VALUE"),
    "a key of no file": (2, "predict fitted.h5mu out.h5mu --model-key totalanvi", "--model-key is for a --model"),
    "no such reference": (2, "map query.h5mu none out.h5mu", "there is no file none"),
    "no such option": (1, "fit counts.h5mu out.h5mu --set n_hiden=5", "Did you mean 'n_hidden'"),
    "no such column": (1, "fit counts.h5mu out.h5mu --labels-key celltype", "labels_key='celltype'"),
    "no model": (1, "predict counts.h5mu out.h5mu", "There is no fitted model in this object"),
    "no such key": (1, "card fitted.h5mu --key scvi", "key='scvi' is no fitted model"),
    "no h5mu": (1, "check text.h5mu", "text.h5mu cannot be read as a .h5mu file"),
    "an h5ad": (1, "check rna.h5mu", "rna.h5mu cannot be read as a .h5mu file"),
    "another hdf5 file": (1, "check odd.h5mu", "odd.h5mu cannot be read as a .h5mu file"),
    "a folder to read": (2, "check folder.h5mu", "must be a .h5mu or .h5ad file"),
    "a folder in the way": (2, "fit counts.h5mu folder.h5mu --overwrite", "folder.h5mu is a folder"),
    "a number for a column": (1, "fit counts.h5mu out.h5mu --set batch_key=3", "batch_key='3' was found in none"),
    "no folder for a card": (2, "card fitted.h5mu --criticism --out nowhere/x.md", "there is no folder nowhere"),
    "a folder for a card": (2, "card model --out folder.h5mu --overwrite", "folder.h5mu is a folder"),
    "no number": (2, "fit counts.h5mu out.h5mu --max-epochs many", "invalid int value: 'many'"),
    "nothing to write": (2, "fit counts.h5mu", "the following arguments are required: out"),
    "an option twice": (2, "fit counts.h5mu out.h5mu --lr 0.1 --set lr=0.2", "--set lr: --lr says another value"),
    "over the reference": (
        2,
        "map query.h5mu fitted.h5mu ./fitted.h5mu --overwrite",
        "holds the model and would be lost",
    ),
    "over the model": (2, "predict query.h5mu fitted.h5mu --model fitted.h5mu --overwrite", "holds the model"),
    "over what a card is of": (
        2,
        "card fitted.h5mu --out fitted.h5mu --overwrite",
        "holds the model and would be lost",
    ),
    "the wrong way round": (
        1,
        "map fitted.h5mu query.h5mu out.h5mu",
        "query.h5mu' holds no fitted model. New cells come",
    ),
    "no address": (1, "card model --training-code-url here", "training_code_url='here'"),
}


@pytest.mark.filterwarnings("ignore:The HDF5 file was not created by muon:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(files, capsys, monkeypatch, no_training, kind):
    expected, command, message = REFUSED[kind]
    monkeypatch.chdir(files)
    for name in ("notes.txt", "text.h5mu"):
        (files / name).write_text("all my work")
    (files / "folder.h5mu").mkdir(exist_ok=True)
    read(files / "counts.h5mu")["rna"].write_h5ad(files / "rna.h5mu")
    with h5py.File(files / "odd.h5mu", "w") as file:
        file["mod"] = file["obs"] = 3
    monkeypatch.setattr("anvi.metrics.criticism", lambda *args, **options: pytest.fail("work was begun"))
    before = {path.name: path.stat().st_mtime_ns for path in files.iterdir()}
    code, text, log = called(capsys, *command.split())
    assert (code, text) == (expected, "")
    assert log.startswith(("anvi: ", "usage: ")) and "\nanvi: " in f"\n{log}"
    assert message in log and "Traceback" not in log
    code, text, _ = called(capsys, *command.split(), "--json")
    assert code == expected and message in json.loads(text)["error"]
    assert {path.name: path.stat().st_mtime_ns for path in files.iterdir()} == before


def test_debug_shows_where(files, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(KeyError, match="no fitted model"):
        main(["predict", "counts.h5mu", "out.h5mu", "--debug"])


def test_a_write_that_fails_leaves_the_old_file(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.h5mu"
    out.write_text("an old one")

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("anvi._backed.write_elem", full)
    code, _, log = called(
        capsys, "predict", files / "fitted.h5mu", out, "--key-added", "again", "--overwrite", "--quiet"
    )
    assert code == 1 and "No space left" in log
    assert out.read_text() == "an old one" and list(tmp_path.iterdir()) == [out]


def test_facts_are_plain():
    facts = {1: np.float32(0.5), "a": [np.int64(3), float("nan")], "b": np.array([True, False]), "c": (None, "x")}
    facts["d"] = {"e": float("inf"), "f": np.array([-np.inf, 1.0])}
    known = {"1": 0.5, "a": [3, None], "b": [True, False], "c": [None, "x"], "d": {"e": None, "f": [None, 1.0]}}
    assert json.loads(json.dumps(plain(facts), allow_nan=False)) == known


@pytest.mark.parametrize(
    ("command", "expected", "message"),
    [
        ("demo --cells 5", 1, "n_obs must be at least 60"),
        ("demo --out notes.txt", 2, "notes.txt is there already, and no folder"),
        ("demo --cells few", 2, "invalid int value: 'few'"),
    ],
)
def test_the_demo_says_what_is_wrong(tmp_path, capsys, monkeypatch, command, expected, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("all my work")
    code, _, log = called(capsys, *command.split())
    assert code == expected and message in log and "Traceback" not in log
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command):
    commands = next(one for one in _parser([command])._actions if isinstance(one, argparse._SubParsersAction))
    for action in commands.choices[command]._actions:
        assert action.help and len(action.help) > 5, action.dest
    assert "--help" in commands.choices[command].format_help()  # which fills in what stands behind a %


def test_options_are_those_of_the_verb(files, tmp_path, capsys):
    """Of the types that its signature names: switches, choices, lists, numbers."""
    options = "--no-early-stopping --train-size 0.8 --label-prior empirical --batch-size 64 --max-epochs 1 --quiet"
    out = tmp_path / "out.h5mu"
    assert called(capsys, "fit", files / "counts.h5mu", out, *options.split())[0] == 0
    ours = read(files / "counts.h5mu")
    given = {"early_stopping": False, "train_size": 0.8, "label_prior": "empirical", "batch_size": 64}
    av.tl.totalanvi(ours, max_epochs=1, **given)
    np.testing.assert_array_equal(read(out).obsm["X_totalanvi"], ours.obsm["X_totalanvi"])


@pytest.mark.slow
def test_demo_recovers_the_truth_and_writes_its_files(tmp_path, capsys):
    # far above the shuffled control (0.2, 0.5, 0) and below what the default demo reaches (.998, .997, .96, .50)
    assert main(["demo", "--out", str(tmp_path), "--cells", "1500", "--epochs", "60"]) == 0
    text = capsys.readouterr().out
    scores = [float(score) for score in re.findall(r": (-?\d\.\d+) \(", text)]
    unlabelled, rna_only, foreground, hidden = scores[-4:]
    assert unlabelled > 0.9
    assert rna_only > 0.85
    assert foreground > 0.8
    assert hidden > 0.2
    assert "obsm['X_totalanvi']" in text
    for name in ("predictions", "history", "confusion", "panels"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    back = mudata.read_h5mu(tmp_path / "demo.h5mu")
    assert av.get.model(back).name == "totalanvi"


def test_unknown_command_is_an_error(capsys):
    assert main(["bake", "--json"]) == 2
    said = capsys.readouterr()
    assert "usage: python -m anvi" in said.err and "'bake'" in json.loads(said.out)["error"]


def test_as_a_program(files, tmp_path):
    """A process of its own: what it did goes to stderr, the answer alone to stdout."""

    def program(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "anvi", *arguments], capture_output=True, text=True, cwd=tmp_path)

    assert program("--version").stdout == f"anvi {av.__version__}\n"
    done = program("fit", str(files / "counts.h5mu"), "out.h5mu", "--max-epochs", "2", "--json", "--device", "cpu")
    assert done.returncode == 0 and json.loads(done.stdout)["info"]["epochs"] == 2
    assert "epoch 2/2" in done.stderr and "Warning" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no such pipes")
@pytest.mark.parametrize("command", ["--help", "check counts.h5mu", "check none.h5mu --json"])
@pytest.mark.parametrize("stdout", ["pipe", "/dev/full"])
def test_an_answer_that_cannot_be_written(files, command, stdout):
    """Such as of `check ... | head -1`: no traceback, and no code that says something of the data."""
    if stdout == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    elif not os.path.exists(stdout):
        pytest.skip("no such device")
    else:
        writer = os.open(stdout, os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-m", "anvi", *command.split(), *(["--quiet"] if "counts" in command else [])],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=files,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    os.close(writer)
    said = [line for line in done.stderr.splitlines() if "none.h5mu" not in line]
    told = ["anvi: stdout cannot be written: [Errno 28] No space left on device"]
    assert (done.returncode, said) == ((141, []) if stdout == "pipe" else (74, told))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_letters_that_a_terminal_cannot_show(files, tmp_path, encoding):
    mdata = read(files / "counts.h5mu")
    mdata.obs["cell_type"] = mdata.obs["cell_type"].astype(str).replace({"NK": "γδ T"})
    mdata.write(tmp_path / "greek.h5mu")
    done = subprocess.run(
        [sys.executable, "-m", "anvi", "check", "greek.h5mu", "--batch-key", "batch"],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    name = "γδ T" if encoding == "utf-8" else r"\u03b3\u03b4 T"
    assert name in done.stdout.decode(encoding)


@pytest.mark.skipif(os.name == "nt", reason="no such pipes")
def test_a_fit_goes_on_when_nobody_reads_its_progress(files, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = ["fit", str(files / "counts.h5mu"), "out.h5mu", "--max-epochs", "2", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "anvi", *command], stdout=subprocess.PIPE, stderr=writer, cwd=tmp_path)
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "out.h5mu").exists()
