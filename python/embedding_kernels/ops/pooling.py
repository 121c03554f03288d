"""Pooling of packed token rows into one vector a sequence, and moving rows between padded and packed layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    check_offsets,
    check_range,
    check_same_device,
    check_size,
    check_tensor,
    describe,
    dtype_name,
    refuse,
    values_readable,
)
from ._registry import Gradient, call, register

#: mode -> what it computes
POOLING_MODES = {
    "mean": "sum(w x) / sum(w), w = 1 unless weights are given",
    "weighted_mean": "sum(w x) / sum(w), w = 1, 2, 3, ... within the sequence unless weights are given",
    "mean_sqrt_len": "sum(w x) / sqrt(sum(w)), w = 1 unless weights are given",
    "max": "largest value of each dimension",
    "first": "first row",
    "first_m": "first m rows",
    "last": "last row",
}
_WEIGHTED_MODES = ("mean", "weighted_mean", "mean_sqrt_len")
_FLOAT_ROWS = 'a float32, bfloat16 or float16 tensor [T, D] (float64 runs with backend="reference")'
_OFFSETS = "an int32 tensor [sequences + 1]"
_MASK = "a bool, uint8, int32 or int64 tensor [B, S]"
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64)


def segment_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    *,
    m: int = 1,
    weights: Tensor | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pool the packed rows of each sequence into one vector, with truncation and normalisation in the same pass.

    Sequence s holds rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of ``hidden``. With x its rows and w their
    weights, ``mode`` is one of

    - ``mean``: Σ w x / Σ w, with w = 1 unless ``weights`` are given;
    - ``weighted_mean``: the same with w = 1, 2, 3, … unless ``weights`` are given (position weights; Muennighoff,
      "SGPT", 2022);
    - ``mean_sqrt_len``: Σ w x / √Σ w, with w = 1 unless ``weights`` are given;
    - ``max``, ``first``, ``last``: largest value of each dimension, first row, last row;
    - ``first_m``: the first ``m`` rows.

    The sums are formed in float32 in the order of the rows; then come truncation to ``truncate_dim`` dimensions,
    division by max(‖·‖₂, 1e-12) where ``normalize``, and one rounding to ``out_dtype``. Differentiable in ``hidden``
    and ``weights``; the gradient of ``max`` goes to the first maximum. Under autocast ``hidden`` is cast.

    Args:
        hidden: float32, bfloat16 or float16 ``[T, D]``; float64 with ``backend="reference"``.
        cu_seqlens: int32 ``[S + 1]``, from 0, never falling, to T. An empty sequence gives 0.
        mode: see above.
        m: rows kept by ``first_m``; rows past the end of the sequence are 0.
        weights: float32 ``[T]`` for the three means: masks, position weights, idf. A sum of 0 gives 0.
        normalize: divide each vector by its length.
        truncate_dim: leading dimensions to keep, 1 to D (Matryoshka).
        out_dtype: float32, bfloat16 or float16; by default that of ``hidden``.
        backend: as in `pack_bits`.

    Returns:
        ``[S, D']``, or ``[S, m, D']`` for ``first_m``; D' is ``truncate_dim`` or D.

    Raises:
        ValueError: bad dtype, rank, size, mode or offsets (offsets on CUDA only under EMBEDDING_KERNELS_CHECK=1).
    """
    return call(_SEGMENT_POOL, backend, hidden, cu_seqlens, mode, m, weights, normalize, truncate_dim, out_dtype)


def segment_pool_pack_bits(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    *,
    m: int = 1,
    weights: Tensor | None = None,
    truncate_dim: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`pack_bits` of `segment_pool` in one pass: binary codes straight from token rows.

    The bits are the signs of the pooled float32 values, before any rounding. Arguments and errors as `segment_pool`.

    Returns:
        uint8 ``[S, ceil(D' / 8)]``, or ``[S, m, ceil(D' / 8)]`` for ``first_m``.
    """
    return call(_SEGMENT_POOL_PACK_BITS, backend, hidden, cu_seqlens, mode, m, weights, truncate_dim)


def pack_padded(padded: Tensor, mask: Tensor, total_tokens: int, *, backend: str | None = None) -> Tensor:
    """Take the rows of a padded batch whose mask is not 0, in order.

    Args:
        padded: any dtype, ``[B, S, ...]``.
        mask: bool, uint8, int32 or int64 ``[B, S]``; not 0 keeps the row.
        total_tokens: number of mask entries that are not 0. On CUDA it is not checked unless
            EMBEDDING_KERNELS_CHECK=1: rows past it are dropped, missing rows are 0.
        backend: as in `pack_bits`.

    Returns:
        ``[total_tokens, ...]``, contiguous; differentiable in ``padded``.

    Raises:
        ValueError: bad dtype, rank or size; a ``total_tokens`` that is not the mask's.
    """
    return call(_PACK_PADDED, backend, padded, mask, total_tokens)


def unpack_padded(packed: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Put packed rows back where the mask is not 0, with zeros elsewhere: the inverse of `pack_padded`.

    Args:
        packed: any dtype, ``[T, ...]``; T is the number of mask entries that are not 0.
        mask: bool, uint8, int32 or int64 ``[B, S]``.
        backend: as in `pack_bits`.

    Returns:
        ``[B, S, ...]``, contiguous; differentiable in ``packed``.

    Raises:
        ValueError: bad dtype or rank; a T that is not the mask's (on CUDA under EMBEDDING_KERNELS_CHECK=1).
    """
    return call(_UNPACK_PADDED, backend, packed, mask)


def cu_seqlens_from_mask(mask: Tensor) -> tuple[Tensor, int, int]:
    """Offsets of a padded batch's sequences: ``(cu_seqlens int32 [B + 1], max_seqlen, total_tokens)``.

    Reads the two numbers back from the device: call it once a forward, not once a layer.
    """
    check_tensor("cu_seqlens_from_mask", "mask", mask, _MASK, _MASK_DTYPES, 2)
    lengths = (mask != 0).sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if mask.shape[0] == 0:
        return cu_seqlens, 0, 0
    longest, total = torch.stack([lengths.max(), cu_seqlens[-1]]).tolist()
    return cu_seqlens, longest, total


def _check_pooling(
    op: str,
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    m: int,
    weights: Tensor | None,
    truncate_dim: int | None,
) -> None:
    check_tensor(op, "hidden", hidden, _FLOAT_ROWS, FLOATS, 2)
    check_tensor(op, "cu_seqlens", cu_seqlens, _OFFSETS, (torch.int32,), 1)
    if cu_seqlens.shape[0] == 0:
        refuse(op, "cu_seqlens", _OFFSETS, describe(cu_seqlens))
    if mode not in POOLING_MODES:
        refuse(op, "mode", f"one of {', '.join(POOLING_MODES)}", f"'{mode}'")
    check_range(op, "m", m, 1, None if mode == "first_m" else 1)
    if weights is not None:
        if mode not in _WEIGHTED_MODES:
            refuse(op, "weights", f"None in mode {mode}", describe(weights))
        check_tensor(op, "weights", weights, "a float32 tensor [T]", (torch.float32,), 1)
        check_size(op, "weights", weights, 0, hidden.shape[0], "one for each row of hidden")
    if truncate_dim is not None:
        check_range(op, "truncate_dim", truncate_dim, 1, hidden.shape[1])
    check_same_device(op, "hidden", hidden, cu_seqlens=cu_seqlens, weights=weights)
    check_offsets(op, "cu_seqlens", cu_seqlens, hidden.shape[0])


def _check_segment_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    m: int = 1,
    weights: Tensor | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    op = "segment_pool"
    _check_pooling(op, hidden, cu_seqlens, mode, m, weights, truncate_dim)
    if out_dtype is not None and out_dtype not in FLOATS:
        refuse(op, "out_dtype", "float32, bfloat16 or float16", dtype_name(out_dtype))


def _out_shape(hidden: Tensor, cu_seqlens: Tensor, mode: str, m: int, dim: int) -> tuple[int, ...]:
    sequences = cu_seqlens.shape[0] - 1
    return (sequences, m, dim) if mode == "first_m" else (sequences, dim)


def _fake_segment_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    m: int = 1,
    weights: Tensor | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    dim = hidden.shape[1] if truncate_dim is None else truncate_dim
    return hidden.new_empty(_out_shape(hidden, cu_seqlens, mode, m, dim), dtype=out_dtype or hidden.dtype)


def _setup_segment_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, cu_seqlens, ctx.mode, ctx.m, weights, ctx.normalize, _, _ = inputs
    ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
    # a plain mean's gradient does not need the rows, so they may be freed
    weights_learn = weights is not None and weights.requires_grad
    reads_rows = ctx.mode == "max" or ctx.normalize or weights_learn
    ctx.save_for_backward(hidden if reads_rows else None, cu_seqlens, weights)


def _backward_segment_pool(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, cu_seqlens, weights = ctx.saved_tensors
    grad_hidden, grad_weights = run(
        grad, hidden, cu_seqlens, ctx.shape[0], ctx.shape[1], ctx.dtype, ctx.mode, ctx.m, weights, ctx.normalize
    )
    return (
        grad_hidden if ctx.wanted[0] else None,
        *(None,) * 3,
        grad_weights if weights is not None and ctx.wanted[4] else None,
        *(None,) * 3,
    )


def _check_segment_pool_backward(
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
) -> None:
    op = "segment_pool_backward"
    rank = 3 if mode == "first_m" else 2
    expected = f"a float32, bfloat16 or float16 tensor {'[S, m, D]' if rank == 3 else '[S, D]'}"
    check_tensor(op, "grad", grad, expected, FLOATS, rank)
    rows = hidden if hidden is not None else grad.new_empty((1, 1), dtype=dtype).expand(total_tokens, dim)
    _check_pooling(op, rows, cu_seqlens, mode, m, weights, None)
    check_size(op, "hidden", rows, 0, total_tokens, "total_tokens")
    check_size(op, "hidden", rows, 1, dim, "dim")
    check_size(op, "grad", grad, 0, cu_seqlens.shape[0] - 1, "the number of sequences")
    check_range(op, "the last size of grad", grad.shape[-1], 0, dim)
    if hidden is None and (mode == "max" or normalize):
        refuse(op, "hidden", "given for mode max and for normalize", "None")
    check_same_device(op, "grad", grad, cu_seqlens=cu_seqlens, hidden=hidden)


def _fake_segment_pool_backward(
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
    learned = total_tokens if weights is not None and hidden is not None else 0
    return grad.new_empty((total_tokens, dim), dtype=dtype), grad.new_empty((learned,), dtype=torch.float32)


def _check_segment_pool_pack_bits(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    m: int = 1,
    weights: Tensor | None = None,
    truncate_dim: int | None = None,
) -> None:
    _check_pooling("segment_pool_pack_bits", hidden, cu_seqlens, mode, m, weights, truncate_dim)


def _fake_segment_pool_pack_bits(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    m: int = 1,
    weights: Tensor | None = None,
    truncate_dim: int | None = None,
) -> Tensor:
    dim = hidden.shape[1] if truncate_dim is None else truncate_dim
    return hidden.new_empty(_out_shape(hidden, cu_seqlens, mode, m, (dim + 7) // 8), dtype=torch.uint8)


def _check_mask(op: str, mask: Tensor) -> None:
    check_tensor(op, "mask", mask, _MASK, _MASK_DTYPES, 2)


def _check_count(op: str, argument: str, value: int, mask: Tensor) -> None:
    if values_readable(mask) and value != (count := int((mask != 0).sum())):
        refuse(op, argument, f"{count} (the mask entries that are not 0)", str(int(value)))


def _check_pack_padded(padded: Tensor, mask: Tensor, total_tokens: int) -> None:
    op = "pack_padded"
    if not isinstance(padded, Tensor) or padded.dim() < 2:
        got = describe(padded) if isinstance(padded, Tensor) else type(padded).__name__
        refuse(op, "padded", "a tensor [B, S, ...]", got)
    _check_mask(op, mask)
    check_size(op, "mask", mask, 0, padded.shape[0], "the batch of padded")
    check_size(op, "mask", mask, 1, padded.shape[1], "the length of padded")
    check_range(op, "total_tokens", total_tokens, 0)
    check_same_device(op, "padded", padded, mask=mask)
    _check_count(op, "total_tokens", total_tokens, mask)


def _check_unpack_padded(packed: Tensor, mask: Tensor) -> None:
    op = "unpack_padded"
    if not isinstance(packed, Tensor) or packed.dim() < 1:
        got = describe(packed) if isinstance(packed, Tensor) else type(packed).__name__
        refuse(op, "packed", "a tensor [T, ...]", got)
    _check_mask(op, mask)
    check_same_device(op, "packed", packed, mask=mask)
    _check_count(op, "packed.shape[0]", packed.shape[0], mask)


def _setup_pack_padded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_pack_padded(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return run(grad, *ctx.saved_tensors), None, None


def _setup_unpack_padded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.total_tokens = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _backward_unpack_padded(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return run(grad, *ctx.saved_tensors, ctx.total_tokens), None


# FLOPs: an add for each value read (a multiply too with weights); a copy counts none
_SEGMENT_POOL_BACKWARD = register(
    "segment_pool_backward",
    family="pooling",
    check=_check_segment_pool_backward,
    fake=_fake_segment_pool_backward,
    flops=lambda grad, hidden, cu_seqlens, total_tokens, dim, *rest: total_tokens * dim,
)
_SEGMENT_POOL = register(
    "segment_pool",
    family="pooling",
    check=_check_segment_pool,
    fake=_fake_segment_pool,
    flops=lambda hidden, cu_seqlens, mode, m=1, weights=None, *rest: (
        hidden[0] * hidden[1] * (1 if weights is None else 2)
    ),
    autocast=("hidden",),
    gradient=Gradient("segment_pool_backward", _setup_segment_pool, _backward_segment_pool),
)
_SEGMENT_POOL_PACK_BITS = register(
    "segment_pool_pack_bits",
    family="pooling",
    check=_check_segment_pool_pack_bits,
    fake=_fake_segment_pool_pack_bits,
    flops=lambda hidden, *rest: hidden[0] * hidden[1],
    autocast=("hidden",),
)
_PACK_PADDED = register(
    "pack_padded",
    family="pooling",
    check=_check_pack_padded,
    fake=lambda padded, mask, total_tokens: padded.new_empty((total_tokens, *padded.shape[2:])),
    flops=lambda *shapes: 0,
    gradient=Gradient("unpack_padded", _setup_pack_padded, _backward_pack_padded),
)
_UNPACK_PADDED = register(
    "unpack_padded",
    family="pooling",
    check=_check_unpack_padded,
    fake=lambda packed, mask: packed.new_empty((*mask.shape, *packed.shape[1:])),
    flops=lambda *shapes: 0,
    gradient=Gradient("pack_padded", _setup_unpack_padded, _backward_unpack_padded),
)
