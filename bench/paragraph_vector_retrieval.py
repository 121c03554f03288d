"""How well binary paragraph vectors find definitions of WordNet of the same kind, beside other codes and vectors.

``python bench/paragraph_vector_retrieval.py``. Each of the 117,659 definitions belongs to one of 45 lexicographer files
("noun.animal", "verb.motion", ...): those of one file are relevant to each other. Models learn from all definitions but
the held-out ones; every held-out definition is a query to the other held-out ones (the papers' protocol). Codes are
ranked by Hamming distance, real vectors by cosine. What each model learns with was chosen on definitions out of the
training split, never on these queries.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

if __package__ in (None, ""):  # run as a file: its package is the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import embedding_kernels as ek
from bench import machine, results
from bench.ranking import Quality, by_distance, by_score
from bench.wordnet import data_lines
from embedding_kernels.demo_data import minilm_directory
from embedding_kernels.models.vocabulary import words_of

_CANDIDATES = 1000  # nearest codes that Real-Binary ranks again by its real rows
_SEED = 0


class Split(NamedTuple):
    """Definitions to learn from; those that are queries and answers, with their lexicographer files."""

    training: list[str]
    held_out: list[str]
    categories: np.ndarray


def read_wordnet(held_out: int) -> Split:
    """All definitions with their examples, in a drawn order that never changes."""
    lines = data_lines()
    order = np.random.default_rng(_SEED).permutation(len(lines))
    lines = [lines[i] for i in order]
    texts = [line.split(" | ", 1)[1].strip() for line in lines]
    categories = np.array([int(line.split()[1]) for line in lines[:held_out]])
    return Split(texts[held_out:], texts[:held_out], categories)


# ---- what is ranked ----


def _bits_quality(codes: np.ndarray, bits: int, categories: np.ndarray) -> Quality:
    tensor = torch.from_numpy(codes)
    return by_distance(lambda block: ek.hamming_distance(tensor[block], tensor).numpy(), bits, categories)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _cosine_quality(vectors: Any, categories: np.ndarray) -> Quality:
    return by_score(lambda block: vectors[block] @ vectors.T, categories)


def _filtered_quality(codes: np.ndarray, vectors: np.ndarray, categories: np.ndarray) -> Quality:
    """The nearest codes by the cosine of their real rows, then the others by distance, ties by index."""
    tensor, vectors = torch.from_numpy(codes), unit(vectors)

    def scores(block: slice) -> np.ndarray:
        distances = ek.hamming_distance(tensor[block], tensor).numpy()
        found = -distances.astype(np.float32) - 2  # below every cosine
        # one more than the candidates: the query itself is nearest to itself
        nearest = ek.hamming_topk(tensor[block], tensor, _CANDIDATES + 1)[1].numpy()
        np.put_along_axis(found, nearest, np.take_along_axis(vectors[block] @ vectors.T, nearest, 1), 1)
        return found

    return by_score(scores, categories)


# ---- models: name, bytes a text, quality ----

Row = tuple[str, float, Quality]


def _paragraph_vectors(split: Split, name: str, **options: Any) -> list[Row]:
    model = ek.BinaryParagraphVector(**options, seed=_SEED).fit(split.training)
    codes, vectors = model.infer(split.held_out)
    bits, categories = model.options.bits, split.categories
    found = [(f"{name}, {bits} bits", bits / 8, _bits_quality(codes, bits, categories))]
    if model.options.real_dim is not None:
        width = bits / 8 + 4 * model.options.real_dim
        found.append((f"{name}, {bits} bits, then cosine", width, _filtered_quality(codes, vectors, categories)))
    return found


def _tf_idf(split: Split) -> tuple[Any, Any]:
    """Unit TF-IDF rows (sublinear counts, smoothed idf) of the held-out texts, over words of at least two texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=words_of, min_df=2, sublinear_tf=True, dtype=np.float32)
    vectorizer.fit(split.training)
    return vectorizer.transform(split.held_out), len(vectorizer.vocabulary_)


def _hyperplanes(split: Split) -> list[Row]:
    rows, width = _tf_idf(split)
    found: list[Row] = []
    for bits in (32, 128):
        planes = np.random.default_rng(_SEED).standard_normal((width, bits), dtype=np.float32)
        codes = np.packbits(rows @ planes > 0, axis=1)
        quality = _bits_quality(codes, bits, split.categories)
        found.append((f"TF-IDF, random hyperplanes, {bits} bits", bits / 8, quality))
    quality = by_score(lambda block: (rows[block] @ rows.T).toarray(), split.categories)
    return [*found, ("TF-IDF, cosine", 8 * rows.nnz / rows.shape[0], quality)]


def _doc2vec(split: Split) -> list[Row]:
    from gensim.models.doc2vec import Doc2Vec, TaggedDocument

    documents = [TaggedDocument(words_of(text), [i]) for i, text in enumerate(split.training)]
    found: list[Row] = []
    for width in (32, 128):
        # the best of three settings on definitions out of the training split; two workers do not repeat to the bit
        model = Doc2Vec(documents, vector_size=width, dm=0, negative=5, min_count=5, epochs=40, workers=2, seed=_SEED)
        model.random.seed(_SEED)
        vectors = unit(np.stack([model.infer_vector(words_of(text)) for text in split.held_out]))
        name = f"gensim Doc2Vec, PV-DBOW, {width} numbers, cosine"
        found.append((name, 4.0 * width, _cosine_quality(vectors, split.categories)))
    return found


def _minilm(split: Split) -> list[Row]:
    vectors = ek.Embedder.from_pretrained(minilm_directory()).encode(split.held_out)
    codes = ek.pack_bits(torch.from_numpy(vectors)).numpy()
    return [
        ("all-MiniLM-L6-v2 (trained elsewhere), 384 bits", 48.0, _bits_quality(codes, 384, split.categories)),
        ("all-MiniLM-L6-v2, 384 numbers, cosine", 1536.0, _cosine_quality(unit(vectors), split.categories)),
    ]


def _chance(split: Split) -> list[Row]:
    """All distances equal: what any order is worth on average."""
    codes = np.zeros((len(split.held_out), 1), dtype=np.uint8)
    return [("chance", 0.0, _bits_quality(codes, 1, split.categories))]


MODELS: dict[str, Callable[[Split], list[Row]]] = {
    "Binary PV-DBOW, 32": lambda split: _paragraph_vectors(split, "Binary PV-DBOW", bits=32),
    "Binary PV-DBOW, 128": lambda split: _paragraph_vectors(split, "Binary PV-DBOW", bits=128),
    "Real-Binary PV-DBOW": lambda split: _paragraph_vectors(split, "Real-Binary PV-DBOW", bits=32, real_dim=300),
    "Binary PV-DM": lambda split: _paragraph_vectors(split, "Binary PV-DM", bits=128, kind="dm"),
    "TF-IDF": _hyperplanes,
    "Doc2Vec": _doc2vec,
    "MiniLM": _minilm,
    "chance": _chance,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", type=int, default=10_000)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: all; keeps nothing")
    parser.add_argument("--output", type=Path, default=results.DIRECTORY / "retrieval")
    arguments = parser.parse_args()
    split = read_wordnet(arguments.held_out)
    rows: list[dict[str, Any]] = []
    print(f"{'':<50} {'bytes':>7} {'MAP':>6} {'NDCG@10':>8}")
    for name in tqdm(arguments.model or MODELS, file=sys.stderr, leave=False):
        start = time.monotonic()
        try:
            found = MODELS[name](split)
        except ImportError as error:
            print(f"{name:<50} absent: {error}")
            continue
        for title, size, quality in found:
            rows.append({"title": title, "bytes": size, "map": quality.mean_average_precision, "ndcg@10": quality.ndcg})
            print(f"{title:<50} {size:7.0f} {quality.mean_average_precision:6.3f} {quality.ndcg:8.3f}", flush=True)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)
    if not arguments.model:
        where = machine.facts(torch.device("cpu"), torch.get_num_threads())
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        found_all = {
            "schema": 1,
            "family": "paragraph_vector_retrieval",
            "date": date,
            "git": machine.commit(),
            "machine": where,
            "versions": machine.versions(),
            "learned_from": len(split.training),
            "held_out": len(split.held_out),
            "rows": rows,
        }
        path = arguments.output / f"{machine.slug(where)}-paragraph_vector_retrieval.json"
        results.write(found_all, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
