"""io.model_card: what a model is, what it was fitted to and how good it is, as one page of Markdown."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from anvi._arguments import checked
from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.counts import matrix_name
from anvi._data.fits import stored_fits
from anvi._data.minified import is_minified
from anvi._data.setup import Setup
from anvi._find import find_model
from anvi._model import Model
from anvi._store import write_folder

_NONE = "Not checked: `av.metrics.criticism(data)` writes the checks that belong here."
_AGREEMENT = {
    "mae": "Mean absolute error",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "r2": "R²",
    "ratio": "Median of model / data",
    "replicate": "Pearson of one draw with the others",
}
_TITLES = {
    "cv_cell": "### Coefficient of variation of cells",
    "cv_gene": "### Coefficient of variation of features",
    "zero_fraction": "### Share of zeros",
    "calibration": "### Calibration",
    "de": "### Differential expression",
}
_TEXTS = {
    "cv_cell": "Over the features of each cell, in its data and in its draws. Where the squared Pearson correlation is "
    "below 0.4, counts drawn from the model should not be analysed further; the latent space may still be useful.",
    "cv_gene": "Over the cells, of each gene and each protein.",
    "zero_fraction": "Of each gene and each protein over the cells.",
    "calibration": "Share of counts inside central intervals of their draws, ties spread evenly; the error is the "
    "total variation distance of their places among the draws from level ones.",
    "de": "Each group of cells against the rest, in the data and in one draw, by a Wilcoxon rank sum test: overlap of "
    "the top features (F1), log fold changes, and how well the draw's scores find the features that are higher in the "
    "data (ROC-AUC, PR-AUC).",
}
_SCVI_TEXTS = {
    "zero_fraction": "Of non-zeros, in fact, as scvi-tools has it.",
    "calibration": "Share of counts between quantiles of their draws, zeros and edges included; the error is the sum "
    "of squared differences from the levels.",
    "de": "Each group of cells against the rest, in the data and in one draw, by a t-test; features that differ in "
    "either direction count as true.",
}


def checks(data: Data | None, model: Model, key: str | None) -> list[str]:
    """The paragraphs of the metrics, as far as the object has them."""
    if data is None:
        return [_NONE]
    found = slots.home(data, model.setup).uns.get(key, {}).get("criticism")
    parts = _criticism(found) if isinstance(found, Mapping) else [_NONE]
    return parts + _classification(data, model, key)


def _criticism(found: Mapping) -> list[str]:
    params = found.get("params", {})
    definition, n_samples = str(params.get("definition", "anvi")), params.get("n_samples", "?")
    whose = "those of scvi-tools" if definition == "scvi" else "anvi's"
    parts = [
        f"Counts drawn from the model, {n_samples} times for every cell, against the data; definitions are {whose}."
    ]
    if "verdict" in found:
        shown = found["verdict"][
            ["modality", "metric", "statistic", "cells", "value", "threshold", "verdict", "source"]
        ]
        parts += ["### Verdicts", markdown_table(shown)]
    texts = _TEXTS | (_SCVI_TEXTS if definition == "scvi" else {})
    for name, title in _TITLES.items():
        if name in found:
            parts += [title, texts[name], markdown_table(_shown(name, pd.DataFrame(found[name])))]
    return parts


def _shown(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """A table as a card has it: training and validation apart where cells are compared, all cells otherwise."""
    if name == "de":
        return rows.rename(columns={"cells": "n_cells"})
    if name == "calibration":
        rows = rows[rows["statistic"].astype(str) != "n"]
        level = [f"inside {x:.0%}" if np.isfinite(x) else "error" for x in rows["level"].astype(float)]
        return pd.DataFrame({"modality": rows["modality"], "statistic": level, "value": rows["all"]})
    rows = rows[rows["statistic"].astype(str).isin(list(_AGREEMENT))]
    statistic = rows["statistic"].astype(str).map(_AGREEMENT)
    apart = name == "cv_cell" and rows["validation"].notna().any()
    columns = ["train", "validation"] if apart else ["all"]
    names = {"train": "training", "validation": "validation", "all": "value"}
    shown = {names[column]: rows[column] for column in columns}
    return pd.DataFrame({"modality": rows["modality"], "statistic": statistic} | shown)


def _classification(data: Data, model: Model, key: str) -> list[str]:
    """Scores on validation cells, where the model has predictions and the object has labels for them."""
    if not model.config.has_labels:
        return []
    from anvi.metrics import classification

    try:
        scores = classification(data, model=key)
    except (KeyError, ValueError):  # labels, split or predictions are not in this object: there is nothing to say
        return []
    columns = ["cells", "accuracy", "precision", "recall", "f1", "confidence", "ece"]
    shown = scores[columns].rename_axis("class").reset_index()
    text = (
        "On validation cells with a label; over all classes, F1 is the macro F1 and ECE the expected calibration error."
    )
    return ["### Classification", text, markdown_table(shown)]


def markdown_table(rows: pd.DataFrame, code: Sequence[str] = ()) -> str:
    """A DataFrame as a Markdown table: three digits, missing values empty, text as text, columns of `code` as code."""
    lines = [[_cell(str(name)) for name in rows.columns], ["---"] * rows.shape[1]]
    for row in rows.astype(object).itertuples(index=False, name=None):
        cells = zip(rows.columns, row, strict=True)
        lines.append([as_code(str(value), cell=True) if name in code else _cell(value) for name, value in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.3g}" if np.isfinite(value) else ""
    return as_text(str(value))


def as_text(text: str) -> str:
    """Text of others in Markdown: on one line, and nothing in it means anything."""
    line = re.sub(r"[\\`*\[\]|~$]", r"\\\g<0>", " ".join(text.split()))
    # inside a word an underscore is one
    line = re.sub(r"(?<![^\W_])_+|_+(?![^\W_])", lambda some: "\\_" * len(some[0]), line)
    return html.escape(line, quote=False)


def as_code(text: str, *, cell: bool = False) -> str:
    """Text of others as code in Markdown, whatever backticks are in it; in a `cell` of a table without its bars."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if "`" in line else ""
    return f"{fence}{room}{line}{room}{fence}".replace("|", "\\|" if cell else "|")


class About(NamedTuple):
    """What there is to say of a model, whatever it was fitted to."""

    title: str
    text: str
    reference: str


_SHARED = (
    "Batches are part of the model, so that cells of different batches meet in the latent space, and new batches can "
    "be mapped onto it without training it again."
)

MODELS = {
    "scvi": About(
        "scVI model of RNA counts",
        "scVI explains the RNA counts of a cell by a latent vector, its batch and its library size, with a negative "
        f"binomial (with or without extra zeros) for every gene. {_SHARED}",
        "scVI: Lopez et al., Nature Methods 2018, https://doi.org/10.1038/s41592-018-0229-2",
    ),
    "scanvi": About(
        "scANVI model of RNA counts and cell types",
        "scANVI is scVI with cell types that are known for some cells: a classifier on the latent space learns from "
        f"these and gives every cell, also of other data, the probability of each type. {_SHARED}",
        "scANVI: Xu et al., Molecular Systems Biology 2021, https://doi.org/10.15252/msb.20209620",
    ),
    "totalvi": About(
        "totalVI model of RNA and protein counts",
        "totalVI explains RNA and surface protein counts of a cell by one latent vector and takes each protein count "
        "for a mixture of background and foreground. Cells may lack some proteins or all of them: the model fills them "
        f"in. {_SHARED}",
        "totalVI: Gayoso et al., Nature Methods 2021, https://doi.org/10.1038/s41592-020-01050-x",
    ),
    "totalanvi": About(
        "TotalANVI model of RNA counts, protein counts and cell types",
        "TotalANVI has totalVI's decoder of RNA and surface protein counts under scANVI's latent hierarchy with cell "
        "types that are known for some cells. It fills in proteins that were not measured and gives every cell, also "
        f"of data without proteins, the probability of each type. {_SHARED}",
        "Its parts: totalVI, Gayoso et al., Nature Methods 2021, https://doi.org/10.1038/s41592-020-01050-x, and "
        "scANVI, Xu et al., Molecular Systems Biology 2021, https://doi.org/10.15252/msb.20209620",
    ),
}


def usage(model: Model) -> str:
    """How the model is asked, as code that can be copied."""
    ask = "predict" if model.config.has_labels else "latent"
    lines = [
        "import anvi as av",
        "",
        'model = av.read_model("folder")  # of a hub: av.io.from_hub("owner/name")',
        f"av.tl.{ask}(data, model=model)  # the same batches",
        "av.tl.map_query(data, model)  # new batches, other genes or proteins",
    ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


_NOT_GIVEN = "Not given."
_BY_DATA = ("genes", "proteins", "batches", "classes", "label_levels", "panels", "measured")
"""What a setup found in the data, as against what it was asked for."""


@checked
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

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> card = av.io.model_card(mdata, license="cc-by-4.0", tissues=["blood"])
    >>> card.splitlines()[1:3]
    ['license: "cc-by-4.0"', 'library_name: "anvi"']
    """
    for name, url in (("training_data_url", training_data_url), ("training_code_url", training_code_url)):
        if url is not None and not re.fullmatch(r"https?://[^\s<>()\[\]`\"'\\]+", url):
            raise ValueError(f"{name}='{url}' is no address: it must begin with https:// and hold no blank or bracket.")
    if isinstance(data, Model):
        model, data = data, None
    else:
        model, key = find_model(data, key, "key")
    about = MODELS[model.name]
    # what the setup was asked for: everything but the names of features and categories
    asked = {name: value for name, value in model.setup.to_dict().items() if name not in _BY_DATA}
    asked["categorical"] = [name for name, _ in model.setup.categorical]
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
        _json(asked),
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


def _registry(setup: Setup, data: Data | None) -> str:
    """Where each input of the model is read from."""
    alone = isinstance(data, AnnData) or setup.prot_obsm is not None
    whole = "adata" if alone else "mdata"
    rna, prot = (whole if alone else f"mdata['{mod}']" for mod in setup.mods)
    places = {"RNA counts": f"{rna}.{matrix_name(setup.rna_layer)}"}
    if setup.joint:
        slot = matrix_name(setup.prot_layer) if setup.prot_obsm is None else f"obsm['{setup.prot_obsm}']"
        places["protein counts"] = f"{prot}.{slot}"
    keys = {"batch": setup.batch_key, "labels": setup.labels_key, "panel": setup.panel_key}
    keys |= {f"labels, level {i}": key for i, key in enumerate(setup.label_columns[:-1], 1)}
    keys |= {f"categorical covariate {i}": key for i, (key, _) in enumerate(setup.categorical, 1)}
    keys |= {f"continuous covariate {i}": key for i, key in enumerate(setup.continuous, 1)}
    keys["size factor"] = setup.size_factor_key
    places |= {what: f"{whole}.obs['{key}']" for what, key in keys.items() if key is not None}
    return markdown_table(pd.DataFrame({"input": list(places), "place": list(places.values())}), code=["place"])


def _minified(model: Model, data: Data | None, key: str | None) -> str:
    if data is None:
        return "there were no data with the model when this card was made"
    if not is_minified(data, model.setup, key):
        return "False"
    slot = " and ".join(as_code(f"obsm['{name}']") for name in (slots.qz_mean(key), slots.qz_var(key)))
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
    return markdown_table(pd.DataFrame({"statistic": list(known), "value": list(known.values())}))


@checked
def write_model(
    data: Data | Model,
    path: str | Path,
    *,
    model: str | Path | Model | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a fitted model without data into a folder.

    Parameters
    ----------
    data
        A fitted MuData or AnnData, or a :class:`~anvi.Model`.
    path
        The folder to make.
    model
        Key of the model in `data`; None: the only one there.
    card
        Text of `README.md`: what :func:`model_card` gave with a licence and a description; None: without these.
    overwrite
        Replace a folder that holds a model.

    Returns
    -------
    None. Writes `model.safetensors` (weights), `config.json` (schema version, setup, network, facts of the fit),
    `history.csv` and `README.md` (the card). No cell's name, label or count is in any of them.

    Raises
    ------
    FileExistsError
        If there is something at `path` and `overwrite` is False, or it is no model folder.

    Examples
    --------
    >>> import tempfile
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     av.write_model(mdata, f"{folder}/model")
    ...     print(av.read_model(f"{folder}/model").name)
    totalvi
    """
    found, key = (data, None) if isinstance(data, Model) else find_model(data, model)
    if card is None:
        lies_there = key is not None and (
            model is None or (isinstance(model, str) and model in stored_fits(data, whole=True))
        )
        card = model_card(data, key=key) if lies_there else model_card(found)
    write_folder(found, path, card, overwrite=overwrite)
