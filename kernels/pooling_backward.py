"""Triton kernels of segment_pool_backward; `pooling` launches them.

The rows of the gradient are dealt out evenly and look up their sequence, so each is written once whatever the offsets.
"""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from ._support import first_above, round_to, widen
from .pooling_forward import NORM_EPS, largest, row_scale, row_weights, sequence_rows, sum_weights, vector_rows

# sizes that would only make more variants of a kernel
_COUNTS = ("total", "m", "column_blocks", "sequences")


@triton.jit(do_not_specialize=_COUNTS)
def first_maximum_kernel(
    places,
    hidden,
    cu_seqlens,
    total,
    row_stride,
    columns,
    column_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """places int32 [sequences, columns]: the first row with the largest value, or with NaN where there is one."""
    program = tl.program_id(0)
    column = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    sequence = (program // column_blocks).to(tl.int64)
    start, end = sequence_rows(cu_seqlens, sequence, total)
    lane = tl.arange(0, ROWS)
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    # each lane's own first row, so that a column of -inf has a maximum too
    place = tl.zeros([ROWS, COLUMNS], tl.int32) + tl.where(start + lane < end, start + lane, 2147483647)[:, None]
    place = place.to(tl.int32)
    for row in range(start, end, ROWS):
        rows = (row + lane).to(tl.int64)
        inside = (rows < end)[:, None] & (column < columns)[None, :]
        at = hidden + (rows * row_stride)[:, None] + column[None, :]
        x = widen(tl.load(at, mask=inside, other=float("-inf")))
        better = (x > best) | ((x != x) & (best == best))
        best = tl.where(better, x, best)
        place = tl.where(better, rows[:, None].to(tl.int32), place)
    most = largest(best)[None, :]
    at_most = (best == most) | ((best != best) & (most != most))
    first = tl.min(tl.where(at_most, place, 2147483647), axis=0)
    tl.store(places + sequence * columns + column, first, mask=column < columns)


@triton.jit(do_not_specialize=_COUNTS)
def vector_gradient_kernel(
    vector_grad,
    scales,
    shifts,
    grad,
    pooled,
    cu_seqlens,
    weights,
    total,
    columns,
    m,
    grad_sequence_stride,
    grad_place_stride,
    grad_column_stride,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    POWER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What the rows of one vector need: its gradient before normalisation, and how its weights enter theirs."""
    vector = tl.program_id(0).to(tl.int64)
    sequence, place = (tl.program_id(0) // m).to(tl.int64), (tl.program_id(0) % m).to(tl.int64)
    from_grad = grad + sequence * grad_sequence_stride + place * grad_place_stride
    squares = tl.zeros([COLUMNS], tl.float32)
    products = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = column < columns
        g = widen(tl.load(from_grad + column * grad_column_stride, mask=inside, other=0))
        v = tl.load(pooled + vector * columns + column, mask=inside, other=0)
        squares += v * v
        products += v * g
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    along = tl.sum(products, axis=0)
    if NORMALIZE:
        # at or below the smallest norm the vector was divided by a constant
        divided = norm > NORM_EPS
        inverse = 1.0 / tl.where(divided, norm, NORM_EPS)
        # the normalised vector's share of the gradient is removed
        along_unit = tl.where(divided, along * inverse * inverse, 0.0)
        along_after = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, columns, COLUMNS):
            column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
            inside = column < columns
            g = widen(tl.load(from_grad + column * grad_column_stride, mask=inside, other=0))
            v = tl.load(pooled + vector * columns + column, mask=inside, other=0)
            g = (g - tl.where(divided, along_unit * v, 0.0)) * inverse
            along_after += v * g
            tl.store(vector_grad + vector * columns + column, g, mask=inside)
        along = tl.sum(along_after, axis=0)
    if WEIGHTS == "given":
        start, end = vector_rows(cu_seqlens, vector, total, m, MODE)
        weight_sum = sum_weights(weights, start, end, WEIGHTS).to(tl.float32)
        shift = tl.where(weight_sum == 0, 0.0, POWER * along / tl.where(weight_sum == 0, 1.0, weight_sum))
        tl.store(scales + vector, row_scale(weights, start, end, MODE, WEIGHTS, POWER))
        tl.store(shifts + vector, shift)


@triton.jit
def _row_takes(
    rows, start, end, covered, scales, sequence, m, MODE: tl.constexpr, WEIGHTS: tl.constexpr, POWER: tl.constexpr
):
    """For rows of sequences [start, end): whether a gradient reaches each, of which place of m, and times what."""
    taken = covered
    place = tl.zeros_like(rows)
    factor = tl.where(covered, 1.0, 0.0)
    if MODE == "sum":
        if WEIGHTS == "given":
            factor = tl.load(scales + sequence, mask=covered, other=0)
        else:
            factor = row_scale(scales, start, end, MODE, WEIGHTS, POWER)
        taken = covered & (factor != 0)
    elif MODE == "first_m":
        place = rows - start
        taken = covered & (place < m)
    elif MODE == "last":
        taken = covered & (rows == end - 1)
    return taken, place, factor


@triton.jit(do_not_specialize=_COUNTS)
def row_gradient_kernel(
    out,
    grad_weights,
    grad,
    hidden,
    places,
    cu_seqlens,
    weights,
    scales,
    shifts,
    total,
    sequences,
    dim,
    columns,
    m,
    row_stride,
    grad_sequence_stride,
    grad_place_stride,
    grad_column_stride,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    POWER: tl.constexpr,
    LEARN: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of a block of rows, whichever sequences they are in, and of their weights."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sequence = first_above(cu_seqlens, sequences + 1, rows, STEPS) - 1
    covered = (rows < total) & (sequence >= 0) & (sequence < sequences)
    sequence = tl.where(covered, sequence, 0)
    start = tl.maximum(tl.load(cu_seqlens + sequence, mask=covered, other=0), 0).to(tl.int64)
    end = tl.minimum(tl.load(cu_seqlens + sequence + 1, mask=covered, other=0), total).to(tl.int64)
    taken, place, scale = _row_takes(rows, start, end, covered, scales, sequence, m, MODE, WEIGHTS, POWER)
    factor = scale
    if WEIGHTS != "none":
        factor = scale * row_weights(weights, rows, start, covered, WEIGHTS)
    from_grad = grad + sequence * grad_sequence_stride + place * grad_place_stride
    along = tl.zeros([ROWS], tl.float32)
    for first in range(0, dim, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = taken[:, None] & (column < columns)[None, :]
        g = widen(tl.load(from_grad[:, None] + (column * grad_column_stride)[None, :], mask=inside, other=0))
        if MODE == "max":
            place_at = places + (sequence * columns)[:, None] + column[None, :]
            g = tl.where(tl.load(place_at, mask=inside, other=-1) == rows[:, None], g, 0.0)
        if LEARN:
            x = widen(tl.load(hidden + (rows * row_stride)[:, None] + column[None, :], mask=inside, other=0))
            along += tl.sum(x * g, axis=1)
        value = tl.where(inside, g * factor[:, None], 0.0)
        written = (rows < total)[:, None] & (column < dim)[None, :]
        tl.store(out + (rows * dim)[:, None] + column[None, :], round_to(value, out.dtype.element_ty), mask=written)
    if LEARN:
        shift = tl.load(shifts + sequence, mask=taken, other=0)
        tl.store(grad_weights + rows, tl.where(taken, along * scale - shift, 0.0), mask=rows < total)


@triton.jit(do_not_specialize=_COUNTS)
def scale_kernel(scales, cu_seqlens, weights, total, MODE: tl.constexpr, WEIGHTS: tl.constexpr, POWER: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    start, end = sequence_rows(cu_seqlens, sequence, total)
    tl.store(scales + sequence, row_scale(weights, start, end, MODE, WEIGHTS, POWER))
