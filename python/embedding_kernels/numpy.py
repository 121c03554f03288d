"""The Hamming family for NumPy arrays, without torch: threads of its own, the interpreter's lock released.

The functions keep the contract of the operators of the same names, with arrays for tensors.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _host


def _refuse(op: str, argument: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _codes(op: str, argument: str, value: ArrayLike, rows: str) -> NDArray[np.uint8]:
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 2:
        _refuse(op, argument, f"a uint8 array [{rows}, B]", _describe(array))
    return np.ascontiguousarray(array)


def _pair(op: str, queries: ArrayLike, codes: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    first, second = _codes(op, "queries", queries, "Q"), _codes(op, "codes", codes, "N")
    if first.shape[1] != second.shape[1]:
        _refuse(op, "codes", f"of size {first.shape[1]} in dimension 1 (the width of queries)", _describe(second))
    return first, second


def pack_bits(x: ArrayLike, *, threads: int = 0) -> NDArray[np.uint8]:
    """Bits ``x > 0`` of a float32 or float16 array ``[N, D]``, uint8 ``[N, ceil(D / 8)]``, top bit first.

    ``threads`` 0 means one for each core. Raises ValueError for another dtype or rank.
    """
    array = np.asarray(x)
    if array.dtype not in (np.float32, np.float16) or array.ndim != 2:
        _refuse("pack_bits", "x", "a float32 or float16 array [N, D]", _describe(array))
    dense = array.shape[1] <= 1 or array.strides[1] == array.itemsize
    return _host.pack_bits(array if dense else np.ascontiguousarray(array), threads)


def hamming_distance(queries: ArrayLike, codes: ArrayLike, *, threads: int = 0) -> NDArray[np.int32]:
    """Differing bits of ``queries [Q, B]`` and ``codes [N, B]`` (uint8), int32 ``[Q, N]``."""
    return _host.hamming_distance(*_pair("hamming_distance", queries, codes), threads)


def hamming_topk(
    queries: ArrayLike, codes: ArrayLike, k: int, *, allowed: ArrayLike | None = None, threads: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ``k`` nearest codes of each query: distances int32 and indices int64, both ``[Q, k]``.

    Sorted by (distance, index); places past the last code hold 2147483647 and -1. ``allowed`` uint8
    ``[ceil(N / 8)]``, packed as `pack_bits` packs, leaves out the codes whose bit is 0.
    """
    op = "hamming_topk"
    first, second = _pair(op, queries, codes)
    if k < 1:
        _refuse(op, "k", "at least 1", str(k))
    mask = None
    if allowed is not None:
        mask = np.asarray(allowed)
        size = (len(second) + 7) // 8
        if mask.dtype != np.uint8 or mask.shape != (size,):
            _refuse(op, "allowed", f"a uint8 array [{size}] (one bit a code)", _describe(mask))
        mask = np.ascontiguousarray(mask)
    return _host.hamming_topk(first, second, k, mask, threads)
