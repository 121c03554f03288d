"""Modules built on the operators."""

from __future__ import annotations

from .relative_bias import T5RelativeBias, t5_relative_buckets
from .rotary import RotaryEmbedding

__all__ = ["RotaryEmbedding", "T5RelativeBias", "t5_relative_buckets"]
