"""Triton kernels of varlen_attention_backward; `attention` launches them.

Scores are formed again, once from the side of the queries and once from that of the keys, so every gradient is summed
by one program in a fixed order. Tiles of rows walk their pairs as in the forward pass. The gradient of the bias table
has a pass of its own: a fixed number of programs a head sum the diagonals of their tiles.
"""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

from ._support import round_to, widen
from .attention_forward import (
    COUNTS,
    LAST,
    any_not_finite,
    coordinates_of,
    intersection,
    load_rows,
    multiply_add,
    pair_ranges,
    pairs,
    power,
    scores_of,
    store_rows,
    union,
)


@triton.jit(do_not_specialize=COUNTS)
def row_products_kernel(
    products,
    grad_out,
    out,
    grad_lse,
    total,
    grad_row,
    grad_head,
    out_row,
    out_head,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """products float32 [heads, total]: grad_out · out − grad_lse, what a row's weights share of their gradient."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    inside = rows < total
    grad = widen(load_rows(grad_out + head * grad_head, rows, grad_row, inside, VALUE_DIM, COLUMNS))
    values = widen(load_rows(out + head * out_head, rows, out_row, inside, VALUE_DIM, COLUMNS))
    sums = tl.sum(grad * values, axis=1)
    if grad_lse is not None:
        sums -= tl.load(grad_lse + head * total + rows, mask=inside, other=0)
    tl.store(products + head * total + rows, sums, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def query_gradient_kernel(
    grad_q,
    exact,
    grad_out,
    grad_lse,
    lse,
    shared,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    positions_q,
    positions_k,
    seqused_k,
    table,
    total_q,
    total_k,
    sequences,
    steps,
    before,
    after,
    radius,
    inner,
    outer,
    scale,
    grad_row,
    grad_head,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """grad_q [total_q, heads, DIM], contiguous: one tile of queries of one head.

    ``exact``, where wanted, is ``shared`` from the weights themselves: out is rounded, and the gradient of the bias
    table, in which whole rows cancel, would sum that error up.
    """
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = rows < total_q
    sequence, first, last, origin = pair_ranges(
        rows,
        total_q,
        total_k,
        cu_seqlens_q,
        cu_seqlens_k,
        sequences,
        steps,
        positions_q,
        positions_k,
        seqused_k,
        before,
        after,
        False,
    )
    EXPLICIT: tl.constexpr = positions_k is not None
    all_first, all_last = intersection(first, last, inside)
    queries = load_rows(q + head * q_head, rows, q_row, inside, DIM, BLOCK_D)
    grads = load_rows(grad_out + head * grad_head, rows, grad_row, inside, VALUE_DIM, BLOCK_V)
    row_lse = tl.load(lse + head * total_q + rows, mask=inside, other=0) * UNIT
    row_shared = tl.load(shared + head * total_q + rows, mask=inside, other=0)
    keys_of, values_of = k + head // GROUP * k_head, v + head // GROUP * v_head
    first_sequence = tl.min(tl.where(inside, sequence, LAST))
    last_sequence = tl.max(tl.where(inside, sequence, 0))
    # first_sequence − 1 stands for all of them
    part = first_sequence - 1
    while part <= last_sequence:
        together = part < first_sequence
        own = inside & (together | (sequence == part))
        start, end = union(first, last, own)
        mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        sums = tl.zeros([BLOCK_Q], tl.float32)
        for block in range(start, end, BLOCK_K):
            others = block + tl.arange(0, BLOCK_K)
            keys = load_rows(keys_of, others, k_row, others < end, DIM, BLOCK_D)
            values = load_rows(values_of, others, v_row, others < end, VALUE_DIM, BLOCK_V)
            products = multiply_add(queries, tl.trans(keys), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
            coordinates = coordinates_of(others, positions_k, end)
            distance = coordinates[None, :] - origin[:, None]
            scores, slope = scores_of(products, table, head, radius, distance, inner, outer, SOFTCAP, UNIT)
            weight_gradients = multiply_add(grads, tl.trans(values), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
            weights = power(scores - row_lse[:, None], UNIT)
            gradients = weights * (weight_gradients - row_shared[:, None]) * slope
            if EXPLICIT or (block < all_first) or (block + BLOCK_K > all_last):
                paired = pairs(others, coordinates, first, last, origin, before, after, EXPLICIT)
                gradients = tl.where(paired, gradients, 0.0)
                weights = tl.where(paired, weights, 0.0)
                weight_gradients = tl.where(paired, weight_gradients, 0.0)
            if exact is not None:
                sums += tl.sum(weights * weight_gradients, axis=1)
            mixed = multiply_add(round_to(gradients, k.dtype.element_ty), keys, mixed)
        spoiled = together & (first_sequence < last_sequence) & any_not_finite(mixed)
        own = own & (spoiled == 0)
        # a row without pairs takes nothing from what the tile has read for others
        mixed = tl.where((first < last)[:, None], mixed * scale, 0.0)
        store_rows(grad_q + head * DIM, rows, heads.to(tl.int64) * DIM, mixed, own, DIM, BLOCK_D)
        if exact is not None:
            if grad_lse is not None:
                sums -= tl.load(grad_lse + head * total_q + rows, mask=own, other=0)
            tl.store(exact + head * total_q + rows, sums, mask=own)
        part = tl.where(together & (spoiled == 0), last_sequence, part) + 1


@triton.jit(do_not_specialize=COUNTS)
def key_gradient_kernel(
    grad_k,
    grad_v,
    grad_out,
    lse,
    shared,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    positions_q,
    positions_k,
    seqused_k,
    table,
    total_q,
    total_k,
    sequences,
    steps,
    before,
    after,
    radius,
    inner,
    outer,
    scale,
    grad_row,
    grad_head,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """grad_k and grad_v [total_k, key heads, …], contiguous: one tile of keys of one key head, over its query heads.

    Distances are query − key here, so ``before`` is the window after a query and ``after`` the one before it.
    """
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    key_head, key_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    inside = rows < total_k
    sequence, first, last, origin = pair_ranges(
        rows,
        total_k,
        total_q,
        cu_seqlens_k,
        cu_seqlens_q,
        sequences,
        steps,
        positions_k,
        positions_q,
        seqused_k,
        before,
        after,
        True,
    )
    EXPLICIT: tl.constexpr = positions_q is not None
    all_first, all_last = intersection(first, last, inside)
    keys = load_rows(k + key_head * k_head, rows, k_row, inside, DIM, BLOCK_D)
    values = load_rows(v + key_head * v_head, rows, v_row, inside, VALUE_DIM, BLOCK_V)
    first_sequence = tl.min(tl.where(inside, sequence, LAST))
    last_sequence = tl.max(tl.where(inside, sequence, 0))
    # first_sequence − 1 stands for all of them
    part = first_sequence - 1
    while part <= last_sequence:
        together = part < first_sequence
        own = inside & (together | (sequence == part))
        start, end = union(first, last, own)
        mixed_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        mixed_v = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        for member in range(GROUP):
            head = key_head * GROUP + member
            for block in range(start, end, BLOCK_Q):
                others = block + tl.arange(0, BLOCK_Q)
                there = others < end
                queries = load_rows(q + head * q_head, others, q_row, there, DIM, BLOCK_D)
                grads = load_rows(grad_out + head * grad_head, others, grad_row, there, VALUE_DIM, BLOCK_V)
                row_lse = tl.load(lse + head * total_q + others, mask=there, other=0) * UNIT
                row_shared = tl.load(shared + head * total_q + others, mask=there, other=0)
                products = multiply_add(keys, tl.trans(queries), tl.zeros([BLOCK_K, BLOCK_Q], tl.float32))
                coordinates = coordinates_of(others, positions_q, end)
                distance = origin[:, None] - coordinates[None, :]
                scores, slope = scores_of(products, table, head, radius, distance, inner, outer, SOFTCAP, UNIT)
                weights = power(scores - row_lse[None, :], UNIT)
                weight_gradients = multiply_add(values, tl.trans(grads), tl.zeros([BLOCK_K, BLOCK_Q], tl.float32))
                gradients = weights * (weight_gradients - row_shared[None, :]) * slope
                if EXPLICIT or (block < all_first) or (block + BLOCK_Q > all_last):
                    paired = pairs(others, coordinates, first, last, origin, before, after, EXPLICIT)
                    weights = tl.where(paired, weights, 0.0)
                    gradients = tl.where(paired, gradients, 0.0)
                mixed_v = multiply_add(round_to(weights, v.dtype.element_ty), grads, mixed_v)
                mixed_k = multiply_add(round_to(gradients, k.dtype.element_ty), queries, mixed_k)
        spoiled = together & (first_sequence < last_sequence) & (any_not_finite(mixed_k) | any_not_finite(mixed_v))
        own = own & (spoiled == 0)
        # a row without pairs takes nothing from what the tile has read for others
        some = (first < last)[:, None]
        mixed_k, mixed_v = tl.where(some, mixed_k * scale, 0.0), tl.where(some, mixed_v, 0.0)
        store_rows(grad_k + key_head * DIM, rows, key_heads * DIM, mixed_k, own, DIM, BLOCK_D)
        store_rows(grad_v + key_head * VALUE_DIM, rows, key_heads * VALUE_DIM, mixed_v, own, VALUE_DIM, BLOCK_V)
        part = tl.where(together & (spoiled == 0), last_sequence, part) + 1


# ---- bias table ----


@triton.jit
def _sum_diagonals(gradients, base, bins, radius, BLOCK: tl.constexpr):
    """Sums [bins] of a tile in which a pair's distance is base + column − row."""
    diagonal = tl.arange(0, 2 * BLOCK)
    column = diagonal[None, :] + tl.arange(0, BLOCK)[:, None] - (BLOCK - 1)
    inside = (column >= 0) & (column < BLOCK)
    slanted = tl.gather(gradients, tl.minimum(tl.maximum(column, 0), BLOCK - 1), 1)
    sums = tl.sum(tl.where(inside, slanted, 0.0), axis=0)
    distance = base + diagonal - (BLOCK - 1)
    # all that is further than the table goes to its ends, which are one where radius is 0
    least = tl.sum(tl.where(distance <= -radius, sums, 0.0))
    most = tl.sum(tl.where((distance >= radius) & (distance > -radius), sums, 0.0))
    wanted = bins - radius
    place = wanted - base + BLOCK - 1
    there = (place >= 0) & (place < 2 * BLOCK) & (wanted > -radius) & (wanted < radius)
    found = tl.where(there, tl.gather(sums, tl.minimum(tl.maximum(place, 0), 2 * BLOCK - 1), 0), 0.0)
    return found + tl.where(wanted == -radius, least, 0.0) + tl.where(wanted == radius, most, 0.0)


@triton.jit
def _sum_places(gradients, distance, paired, bins, first_bin, last_bin, radius):
    """Sums [bins] of a tile of any distances, bin by bin: slow, for positions that do not count up."""
    place = tl.minimum(tl.maximum(distance, -radius), radius) + radius
    low = tl.maximum(tl.min(tl.where(paired, place, LAST)), first_bin)
    high = tl.minimum(tl.max(tl.where(paired, place, -1)), last_bin)
    sums = tl.zeros_like(bins).to(tl.float32)
    for wanted in range(low, high + 1):
        total = tl.sum(tl.where(place == wanted, gradients, 0.0))
        sums += tl.where(bins == wanted, total, 0.0)
    return sums


@triton.jit
def _spread(values, wanted):
    return tl.min(tl.where(wanted, values, LAST)), tl.max(tl.where(wanted, values, -LAST))


@triton.jit(do_not_specialize=(*COUNTS, "tiles"))
def bias_gradient_kernel(
    partial,
    grad_out,
    lse,
    shared,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    positions_q,
    positions_k,
    seqused_k,
    table,
    total_q,
    total_k,
    sequences,
    steps,
    before,
    after,
    radius,
    inner,
    outer,
    tiles,
    grad_row,
    grad_head,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """partial float32 [splits, heads, blocks of BINS]: one block of bins of one head, over every splits-th tile."""
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first_bin = tl.program_id(2) * BINS
    last_bin = first_bin + BINS - 1
    bins = first_bin + tl.arange(0, BINS)
    # only pairs of these bins are visited
    before = tl.where(first_bin > 0, tl.minimum(before, radius - first_bin), before)
    after = tl.where(last_bin < 2 * radius, tl.minimum(after, last_bin - radius), after)
    EXPLICIT: tl.constexpr = positions_k is not None
    keys_of, values_of = k + head // GROUP * k_head, v + head // GROUP * v_head
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BINS], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tile * BLOCK + lanes
        inside = rows < total_q
        sequence, first, last, origin = pair_ranges(
            rows,
            total_q,
            total_k,
            cu_seqlens_q,
            cu_seqlens_k,
            sequences,
            steps,
            positions_q,
            positions_k,
            seqused_k,
            before,
            after,
            False,
        )
        queries = load_rows(q + head * q_head, rows, q_row, inside, DIM, BLOCK_D)
        grads = load_rows(grad_out + head * grad_head, rows, grad_row, inside, VALUE_DIM, BLOCK_V)
        row_lse = tl.load(lse + head * total_q + rows, mask=inside, other=0) * UNIT
        row_shared = tl.load(shared + head * total_q + rows, mask=inside, other=0)
        slant = origin - lanes
        first_sequence = tl.min(tl.where(inside, sequence, LAST))
        last_sequence = tl.max(tl.where(inside, sequence, 0))
        low, high = _spread(slant, first < last)
        # all sequences at once where diagonals go through, as they do if queries and keys have the same offsets
        part = tl.where(low == high, first_sequence - 1, first_sequence)
        if EXPLICIT:
            part = first_sequence
        while part <= last_sequence:
            together = part < first_sequence
            own = (first < last) & (together | (sequence == part))
            low, high = _spread(slant, own)
            start, end = union(first, last, own)
            for block in range(start, end, BLOCK):
                others = block + lanes
                keys = load_rows(keys_of, others, k_row, others < end, DIM, BLOCK_D)
                values = load_rows(values_of, others, v_row, others < end, VALUE_DIM, BLOCK_V)
                products = multiply_add(queries, tl.trans(keys), tl.zeros([BLOCK, BLOCK], tl.float32))
                coordinates = coordinates_of(others, positions_k, end)
                distance = coordinates[None, :] - origin[:, None]
                scores, _ = scores_of(products, table, head, radius, distance, inner, outer, SOFTCAP, UNIT)
                weight_gradients = multiply_add(grads, tl.trans(values), tl.zeros([BLOCK, BLOCK], tl.float32))
                paired = pairs(others, coordinates, first, last, origin, before, after, EXPLICIT) & own[:, None]
                gradients = power(scores - row_lse[:, None], UNIT) * (weight_gradients - row_shared[:, None])
                gradients = tl.where(paired, gradients, 0.0)
                left, right = _spread(coordinates - lanes, others < end)
                if (low == high) & (left == right):
                    sums += _sum_diagonals(gradients, left - low, bins, radius, BLOCK)
                else:
                    sums += _sum_places(gradients, distance, paired, bins, first_bin, last_bin, radius)
            part = tl.where(together, last_sequence, part) + 1
    blocks = tl.num_programs(2).to(tl.int64)
    at = ((tl.program_id(0) * heads.to(tl.int64) + head) * blocks + tl.program_id(2)) * BINS
    tl.store(partial + at + tl.arange(0, BINS), sums)
