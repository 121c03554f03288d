"""Tiny multi-view rerankers with random weights, and the published computation in eager transformers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from embedding_kernels.models import MultiViewModel, MultiViewReranker

from .conftest import WORDS


def make_t5_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """A word-level tokenizer with T5's conventions: padding 0, ``</s>`` at the end, sentinels."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    entries = ["<pad>", "</s>", "<unk>", "|", "Query", "Context", ":", *words]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(entries)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[f"<extra_id_{number}>" for number in range(8)],
        model_max_length=512,
    )


def make_t5(vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Any:
    """A T5 of three and two layers whose parameters are all random."""
    torch.manual_seed(seed)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    t5 = hf.T5Model(hf.T5Config(vocab_size=vocabulary, decoder_start_token_id=0, **(sizes | options)))
    with torch.no_grad():
        for name, parameter in t5.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return t5.to(dtype).eval()


def make_reranker(
    views: int = 4, dtype: torch.dtype = torch.float32, words: Sequence[str] = WORDS, **options: Any
) -> MultiViewReranker:
    tokenizer = make_t5_tokenizer(words)
    return MultiViewReranker(MultiViewModel(make_t5(len(tokenizer), dtype, **options), views), tokenizer, max_length=64)


class Float64Norm(nn.Module):
    """T5LayerNorm's formula at the dtype of its input: the original computes in float32 even of float64."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)


def with_exact_norms(t5: Any) -> Any:
    for owner in [*t5.modules()]:
        for name, part in [*owner.named_children()]:
            if type(part).__name__ == "T5LayerNorm":
                setattr(owner, name, Float64Norm(part))
    return t5


def published_scores(t5: Any, rows: Sequence[Tensor], cu_passages: Tensor, views: int, pad_to: int) -> Tensor:
    """[P, m] by the published way: padded to ``pad_to``, eager, the decoder over projected keys and values."""
    ids = torch.zeros(len(rows), pad_to, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    hidden = t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, :views]
    scores = []
    for start, end in pairwise(cu_passages.tolist()):
        if start == end:  # which transformers does not take
            continue
        own = hidden[start:end].transpose(0, 1)
        token = t5.shared.weight[0].view(1, 1, -1).expand(views, 1, -1)
        anchors = t5.decoder(inputs_embeds=token, encoder_hidden_states=own).last_hidden_state
        scores.append(torch.einsum("bsh,bph->bp", anchors, own).T)
    return torch.cat(scores)
