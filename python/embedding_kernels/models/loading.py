"""The transformers half of a model directory: weights and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

# encoder-decoder families whose encoder transformers offers alone
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
}


def load_transformer(
    path: Path, device: torch.device, dtype: torch.dtype | None, attn_implementation: str | None
) -> nn.Module:
    """The transformer of a directory, in evaluation mode on ``device``.

    Raises:
        ValueError: unreadable or incomplete weights, an architecture without an encoder of its own.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path / 'config.json'} cannot be read by transformers: {_first_line(error)}") from error
    loader: Any = transformers.AutoModel
    if getattr(config, "is_encoder_decoder", False):
        if config.model_type not in _ENCODERS:
            raise ValueError(
                f"{path}: model type must be an encoder, a decoder or the encoder of {', '.join(sorted(_ENCODERS))}, "
                f"got the encoder-decoder {config.model_type!r}"
            )
        loader = getattr(transformers, _ENCODERS[config.model_type])
    if hasattr(config, "use_cache"):
        config.use_cache = False
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        # shapes are judged below, where they can be named
        model, info = loader.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:
        raise ValueError(f"{path} cannot be loaded by transformers: {_first_line(error)}") from error
    # transformers fills what is missing with random numbers; an unused pooler is missing in many models
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{path}: the weights must hold every parameter of the model, got none for {names}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{path}: {name} must be {list(wanted)} by config.json, got {list(found)}")
    return model.eval().to(device)


def load_tokenizer(path: Path, config: Any, do_lower_case: bool) -> tuple[Any, int]:
    """The tokenizer of a directory and the most tokens that it and the model take.

    Raises:
        ValueError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        # given, so that a config.json of another library's class is not run
        tokenizer = AutoTokenizer.from_pretrained(path, config=config)
    except Exception as error:
        raise ValueError(f"{path}: its tokenizer cannot be loaded by transformers: {_first_line(error)}") from error
    if do_lower_case:
        _lower_case(tokenizer)
    positions = getattr(config, "max_position_embeddings", -1)
    limits = [tokenizer.model_max_length, *([positions] if positions and positions > 0 else [])]
    return tokenizer, min(limits)


def _lower_case(tokenizer: Any) -> None:
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])]
    backend.normalizer = normalizers.Sequence(steps)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
