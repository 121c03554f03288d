"""Definitions of the Hamming family in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

#: what stands in a place of the top-k that no code fills (FAISS's values)
NO_DISTANCE = 2147483647
NO_INDEX = -1

_BIT_VALUES = (128, 64, 32, 16, 8, 4, 2, 1)


def pack_bits(x: Tensor) -> Tensor:
    """Bits x > 0 of ``x [N, D]``, eight to a byte, dimension 0 in the top bit of byte 0."""
    rows, dim = x.shape
    bits = torch.nn.functional.pad((x > 0).to(torch.uint8), (0, -dim % 8))
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=x.device)
    return (bits.view(rows, (dim + 7) // 8, 8) * values).sum(-1, dtype=torch.uint8)


def unpack_bits(codes: Tensor) -> Tensor:
    """``codes [..., B]`` uint8 to bits uint8 ``[..., 8 * B]``: the inverse of `pack_bits`."""
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) & values) != 0).to(torch.uint8).flatten(-2)


def hamming_distance(queries: Tensor, codes: Tensor) -> Tensor:
    """Number of bits in which ``queries [Q, B]`` and ``codes [N, B]`` differ, int32 ``[Q, N]``."""
    # over bits a, b in {0, 1}: a xor b = a + b - 2 a b; float64 counts bits exactly
    a, b = unpack_bits(queries).double(), unpack_bits(codes).double()
    return (a.sum(-1)[:, None] + b.sum(-1)[None, :] - 2 * (a @ b.T)).to(torch.int32)


def hamming_topk(
    queries: Tensor, codes: Tensor, k: int, *, allowed: Tensor | None = None, code_norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest codes of each query by (distance, index); the places past the last code are filled."""
    del code_norms  # the number of ones in each code: redundant, a help to kernels that compute with AND
    distance = hamming_distance(queries, codes)
    index = torch.arange(codes.shape[0], device=codes.device)
    if allowed is not None:
        index = index[unpack_bits(allowed)[: codes.shape[0]] != 0]
        distance = distance[:, index]
    # a stable sort by distance leaves equal distances in the order of their indices
    distance, order = torch.sort(distance, dim=1, stable=True)
    distance, indices = distance[:, :k], index[order[:, :k]]
    missing = max(k - distance.shape[1], 0)
    pad = torch.nn.functional.pad
    return pad(distance, (0, missing), value=NO_DISTANCE), pad(indices, (0, missing), value=NO_INDEX)


def hamming_range(
    queries: Tensor, codes: Tensor, radius: int, *, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All codes nearer than ``radius`` to each query, in the order of their indices."""
    distance = hamming_distance(queries, codes)
    near = distance.long() < radius  # a radius past 32 bits would wrap
    if allowed is not None:
        near &= unpack_bits(allowed)[: codes.shape[0]] != 0
    offsets = torch.nn.functional.pad(near.sum(1).cumsum(0), (1, 0))
    return offsets, distance[near], near.nonzero()[:, 1]


def rescore_topk(
    queries: Tensor, candidates: Tensor, vectors: Tensor, k: int, *, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of each query's candidates by inner product, by (-score, index)."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    queries = queries.to(dtype)
    absent = (candidates < 0) | (candidates >= vectors.shape[0])
    if vectors.shape[0] == 0:  # then every candidate is absent, and a row of zeros will do
        vectors = vectors.new_zeros(1, vectors.shape[1])
    rows = vectors[candidates.masked_fill(absent, 0)]
    if vectors.dtype == torch.uint8:
        bits = unpack_bits(rows)[..., : queries.shape[1]]  # the last byte may hold more
        # a sum of the chosen values: a bit of 0 keeps infinities and NaN out
        scores = torch.where(bits != 0, queries[:, None], 0).sum(-1)
    else:
        rows = rows.to(dtype)
        if scale is not None:
            rows = rows * scale.to(dtype)
        # not a matrix product, which may round equal rows apart
        scores = (queries[:, None] * rows).sum(-1)
    order = torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)
    # the last key decides first; a score that is not a number comes after every number
    for key in (candidates, -scores.nan_to_num(-torch.inf, torch.inf, -torch.inf), absent.to(torch.int8)):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    order = order[:, :k]
    scores = scores.masked_fill(absent, -torch.inf).gather(1, order)
    indices = candidates.masked_fill(absent, NO_INDEX).gather(1, order)
    missing = max(k - candidates.shape[1], 0)
    pad = torch.nn.functional.pad
    return pad(scores, (0, missing), value=-torch.inf), pad(indices, (0, missing), value=NO_INDEX)
