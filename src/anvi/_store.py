"""A fitted model as a folder (weights, configuration, history, README; no data and nothing to run), and on the hub."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from anndata import AnnData
from mudata import MuData
from safetensors.torch import load, save

from ._arguments import checked
from ._data.containers import Data, check_type
from ._files import ENDINGS, check_hdf5, newest, parse_json, reading, replacing, sealed, unsealed
from ._model import SCHEMA, Model
from ._runtime import verb
from .settings import choose_device

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger("anvi")

FILES = WEIGHTS, CONFIG, HISTORY, README = "model.safetensors", "config.json", "history.csv", "README.md"
DATA = ("data.h5mu", "data.h5ad")


def write_folder(fitted: Model, path: str | Path, card: str, *, overwrite: bool) -> None:
    """Write a model into a folder, with `card` as its README; see :func:`anvi.io.write_model`."""
    path = Path(path).expanduser()
    path = path.resolve() if path.is_symlink() else path  # what it points at is replaced
    if path.suffix in ENDINGS:
        raise ValueError(f"{path}: a model is a folder, and '{path.suffix}' is how files of data end; name it without.")
    if newest(path).exists():
        if not overwrite:
            raise FileExistsError(f"{path} is there already; pass overwrite=True to replace the model in it.")
        _check_ours(newest(path))
    history = fitted.history if len(fitted.history.columns) else pd.DataFrame(columns=["epoch"])
    weights, table = sealed(save(fitted.weights())), history.to_csv(index=False).encode()
    facts = fitted.facts()
    checksums = {WEIGHTS: _checksum(weights), HISTORY: _checksum(table), CONFIG: _checksum_of_facts(facts)}
    with replacing(path) as part:
        part.mkdir(exist_ok=True)
        (part / WEIGHTS).write_bytes(weights)
        (part / HISTORY).write_bytes(table)
        (part / CONFIG).write_text(json.dumps(facts | {"sha256": checksums}, indent=1), encoding="utf-8")
        (part / README).write_text(card, encoding="utf-8")


def _check_ours(path: Path) -> None:
    """Raise unless a folder holds a model and nothing else, so that nothing of the user's can be lost."""
    try:
        ours = "sha256" in json.loads((path / CONFIG).read_text(encoding="utf-8"))
        others = sorted({entry.name for entry in path.iterdir()}.difference(FILES))
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


@checked
@verb
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
    path = newest(Path(path).expanduser())
    if not (path / CONFIG).is_file() and any(path.glob("*model*.pt")):
        raise FileNotFoundError(
            f"{path} has no {CONFIG}: it is a model folder of scvi-tools. Open it with av.io.from_scvi_tools('{path}')."
        )
    for name in (CONFIG, WEIGHTS, HISTORY):
        if not (path / name).is_file():
            hint = " Open it as data, then av.get.model(data)." if path.suffix in ENDINGS else ""
            raise FileNotFoundError(f"{path} has no {name}: it is no model folder of anvi.{hint}")
    with reading(path / CONFIG):
        facts = parse_json((path / CONFIG).read_bytes())
        checksums = facts.pop("sha256", {}) if isinstance(facts, dict) else None
        if not isinstance(checksums, dict) or not isinstance(facts.get("schema", 0), int):
            raise ValueError("it does not hold what it should")
    if facts.get("schema", 0) > SCHEMA:
        raise ValueError(
            f"{path} was written by a newer anvi (schema {facts['schema']}, this one reads up to {SCHEMA})."
        )
    with reading(path):
        weights, table = (path / WEIGHTS).read_bytes(), (path / HISTORY).read_bytes()
    found = {WEIGHTS: _checksum(weights), HISTORY: _checksum(table), CONFIG: _checksum_of_facts(facts)}
    for name, checksum in found.items():
        if checksums.get(name) != checksum:
            raise ValueError(f"{path / name} is truncated or was edited: its checksum is not the one in {CONFIG}.")
    with reading(path / HISTORY):
        history = pd.read_csv(io.BytesIO(table))
    with reading(path / WEIGHTS):
        unsealed(weights)
        tensors = load(weights)
    with reading(path):
        model = Model.from_parts(facts, tensors, history)
    return model.on(choose_device(device))


@checked
def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    data: Data | None = None,
    private: bool = False,
    message: str = "Upload model",
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a model folder to a repository of the Hugging Face hub; it is made if it is not there.

    Parameters
    ----------
    path
        A folder that :func:`write_model` made; its `README.md` becomes the page of the model.
    repo_id
        "owner/name".
    data
        MuData or AnnData to upload beside it, e.g. after `tl.minify`. Everything in it becomes readable for all who can
        read the repository.
    private
        Whether a repository that is made now is private.
    message
        Message of the commit.
    token
        Access token; None: the one that `hf auth login` has stored.
    endpoint
        Another hub; None: huggingface.co, or `$HF_ENDPOINT`.

    Returns
    -------
    Address of the commit. One commit has the four files of the folder and, with `data`, `data.h5mu` or `data.h5ad`.
    Other files of the folder stay here, other files of the repository stay there, but for data of the other kind,
    which these replace.

    Raises
    ------
    FileNotFoundError, ValueError
        Before anything is sent: if the folder holds no model, or one that is damaged; if one of its files is a link
        that leaves it, or the data are read from a file that points into others.
    ImportError
        If huggingface_hub is not installed.

    Examples
    --------
    >>> import anvi as av
    >>> small = av.tl.minify(mdata, copy=True)  # doctest: +SKIP
    >>> av.write_model(small, "model")  # doctest: +SKIP
    >>> av.io.push_to_hub("model", "me/my-model", data=small)  # doctest: +SKIP
    """
    api = _api(token, endpoint)
    if data is not None:
        check_type(data)
    path = Path(path).expanduser()
    read_model(path, device="cpu")
    _check_sources(path, data)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as staging:
        for name in FILES:
            if (path / name).is_file():
                (Path(staging) / name).write_bytes((path / name).read_bytes())
        if isinstance(data, MuData):
            data.write_h5mu(Path(staging) / DATA[0])
        elif isinstance(data, AnnData):
            data.write_h5ad(Path(staging) / DATA[1])
        for name in DATA:
            if (Path(staging) / name).is_file():
                check_hdf5(Path(staging) / name)
        stale = None if data is None else [name for name in DATA if not (Path(staging) / name).is_file()]
        commit = api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message=message, delete_patterns=stale)
    logger.info(f"{repo_id}: uploaded, {commit.commit_url}")
    return str(commit.commit_url)


@checked
def from_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    device: str = "auto",
) -> Model:
    """Fetch a model that :func:`push_to_hub` has uploaded; nothing in the repository is executed.

    Parameters
    ----------
    repo_id
        "owner/name".
    revision
        Branch, tag or commit; None: the newest. A commit cannot change under you.
    cache_dir
        Where files are kept; None: the cache of huggingface_hub.
    token, endpoint
        As in :func:`push_to_hub`.
    device
        Where the network goes: "auto" or a torch device.

    Returns
    -------
    :class:`~anvi.Model`, to be passed as `model=` to every verb and as the reference of `tl.map_query`.

    Raises
    ------
    FileNotFoundError
        If there is no model of anvi in the repository.
    ValueError
        If a file is damaged.
    ImportError
        If huggingface_hub is not installed.

    Examples
    --------
    >>> import anvi as av
    >>> model = av.io.from_hub("me/my-model")  # doctest: +SKIP
    >>> av.tl.predict(mdata, model=model)  # doctest: +SKIP
    """
    return read_fetched(fetch(repo_id, FILES, revision, cache_dir, token, endpoint), repo_id, device)


@checked
def data_from_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Data:
    """Fetch the data that lie beside a model.

    Parameters
    ----------
    repo_id, revision, cache_dir, token, endpoint
        As in :func:`from_hub`.

    Returns
    -------
    MuData or AnnData. If it was minified, it answers all that `tl.minify` lists, without a count.

    Raises
    ------
    FileNotFoundError
        If there are no data in the repository.
    ValueError
        If they cannot be read, or the file points into other files: HDF5 can, and would read yours.
    ImportError
        If huggingface_hub is not installed.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.io.data_from_hub("me/my-model")  # doctest: +SKIP
    >>> av.tl.denoise(mdata)  # doctest: +SKIP
    """
    folder = fetch(repo_id, DATA, revision, cache_dir, token, endpoint)
    for name in DATA:
        if (folder / name).is_file():
            return read_data(folder / name)
    raise FileNotFoundError(f"The repository '{repo_id}' holds neither {DATA[0]} nor {DATA[1]}.")


def read_data(path: Path) -> Data:
    """A MuData or an AnnData from a file of a stranger."""
    import anndata
    import mudata

    check_hdf5(path)
    with reading(path):
        return mudata.read_h5mu(path) if path.suffix == ".h5mu" else anndata.read_h5ad(path)


def _check_sources(path: Path, data: Data | None) -> None:
    """Raise a ValueError if what is to be sent lies elsewhere than it seems."""
    for name in FILES:
        if (path / name).is_symlink() and path.resolve() not in (path / name).resolve().parents:
            raise ValueError(f"{path / name} is a link that leaves the folder; put the file itself there to send it.")
    for part in [] if data is None else [data, *getattr(data, "mod", {}).values()]:
        if part.isbacked and part.filename is not None:
            check_hdf5(Path(part.filename))


def _api(token: str | None, endpoint: str | None) -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("This needs huggingface_hub: python -m pip install 'anvi[hub]'") from error
    return HfApi(endpoint=endpoint, token=token, library_name="anvi")


def fetch(
    repo_id: str,
    names: tuple[str, ...],
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """A folder with those of the named files that the repository has."""
    api = _api(token, endpoint)
    return Path(api.snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(names)))


def read_fetched(folder: Path, repo_id: str, device: str) -> Model:
    """The model in a folder that :func:`fetch` gave."""
    try:
        return read_model(folder, device=device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The repository '{repo_id}' holds no model of anvi: {error}") from error
