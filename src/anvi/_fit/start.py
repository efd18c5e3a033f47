"""A network before its first step: sizes from the data, priors from the data, weights from a generator or a model."""

import dataclasses
import logging
from typing import Literal

import torch

from anvi._data.cells import Cells
from anvi._data.setup import Setup
from anvi.nn import PRESETS, VAE, Config

from .background import background_prior
from .loop import generator

logger = logging.getLogger("anvi")


def make_config(name: str, setup: Setup, options: dict, source: Config | None = None) -> Config:
    """Configuration of a model: sizes of the data, then the preset or the source model, then the user's options.

    Raises
    ------
    ValueError
        If the combination is not built, or an option contradicts the model that the fit starts from.
    """
    sizes = {
        "n_genes": len(setup.genes),
        "n_proteins": len(setup.proteins),
        "n_labels": len(setup.classes),
        "n_batches": len(setup.batches),
        "n_panels": max(1, len(setup.panels)),
        "n_categories": tuple(len(categories) for _, categories in setup.categorical),
        "n_continuous": len(setup.continuous),
    }
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
        return Config(**sizes | PRESETS[name] | options).checked()
    inherited = dataclasses.asdict(source) | {"dropout_u": PRESETS[name]["dropout_u"]} | sizes
    for option, value in options.items():
        if option in inherited and option not in _LABEL_OPTIONS and inherited[option] != value:
            raise ValueError(
                f"{option}={value!r} contradicts the model that init= starts from ({option}={inherited[option]!r}); "
                f"leave {option} out."
            )
    return Config(**inherited | {name: options[name] for name in options if name in _LABEL_OPTIONS}).checked()


# what the data decide, or an imported model brings, and no user sets
NO_OPTIONS = (
    "n_genes",
    "n_proteins",
    "n_labels",
    "n_batches",
    "n_panels",
    "n_categories",
    "n_continuous",
    "n_dispersion_labels",
    "background_scale",
    "classifier_softmax",
)
_LABEL_OPTIONS = ("linear_classifier", "label_prior", "dropout_u")


def make_network(config: Config, cells: Cells, seed: int) -> VAE:
    """A fresh network whose priors (background, library, labels) are set from the data."""
    network = VAE(config, generator(seed))
    with torch.no_grad():
        if network.protein is not None and config.n_proteins > 10:  # with fewer, two components cannot be told apart
            start = background_prior(cells.y, cells.measured, cells.panel, config.n_panels, generator(seed))
            network.protein.prior_mean.copy_(start[0][:, None].expand(-1, config.n_proteins))
            network.protein.prior_log_scale.copy_(start[1][:, None].expand(-1, config.n_proteins))
        if network.library_encoder is not None:
            for code in range(config.n_batches):
                values = cells.log_library[cells.batch == code].double()
                if len(values) > 1:
                    network.library_mean[code] = values.mean()
                    # cells of equal depth have no variance, and a prior without any is no prior
                    network.library_var[code] = values.var(correction=0).clamp(min=1e-4)
        if network.labels is not None and config.label_prior != "uniform":
            counts = torch.bincount(cells.label[cells.label >= 0], minlength=config.n_labels) + 1.0
            network.labels.log_prior.copy_(counts.log() - counts.sum().log())
    return network


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
            raise ValueError(
                f"init= needs a model of the same {part}: it has {_brief(theirs)}, this fit {_brief(ours)}. "
                "Pass the same keys and layers to both fits."
            )
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


def _brief(value) -> str:
    return (
        f"{len(value)} ({', '.join(map(str, value[:2]))}, ...)" if isinstance(value, tuple) and value else repr(value)
    )
