"""The tables of rotary position embedding that `varlen_attention` reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary position embedding, one row a position.

    With Dr = ``dim`` and f_i = θ^(−2i / Dr), or ``inv_freq`` where given::

        cos[p, i] = scaling · cos(p · f_i),    sin[p, i] = scaling · sin(p · f_i)

    `varlen_attention` and `rotate` turn dimension i with i + Dr/2 (the halves of Llama, not the neighbours of GPT-J).
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Args:
        dim: dimensions that are rotated, even, at most the head's.
        max_positions: rows P of the tables.
        theta: θ.
        inv_freq: float32 ``[dim / 2]``, frequencies in radians a position, in place of those of θ.
        scaling: factor of both tables (YaRN and others set it).

    Attributes:
        cos: float32 ``[P, dim / 2]``, a buffer that is not saved and stays float32 whatever the model is cast to.
        sin: the same.

    Raises:
        ValueError: ``dim`` odd or below 2, ``max_positions`` below 1, ``inv_freq`` of another size.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int,
        theta: float = 10000.0,
        *,
        inv_freq: Tensor | None = None,
        scaling: float = 1.0,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even and at least 2, got {dim}")
        if max_positions < 1:
            raise ValueError(f"RotaryEmbedding: max_positions must be at least 1, got {max_positions}")
        if inv_freq is None:
            inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if inv_freq.shape != (dim // 2,):
            raise ValueError(f"RotaryEmbedding: inv_freq must be [{dim // 2}], got {list(inv_freq.shape)}")
        self.dim, self.max_positions, self.scaling = dim, max_positions, scaling
        angles = torch.arange(max_positions, device=inv_freq.device).float()[:, None] * inv_freq.float()
        self.register_buffer("cos", angles.cos() * scaling, persistent=False)
        self.register_buffer("sin", angles.sin() * scaling, persistent=False)

    @classmethod
    def from_config(
        cls, config: Any, max_positions: int | None = None, layer_type: str | None = None
    ) -> RotaryEmbedding:
        """The tables of a transformers config; transformers computes what is not plain θ (linear, YaRN, Llama 3, …).

        Args:
            config: a config with ``rope_parameters``.
            max_positions: rows; the config's ``max_position_embeddings`` by default. For "longrope" it also chooses
                the factors: the long ones if it passes ``original_max_position_embeddings``.
            layer_type: "full_attention" or "sliding_attention" for models whose layers rotate differently (Gemma 3,
                ModernBERT).

        Raises:
            ValueError: no rotary parameters for the layer type, or "dynamic" ones, which change with each batch.
        """
        max_positions = config.max_position_embeddings if max_positions is None else max_positions
        parameters = getattr(config, "rope_parameters", None)
        if parameters is not None and layer_type is not None:
            parameters = parameters.get(layer_type)
        if not isinstance(parameters, dict) or "rope_type" not in parameters:
            raise ValueError(
                f"RotaryEmbedding.from_config: {type(config).__name__} must have rope_parameters for layer_type "
                f"{layer_type!r}, got {parameters}"
            )
        kind = parameters["rope_type"]
        if kind == "dynamic":
            raise ValueError(
                "RotaryEmbedding.from_config: rope_type 'dynamic' changes with each batch; use the model's"
            )
        if kind == "default":
            inv_freq, scaling = _default_frequencies(config, parameters), 1.0
        else:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            options = {} if layer_type is None else {"layer_type": layer_type}
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=max_positions, **options)
        return cls(2 * inv_freq.shape[0], max_positions, inv_freq=inv_freq, scaling=float(scaling))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x [T, H, D]`` rotated at ``positions [T]``, computed in float32; the dimensions past ``dim`` stay."""
        half = self.dim // 2
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        first, second = x[..., :half].float(), x[..., half : self.dim].float()
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return torch.cat((turned.to(x.dtype), x[..., self.dim :]), -1)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        # model.half() must not round the angles' cosines; a move to another device must go through
        super()._apply(lambda tensor: _same_dtype(fn(tensor), tensor), recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.dim}, max_positions={self.max_positions}, scaling={self.scaling}"


def _same_dtype(moved: Tensor, tensor: Tensor) -> Tensor:
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def _default_frequencies(config: Any, parameters: dict[str, Any]) -> Tensor:
    """Those of θ; transformers keeps this one rule in each model's file, not among its shared functions."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
