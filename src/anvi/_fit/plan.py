"""How a network is trained: the options of a fit and the schedules that follow from them."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import numpy as np

BALANCED = 10
"""Genes a protein below which, in a model that is to label cells, proteins would outweigh the genes."""

_NOT_NEGATIVE: tuple[str, ...] = ("warmup", "weight_decay", "classification_ratio", "n_neighbors", "max_retries")
_NOT_NEGATIVE += ("labelled_batch_size", "protein_weight")
_SHARES = ("hide_proteins", "hide_rna", "thin_counts", "label_smoothing")
_RATES = ("lr", "weight_decay", "adam_eps")
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("batch_size", "lr", "adam_eps", "max_grad_norm"), lambda x: x > 0, "must be above 0"),
    (("max_epochs", "patience"), lambda x: x >= 1, "must be at least 1"),
    (("batch_size",), lambda x: x >= 2, "leaves batch norm nothing to work with; use at least 2"),
    (_NOT_NEGATIVE, lambda x: x >= 0, "must not be negative"),
    (("warmup",), lambda x: x <= 1, "is a share of the run and must be at most 1"),
    (_SHARES, lambda x: 0 <= x < 1, "is a share: at least 0 and below 1"),
    (("max_kl_weight", "train_size"), lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
    ((*_RATES, "classification_ratio", "protein_weight"), math.isfinite, "must be finite"),
    (_RATES, lambda x: x <= 1, "would take all weights away; it must be at most 1"),
)
"""Options that are numbers, what must hold of each, and how that is said; None is left to the data."""


@dataclass(frozen=True)
class Plan:
    """Options of a fit; None where the data decide. JSON-able.

    The defaults are one bundle for all four models; the user guide lists how they differ from the published ones.
    """

    max_epochs: int | None = None
    batch_size: int = 128
    labelled_batch_size: int | None = None  # extra class-balanced labelled cells per step; half a minibatch
    lr: float = 4e-3
    weight_decay: float = 1e-6
    adam_eps: float = 1e-8
    warmup: float = 0.4  # share of the planned epochs over which divergences would rise from weight 0 to 1
    train_size: float = 0.9
    early_stopping: bool = True
    patience: int | None = None  # epochs without a better validation loss; a fifth of the run, at least 5
    classification_ratio: float = 50.0
    protein_weight: float | None = None  # of the proteins' likelihood; 1 where there are `BALANCED` genes a protein
    label_smoothing: float = 0.0  # share of each label's weight that is spread over all classes in training
    hide_proteins: float | None = None  # share of cells whose proteins the encoder does not see in a step
    hide_rna: float | None = None  # share of cells with proteins whose RNA the encoder does not see in a step
    thin_counts: float | None = None  # share of cells of whose RNA counts the encoder sees only some in a step
    max_kl_weight: float | None = None  # where the weight of the divergences stops rising
    adversary: bool | None = None  # None: where panels differ
    n_neighbors: int = 5  # labelled training cells that have a say in a cell's label; 0: the classifier alone
    max_grad_norm: float = 50.0
    max_retries: int = 3

    def for_cells(
        self,
        n_train: int,
        *,
        warm_start: bool,
        transfer: bool = False,
        unstained: bool = False,
        without_rna: bool = False,
        genes_per_protein: float = math.inf,
    ) -> "Plan":
        """Fill in what depends on the training cells, and check the rest.

        About 5,000 steps, at least 15 and at most 400 epochs; a fine-tuned model gets a third and no warm-up. A model
        that is to label cells (`transfer`) gets 2,000 steps, for what it learns later does not carry over to other
        batches, or fewer where cells are few: one for two cells, at least 400. It sees half of the cells thinned and a
        fifth without their proteins, or half where some have none (`unstained`), and its divergences count less;
        proteins, too, where there are fewer than `BALANCED` genes for each. Where some cells have proteins alone
        (`without_rna`), it sees half without RNA.
        """
        self.check()
        size = min(self.batch_size, max(2, n_train))  # a minibatch of all cells is as large as they are many
        steps = max(1, math.ceil(n_train / size))  # of an epoch
        wanted = 2_000 if transfer else 5_000
        if transfer and not warm_start:
            wanted = min(wanted, max(400, n_train // 2))
        epochs = min(400, max(15, math.ceil(wanted / steps)))
        epochs = max(5, epochs // 3) if warm_start else epochs
        by_data = {
            "max_epochs": epochs,
            "patience": max(5, (self.max_epochs or epochs) // 5),
            "labelled_batch_size": size // 2,
            "hide_proteins": 0.5 if unstained else 0.2 if transfer else 0.0,
            "hide_rna": 0.5 if without_rna else 0.0,
            "thin_counts": 0.5 if transfer else 0.0,
            "protein_weight": min(1.0, genes_per_protein / BALANCED) if transfer else 1.0,
            "max_kl_weight": 0.1 if transfer else 1.0,
        }
        left: dict[str, Any] = {name: value for name, value in by_data.items() if getattr(self, name) is None}
        return replace(self, batch_size=size, warmup=0.0 if warm_start else self.warmup, **left)

    def check(self) -> None:
        """Raise a TypeError or a ValueError at an option that is no number of its kind, or out of its range."""
        for field in fields(self):
            value, kinds = getattr(self, field.name), get_args(field.type) or (field.type,)
            if int in kinds and (isinstance(value, bool) or not isinstance(value, int | np.integer | None)):
                raise TypeError(f"{field.name}={value!r:.80} must be a whole number.")
            if float in kinds and (isinstance(value, bool) or not isinstance(value, int | float | np.number | None)):
                raise TypeError(f"{field.name}={value!r:.80} must be a number.")
        for names, good, what in _RANGES:
            for name in names:
                if (value := getattr(self, name)) is not None and not good(value):
                    raise ValueError(f"{name}={value} {what}.")
        if self.early_stopping and self.train_size == 1:
            raise ValueError("train_size=1 leaves no validation cells to stop early by; pass early_stopping=False.")

    def kl_weight(self, epoch: int) -> float:
        """Weight of the divergences in an epoch (from 0): rises towards 1 over the warm-up, as far as it may."""
        ramp = self.warmup * self.max_epochs
        return self.max_kl_weight if ramp < 1 else min(self.max_kl_weight, (epoch + 1) / ramp)

    def learning_rate(self, epoch: int) -> float:
        """Cosine from `lr` down to a hundredth of it over the planned epochs."""
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / self.max_epochs)))

    @property
    def last_warmup_epoch(self) -> int:
        """The last epoch in which the divergences have less weight than in the end; -1 if there is none."""
        rising = (epoch for epoch in range(self.max_epochs) if self.kl_weight(epoch) < self.max_kl_weight)
        return max(rising, default=-1)

    def to_dict(self) -> dict:
        """As a dict that JSON can hold."""
        return asdict(self)
