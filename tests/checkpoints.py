"""The saved models of scvi-tools: their cells, what they hold, and changed copies of them."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData

from anvi.io._model_pt import read_model_pt

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
NAMES = ("scvi", "scanvi", "totalvi_anndata", "totalvi", "totalanvi")


def data_of(name: str) -> AnnData | MuData:
    """The cells that a checkpoint was fitted to, as its expected.npz holds them (codes in order of the categories)."""
    with np.load(CHECKPOINTS / name / "expected.npz") as file:
        given = dict(file)
    cells = [f"cell{i}" for i in range(len(given["x"]))]
    obs = pd.DataFrame(index=cells)
    obs["batch"] = [f"batch{code}" for code in given["batch"]]
    obs["sex"] = [("female", "male")[code] for code in given["categorical"][:, 0]]
    obs["donor"] = [f"donor{code}" for code in given["categorical"][:, 1]]
    obs["age"], obs["depth"] = given["continuous"].T.astype(float)
    adata = AnnData(given["x"], obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(given["x"].shape[1])]))
    proteins = [f"protein{i}" for i in range(given["y"].shape[1])]
    if name == "totalvi_anndata":
        adata.obsm["adt"] = pd.DataFrame(given["y"], index=cells, columns=proteins)
    if name not in ("totalvi", "totalanvi"):
        return adata
    protein = AnnData(given["y"], obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=proteins))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mudata says of columns that it pulls up
        return MuData({"rna": adata, "protein": protein})


def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(CHECKPOINTS / name / "expected.npz") as file:
        return dict(file)


def content_of(name: str) -> dict:
    """What a checkpoint holds, to be changed and saved again; without the history, which is not kept."""
    content = read_model_pt(CHECKPOINTS / name / "model.pt")
    del content["attr_dict"]["history_"]
    content["model_state_dict"] = {
        key: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        for key, value in content["model_state_dict"].items()
    }
    return content


def saved(content: object, folder: Path, **options) -> Path:
    """A model.pt as scvi-tools saves it."""
    torch.save(content, folder / "model.pt", **options)
    return folder / "model.pt"


def registry(content: dict) -> dict:
    return content["attr_dict"]["registry_"]


def state(content: dict, field: str) -> dict:
    return registry(content)["field_registries"][field]["state_registry"]
