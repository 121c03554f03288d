"""What may follow pooling in a sentence-transformers directory: Dense, LayerNorm, Normalize (and Dropout, a no-op)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


class Head(Protocol):
    """A module class that can be read from its folder."""

    @classmethod
    def load(cls, path: Path, config: dict[str, Any]) -> nn.Module: ...


class Normalize(nn.Module):
    """Vectors of length 1: ``[S, D]`` to ``[S, D]``; the zero vector stays zero."""

    @classmethod
    def load(cls, path: Path, config: dict[str, Any]) -> Normalize:
        _check_sentence_level(path, config)
        return cls()

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


class Dense(nn.Module):
    """A linear layer and an activation, with an optional residual: ``[S, D]`` to ``[S, out_features]``."""

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation
        self.use_residual = residual
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @classmethod
    def load(cls, path: Path, config: dict[str, Any]) -> Dense:
        _check_sentence_level(path, config)
        dense = cls(
            config["in_features"],
            config["out_features"],
            config.get("bias", True),
            _activation(path, config.get("activation_function", "torch.nn.modules.activation.Tanh")),
            config.get("use_residual", False),
        )
        return _load_weights(dense, path)

    def forward(self, vectors: Tensor) -> Tensor:
        out = self.activation(self.linear(vectors))
        if self.use_residual:
            out = out + (self.residual(vectors) if hasattr(self, "residual") else vectors)
        return out


class LayerNorm(nn.Module):
    """Layer normalisation of the pooled vectors, ``[S, D]`` to ``[S, D]``."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    @classmethod
    def load(cls, path: Path, config: dict[str, Any]) -> LayerNorm:
        return _load_weights(cls(config["dimension"]), path)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.norm(vectors)


#: module name -> the class that reads it; None does nothing at inference
HEADS: dict[str, type[Head] | None] = {"Dense": Dense, "LayerNorm": LayerNorm, "Normalize": Normalize, "Dropout": None}


def load_latent_attention(path: Path) -> tuple[nn.Module, bool]:
    """What a latent-attention module of sentence-transformers saved: its head, folded, and its include_prompt."""
    from ..nn.latent_attention import LatentAttentionPooling

    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: modules.json asks for a latent-attention module")
    config = json.loads(file.read_text(encoding="utf-8"))
    include_prompt = bool(config.pop("include_prompt", True))
    try:
        with torch.device("meta"):  # its random values would take longer than the file
            head = LatentAttentionPooling(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} does not describe a latent-attention module: {error}") from error
    return _load_weights(head, path).fold().eval(), include_prompt


def _check_sentence_level(path: Path, config: dict[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        name = config.get(key) or "sentence_embedding"
        if name != "sentence_embedding":
            raise ValueError(f"{path / 'config.json'}: {key} must be sentence_embedding, got {name!r}")


def _activation(path: Path, full_name: str) -> nn.Module:
    # the name comes from a file: only classes of torch.nn, so that nothing else can be called
    activation = getattr(nn, full_name.rsplit(".", 1)[-1], None) if full_name.startswith("torch.nn.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise ValueError(f"{path / 'config.json'}: activation_function must be a module of torch.nn, got {full_name!r}")
    return activation()


def _load_weights(module: _Module, path: Path) -> _Module:
    from safetensors.torch import load_file

    file = path / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no weights: expected model.safetensors")
    weights = {name: weight.to(torch.float32, copy=True) for name, weight in load_file(file).items()}
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit its config.json: {' '.join(str(error).split())}") from error
    return module
