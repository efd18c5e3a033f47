"""Features ranked by group, in the shape of scanpy's `rank_genes_groups`, which its plots and readers understand.

A dict that files can hold: `params`, and one structured array per column, with a field per group and the features of
that group in rank order: the i-th row of every array belongs to the i-th name of that group.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from .containers import Data

COLUMNS = {"scores": np.float32, "logfoldchanges": np.float32, "pvals": np.float64, "pvals_adj": np.float64}
"""Columns that scanpy's readers ask for, and the precision in which it writes them."""


class Ranked(NamedTuple):
    """What is known of every feature in one group; arrays `(features,)` in the order of the features."""

    scores: np.ndarray  # the largest is ranked first
    logfoldchanges: np.ndarray  # base 2; NaN where that means nothing
    pvals: np.ndarray  # NaN where that means nothing
    pvals_adj: np.ndarray
    extras: Mapping[str, np.ndarray] = {}  # further columns of numbers, which scanpy does not look at


def build(groups: Mapping[str, Ranked], features: Sequence[str], params: Mapping) -> dict:
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


def is_ranking(value) -> bool:
    """Whether something in `uns` has this shape, whoever wrote it."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("params"), Mapping)
        and getattr(getattr(value.get("names"), "dtype", None), "names", None) is not None
    )


def find(data: Data, key: str) -> dict[str, Mapping]:
    """The rankings under a key by modality; in an AnnData those of "rna" and "prot", the latter under `{key}_prot`."""
    if isinstance(data, AnnData):
        places = {"rna": data.uns.get(key), "prot": data.uns.get(f"{key}_prot")}
    else:
        places = {mod: part.uns.get(key) for mod, part in data.mod.items()}
    return {mod: stored for mod, stored in places.items() if is_ranking(stored)}


def group_names(stored: Mapping) -> list[str]:
    """The groups of a ranking, in their order."""
    return list(map(str, stored["names"].dtype.names))


def table(stored: Mapping, groups: Sequence[str] | None = None) -> pd.DataFrame:
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
