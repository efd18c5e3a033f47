"""Are these raw counts? Checks that name the slot, the cell, the feature and the next command."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from anvi._stream import put

from . import containers, slots
from .antibodies import match_antibodies
from .containers import Data, Source, by_rows, compact, lazy, listed, whole

if TYPE_CHECKING:
    from torch import Tensor

    from .setup import Setup

logger = logging.getLogger("anvi")

ANTIBODIES = ("antibody capture", "antibody", "adt", "cite", "cite-seq", "protein", "protein expression")
NO_PROTEINS = ("gene expression", "multiplexing capture", "crispr guide capture", "peaks", "atac", "hto")
"""What `var["feature_types"]` says of features that are no antibodies against proteins, in lower case."""
NO_GENES = (*ANTIBODIES, *NO_PROTEINS[1:], "antigen capture", "custom")
"""The same of features that are no genes: Cell Ranger's words and short ones."""

OFFENCES = ("NaN", "infinite", "negative", "too large", "non-integer")
"""What is wrong with a value that is no count; the first one found is the one that is named."""
MOST = 1e9
"""No cell has so many molecules of anything; sums of larger numbers are no longer exact, or infinite."""
BLOCK = 1_000_000
"""Values that are looked at together: the check must not need as much memory as the counts."""


def matrix_name(layer: str | None) -> str:
    """How a user would write a layer of a modality; None is `.X`."""
    return "X" if layer is None else f"layers['{layer}']"


def stored_counts(adata: AnnData, layer: str | None, where: str):
    """Counts of a modality as they are stored: dense, csr, csc, or in a file."""
    there = ", ".join(f"'{name}'" for name in adata.layers if name) or "none"
    if layer is None:
        if adata.X is None:
            raise ValueError(f"{where}.X is empty; pass layer=... ({there} are there).")
        counts = adata.X
    elif layer in adata.layers:
        counts = adata.layers[layer]
    else:
        there, slot = f"there are: {there}", f"{where}.layers['{layer}']"
        remedy = f"Where {where}.X has the counts: {slot} = {where}.X"
        raise KeyError(f"layer='{layer}' is not in {where}.layers; {there}. {remedy}")
    if lazy(counts):
        return counts
    return whole(counts, f"{where}.{matrix_name(layer)}")


def canonical(counts, where: str) -> sparse.csr_matrix:
    """Counts as csr in float32, each entry once, in order and not zero, sharing memory where it can.

    Zeros that are stored would be drawn for as if they were counts.
    """
    counts = whole(counts, where)
    if hasattr(counts, "to_numpy"):
        counts = counts.to_numpy()
    if not sparse.issparse(counts):
        counts = np.asarray(counts)
    csr = sparse.csr_matrix(counts, dtype=np.float32, copy=False)
    if csr.indptr[-1] < len(csr.data):  # room that nothing is in
        csr = csr.copy()
        csr.prune()
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    if np.count_nonzero(csr.data) < len(csr.data):
        csr = csr.copy()
        csr.eliminate_zeros()
    return csr


def check_counts(
    counts,
    cell_names,
    feature_names,
    where: str,
    adata: AnnData | None,
    *,
    mod: str | dict[str, str] | None = None,
    missing_allowed: bool = False,
    seen: str = "",
) -> None:
    """Raise a ValueError at the first value that is not a count.

    Parameters
    ----------
    counts
        Dense array or csr `(cells, features)`.
    cell_names, feature_names
        Names of rows and columns.
    where
        The slot, for the message.
    adata
        The modality, to look for a layer that does hold counts; None where there is none.
    mod
        The modality's name in a MuData, where layers are named per modality; or the layers passed, this one's last.
    missing_allowed
        Whether NaN means "not measured" (proteins) and is fine.
    seen
        How far a matrix has been read, where this is not all of it.
    """
    values = counts.data if sparse.issparse(counts) else np.asarray(counts).ravel()
    first, number = dict.fromkeys(OFFENCES), dict.fromkeys(OFFENCES, 0)
    for start in range(0, len(values), BLOCK):
        part = values[start : start + BLOCK]
        for kind, offends in () if _all_counts(part) else _offences(part, missing_allowed):
            if offends.any():
                first[kind] = start + int(offends.argmax()) if first[kind] is None else first[kind]
                number[kind] += int(offends.sum())
    for kind, position in first.items():
        if position is not None:
            row, column = _row_and_column(counts, position)
            raise ValueError(
                f"{where} holds {kind} values where raw counts are expected: {values[position]!s} at cell "
                f"'{cell_names[row]}', feature '{feature_names[column]}', and {number[kind] - 1} more{seen}. "
                f"{_advice(kind, counts, adata, where, mod, missing_allowed)}"
            )
    found = made_whole(counts)
    if found is not None:
        raise ValueError(
            f"{where} holds whole numbers that are no counts: {found}. "
            f"{_advice('rounded', counts, adata, where, mod, missing_allowed)}"
        )


def _all_counts(values: np.ndarray) -> bool:
    """Whether there is nothing but counts, in few passes; a NaN is none."""
    return bool(values.min() >= 0 and float(values.max()) <= MOST and (values == np.rint(values)).all())


def _offences(values: np.ndarray, missing_allowed: bool) -> Iterator[tuple[str, np.ndarray]]:
    """For each kind of offence, in the order of `OFFENCES`, which values commit it."""
    missing = np.isnan(values)
    each = (
        missing & (not missing_allowed),
        np.isinf(values),
        values < 0,
        values > MOST,
        ~missing & (values != np.rint(values)),
    )
    return zip(OFFENCES, each, strict=True)


ALIKE = 0.1
"""Share of the cells of one modality alone above which names that are nearly the same are no chance: barcodes recur."""
NAMED = 20
"""Cells that a remedy lists by name, at most."""


def check_no_empty_cells(sums: np.ndarray, cell_names, where: str, chosen: str = "") -> None:
    """Raise a ValueError if a cell has no RNA count at all; `chosen` is code for the genes, where they are a choice."""
    if not len(empty := np.flatnonzero(sums == 0)):
        return
    shown = listed((f"'{cell_names[i]}'" for i in empty), 3)
    part, slot = where.split(".", 1)
    data = part.partition("[")[0]  # data, or mdata of a modality
    first = "Choose more genes, or leave these cells out" if chosen else "Remove them first"
    if 1 < len(empty) == len(sums) and not chosen:
        first = "Where are the counts? If they were minified, and joined or copied without uns, give it back"
        remedy = f"{part}.uns.update({part.replace(data, 'minified')}.uns); {data}.uns.update(minified.uns)"
    elif len(empty) <= NAMED:  # of what has no RNA, nothing is left out
        remedy = f"{data} = {data}[~{data}.obs_names.isin({[str(cell_names[i]) for i in empty]})].copy()"
    else:
        first += " (genes: the names of those of the model)" * (chosen == "genes")
        counts = f"{part}[:, {chosen.format(part)}].{slot}" if chosen else f"{where}[:]"
        leave_out = f"{data} = {data}[~{data}.obs_names.isin({part}.obs_names[none])].copy()"
        remedy = f"none = numpy.ravel({counts}.sum(1)) == 0; {leave_out}"
    of = f" in the genes of the model ({shown})" if chosen else f" ({shown})"
    raise ValueError(f"{where} has {len(empty)} cells without a single count{of}. {first}: {remedy}")


def looks_like_counts(counts, *, missing_allowed: bool = False) -> bool:
    """Whether the first values are whole and not negative."""
    counts = next(by_rows(counts, "a layer"))[1] if lazy(counts) else counts
    values = counts.data if sparse.issparse(counts) else np.asarray(counts).ravel()
    values = values[:100_000]
    if values.dtype.kind not in "biuf":
        return False
    values = values[~np.isnan(values)] if missing_allowed else values
    return len(values) > 0 and _all_counts(values) and made_whole(counts) is None


FEWEST_CELLS = 50
"""Cells below which nothing is said of how counts vary."""
LARGEST_LOG = 20.0
"""No log1p of normalised counts is as large; counts of a data set nearly always are, somewhere."""
LEAST_VARIANCE = 0.2
"""Variance over mean of a feature: at least about 1 for counts of molecules, by chance rarely below 0.5 in 50 cells."""


def made_whole(counts) -> str | None:
    """Why whole numbers can be no counts but are logarithms or normalised values, rounded; None if they may be counts.

    Logarithms are small (at most `LARGEST_LOG`), and either a feature varies less than any count can, or in features
    that are rarely seen (mean below 1/2) 1 is not half as common as the commonest value. Normalised values have totals
    that are nearly the same, but for rounding; counts that were drawn down to one total have that very total.
    """
    counts = counts if sparse.issparse(counts) else np.asarray(counts)
    x = counts[:: max(1, -(-counts.shape[0] // 500))].astype(np.float32)
    missing = np.isnan(x.data if sparse.issparse(x) else x).any()
    if missing:
        x = x.toarray() if sparse.issparse(x) else x
        x = x[:, ~np.isnan(x).all(0)]
        x = x[~np.isnan(x).all(1)]
        missing = np.isnan(x).any()
    if x.shape[0] < FEWEST_CELLS or not x.shape[1]:
        return None
    totals, largest = (np.nansum(x, 1), np.nanmax(x)) if missing else (np.ravel(x.sum(1)), x.max())
    if not missing and 0 < totals.std() and _alike(totals):
        return f"the totals of all cells are nearly the same ({totals.min():.0f} to {totals.max():.0f})"
    if largest > LARGEST_LOG or largest <= 1:  # the latter says what is there, and no more
        return None
    x = x.toarray() if sparse.issparse(x) else x
    mean, variance = np.nanmean(x, 0), np.nanvar(x, 0)
    often = np.flatnonzero((mean >= 1) & (variance > 0))  # a constant feature says nothing
    if len(often) and (ratio := variance[often] / mean[often]).min() < LEAST_VARIANCE:
        at = often[ratio.argmin()]
        return (
            f"none is above {largest:.0f}, and one feature has mean {mean[at]:.2g} and variance {variance[at]:.2g}, "
            "while counts vary at least as much as their mean"
        )
    rare = x[:, mean < 0.5]
    values, times = np.unique(rare[rare > 0], return_counts=True)
    if times.sum() >= 100 and times[values == 1].sum() < times.max() / 2:
        return (
            f"none is above {largest:.0f}, and the commonest value of rare features is {values[times.argmax()]:.0f}, "
            "not 1"
        )
    return None


def _alike(totals: np.ndarray) -> bool:
    """Whether cells have the same total but for rounding: counts drawn at random vary more even in cells all alike."""
    mean = totals.mean()
    values, times = np.unique(totals, return_counts=True)
    drawn_down = values[times.argmax()] == values[-1]  # some miss a total from below; rounding goes both ways
    return bool(mean > 100 and totals.std() < min(0.005 * mean, 0.5 * np.sqrt(mean)) and not drawn_down)


def _advice(kind: str, counts, adata: AnnData | None, where: str, mod, missing_allowed: bool) -> str:
    """What to do about values that are no counts, by what they look like; never what makes garbage pass."""
    part = where.rpartition(".X")[0]
    for name, layer in {} if adata is None else adata.layers.items():
        if name and looks_like_counts(layer, missing_allowed=missing_allowed):
            argument = name if mod is None else {mod: name} if isinstance(mod, str) else {**mod, [*mod][-1]: name}
            free = "X" + "_" * ("X" in adata.layers)
            change = f"{part}.layers['{free}'], {part}.X = {part}.X, {part}.layers[{name!r}].copy()"
            told = f". To ask a fit that has read X, put them back there: {change}" if part else ""
            return f"Counts seem to be in layer '{name}': pass layer={argument!r}{told}."
    if part and adata is not None and adata.raw is not None and adata.var_names.isin(adata.raw.var_names).all():
        if looks_like_counts(adata.raw.X, missing_allowed=missing_allowed):
            return f"Counts seem to be in .raw: {where} = {part}.raw[:, {part}.var_names].X"
    sample = (counts.data if sparse.issparse(counts) else np.asarray(counts).ravel())[:BLOCK]
    sample = sample[np.isfinite(sample) & (sample != 0)]
    if kind == "rounded":
        return "Rounding makes no counts. Take the object from before it was normalised."
    if kind == "NaN" and (sample > 0).all() and (sample == np.rint(sample)).all() and part:
        data = part.partition("[")[0]
        keep = f"keep = numpy.isfinite(numpy.asarray({where}.sum(0)).ravel())"
        cut = f"{part} = {part}[:, keep].copy()"
        if data != part:
            cut = f"{data}.mod{part.removeprefix(data)} = {part}[:, keep].copy(); {data}.update()"
        return f"An outer join leaves NaN in genes that some of its objects lack; keep those of all: {keep}; {cut}"
    if kind == "too large":
        return f"No cell has more than {MOST:.0e} molecules of anything; look where they come from."
    if kind == "infinite":
        return "Something was divided by zero, or a logarithm taken of it; take the object from before that."
    if len(sample) and (sample < 0).any():
        return "They look scaled or centred; rounding makes no counts of them. Take the object from before that."
    if len(sample) and (np.abs(sample - np.rint(sample)) < np.maximum(1e-3, 1e-6 * sample)).all():
        return f"They are whole but for errors of arithmetic, as after expm1: {where} = numpy.rint({where})."
    if len(sample) and sample.max() < LARGEST_LOG and (sample != np.rint(sample)).mean() > 0.5:
        return (
            "They look like logarithms (log1p of normalised counts); rounding makes no counts of them. Take the object "
            "from before sc.pp.log1p and sc.pp.normalize_total, or keep its counts in a layer."
        )
    rows = [data for row in sparse.csr_matrix(counts[:200]) if len(data := row.data[row.data > 0]) > 4]
    unit = {row.min(): row / row.min() for row in rows}  # what one count became, another value in each cell
    multiples = [np.allclose(row, np.rint(row), rtol=1e-4, atol=0) for least, row in unit.items() if least != 1]
    if sum(multiples) > 0.8 * max(1, len(rows)) or _alike(np.asarray(counts[:1000].sum(1), dtype=np.float64).ravel()):
        return "They look normalised by totals of cells; rounding makes no counts of them. Take the object from before."
    return f"Put the raw counts there; corrected counts (SoupX) can be rounded: {where} = numpy.rint({where})."


def _row_and_column(counts, position: int) -> tuple[int, int]:
    if sparse.issparse(counts):
        return int(np.searchsorted(counts.indptr, position, side="right") - 1), int(counts.indices[position])
    return divmod(position, counts.shape[1])


MINIFIED = "minified"
"""Entry of `uns[key]`: whether the counts that the model was asked about are gone."""


def entry_of(part: Data, key: str) -> dict:
    """The entry of `uns[key]`; empty where there is none, or no dict."""
    entry = part.uns.get(key, {})
    return entry if isinstance(entry, dict) else {}


def check_counts_are_there(counts, source: Source, where: str) -> None:
    """Raise a ValueError if a matrix of counts is empty because they were dropped by `tl.minify`."""
    if hasattr(counts, "group"):
        empty = not counts.group["data"].shape[0]
    else:
        empty = sparse.issparse(counts) and not counts.nnz
    if not empty:
        return
    keys = [key for part in source.parts for key in part.uns if bool(entry_of(part, key).get(MINIFIED, False))]
    if keys:
        raise ValueError(
            f"{where} is empty: av.tl.minify dropped the counts of this object for the model '{keys[0]}'. That model "
            f"still answers what needs the latent space alone (model='{keys[0]}'). For a fit, for another model and "
            "for what looks at counts, take the object from before, or minify with keep_counts=True."
        )


@dataclass(frozen=True)
class Proteins:
    """Protein counts of the cells that have a protein row; NaN where the user says "not measured"."""

    cells: pd.Index
    names: tuple[str, ...]
    counts: np.ndarray  # (cells with proteins, proteins) uint8, uint16 or float32, NaN kept
    declared: pd.DataFrame | None  # varm["measured"], proteins x panels
    where: str  # the slot, for messages
    named: bool = True  # False: an array without names, called protein_0, ...
    matched: pd.DataFrame | None = None  # of `match_antibodies`, where names are not those of the model


def has_proteins(source: Source, setup: Setup) -> bool:
    """Whether proteins are where the setup looks for them, and any are left."""
    stored = source.data.obsm.get(setup.prot_obsm) if source.alone else source.mods.get(setup.prot_mod)
    return stored is not None and stored.shape[1] > 0


def find_proteins(source: Source, setup: Setup) -> Proteins:
    """Read and check protein counts, once for a source, and what varm says of who measured what.

    With proteins in the setup, names are the setup's wherever an antibody is found under another one.

    Raises
    ------
    KeyError, ValueError
        If they are not there, names repeat, or the values are not counts (NaN is "not measured").
    """
    read = _from_obsm if source.alone else _from_modality
    stored = ("proteins", setup.prot_mod, setup.prot_obsm, setup.prot_layer)
    proteins = source.once(stored, lambda: read(source, setup))
    return source.once((*stored, setup.proteins), lambda: _as_model_names(proteins, setup.proteins))


def _from_modality(source: Source, setup: Setup) -> Proteins:
    prot, where = source.modality(setup.prot_mod, "prot_mod"), source.name(setup.prot_mod)
    containers.unique_names(prot.obs_names, f"{where}.obs_names", "cell")
    containers.unique_names(prot.var_names, f"{where}.var_names", "protein")
    slot, stored = f"{where}.{matrix_name(setup.prot_layer)}", stored_counts(prot, setup.prot_layer, where)
    check_counts_are_there(stored, source, slot)
    names, layers = tuple(map(str, prot.var_names)), {setup.prot_mod: ""}
    layers = layers if setup.rna_layer is None else {setup.rna_mod: setup.rna_layer} | layers
    counts = _proteins(stored, prot.obs_names, names, slot, prot, layers)
    return Proteins(prot.obs_names, names, counts, slots.read_measured(prot), slot)


def _from_obsm(source: Source, setup: Setup) -> Proteins:
    adata, key = source.data, setup.prot_obsm
    if key is None:
        raise ValueError(
            "An AnnData needs prot_obsm=..., the name of the protein counts in obsm. "
            f"In obsm there are: {', '.join(adata.obsm) or 'none'} (columns of obs that hold them belong there)."
        )
    if key not in adata.obsm:
        raise KeyError(f"prot_obsm='{key}' is not in adata.obsm; there are: {', '.join(adata.obsm) or 'none'}.")
    table, where = adata.obsm[key], f"adata.obsm['{key}']"
    # the latter as in scvi-tools
    beside = [slot for slot in (slots.names_of(key), "protein_names") if slot in adata.uns]
    if isinstance(table, pd.DataFrame):
        names = tuple(map(str, table.columns))
    elif beside and setup.proteins != _nameless(table.shape[1]):  # a model of proteins without names knows their order
        names = tuple(map(str, np.asarray(adata.uns[beside[0]], dtype=object).ravel()))
        if len(names) != table.shape[1]:
            raise ValueError(
                f"adata.uns['{beside[0]}'] has {len(names)} names for {table.shape[1]} proteins in {where}; "
                f"{_naming(where)}."
            )
    else:
        names = _nameless(table.shape[1])
    containers.unique_names(pd.Index(names), where, "protein")
    check_counts_are_there(table, source, where)
    try:
        counts = _proteins(table, adata.obs_names, names, where, None, None)
    except ValueError as error:
        for slot, other in adata.obsm.items():
            if getattr(other, "shape", ())[1:] == table.shape[1:] and looks_like_counts(other, missing_allowed=True):
                raise ValueError(f"{error} Counts seem to be in obsm['{slot}']: pass prot_obsm='{slot}'.") from error
        raise
    return Proteins(adata.obs_names, names, counts, None, where, named=isinstance(table, pd.DataFrame) or bool(beside))


def _nameless(n_proteins: int) -> tuple[str, ...]:
    """What proteins without names are called."""
    return tuple(f"protein_{i}" for i in range(n_proteins))


def _naming(where: str) -> str:
    """How to name the columns of an array in obsm."""
    own = where.replace("obsm", "uns", 1).replace("']", "_names']")
    return f"name them: {own} = [...]"


def _as_model_names(proteins: Proteins, model: tuple[str, ...]) -> Proteins:
    """The same counts under the names that a model has for them; what has no partner keeps its own."""
    where, n = proteins.where, len(proteins.names)
    if not proteins.named and not model:
        logger.warning(f"the {n} proteins in {where} have no names: called protein_0, ...; {_naming(where)}")
    if set(model) <= set(proteins.names):
        return proteins
    if not proteins.named and n != len(model):
        raise ValueError(
            f"{where} has {n} columns without names, and the model has {len(model)} proteins "
            f"({', '.join(model[:3])}, ...): which is which cannot be told. As the model does, {_naming(where)}."
        )
    if not proteins.named:
        logger.warning(
            f"the proteins in {where} have no names: taken for the model's {n} by position; {_naming(where)}"
        )
        return replace(proteins, names=model)
    table = match_antibodies(proteins.names, model)
    names = tuple(table["matched_to"].where(table["matched_to"].notna(), table["name"]))
    declared = proteins.declared
    if isinstance(declared, pd.DataFrame):
        declared = declared.rename(index=dict(zip(proteins.names, names, strict=True)))
    return replace(proteins, names=names, declared=declared, matched=table)


def _proteins(
    stored, cells: pd.Index, names: tuple[str, ...], where: str, adata: AnnData | None, mod: dict[str, str] | None
) -> np.ndarray:
    """Counts `(cells, proteins)`, compact unless some are NaN, read and checked some cells at a time."""
    stored = stored if lazy(stored) else whole(stored, where)
    counts = np.zeros(stored.shape, dtype=np.uint8)
    for rows, piece in by_rows(stored, where):
        read = _dense(piece, cells[rows], names, where)
        seen = containers.how_far(rows, len(cells))
        check_counts(read, cells[rows], names, where, adata, mod=mod, missing_allowed=True, seen=seen)
        counts = put(counts, rows, compact(read))
    return counts


def _dense(counts, cells: pd.Index, names: tuple[str, ...], where: str) -> np.ndarray:
    """Counts as float32; a ValueError names the first cell that holds something else than a number."""
    if sparse.issparse(counts):
        counts = counts.toarray()
    try:
        return np.asarray(counts, dtype=np.float32)
    except (TypeError, ValueError):  # text, or pandas' NA
        table = pd.DataFrame(counts).astype(object)
    numbers, text = table.apply(pd.to_numeric, errors="coerce"), table.astype(str).apply(lambda one: one.str.lower())
    bad = (numbers.isna() & table.notna() & (text != "nan")).to_numpy()
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"{where} holds {table.iat[row, column]!r}, which is no number, at cell '{cells[row]}', protein "
            f"'{names[column]}', and {bad.sum() - 1} more. What was not measured is NaN (numpy.nan)."
        )
    return numbers.to_numpy(dtype=np.float32, na_value=np.nan)


def check_feature_types(part: AnnData, where: str, prot_mod: str) -> None:
    """Raise a ValueError if antibodies, hashtags, guides or peaks stand among the genes."""
    found = _strangers(part.var, where, NO_GENES, "genes")
    if found is None:
        return
    column, kind, gene, said = found
    data, antibodies = "adata" if where == "data" else where, kind.casefold() in ANTIBODIES

    def those(kind: str) -> str:
        return f"{data}[:, {data}.var['{column}'] == '{kind}'].copy()"

    if data != "adata":
        moved = f"mdata.mod['{prot_mod}'] = {those(kind)}; " if antibodies and prot_mod else ""
        remedy = f"{moved}mdata.mod[{where[6:-1]}] = {those(gene)}; mdata.update()"
    elif antibodies:
        remedy = f"mdata = mudata.MuData({{'rna': {those(gene)}, 'prot': {those(kind)}}})"
    else:
        remedy = f"adata = {those(gene)}"
    raise ValueError(f"{said}, and a fit would learn them as genes. Split them first: {remedy}")


def check_protein_types(var: pd.DataFrame, where: str, mod: str) -> None:
    """Raise a ValueError if genes, guides, tags of samples or peaks stand among the proteins of a fit."""
    if found := _strangers(var, where, NO_PROTEINS, "antibodies"):
        column, _, antibody, said = found
        raise ValueError(
            f"{said}, and a fit would learn them as proteins. Leave them out first: mdata.mod['{mod}'] = "
            f"{where}[:, {where}.var['{column}'] == '{antibody}'].copy(); mdata.update()"
        )


def _strangers(
    var: pd.DataFrame, where: str, strangers: tuple[str, ...], what: str
) -> tuple[str, str, str, str] | None:
    """The column that tells of features of other kinds, the kind of most of these and of the rest, and what it says."""
    for column in [name for name in ("feature_types", "feature_type") if name in var]:
        kinds = var[column].astype(str)
        strange = kinds.str.casefold().isin(strangers)
        if strange.any() and not strange.all():
            kind, rest = kinds[strange].mode()[0], kinds[~strange].mode()[0]
            shown = f"{where}.var['{column}'] says '{kind}' of {listed(var.index[strange], 3)}"
            return column, kind, rest, f"{strange.sum()} of the {len(var)} features in {where} are no {what}: {shown}"
    return None


def check_orientation(source: Source, rna_mod: str, prot_mod: str | None) -> None:
    """Raise a ValueError if a modality has its cells in columns: by barcodes, or by names that are cells elsewhere."""
    mods = {rna_mod: source.modality(rna_mod, "rna_mod")}
    mods |= {name: part for name, part in source.mods.items() if name == prot_mod}
    for name, part in mods.items():
        others = [other.obs_names for other in mods.values() if other is not part]
        # most of them: a gene and a protein may share a name
        of_cells = any(
            2 * part.var_names.isin(cells).sum() > part.n_vars and not part.obs_names.isin(cells).any()
            for cells in others
        )
        # names of antibodies may end in an oligonucleotide: barcodes speak of RNA alone
        if of_cells or (name == rna_mod and _barcodes(part.var_names) and not _barcodes(part.obs_names)):
            where = source.name(name)
            turned = ", ".join(f"{m!r}: mdata[{m!r}]{'.T.copy()' * (m == name)}" for m in mods)
            remedy = "adata = adata.T.copy()" if source.alone else f"mdata = mudata.MuData({{{turned}}})"
            raise ValueError(
                f"{where} has cells in its columns: var_names are {part.var_names[0]!r}, ..., and obs_names "
                f"{part.obs_names[0]!r}, .... Turn it round, then set the columns of obs: {remedy}"
            )


def _barcodes(names: pd.Index) -> bool:
    """Whether most of the first names hold a cell's barcode."""
    some = names[:100].astype(str)
    return bool(len(some)) and some.str.contains("[ACGT]{12}").mean() > 0.5


def check_names_agree(cells: pd.Index, where: str, rna: AnnData, *, whole: bool) -> None:
    """Raise a ValueError if no cell has both RNA and proteins: never in `whole` data, else if names look alike."""
    if len(cells) and len(rna) and not cells.isin(rna.obs_names).any():
        there, here = str(cells[0]), pd.Index(rna.obs_names.astype(str))
        longer = next((name for name in here if name.startswith(there) or there.startswith(name)), None)
        if longer is None and not whole:
            return
        remedy = "write them alike in both"
        if longer is not None:
            suffix = longer[len(there) :] or there[len(longer) :]
            shorter, other = ("prot", "rna") if longer.startswith(there) else ("rna", "prot")
            names = f"mdata['{shorter}'].obs_names += {suffix!r}"
            if not suffix.strip():  # blanks, or the end of a line
                names = f"mdata['{other}'].obs_names = mdata['{other}'].obs_names.str.strip()"
            remedy = f"{names}; mdata = mudata.MuData(dict(mdata.mod))"
        raise ValueError(
            f"None of the {len(cells)} cells that have proteins is among the {len(here)} with RNA: are their "
            f"names written differently? '{there}' in {where} and '{longer or here[0]}' in the RNA. "
            f"Make them the same: {remedy}."
        )


def nearly_the_same(names: np.ndarray, has_rna: Tensor | None, has_protein: Tensor | None) -> str | None:
    """What to say of cells with one modality alone whose names differ from those of the other by "-1" or blanks."""
    if has_rna is None or has_protein is None:
        return None
    of_rna, of_proteins = names[(has_rna & ~has_protein).numpy()], names[~has_rna.numpy()]
    ending = r"(?:-\d+)?\s*$"
    plain, theirs = (pd.Index(some).astype(str).str.replace(ending, "", regex=True) for some in (of_rna, of_proteins))
    same = theirs.isin(plain[~plain.duplicated(keep=False)]) & ~theirs.duplicated(keep=False)
    if same.sum() < max(2, ALIKE * min(len(plain), len(theirs))):
        return None
    return (
        f"{same.sum()} of the {len(theirs)} cells with proteins alone are named like cells with RNA alone, but for how "
        f"names end ('{of_proteins[same][0]}' and '{of_rna[plain.get_loc(theirs[same][0])]}'): if they are the same, "
        "write them alike in both"
    )
