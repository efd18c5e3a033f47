"""Importance weights against loops, and what they choose against a posterior that can be integrated on a grid."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import cite

import anvi as av
from anvi._data.cells import read_cells
from anvi._posterior import bound, differential, encode
from anvi._posterior.bound import resample, truncated
from anvi.nn import Draws


def test_weights_are_cut_from_above():
    rng = np.random.default_rng(0)
    log_weight = rng.normal(0, 4, (6, 25)) - 3000  # as small as the likelihood of a cell
    found = truncated(torch.tensor(log_weight))
    for row, weights in zip(found.tolist(), log_weight, strict=True):
        raw = [math.exp(value - weights.max()) for value in weights]
        limit = sum(raw) / 25 * math.sqrt(25)
        cut = [min(value, limit) for value in raw]
        assert row == pytest.approx([value / sum(cut) for value in cut])
        assert sum(value > limit for value in raw) >= 1 and max(row) > min(row)  # small ones stay small


def test_equal_weights_stay_equal():
    assert truncated(torch.full((1, 7), -5.0, dtype=torch.float64)).tolist() == [[pytest.approx(1 / 7)] * 7]


def test_chosen_samples_follow_the_models_own_posterior(monkeypatch):
    """One latent dimension and an encoder that is wrong: the posterior is known by integration."""
    adata = cite()["rna"]
    av.tl.scvi(adata, n_latent=1, n_hidden=8, gene_likelihood="nb", max_epochs=10)
    model = av.get.model(adata)
    cells = read_cells(adata, model.setup)
    for parameter in model.network.parameters():
        parameter.requires_grad_(False)
    head = model.network.encoder
    for layer in (head.mean, head.log_var):
        layer.weight.zero_()
        layer.bias.zero_()
    cell = 11
    (block,) = encode.blocks(model, cells, torch.tensor([cell]))
    grid = torch.linspace(-6, 6, 4001)[:, None]
    many = block.batch._replace(codes=None, batch=block.batch.batch.repeat(4001), label=block.batch.label.repeat(4001))
    share = model.network.decode_rna(grid, many, Draws()).log_scale.double().exp().numpy()
    theta = model.network.rna.log_theta[0].double().exp().numpy()
    mean = share * float(block.batch.log_library.double().exp())
    x = cells.x.dense(cells.x_row[[cell]])[0].numpy()
    log_p = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mean)).sum(1)
    log_p += scipy.stats.norm.logpdf(grid[:, 0].numpy())
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    wanted = float(weight @ grid[:, 0].numpy())
    sd = float(np.sqrt(weight @ (grid[:, 0].numpy() - wanted) ** 2))
    head.mean.bias.fill_(wanted - 1)  # the encoder is wrong by one, and wider than the posterior
    assert sd < 0.4 and float(block.q_z.var) == pytest.approx(1, abs=1e-3)

    monkeypatch.setattr(bound, "N_PROPOSALS", 200)
    found = resample(model, cells, torch.full((600,), cell), 0, 0)
    # 600 draws, and what 200 proposals leave of the truncation: a tenth of the posterior's width
    assert abs(float(found.z.mean()) - wanted) < 0.1 * sd + 5 * sd / math.sqrt(600)
    assert float(found.z.std()) == pytest.approx(sd, rel=0.2)
    assert 1 < float(found.effective.min()) <= float(found.effective.max()) < 200


def test_every_draw_keeps_its_cell_and_the_noise_of_its_sample():
    mdata = cite()
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    model = av.get.model(mdata)
    cells = read_cells(mdata, model.setup)
    populations = [np.arange(50), np.arange(100, 130)]
    found = differential.draw_posterior(model, cells, populations, 20, 0, importance=True)
    assert torch.equal(found.index, differential.draw_posterior(model, cells, populations, 20, 0).index)
    assert 1 <= found.effective <= bound.N_PROPOSALS
    assert len(found.pick.unique()) > 3
    for population in range(2):
        for i in range(20):
            (block,) = encode.blocks(model, cells, found.index[population, i : i + 1])
            rows, sample = slice(i, i + 1), int(found.pick[population, i])
            noise = bound.noise_for(0, population, bound.Z, sample, rows, 20, torch.device("cpu"))
            z = block.q_z.mean + block.q_z.var.sqrt() * noise
            torch.testing.assert_close(found.z[population, i], z[0], rtol=1e-4, atol=1e-5)
