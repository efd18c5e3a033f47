"""A fitted model: how data are read, the network and how it came to be. Holds no data; knows how to be written."""

import copy
import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor

from . import _files
from ._data.setup import Setup
from .nn import PRESETS, VAE, Config

SCHEMA = 5
"""Version of the stored form; raised when an older anvi could not read it."""
SEALED = "anvi safetensors, sealed"
"""Format of the slot whose weights have a checksum; before, it was "anvi safetensors"."""
LANDMARKS, NEIGHBORS, IMPUTATION = "landmarks", "neighbors", "imputation"
"""Prefixes of the landmarks, of labelled cells, and of what proteins are imputed by, among the stored tensors."""


class NewerSchema(ValueError):
    """The model was stored by a newer anvi."""


class Landmarks(NamedTuple):
    """Where the labelled cells of every class lie, and what held-out labelled cells say of new ones.

    Kinds are cells with proteins, cells without, and cells without RNA where the model does without; cells without
    proteins alone where the model has none. A model of schema 1 has single cells in place of centres: they are kept, so
    that it stays the same model, but no longer tell what is far.
    """

    quantiles: Tensor  # (kinds, 101) of the strangeness of held-out labelled cells, from 0 to 1
    own: Tensor | None = None  # (kinds, classes, cells) what these give their own class, ascending; then NaN
    centre: Tensor | None = None  # (kinds, classes with training cells, latent) mean of a class
    whiten: Tensor | None = None  # (kinds, latent, latent) times this, cells scatter by 1 in every direction
    latent: Tensor | None = None  # (kinds, landmarks, latent) of schema 1
    sure: Tensor | None = None  # (kinds, levels, cells) highest probability of held-out cells, negative where wrong
    above_centre: Tensor | None = None  # (kinds, coarser levels, classes, latent) as `centre`, of groups of classes
    above_whiten: Tensor | None = None  # (kinds, coarser levels, latent, latent) as `whiten`
    above_quantiles: Tensor | None = None  # (kinds, coarser levels, 101) as `quantiles`


class Neighbors(NamedTuple):
    """Labelled training cells, whose labels have a say in those of their neighbours; none in models of schema 3."""

    latent: Tensor  # (cells, latent) posterior means, before the softmax of a logistic-normal one
    label: Tensor  # (cells,) class codes
    weight: Tensor  # (cells,) how many training cells each one stands for


class Imputation(NamedTuple):
    """What proteins that a batch did not measure are imputed by; models of schema 2 and before have none."""

    genes: Tensor  # (some genes,) positions among the model's
    center: Tensor  # (batches, some genes) means of log-normalised genes
    scale: Tensor  # (batches, some genes) their standard deviations
    loading: Tensor  # (some genes, components)
    latent: Tensor  # (landmarks, latent) measured cells, encoded without their proteins
    components: Tensor  # (landmarks, components)
    y: Tensor  # (landmarks, proteins) log1p counts less `offset`, NaN where not measured
    batch: Tensor  # (landmarks,) codes
    slope: Tensor  # (components, proteins)
    intercept: Tensor  # (proteins,)
    residuals: Tensor  # (proteins, 101) quantiles of held-out cells' errors, in units of the neighbours' scatter
    measured: Tensor  # (batches, proteins) bool: in any cell of the batch
    offset: Tensor | None = None  # (batches, proteins) what log counts of a batch lie above all; `y` is without it
    between: Tensor | None = None  # (proteins,) how far log counts of a new batch may be off, a standard deviation
    apart: Tensor | None = None  # (batches, proteins) share of that where batches are known that are like this one


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
    landmarks, imputation, neighbors
        What novelty, imputed proteins and labels rest on beside the network: tensors of a few thousand cells.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> model = av.get.model(mdata)
    >>> model.classes
    ('B', 'CD14 Mono', 'CD4 T', 'CD8 T', 'NK', 'pDC')
    """

    name: str
    setup: Setup
    network: VAE
    history: pd.DataFrame
    info: dict
    landmarks: Landmarks | None = None
    imputation: Imputation | None = None
    neighbors: Neighbors | None = None

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

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the network, landmarks, labelled cells and what imputes proteins, on the CPU."""
        tensors = self.network.state_dict()
        parts = {LANDMARKS: self.landmarks, NEIGHBORS: self.neighbors, IMPUTATION: self.imputation}
        for prefix, part in parts.items():
            stored = {} if part is None else part._asdict()
            tensors |= {f"{prefix}.{name}": value for name, value in stored.items() if value is not None}
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def fingerprint(self) -> str:
        """What its weights are told by, wherever the model is stored."""
        digest = hashlib.sha256()
        for name, value in sorted(self.weights().items()):
            digest.update(name.encode())
            digest.update(value.numpy())
        return digest.hexdigest()

    @classmethod
    def from_parts(cls, facts: dict, weights: dict[str, Tensor], history: pd.DataFrame) -> "Model":
        """Back from :meth:`facts` and :meth:`weights`.

        Raises
        ------
        ValueError
            If something is missing or does not fit together, or was made by a newer anvi.
        """
        try:
            _check_schema(facts)
            if facts["name"] not in PRESETS or not isinstance(facts["info"], dict):
                raise TypeError("its name is no model's, or its facts are none")
            config, setup = Config.from_dict(facts["config"]), Setup.from_dict(facts["setup"])
            _check_sizes(config, setup)
            _check_info(facts["info"])
            _check_history(history)
            own, marks, labelled, imputing = _parted(weights, LANDMARKS, NEIGHBORS, IMPUTATION)
            check_numbers(own | {f"{LANDMARKS}.{name}": value for name, value in marks.items()})
            with torch.device("meta"):  # sizes only: what does not fit the weights takes no memory
                network = VAE(config)
            network.load_state_dict(own, assign=True)
            landmarks = Landmarks(**marks) if marks else None
            if landmarks is not None:
                _check_landmarks(landmarks, config, len(setup.levels.names))
            imputation = Imputation(**imputing) if imputing else None
            if imputation is not None:
                _check_imputation(imputation, config)
            neighbors = Neighbors(**labelled) if labelled else None
            if neighbors is not None:
                _check_neighbors(neighbors, facts["info"], config)
            return cls(facts["name"], setup, network.eval(), history, facts["info"], landmarks, imputation, neighbors)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"The stored model is damaged ({type(error).__name__}: {error}). Fit again.") from error
        except RuntimeError as error:
            raise ValueError(f"The stored weights do not fit the stored configuration: {str(error)[:300]}") from error

    def to_slot(self) -> dict:
        """The form in which it lies in `uns[key]["model"]`: a JSON string and safetensors bytes."""
        config = json.dumps(self.facts())
        weights = _files.sealed(save(self.weights()), config)  # the checksum is over both
        return {"config": config, "weights": np.frombuffer(weights, dtype=np.uint8).copy(), "format": SEALED}

    @classmethod
    def from_slot(cls, slot: dict, history: pd.DataFrame) -> "Model":
        """Back from :meth:`to_slot`; raises a ValueError if the stored form is damaged."""
        try:
            text, stored = str(slot["config"]), np.asarray(slot["weights"])
            form = str(slot.get("format"))
            if stored.dtype != np.uint8 or stored.ndim != 1 or form not in ("anvi safetensors", SEALED):
                raise TypeError(f"its weights are no bytes, or their format is not known: {form[:50]!r}")
            facts, raw = _files.parse_json(text), stored.tobytes()
            _check_schema(facts)
            _files.unsealed(raw, text, required=form == SEALED)
            weights = load(raw)
        except Exception as error:  # of JSON and safetensors: whatever they raise at bytes that make no sense
            if isinstance(error, NewerSchema):
                raise
            raise ValueError(f"The stored model is damaged ({type(error).__name__}: {error}). Fit again.") from error
        return cls.from_parts(facts, weights, history)

    def on(self, device: torch.device) -> "Model":
        """The model on a device: itself where it is there, else a copy, so that nobody's model moves."""
        if next(self.network.parameters()).device == device:
            return self
        return replace(self, network=copy.deepcopy(self.network).to(device))


def _check_sizes(config: Config, setup: Setup) -> None:
    """Raise a ValueError unless the names in the setup are as many as the network has places for."""
    for name, wanted in setup.sizes.items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"The stored model is damaged: its network has {getattr(config, name)} {name.removeprefix('n_')}, "
                f"its setup {wanted}. Fit again."
            )


def _check_schema(facts: dict) -> None:
    if facts["schema"] > SCHEMA:
        raise NewerSchema(
            f"The model was stored by a newer anvi (schema {facts['schema']}, this one reads up to {SCHEMA})."
        )


def _check_info(info: dict) -> None:
    """Raise a ValueError unless the facts that answers depend on are what they must be."""
    temperature = info.get("temperature", {})
    numbers = temperature.values() if isinstance(temperature, dict) else [None]
    if not all(type(value) in (int, float) and math.isfinite(value) and value > 0 for value in numbers):
        raise ValueError("The stored model is damaged: its temperatures are not positive numbers. Fit again.")
    if not isinstance(info.get("key", ""), str):
        raise ValueError("The stored model is damaged: its key is no text. Fit again.")


def _check_history(history: pd.DataFrame) -> None:
    """Raise a ValueError unless the history is a table of numbers."""
    table = isinstance(history, pd.DataFrame)
    numbers = table and (not len(history) or all(map(pd.api.types.is_numeric_dtype, history.dtypes)))
    if not numbers or not all(isinstance(name, str) for name in history.columns):
        raise ValueError("The stored model is damaged: its history is no table of numbers. Fit again.")


def check_numbers(weights: dict[str, Tensor]) -> None:
    """Raise a ValueError unless all tensors are float32, and finite but for the NaN behind `landmarks.own`."""
    for name, value in weights.items():
        if value.dtype != torch.float32:
            raise ValueError(f"The stored model is damaged: '{name}' is {value.dtype}, not float32. Fit again.")
        if name != f"{LANDMARKS}.own" and not bool(value.isfinite().all()):
            raise ValueError(f"The stored model is damaged: '{name}' holds NaN or infinite numbers. Fit again.")
        if name.endswith("running_var") and bool((value < 0).any()):
            raise ValueError(f"The stored model is damaged: '{name}' holds a negative variance. Fit again.")


def _parted(weights: dict[str, Tensor], *prefixes: str) -> list[dict[str, Tensor]]:
    """The network's own tensors, then those under each prefix, without it."""
    parts = [{}, *({} for _ in prefixes)]
    for name, value in weights.items():
        prefix, _, rest = name.partition(".")
        if prefix in prefixes:
            parts[1 + prefixes.index(prefix)][rest] = value
        else:
            parts[0][name] = value
    return parts


def _are_codes(part: Tensor, n: int, limit: int) -> bool:
    """Whether these are `n` whole numbers from 0 and below the limit."""
    fit = part.dtype == torch.int64 and part.shape == (n,)
    return fit and bool(((part >= 0) & (part < limit)).all())


def _check_imputation(part: Imputation, config: Config) -> None:
    """Raise a ValueError unless the tensors have the network's sizes, are finite, and point at what is there."""
    batches, proteins = config.n_batches, config.n_proteins
    genes, components, cells = len(part.genes), part.loading.shape[-1], len(part.y)
    sizes = {
        "center": (batches, genes),
        "scale": (batches, genes),
        "loading": (genes, components),
        "latent": (cells, config.n_latent),
        "components": (cells, components),
        "y": (cells, proteins),
        "slope": (components, proteins),
        "intercept": (proteins,),
        "residuals": (proteins, 101),
    }
    new = {"offset": (batches, proteins), "between": (proteins,), "apart": (batches, proteins)}  # since schema 5
    given = {name: size for name, size in new.items() if getattr(part, name) is not None}
    sizes |= given
    fit = all(_has_size(getattr(part, name), size) for name, size in sizes.items())
    fit &= part.measured.dtype == torch.bool and part.measured.shape == (batches, proteins)
    fit &= set(given) in (set(), {"offset"}, set(new))
    fit &= "apart" not in given or bool((part.between >= 0).all() and ((part.apart >= 0) & (part.apart <= 1)).all())
    fit &= _are_codes(part.genes, genes, config.n_genes) and _are_codes(part.batch, cells, batches)
    if not fit or not all(bool(getattr(part, name).isfinite().all()) for name in sizes if name != "y"):
        raise ValueError("The stored model is damaged: its imputation does not fit its network. Fit again.")


def _check_neighbors(part: Neighbors, info: dict, config: Config) -> None:
    """Raise a ValueError unless the cells have the network's sizes and classes, and it is known how many are asked."""
    n, k = len(part.label), info.get("n_neighbors")
    fit = _has_size(part.latent, (n, config.n_latent)) and _has_size(part.weight, (n,))
    fit &= isinstance(k, int) and k > 0 and k is not True and _are_codes(part.label, n, config.n_labels)
    if not fit or not bool(part.latent.isfinite().all() and part.weight.isfinite().all() and (part.weight > 0).all()):
        raise ValueError("The stored model is damaged: its labelled cells do not fit its network. Fit again.")


def _check_landmarks(landmarks: Landmarks, config: Config, n_levels: int) -> None:
    """Raise a ValueError unless the landmarks have the network's sizes and are distances."""
    kinds, latent, any_number = len(landmarks.quantiles), config.n_latent, None
    sizes = {
        "quantiles": (kinds, 101),
        "own": (kinds, config.n_labels, any_number),
        "centre": (kinds, any_number, latent),
        "whiten": (kinds, latent, latent),
        "sure": (kinds, n_levels, any_number),
        "above_centre": (kinds, n_levels - 1, config.n_labels, latent),
        "above_whiten": (kinds, n_levels - 1, latent, latent),
        "above_quantiles": (kinds, n_levels - 1, 101),
    }
    parts = {name: part for name, part in landmarks._asdict().items() if name in sizes and part is not None}
    fit = all(_has_size(part, sizes[name]) for name, part in parts.items())
    above = {name for name in parts if name.startswith("above")}
    fit &= len(above) == 3 if n_levels > 1 else not above
    fit &= kinds in ((2, 3) if config.has_protein else (1,))
    if not fit or ("centre" in parts) != ("whiten" in parts):
        raise ValueError("The stored model is damaged: its landmarks do not fit its network. Fit again.")
    own, every = parts.get("own"), [part for name, part in parts.items() if name.endswith("quantiles")]
    if any(bool((quantiles < 0).any()) or bool((quantiles.diff(dim=-1) < 0).any()) for quantiles in every):
        raise ValueError("The stored model is damaged: its landmarks are no distances. Fit again.")
    if "sure" in parts and not bool((parts["sure"].abs() <= 1).all()):
        raise ValueError("The stored model is damaged: how sure it is of held-out cells are no probabilities.")
    if own is not None:  # probabilities in ascending order, then NaN
        ordered = own.nan_to_num(2.0)
        inside = (own.isnan() | ((own >= 0) & (own <= 1))).all()
        if not bool(inside) or bool((ordered.diff(dim=2) < 0).any()):
            raise ValueError("The stored model is damaged: what held-out cells give their class are no probabilities.")


def _has_size(part: Tensor, size: tuple[int | None, ...]) -> bool:
    """Whether a tensor of float32 has these sizes, None being any above 0."""
    sizes_fit = all(n > 0 and wanted in (None, n) for n, wanted in zip(part.shape, size, strict=False))
    return part.dtype == torch.float32 and part.dim() == len(size) and sizes_fit
