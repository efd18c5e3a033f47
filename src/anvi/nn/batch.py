"""What one pass of the network eats: a fixed-shape minibatch of tensors, labelled cells first."""

from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """The non-zero counts of a minibatch, where they are and what; zeros among them do no harm."""

    row: Tensor  # (entries,) int64
    column: Tensor  # (entries,) int64
    count: Tensor  # (entries,) float

    @classmethod
    def of(cls, x: Tensor) -> "Entries":
        """Found in a dense matrix; this waits for the device, so minibatches bring their own."""
        row, column = x.nonzero(as_tuple=True)
        return cls(row, column, x[row, column])

    def dense(self, like: Tensor) -> Tensor:
        """The matrix `(cells, genes)` that they are the counts of."""
        return torch.zeros_like(like).index_put_((self.row, self.column), self.count, accumulate=True)


class Batch(NamedTuple):
    """A minibatch. Cells of weight 0 are padding: they count in nothing but the batch-norm statistics."""

    x: Tensor | None  # (cells, genes) raw RNA counts; None where `entries` say it all
    y: Tensor | None  # (cells, proteins) raw protein counts, 0 where not measured
    measured: Tensor | None  # (cells, proteins) bool
    batch: Tensor  # (cells,) batch codes
    panel: Tensor | None  # (cells,) panel codes, the rows of the background prior
    codes: Tensor | None  # (cells, covariates) rows of the covariate table: batch first, then the others
    continuous: Tensor | None  # (cells, continuous covariates) as the user gave them
    log_library: Tensor  # (cells, 1) log of the summed RNA counts, or of the size factor
    label: Tensor  # (cells,) class codes, -1 for unlabelled
    weight: Tensor  # (cells,) 1, or 0 for padding
    n_labelled: int = 0  # the first so many cells are labelled; the same in every minibatch of a fit
    entries: Entries | None = None  # the non-zero counts of x; None: to be looked for
    shown: Tensor | None = None  # (cells, proteins) bool, of the measured ones those that the encoder sees; None: all
    seen: Entries | None = None  # the counts that the encoder sees; None: all
