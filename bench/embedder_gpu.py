"""Whole embedders at sizes of a GPU: MiniLM's shape over a shelf of passages, and layers of Mistral-7B's shape.

Weights are random and words made up (`made_up`): nothing has to be installed or fetched but the peers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import ceilings, made_up
from .harness import OURS, Case, Contender, Room, Work

LONGEST = 512
_CHECKED = 48  # texts whose vectors are held against float32's
_COPIES = 3  # every call encodes other texts
_BATCHES = (32, 128)


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes, and how many texts of how many words on average."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    texts: int
    mean: int = 80

    def small(self) -> Shape:
        return replace(
            self, name=f"{self.name} made small", width=64, inner=96, layers=2, heads=4,
            key_value_heads=min(self.key_value_heads, 2), vocabulary=600, texts=40, mean=20,
        )  # fmt: skip


MINILM = Shape("MiniLM's shape", 384, 1536, 6, 12, 12, 30522, 4096)
#: eight layers: the whole would take a second a call and say the same of each layer
MISTRAL = Shape("8 of Mistral-7B's 32 layers", 4096, 14336, 8, 32, 8, 32000, 256)


def texts_of(shape: Shape) -> list[list[str]]:
    """Of each turn; special tokens fit in."""
    words = made_up.lengths(shape.texts * _COPIES, shape.mean, LONGEST - 2)
    every = made_up.texts(words, shape.vocabulary)
    return [every[turn * shape.texts : (turn + 1) * shape.texts] for turn in range(_COPIES)]


def over(encode: Callable[[list[str]], Any], parts: list[list[str]]) -> Callable[[int], np.ndarray]:
    return lambda turn: np.asarray(encode(parts[turn % len(parts)]), dtype=np.float32)


def work_of(model: Any, tokenizer: Any, texts: list[str], dtype: torch.dtype) -> Work:
    """A multiplication and an addition for each token and weight of the layers; attention, little here, aside."""
    tokens = sum(len(ids) for ids in tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"])
    layers = model.encoder if hasattr(model, "encoder") else model.layers
    weights = sum(parameter.numel() for parameter in layers.parameters())
    return Work(weights * dtype.itemsize, 2 * tokens * weights, _unit(dtype))


def _unit(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} operations"


# ---- MiniLM's shape, beside sentence-transformers ----


def _saved(shape: Shape, folder: Path) -> None:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.inner, max_position_embeddings=LONGEST,
    )  # fmt: skip
    made_up.model(config, torch.float32, torch.device("cpu")).save_pretrained(folder)
    made_up.tokenizer(shape.vocabulary, "[CLS] $A [SEP]").save_pretrained(folder)


def _sentence_transformer(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    options = {"model_kwargs": {"dtype": dtype, "attn_implementation": "sdpa"}}
    transformer = Transformer(folder, max_seq_length=LONGEST, **options)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=str(device))


def _build_encoder(shape: Shape, dtype: torch.dtype, room: Room) -> list[Contender]:
    from embedding_kernels.models import Embedder

    parts = texts_of(shape)
    with tempfile.TemporaryDirectory() as folder:
        _saved(shape, Path(folder))
        ours = Embedder.from_pretrained(
            folder, device=room.device, dtype=dtype, pooling="mean", normalize=True, max_seq_length=LONGEST
        )
        theirs = _sentence_transformer(folder, dtype, room.device)
        exact = _sentence_transformer(folder, torch.float32, room.device)
    checked = exact.encode(parts[0][:_CHECKED], show_progress_bar=False)
    verify = made_up.near(checked, shape.texts, dtype)
    work = work_of(ours.model, ours.tokenizer, parts[0], dtype)
    run = over(partial(ours.encode, show_progress_bar=False), parts)
    contenders = [Contender(OURS, run, verify, role="ours", work=work)]
    for size in _BATCHES:
        encode = partial(theirs.encode, batch_size=size, show_progress_bar=False)
        contenders.append(Contender(_by_batch("sentence-transformers", size), over(encode, parts), verify, work=work))
    return [*contenders, ceilings.matmul(room, dtype)]


def _by_batch(name: str, size: int) -> str:
    return f"{name}, sdpa, batch {size}"


# ---- Mistral's shape, beside transformers ----


@cache
def decoder(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, intermediate_size=shape.inner,
        sliding_window=None,
    )  # fmt: skip
    return made_up.model(config, dtype, device), made_up.tokenizer(shape.vocabulary, "[CLS] $A [SEP]")


def plain_spec() -> Any:
    """A decoder embedder as most are: the last token, of length 1."""
    from embedding_kernels.models.directory import DirectorySpec

    return DirectorySpec(Path("made-up"), ("lasttoken",), normalize=True, max_seq_length=LONGEST)


def _padded(model: Any, tokenizer: Any, texts: list[str], size: int) -> np.ndarray:
    """As sentence-transformers batches: the longest first, each batch padded to its longest."""
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    vectors = torch.empty(len(texts), model.config.hidden_size)
    with torch.inference_mode():
        for first in range(0, len(order), size):
            places = order[first : first + size]
            inputs = tokenizer(
                [texts[place] for place in places], padding=True, truncation=True, max_length=LONGEST,
                return_tensors="pt", return_token_type_ids=False,
            ).to(model.device)  # fmt: skip
            states = model(**inputs, use_cache=False).last_hidden_state
            last = states[torch.arange(len(places), device=states.device), inputs["attention_mask"].sum(1) - 1]
            vectors[places] = torch.nn.functional.normalize(last.float(), dim=-1).cpu()
    return vectors.numpy()


def _build_decoder(shape: Shape, dtype: torch.dtype, room: Room) -> list[Contender]:
    from embedding_kernels.models import Embedder

    parts = texts_of(shape)
    model, tokenizer = decoder(shape, dtype, room.device)
    exact = _padded(made_up.in_float32(model), tokenizer, parts[0][:_CHECKED], 1)
    verify = made_up.near(exact, shape.texts, dtype)
    work = work_of(model, tokenizer, parts[0], dtype)
    run = over(partial(Embedder(model, tokenizer, plain_spec()).encode, show_progress_bar=False), parts)
    contenders = [Contender(OURS, run, verify, role="ours", work=work)]
    for size in _BATCHES:
        encode = over(partial(_padded, model, tokenizer, size=size), parts)
        contenders.append(Contender(_by_batch("transformers", size), encode, verify, work=work))
    return [*contenders, ceilings.matmul(room, dtype)]


# ---- cases ----


def _made(shape: Shape, dtype: torch.dtype, build: Callable[..., list[Contender]], peer: str) -> Case:
    kind = str(dtype).removeprefix("torch.")
    return Case(
        "embedder",
        f"{shape.name}, {shape.texts} texts of {shape.mean} words on average {kind}",
        {"texts": shape.texts, "words": shape.mean, "dtype": kind, "layers": shape.layers, "width": shape.width},
        tuple(_by_batch(peer, size) for size in _BATCHES),
        partial(build, shape, dtype),
        Work(0, 0, _unit(dtype)),
    )


def _case(shape: Shape, build: Callable[..., list[Contender]], peer: str) -> Case:
    small = _made(shape.small(), torch.float32, build, peer)
    return replace(_made(shape, torch.bfloat16, build, peer), where="cuda", small=small, patience=3.0)


CASES = [
    _case(MINILM, _build_encoder, "sentence-transformers"),
    _case(MISTRAL, _build_decoder, "transformers"),
]
