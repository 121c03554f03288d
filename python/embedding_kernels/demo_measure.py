"""What the demo measures: recall, encoding and search side by side with sentence-transformers and FAISS."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from .index import BinaryIndex

WIDTHS = (384, 256, 192, 128, 96, 64)
METHODS = ("float", "binary", "binary + rescoring")
RESCORE_MULTIPLIER = 4
TOP = 10

_FLOAT_BLOCK = 512  # queries scored against all texts at once
_SEARCH_REPEATS = 5


@dataclass(frozen=True)
class SearchResult:
    """One method at one width."""

    method: str
    width: int
    bytes_per_vector: int
    recall_at_1: float
    recall_at_10: float
    queries_per_second: float


@dataclass(frozen=True)
class Paired:
    """Two ways of the same work, timed in turns: rates, and the quartiles of the ratio ours / theirs."""

    ours_per_second: float
    theirs_per_second: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def paired_times(ours: list[float], theirs: list[float], amounts: list[int]) -> Paired:
    """Summarise repetitions that did ``amounts`` of work in the given seconds."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Paired(
        statistics.median(amount / seconds for amount, seconds in zip(amounts, ours, strict=True)),
        statistics.median(amount / seconds for amount, seconds in zip(amounts, theirs, strict=True)),
        statistics.median(ratios),
        (quartiles[0], quartiles[2]),
    )


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], turn: int) -> tuple[Any, float, Any, float]:
    """Both once, ours first in even turns: a drift of the machine falls on both."""
    if turn % 2:
        their, their_seconds = timed(theirs)
        our, our_seconds = timed(ours)
    else:
        our, our_seconds = timed(ours)
        their, their_seconds = timed(theirs)
    return our, our_seconds, their, their_seconds


def compare_encoding(
    ours: Callable[[list[str]], np.ndarray],
    theirs: Callable[[list[str]], np.ndarray],
    texts: list[str],
    chunk: int,
    advance: Callable[[int], Any],
) -> tuple[Paired, float]:
    """Encode ``texts`` both ways, a chunk at a time in turns; also the largest difference of any coordinate."""
    our_times: list[float] = []
    their_times: list[float] = []
    amounts: list[int] = []
    difference = 0.0
    for turn, start in enumerate(range(0, len(texts), chunk)):
        part = texts[start : start + chunk]
        our, our_seconds, their, their_seconds = in_turns(partial(ours, part), partial(theirs, part), turn)
        our_times.append(our_seconds)
        their_times.append(their_seconds)
        amounts.append(len(part))
        difference = max(difference, float(np.abs(our - their).max()))
        advance(len(part))
    return paired_times(our_times, their_times, amounts), difference


def recall(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of queries whose one right answer ``truth [Q]`` is among the first ``k`` of ``found [Q, K]``."""
    return float((found[:, :k] == truth[:, None]).any(axis=1).mean())


def float_search(queries: torch.Tensor, vectors: torch.Tensor, k: int) -> np.ndarray:
    """The ``k`` rows of largest inner product, by matrix product and `torch.topk`: indices ``[Q, min(k, N)]``."""
    found = [(block @ vectors.T).topk(min(k, len(vectors)), dim=1).indices for block in queries.split(_FLOAT_BLOCK)]
    return torch.cat(found).numpy()


def _unit_prefix(vectors: np.ndarray, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(vectors[:, :width]), dim=-1)


def search_at(
    width: int, index: BinaryIndex, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray
) -> list[SearchResult]:
    """All three methods on the first ``width`` dimensions."""
    cut = queries[:, :width]
    unit_queries, unit_vectors = _unit_prefix(queries, width), _unit_prefix(vectors, width)
    searches: list[tuple[str, int, Callable[[], np.ndarray]]] = [
        (METHODS[0], 4 * width, lambda: float_search(unit_queries, unit_vectors, TOP)),
        (METHODS[1], width // 8, lambda: index.search(cut, TOP, truncate_dim=width)[1]),
        (METHODS[2], width // 8, lambda: index.search(cut, TOP, RESCORE_MULTIPLIER, truncate_dim=width)[1]),
    ]
    results = []
    for method, size, search in searches:
        found, seconds = timed(search)
        recalls = recall(found, truth, 1), recall(found, truth, TOP)
        results.append(SearchResult(method, width, size, *recalls, len(queries) / seconds))
    return results


@dataclass(frozen=True)
class FaissComparison:
    """FAISS and sentence-transformers on the same codes and queries."""

    same_ids: dict[int, bool]  # width -> ids and distances of IndexBinaryFlat equal ours exactly
    binary: Paired
    rescored: Paired
    rescored_same_ids: float  # share of answers
    rescored_difference: float  # largest difference of a score


def compare_search(index: BinaryIndex, queries: np.ndarray) -> FaissComparison:
    """Search with FAISS's IndexBinaryFlat, and rescore with sentence-transformers' `semantic_search_faiss`."""
    import faiss

    same = {}
    codes = index.codes.numpy()
    for width in WIDTHS:
        flat = faiss.IndexBinaryFlat(width)
        flat.add(np.ascontiguousarray(codes[:, : width // 8]))
        distances, found = index.search(queries, TOP, truncate_dim=width)
        their_distances, their_found = flat.search(np.packbits(queries[:, :width] > 0, axis=1), TOP)
        same[width] = bool((found == their_found).all() and (distances == their_distances).all())
    whole = faiss.IndexBinaryFlat(codes.shape[1] * 8)
    whole.add(codes)
    binary = _time_binary(index, whole, queries)
    rescored, ids, difference = _time_rescored(index, whole, queries)
    return FaissComparison(same, binary, rescored, ids, difference)


def _time_binary(index: BinaryIndex, flat: Any, queries: np.ndarray) -> Paired:
    def theirs() -> Any:
        return flat.search(np.packbits(queries > 0, axis=1), TOP)

    def ours() -> Any:
        return index.search(queries, TOP)

    in_turns(ours, theirs, 0)  # untimed: warms both up
    times = [in_turns(ours, theirs, turn) for turn in range(_SEARCH_REPEATS)]
    return paired_times([t[1] for t in times], [t[3] for t in times], [len(queries)] * len(times))


def _time_rescored(index: BinaryIndex, flat: Any, queries: np.ndarray) -> tuple[Paired, float, float]:
    from sentence_transformers.util.quantization import semantic_search_faiss

    def theirs() -> Any:
        return semantic_search_faiss(
            queries, corpus_index=flat, corpus_precision="ubinary", top_k=TOP, rescore_multiplier=RESCORE_MULTIPLIER
        )[0]

    def ours() -> Any:
        return index.search(queries, TOP, RESCORE_MULTIPLIER)

    (scores, found), _, hits, _ = in_turns(ours, theirs, 0)  # untimed: warms both up
    times = [in_turns(ours, theirs, turn) for turn in range(_SEARCH_REPEATS)]
    their_scores = np.array([[hit["score"] for hit in row] for row in hits])
    their_found = np.array([[hit["corpus_id"] for hit in row] for row in hits])
    paired = paired_times([t[1] for t in times], [t[3] for t in times], [len(queries)] * len(times))
    count = their_found.shape[1]  # fewer than TOP where the index is smaller
    same = float((found[:, :count] == their_found).mean())
    return paired, same, float(np.abs(scores[:, :count] - their_scores).max())
