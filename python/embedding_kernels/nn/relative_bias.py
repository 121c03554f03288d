"""T5's relative position bias as the table that `varlen_attention` looks up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def t5_relative_buckets(num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """Bucket of each relative position from −R to R, R being where the last bucket begins.

    With Δ = key − query and n = ``num_buckets`` (halved in both directions, where the second half is for Δ > 0), e =
    n // 2, D = ``max_distance``::

        bucket = |Δ|                                              where |Δ| < e
               = min(n − 1, e + ⌊ln(|Δ| / e) / ln(D / e) · (n − e)⌋)   elsewhere

    formed in float32 in the order of transformers, whose rounding decides at powers such as |Δ| = 16 and 64. One
    direction (a decoder) takes |Δ| as 0 for Δ > 0. Raffel et al., "Exploring the Limits of Transfer Learning with a
    Unified Text-to-Text Transformer", 2020.

    Returns:
        int64 ``[2R + 1]``; R = 91 for the defaults, 113 for one direction.

    Raises:
        ValueError: too few buckets, or a ``max_distance`` that the exact buckets already cover.
    """
    per_side = num_buckets // 2 if bidirectional else num_buckets
    exact = per_side // 2
    if exact < 1:
        raise ValueError(
            f"t5_relative_buckets: num_buckets must be at least {4 if bidirectional else 2}, got {num_buckets}"
        )
    if max_distance <= exact:
        raise ValueError(f"t5_relative_buckets: max_distance must be more than {exact}, got {max_distance}")
    distance = torch.arange(2 * max_distance)
    scaled = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (per_side - exact)
    # ln 0 is replaced before the cast, which has no meaning for it
    far = exact + torch.where(distance < exact, 0.0, scaled).long()
    buckets = torch.where(distance < exact, distance, far.clamp(max=per_side - 1))
    reach = int((buckets != per_side - 1).nonzero()[-1]) + 1
    near = buckets[: reach + 1]
    after = near[1:] + per_side if bidirectional else torch.zeros_like(near[1:])
    return torch.cat((near.flip(0), after))


class T5RelativeBias(nn.Module):
    """T5's learned bias of relative positions: ``forward()`` gives `varlen_attention`'s ``bias_table``.

    ``table[h, Δ + R] = weight[bucket(Δ), h]`` for Δ = key − query from −R to R (`t5_relative_buckets`); further apart
    the bias is that of ±R, so the table is the whole bias: 183 numbers a head where a dense bias has one for each pair
    of tokens. T5 attends without scaling: pass ``scale=1.0``. Differentiable in ``weight``.

    Args:
        num_heads: heads H.
        num_buckets: buckets, both directions together.
        max_distance: |Δ| from which all positions share the last bucket (the float32 formula reaches it sooner).
        bidirectional: True for an encoder, False for a decoder.

    Attributes:
        weight: float ``[num_buckets, H]``, the parameter (``relative_attention_bias.weight`` in transformers).
        reach: R.

    Raises:
        ValueError: as `t5_relative_buckets`.
    """

    buckets: Tensor

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.num_heads, self.num_buckets = num_heads, num_buckets
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))
        buckets = t5_relative_buckets(num_buckets, max_distance, bidirectional)
        self.register_buffer("buckets", buckets, persistent=False)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, max_distance: int = 128, bidirectional: bool = True
    ) -> T5RelativeBias:
        """The bias of a trained embedding ``[num_buckets, H]``, whose parameter it shares."""
        num_buckets, num_heads = embedding.weight.shape
        bias = cls(num_heads, num_buckets, max_distance, bidirectional).to(embedding.weight.device)
        parameter: Any = embedding.weight
        bias.weight = parameter
        return bias

    @property
    def reach(self) -> int:
        return self.buckets.shape[0] // 2

    def forward(self) -> Tensor:
        """float32 ``[H, 2R + 1]``; float64 for a float64 weight."""
        table = self.weight[self.buckets].T
        return table if table.dtype == torch.float64 else table.float()

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )
