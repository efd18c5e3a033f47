"""The tutorials run from start to end in a fresh Python, and are stored as they ran."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import serve
from run_tutorial import surroundings

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
EVERY_TUTORIAL = pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])

RUN = """
import json, sys
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"))
"""
"""A notebook without Jupyter: its code cells one after the other, in one namespace."""


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@EVERY_TUTORIAL
def test_it_runs(path, tmp_path, monkeypatch):
    text, folder = path.read_text("utf-8"), Path(os.environ.get("ANVI_DATA_DIR") or "nowhere")
    files = {"pbmc_cite(": "pbmc_citeseq.h5mu", '\\"kits\\"': "kits", "three_kits.h5mu": "three_kits.h5mu"}
    if lacking := [name for word, name in files.items() if word in text and not (folder / name).exists()]:
        pytest.skip(f"needs {', '.join(lacking)} in ANVI_DATA_DIR")
    with serve() as hub:
        for name, value in surroundings(hub.endpoint, tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MPLBACKEND", "Agg")
        command = [sys.executable, "-c", RUN, str(path)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1_500)  # a busy machine
    assert done.returncode == 0, done.stderr[-3_000:]
    if path.stem == "sharing":
        assert {"model.safetensors", "config.json", "README.md", "data.h5mu"} <= set(hub.files["lab/blood"])
        assert any(request.startswith("GET") and "data.h5mu" in request for request in hub.requests)


@EVERY_TUTORIAL
def test_it_is_stored_as_it_ran(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert not re.search(r"(^|[\s'\"])/[a-z]+/\w", "\n".join("".join(text) for text in texts), re.MULTILINE)
