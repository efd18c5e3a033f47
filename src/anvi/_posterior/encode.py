"""Where cells lie: the posterior of the latent vector, its samples, and the class probabilities."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.batches import take
from anvi._data.cells import Cells
from anvi._model import Model, Neighbors
from anvi.nn import Batch, Draws, Gaussian

CHUNK = 2_048
"""Cells per pass; bounds the memory of a query, changes nothing in its result."""

NOISE_BLOCK = 256
"""Cells that share a generator: noise belongs to the place of a cell in the data, not to the chunk it comes in."""

KINDS = WITH_PROTEINS, WITHOUT_PROTEINS, WITHOUT_RNA = "with_proteins", "without_proteins", "without_rna"
"""Kinds of cells by what was measured of them; each has a temperature of its own, where the model has such cells."""


def in_batch(model: Model, batch: Batch, code: int | Tensor | None) -> Batch:
    """The same cells as if they came from another batch, one or each its own; the encoder never sees this."""
    if code is None or model.config.n_batches == 1:
        return batch
    code = torch.full_like(batch.batch, code) if isinstance(code, int) else code
    return batch._replace(batch=code, codes=torch.cat([code[:, None], batch.codes[:, 1:]], dim=1))  # batch comes first


class Block(NamedTuple):
    """Some consecutive cells and the posterior of their latent vectors."""

    start: int  # place of the first cell among all that were asked for
    index: Tensor  # (cells,) positions in Cells
    batch: Batch
    q_z: Gaussian  # before the softmax of a logistic-normal latent (cells, latent)
    rank: Tensor | None = None  # (cells,) places by name, where all cells were asked for and are in another order

    @property
    def rows(self) -> slice:
        """The block's place in an array over all cells that were asked for."""
        return slice(self.start, self.start + len(self.index))


@torch.no_grad()
def blocks(model: Model, cells: Cells, index: Tensor | None = None, size: int | None = None) -> Iterator[Block]:
    """Encode cells chunk by chunk, in eval mode and without noise."""
    network = model.network.eval()
    everyone = index is None
    if everyone:
        index = torch.arange(len(cells), device=cells.label.device)
    if cells.streamed and bool((cells.x_row[index].diff() < 0).any()):  # else each chunk would read all of the file
        cells.x.hold(cells.x_row[index])
    start, rank = 0, cells.rank if everyone else None
    for part in index.split(CHUNK if size is None else size):
        batch = take(cells, part, dense=network.needs_dense_counts)
        stored = cells.q_mean is not None
        q_z = Gaussian(cells.q_mean[part], cells.q_var[part]) if stored else network.encode(batch, Draws())
        for values, what in ((q_z.mean, "latent vector"), (q_z.var, "latent variance")):
            _check_finite(model, cells.names, part, values, what)
        yield Block(start, part, batch, q_z, None if rank is None else rank[part])
        start += len(part)


def _check_finite(model: Model, names: np.ndarray, index: Tensor, values: Tensor, what: str) -> None:
    """Raise a ValueError that names the first of some cells of which a value `(cells, values)` is not finite."""
    odd = ~values.isfinite().all(1)
    if odd.any():
        raise ValueError(
            f"The model '{model.key}' gives no finite {what} for the cell '{names[int(index[odd][0])]}': its weights "
            "are damaged, or the counts are extreme (pp.check)."
        )


def noise(seed: int, sample: int, rows: slice | Tensor, width: int, device: torch.device) -> Tensor:
    """Standard normal noise `(rows, width)` that depends on seed, sample number and row alone, not on the chunk."""
    if isinstance(rows, Tensor):
        drawn, number = torch.empty(len(rows), width, device=device), rows // NOISE_BLOCK
        for block in number.unique().tolist():
            here, first = number == block, block * NOISE_BLOCK
            drawn[here] = noise(seed, sample, slice(first, first + NOISE_BLOCK), width, device)[rows[here] - first]
        return drawn
    first = rows.start // NOISE_BLOCK
    parts = []
    for number in range(first, -(-rows.stop // NOISE_BLOCK)):
        generator = torch.Generator(device).manual_seed(block_seed(seed, sample, number))
        parts.append(torch.randn(NOISE_BLOCK, width, generator=generator, device=device))
    offset = first * NOISE_BLOCK
    return torch.cat(parts)[rows.start - offset : rows.stop - offset]


def block_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def sample_z(model: Model, block: Block, seed: int, sample: int) -> Tensor:
    """One posterior sample of the latent vectors of a block `(cells, latent)`."""
    mean, var = block.q_z
    draw = noise(seed, sample, block.rows if block.rank is None else block.rank, mean.shape[1], mean.device)
    return model.network.to_latent(mean + var.sqrt() * draw)


class Votes(NamedTuple):
    """What says of which class cells are: the classifier, and labelled training cells near by."""

    logits: Tensor  # (cells, classes) of the classifier
    shares: Tensor | None  # (cells, classes) of the neighbours' labels; None: the classifier alone

    @classmethod
    def of(cls, model: Model, neighbors: Neighbors | None, z: Tensor) -> "Votes":
        """Ask about latent vectors, before the softmax of a logistic-normal one `(cells, latent)`."""
        logits = model.network.labels.classify(z, Draws())
        if neighbors is None:
            return cls(logits, None)
        # by differences: which cells are nearest must not depend on the others of a chunk
        parts, k = z.split(CHUNK // 4), min(model.info["n_neighbors"], len(neighbors.label))
        distances = (torch.cdist(part, neighbors.latent, compute_mode="donot_use_mm_for_euclid_dist") for part in parts)
        nearest = torch.cat([distance.topk(k, largest=False).indices for distance in distances])
        shares = torch.zeros_like(logits).scatter_add_(1, neighbors.label[nearest], neighbors.weight[nearest])
        return cls(logits, shares / shares.sum(1, keepdim=True))

    def proba(self, temperature: Tensor | float) -> Tensor:
        """Class probabilities `(cells, classes)`: the classifier's at a temperature, and the mean of both."""
        own = (self.logits / temperature).softmax(-1)
        return own if self.shares is None else (own + self.shares) / 2


def neighbors_of(model: Model) -> Neighbors | None:
    """The labelled cells of a model, where its network is."""
    device = next(model.network.parameters()).device
    return None if model.neighbors is None else Neighbors(*(part.to(device) for part in model.neighbors))


class Embedding(NamedTuple):
    """What the encoder says of each cell."""

    mean: np.ndarray  # (cells, latent) posterior mean
    proba: np.ndarray | None  # (cells, classes)


@torch.no_grad()
def embed(model: Model, cells: Cells, *, sample_seed: int | None = None) -> Embedding:
    """Encode and classify all cells in one pass.

    Returns arrays in the order of the cells. A logistic-normal latent is returned as the softmax of the mean.
    """
    network, temperature = model.network, temperatures(model, cells)
    near = neighbors_of(model)
    mean = _empty(model, len(cells), network.config.n_latent)
    proba = None if network.labels is None else _empty(model, len(cells), network.config.n_labels)
    for block in blocks(model, cells):
        mean[block.rows] = network.to_latent(block.q_z.mean).cpu()
        if proba is not None:
            z = block.q_z.mean if sample_seed is None else sample_z(model, block, sample_seed, 0)
            votes = Votes.of(model, near, z)
            found = votes.proba(1.0 if temperature is None else temperature[block.index])
            _check_finite(model, cells.names, block.index, found, "probabilities")
            proba[block.rows] = found.cpu()
    return Embedding(mean.numpy(), None if proba is None else proba.numpy())


def _empty(model: Model, *shape: int) -> Tensor:
    """Memory for answers about all cells, on the CPU.

    Made before the first chunk: pieces that are kept would lie between what the chunks need for a moment, and the
    allocator would take new memory for every chunk, gigabytes with a million cells.
    """
    return torch.empty(shape, dtype=next(model.network.parameters()).dtype)


def temperatures(model: Model, cells: Cells) -> Tensor | None:
    """What the classifier's logits of each cell are divided by `(cells, 1)`; None where no temperature was fitted."""
    fitted = model.info.get("temperature")
    if not fitted:
        return None
    with_proteins = fitted.get(WITH_PROTEINS, fitted[WITHOUT_PROTEINS])
    of_group = torch.tensor([with_proteins, fitted[WITHOUT_PROTEINS], fitted.get(WITHOUT_RNA, with_proteins)])
    return of_group.to(cells.label.device)[_group(cells)][:, None]


def _group(cells: Cells) -> Tensor:
    """Place of each cell in `KINDS` `(cells,)`."""
    if cells.mask_table is None:
        return torch.ones_like(cells.label)
    group = 1 - cells.has_protein.long()
    return group if cells.has_rna is None else torch.where(cells.has_rna, group, 2)


def kind_of(model: Model, cells: Cells) -> np.ndarray:
    """Which of the held-out cells a cell is to be compared with `(cells,)`: the kinds of the landmarks."""
    n_kinds, group = len(model.landmarks.quantiles), _group(cells).cpu().numpy()
    if n_kinds == 1:
        return np.zeros_like(group)
    return np.where(group < n_kinds, group, 0)  # without RNA, of a model that never did without: as with proteins


@torch.no_grad()
def posterior(model: Model, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the latent posterior, before the softmax of a logistic-normal one `(cells, latent)`."""
    mean, var = (_empty(model, len(cells), model.config.n_latent) for _ in range(2))
    for block in blocks(model, cells):
        mean[block.rows], var[block.rows] = block.q_z.mean.cpu(), block.q_z.var.cpu()
    return mean.numpy(), var.numpy()


@torch.no_grad()
def latent_samples(model: Model, cells: Cells, n_samples: int, seed: int) -> np.ndarray:
    """Samples of the latent posterior `(samples, cells, latent)`."""
    z = _empty(model, n_samples, len(cells), model.config.n_latent)
    for block in blocks(model, cells):
        for sample in range(n_samples):
            z[sample, block.rows] = sample_z(model, block, seed, sample).cpu()
    return z.numpy()
