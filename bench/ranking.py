"""How good a ranking is: mean average precision and NDCG@10, in blocks of queries, ties counted exactly.

Every document is a query to the others; relevant are those of its category. Where distances tie, as those of short
codes do, a measure's value is its expectation over the orders of the tied documents (McSherry and Najork, "Computing
Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores", 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_BLOCK = 256  # queries at a time
_DEPTH = 10  # of NDCG


class Quality(NamedTuple):
    """Means over the queries that have a relevant document."""

    mean_average_precision: float
    ndcg: float


def _discounts(count: int) -> np.ndarray:
    """Sums of NDCG's discounts over the first 0, 1, ... places; nothing counts past the depth."""
    places = np.where(np.arange(count) < _DEPTH, 1 / np.log2(np.arange(count) + 2.0), 0.0)
    return np.concatenate(([0.0], np.cumsum(places)))


def _harmonic(count: int) -> np.ndarray:
    return np.concatenate(([0.0], np.cumsum(1 / np.arange(1, count + 1))))


def tied(sizes: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expected average precision and NDCG of rankings ``[Q]`` whose groups of ties ``[Q, G]``, best first, hold so many
    documents, so many of them relevant; each ranking has at least one."""
    above = np.cumsum(sizes, axis=1) - sizes
    found = np.cumsum(relevant, axis=1) - relevant
    count = int(sizes[0].sum())
    harmonic, discounts = _harmonic(count), _discounts(count)
    share = relevant / np.maximum(sizes, 1)
    # place i of a group: relevant with probability `share`, then (found + 1 + (i - 1) (r - 1) / (n - 1)) relevant ones
    # among the first (above + i)
    fractions = harmonic[above + sizes] - harmonic[above]
    further = np.maximum(relevant - 1, 0) / np.maximum(sizes - 1, 1)
    precisions = share * ((found + 1) * fractions + further * (sizes - (above + 1) * fractions))
    totals = relevant.sum(1)
    gains = (share * (discounts[above + sizes] - discounts[above])).sum(1)
    return precisions.sum(1) / np.maximum(totals, 1), gains / discounts[np.clip(totals, 1, _DEPTH)]


def ordered(relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for rankings without ties, ``relevant`` bool ``[Q, N]``, best first."""
    places = np.arange(1, relevant.shape[1] + 1)
    hits = np.cumsum(relevant, axis=1)
    totals = hits[:, -1]
    discounts = _discounts(relevant.shape[1])
    gains = relevant[:, :_DEPTH] @ np.diff(discounts)[:_DEPTH]
    return (relevant * (hits / places)).sum(1) / np.maximum(totals, 1), gains / discounts[np.clip(totals, 1, _DEPTH)]


def _mean_over_blocks(categories: np.ndarray, measure: Callable[[slice], tuple[np.ndarray, np.ndarray]]) -> Quality:
    blocks = [measure(slice(start, start + _BLOCK)) for start in range(0, len(categories), _BLOCK)]
    precision, gain = (np.concatenate(values) for values in zip(*blocks, strict=True))
    counted = np.bincount(categories)[categories] > 1
    return Quality(float(precision[counted].mean()), float(gain[counted].mean()))


def _but_itself(block: slice, array: np.ndarray, value: float) -> np.ndarray:
    """The block's rows with each query's own place filled."""
    array[np.arange(len(array)), block.start + np.arange(len(array))] = value
    return array


def by_distance(distances: Callable[[slice], np.ndarray], most: int, categories: np.ndarray) -> Quality:
    """``distances(block)`` gives integers ``[block, N]`` from 0 to ``most``; the query itself is left out."""

    def measure(block: slice) -> tuple[np.ndarray, np.ndarray]:
        rows = _but_itself(block, distances(block).astype(np.int64), most + 1)
        groups = rows + np.arange(len(rows))[:, None] * (most + 2)
        same = categories[block][:, None] == categories[None]
        shape = (len(rows), most + 2)
        sizes = np.bincount(groups.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
        relevant = np.bincount(groups[same], minlength=shape[0] * shape[1]).reshape(shape)
        return tied(sizes[:, :-1], relevant[:, :-1])  # the last group is the query

    return _mean_over_blocks(categories, measure)


def by_score(scores: Callable[[slice], np.ndarray], categories: np.ndarray) -> Quality:
    """``scores(block)`` gives floats ``[block, N]``, best highest, ties by index; the query itself is left out."""

    def measure(block: slice) -> tuple[np.ndarray, np.ndarray]:
        rows = _but_itself(block, scores(block), -np.inf)
        order = np.argsort(-rows, axis=1, kind="stable")[:, :-1]
        return ordered(categories[order] == categories[block][:, None])

    return _mean_over_blocks(categories, measure)
