"""NV-Embed's latent-attention pooling (Lee et al., "NV-Embed", 2024), folded.

The head attends from every token to a few hundred learned latents, then runs a gated feed-forward layer, then takes a
mean. Its keys and values do not depend on the input, so for each head the queries' projection times the keys is one
matrix, and so is the values times the output projection; and the last linear layer commutes with the mean. What is
left for each token are three matrix products, with a softmax in groups and a gated mean between them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .latent_attention_blocks import HeadWeights, Linears, pool_in_blocks
from .linear import FusedLinear


class _Attention(nn.Module):
    """Projections without bias, in the published layout: keys before values, heads one after the other."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)


class _FeedForward(nn.Module):
    """Linear layer, gated linear unit (which has no parameters), linear layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.Linear(width, 2 * inner), "2": nn.Linear(inner, width)})


class _PreNorm(nn.Module):
    """A block, the norm of its input and, for attention, that of the latents."""

    def __init__(self, width: int, fn: nn.Module, context: bool) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(width)
        if context:
            self.norm_context = nn.LayerNorm(width)


class LatentAttentionPooling(nn.Module):
    """Latent attention, feed-forward and mean of the tokens of each sequence: NV-Embed's pooling head, for training.

    With Z the latents, G heads of dimension d, and the residual stream x of one token::

        q = LN(x) W_qᵀ;  k, v = split(LN(Z) W_kvᵀ)
        y = x + concat_h(softmax(q_h k_hᵀ / √d) v_h) W_oᵀ
        a, g = split(LN(y) W_1ᵀ + b_1)
        vector = mean over tokens of y + (a gelu(g)) W_2ᵀ + b_2

    computed in its folded form, which is the same function: ``softmax(LN(x) A) C`` in G groups for the attention, and
    W_2 after the mean. A and C are formed anew in each call, so that gradients reach every parameter; `fold` forms
    them once, for inference. Tokens go through in blocks: beyond one block only ``[S, inner]`` and ``[S, width]``
    are held, in the backward pass too, which forms each block again. Gradients of the weights are added up over the
    blocks in the dtype of the weights.

    Parameters have NV-Embed's names (`latents`, `cross_attend_blocks.0.fn.to_q.weight`, …): a released checkpoint's
    head loads with `load_state_dict`. Their defaults are its sizes, 740,356,096 in all.

    Args:
        width: of the hidden states.
        latents: number of latents.
        heads: number of heads.
        head_dim: dimension of a head.
        multiplier: the feed-forward layer's inner size over ``width``.
        token_block: most tokens worked on at once.
    """

    def __init__(
        self,
        width: int = 4096,
        latents: int = 512,
        heads: int = 8,
        head_dim: int = 4096,
        *,
        multiplier: int = 4,
        token_block: int = 1024,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "latents": latents, "heads": heads, "head_dim": head_dim, "multiplier": multiplier}
        for name, value in {**sizes, "token_block": token_block}.items():
            if value < 1:
                raise ValueError(f"LatentAttentionPooling: {name} must be at least 1, got {value}")
        self.width, self.heads, self.head_dim, self.token_block = width, heads, head_dim, token_block
        self.config = sizes
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.cross_attend_blocks: Any = nn.ModuleList(
            [
                _PreNorm(width, _Attention(width, heads * head_dim), context=True),
                _PreNorm(width, _FeedForward(width, multiplier * width), context=False),
            ]
        )

    def forward(
        self, hidden: Tensor, cu_seqlens: Tensor, *, weights: Tensor | None = None, normalize: bool = True
    ) -> Tensor:
        """Pool packed tokens.

        Args:
            hidden: ``[T, width]`` in the dtype of the parameters; float64 runs the definitions of the operators.
            cu_seqlens: int32 ``[S + 1]``, from 0, never falling, to T. An empty sequence gives 0.
            weights: float32 ``[T]`` of the mean, 1 by default (a pooling mask); not differentiable. Tokens of weight 0
                are best left out beforehand: they cost as much as others.
            normalize: scale the vectors to length 1, as published.

        Returns:
            ``[S, width]``, float32 (float64 for float64).

        Raises:
            ValueError: sizes or dtypes that do not fit.
        """
        attention, feed_forward = self.cross_attend_blocks
        scores, mix = self._fold()
        up = feed_forward.fn.net["0"]
        head = HeadWeights(
            attention.norm.weight,
            attention.norm.bias,
            scores,
            mix,
            feed_forward.norm.weight,
            feed_forward.norm.bias,
            up.weight,
            up.bias,
        )
        return _pool(self, head, None, feed_forward.fn.net["2"], hidden, cu_seqlens, weights, normalize)

    def fold(self) -> FoldedLatentAttentionPooling:
        """The same head for inference, of which 67 MFLOP a token for attention are left, in place of 604 MFLOP.

        The folded matrices are formed in the dtype of the parameters. The feed-forward layer and the norms are shared
        with this module, the rest is not needed any more: 33.6 million numbers in place of 539 million.
        """
        # an inference tensor could serve no later training, nor be prepacked
        with torch.inference_mode(False), torch.no_grad():
            return FoldedLatentAttentionPooling(self, *self._fold())

    def _fold(self) -> tuple[Tensor, Tensor]:
        """``[heads * latents, width]`` and ``[width, heads * latents]``, as weights of linear layers."""
        block = self.cross_attend_blocks[0]
        latents = block.norm_context(self.latents)
        keys, values = block.fn.to_kv(latents).unflatten(1, (2, self.heads, self.head_dim)).unbind(1)
        queries = block.fn.to_q.weight.unflatten(0, (self.heads, self.head_dim))
        out = block.fn.to_out.weight.unflatten(1, (self.heads, self.head_dim))
        scores = torch.bmm(keys.transpose(0, 1) / math.sqrt(self.head_dim), queries)
        mix = torch.bmm(out.transpose(0, 1), values.permute(1, 2, 0))
        return scores.flatten(0, 1), mix.transpose(0, 1).flatten(1)


class FoldedLatentAttentionPooling(nn.Module):
    """`LatentAttentionPooling.fold`: the head with its attention folded into two matrices, for inference.

    Gradients reach the hidden states, the norms and the feed-forward layer; the folded matrices are frozen. On a CPU,
    where no gradient is recorded, the linear layers run on copies in oneDNN's layout, as `FusedLinear` has them.

    Attributes:
        scores: linear layer ``width → heads * latents``, from a normed token to its scores.
        mix: linear layer ``heads * latents → width``, from probabilities to the attention's output.
    """

    def __init__(self, whole: LatentAttentionPooling, scores: Tensor, mix: Tensor) -> None:
        super().__init__()
        attention, feed_forward = whole.cross_attend_blocks
        self.width, self.heads, self.token_block = whole.width, whole.heads, whole.token_block
        self.scores, self.mix = _frozen_linear(scores), _frozen_linear(mix)
        self.norm, self.feed_forward_norm = attention.norm, feed_forward.norm
        self.up, self.down = feed_forward.fn.net["0"], feed_forward.fn.net["2"]
        self._linears: Linears | None = None

    def forward(
        self, hidden: Tensor, cu_seqlens: Tensor, *, weights: Tensor | None = None, normalize: bool = True
    ) -> Tensor:
        """As `LatentAttentionPooling.forward`."""
        if self._linears is None:
            self._linears = Linears(*(FusedLinear((linear,)) for linear in (self.scores, self.mix, self.up)))
        head = HeadWeights(
            self.norm.weight,
            self.norm.bias,
            self.scores.weight,
            self.mix.weight,
            self.feed_forward_norm.weight,
            self.feed_forward_norm.bias,
            self.up.weight,
            self.up.bias,
        )
        return _pool(self, head, self._linears, self.down, hidden, cu_seqlens, weights, normalize)


def _frozen_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _pool(
    module: LatentAttentionPooling | FoldedLatentAttentionPooling,
    head: HeadWeights,
    linears: Linears | None,
    down: nn.Linear,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    normalize: bool,
) -> Tensor:
    """The blocks, then the last linear layer on their means."""
    _check(module, hidden, head.up.dtype, weights)
    gated, residual, present = pool_in_blocks(
        hidden, cu_seqlens, weights, head, module.heads, module.token_block, linears
    )
    # a sequence without tokens has no vector, so no bias either
    out = functional.linear(gated.to(down.weight.dtype), down.weight).to(residual.dtype) + residual
    out = out + down.bias.to(residual.dtype) * present[:, None]
    return functional.normalize(out, dim=-1) if normalize else out


def _check(module: nn.Module, hidden: Tensor, dtype: torch.dtype, weights: Tensor | None) -> None:
    name = type(module).__name__
    if hidden.dim() != 2 or hidden.shape[1] != module.width or hidden.dtype != dtype:
        raise ValueError(
            f"{name}: hidden must be {str(dtype).removeprefix('torch.')} [tokens, {module.width}], got "
            f"{str(hidden.dtype).removeprefix('torch.')} {list(hidden.shape)}"
        )
    if weights is not None and weights.requires_grad:
        raise ValueError(f"{name}: weights must not require a gradient (they are not differentiated here)")
