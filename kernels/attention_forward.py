"""Triton kernels of varlen_attention's forward pass and what its backward shares with it; `attention` launches them.

A program owns a tile of consecutive packed rows, whatever sequences they belong to, so that short texts share a tile.
Each row carries the range of rows of the other side that it pairs with, and the tile walks the union of its rows'
ranges. What a product takes in from another sequence counts 0 unless it is infinite or NaN (0 · NaN is NaN): only
then the tile is computed again, one sequence at a time.

Heads are padded to a power of two: products cost up to 2/3 more for 80 or 96 dimensions, memory traffic stays.
Every kernel is in bounds for any values of offsets, positions and lengths.
"""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

from ._support import INTERPRETED, first_above, round_to, widen

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LAST = tl.constexpr(2**31 - 1)

# sizes that would only make more variants of a kernel
COUNTS = ("total_q", "total_k", "total", "sequences", "steps", "before", "after", "radius", "limit")


# ---- products ----


@triton.jit
def multiply_add(a, b, total):
    """``total + a @ b``, accumulated in float32: float32 factors in true float32, others at their own dtype."""
    if INTERPRETED:
        # the interpreter's products of bfloat16 are wrong
        result = tl.dot(widen(a), widen(b), total, input_precision="ieee")
    else:
        result = tl.dot(a, b, total, input_precision="ieee")
    return result


@triton.jit
def load_rows(base, rows, stride, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of one head, 0 outside; DIM of them padded to BLOCK columns."""
    columns = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if DIM < BLOCK:
        mask = mask & (columns < DIM)[None, :]
    return tl.load(base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :], mask=mask, other=0)


@triton.jit
def store_rows(base, rows, stride, values, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if DIM < BLOCK:
        mask = mask & (columns < DIM)[None, :]
    at = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    tl.store(at, round_to(values, base.dtype.element_ty), mask=mask)


@triton.jit
def any_not_finite(x):
    return tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1) > 0


# ---- who pairs with whom ----


@triton.jit
def pair_ranges(
    rows,
    total,
    other_total,
    cu_own,
    cu_other,
    sequences,
    steps,
    own_positions,
    other_positions,
    seqused_k,
    before,
    after,
    OWN_KEYS: tl.constexpr,
):
    """For rows of one side: sequence, the range [first, last) of the other side that may pair, and origin.

    A pair's distance, other − own position, is the other's position (its row where positions are implicit) − origin.
    The range is narrowed by ``before`` and ``after`` where the other side's positions are implicit.
    """
    inside = rows < total
    sequence = first_above(cu_own, sequences + 1, rows, steps) - 1
    known = inside & (sequence >= 0) & (sequence < sequences)
    sequence = tl.minimum(tl.maximum(sequence, 0), sequences - 1)
    first = tl.minimum(tl.maximum(tl.load(cu_other + sequence), 0), other_total)
    last = tl.minimum(tl.maximum(tl.load(cu_other + sequence + 1), first), other_total)
    origin = rows - tl.load(cu_own + sequence)
    if seqused_k is not None:
        used = tl.load(seqused_k + sequence)
        if OWN_KEYS:
            known = known & (origin < used)
        else:
            last = first + tl.minimum(last - first, tl.maximum(used, 0))
    if own_positions is not None:
        origin = tl.load(own_positions + rows, mask=inside, other=0)
    if other_positions is None:
        centre = origin.to(tl.int64) + first
        origin = centre.to(tl.int32)
        first = tl.minimum(tl.maximum(centre - before, first), last).to(tl.int32)
        last = tl.maximum(tl.minimum(centre + after + 1, last), first).to(tl.int32)
    return sequence, tl.where(known, first, 0), tl.where(known, last, 0), origin


@triton.jit
def union(first, last, wanted):
    """Union of the wanted rows' ranges; empty where all of them are."""
    wanted = wanted & (first < last)
    return tl.min(tl.where(wanted, first, LAST)), tl.max(tl.where(wanted, last, 0))


@triton.jit
def intersection(first, last, inside):
    """What every row inside pairs with."""
    return tl.max(tl.where(inside, first, 0)), tl.min(tl.where(inside, last, LAST))


@triton.jit
def coordinates_of(others, positions, end):
    """The positions of a block of the other side, or its rows where positions are implicit."""
    coordinates = others
    if positions is not None:
        coordinates = tl.load(positions + others, mask=others < end, other=0)
    return coordinates


@triton.jit
def pairs(others, coordinates, first, last, origin, before, after, EXPLICIT: tl.constexpr):
    """Which of the rows of a tile and of a block of the other side are a pair."""
    paired = (others[None, :] >= first[:, None]) & (others[None, :] < last[:, None])
    if EXPLICIT:
        distance = coordinates[None, :] - origin[:, None]
        paired = paired & (distance >= -before) & (distance <= after)
    return paired


# ---- scores ----


@triton.jit
def tanh(x):
    """To a few units in the last place; the plain formula would lose small values to cancellation."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - decay) / (1 + decay)
    return tl.where(square < 0.0625, x * series, tl.where(x < 0, -far, far))


@triton.jit
def power(scores, UNIT: tl.constexpr):
    """exp of scores that are times UNIT.

    UNIT is log2(e) where a product for each score counts. It is 1 for float32: a row's only weight is then exactly 1.
    """
    return tl.exp2(scores * (LOG2_E / UNIT))


@triton.jit
def look_up(table, place):
    """table[place], from the cache, in whatever layout the places have.

    A tl.load would be staged through shared memory twice: by the pipeline of its loop, and to the layout of products.
    """
    if INTERPRETED:
        found = tl.load(table + place)
    else:
        found = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [(table + place).to(tl.int64)], tl.float32, is_pure=True, pack=1
        )
    return found


@triton.jit
def scores_of(products, table, head, radius, distance, inner, outer, SOFTCAP: tl.constexpr, UNIT: tl.constexpr):
    """Scores times UNIT, as inner and outer have it, and the slope of the soft cap."""
    scores = products * inner
    slope = 1.0
    if SOFTCAP:
        capped = tanh(scores)
        scores = capped * outer
        slope = 1 - capped * capped
    if table is not None:
        place = tl.minimum(tl.maximum(distance, -radius), radius) + radius
        scores += look_up(table + head * (2 * radius.to(tl.int64) + 1), place) * UNIT
    return scores, slope


# ---- rotation ----


@triton.jit(do_not_specialize=COUNTS)
def rotate_kernel(
    out,
    x,
    cos,
    sin,
    positions,
    cu_seqlens,
    total,
    sequences,
    steps,
    limit,
    row_stride,
    head_stride,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [total, heads, DIM], contiguous: rows of x turned by their positions, dimension i with i + HALF."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    inside = rows < total
    if positions is None:
        sequence = first_above(cu_seqlens, sequences + 1, rows, steps) - 1
        sequence = tl.minimum(tl.maximum(sequence, 0), sequences - 1)
        position = rows - tl.load(cu_seqlens + sequence)
    else:
        position = tl.load(positions + rows, mask=inside, other=0)
    position = tl.minimum(tl.maximum(position, 0), limit - 1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    turned = column < 2 * HALF
    partner = tl.where(column < HALF, column + HALF, column - HALF)
    angle = tl.where(column < HALF, column, column - HALF)
    mask = inside[:, None] & turned[None, :]
    base = x + head * head_stride + (rows.to(tl.int64) * row_stride)[:, None]
    values = widen(tl.load(base + column[None, :], mask=inside[:, None] & (column < DIM)[None, :], other=0))
    partners = widen(tl.load(base + partner[None, :], mask=mask, other=0))
    at = (position * HALF)[:, None] + angle[None, :]
    cosines, sines = tl.load(cos + at, mask=mask, other=1), tl.load(sin + at, mask=mask, other=0)
    # the first half is turned towards the second, or back
    sines = tl.where((column < HALF)[None, :] == INVERSE, sines, -sines)
    values = tl.where(turned[None, :], values * cosines + partners * sines, values)
    store_rows(out + head * DIM, rows, tl.num_programs(1) * DIM, values, inside, DIM, COLUMNS)


# ---- attention ----


@triton.jit(do_not_specialize=COUNTS)
def attention_kernel(
    out,
    lse,
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
    """out [total_q, heads, VALUE_DIM] and lse [heads, total_q], contiguous: one tile of queries of one head."""
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
    keys_of, values_of = k + head // GROUP * k_head, v + head // GROUP * v_head
    first_sequence = tl.min(tl.where(inside, sequence, LAST))
    last_sequence = tl.max(tl.where(inside, sequence, 0))
    # first_sequence − 1 stands for all of them
    part = first_sequence - 1
    while part <= last_sequence:
        together = part < first_sequence
        own = inside & (together | (sequence == part))
        start, end = union(first, last, own)
        most = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_Q], tl.float32)
        mixed = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
        for block in range(start, end, BLOCK_K):
            others = block + tl.arange(0, BLOCK_K)
            keys = load_rows(keys_of, others, k_row, others < end, DIM, BLOCK_D)
            products = multiply_add(queries, tl.trans(keys), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
            coordinates = coordinates_of(others, positions_k, end)
            distance = coordinates[None, :] - origin[:, None]
            scores, _ = scores_of(products, table, head, radius, distance, inner, outer, SOFTCAP, UNIT)
            if EXPLICIT or (block < all_first) or (block + BLOCK_K > all_last):
                paired = pairs(others, coordinates, first, last, origin, before, after, EXPLICIT)
                scores = tl.where(paired, scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, axis=1))
            # a row that has seen nothing yet must not compute −inf − −inf
            level = tl.where(higher == float("-inf"), 0.0, higher)
            weights = power(scores - level[:, None], UNIT)
            decay = power(most - level, UNIT)
            sums = sums * decay + tl.sum(weights, axis=1)
            values = load_rows(values_of, others, v_row, others < end, VALUE_DIM, BLOCK_V)
            mixed = multiply_add(round_to(weights, v.dtype.element_ty), values, mixed * decay[:, None])
            most = higher
        spoiled = together & (first_sequence < last_sequence) & any_not_finite(mixed)
        own = own & (spoiled == 0)
        empty = sums == 0
        divisor = tl.where(empty, 1.0, sums)
        mixed = tl.where(empty[:, None], 0.0, mixed / divisor[:, None])
        store_rows(out + head * VALUE_DIM, rows, heads.to(tl.int64) * VALUE_DIM, mixed, own, VALUE_DIM, BLOCK_V)
        total = tl.where(empty, float("-inf"), most * (1 / UNIT) + tl.log2(divisor) * LN_2)
        tl.store(lse + head * total_q + rows, total, mask=own)
        part = tl.where(together & (spoiled == 0), last_sequence, part) + 1
