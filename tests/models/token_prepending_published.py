"""Token prepending as published: padded on the left, eager attention, every layer run and every hidden state kept.

Written from the method's description: before blocks start to stop - 1, counted from 0, the state of the placeholder is
overwritten by that of the last position; positions count from the padding on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hidden_states(
    model: Any,
    texts: list[list[int]],
    places: list[int | None],
    placeholder: Tensor,
    start: int,
    stop: int,
) -> list[Tensor]:
    """Of texts of token ids, whose token in ``places`` has ``placeholder`` for its embedding: N + 1 of ``[B, S, H]``.

    The last one without the model's final norm.
    """
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    real = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :] = torch.tensor(text)
        real[row, longest - len(text) :] = True
    targets = [
        None if place is None else longest - len(text) + place for text, place in zip(texts, places, strict=True)
    ]
    hidden = model.get_input_embeddings()(ids)
    for row, target in enumerate(targets):
        if target is not None:
            hidden = _overwritten(hidden, row, target, placeholder.to(hidden.dtype))
    positions = torch.arange(longest)[None]
    rotation = model.rotary_emb(hidden, positions)
    states = [hidden]
    for number, block in enumerate(model.layers):
        if start <= number < stop:
            last = hidden[:, -1]
            for row, target in enumerate(targets):
                if target is not None:
                    hidden = _overwritten(hidden, row, target, last[row])
        mask = _mask(real, _window(model.config, number), hidden.dtype)
        hidden = block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
        states.append(hidden)
    return states


def _overwritten(hidden: Tensor, row: int, target: int, value: Tensor) -> Tensor:
    """Out of place, for the sake of gradients."""
    place = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    place[row, target] = True
    return torch.where(place[..., None], value, hidden)


def _window(config: Any, number: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[number] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _mask(real: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    places = torch.arange(real.shape[1])
    distance = places[:, None] - places
    seen = (distance >= 0) & (distance < (window or real.shape[1])) & real[:, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
