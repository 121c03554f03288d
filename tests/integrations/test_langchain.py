"""`MultiViewCompressor` as LangChain uses it."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("langchain_core")

from langchain_core.documents import BaseDocumentCompressor, Document

from embedding_kernels.integrations.langchain import MultiViewCompressor
from models.conftest import texts_of

QUERY = "moon sunlight"
DOCUMENTS = [
    Document(page_content=text, id=f"doc-{place}", metadata={"source": {"page": place}, "title": "river stone"})
    for place, text in enumerate(texts_of(9, 20, 3))
]
TEXTS = [document.page_content for document in DOCUMENTS]


def test_best_documents_first(reranker):
    compressor = MultiViewCompressor(model=reranker)
    assert isinstance(compressor, BaseDocumentCompressor)
    before = [document.model_copy(deep=True) for document in DOCUMENTS]
    expected = reranker.rank(QUERY, TEXTS)
    for top_n, count in ((3, 3), (None, 9), (20, 9)):
        best = MultiViewCompressor(model=reranker, top_n=top_n).compress_documents(DOCUMENTS, QUERY)
        assert [document.id for document in best] == [f"doc-{one['corpus_id']}" for one in expected[:count]]
        for document, one in zip(best, expected, strict=False):
            source = DOCUMENTS[one["corpus_id"]]
            assert document.page_content == source.page_content
            assert document.metadata == {**source.metadata, "relevance_score": one["score"]}
            assert type(document.metadata["relevance_score"]) is float
    assert len(compressor.compress_documents(DOCUMENTS, QUERY)) == 3
    assert before == DOCUMENTS  # left as they were


def test_async_and_callbacks(reranker):
    compressor = MultiViewCompressor(model=reranker)
    expected = compressor.compress_documents(DOCUMENTS, QUERY)
    assert asyncio.run(compressor.acompress_documents(DOCUMENTS, QUERY, callbacks=[])) == expected


def test_equal_scores_keep_the_order_given(reranker):
    texts = ["tree", "river", "tree", "river", "tree"]
    documents = [Document(page_content=text, id=str(place)) for place, text in enumerate(texts)]
    order = [int(one.id) for one in MultiViewCompressor(model=reranker, top_n=None).compress_documents(documents, "a")]
    assert [place for place in order if texts[place] == "tree"] == [0, 2, 4]
    assert [place for place in order if texts[place] == "river"] == [1, 3]


def test_nothing_retrieved(reranker):
    assert MultiViewCompressor(model=reranker).compress_documents([], QUERY) == []


def test_titles_and_keys(reranker):
    compressor = MultiViewCompressor(model=reranker, title_key="title", score_key="score", batch_size=4)
    best = compressor.compress_documents([*DOCUMENTS, Document(page_content="tree")], QUERY)
    expected = reranker.rank(QUERY, [*({"title": "river stone", "text": text} for text in TEXTS), "tree"], top_k=3)
    assert [one.metadata["score"] for one in best] == pytest.approx([one["score"] for one in expected], abs=1e-4)
    assert [one["corpus_id"] for one in expected] != [one["corpus_id"] for one in reranker.rank(QUERY, TEXTS, top_k=3)]


def test_in_a_chain(reranker):
    from langchain_core.runnables import RunnableLambda

    compressor = MultiViewCompressor(model=reranker)
    chain = RunnableLambda(lambda query: DOCUMENTS) | RunnableLambda(
        lambda documents: compressor.compress_documents(documents, QUERY)
    )
    assert chain.invoke(QUERY) == compressor.compress_documents(DOCUMENTS, QUERY)


def test_bad_arguments(reranker):
    for bad in ({"top_n": 0}, {"batch_size": 0}, {"topn": 3}, {"model": "path"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            MultiViewCompressor(**{"model": reranker, **bad})
