"""Which fitted model an argument means: the only one in the data, a key, a folder, or the model itself."""

import json
import logging
import os
import re
from pathlib import Path

import pandas as pd

from ._backed import open_backed
from ._data import slots
from ._data.containers import Data, Source
from ._data.fits import FIT_COMMAND, meant, stored_fits
from ._files import ENDINGS, parse_json, reading
from ._model import Model
from ._store import FILES, fetch, read_fetched, read_model

logger = logging.getLogger("anvi")

NO_HUB_ID = (*ENDINGS, ".h5", ".hdf5", ".gz", ".zip", ".pt", ".safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""A name on the hub, and what no such name ends with: a file was meant."""


def find_model(
    data: Source | Data, model: str | Path | Model | None, argument: str = "model", fit: str = FIT_COMMAND
) -> tuple[Model, str]:
    """The model that an argument means, and the key of its slots.

    Parameters
    ----------
    data
        Object in which a key is looked up.
    model
        None: the only fitted model in `data`; a key; a folder that `write_model` made; or a :class:`Model`.
    argument
        Name of the argument, for messages.
    fit
        The command that makes such a model, for messages.

    Raises
    ------
    KeyError
        If there is no such model.
    ValueError
        If there are several and none is named.
    """
    if isinstance(model, Model):
        return model, model.key
    if not isinstance(model, str | os.PathLike | None):
        raise TypeError(f"{argument}= takes the key of a fit, a folder or a model; got {type(model).__name__}.")
    there = stored_fits(data, whole=True)
    path = None if model is None or model in there else Path(model).expanduser()
    if path is not None and path.is_dir():
        fitted_before = read_model(path, device="cpu")
        return fitted_before, fitted_before.key
    if path is not None and path.is_file() and path.suffix in ENDINGS:
        raise KeyError(f"{argument}='{model}' is a file of data: pass the model in it, av.get.model('{model}').")
    command = f"run {fit} first, or pass another {argument}="
    model = meant(there, model, "fitted model", command, argument, " and no folder")
    stored = there[model].home.uns[model]
    with reading(f"uns['{model}']['model']"):
        return Model.from_slot(stored["model"], stored.get("history", pd.DataFrame())), str(model)


def find_reference(reference: Data | str | Path | Model, model: str | None) -> tuple[Model, Data | None]:
    """The model that others are mapped onto, and the object that it lies in, if there is one.

    Parameters
    ----------
    reference
        A fitted object, a `.h5mu`, `.h5ad` or `.zarr` file with one, a folder that `write_model` made, the "owner/name"
        of a model on the hub, or a model.
    model
        Key of the model in the object; None: the only one there.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder, nor such a model on the hub.
    KeyError, ValueError
        If there is no such model, or several and none is named.
    """
    if isinstance(reference, Model):
        return reference, None
    path = Path(reference).expanduser() if isinstance(reference, str | Path) else None
    if path is not None:
        if path.is_dir() and path.suffix != ".zarr":
            return read_model(path, device="cpu"), None
        if isinstance(reference, str) and _may_be_on_the_hub(reference):
            return _from_hub(reference), None
        reference = _read(path)
    if not stored_fits(reference, whole=True):
        where = f"'{path}'" if path is not None else "The reference"
        raise KeyError(f"{where} holds no fitted model. New cells come first, then the object or file with the model.")
    return find_model(reference, model)[0], reference


def _from_hub(repo_id: str) -> Model:
    """A model of the hub, by its newest revision; whatever keeps it away is told as a missing reference."""
    logger.info(f"reference='{repo_id}' is no folder here: asking the hub for it")
    try:
        folder = fetch(repo_id, FILES)
    except Exception as error:  # of the network, of the hub, of names that it does not take
        raise FileNotFoundError(
            f"reference='{repo_id}' is no folder here, and no model of the hub could be had by that name: {error}"
        ) from error
    return read_fetched(folder, repo_id, "cpu")


def _may_be_on_the_hub(name: str) -> bool:
    """Whether this is "owner/name" rather than a path; in a folder that is here, a missing one is a slip of the pen."""
    path = Path(name)
    is_path = path.exists() or path.parent.is_dir() or path.suffix.lower() in NO_HUB_ID
    return not is_path and HUB_ID.fullmatch(name) is not None


def _read(path: Path) -> Data:
    """A MuData or an AnnData from a file."""
    if not path.exists() or path.suffix not in ENDINGS:
        raise FileNotFoundError(
            f"reference='{path}' is neither a folder that av.write_model made nor a .h5mu, .h5ad or .zarr file. "
            "(A model on the hub is named by a str, 'owner/name', where no folder 'owner' is here.)"
        )
    return open_backed(path)


def key_to_write(data: Source | Data, model: Model, key: str, key_added: str | None) -> str:
    """The prefix under which a verb writes; never over the results of another model, nor over the user's own.

    Raises
    ------
    ValueError
        If another fit of the object has the prefix, or something lies there that is no result of anvi.
    """
    source, there = Source.of(data), stored_fits(data, whole=True)
    wanted = slots.clean_key(key if key_added is None else key_added)
    another = "another " if key_added is not None else ""
    if wanted in there:
        with reading(f"uns['{wanted}']['model']"):
            config = dict(parse_json(str(there[wanted].home.uns[wanted]["model"]["config"])))
        facts = json.loads(json.dumps(model.facts()))
        if config | {"schema": None} != facts | {"schema": None}:
            raise ValueError(
                f"This object has a fit of its own under '{wanted}'; pass {another}key_added= to write beside it."
            )
        return wanted
    home = source.data if model.setup.joint else source.mods.get(model.setup.rna_mod, source.data)
    entry = home.uns.get(wanted)
    if entry is not None and not slots.only_answers(entry) and not slots.is_fit(entry):
        raise ValueError(
            f"uns['{wanted}'] holds something that is no result of anvi; pass {another}key_added= to write beside it."
        )
    return wanted
