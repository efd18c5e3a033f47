"""Which panel measured which protein: by what the user declared, by NaN, and by proteins that are zero throughout."""

import logging

import numpy as np
import pandas as pd

from .proteins import Proteins

logger = logging.getLogger("anvi")


def find_panels(
    proteins: Proteins, panel_of_cell: pd.Series | None, names: tuple[str, ...], missing: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Work out the table of panels.

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

    Returns
    -------
    Panel names, and the table `(panels, proteins)`: True where measured.
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
        if missing == "auto":
            zero = measured[row] & ~np.where(given, counts != 0, False).any(0)
            measured[row] &= ~zero
            if zero.any():
                listed = ", ".join(np.array(proteins.names)[zero][:8]) + (", ..." if zero.sum() > 8 else "")
                logger.info(
                    f"panel '{name}': {zero.sum()} proteins are zero in all of its {len(counts)} cells and taken as "
                    f"not measured: {listed} (missing='nan' keeps them as zeros)"
                )
    return names, measured


def _declared(proteins: Proteins, panel: str, n_panels: int) -> np.ndarray:
    table = proteins.declared
    if isinstance(table, pd.DataFrame):
        if panel in table.columns:
            return table[panel].to_numpy(dtype=bool)
        if n_panels == 1 and table.shape[1] == 1:
            return table.iloc[:, 0].to_numpy(dtype=bool)
        raise ValueError(
            f"varm['measured'] has no column for panel '{panel}', only {', '.join(map(repr, table.columns))}. "
            "Run pp.panels again with the panel_key of this fit, or delete varm['measured']."
        )
    raise TypeError("varm['measured'] must be a DataFrame of proteins x panels, as pp.panels writes it.")
