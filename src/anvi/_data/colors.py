"""Colours of the classes: the same in predictions as in the labels that they were learnt from."""

import itertools

import pandas as pd
from mudata import MuData

from . import slots
from .containers import Data


def colors_of(data: Data, labels_key: str, classes: tuple[str, ...]) -> list[str] | None:
    """Colours of the classes in the first part whose column of that name has one for each; None if there is none."""
    parts = [data, *(data.mod.values() if isinstance(data, MuData) else ())]
    names = dict.fromkeys((labels_key, labels_key.partition(":")[2]))  # "rna:cell_type" may be coloured as "cell_type"
    for part, name in itertools.product(parts, names):
        colors, column = part.uns.get(f"{name}_colors"), part.obs.get(name)
        if colors is None or column is None or not isinstance(column.dtype, pd.CategoricalDtype):
            continue
        color_of = dict(zip(map(str, column.cat.categories), map(str, colors), strict=False))
        if all(name in color_of for name in classes):
            return [color_of[name] for name in classes]
    return None


def write_colors(out: slots.Writer, key: str, classes: tuple[str, ...], colors: list[str]) -> None:
    """Colours for the predictions and, unless there are labels beyond the classes, for the labels."""
    out.uns(f"{slots.prediction(key)}_colors", colors)
    if list(out.home.obs[slots.label(key)].cat.categories) == list(classes):
        out.uns(f"{slots.label(key)}_colors", list(colors))
