"""Triton kernels of the Hamming family: their shapes and launchers, packing and distances."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._support import ceil_div, contiguous, dense_rows, on_device_of, processors, require_device, widen
from .hamming_range import range_count_kernel, range_write_kernel
from .hamming_scan import code_distances, load_codes
from .hamming_topk import histogram_kernel, select_kernel
from .rescore import score_kernel

NO_DISTANCE = 2147483647
NO_INDEX = -1
_PAST_ALL_ROWS = torch.iinfo(torch.int64).max  # what an absent candidate is while candidates are in order of index

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
_SCORE_TILE = 2048  # numbers of candidates' vectors that a program of rescore_topk multiplies at once
_MAX_SCORE_COLUMNS = 256
_MAX_SCORE_ROWS = 256


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
    """Codes that one program scans, ``bins`` numbers a query: few queries must fill the device, in bounded scratch."""
    full = ceil_div(_PROGRAMS_PER_PROCESSOR * processors(codes), groups)
    enough = max(ceil_div(processors(codes), groups), codes.shape[0] // (_CODES_PER_BIN * bins))
    spans = max(min(full, enough, _HISTOGRAM_ENTRIES // (queries * bins)), 1)
    return ceil_div(ceil_div(codes.shape[0], spans), _MAX_TILE_CODES) * _MAX_TILE_CODES


# ---- kernels ----

# sizes that would only make more variants of a kernel
_COUNTS = ("query_count", "count", "groups", "group_size", "rows", "column_blocks")


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
    tile = load_codes(codes, index, count, 0, WIDTH, STRIDE, WORDS)
    for query in range(first_query, tl.minimum(first_query + group_size, query_count)):
        distance = code_distances(queries, query, codes, index, count, tile, WIDTH, STRIDE, WORDS)
        tl.store(out + query * count + index, distance, mask=index < count)


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
    # rows without width may have any strides, which a view as words refuses
    if not width or not whole_words or codes.data_ptr() % 4 or codes.stride(1) != 1:
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
    histogram_kernel[grid](histogram, *scan, *shape, **_code_tile(codes))
    places, bounds = _first_places(histogram, k, count)
    select_kernel[grid](distances, indices, places, bounds, *scan, k, *shape, **_code_tile(codes, _MAX_RANKED_CODES))


def hamming_topk_triton(
    queries: Tensor, codes: Tensor, k: int, allowed: Tensor | None = None, code_norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    del code_norms  # for kernels that compute with AND
    require_device("hamming_topk", queries)
    query_count, bins = queries.shape[0], 8 * queries.shape[1] + 1
    queries, codes = _as_words(queries, codes)
    allowed = contiguous(allowed)
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


def hamming_range_triton(
    queries: Tensor, codes: Tensor, radius: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    require_device("hamming_range", queries)
    radius = min(radius, 8 * queries.shape[1] + 1)  # no distance is above; the kernels compare 32 bits
    queries, codes = _as_words(queries, codes)
    allowed = contiguous(allowed)
    query_count, count = queries.shape[0], codes.shape[0]
    offsets = queries.new_zeros(query_count + 1, dtype=torch.int64)
    if query_count == 0 or count == 0:
        return offsets, queries.new_empty(0, dtype=torch.int32), queries.new_empty(0, dtype=torch.int64)
    groups, group_size = _query_groups(query_count)
    span_codes = _span_codes(codes, query_count, groups, bins=1)
    spans = ceil_div(count, span_codes)
    counts = queries.new_zeros((query_count, spans), dtype=torch.int64)
    scan = (queries, codes, allowed, query_count, count, radius, groups, group_size, spans, span_codes)
    grid = (spans * groups,)
    with on_device_of(codes):
        range_count_kernel[grid](counts, *scan, **_code_tile(codes))
        ends = counts.view(-1).cumsum(0).view_as(counts)
        offsets[1:] = ends[:, -1]
        total = int(offsets[-1])  # the one wait for the device: outputs have this size
        distances = queries.new_empty(total, dtype=torch.int32)
        indices = queries.new_empty(total, dtype=torch.int64)
        range_write_kernel[grid](distances, indices, ends - counts, counts, *scan, **_code_tile(codes))
    return offsets, distances, indices


def _score_tile(vectors: Tensor, dim: int) -> dict[str, int]:
    """Compile-time arguments of score_kernel; the layout of the vectors is among them, as for codes."""
    columns = min(triton.next_power_of_2(max(dim, 1)), _MAX_SCORE_COLUMNS)
    stride = vectors.stride(0) if vectors.shape[0] > 1 else vectors.shape[1]
    return {"ROWS": min(_SCORE_TILE // columns, _MAX_SCORE_ROWS), "COLUMNS": columns, "DIM": dim, "STRIDE": stride}


def rescore_topk_triton(
    queries: Tensor, candidates: Tensor, vectors: Tensor, k: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    require_device("rescore_topk", queries)
    query_count, candidate_count = candidates.shape
    scores = queries.new_full((query_count, k), float("-inf"), dtype=torch.float32)
    indices = candidates.new_full((query_count, k), NO_INDEX)
    if candidates.numel() == 0:
        return scores, indices
    queries, vectors, scale = queries.contiguous(), dense_rows(vectors), contiguous(scale)
    absent = (candidates < 0) | (candidates >= vectors.shape[0])
    # in order of index, which a stable sort by score then keeps among equals
    candidates = candidates.masked_fill(absent, _PAST_ALL_ROWS).sort(dim=1).values
    found = torch.empty(candidates.shape, dtype=torch.float32, device=candidates.device)
    keys = torch.empty(candidates.shape, dtype=torch.int32, device=candidates.device)
    tile = _score_tile(vectors, queries.shape[1])
    blocks = ceil_div(candidate_count, tile["ROWS"])
    sizes = (candidate_count, vectors.shape[0], blocks)
    bits = vectors.dtype == torch.uint8
    with on_device_of(vectors):
        score_kernel[(query_count * blocks,)](
            found, keys, queries, candidates, vectors, scale, *sizes, **tile, BITS=bits
        )
    order = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = order.shape[1]
    scores[:, :kept] = found.gather(1, order)
    best = candidates.gather(1, order)
    indices[:, :kept] = best.masked_fill_(best == _PAST_ALL_ROWS, NO_INDEX)
    return scores, indices
