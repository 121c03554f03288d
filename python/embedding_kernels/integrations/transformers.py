"""The attention of transformers models by `varlen_attention`: one call, padded or packed, any model of the interface.

model = plug_attention(AutoModel.from_pretrained(...))
hidden = packed_forward(model, input_ids, cu_seqlens, max_seqlen)
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..ops.attention import varlen_attention
from ..ops.pooling import pack_padded, unpack_padded
from ._masks import BIDIRECTIONAL, cannot, mask_function, rows_and_visible

#: under which transformers knows the attention; a name with "flash" in it would be looked for on the hub
NAME = "embedding_kernels"

# T5's classes go through the interface without declaring that they support it
_UNDECLARED = ("t5", "mt5", "umt5")
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention")
_ABSOLUTE = ("position_embeddings", "embed_positions", "wpe", "rotary_emb")
_PLUG = "_embedding_kernels_plug"
_LAYER = "_embedding_kernels_layer"
_BUCKETS = "_embedding_kernels_buckets"
_running = threading.local()


@dataclass
class _Forward:
    """A forward that is running: the layers that came through, and the keywords that every layer must be handed."""

    came: set[str]
    keywords: tuple[str, ...]


@dataclass
class _Plug:
    """What `unplug_attention` needs and the guard compares with."""

    previous: str
    layers: frozenset[str]
    #: names of the forward's parameters
    parameters: frozenset[str]
    #: position of a text's first token
    first_position: int
    #: why the model cannot run packed, or None
    unpackable: str | None
    #: whether token types are embedded in a table of their own, so that type 0 is none
    token_types: bool
    handles: tuple[Any, ...] = ()
    #: keywords that every layer must be handed by the forward that torch.compile traces
    traced_keywords: tuple[str, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a model unpickled in another process finds the attention registered
        self.__dict__.update(state)
        _register()


def plug_attention(model: Any) -> Any:
    """Let a transformers model attend by `varlen_attention`, on whatever backend that runs.

    Padded batches are packed before each layer's attention and unpacked after it; the mask is read once for each kind
    of mask that a forward makes (a model with sliding windows has two). Packed batches (`packed_forward`, or the
    keywords ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k``) are never padded, and neither is
    a batch packed by ``position_ids`` alone; under torch.compile the keywords must be given. Direction and sliding
    window are those of the model's eager attention, read from its own mask. Keys and values of grouped-query heads are
    not repeated. T5's relative bias travels as a table ``[heads, 2R + 1]``, differentiable in its embedding. Outputs
    at padding are arbitrary, as with every attention of transformers.

    A guard raises RuntimeError after a forward in which an attention layer did not come through (not under
    torch.compile). ``model`` is changed in place; `unplug_attention` undoes it.

    Args:
        model: a transformers model whose attention goes through transformers' attention interface: encoders (BERT,
            RoBERTa, ModernBERT, T5's encoder, …) and decoders (Llama, Mistral, Qwen, Gemma, Phi, …).

    Returns:
        ``model``.

    Raises:
        ValueError: the model does not go through the interface (MPNet, DeBERTa, …) or attends across two sequences.
            Later, in a forward: dropout while training, output_attentions.
        NotImplementedError: in a forward, what the operator does not compute: a dense additive bias or 4-D mask,
            attention sinks, a mask that is neither causal, bidirectional nor a window.
    """
    layers = _attention_layers(model)
    if getattr(model, _PLUG, None) is not None:
        unplug_attention(model)
    _register()
    previous = model.config._attn_implementation
    _set_attention(model, NAME)
    for name, layer in layers.items():
        implementation = getattr(getattr(layer, "config", None), "_attn_implementation", NAME)
        if implementation != NAME:
            _set_attention(model, previous)
            _refuse(model, f"its layer {name} keeps the attention {implementation!r}")
    plug = _Plug(previous or "sdpa", frozenset(layers), *_packing_of(model))
    for name, layer in layers.items():
        setattr(layer, _LAYER, (name, plug))
        if hasattr(layer, "compute_bias"):
            _tabulate_bias(layer)
    plug.handles = (
        model.register_forward_pre_hook(_open_forward, with_kwargs=True),
        model.register_forward_hook(_close_forward, always_call=True),
    )
    setattr(model, _PLUG, plug)
    return model


def unplug_attention(model: Any) -> Any:
    """Undo `plug_attention`: the attention that the model had before. Returns ``model``, unchanged if never plugged."""
    plug = getattr(model, _PLUG, None)
    if plug is None:
        return model
    for handle in plug.handles:
        handle.remove()
    for layer in model.modules():
        layer.__dict__.pop(_LAYER, None)
        if _BUCKETS in layer._buffers:
            del layer.compute_bias, layer._buffers[_BUCKETS]
            layer._non_persistent_buffers_set.discard(_BUCKETS)
    delattr(model, _PLUG)
    _set_attention(model, plug.previous)
    return model


def _set_attention(model: Any, name: str | None) -> None:
    """In inner models too: transformers 5.17 leaves out one whose configuration is a copy of the model's (UMT5)."""
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation(name)


def packed_forward(
    model: Any,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    bidirectional: bool = False,
    **inputs: Any,
) -> Tensor:
    """Run a plugged model on packed tokens, without padding and without attention across texts.

    Args:
        model: a base model (``AutoModel``) after `plug_attention`.
        input_ids: int64 or int32 ``[T]``, the texts one after the other.
        cu_seqlens: int32 ``[S + 1]``, from 0, never falling, to T: text s holds tokens ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1]``.
        max_seqlen: at least the longest text.
        position_ids: ``[T]``; by default 0, 1, … within each text, from ``padding_idx + 1`` for models of RoBERTa's
            family.
        is_causal: False makes a decoder attend in both directions, within the model's sliding windows; None leaves the
            model its own direction.
        bidirectional: True lets every token see every token of its text: neither the model's causal mask nor its
            sliding windows count, in this forward and its backward alone.
        inputs: other arguments of the model; tensors ``[T]`` get the batch dimension 1. ``token_type_ids`` are 0
            unless given, where the model has a table for them.

    Returns:
        The last hidden state ``[T, H]``.

    Raises:
        ValueError: the model is not plugged, cannot be told positions, mixes tokens outside attention (state-space
            and convolution layers), or has no last hidden state; ``bidirectional`` with ``is_causal``, or with a layer
            that does not hear of it.
    """
    plug = getattr(model, _PLUG, None)
    if plug is None:
        raise ValueError(f"packed_forward: model must have been given to plug_attention first, got {_name(model)}")
    if input_ids.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            "packed_forward: input_ids must be [T] and cu_seqlens int32 [sequences + 1], got "
            f"{tuple(input_ids.shape)} and {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if plug.unpackable is not None:
        raise ValueError(f"packed_forward: {_name(model)} {plug.unpackable}")
    if bidirectional and is_causal is not None:
        raise ValueError(f"packed_forward: is_causal must be None where bidirectional is True, got {is_causal}")
    arguments = {
        name: value[None] if isinstance(value, Tensor) and value.shape == input_ids.shape else value
        for name, value in inputs.items()
    }
    if "position_ids" in plug.parameters:
        if position_ids is None:
            position_ids = _positions(cu_seqlens, input_ids.shape[0]) + plug.first_position
        arguments["position_ids"] = position_ids.to(torch.long)[None]
    if plug.token_types and arguments.get("token_type_ids") is None:
        arguments["token_type_ids"] = torch.zeros_like(input_ids)[None]
    if "use_cache" in plug.parameters:
        arguments["use_cache"] = False
    if is_causal is not None:
        arguments["is_causal"] = is_causal
    if bidirectional:
        arguments[BIDIRECTIONAL] = True
    output = model(
        input_ids=input_ids[None],
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max_seqlen,
        max_length_k=max_seqlen,
        **arguments,
    )
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(f"packed_forward: model must be a base model with a last hidden state, got {_name(model)}")
    return hidden[0]


def _positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [T]: the place of each token in its text, without reading the device."""
    places = torch.arange(total, device=cu_seqlens.device)
    text = torch.searchsorted(cu_seqlens, places.to(cu_seqlens.dtype), right=True) - 1
    return places - cu_seqlens[text]


def _packing_of(model: Any) -> tuple[frozenset[str], int, str | None, bool]:
    """The last four fields of `_Plug`."""
    parameters = frozenset(inspect.signature(type(model).forward).parameters)
    mixers = {kind for kind in getattr(model.config, "layer_types", None) or () if not _attends(kind)}
    unpackable = f"mixes tokens outside attention ({', '.join(sorted(mixers))})" if mixers else None
    first, token_types = 0, False
    for name, module in model.named_modules():
        token_types |= name.endswith("token_type_embeddings")
        if name.rpartition(".")[2] in _ABSOLUTE and "position_ids" not in parameters:
            unpackable = "takes no position_ids, so its texts cannot start anew"
        # RoBERTa's family counts positions from the one after padding's
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            first = padding + 1
    return parameters, first, unpackable, token_types


# ---- which models can be plugged ----


def _name(model: Any) -> str:
    return type(model).__name__


def _refuse(model: Any, why: str) -> NoReturn:
    raise ValueError(f"plug_attention: {_name(model)} cannot be plugged: {why}")


def _attends(layer_type: str) -> bool:
    return "attention" in layer_type and "linear" not in layer_type


def _goes_through(module: Any) -> bool:
    return _calls_interface(module.__class__)


@lru_cache(maxsize=1024)
def _calls_interface(module_class: Any) -> bool:
    """Whether a class, or one that it is derived from, looks its attention up in transformers' interface."""
    for base in module_class.__mro__:
        if base.__module__.startswith("torch.") or base.__module__ == "transformers.modeling_utils" or base is object:
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        if "ALL_ATTENTION_FUNCTIONS" in source and ("get_interface(" in source or "ALL_ATTENTION_FUNCTIONS[" in source):
            return True
    return False


def _attention_layers(model: Any) -> dict[str, nn.Module]:
    """Name -> module of every attention that goes through the interface; ValueError unless that is all of them."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"plug_attention: model must be a transformers PreTrainedModel, got {_name(model)}")
    config = model.config
    if not (getattr(model, "_supports_attention_backend", False) or config.model_type in _UNDECLARED):
        _refuse(
            model,
            "its class does not support transformers' attention interface (_supports_attention_backend is false), so "
            "it would go on with an attention of its own",
        )
    layers = {name: module for name, module in model.named_modules() if _goes_through(module)}
    if not layers:
        _refuse(model, "none of its modules calls transformers' attention interface")
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in _CROSS_ATTENTION:
            _refuse(model, f"{name} is cross attention; plug its encoder alone (T5EncoderModel, model.encoder, …)")
    for name in _layers_without(model, layers):
        _refuse(model, f"its layer {name} does not go through transformers' attention interface as the others do")
    return layers


def _layers_without(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[str]:
    """Names of layers that hold an attention of their own, though layers of the same class go through the interface."""
    through = {id(module) for module in layers.values()}

    def attends(block: nn.Module) -> bool:
        return any(id(module) in through for module in block.modules())

    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        classes = {type(block) for block in stack if attends(block)}
        for index, block in enumerate(stack):
            own = any("attention" in type(module).__name__.lower() for module in block.modules())
            if own and type(block) in classes and not attends(block):
                yield f"{name}.{index}"


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask_function)


# ---- T5's bias as a table ----


def _tabulate_bias(layer: Any) -> None:
    """Make a T5 attention compute the bias of each relative position once, [H, 2R + 1], in place of [1, H, T, T]."""
    if not hasattr(layer, "relative_attention_bias"):
        return
    parameters = inspect.signature(layer._relative_position_bucket).parameters
    options: dict[str, Any] = {}
    if "bidirectional" in parameters:
        options = {
            "bidirectional": not layer.is_decoder,
            "num_buckets": layer.relative_attention_num_buckets,
            "max_distance": layer.relative_attention_max_distance,
        }
    furthest = 2 * max(layer.relative_attention_max_distance, layer.relative_attention_num_buckets)
    device = layer.relative_attention_bias.weight.device
    buckets = layer._relative_position_bucket(torch.arange(-furthest, furthest + 1), **options)
    # beyond the reach R, on either side, every position is in the last bucket
    left, right = buckets[: furthest + 1].flip(0), buckets[furthest:]
    changes = (left.diff() != 0) | (right.diff() != 0)
    reach = int(changes.nonzero()[-1]) + 1 if changes.any() else 0
    layer.register_buffer(_BUCKETS, buckets[furthest - reach : furthest + reach + 1].to(device), persistent=False)
    layer.compute_bias = partial(_bias_table, layer)


def _bias_table(layer: Any, *sizes: Any, **options: Any) -> Tensor:
    """float32 [H, 2R + 1], in the place of T5Attention.compute_bias."""
    return layer.relative_attention_bias(getattr(layer, _BUCKETS)).T.float()


# ---- the guard ----


def _open_forward(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise ValueError(f"plug_attention: {_name(model)} has no attention weights to return; unset output_attentions")
    plug = getattr(model, _PLUG)
    keywords = tuple(name for name in ("cu_seq_lens_q", BIDIRECTIONAL) if kwargs.get(name) is not None)
    tracing = torch.compiler.is_compiling()
    plug.traced_keywords = keywords if tracing else ()
    if not tracing:
        _forwards()[id(plug)] = _Forward(set(), keywords)


def _close_forward(model: Any, args: Any, output: Any) -> None:
    plug = getattr(model, _PLUG)
    plug.traced_keywords = ()
    if torch.compiler.is_compiling() or id(plug) not in _forwards():
        return
    came = _forwards().pop(id(plug)).came
    if output is None:  # an exception ended the forward
        return
    missing = sorted(plug.layers - came)
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise RuntimeError(
            f"plug_attention: {len(missing)} of {len(came) + len(missing)} attention layers of {_name(model)} did not "
            f"come through the attention interface ({names}); unplug_attention restores the model's own"
        )


def _forwards() -> dict[int, _Forward]:
    """By the id of the model's `_Plug`, in this thread."""
    if not hasattr(_running, "forwards"):
        _running.forwards = {}
    return _running.forwards


def _note(layer: nn.Module, extras: dict[str, Any]) -> None:
    name, plug = getattr(layer, _LAYER, ("", None))
    expected = () if plug is None else plug.traced_keywords
    # none while tracing, where a layer runs by itself, or again for checkpointing
    if not torch.compiler.is_compiling() and id(plug) in _forwards():
        forward = _forwards()[id(plug)]
        forward.came.add(name)
        expected = forward.keywords
    if "cu_seq_lens_q" in expected and extras.get("cu_seq_lens_q") is None:
        cannot(layer, "was not handed its model's cu_seq_lens_q", "run it padded")
    if BIDIRECTIONAL in expected and not extras.get(BIDIRECTIONAL):
        raise ValueError(
            f"packed_forward: bidirectional must be False for a model with {_name(layer)}, which is not handed the "
            "keywords of its model's forward and would keep its own direction, got True"
        )


# ---- the attention function ----


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ``[B, H, S, D]`` in, ``[B, S, H, D]`` and no weights out."""
    _note(module, extras)
    table = _check_extras(module, attention_mask, dropout, position_bias, extras)
    rows, visible = rows_and_visible(module, query, key, attention_mask, is_causal, sliding_window, extras)
    if query.dtype != value.dtype:
        # rotary embedding in float32 under autocast
        query, key = query.to(value.dtype), key.to(value.dtype)
    causal = visible.upper == 0
    # without an order among the keys their positions do not matter
    ordered = table is not None or not visible.everything
    out = varlen_attention(
        _pack(query, rows.mask_q, rows.total_q),
        _pack(key, rows.mask_k, rows.total_k),
        _pack(value, rows.mask_k, rows.total_k),
        rows.cu_seqlens_q,
        rows.cu_seqlens_k,
        rows.max_seqlen_q,
        rows.max_seqlen_k,
        scale=scaling,
        causal=causal,
        window_left=-1 if visible.lower is None else -visible.lower,
        window_right=-1 if visible.upper is None or causal else visible.upper,
        softcap=softcap or 0.0,
        bias_table=table,
        positions_q=rows.positions_q if ordered else None,
        positions_k=rows.positions_k if ordered else None,
    )
    if rows.mask_q is None:
        return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None
    return unpack_padded(out, rows.mask_q), None


def _pack(heads: Tensor, mask: Tensor | None, total: int) -> Tensor:
    """[B, H, S, D] -> [T, H, D]."""
    rows = heads.transpose(1, 2)
    return rows.flatten(0, 1) if mask is None else pack_padded(rows, mask, total)


def _check_extras(
    module: nn.Module, mask: Tensor | None, dropout: float, bias: Tensor | None, extras: dict[str, Any]
) -> Tensor | None:
    """The bias table, or None; raises for whatever else would change the scores."""
    if dropout:
        raise ValueError(
            f"plug_attention: {_name(module)} asks for attention dropout {dropout}, which is not supported; set the "
            "config's attention dropout to 0, or call model.eval()"
        )
    for name in ("s_aux", "sinks", "head_mask", "cache", "block_table", "block_indices", "indices"):
        if extras.get(name) is not None:
            cannot(module, f"passes {name}, which varlen_attention does not compute", "use its own attention")
    for name, value in extras.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name != "hidden_states":
            cannot(module, f"passes a tensor {name} that is not known to be harmless", "use its own attention")
    if mask is not None and mask.dim() != 2:
        cannot(module, f"got a mask of {mask.dim()} dimensions", "pass a mask [B, S] of ones and zeros, or none")
    if bias is None:
        return None
    if bias.dim() != 2:
        cannot(module, "adds a dense position bias to its scores", "only T5's relative bias is supported")
    return bias.float()


__all__ = ["NAME", "packed_forward", "plug_attention", "unplug_attention"]
