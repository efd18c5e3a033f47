"""The first genes and proteins of every cell type, by `tl.differential_expression` on an object with a fitted model.

One type against all others, with the documented defaults. The object is one that holds a fitted joint model, for
instance of `datasets.pbmc_cite()` after `tl.totalanvi`, written with `mdata.write`::

    python benchmarks/markers.py pbmc_totalanvi.h5mu --out benchmarks/results/markers_pbmc.json

Called features have a star.
"""

import argparse
import json
import platform
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

import mudata
import pandas as pd

import anvi as av

COLUMNS = {"names": "name", "logfoldchanges": "lfc", "lfc_std": "lfc_std", "proba_de": "proba", "is_de": "called"}


def first(table: pd.DataFrame, n: int) -> list[dict]:
    """The first features of one group, numbers rounded to what they are worth."""
    rows = table.head(n)[list(COLUMNS)].rename(columns=COLUMNS)
    rows[["lfc", "lfc_std", "proba"]] = rows[["lfc", "lfc_std", "proba"]].astype(float).round(3)
    return rows.to_dict("records")


def shown(features: list[dict]) -> str:
    """Names in rank order, called ones with a star."""
    return " ".join(f"{feature['name']}{'*' if feature['called'] else ''}" for feature in features)


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="h5mu with a fitted model")
    parser.add_argument("--model", help="its key, where there are several")
    parser.add_argument("--groupby", help="column of the groups; default: the labels that the model was fitted to")
    parser.add_argument("--n", type=int, default=10, help="features per group and modality")
    parser.add_argument("--weights", default="uniform", choices=("uniform", "importance"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="also write JSON")
    return parser.parse_args()


def main() -> None:
    """Ask and print."""
    asked = options()
    warnings.filterwarnings("ignore", category=FutureWarning, module="mudata")
    mdata = mudata.read(asked.data)
    model = av.get.model(mdata, asked.model)
    groupby = asked.groupby or model.setup.labels_key
    if groupby is None:
        raise SystemExit("The model has no labels; name a column: --groupby leiden")
    start = time.perf_counter()
    tables = av.tl.differential_expression(
        mdata, groupby, model=model, weights=asked.weights, device=asked.device, inplace=False
    )
    seconds = round(time.perf_counter() - start, 2)
    groups = tables[model.setup.rna_mod]["group"].cat.categories
    markers = {
        group: {mod: first(table[table["group"] == group], asked.n) for mod, table in tables.items()}
        for group in groups
    }
    print(f"{mdata.n_obs} cells, {model.name}, {groupby}: {len(groups)} groups in {seconds} s; * called at FDR 0.05\n")
    for group, by_mod in markers.items():
        n_called = {mod: int(table[table["group"] == group]["is_de"].sum()) for mod, table in tables.items()}
        print(f"{group} ({', '.join(f'{n} {mod}' for mod, n in n_called.items())} called)")
        for mod, features in by_mod.items():
            print(f"    {mod}: {shown(features)}")
    if asked.out is not None:
        facts = {"date": str(date.today()), "machine": platform.processor() or platform.machine()}
        facts |= {"versions": {name: version(name) for name in ("anvi", "torch", "numpy")}}
        facts |= {"data": asked.data.name, "model": model.name, "groupby": groupby, "weights": asked.weights}
        facts |= {"n_cells": mdata.n_obs, "seconds": seconds}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(facts | {"markers": markers}, indent=1))


if __name__ == "__main__":
    main()
