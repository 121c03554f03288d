"""Which packed forward a transformers model takes: blocks of our own, its own with our attention, or none."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .bert import BertBackbone, supports

logger = logging.getLogger(__name__)

__all__ = ["Backbone", "BertBackbone", "PluggedBackbone", "packed_backbone"]


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
    ) -> Tensor:
        """Last hidden states ``[T, H]`` of the sequences that ``cu_seqlens`` (int32 ``[S + 1]``) bounds."""
        ...

    def forget(self) -> None:
        """Drop what was derived from the weights; it is made again when needed."""
        ...


class PluggedBackbone:
    """The model's own forward, its attention replaced by `plug_attention`.

    Args:
        model: a transformers model; the plug changes its attention implementation for good.

    Raises:
        ValueError, NotImplementedError, RuntimeError: the plug refuses the model, now or in a first forward of three
            tokens. The model then has its own attention back.
    """

    road = "transformers' own blocks, packed, with our attention"
    trims = False

    def __init__(self, model: Any) -> None:
        from ...integrations.transformers import plug_attention, unplug_attention

        self.model = plug_attention(model)
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
    ) -> Tensor:
        from ...integrations.transformers import packed_forward

        if last_rows is not None:
            raise ValueError("PluggedBackbone: last_rows must be None, got a pair of tensors")
        inputs: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return packed_forward(self.model, input_ids, cu_seqlens, max_seqlen, position_ids=position_ids, **inputs)

    def forget(self) -> None:
        """Nothing is derived."""

    def _try(self) -> None:
        """Two short texts: much of what the plug refuses shows only in a forward."""
        with torch.inference_mode():
            ids = torch.arange(3, device=self.model.device)
            self(ids, torch.tensor([0, 1, 3], dtype=torch.int32, device=ids.device), 2)


def packed_backbone(model: nn.Module) -> Backbone | None:
    """The fastest packed forward of ``model``: our own blocks, else the plug, else None (transformers, padded).

    The choice is by exact class, config and parts; the weights stay the model's in all cases.
    """
    if supports(model):
        return BertBackbone(model)
    try:
        return PluggedBackbone(model)
    except (ValueError, NotImplementedError, RuntimeError) as refusal:
        logger.info("%s runs padded on transformers' own forward: %s", type(model).__name__, refusal)
        return None
