"""What messages advise: the next command does what it says when it is followed to the letter."""

import re

import numpy as np
import pandas as pd
import pytest
from helpers import cite

import anvi as av

FIT = {"max_epochs": 1, "n_hidden": 8, "n_latent": 3}


@pytest.fixture(scope="module")
def fitted():
    """A small data set with a labelled model of it."""
    mdata = cite(300)
    with av.settings.override(verbosity=0, progress=False):
        av.tl.totalanvi(mdata, batch_key="batch", **FIT)
    return mdata


# what stands for a mask -----------------------------------------------------------------------------------------------

AS_MASK = {
    "zeros and ones": lambda b: b.astype(int).to_numpy(),
    "a list of them": lambda b: b.astype(int).tolist(),
    "a Series of them in another order": lambda b: b.astype(int).sort_values(),
    "objects": lambda b: b.astype(object).to_numpy(),
    "objects, some missing": lambda b: b[:200].reindex(b.index),
    "an array of these": lambda b: b[:200].reindex(b.index).to_numpy(),
    "zeros and ones, some missing": lambda b: b[:200].reindex(b.index).astype("Int64"),
    "names": lambda b: b.index[b],
    "a list of names": lambda b: list(b.index[b]),
    "positions": lambda b: np.flatnonzero(b),
}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("make", AS_MASK.values(), ids=AS_MASK)
def test_what_stands_for_a_mask_is_made_one(fitted, make):
    truth = fitted.obs["true_cell_type"] == "B"
    given, wanted = make(truth), truth & (np.arange(300) < 200) if "reindex" in make.__code__.co_names else truth
    with pytest.raises(TypeError, match=r"groups\['B'\] must be a boolean mask") as error:
        av.tl.differential_expression(fitted, groups={"B": given}, n_samples=50)
    (command,) = re.findall(r"(mask = .*)\.$", str(error.value))
    there = {"mask": given, "positions": given, "names": given, "np": np, "pd": pd, "data": fitted}
    exec(command, there)
    found = pd.Series(there["mask"], truth.index) if not isinstance(there["mask"], pd.Series) else there["mask"]
    pd.testing.assert_series_equal(found[truth.index], wanted, check_names=False)


def test_cells_of_a_score_that_are_no_mask(fitted):
    cells = (fitted.obs["true_cell_type"] == "B").astype(int).to_numpy()
    with pytest.raises(KeyError, match=r"cells: .* cells = pd.Series\(cells, data.obs_names\).astype\(bool\)"):
        av.metrics.classification(fitted, cells=cells, labels_key="true_cell_type")
    masked = pd.Series(cells, fitted.obs_names).astype(bool)
    assert len(av.metrics.classification(fitted, cells=masked, labels_key="true_cell_type"))


# layers of two modalities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, {"rna": "counts"}, {"prot": "raw"}])
def test_layers_that_are_named_one_after_the_other(first):
    """No advice takes back what an earlier one has named."""
    mdata, layer = cite(300), first
    for mod, name in (("rna", "counts"), ("prot", "raw")):
        mdata[mod].layers[name] = mdata[mod].X.copy()
        mdata[mod].X = np.log1p(np.asarray(mdata[mod].to_df())) - 1
    for _ in range(4):
        problems = av.pp.check(mdata, batch_key="batch", layer=layer).problems
        if not problems:
            break
        (advised,) = re.findall(r"pass layer=(\{.*\})\.", problems[0])
        layer = eval(advised)
    assert layer == {"rna": "counts", "prot": "raw"} and not problems
