"""io.write_model."""

from pathlib import Path

from anvi._data.containers import Data
from anvi._find import fitted, resolve
from anvi._folder import write_folder
from anvi._model import Model

from ._card import model_card


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
    found, key = (data, None) if isinstance(data, Model) else resolve(data, model)
    if card is None:
        lies_there = key is not None and (model is None or (isinstance(model, str) and model in fitted(data)))
        card = model_card(data, key=key) if lies_there else model_card(found)
    write_folder(found, path, card, overwrite=overwrite)
