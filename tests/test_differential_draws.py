"""Which cells are drawn and encoded, and in which batches they are decoded."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import cite

import anvi as av
from anvi._data.cells import read_cells
from anvi._posterior import differential, encode
from anvi._posterior.differential import draw_posterior, genes, measured_in, proteins


@pytest.fixture(scope="module")
def fit():
    """A joint model of three batches, the last without proteins, and two panels; nothing in it is changed."""
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = cite()
        av.tl.totalvi(mdata, batch_key="batch", max_epochs=2)
    return mdata


@pytest.fixture
def asked(fit):
    """A model of one's own, its cells, and two populations."""
    model = av.get.model(fit)
    cells = read_cells(fit, model.setup)
    types = fit.obs["true_cell_type"].astype(str).reindex(cells.names).to_numpy()
    return model, cells, [np.flatnonzero(types == name) for name in ("NK", "B")]


def test_only_drawn_cells_are_encoded_each_once(asked, monkeypatch):
    model, cells, populations = asked
    seen, real = [], encode.take

    def take(cells, index, **options):
        seen.extend(index.tolist())
        return real(cells, index, **options)

    monkeypatch.setattr(encode, "take", take)
    found = draw_posterior(model, cells, populations, 25, 0)
    assert sorted(seen) == sorted(set(found.index.flatten().tolist()))
    assert len(seen) < len(cells)


def test_cells_are_drawn_evenly_and_with_replacement(asked):
    model, cells, populations = asked
    found = draw_posterior(model, cells, populations, 20_000, 0)
    for index, population in zip(found.index.numpy(), populations, strict=True):
        assert set(index) == set(population)
        counts = np.bincount(index, minlength=len(cells))[population]
        expected = 20_000 / len(population)
        # multinomial: five standard deviations of a Poisson count
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    again, other = (
        draw_posterior(model, cells, populations, 20_000, 0),
        draw_posterior(model, cells, populations, 20_000, 1),
    )
    assert torch.equal(found.index, again.index) and torch.equal(found.z, again.z)
    assert not torch.equal(found.index, other.index)


def test_latent_vectors_have_the_posterior_of_their_cell(asked, monkeypatch):
    model, cells, _ = asked
    cell = np.array([17])
    found = draw_posterior(model, cells, [cell, cell], 4000, 0)
    (block,) = encode.blocks(model, cells, torch.tensor([17]))
    for z in found.z:
        # the mean of 4,000 draws within 5 standard errors, the variance within 5 of its own: sqrt(2 / 4000)
        assert (abs(z.mean(0) - block.q_z.mean[0]) < 5 * (block.q_z.var[0] / 4000).sqrt()).all()
        assert (abs(z.var(0) / block.q_z.var[0] - 1) < 5 * np.sqrt(2 / 4000)).all()
    assert not torch.equal(found.z[0], found.z[1])  # noise of one's own for each population
    monkeypatch.setattr(encode, "CHUNK", 3)
    torch.testing.assert_close(draw_posterior(model, cells, [cell, cell], 4000, 0).z, found.z)


def test_background_noise_is_standard_normal_and_belongs_to_the_draw(asked):
    model, cells, populations = asked
    found = draw_posterior(model, cells, populations, 1000, 0)
    noise = found.background_noise(slice(0, 1000), 20)
    assert noise.shape == (2, 1000, 20)
    # 40,000 numbers: standard errors 0.005 and 0.007
    assert abs(noise.mean()) < 0.025 and abs(noise.var() - 1) < 0.035
    assert torch.equal(found.background_noise(slice(100, 700), 20), noise[:, 100:700])
    # another sample of the same draw has other noise, its neighbours keep theirs
    pick = found.pick.clone()
    pick[0, 5] = 3
    other = found._replace(pick=pick).background_noise(slice(0, 1000), 20)
    changed = (other != noise).any(-1)
    assert changed[0, 5] and changed.sum() == 1


def test_where_proteins_were_measured(asked):
    model, cells, _ = asked
    table = measured_in(model, cells).numpy()
    assert model.setup.panel_key is None
    np.testing.assert_array_equal(table, model.setup.measured)
    assert not table[2].any() and table[0].all() and not table[1].all()
    # panels of their own: the cells tell, batch by batch
    setup = dataclasses.replace(model.setup, panel_key="panel")
    seen = np.zeros_like(table)
    for cell, code in enumerate(cells.batch.tolist()):
        seen[code] |= cells.measured[cell].numpy()
    np.testing.assert_array_equal(measured_in(dataclasses.replace(model, setup=setup), cells).numpy(), seen)
    # data without any protein: every batch, if the fit has seen the protein
    blind = dataclasses.replace(cells, mask_table=torch.zeros_like(cells.mask_table))
    assert measured_in(dataclasses.replace(model, setup=setup), blind).all()


@torch.no_grad()
def test_batches_that_did_not_measure_a_protein_have_no_say(asked):
    model, cells, populations = asked
    found, rows = draw_posterior(model, cells, populations, 30, 0), slice(0, 30)
    before = proteins(model, cells, found, batch_correction=True)(rows)
    genes_before = genes(model, cells, found, batch_correction=True)(rows)
    for name, table in model.network.named_parameters():
        if name.endswith("covariates"):
            table[2] = 50.0  # whatever stands there for the batch without proteins
    torch.testing.assert_close(proteins(model, cells, found, batch_correction=True)(rows), before)
    assert not torch.allclose(genes(model, cells, found, batch_correction=True)(rows), genes_before)
    own = proteins(model, cells, found, batch_correction=False)(rows)
    unstained = cells.batch[found.index] == 2
    assert own[unstained].isnan().all()
    measured = torch.tensor(model.setup.measured)[cells.batch[found.index]]
    assert torch.equal(~own.isnan(), measured)


@torch.no_grad()
def test_values_of_some_rows_are_those_of_all(asked):
    model, cells, populations = asked
    found = draw_posterior(model, cells, populations, 30, 0)
    for values in (genes, proteins):
        for batch_correction in (True, False):
            ask = values(model, cells, found, batch_correction=batch_correction)
            torch.testing.assert_close(ask(slice(7, 20)), ask(slice(0, 30))[:, 7:20], equal_nan=True)


def test_proteins_that_nobody_measured_are_left_out(asked):
    model, cells, populations = asked
    table = np.array(model.setup.measured)
    table[:, 4] = False
    setup = dataclasses.replace(model.setup, measured=tuple(map(tuple, table.tolist())))
    other = dataclasses.replace(model, setup=setup)
    found = draw_posterior(model, cells, populations, 30, 0)
    for batch_correction in (True, False):
        whole, less = (
            proteins(one, cells, found, batch_correction=batch_correction)(slice(0, 30)) for one in (model, other)
        )
        torch.testing.assert_close(less, whole[..., np.arange(20) != 4], equal_nan=True)
    assert differential.PRIOR_COUNT == 0.1
