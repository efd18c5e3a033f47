"""Models of scvi-tools, opened without scvi-tools. Source: spec sections 7.1, 7.2 and 7.4.

One thing is laid out differently in weights: a linear layer of scvi-tools has a column per category of each injected
covariate, behind the columns of its features; ours keeps these columns, transposed, as the table `covariates`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from anvi._arguments import checked
from anvi._data import containers
from anvi._data.cells import read_cells
from anvi._data.counts import find_proteins
from anvi._data.setup import Setup
from anvi._model import Model, check_numbers
from anvi._runtime import verb
from anvi.nn import VAE, Config

from ._model_pt import read_model_pt

# Constructor arguments that the tensors answer for, or that have no influence on a trained model.
_SETTLED = {
    *("adata", "registry", "datamodule", "pretrained_model", "unlabeled_category", "use_cuda"),
    *("n_hidden", "n_latent", "n_layers", "n_layers_encoder", "n_layers_decoder", "linear_classifier"),
    *("use_batch_norm", "use_observed_lib_size", "use_size_factor_key", "deeply_inject_covariates", "y_prior"),
    *("empirical_protein_background_prior", "extra_payload_autotune", "batch_embedding_kwargs"),
    *("labels_groups", "use_labels_groups", "use_minified"),
}
_READ = {
    *("dropout_rate", "dropout_rate_encoder", "dropout_rate_decoder", "dispersion", "gene_dispersion"),
    *("protein_dispersion", "gene_likelihood", "latent_distribution", "log_variational", "use_layer_norm"),
    *("encode_covariates", "override_missing_proteins", "classifier_parameters", "extra_decoder_kwargs"),
}


def find_options(init_params: object) -> dict:
    """Constructor arguments by name, those that the tensors do not tell."""
    if not isinstance(init_params, dict) or not init_params:
        raise ValueError("It lacks 'init_params_', the arguments of the model.")
    if "non_kwargs" in init_params:
        nested = init_params["kwargs"].values()
        options = dict(init_params["non_kwargs"])
    else:  # before 0.17 or so
        nested = [value for value in init_params.values() if isinstance(value, dict)]
        options = {key: value for key, value in init_params.items() if not isinstance(value, dict)}
    for some in nested:
        options |= some
    if options.pop("batch_representation", "one-hot") != "one-hot":
        raise ValueError("It uses batch_representation='embedding', which anvi does not have.")
    decoder = set(options.get("extra_decoder_kwargs") or ()) - {"activation_function_bg"}
    classifier = set(options.get("classifier_parameters") or ()) - {"n_hidden", "n_layers", "dropout_rate", "logits"}
    strange = {key for key, value in options.items() if key not in _SETTLED | _READ and value not in (None, False, {})}
    if strange | decoder | classifier:
        listed = ", ".join(sorted(map(str, strange | decoder | classifier)))
        raise ValueError(f"It was made with arguments that anvi does not have: {listed}.")
    return {key: value for key, value in options.items() if key in _READ and value is not None}


def find_setup(fields: Mapping, var_names: object, options: dict, *, joint: bool, n_labels: int) -> Setup:
    """Where things are and which categories there are, in the order of the checkpoint."""
    where, state = (
        {key: field.get(part) or {} for key, field in fields.items()} for part in ("data_registry", "state_registry")
    )
    rna = where.get("X", {})
    rna_mod = rna.get("mod_key") or "rna"
    categorical, continuous = state.get("extra_categorical_covs", {}), state.get("extra_continuous_covs", {})
    labels, batch = state.get("labels", {}), state.get("batch", {})
    known = _texts(labels.get("categorical_mapping", ()))
    dispersion = options.get("dispersion", options.get("gene_dispersion"))
    if n_labels > len(known):
        raise ValueError(f"It has {n_labels} classes, but only {len(known)} label names.")
    proteins = _proteins(where.get("proteins", {}), state.get("proteins", {})) if joint else {}

    def key_of(field: str) -> str | None:
        """The column of a field; None if scvi-tools made it up. One of a third modality is spelled out."""
        place = where.get(field, {})
        key = state.get(field, {}).get("original_key", place.get("attr_key"))
        mod = place.get("mod_key")
        if key is None or key.startswith("_scvi_"):
            return None
        return key if mod in (None, rna_mod, proteins.get("prot_mod")) else f"{mod}:{key}"

    batch_key = key_of("batch")
    batches = _texts(batch.get("categorical_mapping", ())) if batch_key else ("all",)
    with_panels = {}
    if proteins:
        panel_key = key_of("panel")
        panels = _texts(state["panel"]["categorical_mapping"]) if panel_key else batches
        measured = _measured(state["proteins"], options, len(panels), len(proteins["proteins"]))
        with_panels = {"panel_key": panel_key, "panels": panels, "measured": measured}
    # an scVI model has use for its labels only if each has a dispersion
    classes = known[:n_labels] if n_labels or dispersion != "gene-label" else known
    # it is the last category, whatever its name: scvi-tools makes it change places with the last class
    unlabelled = known[n_labels] if 0 < n_labels < len(known) else labels.get("unlabeled_category")
    return Setup(
        genes=_genes(state.get("X", {}), var_names, rna_mod),
        rna_mod=rna_mod,
        rna_layer=rna.get("attr_key") if rna.get("attr_name") == "layers" else None,
        counts=options.get("gene_likelihood") != "normal",
        batch_key=batch_key,
        batches=batches,
        labels_key=key_of("labels") if classes else None,
        classes=classes,
        unlabeled_category="" if unlabelled is None else str(unlabelled),
        categorical=tuple(
            (str(key), _texts(categorical["mappings"][key])) for key in categorical.get("field_keys", ())
        ),
        continuous=_texts(continuous.get("columns", ())),
        size_factor_key=key_of("size_factor"),
        **proteins,
        **with_panels,
    )


def _genes(state: Mapping, var_names: object, rna_mod: str) -> tuple[str, ...]:
    names = state.get("column_names")
    if names is None:  # before the registry kept them
        names = var_names.get(rna_mod) if isinstance(var_names, dict) else var_names
    if not isinstance(names, np.ndarray | list | tuple):
        raise ValueError("It lacks the names of its genes.")
    return _texts(names)


def _proteins(place: Mapping, state: Mapping) -> dict:
    """The entries of a setup that say where proteins are and what they are called."""
    names = state.get("column_names")
    if names is None:
        raise ValueError("It lacks the names of its proteins.")
    if isinstance(names, np.ndarray) and names.dtype.kind in "iu":  # an array without names, numbered
        names = [f"protein_{number}" for number in names.tolist()]
    if place.get("attr_name") == "obsm":
        found = {"prot_obsm": place["attr_key"]}
    else:
        layer = place.get("attr_key") if place.get("attr_name") == "layers" else None
        found = {"prot_mod": place.get("mod_key") or "prot", "prot_layer": layer}
    return {"proteins": _texts(names), **found}


def _measured(state: Mapping, options: dict, n_panels: int, n_proteins: int) -> tuple[tuple[bool, ...], ...]:
    """Who measured what; scvi-tools writes nothing if everybody measured everything."""
    masks = {} if options.get("override_missing_proteins") else state.get("protein_batch_mask") or {}
    every = (True,) * n_proteins
    if n_panels * n_proteins > MAX_MEASURED:
        raise ValueError(f"It has {n_panels:,} panels of {n_proteins:,} proteins, more than anvi opens.")
    table = [tuple(np.asarray(masks.get(str(code), every), dtype=bool).tolist()) for code in range(n_panels)]
    if any(len(row) != n_proteins for row in table):
        raise ValueError("Its protein_batch_mask is not as long as its list of proteins.")
    return tuple(table)


def _texts(values: object) -> tuple[str, ...]:
    """Names as text, in the way in which a user's column is read: whole floats as integers."""
    values = list(values.tolist() if isinstance(values, np.ndarray) else values)
    if values and all(isinstance(value, float) and value.is_integer() for value in values):
        values = [int(value) for value in values]
    if not all(isinstance(value, str | int | float) for value in values):
        raise ValueError(f"It has names that are neither text nor numbers ({values[:3]}, ...).")
    names = tuple(map(str, values))
    if len(set(names)) < len(names):
        raise ValueError(f"It has names that repeat, as text at least ({', '.join(names[:5])}, ...).")
    return names


MAX_MEASURED = 4_000_000
"""Entries of the table of panels."""
_CLASSES = {"SCVI": "scvi", "SCANVI": "scanvi", "TOTALVI": "totalvi", "TOTALANVI": "totalanvi"}


@checked
@verb
def from_scvi_tools(path: str | Path, data: containers.Data | None = None, *, prefix: str = "") -> Model:
    """Open a model that scvi-tools has saved: SCVI, SCANVI, TOTALVI or TOTALANVI, version 0.15 or newer.

    Nothing in the file is run: its pickle is read by an interpreter that knows plain data only. scvi-tools need not be
    there.

    Parameters
    ----------
    path
        The folder that `model.save()` wrote, or the `model.pt` in it.
    data
        An object that the model is meant for. If given, it is read once, so that what does not go together (genes,
        batches, modalities) is said here and not later.
    prefix
        What the file's name in the folder begins with, as in `model.save(..., prefix=...)`.

    Returns
    -------
    :class:`~anvi.Model`. Its loss follows scvi-tools to the digit (`config.objective="scvi-tools"`), categories keep
    their order, and it has no history.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, asks for anything but data, holds another kind of model or one with parts that anvi
        does not have, or if `data` do not go with it.

    Notes
    -----
    Models of before scvi-tools 1.1 (classifier with a softmax of its own), 1.2 (exponential background) and 1.3.1 (no
    per-batch efficiency) are understood as their version did.

    Examples
    --------
    >>> import anvi as av
    >>> from anvi.io import from_scvi_tools
    >>> model = from_scvi_tools("my_totalanvi_model/")  # doctest: +SKIP
    >>> av.tl.predict(mdata, model=model)  # doctest: +SKIP
    """
    file = _find(Path(path).expanduser(), prefix)
    content = read_model_pt(file)
    tensors, attributes, registry = _parts(content, file)
    class_name = registry.get("model_name")
    if not isinstance(class_name, str) or class_name not in _CLASSES:
        raise ValueError(f"{file} holds a model of the class {class_name!r:.80}; anvi opens {', '.join(_CLASSES)}.")
    name = _CLASSES[class_name]
    joint = name in ("totalvi", "totalanvi")
    try:
        options = find_options(attributes.get("init_params_"))
        n_labels = _tensor(tensors, "y_prior").shape[-1] if name in ("scanvi", "totalanvi") else 0
        fields = registry["field_registries"]
        setup = find_setup(fields, content.get("var_names"), options, joint=joint, n_labels=n_labels)
        config = find_config(tensors, setup, options, _version(registry), n_labels=n_labels)
        with torch.device("meta"):
            network = VAE(config)
        weights = map_weights(tensors, config)
        check_numbers(weights)
        network.load_state_dict(weights, assign=True)
        setup.checked()
    except ValueError as error:
        raise ValueError(f"{file} cannot be opened. {error}") from error
    except Exception as error:  # whatever Python, numpy and torch say of what is not built as scvi-tools builds it
        raise ValueError(
            f"{file} cannot be opened: it is not built as scvi-tools builds it ({error!r:.500})."
        ) from error
    info = {
        "source": f"scvi-tools {registry['scvi_version']}",
        "class": class_name,
        "anvi": version("anvi"),
        "torch": str(torch.__version__),
    }
    model = Model(name, setup, network.eval(), pd.DataFrame(), info)
    if data is not None:
        _check_data(data, setup)
    return model


def _find(path: Path, prefix: str) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"There is no {path}.")
        return path
    file = path / f"{prefix}model.pt"
    if file.exists():
        return file
    if (path / f"{prefix}attr.pkl").exists() or (path / f"{prefix}model_params.pt").exists():
        raise ValueError(
            f"{path} was saved by scvi-tools before 0.15, in several files. Bring it up to date there first: "
            "scvi.model.SCVI.convert_legacy_save(old, new), with the class of your model."
        )
    if (path / "config.json").exists():
        raise FileNotFoundError(
            f"There is no {file.name} in {path}: a model folder of anvi is opened by av.read_model."
        )
    there = ", ".join(sorted(entry.name for entry in path.glob("*model.pt"))) or "none"
    raise FileNotFoundError(f"There is no {file.name} in {path}; files of that kind there: {there} (see prefix=).")


def _parts(content: object, file: Path) -> tuple[dict, dict, dict]:
    """Tensors, attributes and registry."""
    tensors, attributes = (_entry(content, key, file) for key in ("model_state_dict", "attr_dict"))
    if "scvi_setup_dict_" in attributes:
        raise ValueError(f"{file} was saved by scvi-tools before 0.15; load and save it again with a newer one.")
    registry = _entry(attributes, "registry_", file)
    _entry(registry, "field_registries", file)
    return {key: value for key, value in tensors.items() if isinstance(value, np.ndarray)}, attributes, registry


def _entry(content: object, key: str, file: Path) -> dict:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no model of scvi-tools: it has no '{key}'.")
    return found


def _version(registry: Mapping) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(registry.get("scvi_version")))
    if found is None:
        raise ValueError(f"The model does not say which scvi-tools saved it ({registry.get('scvi_version')!r}).")
    return tuple(int(part or 0) for part in found.groups())


def _check_data(data: containers.Data, setup: Setup) -> None:
    """Read the data once; say what would otherwise show only as poor results."""
    source = containers.Source(data)
    if not source.alone:
        wanted = [setup.rna_mod] + ([setup.prot_mod] if setup.joint and setup.prot_obsm is None else [])
        absent = [mod for mod in wanted if mod not in source.mods]
        if absent:
            raise ValueError(
                f"The model was fitted to the modalities {', '.join(map(repr, wanted))}; this MuData has "
                f"{', '.join(map(repr, source.mods))}. Rename: MuData({{'{absent[0]}': mdata['...'], ...}})."
            )
    read_cells(source, setup)
    if setup.joint:
        find_proteins(source, setup)  # which must be there


# weights -------------------------------------------------------------------------------------------------------------

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

    # what ours are made of
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

    # all of ours, none missing and none left over
    mapped = {name: take(name, like) for name, like in ours.items()}
    if missing:
        raise ValueError(f"The model lacks tensors: {', '.join(dict.fromkeys(missing))}.")
    unused = _dropped(config)
    strange = sorted(name for name in left if not name.endswith("num_batches_tracked") and not name.startswith(unused))
    if strange:
        name = ("total" if config.has_protein else "sc") + ("anvi" if config.has_labels else "vi")
        raise ValueError(
            f"The model has tensors that have no place in a {name} model of this configuration: {', '.join(strange)}."
        )
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
    sizes = Config(**setup.sizes | {"n_labels": n_labels})
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
