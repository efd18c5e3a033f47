"""The fast likelihoods equal their definitions, value and gradient. Tolerances are those of the arithmetic."""

import numpy as np
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
        lambda entries: lambda *a: sparse.nb(entries, *a),
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


def fast_from_logits(entries, eps):
    return lambda *a: sparse.nb(entries, *a[:-1], log_library=a[-1], eps=eps)


def defined_from_logits(name, x, eps):
    def value(logits, *rest):
        *others, log_library = rest
        log_mean = log_library + logits.log_softmax(-1)
        log_mean = (log_mean.exp() + eps).log() if eps else log_mean
        return getattr(likelihoods, name)(x, log_mean, *others).sum(-1)

    return value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("per_cell", [False, True], ids=["per gene", "per cell"])
@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_softmax_and_library_in_the_same_pass(name, per_cell, eps, dtype):
    x, (logits, log_theta, zero_logits), weight = draw((9, 57), per_cell, dtype, seed=3)
    log_library = torch.linspace(2, 9, 9, dtype=dtype)[:, None]
    arguments = [logits, log_theta, *([zero_logits] if name == "zinb" else []), log_library]
    value, gradients = with_gradients(fast_from_logits(Entries.of(x), eps), arguments, weight)
    definition = defined_from_logits(name, x, eps)
    defined, _ = with_gradients(definition, arguments, weight)
    exact, exact_gradients = with_gradients(
        defined_from_logits(name, x.double(), eps), [argument.double() for argument in arguments], weight.double()
    )
    # a count of 50,000 costs the definition itself more than 1e-5 in float32; ours must not be further from the truth
    assert largest_relative(value, exact) < max(TOLERANCE[dtype], largest_relative(defined, exact))
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert largest_relative(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_blocks_of_cells_change_nothing(name, monkeypatch):
    x, arguments, weight = draw((23, 40), False, torch.float64, seed=4)
    arguments = [*arguments[: 2 + (name == "zinb")], torch.full((23, 1), 5.0, dtype=torch.float64)]
    fast = fast_from_logits(Entries.of(x), 0.0)
    value, gradients = with_gradients(fast, arguments, weight)
    monkeypatch.setattr(sparse, "BLOCK", 100)  # two rows and a half: blocks of two, the last of one
    in_blocks, gradients_in_blocks = with_gradients(fast, arguments, weight)
    torch.testing.assert_close(in_blocks, value, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients_in_blocks, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_a_mean_of_zero_says_nothing_of_a_zero_and_rules_out_a_count(name):
    x = torch.tensor([[0.0, 3.0], [2.0, 1.0]])
    log_mean = torch.tensor([[-torch.inf, 1.0], [-torch.inf, 1.0]])
    arguments = [log_mean, torch.zeros(2), *([torch.zeros(2, 2)] if name == "zinb" else [])]
    value = sparse.nb(Entries.of(x), *arguments)
    alone = getattr(likelihoods, name)(x[:, 1:], log_mean[:, 1:], *(part[..., 1:] for part in arguments[1:])).sum(-1)
    torch.testing.assert_close(value[0], alone[0])
    assert value[1] == -torch.inf


@pytest.mark.parametrize("log_mean", [-30.0, -33.0, -36.0])
def test_the_small_constant_keeps_the_digits_of_gradients(log_mean):
    # d/d log mean of x log(mean + eps) is x mean / (mean + eps); 1 - eps / (mean + eps) has no digits left in float32
    leaf = torch.full((1, 1), log_mean, requires_grad=True)
    sparse.nb(Entries.of(torch.full((1, 1), 7.0)), leaf, torch.zeros(1), eps=1e-8).sum().backward()
    assert float(leaf.grad) == pytest.approx(7 * np.exp(log_mean) / (np.exp(log_mean) + 1e-8), rel=1e-4)


def test_a_second_backward_pass_is_refused():
    x, (log_mean, log_theta, _), _ = draw((3, 5), False, torch.float64)
    total = sparse.nb(Entries.of(x), log_mean.requires_grad_(), log_theta).sum()
    total.backward(retain_graph=True)
    with pytest.raises(AttributeError):  # its buffers are used up; a silent second pass would be wrong
        total.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per_cell", [False, True], ids=["per protein", "per cell"])
def test_protein_mixture_equals_definition(per_cell, dtype):
    y, (log_background, log_phi, mixing), weight = draw((13, 8), per_cell, dtype, seed=5)
    arguments = [log_background, log_background + mixing.abs(), log_phi, mixing.flip(0)]
    value, gradients = with_gradients(lambda *a: sparse.nb_mixture(y, *a).sum(-1), arguments, weight)
    expected, expected_gradients = with_gradients(lambda *a: likelihoods.nb_mixture(y, *a).sum(-1), arguments, weight)
    assert largest_relative(value, expected) < TOLERANCE[dtype]
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert largest_relative(ours, theirs) < TOLERANCE[dtype]


def test_coefficient_against_many_digits():
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 40
    for count in (0, 1, 2, 7, 8, 9, 100, 12_345, 1_000_000):
        for log_theta in np.linspace(-12, 18, 11):
            theta = mpmath.e ** mpmath.mpf(log_theta)
            exact = mpmath.loggamma(count + theta) - mpmath.loggamma(theta) - mpmath.loggamma(count + 1)
            slope = theta * (mpmath.digamma(count + theta) - mpmath.digamma(theta))
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-6)):
                # in float32 theta is rounded by 6e-8 of itself, which the slope turns into an error of the value
                rounding = 0 if dtype == torch.float64 else 1e-7 * float(slope)
                value, by_log_theta = sparse.coefficient(
                    torch.tensor(count, dtype=dtype), torch.tensor(float(theta), dtype=dtype)
                )
                assert float(value) == pytest.approx(float(exact), rel=tolerance, abs=10 * tolerance + rounding)
                assert float(by_log_theta) == pytest.approx(float(slope), rel=10 * tolerance, abs=tolerance)


@pytest.mark.parametrize("log_theta", [7.0, 10.0, 14.0])
def test_nearly_poisson_counts_keep_their_digits_in_float32(log_theta):
    # the definition in float32 takes the difference of two numbers of a million here
    x, (log_mean, _, _), _ = draw((8, 50), False, torch.float64, spread=1.0, seed=6)
    x = x.clamp(max=20)
    exact = likelihoods.nb(x, log_mean, torch.full((50,), log_theta, dtype=torch.float64)).sum(-1)
    entries = Entries.of(x.float())
    ours = sparse.nb(entries, log_mean.float(), torch.full((50,), log_theta))
    assert largest_relative(ours.double(), exact) < 2e-6
