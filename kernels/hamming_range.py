"""Triton kernels of hamming_range: the number of answers of every (query, span of codes), then the answers."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from .hamming_scan import code_distances, is_allowed, load_codes

# sizes that would only make more variants of a kernel
_COUNTS = ("query_count", "count", "radius", "groups", "group_size", "spans", "span_codes")


@triton.jit(do_not_specialize=_COUNTS)
def range_count_kernel(
    counts,
    queries,
    codes,
    allowed,
    query_count,
    count,
    radius,
    groups,
    group_size,
    spans,
    span_codes,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Answers of every (query, span of codes), int64 [queries, spans]; zero before."""
    # groups vary fastest: programs that run together read the same codes
    program = tl.program_id(0)
    span = (program // groups).to(tl.int64)
    first_query = (program % groups).to(tl.int64) * group_size
    last_query = tl.minimum(first_query + group_size, query_count)
    first_code = span * span_codes
    last_code = tl.minimum(first_code + span_codes, count)
    for start in range(first_code, last_code, CODES):
        index = start + tl.arange(0, CODES)
        tile = load_codes(codes, index, count, 0, WIDTH, STRIDE, WORDS)
        counted = is_allowed(allowed, index, count)
        for query in range(first_query, last_query):
            distance = code_distances(queries, query, codes, index, count, tile, WIDTH, STRIDE, WORDS)
            found = tl.sum((counted & (distance < radius)).to(tl.int32), axis=0)
            if found > 0:
                # no other program has this entry
                tl.atomic_add(counts + query * spans + span, found.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=_COUNTS)
def range_write_kernel(
    out_distances,
    out_indices,
    places,
    counts,
    queries,
    codes,
    allowed,
    query_count,
    count,
    radius,
    groups,
    group_size,
    spans,
    span_codes,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Write every answer, in the order of its index.

    counts as range_count_kernel leaves them; places, the same for the first answer of each, are consumed.
    """
    program = tl.program_id(0)
    span = (program // groups).to(tl.int64)
    first_query = (program % groups).to(tl.int64) * group_size
    last_query = tl.minimum(first_query + group_size, query_count)
    first_code = span * span_codes
    # most spans hold no answer of most queries
    found_here = tl.zeros([], tl.int64)
    for query in range(first_query, last_query):
        found_here += tl.load(counts + query * spans + span)
    last_code = tl.where(found_here > 0, tl.minimum(first_code + span_codes, count), first_code)
    for start in range(first_code, last_code, CODES):
        index = start + tl.arange(0, CODES)
        tile = load_codes(codes, index, count, 0, WIDTH, STRIDE, WORDS)
        counted = is_allowed(allowed, index, count)
        for query in range(first_query, last_query):
            entry = query * spans + span
            if tl.load(counts + entry) > 0:
                distance = code_distances(queries, query, codes, index, count, tile, WIDTH, STRIDE, WORDS)
                near = counted & (distance < radius)
                order = tl.cumsum(near.to(tl.int32), axis=0)
                found = tl.max(order, axis=0).to(tl.int64)
                # tiles come in ascending order and no other program has this entry, so the order is that of codes;
                # a tile without answers adds 0, since ptxas spills where a branch goes round it
                base = tl.atomic_add(places + entry, found, sem="relaxed")
                place = base + order - 1
                tl.store(out_distances + place, distance, mask=near)
                tl.store(out_indices + place, index, mask=near)
