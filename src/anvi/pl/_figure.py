"""What figures share: where they are drawn, when they are shown, points and colours of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from anvi._data.containers import Data, Source
from anvi._data.fits import Fit, missing, resolve_fit
from anvi._data.predictions import as_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

UNLABELLED = "#dcdcdc"
"""Cells without a label, and entries without a value."""
RASTER_CELLS = 10_000
"""A vector file with more points than this is slow to open: they become an image inside it."""
SAVE_DPI = 150
_FILE_BACKENDS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}  # those that cannot show anything


def axes_for(
    ax: Axes | Sequence[Axes] | None,
    n: int,
    what: str,
    width: float,
    height: float,
    n_rows: int = 1,
    n_columns: int | None = None,
) -> tuple[Figure, list[Axes], bool]:
    """The `n` Axes of the user, or of a figure of our own in inches, row by row; and whether it is our own."""
    if ax is not None:
        given = [ax] if hasattr(ax, "plot") else list(np.ravel(ax))
        if len(given) != n:
            raise ValueError(f"ax= must hold {n} Axes, one for each of {what}; got {len(given)}.")
        return given[0].figure, given, False
    from matplotlib import pyplot as plt

    # a layout that leaves room for what stands outside the axes
    fig, grid = plt.subplots(n_rows, n_columns or n, figsize=(width, height), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for spare in axes[n:]:
        spare.remove()
    return fig, axes[:n], True


def ink() -> str:
    """The colour of text, which is to be seen on light and dark styles alike."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def finish(fig: Figure, axes, *, show: bool | None, save: str | Path | None, return_fig: bool, own: bool):
    """Write a figure, and show it or hand it back, as scanpy's plots do."""
    if save is not None:
        save = Path(save).expanduser()
        if save.is_dir() or not save.absolute().parent.is_dir():
            what = "a folder: name a file in it" if save.is_dir() else f"in no folder that is there: make {save.parent}"
            raise FileNotFoundError(f"save='{save}' is {what}.")
        fig.savefig(save, dpi=SAVE_DPI, bbox_inches="tight")
    if return_fig:
        return fig
    if can_show(own) if show is None else show:
        from matplotlib import pyplot as plt

        plt.show()
        return None
    return axes


def can_show(own: bool) -> bool:
    """Whether `show=None` means True."""
    from matplotlib import get_backend

    return own and get_backend().lower() not in _FILE_BACKENDS


def point_style(n_cells: int) -> dict:
    """Size, opacity and kind of points, so that few cells can be seen and many do not hide each other."""
    size = float(np.clip(40_000 / max(n_cells, 1), 0.6, 22))
    alpha = float(np.clip(1.15 - 0.1 * np.log10(max(n_cells, 1)), 0.5, 0.9))
    return {"s": size, "alpha": alpha, "linewidths": 0, "rasterized": n_cells > RASTER_CELLS}


def dot(label: str, size: float, **style) -> Line2D:
    """A dot of so many points as an entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", linestyle="", markersize=size, label=label, **style)


def legend_beside(ax: Axes, handles: Sequence, title: str) -> None:
    """What dots mean, to the right of their axes."""
    outside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.02), "borderaxespad": 0.2}
    ax.legend(handles=handles, title=title, title_fontsize=7, fontsize=7, frameon=False, labelspacing=0.8, **outside)


def class_colors(names: Sequence[str], known: dict[str, str]) -> dict[str, str]:
    """One colour per name: the known ones, and for the rest those of scanpy's palettes that are still free.

    The palettes have 20, 28 and 102 colours; with more names than that, colours repeat.
    """
    rest = [name for name in names if name not in known]
    colors = {name: known[name] for name in names if name in known}
    if not rest:
        return colors
    from matplotlib.colors import to_hex, to_rgb
    from scanpy.plotting import palettes

    taken = {to_hex(color) for color in colors.values()}
    for palette in (palettes.default_20, palettes.default_28, palettes.default_102):
        free = [to_hex(color) for color in palette if to_hex(color) not in taken]
        free.sort(key=lambda color: min(to_rgb(color)) > 0.7)  # stable: pale ones, like cells without a label, last
        if len(free) >= len(rest):
            break
    return colors | {name: free[i % len(free)] for i, name in enumerate(rest)}


def shorten(name: str, length: int = 32) -> str:
    """A name that does not push everything else out of a figure; the middle goes, since both ends tell types apart.

    Two dollar signs would be read as a formula.
    """
    if len(name) > length:
        head = (length - 1) * 2 // 3
        name = f"{name[:head]}…{name[head + 1 - length :]}"
    return name.replace("$", r"\$")


def shorten_each(names: Iterable[str], length: int = 32) -> list[str]:
    """Names as :func:`shorten` makes them, but longer where two would become the same."""
    names = list(map(str, names))
    short = [shorten(name, length) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    times, longer = Counter(short), shorten_each(names, length + 6)
    return [long if times[name] > 1 else name for name, long in zip(short, longer, strict=True)]


def text_color(background) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = background[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def fit_or_prefix(data: Data, model: str | None, table: str, ending: str, *, joint: bool = False) -> Fit:
    """The fit, or the prefix of a slot that was written under `key_added` or by a model from elsewhere."""
    try:
        return resolve_fit(data, model, joint=joint)
    except KeyError:
        homes = {
            slot.removesuffix(ending): part
            for part in Source(data).parts
            for slot in getattr(part, table)
            if slot.endswith(ending)
        }
        key = next(iter(homes)) if model is None and len(homes) == 1 else model
        if key in homes:
            return Fit(data, homes[key], key)
    return resolve_fit(data, model, predictions=True, joint=joint)  # or the reason why there is none


def find_basis(data: Data, basis: str, first: Data | None = None) -> tuple[Data, str] | None:
    """Where coordinates lie: the part of the object and the name in its obsm; None if nowhere."""
    if not data.n_obs:
        raise ValueError("The object has no cells: there is nothing to draw.")
    mod, colon, rest = basis.partition(":")
    source = Source(data)
    mods = source.mods
    named = bool(colon) and mod in mods
    stem = (rest if named else basis).removeprefix("X_")
    places = [mods[mod]] if named else source.parts
    reserved = set(mods)  # mdata.obsm["rna"] says who is in it
    found = []
    for part in places:
        names = [name for name in (f"X_{stem}", stem) if name in part.obsm]
        names = [name for name in names if part is not data or name not in reserved]
        if names:
            found.append((part, names[0]))
    for part, name in found:
        if part is first or (first is None and part is data):
            return part, name
    if len(found) > 1 and found[0][0] is not data:
        listed = ", ".join(f"'{label(data, part)}:{stem}'" for part, _ in found)
        raise ValueError(f"basis='{basis}' is in several modalities; name one: {listed}.")
    return found[0] if found else None


def no_basis(basis: str) -> KeyError:
    """The error for coordinates that are nowhere."""
    stem = basis.rpartition(":")[2].removeprefix("X_")
    command = "run sc.pp.neighbors(data, use_rep='X_...') and sc.tl.umap(data)" if stem == "umap" else "compute it"
    return missing(f"obsm['X_{stem}'] or obsm['{stem}']", command)


def label(data: Data, part: Data) -> str:
    """The name of a modality; "" for the object itself."""
    return next((mod for mod, modality in Source(data).mods.items() if modality is part), "")


def not_emptied(values, where: str):
    """Counts as they came, or a ValueError where there are none at all: zeros would be drawn as if they were counts."""
    if sparse.issparse(values) and not values.nnz:
        raise ValueError(
            f"{where} is empty, as av.tl.minify leaves it; draw the object from before, with its counts, or what a "
            "model expects, after av.tl.denoise(data)."
        )
    return values


def coordinates(part: Data, slot: str) -> pd.DataFrame:
    """An embedding by cell names."""
    return pd.DataFrame(np.asarray(part.obsm[slot], dtype=float), index=part.obs_names)


def stored_colors(data: Data, key: str, mods: tuple[str, ...] = ()) -> dict[str, str]:
    """Colours that `uns['{key}_colors']` gives to the values of an obs column; empty where it gives none."""
    mod, colon, rest = key.partition(":")
    there = Source(data).mods
    places = [(there[mod], rest)] if colon and mod in there else []  # the most explicit first
    places += [(data, key), *((there[name], key) for name in mods if name in there)]
    columns = [part.obs[name] for part, name in places if name in part.obs]
    colors = [part.uns[f"{name}_colors"] for part, name in places if f"{name}_colors" in part.uns]
    if not columns or not colors or not isinstance(columns[0].dtype, pd.CategoricalDtype):
        return {}
    categories = list(map(str, columns[0].cat.categories))
    values = as_colors(colors[0])
    return dict(zip(categories, values, strict=False)) if len(values) >= len(categories) else {}
