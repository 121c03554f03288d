"""Triton kernels of pack_padded and unpack_padded: copies of whole rows, of any dtype; `pooling` launches them."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from ._support import first_above

# sizes that would only make more variants of a kernel
_COUNTS = ("rows", "entries", "length", "total")


@triton.jit(do_not_specialize=_COUNTS)
def pack_padded_kernel(
    out,
    padded,
    kept_before,
    rows,
    entries,
    length,
    columns,
    batch_stride,
    row_stride,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Row t of the packed layout is where the count of kept entries (inclusive) first passes t; 0 past the last."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = first_above(kept_before, entries, row, STEPS)
    found = entry < entries
    source = padded + (entry // length) * batch_stride + (entry % length) * row_stride
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(source[:, None] + column[None, :], mask=inside & found[:, None], other=0)
        tl.store(out + (row * columns)[:, None] + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def unpack_padded_kernel(
    out,
    packed,
    mask,
    kept,
    entries,
    total,
    columns,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(kept + entry, mask=entry < entries, other=0) - 1
    is_kept = tl.load(mask + entry, mask=entry < entries, other=0).to(tl.int32) != 0
    is_kept = is_kept & (row < total)
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = (entry < entries)[:, None] & (column < columns)[None, :]
        value = tl.load(packed + (row * row_stride)[:, None] + column[None, :], mask=inside & is_kept[:, None], other=0)
        tl.store(out + (entry * columns)[:, None] + column[None, :], value, mask=inside)
