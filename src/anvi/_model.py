"""A fitted model: how data are read, the network and how it came to be. Holds no data; knows how to be written."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from safetensors import SafetensorError
from safetensors.torch import load, save

from ._data.containers import Data
from ._data.setup import Setup
from .nn import VAE, Config

SCHEMA = 1
"""Version of the stored form; raised when an older anvi could not read it."""


@dataclass(frozen=True, eq=False)
class Model:
    """A fitted model without data.

    Parameters
    ----------
    name
        "scvi", "scanvi", "totalvi" or "totalanvi".
    setup
        How to read a data set for it.
    network
        The trained network, in eval mode.
    history
        One row per epoch.
    info
        Facts of the fit: options, seed, versions, number of cells.
    """

    name: str
    setup: Setup
    network: VAE
    history: pd.DataFrame
    info: dict

    @property
    def config(self) -> Config:
        """The network's configuration."""
        return self.network.config

    @property
    def classes(self) -> tuple[str, ...]:
        """Exact class names, in the order of the probabilities."""
        return self.setup.classes

    def __repr__(self) -> str:
        config = self.config
        parts = [f"{config.n_genes} genes"]
        if config.has_protein:
            parts.append(f"{config.n_proteins} proteins")
        if config.has_labels:
            parts.append(f"{config.n_labels} classes")
        size = sum(parameter.numel() for parameter in self.network.parameters())
        return f"Model {self.name}: {', '.join(parts)}, {config.n_latent} latent dimensions, {size:,} parameters"

    def to_slot(self) -> dict:
        """The form in which it lies in `uns[key]["model"]`: a JSON string and safetensors bytes."""
        config = {
            "schema": SCHEMA,
            "name": self.name,
            "setup": self.setup.to_dict(),
            "config": self.config.to_dict(),
            "info": self.info,
        }
        weights = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        return {
            "config": json.dumps(config),
            "weights": np.frombuffer(save(weights), dtype=np.uint8).copy(),
            "format": "anvi safetensors",
        }

    @classmethod
    def from_slot(cls, slot: dict, history: pd.DataFrame) -> "Model":
        """Back from :meth:`to_slot`.

        Raises
        ------
        ValueError
            If the stored form is damaged, or was made by a newer anvi.
        """
        try:
            stored = json.loads(str(slot["config"]))
            weights = load(np.asarray(slot["weights"], dtype=np.uint8).tobytes())
            if stored["schema"] > SCHEMA:
                raise ValueError(
                    f"The model was stored by a newer anvi (schema {stored['schema']}, this one reads up to {SCHEMA})."
                )
            network = VAE(Config.from_dict(stored["config"]))
            network.load_state_dict(weights)
            return cls(stored["name"], Setup.from_dict(stored["setup"]), network.eval(), history, stored["info"])
        except (KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"The stored model is damaged ({type(error).__name__}: {error}). Fit again.") from error
        except RuntimeError as error:
            raise ValueError(f"The stored weights do not fit the stored configuration: {str(error)[:300]}") from error

    def on(self, device: torch.device) -> "Model":
        """The model with its network moved to a device."""
        self.network.to(device)
        return self


def fitted(data: Data) -> dict[str, Data]:
    """Keys of the fitted models in an object, and the part of it whose `uns` holds each."""
    homes = [data, *data.mod.values()] if isinstance(data, MuData) else [data]
    found: dict[str, Data] = {}
    for home in homes:
        for key, value in home.uns.items():
            if isinstance(value, dict) and isinstance(value.get("model"), dict) and "weights" in value["model"]:
                found.setdefault(key, home)
    return found


def resolve(data: Data, model: "str | Path | Model | None", argument: str = "model") -> tuple[Model, str]:
    """The model that an argument means, and the key of its slots.

    Parameters
    ----------
    data
        Object in which a key is looked up.
    model
        None: the only fitted model in `data`; a key; or a :class:`Model`.
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
        return model, model.name
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
    if model not in there:
        raise KeyError(f"{argument}='{model}' is no fitted model of this object; there are: {listed or 'none'}.")
    stored = there[model].uns[model]
    return Model.from_slot(stored["model"], stored.get("history", pd.DataFrame())), str(model)
