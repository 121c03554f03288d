"""What the Triton kernels of every family share: where they can run, row layout, rounding, search, spans."""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

#: true under TRITON_INTERPRET=1, which is read when triton is imported
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def require_device(op: str, tensor: Tensor) -> None:
    if tensor.device.type != "cuda" and not INTERPRETED.value:
        raise RuntimeError(
            f"{op}: backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 set before triton is imported, "
            f"got {tensor.device.type}"
        )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def processors(tensor: Tensor) -> int:
    """How many programs run at once, in units of one multiprocessor."""
    if tensor.device.type == "cuda":
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 2


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def widen(x):
    """To float32, exactly: the interpreter's own conversion of bfloat16 loses the smallest values."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even: the interpreter's own conversion to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        # a NaN must not round up to infinity
        bits = tl.where(x != x, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        rounded = (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def first_above(values, count, keys, STEPS):
    """For each key the first place of the ascending ``values`` that is above it; ``2 ** STEPS`` must exceed count.

    In bounds for any values, ascending or not.
    """
    low = tl.zeros_like(keys)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        above = tl.load(values + middle, mask=open_, other=0) > keys
        high = tl.where(open_ & above, middle, high)
        low = tl.where(open_ & (above == 0), middle + 1, low)
    return low


@triton.jit
def span_of_program(cu_seqlens, program, sequences, total, SPAN: tl.constexpr, STEPS: tl.constexpr):
    """Sequence (-1 where there is none) and number of the span that falls to a program.

    Programs start // SPAN + s and on belong to sequence s: enough for its spans, and found without a list of them.
    """
    low = program * 0
    high = low + sequences
    for _ in range(STEPS):
        middle = (low + high) // 2
        start = tl.load(cu_seqlens + middle, mask=low < high, other=0)
        above = tl.minimum(tl.maximum(start, 0), total) // SPAN + middle > program
        high = tl.where((low < high) & above, middle, high)
        low = tl.where((low < high) & (above == 0), middle + 1, low)
    sequence = low - 1
    start = tl.load(cu_seqlens + sequence, mask=sequence >= 0, other=0)
    return sequence, program - sequence - tl.minimum(tl.maximum(start, 0), total) // SPAN


def search_steps(count: int) -> int:
    return count.bit_length()
