"""Questions to a network whose answers can be worked out cell by cell."""

import weakref

import numpy as np
import pytest
import torch

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._posterior import encode
from anvi.nn import Draws


def fitted():
    mdata = av.datasets.synthetic_cite(300, n_genes=60)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    model = av.get.model(mdata)
    return mdata, model, read_cells(mdata, model.setup)


def test_answers_do_not_depend_on_the_chunk_and_equal_one_cell_at_a_time(monkeypatch):
    _, model, cells = fitted()
    whole = encode.embed(model, cells)
    monkeypatch.setattr(encode, "CHUNK", 7)
    parts = encode.embed(model, cells)
    # float32 products of another size may round otherwise in the last digits
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(parts.proba, whole.proba, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        for i in (0, 123, 299):
            batch = take(cells, torch.tensor([i]))
            mean = model.network.encode(batch, Draws()).mean
            np.testing.assert_allclose(whole.mean[i], mean[0], rtol=1e-5, atol=1e-5)


def test_samples_have_the_posterior_mean_and_variance():
    _, model, cells = fitted()
    mean, var = encode.posterior(model, cells)
    samples = encode.latent_samples(model, cells, 400, seed=0)
    assert samples.shape == (400, 300, 20)
    # the mean of 400 draws has a standard error of sd / 20; 6,000 numbers stay within 5 of them
    assert (np.abs(samples.mean(0) - mean) < 5 * np.sqrt(var / 400)).all()
    np.testing.assert_allclose(samples.var(0).mean() / var.mean(), 1, atol=0.02)
    np.testing.assert_array_equal(samples, encode.latent_samples(model, cells, 400, seed=0))


def test_probabilities_sum_to_one_and_a_sample_differs_from_the_mean():
    _, model, cells = fitted()
    embedding = encode.embed(model, cells)
    sampled = encode.embed(model, cells, sample_seed=3)
    np.testing.assert_allclose(embedding.proba.sum(1), 1, rtol=1e-5)
    assert not np.array_equal(embedding.proba, sampled.proba)
    np.testing.assert_array_equal(embedding.mean, sampled.mean)


@pytest.mark.parametrize("ask", ["embed", "posterior"])
def test_nothing_of_a_chunk_is_kept_when_the_next_one_comes(ask, monkeypatch):
    # small pieces that stay between the large matrices of chunks keep the memory of these from being used again
    _, model, cells = fitted()
    monkeypatch.setattr(encode, "CHUNK", 30)
    encoded, alive, blocks = [], [], encode.blocks

    def watched(*arguments):
        for block in blocks(*arguments):
            encoded.append(weakref.ref(block.q_z.mean))
            alive.append(sum(one() is not None for one in encoded))
            yield block

    monkeypatch.setattr(encode, "blocks", watched)
    getattr(encode, ask)(model, cells)
    assert len(encoded) == 10 and max(alive) <= 2  # the one that comes, and the one before, which the loop still names
