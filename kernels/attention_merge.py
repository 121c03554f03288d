"""Triton kernels of merge_attention and its gradient; `attention` launches them."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from ._support import widen
from .attention_forward import load_rows, store_rows


@triton.jit
def _log_of_sum(lse_a, lse_b):
    """ln(exp(a) + exp(b)) and the shares of a and b; −inf and shares of 0 where both are −inf."""
    most, least = tl.maximum(lse_a, lse_b), tl.minimum(lse_a, lse_b)
    empty = most == float("-inf")
    ratio = tl.where(empty, 0.0, tl.exp(tl.where(empty, 0.0, least - most)))
    ratio = tl.where((lse_a != lse_a) | (lse_b != lse_b), float("nan"), ratio)
    grown = 1 + ratio
    # ln(1 + ratio) without the rounding of 1 + ratio (Kahan)
    rest = tl.where(grown == 1, ratio, tl.log(grown) * (ratio / tl.where(grown == 1, 1.0, grown - 1)))
    larger, smaller = tl.where(empty, 0.0, 1 / grown), ratio / grown
    a_larger = lse_a >= lse_b
    return most + rest, tl.where(a_larger, larger, smaller), tl.where(a_larger, smaller, larger)


@triton.jit
def _shared(share, rows):
    # a side without keys counts 0 whatever stands in its rows
    return tl.where((share == 0)[:, None], 0.0, rows * share[:, None])


@triton.jit(do_not_specialize=("total",))
def merge_kernel(
    out,
    lse,
    out_a,
    lse_a,
    out_b,
    lse_b,
    total,
    a_row,
    a_head,
    b_row,
    b_head,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [total, heads, DIM] and lse [heads, total], contiguous as lse_a and lse_b: ROWS rows of one head."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = rows < total
    at = head * total + rows
    a, b = tl.load(lse_a + at, mask=inside, other=0), tl.load(lse_b + at, mask=inside, other=0)
    merged, share_a, share_b = _log_of_sum(a, b)
    rows_a = widen(load_rows(out_a + head * a_head, rows, a_row, inside, DIM, COLUMNS))
    rows_b = widen(load_rows(out_b + head * b_head, rows, b_row, inside, DIM, COLUMNS))
    values = _shared(share_a, rows_a) + _shared(share_b, rows_b)
    store_rows(out + head * DIM, rows, heads.to(tl.int64) * DIM, values, inside, DIM, COLUMNS)
    tl.store(lse + at, merged, mask=inside)


@triton.jit(do_not_specialize=("total",))
def merge_gradient_kernel(
    grad_a,
    grad_lse_a,
    grad_b,
    grad_lse_b,
    grad_out,
    grad_lse,
    out_a,
    lse_a,
    out_b,
    lse_b,
    total,
    grad_row,
    grad_head,
    a_row,
    a_head,
    b_row,
    b_head,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = rows < total
    at = head * total + rows
    a, b = tl.load(lse_a + at, mask=inside, other=0), tl.load(lse_b + at, mask=inside, other=0)
    _, share_a, share_b = _log_of_sum(a, b)
    rows_a = widen(load_rows(out_a + head * a_head, rows, a_row, inside, DIM, COLUMNS))
    rows_b = widen(load_rows(out_b + head * b_head, rows, b_row, inside, DIM, COLUMNS))
    grad = widen(load_rows(grad_out + head * grad_head, rows, grad_row, inside, DIM, COLUMNS))
    width = heads.to(tl.int64) * DIM
    store_rows(grad_a + head * DIM, rows, width, _shared(share_a, grad), inside, DIM, COLUMNS)
    store_rows(grad_b + head * DIM, rows, width, _shared(share_b, grad), inside, DIM, COLUMNS)
    # the shares add up to 1, so what one gains the other loses
    both = share_a * share_b
    moved = tl.where(both == 0, 0.0, both * tl.sum(grad * (rows_a - rows_b), axis=1))
    through_a, through_b = moved, -moved
    if grad_lse is not None:
        gain = tl.load(grad_lse + at, mask=inside, other=0)
        through_a += tl.where(share_a == 0, 0.0, gain * share_a)
        through_b += tl.where(share_b == 0, 0.0, gain * share_b)
    tl.store(grad_lse_a + at, through_a, mask=inside)
    tl.store(grad_lse_b + at, through_b, mask=inside)
