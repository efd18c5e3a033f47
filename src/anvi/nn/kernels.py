"""The functions of `sparse.py` as one Triton kernel each way, for CUDA, where a step waits for launches.

Each forward kernel works out values and derivatives together; one backward kernel multiplies these by what comes from
above and sums them over cells where a parameter is shared by all. Sums have a fixed order and nothing is added
atomically: two runs give the same numbers. Log-gammas are evaluated at every entry here: what a GPU waits for is
memory. Triton comes with torch's CUDA builds; this module is imported only where it is there. Its interpreter
(`TRITON_INTERPRET=1`) runs the same kernels on a CPU, where tests hold them to `likelihoods.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .config import Entries
from .kernels_latent import heads as heads
from .kernels_latent import kl_normal as kl_normal
from .kernels_latent import sample as sample

BLOCK = 1_024
"""Genes or proteins that a program works on at a time."""
TILE = (64, 32)
"""Cells and columns that a program of the backward pass works on at a time."""


def nb(
    entries: Entries,
    log_mean: Tensor,
    log_theta: Tensor,
    zero_logits: Tensor | None = None,
    *,
    log_library: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """See :func:`sparse.nb`."""
    return _NegativeBinomial.apply(*entries, log_mean, log_theta, zero_logits, log_library, eps)


def nb_mixture(y: Tensor, log_background: Tensor, log_foreground: Tensor, log_phi: Tensor, mixing: Tensor) -> Tensor:
    """See :func:`sparse.nb_mixture`."""
    return _Mixture.apply(y, log_background, log_foreground, log_phi, mixing)


def entries(rows: Tensor, indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int, room: int) -> Entries:
    """`room` entries of some rows of a CSR matrix, the last ones zeros that are spread over the matrix."""
    start = indptr[rows]
    end = (indptr[1:][rows] - start).cumsum(0)
    row, column = (torch.empty(room, dtype=torch.int64, device=rows.device) for _ in range(2))
    count = torch.empty(room, dtype=torch.float32, device=rows.device)
    if room:
        steps = len(rows).bit_length()
        _gather_entries[(triton.cdiv(room, 256),)](
            start, end, indices, values, row, column, count, len(rows), n_columns, room, STEPS=steps, BLOCK=256
        )
    return Entries(row, column, count)


def add_rows(out: Tensor, table: Tensor, code: Tensor) -> Tensor:
    """Add a row of the table `(categories, width)` to each row of `out` `(rows, width)`, in place."""
    return _AddRows.apply(out, table, code)


def relu_dropout(h: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """max(h, 0) * chosen * scale, `chosen` being zeros and ones; written over `chosen`."""
    return _ReluDropout.apply(h, chosen, scale)


def log_normal_density(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """See :func:`sparse.log_normal_density`."""
    return _NormalSum.apply(z, mean, var)


def kl_standard_normal(mean: Tensor, var: Tensor) -> Tensor:
    """See :func:`sparse.kl_standard_normal`."""
    return _NormalSum.apply(None, mean, var)


@triton.jit
def _log1p(t):
    """log(1 + t) for t > -1, exact to rounding: what 1 + t loses is put back by the quotient."""
    u = 1 + t
    return tl.where(u == 1, t, tl.where(u - 1 == t, tl.log(u), tl.log(u) * (t / (u - 1))))


@triton.jit
def _softplus(t):
    return tl.where(t > 0, t, 0) + _log1p(tl.exp(-tl.abs(t)))


@triton.jit
def _sigmoid(t):
    small = tl.exp(-tl.abs(t))
    return tl.where(t > 0, 1, small) / (1 + small)


@triton.jit
def _gamma_tail(z, DOUBLE: tl.constexpr):
    """What log-gamma has beyond (z - 1/2) log z - z + log(2 pi) / 2: to 4e-8 for z >= 4, to 3e-13 for z >= 8."""
    inverse = 1 / z
    square = inverse * inverse
    if DOUBLE:
        sum = ((square / 1188 - 1 / 1680) * square + 1 / 1260) * square
    else:
        sum = square / 1260
    return ((sum - 1 / 360) * square + 1 / 12) * inverse


@triton.jit
def _digamma_tail(z, DOUBLE: tl.constexpr):
    """What digamma has beyond log z: to 7e-8 for z >= 4, to 3e-13 for z >= 8."""
    inverse = 1 / z
    square = inverse * inverse
    if DOUBLE:
        sum = ((1 / 240 - square / 132) * square - 1 / 252) * square
    else:
        sum = -square / 252
    return ((sum + 1 / 120) * square - 1 / 12) * square - inverse / 2


@triton.jit
def _coefficient(count, theta, DOUBLE: tl.constexpr):
    """As :func:`sparse.coefficient`, but exactly 0 for a count of 0."""
    STEPS: tl.constexpr = 8 if DOUBLE else 4
    steps, slope = 0 * count, 0 * count
    for first in tl.static_range(0, STEPS, 4):  # a product of all eight could overflow
        factor = 0 * count + 1
        for j in tl.static_range(4):
            low = theta + (first + j)
            share = low / (low + count)
            slope += (1 - share) / low
            factor *= share * (count + (1 + first + j))
        steps += tl.log(factor)
    low, one = theta + STEPS, count + (STEPS + 1)
    smaller, larger = tl.minimum(low, one), tl.maximum(low, one)
    high = low + count
    log_high = tl.log(high)
    value = _log1p((smaller - (STEPS + 1)) / larger) * (larger - 0.5)
    value += (log_high - tl.log(smaller)) * (smaller - 0.5) - log_high * (STEPS + 0.5)
    value += _gamma_tail(high, DOUBLE) - _gamma_tail(low, DOUBLE) - _gamma_tail(one, DOUBLE) + steps
    value += STEPS + 1 - 0.918938533204672742  # log(2 pi) / 2
    tails = _digamma_tail(high, DOUBLE) - _digamma_tail(low, DOUBLE)
    by_log_theta = (_log1p(count / low) + tails + slope) * theta
    return tl.where(count > 0, value, 0), tl.where(count > 0, by_log_theta, 0)


@triton.jit
def _nb_forward(
    x, log_mean, log_theta, zero_logits, log_library, value, by_mean, by_theta, by_zero, by_library, genes,
    theta_stride, EPS: tl.constexpr, SOFTMAX: tl.constexpr, ZERO: tl.constexpr, DOUBLE: tl.constexpr,
    LIMIT: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One cell: its log-probability and what it gains by each input; :func:`sparse._evaluate` has the formulas.

    Comparisons rather than minima keep what is NaN: a loss that is not finite must show.
    """
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    first = row * genes  # of this cell, in (cells, genes)
    shift, library = 0.0, 0.0
    if SOFTMAX:
        largest, sum = tl.full((BLOCK,), LOWEST, DTYPE), tl.zeros((BLOCK,), DTYPE)
        for start in range(0, genes, BLOCK):
            logit = tl.load(log_mean + first + start + lane, mask=start + lane < genes, other=LOWEST)
            largest = tl.maximum(largest, logit)
        top = tl.max(largest, 0)
        for start in range(0, genes, BLOCK):
            inside = start + lane < genes
            logit = tl.load(log_mean + first + start + lane, mask=inside, other=0)
            sum += tl.where(inside, tl.exp(logit - top), 0)
        shift, library = top + tl.log(tl.sum(sum, 0)), tl.load(log_library + row)
    total, gained = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(0, genes, BLOCK):
        column = start + lane
        inside, at = column < genes, first + column
        count = tl.load(x + at, mask=inside, other=0)
        log_mu = tl.load(log_mean + at, mask=inside, other=0) - shift + library
        log_disp = tl.load(log_theta + row * theta_stride + column, mask=inside, other=0)
        theta, reciprocal, mean = tl.exp(log_disp), tl.exp(-log_disp), tl.exp(log_mu)
        reciprocal = tl.where(reciprocal > LIMIT, LIMIT, reciprocal)  # their product stays finite
        mean = tl.where(mean > LIMIT, LIMIT, mean)
        if EPS > 0:
            chain = mean / (mean + EPS)  # d log(mean + eps) / d log mean
            mean += EPS
            log_mu = tl.log(mean)
        choose, by_disp = _coefficient(count, theta, DOUBLE)
        ratio = mean * reciprocal
        log_one_more = _log1p(ratio)
        # log(r / (1 + r)), cut so that a mean of 0 is no NaN where the count is 0, too
        log_lost = log_mu - log_disp - log_one_more
        log_lost = tl.where(log_lost > 0, 0, tl.where(log_lost < LOWEST, LOWEST, log_lost))
        log_prob, as_zero = choose + count * log_lost, -theta * log_one_more
        gain = (count - mean) / (1 + ratio)
        if ZERO:
            # a zero is the binomial's or an extra one: log(sigmoid(z) + sigmoid(-z) e^a) = softplus(a - z) -
            # softplus(-z); a count cannot be an extra one
            z = tl.load(zero_logits + at, mask=inside, other=0)
            t = as_zero - z
            explained = tl.where(count > 0, 1, _sigmoid(t))  # by the negative binomial
            log_prob += tl.where(count > 0, t, _softplus(t)) - _softplus(-z)
            gain *= explained
            as_zero *= explained
            tl.store(by_zero + at, 1 - _sigmoid(z) - explained, mask=inside)
        else:
            log_prob += as_zero
        tl.store(by_theta + at, as_zero - gain + by_disp, mask=inside)
        if EPS > 0:
            gain *= chain
        tl.store(by_mean + at, gain, mask=inside)
        total += tl.where(inside, log_prob, 0)
        gained += tl.where(inside, gain, 0)
    tl.store(value + row, tl.sum(total, 0))
    if SOFTMAX:  # what a cell's genes gain together, they lose in proportion to their shares
        whole = tl.sum(gained, 0)
        tl.store(by_library + row, whole)
        tl.debug_barrier()  # the gains are read where they were written
        for start in range(0, genes, BLOCK):
            inside, at = start + lane < genes, first + start + lane
            share = tl.exp(tl.load(log_mean + at, mask=inside, other=0) - shift)
            tl.store(by_mean + at, tl.load(by_mean + at, mask=inside, other=0) - share * whole, mask=inside)


@triton.jit
def _component(y, log_mean, phi, log_phi):
    """A negative binomial without the factorials, and its derivatives by log mean and log phi."""
    log_ratio = log_mean - log_phi
    one_more, kept = _softplus(log_ratio), _sigmoid(-log_ratio)  # log(1 + mean / phi), phi / (mean + phi)
    lost = phi * (1 - kept)
    value = y * (log_ratio - one_more) - phi * one_more
    return value, y * kept - lost, lost - phi * one_more - y * kept


@triton.jit
def _mixture_forward(
    y, log_background, log_foreground, log_phi, mixing, value, by_background, by_foreground, by_phi, by_mixing, n,
    phi_size, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of protein counts, each with its log-probability and four derivatives."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    count, mix = tl.load(y + at, mask=inside, other=0), tl.load(mixing + at, mask=inside, other=0)
    log_disp = tl.load(log_phi + at % phi_size, mask=inside, other=0)
    phi = tl.exp(log_disp)
    choose, choose_by_phi = _coefficient(count, phi, DOUBLE)
    back, back_by_mean, back_by_phi = _component(
        count, tl.load(log_background + at, mask=inside, other=0), phi, log_disp
    )
    fore, fore_by_mean, fore_by_phi = _component(
        count, tl.load(log_foreground + at, mask=inside, other=0), phi, log_disp
    )
    odds = back - fore + mix
    share = _sigmoid(odds)  # of the background in this count
    # log(sigmoid(m) e^b + sigmoid(-m) e^f)
    tl.store(value + at, fore + _softplus(odds) - _softplus(mix) + choose, mask=inside)
    tl.store(by_background + at, share * back_by_mean, mask=inside)
    tl.store(by_foreground + at, (1 - share) * fore_by_mean, mask=inside)
    tl.store(by_phi + at, choose_by_phi + fore_by_phi + share * (back_by_phi - fore_by_phi), mask=inside)
    tl.store(by_mixing + at, share - _sigmoid(mix), mask=inside)


@triton.jit
def _backward(
    grad, a, b, c, shared, out, cells, columns, grad_row, grad_column,
    N: tl.constexpr, SUM: tl.constexpr, CELLS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Multiply the first N of three matrices `(cells, columns)` by what comes from above, in place.

    With SUM, `shared` is multiplied, too, and summed over cells into `out` `(columns,)`.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((CELLS, COLUMNS), out.dtype.element_ty)
    for start in range(tl.program_id(1) * CELLS, cells, tl.num_programs(1) * CELLS):
        row = start + tl.arange(0, CELLS)[:, None].to(tl.int64)
        at, inside = row * columns + column, (row < cells) & (column < columns)
        factor = tl.load(grad + row * grad_row + column * grad_column, mask=inside, other=0)
        tl.store(a + at, tl.load(a + at, mask=inside, other=0) * factor, mask=inside)
        if N > 1:
            tl.store(b + at, tl.load(b + at, mask=inside, other=0) * factor, mask=inside)
        if N > 2:
            tl.store(c + at, tl.load(c + at, mask=inside, other=0) * factor, mask=inside)
        if SUM:
            total += tl.load(shared + at, mask=inside, other=0) * factor
    if SUM:
        of_columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(out + of_columns, tl.sum(total, 0), mask=of_columns < columns)


@triton.jit
def _gather_entries(
    start, end, indices, values, row, column, count, n_rows, n_columns, room, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of places: the row by bisection of where rows end, then what is stored there."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    low, high = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64) + n_rows
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        later = (low < high) & (tl.load(end + middle, mask=low < high, other=0) <= place)
        high = tl.where(later | (low >= high), high, middle)
        low = tl.where(later, middle + 1, low)
    inside, wanted = low < n_rows, place < room
    before = tl.load(end + low - 1, mask=inside & (low > 0), other=0)
    entry = tl.load(start + low, mask=inside, other=0) + place - before
    # zeros on one address would wait for each other when they are added
    found = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
    number = tl.load(values + entry, mask=inside, other=0).to(tl.float32)
    tl.store(row + place, tl.where(inside, low, place % n_rows), mask=wanted)
    tl.store(column + place, tl.where(inside, found, place % n_columns), mask=wanted)
    tl.store(count + place, number, mask=wanted)


@triton.jit
def _add_rows_forward(out, table, code, n, width, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    row, column = at // width, at % width
    of_row = tl.load(code + row, mask=inside, other=0)
    more = tl.load(table + of_row * width + column, mask=inside, other=0)
    tl.store(out + at, tl.load(out + at, mask=inside, other=0) + more, mask=inside)


@triton.jit
def _add_rows_backward(grad, code, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One category: the sum of its rows, or of every so-manieth block of them."""
    category, part = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    for start in range(part * ROWS, rows, tl.num_programs(2) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        own = tl.load(code + row, mask=row < rows, other=-1) == category
        at = row[:, None] * width + column[None, :]
        total += tl.load(grad + at, mask=own[:, None] & (column < width)[None, :], other=0)
    row_out = part * tl.num_programs(0) + category
    tl.store(out + row_out * width + column, tl.sum(total, 0), mask=column < width)


class _AddRows(Function):
    @staticmethod
    def forward(ctx, out, table, code):
        code, table = code.contiguous(), table.contiguous()
        if out.numel():
            _add_rows_forward[(triton.cdiv(out.numel(), BLOCK),)](out, table, code, out.numel(), len(table[0]), BLOCK)
        ctx.mark_dirty(out)
        ctx.save_for_backward(code)
        ctx.shape = table.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (rows, width)
        (code,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        categories, width = ctx.shape
        grad = grad.contiguous()
        # few categories alone would leave most of a GPU idle while they go through thousands of rows
        n_parts = min(16, max(1, len(grad) // 256))
        of_parts = grad.new_empty(n_parts, categories, width)
        _add_rows_backward[categories, triton.cdiv(width, 32), n_parts](
            grad, code, of_parts, len(grad), width, ROWS=128, COLUMNS=32
        )
        return grad, of_parts[0] if n_parts == 1 else of_parts.sum(0), None


@triton.jit
def _normal_forward(
    z, mean, var, value, by_z, by_mean, by_var, rows, width, z_row, z_column, mean_row, mean_column,
    DIVERGENCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of latent variables: their log-density, or the divergence of what they are drawn from; and its slopes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    total = tl.zeros((ROWS,), value.dtype.element_ty)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside, at = (row < rows)[:, None] & (column < width), row[:, None] * width + column
        mu = tl.load(mean + row[:, None] * mean_row + column * mean_column, mask=inside, other=0)
        variance = tl.load(var + at, mask=inside, other=1)
        if DIVERGENCE:
            one = 0.5 * (variance + mu * mu - 1 - tl.log(variance))
            slope, by_variance = mu, 0.5 * (1 - 1 / variance)
        else:
            far = tl.load(z + row[:, None] * z_row + column * z_column, mask=inside, other=0) - mu
            slope, by_variance = far / variance, 0.5 * (far * far / variance - 1) / variance
            one = -0.5 * (far * far / variance + tl.log(variance)) - 0.918938533204672742  # log(2 pi) / 2
            tl.store(by_z + at, -slope, mask=inside)
        tl.store(by_mean + at, slope, mask=inside)
        tl.store(by_var + at, by_variance, mask=inside)
        total += tl.sum(tl.where(inside, one, 0), 1)
    tl.store(value + row, total, mask=row < rows)


class _NormalSum(Function):
    @staticmethod
    def forward(ctx, z, mean, var):
        rows, width = mean.shape
        var = var.contiguous()
        value, by_mean, by_var = mean.new_empty(rows), mean.new_empty(mean.shape), mean.new_empty(mean.shape)
        by_z = None if z is None else mean.new_empty(mean.shape)
        if rows:
            point, of_z = (mean, mean) if z is None else (z, by_z)  # a place that is never looked at
            _normal_forward[(triton.cdiv(rows, 16),)](
                point, mean, var, value, of_z, by_mean, by_var, rows, width, *point.stride(), *mean.stride(),
                DIVERGENCE=z is None, ROWS=16, COLUMNS=32,
            )  # fmt: skip
        ctx.slopes = [slope for slope in (by_z, by_mean, by_var) if slope is not None]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (rows,)
        slopes = ctx.slopes
        del ctx.slopes  # overwritten here
        _multiply(grad, slopes, None)
        return (None, *slopes)[-3:]


@triton.jit
def _relu_dropout(h, out, n, scale: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value, kept = tl.load(h + at, mask=inside, other=0), tl.load(out + at, mask=inside, other=0)
    tl.store(out + at, tl.where(value <= 0, 0, value) * (kept * scale), mask=inside)  # NaN stays


@triton.jit
def _relu_dropout_backward(grad, value, out, n, scale: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    passed = tl.load(value + at, mask=inside, other=0) > 0
    tl.store(out + at, tl.where(passed, tl.load(grad + at, mask=inside, other=0) * scale, 0), mask=inside)


class _ReluDropout(Function):
    @staticmethod
    def forward(ctx, h, chosen, scale):
        if h.numel():
            grid = (triton.cdiv(h.numel(), BLOCK),)
            _relu_dropout[grid](h.contiguous(), chosen, h.numel(), scale=scale, BLOCK=BLOCK)
        ctx.mark_dirty(chosen)
        ctx.save_for_backward(chosen)
        ctx.scale = scale
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (value,) = ctx.saved_tensors
        out = torch.empty_like(value)
        if out.numel():
            grid = (triton.cdiv(out.numel(), BLOCK),)
            _relu_dropout_backward[grid](grad.contiguous(), value, out, out.numel(), scale=ctx.scale, BLOCK=BLOCK)
        return out, None, None


def _multiply(grad: Tensor, scaled: list[Tensor], shared: Tensor | None) -> Tensor | None:
    """Launch the backward kernel; returns the sum over cells of what is `shared` by all."""
    cells, columns = scaled[0].shape
    out = scaled[0].new_empty(columns if shared is not None else 0)
    a, b, c = (scaled + scaled[:1] * 2)[:3]
    if cells and columns:
        splits = 1 if shared is not None else triton.cdiv(cells, TILE[0])
        _backward[triton.cdiv(columns, TILE[1]), splits](
            grad, a, b, c, a if shared is None else shared, out, cells, columns,
            grad.stride(0), grad.stride(1) if grad.dim() > 1 else 0,
            N=len(scaled), SUM=shared is not None, CELLS=TILE[0], COLUMNS=TILE[1],
        )  # fmt: skip
    else:
        out.zero_()
    return None if shared is None else out


def _block(n: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(n, 16)))


class _NegativeBinomial(Function):
    @staticmethod
    def forward(ctx, row, column, count, log_mean, log_theta, zero_logits, log_library, eps):
        cells, genes = log_mean.shape
        log_mean, log_theta = log_mean.contiguous(), log_theta.contiguous()
        x = torch.zeros_like(log_mean)
        x.view(-1).scatter_add_(0, row * genes + column, count)
        ctx.theta_of_gene = log_theta.dim() == 1
        value, by_mean, by_theta = log_mean.new_empty(cells), torch.empty_like(log_mean), torch.empty_like(log_mean)
        by_zero = None if zero_logits is None else torch.empty_like(log_mean)
        by_library = None if log_library is None else log_mean.new_empty(cells)
        if cells:
            of_type = torch.finfo(log_mean.dtype)
            absent = log_mean  # a place that is never looked at
            _nb_forward[(cells,)](
                x, log_mean, log_theta, absent if zero_logits is None else zero_logits.contiguous(),
                absent if log_library is None else log_library.contiguous(), value, by_mean, by_theta,
                absent if by_zero is None else by_zero, absent if by_library is None else by_library,
                genes, 0 if ctx.theta_of_gene else genes, EPS=eps, SOFTMAX=log_library is not None,
                ZERO=zero_logits is not None, DOUBLE=log_mean.dtype == torch.float64, LIMIT=of_type.max**0.5,
                LOWEST=of_type.min, BLOCK=_block(genes), num_warps=8,
            )  # fmt: skip
        # the backward pass overwrites these, and is hence possible once
        ctx.dense = (by_mean, by_theta, by_zero, by_library)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (cells,)
        by_mean, by_theta, by_zero, by_library = ctx.dense
        del ctx.dense
        scaled, shared = [by_mean] if by_zero is None else [by_mean, by_zero], None
        if ctx.needs_input_grad[4] and ctx.theta_of_gene:
            shared = by_theta
        elif ctx.needs_input_grad[4]:
            scaled.append(by_theta)
        of_genes = _multiply(grad, scaled, shared)
        grad_log_theta = (of_genes if ctx.theta_of_gene else by_theta) if ctx.needs_input_grad[4] else None
        grad_library = None if by_library is None else (grad * by_library)[:, None]
        return None, None, None, by_mean, grad_log_theta, by_zero, grad_library, None


class _Mixture(Function):
    @staticmethod
    def forward(ctx, y, log_background, log_foreground, log_phi, mixing):
        parts = [part.contiguous() for part in (y, log_background, log_foreground, log_phi, mixing)]
        value, *dense = (torch.empty_like(parts[1]) for _ in range(5))
        ctx.phi_of_protein = log_phi.dim() == 1
        if y.numel():
            block = _block(y.numel())
            _mixture_forward[(triton.cdiv(y.numel(), block),)](
                *parts, value, *dense, y.numel(), log_phi.numel(), DOUBLE=y.dtype == torch.float64, BLOCK=block
            )
        ctx.dense = dense
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # (cells, proteins)
        by_background, by_foreground, by_phi, by_mixing = ctx.dense
        del ctx.dense
        of_proteins = _multiply(grad, [by_background, by_foreground, by_mixing], by_phi if ctx.phi_of_protein else None)
        if not ctx.phi_of_protein:
            by_phi.mul_(grad)
        return None, by_background, by_foreground, of_proteins if ctx.phi_of_protein else by_phi, by_mixing
