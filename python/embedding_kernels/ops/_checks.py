"""Refusals of bad input, in the words that the C++ kernels use too: op, argument, expected, got."""

from __future__ import annotations

import os
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} [{', '.join(str(int(size)) for size in tensor.shape)}]"


def refuse(op: str, argument: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def check_tensor(
    op: str, argument: str, value: object, expected: str, dtypes: tuple[torch.dtype, ...], rank: int
) -> None:
    """`expected` is the whole phrase of the message; dtypes () means any."""
    if not isinstance(value, Tensor):
        refuse(op, argument, expected, type(value).__name__)
    if (dtypes and value.dtype not in dtypes) or value.dim() != rank:
        refuse(op, argument, expected, describe(value))


def check_size(op: str, argument: str, tensor: Tensor, dim: int, size: int, meaning: str) -> None:
    if tensor.shape[dim] != size:
        refuse(op, argument, f"of size {int(size)} in dimension {dim} ({meaning})", describe(tensor))


def check_same_device(op: str, first: str, first_tensor: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first_tensor.device:
            refuse(op, name, f"on the device of {first} ({first_tensor.device})", str(tensor.device))


def check_range(op: str, argument: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {int(low)}" if high is None else f"from {int(low)} to {int(high)}"
        refuse(op, argument, expected, str(int(value)))


def values_readable(tensor: Tensor) -> bool:
    """Whether the values may be looked at: always on the CPU, elsewhere only where the caller asked for the sync."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("EMBEDDING_KERNELS_CHECK") == "1"


def check_offsets(op: str, argument: str, offsets: Tensor, total: int) -> None:
    """Values of ``cu_seqlens``: from 0, never falling, to ``total``."""
    if not values_readable(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        refuse(op, argument, "0 in its first place", str(first))
    falls = torch.nonzero(offsets[1:] < offsets[:-1])
    if falls.numel():
        place = int(falls[0]) + 1
        refuse(
            op, argument, "non-decreasing", f"{int(offsets[place])} after {int(offsets[place - 1])} in place {place}"
        )
    if last != total:
        refuse(op, argument, f"{int(total)} in its last place (the number of rows)", str(last))
