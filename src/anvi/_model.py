"""A fitted model: how data are read, the network and how it came to be. Holds no data; knows how to be written."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

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
    def key(self) -> str:
        """Prefix of its slots in the object that it was fitted to."""
        return str(self.info.get("key", self.name))

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

    def facts(self) -> dict:
        """Everything but weights and history, as a dict that JSON can hold."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "setup": self.setup.to_dict(),
            "config": self.config.to_dict(),
            "info": self.info,
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the network, on the CPU."""
        return {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}

    @classmethod
    def from_parts(cls, facts: dict, weights: dict[str, torch.Tensor], history: pd.DataFrame) -> "Model":
        """Back from :meth:`facts` and :meth:`weights`.

        Raises
        ------
        ValueError
            If something is missing or does not fit together, or was made by a newer anvi.
        """
        try:
            if facts["schema"] > SCHEMA:
                raise ValueError(
                    f"The model was stored by a newer anvi (schema {facts['schema']}, this one reads up to {SCHEMA})."
                )
            config, setup = Config.from_dict(facts["config"]), Setup.from_dict(facts["setup"])
            _check_sizes(config, setup)
            network = VAE(config)
            network.load_state_dict(weights)
            return cls(facts["name"], setup, network.eval(), history, facts["info"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"The stored model is damaged ({type(error).__name__}: {error}). Fit again.") from error
        except RuntimeError as error:
            raise ValueError(f"The stored weights do not fit the stored configuration: {str(error)[:300]}") from error

    def to_slot(self) -> dict:
        """The form in which it lies in `uns[key]["model"]`: a JSON string and safetensors bytes."""
        return {
            "config": json.dumps(self.facts()),
            "weights": np.frombuffer(save(self.weights()), dtype=np.uint8).copy(),
            "format": "anvi safetensors",
        }

    @classmethod
    def from_slot(cls, slot: dict, history: pd.DataFrame) -> "Model":
        """Back from :meth:`to_slot`; raises a ValueError if the stored form is damaged."""
        try:
            facts = json.loads(str(slot["config"]))
            weights = load(np.asarray(slot["weights"], dtype=np.uint8).tobytes())
        except (KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"The stored model is damaged ({type(error).__name__}: {error}). Fit again.") from error
        return cls.from_parts(facts, weights, history)

    def on(self, device: torch.device) -> "Model":
        """The model with its network moved to a device."""
        self.network.to(device)
        return self


def _check_sizes(config: Config, setup: Setup) -> None:
    """Raise a ValueError unless the names in the setup are as many as the network has places for."""
    pairs = {
        "genes": (config.n_genes, len(setup.genes)),
        "proteins": (config.n_proteins, len(setup.proteins)),
        "classes": (config.n_labels, len(setup.classes)),
        "batches": (config.n_batches, len(setup.batches)),
    }
    for name, (places, names) in pairs.items():
        if places != names:
            raise ValueError(
                f"The stored model is damaged: its network has {places} {name}, its setup {names}. Fit again."
            )
