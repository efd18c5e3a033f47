"""What figures read: fits found in `uns` by their stored form, without the network, and their slots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from anvi._data import containers, slots
from anvi._data.containers import Data
from anvi._data.setup import label_column

FIT_COMMAND = "av.tl.totalanvi(mdata)"
"""Named where nothing was fitted yet."""


@dataclass(frozen=True)
class Fit:
    """One fit as it lies in an object: names and numbers only.

    Parameters
    ----------
    data
        The object that was asked about.
    home
        The part of it that holds the slots: `data` itself, or a modality.
    key
        Prefix of the slots.
    setup
        How data were read for the fit; empty where only predictions were written, by a model from elsewhere.
    """

    data: Data
    home: Data
    key: str
    setup: dict = field(default_factory=dict)

    @property
    def mods(self) -> tuple[str, ...]:
        """Modalities whose obs may hold a column, after the global one."""
        if "rna_mod" in self.setup:
            return self.setup["rna_mod"], self.setup["prot_mod"]
        return tuple(self.data.mod) if isinstance(self.data, MuData) else ()

    @property
    def joint(self) -> bool:
        """Whether the fit reads proteins."""
        return bool(self.setup.get("proteins"))

    @property
    def classes(self) -> list[str]:
        """Exact class names, in the order of the model."""
        if self.setup.get("classes"):
            return list(map(str, self.setup["classes"]))
        return list(map(str, self.prediction().cat.categories))

    @property
    def where(self) -> str:
        """The name of `home` in messages."""
        return part_name(self.data, self.home)

    def prediction(self) -> pd.Series:
        """Predicted classes, as text categories."""
        column = self._predicted(slots.prediction(self.key))
        return column.astype("category").cat.rename_categories(str)

    def confidence(self) -> np.ndarray:
        """Probability of the predicted class, NaN outside the model."""
        return self._predicted(slots.confidence(self.key)).to_numpy(dtype=float)

    def split(self) -> pd.Series:
        """Which cells the model was trained on, as text."""
        return self._obs(slots.split(self.key), "a fit writes it: run " + FIT_COMMAND).astype(object)

    def labels(self, labels_key: str) -> pd.Series:
        """Labels as text for the cells of `home`, NaN where a cell has none."""
        unlabelled = self.setup.get("unlabeled_category", "Unknown")
        return label_column(self.data, labels_key, unlabelled, self.mods).reindex(self.home.obs_names)

    def stored(self, name: str):
        """One entry of `uns[key]`."""
        entries = self.home.uns.get(self.key, {})
        if name not in entries:
            raise missing(f"{self.where}.uns['{self.key}']['{name}']", f"a fit writes it: run {FIT_COMMAND}")
        return entries[name]

    def _predicted(self, slot: str) -> pd.Series:
        if self.setup and not self.setup.get("classes"):
            raise missing(
                f"{self.where}.obs['{slot}']",
                f"'{self.key}' was fitted without labels; run {FIT_COMMAND} or av.tl.scanvi(data)",
            )
        return self._obs(slot, f"run av.tl.predict(data, model='{self.key}')")

    def _obs(self, slot: str, command: str) -> pd.Series:
        if slot not in self.home.obs:
            raise missing(f"{self.where}.obs['{slot}']", command)
        return self.home.obs[slot]


def missing(slot: str, command: str) -> KeyError:
    """The error for a slot that is not there."""
    return KeyError(f"There is no {slot}; {command} first.")


def parts(data: Data) -> list[Data]:
    """The object and its modalities."""
    return [data, *data.mod.values()] if isinstance(data, MuData) else [data]


def part_name(data: Data, part: Data) -> str:
    """How a user would write a part of the object."""
    if isinstance(data, AnnData):
        return "adata"
    return next((f"mdata['{mod}']" for mod, modality in data.mod.items() if modality is part), "mdata")


def fitted(data: Data) -> dict[str, Fit]:
    """The fits of an object by key.

    Raises
    ------
    ValueError
        If what a fit stored of itself cannot be read.
    """
    found: dict[str, Fit] = {}
    for part in parts(data):
        for key, value in part.uns.items():
            stored = value.get("model") if isinstance(value, Mapping) else None
            if not isinstance(stored, Mapping) or "config" not in stored or key in found:
                continue
            try:
                setup = json.loads(str(stored["config"]))["setup"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if "weights" not in stored:  # a dict of somebody else
                    continue
                raise ValueError(f"The model stored in uns['{key}'] is damaged: {error}. Fit again.") from error
            found[key] = Fit(data, part, key, setup)
    return found


def predicted(data: Data) -> dict[str, Fit]:
    """Predictions in an object without the model that made them: `tl.predict` with a model from elsewhere."""
    found: dict[str, Fit] = {}
    ending = slots.prediction("")
    for part in parts(data):
        for column in map(str, part.obs.columns):
            key = column.removesuffix(ending)
            # a mirrored column ("rna:...") is a copy of one in the modality, which comes with its uns
            if key != column and ":" not in key and slots.confidence(key) in part.obs:
                found.setdefault(key, Fit(data, part, key))
    return found


def resolve(data: Data, model: str | None, *, predictions: bool = False, joint: bool = False) -> Fit:
    """The fit that `model=` means.

    Parameters
    ----------
    data
        The object.
    model
        A key; None for the only fit there.
    predictions
        Also take predictions of a model from elsewhere.
    joint
        Count only fits that read proteins.

    Raises
    ------
    KeyError
        If there is none; the message names the next command.
    ValueError
        If there are several and none is named.
    """
    containers.check_type(data)
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model= takes the key of a fit in the object, a str; got {type(model).__name__}.")
    there = fitted(data)
    others = predicted(data) if predictions else {}
    if model is not None:
        if model in there or model in others:
            return there.get(model) or others[model]
        listed = ", ".join(map(repr, there)) or "none"
        raise KeyError(f"model='{model}' is no fitted model of this object; there are: {listed}.")
    if joint:
        there = {key: fit for key, fit in there.items() if fit.joint}
    there = there or others
    if not there:
        kind = "model with proteins" if joint else "fitted model"
        raise KeyError(f"There is no {kind} in this object; run {FIT_COMMAND} first.")
    if len(there) > 1:
        raise ValueError(f"There are several fitted models: {', '.join(map(repr, there))}. Name one: model=...")
    return next(iter(there.values()))


def find_basis(data: Data, basis: str, first: Data | None = None) -> tuple[Data, str] | None:
    """Where coordinates lie: the part of the object and the name in its obsm; None if nowhere.

    Parameters
    ----------
    data
        The object.
    basis
        `"umap"` means `X_umap`, then `umap`; `"rna:umap"` only that of the modality.
    first
        A part that is looked through before the others.

    Raises
    ------
    ValueError
        If only modalities have it, and several of them.
    """
    mod, colon, rest = basis.partition(":")
    named = bool(colon) and isinstance(data, MuData) and mod in data.mod
    stem = (rest if named else basis).removeprefix("X_")
    places = [data.mod[mod]] if named else parts(data)
    reserved = set() if isinstance(data, AnnData) else set(data.mod)  # mdata.obsm["rna"] says who is in it
    found = []
    for part in places:
        names = [name for name in (f"X_{stem}", stem) if name in part.obsm]
        names = [name for name in names if part is not data or name not in reserved]
        if names:
            found.append((part, names[0]))
    for part, name in found:
        if part is first or (first is None and part is data):
            return part, name
    if len(found) > 1 and found[0][0] is not data:
        listed = ", ".join(f"'{label(data, part)}:{stem}'" for part, _ in found)
        raise ValueError(f"basis='{basis}' is in several modalities; name one: {listed}.")
    return found[0] if found else None


def no_basis(basis: str) -> KeyError:
    """The error for coordinates that are nowhere."""
    stem = basis.rpartition(":")[2].removeprefix("X_")
    command = "run sc.pp.neighbors(data, use_rep='X_...') and sc.tl.umap(data)" if stem == "umap" else "compute it"
    return missing(f"obsm['X_{stem}'] or obsm['{stem}']", command)


def label(data: MuData, part: AnnData) -> str:
    """The name of a modality."""
    return next(mod for mod, modality in data.mod.items() if modality is part)


def coordinates(part: Data, slot: str) -> pd.DataFrame:
    """An embedding by cell names."""
    return pd.DataFrame(np.asarray(part.obsm[slot], dtype=float), index=part.obs_names)


def colored_column(data: Data, key: str, mods: tuple[str, ...] = ()) -> list[tuple[Data, str]]:
    """Parts that may hold an obs column or its colours, and its name there; the most explicit first."""
    mod, colon, rest = key.partition(":")
    explicit = []
    if colon and isinstance(data, MuData) and mod in data.mod:
        explicit = [(data.mod[mod], rest)]
    others = [data.mod[name] for name in mods if name in data.mod] if isinstance(data, MuData) else []
    return [*explicit, (data, key), *((part, key) for part in others)]


def stored_colors(data: Data, key: str, mods: tuple[str, ...] = ()) -> dict[str, str]:
    """Colours that `uns['{key}_colors']` gives to the values of an obs column; empty where it gives none."""
    places = colored_column(data, key, mods)
    columns = [part.obs[name] for part, name in places if name in part.obs]
    colors = [part.uns[f"{name}_colors"] for part, name in places if f"{name}_colors" in part.uns]
    if not columns or not colors or not isinstance(columns[0].dtype, pd.CategoricalDtype):
        return {}
    categories = list(map(str, columns[0].cat.categories))
    values = list(map(str, np.atleast_1d(colors[0])))
    return dict(zip(categories, values, strict=False)) if len(values) >= len(categories) else {}
