"""Cells drawn from populations, a sample of the latent vector of each, and the expression that it means.

Only cells that were drawn are encoded, and expression is decoded for as many draws at a time as are asked for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._model import Model
from anvi.nn import Batch, Draws

from .encode import blocks
from .importance import BACK, Z, noise_for, resample

PRIOR_COUNT = 0.1
"""Added to the foreground count of a protein before it is compared, as the incumbent does."""

Values = Callable[[slice], Tensor]
"""Expression of some draws: rows to `(populations, rows, features)`, NaN where the model knows nothing."""


class Drawn(NamedTuple):
    """Cells of each population, drawn with replacement, and where their latent vectors fell."""

    index: Tensor  # (populations, draws) positions in Cells
    z: Tensor  # (populations, draws, latent)
    pick: Tensor  # (populations, draws) which of its samples was kept
    seed: int
    effective: float | None = None  # with importance weights: median number of samples that share the weight

    @property
    def n_draws(self) -> int:
        """Draws of each population."""
        return self.index.shape[1]

    def background_noise(self, rows: slice, width: int) -> Tensor:
        """Noise of the log background that belongs to the samples of some draws `(populations, rows, width)`."""
        parts = []
        for population, pick in enumerate(self.pick[:, rows]):
            part = torch.empty(len(pick), width, device=pick.device)
            for sample in pick.unique().tolist():
                noise = noise_for(self.seed, population, BACK, sample, rows, width, pick.device)
                part[pick == sample] = noise[pick == sample]
            parts.append(part)
        return torch.stack(parts)


@torch.no_grad()
def draw(
    model: Model, cells: Cells, populations: Sequence[np.ndarray], n_draws: int, seed: int, *, importance: bool = False
) -> Drawn:
    """Draw cells of each population and one latent vector for every draw.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        Read with the model's setup.
    populations
        Positions of the cells of each.
    n_draws
        Draws per population.
    seed
        Seed of everything that is drawn.
    importance
        Correct the approximate posterior by importance weights; needs counts.
    """
    device = cells.label.device
    rng = np.random.default_rng(seed)
    index = torch.from_numpy(np.stack([rng.choice(population, n_draws) for population in populations])).to(device)
    if importance:
        chosen = [resample(model, cells, row, seed, p) for p, row in enumerate(index)]
        z, pick, effective = (torch.stack(part) for part in zip(*chosen, strict=True))
        return Drawn(index, z, pick, seed, float(effective.median()))
    unique, place = index.unique(return_inverse=True)
    posterior = [block.q_z for block in blocks(model, cells, unique)]
    mean, var = (torch.cat(part) for part in zip(*posterior, strict=True))
    everyone, width = slice(0, n_draws), mean.shape[1]
    noise = torch.stack([noise_for(seed, p, Z, 0, everyone, width, device) for p in range(len(index))])
    z = model.network.to_latent(mean[place] + var.sqrt()[place] * noise)
    return Drawn(index, z, torch.zeros_like(index), seed)


def genes(model: Model, cells: Cells, drawn: Drawn, *, batch_correction: bool) -> Values:
    """Shares of all genes in the drawn cells.

    With batch correction, draws are spread evenly over all batches and decoded as if they came from these: the i-th of
    every population from the same one.
    """
    target = torch.arange(drawn.n_draws, device=drawn.z.device) % model.config.n_batches if batch_correction else None

    def values(rows: slice) -> Tensor:
        batch = _as_if(model, _without_counts(cells, drawn.index[:, rows]), target, rows)
        share = model.network.decode_share(drawn.z[:, rows].flatten(0, 1), batch, Draws())
        return share.unflatten(0, (len(drawn.index), -1))

    return values


def proteins(model: Model, cells: Cells, drawn: Drawn, *, batch_correction: bool) -> Values:
    """Foreground counts of the proteins that any batch measured, in the drawn cells, plus :data:`PRIOR_COUNT`.

    Only batches in which a protein was measured have taught the model what it looks like there. With batch correction,
    its draws are spread over these; without, its value is NaN in cells of the others.
    """
    measured = measured_in(model, cells).to(drawn.z.device)  # (batches, proteins)
    draws = torch.arange(drawn.n_draws, device=drawn.z.device)
    patterns, pattern = measured.unique(dim=1, return_inverse=True)  # proteins that the same batches measured

    def decode(rows: slice, noise: Tensor, target: Tensor | None) -> Tensor:
        batch = _as_if(model, _without_counts(cells, drawn.index[:, rows]), target, rows)
        rates = model.network.decode_protein(drawn.z[:, rows].flatten(0, 1), batch, Draws())
        log_foreground = rates.log_fore + rates.back_scale * noise.flatten(0, 1)
        value = log_foreground.exp() * (-rates.mixing).sigmoid() + PRIOR_COUNT
        if target is None:
            value = value.masked_fill(~measured[batch.batch], torch.nan)
        return value.unflatten(0, (len(drawn.index), -1))

    def values(rows: slice) -> Tensor:
        noise = drawn.background_noise(rows, measured.shape[1])
        if not batch_correction:
            return decode(rows, noise, None)[..., measured.any(0)]
        out = torch.empty_like(noise)
        for number, column in enumerate(patterns.T):
            batches = column.nonzero().squeeze(1)
            if len(batches):
                mine = pattern == number
                out[..., mine] = decode(rows, noise, batches[draws % len(batches)])[..., mine]
        return out[..., measured.any(0)]

    return values


def measured_in(model: Model, cells: Cells) -> Tensor:
    """In which batches which proteins were measured `(batches, proteins)`.

    Where panels are not batches, the cells tell; of a protein that none of them has, all batches count, if any panel
    of the fit measured it.
    """
    setup, config = model.setup, model.config
    by_panel = torch.tensor(setup.measured)
    if setup.panel_key is None and len(by_panel) == config.n_batches:
        return by_panel
    seen = torch.zeros(config.n_batches, config.n_proteins, dtype=torch.bool)
    for code in range(config.n_batches):
        patterns = cells.mask_row[cells.batch == code].unique()
        seen[code] = cells.mask_table[patterns].any(0).cpu()
    return torch.where(seen.any(0), seen, by_panel.any(0))


def _without_counts(cells: Cells, index: Tensor) -> Batch:
    """What a decoder looks at: everything but counts."""
    flat = index.flatten()
    nothing = cells.log_library.new_empty(len(flat), 0)
    return Batch(
        x=nothing,
        y=None,
        measured=None,
        batch=cells.batch[flat],
        panel=None,
        codes=None if cells.codes is None else cells.codes[flat],
        continuous=None if cells.continuous is None else cells.continuous[flat],
        log_library=nothing,
        label=cells.label[flat],
        weight=nothing,
    )


def _as_if(model: Model, batch: Batch, target: Tensor | None, rows: slice) -> Batch:
    """The same cells as if each draw came from its target batch; None: from the cell's own."""
    if target is None or model.config.n_batches == 1:
        return batch
    code = target[rows].repeat(len(batch.batch) // len(target[rows]))
    return batch._replace(batch=code, codes=torch.cat([code[:, None], batch.codes[:, 1:]], dim=1))  # batch comes first
