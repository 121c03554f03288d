"""Texts to batches of about equal work: tokenised together, packed without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers marks "no limit" by an integer near 1e30
_NO_LIMIT = 1_000_000
# a batch on a CPU: more than some 500 tokens a thread only lessen fixed costs, and a block of 32 MiB or more (glibc's
# limit) is mapped and zeroed anew at each allocation, so the widest activation stays below that
_CPU_ACTIVATION_BYTES = 24 * 2**20
_CPU_TOKENS_PER_THREAD = 512
_CPU_MOST_TOKENS = 16_384
_GPU_TOKENS = 32_768


@dataclass(frozen=True)
class Batch:
    """Some rows of a `TokenizedTexts`, one after the other without padding."""

    rows: slice | np.ndarray  # which texts
    lengths: np.ndarray  # int64 [b]: their tokens
    inputs: dict[str, Tensor]  # int64 [T] each: input_ids and, for a few models, token_type_ids
    pad_values: dict[str, int]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    def padded(self) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs as ``[b, longest]``, padded on the right, and a bool mask of the real tokens."""
        mask = torch.from_numpy(np.arange(self.longest) < self.lengths[:, None])
        padded = {
            name: torch.full(mask.shape, self.pad_values[name]).masked_scatter_(mask, flat)
            for name, flat in self.inputs.items()
        }
        return padded, mask


class TokenizedTexts:
    """Token ids of many texts in flat arrays: a Python list for each would cost ten times the memory."""

    def __init__(self, columns: dict[str, np.ndarray], lengths: np.ndarray, pad_values: dict[str, int]) -> None:
        self.lengths = lengths
        self._columns = columns
        self._pad_values = pad_values
        self._starts = np.concatenate(([0], np.cumsum(lengths)))

    def key(self, row: int) -> tuple[int, bytes]:
        """What orders texts by their tokens alone, and is the same for equal ones."""
        tokens = slice(self._starts[row], self._starts[row + 1])
        return int(self.lengths[row]), b"".join(flat[tokens].tobytes() for flat in self._columns.values())

    def take(self, rows: np.ndarray) -> TokenizedTexts:
        """Those texts alone, in that order."""
        lengths = self.lengths[rows]
        firsts = self._starts[rows] - np.concatenate(([0], np.cumsum(lengths)[:-1]))[: len(rows)]
        tokens = np.arange(lengths.sum()) + np.repeat(firsts, lengths)
        return TokenizedTexts({name: flat[tokens] for name, flat in self._columns.items()}, lengths, self._pad_values)

    def batches(self, token_budget: int, max_texts: int | None) -> Iterator[Batch]:
        """In the order given, each of at most ``token_budget`` tokens (or one text) and ``max_texts`` texts."""
        start, total = 0, len(self.lengths)
        while start < total:
            within = np.searchsorted(self._starts, self._starts[start] + token_budget, side="right") - 1
            end = max(start + 1, int(within))
            end = end if max_texts is None else min(end, start + max_texts)
            tokens = slice(self._starts[start], self._starts[end])
            yield self._batch(slice(start, end), self.lengths[start:end], tokens)
            start = end

    def batches_to_pad(self, token_budget: int, max_texts: int | None) -> Iterator[Batch]:
        """Longest first, so that padding costs little; the budget is of padded tokens. Empty texts are in no batch."""
        order = np.argsort(-self.lengths, kind="stable")
        start, total = 0, int(np.count_nonzero(self.lengths))
        while start < total:
            count = max(1, token_budget // int(self.lengths[order[start]]))
            rows = order[start : min(total, start + (count if max_texts is None else min(count, max_texts)))]
            lengths = self.lengths[rows]
            firsts = self._starts[rows] - np.concatenate(([0], np.cumsum(lengths[:-1])))
            yield self._batch(rows, lengths, np.arange(lengths.sum()) + np.repeat(firsts, lengths))
            start += len(rows)

    def _batch(self, rows: slice | np.ndarray, lengths: np.ndarray, tokens: slice | np.ndarray) -> Batch:
        inputs = {name: torch.from_numpy(flat[tokens].astype(np.int64)) for name, flat in self._columns.items()}
        return Batch(rows, lengths, inputs, self._pad_values)


class TextTokenizer:
    """A transformers tokenizer, asked for what a forward pass needs and nothing else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_length: int | None) -> None:
        self.tokenizer: Any = tokenizer
        self.max_seq_length = max_seq_length if max_seq_length and max_seq_length < _NO_LIMIT else None
        self._columns = ["input_ids"]
        # all zero, the default of every model, for one text in all but a few families (XLNet)
        probe = tokenizer(["a"], return_attention_mask=False)
        if any(chain.from_iterable(probe.get("token_type_ids") or [])):
            self._columns.append("token_type_ids")
        self._prompts: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> TokenizedTexts:
        """Tokenise, cut at ``max_seq_length``."""
        # transformers takes one or more
        encoded = self._encoded(texts) if texts else {column: [] for column in self._columns}
        ids = encoded["input_ids"]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        total = int(lengths.sum())
        columns = {name: np.fromiter(chain.from_iterable(encoded[name]), np.int32, total) for name in self._columns}
        pad_values = {
            "input_ids": self.tokenizer.pad_token_id or 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        return TokenizedTexts(columns, lengths, pad_values)

    def _encoded(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            truncation=self.max_seq_length is not None,
            max_length=self.max_seq_length,
            return_attention_mask=False,
            return_token_type_ids="token_type_ids" in self._columns,
            verbose=False,
        )

    def prompt_tokens(self, prompt: str, how: str, batch: Batch) -> np.ndarray:
        """Tokens at the start of each text of a batch that count as those of ``prompt``, int64 ``[b]``.

        ``how`` is "alone": as many as the prompt has, tokenised by itself, with its leading special tokens
        (sentence-transformers' rule); "without_bos": the same less the beginning-of-text token (NV-Embed's published
        rule, one too few but where the prompt's last token merges into the text); or "shared": those that the text
        begins with, of the prompt's own.
        """
        ids = self._prompt_ids(prompt)
        if how != "shared":
            leading = how == "without_bos" and ids[:1] == [self.tokenizer.bos_token_id]
            return np.full(len(batch.lengths), len(ids) - leading, np.int64)
        starts = np.concatenate(([0], np.cumsum(batch.lengths)))
        flat, whole = batch.inputs["input_ids"].numpy(), np.asarray(ids, np.int64)
        counts = [_shared_length(flat[start:end], whole) for start, end in pairwise(starts)]
        return np.asarray(counts, np.int64)

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Of the prompt alone, without a trailing special token."""
        if prompt not in self._prompts:
            cut = {"truncation": self.max_seq_length is not None, "max_length": self.max_seq_length}
            ids = list(self.tokenizer(prompt, **cut)["input_ids"])
            self._prompts[prompt] = ids[:-1] if ids and ids[-1] in self.tokenizer.all_special_ids else ids
        return self._prompts[prompt]


def _shared_length(text: np.ndarray, prompt: np.ndarray) -> int:
    most = min(len(text), len(prompt))
    differs = (text[:most] != prompt[:most]).nonzero()[0]
    return int(differs[0]) if len(differs) else most


def windows(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most ``size``: bounds the tokens held at once."""
    for start in range(0, total, size):
        yield start, min(start + size, total)


def default_token_budget(model: Any) -> int:
    """Tokens of a batch that suit the device of a transformers model."""
    if model.device.type != "cpu":
        return _GPU_TOKENS
    config = model.config.get_text_config()
    width = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * config.hidden_size
    by_memory = _CPU_ACTIVATION_BYTES // (width * model.dtype.itemsize)
    return min(max(by_memory, _CPU_TOKENS_PER_THREAD * torch.get_num_threads()), _CPU_MOST_TOKENS)


def offsets_of(lengths: np.ndarray, device: torch.device) -> Tensor:
    """int32 ``[b + 1]``: where each of so many rows begins."""
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(device)
