"""Triton kernels of anchor_attention and its backward; `anchor_scores` launches them.

Programs have passages of one query and one view, so that what is not finite stays there. Sums over passages run within
one program: the same bits in every run. Every kernel is in bounds for any values of the offsets.
"""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from ._support import round_to, span_of_program
from .attention_forward import multiply_add
from .pooling_forward import sequence_rows

# sizes that would only make more variants of a kernel
COUNTS = ("total", "query_count", "view_count", "heads", "head_blocks", "column_blocks")


# ---- what passages a program has ----


@triton.jit
def passages_of_program(cu_passages, program, query_count, total, SPAN: tl.constexpr, STEPS: tl.constexpr):
    """Query and span of a program, and its passages [first, last): at most SPAN, of that query."""
    query, span = span_of_program(cu_passages, program, query_count, total, SPAN, STEPS)
    first, last = sequence_rows(cu_passages, tl.maximum(query, 0), total)
    first = first + span.to(tl.int64) * SPAN
    last = tl.where(query < 0, first, tl.minimum(first + SPAN, last))
    return query.to(tl.int64), span, first, last


@triton.jit
def load_tile(base, rows, stride, inside, column, DIM: tl.constexpr):
    """Columns of rows (int64), 0 outside."""
    mask = inside[:, None] & (column < DIM)[None, :]
    return tl.load(base + (rows * stride)[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def next_weights(scores, most, sums):
    """Weights of a softmax's next scores, the highest score and the sum up to there, what earlier sums shrink by."""
    higher = tl.maximum(most, tl.max(scores, axis=1))
    # what has seen nothing but −inf yet must not compute −inf − −inf
    level = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(scores - level[:, None])
    decay = tl.exp(most - level)
    return weights, higher, sums * decay + tl.sum(weights, axis=1), decay


# ---- all of it in one pass ----


@triton.jit(do_not_specialize=COUNTS)
def anchor_attention_kernel(
    out,
    views,
    queries,
    cu_passages,
    total,
    view_count,
    heads,
    head_blocks,
    passage_stride,
    view_stride,
    query_stride,
    query_view_stride,
    head_stride,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PASSAGES: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [Q, m, H, DIM], contiguous: HEADS heads of one query and view; each view is read once.

    A row of a view is PARTS parts of COLUMNS, and a product one for each part: a warp's part of the views is what it
    multiplies both times.
    """
    head = (tl.program_id(0) % head_blocks).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    place = (tl.program_id(0) // head_blocks).to(tl.int64)
    query, view = place // view_count, place % view_count
    first, last = sequence_rows(cu_passages, query, total)
    column = (tl.arange(0, PARTS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])[:, None, :]
    inside = (head < heads)[None, :, None] & (column < DIM)
    at = queries + query * query_stride + view * query_view_stride + (head * head_stride)[None, :, None] + column
    own = tl.load(at, mask=inside, other=0)
    most = tl.full([HEADS], float("-inf"), tl.float32)
    sums = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([PARTS, HEADS, COLUMNS], tl.float32)
    for start in range(first, last, PASSAGES):
        passage = start + tl.arange(0, PASSAGES)
        at = views + view * view_stride + (passage * passage_stride)[None, :, None] + column
        tile = tl.load(at, mask=(passage < last)[None, :, None] & (column < DIM), other=0)
        products = multiply_add(own, tl.permute(tile, (0, 2, 1)), tl.zeros([PARTS, HEADS, PASSAGES], tl.float32))
        scores = tl.where((passage < last)[None, :], tl.sum(products, axis=0), float("-inf"))
        weights, most, sums, decay = next_weights(scores, most, sums)
        weights = tl.broadcast_to(round_to(weights, views.dtype.element_ty)[None, :, :], [PARTS, HEADS, PASSAGES])
        mixed = multiply_add(weights, tile, mixed * decay[None, :, None])
    mixed = mixed / tl.where((head < heads) & (first < last), sums, 1.0)[None, :, None]
    at = out + ((place * heads + head) * DIM)[None, :, None] + column
    tl.store(at, round_to(mixed, out.dtype.element_ty), mask=inside)


# ---- products of heads and views ----


@triton.jit(do_not_specialize=COUNTS)
def products_kernel(
    scores,
    slopes,
    views,
    queries,
    grad,
    cu_passages,
    total,
    query_count,
    view_count,
    heads,
    head_blocks,
    passage_stride,
    view_stride,
    query_stride,
    query_view_stride,
    head_stride,
    grad_stride,
    grad_view_stride,
    grad_head_stride,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PASSAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """float32 [m, H, P]: ``scores``, queries · views, and where ``grad`` is given ``slopes``, grad · views."""
    head = (tl.program_id(0) % head_blocks).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    program = tl.program_id(0) // head_blocks
    view = (program % view_count).to(tl.int64)
    query, _, first, last = passages_of_program(cu_passages, program // view_count, query_count, total, PASSAGES, STEPS)
    if first < last:
        passage = first + tl.arange(0, PASSAGES)
        own_views = views + view * view_stride
        own_queries = queries + query * query_stride + view * query_view_stride
        score = tl.zeros([HEADS, PASSAGES], tl.float32)
        slope = tl.zeros([HEADS, PASSAGES], tl.float32)
        for start in range(0, DIM, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            tile = tl.trans(load_tile(own_views, passage, passage_stride, passage < last, column, DIM))
            score = multiply_add(load_tile(own_queries, head, head_stride, head < heads, column, DIM), tile, score)
            if grad is not None:
                own_grad = grad + query * grad_stride + view * grad_view_stride
                slope = multiply_add(
                    load_tile(own_grad, head, grad_head_stride, head < heads, column, DIM), tile, slope
                )
        at = ((view * heads + head) * total)[:, None] + passage[None, :]
        inside = (head < heads)[:, None] & (passage < last)[None, :]
        tl.store(scores + at, score, mask=inside)
        if grad is not None:
            tl.store(slopes + at, slope, mask=inside)


# ---- weighted sums of views ----


@triton.jit(do_not_specialize=COUNTS)
def mix_kernel(
    out,
    weights,
    views,
    cu_passages,
    total,
    view_count,
    heads,
    head_blocks,
    column_blocks,
    passage_stride,
    view_stride,
    SOFTMAX: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PASSAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [Q, m, H, DIM], contiguous: views weighted by weights [m, H, P], or by the softmax of these."""
    program = tl.program_id(0)
    column = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    program = program // column_blocks
    head = (program % head_blocks).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    place = (program // head_blocks).to(tl.int64)
    view = place % view_count
    first, last = sequence_rows(cu_passages, place // view_count, total)
    most = tl.full([HEADS], float("-inf"), tl.float32)
    sums = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, COLUMNS], tl.float32)
    for start in range(first, last, PASSAGES):
        passage = start + tl.arange(0, PASSAGES)
        inside = (head < heads)[:, None] & (passage < last)[None, :]
        at = weights + ((view * heads + head) * total)[:, None] + passage[None, :]
        weight = tl.load(at, mask=inside, other=float("-inf") if SOFTMAX else 0.0)
        if SOFTMAX:
            weight, most, sums, decay = next_weights(weight, most, sums)
            mixed = mixed * decay[:, None]
        tile = load_tile(views + view * view_stride, passage, passage_stride, passage < last, column, DIM)
        mixed = multiply_add(round_to(weight, views.dtype.element_ty), tile, mixed)
    if SOFTMAX:
        mixed = mixed / tl.where((head < heads) & (first < last), sums, 1.0)[:, None]
    at = out + ((place * heads + head) * DIM)[:, None] + column[None, :]
    inside = (head < heads)[:, None] & (column < DIM)[None, :]
    tl.store(at, round_to(mixed, out.dtype.element_ty), mask=inside)


# ---- gradients ----


@triton.jit(do_not_specialize=COUNTS)
def weights_kernel(scores, slopes, cu_passages, total, view_count, heads, PASSAGES: tl.constexpr):
    """In place, of one query, view and head: scores become weights p, slopes p (slope - sum of p slope)."""
    line = tl.program_id(0).to(tl.int64) % (view_count * heads)
    first, last = sequence_rows(cu_passages, tl.program_id(0) // (view_count * heads), total)
    if first == last:
        return
    scores += line * total
    slopes += line * total
    most = tl.full([PASSAGES], float("-inf"), tl.float32)
    for start in range(first, last, PASSAGES):
        passage = start + tl.arange(0, PASSAGES)
        most = tl.maximum(most, tl.load(scores + passage, mask=passage < last, other=float("-inf")))
    level = tl.max(most, axis=0)
    sums = tl.zeros([PASSAGES], tl.float32)
    products = tl.zeros([PASSAGES], tl.float32)
    for start in range(first, last, PASSAGES):
        passage = start + tl.arange(0, PASSAGES)
        power = tl.exp(tl.load(scores + passage, mask=passage < last, other=float("-inf")) - level)
        sums += power
        products += power * tl.load(slopes + passage, mask=passage < last, other=0)
    scale = tl.div_rn(1.0, tl.sum(sums, axis=0))
    mean = tl.sum(products, axis=0) * scale
    for start in range(first, last, PASSAGES):
        passage = start + tl.arange(0, PASSAGES)
        weight = tl.exp(tl.load(scores + passage, mask=passage < last, other=float("-inf")) - level) * scale
        slope = tl.load(slopes + passage, mask=passage < last, other=0)
        tl.store(scores + passage, weight, mask=passage < last)
        tl.store(slopes + passage, weight * (slope - mean), mask=passage < last)


@triton.jit(do_not_specialize=COUNTS)
def view_gradient_kernel(
    grad_views,
    weights,
    slopes,
    queries,
    grad,
    cu_passages,
    total,
    query_count,
    view_count,
    heads,
    column_blocks,
    query_stride,
    query_view_stride,
    head_stride,
    grad_stride,
    grad_view_stride,
    grad_head_stride,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PASSAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """grad_views [P, m, DIM], contiguous: a block of columns of the passages of a span, from all heads."""
    column = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(0) // column_blocks
    view = (program % view_count).to(tl.int64)
    query, _, first, last = passages_of_program(cu_passages, program // view_count, query_count, total, PASSAGES, STEPS)
    if first < last:
        passage = first + tl.arange(0, PASSAGES)
        inside = passage < last
        own_queries = queries + query * query_stride + view * query_view_stride
        own_grad = grad + query * grad_stride + view * grad_view_stride
        found = tl.zeros([PASSAGES, COLUMNS], tl.float32)
        for block in range(0, heads, HEADS):
            head = (block + tl.arange(0, HEADS)).to(tl.int64)
            at = ((view * heads + head) * total)[None, :] + passage[:, None]
            mask = inside[:, None] & (head < heads)[None, :]
            weight = round_to(tl.load(weights + at, mask=mask, other=0), grad.dtype.element_ty)
            slope = round_to(tl.load(slopes + at, mask=mask, other=0), grad.dtype.element_ty)
            found = multiply_add(weight, load_tile(own_grad, head, grad_head_stride, head < heads, column, DIM), found)
            found = multiply_add(slope, load_tile(own_queries, head, head_stride, head < heads, column, DIM), found)
        at = grad_views + ((passage * view_count + view) * DIM)[:, None] + column[None, :]
        tl.store(at, round_to(found, grad_views.dtype.element_ty), mask=inside[:, None] & (column < DIM)[None, :])
