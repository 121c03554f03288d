"""Cases of the latent attention family at the sizes of NV-Embed: what stands between a head's matrix products."""

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

EAGER_SOFTMAX = "torch: softmax of a view"
COMPILED_SOFTMAX = "torch.compile: softmax of a view"
INDEX_ADD = "torch: chunk, gelu, index_add"
SEGMENT_REDUCE = "torch: chunk, gelu, segment_reduce"
COMPILED_INDEX_ADD = "torch.compile: chunk, gelu, index_add"

_GROUPS, _SCORES = 8, 4096  # heads, and latents of them all
_COLUMNS = 16384
_BEFORE = "compiled before timing"
#: tokens of each text
_LENGTHS = {64: (40, 5, 19), 512: (300, 12, 128, 72), 2048: (1100, 9, 500, 64, 375)}

Run = Callable[..., Tensor]  # rows and, of the gated unit, its bias -> softmax or means

# ---- inputs ----


@dataclass
class Inputs:
    """Rows in rotating copies, the vectors that go with each of them, and the gradient of the answer."""

    rows: list[Tensor]
    vectors: Sequence[Tensor]
    grad: Tensor

    def call(self, run: Run, gradient: bool) -> Callable[[int], tuple[Tensor, ...]]:
        """A contender's call; with ``gradient`` it returns the gradients of rows and vectors."""

        def forward(turn: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (run(self.rows[turn % len(self.rows)], *self.vectors),)

        def both(turn: int) -> tuple[Tensor, ...]:
            leaves = [self.rows[turn % len(self.rows)], *self.vectors]
            return torch.autograd.grad(run(*leaves), leaves, self.grad)

        return both if gradient else forward

    def part(self, columns: Tensor, of_answer: Tensor) -> Inputs:
        """The first copy in float64, some of its columns and those of the answer."""
        taken = [tensor.detach().double()[..., columns] for tensor in (self.rows[0], *self.vectors)]
        rows, *vectors = (tensor.requires_grad_(self.rows[0].requires_grad) for tensor in taken)
        return Inputs([rows], vectors, self.grad.double()[:, of_answer])


def _inputs(
    room: Room, tokens: int, width: int, answer: tuple[int, int], bias: bool, dtype: torch.dtype, gradient: bool
) -> Inputs:
    seeded = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seeded).to(dtype).to(room.device)

    rows = copies(drawn(tokens, width), room)
    return Inputs(
        rows=[copy.detach().requires_grad_(gradient) for copy in rows],
        vectors=[drawn(width).requires_grad_(gradient)] if bias else [],
        grad=drawn(*answer),
    )


# ---- answers ----


def _verifier(
    inputs: Inputs, definition: Run, columns: Tensor, of_answer: Tensor, gradient: bool, terms: float = 0.0
) -> Callable[[Any], None]:
    """Of some columns, which do not depend on the others: the definition in float64 takes many times the memory.

    ``terms`` is of the order of what an answer averages, where that exceeds the answer.
    """
    part = inputs.part(columns, of_answer)
    expected = [answer.detach() for answer in part.call(definition, gradient)(0)]
    taken = columns if gradient else of_answer
    eps = torch.finfo(inputs.rows[0].dtype).eps

    def verify(answers: tuple[Tensor, ...]) -> None:
        for answer, exact in zip(answers, expected, strict=True):
            # a few roundings; more where compiled code adds up all rows one by one, for the bias
            allowed = (64 if answer.dim() == 1 else 8) * eps * max(float(exact.abs().max()), terms)
            worst = float((answer.double()[..., taken] - exact).abs().max())
            assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"

    return verify


# ---- contenders ----


def _eager_softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores.unflatten(1, (_GROUPS, -1)), -1).flatten(1)


def _build_softmax(
    tokens: int, width: int, dtype: torch.dtype, gradient: bool, peers: bool, room: Room
) -> list[Contender]:
    inputs = _inputs(room, tokens, width, (tokens, width), False, dtype, gradient)
    group = torch.arange(width // _GROUPS, device=room.device) + width // _GROUPS * (_GROUPS - 1)
    definition = partial(ek.grouped_softmax, groups=1, backend="reference")
    verify = _verifier(inputs, definition, group, group, gradient)
    ours = inputs.call(lambda scores: ek.grouped_softmax(scores, _GROUPS), gradient)
    contenders = [Contender(OURS, ours, verify, role="ours")]
    if not peers:
        return contenders
    return [
        *contenders,
        Contender(EAGER_SOFTMAX, inputs.call(_eager_softmax, gradient), verify),
        Contender(COMPILED_SOFTMAX, inputs.call(compiled(_eager_softmax), gradient), verify, note=_BEFORE),
        ceilings.copy(room),
    ]


def _gated(hidden: Tensor, bias: Tensor) -> Tensor:
    value, gate = (hidden + bias).chunk(2, 1)
    return value * functional.gelu(gate)


def _index_add(lengths: Tensor) -> Run:
    text_of_row = torch.repeat_interleave(lengths)

    def run(hidden: Tensor, bias: Tensor) -> Tensor:
        rows = _gated(hidden, bias)
        sums = torch.zeros(len(lengths), rows.shape[1], device=rows.device).index_add(0, text_of_row, rows.float())
        return (sums / lengths.unsqueeze(1)).to(rows.dtype)

    return run


def _build_pool(
    lengths: Sequence[int], columns: int, dtype: torch.dtype, gradient: bool, peers: bool, room: Room
) -> list[Contender]:
    inputs = _inputs(room, sum(lengths), 2 * columns, (len(lengths), columns), True, dtype, gradient)
    counts = torch.tensor(lengths, device=room.device)
    cu_seqlens = functional.pad(counts.cumsum(0), (1, 0)).int()
    # 31 meets every lane of a vector
    some = torch.arange(0, columns, 31, device=room.device)
    both = torch.cat([some, some + columns])
    definition = partial(ek.geglu_segment_pool, cu_seqlens=cu_seqlens, backend="reference")
    verify = _verifier(inputs, definition, both, some, gradient, terms=0.0 if gradient else 1.0)
    ours = inputs.call(lambda hidden, bias: ek.geglu_segment_pool(hidden, bias, cu_seqlens), gradient)
    contenders = [Contender(OURS, ours, verify, role="ours")]
    if not peers:
        return contenders
    index_add = _index_add(counts)

    def segment_reduce(hidden: Tensor, bias: Tensor) -> Tensor:
        return torch.segment_reduce(_gated(hidden, bias).float(), "mean", lengths=counts, axis=0).to(hidden.dtype)

    known = "text of each row known beforehand"
    return [
        *contenders,
        Contender(INDEX_ADD, inputs.call(index_add, gradient), verify, note=known),
        Contender(SEGMENT_REDUCE, inputs.call(segment_reduce, gradient), verify),
        Contender(COMPILED_INDEX_ADD, inputs.call(compiled(index_add), gradient), verify, note=_BEFORE),
        ceilings.copy(room) if gradient else ceilings.read(room),
    ]


# ---- cases ----

_SOFTMAX_PEERS = (EAGER_SOFTMAX, COMPILED_SOFTMAX)
_POOL_PEERS = (INDEX_ADD, SEGMENT_REDUCE, COMPILED_INDEX_ADD)


def _softmax_work(tokens: int, width: int, dtype: torch.dtype, gradient: bool) -> Work:
    # read and written; in backward two are read and one is written
    return Work((5 if gradient else 2) * tokens * width * dtype.itemsize, tokens * width, "scores normalised")


def _pool_work(lengths: Sequence[int], columns: int, dtype: torch.dtype, gradient: bool) -> Work:
    size = sum(lengths) * columns
    # values and gates read; in backward read again, and as much written
    moved = (6 if gradient else 2) * size + (2 if gradient else 1) * len(lengths) * columns
    return Work(moved * dtype.itemsize, size, "values gated")


def _case(op: str, tokens: int, dtype: torch.dtype, gradient: bool) -> Case:
    kind, passes = str(dtype).removeprefix("torch."), "forward+backward" if gradient else "forward"
    shared = {"tokens": tokens, "dtype": kind, "pass": passes.replace("+", " and "), "memory": "cold"}
    if op == "grouped_softmax":
        size, peers = f"{tokens} × {_GROUPS} × {_SCORES // _GROUPS}", _SOFTMAX_PEERS
        shared |= {"groups": _GROUPS, "width": _SCORES}
        build = partial(_build_softmax, tokens, _SCORES, dtype, gradient, True)
        work = _softmax_work(tokens, _SCORES, dtype, gradient)
    else:
        lengths = _LENGTHS[tokens]
        size, peers = f"{len(lengths)} texts of {tokens} × 2 × {_COLUMNS}", _POOL_PEERS
        shared |= {"texts": len(lengths), "lengths": " ".join(map(str, lengths)), "columns": _COLUMNS}
        build = partial(_build_pool, lengths, _COLUMNS, dtype, gradient, True)
        work = _pool_work(lengths, _COLUMNS, dtype, gradient)
    quick = (tokens, dtype) == (64, torch.float32)
    return Case(op, f"{size} {kind} {passes}", shared, peers, build, work, dict.fromkeys(peers, 1.0), quick=quick)


def _level_case(op: str, dtype: torch.dtype, gradient: bool, quick: bool = False) -> Case:
    """The same at each level of instruction set, on inputs that stay in the caches."""
    lengths, columns = (12, 4), 2048
    if op == "grouped_softmax":
        size, make = f"16 × {_GROUPS} × {_SCORES // _GROUPS}", partial(_build_softmax, 16, _SCORES)
        work = _softmax_work(16, _SCORES, dtype, gradient)
    else:
        size, make = f"2 texts of 16 × 2 × {columns}", partial(_build_pool, lengths, columns)
        work = _pool_work(lengths, columns, dtype, gradient)

    def build(room: Room) -> list[Contender]:
        return make(dtype, gradient, False, Room(room.device, room.threads, room.quick, cold_bytes=1))

    title = f"levels: {size} {str(dtype).removeprefix('torch.')} {'forward+backward' if gradient else 'forward'}"
    return Case(op, title, {"memory": "in cache"}, (), build, work, quick=quick, levels=True)


def _cases(op: str) -> list[Case]:
    cases = [
        _case(op, tokens, dtype, gradient)
        for tokens in _LENGTHS
        for dtype in (torch.float32, torch.bfloat16)
        for gradient in (False, True)
    ]
    levels = _level_case(op, torch.float32, False, quick=True), _level_case(op, torch.bfloat16, True)
    return [*cases, *levels]


BENCHMARKS: dict[str, list[Case]] = {op: _cases(op) for op in ("grouped_softmax", "geglu_segment_pool")}
