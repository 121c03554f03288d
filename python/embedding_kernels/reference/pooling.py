"""Definitions of the pooling family in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .hamming import pack_bits

#: smallest norm that `normalize` divides by (torch.nn.functional.normalize)
NORM_EPS = 1e-12


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum_over(rows: Tensor, row_weights: Tensor, power: float) -> Tensor:
    total = row_weights.sum()
    if total == 0:
        # zero, but still a function of the rows: the gradient is zero, not absent
        return rows[:0].sum(0)
    return (rows * row_weights[:, None]).sum(0) / total**power


def _pool_rows(rows: Tensor, mode: str, m: int, row_weights: Tensor | None) -> Tensor:
    """Pool one sequence ``rows [L, D]`` into ``[D]`` (``[m, D]`` for first_m)."""
    length = rows.shape[0]
    if mode == "first_m":
        return torch.nn.functional.pad(rows[:m], (0, 0, 0, max(m - length, 0)))
    if length == 0:
        return rows.sum(0)
    if mode in ("mean", "weighted_mean", "mean_sqrt_len"):
        if row_weights is None:
            ones = torch.ones(length, dtype=rows.dtype, device=rows.device)
            row_weights = ones.cumsum(0) if mode == "weighted_mean" else ones
        return _sum_over(rows, row_weights.to(rows.dtype), 0.5 if mode == "mean_sqrt_len" else 1.0)
    if mode == "max":
        # argmax names the first of equal maxima, so their gradient goes there
        return rows.gather(0, rows.argmax(0, keepdim=True)).squeeze(0)
    return rows[0] if mode == "first" else rows[-1]


def segment_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    *,
    m: int = 1,
    weights: Tensor | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Pool ``hidden [T, D]`` over each sequence; computes in float32 (float64 for float64), rounds once at the end."""
    hidden_dim = hidden.shape[1] if truncate_dim is None else truncate_dim
    rows = _at_least_float32(hidden)[:, :hidden_dim]
    offsets = cu_seqlens.tolist()
    pooled = [
        _pool_rows(rows[start:end], mode, m, None if weights is None else weights[start:end])
        for start, end in pairwise(offsets)
    ]
    empty_shape = (0, m, hidden_dim) if mode == "first_m" else (0, hidden_dim)
    out = torch.stack(pooled) if pooled else rows[:0].sum() + rows.new_zeros(empty_shape)
    if normalize:
        out = torch.nn.functional.normalize(out, dim=-1, eps=NORM_EPS)
    return out.to(hidden.dtype if out_dtype is None else out_dtype)


def segment_pool_pack_bits(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    *,
    m: int = 1,
    weights: Tensor | None = None,
    truncate_dim: int | None = None,
) -> Tensor:
    """`pack_bits` of the pooled vectors, which are never rounded to a narrower dtype."""
    pooled = segment_pool(_at_least_float32(hidden), cu_seqlens, mode, m=m, weights=weights, truncate_dim=truncate_dim)
    packed = pack_bits(pooled.flatten(0, -2))
    return packed.view(*pooled.shape[:-1], packed.shape[1])


def pack_padded(padded: Tensor, mask: Tensor, total_tokens: int) -> Tensor:
    """The rows of ``padded [B, S, ...]`` where ``mask [B, S]`` is not 0, in order, ``[total_tokens, ...]``."""
    return padded[mask != 0]


def unpack_padded(packed: Tensor, mask: Tensor) -> Tensor:
    """``packed [T, ...]`` back in the places where ``mask [B, S]`` is not 0; zeros elsewhere."""
    padded = packed.new_zeros(*mask.shape, *packed.shape[1:])
    return padded.masked_scatter((mask != 0).view(*mask.shape, *[1] * (packed.dim() - 1)), packed)
