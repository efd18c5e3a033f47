"""What a scvi-tools model says of its data and of itself, as our `Setup` and plain options. Source: spec 7.2, 7.4."""

from collections.abc import Mapping

import numpy as np

from anvi._data.setup import Setup

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
    """Constructor arguments by name, those that the tensors do not tell.

    Raises
    ------
    ValueError
        If one changes the mathematics in a way that we do not have.
    """
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
    """Where things are and which categories there are, in the order of the checkpoint.

    Parameters
    ----------
    fields
        The "field_registries" of the model.
    var_names
        Names of genes as the model keeps them beside the registry: one array, or an array per modality.
    options
        Output of :func:`find_options`.
    joint
        Whether the model has proteins.
    n_labels
        Number of classes, without the unlabelled one; 0 for a model that does not classify.
    """
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
