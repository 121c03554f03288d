"""The transformers half of a model directory: weights and tokenizer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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


def load_config(path: Path) -> Any:
    """The config of a directory; ValueError where transformers cannot read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path / 'config.json'} cannot be read by transformers: {_first_line(error)}") from error


def load_transformer(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    layers: int | None = None,
) -> nn.Module:
    """The transformer of a directory, in evaluation mode on ``device``; of its layers the first ``layers`` alone.

    Raises:
        ValueError: unreadable or incomplete weights, an architecture without an encoder of its own.
    """
    import transformers

    config = load_config(path)
    if layers is not None:
        _keep_layers(config, layers)
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
    with nullcontext() if layers is None else _without_report():
        return load_weights(loader, path, config, device, dtype, **options)


def load_weights(
    loader: Any, path: Path, config: Any, device: torch.device, dtype: torch.dtype | None, **options: Any
) -> nn.Module:
    """A model of transformers' class ``loader`` with the weights of a directory, in evaluation mode on ``device``.

    Raises:
        ValueError: unreadable or incomplete weights.
    """
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


def _keep_layers(config: Any, layers: int) -> None:
    """Make a config that of a model of the first ``layers`` layers."""
    text = config.get_text_config()
    if not 1 <= layers <= text.num_hidden_layers:
        raise ValueError(f"from_pretrained: layers must be from 1 to {text.num_hidden_layers}, got {layers}")
    text.num_hidden_layers = layers
    if isinstance(vars(text).get("layer_types"), (list, tuple)):
        text.layer_types = list(text.layer_types)[:layers]


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers would list every tensor of the layers that are left out as one that it does not know."""
    source, thread = logging.getLogger("transformers.modeling_utils"), threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        return record.thread != thread or "LOAD REPORT" not in str(record.msg)

    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)


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
