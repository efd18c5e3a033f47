"""The command line: the demo in full, and check with its exit codes."""

import json
import re

import mudata
import pytest

import anvi as av
from anvi.__main__ import main


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


def test_check_exit_codes(tmp_path, capsys):
    mdata = av.datasets.synthetic_cite(300, n_genes=60)
    mdata.write(tmp_path / "x.h5mu")
    assert main(["check", str(tmp_path / "x.h5mu"), "--batch-key", "batch"]) == 0
    assert "ready to fit" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "x.h5mu"), "--labels-key", "nope"]) == 1
    assert main(["check", str(tmp_path / "none.h5mu")]) == 2
    assert "no file" in capsys.readouterr().err


def test_unknown_command_is_an_error(capsys):
    assert main(["bake", "--json"]) == 2
    said = capsys.readouterr()
    assert "usage: python -m anvi" in said.err and "'bake'" in json.loads(said.out)["error"]
