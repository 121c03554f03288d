"""A packed forward of BERT-like encoders: post-norm, learned absolute positions.

Fused projections, prepacked weights and a trimmed last layer lie outside transformers' attention interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...nn.linear import FusedLinear
from ...ops.attention import varlen_attention
from .blocks import Part, check_captured, class_name, head_dim_fits

_BERT = "transformers.models.bert.modeling_bert.BertModel"
# the same encoder; their positions start after the padding token's row, and skip padding tokens
_ROBERTA_LIKE = (
    "transformers.models.roberta.modeling_roberta.RobertaModel",
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaModel",
    "transformers.models.camembert.modeling_camembert.CamembertModel",
)
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BertBackbone:
    """A transformers `BertModel`, `RobertaModel`, `XLMRobertaModel` or `CamembertModel` over packed tokens.

    Nothing is padded: hidden states are ``[T, H]`` from the embeddings to the last norm. The weights are the model's
    own, read at every call; `FusedLinear` says when a copy in oneDNN's layout stands beside them. Differentiable where
    gradients are on. Without dropout, so the model must be in evaluation mode. Forward hooks on its parts do not run.

    Args:
        model: one that `supports` accepts.
    """

    road = "packed BERT blocks"
    #: whether ``last_rows`` saves work
    trims = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self._pad = None if class_name(model) == _BERT else model.config.pad_token_id
        self._layers = [_Layer(layer, model.config.hidden_act) for layer in model.encoder.layer]
        self._parts = _layer_parts(model)

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
            position_ids: ``[T]``, as the model takes them; by default those it would form itself.
            token_type_ids: ``[T]``; 0 by default.
            last_rows: rows that are wanted, int64 ``[R]``, rising, and their int32 offsets ``[S + 1]`` by sequence.
                The last layer to run computes no others.
            layer: stop after so many layers, 0 to N: transformers' ``output_hidden_states[layer]``. By default all
                layers run.

        Returns:
            ``[T, H]``, or ``[R, H]`` with ``last_rows``.

        Raises:
            ValueError: the model is in training mode, or the arguments are not as above.
        """
        if self.model.training:
            raise ValueError("BertBackbone: model must be in evaluation mode (call .eval()), got one in training mode")
        check_captured("BertBackbone", self._parts)
        count = len(self._layers) if layer is None else layer
        if not 0 <= count <= len(self._layers):
            raise ValueError(f"BertBackbone: layer must be from 0 to {len(self._layers)}, got {count}")
        hidden = self._embed(input_ids, cu_seqlens, max_seqlen, position_ids, token_type_ids)
        for place, block in enumerate(self._layers[:count], 1):
            hidden = block(hidden, cu_seqlens, max_seqlen, last_rows if place == count else None)
        return hidden[last_rows[0]] if last_rows is not None and count == 0 else hidden

    def forget(self) -> None:
        """Drop all prepacked weights; the next call makes them again."""
        for layer in self._layers:
            layer.forget()

    def _embed(
        self, ids: Tensor, cu_seqlens: Tensor, longest: int, positions: Tensor | None, types: Tensor | None
    ) -> Tensor:
        parts = self.model.embeddings
        table, type_table = parts.position_embeddings.weight, parts.token_type_embeddings.weight
        if positions is None:
            positions = packed_positions(ids, cu_seqlens, self._pad)
            table = table[: longest + (0 if self._pad is None else self._pad + 1)]
        if types is None:  # one addition for each position, not one for each token
            table = table + type_table[0]
        hidden = functional.embedding(ids, parts.word_embeddings.weight)
        hidden = _add(hidden, functional.embedding(positions, table))
        if types is not None:
            hidden = _add(hidden, functional.embedding(types, type_table))
        return _norm(hidden, parts.LayerNorm)


class _Layer:
    """One block: attention, residual and norm, MLP, residual and norm."""

    def __init__(self, layer: Any, hidden_act: str) -> None:
        attention = layer.attention.self
        self.head_dim = attention.attention_head_size
        self.qkv = FusedLinear((attention.query, attention.key, attention.value))
        self.mixed = FusedLinear((layer.attention.output.dense,))
        self.up = FusedLinear((layer.intermediate.dense,), hidden_act, layer.intermediate.intermediate_act_fn)
        self.down = FusedLinear((layer.output.dense,))
        self.attention_norm = layer.attention.output.LayerNorm
        self.output_norm = layer.output.LayerNorm

    def __call__(self, hidden: Tensor, cu_seqlens: Tensor, longest: int, rows: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.parts(hidden))
        cu_seqlens_q = cu_seqlens
        if rows is not None:  # bidirectional and without positions: queries may be left out
            kept, cu_seqlens_q = rows
            q, hidden = q[kept], hidden[kept]
        mixed = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens, longest, longest)
        hidden = _norm(_add(self.mixed(mixed.flatten(1)), hidden), self.attention_norm)
        return _norm(_add(self.down(self.up(hidden)), hidden), self.output_norm)

    def forget(self) -> None:
        for linear in (self.qkv, self.mixed, self.up, self.down):
            linear.forget()


def packed_positions(ids: Tensor, cu_seqlens: Tensor, pad: int | None) -> Tensor:
    """Row of the position table for each packed token, int64 ``[T]``.

    Without ``pad`` they count from 0 in each sequence. With it they are fairseq's: from ``pad + 1``, and a padding
    token, which a text may spell out, has row ``pad`` and does not count.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    if pad is None:
        counted = torch.arange(len(ids), device=ids.device)
        before = starts
    else:
        real = (ids != pad).long()
        counted = real.cumsum(0)
        before = functional.pad(counted, (1, 0))[starts]
    counted = counted - before.repeat_interleave(lengths, output_size=len(ids))
    return counted if pad is None else counted * real + pad


def _layer_parts(model: Any) -> list[Part]:
    """Where each captured module hangs: an adapter put in its place later must not be passed over in silence."""
    parts = [(model.encoder.layer._modules, name, layer) for name, layer in model.encoder.layer.named_children()]
    for layer in model.encoder.layer:
        owners = (layer.attention.self, layer.attention.output, layer.intermediate, layer.output)
        parts += [(owner._modules, name, part) for owner in owners for name, part in owner.named_children()]
    return parts


def supports(model: nn.Module) -> bool:
    """Whether `BertBackbone` computes what ``model``'s own forward does: its class, config and parts, all checked."""
    if class_name(model) not in (_BERT, *_ROBERTA_LIKE):
        return False
    config: Any = model.config
    head_dim, rest = divmod(config.hidden_size, config.num_attention_heads)
    return (
        config.hidden_act in _ACTIVATIONS
        and not config.is_decoder
        and not config.add_cross_attention
        and getattr(config, "position_embedding_type", None) in (None, "absolute")
        and rest == 0
        and head_dim_fits(head_dim)
        and _parts_are_plain(model)
    )


def _parts_are_plain(model: Any) -> bool:
    """No adapters, quantisation, parametrisations or hooks, and one dtype that the kernels take."""
    parts: list[tuple[nn.Module, type[nn.Module]]] = [
        (model.embeddings.word_embeddings, nn.Embedding),
        (model.embeddings.position_embeddings, nn.Embedding),
        (model.embeddings.token_type_embeddings, nn.Embedding),
        (model.embeddings.LayerNorm, nn.LayerNorm),
    ]
    for layer in model.encoder.layer:
        attention = layer.attention
        dense = [attention.self.query, attention.self.key, attention.self.value]
        dense += [attention.output.dense, layer.intermediate.dense, layer.output.dense]
        parts += [(module, nn.Linear) for module in dense]
        parts += [(attention.output.LayerNorm, nn.LayerNorm), (layer.output.LayerNorm, nn.LayerNorm)]
    dtypes = {parameter.dtype for module in (model.embeddings, model.encoder) for parameter in module.parameters()}
    return (
        all(type(module) is expected for module, expected in parts)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and len(dtypes) == 1
        and dtypes <= set(_DTYPES)
    )


def _add(x: Tensor, other: Tensor) -> Tensor:
    """The sum, in the place of ``x``, which is nobody else's, unless gradients are recorded."""
    return x + other if torch.is_grad_enabled() else x.add_(other)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
