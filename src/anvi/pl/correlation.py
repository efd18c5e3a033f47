"""pl.correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data import slots
from anvi._data.antibodies import match_antibodies
from anvi._data.containers import Data, Source
from anvi._data.fits import Fit, missing

from ._figure import axes_for, finish, fit_or_prefix, ink, shorten_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_FEATURES = 40  # drawn unless they are named
PROTEIN = "#d63a4e"  # as far from white as from black, as all colours of letters are


@on_file_to_look_at
def correlation(
    data: Data,
    *,
    model: str | None = None,
    features: Sequence[str] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Axes | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Correlation of features as a matrix, those that go together side by side; names of proteins are red.

    Parameters
    ----------
    data
        An object in which :func:`anvi.tl.feature_correlation` has written its slot.
    model
        Key of the fit, or prefix of the slot; None: the only one there.
    features
        Names, `"rna:CD4"` and `"prot:CD4"` where a gene and a protein share one. None: the proteins, and for each its
        own gene or else the gene that goes with it most, 40 features at most; of a model without proteins, the genes
        whose correlations are largest.
    show
        Show the figure instead of returning the Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into.
    return_fig
        Return the figure.

    Returns
    -------
    Axes, the figure with `return_fig`, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such fit, slot or feature; the message names the command that writes the slot.
    ValueError
        If there are several fits and none is named, a name means two features, or fewer than two are named.

    Notes
    -----
    Reads `varp['{key}_correlation']` and `uns[key]`. The order is that of the leaves of a tree of average linkage,
    with one minus the correlation as distance.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> av.tl.feature_correlation(mdata, n_samples=2)
    >>> ax = av.pl.correlation(mdata, features=["G001", "G002", "P01"], show=False)
    """
    fit = fit_or_prefix(data, model, "varp", slots.correlation(""))
    slot, asked = slots.correlation(fit.key), fit.home.uns.get(fit.key, {}).get("correlation", {})
    if slot not in fit.home.varp or not (fit.setup or asked):
        raise missing(f"{fit.where}.varp['{slot}']", fit.asking("feature_correlation"))
    if not fit.setup:  # a prefix alone: what was asked says what modalities are called
        fit = replace(fit, setup={mod: str(asked[mod]) for mod in ("rna_mod", "prot_mod")})
    matrix, names = fit.home.varp[slot], _names(fit)
    inside = np.isfinite(np.diagonal(matrix))  # others are not of the model, or never change
    chosen = _default(matrix, names, inside, fit) if features is None else _named(names, list(features))
    table = np.asarray(matrix[np.ix_(chosen, chosen)], dtype=float)
    order = _order(table)
    table = table[np.ix_(order, order)]
    shown = names.assign(twice=names["name"].duplicated(keep=False)).iloc[chosen[order]]
    side = max(2.4, 0.19 * len(shown))
    fig, (ax,), own = axes_for(ax, 1, "the matrix", side + 2.0, side + 1.4)
    if own:
        fig.set_layout_engine("compressed")  # of axes that stay square, else names may be cut off
    _draw(ax, table, shown, fit, str(asked.get("method", "")))
    return finish(fig, ax, show=show, save=save, return_fig=return_fig, own=own)


def _names(fit: Fit) -> pd.DataFrame:
    """Modality and name of every feature of `fit.home`, in its order."""
    home = fit.home
    if Source(home).alone:
        return pd.DataFrame({"mod": fit.setup["rna_mod"], "name": home.var_names.astype(str)})
    frame = pd.DataFrame({"mod": "", "name": home.var_names.astype(str)})
    for mod in home.mod:
        frame.loc[np.asarray(home.varmap[mod]).reshape(-1) > 0, "mod"] = mod
    return frame


def _default(matrix: np.ndarray, names: pd.DataFrame, inside: np.ndarray, fit: Fit) -> np.ndarray:
    """Places of the features that are drawn if none are named."""
    proteins = np.flatnonzero(inside & (names["mod"] == fit.setup["prot_mod"]).to_numpy())
    genes = np.flatnonzero(inside & (names["mod"] == fit.setup["rna_mod"]).to_numpy())
    if not len(proteins) or not len(genes):
        size = np.nanmean(np.square(matrix[np.ix_(genes, genes)], dtype=np.float64), axis=1)
        return np.sort(genes[np.argsort(-size, kind="stable")[:MAX_FEATURES]])
    proteins = proteins[: MAX_FEATURES // 2]
    partner = genes[np.nanargmax(matrix[np.ix_(proteins, genes)], axis=1)]
    found = match_antibodies(list(names["name"].iloc[genes]), list(names["name"].iloc[proteins]))
    own = dict(zip(found["matched_to"], genes, strict=True))  # the gene of a protein, where the model has it
    partner = [own.get(name, other) for name, other in zip(names["name"].iloc[proteins], partner, strict=True)]
    return np.unique(np.concatenate([proteins, partner]))


def _named(names: pd.DataFrame, features: Sequence[str]) -> np.ndarray:
    """Places of named features."""
    if len(features) < 2:
        raise ValueError("features takes at least two names, e.g. features=['CD3E', 'prot:CD3'].")
    places = []
    for feature in map(str, features):
        mod, _, rest = feature.partition(":")
        exact = (names["mod"] == mod) & (names["name"] == rest)
        found = np.flatnonzero(exact if exact.any() else names["name"] == feature)
        if not len(found):
            raise KeyError(f"features: there is no '{feature}' in varp.")
        if len(found) > 1:
            both = " or ".join(f"'{names['mod'][place]}:{feature}'" for place in found)
            raise ValueError(f"features: '{feature}' is in several modalities; write {both}.")
        places.append(found[0])
    return np.array(places)


def _order(table: np.ndarray) -> np.ndarray:
    """Features that correlate side by side."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(table) < 3:
        return np.arange(len(table))
    distance = 1 - np.nan_to_num(table)
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False).clip(min=0), "average", optimal_ordering=True))


def _draw(ax: Axes, table: np.ndarray, shown: pd.DataFrame, fit: Fit, method: str) -> None:
    from matplotlib import colormaps

    image = ax.imshow(
        table, cmap=colormaps["RdBu_r"].with_extremes(bad="#dcdcdc"), vmin=-1, vmax=1, interpolation="none"
    )
    labels = shorten_each((f"{mod}:{name}" if twice else name for mod, name, twice in shown.to_numpy()), 20)
    size = 8 if len(labels) <= 30 else 7
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    for axis in (ax.xaxis, ax.yaxis):
        for text, mod in zip(axis.get_ticklabels(), shown["mod"], strict=True):
            text.set_color(PROTEIN if mod == fit.setup["prot_mod"] else ink())
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.045, pad=0.02, aspect=22)
    bar.outline.set_visible(False)
    bar.set_label(f"{method.capitalize()} correlation".strip(), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    proteins = (shown["mod"] == fit.setup["prot_mod"]).any()
    ax.set_title(f"{fit.key}, denoised" + (" (names of proteins in red)" if proteins else ""), fontsize=10, loc="left")
