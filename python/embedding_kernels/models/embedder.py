"""`Embedder`: texts to vectors or bit codes, with the arguments of `SentenceTransformer.encode`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._progress import progress_bar
from ..ops.pooling import pack_padded
from .backbones import hidden_after, layer_count, packed_backbone, padding_only_mask
from .batching import Batch, TextTokenizer, default_token_budget, offsets_of, windows
from .directory import DirectorySpec, pooling_modes, read_directory
from .loading import load_tokenizer, load_transformer
from .nv_embed import load_nv_embed
from .pooler import Pooler, Recipe
from .precision import BIT_PRECISIONS, PRECISIONS, bits_to_precision, quantize
from .presets import preset_named

logger = logging.getLogger(__name__)

_WINDOW = 32_768  # texts tokenised together, and sorted where they are padded
# sentence-transformers' arguments for several processes, which wrappers pass along unset
_UNUSED_OPTIONS = ("pool", "chunk_size")
_OUTPUT_VALUES = ("sentence_embedding", "token_embeddings")


class Embedder:
    """A transformers model with its tokenizer, pooling and prompts: texts in, vectors or bit codes out.

    Made by `Embedder.from_pretrained`. Texts are cut into batches of at most ``token_budget`` tokens, which stay
    packed, without padding, from the tokenizer to the vectors. How the model's blocks run is its road, which ``repr``
    names: blocks of our own on the model's weights, transformers' blocks with our attention, or, where neither fits or
    an attention implementation was asked for, transformers' own forward on batches sorted by length and padded.

    The vectors are those of sentence-transformers, with two differences: they are truncated first and normalised
    after, so those of a model with a Normalize module have length 1 at every ``truncate_dim``; and no texts give shape
    ``(0, D)``. A text without any token gives the zero vector.

    Args:
        model: a transformers model, put into evaluation mode.
        tokenizer: its tokenizer.
        spec: pooling, prompts and what follows, as `read_directory` gives it.
        token_budget: most tokens in a batch, padding included on the road that pads; by default right for the device.
        packed: False runs transformers' own forward, padded.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
        prompts: stored prompts by name.
        default_prompt_name: the prompt that `encode` uses when told none.
        truncate_dim: the dimensions that `encode` keeps when told none; None keeps all.
        matryoshka_dims: widths that the model was trained to be truncated to; empty where that is not known.
        token_budget: most tokens in a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        spec: DirectorySpec,
        token_budget: int | None = None,
        *,
        packed: bool = True,
    ) -> None:
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.prompts = dict(spec.prompts)
        self.default_prompt_name = spec.default_prompt_name
        self.truncate_dim = spec.truncate_dim
        self.matryoshka_dims = spec.matryoshka_dims
        self.token_budget = default_token_budget(self.model) if token_budget is None else token_budget
        for name, value in (("token_budget", self.token_budget), ("max_seq_length", spec.max_seq_length)):
            if value is not None and value < 1:
                raise ValueError(f"Embedder: {name} must be at least 1, got {value}")
        self._spec = spec
        self._texts = TextTokenizer(tokenizer, spec.max_seq_length)
        self._pooler = Pooler(spec).to(self.device).eval()
        if self._pooler.latent_attention is not None:
            self._pooler.latent_attention.to(self.dtype)
        self._backbone = packed_backbone(self.model, spec.bidirectional) if packed else None
        # a stored default that does not fit is refused now, not at the first text
        self._resolve_prompt(None, None)
        self._resolve_dim(None)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        preset: str | None = None,
        compat: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        bidirectional: bool | None = None,
        pooling: str | Sequence[str] | None = None,
        include_prompt: bool | None = None,
        normalize: bool | None = None,
        max_seq_length: int | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
        attn_implementation: str | None = None,
        token_budget: int | None = None,
    ) -> Embedder:
        """Load a directory of Hugging Face's, sentence-transformers' or NV-Embed's layout.

        What the directory stores may be replaced by a preset, and that by the arguments of the same names. A directory
        that stores no pooling gets the mean (the last token for a causal language model), as in sentence-transformers;
        its chat template is not applied.

        Args:
            path: a local directory, or a repository of the Hugging Face Hub.
            preset: a published embedder whose directory does not say how it is used: "nv-embed-v1" and "nv-embed-v2"
                (known by their layout too), "kalm-v2", or "ullme" for any decoder (`presets.PRESETS`).
            compat: count NV-Embed's instruction as its published code does: tokenised alone, without the
                beginning-of-text token. Where its last token does not merge into the text, that leaves one too many
                in the mean.
            device: by default the current CUDA device where there is one, else the CPU.
            dtype: of the transformer and a latent-attention head; by default that of its weights (for NV-Embed's
                layout, the one that config.json names). What follows is float32.
            bidirectional: True lets every token of a decoder attend to all tokens of its text, in every layer; None
                leaves causal masks and sliding windows as the model has them. A decoder that was not trained for it
                gives poor vectors.
            pooling: cls, max, mean, mean_sqrt_len_tokens, weightedmean or lasttoken; several are concatenated.
            include_prompt: whether the prompt's tokens are pooled.
            normalize: whether vectors have length 1.
            max_seq_length: tokens kept of a text, special tokens included.
            prompts: texts by name, put before the inputs.
            default_prompt_name: the prompt to use when `encode` is told none.
            truncate_dim: dimensions to keep when `encode` is told none.
            attn_implementation: runs transformers' own padded forward with this attention; by default the model takes
                the fastest packed road that fits it.
            token_budget: most tokens in a batch, padding included on the road that pads.

        Raises:
            FileNotFoundError: the directory, its weights or its tokenizer are missing.
            ValueError: the directory asks for a module or an option that is not supported, which the message names.
        """
        spec = read_directory(path)
        if spec.nv_embed or preset is not None:
            spec = replace(spec, **preset_named(preset or "nv-embed-v2").changes())
        changes: dict[str, Any] = {
            "prompt_length": "without_bos" if compat and spec.prompt_length == "shared" else None,
            "bidirectional": bidirectional,
            "include_prompt": include_prompt,
            "pooling": None if pooling is None else pooling_modes(pooling, "from_pretrained"),
            "normalize": normalize,
            "max_seq_length": max_seq_length,
            "prompts": None if prompts is None else dict(prompts),
            "default_prompt_name": default_prompt_name,
            "truncate_dim": truncate_dim,
        }
        spec = replace(spec, **{name: value for name, value in changes.items() if value is not None})
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model: Any
        if spec.nv_embed:
            model, head = load_nv_embed(spec.transformer, where, dtype, attn_implementation)
            spec = replace(spec, latent_attention=head)
        else:
            model = load_transformer(spec.transformer, where, dtype, attn_implementation)
        tokenizer, limit = load_tokenizer(spec.transformer, model.config, spec.do_lower_case)
        if spec.max_seq_length is None:
            spec = replace(spec, max_seq_length=limit)
        return cls(model, tokenizer, spec, token_budget, packed=attn_implementation is None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer's weights."""
        return self.model.dtype

    @property
    def road(self) -> str:
        """How the model's blocks run: see the class."""
        if self._backbone is not None:
            return self._backbone.road
        attention = getattr(self.model.config, "_attn_implementation", None)
        return f"transformers' own blocks, padded, {attention} attention"

    @property
    def max_seq_length(self) -> int | None:
        """Tokens kept of a text, special tokens included; None keeps all."""
        return self._texts.max_seq_length

    def get_embedding_dimension(self) -> int:
        """Dimensions of the vectors that `encode` gives when told no ``truncate_dim``."""
        return self.truncate_dim or self._pooler.dimension(self._hidden_size)

    def encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        layer: int | None = None,
        **unknown: Any,
    ) -> Any:
        """Encode texts. Names and meanings of the arguments are those of `SentenceTransformer.encode`.

        Args:
            inputs: one text or a sequence of them; results keep their order.
            prompt_name: the name of a stored prompt, put before every input.
            prompt: the same as text; goes before ``prompt_name``.
            batch_size: most texts in a batch; None leaves it to ``token_budget``, so that short texts make larger
                batches.
            show_progress_bar: None shows one when this package's logger is at INFO or DEBUG, and in a terminal once
                the work has taken two seconds.
            output_value: "sentence_embedding", or "token_embeddings" for a tensor ``[tokens, H]`` for each text.
            precision: "float32"; "ubinary", one bit a dimension as `pack_bits` packs, uint8 ``[N, ceil(D / 8)]``;
                "binary", the same less 128 as int8; "uint8" and "int8", 256 steps between the smallest and the
                largest value of each dimension among these inputs.
            convert_to_numpy: a NumPy array (the default); where false, a list of tensors.
            convert_to_tensor: one tensor, on the model's device; goes before ``convert_to_numpy``.
            device: moves the model there first.
            normalize_embeddings: scale to length 1, after truncation.
            truncate_dim: leading dimensions to keep.
            layer: read the tokens' states after so many layers, 0 to N; those past it do not run. 0 is what the first
                layer is given; N, and None, the model's output. With ``truncate_dim`` this is the inference of 2D
                Matryoshka (Li et al., "2D Matryoshka Sentence Embeddings", 2024), for models trained that way.

        Returns:
            ``[N, D]`` float32 or as ``precision`` says; ``[D]`` for one text, ``[0, D]`` for none.

        Raises:
            ValueError: an argument is unknown, or has a value that cannot be used.
        """
        _check_options(batch_size, output_value, precision, device, unknown)
        texts, single = _as_texts(inputs)
        text_prompt = self._resolve_prompt(prompt, prompt_name)
        dim, layer = self._resolve_dim(truncate_dim), self._resolve_layer(layer)
        scaled = precision in ("int8", "uint8")
        if scaled and len(texts) == 1:
            raise ValueError(f"encode: inputs must be at least 2 texts for precision {precision!r}, got 1")
        if device is not None:
            self.to(device)
        if output_value == "token_embeddings":
            tokens = self._encode_tokens(texts, text_prompt, batch_size, show_progress_bar, layer)
            return tokens[0] if single else tokens
        on_device = convert_to_tensor or not convert_to_numpy
        recipe = Recipe(dim, normalize_embeddings or self._spec.normalize, precision in BIT_PRECISIONS, layer)
        vectors = self._encode_vectors(texts, text_prompt, batch_size, show_progress_bar, recipe, on_device)
        if recipe.bits:
            vectors = bits_to_precision(vectors, precision)
        elif scaled:
            vectors = quantize(vectors, precision)
        if single:
            vectors = vectors[0]
        if not on_device:
            return vectors.numpy()
        return vectors if convert_to_tensor or single else list(vectors)

    def encode_query(self, inputs: str | Sequence[str], *, task: str | None = None, **options: Any) -> Any:
        """`encode` with a query's prompt, unless the options name another.

        ``task`` describes the task to an instructed model ("Given a question, retrieve passages that answer the
        question"), which fills its template; without it the stored prompt "query" is used, where there is one.
        """
        return self.encode(inputs, **self._with_prompt(options, task, "query"))

    def encode_document(self, inputs: str | Sequence[str], *, task: str | None = None, **options: Any) -> Any:
        """`encode` with the first stored prompt of "document", "passage" and "corpus", unless the options name one.

        ``task`` is for symmetric tasks alone, whose two sides are instructed alike.
        """
        return self.encode(inputs, **self._with_prompt(options, task, "document", "passage", "corpus"))

    def to(self, device: str | torch.device) -> Embedder:
        """Move the model to a device; returns the embedder."""
        self.model.to(device)
        self._pooler.to(device)
        if self._backbone is not None:
            self._backbone.forget()
        return self

    def __repr__(self) -> str:
        spec = self._spec
        pooling = spec.pooling[0] if len(spec.pooling) == 1 else spec.pooling
        after = [type(head).__name__ for head in spec.heads] + ["Normalize"] * spec.normalize
        direction = "bidirectional, " if spec.bidirectional else ""
        return (
            f"Embedder({type(self.model).__name__}, {direction}pooling={pooling!r}, then=[{', '.join(after)}], "
            f"dimension={self.get_embedding_dimension()}, max_seq_length={self.max_seq_length}, device={self.device}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, road={self.road!r}, token_budget={self.token_budget})"
        )

    @property
    def _hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def _with_prompt(self, options: dict[str, Any], task: str | None, *names: str) -> dict[str, Any]:
        if task is not None:
            return {**options, "prompt": self._instruction(task, options)}
        if options.get("prompt_name") is not None or options.get("prompt") is not None:
            return options
        return {**options, "prompt_name": next((name for name in names if name in self.prompts), None)}

    def _instruction(self, task: str, options: dict[str, Any]) -> str:
        if self._spec.instruction is None:
            raise ValueError(
                "encode: task must be None for a model without a template for instructions (give the whole text as "
                f"prompt, or load with a preset), got {task!r}"
            )
        if options.get("prompt_name") is not None or options.get("prompt") is not None:
            raise ValueError(f"encode: prompt and prompt_name must be None beside a task, got {options}")
        return self._spec.instruction.replace("{task}", task)

    def _resolve_prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        if prompt is not None:
            if not isinstance(prompt, str):
                raise ValueError(f"encode: prompt must be a string, got {type(prompt).__name__}")
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is not None and name not in self.prompts:
            stored = ", ".join(map(repr, self.prompts)) or "none"
            raise ValueError(f"encode: prompt_name must be one of the stored prompts ({stored}), got {name!r}")
        return "" if name is None else self.prompts[name]

    def _resolve_dim(self, truncate_dim: int | None) -> int:
        whole = self._pooler.dimension(self._hidden_size)
        dim = self.truncate_dim if truncate_dim is None else truncate_dim
        if dim is None:
            return whole
        if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or not 1 <= dim <= whole:
            raise ValueError(f"encode: truncate_dim must be from 1 to {whole}, got {dim!r}")
        return int(dim)

    def _resolve_layer(self, layer: int | None) -> int | None:
        """None for the model's output."""
        if layer is None:
            return None
        count = layer_count(self.model)
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or not 0 <= layer <= count:
            raise ValueError(f"encode: layer must be from 0 to {count}, got {layer!r}")
        return None if layer == count else int(layer)

    def _encode_vectors(
        self,
        texts: list[str],
        prompt: str,
        max_texts: int | None,
        show: bool | None,
        recipe: Recipe,
        on_device: bool,
    ) -> Tensor:
        # allocated outside inference mode, so that the caller may use it under autograd
        out = torch.zeros(len(texts), recipe.width, dtype=recipe.dtype, device=self.device if on_device else "cpu")
        with torch.inference_mode(), progress_bar("Encoding", len(texts), "text", show, logger) as bar:
            for start, end in windows(len(texts), _WINDOW):
                # gathered on the model's device: one copy to the host a window, not one a batch
                out[start:end] = self._window_vectors(texts[start:end], prompt, max_texts, recipe, bar)
        return out

    def _window_vectors(self, texts: list[str], prompt: str, max_texts: int | None, recipe: Recipe, bar: Any) -> Tensor:
        """Those of texts that are tokenised together, on the model's device; moves the bar on."""
        left_out = "" if self._spec.include_prompt else prompt
        part = torch.zeros(len(texts), recipe.width, dtype=recipe.dtype, device=self.device)
        for batch in self._batches(texts, prompt, max_texts):
            rows = batch.rows if isinstance(batch.rows, slice) else torch.from_numpy(batch.rows).to(self.device)
            part[rows] = self._vectors(batch, left_out, recipe)
            bar.update(len(batch.lengths))
        return part

    def _encode_tokens(
        self, texts: list[str], prompt: str, max_texts: int | None, show: bool | None, layer: int | None
    ) -> list[Tensor]:
        out = [torch.zeros(0, self._hidden_size, dtype=self.dtype, device=self.device)] * len(texts)
        with torch.inference_mode(), progress_bar("Encoding", len(texts), "text", show, logger) as bar:
            for start, end in windows(len(texts), _WINDOW):
                for batch in self._batches(texts[start:end], prompt, max_texts):
                    tokens = self._token_embeddings(batch, layer).split(batch.lengths.tolist())
                    rows = np.arange(end - start)[batch.rows]
                    for row, rows_of_text in zip(rows, tokens, strict=True):
                        out[start + row] = rows_of_text.clone()  # a view would keep the whole batch alive
                    bar.update(len(batch.lengths))
        return out

    def _batches(self, texts: list[str], prompt: str, max_texts: int | None) -> Iterator[Batch]:
        """Batches of the texts that hold any token."""
        end = self.tokenizer.eos_token if self._spec.append_eos else ""
        tokenized = self._texts([prompt + text + end for text in texts] if prompt or end else texts)
        cut = tokenized.batches_to_pad if self._backbone is None else tokenized.batches
        return (batch for batch in cut(self.token_budget, max_texts) if batch.longest)

    def _vectors(self, batch: Batch, left_out: str, recipe: Recipe) -> Tensor:
        """``left_out`` is the prompt whose tokens are not pooled, or empty."""
        if left_out:
            skip = self._texts.prompt_tokens(left_out, self._spec.prompt_length, batch)
            return self._pooler(self._token_embeddings(batch, recipe.layer), batch.lengths, skip, recipe)
        rows = None
        if self._backbone is not None and self._backbone.trims:
            rows = self._pooler.rows_needed(batch.lengths)
        if rows is None:
            return self._pooler(self._token_embeddings(batch, recipe.layer), batch.lengths, None, recipe)
        held = (batch.lengths > 0).astype(np.int64)
        last_rows = torch.from_numpy(rows).to(self.device), offsets_of(held, self.device)
        return self._pooler(self._token_embeddings(batch, recipe.layer, last_rows), held, None, recipe)

    def _token_embeddings(
        self, batch: Batch, layer: int | None = None, last_rows: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Hidden states of the batch after the last layer or ``layer``: ``[T, H]``, or of ``last_rows`` alone."""
        if self._backbone is None:
            padded, mask = batch.padded()
            inputs = {name: tensor.to(self.device) for name, tensor in padded.items()}
            mask = mask.to(self.device)
            seen = padding_only_mask(mask, self.dtype) if self._spec.bidirectional else mask.long()

            def forward() -> Tensor:
                return self.model(**inputs, attention_mask=seen, return_dict=True).last_hidden_state

            hidden = forward() if layer is None else hidden_after(self.model, layer, forward)
            return pack_padded(hidden, mask, int(batch.lengths.sum()))
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        ids, cu_seqlens = inputs.pop("input_ids"), offsets_of(batch.lengths, self.device)
        return self._backbone(ids, cu_seqlens, batch.longest, last_rows=last_rows, layer=layer, **inputs)


def _check_options(batch_size: Any, output_value: Any, precision: Any, device: Any, unknown: dict[str, Any]) -> None:
    surplus = sorted(name for name, value in unknown.items() if value is not None or name not in _UNUSED_OPTIONS)
    if surplus:
        raise ValueError(f"encode: arguments must be those of its signature, got {', '.join(surplus)}")
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"encode: batch_size must be a positive integer or None, got {batch_size!r}")
    if output_value not in _OUTPUT_VALUES:
        raise ValueError(f"encode: output_value must be one of {', '.join(_OUTPUT_VALUES)}, got {output_value!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"encode: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if device is not None and not isinstance(device, (str, torch.device)):
        raise ValueError(f"encode: device must be one device (run a process for each), got {device!r}")


def _as_texts(inputs: Any) -> tuple[list[str], bool]:
    if isinstance(inputs, str):
        return [inputs], True
    expected = "encode: inputs must be a string or a sequence of strings"
    if isinstance(inputs, (bytes, Mapping)) or not hasattr(inputs, "__iter__"):
        raise ValueError(f"{expected}, got {type(inputs).__name__}")
    texts = list(inputs)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{expected}, got {type(text).__name__} in place {place}")
    return texts, False
