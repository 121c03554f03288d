"""Triton kernels of the latent attention family, and their launchers.

Offsets are data: nothing here reads them on the host, and every kernel is in bounds for any values of them.
"""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._support import (
    ceil_div,
    contiguous,
    dense_rows,
    first_above,
    on_device_of,
    require_device,
    round_to,
    search_steps,
    span_of_program,
    widen,
)
from .pooling_backward import scale_kernel
from .pooling_forward import row_scale, sequence_rows

# ---- shapes ----

_SOFTMAX_TILE = 2048  # scores that a program holds, where a group is not longer
_VALUES_PER_THREAD = 16  # of a tile of scores
_POOL_TILE, _GRADIENT_TILE = 2048, 1024  # values that a program holds, and as many gates
_MOST_COLUMNS = 128  # of either tile
#: rows of one program: a sequence of any length is cut into spans, so that it takes as many programs as it needs
_SPAN = 128
_JOINED_ROWS, _JOINED_COLUMNS = 16, 128  # tile of partial sums

# sizes that would only make more variants of a kernel
_COUNTS = ("total", "groups", "group_blocks", "sequences", "column_blocks")


# ---- softmax in groups ----


@triton.jit
def _groups_of_tile(total, groups, group_blocks, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Row and group, both int64, of the ROWS * GROUPS lines of a tile, and whether there are such."""
    program = tl.program_id(0)
    line = tl.arange(0, ROWS * GROUPS)
    row = (program // group_blocks).to(tl.int64) * ROWS + line // GROUPS
    group = (program % group_blocks).to(tl.int64) * GROUPS + line % GROUPS
    return row, group, (row < total) & (group < groups)


@triton.jit(do_not_specialize=_COUNTS)
def grouped_softmax_kernel(
    out,
    scores,
    total,
    groups,
    group_blocks,
    size,
    columns,
    row_stride,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, group, real = _groups_of_tile(total, groups, group_blocks, GROUPS, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = real[:, None] & (column < size)[None, :]
    place = (group * size)[:, None] + column[None, :]
    x = widen(tl.load(scores + (row * row_stride)[:, None] + place, mask=inside, other=float("-inf")))
    power = tl.exp(x - tl.max(x, axis=1)[:, None])
    value = power * tl.div_rn(1.0, tl.sum(power, axis=1))[:, None]
    tl.store(out + (row * columns)[:, None] + place, round_to(value, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def grouped_softmax_gradient_kernel(
    out,
    grad,
    probabilities,
    total,
    groups,
    group_blocks,
    size,
    columns,
    grad_stride,
    row_stride,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """p (grad - sum of grad p), the sum within a group."""
    row, group, real = _groups_of_tile(total, groups, group_blocks, GROUPS, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = real[:, None] & (column < size)[None, :]
    place = (group * size)[:, None] + column[None, :]
    g = widen(tl.load(grad + (row * grad_stride)[:, None] + place, mask=inside, other=0))
    p = widen(tl.load(probabilities + (row * row_stride)[:, None] + place, mask=inside, other=0))
    value = p * (g - tl.sum(g * p, axis=1)[:, None])
    tl.store(out + (row * columns)[:, None] + place, round_to(value, out.dtype.element_ty), mask=inside)


# ---- gated rows into means ----


@triton.jit
def _normal_distribution(x):
    """Φ(x): gelu(x) = x Φ(x)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _load_gated(hidden, bias, rows, row_stride, column, columns, inside):
    """Values and gates of a tile as float32, with their biases; ``rows`` is int64."""
    at = hidden + (rows * row_stride)[:, None] + column[None, :]
    value = widen(tl.load(at, mask=inside, other=0))
    gate = widen(tl.load(at + columns, mask=inside, other=0))
    if bias is not None:
        value += widen(tl.load(bias + column, mask=column < columns, other=0))[None, :]
        gate += widen(tl.load(bias + columns + column, mask=column < columns, other=0))[None, :]
    return value, gate


@triton.jit
def _parts_of(start, SPAN: tl.constexpr):
    """Where the partial sums of a sequence of several spans begin: those of two sequences never overlap."""
    return 2 * (start // SPAN)


@triton.jit
def _scaled_mean(summed, scale):
    # exactly 0 without weight, whatever the rows hold
    return tl.where(scale == 0, 0.0, summed) * scale


@triton.jit(do_not_specialize=_COUNTS)
def gated_pool_kernel(
    out,
    parts,
    hidden,
    bias,
    cu_seqlens,
    weights,
    total,
    sequences,
    row_stride,
    columns,
    column_blocks,
    WEIGHTS: tl.constexpr,
    SPAN: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of columns of one span: the mean itself of a sequence of one span, else a partial sum."""
    program = tl.program_id(0)
    column = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    sequence, span = span_of_program(cu_seqlens, program // column_blocks, sequences, total, SPAN, STEPS)
    if sequence >= 0:
        first, last = sequence_rows(cu_seqlens, sequence, total)
        start = first + span.to(tl.int64) * SPAN
        if start < last:
            end = tl.minimum(start + SPAN, last)
            summed = tl.zeros([ROWS, COLUMNS], tl.float32)
            for row in range(start, end, ROWS):
                rows = (row + tl.arange(0, ROWS)).to(tl.int64)
                inside = (rows < end)[:, None] & (column < columns)[None, :]
                value, gate = _load_gated(hidden, bias, rows, row_stride, column, columns, inside)
                value *= gate * _normal_distribution(gate)
                if WEIGHTS == "given":
                    value *= tl.load(weights + rows, mask=rows < end, other=0)[:, None]
                summed += tl.where(inside, value, 0.0)
            result = tl.sum(summed, axis=0)
            if last - first <= SPAN:
                result = _scaled_mean(result, row_scale(weights, first, last, "sum", WEIGHTS, 1.0))
                at = out + sequence.to(tl.int64) * columns + column
                tl.store(at, round_to(result, out.dtype.element_ty), mask=column < columns)
            else:
                tl.store(parts + (_parts_of(first, SPAN) + span) * columns + column, result, mask=column < columns)


@triton.jit(do_not_specialize=_COUNTS)
def join_spans_kernel(
    out,
    parts,
    cu_seqlens,
    weights,
    total,
    columns,
    column_blocks,
    WEIGHTS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Means of the sequences of several spans, from the partial sums, and of those without rows."""
    program = tl.program_id(0)
    column = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    sequence = (program // column_blocks).to(tl.int64)
    first, last = sequence_rows(cu_seqlens, sequence, total)
    if (last - first > SPAN) | (last == first):
        spans = (last - first + SPAN - 1) // SPAN
        summed = tl.zeros([ROWS, COLUMNS], tl.float32)
        for span in range(0, spans, ROWS):
            lane = span + tl.arange(0, ROWS)
            inside = (lane < spans)[:, None] & (column < columns)[None, :]
            at = parts + ((_parts_of(first, SPAN) + lane) * columns)[:, None] + column[None, :]
            summed += tl.load(at, mask=inside, other=0)
        scale = row_scale(weights, first, last, "sum", WEIGHTS, 1.0)
        result = _scaled_mean(tl.sum(summed, axis=0), scale)
        at = out + sequence * columns + column
        tl.store(at, round_to(result, out.dtype.element_ty), mask=column < columns)


# ---- their gradients ----


@triton.jit(do_not_specialize=_COUNTS)
def gated_gradient_kernel(
    grad_hidden,
    bias_sums,
    products,
    grad,
    hidden,
    bias,
    cu_seqlens,
    weights,
    scales,
    total,
    sequences,
    columns,
    column_blocks,
    row_stride,
    grad_row_stride,
    grad_column_stride,
    SPAN: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of columns of SPAN rows, whichever sequences they are in.

    Also what those columns add to each row's gradient of its weight, and those rows to the gradient of the bias:
    summed up afterwards, the same bits in every run.
    """
    block = tl.program_id(0) % column_blocks
    span = (tl.program_id(0) // column_blocks).to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    value_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    gate_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(span * SPAN, tl.minimum(span * SPAN + SPAN, total), ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        sequence = first_above(cu_seqlens, sequences + 1, rows, STEPS) - 1
        covered = (rows < total) & (sequence >= 0) & (sequence < sequences)
        scale = tl.load(scales + sequence, mask=covered, other=0)
        # a sequence without weight has no gradient, whatever its rows hold
        inside = (covered & (scale != 0))[:, None] & (column < columns)[None, :]
        from_grad = (sequence * grad_row_stride)[:, None] + (column.to(tl.int64) * grad_column_stride)[None, :]
        g = widen(tl.load(grad + from_grad, mask=inside, other=0)) * scale[:, None]
        value, gate = _load_gated(hidden, bias, rows, row_stride, column, columns, inside)
        distribution = _normal_distribution(gate)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        if products is not None:
            product = tl.sum(tl.where(inside, g * value * (gate * distribution), 0.0), axis=1)
            tl.store(products + block.to(tl.int64) * total + rows, product, mask=rows < total)
        if weights is not None:
            g *= tl.load(weights + rows, mask=covered, other=0)[:, None]
        of_value = tl.where(inside, g * (gate * distribution), 0.0)
        of_gate = tl.where(inside, g * value * (distribution + gate * density), 0.0)
        value_sums += of_value
        gate_sums += of_gate
        written = (rows < total)[:, None] & (column < columns)[None, :]
        at = grad_hidden + (rows * 2 * columns)[:, None] + column[None, :]
        tl.store(at, round_to(of_value, grad_hidden.dtype.element_ty), mask=written)
        tl.store(at + columns, round_to(of_gate, grad_hidden.dtype.element_ty), mask=written)
    at = bias_sums + span * 2 * columns + column
    tl.store(at, tl.sum(value_sums, axis=0), mask=column < columns)
    tl.store(at + columns, tl.sum(gate_sums, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=_COUNTS)
def weight_gradient_kernel(grad_weights, cu_seqlens, weights, scales, total, ROWS: tl.constexpr):
    """In place, from each weight's own product the gradient of the mean: less the weighted mean of them all."""
    sequence = tl.program_id(0).to(tl.int64)
    start, end = sequence_rows(cu_seqlens, sequence, total)
    sums = tl.zeros([ROWS], tl.float64)
    for row in range(start, end, ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        own = tl.load(grad_weights + rows, mask=rows < end, other=0).to(tl.float64)
        sums += own * tl.load(weights + rows, mask=rows < end, other=0).to(tl.float64)
    mean = (tl.sum(sums, axis=0) * tl.load(scales + sequence).to(tl.float64)).to(tl.float32)
    for row in range(start, end, ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        own = tl.load(grad_weights + rows, mask=rows < end, other=0)
        tl.store(grad_weights + rows, own - mean, mask=rows < end)


# ---- launchers ----


def _softmax_shape(groups: int, size: int) -> dict[str, int]:
    """Groups, rows and columns of a tile, and warps."""
    columns = triton.next_power_of_2(size)
    lines = max(_SOFTMAX_TILE // columns, 1)
    neighbours = min(triton.next_power_of_2(groups), lines)
    warps = lines * columns // (32 * _VALUES_PER_THREAD)
    return {
        "GROUPS": neighbours,
        "ROWS": lines // neighbours,
        "COLUMNS": columns,
        "num_warps": min(max(warps, 4), 16),
    }


def grouped_softmax_triton(scores: Tensor, groups: int) -> Tensor:
    require_device("grouped_softmax", scores)
    out = scores.new_empty(scores.shape)
    if out.numel() == 0:
        return out
    (total, columns), scores = scores.shape, dense_rows(scores)
    shape = _softmax_shape(groups, columns // groups)
    group_blocks = ceil_div(groups, shape["GROUPS"])
    with on_device_of(scores):
        grouped_softmax_kernel[(ceil_div(total, shape["ROWS"]) * group_blocks,)](
            out, scores, total, groups, group_blocks, columns // groups, columns, scores.stride(0), **shape
        )
    return out


def grouped_softmax_backward_triton(grad: Tensor, probabilities: Tensor, groups: int) -> Tensor:
    require_device("grouped_softmax_backward", probabilities)
    out = probabilities.new_empty(probabilities.shape)
    if out.numel() == 0:
        return out
    (total, columns), grad, probabilities = out.shape, dense_rows(grad), dense_rows(probabilities)
    shape = _softmax_shape(groups, columns // groups)
    group_blocks = ceil_div(groups, shape["GROUPS"])
    with on_device_of(probabilities):
        grouped_softmax_gradient_kernel[(ceil_div(total, shape["ROWS"]) * group_blocks,)](
            out,
            grad,
            probabilities,
            total,
            groups,
            group_blocks,
            columns // groups,
            columns,
            grad.stride(0),
            probabilities.stride(0),
            **shape,
        )
    return out


def _gated_shape(columns: int, tile: int) -> dict[str, int]:
    block = max(min(triton.next_power_of_2(columns), _MOST_COLUMNS), 8)
    # columns that cannot be loaded side by side want a register pair each for their addresses
    tile = tile if columns % 16 == 0 else tile // 4
    return {"SPAN": _SPAN, "ROWS": min(tile // block, _SPAN), "COLUMNS": block}


def geglu_segment_pool_triton(
    hidden: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    require_device("geglu_segment_pool", hidden)
    total, sequences, columns = hidden.shape[0], cu_seqlens.shape[0] - 1, hidden.shape[1] // 2
    out = hidden.new_empty((sequences, columns), dtype=out_dtype or hidden.dtype)
    if out.numel() == 0:
        return out
    hidden, cu_seqlens, weights = dense_rows(hidden), cu_seqlens.contiguous(), contiguous(weights)
    # only sequences longer than a span leave partial sums, so two for each span of all rows are enough
    parts = hidden.new_empty((2 * (total // _SPAN), columns), dtype=torch.float32)
    weighting = "none" if weights is None else "given"
    shape = _gated_shape(columns, _POOL_TILE)
    column_blocks = ceil_div(columns, shape["COLUMNS"])
    joined_blocks = ceil_div(columns, _JOINED_COLUMNS)
    with on_device_of(hidden):
        gated_pool_kernel[((total // _SPAN + sequences) * column_blocks,)](
            out,
            parts,
            hidden,
            contiguous(bias),
            cu_seqlens,
            weights,
            total,
            sequences,
            hidden.stride(0),
            columns,
            column_blocks,
            WEIGHTS=weighting,
            STEPS=search_steps(sequences),
            **shape,
        )
        join_spans_kernel[(sequences * joined_blocks,)](
            out,
            parts,
            cu_seqlens,
            weights,
            total,
            columns,
            joined_blocks,
            WEIGHTS=weighting,
            SPAN=_SPAN,
            ROWS=_JOINED_ROWS,
            COLUMNS=_JOINED_COLUMNS,
        )
    return out


def geglu_segment_pool_backward_triton(
    grad: Tensor, hidden: Tensor, bias: Tensor | None, cu_seqlens: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    require_device("geglu_segment_pool_backward", hidden)
    (total, width), sequences, columns = hidden.shape, cu_seqlens.shape[0] - 1, hidden.shape[1] // 2
    grad_hidden = hidden.new_empty(hidden.shape)
    if hidden.numel() == 0 or sequences == 0:
        zeros = hidden.new_zeros(width + (0 if weights is None else total), dtype=torch.float32)
        return grad_hidden.zero_(), zeros[:width].clone(), zeros[width:].clone()
    hidden, cu_seqlens, weights = dense_rows(hidden), cu_seqlens.contiguous(), contiguous(weights)
    shape = _gated_shape(columns, _GRADIENT_TILE)
    column_blocks, spans = ceil_div(columns, shape["COLUMNS"]), ceil_div(total, _SPAN)
    scales = grad_hidden.new_empty(sequences, dtype=torch.float32)
    bias_sums = scales.new_empty((spans, width))
    products = None if weights is None else scales.new_empty((column_blocks, total))
    weighting = "none" if weights is None else "given"
    with on_device_of(hidden):
        scale_kernel[(sequences,)](scales, cu_seqlens, weights, total, MODE="sum", WEIGHTS=weighting, POWER=1.0)
        gated_gradient_kernel[(spans * column_blocks,)](
            grad_hidden,
            bias_sums,
            products,
            grad,
            hidden,
            contiguous(bias),
            cu_seqlens,
            weights,
            scales,
            total,
            sequences,
            columns,
            column_blocks,
            hidden.stride(0),
            *grad.stride(),
            STEPS=search_steps(cu_seqlens.shape[0]),
            **shape,
        )
        grad_weights = scales.new_empty(0) if products is None else products.sum(0)
        if products is not None:
            weight_gradient_kernel[(sequences,)](grad_weights, cu_seqlens, weights, scales, total, ROWS=256)
    return grad_hidden, bias_sums.sum(0), grad_weights
