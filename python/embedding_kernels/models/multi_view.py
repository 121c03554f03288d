"""The model of a multi-view reranker: T5's encoder at its floor, its decoder folded, and their weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import whole_directory
from ..ops.anchor_scores import anchor_scores
from .backbones import T5Backbone
from .backbones.t5 import stack_is_plain
from .backbones.t5_anchors import AnchorDecoder
from .loading import load_weights

#: views of the released checkpoints, whose config does not tell
PUBLISHED_VIEWS = 4
#: how the published code names the number of views
_VIEWS_KEY = "n_special_tokens"
# the published code wraps the encoder, and each of its blocks
_FROM_PUBLISHED = {
    r"^encoder\.encoder\.block\.(\d+)\.module\.": r"encoder.block.\1.",
    r"^encoder\.encoder\.": "encoder.",
}


@dataclass(frozen=True)
class MultiViewOutput:
    """What a `MultiViewModel` gives.

    Attributes:
        scores: float32 ``[P]``, one a passage; only their order within a query means anything.
        anchors: ``[Q, m, D]``.
        views: ``[P, m, D]``.
    """

    scores: Tensor
    anchors: Tensor
    views: Tensor


class MultiViewModel(nn.Module):
    """A T5 that scores the passages of a query together, in one encoder pass and one decoder step.

    Each passage is encoded with its query behind m sentinel tokens, whose hidden states are its views. For each view
    the decoder makes, from its start token, an anchor that attends to that view of all the query's passages; a passage
    scores the mean of anchor · view ("Multi-view-guided Passage Reranking with Large Language Models", arXiv
    2509.07485, 2025). Over packed tokens, without padding; see `T5Backbone` and `AnchorDecoder` for what is fused,
    trimmed and folded. Differentiable. Without dropout: in training mode the model's ``dropout_rate`` must be 0.

    Args:
        t5: a transformers `T5Model`; its weights are used as they stand.
        views: m, the sentinel tokens with which every input begins.

    Attributes:
        t5: the transformers model, whose parameters these are.
        views: m.

    Raises:
        ValueError: ``t5`` is no plain T5, or has adapters, hooks or quantised layers.
    """

    def __init__(self, t5: Any, views: int = PUBLISHED_VIEWS) -> None:
        super().__init__()
        if type(t5).__name__ != "T5Model" or not (stack_is_plain(t5.encoder) and stack_is_plain(t5.decoder)):
            raise ValueError(
                "MultiViewModel: t5 must be a transformers T5Model without adapters, hooks or quantised layers, got "
                f"{type(t5).__name__}"
            )
        if views < 1:
            raise ValueError(f"MultiViewModel: views must be at least 1, got {views}")
        self.t5, self.views = t5, views
        self._encoder = T5Backbone(t5.encoder)
        self._decoder = AnchorDecoder(t5.decoder, t5.shared, t5.config.pad_token_id)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, cu_passages: Tensor) -> MultiViewOutput:
        """Scores of packed inputs.

        Args:
            input_ids: int64 ``[T]``, the tokens of all passages with their queries.
            cu_seqlens: int32 ``[P + 1]``, from 0, never falling, to T; every input has m tokens or more.
            max_seqlen: at least the longest input.
            cu_passages: int32 ``[Q + 1]``, from 0, never falling, to P: the passages of each query.
        """
        views = self.encode(input_ids, cu_seqlens, max_seqlen)
        anchors = self.anchors(views, cu_passages)
        return MultiViewOutput(anchor_scores(views, anchors, cu_passages), anchors, views)

    def encode(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The views ``[P, m, D]`` of packed inputs, which do not depend on each other; arguments as in `forward`."""
        firsts = torch.arange(self.views, device=cu_seqlens.device)
        rows = (cu_seqlens[:-1, None].long() + firsts).flatten()
        offsets = torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device) * self.views
        hidden = self._encoder(input_ids, cu_seqlens, max_seqlen, last_rows=(rows, offsets))
        return hidden.unflatten(0, (-1, self.views))

    def anchors(self, views: Tensor, cu_passages: Tensor) -> Tensor:
        """The anchors ``[Q, m, D]`` of queries whose passages have ``views [P, m, D]``."""
        return self._decoder(views, cu_passages)

    def forget(self) -> None:
        """Drop what was derived from the weights; it is made again when needed."""
        self._encoder.forget()
        self._decoder.forget()


def load_multi_view(path: Path, config: Any, device: torch.device, dtype: torch.dtype | None, views: int | None) -> Any:
    """The model of a directory of the published layout, or of a plain T5's.

    Raises:
        ValueError: the config is not T5's, or the weights are unreadable or incomplete.
    """
    import transformers

    if config.model_type != "t5":
        raise ValueError(f"{path}: model type must be 't5', got {config.model_type!r}")
    t5 = load_weights(transformers.T5Model, path, config, device, dtype, key_mapping=dict(_FROM_PUBLISHED))
    kept = getattr(config, _VIEWS_KEY, None) or PUBLISHED_VIEWS
    return MultiViewModel(t5, kept if views is None else views).eval()


def save_multi_view(model: MultiViewModel, tokenizer: Any, path: str | Path) -> None:
    """Write a directory of the published layout, whole or not at all.

    Raises:
        FileExistsError: ``path`` exists and is not an empty directory.
    """
    with whole_directory(Path(path)) as directory:
        write_multi_view(model, tokenizer, directory)


def write_multi_view(model: MultiViewModel, tokenizer: Any, directory: Path) -> None:
    """Write the files of the published layout into a directory that is there, over those of the same names."""
    from safetensors.torch import save_file

    config = {**model.t5.config.to_dict(), "architectures": ["MVP"], _VIEWS_KEY: model.views}
    # the embeddings of encoder and decoder are the shared ones
    weights = {
        _published_name(name): weight.detach().contiguous()
        for name, weight in model.t5.state_dict().items()
        if not name.endswith("embed_tokens.weight")
    }
    save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(directory)


def _published_name(name: str) -> str:
    if name.startswith("encoder.block."):
        _, _, place, rest = name.split(".", 3)
        return f"encoder.encoder.block.{place}.module.{rest}"
    return f"encoder.{name}" if name.startswith("encoder.") else name
