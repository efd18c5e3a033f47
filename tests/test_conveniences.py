"""Small things that newcomers missed: bars wherever one waits, namespaces that show what is for users."""

import logging
import sys

import numpy as np
import pytest

import anvi as av
from anvi import settings as settings_module  # the object; the module is found below


@pytest.fixture
def bars(monkeypatch):
    """What bars there were: name, total and how far they came."""
    module, seen = sys.modules["anvi.settings"], {}

    class Bar:
        def __init__(self, total, desc, unit, disable=False):
            self.name = desc
            seen[desc] = [total, 0, disable]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n=1):
            seen[self.name][1] += n

    monkeypatch.setattr(module, "_bar", Bar)
    return seen


def test_every_question_that_takes_long_has_a_bar_that_ends_full(fitted, bars):
    with av.settings.override(progress=True):
        av.tl.differential_expression(fitted, "true_cell_type", model="totalanvi", n_samples=100)
        av.tl.differential_expression(
            fitted, "true_cell_type", model="totalanvi", n_samples=100, delta=None, key_added="other"
        )
        av.tl.feature_correlation(fitted, model="totalanvi", n_samples=2, features=["G001", "G002", "P01"])
        av.metrics.criticism(fitted, model="totalanvi", n_samples=1)
    names = {"differential expression, rna", "differential expression, prot", "correlation", "draw"}
    assert names <= set(bars)
    for name, (total, done, disable) in bars.items():
        assert done == total > 0 and not disable, name


def test_draws_and_likelihoods_have_a_bar(fitted, bars):
    whole = av.metrics.marginal_likelihood(fitted, model="totalanvi", n_samples=2, per_cell=True)
    with av.settings.override(progress=True):
        again = av.metrics.marginal_likelihood(fitted, model="totalanvi", n_samples=2, per_cell=True)
        av.tl.posterior_predictive(fitted, model="totalanvi", n_samples=2, transform_batch="all", features=["P01"])
    np.testing.assert_array_equal(again, whole)
    assert {"marginal likelihood", "draw"} <= set(bars)
    for name, (total, done, disable) in bars.items():
        assert done == total > 0 and not disable, name


def test_attributions_have_a_bar(labelled, bars):
    with av.settings.override(progress=True):
        av.tl.attributions(labelled, n_cells=5)
    (total, done, disable) = bars["attributions"]
    assert done == total > 0 and not disable


def test_where_nobody_looks_there_is_none(fitted, bars):
    with av.settings.override(progress=False):
        av.tl.feature_correlation(fitted, model="totalanvi", n_samples=1, features=["G001", "G002"])
    assert bars["correlation"][2]


def test_a_bar_has_room_in_a_terminal_of_a_hundred_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    module = sys.modules["anvi.settings"]
    with av.settings.override(progress=True), module.Progress(10) as progress:
        for _ in range(10):
            row = {"train_loss": 1234.5678, "validation_loss": 1234.5678, "validation_accuracy": 0.98765}
            progress.advance(row)
    line = capsys.readouterr().err.split("\r")[-1].rstrip()
    assert "loss 1235, validation 1235, accuracy 0.9877" in line and len(line) <= 100
    assert line.count("█") == 20


def test_without_ipywidgets_a_notebook_gets_a_line_and_no_warning(monkeypatch, recwarn):
    module = sys.modules["anvi.settings"]
    monkeypatch.setattr(module, "_in_notebook", lambda: True)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with av.settings.override(progress=True), module.bar(3, "x", "cell") as advance:
        advance(3)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["get", "tl", "pp", "pl", "metrics", "io", "datasets", "nn"])
def test_namespaces_show_what_is_for_users(name):
    module = getattr(av, name)
    shown = [entry for entry in dir(module) if not entry.startswith("_")]
    assert sorted(shown) == sorted(entry for entry in module.__all__ if not entry.startswith("_"))
    assert settings_module is av.settings


def test_means_over_fewer_cells_are_told(fitted, caplog):
    with caplog.at_level(logging.INFO, "anvi"):
        found = av.metrics.reconstruction_error(fitted, model="totalanvi")
    measured = int(fitted.mod["prot"].n_obs)
    (line,) = [line for line in caplog.messages if line.startswith("protein: mean over")]
    assert f"the {measured} of {fitted.n_obs} cells" in line
    per_cell = av.metrics.reconstruction_error(fitted, model="totalanvi", per_cell=True)["protein"]
    assert per_cell.notna().sum() == measured and found["protein"] == pytest.approx(float(np.nanmean(per_cell)))


def test_the_hint_for_plots_of_one_modality_can_be_followed(caplog):
    import re

    import scanpy as sc

    mdata = av.datasets.synthetic_cite(300, n_genes=60)
    with caplog.at_level(logging.INFO, "anvi"):
        av.tl.totalanvi(mdata, max_epochs=1)
    (hint,) = [line for line in caplog.messages if "push_obs" in line]
    with pytest.raises(KeyError):
        sc.pl.violin(mdata["prot"], "P01", groupby="totalanvi_prediction", show=False)
    exec(re.search(r"mdata\.push_obs\(.*\)", hint).group(), {"mdata": mdata})
    sc.pl.violin(mdata["prot"], "P01", groupby="totalanvi_prediction", show=False)
    mdata.update()
    av.tl.totalanvi(mdata, max_epochs=1)  # and again, where copies lie
    av.tl.predict(mdata)


def test_sizes_of_what_is_large_are_told(monkeypatch, fitted, caplog):
    from anvi._data import slots

    monkeypatch.setattr(slots, "LARGE", 10_000)
    with caplog.at_level(logging.INFO, "anvi"):
        av.tl.denoise(fitted, model="totalanvi")
    rna = fitted["rna"]
    assert f"layers['totalanvi_denoised'] ({rna.n_obs * rna.n_vars * 4 / 1e6:,.0f} MB)" in caplog.text
    monkeypatch.undo()
    caplog.clear()
    with caplog.at_level(logging.INFO, "anvi"):
        av.tl.denoise(fitted, model="totalanvi")
    assert "MB)" not in caplog.text
