"""Writing is all or nothing, whatever fails on the way; and the table of slots in the guide."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same, cite, contents

import anvi as av
from anvi._data import slots

KINDS = ("obs", "obsm", "layer", "varm", "varp", "uns", "params", "clear", "drop_obs")
ROOT = Path(__file__).parents[1]


def again(data):
    av.tl.totalanvi(data, batch_key="batch", max_epochs=1, key_added="totalanvi")


def first(data):
    av.tl.scanvi(data, batch_key="batch", max_epochs=1)


MODELS = {}
VERBS = {
    "fit": first,
    "fit again": again,
    "latent": lambda data: av.tl.latent(data, key_added="other"),
    "predict": lambda data: av.tl.predict(data, coverage=None),
    "denoise": av.tl.denoise,
    "foreground": av.tl.foreground,
    "correlation": lambda data: av.tl.feature_correlation(data, n_samples=1),
    "differential expression": lambda data: av.tl.differential_expression(data, "true_cell_type", n_samples=50),
    "attributions": lambda data: av.tl.attributions(data, n_cells=3, n_steps=2, per_cell=True),
    "criticism": lambda data: av.metrics.criticism(data, n_samples=2),
    "map": lambda data: av.tl.map_query(data, MODELS["totalanvi"], max_epochs=1, key_added="mapped"),
    "minify": av.tl.minify,
}


@pytest.fixture(scope="module")
def fitted():
    data = cite()
    again(data)
    data["rna"].raw = data["rna"].copy()
    MODELS["totalanvi"] = av.get.model(data)
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", [*VERBS, "minify an AnnData"])
def test_a_failure_while_writing_leaves_the_object_as_it_was(fitted, monkeypatch, verb):
    if verb == "minify an AnnData":
        verb, data = "minify", cite()["rna"].copy()
        av.tl.scvi(data, max_epochs=1)
    else:
        data = fitted.copy()
    if verb == "map":  # the batch has to be written, too
        data.obs = data.obs.drop(columns="batch")
    before = contents(data)
    left = [np.inf]

    def failing(method):
        def write(self, *args, **kwargs):
            found = method(self, *args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt if odd else OSError("no space left")
            return found

        return write

    for name in KINDS:
        monkeypatch.setattr(slots.Writer, name, failing(getattr(slots.Writer, name)))
    n_writes, odd = 0, False
    while True:
        n_writes, odd = n_writes + 1, not odd
        left[0] = n_writes
        try:
            VERBS[verb](data)
        except (OSError, KeyboardInterrupt):
            assert_same(contents(data), before)
            assert data.uns.keys() == {key.removeprefix("uns ") for key in before if key.startswith("uns ")}
            continue
        break
    assert n_writes > 2 or verb in ("latent", "criticism")
    changed = contents(data)
    assert changed.keys() != before.keys() or verb in ("fit again", "predict", "minify", "criticism")


@pytest.mark.parametrize("step", ["looks_like_counts", "_mark"])
def test_minify_that_is_interrupted_on_its_way_has_emptied_nothing(fitted, monkeypatch, step):
    data = fitted.copy()
    before = contents(data)
    monkeypatch.setattr(f"anvi._data.minified.{step}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        av.tl.minify(data)
    assert_same(contents(data), before)
    np.testing.assert_array_equal(data["rna"].raw.X.toarray(), fitted["rna"].raw.X.toarray())
    monkeypatch.undo()
    av.tl.minify(data)
    assert data["rna"].X.nnz == 0 and data["rna"].raw is None


def test_the_guide_has_the_same_table():
    source = (ROOT / "src/anvi/_data/slots.py").read_text()
    lines = re.findall(r'^\w+ = "(.+)"\.format  # (.+?) \((.+?)\): (.+)$', source, re.MULTILINE)
    rows = [(name.replace("{}", "{key}", 1).replace("{}", "{name}"), *rest) for name, *rest in lines]
    assert len(rows) > 20 and len(rows) == source.count('".format  # ')
    shown = re.findall(r"^\| `(.+)` \| (.+?) \| (.+?) \| (.+) \|$", (ROOT / "docs/slots.md").read_text(), re.MULTILINE)
    assert shown == rows
