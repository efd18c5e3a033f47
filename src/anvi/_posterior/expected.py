"""Expected expression by the decoder, foreground, and the parameters of the likelihoods."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._data.select import Features
from anvi._model import Model
from anvi.nn import Batch, Draws

from .encode import Block, blocks, in_batch, sample_z


class Sweep(NamedTuple):
    """In which batches and at which latent vectors cells are decoded."""

    codes: tuple[int, ...] | None = None  # batches; None: each cell's own
    n_samples: int = 1
    at_mean: bool = True  # at the posterior mean, instead of at samples
    average: bool = True  # over batches and samples; False keeps them apart
    seed: int = 0

    @property
    def each_code(self) -> tuple[int | None, ...]:
        """The batches one by one; None: each cell's own."""
        return self.codes or (None,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of the leading axes of an answer: batches and samples, where they are kept apart."""
        return () if self.average else (len(self.each_code), self.n_samples)

    @property
    def n_steps(self) -> int:
        """How often each cell is decoded."""
        return len(self.each_code) * self.n_samples


def steps(model: Model, block: Block, sweep: Sweep) -> Iterator[tuple[int, Tensor, Batch]]:
    """Every latent vector of a block in every batch, with its step in the answer: batches outermost."""
    network, n = model.network, sweep.n_samples
    for sample in range(n):
        z = network.to_latent(block.q_z.mean) if sweep.at_mean else sample_z(model, block, sweep.seed, sample)
        for i, code in enumerate(sweep.each_code):
            batch = in_batch(model, block.batch, code)
            yield (0 if sweep.average else i * n + sample), z, batch


class Expected(NamedTuple):
    """Expected expression, None where no feature of the kind was asked for."""

    rna: np.ndarray | None  # (cells, genes), led by (batches, samples) if these are kept apart
    prot: np.ndarray | None  # (cells, proteins), likewise


@torch.no_grad()
def expected_expression(
    model: Model,
    cells: Cells,
    features: Features,
    sweep: Sweep = Sweep(),
    *,
    library_size: float | str = 1.0,
    include_background: bool = False,
    rows: Tensor | None = None,  # (cells,) row of each cell in the answer
    beside: Callable[[Block], None] | None = None,  # what else is asked of every block
) -> Expected:
    """Expected expression of genes and proteins."""
    rows = torch.arange(len(cells)) if rows is None else rows.cpu()
    genes, proteins = columns_of(features, cells.label.device)
    rna = _empty(sweep, len(cells), len(features.gene_names))
    prot = _empty(sweep, len(cells), len(features.protein_names))
    copies = _ToHost(cells.label.device)
    for block in blocks(model, cells):
        here = rows[block.rows]
        size = library_of(model, block, library_size)
        sums = [None, None]
        for step, z, batch in steps(model, block, sweep):
            values = (
                model.network.decode_share(z, batch, Draws(), genes) if features.has_genes else None,
                protein_value(model, z, batch, proteins, include_background) if features.has_proteins else None,
            )
            if not sweep.average:
                copies.put(rna, step, here, values[0], size)
                copies.put(prot, step, here, values[1])
                continue
            sums = [value if total is None else total.add_(value) for total, value in zip(sums, values, strict=True)]
        if sweep.average:
            copies.put(rna, 0, here, sums[0], size / sweep.n_steps)  # the library enters once, not once per batch
            copies.put(prot, 0, here, sums[1], 1 / sweep.n_steps)
        if beside is not None:
            beside(block)
    copies.finish()
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
    """Probability that a protein count is foreground `(cells, proteins)`; `rows` as in :func:`expected_expression`."""
    rows = torch.arange(len(cells)) if rows is None else rows.cpu()
    out, copies = _empty(sweep, len(cells), model.config.n_proteins), _ToHost(cells.label.device)
    for block in blocks(model, cells):
        total = None
        for _, z, batch in steps(model, block, sweep):
            value = (-model.network.decode_mixing(z, batch, Draws())).sigmoid()
            total = value if total is None else total.add_(value)
        copies.put(out, 0, rows[block.rows], total, 1 / sweep.n_steps)
    copies.finish()
    return _shaped(out, sweep)


def _empty(sweep: Sweep, n_cells: int, n_features: int) -> Tensor | None:
    """Memory for an answer `(steps, cells, features)`."""
    if not n_features:
        return None
    return torch.empty(1 if sweep.average else sweep.n_steps, n_cells, n_features)


class _ToHost:
    """Puts values into host memory; from a GPU through two pinned buffers in turn, while it works on what comes next.

    A copy to ordinary memory would make it wait for the host after every chunk, for many times what a chunk takes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers = [torch.empty(0), torch.empty(0)]
        self.sent: deque[tuple[torch.cuda.Event, Tensor, Tensor, Tensor]] = deque()

    def put(
        self, out: Tensor | None, place: int, rows: Tensor, values: Tensor | None, factor: Tensor | float = 1.0
    ) -> None:
        """Write `values * factor`, and overwrite the values; None has no place or no values."""
        if out is None:
            return
        values = values.mul_(factor)
        if self.device.type != "cuda":
            out[place][rows] = values.cpu()
            return
        if len(self.sent) == len(self.buffers):
            self._receive()
        buffer = self.buffers.pop(0)  # the one that was read last
        if buffer.numel() < values.numel():
            buffer = torch.empty(values.numel(), dtype=values.dtype, pin_memory=True)
        self.buffers.append(buffer)
        arriving = buffer[: values.numel()].view(values.shape)
        arriving.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.sent.append((event, arriving, out[place], rows))

    def finish(self) -> None:
        """Wait for what is on its way."""
        while self.sent:
            self._receive()

    def _receive(self) -> None:
        event, values, out, rows = self.sent.popleft()
        event.synchronize()
        out[rows] = values


def _shaped(out: Tensor | None, sweep: Sweep) -> np.ndarray | None:
    return None if out is None else out.view(*sweep.shape, *out.shape[1:]).numpy()


class Parameter(NamedTuple):
    """One parameter; the last axis is that of features, the first one of cells, batches, labels, panels, or none."""

    axis: str | None  # "obs", "batch", "label", "panel"; None: the same everywhere
    values: np.ndarray


@torch.no_grad()
def parameters(
    model: Model, cells: Cells, features: Features, rows: Tensor
) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    """Parameters of the likelihoods of genes and of proteins, by name.

    `rows` `(cells,)`: where each cell goes in what is returned.
    """
    config, network = model.config, model.network
    by_cell = config.dispersion == "gene-cell" and config.gene_likelihood != "poisson"
    of_genes = ["mean"] + ["zero_probability"] * (config.gene_likelihood == "zinb") + ["theta"] * by_cell
    of_proteins = ["background_log_mean", "background_log_scale", "foreground_factor", "background_probability"]
    genes, proteins = (
        {name: torch.empty(len(cells), len(asked)) for name in names if asked}
        for names, asked in ((of_genes, features.gene_names), (of_proteins, features.protein_names))
    )
    columns = columns_of(features, cells.label.device)
    # what differs from cell to cell
    for block in blocks(model, cells):
        z, here = network.to_latent(block.q_z.mean), rows[block.rows]
        if genes:
            rates = network.decode_rna(z, block.batch, Draws(), columns=columns[0])
            genes["mean"][here] = (mean_library(model, block) * rates.log_scale.exp()).cpu()
            if rates.zero_logits is not None:
                genes["zero_probability"][here] = rates.zero_logits.sigmoid().cpu()
            if by_cell:
                genes["theta"][here] = rates.log_theta.exp().cpu()
        if proteins:
            rates = network.decode_protein(z, block.batch, Draws())
            factor = (rates.log_fore - rates.log_back).exp()
            values = (rates.back_mean, rates.back_scale, factor, rates.mixing.sigmoid())
            for out, value in zip(proteins.values(), values, strict=True):
                out[here] = (value if columns[1] is None else value[:, columns[1]]).cpu()
    # and what does not
    found = tuple({name: Parameter("obs", part.numpy()) for name, part in some.items()} for some in (genes, proteins))
    if genes and config.gene_likelihood != "poisson" and not by_cell:
        axis = {"gene": None, "gene-batch": "batch", "gene-label": "label"}[config.dispersion]
        name = "scale" if config.gene_likelihood == "normal" else "theta"
        found[0][name] = _table(network.rna.log_theta.exp(), axis, features.genes)
    if proteins:
        part = network.protein
        by_batch = config.protein_dispersion == "protein-batch"
        found[1]["phi"] = _table(part.log_phi.exp(), "batch" if by_batch else None, features.proteins)
        found[1]["prior_log_mean"] = _table(part.prior_mean, "panel", features.proteins)
        found[1]["prior_log_scale"] = _table(part.prior_log_scale.exp(), "panel", features.proteins)
        if part.log_efficiency is not None:
            found[1]["efficiency"] = _table(part.log_efficiency.exp(), "batch", features.proteins)
    return found


@torch.no_grad()
def library_sizes(model: Model, cells: Cells, rows: Tensor) -> np.ndarray:
    """The library size that the model reckons with `(cells,)`: the mean of a latent one, else the observed."""
    out = torch.empty(len(cells))
    if model.config.library != "latent":
        out[rows] = cells.sizes().exp().squeeze(1).cpu()
        return out.numpy()
    for block in blocks(model, cells):
        out[rows[block.rows]] = mean_library(model, block).squeeze(1).cpu()
    return out.numpy()


def columns_of(features: Features, device: torch.device) -> list[Tensor | None]:
    """Columns of the genes and of the proteins that are asked for; None: all."""
    both = (features.genes, features.proteins)
    return [None if columns is None else torch.from_numpy(columns).to(device) for columns in both]


def _table(values: Tensor, axis: str | None, index: np.ndarray | None) -> Parameter:
    """A table of one row per batch, label or panel; of one row for all, that row."""
    table = values.detach().cpu().numpy()
    table = table if index is None else table[:, index]
    return Parameter(axis, table[0] if axis is None else table)
