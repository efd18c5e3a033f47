"""The shape of scanpy's rank_genes_groups, read back by scanpy itself."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData, read_h5ad, read_zarr
from helpers import quiet_mudata

import anvi as av
from anvi._data.rankings import (
    COLUMNS,
    Ranked,
    build_ranking,
    check_writable,
    find_ranking,
    group_names,
    is_ranking,
    ranking_table,
)

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


@pytest.mark.parametrize("length", [8, 57, 130])
def test_groups_that_no_file_can_hold_are_told_before(length, tmp_path):
    """The border is HDF5's own: one group fewer is written, the last one is not, and that is what is said."""

    def groups(n):
        return [f"{i:05d}".ljust(length, "x") for i in range(n)]

    def written(n):
        none = np.zeros(2)
        ranking = build_ranking(dict.fromkeys(groups(n), Ranked(none, none, none, none)), ["a", "b"], {})
        adata = AnnData(np.zeros((1, 2), np.float32), uns={"r": ranking})
        try:
            adata.write(tmp_path / "x.h5ad")
        except ValueError:
            return False
        return True

    def told(n):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            check_writable(AnnData(np.zeros((1, 2))), groups(n), "uns['r']")
        return any("cannot be written" in str(one.message) for one in seen)

    low, high = 10, 4_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if told(middle) else (middle, high)
    assert written(low) and not written(high)


@pytest.mark.parametrize("verb", ["de", "attributions"])
def test_verbs_tell_of_groups_that_no_file_can_hold(verb, fitted, monkeypatch, tmp_path):
    monkeypatch.setattr("anvi._data.rankings.LARGEST_MESSAGE", 100)
    ask = {
        "de": lambda data, **options: av.tl.differential_expression(
            data, "cell_type", model="totalanvi", n_samples=20, **options
        ),
        "attributions": lambda data, **options: av.tl.attributions(
            data, model="totalanvi", n_cells=1, n_steps=2, baseline="zero", **options
        ),
    }[verb]
    with quiet_mudata():
        first, second = fitted.copy(), fitted.copy()
    with pytest.warns(UserWarning, match=r"names of \d groups take \d+ bytes.*Shorten the names.*inplace=False"):
        ask(first)
    ask(second, inplace=False)  # nothing is written, nothing is to be told
    fitted.write(tmp_path / "x.h5mu")
    with pytest.raises(ValueError, match="cannot be written"):
        ask(tmp_path / "x.h5mu")
