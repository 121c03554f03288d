"""`TokenPrependingEmbedder`: sentence embeddings of a decoder that nobody trained for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backbones import DecoderBackbone, PluggedBackbone, Prefix, Prepend, hidden_after, layer_count, rows_changed
from .batching import Batch, TokenizedTexts
from .directory import DirectorySpec, read_directory
from .embedder import Embedder
from .loading import load_config, load_tokenizer, load_transformer
from .pooler import Recipe
from .sentence_prompts import PromptTokens, published_form, templates_of

_LAST_TOKEN = ("lasttoken",)


@dataclass(frozen=True)
class TokenPrependingPreset:
    """The layers that were published for a model: see `TokenPrependingEmbedder`."""

    start_layer: int
    stop_layer: int
    exit_layer: int
    #: prompts that are read after the last layer but one
    penultimate: tuple[str, ...] = ("knowledge_enhancement",)

    def exit_layer_for(self, prompt: str | Sequence[str], layers: int) -> int:
        """The layer to read in a model of so many."""
        penultimate = isinstance(prompt, str) and prompt.removesuffix("_plain") in self.penultimate
        return layers - 1 if penultimate else self.exit_layer


#: name -> preset. Fu et al., 2024, at its published state, which names one exit layer for all its models; SmolLM2's,
#: which it does not have, is as deep in proportion.
TOKEN_PREPENDING_PRESETS = {
    "llama2-7b": TokenPrependingPreset(1, 7, 27),
    "llama2-13b": TokenPrependingPreset(1, 7, 27),
    "llama3-8b": TokenPrependingPreset(1, 3, 27),
    "qwen2-7b": TokenPrependingPreset(1, 6, 27),
    "gemma2-9b": TokenPrependingPreset(1, 6, 27),
    "smollm2-135m": TokenPrependingPreset(1, 7, 25, penultimate=()),
}


class TokenPrependingEmbedder(Embedder):
    """Embeds sentences with a causal language model as it is, by a prompt and token prepending.

    The sentence stands in a prompt that asks for its meaning in one word, and the embedding is the hidden state of the
    prompt's last token after ``exit_layer``. A placeholder before the sentence begins as a random vector; the last
    token's state is copied over it before each of the first layers, so that the tokens of the sentence, which a causal
    model lets see only what precedes them, see a summary of the whole (Fu et al., "Token Prepending: A Training-Free
    Approach for Eliciting Better Sentence Embeddings from LLMs", 2024; 70.0 to 77.2 on seven similarity sets with
    LLaMA2-7B). Letting such a model attend in both directions instead is no substitute: without training its vectors
    collapse (43.7 to 53.1 there).

    What it costs depends on the road, which ``repr`` names. Decoders with blocks of our own (Llama, Mistral, Qwen2,
    Qwen3, Gemma, Gemma 2, SmolLM2) compute the keys and values of the prompt before the placeholder once, not for each
    text; copy inside the norm that a block begins with; and let the last token alone through the exit layer's queries,
    output projection and feed-forward. Any other decoder that `plug_attention` takes (Phi, GPT-2, ...) runs its own
    blocks with hooks: the whole prompt in each text, all tokens through all layers up to the exit. Neither runs a layer
    past the exit, and `from_pretrained` does not load one.

    Texts are changed as in the published code: a full stop after a text that ends without one, single quotation marks
    for double ones. `encode` has the arguments and results of `Embedder.encode`; there a ``prompt`` goes before the
    text, between the quotation marks, and ``layer`` is at most the exit layer.

    Args:
        model: a transformers decoder without a head.
        tokenizer: its tokenizer.
        spec: limits and precision of what `encode` gives; pooling, heads and stored prompts do not count.
        token_budget: most tokens in a batch.
        prompt: a name in `sentence_prompts.PROMPTS` ("prompt_eol", "pretended_cot", "knowledge_enhancement",
            "meta_eol", or one of these with "_plain" after it, without placeholder), or a text with ``{S}`` where the
            sentence goes and ``<PST>`` for the placeholder, or several, whose embeddings are averaged. "meta_eol" has
            eight texts in wordings of this project.
        exit_layer: 1 to N, the layer after which the state is read; N - 1 by default.
        start_layer: the first block, counted from 0, before which the copy is made.
        stop_layer: the block before which it is no longer made.
        copy: False keeps the placeholder and copies nothing.
        seed: of the placeholder's vector, drawn from N(0, 1) in place of an embedding (which Gemma scales).
        final_norm: whether the model's last norm is applied to the state that is read at the exit layer.
        reuse_prefix: False computes the whole prompt in each text.

    Attributes:
        exit_layer: as above.

    Raises:
        ValueError: a model that is no causal decoder, or whose attention cannot be replaced; layers out of range; a
            ``max_seq_length`` that cannot hold the prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        spec: DirectorySpec,
        token_budget: int | None = None,
        *,
        prompt: str | Sequence[str] = "prompt_eol",
        exit_layer: int | None = None,
        start_layer: int = 1,
        stop_layer: int = 7,
        copy: bool = True,
        seed: int = 0,
        final_norm: bool = False,
        reuse_prefix: bool = True,
    ) -> None:
        if spec.bidirectional:
            raise ValueError("TokenPrependingEmbedder: bidirectional must be None, got True")
        plain = DirectorySpec(spec.transformer, _LAST_TOKEN, normalize=spec.normalize, truncate_dim=spec.truncate_dim)
        super().__init__(model, tokenizer, replace(plain, max_seq_length=spec.max_seq_length), token_budget)
        layers = _layers(self.model)
        self.exit_layer = layers - 1 if exit_layer is None else exit_layer
        _check_layers(self.exit_layer, start_layer, stop_layer, layers)
        self._check_road(final_norm, layers)
        self._templates = [PromptTokens(tokenizer, template) for template in templates_of(prompt)]
        least = max(template.least for template in self._templates)
        if self.max_seq_length is not None and self.max_seq_length < least:
            raise ValueError(
                f"TokenPrependingEmbedder: max_seq_length must be at least {least}, so that a token fits into the "
                f"prompt, got {self.max_seq_length}"
            )
        self._prompt_name = prompt if isinstance(prompt, str) else f"{len(self._templates)} texts"
        self._copied = (start_layer, stop_layer if copy else start_layer)
        self._final_norm = final_norm
        self._reuses = reuse_prefix and isinstance(self._backbone, DecoderBackbone)
        generator = torch.Generator().manual_seed(seed)
        self._placeholder = torch.randn(self._hidden_size, generator=generator)
        self._prefixes: dict[int, Prefix] = {}
        self._prefixes_of: tuple[Any, ...] = ()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # not every option of an embedder is one here
        cls,
        path: str | Path,
        *,
        prompt: str | Sequence[str] = "prompt_eol",
        preset: str | None = None,
        exit_layer: int | None = None,
        start_layer: int | None = None,
        stop_layer: int | None = None,
        copy: bool = True,
        seed: int = 0,
        final_norm: bool = False,
        reuse_prefix: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_seq_length: int | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        token_budget: int | None = None,
    ) -> TokenPrependingEmbedder:
        """Load a decoder of a directory in transformers' layout, without its layers past the exit.

        Args:
            path: a local directory, or a repository of the Hugging Face Hub.
            prompt: see the class.
            preset: layers as published for a model: "llama2-7b", "llama2-13b", "llama3-8b", "qwen2-7b", "gemma2-9b",
                "smollm2-135m" (`TOKEN_PREPENDING_PRESETS`). The arguments of the same names go before it.
            exit_layer: without a preset the last layer but one.
            start_layer: without a preset 1.
            stop_layer: without a preset 7.
            copy: see the class.
            seed: see the class.
            final_norm: see the class.
            reuse_prefix: see the class.
            device: by default the current CUDA device where there is one, else the CPU.
            dtype: by default that of the weights.
            max_seq_length: tokens of a prompt with its sentence; a longer sentence loses its end, the prompt nothing.
            normalize: whether vectors have length 1.
            truncate_dim: dimensions to keep when `encode` is told none.
            token_budget: most tokens in a batch.

        Raises:
            FileNotFoundError: the directory, its weights or its tokenizer are missing.
            ValueError: see the class; an unknown preset or prompt.
        """
        spec = read_directory(path)
        if spec.nv_embed:
            raise ValueError(f"TokenPrependingEmbedder: {path} must hold a causal decoder, got NV-Embed's layout")
        templates_of(prompt)  # refused before weights are read
        layers = _layer_options(load_config(spec.transformer), preset, prompt, exit_layer, start_layer, stop_layer)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model: Any = load_transformer(spec.transformer, where, dtype, None, layers["exit_layer"])
        tokenizer, limit = load_tokenizer(spec.transformer, model.config, spec.do_lower_case)
        stored = limit if spec.max_seq_length is None else spec.max_seq_length
        spec = replace(
            spec,
            max_seq_length=stored if max_seq_length is None else max_seq_length,
            normalize=normalize,
            truncate_dim=truncate_dim,
            bidirectional=None,
        )
        options: dict[str, Any] = {"copy": copy, "seed": seed, "final_norm": final_norm, "reuse_prefix": reuse_prefix}
        return cls(model, tokenizer, spec, token_budget, prompt=prompt, **layers, **options)

    @property
    def road(self) -> str:
        """How the model's blocks run, and what each text pays for."""
        if not isinstance(self._backbone, DecoderBackbone):
            return f"{super().road} and hooks, whole prompt in each text, all tokens up to the exit"
        prefix = "prompt's beginning computed once" if self._reuses else "whole prompt in each text"
        return f"{super().road}, {prefix}, last token alone in the exit layer"

    def to(self, device: str | torch.device) -> TokenPrependingEmbedder:
        """Move the model to a device; returns the embedder."""
        super().to(device)
        self._prefixes.clear()
        return self

    def forget(self) -> None:
        """Drop what was derived from the weights, after a change that torch does not see (``parameter.data``)."""
        assert self._backbone is not None
        self._backbone.forget()
        self._prefixes.clear()

    def __repr__(self) -> str:
        start, stop = self._copied
        copies = f"before layers {start + 1} to {stop}" if stop > start else "none"
        return (
            f"TokenPrependingEmbedder({type(self.model).__name__}, prompt={self._prompt_name!r}, copies={copies!r}, "
            f"exit_layer={self.exit_layer}, final_norm={self._final_norm}, "
            f"dimension={self.get_embedding_dimension()}, max_seq_length={self.max_seq_length}, device={self.device}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, road={self.road!r}, token_budget={self.token_budget})"
        )

    # ---- from texts to vectors ----

    def _resolve_layer(self, layer: int | None) -> int | None:
        if layer is None:
            return None
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or not 0 <= layer <= self.exit_layer:
            raise ValueError(f"encode: layer must be from 0 to {self.exit_layer} (the exit layer), got {layer!r}")
        return None if layer == self.exit_layer else int(layer)

    def _encode_tokens(self, *args: Any) -> list[Tensor]:
        raise ValueError("encode: output_value must be 'sentence_embedding' here, got 'token_embeddings'")

    def _window_vectors(self, texts: list[str], prompt: str, max_texts: int | None, recipe: Recipe, bar: Any) -> Tensor:
        sentences = [published_form(prompt + text) for text in texts]
        mean = torch.zeros(len(texts), self._hidden_size, device=self.device)
        for place, template in enumerate(self._templates):
            tokens: TokenizedTexts = template(sentences, self.max_seq_length, not self._reuses)
            prefix = self._prefix(place)
            for batch in tokens.batches(self.token_budget, max_texts):
                mean[batch.rows] += self._last_states(template, prefix, batch, recipe.layer).float()
                if place == 0:
                    bar.update(len(batch.lengths))
        mean /= len(self._templates)
        return self._pooler(mean, np.ones(len(texts), np.int64), None, recipe)

    def _last_states(self, template: PromptTokens, prefix: Prefix | None, batch: Batch, layer: int | None) -> Tensor:
        """The last token's state in each text, ``[S, H]``; of the exit layer where ``layer`` is None."""
        ids = batch.inputs["input_ids"].to(self.device)
        cu_seqlens = torch.from_numpy(np.concatenate(([0], np.cumsum(batch.lengths))).astype(np.int32)).to(self.device)
        last = cu_seqlens[1:].long() - 1
        place = template.placeholder_row(not self._reuses)
        first = None if place is None else cu_seqlens[:-1].long() + place
        if isinstance(self._backbone, DecoderBackbone):
            return self._by_blocks(ids, cu_seqlens, batch.longest, first, last, prefix, layer)
        return self._by_hooks(ids, cu_seqlens, batch.longest, first, last, layer)

    def _by_blocks(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        first: Tensor | None,
        last: Tensor,
        prefix: Prefix | None,
        layer: int | None,
    ) -> Tensor:
        backbone = self._backbone
        assert isinstance(backbone, DecoderBackbone)
        embeds = self.model.embed_tokens(ids)
        prepend = None
        if first is not None:
            embeds[first] = self._placeholder_like(embeds)
            prepend = Prepend(last, first, *self._copied)
        return backbone(
            None,
            cu_seqlens,
            longest,
            inputs_embeds=embeds,
            last_rows=(last, torch.arange(len(cu_seqlens), dtype=torch.int32, device=last.device)),
            layer=self.exit_layer if layer is None else layer,
            prepend=prepend,
            prefix=prefix,
            final_norm=self._final_norm and layer is None,
        )

    def _by_hooks(
        self, ids: Tensor, cu_seqlens: Tensor, longest: int, first: Tensor | None, last: Tensor, layer: int | None
    ) -> Tensor:
        backbone = self._backbone
        assert backbone is not None

        def forward() -> Tensor:
            if self._final_norm and layer is None:  # the exit layer is then the model's last
                return backbone(ids, cu_seqlens, longest)
            stop = self.exit_layer if layer is None else layer
            return hidden_after(self.model, stop, lambda: backbone(ids, cu_seqlens, longest))[0]

        if first is None:
            return forward()[last]
        start, stop = self._copied
        sources = last if stop > start else None
        with rows_changed(self.model, first, self._placeholder_like(last), sources, start, stop):
            return forward()[last]

    # ---- what is kept ----

    def _placeholder_like(self, tensor: Tensor) -> Tensor:
        """The placeholder's vector where the tensor is, in the weights' dtype."""
        scale = float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))
        return (self._placeholder * scale).to(tensor.device, self.dtype)

    def _prefix(self, place: int) -> Prefix | None:
        """The template's constant tokens, computed once for these weights on this device."""
        head = self._templates[place].head
        if not self._reuses or not head:
            return None
        state = self._state()
        if state != self._prefixes_of:
            self._prefixes.clear()
            self._prefixes_of = state
        prefix = self._prefixes.get(place)
        if prefix is None:
            assert isinstance(self._backbone, DecoderBackbone)
            prefix = self._backbone.prefix(torch.tensor(head, device=self.device), self.exit_layer)
            self._prefixes[place] = prefix
        return prefix

    def _state(self) -> tuple[Any, ...]:
        """What keys and values follow from: the parameters, and the precision that autocast computes in."""
        kind = self.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # an inference tensor counts no versions
        parameters = [
            (each.data_ptr(), 0 if each.is_inference() else each._version, each.dtype)
            for each in self.model.parameters()
        ]
        return (cast, *parameters)

    def _check_road(self, final_norm: bool, layers: int) -> None:
        if isinstance(self._backbone, DecoderBackbone):
            causal = getattr(self.model.config, "is_causal", True)
        else:
            found = [module.is_causal for module in self.model.modules() if hasattr(module, "is_causal")]
            causal = isinstance(self._backbone, PluggedBackbone) and bool(found) and all(found)
            if causal:
                layer_count(self.model)  # refuses where hooks would not know the blocks
        if not causal:
            raise ValueError(
                "TokenPrependingEmbedder: model must be a causal decoder of the families that packed blocks or the "
                f"attention plug run, got {type(self.model).__name__}"
            )
        if final_norm and self.exit_layer < layers and not isinstance(self._backbone, DecoderBackbone):
            raise ValueError(
                f"TokenPrependingEmbedder: final_norm needs a {type(self.model).__name__} of {self.exit_layer} layers, "
                f"the exit layer, as from_pretrained loads it, got one of {layers}"
            )


def _layers(model: Any) -> int:
    return model.config.get_text_config().num_hidden_layers


def _layer_options(
    config: Any,
    preset: str | None,
    prompt: str | Sequence[str],
    exit_layer: int | None,
    start_layer: int | None,
    stop_layer: int | None,
) -> dict[str, Any]:
    """The three layers, checked: those given, else the preset's, else those that go without."""
    layers = config.get_text_config().num_hidden_layers
    chosen = {"exit_layer": layers - 1, "start_layer": 1, "stop_layer": 7}
    if preset is not None:
        if preset not in TOKEN_PREPENDING_PRESETS:
            names = ", ".join(TOKEN_PREPENDING_PRESETS)
            raise ValueError(f"from_pretrained: preset must be one of {names}, got {preset!r}")
        found = TOKEN_PREPENDING_PRESETS[preset]
        chosen = {
            "exit_layer": found.exit_layer_for(prompt, layers),
            "start_layer": found.start_layer,
            "stop_layer": found.stop_layer,
        }
    given = {"exit_layer": exit_layer, "start_layer": start_layer, "stop_layer": stop_layer}
    chosen |= {name: value for name, value in given.items() if value is not None}
    _check_layers(chosen["exit_layer"], chosen["start_layer"], chosen["stop_layer"], layers)
    return chosen


def _check_layers(exit_layer: Any, start_layer: Any, stop_layer: Any, layers: int) -> None:
    if not _is_integer(exit_layer) or not 1 <= exit_layer <= layers:
        raise ValueError(f"TokenPrependingEmbedder: exit_layer must be from 1 to {layers}, got {exit_layer!r}")
    # copies before blocks that do not run are none
    for name, value, least in (("start_layer", start_layer, 0), ("stop_layer", stop_layer, start_layer)):
        if not _is_integer(value) or value < least:
            raise ValueError(f"TokenPrependingEmbedder: {name} must be an integer of at least {least}, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
