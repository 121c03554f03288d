"""Definitions of the attention family in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .pooling import _at_least_float32


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``x [n, H, D]``: dimension i pairs with i + Dr/2, the rest passes through."""
    half = cos.shape[1]
    cos, sin = (table[positions.long()].to(x.dtype)[:, None] for table in (cos, sin))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def _visible(positions_q: Tensor, positions_k: Tensor, causal: bool, left: int, right: int) -> Tensor:
    """``[Lq, Lk]``: whether a query may see a key."""
    offset = positions_k.long()[None] - positions_q.long()[:, None]
    visible = torch.ones_like(offset, dtype=torch.bool)
    if causal:
        visible &= offset <= 0
    if left >= 0:
        visible &= offset >= -left
    if right >= 0:
        visible &= offset <= right
    return visible


def _relative_bias(table: Tensor, positions_q: Tensor, positions_k: Tensor) -> Tensor:
    """``[H, Lq, Lk]``: the table at the clamped key − query."""
    reach = table.shape[1] // 2
    offset = positions_k.long()[None] - positions_q.long()[:, None]
    return table[:, offset.clamp(-reach, reach) + reach]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    bias_table: Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence on its own; computes in float32 (float64 for float64), rounds once at the end."""
    del max_seqlen_q, max_seqlen_k
    wide_q, wide_k, wide_v = (_at_least_float32(x) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(starts_q) - 1):
        rows_q = slice(starts_q[s], starts_q[s + 1])
        used = starts_k[s + 1] - starts_k[s] if seqused_k is None else int(seqused_k[s])
        rows_k = slice(starts_k[s], starts_k[s] + used)
        at_q = torch.arange(rows_q.stop - rows_q.start, device=q.device) if positions_q is None else positions_q[rows_q]
        at_k = torch.arange(used, device=q.device) if positions_k is None else positions_k[rows_k]
        queries, keys, values = wide_q[rows_q], wide_k[rows_k], wide_v[rows_k]
        if rope_cos is not None and rope_sin is not None:
            queries, keys = (_rotate(x, at, rope_cos, rope_sin) for x, at in ((queries, at_q), (keys, at_k)))
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", queries, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if bias_table is not None:
            scores = scores + _relative_bias(bias_table.to(scores.dtype), at_q, at_k)
        visible = _visible(at_q, at_k, causal, window_left, window_right)
        sees = visible.any(-1)
        # a row that sees no key gets harmless scores, so that its gradient is 0 and not NaN
        scores = torch.where(sees[:, None], scores.masked_fill(~visible, -math.inf), 0.0)
        lse = torch.logsumexp(scores, -1) if used else scores.sum(-1)
        weights = torch.exp(scores - lse[..., None]) * sees[:, None]
        outs.append(torch.einsum("hij,jhd->ihd", weights, values))
        lses.append(torch.where(sees, lse, -math.inf))
    if not outs:
        return wide_v.new_zeros((0, q.shape[1], v.shape[2])).to(q.dtype), wide_q.new_zeros((q.shape[1], 0))
    return torch.cat(outs).to(q.dtype), torch.cat(lses, -1)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from the attention over each."""
    empty = torch.isneginf(lse_a) & torch.isneginf(lse_b)
    wide_a, wide_b = (torch.where(empty, 0.0, _at_least_float32(lse)) for lse in (lse_a, lse_b))
    lse = torch.logaddexp(wide_a, wide_b)
    weight_a, weight_b = (torch.where(empty, 0.0, torch.exp(x - lse)).mT[..., None] for x in (wide_a, wide_b))
    # a side without keys counts 0 whatever stands in its rows
    rows_a, rows_b = (
        torch.where(weight == 0, 0.0, weight * _at_least_float32(out))
        for weight, out in ((weight_a, out_a), (weight_b, out_b))
    )
    return (rows_a + rows_b).to(out_a.dtype), torch.where(empty, -math.inf, lse)
