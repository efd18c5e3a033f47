"""The protein decoder: background, foreground, their mixture, and who learns from whom."""

import numpy as np
import pytest
import reference
import torch
from networks import N_BATCHES, N_PANELS, N_PROTEINS, array, draws_of, make_batch, make_config, make_network, make_noise

from anvi.nn import VAE, Draws, negative_elbo


def decode(**options):
    """A decoder, its rates at drawn backgrounds, and the minibatch."""
    network = make_network(make_config("totalvi", **options))
    batch = make_batch(network.config, 6)
    z = torch.randn(6, network.config.n_latent, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    _, rates = network.decode(z, batch, Draws(torch.Generator().manual_seed(5)))
    return network.protein, rates, batch


@pytest.mark.parametrize(
    "options",
    [{}, {"protein_dispersion": "protein-batch"}, {"efficiency": True}, {"background_scale": "exp"}],
    ids=["plain", "protein-batch", "efficiency", "exp"],
)
def test_log_prob_of_every_protein(options):
    decoder, rates, batch = decode(**options)
    value = decoder.log_prob(batch.y, rates, batch.batch)
    shift = array(decoder.log_efficiency[batch.batch]) if options.get("efficiency") else 0.0
    expected = reference.nb_mixture_log_prob(
        array(batch.y),
        np.exp(array(rates.log_back) + shift),
        np.exp(array(rates.log_fore) + shift),
        np.exp(array(rates.log_phi)),
        array(rates.mixing),
    )
    np.testing.assert_allclose(array(value), expected, rtol=1e-11)  # float64; log-gammas cancel


def test_eps_is_a_floor_under_both_means():
    decoder, rates, batch = decode()
    value = decoder.log_prob(batch.y, rates, batch.batch, eps=0.5)
    means = [np.exp(array(part)) + 0.5 for part in (rates.log_back, rates.log_fore)]
    expected = reference.nb_mixture_log_prob(array(batch.y), *means, np.exp(array(rates.log_phi)), array(rates.mixing))
    np.testing.assert_allclose(array(value), expected, rtol=1e-11)


def test_kl_of_the_background_is_from_the_prior_of_the_cells_panel():
    decoder, rates, batch = decode()
    value = array(decoder.kl_background(rates, batch.panel))
    for n in range(2):
        for t in range(N_PROTEINS):
            prior_sd = np.exp(array(decoder.prior_log_scale)[batch.panel[n], t])
            expected = reference.kl_normal(
                array(rates.back_mean)[n, t],
                array(rates.back_scale)[n, t] ** 2,
                array(decoder.prior_mean)[batch.panel[n], t],
                prior_sd**2,
            )
            assert value[n, t] == pytest.approx(expected, rel=1e-8, abs=1e-9)  # the quadrature's own error


def test_foreground_is_never_below_background():
    _, rates, _ = decode()
    assert (rates.log_fore > rates.log_back).all()


def test_the_background_is_drawn_around_its_mean():
    network = make_network(make_config("totalvi"))
    batch = make_batch(network.config)
    z = torch.zeros(5, network.config.n_latent, dtype=torch.float64)
    noise = torch.full((5, N_PROTEINS), 2.0, dtype=torch.float64)

    class Twice:
        def normal(self, like):
            return noise

    _, rates = network.decode(z, batch, Twice())
    torch.testing.assert_close(rates.log_back, rates.back_mean + 2 * rates.back_scale)
    _, mean = network.decode(z, batch, Draws())
    assert torch.equal(mean.log_back, mean.back_mean)


def test_scales_are_positive_under_both_activations():
    for activation in ("softplus", "exp"):
        decoder, rates, _ = decode(background_scale=activation)
        assert (rates.back_scale > 0).all()


def test_a_dispersion_per_batch_is_that_of_the_cell():
    decoder, rates, batch = decode(protein_dispersion="protein-batch")
    assert decoder.log_phi.shape == (N_BATCHES, N_PROTEINS)
    assert torch.equal(rates.log_phi, decoder.log_phi[batch.batch])


def test_what_a_panel_did_not_measure_learns_nothing_from_its_cells():
    network = make_network(make_config("totalvi"))
    batch = make_batch(network.config)
    measured = torch.ones(5, N_PROTEINS, dtype=torch.bool)
    measured[batch.panel == 1, 2] = False
    batch = batch._replace(measured=measured)
    assert set(batch.panel.tolist()) == set(range(N_PANELS))
    negative_elbo(network.terms(batch, None, draws_of(make_noise(network.config, batch), batch))).sum().backward()
    for parameter in (network.protein.prior_mean, network.protein.prior_log_scale):
        assert parameter.grad[1, 2] == 0
        assert (parameter.grad.flatten()[:-1] != 0).all()


def test_the_start_is_the_published_one():
    network = make_network(make_config("totalvi", n_proteins=2_000))
    network.protein.reset(torch.Generator().manual_seed(0))
    log_phi = network.protein.log_phi.detach()
    assert 0 <= float(log_phi.min()) < 0.01
    assert 1.99 < float(log_phi.max()) <= 2
    fresh = VAE(make_config("totalvi", efficiency=True), torch.Generator()).protein
    assert (fresh.prior_mean == 3).all()
    assert (fresh.prior_log_scale == 0).all()
    assert (fresh.log_efficiency == 0).all()
    assert VAE(make_config("totalvi"), torch.Generator()).protein.log_efficiency is None
