"""A network before its first step: sizes from the data, priors from the data, weights from a generator or a model."""

import dataclasses
import logging
from typing import Literal

import torch
from torch import Tensor

from anvi._data.cells import Cells, widened
from anvi._data.containers import listed
from anvi._data.setup import Setup
from anvi.nn import PRESETS, VAE, Config

from .loop import generator

logger = logging.getLogger("anvi")


def lower_component(values: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a two-component normal mixture to the values of each row by expectation maximisation.

    Parameters
    ----------
    values
        `(cells, proteins)`, log1p counts.
    measured
        `(cells, proteins)` bool; at least two per row.

    Returns
    -------
    Mean and standard deviation of the component with the lower mean `(cells,)`.
    """
    mask = measured.to(values.dtype)
    values, count = values * mask, mask.sum(1, keepdim=True).clamp(min=1)
    # start: below and above the mean, which is one step of two-means
    upper = ((values > values.sum(1, keepdim=True) / count) & measured).to(values.dtype)
    for _ in range(100):
        parts = []
        for part in (mask - upper, upper):  # responsibilities (cells, proteins)
            size = part.sum(1, keepdim=True) + 1e-10  # (cells, 1)
            mean = (part * values).sum(1, keepdim=True) / size
            square = (values - mean).square_()
            var = (part * square).sum(1, keepdim=True) / size + 1e-6
            parts.append((size, mean, var, (size / count).log() - 0.5 * (var.log() + square / var)))
        upper = (parts[1][3] - parts[0][3]).sigmoid_() * mask
    # a component that nothing belongs to has no mean
    size, mean, var = (torch.cat([part[i] for part in parts], dim=1) for i in range(3))
    lower = mean.masked_fill(size < 1e-3, float("inf")).argmin(1, keepdim=True)
    return mean.gather(1, lower).squeeze(1), var.gather(1, lower).squeeze(1).sqrt()


def background_prior(
    y: Tensor,
    mask_table: Tensor,
    mask_row: Tensor,
    panel: Tensor,
    n_panels: int,
    generator: torch.Generator,
    n_sampled: int = 1_000,
) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation at which the prior of log background starts, per panel.

    A panel with fewer than 5 measured proteins in every cell takes the average of the other panels.

    Parameters
    ----------
    y
        Protein counts `(cells, proteins)`.
    mask_table, mask_row
        Which proteins were measured `(masks, proteins)`, and the row of each cell `(cells,)`.
    panel
        Panel codes `(cells,)`.
    n_panels
        Number of panels.
    generator
        CPU generator that picks the cells.
    n_sampled
        Cells looked at per panel.

    Returns
    -------
    Two tensors `(panels,)`.
    """
    mean = torch.full((n_panels,), float("nan"))
    log_scale = torch.full((n_panels,), float("nan"))
    enough = (mask_table.sum(1) >= 5)[mask_row]
    for code in range(n_panels):
        cells = ((panel == code) & enough).nonzero().squeeze(1)
        if len(cells) < 5:
            continue
        cells = cells[torch.randperm(len(cells), generator=generator)[:n_sampled]]
        means, scales = lower_component(widened(y, cells).log1p(), mask_table[mask_row[cells]])
        mean[code] = means.mean()
        # the published start is a tenth of this, which lets the divergence of the background drown all else at first
        log_scale[code] = scales.square().mean().sqrt().log()
    if mean.isnan().all():
        return torch.full((n_panels,), 3.0), torch.zeros(n_panels)
    return mean.nan_to_num(float(mean.nanmean())), log_scale.nan_to_num(float(log_scale.nanmean()))


def make_config(name: str, setup: Setup, options: dict, source: Config | None = None) -> Config:
    """Configuration of a model: sizes of the data, then the preset or the source model, then the user's options.

    Raises
    ------
    ValueError
        If the combination is not built, or an option contradicts the model that the fit starts from.
    """
    if setup.size_factor_key is not None:
        if options.get("library") == "latent":
            raise ValueError("library='latent' and size_factor_key exclude each other; give one of them.")
        options = options | {"library": "size_factor"}
    elif options.get("library") == "size_factor":
        raise ValueError("library='size_factor' needs size_factor_key=, the column with the size factor of each cell.")
    if options.get("objective") == "scvi-tools" and setup.joint:
        options = {"efficiency": True} | options  # part of the incumbent's model
    elif options.get("efficiency"):
        raise ValueError("efficiency=True is built for objective='scvi-tools' only: nothing else holds it in place.")
    if source is None:
        return Config(**setup.sizes | PRESETS[name] | options).checked()
    inherited = dataclasses.asdict(source) | {"dropout_u": PRESETS[name]["dropout_u"]} | setup.sizes
    for option, value in options.items():
        if option in inherited and option not in _LABEL_OPTIONS and inherited[option] != value:
            raise ValueError(
                f"{option}={value!r} contradicts the model that init= starts from ({option}={inherited[option]!r}); "
                f"leave {option} out."
            )
    return Config(**inherited | {name: options[name] for name in options if name in _LABEL_OPTIONS}).checked()


# what the data decide, or an imported model brings, and no user sets
NO_OPTIONS: tuple[str, ...] = ("n_genes", "n_proteins", "n_labels", "n_batches", "n_panels", "n_categories")
NO_OPTIONS += ("n_continuous", "n_dispersion_labels", "background_scale", "classifier_softmax")
_LABEL_OPTIONS = ("linear_classifier", "label_prior", "dropout_u")


def make_network(config: Config, cells: Cells, seed: int) -> VAE:
    """A fresh network whose priors (background, library, labels) are set from the data."""
    network = VAE(config, generator(seed))
    with torch.no_grad():
        if network.protein is not None and config.n_proteins > 10:  # with fewer, two components cannot be told apart
            masks = cells.mask_table, cells.mask_row
            start = background_prior(cells.y, *masks, cells.panel, config.n_panels, generator(seed))
            network.protein.prior_mean.copy_(start[0][:, None].expand(-1, config.n_proteins))
            network.protein.prior_log_scale.copy_(start[1][:, None].expand(-1, config.n_proteins))
        if network.library_encoder is not None:
            set_library_prior(network, cells)
        if network.labels is not None and config.label_prior != "uniform":
            counts = torch.bincount(cells.label[cells.label >= 0], minlength=config.n_labels) + 1.0
            if cells.label_table is not None:  # a coarse label counts for its classes, as often as each is found
                coarse = cells.label_table[cells.label_row[cells.coarse]] * counts
                counts = counts + (coarse / coarse.sum(1, keepdim=True)).sum(0)
            network.labels.log_prior.copy_(counts.log() - counts.sum().log())
    return network


@torch.no_grad()
def set_library_prior(network: VAE, cells: Cells, n_known: int = 0) -> None:
    """Mean and variance of the log library size of each batch, but for the first ones, which a reference knows.

    In a fit, a batch without RNA is taken for one like the others.
    """
    known = torch.ones_like(cells.batch, dtype=torch.bool) if cells.has_rna is None else cells.has_rna
    for code in range(n_known, network.config.n_batches):
        values = cells.log_library[(cells.batch == code) & known].double()
        if len(values) < 2 and cells.has_rna is not None and not n_known:
            values = cells.log_library[known].double()
        if len(values) > 1:
            network.library_mean[code] = values.mean()
            # cells of equal depth have no variance, and a prior without any is no prior
            network.library_var[code] = values.var(correction=0).clamp(min=1e-4)


@torch.no_grad()
def settle_rows(network: VAE, cells: Cells) -> None:
    """Let the RNA of batches in which no cell has any be decoded as that of a batch like the others.

    No count has ever trained their rows in the decoder of RNA (its batch norms alone have moved them), so they become
    the mean of the rows of batches with RNA. The network is changed in place.
    """
    n_batches = network.config.n_batches
    if cells.has_rna is None or n_batches == 1:
        return
    there = cells.batch[cells.has_rna].bincount(minlength=n_batches) > 0
    for name, table in network.rna.named_parameters():
        if name.endswith("covariates") or (name == "log_theta" and network.config.dispersion == "gene-batch"):
            table[:n_batches][~there] = table[:n_batches][there].mean(0)


def start_from(
    network: VAE, setup: Setup, source: VAE, source_setup: Setup, train: Literal["all", "label_nets"]
) -> None:
    """Share the weights of a fitted model by name; freeze the background prior, or all but the label networks.

    Source: spec section 4 and A15.

    Raises
    ------
    ValueError
        If the two fits do not see the same genes, proteins, batches and covariates.
    """
    if source.labels is not None:
        raise ValueError("init= needs a model without labels (scvi, totalvi); the one given has classes of its own.")
    for part in ("genes", "proteins", "batches", "panels", "categorical", "continuous", "size_factor_key"):
        ours, theirs = getattr(setup, part), getattr(source_setup, part)
        if ours != theirs:
            remedy = "Pass the same keys and layers to both fits."
            if part == "proteins" and not (ours and theirs):
                first, what = "totalvi", "of RNA alone cannot start one with proteins"
                if theirs:
                    first, what = "scvi", "with proteins cannot start one of RNA alone"
                remedy = f"A model {what}: run av.tl.{first}(data) first and pass init='{first}'."
            there, here = _brief(theirs, ours, "there"), _brief(ours, theirs, "here")
            raise ValueError(f"init= needs a model of the same {part}: it has {there}, this fit {here}. {remedy}")
    weights = network.state_dict()
    shared = {name: value for name, value in source.state_dict().items() if name in weights}
    network.load_state_dict(weights | shared)
    for name, parameter in network.named_parameters():
        if train == "label_nets" and not name.startswith("labels."):
            parameter.requires_grad_(False)
    if network.protein is not None:
        network.protein.prior_mean.requires_grad_(False)
        network.protein.prior_log_scale.requires_grad_(False)
    logger.info(f"starting from the weights of a fitted model ({len(shared)} tensors)")


def _brief(value, other, where: str) -> str:
    """What one fit has; of several names, those that the other one lacks."""
    if not isinstance(value, tuple) or not value:
        return "none" if value == () else repr(value)
    own = [one for one in value if one not in set(other)]
    return f"{len(value)} ({f'only {where}: ' if own and other else ''}{listed(own or value, 3)})"
