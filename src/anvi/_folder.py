"""A fitted model as a folder: weights, configuration, history and a README; no data and nothing that runs."""

import hashlib
import io
import json
import tempfile
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load, save

from ._model import SCHEMA, Model
from .settings import choose_device

WEIGHTS, CONFIG, HISTORY, README = "model.safetensors", "config.json", "history.csv", "README.md"


def write_folder(fitted: Model, path: str | Path, card: str, *, overwrite: bool) -> None:
    """Write a model into a folder, with `card` as its README; see :func:`anvi.io.write_model`."""
    path = Path(path)
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} is there already; pass overwrite=True to replace the model in it.")
        _check_ours(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    history = fitted.history if len(fitted.history.columns) else pd.DataFrame(columns=["epoch"])
    weights, table = save(fitted.weights()), history.to_csv(index=False).encode()
    facts = fitted.facts()
    checksums = {WEIGHTS: _checksum(weights), HISTORY: _checksum(table), CONFIG: _checksum_of_facts(facts)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as staging:
        part = Path(staging) / "model"
        part.mkdir()
        (part / WEIGHTS).write_bytes(weights)
        (part / HISTORY).write_bytes(table)
        (part / CONFIG).write_text(json.dumps(facts | {"sha256": checksums}, indent=1), encoding="utf-8")
        (part / README).write_text(card, encoding="utf-8")
        if path.exists():
            path.rename(Path(staging) / "before")
        part.rename(path)


def _check_ours(path: Path) -> None:
    """Raise unless a folder holds a model and nothing else, so that nothing of the user's can be lost."""
    try:
        ours = "sha256" in json.loads((path / CONFIG).read_text(encoding="utf-8"))
        others = sorted({entry.name for entry in path.iterdir()} - {WEIGHTS, CONFIG, HISTORY, README})
    except (OSError, ValueError):
        ours, others = False, []
    if not ours:
        raise FileExistsError(f"{path} is no model folder of anvi; it is left alone. Name another path.")
    if others:
        raise FileExistsError(f"{path} holds other files beside the model ({others[0]}, ...); it is left alone.")


def _checksum(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _checksum_of_facts(facts: dict) -> str:
    return _checksum(json.dumps(facts, sort_keys=True).encode())


def read_model(path: str | Path, *, device: str = "auto") -> Model:
    """Read a model that :func:`write_model` wrote; nothing in the folder is executed.

    Parameters
    ----------
    path
        The folder.
    device
        Where the network goes: "auto" or a torch device.

    Returns
    -------
    :class:`~anvi.Model`, to be passed as `model=` to every verb.

    Raises
    ------
    FileNotFoundError
        If the folder or one of its files is not there.
    ValueError
        If a file is truncated, was edited, or was written by a newer anvi.

    Examples
    --------
    >>> import anvi as av
    >>> av.read_model("nowhere")
    Traceback (most recent call last):
        ...
    FileNotFoundError: nowhere has no config.json: it is no model folder of anvi.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS, HISTORY):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}: it is no model folder of anvi.")
    try:
        facts = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        checksums = facts.pop("sha256", {}) if isinstance(facts, dict) else None
        if not isinstance(checksums, dict) or not isinstance(facts.get("schema", 0), int):
            raise ValueError("it does not hold what it should")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / CONFIG} is damaged ({error}). Write the model again.") from error
    if facts.get("schema", 0) > SCHEMA:
        raise ValueError(
            f"{path} was written by a newer anvi (schema {facts['schema']}, this one reads up to {SCHEMA})."
        )
    weights, table = (path / WEIGHTS).read_bytes(), (path / HISTORY).read_bytes()
    found = {WEIGHTS: _checksum(weights), HISTORY: _checksum(table), CONFIG: _checksum_of_facts(facts)}
    for name, checksum in found.items():
        if checksums.get(name) != checksum:
            raise ValueError(f"{path / name} is truncated or was edited: its checksum is not the one in {CONFIG}.")
    history = pd.read_csv(io.BytesIO(table))
    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged ({error}). Write the model again.") from error
    return Model.from_parts(facts, tensors, history).on(choose_device(device))
