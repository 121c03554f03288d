"""Triton kernels of the pooling family: their shapes and launchers.

Offsets are data: nothing here reads them on the host.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._support import ceil_div, contiguous, dense_rows, on_device_of, processors, require_device, search_steps
from .padding import pack_padded_kernel, unpack_padded_kernel
from .pooling_backward import first_maximum_kernel, row_gradient_kernel, scale_kernel, vector_gradient_kernel
from .pooling_forward import finish_kernel, pool_kernel

# ---- shapes ----

_TILE = 4096  # values that a program holds
_MAX_COLUMNS = 128  # of a tile, unless a program holds whole vectors
_MAX_WHOLE = 4096  # longest vector that one program holds
_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 4
_ROWS, _MOST_COLUMNS = 16, 256  # tile of a copy, and of the rows' gradients
_SEARCH_TILE, _SEARCH_COLUMNS = 2048, 64  # values and columns of a tile in the search for maxima
_VECTOR_COLUMNS = 1024


def _column_block(columns: int, most: int = _MAX_COLUMNS) -> int:
    # eight columns are a byte of bits
    return max(min(triton.next_power_of_2(columns), most), 8)


def _pooling_shape(hidden: Tensor, vectors: int, columns: int, one_row: bool, normalize: bool) -> tuple[int, int, int]:
    """(rows, columns) of a tile, and the parts into which the rows of a long sequence are split."""
    processors_here = processors(hidden)
    if normalize and columns <= _MAX_WHOLE and vectors >= processors_here:
        block = _column_block(columns, _MAX_WHOLE)
        return (1 if one_row else max(_TILE // block, 1)), block, 1
    block = _column_block(columns)
    rows = 1 if one_row else _TILE // block
    programs = vectors * ceil_div(columns, block)
    wanted = ceil_div(_PROGRAMS_PER_PROCESSOR * processors_here, programs)
    worthwhile = ceil_div(hidden.shape[0], vectors * rows)
    return rows, block, 1 if one_row else max(min(wanted, worthwhile, _MAX_SPLITS), 1)


# ---- pooling ----


def _kernel_modes(mode: str, weights: Tensor | None) -> dict[str, object]:
    """What the kernels tell apart, as their compile-time arguments."""
    weighting = "given" if weights is not None else "position" if mode == "weighted_mean" else "none"
    shared = {"mean": "sum", "weighted_mean": "sum", "mean_sqrt_len": "sum", "first": "first_m"}
    return {
        "MODE": shared.get(mode, mode),
        "WEIGHTS": weighting,
        "POWER": 0.5 if mode == "mean_sqrt_len" else 1.0,
    }


def _pool(
    out: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    m: int,
    weights: Tensor | None,
    columns: int,
    normalize: bool = False,
) -> Tensor:
    """Pool the leading ``columns`` into ``out``, contiguous: vectors of floats, or of bits where it is uint8."""
    vectors, total = (cu_seqlens.shape[0] - 1) * m, hidden.shape[0]
    if out.numel() == 0:
        return out
    hidden, cu_seqlens, weights = dense_rows(hidden), cu_seqlens.contiguous(), contiguous(weights)
    kinds = _kernel_modes(mode, weights)
    bits = out.dtype == torch.uint8
    rows, block, splits = _pooling_shape(hidden, vectors, columns, kinds["MODE"] in ("first_m", "last"), normalize)
    column_blocks = ceil_div(columns, block)
    finish = splits == 1 and (column_blocks == 1 or not normalize)
    target = out if finish else hidden.new_empty((vectors, splits, columns), dtype=torch.float32)
    options = {**kinds, "NORMALIZE": normalize, "BITS": bits}
    with on_device_of(hidden):
        pool_kernel[(vectors * splits * column_blocks,)](
            target,
            hidden,
            cu_seqlens,
            weights,
            total,
            hidden.stride(0),
            columns,
            m,
            splits,
            column_blocks,
            FINISH=finish,
            ROWS=rows,
            COLUMNS=block,
            **options,
        )
        if not finish:
            whole = _column_block(columns, 1024)
            finish_kernel[(vectors,)](
                out, target, cu_seqlens, weights, total, columns, m, splits, COLUMNS=whole, **options
            )
    return out


def _vectors_shape(cu_seqlens: Tensor, mode: str, m: int, width: int) -> tuple[int, ...]:
    sequences = cu_seqlens.shape[0] - 1
    return (sequences, m, width) if mode == "first_m" else (sequences, width)


def segment_pool_triton(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    m: int = 1,
    weights: Tensor | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    require_device("segment_pool", hidden)
    columns = hidden.shape[1] if truncate_dim is None else truncate_dim
    out = hidden.new_empty(_vectors_shape(cu_seqlens, mode, m, columns), dtype=out_dtype or hidden.dtype)
    return _pool(out, hidden, cu_seqlens, mode, m, weights, columns, normalize)


def segment_pool_pack_bits_triton(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    m: int = 1,
    weights: Tensor | None = None,
    truncate_dim: int | None = None,
) -> Tensor:
    require_device("segment_pool_pack_bits", hidden)
    columns = hidden.shape[1] if truncate_dim is None else truncate_dim
    out = hidden.new_empty(_vectors_shape(cu_seqlens, mode, m, (columns + 7) // 8), dtype=torch.uint8)
    return _pool(out, hidden, cu_seqlens, mode, m, weights, columns)


# ---- its gradient ----


def _vector_gradients(
    grad: Tensor, hidden: Tensor, cu_seqlens: Tensor, mode: str, m: int, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient [sequences, m, columns] before normalisation; scale and shift of each sequence's weights."""
    sequences, _, columns = grad.shape
    pooled = grad.new_empty((sequences * m, columns), dtype=torch.float32)
    _pool(pooled, hidden, cu_seqlens, mode, m, weights, columns)
    before = torch.empty_like(pooled) if normalize else None
    scales, shifts = pooled.new_empty((2, sequences)) if weights is not None else (None, None)
    vector_gradient_kernel[(sequences * m,)](
        before,
        scales,
        shifts,
        grad,
        pooled,
        cu_seqlens,
        weights,
        hidden.shape[0],
        columns,
        m,
        *grad.stride(),
        NORMALIZE=normalize,
        COLUMNS=_column_block(columns, _VECTOR_COLUMNS),
        **_kernel_modes(mode, weights),
    )
    return grad if before is None else before.view(sequences, m, columns), scales, shifts


def _weight_scales(cu_seqlens: Tensor, mode: str, weights: Tensor, total: int) -> Tensor:
    """Scale of each sequence where the rows are not at hand and the weights do not learn."""
    scales = weights.new_empty(cu_seqlens.shape[0] - 1)
    scale_kernel[(scales.shape[0],)](scales, cu_seqlens, weights, total, **_kernel_modes(mode, weights))
    return scales


def _first_maxima(hidden: Tensor, cu_seqlens: Tensor, columns: int) -> Tensor:
    sequences, block = cu_seqlens.shape[0] - 1, _column_block(columns, _SEARCH_COLUMNS)
    places = cu_seqlens.new_empty((sequences, columns))
    column_blocks = ceil_div(columns, block)
    first_maximum_kernel[(sequences * column_blocks,)](
        places,
        hidden,
        cu_seqlens,
        hidden.shape[0],
        hidden.stride(0),
        columns,
        column_blocks,
        ROWS=_SEARCH_TILE // block,
        COLUMNS=block,
    )
    return places


def segment_pool_backward_triton(
    grad: Tensor,
    hidden: Tensor | None,
    cu_seqlens: Tensor,
    total_tokens: int,
    dim: int,
    dtype: torch.dtype,
    mode: str,
    m: int,
    weights: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    require_device("segment_pool_backward", grad)
    learn = weights is not None and hidden is not None
    grad_hidden = grad.new_empty((total_tokens, dim), dtype=dtype)
    grad_weights = grad.new_empty((total_tokens if learn else 0,), dtype=torch.float32)
    columns = grad.shape[-1]
    if total_tokens == 0:
        return grad_hidden, grad_weights
    if columns == 0 or cu_seqlens.shape[0] == 1:
        return grad_hidden.zero_(), grad_weights.zero_()
    cu_seqlens, weights = cu_seqlens.contiguous(), contiguous(weights)
    hidden = None if hidden is None else dense_rows(hidden)
    grad = grad if mode == "first_m" else grad.unsqueeze(1)
    scales = shifts = places = None
    with on_device_of(grad):
        if normalize or learn:
            grad, scales, shifts = _vector_gradients(grad, hidden, cu_seqlens, mode, m, weights, normalize)
        elif weights is not None:
            scales = _weight_scales(cu_seqlens, mode, weights, total_tokens)
        if mode == "max":
            places = _first_maxima(hidden, cu_seqlens, columns)
        block = _column_block(dim, _MOST_COLUMNS)
        row_gradient_kernel[(ceil_div(total_tokens, _ROWS),)](
            grad_hidden,
            grad_weights if learn else None,
            grad,
            hidden if learn else None,
            places,
            cu_seqlens,
            weights,
            scales,
            shifts,
            total_tokens,
            cu_seqlens.shape[0] - 1,
            dim,
            columns,
            m,
            hidden.stride(0) if learn else 0,
            *grad.stride(),
            LEARN=learn,
            STEPS=search_steps(cu_seqlens.shape[0]),
            ROWS=_ROWS,
            COLUMNS=block,
            **_kernel_modes(mode, weights),
        )
    return grad_hidden, grad_weights


# ---- padded and packed layout ----


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _as_integers(rows: Tensor) -> Tensor:
    """The last dimension dense, and its values as integers of their size (two for complex128)."""
    return dense_rows(rows.resolve_conj().resolve_neg()).view(_SAME_SIZE[rows.element_size()])


def pack_padded_triton(padded: Tensor, mask: Tensor, total_tokens: int) -> Tensor:
    require_device("pack_padded", padded)
    out = padded.new_empty((total_tokens, *padded.shape[2:]))
    if out.numel() == 0:
        return out
    if mask.numel() == 0:
        return out.zero_()
    source = _as_integers(padded.unsqueeze(-1).flatten(2))
    kept = (mask != 0).flatten().cumsum(0)
    columns = source.shape[2]
    with on_device_of(padded):
        pack_padded_kernel[(ceil_div(total_tokens, _ROWS),)](
            _as_integers(out.view(total_tokens, -1)),
            source,
            kept,
            total_tokens,
            mask.numel(),
            mask.shape[1],
            columns,
            source.stride(0),
            source.stride(1),
            STEPS=search_steps(mask.numel()),
            ROWS=_ROWS,
            COLUMNS=_column_block(columns, _MOST_COLUMNS),
        )
    return out


def unpack_padded_triton(packed: Tensor, mask: Tensor) -> Tensor:
    require_device("unpack_padded", packed)
    out = packed.new_empty((*mask.shape, *packed.shape[1:]))
    if out.numel() == 0:
        return out
    if packed.shape[0] == 0:
        return out.zero_()
    source = _as_integers(packed.unsqueeze(-1).flatten(1))
    keep = (mask != 0).flatten()
    columns = source.shape[1]
    with on_device_of(packed):
        unpack_padded_kernel[(ceil_div(mask.numel(), _ROWS),)](
            _as_integers(out.view(mask.numel(), -1)),
            source,
            keep.view(torch.uint8),
            keep.cumsum(0),
            mask.numel(),
            packed.shape[0],
            columns,
            source.stride(0),
            ROWS=_ROWS,
            COLUMNS=_column_block(columns, _MOST_COLUMNS),
        )
    return out
