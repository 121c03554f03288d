"""NV-Embed as it was published: a checkpoint in its layout with seeded weights, and its computation, from the formulas.

The computation is padded, the latents' keys and values are projected as they stand, and nothing is folded or packed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .conftest import WORDS

DECODER, HEAD = "embedding_model.", "latent_attention_model."
TASK = "find the sun"
INSTRUCTION = f"Instruct: {TASK}\nQuery: "
#: a tensor of the checkpoint by its name
Read = Callable[[str], Tensor]
# a prime number of random values, so that no two rows of a matrix are alike
_POOL = 16_777_213


@dataclass(frozen=True)
class Sizes:
    """Of the decoder and of the head."""

    width: int = 64
    inner: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    window: int = 6  # less than most texts: it must not count
    vocabulary: int = 0  # 0: as many as the tokenizer has
    latents: int = 7
    cross_heads: int = 3
    cross_dim: int = 10

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, of the whole checkpoint."""
        width, inner = self.width, self.inner
        kv, cross = self.kv_heads * self.head_dim, self.cross_heads * self.cross_dim
        decoder: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocabulary, width), "norm.weight": (width,)}
        for layer in range(self.layers):
            block = {
                "input_layernorm": (width,),
                "self_attn.q_proj": (width, width),
                "self_attn.k_proj": (kv, width),
                "self_attn.v_proj": (kv, width),
                "self_attn.o_proj": (width, width),
                "post_attention_layernorm": (width,),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
            }
            decoder.update({f"layers.{layer}.{name}.weight": shape for name, shape in block.items()})
        attention, feed_forward = "cross_attend_blocks.0.", "cross_attend_blocks.1."
        head = {
            "latents": (self.latents, width),
            f"{attention}norm.weight": (width,),
            f"{attention}norm.bias": (width,),
            f"{attention}norm_context.weight": (width,),
            f"{attention}norm_context.bias": (width,),
            f"{attention}fn.to_q.weight": (cross, width),
            f"{attention}fn.to_kv.weight": (2 * cross, width),
            f"{attention}fn.to_out.weight": (width, cross),
            f"{feed_forward}norm.weight": (width,),
            f"{feed_forward}norm.bias": (width,),
            f"{feed_forward}fn.net.0.weight": (8 * width, width),
            f"{feed_forward}fn.net.0.bias": (8 * width,),
            f"{feed_forward}fn.net.2.weight": (width, 4 * width),
            f"{feed_forward}fn.net.2.bias": (width,),
        }
        parts = ((DECODER, decoder), (HEAD, head))
        return {prefix + name: shape for prefix, part in parts for name, shape in part.items()}


# ---- the directory ----


def write_directory(
    path: Path, sizes: Sizes, tokenizer: Any, dtype: torch.dtype = torch.float32, shards: int = 3, seed: int = 0
) -> Sizes:
    """A directory as NV-Embed's repository is, less its code. Returns the sizes, with the vocabulary's."""
    path.mkdir(exist_ok=True)
    vocabulary = sizes.vocabulary or len(tokenizer)
    sizes = Sizes(**{**vars(sizes), "vocabulary": vocabulary})
    tokenizer.save_pretrained(path)
    files = {
        "config.json": _config(sizes, dtype),
        # what the real one says, though its transformer pools by itself
        "modules.json": [
            {"idx": idx, "name": str(idx), "path": folder, "type": f"sentence_transformers.models.{kind}"}
            for idx, (folder, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2", "Normalize")))
        ],
        "sentence_bert_config.json": {"max_seq_length": 32768, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None},
        "1_Pooling/config.json": {"word_embedding_dimension": sizes.width, "pooling_mode_mean_tokens": True},
    }
    for name, value in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(value))
    _write_shards(path, sizes.shapes(), dtype, shards, seed)
    return sizes


def _config(sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    text = {
        "_name_or_path": "nvidia/NV-Embed-v2",
        "architectures": ["MistralModel"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "is_decoder": False,
        "max_position_embeddings": 32768,
        "model_type": "bidir_mistral",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": sizes.window,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": sizes.vocabulary,
    }
    head: dict[str, Any] = {"model_type": "latent_attention"}
    if (sizes.width, sizes.latents, sizes.cross_heads, sizes.cross_dim) != (4096, 512, 8, 4096):
        # the released file leaves these out: they are the defaults of the published class
        head |= {
            "num_latents_value": sizes.latents,
            "num_cross_heads": sizes.cross_heads,
            "hidden_dim": sizes.width,
            "latent_dim": sizes.width,
            "cross_dim_head": sizes.cross_dim,
        }
    return {
        "_name_or_path": "nvidia/NV-Embed-v2",
        "add_eos": True,
        "add_pad_token": True,
        "architectures": ["NVEmbedModel"],
        "auto_map": {
            "AutoConfig": "configuration_nvembed.NVEmbedConfig",
            "AutoModel": "modeling_nvembed.NVEmbedModel",
        },
        "hidden_size": sizes.width,
        "is_mask_instruction": True,
        "latent_attention_config": head,
        "mask_type": "b",
        "model_type": "nvembed",
        "padding_side": "right",
        "text_config": text,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.42.4",
    }


def _write_shards(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shards: int, seed: int) -> None:
    """In shards of about equal size, with their index; a shard is in memory at a time."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    total = sum(map(math.prod, shapes.values()))
    pool = torch.randn(min(_POOL, total), generator=generator)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    written, drawn = 0, 0
    for name, shape in shapes.items():
        shard[name] = _weight(name, shape, pool, drawn).to(dtype)
        drawn += math.prod(shape)
        if drawn * shards >= total * (written + 1):
            written += 1
            file = f"model-{written:05d}-of-{shards:05d}.safetensors"
            save_file(shard, path / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(shard, file))
            shard = {}
    index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _weight(name: str, shape: tuple[int, ...], pool: Tensor, start: int) -> Tensor:
    """Random values from a pool, of such a size that attention is neither uniform nor one token's."""
    count = math.prod(shape)
    values = pool[start % len(pool) :][:count]
    if len(values) < count:
        values = torch.cat((values, pool.repeat(-(-count // len(pool)))[: count - len(values)]))
    values = values.view(shape)
    if name.endswith(("embed_tokens.weight", "latents")):
        return values
    if len(shape) == 1:  # norms that are not those of a fresh model, and biases
        return 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
    return values * (1.5 / math.sqrt(shape[1]))


def tensors_of(path: Path) -> Read:
    """Reads the tensors of a directory, one at a time."""
    from safetensors import safe_open

    places = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]

    def read(name: str) -> Tensor:
        with safe_open(path / places[name], "pt") as shard:
            return shard.get_tensor(name)

    return read


# ---- tokenizers ----


def word_tokenizer() -> Any:
    """Whole words after a beginning-of-text token: a prompt has the same tokens alone as before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", ":", "Instruct", "Query", *TASK.split(), *WORDS]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_special_tokens(backend)


def merging_tokenizer() -> Any:
    """Byte pairs as in Llama's tokenizer, in which a word has the space before it: that of the prompt's end too."""
    from tokenizers import Tokenizer, models, normalizers

    words = [f"▁{word}" for word in dict.fromkeys([*WORDS, *TASK.split()])]
    prefixes = [word[:length] for word in words for length in range(2, len(word) + 1)]
    letters = sorted({*INSTRUCTION.replace(" ", "▁"), *"".join(words)})
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", *letters, *prefixes])
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    merges = list(dict.fromkeys((prefix[:-1], prefix[-1]) for prefix in prefixes))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _with_special_tokens(backend)


def _with_special_tokens(backend: Any) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


# ---- the computation ----


def tokenize(
    tokenizer: Any, texts: Sequence[str], instruction: str, longest: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and bool mask, padded on the right with the end-of-text token, which also ends each text."""
    batch = tokenizer(
        [instruction + text + tokenizer.eos_token for text in texts],
        padding=True,
        padding_side="right",
        truncation=longest is not None,
        max_length=longest,
        return_tensors="pt",
    )
    return batch["input_ids"], batch["attention_mask"].bool()


def pooled_tokens(tokenizer: Any, texts: Sequence[str], instruction: str, compat: bool, mask: Tensor) -> Tensor:
    """Which tokens are in the mean. The published code leaves out as many as the instruction has by itself, without
    counting the beginning-of-text token before it; its description leaves out the instruction's tokens."""
    kept = mask.clone()
    if not instruction:
        return kept
    if compat:
        kept[:, : len(tokenizer.tokenize(instruction))] = False
        return kept
    for row, text in enumerate(texts):
        spans = tokenizer(instruction + text, return_offsets_mapping=True)["offset_mapping"]
        inside = sum(end <= len(instruction) for _, end in spans)  # the beginning-of-text token has the span (0, 0)
        kept[row, :inside] = False
    return kept


def decode(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states of a transformers decoder whose mask is of padding alone, ``[B, L, width]``."""
    added = torch.zeros(mask.shape, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)
    seen = added[:, None, None].expand(-1, 1, mask.shape[1], -1)
    return model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state


def transformers_decoder(sizes: Sizes, read: Read, dtype: torch.dtype) -> Any:
    """transformers' `MistralModel` with the checkpoint's weights and eager attention."""
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=sizes.window,
        attn_implementation="eager",
    )
    model = MistralModel(config).eval()
    model.load_state_dict({name: read(DECODER + name) for name in model.state_dict()})
    rotary = model.rotary_emb
    model = model.to(dtype)
    model.rotary_emb = rotary.float()  # frequencies are never rounded to half precision
    return model


def exact_decode(sizes: Sizes, read: Read, ids: Tensor, mask: Tensor) -> Tensor:
    """The same in float64 throughout, from the formulas: transformers' norms and softmax are float32 in any dtype."""
    x = read(f"{DECODER}embed_tokens.weight")[ids].double()
    for layer in range(sizes.layers):

        def linear(inputs: Tensor, name: str, layer: int = layer) -> Tensor:
            return inputs @ read(f"{DECODER}layers.{layer}.{name}.weight").double().T

        def norm(inputs: Tensor, name: str, layer: int = layer) -> Tensor:
            return _rms_norm(inputs, read(f"{DECODER}layers.{layer}.{name}.weight"))

        normed = norm(x, "input_layernorm")
        q, k, v = (linear(normed, f"self_attn.{name}_proj").unflatten(-1, (-1, sizes.head_dim)) for name in "qkv")
        repeats = sizes.heads // sizes.kv_heads
        k, v = (_rotated(k).repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2))
        scores = torch.einsum("bqhd,bkhd->bhqk", _rotated(q), k) / math.sqrt(sizes.head_dim)
        probabilities = scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
        x = x + linear(torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2), "self_attn.o_proj")
        normed = norm(x, "post_attention_layernorm")
        gated = functional.silu(linear(normed, "mlp.gate_proj")) * linear(normed, "mlp.up_proj")
        x = x + linear(gated, "mlp.down_proj")
    return _rms_norm(x, read(f"{DECODER}norm.weight"))


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()


def _rotated(x: Tensor) -> Tensor:
    """``[B, L, heads, D]``, pairs (i, i + D/2) turned by position · 10000^(−2i/D)."""
    length, dim = x.shape[1], x.shape[3]
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def pool(sizes: Sizes, read: Read, hidden: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The head's mean over the kept tokens, not of length 1, and that of its absolute values; in ``hidden``'s dtype."""

    def weight(name: str) -> Tensor:
        return read(HEAD + name).to(hidden.dtype)

    def linear(inputs: Tensor, name: str) -> Tensor:
        return functional.linear(inputs, weight(f"{name}.weight"))

    def norm(inputs: Tensor, name: str) -> Tensor:
        return functional.layer_norm(inputs, (sizes.width,), weight(f"{name}.weight"), weight(f"{name}.bias"), 1e-5)

    attention, feed_forward = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    shape = (sizes.cross_heads, sizes.cross_dim)
    both = linear(norm(weight("latents"), f"{attention}norm_context"), f"{attention}fn.to_kv")
    keys, values = (part.unflatten(-1, shape) for part in both.chunk(2, -1))
    queries = linear(norm(hidden, f"{attention}norm"), f"{attention}fn.to_q").unflatten(-1, shape)
    scores = torch.einsum("blhd,rhd->blhr", queries, keys) / math.sqrt(sizes.cross_dim)
    mixed = torch.einsum("blhr,rhd->blhd", scores.softmax(-1), values).flatten(2)
    y = hidden + linear(mixed, f"{attention}fn.to_out")
    up = linear(norm(y, f"{feed_forward}norm"), f"{feed_forward}fn.net.0") + weight(f"{feed_forward}fn.net.0.bias")
    value, gate = up.chunk(2, -1)
    gated = value * functional.gelu(gate)
    z = y + linear(gated, f"{feed_forward}fn.net.2") + weight(f"{feed_forward}fn.net.2.bias")
    count = kept.sum(1, keepdim=True)
    counted = z * kept[..., None].float()
    return counted.sum(1) / count, counted.abs().sum(1) / count
