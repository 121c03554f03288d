"""A packed forward of decoders with RMS norms before each half of a block, grouped-query heads and rotary positions.

Fused projections and norms, prepacked weights, rotation inside the attention, a direction of choice, early exit and a
trimmed last layer lie outside transformers' attention interface.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.linear import FusedLinear
from ...nn.rotary import RotaryEmbedding
from ...ops.attention import varlen_attention
from ...ops.norm import add_rms_norm

#: most bytes of block weights that are also kept prepacked; a model of billions of parameters shall not lie there twice
MOST_PREPACKED_BYTES = 4 * 2**30

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the others change with the length of each batch
_ROTATIONS = ("default", "linear", "llama3", "yarn")
# class of the module between gate and product -> its name in a config
_ACTIVATIONS = {
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.GELUTanh": "gelu_pytorch_tanh",
}
_LEAST_TABLE_ROWS = 512


@dataclass(frozen=True)
class _Family:
    """What tells one family's blocks from another's."""

    #: whether the config's sliding window holds in "no" layer, in "all", or where its "layer_types" say so
    windows: str = "no"
    #: norms multiply by 1 + weight, and the embeddings are scaled
    gemma: bool = False
    #: queries and keys are normed, head by head
    head_norms: bool = False
    #: what attention and feed-forward give is normed before it is added
    output_norms: bool = False


_FAMILIES = {
    "transformers.models.llama.modeling_llama.LlamaModel": _Family(),
    "transformers.models.mistral.modeling_mistral.MistralModel": _Family(windows="all"),
    "transformers.models.qwen2.modeling_qwen2.Qwen2Model": _Family(windows="layer_types"),
    "transformers.models.qwen3.modeling_qwen3.Qwen3Model": _Family(windows="layer_types", head_norms=True),
    "transformers.models.gemma.modeling_gemma.GemmaModel": _Family(gemma=True),
    "transformers.models.gemma2.modeling_gemma2.Gemma2Model": _Family("layer_types", gemma=True, output_norms=True),
}


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
        self._family = _FAMILIES[_name(model)]
        weights = sum(parameter.nbytes for parameter in model.layers.parameters())
        prepack = weights <= MOST_PREPACKED_BYTES
        windows = _windows(model.config, self._family)
        self._blocks = [
            _Block(layer, self._family, window, prepack) for layer, window in zip(model.layers, windows, strict=True)
        ]
        self._parts = [
            (module._modules, name, part) for module in model.modules() for name, part in module.named_children()
        ]
        self._rotary: RotaryEmbedding | None = None

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
            position_ids: ``[T]``, at least 0, for the rotation alone: which tokens come before which is the order of
                the rows. By default they count from 0 in each sequence. The largest is read on the host.
            token_type_ids: None; these models have no token types.
            last_rows: rows that are wanted, int64 ``[R]``, rising, and their int32 offsets ``[S + 1]`` by sequence.
                The last layer to run computes no others (but all keys and values).
            layer: stop after so many layers, 0 to N: transformers' ``output_hidden_states[layer]``, without the last
                norm unless it is N. By default all layers run.

        Returns:
            ``[T, H]``, or ``[R, H]`` with ``last_rows``.

        Raises:
            ValueError: the model is in training mode or has other parts than it was made with, or the arguments are
                not as above.
        """
        count = len(self._blocks) if layer is None else layer
        self._check(token_type_ids, count)
        batch = self._batch(input_ids, cu_seqlens, max_seqlen, position_ids)
        kept = None if last_rows is None else _kept(last_rows, cu_seqlens)
        added, stream = self.model.embed_tokens(input_ids), None
        for place, block in enumerate(self._blocks[:count], 1):
            added, stream = block(added, stream, batch, kept if place == count else None)
        if count == 0:
            return added if kept is None else added[kept.rows]
        if count == len(self._blocks):
            return _add_norm(added, stream, self.model.norm, self._family)[0]
        return added if stream is None else stream + added

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
        if any(owner.get(name) is not part for owner, name, part in self._parts):
            raise ValueError(
                "DecoderBackbone: model must have the layers that it was made with, got others in their place"
            )
        if token_type_ids is not None:
            raise ValueError("DecoderBackbone: token_type_ids must be None, got a tensor")
        if not 0 <= count <= len(self._blocks):
            raise ValueError(f"DecoderBackbone: layer must be from 0 to {len(self._blocks)}, got {count}")

    def _batch(self, ids: Tensor, cu_seqlens: Tensor, longest: int, positions: Tensor | None) -> _Batch:
        rows = longest
        if positions is not None and positions.numel():
            rows = max(rows, int(positions.max()) + 1)
        rotary = self._tables(rows, ids.device)
        causal = not self.bidirectional and getattr(self.model.config, "is_causal", True)
        return _Batch(cu_seqlens, longest, rotary, positions, causal, not self.bidirectional)

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

    def visible(self, window: int | None) -> dict[str, Any]:
        """What `varlen_attention` is told of the keys that a query sees, in a layer of that window."""
        if window is None or not self.windowed:
            return {"causal": self.causal}
        # transformers counts the query's own key into a causal window, and not into one of both directions
        return {"causal": True, "window_left": window - 1} if self.causal else _both_ways(window)


def _both_ways(window: int) -> dict[str, Any]:
    return {"window_left": window, "window_right": window}


@dataclass(frozen=True)
class _Kept:
    """Rows that the last block computes: their numbers [R], offsets [S + 1] and places in their texts, int32 [R]."""

    rows: Tensor
    cu_seqlens: Tensor
    places: Tensor


def _kept(last_rows: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> _Kept:
    rows, offsets = last_rows
    starts = cu_seqlens[:-1].repeat_interleave(offsets.diff(), output_size=len(rows))
    return _Kept(rows, offsets, (rows - starts).to(torch.int32))


class _Block:
    """One block. The residual stream and what is to be added to it travel apart, so that a norm does the addition."""

    def __init__(self, layer: Any, family: _Family, window: int | None, prepack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.family, self.window = family, window
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.softcap = getattr(attention, "attn_logit_softcapping", None) or 0.0
        self.head_norms = (attention.q_norm, attention.k_norm) if family.head_norms else None
        # each is prepacked when first used: a block that is always trimmed never packs the three together
        self.qkv, self.q, self.kv = (FusedLinear(each, prepack=prepack) for each in ((q, k, v), (q,), (k, v)))
        self.mixed = FusedLinear((attention.o_proj,), prepack=prepack)
        # apart from ``up``: the activation then runs inside the product, and both factors are dense
        self.gate = FusedLinear((mlp.gate_proj,), _ACTIVATIONS[_name(mlp.act_fn)], mlp.act_fn, prepack=prepack)
        self.up = FusedLinear((mlp.up_proj,), prepack=prepack)
        self.down = FusedLinear((mlp.down_proj,), prepack=prepack)
        self.attention_norm = layer.input_layernorm
        if family.output_norms:
            self.feed_forward_norm = layer.pre_feedforward_layernorm
            self.output_norms = (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
        else:
            self.feed_forward_norm = layer.post_attention_layernorm

    def __call__(
        self, added: Tensor, stream: Tensor | None, batch: _Batch, kept: _Kept | None
    ) -> tuple[Tensor, Tensor]:
        """From the stream and what is still to be added to it to the same after this block; ``kept`` rows alone."""
        normed, stream = _add_norm(added, stream, self.attention_norm, self.family)
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

    def _attend(self, normed: Tensor, batch: _Batch, kept: _Kept | None) -> Tensor:
        q, k, v = self._heads(normed, kept)
        options = batch.visible(self.window)
        if batch.positions is None:
            options |= {"rope_cos": batch.rotary.cos, "rope_sin": batch.rotary.sin}
        else:  # not in the attention, where positions would also say what comes before what
            q = batch.rotary.rotate(q, batch.positions if kept is None else batch.positions[kept.rows])
            k = batch.rotary.rotate(k, batch.positions)
        mixed = varlen_attention(
            q,
            k,
            v,
            batch.cu_seqlens if kept is None else kept.cu_seqlens,
            batch.cu_seqlens,
            batch.longest,
            batch.longest,
            scale=self.scale,
            softcap=self.softcap,
            positions_q=None if kept is None else kept.places,
            **options,
        )
        return self.mixed(mixed.flatten(1))

    def _heads(self, normed: Tensor, kept: _Kept | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[T, Hq, D]`` (of the kept rows), keys and values ``[T, Hkv, D]``, not yet rotated."""
        flat = self.qkv.parts(normed) if kept is None else (self.q(normed[kept.rows]), *self.kv.parts(normed))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in flat)
        if self.head_norms is not None:
            q, k = (_norm_heads(each, norm, self.family) for each, norm in zip((q, k), self.head_norms, strict=True))
        return q, k, v


def _add_norm(x: Tensor, stream: Tensor | None, norm: Any, family: _Family) -> tuple[Tensor, Tensor]:
    """The norm of ``stream + x`` and that sum."""
    if torch.is_autocast_enabled(x.device.type):  # which leaves the residual stream at the dtype of the weights
        with torch.autocast(x.device.type, enabled=False):
            return _add_norm(x.to(norm.weight.dtype), stream, norm, family)
    eps = norm.eps if family.gemma else norm.variance_epsilon
    return add_rms_norm(x, stream, norm.weight, eps=eps, one_plus_weight=family.gemma)


def _norm_heads(heads: Tensor, norm: Any, family: _Family) -> Tensor:
    """``[T, heads, D]`` normed over D."""
    return _add_norm(heads.reshape(-1, heads.shape[-1]), None, norm, family)[0].view(heads.shape)


def _windows(config: Any, family: _Family) -> list[int | None]:
    """Each layer's sliding window, as the mask that transformers makes for it has it."""
    layers = config.num_hidden_layers
    if family.windows == "all":
        return [config.sliding_window] * layers
    if family.windows == "layer_types":
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    return [None] * layers


# ---- which models ----


def supports(model: nn.Module) -> bool:
    """Whether `DecoderBackbone` computes what ``model``'s own forward does: class, config and parts, all checked."""
    family = _FAMILIES.get(_name(model))
    if family is None:
        return False
    config: Any = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return (
        heads % kv_heads == 0
        and _rotation_is_known(config)
        and _windows_are_known(config, family)
        and not getattr(config, "use_bidirectional_attention", None)
        and _parts_are_plain(model, family)
    )


def _rotation_is_known(config: Any) -> bool:
    parameters = getattr(config, "rope_parameters", None)
    return (
        isinstance(parameters, dict)
        and parameters.get("rope_type") in _ROTATIONS
        and parameters.get("partial_rotary_factor") in (None, 1.0)
    )


def _windows_are_known(config: Any, family: _Family) -> bool:
    if family.windows == "layer_types":
        kinds = getattr(config, "layer_types", None) or ()
        if len(kinds) != config.num_hidden_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            return False
        if "sliding_attention" not in kinds:
            return True
        return isinstance(config.sliding_window, int) and config.sliding_window > 0
    return family.windows == "no" or config.sliding_window is None or config.sliding_window > 0


def _parts_are_plain(model: Any, family: _Family) -> bool:
    """No adapters, quantisation, parametrisations or hooks, and one dtype that the kernels take."""
    source, prefix = sys.modules[type(model).__module__], type(model).__name__.removesuffix("Model")
    norm = getattr(source, f"{prefix}RMSNorm")
    embedding = getattr(source, f"{prefix}TextScaledWordEmbedding", None) if family.gemma else nn.Embedding
    parts: list[tuple[Any, Any]] = [
        (model.embed_tokens, embedding),
        (model.norm, norm),
        (model.rotary_emb, getattr(source, f"{prefix}RotaryEmbedding")),
    ]
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        dense = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        dense += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if family.output_norms:
            norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
        if family.head_norms:
            norms += [attention.q_norm, attention.k_norm]
        parts += [(module, nn.Linear) for module in dense] + [(module, norm) for module in norms]
        parts += [(layer, getattr(source, f"{prefix}DecoderLayer"))]
        parts += [(attention, getattr(source, f"{prefix}Attention")), (mlp, getattr(source, f"{prefix}MLP"))]
        if _name(mlp.act_fn) not in _ACTIVATIONS or not _head_dim_fits(attention.head_dim):
            return False
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return (
        all(type(module) is expected for module, expected in parts)
        and len(model.layers) == model.config.num_hidden_layers
        and not any(_is_intercepted(module) for module in model.modules())
        and len(dtypes) == 1
        and dtypes <= set(_DTYPES)
    )


def _head_dim_fits(head_dim: int) -> bool:
    return 16 <= head_dim <= 256 and head_dim % 8 == 0


def _is_intercepted(module: nn.Module) -> bool:
    """Whether something runs before, after or in place of the module's own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
