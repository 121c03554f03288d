"""Which decoders our packed blocks compute, and what tells one family of them from another."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .blocks import class_name, head_dim_fits, is_intercepted

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the others change with the length of each batch
_ROTATIONS = ("default", "linear", "llama3", "yarn")
# class of the module between gate and product -> its name in a config
ACTIVATIONS = {
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.GELUTanh": "gelu_pytorch_tanh",
}


@dataclass(frozen=True)
class Family:
    """What tells one family's blocks from another's."""

    #: whether the config's sliding window holds in "no" layer, in "all", or where its "layer_types" say so
    windows: str = "no"
    #: norms multiply by 1 + weight, and the embeddings are scaled
    gemma: bool = False
    #: queries and keys are normed, head by head
    head_norms: bool = False
    #: what attention and feed-forward give is normed before it is added
    output_norms: bool = False


FAMILIES = {
    "transformers.models.llama.modeling_llama.LlamaModel": Family(),
    "transformers.models.mistral.modeling_mistral.MistralModel": Family(windows="all"),
    "transformers.models.qwen2.modeling_qwen2.Qwen2Model": Family(windows="layer_types"),
    "transformers.models.qwen3.modeling_qwen3.Qwen3Model": Family(windows="layer_types", head_norms=True),
    "transformers.models.gemma.modeling_gemma.GemmaModel": Family(gemma=True),
    "transformers.models.gemma2.modeling_gemma2.Gemma2Model": Family("layer_types", gemma=True, output_norms=True),
}


def supports(model: nn.Module) -> bool:
    """Whether `DecoderBackbone` computes what ``model``'s own forward does: class, config and parts, all checked."""
    family = FAMILIES.get(class_name(model))
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


def _windows_are_known(config: Any, family: Family) -> bool:
    if family.windows == "layer_types":
        kinds = getattr(config, "layer_types", None) or ()
        if len(kinds) != config.num_hidden_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            return False
        if "sliding_attention" not in kinds:
            return True
        return isinstance(config.sliding_window, int) and config.sliding_window > 0
    return family.windows == "no" or config.sliding_window is None or config.sliding_window > 0


def _parts_are_plain(model: Any, family: Family) -> bool:
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
        if class_name(mlp.act_fn) not in ACTIVATIONS or not head_dim_fits(attention.head_dim):
            return False
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return (
        all(type(module) is expected for module, expected in parts)
        and len(model.layers) == model.config.num_hidden_layers
        and not any(is_intercepted(module) for module in model.modules())
        and len(dtypes) == 1
        and dtypes <= set(_DTYPES)
    )
