"""The measuring room: every public operator against its peers, in one protocol.

`BENCHMARKS` maps each operator to its cases; importing it measures nothing. ``python bench/run.py`` measures.
"""

from __future__ import annotations

from . import (
    anchor_scores,
    attention,
    embedder,
    hamming,
    hamming_large,
    latent_attention,
    latent_attention_head,
    multi_view,
    norm,
    paragraph_vector,
    pooling,
    token_prepend,
    token_prepending,
)
from .harness import Case

OPERATORS: dict[str, dict[str, list[Case]]] = {
    "anchor_scores": anchor_scores.BENCHMARKS,
    "attention": attention.BENCHMARKS,
    "hamming": hamming.BENCHMARKS,
    "latent_attention": latent_attention.BENCHMARKS,
    "norm": {**norm.BENCHMARKS, **token_prepend.BENCHMARKS},
    "paragraph_vector": paragraph_vector.BENCHMARKS,
    "pooling": pooling.BENCHMARKS,
}
BENCHMARKS: dict[str, list[Case]] = {op: cases for family in OPERATORS.values() for op, cases in family.items()}
#: and a whole head and whole embedders, which are no operators
DEFAULT: dict[str, dict[str, list[Case]]] = {
    **OPERATORS,
    "latent_attention_head": latent_attention_head.BENCHMARKS,
    "multi_view": multi_view.BENCHMARKS,
    "embedder": embedder.BENCHMARKS,
    "token_prepending": token_prepending.BENCHMARKS,
}
#: and what takes too long for every run
FAMILIES: dict[str, dict[str, list[Case]]] = {**DEFAULT, "hamming_large": hamming_large.BENCHMARKS}
