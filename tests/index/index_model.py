"""What an index must answer, in plain NumPy, and vectors to ask with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from embedding_kernels import BinaryIndex

NO_DISTANCE, NO_INDEX = 2147483647, -1


def vectors_of(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Float vectors with many equal codes, so that ties decide."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((max(1, count // 3), dim), dtype=np.float32)
    return centres[draw.integers(len(centres), size=count)] * draw.uniform(0.5, 2, (count, 1)).astype(np.float32)


def filled(vectors: np.ndarray | torch.Tensor) -> BinaryIndex:
    index = BinaryIndex()
    index.add(vectors)
    return index


def rescored_by_definition(
    vectors: np.ndarray, queries: np.ndarray, k: int, multiplier: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates by (distance, index), scored by query · bits in float64, ordered by (-score, index)."""
    bits, query_bits = vectors > 0, queries > 0
    scores = np.full((len(queries), k), -np.inf, np.float32)
    indices = np.full((len(queries), k), NO_INDEX)
    for row, query in enumerate(queries):
        distance = (bits != query_bits[row]).sum(axis=1)
        candidates = np.lexsort((np.arange(len(bits)), distance))[: k * multiplier]
        score = (bits[candidates] @ query.astype(np.float64)).astype(np.float32)
        order = np.lexsort((candidates, -score))[:k]
        scores[row, : len(order)], indices[row, : len(order)] = score[order], candidates[order]
    return scores, indices


@dataclass
class Model:
    """Rows in a plain array, searched by sorting all of them."""

    dim: int
    vectors: np.ndarray = field(init=False)
    ids: np.ndarray = field(init=False)
    next_id: int = 0

    def __post_init__(self) -> None:
        self.vectors = np.empty((0, self.dim), np.float32)
        self.ids = np.empty(0, np.int64)

    def add(self, vectors: np.ndarray, ids: np.ndarray | None = None) -> None:
        if ids is None:
            ids = np.arange(self.next_id, self.next_id + len(vectors))
        self.next_id = max(self.next_id, int(ids.max(initial=-1)) + 1)
        self.vectors, self.ids = np.concatenate((self.vectors, vectors)), np.concatenate((self.ids, ids))

    def remove(self, ids: np.ndarray) -> int:
        kept = ~np.isin(self.ids, ids)
        self.vectors, self.ids = self.vectors[kept], self.ids[kept]
        return int((~kept).sum())

    def codes(self) -> np.ndarray:
        return np.packbits(self.vectors > 0, axis=1)

    def distances(self, queries: np.ndarray) -> np.ndarray:
        return ((queries > 0)[:, None] != (self.vectors > 0)[None]).sum(axis=2).astype(np.int32)

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(len(self.ids)) if allowed is None else np.flatnonzero(np.isin(self.ids, allowed))
        distance = self.distances(queries)[:, rows]
        order = np.argsort(distance, axis=1, kind="stable")[:, :k]
        missing = ((0, 0), (0, k - order.shape[1]))
        found = np.take_along_axis(distance, order, axis=1)
        return (
            np.pad(found, missing, constant_values=NO_DISTANCE),
            np.pad(self.ids[rows][order], missing, constant_values=NO_INDEX),
        )

    def range_search(self, queries: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        distance = self.distances(queries)
        near = distance < radius
        lims = np.concatenate(([0], near.sum(axis=1).cumsum()))
        return lims, distance[near], self.ids[near.nonzero()[1]]

    def check(self, index: BinaryIndex, queries: np.ndarray, k: int = 5) -> None:
        """Compare all that an index can be asked."""
        assert index.ntotal == len(index) == len(self.ids)
        np.testing.assert_array_equal(index.ids, self.ids)
        np.testing.assert_array_equal(index.codes.numpy(), self.codes())
        compare(index.search(queries, k), self.search(queries, k))
        allowed = self.ids[::3]
        compare(index.search(queries, k, allowed_ids=allowed), self.search(queries, k, allowed))
        radius = self.dim // 2
        compare(index.range_search(queries, radius), self.range_search(queries, radius))
        np.testing.assert_array_equal(index.reconstruct(self.ids[::-2]).numpy(), self.codes()[::-2])


def compare(got: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    """Equal, exactly."""
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
