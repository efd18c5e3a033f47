"""The fits that lie in an object: found in `uns` by their stored form, without torch, for plots and guards of slots."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from . import slots
from .containers import Data, Source, as_name, cell_names, listed
from .labels import Levels, Tree, label_column, labels_at, unknown_in_tree
from .setup import Setup

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
        return tuple(Source(self.data).mods)

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
    def levels(self) -> Levels:
        """What the classes are called at each level."""
        stored = tuple((name, tuple(names)) for name, names in self.setup.get("label_levels", ()))
        return Levels.of(stored, self.classes, self.setup.get("labels_key"))

    def groups(self, level: str | None = None) -> list[str]:
        """Names at a level; None: the classes."""
        return self.classes if level is None else list(self.levels.groups(self.levels.position(level)))

    @property
    def where(self) -> str:
        """The name of `home` in messages."""
        source = Source(self.data)
        names = (source.name(mod) for mod, part in source.mods.items() if part is self.home)
        return "adata" if source.alone else next(names, "mdata")

    def prediction(self, level: str | None = None) -> pd.Series:
        """Predicted classes, or groups at a coarser level, as text categories."""
        ending = "" if level is None else self.levels.ending(self.levels.position(level))
        column = self._predicted(f"{slots.prediction(self.key)}{ending}")
        return column.astype("category").cat.rename_categories(str)

    def confidence(self) -> np.ndarray:
        """Probability of the predicted class, NaN outside the model."""
        return self._predicted(slots.confidence(self.key)).to_numpy(dtype=float)

    def split(self) -> pd.Series:
        """Which cells the model was trained on, as text."""
        return self._obs(slots.split(self.key), "a fit writes it: run " + FIT_COMMAND).astype(object)

    def labels(self, labels_key: str, level: str | None = None) -> pd.Series:
        """Labels as text for the cells of `home`, NaN where a cell has none, at a level where there are several."""
        if self.setup.get("label_levels"):
            return labels_at(self.data, Setup.from_dict(self.setup), self.home.obs_names, labels_key, level)
        unlabelled = self.setup.get("unlabeled_category", "Unknown")
        return label_column(self.data, labels_key, unlabelled, self.mods).reindex(self.home.obs_names)

    def own_labels(self, level: str | None = None) -> pd.Series | None:
        """The labels of the fit; None where it had none, or their column is not in the object."""
        key = self.setup.get("labels_key")
        try:
            return None if key is None else self.labels(key, level)
        except KeyError:
            return None

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
        return self._obs(slot, self.asking("predict"))

    def asking(self, verb: str) -> str:
        """How to get the answer of a verb under this key."""
        return asking(self.data, verb, self.key)

    def _obs(self, slot: str, command: str) -> pd.Series:
        if slot not in self.home.obs:
            raise missing(f"{self.where}.obs['{slot}']", command)
        return self.home.obs[slot]


def missing(slot: str, command: str) -> KeyError:
    """The error for a slot that is not there."""
    return KeyError(f"There is no {slot}; {command} first.")


def asking(data: Data, verb: str, key: str) -> str:
    """How to get the answer of a verb under a key: that of a fit, or another one of a fit here or from elsewhere."""
    there = stored_fits(data, whole=True)
    how = f"model='{key}'" if key in there else f"key_added='{key}'"
    return f"run av.tl.{verb}(data, {'' if key in there or len(there) == 1 else 'model=..., '}{how})"


def stored_fits(data: Source | Data, *, whole: bool = False) -> dict[str, Fit]:
    """The fits of an object by key: entries of `uns` with a stored model, of which at least the facts are there.

    Parameters
    ----------
    data
        The object.
    whole
        Only those whose weights are there, too, so that verbs can ask them; their facts are not looked at.

    Raises
    ------
    ValueError
        If what a fit stored of itself cannot be read.
    """
    source = Source.of(data)
    found: dict[str, Fit] = {}
    for part in source.parts:
        for key, value in part.uns.items():
            stored = value.get("model") if isinstance(value, Mapping) else None
            if not isinstance(stored, Mapping) or ("weights" if whole else "config") not in stored or key in found:
                continue
            try:
                setup: dict = {} if whole else json.loads(str(stored["config"]))["setup"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if "weights" not in stored:  # a dict of somebody else
                    continue
                raise ValueError(f"The model stored in uns['{key}'] is damaged: {error}. Fit again.") from error
            found[key] = Fit(source.data, part, key, setup)
    return found


def stored_predictions(data: Data) -> dict[str, Fit]:
    """Predictions in an object without the model that made them: `tl.predict` with a model from elsewhere."""
    found: dict[str, Fit] = {}
    ending = slots.prediction("")
    for part in Source(data).parts:
        for column in map(str, part.obs.columns):
            key = column.removesuffix(ending)
            # a mirrored column ("rna:...") is a copy of one in the modality, which comes with its uns
            if key != column and ":" not in key and slots.confidence(key) in part.obs:
                found.setdefault(key, Fit(data, part, key))
    return found


def resolve_fit(data: Data, model: str | None, *, predictions: bool = False, joint: bool = False) -> Fit:
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
    there = stored_fits(data)
    others = stored_predictions(data) if predictions else {}
    if model is None and joint:
        there = {key: fit for key, fit in there.items() if fit.joint}
        if not there:
            raise KeyError(f"There is no model with proteins in this object; run {FIT_COMMAND} first.")
    found = (there or others) if model is None else others | there
    return found[meant(found, model, "fitted model", f"run {FIT_COMMAND} first")]


def meant(there: Mapping[str, object], wanted, what: str, command: str, argument: str = "model", nor: str = "") -> str:
    """The key that an argument means among those of an object: the one that it names, or the only one."""
    listed = ", ".join(map(repr, there))
    if wanted is None and not there:
        raise KeyError(f"There is no {what} in this object; {command}.")
    if wanted is None and len(there) > 1:
        raise ValueError(f"There are several {what}s: {listed}. Name one: {argument}=...")
    if wanted is not None and wanted not in there:
        others = f"there are: {listed}" if there else f"there are: none; {command}"
        raise KeyError(f"{argument}='{wanted}' is no {what} of this object{nor}; {others}.")
    return next(iter(there)) if wanted is None else wanted


def check_free(data: Source | Data, key: str, *, joint: bool, rna_mod: str) -> None:
    """Raise a ValueError if a fit under `key` would bury something that is not an earlier fit in the same place."""
    source, there = Source.of(data), stored_fits(data, whole=True)
    home = source.data if joint else source.mods.get(rna_mod, source.data)
    if key in there and there[key].home is not home:
        raise ValueError(f"There is another model under the key '{key}' in this object; pass key_added= for this one.")
    if key in home.uns and key not in there and not slots.only_answers(home.uns[key]):
        raise ValueError(f"uns['{key}'] holds something that is no model of anvi; pass another key_added=.")


def check_reads_no_own(setup: Setup, key: str) -> None:
    """Raise a ValueError if a fit is to learn from a column that it will write over."""
    own = (*slots.of_predictions(key)[0 if setup.classes else 1 :], slots.split(key))
    read = [setup.labels_key, *setup.label_columns, setup.batch_key, setup.panel_key, *setup.continuous]
    for name in [*read, *(name for name, _ in setup.categorical)]:
        if name is not None and name.rpartition(":")[2] in own:
            raise ValueError(
                f"The fit would learn from obs['{name}'] and write its own answers there, so that nothing could be "
                "held against them: pass key_added= for another name of the fit, or copy the column."
            )


def _check_can_be_written(source: Source) -> None:
    """Raise a ValueError, before anything is trained, if anndata would refuse whatever is written."""
    data, who = source.data, "data" if source.alone else "mdata"
    if data.is_view and data.isbacked:
        remedy = f"{who} = {who}.to_memory()"
        if not source.alone:
            remedy = f"open the file by av.io.open_backed('{data.file.filename}'), and cut that"
        raise ValueError(f"This is a view of an object that stays in its file; nothing can be written to it: {remedy}.")
    for name, part in ({who: data} | {f"mdata['{mod}']": part for mod, part in source.mods.items()}).items():
        try:
            len(part.obsm)
        except ValueError as error:
            raise ValueError(
                f"{name}.obs has another index than the tables in {name}.obsm ({str(error).splitlines()[0]}). To "
                f"rename cells, give the old names back, and then: {name}.obs_names = names."
            ) from error


def check_no_own(data: Source | Data, setup: Setup, key: str, question: str | None = None) -> None:
    """Raise a ValueError if what a verb would write or remove under a key is there and not anvi's, or has no room.

    Parameters
    ----------
    data, setup, key
        Where it would be written, and under which prefix.
    question
        The entry of `uns[key]` that a question notes, or "predict"; None: a fit, which also removes what questions to
        an earlier one have written.
    """
    source = Source.of(data)
    _check_can_be_written(source)
    slots.check_short_enough(source.data, setup, key)
    home = slots.home(source.data, setup)
    entry, columns = home.uns.get(key), set(home.obs)
    fit, noted = slots.is_fit(entry), set(entry) if isinstance(entry, Mapping) else set()
    noted |= {"latent"} if fit else set()
    rankings = (part.uns.get(slots.attributions(key)) for part in source.parts)
    noted |= {"attributions"} if any(map(slots.is_attributions, rankings)) else set()
    # what is said of cell types
    places: list[tuple[str, str]] = []  # table and name
    trio = {slots.prediction(key), slots.confidence(key), slots.label(key)}
    if question in (None, "predict") and not (trio <= columns or (fit and len(entry["classes"]))):
        names = slots.of_predictions(key) if setup.classes else slots.of_predictions(key)[1:]
        places += itertools.product(("obs", "obsm", "layers", "varp"), names)
    # answers that nothing notes, unless `concat` has dropped the notes with all of uns; a fit removes them
    parted = slots.split(key) in columns and home.obs[slots.split(key)].isin(["train", "validation"]).any()
    said = (entry is None or slots.only_answers(entry)) and {slots.prediction(key), slots.label(key)} <= columns
    lost = not fit and (parted or said)
    answers = [question] if question in slots.ANSWERED_IN else slots.ANSWERED_IN if question is None else ()
    if not lost:
        places += [("obs", slots.split(key))] if question is None and not fit else []
        places += [place for one in answers if one not in noted for place in slots.of_question(one, key)]
    if question in (None, "predict") and fit and (edited := _edited(source, home, setup, key)):
        raise ValueError(
            f"obs['{slots.label(key)}'] has names that anvi has not written ({listed(map(repr, edited), 3)}) and would "
            "be overwritten: pass another key_added=, or rename it."
        )
    at_home = {slots.split(key), slots.latent(key), *slots.of_predictions(key)}
    for where, part in [("mdata", source.data), *((source.name(mod), part) for mod, part in source.mods.items())]:
        its = "" if part is home else f"{where}."
        for table, name in [place for place in places if part is home or place[1] not in at_home]:
            there = getattr(part, table, None)  # a MuData's layers are None
            if there is not None and name in there:
                remedy = "rename it" if question == "posterior" else "pass another key_added=, or rename it"
                raise ValueError(
                    f"{its}{table}['{name}'] would be overwritten, and nothing says that anvi wrote it: {remedy}."
                )


def _edited(source: Source, home: Data, setup: Setup, key: str) -> list[str]:
    """Names in the labels of a fit that are neither of its classes, at any level, nor of the user's labels.

    Of a column of text alone: what anvi writes is categorical, and may have names that the user's labels had then.
    """
    entry, column = home.uns[key], home.obs.get(slots.label(key))
    if column is None or isinstance(column.dtype, pd.CategoricalDtype) or not len(entry["classes"]):
        return []
    levels = np.ravel(entry["label_levels"]) if "label_levels" in entry else ()
    known = {slots.UNASSIGNED, *map(str, entry["classes"]), *map(str, levels)}
    for name in setup.label_columns or (setup.labels_key,):
        try:
            known.update(source.text(str(name), "labels_key", setup.mods).dropna().unique())
        except (KeyError, ValueError):
            continue  # it is gone, or there are two: said where labels are read
    return sorted(set(column.dropna().astype(str)) - known)


MISSING_AS_TEXT = {"nan", "none", "<na>", "nat"}
"""What `.astype(str)` makes of a missing value, in lower case."""


def odd_cells(source: Source, setup: Setup, tree: Tree | None = None) -> list[str]:
    """What to say of cells that no modality has, of odd names of categories, and names of a tree that no cell has."""
    told = [_cells_outside(source, setup)]
    keys = {"batch_key": (setup.batch_key, setup.batches)}
    if setup.panel_key != setup.batch_key:
        keys["panel_key"] = setup.panel_key, setup.panels
    every = [*keys.items(), *(("categorical_covariate_keys", covariate) for covariate in setup.categorical)]
    labels = [("labels_key", (name, ())) for name in setup.label_columns or (setup.labels_key,)]
    for argument, (key, names) in [each for each in [*every, *labels] if each[1][0] is not None]:
        for name in [name for name in names if name.casefold() in MISSING_AS_TEXT]:
            if n := (source.text(key, argument, setup.mods) == name).sum():  # a mapped query may have none of them
                told.append(
                    f"{argument}='{key}': {n} cells have the text '{name}', as .astype(str) makes it of missing "
                    "values, and are a category of their own: fill them in, or leave these cells out"
                )
        said = {text for text in source.column(key, argument, setup.mods).dropna().unique() if isinstance(text, str)}
        told += [
            f"{argument}='{key}': '{text}' and '{name}' are one category, since both are one number; if they are two, "
            "give them names that are no numbers"
            for text, name in ((text, as_name(text)) for text in sorted(said) if "." in text)
            if text.strip() != name and name in said
        ]
    if tree is not None:
        columns = setup.label_columns or (setup.labels_key,)
        texts = [label_column(source, str(name), setup.unlabeled_category, setup.mods) for name in columns]
        told += unknown_in_tree(tree, texts)
    return list(filter(None, told))


def _cells_outside(source: Source, setup: Setup) -> str | None:
    """What to say of cells of the object that no modality of the model has."""
    if not setup.joint:  # what is written lies in the modality
        return None
    names = cell_names(source, setup.rna_mod, setup.mod_beside)
    outside = source.obs_names[~source.obs_names.isin(names)] if len(names) < len(source.obs_names) else names[:0]
    if not len(outside):
        return None
    mods = [f"mdata['{mod}']" for mod in (setup.rna_mod, setup.mod_beside) if mod in source.mods]
    theirs = f"{mods[0]}.obs_names" + "".join(f".union({mod}.obs_names)" for mod in mods[1:])
    return (
        f"{len(outside)} of the {len(source.obs_names)} cells are not in {' or '.join(mods)} (first: '{outside[0]}'): "
        f"what is written is NaN for them. To leave them out: mdata = mdata[mdata.obs_names.isin({theirs})].copy()"
    )
