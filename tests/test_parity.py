"""The numbers of scvi-tools, recomputed: every configuration under golden/ with its weights and its noise.

Everything is float32 on both sides. The same computation in float64 differs from the stored numbers by up to 5e-7
(outputs), 3e-6 (terms), 2e-7 (loss) and 2e-5 (gradients), relative to the largest entry of an array (golden/README.md);
the tolerances are these with room for another order of sums. `python -m golden.table` lists what there is.
"""

from functools import cache

import pytest
from golden.compare import NAMES, Comparison, allowed, compare, read


@cache
def comparison(name: str) -> Comparison:
    """Each configuration once."""
    return compare(name)


def test_there_are_golden_files_of_every_class():
    classes = [read(name).facts["class"] for name in NAMES]
    assert len(NAMES) == 39
    assert set(classes) == {"SCVI", "SCANVI", "TOTALVI", "TOTALANVI"}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_at_the_posterior_mean(name):
    assert {key: value for key, value in comparison(name).outputs.items() if not value < 1e-5} == {}


@pytest.mark.parametrize("name", NAMES)
def test_terms_of_the_loss(name):
    found = comparison(name).terms
    assert found.keys() >= {"reconstruction_rna", "kl_z"}
    assert {key: value for key, value in found.items() if not value < 1e-5} == {}


@pytest.mark.parametrize("name", NAMES)
def test_loss(name):
    assert comparison(name).loss < 1e-6


@pytest.mark.parametrize("name", [name for name in NAMES if read(name).part("grad/")])
def test_gradients_of_all_parameters(name):
    """To 1e-4 of the largest gradient of a parameter, and 1e-5 for those that are zero but for rounding."""
    found = comparison(name).gradients
    assert len(found) > 10
    off = {
        key: float((ours - theirs).abs().max())
        for key, (ours, theirs) in found.items()
        if not (ours - theirs).abs().max() <= allowed(theirs)
    }
    assert off == {}
    # and all of them to 1e-5 of the largest gradient entry of the model
    largest = max(float(theirs.abs().max()) for _, theirs in found.values())
    assert max(float((ours - theirs).abs().max()) for ours, theirs in found.values()) < 1e-5 * largest


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_train")])
def test_running_statistics_after_a_training_pass(name):
    """They move twice in encoder and classifier, for the minibatch and then for the labelled cells."""
    found = comparison(name).running
    assert any("classifier" in key for key in found)
    assert {key: value for key, value in found.items() if not value < 1e-5} == {}
