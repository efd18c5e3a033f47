"""Small networks and minibatches, a source of noise that a test can choose, and the bound by loops."""

import numpy as np
import reference
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from anvi.nn import VAE, Batch, Config

N_GENES, N_PROTEINS, N_LABELS, N_LATENT, N_HIDDEN, N_BATCHES, N_PANELS = 5, 3, 3, 2, 4, 2, 2
N_CATEGORIES, N_CONTINUOUS = (3, 1), 1  # a covariate with a single category injects nothing

MODELS = {
    "scvi": {},
    "scanvi": {"n_labels": N_LABELS},
    "totalvi": {"n_proteins": N_PROTEINS},
    "totalanvi": {"n_proteins": N_PROTEINS, "n_labels": N_LABELS},
}


class FixedDraws:
    """Hands out the given noise in order, then zeros; nothing is dropped. Same interface as `anvi.nn.Draws`."""

    def __init__(self, *noise: Tensor):
        self.noise = list(noise)

    def normal(self, like: Tensor) -> Tensor:
        if not self.noise:
            return torch.zeros_like(like)
        noise = self.noise.pop(0)
        assert noise.shape == like.shape, (tuple(noise.shape), tuple(like.shape))
        return noise.to(like)

    def keep(self, like: Tensor, rate: float) -> Tensor:
        return torch.ones_like(like)


def make_config(model: str, **options) -> Config:
    """A tiny configuration of one of the four models, with covariates of every kind."""
    sizes = {
        "n_genes": N_GENES,
        "n_batches": N_BATCHES,
        "n_panels": N_PANELS if "total" in model else 1,
        "n_categories": N_CATEGORIES,
        "n_continuous": N_CONTINUOUS,
        "n_hidden": N_HIDDEN,
        "n_latent": N_LATENT,
        "gene_likelihood": "nb",
    }
    return Config(**sizes | MODELS[model] | options).checked()


def make_network(config: Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> VAE:
    """A network in eval mode whose every parameter and running statistic is away from its start."""
    generator = torch.Generator().manual_seed(seed)
    network = VAE(config, generator).to(dtype)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            noise = torch.randn(value.shape, generator=generator, dtype=dtype)
            if name.endswith("running_var") or name == "library_var":
                value.copy_(0.5 + noise.abs())
            elif name == "library_mean":
                value.copy_(3 + 0.1 * noise)
            else:
                value.add_(0.3 * noise)
    return network.eval()


def make_batch(
    config: Config, n_cells: int = 5, n_labelled: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Batch:
    """A minibatch with missing proteins, its labelled cells first; one cell has no protein at all."""
    rng = np.random.default_rng(seed)
    sizes = (config.n_batches, *config.n_categories)
    raw = [rng.integers(size, size=n_cells) for size in sizes]
    offsets = np.cumsum([0] + [size if size > 1 else 0 for size in sizes])
    columns = [codes + offset for codes, offset, size in zip(raw, offsets, sizes, strict=False) if size > 1]
    x = rng.poisson(3.0, (n_cells, config.n_genes)) * rng.integers(0, 2, (n_cells, config.n_genes))
    x[:, 0] += 1
    measured = rng.random((n_cells, config.n_proteins)) < 0.7
    measured[0], measured[-1] = True, False
    y = np.where(measured, rng.poisson(20.0, measured.shape), 0)
    label = np.full(n_cells, -1)
    label[:n_labelled] = rng.integers(max(config.n_labels, config.n_dispersion_labels, 1), size=n_labelled)
    joint = config.has_protein
    return Batch(
        x=torch.tensor(x, dtype=dtype),
        y=torch.tensor(y, dtype=dtype) if joint else None,
        measured=torch.tensor(measured) if joint else None,
        batch=torch.tensor(raw[0]),
        panel=torch.tensor(rng.integers(config.n_panels, size=n_cells)) if joint else None,
        codes=torch.tensor(np.stack(columns, 1)) if columns else None,
        continuous=torch.tensor(rng.normal(size=(n_cells, config.n_continuous)), dtype=dtype)
        if config.n_continuous
        else None,
        log_library=torch.tensor(np.log(x.sum(1, keepdims=True)), dtype=dtype),
        label=torch.tensor(label),
        weight=torch.ones(n_cells, dtype=dtype),
        n_labelled=n_labelled,
    )


def make_noise(config: Config, batch: Batch, seed: int = 1) -> dict[str, Tensor]:
    """Noise of z, log library size, log background and u (one row per cell and class, cell by cell)."""
    generator = torch.Generator().manual_seed(seed)
    n = len(batch.x)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    noise = {"z": draw(n, config.n_latent)}
    if config.library == "latent":
        noise["library"] = draw(n, 1)
    if config.has_protein:
        noise["back"] = draw(n, config.n_proteins)
    if config.has_labels:
        noise["u"] = draw(n, config.n_labels, config.n_latent)
    return noise


def draws_of(noise: dict[str, Tensor], batch: Batch) -> FixedDraws:
    """The noise in the order in which the network asks for it: of a labelled cell, only its own class has a row."""
    drawn = [noise[name] for name in ("z", "library", "back") if name in noise]
    if "u" in noise:
        n = batch.n_labelled
        own = noise["u"][torch.arange(n), batch.label[:n]]
        drawn.append(torch.cat([own, noise["u"][n:].flatten(0, 1)]))
    return FixedDraws(*drawn)


def kl_normal(mean: float, var: float, prior_mean: float, prior_var: float) -> float:
    """KL of two normals, by torch.distributions: the quadrature of `reference` says the same, but takes its time."""
    one, other = (torch.tensor([m, v**0.5], dtype=torch.float64) for m, v in ((mean, var), (prior_mean, prior_var)))
    return float(kl_divergence(Normal(*one), Normal(*other)))


def array(value: Tensor) -> np.ndarray:
    """A tensor as float64."""
    return value.detach().double().numpy()


class Naive:
    """The network in eval mode, cell by cell and written with the loops of `reference.py`."""

    def __init__(self, network: VAE):
        self.config = network.config
        self.weights = {name: array(value) for name, value in network.state_dict().items()}

    def linear(self, name: str, row: np.ndarray, one_hot: np.ndarray) -> np.ndarray:
        """One linear layer for one cell."""
        weight, bias = self.columns(name), self.weights[f"{name}.bias"]
        whole = np.concatenate([row, one_hot]) if f"{name}.covariates" in self.weights else row
        return np.array([sum(weight[j, i] * whole[i] for i in range(len(whole))) + bias[j] for j in range(len(bias))])

    def columns(self, name: str) -> np.ndarray:
        """Weights of a linear layer, one-hot columns behind the others."""
        table = self.weights.get(f"{name}.covariates")
        return np.concatenate([self.weights[f"{name}.weight"], *([] if table is None else [table.T])], axis=1)

    def stack(self, name: str, row: np.ndarray, one_hot: np.ndarray, side: str) -> np.ndarray:
        """One stack for one cell."""
        n = sum(key.startswith(f"{name}.linear") and key.endswith("weight") for key in self.weights)
        batch_norm, layer_norm = (self.config.norm_of(side, kind) for kind in ("batch", "layer"))
        norms = None
        if batch_norm:
            parts = ("weight", "bias", "running_mean", "running_var")
            norms = [{part: self.weights[f"{name}.norm.{i}.{part}"] for part in parts} for i in range(n)]
        inject = n < 2 or f"{name}.linear.1.covariates" in self.weights
        return reference.fc_stack(
            row[None],
            [one_hot[None]] if f"{name}.linear.0.covariates" in self.weights else [],
            [self.columns(f"{name}.linear.{i}") for i in range(n)],
            [self.weights[f"{name}.linear.{i}.bias"] for i in range(n)],
            norms,
            layer_norm=layer_norm,
            inject=inject,
        )[0]

    def gaussian(self, name: str, row: np.ndarray, one_hot: np.ndarray, side: str, floor: float):
        """Mean and variance for one cell."""
        h = self.stack(f"{name}.stack", row, one_hot, side)
        none = np.zeros(0)
        return self.linear(f"{name}.mean", h, none), np.exp(self.linear(f"{name}.log_var", h, none)) + floor

    def bound(self, batch: Batch, noise: dict[str, Tensor], n: int) -> dict:
        """Arguments of `reference.cell_bound` for cell `n`, without label and weight."""
        config, weights = self.config, self.weights
        one_hot = np.zeros(config.n_covariate_rows)
        if batch.codes is not None:
            one_hot[batch.codes[n].numpy()] = 1
        continuous = np.zeros(0) if batch.continuous is None else array(batch.continuous[n])
        x, code = array(batch.x[n]), int(batch.batch[n])
        features = [np.log1p(x)]
        if config.has_protein:
            # scvi-tools takes what was not measured for zeros
            y, counted = array(batch.y[n]), batch.measured[n].numpy() | (config.objective == "scvi-tools")
            features = [np.log1p(x / (1 + x.mean())), reference.protein_input(y[None], counted[None])[0]]
        if config.encode_covariates:
            features.append(continuous)
        row = np.concatenate(features)
        mean, var = self.gaussian("encoder", row, one_hot, "encoder", 1e-4)
        sample = mean + np.sqrt(var) * array(noise["z"][n])
        z = reference.softmax(sample) if config.latent_distribution == "ln" else sample
        out = {"log_qz": reference.normal_log_prob(sample, mean, np.sqrt(var)).sum(), "log_py": 0.0}

        library = float(np.exp(array(batch.log_library[n, 0])))
        if config.library == "latent":
            m, v = (part[0] for part in self.gaussian("library_encoder", row, one_hot, "encoder", 1e-4))
            library = float(np.exp(m + np.sqrt(v) * array(noise["library"][n, 0])))
            out["kl_library"] = kl_normal(m, v, weights["library_mean"][code], weights["library_var"][code])

        latent = np.concatenate([z, continuous])
        h = self.stack("rna.trunk", latent, one_hot, "decoder")
        h = np.concatenate([h, latent]) if config.has_protein else h
        mixing = None
        if config.has_protein:
            mixing = np.concatenate([self.stack("protein.mixing_trunk", latent, one_hot, "decoder"), latent])
        logits = self.linear("rna.scale", h, one_hot)
        scale = np.log1p(np.exp(logits)) if config.library == "size_factor" else reference.softmax(logits)
        theta = self.theta(h, one_hot, code, int(batch.label[n]))
        if config.gene_likelihood == "zinb":
            zero = self.linear("rna.zero", h if mixing is None else mixing, one_hot)
            log_px = reference.zinb_log_prob(x, library * scale, theta, zero)
        elif config.gene_likelihood == "poisson":
            log_px = reference.poisson_log_prob(x, library * scale)
        elif config.gene_likelihood == "normal":
            log_px = reference.normal_log_prob(x, library * scale, theta)
        else:
            log_px = reference.nb_log_prob(x, library * scale, theta)
        out["log_px"] = log_px.sum()
        if config.has_protein:
            out |= self.proteins(batch, n, latent, one_hot, mixing, array(noise["back"][n]))
        return out | self.latent_terms(sample, mean, var, noise, n)

    def theta(self, h: np.ndarray, one_hot: np.ndarray, code: int, label: int) -> np.ndarray:
        """Inverse dispersions of one cell."""
        if self.config.dispersion == "gene-cell":
            return np.exp(self.linear("rna.log_theta_head", h, one_hot))
        rows = self.weights["rna.log_theta"]
        return np.exp(rows[{"gene": 0, "gene-batch": code, "gene-label": label}[self.config.dispersion]])

    def proteins(self, batch: Batch, n: int, latent, one_hot, mixing_features, noise) -> dict:
        """Protein terms of one cell, measured proteins only."""
        weights, code, panel = self.weights, int(batch.batch[n]), int(batch.panel[n])
        back, fore = (
            np.concatenate([self.stack(f"protein.{part}_trunk", latent, one_hot, "decoder"), latent])
            for part in ("back", "fore")
        )
        mean = self.linear("protein.back_mean", back, one_hot)
        raw = self.linear("protein.back_scale", back, one_hot)
        sd = (np.exp(raw) if self.config.background_scale == "exp" else np.log1p(np.exp(raw))) + 1e-8
        beta = np.exp(mean + sd * noise)
        if self.config.efficiency:
            beta = beta * np.exp(weights["protein.log_efficiency"][code])
        factor = np.maximum(self.linear("protein.fore", fore, one_hot), 0) + 1 + 1e-8
        mixing = self.linear("protein.mixing", mixing_features, one_hot)
        phi = np.exp(weights["protein.log_phi"][code if self.config.protein_dispersion == "protein-batch" else 0])
        log_py = kl = 0.0
        for t in np.flatnonzero(batch.measured[n].numpy()):
            count = array(batch.y[n, t])
            log_py += reference.nb_mixture_log_prob(count, beta[t], beta[t] * factor[t], phi[t], mixing[t])
            prior_sd = np.exp(weights["protein.prior_log_scale"][panel, t])
            kl += kl_normal(mean[t], sd[t] ** 2, weights["protein.prior_mean"][panel, t], prior_sd**2)
        return {"log_py": float(log_py), "kl_background": kl}

    def latent_terms(self, sample, mean, var, noise, n: int) -> dict:
        """Classes one by one; without labels, the standard normal stands in for the only class."""
        if not self.config.has_labels:
            # E_q[log q - log p] in closed form instead of at the sample: this model can
            kl = sum(kl_normal(m, v, 0, 1) for m, v in zip(mean, var, strict=True))
            return {
                "log_qz": kl,
                "log_pz_by_class": [0.0],
                "kl_u_by_class": [0.0],
                "class_probabilities": [1.0],
                "class_prior": [1.0],
            }
        log_pz, kl_u = [], []
        for c in range(self.config.n_labels):
            own = reference.one_hot([c], self.config.n_labels)[0]
            m, v = self.gaussian("labels.encode_u", sample, own, "encoder", 1e-4)
            u = m + np.sqrt(v) * array(noise["u"][n, c])
            kl_u.append(sum(kl_normal(a, b, 0, 1) for a, b in zip(m, v, strict=True)))
            m, v = self.gaussian("labels.decode_u", u, own, "decoder", self.config.prior_floor)
            log_pz.append(reference.normal_log_prob(sample, m, np.sqrt(v)).sum())
        h, none = sample, np.zeros(0)
        if not self.config.linear_classifier:
            h = self.stack("labels.classifier_stack", sample, none, "encoder")
        return {
            "log_pz_by_class": log_pz,
            "kl_u_by_class": kl_u,
            "class_probabilities": reference.softmax(self.linear("labels.classifier", h, none)),
            "class_prior": reference.softmax(self.weights["labels.log_prior"]),
        }
