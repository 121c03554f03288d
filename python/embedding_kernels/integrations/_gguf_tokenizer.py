"""The tokenizer in a GGUF file's metadata, as one of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .gguf import Header

# llama.cpp's names of how text is split before the merges -> whether digits are split from each other first; the rest
# of the split is GPT-2's
_SPLITS_DIGITS = {"default": False, "gpt-2": False, "smollm": True}

# llama.cpp's types of tokens
_CONTROL, _USER_DEFINED = 3, 4


def read_tokenizer(header: Header, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from a GGUF file's vocabulary and merges, with its special tokens and chat template.

    Raises:
        ValueError: another kind of tokenizer, or a vocabulary that cannot be right.
    """
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = header.value("tokenizer.ggml.tokens")
    named = {
        f"{name}_token": _token(header, tokens, key)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    # sentence-transformers and transformers pad batches: a model without a padding token pads with its last one
    named["pad_token"] = named["pad_token"] or named["eos_token"]
    backend = _backend(header, tokens)
    _add_ends(backend, header, tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=header.value("tokenizer.chat_template", None),
        **{name: token for name, token in named.items() if token is not None},
    )


def _backend(header: Header, tokens: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, split = header.value("tokenizer.ggml.model"), header.value("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in _SPLITS_DIGITS:
        raise ValueError(
            f"{header.path}: the tokenizer must be 'gpt2' with one of {', '.join(map(repr, _SPLITS_DIGITS))}, "
            f"got {kind!r} with {split!r}"
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml.tokens must be distinct, got {len(vocabulary)} of them twice")
    merges = [tuple(merge.split(" ")) for merge in header.value("tokenizer.ggml.merges")]
    try:
        backend = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:
        raise ValueError(f"{header.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from error
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if _SPLITS_DIGITS[split] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    types = header.value("tokenizer.ggml.token_type", [1] * len(tokens))
    for token, type_of_token in zip(tokens, types, strict=True):
        if type_of_token in (_CONTROL, _USER_DEFINED):
            special = type_of_token == _CONTROL
            added = AddedToken(token, normalized=False, special=special)
            (backend.add_special_tokens if special else backend.add_tokens)([added])
    return backend


def _add_ends(backend: Any, header: Header, tokens: list[str]) -> None:
    """Put the first and last tokens around every text, where the file asks for it."""
    from tokenizers import processors

    ends = {}
    for name in ("bos", "eos"):
        if header.value(f"tokenizer.ggml.add_{name}_token", False):
            token = _token(header, tokens, name)
            if token is None:
                raise ValueError(f"{header.path}: tokenizer.ggml.add_{name}_token needs {name}_token_id")
            ends[name] = token
    if ends:
        around = [*([ends["bos"]] if "bos" in ends else []), "$A", *([ends["eos"]] if "eos" in ends else [])]
        numbers = [(token, tokens.index(token)) for token in dict.fromkeys(ends.values())]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=numbers)


def _token(header: Header, tokens: list[str], name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    number = header.value(key, None)
    if number is not None and not 0 <= number < len(tokens):
        raise ValueError(f"{header.path}: {key} must be below the {len(tokens)} tokens, got {number}")
    return None if number is None else tokens[number]
