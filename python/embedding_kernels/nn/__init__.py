"""Modules built on the operators."""

from __future__ import annotations

from .latent_attention import FoldedLatentAttentionPooling, LatentAttentionPooling
from .relative_bias import T5RelativeBias, t5_relative_buckets
from .rotary import RotaryEmbedding

__all__ = [
    "FoldedLatentAttentionPooling",
    "LatentAttentionPooling",
    "RotaryEmbedding",
    "T5RelativeBias",
    "t5_relative_buckets",
]
