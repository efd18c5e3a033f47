"""Rankings of features by group, in the shape of scanpy's `rank_genes_groups`: differential expression, attributions.

Attributions lie in an object as a ranking per modality in `uns`, a table in `varm`, single cells in `layers`. Their
scores are what features contribute by their presence: what counts above the baseline bring, less what it costs cells
to be below it (the mean attribution, at the most). Further columns hold the mean attributions, their standard errors
and the numbers of cells that they are means of.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from anvi._backed import in_zarr, lies_in_file
from anvi.settings import warn

from . import containers, slots
from .antibodies import renamed
from .containers import Data, Source, as_names, whole
from .counts import matrix_name
from .fits import meant, missing

if TYPE_CHECKING:
    import xarray as xr

logger = logging.getLogger("anvi")

COLUMNS = {"scores": np.float32, "logfoldchanges": np.float32, "pvals": np.float64, "pvals_adj": np.float64}
"""Columns that scanpy's readers ask for, and the precision in which it writes them."""


LARGEST_MESSAGE = 65_535
"""Bytes that HDF5 has for the names and types of the fields of a table."""


class Ranked(NamedTuple):
    """What is known of every feature in one group; arrays `(features,)` in the order of the features."""

    scores: np.ndarray  # the largest is ranked first
    logfoldchanges: np.ndarray  # base 2; NaN where that means nothing
    pvals: np.ndarray  # NaN where that means nothing
    pvals_adj: np.ndarray
    extras: Mapping[str, np.ndarray] = {}  # further columns of numbers, which scanpy does not look at


def build_ranking(groups: Mapping[str, Ranked], features: Sequence[str], params: Mapping) -> dict:
    """The dict that lies in `uns`.

    Parameters
    ----------
    groups
        The columns of each group, the same ones in all.
    features
        Names of the features.
    params
        How it was made. scanpy's plots need `groupby`, `reference`, `method` and `use_raw`; the last two follow here
        unless they are given.

    Returns
    -------
    `params`; `names`; the columns of :data:`COLUMNS` and the extras as float32 (float64 where they are float64).
    Features of equal score stay in their order, a score of NaN comes last.
    """
    names = np.asarray(features, dtype=object)
    order = {group: np.argsort(-np.asarray(part.scores, dtype=float), kind="stable") for group, part in groups.items()}

    def stack(values: Mapping[str, np.ndarray], kind) -> np.ndarray:
        out = np.empty(len(names), dtype=[(group, kind) for group in groups])
        for group, column in values.items():
            out[group] = np.asarray(column)[order[group]]
        return out

    columns = {column: {group: getattr(part, column) for group, part in groups.items()} for column in COLUMNS}
    kinds = dict(COLUMNS)
    for extra in next(iter(groups.values())).extras:
        columns[extra] = {group: part.extras[extra] for group, part in groups.items()}
        double = any(np.asarray(values).dtype == np.float64 for values in columns[extra].values())
        kinds[extra] = np.float64 if double else np.float32
    return {
        "params": {"method": "anvi", "use_raw": False} | dict(params),
        "names": stack(dict.fromkeys(groups, names), object),
    } | {column: stack(values, kinds[column]) for column, values in columns.items()}


def of_features(ranking: dict, there: pd.Index, where: str) -> dict:
    """A ranking without features that a modality lacks, as of a smaller panel: scanpy's plots would look for them."""
    fields = {slot: column for slot, column in ranking.items() if isinstance(column, np.ndarray)}
    group, *_ = groups = group_names(ranking)
    features = fields["names"][group]
    absent = features[~pd.Index(renamed(list(features), there)).isin(there.astype(str))]
    if not len(absent):
        return ranking
    logger.info(f"{len(absent)} features that {where} lacks ({containers.listed(absent, 3)}) are not written")
    kept = {group: ~np.isin(fields["names"][group], absent) for group in groups}
    out = {slot: part.drop(index=absent) if isinstance(part, pd.DataFrame) else part for slot, part in ranking.items()}
    for slot, column in fields.items():
        out[slot] = np.empty(len(features) - len(absent), column.dtype)
        for group, keep in kept.items():
            out[slot][group] = column[group][keep]
    return out


def check_writable(data: Data, groups: Sequence[str], where: str) -> None:
    """Warn of groups that are too many, or too long, for a file; an error where the object lies in one.

    scanpy's form has a field per group, and HDF5 holds the names of all fields in one message.
    """
    slots.check_short(data, groups, where)
    fields = np.dtype([(group, np.float32) for group in groups])
    size = len(h5py.h5t.py_create(fields, logical=True).encode())
    if size <= LARGEST_MESSAGE:
        return
    said = (
        f"{where}: the names of {len(groups)} groups take {size:,} bytes, and a ranking in an .h5mu or .h5ad file has "
        f"room for {LARGEST_MESSAGE:,}: that file cannot be written. Shorten the names, ask for fewer groups=[...], "
        "write .zarr, or take the tables: inplace=False."
    )
    if lies_in_file(data) and not in_zarr(data):
        raise ValueError(said)
    warn(said)


def is_ranking(value) -> bool:
    """Whether something in `uns` has this shape, whoever wrote it."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("params"), Mapping)
        and getattr(getattr(value.get("names"), "dtype", None), "names", None) is not None
    )


def find_ranking(data: Data, key: str) -> dict[str, Mapping]:
    """The rankings under a key by modality; in an AnnData those of "rna" and "prot", the latter under `{key}_prot`."""
    source = Source(data)
    found = {mod: part.uns.get(key) for mod, part in source.mods.items()}
    if source.alone:
        found = {"rna": data.uns.get(key), "prot": data.uns.get(f"{key}_prot")}
    return {mod: stored for mod, stored in found.items() if is_ranking(stored)}


def group_names(stored: Mapping) -> list[str]:
    """The groups of a ranking, in their order."""
    return list(map(str, stored["names"].dtype.names))


def chosen_rankings(
    data: Data, group: str | int | bool | Sequence[str] | None, modality: str | None, key: str
) -> list[tuple[str, Mapping, list[str]]]:
    """Modality, ranking and the groups that are meant of it; an error where there is none, or no such group."""
    found = {mod: stored for mod, stored in find_ranking(data, key).items() if modality in (None, mod)}
    if not found:
        of = "" if modality is None else f" of the modality '{modality}'"
        raise missing(f"uns['{key}']{of}", "run av.tl.differential_expression(data, groupby)")
    chosen, asked = [], None if group is None else as_names(group)
    for mod, stored in found.items():
        known = group_names(stored)
        wanted = known if asked is None else asked
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise KeyError(f"'{unknown[0]}' is no group of uns['{key}'] of '{mod}'; it has {', '.join(known)}.")
        chosen.append((mod, stored, wanted))
    return chosen


def ranking_table(stored: Mapping, groups: Sequence[str] | None = None) -> pd.DataFrame:
    """A ranking as one tidy table, as it lies in memory or as a file brought it back.

    Parameters
    ----------
    stored
        The dict in `uns`.
    groups
        The groups that are wanted; None: all.

    Returns
    -------
    DataFrame with `group`, `names` and a column per number, groups one after the other, features in rank order. Where
    the parameters name a false discovery rate, `is_de` says which features may be called at it.
    """
    wanted = group_names(stored) if groups is None else list(groups)
    kept = [column for column, value in stored.items() if getattr(getattr(value, "dtype", None), "names", None)]
    parts = []
    for group in wanted:
        part = {column: np.asarray(stored[column][group]) for column in kept}
        part["names"] = np.array([_text(name) for name in part["names"]], dtype=object)
        parts.append(pd.DataFrame({"group": group} | part))
    out = pd.concat(parts, ignore_index=True)
    out["group"] = pd.Categorical(out["group"], categories=wanted)
    if "fdr" in stored["params"]:
        out["is_de"] = out["pvals_adj"] <= float(stored["params"]["fdr"])
    first = ["group", "names", *(column for column in COLUMNS if column in out)]
    return out[[*first, *sorted(set(out) - set(first))]]  # files forget the order


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def write_groups(out: slots.Writer, key: str | None, column: pd.Series | None, own: str) -> dict:
    """Make sure that the modality that a writer writes to knows the groups, as scanpy's plots want it.

    The user's column is pushed if the modality lacks it, or has an earlier copy. Where it has another one of that name,
    or the groups came as masks, a column of our own is written; for masks that overlap there can be none.

    Parameters
    ----------
    out
        Where a modality is written to.
    key, column
        The user's column, and what it says of each cell, categorical; None: masks, and masks that overlap.
    own
        Name of our own column.

    Returns
    -------
    For the parameters of the result: `groupby`, the name of the column; `pushed`, whether it is a copy.
    """
    obs, copied = out.home.obs, key is not None and containers.pushed(out.home, key)
    # a column of numbers does not count as the same, since it would be drawn as such
    if key is not None and key in obs and not pd.api.types.is_numeric_dtype(obs[key].dtype):
        there, wanted = Source(out.home).text(key, "groupby", ()), column.reindex(out.home.obs_names).astype(object)
        if there.equals(wanted.where(wanted.notna(), np.nan).map(str, na_action="ignore").astype(object).rename(key)):
            return {"groupby": key, "pushed": copied}
    copied |= key is not None and key not in obs
    name = key if copied else own
    if column is not None:
        out.obs(name, pd.Categorical(column.reindex(out.cells)))
    return {"groupby": name, "pushed": copied}


_ENDING = slots.attributions("")
_BESIDE = slots.attributions_prot("")  # proteins of an AnnData, whose features are genes


class AttributionSlots(NamedTuple):
    """Attributions in one modality, as they lie in an object."""

    mod: str  # its name; "rna" and "prot" in an AnnData
    home: AnnData  # where they lie
    stored: Mapping  # the ranking
    beside: bool = False  # proteins of an AnnData: varm and layers have no room for them

    @property
    def params(self) -> dict:
        """How they came to be."""
        return self.stored["params"]

    @property
    def groups(self) -> list[str]:
        """Groups that were explained, exact names."""
        return group_names(self.stored)

    @property
    def ending(self) -> str:
        """What follows the key in the name of the slot in `uns`."""
        return _BESIDE if self.beside else _ENDING

    def table(self, column: str = "attributions") -> pd.DataFrame:
        """Features x groups: "attributions", their part by presence ("scores"), "standard_errors" or "cells"."""
        return self.tables([column])[0]

    def tables(self, columns: Sequence[str]) -> list[pd.DataFrame]:
        """Several of these; features in the order of the modality, in an AnnData's proteins by name."""
        groups = self.groups
        ranks = {group: pd.Index(list(map(_text, self.stored["names"][group]))) for group in groups}
        features = ranks[groups[0]].sort_values()
        if not self.beside:
            names = self.home.var_names.astype(str)
            features = names[names.isin(features)]
        place = {group: names.get_indexer(features) for group, names in ranks.items()}
        return [
            pd.DataFrame({group: self.stored[column][group][place[group]] for group in groups}, features)
            for column in columns
        ]

    def cells(self, key: str) -> pd.DataFrame | None:
        """Explained cells x features, if they were kept; proteins that a cell was not measured for are NaN."""
        slot, target = slots.attributions(key), slots.explained(key)
        place = self.home.obsm if self.beside else self.home.layers
        if slot not in place or target not in self.home.obs:
            return None
        inside = self.home.obs[target].notna().to_numpy()
        features = self.table().index
        if self.beside:
            return slots.table(self.home, slot, features)[inside][list(features)]
        values = whole(place[slot], f"'{slot}'")[inside]
        values = values.toarray() if sparse.issparse(values) else np.asarray(values)
        return pd.DataFrame(values, self.home.obs_names[inside], self.home.var_names.astype(str))[features]

    def counts(self, cell: str, features: Sequence[str]) -> np.ndarray:
        """What the object holds of some features of a cell, NaN where nothing."""
        if self.beside:
            return np.full(len(features), np.nan)
        layer = self.params.get("layer")
        matrix = self.home.X if layer is None else self.home.layers[str(layer)]
        row = whole(matrix, matrix_name(layer))[self.home.obs_names.get_indexer([cell])]
        row = np.asarray(row.toarray() if sparse.issparse(row) else row, dtype=float).ravel()
        return row[containers.positions(pd.Index(features), self.home.var_names.astype(str))[0]]


class CellAttributions(NamedTuple):
    """Attributions of single cells in one modality."""

    names: pd.Index  # (cells,)
    texts: pd.Categorical  # (cells,) what was explained
    values: np.ndarray | sparse.csr_matrix  # (cells, features) NaN where not measured
    features: Sequence[str]

    def table(self) -> pd.DataFrame:
        """The values as a table."""
        values = self.values if isinstance(self.values, np.ndarray) else self.values.toarray()
        return pd.DataFrame(values, self.names, list(self.features))


def attribution_ranking(
    mean: np.ndarray,
    presence: np.ndarray,
    error: np.ndarray,
    n_cells: np.ndarray,
    features: Sequence[str],
    groups: Sequence[str],
    params: dict,
) -> dict:
    """The ranking of one modality; arrays `(groups, features)`."""
    nothing = np.full(mean.shape[1], np.nan)
    columns = {
        group: Ranked(
            scores=presence[i],
            logfoldchanges=nothing,
            pvals=nothing,
            pvals_adj=nothing,
            extras={
                "attributions": mean[i].astype(np.float32),
                "standard_errors": error[i].astype(np.float32),
                "cells": n_cells[i].astype(np.float32),
            },
        )
        for i, group in enumerate(groups)
    }
    return build_ranking(columns, features, {"method": "integrated gradients"} | params)


def write_attributions(
    part: AttributionSlots, key: str, grouping: pd.Series, single: CellAttributions | None
) -> list[str]:
    """Write the attributions of one modality into its slots.

    Parameters
    ----------
    part
        What and where.
    key
        Prefix of the slots.
    grouping
        Group of each cell by name, categorical; its name is that of the user's column, None where there is none.
    single
        Attributions of single cells, to be kept; None removes what an earlier call kept.

    Returns
    -------
    The slots that were written.
    """
    slot, target = slots.attributions(key), slots.explained(key)
    if is_ranking(part.home.uns.get(f"{key}{part.ending}")):  # else what has these names is the user's own
        slots.remove(part.home, target, *([] if part.beside else [slot]))  # the latter would take what RNA just wrote
    out = slots.writer_into(part.home, grouping.index)
    told = write_groups(out, grouping.name, grouping, slots.attributed(key))
    if not part.beside:
        part = part._replace(stored=of_features(dict(part.stored), part.home.var_names, f"'{part.mod}'"))
        out.varm(part.mod, slot, part.table().rename(columns=slots.column_name).astype(np.float32))
    out.uns(f"{key}{part.ending}", dict(part.stored) | {"params": part.params | told})
    if single is None:
        return out.written
    inside = slots.writer_into(part.home, single.names)
    inside.obs(target, single.texts)
    if part.beside:
        inside.obsm(slot, single.values, single.features)
    else:
        inside.layer(part.mod, slot, single.values, single.features)
    return out.written + inside.written


def find_attributions(data: Data) -> dict[str, list[AttributionSlots]]:
    """Attributions in an object by their key, RNA first."""
    found: dict[str, list[AttributionSlots]] = {}
    source = Source(data)
    for mod, home in [("rna", data)] if source.alone else source.mods.items():
        for slot, stored in home.uns.items():
            if not is_ranking(stored) or not slots.is_attributions(stored):
                continue
            if slot.endswith(_BESIDE) and source.alone:
                found.setdefault(slot.removesuffix(_BESIDE), []).append(
                    AttributionSlots("prot", home, stored, beside=True)
                )
            elif slot.endswith(_ENDING):
                found.setdefault(slot.removesuffix(_ENDING), []).append(AttributionSlots(mod, home, stored))
    for parts in found.values():
        parts.sort(key=lambda part: str(part.params["modality"]) != "rna")
    return found


def resolve_attributions(data: Data, key: str | None) -> tuple[str, list[AttributionSlots]]:
    """The attributions that a key means; None: the only ones there.

    Raises
    ------
    KeyError
        If there are none; the message names the next command.
    ValueError
        If there are several and none is named.
    """
    there = find_attributions(data)
    key = meant(there, key, "attribution", "run av.tl.attributions(data) first")
    return key, there[key]


def attributions_dataset(parts: Sequence[AttributionSlots], single: Sequence[pd.DataFrame] = ()) -> xr.Dataset:
    """Attributions as an xarray Dataset over `class` and `{mod}_var`; with those of single cells also over `obs`.

    Parameters
    ----------
    parts
        The modalities.
    single
        Explained cells x features of each modality, if wanted.
    """
    import xarray as xr

    first = parts[0]
    names = ("n_cells", "difference", "delta", "complete")
    variables: dict[str, tuple] = {name: ("class", np.asarray(first.params[name])) for name in names}
    coords = {"class": np.array(first.groups, dtype=object)}
    for part in parts:
        dims, mod = ("class", f"{part.mod}_var"), part.mod
        mean, presence, error, n_cells = part.tables(("attributions", "scores", "standard_errors", "cells"))
        coords[dims[1]] = mean.index.to_numpy(dtype=object)
        variables[mod] = (dims, mean.to_numpy().T)
        variables[f"{mod}_presence"] = (dims, presence.to_numpy().T)
        variables[f"{mod}_error"] = (dims, error.to_numpy().T)
        variables[f"{mod}_cells"] = (dims, n_cells.to_numpy().T.astype(int))
    if single:
        cells = pd.Index(np.unique(np.concatenate([table.index.to_numpy(dtype=object) for table in single])))
        coords["obs"] = cells.to_numpy(dtype=object)
        for part, table in zip(parts, single, strict=True):
            values = table.reindex(index=cells, columns=coords[f"{part.mod}_var"]).to_numpy()
            variables[f"{part.mod}_per_cell"] = ("obs", f"{part.mod}_var"), values
    asked = ("groupby", "target", "against", "baseline", "n_steps", "random_state")
    return xr.Dataset(variables, coords, {name: first.params.get(name) for name in asked})  # anndata 0.11 wrote no None
