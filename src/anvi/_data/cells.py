"""All tensors of a data set: modalities joined by name once, counts as CSR, everything else as codes."""

import logging
import math
import zlib
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from anndata.abc import CSCDataset
from scipy import sparse
from torch import Tensor

from anvi._backed import in_file, name_of_file
from anvi._stream import CSR, Streamed, put, widened

from . import containers
from .antibodies import names_no_target, tell_proteins
from .containers import Data, Source, by_rows, cell_names, compact, lend_rna, listed
from .counts import (
    FEWEST_CELLS,
    Proteins,
    canonical,
    check_counts,
    check_counts_are_there,
    check_no_empty_cells,
    find_proteins,
    has_proteins,
    matrix_name,
    nearly_the_same,
    stored_counts,
)
from .labels import read_labels
from .minified import Stored
from .setup import FEW_CELLS, Setup, genes_in_code, library_means, new_panels, numeric_column, true_or_false

logger = logging.getLogger("anvi")


@dataclass(frozen=True, eq=False)
class Cells:
    """A data set as tensors.

    Cells are sorted by name, so that the order of any modality changes nothing; but where counts are streamed, which
    goes by the order of the file, they are in this one.
    """

    names: np.ndarray  # (cells,)
    x: CSR | Streamed  # RNA counts
    x_row: Tensor  # (cells,) row of each cell in x
    y: Tensor | None  # (cells, proteins) protein counts, 0 where not measured; uint8, uint16 or float32
    mask_table: Tensor | None  # (distinct panels and NaN patterns, proteins) bool
    mask_row: Tensor | None  # (cells,) row of each cell in mask_table
    batch: Tensor  # (cells,) codes
    panel: Tensor | None  # (cells,) codes
    codes: Tensor | None  # (cells, injected covariates) rows of the covariate table
    continuous: Tensor | None  # (cells, continuous covariates)
    log_library: Tensor  # (cells, 1) NaN where it is known only when the counts are read: ask `sizes`
    label: Tensor  # (cells,) class codes, -1 for unlabelled
    q_mean: Tensor | None = None  # (cells, latent) stored posterior mean, where the counts are gone (minified data)
    q_var: Tensor | None = None  # (cells, latent) stored posterior variance
    rna_view: Tensor | None = None  # (cells, latent + components) stored, for imputation
    label_table: Tensor | None = None  # (distinct labels, classes) bool, what each leaves open; None: one class, or all
    label_row: Tensor | None = None  # (cells,) row of each cell in label_table
    has_rna: Tensor | None = None  # (cells,) bool; None: all cells have
    rank: Tensor | None = None  # (cells,) place of each cell by name; None: they are in this order

    def __len__(self) -> int:
        return len(self.names)

    @property
    def streamed(self) -> bool:
        """Whether RNA counts stay in their file."""
        return isinstance(self.x, Streamed)

    @property
    def with_rna(self) -> Tensor | slice:
        """What picks the cells with RNA."""
        return slice(None) if self.has_rna is None else self.has_rna

    def sizes(self, index: Tensor | None = None) -> Tensor:
        """Log library sizes of some cells, or all `(cells, 1)`; counts that have not been read yet are read."""
        index = torch.arange(len(self), device=self.label.device) if index is None else index
        found = self.log_library[index]
        if self.streamed and self.x.indptr is None and bool((unknown := found.isnan().squeeze(1)).any()):
            sums = self.x.sum_of(self.x_row[index[unknown]]).numpy()
            found[unknown] = torch.from_numpy(np.log(sums).astype(np.float32))[:, None].to(found.device)
        return found

    def proteins(self, index: Tensor) -> Tensor:
        """Protein counts of some cells `(cells, proteins)`, as float32."""
        return widened(self.y, index)

    @property
    def measured(self) -> Tensor | None:
        """Measured-mask of every cell `(cells, proteins)`."""
        return None if self.mask_table is None else self.mask_table[self.mask_row]

    def measured_of(self, index: Tensor) -> Tensor:
        """Measured-mask of some cells `(cells, proteins)`."""
        return self.mask_table[self.mask_row[index]]

    @property
    def has_protein(self) -> Tensor | None:
        """Whether some protein of a cell was measured `(cells,)` bool; None in a model without proteins."""
        return None if self.mask_table is None else self.mask_table.any(1)[self.mask_row]

    @property
    def told(self) -> Tensor:
        """What a label says `(cells,)`: the class, or the row of label_table if it may be coarse; -1 for nothing."""
        if self.label_table is None:
            return self.label
        return self.label_row.where(~self.label_table.all(1)[self.label_row], -1)

    @property
    def coarse(self) -> Tensor:
        """Whether a label of a cell leaves several classes open `(cells,)` bool."""
        return (self.told >= 0) & (self.label < 0)

    def to(self, device: torch.device) -> "Cells":
        """The same cells with their tensors on a device."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, x=self.x.to(device), **moved)


def in_order(index: Tensor, rank: Tensor | None) -> Tensor:
    """The same cells in the order of their names, so that what is drawn of them does not depend on another order."""
    return index if rank is None else index[rank.to(index.device)[index].argsort()]


def read_cells(
    data: Source | Data,
    setup: Setup,
    *,
    labels: bool = False,
    stored: Stored | None = None,
    most: float = math.inf,
    asked: bool = False,
) -> Cells:
    """Read a data set as a setup says; used for the fitted object and for any new one.

    Parameters
    ----------
    data
        MuData or AnnData, opened or not.
    setup
        How to read it: features by name, categories, panels.
    labels
        Whether to read labels; they are not needed to ask a fitted model.
    stored
        What is known of the cells of minified data; counts are then not looked for.
    most
        Bytes that RNA counts from a file may take in memory; if they would take more, they stay there.
    asked
        Whether the cells are asked about, not fitted: counts in a file stay there, and are read, and checked, when they
        are needed.

    Raises
    ------
    KeyError, ValueError
        If there are no cells, genes of the setup are missing, a batch or covariate category is unknown, values are
        not counts, or `most` is 0 and counts are not in a file.
    """
    source = Source.of(data)
    # RNA, and with it the order of the cells
    lend_rna(source, setup)
    rna, where = source.modality(setup.rna_mod, "rna_mod"), source.name(setup.rna_mod)
    containers.unique_names(rna.obs_names, f"{where}.obs_names", "cell")
    every = cell_names(source, setup.rna_mod, setup.mod_beside)
    if not len(every):
        raise ValueError(f"{where} has no cells.")
    x: CSR | Streamed
    if stored is None:
        x, library = _read_rna(source, setup, most, asked)
    else:  # a single row without an entry, which is everybody's
        x = CSR(torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.int32), torch.zeros(0), len(setup.genes))
    names = np.asarray(every, dtype=object)
    x_row, rank = np.arange(len(names)), None  # those with RNA come first
    if not isinstance(x, Streamed):
        names = np.sort(names)
        x_row = rna.obs_names.get_indexer(names)
    elif asked and not every.is_monotonic_increasing:
        rank = torch.from_numpy(names.argsort().argsort())
    cells = pd.Index(names)
    if stored is None:
        has_rna = (x_row >= 0) & (x_row < rna.n_obs)
        if not has_rna.all():  # a row without an entry behind the last, which is that of all cells with proteins alone
            x, x_row = x.with_empty_row(), np.where(has_rna, x_row, rna.n_obs)
        library = library[x_row]
    else:
        x_row, library, has_rna = np.zeros(len(cells), dtype=np.int64), stored.library, stored.library > 0
    # proteins
    batch = _codes(source, setup.batch_key, setup.batches, "batch_key", setup, cells)
    parts: dict[str, Tensor | None] = {"y": None, "mask_table": None, "mask_row": None, "panel": None}
    if setup.joint and stored is None:
        parts = _read_proteins(source, setup, cells)
        blank = ~(parts["mask_table"].any(1)[parts["mask_row"]].numpy() | has_rna)
        if blank.any():
            prot = source.name(setup.prot_mod)
            raise ValueError(
                f"{blank.sum()} cells have neither RNA nor a measured protein that the model knows (first: "
                f"'{cells[blank][0]}'). Leave them out, e.g. all without RNA: mdata.mod['{setup.prot_mod}'] = "
                f"{prot}[{prot}.obs_names.isin({where}.obs_names)].copy(); mdata.update()"
            )
    elif setup.joint:
        parts = _stored_proteins(source, setup, cells, stored)
    if stored is not None:
        view = None if stored.rna_view is None else torch.from_numpy(stored.rna_view)
        parts |= {"q_mean": torch.from_numpy(stored.q_mean), "q_var": torch.from_numpy(stored.q_var), "rna_view": view}
    return Cells(
        names=names,
        x=x,
        x_row=torch.from_numpy(x_row),
        batch=batch,
        codes=_covariate_codes(source, setup, cells, batch),
        continuous=_continuous(source, setup, cells),
        log_library=_log_library(source, setup, cells, library, has_rna, batch),
        **_labels(source, setup, cells, labels),
        has_rna=None if has_rna.all() else torch.from_numpy(has_rna),
        rank=rank,
        **parts,
    )


def _read_rna(source: Source, setup: Setup, most: float, asked: bool) -> tuple[CSR | Streamed, np.ndarray]:
    """Counts of the setup's genes, compact or left where they are, and sums: NaN of what is not read, 0 behind all."""
    # where the counts are, and whether they can stay there
    rna, where = source.modality(setup.rna_mod, "rna_mod"), source.name(setup.rna_mod)
    slot = f"{where}.{matrix_name(setup.rna_layer)}"
    stored, mod = stored_counts(rna, setup.rna_layer, where), None if source.alone else setup.rna_mod
    check_counts_are_there(stored, source, slot)
    can_stay = in_file(stored) and not isinstance(stored, CSCDataset)
    home = name_of_file(stored) if can_stay else ""
    if not most and not can_stay:
        raise ValueError(_why_not_streamed(source, slot, in_file(stored)))
    # rows of the genes that are asked for
    genes = pd.Index(setup.genes)
    column = _columns_of(genes, rna, where)
    choice = "" if len(genes) == rna.n_vars else genes_in_code(rna, genes)
    length, library = np.zeros(rna.n_obs + 1, dtype=np.int64), np.append(np.full(rna.n_obs, np.nan), 0.0)
    kind = np.int16 if len(genes) <= 2**15 else np.int32

    def noted(rows: slice, piece) -> sparse.csr_matrix:
        """Counts of some rows: checked when they are read first, and then those that they were."""
        counts = canonical(piece if column is None else piece[:, column], slot)  # of the others nothing is copied
        lengths, sums = np.diff(counts.indptr), np.asarray(counts.sum(1), dtype=np.float64).ravel()
        here, names = slice(rows.start + 1, rows.stop + 1), rna.obs_names[rows]
        if np.isnan(library[rows]).any():
            if setup.counts:
                check_counts(counts, names, genes, slot, rna, mod=mod, seen=containers.how_far(rows, rna.n_obs))
            length[here], library[rows] = lengths, sums
        changed = (lengths != length[here]) | ~np.isclose(sums, library[rows], rtol=1e-5, equal_nan=True)
        if changed.any():
            raise ValueError(
                f"{slot} is not what it was when this began (cell '{names[changed.argmax()]}'): something has written "
                f"into {home}. Start again, with a copy that nobody writes to."
            )
        return counts

    def streamed(indptr: Tensor | None) -> Streamed:
        """Counts that stay in their file; without an index pointer they are read for the first time."""
        edges, read = containers.in_blocks(stored, slot, in_order=indptr is None)

        def compactly(rows: slice) -> CSR:
            try:
                piece = containers.whole(read(rows), slot)
            except (LookupError, OSError, EOFError, RuntimeError, zlib.error) as error:  # of h5py, zarr, unpacking
                raise OSError(
                    f"{slot} cannot be read from {home} any more ({error}). Put the file back as it was and make the "
                    "same call again; a fit with checkpoint= goes on where it was."
                ) from error
            counts = noted(rows, piece)
            if indptr is None:
                check_no_empty_cells(library[rows], rna.obs_names[rows], slot, choice)
                _check_normal(library[rows], setup)
            parts = counts.indptr.astype(np.int64), counts.indices.astype(kind, copy=False), compact(counts.data)
            start, columns, values = map(torch.from_numpy, parts)
            return CSR(start, columns, values, len(genes))

        return Streamed(compactly, torch.from_numpy(edges), len(genes), torch.from_numpy(library), indptr)

    # where nothing is fitted, they are read when they are needed
    mean_known = len(setup.log_library) == len(setup.batches)  # which cells without RNA are given
    if asked and can_stay and (mean_known or len(cell_names(source, setup.rna_mod, setup.mod_beside)) == rna.n_obs):
        return streamed(None), library
    # all of them once, and kept while there is room
    indices, values, keeps = np.empty(0, dtype=kind), np.empty(0, dtype=np.uint8), not can_stay or most > 0
    for rows, piece in by_rows(stored, slot):
        counts = noted(rows, piece)
        if keeps:
            indices, values = _longer(indices, counts.indices), _longer(values, compact(counts.data))
            would_take = (indices.nbytes + values.nbytes) * rna.n_obs / rows.stop
            keeps = not can_stay or would_take <= most
        if not keeps and len(values):
            logger.info(
                f"{slot}: the counts would take about {would_take / 1e9:.3g} GB of memory, more than "
                f"{most / 1e9:.3g} GB (settings.stream_above): every epoch reads them from the file; with stream=False "
                "they are read once"
            )
            indices, values = indices[:0].copy(), values[:0].copy()
    check_no_empty_cells(library[:-1], rna.obs_names, slot, choice)
    indptr = torch.from_numpy(length.cumsum())
    if not keeps:
        return streamed(indptr), library
    return CSR(indptr, torch.from_numpy(indices), torch.from_numpy(values), len(genes)), library


def _why_not_streamed(source: Source, slot: str, by_columns: bool) -> str:
    """Why counts cannot be read from a file in every epoch, and what to do."""
    data, ending = ("data", "h5ad") if source.alone else ("mdata", "h5mu")
    if by_columns:
        return (
            f"stream=True reads rows, and {slot} is stored by columns (CSC). Leave stream out, or store it by rows: "
            f"read the object into memory, {slot} = {slot}.tocsr(), write it"
        )
    return (
        f"stream=True reads counts from a file, and {slot} is in memory. Leave stream out, or save the object and pass "
        f"the path: {data}.write('data.{ending}'); the same call with 'data.{ending}'"
    )


def _columns_of(genes: pd.Index, rna: AnnData, where: str) -> np.ndarray | None:
    """The column of each gene; None where they are the columns as they stand."""
    if genes.equals(pd.Index(rna.var_names.astype(str))):
        return None
    column, several = containers.positions(genes, rna.var_names.astype(str))
    if several.any():
        containers.unique_names(rna.var_names, f"{where}.var_names", "gene")
    absent = genes[column < 0]
    if len(absent):
        raise ValueError(
            f"{where} lacks {len(absent)} of the model's {len(genes)} genes ({', '.join(absent[:3])}, ...). Genes are "
            f"matched by var_names (here {', '.join(map(repr, rna.var_names[:3]))}, ...); their order is free, but all "
            "must be there. A query that lacks some is mapped with av.tl.map_query(query, reference)."
        )
    return column


def _longer(array: np.ndarray, more: np.ndarray) -> np.ndarray:
    """An array with more behind it, in place where it can: two of them at once would be what compactness saves."""
    if array.dtype.itemsize < more.dtype.itemsize and array.dtype.kind != "i":  # indices fit their type
        array = array.astype(more.dtype)
    n = len(array)
    array.resize(n + len(more), refcheck=False)
    array[n:] = more
    return array


def _codes(source: Source, key: str | None, categories: tuple[str, ...], argument: str, setup: Setup, cells) -> Tensor:
    if key is None:
        return torch.zeros(len(cells), dtype=torch.long)
    column = source.text(key, argument, setup.mods).reindex(cells)
    codes = containers.codes_of(categories, column)
    if column.isna().any():
        raise ValueError(
            f"{argument}: '{key}' has no value for {column.isna().sum()} cells (first: '{cells[column.isna()][0]}'); "
            "fill them in: mudata's update leaves gaps where cells have got other names."
        )
    if (codes < 0).any():
        strangers = sorted(set(column[codes < 0]))
        raise ValueError(
            f"{argument}: '{key}' holds {', '.join(map(repr, strangers[:5]))}, which the model has not seen; it "
            f"knows {', '.join(map(repr, categories[:10]))}. Map these cells onto the model with "
            "av.tl.map_query(query, reference), fit again with them, or give them a known value."
        )
    return torch.from_numpy(codes.astype(np.int64))


def _covariate_codes(source: Source, setup: Setup, cells: pd.Index, batch: Tensor) -> Tensor | None:
    every, argument = [(batch, setup.batches)], "categorical_covariate_keys"
    every += [(_codes(source, key, known, argument, setup, cells), known) for key, known in setup.categorical]
    columns, offset = [], 0
    for codes, categories in every:
        if len(categories) > 1:  # a single category injects nothing
            columns.append(codes + offset)
            offset += len(categories)
    return torch.stack(columns, dim=1) if columns else None


def _continuous(source: Source, setup: Setup, cells: pd.Index) -> Tensor | None:
    """Continuous covariates `(cells, covariates)`, on the scale of the cells that the model was fitted to."""
    if not setup.continuous:
        return None
    columns = [numeric_column(source, key, "continuous_covariate_keys", setup.mods, cells) for key in setup.continuous]
    values = np.stack(columns, axis=1)
    if setup.continuous_scale:
        mean, deviation = np.array(setup.continuous_scale).T
        values = (values - mean) / deviation
        setup.warn_of_far(values)
    return torch.from_numpy(values.astype(np.float32))


def _log_library(
    source: Source, setup: Setup, cells: pd.Index, library: np.ndarray, has_rna: np.ndarray, batch: Tensor
) -> Tensor:
    if setup.size_factor_key is not None:
        library = numeric_column(source, setup.size_factor_key, "size_factor_key", setup.mods, cells).astype(np.float32)
        if (library <= 0).any():
            raise ValueError(
                f"size_factor_key: '{setup.size_factor_key}' must be positive, cell '{cells[library <= 0][0]}' is not."
            )
        library = library * np.float32(setup.size_factor_scale)
        setup.warn_of_factors(np.log(library[has_rna]))
    elif not has_rna.all():  # nothing is known of a cell's own: that of the average cell of its batch
        log_library = np.log(np.where(has_rna, library, 1))
        means = library_means(setup, log_library[has_rna], batch.numpy()[has_rna])
        library = np.exp(np.where(has_rna, log_library, np.array(means)[batch.numpy()]))
    _check_normal(library, setup)
    return torch.from_numpy(np.log(library).astype(np.float32))[:, None]


def _check_normal(library: np.ndarray, setup: Setup) -> None:
    """Raise a ValueError if the logarithm of a library size is asked for and there is none."""
    if not setup.counts and setup.size_factor_key is None and (library <= 0).any():
        raise ValueError("gene_likelihood='normal' needs cells whose values sum to more than 0; pass size_factor_key.")


def with_library(setup: Setup, cells: Cells) -> Setup:
    """The setup with the mean log library size of every batch, for cells without RNA that are read later."""
    log_library, batch = (part[cells.with_rna].numpy() for part in (cells.log_library.squeeze(1), cells.batch))
    return replace(setup, log_library=library_means(setup, log_library, batch))


ABSENT_CELLS, ABSENT_COUNTS, ABSENT_GENES = 500, 20.0, 0.02
"""Cells of a batch that are looked at first; counts expected of a gene that none of them has; share that is told of."""


def remarks(cells: Cells, setup: Setup) -> list[str]:
    """What a fit takes but its user should hear of: odd genes, counts, batches and proteins."""
    told = [absent_genes(cells, setup), nearly_the_same(cells.names, cells.has_rna, cells.has_protein)]
    small = cells.batch.bincount(minlength=len(setup.batches))
    few = [f"'{name}' ({n})" for name, n in zip(setup.batches, small.tolist(), strict=True) if n < FEW_CELLS]
    if few and len(setup.batches) > 1:
        told.append(
            f"batch_key='{setup.batch_key}': {len(few)} of {len(setup.batches)} batches have fewer than {FEW_CELLS} "
            f"cells ({listed(few, 4)}), too few to learn what is different there. Is it the right column?"
        )
    rows = cells.x_row[cells.with_rna]
    if setup.counts and cells.q_mean is None and len(rows) >= FEWEST_CELLS:
        counts = cells.x.entries(rows[: 10 * FEWEST_CELLS]).count
        if len(counts) and counts.max() <= 1:
            told.append("no RNA count is above 1: these say whether a gene was seen, not how often. Give the counts")
    known = torch.stack([cells.batch, cells.label])[:, cells.label >= 0].unique(dim=1)  # (batch and class, pairs)
    if len(setup.classes) > 1 and known.shape[1] == len(known[0].unique()) > 1 and len(known[1].unique()) > 1:
        told.append(f"every batch has labels of one class: what tells '{setup.labels_key}' apart may be the batch")
    most = []  # the highest protein count of each batch
    for code, name in enumerate(setup.batches if cells.y is not None and cells.q_mean is None else ()):
        some = ((cells.batch == code) & cells.has_protein).nonzero().squeeze(1)[: 10 * FEWEST_CELLS]
        most += [cells.proteins(some).max().item()] if len(some) >= FEWEST_CELLS else []
        if len(some) >= FEWEST_CELLS and not most[-1]:
            why = "If nothing was stained: NaN, no such cells in the proteins, or a panel_key= that tells them apart"
            told.append(f"batch '{name}' has no protein count at all, and its zeros are learned as counts. {why}")
    if max(most, default=0) == 1:
        told.append("no protein count is above 1: these say whether it was seen, not how often. Give the counts")
    tags = [name for name in setup.proteins if names_no_target(name)]
    if tags:
        told.append(
            f"{len(tags)} proteins are by their names tags of samples, or reads without an antibody "
            f"({listed(tags, 4)}), and are learned like any other: proteins='targets' leaves them out (and isotypes)"
        )
    return [remark for remark in told if remark]


def absent_genes(cells: Cells, setup: Setup) -> str | None:
    """What to say of genes that no cell of a batch has although others have many: an outer join makes such zeros."""
    if not setup.counts or len(setup.batches) < 2 or cells.q_mean is not None:
        return None
    n_genes, rows, batch = len(setup.genes), cells.x_row[cells.with_rna], cells.batch[cells.with_rna]
    by_batch = rows[batch.argsort(stable=True)].split(batch.bincount(minlength=len(setup.batches)).tolist())

    def summed(some: Tensor) -> Tensor:
        entries = cells.x.entries(some)
        return entries.column.bincount(entries.count.double(), minlength=n_genes)

    counts = torch.stack([summed(some[:ABSENT_CELLS]) for some in by_batch])  # (batches, genes)
    totals = counts.sum(1, keepdim=True)
    expected = (counts.sum(0) - counts) * totals / (totals.sum() - totals).clamp(min=1)  # by what other batches have
    absent = (counts == 0) & (expected >= ABSENT_COUNTS)
    code = int(absent.sum(1).argmax())
    if absent[code].sum() > 10:  # the others of these cells may have some
        for some in by_batch[code].split(10_000):
            absent[code] &= summed(some) == 0
    number = int(absent[code].sum())
    if number <= max(10, ABSENT_GENES * n_genes):
        return None
    shown = ", ".join(setup.genes[i] for i in absent[code].nonzero().squeeze(1)[:3].tolist())
    return (
        f"{number} genes that other batches express ({shown}, ...) are zero in all cells of '{setup.batches[code]}', "
        "as an outer join leaves genes that one of its objects lacks, or a type of cells that is not there. The former "
        "would be learned as counts: join with join='inner', or name the genes that all have: genes=[...]"
    )


def _labels(source: Source, setup: Setup, cells: pd.Index, wanted: bool) -> dict[str, Tensor]:
    if setup.labels_key is None or not wanted:
        return {"label": torch.full((len(cells),), -1)}
    row = torch.from_numpy(read_labels(source, setup, cells).row)
    label = row.where(row < len(setup.classes), -1)
    if not setup.label_levels:
        return {"label": label}
    return {"label": label, "label_row": row, "label_table": torch.from_numpy(setup.levels.sets())}


def _read_proteins(source: Source, setup: Setup, cells: pd.Index) -> dict[str, Tensor]:
    names = pd.Index(setup.proteins)
    y = np.zeros((len(cells), len(names)), dtype=np.uint8)
    panel, measured = np.zeros(len(cells), dtype=np.int64), np.zeros(y.shape, dtype=bool)
    if has_proteins(source, setup):
        proteins = find_proteins(source, setup)
        if not names.isin(proteins.names).any():
            raise ValueError(
                f"None of the model's {len(names)} proteins ({', '.join(names[:3])}, ...) is in {proteins.where} "
                f"({', '.join(proteins.names[:3])}, ...). Rename them; to predict from RNA alone, leave proteins out."
            )
        panel, table = _panel_of_cells(source, setup, cells, proteins)
        y, measured = _by_name(proteins, names, cells, table)
    else:
        _no_proteins_elsewhere(source, setup)
        logger.info("no protein counts: all cells are taken as RNA-only")
    packed = np.ascontiguousarray(np.packbits(measured, axis=1))  # one short byte string per cell sorts fast
    _, first, row = np.unique(packed.view(f"V{packed.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return {
        "y": torch.from_numpy(y),
        "mask_table": torch.from_numpy(measured[first]),
        "mask_row": torch.from_numpy(row.reshape(-1).astype(np.int64)),
        "panel": torch.from_numpy(panel),
    }


def _stored_proteins(source: Source, setup: Setup, cells: pd.Index, stored: Stored) -> dict[str, Tensor]:
    """What minified data know of proteins: which were measured, and the panel whose prior holds."""
    key = setup.panel_key or setup.batch_key
    panel = np.zeros(len(cells), dtype=np.int64)
    if key is not None:
        column = source.text(key, "panel_key", setup.mods).reindex(cells)
        panel = np.maximum(containers.codes_of(setup.panels, column), 0).astype(np.int64)
    return {
        "y": torch.zeros(len(cells), len(setup.proteins), dtype=torch.uint8),
        "mask_table": torch.from_numpy(stored.mask_table),
        "mask_row": torch.from_numpy(stored.mask_row),
        "panel": torch.from_numpy(panel),
    }


def _no_proteins_elsewhere(source: Source, setup: Setup) -> None:
    """Raise if the object holds the model's proteins where the model does not look for them."""
    if source.alone:
        tables = {key: table for key, table in source.data.obsm.items() if isinstance(table, pd.DataFrame)}
        found = {f"obsm['{key}']": table.columns for key, table in tables.items()}
        argument, expected = "prot_obsm", setup.prot_obsm
    else:
        found = {source.name(mod): part.var_names for mod, part in source.mods.items() if mod != setup.rna_mod}
        argument, expected = "prot_mod", setup.prot_mod
    for slot, names in found.items():
        if pd.Index(setup.proteins).isin(names.astype(str)).mean() > 0.5:
            raise ValueError(
                f"The model looks for proteins in '{expected}', but they seem to be in {slot}: pass {argument}=..."
            )


def _by_name(proteins: Proteins, names: pd.Index, cells: pd.Index, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Protein counts in the model's order of proteins and cells, 0 where there are none, and where there are some."""
    column = pd.Index(proteins.names).get_indexer(names)
    row = proteins.cells.get_indexer(cells)
    counts, measured = (np.zeros((len(cells), len(names)), dtype=kind) for kind in (np.uint8, bool))
    step = max(1, containers.PIECE // len(names))
    for start in range(0, len(cells), step):
        part, inside = row[start : start + step], table[start : start + step]
        y = np.full(inside.shape, np.nan, dtype=np.float32)
        y[np.ix_(part >= 0, column >= 0)] = proteins.counts[np.ix_(part[part >= 0], column[column >= 0])]
        measured[start : start + step] = there = ~np.isnan(y) & inside
        counts = put(counts, slice(start, start + step), compact(np.where(there, y, 0)))
    tell_proteins(proteins.names, proteins.matched, proteins.where, tuple(names))
    return counts, measured


def _panel_of_cells(source: Source, setup: Setup, cells: pd.Index, proteins: Proteins) -> tuple[np.ndarray, np.ndarray]:
    """Panel code of each cell `(cells,)` and what its panel measures `(cells, proteins)`."""
    table, key = np.array(setup.measured, dtype=bool), setup.panel_key or setup.batch_key
    if key is None:
        return np.zeros(len(cells), dtype=np.int64), np.broadcast_to(table, (len(cells), table.shape[1]))
    column = source.text(key, "panel_key", setup.mods)
    codes = containers.codes_of(setup.panels, column.reindex(cells)).astype(np.int64)
    measured = table[codes]
    measured[codes < 0] = True
    # a panel that the model has not seen: the rules of a fit say what it measured, the first panel lends its prior
    of_protein_cell = column.loc[proteins.cells]
    strangers = tuple(sorted({*pd.factorize(of_protein_cell)[1]} - set(map(containers.as_name, setup.panels))))
    if strangers:
        code = pd.Index(strangers).get_indexer(column.reindex(cells))
        measured[code >= 0] = new_panels(proteins, of_protein_cell, strangers, setup)[code[code >= 0]]
    if isinstance(proteins.declared, pd.DataFrame):  # what the user says of this object's panels holds here
        declared = true_or_false(proteins.declared).reindex(index=list(setup.proteins), fill_value=False)
        code = declared.columns.get_indexer(column.reindex(cells))
        measured[code >= 0] &= declared.to_numpy().T[code[code >= 0]]
    return np.where(codes < 0, 0, codes), measured
