"""Shared by all tests: one thread, quiet, tiny data; and models that are fitted once and handed out as copies."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from helpers import cite

import anvi as av

torch.set_num_threads(1)
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def quiet():
    """No progress lines and no device but the CPU, whatever the machine; and one thread, which scanpy undoes."""
    torch.set_num_threads(1)
    with av.settings.override(progress=False, device="cpu", n_threads=1):
        yield


@pytest.fixture(autouse=True)
def close():
    """Every test starts, and leaves, without figures."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def no_training(monkeypatch):
    """Make a test fail if a fit gets as far as training."""

    def reached(*args, **kwargs):
        pytest.fail("training was reached")

    monkeypatch.setattr("anvi.tl._fit.fit", reached)


@pytest.fixture(scope="session")
def _fitted():
    """MuData with all four models, fitted for two epochs; never handed out itself."""
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = cite()
        for verb in (av.tl.scvi, av.tl.scanvi, av.tl.totalvi, av.tl.totalanvi):
            verb(mdata, batch_key="batch", max_epochs=2)
    return mdata


@pytest.fixture
def fitted(_fitted):
    """MuData with all four models, free to be changed."""
    return _fitted.copy()


@pytest.fixture(scope="session")
def _labelled():
    """TotalANVI with enough labelled validation cells for calibration, prediction sets and novelty.

    The reference lacks a type, "B": its cells are there without a label.
    """
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = av.datasets.synthetic_cite(2_000, n_genes=150)
        truth = mdata.obs["true_cell_type"].astype(str).to_numpy()
        mdata.obs["known"] = np.where(truth == "B", "Unknown", truth)
        mdata.obs["known"] = mdata.obs["known"].where(mdata.obs["cell_type"].astype(str) != "Unknown", "Unknown")
        av.tl.totalanvi(mdata, "known", batch_key="batch", max_epochs=15, train_size=0.75)
    return mdata


@pytest.fixture
def labelled(_labelled):
    """The same, free to be changed."""
    return _labelled.copy()
