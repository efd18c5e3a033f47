"""pp.align_query."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from anvi._backed import on_file, quiet_mudata
from anvi._data.antibodies import tell_proteins
from anvi._data.containers import Data, Source, in_memory, whole
from anvi._data.counts import check_counts_are_there, find_proteins, has_proteins, matrix_name, stored_counts
from anvi._data.query import PADDED, check_min_genes, check_share, match_genes, relocated
from anvi._data.setup import Setup
from anvi._data.slots import measured, write_measured
from anvi._find import find_reference
from anvi._model import Model

from .panels import panels


@on_file
def align_query(
    query: Data,
    reference: Data | str | Path | Model,
    *,
    model: str | None = None,
    gene_key: str | None = None,
    min_genes: float = 0.5,
    layer: str | dict[str, str] | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
) -> Data:
    """Give a query the genes and proteins of a fitted model: the same names in the same order.

    `tl.map_query` needs no such step. This is for other tools, for putting reference and query into one object, and
    for looking at what matches.

    Parameters
    ----------
    query
        MuData or AnnData with raw counts; it is not changed.
    reference
        A fitted object, a `.h5mu`, `.h5ad` or `.zarr` file with one, a folder that `write_model` made, the "owner/name"
        of a model on the hub, or a :class:`~anvi.Model`.
    model
        Key of the model in the reference; None: the only one there.
    gene_key
        Column of var with the names of the genes, as the reference has them; None: `var_names`. Where both sides have
        Ensembl ids, versions do not matter, nor do prefixes (`"GRCh38_"`).
    min_genes
        Least share of the reference's genes that the query must have.
    layer
        Layer with raw counts, which becomes X; a dict gives one per modality; None: that of the reference if the query
        has it, else `.X`.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in the query; None: where they were in the reference.

    Returns
    -------
    A new object of the query's type and cells, with the reference's genes and, if both have proteins, its proteins. Of
    the query it keeps obs, obsm and uns, and the layers of the genes; other modalities stay behind.

    `mdata['prot'].var['original_names']` : str
        The query's own names of the proteins: they are compared without affixes and by synonyms (:func:`panels`).
    `var['anvi_padded']` : bool
        True for a feature that the query lacks: a gene of zeros, which `tl.map_query` masks, or a protein of NaN,
        which is "not measured" everywhere.
    `mdata['prot'].varm['measured']` : DataFrame (proteins, panels)
        False for proteins that the query lacks; only where the query had this table, or has the reference's column
        with panels (or batches).

    Raises
    ------
    KeyError, ValueError
        If too few genes match (the message shows both sides and a way out), or something that was named is missing.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.scvi(mdata, max_epochs=1)
    >>> query = mdata["rna"][:, 10:].copy()
    >>> int(av.pp.align_query(query, mdata).var["anvi_padded"].sum())
    10
    """
    check_min_genes(min_genes)
    source, (fitted, _) = Source(query), find_reference(reference, model)
    setup = relocated(fitted.setup, source, layer, rna_mod=rna_mod, prot_mod=prot_mod, prot_obsm=prot_obsm)
    rna, where = source.modality(setup.rna_mod, "rna_mod"), source.name(setup.rna_mod)
    match = match_genes(setup.genes, rna, gene_key, where)
    check_share(match, setup.genes, rna, gene_key, min_genes, where)
    slot = f"{where}.{matrix_name(setup.rna_layer)}"
    check_counts_are_there(stored_counts(rna, setup.rna_layer, where), source, slot)
    aligned = _with_genes(rna, setup, match.column, where)
    joint = setup.joint and has_proteins(source, setup)
    if isinstance(query, AnnData):
        if joint:
            proteins = find_proteins(source, setup)
            tell_proteins(proteins.names, proteins.matched, proteins.where, setup.proteins)
            table = pd.DataFrame(proteins.counts.astype(np.float32), index=proteins.cells, columns=list(proteins.names))
            aligned.obsm.update({setup.prot_obsm: table.reindex(columns=list(setup.proteins))})
        return aligned
    mods = {setup.rna_mod: aligned}
    if joint:
        mods[setup.prot_mod] = _with_proteins(source, setup)
    return _joined(query, mods, setup)


def _with_genes(rna: AnnData, setup: Setup, column: np.ndarray, where: str) -> AnnData:
    counts = in_memory(stored_counts(rna, setup.rna_layer, where))
    kept = {name: whole(values, f"{where}.layers['{name}']") for name, values in rna.layers.items() if name is not None}
    layers = {name: _columns(values, column) for name, values in kept.items()}  # None: X
    var = pd.DataFrame({PADDED: column < 0}, index=pd.Index(setup.genes, dtype=object))
    aligned = AnnData(_columns(counts, column), obs=rna.obs.copy(), var=var, uns=deepcopy(dict(rna.uns)), layers=layers)
    aligned.obsm.update({key: value.copy() for key, value in rna.obsm.items()})
    return aligned


def _columns(values, column: np.ndarray):
    """The given columns of a matrix, zeros where a column is -1; sparse stays sparse."""
    found = np.flatnonzero(column >= 0)
    if sparse.issparse(values):
        place = (np.ones(len(found), dtype=values.dtype), (column[found], found))
        return sparse.csr_matrix(values) @ sparse.csr_matrix(place, shape=(values.shape[1], len(column)))
    values = np.asarray(values)
    out = np.zeros((values.shape[0], len(column)), dtype=values.dtype)
    out[:, found] = values[:, column[found]]
    return out


def _with_proteins(source: Source, setup: Setup) -> AnnData:
    prot, proteins = source.mods[setup.prot_mod], find_proteins(source, setup)
    table = pd.DataFrame(proteins.counts.astype(np.float32), columns=list(proteins.names)).reindex(
        columns=list(setup.proteins)
    )
    absent = ~pd.Index(setup.proteins).isin(proteins.names)
    if absent.all():
        raise ValueError(
            f"None of the model's {len(absent)} proteins ({', '.join(setup.proteins[:3])}, ...) is in "
            f"{proteins.where} ({', '.join(proteins.names[:3])}, ...). Rename them, or leave the proteins out."
        )
    tell_proteins(proteins.names, proteins.matched, proteins.where, setup.proteins)
    var = pd.DataFrame({PADDED: absent}, index=pd.Index(setup.proteins, dtype=object))
    own = dict(zip(proteins.names, prot.var_names.astype(str), strict=True))
    var["original_names"] = [own.get(name, "") for name in setup.proteins]
    aligned = AnnData(table.to_numpy(dtype=np.float32), obs=prot.obs.copy(), var=var, uns=deepcopy(dict(prot.uns)))
    aligned.obsm.update({key: value.copy() for key, value in prot.obsm.items()})
    if proteins.declared is not None:
        known = proteins.declared.astype(bool).reindex(index=list(setup.proteins), fill_value=False)
        write_measured(aligned, known)
    return aligned


def _joined(query: MuData, mods: dict[str, AnnData], setup: Setup) -> MuData:
    """A MuData of aligned modalities with what the query says of all cells."""
    with quiet_mudata():
        aligned = MuData(mods)
    row = query.obs_names.get_indexer(aligned.obs_names)
    aligned.obs = query.obs.iloc[row].copy()
    for key, value in query.obsm.items():
        if key not in query.mod:  # those say which cells are in a modality
            aligned.obsm.update({key: value.iloc[row] if isinstance(value, pd.DataFrame) else value[row]})
    aligned.uns.update(deepcopy(dict(query.uns)))
    if setup.prot_mod in mods and measured() not in mods[setup.prot_mod].varm:
        key = setup.panel_key or setup.batch_key
        if key is not None and _is_complete(aligned, key, setup):
            panels(aligned, key, rna_mod=setup.rna_mod, prot_mod=setup.prot_mod)
    return aligned


def _is_complete(data: Data, key: str, setup: Setup) -> bool:
    """Whether every cell with proteins has a value in a column."""
    try:
        column = Source(data).text(key, "panel_key", setup.mods)
    except KeyError:
        return False
    return bool(column.reindex(data.mod[setup.prot_mod].obs_names).notna().all())
