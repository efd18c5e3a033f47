"""Selections that verbs take: features, batches, groups of cells, classes to explain; each resolved once, here."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import slots
from .antibodies import same_antibodies
from .cells import Cells
from .containers import Source, as_name, as_names, did_you_mean, listed
from .query import plain_genes
from .setup import FEW_CELLS, Setup, no_mask

logger = logging.getLogger("anvi")


class Features(NamedTuple):
    """Genes and proteins that an answer is to have, each in its order."""

    genes: np.ndarray | None  # columns among the model's genes; None: all of them
    proteins: np.ndarray | None  # columns among the model's proteins; None: all of them
    gene_names: tuple[str, ...]  # the model's names of those
    protein_names: tuple[str, ...]
    asked: tuple[str, ...] | None = None  # both kinds, as and in the order in which they were asked for; None: all
    order: np.ndarray | None = None  # columns of the asked in genes and proteins joined

    @property
    def has_genes(self) -> bool:
        """Whether any gene is asked for."""
        return bool(self.gene_names)

    @property
    def has_proteins(self) -> bool:
        """Whether any protein is asked for."""
        return bool(self.protein_names)


def find_features(setup: Setup, features: Sequence[str] | None = None, modality: str | None = None) -> Features:
    """Look up features by name.

    Parameters
    ----------
    setup
        Of the model.
    features
        Names; where a gene and a protein share one, `"rna:CD4"` and `"prot:CD4"` (the modalities' names) tell them
        apart. Those that the model does not have are looked for without prefixes ("GRCh38_CD4") and, of proteins,
        without what kits add ("CD4_TotalSeqB"). None: every feature.
    modality
        Name of the only modality that is asked about; None: both.

    Raises
    ------
    TypeError
        If `features` is one name instead of several.
    KeyError
        If the model does not have a feature.
    ValueError
        If there is no such modality in the model, a name means two features, or one comes twice.
    """
    mods = (setup.rna_mod, setup.prot_mod) if setup.joint else (setup.rna_mod,)
    if modality is not None and modality not in mods:
        raise ValueError(f"modality='{modality}' is not in the model; it has {' and '.join(map(repr, mods))}.")
    wanted = mods if modality is None else (modality,)
    if features is None:
        genes = setup.genes if setup.rna_mod in wanted else ()
        proteins = setup.proteins if setup.prot_mod in wanted else ()
        nothing = np.zeros(0, dtype=np.int64)
        return Features(None if genes else nothing, None if proteins else nothing, genes, proteins)
    columns = {
        mod: {name: column for column, name in enumerate(names)}
        for mod, names in zip(mods, (setup.genes, setup.proteins), strict=False)
        if mod in wanted
    }
    no_mask(features, "features", "part.var_names")
    asked = tuple(map(str, features))
    found = [_column_of(name, columns, setup.rna_mod) for name in asked]
    if not asked:
        raise ValueError("features is empty; None asks for all.")
    for i, name in enumerate(asked):
        if found[i] in found[:i]:
            raise ValueError(f"features names '{name}' twice.")
    of_rna, of_prot = ([column for mod, column in found if mod == one] for one in (setup.rna_mod, setup.prot_mod))
    joined = [(setup.rna_mod, column) for column in of_rna] + [(setup.prot_mod, column) for column in of_prot]
    return Features(
        np.array(of_rna, dtype=np.int64),
        np.array(of_prot, dtype=np.int64),
        tuple(setup.genes[column] for column in of_rna),
        tuple(setup.proteins[column] for column in of_prot),
        asked,
        np.array([joined.index(one) for one in found]),
    )


def _column_of(name: str, columns: dict[str, dict[str, int]], rna_mod: str) -> tuple[str, int]:
    """Modality and column of one name."""
    mod, colon, rest = name.partition(":")
    if colon and rest in columns.get(mod, {}):
        return mod, columns[mod][rest]
    found = [(mod, there[name]) for mod, there in columns.items() if name in there]
    if len(found) > 1:
        both = " or ".join(f"'{mod}:{name}'" for mod, _ in found)
        raise ValueError(f"features: '{name}' is in several modalities; write {both}.")
    if not found:
        meant = [
            (mod, other) for mod, there in columns.items() for other in _meant(name, mod, list(there), mod == rna_mod)
        ]
        if len(meant) > 1:
            several = " or ".join(f"'{mod}:{other}'" for mod, other in meant[:8])
            raise ValueError(f"features: '{name}' could be several; write {several}.")
        found = [(mod, columns[mod][other]) for mod, other in meant]
    if not found:
        hint = did_you_mean(name, itertools.chain(*columns.values()))
        raise KeyError(f"features: the model has no '{name}' in {' or '.join(map(repr, columns))}.{hint}")
    return found[0]


def _meant(name: str, mod: str, there: list[str], genes: bool) -> list[str]:
    """Names of one modality that are the same without what says nothing of the gene or the antibody."""
    name = name.removeprefix(f"{mod}:")
    if not genes:
        return same_antibodies(name, there)
    plain, *others = plain_genes(pd.Index([name, *there]))
    return [other for other, bare in zip(there, others, strict=True) if bare == plain]


class Batches(NamedTuple):
    """Batches that cells are to be decoded in."""

    codes: tuple[int, ...] | None  # None: each cell's own
    names: tuple[str, ...] | None  # where several may be meant, so that an answer that keeps them apart has an axis


def find_batches(setup: Setup, transform_batch: str | int | bool | Sequence[str] | None) -> Batches:
    """The batches that `transform_batch` means.

    Raises
    ------
    ValueError
        If the model has no such batch, or the list is empty.
    """
    if transform_batch is None:
        return Batches(None, None)
    single = np.isscalar(transform_batch)  # a batch of numbers may be named by one
    if single and transform_batch == "all":
        if "all" in setup.batches and len(setup.batches) > 1:
            raise ValueError(
                "transform_batch='all' means every batch, and one of them is called so: name that one as ['all'], or "
                "list all batches."
            )
        return Batches(tuple(range(len(setup.batches))), setup.batches)
    names = tuple(map(str, [transform_batch] if single else transform_batch))  # type: ignore[arg-type]
    spelled = {as_name(name): name for name in setup.batches}
    names = tuple(name if name in setup.batches else spelled.get(as_name(name), name) for name in names)
    unknown = [name for name in names if name not in setup.batches]
    if unknown:
        listed = ", ".join(map(repr, setup.batches))
        raise ValueError(f"transform_batch: the model has no batch '{unknown[0]}'; it has {listed}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"transform_batch={list(names)} must name one batch or several different ones.")
    return Batches(tuple(map(setup.batches.index, names)), None if single else names)


class Contrast(NamedTuple):
    """What is explained, as class codes."""

    target: int | None  # None: each cell's predicted class
    against: int | None  # the second class of a contrast


class ExplainedGroups(NamedTuple):
    """Groups of cells that attributions are averaged over."""

    column: str  # their column of obs
    names: tuple[str, ...]
    code: Tensor | None  # (cells,) on the CPU, -1 for none; None: the predicted classes, which are not known yet
    chosen: tuple[int, ...]  # codes of those that are explained

    def checked(self) -> ExplainedGroups:
        """The same, or a ValueError if it is known that no cell is in any of those to explain."""
        if self.code is not None and not torch.isin(self.code, torch.tensor(self.chosen, dtype=torch.long)).any():
            names = ", ".join(repr(self.names[i]) for i in self.chosen[:10])
            raise ValueError(
                f"No cell is in any of the groups {names} of '{self.column}': groupby= names another column, and "
                "target= a class that is explained in all cells."
            )
        return self


def find_contrast(target: str | tuple[str, str] | None, classes: tuple[str, ...]) -> Contrast:
    """What `target` means.

    Raises
    ------
    KeyError
        If it names no class.
    TypeError, ValueError
        If it is neither one class nor two different ones.
    """
    if target is None:
        return Contrast(None, None)
    if not isinstance(target, Sequence):
        raise TypeError(f"target={target!r} must be a class, or a pair of different ones.")
    names = [target] if isinstance(target, str) else list(target)
    if len(names) not in (1, 2) or len(set(names)) < len(names):
        raise ValueError(f"target={target!r} must be a class, or a pair of different ones.")
    for name in names:
        if name not in classes:
            raise KeyError(f"target: the model has no class '{name}'; it has {', '.join(map(repr, classes))}.")
    codes = [classes.index(name) for name in names]
    return Contrast(codes[0], codes[1] if len(codes) == 2 else None)


def find_explained_groups(
    source: Source,
    setup: Setup,
    cells: Cells,
    groupby: str | None,
    groups: Sequence[str] | None,
    aim: Contrast,
    column: str,
    classes: tuple[str, ...],
) -> ExplainedGroups:
    """Groups of the cells, and which of them to explain; `column` is that of the predicted `classes`.

    Raises
    ------
    TypeError
        If `groups` is one name instead of several.
    KeyError
        If there is no such column or group.
    ValueError
        If names of groups are the same in a file, or there are none.
    """
    groups = groups if groups is None else as_names(groups)
    if groupby is None:
        names, code = classes, None
    else:
        column, names, code = _explained_column(source, setup, cells, groupby)
    if len(set(map(slots.column_name, names))) < len(names):
        raise ValueError(f"groupby='{groupby}' has groups that are the same in a file, which cannot hold '/'; rename.")
    slots.check_storable(names, f"groupby='{groupby}'", columns=True)
    if groups is not None:
        unknown = [name for name in groups if name not in names]
        if unknown:
            raise KeyError(
                f"groups: there is no '{unknown[0]}' in '{column}'; there are {', '.join(map(repr, names))}."
            )
        chosen = tuple(sorted({names.index(name) for name in groups}))
    elif groupby is None and aim.against is not None:
        chosen = tuple(sorted((aim.target, aim.against)))
    else:
        chosen = tuple(range(len(names)))
    return ExplainedGroups(column, tuple(names), code, chosen).checked()


def _explained_column(source: Source, setup: Setup, cells: Cells, groupby: str) -> tuple[str, tuple[str, ...], Tensor]:
    """Name in the modalities' obs, groups in their order and the code of each cell."""
    text = source.text(groupby, "groupby", setup.mods)
    found = source.column(groupby, "groupby", setup.mods)
    if isinstance(found.dtype, pd.CategoricalDtype):
        names = tuple(dict.fromkeys(name for name in map(str, map(as_name, found.cat.categories)) if name))
    else:
        names = tuple(sorted(text.dropna().unique()))
    code = pd.Index(names).get_indexer(text.reindex(cells.names)).astype(np.int64)
    mod, colon, rest = groupby.partition(":")
    return rest if colon and mod in setup.mods else groupby, names, torch.from_numpy(code)


REST = "rest"

Mask: TypeAlias = np.ndarray | pd.Series | Sequence[bool] | str


class Groups(NamedTuple):
    """Groups, what each is compared with, and a column that tells them apart."""

    names: list[str]
    inside: list[np.ndarray]  # per group (cells of the object,) bool
    outside: list[np.ndarray]  # per group (cells of the object,) bool, what it is compared with
    reference: str  # "rest" or the name of a group
    key: str | None  # column of the user's in which they are; None: they came as masks
    column: pd.Series | None  # (cells of the object,) categorical; None if groups overlap


def find_groups(
    source: Source,
    setup: Setup,
    groupby: str | None,
    groups: str | Sequence[str] | Mapping[str, Mask] = "all",
    reference: str = REST,
) -> Groups:
    """Look up groups and what they are compared with.

    Parameters
    ----------
    source
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
    if not isinstance(reference, str | int | float | np.generic):
        raise TypeError(
            f"reference={reference!r:.80} must name one group, or '{REST}'. Several together are a mask: "
            "groups={'one': mask, 'others': data.obs[groupby].isin([...])}, reference='others'."
        )
    if isinstance(groups, Mapping):
        if groupby is not None:
            raise ValueError(f"groups={{...}} are masks, which need no groupby='{groupby}'; leave one of the two out.")
        found = _from_masks(source, setup, groups, reference)
    elif groupby is None:
        raise ValueError("Name the column of the groups: groupby='cell_type'; or pass groups={'name': mask or query}.")
    else:
        found = _from_column(source, setup, groupby, groups, reference)
    if found.reference == REST:
        warn_of_word("reference", REST, found.names, "all other cells")
    for name, inside, outside in zip(found.names, found.inside, found.outside, strict=True):
        if not inside.any():
            raise ValueError(f"The group '{name}' has no cells.")
        if not outside.any():
            raise ValueError(f"There are no cells to compare '{name}' with: '{found.reference}' has none.")
        if (inside & outside).any():
            raise ValueError(
                f"{(inside & outside).sum()} cells are both in '{name}' and in its reference '{found.reference}'."
            )
    few = [f"'{name}' ({n})" for name, n in zip(found.names, map(np.sum, found.inside), strict=True) if n < FEW_CELLS]
    if few:
        logger.warning(
            f"{len(few)} of {len(found.names)} groups have fewer than {FEW_CELLS} cells ({listed(few, 4)}): "
            "what is said of them holds for these cells, not for their kind"
        )
    return found


def warn_of_word(argument: str, word: str, names: Iterable[str], meaning: str) -> None:
    """Warn where a word that an argument knows is the name of a group, too."""
    if word in names:
        logger.warning(f"{argument}='{word}' means {meaning}, not the group '{word}'; rename that group to name it")


def _from_column(source: Source, setup: Setup, key: str, groups: str | Sequence[str], reference: str) -> Groups:
    mods = setup.mods
    text = source.text(key, "groupby", mods)
    categories = [name for name in _categories(source, key, mods) if (text == name).any()]
    nobody = {slots.UNASSIGNED, setup.unlabeled_category}
    reference = str(as_name(reference))
    asked = [] if isinstance(groups, str) and groups == "all" else list(dict.fromkeys(as_names(groups)))
    for name in [*asked, *([] if reference == REST else [reference])]:
        if name not in categories:
            known = ", ".join(map(repr, categories[:15]))
            raise ValueError(f"groupby='{key}' has no cells with the value '{name}'; it has {known}.")
    named = {*asked, reference}
    eligible = [name for name in categories if name not in nobody or name in named]
    names = [name for name in (asked or eligible) if name != reference or reference == REST]
    if asked == [reference]:
        raise ValueError(f"groups and reference are both '{reference}': there is nothing to compare.")
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
    own = source.own_column(key)
    column = pd.Series(pd.Categorical(text, categories=categories), index=source.obs_names)
    return Groups(names, inside, outside, reference, key if own is None else own[1], column)


def _categories(source: Source, key: str, mods: tuple[str, ...]) -> list[str]:
    """Values of a column as text: in the order of its categories, or sorted, numbers by value."""
    own, tables = source.own_column(key), source.tables(mods, key).values()
    columns = [obs[key] for obs in tables if key in obs] if own is None else [own[0].obs[own[1]]]
    for column in columns:
        if isinstance(column.dtype, pd.CategoricalDtype):
            return list(dict.fromkeys(str(as_name(name)) for name in column.cat.categories))
    values = source.text(key, "groupby", mods).dropna().unique()
    numbers = pd.to_numeric(pd.Series(values), errors="coerce")
    return sorted(values) if numbers.isna().any() else [values[i] for i in numbers.argsort()]


def _from_masks(source: Source, setup: Setup, groups: Mapping[str, Mask], reference: str) -> Groups:
    if not groups:
        raise ValueError("groups={} names no group.")
    masks = {str(name): _mask(source, setup, str(name), mask) for name, mask in groups.items()}
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
        values = np.full(len(source.obs_names), REST, dtype=object)
        for name, mask in masks.items():
            values[mask] = name
        categories = [*masks, *([REST] if (together == 0).any() else [])]
        column = pd.Series(pd.Categorical(values, categories=categories), index=source.obs_names)
    return Groups(names, inside, outside, reference, None, column)


def _mask(source: Source, setup: Setup, name: str, mask: Mask) -> np.ndarray:
    """A mask or query as `(cells of the object,)` bool."""
    if isinstance(mask, str):
        return _query(source, setup, name, mask)
    values = mask_of(mask, source.obs_names, f"groups['{name}']")
    if values.dtype != bool:
        raise TypeError(
            f"groups['{name}'] must be a boolean mask or a query on obs, got an array of {values.dtype}. "
            f"{as_mask(mask, source.obs_names, 'mask')}."
        )
    return values


def as_mask(values: Sequence | np.ndarray | pd.Series, cells: pd.Index, name: str) -> str:
    """The command that makes a mask of what stands for one: zeros and ones of all cells are no positions."""
    given = pd.Series(np.ravel(np.asarray(values, dtype=object)))
    known = given.dropna()
    if len(given) == len(cells) and len(known) and known.isin([0, 1]).all():
        whole = name if isinstance(values, pd.Series) else f"pd.Series({name}, data.obs_names)"
        return f"{name} = {whole}{'.eq(True).fillna(False)' if len(known) < len(given) else ''}.astype(bool)"
    if pd.api.types.is_integer_dtype(known.infer_objects()):
        return f"From positions: {name} = np.isin(np.arange(data.n_obs), {'positions' if name == 'mask' else name})"
    if known.isin(cells).any():
        return f"From names of cells: {name} = data.obs_names.isin({'names' if name == 'mask' else name})"
    return f"It is True or False for each cell, as {name} = data.obs['...'] == '...' is"


def mask_of(values: Sequence | np.ndarray | pd.Series, obs_names: pd.Index, what: str) -> np.ndarray:
    """As an array; a boolean one is `(cells of the object,)`, that of a Series by the names in its index."""
    nullable = isinstance(getattr(values, "dtype", None), pd.BooleanDtype)
    if nullable and pd.isna(values).any():
        raise ValueError(f"{what} has missing values; say whether they are in it: .fillna(False)")
    array = np.asarray(values, dtype=bool if nullable else None)  # pandas 2.1 would make objects of them
    if array.dtype != bool:
        return array
    if isinstance(values, pd.Series) and not values.index.equals(obs_names):
        if not obs_names.isin(values.index).all() or values.index.has_duplicates:
            raise ValueError(f"{what} is a Series whose index does not hold every cell of the object once.")
        array = values.loc[obs_names].to_numpy(dtype=bool)
    if array.shape != obs_names.shape:
        raise ValueError(
            f"{what} has {len(array)} entries, the object has {len(obs_names)} cells: a mask has one for each."
        )
    return array


def _query(source: Source, setup: Setup, name: str, query: str) -> np.ndarray:
    """Cells for which a query holds; columns that only a modality has can be named, too."""
    obs = source.obs
    for own in (source.mods[mod].obs for mod in setup.mods if mod in source.mods):
        obs = obs.join(own[[column for column in own if column not in obs]].reindex(obs.index))
    try:
        return obs.index.isin(obs.query(query, engine="python").index)
    except Exception as error:  # whatever pandas makes of a user's text
        odd = [column for column in obs if str(column) in query and not str(column).isidentifier()]
        quoted = f" Names that are no words stand in backticks: `{odd[0]}`." if odd and "`" not in query else ""
        raise ValueError(
            f"groups['{name}']: the query {query!r} failed ({type(error).__name__}: {error!s:.200}).{quoted} It is "
            "what `obs.query` takes, a comparison."
        ) from error
