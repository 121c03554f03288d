"""What every scan of codes shares: their words, distances and the mask of those allowed."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(words):
    """Ones in each int32. LLVM knows this form: it becomes the GPU's own instruction."""
    v = words.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_codes(codes, index, count, first_word, WIDTH: tl.constexpr, STRIDE: tl.constexpr, WORDS: tl.constexpr):
    """Words [first_word, first_word + WORDS) of the rows ``index``, as int32 (bytes are widened); 0 past the end."""
    word = first_word + tl.arange(0, WORDS)
    inside = (index < count)[:, None] & (word < WIDTH)[None, :]
    return tl.load(codes + (index * STRIDE)[:, None] + word[None, :], mask=inside, other=0).to(tl.int32)


@triton.jit
def load_query(queries, query, first_word, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    word = first_word + tl.arange(0, WORDS)
    return tl.load(queries + query * WIDTH + word, mask=word < WIDTH, other=0).to(tl.int32)


@triton.jit
def code_distances(
    queries, query, codes, index, count, tile, WIDTH: tl.constexpr, STRIDE: tl.constexpr, WORDS: tl.constexpr
):
    """Distances of one query to the codes ``index``, whose first WORDS words are at hand in ``tile``."""
    near = load_query(queries, query, 0, WIDTH, WORDS)
    total = tl.sum(popcount(tile ^ near[None, :]), axis=1)
    for first in range(WORDS, WIDTH, WORDS):
        near = load_query(queries, query, first, WIDTH, WORDS)
        far = load_codes(codes, index, count, first, WIDTH, STRIDE, WORDS)
        total += tl.sum(popcount(far ^ near[None, :]), axis=1)
    return total


@triton.jit
def is_allowed(allowed, index, count):
    passed = index < count
    if allowed is not None:
        byte = tl.load(allowed + index // 8, mask=passed, other=0).to(tl.int32)
        passed = passed & (((byte >> (7 - index % 8).to(tl.int32)) & 1) != 0)
    return passed
