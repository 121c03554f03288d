"""Definitions of the latent attention family in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .pooling import segment_pool


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def grouped_softmax(scores: Tensor, groups: int) -> Tensor:
    """Softmax of each row within ``groups`` groups of columns."""
    grouped = _wide(scores).reshape(scores.shape[0], groups, scores.shape[1] // groups)
    return torch.softmax(grouped, -1).to(scores.dtype).flatten(1)


def geglu_segment_pool(
    hidden: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean of value * gelu(gate) over the rows of each sequence."""
    wide = _wide(hidden) if bias is None else _wide(hidden) + bias.to(_wide(hidden).dtype)
    value, gate = wide.chunk(2, -1)
    gated = value * functional.gelu(gate)
    return segment_pool(gated, cu_seqlens, "mean", weights=weights, out_dtype=out_dtype or hidden.dtype)


__all__ = ["geglu_segment_pool", "grouped_softmax"]
