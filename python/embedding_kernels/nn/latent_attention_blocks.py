"""The folded latent-attention head on blocks of tokens: forward, and a backward that forms each block again."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..ops.latent_attention import geglu_segment_pool, grouped_softmax
from ..ops.norm import add_layer_norm
from ..ops.pooling import segment_pool
from .linear import FusedLinear

_EPS = 1e-5


class HeadWeights(NamedTuple):
    """What is applied to each token; matrices as the weights of linear layers, ``[out, in]``."""

    norm_weight: Tensor
    norm_bias: Tensor
    scores: Tensor
    mix: Tensor
    feed_forward_norm_weight: Tensor
    feed_forward_norm_bias: Tensor
    up: Tensor
    up_bias: Tensor


class Linears(NamedTuple):
    """The three matrix products of a token where no gradient is recorded; ``up`` adds its bias."""

    scores: FusedLinear
    mix: FusedLinear
    up: FusedLinear


@dataclass(frozen=True)
class _Block:
    """Tokens ``rows`` of the sequences ``sequences``, of which the first and the last may be cut."""

    rows: slice
    sequences: slice
    cu_seqlens: Tensor
    weights: Tensor | None
    #: [sequences, 1]: what the block's mean counts in that of the whole sequence; None where no sequence is cut
    share: Tensor | None


def pool_in_blocks(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    head: HeadWeights,
    groups: int,
    token_block: int,
    linears: Linears | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over each sequence of the gated products ``[S, inner]`` and of the residual stream ``[S, width]``.

    Both in float32 (float64 for float64); with them float ``[S]``, 1 where a sequence has any weight, else 0. To cut
    more tokens than a block, ``cu_seqlens`` is read back from the device.
    """
    totals = _total_weights(hidden, cu_seqlens, weights)
    present = (totals != 0).to(totals.dtype)
    if hidden.dtype == torch.float64:
        whole = _Block(slice(None), slice(None), cu_seqlens, weights, None)
        return *_pool_plainly(hidden, whole, head, groups), present
    blocks = list(_blocks(cu_seqlens, weights, totals, hidden.shape[0], token_block))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, *head)):
        return *_PoolBlocks.apply(hidden, blocks, len(totals), groups, *head), present
    return *_pool_without_gradient(hidden, blocks, len(totals), head, groups, linears), present


def _total_weights(hidden: Tensor, cu_seqlens: Tensor, weights: Tensor | None) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    lengths = cu_seqlens.diff()
    if weights is None:
        return lengths.to(dtype)
    texts = torch.repeat_interleave(lengths, output_size=hidden.shape[0])
    return torch.zeros(len(lengths), dtype=dtype, device=weights.device).index_add_(0, texts, weights.to(dtype))


# ---- cutting tokens into blocks ----


def _blocks(
    cu_seqlens: Tensor, weights: Tensor | None, totals: Tensor, tokens: int, token_block: int
) -> Iterator[_Block]:
    if tokens <= token_block:
        yield _Block(slice(0, tokens), slice(0, len(cu_seqlens) - 1), cu_seqlens, weights, None)
        return
    offsets = cu_seqlens.tolist()
    if offsets[-1] != tokens:
        raise ValueError(f"latent attention: cu_seqlens must be {tokens} in its last place, got {offsets[-1]}")
    for start, end, first, last in _cuts(offsets, token_block):
        local = (cu_seqlens[first : last + 1] - start).clamp(0, end - start)
        part = None if weights is None else weights[start:end]
        share = None
        if offsets[first] < start or offsets[last] > end:
            own = _total_weights(totals.new_empty(end - start, dtype=torch.float32), local, part)
            share = torch.where(totals[first:last] == 0, 0, own / totals[first:last])[:, None]
        yield _Block(slice(start, end), slice(first, last), local, part, share)


def _cuts(offsets: list[int], token_block: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges of tokens, of equal size, and of the sequences they touch: a block of a few tokens would be read for no
    more than those, and torch's product with a single row is ten times less exact than with two."""
    tokens = offsets[-1]
    count = -(-tokens // token_block)
    for i in range(count):
        start, end = tokens * i // count, tokens * (i + 1) // count
        yield start, end, bisect.bisect_right(offsets, start) - 1, bisect.bisect_left(offsets, end)


# ---- one block ----


class _Forward(NamedTuple):
    """What the backward pass of a block needs again."""

    normed: Tensor
    probabilities: Tensor
    summed: Tensor
    feed_forward_input: Tensor
    up: Tensor


def _run_block(rows: Tensor, head: HeadWeights, groups: int) -> _Forward:
    normed, _ = add_layer_norm(rows, None, head.norm_weight, bias=head.norm_bias, eps=_EPS)
    probabilities = grouped_softmax(functional.linear(normed, head.scores), groups)
    mixed = functional.linear(probabilities, head.mix)
    feed_forward_input, summed = add_layer_norm(
        mixed, rows, head.feed_forward_norm_weight, bias=head.feed_forward_norm_bias, eps=_EPS
    )
    return _Forward(normed, probabilities, summed, feed_forward_input, functional.linear(feed_forward_input, head.up))


def _empty_means(hidden: Tensor, sequences: int, head: HeadWeights) -> tuple[Tensor, Tensor]:
    gated = hidden.new_zeros(sequences, head.up.shape[0] // 2, dtype=torch.float32)
    return gated, hidden.new_zeros(sequences, hidden.shape[1], dtype=torch.float32)


def _add_means(block: _Block, means: tuple[Tensor, Tensor], up: Tensor, bias: Tensor | None, summed: Tensor) -> None:
    options: Any = {"weights": block.weights, "out_dtype": torch.float32}
    gated = geglu_segment_pool(up, bias, block.cu_seqlens, **options)
    residual = segment_pool(summed, block.cu_seqlens, **options)
    for mean, part in zip(means, (gated, residual), strict=True):
        mean[block.sequences] += part if block.share is None else part * block.share


def _pool_without_gradient(
    hidden: Tensor, blocks: list[_Block], sequences: int, head: HeadWeights, groups: int, linears: Linears | None
) -> tuple[Tensor, Tensor]:
    means = _empty_means(hidden, sequences, head)
    for block in blocks:
        rows = hidden[block.rows]
        if linears is None:
            forward = _run_block(rows, head, groups)
            _add_means(block, means, forward.up, head.up_bias, forward.summed)
            continue
        normed, _ = add_layer_norm(rows, None, head.norm_weight, bias=head.norm_bias, eps=_EPS)
        mixed = linears.mix(grouped_softmax(linears.scores(normed), groups))
        normed, summed = add_layer_norm(
            mixed, rows, head.feed_forward_norm_weight, bias=head.feed_forward_norm_bias, eps=_EPS
        )
        _add_means(block, means, linears.up(normed), None, summed)
    return means


def _pool_plainly(hidden: Tensor, block: _Block, head: HeadWeights, groups: int) -> tuple[Tensor, Tensor]:
    """By the definitions of the operators, which take float64, under torch's own autograd."""
    plain: Any = {"backend": "reference"}
    normed, _ = add_layer_norm(hidden, None, head.norm_weight, bias=head.norm_bias, eps=_EPS, **plain)
    probabilities = grouped_softmax(functional.linear(normed, head.scores), groups, **plain)
    mixed = functional.linear(probabilities, head.mix)
    normed, summed = add_layer_norm(
        mixed, hidden, head.feed_forward_norm_weight, bias=head.feed_forward_norm_bias, eps=_EPS, **plain
    )
    up = functional.linear(normed, head.up)
    options: Any = {"weights": block.weights, **plain}
    gated = geglu_segment_pool(up, head.up_bias, block.cu_seqlens, **options)
    return gated, segment_pool(summed, block.cu_seqlens, **options)


# ---- the gradient ----


class _PoolBlocks(torch.autograd.Function):
    """Keeps the hidden states alone and forms each block again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, blocks: list[_Block], sequences: int, groups: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.groups = blocks, groups
        ctx.save_for_backward(hidden, *tensors)
        return _pool_without_gradient(hidden, blocks, sequences, HeadWeights(*tensors), groups, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gated: Tensor, grad_residual: Tensor) -> tuple[Any, ...]:
        hidden, *tensors = ctx.saved_tensors
        head = HeadWeights(*tensors)
        wanted = HeadWeights(*ctx.needs_input_grad[4:])
        zeros: Any = [_zeros(t) if want else None for t, want in zip(head, wanted, strict=True)]
        grads = HeadWeights(*zeros)
        grad_hidden = torch.empty_like(hidden)
        for block in ctx.blocks:
            of_means = grad_gated[block.sequences], grad_residual[block.sequences]
            if block.share is not None:
                of_means = of_means[0] * block.share, of_means[1] * block.share
            grad_hidden[block.rows] = _block_backward(hidden[block.rows], block, head, ctx.groups, of_means, grads)
        return (
            grad_hidden,
            None,
            None,
            None,
            *(None if g is None else g.to(t.dtype) for g, t in zip(grads, head, strict=True)),
        )


def _zeros(tensor: Tensor) -> Tensor:
    """A matrix's gradient is added up in its own dtype, for the sake of memory; a vector's in float32."""
    return torch.zeros_like(tensor, dtype=torch.float32 if tensor.dim() == 1 else None)


def _block_backward(
    rows: Tensor, block: _Block, head: HeadWeights, groups: int, of_means: tuple[Tensor, Tensor], grads: HeadWeights
) -> Tensor:
    """Adds the block's part to ``grads``, in place; returns the gradient of its rows."""
    ops: Any = torch.ops.embedding_kernels
    forward = _run_block(rows, head, groups)
    grad_up, grad_up_bias, _ = ops.geglu_segment_pool_backward(
        of_means[0], forward.up, head.up_bias, block.cu_seqlens, block.weights
    )
    _add(grads.up_bias, grad_up_bias)
    _add_product(grads.up, grad_up, forward.feed_forward_input)
    grad_residual, _ = ops.segment_pool_backward(
        of_means[1], None, block.cu_seqlens, *rows.shape, rows.dtype, "mean", 1, block.weights, False
    )
    grad_summed, *of_norm = ops.add_layer_norm_backward(
        grad_up @ head.up,
        grad_residual,
        forward.summed,
        head.feed_forward_norm_weight,
        head.feed_forward_norm_bias,
        _EPS,
    )
    del grad_up, grad_residual
    _add(grads.feed_forward_norm_weight, of_norm[0])
    _add(grads.feed_forward_norm_bias, of_norm[1])
    _add_product(grads.mix, grad_summed, forward.probabilities)
    grad_scores = ops.grouped_softmax_backward(grad_summed @ head.mix, forward.probabilities, groups)
    _add_product(grads.scores, grad_scores, forward.normed)
    grad_rows, *of_norm = ops.add_layer_norm_backward(
        grad_scores @ head.scores, grad_summed, rows, head.norm_weight, head.norm_bias, _EPS
    )
    _add(grads.norm_weight, of_norm[0])
    _add(grads.norm_bias, of_norm[1])
    return grad_rows


def _add(total: Tensor | None, part: Tensor) -> None:
    if total is not None:
        total += part


def _add_product(total: Tensor | None, grad: Tensor, inputs: Tensor) -> None:
    """The gradient of a linear layer's weight, added without a matrix in between."""
    if total is not None:
        total.addmm_(grad.T, inputs)
