"""Whole embedders: a transformers model, its tokenizer and pooling, behind the signatures of sentence-transformers."""

from .embedder import Embedder as Embedder

__all__ = ["Embedder"]
