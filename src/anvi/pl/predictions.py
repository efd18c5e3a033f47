"""pl.predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.fits import Fit, missing, resolve_fit

from . import _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 3.5  # inches
LEGEND_ROWS = 20
BASIS_NAMES = {"umap": "UMAP", "tsne": "tSNE", "pca": "PC"}  # as scanpy writes them


@on_file_to_look_at
def predictions(
    data: Data,
    *,
    model: str | None = None,
    basis: str | None = None,
    labels_key: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: Sequence[Axes] | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure | None:
    """Labels as given, predictions and confidence side by side, a class in one colour.

    Cells without a label are light grey and lie under the others. Of the confidence, the least sure cells lie on top.

    Parameters
    ----------
    data
        MuData or AnnData with predictions.
    model
        Key of the fit; None: the only one there. Predictions that :func:`anvi.tl.predict` wrote with a model from
        elsewhere are found by their prefix.
    basis
        Coordinates in obsm: `"umap"` means `obsm['X_umap']`, then `obsm['umap']`; `"rna:umap"` is that of a modality;
        of more than two columns the first two are drawn. None: the UMAP, or if there is none the first two principal
        components of the latent space; the axis labels say which.
    labels_key
        Column with labels, found as the fit finds it. None: that of the fit; if it is not in `data`, as in a query, the
        panel is left out.
    show
        Show the figure instead of returning Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into, one per panel.
    return_fig
        Return the figure.

    Returns
    -------
    Array of Axes (labels, prediction, confidence), the figure with `return_fig`, or None if it was shown.

    Raises
    ------
    KeyError
        If nothing was fitted or predicted, or coordinates or labels are not there; the message names the slot and the
        command that writes it.
    ValueError
        If there are several fits and none is named, or no cell can be drawn.

    Notes
    -----
    Reads `obs['{key}_prediction']`, `obs['{key}_confidence']`, the labels, `obsm['X_umap']` or `obsm['X_{key}']`,
    `uns[key]` and, if there, `uns['{labels_key}_colors']` or `uns['{key}_prediction_colors']`. Writes nothing: without
    stored colours, classes get scanpy's default palettes.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> axes = av.pl.predictions(mdata, show=False)
    """
    fit = resolve_fit(data, model, predictions=True)
    prediction, confidence = fit.prediction(), fit.confidence()
    labels = fit.own_labels() if labels_key is None else fit.labels(labels_key)
    labels_key = labels_key or fit.setup.get("labels_key")
    plane, axis_names = _plane(fit, basis)
    shown = np.isfinite(plane).all(1)  # (cells,): others are outside the model, or of the embedding
    if not shown.any():
        raise ValueError(f"No cell has coordinates in {' and '.join(axis_names)}: they are NaN throughout.")
    n_panels = 2 if labels is None else 3
    what = "labels, prediction, confidence" if n_panels == 3 else "prediction, confidence"
    fig, axes, own = _figure.axes_for(ax, n_panels, what, PANEL * n_panels + 1.2, PANEL + 0.3)
    prediction, confidence, plane = prediction[shown], confidence[shown], plane[shown]
    labels = None if labels is None else labels[shown]
    colors = _colors(fit, labels_key, labels, prediction)
    order = np.random.default_rng(0).permutation(len(plane))  # the last class in the file must not hide the others
    if labels is not None:
        _draw_classes(axes[0], plane, labels, colors, order)
        axes[0].set_title(f"{_figure.shorten(labels_key)} ({labels.notna().sum():,} of {len(labels):,} labelled)")
    _draw_classes(axes[-2], plane, prediction, colors, order)
    axes[-2].set_title(f"{fit.key} prediction")
    _draw_confidence(axes[-1], plane, confidence)
    axes[-1].set_title(f"{fit.key} confidence")
    for one in axes:
        one.set(xticks=[], yticks=[], xlabel=axis_names[0], ylabel=axis_names[1])
        one.title.set_fontsize(10)
    for one in axes[1:] if own else []:  # the same coordinates, side by side
        one.set_ylabel("")
    legend = _legend(axes[-2], colors, grey=prediction.isna().any() or (labels is not None and labels.isna().any()))
    if own:  # the legend takes no room from the panels
        width = legend.get_window_extent().width / fig.dpi
        fig.set_figwidth((PANEL + 0.1) * n_panels + 0.9 + width)
    return _figure.finish(fig, np.array(axes, dtype=object), show=show, save=save, return_fig=return_fig, own=own)


def _plane(fit: Fit, basis: str | None) -> tuple[np.ndarray, tuple[str, str]]:
    """Two coordinates per cell of `fit.home`, and what to write at the axes."""
    found = _figure.find_basis(fit.data, basis or "umap", fit.home)
    if found is None and basis is not None:
        raise _figure.no_basis(basis)
    if found is None:
        return _principal_plane(fit)
    part, slot = found
    table = _figure.coordinates(part, slot).reindex(fit.home.obs_names)
    if table.shape[1] < 2:
        raise ValueError(f"basis='{basis or slot}' has {table.shape[1]} column; two are needed.")
    name = slot.removeprefix("X_")
    name = BASIS_NAMES.get(name, f"{name} ")
    return table.to_numpy()[:, :2], (f"{name}1", f"{name}2")


def _principal_plane(fit: Fit) -> tuple[np.ndarray, tuple[str, str]]:
    """The first two principal components of the latent space, and the share of its variance that they hold."""
    slot = slots.latent(fit.key)
    if slot not in fit.home.obsm:
        raise missing(f"obsm['X_umap'] and no {fit.where}.obsm['{slot}']", fit.asking("latent"))
    latent = _figure.coordinates(fit.home, slot).to_numpy()
    inside = np.isfinite(latent).all(1)
    if not inside.any():
        raise ValueError(f"{fit.where}.obsm['{slot}'] is NaN throughout.")
    centred = latent[inside] - latent[inside].mean(0)
    _, scale, rotation = np.linalg.svd(centred, full_matrices=False)
    # the sign of a component is arbitrary: the same data must give the same picture on every machine
    rotation *= np.sign(rotation[np.arange(len(rotation)), np.abs(rotation).argmax(1)])[:, None]
    share = scale**2 / max((scale**2).sum(), np.finfo(float).tiny)
    plane = np.full((len(latent), 2), np.nan)
    plane[inside] = 0
    n = min(2, len(rotation))
    plane[inside, :n] = centred @ rotation[:n].T
    share = np.append(share, [0.0, 0.0])
    return plane, tuple(f"{fit.key} latent PC{i + 1} ({share[i]:.0%})" for i in range(2))


def _colors(fit: Fit, labels_key: str | None, labels: pd.Series | None, prediction: pd.Series) -> dict[str, str]:
    """A colour for each class that is drawn: the model's classes in their order, then labels that it does not know."""
    drawn = set(prediction.dropna().unique()) | (set() if labels is None else set(labels.dropna().unique()))
    known = _figure.stored_colors(fit.home, slots.prediction(fit.key))
    if labels is not None:
        known |= _figure.stored_colors(fit.data, labels_key, fit.mods)
    every = [*fit.classes, *sorted(drawn.difference(fit.classes))]
    # classes that are not drawn still take their colour, so that it stays the same in a subset
    return {name: color for name, color in _figure.class_colors(every, known).items() if name in drawn}


def _draw_classes(ax: Axes, plane: np.ndarray, values: pd.Series, colors: dict[str, str], order: np.ndarray) -> None:
    from matplotlib.colors import to_rgba_array

    style = _figure.point_style(len(plane))
    codes = pd.Index(list(colors)).get_indexer(np.asarray(values, dtype=object))  # -1: no label
    ax.scatter(*plane[codes < 0].T, c=_figure.UNLABELLED, **(style | {"alpha": 1.0}))
    order = order[codes[order] >= 0]
    ax.scatter(*plane[order].T, c=to_rgba_array(list(colors.values()))[codes[order]], **style)


def _draw_confidence(ax: Axes, plane: np.ndarray, confidence: np.ndarray) -> None:
    style = _figure.point_style(len(plane)) | {"alpha": 1.0}  # see-through colours could not be read off the bar
    grey = np.isnan(confidence)
    ax.scatter(*plane[grey].T, c=_figure.UNLABELLED, **style)
    order = np.flatnonzero(~grey)
    order = order[np.argsort(-confidence[order], kind="stable")]
    points = ax.scatter(*plane[order].T, c=confidence[order], vmin=0, vmax=1, cmap="viridis", **style)
    bar = ax.figure.colorbar(points, ax=ax, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)


def _legend(ax: Axes, colors: dict[str, str], grey: bool):
    """Classes in columns on the right of an Axes."""
    entries = dict(zip(_figure.shorten_each(colors), colors.values(), strict=True))
    if grey:
        entries["no label" if "no label" not in entries else "(no label)"] = _figure.UNLABELLED
    handles = [_figure.dot(name, 6, color=color) for name, color in entries.items()]
    return ax.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        ncols=-(-len(handles) // LEGEND_ROWS),
        fontsize=8 if len(handles) <= 3 * LEGEND_ROWS else 7,
        frameon=False,
        handletextpad=0.2,
        columnspacing=0.8,
        borderaxespad=0,
    )
