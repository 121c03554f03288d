"""Triton kernels of the norm family: a few whole rows a program, and their launchers."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._support import ceil_div, contiguous, dense_rows, on_device_of, processors, require_device, round_to, widen
from .token_prepend import Copies, copies_of, copy_rows_kernel, places_of

# ---- shapes ----

_TILE = 2048  # values that a program holds, where a row is not longer
_VALUES_PER_THREAD = {"forward": 16, "backward": 8}  # of a tile; the backward keeps six tiles in registers
_PROGRAMS_PER_PROCESSOR = 2
_MOST_STEPS = 32  # tiles that one sum of the backward runs over: the roundings of a long sum stay small
_MOST_COLUMNS = 512  # of a tile where rows are copied, not normed


def _shape(width: int, kind: str) -> dict[str, int]:
    """Tile and warps of a program: narrow rows share one, wide ones get more warps."""
    columns = triton.next_power_of_2(width)
    rows = max(_TILE // columns, 1)
    warps = rows * columns // (32 * _VALUES_PER_THREAD[kind])
    # with 32 warps a thread would have 64 registers
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(max(warps, 4), 16)}


def _copy_shape(total: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile where rows are copied."""
    columns = min(triton.next_power_of_2(width), _MOST_COLUMNS)
    rows = _TILE // columns
    return (ceil_div(total, rows), ceil_div(width, columns)), {"ROWS": rows, "COLUMNS": columns}


# ---- kernels ----


@triton.jit
def _load_rows(rows, stride, row, column, inside):
    """A tile as float32; ``row`` is int64, so that its product with the stride is."""
    return widen(tl.load(rows + (row * stride)[:, None] + column[None, :], mask=inside, other=0))


@triton.jit
def _load_vector(vector, column, columns, MORE: tl.constexpr):
    """weight or bias as float32 [1, COLUMNS], plus 1 with MORE."""
    value = widen(tl.load(vector + column, mask=column < columns, other=0))[None, :]
    if MORE:
        value += 1
    return value


@triton.jit
def _normal(x, inside, columns, eps, CENTRED: tl.constexpr):
    """The rows less their mean (layer norm), and what they are multiplied by; float32."""
    count = tl.zeros([x.shape[0]], tl.float32) + columns
    if CENTRED:
        # centred before it is squared: the mean square less the squared mean cancels
        x = tl.where(inside, x - tl.div_rn(tl.sum(x, axis=1), count)[:, None], 0.0)
    variance = tl.div_rn(tl.sum(x * x, axis=1), count)
    return x, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]


@triton.jit
def _gradient(h, n, scale, columns, CENTRED: tl.constexpr):
    """scale (h - mean(h) - n mean(h n)), the first mean for layer norm alone; float32."""
    count = tl.zeros([h.shape[0]], tl.float32) + columns
    value = h - n * tl.div_rn(tl.sum(h * n, axis=1), count)[:, None]
    if CENTRED:
        value -= tl.div_rn(tl.sum(h, axis=1), count)[:, None]
    return value * scale


@triton.jit(do_not_specialize=("total",))
def norm_kernel(
    normed,
    summed,
    x,
    residual,
    places,
    weight,
    bias,
    total,
    columns,
    x_stride,
    residual_stride,
    eps,
    CENTRED: tl.constexpr,
    MORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """normed and, where it is not x, summed; both contiguous. MORE multiplies by 1 + weight.

    With ``places``, row r of both is of the rows there, not of row r.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < total)[:, None] & (column < columns)[None, :]
    at = (row * columns)[:, None] + column[None, :]
    place = row
    if places is not None:
        place = tl.load(places + row, mask=row < total, other=0)
    value = _load_rows(x, x_stride, place, column, inside)
    if residual is not None:
        value += _load_rows(residual, residual_stride, place, column, inside)
    if summed is not None:
        rounded = round_to(value, summed.dtype.element_ty)
        tl.store(summed + at, rounded, mask=inside)
        value = widen(rounded)
    value, scale = _normal(value, inside, columns, eps, CENTRED)
    value = value * scale * _load_vector(weight, column, columns, MORE)
    if bias is not None:
        value += _load_vector(bias, column, columns, False)
    tl.store(normed + at, round_to(value, normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("total", "steps"))
def norm_gradient_kernel(
    grad_x,
    weight_sums,
    bias_sums,
    grad,
    grad_summed,
    summed,
    weight,
    total,
    columns,
    steps,
    grad_stride,
    grad_summed_stride,
    summed_stride,
    eps,
    CENTRED: tl.constexpr,
    MORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_x of ``steps`` tiles of rows, and what they add to the gradients of weight and bias.

    With n the row less its mean, times its scale, and h = weight * grad, grad_x is that of `_gradient`.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    weight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < total)[:, None] & (column < columns)[None, :]
        n, scale = _normal(_load_rows(summed, summed_stride, row, column, inside), inside, columns, eps, CENTRED)
        # without eps a row past the end, all zeros, would be NaN
        n = tl.where(inside, n * scale, 0.0)
        g = _load_rows(grad, grad_stride, row, column, inside)
        weight_sum += g * n
        if bias_sums is not None:
            bias_sum += g
        # read again from the cache: held, the registers would not last
        h = g * _load_vector(weight, column, columns, MORE)
        value = _gradient(h, n, scale, columns, CENTRED)
        if grad_summed is not None:
            value += _load_rows(grad_summed, grad_summed_stride, row, column, inside)
        at = grad_x + (row * columns)[:, None] + column[None, :]
        tl.store(at, round_to(value, grad_x.dtype.element_ty), mask=inside)
    at = program * columns + column
    tl.store(weight_sums + at, tl.sum(weight_sum, axis=0), mask=column < columns)
    if bias_sums is not None:
        tl.store(bias_sums + at, tl.sum(bias_sum, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=("total",))
def return_gradients_kernel(
    grad_x,
    grad,
    grad_summed,
    summed,
    weight,
    sources,
    targets,
    places,
    first,
    past,
    total,
    columns,
    grad_stride,
    grad_summed_stride,
    summed_stride,
    eps,
    MORE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What one copy changes in ``grad_x``, which holds the gradient of the rows after the copies.

    The first copy of a source writes the sum over all rows that hold it now, formed anew so that it is rounded once;
    every copy clears its target, unless that is a source. Without ``summed``, ``grad`` is of the rows, not of the norm.
    """
    copy = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    source, target = tl.load(sources + copy), tl.load(targets + copy)
    exists = (source >= 0) & (source < total)
    leads = exists & (tl.load(first + source, mask=exists, other=-1) == copy)
    kept = tl.load(places + source, mask=leads, other=-1) == source
    end = tl.load(past + source, mask=leads, other=-1)
    value = tl.zeros([1, COLUMNS], tl.float32)
    # the row itself, unless another has been copied over it; then its copies, but for one onto itself
    for step in range(-1, tl.max(end - copy, axis=0)):
        holder = tl.load(targets + copy + tl.maximum(step, 0))
        holder = tl.where(step < 0, tl.where(kept, source, -1), tl.where(holder == source, -1, holder))
        holds = ((holder >= 0) & (holder < total))[:, None]
        there = inside & holds
        g = _load_rows(grad, grad_stride, holder, column, there)
        if summed is not None:
            n, scale = _normal(_load_rows(summed, summed_stride, holder, column, there), there, columns, eps, False)
            # without eps a row that is not there, all zeros, would be NaN
            scale = tl.where(holds, scale, 0.0)
            g = _gradient(g * _load_vector(weight, column, columns, MORE), n * scale, scale, columns, False)
        value += g
        if grad_summed is not None:
            value += _load_rows(grad_summed, grad_summed_stride, holder, column, there)
    at = grad_x + (source * columns)[:, None] + column[None, :]
    rounded = round_to(value, grad_x.dtype.element_ty)
    tl.store(at, rounded, mask=inside & leads[:, None])
    cleared = exists & (target >= 0) & (target < total)
    cleared = cleared & (tl.load(past + target, mask=cleared, other=1) == 0)
    at = grad_x + (target * columns)[:, None] + column[None, :]
    tl.store(at, tl.zeros_like(rounded), mask=inside & cleared[:, None])


# ---- launchers ----


def _forward(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    places: Tensor | None = None,
    **options: bool,
) -> tuple[Tensor, Tensor]:
    require_device(op, x)
    is_x = residual is None and places is None
    normed, summed = x.new_empty(x.shape), x.new_empty(0 if is_x else x.shape)
    if x.numel() == 0:
        return normed, summed
    x, residual = dense_rows(x), None if residual is None else dense_rows(residual)
    shape = _shape(x.shape[1], "forward")
    with on_device_of(x):
        norm_kernel[(ceil_div(x.shape[0], shape["ROWS"]),)](
            normed,
            None if is_x else summed,
            x,
            residual,
            places,
            weight.contiguous(),
            contiguous(bias),
            *x.shape,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            **options,
            **shape,
        )
    return normed, summed


def _backward(
    op: str,
    grad: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    **options: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require_device(op, summed)
    (total, columns), grad_x = summed.shape, summed.new_empty(summed.shape)
    if summed.numel() == 0:
        zeros = summed.new_zeros(columns, dtype=torch.float32)
        return grad_x, zeros, torch.zeros_like(zeros[: 0 if bias is None else None])
    grad, summed = dense_rows(grad), dense_rows(summed)
    grad_summed = None if grad_summed is None else dense_rows(grad_summed)
    shape = _shape(columns, "backward")
    tiles = ceil_div(total, shape["ROWS"])
    steps = min(ceil_div(tiles, _PROGRAMS_PER_PROCESSOR * processors(summed)), _MOST_STEPS)
    # a program writes its own sums, added up afterwards: the same bits in every run
    programs = ceil_div(tiles, steps)
    weight_sums = summed.new_empty((programs, columns), dtype=torch.float32)
    bias_sums = None if bias is None else torch.empty_like(weight_sums)
    with on_device_of(summed):
        norm_gradient_kernel[(programs,)](
            grad_x,
            weight_sums,
            bias_sums,
            grad,
            grad_summed,
            summed,
            weight.contiguous(),
            total,
            columns,
            steps,
            grad.stride(0),
            0 if grad_summed is None else grad_summed.stride(0),
            summed.stride(0),
            eps,
            **options,
            **shape,
        )
    return grad_x, weight_sums.sum(0), weight_sums.new_empty(0) if bias_sums is None else bias_sums.sum(0)


def _return_gradients(
    grad_x: Tensor,
    grad: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor | None,
    weight: Tensor | None,
    copies: Copies,
    eps: float,
    one_plus_weight: bool,
) -> None:
    count, (total, columns) = copies.sources.shape[0], grad_x.shape
    if count == 0:
        return
    rows = [None if tensor is None else dense_rows(tensor) for tensor in (grad, grad_summed, summed)]
    # a norm is of whole rows; with the backward's warps a thread would have too few registers for its part of one
    block = triton.next_power_of_2(columns) if summed is not None else min(triton.next_power_of_2(columns), _TILE)
    with on_device_of(grad_x):
        return_gradients_kernel[(count, ceil_div(columns, block))](
            grad_x,
            *rows,
            contiguous(weight),
            *copies,
            total,
            columns,
            *(0 if tensor is None else tensor.stride(0) for tensor in rows),
            eps,
            MORE=one_plus_weight,
            COLUMNS=block,
            num_warps=min(max(block // (32 * _VALUES_PER_THREAD["forward"]), 4), 16),
        )


def add_rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, one_plus_weight: bool = False
) -> tuple[Tensor, Tensor]:
    return _forward("add_rms_norm", x, residual, weight, None, eps, CENTRED=False, MORE=one_plus_weight)


def add_rms_norm_backward_triton(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    eps: float,
    one_plus_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _backward(
        *("add_rms_norm_backward", grad_normed, grad_summed, summed, weight, None, eps),
        CENTRED=False,
        MORE=one_plus_weight,
    )[:2]


def add_layer_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    return _forward("add_layer_norm", x, residual, weight, bias, eps, CENTRED=True, MORE=False)


def add_layer_norm_backward_triton(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "add_layer_norm_backward"
    return _backward(op, grad_normed, grad_summed, summed, weight, bias, eps, CENTRED=True, MORE=False)


def token_prepend_triton(hidden: Tensor, source_rows: Tensor, target_rows: Tensor) -> Tensor:
    require_device("token_prepend", hidden)
    out = hidden.new_empty(hidden.shape)
    if hidden.numel() == 0:
        return out
    hidden, places = dense_rows(hidden), places_of(source_rows, target_rows, hidden.shape[0])
    grid, shape = _copy_shape(*hidden.shape)
    with on_device_of(hidden):
        copy_rows_kernel[grid](out, hidden, places, *hidden.shape, hidden.stride(0), **shape)
    return out


def token_prepend_backward_triton(grad: Tensor, source_rows: Tensor, target_rows: Tensor) -> Tensor:
    require_device("token_prepend_backward", grad)
    out = grad.new_empty(grad.shape)
    if grad.numel() == 0:
        return out
    out.copy_(grad)
    copies = copies_of(source_rows, target_rows, grad.shape[0])
    _return_gradients(out, grad, None, None, None, copies, 0.0, False)
    return out


def token_prepend_rms_norm_triton(
    x: Tensor,
    residual: Tensor | None,
    source_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    one_plus_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    op = "token_prepend_rms_norm"
    require_device(op, x)
    places = places_of(source_rows, target_rows, x.shape[0])
    return _forward(op, x, residual, weight, None, eps, places, CENTRED=False, MORE=one_plus_weight)


def token_prepend_rms_norm_backward_triton(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    source_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor,
    eps: float,
    one_plus_weight: bool,
) -> tuple[Tensor, Tensor]:
    op = "token_prepend_rms_norm_backward"
    require_device(op, summed)
    found = _backward(op, grad_normed, grad_summed, summed, weight, None, eps, CENTRED=False, MORE=one_plus_weight)
    if summed.numel():
        copies = copies_of(source_rows, target_rows, summed.shape[0])
        _return_gradients(found[0], grad_normed, grad_summed, summed, weight, copies, eps, one_plus_weight)
    return found[:2]
