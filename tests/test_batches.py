from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import cite

from anvi._data.batches import Minibatches, chunks, labelled_first, split, take
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup


@pytest.fixture(scope="module")
def cells():
    mdata = cite()
    setup = find_setup(mdata, proteins=True, labels_key="cell_type", batch_key="batch", panel_key="panel")
    return read_cells(mdata, setup, labels=True)


def with_labels(cells, labels):
    return replace(cells, label=torch.as_tensor(labels, dtype=torch.long))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def minibatches(cells, index=None, size=64, labelled_size=32, seed=0) -> Minibatches:
    index = torch.arange(len(cells)) if index is None else index
    return Minibatches(cells, index, size, labelled_size, generator(seed))


SOME = [[2, 0, 1, -1, -1][i % 5] for i in range(300)]
LABELS = {
    "none": [-1] * 300,
    "some": SOME,
    "all": [i % 3 for i in range(300)],
    "hardly": [0, 1, *([-1] * 298)],
    "all but one": [-1, *(i % 3 for i in range(299))],
}
EVERY_LABELLING = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())


@EVERY_LABELLING
@pytest.mark.parametrize("size", [64, 299, 300, 512, 2])
def test_every_training_cell_counts_once_per_epoch(cells, labels, size):
    of = minibatches(with_labels(cells, labels), size=size)
    for _ in range(2):
        steps = of.plan()
        index = torch.cat([index for index, *_ in steps])
        weight = torch.cat([weight for _, weight, *_ in steps])
        assert set(weight.tolist()) <= {0.0, 1.0}
        counted = index[weight == 1]
        assert sorted(counted.tolist()) == list(range(300))
        assert all(weight.any() for _, weight, *_ in steps)  # no step is all padding


@EVERY_LABELLING
@pytest.mark.parametrize("n", [300, 257, 129, 65, 3, 2])
def test_shapes_are_the_same_in_every_step(cells, labels, n):
    """n % size == 1 too: a last minibatch of a single cell never comes up."""
    of = minibatches(with_labels(cells, labels), torch.arange(n))
    shapes = {
        (len(choice.index), len(choice.weight), len(choice.balanced) if choice.balanced is not None else None)
        for choice in of.plan()
    }
    assert len(shapes) == 1
    n_cells, n_weights, _ = shapes.pop()
    assert n_cells == n_weights and 1 < n_cells <= 64 + 1  # two streams are rounded up one by one
    assert len(of.plan()) == -(-n // 64)


@EVERY_LABELLING
def test_labelled_cells_lead(cells, labels):
    cells = with_labels(cells, labels)
    of = minibatches(cells)
    for choice in of.plan():
        batch = take(cells, choice.index, choice.weight, choice.n_labelled)
        extra = None if choice.balanced is None else take(cells, choice.balanced, n_labelled=len(choice.balanced))
        assert (batch.label[: batch.n_labelled] >= 0).all() and (batch.label[batch.n_labelled :] < 0).all()
        if extra is not None:
            assert extra.n_labelled == len(extra.label) == 32 and (extra.label >= 0).all()
    assert (of.plan()[0].n_labelled == 0) == (max(labels) < 0)


def test_without_labels_there_is_no_extra_batch(cells):
    assert all(extra is None for _, _, extra, *_ in minibatches(with_labels(cells, LABELS["none"])).plan())
    assert all(extra is None for _, _, extra, *_ in minibatches(cells, labelled_size=0).plan())


def test_cells_are_shuffled_anew_each_epoch_and_by_the_generator_alone(cells):
    of = minibatches(cells)
    first, second = (torch.cat([index for index, *_ in of.plan()]) for _ in range(2))
    assert not torch.equal(first, second)
    again = torch.cat([index for index, *_ in minibatches(cells).plan()])
    assert torch.equal(first, again)
    other = torch.cat([index for index, *_ in minibatches(cells, seed=1).plan()])
    assert not torch.equal(first, other)


class TestBalanced:
    LABELS = [0] * 100 + [1] * 40 + [2] * 7 + [3] + [-1] * 152

    def epochs(self, cells, n, **options):
        of = minibatches(with_labels(cells, self.LABELS), **options)
        return [torch.cat([extra for _, _, extra, *_ in of.plan()]) for _ in range(n)]

    @pytest.mark.parametrize("labelled_size", [32, 33, 3, 1])
    def test_every_class_comes_equally_often(self, cells, labelled_size):
        for extra in self.epochs(cells, 3, labelled_size=labelled_size):
            counts = np.bincount(np.array(self.LABELS)[extra], minlength=4)
            assert counts.max() - counts.min() <= 1 and counts.sum() == 5 * labelled_size

    def test_the_cells_of_a_class_take_turns(self, cells):
        """A cell of a class comes back only when all others of its class had their turn."""
        (extra,) = self.epochs(cells, 1)
        times = np.bincount(extra, minlength=300)
        for code in range(4):
            members = times[np.array(self.LABELS) == code]
            assert members.max() - members.min() <= 1
        assert times[np.array(self.LABELS) < 0].sum() == 0

    def test_reshuffled_between_epochs(self, cells):
        first, second = self.epochs(cells, 2)
        assert not torch.equal(first, second)
        cells_of = [set(extra[np.array(self.LABELS)[extra] == 0].tolist()) for extra in (first, second)]
        assert cells_of[0] != cells_of[1]  # other cells of the largest class, not only another order

    def test_a_minibatch_is_balanced_too(self, cells):
        of = minibatches(with_labels(cells, self.LABELS), labelled_size=40)
        for _, _, extra, *_ in of.plan():
            counts = np.bincount(np.array(self.LABELS)[extra], minlength=4)
            assert counts.min() >= 10 - 1 and counts.max() <= 10 + 1

    def test_classes_without_a_training_cell_are_left_out(self, cells):
        of = minibatches(with_labels(cells, self.LABELS), torch.arange(140))
        extra = torch.cat([extra for _, _, extra, *_ in of.plan()])
        assert set(np.array(self.LABELS)[extra]) == {0, 1} and extra.max() < 140


def test_take_picks_the_rows(cells):
    index = torch.tensor([5, 250, 5, 17])
    batch = take(cells, index, torch.tensor([1.0, 0, 1, 1]), n_labelled=2)
    for name in ("y", "batch", "panel", "codes", "log_library", "label"):
        of_all = getattr(cells, name)
        of_all = of_all.float() if name == "y" else of_all  # torch 2.6 has no index of uint16
        assert torch.equal(getattr(batch, name), of_all[index]), name
    assert torch.equal(batch.measured, cells.measured[index])
    assert torch.equal(batch.x, cells.x.dense(cells.x_row)[0][index])
    assert batch.weight.tolist() == [1, 0, 1, 1] and batch.n_labelled == 2 and batch.continuous is None
    assert take(cells, index).weight.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("size", [7, 100, 1000])
def test_chunks_cover_all_cells_in_order(cells, size):
    index = torch.arange(299, -1, -1)
    parts = list(chunks(cells, index, size))
    assert torch.equal(torch.cat([part.label for part in parts]), cells.label[index])
    assert torch.equal(torch.cat([part.x for part in parts]), cells.x.dense(cells.x_row)[0][index])
    assert sum(float(part.weight.sum()) for part in parts) == 300


def test_chunks_count_labelled_cells_that_lead(cells):
    index = labelled_first(cells, torch.arange(300))
    n_labelled = int((cells.label >= 0).sum())
    labelled = index[:n_labelled]
    assert (cells.label[labelled] >= 0).all() and (cells.label[index[n_labelled:]] < 0).all()
    assert (labelled[1:] > labelled[:-1]).all()  # otherwise in their order
    assert sum(part.n_labelled for part in chunks(cells, index, 64)) == n_labelled
    for part in chunks(cells, torch.arange(300), 64):
        assert part.n_labelled == 0 or (part.label[: part.n_labelled] >= 0).all()


class TestSplit:
    @pytest.mark.parametrize("train_size", [0.9, 0.8, 0.5, 0.1])
    @pytest.mark.parametrize(
        "labels", [LABELS["some"], LABELS["none"], TestBalanced.LABELS], ids=["some", "none", "rare"]
    )
    def test_every_class_is_divided_alike(self, cells, labels, train_size):
        cells = with_labels(cells, labels)
        train, validation = split(cells, train_size, generator())
        assert sorted(torch.cat([train, validation]).tolist()) == list(range(300))
        for code in set(labels):
            n, kept = labels.count(code), int((cells.label[train] == code).sum())
            assert kept >= 1 and abs(kept - train_size * n) <= max(1, 1 - train_size * n)
        assert abs(len(train) - 300 * train_size) <= 1 + (train_size == 0.1)  # classes too small to lose a cell

    def test_small_classes_add_up_to_the_right_share(self, cells):
        """Forty classes of seven cells: each alone would round to nothing."""
        labels = [i // 7 if i < 280 else -1 for i in range(300)]
        _, validation = split(with_labels(cells, labels), 0.9, generator())
        assert (np.array(labels)[validation] >= 0).sum() == 28

    def test_everything_is_for_training_when_asked(self, cells):
        train, validation = split(cells, 1.0, generator())
        assert len(train) == 300 and len(validation) == 0

    def test_follows_the_generator_alone(self, cells):
        one, other, third = (split(cells, 0.9, generator(seed))[1] for seed in (0, 0, 1))
        assert torch.equal(one, other) and not torch.equal(one, third)
