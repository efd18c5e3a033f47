"""io.push_to_hub, io.from_hub, io.data_from_hub: models, and small data with them, on the Hugging Face hub.

What comes from a hub is a stranger's: only files with known names are fetched, and only readers that run nothing open
them (JSON, CSV, safetensors, HDF5).
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from anndata import AnnData
from mudata import MuData

from anvi._data.containers import Data, check_type
from anvi._folder import CONFIG, HISTORY, README, WEIGHTS, read_model
from anvi._model import Model

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger("anvi")

FILES = (WEIGHTS, CONFIG, HISTORY, README)
DATA = ("data.h5mu", "data.h5ad")


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
        Before anything is sent: if the folder holds no model, or one that is damaged.
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
    read_model(path, device="cpu")
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as staging:
        for name in FILES:
            if (Path(path) / name).is_file():
                (Path(staging) / name).write_bytes((Path(path) / name).read_bytes())
        if isinstance(data, MuData):
            data.write_h5mu(Path(staging) / DATA[0])
        elif isinstance(data, AnnData):
            data.write_h5ad(Path(staging) / DATA[1])
        stale = None if data is None else [name for name in DATA if not (Path(staging) / name).is_file()]
        commit = api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message=message, delete_patterns=stale)
    logger.info(f"{repo_id}: uploaded, {commit.commit_url}")
    return str(commit.commit_url)


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
    ImportError
        If huggingface_hub is not installed.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.io.data_from_hub("me/my-model")  # doctest: +SKIP
    >>> av.tl.denoise(mdata)  # doctest: +SKIP
    """
    import anndata
    import mudata

    folder = fetch(repo_id, DATA, revision, cache_dir, token, endpoint)
    if (folder / DATA[0]).is_file():
        return mudata.read_h5mu(folder / DATA[0])
    if (folder / DATA[1]).is_file():
        return anndata.read_h5ad(folder / DATA[1])
    raise FileNotFoundError(f"The repository '{repo_id}' holds neither {DATA[0]} nor {DATA[1]}.")


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
