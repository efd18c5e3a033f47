"""Expected expression: what the decoder says of cells, in their own batch or as if they came from others.

The encoder runs once per chunk of cells. Everything else is a sweep over latent vectors and batches of that chunk.
Source: spec section 5.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._data.features import Features
from anvi._model import Model
from anvi.nn import Batch, Draws

from .decode import in_batch
from .encode import Block, blocks, sample_z


class Sweep(NamedTuple):
    """In which batches and at which latent vectors cells are decoded."""

    codes: tuple[int, ...] | None = None  # batches; None: each cell's own
    n_samples: int = 1
    at_mean: bool = True  # at the posterior mean, instead of at samples
    average: bool = True  # over batches and samples; False keeps them apart
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of the leading axes of an answer: batches and samples, where they are kept apart."""
        return () if self.average else (len(self.codes or (0,)), self.n_samples)

    @property
    def n_steps(self) -> int:
        """How often each cell is decoded."""
        return len(self.codes or (0,)) * self.n_samples


def steps(model: Model, block: Block, sweep: Sweep) -> Iterator[tuple[int, Tensor, Batch]]:
    """Every latent vector of a block in every batch, with its place in the answer: batches outermost."""
    network, n = model.network, sweep.n_samples
    for sample in range(n):
        z = network.to_latent(block.q_z.mean) if sweep.at_mean else sample_z(model, block, sweep.seed, sample)
        for i, code in enumerate(sweep.codes or (None,)):
            batch = block.batch if code is None else in_batch(model, block.batch, code)
            yield (0 if sweep.average else i * n + sample), z, batch


class Expected(NamedTuple):
    """Expected expression, None where no feature of the kind was asked for."""

    rna: np.ndarray | None  # (cells, genes), led by (batches, samples) if these are kept apart
    prot: np.ndarray | None  # (cells, proteins), likewise


@torch.no_grad()
def expected(
    model: Model,
    cells: Cells,
    features: Features,
    sweep: Sweep = Sweep(),
    *,
    library_size: float | str = 1.0,
    include_background: bool = False,
    rows: Tensor | None = None,
) -> Expected:
    """Expected expression of genes and proteins.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        Read with the model's setup.
    features
        Which genes and proteins; the decoder of a kind that is not asked for is not run.
    sweep
        Batches and samples.
    library_size
        What the shares of the genes are multiplied by: a number, "observed" or "latent".
    include_background
        Whether the value of a protein is the mean of background and foreground, or the foreground's part alone.
    rows
        `(cells,)` row of each cell in the answer; None: the order of the cells.
    """
    rows = torch.arange(len(cells)) if rows is None else rows.cpu()
    columns = [
        None if places is None else torch.from_numpy(places).to(cells.label.device)
        for places in (features.genes, features.proteins)
    ]
    rna = _empty(sweep, len(cells), len(features.gene_names))
    prot = _empty(sweep, len(cells), len(features.protein_names))
    for block in blocks(model, cells):
        here = rows[block.rows]
        size = library_of(model, block, library_size)
        sums = [None, None]
        for place, z, batch in steps(model, block, sweep):
            values = (
                model.network.decode_share(z, batch, Draws(), columns[0]) if features.has_genes else None,
                protein_value(model, z, batch, columns[1], include_background) if features.has_proteins else None,
            )
            if not sweep.average:
                _put(rna, place, here, values[0], size)
                _put(prot, place, here, values[1])
                continue
            sums = [value if total is None else total.add_(value) for total, value in zip(sums, values, strict=True)]
        if sweep.average:
            _put(rna, 0, here, sums[0], size / sweep.n_steps)  # the library enters once, not once per batch
            _put(prot, 0, here, sums[1], 1 / sweep.n_steps)
    return Expected(_shaped(rna, sweep), _shaped(prot, sweep))


def library_of(model: Model, block: Block, library_size: float | str) -> Tensor | float:
    """What shares are multiplied by `(cells, 1)`, or one number for all."""
    if library_size == "observed":
        return block.batch.log_library.exp()
    if library_size == "latent":
        return mean_library(model, block)
    return float(library_size)


def mean_library(model: Model, block: Block) -> Tensor:
    """The library size that the model reckons with `(cells, 1)`: the mean of a latent one, else the observed."""
    q = model.network.q_library(block.batch)
    return block.batch.log_library.exp() if q is None else (q.mean + q.var / 2).exp()


def protein_value(model: Model, z: Tensor, batch: Batch, columns: Tensor | None, include_background: bool) -> Tensor:
    """Expected count of each protein `(cells, proteins or columns)`: the mixture's mean, or its foreground's part."""
    protein = model.network.decode_protein(z, batch, Draws())
    to_mean = protein.back_scale.square() / 2  # the background is log-normal: its mean is above the exp of its log's
    foreground = (-protein.mixing).sigmoid()
    value = foreground * (protein.log_fore + to_mean).exp()
    if include_background:
        value = value + (1 - foreground) * (protein.log_back + to_mean).exp()
    return value if columns is None else value[:, columns]


@torch.no_grad()
def foreground(model: Model, cells: Cells, sweep: Sweep = Sweep(), rows: Tensor | None = None) -> np.ndarray:
    """Probability that a protein count is foreground `(cells, proteins)`; `rows` as in :func:`expected`."""
    rows = torch.arange(len(cells)) if rows is None else rows.cpu()
    out = _empty(sweep, len(cells), model.config.n_proteins)
    for block in blocks(model, cells):
        total = None
        for _, z, batch in steps(model, block, sweep):
            value = (-model.network.decode_mixing(z, batch, Draws())).sigmoid()
            total = value if total is None else total.add_(value)
        _put(out, 0, rows[block.rows], total, 1 / sweep.n_steps)
    return _shaped(out, sweep)


def _empty(sweep: Sweep, n_cells: int, n_features: int) -> Tensor | None:
    """Room for an answer `(steps, cells, features)`."""
    if not n_features:
        return None
    return torch.empty(1 if sweep.average else sweep.n_steps, n_cells, n_features)


def _put(out: Tensor | None, place: int, rows: Tensor, values: Tensor | None, factor: Tensor | float = 1.0) -> None:
    if out is not None:
        out[place][rows] = values.mul_(factor).cpu()


def _shaped(out: Tensor | None, sweep: Sweep) -> np.ndarray | None:
    return None if out is None else out.view(*sweep.shape, *out.shape[1:]).numpy()
