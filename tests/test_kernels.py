"""The Triton kernels, run by Triton's interpreter, equal the definitions in value and gradient."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anvi import _stream
from anvi._fit import step
from anvi.nn import Entries, Weights, layers, likelihoods, sparse

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":  # it must be set before Triton is first imported
    if "triton" in sys.modules:
        pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
import triton
import triton.language as tl
from test_step import prepared  # noqa: F401 a fixture
from triton.runtime.interpreter import GridExecutor

from anvi.nn import kernels

# the interpreter computes with NumPy, which warns of lanes that are masked out later
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def draw(seed, dtype, *, spread=2.0, softmax=False):
    """Random shapes; an empty row, a huge count and a few large ones; a third of the dispersions per cell."""
    generator = torch.Generator().manual_seed(seed)
    cells, genes = (int(torch.randint(1, most, (), generator=generator)) for most in (9, 90))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = torch.poisson(torch.rand(cells, genes, generator=generator), generator=generator).to(dtype)
    x[0], x[-1, -1], x[-1, 0] = 0, 1_000_000, 37
    arguments = [
        spread * normal(cells, genes),
        spread * normal(*((cells, genes) if seed % 3 == 0 else (genes,))),
        spread * normal(cells, genes),
    ]
    if softmax:
        arguments.append(7 + normal(cells, 1))
    return x, [argument.to(dtype) for argument in arguments], normal(cells)


def with_gradients(function, arguments, weight):
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    value = function(*leaves)
    value.backward(weight.to(value.dtype))
    return value.detach(), [leaf.grad for leaf in leaves]


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def compare(fast, definition, arguments, weight, present, tolerance=None, rounding=0.0):
    """Against the definition in double precision; a count of a million costs digits, as many as in `sparse.py`.

    `rounding` is what the value may lose whatever its size: terms that cancel.
    """
    tolerance = tolerance or TOLERANCE[arguments[0].dtype]
    exact, exact_gradients = with_gradients(definition, [a.double() for a in arguments], weight)
    value, gradients = with_gradients(fast, arguments, weight)
    other, other_gradients = with_gradients(present, arguments, weight)
    parts = zip([value, *gradients], [other, *other_gradients], [exact, *exact_gradients], strict=True)
    for ours, theirs, expected in parts:
        assert torch.isfinite(ours).all()
        lost = rounding / float(expected.abs().max()) if ours is value else 0
        assert error(ours, expected) <= max(tolerance, 2 * error(theirs, expected), lost)


def likelihood(zero, softmax, x, eps=0.0):
    """Kernel, definition and present path, of (log_mean, log_theta, [zero_logits], [log_library])."""
    entries = Entries.of(x)

    def of(module):
        def function(*arguments):
            library = arguments[-1] if softmax else None
            return module.nb(entries, *arguments[: 3 if zero else 2], log_library=library, eps=eps)

        return function

    def definition(log_mean, *rest):
        if softmax:
            log_mean = log_mean.log_softmax(-1) + rest[-1]
        if eps:
            log_mean = (log_mean.exp() + eps).log()
        function = likelihoods.zinb if zero else likelihoods.nb
        return function(x.double(), log_mean, *rest[: 2 if zero else 1]).sum(-1)

    return of(kernels), definition, of(sparse)


@DTYPES
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("softmax", [False, True], ids=["mean", "softmax"])
@pytest.mark.parametrize("zero", [False, True], ids=["nb", "zinb"])
def test_counts_equal_the_definition(zero, softmax, eps, dtype):
    for seed in range(6):
        x, arguments, weight = draw(seed, dtype, softmax=softmax)
        if not zero:
            del arguments[2]
        fast, definition, present = likelihood(zero, softmax, x, eps)
        compare(fast, definition, arguments, weight, present)


@pytest.mark.parametrize("zero", [False, True], ids=["nb", "zinb"])
def test_more_genes_than_a_block(zero, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "TILE", (2, 16))
    x, arguments, weight = draw(4, torch.float64, softmax=True)
    assert x.shape[0] > 2 and x.shape[1] > 32
    fast, definition, present = likelihood(zero, True, x)
    compare(fast, definition, arguments if zero else arguments[:2] + arguments[3:], weight, present)


@DTYPES
@pytest.mark.parametrize("zero", [False, True], ids=["nb", "zinb"])
@pytest.mark.parametrize("log_theta", [-20.0, -6.0, 0.0, 12.0, 20.0])
@pytest.mark.parametrize("log_mean", [-200.0, -60.0, -12.0, 0.0, 12.0, 25.0])
def test_extremes_are_those_of_the_fast_path(log_mean, log_theta, zero, dtype):
    """Where a definition in lgamma has lost its digits, the other fast path stands in, in double precision."""
    x = torch.tensor([[0.0, 1.0, 3.0, 1e6]], dtype=dtype)
    arguments = [torch.full((1, 4), value, dtype=dtype) for value in (log_mean, log_theta, 0.5)][: 3 if zero else 2]
    fast, _, present = likelihood(zero, False, x)
    _, _, exact = likelihood(zero, False, x.double())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3  # what is lost in float32: theta times log1p(count / theta)
    # a count times log r - log(1 + r), r = mean / theta, which each path rounds once; NumPy's logarithms differ there,
    # by version, in the last bit: for r = e^31 and a million 3.6e-9, of a log-probability of -33
    rounding = torch.finfo(dtype).eps * 1e6 * abs(log_mean - log_theta) if dtype == torch.float64 else 0.0
    compare(fast, exact, arguments, torch.ones(1, dtype=torch.float64), present, tolerance, rounding)


@DTYPES
def test_proteins_equal_the_definition(dtype):
    for seed in range(6):
        x, (log_back, log_phi, mixing), _ = draw(seed, dtype)
        log_fore = log_back + 1
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        compare(
            lambda *a, x=x: kernels.nb_mixture(x, *a),
            lambda *a, x=x: likelihoods.nb_mixture(x.double(), *a),
            [log_back, log_fore, log_phi, mixing],
            weight,
            lambda *a, x=x: sparse.nb_mixture(x, *a),
        )


def test_zeros_among_the_entries_do_no_harm():
    x, arguments, weight = draw(2, torch.float64)
    row, column, count = Entries.of(x)
    padded = Entries(*(torch.cat([part, torch.zeros(50, dtype=part.dtype)]) for part in (row, column, count)))
    whole = likelihood(True, False, x)[0]
    value, gradients = with_gradients(whole, arguments, weight)
    again, gradients_again = with_gradients(lambda *a: kernels.nb(padded, *a), arguments, weight)
    assert torch.equal(value, again) and all(map(torch.equal, gradients, gradients_again))


@pytest.mark.parametrize("broken", ["log_mean", "log_theta", "zero_logits", "log_library"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(broken, number):
    if broken == "zero_logits" and number == float("inf"):
        return  # every draw an extra zero: a zero is then certain, and the present path says NaN
    x, arguments, _ = draw(1, torch.float32, softmax=True)
    names = ["log_mean", "log_theta", "zero_logits", "log_library"]
    arguments[names.index(broken)].view(-1)[0] = number
    fast, _, present = likelihood(True, True, x)
    # a library may be infinite: means are cut
    assert fast(*arguments).isfinite().all() == (broken == "log_library" and number == float("inf"))
    assert torch.equal(fast(*arguments).isfinite(), present(*arguments).isfinite())


def test_no_cells():
    for cells, genes in ((0, 3), (0, 0)):
        empty = torch.zeros(cells, genes, requires_grad=True)
        log_theta = torch.zeros(genes, requires_grad=True)
        kernels.nb(Entries.of(empty.detach()), empty, log_theta).sum().backward()
        kernels.nb_mixture(empty.detach(), empty, empty, log_theta, empty).sum().backward()
        assert torch.equal(log_theta.grad, torch.zeros(genes))


@pytest.mark.parametrize("index, kind", [("int32", "float32"), ("int16", "uint8"), ("int16", "uint16")])
@pytest.mark.parametrize("room", [0, 300, 1_000])
def test_entries_of_rows(room, index, kind):
    """Those of the dense matrix, then zeros, not all on one address."""
    x, _, _ = draw(4, torch.float32)
    x = x if kind == "float32" else x.clamp(max=torch.iinfo(getattr(torch, kind)).max)
    stored = Entries.of(x)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (x > 0).sum(1).cumsum(0)])
    rows = torch.tensor([2, 0, 1, 0, 2])[: 5 if room else 0]
    columns, values = stored.column.to(getattr(torch, index)), stored.count.to(getattr(torch, kind))
    row, column, count = kernels.entries(rows, indptr, columns, values, x.shape[1], room)
    assert (row.dtype, column.dtype, count.dtype) == (torch.int64, torch.int64, torch.float32)
    exact = Entries.of(x[rows])
    n = len(exact.count)
    assert len(count) == room and n <= room
    for ours, theirs in zip((row, column, count), exact, strict=True):
        assert torch.equal(ours[:n], theirs)
    assert not count[n:].any() and torch.equal(Entries(row, column, count).dense(x[rows]), x[rows])
    if room == 1_000:
        assert len((row * x.shape[1] + column)[n:].unique()) > 200


@pytest.mark.parametrize("rows", [0, 1, 7, 300, 1_100])
def test_add_rows(rows):
    generator = torch.Generator().manual_seed(rows)
    code = torch.randint(5, (rows,), generator=generator)
    codes = torch.stack([code, code], 1)[:, 0]  # not contiguous, as columns of codes are
    h, table, weight = (torch.randn(n, 37, generator=generator, dtype=torch.float64) for n in (rows, 6, rows))
    value, gradients = with_gradients(lambda h, table: kernels.add_rows(h * 1, table, codes), [h, table], weight)
    expected, expected_gradients = with_gradients(lambda h, table: h + table[code], [h, table], weight)
    for ours, theirs in zip([value, *gradients], [expected, *expected_gradients], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_relu_dropout():
    h, weight = torch.randn(2, 40, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = torch.empty_like(h).bernoulli_(0.8, generator=torch.Generator().manual_seed(1))
    value, (by_h,) = with_gradients(lambda h: kernels.relu_dropout(h, kept.clone(), 1.25), [h], weight)
    expected, (expected_by_h,) = with_gradients(lambda h: torch.relu(h) * kept * 1.25, [h], weight)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(by_h, expected_by_h)
    h[0, 0] = torch.nan
    assert kernels.relu_dropout(h, torch.ones_like(h), 1.25)[0, 0].isnan()


@triton.jit
def _tails(z, gamma, digamma, theta, count, choose, by_theta, DOUBLE: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(gamma + at, kernels._gamma_tail(tl.load(z + at), DOUBLE))
    tl.store(digamma + at, kernels._digamma_tail(tl.load(z + at), DOUBLE))
    value, slope = kernels._coefficient(tl.load(count + at), tl.load(theta + at), DOUBLE)
    tl.store(choose + at, value)
    tl.store(by_theta + at, slope)


@DTYPES
def test_special_functions_equal_those_of_torch(dtype):
    double = dtype == torch.float64
    n = 64
    z = torch.linspace(8 if double else 4, 60, n, dtype=dtype)
    theta, count = torch.logspace(-4, 3, n, dtype=dtype), torch.arange(n, dtype=dtype) ** 2
    gamma, digamma, choose, by_theta = (torch.empty(n, dtype=dtype) for _ in range(4))
    _tails[(1,)](z, gamma, digamma, theta, count, choose, by_theta, DOUBLE=double, N=n)
    exact = z.double()
    tolerance = 3e-13 if double else 7e-8  # the first term that is left out
    log_gamma = torch.lgamma(exact) - ((exact - 0.5) * exact.log() - exact + 0.918938533204672742)
    assert (gamma - log_gamma).abs().max() < tolerance
    assert (digamma - (torch.digamma(exact) - exact.log())).abs().max() < tolerance
    theta, count = theta.double(), count.double()
    expected = torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1)
    slope = theta * (torch.digamma(count + theta) - torch.digamma(theta))
    assert error(choose, expected) < TOLERANCE[dtype] and error(by_theta, slope) < TOLERANCE[dtype]


def test_nothing_but_a_gpu_imports_triton():
    """On a CPU the present path runs, Triton there or not."""
    code = """
import sys, torch
from anvi.nn import Entries, sparse
x = torch.ones(2, 3)
sparse.nb(Entries.of(x), x, x[0])
sparse.nb_mixture(x, x, x, x[0], x)
assert "anvi.nn.kernels" not in sys.modules and "triton" not in sys.modules
"""
    source = str(Path(sparse.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": source})


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from anvi.nn import kernels, kernels_latent

of_type = torch.finfo(torch.float32)
forward = dict(EPS=1e-8, SOFTMAX=True, ZERO=True, DOUBLE=False, LIMIT=of_type.max**0.5, LOWEST=of_type.min, BLOCK=1024)
whole = {"start": "*i64", "end": "*i64", "indices": "*i16", "row": "*i64", "column": "*i64", "code": "*i64"}
numbers = {"genes", "theta_stride", "n", "phi_size", "cells", "columns", "grad_row", "grad_column", "rows", "width",
           "n_rows", "n_columns", "room", "z_row", "z_column", "mean_row", "mean_column"}
for function, constants in (
    (kernels._nb_forward, forward),
    (kernels._mixture_forward, dict(DOUBLE=False, BLOCK=1024)),
    (kernels._backward, dict(N=3, SUM=True, CELLS=64, COLUMNS=32)),
    (kernels._gather_entries, dict(STEPS=8, BLOCK=256)),
    (kernels._add_rows_forward, dict(BLOCK=1024)),
    (kernels._add_rows_backward, dict(ROWS=128, COLUMNS=32)),
    (kernels._normal_forward, dict(DIVERGENCE=False, ROWS=16, COLUMNS=32)),
    (kernels._normal_forward, dict(DIVERGENCE=True, ROWS=16, COLUMNS=32)),
    (kernels._relu_dropout, dict(scale=1.25, BLOCK=1024)),
    (kernels._relu_dropout_backward, dict(scale=1.25, BLOCK=1024)),
    (kernels_latent._heads, dict(FLOOR=1e-4, BLOCK=1024)),
    *((getattr(kernels_latent, name), dict(BLOCK=1024)) for name in (
        "_heads_backward", "_sample", "_sample_backward", "_kl_normal", "_kl_normal_backward"
    )),
):
    signature = {name: "i32" if name in numbers else whole.get(name, "*fp32") for name in function.arg_names}
    signature |= {"values": "*u16"} if function is kernels._gather_entries else {}
    source = ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert ".f64" not in ptx, function  # nothing slips into double precision, which is slow
    assert ".local" not in ptx, function  # registers are enough
    print(function.__name__)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes more than the compiler does; it needs no GPU either."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(sparse.__file__).parents[2])}
    del environment["TRITON_INTERPRET"]
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 16


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: operators that are no views, and every Triton kernel as one."""

    VIEWS = set(
        "view expand t transpose unsqueeze squeeze select slice split unbind alias detach permute as_strided "
        "_unsafe_view _reshape_alias split_with_sizes empty empty_like new_empty empty_strided unfold diagonal "
        "lift_fresh new_empty_strided _record_function_enter_new _record_function_exit".split()
    )

    def __init__(self):
        super().__init__()
        self.n, self.inside = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not self.inside and func.name().split("::")[1].split(".")[0] not in self.VIEWS
        return func(*args, **(kwargs or {}))

    def of_triton(self, launch):
        """The same launch, counted as one."""

        def counted(*args, **kwargs):
            self.n, self.inside = self.n + 1, True
            try:
                return launch(*args, **kwargs)
            finally:
                self.inside = False

        return counted


# counted on a CPU; a profile of an H200 has more (158, 470, 368, 731): cuBLAS splits products, torch splits sums
LAUNCHES = {"scvi": 94, "scanvi": 249, "totalvi": 242, "totalanvi": 450}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_step(name, prepared, monkeypatch):  # noqa: F811
    """A guard against launches that creep in. Raise it only knowingly."""
    state, cells, minibatches, group, plan = prepared(name, adversary=False)
    for module in (sparse, _stream):
        monkeypatch.setattr(module, "kernels_for", lambda tensor: kernels)
    launches = Launches()
    monkeypatch.setattr(GridExecutor, "__call__", launches.of_triton(GridExecutor.__call__))
    room, steps = step.Capacity(6_000, 4_000), minibatches.plan()
    for choice in steps[:2]:  # the optimiser makes its state in the first
        launches.n = 0
        with launches:
            step.run_step(state, cells, choice, group, Weights(torch.tensor(0.5)), plan, fooling=False, room=room)
    assert launches.n <= LAUNCHES[name]


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_normal_distributions_of_latent_variables(dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    z, both, weight = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (37, 74, 1))
    z, mean, var = z.to(dtype), both.to(dtype)[:, :37], both.to(dtype)[:, 37:].exp()  # halves are not contiguous
    for ours, theirs, inputs in (
        (kernels.log_normal_density, likelihoods.log_normal_density, [z, mean, var]),
        (kernels.kl_standard_normal, likelihoods.kl_standard_normal, [mean, var]),
    ):
        value, gradients = with_gradients(ours, inputs, weight[:, 0])
        expected, expected_gradients = with_gradients(
            lambda *args, theirs=theirs: theirs(*args).sum(-1), [part.double() for part in inputs], weight[:, 0]
        )
        for one, other in zip([value, *gradients], [expected, *expected_gradients], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_heads_samples_and_divergences_of_latent_variables(dtype, rows):
    """Against the definitions in float64, in value and gradient; variances down to the floor, halves of a matrix."""
    generator = torch.Generator().manual_seed(rows)
    both, noise = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (38, 19))
    both[:, 19:] *= 9
    mean, scale, prior_mean, prior_scale = (
        3 * torch.randn(4, rows, 19, generator=generator, dtype=torch.float64)
    ).unbind()
    scale, prior_scale, far = scale.exp(), prior_scale.exp(), torch.randn(rows, 19, generator=generator).double()

    def joint_heads(both):
        mean, var = kernels.heads(both, 1e-4)
        return mean * far.to(both.dtype) + var

    def heads(both):
        mean, log_var = both.chunk(2, dim=-1)
        return mean * far + log_var.exp() + 1e-4

    for ours, theirs, inputs in (
        (joint_heads, heads, [both]),
        (kernels.sample, lambda mean, var, noise: mean + var.sqrt() * noise, [mean, scale, noise]),
        (kernels.kl_normal, likelihoods.kl_normal, [mean, scale, prior_mean, prior_scale]),
    ):
        inputs = [part.to(dtype) for part in inputs]
        weight = torch.randn(rows, 19, generator=generator, dtype=torch.float64)
        value, gradients = with_gradients(ours, inputs, weight)
        expected, expected_gradients = with_gradients(theirs, [part.double() for part in inputs], weight)
        gradients, expected_gradients = (
            part[: 2 if ours is kernels.sample else 4] for part in (gradients, expected_gradients)
        )
        for one, other in zip([value, *gradients], [expected, *expected_gradients], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_both_heads_of_an_encoder_in_one_product(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    encoder = layers.GaussianEncoder(layers.Stack(7, 16, 1), 16, 5).double()
    for module in encoder.modules():
        if isinstance(module, layers.Linear):
            module.reset(generator)
    h = torch.randn(30, 7, generator=generator, dtype=torch.float64)
    results = []
    for found in (None, kernels):
        monkeypatch.setattr(sparse, "kernels_for", lambda tensor, found=found: found)
        encoder.zero_grad()
        mean, var = encoder(h, None, layers.Draws())
        (mean * var).sum().backward()
        results.append([mean, var, *(parameter.grad for parameter in encoder.parameters())])
    for apart, joint in zip(*results, strict=True):
        torch.testing.assert_close(joint, apart, rtol=1e-10, atol=1e-12)
