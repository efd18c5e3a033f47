"""Where things are in a MuData or an AnnData: modalities, layers, obs columns found in any of the three obs."""

import difflib
import logging
import sys
import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from mudata import MuData
from scipy import sparse

Data = MuData | AnnData
logger = logging.getLogger("anvi")


def check_type(data: Data) -> None:
    """Raise a TypeError unless `data` is a MuData or an AnnData."""
    if not isinstance(data, MuData | AnnData):
        raise TypeError(f"Expected a MuData or an AnnData, got {type(data).__name__}.")


def modality(data: Data, name: str, argument: str) -> AnnData:
    """One modality of a MuData, or the AnnData itself."""
    check_type(data)
    if isinstance(data, AnnData):
        return data
    if name not in data.mod:
        there = ", ".join(f"'{mod}'" for mod in data.mod)
        raise KeyError(f"This MuData has no modality '{name}'; it has {there}. Name the right one: {argument}=...")
    return data.mod[name]


def check_layer(data: Data, layer: str | dict[str, str] | None) -> None:
    """Raise a KeyError if a dict of layers names a modality that is not there."""
    if isinstance(layer, dict) and isinstance(data, MuData):
        for mod in layer:
            if mod not in data.mod:
                raise KeyError(f"layer= names '{mod}', which is no modality; there are: {_list(data.mod)}.")


def layer_of(layer: str | dict[str, str] | None, mod: str) -> str | None:
    """The layer that `layer` means for one modality; None is `.X`."""
    return layer.get(mod) if isinstance(layer, dict) else layer


def matrix(adata: AnnData, layer: str | None, where: str):
    """Counts of a modality as they are stored: dense, csr, csc; those of a backed object are read."""
    if layer is None:
        if adata.X is None:
            raise ValueError(f"{where}.X is empty; pass layer=... ({_list(filter(None, adata.layers))} are there).")
        counts = adata.X
    elif layer in adata.layers:
        counts = adata.layers[layer]
    else:
        raise KeyError(f"layer='{layer}' is not in {where}.layers; there are: {_list(filter(None, adata.layers))}.")
    return counts.to_memory() if isinstance(counts, CSRDataset | CSCDataset) else counts


def to_csr(counts) -> sparse.csr_matrix:
    """Counts as canonical float32 csr, sharing memory where it can."""
    if isinstance(counts, pd.DataFrame):
        counts = counts.to_numpy()
    if not sparse.issparse(counts):
        counts = np.asarray(counts)
    csr = sparse.csr_matrix(counts, dtype=np.float32, copy=False)
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def unique_names(names: pd.Index, where: str, what: str) -> None:
    """Raise unless names are unique: cells and features are matched by name only."""
    repeated = names[names.duplicated()].unique()
    if len(repeated):
        shown = ", ".join(map(repr, repeated[:3]))
        remedy = f"run {where}_make_unique() first" if where.endswith("_names") else "rename them first"
        raise ValueError(
            f"{where} has {len(repeated)} repeated {what} names ({shown}{', ...' if len(repeated) > 3 else ''}). "
            f"Names are what cells and features are matched by; {remedy}."
        )


def obs_column(data: Data, key: str, argument: str, mods: tuple[str, ...]) -> pd.Series:
    """Find a column in `mdata.obs` or a modality's obs, for all cells of `data`.

    Parameters
    ----------
    data
        The user's object.
    key
        Column name; `"rna:batch"` means the column `batch` of the modality `rna` and no other.
    argument
        The argument that named it, for messages.
    mods
        Modalities to look in, after `mdata.obs`.

    Returns
    -------
    Series indexed by `data.obs_names`; missing where no copy says anything.

    Raises
    ------
    KeyError
        If the column is nowhere; the message lists where it was looked for and what is there.
    ValueError
        If two copies disagree about a cell.
    """
    copies = _copies(data, key, mods)
    if not copies:
        places = ["data.obs"] if isinstance(data, AnnData) else ["mdata.obs", *(f"mdata['{mod}'].obs" for mod in mods)]
        near = difflib.get_close_matches(key, _columns(data, mods), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise KeyError(
            f"{argument}='{key}' was found in none of {', '.join(places)}.{hint} "
            f"Categorical columns there: {_list(categorical_columns(data, mods))}."
        )
    (first_place, merged), *others = copies.items()
    for place, column in others:
        shared = merged.index.intersection(column.index)
        differ = _differ(merged.loc[shared], column.loc[shared])
        if differ.any():
            cell = shared[differ][0]
            raise ValueError(
                f"{argument}='{key}' has two copies that disagree in {differ.sum()} cells: cell '{cell}' is "
                f"{merged[cell]!r} in {first_place} and {column[cell]!r} in {place}. "
                f"Delete one, or name the one that you mean: {argument}='{mods[0]}:{key}'."
            )
        merged = _whole(merged).astype(object).combine_first(_whole(column).astype(object))
    return merged.reindex(data.obs_names)


def _differ(ours: pd.Series, theirs: pd.Series) -> np.ndarray:
    """Where both copies say something and not the same; numbers may have been stored in another precision."""
    both = ours.notna().to_numpy() & theirs.notna().to_numpy()
    if all(pd.api.types.is_numeric_dtype(column.dtype) for column in (ours, theirs)):
        numbers = [column.to_numpy(dtype=np.float64, na_value=np.nan) for column in (ours, theirs)]
        return both & ~np.isclose(*numbers, rtol=1e-5, atol=0)
    return both & (_as_text(ours).to_numpy() != _as_text(theirs).to_numpy())


def categorical_columns(data: Data, mods: tuple[str, ...]) -> list[str]:
    """Names of obs columns that could be a label, a batch or a panel."""
    found = []
    for obs in _tables(data, mods).values():
        for name in obs.columns:
            column = obs[name]
            numeric = pd.api.types.is_float_dtype(column.dtype)
            if not numeric and 1 < column.nunique() <= max(2, min(1000, len(column) // 2)) and name not in found:
                found.append(name)
    return found


def _tables(data: Data, mods: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    if isinstance(data, AnnData):
        return {"data.obs": data.obs}
    return {"mdata.obs": data.obs} | {f"mdata['{mod}'].obs": data.mod[mod].obs for mod in mods if mod in data.mod}


def _columns(data: Data, mods: tuple[str, ...]) -> list[str]:
    return [name for obs in _tables(data, mods).values() for name in obs.columns]


def _copies(data: Data, key: str, mods: tuple[str, ...]) -> dict[str, pd.Series]:
    tables = _tables(data, mods)
    mod, colon, rest = key.partition(":")
    if colon and isinstance(data, MuData) and mod in data.mod and rest in data.mod[mod].obs:
        return {f"mdata['{mod}'].obs": data.mod[mod].obs[rest]}
    return {place: obs[key] for place, obs in tables.items() if key in obs}


def _whole(column: pd.Series) -> pd.Series:
    """Whole floats as integers: 1.0 is what is left of 1 where cells are missing."""
    if not pd.api.types.is_float_dtype(column.dtype):
        return column
    known = column.dropna()
    return column.astype("Int64") if ((known == known.round()) & (known.abs() < 2**53)).all() else column


def _as_text(column: pd.Series) -> pd.Series:
    """Values as text, missing ones as NaN."""
    column = _whole(column).astype(object)
    return column.where(column.notna(), np.nan).map(str, na_action="ignore")


def text_column(data: Data, key: str, argument: str, mods: tuple[str, ...]) -> pd.Series:
    """Like :func:`obs_column`, values as text, missing ones and "" as NaN."""
    column = _as_text(obs_column(data, key, argument, mods))
    return column.where(column != "", np.nan)


def _list(names) -> str:
    names = [f"'{name}'" for name in names]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def warn(message: str) -> None:
    """Warn, pointing at the first line outside this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("anvi."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
