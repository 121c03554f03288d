"""Triton kernels of segment_pool and segment_pool_pack_bits; `pooling` launches them.

Every kernel is in bounds for any values of the offsets.
"""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from ._support import round_to, widen

NORM_EPS = tl.constexpr(1e-12)  # smallest norm that is divided by (torch.nn.functional.normalize)

# sizes that would only make more variants of a kernel
_COUNTS = ("total", "m", "splits", "column_blocks")


@triton.jit
def sequence_rows(cu_seqlens, sequence, total):
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), total).to(tl.int64)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), start), total).to(tl.int64)
    return start, end


@triton.jit
def vector_rows(cu_seqlens, vector, total, m, MODE: tl.constexpr):
    """The rows that are pooled into a vector: of its sequence all, the last, or (first_m) its own one."""
    start, end = sequence_rows(cu_seqlens, vector // m, total)
    if MODE == "first_m":
        start = tl.minimum(start + vector % m, end)
        end = tl.minimum(start + 1, end)
    elif MODE == "last":
        start = tl.maximum(end - 1, start)
    return start, end


@triton.jit
def row_weights(weights, rows, start, inside, WEIGHTS: tl.constexpr):
    found = (rows - start + 1).to(tl.float32)
    if WEIGHTS == "given":
        found = tl.load(weights + rows, mask=inside, other=0)
    return found


@triton.jit
def sum_weights(weights, start, end, WEIGHTS: tl.constexpr):
    """Sum of a sequence's weights in float64: exact for counts, and zero only where it is zero."""
    if WEIGHTS == "given":
        sums = tl.zeros([256], tl.float64)
        for row in range(start, end, 256):
            rows = (row + tl.arange(0, 256)).to(tl.int64)
            sums += tl.load(weights + rows, mask=rows < end, other=0).to(tl.float64)
        total = tl.sum(sums, axis=0)
    else:
        total = (end - start).to(tl.float64)
        if WEIGHTS == "position":
            total = total * (total + 1) / 2
    return total


@triton.jit
def row_scale(weights, start, end, MODE: tl.constexpr, WEIGHTS: tl.constexpr, POWER: tl.constexpr):
    """What the pooled rows are multiplied by: 1 / sum or 1 / sqrt(sum) of the weights; 0 without rows or weight."""
    if MODE == "sum":
        weight_sum = sum_weights(weights, start, end, WEIGHTS).to(tl.float32)
        divisor = tl.sqrt_rn(weight_sum) if POWER == 0.5 else weight_sum
        scale = tl.where(weight_sum == 0, 0.0, tl.div_rn(1.0, tl.where(weight_sum == 0, 1.0, divisor)))
    else:
        scale = tl.where(start < end, 1.0, 0.0)
    return scale


@triton.jit
def _scaled(pooled, scale):
    # whatever the rows hold
    return tl.where(scale == 0, 0.0, pooled) * scale


@triton.jit
def _larger(a, b):
    """Elementwise maximum in which NaN wins."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def largest(x):
    """Maximum over the rows of a tile in which NaN wins."""
    nan = x != x
    best = tl.max(tl.where(nan, float("-inf"), x), axis=0)
    return tl.where(tl.max(nan.to(tl.int32), axis=0) > 0, float("nan"), best)


@triton.jit
def _store_vector(out, vector, column, values, columns, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    if BITS:
        bits = tl.reshape((values > 0).to(tl.int32), [COLUMNS // 8, 8]) << (7 - tl.arange(0, 8))[None, :]
        width = (columns + 7) // 8
        byte = tl.min(column, axis=0) // 8 + tl.arange(0, COLUMNS // 8)
        tl.store(out + vector * width + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte < width)
    else:
        tl.store(out + vector * columns + column, round_to(values, out.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=_COUNTS)
def pool_kernel(
    out,
    hidden,
    cu_seqlens,
    weights,
    total,
    row_stride,
    columns,
    m,
    splits,
    column_blocks,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    POWER: tl.constexpr,
    FINISH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of columns of one vector; without FINISH one part of its rows, for finish_kernel."""
    program = tl.program_id(0)
    column = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    part = program // column_blocks
    vector = part // splits
    first, last = vector_rows(cu_seqlens, vector, total, m, MODE)
    # rounded up without overflow; a 64-bit division would be a call
    step = ((last - first).to(tl.int32) - 1) // splits + 1
    start = first + (part % splits).to(tl.int64) * step
    end = tl.minimum(start + step, last)
    # the padding of a tile must not change its result
    other = float("-inf") if MODE == "max" else 0.0
    pooled = tl.full([ROWS, COLUMNS], other, tl.float32)
    for row in range(start, end, ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < end)[:, None] & (column < columns)[None, :]
        x = widen(tl.load(hidden + (rows * row_stride)[:, None] + column[None, :], mask=inside, other=other))
        if MODE == "max":
            pooled = _larger(pooled, x)
        elif WEIGHTS == "none":
            pooled += x
        else:
            pooled += x * row_weights(weights, rows, first, rows < end, WEIGHTS)[:, None]
    result = largest(pooled) if MODE == "max" else tl.sum(pooled, axis=0)
    if FINISH:
        result = _scaled(result, row_scale(weights, first, last, MODE, WEIGHTS, POWER))
        if NORMALIZE:
            squares = tl.where(column < columns, result * result, 0.0)
            result = result / tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), NORM_EPS)
        _store_vector(out, vector.to(tl.int64), column, result, columns, BITS, COLUMNS)
    else:
        tl.store(out + part.to(tl.int64) * columns + column, result, mask=column < columns)


@triton.jit
def _joined(parts, vector, splits, column, columns, MODE: tl.constexpr):
    """One block of columns of a vector out of the parts of its rows."""
    inside = column < columns
    at = parts + vector * splits * columns + column
    joined = tl.load(at, mask=inside, other=0)
    for part in range(1, splits):
        more = tl.load(at + tl.cast(part, tl.int64) * columns, mask=inside, other=0)
        if MODE == "max":
            joined = _larger(joined, more)
        else:
            joined += more
    return joined


@triton.jit(do_not_specialize=_COUNTS)
def finish_kernel(
    out,
    parts,
    cu_seqlens,
    weights,
    total,
    columns,
    m,
    splits,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    POWER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A whole vector from parts float32 [vectors, splits, columns]."""
    start, end = vector_rows(cu_seqlens, tl.program_id(0), total, m, MODE)
    vector = tl.program_id(0).to(tl.int64)
    scale = row_scale(weights, start, end, MODE, WEIGHTS, POWER)
    norm = 1.0
    if NORMALIZE:
        squares = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            joined = _joined(parts, vector, splits, column, columns, MODE)
            values = _scaled(joined, scale)
            squares += tl.where(column < columns, values * values, 0.0)
        norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), NORM_EPS)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        joined = _joined(parts, vector, splits, column, columns, MODE)
        values = _scaled(joined, scale)
        _store_vector(out, vector, column, values / norm, columns, BITS, COLUMNS)
