"""T5's decoder over one position a view, folded: what a multi-view reranker makes its anchors with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...nn.linear import FusedLinear
from ...ops.anchor_scores import anchor_attention
from .blocks import check_captured
from .t5 import FeedForward, add_norm, captured_parts, check_without_dropout


class AnchorDecoder:
    """Anchors of queries: one step of a T5 decoder for each view, over that view of the query's passages.

    The decoder reads the start token alone, so self-attention has one key and its softmax is 1: W_o W_v of a norm. What
    comes before the first cross-attention is the same for every query and view. Keys and values of cross-attention are
    absorbed: with q_h the query of a head, its scores are views · (W_kᵀ q_h), and its values W_v Σ p views, so that
    nothing is projected passage by passage (`anchor_attention`).

    Where no gradient is recorded, the products W_o W_v and what comes before the first cross-attention are kept from
    call to call, and made again when a parameter was replaced, moved, cast or changed in place; changes
    through ``parameter.data`` and those of torch's fused optimizers bypass its version counters, and want `forget`.

    Args:
        decoder: the decoder `T5Stack` of a transformers T5.
        embedding: its token embedding.
        start_token_id: the token that it reads, T5's padding token.
    """

    def __init__(self, decoder: Any, embedding: nn.Embedding, start_token_id: int) -> None:
        self._decoder, self._embedding, self._start = decoder, embedding, start_token_id
        self._blocks = [_Block(block, decoder.config) for block in decoder.block]
        self._parts = captured_parts(decoder)
        self._folded: _Folded | None = None

    def __call__(self, views: Tensor, cu_passages: Tensor) -> Tensor:
        """The anchors ``[Q, m, D]``, after the decoder's last norm and without the d^(-1/2) of tied embeddings.

        Args:
            views: ``[P, m, D]``, m view vectors of each passage.
            cu_passages: int32 ``[Q + 1]``, from 0, never falling, to P: the passages of each query.

        Raises:
            ValueError: the decoder is in training mode with dropout, or a part of it was replaced.
        """
        check_without_dropout("AnchorDecoder", self._decoder)
        check_captured("AnchorDecoder", self._parts)
        maps, first = self._prepared()
        shape = (cu_passages.shape[0] - 1, views.shape[1])
        rows = shape[0] * shape[1]
        stream = first.stream.to(views.dtype).expand(rows, -1)
        queries = first.queries.to(views.dtype).expand(*shape, -1, -1)
        added, stream = self._blocks[0].attend(views, queries, cu_passages, stream)
        for block, folded in zip(self._blocks[1:], maps[1:], strict=True):
            absorbed, stream = block.before_attention(added, stream, folded)
            added, stream = block.attend(views, absorbed.unflatten(0, shape), cu_passages, stream)
        return add_norm(added, stream, self._decoder.final_layer_norm)[0].unflatten(0, shape)

    def forget(self) -> None:
        """Drop what was derived from the weights; the next call makes it again."""
        self._folded = None
        for block in self._blocks:
            block.forget()

    def _prepared(self) -> tuple[list[Tensor | None], _First]:
        """The folded maps, or None each where gradients need the factors; and the constants of the first block."""
        if torch.is_grad_enabled():
            return [None] * len(self._blocks), self._first(None)
        state = self._state()
        if self._folded is None or self._folded.state != state:
            maps = [block.folded() for block in self._blocks]
            self._folded = _Folded(state, self._sources(), maps, self._first(maps[0]))
        return [*self._folded.maps], self._folded.first

    def _first(self, folded: Tensor | None) -> _First:
        block = self._blocks[0]
        token = self._embedding.weight[self._start : self._start + 1]
        queries, stream = block.before_attention(token, None, folded)
        return _First(stream, queries)

    def _sources(self) -> tuple[Tensor, ...]:
        return (self._embedding.weight, *self._decoder.block.parameters())

    def _state(self) -> tuple[Any, ...]:
        return tuple(
            (source.data_ptr(), source.dtype, source.device, None if source.is_inference() else source._version)
            for source in self._sources()
        )


@dataclass(frozen=True)
class _First:
    """What every query and view has before the first cross-attention: the stream [1, D], and queries [1, H, D]."""

    stream: Tensor
    queries: Tensor


@dataclass(frozen=True)
class _Folded:
    """What is kept from call to call, and the state of the parameters that it was made from."""

    state: tuple[Any, ...]
    #: kept so that no other tensor can come to lie at the addresses in ``state``
    sources: tuple[Tensor, ...]
    maps: list[Tensor]
    first: _First


class _Block:
    def __init__(self, block: Any, config: Any) -> None:
        own, cross = block.layer[0], block.layer[1]
        self.own, self.cross = own.SelfAttention, cross.EncDecAttention
        self.self_norm, self.cross_norm = own.layer_norm, cross.layer_norm
        self.query, self.mixed = FusedLinear((self.cross.q,)), FusedLinear((self.cross.o,))
        self.feed_forward = FeedForward(block.layer[2], config)

    def folded(self) -> Tensor:
        """W_o W_v of self-attention, ``[D, D]``."""
        return self.own.o.weight @ self.own.v.weight

    def before_attention(self, added: Tensor, stream: Tensor | None, folded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Self-attention; then the queries of cross-attention in the space of the views, ``[R, H, D]``."""
        normed, stream = add_norm(added, stream, self.self_norm)
        own = self.own.o(self.own.v(normed)) if folded is None else functional.linear(normed, folded)
        normed, stream = add_norm(own, stream, self.cross_norm)
        queries = self.query(normed).unflatten(-1, (self.cross.n_heads, -1)).transpose(0, 1)
        return torch.bmm(queries, self._by_head(self.cross.k)).transpose(0, 1), stream

    def attend(self, views: Tensor, queries: Tensor, cu_passages: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention and feed-forward: the stream, and what is still to be added to it."""
        mixed = anchor_attention(views, queries, cu_passages).flatten(0, 1)
        values = torch.bmm(mixed.transpose(0, 1), self._by_head(self.cross.v).transpose(1, 2))
        return self.feed_forward(self.mixed(values.transpose(0, 1).flatten(1)), stream)

    def forget(self) -> None:
        for linear in (self.query, self.mixed, self.feed_forward):
            linear.forget()

    def _by_head(self, linear: nn.Linear) -> Tensor:
        return linear.weight.unflatten(0, (self.cross.n_heads, -1))
