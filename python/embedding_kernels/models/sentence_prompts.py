"""Prompts around sentences, whose last token a decoder makes the embedding: templates, their texts, their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from .batching import TokenizedTexts

#: in a template: the sentence, and the token whose state is overwritten by that of the last one
SENTENCE, PLACEHOLDER = "{S}", "<PST>"

_EOL = 'his sentence : <PST> "{S}" means in one word:"'

# Of Lei et al., "Meta-Task Prompting Elicits Embeddings from Large Language Models", 2024, the tasks and the form; the
# wordings are this project's: text classification, sentiment, similarity and information extraction, two of each.
_TASKS = (
    "In this task, the topic of a text is to be named, such as politics, science, business, health, sport or art.",
    "In this task, a text is to be put into the one category that a reader would look for it in.",
    "In this task, the opinion that a text expresses is to be judged as positive, negative or neutral.",
    "In this task, the emotion of a text is to be recognised, such as joy, anger, sadness, fear or surprise.",
    "In this task, texts are to be matched with others of the same meaning, however these are worded.",
    "In this task, it is to be decided whether two texts say the same thing, so what a text says matters alone.",
    "In this task, the central facts of a text are to be extracted: who does what, where and when.",
    "In this task, the key terms of a text are to be found, with the things and the persons that it is about.",
)

#: name -> templates, whose embeddings are averaged. PromptEOL: Jiang et al., "Scaling Sentence Embeddings with Large
#: Language Models", 2024. Pretended chain of thought and knowledge enhancement: Zhang et al., "Simple Techniques for
#: Enhancing Sentence Embeddings in Generative Language Models", 2024. The placeholder in them: Fu et al., "Token
#: Prepending", 2024. Each name with "_plain" after it is the same prompt without the placeholder.
PROMPTS: dict[str, tuple[str, ...]] = {
    "prompt_eol": ("T" + _EOL,),
    "pretended_cot": ("After thinking step by step , t" + _EOL,),
    "knowledge_enhancement": (
        "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
        "additional but less central details. With this in mind , t" + _EOL,
    ),
    "meta_eol": tuple(f"{task} For this task , t{_EOL}" for task in _TASKS),
}
PROMPTS |= {
    f"{name}_plain": tuple(text.replace(PLACEHOLDER + " ", "") for text in texts) for name, texts in PROMPTS.items()
}


def published_form(sentence: str) -> str:
    """A sentence as the published code of PromptEOL and token prepending puts it between quotation marks.

    A full stop ends it unless ``. ? " '`` does, double quotation marks become single, a question mark at the end a full
    stop. An empty sentence stays empty.
    """
    if sentence and sentence[-1] not in ".?\"'":
        sentence += "."
    sentence = sentence.replace('"', "'")
    return sentence[:-1] + "." if sentence.endswith("?") else sentence


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt's text around the placeholder and the sentence."""

    head: str
    placeholder: bool
    opening: str
    closing: str

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """Of a text with ``{S}`` for the sentence and, before it, ``<PST>`` or none; ValueError otherwise."""
        before, _, closing = text.partition(SENTENCE)
        head, placeholder, opening = before.rpartition(PLACEHOLDER)
        if text.count(SENTENCE) != 1 or PLACEHOLDER in head + closing:
            raise ValueError(
                f"TokenPrependingEmbedder: prompt must hold {SENTENCE} once, and {PLACEHOLDER} at most once and before "
                f"it, got {text!r}"
            )
        return cls(head, bool(placeholder), opening, closing)


def templates_of(prompt: str | Sequence[str]) -> tuple[PromptTemplate, ...]:
    """Those of a name in `PROMPTS`, or of template texts; ValueError for anything else."""
    texts: Sequence[str] = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if isinstance(prompt, str) and SENTENCE not in prompt:
        if prompt not in PROMPTS:
            raise ValueError(
                f"TokenPrependingEmbedder: prompt must be one of {', '.join(PROMPTS)}, or a text with {SENTENCE}, got "
                f"{prompt!r}"
            )
        texts = PROMPTS[prompt]
    if not texts:
        raise ValueError("TokenPrependingEmbedder: prompt must be at least one text, got none")
    return tuple(PromptTemplate.parse(text) for text in texts)


class PromptTokens:
    """A template's tokens: constant ones first, then in each text the placeholder and what holds the sentence.

    The placeholder is no token of the vocabulary. What stands before and after it is tokenised apart, as tokenizers do
    around an added token. A template without it has no constant tokens, so that all of it is tokenised as one text.

    Args:
        tokenizer: a transformers tokenizer.
        template: the prompt.

    Attributes:
        head: ids of the special tokens that the tokenizer puts first, and of the text before the placeholder.
        least: tokens of the whole prompt around a sentence of one token.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate) -> None:
        self._tokenizer = tokenizer
        self.template = template
        leading = _leading_special_tokens(tokenizer, template.head + template.opening + template.closing)
        self.head = leading + self._ids([template.head])[0] if template.placeholder else []
        # what precedes each text's own tokens; any id stands for the placeholder
        self._first = [0] if template.placeholder else leading
        around, closing = self._ids([template.opening + template.closing, template.closing])
        self._closing = len(closing)
        self.least = len(self.head) + len(self._first) + len(around) + 1

    def __call__(self, sentences: Sequence[str], max_seq_length: int | None, with_head: bool) -> TokenizedTexts:
        """Tokens of the prompt around each sentence, in order, without or with those of ``head`` in each.

        Where there are more than ``max_seq_length`` with the head, the sentence loses its end.
        """
        template = self.template
        ids = self._ids([template.opening + sentence + template.closing for sentence in sentences])
        first = (self.head if with_head else []) + self._first
        if max_seq_length is not None:
            most = max_seq_length - len(self.head) - len(self._first)
            ids = [each if len(each) <= most else self._cut(each, most) for each in ids]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids)) + len(first)
        tokens = chain.from_iterable(chain(first, each) for each in ids)
        return TokenizedTexts({"input_ids": np.fromiter(tokens, np.int32, int(lengths.sum()))}, lengths, {})

    def placeholder_row(self, with_head: bool) -> int | None:
        """Its row in each text; None for a template without it."""
        if not self.template.placeholder:
            return None
        return len(self.head) if with_head else 0

    def _cut(self, ids: list[int], most: int) -> list[int]:
        kept = most - self._closing
        return ids[:kept] + ids[len(ids) - self._closing :]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _leading_special_tokens(tokenizer: Any, text: str) -> list[int]:
    """Those before any text; those after it would take the place of the prompt's last token."""
    whole, bare = (list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise ValueError(
        "TokenPrependingEmbedder: tokenizer must put special tokens around a text and leave its own as they are, got "
        f"{whole} for {bare}"
    )
