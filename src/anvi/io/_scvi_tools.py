"""Models of scvi-tools, opened without scvi-tools. Source: spec sections 7.2 and 7.4."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from mudata import MuData

from anvi._data import containers
from anvi._data.cells import read_cells
from anvi._data.proteins import find_proteins
from anvi._data.setup import Setup
from anvi._model import Model
from anvi.nn import VAE

from ._model_pt import read_model_pt
from ._registry import find_options, find_setup
from ._weights import count_labels, find_config, map_weights

_CLASSES = {"SCVI": "scvi", "SCANVI": "scanvi", "TOTALVI": "totalvi", "TOTALANVI": "totalanvi"}


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
    file = _find(Path(path), prefix)
    content = read_model_pt(file)
    tensors, attributes, registry = _parts(content, file)
    class_name = registry.get("model_name")
    if class_name not in _CLASSES:
        raise ValueError(f"{file} holds a model of the class {class_name!r}; anvi opens {', '.join(_CLASSES)}.")
    name = _CLASSES[class_name]
    joint = name in ("totalvi", "totalanvi")
    try:
        options = find_options(attributes.get("init_params_"))
        n_labels = count_labels(tensors) if name in ("scanvi", "totalanvi") else 0
        fields = registry["field_registries"]
        setup = find_setup(fields, content.get("var_names"), options, joint=joint, n_labels=n_labels)
        config = find_config(tensors, setup, options, _version(registry), n_labels=n_labels)
        network = VAE(config)
        network.load_state_dict(map_weights(tensors, config))
    except ValueError as error:
        raise ValueError(f"{file} cannot be opened. {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be opened: it is not built as scvi-tools builds it ({error!r}).") from error
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
    containers.check_type(data)
    if isinstance(data, MuData):
        wanted = [setup.rna_mod] + ([setup.prot_mod] if setup.joint and setup.prot_obsm is None else [])
        absent = [mod for mod in wanted if mod not in data.mod]
        if absent:
            raise ValueError(
                f"The model was fitted to the modalities {', '.join(map(repr, wanted))}; this MuData has "
                f"{', '.join(map(repr, data.mod))}. Rename: MuData({{'{absent[0]}': mdata['...'], ...}})."
            )
    read_cells(data, setup)
    if setup.joint:
        there = find_proteins(data, setup).names
        if not set(there) & set(setup.proteins):
            raise ValueError(
                f"None of the model's {len(setup.proteins)} proteins ({', '.join(setup.proteins[:3])}, ...) is in the "
                f"data, which have {', '.join(there[:3])}, .... Proteins are matched by name; rename them."
            )
