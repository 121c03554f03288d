"""A module of sentence-transformers: NV-Embed's latent-attention pooling in the place of `Pooling`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers.base.modules import Module
from torch import Tensor

from .. import nn as kernels_nn
from ..ops.pooling import cu_seqlens_from_mask, pack_padded


@dataclass(frozen=True)
class _Fold:
    """A folded head, and the state of the parameters that it was made from."""

    state: tuple[Any, ...]
    #: kept, so that no other parameters can come to lie at the addresses in ``state``
    sources: list[Tensor]
    head: kernels_nn.FoldedLatentAttentionPooling


class LatentAttentionPooling(Module):
    """`embedding_kernels.nn.LatentAttentionPooling` between a Transformer and, mostly, a Normalize module.

    ``SentenceTransformer(modules=[Transformer(...), LatentAttentionPooling(width), Normalize()])``. Trains with
    gradients to every parameter; where none is recorded it runs folded, and folds again after a parameter changed.
    sentence-transformers loads modules of other packages only with ``trust_remote_code=True``; `Embedder` reads the
    same directory without.

    Args:
        width, latents, heads, head_dim, multiplier: sizes, as in `embedding_kernels.nn.LatentAttentionPooling`.
        include_prompt: whether the tokens of a prompt are pooled.
    """

    config_keys = ["width", "latents", "heads", "head_dim", "multiplier", "include_prompt"]  # noqa: RUF012

    def __init__(
        self,
        width: int = 4096,
        latents: int = 512,
        heads: int = 8,
        head_dim: int = 4096,
        multiplier: int = 4,
        include_prompt: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.latents, self.heads, self.head_dim = width, latents, heads, head_dim
        self.multiplier, self.include_prompt = multiplier, include_prompt
        self.head = kernels_nn.LatentAttentionPooling(width, latents, heads, head_dim, multiplier=multiplier)
        self._folded: _Fold | None = None

    def forward(self, features: dict[str, Tensor | Any], **kwargs: Any) -> dict[str, Tensor | Any]:
        """Adds ``sentence_embedding [B, width]`` to the features, in the dtype of the token embeddings."""
        tokens = features["token_embeddings"]
        if "cu_seq_lens_q" in features:
            hidden, cu_seqlens = tokens.flatten(0, 1), features["cu_seq_lens_q"].to(torch.int32)
        else:
            mask = features.get("attention_mask")
            mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device) if mask is None else mask
            cu_seqlens, _, total = cu_seqlens_from_mask(mask)
            hidden = pack_padded(tokens, mask, total)
        if not self.include_prompt and "prompt_length" in features:
            # one number, or a tensor of equal ones while training
            length = int(torch.as_tensor(features["prompt_length"]).max())
            hidden, cu_seqlens = _without_prompt(hidden, cu_seqlens, length)
        head = self.head if torch.is_grad_enabled() else self._fold()
        pooled = head(hidden.to(self.head.latents.dtype), cu_seqlens, normalize=False)
        features["sentence_embedding"] = pooled.to(tokens.dtype)
        return features

    def get_embedding_dimension(self) -> int:
        """Dimensions of a vector."""
        return self.width

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """config.json, and model.safetensors, whose tensors have NV-Embed's names."""
        self.save_config(output_path)
        weights = {name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(weights, Path(output_path) / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **options: Any) -> LatentAttentionPooling:
        """As every module of sentence-transformers is loaded: from a directory or the Hub."""
        module = super().load(model_name_or_path, *args, **options)
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where: Any = {name: options[name] for name in names if name in options}
        module.head.load_state_dict(cls.load_torch_weights(model_name_or_path, *args, **where))
        return module

    def _fold(self) -> kernels_nn.FoldedLatentAttentionPooling:
        parameters = [parameter.detach() for parameter in self.head.parameters()]
        state = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)
        if self._folded is None or self._folded.state != state:
            self._folded = _Fold(state, parameters, self.head.fold())
        return self._folded.head


def _without_prompt(hidden: Tensor, cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Packed rows less the first ``length`` of each sequence, and their offsets."""
    lengths = cu_seqlens.diff()
    starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=hidden.shape[0])
    kept = torch.arange(hidden.shape[0], device=hidden.device) - starts >= length
    left = (lengths - length).clamp_min(0).cumsum(0, dtype=torch.int32)
    return hidden[kept], torch.nn.functional.pad(left, (1, 0))
