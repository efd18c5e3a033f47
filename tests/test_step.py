"""The step with fixed shapes: what a CUDA graph needs, tested as far as a CPU goes; and the graph itself on a GPU."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import anvi as av
from anvi._data.batches import Minibatches, split, take
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._fit import loop, step
from anvi._fit.plan import Plan
from anvi._fit.start import make_config, make_network
from anvi.nn import Draws, Terms, Weights

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")
WAITS = (  # for the device, to know a value or a shape
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
)


class Recorder(TorchDispatchMode):
    """Names and result shapes of all operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shapes = [
            tuple(part.shape) for part in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(part)
        ]
        self.seen.append((func.name(), shapes))
        return out


@pytest.fixture
def prepared():
    def prepare(name, device="cpu", **options):
        mdata = av.datasets.synthetic_cite(500, n_genes=80, n_proteins=12)
        setup = find_setup(
            mdata,
            proteins=name.startswith("total"),
            labels_key="cell_type" if name.endswith("anvi") else None,
            batch_key="batch",
        )
        cells = read_cells(mdata, setup, labels=True)
        network = make_network(make_config(name, setup, {}), cells, 0).to(device)
        train, _ = split(cells, 0.9, loop.generator(0))
        plan = Plan(batch_size=64, **options).for_cells(len(train), warm_start=False)
        cells = cells.to(torch.device(device))
        state = loop._start(network, cells, plan, 0, torch.device(device))
        minibatches = Minibatches(cells, train, 64, loop._labelled_size(network, plan), state.shuffle)
        return state, cells, minibatches, loop._adversary_groups(cells), plan

    return prepare


ROOM = step.Capacity(6_000, 4_000)


@pytest.mark.parametrize("name", MODELS)
def test_room_for_entries_changes_no_number(prepared, name):
    results = []
    for room in (None, ROOM):
        state, cells, minibatches, group, plan = prepared(name)
        for choice in minibatches.plan()[:4]:
            assert choice.n_entries <= ROOM.entries and choice.n_balanced_entries <= ROOM.balanced_entries
            fooling = state.adversary is not None
            done = step.run_step(state, cells, choice, group, Weights(0.5), plan, fooling=fooling, room=room)
        results.append((done, state.network.state_dict()))
    (one, weights), (other, other_weights) = results
    # sums over entries are taken in another order
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-5)
    for key, value in weights.items():
        # Adam turns rounding of a gradient near zero into steps of up to its rate, 4e-3, four of them: that is the
        # whole gradient of a bias before a batch norm, and now and then that of another weight
        torch.testing.assert_close(value, other_weights[key], rtol=1e-3, atol=2e-2)
        if value.dim() == 2:
            assert (value - other_weights[key]).abs().mean() < 1e-4, key


def test_entries_with_room_are_those_of_the_cells(prepared):
    _, cells, minibatches, _, _ = prepared("scvi")
    choice = minibatches.plan()[0]
    exact, padded = (take(cells, choice.index, dense=False, room=room).entries for room in (None, 7_000))
    n = len(exact.count)
    assert 0 < n <= choice.n_entries and len(padded.count) == 7_000
    for ours, theirs in zip(padded, exact, strict=True):
        assert torch.equal(ours[:n], theirs)
    assert not padded.count[n:].any()
    assert len(torch.unique(padded.row[n:] * cells.x.n_columns + padded.column[n:])) > 500  # not all on one address


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"thin_counts": 0.5, "hide_proteins": 0.5, "label_smoothing": 0.1}], ids=str)
def test_a_step_with_room_has_fixed_shapes_and_waits_for_nothing(prepared, name, options, monkeypatch):
    state, cells, minibatches, group, plan = prepared(name, **options)
    # the optimisers are torch's, and on a CPU they do read their step count
    monkeypatch.setattr(state.optimizer, "step", lambda scale=None: None)
    if state.adversary is not None:
        monkeypatch.setattr(state.adversary_optimizer, "step", lambda: None)
    runs = []
    for choice in minibatches.plan()[:2]:
        with Recorder() as recorder:
            fooling, kl = state.adversary is not None, torch.tensor(0.5)
            step.run_step(state, cells, choice, group, Weights(kl), plan, fooling=fooling, room=ROOM)
        runs.append(recorder.seen)
    assert not {name for name, _ in runs[0]} & set(WAITS)
    assert runs[0] == runs[1]


def test_the_recorder_sees_what_waits(prepared):
    state, cells, minibatches, group, plan = prepared("scanvi")
    with Recorder() as recorder:
        step.run_step(state, cells, minibatches.plan()[0], group, Weights(0.5), plan, fooling=False)
    assert {name for name, _ in recorder.seen} & set(WAITS)


def test_operators_of_a_step(prepared):
    """A guard against work that creeps in: operators that are run, not seconds. Raise it only knowingly."""
    counts = {}
    for name in MODELS:
        state, cells, minibatches, group, plan = prepared(name, adversary=False)
        with Recorder() as recorder:
            step.run_step(state, cells, minibatches.plan()[0], group, Weights(0.5), plan, fooling=False)
        counts[name] = len(recorder.seen)
    for name, limit in LIMITS.items():
        assert counts[name] <= limit, counts


LIMITS = {"scvi": 660, "scanvi": 1_320, "totalvi": 1_360, "totalanvi": 2_190}


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_precision_stays_inside_the_products(prepared, precision):
    state, cells, minibatches, group, plan = prepared("totalanvi")
    choice = minibatches.plan()[0]
    exact = step.run_step(state, cells, choice, group, Weights(0.5), plan, fooling=False)
    state, cells, minibatches, group, plan = prepared("totalanvi")
    choice = minibatches.plan()[0]
    with av.settings.override(precision=precision):
        rough = step.run_step(state, cells, choice, group, Weights(0.5), plan, fooling=False)
    assert rough.loss.dtype == torch.float32
    assert all(
        parameter.grad.dtype == torch.float32 for parameter in state.network.parameters() if parameter.grad is not None
    )
    # bfloat16 has 8 bits: 0.4 % per product, and a sum of many averages that
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=1e-2)
    assert precision == "tf32" or float(rough.loss) != float(exact.loss)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="settings.precision='int4'"), av.settings.override(precision="int4"):
        with step.arithmetic(torch.device("cpu")):
            pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_gives_the_eager_numbers(prepared, name):
    from anvi._fit.graph import CapturedStep

    results = []
    for run in (step.run_step, CapturedStep(torch.device("cuda", torch.cuda.current_device()))):
        state, cells, minibatches, group, plan = prepared(name, device="cuda", adversary=False)
        losses = [
            float(run(state, cells, choice, group, Weights(0.5), plan, fooling=False).loss)
            for _ in range(3)
            for choice in minibatches.plan()
        ]
        results.append(losses)
    # atomics add in any order: the same to rounding at first, then as two runs of the eager path differ
    assert results[1][:8] == pytest.approx(results[0][:8], rel=1e-3)
    assert results[1] == pytest.approx(results[0], rel=2e-2)


def test_hidden_proteins_are_not_seen_but_explained(prepared):
    state, cells, minibatches, _, _ = prepared("totalanvi")
    network, choice = state.network.eval(), minibatches.plan()[0]
    batch = take(cells, choice.index, None, choice.n_labelled)
    hidden = step._without_proteins(batch, 0.5, torch.Generator().manual_seed(0))
    seen = hidden.shown.any(1)[batch.measured.any(1)].float().mean()
    assert abs(float(seen) - 0.5) < 4 * 0.5 / len(batch.label) ** 0.5  # four standard errors of a share
    blind = batch._replace(y=torch.where(hidden.shown, batch.y, 0.0), measured=hidden.shown)
    ours, theirs = network.encode(hidden, Draws()), network.encode(blind, Draws())
    assert torch.equal(ours.mean, theirs.mean) and not torch.equal(ours.mean, network.encode(batch, Draws()).mean)
    terms, blind_terms = (network.terms(part, None, Draws()) for part in (hidden, blind))
    unseen = batch.measured.any(1) & ~hidden.shown.any(1)
    assert (terms.reconstruction_protein[unseen] > 0).all() and not blind_terms.reconstruction_protein[unseen].any()


def test_no_proteins_are_hidden_unless_asked(prepared):
    one, two = [], []
    for results, share in ((one, 0.0), (two, 0.5)):
        state, cells, minibatches, group, plan = prepared("totalanvi", adversary=False, hide_proteins=share)
        for choice in minibatches.plan()[:2]:
            results.append(float(step.run_step(state, cells, choice, group, Weights(1.0), plan, fooling=False).loss))
    assert one != two and all(value > 0 for value in two)


def test_adam_is_that_of_torch():
    """Step by step, with gradients that come late, a scale, a decay and a rate that changes; also after a reload."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in ((7, 3), (5,), (2, 2))]
    ours, theirs, again = ([value.clone().requires_grad_() for value in start] for _ in range(3))
    adam = step.Adam(ours, 0.1, eps=1e-4, weight_decay=1e-2)
    reference = torch.optim.Adam(theirs, lr=0.1, eps=1e-4, weight_decay=1e-2, fused=True)
    for number in range(5):
        scale = torch.tensor(1.0 + number)
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for one in pair:
                one.grad = None if i == 1 and number < 2 else gradient.clone()
        rate = 0.1 / (1 + number)
        adam.set_rate(rate)
        reference.param_groups[0]["lr"], reference.grad_scale = rate, scale
        if number == 3:  # another goes on
            for own, value in zip(again, ours, strict=True):
                own.data.copy_(value.data)
                own.grad = value.grad.clone()
            other = step.Adam(again, rate, eps=1e-4, weight_decay=1e-2)
            other.load_state_dict(adam.state_dict())
            other.step(scale)
        adam.step(scale)
        reference.step()
        if number == 3:
            assert all(map(torch.equal, again, ours))
        assert all(map(torch.equal, ours, theirs)), number
    kept = {name: value.clone() for name, value in adam.state_dict().items()}
    assert set(kept) == {f"{i}/{name}" for i in range(3) for name in ("step", "exp_avg", "exp_avg_sq")}
    assert kept["0/step"] == 5 and kept["1/step"] == 3


def test_a_fit_does_without_the_compiler_of_torch():
    """It takes a second and 80 MB in every process, and nothing is compiled."""
    code = """
import sys, anvi as av
av.tl.totalanvi(av.datasets.synthetic_cite(300, n_genes=60), max_epochs=1, n_hidden=16)
print(sorted({name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_padding_counts_for_nothing_in_what_is_reported():
    """Cross-entropy and accuracy of the cells that count, whether the former was at hand or not."""
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0])
    zero = torch.zeros(4)
    logits, target = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(3, dtype=torch.long)
    terms = Terms(zero, None, zero, *[None] * 5, zero[:, None], logits, target, weight[:3])
    batch = SimpleNamespace(weight=weight)
    own = step.classification_loss(terms)
    for sums in (step.summarise(terms, batch), step.summarise(terms, batch, own * weight[:3].sum())):
        assert float(sums["classification_loss"] / sums["labelled"]) == pytest.approx(float(own), rel=1e-6)
        assert float(own) == pytest.approx(float(torch.nn.functional.cross_entropy(logits[:1], target[:1])), rel=1e-6)
        assert float(sums["accuracy"] / sums["labelled"]) == float(logits[0].argmax() == 0)
