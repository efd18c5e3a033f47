"""The stack against the loops of `reference.py`, batch norm against torch's, and noise from its own generator only."""

import numpy as np
import pytest
import reference
import torch
from networks import FixedDraws, array

from anvi.nn import Draws, Gaussian
from anvi.nn.layers import BatchNorm, GaussianEncoder, Linear, Stack

N_CELLS, N_IN, N_HIDDEN, SIZES = 6, 3, 5, (3, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 and eval mode, all parameters and running statistics away from their start."""
    rng = generator(3)
    for part in module.modules():
        if isinstance(part, Linear):
            part.reset(rng)
    module.double()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            noise = torch.randn(value.shape, generator=rng, dtype=torch.float64)
            value.copy_(0.5 + noise.abs()) if name.endswith("running_var") else value.add_(0.5 * noise)
    return module.eval()


def codes() -> tuple[torch.Tensor, list[np.ndarray]]:
    """Rows of the covariate table, and the same as one-hot blocks."""
    rng = np.random.default_rng(1)
    columns = [rng.integers(size, size=N_CELLS) for size in SIZES]
    blocks = [reference.one_hot(column, size) for column, size in zip(columns, SIZES, strict=True)]
    return torch.tensor(np.stack([columns[0], columns[1] + SIZES[0]], 1)), blocks


def as_reference(stack: Stack) -> dict:
    """Weights of a stack in the layout of `reference.fc_stack`: one-hot columns behind the others."""
    weights = [
        np.concatenate([array(part.weight), *([] if part.covariates is None else [array(part.covariates).T])], axis=1)
        for part in stack.linear
    ]
    norms = None
    if stack.norm is not None:
        norms = [{name: array(value) for name, value in norm.state_dict().items()} for norm in stack.norm]
    return {"weights": weights, "biases": [array(part.bias) for part in stack.linear], "norms": norms}


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("inject", [None, False, True])
def test_a_stack_is_its_layers_one_by_one(n_layers, batch_norm, layer_norm, inject):
    options = {"batch_norm": batch_norm, "layer_norm": layer_norm, "inject": bool(inject)}
    stack = shaken(Stack(N_IN, N_HIDDEN, n_layers, 0 if inject is None else sum(SIZES), **options))
    rows, blocks = codes()
    h = torch.randn(N_CELLS, N_IN, generator=generator(), dtype=torch.float64)
    out = stack(h, None if inject is None else rows, Draws())
    expected = reference.fc_stack(
        array(h), [] if inject is None else blocks, **as_reference(stack), layer_norm=layer_norm, inject=bool(inject)
    )
    np.testing.assert_allclose(array(out), expected, rtol=1e-12, atol=1e-12)  # float64 on both sides


def test_dropout_is_off_in_eval_mode():
    stack = shaken(Stack(N_IN, N_HIDDEN, 2, dropout=0.9))
    h = torch.randn(N_CELLS, N_IN, generator=generator(), dtype=torch.float64)
    assert torch.equal(stack(h, None, Draws()), stack(h, None, Draws(generator())))


@pytest.mark.parametrize("floor", [0.0, 1e-4, 0.5])
def test_the_gaussian_encoder_has_a_floor_under_its_variance(floor):
    encoder = shaken(GaussianEncoder(Stack(N_IN, N_HIDDEN, 2, sum(SIZES)), N_HIDDEN, 2, floor=floor))
    rows, blocks = codes()
    h = torch.randn(N_CELLS, N_IN, generator=generator(), dtype=torch.float64)
    q = encoder(h, rows, Draws())
    heads = [array(value) for part in (encoder.mean, encoder.log_var) for value in (part.weight, part.bias)]
    mean, var = reference.encode(array(h), blocks, *as_reference(encoder.stack).values(), *heads, var_floor=floor)
    np.testing.assert_allclose(array(q.mean), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(array(q.var), var, rtol=1e-12)
    assert (q.var > floor).all()


# --- linear ----------------------------------------------------------------------------------------------------------


def test_a_covariate_table_is_the_one_hot_columns_of_a_weight():
    linear = shaken(Linear(N_IN, 4, sum(SIZES)))
    rows, blocks = codes()
    h = torch.randn(N_CELLS, N_IN, generator=generator(), dtype=torch.float64)
    whole = torch.cat([h, torch.tensor(np.concatenate(blocks, 1))], 1)
    weight = torch.cat([linear.weight, linear.covariates.T], 1)
    torch.testing.assert_close(linear(h, rows), whole @ weight.T + linear.bias, rtol=1e-13, atol=1e-13)


def test_a_table_row_of_an_absent_category_gets_no_gradient():
    linear = shaken(Linear(N_IN, 4, sum(SIZES)))
    rows = torch.tensor([[0, 3], [2, 3]])
    linear(torch.ones(2, N_IN, dtype=torch.float64), rows).sum().backward()
    assert (linear.covariates.grad[[1, 4]] == 0).all()
    assert (linear.covariates.grad[[0, 2, 3]] != 0).all()


def test_a_linear_layer_starts_like_torchs_with_the_one_hot_columns_among_its_inputs():
    linear = Linear(40, 30, 24)
    linear.reset(generator())
    bound = (40 + 24) ** -0.5
    for parameter in linear.parameters():
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.8 * bound
    again = Linear(40, 30, 24)
    again.reset(generator())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in linear.state_dict().items())


# --- batch norm ------------------------------------------------------------------------------------------------------


def test_batch_norm_is_torchs_in_value_gradient_and_running_statistics():
    ours, theirs = BatchNorm(N_HIDDEN).double(), torch.nn.BatchNorm1d(N_HIDDEN, momentum=0.01, eps=1e-3).double()
    rng = generator()
    start = torch.rand(N_HIDDEN, generator=rng, dtype=torch.float64)
    for module in (ours, theirs):
        module.weight.data.copy_(start + 0.5)
        module.bias.data.copy_(start)
    for step in range(4):
        h = 3 * torch.randn(7, N_HIDDEN, generator=rng, dtype=torch.float64) + step
        one, other = h.clone().requires_grad_(), h.clone().requires_grad_()
        outputs = ours(one), theirs(other)
        for out in outputs:
            out.square().sum().backward()
        assert torch.equal(*outputs)  # the same kernel of torch
        assert torch.equal(one.grad, other.grad)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    ours.eval()
    theirs.eval()
    assert torch.equal(ours(h), theirs(h))
    assert not torch.equal(ours(h), outputs[0])


def test_batch_norm_takes_all_leading_axes_as_rows():
    h = torch.randn(4, 3, N_HIDDEN, generator=generator())
    one, other = BatchNorm(N_HIDDEN), BatchNorm(N_HIDDEN)
    assert torch.equal(one(h).flatten(0, 1), other(h.flatten(0, 1)))


def test_batch_norm_of_a_single_row_uses_what_is_known():
    norm = shaken(BatchNorm(N_HIDDEN))
    row = torch.randn(1, N_HIDDEN, generator=generator(), dtype=torch.float64)
    expected = norm(row)
    before = norm.running_mean.clone()
    norm.train()
    assert torch.equal(norm(row), expected)
    assert torch.equal(norm.running_mean, before)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_and_dropout_come_from_the_generator_and_nowhere_else():
    stack = shaken(Stack(N_IN, 64, 2, dropout=0.4)).train()
    h = torch.randn(N_CELLS, N_IN, generator=generator(), dtype=torch.float64)
    before = torch.random.get_rng_state()

    def run(seed: int) -> torch.Tensor:
        draws = Draws(generator(seed))
        out = stack(h, None, draws)
        return torch.cat([out, draws.normal(out)], 1).detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_randomness_does_not_change_ours():
    torch.manual_seed(0)
    one = Draws(generator()).normal(torch.empty(5))
    torch.manual_seed(1)
    torch.rand(100)
    assert torch.equal(one, Draws(generator()).normal(torch.empty(5)))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("shape", [(100_001,), (251, 401)])
def test_dropout_drops_the_right_share_and_keeps_the_mean(rate, shape):
    mask = Draws(generator()).keep(torch.empty(shape), rate)
    assert mask.shape == shape
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    # five standard errors of a share among 100,000
    assert float((mask == 0).float().mean()) == pytest.approx(rate, abs=5 * (rate * (1 - rate) / 1e5) ** 0.5)


def test_neighbours_are_dropped_independently():
    kept = Draws(generator()).keep(torch.empty(200_000), 0.5) > 0
    for lag in (1, 2, 3, 4, 5):
        agree = (kept[lag:] == kept[:-lag]).float().mean()
        assert float(agree) == pytest.approx(0.5, abs=5 * 0.5 / 200_000**0.5)


def test_noise_is_standard_normal():
    noise = Draws(generator()).normal(torch.empty(100_000))
    assert float(noise.mean()) == pytest.approx(0, abs=5 / 1e5**0.5)  # five standard errors
    assert float(noise.var()) == pytest.approx(1, abs=5 * (2 / 1e5) ** 0.5)


def test_without_a_generator_nothing_is_dropped_from_the_global_one():
    stack = shaken(Stack(N_IN, N_HIDDEN, 1, dropout=0.4)).train()
    with pytest.raises(ValueError, match="needs a generator"):
        stack(torch.ones(2, N_IN, dtype=torch.float64), None, Draws())


def test_without_a_generator_a_sample_is_the_mean():
    q = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 9.0]))
    assert torch.equal(q.sample(Draws()), q.mean)
    assert torch.equal(q.sample(FixedDraws(torch.tensor([1.0, -1.0]))), torch.tensor([3.0, -5.0]))
