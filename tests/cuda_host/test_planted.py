"""Bugs planted in a kernel, each of which the emulation must catch: by a report, or by a wrong result.

Reports must not depend on luck: they are asked for in every order of threads, whether copies land early or late.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from itertools import product

import numpy as np
import pytest

from cuda_host import backend, build

pytestmark = pytest.mark.skipif(backend.why_not() is not None, reason=str(backend.why_not()))

SCHEDULES = list(product(range(4), (0, 1)))
BUGS = {
    "fragment_off_by_one": (1, None),
    "operands_swapped": (2, None),
    "barrier_missing": (3, "race: a write by an asynchronous copy of thread .* and a read by thread"),
    "wait_missing": (4, "race: a read by thread .* and a write by an asynchronous copy"),
    "wait_off_by_one": (5, "race: a read by thread .* and a write by an asynchronous copy"),
    "store_past_the_end": (6, "out of bounds: write of 4 bytes at byte 1536 of a buffer of 1536 bytes|race: a write"),
    "rows_of_the_neighbour": (7, "two blocks: this one writes a byte that was written by"),
    # the other half of the block meets the first at its own next barrier, too early
    "barrier_in_a_branch": (8, "deadlock|race: |read of a byte that nobody wrote"),
    "unwritten_shared": (9, "read of a byte that nobody wrote, at shared memory"),
    "misaligned": (10, "misaligned: a row of ldmatrix"),
    "shuffle_in_a_branch": (11, "deadlock(.|\n)*wait for shfl.sync.bfly.b32"),
    "return_before_a_barrier": (12, "deadlock(.|\n)*threads 32-63 have ended"),
    "named_barrier_too_few": (13, "deadlock(.|\n)*threads 0-63 wait for a barrier"),
    "copy_reads_past_the_end": (14, "out of bounds: read of 16 bytes at byte"),
    "unknown_instruction": (15, "the emulation does not know `nanosleep.u32`"),
    "local_array_index": (16, "index 1.. is outside its array"),
    "too_much_shared": (17, "a block shares .* bytes and was launched with"),
    "atomic_and_plain": (18, "race: a write by thread|nobody wrote"),
}
LENGTHS = (5, 16, 3)
DEPTH = 64


@cache
def library() -> ctypes.CDLL:
    opened = ctypes.CDLL(str(build.build_kernels(build.HERE / "planted.cu")))
    opened.planted.restype = ctypes.c_char_p
    return opened


def bfloat16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits of values cut to bfloat16, and the values that these are."""
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def run(bug: int, order: int, latest: int) -> tuple[str, bool]:
    """What is reported, and whether the result is right."""
    seeded = np.random.default_rng(0)
    rows = sum(LENGTHS)
    a, wide_a = bfloat16(seeded.standard_normal((rows, DEPTH)))
    b, wide_b = bfloat16(seeded.standard_normal((16, DEPTH)))
    offsets = np.cumsum((0, *LENGTHS)).astype(np.int32)
    out = np.full((rows, 16), np.nan, dtype=np.float32)
    library().embedding_kernels_emulation_options(order, ctypes.c_uint64(order + 1), latest)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (a, b, offsets)]
    report = library().planted(bug, *pointers, len(LENGTHS), DEPTH, out.ctypes.data_as(ctypes.c_void_p)).decode()
    expected = wide_a.astype(np.float64) @ wide_b.astype(np.float64).T
    return report, bool(np.allclose(out, expected, rtol=0, atol=1e-5))


@pytest.mark.parametrize(("order", "latest"), SCHEDULES)
def test_the_right_kernel_is_right_and_nothing_is_reported(order, latest):
    assert run(0, order, latest) == ("", True)


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
    report, _ = run(BUGS["barrier_missing"][0], 0, 0)
    assert report.count("planted.cu:") >= 2, report
    assert "fetch" in report
    assert "multiply" in report
