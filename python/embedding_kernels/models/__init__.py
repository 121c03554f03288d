"""Whole embedders and rerankers: a transformers model and its tokenizer behind the signatures of sentence-transformers;
and binary paragraph vectors, which learn from texts alone."""

from .embedder import Embedder as Embedder
from .multi_view import MultiViewModel as MultiViewModel
from .multi_view_reranker import MultiViewReranker as MultiViewReranker
from .paragraph_vector import BinaryParagraphVector as BinaryParagraphVector
from .token_prepending import TokenPrependingEmbedder as TokenPrependingEmbedder

__all__ = ["BinaryParagraphVector", "Embedder", "MultiViewModel", "MultiViewReranker", "TokenPrependingEmbedder"]
