"""Integrated gradients of the class logits along straight lines from baseline counts to a cell's counts.

It computes what captum's `IntegratedGradients` computes, to whose numbers the tests hold it. It is faster because the
lines are straight in counts: a gene that is zero at both ends stays zero, so the first layer, most of the work, is
applied to the other genes only; what a step costs more than once is written out. Source: Sundararajan et al. 2017; spec
section 5.1.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi.nn import VAE, Batch, Draws

ROWS = {"cpu": 640}
"""Cells times steps that go through the network at once, such that they stay in the cache."""
ROWS_ELSEWHERE = 16_384


class Baseline(NamedTuple):
    """Counts at which the lines start; None: no counts at all."""

    x: Tensor | None  # (cells, genes)
    y: Tensor | None  # (cells, proteins)


def of_groups(logits: Tensor, members: Tensor | None) -> Tensor:
    """Logits of groups of classes `(..., groups)`: the log of the sum of their exponentials; None: of the classes."""
    if members is None:
        return logits
    return logits[..., None, :].masked_fill(~members, -torch.inf).logsumexp(-1)


def midpoints(n_steps: int, power: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Places between 0 and 1 and their weights `(steps,)`: the midpoint rule in t, the place being t to the `power`.

    The derivative of a network of ReLUs jumps along the line, which leaves rules of high order no advantage. A line
    from zero counts changes the logarithms that the encoder sees fastest at its very beginning; a power puts more
    alphas there. The integral is the same, whichever way a line is walked along.
    """
    t = (np.arange(n_steps) + 0.5) / n_steps
    return t**power, power * t ** (power - 1) / n_steps


def of_rows(batch: Batch, rows: Tensor | slice) -> Batch:
    """Some cells of a minibatch, without the positions of its entries."""
    parts = {name: part[rows] for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**parts, n_labelled=0, entries=None)


def integrate(
    network: VAE,
    batch: Batch,
    baseline: Baseline,
    target: Tensor,  # (cells, classes) weights of the logits
    rule: tuple[np.ndarray, np.ndarray],  # (steps,) Places on each line, from 0 (baseline) to 1, and their weights
    members: Tensor | None = None,  # (groups, classes) bool, where the logits are those of groups of classes
) -> tuple[Tensor, Tensor | None]:
    """Attributions of genes `(cells, genes)` and of proteins `(cells, proteins)`, 0 where not measured."""
    config, device = network.config, batch.x.device
    alphas, weights = (torch.tensor(part, dtype=batch.x.dtype, device=device) for part in rule)
    table = network.encoder.stack.linear[0].weight.detach().T.contiguous()  # (inputs, hidden)
    rna, protein = [], []
    for rows in _passes(len(batch.x), len(alphas), device):
        part = of_rows(batch, rows)
        start_x = None if baseline.x is None else baseline.x[rows]
        lines, columns = _rna_lines(part.x, start_x, table[: config.n_genes], config)
        every = [lines]
        if config.has_protein:
            start_y = None if baseline.y is None else baseline.y[rows]
            every.append(
                _protein_lines(part, start_y, table[config.n_genes : config.n_genes + config.n_proteins], config)
            )
        found = _integrate(network, part, every, target[rows], alphas, weights, members)
        out = found[0]
        if columns is not None:
            out = torch.zeros_like(part.x).scatter_add_(1, columns, found[0])
        rna.append(out)
        protein.extend(found[1:])
    return torch.cat(rna), torch.cat(protein) if protein else None


def _passes(n: int, n_steps: int, device: torch.device) -> Iterator[slice]:
    size = max(1, ROWS.get(device.type, ROWS_ELSEWHERE) // n_steps)
    for first in range(0, n, size):
        yield slice(first, min(first + size, n))


class Lines(NamedTuple):
    """Straight lines of one modality, one per cell, and how the encoder reads what lies on them."""

    start: Tensor | None  # (cells, columns); None: zeros
    end: Tensor  # (cells, columns)
    weight: Tensor  # of the first layer: (columns, hidden), or (cells, columns, hidden) if each has its own columns
    counted: Tensor | None  # (cells, 1) how many features the mean runs over; None: counts not relative to their mean
    log: bool  # whether the encoder sees logarithms


class Points(NamedTuple):
    """Points on the lines."""

    ratio: Tensor  # (cells, steps, columns) counts over `total`
    total: Tensor | None  # (cells, steps, 1) one plus the mean count


def _rna_lines(x: Tensor, start: Tensor | None, table: Tensor, config) -> tuple[Lines, Tensor | None]:
    """Lines of the genes, and each cell's own columns `(cells, columns)` if it is worth while to leave genes out."""
    n_genes = x.shape[1]
    counted = torch.full_like(x[:, :1], n_genes) if config.has_protein else None
    log = config.has_protein or config.log_variational
    moves = x != 0 if start is None else (x != 0) | (start != 0)
    count = moves.sum(1)
    width = int(count.max())
    if width > n_genes // 2:
        return Lines(start, x, table, counted, log), None
    row, column = moves.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count)[row]
    columns = torch.zeros(len(x), width, dtype=torch.long, device=x.device)  # padding: gene 0, from 0 to 0
    columns[row, place] = column

    def packed(dense: Tensor) -> Tensor:
        out = torch.zeros(columns.shape, dtype=dense.dtype, device=dense.device)
        out[row, place] = dense[row, column]
        return out

    return Lines(None if start is None else packed(start), packed(x), table[columns], counted, log), columns


def _protein_lines(batch: Batch, start: Tensor | None, table: Tensor, config) -> Lines:
    measured, zero = batch.measured, batch.y.new_zeros(())
    n_counted = torch.full_like(measured[:, :1], measured.shape[1], dtype=batch.y.dtype)
    if config.objective != "scvi-tools":
        n_counted = measured.sum(1, keepdim=True).clamp(1).to(batch.y.dtype)
    start = None if start is None else torch.where(measured, start, zero)
    return Lines(start, torch.where(measured, batch.y, zero), table, n_counted, True)


def _integrate(
    network: VAE,
    batch: Batch,
    every: list[Lines],
    target: Tensor,
    alphas: Tensor,
    weights: Tensor,
    members: Tensor | None,
) -> list[Tensor]:
    """One pass: attributions `(cells, columns)` of each modality."""
    stack, n_steps = network.encoder.stack, len(alphas)
    with torch.no_grad():
        h = _fixed(network, batch)[:, None]  # (cells, 1, hidden)
        points = [_points(lines, alphas) for lines in every]
        for lines, point in zip(every, points, strict=True):
            h = h + (point.ratio.log1p() if lines.log else point.ratio) @ lines.weight  # (cells, steps, hidden)
    codes = None if batch.codes is None else batch.codes[:, None].expand(-1, n_steps, -1)
    with torch.enable_grad():
        h.requires_grad_()
        z = network.encoder.mean(stack.onward(h, codes, Draws()), None)
        logits = of_groups(network.labels.classify(z, Draws()), members)  # (cells, steps, classes)
        value = (logits * target[:, None] * weights[:, None]).sum()
        (slope,) = torch.autograd.grad(value, h)
    with torch.no_grad():
        return [
            (lines.end if lines.start is None else lines.end - lines.start) * _gradient(lines, point, slope)
            for lines, point in zip(every, points, strict=True)
        ]


def _fixed(network: VAE, batch: Batch) -> Tensor:
    """What bias and covariates give to the first layer's output `(cells, hidden)`."""
    first = network.encoder.stack.linear[0]
    seen = torch.zeros(len(batch.x), first.weight.shape[1], dtype=batch.x.dtype, device=batch.x.device)
    if network.config.encode_covariates and batch.continuous is not None:
        seen[:, -batch.continuous.shape[1] :] = batch.continuous
    return first(seen, batch.codes)


def _points(lines: Lines, alphas: Tensor) -> Points:
    far = alphas[:, None]  # (steps, 1)
    near, total = 1 - far, None
    if lines.counted is not None:
        mean = (lines.end.sum(1, keepdim=True) / lines.counted)[:, None]  # (cells, 1, 1)
        total = 1 + far * mean
        if lines.start is not None:
            total = total + near * (lines.start.sum(1, keepdim=True) / lines.counted)[:, None]
        far, near = far / total, near / total  # (cells, steps, 1)
    ratio = far * lines.end[:, None]
    if lines.start is not None:
        ratio = ratio.addcmul_(near.expand(len(ratio), -1, 1), lines.start[:, None])
    return Points(ratio, total)


def _gradient(lines: Lines, points: Points, slope: Tensor) -> Tensor:
    """Derivative by the counts, summed over the steps `(cells, columns)`; the points are used up.

    `slope` `(cells, steps, hidden)` is the derivative by the first layer's output, times the weight of the step.
    """
    by_ratio = slope @ lines.weight.transpose(-1, -2)  # (cells, steps, columns)
    if lines.log:
        by_ratio.div_(points.ratio.add_(1))
    if points.total is None:
        return by_ratio.sum(1)
    inverse = points.total.reciprocal().transpose(1, 2)  # (cells, 1, steps)
    direct = (inverse @ by_ratio).squeeze(1)
    # every count also moves the mean, by which all of them are divided: -ratio / (1 + ratio) = 1 / (1 + ratio) - 1
    without = ((inverse @ slope).squeeze(1) * lines.weight.sum(-2)).sum(1, keepdim=True)
    return direct + (direct.sum(1, keepdim=True) - without) / lines.counted
