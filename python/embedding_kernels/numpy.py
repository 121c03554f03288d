"""The Hamming family for NumPy arrays, without torch: threads of its own, the interpreter's lock released.

The functions keep the contract of the operators of the same names, with arrays for tensors. Memory maps, read-only
arrays and strided rows (a prefix of the bytes) are read in place; only a last dimension that is not dense is copied.
``num_threads`` 0 means one for each core. An interrupt (Ctrl-C) is raised when the running call returns.
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


def _whole(op: str, argument: str, value: int, low: int) -> int:
    if not isinstance(value, (int, np.integer)):
        _refuse(op, argument, f"an integer of at least {low}", repr(value))
    if value < low:
        _refuse(op, argument, f"at least {low}", str(value))
    return int(value)


def _dense_rows(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself, strided rows and all, where the kernels can read it in place; else a copy."""
    dense = array.shape[1] <= 1 or array.strides[1] == array.itemsize
    return array if dense and array.flags.aligned else np.ascontiguousarray(array)


def _codes(op: str, argument: str, value: ArrayLike, rows: str) -> NDArray[np.uint8]:
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 2:
        _refuse(op, argument, f"a uint8 array [{rows}, B]", _describe(array))
    return _dense_rows(array)


def _pair(op: str, queries: ArrayLike, codes: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    first, second = _codes(op, "queries", queries, "Q"), _codes(op, "codes", codes, "N")
    if first.shape[1] != second.shape[1]:
        _refuse(op, "codes", f"of size {first.shape[1]} in dimension 1 (the width of queries)", _describe(second))
    return first, second


def _mask(op: str, codes: NDArray[np.uint8], allowed: ArrayLike | None) -> NDArray[np.uint8] | None:
    if allowed is None:
        return None
    mask = np.asarray(allowed)
    if mask.dtype != np.uint8 or mask.ndim != 1:
        _refuse(op, "allowed", "a uint8 array [ceil(N / 8)]", _describe(mask))
    size = (len(codes) + 7) // 8
    if len(mask) != size:
        _refuse(op, "allowed", f"of size {size} in dimension 0 (one bit a code)", _describe(mask))
    return np.ascontiguousarray(mask)


def pack_bits(x: ArrayLike, *, num_threads: int = 0) -> NDArray[np.uint8]:
    """Bits ``x > 0`` of a float32 or float16 array ``[N, D]``, uint8 ``[N, ceil(D / 8)]``, top bit first.

    Raises ValueError for another dtype or rank.
    """
    op = "pack_bits"
    array = np.asarray(x)
    if array.dtype not in (np.float32, np.float16) or array.ndim != 2:
        _refuse(op, "x", "a float32 or float16 array [N, D]", _describe(array))
    return _host.pack_bits(_dense_rows(array), _whole(op, "num_threads", num_threads, 0))


def hamming_distance(queries: ArrayLike, codes: ArrayLike, *, num_threads: int = 0) -> NDArray[np.int32]:
    """Differing bits of ``queries [Q, B]`` and ``codes [N, B]`` (uint8), int32 ``[Q, N]``."""
    op = "hamming_distance"
    return _host.hamming_distance(*_pair(op, queries, codes), _whole(op, "num_threads", num_threads, 0))


def hamming_topk(
    queries: ArrayLike, codes: ArrayLike, k: int, *, allowed: ArrayLike | None = None, num_threads: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ``k`` nearest codes of each query: distances int32 and indices int64, both ``[Q, k]``.

    Sorted by (distance, index); places past the last code hold 2147483647 and -1. ``allowed`` uint8
    ``[ceil(N / 8)]``, packed as `pack_bits` packs, leaves out the codes whose bit is 0.
    """
    op = "hamming_topk"
    first, second = _pair(op, queries, codes)
    k = _whole(op, "k", k, 1)
    mask = _mask(op, second, allowed)
    return _host.hamming_topk(first, second, k, mask, _whole(op, "num_threads", num_threads, 0))


def hamming_range(
    queries: ArrayLike, codes: ArrayLike, radius: int, *, allowed: ArrayLike | None = None, num_threads: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """All codes nearer to a query than ``radius`` bits: offsets int64 ``[Q + 1]``, distances int32 and indices int64.

    The answers of query q are ``offsets[q]`` to ``offsets[q + 1]``, in ascending order of index. ``allowed`` as in
    `hamming_topk`.
    """
    op = "hamming_range"
    first, second = _pair(op, queries, codes)
    radius = min(_whole(op, "radius", radius, 0), 8 * first.shape[1] + 1)  # all codes lie within that
    mask = _mask(op, second, allowed)
    return _host.hamming_range(first, second, radius, mask, _whole(op, "num_threads", num_threads, 0))
