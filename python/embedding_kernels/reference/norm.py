"""Definitions of the norm family in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def _norm(rows: Tensor, factor: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    values = rows - rows.mean(-1, keepdim=True) if centred else rows
    normal = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * factor
    return normal if bias is None else normal + bias


def _wide(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float = 1e-6, one_plus_weight: bool = False
) -> tuple[Tensor, Tensor]:
    """RMS norm of ``x + residual`` and that sum; no sum (``[0]``) without a residual."""
    summed = x if residual is None else x + residual
    factor = _wide(weight, x) + 1 if one_plus_weight else _wide(weight, x)
    normed = _norm(_wide(summed, x), factor, None, eps, centred=False).to(x.dtype)
    return normed, x.new_empty(0) if residual is None else summed


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Layer norm of ``x + residual`` and that sum; no sum (``[0]``) without a residual."""
    summed = x if residual is None else x + residual
    shift = None if bias is None else _wide(bias, x)
    normed = _norm(_wide(summed, x), _wide(weight, x), shift, eps, centred=True).to(x.dtype)
    return normed, x.new_empty(0) if residual is None else summed


def token_prepend(hidden: Tensor, source_rows: Tensor, target_rows: Tensor) -> Tensor:
    """The rows with each target replaced by its source; all sources are read first."""
    rows = torch.arange(hidden.shape[0], device=hidden.device).index_put((target_rows,), source_rows)
    # widened for the gradient alone, which adds up the copies of a row
    return _wide(hidden, hidden)[rows].to(hidden.dtype)


def token_prepend_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    source_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    one_plus_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMS norm of the sum after the copies, and that sum."""
    summed = token_prepend(x if residual is None else x + residual, source_rows, target_rows)
    return add_rms_norm(summed, None, weight, eps=eps, one_plus_weight=one_plus_weight)[0], summed
