"""Token prepending on SmolLM2-135M: what the copies cost, and what exit, trimmed layer and shared prompt save.

Read after layer 25 of 30, prompt and texts fixed. The published way is transformers' own: padded, all layers, all
hidden states kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedding_kernels.demo_data import SMOLLM2_PACKAGE, smollm2_directory

from . import ceilings, token_prepending_gpu
from .embedder import definitions
from .harness import OURS, Case, Contender, Room, Work
from .token_prepending_gpu import NOT_COPIED

UNTRIMMED = "PromptEOL, our blocks, nothing trimmed"
PUBLISHED = "published way: padded, all layers, all states"
_PEERS = (NOT_COPIED, UNTRIMMED, PUBLISHED)
_EXIT, _COPIES = 25, 4


@cache
def _embedder(dtype: torch.dtype, device: torch.device, **options: Any) -> Any:
    from embedding_kernels.models import TokenPrependingEmbedder

    return TokenPrependingEmbedder.from_pretrained(
        smollm2_directory(), preset="smollm2-135m", dtype=dtype, device=device, **options
    )


def _calls(encode: Callable[[list[str]], Any], texts: list[str], count: int) -> Callable[[int], np.ndarray]:
    parts = [texts[i * count : (i + 1) * count] for i in range(_COPIES)]
    return lambda turn: np.asarray(encode(parts[turn % _COPIES]), dtype=np.float32)


# ---- peers ----


@cache
def _whole_model(dtype: torch.dtype, device: torch.device, ours: bool) -> tuple[Any, Any]:
    """SmolLM2 with all its layers and its tokenizer: plain, or the blocks of ours that run it."""
    from transformers import AutoModel, AutoTokenizer

    from embedding_kernels.models.backbones import DecoderBackbone

    model = AutoModel.from_pretrained(smollm2_directory(), dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory())
    return (DecoderBackbone(model) if ours else model), tokenizer


def _prompts(texts: list[str], placeholder: str) -> list[str]:
    from embedding_kernels.models.sentence_prompts import PROMPTS, published_form

    (template,) = PROMPTS["prompt_eol"]
    template = template.replace("<PST> ", placeholder)
    return [template.replace("{S}", published_form(text)) for text in texts]


def _untrimmed(texts: list[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All thirty layers over all tokens of the plain prompt, packed; the last token of each text."""
    backbone, tokenizer = _whole_model(dtype, device, True)
    ids = tokenizer(_prompts(texts, ""))["input_ids"]
    cu_seqlens = torch.tensor([0, *np.cumsum([len(each) for each in ids])], dtype=torch.int32, device=device)
    flat = torch.tensor([token for each in ids for token in each], device=device)
    with torch.inference_mode():
        hidden = backbone(flat, cu_seqlens, max(len(each) for each in ids))
    return hidden[cu_seqlens[1:].long() - 1].float()


def _one_by_one(texts: list[str], device: torch.device) -> Tensor:
    """What `_untrimmed` has to give: transformers' float32 states, text by text."""
    model, tokenizer = _whole_model(torch.float32, device, False)
    with torch.inference_mode():
        each = [torch.tensor([ids], device=device) for ids in tokenizer(_prompts(texts, ""))["input_ids"]]
        return torch.stack([model(ids).last_hidden_state[0, -1] for ids in each])


def _published(texts: list[str], dtype: torch.dtype, device: torch.device, copied: bool = True) -> Tensor:
    """Left padding, a random placeholder, and before each of the first layers a write into all rows of the batch."""
    from embedding_kernels.models.sentence_prompts import PLACEHOLDER

    model, tokenizer = _whole_model(dtype, device, False)
    ours = _embedder(dtype, device)
    head = ours._templates[0].head
    tails = tokenizer([text.partition(PLACEHOLDER)[2] for text in _prompts(texts, PLACEHOLDER + " ")])["input_ids"]
    rows = [[*head, 0, *tail] for tail in tails]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    places = torch.tensor([longest - len(row) + len(head) for row in rows], device=device)
    texts_of_batch = torch.arange(len(rows), device=device)

    def overwrite(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0].clone()
        hidden[texts_of_batch, places] = hidden[:, -1]
        return (hidden, *args[1:]), kwargs

    with torch.inference_mode():
        embeds = model.embed_tokens(ids)
        embeds[texts_of_batch, places] = ours._placeholder_like(embeds)
        blocks = model.layers[1:7] if copied else ()
        handles = [block.register_forward_pre_hook(overwrite, with_kwargs=True) for block in blocks]
        try:
            states = model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True).hidden_states
        finally:
            for handle in handles:
                handle.remove()
    return states[_EXIT][:, -1].float()


# ---- cases ----


def _verifier(states: Tensor, dtype: torch.dtype) -> Callable[[np.ndarray], None]:
    """Against float32 states by cosine: thirty layers of bfloat16 add up."""
    exact, allowed = states.double().cpu().numpy(), 1e-6 if dtype == torch.float32 else 0.05

    def verify(answer: np.ndarray) -> None:
        assert answer.shape == exact.shape, f"shape {answer.shape}, expected {exact.shape}"
        lengths = np.linalg.norm(answer.astype(float), axis=1) * np.linalg.norm(exact, axis=1)
        least = float(((answer * exact).sum(1) / lengths).min())
        assert least >= 1 - allowed, f"a vector has cosine {least:.7f} with the float32 one"

    return verify


def _build(count: int, dtype: torch.dtype, room: Room) -> list[Contender]:
    texts = definitions()[: count * _COPIES]
    ours = partial(_embedder(dtype, room.device).encode, show_progress_bar=False)
    plain = partial(_embedder(dtype, room.device, copy=False).encode, show_progress_bar=False)
    first, device = texts[:count], room.device
    verify = _verifier(_published(first, torch.float32, device), dtype)
    verify_plain = _verifier(_published(first, torch.float32, device, copied=False), dtype)
    verify_untrimmed = _verifier(_one_by_one(first, device), dtype)
    return [
        Contender(OURS, _calls(ours, texts, count), verify, role="ours"),
        Contender(NOT_COPIED, _calls(plain, texts, count), verify_plain),
        Contender(
            UNTRIMMED, _calls(lambda part: _untrimmed(part, dtype, device).cpu(), texts, count), verify_untrimmed
        ),
        Contender(PUBLISHED, _calls(lambda part: _published(part, dtype, device).cpu(), texts, count), verify),
        ceilings.matmul(room, dtype),
    ]


def _case(count: int, dtype: torch.dtype, quick: bool = False) -> Case:
    kind = str(dtype).removeprefix("torch.")
    return Case(
        "token_prepending",
        f"SmolLM2-135M, {count} definitions {kind}",
        {"texts": count, "dtype": kind, "exit_layer": _EXIT, "copied_before_layers": "2 to 7", "prompt": "prompt_eol"},
        _PEERS,
        partial(_build, count, dtype),
        Work(0, count, "texts"),
        {NOT_COPIED: 0.99, UNTRIMMED: 1.25, PUBLISHED: 2.5},
        quick=quick,
    )


BENCHMARKS: dict[str, list[Case]] = {
    "token_prepending": [
        *token_prepending_gpu.CASES,
        *([_case(64, torch.float32), _case(64, torch.bfloat16)] if find_spec(SMOLLM2_PACKAGE) else []),
    ]
}
