"""Cases of the attention family: ragged, short and dense batches, the relative bias, gradients, merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

import embedding_kernels as ek
from embedding_kernels import reference

from . import attention_gpu, ceilings
from . import attention_peers as peers
from .harness import OURS, Case, Contender, Room, Work, copies

_REACH = 91  # R of T5's table for encoders

#: texts, shortest and longest
_RAGGED, _SHORT, _DENSE = (64, 8, 256), (256, 8, 32), (8, 512, 512)


def _lengths(texts: int, shortest: int, longest: int) -> Tensor:
    """Tokens of each text, the same in every run."""
    return torch.randint(shortest, longest + 1, (texts,), generator=torch.Generator().manual_seed(texts))


@lru_cache(maxsize=1)
def _rows(room: Room, batch: tuple[int, int, int], heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Rotating copies of the rows; cases that follow each other share them."""
    seeded = torch.Generator().manual_seed(0)
    fused = torch.randn(int(_lengths(*batch).sum()), 3, heads, dim, generator=seeded)
    # attention computes far more than it reads: a quarter of what others rotate through
    return copies(fused.to(dtype).to(room.device), replace(room, cold_bytes=room.cold_bytes // 4))


# ---- answers ----


def _definition(texts: peers.Texts) -> list[Tensor]:
    """In float64: the output, or the gradients of rows and table."""
    rows = texts.fused[0].detach().double().requires_grad_(texts.gradient)
    table = None if texts.table is None else texts.table.double().requires_grad_(texts.gradient)
    offsets, longest = [texts.cu_seqlens] * 2, [texts.longest] * 2
    out, _ = reference.varlen_attention(*rows.unbind(1), *offsets, *longest, bias_table=table)
    if not texts.gradient:
        return [out]
    return list(torch.autograd.grad(out, [rows, *([] if table is None else [table])], texts.grad.double()))


def _verifier(texts: peers.Texts) -> peers.Verify:
    """Errors of at most a few roundings of the dtype, of the largest value."""
    expected = _definition(texts)
    eps = torch.finfo(texts.fused[0].dtype).eps

    def verify(answer: Sequence[Tensor]) -> None:
        for got, want in zip(answer, expected, strict=True):
            assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            worst, allowed = float((got.double() - want).abs().max()), 16 * eps * float(want.abs().max())
            assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"

    return verify


# ---- varlen_attention ----


def _build(
    batch: tuple[int, int, int], heads: int, dim: int, dtype: torch.dtype, bias: bool, gradient: bool,
    names: tuple[str, ...], room: Room,
) -> list[Contender]:  # fmt: skip
    seeded = torch.Generator().manual_seed(1)
    rows = _rows(room, batch, heads, dim, dtype)
    grad = torch.randn(len(rows[0]), heads, dim, generator=seeded).to(dtype).to(room.device)
    table = torch.randn(heads, 2 * _REACH + 1, generator=seeded).to(room.device) if bias else None
    texts = peers.Texts(rows, _lengths(*batch).to(room.device), grad, table, gradient)
    verify = _verifier(texts)
    found = [peers.MAKERS[name](texts, verify) for name in names if not (room.quick and name == peers.FLEX)]
    mine = Contender(OURS, peers.ours(texts), verify, role="ours")
    return [mine, *(contender for contender in found if contender is not None), ceilings.matmul(room, dtype)]


def _case(
    kind: str,
    batch: tuple[int, int, int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    targets: Mapping[str, float],
    *untargeted: str,
    bias: bool = False,
    gradient: bool = False,
    quick: bool = False,
) -> Case:
    texts, shortest, longest = batch
    name = str(dtype).removeprefix("torch.")
    spread = f"{shortest} to {longest}" if shortest < longest else f"{longest}"
    names = (*targets, *untargeted)
    lengths = _lengths(*batch)
    # two products forward; five backward, scores again among them
    operations = (14 if gradient else 4) * int((lengths**2).sum()) * heads * dim
    rows = int(lengths.sum()) * heads * dim * dtype.itemsize
    parameters = {
        "texts": texts, "lengths": spread, "heads": heads, "head_dim": dim, "dtype": name,
        "bias": f"table, R = {_REACH}" if bias else "none", "pass": "forward and backward" if gradient else "forward",
    }  # fmt: skip
    extras = " forward+backward" * gradient + ", bias" * bias
    return Case(
        "varlen_attention",
        f"{kind} {texts} × {spread}, {heads} × {dim} {name}{extras}",
        parameters,
        names,
        partial(_build, batch, heads, dim, dtype, bias, gradient, names),
        Work((12 if gradient else 4) * rows, operations, f"{name} operations"),
        targets,
        quick=quick,
    )


def _level_case(dtype: torch.dtype) -> Case:
    """The same at each level of instruction set."""
    batch, heads, dim = (16, 8, 256), 4, 64

    def build(room: Room) -> list[Contender]:
        return _build(batch, heads, dim, dtype, False, False, (), replace(room, cold_bytes=4))

    case = _case("levels:", batch, heads, dim, dtype, {})
    return replace(case, build=build, levels=True, tiles=dtype == torch.bfloat16)


# ---- merge_attention ----


def _build_merge(tokens: int, heads: int, dim: int, dtype: torch.dtype, room: Room) -> list[Contender]:
    seeded = torch.Generator().manual_seed(0)
    made = [torch.randn(tokens, heads, dim, generator=seeded).to(dtype).to(room.device) for _ in range(2)]
    sides = [copies(out, room) for out in made]
    lse_a, lse_b = torch.randn(2, heads, tokens, generator=seeded).to(room.device)
    wide = [x.double() for x in (made[0], lse_a, made[1], lse_b)]
    expected = reference.merge_attention(*wide)
    eps = torch.finfo(dtype).eps

    def verify(answer: Sequence[Tensor]) -> None:
        for got, want, rounding in zip(answer, expected, (eps, torch.finfo(torch.float32).eps), strict=True):
            worst, allowed = float((got.double() - want).abs().max()), 8 * rounding * float(want.abs().max())
            assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"

    def over(merge: object) -> object:
        return lambda turn: merge(sides[0][turn % len(sides[0])], lse_a, sides[1][turn % len(sides[1])], lse_b)  # type: ignore[operator]

    mine = Contender(OURS, over(ek.merge_attention), verify, role="ours")  # type: ignore[arg-type]
    return [mine, Contender(peers.MERGE, over(peers.merge_eager), verify), ceilings.copy(room)]  # type: ignore[arg-type]


def _merge_case(tokens: int, heads: int, dim: int, dtype: torch.dtype, quick: bool = False) -> Case:
    name = str(dtype).removeprefix("torch.")
    return Case(
        "merge_attention",
        f"{tokens} tokens, {heads} × {dim} {name}",
        {"tokens": tokens, "heads": heads, "head_dim": dim, "dtype": name, "memory": "cold"},
        (peers.MERGE,),
        partial(_build_merge, tokens, heads, dim, dtype),
        Work(3 * tokens * heads * (dim * dtype.itemsize + 4), 0, ""),
        quick=quick,
    )


_F32, _BF16 = torch.float32, torch.bfloat16
_EVERY = (peers.PADDED, peers.LOOP, peers.BUCKETS)
_RAGGED_TARGETS = dict.fromkeys(_EVERY, 1.5)
_SHORT_TARGETS = dict.fromkeys(_EVERY, 4.0)
_BIAS_TARGETS = {peers.PADDED: 3.0, peers.WITHOUT_BIAS: 1 / 1.1}
_BACKWARD_BIAS_TARGETS = {peers.PADDED: 2.0}

# cases that share a batch stand together
_ON_A_PROCESSOR = [
    _case("ragged", _RAGGED, 12, 32, _F32, _RAGGED_TARGETS, peers.NESTED, peers.FLEX, quick=True),
    _case("ragged", _RAGGED, 12, 32, _F32, _RAGGED_TARGETS, gradient=True, quick=True),
    _case("ragged", _RAGGED, 12, 32, _BF16, _RAGGED_TARGETS, peers.NESTED),
    _case("ragged", _RAGGED, 12, 64, _F32, _RAGGED_TARGETS),
    _case("ragged", _RAGGED, 12, 64, _F32, _BIAS_TARGETS, bias=True, quick=True),
    _case("ragged", _RAGGED, 12, 64, _F32, _RAGGED_TARGETS, gradient=True),
    _case("ragged", _RAGGED, 12, 64, _F32, _BACKWARD_BIAS_TARGETS, bias=True, gradient=True),
    _case("ragged", _RAGGED, 12, 64, _BF16, _RAGGED_TARGETS, peers.FLEX),
    _case("ragged", _RAGGED, 12, 64, _BF16, _BIAS_TARGETS, bias=True),
    _case("ragged", _RAGGED, 12, 64, _BF16, _RAGGED_TARGETS, gradient=True),
    _case("ragged", _RAGGED, 12, 64, _BF16, _BACKWARD_BIAS_TARGETS, bias=True, gradient=True),
    _case("short", _SHORT, 12, 32, _F32, _SHORT_TARGETS, peers.NESTED),
    _case("short", _SHORT, 12, 32, _BF16, _SHORT_TARGETS),
    _case("dense", _DENSE, 12, 64, _F32, {peers.PADDED: 1.05}),
    _case("dense", _DENSE, 12, 64, _BF16, {peers.PADDED: 1.6}),
    _level_case(_F32),
    _level_case(_BF16),
]

BENCHMARKS: dict[str, list[Case]] = {
    "varlen_attention": [*attention_gpu.CASES, *(replace(case, where="cpu") for case in _ON_A_PROCESSOR)],
    "merge_attention": [_merge_case(8192, 12, 64, _F32, quick=True), _merge_case(8192, 12, 64, _BF16)],
}
