"""The pieces of a latent-attention head that stand between its matrix products."""

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
)
from ._registry import Gradient, call, register

_SCORES = 'a float32, bfloat16 or float16 tensor [T, groups * size] (float64 runs with backend="reference")'
_HIDDEN = 'a float32, bfloat16 or float16 tensor [T, 2 F] (float64 runs with backend="reference")'
_OFFSETS = "an int32 tensor [sequences + 1]"


def grouped_softmax(scores: Tensor, groups: int, *, backend: str | None = None) -> Tensor:
    """Softmax of each row within ``groups`` groups of neighbouring columns.

    ``out[t, g, j] = exp(s[t, g, j]) / Σ_i exp(s[t, g, i])``, the columns taken as ``[groups, size]``; formed in float32
    and rounded once. The attention of a latent-attention head whose keys are folded into the projection of the
    queries, one group a head (Lee et al., "NV-Embed", 2024). Differentiable.

    Args:
        scores: float32, bfloat16 or float16 ``[T, groups * size]``, rows of any stride; float64 with
            ``backend="reference"``.
        groups: at least 1; divides the width of ``scores``.
        backend: as in `pack_bits`.

    Returns:
        ``[T, groups * size]`` in the dtype of ``scores``. A group that holds NaN or inf, or nothing but -inf, is NaN.

    Raises:
        ValueError: bad dtype, rank or number of groups.
    """
    return call(_GROUPED_SOFTMAX, backend, scores, groups)


def geglu_segment_pool(
    hidden: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean over the rows of each sequence of ``value * gelu(gate)``, without writing the products.

    With ``(value, gate)`` the halves of ``hidden + bias`` and w the weights, ``out[s] = Σ w value gelu(gate) / Σ w``,
    where gelu(x) = x Φ(x) (Shazeer, "GLU Variants Improve Transformer", 2020). Formed in float32 and rounded once. A
    linear layer that follows commutes with the mean, so it runs on sequences, not on tokens. Differentiable in
    ``hidden``, ``bias`` and ``weights``. Under autocast ``hidden`` is cast.

    Args:
        hidden: float32, bfloat16 or float16 ``[T, 2 F]``, value before gate, rows of any stride; float64 with
            ``backend="reference"``.
        bias: ``[2 F]``, float32 or as ``hidden``; None adds nothing.
        cu_seqlens: int32 ``[S + 1]``, from 0, never falling, to T. An empty sequence gives 0.
        weights: float32 ``[T]``, 1 by default; a sum of 0 gives 0.
        out_dtype: float32, bfloat16 or float16; by default that of ``hidden``.
        backend: as in `pack_bits`.

    Returns:
        ``[S, F]``.

    Raises:
        ValueError: bad dtype, rank, size or offsets (offsets on CUDA only under EMBEDDING_KERNELS_CHECK=1).
    """
    return call(_GEGLU_SEGMENT_POOL, backend, hidden, bias, cu_seqlens, weights, out_dtype)


# ---- grouped_softmax ----


def _check_groups(op: str, argument: str, rows: Tensor, groups: int) -> None:
    check_tensor(op, argument, rows, _SCORES, FLOATS, 2)
    check_range(op, "groups", groups, 1)
    if rows.shape[1] % groups != 0:
        refuse(op, "groups", f"a divisor of the width of {argument} ({int(rows.shape[1])})", str(int(groups)))


def _check_grouped_softmax_backward(grad: Tensor, probabilities: Tensor, groups: int) -> None:
    op = "grouped_softmax_backward"
    _check_groups(op, "probabilities", probabilities, groups)
    expected = f"a {dtype_name(probabilities.dtype)} tensor [T, groups * size], as probabilities"
    check_tensor(op, "grad", grad, expected, (probabilities.dtype,), 2)
    check_size(op, "grad", grad, 0, probabilities.shape[0], "the rows of probabilities")
    check_size(op, "grad", grad, 1, probabilities.shape[1], "the width of probabilities")
    check_same_device(op, "probabilities", probabilities, grad=grad)


def _setup_grouped_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.groups = inputs[1]
    ctx.save_for_backward(output)


def _backward_grouped_softmax(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return run(grad, *ctx.saved_tensors, ctx.groups), None


# ---- geglu_segment_pool ----


def _check_pooled_rows(
    op: str, hidden: Tensor, bias: Tensor | None, cu_seqlens: Tensor, weights: Tensor | None
) -> None:
    check_tensor(op, "hidden", hidden, _HIDDEN, FLOATS, 2)
    if hidden.shape[1] % 2 != 0:
        refuse(op, "hidden", "of even width (value and gate)", describe(hidden))
    if bias is not None:
        expected = f"a float32 tensor [2 F], or {dtype_name(hidden.dtype)} as hidden"
        check_tensor(op, "bias", bias, expected, (torch.float32, hidden.dtype), 1)
        check_size(op, "bias", bias, 0, hidden.shape[1], "the width of hidden")
    check_tensor(op, "cu_seqlens", cu_seqlens, _OFFSETS, (torch.int32,), 1)
    if cu_seqlens.shape[0] == 0:
        refuse(op, "cu_seqlens", _OFFSETS, describe(cu_seqlens))
    if weights is not None:
        check_tensor(op, "weights", weights, "a float32 tensor [T]", (torch.float32,), 1)
        check_size(op, "weights", weights, 0, hidden.shape[0], "one for each row of hidden")
    check_same_device(op, "hidden", hidden, bias=bias, cu_seqlens=cu_seqlens, weights=weights)
    check_offsets(op, "cu_seqlens", cu_seqlens, hidden.shape[0])


def _check_geglu_segment_pool(
    hidden: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    op = "geglu_segment_pool"
    _check_pooled_rows(op, hidden, bias, cu_seqlens, weights)
    if out_dtype is not None and out_dtype not in FLOATS:
        refuse(op, "out_dtype", "float32, bfloat16 or float16", dtype_name(out_dtype))


def _fake_geglu_segment_pool(
    hidden: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return hidden.new_empty((cu_seqlens.shape[0] - 1, hidden.shape[1] // 2), dtype=out_dtype or hidden.dtype)


def _check_geglu_segment_pool_backward(
    grad: Tensor, hidden: Tensor, bias: Tensor | None, cu_seqlens: Tensor, weights: Tensor | None
) -> None:
    op = "geglu_segment_pool_backward"
    _check_pooled_rows(op, hidden, bias, cu_seqlens, weights)
    check_tensor(op, "grad", grad, "a float32, bfloat16 or float16 tensor [S, F]", FLOATS, 2)
    check_size(op, "grad", grad, 0, cu_seqlens.shape[0] - 1, "the number of sequences")
    check_size(op, "grad", grad, 1, hidden.shape[1] // 2, "half the width of hidden")
    check_same_device(op, "hidden", hidden, grad=grad)


def _fake_geglu_segment_pool_backward(
    grad: Tensor, hidden: Tensor, bias: Tensor | None, cu_seqlens: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(hidden.shape[1], dtype=torch.float32),
        hidden.new_empty(0 if weights is None else hidden.shape[0], dtype=torch.float32),
    )


def _setup_geglu_segment_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # torch leaves out the last arguments of a call where they equal their defaults
    hidden, bias, cu_seqlens, weights = (*inputs, None)[:4]
    ctx.save_for_backward(hidden, bias, cu_seqlens, weights)


def _backward_geglu_segment_pool(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, bias, cu_seqlens, weights = ctx.saved_tensors
    grad_hidden, grad_bias, grad_weights = run(grad, hidden, bias, cu_seqlens, weights)
    grads = (
        grad_hidden,
        None if bias is None else grad_bias.to(bias.dtype),
        None,
        None if weights is None else grad_weights,
        None,
    )
    return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))


# FLOPs: an exponential and a gelu count as one and as ten
_GROUPED_SOFTMAX_BACKWARD = register(
    "grouped_softmax_backward",
    family="latent_attention",
    check=_check_grouped_softmax_backward,
    fake=lambda grad, probabilities, groups: probabilities.new_empty(probabilities.shape),
    flops=lambda grad, *rest: 4 * grad[0] * grad[1],
)
_GROUPED_SOFTMAX = register(
    "grouped_softmax",
    family="latent_attention",
    check=lambda scores, groups: _check_groups("grouped_softmax", "scores", scores, groups),
    fake=lambda scores, groups: scores.new_empty(scores.shape),
    flops=lambda scores, *rest: 5 * scores[0] * scores[1],
    gradient=Gradient("grouped_softmax_backward", _setup_grouped_softmax, _backward_grouped_softmax),
)
_GEGLU_SEGMENT_POOL_BACKWARD = register(
    "geglu_segment_pool_backward",
    family="latent_attention",
    check=_check_geglu_segment_pool_backward,
    fake=_fake_geglu_segment_pool_backward,
    flops=lambda grad, hidden, *rest: 15 * hidden[0] * hidden[1],
)
_GEGLU_SEGMENT_POOL = register(
    "geglu_segment_pool",
    family="latent_attention",
    check=_check_geglu_segment_pool,
    fake=_fake_geglu_segment_pool,
    flops=lambda hidden, *rest: 7 * hidden[0] * hidden[1],
    autocast=("hidden",),
    gradient=Gradient("geglu_segment_pool_backward", _setup_geglu_segment_pool, _backward_geglu_segment_pool),
)
