"""How a query is read for a model of other data: its features by name, its batches, panels and categories added."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from . import containers, slots
from .antibodies import MOST_FEATURES
from .containers import Source, as_name, cell_names, lend_rna, listed, positions
from .counts import Proteins, check_names_agree, find_proteins, has_proteins
from .labels import label_keys, read_labels, tell_strange
from .setup import Setup, new_panels

logger = logging.getLogger("anvi")

PADDED = "anvi_padded"
"""`var` column of features that an object never had and that stand in it as zeros or NaN (`pp.align_query`)."""

_ENSEMBL = re.compile(r"ENS[A-Z]*[GTP]\d{6,}(\.\d+)?(_PAR_Y)?")
_VERSION = r"\.\d+$"
_OF_A_GENE = re.compile(
    r"^(?:(?:rna|gex|gene)[:_]|(?:GRCh3[78]|GRCm3[89]|hg19|hg38|mm10|mm39)(?:_+|-+|:))", re.IGNORECASE
)


def plain_genes(names: pd.Index) -> pd.Index:
    """Names without what says where a gene is from: "rna:CD3D", "rna_CD3D" and "GRCh38______CD3D" are "CD3D"."""
    return names.str.replace(_OF_A_GENE, "", regex=True)


class Match(NamedTuple):
    """Where the genes of a model are in a query."""

    column: np.ndarray  # (genes of the model,) column of the query; -1 where it has none
    how: str  # what was compared, for the log

    @property
    def found(self) -> np.ndarray:
        """Positions of the model's genes that the query has."""
        return np.flatnonzero(self.column >= 0)

    @property
    def share(self) -> float:
        """Share of the model's genes that the query has."""
        return float((self.column >= 0).mean())


def match_genes(genes: tuple[str, ...], rna: AnnData, gene_key: str | None, where: str) -> Match:
    """Find each gene of a model among the genes of a query.

    Names are compared as they are; then without prefixes ("rna:", "GRCh38_"); then, where both sides have Ensembl ids,
    without their versions; then with dots for hyphens, as R writes them ("HLA.DRA"). A name that several columns of the
    query carry is no name: such genes count as missing, with a warning.

    Parameters
    ----------
    genes
        Names in the model.
    rna
        The query's RNA.
    gene_key
        Column of `rna.var` with the names to compare; None: `rna.var_names`.
    where
        What the user calls `rna`, for messages.
    """
    wanted, names = pd.Index(genes), gene_names(rna, gene_key, where)
    how = "var_names" if gene_key is None else f"var['{gene_key}']"
    column, ambiguous = positions(wanted, names)
    plain, theirs = plain_genes(wanted), plain_genes(names)
    readings = [("prefixes", plain, theirs)]
    if _are_ensembl(plain) and _are_ensembl(theirs):
        readings.append(("versions", *(side.str.replace(_VERSION, "", regex=True) for side in (plain, theirs))))
    readings.append(("hyphens", *(side.str.replace(r"\W|_", ".", regex=True) for side in (plain, theirs))))
    for what, *sides in readings if (column < 0).any() else ():
        bare, unsure = positions(*sides)
        if what == "hyphens":  # what has been found by its name stays what it is
            bare = np.where(np.isin(bare, column[column >= 0]), -1, bare)
        if ((column < 0) & (bare >= 0)).any():
            how += f" without {what}"
        column, ambiguous = np.where(column < 0, bare, column), ambiguous | unsure
    taken, times = np.unique(column[column >= 0], return_counts=True)
    twice = np.isin(column, taken[times > 1])  # two genes of the model that differ in what was left out only
    ambiguous = (ambiguous & (column < 0)) | twice
    if ambiguous.any():
        logger.warning(
            f"{ambiguous.sum()} genes are ambiguous in {where} by {how} and count as missing: "
            f"{', '.join(wanted[ambiguous][:5])}"
        )
    return Match(np.where(twice, -1, column), how)


def gene_names(rna: AnnData, gene_key: str | None, where: str) -> pd.Index:
    """Names of a query's genes as text; "" for those that it never had.

    Raises
    ------
    KeyError
        If there is no such column of var.
    """
    if gene_key is None:
        names = pd.Series(rna.var_names.astype(str))
    elif gene_key in rna.var:
        names = rna.var[gene_key].astype(object)
        names = names.where(names.notna(), "").astype(str).reset_index(drop=True)
    else:
        there = ", ".join(map(repr, rna.var.columns)) or "none"
        raise KeyError(f"gene_key='{gene_key}' is not in {where}.var; there are: {there}.")
    if PADDED in rna.var:
        names = names.where(~rna.var[PADDED].to_numpy(dtype=bool), "")
    return pd.Index(names)


def check_min_genes(least: float) -> None:
    """Raise a ValueError unless the share of genes that a query must have is one."""
    if not 0 <= least <= 1:
        raise ValueError(f"min_genes={least!r:.80} is a share and must be between 0 and 1.")


def check_share(match: Match, genes: tuple[str, ...], rna: AnnData, gene_key: str | None, least: float, where: str):
    """Raise a ValueError if too few of a model's genes were found; the message shows both sides and a way out."""
    if len(match.found) and match.share >= least:
        return
    names = gene_names(rna, gene_key, where)
    missing = np.flatnonzero(match.column < 0)
    raise ValueError(
        f"{where} has {len(match.found)} of the reference's {len(genes)} genes ({match.share:.0%}) by {match.how}; at "
        f"least {least:.0%} are needed. The reference has {', '.join(genes[i] for i in missing[:3])}, ...; the query "
        f"has {', '.join(names[:3])}, .... {_way_out(pd.Index(genes), names, rna, gene_key, match, where)}"
    )


def _way_out(genes: pd.Index, names: pd.Index, rna: AnnData, gene_key: str | None, match: Match, where: str) -> str:
    if genes.isin(names.str.strip()).mean() > match.share + 0.2:
        slot = f"{where}.var_names" if gene_key is None else f"{where}.var['{gene_key}']"
        return f"They agree but for blanks at the ends: {slot} = {slot}.str.strip()"
    bare = genes.str.replace(_VERSION, "", regex=True)
    for key in rna.var.columns if gene_key is None else ():
        column = rna.var[key]
        if pd.api.types.is_numeric_dtype(column.dtype):
            continue
        share = bare.isin(column.astype(str).str.replace(_VERSION, "", regex=True)).mean()
        if share > max(match.share, 0.2):
            return f"var['{key}'] matches {share:.0%}: pass gene_key='{key}'."
    if _are_ensembl(genes) != _are_ensembl(names):
        side = "reference" if _are_ensembl(genes) else "query"
        other = "symbols" if side == "query" else "Ensembl ids"
        return f"Are these Ensembl ids? Only the {side} seems to have them: pass gene_key=, a var column with {other}."
    if genes.str.upper().isin(names.str.upper()).mean() > match.share + 0.2:
        return "They agree but for upper and lower case: is one of them of another species?"
    if not len(match.found):
        return "Are these Ensembl ids, or genes of another species? Pass gene_key=, a var column with the right names."
    return "Pass gene_key= if the names are in a var column, or a lower min_genes= to map all the same."


def _are_ensembl(names: pd.Index) -> bool:
    """Whether most of the names are Ensembl ids."""
    some = names[names != ""][:500]
    return bool(len(some)) and sum(_ENSEMBL.fullmatch(name) is not None for name in some) > len(some) / 2


STAND_IN = "query"
"""The category of cells whose batch, panel or covariate has no value."""


class Query(NamedTuple):
    """What a mapping needs to know of a query before it reads a count."""

    setup: Setup  # the reference's, widened: genes are those that both have, under the query's names
    genes: np.ndarray  # their positions among the reference's genes
    columns: dict[str, pd.Series]  # obs columns to be written, since the query has none that says it in full
    report: dict  # what was found, for the log and for uns


def relocated(setup: Setup, source: Source, layer: str | dict[str, str] | None, **names: str | None) -> Setup:
    """The setup of a reference with a query's modalities and layers; a layer that the query lacks becomes its X."""
    containers.no_obsm_beside(source, names.get("prot_obsm"))
    setup = setup.elsewhere(**names)
    source.check_layer(layer)
    lend_rna(source, setup)

    def found(mod: str, part: AnnData | None, theirs: str | None) -> str | None:
        there = part is not None and theirs in part.layers
        return None if part is None else containers.layer_of(layer, mod) or (theirs if there else None)

    return replace(
        setup,
        rna_layer=found(setup.rna_mod, source.modality(setup.rna_mod, "rna_mod"), setup.rna_layer),
        prot_layer=found(setup.prot_mod, source.mods.get(setup.prot_mod), setup.prot_layer),
    )


def find_query(
    source: Source,
    reference: Setup,
    key: str,
    *,
    batch_key: str | None,
    panel_key: str | None,
    labels_key: str | Sequence[str] | None,
    gene_key: str | None,
    min_genes: float,
) -> Query:
    """Match a query to a reference and write down how it is to be read.

    Parameters
    ----------
    source
        The query.
    reference
        The reference's setup, relocated (:func:`relocated`).
    key
        Prefix of the slots, for columns that have to be written.
    batch_key, panel_key, labels_key
        Columns of the query; None takes the reference's, and no labels.
    gene_key
        Column of var with the names of genes.
    min_genes
        Least share of the reference's genes.

    Raises
    ------
    KeyError, ValueError
        If too few genes match, names repeat, or a column that was named is not there.
    """
    rna, where = source.modality(reference.rna_mod, "rna_mod"), source.name(reference.rna_mod)
    containers.unique_names(rna.obs_names, f"{where}.obs_names", "cell")
    match = match_genes(reference.genes, rna, gene_key, where)
    several = (match.column >= 0) & rna.var_names.duplicated(keep=False)[match.column]  # found by another column of var
    if several.any():
        shown = ", ".join(rna.var_names[match.column[several]].unique()[:3])
        logger.warning(
            f"{several.sum()} genes count as missing, since {where}.var_names repeats their names ({shown}); "
            f"{where}.var_names_make_unique() saves them"
        )
        match = match._replace(column=np.where(several, -1, match.column))
    check_share(match, reference.genes, rna, gene_key, min_genes, where)
    proteins = find_proteins(source, reference) if reference.joint and has_proteins(source, reference) else None
    if proteins is not None:
        check_names_agree(proteins.cells, proteins.where, rna, whole=False)
    report = _report(match, proteins, reference, rna)

    names = rna.var_names.astype(str)
    labels_key, label_columns = label_keys(labels_key)
    setup = replace(reference, genes=tuple(names[match.column[match.found]]))
    setup = replace(setup, labels_key=labels_key, label_columns=label_columns)
    cells = cell_names(source, setup.rna_mod, setup.mod_beside)
    setup, columns = _with_categories(source, setup, cells, key, batch_key)
    if setup.joint:
        setup, more = _with_panels(source, setup, cells, key, panel_key, proteins, columns)
        columns |= more
    report["new_batches"] = list(setup.batches[len(reference.batches) :])
    if labels_key is not None:
        tell_strange(read_labels(source, setup, cells), f"labels_key='{setup.labels_key}': the reference", "mapped")
    return Query(setup, match.found, columns, report)


def _report(match: Match, proteins: Proteins | None, reference: Setup, rna: AnnData) -> dict:
    """Shares and names of what the two sides have in common, also logged."""
    genes = pd.Index(reference.genes)
    report: dict = {
        "genes_matched": round(100 * match.share, 2),
        "matched_by": match.how,
        "genes": list(genes[match.found]),
        "missing_genes": list(genes[match.column < 0]),
    }
    line = f"genes: {len(match.found)} of the reference's {len(genes)} ({match.share:.1%}) by {match.how}"
    level = logging.INFO if match.share >= MOST_FEATURES else logging.WARNING
    logger.log(level, f"{line}; {rna.n_vars - len(match.found)} others of the query are left out")
    if not reference.joint:
        return report
    theirs = pd.Index(reference.proteins)
    ours = pd.Index([], dtype=object)
    if proteins is not None:  # NaN throughout is no measurement
        ours = pd.Index(proteins.names, dtype=object)[~np.isnan(proteins.counts).all(0)]
    share = float(theirs.isin(ours).mean())
    report |= {
        "proteins_matched": round(100 * share, 2),
        "missing_proteins": list(theirs[~theirs.isin(ours)]),
        "ignored_proteins": list(ours[~ours.isin(theirs)]),
    }
    if proteins is None:
        logger.info("proteins: none in the query")
        return report
    logger.info(f"proteins: {theirs.isin(ours).sum()} of the reference's {len(theirs)} ({share:.1%})")
    if report["ignored_proteins"]:
        logger.info(f"proteins that the reference does not know are ignored: {listed(report['ignored_proteins'])}")
    return report


def _with_categories(
    source: Source, setup: Setup, cells: pd.Index, key: str, batch_key: str | None
) -> tuple[Setup, dict[str, pd.Series]]:
    """Add the query's batches and categories behind the reference's."""
    written: dict[str, pd.Series] = {}

    def grown(name: str | None, argument: str, given: bool, known: tuple[str, ...], slot: str):
        column, complete = _column(source, name, argument, given, known, setup, cells)
        if not complete:
            written[slot] = column
            name = slot
        there = set(column)
        new = sorted(there - set(map(as_name, known)))
        seen = [category for category in known if as_name(category) in there]
        parts = [f"{listed(part)} ({what})" for part, what in ((seen, "known"), (new, "new")) if part]
        logger.info(f"{argument}: {', '.join(parts)}")
        return name, (*known, *new)

    given = batch_key is not None
    name, batches = grown(batch_key or setup.batch_key, "batch_key", given, setup.batches, slots.batch(key))
    categorical = tuple(
        grown(
            covariate,
            "categorical_covariate_keys",
            False,
            known,
            slots.covariate(key, slots.column_name(covariate.replace(":", "_"))),
        )
        for covariate, known in setup.categorical
    )
    return replace(setup, batch_key=name, batches=batches, categorical=categorical), written


def _with_panels(
    source: Source,
    setup: Setup,
    cells: pd.Index,
    key: str,
    panel_key: str | None,
    proteins: Proteins | None,
    columns: dict[str, pd.Series],
) -> tuple[Setup, dict[str, pd.Series]]:
    """Add the query's panels, values of the panel column or else of the batch, and what they measured."""
    written: dict[str, pd.Series] = {}
    name = panel_key or setup.panel_key
    if name is not None:
        column, complete = _column(source, name, "panel_key", panel_key is not None, setup.panels, setup, cells)
        if not complete:
            name = slots.panel(key)
            written[name] = column
        setup = replace(setup, panel_key=name)
    elif setup.batch_key in columns:
        column = columns[setup.batch_key]
    else:
        column = source.text(setup.batch_key, "batch_key", setup.mods).reindex(cells)
    new = tuple(sorted(set(column) - set(map(as_name, setup.panels))))
    measured = np.zeros((len(new), len(setup.proteins)), dtype=bool)
    if new and proteins is not None:
        measured = new_panels(proteins, column.reindex(proteins.cells), new, setup)
    rows = tuple(tuple(row) for row in measured.tolist())
    return replace(setup, panels=(*setup.panels, *new), measured=(*setup.measured, *rows)), written


def _column(
    source: Source, name: str | None, argument: str, given: bool, known: tuple[str, ...], setup: Setup, cells: pd.Index
) -> tuple[pd.Series, bool]:
    """A column of the query, missing values filled with a category of their own; and whether none was missing.

    Parameters
    ----------
    given
        Whether the user named the column: then it must be there.
    """
    try:
        column = None if name is None else source.text(name, argument, setup.mods).reindex(cells)
    except KeyError:
        if given:
            raise
        column = None
    there = column is not None
    column = column if there else pd.Series(np.nan, index=cells, dtype=object)
    missing = int(column.isna().sum())
    if not missing:
        return column, True
    stand_in, taken = STAND_IN, {*known, *column.dropna()}
    while stand_in in taken:
        number = int(stand_in.rpartition("_")[2]) if "_" in stand_in else 1
        stand_in = f"{STAND_IN}_{number + 1}"
    if there:
        logger.warning(f"{argument}: '{name}' has no value for {missing} cells of the query: taken as '{stand_in}'")
    elif name is not None:
        logger.warning(f"{argument}: the query has no column '{name}': all its cells are taken as '{stand_in}'")
    return column.fillna(stand_in), False
