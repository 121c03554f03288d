"""GGUF files of Llama models (llama.cpp's format) as directories of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._files import whole_directory
from ._gguf_tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_MAGIC = b"GGUF"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MISSING = object()

# keys that change the computation, with the values that leave it LlamaForCausalLM's
_PLAIN = {
    "llama.attention.causal": (True,),
    "llama.attention.sliding_window": (0,),
    "llama.expert_count": (0,),
    "llama.rope.scaling.type": ("none",),
    "llama.rope.scaling.factor": (0.0, 1.0),
    "llama.rope.scale_linear": (1.0,),
}


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file in transformers' terms.

    Attributes:
        config: of `LlamaForCausalLM`.
        weights: its state dict; without ``lm_head.weight`` where the embeddings are tied.
        tokenizer: a `PreTrainedTokenizerFast` from the file's own vocabulary and merges.
    """

    config: LlamaConfig
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerFast

    def model(self) -> LlamaForCausalLM:
        """The model, in evaluation mode on the CPU, over these weights."""
        from transformers import LlamaForCausalLM

        model: Any = LlamaForCausalLM
        return model.from_pretrained(None, config=self.config, state_dict=self.weights, dtype=self.config.dtype).eval()

    def save(self, directory: Path) -> None:
        """Write config.json, model.safetensors and the tokenizer's files into an existing directory."""
        from safetensors.torch import save_file

        self.config.save_pretrained(directory)
        save_file(self.weights, directory / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes a file that only its owner reads, whatever the umask says
        (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)
        self.tokenizer.save_pretrained(directory)


def convert_gguf(path: str | Path, directory: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a GGUF file of a Llama model as a directory that transformers, sentence-transformers and `Embedder` load.

    Args:
        path: the GGUF file.
        directory: where config.json, model.safetensors and the tokenizer's files go: whole or not at all.
        dtype: of the weights: float32 (exact for every quantised type), bfloat16 or float16.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: the directory exists and is not empty.
        ValueError: see `read_gguf`.
    """
    target = Path(directory)
    with whole_directory(target) as partial:
        read_gguf(path, dtype).save(partial)
    return target


def read_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> GGUFModel:
    """Read a GGUF file of a Llama model: config, dequantised weights, tokenizer.

    llama.cpp keeps the rows of q and k in another order, because it rotates neighbouring coordinates where transformers
    rotates halves; they are put back.

    Args:
        path: the GGUF file.
        dtype: of the weights: float32, bfloat16 or float16.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a GGUF file, cut short, another architecture than llama, a setting, tokenizer or tensor type
            that is not supported, a tensor that is missing, unknown or of another shape; the message names it.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise ValueError(f"read_gguf: dtype must be float32, bfloat16 or float16, got {dtype}")
    header, tensors = _open(path)
    config = _read_config(header, tied=all(tensor.name != "output.weight" for tensor in tensors))
    tokenizer = read_tokenizer(header, config.max_position_embeddings)
    config.vocab_size = header.value("llama.vocab_size", len(tokenizer))
    config.dtype = dtype
    for name in ("bos", "eos", "pad"):
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    return GGUFModel(config, _read_weights(path, tensors, config, dtype), tokenizer)


def unpermute_rows(rows: Tensor, heads: int) -> Tensor:
    """Rows ``[heads * d, ...]`` of llama.cpp's q or k projection in transformers' order.

    Within a head llama.cpp has (0, d/2, 1, d/2 + 1, ...), so that coordinates which are rotated together are
    neighbours; transformers rotates the first half with the second.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def permute_rows(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `unpermute_rows`: what llama.cpp's own converter does to transformers' rows."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


class Header:
    """The metadata of a GGUF file; errors name the file and the key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self._values = values

    def value(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key; ValueError where it is missing and there is no default."""
        found = self._values.get(key, default)
        if found is _MISSING:
            raise ValueError(f"{self.path}: the file's metadata must hold {key!r}, which is missing")
        return found

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A positive integer; ValueError where it is something else, as a list with one number a layer."""
        found = self.value(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ValueError(f"{self.path}: {key} must be one positive integer, got {found!r}")
        return found


def _open(path: Path) -> tuple[Header, list[Any]]:
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path} is not a GGUF file: its first bytes must be {_MAGIC.decode()!r}")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        header = Header(path, {name: field.contents() for name, field in reader.fields.items()})
    except Exception as error:  # the reader slices what is not there, and fails in many ways
        raise ValueError(f"{path} is cut short or damaged: {str(error) or type(error).__name__}") from error
    if reader.byte_order != "I":
        raise ValueError(f"{path}: the byte order must be this machine's, got the other one")
    return header, reader.tensors


def _read_config(header: Header, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    architecture = header.value("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{header.path}: the architecture must be 'llama', got {architecture!r}")
    for key, plain in _PLAIN.items():
        if (found := header.value(key, plain[0])) not in plain:
            raise ValueError(f"{header.path}: {key} must be {plain[0]!r}, the only value supported, got {found!r}")
    hidden, heads = header.integer("llama.embedding_length"), header.integer("llama.attention.head_count")
    head = header.integer("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if header.integer(key, head) != head:
            raise ValueError(f"{header.path}: {key} must be the width of a head ({head}), got {header.value(key)}")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=header.integer("llama.feed_forward_length"),
        num_hidden_layers=header.integer("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=header.integer("llama.attention.head_count_kv", heads),
        head_dim=head,
        max_position_embeddings=header.integer("llama.context_length"),
        rms_norm_eps=_shortest(header.value("llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _shortest(header.value("llama.rope.freq_base", 10_000.0)),
        },
        tie_word_embeddings=tied,
    )


def _shortest(value: float) -> float:
    # GGUF keeps float32: 9.999999747378752e-06 was written as 1e-05
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the file goes."""

    name: str
    shape: tuple[int, ...]
    rotated_heads: int = 0  # rows that are permuted, in so many heads


def _places(config: LlamaConfig) -> Iterator[tuple[str, _Place]]:
    """What LlamaForCausalLM needs: names in the file, and the places of those tensors."""
    hidden, inner = config.hidden_size, config.intermediate_size
    assert config.num_key_value_heads is not None and config.head_dim is not None
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * config.head_dim, shared * config.head_dim
    yield "token_embd.weight", _Place("model.embed_tokens.weight", (config.vocab_size, hidden))
    yield "output_norm.weight", _Place("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield "output.weight", _Place("lm_head.weight", (config.vocab_size, hidden))
    block = {
        "attn_norm": _Place("input_layernorm", (hidden,)),
        "attn_q": _Place("self_attn.q_proj", (queries, hidden), heads),
        "attn_k": _Place("self_attn.k_proj", (keys, hidden), shared),
        "attn_v": _Place("self_attn.v_proj", (keys, hidden)),
        "attn_output": _Place("self_attn.o_proj", (hidden, queries)),
        "ffn_norm": _Place("post_attention_layernorm", (hidden,)),
        "ffn_gate": _Place("mlp.gate_proj", (inner, hidden)),
        "ffn_up": _Place("mlp.up_proj", (inner, hidden)),
        "ffn_down": _Place("mlp.down_proj", (hidden, inner)),
    }
    for layer in range(config.num_hidden_layers):
        for name, place in block.items():
            whole = f"model.layers.{layer}.{place.name}.weight"
            yield f"blk.{layer}.{name}.weight", _Place(whole, place.shape, place.rotated_heads)


def _read_weights(path: Path, tensors: list[Any], config: LlamaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    stored = {tensor.name: tensor for tensor in tensors}
    places = dict(_places(config))
    for problem, names in (("missing", places.keys() - stored.keys()), ("unknown", stored.keys() - places.keys())):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{path}: its tensors must be those of a Llama model; {problem}: {first}")
    weights = {}
    for name, place in places.items():
        rows = _dequantized(path, stored[name])
        if tuple(rows.shape) != place.shape:
            raise ValueError(f"{path}: {name} must have the shape {place.shape}, got {tuple(rows.shape)}")
        if place.rotated_heads:
            rows = unpermute_rows(rows, place.rotated_heads)
        # a copy in any case: float32 tensors are views of the file
        weights[place.name] = rows.to(dtype, copy=True).contiguous()
    return weights


def _dequantized(path: Path, tensor: Any) -> Tensor:
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ValueError(f"{path}: {tensor.name} must have a type that gguf can dequantize, got {kind}") from error
    return torch.from_numpy(values.copy() if not values.flags.writeable else values)
