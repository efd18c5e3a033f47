"""io.write_model."""

from pathlib import Path

from anvi._data.containers import Data
from anvi._find import resolve
from anvi._folder import write_folder
from anvi._model import Model


def write_model(
    data: Data | Model, path: str | Path, *, model: str | Model | None = None, overwrite: bool = False
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
    overwrite
        Replace a folder that holds a model.

    Returns
    -------
    None. Writes `model.safetensors` (weights), `config.json` (schema version, setup, network, facts of the fit),
    `history.csv` and `README.md`. No cell's name, label or count is in any of them.

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
    fitted = data if isinstance(data, Model) else resolve(data, model)[0]
    write_folder(fitted, path, overwrite=overwrite)
