"""Which fitted model an argument means: the only one in the data, a key, a folder, or the model itself."""

import json
from pathlib import Path

import pandas as pd
from anndata import AnnData
from mudata import MuData

from ._data import slots
from ._data.containers import Data
from ._folder import read_model
from ._model import Model


def fitted(data: Data) -> dict[str, Data]:
    """Keys of the fitted models in an object, and the part of it whose `uns` holds each."""
    homes = [data, *data.mod.values()] if isinstance(data, MuData) else [data]
    found: dict[str, Data] = {}
    for home in homes:
        for key, value in home.uns.items():
            if isinstance(value, dict) and isinstance(value.get("model"), dict) and "weights" in value["model"]:
                found.setdefault(key, home)
    return found


def resolve(data: Data, model: str | Path | Model | None, argument: str = "model") -> tuple[Model, str]:
    """The model that an argument means, and the key of its slots.

    Parameters
    ----------
    data
        Object in which a key is looked up.
    model
        None: the only fitted model in `data`; a key; a folder that `write_model` made; or a :class:`Model`.
    argument
        Name of the argument, for messages.

    Raises
    ------
    KeyError
        If there is no such model.
    ValueError
        If there are several and none is named.
    """
    if isinstance(model, Model):
        return model, model.key
    if not isinstance(data, MuData | AnnData):
        raise TypeError(f"Expected a MuData or an AnnData, got {type(data).__name__}.")
    there = fitted(data)
    listed = ", ".join(map(repr, there))
    if model is None:
        if not there:
            raise KeyError("There is no fitted model in this object; run av.tl.totalanvi(mdata) first, or pass model=.")
        if len(there) > 1:
            raise ValueError(f"There are several fitted models: {listed}. Name one: {argument}=...")
        model = next(iter(there))
    if model not in there and Path(model).is_dir():
        fitted_before = read_model(model, device="cpu")
        return fitted_before, fitted_before.key
    if model not in there:
        raise KeyError(
            f"{argument}='{model}' is no fitted model of this object and no folder; there are: {listed or 'none'}."
        )
    stored = there[model].uns[model]
    return Model.from_slot(stored["model"], stored.get("history", pd.DataFrame())), str(model)


def check_free(data: Data, key: str, *, joint: bool, rna_mod: str) -> None:
    """Raise a ValueError if a fit under `key` would bury something that is not an earlier fit in the same place."""
    home = data if joint or isinstance(data, AnnData) else data.mod.get(rna_mod, data)
    there = fitted(data)
    if key in there and there[key] is not home:
        raise ValueError(f"There is another model under the key '{key}' in this object; pass key_added= for this one.")
    if key in home.uns and key not in there:
        raise ValueError(f"uns['{key}'] holds something that is no model of anvi; pass another key_added=.")


def key_to_write(data: Data, model: Model, key: str, key_added: str | None) -> str:
    """The prefix under which a verb writes; never over the results of another model that lies in the object."""
    if key_added is not None:
        return slots.clean_key(key_added)
    there = fitted(data)
    if key in there and json.loads(str(there[key].uns[key]["model"]["config"])) != json.loads(
        json.dumps(model.facts())
    ):
        raise ValueError(f"This object has a fit of its own under '{key}'; pass key_added= to write beside it.")
    return slots.clean_key(key)
