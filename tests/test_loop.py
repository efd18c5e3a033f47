import json
import logging
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import cite
from safetensors.torch import load, save
from scipy import sparse

import anvi as av
from anvi._data.batches import labelled_first, split
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._files import sealed, unsealed
from anvi._fit import loop, step
from anvi._fit.plan import Plan
from anvi._fit.start import make_config, make_network
from anvi.settings import Progress

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")


@pytest.fixture(scope="module")
def mdata():
    """Shared by the tests of this file: never written to. 135 training cells, one or two minibatches."""
    return cite(150, n_proteins=10)


@pytest.fixture(scope="module")
def cells_of(mdata):
    """Setup and cells of each model, read once."""
    found = {}
    for name in MODELS:
        labels_key = "cell_type" if name.endswith("anvi") else None
        setup = find_setup(mdata, proteins="total" in name, labels_key=labels_key, batch_key="batch")
        found[name] = setup, read_cells(mdata, setup, labels=True)
    return found


@pytest.fixture
def start(cells_of):
    """A network before its first step, and all that :func:`loop.fit` takes beside it."""

    def make(name="totalanvi", seed=0, **options):
        setup, cells = cells_of[name]
        network = make_network(make_config(name, setup, {"n_hidden": 16}), cells, seed)
        options = {"max_epochs": 3} | options
        train, validation = split(cells, options.get("train_size", 0.9), loop.generator(seed))
        return network, cells, train, validation, Plan(**options).for_cells(len(train), warm_start=False)

    return make


def weights(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def scripted(monkeypatch, losses):
    """Let validation say what is written, whatever the network; return the weights that each epoch ended with."""
    seen = []

    def validate(network, *args):
        seen.append(weights(network))
        return {"validation_loss": losses[len(seen) - 1]}

    monkeypatch.setattr(loop, "_validate", validate)
    return seen


# history ----------------------------------------------------------------------------------------------------------

TERMS = {
    "scvi": ["reconstruction_rna", "kl_z"],
    "scanvi": ["reconstruction_rna", "kl_z", "kl_u", "kl_label"],
    "totalvi": ["reconstruction_rna", "reconstruction_protein", "kl_z", "kl_background"],
    "totalanvi": ["reconstruction_rna", "reconstruction_protein", "kl_z", "kl_u", "kl_label", "kl_background"],
}


@pytest.mark.parametrize("name", MODELS)
def test_history_has_every_term_in_nats_per_cell(start, name):
    history = loop.fit(*start(name), random_state=0)
    labels = ["classification_loss", "accuracy"] if name.endswith("anvi") else []
    expected = {"epoch", "kl_weight", "lr"}
    for part in ("train", "validation"):
        expected |= {f"{part}_{term}" for term in ["loss", "elbo", *TERMS[name], *labels]}
    assert set(history.columns) == expected
    assert history["epoch"].tolist() == [1, 2, 3] and np.isfinite(history.to_numpy()).all()
    for part in ("train", "validation"):
        summed = history[[f"{part}_{term}" for term in TERMS[name]]].sum(axis=1)
        np.testing.assert_allclose(-history[f"{part}_elbo"], summed, rtol=1e-5)
        if labels:
            assert history[f"{part}_accuracy"].between(0, 1).all()
    ratio = 50 * history["validation_classification_loss"] if labels else 0
    np.testing.assert_allclose(history["validation_loss"], -history["validation_elbo"] + ratio, rtol=1e-6)


def test_without_validation_cells(start):
    history = loop.fit(*start(train_size=1.0, early_stopping=False), random_state=0)
    assert len(history) == 3 and not [name for name in history if name.startswith("validation")]


def test_averages_count_each_cell_once(start):
    """Padding has no weight: the averages of an epoch do not depend on how many steps the cells are spread over."""
    averages = []
    for batch_size in (135, 40):
        network, cells, train, validation, plan = start(
            batch_size=batch_size, lr=1e-30, max_epochs=1, max_grad_norm=1e-30
        )
        history = loop.fit(network, cells, train, validation, plan, random_state=0)
        averages.append(history.loc[0, "train_reconstruction_rna"])
    # what is left is noise, dropout and the statistics of the batch norms
    assert averages[0] == pytest.approx(averages[1], rel=0.05)


def test_loss_falls(start):
    history = loop.fit(*start(max_epochs=10, warmup=0.0), random_state=0)
    assert history["train_loss"].iloc[-1] < 0.7 * history["train_loss"].iloc[0]
    assert history["validation_loss"].iloc[-1] < history["validation_loss"].iloc[0]


# schedules --------------------------------------------------------------------------------------------------------


def test_warmup_and_rate(start):
    network, cells, train, validation, plan = start(max_epochs=10, warmup=0.5)
    history = loop.fit(network, cells, train, validation, plan, random_state=0)
    np.testing.assert_allclose(history["kl_weight"], [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])
    epochs = np.arange(10)
    np.testing.assert_allclose(history["lr"], plan.lr * (0.01 + 0.99 * (1 + np.cos(np.pi * epochs / 10)) / 2))


def test_the_weight_of_an_epoch_reaches_the_loss(start, monkeypatch):
    seen = []

    def spy(terms, weight, weights, *rest):
        seen.append(weights)
        return original(terms, weight, weights, *rest)

    original = step.loss
    monkeypatch.setattr(step, "loss", spy)
    arguments = start(max_epochs=4, warmup=0.5, protein_weight=0.3, classification_ratio=7.0, batch_size=150)
    loop.fit(*arguments, random_state=0)
    assert [w.kl for w in seen] == [0.5, 1, 1, 1]
    assert {(w.protein, w.classification) for w in seen} == {(0.3, 7.0)}


class TestPlan:
    def test_about_5000_steps_or_2000_where_cells_are_labelled(self):
        assert Plan().for_cells(128 * 50, warm_start=False).max_epochs == 100
        assert Plan().for_cells(128 * 50, warm_start=False, transfer=True).max_epochs == 40
        assert Plan().for_cells(100, warm_start=False).max_epochs == 400
        # where cells are few, a step for two cells, and at least 400
        steps = {
            n: Plan().for_cells(n, warm_start=False, transfer=True).max_epochs * -(-n // 128)
            for n in (128, 1280, 2560, 5120)
        }
        assert steps == {128: 400, 1280: 640, 2560: 1280, 5120: 2000}
        assert Plan().for_cells(10**6, warm_start=False).max_epochs == 15
        assert Plan(max_epochs=7).for_cells(100, warm_start=False).max_epochs == 7

    def test_many_proteins_weigh_less_where_cells_are_to_be_labelled(self):
        plan = {"n_train": 100, "warm_start": False, "genes_per_protein": 2.5}
        assert Plan().for_cells(**plan, transfer=True).protein_weight == 0.25
        assert Plan().for_cells(**plan).protein_weight == 1
        assert Plan(protein_weight=0.7).for_cells(**plan, transfer=True).protein_weight == 0.7
        assert Plan().for_cells(**plan | {"genes_per_protein": 11}, transfer=True).protein_weight == 1

    def test_a_warm_start_is_short_and_has_no_warmup(self):
        plan = Plan().for_cells(128 * 50, warm_start=True)
        assert plan.max_epochs == 33 and plan.warmup == 0 and plan.kl_weight(0) == 1

    def test_a_model_that_labels_cells_hides_counts_and_weighs_divergences_less(self):
        plan, other = (Plan().for_cells(6_400, warm_start=False, transfer=transfer) for transfer in (True, False))
        assert (plan.thin_counts, plan.hide_proteins, plan.max_kl_weight) == (0.5, 0.2, 0.1)
        assert (other.thin_counts, other.hide_proteins, other.max_kl_weight) == (0, 0, 1)
        for transfer in (True, False):
            unstained = Plan().for_cells(6_400, warm_start=False, transfer=transfer, unstained=True)
            assert unstained.hide_proteins == 0.5
        given = {"thin_counts": 0.2, "max_kl_weight": 0.7}
        plan = Plan(**given).for_cells(6_400, warm_start=False, transfer=True)
        assert {name: getattr(plan, name) for name in given} == given

    def test_the_weight_of_the_divergences_rises_as_far_as_it_may(self):
        plan = Plan(max_epochs=20, warmup=0.5, max_kl_weight=0.35).for_cells(5000, warm_start=False)
        assert [plan.kl_weight(epoch) for epoch in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.35, 0.35])
        assert plan.last_warmup_epoch == 2

    def test_what_depends_on_other_options(self):
        plan = Plan(batch_size=100).for_cells(5000, warm_start=False)
        assert plan.labelled_batch_size == 50 and plan.patience == plan.max_epochs // 5
        plan = Plan(labelled_batch_size=3, patience=2).for_cells(5000, warm_start=False)
        assert plan.labelled_batch_size == 3 and plan.patience == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_kl_weight": 0}, "max_kl_weight=0 must be above 0"),
            ({"max_kl_weight": 1.5}, "at most 1"),
            ({"thin_counts": 1.0}, "thin_counts=1.0 is a share"),
            ({"label_smoothing": -0.1}, "label_smoothing=-0.1 is a share"),
            ({"batch_size": 0}, "batch_size=0 must be above 0"),
            ({"batch_size": 1}, "batch_size=1 leaves batch norm nothing"),
            ({"batch_size": "128"}, "batch_size='128' must be a whole number"),
            ({"max_epochs": 0}, "max_epochs=0 must be at least 1"),
            ({"max_epochs": 2.5}, "max_epochs=2.5 must be a whole number"),
            ({"labelled_batch_size": -1}, "labelled_batch_size=-1 must not be negative"),
            ({"max_retries": -1}, "max_retries=-1 must not be negative"),
            ({"patience": 0}, "patience=0 must be at least 1"),
            ({"lr": 0}, "lr=0 must be above 0"),
            ({"lr": float("nan")}, "lr=nan must be above 0"),
            ({"warmup": -0.1}, "warmup=-0.1 must not be negative"),
            ({"weight_decay": -1}, "weight_decay=-1 must not be negative"),
            ({"classification_ratio": -1}, "classification_ratio=-1 must not be negative"),
            ({"train_size": 0}, "train_size=0 must be above 0 and at most 1"),
            ({"train_size": 1.5}, "train_size=1.5 must be above 0 and at most 1"),
            ({"train_size": 1}, "train_size=1 leaves no validation cells.*early_stopping=False"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_options_out_of_range(self, options, message):
        with pytest.raises((ValueError, TypeError), match=message):
            Plan(**options).for_cells(100, warm_start=False)


# the best weights, and when to stop -------------------------------------------------------------------------------


def test_best_weights_come_back(start, monkeypatch):
    seen = scripted(monkeypatch, [5.0, 3.0, 4.0, 3.5])
    arguments = start(max_epochs=4)
    history = loop.fit(*arguments, random_state=0)
    assert len(history) == 4
    assert_same_weights(weights(arguments[0]), seen[1])
    assert not torch.equal(seen[1]["encoder.mean.weight"], seen[3]["encoder.mean.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_returned_network_has_the_best_loss_of_the_history(start, name):
    network, cells, train, validation, plan = start(name, max_epochs=8, lr=0.05)
    history = loop.fit(network, cells, train, validation, plan, random_state=3)
    again = loop._validate(network, cells, labelled_first(cells, validation), plan, 3)
    assert again["validation_loss"] == history["validation_loss"].min()
    assert not network.encoder.training and not network.training


def test_stops_when_nothing_improves(start, monkeypatch, caplog):
    seen = scripted(monkeypatch, [5.0, 3.0, 4.0, 3.0, 9.0, 9.0])
    arguments = start(max_epochs=6, patience=2, warmup=0.0)
    with caplog.at_level(logging.INFO, "anvi"):
        history = loop.fit(*arguments, random_state=0)
    assert len(history) == 4  # best in the second epoch; an equal loss is no better one
    assert "stopped after epoch 4: no better validation loss since epoch 2" in caplog.text
    assert_same_weights(weights(arguments[0]), seen[1])


def test_patience_begins_after_the_warmup(start, monkeypatch):
    scripted(monkeypatch, [float(i) for i in range(20)])
    history = loop.fit(*start(max_epochs=20, patience=2, warmup=0.5), random_state=0)
    assert len(history) == 11  # the last epoch below full weight is the ninth, two more do not improve


def test_no_early_stopping(start, monkeypatch):
    seen = scripted(monkeypatch, [float(i) for i in range(6)])
    arguments = start(max_epochs=6, patience=1, warmup=0.0, early_stopping=False)
    assert len(loop.fit(*arguments, random_state=0)) == 6
    assert_same_weights(weights(arguments[0]), seen[0])


# training and evaluation mode -------------------------------------------------------------------------------------


def test_a_second_fit_trains_in_train_mode(start, monkeypatch):
    network, *rest = start(max_epochs=2)
    loop.fit(network, *rest, random_state=0)
    modes = []
    original = step.step

    def spy(state, *args, **options):
        modes.append([part.training for part in state.network.modules() if part is not state.network])
        return original(state, *args, **options)

    monkeypatch.setattr(step, "step", spy)
    before = weights(network)
    loop.fit(network, *rest, random_state=1)
    assert modes and all(map(all, modes))
    assert not torch.equal(
        network.state_dict()["encoder.stack.norm.0.running_mean"], before["encoder.stack.norm.0.running_mean"]
    )


def test_validation_changes_no_statistics_and_repeats_its_noise(start):
    network, cells, _, validation, plan = start()
    before = weights(network)
    rows = [loop._validate(network, cells, labelled_first(cells, validation), plan, 5) for _ in range(2)]
    assert rows[0] == rows[1] != loop._validate(network, cells, labelled_first(cells, validation), plan, 6)
    assert_same_weights(weights(network), before)


# randomness -------------------------------------------------------------------------------------------------------


def fitted_weights(start, name="totalanvi", seed=0, **options):
    arguments = start(name, **options)
    loop.fit(*arguments, random_state=seed)
    return weights(arguments[0])


def test_a_seed_decides_everything(start):
    torch.manual_seed(1)
    one = fitted_weights(start)
    torch.manual_seed(2)
    assert_same_weights(one, fitted_weights(start))
    other = fitted_weights(start, seed=1)
    assert not torch.equal(one["encoder.mean.weight"], other["encoder.mean.weight"])


def test_first_weights_follow_the_seed(start):
    assert_same_weights(weights(start()[0]), weights(start()[0]))
    assert not torch.equal(start()[0].encoder.mean.weight, start(seed=1)[0].encoder.mean.weight)


@pytest.mark.parametrize("name", MODELS)
def test_global_random_states_are_neither_read_nor_changed(mdata, name):
    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    data = mdata.copy()  # mudata draws from the global state
    before = states()
    getattr(av.tl, name)(data, batch_key="batch", max_epochs=2)
    after = states()
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]


def test_seeds_are_independent():
    assert len({*loop.seeds(0, 5), *loop.seeds(1, 5)}) == 10
    assert loop.seeds(0, 3) == loop.seeds(0, 5)[:3]


# a loss that is not finite ----------------------------------------------------------------------------------------


def nan_losses(monkeypatch, spoilt):
    """Make the loss of the given calls NaN; all calls if None. Returns the list of calls."""
    calls, original = [], step.loss

    def loss(terms, *args):
        calls.append(len(calls))
        value = original(terms, *args)
        return value * float("nan") if spoilt is None or calls[-1] in spoilt else value

    monkeypatch.setattr(step, "loss", loss)
    return calls


def test_recovers_from_a_single_nan(start, monkeypatch, caplog):
    nan_losses(monkeypatch, {4})  # three steps per epoch: in the second one
    arguments = start(batch_size=50, max_epochs=4)
    history = loop.fit(*arguments, random_state=0)
    assert history["epoch"].tolist() == [1, 2, 3, 4] and np.isfinite(history.to_numpy()).all()
    plan = arguments[-1]
    np.testing.assert_allclose(history["lr"], [plan.learning_rate(i) * (1 if i < 1 else 0.5) for i in range(4)])
    assert all(value.isfinite().all() for value in arguments[0].state_dict().values())
    assert (
        "non-finite loss in epoch 2: back to the weights before it, learning rate halved (retry 1 of 3)" in caplog.text
    )


def test_rolls_back_to_the_last_good_weights(start, monkeypatch):
    seen, original = [], loop._train_epoch

    def spy(state, *args):
        seen.append(weights(state.network))
        return original(state, *args)

    monkeypatch.setattr(loop, "_train_epoch", spy)
    nan_losses(monkeypatch, {5})
    loop.fit(*start(batch_size=50), random_state=0)
    assert len(seen) == 4  # three epochs and the one that was made again
    assert_same_weights(seen[1], seen[2])


def test_gives_up_naming_the_cells(start, monkeypatch, mdata):
    calls = nan_losses(monkeypatch, None)
    with pytest.raises(FloatingPointError, match="in epoch 1 and stayed so after 3 retries") as caught:
        loop.fit(*start(batch_size=50), random_state=0)
    assert len(calls) == 4 * 3
    named = re.findall(r"cell_\d+", str(caught.value))
    assert len(named) == 8 and set(named) <= set(mdata.obs_names)


def test_the_cells_named_are_those_of_the_bad_minibatch(start, monkeypatch):
    network, cells, train, validation, plan = start(batch_size=50, max_retries=0)
    plans, original = [], loop.Minibatches.plan

    def spy(self):
        plans.append(original(self))
        return plans[-1]

    monkeypatch.setattr(loop.Minibatches, "plan", spy)
    nan_losses(monkeypatch, {1})
    with pytest.raises(FloatingPointError) as caught:
        loop.fit(network, cells, train, validation, plan, random_state=0)
    assert re.findall(r"cell_\d+", str(caught.value)) == list(cells.names[plans[0][1][0][:8]])


def test_a_gradient_that_is_not_finite_is_caught_too(start, monkeypatch):
    """A finite loss with a NaN gradient would spoil the weights; after the last step nobody would look again."""
    original, calls = step.loss, []

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    def loss(*args):
        calls.append(1)
        value = original(*args)
        return Spoil.apply(value) if len(calls) == 6 else value

    monkeypatch.setattr(step, "loss", loss)
    network, *rest = start(batch_size=50, max_epochs=2, train_size=1.0, early_stopping=False)
    history = loop.fit(network, *rest, random_state=0)
    assert len(calls) == 9 and len(history) == 2
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_a_validation_loss_that_is_not_finite_is_caught_too(start, monkeypatch):
    scripted(monkeypatch, [5.0, float("nan"), 4.0, 3.0])
    arguments = start(max_epochs=3)
    history = loop.fit(*arguments, random_state=0)
    assert history["validation_loss"].tolist() == [5, 4, 3]
    scripted(monkeypatch, [float("inf")] * 9)
    _, cells, _, validation, _ = arguments
    with pytest.raises(FloatingPointError) as caught:
        loop.fit(*arguments, random_state=0)
    named = re.findall(r"cell_\d+", str(caught.value))
    assert named and set(named) <= set(cells.names[validation])


# interrupted and resumed ------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a killed process."""


def interrupt(monkeypatch, after: int):
    """Raise once an epoch is done and written."""
    original = loop.save_checkpoint

    def save(path, state, fingerprint):
        original(path, state, fingerprint)
        if state.epoch == after:
            raise Killed

    monkeypatch.setattr(loop, "save_checkpoint", save)
    return lambda: monkeypatch.setattr(loop, "save_checkpoint", original)


@pytest.mark.parametrize(("name", "after"), [*((name, 1) for name in MODELS), ("totalanvi", 3)])
def test_goes_on_to_the_same_weights(start, monkeypatch, tmp_path, name, after):
    whole = start(name, max_epochs=5)
    expected = loop.fit(*whole, random_state=0)
    path = tmp_path / "deeper" / "fit.safetensors"
    restore = interrupt(monkeypatch, after)
    with pytest.raises(Killed):
        loop.fit(*start(name, max_epochs=5), random_state=0, checkpoint=path, fingerprint="x")
    restore()
    again = start(name, max_epochs=5)
    history = loop.fit(*again, random_state=0, checkpoint=path, fingerprint="x")
    assert_same_weights(weights(again[0]), weights(whole[0]))
    pd.testing.assert_frame_equal(history, expected, check_exact=True)


def test_killed_before_an_epoch_is_written(start, monkeypatch, tmp_path):
    """A kill between an epoch and its checkpoint costs that epoch and changes nothing else."""
    whole = start(max_epochs=4)
    expected = loop.fit(*whole, random_state=0)
    path, original = tmp_path / "fit", Progress.advance

    def advance(self, row):
        if row["epoch"] == 3:
            raise Killed
        original(self, row)

    monkeypatch.setattr(Progress, "advance", advance)
    with pytest.raises(Killed):
        loop.fit(*start(max_epochs=4), random_state=0, checkpoint=path)
    monkeypatch.undo()
    again = start(max_epochs=4)
    history = loop.fit(*again, random_state=0, checkpoint=path)
    assert_same_weights(weights(again[0]), weights(whole[0]))
    pd.testing.assert_frame_equal(history, expected, check_exact=True)


def test_the_best_weights_from_before_the_kill_come_back(start, monkeypatch, tmp_path):
    seen = scripted(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    restore = interrupt(monkeypatch, 2)
    with pytest.raises(Killed):
        loop.fit(*start(max_epochs=4), random_state=0, checkpoint=tmp_path / "fit")
    restore()
    again = start(max_epochs=4)
    history = loop.fit(*again, random_state=0, checkpoint=tmp_path / "fit")
    assert history["validation_loss"].tolist() == [1, 2, 3, 4]
    assert_same_weights(weights(again[0]), seen[0])


def test_goes_on_after_a_recovery(start, monkeypatch, tmp_path):
    """The halved rate and the count of retries are kept, too."""
    nan_losses(monkeypatch, {0})
    restore = interrupt(monkeypatch, 2)
    path = tmp_path / "fit"
    with pytest.raises(Killed):
        loop.fit(*start(max_epochs=4), random_state=0, checkpoint=path)
    restore()
    arguments = start(max_epochs=4)
    history = loop.fit(*arguments, random_state=0, checkpoint=path)
    np.testing.assert_allclose(history["lr"], [0.5 * arguments[-1].learning_rate(i) for i in range(4)])


def test_a_finished_fit_is_not_made_again(start, monkeypatch, tmp_path):
    path = tmp_path / "fit"
    one = start()
    expected = loop.fit(*one, random_state=0, checkpoint=path)
    monkeypatch.setattr(loop, "run_step", lambda *args, **options: pytest.fail("a step was made"))
    two = start()
    pd.testing.assert_frame_equal(loop.fit(*two, random_state=0, checkpoint=path), expected)
    assert_same_weights(weights(one[0]), weights(two[0]))


def test_checkpoint_of_another_fit(start, tmp_path):
    path = tmp_path / "fit"
    loop.fit(*start(), random_state=0, checkpoint=path, fingerprint="one")
    with pytest.raises(ValueError, match="belongs to another fit.*another checkpoint=, or delete the file"):
        loop.fit(*start(), random_state=0, checkpoint=path, fingerprint="two")


def test_damaged_checkpoint(start, tmp_path):
    path = tmp_path / "fit"
    loop.fit(*start(), random_state=0, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is not a checkpoint that anvi can read.*delete it to start anew"):
        loop.fit(*start(), random_state=0, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"text" * 99, b"\x89HDF\r\n\x1a\n" + bytes(999), "weights"])
def test_a_file_of_another_kind_as_a_checkpoint(start, tmp_path, content):
    """Nobody is told to delete data of theirs."""
    path = tmp_path / "data.h5mu"
    if content == "weights":
        content = sealed(save({"one": torch.ones(3)}, {"format": "pt"}))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data.h5mu is not a checkpoint.*another checkpoint=\.$") as told:
        loop.fit(*start(), random_state=0, checkpoint=path)
    assert "delete" not in str(told.value) and path.read_bytes() == content


def test_no_half_written_file_is_left(start, tmp_path):
    loop.fit(*start(), random_state=0, checkpoint=tmp_path / "fit")
    assert [file.name for file in tmp_path.iterdir()] == ["fit"]


def fit_with(mdata, checkpoint: Path, **options):
    data = mdata.copy()
    av.tl.totalanvi(data, checkpoint=checkpoint, **{"batch_key": "batch", "max_epochs": 2} | options)
    return data


@pytest.fixture(scope="module")
def checkpoint(mdata, tmp_path_factory):
    """The checkpoint of a fit, never gone on from."""
    path = tmp_path_factory.mktemp("fit") / "checkpoint"
    with av.settings.override(progress=False, device="cpu"):
        fit_with(mdata, path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"max_epochs": 3},
        {"random_state": 1},
        {"n_latent": 5},
        {"labels_key": "true_cell_type"},
        {"batch_key": None},
        {"lr": 1e-4},
        {"panel_key": "panel"},
        "genes",
        "counts",
        "swapped",
    ],
    ids=str,
)
def test_a_fit_of_other_data_or_options_does_not_go_on(mdata, checkpoint, change):
    other, options = mdata.copy(), change
    if isinstance(change, str):
        options = {}
        if change == "genes":
            other["rna"].var_names = other["rna"].var_names[::-1]
        elif change == "swapped":  # the same sums of every cell and every gene
            dense = np.asarray(other["rna"].X.todense())
            dense[3, 10], dense[3, 20], dense[8, 10], dense[8, 20] = 1, 2, 2, 1
            reference = mdata.copy()
            reference["rna"].X = sparse.csr_matrix(dense)
            path = checkpoint.with_name("swapped")
            fit_with(reference, path)
            dense[3, 10], dense[3, 20], dense[8, 10], dense[8, 20] = 2, 1, 1, 2
            other["rna"].X, checkpoint = sparse.csr_matrix(dense), path
        else:  # the same sums
            matrix = other["rna"].X
            matrix.indices[matrix.indptr[0] : matrix.indptr[1]] = (
                59 - matrix.indices[matrix.indptr[0] : matrix.indptr[1]]
            )
            matrix.has_sorted_indices = False
            matrix.sort_indices()
    with pytest.raises(ValueError, match="belongs to another fit"):
        fit_with(other, checkpoint, **options)


def test_a_fit_in_another_precision_does_not_go_on(mdata, checkpoint):
    with av.settings.override(precision="bf16"), pytest.raises(ValueError, match="belongs to another fit"):
        fit_with(mdata, checkpoint)


@pytest.mark.parametrize("spot", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_bit_of_a_checkpoint_is_seen(mdata, checkpoint, tmp_path, spot):
    raw = bytearray(checkpoint.read_bytes())
    raw[int(spot * len(raw))] ^= 1
    (tmp_path / "fit").write_bytes(raw)
    with pytest.raises(ValueError, match="is not a checkpoint that anvi can read"):
        fit_with(mdata, tmp_path / "fit")


def test_a_checkpoint_without_a_checksum_is_refused(mdata, checkpoint, tmp_path):
    raw = checkpoint.read_bytes()
    (tmp_path / "fit").write_bytes(save(load(raw), unsealed(raw)))
    with pytest.raises(ValueError, match="it has no checksum"):
        fit_with(mdata, tmp_path / "fit")


@pytest.mark.parametrize("name", ["network/", "best/", "optimizer/"])
def test_a_checkpoint_of_numbers_that_are_not_finite_is_refused(mdata, checkpoint, tmp_path, name):
    raw = checkpoint.read_bytes()
    tensors = load(raw)
    slot = next(
        one for one in tensors if one.startswith(name) and tensors[one].is_floating_point() and tensors[one].ndim
    )
    tensors[slot].view(-1)[0] = float("nan")
    (tmp_path / "fit").write_bytes(sealed(save(tensors, unsealed(raw))))
    with pytest.raises(ValueError, match="is not a checkpoint that anvi can read .its tensor"):
        fit_with(mdata, tmp_path / "fit")


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 10**9},
        {"epoch": "1"},
        {"epoch": True},
        {"best_loss": float("nan")},
        {"best_loss": None},
        {"best_epoch": 7},
        {"lr_scale": 0.0},
        {"retries": -1},
        {"history": "none"},
        {"history": [{"loss": "x"}]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_state_is_refused(mdata, checkpoint, tmp_path, change):
    raw = checkpoint.read_bytes()
    state = json.loads(unsealed(raw)["state"]) | change
    (tmp_path / "fit").write_bytes(sealed(save(load(raw), {"state": json.dumps(state)})))
    with pytest.raises(ValueError, match="is not a checkpoint that anvi can read"):
        fit_with(mdata, tmp_path / "fit")


@pytest.mark.parametrize("change", ["shape", "type", "missing", "more"])
def test_a_tensor_of_a_checkpoint_has_its_shape(mdata, checkpoint, tmp_path, change):
    """The optimiser trusts them: another shape ends the process."""
    raw = checkpoint.read_bytes()
    tensors, metadata = load(raw), unsealed(raw)
    name = next(
        name for name in tensors if name.endswith("exp_avg") and tensors[name].ndim == 2 and len(tensors[name]) > 1
    )
    if change == "missing":
        del tensors[name]
    else:
        value = {"shape": tensors[name][:1], "type": tensors[name].double(), "more": tensors[name].clone()}[change]
        tensors[name + ("2" if change == "more" else "")] = value.contiguous()
    (tmp_path / "fit").write_bytes(sealed(save(tensors, metadata)))
    with pytest.raises(ValueError, match="fit is not a checkpoint that anvi can read .its tensor"):
        fit_with(mdata, tmp_path / "fit")


def test_a_fit_from_a_model_does_not_go_on_without_it(mdata, tmp_path):
    data = mdata.copy()
    av.tl.totalvi(data, batch_key="batch", max_epochs=1)
    path = tmp_path / "fit"
    fit_with(data, path, init="totalvi", warmup=0.0)
    for options in ({}, {"init": "totalvi", "train": "label_nets"}):
        with pytest.raises(ValueError, match="belongs to another fit"):
            fit_with(data, path, warmup=0.0, **options)
    fit_with(data, path, init="totalvi", warmup=0.0)


def test_an_interrupted_verb_ends_as_if_it_had_not_been(mdata, monkeypatch, tmp_path):
    whole = fit_with(mdata, tmp_path / "whole", max_epochs=3)
    restore = interrupt(monkeypatch, 2)
    with pytest.raises(Killed):
        fit_with(mdata, tmp_path / "fit", max_epochs=3)
    restore()
    again = fit_with(mdata, tmp_path / "fit", max_epochs=3)
    np.testing.assert_array_equal(again.obsm["X_totalanvi"], whole.obsm["X_totalanvi"])
    pd.testing.assert_frame_equal(again.uns["totalanvi"]["history"], whole.uns["totalanvi"]["history"])


# progress ---------------------------------------------------------------------------------------------------------


class TestProgress:
    def fit(self, start, **options):
        loop.fit(*start("scvi", max_epochs=20, early_stopping=False, **options), random_state=0)

    def test_a_line_per_tenth_where_there_is_no_terminal(self, start, caplog):
        with av.settings.override(progress="auto"), caplog.at_level(logging.INFO, "anvi"):
            self.fit(start)
        lines = [record.message for record in caplog.records if record.message.startswith("epoch")]
        assert [int(re.match(r"epoch (\d+)/20", line)[1]) for line in lines] == [1, *range(2, 21, 2)]
        assert re.search(r"train_loss \d.*validation_loss \d.*at most \d+ s left", lines[0])

    def test_silent_when_asked(self, start, caplog, capfd):
        with av.settings.override(progress=False), caplog.at_level(logging.INFO, "anvi"):
            self.fit(start)
        assert not caplog.records and capfd.readouterr() == ("", "")

    def test_quiet_but_for_warnings(self, start, caplog):
        with av.settings.override(progress="auto", verbosity=0), caplog.at_level(logging.INFO, "anvi"):
            self.fit(start)
        assert not caplog.records

    def test_one_bar(self, start, capfd):
        with av.settings.override(progress=True):
            self.fit(start)
        out, err = capfd.readouterr()
        assert out == "" and "20/20" in err and "validation" in err and err.count("\n") == 1


# pieces -----------------------------------------------------------------------------------------------------------


def test_the_adversary_comes_where_panels_differ(start, cells_of):
    _, cells = cells_of["totalanvi"]
    assert loop.panels_differ(cells) and not loop.panels_differ(cells_of["scvi"][1])
    for name, options, expected in (
        ("totalanvi", {}, True),
        ("totalanvi", {"adversary": False}, False),
        ("scvi", {}, False),
        ("scvi", {"adversary": True}, True),
    ):
        network, cells, _, _, plan = start(name, **options)
        state = loop._start(network, cells, plan, 0, torch.device("cpu"))
        assert (state.adversary is not None) == expected


def test_what_the_adversary_tells_apart(cells_of):
    _, cells = cells_of["totalanvi"]
    assert torch.equal(loop._adversary_groups(cells), cells.batch)
    one_batch = replace(cells, batch=torch.zeros_like(cells.batch))
    assert torch.equal(loop._adversary_groups(one_batch), cells.panel)
    one_panel = replace(one_batch, panel=torch.zeros_like(cells.panel))
    assert torch.equal(loop._adversary_groups(one_panel), cells.measured.any(1).long())


def test_adversary_needs_two_groups(start):
    network, cells, train, validation, plan = start("scvi", adversary=True)
    cells = replace(cells, batch=torch.zeros_like(cells.batch))
    with pytest.raises(ValueError, match="adversary=True needs at least two batches or panels"):
        loop.fit(network, cells, train, validation, plan, random_state=0)
