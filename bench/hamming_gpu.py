"""Nearest codes at sizes of a GPU: codes that fill a tenth of its memory, made and checked on the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import embedding_kernels as ek

from . import ceilings
from .hamming_peers import Corpus
from .harness import OURS, Case, Contender, Room, Work, compiled, prepared
from .within import other_roads

SM_80 = "ours, kernels of sm_80"
POPCOUNT = "torch xor + popcount, compiled"
PRODUCT = "torch ±1 product"
FAISS = "FAISS GpuIndexBinaryFlat"
CUPY = "CuPy popcount"  # cuVS has no exact search of bits

_SETS = 4  # of queries, in rotation
_CHECKED = 6  # queries whose distances to all codes are counted bit by bit
Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """``part`` codes at a time are as many as torch's searches have memory for."""

    codes: int
    bits: int
    queries: int
    k: int
    part: int

    def small(self) -> Shape:
        return replace(self, codes=5000, queries=min(self.queries, 20), part=1200)


@lru_cache(maxsize=1)
def _codes(device: torch.device, count: int, bits: int) -> Tensor:
    """Random; cases that follow each other share them."""
    seeded = torch.Generator(device).manual_seed(0)
    codes = torch.empty(count, bits // 8, dtype=torch.uint8, device=device)
    for part in codes.split(1 << 24):
        torch.randint(256, part.shape, generator=seeded, device=device, out=part)
    return codes


def _corpus(room: Room, shape: Shape) -> Corpus:
    seeded = torch.Generator(room.device).manual_seed(1)
    size = (shape.queries, shape.bits // 8)
    sets = [torch.randint(256, size, dtype=torch.uint8, device=room.device, generator=seeded) for _ in range(_SETS)]
    return Corpus([_codes(room.device, shape.codes, shape.bits)], sets, room.threads)


# ---- searches in plain torch ----


def _ones(words: Tensor) -> Tensor:
    """How many bits of each int64 are set; what an arithmetic shift drags in is masked away."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56


def distances(query: Tensor, codes: Tensor) -> Tensor:
    """int32 [N], of one query [W] in int64 words."""
    return _ones(query ^ codes).sum(-1, dtype=torch.int32)


def signs(codes: Tensor) -> Tensor:
    """±1 in bfloat16, [N, bits]."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    return (((codes.unsqueeze(-1) >> shifts) & 1).to(torch.bfloat16) * 2 - 1).flatten(1)


def _parts(codes: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(codes), size):
        yield first, codes[first : first + size]


def _nearest(found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Of what the parts gave."""
    near = torch.cat([part for part, _ in found], 1)
    nearest, places = near.topk(min(k, near.shape[1]), largest=False)
    return nearest, torch.cat([part for _, part in found], 1).gather(1, places)


def by_popcount(shape: Shape, count: Callable[[Tensor, Tensor], Tensor] = distances) -> Search:
    """Of one query."""

    def search(queries: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for first, part in _parts(codes, shape.part):
            of_part = count(queries[0].view(torch.int64), part.view(torch.int64))
            near, places = of_part.topk(min(shape.k, len(part)), largest=False)
            found.append((near[None], places[None] + first))
        return _nearest(found, shape.k)

    return search


def by_product(shape: Shape, unpack: Callable[[Tensor], Tensor] = signs) -> Search:
    """Unpacked in the call: beforehand they would take sixteen times the memory. bfloat16 holds every even number up
    to 512, so that distances above a quarter of 1,024 bits are exact; none of random codes is nearer."""

    def search(queries: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        mine, found = unpack(queries), []
        for first, part in _parts(codes, shape.part):
            agreement, places = (mine @ unpack(part).T).topk(min(shape.k, len(part)))
            found.append(((shape.bits - agreement.int()) // 2, places + first))
        return _nearest(found, shape.k)

    return search


# ---- what answers are held against ----


@dataclass
class Truth:
    """The distances of the nearest of all queries, and of some queries which they are, lowest index first."""

    distances: Tensor  # int32 [Q, k]
    checked: Tensor  # int64 [some]
    indices: Tensor  # int64 [some, k]


def truth(corpus: Corpus, shape: Shape) -> Truth:
    """By a product for all queries, which counting bit by bit confirms for some."""
    queries, codes = corpus.queries[0], corpus.codes[0]
    by_chance = torch.randperm(len(queries), generator=torch.Generator().manual_seed(2))
    checked = by_chance[:_CHECKED].sort().values.to(codes.device)
    exact = [_ranked(queries[place], codes, shape) for place in checked]
    near, indices = (torch.stack(parts) for parts in zip(*exact, strict=True))
    every = near if len(queries) == 1 else by_product(shape)(queries, codes)[0]
    if not torch.equal(every[checked], near):
        raise ArithmeticError("the product and the counted bits disagree on the nearest codes")
    return Truth(every, checked, indices)


def _ranked(query: Tensor, codes: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The nearest of one query by (distance, index)."""
    query, codes = query.view(torch.int64), codes.view(torch.int64)
    every = torch.cat([distances(query, part).short() for _, part in _parts(codes, shape.part)])
    last = every.topk(shape.k, largest=False).values[-1]
    places = (every <= last).nonzero()[:, 0]  # in order of index, which a stable sort keeps
    near, order = every[places].int().sort(stable=True)
    return near[: shape.k], places[order][: shape.k]


def verifier(corpus: Corpus, shape: Shape, expected: Truth, ordered: bool) -> Callable[[Any], None]:
    """Distances as expected; the codes named have them, each is named once, where ties are ``ordered`` by index."""
    queries, codes = corpus.queries[0], corpus.codes[0]

    def verify(answer: tuple[Any, Any]) -> None:
        near, places = (torch.as_tensor(part, device=codes.device).long() for part in answer)
        assert near.shape == places.shape == expected.distances.shape, f"shape {tuple(near.shape)}"
        wrong = int((near != expected.distances).sum())
        assert wrong == 0, f"{wrong} of {near.numel()} distances are wrong"
        assert bool(((places >= 0) & (places < len(codes))).all()), "indices out of range"
        named = codes[places].view(torch.int64) ^ queries.view(torch.int64)[:, None]
        assert torch.equal(_ones(named).sum(-1), near), "codes that are not at the distances given"
        in_order = places.sort(1).values
        assert bool((in_order[:, 1:] > in_order[:, :-1]).all()), "codes named twice"
        if ordered:
            tied = near[:, 1:] == near[:, :-1]
            assert bool((~tied | (places[:, 1:] > places[:, :-1])).all()), "ties out of order"
            assert torch.equal(places[expected.checked], expected.indices), "ties that are not the lowest indices"

    return verify


# ---- cases ----


def _in_torch(name: str, search: Search, corpus: Corpus, verify: Callable[[Any], None], note: str) -> Contender:
    return Contender(name, lambda turn: search(corpus.query(turn), corpus.code(turn)), verify, note=note)


def _fast(run: Callable[..., Tensor], room: Room) -> Callable[..., Tensor]:
    """On a processor in plain torch: compiling takes longer than all the rest."""
    return compiled(run) if room.device.type == "cuda" else run


def _cupy_distances() -> Callable[[Tensor, Tensor], Tensor]:
    import cupy

    kernel = cupy.ReductionKernel("uint64 a, uint64 b", "int32 y", "__popcll(a ^ b)", "a + b", "y = a", "0", "hamming")

    def count(query: Tensor, codes: Tensor) -> Tensor:
        words = [cupy.from_dlpack(part).view(cupy.uint64) for part in (query, codes)]
        return torch.from_dlpack(kernel(words[0][None], words[1], axis=1))

    return count


def _in_cupy(corpus: Corpus, shape: Shape, verify: Callable[[Any], None]) -> Contender:
    search = by_popcount(shape, _cupy_distances())
    return _in_torch(CUPY, search, corpus, verify, "a ReductionKernel of __popcll; torch.topk in parts")


def _faiss(corpus: Corpus, shape: Shape, verify: Callable[[Any], None]) -> Contender | None:
    if corpus.on_host or importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    if not hasattr(faiss, "GpuIndexBinaryFlat"):
        return None  # built without CUDA
    index = faiss.GpuIndexBinaryFlat(faiss.StandardGpuResources(), shape.bits)
    index.add(corpus.codes[0].cpu().numpy())
    sets = [queries.cpu().numpy() for queries in corpus.queries]
    return Contender(
        FAISS, lambda turn: index.search(sets[turn % len(sets)], shape.k), verify, note="queries from host"
    )


def _build(shape: Shape, names: tuple[str, ...], room: Room) -> list[Contender]:
    corpus = _corpus(room, shape)
    expected = truth(corpus, shape)
    verify, loosely = (verifier(corpus, shape, expected, ordered) for ordered in (True, False))
    run = lambda turn: ek.hamming_topk(corpus.query(turn), corpus.code(turn), shape.k)  # noqa: E731
    mine = Contender(OURS, run, verify, role="ours")
    found: list[Contender | None] = [mine, *other_roads(mine, names, room)]
    if POPCOUNT in names:
        search = by_popcount(shape, _fast(distances, room))
        found.append(_in_torch(POPCOUNT, search, corpus, loosely, "int64 words; torch.topk in parts"))
    if CUPY in names and room.device.type == "cuda" and importlib.util.find_spec("cupy") is not None:
        found.append(prepared(CUPY, partial(_in_cupy, corpus, shape, loosely)))
    if PRODUCT in names:
        search = by_product(shape, _fast(signs, room))
        found.append(
            _in_torch(PRODUCT, search, corpus, loosely, "bfloat16, unpacked in the call; torch.topk, in parts")
        )
    if FAISS in names:
        found.append(prepared(FAISS, partial(_faiss, corpus, shape, loosely)))
    limits = [ceilings.read(room)] if shape.queries == 1 else [ceilings.read(room), ceilings.gemm(room, shape.bits)]
    return [*[contender for contender in found if contender is not None], *limits]


def _made(shape: Shape, names: tuple[str, ...]) -> Case:
    count = f"{shape.codes // 10**6}M" if shape.codes >= 10**6 else f"{shape.codes}"
    return Case(
        "hamming_topk",
        f"{shape.queries} of {count}, {shape.bits} bits, k={shape.k}",
        {"queries": shape.queries, "codes": shape.codes, "bits": shape.bits, "k": shape.k, "memory": "as it comes"},
        names,
        partial(_build, shape, names),
        Work(
            (shape.codes + shape.queries) * shape.bits // 8 + 12 * shape.queries * shape.k,
            shape.queries * shape.codes * shape.bits,
            "bits compared",
        ),
    )


def _case(codes: int, bits: int, queries: int, k: int, *names: str) -> Case:
    # torch's own take a second of the largest, Triton's perhaps too
    patience = 8.0 if PRODUCT in names and codes > 50_000_000 else 3.0 if queries > 1 else 1.0
    shape = Shape(codes, bits, queries, k, 12_500_000 if queries == 1 else 1_000_000)
    return replace(_made(shape, names), where="cuda", small=_made(shape.small(), names), patience=patience)


_MANY, _LARGE = 100_000_000, 1024

#: by importance: where time ends, the rest is left; cases that share codes stand together
CASES: list[Case] = [
    _case(_MANY, _LARGE, 1024, 10, SM_80, PRODUCT),
    _case(_MANY, _LARGE, 1, 10, SM_80, POPCOUNT),
    _case(_MANY, _LARGE, 1, 100, SM_80, POPCOUNT, CUPY),
    _case(_MANY, _LARGE, 1024, 100, SM_80),
    _case(10_000_000, 256, 1024, 10, SM_80, PRODUCT, FAISS),
    _case(10_000_000, 256, 1024, 100, SM_80, PRODUCT),
]
