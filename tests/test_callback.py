"""The callback of a fit: a row per epoch, as in the history, and nothing that it does reaches the fit."""

import pytest
import torch

import anvi as av


@pytest.fixture
def mdata():
    return av.datasets.synthetic_cite(120, n_genes=30)


@pytest.mark.parametrize("name", ["scvi", "scanvi", "totalvi", "totalanvi"])
def test_rows_are_those_of_the_history(mdata, name):
    rows = []
    getattr(av.tl, name)(mdata, max_epochs=3, callback=rows.append)
    history = av.get.history(mdata if name.startswith("total") else mdata["rna"])
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows == history.to_dict("records")
    assert all(isinstance(value, int | float) for row in rows for value in row.values())


def test_what_it_does_changes_nothing(mdata):
    def meddle(row):
        torch.rand(7)
        row.clear()

    alone = av.tl.totalvi(mdata, max_epochs=2, copy=True)
    av.tl.totalvi(mdata, max_epochs=2, callback=meddle)
    assert (mdata.obsm["X_totalvi"] == alone.obsm["X_totalvi"]).all()
    assert av.get.history(mdata).equals(av.get.history(alone))


def test_what_it_raises_ends_the_fit(mdata, tmp_path):
    def refuse(row):
        if row["epoch"] == 2:
            raise ConnectionError("the tracker is gone")

    file = tmp_path / "fit.safetensors"
    with pytest.raises(ConnectionError, match="the tracker is gone"):
        av.tl.totalvi(mdata, max_epochs=3, checkpoint=file, callback=refuse)
    assert "totalvi" not in mdata.uns and "X_totalvi" not in mdata.obsm
    rows = []
    av.tl.totalvi(mdata, max_epochs=3, checkpoint=file, callback=rows.append)  # goes on
    assert [row["epoch"] for row in rows] == [2, 3]


def test_it_must_be_a_function(mdata):
    with pytest.raises(TypeError, match="callback= takes a function; got str: 'wandb'"):
        av.tl.scvi(mdata, callback="wandb")
