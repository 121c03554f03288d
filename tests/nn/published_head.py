"""NV-Embed's latent-attention head as published: padded, unfolded, at any float dtype, from its formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

_ATTENTION, _FEED_FORWARD = "cross_attend_blocks.0.", "cross_attend_blocks.1."


def published_tokens(x: Tensor, weights: Mapping[str, Tensor], heads: int) -> Tensor:
    """``x [tokens, width]`` after cross attention to the latents and the gated feed-forward layer."""

    def norm(rows: Tensor, name: str) -> Tensor:
        return functional.layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    query = norm(x, f"{_ATTENTION}norm") @ weights[f"{_ATTENTION}fn.to_q.weight"].T
    context = norm(weights["latents"], f"{_ATTENTION}norm_context")
    key, value = (context @ weights[f"{_ATTENTION}fn.to_kv.weight"].T).chunk(2, -1)
    query, key, value = (rows.unflatten(-1, (heads, -1)).transpose(0, 1) for rows in (query, key, value))
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    mixed = torch.softmax(scores, -1) @ value
    y = x + mixed.transpose(0, 1).flatten(1) @ weights[f"{_ATTENTION}fn.to_out.weight"].T
    first = f"{_FEED_FORWARD}fn.net.0"
    last = f"{_FEED_FORWARD}fn.net.2"
    up = norm(y, f"{_FEED_FORWARD}norm") @ weights[f"{first}.weight"].T + weights[f"{first}.bias"]
    part, gate = up.chunk(2, -1)
    return y + (part * functional.gelu(gate)) @ weights[f"{last}.weight"].T + weights[f"{last}.bias"]


def published_head(
    x: Tensor, lengths: list[int], weights: Mapping[str, Tensor], heads: int, mask: Tensor | None = None
) -> Tensor:
    """Vectors of length 1 for packed ``x``: the mean, with mask ``[tokens]``, is formed in float32 at least."""
    tokens = published_tokens(x, weights, heads)
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    factors = torch.ones(len(x), dtype=wide.dtype) if mask is None else mask.to(wide.dtype)
    means = [
        (rows * weight[:, None]).sum(0) / weight.sum()
        for rows, weight in zip(wide.split(lengths), factors.split(lengths), strict=True)
    ]
    return functional.normalize(torch.stack(means), dim=-1)
