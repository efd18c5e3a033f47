"""Shared by all tests: one thread, quiet, tiny data; and models that are fitted once and handed out as copies."""

import pytest
import torch
from helpers import cite

import anvi as av

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet():
    """No progress lines and no device but the CPU, whatever the machine; and one thread, which scanpy undoes."""
    torch.set_num_threads(1)
    with av.settings.override(progress=False, device="cpu", n_threads=1):
        yield


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
