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
        most_head_dim: the largest width of a head, of queries and keys as of values.
        head_dim_multiple: widths are multiples of this.
    """

    kernel: str
    architecture: int
    dtypes: tuple[torch.dtype, ...]
    most_head_dim: int
    head_dim_multiple: int

    def fits(self, dtype: torch.dtype, head_dims: Sequence[int]) -> bool:
        return dtype in self.dtypes and all(
            0 < dim <= self.most_head_dim and dim % self.head_dim_multiple == 0 for dim in head_dims
        )

    def __str__(self) -> str:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        multiple = f", multiples of {self.head_dim_multiple}" if self.head_dim_multiple > 1 else ""
        return f"{dtypes}, heads of up to {self.most_head_dim}{multiple}, sm_{self.architecture} and up"


_HALVES = (torch.bfloat16, torch.float16)
TABLE: dict[str, tuple[Row, ...]] = {
    "varlen_attention": (Row("attention_kernel", 80, _HALVES, 256, 1),),
    "varlen_attention_backward": (Row("attention_", 80, _HALVES, 256, 1),),
    "merge_attention": (Row("merge_", 80, _HALVES, 256, 1),),
    "merge_attention_backward": (Row("merge_", 80, _HALVES, 256, 1),),
}
# the argument whose last dimension is the width of queries and keys, and that of values
_WIDTHS = {
    "varlen_attention": ("q", "v"),
    "varlen_attention_backward": ("q", "v"),
    "merge_attention": ("out_a",),
    "merge_attention_backward": ("out_a",),
}


def row_for(op: str, argument_names: Sequence[str], args: Sequence[Any]) -> Row | None:
    """The row of the kernel that serves a call; None where no kernel in C++ does.

    Only for operators that have rows; ``args`` are positional, as in the schema.
    """
    tensors = [args[argument_names.index(name)] for name in _WIDTHS[op]]
    widths = [tensor.shape[-1] for tensor in tensors]
    return next((row for row in TABLE[op] if row.fits(tensors[0].dtype, widths)), None)
