"""Small things that once went wrong and must not again; each names what a user would have seen."""

import numpy as np
import pytest
from helpers import cite

import anvi as av
from anvi._data.cells import read_cells
from anvi._data.containers import Source
from anvi._fit import loop
from anvi.io._model_pt import _pairs


def test_a_checkpoint_of_another_start_or_other_covariates_is_refused(tmp_path):
    mdata = cite()
    for seed, key in enumerate(("a", "b")):
        av.tl.scvi(mdata, max_epochs=1, key_added=key, random_state=seed)
    file = tmp_path / "fit.safetensors"
    av.tl.scanvi(mdata, init="a", max_epochs=1, checkpoint=file, key_added="sa")
    with pytest.raises(ValueError, match="belongs to another fit"):
        av.tl.scanvi(mdata, init="b", max_epochs=1, checkpoint=file, key_added="sb")
    file = tmp_path / "other.safetensors"
    mdata.obs["age"] = np.arange(300.0)
    av.tl.scvi(mdata, max_epochs=1, checkpoint=file, key_added="c", continuous_covariate_keys=["age"])
    mdata.obs["age"] += 1
    with pytest.raises(ValueError, match="belongs to another fit"):
        av.tl.scvi(mdata, max_epochs=1, checkpoint=file, key_added="c", continuous_covariate_keys=["age"])


def test_one_missing_value_in_one_batch_calls_for_no_adversary():
    mdata = av.datasets.synthetic_cite(300, n_genes=60, n_panels=1, n_batches=1, rna_only_batch=False)
    mdata["prot"].X[0, 0] = np.nan
    av.tl.totalvi(mdata, max_epochs=1)
    cells = read_cells(mdata, av.get.model(mdata).setup)
    assert not loop.panels_differ(cells)
    assert loop._adversary_groups(cells).unique().tolist() == [0]
    assert loop.panels_differ(read_cells(cite(), av.get.model(fit_of_three()).setup))


def fit_of_three():
    mdata = cite()
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    return mdata


def test_a_labelled_model_is_no_start(no_training, fitted):
    with pytest.raises(ValueError, match="needs a model without labels"):
        av.tl.scanvi(fitted, init="scanvi", batch_key="batch", key_added="again")


def test_equal_depths_do_not_break_a_latent_library():
    mdata = cite()
    rng = np.random.default_rng(0)
    same = rng.poisson(2.0, 60).astype(np.float32)
    mdata["rna"].X = np.stack([rng.permutation(same) for _ in range(300)])  # every cell sums to the same
    av.tl.scvi(mdata, max_epochs=2, library="latent")
    assert np.isfinite(mdata["rna"].obsm["X_scvi"]).all()


def test_a_size_factor_library_needs_its_column(no_training):
    with pytest.raises(ValueError, match="library='size_factor' needs size_factor_key="):
        av.tl.scvi(cite(), library="size_factor")


def test_copies_of_a_number_in_two_precisions_agree():
    mdata = cite()
    values = np.random.default_rng(0).random(300)
    mdata.obs["q"] = values
    mdata["rna"].obs["q"] = values.astype(np.float32)
    av.tl.scvi(mdata, max_epochs=1, continuous_covariate_keys=["q"])
    mdata["rna"].obs["q"] = values[::-1].astype(np.float32)
    with pytest.raises(ValueError, match="two copies that disagree"):
        Source(mdata).text("q", "continuous_covariate_keys", ("rna", "prot"))


def test_a_query_may_say_what_its_panels_measured(fitted):
    query = fitted.copy()
    setup = av.get.model(fitted, "totalanvi").setup
    before = read_cells(query, setup).measured
    av.pp.panels(query, "batch", panels={"batch_0": ["P01"], "batch_1": []})
    after = read_cells(query, setup).measured
    assert before.sum() > 100 * 15
    assert after.sum() == (query.obs["batch"] == "batch_0").sum()


def test_nested_keys_of_a_hostile_file_are_refused_before_they_are_hashed():
    deep = ()
    for _ in range(100):
        deep = (deep,)
    with pytest.raises(ValueError, match="dictionary key of type tuple"):
        _pairs([deep, 1])


def test_a_warmup_is_a_share(no_training):
    with pytest.raises(ValueError, match="warmup=5 is a share"):
        av.tl.scvi(cite(), warmup=5)
