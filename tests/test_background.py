"""Where the prior of the background starts: all cells at once, against one mixture fit per cell."""

import numpy as np
import pytest
import reference
import torch

from anvi._fit import start
from anvi._fit.start import lower_component

N_PROTEINS = 14


def separated(n_cells: int, seed: int = 0) -> np.ndarray:
    """Counts whose two components cannot be mistaken: a background around 3 and a foreground around 400."""
    rng = np.random.default_rng(seed)
    foreground = rng.random((n_cells, N_PROTEINS)) < 0.4
    foreground[:, :3], foreground[:, 3:6] = True, False
    return np.where(foreground, rng.poisson(400, foreground.shape), rng.poisson(3, foreground.shape)).astype(float)


def test_each_cells_lower_component_is_that_of_a_fit_of_its_own():
    values = np.log1p(separated(30))
    mean, scale = lower_component(torch.tensor(values), torch.ones(values.shape, dtype=torch.bool))
    expected = np.array([reference.gmm_two_component(row) for row in values])
    # where components are apart, both find the same ones; scikit-learn stops when the bound moves less than 1e-3
    np.testing.assert_allclose(mean.numpy(), expected[:, 0], rtol=1e-3)
    np.testing.assert_allclose(scale.numpy(), expected[:, 1], rtol=1e-3)


def test_what_was_not_measured_does_not_count():
    counts = separated(20)
    measured = np.random.default_rng(1).random(counts.shape) < 0.8
    measured[:, :6] = True
    values = np.log1p(counts)
    mean, scale = lower_component(torch.tensor(values), torch.tensor(measured))
    expected = np.array([reference.gmm_two_component(row[seen]) for row, seen in zip(values, measured, strict=True)])
    np.testing.assert_allclose(mean.numpy(), expected[:, 0], rtol=1e-3)
    np.testing.assert_allclose(scale.numpy(), expected[:, 1], rtol=1e-3)
    changed = torch.where(torch.tensor(measured), torch.tensor(values), 99.0)
    assert torch.equal(lower_component(changed, torch.tensor(measured))[0], mean)


def test_the_order_of_cells_and_proteins_changes_nothing():
    values = torch.tensor(np.log1p(separated(10)))
    seen = torch.ones(values.shape, dtype=torch.bool)
    mean, _ = lower_component(values, seen)
    torch.testing.assert_close(lower_component(values.flip(1), seen)[0], mean)
    assert torch.equal(lower_component(values.flip(0), seen)[0], mean.flip(0))


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_cell_with_the_same_count_everywhere_has_that_background(value):
    row = torch.full((1, N_PROTEINS), value)
    mean, scale = lower_component(row, torch.ones_like(row, dtype=torch.bool))
    assert float(mean) == pytest.approx(value)
    assert float(scale) > 0


def background_prior(counts, measured, *options, **more):
    table, row = measured.unique(dim=0, return_inverse=True)
    return start.background_prior(counts, table, row, *options, **more)


def test_the_prior_of_each_panel_is_that_of_its_cells():
    counts = np.concatenate([separated(100), 3 * separated(100, seed=1)])
    panel = np.repeat([0, 1], 100)
    measured = np.ones((2, N_PROTEINS), dtype=bool)
    measured[1, -2:] = False  # a panel without the last two
    seen = measured[panel]
    mean, log_scale = background_prior(
        torch.tensor(np.where(seen, counts, 0)), torch.tensor(seen), torch.tensor(panel), 2, torch.Generator()
    )
    # of 100 cells the published start takes the spread of their mean, a tenth; fits agree to 1e-3, see above
    expected = reference.background_prior(counts, panel, 2, measured)
    np.testing.assert_allclose(mean.numpy(), expected[0], rtol=1e-3)
    np.testing.assert_allclose(log_scale.exp().numpy(), 10 * expected[1], rtol=1e-3)
    assert mean[1] > mean[0]


def test_a_panel_with_too_few_proteins_takes_the_average_of_the_others():
    counts = torch.tensor(separated(60))
    panel = torch.arange(60) % 3
    measured = torch.ones(counts.shape, dtype=torch.bool)
    measured[panel == 2, 4:] = False
    mean, log_scale = background_prior(counts, measured, panel, 3, torch.Generator())
    assert float(mean[2]) == pytest.approx(float(mean[:2].mean()), rel=1e-6)
    assert float(log_scale[2]) == pytest.approx(float(log_scale[:2].mean()), rel=1e-6)


def test_without_any_panel_to_look_at_the_start_is_the_published_constant():
    counts = torch.ones(20, 4)
    mean, log_scale = background_prior(
        counts, torch.ones(20, 4, dtype=torch.bool), torch.zeros(20, dtype=torch.long), 2, torch.Generator()
    )
    assert mean.tolist() == [3.0, 3.0]
    assert log_scale.tolist() == [0.0, 0.0]


def test_the_cells_looked_at_come_from_the_generator_and_nowhere_else():
    counts, panel = torch.tensor(separated(80)), torch.zeros(80, dtype=torch.long)
    measured = torch.ones(counts.shape, dtype=torch.bool)
    before = torch.random.get_rng_state()

    def run(seed: int) -> torch.Tensor:
        return background_prior(counts, measured, panel, 1, torch.Generator().manual_seed(seed), n_sampled=10)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_cells_of_one_panel_do_not_move_another():
    counts = torch.tensor(separated(40))
    panel = torch.arange(40) % 2
    measured = torch.ones(counts.shape, dtype=torch.bool)
    one = background_prior(counts, measured, panel, 2, torch.Generator().manual_seed(0))[0]
    other = background_prior(
        torch.where((panel == 1)[:, None], counts * 5, counts), measured, panel, 2, torch.Generator().manual_seed(0)
    )[0]
    assert one[0] == other[0]
    assert one[1] != other[1]
