"""Where things are in the user's object, which categories there are, who measured what: found once, JSON-able."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from anndata import AnnData

from . import containers, slots
from .antibodies import names_no_target, read_antibody
from .containers import Data, Source, cell_names, listed
from .counts import (
    Proteins,
    check_feature_types,
    check_names_agree,
    check_orientation,
    check_protein_types,
    find_proteins,
)
from .labels import LabelLevels, Levels, Tree, find_levels, label_keys

logger = logging.getLogger("anvi")

Genes: TypeAlias = Literal["auto", "highly_variable", "all"] | Sequence[str]
Antibodies: TypeAlias = Literal["all", "targets"] | Sequence[str]
VARIABLE = "highly_variable"
"""The column of var in which scanpy marks the genes that it chose, and the word that asks for them."""
MANY_GENES = 10_000
FEW_CELLS = 10
"""Cells of a batch or a class below which its user is told that there are few."""

ALL_ZERO_CELLS = 20
"""Cells that a panel of a query must have for a protein that is zero in all of them to count as not measured: in fewer,
chance makes zeros, and the answer for a cell would depend on which others are asked about."""


def find_panels(
    proteins: Proteins,
    panel_of_cell: pd.Series | None,
    names: tuple[str, ...],
    missing: str,
    min_cells: int = 1,
) -> np.ndarray:
    """Work out which panel measured which protein `(panels, proteins)` bool.

    Parameters
    ----------
    proteins
        Protein counts.
    panel_of_cell
        Panel of each cell that has proteins; None for a single panel.
    names
        All panels, also those of cells without proteins.
    missing
        "auto": NaN throughout a panel, a protein that is declared unmeasured, or all-zero in a whole panel is not
        measured. "nan": as "auto" without the last.
    min_cells
        Of a panel in which zeros throughout mean that a protein was not measured.
    """
    measured = np.zeros((len(names), len(proteins.names)), dtype=bool)
    for row, name in enumerate(names):
        cells = slice(None) if panel_of_cell is None else (panel_of_cell == name).to_numpy()
        counts = proteins.counts[cells]
        if len(counts) == 0:
            continue
        given = ~np.isnan(counts)
        measured[row] = given.any(0)
        if proteins.declared is not None and measured[row].any():
            measured[row] &= _declared(proteins, name, len(names))
        if missing == "auto" and len(counts) >= min_cells:
            zero = measured[row] & ~np.where(given, counts != 0, False).any(0)
            measured[row] &= ~zero
            if zero.any():
                logger.info(
                    f"panel '{name}': {zero.sum()} proteins are zero in all of its {len(counts)} cells and taken as "
                    f"not measured: {listed(np.array(proteins.names)[zero])} (missing='nan' keeps them as zeros)"
                )
    return measured


def new_panels(
    proteins: Proteins, panel_of_cell: pd.Series | None, names: tuple[str, ...], setup: "Setup"
) -> np.ndarray:
    """Which of a model's proteins the panels measured that it has not seen `(panels, proteins of the setup)` bool."""
    found = find_panels(proteins, panel_of_cell, names, setup.missing, ALL_ZERO_CELLS)
    table = pd.DataFrame(found, columns=list(proteins.names))
    return table.reindex(columns=list(setup.proteins), fill_value=False).to_numpy(dtype=bool)


def true_or_false(table: pd.DataFrame) -> pd.DataFrame:
    """Who measured what, as booleans; raises a ValueError where something else is said, for any text would be True."""
    odd = ~table.isin([True, False])  # 1 and 0, too
    if odd.any(axis=None):
        row, column = np.argwhere(odd.to_numpy())[0]
        raise ValueError(
            f"varm['measured'] is {table.iloc[row, column]!r} for protein '{table.index[row]}' and panel "
            f"'{table.columns[column]}'; True says that the panel measured it, False that it did not. From text: "
            "table == 'True'; where a value is missing: table.fillna(False)."
        )
    return table.astype(bool)


def _declared(proteins: Proteins, panel: str, n_panels: int) -> np.ndarray:
    table = proteins.declared
    if not isinstance(table, pd.DataFrame):
        raise TypeError("varm['measured'] must be a DataFrame of proteins x panels, as pp.panels writes it.")
    if panel not in table.columns and not n_panels == table.shape[1] == 1:
        raise ValueError(
            f"varm['measured'] has no column for panel '{panel}', only {', '.join(map(repr, table.columns))}. "
            "Run pp.panels again with the panel_key of this fit, or delete varm['measured']."
        )
    return true_or_false(table[[panel]] if panel in table.columns else table).to_numpy()[:, 0]


FAR = 5.0
"""Standard deviations; of the cells of a fit at most one in `FAR**2` is as far from their mean (Chebyshev)."""

OTHER_UNIT = 20.0
"""Size factors that are so many times those of every batch of the fit are of another unit."""


@dataclass(frozen=True)
class Setup:
    """How a data set was read for a fit, and how any other must be read to be seen with the same eyes."""

    genes: tuple[str, ...]
    proteins: tuple[str, ...] = ()
    rna_mod: str = "rna"
    prot_mod: str = "prot"
    prot_obsm: str | None = None
    rna_layer: str | None = None
    prot_layer: str | None = None
    counts: bool = True  # whether RNA must be counts; only the normal likelihood takes anything else
    batch_key: str | None = None
    batches: tuple[str, ...] = ()
    labels_key: str | None = None
    classes: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()  # coarse to fine, where there are several; the last is labels_key
    label_levels: LabelLevels = ()  # where there are several: their names, and what each class is called there
    unlabeled_category: str = "Unknown"
    panel_key: str | None = None
    panels: tuple[str, ...] = ()
    measured: tuple[tuple[bool, ...], ...] = ()  # (panels, proteins)
    missing: str = "auto"
    categorical: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (key, categories)
    continuous: tuple[str, ...] = ()
    continuous_scale: tuple[tuple[float, float], ...] = ()  # mean and deviation of each; empty: taken as they are
    size_factor_key: str | None = None
    size_factor_scale: float = 1.0  # what size factors are multiplied by, so that they sum to the counts
    needs_rna: bool = True  # whether cells with proteins alone are outside of the model
    log_library: tuple[float, ...] = ()  # mean of each batch, for cells without RNA; empty: of the cells that are read

    @property
    def joint(self) -> bool:
        """Whether proteins are read, too; results then go to the global slots."""
        return bool(self.proteins)

    @property
    def levels(self) -> Levels:
        """What the classes are called at each level."""
        return Levels.of(self.label_levels, self.classes, self.labels_key)

    @property
    def mod_beside(self) -> str | None:
        """Modality whose cells without RNA are part of the data; None: there are no such cells."""
        return None if self.needs_rna or not self.joint else self.prot_mod

    @property
    def mods(self) -> tuple[str, ...]:
        """Modalities whose obs may hold a key, after the global one."""
        return self.rna_mod, self.prot_mod

    @property
    def sizes(self) -> dict[str, int | tuple[int, ...]]:
        """What a network for these data has to be sized by, as options of :class:`anvi.nn.Config`."""
        return {
            "n_genes": len(self.genes),
            "n_proteins": len(self.proteins),
            "n_labels": len(self.classes),
            "n_batches": len(self.batches),
            "n_panels": max(1, len(self.panels)),
            "n_categories": tuple(len(categories) for _, categories in self.categorical),
            "n_continuous": len(self.continuous),
        }

    def elsewhere(self, **names: str | None) -> "Setup":
        """The same setup for an object with other names of modalities and obsm; None leaves a name as it is."""
        given: dict[str, Any] = {argument: name for argument, name in names.items() if name is not None}
        return replace(self, **given)

    def in_order_of(self, other: "Setup") -> "Setup":
        """The same setup with genes and proteins in the order of another one, where both have the same."""
        genes, proteins, measured = self.genes, self.proteins, self.measured
        if set(genes) == set(other.genes):
            genes = other.genes
        if set(proteins) == set(other.proteins):
            place = [proteins.index(name) for name in other.proteins]
            proteins, measured = other.proteins, tuple(tuple(row[i] for i in place) for row in measured)
        return replace(self, genes=genes, proteins=proteins, measured=measured)

    def warn_of_far(self, standardised: np.ndarray) -> None:
        """Warn where continuous covariates `(cells, covariates)` are far from those of the cells of the fit."""
        for key, values, (mean, deviation) in zip(self.continuous, standardised.T, self.continuous_scale, strict=True):
            if (np.abs(values) > FAR).mean() > 1 / FAR**2:
                low, high = values.min() * deviation + mean, values.max() * deviation + mean
                logger.warning(
                    f"continuous covariate '{key}' is {low:.4g} to {high:.4g} here and {mean:.4g} +- {deviation:.4g} "
                    "in the cells of the fit: in another unit? The model has not seen such values"
                )

    def warn_of_factors(self, log_library: np.ndarray) -> None:
        """Warn where size factors `(cells,)` are far from those of every batch of the fit, in the mean."""
        apart = log_library.mean() - np.array(self.log_library) if len(log_library) else np.zeros(0)
        if (np.abs(apart) > np.log(OTHER_UNIT)).all() and len(apart):
            logger.warning(
                f"size factors '{self.size_factor_key}' are {np.exp(min(apart, key=abs)):.3g} times those of the cells "
                "of the fit: in another unit? Expected counts are theirs times what the fit has learnt"
            )

    def to_dict(self) -> dict:
        """As a dict that JSON can hold (tuples become lists there)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Setup":
        """Back from JSON."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"The model's setup has unknown entries {unknown}: was it made by a newer anvi?")
        return cls(**{name: _tuples(value) for name, value in values.items()}).checked()

    def checked(self) -> "Setup":
        """The same setup, or a ValueError that names an entry that is not of its kind."""
        for name, kind in get_type_hints(type(self)).items():
            if not _is_of(getattr(self, name), kind):
                raise ValueError(f"The model's setup is damaged: its {name} should be {kind}.")
        # what the types do not say
        n_classes, n_proteins, names_of_levels = len(self.classes), len(self.proteins), self.levels.names
        n_panels = len(self.panels) if self.joint else 0
        names = ("genes", "proteins", "batches", "classes", "panels", "continuous", "label_columns")
        repeated = next((name for name in names if len(set(getattr(self, name))) < len(getattr(self, name))), None)
        for good, what in (
            (repeated is None, f"its {repeated} repeat"),
            (all(len(row) == n_classes > 0 for _, row in self.label_levels), "its levels do not name every class"),
            (self.levels.table[-1] == self.classes, "its levels of labels do not end in its classes"),
            (len(set(names_of_levels)) == len(names_of_levels), "its levels of labels repeat"),
            (len(self.measured) == n_panels, "its table of panels has not a row for each"),
            (not self.joint or n_panels > 0, "it has proteins and no panel"),
            (all(len(row) == n_proteins for row in self.measured), "its table of panels has not a column a protein"),
            (len(self.continuous_scale) in (0, len(self.continuous)), "its covariates have not a scale each"),
            (all(deviation > 0 for _, deviation in self.continuous_scale), "a covariate's deviation is not above 0"),
            (self.size_factor_scale > 0, "its scale of size factors is not above 0"),
            (len(self.log_library) in (0, len(self.batches)), "its batches have not a library size each"),
        ):
            if not good:
                raise ValueError(f"The model's setup is damaged: {what}.")
        return self


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value, maybe a stranger's, is of an annotated type; numbers are finite."""
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        first, last = get_args(kind)
        if not isinstance(value, tuple) or (last is not ... and len(value) != 2):
            return False
        return all(_is_of(one, first if last is ... or place == 0 else last) for place, one in enumerate(value))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def find_setup(
    data: Source | Data,
    *,
    proteins: bool | Antibodies,
    labels_key: str | Sequence[str] | None = None,
    label_tree: Tree | None = None,
    unlabeled_category: str = "Unknown",
    batch_key: str | None = None,
    panel_key: str | None = None,
    missing: str = "auto",
    layer: str | dict[str, str] | None = None,
    genes: Genes = "auto",
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    size_factor_key: str | None = None,
    rna_mod: str = "rna",
    prot_mod: str = "prot",
    prot_obsm: str | None = None,
    counts: bool = True,
    standardise: bool = False,
) -> Setup:
    """Look through an object and write down what a fit needs to know.

    Raises
    ------
    KeyError
        If a modality, layer or obs column is not there; the message lists what is.
    ValueError
        If names repeat, copies of a column disagree, a covariate has missing values, or there is nothing to learn
        labels from.
    """
    source, joint = Source.of(data), proteins is not False
    labels_key, label_columns = label_keys(labels_key)
    unlabeled_category = str(containers.as_name(unlabeled_category))
    categorical = _several(categorical_covariate_keys, "categorical_covariate_keys")
    continuous_keys = _several(continuous_covariate_keys, "continuous_covariate_keys")
    roles = [*(label_columns or (labels_key,)), batch_key, *categorical, *continuous_keys]
    roles += [] if panel_key in (batch_key, *categorical) else [panel_key]  # which only background priors are told by
    if twice := [key for key in roles if key is not None and roles.count(key) > 1]:
        raise ValueError(
            f"The column '{twice[0]}' is named twice among labels, batch, panel and covariates: what a model is told "
            "as one of them it cannot tell from another. Name it once."
        )
    containers.no_obsm_beside(source, prot_obsm)
    source.check_layer(layer)
    for argument, mod in (("rna_mod", rna_mod), ("prot_mod", prot_mod)):
        if "/" in mod and not source.alone:
            raise ValueError(f"{argument}='{mod}': mudata cannot read back a file with '/' in such a name; rename it.")
    # modalities and names
    rna, where = source.modality(rna_mod, "rna_mod"), source.name(rna_mod)
    check_feature_types(rna, where, "" if source.alone or prot_mod in source.mods else prot_mod)
    for axis, what in (("obs", "cell"), ("var", "gene")):
        names = getattr(rna, f"{axis}_names")
        if not len(names):
            raise ValueError(f"{where} has no {what}s.")
        containers.unique_names(names, f"{where}.{axis}_names", what)
    # before columns of obs are looked up: what they lack then is another matter
    check_orientation(source, rna_mod, prot_mod if joint else None)
    if joint and not source.alone and prot_mod in source.mods:
        containers.unique_names(source.mods[prot_mod].obs_names, f"{source.name(prot_mod)}.obs_names", "cell")
        check_names_agree(source.mods[prot_mod].obs_names, source.name(prot_mod), rna, whole=True)
    # columns of the cells
    mods, cells = (rna_mod, prot_mod), cell_names(source, rna_mod, prot_mod if joint else None)
    continuous = {key: _scale(source, key, mods, cells) for key in continuous_keys}
    if standardise:
        constant = [key for key, (_, deviation) in continuous.items() if deviation == 0]
        if constant:
            logger.warning(
                f"continuous covariate {', '.join(constant)}: the same in all cells, but for rounding; left out"
            )
        continuous = {key: scale for key, scale in continuous.items() if key not in constant}
    label_levels = find_levels(source, labels_key, label_columns, label_tree, unlabeled_category, mods, cells)
    setup = Setup(
        genes=choose_genes(rna, genes, where),
        rna_mod=rna_mod,
        prot_mod=prot_mod,
        prot_obsm=prot_obsm,
        rna_layer=containers.layer_of(layer, rna_mod),
        prot_layer=None if source.alone else containers.layer_of(layer, prot_mod),
        counts=counts,
        batch_key=batch_key,
        batches=_categories(source, batch_key, "batch_key", mods, cells),
        labels_key=labels_key,
        label_columns=label_columns,
        classes=label_levels[-1][1] if label_levels else (),
        label_levels=label_levels if len(label_levels) > 1 else (),
        unlabeled_category=unlabeled_category,
        categorical=tuple(
            (key, _categories(source, key, "categorical_covariate_keys", mods, cells)) for key in categorical
        ),
        continuous=tuple(continuous),
        continuous_scale=tuple(continuous.values()) if standardise else (),
        size_factor_key=size_factor_key,
        missing=missing,
        needs_rna=not joint,
    )
    # names that no file could hold
    slots.check_storable(map(slots.column_name, setup.classes), f"labels_key='{labels_key}'", columns=True)
    if source.alone or not joint:  # whose tables are DataFrames
        slots.check_short(source.data, setup.classes, f"labels_key='{labels_key}'")
    for name, row in setup.label_levels:
        slots.check_storable((name, *row), f"labels_key={list(label_columns)}", columns=True)
    for names, what in ((setup.genes, f"{where}.var_names"), (setup.batches, f"batch_key='{batch_key}'")):
        slots.check_storable(names, what)
    for key, categories in setup.categorical:
        slots.check_storable(categories, f"categorical_covariate_keys: '{key}'")
    # proteins, and who measured them
    if proteins is False:
        return setup
    found = find_proteins(source, setup)
    slots.check_storable(found.names, found.where)
    found = found if proteins is True else choose_proteins(found, proteins)
    if not source.alone and len(found.names):
        part = source.modality(prot_mod, "prot_mod")
        check_protein_types(part.var[part.var_names.isin(found.names)], source.name(prot_mod), prot_mod)
    return _with_panels(source, setup, found, panel_key)


def choose_genes(rna: AnnData, genes: Genes, where: str) -> tuple[str, ...]:
    """Names of the genes that a fit is to have, in the order of the object.

    Parameters
    ----------
    rna
        The modality.
    genes
        "highly_variable": those that `var["highly_variable"]` marks; "auto": these where there is such a column, else
        all; "all"; or names.
    where
        What the user calls `rna`, for messages.

    Raises
    ------
    KeyError, TypeError, ValueError
        If there is no such column or gene, the column is no yes and no, or nothing is chosen.
    """
    names = rna.var_names.astype(str)
    if not isinstance(genes, str):
        chosen = _named(names, genes, "genes", f"{where}.var_names")
    elif genes not in ("auto", VARIABLE, "all"):
        raise ValueError(f"genes='{genes}' is not one of 'auto', '{VARIABLE}', 'all'; several names make a list.")
    elif genes == "all" or (genes == "auto" and VARIABLE not in rna.var):
        return tuple(names)
    elif VARIABLE not in rna.var:
        raise KeyError(
            f"genes='{VARIABLE}': there is no {where}.var['{VARIABLE}']. {_selection(where)} writes it from raw counts."
        )
    else:
        column = rna.var[VARIABLE]
        known = column.dropna()
        if not known.isin([True, False]).all():
            raise ValueError(
                f"{where}.var['{VARIABLE}'] holds {known[~known.isin([True, False])].iloc[0]!r}: it must say True or "
                "False of each gene. genes='all' does without it."
            )
        chosen = column.eq(True).fillna(False).to_numpy(dtype=bool)  # a gene that it says nothing of is not chosen
    if not chosen.any():
        what = f"{where}.var['{VARIABLE}'] marks no gene" if isinstance(genes, str) else "genes names none"
        raise ValueError(f"{what}; genes='all' takes all {len(names)}.")
    return tuple(names[chosen])


def choose_proteins(found: Proteins, proteins: Antibodies) -> Proteins:
    """Those proteins that a fit is to have: "all", "targets" (without controls and tags), or names."""
    if not isinstance(proteins, str):
        chosen = _named(pd.Index(found.names), proteins, "proteins", found.where)
    elif proteins == "all":
        return found
    elif proteins == "targets":
        chosen = np.array([not (read_antibody(name).isotype or names_no_target(name)) for name in found.names])
    else:
        raise ValueError(f"proteins='{proteins}' is not one of 'all', 'targets'; several names make a list.")
    if not chosen.any():
        what = "every name is that of an isotype control or tag" if isinstance(proteins, str) else "proteins names none"
        raise ValueError(f"{found.where}: {what}; proteins='all' takes all {len(chosen)}.")
    names = tuple(np.array(found.names, dtype=object)[chosen])
    if len(names) < len(chosen):
        left = [name for name, kept in zip(found.names, chosen, strict=True) if not kept]
        logger.info(f"{len(names)} of {len(chosen)} proteins; left out: {listed(left)}")
    declared = None if found.declared is None else found.declared[chosen]
    return replace(found, names=names, counts=found.counts[:, chosen], declared=declared)


def _named(names: pd.Index, asked: Sequence[str], argument: str, where: str) -> np.ndarray:
    """Which features are asked for `(features,)` bool; a KeyError names one that is not there."""
    no_mask(asked, argument, f"{where}.columns" if "obsm[" in where else f"{where.partition('.')[0]}.var_names")
    wanted = pd.Index(list(map(str, asked)))
    absent = wanted[~wanted.isin(names)]
    if len(absent):
        hint = containers.did_you_mean(absent[0], names)
        raise KeyError(f"{argument}: {len(absent)} are not in {where} (first: '{absent[0]}').{hint}")
    return names.isin(wanted)


def no_mask(asked: Sequence, argument: str, names: str) -> None:
    """Raise a TypeError if a mask stands where names are asked for; `names` are those that it is of, as code."""
    if hasattr(asked, "__len__") and len(asked) and all(isinstance(one, bool | np.bool_) for one in asked):
        raise TypeError(f"{argument}= takes names, and this is a mask: {argument}=list({names}[mask])")


def tell_genes(rna: AnnData, setup: Setup, genes: Genes, by: str = "genes= names") -> str:
    """How many genes a fit has, and why these, in one line; `by` says who named them, where they are a list."""
    n, of = len(setup.genes), rna.n_vars
    if isinstance(genes, str):
        if genes == "all" or VARIABLE not in rna.var:
            return f"all {n} genes"
        return f"{n} of {of} genes: those of var['{VARIABLE}'] (genes='all' takes all)"
    return f"{n} of {of} genes: those that {by}"


def genes_in_code(rna: AnnData, genes: pd.Index) -> str:
    """How a user would write a choice of genes, `{}` being the modality."""
    variable = VARIABLE in rna.var and set(genes) == set(rna.var_names[rna.var[VARIABLE].eq(True).fillna(False)])
    return f"{{}}.var['{VARIABLE}'].eq(True)" if variable else "genes"


def too_many_genes(setup: Setup, n_cells: int, where: str, *, alone: bool) -> str | None:
    """What to say where there are more genes than cells to learn them from; None where there are not."""
    n = len(setup.genes)
    if n <= max(MANY_GENES, n_cells):
        return None
    data = "adata" if alone else where
    return (
        f"{n} genes are many for {n_cells} cells: the fit is slow and learns rare genes by heart. Choose the variable "
        f"ones first, from raw counts; fits then take them by themselves: {_selection(data, setup)}"
    )


def _selection(data: str, setup: Setup | None = None) -> str:
    """The command that chooses variable genes from raw counts."""
    layer = "" if setup is None or setup.rna_layer is None else f", layer='{setup.rna_layer}'"
    return f"sc.experimental.pp.highly_variable_genes({data}, n_top_genes=4000{layer})"


def _with_panels(source: Source, setup: Setup, proteins: Proteins, panel_key: str | None) -> Setup:
    key, panels = panel_key or setup.batch_key, setup.batches
    panel_of_cell = None if key is None else source.text(key, "panel_key", setup.mods).loc[proteins.cells]
    if panel_key is not None:
        if panel_of_cell.isna().any():
            n_missing = panel_of_cell.isna().sum()
            raise ValueError(f"panel_key='{panel_key}' is missing for {n_missing} cells that have proteins.")
        panels = tuple(sorted(panel_of_cell.unique()))
    name = ("panels", proteins.where, tuple(proteins.names), key, panels, setup.missing)  # looked at, and told of, once
    measured = source.once(name, lambda: find_panels(proteins, panel_of_cell, panels, setup.missing))
    if not measured.any():
        raise ValueError(f"No protein was measured in any cell of {proteins.where}: use tl.scvi or tl.scanvi instead.")
    measured = _tuples(measured.tolist())
    return replace(setup, proteins=tuple(proteins.names), panel_key=panel_key, panels=panels, measured=measured)


def numeric_column(source: Source, key: str, argument: str, mods: tuple[str, ...], cells: pd.Index) -> np.ndarray:
    """A column of numbers `(cells,)`, float64; a ValueError names the first cell that has none."""
    column = source.column(key, argument, mods).reindex(cells)
    if (kind := getattr(column.dtype, "kind", "")) in "mM" and kind:  # dates and durations, whatever their unit
        if argument == "size_factor_key":
            raise ValueError(f"{argument}: '{key}' holds dates or durations, and no factors.")
        name = {"m": "timedelta64", "M": "datetime64"}[kind]
        days = column.dropna().to_numpy(dtype=f"{name}[D]").astype(np.int64)
        if (np.abs(days) > 106_751).any():  # what nanoseconds hold
            raise ValueError(f"{argument}: '{key}' has dates or durations that are more than 292 years from 1970 or 0.")
        exact = column.to_numpy(dtype=f"{name}[ns]")
        column = pd.Series(np.where(np.isnat(exact), np.nan, exact.astype(np.int64)), cells)
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    if not np.isfinite(values).all():
        bad = cells[~np.isfinite(values)]
        raise ValueError(f"{argument}: '{key}' is not a finite number in {len(bad)} cells (first: '{bad[0]}').")
    return values


def _scale(source: Source, key: str, mods: tuple[str, ...], cells: pd.Index) -> tuple[float, float]:
    """Mean and standard deviation of a continuous covariate; a deviation that is rounding is 0."""
    values = numeric_column(source, key, "continuous_covariate_keys", mods, cells)
    mean, deviation = float(values.mean()), float(values.std())
    return mean, deviation if deviation > 1e-9 * abs(mean) else 0.0


def _several(keys: Sequence[str] | None, argument: str) -> list[str]:
    keys = [] if keys is None else list(keys)
    if not all(isinstance(key, str) for key in keys):
        raise TypeError(f"{argument} takes a list of column names; got {keys!r:.80}.")
    return keys


def library_means(setup: Setup, log_library: np.ndarray, batch: np.ndarray) -> tuple[float, ...]:
    """Mean log library size of every batch: the setup's, else that of its cells with RNA, else that of all batches."""
    n_batches = len(setup.batches)
    n, total = (np.bincount(batch, weights, n_batches) for weights in (None, log_library))
    found = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    found[: len(setup.log_library)] = setup.log_library
    if np.isnan(found).all():
        raise ValueError("no cell has RNA, and the model does not say how much of it cells have.")
    return tuple(np.where(np.isnan(found), np.nanmean(found), found).tolist())


def _categories(source: Source, key: str | None, argument: str, mods, cells: pd.Index) -> tuple[str, ...]:
    if key is None:
        return ("all",)
    column = source.text(key, argument, mods).loc[cells]
    if column.isna().any():
        missing = column.index[column.isna()]
        raise ValueError(
            f"{argument}: '{key}' has no value for {len(missing)} cells (first: '{missing[0]}'); fill them in."
        )
    return tuple(sorted(column.unique()))
