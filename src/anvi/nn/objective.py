"""From the terms of the bound to the number that is minimised. Source: spec sections 3.2, 3.3, 3.6, 3.8."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .config import Config
from .labels import set_cross_entropy
from .vae import DIVERGENCES, Terms


class Counted(NamedTuple):
    """How many cells of a step count, in all processes that share it."""

    cells: Tensor  # ()
    labelled: Tensor | None  # () those that train the classifier


class Weights(NamedTuple):
    """How the terms are weighed in one step."""

    kl: Tensor | float = 1.0  # warm-up weight of the divergences
    protein: float = 1.0  # of the protein likelihood
    classification: float = 50.0  # of the mean cross-entropy of labelled cells
    smoothing: float = 0.0  # share of a label's weight that is spread over all classes in that cross-entropy


def negative_elbo(terms: Terms) -> Tensor:
    """The full negative bound of each cell, no term weighed `(cells,)`."""
    return _sum(terms.reconstruction_rna, terms.reconstruction_protein) + _sum(*_divergences(terms))


def weighed_bound(terms: Terms, weights: Weights, config: Config) -> Tensor:
    """The negative bound of each cell with warm-up `(cells,)`: one weight for all divergences, none for likelihoods."""
    if config.objective == "scvi-tools":
        return _incumbents_bound(terms, weights, config)
    reconstruction = terms.reconstruction_rna
    if terms.reconstruction_protein is not None:
        reconstruction = reconstruction + weights.protein * terms.reconstruction_protein
    return reconstruction + weights.kl * _sum(*_divergences(terms))


def classification_loss(terms: Terms, smoothing: float = 0.0, n_labelled: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the labelled cells that count, in nats; 0 where there are none."""
    if terms.logits is None:
        return torch.zeros((), device=terms.z.device)
    if terms.target_allowed is None:
        per_cell = cross_entropy(terms.logits, terms.target, reduction="none", label_smoothing=smoothing)
    else:
        per_cell = set_cross_entropy(terms.logits, terms.target_allowed, smoothing)
    n_labelled = terms.target_weight.sum() if n_labelled is None else n_labelled
    return (terms.target_weight * per_cell).sum() / n_labelled.clamp(min=1)


def loss(
    terms: Terms,
    cell_weight: Tensor,
    weights: Weights,
    config: Config,
    counted: Counted | None = None,
    surprise: Tensor | None = None,
) -> Tensor:
    """What one step minimises: the mean weighed bound of the cells that count, and the classification term.

    Where several processes share the minibatch, `counted` says how many cells they have, and this is one's part of it.
    `surprise` is the `classification_loss`, where the caller has it.
    """
    n_cells, n_labelled = (cell_weight.sum(), None) if counted is None else counted
    bound = (cell_weight * weighed_bound(terms, weights, config)).sum() / n_cells
    if terms.logits is None:
        return bound
    surprise = classification_loss(terms, weights.smoothing, n_labelled) if surprise is None else surprise
    return bound + weights.classification * surprise


def _divergences(terms: Terms) -> tuple[Tensor | None, ...]:
    return tuple(getattr(terms, name) for name in DIVERGENCES)


def _sum(*parts: Tensor | None) -> Tensor:
    return sum(part for part in parts if part is not None)  # type: ignore[return-value]


def _incumbents_bound(terms: Terms, weights: Weights, config: Config) -> Tensor:
    """The groupings of scvi-tools 1.5, as they stand (spec 3.1-3.3, 3.6)."""
    w = weights.kl
    total = terms.reconstruction_rna
    if config.has_protein:  # the protein likelihood is warmed up, too
        total = total + w * (weights.protein * terms.reconstruction_protein + terms.kl_background + terms.penalty)
    if config.has_labels:  # the z terms are not
        total = total + terms.kl_z + w * (terms.kl_u + terms.kl_label)
    else:
        total = total + w * terms.kl_z
    if terms.kl_library is not None:
        scanvi = config.has_labels and not config.has_protein
        total = total + (w if scanvi else 1.0) * terms.kl_library
    return total
