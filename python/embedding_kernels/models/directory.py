"""Reading a model directory: what a Hugging Face or sentence-transformers directory asks of an embedder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from .heads import HEADS, Normalize, load_latent_attention

#: sentence-transformers' name of a pooling mode -> the mode of `embedding_kernels.segment_pool`
POOLING_MODES = {
    "cls": "first",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
#: the pooling that is a head with weights of its own, and the sentence-transformers module that holds it
LATENT_ATTENTION = "latent_attention"
_LATENT_ATTENTION_MODULE = "embedding_kernels.integrations.sentence_transformers.LatentAttentionPooling"
#: model_type in the config.json of NV-Embed's layout
NV_EMBED = "nvembed"
# the old form of a pooling config: one boolean a mode; several are concatenated in this order
_OLD_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
# keys of a transformer config that change no vector here, or are read below
_KNOWN_TRANSFORMER_KEYS = {
    "max_seq_length",
    "do_lower_case",
    "unpad_inputs",
    "transformer_task",
    "modality_config",
    "module_output_name",
}
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class DirectorySpec:
    """What a model directory asks of an embedder: everything but the transformer's weights."""

    transformer: Path
    #: sentence-transformers' names of modes, or "latent_attention" alone
    pooling: tuple[str, ...]
    include_prompt: bool = True
    heads: tuple[nn.Module, ...] = ()
    normalize: bool = False
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    #: the pooling head that "latent_attention" stands for
    latent_attention: nn.Module | None = None
    #: whether the directory's layout is NV-Embed's, with decoder and head in one checkpoint
    nv_embed: bool = False
    # what no directory says, but a `Preset`:
    bidirectional: bool | None = None
    prompt_length: str = "alone"
    instruction: str | None = None
    append_eos: bool = False
    matryoshka_dims: tuple[int, ...] = ()


def read_directory(path: str | Path) -> DirectorySpec:
    """Read a Hugging Face or sentence-transformers directory, or the Hub repository of that name.

    Raises
    ------
    FileNotFoundError
        if there is no such directory, or it lacks a config, weights or a tokenizer.
    ValueError
        if a file cannot be read, or asks for something that is not supported here; the message names it.
    """
    root = resolve_directory(path)
    modules_file = root / "modules.json"
    if _is_nv_embed(root):
        # its modules.json names a plain mean, over a transformer that pools by itself
        spec = DirectorySpec(root, (LATENT_ATTENTION,), nv_embed=True)
    elif modules_file.is_file():
        spec = _read_modules(root, _read_json(modules_file))
    else:
        spec = DirectorySpec(root, _default_pooling(root))
    check_files(spec.transformer)
    return _with_model_config(spec, root)


def _is_nv_embed(root: Path) -> bool:
    config = root / "config.json"
    return config.is_file() and _read_json(config).get("model_type") == NV_EMBED


def pooling_modes(pooling: str | Sequence[str], where: str) -> tuple[str, ...]:
    """Check pooling mode names (sentence-transformers' own); several are concatenated."""
    modes = (pooling,) if isinstance(pooling, str) else tuple(pooling)
    unknown = [mode for mode in modes if mode not in POOLING_MODES]
    if unknown or not modes:
        raise ValueError(f"{where}: pooling_mode must be one or more of {', '.join(POOLING_MODES)}, got {pooling!r}")
    return modes


def resolve_directory(path: str | Path) -> Path:
    """The local directory of that name, or the Hub's repository of that name, downloaded.

    Raises:
        FileNotFoundError: there is neither.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        return root
    name = str(path)
    if root.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"{name!r} is not a model directory: expected a directory with config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is neither a directory nor a model that the Hugging Face Hub gave: {reason}"
        ) from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def check_files(transformer: Path) -> None:
    """FileNotFoundError where a directory lacks a config, weights or a tokenizer."""
    if not (transformer / "config.json").is_file():
        raise FileNotFoundError(f"{transformer} holds no config.json: expected a Hugging Face model directory")
    if not any((transformer / name).is_file() for name in _WEIGHT_FILES):
        old = " (its pytorch_model.bin is a pickle; save it again with safetensors)"
        hint = old if (transformer / "pytorch_model.bin").is_file() else ""
        raise FileNotFoundError(f"{transformer} holds no weights: expected model.safetensors{hint}")
    if not any((transformer / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{transformer} holds no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")


def _default_pooling(root: Path) -> tuple[str, ...]:
    # sentence-transformers' choice for a directory that stores no pooling
    config = root / "config.json"
    architectures = (_read_json(config).get("architectures") or []) if config.is_file() else []
    return ("lasttoken",) if any(name.endswith("ForCausalLM") for name in architectures) else ("mean",)


def _read_modules(root: Path, entries: list[dict[str, Any]]) -> DirectorySpec:
    """Follow modules.json: Transformer, Pooling, then any of the heads; a last Normalize becomes `normalize`."""
    names = [_module_name(root, entry) for entry in entries]
    if names[:1] != ["Transformer"] or names[1:2] not in (["Pooling"], [LATENT_ATTENTION]):
        raise ValueError(
            f"{root / 'modules.json'} must name a Transformer followed by a Pooling module, got {' -> '.join(names)}; "
            "use sentence-transformers for this model, or `embedding_kernels.segment_pool` on its token embeddings"
        )
    paths = [root / entry.get("path", "") for entry in entries]
    heads: list[nn.Module] = []
    for name, path in zip(names[2:], paths[2:], strict=True):
        head = HEADS[name]
        if head is not None:
            config = path / "config.json"
            heads.append(head.load(path, _read_json(config) if config.is_file() else {}))
    normalize = bool(heads) and isinstance(heads[-1], Normalize)
    after: dict[str, Any] = {"heads": tuple(heads[:-1] if normalize else heads), "normalize": normalize}
    if names[1] == LATENT_ATTENTION:
        latent, include_prompt = load_latent_attention(paths[1])
        spec = DirectorySpec(paths[0], (LATENT_ATTENTION,), include_prompt, latent_attention=latent, **after)
    else:
        spec = DirectorySpec(paths[0], *_read_pooling(paths[1] / "config.json"), **after)
    return _with_transformer_config(spec, paths[0])


def _module_name(root: Path, entry: dict[str, Any]) -> str:
    full = str(entry.get("type", ""))
    if full == _LATENT_ATTENTION_MODULE:
        return LATENT_ATTENTION
    name = full.rsplit(".", 1)[-1]
    known = {"Transformer", "Pooling", *HEADS}
    if not full.startswith("sentence_transformers.") or name not in known:
        raise ValueError(
            f"{root / 'modules.json'} asks for the module {full!r}, which is not supported (of sentence-transformers "
            f"{', '.join(sorted(known))} are); use sentence-transformers for this model, or pool "
            "its token embeddings with `embedding_kernels.segment_pool`"
        )
    return name


def _read_pooling(file: Path) -> tuple[tuple[str, ...], bool]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: modules.json asks for a Pooling module")
    config = _read_json(file)
    old = tuple(mode for key, mode in _OLD_POOLING_KEYS.items() if config.get(key))
    modes = pooling_modes(config.get("pooling_mode") or old or "mean", str(file))
    return modes, bool(config.get("include_prompt", True))


def _with_transformer_config(spec: DirectorySpec, path: Path) -> DirectorySpec:
    file = next((path / name for name in _TRANSFORMER_CONFIGS if (path / name).is_file()), None)
    if file is None:
        return spec
    config = _read_json(file)
    unknown = {key: value for key, value in config.items() if key not in _KNOWN_TRANSFORMER_KEYS and value}
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        unknown["transformer_task"] = config["transformer_task"]
    if config.get("module_output_name", "token_embeddings") != "token_embeddings":
        unknown["module_output_name"] = config["module_output_name"]
    text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    if config.get("modality_config", text) != text:
        unknown["modality_config"] = config["modality_config"]
    if unknown:
        raise ValueError(
            f"{file} asks for {', '.join(f'{key}={value!r}' for key, value in unknown.items())}, which is not "
            "supported: use sentence-transformers for this model"
        )
    return replace(
        spec, max_seq_length=config.get("max_seq_length"), do_lower_case=bool(config.get("do_lower_case", False))
    )


def _with_model_config(spec: DirectorySpec, root: Path) -> DirectorySpec:
    file = root / "config_sentence_transformers.json"
    if not file.is_file():
        return spec
    config = _read_json(file)
    prompts = {name: text or "" for name, text in (config.get("prompts") or {}).items()}
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(f"{file}: default_prompt_name must be one of {sorted(prompts)}, got {default!r}")
    return replace(spec, prompts=prompts, default_prompt_name=default, truncate_dim=config.get("truncate_dim"))
