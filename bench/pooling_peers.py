"""What the pooling family is compared with. Padded peers are given the padded batch, packed ones the packed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import embedding_kernels as ek

from .harness import Contender

PADDED = "sentence-transformers Pooling, padded"
FLAT = "sentence-transformers Pooling, packed"
INDEX_ADD = "torch index_add"
EMBEDDING_BAG = "torch embedding_bag"
SEGMENT_REDUCE = "torch segment_reduce"
NESTED = "torch nested tensor"
COMPILED = "torch.compile masked mean, padded"
PADDED_QUANTIZE = "Pooling padded + quantize_embeddings"
FLAT_QUANTIZE = "Pooling packed + quantize_embeddings"
TWO_OPS = "segment_pool, then pack_bits"

Pool = Callable[[Tensor], Tensor]
Verify = Callable[[Any], None]
Maker = Callable[["Batch", str, bool, bool, dict[str, Verify]], Contender | None]

#: our mode -> that of sentence-transformers
_THEIR_MODES = {"mean": "mean", "max": "max", "last": "lasttoken"}


@dataclass
class Batch:
    """One ragged batch, packed and padded, in rotating copies, with whatever else a peer wants of it."""

    packed: list[Tensor]
    padded: list[Tensor]
    mask: Tensor  # bool [texts, longest]
    lengths: Tensor  # int64 [texts]
    grad: Tensor  # [texts, dim]: gradient of the pooled vectors

    def row(self, turn: int) -> Tensor:
        return self.packed[turn % len(self.packed)]

    def padding(self, turn: int) -> Tensor:
        return self.padded[turn % len(self.padded)]

    @cached_property
    def attention_mask(self) -> Tensor:
        return self.mask.long()

    @cached_property
    def offsets(self) -> Tensor:
        return functional.pad(self.lengths.cumsum(0), (1, 0))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        return self.offsets.int()

    @cached_property
    def total(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def text_of_row(self) -> Tensor:
        return torch.repeat_interleave(self.lengths)

    @cached_property
    def kept_positions(self) -> Tensor:
        """Rows of the flattened padded batch that are tokens."""
        return self.mask.flatten().nonzero().squeeze(1)


def over(rows: list[Tensor], pool: Pool, grad: Tensor, gradient: bool) -> Callable[[int], Tensor]:
    """A contender's call: pool one of the copies, and with ``gradient`` return the gradient of its rows."""

    def forward(turn: int) -> Tensor:
        with torch.no_grad():
            return pool(rows[turn % len(rows)])

    def both(turn: int) -> Tensor:
        row = rows[turn % len(rows)]
        return torch.autograd.grad(pool(row), row, grad)[0]

    return both if gradient else forward


def _normalised(pool: Pool, normalize: bool) -> Pool:
    return (lambda rows: functional.normalize(pool(rows), dim=-1)) if normalize else pool


def _padded(batch: Batch, mode: str, normalize: bool, gradient: bool, verify: dict[str, Verify]) -> Contender | None:
    module = _module(batch, mode)
    if module is None:
        return None

    def pool(rows: Tensor) -> Tensor:
        return module({"token_embeddings": rows, "attention_mask": batch.attention_mask})["sentence_embedding"]

    call = over(batch.padded, _normalised(pool, normalize), batch.grad, gradient)
    return Contender(PADDED, call, verify["padded"])


def _flat(batch: Batch, mode: str, normalize: bool, gradient: bool, verify: dict[str, Verify]) -> Contender | None:
    module = _module(batch, mode)
    if module is None:
        return None

    def pool(rows: Tensor) -> Tensor:
        features = {"token_embeddings": rows.unsqueeze(0), "cu_seq_lens_q": batch.cu_seqlens}
        return module(features)["sentence_embedding"]

    call = over(batch.packed, _normalised(pool, normalize), batch.grad, gradient)
    return Contender(FLAT, call, verify["packed"])


def _module(batch: Batch, mode: str = "mean") -> Any:
    try:
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError:
        return None
    return Pooling(batch.packed[0].shape[1], _THEIR_MODES[mode])


def _index_add(batch: Batch, mode: str, normalize: bool, gradient: bool, verify: dict[str, Verify]) -> Contender:
    texts, ids = len(batch.lengths), batch.text_of_row
    counts = batch.lengths.unsqueeze(1).float()

    def pool(rows: Tensor) -> Tensor:
        sums = torch.zeros(texts, rows.shape[1], device=rows.device).index_add(0, ids, rows.float())
        return (sums / counts).to(rows.dtype)

    call = over(batch.packed, _normalised(pool, normalize), batch.grad, gradient)
    return Contender(INDEX_ADD, call, verify["packed"], note="text of each row known beforehand")


def _embedding_bag(batch: Batch, mode: str, normalize: bool, gradient: bool, verify: dict[str, Verify]) -> Contender:
    places, starts = torch.arange(batch.total, device=batch.mask.device), batch.offsets[:-1].contiguous()

    def pool(rows: Tensor) -> Tensor:
        return functional.embedding_bag(places, rows, starts, mode="mean")

    call = over(batch.packed, _normalised(pool, normalize), batch.grad, gradient)
    return Contender(EMBEDDING_BAG, call, verify["packed"], note="bags are the texts; indices made beforehand")


def _segment_reduce(batch: Batch, mode: str, normalize: bool, gradient: bool, verify: dict[str, Verify]) -> Contender:
    def pool(rows: Tensor) -> Tensor:
        return torch.segment_reduce(rows, "mean", lengths=batch.lengths, axis=0)

    return Contender(SEGMENT_REDUCE, over(batch.packed, pool, batch.grad, gradient), verify["packed"])


def _nested(batch: Batch, mode: str, normalize: bool, gradient: bool, verify: dict[str, Verify]) -> Contender:
    def pool(rows: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(rows, batch.offsets).mean(dim=1)

    return Contender(NESTED, over(batch.packed, pool, batch.grad, gradient), verify["packed"])


def _compiled(batch: Batch, mode: str, normalize: bool, gradient: bool, verify: dict[str, Verify]) -> Contender:
    @torch.compile(dynamic=False)
    def masked_mean(rows: Tensor, mask: Tensor) -> Tensor:
        wide = mask.unsqueeze(-1).float()
        return ((rows.float() * wide).sum(1) / wide.sum(1)).to(rows.dtype)

    call = over(batch.padded, lambda rows: masked_mean(rows, batch.attention_mask), batch.grad, gradient)
    return Contender(COMPILED, call, verify["padded"], note="compiled before timing")


MAKERS: dict[str, Maker] = {
    PADDED: _padded,
    FLAT: _flat,
    INDEX_ADD: _index_add,
    EMBEDDING_BAG: _embedding_bag,
    SEGMENT_REDUCE: _segment_reduce,
    NESTED: _nested,
    COMPILED: _compiled,
}


# ---- pooled bits ----


def _quantized(batch: Batch, name: str, pooled: Contender | None, verify: Verify) -> Contender | None:
    if pooled is None or batch.mask.device.type != "cpu":
        return None
    from sentence_transformers import quantize_embeddings

    def call(turn: int) -> np.ndarray:
        return np.asarray(quantize_embeddings(pooled.call(turn).float().numpy(), "ubinary"))

    return Contender(name, call, verify)


def _padded_quantize(batch: Batch, verify: Verify) -> Contender | None:
    pooled = _padded(batch, "mean", False, False, {"padded": verify})
    return _quantized(batch, PADDED_QUANTIZE, pooled, verify)


def _flat_quantize(batch: Batch, verify: Verify) -> Contender | None:
    pooled = _flat(batch, "mean", False, False, {"packed": verify})
    return _quantized(batch, FLAT_QUANTIZE, pooled, verify)


def _two_ops(batch: Batch, verify: Verify) -> Contender:
    def call(turn: int) -> Tensor:
        return ek.pack_bits(ek.segment_pool(batch.row(turn), batch.cu_seqlens))

    return Contender(TWO_OPS, call, verify, note="ours, unfused")


BIT_MAKERS: dict[str, Callable[[Batch, Verify], Contender | None]] = {
    PADDED_QUANTIZE: _padded_quantize,
    FLAT_QUANTIZE: _flat_quantize,
    TWO_OPS: _two_ops,
}


# ---- padded to packed and back ----


def _boolean_index(batch: Batch, verify: Verify) -> Contender:
    return Contender("torch x[mask]", lambda turn: batch.padding(turn)[batch.mask], verify)


def _index_select(batch: Batch, verify: Verify) -> Contender:
    places = batch.kept_positions
    call = lambda turn: batch.padding(turn).flatten(0, 1).index_select(0, places)  # noqa: E731
    return Contender("torch index_select", call, verify, note="places known beforehand")


def _boolean_assign(batch: Batch, verify: Verify) -> Contender:
    def call(turn: int) -> Tensor:
        packed = batch.row(turn)
        padded = packed.new_zeros(*batch.mask.shape, packed.shape[1])
        padded[batch.mask] = packed
        return padded

    return Contender("torch x[mask] = rows", call, verify)


def _masked_scatter(batch: Batch, verify: Verify) -> Contender:
    def call(turn: int) -> Tensor:
        packed = batch.row(turn)
        padded = packed.new_zeros(*batch.mask.shape, packed.shape[1])
        return padded.masked_scatter_(batch.mask.unsqueeze(-1), packed)

    return Contender("torch masked_scatter", call, verify)


def _index_copy(batch: Batch, verify: Verify) -> Contender:
    places = batch.kept_positions

    def call(turn: int) -> Tensor:
        packed = batch.row(turn)
        padded = packed.new_zeros(batch.mask.numel(), packed.shape[1])
        return padded.index_copy_(0, places, packed).view(*batch.mask.shape, -1)

    return Contender("torch index_copy", call, verify, note="places known beforehand")


MOVE_MAKERS: dict[str, dict[str, Callable[[Batch, Verify], Contender]]] = {
    "pack_padded": {"torch x[mask]": _boolean_index, "torch index_select": _index_select},
    "unpack_padded": {
        "torch x[mask] = rows": _boolean_assign,
        "torch masked_scatter": _masked_scatter,
        "torch index_copy": _index_copy,
    },
}
