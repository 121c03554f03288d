"""What the packed forwards of our own share: rows that are kept, and checks that the model is still as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: where a module hangs, its name there, and the module
Part = tuple[dict[str, Any], str, Any]


@dataclass(frozen=True)
class KeptRows:
    """Rows that the last block computes: their numbers [R], offsets [S + 1] and places in their texts, int32 [R]."""

    rows: Tensor
    cu_seqlens: Tensor
    places: Tensor


def kept_rows(last_rows: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> KeptRows:
    rows, offsets = last_rows
    starts = cu_seqlens[:-1].repeat_interleave(offsets.diff(), output_size=len(rows))
    return KeptRows(rows, offsets, (rows - starts).to(torch.int32))


def check_captured(name: str, parts: list[Part]) -> None:
    """ValueError where an adapter was put in the place of a module, which must not be passed over in silence."""
    if any(owner.get(place) is not part for owner, place, part in parts):
        raise ValueError(f"{name}: model must have the layers that it was made with, got others in their place")


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; torch raises for devices that have none."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def head_dim_fits(head_dim: int) -> bool:
    """Whether the attention kernels take heads of that width."""
    return 16 <= head_dim <= 256 and head_dim % 8 == 0


def is_intercepted(module: nn.Module) -> bool:
    """Whether something runs before, after or in place of the module's own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
