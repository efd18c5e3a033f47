"""The RNA part: from a latent vector to the expected counts of every gene. Source: spec sections 1.2, 1.4."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import likelihoods, sparse
from .config import Batch, Entries
from .layers import Draws, Linear, Stack


class RNARates(NamedTuple):
    """What the decoder says of the genes of each cell."""

    logits: Tensor  # (cells, genes) the share of each gene is their softmax; or, where not normalised, their exp
    log_theta: Tensor  # (genes,) or (cells, genes) log inverse dispersion; log standard deviation for "normal"
    zero_logits: Tensor | None  # (cells, genes) logits of an extra zero, ZINB only
    normalised: bool = False

    @property
    def log_scale(self) -> Tensor:
        """Log of the share of each gene `(cells, genes)`; exp sums to 1 unless a size factor is used."""
        return self.logits.log_softmax(-1) if self.normalised else self.logits


class RNADecoder(nn.Module):
    """Decode latent vectors into gene rates.

    Parameters
    ----------
    config
        The network's :class:`~anvi.nn.Config`.
    """

    def __init__(self, config):
        super().__init__()
        self.likelihood = config.gene_likelihood
        self.dispersion = config.dispersion
        self.normalised = config.library != "size_factor"
        n_covariates = config.n_covariate_rows
        n_latent = config.n_latent + config.n_continuous
        layers = n_latent, config.n_layers_decoder, n_covariates, config.dropout_decoder
        self.trunk = Stack.of(config, "decoder", *layers, inject=config.deeply_inject_covariates)
        # the heads of the protein models see the latent vector and the covariates once more
        self.heads_see_latent = config.has_protein
        n_head = config.n_hidden + (n_latent if self.heads_see_latent else 0)
        n_head_covariates = n_covariates if self.heads_see_latent else 0
        self.scale = Linear(n_head, config.n_genes, n_head_covariates)
        self.zero = Linear(n_head, config.n_genes, n_head_covariates) if self.likelihood == "zinb" else None
        self.log_theta_head = None
        self.log_theta = None
        if self.dispersion == "gene-cell":
            self.log_theta_head = Linear(n_head, config.n_genes, n_head_covariates)
        else:
            # one row per batch, or per label and one more for the unlabelled cells
            label_rows = config.n_dispersion_labels or config.n_labels + 1
            rows = {"gene": 1, "gene-batch": config.n_batches, "gene-label": label_rows}[self.dispersion]
            self.log_theta = nn.Parameter(torch.empty(rows, config.n_genes))

    def reset(self, generator: torch.Generator) -> None:
        """Start the dispersions as the published models do: log theta ~ N(0, 1)."""
        if self.log_theta is not None:
            nn.init.normal_(self.log_theta, generator=generator)

    def forward(
        self,
        latent: Tensor,
        codes: Tensor | None,
        batch: Tensor,
        label: Tensor,
        draws: Draws,
        mixing_features: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> RNARates:
        """Rates for latent vectors with their continuous covariates `(cells, n_latent + n_continuous)`.

        In the protein models, the extra zeros are read off the features of the protein mixture. With `columns`, the
        rates of these genes alone.
        """
        h = self._hidden(latent, codes, draws)
        zero_features = h if mixing_features is None else mixing_features
        whole = self.normalised and columns is None  # then the likelihood takes the softmax in the same pass
        return RNARates(
            logits=self.scale(h, codes) if whole else self._log_scale(h, codes, columns),
            log_theta=self._log_theta(h, codes, batch, label, columns),
            zero_logits=None if self.zero is None else self.zero(zero_features, codes, columns),
            normalised=whole,
        )

    def share(self, latent: Tensor, codes: Tensor | None, draws: Draws, columns: Tensor | None = None) -> Tensor:
        """Share of each gene `(cells, genes or columns)`, and nothing else of what the decoder could say."""
        h = self._hidden(latent, codes, draws)
        if self.normalised and columns is None:
            return self.scale(h, codes).softmax(-1)  # one pass less than by the logarithm
        return self._log_scale(h, codes, columns).exp()

    def _hidden(self, latent: Tensor, codes: Tensor | None, draws: Draws) -> Tensor:
        h = self.trunk(latent, codes, draws)
        return torch.cat([h, latent], dim=-1) if self.heads_see_latent else h

    def _log_scale(self, h: Tensor, codes: Tensor | None, columns: Tensor | None) -> Tensor:
        if not self.normalised:
            return functional.softplus(self.scale(h, codes, columns)).log()
        logits = self.scale(h, codes)  # of every gene: shares have all of them in the denominator
        if columns is None:
            return functional.log_softmax(logits, -1)
        return logits[:, columns] - logits.logsumexp(-1, keepdim=True)

    def _log_theta(
        self, h: Tensor, codes: Tensor | None, batch: Tensor, label: Tensor, columns: Tensor | None
    ) -> Tensor:
        if self.dispersion == "gene-cell":
            return self.log_theta_head(h, codes, columns)
        table = self.log_theta if columns is None else self.log_theta[:, columns]
        if self.dispersion == "gene-batch":
            return sparse.rows(table, batch)
        if self.dispersion == "gene-label":
            return sparse.rows(table, label.remainder(len(table)))  # code -1 (unlabelled) takes the last row
        return table[0]

    def log_prob(self, batch: Batch, rates: RNARates, log_library: Tensor, eps: float = 0.0) -> Tensor:
        """Log-probability of the counts of each cell, summed over genes.

        Parameters
        ----------
        batch
            Raw counts and the positions of those that are not zero.
        rates
            Output of the decoder.
        log_library
            Log library size `(cells, 1)`.
        eps
            Floor added to the mean inside the logarithm, as the incumbent does; 0 for the exact formula.

        Returns
        -------
        Log-probabilities `(cells,)` in nats; 0 where no RNA was measured.
        """
        log_prob = self._log_prob(batch, rates, log_library, eps)
        return log_prob if batch.has_rna is None else torch.where(batch.has_rna, log_prob, 0.0)

    def _log_prob(self, batch: Batch, rates: RNARates, log_library: Tensor, eps: float) -> Tensor:
        if self.likelihood == "normal":
            mean = (log_library + rates.log_scale).exp() + eps
            return likelihoods.normal(batch.x, mean, rates.log_theta).sum(-1)
        entries = batch.counted(Entries.of(batch.x) if batch.entries is None else batch.entries)
        if self.likelihood == "poisson":
            log_mean = log_library + rates.log_scale  # (cells, genes)
            if eps:
                log_mean = torch.logaddexp(log_mean, torch.full_like(log_mean, eps).log())
            return sparse.poisson(entries, log_mean)
        log_mean, library = rates.logits, log_library
        if not rates.normalised:
            log_mean, library = log_library + rates.logits, None
        return sparse.nb(entries, log_mean, rates.log_theta, rates.zero_logits, log_library=library, eps=eps)
