"""Vectors as they are kept for rescoring."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import as_tensor

_LARGEST = 127  # of int8; -128 is not used, so that both signs reach as far


def int8_scale(vectors: np.ndarray | Tensor, scale: Tensor | None, step: int) -> Tensor | None:
    """The scale of int8 vectors, float32 ``[D]``: ``scale``, or found in these where it is None.

    Raises:
        ValueError: values that are not finite.
    """
    largest = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for start in range(0, len(vectors), step):
        block = as_tensor(vectors[start : start + step]).detach()
        largest = torch.maximum(largest, block.abs().amax(0).double().cpu())
    if not bool(largest.isfinite().all()):
        raise ValueError("add: vectors must be finite to be kept as int8, got infinity or NaN")
    if scale is not None or not len(vectors):
        return scale
    # a dimension that is 0 so far is given the range of the widest
    widest = largest.max() if bool(largest.max() > 0) else largest.new_ones(())
    found = (torch.where(largest > 0, largest, widest) / _LARGEST).float()
    return found.clamp(min=torch.finfo(torch.float32).tiny)


def to_kept(vectors: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Vectors at the precision ``dtype``; int8 ones are rounded to the nearest step and clipped."""
    if dtype != torch.int8:
        return vectors.to(dtype)
    assert scale is not None
    return (vectors.double() / scale.to(vectors.device)).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
