"""The multi-view reranker at t5-small's shape: decoder and scoring, whole rankings, and rerankers of other kinds.

Weights are seeded (no T5 can be installed), so scores mean nothing and are held against the published computation;
what time costs does not depend on them. A generator's answer cannot be checked: its shape is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from embedding_kernels.demo_data import minilm_directory
from embedding_kernels.models import MultiViewModel, MultiViewReranker
from embedding_kernels.ops.anchor_scores import anchor_scores

from . import ceilings, multi_view_gpu
from .embedder import texts_joined
from .harness import OURS, Case, Contender, Room, Work

DECODER = "transformers' decoder, then products"
BATCH = "transformers, padded to the longest"
MAXIMUM = "published way: padded to 256"
POINTWISE = "pointwise cross-encoder of the same encoder"
SLIDING = "sliding windows, generated, of the same T5"
_VIEWS, _LONGEST, _COPIES = 4, 256, 3
# a list of twenty is written as "[3] > [17] > ...", four tokens a passage
_WINDOW, _STRIDE, _NEW_TOKENS = 20, 10, 80


@cache
def _tokenizer() -> Any:
    """MiniLM's pieces with T5's conventions: an end token, none at the beginning, and sentinels."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{view}>" for view in range(_VIEWS)]})
    end = ("[SEP]", tokenizer.sep_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[end])
    return tokenizer


@cache
def _t5(dtype: torch.dtype, device: torch.device) -> Any:
    """t5-small's sizes, seeded; with the head that generates."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(_tokenizer()), d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, pad_token_id=0,
        eos_token_id=_tokenizer().sep_token_id, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).to(device, dtype).eval()


@cache
def _reranker(dtype: torch.dtype, device: torch.device) -> MultiViewReranker:
    from transformers import T5Model

    whole = _t5(dtype, device)
    t5 = T5Model(whole.config).to(device, dtype).eval()
    t5.load_state_dict(whole.state_dict(), strict=False)
    return MultiViewReranker(MultiViewModel(t5, _VIEWS), _tokenizer(), max_length=_LONGEST)


@cache
def _lists(count: int) -> list[tuple[str, list[str]]]:
    """Queries with passages of uneven length: up to twelve definitions each, 8 to 200 tokens."""
    texts = texts_joined(count * _COPIES, 6)
    return [(texts[i * count][:80], texts[i * count : (i + 1) * count]) for i in range(_COPIES)]


# ---- the published way, in transformers ----


def _inputs(query: str, passages: list[str]) -> list[str]:
    head = "".join(f"<extra_id_{view}>" for view in range(_VIEWS))
    return [f"{head} | Query: {query} | Context: {passage}" for passage in passages]


def _tokenized(texts: list[str], padding: str | bool, device: torch.device) -> Any:
    options = {"truncation": True, "max_length": _LONGEST, "return_tensors": "pt", "return_token_type_ids": False}
    return _tokenizer()(texts, padding=padding, **options).to(device)


def _decoded(t5: Any, views: Tensor, cu_passages: Tensor) -> Tensor:
    """Scores ``[P]`` of ``views [P, m, D]``: one batch of queries × views where the lists are of one length."""
    lengths = cu_passages.diff()
    queries = len(lengths)
    own = views.unflatten(0, (queries, -1)).transpose(1, 2).flatten(0, 1)
    token = t5.shared.weight[0].expand(len(own), 1, -1)
    anchors = t5.decoder(inputs_embeds=token, encoder_hidden_states=own).last_hidden_state
    return (own @ anchors.transpose(1, 2)).unflatten(0, (queries, -1)).mean(1).flatten()


def _padded(query: str, passages: list[str], dtype: torch.dtype, device: torch.device, padding: str | bool) -> Tensor:
    t5 = _t5(dtype, device)
    inputs = _tokenized(_inputs(query, passages), padding, device)
    with torch.inference_mode():
        views = t5.encoder(**inputs).last_hidden_state[:, :_VIEWS]
        return _decoded(t5, views, torch.tensor([0, len(passages)])).float().cpu()


# ---- rerankers of other kinds ----


def _pointwise(query: str, passages: list[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The encoder over query and passage, a linear head on the first token; batches of 32, the longest first."""
    t5 = _t5(dtype, device)
    order = sorted(range(len(passages)), key=lambda place: -len(passages[place]))
    scores = torch.empty(len(passages))
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            part = order[start : start + 32]
            inputs = _tokenized([f"Query: {query} Document: {passages[place]}" for place in part], True, device)
            first = t5.encoder(**inputs).last_hidden_state[:, 0]
            scores[part] = (first @ t5.shared.weight[1]).float().cpu()
    return scores


def _sliding(query: str, passages: list[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Windows of twenty from the last to the first, ten apart, each a prompt of its passages and a list written out."""
    t5 = _t5(dtype, device)
    written = []
    for start in range(len(passages) - _WINDOW, -1, -_STRIDE):
        listed = " ".join(f"[{i}] {passage}" for i, passage in enumerate(passages[start : start + _WINDOW], 1))
        inputs = _tokenizer()(f"Rank by {query}: {listed}", return_tensors="pt", return_token_type_ids=False).to(device)
        with torch.inference_mode():
            written.append(
                t5.generate(**inputs, min_new_tokens=_NEW_TOKENS, max_new_tokens=_NEW_TOKENS, do_sample=False)
            )
    return torch.cat(written)


# ---- cases ----


def _verifier(expected: Tensor, dtype: torch.dtype) -> Callable[[Any], None]:
    """Against float32 scores of the published computation, relative to their spread."""
    expected, allowed = expected.float().cpu(), 1e-4 if dtype == torch.float32 else 0.1

    def verify(answer: Any) -> None:
        got = torch.as_tensor(answer).float().cpu()
        assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        error = float((got - expected).norm() / (expected - expected.mean()).norm())
        assert error <= allowed, f"scores are {error:.2g} of their spread away from the published ones"

    return verify


def _of_shape(shape: tuple[int, ...]) -> Callable[[Any], None]:
    def verify(answer: Any) -> None:
        assert tuple(answer.shape) == shape, f"shape {tuple(answer.shape)}, expected {shape}"

    return verify


def _build_decoder(queries: int, passages: int, dtype: torch.dtype, room: Room) -> list[Contender]:
    t5, model = _t5(dtype, room.device), _reranker(dtype, room.device).model
    seeded = torch.Generator().manual_seed(0)
    shape = (queries * passages, _VIEWS, t5.config.d_model)
    views = [(0.3 * torch.randn(shape, generator=seeded)).to(room.device, dtype) for _ in range(_COPIES)]
    cu_passages = torch.arange(queries + 1, dtype=torch.int32, device=room.device) * passages

    def ours(turn: int) -> Tensor:
        own = views[turn % _COPIES]
        with torch.inference_mode():
            return anchor_scores(own, model.anchors(own, cu_passages), cu_passages)

    def theirs(turn: int) -> Tensor:
        with torch.inference_mode():
            return _decoded(t5, views[turn % _COPIES], cu_passages)

    with torch.inference_mode():
        verify = _verifier(_decoded(_t5(torch.float32, room.device), views[0].float(), cu_passages), dtype)
    return [Contender(OURS, ours, verify, role="ours"), Contender(DECODER, theirs, verify)]


def _build_ranking(passages: int, peers: tuple[str, ...], dtype: torch.dtype, room: Room) -> list[Contender]:
    lists, device = _lists(passages), room.device
    reranker = _reranker(dtype, device)

    def call(score: Callable[..., Any], *options: Any) -> Callable[[int], Any]:
        return lambda turn: score(*lists[turn % _COPIES], dtype, device, *options)

    def ours(turn: int) -> Any:
        query, held = lists[turn % _COPIES]
        return reranker.score_batch([query], [held], show_progress_bar=False)[0]

    verify = _verifier(_padded(*lists[0], torch.float32, device, "max_length"), dtype)
    contenders = {
        BATCH: Contender(BATCH, call(_padded, True), verify),
        MAXIMUM: Contender(MAXIMUM, call(_padded, "max_length"), verify),
        POINTWISE: Contender(POINTWISE, call(_pointwise), _of_shape((passages,))),
        SLIDING: Contender(
            SLIDING, call(_sliding), _of_shape((len(range(passages - _WINDOW, -1, -_STRIDE)), _NEW_TOKENS + 1))
        ),
    }
    return [
        Contender(OURS, ours, verify, role="ours"),
        *(contenders[peer] for peer in peers),
        ceilings.matmul(room, dtype),
    ]


def _decoder_case(queries: int, dtype: torch.dtype, quick: bool = False) -> Case:
    kind = str(dtype).removeprefix("torch.")
    return Case(
        "multi_view_decoder",
        f"{queries} × 100 passages, 4 views, t5-small {kind}",
        {"queries": queries, "passages": 100, "views": _VIEWS, "dtype": kind},
        (DECODER,),
        partial(_build_decoder, queries, 100, dtype),
        Work(0, queries * 100, "passages"),
        {DECODER: 10.0},
        quick=quick,
    )


def _ranking_case(passages: int, peers: tuple[str, ...], targets: dict[str, float], dtype: torch.dtype) -> Case:
    kind = str(dtype).removeprefix("torch.")
    return Case(
        "multi_view_ranking",
        f"a query, {passages} passages of 8 to 200 tokens, t5-small {kind}",
        {"passages": passages, "views": _VIEWS, "dtype": kind, "max_length": _LONGEST},
        peers,
        partial(_build_ranking, passages, peers, dtype),
        Work(0, passages, "passages"),
        targets,
    )


_DTYPES = (torch.float32, torch.bfloat16)
BENCHMARKS: dict[str, list[Case]] = {
    "multi_view_decoder": [_decoder_case(queries, dtype) for queries in (1, 16) for dtype in _DTYPES],
    "multi_view_ranking": [
        *multi_view_gpu.CASES,
        *(_ranking_case(100, (BATCH, MAXIMUM), {BATCH: 1.8}, dtype) for dtype in _DTYPES),
        # fewer passages: a repetition of the generator takes minutes else, and its time grows with them as ours does
        *(replace(_ranking_case(40, (POINTWISE, SLIDING), {}, dtype), where="cpu") for dtype in _DTYPES),
    ],
}
