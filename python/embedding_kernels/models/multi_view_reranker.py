"""`MultiViewReranker`: queries and passages to scores, with the arguments of `CrossEncoder.rank` and `predict`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._progress import progress_bar
from ..ops.anchor_scores import anchor_scores, anchor_topk
from .batching import TextTokenizer, TokenizedTexts, default_token_budget, offsets_of
from .directory import check_files, resolve_directory
from .loading import load_config, load_tokenizer
from .multi_view import MultiViewModel, load_multi_view, save_multi_view

logger = logging.getLogger(__name__)

#: a text, or a mapping with "text" and, if it has one, "title"
Document = str | Mapping[str, str]

_WINDOW = 16_384  # passages tokenised together, whose views are held at once
# CrossEncoder's arguments that mean nothing here, which wrappers pass along unset
_UNUSED_OPTIONS = ("prompt_name", "prompt", "apply_softmax", "device", "pool", "chunk_size")


class MultiViewReranker:
    """A multi-view reranker (MVP): the passages of a query are scored together, whatever order they come in.

    Made by `MultiViewReranker.from_pretrained`. An input is m sentinel tokens, the query and the passage, cut to
    ``max_length``: token by token that of the published evaluation, which puts a passage's title before its text. The
    published training did not; pass texts alone to leave titles out. The inputs of many queries are packed into batches
    of at most ``token_budget`` tokens, without padding. Scores are comparable within one query and one set of passages
    alone. They do not depend on the order of the passages: these are processed in an order of their own, and equal ones
    once. See `MultiViewModel`.

    Args:
        model: a `MultiViewModel`, put into evaluation mode.
        tokenizer: T5's tokenizer, with the sentinels ``<extra_id_0>`` and on.
        max_length: tokens kept of an input, sentinels and end token included. Published: 256, 512 or 1024, by dataset.
        token_budget: most tokens in a batch of the encoder; by default right for the device.

    Attributes:
        model: the `MultiViewModel`.
        tokenizer: its tokenizer.
        max_length: see above.
        token_budget: see above.

    Raises:
        ValueError: ``max_length`` leaves no room for a text, or the tokenizer lacks a sentinel.
    """

    def __init__(
        self, model: MultiViewModel, tokenizer: Any, *, max_length: int = 256, token_budget: int | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.token_budget = default_token_budget(model.t5) if token_budget is None else token_budget
        if max_length <= model.views:
            raise ValueError(
                f"MultiViewReranker: max_length must be more than the views ({model.views}), got {max_length}"
            )
        if self.token_budget < 1:
            raise ValueError(f"MultiViewReranker: token_budget must be at least 1, got {self.token_budget}")
        self._sentinels = "".join(f"<extra_id_{view}>" for view in range(model.views))
        self._texts = TextTokenizer(tokenizer, max_length)
        self._check_sentinels()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        views: int | None = None,
        max_length: int = 256,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        token_budget: int | None = None,
    ) -> MultiViewReranker:
        """Load a directory of the published layout (Jun421/MVP-base, Jun421/MVP-3b), or one of a plain T5's.

        Args:
            path: a local directory, or a repository of the Hugging Face Hub.
            views: m; by default what config.json says ("n_special_tokens"), or 4, as published.
            max_length: tokens kept of an input.
            device: by default the current CUDA device where there is one, else the CPU.
            dtype: float32 or bfloat16; by default that of the weights.
            token_budget: most tokens in a batch of the encoder.

        Raises:
            FileNotFoundError: the directory, its weights or its tokenizer are missing.
            ValueError: the config is not T5's, a tensor is missing or of another shape, or a dtype cannot be used.
        """
        if dtype is not None and dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"from_pretrained: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        root = resolve_directory(path)
        check_files(root)
        config = load_config(root)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_multi_view(root, config, where, dtype, views)
        tokenizer, _ = load_tokenizer(root, config, False)
        return cls(model, tokenizer, max_length=max_length, token_budget=token_budget)

    def save_pretrained(self, path: str | Path) -> None:
        """Write model and tokenizer in the published layout, whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and is not an empty directory.
        """
        save_multi_view(self.model, self.tokenizer, path)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.t5.device

    def rank(
        self,
        query: str,
        documents: Sequence[Document],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        **unused: Any,
    ) -> list[dict[str, Any]]:
        """Passages of one query, best first. Names and returns are those of `CrossEncoder.rank`.

        Args:
            query: the query.
            documents: passages; a mapping has "text" and may have "title".
            top_k: the most results; all by default.
            return_documents: adds each passage as it was given, as "text".
            batch_size: most passages in a batch of the encoder; None leaves it to ``token_budget``.
            show_progress_bar: None shows one when this package's logger is at INFO or DEBUG, and in a terminal once
                the work has taken two seconds.

        Returns:
            ``{"corpus_id": place in documents, "score": float}`` by falling score, with "text" where it was asked for.

        Raises:
            ValueError: an argument is unknown, or has a value that cannot be used.
        """
        _check_unused("rank", unused)
        return self.rank_batch(
            [query], [documents], top_k, return_documents, batch_size=batch_size, show_progress_bar=show_progress_bar
        )[0]

    def rank_batch(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[Document]],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[list[dict[str, Any]]]:
        """`rank` of many queries, each with passages of its own, in any number."""
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"rank: top_k must be a positive integer or None, got {top_k!r}")
        ranked: list[list[dict[str, Any]]] = []
        for lists, views, anchors in self._encoded("rank", queries, documents, batch_size, show_progress_bar):
            most = max(map(len, lists.orders), default=0)
            best, places = anchor_topk(views, anchors, lists.cu_passages, max(1, min(most, top_k or most)))
            for order, scores, found in zip(lists.orders, best.tolist(), places.tolist(), strict=True):
                held = documents[len(ranked)]
                ids = [int(order[place]) for place in found if place >= 0]
                results = [{"corpus_id": place, "score": score} for place, score in zip(ids, scores, strict=False)]
                if return_documents:
                    results = [{**result, "text": held[result["corpus_id"]]} for result in results]
                ranked.append(results)
        return ranked

    def score_batch(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[Document]],
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[np.ndarray]:
        """Scores of each query's passages, float32, in the order given; arguments as in `rank_batch`."""
        scored: list[np.ndarray] = []
        for lists, views, anchors in self._encoded("predict", queries, documents, batch_size, show_progress_bar):
            scores = anchor_scores(views, anchors, lists.cu_passages).float().cpu().numpy()
            for order, part in zip(lists.orders, np.split(scores, lists.ends[:-1]), strict=True):
                placed = np.empty(len(order), np.float32)
                placed[order] = part
                scored.append(placed)
        return scored

    def predict(
        self,
        inputs: Sequence[tuple[str, Document]] | tuple[str, Document],
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **unused: Any,
    ) -> Any:
        """Scores of pairs, as `CrossEncoder.predict`; but all pairs of one query text are scored together.

        Args:
            inputs: (query, passage) pairs in any order, or one pair.
            batch_size: most passages in a batch of the encoder; None leaves it to ``token_budget``.
            show_progress_bar: as in `rank`.
            activation_fn: applied to the scores.
            convert_to_numpy: a NumPy array (the default); where false, a list of tensors.
            convert_to_tensor: one tensor; goes before ``convert_to_numpy``.

        Returns:
            float32 ``[N]`` in the order of the pairs, or one number for one pair.

        Raises:
            ValueError: an argument is unknown, or has a value that cannot be used.
        """
        _check_unused("predict", unused)
        pairs, single = _as_pairs(inputs)
        places: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(pairs):
            places.setdefault(query, []).append(place)
        grouped = [[pairs[place][1] for place in group] for group in places.values()]
        scores = np.empty(len(pairs), np.float32)
        scored = self.score_batch([*places], grouped, batch_size=batch_size, show_progress_bar=show_progress_bar)
        for group, part in zip(places.values(), scored, strict=True):
            scores[group] = part
        result = torch.from_numpy(scores)
        if activation_fn is not None:
            result = activation_fn(result)
        if single:
            result = result[0]
        if convert_to_tensor:
            return result.to(self.device)
        return result.numpy() if convert_to_numpy else (result if single else list(result))

    def tokenize(
        self, queries: Sequence[str], documents: Sequence[Sequence[Document]]
    ) -> tuple[Tensor, Tensor, int, Tensor]:
        """What `MultiViewModel.forward` takes: ids, cu_seqlens, max_seqlen and cu_passages, in the order given."""
        counts, texts = self._inputs("tokenize", queries, documents)
        tokenized = self._texts(texts)
        cpu = torch.device("cpu")
        flat = [batch.inputs["input_ids"] for batch in tokenized.batches(1 << 62, None)]
        ids = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int64)
        longest = int(tokenized.lengths.max(initial=0))
        return ids, offsets_of(tokenized.lengths, cpu), longest, offsets_of(np.asarray(counts, np.int64), cpu)

    def to(self, device: str | torch.device) -> MultiViewReranker:
        """Move the model to a device; returns the reranker."""
        self.model.to(device)
        self.model.forget()
        return self

    def __repr__(self) -> str:
        config = self.model.t5.config
        return (
            f"MultiViewReranker(T5, layers={config.num_layers}+{config.num_decoder_layers}, width={config.d_model}, "
            f"views={self.model.views}, max_length={self.max_length}, device={self.device}, "
            f"dtype={str(self.model.t5.dtype).removeprefix('torch.')}, token_budget={self.token_budget})"
        )

    def _check_sentinels(self) -> None:
        ids = self.tokenizer(self._sentinels)["input_ids"][: self.model.views]
        unknown = self.tokenizer.unk_token_id
        if len(set(ids)) < self.model.views or unknown in ids:
            raise ValueError(
                f"MultiViewReranker: tokenizer must have the sentinels {self._sentinels} as one token each, got {ids}"
            )

    def _inputs(
        self, op: str, queries: Sequence[str], documents: Sequence[Sequence[Document]]
    ) -> tuple[list[int], list[str]]:
        """Passages of each query, and the texts that the encoder reads."""
        if isinstance(queries, str) or len(queries) != len(documents):
            got = "a string" if isinstance(queries, str) else f"{len(queries)} queries and {len(documents)} lists"
            raise ValueError(f"{op}: queries must be as many as the lists of documents, got {got}")
        texts: list[str] = []
        for query, held in zip(queries, documents, strict=True):
            if not isinstance(query, str):
                raise ValueError(f"{op}: query must be a string, got {type(query).__name__}")
            if isinstance(held, (str, bytes, Mapping)) or not hasattr(held, "__len__"):
                raise ValueError(f"{op}: documents must be a sequence of passages, got {type(held).__name__}")
            texts += [f"{self._sentinels} | Query: {query} | Context: {_context(op, one)}" for one in held]
        return [len(held) for held in documents], texts

    def _encoded(
        self,
        op: str,
        queries: Sequence[str],
        documents: Sequence[Sequence[Document]],
        batch_size: int | None,
        show: bool | None,
    ) -> Iterator[tuple[_Lists, Tensor, Tensor]]:
        """For some queries after the other: their passages in an order of their own, with views and anchors."""
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise ValueError(f"{op}: batch_size must be a positive integer or None, got {batch_size!r}")
        counts, texts = self._inputs(op, queries, documents)
        with progress_bar("Reranking", len(texts), "passage", show, logger) as bar:
            start = 0
            for group in _windows(counts):
                end = start + sum(group)
                with torch.inference_mode():
                    lists = _in_own_order(self._texts(texts[start:end]), group, self.device)
                    views = self._views(lists, batch_size, bar)
                    anchors = self.model.anchors(views, lists.cu_passages)
                yield lists, views, anchors
                start = end

    def _views(self, lists: _Lists, batch_size: int | None, bar: Any) -> Tensor:
        """``[P, m, D]`` in the lists' own order; equal inputs were encoded once."""
        config = self.model.t5.config
        parts = [torch.empty(0, self.model.views, config.d_model, dtype=self.model.t5.dtype, device=self.device)]
        for batch in lists.distinct.batches(self.token_budget, batch_size):
            ids = batch.inputs["input_ids"].to(self.device)
            parts.append(self.model.encode(ids, offsets_of(batch.lengths, self.device), batch.longest))
            bar.update(len(batch.lengths))
        distinct = torch.cat(parts)
        bar.update(len(lists.rows) - len(distinct))
        return distinct if len(lists.rows) == len(distinct) else distinct[lists.rows]


@dataclass(frozen=True)
class _Lists:
    """Passages of some queries in an order that their tokens alone decide."""

    #: of each query the places of its passages in the order given, in their own order
    orders: list[np.ndarray]
    ends: np.ndarray
    cu_passages: Tensor
    #: inputs without those that are equal within a query, and the row of each passage in them, int64 [P]
    distinct: TokenizedTexts
    rows: Tensor


def _in_own_order(tokenized: TokenizedTexts, counts: list[int], device: torch.device) -> _Lists:
    orders: list[np.ndarray] = []
    kept: list[int] = []
    rows: list[int] = []
    start = 0
    for count in counts:
        keys = [tokenized.key(start + place) for place in range(count)]
        order = sorted(range(count), key=keys.__getitem__)
        for before, place in zip([-1, *order], order, strict=False):
            if before < 0 or keys[before] != keys[place]:
                kept.append(start + place)
            rows.append(len(kept) - 1)
        orders.append(np.asarray(order, np.int64))
        start += count
    return _Lists(
        orders,
        np.cumsum(counts, dtype=np.int64),
        offsets_of(np.asarray(counts, np.int64), device),
        tokenized.take(np.asarray(kept, np.int64)),
        torch.tensor(rows, dtype=torch.int64, device=device),
    )


def _windows(counts: list[int]) -> Iterator[list[int]]:
    """Consecutive counts of at most ``_WINDOW`` passages together, or of one query."""
    group: list[int] = []
    for count in counts:
        if group and sum(group) + count > _WINDOW:
            yield group
            group = []
        group.append(count)
    if group:
        yield group


def _context(op: str, document: Any) -> str:
    """Title and text, as published."""
    if isinstance(document, str):
        return document
    if isinstance(document, Mapping):
        title, text = document.get("title") or "", document.get("text")
        if isinstance(text, str) and isinstance(title, str):
            return f"{title} {text}".strip()
    got = f"a mapping with {', '.join(map(repr, document)) or 'nothing'}" if isinstance(document, Mapping) else ""
    raise ValueError(
        f'{op}: a document must be a string or a mapping with strings "text" and, if it has one, "title", got '
        f"{got or type(document).__name__}"
    )


def _as_pairs(inputs: Any) -> tuple[list[tuple[str, Any]], bool]:
    expected = "predict: inputs must be (query, passage) pairs"
    if isinstance(inputs, (str, bytes, Mapping)) or not hasattr(inputs, "__iter__"):
        raise ValueError(f"{expected}, got {type(inputs).__name__}")
    pairs = list(inputs)
    single = len(pairs) == 2 and isinstance(pairs[0], str)
    if single:
        pairs = [(pairs[0], pairs[1])]
    for place, pair in enumerate(pairs):
        if isinstance(pair, (str, bytes, Mapping)) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise ValueError(f"{expected}, got {pair!r} in place {place}")
        if not isinstance(pair[0], str):
            raise ValueError(f"{expected}, got a query of type {type(pair[0]).__name__} in place {place}")
    return [(pair[0], pair[1]) for pair in pairs], single


def _check_unused(op: str, unused: dict[str, Any]) -> None:
    surplus = sorted(
        name for name, value in unused.items() if name not in _UNUSED_OPTIONS or value not in (None, False)
    )
    if surplus:
        raise ValueError(f"{op}: arguments must be those of its signature, got {', '.join(surplus)}")
