"""Parameters of the likelihoods, as the decoder gives them for each cell and as the model holds them for all.

Source: spec sections 1.2, 1.4 and 5.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anvi._data.cells import Cells
from anvi._data.features import Features
from anvi._model import Model
from anvi.nn import Draws

from .denoise import mean_library
from .encode import blocks


class Parameter(NamedTuple):
    """One parameter; the last axis is that of features, the first one of cells, batches, labels, panels, or none."""

    axis: str | None  # "obs", "batch", "label", "panel"; None: the same everywhere
    values: np.ndarray


@torch.no_grad()
def gene_parameters(model: Model, cells: Cells, features: Features, rows: Tensor) -> dict[str, Parameter]:
    """Parameters of the likelihood of genes, by name.

    Parameters
    ----------
    model
        On the device of the cells.
    cells
        Read with the model's setup.
    features
        Which genes.
    rows
        `(cells,)` row of each cell in what is returned.
    """
    config, columns = model.config, _columns(features.genes, cells)
    names = ["mean"] + ["zero_probability"] * (config.gene_likelihood == "zinb")
    by_cell = config.dispersion == "gene-cell" and config.gene_likelihood != "poisson"
    found = _room([*names, *(["theta"] if by_cell else [])], len(cells), len(features.gene_names))
    for block in blocks(model, cells):
        z, here = model.network.to_latent(block.q_z.mean), rows[block.rows]
        rates = model.network.decode_rna(z, block.batch, Draws(), columns=columns)
        found["mean"][here] = (mean_library(model, block) * rates.log_scale.exp()).cpu()
        if rates.zero_logits is not None:
            found["zero_probability"][here] = rates.zero_logits.sigmoid().cpu()
        if by_cell:
            found["theta"][here] = rates.log_theta.exp().cpu()
    parameters = {name: Parameter("obs", values.numpy()) for name, values in found.items()}
    if config.gene_likelihood != "poisson" and not by_cell:
        table = model.network.rna.log_theta.exp().cpu()
        axis = {"gene": None, "gene-batch": "batch", "gene-label": "label"}[config.dispersion]
        name = "scale" if config.gene_likelihood == "normal" else "theta"
        parameters[name] = _table(table, axis, features.genes)
    return parameters


@torch.no_grad()
def protein_parameters(model: Model, cells: Cells, features: Features, rows: Tensor) -> dict[str, Parameter]:
    """Parameters of the likelihood of proteins, by name; arguments as in :func:`gene_parameters`."""
    names = ("background_log_mean", "background_log_scale", "foreground_factor", "background_probability")
    found = _room(names, len(cells), len(features.protein_names))
    columns = _columns(features.proteins, cells)
    for block in blocks(model, cells):
        z, here = model.network.to_latent(block.q_z.mean), rows[block.rows]
        rates = model.network.decode_protein(z, block.batch, Draws())
        values = (
            rates.back_mean,
            rates.back_scale,
            (rates.log_fore - rates.log_back).exp(),
            rates.mixing.sigmoid(),
        )
        for name, value in zip(names, values, strict=True):
            found[name][here] = (value if columns is None else value[:, columns]).cpu()
    parameters = {name: Parameter("obs", values.numpy()) for name, values in found.items()}
    part = model.network.protein
    by_batch = model.config.protein_dispersion == "protein-batch"
    parameters["phi"] = _table(part.log_phi.exp(), "batch" if by_batch else None, features.proteins)
    parameters["prior_log_mean"] = _table(part.prior_mean, "panel", features.proteins)
    parameters["prior_log_scale"] = _table(part.prior_log_scale.exp(), "panel", features.proteins)
    if part.log_efficiency is not None:
        parameters["efficiency"] = _table(part.log_efficiency.exp(), "batch", features.proteins)
    return parameters


@torch.no_grad()
def library_sizes(model: Model, cells: Cells, rows: Tensor) -> np.ndarray:
    """The library size that the model reckons with `(cells,)`: the mean of a latent one, else the observed."""
    out = torch.empty(len(cells))
    if model.config.library != "latent":
        out[rows] = cells.log_library.exp().squeeze(1).cpu()
        return out.numpy()
    for block in blocks(model, cells):
        out[rows[block.rows]] = mean_library(model, block).squeeze(1).cpu()
    return out.numpy()


def _columns(places: np.ndarray | None, cells: Cells) -> Tensor | None:
    return None if places is None else torch.from_numpy(places).to(cells.label.device)


def _room(names, n_cells: int, n_features: int) -> dict[str, Tensor]:
    return {name: torch.empty(n_cells, n_features) for name in names}


def _table(values: Tensor, axis: str | None, places: np.ndarray | None) -> Parameter:
    """A table of one row per batch, label or panel; of one row for all, that row."""
    table = values.detach().cpu().numpy()
    table = table if places is None else table[:, places]
    return Parameter(axis, table[0] if axis is None else table)
