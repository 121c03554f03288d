"""The multi-view reranker at a size of a GPU: t5-base's shape, a hundred passages that fill their 256 tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from . import ceilings, made_up
from .harness import OURS, Case, Contender, Room, Work

PUBLISHED = "published way: a query at a time, padded"
_VIEWS, _COPIES, _QUERY = 4, 3, 12


@dataclass(frozen=True)
class Shape:
    """A T5's sizes and the lists that it ranks. ``mean`` 0: every input is as long as is allowed."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    head_dim: int
    queries: int
    passages: int = 100
    longest: int = 256
    mean: int = 0
    vocabulary: int = 32128

    def small(self) -> Shape:
        return replace(
            self, name=f"{self.name} made small", width=64, inner=96, layers=2, heads=2, head_dim=16,
            queries=min(self.queries, 2), passages=6, longest=48, mean=self.mean and 20, vocabulary=600,
        )  # fmt: skip


_T5_BASE = Shape("t5-base", 768, 3072, 12, 12, 64, queries=1)


@cache
def _model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import T5Config

    config = T5Config(
        vocab_size=shape.vocabulary, d_model=shape.width, d_kv=shape.head_dim, d_ff=shape.inner,
        num_layers=shape.layers, num_heads=shape.heads, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    return made_up.model(config, dtype, device)


def _tokenizer(shape: Shape) -> Any:
    return made_up.tokenizer(shape.vocabulary, "$A [SEP]", sentinels=_VIEWS, longest=shape.longest)


Lists = tuple[list[str], list[list[str]]]


def _lists(shape: Shape) -> list[Lists]:
    """Queries and their passages, of each turn."""
    count = shape.queries * shape.passages
    own = shape.vocabulary - _VIEWS
    found = []
    for turn in range(_COPIES):
        queries = made_up.texts([_QUERY] * shape.queries, own, 2 * turn)
        words = made_up.lengths(count, shape.mean, shape.longest, turn) if shape.mean else [shape.longest] * count
        passages = made_up.texts(list(words), own, 2 * turn + 1)
        starts = range(0, count, shape.passages)
        found.append((queries, [passages[first : first + shape.passages] for first in starts]))
    return found


def _published(shape: Shape, t5: Any, lists: Lists) -> np.ndarray:
    """transformers' own: the inputs of a query padded to 256, the decoder over each view of all its passages."""
    head = "".join(f"<extra_id_{view}>" for view in range(_VIEWS))
    scores = []
    for query, passages in zip(*lists, strict=True):
        inputs = _tokenizer(shape)(
            [f"{head} | Query: {query} | Context: {passage}" for passage in passages], padding="max_length",
            truncation=True, max_length=shape.longest, return_tensors="pt", return_token_type_ids=False,
        ).to(t5.device)  # fmt: skip
        with torch.inference_mode():
            views = t5.encoder(**inputs).last_hidden_state[:, :_VIEWS].transpose(0, 1)
            start = t5.shared.weight[0].expand(_VIEWS, 1, -1)
            anchors = t5.decoder(inputs_embeds=start, encoder_hidden_states=views).last_hidden_state
            scores.append((views @ anchors.transpose(1, 2)).mean(0)[:, 0].float().cpu())
    return torch.stack(scores).numpy()


def _verifier(exact: np.ndarray, shape: Shape, dtype: torch.dtype) -> Any:
    """The first query's scores against float32's: what ranks relative to their spread, and what all of them have in
    common, which twelve layers of bfloat16 move most and no ranking sees, relative to their size."""
    allowed = 1e-4 if dtype == torch.float32 else 0.1

    def verify(answer: np.ndarray) -> None:
        assert answer.shape == (shape.queries, shape.passages), f"shape {answer.shape}"
        off = answer[0].astype(np.float64) - exact
        ranking, common = float(off.std() / exact.std()), float(abs(off.mean()) / np.sqrt((exact**2).mean()))
        assert ranking <= allowed, f"scores are {ranking:.2g} of their spread away from the published ones in float32"
        assert common <= allowed, f"all scores are off by {common:.2g} of their size from the published ones in float32"

    return verify


def _build(shape: Shape, dtype: torch.dtype, room: Room) -> list[Contender]:
    from embedding_kernels.models import MultiViewModel, MultiViewReranker

    lists, t5 = _lists(shape), _model(shape, dtype, room.device)
    first = (lists[0][0][:1], lists[0][1][:1])
    verify = _verifier(_published(shape, made_up.in_float32(t5), first)[0], shape, dtype)
    reranker = MultiViewReranker(MultiViewModel(t5, _VIEWS), _tokenizer(shape), max_length=shape.longest)

    def ours(turn: int) -> np.ndarray:
        return np.stack(reranker.score_batch(*lists[turn % _COPIES], show_progress_bar=False))

    return [
        Contender(OURS, ours, verify, role="ours"),
        Contender(PUBLISHED, lambda turn: _published(shape, t5, lists[turn % _COPIES]), verify),
        ceilings.matmul(room, dtype),
    ]


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """A multiplication and an addition for each token and weight of the encoder, inputs taken as full."""
    inner = shape.heads * shape.head_dim
    weights = shape.layers * (4 * shape.width * inner + 2 * shape.width * shape.inner)
    tokens = shape.queries * shape.passages * (shape.mean + _QUERY if shape.mean else shape.longest)
    return Work(weights * dtype.itemsize, 2 * tokens * weights, f"{str(dtype).removeprefix('torch.')} operations")


def _made(shape: Shape, dtype: torch.dtype) -> Case:
    kind = str(dtype).removeprefix("torch.")
    filled = f"{shape.mean} words on average" if shape.mean else f"{shape.longest} tokens"
    return Case(
        "multi_view_ranking",
        f"{shape.queries} × {shape.passages} passages of {filled}, {shape.name} {kind}",
        {"queries": shape.queries, "passages": shape.passages, "views": _VIEWS, "dtype": kind, "layers": shape.layers},
        (PUBLISHED,),
        partial(_build, shape, dtype),
        _work(shape, dtype),
    )


def _case(shape: Shape) -> Case:
    small = _made(shape.small(), torch.float32)
    return replace(_made(shape, torch.bfloat16), where="cuda", small=small, patience=2.0)


CASES = [
    _case(_T5_BASE),
    _case(replace(_T5_BASE, queries=8)),
    # what padding costs the published way
    _case(replace(_T5_BASE, queries=8, mean=80)),
]
