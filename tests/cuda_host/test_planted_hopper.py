"""Bugs planted in a kernel of Hopper's own instructions, each of which the emulation must catch: by a report, or by a
wrong result, in every order of threads, whether copies land and products are made early or late."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_host import backend, build

pytestmark = pytest.mark.skipif(backend.why_not() is not None, reason=str(backend.why_not()))

SCHEDULES = list(product(range(4), (0, 1)))
NOT_ORDERED = "{} by {} and {} by {} are not ordered"
LOAD, STORE, PRODUCT = (
    "a copy for the barrier in shared memory . [0-9]+",
    "a bulk store of thread 128",
    "a product of warpgroup 1",
)
# the stage is overwritten while a product may read it
OVERWRITTEN = NOT_ORDERED.format("a write", LOAD, "a read", PRODUCT)
READ_EARLY = NOT_ORDERED.format("a read", PRODUCT, "a write", LOAD)
BUGS = {
    "released_before_the_wait": (1, OVERWRITTEN),
    "fence_missing_before_a_product": (2, f"missing proxy fence .* a write by thread .* and a read by {PRODUCT}"),
    "fence_missing_before_a_store": (3, f"missing proxy fence .* a write by thread .* and a read by {STORE}"),
    "too_few_bytes_expected": (4, "a copy of 8192 bytes, of which 0 are expected"),
    "too_many_bytes_expected": (5, "deadlock(.|\n)*threads 128-255 wait for phase 0 .* 16 of 16400 bytes"),
    "not_swizzled": (6, None),
    "descriptor_off": (7, f"{READ_EARLY}|nobody wrote"),
    "full_not_awaited": (8, f"{READ_EARLY}|nobody wrote"),
    "wrong_parity": (9, f"{READ_EARLY}|nobody wrote|deadlock(.|\n)*threads 128-255 wait for phase 1"),
    "sums_used_early": (10, "sums are touched before wait_products"),
    "factor_overwritten": (11, "a factor is overwritten before wait_products"),
    "begin_missing": (12, "a product without begin_products"),
    "barriers_not_published": (13, "the copy engine was not shown by publish_barriers"),
    "barriers_not_synced": (14, "the beginning, by thread 0, are not ordered|a barrier that was not begun"),
    "box_reused": (15, NOT_ORDERED.format("a write", "thread [0-9]+", "a read", STORE)),
    "warp_missing": (16, "deadlock(.|\n)*threads 128-159, 192-255 wait for wgmma"),
    "row_off": (17, None),
    "row_of_the_neighbour": (18, "two blocks: this one writes a byte that was written by"),
    "free_not_awaited": (
        19,
        f"too many arrivals|{OVERWRITTEN}|{NOT_ORDERED.format('a write', LOAD, 'a write', LOAD)}",
    ),
    "one_warp_releases": (20, OVERWRITTEN),
    "registers_odd": (21, "setmaxnreg of 100 registers"),
    "ends_before_the_stores": (22, "a thread ends while its bulk stores may still read"),
    "barrier_touched": (23, "where a barrier was begun|race: "),
    "box_misplaced": (24, "misaligned: a box at shared memory . 128, which is no multiple of 1024"),
    "rows_taken_for_columns": (25, None),
    "panels_one_behind_the_other": (26, None),
    "too_many_arrivals": (27, f"too many arrivals|{OVERWRITTEN}"),
    "arrival_missing": (28, "deadlock(.|\n)*missing: 1 of 5 arrivals"),
    "barrier_not_begun": (29, "a barrier that was not begun"),
    "read_before_the_wait": (30, f"{NOT_ORDERED.format('a read', 'thread [0-9]+', 'a write', LOAD)}|nobody wrote"),
    "too_much_shared": (31, "launch failed: 233472 bytes of shared memory"),
    "copy_nobody_awaits": (32, "nobody has waited for copies: phase"),
    "erased_not_published": (34, f"missing proxy fence .* a write by thread .* and a write by {LOAD}"),
    "global_store_before": (35, "missing proxy fence .* a write by thread 128 and a write by the global side"),
    "column_off": (36, "misaligned: a box whose innermost coordinate, 4,"),
    "factor_changed_after_begin": (37, "a register of a product is written between begin_products and the product"),
    "sums_changed_after_begin": (38, "a register of a product is written between begin_products and the product"),
    "commit_missing": (33, f"sums are touched before wait_products|{OVERWRITTEN}"),
}
RIGHT = {"plain": 0, "erased_and_published": 39, "published_after_the_barrier": 40}
LENGTHS = (70, 64, 3, 130)
DEPTH, MIDDLE, COLUMNS = 192, 64, 128

Words = NDArray[np.uint16]


@cache
def library() -> ctypes.CDLL:
    opened = ctypes.CDLL(str(build.build_kernels(build.HERE / "planted_hopper.cu")))
    opened.planted.restype = opened.map_refused.restype = ctypes.c_char_p
    return opened


def rounded(values: NDArray[np.float64]) -> Words:
    """As bfloat16, to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(words: Words) -> NDArray[np.float64]:
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def aligned(words: Words) -> Words:
    """A copy at a multiple of 64 bytes, as CUDA's memory is."""
    room = np.empty(words.nbytes + 64, dtype=np.uint8)
    first = -room.ctypes.data % 64
    placed = room[first : first + words.nbytes].view(np.uint16).reshape(words.shape)
    placed[...] = words
    return placed


def run(bug: int, order: int, latest: int) -> tuple[str, bool]:
    """What is reported, and whether the result is right: to the bit, for all sums are of small integers."""
    seeded = np.random.default_rng(0)
    shapes = ((sum(LENGTHS) + 1, DEPTH), (MIDDLE, DEPTH), (MIDDLE, COLUMNS))
    x, w, v = (aligned(rounded(seeded.integers(-2, 3, shape).astype(np.float64))) for shape in shapes)
    offsets = np.cumsum((0, *LENGTHS)).astype(np.int32)
    out = aligned(np.full((len(x), COLUMNS), 0xFFFF, dtype=np.uint16))
    library().embedding_kernels_emulation_options(order, ctypes.c_uint64(order + 1), latest)
    library().embedding_kernels_emulation_architecture(90)
    x_at, w_at, v_at, offsets_at, out_at = (a.ctypes.data_as(ctypes.c_void_p) for a in (x, w, v, offsets, out))
    report = library().planted(bug, x_at, w_at, v_at, offsets_at, len(LENGTHS), DEPTH, out_at).decode()
    expected = rounded(widened(rounded(widened(x[:-1]) @ widened(w).T)) @ widened(v))
    return report, bool((out[:-1] == expected).all() and (out[-1] == 0xFFFF).all())


@pytest.mark.parametrize(("order", "latest"), SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_the_right_kernel_is_right_and_nothing_is_reported(name, order, latest):
    assert run(RIGHT[name], order, latest) == ("", True)


@pytest.mark.parametrize(("order", "latest"), SCHEDULES)
@pytest.mark.parametrize("name", BUGS)
def test_bugs(name, order, latest):
    bug, expected = BUGS[name]
    report, right = run(bug, order, latest)
    if expected is None:
        assert (report, right) == ("", False)
    else:
        assert re.search(expected, report), report


def test_reports_name_the_lines_of_both_sides():
    report, _ = run(BUGS["released_before_the_wait"][0], 0, 0)
    assert "produce" in report
    assert report.count("ptx_hopper.cuh:") == 2, report


def refusal(
    data: int = 1 << 20,
    sizes: Sequence[int] = (64, 8, 100),
    strides: Sequence[int] = (2, 128, 1024),
    box: Sequence[int] = (64, 1, 64),
    swizzled: bool = True,
) -> str:
    arrays = [(ctypes.c_uint64 * len(sizes))(*sizes), (ctypes.c_uint64 * len(strides))(*strides)]
    box_array = (ctypes.c_uint32 * len(box))(*box)
    return library().map_refused(ctypes.c_uint64(data), len(sizes), *arrays, box_array, int(swizzled)).decode()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "^$"),
        ({"data": (1 << 20) + 8}, "multiple of 16"),
        ({"sizes": (64, 0, 100)}, "size"),
        ({"sizes": (64, 8, (1 << 32) + 1)}, "size"),
        ({"strides": (2, 136, 1024)}, "stride that is no multiple of 16"),
        ({"strides": (2, 128, 1 << 40)}, "stride of 2.40"),
        ({"strides": (2, 128, 0)}, "stride of 0"),
        ({"box": (64, 0, 64)}, "box"),
        ({"box": (64, 1, 257)}, "box"),
        ({"box": (4, 1, 64)}, "rows are no multiple of 16"),
        ({"box": (128, 1, 64)}, "more than 128 bytes"),
        ({"box": (128, 1, 64), "swizzled": False}, "^$"),
        ({"sizes": (8,) * 6, "strides": (16,) * 6, "box": (8,) * 6}, "rank"),
    ],
)
def test_maps_that_the_driver_refuses(changed, expected):
    assert re.search(expected, refusal(**changed))
