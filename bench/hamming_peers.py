"""What the Hamming family is compared with. A peer that is not installed, or not for the device, is None."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .harness import Contender

NUMPY_PACK = "numpy.packbits"
QUANTIZE = "sentence-transformers quantize_embeddings"
TORCH_PACK = "torch shifts"
FAISS = "FAISS IndexBinaryFlat"
NUMKONG = "NumKong"
NUMPY_COUNT = "numpy.bitwise_count"
TORCH_TABLE = "torch xor + table"
TORCH_MATMUL = "torch ±1 matmul"

Verify = Callable[[Any], None]
Makers = dict[str, Callable[[], Contender | None]]


class Corpus:
    """Copies of one set of codes, several sets of queries, and each library's own form of them, made when asked."""

    def __init__(self, codes: list[Tensor], queries: list[Tensor], threads: int) -> None:
        self.codes, self.queries, self.threads = codes, queries, threads
        self.bits = 8 * codes[0].shape[1]

    def code(self, turn: int) -> Tensor:
        return self.codes[turn % len(self.codes)]

    def query(self, turn: int) -> Tensor:
        return self.queries[turn % len(self.queries)]

    @property
    def on_host(self) -> bool:
        return self.codes[0].device.type == "cpu"

    @cached_property
    def faiss(self) -> list[Any] | None:
        """An index over each copy; FAISS uses as many threads as torch."""
        try:
            import faiss
        except ImportError:
            return None
        faiss.omp_set_num_threads(self.threads)
        indices = []
        for codes in self.codes:
            index = faiss.IndexBinaryFlat(self.bits)
            index.add(codes.cpu().numpy())
            indices.append(index)
        return indices

    @cached_property
    def numkong(self) -> list[NumKongSearch] | None:
        """Each copy in NumKong's packed form."""
        try:
            import numkong  # noqa: F401
        except ImportError:
            return None
        return [NumKongSearch(codes.numpy(), len(self.queries[0]), self.threads) for codes in self.codes]

    @cached_property
    def signs(self) -> Tensor:
        """The first copy as a ±1 float32 matrix [bits, N]."""
        return _signs(self.codes[0]).T


class NumKongSearch:
    """NumKong's batched distances on several threads: it has none of its own, so queries, or else codes, are shared
    out. Codes are packed beforehand, as an index would; outputs are allocated once."""

    def __init__(self, codes: np.ndarray, queries: int, threads: int) -> None:
        import numkong

        self._packed_distances = numkong.hammings_packed
        self._pool = ThreadPoolExecutor(threads)
        self._by_query = queries >= threads
        parts = 1 if self._by_query else threads
        bounds = [len(codes) * part // parts for part in range(parts + 1)]
        self._offsets = bounds[:-1]
        slices = [codes[a:b] for a, b in itertools.pairwise(bounds)]
        self._codes = [numkong.hammings_pack(part, dtype="uint1") for part in slices]
        self._out = [numkong.empty((queries, len(part)), dtype="uint32") for part in slices]
        self._views = [np.asarray(out) for out in self._out]
        # (part of the codes, rows of the queries) for each thread
        cuts = [queries * t // threads for t in range(threads + 1)]
        by_part = [(part, 0, queries) for part in range(parts)]
        self._tasks = [(0, a, b) for a, b in itertools.pairwise(cuts)] if self._by_query else by_part

    def _fill(self, queries: np.ndarray, task: tuple[int, int, int]) -> np.ndarray:
        part, begin, end = task
        self._packed_distances(queries, self._codes[part], out=self._out[part], start_row=begin, end_row=end)
        return self._views[part][begin:end]

    def distances(self, queries: np.ndarray) -> np.ndarray:
        """uint32 [Q, N]."""
        list(self._pool.map(partial(self._fill, queries), self._tasks))
        return self._views[0] if len(self._views) == 1 else np.concatenate(self._views, axis=1)

    def topk(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances, then NumPy's selection, each on its thread."""

        def run(task: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
            out = self._fill(queries, task)
            near = np.argpartition(out, k - 1, axis=1)[:, :k]
            return np.take_along_axis(out, near, axis=1), near + self._offsets[task[0]]

        found = list(self._pool.map(run, self._tasks))
        axis = 0 if self._by_query else 1
        distances = np.concatenate([pair[0] for pair in found], axis=axis)
        indices = np.concatenate([pair[1] for pair in found], axis=axis)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)


# ---- answers to check against ----


def exact_distances(queries: Tensor, codes: Tensor) -> np.ndarray:
    """By NumPy alone, int32 [Q, N]."""
    q, n = _words(queries), _words(codes)
    return np.stack([np.bitwise_count(row ^ n).sum(1, dtype=np.int32) for row in q])


def exact_topk(corpus: Corpus, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the first set of queries: FAISS's answer where it is to be had, of which NumPy confirms the first four."""
    confirmed = len(corpus.queries[0]) if corpus.faiss is None else 4
    all_distances = exact_distances(corpus.queries[0][:confirmed], corpus.codes[0])
    indices = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
    distances = np.take_along_axis(all_distances, indices, axis=1)
    if corpus.faiss is None:
        return distances, indices
    found, places = corpus.faiss[0].search(corpus.queries[0].cpu().numpy(), k)
    if not (np.array_equal(found[:confirmed], distances) and np.array_equal(places[:confirmed], indices)):
        raise RuntimeError("FAISS and NumPy disagree on the nearest codes")
    return found, places


def _words(codes: Tensor) -> np.ndarray:
    return codes.cpu().numpy().view(np.uint64)


def _signs(codes: Tensor) -> Tensor:
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    bits = (codes.unsqueeze(-1) >> shifts) & 1
    return (bits.flatten(1).float() * 2).sub_(1)


# ---- contenders ----


def pack_bits_makers(inputs: list[Tensor], verify: Verify) -> Makers:
    """NumPy has no bfloat16, so there it is given float32 by torch, and the conversion counts."""
    host = inputs[0].device.type == "cpu"
    narrow = inputs[0].dtype != torch.float32
    shifts = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=inputs[0].device)

    def array(turn: int) -> np.ndarray:
        x = inputs[turn % len(inputs)]
        return (x.float() if narrow else x).numpy()

    def numpy_pack() -> Contender | None:
        return Contender(NUMPY_PACK, lambda turn: np.packbits(array(turn) > 0, axis=1), verify) if host else None

    def quantize() -> Contender | None:
        try:
            from sentence_transformers import quantize_embeddings
        except ImportError:
            return None
        return Contender(QUANTIZE, lambda turn: quantize_embeddings(array(turn), "ubinary"), verify) if host else None

    def torch_pack() -> Contender:
        def run(turn: int) -> Tensor:
            positive = inputs[turn % len(inputs)] > 0
            return (positive.unflatten(1, (-1, 8)) * shifts).sum(-1, dtype=torch.uint8)

        return Contender(TORCH_PACK, run, verify)

    return {NUMPY_PACK: numpy_pack, QUANTIZE: quantize, TORCH_PACK: torch_pack}


def _table(device: torch.device) -> Tensor:
    return torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=device)


def _torch_table_distances(corpus: Corpus) -> Callable[[int], Tensor]:
    table = _table(corpus.codes[0].device)

    def distances(turn: int) -> Tensor:
        differ = corpus.query(turn).unsqueeze(1) ^ corpus.code(turn)
        return table[differ.int()].sum(-1, dtype=torch.int32)

    return distances


def _torch_matmul_distances(corpus: Corpus) -> Callable[[int], Tensor]:
    codes, bits = corpus.signs, corpus.bits  # unpacked beforehand: 32 times the memory

    def distances(turn: int) -> Tensor:
        return torch.mm(_signs(corpus.query(turn)), codes).neg_().add_(bits).mul_(0.5)

    return distances


def _numpy_distances(corpus: Corpus) -> Callable[[int], np.ndarray]:
    return lambda turn: exact_distances(corpus.query(turn), corpus.code(turn))


def distance_makers(corpus: Corpus, verify: Verify) -> Makers:
    """Peers that give the whole matrix of distances."""

    def numkong() -> Contender | None:
        packed = corpus.numkong if corpus.on_host else None
        if packed is None:
            return None
        call = lambda turn: packed[turn % len(packed)].distances(corpus.query(turn).numpy())  # noqa: E731
        return Contender(NUMKONG, call, verify, note="hammings_packed, codes packed beforehand, a share a thread")

    def numpy_count() -> Contender | None:
        return Contender(NUMPY_COUNT, _numpy_distances(corpus), verify) if corpus.on_host else None

    return {
        NUMKONG: numkong,
        NUMPY_COUNT: numpy_count,
        TORCH_TABLE: lambda: Contender(TORCH_TABLE, _torch_table_distances(corpus), verify),
        TORCH_MATMUL: lambda: Contender(
            TORCH_MATMUL, _torch_matmul_distances(corpus), verify, note="codes unpacked to float32 beforehand"
        ),
    }


def topk_makers(corpus: Corpus, k: int, verify: Verify, verify_distances: Verify) -> Makers:
    """Peers that give the nearest codes. All but FAISS break ties as they like, so only their distances are checked."""

    def faiss() -> Contender | None:
        indices = corpus.faiss if corpus.on_host else None
        if indices is None:
            return None
        return Contender(FAISS, lambda turn: indices[turn % len(indices)].search(corpus.query(turn).numpy(), k), verify)

    def numkong() -> Contender | None:
        packed = corpus.numkong if corpus.on_host else None
        if packed is None:
            return None
        call = lambda turn: packed[turn % len(packed)].topk(corpus.query(turn).numpy(), k)  # noqa: E731
        note = "hammings_packed, codes packed beforehand, numpy.argpartition, a share a thread"
        return Contender(NUMKONG, call, verify_distances, note=note)

    def numpy_count() -> Contender | None:
        distances = _numpy_distances(corpus)

        def run(turn: int) -> tuple[np.ndarray, np.ndarray]:
            found = distances(turn)
            near = np.argpartition(found, k - 1, axis=1)[:, :k]
            order = np.argsort(np.take_along_axis(found, near, axis=1), axis=1)
            near = np.take_along_axis(near, order, axis=1)
            return np.take_along_axis(found, near, axis=1), near

        return Contender(NUMPY_COUNT, run, verify_distances, note="and numpy.argpartition") if corpus.on_host else None

    def in_torch(name: str, distances: Callable[[int], Tensor], note: str) -> Contender:
        return Contender(name, lambda turn: distances(turn).topk(k, largest=False), verify_distances, note=note)

    return {
        FAISS: faiss,
        NUMKONG: numkong,
        NUMPY_COUNT: numpy_count,
        TORCH_TABLE: lambda: in_torch(TORCH_TABLE, _torch_table_distances(corpus), "and torch.topk"),
        TORCH_MATMUL: lambda: in_torch(
            TORCH_MATMUL, _torch_matmul_distances(corpus), "codes unpacked to float32 beforehand; torch.topk"
        ),
    }


def range_makers(corpus: Corpus, radius: int, verify: Verify) -> Makers:
    """Peers that give all codes within a radius; FAISS's are put in order for the check alone."""

    def faiss() -> Contender | None:
        indices = corpus.faiss if corpus.on_host else None
        if indices is None:
            return None

        def verify_faiss(answer: tuple[Any, Any, Any]) -> None:
            limits, distances, ids = (np.asarray(value).astype(np.int64) for value in answer)
            query = np.repeat(np.arange(len(limits) - 1), np.diff(limits))
            order = np.lexsort((ids, query))
            verify((limits, distances[order], ids[order]))

        run = lambda turn: indices[turn % len(indices)].range_search(corpus.query(turn).numpy(), radius)  # noqa: E731
        return Contender(FAISS, run, verify_faiss)

    def numpy_count() -> Contender | None:
        distances = _numpy_distances(corpus)

        def run(turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            found = distances(turn)
            near = found < radius
            return np.append(0, near.sum(1).cumsum()), found[near], near.nonzero()[1]

        return Contender(NUMPY_COUNT, run, verify, note="and a mask") if corpus.on_host else None

    return {FAISS: faiss, NUMPY_COUNT: numpy_count}
