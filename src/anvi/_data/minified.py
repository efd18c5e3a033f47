"""Data without counts: what `tl.minify` leaves in their place, how it is read, and what to say where counts are needed.

In place of the counts lie the posterior of each cell's latent vector, its library size, and which proteins were
measured in it: a code per cell in obs, and in `uns[key]["posterior"]` what each code means. Source: spec section 5.3.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from . import containers, slots
from .containers import Data, Source, cell_names
from .counts import MINIFIED, entry_of, looks_like_counts
from .setup import Setup

POSTERIOR = "posterior"
"""Entry of `uns[key]`: whose posterior the slots hold, and which proteins the codes in obs mean."""


class Stored(NamedTuple):
    """What stands in for the counts of some cells."""

    names: np.ndarray  # (cells,) sorted
    q_mean: np.ndarray  # (cells, latent) float32
    q_var: np.ndarray  # (cells, latent) float32, a variance
    library: np.ndarray  # (cells,) summed RNA counts of the model's genes, or the size factor; 0 where there is no RNA
    mask_table: np.ndarray | None  # (patterns, proteins) bool: True where measured
    mask_row: np.ndarray | None  # (cells,) pattern of each cell
    rna_view: np.ndarray | None = None  # (cells, latent + components) what proteins are imputed by, NaN where none are


def is_minified(data: Source | Data, setup: Setup, key: str) -> bool:
    """Whether a model's counts are gone from an object and its posterior is there instead."""
    source = Source.of(data)
    home = source.data if setup.joint else source.modality(setup.rna_mod, "rna_mod")
    return bool(entry_of(home, key).get(MINIFIED, False))


def read_stored(source: Source, setup: Setup, key: str, model_id: str) -> Stored:
    """What a minified object knows of each cell.

    Parameters
    ----------
    source
        The object, minified for the model.
    setup
        How the model reads data.
    key
        Prefix of the model's slots.
    model_id
        What the model's weights are told by.

    Raises
    ------
    KeyError, ValueError
        If a slot is missing, cells have no posterior, or it is that of another model.
    """
    # whose posterior it is, and whether all of it is there
    rna, where = source.modality(setup.rna_mod, "rna_mod"), source.name(setup.rna_mod)
    containers.unique_names(rna.obs_names, f"{where}.obs_names", "cell")
    part = slots.home(source.data, setup)
    record = entry_of(part, key).get(POSTERIOR, {})
    if str(record.get("model", "")) != model_id:
        raise ValueError(
            f"This object was minified for another model under the key '{key}': obsm['{slots.qz_mean(key)}'] is not "
            "the posterior of the one that is asked. Ask the model that minified it, or the object from before."
        )
    wanted = [("obsm", slots.qz_mean(key)), ("obsm", slots.qz_var(key)), ("obs", slots.library(key))]
    wanted += [("obs", slots.mask_code(key))] if setup.joint else []
    for kind, name in wanted:
        if name not in getattr(part, kind):
            raise KeyError(f"The object is minified for '{key}', but {kind}['{name}'] is gone; minify it again.")
    # the slots, cells in the order of their names
    every = cell_names(source, setup.rna_mod, setup.mod_beside)
    names = pd.Index(np.sort(np.asarray(every, dtype=object)))
    row = part.obs_names.get_indexer(names)
    q_mean, q_var = (np.asarray(part.obsm[slot(key)], np.float32)[row] for slot in (slots.qz_mean, slots.qz_var))
    library = part.obs[slots.library(key)].to_numpy(dtype=np.float64, na_value=np.nan)[row]
    gaps = {f"obsm['{slots.qz_mean(key)}']": ~np.isfinite(q_mean).all(1)}  # (cells,) each
    gaps |= {
        f"obsm['{slots.qz_var(key)}']": ~np.isfinite(q_var).all(1),
        f"obs['{slots.library(key)}']": np.isnan(library),
    }
    table = code = None
    if setup.joint:
        table = np.asarray(record.get("measured", ()), dtype=bool)
        code = pd.to_numeric(part.obs[slots.mask_code(key)].astype(str), errors="coerce").to_numpy()[row]
        gaps[f"obs['{slots.mask_code(key)}']"] = np.isnan(code)
        code = np.nan_to_num(code).astype(np.int64)
    # cells that came later, and damage
    if (unknown := np.logical_and.reduce([*gaps.values()])).any():
        raise ValueError(
            f"{unknown.sum()} cells (first: '{names[unknown][0]}') have nothing in obsm['{slots.qz_mean(key)}']: they "
            f"came after av.tl.minify. Ask about them apart, with their counts and model=av.get.model(data, '{key}')."
        )
    for slot, gap in gaps.items():
        if gap.any():
            raise ValueError(
                f"{slot} has no number for {gap.sum()} cells (first: '{names[gap][0]}'), as av.tl.minify left none: "
                "minify the object from before, with its counts, again."
            )
    if q_mean.shape != q_var.shape or (q_var <= 0).any() or (library < 0).any():
        raise ValueError(f"obsm['{slots.qz_mean(key)}'] or what stands beside it is damaged: minify the object again.")
    fits = not setup.joint or (table.ndim == 2 and table.shape[1] == len(setup.proteins))
    if not fits or (setup.joint and not np.isin(code, range(len(table))).all()):
        raise ValueError(
            f"obs['{slots.mask_code(key)}'] does not go with uns['{key}']['{POSTERIOR}']['measured']: the object is "
            "damaged. Minify it again."
        )
    view = None
    if slots.rna_view(key) in part.obsm:
        view = np.asarray(part.obsm[slots.rna_view(key)], np.float32)[row]
    return Stored(names.to_numpy(), q_mean, q_var, library, table, code, view)


def write_posterior(out: slots.Writer, setup: Setup, key: str, model_id: str, stored: Stored) -> None:
    """Write what stands in for counts into its slots; the counts stay."""
    out.obsm(slots.qz_mean(key), stored.q_mean)
    out.obsm(slots.qz_var(key), stored.q_var)
    out.obs(slots.library(key), stored.library.astype(np.float32))
    if stored.rna_view is not None:
        out.obsm(slots.rna_view(key), stored.rna_view)
    record: dict = {"model": model_id, "mods": [setup.rna_mod, *([setup.prot_mod] if setup.joint else [])]}
    if setup.joint:
        patterns = [str(i) for i in range(len(stored.mask_table))]
        out.obs(slots.mask_code(key), pd.Categorical.from_codes(stored.mask_row, categories=patterns))
        record["measured"] = stored.mask_table
    out.params(key, POSTERIOR, record)
    out.params(key, MINIFIED, False)


def drop_counts(data: Data, setup: Setup) -> list[str]:
    """Empty the modalities that a model reads, and mark the models that have a posterior there; returns what is empty.

    In each modality these are X, the model's layer, every other layer of counts, and raw. Of an AnnData with proteins
    it is also their table in obsm, whose column names move to `uns["{prot_obsm}_names"]`, where they are looked for.
    """
    # marked first: whatever cuts this short, no model asks for counts that may be gone
    if isinstance(data, AnnData):
        _mark(data, None)
        emptied = _empty(data, setup.rna_layer, "data")
        if setup.joint and setup.prot_obsm in data.obsm:
            table = data.obsm[setup.prot_obsm]
            if isinstance(table, pd.DataFrame):
                slots.writer_into(data).uns(slots.names_of(setup.prot_obsm), list(map(str, table.columns)))
            data.obsm[setup.prot_obsm] = sparse.csr_matrix(table.shape, dtype=np.float32)
            emptied.append(f"data.obsm['{setup.prot_obsm}']")
        return emptied
    layers = {setup.rna_mod: setup.rna_layer} | ({setup.prot_mod: setup.prot_layer} if setup.joint else {})
    there = {mod: layer for mod, layer in layers.items() if mod in data.mod}
    for part in (data, *data.mod.values()):
        _mark(part, set(there))
    return [slot for mod, layer in there.items() for slot in _empty(data.mod[mod], layer, f"mdata['{mod}']")]


def _mark(part: Data, mods: set[str] | None) -> None:
    """Mark every model whose posterior is stored and whose counts were in one of the modalities; None: in any."""
    for key in list(part.uns):
        record = entry_of(part, key).get(POSTERIOR)
        if record is not None and (mods is None or mods & set(map(str, record["mods"]))):
            slots.writer_into(part).params(key, MINIFIED, True)


def _empty(adata: AnnData, layer: str | None, where: str) -> list[str]:
    """Empty X, a layer, and all layers of counts of a modality; drop raw."""
    emptied = []
    if adata.X is not None:
        adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
        emptied.append(f"{where}.X")
    for name, values in list(adata.layers.items()):
        if name is not None and (name == layer or looks_like_counts(values, missing_allowed=True)):
            adata.layers[name] = sparse.csr_matrix(adata.shape, dtype=np.float32)
            emptied.append(f"{where}.layers['{name}']")
    if adata.raw is not None:
        del adata.raw
        emptied.append(f"{where}.raw")
    return emptied
