"""Cases of rescore_topk, of the Hamming family: candidates put in order by float queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import embedding_kernels as ek
from embedding_kernels import reference

from . import ceilings
from .harness import OURS, Case, Contender, Room, Work

_ROWS = 200_000
GATHER = "torch gather + bmm + topk"
LOOP = "NumPy, query by query"


def _vectors(kind: str, dim: int, seeded: torch.Generator) -> tuple[Tensor, Tensor | None]:
    if kind == "bits":
        return torch.randint(256, (_ROWS, dim // 8), dtype=torch.uint8, generator=seeded), None
    vectors = torch.randn(_ROWS, dim, generator=seeded)
    if kind == "int8":
        scale = vectors.abs().amax(0) / 127
        return (vectors / scale).round().to(torch.int8), scale
    return vectors.to(getattr(torch, kind)), None


def _gather(queries: Tensor, candidates: Tensor, vectors: Tensor, k: int, scale: Tensor | None) -> tuple[Any, Any]:
    rows = vectors[candidates]
    rows = reference.hamming.unpack_bits(rows) if rows.dtype == torch.uint8 else rows
    scaled = queries if scale is None else queries * scale
    scores = torch.bmm(rows.float(), scaled.unsqueeze(-1)).squeeze(-1)
    best, places = scores.topk(k)
    return best, candidates.gather(1, places)


def _loop(queries: Tensor, candidates: Tensor, vectors: Tensor, k: int, scale: Tensor | None) -> tuple[Any, Any]:
    """As sentence-transformers' semantic_search_faiss goes over its queries."""
    found = []
    for query, chosen in zip(queries.numpy(), candidates.numpy(), strict=True):
        rows = vectors.numpy()[chosen]
        rows = np.unpackbits(rows, axis=-1) if rows.dtype == np.uint8 else rows
        scores = rows.astype(np.float32) @ (query if scale is None else query * scale.numpy())
        order = np.argsort(-scores)[:k]
        found.append((scores[order], chosen[order]))
    return np.stack([pair[0] for pair in found]), np.stack([pair[1] for pair in found])


def _build(kind: str, dim: int, queries: int, count: int, k: int, room: Room) -> list[Contender]:
    seeded = torch.Generator().manual_seed(0)
    vectors, scale = (None if x is None else x.to(room.device) for x in _vectors(kind, dim, seeded))
    asked = torch.randn(queries, dim, generator=seeded).to(room.device)
    # other candidates in every turn, so that no row is still in a cache
    turns = [
        torch.stack([torch.randperm(_ROWS, generator=seeded)[:count] for _ in range(queries)]).to(room.device)
        for _ in range(4)
    ]
    assert vectors is not None
    exact = reference.rescore_topk(asked.double(), turns[0], vectors, k, scale=scale)[0]

    def verify(answer: tuple[Any, Any]) -> None:
        got = torch.as_tensor(answer[0]).double()
        wrong = (got - exact).abs().max() / exact.abs().max()
        assert wrong < 1e-4, f"scores: off by {float(wrong):.1e} of the largest"

    def contender(name: str, run: Callable[..., Any], role: str = "peer") -> Contender:
        return Contender(name, lambda turn: run(asked, turns[turn % len(turns)], vectors, k, scale), verify, role=role)

    def ours(*arguments: Any) -> Any:
        return ek.rescore_topk(*arguments[:4], scale=arguments[4])

    peers = [contender(GATHER, _gather)]
    if vectors.device.type == "cpu" and vectors.dtype != torch.bfloat16:
        peers.append(contender(LOOP, _loop))
    return [contender(OURS, ours, "ours"), *peers, ceilings.read(room)]


def _case(kind: str, dim: int, queries: int, count: int, k: int = 10, quick: bool = False) -> Case:
    size = {"bits": 1, "int8": 8, "bfloat16": 16, "float32": 32}[kind]
    return Case(
        "rescore_topk",
        f"{queries} × {count} of {_ROWS // 1000}k, {dim} {kind}",
        {"queries": queries, "candidates": count, "dim": dim, "kind": kind, "k": k, "memory": "as it comes"},
        (GATHER, LOOP) if kind != "bfloat16" else (GATHER,),
        partial(_build, kind, dim, queries, count, k),
        Work(queries * count * (dim * size // 8 + 8), 2 * queries * count * dim, "operations"),
        quick=quick,
    )


BENCHMARKS: dict[str, list[Case]] = {
    "rescore_topk": [
        _case("bits", 384, 64, 400, quick=True),
        _case("int8", 384, 64, 400),
        _case("float32", 384, 64, 400),
        _case("bfloat16", 1024, 64, 400),
        _case("float32", 384, 1, 400),
    ],
}
