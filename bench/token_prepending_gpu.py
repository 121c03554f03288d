"""Token prepending at a size of a GPU: what its copies cost on layers of Mistral-7B's shape."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import embedding_kernels as ek

from . import ceilings, made_up
from .embedder_gpu import MISTRAL, Shape, decoder, over, plain_spec, texts_of, work_of
from .harness import OURS, Case, Contender, Room, Work

NOT_COPIED = "the same prompt with <PST>, not copied"
_CHECKED = 24


def _embedder(shape: Shape, model: Any, tokenizer: Any, **options: Any) -> Any:
    from embedding_kernels.models import TokenPrependingEmbedder

    return TokenPrependingEmbedder(model, tokenizer, plain_spec(), exit_layer=shape.layers, **options)


def _exact(shape: Shape, model: Any, tokenizer: Any, texts: list[str], copy: bool) -> np.ndarray:
    """By reference kernels in float32, the whole prompt in each text."""
    embedder = _embedder(shape, model, tokenizer, copy=copy, reuse_prefix=False)
    with ek.use_backend("reference"):
        return embedder.encode(texts, show_progress_bar=False)


def _build(shape: Shape, dtype: torch.dtype, room: Room) -> list[Contender]:
    parts = texts_of(shape)
    model, tokenizer = decoder(shape, dtype, room.device)
    exact = made_up.in_float32(model)
    work = work_of(model, tokenizer, parts[0], dtype)  # of the texts; the prompt is beside

    def contender(name: str, role: str, copy: bool) -> Contender:
        checked = _exact(shape, exact, tokenizer, parts[0][:_CHECKED], copy)
        encode = partial(_embedder(shape, model, tokenizer, copy=copy).encode, show_progress_bar=False)
        return Contender(name, over(encode, parts), made_up.near(checked, shape.texts, dtype), role=role, work=work)

    return [contender(OURS, "ours", True), contender(NOT_COPIED, "peer", False), ceilings.matmul(room, dtype)]


def _made(shape: Shape, dtype: torch.dtype) -> Case:
    kind = str(dtype).removeprefix("torch.")
    return Case(
        "token_prepending",
        f"{shape.name}, {shape.texts} texts of {shape.mean} words on average {kind}",
        {"texts": shape.texts, "words": shape.mean, "dtype": kind, "layers": shape.layers, "prompt": "prompt_eol"},
        (NOT_COPIED,),
        partial(_build, shape, dtype),
        Work(0, 0, f"{kind} operations"),
        {NOT_COPIED: 0.99},
    )


CASES = [
    replace(_made(MISTRAL, torch.bfloat16), where="cuda", small=_made(MISTRAL.small(), torch.float32), patience=2.0)
]
