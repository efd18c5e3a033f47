"""The label part: classifier q(c|z), q(u|z,c) and p(z|u,c), evaluated only on the (cell, class) rows that count.

Minibatches come with their labelled cells first. A labelled cell needs one row, its own class; an unlabelled one
needs a row per class. A cell whose label leaves several classes open is averaged over these alone. Source: spec
sections 1.3, 1.5, 3.8.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import sparse
from .layers import Draws, Gaussian, GaussianEncoder, Linear, Stack


class LabelTerms(NamedTuple):
    """The label part of the bound, per cell."""

    log_prior: Tensor  # (cells,) sum over classes of W log p(z | u_c, c)
    kl_u: Tensor  # (cells,) sum over classes of W KL(q(u | z, c) || N(0, I))
    kl_label: Tensor  # (cells,) KL(q(c|z) || p(c)); -log p(c*) for a labelled cell


def restricted(log_q: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities `(cells, classes)` given that the class is allowed; of the others finite, and 0 as exp."""
    return log_q.masked_fill(~allowed, -torch.inf).log_softmax(-1).masked_fill(~allowed, -1e4)


def set_cross_entropy(logits: Tensor, allowed: Tensor, smoothing: float = 0.0) -> Tensor:
    """Minus the log-probability of the allowed classes together `(cells,)`, a share of it spread over all classes."""
    log_p = logits.log_softmax(-1)
    surprise = -log_p.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    return (1 - smoothing) * surprise - smoothing * log_p.mean(-1) if smoothing else surprise


class LabelPart(nn.Module):
    """Classifier and the two networks that tie a class to a place in the latent space.

    Parameters
    ----------
    config
        The network's :class:`~anvi.nn.Config`.
    """

    def __init__(self, config):
        super().__init__()
        self.n_labels = config.n_labels
        n_latent, n_hidden, n_labels = config.n_latent, config.n_hidden, config.n_labels

        self.classifier_stack = None
        if not config.linear_classifier:
            layers = n_latent, config.n_layers_encoder, 0, config.dropout_encoder
            self.classifier_stack = Stack.of(config, "encoder", *layers)
        self.classifier = Linear(n_latent if config.linear_classifier else n_hidden, n_labels)
        u_stack = Stack.of(config, "encoder", n_latent, config.n_layers_encoder, n_labels, config.dropout_u)
        self.encode_u = GaussianEncoder(u_stack, n_hidden, n_latent)
        z_stack = Stack.of(config, "decoder", n_latent, config.n_layers_decoder, n_labels, 0.0)
        self.decode_u = GaussianEncoder(z_stack, n_hidden, n_latent, floor=config.prior_floor)
        self.log_prior = nn.Parameter(
            torch.full((n_labels,), 1 / n_labels).log(), requires_grad=config.label_prior == "learned"
        )

    def classify(self, z: Tensor, draws: Draws) -> Tensor:
        """Class logits `(cells, classes)` of latent vectors `(cells, latent)`."""
        h = z if self.classifier_stack is None else self.classifier_stack(z, None, draws)
        return self.classifier(h, None)

    def forward(
        self, z: Tensor, label: Tensor, n_labelled: int, draws: Draws, allowed: Tensor | None = None
    ) -> LabelTerms:
        """Evaluate the label part of the bound.

        Parameters
        ----------
        z
            Samples of q(z|x) `(cells, latent)`; the first `n_labelled` cells are conditioned on their label.
        label
            Class codes `(cells,)`; only the first `n_labelled` are looked at.
        n_labelled
            How many leading cells are labelled.
        draws
            Noise for u and dropout.
        allowed
            Classes that the other cells may be of `(cells, classes)` bool; None: any.
        """
        n_cells, n_classes = len(z), self.n_labels
        n_unlabelled = n_cells - n_labelled
        labelled, unlabelled = z.split([n_labelled, n_unlabelled])
        # one row for a labelled cell, one per class for each of the others
        classes = torch.arange(n_classes, device=z.device)
        class_of_row = torch.cat([label[:n_labelled], classes.repeat(n_unlabelled)])  # (rows,)
        if sparse.kernels_for(z) is not None:
            z_row = torch.cat([labelled, unlabelled[:, None].expand(-1, n_classes, -1).flatten(0, 1)])  # (rows, latent)
        else:  # the same, faster on a CPU; on a GPU its backward pass would sort
            cell_of_row = torch.arange(n_labelled, n_cells, device=z.device).repeat_interleave(n_classes)
            z_row = z[torch.cat([torch.arange(n_labelled, device=z.device), cell_of_row])]
        q_u = self.encode_u(z_row, class_of_row[:, None], draws)
        p_z: Gaussian = self.decode_u(q_u.sample(draws), class_of_row[:, None], draws)
        log_prior = sparse.log_normal_density(z_row, p_z.mean, p_z.var)  # (rows,)
        kl_u = sparse.kl_standard_normal(q_u.mean, q_u.var)

        log_classes = self.log_prior.log_softmax(-1)
        log_q = self.classify(unlabelled, draws).log_softmax(-1)  # (unlabelled, classes)
        if allowed is not None:
            log_q = restricted(log_q, allowed[n_labelled:])
        q = log_q.exp()

        # of a labelled cell its own row, of the others the mean over classes
        own, each = torch.stack([log_prior, kl_u]).split([n_labelled, n_unlabelled * n_classes], dim=1)
        mean = (q * each.view(2, n_unlabelled, n_classes)).sum(-1)
        kl = (q * (log_q - log_classes)).sum(-1)  # `likelihoods.kl_categorical`, whose q is at hand
        kl_label = torch.cat([-log_classes[label[:n_labelled]], kl])
        of_prior, of_u = torch.cat([own, mean], dim=1)
        return LabelTerms(of_prior, of_u, kl_label)
