"""`MultiViewReranker` as a ranker of AnswerDotAI's rerankers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerankers.documents import Document
from rerankers.models import AVAILABLE_RANKERS
from rerankers.models.ranker import BaseRanker
from rerankers.results import RankedResults, Result

from ..models import MultiViewReranker
from ._reranking import best_first, load_reranker, titled


class MultiViewRanker(BaseRanker):
    """A `MultiViewReranker` with the interface of rerankers: ``MultiViewRanker("path/to/model").rank(query, docs)``.

    Once this module is imported, ``Reranker("path/to/model", model_type="MultiViewRanker")`` makes one too.

    Args:
        model_name_or_path: a `MultiViewReranker`, or the directory or the Hub name of a model.
        verbose: 0 hides the progress bar, which else comes once the work has taken two seconds.
        title_key: the metadata under which a passage's title is; it is put before the text. By default there is none.
        batch_size: most passages in a batch of the encoder; None leaves it to the reranker's token budget.
        options: passed to `MultiViewReranker.from_pretrained`: device, dtype, max_length, ...

    Raises:
        FileNotFoundError, ValueError: see `MultiViewReranker.from_pretrained`.
        ValueError: options for a model that is loaded already.
    """

    def __init__(
        self,
        model_name_or_path: str | Path | MultiViewReranker,
        verbose: int = 1,
        *,
        title_key: str | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.model = load_reranker("MultiViewRanker", model_name_or_path, options)
        self.verbose, self.title_key, self.batch_size = verbose, title_key, batch_size
        self.ranking_type = "listwise"

    def rank(
        self,
        query: str,
        docs: str | Document | Sequence[str] | Sequence[Document],
        doc_ids: Sequence[str] | Sequence[int] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int | None = None,
    ) -> RankedResults:
        """Passages of one query, best first; those of equal score in the order given.

        Args:
            query: the query.
            docs: passages, or one; they are left as they are.
            doc_ids: one for each passage; by default a document's own, else its place.
            metadata: one for each passage; by default a document's own.
            batch_size: in place of that of the ranker.

        Returns:
            `RankedResults` with a score and a rank, from 1, of every passage.

        Raises:
            ValueError: ids or metadata are not as many as the passages, or a passage has no text.
        """
        documents = _documents(docs, doc_ids, metadata)
        passages = [titled(document.text, document.metadata, self.title_key) for document in documents]
        scores = self.model.score_batch(
            [query],
            [passages],
            batch_size=self.batch_size if batch_size is None else batch_size,
            show_progress_bar=None if self.verbose else False,
        )[0]
        results = [
            Result(document=documents[place], score=float(scores[place]), rank=rank)
            for rank, place in enumerate(best_first(scores), 1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)

    def score(self, query: str, doc: str | Document) -> float:
        """The score of one passage by itself: those of a list come from `rank`, which scores them together."""
        return self.rank(query, doc)[0].score

    def as_langchain_compressor(self, k: int = 10) -> Any:
        """`integrations.langchain.MultiViewCompressor` of the k best; the base class's needs LangChain before 1.0."""
        from .langchain import MultiViewCompressor

        return MultiViewCompressor(model=self.model, top_n=k, title_key=self.title_key, batch_size=self.batch_size)


def _documents(docs: Any, ids: Sequence[Any] | None, metadata: Sequence[Mapping[str, Any]] | None) -> list[Document]:
    """Documents with ids: the caller's own where nothing in them changes, else copies."""
    docs = [docs] if isinstance(docs, (str, Document)) else list(docs)
    for name, given in (("doc_ids", ids), ("metadata", metadata)):
        if given is not None and len(given) != len(docs):
            raise ValueError(f"rank: {name} must be as many as docs, got {len(given)} for {len(docs)}")
    documents = []
    for place, doc in enumerate(docs):
        document = doc if isinstance(doc, Document) else Document(doc)
        identity = document.doc_id if ids is None else ids[place]
        changes = {"doc_id": place if identity is None else identity}
        if metadata is not None:
            changes["metadata"] = dict(metadata[place])
        if any(getattr(document, name) != value for name, value in changes.items()):
            document = copy.copy(document)
            vars(document).update(changes)
        documents.append(document)
    return documents


AVAILABLE_RANKERS["MultiViewRanker"] = MultiViewRanker
