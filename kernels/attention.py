"""Triton kernels of the attention family: their shapes and launchers.

Offsets and lengths are data: nothing here reads them on the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._support import ceil_div, contiguous, dense_rows, on_device_of, processors, require_device, search_steps
from .attention_backward import bias_gradient_kernel, key_gradient_kernel, query_gradient_kernel, row_products_kernel
from .attention_forward import attention_kernel, rotate_kernel
from .attention_merge import merge_gradient_kernel, merge_kernel

# ---- shapes ----


class _Tile(NamedTuple):
    """Rows of queries and of keys that are held at once; warps of a program; stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


#: by the wider head, padded to a power of two: (16-bit numbers, float32). Chosen for no spills on sm_80 and sm_90; a
#: single stage would keep whole operands in registers
_FORWARD = {
    64: (_Tile(128, 64, 8, 3), _Tile(32, 32, 4, 3)),
    128: (_Tile(128, 32, 8, 3), _Tile(16, 32, 4, 2)),
    256: (_Tile(64, 32, 8, 2), _Tile(16, 32, 8, 2)),
}
_QUERY_GRADIENT = {
    64: (_Tile(64, 32, 4, 3), _Tile(32, 32, 4, 2)),
    128: (_Tile(64, 32, 8, 2), _Tile(16, 32, 4, 2)),
    256: (_Tile(32, 32, 8, 2), _Tile(16, 16, 4, 2)),
}
_KEY_GRADIENT = {
    64: (_Tile(16, 64, 8, 2), _Tile(16, 16, 4, 2)),
    128: (_Tile(16, 64, 8, 2), _Tile(16, 16, 8, 2)),
    256: (_Tile(16, 32, 8, 2), _Tile(32, 16, 8, 2)),
}
#: as many queries as keys
_BIAS_GRADIENT = {
    64: (_Tile(32, 32, 8, 2), _Tile(16, 16, 4, 3)),
    128: (_Tile(32, 32, 8, 2), _Tile(16, 16, 4, 3)),
    256: (_Tile(32, 32, 8, 2), _Tile(16, 16, 4, 3)),
}
_SHORT = 128  # sequences up to this fill a tile of so many queries badly: 64 then
_LEAST_TILE = 16  # smallest tile of a matrix product
_MOST_BINS = 1024  # of the bias table, summed by one program
_PROGRAMS_PER_PROCESSOR = 4
_TILE = 4096  # values that a program holds where there are no products


def _padded(dim: int) -> int:
    return max(triton.next_power_of_2(dim), _LEAST_TILE)


def _tile(table: dict[int, tuple[_Tile, _Tile]], q: Tensor, v: Tensor) -> _Tile:
    wider = max(_padded(q.shape[2]), _padded(v.shape[2]), 64)
    return table[wider][q.dtype == torch.float32]


def _forward_tile(q: Tensor, v: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> _Tile:
    tile = _tile(_FORWARD, q, v)
    if max_seqlen_q <= _LEAST_TILE and max_seqlen_k > max_seqlen_q:
        # few queries a sequence: each tile visits the keys of all of its sequences
        return tile._replace(queries=_LEAST_TILE, warps=4)
    if max_seqlen_q <= _SHORT and tile.queries > 64:
        return tile._replace(queries=64, warps=4 if tile.keys == 64 else tile.warps)
    return tile


# ---- what all passes share ----

_UNLIMITED = 2**31 - 1
_LOG2_E = 1 / math.log(2)


class _Options:
    """The options of a call as the kernels take them, and the rotated q and k."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        scale: float | None = None,
        causal: bool = False,
        window_left: int = -1,
        window_right: int = -1,
        softcap: float = 0.0,
        bias_table: Tensor | None = None,
        rope_cos: Tensor | None = None,
        rope_sin: Tensor | None = None,
        positions_q: Tensor | None = None,
        positions_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
    ) -> None:
        self.sequences = cu_seqlens_q.shape[0] - 1
        self.cu_seqlens_q, self.cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        self.positions_q, self.positions_k = contiguous(positions_q), contiguous(positions_k)
        self.seqused_k, self.table = contiguous(seqused_k), contiguous(bias_table)
        self.cos, self.sin = contiguous(rope_cos), contiguous(rope_sin)
        self.max_seqlens = max_seqlen_q, max_seqlen_k
        self.before = _UNLIMITED if window_left < 0 else min(window_left, _UNLIMITED)
        self.after = _UNLIMITED if window_right < 0 else min(window_right, _UNLIMITED)
        if causal:
            self.after = 0
        self.radius = 0 if bias_table is None else bias_table.shape[1] // 2
        self.scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
        self.unit = 1.0 if q.dtype == torch.float32 else _LOG2_E
        self.inner = self.scale / softcap if softcap > 0 else self.scale * self.unit
        self.outer = softcap * self.unit
        self.softcap = softcap > 0
        self.v = dense_rows(v)
        self.q = self.rotated(q, self.positions_q, self.cu_seqlens_q)
        self.k = self.rotated(k, self.positions_k, self.cu_seqlens_k)

    @property
    def empty(self) -> bool:
        """No query has a key."""
        return self.sequences < 1 or self.q.shape[0] == 0 or self.k.shape[0] == 0

    def rotated(
        self, x: Tensor, positions: Tensor | None, offsets: Tensor, back_to: torch.dtype | None = None
    ) -> Tensor:
        """The rows turned by their positions, or turned back to a dtype."""
        x = dense_rows(x)
        if self.cos is None or self.sin is None:
            return x
        out = x.new_empty(x.shape, dtype=back_to or x.dtype)
        limit, half = self.cos.shape
        if out.numel() == 0 or self.sequences < 1:
            return out
        if limit == 0:
            # there is no row for any position
            return out.copy_(x)
        columns = _padded(x.shape[2])
        rows = _TILE // 2 // columns
        rotate_kernel[(ceil_div(x.shape[0], rows), x.shape[1])](
            out,
            x,
            self.cos,
            self.sin,
            positions,
            offsets,
            x.shape[0],
            self.sequences,
            search_steps(self.sequences + 1),
            limit,
            *x.stride()[:2],
            DIM=x.shape[2],
            HALF=half,
            INVERSE=back_to is not None,
            ROWS=rows,
            COLUMNS=columns,
        )
        return out

    def arguments(self) -> dict[str, Any]:
        """By name, what every pass over pairs takes."""
        q, k, v = self.q, self.k, self.v
        return {
            **{"q": q, "k": k, "v": v, "cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k},
            **{"positions_q": self.positions_q, "positions_k": self.positions_k, "seqused_k": self.seqused_k},
            **{"table": self.table, "total_q": q.shape[0], "total_k": k.shape[0], "sequences": self.sequences},
            **{"steps": search_steps(self.sequences + 1), "before": self.before, "after": self.after},
            **{"radius": self.radius, "inner": self.inner, "outer": self.outer},
            **{"q_row": q.stride(0), "q_head": q.stride(1), "k_row": k.stride(0), "k_head": k.stride(1)},
            **{"v_row": v.stride(0), "v_head": v.stride(1), "GROUP": q.shape[1] // k.shape[1]},
            **{"SOFTCAP": self.softcap, "UNIT": self.unit, "DIM": q.shape[2], "VALUE_DIM": v.shape[2]},
            **{"BLOCK_D": _padded(q.shape[2]), "BLOCK_V": _padded(v.shape[2])},
        }


def _compilation(tile: _Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _schedule(tile: _Tile) -> dict[str, int]:
    return {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys, **_compilation(tile)}


# ---- attention ----


def varlen_attention_triton(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """As the schema of varlen_attention has it."""
    require_device("varlen_attention", q)
    tokens, heads, _ = q.shape
    out, lse = q.new_empty((tokens, heads, v.shape[2])), q.new_empty((heads, tokens), dtype=torch.float32)
    with on_device_of(q):
        call = _Options(q, k, v, *options)
        if call.empty:
            return out.zero_(), lse.fill_(-math.inf)
        tile = _forward_tile(q, v, *call.max_seqlens)
        attention_kernel[(ceil_div(tokens, tile.queries), heads)](out, lse, **call.arguments(), **_schedule(tile))
    return out, lse


# ---- its gradient ----


def _row_products(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    tokens, heads, dim = out.shape
    products = out.new_empty((heads, tokens), dtype=torch.float32)
    columns = _padded(dim)
    rows = _TILE // columns
    row_products_kernel[(ceil_div(tokens, rows), heads)](
        products,
        grad_out,
        out,
        grad_lse,
        tokens,
        *grad_out.stride()[:2],
        *out.stride()[:2],
        VALUE_DIM=dim,
        ROWS=rows,
        COLUMNS=columns,
    )
    return products


def _bias_gradient(call: _Options, arguments: dict[str, Any]) -> Tensor:
    """In a fixed number of parts, so that memory does not grow with the tokens."""
    heads, bins = call.table.shape
    tile = _tile(_BIAS_GRADIENT, call.q, call.v)
    block = max(min(triton.next_power_of_2(bins), _MOST_BINS), _LEAST_TILE)
    blocks, tiles = ceil_div(bins, block), ceil_div(call.q.shape[0], tile.queries)
    splits = min(tiles, ceil_div(_PROGRAMS_PER_PROCESSOR * processors(call.q), heads * blocks))
    partial = call.q.new_empty((splits, heads, blocks * block), dtype=torch.float32)
    bias_gradient_kernel[(splits, heads, blocks)](
        partial,
        tiles=tiles,
        BINS=block,
        BLOCK=tile.queries,
        **_compilation(tile),
        **arguments,
    )
    return partial.sum(0)[:, :bins].contiguous()


def varlen_attention_backward_triton(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the schema of varlen_attention_backward has it; an empty [0, 0] without a bias table."""
    require_device("varlen_attention_backward", q)
    with on_device_of(q):
        call = _Options(q, k, v, *options)
        # what is to be turned back is rounded after that
        dtype = q.dtype if call.cos is None else torch.float32
        grad_q, grad_k = (x.new_empty(x.shape, dtype=dtype) for x in (q, k))
        grad_v = v.new_empty(v.shape)
        grad_table = q.new_zeros((0, 0) if call.table is None else call.table.shape, dtype=torch.float32)
        if call.empty:
            return (
                torch.zeros_like(grad_q, dtype=q.dtype),
                torch.zeros_like(grad_k, dtype=q.dtype),
                grad_v.zero_(),
                grad_table,
            )
        grad_out, out, lse = dense_rows(grad_out), dense_rows(out), lse.contiguous()
        arguments = {
            **call.arguments(),
            **{"grad_out": grad_out, "grad_row": grad_out.stride(0), "grad_head": grad_out.stride(1), "lse": lse},
            "shared": _row_products(grad_out, out, contiguous(grad_lse)),
        }
        tile = _tile(_QUERY_GRADIENT, q, v)
        grid = (ceil_div(q.shape[0], tile.queries), q.shape[1])
        exact = None if call.table is None else torch.empty_like(lse)
        query_gradient_kernel[grid](
            grad_q, exact, grad_lse=contiguous(grad_lse), scale=call.scale, **arguments, **_schedule(tile)
        )
        tile = _tile(_KEY_GRADIENT, q, v)
        grid = (ceil_div(k.shape[0], tile.keys), k.shape[1])
        # a key's queries, seen from the key
        turned = {**arguments, "before": call.after, "after": call.before}
        key_gradient_kernel[grid](grad_k, grad_v, scale=call.scale, **turned, **_schedule(tile))
        if exact is not None:
            grad_table = _bias_gradient(call, {**arguments, "shared": exact})
        if call.cos is not None:
            grad_q = call.rotated(grad_q, call.positions_q, call.cu_seqlens_q, back_to=q.dtype)
            grad_k = call.rotated(grad_k, call.positions_k, call.cu_seqlens_k, back_to=q.dtype)
    return grad_q, grad_k, grad_v, grad_table


# ---- merging ----


def _merge_shape(out_a: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    columns = triton.next_power_of_2(out_a.shape[2])
    rows = max(_TILE // 2 // columns, 1)
    grid = (ceil_div(out_a.shape[0], rows), out_a.shape[1])
    return grid, {"DIM": out_a.shape[2], "ROWS": rows, "COLUMNS": columns}


def merge_attention_triton(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    require_device("merge_attention", out_a)
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    if lse.numel() == 0:
        return out, lse
    if out.numel() == 0:
        return out, torch.logaddexp(lse_a, lse_b)
    out_a, out_b = dense_rows(out_a), dense_rows(out_b)
    grid, shape = _merge_shape(out_a)
    with on_device_of(out_a):
        merge_kernel[grid](
            out,
            lse,
            out_a,
            lse_a.contiguous(),
            out_b,
            lse_b.contiguous(),
            out.shape[0],
            *out_a.stride()[:2],
            *out_b.stride()[:2],
            **shape,
        )
    return out, lse


def merge_attention_backward_triton(
    grad_out: Tensor, grad_lse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_device("merge_attention_backward", out_a)
    grad_a, grad_b = out_a.new_empty(out_a.shape), out_a.new_empty(out_a.shape)
    grad_lse_a, grad_lse_b = lse_a.new_empty(lse_a.shape), lse_a.new_empty(lse_a.shape)
    if grad_lse_a.numel() == 0:
        return grad_a, grad_lse_a, grad_b, grad_lse_b
    grad_out, out_a, out_b = dense_rows(grad_out), dense_rows(out_a), dense_rows(out_b)
    grid, shape = _merge_shape(out_a)
    with on_device_of(out_a):
        merge_gradient_kernel[grid](
            grad_a,
            grad_lse_a,
            grad_b,
            grad_lse_b,
            grad_out,
            contiguous(grad_lse),
            out_a,
            lse_a.contiguous(),
            out_b,
            lse_b.contiguous(),
            out_a.shape[0],
            *grad_out.stride()[:2],
            *out_a.stride()[:2],
            *out_b.stride()[:2],
            **shape,
        )
    return grad_a, grad_lse_a, grad_b, grad_lse_b
