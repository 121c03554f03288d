"""Modules built on the operators, and losses."""

from __future__ import annotations

from .latent_attention import FoldedLatentAttentionPooling, LatentAttentionPooling
from .ranking_losses import listnet, listnet_double, orthogonality, rank_targets
from .relative_bias import T5RelativeBias, t5_relative_buckets
from .rotary import RotaryEmbedding

__all__ = [
    "FoldedLatentAttentionPooling",
    "LatentAttentionPooling",
    "RotaryEmbedding",
    "T5RelativeBias",
    "listnet",
    "listnet_double",
    "orthogonality",
    "rank_targets",
    "t5_relative_buckets",
]
