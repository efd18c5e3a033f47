"""Which column of a query is which gene of a fitted model: by name, by a column of var, without Ensembl versions."""

import logging
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

logger = logging.getLogger("anvi")

PADDED = "anvi_padded"
"""`var` column of features that an object never had and that stand in it as zeros or NaN (`pp.align_query`)."""

_ENSEMBL = re.compile(r"ENS[A-Z]*[GTP]\d{6,}(\.\d+)?(_PAR_Y)?")
_VERSION = r"\.\d+$"


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

    Names are compared as they are; then, where both sides have Ensembl ids, without their versions. A name that
    several columns of the query carry is no name: such genes count as missing, with a warning.

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
    column, ambiguous = _positions(wanted, names)
    if (column < 0).any() and _are_ensembl(wanted) and _are_ensembl(names):
        bare, unsure = _positions(
            wanted.str.replace(_VERSION, "", regex=True), names.str.replace(_VERSION, "", regex=True)
        )
        if ((column < 0) & (bare >= 0)).any():
            how += " without versions"
        column, ambiguous = np.where(column < 0, bare, column), ambiguous | unsure
    taken, times = np.unique(column[column >= 0], return_counts=True)
    twice = np.isin(column, taken[times > 1])  # two genes of the model that differ in their version only
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


def check_share(match: Match, genes: tuple[str, ...], rna: AnnData, gene_key: str | None, least: float, where: str):
    """Raise a ValueError if too few of a model's genes were found; the message shows both sides and a way out."""
    if len(match.found) and match.share >= least:
        return
    names = gene_names(rna, gene_key, where)
    missing = np.flatnonzero(match.column < 0)
    raise ValueError(
        f"{where} has {len(match.found)} of the reference's {len(genes)} genes ({match.share:.0%}) by {match.how}; at "
        f"least {least:.0%} are needed. The reference has {', '.join(genes[i] for i in missing[:3])}, ...; the query "
        f"has {', '.join(names[:3])}, .... {_way_out(pd.Index(genes), names, rna, gene_key, match)}"
    )


def _way_out(genes: pd.Index, names: pd.Index, rna: AnnData, gene_key: str | None, match: Match) -> str:
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


def _positions(wanted: pd.Index, names: pd.Index) -> tuple[np.ndarray, np.ndarray]:
    """Column of each wanted name, -1 for none; and whether several columns carry it."""
    repeated = names.duplicated(keep=False) | (names == "")
    unique = names[~repeated]
    at = unique.get_indexer(wanted)
    column = np.where(at >= 0, np.flatnonzero(~repeated)[at], -1) if len(unique) else np.full(len(wanted), -1)
    return column, wanted.isin(names[repeated & (names != "")])


def _are_ensembl(names: pd.Index) -> bool:
    """Whether most of the names are Ensembl ids."""
    some = names[names != ""][:500]
    return bool(len(some)) and sum(_ENSEMBL.fullmatch(name) is not None for name in some) > len(some) / 2
