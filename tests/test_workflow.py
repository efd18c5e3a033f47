"""The whole chain, every step from memory and from a file; and whether the truth of made-up data is recovered."""

import mudata
import numpy as np
import pandas as pd
import pytest
from helpers import cite, mudata_of, quiet_mudata

import anvi as av


def through_file(mdata, path):
    with quiet_mudata():
        mdata.write_h5mu(path)
        return mudata.read_h5mu(path)


@pytest.mark.parametrize("between", ["memory", "file"])
def test_from_counts_to_labels(tmp_path, between):
    """Fit, ask, fit again from there, map a query of RNA alone: after each step the object may go through a file."""

    def step(mdata, n=iter(range(100))):
        return through_file(mdata, tmp_path / f"{next(n)}.h5mu") if between == "file" else mdata

    mdata = cite()
    av.pp.panels(mdata, "batch")
    mdata = step(mdata)
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=2)
    mdata = step(mdata)
    av.tl.totalanvi(mdata, batch_key="batch", init="totalvi", max_epochs=2)
    mdata = step(mdata)
    av.tl.predict(mdata, model="totalanvi", key_added="again")
    av.tl.latent(mdata, model="totalanvi", key_added="again")
    mdata = step(mdata)
    np.testing.assert_array_equal(mdata.obsm["X_again"], mdata.obsm["X_totalanvi"])
    np.testing.assert_array_equal(mdata.obsm["again_proba"], mdata.obsm["totalanvi_proba"])
    assert (mdata.obs["again_prediction"] == mdata.obs["totalanvi_prediction"]).all()
    assert len(av.get.history(mdata, model="totalanvi")) == 2
    query = mudata_of({"rna": mdata["rna"].copy()}, mdata)
    av.tl.predict(query, model=av.get.model(mdata, "totalanvi"))
    query = step(query)
    assert query.obs["totalanvi_prediction"].notna().all() and np.isfinite(av.get.table(query, "totalanvi_proba")).all(
        axis=None
    )


def test_every_step_gives_the_same_numbers_from_a_file(tmp_path):
    direct, stored = cite(), through_file(cite(), tmp_path / "0.h5mu")
    for i, (name, options) in enumerate([("totalvi", {}), ("totalanvi", {"init": "totalvi"}), ("scanvi", {})]):
        for mdata in (direct, stored):
            getattr(av.tl, name)(mdata, batch_key="batch", max_epochs=1, **options)
        stored = through_file(stored, tmp_path / f"{i + 1}.h5mu")
    for slot in ("X_totalvi", "X_totalanvi"):
        np.testing.assert_array_equal(stored.obsm[slot], direct.obsm[slot])
    np.testing.assert_array_equal(stored["rna"].obsm["X_scanvi"], direct["rna"].obsm["X_scanvi"])
    pd.testing.assert_series_equal(stored.obs["rna:scanvi_prediction"], direct.obs["rna:scanvi_prediction"])


# recovery ---------------------------------------------------------------------------------------------------------


def accuracy_of_unlabelled(mdata, name) -> tuple[float, float]:
    """Share of unlabelled cells whose type was found: of all, and of those in the RNA-only batch."""
    home = mdata if name == "totalanvi" else mdata["rna"]
    found = home.obs[f"{name}_prediction"].astype(str).reindex(mdata.obs_names)
    right = found == mdata.obs["true_cell_type"].astype(str)
    unlabelled = mdata.obs["cell_type"].isin(["Unknown"])
    alone = mdata.obs["batch"] == "batch_2"
    assert unlabelled[alone].all() and not mdata.obs_names[alone].isin(mdata["prot"].obs_names).any()
    return float(right[unlabelled].mean()), float(right[alone].mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_labels_of_unlabelled_cells_are_recovered(name):
    mdata = cite(2000, n_genes=400)
    getattr(av.tl, name)(mdata, batch_key="batch", max_epochs=30)
    of_all, of_alone = accuracy_of_unlabelled(mdata, name)
    assert of_all > 0.9 and of_alone > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_shuffled_labels_are_not(name):
    """The control: the same fit with the labels of the labelled cells shuffled finds next to nothing."""
    mdata = cite(2000, n_genes=400)
    labels = mdata.obs["cell_type"].astype(str)
    labelled = labels != "Unknown"
    labels[labelled] = np.random.default_rng(0).permutation(labels[labelled])
    mdata.obs["cell_type"] = labels.astype("category")
    getattr(av.tl, name)(mdata, batch_key="batch", max_epochs=30)
    of_all, of_alone = accuracy_of_unlabelled(mdata, name)
    assert of_all < 0.45 and of_alone < 0.45
