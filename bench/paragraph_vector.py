"""Cases of the paragraph-vector family: a pass of training over definitions of WordNet, beside gensim's Doc2Vec."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch

import embedding_kernels as ek
from embedding_kernels.models.vocabulary import PackedTexts, Vocabulary, words_of

from . import ceilings
from .embedder import definitions
from .harness import OURS, Case, Contender, Room, Work

_DEFINITIONS = 30_000
_MIN_COUNT, _NEGATIVES, _BATCH_TOKENS = 2, 64, 8192
_DOC2VEC = "gensim Doc2Vec, PV-DBOW, 5 negatives a word"
_WORDS = "words"
_COPIES = 3  # passes with batches and negatives drawn beforehand


@cache
def _texts() -> tuple[list[list[str]], Vocabulary, PackedTexts]:
    texts = definitions()[:_DEFINITIONS]
    vocabulary = Vocabulary.of(texts, _MIN_COUNT, bigrams=False)
    return [words_of(text) for text in texts], vocabulary, vocabulary.pack(texts)


class _Training:
    """Everything a pass needs, drawn beforehand; `tables` is what learns."""

    def __init__(self, bits: int) -> None:
        _, vocabulary, packed = _texts()
        noise = vocabulary.counts.double() ** 0.75
        noise /= noise.sum()
        self.log_expected = (noise * _NEGATIVES).log().float()
        draws = np.random.default_rng(0)
        self.passes = [
            [
                (*batch, torch.multinomial(noise, _NEGATIVES, replacement=True).int())
                for batch in packed.batches(_BATCH_TOKENS, draws)
            ]
            for _ in range(_COPIES)
        ]
        count, words = len(packed.offsets) - 1, len(vocabulary)
        seeded = torch.Generator().manual_seed(0)
        bias = (vocabulary.counts / vocabulary.counts.sum()).log()
        self.tables = [
            torch.randn(count, bits, generator=seeded) * 0.1, torch.zeros(count),
            torch.zeros(words, bits), bias, torch.full((words,), 1e7),
        ]  # fmt: skip

    def run(self, turn: int) -> torch.Tensor:
        """A pass over all documents; the losses of its last batch."""
        for rows, tokens, cu_seqlens, negatives in self.passes[turn % _COPIES]:
            loss = ek.paragraph_vector_step(*self.tables, rows, tokens, cu_seqlens, negatives, self.log_expected, 0.3)
        return loss


def _verifier(training: _Training) -> Any:
    """The first steps from the same start, held against the float64 definition."""
    start = [table.clone() for table in training.tables]

    def verify(answer: torch.Tensor) -> None:
        assert bool(answer.isfinite().all()), "a loss is not finite"
        tables, exact = [table.clone() for table in start], [table.double() for table in start]
        for rows, tokens, cu_seqlens, negatives in training.passes[0][:2]:
            rest = (rows, tokens, cu_seqlens, negatives, training.log_expected, 0.3)
            got = ek.paragraph_vector_step(*tables, *rest)
            wanted = ek.paragraph_vector_step(*exact, *rest, backend="reference")
            worst = float(((got - wanted).abs() / wanted.clamp(min=1)).max())
            assert worst <= 1e-5, f"a loss differs by {worst:.3g} of itself from the definition"

    return verify


def _doc2vec(bits: int, room: Room, work: Work) -> Contender | None:
    """One pass over the same known words, its corpus counted and laid out beforehand too."""
    try:
        from gensim.models.doc2vec import Doc2Vec, TaggedDocument
    except ImportError:
        return None
    documents = [TaggedDocument(words, [i]) for i, words in enumerate(_texts()[0])]
    model = Doc2Vec(
        vector_size=bits, dm=0, negative=5, min_count=_MIN_COUNT, sample=0, workers=room.threads, epochs=1, seed=0
    )
    model.build_vocab(documents)

    def train(turn: int) -> Any:
        model.train(documents, total_examples=model.corpus_count, epochs=1)
        return model.dv.vectors

    def verify(answer: np.ndarray) -> None:
        assert answer.shape == (len(documents), bits) and np.isfinite(answer).all(), "no vector a document"

    return Contender(_DOC2VEC, train, verify, work=work)


def _build(bits: int, peers: tuple[str, ...], room: Room) -> list[Contender]:
    training = _Training(bits)
    words = len(_texts()[2].tokens)
    # least: each word's row is read and written
    work = Work(2 * words * bits * 4, words, _WORDS)
    ours = Contender(OURS, training.run, _verifier(training), role="ours", work=work)
    found = [_doc2vec(bits, room, work)] if peers else []
    return [ours, *(contender for contender in found if contender is not None), ceilings.read(room)]


def _case(bits: int, quick: bool = False, levels: bool = False) -> Case:
    parameters = {
        "definitions": _DEFINITIONS, "bits": bits, "negatives": _NEGATIVES, "tokens a step": _BATCH_TOKENS,
        "bigrams": False, "min_count": _MIN_COUNT,
    }  # fmt: skip
    peers = () if levels else (_DOC2VEC,)
    return Case(
        "paragraph_vector_step",
        f"{'levels: ' * levels}a pass over {_DEFINITIONS} definitions, {bits} bits",
        parameters,
        peers,
        partial(_build, bits, peers),
        Work(0, 0, _WORDS),
        {} if levels else {_DOC2VEC: 3.0},
        quick=quick,
        levels=levels,
    )


BENCHMARKS: dict[str, list[Case]] = {
    "paragraph_vector_step": [_case(32, quick=True), _case(128), _case(128, levels=True)]
}
