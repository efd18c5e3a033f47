"""One golden file, recomputed by anvi: the network, the minibatch, and how far every number is from scvi-tools'."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from networks import FixedDraws

from anvi.io._scvi_tools import map_weights
from anvi.nn import VAE, Batch, Config, Draws, Weights, loss
from anvi.nn.objective import classification_loss

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.npz")))


class Golden(NamedTuple):
    """A golden file, read: numbers of scvi-tools as float32 and int64 tensors."""

    facts: dict  # the JSON string
    arrays: dict[str, torch.Tensor]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose names begin with `prefix`, without it."""
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}


def read(name: str) -> Golden:
    """Read one configuration."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}
        return Golden(json.loads(str(file["config"])), arrays)


def config_of(golden: Golden) -> Config:
    """The configuration that says the same as the constructor arguments of scvi-tools' module."""
    facts, given = golden.facts, golden.facts["arguments"]
    joint, labels = facts["n_proteins"] > 0, facts["n_labels"]
    library = "observed" if given["use_observed_lib_size"] else "latent"
    dispersion = given["gene_dispersion"] if joint else given["dispersion"]
    decoder_options = given["extra_decoder_kwargs"] or {}
    return Config(
        n_genes=facts["n_genes"],
        n_proteins=facts["n_proteins"],
        n_labels=labels,
        n_batches=facts["n_batch"],
        n_panels=facts["n_panel"] or 1,
        n_categories=tuple(facts["n_cats"]),
        n_continuous=facts["n_continuous"],
        n_hidden=given["n_hidden"],
        n_latent=given["n_latent"],
        n_layers_encoder=given["n_layers_encoder" if joint else "n_layers"],
        n_layers_decoder=given["n_layers_decoder" if joint else "n_layers"],
        # nothing is dropped: in eval mode never, in `*_train` the probabilities were set to 0
        dropout_encoder=0.0,
        dropout_decoder=0.0,
        dropout_u=0.0,
        gene_likelihood=given["gene_likelihood"],
        dispersion=dispersion,
        n_dispersion_labels=given["n_labels"] if dispersion == "gene-label" else 0,
        protein_dispersion=given.get("protein_dispersion", "protein"),
        library="size_factor" if given["use_size_factor_key"] else library,
        latent_distribution=given["latent_distribution"],
        log_variational=given["log_variational"],
        use_batch_norm=given["use_batch_norm"],
        use_layer_norm=given["use_layer_norm"],
        encode_covariates=given["encode_covariates"],
        deeply_inject_covariates=given.get("deeply_inject_covariates", True),
        linear_classifier=given.get("linear_classifier", False),
        objective="scvi-tools",
        efficiency=joint,
        background_scale=decoder_options.get("activation_function_bg", "softplus"),
        classifier_softmax=not (given.get("classifier_parameters") or {}).get("logits", True),
    ).checked()


def batch_of(golden: Golden, config: Config) -> Batch:
    """The minibatch."""
    given = golden.part("input/")
    x, batch = given["x"], given["batch"]
    columns, offset = [], 0
    for codes, size in zip(
        [batch, *given.get("categorical", torch.empty(0, 0)).T], [config.n_batches, *config.n_categories], strict=True
    ):
        if size > 1:
            columns.append(codes + offset)
            offset += size
    scale = given["size_factor"] if config.library == "size_factor" else x.sum(1)
    y = given.get("y") if config.has_protein else None
    known = given["labels"] < (config.n_labels or config.n_dispersion_labels)
    return Batch(
        x=x,
        y=y,
        measured=None if y is None else given.get("mask", torch.ones_like(y)).bool(),
        batch=batch,
        panel=None if y is None else given.get("panel", batch),
        codes=torch.stack(columns, 1) if columns else None,
        continuous=given.get("continuous"),
        log_library=scale.log()[:, None],
        label=torch.where(known, given["labels"], -1),
        weight=torch.ones(len(x)),
    )


def labelled_part(batch: Batch) -> Batch:
    """The labelled cells on their own."""
    known = batch.label >= 0
    cells = {name: value[known] for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
    return batch._replace(**cells, n_labelled=int(known.sum()))


def draws_of(golden: Golden) -> FixedDraws:
    """The noise, in the order in which the network asks for it; u by cell and class instead of class and cell."""
    noise = golden.part("noise/")
    drawn = [noise["z"]]
    if "library" in noise:
        drawn.append(noise["library"][:, None])
    if "back" in noise:
        drawn.append(noise["back"])
    if "u" in noise:
        drawn.append(noise["u"].transpose(0, 1).flatten(0, 1))
    return FixedDraws(*drawn)


def outputs(network: VAE, batch: Batch) -> dict[str, torch.Tensor]:
    """All that follows from the posterior means, under the names of the golden files."""
    draws, zero = Draws(), FixedDraws()
    q_z = network.encode(batch, draws)
    log_library, _ = network.log_library(batch, draws)
    rna, protein = network.decode(network.to_latent(q_z.mean), batch, zero)
    out = {
        "qz_mean": q_z.mean,
        "qz_var": q_z.var,
        "px_scale": rna.log_scale.exp(),
        "px_rate": (log_library + rna.log_scale).exp(),
        "px_r": rna.log_theta.exp(),
    }
    if network.library_encoder is not None:
        q_l = network.library_encoder(network.features(batch), batch.codes, draws)
        out |= {"ql_mean": q_l.mean[:, 0], "ql_var": q_l.var[:, 0]}
    if rna.zero_logits is not None:
        out["px_dropout"] = rna.zero_logits
    if protein is not None:
        out |= {
            "py_back_alpha": protein.back_mean,
            "py_back_beta": protein.back_scale,
            "py_fore_scale": (protein.log_fore - protein.log_back).exp(),
            "py_mixing": protein.mixing,
            "py_r": protein.log_phi.exp(),
        }
    if network.labels is not None:
        logits = network.logits(batch, draws)
        # the classifier of models saved before 1.1 returned probabilities
        out["logits"] = logits.softmax(-1) if network.config.classifier_softmax else logits
    return out


def terms_of(golden: Golden) -> dict[str, torch.Tensor]:
    """The terms of scvi-tools, added up to ours."""
    term = golden.part("term/")
    same = ("reconstruction_rna", "reconstruction_protein", "kl_u", "kl_library", "kl_background", "classification")
    out = {name: term[name] for name in same if name in term}
    out["kl_z"] = term["kl_z"] if "kl_z" in term else term["log_q_z"] - term["log_p_z"]
    if "kl_c" in term:
        out["kl_label"] = term["kl_c"]
    if "efficiency" in term:
        out["penalty"] = term["efficiency"] + term["background_nudge"]
    return out


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry of theirs."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(1e-30))


def allowed(theirs: torch.Tensor) -> float:
    """How far a gradient may be off: biases in front of a batch norm have none but for rounding."""
    return 1e-4 * float(theirs.abs().max()) + 1e-5


class Comparison(NamedTuple):
    """Relative differences of one configuration, by name."""

    outputs: dict[str, float]
    terms: dict[str, float]
    loss: float
    gradients: dict[str, tuple[torch.Tensor, torch.Tensor]]  # ours and theirs
    running: dict[str, float]  # batch-norm statistics after the pass, `*_train` only


def compare(name: str) -> Comparison:
    """Recompute one configuration with the weights and the noise of scvi-tools."""
    golden = read(name)
    config = config_of(golden)
    weights = golden.part("weight/")
    network = VAE(config)
    network.load_state_dict(map_weights(weights, config))
    network.eval()
    batch = batch_of(golden, config)
    with torch.no_grad():
        out = outputs(network, batch)
    # scvi-tools computes the extra zeros for every likelihood, and no dispersion for the Poisson
    given_out = {key: value for key, value in golden.part("out/").items() if key != "px_dropout" or key in out}
    if config.gene_likelihood == "poisson":
        out.pop("px_r")

    network.train(golden.facts["train"])
    terms = network.terms(batch, labelled_part(batch) if config.has_labels else None, draws_of(golden))
    ratio = golden.facts["classification_ratio"] or 0.0
    weighed = Weights(golden.facts["kl_weight"], golden.facts["pro_recons_weight"] or 1.0, ratio)
    total = loss(terms, batch.weight, weighed, config)
    total.backward()
    ours = {key: value for key, value in terms._asdict().items() if value is not None}
    if config.has_labels:
        ours["classification"] = classification_loss(terms)
    given_terms = terms_of(golden)

    gradients, running = {}, {}
    if theirs := golden.part("grad/"):
        # every map but that of the class prior, which is fixed, is linear: gradients go the same way as weights
        spread = map_weights({key: theirs.get(key, torch.zeros_like(value)) for key, value in weights.items()}, config)
        for key, parameter in network.named_parameters():
            if parameter.requires_grad:
                gradients[key] = (
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad,
                    spread[key],
                )
    if after := golden.part("after/"):
        spread = map_weights(weights | after, config)
        running = {key: distance(value, spread[key]) for key, value in network.named_buffers() if "running" in key}
    return Comparison(
        outputs={key: distance(out[key], value) for key, value in given_out.items()} | _unmatched(out, given_out),
        terms={key: distance(ours[key].detach(), value) for key, value in given_terms.items()},
        loss=distance(total.detach(), golden.arrays["loss"]),
        gradients=gradients,
        running=running,
    )


def _unmatched(ours: dict, theirs: dict) -> dict[str, float]:
    return {key: float("inf") for key in ours.keys() ^ theirs.keys()}
