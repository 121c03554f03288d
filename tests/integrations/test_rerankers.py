"""`MultiViewRanker` as the rerankers package uses it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

rerankers = pytest.importorskip("rerankers")

from rerankers.documents import Document  # noqa: E402
from rerankers.models.ranker import BaseRanker  # noqa: E402
from rerankers.results import RankedResults  # noqa: E402

from embedding_kernels.integrations.rerankers import MultiViewRanker  # noqa: E402
from models.conftest import texts_of  # noqa: E402

DOCUMENTS = texts_of(9, 20, 3)
QUERY = "moon sunlight"


@pytest.fixture
def ranker(reranker) -> MultiViewRanker:
    return MultiViewRanker(reranker, verbose=0)


def described(results: RankedResults) -> list[tuple]:
    return [(one.document.doc_id, one.document.text, one.score, one.rank) for one in results]


def test_rank_is_the_rerankers_own(ranker, reranker):
    ranked = ranker.rank(QUERY, DOCUMENTS)
    assert isinstance(ranked, RankedResults)
    assert isinstance(ranker, BaseRanker)
    assert (ranked.query, ranked.has_scores, ranked.results_count()) == (QUERY, True, 9)
    expected = reranker.rank(QUERY, DOCUMENTS, return_documents=True)
    assert described(ranked) == [
        (one["corpus_id"], one["text"], one["score"], rank) for rank, one in enumerate(expected, 1)
    ]
    assert all(type(one.score) is float for one in ranked)
    assert ranked.top_k(3) == ranked.results[:3]
    assert ranked.get_score_by_docid(4) == next(one["score"] for one in expected if one["corpus_id"] == 4)
    assert ranker.rank(QUERY, DOCUMENTS, batch_size=2).get_score_by_docid(4) == pytest.approx(
        ranked.get_score_by_docid(4), abs=1e-4
    )


def test_ids_and_metadata(ranker):
    ids = [f"doc-{place}" for place in range(9)]
    metadata = [{"source": place} for place in range(9)]
    for ranked in (
        ranker.rank(QUERY, DOCUMENTS, doc_ids=ids, metadata=metadata),
        ranker.rank(QUERY, [Document(*one) for one in zip(DOCUMENTS, ids, metadata, strict=True)]),
    ):
        for one in ranked:
            place = ids.index(one.doc_id)
            assert (one.text, one.metadata) == (DOCUMENTS[place], metadata[place])
    documents = [Document(text) for text in DOCUMENTS]
    assert {one.doc_id for one in ranker.rank(QUERY, documents)} == set(range(9))
    assert {one.doc_id for one in ranker.rank(QUERY, documents, doc_ids=ids)} == set(ids)
    assert all(document.doc_id is None and document.metadata == {} for document in documents)  # left as they were
    own = [Document(text, doc_id=place) for place, text in enumerate(DOCUMENTS)]
    assert {id(one.document) for one in ranker.rank(QUERY, own)} == set(map(id, own))


def test_equal_scores_keep_the_order_given(ranker):
    ranked = ranker.rank(QUERY, ["tree", "river", "tree", "river", "tree"], doc_ids=[9, 8, 7, 6, 5])
    order = [one.doc_id for one in ranked]
    assert [one for one in order if one % 2] == [9, 7, 5]
    assert [one for one in order if not one % 2] == [8, 6]


def test_one_and_none(ranker, reranker):
    expected = float(reranker.score_batch([QUERY], [["tree"]])[0][0])
    assert ranker.score(QUERY, "tree") == ranker.score(QUERY, Document("tree")) == expected
    for docs in ("tree", ["tree"], Document("tree")):
        assert described(ranker.rank(QUERY, docs)) == [(0, "tree", expected, 1)]
    empty = ranker.rank(QUERY, [])
    assert (empty.results, empty.top_k(3), empty.has_scores) == ([], [], True)


def test_async(ranker):
    ranked = asyncio.run(ranker.rank_async(QUERY, DOCUMENTS, doc_ids=list("abcdefghi")))
    assert described(ranked) == described(ranker.rank(QUERY, DOCUMENTS, doc_ids=list("abcdefghi")))


def test_titles(reranker):
    documents = [Document("river", metadata={"title": "sun"}), Document("moon", metadata={"title": ""})]
    ranked = MultiViewRanker(reranker, title_key="title").rank(QUERY, documents)
    titled = reranker.score_batch([QUERY], [[{"title": "sun", "text": "river"}, "moon"]])[0]
    np.testing.assert_array_equal([ranked.get_score_by_docid(place) for place in (0, 1)], titled)
    plain = MultiViewRanker(reranker).rank(QUERY, documents)
    assert plain.get_score_by_docid(0) == reranker.score_batch([QUERY], [["river", "moon"]])[0][0] != titled[0]


def test_made_by_the_package(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "model")
    options = {"device": "cpu", "max_length": 64}
    made = rerankers.Reranker(str(tmp_path / "model"), model_type="MultiViewRanker", verbose=0, **options)
    assert isinstance(made, MultiViewRanker)
    assert described(made.rank(QUERY, DOCUMENTS)) == described(MultiViewRanker(reranker).rank(QUERY, DOCUMENTS))


def test_langchain_compressor(ranker):
    documents = pytest.importorskip("langchain_core.documents")
    held = [documents.Document(page_content=text) for text in DOCUMENTS]
    best = ranker.as_langchain_compressor(k=4).compress_documents(held, QUERY)
    assert [one.page_content for one in best] == [one.text for one in ranker.rank(QUERY, DOCUMENTS).top_k(4)]


def test_bad_input(ranker, reranker):
    with pytest.raises(ValueError, match="rank: doc_ids must be as many as docs, got 2 for 9"):
        ranker.rank(QUERY, DOCUMENTS, doc_ids=[1, 2])
    with pytest.raises(ValueError, match="rank: metadata must be as many as docs, got 1 for 2"):
        ranker.rank(QUERY, ["a", "b"], metadata=[{}])
    with pytest.raises(ValueError, match=r"a document must be a string .* got NoneType"):
        ranker.rank(QUERY, [Document(document_type="image", base64="")])
    with pytest.raises(ValueError, match="options are for a model to load, got a MultiViewReranker and max_length"):
        MultiViewRanker(reranker, max_length=64)
