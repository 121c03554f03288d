"""Triton kernel of rescore_topk: the scores of all candidates, gathered row by row."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from ._support import widen


@triton.jit
def order_key(scores):
    """int32 in the order of the scores: zeros are equal, what is not a number counts as -inf."""
    ordered = tl.where(scores == 0, 0.0, tl.where(scores != scores, float("-inf"), scores))
    bits = ordered.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=("candidate_count", "vector_count", "blocks"))
def score_kernel(
    scores,
    keys,
    queries,
    candidates,
    vectors,
    scale,
    candidate_count,
    vector_count,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BITS: tl.constexpr,
):
    """Scores of one query's ROWS candidates and the keys that sort them. A candidate that is no row scores -inf.

    vectors: DIM numbers a row, or with BITS eight dimensions a byte.
    """
    # 64-bit: queries times candidates may pass two to the 31
    program = tl.program_id(0).to(tl.int64)
    query = program // blocks
    candidate = (program % blocks) * ROWS + tl.arange(0, ROWS)
    inside = candidate < candidate_count
    place = query * candidate_count + candidate
    row = tl.load(candidates + place, mask=inside, other=-1)
    present = (row >= 0) & (row < vector_count)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, DIM, COLUMNS):
        dim = first + tl.arange(0, COLUMNS)
        near = widen(tl.load(queries + query * DIM + dim, mask=dim < DIM, other=0))
        if scale is not None:
            near *= tl.load(scale + dim, mask=dim < DIM, other=0)
        # eight neighbouring threads read one byte of bits: a single access
        column = dim // 8 if BITS else dim
        mask = present[:, None] & (dim < DIM)[None, :]
        values = tl.load(vectors + (row * STRIDE)[:, None] + column[None, :], mask=mask, other=0)
        if BITS:
            # a sum of the chosen values: 0 times infinity does not come into it
            is_set = ((values.to(tl.int32) >> (7 - dim % 8)[None, :]) & 1) != 0
            total += tl.where(is_set, near[None, :], 0.0)
        else:
            total += widen(values) * near[None, :]
    score = tl.where(present, tl.sum(total, axis=1), float("-inf"))
    tl.store(scores + place, score, mask=inside)
    tl.store(keys + place, order_key(score), mask=inside)
