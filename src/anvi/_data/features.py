"""Which genes and proteins a question is about: names, and their places in the model."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .setup import Setup


class Features(NamedTuple):
    """Genes and proteins that an answer is to have, each in its order."""

    genes: np.ndarray | None  # places among the model's genes; None: all of them
    proteins: np.ndarray | None  # places among the model's proteins; None: all of them
    gene_names: tuple[str, ...]  # the model's names of those
    protein_names: tuple[str, ...]
    asked: tuple[str, ...] | None = None  # both kinds, as and in the order in which they were asked for; None: all
    order: np.ndarray | None = None  # places of the asked in genes and proteins joined

    @property
    def has_genes(self) -> bool:
        """Whether any gene is asked for."""
        return bool(self.gene_names)

    @property
    def has_proteins(self) -> bool:
        """Whether any protein is asked for."""
        return bool(self.protein_names)


def find_features(setup: Setup, features: Sequence[str] | None = None, modality: str | None = None) -> Features:
    """Look up features by name.

    Parameters
    ----------
    setup
        Of the model.
    features
        Names; where a gene and a protein share one, `"rna:CD4"` and `"prot:CD4"` (the modalities' names) tell them
        apart. None: every feature.
    modality
        Name of the only modality that is asked about; None: both.

    Raises
    ------
    TypeError
        If `features` is one name instead of several.
    KeyError
        If the model does not have a feature.
    ValueError
        If there is no such modality in the model, a name means two features, or one comes twice.
    """
    mods = (setup.rna_mod, setup.prot_mod) if setup.joint else (setup.rna_mod,)
    if modality is not None and modality not in mods:
        raise ValueError(f"modality='{modality}' is not in the model; it has {' and '.join(map(repr, mods))}.")
    wanted = mods if modality is None else (modality,)
    if features is None:
        genes = setup.genes if setup.rna_mod in wanted else ()
        proteins = setup.proteins if setup.prot_mod in wanted else ()
        nothing = np.zeros(0, dtype=np.int64)
        return Features(None if genes else nothing, None if proteins else nothing, genes, proteins)
    if isinstance(features, str):
        raise TypeError(f"features takes a list of names, e.g. features=['{features}'].")
    places = {
        mod: {name: place for place, name in enumerate(names)}
        for mod, names in zip(mods, (setup.genes, setup.proteins), strict=False)
        if mod in wanted
    }
    asked = tuple(map(str, features))
    found = [_place(name, places) for name in asked]
    if not asked:
        raise ValueError("features is empty; None asks for all.")
    for i, name in enumerate(asked):
        if found[i] in found[:i]:
            raise ValueError(f"features names '{name}' twice.")
    genes, proteins = ([place for mod, place in found if mod == this] for this in (setup.rna_mod, setup.prot_mod))
    joined = [(setup.rna_mod, place) for place in genes] + [(setup.prot_mod, place) for place in proteins]
    return Features(
        np.array(genes, dtype=np.int64),
        np.array(proteins, dtype=np.int64),
        tuple(setup.genes[place] for place in genes),
        tuple(setup.proteins[place] for place in proteins),
        asked,
        np.array([joined.index(one) for one in found]),
    )


def _place(name: str, places: dict[str, dict[str, int]]) -> tuple[str, int]:
    """Modality and place of one name."""
    mod, colon, rest = name.partition(":")
    if colon and rest in places.get(mod, {}):
        return mod, places[mod][rest]
    found = [(mod, there[name]) for mod, there in places.items() if name in there]
    if len(found) > 1:
        both = " or ".join(f"'{mod}:{name}'" for mod, _ in found)
        raise ValueError(f"features: '{name}' is in several modalities; write {both}.")
    if not found:
        near = difflib.get_close_matches(name, [known for there in places.values() for known in there], n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise KeyError(f"features: the model has no '{name}' in {' or '.join(map(repr, places))}.{hint}")
    return found[0]
