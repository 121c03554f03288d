"""Binary codes: packing, distances, exact nearest codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import FLOATS, check_range, check_same_device, check_size, check_tensor
from ._registry import call, register

_FLOAT_ROWS = 'a float32, bfloat16 or float16 tensor [N, D] (float64 runs with backend="reference")'
_CODES = "a uint8 tensor [{}, B]"


def pack_bits(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Binarise vectors: bit d of row n is ``x[n, d] > 0``.

    Args:
        x: float32, bfloat16 or float16 ``[N, D]``; float64 with ``backend="reference"``.
        backend: "reference", "cpu", "triton" or "cuda"; None leaves it to `use_backend` and the device.

    Returns:
        uint8 ``[N, ceil(D / 8)]``: dimension 0 is the top bit of byte 0 (``numpy.packbits``, sentence-transformers'
        ``ubinary``); the last byte is filled with zeros. NaN gives 0.

    Raises:
        ValueError: another dtype or rank.
    """
    return call(_PACK_BITS, backend, x)


def _check_pack_bits(x: Tensor) -> None:
    check_tensor("pack_bits", "x", x, _FLOAT_ROWS, FLOATS, 2)


def _fake_pack_bits(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8)


def hamming_distance(queries: Tensor, codes: Tensor, *, backend: str | None = None) -> Tensor:
    """Hamming distance of every query to every code: ``popcount(queries[q] xor codes[n])``.

    Args:
        queries: uint8 ``[Q, B]``, packed as `pack_bits` packs.
        codes: uint8 ``[N, B]``. Rows may be strided, so a prefix of the bytes is a view.
        backend: as in `pack_bits`.

    Returns:
        int32 ``[Q, N]``, in bits.

    Raises:
        ValueError: another dtype or rank, differing widths or devices.
    """
    return call(_HAMMING_DISTANCE, backend, queries, codes)


def _check_codes(op: str, queries: Tensor, codes: Tensor) -> None:
    check_tensor(op, "queries", queries, _CODES.format("Q"), (torch.uint8,), 2)
    check_tensor(op, "codes", codes, _CODES.format("N"), (torch.uint8,), 2)
    check_size(op, "codes", codes, 1, queries.shape[1], "the width of queries")
    check_same_device(op, "queries", queries, codes=codes)


def _check_hamming_distance(queries: Tensor, codes: Tensor) -> None:
    _check_codes("hamming_distance", queries, codes)


def _fake_hamming_distance(queries: Tensor, codes: Tensor) -> Tensor:
    return queries.new_empty((queries.shape[0], codes.shape[0]), dtype=torch.int32)


def hamming_topk(
    queries: Tensor,
    codes: Tensor,
    k: int,
    *,
    allowed: Tensor | None = None,
    code_norms: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest codes of every query, exactly, without forming ``[Q, N]``.

    Args:
        queries: uint8 ``[Q, B]``, packed as `pack_bits` packs.
        codes: uint8 ``[N, B]``. Rows may be strided, so a prefix of the bytes is a view.
        k: how many, at least 1; may exceed N.
        allowed: uint8 ``[ceil(N / 8)]``, packed as `pack_bits` packs: a code whose bit is 0 is passed over. One mask
            for all queries.
        code_norms: int32 ``[N]``, the number of ones in each code: saves kernels that compute
            ``|a| + |b| - 2 |a and b|`` a pass; the others do not read it.
        backend: as in `pack_bits`.

    Returns:
        distances int32 ``[Q, k]`` in bits and indices int64 ``[Q, k]``, sorted by (distance, index), so that ties go
        to the lowest index. Places past the last code hold 2147483647 and -1, as in FAISS.

    Raises:
        ValueError: another dtype or rank, differing widths or devices, k < 1.
    """
    return call(_HAMMING_TOPK, backend, queries, codes, k, allowed, code_norms)


def _check_hamming_topk(
    queries: Tensor, codes: Tensor, k: int, allowed: Tensor | None = None, code_norms: Tensor | None = None
) -> None:
    op = "hamming_topk"
    _check_codes(op, queries, codes)
    check_range(op, "k", k, 1)
    count = codes.shape[0]
    if allowed is not None:
        check_tensor(op, "allowed", allowed, "a uint8 tensor [ceil(N / 8)]", (torch.uint8,), 1)
        check_size(op, "allowed", allowed, 0, (count + 7) // 8, "one bit a code")
    if code_norms is not None:
        check_tensor(op, "code_norms", code_norms, "an int32 tensor [N]", (torch.int32,), 1)
        check_size(op, "code_norms", code_norms, 0, count, "one for each code")
    check_same_device(op, "queries", queries, allowed=allowed, code_norms=code_norms)


def _fake_hamming_topk(
    queries: Tensor, codes: Tensor, k: int, allowed: Tensor | None = None, code_norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


# FLOPs of the Hamming family: one comparison a bit, as the product of +-1 vectors would count a multiply and an add
_PACK_BITS = register(
    "pack_bits",
    family="hamming",
    check=_check_pack_bits,
    fake=_fake_pack_bits,
    flops=lambda x: x[0] * x[1],
)
_HAMMING_DISTANCE = register(
    "hamming_distance",
    family="hamming",
    check=_check_hamming_distance,
    fake=_fake_hamming_distance,
    flops=lambda queries, codes: 2 * 8 * queries[0] * queries[1] * codes[0],
)
_HAMMING_TOPK = register(
    "hamming_topk",
    family="hamming",
    check=_check_hamming_topk,
    fake=_fake_hamming_topk,
    flops=lambda queries, codes, *rest: 2 * 8 * queries[0] * queries[1] * codes[0],
)
