"""The protein part: background, foreground and their mixture for every protein. Source: spec sections 1.4, 3.5."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import sparse
from .layers import Draws, Linear, Stack


class ProteinRates(NamedTuple):
    """What the decoder says of the proteins of each cell."""

    back_mean: Tensor  # (cells, proteins) mean of log background
    back_scale: Tensor  # (cells, proteins) standard deviation of log background
    log_back: Tensor  # (cells, proteins) a sample of log background (its mean when nothing is drawn)
    log_fore: Tensor  # (cells, proteins) log foreground rate, above log_back
    mixing: Tensor  # (cells, proteins) logits of background
    log_phi: Tensor  # (proteins,) or (cells, proteins) log inverse dispersion


class ProteinDecoder(nn.Module):
    """Decode latent vectors into background, foreground and their mixture.

    Parameters
    ----------
    config
        The network's :class:`~anvi.nn.Config`.
    """

    def __init__(self, config):
        super().__init__()
        self.dispersion = config.protein_dispersion
        self.background_scale = config.background_scale
        n_latent = config.n_latent + config.n_continuous
        n_proteins = config.n_proteins

        def trunk() -> Stack:
            layers = n_latent, config.n_layers_decoder, config.n_covariate_rows, config.dropout_decoder
            return Stack.of(config, "decoder", *layers)

        def head() -> Linear:
            return Linear(config.n_hidden + n_latent, n_proteins, config.n_covariate_rows)

        self.back_trunk, self.fore_trunk, self.mixing_trunk = trunk(), trunk(), trunk()
        self.back_mean, self.back_scale, self.fore, self.mixing = head(), head(), head(), head()
        rows = config.n_batches if self.dispersion == "protein-batch" else 1
        self.log_phi = nn.Parameter(torch.empty(rows, n_proteins))
        # prior of log background, per panel
        self.prior_mean = nn.Parameter(torch.full((config.n_panels, n_proteins), 3.0))
        self.prior_log_scale = nn.Parameter(torch.zeros(config.n_panels, n_proteins))
        self.log_efficiency = nn.Parameter(torch.zeros(config.n_batches, n_proteins)) if config.efficiency else None

    def reset(self, generator: torch.Generator) -> None:
        """Start the dispersions as the published model does: log phi ~ U(0, 2)."""
        nn.init.uniform_(self.log_phi, 0.0, 2.0, generator=generator)

    def mixing_features(self, latent: Tensor, codes: Tensor | None, draws: Draws) -> Tensor:
        """What background or foreground is told by, and an extra zero of a gene `(cells, n_hidden + n_latent)`."""
        return torch.cat([self.mixing_trunk(latent, codes, draws), latent], dim=-1)

    def forward(
        self, latent: Tensor, codes: Tensor | None, batch: Tensor, draws: Draws, mixing_features: Tensor
    ) -> ProteinRates:
        """Rates for latent vectors with their continuous covariates `(cells, n_latent + n_continuous)`."""
        back, fore = (
            torch.cat([trunk(latent, codes, draws), latent], dim=-1) for trunk in (self.back_trunk, self.fore_trunk)
        )
        mean = self.back_mean(back, codes)
        raw_scale = self.back_scale(back, codes)
        scale = (raw_scale.exp() if self.background_scale == "exp" else functional.softplus(raw_scale)) + 1e-8
        log_back = mean + scale * draws.normal(mean)
        factor = functional.relu(self.fore(fore, codes)) + 1 + 1e-8  # foreground is at least background
        return ProteinRates(
            back_mean=mean,
            back_scale=scale,
            log_back=log_back,
            log_fore=log_back + factor.log(),
            mixing=self.mixing(mixing_features, codes),
            log_phi=sparse.rows(self.log_phi, batch) if self.dispersion == "protein-batch" else self.log_phi[0],
        )

    def log_prob(self, y: Tensor, rates: ProteinRates, batch: Tensor, eps: float = 0.0) -> Tensor:
        """Log-probability of every protein count `(cells, proteins)`; masks are the caller's."""
        log_back, log_fore = rates.log_back, rates.log_fore
        if self.log_efficiency is not None:
            log_efficiency = sparse.rows(self.log_efficiency, batch)
            log_back, log_fore = log_back + log_efficiency, log_fore + log_efficiency
        if eps:
            floor = torch.full_like(log_back, eps).log()
            log_back, log_fore = torch.logaddexp(log_back, floor), torch.logaddexp(log_fore, floor)
        return sparse.nb_mixture(y, log_back, log_fore, rates.log_phi, rates.mixing)

    def kl_background(self, rates: ProteinRates, panel: Tensor) -> Tensor:
        """KL of each protein's log background from its panel's prior `(cells, proteins)`."""
        prior_mean, prior_scale = (sparse.rows(table, panel) for table in (self.prior_mean, self.prior_log_scale.exp()))
        return sparse.kl_normal(rates.back_mean, rates.back_scale, prior_mean, prior_scale)
