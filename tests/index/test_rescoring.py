"""Rescoring by bits and by the vectors kept, against definition and sentence-transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from index_model import NO_INDEX, compare, filled, rescored_by_definition, vectors_of

from embedding_kernels import BinaryIndex
from embedding_kernels.index import binary, searching

KEPT = ("float32", "bfloat16", "float16", "int8")


@pytest.mark.parametrize("dim", [13, 64, 384])
@pytest.mark.parametrize(("count", "k", "multiplier"), [(400, 10, 4), (400, 1, 1), (30, 10, 4), (3, 5, 2), (0, 2, 2)])
def test_rescoring(dim: int, count: int, k: int, multiplier: int) -> None:
    vectors, queries = vectors_of(count, dim), vectors_of(25, dim, seed=1)
    index = BinaryIndex(dim)
    index.add(vectors)
    scores, indices = index.search(queries, k, multiplier)
    expected_scores, expected_indices = rescored_by_definition(vectors, queries, k, multiplier)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(np.isinf(scores), np.isinf(expected_scores))
    rounding = float(np.abs(queries).sum(axis=1).max()) * 2**-23  # of float32 sums
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=rounding)


def test_rescored_ties_go_to_the_lowest_index() -> None:
    # a dimension where the query is 0 changes the distance and not the score, so ties lie at different distances
    queries = np.random.default_rng(0).integers(-1, 2, (25, 24)).astype(np.float32)
    vectors = vectors_of(300, 24)
    scores, indices = filled(vectors).search(queries, 10, 10)
    expected_scores, expected_indices = rescored_by_definition(vectors, queries, 10, 10)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(indices, expected_indices)


def test_rescoring_equals_sentence_transformers() -> None:
    pytest.importorskip("faiss")
    from sentence_transformers.util.quantization import semantic_search_faiss

    # distinct codes: sentence-transformers leaves the order of ties open
    draw = np.random.default_rng(0)
    vectors, queries = (draw.standard_normal((count, 384), dtype=np.float32) for count in (1000, 50))
    packed = np.packbits(vectors > 0, axis=1)
    hits, _ = semantic_search_faiss(queries, packed, corpus_precision="ubinary", top_k=10, rescore_multiplier=4)
    scores, indices = filled(vectors).search(queries, 10, 4)
    np.testing.assert_array_equal(indices, [[hit["corpus_id"] for hit in row] for row in hits])
    np.testing.assert_allclose(scores, [[hit["score"] for hit in row] for row in hits], rtol=0, atol=4e-5)


def test_rescoring_of_a_prefix_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = vectors_of(200, 64), vectors_of(33, 64, seed=1)
    monkeypatch.setattr(binary, "_QUERY_BLOCK", 8)
    monkeypatch.setattr(binary, "_ADD_BLOCK", 16)
    monkeypatch.setattr(searching, "_BLOCK_BYTES", 16 * 8)  # 16 codes at once
    scores, indices = filled(vectors).search(queries, 10, 4, truncate_dim=32)
    expected = rescored_by_definition(vectors[:, :32], queries[:, :32], 10, 4)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(scores, expected[0], rtol=0, atol=4e-6)


def kept_by_definition(vectors: np.ndarray, kept: str, scale: np.ndarray | None = None) -> np.ndarray:
    """The vectors as they come back from where they are kept, float64."""
    if kept != "int8":
        return torch.from_numpy(vectors).to(getattr(torch, kept)).double().numpy()
    if scale is None:
        largest = np.abs(vectors.astype(np.float64)).max(axis=0)
        scale = (np.where(largest > 0, largest, largest.max()) / 127).astype(np.float32)
    wide = scale.astype(np.float64)
    return np.clip(np.rint(vectors / wide), -127, 127) * wide


def best_by_definition(
    vectors: np.ndarray, stored: np.ndarray, queries: np.ndarray, k: int, multiplier: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates by (distance, position), put in order by (-score, position)."""
    scores, positions = np.full((len(queries), k), -np.inf), np.full((len(queries), k), NO_INDEX)
    for row, query in enumerate(queries):
        distance = ((vectors > 0) != (query > 0)).sum(axis=1)
        candidates = np.argsort(distance, kind="stable")[: k * multiplier]
        score = stored[candidates] @ query.astype(np.float64)
        order = np.lexsort((candidates, -score))[:k]
        scores[row, : len(order)], positions[row, : len(order)] = score[order], candidates[order]
    return scores, positions


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dim", [13, 64])
def test_kept_vectors_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, dim: int) -> None:
    draw = np.random.default_rng(0)
    vectors, queries = (draw.standard_normal((count, dim), dtype=np.float32) for count in (300, 40))
    index = BinaryIndex(rescore_vectors=kept)
    index.add(vectors)
    stored = kept_by_definition(vectors, kept)
    expected = best_by_definition(vectors, stored, queries, 7, 5)
    by_bits = filled(vectors).search(queries, 7, 5)[1]
    assert (by_bits != expected[1]).any(), "the vectors kept must matter"
    monkeypatch.setattr(searching, "_BLOCK_BYTES", 16 * 8)
    index.save(tmp_path / "index")
    for asked in (index, BinaryIndex.load(tmp_path / "index")):
        assert asked.rescore_vectors == kept
        scores, found = asked.search(queries, 7, 5)
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(found, expected[1])
        np.testing.assert_allclose(scores, expected[0], rtol=1e-5, atol=1e-5)
    if dim == 64:
        expected = best_by_definition(vectors[:, :24], stored[:, :24], queries[:, :24], 7, 5)
        np.testing.assert_array_equal(index.search(queries, 7, 5, truncate_dim=24)[1], expected[1])


@pytest.mark.parametrize("kept", [None, *KEPT])
def test_segments_do_not_change_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str | None) -> None:
    # integers, so that scores are exact and many are equal
    draw = np.random.default_rng(0)
    vectors = draw.integers(-2, 3, (400, 16)).astype(np.float32)
    vectors[7], vectors[203] = np.abs(vectors[7]), -vectors[7]
    queries = draw.integers(-1, 2, (30, 16)).astype(np.float32)
    scale = np.ones(16, np.float32) if kept == "int8" else None
    whole = BinaryIndex(16, rescore_vectors=kept, int8_scale=scale)
    whole.add(vectors)
    for k, multiplier in ((10, 3), (1, 1), (300, 2)):
        expected = whole.search(queries, k, multiplier)
        parts = BinaryIndex(16, rescore_vectors=kept, int8_scale=scale)
        for start, stop in ((0, 1), (1, 9), (9, 200), (200, 203), (203, 400)):
            parts.add(vectors[start:stop])
            parts._tail = None  # the next rows begin a segment
        assert len(parts._snapshot.segments) == 5
        compare(parts.search(queries, k, multiplier), expected)
        cut = parts.search(queries, k, multiplier, truncate_dim=8)
        parts.save(tmp_path / f"{k}")
        with monkeypatch.context() as patch:
            patch.setattr(searching, "_BLOCK_BYTES", 700)  # mapped rows are gathered, for few queries at once
            compare(parts.search(queries, k, multiplier), expected)
            compare(parts.search(queries, k, multiplier, truncate_dim=8), cut)


def test_scores_that_are_not_numbers_come_last_over_segments() -> None:
    vectors = np.ones((6, 8), np.float32)
    vectors[0], vectors[1, 0], vectors[4] = np.nan, -np.inf, np.nan
    vectors[3, 0] = -np.inf
    queries = np.ones((1, 8), np.float32)
    index = BinaryIndex(8, rescore_vectors="float32")
    for start in (0, 2, 4):
        index.add(vectors[start : start + 2])
        index._tail = None
    scores, found = index.search(queries, 8, 1)
    np.testing.assert_array_equal(found, [[2, 5, 0, 1, 3, 4, -1, -1]])
    np.testing.assert_array_equal(scores[0, 6:], [-np.inf, -np.inf])
    whole = BinaryIndex(8, rescore_vectors="float32")
    whole.add(vectors)
    compare(whole.search(queries, 8, 1), (scores, found))


def test_int8_scale_of_the_first_rows_clips_later_ones(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((100, 16), dtype=np.float32)
    vectors[:, 3] = 0
    vectors[50:] *= 10
    index = BinaryIndex(rescore_vectors="int8")
    index.add(vectors[:0])
    index.add(vectors[:50])
    index.add(vectors[50:])
    largest = np.abs(vectors[:50].astype(np.float64)).max(axis=0)
    largest[3] = largest.max()
    scale = (largest / 127).astype(np.float32)
    index.save(tmp_path / "index")
    index.add(vectors[:10])
    index.save(tmp_path / "index")
    loaded = BinaryIndex.load(tmp_path / "index")
    np.testing.assert_array_equal(loaded._snapshot.scale, scale)
    stored = kept_by_definition(vectors, "int8", scale)
    kept = torch.cat([part.vectors for part in loaded._snapshot.segments if part.vectors is not None])
    np.testing.assert_array_equal(kept[:100].double().numpy() * scale, stored)
    assert (kept.abs() == 127).sum() > 50
    given = BinaryIndex(rescore_vectors="int8", int8_scale=scale)
    assert given.dim == 16
    given.add(vectors)
    queries = vectors_of(5, 16)
    compare(
        given.search(queries, 5, 4, allowed_ids=np.arange(100)), loaded.search(queries, 5, 4, allowed_ids=range(100))
    )


BAD_KEPT = [
    ({"rescore_vectors": "int4"}, "rescore_vectors must be None, 'float32'"),
    ({"int8_scale": np.ones(4, np.float32)}, "int8_scale must be None unless rescore_vectors is 'int8', got None"),
    ({"rescore_vectors": "int8", "int8_scale": [1.0]}, "int8_scale must be an array or a tensor"),
    ({"rescore_vectors": "int8", "int8_scale": np.zeros(4, np.float32)}, "must hold finite floats above 0"),
    ({"rescore_vectors": "int8", "int8_scale": np.ones(4, np.int64)}, "must hold finite floats above 0"),
    ({"dim": 8, "rescore_vectors": "int8", "int8_scale": np.ones(4, np.float32)}, "must have 8 dimensions, got 4"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_KEPT)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryIndex(**arguments)


def test_bad_rows() -> None:
    index = BinaryIndex(16, rescore_vectors="int8")
    with pytest.raises(ValueError, match="vectors must be floats, of which int8 is kept, got uint8 codes"):
        index.add(np.zeros((2, 2), np.uint8))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="vectors must be finite to be kept as int8"):
            index.add(np.full((2, 16), value, np.float32))
    assert (len(index), index._snapshot.scale) == (0, None)
