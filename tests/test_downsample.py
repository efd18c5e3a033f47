"""Cells as another experiment would have seen them, beside loops over single counts."""

import numpy as np
import pytest
import torch
from helpers import cite

from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._posterior.confidence import Shift, downsampled


@pytest.fixture(scope="module")
def cells():
    data = cite()
    return read_cells(data, find_setup(data, proteins=True, labels_key="cell_type", batch_key="batch"), labels=True)


INDEX = torch.tensor([17, 3, 3, 250, 99])


def test_nothing_shifted_is_the_same(cells):
    same = downsampled(cells, INDEX, Shift(), 0)
    everyone = torch.arange(len(INDEX))
    for ours, theirs in zip(take(same, everyone), take(cells, INDEX), strict=True):
        if torch.is_tensor(theirs):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert list(same.names) == list(cells.names[INDEX.numpy()])


def test_counts_are_thinned_and_nothing_else(cells):
    index = torch.arange(len(cells))
    thin = downsampled(cells, index, Shift(depth=0.4), 1)
    before, after = take(cells, index), take(thin, index)
    assert (after.x <= before.x).all() and (after.x == after.x.round()).all() and (after.y <= before.y).all()
    for old, new in ((before.x, after.x), (before.y, after.y)):
        n = float(old.sum())
        assert abs(float(new.sum()) - 0.4 * n) < 5 * np.sqrt(n * 0.4 * 0.6)  # five standard errors of a binomial
    assert torch.equal(after.measured, before.measured) and torch.equal(after.label, before.label)
    np.testing.assert_allclose(after.log_library.exp().squeeze(1), after.x.sum(1).clamp(min=1), rtol=1e-4)


def test_each_gene_has_an_efficiency_of_its_own(cells):
    index = torch.arange(len(cells))
    after = take(downsampled(cells, index, Shift(depth=0.3, spread=0.5), 2), index).x.sum(0)
    before = take(cells, index).x.sum(0)
    many = before > 2_000
    log_kept = (after[many] / before[many]).log()
    # 2,000 counts leave an error of .03 in a log share of .3; the sample of genes one of .5 / sqrt(2 n)
    assert abs(float(log_kept.std()) - 0.5) < 0.03 + 4 * 0.5 / np.sqrt(2 * int(many.sum()))


def test_hidden_proteins_are_not_measured(cells):
    hidden = take(downsampled(cells, INDEX, Shift(proteins=False), 0), torch.arange(5))
    assert not hidden.measured.any() and not hidden.y.any()


def test_the_seed_decides(cells):
    one, same, other = (downsampled(cells, INDEX, Shift(0.5, 0.3), seed).x.values for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
