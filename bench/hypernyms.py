"""A task for rerankers: of WordNet's 95,882 noun and verb synsets find those right above and below one, as BM25's first
hundred have them.

A synset's text is its words and its gloss, with the examples. Relevant to it are its hypernyms and hyponyms, classes
and instances. Held-out queries are drawn; no synset that is one, or is relevant to one, takes any part in training: it
is neither a query nor a passage there, and no tokenizer or embedding reads it. Their other candidates do take part, and
BM25 knows the frequencies of all words.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import bm25s
import numpy as np

from .wordnet import Synset, read_synsets

DEPTH = 100  # candidates that BM25 hands over
_RANKS = 10  # of NDCG
_MANY = 5000  # queries that take long
_STOPWORDS = frozenset(bm25s.tokenization.STOPWORDS_EN)


class Task(NamedTuple):
    """Texts by place; the relevant places of each; held-out queries; what training may use; candidates by query."""

    texts: list[str]
    relevant: list[list[int]]
    validation: np.ndarray
    test: np.ndarray
    #: bool by place: may take part in training
    allowed: np.ndarray
    bm25: bm25s.BM25

    def training_queries(self) -> np.ndarray:
        """Places that may take part in training and have a relevant place that may."""
        return np.array([place for place in np.flatnonzero(self.allowed) if self.allowed[self.relevant[place]].any()])

    def candidates(self, queries: np.ndarray) -> np.ndarray:
        """BM25's best for each query but itself, int64 ``[Q, 100]``, best first."""
        tokens = [_tokens(self.texts[query]) for query in queries]
        found, _ = self.bm25.retrieve(tokens, k=DEPTH + 1, show_progress=len(queries) > _MANY)
        return np.stack([row[row != query][:DEPTH] for query, row in zip(queries, found, strict=True)])


def text_of(synset: Synset) -> str:
    return f"{', '.join(synset.words)}: {synset.gloss}"


def make_task(validation: int, test: int, seed: int) -> Task:
    """With so many queries to choose settings on, and so many to report."""
    synsets = read_synsets()
    texts, relevant = [text_of(synset) for synset in synsets], [synset.neighbours for synset in synsets]
    asked = np.array([place for place, near in enumerate(relevant) if near])
    drawn = np.random.default_rng(seed).permutation(asked)[: validation + test]
    allowed = np.ones(len(texts), bool)
    for query in drawn:
        allowed[[query, *relevant[query]]] = False
    index = bm25s.BM25()
    index.index([_tokens(text) for text in texts], show_progress=False)
    return Task(texts, relevant, drawn[:validation], drawn[validation:], allowed, index)


def gains(order: np.ndarray, relevant: list[int]) -> float:
    """NDCG@10 of places best first; relevant ones that are not among them count in the ideal."""
    discounts = 1 / np.log2(np.arange(_RANKS) + 2)
    return float(discounts[np.isin(order[:_RANKS], relevant)].sum() / discounts[: len(relevant)].sum())


def recall(candidates: np.ndarray, relevant: list[int]) -> float:
    return float(np.isin(candidates, relevant).sum() / len(relevant))


def _tokens(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _STOPWORDS]
