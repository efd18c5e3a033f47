"""The checker of links: what leads nowhere is found, and nothing else."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "dev" / "links.py"


@pytest.fixture
def broken():
    spec = importlib.util.spec_from_file_location("links", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.broken


def test_links(tmp_path, broken):
    (tmp_path / "part").mkdir()
    (tmp_path / "picture.png").touch()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="part/page.html#there">1</a><a href="#top">2</a><img src="picture.png">'
        '<a href="https://elsewhere.org/gone">3</a><a href="part/">4</a>'
    )
    (tmp_path / "part" / "index.html").write_text('<a href="../index.html#top">1</a>')
    page = tmp_path / "part" / "page.html"
    page.write_text('<p id="there"></p>')
    assert broken(tmp_path) == ([], 5, 1)
    page.write_text('<p id="moved"></p><img src="gone.png"><a href="../../outside.html">2</a>')
    assert broken(tmp_path)[0] == [
        "index.html: part/page.html#there",
        "part/page.html: gone.png",
        "part/page.html: ../../outside.html",
    ]
