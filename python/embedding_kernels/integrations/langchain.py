"""`MultiViewReranker` in LangChain: a compressor that keeps the best of the documents retrieved."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field

from ..models import MultiViewReranker
from ._reranking import best_first, titled


class MultiViewCompressor(BaseDocumentCompressor):
    """A `MultiViewReranker` behind a retriever: ``MultiViewCompressor(model=reranker, top_n=3)``.

    For ``ContextualCompressionRetriever(base_compressor=..., base_retriever=...)`` and whatever else takes a document
    compressor; `acompress_documents` runs in a thread.

    Args:
        model: the `MultiViewReranker`.
        top_n: the most documents kept, 3 as LangChain's other rerankers; None keeps all.
        title_key: the metadata under which a document's title is; it is put before the text. By default there is none.
        score_key: the metadata that holds the score in what is returned.
        batch_size: most documents in a batch of the encoder; None leaves it to the reranker's token budget.

    Raises:
        pydantic.ValidationError: a ValueError; an argument is unknown, or has a value that cannot be used.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: MultiViewReranker
    top_n: int | None = Field(default=3, ge=1)
    title_key: str | None = None
    score_key: str = "relevance_score"
    batch_size: int | None = Field(default=None, ge=1)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The ``top_n`` best documents, best first; those of equal score in the order given.

        Args:
            documents: as retrieved; they are left as they are.
            query: the query.
            callbacks: unused, as in LangChain's other rerankers.

        Returns:
            Copies of the documents, with all that they hold, and the score, a float, in their metadata.
        """
        passages = [titled(document.page_content, document.metadata, self.title_key) for document in documents]
        scores = self.model.score_batch([query], [passages], batch_size=self.batch_size)[0]
        kept = []
        for place in best_first(scores)[: self.top_n]:
            metadata = {**documents[place].metadata, self.score_key: float(scores[place])}
            kept.append(documents[place].model_copy(update={"metadata": metadata}))
        return kept
