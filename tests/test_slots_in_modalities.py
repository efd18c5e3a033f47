import numpy as np
import pandas as pd
from anndata import AnnData
from helpers import quiet_mudata
from mudata import MuData

from anvi._data.slots import in_modality, in_varp


def adata(cells, features) -> AnnData:
    return AnnData(
        np.zeros((len(cells), len(features)), dtype=np.float32), pd.DataFrame(index=cells), pd.DataFrame(index=features)
    )


def test_in_modality():
    cells, features = pd.Index([f"c{i}" for i in range(2500)]), ["a", "b", "c"]
    values = np.random.default_rng(0).normal(size=(2500, 3))
    part = adata(["new", *cells[::-2]], ["c", "x", "a"])
    found = in_modality(values, cells, features, part)
    assert found.dtype == np.float32 and found.shape == part.shape
    for i, cell in enumerate(part.obs_names):
        for j, feature in enumerate(part.var_names):
            known = cell in cells and feature in features
            truth = values[cells.get_loc(cell), features.index(feature)] if known else np.nan
            np.testing.assert_equal(found[i, j], np.float32(truth))


def test_nothing_moves():
    values = np.ones((2, 3), dtype=np.float32)
    assert in_modality(values, pd.Index(["p", "q"]), ["a", "b", "c"], adata(["p", "q"], ["a", "b", "c"])) is values


def test_in_varp():
    """Genes and proteins may share names; the object may have its modalities, features and order otherwise."""
    genes, proteins = ["a", "b", "c"], ["b", "d"]
    values = np.arange(25.0).reshape(5, 5)
    with quiet_mudata():
        mdata = MuData(
            {"other": adata(["p"], ["a"]), "prot": adata(["p"], ["d", "b"]), "rna": adata(["p"], ["c", "z", "b", "a"])}
        )
    found = in_varp(values, {"rna": genes, "prot": proteins}, mdata)
    place = {("rna", name): i for i, name in enumerate(genes)} | {
        ("prot", name): 3 + i for i, name in enumerate(proteins)
    }
    there = [("other", "a"), ("prot", "d"), ("prot", "b"), ("rna", "c"), ("rna", "z"), ("rna", "b"), ("rna", "a")]
    assert [name for _, name in there] == mdata.var_names.tolist()
    for i, one in enumerate(there):
        for j, other in enumerate(there):
            truth = values[place[one], place[other]] if one in place and other in place else np.nan
            np.testing.assert_equal(found[i, j], np.float32(truth))


def test_in_varp_without_the_protein_modality():
    with quiet_mudata():
        mdata = MuData({"rna": adata(["p"], ["b", "a"])})
    found = in_varp(np.arange(9.0).reshape(3, 3), {"rna": ["a", "b"], "prot": ["d"]}, mdata)
    np.testing.assert_array_equal(found, [[4, 3], [1, 0]])


def test_in_varp_of_an_anndata_has_room_for_genes_only():
    found = in_varp(np.arange(9.0).reshape(3, 3), {"rna": ["a", "b"], "prot": ["d"]}, adata(["p"], ["b", "d", "a"]))
    np.testing.assert_array_equal(found, [[4, np.nan, 3], [np.nan] * 3, [1, np.nan, 0]])
