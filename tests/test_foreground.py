"""Foreground probabilities against loops, their slots, and known truth."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import cite, permuted, quiet_mudata
from mudata import read_h5mu
from queries import by_hand, well_fitted
from sklearn.metrics import roc_auc_score

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._posterior import encode
from anvi.nn import VAE

SOME = [0, 123, 299]


@pytest.mark.parametrize("key", ["totalvi", "totalanvi"])
@pytest.mark.parametrize("code", [None, 1])
def test_against_loops(fitted, key, code):
    model = av.get.model(fitted, key)
    cells = read_cells(fitted, model.setup)
    batch = take(cells, torch.tensor(SOME))
    table = av.tl.foreground(
        fitted, model=key, transform_batch=None if code is None else f"batch_{code}", inplace=False
    )
    for i, n in enumerate(SOME):
        truth = 1 - by_hand(model, batch, i, code).background
        np.testing.assert_allclose(table.loc[cells.names[n]], truth, rtol=1e-4)


def test_batches_and_samples_are_averaged(fitted, monkeypatch):
    each = [av.tl.foreground(fitted, model="totalvi", transform_batch=f"batch_{b}", inplace=False) for b in range(3)]
    seen = []
    encode_cells = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda *args: seen.append(1) or encode_cells(*args))
    together = av.tl.foreground(fitted, model="totalvi", transform_batch="all", inplace=False)
    assert len(seen) == 1
    np.testing.assert_allclose(together, sum(each) / 3, rtol=1e-4)
    whole = av.tl.foreground(fitted, model="totalvi", n_samples=5, inplace=False)
    assert not np.allclose(whole, av.tl.foreground(fitted, model="totalvi", inplace=False), rtol=1e-3)
    monkeypatch.setattr(encode, "CHUNK", 7)
    parts = av.tl.foreground(fitted, model="totalvi", n_samples=5, inplace=False)
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


def test_neither_genes_nor_rates_are_decoded(fitted, monkeypatch):
    for name in ("decode_rna", "decode_share", "decode_protein"):
        monkeypatch.setattr(VAE, name, lambda *args: pytest.fail("more was decoded than asked for"))
    av.tl.foreground(fitted, model="totalvi")


def test_slots(fitted, tmp_path):
    expected = av.tl.foreground(fitted, model="totalvi", inplace=False)
    assert "totalvi_prot_foreground" not in fitted.obsm
    av.tl.foreground(fitted, model="totalvi")
    with quiet_mudata():
        fitted.write(tmp_path / "x.h5mu")
        back = read_h5mu(tmp_path / "x.h5mu")
    for mdata in (fitted, back):
        table = av.get.table(mdata, "totalvi_prot_foreground")
        pd.testing.assert_frame_equal(table, expected)
        assert ((table >= 0) & (table <= 1)).all(axis=None) and (table.dtypes == np.float32).all()
        layer = mdata["prot"].layers["totalvi_foreground"]
        np.testing.assert_array_equal(layer, table.loc[mdata["prot"].obs_names])
        stored = dict(mdata.uns["totalvi"]["foreground"])
        assert stored.pop("transform_batch", None) is None  # of which anndata 0.11 writes nothing
        assert stored == {"n_samples": 1, "random_state": 0}
    av.tl.totalvi(fitted, batch_key="batch", max_epochs=1)
    assert "totalvi_prot_foreground" not in fitted.obsm and "totalvi_foreground" not in fitted["prot"].layers


def test_an_rna_query_gets_them_too(fitted):
    query = permuted(fitted["rna"], 4)[:40].copy()
    query.obs["batch"] = fitted.obs["batch"].loc[query.obs_names]
    av.tl.foreground(query, model=av.get.model(fitted, "totalanvi"), key_added="mine")
    table = av.get.table(query, "mine_prot_foreground")
    assert table.shape == (40, 20) and np.isfinite(table).all(axis=None)
    assert "mine_foreground" not in query.layers
    # the last batch never had proteins: for its cells nothing is missing
    same = table.index[query.obs["batch"] == "batch_2"]
    whole = av.tl.foreground(fitted, model="totalanvi", inplace=False)
    np.testing.assert_allclose(table.loc[same], whole.loc[same], rtol=1e-4)


def test_errors(fitted):
    with pytest.raises(ValueError, match=r"model 'scvi' \(scvi\) has no proteins; fit tl.totalvi"):
        av.tl.foreground(fitted, model="scvi")
    with pytest.raises(ValueError, match="no batch 'x'"):
        av.tl.foreground(fitted, model="totalvi", transform_batch="x")
    with pytest.raises(KeyError, match="no fitted model"):
        av.tl.foreground(cite())


@pytest.mark.slow
def test_truth():
    """Area under the ROC of the proteins that mark a class; measured 0.99 stained, 0.91 hidden."""
    mdata = well_fitted()
    av.tl.foreground(mdata)
    found, truth = av.get.table(mdata, "totalvi_prot_foreground"), av.get.table(mdata, "true_foreground")
    # of the other proteins 2 % are foreground at random, which nothing can foretell
    markers = mdata["prot"].varm["true_markers"].any(axis=1)
    hidden = ~mdata.obs_names.isin(mdata["prot"].obs_names)
    rng = np.random.default_rng(0)
    for cells, least in ((~hidden, 0.9), (hidden, 0.85)):
        one, other = found.loc[cells, markers], truth.loc[cells, markers]
        shuffled = one.iloc[rng.permutation(len(one))]
        areas, chance = (
            np.mean([roc_auc_score(other[name], table[name]) for name in other]) for table in (one, shuffled)
        )
        assert areas > least, areas
        assert abs(chance - 0.5) < 0.1


def test_batches_that_did_not_measure_a_protein_are_told(caplog):
    mdata = cite()
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)  # batch_1 lacks a quarter of the proteins, batch_2 all

    def told(**options) -> list[str]:
        caplog.clear()
        av.tl.denoise(mdata, inplace=False, **options)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    lacking = mdata.uns["truth"]["measured"]["panel_1"]
    name = lacking.index[~lacking][0]
    assert not told(transform_batch="batch_0") and not told() and not told(transform_batch="batch_2", modality="rna")
    assert told(transform_batch="batch_1")[0].startswith(f"transform_batch: {(~lacking).sum()} proteins ({name}, ")
    assert "20 proteins" in told(transform_batch="all")[0] and "'batch_1', 'batch_2'" in told(transform_batch="all")[0]
    assert told(transform_batch="batch_1", features=[name]) and not told(
        transform_batch="batch_1", features=[lacking.index[lacking][0]]
    )
