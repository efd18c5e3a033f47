"""The classifier that cells must fool: which loss moves what."""

import numpy as np
import pytest
import reference
import torch

from anvi._fit.step import Adversary
from anvi.nn import Draws

N_CELLS, N_LATENT, N_GROUPS = 7, 4, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(train: bool = False):
    """An adversary, latent vectors that want a gradient, groups and weights."""
    adversary = Adversary(N_LATENT, N_GROUPS, generator()).double().train(train)
    z = torch.randn(N_CELLS, N_LATENT, generator=generator(1), dtype=torch.float64).requires_grad_()
    weight = torch.tensor([1.0, 1, 0, 1, 1, 0, 1], dtype=torch.float64)
    return adversary, z, torch.tensor([0, 1, 2, 0, 1, 1, 2]), weight


def test_it_gives_probabilities():
    adversary, z, _, _ = make()
    log_p = adversary(z, Draws())
    assert log_p.shape == (N_CELLS, N_GROUPS)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(N_CELLS, dtype=torch.float64))


def test_both_losses_by_loops():
    adversary, z, group, weight = make()
    log_p = adversary(z, Draws()).detach().numpy()
    fooling, own, total = 0.0, 0.0, 0.0
    for n in range(N_CELLS):
        others = [log_p[n, k] for k in range(N_GROUPS) if k != group[n]]
        fooling -= float(weight[n]) * sum(others) / (N_GROUPS - 1)
        own -= float(weight[n]) * log_p[n, group[n]]
        total += float(weight[n])
    value = float(adversary.fooling_loss(z, group, weight, Draws()).detach())
    assert value == pytest.approx(fooling / total, rel=1e-12)
    assert float(adversary.own_loss(z, group, weight, Draws()).detach()) == pytest.approx(own / total, rel=1e-12)


def test_the_fooling_loss_reaches_the_latent_vectors():
    adversary, z, group, weight = make()
    adversary.fooling_loss(z, group, weight, Draws()).backward()
    assert (z.grad.abs().sum(1) > 0).tolist() == (weight > 0).tolist()

    def value(rows):
        return float(adversary.fooling_loss(torch.tensor(rows), group, weight, Draws()).detach())

    numerical = reference.numerical_gradient(value, z.detach().numpy())
    np.testing.assert_allclose(z.grad.numpy(), numerical, rtol=1e-6, atol=1e-8)  # central differences


def test_its_own_loss_does_not_reach_them():
    adversary, z, group, weight = make()
    value = adversary.own_loss(z, group, weight, Draws())
    value.backward()
    assert z.grad is None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adversary.parameters())
    assert adversary.head.weight.grad.any()


def test_the_losses_pull_in_opposite_directions():
    adversary, z, group, weight = make()
    own, fooling = adversary.own_loss(z, group, weight, Draws()), adversary.fooling_loss(z, group, weight, Draws())
    with torch.no_grad():  # a classifier that is surer of itself
        adversary.head.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    first = group == 0
    ones = first.double()
    assert adversary.own_loss(z, group, ones, Draws()) < own
    assert adversary.fooling_loss(z, group, ones, Draws()) > fooling


def test_a_cell_of_weight_zero_counts_in_nothing():
    adversary, z, group, weight = make()
    other = torch.where((weight > 0)[:, None], z, 5.0)
    for loss in (adversary.fooling_loss, adversary.own_loss):
        assert torch.equal(loss(z, group, weight, Draws()), loss(other, group, weight, Draws()))


def test_it_learns_to_tell_groups_apart():
    group = torch.arange(60) % N_GROUPS
    z = torch.nn.functional.one_hot(group, N_LATENT).float() * 3
    adversary = Adversary(N_LATENT, N_GROUPS, generator())
    optimizer = torch.optim.Adam(adversary.parameters(), lr=1e-2)
    draws = Draws(generator(2))
    for _ in range(60):
        optimizer.zero_grad()
        adversary.own_loss(z, group, torch.ones(60), draws).backward()
        optimizer.step()
    assert torch.equal(adversary.eval()(z, Draws()).argmax(1), group)


def test_start_and_dropout_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    adversary, z, group, weight = make(train=True)
    again, *_ = make(train=True)
    one, two = (part.own_loss(z, group, weight, Draws(generator(3))) for part in (adversary, again))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.random.get_rng_state())
