"""The tensors of a scvi-tools model as weights of our network. Source: spec section 7.1.

One thing is laid out differently: a linear layer of scvi-tools has a weight column per category of each injected
covariate, behind the columns of its features; ours keeps these columns, transposed, as the table `covariates`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anvi._data.setup import Setup
from anvi.nn import VAE, Config

ROOM = 25_000_000
"""Numbers that a network may have beyond four times those of the file."""

# our module: theirs. A stack is followed by its layers, everything else is a linear layer.
_RNA = {
    "encoder.stack": "z_encoder.encoder.fc_layers",
    "encoder.mean": "z_encoder.mean_encoder",
    "encoder.log_var": "z_encoder.var_encoder",
    "library_encoder.stack": "l_encoder.encoder.fc_layers",
    "library_encoder.mean": "l_encoder.mean_encoder",
    "library_encoder.log_var": "l_encoder.var_encoder",
    "rna.trunk": "decoder.px_decoder.fc_layers",
    "rna.scale": "decoder.px_scale_decoder.0",
    "rna.zero": "decoder.px_dropout_decoder",
    "rna.log_theta_head": "decoder.px_r_decoder",
}
_JOINT = {
    "encoder.stack": "encoder.encoder.fc_layers",
    "encoder.mean": "encoder.z_mean_encoder",
    "encoder.log_var": "encoder.z_var_encoder",
    "library_encoder.stack": "encoder.l_gene_encoder.fc_layers",
    "library_encoder.mean": "encoder.l_gene_mean_encoder",
    "library_encoder.log_var": "encoder.l_gene_var_encoder",
    "rna.trunk": "decoder.px_decoder.fc_layers",
    "rna.scale": "decoder.px_scale_decoder.fc_layers.Layer 0.0",
    "rna.zero": "decoder.px_dropout_decoder_gene.fc_layers.Layer 0.0",
    "protein.back_trunk": "decoder.py_back_decoder.fc_layers",
    "protein.fore_trunk": "decoder.py_fore_decoder.fc_layers",
    "protein.mixing_trunk": "decoder.sigmoid_decoder.fc_layers",
    "protein.back_mean": "decoder.py_back_mean_log_alpha.fc_layers.Layer 0.0",
    "protein.back_scale": "decoder.py_back_mean_log_beta.fc_layers.Layer 0.0",
    "protein.fore": "decoder.py_fore_scale_decoder.fc_layers.Layer 0.0",
    "protein.mixing": "decoder.py_background_decoder.fc_layers.Layer 0.0",
}
_LABELS = {
    "labels.classifier_stack": "classifier.classifier.0.fc_layers",
    "labels.classifier": "classifier.classifier.1",
    "labels.encode_u.stack": "encoder_z2_z1.encoder.fc_layers",
    "labels.encode_u.mean": "encoder_z2_z1.mean_encoder",
    "labels.encode_u.log_var": "encoder_z2_z1.var_encoder",
    "labels.decode_u.stack": "decoder_z1_z2.decoder.fc_layers",
    "labels.decode_u.mean": "decoder_z1_z2.mean_decoder",
    "labels.decode_u.log_var": "decoder_z1_z2.var_decoder",
}


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """A column per batch, label or panel as a row; a single one that is shared by all, repeated."""
    return value.T if value.ndim > 1 else value[None].expand(len(like), -1)


# our tensor: theirs, and what has to be done to it
_TENSORS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "library_mean": ("library_log_means", lambda value, like: value.reshape(-1)),
    "library_var": ("library_log_vars", lambda value, like: value.reshape(-1)),
    "rna.log_theta": ("px_r", _rows),
    "protein.log_phi": ("py_r", _rows),
    "protein.prior_mean": ("background_pro_alpha", _rows),
    "protein.prior_log_scale": ("background_pro_log_beta", _rows),
    "protein.log_efficiency": ("log_per_batch_efficiency", _rows),
    "labels.log_prior": ("y_prior", lambda value, like: value.reshape(-1).log()),
}


def modules(config: Config) -> dict[str, str]:
    """Our modules and what they are called in scvi-tools."""
    found = dict(_JOINT if config.has_protein else _RNA)
    if config.has_labels:
        found |= _LABELS
    if config.linear_classifier:
        found["labels.classifier"] = "classifier.classifier.0"
    return found


def _dropped(config: Config) -> tuple[str, ...]:
    """Beginnings of the names of tensors that scvi-tools keeps although they have no influence."""
    joint = config.has_protein
    unused = ["pyro_param_store"]
    if config.gene_likelihood != "zinb":
        unused.append("decoder.px_dropout_decoder_gene." if joint else "decoder.px_dropout_decoder.")
    if config.dispersion != "gene-cell" and not joint:
        unused.append("decoder.px_r_decoder.")
    if config.library != "latent":
        unused.append("encoder.l_gene_" if joint else "l_encoder.")
    return tuple(unused)


def map_weights(state_dict: Mapping[str, Tensor | np.ndarray], config: Config) -> dict[str, Tensor]:
    """Turn the state dict of a scvi-tools module into that of our network.

    Returns what `VAE(config).load_state_dict` takes. Parts without influence (the head of extra zeros when the
    likelihood has none, the library encoder when the library is observed, counters) are left out. Without a per-batch
    efficiency, as before scvi-tools 1.3.1, it is 1.
    """
    with torch.device("meta"):  # for its names and shapes: what does not go with them takes no memory
        ours = VAE(config).state_dict()
    _check_memory(ours, state_dict)
    names, missing, left = modules(config), [], set(state_dict)

    def get(name: str) -> Tensor | None:
        """A tensor of scvi-tools, or None, and then its name is remembered."""
        if name not in state_dict:
            missing.append(name)
            return None
        left.discard(name)
        value = state_dict[name]
        return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))

    def take(name: str, like: Tensor) -> Tensor:
        """One tensor of our network, `like` being one of its shape."""
        if name in _TENSORS:
            theirs, change = _TENSORS[name]
            if theirs == "log_per_batch_efficiency" and theirs not in state_dict:
                return torch.zeros(like.shape, device="cpu")
            value = get(theirs)
            return like if value is None else _checked(change(value, like), like, theirs, value)
        module, _, leaf = name.rpartition(".")
        theirs = f"{_their_module(module, names)}.{'weight' if leaf == 'covariates' else leaf}"
        value = get(theirs)
        if value is None:
            return like
        part = value
        if leaf == "covariates":
            n_in = ours[f"{module}.weight"].shape[1]
            if len(like) == 1 and value.shape[1] == n_in:  # scvi-tools leaves out a single category
                return torch.zeros(like.shape, device="cpu")
            part = value[:, n_in:].T
        elif leaf == "weight" and value.ndim == 2 and f"{module}.covariates" in ours:
            part = value[:, : like.shape[1]]
        return _checked(part, like, theirs, value)

    mapped = {name: take(name, like) for name, like in ours.items()}
    if missing:
        raise ValueError(f"The model lacks tensors: {', '.join(dict.fromkeys(missing))}.")
    unused = _dropped(config)
    strange = sorted(name for name in left if not name.endswith("num_batches_tracked") and not name.startswith(unused))
    if strange:
        raise ValueError(f"The model has tensors that have no place in {_described(config)}: {', '.join(strange)}.")
    return mapped


def _check_memory(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor | np.ndarray]) -> None:
    """Raise if a network is far larger than the tensors that it is made of: some of ours repeat or fill in."""
    given = {id(value) if isinstance(value, Tensor) else value.ctypes.data: value for value in theirs.values()}
    n_given, n_ours = (sum(int(np.prod(value.shape)) for value in some.values()) for some in (given, ours))
    if n_ours > 4 * n_given + ROOM:
        raise ValueError(f"Its network would have {n_ours:,} numbers, made of {n_given:,} in the file.")


def _their_module(module: str, names: dict[str, str]) -> str:
    layer = re.fullmatch(r"(.+)\.(linear|norm)\.(\d+)", module)
    if layer is None:
        return names[module]
    stack, kind, number = layer.groups()
    return f"{names[stack]}.Layer {number}.{0 if kind == 'linear' else 1}"


def _checked(value: Tensor, like: Tensor, theirs: str, whole: Tensor) -> Tensor:
    if value.shape != like.shape:
        raise ValueError(
            f"The tensor '{theirs}' has the shape {tuple(whole.shape)}, which does not go with {tuple(like.shape)} "
            "in the network that the rest of the model asks for."
        )
    return value.detach().to(like.dtype).contiguous().clone()


def _described(config: Config) -> str:
    name = {(False, False): "scvi", (False, True): "scanvi", (True, False): "totalvi", (True, True): "totalanvi"}
    return f"a {name[config.has_protein, config.has_labels]} model of this configuration"


def count_labels(tensors: Mapping[str, np.ndarray]) -> int:
    """Number of classes, the unlabelled one not among them."""
    return _tensor(tensors, "y_prior").shape[-1]


def find_config(
    tensors: Mapping[str, np.ndarray], setup: Setup, options: dict, saved_by: tuple[int, int, int], *, n_labels: int
) -> Config:
    """The configuration of a saved model: sizes from its tensors, what they cannot tell from its arguments."""
    joint, labelled = setup.joint, n_labels > 0
    parts = modules(Config(n_genes=1, n_proteins=int(joint), n_labels=n_labels))
    encoder, decoder = parts["encoder.stack"], parts["rna.trunk"]
    first, trunk = _tensor(tensors, f"{encoder}.Layer 0.0.weight"), _tensor(tensors, f"{decoder}.Layer 0.0.weight")
    n_hidden, n_features = len(first), len(setup.genes) + len(setup.proteins)
    n_latent = len(_tensor(tensors, f"{parts['encoder.mean']}.weight"))
    sizes = Config(
        n_genes=len(setup.genes),
        n_proteins=len(setup.proteins),
        n_labels=n_labels,
        n_batches=len(setup.batches),
        n_panels=max(1, len(setup.panels)),
        n_categories=tuple(len(categories) for _, categories in setup.categorical),
        n_continuous=len(setup.continuous),
    )
    n_covariates = trunk.shape[1] - n_latent
    if n_covariates != sizes.n_covariate_rows + sizes.n_continuous:
        raise ValueError(
            f"Its lists of batches and covariates ask for {sizes.n_covariate_rows + sizes.n_continuous} columns in the "
            f"decoder, which has {n_covariates}."
        )
    deeper = tensors.get(f"{decoder}.Layer 1.0.weight")
    library = "latent" if "library_log_means" in tensors else "observed"
    dropout = options.get("dropout_rate", 0.1)
    classifier = options.get("classifier_parameters") or {}
    background = (options.get("extra_decoder_kwargs") or {}).get("activation_function_bg")
    prior = _tensor(tensors, "y_prior") if labelled else np.ones(1)
    dispersion = options.get("gene_dispersion" if joint else "dispersion", "gene")
    return replace(
        sizes,
        n_hidden=n_hidden,
        n_latent=n_latent,
        n_layers_encoder=_n_layers(tensors, encoder),
        n_layers_decoder=_n_layers(tensors, decoder),
        dropout_encoder=options.get("dropout_rate_encoder", 0.2) if joint else dropout,
        dropout_decoder=options.get("dropout_rate_decoder", 0.2) if joint else 0.0,
        dropout_u=0.05 if joint else dropout,
        gene_likelihood=options.get("gene_likelihood", "nb" if joint else "zinb"),
        dispersion=dispersion,
        n_dispersion_labels=len(setup.classes) if dispersion == "gene-label" and not labelled else 0,
        protein_dispersion=options.get("protein_dispersion", "protein"),
        library="size_factor" if setup.size_factor_key else library,
        latent_distribution=options.get("latent_distribution", "normal"),
        log_variational=options.get("log_variational", True),
        use_batch_norm=_sides(f"{encoder}.Layer 0.1.weight" in tensors, f"{decoder}.Layer 0.1.weight" in tensors),
        use_layer_norm=options.get("use_layer_norm", "none"),
        # without covariates nothing can be told from the widths, and nothing depends on it
        encode_covariates=first.shape[1] > n_features if n_covariates else options.get("encode_covariates", joint),
        deeply_inject_covariates=deeper is None or not sizes.n_covariate_rows or deeper.shape[1] > n_hidden,
        linear_classifier="classifier.classifier.0.weight" in tensors,
        label_prior="uniform" if np.ptp(prior) == 0 else "empirical",
        objective="scvi-tools",
        efficiency=joint,
        # TotalANVI came later than these two changes
        background_scale=background or ("exp" if joint and not labelled and saved_by < (1, 2, 0) else "softplus"),
        classifier_softmax=labelled and not classifier.get("logits", joint or saved_by >= (1, 1, 0)),
    ).checked()


def _n_layers(tensors: dict, stack: str) -> int:
    return sum(re.fullmatch(rf"{re.escape(stack)}\.Layer \d+\.0\.weight", name) is not None for name in tensors)


def _sides(encoder: bool, decoder: bool) -> str:
    return {(True, True): "both", (True, False): "encoder", (False, True): "decoder"}.get((encoder, decoder), "none")


def _tensor(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"The model lacks tensors: {name}.")
    return tensors[name]
