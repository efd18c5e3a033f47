"""The network: encoder, RNA part, protein part, label part, joined; and the terms of the evidence lower bound.

One module is all four models: with or without proteins, with or without labels. Source: spec sections 1 and 3.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import sparse
from .config import Batch, Config
from .labels import LabelPart
from .layers import Draws, Gaussian, GaussianEncoder, Linear, Stack
from .likelihoods import HALF_LOG_2PI, kl_normal
from .protein import ProteinDecoder, ProteinRates
from .rna import RNADecoder, RNARates


class Terms(NamedTuple):
    """The negative evidence lower bound, term by term and per cell, in nats; None where the model has no such term."""

    reconstruction_rna: Tensor  # (cells,) -log p(x|z)
    reconstruction_protein: Tensor | None  # (cells,) -log p(y|z) over measured proteins
    kl_z: Tensor  # (cells,) KL(q(z|x) || p(z)); with labels log q(z|x) - sum_c W log p(z|u_c,c)
    kl_u: Tensor | None  # (cells,) sum_c W KL(q(u|z,c) || N(0, I))
    kl_label: Tensor | None  # (cells,) KL(q(c|z) || p(c)), or -log p(c*) for a labelled cell
    kl_library: Tensor | None  # (cells,)
    kl_background: Tensor | None  # (cells,) over measured proteins
    penalty: Tensor | None  # (cells,) the incumbent's efficiency penalty and background nudge
    z: Tensor  # (cells, latent) the sample, for the adversary
    logits: Tensor | None  # (labelled cells, classes) at the posterior mean
    target: Tensor | None  # (labelled cells,) their class codes
    target_weight: Tensor | None  # (labelled cells,) 1, or 0 for padding
    target_allowed: Tensor | None = None  # (labelled cells, classes) bool, where labels may leave several classes open


DIVERGENCES = ("kl_z", "kl_u", "kl_label", "kl_library", "kl_background", "penalty")
"""The terms that are no likelihood."""


class _Labelled(NamedTuple):
    mean: Tensor  # (labelled cells, latent) posterior mean
    label: Tensor  # (labelled cells,)
    weight: Tensor  # (labelled cells,)
    allowed: Tensor | None  # (labelled cells, classes)


def _with_continuous(z: Tensor, batch: Batch) -> Tensor:
    """What the decoder sees: the latent vectors and the continuous covariates."""
    return z if batch.continuous is None else torch.cat([z, batch.continuous], dim=-1)


class VAE(nn.Module):
    """Variational model of RNA counts, and where there are any, of protein counts and labels.

    Parameters
    ----------
    config
        Sizes and options.
    generator
        Source of the initial weights; None leaves them to be loaded.
    """

    library_mean: Tensor  # (batches,) where the library size is latent
    library_var: Tensor

    def __init__(self, config: Config, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config = config.checked()
        self.n_features = config.n_genes + config.n_proteins + config.n_continuous * config.encode_covariates
        self.encoder = self._make_encoder(config.n_layers_encoder, config.n_latent)
        self.library_encoder = None
        if config.library == "latent":
            self.library_encoder = self._make_encoder(1, 1)
            self.register_buffer("library_mean", torch.zeros(config.n_batches))
            self.register_buffer("library_var", torch.ones(config.n_batches))
        self.rna = RNADecoder(config)
        self.protein = ProteinDecoder(config) if config.has_protein else None
        self.labels = LabelPart(config) if config.has_labels else None
        if generator is not None:
            for module in self.modules():
                if isinstance(module, Linear | RNADecoder | ProteinDecoder):
                    module.reset(generator)

    def _make_encoder(self, n_layers: int, n_out: int) -> GaussianEncoder:
        config = self.config
        layers = n_layers, config.n_covariate_rows * config.encode_covariates, config.dropout_encoder
        stack = Stack.of(config, "encoder", self.n_features, *layers, inject=config.deeply_inject_covariates)
        return GaussianEncoder(stack, config.n_hidden, n_out)

    @property
    def needs_dense_counts(self) -> bool:
        """Whether the non-zero counts alone are not enough to train on."""
        return not self.config.log_variational or self.config.gene_likelihood == "normal"

    def features(self, *batches: Batch) -> Tensor:
        """What the encoder sees of all cells of the minibatches, one minibatch after the other.

        Log counts, relative to the cell's mean count in the protein models. A minibatch that brings no dense counts is
        filled in from its non-zero ones, straight into the one matrix that the first layer wants.
        """
        if any(batch.x is not None for batch in batches):
            parts = [self._features(batch) for batch in batches]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        label, count = batches[0].label, batches[0].entries.count
        sizes = [len(batch.label) for batch in batches]
        out = torch.zeros(sum(sizes), self.n_features, dtype=count.dtype, device=label.device)
        for batch, rows in zip(batches, out.split(sizes), strict=True):
            self._fill_features(batch, rows)
        return out

    def _fill_features(self, batch: Batch, out: Tensor) -> None:
        """The same as `_features`, from the non-zero counts, into zeros `(cells, features)`."""
        config, (row, column, count) = self.config, batch.counted(batch.seen or batch.entries)
        x, at = out[:, : config.n_genes], row * out.shape[1] + column
        if config.has_protein and out.is_cuda:  # there, counts that are added up at one address would take turns
            out.view(-1).scatter_add_(0, at, count)
            x.div_(1 + x.mean(1, keepdim=True)).log1p_()
        else:
            if config.has_protein:
                total = count.new_zeros(len(out)).index_add_(0, row, count)
                count = count / (1 + total / config.n_genes)[row]
            out.view(-1).scatter_add_(0, at, count.log1p())
        if config.has_protein:
            y, mean = self._protein_features(batch)
            torch.log1p(y / (1 + mean), out=out[:, config.n_genes : config.n_genes + config.n_proteins])
        if config.encode_covariates and batch.continuous is not None:
            out[:, -config.n_continuous :] = batch.continuous

    def _protein_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Protein counts, 0 where not shown, and their mean in each cell `(cells, 1)`."""
        shown = batch.measured if batch.shown is None else batch.shown
        y = torch.where(shown, batch.y, batch.y.new_zeros(()))
        # the incumbent counts unmeasured proteins as zeros in the mean; ours looks only at what was measured
        literal = self.config.objective == "scvi-tools"
        n_counted = y.shape[1] if literal else shown.sum(1, keepdim=True).clamp(1)
        return y, y.sum(1, keepdim=True) / n_counted

    def _features(self, batch: Batch) -> Tensor:
        """What the encoder sees of the cells of one minibatch, by the definition."""
        config, x = self.config, batch.x if batch.seen is None else batch.seen.dense(batch.x)
        x = x if batch.has_rna is None else torch.where(batch.has_rna[:, None], x, 0.0)
        if not config.has_protein:
            parts = [torch.log1p(x) if config.log_variational else x]
        else:
            y, mean = self._protein_features(batch)
            parts = [torch.log1p(x / (1 + x.mean(1, keepdim=True))), torch.log1p(y / (1 + mean))]
        if config.encode_covariates and batch.continuous is not None:
            parts.append(batch.continuous)
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def encode(self, batch: Batch, draws: Draws) -> Gaussian:
        """q(z|x), before the softmax of a logistic-normal latent `(cells, latent)`."""
        return self.encoder(self.features(batch), batch.codes, draws)

    def to_latent(self, sample: Tensor) -> Tensor:
        """The latent vector that belongs to a Gaussian sample: itself, or its softmax ("ln")."""
        return sample.softmax(-1) if self.config.latent_distribution == "ln" else sample

    def log_library(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Log library size `(cells, 1)`, and its KL `(cells,)` where it is latent."""
        if self.library_encoder is None:
            return batch.log_library, None
        # of all counts: a cell of which only some are shown would hide its depth
        q, prior = self._library(batch._replace(seen=None), draws)
        sample = q.sample(draws)
        if self.config.has_protein:
            sample = sample.clamp(max=15)
        return sample, kl_normal(q.mean, q.var.sqrt(), prior.mean, prior.var.sqrt()).sum(-1)

    def _library(self, batch: Batch, draws: Draws) -> tuple[Gaussian, Gaussian]:
        """q(log library size|x) and its prior `(cells, 1)` each; the same where no RNA was measured."""
        q = self.library_encoder(self.features(batch), batch.codes, draws)
        prior = Gaussian(self.library_mean[batch.batch, None], self.library_var[batch.batch, None])
        if batch.has_rna is not None:
            q = Gaussian(*(torch.where(batch.has_rna[:, None], own, of) for own, of in zip(q, prior, strict=True)))
        return q, prior

    def decode(self, z: Tensor, batch: Batch, draws: Draws) -> tuple[RNARates, ProteinRates | None]:
        """Rates of genes and proteins for latent vectors `(cells, latent)`."""
        if self.protein is None:
            return self.decode_rna(z, batch, draws), None
        mixing = self.protein.mixing_features(_with_continuous(z, batch), batch.codes, draws)
        return self.decode_rna(z, batch, draws, mixing), self.decode_protein(z, batch, draws, mixing)

    def decode_rna(
        self, z: Tensor, batch: Batch, draws: Draws, mixing: Tensor | None = None, columns: Tensor | None = None
    ) -> RNARates:
        """Rates of genes alone, all or those of `columns`.

        The features of the protein mixture are computed only where extra zeros need them.
        """
        latent = _with_continuous(z, batch)
        if mixing is None and self.protein is not None and self.rna.zero is not None:
            mixing = self.protein.mixing_features(latent, batch.codes, draws)
        return self.rna(latent, batch.codes, batch.batch, batch.label, draws, mixing, columns)

    def decode_share(self, z: Tensor, batch: Batch, draws: Draws, columns: Tensor | None = None) -> Tensor:
        """Shares of genes alone `(cells, genes or columns)`: `exp(log_scale)` of the rates, at less expense."""
        return self.rna.share(_with_continuous(z, batch), batch.codes, draws, columns)

    def decode_protein(self, z: Tensor, batch: Batch, draws: Draws, mixing: Tensor | None = None) -> ProteinRates:
        """Rates of proteins alone."""
        latent = _with_continuous(z, batch)
        if mixing is None:
            mixing = self.protein.mixing_features(latent, batch.codes, draws)
        return self.protein(latent, batch.codes, batch.batch, draws, mixing)

    def decode_mixing(self, z: Tensor, batch: Batch, draws: Draws) -> Tensor:
        """Logits of background alone `(cells, proteins)`."""
        features = self.protein.mixing_features(_with_continuous(z, batch), batch.codes, draws)
        return self.protein.mixing(features, batch.codes)

    def q_library(self, batch: Batch) -> Gaussian | None:
        """q(log library size|x) `(cells, 1)`; None where the library size is observed."""
        if self.library_encoder is None:
            return None
        return self._library(batch, Draws())[0]

    def logits(self, batch: Batch, draws: Draws) -> Tensor:
        """Class logits at the posterior mean `(cells, classes)`."""
        return self.labels.classify(self.encode(batch, draws).mean, draws)

    def terms(self, batch: Batch, labelled: Batch | None, draws: Draws) -> Terms:
        """All terms of the negative bound for one minibatch, with one sample of z.

        Parameters
        ----------
        batch
            The minibatch whose bound is taken, its labelled cells first.
        labelled
            Further labelled cells for the classification term, encoded in the same pass; None takes the minibatch's
            own labelled cells.
        draws
            Noise.
        """
        q_z, known = self._encode(batch, labelled, draws)
        sample = q_z.sample(draws)
        z = self.to_latent(sample)
        log_library, kl_library = self.log_library(batch, draws)
        rna, protein = self.decode(z, batch, draws)
        kl_z, kl_u, kl_label = self._kl_latent(q_z, sample, batch, draws)
        # after the bound, as in the incumbent: the classifier's running statistics move once for each
        logits = None if known is None else self._training_logits(known.mean, draws)
        reconstruction_protein, kl_background, penalty = self._protein_terms(protein, batch)
        return Terms(
            reconstruction_rna=-self.rna.log_prob(batch, rna, log_library, self.config.eps),
            reconstruction_protein=reconstruction_protein,
            kl_z=kl_z,
            kl_u=kl_u,
            kl_label=kl_label,
            kl_library=kl_library,
            kl_background=kl_background,
            penalty=penalty,
            z=z,
            logits=logits,
            target=None if known is None else known.label,
            target_weight=None if known is None else known.weight,
            target_allowed=None if known is None else known.allowed,
        )

    def _encode(self, batch: Batch, labelled: Batch | None, draws: Draws) -> tuple[Gaussian, _Labelled | None]:
        """q(z|x) of the minibatch, and the cells that train the classifier."""
        if self.labels is None:
            return self.encode(batch, draws), None
        if labelled is None:
            q_z, n = self.encode(batch, draws), batch.n_labelled
            if batch.allowed is not None:  # how many cells have a label that says something varies
                told = batch.weight * ~batch.allowed.all(1)
                return q_z, _Labelled(q_z.mean, batch.label, told, batch.allowed)
            return q_z, _Labelled(q_z.mean[:n], batch.label[:n], batch.weight[:n], None) if n else None
        sizes = len(batch.label), len(labelled.label)
        codes = None if batch.codes is None else torch.cat([batch.codes, labelled.codes])
        # in the incumbent a pass of its own, with its own batch-norm statistics
        parts = sizes if self.config.objective == "scvi-tools" else None
        mean, var = self.encoder(self.features(batch, labelled), codes, draws, parts)
        mean, of_labelled = mean.split(sizes)
        known = _Labelled(of_labelled, labelled.label, labelled.weight, labelled.allowed)
        return Gaussian(mean, var[: sizes[0]]), known

    def _training_logits(self, mean: Tensor, draws: Draws) -> Tensor:
        logits = self.labels.classify(mean, draws)
        return logits.softmax(-1) if self.config.classifier_softmax else logits

    def _kl_latent(self, q_z: Gaussian, sample: Tensor, batch: Batch, draws: Draws):
        if self.labels is None:
            return sparse.kl_standard_normal(q_z.mean, q_z.var), None, None
        # the incumbent marginalises over the labels of labelled cells, too
        n_labelled, allowed = batch.n_labelled, batch.allowed
        if self.config.objective == "scvi-tools":
            n_labelled, allowed = 0, None
        label = self.labels(sample, batch.label, n_labelled, draws, allowed)
        log_q = sparse.log_normal_density(sample, q_z.mean, q_z.var)
        return log_q - label.log_prior, label.kl_u, label.kl_label

    def _protein_terms(self, rates: ProteinRates | None, batch: Batch):
        if rates is None:
            return None, None, None
        part, zero = self.protein, batch.y.new_zeros(())
        # where, not a product: whatever stands in place of a missing protein, even NaN, must not reach the sum
        y = torch.where(batch.measured, batch.y, zero)
        log_prob = torch.where(batch.measured, part.log_prob(y, rates, batch.batch, self.config.eps), zero)
        kl = torch.where(batch.measured, part.kl_background(rates, batch.panel), zero)
        penalty = None
        if self.config.objective == "scvi-tools":  # of all proteins, measured or not, as there
            penalty = 1e-3 * nn.functional.softplus(-rates.mixing).sum(-1)
            if part.log_efficiency is not None:
                log_efficiency = sparse.rows(part.log_efficiency, batch.batch)
                penalty = penalty + (log_efficiency + 0.5 * log_efficiency.square() + HALF_LOG_2PI).sum(-1)
        return -log_prob.sum(-1), kl.sum(-1), penalty
