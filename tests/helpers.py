"""Small data sets, and ways to compare them."""

import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

import anvi as av
from anvi._files import sealed


def cite(n_obs: int = 300, **options) -> MuData:
    """A small CITE-seq data set: three batches, two panels, the last batch with RNA only and without labels."""
    return av.datasets.synthetic_cite(n_obs, **{"n_genes": 60} | options)


def resealed(slot: dict) -> dict:
    """A stored model whose checksum fits what it holds now, as a careful hand would leave it."""
    weights = sealed(np.asarray(slot["weights"]).tobytes(), str(slot["config"]))
    return slot | {"weights": np.frombuffer(weights, dtype=np.uint8)}


@contextmanager
def quiet_mudata() -> Iterator[None]:
    """Silence what mudata 0.3 says of columns that it pulls up; it is attributed to whoever called."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"From 0\.4 \.update\(\)", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Cannot join columns with the same name", category=UserWarning)
        warnings.filterwarnings("ignore", message="var_names are not unique", category=UserWarning)
        yield


def mudata_of(mods: dict[str, AnnData], like: MuData | None = None) -> MuData:
    """A MuData of modalities, with the global obs columns of another one."""
    with quiet_mudata():
        mdata = MuData(mods)
    if like is not None:
        for name, column in like.obs.items():
            mdata.obs[name] = column.reindex(mdata.obs_names)
    return mdata


def permuted(adata: AnnData, seed: int) -> AnnData:
    """The same cells in another order."""
    return adata[np.random.default_rng(seed).permutation(adata.n_obs)].copy()


def dense(matrix) -> np.ndarray:
    """Any matrix as an array."""
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def assert_whole(fig) -> None:
    """Raise if something of a figure is cut off."""
    fig.draw_without_rendering()
    box, (width, height) = fig.get_tightbbox(), fig.get_size_inches()
    assert box.x0 >= -0.02 and box.y0 >= -0.02 and box.x1 <= width + 0.02 and box.y1 <= height + 0.02


def contents(data: AnnData | MuData, where: str = "") -> dict[str, object]:
    """Everything that an object holds, by slot, copied: to see later whether it was touched."""
    found: dict[str, object] = {f"{where}uns {key}": _copied(value) for key, value in data.uns.items()}
    for axis in ("obs", "var"):
        found[f"{where}{axis}"] = getattr(data, axis).copy()
    for kind in ("obsm", "varm", "obsp", "varp"):
        found |= {f"{where}{kind} {key}": _copied(value) for key, value in getattr(data, kind).items()}
    if isinstance(data, MuData):
        for name, mod in data.mod.items():
            found |= contents(mod, f"{where}{name} ")
        return found
    found[f"{where}X"] = data.X.copy()
    return found | {f"{where}layers {key}": value.copy() for key, value in data.layers.items() if key is not None}


def _copied(value):
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.copy() if hasattr(value, "copy") else value


def assert_same(one, other, where: str = "") -> None:
    """Raise unless two things are equal bit for bit, types included."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True, obj=where)
    elif sparse.issparse(one):
        assert one.dtype == other.dtype and (one != other).nnz == 0, where
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part), err_msg=where)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        for field in one.dtype.names or [...]:  # NaN is not equal to itself within a record
            np.testing.assert_array_equal(one[field], other[field], err_msg=where)
    else:
        assert one == other, where


def without_rna(whole: MuData, gone) -> MuData:
    """The same cells, some of which lose RNA, and their label in obs["known"]."""
    with quiet_mudata():
        mdata = MuData({"rna": whole["rna"][~whole["rna"].obs_names.isin(gone)].copy(), "prot": whole["prot"].copy()})
    mdata.obs["batch"] = whole.obs["batch"].reindex(mdata.obs_names)
    truth = whole.obs["true_cell_type"].astype(str).reindex(mdata.obs_names)
    mdata.obs["known"] = truth.where(~mdata.obs_names.isin(gone), "Unknown")
    return mdata


def with_peak(call):
    """What a call returns, and the most bytes that it held at once."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
