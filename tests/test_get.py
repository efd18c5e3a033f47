import numpy as np
import pandas as pd
import pytest
import torch
from helpers import cite

import anvi as av


def test_model(fitted):
    for key in ("scvi", "scanvi", "totalvi", "totalanvi"):
        model = av.get.model(fitted, key)
        assert isinstance(model, av.Model) and model.name == key and not model.network.training
        assert next(model.network.parameters()).device.type == "cpu"
        assert model.classes == (av.get.model(fitted, "totalanvi").classes if key.endswith("anvi") else ())


def test_model_is_named_where_there_are_several(fitted):
    with pytest.raises(ValueError, match=r"several fitted models: .*Name one: key="):
        av.get.model(fitted)
    with pytest.raises(KeyError, match="key='nope' is no fitted model"):
        av.get.model(fitted, "nope")
    with pytest.raises(KeyError, match="no fitted model in this object"):
        av.get.model(cite())


def test_models_are_independent(fitted):
    one, other = av.get.model(fitted, "scvi"), av.get.model(fitted, "scvi")
    one.network.encoder.mean.weight.data.zero_()
    assert other.network.encoder.mean.weight.abs().sum() > 0
    assert av.get.model(fitted, "scvi").network.encoder.mean.weight.abs().sum() > 0


@pytest.mark.parametrize("key", ["scanvi", "totalanvi"])
def test_proba(fitted, key):
    home = fitted["rna"] if key == "scanvi" else fitted
    table = av.get.proba(fitted, model=key)
    assert table.columns.tolist() == list(av.get.model(fitted, key).classes)
    pd.testing.assert_frame_equal(table, av.get.table(home, f"{key}_proba"))
    table.iloc[0, 0] = 7
    assert av.get.table(home, f"{key}_proba").iloc[0, 0] <= 1  # a table of its own


def test_proba_before_any_prediction(fitted):
    del fitted.obsm["totalanvi_proba"]
    with pytest.raises(KeyError, match=r"no obsm\['totalanvi_proba'\]; run av.tl.predict\(data, model='totalanvi'\)"):
        av.get.proba(fitted, model="totalanvi")


def test_proba_of_a_model_without_labels(fitted):
    with pytest.raises(ValueError, match=r"model 'totalvi' \(totalvi\) has no labels"):
        av.get.proba(fitted, model="totalvi")


def test_history(fitted):
    for key in ("scvi", "totalanvi"):
        history = av.get.history(fitted, model=key)
        home = fitted["rna"] if key == "scvi" else fitted
        pd.testing.assert_frame_equal(history, home.uns[key]["history"])
        history["epoch"] = -1
        assert (home.uns[key]["history"]["epoch"] >= 0).all()  # a table of its own
    assert history["train_elbo"].dtype == np.float64


def test_batch_representation():
    mdata = av.datasets.synthetic_cite(200, n_genes=30)
    mdata.obs["sex"] = ["f", "m"] * 100
    av.tl.totalvi(mdata, batch_key="batch", categorical_covariate_keys=["sex"], max_epochs=1)
    table, model = av.get.batch_representation(mdata), av.get.model(mdata)
    assert table.index.tolist() == list(model.setup.batches)
    # what a layer makes of nothing, in one batch less in another
    for layer in table.columns.unique("layer"):
        part = model.network.get_submodule(layer)
        nothing = torch.zeros(2, part.weight.shape[1])
        sex = len(table) + torch.zeros(2, dtype=torch.long)
        out = part(nothing, torch.stack([torch.tensor([0, 2]), sex], 1)).detach().numpy()
        np.testing.assert_allclose(out[1] - out[0], table[layer].iloc[2] - table[layer].iloc[0], atol=1e-6)
    widths = [
        part.covariates.numel() // 5
        for part in model.network.modules()
        if getattr(part, "covariates", None) is not None
    ]
    assert sum(widths) == table.shape[1]


def test_one_batch_has_no_representation():
    mdata = av.datasets.synthetic_cite(100, n_genes=30)
    av.tl.scvi(mdata, max_epochs=1)
    with pytest.raises(ValueError, match="batch_key="):
        av.get.batch_representation(mdata)
