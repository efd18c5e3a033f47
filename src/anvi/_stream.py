"""Sparse counts that are asked for by row: `CSR` in memory, and `Streamed`, which stay in their file.

What is streamed is read by blocks of consecutive rows. An epoch goes through the blocks in random order: some of them
at a time are in memory together, where their cells are shuffled, while a thread reads the next ones. Cells that are
needed again and again (validation, labelled cells by class) are held. Anything else is read when it is asked for, so
that a question that goes through its cells in the order of the file reads each block once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._runtime import give_back_memory
from anvi.nn import Entries
from anvi.nn.sparse import kernels_for

BLOCK = 1_024
"""Rows of a block, about: of a compressed file as many chunks as hold them, at least `CHUNKS`."""
CHUNKS = 8
"""Chunks of a block, at least: the last one, which a row may go on into, is unpacked twice."""
MIXED = 65_536
"""Rows whose blocks are in memory together, about, and shuffled; there are two such sets, one being read."""
KEPT = 4_096
"""Rows that were read last and stay in memory, at least: a question may ask for a chunk of its cells several times."""
MOST = 32_000_000
"""Counts in such a set, at most, however wide the rows: 128 MB at 4 bytes."""


def block_edges(n_rows: int, chunk: int, indptr: np.ndarray | None) -> np.ndarray:
    """Rows at which the blocks of a matrix begin, and the end `(blocks + 1,)`.

    What is compressed is unpacked by chunks: of rows where there is no index pointer, of values where there is one.
    Rows that lie one behind the other do so in their values, too, and a block begins with the first row of a chunk.
    """
    if indptr is None:
        edges = np.arange(0, n_rows, -(-BLOCK // chunk) * chunk)
    else:
        wanted = BLOCK * indptr[-1] / max(1, n_rows)  # values
        step = int(max(-(-wanted // chunk), CHUNKS if chunk > 1 else 1)) * chunk
        edges = np.unique(np.searchsorted(indptr[:-1], np.arange(0, indptr[-1], step)))
    if len(edges) > 1 and n_rows - edges[-1] < edges[1] / 2:  # a rest goes with the block before it
        edges = edges[:-1]
    return np.append(edges, n_rows)


class CSR(NamedTuple):
    """Sparse counts in the row order of their modality, in the smallest types that hold them exactly."""

    indptr: Tensor  # (rows + 1,) int64
    indices: Tensor  # (non-zeros,) int16, int32 or int64
    values: Tensor  # (non-zeros,) uint8, uint16 or float32
    n_columns: int

    @property
    def total(self) -> float:
        """The sum of all counts."""
        return float(self.values.sum(dtype=torch.float64))

    def sum_of(self, rows: Tensor) -> Tensor:
        """Sums of some rows, float64, on the CPU."""
        up_to = torch.from_numpy(np.append(0.0, np.cumsum(self.values.cpu().numpy(), dtype=np.float64)))
        start, stop = (self.indptr[some].cpu() for some in (rows, rows + 1))
        return up_to[stop] - up_to[start]

    def to(self, device: torch.device) -> "CSR":
        """The same counts on a device."""
        return self._replace(**{name: getattr(self, name).to(device) for name in ("indptr", "indices", "values")})

    def hold(self, rows: Tensor) -> None:
        """Keep some rows in memory, where they are."""

    def let_go(self) -> None:
        """Keep no row but those that it has."""

    @contextmanager
    def shown(self, rows: Tensor, look: Callable[[Tensor, Entries], None]) -> Iterator[None]:
        """Show what is stored of some rows, piece by piece: their places among them, and their entries."""
        yield
        for places in torch.arange(len(rows), device=rows.device).split(BLOCK):
            look(places, self.entries(rows[places]))

    def with_empty_row(self) -> "CSR":
        """The same with a row without an entry behind the last."""
        return self._replace(indptr=torch.cat([self.indptr, self.indptr[-1:]]))

    def rows(self, rows: Tensor) -> "CSR":
        """Some rows, as compact as all."""
        row, entry = self._places(rows)
        length = torch.bincount(row, minlength=len(rows))
        indptr = torch.cat([length.new_zeros(1), length.cumsum(0)])
        return CSR(indptr, self.indices.index_select(0, entry), _selected(self.values, entry), self.n_columns)

    def dense(self, rows: Tensor) -> tuple[Tensor, Entries]:
        """Rows as a dense matrix `(len(rows), n_columns)` and their entries."""
        return _dense(self.entries(rows), len(rows), self.n_columns)

    def entries(self, rows: Tensor, room: int | None = None) -> Entries:
        """What is stored of some rows, without a Python loop.

        With `room`, exactly so many entries, the last ones zeros anywhere: then nothing waits for the device.
        """
        if room is not None and (kernels := kernels_for(self.values)) is not None:
            return kernels.entries(rows, self.indptr, self.indices, self.values, self.n_columns, room)
        if room is not None:
            start, length = self.indptr[rows], self.indptr[rows + 1] - self.indptr[rows]
            place, end = torch.arange(room, device=rows.device), length.cumsum(0)
            inside = place < end[-1]
            row = torch.searchsorted(end, place, right=True).clamp_(max=len(rows) - 1)
            entry = ((start - end + length)[row] + place).where(inside, 0)
            count, column = widened(self.values, entry).where(inside, 0.0), self.indices.index_select(0, entry).long()
            # zeros on one address would wait for each other when they are added
            row, column = row.where(inside, place % len(rows)), column.where(inside, place % self.n_columns)
            return Entries(row, column, count)
        row, entry = self._places(rows)
        return Entries(row, self.indices.index_select(0, entry).long(), widened(self.values, entry))

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of every entry of some rows, which of them it is in, and where it is stored."""
        start, length = self.indptr[rows], self.indptr[rows + 1] - self.indptr[rows]
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), length)
        first = length.cumsum(0) - length
        return row, (start - first).index_select(0, row).add_(torch.arange(len(row), device=rows.device))


def widened(values: Tensor, index: Tensor) -> Tensor:
    """Some rows of compact counts, as float32."""
    return _selected(values, index).float()


def _selected(values: Tensor, index: Tensor) -> Tensor:
    """Some rows of compact counts."""
    if values.dtype == torch.uint16:  # which torch selects from as long as it takes it for something else
        return values.view(torch.int16).index_select(0, index).view(torch.uint16)
    return values.index_select(0, index)


def _dense(entries: Entries, n_rows: int, n_columns: int) -> tuple[Tensor, Entries]:
    out = torch.zeros(n_rows * n_columns, device=entries.row.device)
    out[entries.row * n_columns + entries.column] = entries.count
    return out.view(n_rows, n_columns), entries


class Buffer(NamedTuple):
    """Some blocks in memory."""

    counts: CSR  # of the rows of the blocks, and one without an entry behind them
    offset: Tensor  # (blocks + 1,) what leads from a row of the file to a row of the counts; below all for other blocks


class Streamed:
    """Counts that stay in their file; they answer like those of :class:`CSR`.

    Parameters
    ----------
    read
        Counts of a slice of rows, compact and checked.
    edges
        `(blocks + 1,)` rows at which blocks begin, and the end of the last.
    n_columns
        Columns.
    sums
        `(rows + 1,)` sum of each row, NaN until it is read for the first time; 0 of one without an entry behind them.
    indptr
        `(rows + 1,)` where each row would begin, were they in memory; None if they have not all been read.
    """

    def __init__(
        self,
        read: Callable[[slice], CSR],
        edges: Tensor,
        n_columns: int,
        sums: Tensor,
        indptr: Tensor | None = None,
    ):
        self.read, self.edges, self.n_columns, self.sums = read, edges, n_columns, sums
        self.indptr = None if indptr is None else torch.cat([indptr, indptr[-1:]])  # one more row, without an entry
        self.n_blocks = len(edges) - 1
        self._stopped = Event()
        self._nothing = self._load(())
        self._held_at = torch.full((int(edges[-1]) + 1,), -1, dtype=torch.int32)  # (rows,) row in what is held, or -1
        self._held_at[-1] = 0
        self._held, self._buffer = [self._nothing.counts], self._nothing  # what is held, in parts
        self._recent: dict[int, Buffer] = {}  # the blocks that were read last, the newest behind the others
        self._coming: Iterator[Buffer] = iter(())
        self._look: Callable[[int, Buffer], None] | None = None
        self._planned: list[list[int]] = []

    @property
    def total(self) -> float:
        """The sum of all counts."""
        return float(self.sum_of(torch.arange(len(self.sums))).sum())

    def sum_of(self, rows: Tensor) -> Tensor:
        """Sums of some rows, float64, on the CPU; those that have not been read are read."""
        rows = rows.cpu()
        for block in self.block_of(rows[self.sums[rows].isnan()]).unique().tolist():
            self._block(block)
        return self.sums[rows]

    def to(self, device: torch.device) -> "Streamed":
        """Itself: entries go where the rows are that are asked for."""
        return self

    def with_empty_row(self) -> "Streamed":
        """Itself, which has one."""
        return self

    def block_of(self, rows: Tensor) -> Tensor:
        """The block of each row; one behind the last for a row without an entry."""
        return torch.searchsorted(self.edges, rows, right=True) - 1

    def shuffled(self, generator: torch.Generator) -> list[list[int]]:
        """All blocks in random order, in sets of those that are in memory together."""
        n_rows, n_entries = int(self.edges[-1]), int(self.indptr[-1])
        n_sets = max(1, round(n_rows / MIXED), -(-n_entries // MOST))
        order = torch.randperm(self.n_blocks, generator=generator)
        return [part.tolist() for part in order.tensor_split(min(n_sets, self.n_blocks))]

    @contextmanager
    def ahead(self, sets: Sequence[Sequence[int]]) -> Iterator[None]:
        """Read sets of blocks one after the other, each while the one before it is in use."""
        self._planned = list(map(list, sets))
        try:
            with closing(self._one_ahead(list(self._planned))) as self._coming:
                try:
                    yield
                finally:
                    self._stopped.set()
        finally:
            self._planned, self._buffer = [], self._nothing
            self._stopped.clear()

    def _one_ahead(self, sets: Sequence[Sequence[int]]) -> Iterator[Buffer]:
        with ThreadPoolExecutor(1, "anvi-reading") as thread:
            coming = [thread.submit(self._load, sets[0])]
            for blocks in [*sets[1:], None]:
                buffer = coming.pop().result()  # raises here what the thread ran into
                if blocks is not None:
                    coming.append(thread.submit(self._load, blocks))
                yield buffer

    def _load(self, blocks: Sequence[int]) -> Buffer:
        """Read some blocks, in the order of the file."""
        offset, n_rows, n_entries = torch.full((self.n_blocks + 1,), -(2**62)), 0, 0
        some = sorted(set(blocks) - {self.n_blocks})
        for block in some:
            start, stop = self.edges[block : block + 2].tolist()
            offset[block] = n_rows - start
            n_rows += stop - start
            n_entries += 0 if self.indptr is None else int(self.indptr[stop] - self.indptr[start])
        offset[-1] = n_rows - int(self.edges[-1])

        def read() -> Iterator[CSR]:
            for block in some:
                if self._stopped.is_set():
                    return
                yield self.read(slice(*self.edges[block : block + 2].tolist()))

        if len(some) == 1:
            counts = self.read(slice(*self.edges[some[0] : some[0] + 2].tolist()))
        else:
            counts = _joined(read(), self.n_columns, n_entries)
            give_back_memory()  # of blocks as they were read, which a thread keeps for itself
        return Buffer(counts.with_empty_row(), offset)

    def _block(self, number: int) -> Buffer:
        """One block; the ones that were read before it stay in memory, too, as far as `KEPT` says."""
        if number not in self._recent:
            n_rows = 0
            for earlier in reversed(list(self._recent)):
                if n_rows >= KEPT:
                    del self._recent[earlier]  # before the next one is read
                else:
                    n_rows += len(self._recent[earlier].counts.indptr)
            self._recent[number] = self._load([number])
            if self._look is not None:
                self._look(number, self._recent[number])
        return self._recent[number]

    def hold(self, rows: Tensor) -> None:
        """Keep some rows in memory from now on."""
        new = rows.cpu().unique()
        new = new[self._held_at[new] < 0]
        if not len(new):
            return
        n_held = sum(len(part.indptr) - 1 for part in self._held)
        n_entries = None if self.indptr is None else int((self.indptr[new + 1] - self.indptr[new]).sum())
        before = [] if len(self._held[-1].values) else [self._held.pop()]  # but an empty row: no copy for that
        self._held.append(_joined(chain(before, self._parts(new)), self.n_columns, n_entries))
        self._held_at[new] = torch.arange(len(new), dtype=torch.int32) + n_held

    @contextmanager
    def shown(self, rows: Tensor, look: Callable[[Tensor, Entries], None]) -> Iterator[None]:
        """Show what is stored of some rows, each once: when their block is read anyhow, or at the end.

        The places of rows among them are given, and their entries. So who needs all rows and who needs some share a
        pass over the file.
        """
        ascending, order = rows.cpu().sort()
        block, times = self.block_of(ascending).unique_consecutive(return_counts=True)
        waiting = dict(zip(block.tolist(), order.split(times.tolist()), strict=True))  # places of rows, by block

        def show(number: int, buffer: Buffer) -> None:
            for places in waiting.pop(number, order[:0]).split(BLOCK):
                entries = buffer.counts.entries(rows[places].cpu() + buffer.offset[number])
                look(places.to(rows.device), Entries(*(part.to(rows.device) for part in entries)))

        for number, buffer in self._recent.items():
            show(number, buffer)
        self._look = show
        try:
            yield
            for number in list(waiting):
                self._block(number)
        finally:
            self._look = None

    def let_go(self) -> None:
        """Keep no row in memory any more."""
        self._held, self._recent = [self._nothing.counts], {}
        self._held_at[:-1] = -1

    def dense(self, rows: Tensor) -> tuple[Tensor, Entries]:
        """Rows as a dense matrix `(len(rows), n_columns)` and their entries."""
        return _dense(self.entries(rows), len(rows), self.n_columns)

    def entries(self, rows: Tensor, room: int | None = None) -> Entries:
        """What is stored of some rows: held, read ahead, or read now."""
        asked = rows.cpu()
        place = self._held_at[asked].long()
        if bool((place < 0).any()):
            counts, place = self._found(asked)
        else:
            if len(self._held) > 1:  # several times was something held
                n_entries = sum(len(part.values) for part in self._held)
                parts = (self._held.pop(0) for _ in range(len(self._held)))
                self._held = [_joined(parts, self.n_columns, n_entries)]
            counts = self._held[0]
        return Entries(*(part.to(rows.device) for part in counts.entries(place)))

    def _found(self, rows: Tensor) -> tuple[CSR, Tensor]:
        """Counts that have some rows, and where."""
        block = self.block_of(rows)
        place = rows + self._buffer.offset[block]
        if bool((place < 0).any()):
            # all cells of a set may be held, so that nobody asks for its blocks: then it is passed over
            asked = {*block.tolist()} - {self.n_blocks}
            ahead = next((i for i, planned in enumerate(self._planned, 1) if asked <= {*planned}), 0)
            if not ahead:
                return self._gathered(rows), torch.arange(len(rows))
            for _ in range(ahead):
                self._buffer = self._nothing  # let go before the next one is read
                self._buffer = next(self._coming)
            del self._planned[:ahead]
            place = rows + self._buffer.offset[block]
        return self._buffer.counts, place

    def _gathered(self, rows: Tensor) -> CSR:
        """Read some rows now."""
        ascending, order = rows.sort()
        found = _joined(self._parts(ascending), self.n_columns)
        return found if torch.equal(order, torch.arange(len(order))) else found.rows(order.argsort())

    def _parts(self, rows: Tensor) -> Iterator[CSR]:
        """Read some rows in ascending order, block by block, each block once."""
        block, times = self.block_of(rows).unique_consecutive(return_counts=True)
        for number, some in zip(block.tolist(), rows.split(times.tolist()), strict=True):
            counts, offset = self._block(number)
            yield counts.rows(some + offset[number])


def _joined(parts: Iterable[CSR], n_columns: int, n_entries: int | None = None) -> CSR:
    """The rows of several parts, one below the other, in types that hold all; a part at a time is in memory twice."""
    if n_entries is None:
        parts = list(parts)
        n_entries = sum(len(part.values) for part in parts)
    length, end = [torch.zeros(1, dtype=torch.int64)], 0
    columns, values = np.zeros(n_entries, dtype=np.int16), np.zeros(n_entries, dtype=np.uint8)
    for part in parts:
        length.append(part.indptr.diff())
        here = slice(end, end := end + len(part.values))
        columns, values = put(columns, here, part.indices.numpy()), put(values, here, part.values.numpy())
    return CSR(torch.cat(length).cumsum(0), torch.from_numpy(columns), torch.from_numpy(values), n_columns)


def put(array: np.ndarray, here: slice, values: np.ndarray) -> np.ndarray:
    """A compact array with values put into some of its places, widened where these need it."""
    array = array if array.dtype.itemsize >= values.dtype.itemsize else array.astype(values.dtype)
    array[here] = values
    return array
