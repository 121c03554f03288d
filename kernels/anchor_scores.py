"""Triton kernels of the anchor scores family, and their launchers.

Offsets are data: nothing here reads them on the host, and every kernel is in bounds for any values of them.
"""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._support import ceil_div, dense_rows, on_device_of, processors, require_device, round_to, search_steps, widen
from .anchor_scores_attention import (
    COUNTS,
    anchor_attention_kernel,
    load_tile,
    mix_kernel,
    passages_of_program,
    products_kernel,
    view_gradient_kernel,
    weights_kernel,
)
from .pooling_forward import sequence_rows
from .rescore import order_key

# ---- shapes ----

_SCORE_TILE = 2048  # numbers of views that a program of anchor_scores multiplies at once
_SCORE_COLUMNS = 256
_MOST_VIEWS = 8  # of a passage, side by side in that tile
_RANKED, _COMPARED = 32, 64  # scores that a program ranks, and those that they meet at once
_GRADIENT_ROWS, _GRADIENT_COLUMNS = 32, 64  # tile of the gradient of scores
_WEIGHTS = 128  # of one head that a program forms at once
_HEADS = 16  # of a product: the fewest rows that tensor cores take
_ONE_PASS_DIM, _ONE_PASS_PARTS = 1024, 8  # widest view that is held whole, and in how many parts: one a warp


def _columns(views: Tensor, most: int) -> int:
    """Of a tile: those that cannot be loaded side by side want a register pair each for their addresses."""
    dim = views.shape[2]
    return min(triton.next_power_of_2(max(dim, 16)), most if dim % 16 == 0 else max(most // 4, 16))


def _score_shape(views: Tensor) -> dict[str, int]:
    """All views of a passage stand in one tile, where they are not too many."""
    columns, at_once = _columns(views, _SCORE_COLUMNS), min(triton.next_power_of_2(views.shape[1]), _MOST_VIEWS)
    return {
        "DIM": views.shape[2],
        "PASSAGES": min(_SCORE_TILE // (columns * at_once), 32),
        "VIEWS": at_once,
        "COLUMNS": columns,
    }


def _product_shape(views: Tensor) -> dict[str, int]:
    """float32 is multiplied in registers, everything else by tensor cores."""
    columns = _columns(views, 32 if views.dtype == torch.float32 else 128)
    return {"DIM": views.shape[2], "HEADS": _HEADS, "PASSAGES": 32, "COLUMNS": columns}


def _mix_shape(views: Tensor) -> dict[str, int]:
    narrow = views.dtype != torch.float32
    columns = _columns(views, 128 if narrow else 64)
    return {"DIM": views.shape[2], "HEADS": _HEADS, "PASSAGES": 32 if narrow else 16, "COLUMNS": columns}


def _one_pass_shape(views: Tensor) -> dict[str, int]:
    columns = max(triton.next_power_of_2(views.shape[2]) // _ONE_PASS_PARTS, 16)
    return {
        **{"DIM": views.shape[2], "HEADS": _HEADS, "PASSAGES": 16, "PARTS": _ONE_PASS_PARTS, "COLUMNS": columns},
        **{"num_warps": _ONE_PASS_PARTS, "num_stages": 2},
    }


def _takes_one_pass(views: Tensor, programs: int) -> bool:
    """Whether one pass pays: a tile that fits and loads well, and programs for a good part of the device."""
    aligned = all(size % 16 == 0 for size in (views.shape[2], *views.stride()[:2]))
    fits = views.dtype != torch.float32 and views.shape[2] <= _ONE_PASS_DIM and aligned
    return fits and 4 * programs >= processors(views)


# ---- scores ----


@triton.jit(do_not_specialize=COUNTS)
def score_views_kernel(
    scores,
    views,
    anchors,
    cu_passages,
    total,
    query_count,
    view_count,
    passage_stride,
    view_stride,
    query_stride,
    query_view_stride,
    PER_VIEW: tl.constexpr,
    DIM: tl.constexpr,
    PASSAGES: tl.constexpr,
    VIEWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """float32 [P], or [P, m] with PER_VIEW, contiguous: the passages of a span."""
    query, _, first, last = passages_of_program(cu_passages, tl.program_id(0), query_count, total, PASSAGES, STEPS)
    if first < last:
        passage = first + tl.arange(0, PASSAGES)
        sums = tl.zeros([PASSAGES], tl.float32)
        for block in range(0, view_count, VIEWS):
            view = (block + tl.arange(0, VIEWS)).to(tl.int64)
            lines = (passage * passage_stride)[:, None] + (view * view_stride)[None, :]
            inside = (passage < last)[:, None] & (view < view_count)[None, :]
            products = tl.zeros([PASSAGES, VIEWS, COLUMNS], tl.float32)
            for start in range(0, DIM, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                mask = inside[:, :, None] & (column < DIM)[None, None, :]
                tile = tl.load(views + lines[:, :, None] + column[None, None, :], mask=mask, other=0)
                anchor = load_tile(
                    anchors + query * query_stride, view, query_view_stride, view < view_count, column, DIM
                )
                products += widen(tile) * widen(anchor)[None, :, :]
            score = tl.sum(products, axis=2)
            if PER_VIEW:
                tl.store(scores + (passage * view_count)[:, None] + view[None, :], score, mask=inside)
            sums += tl.sum(score, axis=1)
        if not PER_VIEW:
            tl.store(scores + passage, tl.div_rn(sums, view_count.to(tl.float32)), mask=passage < last)


@triton.jit(do_not_specialize=COUNTS)
def score_gradient_kernel(
    grad_views,
    grad_anchors,
    grad,
    views,
    anchors,
    cu_passages,
    total,
    view_count,
    column_blocks,
    share,
    grad_stride,
    grad_view_stride,
    passage_stride,
    view_stride,
    query_stride,
    query_view_stride,
    DIM: tl.constexpr,
    PASSAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_views [P, m, DIM] and grad_anchors [Q, m, DIM], contiguous: a block of columns of one query and view."""
    column = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    place = (tl.program_id(0) // column_blocks).to(tl.int64)
    query, view = place // view_count, place % view_count
    first, last = sequence_rows(cu_passages, query, total)
    anchor = widen(tl.load(anchors + query * query_stride + view * query_view_stride + column, mask=column < DIM))
    sums = tl.zeros([PASSAGES, COLUMNS], tl.float32)
    for start in range(first, last, PASSAGES):
        passage = (start + tl.arange(0, PASSAGES)).to(tl.int64)
        inside = passage < last
        weight = share * tl.load(grad + passage * grad_stride + view * grad_view_stride, mask=inside, other=0)
        tile = load_tile(views + view * view_stride, passage, passage_stride, inside, column, DIM)
        sums += weight[:, None] * widen(tile)
        at = grad_views + ((passage * view_count + view) * DIM)[:, None] + column[None, :]
        value = round_to(weight[:, None] * anchor[None, :], grad_views.dtype.element_ty)
        tl.store(at, value, mask=inside[:, None] & (column < DIM)[None, :])
    value = round_to(tl.sum(sums, axis=0), grad_anchors.dtype.element_ty)
    tl.store(grad_anchors + place * DIM + column, value, mask=column < DIM)


# ---- the best of them ----


@triton.jit(do_not_specialize=(*COUNTS, "k"))
def rank_kernel(
    best,
    places,
    scores,
    cu_passages,
    total,
    query_count,
    k,
    PASSAGES: tl.constexpr,
    OTHERS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """best and places [Q, k], contiguous: each passage's rank is the number of those that stand before it.

    Compares each pair of a query's passages: less work than a sort for hundreds, and parallel for thousands.
    """
    query, span, first, last = passages_of_program(cu_passages, tl.program_id(0), query_count, total, PASSAGES, STEPS)
    if query >= 0:
        all_first, all_last = sequence_rows(cu_passages, query, total)
        count = (all_last - all_first).to(tl.int32)
        place = (first - all_first).to(tl.int32) + tl.arange(0, PASSAGES)
        own = scores + all_first
        score = tl.load(own + place, mask=place < count, other=0)
        key = order_key(score)
        rank = tl.zeros([PASSAGES], tl.int32)
        for start in range(0, tl.where(first < last, count, 0), OTHERS):
            other = start + tl.arange(0, OTHERS)
            other_key = order_key(tl.load(own + other, mask=other < count, other=0))
            earlier = (other_key[None, :] == key[:, None]) & (other[None, :] < place[:, None])
            before = ((other_key[None, :] > key[:, None]) | earlier) & (other < count)[None, :]
            rank += tl.sum(before.to(tl.int32), axis=1)
        taken = (place < count) & (rank < k)
        tl.store(best + query * k + rank, score, mask=taken)
        tl.store(places + query * k + rank, place.to(tl.int64), mask=taken)
        if span == 0:
            for start in range(count, k, OTHERS):
                rest = start + tl.arange(0, OTHERS)
                tl.store(best + query * k + rest, float("-inf"), mask=rest < k)
                tl.store(places + query * k + rest, -1, mask=rest < k)


# ---- launchers ----


def _products(
    scores: Tensor, slopes: Tensor | None, views: Tensor, queries: Tensor, grad: Tensor | None, cu_passages: Tensor
) -> None:
    """Scores and, with a gradient, slopes, each float32 [m, H, P]."""
    total, (query_count, view_count, heads) = views.shape[0], queries.shape[:3]
    shape = _product_shape(views)
    head_blocks = ceil_div(heads, shape["HEADS"])
    strides = (*views.stride()[:2], *queries.stride()[:3], *(queries if grad is None else grad).stride()[:3])
    products_kernel[((total // shape["PASSAGES"] + query_count) * view_count * head_blocks,)](
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
        *strides,
        STEPS=search_steps(query_count),
        **shape,
    )


def _mix(out: Tensor, weights: Tensor, views: Tensor, cu_passages: Tensor, softmax: bool) -> None:
    query_count, view_count, heads, dim = out.shape
    shape = _mix_shape(views)
    head_blocks, column_blocks = ceil_div(heads, shape["HEADS"]), ceil_div(dim, shape["COLUMNS"])
    mix_kernel[(query_count * view_count * head_blocks * column_blocks,)](
        out,
        weights,
        views,
        cu_passages,
        views.shape[0],
        view_count,
        heads,
        head_blocks,
        column_blocks,
        *views.stride()[:2],
        SOFTMAX=softmax,
        **shape,
    )


def anchor_attention_triton(views: Tensor, queries: Tensor, cu_passages: Tensor) -> Tensor:
    require_device("anchor_attention", views)
    out = queries.new_empty(queries.shape)
    if out.numel() == 0:
        return out
    views, queries, cu_passages = dense_rows(views), dense_rows(queries), cu_passages.contiguous()
    query_count, view_count, heads, _ = queries.shape
    head_blocks = ceil_div(heads, _HEADS)
    programs = query_count * view_count * head_blocks
    with on_device_of(views):
        if _takes_one_pass(views, programs):
            anchor_attention_kernel[(programs,)](
                out,
                views,
                queries,
                cu_passages,
                views.shape[0],
                view_count,
                heads,
                head_blocks,
                *views.stride()[:2],
                *queries.stride()[:3],
                **_one_pass_shape(views),
            )
        else:
            scores = queries.new_empty((view_count, heads, views.shape[0]), dtype=torch.float32)
            _products(scores, None, views, queries, None, cu_passages)
            _mix(out, scores, views, cu_passages, softmax=True)
    return out


def anchor_attention_backward_triton(
    grad: Tensor, views: Tensor, queries: Tensor, cu_passages: Tensor
) -> tuple[Tensor, Tensor]:
    require_device("anchor_attention_backward", views)
    grad_views, grad_queries = views.new_empty(views.shape), queries.new_empty(queries.shape)
    if grad_views.numel() == 0 or grad_queries.numel() == 0:
        return grad_views.zero_(), grad_queries.zero_()
    grad, views, queries, cu_passages = (
        dense_rows(grad),
        dense_rows(views),
        dense_rows(queries),
        cu_passages.contiguous(),
    )
    (total, view_count, dim), (query_count, _, heads, _) = views.shape, queries.shape
    scores, slopes = queries.new_empty((2, view_count, heads, total), dtype=torch.float32)
    shape = _mix_shape(views)
    column_blocks = ceil_div(dim, shape["COLUMNS"])
    with on_device_of(views):
        _products(scores, slopes, views, queries, grad, cu_passages)
        weights_kernel[(query_count * view_count * heads,)](
            scores, slopes, cu_passages, total, view_count, heads, PASSAGES=_WEIGHTS
        )
        _mix(grad_queries, slopes, views, cu_passages, softmax=False)
        view_gradient_kernel[((total // shape["PASSAGES"] + query_count) * view_count * column_blocks,)](
            grad_views,
            scores,
            slopes,
            queries,
            grad,
            cu_passages,
            total,
            query_count,
            view_count,
            heads,
            column_blocks,
            *queries.stride()[:3],
            *grad.stride()[:3],
            STEPS=search_steps(query_count),
            **shape,
        )
    return grad_views, grad_queries


def _score(scores: Tensor, views: Tensor, anchors: Tensor, cu_passages: Tensor, per_view: bool) -> None:
    shape, query_count = _score_shape(views), anchors.shape[0]
    score_views_kernel[(views.shape[0] // shape["PASSAGES"] + query_count,)](
        scores,
        views,
        anchors,
        cu_passages,
        views.shape[0],
        query_count,
        views.shape[1],
        *views.stride()[:2],
        *anchors.stride()[:2],
        PER_VIEW=per_view,
        STEPS=search_steps(query_count),
        **shape,
    )


def anchor_scores_triton(views: Tensor, anchors: Tensor, cu_passages: Tensor, per_view: bool = False) -> Tensor:
    require_device("anchor_scores", views)
    scores = views.new_empty(views.shape[: 1 + per_view], dtype=torch.float32)
    if scores.numel() == 0 or anchors.shape[0] == 0:
        return scores.zero_()
    with on_device_of(views):
        _score(scores, dense_rows(views), dense_rows(anchors), cu_passages.contiguous(), per_view)
    return scores


def anchor_scores_backward_triton(
    grad: Tensor, views: Tensor, anchors: Tensor, cu_passages: Tensor, per_view: bool
) -> tuple[Tensor, Tensor]:
    require_device("anchor_scores_backward", views)
    grad_views, grad_anchors = views.new_empty(views.shape), anchors.new_empty(anchors.shape)
    if grad_views.numel() == 0 or grad_anchors.numel() == 0:
        return grad_views.zero_(), grad_anchors.zero_()
    views, anchors, (total, view_count, dim) = dense_rows(views), dense_rows(anchors), views.shape
    columns = _columns(views, _GRADIENT_COLUMNS)
    column_blocks = ceil_div(dim, columns)
    with on_device_of(views):
        score_gradient_kernel[(anchors.shape[0] * view_count * column_blocks,)](
            grad_views,
            grad_anchors,
            grad,
            views,
            anchors,
            cu_passages.contiguous(),
            total,
            view_count,
            column_blocks,
            1.0 if per_view else 1.0 / view_count,
            *(grad.stride() if per_view else (*grad.stride(), 0)),
            *views.stride()[:2],
            *anchors.stride()[:2],
            DIM=dim,
            PASSAGES=_GRADIENT_ROWS,
            COLUMNS=columns,
        )
    return grad_views, grad_anchors


def anchor_topk_triton(views: Tensor, anchors: Tensor, cu_passages: Tensor, k: int) -> tuple[Tensor, Tensor]:
    require_device("anchor_topk", views)
    total, query_count = views.shape[0], anchors.shape[0]
    best = anchors.new_empty((query_count, k), dtype=torch.float32)
    places = anchors.new_empty((query_count, k), dtype=torch.int64)
    if query_count == 0:
        return best, places
    scores, cu_passages = best.new_empty(total), cu_passages.contiguous()
    with on_device_of(views):
        _score(scores, dense_rows(views), dense_rows(anchors), cu_passages, False)
        rank_kernel[(total // _RANKED + query_count,)](
            best,
            places,
            scores,
            cu_passages,
            total,
            query_count,
            k,
            PASSAGES=_RANKED,
            OTHERS=_COMPARED,
            STEPS=search_steps(query_count),
        )
    return best, places
