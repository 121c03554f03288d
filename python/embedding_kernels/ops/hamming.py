"""Binary codes: packing, distances, exact nearest codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    check_range,
    check_same_device,
    check_size,
    check_tensor,
    describe,
    refuse,
    values_readable,
)
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
    _check_allowed(op, queries, codes, allowed)
    if code_norms is not None:
        check_tensor(op, "code_norms", code_norms, "an int32 tensor [N]", (torch.int32,), 1)
        check_size(op, "code_norms", code_norms, 0, codes.shape[0], "one for each code")
    check_same_device(op, "queries", queries, code_norms=code_norms)


def _fake_hamming_topk(
    queries: Tensor, codes: Tensor, k: int, allowed: Tensor | None = None, code_norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


def hamming_range(
    queries: Tensor, codes: Tensor, radius: int, *, allowed: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All codes nearer to a query than ``radius`` (FAISS's ``range_search``).

    The number of answers depends on the values: on a GPU the call waits for it, and no CUDA graph can hold it.

    Args:
        queries: uint8 ``[Q, B]``, packed as `pack_bits` packs.
        codes: uint8 ``[N, B]``. Rows may be strided, so a prefix of the bytes is a view.
        radius: in bits, at least 0; a code at a distance below it is an answer.
        allowed: as in `hamming_topk`.
        backend: as in `pack_bits`.

    Returns:
        offsets int64 ``[Q + 1]``, distances int32 ``[M]`` in bits and indices int64 ``[M]``: the answers of query q
        are ``offsets[q]`` to ``offsets[q + 1]``, in ascending order of index.

    Raises:
        ValueError: another dtype or rank, differing widths or devices, radius < 0.
    """
    return call(_HAMMING_RANGE, backend, queries, codes, radius, allowed)


def _check_allowed(op: str, queries: Tensor, codes: Tensor, allowed: Tensor | None) -> None:
    if allowed is not None:
        check_tensor(op, "allowed", allowed, "a uint8 tensor [ceil(N / 8)]", (torch.uint8,), 1)
        check_size(op, "allowed", allowed, 0, (codes.shape[0] + 7) // 8, "one bit a code")
        check_same_device(op, "queries", queries, allowed=allowed)


def _check_hamming_range(queries: Tensor, codes: Tensor, radius: int, allowed: Tensor | None = None) -> None:
    op = "hamming_range"
    _check_codes(op, queries, codes)
    check_range(op, "radius", radius, 0)
    _check_allowed(op, queries, codes, allowed)


def _fake_hamming_range(
    queries: Tensor, codes: Tensor, radius: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        queries.new_empty(queries.shape[0] + 1, dtype=torch.int64),
        queries.new_empty(found, dtype=torch.int32),
        queries.new_empty(found, dtype=torch.int64),
    )


_FLOAT_QUERIES = 'a float32, bfloat16 or float16 tensor [Q, D] (float64 runs with backend="reference")'
_RESCORE_VECTORS = "a float32, bfloat16, float16 or int8 tensor [N, D] or a uint8 tensor [N, ceil(D / 8)]"


def rescore_topk(
    queries: Tensor,
    candidates: Tensor,
    vectors: Tensor,
    k: int,
    *,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Put candidates in order by inner product with the float query and keep the ``k`` best: the second step of a
    search that finds candidates by their codes.

    ``score[q, c] = sum_d queries[q, d] * v[candidates[q, c], d]`` with v the vectors, int8 vectors times ``scale``, or
    bits 0 and 1 (Yamada et al., "Efficient Passage Retrieval with Hashing", 2021), which choose the dimensions that are
    summed: what a bit of 0 leaves out has no part in the score, be it infinite or NaN.

    Args:
        queries: float32, bfloat16 or float16 ``[Q, D]``; float64 with ``backend="reference"``.
        candidates: int64 ``[Q, C]``, rows of ``vectors``; -1 is passed over, as `hamming_topk` fills with it. One that
            stands twice is answered twice.
        vectors: float32, bfloat16, float16 or int8 ``[N, D]``, or packed bits, uint8 ``[N, ceil(D / 8)]``. Rows may be
            strided.
        k: how many, at least 1; may exceed C.
        scale: float32 ``[D]``, the value of 1 in each dimension of int8 vectors; for no others.
        backend: as in `pack_bits`.

    Returns:
        scores float32 and indices int64 ``[Q, k]``, highest score first, ties by the lowest index; a score that is not
        a number stands where -inf would. Places past the last candidate hold -inf and -1. Not differentiable.

    Raises:
        ValueError: another dtype or rank, sizes that do not fit, differing devices, k < 1, a candidate past the last
            row (on a GPU only under ``EMBEDDING_KERNELS_CHECK=1``; it is passed over otherwise).
    """
    return call(_RESCORE_TOPK, backend, queries, candidates, vectors, k, scale)


def _check_rescore_topk(
    queries: Tensor, candidates: Tensor, vectors: Tensor, k: int, scale: Tensor | None = None
) -> None:
    op = "rescore_topk"
    check_tensor(op, "queries", queries, _FLOAT_QUERIES, FLOATS, 2)
    check_tensor(op, "candidates", candidates, "an int64 tensor [Q, C]", (torch.int64,), 2)
    check_size(op, "candidates", candidates, 0, queries.shape[0], "one row a query")
    check_tensor(op, "vectors", vectors, _RESCORE_VECTORS, (*FLOATS, torch.int8, torch.uint8), 2)
    if vectors.dtype == torch.uint8:
        check_size(op, "vectors", vectors, 1, (queries.shape[1] + 7) // 8, "the bits of queries")
    else:
        check_size(op, "vectors", vectors, 1, queries.shape[1], "the width of queries")
    check_range(op, "k", k, 1)
    if vectors.dtype == torch.int8:
        if scale is None:
            refuse(op, "scale", "given for int8 vectors", "None")
        check_tensor(op, "scale", scale, "a float32 tensor [D]", (torch.float32,), 1)
        check_size(op, "scale", scale, 0, queries.shape[1], "the width of queries")
    elif scale is not None:
        refuse(op, "scale", "None for vectors that are not int8", describe(scale))
    check_same_device(op, "queries", queries, candidates=candidates, vectors=vectors, scale=scale)
    if values_readable(candidates) and candidates.numel():
        last = int(candidates.max())
        if last >= vectors.shape[0]:
            refuse(op, "candidates", f"below {int(vectors.shape[0])} (the number of vectors)", str(last))


def _fake_rescore_topk(
    queries: Tensor, candidates: Tensor, vectors: Tensor, k: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


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
_HAMMING_RANGE = register(
    "hamming_range",
    family="hamming",
    check=_check_hamming_range,
    fake=_fake_hamming_range,
    flops=lambda queries, codes, *rest: 2 * 8 * queries[0] * queries[1] * codes[0],
)
_RESCORE_TOPK = register(
    "rescore_topk",
    family="hamming",
    check=_check_rescore_topk,
    fake=_fake_rescore_topk,
    flops=lambda queries, candidates, *rest: 2 * queries[1] * candidates[0] * candidates[1],
)
