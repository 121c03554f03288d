"""A packed forward of T5's encoder: pre-norm RMSNorm, relative bias by table, attention without a scale.

Fused norms, prepacked weights and a trimmed last layer lie outside transformers' attention interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...nn.linear import FUSED_ACTIVATIONS, FusedLinear
from ...nn.relative_bias import T5RelativeBias
from ...ops.attention import varlen_attention
from ...ops.norm import add_rms_norm
from .blocks import KeptRows, Part, check_captured, class_name, head_dim_fits, is_intercepted, kept_rows, under_autocast

_MODULE = "transformers.models.t5.modeling_t5."
_DTYPES = (torch.float32, torch.bfloat16)


class T5Backbone:
    """The encoder of a transformers T5 (v1.0, v1.1 and their kin) over packed tokens.

    Nothing is padded: hidden states are ``[T, D]`` from the embeddings to the last norm, and the relative bias is a
    table of 183 numbers a head. The weights are the model's own, read at every call; `FusedLinear` says when a copy in
    oneDNN's layout stands beside them. Differentiable where gradients are on. Without dropout: in training mode the
    model's ``dropout_rate`` must be 0. Forward hooks on its parts do not run.

    Args:
        model: a `T5EncoderModel`, or the encoder `T5Stack` of another T5, that `supports` accepts.
    """

    road = "packed T5 blocks"
    #: whether ``last_rows`` saves work
    trims = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self._stack = encoder_stack(model)
        self._blocks = [_Block(block, self._stack.config) for block in self._stack.block]
        self._parts = captured_parts(self._stack)
        attention = self._stack.block[0].layer[0].SelfAttention
        self._bias = T5RelativeBias.from_embedding(
            attention.relative_attention_bias, attention.relative_attention_max_distance
        )

    def __call__(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        last_rows: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """Hidden states of packed sequences.

        Args:
            input_ids: integers ``[T]``.
            cu_seqlens: int32 ``[S + 1]``, from 0, never falling, to T.
            max_seqlen: at least the longest sequence.
            position_ids: None: T5 has no positions but the distances of its tokens.
            token_type_ids: None.
            last_rows: rows that are wanted, int64 ``[R]``, rising, and their int32 offsets ``[S + 1]`` by sequence.
                The last layer to run computes queries, output projection and feed-forward of no others.
            layer: stop after so many layers, 0 to N: transformers' ``output_hidden_states[layer]``, of which the last
                comes after the final norm. By default all layers run.

        Returns:
            ``[T, D]``, or ``[R, D]`` with ``last_rows``.

        Raises:
            ValueError: the model is in training mode with dropout, or the arguments are not as above.
        """
        self._check(position_ids, token_type_ids)
        count = len(self._blocks) if layer is None else layer
        if not 0 <= count <= len(self._blocks):
            raise ValueError(f"T5Backbone: layer must be from 0 to {len(self._blocks)}, got {count}")
        batch = _Batch(cu_seqlens, max_seqlen, self._table())
        kept = None if last_rows is None else kept_rows(last_rows, cu_seqlens)
        added, stream = functional.embedding(input_ids, self._stack.embed_tokens.weight), None
        for place, block in enumerate(self._blocks[:count], 1):
            added, stream = block(added, stream, batch, kept if place == count else None)
        if kept is not None and count == 0:
            added = added[kept.rows]
        if count == len(self._blocks):
            return add_norm(added, stream, self._stack.final_layer_norm)[0]
        return added if stream is None else added + stream

    def forget(self) -> None:
        """Drop all prepacked weights; the next call makes them again."""
        for block in self._blocks:
            block.forget()

    def _check(self, position_ids: Tensor | None, token_type_ids: Tensor | None) -> None:
        check_without_dropout("T5Backbone", self._stack)
        check_captured("T5Backbone", self._parts)
        for name, value in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
            if value is not None:
                raise ValueError(f"T5Backbone: {name} must be None, got a tensor")

    def _table(self) -> Tensor:
        """float32 ``[heads, 2R + 1]``, with a gradient to the embedding where gradients are on."""
        # the parameter may have been replaced, or moved, since
        embedding: Any = self._stack.block[0].layer[0].SelfAttention.relative_attention_bias
        self._bias.weight = embedding.weight
        if self._bias.buckets.device != embedding.weight.device:
            self._bias.buckets = self._bias.buckets.to(embedding.weight.device)
        return self._bias()


@dataclass(frozen=True)
class _Batch:
    """What all blocks share in one call."""

    cu_seqlens: Tensor
    longest: int
    bias_table: Tensor


class _Block:
    """One block. The residual stream and what is to be added to it travel apart, so that a norm does the addition."""

    def __init__(self, block: Any, config: Any) -> None:
        attention = block.layer[0].SelfAttention
        self.head_dim = attention.key_value_proj_dim
        q, k, v = attention.q, attention.k, attention.v
        # each is prepacked when first used: a block that is always trimmed never packs the three together
        self.qkv, self.q, self.kv = FusedLinear((q, k, v)), FusedLinear((q,)), FusedLinear((k, v))
        self.mixed = FusedLinear((attention.o,))
        self.attention_norm = block.layer[0].layer_norm
        self.feed_forward = FeedForward(block.layer[-1], config)

    def __call__(
        self, added: Tensor, stream: Tensor | None, batch: _Batch, kept: KeptRows | None
    ) -> tuple[Tensor, Tensor]:
        """From the stream and what is still to be added to it to the same after this block; ``kept`` rows alone."""
        normed, stream = add_norm(added, stream, self.attention_norm)
        flat = self.qkv.parts(normed) if kept is None else (self.q(normed[kept.rows]), *self.kv.parts(normed))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in flat)
        mixed = varlen_attention(
            q,
            k,
            v,
            batch.cu_seqlens if kept is None else kept.cu_seqlens,
            batch.cu_seqlens,
            batch.longest,
            batch.longest,
            scale=1.0,
            bias_table=batch.bias_table,
            positions_q=None if kept is None else kept.places,
        )
        if kept is not None:
            stream = stream[kept.rows]
        return self.feed_forward(self.mixed(mixed.flatten(1)), stream)

    def forget(self) -> None:
        for linear in (self.qkv, self.q, self.kv, self.mixed):
            linear.forget()
        self.feed_forward.forget()


class FeedForward:
    """Norm and feed-forward of one T5 block, with or without a gate; the decoder's too."""

    def __init__(self, layer: Any, config: Any) -> None:
        dense = layer.DenseReluDense
        self.norm = layer.layer_norm
        first = dense.wi_0 if config.is_gated_act else dense.wi
        self.first = FusedLinear((first,), config.dense_act_fn, dense.act)
        self.gate = FusedLinear((dense.wi_1,)) if config.is_gated_act else None
        self.down = FusedLinear((dense.wo,))

    def __call__(self, added: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, stream = add_norm(added, stream, self.norm)
        activated = self.first(normed)
        if self.gate is not None:
            activated = activated * self.gate(normed)
        return self.down(activated), stream

    def forget(self) -> None:
        for linear in (self.first, self.gate, self.down):
            if linear is not None:
                linear.forget()


def add_norm(x: Tensor, stream: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """T5's norm of ``stream + x``, and that sum."""
    if under_autocast(x):  # which leaves the residual stream at the dtype of the weights
        with torch.autocast(x.device.type, enabled=False):
            return add_norm(x.to(norm.weight.dtype), stream, norm)
    return add_rms_norm(x, stream, norm.weight, eps=norm.variance_epsilon)


def encoder_stack(model: Any) -> Any:
    """The encoder of a T5, or the model itself where it is one."""
    return model if class_name(model) == _MODULE + "T5Stack" else model.encoder


def check_without_dropout(name: str, stack: Any) -> None:
    """ValueError where the stack's own forward would drop values and ours does not."""
    if stack.training and stack.config.dropout_rate > 0:
        raise ValueError(
            f"{name}: model must be in evaluation mode (call .eval()) or have dropout_rate 0, got one in training mode "
            f"with dropout_rate {stack.config.dropout_rate}"
        )


def captured_parts(stack: Any) -> list[Part]:
    """For `check_captured`: all modules of the blocks."""
    return [(owner._modules, name, part) for owner in stack.block.modules() for name, part in owner.named_children()]


def supports(model: nn.Module) -> bool:
    """Whether `T5Backbone` computes what ``model``'s own forward does: its class, config, parts and dtype."""
    if class_name(model) not in (_MODULE + "T5EncoderModel", _MODULE + "T5Stack"):
        return False
    stack = encoder_stack(model)
    dtypes = {parameter.dtype for parameter in stack.parameters()}
    # float16 is clamped between the blocks, and its second linear layers kept in float32
    return not stack.config.is_decoder and stack_is_plain(stack) and len(dtypes) == 1 and dtypes <= set(_DTYPES)


def stack_is_plain(stack: Any) -> bool:
    """No adapters, quantisation, parametrisations or hooks in an encoder or a decoder, and sizes that the ops take."""
    config = stack.config
    wanted: dict[str, str] = {
        "embed_tokens": "torch.nn.modules.sparse.Embedding",
        "final_layer_norm": _MODULE + "T5LayerNorm",
        "layer_norm": _MODULE + "T5LayerNorm",
        "SelfAttention": _MODULE + "T5Attention",
        "EncDecAttention": _MODULE + "T5Attention",
        "DenseReluDense": _MODULE + ("T5DenseGatedActDense" if config.is_gated_act else "T5DenseActDense"),
        "relative_attention_bias": "torch.nn.modules.sparse.Embedding",
    } | dict.fromkeys(("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"), "torch.nn.modules.linear.Linear")
    return (
        class_name(stack) == _MODULE + "T5Stack"
        and config.dense_act_fn in FUSED_ACTIVATIONS
        and head_dim_fits(config.d_kv)
        and all(
            class_name(part) == wanted.get(name.rpartition(".")[2], class_name(part)) and not is_intercepted(part)
            for name, part in stack.named_modules()
        )
    )
