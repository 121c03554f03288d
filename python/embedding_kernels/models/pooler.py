"""From packed token embeddings to vectors or codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.hamming import pack_bits
from ..ops.pooling import segment_pool, segment_pool_pack_bits
from .directory import LATENT_ATTENTION, POOLING_MODES, DirectorySpec
from .heads import Dense


@dataclass(frozen=True)
class Recipe:
    """What a vector shall be: its dimensions, of length 1 or not, as float32 or as bits, read after which layer."""

    dim: int
    normalize: bool
    bits: bool
    #: None for the model's output
    layer: int | None = None

    @property
    def width(self) -> int:
        """Elements of a row."""
        return (self.dim + 7) // 8 if self.bits else self.dim

    @property
    def dtype(self) -> torch.dtype:
        """uint8 for bits, else float32."""
        return torch.uint8 if self.bits else torch.float32


class Pooler(nn.Module):
    """Pooling, the heads after it, truncation, normalisation, bits: in this order."""

    def __init__(self, spec: DirectorySpec) -> None:
        super().__init__()
        latent = spec.pooling == (LATENT_ATTENTION,)
        if latent and spec.latent_attention is None:
            raise ValueError("Embedder: pooling must be one whose weights the directory holds, got 'latent_attention'")
        self.latent_attention = spec.latent_attention if latent else None
        self.modes = () if latent else tuple(POOLING_MODES[mode] for mode in spec.pooling)
        self.heads = nn.Sequential(*spec.heads)

    def dimension(self, hidden_size: int) -> int:
        """Dimensions of a vector before truncation."""
        dim = hidden_size if self.latent_attention is not None else hidden_size * len(self.modes)
        for head in self.heads:
            dim = head.out_features if isinstance(head, Dense) else dim
        return dim

    def rows_needed(self, lengths: np.ndarray) -> np.ndarray | None:
        """Rows of packed texts of ``lengths`` that pooling reads, one for each text that has tokens.

        None where it reads every row.
        """
        if self.modes not in (("first",), ("last",)):
            return None
        ends = np.cumsum(lengths)
        rows = ends - 1 if self.modes == ("last",) else ends - lengths
        return rows[lengths > 0]

    def forward(self, hidden: Tensor, lengths: np.ndarray, skip: np.ndarray | None, recipe: Recipe) -> Tensor:
        """Pool ``hidden [T, H]``, texts of ``lengths [S]`` less the first ``skip [S]`` tokens of each.

        Returns ``[S, recipe.width]``; a text without tokens gives zeros.
        """
        has_tokens = lengths > 0
        if skip is not None:
            places = np.concatenate([np.arange(length) for length in lengths])
            kept = torch.from_numpy((places >= np.repeat(skip, lengths)).nonzero()[0])
            hidden = hidden[kept.to(hidden.device)]
            lengths = np.maximum(lengths - skip, 0)
        cu_seqlens = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(hidden.device)
        if len(self.modes) == 1 and not len(self.heads):
            return self._pool_at_once(hidden, cu_seqlens, lengths, skip, recipe)
        vectors = self.heads(self._pooled(hidden, cu_seqlens, lengths, skip))[:, : recipe.dim]
        if not has_tokens.all():  # a head's bias is no vector of a text
            vectors = vectors * torch.from_numpy(has_tokens).to(vectors.device)[:, None]
        if recipe.bits:
            return pack_bits(vectors)
        return nn.functional.normalize(vectors, dim=-1) if recipe.normalize else vectors

    def _pooled(self, hidden: Tensor, cu_seqlens: Tensor, lengths: np.ndarray, skip: np.ndarray | None) -> Tensor:
        """What the modes give, side by side, float32; or the latent-attention head, which ends in its own mean."""
        if self.latent_attention is not None:
            return self.latent_attention(hidden, cu_seqlens, normalize=False)
        pooled = [
            segment_pool(
                hidden, cu_seqlens, mode, weights=_weights(mode, lengths, skip, hidden.device), out_dtype=torch.float32
            )
            for mode in self.modes
        ]
        return torch.cat(pooled, dim=1)

    def _pool_at_once(
        self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray, skip: np.ndarray | None, recipe: Recipe
    ) -> Tensor:
        mode = self.modes[0]
        weights = _weights(mode, lengths, skip, tokens.device)
        if recipe.bits:  # signs do not change when a vector is normalised
            return segment_pool_pack_bits(tokens, cu_seqlens, mode, weights=weights, truncate_dim=recipe.dim)
        return segment_pool(
            tokens,
            cu_seqlens,
            mode,
            weights=weights,
            normalize=recipe.normalize,
            truncate_dim=recipe.dim,
            out_dtype=torch.float32,
        )


def _weights(mode: str, lengths: np.ndarray, skip: np.ndarray | None, device: torch.device) -> Tensor | None:
    if mode != "weighted_mean" or skip is None:
        return None
    # tokens keep the weight of their place in the whole text when the prompt before them is left out
    places = np.concatenate([np.arange(first, first + length) for first, length in zip(skip + 1, lengths, strict=True)])
    return torch.from_numpy(places.astype(np.float32)).to(device)
