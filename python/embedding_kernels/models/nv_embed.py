"""NV-Embed's directory layout: a Mistral decoder and a latent-attention head in one sharded checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn.latent_attention import FoldedLatentAttentionPooling, LatentAttentionPooling

_BACKBONE, _HEAD = "embedding_model.", "latent_attention_model."
# the defaults of the published configuration class; a released config.json leaves most of them out
_HEAD_DEFAULTS = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "cross_dim_head": 4096,
}


def load_nv_embed(
    path: Path, device: torch.device, dtype: torch.dtype | None, attn_implementation: str | None
) -> tuple[nn.Module, FoldedLatentAttentionPooling]:
    """The decoder and the folded head of a directory with NV-Embed's layout, in evaluation mode on ``device``.

    Tensors go from the mapped files into place one by one, so that the weights are never held twice; the head's
    projections are dropped once they are folded.

    Raises:
        ValueError: a file or a tensor is missing, or a tensor has another shape than config.json says; the message
            names it.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if not config.get("text_config"):
        raise ValueError(f"{path / 'config.json'}: text_config must be the decoder's, got none")
    dtype = dtype or getattr(torch, str(config.get("torch_dtype") or config.get("dtype") or "float32"))
    decoder = _decoder_config(config["text_config"])
    head = _empty_head(path, {**_HEAD_DEFAULTS, **(config.get("latent_attention_config") or {})}, decoder.hidden_size)
    _fill(head, path, _HEAD, device, dtype)
    folded = head.fold().eval()
    del head
    model = _empty_decoder(decoder, attn_implementation)
    _fill(model, path, _BACKBONE, device, dtype)
    # its table of frequencies is in no checkpoint
    model.rotary_emb = type(model.rotary_emb)(config=model.config).to(device)
    return model.eval(), folded


def _decoder_config(text_config: dict[str, Any]) -> Any:
    from transformers import MistralConfig

    values = {name: value for name, value in text_config.items() if name not in ("model_type", "_name_or_path")}
    return MistralConfig(**{**values, "use_cache": False})


def _empty_decoder(config: Any, attn_implementation: str | None) -> Any:
    from transformers import MistralModel

    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        return MistralModel._from_config(config, **options)


def _empty_head(path: Path, sizes: dict[str, Any], decoder_width: int) -> LatentAttentionPooling:
    for name, of_name, width in (
        ("latent_dim", "hidden_dim", sizes["hidden_dim"]),
        ("hidden_dim", "the decoder's hidden_size", decoder_width),
    ):
        if sizes[name] != width:
            raise ValueError(f"{path / 'config.json'}: {name} must be {of_name} ({width}), got {sizes[name]}")
    with torch.device("meta"):
        return LatentAttentionPooling(
            sizes["hidden_dim"], sizes["num_latents_value"], sizes["num_cross_heads"], sizes["cross_dim_head"]
        )


def _fill(module: nn.Module, path: Path, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on the meta device its parameters: the checkpoint's tensors whose names begin with ``prefix``."""
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(path, prefix):
        if name in wanted and tensor.shape != wanted[name]:
            raise ValueError(
                f"{path}: {prefix}{name} must be {list(wanted[name])} by config.json, got {list(tensor.shape)}"
            )
        found[name] = tensor.to(device=device, dtype=dtype, copy=True)
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or surplus:
        what = f"must hold {prefix}{missing[0]}" if missing else f"must not hold {prefix}{surplus[0]}"
        raise ValueError(f"{path}: the weights {what} ({len(missing)} tensors missing, {len(surplus)} unknown)")
    module.load_state_dict(found, assign=True)


def _tensors(path: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by their names after ``prefix``, one shard after the other."""
    from safetensors import SafetensorError, safe_open

    for file in _shards(path, prefix):
        if not (path / file).is_file():
            raise ValueError(f"{path}: {file} is missing")
        try:
            with safe_open(path / file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - no mapping
                    if name.startswith(prefix):
                        yield name.removeprefix(prefix), shard.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path / file} cannot be read: {error}") from error


def _shards(path: Path, prefix: str) -> list[str]:
    """The files that hold tensors whose names begin with ``prefix``."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({file for name, file in places.items() if name.startswith(prefix)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must hold a weight_map from tensors to files, got another content") from error
