"""Widen a fitted network for cells of new batches, and train what was added while the reference stays as it is.

A category is a row of a table in every layer, so a new batch is a new row in each. The rows of the reference and those
of the query are tensors of their own during the fit: no gradient and no weight decay reaches the former, and the norms
keep the reference's statistics. Source: Lotfollahi et al., Nature Biotechnology 2022 (scArches); spec section 5.4, C8.
"""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anvi._data.cells import Cells
from anvi.nn import VAE, Config
from anvi.nn.layers import BatchNorm, Stack

from .loop import fit
from .plan import Plan


class Table(NamedTuple):
    """A parameter with a row per category, some of which the query has added."""

    name: str  # in the state of the network
    new: Tensor  # (rows,) bool


def narrow(network: VAE, genes: Tensor) -> VAE:
    """The same network for some of its genes: the others are neither seen nor decoded.

    The shares of the genes that stay sum to one again, which is the reference's distribution of their counts given
    their sum; a gene that is zero adds nothing to the encoder's first layer, so leaving it out changes nothing there
    but the mean count of a cell, which is then that of the genes that were measured.

    Parameters
    ----------
    network
        A fitted network.
    genes
        Positions of the genes that stay.

    Returns
    -------
    A network of its own, in eval mode.
    """
    config = network.config
    n_inputs = network.state_dict()["encoder.stack.linear.0.weight"].shape[1]
    inputs = torch.cat([genes, torch.arange(config.n_genes, n_inputs)])
    heads = ("rna.scale.", "rna.zero.", "rna.log_theta_head.")
    state = {}
    for name, value in network.state_dict().items():
        value = value.cpu()
        if name in ("encoder.stack.linear.0.weight", "library_encoder.stack.linear.0.weight"):
            value = value[:, inputs]
        elif name == "rna.log_theta" or (name.startswith(heads) and name.endswith("covariates")):
            value = value[:, genes]
        elif name.startswith(heads):  # weight and bias
            value = value[genes]
        state[name] = value
    return _network(replace(config, n_genes=len(genes)), state)


def widen(network: VAE, config: Config, measured: Tensor | None = None) -> tuple[VAE, tuple[Table, ...]]:
    """The same network with rows for more batches, panels and categories.

    Every weight of the reference is kept bit for bit. A covariate that had a single category, and hence no rows, gets
    a row of zeros for it, so that nothing changes for the reference's cells. A new row starts at the mean of the
    reference's rows of its covariate: a batch like the others.

    Parameters
    ----------
    network
        A fitted network, on the CPU.
    config
        Its configuration but for the numbers of batches, panels and categories, none of them smaller. Old categories
        keep their codes, new ones follow.
    measured
        What the reference's panels measured `(panels, proteins)`: only they tell where a protein's background starts.

    Returns
    -------
    The widened network, in eval mode, and the tables that have new rows.
    """
    old = network.state_dict()
    batches, panels = (network.config.n_batches, config.n_batches), (network.config.n_panels, config.n_panels)
    per_batch = ["library_mean", "library_var", "protein.log_efficiency"]
    per_batch += ["rna.log_theta"] * (config.dispersion == "gene-batch")
    per_batch += ["protein.log_phi"] * (config.protein_dispersion == "protein-batch")
    state, tables = {}, []
    for name, value in VAE(config).state_dict().items():
        weight = None
        if name.endswith(".covariates") and not name.startswith("labels."):  # batch first; no row of a single category
            every = [batches, *zip(network.config.n_categories, config.n_categories, strict=True)]
            blocks = [(before if before > 1 else 0, before, after) for before, after in every if after > 1]
        elif name in per_batch:
            blocks = [(batches[0], *batches)]
        elif name in ("protein.prior_mean", "protein.prior_log_scale"):
            blocks, weight = [(panels[0], *panels)], None if measured is None else measured.to(value.dtype)
        else:
            state[name] = old[name]
            continue
        state[name], new = _grown(old.get(name), blocks, value.shape[1:], weight)
        if new.any() and not name.startswith("library_"):  # those are facts of the data, not weights
            tables.append(Table(name, new))
    return _network(config, state), tuple(tables)


def _grown(
    old: Tensor | None, blocks: list[tuple[int, int, int]], width: torch.Size, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A table with new rows behind those of each block, and which rows are new `(rows,)`.

    A block is how many rows the old table has of it, of how many categories, and how many there are now.
    """
    rows, new, start = [], [], 0
    for stored, before, after in blocks:
        known = torch.zeros(before, *width) if old is None or not stored else old[start : start + stored]
        mean = known.mean(0)
        if weight is not None:  # (panels, proteins); a protein that no panel measured takes the plain mean
            counted = weight.sum(0)
            mean = torch.where(counted > 0, (weight * known).sum(0) / counted.clamp(min=1), mean)
        rows += [known, mean.expand(after - before, *width)]
        new += [False] * before + [True] * (after - before)
        start += stored
    return torch.cat(rows), torch.tensor(new)


def train_new_rows(
    network: VAE, tables: tuple[Table, ...], cells: Cells, train: Tensor, validation: Tensor, plan: Plan, seed: int
) -> tuple[VAE, pd.DataFrame]:
    """Fit the new rows to the query, and nothing else.

    Parameters
    ----------
    network
        A widened network; it is not changed.
    tables
        Which of its rows are new.
    cells
        The query, on the device.
    train, validation
        Positions of training and validation cells.
    plan
        Complete options of the fit.
    seed
        Of shuffling and noise.

    Returns
    -------
    A network on the CPU in which only the new rows differ from the given one, and the history.
    """
    held = hold(copy.deepcopy(network), tables).to(cells.label.device)
    history = fit(held, cells, train, validation, plan, random_state=seed)
    trained = held.cpu().state_dict()
    state = {name: value.clone() for name, value in network.cpu().state_dict().items()}
    for name, new in tables:
        module, _, last = name.rpartition(".")
        state[name][new] = trained[f"{module}.parametrizations.{last}.original"]
    return _network(network.config, state), history


def hold(network: VAE, tables: tuple[Table, ...]) -> VAE:
    """Make new rows the only parameters of a network: what the reference knows becomes buffers or is frozen.

    Batch norms keep to the reference's statistics and dropout is off, also in training mode. The network is changed
    in place, and returned.
    """
    network.requires_grad_(False)
    for name, new in tables:
        module, _, last = name.rpartition(".")
        owner: Any = network.get_submodule(module)
        parametrize.register_parametrization(owner, last, _Rows(getattr(owner, last), new))
        owner.parametrizations[last].original.requires_grad_(True)
    for stack in [part for part in network.modules() if isinstance(part, Stack)]:
        stack.dropout = 0.0
        if stack.norm is not None:
            stack.norm = nn.ModuleList(_StillNorm.like(norm) for norm in stack.norm)
    return network


class _Rows(nn.Module):
    """A table made of rows that stay, which are buffers, and rows that are trained."""

    new: Tensor
    kept: Tensor
    place: Tensor

    def __init__(self, table: Tensor, new: Tensor):
        super().__init__()
        self.register_buffer("new", new)
        self.register_buffer("kept", table.detach()[~new].clone())
        self.register_buffer("place", torch.cat([(~new).nonzero(), new.nonzero()]).squeeze(1).argsort())

    def forward(self, trained: Tensor) -> Tensor:
        return torch.cat([self.kept, trained]).index_select(0, self.place)

    def right_inverse(self, table: Tensor) -> Tensor:
        return table[self.new]


class _StillNorm(BatchNorm):
    """A batch norm that never looks at the minibatch."""

    @classmethod
    def like(cls, norm: Any) -> "_StillNorm":
        still = cls(len(norm.weight)).requires_grad_(False).eval()
        still.load_state_dict(norm.state_dict())
        return still

    def train(self, mode: bool = True) -> "_StillNorm":
        return super().train(False)


def _network(config: Config, state: dict[str, Tensor]) -> VAE:
    network = VAE(config)
    network.load_state_dict(state)
    return network.eval()
