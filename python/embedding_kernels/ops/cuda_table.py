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
    """

    kernel: str
    architecture: int
    dtypes: tuple[torch.dtype, ...]
    head_dims: range

    def fits(self, dtype: torch.dtype, head_dims: Sequence[int]) -> bool:
        return dtype in self.dtypes and all(dim in self.head_dims for dim in head_dims)

    def __str__(self) -> str:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        widths = f"heads of {self.head_dims[0]} to {self.head_dims[-1]} dimensions in steps of {self.head_dims.step}"
        return f"{dtypes}, {widths}, sm_{self.architecture} and up"


_HALVES = (torch.bfloat16, torch.float16)
TABLE: dict[str, tuple[Row, ...]] = {
    "varlen_attention": (Row("attention_kernel", 80, _HALVES, range(16, 257, 8)),),
    "varlen_attention_backward": (Row("attention_gradient_kernel", 80, _HALVES, range(16, 257, 8)),),
}


def row_for(op: str, argument_names: Sequence[str], args: Sequence[Any]) -> Row | None:
    """The row of the kernel that serves a call; None where no kernel in C++ does.

    Only for operators that have rows; ``args`` are positional, as in the schema.
    """
    q, v = (args[argument_names.index(name)] for name in ("q", "v"))
    return next((row for row in TABLE[op] if row.fits(q.dtype, (q.shape[-1], v.shape[-1]))), None)
