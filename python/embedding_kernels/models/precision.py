"""The narrow precisions of sentence-transformers' `encode`."""

from __future__ import annotations

import torch
from torch import Tensor

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
#: precisions in which a vector is one bit a dimension
BIT_PRECISIONS = ("binary", "ubinary")

_SIGNED_OFFSET = 128
_STEPS = 255


def bits_to_precision(codes: Tensor, precision: str) -> Tensor:
    """uint8 codes as they are for ``"ubinary"``; less 128, as int8, for ``"binary"``."""
    return codes if precision == "ubinary" else (codes.to(torch.int16) - _SIGNED_OFFSET).to(torch.int8)


def quantize(vectors: Tensor, precision: str) -> Tensor:
    """Float32 ``vectors [N, D]`` as ``"int8"`` or ``"uint8"``, as sentence-transformers' `quantize_embeddings` does.

    Each dimension is cut into 256 steps between its smallest and its largest value in ``vectors``.
    """
    if len(vectors) == 0:
        return vectors.to(torch.uint8 if precision == "uint8" else torch.int8)
    lowest, highest = vectors.amin(0), vectors.amax(0)
    step = (highest - lowest) / _STEPS
    step = torch.where(step == 0, 1.0, step)
    steps = ((vectors - lowest) / step).floor_().clamp_(0, _STEPS)
    return steps.to(torch.uint8) if precision == "uint8" else (steps - _SIGNED_OFFSET).to(torch.int8)
