"""The label part: which rows are evaluated, and what each cell gets from them."""

import numpy as np
import pytest
import reference
import torch
from networks import N_LABELS, N_LATENT, FixedDraws, Naive, array, make_config, make_network

from anvi.nn import VAE, Draws

N_CELLS = 6


def labels_part(**options):
    """A label part, latent samples and class codes (-1 past the labelled ones is never looked at)."""
    network = make_network(make_config("scanvi", **options))
    z = torch.randn(N_CELLS, N_LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return network, z, torch.tensor([2, 0, 1, 1, 0, 2])


def noise_of(label: torch.Tensor, n_labelled: int) -> tuple[np.ndarray, FixedDraws]:
    """Noise of u by cell and class, and the same in the order of the rows."""
    noise = torch.randn(N_CELLS, N_LABELS, N_LATENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = noise[torch.arange(n_labelled), label[:n_labelled]]
    return noise, FixedDraws(torch.cat([own, noise[n_labelled:].flatten(0, 1)]))


@torch.no_grad()
@pytest.mark.parametrize("n_labelled", range(N_CELLS + 1))
@pytest.mark.parametrize("options", [{}, {"linear_classifier": True}, {"label_prior": "empirical"}], ids=str)
def test_every_cell_gets_its_own_class_or_the_mean_over_classes(n_labelled, options):
    network, z, label = labels_part(**options)
    noise, draws = noise_of(label, n_labelled)
    terms = network.labels(z, label, n_labelled, draws)
    naive = Naive(network)
    for n in range(N_CELLS):
        parts = naive.latent_terms(array(z[n]), None, None, {"u": noise}, n)
        prior = parts["class_prior"]
        weights = parts["class_probabilities"]
        kl_label = reference.kl_categorical(weights, prior)
        if n < n_labelled:
            weights = reference.one_hot([label[n]], N_LABELS)[0]
            kl_label = -np.log(prior[label[n]])
        # float64 on both sides
        assert float(terms.log_prior[n]) == pytest.approx(weights @ parts["log_pz_by_class"], rel=1e-11)
        assert float(terms.kl_u[n]) == pytest.approx(weights @ parts["kl_u_by_class"], rel=1e-11)
        assert float(terms.kl_label[n]) == pytest.approx(kl_label, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("n_labelled", range(N_CELLS + 1))
def test_a_labelled_cell_costs_one_row_and_an_unlabelled_one_a_row_per_class(n_labelled):
    network, z, label = labels_part(n_layers_encoder=2)
    rows = []

    def count(module, given, out):
        rows.append(len(given[0]))

    for part in (network.labels.encode_u, network.labels.decode_u):
        for linear in part.stack.linear:
            linear.register_forward_hook(count)
    network.labels(z, label, n_labelled, Draws())
    assert rows == [n_labelled + (N_CELLS - n_labelled) * N_LABELS] * 3  # two layers and one


def test_codes_beyond_the_labelled_cells_are_not_looked_at():
    network, z, label = labels_part()
    one = network.labels(z, label, 2, Draws())
    other = network.labels(z, torch.where(torch.arange(N_CELLS) < 2, label, -1), 2, Draws())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_latent_space_without_doubt_is_finite():
    network, z, label = labels_part()
    with torch.no_grad():
        network.labels.classifier.weight.mul_(1e6)
    terms = network.labels(z, label, 0, Draws())
    sum(part.sum() for part in terms).backward()
    assert all(torch.isfinite(part).all() for part in terms)
    assert all(torch.isfinite(p.grad).all() for p in network.labels.parameters() if p.grad is not None)


def test_the_classifier_is_linear_if_asked():
    network, z, _ = labels_part(linear_classifier=True)
    part = network.labels
    assert part.classifier_stack is None
    torch.testing.assert_close(part.classify(z, Draws()), z @ part.classifier.weight.T + part.classifier.bias)


@pytest.mark.parametrize("prior, learned", [("uniform", False), ("empirical", False), ("learned", True)])
def test_the_class_prior_moves_only_if_it_is_learned(prior, learned):
    network, z, label = labels_part(label_prior=prior)
    sum(part.sum() for part in network.labels(z, label, 3, Draws())).backward()
    assert network.labels.log_prior.requires_grad is learned
    assert (network.labels.log_prior.grad is not None) is learned


def test_the_class_prior_starts_uniform_and_need_not_be_normalised():
    fresh = VAE(make_config("scanvi"), torch.Generator()).labels
    torch.testing.assert_close(fresh.log_prior.exp(), torch.full((N_LABELS,), 1 / N_LABELS))
    network, z, label = labels_part()
    one = network.labels(z, label, 3, Draws()).kl_label
    network.labels.log_prior.data += 5
    torch.testing.assert_close(network.labels(z, label, 3, Draws()).kl_label, one)


def test_the_prior_of_z_has_a_floor_and_the_incumbents_has_none():
    for objective, floor in (("bound", 1e-4), ("scvi-tools", 0.0)):
        network, z, _ = labels_part(objective=objective)
        decoder = network.labels.decode_u
        with torch.no_grad():
            decoder.log_var.weight.zero_()
            decoder.log_var.bias.fill_(-30)
        var = decoder(z, torch.zeros(N_CELLS, 1, dtype=torch.long), Draws()).var
        torch.testing.assert_close(var, torch.full_like(var, floor + np.exp(-30)))
