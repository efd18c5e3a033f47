"""Minibatches of fixed shape from device-resident cells, and the split into training and validation cells."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from anvi.nn import Batch

from .cells import Cells, Streamed


def take(
    cells: Cells,
    index: Tensor,
    weight: Tensor | None = None,
    n_labelled: int = 0,
    *,
    dense: bool = True,
    room: int | None = None,
) -> Batch:
    """The minibatch of the given cells.

    Parameters
    ----------
    cells
        All cells.
    index
        Positions in `cells`, labelled cells first.
    weight
        Weight of each cell; None counts every cell.
    n_labelled
        How many leading cells are labelled.
    dense
        Whether the counts are wanted as a dense matrix, too.
    room
        Number of entries, some of them zeros, of a minibatch without dense counts; None: as many as there are.
    """
    mask = None if cells.mask_table is None else cells.mask_table.index_select(0, cells.mask_row[index])
    rows = cells.x_row[index]
    x, entries = cells.x.dense(rows) if dense else (None, cells.x.entries(rows, room))
    return Batch(
        x=x,
        y=None if cells.y is None else cells.proteins(index),
        measured=mask,
        batch=cells.batch[index],
        panel=None if cells.panel is None else cells.panel[index],
        codes=None if cells.codes is None else cells.codes[index],
        continuous=None if cells.continuous is None else cells.continuous[index],
        log_library=cells.sizes(index),
        label=cells.label[index],
        weight=torch.ones(len(index), device=index.device) if weight is None else weight,
        n_labelled=n_labelled,
        entries=entries,
        allowed=None if cells.label_table is None else cells.label_table.index_select(0, cells.label_row[index]),
        has_rna=None if cells.has_rna is None else cells.has_rna[index],
    )


def chunks(cells: Cells, index: Tensor, size: int, *, dense: bool = True) -> Iterator[Batch]:
    """All cells of `index` once, in its order, labelled ones counted only if they lead: for queries and validation."""
    known = (cells.label[index] >= 0).cpu()  # one wait for the device, not one per chunk
    for part, labelled in zip(index.split(size), known.split(size), strict=True):
        lead = int(labelled.sum()) if bool((labelled[:-1] >= labelled[1:]).all()) else 0
        yield take(cells, part, n_labelled=lead, dense=dense)


def labelled_first(cells: Cells, index: Tensor) -> Tensor:
    """The same cells, labelled ones first, otherwise in their order."""
    return index[torch.argsort((cells.label[index] < 0).long(), stable=True)]


class StepCells(NamedTuple):
    """The cells of one step."""

    index: Tensor  # type: ignore[assignment]  # (cells,) positions, labelled cells first
    weight: Tensor  # (cells,) 1, or 0 for padding
    balanced: Tensor | None  # (further labelled cells,) positions
    n_labelled: int  # so many of the first cells are labelled
    n_entries: int  # non-zero counts of the cells, at most, in any step of the epoch
    n_balanced_entries: int  # likewise, of the further cells


HELD = 50_000
"""Where counts are streamed, cells that stay in memory: so many to validate with, and so many labelled ones, of every
class as many, that the class-balanced minibatches are drawn from."""


class Minibatches:
    """An epoch of minibatches, every one with the same number of labelled and of unlabelled cells.

    Every training cell comes once per epoch with weight 1. What is missing to fill the last places is filled with
    other cells of weight 0, so no minibatch is ever short, a last one of one cell least of all. Where counts are
    streamed, all this holds of the cells whose blocks are in memory together.

    Parameters
    ----------
    cells
        All cells, on the device.
    index
        Training cells.
    size
        Largest number of cells in a minibatch; the cells of an epoch are spread evenly.
    labelled_size
        Size of the extra class-balanced minibatch of labelled cells; 0 for none. Coarse labels make it larger.
    generator
        CPU generator that shuffles.
    n_ranks
        Least number of cells of a kind in a minibatch, so that each of several processes has one.
    """

    def __init__(
        self,
        cells: Cells,
        index: Tensor,
        size: int,
        labelled_size: int,
        generator: torch.Generator,
        n_ranks: int = 1,
    ):
        self.cells, self.size, self.generator, self.n_ranks = cells, size, generator, n_ranks
        self.n_stored = cells.x.indptr.diff().cpu()[cells.x_row.cpu()]  # (all cells,)
        self.index = index.cpu()
        self.label, told = cells.label.cpu(), cells.told.cpu()[self.index]
        self.classes = [self.index[told == code] for code in told[told >= 0].unique()]  # and coarse labels beside them
        n_fine = len(self.label[self.index][self.label[self.index] >= 0].unique())
        # coarse labels come beside the classes, not in their place
        self.labelled_size = labelled_size * len(self.classes) // (n_fine or len(self.classes) or 1)
        self.labelled_size = max(self.labelled_size, n_ranks) if self.labelled_size else 0
        self.sets: list[list[int]] = []  # blocks of the epoch that is planned, where counts are streamed
        if isinstance(cells.x, Streamed):
            self._sort(cells.x)

    def _sort(self, x: Streamed) -> None:
        """Sort the cells by block; of every class leave all labelled cells, or as many as there is room to hold."""
        fixed = torch.Generator().manual_seed(self.generator.initial_seed())  # the same after an interruption
        block = x.block_of(self.cells.x_row.cpu()[self.index])
        block = block.where(block < x.n_blocks, torch.arange(len(block)) % x.n_blocks)  # those without RNA, anywhere
        per_block = block.bincount(minlength=x.n_blocks).tolist()
        self.of_block = self.index[block.argsort(stable=True)].split(per_block)
        most = max(1, HELD // max(1, len(self.classes)))
        self.classes = [one[torch.randperm(len(one), generator=fixed)[:most]] for one in self.classes]

    def reading(self) -> AbstractContextManager[None]:
        """Around the steps of the epoch that was planned last: what lies in a file is read ahead."""
        return self.cells.x.ahead(self.sets) if isinstance(self.cells.x, Streamed) else nullcontext()

    def plan(self) -> list[StepCells]:
        """The cells of each step of an epoch, drawn on the CPU and moved to the device at once."""
        device, columns = self.cells.label.device, []
        for together in self._together():
            label = self.label[together]
            n_steps = -(-len(together) // self.size)
            parts = [self._spread(part, n_steps) for part in (together[label >= 0], together[label < 0]) if len(part)]
            index = torch.cat([cells for cells, _ in parts], dim=1)  # (steps, cells)
            weight = torch.cat([weight for _, weight in parts], dim=1).to(device)
            n_labelled = parts[0][0].shape[1] if bool((label >= 0).any()) else 0
            columns.append((index, weight, n_labelled))
        n_steps = sum(len(index) for index, *_ in columns)
        balanced: Sequence[Tensor | None] | Tensor = [None] * n_steps
        n_balanced_entries = 0
        if self.labelled_size:
            drawn = self._balanced(n_steps * self.labelled_size).view(n_steps, -1)
            n_balanced_entries = int(self.n_stored[drawn].sum(1).max())
            balanced = drawn.to(device)
        most = max(int(self.n_stored[index].sum(1).max()) for index, *_ in columns), n_balanced_entries
        rows = [
            (*row, n_labelled)
            for index, weight, n_labelled in columns
            for row in zip(index.to(device), weight, strict=True)
        ]
        return [
            StepCells(index, weight, extra, n_labelled, *most)
            for (index, weight, n_labelled), extra in zip(rows, balanced, strict=True)
        ]

    def _together(self) -> list[Tensor]:
        """Cells that are shuffled together: all of them, or those of the blocks that are in memory at a time."""
        if not isinstance(self.cells.x, Streamed):
            return [self.index]
        self.sets = self.cells.x.shuffled(self.generator)
        cells = [torch.cat([self.of_block[block] for block in blocks]) for blocks in self.sets]
        self.sets = [blocks for blocks, some in zip(self.sets, cells, strict=True) if len(some)]
        return [some for some in cells if len(some)]

    def _spread(self, stream: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
        """Shuffle a stream over `(steps, size)` places; the padding is spread over the steps, one or none each."""
        order = stream[torch.randperm(len(stream), generator=self.generator)]
        size = max(self.n_ranks, -(-len(stream) // n_steps))
        places = n_steps * size
        padded = order.repeat(-(-places // len(order)))[:places]
        weight = (torch.arange(places) < len(order)).float()
        return padded.view(size, n_steps).T.contiguous(), weight.view(size, n_steps).T.contiguous()

    def _balanced(self, n: int) -> Tensor:
        """`n` labelled cells, classes in turn in random order, each class's cells reshuffled every time round."""
        n_classes = len(self.classes)
        rounds = -(-n // n_classes)
        order = torch.rand(rounds, n_classes, generator=self.generator).argsort(1).view(-1)[:n]
        out = torch.empty(n, dtype=torch.long)
        for code, members in enumerate(self.classes):
            places = (order == code).nonzero().squeeze(1)
            turns = -(-len(places) // len(members))
            shuffled = [members[torch.randperm(len(members), generator=self.generator)] for _ in range(turns)]
            if turns:
                out[places] = torch.cat(shuffled)[: len(places)]
        return out


def split(cells: Cells, train_size: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training and validation cells, every class (and the unlabelled cells) divided in the same proportion.

    A class always keeps at least one training cell.

    Parameters
    ----------
    cells
        All cells, on the CPU.
    train_size
        Share of training cells, above 0 and at most 1; more where counts are streamed, and else more than `HELD` cells
        would validate.
    generator
        CPU generator that shuffles.

    Returns
    -------
    Sorted positions of training and of validation cells.
    """
    train_size = max(train_size, 1 - HELD / len(cells)) if cells.streamed else train_size
    train, validation = [], []
    debt = 0.0  # what rounding took from validation so far, so that small classes add up to the right share
    told = cells.told
    for code in told.unique():
        members = (told == code).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        wanted = (1 - train_size) * len(members) + debt
        n_validation = min(int(wanted + 1e-9), len(members) - 1)
        debt = wanted - n_validation
        validation.append(members[:n_validation])
        train.append(members[n_validation:])
    return torch.cat(train).sort().values, torch.cat(validation).sort().values
