"""The fast likelihoods equal their definitions, value and gradient. Tolerances are those of the arithmetic."""

import pytest
import torch

from anvi.nn import Entries, likelihoods, sparse

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw(shape, per_cell, dtype, spread=2.0, seed=0):
    """Counts with an empty row, a huge count and a few large ones; log means, log dispersions, zero logits."""
    generator = torch.Generator().manual_seed(seed)
    cells, genes = shape
    x = torch.poisson(torch.rand(cells, genes, generator=generator), generator=generator).to(dtype)
    x[0] = 0
    x[-1, -1] = 50_000
    x[-1, 0] = 37
    log_mean = spread * torch.randn(cells, genes, generator=generator, dtype=dtype)
    log_theta = torch.randn((cells, genes) if per_cell else (genes,), generator=generator, dtype=dtype)
    zero_logits = 2 * torch.randn(cells, genes, generator=generator, dtype=dtype)
    weight = torch.randn(cells, generator=generator, dtype=dtype)  # of both signs: no error hides in a sum
    return x, [log_mean, log_theta, zero_logits], weight


def with_gradients(function, arguments, weight):
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    value = function(*leaves)
    (weight * value).sum().backward()
    return value.detach(), [leaf.grad for leaf in leaves]


def largest_relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


CASES = {
    "nb": (lambda entries: lambda *a: sparse.nb(entries, *a), lambda x: lambda *a: likelihoods.nb(x, *a).sum(-1), 2),
    "zinb": (
        lambda entries: lambda *a: sparse.zinb(entries, *a),
        lambda x: lambda *a: likelihoods.zinb(x, *a).sum(-1),
        3,
    ),
    "poisson": (
        lambda entries: lambda *a: sparse.poisson(entries, *a),
        lambda x: lambda *a: likelihoods.poisson(x, *a).sum(-1),
        1,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per_cell", [False, True], ids=["per gene", "per cell"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 33), (16, 200)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_definition(name, shape, per_cell, dtype):
    fast, definition, n_arguments = CASES[name]
    x, arguments, weight = draw(shape, per_cell, dtype)
    value, gradients = with_gradients(fast(Entries.of(x)), arguments[:n_arguments], weight)
    expected, expected_gradients = with_gradients(definition(x), arguments[:n_arguments], weight)
    assert largest_relative(value, expected) < TOLERANCE[dtype]
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert largest_relative(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", CASES)
def test_extreme_means_stay_finite_and_equal(name):
    fast, definition, n_arguments = CASES[name]
    x, arguments, weight = draw((6, 40), False, torch.float64, spread=12.0, seed=1)
    value, gradients = with_gradients(fast(Entries.of(x)), arguments[:n_arguments], weight)
    expected, expected_gradients = with_gradients(definition(x), arguments[:n_arguments], weight)
    assert largest_relative(value, expected) < 1e-10
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert torch.isfinite(ours).all()
        assert largest_relative(ours, theirs) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_no_count_at_all(name):
    fast, definition, n_arguments = CASES[name]
    _, arguments, weight = draw((3, 5), False, torch.float64)
    x = torch.zeros(3, 5, dtype=torch.float64)
    value, gradients = with_gradients(fast(Entries.of(x)), arguments[:n_arguments], weight)
    expected, expected_gradients = with_gradients(definition(x), arguments[:n_arguments], weight)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_zeros_among_the_entries_do_no_harm(name):
    fast, _, n_arguments = CASES[name]
    x, arguments, weight = draw((4, 9), False, torch.float64)
    entries = Entries.of(x)
    row, column = (x == 0).nonzero(as_tuple=True)
    padded = Entries(
        torch.cat([entries.row, row[:5]]),
        torch.cat([entries.column, column[:5]]),
        torch.cat([entries.count, x[0, :5] * 0]),
    )
    value, gradients = with_gradients(fast(entries), arguments[:n_arguments], weight)
    with_zeros, gradients_with_zeros = with_gradients(fast(padded), arguments[:n_arguments], weight)
    torch.testing.assert_close(value, with_zeros, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, gradients_with_zeros, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
