"""pl.embedding."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from anvi._data import containers
from anvi._data.containers import Data, in_memory
from anvi._data.counts import stored_counts

from ._figure import find_basis, finish, label, no_basis, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFUSED = {
    "save": "save the figure: av.pl.embedding(..., return_fig=True).savefig(...)",
    "use_raw": "name the layer with layer=; .raw is not read",
    "gene_symbols": "name features by their var_names",
}


def embedding(
    data: Data,
    basis: str = "umap",
    color: str | Sequence[str] | None = None,
    *,
    layer: str | dict[str, str] | None = None,
    show: bool | None = None,
    ax: Axes | None = None,
    return_fig: bool = False,
    **sc_kwargs: Any,
) -> Axes | list[Axes] | Figure | None:
    """Scatter plot of an embedding, coloured by features and obs columns of any modality.

    :func:`scanpy.pl.embedding` for MuData: `"rna:CD4"` and `"prot:CD4"` may be drawn side by side. Cells that a
    modality does not have are drawn in light grey.

    Parameters
    ----------
    data
        MuData or AnnData.
    basis
        Coordinates in obsm: `"umap"` means `X_umap`, then `umap`; `"X_totalanvi"` is as good as `"totalanvi"`. Looked
        up in `data`, then in the modalities; `"rna:umap"` is that of a modality, whose cells are then drawn.
    color
        Names of obs columns and features. `"rna:name"` is a column of that modality's obs or one of its features;
        without a prefix, the name is looked up in the obs of `data` and of the modalities, then among the features.
    layer
        Layer that features are read from; a dict gives one per modality; None takes `.X`. `.raw` is never read.
    show
        Show the figure instead of returning Axes. None: if the backend has a screen and `ax` is None.
    ax
        Axes to draw into, with at most one `color`.
    return_fig
        Return the figure.
    **sc_kwargs
        Passed on to :func:`scanpy.pl.embedding`: among them `mask_obs` (an array, or a column that is named as in
        `color`), `groups`, `dimensions`, `components`, `projection`, `sort_order`, `edges`, `neighbors_key`,
        `palette`, `cmap`, `na_color`, `na_in_legend`, `size`, `vmin`, `vmax`, `vcenter`, `norm`, `legend_loc`,
        `legend_fontsize`, `legend_fontoutline`, `colorbar_loc`, `add_outline`, `frameon`, `ncols`, `wspace`, `hspace`,
        `title`, `marker`, and what matplotlib's `scatter` takes. Arrays go by the cells of the part that holds the
        basis. `save`, `use_raw` and `gene_symbols` are refused.

    Returns
    -------
    Axes, or a list of Axes for several colours; the figure with `return_fig`; None if it was shown.

    As :func:`scanpy.pl.embedding` does, sets where a categorical obs column has no colours yet, or `palette` is given:

    `uns['{column}_colors']`
        One colour per category, in the part of `data` that holds the column. Not in views.

    Raises
    ------
    KeyError
        If the basis, a colour or a layer is not there.
    ValueError
        If a name without prefix is in several modalities; the message lists the names with prefix.
    TypeError
        If an argument of scanpy is refused.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, max_epochs=2)
    >>> axes = av.pl.embedding(mdata, "X_totalvi", ["rna:G001", "prot:P01", "cell_type"], show=False)
    """
    containers.check_type(data)
    for name in REFUSED.keys() & sc_kwargs.keys():
        raise TypeError(f"av.pl.embedding has no argument {name}=; {REFUSED[name]}.")
    found = find_basis(data, basis)
    if found is None:
        raise no_basis(basis)
    part, slot = found
    wanted = [color] if isinstance(color, str) or color is None else list(color)
    mask = sc_kwargs.get("mask_obs")
    names = dict.fromkeys(name for name in [*wanted, mask if isinstance(mask, str) else None] if name is not None)
    sources = {name: _find(data, name) for name in names}
    small = _small(data, part, slot, sources, layer)
    axes = _draw(small, slot, wanted, ax, sc_kwargs)
    _copy_colors(data, small, sources)
    fig = (axes[0] if isinstance(axes, list) else axes).figure
    return finish(fig, axes, show=show, return_fig=return_fig, own=ax is None)


def _draw(small: AnnData, slot: str, color: list[str | None], ax: Axes | None, sc_kwargs: dict) -> Axes | list[Axes]:
    """Let scanpy draw, with room for legends beside the panels."""
    import scanpy as sc
    from matplotlib import pyplot as plt

    before = set(plt.get_fignums())
    beside = sc_kwargs.get("legend_loc", "right margin") == "right margin"
    if ax is None and beside and len(color) > 1:
        panel = plt.rcParams["figure.figsize"][0]
        room = _room(small, color, sc_kwargs.get("legend_fontsize")) / panel + 0.02
        # scanpy puts four in a row; with wide legends fewer, so that the figure does not become wider than that
        sc_kwargs = {"wspace": room, "ncols": max(1, int(4.6 / (1 + room)))} | sc_kwargs
    try:
        with warnings.catch_warnings():  # between scanpy and matplotlib, nothing that a user could mend
            warnings.filterwarnings("ignore", message="The set_bad function", category=PendingDeprecationWarning)
            axes = sc.pl.embedding(
                small,
                slot.removeprefix("X_"),
                color=color if len(color) > 1 else (color or [None])[0],
                show=False,
                ax=ax,
                **sc_kwargs,
            )
    except Exception:
        for number in set(plt.get_fignums()) - before:  # an error must not leave half a figure behind
            plt.close(number)
        raise
    for one in axes if isinstance(axes, list) else [axes]:
        for text in one.get_legend().get_texts() if one.get_legend() is not None else ():
            text.set_text(shorten(text.get_text()))
    if ax is None:
        _widen((axes[0] if isinstance(axes, list) else axes).figure)
    return axes


def _room(small: AnnData, color: list[str | None], font_size: float | str | None) -> float:
    """Inches between panels in which the widest legend of scanpy fits."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties

    em = FontProperties(size=font_size or rcParams["legend.fontsize"]).get_size_in_points() / 72
    widest = 0.0
    for name in color:
        if name is not None and isinstance(small.obs[name].dtype, pd.CategoricalDtype):
            lengths = [len(shorten(str(value))) for value in small.obs[name].cat.categories] + [2]  # and "NA"
            n_columns = 1 if len(lengths) <= 14 else 2 if len(lengths) <= 30 else 3
            n_rows = -(-len(lengths) // n_columns)
            columns = [max(lengths[i : i + n_rows]) for i in range(0, len(lengths), n_rows)]
            # handle, its distance to the text, and the distance of columns are 4.8 em in matplotlib
            widest = max(widest, sum((4.9 + 0.53 * length) * em for length in columns))
    return max(0.75, widest + 0.2)  # scanpy's own, and a label of the next panel


def _widen(fig: Figure) -> None:
    """Make a figure wider by what stands out on its right: scanpy leaves no room for the last legend."""
    outside = fig.get_tightbbox().x1 - fig.get_figwidth()
    if outside <= 0:
        return
    before = fig.get_figwidth()
    after = before + outside + 0.1
    for one in fig.axes:
        box = one.get_position(original=True)
        one.set_position([box.x0 * before / after, box.y0, box.width * before / after, box.height])
    fig.set_figwidth(after)


def _find(data: Data, name: str) -> tuple[Data, str, str]:
    """The part of the object that a name is in, `"obs"` or `"var"`, and the name there."""
    mods = data.mod if isinstance(data, MuData) else {}
    mod, colon, rest = name.partition(":")
    if colon and mod in mods:  # the modality itself: a copy "rna:..." in mdata.obs may be out of date
        if rest in mods[mod].obs:
            return mods[mod], "obs", rest
        if rest in mods[mod].var_names:
            return mods[mod], "var", rest
    if name in data.obs:
        return data, "obs", name
    parts = list(mods.values()) if mods else [data]
    columns = [part for part in parts if name in part.obs]
    features = [part for part in parts if name in part.var_names]
    for kind, places in (("obs", columns), ("var", features)):
        if len(places) > 1:
            listed = " or ".join(f"'{label(data, part)}:{name}'" for part in places)
            raise ValueError(f"color='{name}' is in several modalities; name one: {listed}.")
        if places:
            return places[0], kind, name
    raise KeyError(f"color='{name}' is neither an obs column nor a feature.{_near(data, name)}")


def _near(data: Data, name: str) -> str:
    """Names that look like the one that is not there."""
    there = [(str(other), str(other)) for other in data.obs.columns]
    for mod, part in data.mod.items() if isinstance(data, MuData) else [("", data)]:
        prefix = f"{mod}:" if mod else ""
        there += [(str(other), f"{prefix}{other}") for other in [*part.obs.columns, *part.var_names]]
    written = {}
    for short, full in there:
        written.setdefault(short, full)
    near = difflib.get_close_matches(name.rpartition(":")[2], written, n=3)
    return f" Did you mean {' or '.join(repr(written[other]) for other in near)}?" if near else ""


def _small(
    data: Data, part: Data, slot: str, sources: dict[str, tuple[Data, str, str]], layer: str | dict[str, str] | None
) -> AnnData:
    """What scanpy is given: one obs column per name, as it was written; coordinates, graphs and colours of `part`."""
    obs = pd.DataFrame(index=part.obs_names)
    uns: dict[str, Any] = {name: value for name, value in part.uns.items() if _is_graph(value)}
    for name, (source, kind, there) in sources.items():
        values = source.obs[there] if kind == "obs" else _feature(data, source, there, layer)
        obs[name] = _drawable(values).reindex(obs.index)
        colors = source.uns.get(f"{there}_colors") if kind == "obs" else None
        if colors is not None:
            uns[f"{name}_colors"] = list(map(str, np.atleast_1d(colors)))
    small = AnnData(obs=obs, uns=uns, obsp=dict(part.obsp))
    small.obsm[slot] = np.asarray(part.obsm[slot])
    return small


def _is_graph(value: Any) -> bool:
    return isinstance(value, dict) and "connectivities_key" in value


def _feature(data: Data, part: AnnData, name: str, layer: str | dict[str, str] | None) -> pd.Series:
    """Values of one feature."""
    mod = label(data, part) if isinstance(data, MuData) else ""
    where = f"mdata['{mod}']" if mod else "adata"
    if (part.var_names == name).sum() > 1:
        raise ValueError(f"'{name}' is the name of several features of {where}; run {where}.var_names_make_unique().")
    matrix = in_memory(stored_counts(part, containers.layer_of(layer, mod), where))
    column = matrix[:, [part.var_names.get_loc(name)]]
    column = column.toarray() if sparse.issparse(column) else np.asarray(column)
    return pd.Series(column[:, 0], index=part.obs_names)


def _drawable(column: pd.Series) -> pd.Series:
    """As a type that scanpy can draw with cells missing: float or categorical with text categories."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.rename_categories(str)
    if pd.api.types.is_bool_dtype(column.dtype):
        return column.astype(object).map({True: "True", False: "False"}).astype("category")
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.astype("Float64").astype(float) if column.isna().any() else column.astype(float)
    text = column.astype(object)
    return text.where(text.notna(), np.nan).map(str, na_action="ignore").astype("category")


def _copy_colors(data: Data, small: AnnData, sources: dict[str, tuple[Data, str, str]]) -> None:
    """Keep the colours that scanpy chose, so that the next plot has the same."""
    for name, (source, kind, there) in sources.items():
        colors = small.uns.get(f"{name}_colors")
        if kind != "obs" or colors is None or data.is_view or source.is_view:
            continue
        if not isinstance(source.obs[there].dtype, pd.CategoricalDtype):
            continue
        chosen, before = list(map(str, colors)), source.uns.get(f"{there}_colors")
        if before is None or list(map(str, np.atleast_1d(before))) != chosen:
            source.uns[f"{there}_colors"] = chosen
