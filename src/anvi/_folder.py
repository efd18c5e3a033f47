"""A fitted model as a folder: weights, configuration, history and a README; no data and nothing that runs."""

import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load, save

from ._model import Model
from .settings import choose_device

WEIGHTS, CONFIG, HISTORY, README = "model.safetensors", "config.json", "history.csv", "README.md"


def write_folder(fitted: Model, path: str | Path, *, overwrite: bool) -> None:
    """Write a model into a folder; see :func:`anvi.io.write_model`."""
    path = Path(path)
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} is there already; pass overwrite=True to replace the model in it.")
        if not (path / CONFIG).is_file():
            raise FileExistsError(
                f"{path} is no model folder (it has no {CONFIG}); it is left alone. Name another path."
            )
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = save(fitted.weights())
    config = fitted.facts() | {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    (part / WEIGHTS).write_bytes(weights)
    (part / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    fitted.history.to_csv(part / HISTORY, index=False)
    (part / README).write_text(_readme(fitted), encoding="utf-8")
    if path.exists():
        shutil.rmtree(path)
    part.rename(path)


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
        if not isinstance(facts, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} is damaged ({error}). Write the model again.") from error
    raw = (path / WEIGHTS).read_bytes()
    if hashlib.sha256(raw).hexdigest() != facts.pop("weights_sha256", None):
        raise ValueError(f"{path / WEIGHTS} is truncated or was edited: its checksum is not the one in {CONFIG}.")
    try:
        weights = load(raw)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is no safetensors file ({error}).") from error
    try:
        history = pd.read_csv(path / HISTORY)
    except pd.errors.ParserError as error:
        raise ValueError(f"{path / HISTORY} is damaged ({error}).") from error
    return Model.from_parts(facts, weights, history).on(choose_device(device))


def _readme(model: Model) -> str:
    lines = [f"# {model.name}", "", f"{model!r}.", "", "```python", "import anvi as av", ""]
    verb = "predict" if model.config.has_labels else "latent"
    lines += [f'av.tl.{verb}(mdata, model=av.read_model("path/to/this/folder"))', "```", ""]
    lines += [f"- {name}: {value}" for name, value in sorted(model.info.items()) if value is not None]
    return "\n".join(lines) + "\n"
