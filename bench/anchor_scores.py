"""Anchors over the views of passages: their attention, their scores and the best of these, at T5's sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import embedding_kernels as ek
from embedding_kernels import reference

from . import ceilings
from .harness import OURS, Case, Contender, Room, Work

EAGER = "torch: products of a padded batch"
SDPA = "torch: scaled_dot_product_attention"
_VIEWS, _COPIES = 4, 4


class _Inputs:
    """Lists of equal length, so that a padded batch holds no padding: the best case of the peers."""

    def __init__(self, queries: int, passages: int, heads: int, dim: int, dtype: torch.dtype, room: Room) -> None:
        seeded, scale = torch.Generator().manual_seed(0), dim**-0.25

        def drawn(*shape: int) -> list[Tensor]:
            return [(scale * torch.randn(shape, generator=seeded)).to(room.device, dtype) for _ in range(_COPIES)]

        self.queries, self.passages, self.dtype = queries, passages, dtype
        self.views = drawn(queries * passages, _VIEWS, dim)
        self.heads = drawn(queries, _VIEWS, heads, dim)
        self.cu_passages = torch.arange(queries + 1, dtype=torch.int32, device=room.device) * passages

    def padded(self, views: Tensor) -> Tensor:
        """[Q, m, n, D]"""
        return views.unflatten(0, (self.queries, self.passages)).transpose(1, 2)


def _eager_attention(inputs: _Inputs, views: Tensor, queries: Tensor) -> Tensor:
    own = inputs.padded(views)
    return torch.softmax((queries @ own.transpose(2, 3)).float(), -1).to(views.dtype) @ own


def _sdpa(inputs: _Inputs, views: Tensor, queries: Tensor) -> Tensor:
    own = inputs.padded(views)
    return torch.nn.functional.scaled_dot_product_attention(queries, own, own, scale=1.0)


def _eager_scores(inputs: _Inputs, views: Tensor, anchors: Tensor) -> Tensor:
    return (inputs.padded(views).float() @ anchors.float()[..., None]).mean(1).flatten()


def _call(function: Callable[..., Any], inputs: _Inputs, gradient: bool, others: list[Tensor]) -> Callable[[int], Any]:
    def forward(turn: int) -> Any:
        with torch.no_grad():
            return function(inputs.views[turn % _COPIES], others[turn % _COPIES])

    def both(turn: int) -> Any:
        views, other = (each[turn % _COPIES].detach().requires_grad_() for each in (inputs.views, others))
        out = function(views, other)
        return (out.detach(), *torch.autograd.grad(out, (views, other), torch.ones_like(out)))

    return both if gradient else forward


def _verifier(exact: Any, dtype: torch.dtype) -> Callable[[Any], None]:
    """Against the float64 definition, relative to its largest value."""
    allowed = 2e-6 if dtype == torch.float32 else 2e-2

    def verify(answer: Any) -> None:
        found = answer if isinstance(answer, tuple) else (answer,)
        for got, expected in zip(found, exact if isinstance(exact, tuple) else (exact,), strict=True):
            error = float((got.double() - expected).abs().max() / expected.abs().max())
            assert error <= allowed, f"an answer is {error:.2g} of the largest value away from the definition"

    return verify


def _exact(function: Callable[..., Any], inputs: _Inputs, gradient: bool, other: Tensor) -> Any:
    views, other = inputs.views[0].double(), other.double()
    if not gradient:
        return function(views, other, inputs.cu_passages)
    views, other = views.requires_grad_(), other.requires_grad_()
    out = function(views, other, inputs.cu_passages)
    return (out.detach(), *torch.autograd.grad(out, (views, other), torch.ones_like(out)))


def _build_attention(shape: tuple[int, int, int, int], dtype: torch.dtype, gradient: bool, room: Room) -> Any:
    inputs = _Inputs(*shape, dtype, room)
    verify = _verifier(_exact(reference.anchor_attention, inputs, gradient, inputs.heads[0]), dtype)

    def named(name: str, function: Callable[..., Any], **options: Any) -> Contender:
        return Contender(name, _call(function, inputs, gradient, inputs.heads), verify, **options)

    return [
        named(OURS, lambda views, heads: ek.anchor_attention(views, heads, inputs.cu_passages), role="ours"),
        named(EAGER, partial(_eager_attention, inputs)),
        named(SDPA, partial(_sdpa, inputs)),
        ceilings.matmul(room, dtype),
    ]


def _build_scores(shape: tuple[int, int, int, int], dtype: torch.dtype, k: int | None, room: Room) -> list[Contender]:
    inputs = _Inputs(*shape, dtype, room)
    anchors = [heads[:, :, 0].contiguous() for heads in inputs.heads]
    exact = _exact(reference.anchor_scores, inputs, False, anchors[0])
    if k is not None:
        exact = exact.unflatten(0, (inputs.queries, -1)).topk(k).values
    verify = _verifier(exact, dtype)

    def ours(views: Tensor, anchor: Tensor) -> Tensor:
        if k is not None:
            return ek.anchor_topk(views, anchor, inputs.cu_passages, k)[0]
        return ek.anchor_scores(views, anchor, inputs.cu_passages)

    def eager(views: Tensor, anchor: Tensor) -> Tensor:
        scores = _eager_scores(inputs, views, anchor)
        return scores if k is None else scores.unflatten(0, (inputs.queries, -1)).topk(k).values

    return [
        Contender(OURS, _call(ours, inputs, False, anchors), verify, role="ours"),
        Contender(EAGER, _call(eager, inputs, False, anchors), verify),
    ]


def _title(shape: tuple[int, int, int, int], dtype: torch.dtype, more: str) -> tuple[str, dict[str, Any]]:
    queries, passages, heads, dim = shape
    kind = str(dtype).removeprefix("torch.")
    parameters = {"queries": queries, "passages": passages, "views": _VIEWS, "heads": heads, "dim": dim, "dtype": kind}
    return f"{queries} × {passages} passages, {_VIEWS} views, {heads} × {dim} {kind} {more}", parameters


def _attention_case(shape: tuple[int, int, int, int], dtype: torch.dtype, gradient: bool) -> Case:
    title, parameters = _title(shape, dtype, "forward+backward" if gradient else "forward")
    queries, passages, heads, dim = shape
    operations = (14 if gradient else 4) * queries * passages * _VIEWS * heads * dim
    moved = queries * _VIEWS * (passages + 2 * heads) * dim * dtype.itemsize * (3 if gradient else 1)
    return Case(
        "anchor_attention",
        title,
        parameters,
        (EAGER, SDPA),
        partial(_build_attention, shape, dtype, gradient),
        Work(moved, operations, f"{parameters['dtype']} operations"),
        {EAGER: 1.0, SDPA: 1.0},
        quick=shape[0] == 1,
    )


def _scores_case(shape: tuple[int, int, int, int], dtype: torch.dtype, k: int | None) -> Case:
    title, parameters = _title(shape, dtype, "" if k is None else f"k = {k}")
    queries, passages, _, dim = shape
    return Case(
        "anchor_scores" if k is None else "anchor_topk",
        title.strip(),
        parameters,
        (EAGER,),
        partial(_build_scores, shape, dtype, k),
        Work(queries * passages * _VIEWS * dim * dtype.itemsize, queries * passages, "passages"),
        {EAGER: 1.0},
        quick=shape[0] == 1,
    )


# t5-base for one query and for sixteen, t5-3b, and lists of five as in training
_BASE, _MANY, _LARGE, _TRAINING = (1, 100, 12, 768), (16, 100, 12, 768), (1, 100, 32, 1024), (32, 5, 12, 768)
_DTYPES = (torch.float32, torch.bfloat16)
BENCHMARKS: dict[str, list[Case]] = {
    "anchor_attention": [
        *(_attention_case(shape, dtype, False) for shape in (_BASE, _MANY, _LARGE) for dtype in _DTYPES),
        *(_attention_case(_TRAINING, dtype, True) for dtype in _DTYPES),
    ],
    "anchor_scores": [_scores_case(shape, dtype, None) for shape in (_BASE, _MANY) for dtype in _DTYPES],
    "anchor_topk": [_scores_case(shape, dtype, 10) for shape in (_BASE, _MANY) for dtype in _DTYPES],
}
