"""Every fit, query and mapping on a GPU: on a pretend one always, on a real one where there is one (`-m gpu`).

The pretend device has the values of the CPU, so there all is equal bit for bit; a real one adds in another order.
"""

import gc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import cite, dense, without_rna
from pretend_cuda import Machine
from scipy import sparse

import anvi as av
from anvi._data.batches import Minibatches, split
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._fit import graph as graph_module
from anvi._fit import loop, step
from anvi._fit.graph import EAGER_STEPS, CapturedStep
from anvi._fit.plan import Plan
from anvi._fit.start import make_config, make_network
from anvi._model import Model
from anvi._posterior import differential, encode
from anvi.nn import Weights
from anvi.nn.objective import loss
from anvi.settings import choose_device

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")
pytestmark = pytest.mark.filterwarnings("ignore:.*few labelled cells")


@pytest.fixture(
    params=[
        "pretend",
        pytest.param(
            "real",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def gpu(request):
    """The pretend machine, or None on a real one; verbs go to the device unless they are told otherwise."""
    with av.settings.override(device="cuda"):
        if request.param == "real":
            yield None
            return
        with Machine() as machine:
            yield machine


def close(gpu, one, other, rtol=1e-4, atol=1e-5):
    """The same numbers: bit for bit on a pretend device."""
    one, other = (torch.as_tensor(part).detach().cpu() for part in (one, other))
    torch.testing.assert_close(one, other, rtol=0 if gpu else rtol, atol=0 if gpu else atol, equal_nan=True)


def close_weights(gpu, one, other, **tolerance):
    for name, value in one.items():
        close(gpu, value, other[name], **tolerance)


@pytest.fixture(scope="module")
def read():
    """Setup and cells of every model, on the CPU; read once."""
    found = {}
    for n_classes, n_cells, n_genes in ((4, 400, 40), (30, 500, 90)):
        mdata = cite(n_cells, n_genes=n_genes, n_proteins=max(12, n_classes), n_classes=n_classes)
        large = 300.0 if n_classes == 4 else 200.0  # counts that take two bytes, and such that take one
        for mod in ("rna", "prot"):
            x = np.minimum(dense(mdata[mod].X), large)
            x[0, 0] = large
            mdata[mod].X = sparse.csr_matrix(x) if mod == "rna" else x
        for name in MODELS:
            labels_key = "cell_type" if name.endswith("anvi") else None
            setup = find_setup(mdata, proteins="total" in name, labels_key=labels_key, batch_key="batch")
            cells = read_cells(mdata, setup, labels=True)
            assert cells.x.values.dtype == (torch.uint16 if n_classes == 4 else torch.uint8)
            found[name, n_classes] = setup, cells
    whole = cite(400, n_genes=40, n_proteins=12)
    mdata = without_rna(whole, whole.obs_names[whole.obs["batch"] == "batch_1"])
    for name in ("totalvi", "totalanvi"):
        setup = find_setup(mdata, proteins=True, labels_key="known" if name == "totalanvi" else None, batch_key="batch")
        found[name, "without RNA"] = setup, read_cells(mdata, setup, labels=True)
    return found


@pytest.fixture
def prepare(read):
    """What a step takes, on a device."""

    def prepare(name, device="cuda", n_classes=4, **options):
        setup, cells = read[name, n_classes]
        device = choose_device(device)
        network = make_network(make_config(name, setup, {"n_hidden": 16}), cells, 0).to(device)
        train, _ = split(cells, 0.9, loop.generator(0))
        options = {"adversary": False, "thin_counts": 0.0, "hide_proteins": 0.0} | options
        plan = Plan(batch_size=64, **options).for_cells(len(train), warm_start=False)
        cells = cells.to(device)
        state = loop._start(network, cells, plan, 0, device)
        minibatches = Minibatches(cells, train, 64, loop._labelled_size(network, plan), state.shuffle)
        network.train()
        return state, cells, minibatches, loop._adversary_groups(cells), plan

    return prepare


@pytest.fixture
def start(read):
    """What :func:`loop.fit` takes, on a device."""

    def start(name="totalanvi", device="cuda", network_options=None, **options):
        setup, cells = read[name, 4]
        device = choose_device(device)
        network = make_network(make_config(name, setup, {"n_hidden": 16} | (network_options or {})), cells, 0).to(
            device
        )
        train, validation = split(cells, 0.9, loop.generator(0))
        options = {"max_epochs": 3, "batch_size": 64, "adversary": False} | options
        return network, cells.to(device), train, validation, Plan(**options).for_cells(len(train), warm_start=False)

    return start


@pytest.fixture
def counted(monkeypatch):
    """How many captures and replays there were."""
    counts = {"captures": 0, "replays": 0, "streams": 0}

    def count(owner, name, what):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    def begin():
        count(CapturedStep, "_capture", "captures")
        count(torch.cuda.CUDAGraph, "replay", "replays")
        return counts

    return begin


def run_steps(run, prepared, n, *, kl=0.5, fooling=None, room=None):
    """So many steps; their losses and sums, on the CPU."""
    state, cells, minibatches, group, plan = prepared
    fooling = state.adversary is not None if fooling is None else fooling
    choices = []
    while len(choices) < n:
        choices += minibatches.plan()
    choices = choices[:n]
    most = [max(getattr(choice, name) for choice in choices) for name in ("n_entries", "n_balanced_entries")]
    choices = [replace_entries(choice, most) for choice in choices]
    seen = []
    for choice in choices:
        more = {} if room is None else {"room": room}
        done = run(state, cells, choice, group, Weights(kl, 1.0, 50.0), plan, fooling=fooling, **more)
        sums = dict(zip(done.names, done.numbers[1:].tolist(), strict=True))
        seen.append((float(done.loss), sums))
    return seen


def replace_entries(choice, most):
    return choice._replace(n_entries=most[0], n_balanced_entries=most[1])


def eager_with_the_room_of(captured):
    def run(*args, **kwargs):
        return step.run_step(*args, **kwargs, room=captured.room)

    return run


def assert_same_steps(gpu, one, other, rtol=1e-4):
    for (loss_, sums), (other_loss, other_sums) in zip(one, other, strict=True):
        close(gpu, loss_, other_loss, rtol=rtol)
        assert sums.keys() == other_sums.keys()
        for name, value in sums.items():
            close(gpu, value, other_sums[name], rtol=rtol, atol=1e-3)


# a replay is a step -----------------------------------------------------------------------------------------------

KINDS = {"plain": {}, "adversary, thinned, hidden": {"adversary": True, "thin_counts": 0.5, "hide_proteins": 0.5}}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_replays_are_eager_steps(gpu, prepare, counted, name, options):
    ours, theirs = prepare(name, **options), prepare(name, **options)
    counts, captured = counted(), CapturedStep(choose_device())
    replayed = run_steps(captured, ours, EAGER_STEPS + 3)
    assert counts["captures"] == 1 and counts["replays"] == 3
    assert_same_steps(gpu, replayed, run_steps(eager_with_the_room_of(captured), theirs, EAGER_STEPS + 3))
    (state, *_), (other, *_) = ours, theirs
    # Adam turns rounding of a gradient near zero into steps of up to its rate
    close_weights(gpu, state.network.state_dict(), other.network.state_dict(), rtol=1e-3, atol=3e-2)
    assert torch.equal(state.noise.get_state(), other.noise.get_state())  # noise is drawn on where eager steps end
    for slot in state.optimizer.slots.values():
        assert float(slot.step) == EAGER_STEPS + 3
    if state.adversary is not None:
        assert all(float(slot.step) == EAGER_STEPS + 3 for slot in state.adversary_optimizer.slots.values())
    norms = [part for part in state.network.modules() if hasattr(part, "running_mean")]
    assert norms and all(part.running_mean.abs().sum() > 0 for part in norms if part.training)


@pytest.mark.parametrize("name", ["totalvi", "totalanvi"])
def test_cells_with_proteins_alone(gpu, prepare, counted, name):
    options = {"n_classes": "without RNA", "thin_counts": 0.5, "hide_proteins": 0.5, "hide_rna": 0.5}
    ours, theirs = prepare(name, **options), prepare(name, **options)
    assert not ours[1].has_rna.all()
    counts, captured = counted(), CapturedStep(choose_device())
    replayed = run_steps(captured, ours, EAGER_STEPS + 3)
    assert counts["captures"] == 1 and counts["replays"] == 3
    assert_same_steps(gpu, replayed, run_steps(eager_with_the_room_of(captured), theirs, EAGER_STEPS + 3))


def test_thirty_classes(gpu, prepare):
    ours, theirs = (prepare("totalanvi", n_classes=30) for _ in range(2))
    captured = CapturedStep(choose_device())
    replayed = run_steps(captured, ours, 5)
    assert_same_steps(gpu, replayed, run_steps(eager_with_the_room_of(captured), theirs, 5))


def test_coarse_labels(gpu, prepare):
    """Which classes a cell's label leaves open is looked up inside the graph."""
    prepared = []
    for _ in range(2):
        state, cells, minibatches, group, plan = prepare("totalanvi")
        n, n_classes = len(cells), len(cells.label.unique()) - 1
        sets = torch.eye(n_classes, dtype=torch.bool).tolist() + [[True] * n_classes, [i < 2 for i in range(n_classes)]]
        row = torch.where(cells.label.cpu() >= 0, cells.label.cpu(), n_classes + (torch.arange(n) % 2))
        device = cells.label.device
        cells = replace(cells, label_table=torch.tensor(sets).to(device), label_row=row.to(device))
        minibatches = Minibatches(cells, torch.arange(n), 64, 24, state.shuffle)
        prepared.append((state, cells, minibatches, group, plan))
    captured = CapturedStep(choose_device())
    replayed = run_steps(captured, prepared[0], EAGER_STEPS + 3)
    assert captured.graph is not None
    assert_same_steps(gpu, replayed, run_steps(eager_with_the_room_of(captured), prepared[1], EAGER_STEPS + 3))


def test_weight_and_rate_reach_a_replay(gpu, prepare):
    prepared = prepare("totalanvi")
    state, captured = prepared[0], CapturedStep(choose_device())
    run_steps(captured, prepared, EAGER_STEPS + 1)
    other, eager = prepare("totalanvi"), eager_with_the_room_of(captured)
    run_steps(eager, other, EAGER_STEPS + 1)
    # 0.5 so far
    assert_same_steps(gpu, run_steps(captured, prepared, 1, kl=1.0), run_steps(eager, other, 1, kl=1.0))
    state.optimizer.set_rate(0.0)
    before = {name: value.detach().cpu().clone() for name, value in state.network.named_parameters()}
    run_steps(captured, prepared, 1)
    for name, value in state.network.named_parameters():
        assert torch.equal(before[name], value.cpu()), name
    assert captured.graph is not None


def test_when_a_graph_is_captured_anew(gpu, prepare, counted):
    counts = counted()
    state, cells, minibatches, group, plan = prepared = prepare("scvi", adversary=True)
    captured = CapturedStep(choose_device())
    for fooling in (True, True, False, False):  # the warm-up ends
        run_steps(captured, prepared, EAGER_STEPS + 1, fooling=fooling)
    assert counts["captures"] == 2 and counts["replays"] == 2 * (EAGER_STEPS + 2)  # of which the first are eager
    choice = minibatches.plan()[0]._replace(n_entries=captured.room.entries + 1)  # more counts than there is room for
    for _ in range(EAGER_STEPS + 1):
        captured(state, cells, choice, group, Weights(1.0), plan, fooling=False)
    assert counts["captures"] == 3 and captured.room.entries > choice.n_entries


def test_gradients_are_clipped(gpu, prepare):
    """As `clip_grad_norm_` does, where the optimiser is told to divide the gradients."""
    options = {"max_grad_norm": 1e-3, "adam_eps": 1.0}  # with such an eps a step is proportional to the gradient
    prepared = prepare("scvi", **options)
    captured = CapturedStep(choose_device())
    start = {name: value.clone() for name, value in prepared[0].network.state_dict().items()}
    run_steps(captured, prepared, 5)
    state, cells, minibatches, group, plan = prepare("scvi", **options)
    plain = torch.optim.Adam(state.network.parameters(), lr=plan.lr, eps=1.0, weight_decay=plan.weight_decay)
    room = captured.room
    for choice in minibatches.plan()[:5]:
        batch = step.take(cells, choice.index, choice.weight, choice.n_labelled, dense=False, room=room.entries)
        plain.zero_grad()
        terms = state.network.terms(batch, None, av.nn.Draws(state.noise))
        loss(terms, batch.weight, Weights(0.5, 1.0, 50.0), state.network.config).backward()
        assert torch.nn.utils.clip_grad_norm_(state.network.parameters(), 1e-3) > 1
        plain.step()
    for name, value in state.network.named_parameters():
        moved = (value - start[name]).detach().cpu()
        ours = (prepared[0].network.get_parameter(name) - start[name]).detach().cpu()
        torch.testing.assert_close(ours, moved, rtol=1e-3, atol=1e-9)


def test_an_epoch_of_replays_waits_for_nothing(gpu, prepare):
    state, cells, minibatches, group, plan = prepared = prepare("totalanvi", thin_counts=0.5, hide_proteins=0.5)
    captured = CapturedStep(choose_device())
    run_steps(captured, prepared, EAGER_STEPS + 1)
    choices = minibatches.plan()
    losses = torch.zeros(len(choices), device=group.device)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        for i, choice in enumerate(choices):
            choice = replace_entries(choice, captured.room)
            losses[i] = captured(state, cells, choice, group, Weights(0.5), plan, fooling=False).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert captured.graph is not None and losses.isfinite().all()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precision(gpu, prepare, precision):
    exact = run_steps(CapturedStep(choose_device()), prepare("totalanvi"), 5)
    with av.settings.override(precision=precision):
        rough = run_steps(CapturedStep(choose_device()), prepare("totalanvi"), 5)
    for (one, _), (other, _) in zip(exact, rough, strict=True):
        assert one == pytest.approx(other, rel=2e-2)


def test_no_rounded_weight_is_kept_for_another_step(prepare, monkeypatch):
    """What autocast keeps would lie in the memory of a graph."""
    seen = []
    prepared = prepare("scvi", device="cpu")
    original = type(prepared[0].network).terms

    def terms(*args):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return original(*args)

    monkeypatch.setattr(type(prepared[0].network), "terms", terms)
    with av.settings.override(precision="bf16"):
        run_steps(step.run_step, prepared, 1)
    assert seen == [(True, False)]


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_the_user_has_set_the_precision_of_products(gpu, start, precision):
    products = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        pytest.skip("this torch has the older name alone")
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        with av.settings.override(precision=precision):
            loop.fit(*start("scvi", max_epochs=1), random_state=0)
        assert products.fp32_precision == "tf32"
        products.fp32_precision = "ieee"
        with av.settings.override(precision=precision):
            loop.fit(*start("scvi", max_epochs=1), random_state=0)
        assert products.fp32_precision == "ieee"
    finally:
        products.fp32_precision = before


# fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_fit(gpu, start, counted, name):
    """One graph for a whole fit without adversary; on a pretend device the numbers of the CPU, padded."""
    counts = counted()
    still = {"dropout_encoder": 0.0, "dropout_decoder": 0.0}  # CUDA draws its masks in another way
    still |= {"dropout_u": 0.0} if name.endswith("anvi") else {}
    network, *rest = start(name, network_options=still, early_stopping=False)
    history = loop.fit(network, *rest, random_state=0)
    assert counts["captures"] == 1 and counts["replays"] > 10
    assert np.isfinite(history.to_numpy(dtype=float)).all()
    on_cpu, *rest = start(name, device="cpu", network_options=still, early_stopping=False)
    expected = loop.fit(on_cpu, *rest, random_state=0)
    if gpu:  # padding is added up, too, and so is rounding
        np.testing.assert_allclose(history["train_loss"], expected["train_loss"], rtol=2e-2)
        np.testing.assert_allclose(history["validation_loss"], expected["validation_loss"], rtol=5e-2)


def test_what_is_set_back_is_captured_anew(gpu, start, counted, monkeypatch):
    """A rolled-back epoch replaces tensors that a graph points at."""
    counts, calls, seen = counted(), [], []
    original = loop._validate

    def validate(network, *args):
        calls.append(None)
        seen.append({name: value.detach().clone() for name, value in network.named_parameters()})
        row = original(network, *args)
        return row | {"validation_loss": float("inf")} if len(calls) == 2 else row

    monkeypatch.setattr(loop, "_validate", validate)
    history = loop.fit(*start(max_epochs=3), random_state=0)
    assert len(history) == 3 and counts["captures"] == 2
    assert any(not torch.equal(seen[-1][name], value) for name, value in seen[-2].items())
    assert history["lr"].iloc[1] < history["lr"].iloc[0]


@pytest.mark.parametrize("name", ["scvi", "totalanvi"])
def test_a_killed_fit_goes_on(gpu, start, tmp_path, monkeypatch, name):
    expected = loop.fit(*start(name, max_epochs=3, adversary=name == "totalanvi"), random_state=0)
    original = loop.save_checkpoint

    def save(path, state, fingerprint):
        original(path, state, fingerprint)
        if state.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(*start(name, adversary=name == "totalanvi"), random_state=0, checkpoint=tmp_path / "fit")
    monkeypatch.setattr(loop, "save_checkpoint", original)
    history = loop.fit(*start(name, adversary=name == "totalanvi"), random_state=0, checkpoint=tmp_path / "fit")
    rtol = 1e-12 if gpu else 2e-2
    np.testing.assert_allclose(history.to_numpy(float), expected.to_numpy(float), rtol=rtol)


def test_memory_comes_back(gpu, start):
    """Two fits and a query, with the networks still in hand: they are on the device, their gradients are not."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    networks = []
    for _ in range(2):
        network, *rest = start("totalanvi", max_epochs=2)
        loop.fit(network, *rest, random_state=0)
        networks.append(network)
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())
    del rest, network
    mdata = cite(120)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1)
    av.tl.denoise(mdata)
    kept = sum(value.numel() * value.element_size() for network in networks for value in network.state_dict().values())
    gc.collect()
    workspace = 0 if gpu else 2**26  # of the libraries, for every stream
    assert 0 < torch.cuda.memory_allocated() - before <= 1.5 * kept + workspace
    networks.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= workspace


def test_no_gradient_stays_on_the_network(start):
    network, *rest = start("scvi", device="cpu", max_epochs=1)
    loop.fit(network, *rest, random_state=0)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_another_device(gpu, start, counted):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    counts = counted()
    one = loop.fit(*start("totalanvi"), random_state=0)
    other = loop.fit(*start("totalanvi", device="cuda:1"), random_state=0)
    assert counts["captures"] == 2 and torch.cuda.current_device() == 0
    assert gpu is None or not gpu.n_across  # eager steps wait for the stream of their own device
    np.testing.assert_allclose(one.to_numpy(float), other.to_numpy(float), rtol=0 if gpu else 2e-2)
    assert one["train_loss"].iloc[-1] < one["train_loss"].iloc[0]
    mdata = cite(120)
    av.tl.scvi(mdata, max_epochs=1, device="cuda:1")
    av.tl.denoise(mdata, device="cuda:1")


def test_a_verb_runs_where_its_tensors_are(gpu, tmp_path):
    """The current device is that of the verb, streamed or not: Triton launches kernels there; then the caller's."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    mdata, seen = cite(120), set()
    mdata["rna"].X = sparse.csr_matrix(mdata["rna"].X)
    mdata.write(tmp_path / "cells.h5mu")
    see = {"callback": lambda _: seen.add(torch.cuda.current_device())}
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1, device="cuda:1", **see)
    av.tl.totalanvi(tmp_path / "cells.h5mu", batch_key="batch", max_epochs=1, device="cuda:1", stream=True, **see)
    av.tl.denoise(mdata, device="cuda:1")
    query = cite(60)
    av.tl.map_query(query, mdata, device="cuda:1")
    assert seen == {1} and torch.cuda.current_device() == 0
    assert gpu is None or not gpu.n_elsewhere
    torch.cuda.set_device(1)
    try:
        av.tl.denoise(mdata, device="cuda:0")
        assert torch.cuda.current_device() == 1
    finally:
        torch.cuda.set_device(0)


def test_deterministic_mode(gpu, start):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that is what it is asked to say
            history = loop.fit(*start("totalanvi"), random_state=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert np.isfinite(history["train_loss"]).all()


@pytest.mark.parametrize("name", MODELS)
def test_verbs_fit_map_and_minify(gpu, name):
    """With warnings as errors, and every answer after a fit on the device."""
    labels = {"labels_key": "cell_type"} if name.endswith("anvi") else {}
    mdata = cite(260, n_genes=40, n_proteins=12)
    query = mdata[mdata.obs["batch"] == "batch_1"].copy()
    reference = mdata[mdata.obs["batch"] != "batch_1"].copy()
    verb = getattr(av.tl, name)
    verb(reference, batch_key="batch", max_epochs=2, batch_size=32, n_hidden=16, **labels)
    for freeze in ("reference", "none"):
        av.tl.map_query(query, reference, max_epochs=2, batch_size=16, freeze=freeze, key_added=freeze)
        assert np.isfinite(av.tl.denoise(query, model=freeze, inplace=False)["rna"].to_numpy()).all()
    home = query if "reference" in query.uns else query["rna"]
    assert home.uns["reference"]["params"]["device"] == "cuda:0"
    assert (home.obs["reference_split"] == "validation").sum() > 0
    before = av.tl.latent(reference, inplace=False)
    av.tl.minify(reference)
    np.testing.assert_allclose(av.tl.latent(reference, inplace=False), before, rtol=1e-5, atol=1e-6)
    av.tl.denoise(reference)


# no graph ---------------------------------------------------------------------------------------------------------

FAILURES = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "not deterministic": RuntimeError("does not have a deterministic implementation"),
}


@pytest.fixture
def pretend():
    with av.settings.override(device="cuda"), Machine() as machine:
        yield machine


@pytest.mark.parametrize(
    ("name", "failure", "after"),
    [("scvi", "out of memory", 1), ("scvi", "not deterministic", 300), ("totalanvi", "out of memory", 900)],
)
def test_without_a_graph_steps_stay_eager(pretend, prepare, caplog, name, failure, after):
    """What fails in a capture costs the speed, and no number changes."""
    failure = FAILURES[failure]
    pretend.failure, pretend.fail_after = failure, after
    ours, theirs = (prepare(name, adversary=True, thin_counts=0.5) for _ in range(2))
    captured = CapturedStep(choose_device())
    collecting = gc.isenabled()
    eager = run_steps(captured, ours, EAGER_STEPS + 3)
    assert pretend.n_captures == 1 and pretend.n_replays == 0 and gc.isenabled() == collecting
    assert_same_steps(pretend, eager, run_steps(eager_with_the_room_of(captured), theirs, EAGER_STEPS + 3))
    close_weights(pretend, ours[0].network.state_dict(), theirs[0].network.state_dict())
    said = [record.message for record in caplog.records if "no CUDA graph" in record.message]
    assert len(said) == 1 and str(failure) in said[0]


def test_a_wait_inside_a_capture_costs_the_graph(pretend, prepare, monkeypatch, caplog):
    """The generator that was part of it refuses to draw from then on."""
    original = graph_module.run_step

    def waiting(*args, **kwargs):
        done = original(*args, **kwargs)
        return done._replace(loss=torch.full((), float(done.loss), device="cuda"))

    monkeypatch.setattr(graph_module, "run_step", waiting)
    ours, theirs = (prepare("scvi", thin_counts=0.5) for _ in range(2))
    captured = CapturedStep(choose_device())
    eager = run_steps(captured, ours, EAGER_STEPS + 3)
    assert_same_steps(pretend, eager, run_steps(eager_with_the_room_of(captured), theirs, EAGER_STEPS + 3))
    assert "no CUDA graph of a step (CaptureError: operation not permitted" in caplog.text and pretend.n_replays == 0
    assert torch.cuda.current_stream() is torch.cuda.default_stream()


def test_a_capture_is_left_alone(pretend, prepare, monkeypatch):
    """Nothing is collected inside, and what other threads do with the device does no harm."""
    seen = []
    original = graph_module.run_step

    def looking(*args, **kwargs):
        if pretend.capturing is not None:
            seen.append((gc.isenabled(), pretend.capturing.mode))
        return original(*args, **kwargs)

    monkeypatch.setattr(graph_module, "run_step", looking)
    run_steps(CapturedStep(choose_device()), prepare("scvi"), EAGER_STEPS + 1)
    assert seen == [(False, "thread_local")] and gc.isenabled()


def test_a_torch_that_finds_generators_itself(pretend, prepare):
    pretend.register_warns = True
    run_steps(CapturedStep(choose_device()), prepare("scvi"), EAGER_STEPS + 1)  # a warning is an error here
    assert pretend.n_replays == 1


def test_a_stream_for_all_steps(pretend, start, monkeypatch):
    made = []
    original = torch.cuda.Stream.__init__

    def init(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.Stream, "__init__", init)
    loop.fit(*start("scvi"), random_state=0)
    assert len(made) == 1 and pretend.n_captures == 1


def test_how_often_an_epoch_waits(pretend, start, monkeypatch):
    """Once for the losses and once per sum at the end, and once for all validation cells together; never in a step."""
    counts, original = [], loop._validate

    def validate(*args):
        before = len(pretend.waits)
        row = original(*args)
        counts.append(len(pretend.waits) - before)
        return row

    monkeypatch.setattr(loop, "_validate", validate)
    monkeypatch.setattr(loop, "save_checkpoint", lambda *args: None)
    loop.fit(*start("totalanvi", max_epochs=1, batch_size=2), random_state=0)  # four minibatches hold eight cells
    n_sums = 12  # terms, cells, labelled cells, loss and accuracy
    assert counts[-1] <= 2 + n_sums, [str(wait) for wait in pretend.waits[-counts[-1] :]]


# questions --------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "latent": lambda m, k: av.tl.latent(m, model=k, inplace=False),
    "latent samples": lambda m, k: av.tl.latent(m, model=k, n_samples=2, inplace=False),
    "denoise": lambda m, k: av.tl.denoise(m, model=k, library_size="latent", transform_batch="all", inplace=False),
    "denoise samples": lambda m, k: av.tl.denoise(m, model=k, n_samples=2, return_mean=False, inplace=False),
    "predict": lambda m, k: av.tl.predict(m, model=k, inplace=False),
    "foreground": lambda m, k: av.tl.foreground(m, model=k, n_samples=2, inplace=False),
    "posterior predictive": lambda m, k: av.tl.posterior_predictive(m, model=k, n_samples=2),
    "correlation": lambda m, k: av.tl.feature_correlation(m, model=k, n_samples=2, inplace=False),
    "DE": lambda m, k: av.tl.differential_expression(m, "cell_type", model=k, n_samples=50, inplace=False),
    "DE, weights": lambda m, k: av.tl.differential_expression(
        m, "cell_type", groups=["B"], model=k, n_samples=20, weights="importance", inplace=False
    ),
    "attributions": lambda m, k: av.tl.attributions(m, model=k, n_steps=4, n_cells=2, baseline="zero", inplace=False),
    "elbo": lambda m, k: av.metrics.elbo(m, model=k),
    "marginal": lambda m, k: av.metrics.marginal_likelihood(m, model=k, n_samples=2),
    "reconstruction": lambda m, k: av.metrics.reconstruction_error(m, model=k),
    "criticism": lambda m, k: av.metrics.criticism(m, model=k, n_samples=2, inplace=False),
}
DRAWN = ("latent samples", "denoise samples", "foreground", "posterior predictive", "correlation", "DE", "DE, weights")
DRAWN += ("elbo", "marginal", "reconstruction", "criticism")
"""Noise of a real GPU is not that of the CPU."""


def numbers(answer) -> list[np.ndarray]:
    """All arrays of numbers in an answer."""
    if isinstance(answer, dict):
        return [array for part in answer.values() for array in numbers(part)]
    if hasattr(answer, "data_vars"):
        return [answer[name].to_numpy() for name in answer.data_vars if answer[name].dtype.kind in "fiu"]
    if hasattr(answer, "select_dtypes"):
        return [answer.select_dtypes("number").to_numpy(float)]
    array = np.asarray(answer)
    return [array] if array.dtype.kind in "fiu" else []


def answered(name: str, question: str) -> bool:
    """Whether a model has an answer."""
    if question in ("predict", "attributions"):
        return name.endswith("anvi")
    return question != "foreground" or name.startswith("total")


ASKED = [(name, question) for name in MODELS for question in QUESTIONS if answered(name, question)]


@pytest.fixture(scope="module")
def on_cpu():
    """All four models, fitted on the CPU, and their answers there."""
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = cite(160, n_genes=40, n_proteins=12)
        for name in MODELS:
            getattr(av.tl, name)(mdata, batch_key="batch", max_epochs=2, n_hidden=16)
        return mdata, {key: numbers(QUESTIONS[key[1]](mdata, key[0])) for key in ASKED}


@pytest.fixture
def asked(on_cpu):
    return on_cpu[0].copy()


@pytest.mark.parametrize(("name", "question"), ASKED)
def test_questions(on_cpu, gpu, asked, name, question):
    ours, expected = numbers(QUESTIONS[question](asked, name)), on_cpu[1][name, question]
    assert len(ours) == len(expected) and sum(array.size for array in ours) > 0
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        if gpu or question not in DRAWN:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_stays_where_it_was(gpu, asked):
    home = asked if "totalanvi" in asked.uns else asked["rna"]
    model = Model.from_slot(home.uns["totalanvi"]["model"], home.uns["totalanvi"]["history"])
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    av.tl.latent(asked, model=model, inplace=False)
    av.tl.map_query(cite(60, n_genes=40, n_proteins=12), model, batch_key="batch", max_epochs=1)
    for name, value in model.network.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, before[name])
    assert model.on(torch.device("cpu")) is model


def test_answers_arrive_while_the_next_are_computed(gpu, asked, monkeypatch):
    """In chunks of 50 cells: nothing waits for a copy but the buffers' events, and every number arrives."""
    monkeypatch.setattr(encode, "CHUNK", 50)
    question = QUESTIONS["denoise samples"]
    if gpu:
        gpu.waits.clear()
    ours = numbers(question(asked, "totalanvi")) + numbers(av.tl.foreground(asked, model="totalanvi", inplace=False))
    if gpu:
        assert sum(wait.what == "event" for wait in gpu.waits) > 4
        assert not [str(wait) for wait in gpu.waits if wait.what == "copy to the host" and "expected.py" in wait.line]
        with av.settings.override(device="cpu"):
            expected = numbers(question(asked, "totalanvi"))
            expected += numbers(av.tl.foreground(asked, model="totalanvi", inplace=False))
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert all(np.isfinite(array).all() for array in ours)


def test_a_gpu_compares_more_pairs_at_a_time(pretend, asked, monkeypatch):
    sizes = {}
    original = differential._Pairs.blocks

    def blocks(self, rows):
        for number, group, reference in original(self, rows):
            sizes.setdefault(group.device.type, set()).add(len(group))
            yield number, group, reference

    monkeypatch.setattr(differential._Pairs, "blocks", blocks)
    monkeypatch.setattr(differential, "BUDGET", 1)
    for device in ("cpu", "cuda"):
        with av.settings.override(device=device):
            QUESTIONS["DE"](asked, "scvi")
    assert max(sizes["cpu"]) == 8 and sizes["cuda"] == {50}
