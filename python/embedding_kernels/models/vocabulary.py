"""Words and bigrams of texts as numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

#: letters and digits, with apostrophes inside
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return WORD.findall(text.lower())


def with_bigrams(words: list[str]) -> list[str]:
    """The words, then each with its successor, joined by a space, which no word holds."""
    return [*words, *map(" ".join, pairwise(words))]


@dataclass(frozen=True)
class PackedTexts:
    """Known words of texts, one after the other: text i holds ``tokens[offsets[i]]`` to ``tokens[offsets[i + 1]]``."""

    tokens: np.ndarray  # int32 [T]
    offsets: np.ndarray  # int64 [N + 1]

    def batches(self, most_tokens: int, draws: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Texts with any token in a drawn order, cut where a batch would exceed ``most_tokens``: rows int64, tokens
        int32, cu_seqlens int32."""
        lengths = np.diff(self.offsets)
        order = draws.permutation(np.flatnonzero(lengths))
        lengths = lengths[order]
        ends = np.concatenate(([0], np.cumsum(lengths)))
        # a token's place in the new order, less that of its text, plus that of its text in the old one
        tokens = self.tokens[np.arange(ends[-1]) + np.repeat(self.offsets[order] - ends[:-1], lengths)]
        start = 0
        while start < len(order):
            end = max(start + 1, int(np.searchsorted(ends, ends[start] + most_tokens, "right")) - 1)
            cu_seqlens = (ends[start : end + 1] - ends[start]).astype(np.int32)
            part = tokens[ends[start] : ends[end]]
            yield tuple(map(torch.from_numpy, (order[start:end], part, cu_seqlens)))  # type: ignore[misc]
            start = end


class Vocabulary:
    """Known words (and bigrams) by falling count, ties in the order of the alphabet.

    Args:
        words: the words.
        counts: how often each was seen, int64.
        bigrams: whether texts are read as words and bigrams.
    """

    def __init__(self, words: Sequence[str], counts: Tensor, bigrams: bool) -> None:
        self.words, self.counts, self.bigrams = list(words), counts, bigrams
        self._numbers = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts: Iterable[str], min_count: int, bigrams: bool) -> Vocabulary:
        """What is seen at least ``min_count`` times."""
        seen: Counter[str] = Counter()
        for text in texts:
            words = words_of(text)
            seen.update(with_bigrams(words) if bigrams else words)
        known = sorted((-count, word) for word, count in seen.items() if count >= min_count)
        return cls(
            [word for _, word in known], torch.tensor([-count for count, _ in known], dtype=torch.int64), bigrams
        )

    def __len__(self) -> int:
        return len(self.words)

    def pack(self, texts: Iterable[str]) -> PackedTexts:
        """The texts' known words as numbers."""
        numbers = self._numbers
        rows = []
        for text in texts:
            words = words_of(text)
            found = with_bigrams(words) if self.bigrams else words
            rows.append(np.array([numbers[word] for word in found if word in numbers], dtype=np.int32))
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        return PackedTexts(tokens, np.concatenate(([0], np.cumsum(lengths))))

    def tensors(self) -> dict[str, Tensor]:
        """The vocabulary as tensors to be stored."""
        text = "\n".join(self.words).encode()
        return {"vocabulary": torch.frombuffer(bytearray(text), dtype=torch.uint8), "counts": self.counts}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], bigrams: bool) -> Vocabulary:
        """The vocabulary that `tensors` gave."""
        words = tensors["vocabulary"].numpy().tobytes().decode().split("\n")
        if len(words) != len(tensors["counts"]):
            raise ValueError(f"{len(words)} words have {len(tensors['counts'])} counts")
        return cls(words, tensors["counts"], bigrams)
