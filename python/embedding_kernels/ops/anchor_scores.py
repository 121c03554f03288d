"""Anchors that attend to the views of passages, and the scores of those views: multi-view reranking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS, check_offsets, check_range, check_same_device, check_size, check_tensor, dtype_name
from ._registry import Gradient, call, register

_VIEWS = 'a float32, bfloat16 or float16 tensor [P, m, D] (float64 runs with backend="reference")'
_OFFSETS = "an int32 tensor [Q + 1]"


def anchor_attention(views: Tensor, queries: Tensor, cu_passages: Tensor, *, backend: str | None = None) -> Tensor:
    """Cross-attention of one decoder position a view over the passages of its query, heads absorbed.

    For query q, view k and head h, over the passages i of q::

        p_i = exp(views[i, k] · queries[q, k, h]) / Σ_j exp(views[j, k] · queries[q, k, h])
        out[q, k, h] = Σ_i p_i views[i, k]

    Keys and values are never projected: ``queries`` hold W_kᵀ q of each head, and the head's W_v follows on ``out``.
    No scale, as in T5. Products, softmax and sums are float32; a GPU rounds the weights p to the dtype of ``views``
    before the second product, as `varlen_attention`. The decoder's attention of a multi-view reranker ("MVP", arXiv
    2509.07485, 2025). Differentiable. Under autocast ``views`` and ``queries`` are cast.

    Args:
        views: float32, bfloat16 or float16 ``[P, m, D]``, m views of each passage, any strides with D dense; float64
            with ``backend="reference"``.
        queries: ``[Q, m, H, D]`` in the dtype of ``views``, any strides with D dense (`Tensor.expand` works).
        cu_passages: int32 ``[Q + 1]``, from 0, never falling, to P: the passages of each query.
        backend: as in `pack_bits`.

    Returns:
        ``[Q, m, H, D]`` in the dtype of ``views``; 0 for a query without passages.

    Raises:
        ValueError: bad dtype, rank, size or offsets (offsets on CUDA only under EMBEDDING_KERNELS_CHECK=1).
    """
    return call(_ANCHOR_ATTENTION, backend, views, queries, cu_passages)


def anchor_scores(
    views: Tensor, anchors: Tensor, cu_passages: Tensor, *, per_view: bool = False, backend: str | None = None
) -> Tensor:
    """Scores of passages: the mean over the views of anchor · view.

    ``out[i] = 1/m Σ_k anchors[q, k] · views[i, k]`` for passage i of query q, formed in float32 ("MVP", arXiv
    2509.07485, 2025). A passage's score does not depend on the others. Differentiable. Under autocast ``views`` and
    ``anchors`` are cast.

    Args:
        views: float32, bfloat16 or float16 ``[P, m, D]``, any strides with D dense; float64 with
            ``backend="reference"``.
        anchors: ``[Q, m, D]`` in the dtype of ``views``.
        cu_passages: int32 ``[Q + 1]``, from 0, never falling, to P: the passages of each query.
        per_view: True gives every product, before the mean.
        backend: as in `pack_bits`.

    Returns:
        float32 ``[P]``, or ``[P, m]``; float64 for float64.

    Raises:
        ValueError: as `anchor_attention`.
    """
    return call(_ANCHOR_SCORES, backend, views, anchors, cu_passages, per_view)


def anchor_topk(
    views: Tensor, anchors: Tensor, cu_passages: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k best passages of each query by `anchor_scores`, in one call.

    Args:
        views: as in `anchor_scores`.
        anchors: as in `anchor_scores`.
        cu_passages: as in `anchor_scores`.
        k: at least 1; may exceed the number of passages.
        backend: as in `pack_bits`.

    Returns:
        scores float32 ``[Q, k]`` from the highest (NaN stands where -inf would), and places int64 ``[Q, k]`` among the
        passages of the query, counted from 0; equal scores by the lower place. Past the passages: -inf and -1.

    Raises:
        ValueError: as `anchor_attention`, or k below 1.
    """
    return call(_ANCHOR_TOPK, backend, views, anchors, cu_passages, k)


# ---- checks ----


def _check_views(op: str, views: Tensor, name: str, other: Tensor, shape: str, cu_passages: Tensor) -> None:
    """What all three share; ``other`` is ``queries`` or ``anchors``."""
    check_tensor(op, "views", views, _VIEWS, FLOATS, 3)
    rank = shape.count(",") + 1
    check_tensor(op, name, other, f"a {dtype_name(views.dtype)} tensor {shape}, as views", (views.dtype,), rank)
    check_size(op, name, other, 1, views.shape[1], "the views")
    check_size(op, name, other, rank - 1, views.shape[2], "the width of views")
    check_tensor(op, "cu_passages", cu_passages, _OFFSETS, (torch.int32,), 1)
    check_size(op, "cu_passages", cu_passages, 0, other.shape[0] + 1, f"one more than {name}")
    check_same_device(op, "views", views, **{name: other}, cu_passages=cu_passages)
    check_offsets(op, "cu_passages", cu_passages, views.shape[0])


def _check_anchor_attention(op: str, views: Tensor, queries: Tensor, cu_passages: Tensor) -> None:
    _check_views(op, views, "queries", queries, "[Q, m, H, D]", cu_passages)


def _check_anchor_attention_backward(grad: Tensor, views: Tensor, queries: Tensor, cu_passages: Tensor) -> None:
    op = "anchor_attention_backward"
    _check_anchor_attention(op, views, queries, cu_passages)
    check_tensor(op, "grad", grad, f"a {dtype_name(views.dtype)} tensor [Q, m, H, D]", (views.dtype,), 4)
    for dim in range(4):
        check_size(op, "grad", grad, dim, queries.shape[dim], "as queries")
    check_same_device(op, "views", views, grad=grad)


def _check_anchor_scores(op: str, views: Tensor, anchors: Tensor, cu_passages: Tensor) -> None:
    _check_views(op, views, "anchors", anchors, "[Q, m, D]", cu_passages)
    check_range(op, "views.shape[1]", views.shape[1], 1)


def _check_anchor_scores_backward(
    grad: Tensor, views: Tensor, anchors: Tensor, cu_passages: Tensor, per_view: bool
) -> None:
    op = "anchor_scores_backward"
    _check_anchor_scores(op, views, anchors, cu_passages)
    check_tensor(
        op, "grad", grad, f"a float32 tensor {'[P, m]' if per_view else '[P]'}", (torch.float32,), 1 + per_view
    )
    for dim in range(1 + per_view):
        check_size(op, "grad", grad, dim, views.shape[dim], "as views")
    check_same_device(op, "views", views, grad=grad)


def _check_anchor_topk(views: Tensor, anchors: Tensor, cu_passages: Tensor, k: int) -> None:
    _check_anchor_scores("anchor_topk", views, anchors, cu_passages)
    check_range("anchor_topk", "k", k, 1)


# ---- gradients ----


def _setup_anchor_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _setup_anchor_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # torch leaves out the last arguments of a call where they equal their defaults
    views, anchors, cu_passages, ctx.per_view = (*inputs, False)[:4]
    ctx.save_for_backward(views, anchors, cu_passages)


def _only_wanted(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))


def _backward_anchor_attention(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _only_wanted(ctx, *run(grad, *ctx.saved_tensors), None)


def _backward_anchor_scores(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _only_wanted(ctx, *run(grad, *ctx.saved_tensors, ctx.per_view), None, None)


def _empty_like_inputs(views: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return views.new_empty(views.shape), other.new_empty(other.shape)


def _fake_scores(views: Tensor, anchors: Tensor, cu_passages: Tensor, per_view: bool = False) -> Tensor:
    return views.new_empty(views.shape[: 1 + per_view], dtype=torch.float32)


def _fake_topk(views: Tensor, anchors: Tensor, cu_passages: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (anchors.shape[0], k)
    return views.new_empty(shape, dtype=torch.float32), views.new_empty(shape, dtype=torch.int64)


def _products(views: Any) -> int:
    """Multiplications of one product of every view."""
    return views[0] * views[1] * views[2]


_ANCHOR_ATTENTION_BACKWARD = register(
    "anchor_attention_backward",
    family="anchor_scores",
    check=_check_anchor_attention_backward,
    fake=lambda grad, views, queries, cu_passages: _empty_like_inputs(views, queries),
    flops=lambda grad, views, queries, *rest: 10 * queries[2] * _products(views),
)
_ANCHOR_ATTENTION = register(
    "anchor_attention",
    family="anchor_scores",
    check=lambda *args: _check_anchor_attention("anchor_attention", *args),
    fake=lambda views, queries, cu_passages: queries.new_empty(queries.shape),
    flops=lambda views, queries, *rest: 4 * queries[2] * _products(views),
    autocast=("views", "queries"),
    gradient=Gradient("anchor_attention_backward", _setup_anchor_attention, _backward_anchor_attention),
)
_ANCHOR_SCORES_BACKWARD = register(
    "anchor_scores_backward",
    family="anchor_scores",
    check=_check_anchor_scores_backward,
    fake=lambda grad, views, anchors, *rest: _empty_like_inputs(views, anchors),
    flops=lambda grad, views, *rest: 3 * _products(views),
)
_ANCHOR_SCORES = register(
    "anchor_scores",
    family="anchor_scores",
    check=lambda views, anchors, cu_passages, *rest: _check_anchor_scores("anchor_scores", views, anchors, cu_passages),
    fake=_fake_scores,
    flops=lambda views, *rest: 2 * _products(views),
    autocast=("views", "anchors"),
    gradient=Gradient("anchor_scores_backward", _setup_anchor_scores, _backward_anchor_scores),
)
_ANCHOR_TOPK = register(
    "anchor_topk",
    family="anchor_scores",
    check=_check_anchor_topk,
    fake=_fake_topk,
    flops=lambda views, *rest: 2 * _products(views),
    autocast=("views", "anchors"),
)
