"""Cases of the Hamming family: packing, distances, nearest codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import embedding_kernels as ek

from . import ceilings, hamming_gpu, rescoring
from . import hamming_peers as peers
from .harness import OURS, Case, Contender, Room, Work, copies

_BITS = "bits compared"


@lru_cache(maxsize=1)
def make_corpus(room: Room, count: int, bits: int, queries: int, cold: bool) -> peers.Corpus:
    """Random codes and eight sets of queries. Cases that follow each other share them."""
    seeded = torch.Generator().manual_seed(0)
    random = partial(torch.randint, 256, dtype=torch.uint8, generator=seeded)
    codes = random(size=(count, bits // 8)).to(room.device)
    sets = [random(size=(queries, bits // 8)).to(room.device) for _ in range(8)]
    return peers.Corpus(copies(codes, room) if cold else [codes], sets, room.threads)


def asserting_equal(expected: Any, what: str) -> Callable[[Any], None]:
    def verify(answer: Any) -> None:
        got = np.asarray(answer.cpu() if isinstance(answer, Tensor) else answer)
        assert got.shape == np.shape(expected), f"{what}: shape {got.shape}, expected {np.shape(expected)}"
        wrong = int((got != expected).sum())
        assert wrong == 0, f"{what}: {wrong} of {got.size} values are wrong"

    return verify


def _available(makers: dict[str, Callable[[], Contender | None]], names: tuple[str, ...]) -> list[Contender]:
    made = (makers[name]() for name in names)
    return [contender for contender in made if contender is not None]


# ---- pack_bits ----


def _build_pack_bits(rows: int, dim: int, dtype: torch.dtype, names: tuple[str, ...], room: Room) -> list[Contender]:
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dim, generator=seeded).to(dtype).to(room.device)
    x[0, :4] = torch.tensor([0.0, -0.0, float("nan"), 1.0])
    inputs = copies(x, room)
    verify = asserting_equal(np.packbits(x.float().cpu().numpy() > 0, axis=1), "packed bits")
    ours = Contender(OURS, lambda turn: ek.pack_bits(inputs[turn % len(inputs)]), verify, role="ours")
    makers = peers.pack_bits_makers(inputs, verify)
    return [ours, *_available(makers, names), ceilings.read(room)]


def _pack_bits_case(rows: int, dim: int, dtype: torch.dtype, *names: str, quick: bool = False) -> Case:
    kind = str(dtype).removeprefix("torch.")
    work = Work(rows * dim * dtype.itemsize + rows * dim // 8, rows * dim, "values compared")
    return Case(
        "pack_bits",
        f"{rows} × {dim} {kind}",
        {"rows": rows, "dim": dim, "dtype": kind, "memory": "cold"},
        names,
        partial(_build_pack_bits, rows, dim, dtype, names),
        work,
        quick=quick,
    )


# ---- hamming_distance ----


def _build_distance(count: int, bits: int, queries: int, names: tuple[str, ...], room: Room) -> list[Contender]:
    corpus = make_corpus(room, count, bits, queries, cold=queries == 1)
    verify = asserting_equal(peers.exact_distances(corpus.queries[0], corpus.codes[0]), "distances")
    ours = Contender(OURS, lambda turn: ek.hamming_distance(corpus.query(turn), corpus.code(turn)), verify, role="ours")
    makers = peers.distance_makers(corpus, verify)
    return [ours, *_available(makers, names), *_hamming_ceilings(room, queries, bits)]


def _hamming_ceilings(room: Room, queries: int, bits: int) -> list[Contender]:
    return [ceilings.read(room)] if queries < 16 else [ceilings.read(room), ceilings.gemm(room, bits)]


def _distance_case(count: int, bits: int, queries: int, *names: str, quick: bool = False) -> Case:
    return Case(
        "hamming_distance",
        f"{queries} × {_short(count)}, {bits} bits",
        {"queries": queries, "codes": count, "bits": bits, "memory": "cold" if queries == 1 else "as it comes"},
        names,
        partial(_build_distance, count, bits, queries, names),
        Work((count + queries) * bits // 8 + 4 * queries * count, queries * count * bits, _BITS),
        quick=quick,
    )


def _short(count: int) -> str:
    return f"{count // 1_000_000}M" if count % 1_000_000 == 0 else f"{count // 1000}k"


# ---- hamming_topk ----


def _build_topk(count: int, bits: int, queries: int, k: int, names: tuple[str, ...], room: Room) -> list[Contender]:
    corpus = make_corpus(room, count, bits, queries, cold=queries == 1)
    distances, indices = peers.exact_topk(corpus, k)

    def verify_distances(answer: tuple[Any, Any]) -> None:
        asserting_equal(distances, "distances")(answer[0])

    def verify(answer: tuple[Any, Any]) -> None:
        verify_distances(answer)
        asserting_equal(indices, "indices")(answer[1])

    ours = Contender(OURS, lambda turn: ek.hamming_topk(corpus.query(turn), corpus.code(turn), k), verify, role="ours")
    makers = peers.topk_makers(corpus, k, verify, verify_distances)
    return [ours, *_available(makers, names), *_hamming_ceilings(room, queries, bits)]


def _topk_case(count: int, bits: int, queries: int, k: int, *more: str, quick: bool = False) -> Case:
    names = (peers.FAISS, *more)
    target = {1: 1.2, 256: 2.0}.get(queries)
    # each thread's share of the queries goes over the codes once
    return Case(
        "hamming_topk",
        f"{queries} of {_short(count)}, {bits} bits, k={k}",
        {"queries": queries, "codes": count, "bits": bits, "k": k, "memory": "cold" if queries == 1 else "as it comes"},
        names,
        partial(_build_topk, count, bits, queries, k, names),
        Work((count + queries) * bits // 8 + 12 * queries * k, queries * count * bits, _BITS),
        {} if target is None else {peers.FAISS: target},
        quick=quick,
    )


# ---- hamming_range ----


def _build_range(count: int, bits: int, queries: int, names: tuple[str, ...], room: Room) -> list[Contender]:
    corpus = make_corpus(room, count, bits, queries, cold=queries == 1)
    radius = int(bits / 2 - 1.85 * bits**0.5)  # one random code in ten thousand is nearer
    distances = peers.exact_distances(corpus.queries[0], corpus.codes[0])
    near = distances < radius
    expected = (np.append(0, near.sum(1).cumsum()), distances[near], near.nonzero()[1])

    def verify(answer: tuple[Any, Any, Any]) -> None:
        for value, name, right in zip(answer, ("offsets", "distances", "indices"), expected, strict=True):
            asserting_equal(right, name)(value)

    run = lambda turn: ek.hamming_range(corpus.query(turn), corpus.code(turn), radius)  # noqa: E731
    makers = peers.range_makers(corpus, radius, verify)
    return [Contender(OURS, run, verify, role="ours"), *_available(makers, names), ceilings.read(room)]


def _range_case(count: int, bits: int, queries: int, *names: str, quick: bool = False) -> Case:
    return Case(
        "hamming_range",
        f"{queries} of {_short(count)}, {bits} bits",
        {"queries": queries, "codes": count, "bits": bits, "memory": "cold" if queries == 1 else "as it comes"},
        names,
        partial(_build_range, count, bits, queries, names),
        Work((count + queries) * bits // 8, queries * count * bits, _BITS),
        quick=quick,
    )


# ---- the same at each level of instruction set, on inputs that stay in the caches ----


def _level_case(
    op: str,
    title: str,
    build: Callable[[Room], list[Contender]],
    work: Work,
    quick: bool = False,
    tiles: bool = False,
) -> Case:
    return Case(op, f"levels: {title}", {"memory": "in cache"}, (), build, work, quick=quick, levels=True, tiles=tiles)


def _level_topk(queries: int, bits: int, count: int, quick: bool = False) -> Case:
    def build(room: Room) -> list[Contender]:
        corpus = make_corpus(room, count, bits, queries, cold=False)
        expected = peers.exact_topk(corpus, 10)

        def verify(answer: tuple[Tensor, Tensor]) -> None:
            asserting_equal(expected[0], "distances")(answer[0])
            asserting_equal(expected[1], "indices")(answer[1])

        return [Contender(OURS, lambda turn: ek.hamming_topk(corpus.query(turn), corpus.codes[0], 10), verify)]

    work = Work((count + queries) * bits // 8, queries * count * bits, _BITS)
    title = f"{queries} of {_short(count)}, {bits} bits"
    return _level_case("hamming_topk", title, build, work, quick, tiles=queries >= 8)


def _level_distance(queries: int, bits: int, count: int) -> Case:
    def build(room: Room) -> list[Contender]:
        return _build_distance(count, bits, queries, (), room)

    work = Work((count + queries) * bits // 8 + 4 * queries * count, queries * count * bits, _BITS)
    title = f"{queries} × {_short(count)}, {bits} bits"
    return _level_case("hamming_distance", title, build, work, tiles=queries >= 8)


def _level_pack_bits(rows: int, dim: int, dtype: torch.dtype) -> Case:
    def build(room: Room) -> list[Contender]:
        small = Room(room.device, room.threads, room.quick, cold_bytes=1)
        return _build_pack_bits(rows, dim, dtype, (), small)

    kind = str(dtype).removeprefix("torch.")
    work = Work(rows * dim * dtype.itemsize, rows * dim, "values compared")
    return _level_case("pack_bits", f"{rows} × {dim} {kind}", build, work)


_ON_A_PROCESSOR = [
    _topk_case(200_000, 384, 1, 10, peers.NUMKONG, peers.NUMPY_COUNT, peers.TORCH_TABLE, quick=True),
    _topk_case(200_000, 384, 1, 100, peers.NUMKONG),
    _topk_case(200_000, 1024, 1, 10, peers.NUMKONG),
    _topk_case(1_000_000, 384, 1, 10, peers.NUMKONG),
    _topk_case(1_000_000, 1024, 1, 10, peers.NUMKONG),
    _topk_case(1_000_000, 1024, 1, 100),
    _topk_case(200_000, 384, 16, 10, peers.NUMKONG, peers.TORCH_MATMUL, quick=True),
    _topk_case(200_000, 384, 16, 100),
    _topk_case(200_000, 1024, 16, 10, peers.NUMKONG),
    _topk_case(200_000, 1024, 16, 100),
    _topk_case(200_000, 384, 256, 10, peers.NUMKONG, peers.TORCH_MATMUL),
    _topk_case(200_000, 384, 256, 100),
    _topk_case(200_000, 1024, 256, 10, peers.NUMKONG),
    _topk_case(200_000, 1024, 256, 100),
    _topk_case(200_000, 128, 256, 100),
    _topk_case(200_000, 256, 256, 100),
    _topk_case(200_000, 1024, 256, 10_000),
    _level_topk(1, 1024, 8_000, quick=True),
    _level_topk(1, 384, 20_000),
    _level_topk(16, 384, 20_000),
    _level_topk(64, 1024, 8_000),
]

BENCHMARKS: dict[str, list[Case]] = {
    "pack_bits": [
        _pack_bits_case(16384, 384, torch.float32, peers.NUMPY_PACK, peers.QUANTIZE, peers.TORCH_PACK, quick=True),
        _pack_bits_case(16384, 1024, torch.float32, peers.NUMPY_PACK, peers.QUANTIZE, peers.TORCH_PACK),
        _pack_bits_case(16384, 1024, torch.bfloat16, peers.NUMPY_PACK, peers.TORCH_PACK),
        _level_pack_bits(1024, 384, torch.float32),
        _level_pack_bits(1024, 384, torch.bfloat16),
    ],
    "hamming_distance": [
        _distance_case(200_000, 384, 1, peers.NUMKONG, peers.NUMPY_COUNT, peers.TORCH_TABLE, quick=True),
        _distance_case(200_000, 1024, 16, peers.NUMKONG, peers.NUMPY_COUNT),
        _distance_case(20_000, 1024, 256, peers.NUMKONG, peers.NUMPY_COUNT, peers.TORCH_MATMUL),
        _level_distance(16, 1024, 8_000),
    ],
    "hamming_topk": [*hamming_gpu.CASES, *(replace(case, where="cpu") for case in _ON_A_PROCESSOR)],
    "hamming_range": [
        _range_case(200_000, 384, 1, peers.FAISS, peers.NUMPY_COUNT, quick=True),
        _range_case(200_000, 1024, 32, peers.FAISS),
    ],
    **rescoring.BENCHMARKS,
}
