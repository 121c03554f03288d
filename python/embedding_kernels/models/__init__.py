"""Whole embedders: a transformers model, its tokenizer and pooling, behind the signatures of sentence-transformers; and
binary paragraph vectors, which learn from texts alone."""

from .embedder import Embedder as Embedder
from .paragraph_vector import BinaryParagraphVector as BinaryParagraphVector
from .token_prepending import TokenPrependingEmbedder as TokenPrependingEmbedder

__all__ = ["BinaryParagraphVector", "Embedder", "TokenPrependingEmbedder"]
