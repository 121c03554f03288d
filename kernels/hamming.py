"""Triton kernels of the Hamming family."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._support import ceil_div, dense_rows, on_device_of, processors, require_device, widen

NO_DISTANCE = 2147483647
NO_INDEX = -1

# ---- shapes ----

_PACK_TILE = 1024  # bytes of code that a program of pack_bits writes
_TILE_WORDS = 2048  # words of codes that a program holds in registers
_MAX_CHUNK = 128  # words of a row taken at a time
_MAX_TILE_CODES = 256
_MAX_RANKED_CODES = 64  # ranking compares every pair of codes in a tile
_MAX_GROUP = 8  # queries that share a tile of codes
_PROGRAMS_PER_PROCESSOR = 8
_CODES_PER_BIN = 4  # a span shorter than this many codes for each bin costs more in sums than in scanning
_HISTOGRAM_ENTRIES = 1 << 24  # scratch of hamming_topk, 16 bytes each; more queries than fit are taken in turns


def _pack_tile(width: int) -> tuple[int, int]:
    """(rows, bytes) of a tile of pack_bits."""
    columns = min(triton.next_power_of_2(max(width, 1)), 128)
    return _PACK_TILE // columns, columns


def _code_tile(codes: Tensor, most_codes: int = _MAX_TILE_CODES) -> dict[str, int]:
    """Compile-time arguments of a scan. The layout is among them: an index has one, and it tells what is aligned."""
    count, width = codes.shape
    chunk = min(triton.next_power_of_2(max(width, 1)), _MAX_CHUNK)
    stride = codes.stride(0) if count > 1 else width
    return {"CODES": min(_TILE_WORDS // chunk, most_codes), "WORDS": chunk, "WIDTH": width, "STRIDE": stride}


def _query_groups(queries: int) -> tuple[int, int]:
    """(groups, queries a group), as even as can be."""
    groups = ceil_div(queries, _MAX_GROUP)
    return groups, ceil_div(queries, max(groups, 1))


def _span_codes(codes: Tensor, queries: int, groups: int, bins: int) -> int:
    """Codes that one program of hamming_topk scans: few queries must fill the device too, in bounded scratch."""
    full = ceil_div(_PROGRAMS_PER_PROCESSOR * processors(codes), groups)
    enough = max(ceil_div(processors(codes), groups), codes.shape[0] // (_CODES_PER_BIN * bins))
    spans = max(min(full, enough, _HISTOGRAM_ENTRIES // (queries * bins)), 1)
    return ceil_div(ceil_div(codes.shape[0], spans), _MAX_TILE_CODES) * _MAX_TILE_CODES


# ---- kernels ----

# sizes that would only make more variants of a kernel
_COUNTS = ("query_count", "count", "bins", "k", "groups", "group_size", "spans", "span_codes", "rows", "column_blocks")


@triton.jit(do_not_specialize=_COUNTS)
def _pack_bits_kernel(
    out,
    x,
    rows,
    dim,
    width,
    row_stride,
    column_stride,
    column_blocks,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = (program % column_blocks) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    column = byte[:, None] * 8 + bit[None, :]
    inside = (row < rows)[:, None, None] & (column < dim)[None, :, :]
    values = tl.load(x + (row * row_stride)[:, None, None] + (column * column_stride)[None, :, :], mask=inside, other=0)
    bits = (widen(values) > 0).to(tl.int32) << (7 - bit)[None, None, :]
    packed = tl.sum(bits, axis=2).to(tl.uint8)
    tl.store(out + row[:, None] * width + byte[None, :], packed, mask=(row < rows)[:, None] & (byte < width)[None, :])


@triton.jit
def _popcount(words):
    """Ones in each int32. LLVM knows this form: it becomes the GPU's own instruction."""
    v = words.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _load_codes(codes, index, count, first_word, WIDTH: tl.constexpr, STRIDE: tl.constexpr, WORDS: tl.constexpr):
    """Words [first_word, first_word + WORDS) of the rows ``index``, as int32 (bytes are widened); 0 past the end."""
    word = first_word + tl.arange(0, WORDS)
    inside = (index < count)[:, None] & (word < WIDTH)[None, :]
    return tl.load(codes + (index * STRIDE)[:, None] + word[None, :], mask=inside, other=0).to(tl.int32)


@triton.jit
def _load_query(queries, query, first_word, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    word = first_word + tl.arange(0, WORDS)
    return tl.load(queries + query * WIDTH + word, mask=word < WIDTH, other=0).to(tl.int32)


@triton.jit
def _distances(
    queries, query, codes, index, count, tile, WIDTH: tl.constexpr, STRIDE: tl.constexpr, WORDS: tl.constexpr
):
    """Distances of one query to the codes ``index``, whose first WORDS words are at hand in ``tile``."""
    near = _load_query(queries, query, 0, WIDTH, WORDS)
    total = tl.sum(_popcount(tile ^ near[None, :]), axis=1)
    for first in range(WORDS, WIDTH, WORDS):
        near = _load_query(queries, query, first, WIDTH, WORDS)
        far = _load_codes(codes, index, count, first, WIDTH, STRIDE, WORDS)
        total += tl.sum(_popcount(far ^ near[None, :]), axis=1)
    return total


@triton.jit
def _is_allowed(allowed, index, count):
    passed = index < count
    if allowed is not None:
        byte = tl.load(allowed + index // 8, mask=passed, other=0).to(tl.int32)
        passed = passed & (((byte >> (7 - index % 8).to(tl.int32)) & 1) != 0)
    return passed


@triton.jit(do_not_specialize=_COUNTS)
def _distance_kernel(
    out,
    queries,
    codes,
    query_count,
    count,
    groups,
    group_size,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    # groups vary fastest: programs that run together read the same codes
    program = tl.program_id(0)
    index = (program // groups).to(tl.int64) * CODES + tl.arange(0, CODES)
    first_query = (program % groups).to(tl.int64) * group_size
    tile = _load_codes(codes, index, count, 0, WIDTH, STRIDE, WORDS)
    for query in range(first_query, tl.minimum(first_query + group_size, query_count)):
        distance = _distances(queries, query, codes, index, count, tile, WIDTH, STRIDE, WORDS)
        tl.store(out + query * count + index, distance, mask=index < count)


@triton.jit(do_not_specialize=_COUNTS)
def _histogram_kernel(
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
        tile = _load_codes(codes, index, count, 0, WIDTH, STRIDE, WORDS)
        counted = _is_allowed(allowed, index, count)
        for query in range(first_query, last_query):
            distance = _distances(queries, query, codes, index, count, tile, WIDTH, STRIDE, WORDS)
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
def _select_kernel(
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
        tile = _load_codes(codes, index, count, 0, WIDTH, STRIDE, WORDS)
        counted = _is_allowed(allowed, index, count)
        for query in range(first_query, last_query):
            distance = _distances(queries, query, codes, index, count, tile, WIDTH, STRIDE, WORDS)
            near = counted & (distance <= tl.load(bounds + query))
            next_places = places + (query * spans + span) * bins
            base = tl.load(next_places + distance, mask=near, other=k, volatile=True)
            taken = base < k
            if tl.max(taken.to(tl.int32), axis=0) > 0:
                to = query * k
                _write_ranked(next_places, out_distances + to, out_indices + to, distance, index, base, taken, k, CODES)


# ---- launchers ----


def pack_bits_triton(x: Tensor) -> Tensor:
    require_device("pack_bits", x)
    rows, dim = x.shape
    width = (dim + 7) // 8
    out = x.new_empty((rows, width), dtype=torch.uint8)
    if out.numel() == 0:
        return out
    tile_rows, tile_bytes = _pack_tile(width)
    column_blocks = ceil_div(width, tile_bytes)
    with on_device_of(x):
        _pack_bits_kernel[(ceil_div(rows, tile_rows) * column_blocks,)](
            out, x, rows, dim, width, *x.stride(), column_blocks, ROWS=tile_rows, BYTES=tile_bytes
        )
    return out


def _as_words(queries: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (dense rows, any row stride) and queries (contiguous) as int32 words where the codes' layout allows it."""
    codes = dense_rows(codes)
    width = codes.shape[1]
    queries = queries.contiguous()
    if queries.data_ptr() % 4:
        queries = queries.clone()
    whole_words = width % 4 == 0 and codes.stride(0) % 4 == 0 and codes.storage_offset() % 4 == 0
    if not whole_words or codes.data_ptr() % 4 or (width and codes.stride(1) != 1):
        return queries, codes
    return queries.view(torch.int32), codes.view(torch.int32)


def hamming_distance_triton(queries: Tensor, codes: Tensor) -> Tensor:
    require_device("hamming_distance", queries)
    queries, codes = _as_words(queries, codes)
    query_count, count = queries.shape[0], codes.shape[0]
    out = queries.new_empty((query_count, count), dtype=torch.int32)
    if out.numel() == 0:
        return out
    groups, group_size = _query_groups(query_count)
    tile = _code_tile(codes)
    with on_device_of(codes):
        _distance_kernel[(ceil_div(count, tile["CODES"]) * groups,)](
            out,
            queries,
            codes,
            query_count,
            count,
            groups,
            group_size,
            **tile,
        )
    return out


def _first_places(histogram: Tensor, k: int, count: int) -> tuple[Tensor, Tensor]:
    """Of histogram [queries, spans, bins]: the first place of each entry, at most k, and each query's last distance."""
    queries, spans, bins = histogram.shape
    # by distance, then by span: the order of the answer
    counts = histogram.transpose(1, 2).reshape(queries, bins * spans)
    wide = torch.int64 if count > NO_DISTANCE else torch.int32
    places = counts.cumsum(1, dtype=wide).sub_(counts).clamp_(max=k).to(torch.int32).view(queries, bins, spans)
    bounds = (places[:, :, 0] < k).sum(1, dtype=torch.int32) - 1
    return places.transpose(1, 2).contiguous(), bounds


def _topk_turn(
    queries: Tensor, codes: Tensor, k: int, allowed: Tensor | None, distances: Tensor, indices: Tensor, bins: int
) -> None:
    """hamming_topk of as many queries as the scratch holds, into distances and indices [queries, k]."""
    query_count, count = queries.shape[0], codes.shape[0]
    groups, group_size = _query_groups(query_count)
    span_codes = _span_codes(codes, query_count, groups, bins)
    spans = ceil_div(count, span_codes)
    histogram = queries.new_zeros((query_count, spans, bins), dtype=torch.int32)
    scan = (queries, codes, allowed, query_count, count, bins)
    shape = (groups, group_size, spans, span_codes)
    grid = (spans * groups,)
    _histogram_kernel[grid](histogram, *scan, *shape, **_code_tile(codes))
    places, bounds = _first_places(histogram, k, count)
    _select_kernel[grid](distances, indices, places, bounds, *scan, k, *shape, **_code_tile(codes, _MAX_RANKED_CODES))


def hamming_topk_triton(
    queries: Tensor, codes: Tensor, k: int, allowed: Tensor | None = None, code_norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    del code_norms  # for kernels that compute with AND
    require_device("hamming_topk", queries)
    query_count, bins = queries.shape[0], 8 * queries.shape[1] + 1
    queries, codes = _as_words(queries, codes)
    allowed = None if allowed is None else allowed.contiguous()
    distances = queries.new_full((query_count, k), NO_DISTANCE, dtype=torch.int32)
    indices = queries.new_full((query_count, k), NO_INDEX, dtype=torch.int64)
    if query_count == 0 or codes.shape[0] == 0:
        return distances, indices
    turn = max(_HISTOGRAM_ENTRIES // bins, 1)
    with on_device_of(codes):
        for first in range(0, query_count, turn):
            part = slice(first, first + turn)
            _topk_turn(queries[part], codes, k, allowed, distances[part], indices[part], bins)
    return distances, indices
