"""pl.embedding."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from anvi._backed import on_file_to_look_at
from anvi._data import containers, slots
from anvi._data.containers import Data, Source, in_memory
from anvi._data.counts import matrix_name, stored_counts
from anvi._data.fits import missing, stored_fits
from anvi._data.predictions import as_colors

from ._figure import class_colors, find_basis, finish, label, no_basis, not_emptied, shorten_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFUSED = {
    "use_raw": "name the layer with layer=; .raw is not read",
    "gene_symbols": "name features by their var_names",
}


SINGLE, PANEL = (4.8, 4.0), (3.4, 3.0)
"""Inches of a panel alone and among others, unless rcParams say otherwise."""


@on_file_to_look_at
def embedding(
    data: Data,
    basis: str = "umap",
    color: str | Sequence[str] | None = None,
    *,
    layer: str | dict[str, str] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
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
        `"totalanvi_prot_denoised:CD4"` and `"totalanvi_proba:B"` are columns of tables in obsm, `"X_totalanvi:0"` one
        of an array. Colours of features and of columns in obsm end at their 99th percentile unless `vmax` is given.
    layer
        Layer that features are read from; a dict gives one per modality; None takes `.X`. `.raw` is never read.
    show
        Show the figure instead of returning Axes. None: if the backend has a screen and `ax` is None.
    save
        File to write the figure to, of the kind that its ending says.
    ax
        Axes to draw into, with at most one `color`.
    return_fig
        Return the figure.
    **sc_kwargs
        Passed on to :func:`scanpy.pl.embedding`: among them `mask_obs` (an array, or a column that is named as in
        `color`), `groups`, `dimensions`, `components`, `projection`, `sort_order`, `edges`, `neighbors_key`,
        `palette`, `cmap`, `na_color`, `na_in_legend`, `size`, `vmin`, `vmax` (`"p99"` is a percentile), `vcenter`,
        `norm`, `legend_loc`, `legend_fontsize`, `legend_fontoutline`, `colorbar_loc`, `add_outline`, `frameon`,
        `ncols`, `wspace`, `hspace`, `title`, `marker`, and what matplotlib's `scatter` takes. Arrays go by the cells of
        the part that holds the basis. `use_raw` and `gene_symbols` are refused.

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
        If counts are to be drawn that `tl.minify` has dropped.
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
    try:
        Source(data).check_layer(layer, somewhere=True)
    except KeyError as error:
        layers = layer.values() if isinstance(layer, dict) else [layer]
        raise next(filter(None, (_not_asked(data, name) for name in layers)), error) from None
    found = find_basis(data, basis)
    if found is None:
        raise no_basis(basis)
    part, slot = found
    wanted = [color] if isinstance(color, str) or color is None else list(color)
    mask = sc_kwargs.get("mask_obs")
    names = dict.fromkeys(name for name in [*wanted, mask if isinstance(mask, str) else None] if name is not None)
    sources = {name: _find(data, name) for name in names}
    small = _small(data, part, slot, sources, layer)
    _check_values(small.obs[list(filter(None, wanted))], sc_kwargs)
    if "norm" not in sc_kwargs:
        limits = [None if name is None else _highest(small.obs[name], sources[name].kind) for name in wanted]
        sc_kwargs = {"vmax": limits} | sc_kwargs
    axes = _draw(small, slot, wanted, ax, sc_kwargs)
    _copy_colors(data, small, sources)
    fig = (axes[0] if isinstance(axes, list) else axes).figure
    return finish(fig, axes, show=show, save=save, return_fig=return_fig, own=ax is None)


def _check_values(colors: pd.DataFrame, sc_kwargs: dict) -> None:
    """Raise a KeyError at groups that no cell is in, which would be drawn as none, and at values without a colour."""
    texts, groups, palette = colors.select_dtypes(exclude="number"), sc_kwargs.get("groups"), sc_kwargs.get("palette")
    there = {str(value) for name in texts for value in texts[name].dropna().unique()}
    groups = [groups] if isinstance(groups, str) else [] if groups is None else groups
    if unknown := sorted({str(name) for name in groups} - there):
        raise KeyError(f"groups: '{unknown[0]}' is no value of what is coloured; there are {sorted(there)[:15]}.")
    if isinstance(palette, Mapping) and (bare := sorted(there - {str(name) for name in palette})):
        raise KeyError(f"palette has no colour for '{bare[0]}'; as a dict it needs one for each value.")


def _draw(small: AnnData, slot: str, color: list[str | None], ax: Axes | None, sc_kwargs: dict) -> Axes | list[Axes]:
    """Let scanpy draw, with room for legends beside the panels."""
    import scanpy as sc
    from matplotlib import pyplot as plt

    before, size = set(plt.get_fignums()), plt.rcParams["figure.figsize"]
    pack = ax is None and not {"wspace", "projection"} & sc_kwargs.keys()
    if list(size) == list(plt.rcParamsDefault["figure.figsize"]):  # nobody has asked for another one
        width, height = PANEL if len(color) > 1 else SINGLE
        size = (width, max(height, 0.26 * _legend_rows(small, color) + 0.4))
    n_columns = int(sc_kwargs.get("ncols", 2 if len(color) in (2, 4) else 3))
    if ax is None and len(color) > 1:
        sc_kwargs = {"ncols": n_columns} | sc_kwargs
    try:
        # warnings between scanpy and matplotlib, nothing that a user could mend
        with warnings.catch_warnings(), plt.rc_context({"figure.figsize": size}):
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
        texts = one.get_legend().get_texts() if one.get_legend() is not None else []
        for text, name in zip(texts, shorten_each(text.get_text() for text in texts), strict=True):
            text.set_text(name)
    if pack:
        drawn = axes if isinstance(axes, list) else [axes]
        _pack(drawn[0].figure, drawn, n_columns)
    return axes


def _highest(values: pd.Series, kind: str) -> float | None:
    """Where the colours of a feature end: at its 99th percentile, so that a few cells do not wash out the others."""
    if kind == "obs" or values.isna().all():
        return None
    high = float(np.nanquantile(values, 0.99))
    return high if high > float(values.min()) else None  # in so few cells that all of them are to be seen


def _legend_rows(small: AnnData, color: list[str | None]) -> int:
    """Rows of the longest legend as scanpy breaks it: one column up to 14 entries, two up to 30, else three."""
    lengths = [0]
    for name in color:
        if name is not None and isinstance(small.obs[name].dtype, pd.CategoricalDtype):
            n = len(small.obs[name].cat.categories) + int(small.obs[name].isna().any())
            lengths.append(-(-n // (1 if n <= 14 else 2 if n <= 30 else 3)))
    return max(lengths)


def _pack(fig: Figure, axes: list[Axes], n_columns: int) -> None:
    """Put the columns of panels as close as what stands beside each allows: scanpy leaves every column the same room.

    Panels keep their size and height; the figure becomes as wide as it must.
    """
    renderer, scale = fig.canvas.get_renderer(), fig.dpi
    colored = [[part for part in one.collections if getattr(part, "colorbar", None) is not None] for one in axes]
    bars = [found[0].colorbar.ax if found else None for found in colored]
    boxes = []  # inches of a panel with its labels, legend and colour bar, from its own left edge
    for one, bar in zip(axes, bars, strict=True):
        parts = [part.get_tightbbox(renderer) for part in (one, bar) if part is not None]
        left = one.get_window_extent(renderer).x0
        boxes.append([(min(p.x0 for p in parts) - left) / scale, (max(p.x1 for p in parts) - left) / scale])
    width, place, moved = fig.get_figwidth(), 0.1, []
    for column in range(min(n_columns, len(axes))):
        mine = range(column, len(axes), n_columns)
        start = place - min(boxes[i][0] for i in mine)
        moved += [(i, start) for i in mine]
        place = start + max(boxes[i][1] for i in mine) + 0.25
    after = place - 0.15
    for i, start in moved:
        shift = start / width - axes[i].get_position().x0
        for part in (axes[i], bars[i]):
            if part is not None:
                box = part.get_position()
                part.set_axes_locator(None)
                part.set_position([(box.x0 + shift) * width / after, box.y0, box.width * width / after, box.height])
    fig.set_figwidth(after)


class _Colour(NamedTuple):
    """Where something that is drawn lies."""

    part: Data
    kind: str  # "obs", "var" or "obsm"
    name: str  # of the column or feature
    slot: str = ""  # in obsm
    place: int = -1  # of the column there


def _find(data: Data, name: str) -> _Colour:
    """What a name means."""
    source = Source(data)
    mod, colon, rest = name.partition(":")
    if colon and mod in source.mods:  # the modality itself: a copy "rna:..." in mdata.obs may be out of date
        part = source.mods[mod]
        if rest in part.obs:
            return _Colour(part, "obs", rest)
        if rest in part.var_names:
            return _Colour(part, "var", rest)
        if (column := _in_obsm(part, rest)) is not None:
            return column
    if name in data.obs:
        return _Colour(data, "obs", name)
    parts = list(source.mods.values()) or [data]
    columns = [part for part in parts if name in part.obs]
    features = [part for part in parts if name in part.var_names]
    for kind, places in (("obs", columns), ("var", features)):
        if len(places) > 1:
            listed = " or ".join(f"'{label(data, part)}:{name}'" for part in places)
            raise ValueError(f"color='{name}' is in several modalities; name one: {listed}.")
        if places:
            return _Colour(places[0], kind, name)
    for part in source.parts:
        if (column := _in_obsm(part, name)) is not None:
            return column
    if (unasked := _not_asked(data, name)) is not None:  # no other slot has what was meant
        raise unasked
    raise KeyError(f"color='{name}' is neither an obs column nor a feature.{_near(source, name)}")


def _not_asked(data: Data, name: str | None) -> KeyError | None:
    """The error for a slot in which a fit of the object has not been asked for an answer yet."""
    there = {slot for part in Source(data).parts for slot in (*part.obsm, *(getattr(part, "layers", None) or ()))}
    wanted = set(str(name).split(":")) - there
    for key, fit in stored_fits(data).items():
        for question in ("latent", "denoise", "foreground"):  # verbs of that name
            for _, slot in slots.of_question(question, key):
                if slot in wanted:
                    return missing(slot, fit.asking(question))
    return None


def _in_obsm(part: Data, name: str) -> _Colour | None:
    """The column of a table or array in obsm that "slot:column" means."""
    slot, colon, column = name.partition(":")
    if not colon or slot not in part.obsm:
        return None
    names = slots.exact_columns(part.obsm[slot], part.uns.get(slots.names_of(slot)))
    if names is None and column.isdecimal() and np.ndim(part.obsm[slot]) == 2:  # an array: by number
        names = list(map(str, range(np.shape(part.obsm[slot])[1])))
    for name in (column, slots.column_name(column)):  # an earlier release wrote "|" for "/"
        if name in (names or ()):
            return _Colour(part, "obsm", name, slot, names.index(name))
    return None


def _near(source: Source, name: str) -> str:
    """Names that look like the one that is not there."""
    there = [(str(other), str(other)) for other in source.obs.columns]
    for mod, part in source.mods.items() or [("", source.data)]:
        prefix = f"{mod}:" if mod else ""
        there += [(str(other), f"{prefix}{other}") for other in [*part.obs.columns, *part.var_names]]
    for part in source.parts:
        for slot, table in part.obsm.items():
            columns = slots.exact_columns(table, part.uns.get(slots.names_of(slot))) if np.ndim(table) == 2 else None
            there += [(column, f"{slot}:{column}") for column in columns or ()]
    written = {}
    for short, full in there:
        written.setdefault(short, full)
    near = difflib.get_close_matches(name.rpartition(":")[2], written, n=3)
    return f" Did you mean {' or '.join(repr(written[other]) for other in near)}?" if near else ""


def _small(
    data: Data, part: Data, slot: str, sources: dict[str, _Colour], layer: str | dict[str, str] | None
) -> AnnData:
    """What scanpy is given: one obs column per name, as it was written; coordinates, graphs and colours of `part`."""
    obs = pd.DataFrame(index=part.obs_names)
    graphs = (item for item in part.uns.items() if isinstance(item[1], dict) and "connectivities_key" in item[1])
    uns: dict[str, Any] = dict(graphs)
    for name, source in sources.items():
        obs[name] = _drawable(_values(data, source, layer)).reindex(obs.index)
        colors = source.part.uns.get(f"{source.name}_colors") if source.kind == "obs" else None
        categories = obs[name].cat.categories if isinstance(obs[name].dtype, pd.CategoricalDtype) else []
        if colors is not None:
            uns[f"{name}_colors"] = as_colors(colors)
        elif slots.UNASSIGNED in categories:
            known = class_colors(list(categories), {slots.UNASSIGNED: slots.UNASSIGNED_COLOR})
            uns[f"{name}_colors"] = [known[category] for category in categories]
    small = AnnData(obs=obs, uns=uns, obsp=dict(part.obsp))
    small.obsm[slot] = np.asarray(part.obsm[slot])
    return small


def _values(data: Data, source: _Colour, layer: str | dict[str, str] | None) -> pd.Series:
    """What is drawn, by cell."""
    if source.kind == "obs":
        return source.part.obs[source.name]
    if source.kind == "var":
        return _feature(data, source.part, source.name, layer)
    table = source.part.obsm[source.slot]
    column = table.iloc[:, source.place] if isinstance(table, pd.DataFrame) else np.asarray(table)[:, source.place]
    return pd.Series(np.asarray(column, dtype=float), source.part.obs_names)


def _feature(data: Data, part: AnnData, name: str, layer: str | dict[str, str] | None) -> pd.Series:
    """Values of one feature."""
    mod = label(data, part)
    where = f"mdata['{mod}']" if mod else "adata"
    if (part.var_names == name).sum() > 1:
        raise ValueError(f"'{name}' is the name of several features of {where}; run {where}.var_names_make_unique().")
    of_mod = containers.layer_of(layer, mod)
    matrix = in_memory(stored_counts(part, of_mod, where))
    if any(slot.endswith(slots.qz_mean("")) for one in Source(data).parts for slot in one.obsm):  # that was minified
        not_emptied(matrix, f"{where}.{matrix_name(of_mod)}")
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


def _copy_colors(data: Data, small: AnnData, sources: dict[str, _Colour]) -> None:
    """Keep the colours that scanpy chose, so that the next plot has the same."""
    for name, (part, kind, there, *_) in sources.items():
        colors = small.uns.get(f"{name}_colors")
        if kind != "obs" or colors is None or data.is_view or part.is_view:
            continue
        if not isinstance(part.obs[there].dtype, pd.CategoricalDtype):
            continue
        chosen, before = as_colors(colors), part.uns.get(f"{there}_colors")
        if before is None or as_colors(before) != chosen:
            part.uns[f"{there}_colors"] = chosen
