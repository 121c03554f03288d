"""Triton kernels of hamming_topk: counts of each distance, then every code to its place."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from .hamming_scan import code_distances, is_allowed, load_codes

# sizes that would only make more variants of a kernel
_COUNTS = ("query_count", "count", "bins", "k", "groups", "group_size", "spans", "span_codes")


@triton.jit(do_not_specialize=_COUNTS)
def histogram_kernel(
    histogram,
    queries,
    codes,
    allowed,
    query_count,
    count,
    bins,
    groups,
    group_size,
    spans,
    span_codes,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Counts of each distance for every (query, span of codes), int32 [queries, spans, bins]."""
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
            to = histogram + (query * spans + span) * bins + distance
            tl.atomic_add(to, tl.full([CODES], 1, tl.int32), mask=counted, sem="relaxed")


@triton.jit
def _write_ranked(next_places, out_distances, out_indices, distance, index, base, taken, k, CODES: tl.constexpr):
    """Write the ``taken`` codes of a tile to the places that their distances have reached (``base``); move those on.

    next_places [bins] belongs to this program alone; the barriers order the loads of base before the stores of this
    tile, and those before the loads of the next.
    """
    # codes that are not taken equal no other
    key = tl.where(taken, distance, -1 - tl.arange(0, CODES))
    equal = (key[:, None] == key[None, :]).to(tl.int32)
    earlier = tl.arange(0, CODES)[None, :] < tl.arange(0, CODES)[:, None]
    place = base + tl.sum(tl.where(earlier, equal, 0), axis=1)
    tl.debug_barrier()
    tl.store(next_places + distance, base + tl.sum(equal, axis=1), mask=taken)
    tl.debug_barrier()
    tl.store(out_distances + place, distance, mask=taken & (place < k))
    tl.store(out_indices + place, index, mask=taken & (place < k))


@triton.jit(do_not_specialize=_COUNTS)
def select_kernel(
    out_distances,
    out_indices,
    places,
    bounds,
    queries,
    codes,
    allowed,
    query_count,
    count,
    bins,
    k,
    groups,
    group_size,
    spans,
    span_codes,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Write each code whose distance has a place below k. places [queries, spans, bins]: first place; consumed."""
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
            near = counted & (distance <= tl.load(bounds + query))
            next_places = places + (query * spans + span) * bins
            base = tl.load(next_places + distance, mask=near, other=k, volatile=True)
            taken = base < k
            if tl.max(taken.to(tl.int32), axis=0) > 0:
                to = query * k
                _write_ranked(next_places, out_distances + to, out_indices + to, distance, index, base, taken, k, CODES)
