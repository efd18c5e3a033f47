"""Minibatches of fixed shape from device-resident cells, and the split into training and validation cells."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anvi.nn import Batch

from .cells import Cells


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
        log_library=cells.log_library[index],
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


class Minibatches:
    """An epoch of minibatches, every one with the same number of labelled and of unlabelled cells.

    Every training cell comes once per epoch with weight 1. What is missing to fill the last places is filled with
    other cells of weight 0, so no minibatch is ever short, a last one of one cell least of all.

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
    """

    def __init__(self, cells: Cells, index: Tensor, size: int, labelled_size: int, generator: torch.Generator):
        self.cells = cells
        self.generator = generator
        self.n_stored = cells.x.indptr.diff().cpu()[cells.x_row.cpu()]  # (all cells,)
        index = index.cpu()
        label = cells.label.cpu()[index]
        self.streams = [stream for stream in (index[label >= 0], index[label < 0]) if len(stream)]
        self.n_steps = -(-len(index) // size)
        self.sizes = [-(-len(stream) // self.n_steps) for stream in self.streams]
        self.n_labelled = self.sizes[0] if bool((label >= 0).any()) else 0
        told = cells.told.cpu()[index]
        self.classes = [index[told == code] for code in told[told >= 0].unique()]  # and coarse labels beside them
        n_fine = len(label[label >= 0].unique())
        # coarse labels come beside the classes, not in their place
        self.labelled_size = labelled_size * len(self.classes) // (n_fine or len(self.classes) or 1)

    def epoch(self) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield `n_steps` pairs of a minibatch and a class-balanced labelled minibatch."""
        for choice in self.plan():
            batch, balanced = take(self.cells, choice.index, choice.weight, self.n_labelled), choice.balanced
            yield batch, None if balanced is None else take(self.cells, balanced, n_labelled=len(balanced))

    def plan(self) -> list[StepCells]:
        """The cells of each step of an epoch, drawn on the CPU and moved to the device at once."""
        parts = [self._spread(stream, size) for stream, size in zip(self.streams, self.sizes, strict=True)]
        device = self.cells.label.device
        index = torch.cat([cells for cells, _ in parts], dim=1)  # (steps, cells)
        weight = torch.cat([weight for _, weight in parts], dim=1).to(device)
        balanced: Sequence[Tensor | None] | Tensor = [None] * self.n_steps
        n_balanced_entries = 0
        if self.labelled_size:
            drawn = self._balanced(self.n_steps * self.labelled_size).view(self.n_steps, -1)
            n_balanced_entries = int(self.n_stored[drawn].sum(1).max())
            balanced = drawn.to(device)
        most = self.n_labelled, int(self.n_stored[index].sum(1).max()), n_balanced_entries
        columns = (index.to(device), weight, balanced)
        return [StepCells(*row, *most) for row in zip(*columns, strict=True)]

    def _spread(self, stream: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Shuffle a stream over `(steps, size)` places; the padding is spread over the steps, one or none each."""
        order = stream[torch.randperm(len(stream), generator=self.generator)]
        places = self.n_steps * size
        padded = order.repeat(-(-places // len(order)))[:places]
        weight = (torch.arange(places) < len(order)).float()
        return padded.view(size, self.n_steps).T.contiguous(), weight.view(size, self.n_steps).T.contiguous()

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
        Share of training cells, above 0 and at most 1.
    generator
        CPU generator that shuffles.

    Returns
    -------
    Sorted positions of training and of validation cells.
    """
    if not 0 < train_size <= 1:
        raise ValueError(f"train_size={train_size} must be above 0 and at most 1.")
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
