"""Every likelihood and divergence against the loops of `reference.py`, in value and gradient."""

import numpy as np
import pytest
import reference
import torch
from torch.distributions import Normal, kl_divergence

from anvi.nn import likelihoods

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(4.0, (4, 6)).astype(float) * RNG.integers(0, 2, (4, 6))
# arguments in the order of each function, as arrays of the parameters that the network has
CASES = {
    "poisson": (likelihoods.poisson, lambda x, m: reference.poisson_log_prob(x, np.exp(m)), 1),
    "nb": (likelihoods.nb, lambda x, m, t: reference.nb_log_prob(x, np.exp(m), np.exp(t)), 2),
    "zinb": (likelihoods.zinb, lambda x, m, t, z: reference.zinb_log_prob(x, np.exp(m), np.exp(t), z), 3),
    "normal": (likelihoods.normal, lambda x, m, s: reference.normal_log_prob(x, m, np.exp(s)), 2),
    "nb_mixture": (
        likelihoods.nb_mixture,
        lambda y, b, f, p, m: reference.nb_mixture_log_prob(y, np.exp(b), np.exp(f), np.exp(p), m),
        4,
    ),
}


def parameters(n: int) -> list[np.ndarray]:
    """`n` arrays of moderate values."""
    rng = np.random.default_rng(n)
    return [rng.normal(0.5, 1.0, COUNTS.shape) for _ in range(n)]


@pytest.mark.parametrize("name", CASES)
def test_value(name):
    ours, theirs, n = CASES[name]
    given = parameters(n)
    value = ours(torch.tensor(COUNTS), *map(torch.tensor, given)).numpy()
    # scipy's own log-gammas cancel to about 1e-13 of values of up to 100
    np.testing.assert_allclose(value, theirs(COUNTS, *given), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradient(name):
    ours, theirs, n = CASES[name]
    given = parameters(n)
    tensors = [torch.tensor(part, requires_grad=True) for part in given]
    ours(torch.tensor(COUNTS), *tensors).sum().backward()
    for i, tensor in enumerate(tensors):
        numerical = reference.numerical_gradient(
            lambda part, i=i: theirs(COUNTS, *given[:i], part, *given[i + 1 :]), given[i]
        )
        # central differences with a step of 1e-6: rounding of values of up to 100 over the step, 1e-8
        np.testing.assert_allclose(tensor.grad.numpy(), numerical, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [0, 1, 2, 30, 1_000, 100_000])
@pytest.mark.parametrize("mean", [1e-9, 1e-3, 1.0, 1e5])
@pytest.mark.parametrize("theta", [1e-4, 1.0, 1e4, 1e8])
def test_extreme_counts_means_and_dispersions(count, mean, theta):
    given = (count, np.log(mean), np.log(theta))
    x, log_mean, log_theta = (torch.tensor(value, dtype=torch.float64) for value in given)
    exact = float(reference.nb_log_prob_products(count, mean, theta))
    value = float(likelihoods.nb(x, log_mean, log_theta))
    # log-gamma of 1e8 is 1.7e9, its rounding 2e-7, and two of them are subtracted
    assert value == pytest.approx(exact, rel=1e-11, abs=1e-6 if theta == 1e8 else 1e-9)


def test_a_very_small_mean_still_pulls():
    log_mean = torch.tensor(-80.0, requires_grad=True)
    likelihoods.nb(torch.tensor(3.0), log_mean, torch.tensor(0.0)).backward()
    assert float(log_mean.grad) == pytest.approx(3.0)  # no constant inside the logarithm that would saturate


@pytest.mark.parametrize("name", [name for name in CASES if name != "normal"])
def test_single_precision_stays_finite(name):
    ours, _, n = CASES[name]
    grid = torch.cartesian_prod(torch.tensor([0.0, 1.0, 100_000.0]), *[torch.tensor([-60.0, -1.0, 18.4])] * n)
    x, *given = (part.clone().requires_grad_(i > 0) for i, part in enumerate(grid.T))
    value = ours(x, *given)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(part.grad).all() for part in given)


def test_a_zero_inflated_count_is_a_distribution():
    x = torch.arange(400.0).double()
    ones = torch.ones_like(x)
    for mean, theta, logit in ((2.0, 0.7, -1.0), (0.1, 5.0, 2.0)):
        log_prob = likelihoods.zinb(x, ones * np.log(mean), ones * np.log(theta), ones * logit)
        assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-9)


def test_the_mixture_without_doubt_is_its_component():
    y, back, fore, phi = torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([0.5])
    for mixing, mean in ((80.0, back), (-80.0, fore)):
        mixed = likelihoods.nb_mixture(y, back, fore, phi, torch.tensor([mixing]))
        torch.testing.assert_close(mixed, likelihoods.nb(y, mean, phi))


# --- divergences -----------------------------------------------------------------------------------------------------

GAUSSIANS = [(0.0, 1.0, 0.0, 1.0), (1.3, 0.2, -0.4, 2.0), (-3.0, 1e-4, 0.0, 1.0), (0.5, 4.0, 3.0, 0.04)]


@pytest.mark.parametrize("mean, var, prior_mean, prior_var", GAUSSIANS)
def test_kl_of_normals(mean, var, prior_mean, prior_var):
    given = [torch.tensor(value, dtype=torch.float64) for value in (mean, var, prior_mean, prior_var)]
    by_quadrature = reference.kl_normal(mean, var, prior_mean, prior_var)  # good to 1e-11 of its value
    value = likelihoods.kl_normal(given[0], given[1].sqrt(), given[2], given[3].sqrt())
    assert float(value) == pytest.approx(by_quadrature, rel=1e-9, abs=1e-10)
    if (prior_mean, prior_var) == (0.0, 1.0):
        assert float(likelihoods.kl_standard_normal(*given[:2])) == pytest.approx(by_quadrature, rel=1e-9, abs=1e-10)


def test_gradients_of_the_kl_of_normals():
    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(7, generator=rng, dtype=torch.float64) for _ in range(4)]
    ours = [part.exp() if i % 2 else part.clone() for i, part in enumerate(given)]
    theirs = [part.clone().requires_grad_() for part in ours]
    ours = [part.requires_grad_() for part in ours]
    likelihoods.kl_normal(*ours).sum().backward()
    kl_divergence(Normal(*theirs[:2]), Normal(*theirs[2:])).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)  # both exact up to rounding

    mean, var = (part.detach().requires_grad_() for part in ours[:2])
    likelihoods.kl_standard_normal(mean, var).sum().backward()
    torch.testing.assert_close(mean.grad, mean.detach())
    torch.testing.assert_close(var.grad, 0.5 * (1 - 1 / var.detach()))


def test_log_normal_density_takes_a_variance():
    z, mean, var = np.array([0.3, -2.0]), np.array([1.0, 0.5]), np.array([0.25, 9.0])
    value = likelihoods.log_normal_density(*map(torch.tensor, (z, mean, var)))
    np.testing.assert_allclose(value.numpy(), reference.normal_log_prob(z, mean, np.sqrt(var)), rtol=1e-13)


def test_kl_of_categoricals():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    log_q = logits.clone().requires_grad_()
    value = likelihoods.kl_categorical(log_q.log_softmax(-1), prior.log())
    expected = [reference.kl_categorical(reference.softmax(row.numpy()), prior.numpy()) for row in logits]
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-12)
    value.sum().backward()
    numerical = reference.numerical_gradient(
        lambda rows: np.array([reference.kl_categorical(reference.softmax(row), prior.numpy()) for row in rows]),
        logits.numpy(),
    )
    np.testing.assert_allclose(log_q.grad.numpy(), numerical, rtol=1e-6, atol=1e-9)  # central differences


def test_kl_of_a_class_that_is_ruled_out_is_finite():
    log_q = torch.tensor([0.0, -300.0, -1e6], requires_grad=True)  # its probability underflows
    value = likelihoods.kl_categorical(log_q.log_softmax(-1), torch.full((3,), 1 / 3).log())
    value.backward()
    assert float(value.detach()) == pytest.approx(np.log(3))
    assert torch.isfinite(log_q.grad).all()
