"""Draws against the moments of the distributions, and against scipy's own."""

import numpy as np
import pytest
import torch
from scipy import stats

from anvi.nn import likelihoods

N = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).expand(N, -1)


def close(drawn: torch.Tensor, distribution) -> None:
    """Mean and variance within five standard errors; the error of a variance is taken from the fourth moment."""
    x = drawn.double().numpy()
    mean, var, kurtosis = (np.asarray(m, dtype=float) for m in distribution.stats(moments="mvk"))
    assert (np.abs(x.mean(0) - mean) < 5 * np.sqrt(var / N)).all()
    assert (np.abs(x.var(0) - var) < 5 * var * np.sqrt((kurtosis + 2) / N)).all()


def test_nb():
    mean, theta = np.array([0.05, 1.0, 30.0, 400.0]), np.array([0.3, 2.0, 1.0, 50.0])
    drawn = likelihoods.sample_nb(grid(mean), torch.tensor(theta, dtype=torch.float32), generator())
    close(drawn, stats.nbinom(theta, theta / (theta + mean)))
    assert torch.equal(drawn, drawn.round())
    # the whole distribution, not two moments of it: share of each small count
    exact = stats.nbinom(2.0, 2.0 / 3.0)
    for count in range(5):
        p = exact.pmf(count)
        assert abs(float((drawn[:, 1] == count).float().mean()) - p) < 5 * np.sqrt(p * (1 - p) / N)


def test_gamma():
    shape, mean = np.array([0.2, 1.0, 20.0]), np.array([3.0, 0.01, 500.0])
    drawn = likelihoods.sample_gamma(torch.tensor(shape, dtype=torch.float32), grid(mean), generator())
    close(drawn, stats.gamma(shape, scale=mean / shape))


def test_poisson_is_cut_where_float32_counts_no_more():
    close(likelihoods.sample_poisson(grid([0.1, 7.0]), generator()), stats.poisson([0.1, 7.0]))
    assert likelihoods.sample_poisson(torch.tensor([1e30, torch.inf]), generator()).max() < 1.01e8


def test_zinb():
    mean, theta, pi = 4.0, 3.0, 0.3
    logits = torch.full((N, 1), np.log(pi / (1 - pi)), dtype=torch.float32)
    drawn = likelihoods.sample_zinb(grid([mean]), torch.tensor([theta]), logits, generator()).numpy()
    p = pi + (1 - pi) * stats.nbinom.pmf(0, theta, theta / (theta + mean))
    assert abs((drawn == 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / N)
    assert abs(drawn.mean() - (1 - pi) * mean) < 5 * drawn.std() / np.sqrt(N)


def test_normal_and_bernoulli():
    close(
        likelihoods.sample_normal(grid([-1.0, 5.0]), torch.tensor([0.1, 3.0]), generator()),
        stats.norm([-1, 5], [0.1, 3]),
    )
    close(likelihoods.sample_bernoulli(grid([0.1, 0.9]), generator()).float(), stats.bernoulli([0.1, 0.9]))


@pytest.mark.parametrize(
    "draw", [likelihoods.sample_nb, lambda m, t, g: likelihoods.sample_zinb(m, t, torch.zeros_like(m), g)]
)
def test_the_generator_alone_decides(draw):
    state = torch.get_rng_state()
    mean, theta = grid([1.0, 5.0]), torch.tensor([1.0, 2.0])
    one, same, other = (draw(mean, theta, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
