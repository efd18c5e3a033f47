"""Protein counts, wherever the user keeps them: a modality of a MuData, or obsm of an AnnData."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from . import containers
from .counts import check_counts
from .minified import check_counts_are_there


@dataclass(frozen=True)
class Proteins:
    """Protein counts of the cells that have a protein row; NaN where the user says "not measured"."""

    cells: pd.Index
    names: tuple[str, ...]
    counts: np.ndarray  # (cells with proteins, proteins) float32, NaN kept
    declared: pd.DataFrame | None  # varm["measured"], proteins x panels
    where: str  # the slot, for messages


def find_proteins(data: containers.Data, setup, *, declared: bool = True) -> Proteins:
    """Read and check protein counts; with `declared`, also what varm says of who measured what.

    Raises
    ------
    KeyError, ValueError
        If they are not there, names repeat, or the values are not counts (NaN is "not measured").
    """
    if isinstance(data, AnnData):
        return _from_obsm(data, setup)
    prot = containers.modality(data, setup.prot_mod, "prot_mod")
    where = f"mdata['{setup.prot_mod}']"
    containers.unique_names(prot.obs_names, f"{where}.obs_names", "cell")
    containers.unique_names(prot.var_names, f"{where}.var_names", "protein")
    slot = f"{where}.X" if setup.prot_layer is None else f"{where}.layers['{setup.prot_layer}']"
    stored = containers.matrix(prot, setup.prot_layer, where)
    check_counts_are_there(stored, data, slot)
    counts = _dense(stored)
    check_counts(counts, prot.obs_names, prot.var_names, slot, prot, mod=setup.prot_mod, missing_allowed=True)
    table = prot.varm.get("measured") if declared else None
    return Proteins(prot.obs_names, tuple(map(str, prot.var_names)), counts, table, slot)


def _from_obsm(adata: AnnData, setup) -> Proteins:
    key = setup.prot_obsm
    if key is None:
        kinds = adata.var.get("feature_types")
        hint = " or split it: mudata.to_mudata(adata, axis='var', by='feature_types')" if kinds is not None else ""
        raise ValueError(
            f"An AnnData needs prot_obsm=..., the name of the protein counts in obsm{hint}. "
            f"In obsm there are: {', '.join(adata.obsm) or 'none'}."
        )
    if key not in adata.obsm:
        raise KeyError(f"prot_obsm='{key}' is not in adata.obsm; there are: {', '.join(adata.obsm) or 'none'}.")
    table = adata.obsm[key]
    if isinstance(table, pd.DataFrame):
        names = tuple(map(str, table.columns))
    else:
        names = tuple(map(str, adata.uns.get(f"{key}_names", [f"protein_{i}" for i in range(table.shape[1])])))
    where = f"adata.obsm['{key}']"
    containers.unique_names(pd.Index(names), where, "protein")
    check_counts_are_there(table, adata, where)
    counts = _dense(table)
    if len(names) != counts.shape[1]:
        raise ValueError(f"adata.uns['{key}_names'] has {len(names)} names for {counts.shape[1]} proteins in {where}.")
    check_counts(counts, adata.obs_names, names, where, None, missing_allowed=True)
    return Proteins(adata.obs_names, names, counts, None, where)


def _dense(counts) -> np.ndarray:
    if isinstance(counts, pd.DataFrame):
        counts = counts.to_numpy()
    if sparse.issparse(counts):
        counts = counts.toarray()
    return np.asarray(counts, dtype=np.float32)
