"""Which CUDA C++ kernel serves which call: the one table, read by the operators, by `doctor` and by the tests.

An operator without rows has one C++ kernel for every call that its check lets through, or none at all. Of one with rows
the first that fits serves; where none does, the call goes to Triton, and the C++ kernel itself refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One kernel, and where it runs.

    Attributes:
        kernel: how the names of its ``__global__`` functions begin.
        architecture: the least compute capability, 80 for 8.0.
        only: no later architecture (what is compiled for sm_90a runs on 9.0 alone).
    """

    kernel: str
    architecture: int = 80
    only: bool = False

    def takes(self, call: dict[str, Any], whenever: bool) -> bool:
        """Whether it serves a call, arguments by name; ``whenever`` it can, and not only where it does so better."""
        return True

    def runs_on(self, architecture: int) -> bool:
        return architecture == self.architecture if self.only else architecture >= self.architecture

    def what(self) -> str:
        return "the rest"

    def __str__(self) -> str:
        return f"{self.what()}, sm_{self.architecture}" + (" only" if self.only else " and up")


@dataclass(frozen=True)
class AttentionRow(Row):
    """A kernel of attention.

    Attributes:
        longest: the least ``max_seqlen_q``; sequences are half as long at least in the mean.
        rows: the most rows of queries, and of keys.
    """

    longest: int = 0
    rows: int = 2**31 - 1

    dtypes = (torch.bfloat16, torch.float16)
    head_dims = range(16, 257, 8)

    def takes(self, call: dict[str, Any], whenever: bool) -> bool:
        q, v, sequences = call["q"], call["v"], call["cu_seqlens_q"].shape[0] - 1
        counted = max(q.shape[0], call["k"].shape[0]) <= self.rows
        is_long = call["max_seqlen_q"] >= self.longest and q.shape[0] >= self.longest // 2 * sequences
        dims = q.shape[-1] in self.head_dims and v.shape[-1] in self.head_dims
        return (is_long or whenever) and counted and dims and q.dtype in self.dtypes

    def what(self) -> str:
        dims = f"heads of {self.head_dims[0]} to {self.head_dims[-1]} dimensions in steps of {self.head_dims.step}"
        return f"bfloat16, float16, {dims}" + (f", {self.longest} tokens and more" if self.longest else "")


@dataclass(frozen=True)
class HopperScan(Row):
    """The scan of codes by products of warpgroups: rows that the copy engine can fetch, more than a few queries."""

    architecture: int = 90
    only: bool = True

    fewest, widest = 5, 512  # queries; bytes

    def takes(self, call: dict[str, Any], whenever: bool) -> bool:
        queries, codes = call["queries"], call["codes"]
        count, width = codes.shape
        dense = width <= 1 or codes.stride(1) == 1  # else they are copied, and dense then
        stride = codes.stride(0) if dense else width
        aligned = not dense or codes.data_ptr() % 16 == 0
        fetched = aligned and (count == 1 or (stride % 16 == 0 and stride >= width))
        return fetched and queries.shape[0] >= self.fewest and 0 < width <= self.widest and 0 < count < 2**31

    def what(self) -> str:
        return f"{self.fewest} queries and more, codes of at most {self.widest} bytes in rows of multiples of 16"


_LONG = 129  # with shorter texts the tiles of 64 rows would be mostly empty
_RAGGED = 2**30  # rows that maps for the copy engine count
_SCANS = (HopperScan("hamming_hopper_kernel"), Row("scan_kernel"))
TABLE: dict[str, tuple[Row, ...]] = {
    "varlen_attention": (
        AttentionRow("attention_hopper_kernel", 90, only=True, longest=_LONG, rows=_RAGGED),
        AttentionRow("attention_kernel"),
    ),
    "varlen_attention_backward": (
        AttentionRow("attention_gradient_hopper_kernel", 90, only=True, longest=_LONG, rows=_RAGGED),
        AttentionRow("attention_gradient_kernel"),
    ),
    "hamming_distance": _SCANS,
    "hamming_topk": _SCANS,
    "hamming_range": _SCANS,
}


def leaves_some(op: str) -> bool:
    """Whether an operator of the table has calls that no kernel in C++ serves."""
    return type(TABLE[op][-1]) is not Row


def row_for(
    op: str, argument_names: Sequence[str], args: Sequence[Any], architecture: int = 80, whenever: bool = False
) -> Row | None:
    """The row of the kernel that serves a call; None where no kernel in C++ does.

    Only for operators that have rows; ``args`` are positional, as in the schema. ``whenever``: also where another
    kernel serves better, as ``EMBEDDING_KERNELS_HOPPER=all`` has it. The variable itself is read, and any value but
    ``all`` and ``none`` refused, in ``csrc/cuda/launch.cuh``.
    """
    call = dict(zip(argument_names, args, strict=False))
    return next((row for row in TABLE[op] if row.runs_on(architecture) and row.takes(call, whenever)), None)
