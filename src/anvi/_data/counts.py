"""Are these raw counts? Checks that name the slot, the cell, the feature and the next command."""

from collections.abc import Iterator

import numpy as np
from anndata import AnnData
from scipy import sparse

OFFENCES = ("NaN", "infinite", "negative", "non-integer")
"""What is wrong with a value that is no count; the first one found is the one that is named."""
BLOCK = 1_000_000
"""Values that are looked at together: the check must not need as much memory as the counts."""


def check_counts(
    counts,
    cell_names,
    feature_names,
    where: str,
    adata: AnnData | None,
    *,
    mod: str | None = None,
    missing_allowed: bool = False,
) -> None:
    """Raise a ValueError at the first value that is not a count.

    Parameters
    ----------
    counts
        Dense array or csr `(cells, features)`.
    cell_names, feature_names
        Names of rows and columns.
    where
        The slot, for the message.
    adata
        The modality, to look for a layer that does hold counts; None where there is none.
    mod
        The modality's name in a MuData, where layers are named per modality.
    missing_allowed
        Whether NaN means "not measured" (proteins) and is fine.
    """
    values = counts.data if sparse.issparse(counts) else np.asarray(counts).ravel()
    first, number = dict.fromkeys(OFFENCES), dict.fromkeys(OFFENCES, 0)
    for start in range(0, len(values), BLOCK):
        for kind, offends in _offences(values[start : start + BLOCK], missing_allowed):
            if offends.any():
                first[kind] = start + int(offends.argmax()) if first[kind] is None else first[kind]
                number[kind] += int(offends.sum())
    for kind, position in first.items():
        if position is not None:
            row, column = _place(counts, position)
            raise ValueError(
                f"{where} holds {kind} values where raw counts are expected: {values[position]:.6g} at cell "
                f"'{cell_names[row]}', feature '{feature_names[column]}', and {number[kind] - 1} more. "
                f"{_advice(adata, where, mod, missing_allowed)}"
            )


def _offences(values: np.ndarray, missing_allowed: bool) -> Iterator[tuple[str, np.ndarray]]:
    """For each kind of offence, in the order of `OFFENCES`, which values commit it."""
    missing = np.isnan(values)
    each = (
        missing & (not missing_allowed),
        np.isinf(values),
        values < 0,
        ~missing & (values != np.rint(values)),
    )
    return zip(OFFENCES, each, strict=True)


def check_no_empty_cells(sums: np.ndarray, cell_names, where: str) -> None:
    """Raise a ValueError if a cell has no RNA count at all."""
    empty = np.flatnonzero(sums == 0)
    if len(empty):
        shown = ", ".join(f"'{cell_names[i]}'" for i in empty[:3])
        raise ValueError(
            f"{where} has {len(empty)} cells without a single count ({shown}{', ...' if len(empty) > 3 else ''}). "
            "Remove them first, e.g. sc.pp.filter_cells(mdata['rna'], min_counts=1); mdata.update()."
        )


def looks_like_counts(counts, *, missing_allowed: bool = False) -> bool:
    """Whether the first values are whole and not negative."""
    values = counts.data if sparse.issparse(counts) else np.asarray(counts).ravel()
    values = values[:100_000]
    if missing_allowed:
        values = values[~np.isnan(values)]
    return bool(len(values) and np.isfinite(values).all() and (values >= 0).all() and (values == np.rint(values)).all())


def _advice(adata: AnnData | None, where: str, mod: str | None, missing_allowed: bool) -> str:
    for name, layer in {} if adata is None else adata.layers.items():
        if name and looks_like_counts(layer, missing_allowed=missing_allowed):
            argument = f"'{name}'" if mod is None else f"{{'{mod}': '{name}'}}"
            return f"Counts seem to be in layer '{name}': pass layer={argument}."
    return f"Put the raw counts there; corrected counts can be rounded: {where} = numpy.rint({where})."


def _place(counts, position: int) -> tuple[int, int]:
    if sparse.issparse(counts):
        return int(np.searchsorted(counts.indptr, position, side="right") - 1), int(counts.indices[position])
    return divmod(position, counts.shape[1])
