"""Which packed forward a transformers model takes: blocks of our own, its own with our attention, or none."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import bert, decoder, t5
from .bert import BertBackbone
from .block_hooks import hidden_after, layer_count, rows_changed
from .decoder import DecoderBackbone, Prefix, Prepend
from .t5 import T5Backbone

logger = logging.getLogger(__name__)

__all__ = [
    "Backbone",
    "BertBackbone",
    "DecoderBackbone",
    "PluggedBackbone",
    "Prefix",
    "Prepend",
    "T5Backbone",
    "hidden_after",
    "layer_count",
    "packed_backbone",
    "padding_only_mask",
    "rows_changed",
]


class Backbone(Protocol):
    """A forward over packed tokens."""

    #: what `Embedder.__repr__` says of it
    road: str
    #: whether ``last_rows`` saves work; where false it must be None
    trims: bool

    def __call__(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        last_rows: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """Hidden states ``[T, H]`` of the sequences that ``cu_seqlens`` (int32 ``[S + 1]``) bounds.

        Of the last layer, or of ``layer``, 0 to N; what comes after it does not run.
        """
        ...

    def forget(self) -> None:
        """Drop what was derived from the weights; it is made again when needed."""
        ...


class PluggedBackbone:
    """The model's own forward, its attention replaced by `plug_attention`.

    Args:
        model: a transformers model; the plug changes its attention implementation for good.
        bidirectional: True lets every token see every token of its text, without sliding windows; else the model
            keeps its own direction and windows.

    Raises:
        ValueError, NotImplementedError, RuntimeError: the plug refuses the model, now or in a first forward of three
            tokens. The model then has its own attention back.
    """

    road = "transformers' own blocks, packed, with our attention"
    trims = False

    def __init__(self, model: Any, bidirectional: bool | None = None) -> None:
        from ...integrations.transformers import plug_attention, unplug_attention

        self.model = plug_attention(model)
        self.bidirectional = bool(bidirectional)
        try:
            self._try()
        except Exception:
            unplug_attention(model)
            raise

    def __call__(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        last_rows: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
    ) -> Tensor:
        from ...integrations.transformers import packed_forward

        if last_rows is not None:
            raise ValueError("PluggedBackbone: last_rows must be None, got a pair of tensors")
        inputs: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}

        def forward() -> Tensor:
            return packed_forward(
                self.model,
                input_ids,
                cu_seqlens,
                max_seqlen,
                position_ids=position_ids,
                bidirectional=self.bidirectional,
                **inputs,
            )

        if layer is None:
            return forward()
        count = layer_count(self.model)
        if not 0 <= layer <= count:
            raise ValueError(f"PluggedBackbone: layer must be from 0 to {count}, got {layer}")
        # the last layer's output is the model's, after its last norm
        return forward() if layer == count else hidden_after(self.model, layer, forward)[0]

    def forget(self) -> None:
        """Nothing is derived."""

    def _try(self) -> None:
        """Two short texts: much of what the plug refuses shows only in a forward."""
        with torch.inference_mode():
            ids = torch.arange(3, device=self.model.device)
            self(ids, torch.tensor([0, 1, 3], dtype=torch.int32, device=ids.device), 2)


def packed_backbone(model: nn.Module, bidirectional: bool | None = None) -> Backbone | None:
    """The fastest packed forward of ``model``: our own blocks, else the plug, else None (transformers, padded).

    The choice is by exact class, config and parts; the weights stay the model's in all cases.

    Args:
        model: a transformers model in evaluation mode.
        bidirectional: True lets every token see every token of its text, whatever direction and sliding windows the
            model has; else it keeps its own. Where None is returned, `padding_only_mask` does the same for padded
            batches.
    """
    if bert.supports(model):  # these see everything by themselves
        return BertBackbone(model)
    if t5.supports(model):
        return T5Backbone(model)
    if decoder.supports(model):
        return DecoderBackbone(model, bool(bidirectional))
    try:
        return PluggedBackbone(model, bidirectional)
    except (ValueError, NotImplementedError, RuntimeError) as refusal:
        logger.info("%s runs padded on transformers' own forward: %s", type(model).__name__, refusal)
        return None


def padding_only_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The ``attention_mask`` with which every token of a transformers model sees every token of its text.

    transformers hands a mask of four dimensions to each layer as it is, whatever mask the layer would get else, so
    neither the model's causal mask nor its sliding windows count. For eager and sdpa attention.

    Args:
        mask: bool ``[B, S]``, False at padding.
        dtype: that of the model.

    Returns:
        ``[B, 1, S, S]``, 0 or the least finite value of ``dtype``, so that a text of padding alone gives no NaN; a
        view of ``[B, 1, 1, S]``.
    """
    batch, length = mask.shape
    added = torch.zeros(batch, 1, 1, length, dtype=dtype, device=mask.device)
    added.masked_fill_(~mask.bool()[:, None, None], torch.finfo(dtype).min)
    return added.expand(batch, 1, length, length)
