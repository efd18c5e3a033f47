"""What `tl.attributions` has to find out before it starts, and how its answers are put into slots."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from anvi._data import containers, explained, slots
from anvi._data.cells import Cells
from anvi._data.containers import Data
from anvi._data.setup import Setup
from anvi._posterior import attribute, baselines
from anvi._posterior.encode import block_seed
from anvi.settings import settings


class Aim(NamedTuple):
    """What is explained, as class codes."""

    target: int | None  # None: each cell's predicted class
    against: int | None  # the second class of a contrast


class Groups(NamedTuple):
    """Groups of cells that attributions are averaged over."""

    column: str  # their column of obs
    names: tuple[str, ...]
    code: Tensor  # (cells,) on the CPU, -1 for none
    chosen: tuple[int, ...]  # codes of those that are explained


def find_aim(target: str | tuple[str, str] | None, classes: tuple[str, ...]) -> Aim:
    """What `target` means.

    Raises
    ------
    KeyError
        If it names no class.
    TypeError, ValueError
        If it is neither one class nor two different ones.
    """
    if target is None:
        return Aim(None, None)
    if not isinstance(target, Sequence):
        raise TypeError(f"target={target!r} must be a class, or a pair of different ones.")
    names = [target] if isinstance(target, str) else list(target)
    if len(names) not in (1, 2) or len(set(names)) < len(names):
        raise ValueError(f"target={target!r} must be a class, or a pair of different ones.")
    for name in names:
        if name not in classes:
            raise KeyError(f"target: the model has no class '{name}'; it has {', '.join(map(repr, classes))}.")
    codes = [classes.index(name) for name in names]
    return Aim(codes[0], codes[1] if len(codes) == 2 else None)


def find_groups(
    data: Data,
    setup: Setup,
    cells: Cells,
    groupby: str | None,
    groups: Sequence[str] | None,
    aim: Aim,
    predicted: Tensor,
    key: str,
) -> Groups:
    """Groups of the cells, and which of them to explain.

    Raises
    ------
    TypeError
        If `groups` is one name instead of several.
    KeyError
        If there is no such column or group.
    ValueError
        If names of groups are the same in a file, or no cell is left.
    """
    if isinstance(groups, str):
        raise TypeError(f"groups takes a list of names, e.g. groups=['{groups}'].")
    if groupby is None:
        column, names, code = slots.prediction(key), setup.classes, predicted
    else:
        column, names, code = _column(data, setup, cells, groupby)
    if len(set(map(slots.column_name, names))) < len(names):
        raise ValueError(f"groupby='{groupby}' has groups that are the same in a file, which cannot hold '/'; rename.")
    if groups is not None and not len(groups):
        raise ValueError(f"groups={groups!r} names none; None: all.")
    if groups is not None:
        unknown = [name for name in groups if name not in names]
        if unknown:
            raise KeyError(
                f"groups: there is no '{unknown[0]}' in '{column}'; there are {', '.join(map(repr, names))}."
            )
        chosen = tuple(sorted({names.index(name) for name in groups}))
    elif groupby is None and aim.against is not None:
        chosen = tuple(sorted((aim.target, aim.against)))
    else:
        chosen = tuple(range(len(names)))
    if not torch.isin(code, torch.tensor(chosen, dtype=torch.long)).any():
        raise ValueError(f"No cell is in any of the groups {', '.join(repr(names[i]) for i in chosen[:10])}.")
    return Groups(column, tuple(names), code, chosen)


def _column(data: Data, setup: Setup, cells: Cells, groupby: str) -> tuple[str, tuple[str, ...], Tensor]:
    """Name in the modalities' obs, groups in their order and the code of each cell."""
    text = containers.text_column(data, groupby, "groupby", setup.mods)
    found = containers.obs_column(data, groupby, "groupby", setup.mods)
    if isinstance(found.dtype, pd.CategoricalDtype):
        names = tuple(name for name in map(str, found.cat.categories) if name)
    else:
        names = tuple(sorted(text.dropna().unique()))
    code = pd.Index(names).get_indexer(text.reindex(cells.names)).astype(np.int64)
    mod, colon, rest = groupby.partition(":")
    return rest if colon and mod in setup.mods else groupby, names, torch.from_numpy(code)


class Question(NamedTuple):
    """Which cells are explained, and what about them."""

    cells: Cells
    index: Tensor  # (explained,) positions in the cells, on the CPU
    groups: Groups
    aim: Aim
    predicted: Tensor  # (cells,) codes of predicted classes, on the CPU
    classes: tuple[str, ...]
    scaled: bool  # whether baselines are brought to a cell's depth: where values are counts

    @property
    def target(self) -> Tensor:
        """Code of the class that is explained, cell by cell `(explained,)`."""
        own = self.predicted[self.index]
        return own if self.aim.target is None else torch.full_like(own, self.aim.target)

    def weights(self) -> Tensor:
        """What the logits are multiplied by `(explained, classes)`."""
        weights = torch.nn.functional.one_hot(self.target, len(self.classes)).float()
        if self.aim.against is not None:
            weights[:, self.aim.against] = -1
        return weights.to(self.cells.label.device)

    def texts(self) -> pd.Categorical:
        """What is explained of each cell, in words."""
        if self.aim.against is not None:
            text = f"{self.classes[self.aim.target]}, not {self.classes[self.aim.against]}"
            return pd.Categorical.from_codes(np.zeros(len(self.index), dtype=int), [text])
        return pd.Categorical.from_codes(self.target.numpy(), list(self.classes))


def find_baselines(question: Question, baseline: str | int, seed: int) -> attribute.Baselines:
    """The baselines of every explained cell.

    Raises
    ------
    ValueError
        If `baseline` is none of the things that it may be, or there are no cells to compare with.
    """
    cells, groups, scaled = question.cells, question.groups, question.scaled
    device = cells.label.device
    if isinstance(baseline, str) and baseline == "zero":
        return baselines.Zero()
    if isinstance(baseline, str) and baseline not in ("each", "rest"):
        if baseline not in groups.names:
            listed = ", ".join(map(repr, groups.names))
            raise ValueError(f"baseline='{baseline}' is not 'each', 'rest', 'zero', a number or a group: {listed}.")
        inside = groups.code == groups.names.index(baseline)
        if not inside.any():
            raise ValueError(f"baseline: there is no cell in the group '{baseline}'.")
        profiles = baselines.mean_profiles(cells, torch.where(inside, 0, -1).to(device), 1, scaled)
        row = torch.zeros(len(question.index), 1, dtype=torch.long, device=device)
        return baselines.Profiles(*profiles, row, scaled)
    sets, row = _other_classes(question)  # (sets, classes) and (explained,)
    rna, protein = baselines.mean_profiles(cells, question.predicted.to(device), len(question.classes), scaled)
    if protein is not None:  # a class without a stained cell is taken for an average one
        every = baselines.mean_over(protein, torch.ones_like(sets[:1], device=device))
        protein = torch.where(protein.isnan(), every, protein)
    if baseline == "each":
        several = torch.stack([chosen.nonzero().squeeze(1) for chosen in sets])  # (sets, other classes)
        return baselines.Profiles(rna, protein, several[row].to(device), scaled)
    chosen = sets.to(device)
    protein = None if protein is None else baselines.mean_over(protein, chosen)
    if baseline == "rest":
        return baselines.Profiles(baselines.mean_over(rna, chosen), protein, row[:, None].to(device), scaled)
    generator = torch.Generator().manual_seed(block_seed(seed, 1))
    stained = None if cells.mask_table is None else cells.measured.any(1).cpu()
    index = baselines.draw_references(question.predicted, sets, int(baseline), generator, stained)
    return baselines.References(cells, index.to(device), row.to(device), protein, scaled)


def _other_classes(question: Question) -> tuple[Tensor, Tensor]:
    """Sets of classes to compare with `(sets, classes)`, and the set of every explained cell `(explained,)`."""
    present = torch.zeros(len(question.classes), dtype=torch.bool)
    present[question.predicted.unique()] = True
    if question.aim.against is None:
        needed, row = question.target.unique(return_inverse=True)
        sets = present.repeat(len(needed), 1)
        sets[torch.arange(len(needed)), needed] = False
        what = f"any class but '{question.classes[int(needed[0])]}'"
    else:
        row = torch.zeros(len(question.index), dtype=torch.long)
        sets = torch.zeros_like(present)[None]
        sets[0, question.aim.against] = present[question.aim.against]
        what = f"'{question.classes[question.aim.against]}'"
    if not sets.any(1).all():
        raise ValueError(
            f"No cell is predicted to be {what}, so there is nothing to compare with: pass baseline='zero' or, with "
            "groupby, the name of a group."
        )
    return sets, row


class Kept:
    """Attributions of single cells, as they are kept."""

    def __init__(self):
        self.index: list[np.ndarray] = []
        self.rna: list[sparse.csr_matrix] = []
        self.protein: list[np.ndarray] = []

    def add(self, part: attribute.Explained) -> None:
        """Keep some more cells."""
        self.index.append(part.index.cpu().numpy())
        self.rna.append(sparse.csr_matrix(part.rna.cpu().numpy()))
        if part.protein is not None:
            self.protein.append(part.protein.cpu().numpy())

    def of(self, question: Question, setup: Setup) -> list[explained.Single]:
        """What was kept, modality by modality, cells in the order of the question."""
        index = np.concatenate(self.index)
        order = np.argsort(index)
        names, texts = pd.Index(question.cells.names[index[order]]), question.texts()
        found = [explained.Single(names, texts, sparse.vstack(self.rna, format="csr")[order], setup.genes)]
        if self.protein:
            found.append(explained.Single(names, texts, np.concatenate(self.protein)[order], setup.proteins))
        return found


def with_bar(parts: Iterator[attribute.Explained], total: int) -> Iterator[attribute.Explained]:
    """Hand on the parts, with a bar where somebody looks."""
    from tqdm.auto import tqdm

    shown = settings.progress is True or (settings.progress == "auto" and sys.stderr.isatty())
    with tqdm(total=total, desc="attributions", unit="cell", disable=not shown) as bar:
        for part in parts:
            yield part
            bar.update(len(part.index))


def parts_of(
    data: Data, setup: Setup, groups: Groups, summary: attribute.Summary, params: dict
) -> list[explained.Part]:
    """The attributions of each modality that is in the object, not yet written."""
    numbers = {name: getattr(summary, name).tolist() for name in ("n_cells", "difference", "delta", "complete")}
    params = {"groupby": groups.column} | params | numbers
    told = params | {"modality": "rna", "layer": setup.rna_layer}
    stored = explained.ranking(*summary.rna, setup.genes, groups.names, told)
    found = [explained.Part(setup.rna_mod, containers.modality(data, setup.rna_mod, "rna_mod"), stored)]
    alone = isinstance(data, AnnData)
    home = data if alone else data.mod.get(setup.prot_mod)
    if summary.protein is not None and home is not None:
        told = params | {"modality": "prot", "layer": setup.prot_layer}
        stored = explained.ranking(*summary.protein, setup.proteins, groups.names, told)
        found.append(explained.Part(setup.prot_mod, home, stored, beside=alone))
    return found
