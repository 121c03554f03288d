"""Cases of the norm family: a residual added to rows and the sum normed, with gradients, beside torch's two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import embedding_kernels as ek

from . import ceilings
from .harness import OURS, Case, Contender, Room, Work, compiled, copies

EAGER = "torch: add, then norm"
COMPILED = "torch.compile: add, then norm"
_PEERS = (EAGER, COMPILED)
_EPS = 1e-6

Norm = Callable[..., tuple[Tensor, Tensor]]  # x, residual, weight and, of layer norm, bias -> normed, summed


def _ours(op: str, backend: str | None = None) -> Norm:
    if op == "add_rms_norm":
        return lambda x, residual, weight: ek.add_rms_norm(x, residual, weight, eps=_EPS, backend=backend)
    return lambda x, residual, weight, bias: ek.add_layer_norm(
        x, residual, weight, bias=bias, eps=_EPS, backend=backend
    )


def _theirs(op: str) -> Norm:
    norm = functional.rms_norm if op == "add_rms_norm" else functional.layer_norm

    def run(x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return norm(summed, weight.shape, weight, *bias, eps=_EPS), summed

    return run


# ---- inputs ----


@dataclass
class Rows:
    """Rows to be added and normed, and the gradients of all outputs, in rotating copies; weight and bias."""

    inputs: list[Sequence[Tensor]]
    grads: list[Sequence[Tensor]]
    vectors: list[Tensor]

    def call(self, norm: Norm, gradient: bool) -> Callable[[int], tuple[Tensor, ...]]:
        """A contender's call: norm one of the copies, and with ``gradient`` return the gradients of all inputs."""

        def forward(turn: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return norm(*self.inputs[turn % len(self.inputs)], *self.vectors)

        def both(turn: int) -> tuple[Tensor, ...]:
            place = turn % len(self.inputs)
            leaves = [*self.inputs[place], *self.vectors]
            return torch.autograd.grad(norm(*leaves), leaves, self.grads[place])

        return both if gradient else forward


def drawn_rows(
    room: Room, size: tuple[int, int], dtype: torch.dtype, gradient: bool, *, inputs: int = 2, vectors: int = 1
) -> Rows:
    """As many ``inputs`` as there are outputs."""
    seeded = torch.Generator().manual_seed(0)
    drawn = torch.randn(2 * inputs if gradient else inputs, *size, generator=seeded).to(dtype).to(room.device)
    parts = [copy.unbind(0) for copy in copies(drawn, room)]
    weights = torch.randn(vectors, size[1], generator=seeded).to(dtype).to(room.device).unbind(0)
    return Rows(
        inputs=[[part.detach().requires_grad_(gradient) for part in copy[:inputs]] for copy in parts],
        grads=[copy[inputs:] for copy in parts],
        vectors=[weight.detach().requires_grad_(gradient) for weight in weights],
    )


# ---- answers ----


def _expected(definition: Norm, rows: Rows, gradient: bool) -> list[tuple[Tensor, float]]:
    """By the definition in float64, with the largest sum of absolute terms in each answer."""
    wide = Rows(
        inputs=[[part.detach().double().requires_grad_(gradient) for part in rows.inputs[0]]],
        grads=[[part.double() for part in rows.grads[0]]],
        vectors=[vector.detach().double().requires_grad_(gradient) for vector in rows.vectors],
    )
    answers = wide.call(definition, gradient)(0)
    if not gradient:
        return [(answer, float(answer.abs().max())) for answer in answers]
    # normal values are of the order of 1, so a gradient of weight sums about as much as one of bias
    columns = float(wide.grads[0][0].abs().sum(0).max())
    return [(answer, columns if answer.dim() == 1 else float(answer.abs().max())) for answer in answers]


def verifier(definition: Norm, rows: Rows, gradient: bool) -> Callable[[Any], None]:
    expected, eps = _expected(definition, rows, gradient), torch.finfo(rows.inputs[0][0].dtype).eps

    def verify(answers: tuple[Tensor, ...]) -> None:
        for answer, (exact, terms) in zip(answers, expected, strict=True):
            assert answer.shape == exact.shape, f"shape {tuple(answer.shape)}, expected {tuple(exact.shape)}"
            # a few roundings of the answer, and in float32 of the terms that it sums
            allowed = 8 * eps * float(exact.abs().max()) + 8 * torch.finfo(torch.float32).eps * terms
            worst = float((answer.double() - exact).abs().max())
            assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"

    return verify


def _drawn(room: Room, op: str, rows: int, dim: int, dtype: torch.dtype, gradient: bool) -> Rows:
    return drawn_rows(room, (rows, dim), dtype, gradient, vectors=1 if op == "add_rms_norm" else 2)


# ---- cases ----


def _build(op: str, rows: int, dim: int, dtype: torch.dtype, gradient: bool, room: Room) -> list[Contender]:
    inputs = _drawn(room, op, rows, dim, dtype, gradient)
    verify = verifier(_ours(op, "reference"), inputs, gradient)
    return [
        Contender(OURS, inputs.call(_ours(op), gradient), verify, role="ours"),
        Contender(EAGER, inputs.call(_theirs(op), gradient), verify),
        Contender(COMPILED, inputs.call(compiled(_theirs(op)), gradient), verify, note="compiled before timing"),
        ceilings.copy(room),
    ]


def _case(op: str, rows: int, dim: int, dtype: torch.dtype, gradient: bool, quick: bool = False) -> Case:
    kind = str(dtype).removeprefix("torch.")
    # two read and two written; in backward both gradients and the sum read, one gradient written
    moved = (8 if gradient else 4) * rows * dim * dtype.itemsize
    passes = "forward and backward" if gradient else "forward"
    return Case(
        op,
        f"{rows} × {dim} {kind} {'forward+backward' if gradient else 'forward'}",
        {"rows": rows, "dim": dim, "dtype": kind, "pass": passes, "memory": "cold"},
        _PEERS,
        partial(_build, op, rows, dim, dtype, gradient),
        Work(moved, rows * dim, "values normed"),
        dict.fromkeys(_PEERS, 1.0),
        quick=quick,
    )


def _level_case(op: str, dtype: torch.dtype, gradient: bool = False, quick: bool = False) -> Case:
    """The same at each level of instruction set, on inputs that stay in the caches."""
    rows, dim = 256, 384

    def build(room: Room) -> list[Contender]:
        inputs = _drawn(Room(room.device, room.threads, room.quick, cold_bytes=1), op, rows, dim, dtype, gradient)
        verify = verifier(_ours(op, "reference"), inputs, gradient)
        return [Contender(OURS, inputs.call(_ours(op), gradient), verify, role="ours")]

    kind = str(dtype).removeprefix("torch.")
    title = f"levels: {rows} × {dim} {kind} {'forward+backward' if gradient else 'forward'}"
    work = Work((8 if gradient else 4) * rows * dim * dtype.itemsize, rows * dim, "values normed")
    return Case(op, title, {"memory": "in cache"}, (), build, work, quick=quick, levels=True)


def _cases(op: str) -> list[Case]:
    cases = [
        _case(op, rows, dim, dtype, gradient, quick=(dim, dtype) == (384, torch.float32))
        for rows, dim in ((4096, 384), (4096, 1024), (2048, 4096))
        for dtype in (torch.float32, torch.bfloat16)
        for gradient in (False, True)
    ]
    return [*cases, _level_case(op, torch.float32, quick=True), _level_case(op, torch.bfloat16, gradient=True)]


BENCHMARKS: dict[str, list[Case]] = {op: _cases(op) for op in ("add_rms_norm", "add_layer_norm")}
