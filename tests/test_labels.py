"""The label part: which rows are evaluated, and what each cell gets from them."""

import numpy as np
import pytest
import reference
import torch
from networks import N_LABELS, N_LATENT, FixedDraws, Naive, array, make_config, make_network

from anvi.nn import VAE, Draws
from anvi.nn.labels import set_cross_entropy

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


# labels that leave several classes open -------------------------------------------------------------------------------

SETS = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"linear_classifier": True}, {"label_prior": "empirical"}], ids=str)
def test_a_coarse_label_is_averaged_over_its_classes_alone(options):
    network, z, label = labels_part(**options)
    noise, draws = noise_of(label, 0)
    terms = network.labels(z, label, 0, draws, SETS)
    naive = Naive(network)
    for n in range(N_CELLS):
        parts = naive.latent_terms(array(z[n]), None, None, {"u": noise}, n)
        inside = [c for c in range(N_LABELS) if SETS[n, c]]
        total = sum(parts["class_probabilities"][c] for c in inside)
        q = {c: parts["class_probabilities"][c] / total for c in inside}
        kl_label = sum(q[c] * (np.log(q[c]) - np.log(parts["class_prior"][c])) for c in inside)
        assert float(terms.log_prior[n]) == pytest.approx(sum(q[c] * parts["log_pz_by_class"][c] for c in inside))
        assert float(terms.kl_u[n]) == pytest.approx(sum(q[c] * parts["kl_u_by_class"][c] for c in inside), rel=1e-11)
        assert float(terms.kl_label[n]) == pytest.approx(kl_label, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("n_labelled", range(N_CELLS + 1))
def test_one_class_or_all_of_them_are_the_two_cases_of_old(n_labelled):
    """The same numbers and gradients, a labelled cell being one whose label leaves a single class open."""
    network, z, label = labels_part()
    noise = torch.randn(N_CELLS, N_LABELS, N_LATENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    allowed = torch.ones(N_CELLS, N_LABELS, dtype=torch.bool)
    allowed[:n_labelled] = torch.nn.functional.one_hot(label[:n_labelled], N_LABELS).bool()
    own = noise[torch.arange(n_labelled), label[:n_labelled]]
    old = network.labels(z, label, n_labelled, FixedDraws(torch.cat([own, noise[n_labelled:].flatten(0, 1)])))
    new = network.labels(z, label, 0, FixedDraws(noise.flatten(0, 1)), allowed)
    gradients = []
    for terms in (old, new):
        network.zero_grad(set_to_none=True)
        sum(part.sum() for part in terms).backward()
        gradients.append({name: p.grad for name, p in network.labels.named_parameters() if p.grad is not None})
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients[1].items():  # a labelled cell does not ask the classifier
        torch.testing.assert_close(gradients[0].get(name, torch.zeros_like(gradient)), gradient, rtol=1e-9, atol=1e-11)
    mixed = network.labels(
        z, label, n_labelled, FixedDraws(torch.cat([own, noise[n_labelled:].flatten(0, 1)])), allowed
    )
    for a, b in zip(old, mixed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_coarse_label_that_the_classifier_rules_out_is_finite():
    network, z, label = labels_part()
    with torch.no_grad():
        network.labels.classifier.weight.mul_(1e6)
    terms = network.labels(z, label, 0, Draws(), SETS)
    (sum(part.sum() for part in terms) + set_cross_entropy(network.labels.classify(z, Draws()), SETS).sum()).backward()
    assert all(torch.isfinite(part).all() for part in terms)
    assert all(torch.isfinite(p.grad).all() for p in network.labels.parameters() if p.grad is not None)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_surprise_at_a_label(smoothing):
    """Bit for bit the cross-entropy where one class is left, nothing where all are, else minus the log of a sum."""
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    code = torch.tensor([2, 0, 1, 1, 0, 2])
    one = torch.nn.functional.one_hot(code, 3).bool()
    old = torch.nn.functional.cross_entropy(logits, code, reduction="none", label_smoothing=smoothing)
    found = set_cross_entropy(logits, one, smoothing)
    assert torch.equal(found, old) if not smoothing else torch.allclose(found, old, rtol=1e-6)
    everything = set_cross_entropy(logits, torch.ones_like(one))
    torch.testing.assert_close(everything, torch.zeros(6), rtol=0, atol=1e-6)
    for row, inside, value in zip(logits.double(), SETS, set_cross_entropy(logits.double(), SETS), strict=True):
        p = [float(torch.exp(x)) for x in row]
        assert float(value) == pytest.approx(-np.log(sum(p[c] for c in range(3) if inside[c]) / sum(p)), abs=1e-12)
