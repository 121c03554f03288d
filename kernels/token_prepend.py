"""Triton kernels of rows copied over others; `norm` launches them, and returns the gradients.

Rows are data: nothing here reads them on the host, and a copy from or to a row that does not exist is left out.
"""

# compile-time arguments are in capitals, as everywhere in Triton
# ruff: noqa: N803

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._support import ceil_div, on_device_of

_COPIES = 256  # that a program takes down

# ---- kernels ----


@triton.jit(do_not_specialize=("copies", "total"))
def record_copies_kernel(places, first, past, sources, targets, copies, total, COPIES: tl.constexpr):
    """places[target] = source; with ``first``, also where the copies of each source begin and end, sorted by source."""
    copy = tl.program_id(0).to(tl.int64) * COPIES + tl.arange(0, COPIES)
    inside = copy < copies
    source = tl.load(sources + copy, mask=inside, other=-1)
    target = tl.load(targets + copy, mask=inside, other=-1)
    exists = (source >= 0) & (source < total)
    tl.store(places + target, source, mask=exists & (target >= 0) & (target < total))
    if first is not None:
        before = tl.load(sources + copy - 1, mask=inside & (copy > 0), other=-1)
        after = tl.load(sources + copy + 1, mask=copy + 1 < copies, other=-1)
        tl.store(first + source, copy, mask=exists & (before != source))
        tl.store(past + source, copy + 1, mask=exists & (after != source))


@triton.jit(do_not_specialize=("total",))
def copy_rows_kernel(out, rows, places, total, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each row of the contiguous ``out`` from its place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < total)[:, None] & (column < columns)[None, :]
    place = tl.load(places + row, mask=row < total, other=0)
    value = tl.load(rows + (place * stride)[:, None] + column[None, :], mask=inside, other=0)
    tl.store(out + (row * columns)[:, None] + column[None, :], value, mask=inside)


# ---- what the launchers hand to them ----


class Copies(NamedTuple):
    """Copies in the order of their sources, which is the same in every run, and what each row has to do with them."""

    sources: Tensor
    targets: Tensor
    #: where each row stood before the copies; where the copies of each row begin and end
    places: Tensor
    first: Tensor
    past: Tensor


def _record(
    sources: Tensor, targets: Tensor, places: Tensor, first: Tensor | None = None, past: Tensor | None = None
) -> None:
    count = sources.shape[0]
    if count:
        with on_device_of(sources):
            record_copies_kernel[(ceil_div(count, _COPIES),)](
                *(places, first, past, sources, targets, count, places.shape[0]), COPIES=_COPIES
            )


def places_of(source_rows: Tensor, target_rows: Tensor, total: int) -> Tensor:
    """Of each row after the copies, where it stood before."""
    places = torch.arange(total, device=source_rows.device)
    _record(source_rows.contiguous(), target_rows.contiguous(), places)
    return places


def copies_of(source_rows: Tensor, target_rows: Tensor, total: int) -> Copies:
    sources, order = source_rows.sort(stable=True)
    places = torch.arange(total, device=sources.device)
    copies = Copies(sources, target_rows[order], places, *sources.new_zeros(2, total))
    _record(*copies)
    return copies
