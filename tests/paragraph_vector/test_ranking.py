"""The measures of ``bench/ranking.py`` against their definitions, ties by all their orders."""

from __future__ import annotations

import importlib.util
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "bench" / "ranking.py"
SPEC = importlib.util.spec_from_file_location("ranking", PATH)
ranking = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranking)


def average_precision(relevant: list[bool]) -> float:
    hits = [place for place, yes in enumerate(relevant, 1) if yes]
    return sum(found / place for found, place in enumerate(hits, 1)) / len(hits)


def ndcg(relevant: list[bool]) -> float:
    gain = sum(yes / np.log2(place + 1) for place, yes in enumerate(relevant[:10], 1))
    return gain / sum(1 / np.log2(place + 1) for place in range(1, min(sum(relevant), 10) + 1))


@pytest.mark.parametrize("seed", range(8))
def test_ties_are_worth_the_mean_over_their_orders(seed):
    draws = np.random.default_rng(seed)
    distances, relevant = draws.integers(0, 3, 7), draws.random(7) < 0.5
    relevant[0] = True
    orders = [order for order in permutations(range(7)) if (np.diff(distances[list(order)]) >= 0).all()]
    groups = [distances == d for d in range(4)]
    sizes, hits = (np.array([[int((g & w).sum()) for g in groups]]) for w in (np.ones(7, dtype=bool), relevant))
    precision, gain = ranking.tied(sizes, hits)
    assert precision[0] == pytest.approx(np.mean([average_precision(relevant[list(o)].tolist()) for o in orders]))
    assert gain[0] == pytest.approx(np.mean([ndcg(relevant[list(o)].tolist()) for o in orders]))


def test_without_ties_both_measures_agree():
    draws = np.random.default_rng(0)
    count = 600  # more than a block
    categories = draws.integers(0, 5, count)
    # distinct in every row
    distances = np.stack([draws.permutation(count) for _ in range(count)])
    by_distance = ranking.by_distance(lambda block: distances[block], count, categories)
    by_score = ranking.by_score(lambda block: -distances[block].astype(np.float64), categories)
    expected = []
    for query in range(count):
        order = [i for i in np.argsort(distances[query]) if i != query]
        relevant = (categories[order] == categories[query]).tolist()
        expected.append((average_precision(relevant), ndcg(relevant)))
    for found in (by_distance, by_score):
        np.testing.assert_allclose(found, np.mean(expected, axis=0))


def test_queries_without_an_answer_do_not_count():
    categories = np.array([0, 0, 1])
    near = np.array([[0, 1, 2], [1, 0, 2], [1, 1, 0]])
    assert ranking.by_distance(lambda block: near[block], 2, categories) == (1.0, 1.0)
