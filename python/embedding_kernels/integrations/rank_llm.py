"""`MultiViewReranker` in RankLLM: what its `Reranker` takes as a model coordinator."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rank_llm.data import Candidate, Request, Result

from ..models import MultiViewReranker
from ._reranking import best_first, load_reranker, titled

# where RankLLM looks for the text of a candidate, first to last
_TEXT_KEYS = ("text", "segment", "contents", "content", "body", "passage")


class MultiViewRankLLM:
    """A `MultiViewReranker` with RankLLM's interface: ``MultiViewRankLLM("path/to/model").rerank_batch(requests)``.

    All candidates of a request are scored together, without sliding windows. Needs `rank_llm.data` alone: ``pip install
    --no-deps rank_llm`` and ``pip install dacite``. It is what ``rank_llm.rerank.Reranker`` takes as its model
    coordinator; but that module of RankLLM 0.25 needs vLLM and a transformers before 5, which this package does not
    run with.

    Args:
        model: a `MultiViewReranker`, or the directory or the Hub name of a model.
        name: the model in the names of RankLLM's files; by default the last part of where it came from.
        batch_size: most candidates in a batch of the encoder; None leaves it to the reranker's token budget.
        options: passed to `MultiViewReranker.from_pretrained`: device, dtype, max_length, ...

    Raises:
        FileNotFoundError, ValueError: see `MultiViewReranker.from_pretrained`.
        ValueError: options for a model that is loaded already.
    """

    def __init__(
        self,
        model: str | Path | MultiViewReranker,
        *,
        name: str | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.model = load_reranker("MultiViewRankLLM", model, options)
        self.batch_size = batch_size
        source = self.model.model.t5.config.name_or_path if isinstance(model, MultiViewReranker) else str(model)
        self._name = name or Path(source).name or "multi_view"

    def rerank_batch(
        self,
        requests: Sequence[Request],
        rank_start: int = 0,
        rank_end: int = 100,
        shuffle_candidates: bool = False,
        logging: bool = False,
        **kwargs: Any,
    ) -> list[Result]:
        """Candidates of each request, best first; those of equal score in the order given.

        Where all candidates of a request are reranked, they get their scores. Where some stay outside the range, whose
        scores are of another kind, every rank keeps the score it had, as with RankLLM's listwise rerankers: scores
        then fall along the list, as evaluation by score needs it.

        Args:
            requests: they are left as they are. A candidate's text is looked for as RankLLM does, under "text",
                "segment", "contents", "content", "body" and "passage"; a "title" is put before it.
            rank_start: the first candidate to rerank.
            rank_end: the end of the range to rerank; those from there on stay where they are.
            shuffle_candidates: shuffles the range before, by the ``random`` module; this decides between equal scores
                alone. Every rank's score is then 1/rank, as with RankLLM's listwise rerankers, where some stay outside.
            logging: shows a progress bar.
            kwargs: ``top_k_retrieve`` caps rank_end; others, which are for language models, do nothing.

        Returns:
            A `Result` a request, with all its candidates and an empty history: there are no prompts.

        Raises:
            ValueError: a candidate has no text.
        """
        start, end = max(rank_start, 0), max(min(rank_end, kwargs.get("top_k_retrieve") or rank_end), 0)
        results = [Result(copy.deepcopy(one.query), copy.deepcopy(one.candidates), []) for one in requests]
        if shuffle_candidates:
            for result in results:
                _shuffle(result.candidates, start, end)
        ranges = [result.candidates[start:end] for result in results]
        scored = self.model.score_batch(
            [result.query.text for result in results],
            [[_passage(candidate) for candidate in candidates] for candidates in ranges],
            batch_size=self.batch_size,
            show_progress_bar=True if logging else None,
        )
        for result, candidates, scores in zip(results, ranges, scored, strict=True):
            order = best_first(scores)
            whole = len(candidates) == len(result.candidates)
            kept = scores[order].tolist() if whole else [candidate.score for candidate in candidates]
            result.candidates[start:end] = [candidates[place] for place in order]
            for place, score in zip(order, kept, strict=True):
                candidates[place].score = score
        return results

    def rerank(self, request: Request, **options: Any) -> Result:
        """`rerank_batch` of one request."""
        return self.rerank_batch([request], **options)[0]

    def get_name(self) -> str:
        """The model's name."""
        return self._name

    def get_output_filename(
        self, top_k_candidates: int, dataset_name: str, shuffle_candidates: bool, **kwargs: Any
    ) -> str:
        """The name, without an ending, of the files that RankLLM writes: model, length, number, dataset, time."""
        parts = [self._name, str(self.model.max_length), str(top_k_candidates)]
        parts += [dataset_name] if dataset_name else []
        parts += ["shuffled"] if shuffle_candidates else []
        return "_".join([*parts, datetime.now().isoformat()])


def _shuffle(candidates: list[Candidate], start: int, end: int) -> None:
    candidates[start:end] = random.sample(candidates[start:end], len(candidates[start:end]))
    for rank, candidate in enumerate(candidates, 1):
        candidate.score = 1 / rank


def _passage(candidate: Candidate) -> Any:
    doc: Any = candidate.doc
    fields = doc if isinstance(doc, Mapping) else {}
    key = next((key for key in _TEXT_KEYS if key in fields), None)
    if key is None:
        got = (", ".join(map(str, fields)) or "nothing") if isinstance(doc, Mapping) else type(doc).__name__
        raise ValueError(
            f"rerank_batch: doc of candidate {candidate.docid!r} must have one of {', '.join(_TEXT_KEYS)}, got {got}"
        )
    return titled(fields[key], fields, "title")
