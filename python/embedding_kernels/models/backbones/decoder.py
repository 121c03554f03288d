"""A packed forward of decoders with RMS norms before each half of a block, grouped-query heads and rotary positions.

Fused projections and norms, prepacked weights, rotation inside the attention, a direction of choice, early exit and a
trimmed last layer lie outside transformers' attention interface.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...nn.linear import FusedLinear
from ...nn.rotary import RotaryEmbedding
from ...ops.attention import merge_attention, varlen_attention
from ...ops.norm import add_rms_norm, token_prepend_rms_norm
from .blocks import KeptRows, check_captured, class_name, kept_rows, under_autocast
from .decoder_support import ACTIVATIONS, FAMILIES, Family
from .decoder_support import supports as supports

#: most bytes of block weights that are also kept prepacked; a model of billions of parameters shall not lie there twice
MOST_PREPACKED_BYTES = 4 * 2**30

_LEAST_TABLE_ROWS = 512


@dataclass(frozen=True)
class Prepend:
    """Rows of the residual stream that are copied over others before each of some blocks (`token_prepend`).

    Attributes:
        source_rows: int64 ``[N]``, rows of the packed tokens; one may occur several times.
        target_rows: int64 ``[N]``, distinct rows.
        start: the first block, counted from 0, whose input is changed.
        stop: the first block after those whose input is changed; no copy is made where it is not above ``start``.
    """

    source_rows: Tensor
    target_rows: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class Prefix:
    """Tokens with which every sequence begins, as `DecoderBackbone.prefix` gives them: P keys and values a block.

    They are those of one set of weights: made before these change, they are wrong after.

    Attributes:
        length: P.
        keys: ``[P, Hkv, D]`` for each block, not yet rotated.
        values: the same.
    """

    length: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class DecoderBackbone:
    """A transformers `LlamaModel`, `MistralModel`, `Qwen2Model`, `Qwen3Model`, `GemmaModel` or `Gemma2Model`, packed.

    Nothing is padded: hidden states are ``[T, H]`` from the embeddings to the last norm. The weights are the model's
    own, read at every call; `FusedLinear` says when a copy in oneDNN's layout stands beside them, which is never where
    the blocks hold more than `MOST_PREPACKED_BYTES`. Differentiable where gradients are on. Without dropout, so the
    model must be in evaluation mode. Forward hooks on its parts do not run.

    Args:
        model: one that `supports` accepts.
        bidirectional: True lets every token see every token of its text, without sliding windows; False keeps the
            model's own direction and windows.
    """

    road = "packed decoder blocks"
    #: whether ``last_rows`` saves work
    trims = True

    def __init__(self, model: Any, bidirectional: bool = False) -> None:
        self.model = model
        self.bidirectional = bidirectional
        self._family = FAMILIES[class_name(model)]
        weights = sum(parameter.nbytes for parameter in model.layers.parameters())
        prepack = weights <= MOST_PREPACKED_BYTES
        windows = _windows(model.config, self._family)
        self._blocks = [
            _Block(place, layer, self._family, window, prepack)
            for place, (layer, window) in enumerate(zip(model.layers, windows, strict=True))
        ]
        self._parts = [
            (module._modules, name, part) for module in model.modules() for name, part in module.named_children()
        ]
        self._rotary: RotaryEmbedding | None = None

    def __call__(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        last_rows: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
        inputs_embeds: Tensor | None = None,
        prepend: Prepend | None = None,
        prefix: Prefix | None = None,
        final_norm: bool | None = None,
    ) -> Tensor:
        """Hidden states of packed sequences.

        Args:
            input_ids: integers ``[T]``; None with ``inputs_embeds``.
            cu_seqlens: int32 ``[S + 1]``, from 0, never falling, to T.
            max_seqlen: at least the longest sequence.
            position_ids: ``[T]``, at least 0, for the rotation alone: which tokens come before which is the order of
                the rows. By default they count from 0 in each sequence, or from the end of the prefix. The largest is
                read on the host.
            token_type_ids: None; these models have no token types.
            last_rows: rows that are wanted, int64 ``[R]``, rising, and their int32 offsets ``[S + 1]`` by sequence.
                The last layer to run computes no others (but all keys and values).
            layer: stop after so many layers, 0 to N: transformers' ``output_hidden_states[layer]``, without the last
                norm unless it is N. By default all layers run.
            inputs_embeds: ``[T, H]`` in place of what the embedding gives for ``input_ids`` (Gemma's are scaled).
            prepend: rows copied over others before some of the blocks; nothing else changes.
            prefix: tokens that stand before those of every sequence, from `prefix`, for at least as many layers. The
                sequences see them, and count their positions on, as if they were given with each.
            final_norm: whether the last norm is applied; by default where all layers run.

        Returns:
            ``[T, H]``, or ``[R, H]`` with ``last_rows``.

        Raises:
            ValueError: the model is in training mode or has other parts than it was made with, or the arguments are
                not as above; a prefix with ``position_ids`` or for a model that is not causal.
        """
        count = len(self._blocks) if layer is None else layer
        self._check(token_type_ids, count)
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"DecoderBackbone: one of input_ids and inputs_embeds must be given, got {given}")
        if prefix is not None:
            self._check_prefix(prefix, position_ids, count)
        added = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch = self._batch(len(added), cu_seqlens, max_seqlen, position_ids, prefix, prepend)
        kept = None if last_rows is None else kept_rows(last_rows, cu_seqlens)
        added, stream = self._run(added, batch, kept, count)
        if count == len(self._blocks) if final_norm is None else final_norm:
            return _add_norm(added, stream, self.model.norm, self._family)[0]
        return added if stream is None else stream + added

    def prefix(self, input_ids: Tensor, layer: int | None = None) -> Prefix:
        """Keys and values of tokens with which many sequences begin, for calls that stop after ``layer`` or before.

        A causal model gives such tokens the same states whatever follows them.

        Args:
            input_ids: integers ``[P]``, the tokens from position 0 on.
            layer: layers, 0 to N; all of them by default.

        Raises:
            ValueError: as a call does; the model is not causal.
        """
        count = len(self._blocks) if layer is None else layer
        self._check(None, count)
        self._check_causal()
        length = len(input_ids)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
        batch = replace(self._batch(length, cu_seqlens, length, None, None, None), collected=[])
        # the last block gives keys and values alone
        none = KeptRows(cu_seqlens[:0].long(), torch.zeros_like(cu_seqlens), cu_seqlens[:0])
        self._run(self.model.embed_tokens(input_ids), batch, none, count)
        keys, values = zip(*batch.collected, strict=True) if batch.collected else ((), ())
        return Prefix(length, keys, values)

    def forget(self) -> None:
        """Drop all prepacked weights; the next call makes them again."""
        self._rotary = None
        for block in self._blocks:
            block.forget()

    def _check(self, token_type_ids: Tensor | None, count: int) -> None:
        if self.model.training:
            raise ValueError(
                "DecoderBackbone: model must be in evaluation mode (call .eval()), got one in training mode"
            )
        check_captured("DecoderBackbone", self._parts)
        if token_type_ids is not None:
            raise ValueError("DecoderBackbone: token_type_ids must be None, got a tensor")
        if not 0 <= count <= len(self._blocks):
            raise ValueError(f"DecoderBackbone: layer must be from 0 to {len(self._blocks)}, got {count}")

    @property
    def _causal(self) -> bool:
        return not self.bidirectional and getattr(self.model.config, "is_causal", True)

    def _check_causal(self) -> None:
        if not self._causal:
            raise ValueError("DecoderBackbone: prefix must be None where tokens see those after them, got one")

    def _check_prefix(self, prefix: Prefix, positions: Tensor | None, count: int) -> None:
        self._check_causal()
        if positions is not None:
            raise ValueError("DecoderBackbone: position_ids must be None with a prefix, got a tensor")
        if len(prefix.keys) < count:
            raise ValueError(f"DecoderBackbone: prefix must hold {count} layers, got {len(prefix.keys)}")

    def _batch(
        self,
        total: int,
        cu_seqlens: Tensor,
        longest: int,
        positions: Tensor | None,
        prefix: Prefix | None,
        prepend: Prepend | None,
    ) -> _Batch:
        rows = longest if prefix is None else longest + prefix.length
        if positions is not None and positions.numel():
            rows = max(rows, int(positions.max()) + 1)
        rotary = self._tables(rows, cu_seqlens.device)
        behind = None if prefix is None else _behind(prefix, cu_seqlens, total)
        return _Batch(cu_seqlens, longest, rotary, positions, self._causal, not self.bidirectional, behind, prepend)

    def _run(self, added: Tensor, batch: _Batch, kept: KeptRows | None, count: int) -> tuple[Tensor, Tensor | None]:
        """The stream after ``count`` blocks and what is still to be added to it; the last gives ``kept`` rows alone."""
        stream = None
        for place, block in enumerate(self._blocks[:count], 1):
            added, stream = block(added, stream, batch, kept if place == count else None)
        return (added[kept.rows] if kept is not None and count == 0 else added), stream

    def _tables(self, rows: int, device: torch.device) -> RotaryEmbedding:
        """Cosines and sines of at least so many positions, kept from call to call."""
        rotary = self._rotary
        if rotary is None or rotary.max_positions < rows or rotary.cos.device != device:
            rows = max(_LEAST_TABLE_ROWS, 1 << (rows - 1).bit_length() if rows else 0)
            # an inference tensor could not be saved for a later backward
            with torch.inference_mode(False):
                rotary = self._rotary = RotaryEmbedding.from_config(self.model.config, rows).to(device)
        return rotary


@dataclass(frozen=True)
class _Batch:
    """What all blocks share in one call."""

    cu_seqlens: Tensor
    longest: int
    rotary: RotaryEmbedding
    #: positions of the rotation [T], where they are not the places in the texts
    positions: Tensor | None
    causal: bool
    windowed: bool
    behind: _Behind | None
    prepend: Prepend | None
    #: where each block puts its keys and values, for a prefix
    collected: list[tuple[Tensor, Tensor]] | None = None

    def copies_before(self, place: int) -> Prepend | None:
        """The copies before the block of that place."""
        prepend = self.prepend
        return prepend if prepend is not None and prepend.start <= place < prepend.stop else None

    def visible(self, window: int | None) -> dict[str, Any]:
        """What `varlen_attention` is told of the keys that a query sees, in a layer of that window."""
        if window is None or not self.windowed:
            return {"causal": self.causal}
        # transformers counts the query's own key into a causal window, and not into one of both directions
        return {"causal": True, "window_left": window - 1} if self.causal else _both_ways(window)


def _both_ways(window: int) -> dict[str, Any]:
    return {"window_left": window, "window_right": window}


@dataclass(frozen=True)
class _Behind:
    """A batch whose sequences stand behind a prefix: one sequence of all queries over the prefix's keys."""

    prefix: Prefix
    #: int32 [T]: places in the sequences, counted from the end of the prefix
    positions: Tensor
    #: int32 [P]
    prefix_positions: Tensor
    #: int32 [2] each
    cu_prefix: Tensor
    cu_queries: Tensor


def _behind(prefix: Prefix, cu_seqlens: Tensor, total: int) -> _Behind:
    device, length = cu_seqlens.device, prefix.length
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
    places = torch.arange(total, dtype=torch.int32, device=device) - starts
    prefix_positions = torch.arange(length, dtype=torch.int32, device=device)
    return _Behind(
        prefix, places + length, prefix_positions, _one_sequence(length, device), _one_sequence(total, device)
    )


def _one_sequence(rows: int, device: torch.device) -> Tensor:
    """Its offsets, made without a copy from the host."""
    return torch.arange(2, dtype=torch.int32, device=device) * rows


class _Block:
    """One block. The residual stream and what is to be added to it travel apart, so that a norm does the addition."""

    def __init__(self, place: int, layer: Any, family: Family, window: int | None, prepack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.place = place
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.family, self.window = family, window
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.softcap = getattr(attention, "attn_logit_softcapping", None) or 0.0
        self.head_norms = (attention.q_norm, attention.k_norm) if family.head_norms else None
        # each is prepacked when first used: a block that is always trimmed never packs the three together
        self.qkv, self.q, self.kv = (FusedLinear(each, prepack=prepack) for each in ((q, k, v), (q,), (k, v)))
        self.mixed = FusedLinear((attention.o_proj,), prepack=prepack)
        # apart from ``up``: the activation then runs inside the product, and both factors are dense
        self.gate = FusedLinear((mlp.gate_proj,), ACTIVATIONS[class_name(mlp.act_fn)], mlp.act_fn, prepack=prepack)
        self.up = FusedLinear((mlp.up_proj,), prepack=prepack)
        self.down = FusedLinear((mlp.down_proj,), prepack=prepack)
        self.attention_norm = layer.input_layernorm
        if family.output_norms:
            self.feed_forward_norm = layer.pre_feedforward_layernorm
            self.output_norms = (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
        else:
            self.feed_forward_norm = layer.post_attention_layernorm

    def __call__(
        self, added: Tensor, stream: Tensor | None, batch: _Batch, kept: KeptRows | None
    ) -> tuple[Tensor, Tensor]:
        """From the stream and what is still to be added to it to the same after this block; ``kept`` rows alone."""
        normed, stream = _add_norm(added, stream, self.attention_norm, self.family, batch.copies_before(self.place))
        added = self._attend(normed, batch, kept)
        if kept is not None:
            stream = stream[kept.rows]
        if self.family.output_norms:
            added = _add_norm(added, None, self.output_norms[0], self.family)[0]
        normed, stream = _add_norm(added, stream, self.feed_forward_norm, self.family)
        gate, up = self.gate(normed), self.up(normed)
        added = self.down(gate * up if torch.is_grad_enabled() else gate.mul_(up))
        if self.family.output_norms:
            added = _add_norm(added, None, self.output_norms[1], self.family)[0]
        return added, stream

    def forget(self) -> None:
        for linear in (self.qkv, self.q, self.kv, self.mixed, self.gate, self.up, self.down):
            linear.forget()

    def _attend(self, normed: Tensor, batch: _Batch, kept: KeptRows | None) -> Tensor:
        q, k, v = self._heads(normed, kept)
        if batch.collected is not None:
            batch.collected.append((k.contiguous(), v.contiguous()))
        mix = self._mix if batch.behind is None else self._mix_with_prefix
        return self.mixed(mix(q, k, v, batch, kept).flatten(1))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, batch: _Batch, kept: KeptRows | None) -> Tensor:
        """Attention of each sequence over itself, ``[Tq, Hq, D]``."""
        options = self._options(batch)
        if batch.positions is None:
            options |= {"rope_cos": batch.rotary.cos, "rope_sin": batch.rotary.sin}
        else:  # not in the attention, where positions would also say what comes before what
            q = batch.rotary.rotate(q, batch.positions if kept is None else batch.positions[kept.rows])
            k = batch.rotary.rotate(k, batch.positions)
        cu_seqlens_q = batch.cu_seqlens if kept is None else kept.cu_seqlens
        places = None if kept is None else kept.places
        return varlen_attention(
            q, k, v, cu_seqlens_q, batch.cu_seqlens, batch.longest, batch.longest, positions_q=places, **options
        )

    def _mix_with_prefix(self, q: Tensor, k: Tensor, v: Tensor, batch: _Batch, kept: KeptRows | None) -> Tensor:
        """The same over the prefix and itself; positions tell rotation, causality and windows in both parts."""
        behind = batch.behind
        assert behind is not None
        options = self._options(batch) | {
            "rope_cos": batch.rotary.cos,
            "rope_sin": batch.rotary.sin,
            "positions_q": behind.positions if kept is None else behind.positions[kept.rows],
        }
        longest, length = batch.longest, behind.prefix.length
        cu_seqlens_q, cu_together = batch.cu_seqlens, behind.cu_queries
        if kept is not None:
            cu_seqlens_q, cu_together = kept.cu_seqlens, _one_sequence(len(q), q.device)
        own = varlen_attention(
            q, k, v, cu_seqlens_q, batch.cu_seqlens, longest, longest,
            positions_k=behind.positions, return_lse=True, **options,
        )  # fmt: skip
        shared = varlen_attention(
            q, behind.prefix.keys[self.place], behind.prefix.values[self.place], cu_together, behind.cu_prefix,
            len(q), length, positions_k=behind.prefix_positions, return_lse=True, **options,
        )  # fmt: skip
        return merge_attention(*own, *shared)[0]

    def _options(self, batch: _Batch) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, **batch.visible(self.window)}

    def _heads(self, normed: Tensor, kept: KeptRows | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[T, Hq, D]`` (of the kept rows), keys and values ``[T, Hkv, D]``, not yet rotated."""
        flat = self.qkv.parts(normed) if kept is None else (self.q(normed[kept.rows]), *self.kv.parts(normed))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in flat)
        if self.head_norms is not None:
            q, k = (_norm_heads(each, norm, self.family) for each, norm in zip((q, k), self.head_norms, strict=True))
        return q, k, v


def _add_norm(
    x: Tensor, stream: Tensor | None, norm: Any, family: Family, prepend: Prepend | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of ``stream + x``, after the copies of ``prepend`` in it, and that sum."""
    if under_autocast(x):  # which leaves the residual stream at the dtype of the weights
        with torch.autocast(x.device.type, enabled=False):
            return _add_norm(x.to(norm.weight.dtype), stream, norm, family, prepend)
    eps = norm.eps if family.gemma else norm.variance_epsilon
    options: dict[str, Any] = {"eps": eps, "one_plus_weight": family.gemma}
    if prepend is None:
        return add_rms_norm(x, stream, norm.weight, **options)
    return token_prepend_rms_norm(x, stream, prepend.source_rows, prepend.target_rows, norm.weight, **options)


def _norm_heads(heads: Tensor, norm: Any, family: Family) -> Tensor:
    """``[T, heads, D]`` normed over D."""
    return _add_norm(heads.reshape(-1, heads.shape[-1]), None, norm, family)[0].view(heads.shape)


def _windows(config: Any, family: Family) -> list[int | None]:
    """Each layer's sliding window, as the mask that transformers makes for it has it."""
    layers = config.num_hidden_layers
    if family.windows == "all":
        return [config.sliding_window] * layers
    if family.windows == "layer_types":
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    return [None] * layers
