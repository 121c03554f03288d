"""Which CUDA C++ kernel serves which call: the one table, read by the operators, by `doctor` and by the tests.

An operator without rows has a C++ kernel for every call that its check lets through, or none at all. One with rows goes
to Triton where no row fits; the C++ kernel itself refuses such a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One kernel: what it takes.

    Attributes:
        kernel: how the names of its ``__global__`` functions begin.
        architecture: the least compute capability, 80 for 8.0.
        dtypes: of the rows.
        head_dims: widths of a head, of queries and keys as of values.
        only: no later architecture (what is compiled for sm_90a runs on 9.0 alone).
        longest: the least ``max_seqlen_q``; sequences are half as long at least in the mean.
    """

    kernel: str
    architecture: int
    dtypes: tuple[torch.dtype, ...]
    head_dims: range
    only: bool = False
    longest: int = 0

    def fits(self, call: Call, longest: int) -> bool:
        is_long = call.max_seqlen >= longest and call.rows >= longest // 2 * call.sequences
        return is_long and call.dtype in self.dtypes and all(dim in self.head_dims for dim in call.head_dims)

    def runs_on(self, architecture: int) -> bool:
        return architecture == self.architecture if self.only else architecture >= self.architecture

    def __str__(self) -> str:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        widths = f"heads of {self.head_dims[0]} to {self.head_dims[-1]} dimensions in steps of {self.head_dims.step}"
        where = f"sm_{self.architecture}" + (" only" if self.only else " and up")
        return f"{dtypes}, {widths}, {f'{self.longest} tokens and more, ' if self.longest else ''}{where}"


@dataclass(frozen=True)
class Call:
    """What rows ask of a call."""

    dtype: torch.dtype
    head_dims: tuple[int, int]  # of queries and keys, of values
    rows: int  # of queries
    sequences: int
    max_seqlen: int  # of queries


_HALVES, _DIMS = (torch.bfloat16, torch.float16), range(16, 257, 8)
_LONG = 129  # with shorter texts the tiles of 64 rows would be mostly empty
# the first row that fits serves
TABLE: dict[str, tuple[Row, ...]] = {
    "varlen_attention": (
        Row("attention_hopper_kernel", 90, _HALVES, _DIMS, only=True, longest=_LONG),
        Row("attention_kernel", 80, _HALVES, _DIMS),
    ),
    "varlen_attention_backward": (
        Row("attention_gradient_hopper_kernel", 90, _HALVES, _DIMS, only=True, longest=_LONG),
        Row("attention_gradient_kernel", 80, _HALVES, _DIMS),
    ),
}


def row_for(
    op: str, argument_names: Sequence[str], args: Sequence[Any], architecture: int = 80, longest: int | None = None
) -> Row | None:
    """The row of the kernel that serves a call; None where no kernel in C++ does.

    Only for operators that have rows; ``args`` are positional, as in the schema. ``longest`` stands in for that of the
    rows: the host emulation sends short sequences too to the kernels for long ones.
    """
    q, v, offsets, max_seqlen = (
        args[argument_names.index(name)] for name in ("q", "v", "cu_seqlens_q", "max_seqlen_q")
    )
    call = Call(q.dtype, (q.shape[-1], v.shape[-1]), q.shape[0], offsets.shape[0] - 1, int(max_seqlen))
    return next(
        (
            row
            for row in TABLE[op]
            if row.runs_on(architecture) and row.fits(call, row.longest if longest is None else longest)
        ),
        None,
    )
