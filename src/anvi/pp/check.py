"""pp.check."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

import numpy as np
import pandas as pd

from anvi._backed import on_file
from anvi._data.antibodies import split_targets
from anvi._data.cells import read_cells, remarks
from anvi._data.containers import Data, Source, cell_names
from anvi._data.fits import odd_cells
from anvi._data.labels import read_labels
from anvi._data.setup import FEW_CELLS, Genes, find_setup, tell_genes, too_many_genes
from anvi._runtime import verb


@dataclass
class Report:
    """What :func:`check` found; shows itself as one screen of text.

    Examples
    --------
    >>> import anvi as av
    >>> report = av.pp.check(av.datasets.synthetic_cite(300, n_genes=60), batch_key="bach")
    >>> report.ok, len(report.problems)
    (False, 1)
    """

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What a fit would refuse, each with its remedy."""
    notes: list[str] = field(default_factory=list)
    """What a fit would accept but you may want to know."""
    cells_per_batch: pd.Series | None = None
    labels: pd.Series | None = None
    panels: pd.DataFrame | None = None

    @property
    def ok(self) -> bool:
        """Whether a fit would start."""
        return not self.problems

    @property
    def session(self) -> str:
        """Versions of what is imported and of all that it rests on, Python and the machine: for bug reports."""
        import session_info2

        try:
            with warnings.catch_warnings():  # of packages that are asked for their version in the way of before
                warnings.simplefilter("ignore", DeprecationWarning)
                return str(session_info2.session_info(cpu=True, dependencies=True))
        except OSError as error:  # it looks into the folder of each editable installation
            return f"{error}: a package was installed from a folder that is gone. Versions: python -m pip list"

    def __repr__(self) -> str:
        lines = [*self.facts]
        if self.labels is not None:
            lines.append("labelled cells: " + ", ".join(f"{name} {count}" for name, count in self.labels.items()))
        if self.panels is not None:
            lines.append("measured proteins by panel:")
            lines += [f"  {name}: {row.sum()} of {len(row)}" for name, row in self.panels.T.iterrows()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        lines.append("ready to fit" if self.ok else f"{len(self.problems)} problem(s) to solve before a fit")
        return "\n".join(lines)


@verb
@on_file
def check(
    data: Data,
    *,
    labels_key: str | list[str] | None = "cell_type",
    label_tree: dict[str, list[str]] | None = None,
    batch_key: str | None = None,
    panel_key: str | None = None,
    unlabeled_category: str | int = "Unknown",
    missing: Literal["auto", "nan"] = "auto",
    layer: str | dict[str, str] | None = None,
    genes: Genes = "auto",
    rna_mod: str = "rna",
    prot_mod: str = "prot",
    prot_obsm: str | None = None,
) -> Report:
    """Look at an object as a fit would, without training and without writing anything.

    Parameters
    ----------
    data
        MuData or AnnData, or the path of its file.
    labels_key
        Column with cell types, or several, coarse to fine; None for models without labels.
    label_tree
        More of what lies under what, as in the fits.
    batch_key, panel_key
        Columns with the batch and the antibody panel of each cell.
    unlabeled_category
        The label of cells whose type is to be predicted.
    missing
        What counts as not measured: "auto" or "nan", as in the fits.
    layer
        Layer with raw counts; a dict gives one per modality; None takes `.X`.
    genes
        "auto", "highly_variable", "all" or a list of names, as in the fits.
    rna_mod, prot_mod
        Names of the modalities.
    prot_obsm
        For an AnnData: where in obsm the protein counts are.

    Returns
    -------
    :class:`Report`: modalities, counts, cells per batch, proteins by panel, labels, and the problems that would stop a
    fit, each with its remedy.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.pp.check(mdata, batch_key="batch").ok
    True
    """
    # the object, before any key is looked at
    source = Source(data)
    shape = ", ".join(f"{name} {mod.n_obs} x {mod.n_vars}" for name, mod in source.mods.items())
    shape = f"MuData: {source.data.n_obs} cells; {shape}"
    if source.alone:
        shape = f"AnnData: {source.data.n_obs} cells x {source.data.n_vars} features"
    packages = [f"{name} {version(name)}" for name in ("anvi", "torch", "mudata", "anndata")]
    report = Report(facts=[shape, f"{', '.join(packages)}, Python {platform.python_version()}"])
    mods = (rna_mod, prot_mod)
    proteins = prot_obsm is not None if source.alone else prot_mod in source.mods
    where = {
        "proteins": proteins,
        "unlabeled_category": unlabeled_category,
        "missing": missing,
        "layer": layer,
        "genes": genes,
        "rna_mod": rna_mod,
        "prot_mod": prot_mod,
        "prot_obsm": prot_obsm,
    }
    # every key is looked at beside those that are right, so that one problem does not hide the next
    keys = {}
    labels = {"labels_key": labels_key, "label_tree": label_tree}
    for more in ({"panel_key": panel_key}, {"batch_key": batch_key}, labels):
        given = any(value is not None for value in more.values())
        if given and _tried(report, lambda tried=keys | more: find_setup(source, **tried, **where)):
            keys |= more
    setup = _tried(report, lambda: find_setup(source, **keys, **where))
    # labels
    if setup and keys.get("labels_key") is not None:
        names = cell_names(source, rna_mod, prot_mod if proteins else None)
        known = read_labels(source, setup, names)
        report.labels = pd.Series(known.text).value_counts()
        report.facts.append(
            f"labels in {labels_key!r}: {report.labels.sum()} of {len(names)} cells, {len(setup.classes)} classes"
        )
        if coarse := int((known.row > len(setup.classes)).sum()):
            report.facts.append(f"{coarse} of these have a coarse label alone")
        rare = report.labels[report.labels < FEW_CELLS]
        if len(rare):
            report.notes.append(f"fewer than {FEW_CELLS} labelled cells of " + ", ".join(map(repr, rare.index)))
        if any("/" in name for name in report.labels.index):
            report.notes.append("class names with '/' are written with '|' in the columns of obsm")
    if not setup:
        return report
    # genes, batches and panels
    rna, name = source.modality(rna_mod, "rna_mod"), source.name(rna_mod)
    report.facts.append(tell_genes(rna, setup, genes))
    if many := too_many_genes(setup, rna.n_obs, name, alone=source.alone):
        report.notes.append(many)
    report.notes += odd_cells(source, setup, keys.get("label_tree"))
    if keys.get("batch_key"):
        column = source.text(batch_key, "batch_key", mods)
        report.cells_per_batch = column.value_counts()
        report.facts.append("cells by batch: " + ", ".join(f"{name} {n}" for name, n in report.cells_per_batch.items()))
    if setup.joint:
        report.panels = pd.DataFrame(np.array(setup.measured).T, index=setup.proteins, columns=list(setup.panels))
        if split := split_targets(setup.proteins, setup.panels, setup.measured):
            report.notes.append(split)
    # counts
    cells = _tried(report, lambda: read_cells(source, setup, labels=True))
    if cells:
        report.notes += remarks(cells, setup)
    if cells and setup.joint:
        n_some = int(cells.has_protein.sum())
        report.facts.append(f"{n_some} of {len(cells)} cells have measured proteins")
    if all(mod in source.mods for mod in mods):
        shared = source.mods[rna_mod].var_names.intersection(source.mods[prot_mod].var_names)
        if len(shared):
            told = f"{len(shared)} names are both a gene and a protein ({', '.join(shared[:3])}): fine here"
            report.notes.append(told)
    return report


def _tried(report: Report, step: Callable):
    """The result of a step, or None with its error among the problems (once)."""
    try:
        return step()
    except (KeyError, ValueError, TypeError) as error:
        text = str(error.args[0])
        if text not in report.problems:
            report.problems.append(text)
        return None
