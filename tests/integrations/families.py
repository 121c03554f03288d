"""Tiny random models of every family that the plug is tried on, and batches of texts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from embedding_kernels.integrations.transformers import packed_forward, plug_attention

VOCABULARY = 97
#: longest text far past WINDOW, one text of a single token
LENGTHS = (19, 7, 1, 13)
WINDOW = 5

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
_GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    config: str
    model: str
    options: dict[str, Any]
    #: values of is_causal to ask for; None is the model's own
    directions: tuple[bool | None, ...] = (None,)
    #: name of the config's window, for those that have one
    window: str | None = None
    #: step of that name's value which moves the window by one key
    step: int = 1


BOTH = (None, False)
FAMILIES = {
    "BERT": Family("BertConfig", "BertModel", _ENCODER),
    "RoBERTa": Family("RobertaConfig", "RobertaModel", {**_ENCODER, "pad_token_id": 1}),
    "XLM-RoBERTa": Family("XLMRobertaConfig", "XLMRobertaModel", {**_ENCODER, "pad_token_id": 1}),
    "DistilBERT": Family(
        "DistilBertConfig",
        "DistilBertModel",
        {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    ),
    "ALBERT": Family("AlbertConfig", "AlbertModel", {**_ENCODER, "embedding_size": 16}),
    "ModernBERT": Family(
        "ModernBertConfig",
        "ModernBertModel",
        {**_ENCODER, "num_hidden_layers": 3, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
        window="local_attention",
        step=2,
    ),
    "T5": Family("T5Config", "T5EncoderModel", _T5),
    "T5 (8 buckets)": Family(
        "T5Config",
        "T5EncoderModel",
        {**_T5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
    ),
    "MT5": Family("MT5Config", "MT5EncoderModel", _T5),
    "UMT5": Family("UMT5Config", "UMT5EncoderModel", _T5),
    "Llama": Family("LlamaConfig", "LlamaModel", _DECODER, BOTH),
    "Mistral": Family(
        "MistralConfig", "MistralModel", {**_DECODER, "sliding_window": WINDOW}, BOTH, window="sliding_window"
    ),
    "Qwen2": Family(
        "Qwen2Config",
        "Qwen2Model",
        {**_DECODER, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        BOTH,
        window="sliding_window",
    ),
    "Qwen3": Family("Qwen3Config", "Qwen3Model", {**_DECODER, "head_dim": 16}, BOTH),
    "GPT-2": Family(
        "GPT2Config",
        "GPT2Model",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        BOTH,
    ),
    "NomicBERT": Family("NomicBertConfig", "NomicBertModel", _ENCODER),
    "EuroBERT": Family("EuroBertConfig", "EuroBertModel", _DECODER),
    "Jina v3": Family("JinaEmbeddingsV3Config", "JinaEmbeddingsV3Model", {**_ENCODER, "pad_token_id": 1}),
    "Gemma 2": Family(
        "Gemma2Config",
        "Gemma2Model",
        {**_DECODER, **_GEMMA, "attn_logit_softcapping": 3.0},
        BOTH,
        window="sliding_window",
    ),
    "Gemma 3": Family(
        "Gemma3TextConfig", "Gemma3TextModel", {**_DECODER, **_GEMMA, **_HYBRID}, BOTH, window="sliding_window"
    ),
    "EmbeddingGemma": Family(
        "Gemma3TextConfig",
        "Gemma3TextModel",
        {**_DECODER, **_GEMMA, **_HYBRID, "sliding_window": 2 * WINDOW, "use_bidirectional_attention": True},
        window="sliding_window",
        step=2,
    ),
    "Phi": Family("PhiConfig", "PhiModel", {**_ENCODER, "num_attention_heads": 2}, BOTH),
    "Phi-3": Family("Phi3Config", "Phi3Model", {**_DECODER, "sliding_window": WINDOW}, BOTH, window="sliding_window"),
}
CASES = [(name, is_causal) for name, family in FAMILIES.items() for is_causal in family.directions]
WINDOWED = [(name, is_causal) for name, is_causal in CASES if FAMILIES[name].window]


def case_name(value: Any) -> str:
    return {None: "own", False: "bidirectional"}.get(value, str(value))


def make(name: str, **changes: Any) -> Any:
    """The family's model with eager attention, no dropout, and weights that make attention far from uniform."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(hf, family.config)(**{**family.options, **changes})
    for option in vars(config):
        if "dropout" in option or option.endswith("pdrop"):
            setattr(config, option, 0.0)
    model = getattr(hf, family.model)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.set_attn_implementation("eager")
    return model.eval()


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def pad(ids: list[Tensor], side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, S]; side "holes" also masks tokens amid the first text."""
    longest = max(len(text) for text in ids)
    padded = torch.full((len(ids), longest), pad_id)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for row, text in enumerate(ids):
        start = longest - len(text) if side == "left" else 0
        padded[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    if side == "holes":
        mask[0, 4] = 0
        mask[0, 9:12] = 0
    return padded, mask


def pad_id_of(model: Any) -> int:
    return model.config.pad_token_id or 0


def run_padded(model: Any, side: str, is_causal: bool | None) -> Tensor:
    """Last hidden state of the tokens that count, [T, H]."""
    padded, mask = pad(texts(), side, pad_id_of(model))
    options = {} if is_causal is None else {"is_causal": is_causal}
    hidden = model(input_ids=padded, attention_mask=mask, **options).last_hidden_state
    return hidden[mask.bool()]


def run_alone(model: Any, is_causal: bool | None) -> Tensor:
    """Each text in a batch of its own, [T, H]."""
    options = {} if is_causal is None else {"is_causal": is_causal}
    return torch.cat([model(input_ids=text[None], **options).last_hidden_state[0] for text in texts()])


def offsets(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def run_packed(model: Any, is_causal: bool | None) -> Tensor:
    return packed_forward(model, torch.cat(texts()), offsets(), max(LENGTHS), is_causal=is_causal)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def eager_and_plugged(name: str, run: Callable[[Any], Tensor], peer: Callable[[Any], Tensor] | None = None) -> float:
    """Error of ``run`` on the plugged model against ``peer`` (``run`` itself by default) on the eager one."""
    model = make(name)
    with torch.no_grad():
        theirs = (peer or run)(model)
        ours = run(plug_attention(model))
    return relative_error(ours, theirs)
