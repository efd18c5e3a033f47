"""pl.report: one page from the slots; what it says is what the slots say."""

import base64
import re
from html.parser import HTMLParser

import mudata
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import anvi as av
from anvi._data.fits import resolve_fit
from anvi.pl.report import checks


@pytest.fixture(scope="module")
def fitted():
    mdata = av.datasets.synthetic_cite(1_000, n_genes=60)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=3, train_size=0.8)
    av.metrics.criticism(mdata, n_samples=2)
    return mdata


class Page(HTMLParser):
    """Tags of a page; every tag that is opened must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.opened, self.images, self.headings, self.others = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag != "meta":
            self.opened.append(tag)
        self.others.add(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        if self.opened and self.opened[-1] == "h2":
            self.headings.append(data)


def test_the_page_is_whole_and_needs_nothing_else(fitted):
    text = av.pl.report(fitted)
    page = Page(text)
    assert not page.opened and not page.others & {"script", "link", "iframe"}
    assert page.headings == [
        "Checks",
        "Course of the fit",
        "Predictions",
        "Validation cells",
        "Does confidence mean what it says?",
        "Who measured which protein",
        "Drawn counts beside the data",
    ]
    assert len(page.images) == len(page.headings) - 1
    for source in page.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://", text)


def test_numbers_are_those_of_the_slots(fitted):
    found = {line.what: line for line in checks(resolve_fit(fitted, None))}
    table = av.metrics.classification(fitted)
    assert f"accuracy {table.loc['overall', 'accuracy']:.3f}" in found["labels"].found
    history = fitted.uns["totalanvi"]["history"]
    best = int(np.argmin(history["validation_loss"]))
    assert found["length of the training"].found.startswith(f"best epoch {best + 1} of 3")
    assert (found["length of the training"].verdict == "warn") == (best == 2)
    verdicts = fitted.uns["totalanvi"]["criticism"]["verdict"]
    assert sum(": " in what and "cells" in what for what in found) >= len(verdicts)
    for row in verdicts.itertuples():
        assert found[f"{row.modality}: {row.metric} {row.statistic}, {row.cells} cells"].verdict == row.verdict


def test_a_class_that_is_never_found_is_named(fitted):
    broken = fitted.copy()
    first = str(broken.obs["cell_type"].value_counts().index[1])
    other = next(c for c in broken.obs["totalanvi_prediction"].cat.categories if c != first)
    broken.obs["totalanvi_prediction"] = pd.Categorical(
        broken.obs["totalanvi_prediction"].astype(str).replace({first: other})
    )
    lines = {line.what: line for line in checks(resolve_fit(broken, None))}
    assert (
        lines["recall of every class"].verdict == "warn" and f"{first} (0.00)" in lines["recall of every class"].found
    )


def test_names_cannot_break_the_page(fitted):
    odd = fitted.copy()
    odd.uns["totalanvi"]["params"]["batch_key"] = "<script>alert(1)</script>"
    verdict = odd.uns["totalanvi"]["criticism"]["verdict"].astype(object)
    odd.uns["totalanvi"]["criticism"]["verdict"] = verdict.assign(verdict="'><script>alert(2)</script>", source="<b>")
    page = av.pl.report(odd)
    assert "<script>" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(2)" in page


def test_names_with_dollars_are_no_formulas(fitted):
    """matplotlib takes what stands between two dollars for one, and fails when it draws."""
    odd = fitted.copy()
    first = odd.obs["totalanvi_prediction"].cat.categories[0]
    for column in ("totalanvi_prediction", "cell_type"):
        odd.obs[column] = odd.obs[column].cat.rename_categories({first: r"$\frac{$"})
    page = av.pl.report(odd)
    assert "class='none'" not in page and len(Page(page).images) == len(Page(av.pl.report(fitted)).images)


def test_a_picture_that_cannot_be_drawn_costs_no_other(fitted, monkeypatch):
    from matplotlib.figure import Figure

    drawn, original = [], Figure.savefig

    def fails_once(figure, *args, **options):
        drawn.append(figure)
        if len(drawn) == 2:
            raise ValueError("cannot be drawn")
        return original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", fails_once)
    before = plt.get_fignums()
    page = av.pl.report(fitted)
    assert "cannot be drawn" in page and len(Page(page).images) == len(drawn) - 1
    assert plt.get_fignums() == before


def test_what_is_missing_is_said_in_its_place(fitted):
    bare = fitted.copy()
    del bare.obsm["X_totalanvi"]
    page = av.pl.report(bare)
    assert "class='none'" in page and len(Page(page).images) == 5


def test_labels_that_were_deleted_since(fitted):
    bare = fitted.copy()
    del bare.obs["cell_type"]
    lines = {line.what: line for line in checks(resolve_fit(bare, None))}
    assert lines["labels"].verdict == "unknown"
    assert lines["cells of no known type"].found.endswith("of the cells without a label")
    assert "<h2>Predictions</h2>" in av.pl.report(bare)


def test_a_fit_without_labels_after_a_file(tmp_path):
    mdata = av.datasets.synthetic_cite(300, n_genes=60)
    av.tl.scvi(mdata, max_epochs=2)
    mdata.write(tmp_path / "x.h5mu")
    page = Page(av.pl.report(mudata.read(tmp_path / "x.h5mu")))
    assert page.headings == ["Checks", "Course of the fit"]


def test_no_file_is_overwritten(fitted, tmp_path):
    path = tmp_path / "page.html"
    text = av.pl.report(fitted, path)
    assert path.read_text(encoding="utf-8") == text
    with pytest.raises(FileExistsError, match="overwrite=True"):
        av.pl.report(fitted, path)
    av.pl.report(fitted, path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="no folder"):
        av.pl.report(fitted, tmp_path / "nowhere" / "page.html")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(("epochs", "labels_key"), [(0, None), (1, None), (0, "cell_type")])
def test_mapped_cells(fitted, epochs, labels_key):
    query = av.datasets.synthetic_cite(200, n_genes=60, random_state=1)
    query.obs["batch"] = "new"
    av.tl.map_query(query, fitted, max_epochs=epochs, labels_key=labels_key)
    lines = {line.what: line for line in checks(resolve_fit(query, None))}
    assert lines["labels"].verdict == "unknown"
    assert "recall of every class" not in lines  # nothing to hold predictions against, though obs has a "cell_type"
    assert lines["calibration"].verdict == "unknown" and "reference" in lines["calibration"].found
    asked = np.full(200, True) if labels_key is None else (query.obs["cell_type"] == "Unknown").to_numpy()
    share = np.mean((query.obs["totalanvi_label"].astype(str) == "Unassigned")[asked])
    assert lines["cells of no known type"].found.startswith(f"{share:.1%} of")
    page = Page(av.pl.report(query))
    assert not page.opened and "Predictions" in page.headings


def test_the_length_of_a_run_is_judged_by_what_its_end_gained():
    mdata = av.datasets.synthetic_cite(300, n_genes=60)
    av.tl.totalvi(mdata, max_epochs=2)
    key = "totalvi"

    def verdict(loss) -> tuple[str, str]:
        table = pd.DataFrame({"validation_loss": loss, "train_elbo": -1000.0, "validation_elbo": -1000.0})
        mdata.uns[key] = mdata.uns[key] | {"history": table}
        finding = checks(resolve_fit(mdata, None))[0]
        return finding.verdict, finding.found

    flat = [1300 - 40 * (1 - 0.8**i) for i in range(26)]  # as a default fit ends: the last is the best, by little
    assert verdict(flat)[0] == "pass" and "best epoch 26 of 26" in verdict(flat)[1]
    falling = np.linspace(2000, 1300, 10)
    assert verdict(falling) == (
        "warn",
        "best epoch 10 of 10, the last tenth of the run gained 5.98%: may gain from more, e.g. max_epochs=20",
    )
    assert verdict([1300, 1200, 1250])[0] == "pass"
    mdata.uns[key]["params"] = dict(mdata.uns[key]["params"]) | {"ended": "Ctrl-C"}
    assert "ended early by Ctrl-C" in verdict(falling)[1]


def test_a_page_does_not_flood_the_screen():
    mdata = av.datasets.synthetic_cite(300, n_genes=60)
    av.tl.totalvi(mdata, max_epochs=1)
    page = av.pl.report(mdata)
    assert len(repr(page)) < 120 and "kB" in repr(page)
    assert page.startswith("<!doctype html>") and str(page) == page
