"""io.model_card: what a model is, what it was fitted to and how good it is, as one page of Markdown."""

import json
from collections.abc import Sequence

import pandas as pd
from anndata import AnnData

from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.minified import is_minified
from anvi._data.setup import Setup
from anvi._find import resolve
from anvi._model import Model

from ._card_checks import checks, table
from ._card_text import MODELS, usage

_NOT_GIVEN = "Not given."
_BY_DATA = ("genes", "proteins", "batches", "classes", "panels", "measured")
"""What a setup found in the data, as against what it was asked for."""


def model_card(
    data: Data | Model,
    *,
    key: str | None = None,
    license: str = "unknown",
    description: str = "",
    tissues: Sequence[str] = (),
    references: str = "",
    training_data_url: str | None = None,
    training_code_url: str | None = None,
) -> str:
    """The model card of a fit: Markdown with the YAML front matter that model hubs read.

    Parameters
    ----------
    data
        A fitted MuData or AnnData, or a :class:`~anvi.Model`; only an object can have checks of the model in it.
    key
        Key of the model in `data`; None: the only one there.
    license
        Licence of the model as hubs abbreviate it, e.g. "cc-by-4.0".
    description
        What the model was made of and what for, in Markdown.
    tissues
        Tissues of the cells, for the tags.
    references
        What to cite for the data, in Markdown; the paper of the model is there already.
    training_data_url, training_code_url
        Where data and code are.

    Returns
    -------
    The card: front matter (licence, library, tags), what the model is and how it is asked, the description,
    posterior predictive checks and classification, network, arguments of the setup, data registry, summary statistics,
    training, references. No cell's name, label or count is in it.

    Raises
    ------
    KeyError
        If there is no such model.
    ValueError
        If there are several and none is named, or an address is none.

    Notes
    -----
    Reads `uns[key]`, there `criticism` (which `metrics.criticism` writes), and what `metrics.classification` reads.
    Source: spec section 5.5.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> card = av.io.model_card(mdata, license="cc-by-4.0", tissues=["blood"])
    >>> card.splitlines()[1:3]
    ['license: "cc-by-4.0"', 'library_name: "anvi"']
    """
    if isinstance(tissues, str):
        raise TypeError(f"tissues takes a list of names, e.g. tissues=['{tissues}'].")
    for name, url in (("training_data_url", training_data_url), ("training_code_url", training_code_url)):
        if url is not None and not url.startswith(("https://", "http://")):
            raise ValueError(f"{name}='{url}' is no address: it must begin with https://.")
    if isinstance(data, Model):
        model, data = data, None
    else:
        model, key = resolve(data, key, "key")
    about = MODELS[model.name]
    sections = [
        _front_matter(model, license, tissues),
        f"# {about.title}",
        about.text,
        usage(model),
        f"## Description\n\n{description.strip() or _NOT_GIVEN}",
        "## Metrics",
        *checks(data, model, key),
        "## Model parameters",
        _json({"model": model.name} | model.config.to_dict()),
        "## Setup arguments",
        _json(_arguments(model.setup)),
        "## Data registry",
        _registry(model.setup, data),
        f"- **Data is minified**: {_minified(model, data, key)}",
        "## Summary statistics",
        _summary(model),
        "## Training",
        _json({name: fact for name, fact in model.info.items() if fact is not None}),
        f"- **Training data**: {training_data_url or _NOT_GIVEN}",
        f"- **Training code**: {training_code_url or _NOT_GIVEN}",
        "## References",
        f"- {about.reference}",
        references.strip(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(model: Model, license: str, tissues: Sequence[str]) -> str:
    """Front matter; every text is quoted, so that YAML reads it as the same text whatever is in it."""
    proteins = model.config.has_protein
    tags = ["biology", "genomics", "single-cell", *(["CITE-seq"] if proteins else [])]
    tags.append(f"model_cls_name:{model.name.upper()}")
    tags += [f"{name}_version:{model.info[name]}" for name in ("anvi", "anndata") if name in model.info]
    tags += ["modality:rna", *(["modality:protein"] if proteins else [])]
    tags += [f"tissue:{tissue}" for tissue in tissues]
    tags += ["annotated:True"] if model.config.has_labels else []
    lines = [f"license: {_quoted(license)}", 'library_name: "anvi"', "tags:", *(f"- {_quoted(tag)}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _quoted(text: str) -> str:
    """A JSON string but for what lies outside ASCII: JSON has it in two halves, which YAML does not put together."""
    plain = json.dumps(str(text), ensure_ascii=False)
    return "".join(letter if " " <= letter <= "~" else f"\\U{ord(letter):08x}" for letter in plain)


def _json(values: dict) -> str:
    return f"```json\n{json.dumps(values, indent=2, ensure_ascii=False)}\n```"


def _arguments(setup: Setup) -> dict:
    """What the setup was asked for: everything but the names of features and categories."""
    found = {name: value for name, value in setup.to_dict().items() if name not in _BY_DATA}
    return found | {"categorical": [key for key, _ in setup.categorical]}


def _registry(setup: Setup, data: Data | None) -> str:
    """Where each input of the model is read from."""
    alone = isinstance(data, AnnData) or setup.prot_obsm is not None
    whole = "adata" if alone else "mdata"
    rna, prot = (whole if alone else f"mdata['{mod}']" for mod in setup.mods)
    places = {"RNA counts": f"{rna}.{_matrix(setup.rna_layer)}"}
    if setup.joint:
        slot = _matrix(setup.prot_layer) if setup.prot_obsm is None else f"obsm['{setup.prot_obsm}']"
        places["protein counts"] = f"{prot}.{slot}"
    keys = {"batch": setup.batch_key, "labels": setup.labels_key, "panel": setup.panel_key}
    keys |= {f"categorical covariate {i}": key for i, (key, _) in enumerate(setup.categorical, 1)}
    keys |= {f"continuous covariate {i}": key for i, key in enumerate(setup.continuous, 1)}
    keys["size factor"] = setup.size_factor_key
    places |= {what: f"{whole}.obs['{key}']" for what, key in keys.items() if key is not None}
    return table(pd.DataFrame({"input": list(places), "place": [f"`{place}`" for place in places.values()]}))


def _matrix(layer: str | None) -> str:
    return "X" if layer is None else f"layers['{layer}']"


def _minified(model: Model, data: Data | None, key: str | None) -> str:
    if data is None:
        return "there were no data with the model when this card was made"
    if not is_minified(data, model.setup, key):
        return "False"
    slot = f"`obsm['{slots.qz_mean(key)}']` and `obsm['{slots.qz_var(key)}']`"
    return f"True, the posterior of every cell is in {slot} in the place of its counts"


def _summary(model: Model) -> str:
    """Sizes of data and model; unlabelled cells are no class of their own."""
    config, info = model.config, model.info
    sizes = {
        "n_cells": info.get("n_cells"),
        "n_train": info.get("n_train"),
        "n_labelled": info.get("n_labelled") if config.has_labels else None,
        "n_genes": config.n_genes,
        "n_proteins": config.n_proteins if config.has_protein else None,
        "n_labels": config.n_labels if config.has_labels else None,
        "n_batches": config.n_batches,
        "n_panels": config.n_panels if config.has_protein else None,
        "n_categorical_covariates": len(config.n_categories),
        "n_continuous_covariates": config.n_continuous,
        "n_latent": config.n_latent,
        "n_parameters": sum(parameter.numel() for parameter in model.network.parameters()),
    }
    known = {name: size for name, size in sizes.items() if size is not None}
    return table(pd.DataFrame({"statistic": list(known), "value": list(known.values())}))
