"""The shape of scanpy's rank_genes_groups, read back by scanpy itself."""

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData, read_h5ad, read_zarr

from anvi._data.rankings import COLUMNS, Ranked, build_ranking, find_ranking, group_names, is_ranking, ranking_table

GROUPS = ["NK/T", "B cell", "αβ"]
FEATURES = [f"G{i}" for i in range(7)]


def columns(seed: int = 0) -> dict[str, Ranked]:
    rng = np.random.default_rng(seed)
    return {
        group: Ranked(
            *(rng.normal(size=7) for _ in range(4)),
            extras={"lfc_std": rng.random(7).astype(np.float32), "exact": rng.random(7)},
        )
        for group in GROUPS
    }


def test_rows_of_every_column_belong_to_the_name_in_that_row():
    given = columns()
    stored = build_ranking(given, FEATURES, {"groupby": "g", "reference": "rest"})
    for group, part in given.items():
        # dumber: a dict by name, sorted by Python
        wanted = sorted(FEATURES, key=lambda name: -part.scores[FEATURES.index(name)])
        assert stored["names"][group].tolist() == wanted
        for column, values in [(c, getattr(part, c)) for c in COLUMNS] + list(part.extras.items()):
            by_name = dict(zip(FEATURES, values, strict=True))
            # stored as float32 where scanpy does
            np.testing.assert_allclose(stored[column][group], [by_name[name] for name in wanted], rtol=1e-6)
    assert stored["params"] == {"method": "anvi", "use_raw": False, "groupby": "g", "reference": "rest"}
    kinds = {column: stored[column].dtype[0] for column in stored if column not in ("params", "names")}
    assert kinds == {
        "scores": np.float32,
        "logfoldchanges": np.float32,
        "pvals": np.float64,
        "pvals_adj": np.float64,
        "lfc_std": np.float32,
        "exact": np.float64,
    }


def test_ties_keep_their_order_and_nan_comes_last():
    nothing = np.full(4, np.nan)
    part = Ranked(np.array([1.0, np.nan, 2.0, 1.0]), nothing, nothing, nothing)
    assert build_ranking({"a": part}, list("wxyz"), {})["names"]["a"].tolist() == ["y", "w", "z", "x"]


@pytest.mark.parametrize("form", ["memory", "h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore")
def test_scanpy_and_we_read_the_same_before_and_after_a_file(form, tmp_path):
    adata = AnnData(np.ones((6, 7), np.float32), var=pd.DataFrame(index=FEATURES))
    adata.obs["g"] = pd.Categorical([*GROUPS, *GROUPS])
    given = columns()
    adata.uns["r"] = build_ranking(given, FEATURES, {"groupby": "g", "reference": "rest", "delta": None, "fdr": 0.3})
    if form == "h5ad":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = read_h5ad(tmp_path / "a.h5ad")
    elif form == "zarr":
        adata.write_zarr(tmp_path / "a.zarr")
        adata = read_zarr(tmp_path / "a.zarr")
    assert is_ranking(adata.uns["r"]) and group_names(adata.uns["r"]) == GROUPS
    ours = ranking_table(adata.uns["r"])
    theirs = sc.get.rank_genes_groups_df(adata, None, key="r")
    assert len(ours) == len(theirs) == 21
    for column in ("group", "names", *COLUMNS):
        assert ours[column].tolist() == theirs[column].tolist()
    assert (ours["is_de"] == (ours["pvals_adj"] <= 0.3)).all()
    one = ranking_table(adata.uns["r"], ["B cell"])
    assert one["names"].tolist() == sc.get.rank_genes_groups_df(adata, "B cell", key="r")["names"].tolist()


def test_what_is_found():
    adata = AnnData(np.ones((2, 7), np.float32), var=pd.DataFrame(index=FEATURES))
    adata.uns["r"] = adata.uns["r_prot"] = build_ranking(columns(), FEATURES, {})
    adata.uns["other"] = {"params": {}}
    assert list(find_ranking(adata, "r")) == ["rna", "prot"]
    assert find_ranking(adata, "other") == find_ranking(adata, "nowhere") == {}
