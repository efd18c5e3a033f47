"""Groups of cells to be compared: categories of a column, boolean masks, or queries on obs."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from . import containers, ranked, slots
from .containers import Data
from .setup import Setup

logger = logging.getLogger("anvi")

REST = "rest"

Mask = np.ndarray | pd.Series | Sequence[bool] | str


class Groups(NamedTuple):
    """Groups, what each is compared with, and a column that tells them apart."""

    names: list[str]
    inside: list[np.ndarray]  # per group (cells of the object,) bool
    outside: list[np.ndarray]  # per group (cells of the object,) bool, what it is compared with
    reference: str  # "rest" or the name of a group
    key: str | None  # column of the user's in which they are; None: they came as masks
    column: pd.Series | None  # (cells of the object,) categorical; None if groups overlap


def find_groups(
    data: Data,
    setup: Setup,
    groupby: str | None,
    groups: str | Sequence[str] | Mapping[str, Mask] = "all",
    reference: str = REST,
) -> Groups:
    """Look up groups and what they are compared with.

    Parameters
    ----------
    data
        The object.
    setup
        Of the model: says in which obs to look, and what an unlabelled cell is called.
    groupby
        Column in obs; None where `groups` are masks.
    groups
        "all", names of categories, or named masks and queries.
    reference
        "rest", or the name of a group.

    Raises
    ------
    KeyError
        If the column is nowhere.
    TypeError, ValueError
        If a group is unknown, has no cells, or there is nothing to compare it with.
    """
    if isinstance(groups, Mapping):
        if groupby is not None:
            raise ValueError(f"groups={{...}} are masks, which need no groupby='{groupby}'; leave one of the two out.")
        found = _from_masks(data, setup, groups, reference)
    elif groupby is None:
        raise ValueError("Name the column of the groups: groupby='cell_type'; or pass groups={'name': mask or query}.")
    else:
        found = _from_column(data, setup, groupby, groups, reference)
    for name, inside, outside in zip(found.names, found.inside, found.outside, strict=True):
        if not inside.any():
            raise ValueError(f"The group '{name}' has no cells.")
        if not outside.any():
            raise ValueError(f"There are no cells to compare '{name}' with: '{found.reference}' has none.")
        if (inside & outside).any():
            raise ValueError(
                f"{(inside & outside).sum()} cells are both in '{name}' and in its reference '{found.reference}'."
            )
    return found


def _from_column(data: Data, setup: Setup, key: str, groups: str | Sequence[str], reference: str) -> Groups:
    mods = _not_pushed(data, key, setup.mods)
    text = containers.text_column(data, key, "groupby", mods)
    categories = [name for name in _categories(data, key, mods) if (text == name).any()]
    nobody = {slots.UNASSIGNED, setup.unlabeled_category}
    if isinstance(groups, str):
        asked = [] if groups == "all" else [groups]
    else:
        asked = list(dict.fromkeys(map(str, groups)))
    for name in [*asked, *([] if reference == REST else [str(reference)])]:
        if name not in categories:
            known = ", ".join(map(repr, categories[:15]))
            raise ValueError(f"groupby='{key}' has no cells with the value '{name}'; it has {known}.")
    named = {*asked, str(reference)}
    eligible = [name for name in categories if name not in nobody or name in named]
    names = [name for name in (asked or eligible) if name != reference or reference == REST]
    if not names or len(eligible) < 2:
        there = f"a single group, '{eligible[0]}'" if eligible else "no group"
        raise ValueError(f"groupby='{key}' has {there}: there is nothing to compare.")
    taking_part = text.isin(eligible).to_numpy()
    if not taking_part.all():
        logger.info(
            f"{(~taking_part).sum()} cells without a group in '{key}' (missing, '' or "
            f"{' or '.join(map(repr, sorted(nobody)))}) take no part, in the rest neither"
        )
    inside = [(text == name).to_numpy() for name in names]
    outside = [taking_part & ~mask if reference == REST else (text == reference).to_numpy() for mask in inside]
    mod, colon, rest = key.partition(":")
    name = rest if colon and isinstance(data, MuData) and mod in data.mod and rest in data.mod[mod].obs else key
    column = pd.Series(pd.Categorical(text, categories=categories), index=data.obs_names)
    return Groups(names, inside, outside, str(reference), name, column)


def _not_pushed(data: Data, key: str, mods: tuple[str, ...]) -> tuple[str, ...]:
    """Modalities but those whose column is the copy that an earlier comparison made: the user's may have changed."""
    if isinstance(data, AnnData) or key not in data.obs:
        return mods
    return tuple(mod for mod in mods if mod not in data.mod or not _pushed(data.mod[mod], key))


def _pushed(part: AnnData, key: str) -> bool:
    """Whether a column of a modality was put there by :func:`write_column`."""
    stored = [value["params"] for value in part.uns.values() if ranked.is_ranking(value)]
    return any(params.get("pushed", False) and str(params.get("groupby")) == key for params in stored)


def _categories(data: Data, key: str, mods: tuple[str, ...]) -> list[str]:
    """Values of a column as text: in the order of its categories, or sorted, numbers by value."""
    mod, colon, rest = key.partition(":")
    parts = [data, *(data.mod[name] for name in mods if name in data.mod)] if isinstance(data, MuData) else [data]
    columns = [part.obs[key] for part in parts if key in part.obs]
    if colon and isinstance(data, MuData) and mod in data.mod and rest in data.mod[mod].obs:
        columns = [data.mod[mod].obs[rest]]
    for column in columns:
        if isinstance(column.dtype, pd.CategoricalDtype):
            return list(map(str, column.cat.categories))
    values = containers.text_column(data, key, "groupby", mods).dropna().unique()
    numbers = pd.to_numeric(pd.Series(values), errors="coerce")
    return sorted(values) if numbers.isna().any() else [values[i] for i in numbers.argsort()]


def _from_masks(data: Data, setup: Setup, groups: Mapping[str, Mask], reference: str) -> Groups:
    if not groups:
        raise ValueError("groups={} names no group.")
    masks = {str(name): _mask(data, setup, str(name), mask) for name, mask in groups.items()}
    if reference != REST and reference not in masks:
        raise ValueError(
            f"reference='{reference}' is neither '{REST}' nor one of the groups: {', '.join(map(repr, masks))}. "
            "Give it a mask of its own among them."
        )
    names = [name for name in masks if name != reference or reference == REST]
    if not names:
        raise ValueError(f"'{reference}' is the only group: there is nothing to compare.")
    inside = [masks[name] for name in names]
    outside = [~mask if reference == REST else masks[reference] for mask in inside]
    together = np.sum(list(masks.values()), axis=0)
    column = None
    if together.max() <= 1 and REST not in masks:
        values = np.full(data.n_obs, REST, dtype=object)
        for name, mask in masks.items():
            values[mask] = name
        categories = [*masks, *([REST] if (together == 0).any() else [])]
        column = pd.Series(pd.Categorical(values, categories=categories), index=data.obs_names)
    return Groups(names, inside, outside, reference, None, column)


def _mask(data: Data, setup: Setup, name: str, mask: Mask) -> np.ndarray:
    """A mask or query as `(cells of the object,)` bool."""
    if isinstance(mask, str):
        return _query(data, setup, name, mask)
    if isinstance(mask, pd.Series) and not mask.index.equals(data.obs_names):
        if not data.obs_names.isin(mask.index).all() or mask.index.has_duplicates:
            raise ValueError(f"groups['{name}'] is a Series whose index does not hold every cell of the object once.")
        mask = mask.loc[data.obs_names]
    values = np.asarray(mask)
    if values.dtype != bool:
        raise TypeError(
            f"groups['{name}'] must be a boolean mask or a query on obs, got an array of {values.dtype}. "
            "From positions: mask = np.isin(np.arange(data.n_obs), positions)."
        )
    if values.shape != (data.n_obs,):
        raise ValueError(f"groups['{name}'] has {len(values)} entries, the object has {data.n_obs} cells.")
    return values


def _query(data: Data, setup: Setup, name: str, query: str) -> np.ndarray:
    """Cells for which a query holds; columns that only a modality has can be named, too."""
    obs = data.obs
    if not isinstance(data, AnnData):
        for mod in setup.mods:
            if mod in data.mod:
                own = data.mod[mod].obs
                obs = obs.join(own[[column for column in own if column not in obs]].reindex(obs.index))
    try:
        return obs.index.isin(obs.query(query, engine="python").index)
    except Exception as error:  # whatever pandas makes of a user's text
        raise ValueError(f"groups['{name}']: the query {query!r} failed ({type(error).__name__}: {error}).") from error


def write_column(out: slots.Writer, groups: Groups, own: str) -> dict:
    """Make sure that the modality that a writer writes to knows the groups, as scanpy's plots want it.

    The user's column is pushed if the modality lacks it, or has an earlier copy. Where it has another one of that name,
    or the groups came as masks, a column of our own is written; for masks that overlap there can be none.

    Returns
    -------
    For the parameters of the result: `groupby`, the name of the column; `pushed`, whether it is a copy.
    """
    part, name, pushed = out.home, own, False
    if groups.key is not None and _same(part, groups):
        return {"groupby": groups.key, "pushed": _pushed(part, groups.key)}
    if groups.key is not None and (groups.key not in part.obs or _pushed(part, groups.key)):
        name, pushed = groups.key, True
    if groups.column is not None:
        out.obs(name, pd.Categorical(groups.column.reindex(out.cells)))
    return {"groupby": name, "pushed": pushed}


def _same(part: AnnData, groups: Groups) -> bool:
    """Whether a modality has the groups' column; one of numbers does not count, since it would be drawn as such."""
    if groups.key not in part.obs or pd.api.types.is_numeric_dtype(part.obs[groups.key].dtype):
        return False
    there, wanted = containers.text_column(part, groups.key, "groupby", ()), groups.column.reindex(part.obs_names)
    missing = there.isna().to_numpy()
    return bool((missing == wanted.isna().to_numpy()).all() and (there[~missing] == wanted[~missing].astype(str)).all())
