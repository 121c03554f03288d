"""`BinaryParagraphVector`: bit codes of texts by Binary Paragraph Vector, trained on the texts themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._progress import progress_bar
from ..ops.hamming import pack_bits
from ..ops.paragraph_vector import paragraph_vector_step
from .paragraph_vector_file import read_tensors, write_tensors
from .vocabulary import PackedTexts, Vocabulary

logger = logging.getLogger(__name__)

_FORMAT = "embedding_kernels.BinaryParagraphVector"
_VERSION = "1"
_BATCH_TOKENS = 8192  # of a step: every row changes once a step, by its gradients together
_NOISE_POWER = 0.75  # negatives are drawn by word counts to this power, as in word2vec
_START_SCALE = 0.1  # of a document's row before it has learned
# AdaGrad's sums of squares of all but documents start here, so that rare words learn like plain SGD at 1e-4 and codes
# move faster than words: words that are quick to learn the first, random codes leave them nothing to learn
_START_SQUARES = 1e7
KINDS = ("dbow", "dm")


@dataclass(frozen=True)
class ParagraphVectorOptions:
    """What `BinaryParagraphVector` was made with; see there."""

    bits: int = 128
    kind: str = "dbow"
    binary: bool = True
    real_dim: int | None = None
    context_dim: int = 64
    window: int = 5
    bigrams: bool | None = None
    min_count: int = 5
    negatives: int = 64
    epochs: int = 40
    learning_rate: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"bits": 1, "context_dim": 1, "window": 1, "min_count": 1, "negatives": 1, "epochs": 1, "seed": 0}
        if self.real_dim is not None:
            least["real_dim"] = 1
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"BinaryParagraphVector: {name} must be an integer of at least {low}, got {value!r}")
        if self.kind not in KINDS:
            raise ValueError(f"BinaryParagraphVector: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(
                f"BinaryParagraphVector: learning_rate must be a finite number above 0, got {self.learning_rate!r}"
            )
        if self.kind == "dm" and self.bigrams:
            raise ValueError("BinaryParagraphVector: bigrams must be None or False for kind 'dm', got True")

    @property
    def uses_bigrams(self) -> bool:
        return self.kind == "dbow" if self.bigrams is None else self.bigrams


class Inferred(NamedTuple):
    """Codes uint8 ``[N, ceil(bits / 8)]`` and real rows float32 ``[N, real_dim or bits]`` of texts."""

    codes: np.ndarray
    vectors: np.ndarray


class _Rows(NamedTuple):
    """Documents that learn, with AdaGrad's sums of squares."""

    values: Tensor
    squares: Tensor

    @classmethod
    def drawn(cls, count: int, width: int, generator: torch.Generator) -> _Rows:
        return cls(torch.randn(count, width, generator=generator) * _START_SCALE, torch.zeros(count))


class BinaryParagraphVector:
    """Paragraph vectors with a code layer: texts to bits, learned from nothing but the texts.

    Each text has a row of numbers whose signs are its code; the row is trained so that the code predicts the text's
    words (`paragraph_vector_step` has the formulas). On the CPU, with all of torch's threads; the result is the same,
    to the bit, for any number of them.

    Words are what ``[^\\W_]+(?:'[^\\W_]+)*`` matches in the lower-cased text; with bigrams, pairs of neighbouring words
    count as words too. Those seen ``min_count`` times in the texts of `fit` make the vocabulary; others are passed
    over. A text without any known word keeps the row it started from.

    Grzegorczyk and Kurdziel, "Binary Paragraph Vectors", 2017 (arXiv 1611.01116).

    Args:
        bits: width of the code.
        kind: "dbow" predicts words from the code; "dm" from the code and the mean vector of the words around.
        binary: False trains plain real-valued paragraph vectors of ``bits`` dimensions; codes are their signs.
        real_dim: Real-Binary: rows of this many dimensions, projected to the code; None for rows of ``bits``.
        context_dim: width of context words' vectors ("dm").
        window: places on each side that count as context ("dm").
        bigrams: None takes them for "dbow".
        min_count: how often a word or bigram must be seen to be known.
        negatives: words drawn in each step for the sampled softmax.
        epochs: passes over the texts, in `fit` and in `infer`.
        learning_rate: AdaGrad's, falling linearly to 0 (that of words starts at 3e-4 of it).
        seed: of everything drawn.

    Attributes:
        options: the arguments.
        vocabulary: known words and bigrams; None before `fit`.
    """

    def __init__(self, bits: int = 128, **options: Any) -> None:
        known = {field.name for field in fields(ParagraphVectorOptions)}
        surplus = sorted(set(options) - known)
        if surplus:
            raise ValueError(
                f"BinaryParagraphVector: arguments must be among {', '.join(sorted(known))}, got {', '.join(surplus)}"
            )
        self.options = ParagraphVectorOptions(bits, **options)
        self.vocabulary: Vocabulary | None = None
        self._documents = torch.zeros(0, self._row_width)
        self._tables: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in asdict(self.options).items())
        words = 0 if self.vocabulary is None else len(self.vocabulary)
        return f"BinaryParagraphVector({options}; texts={len(self._documents)}, words={words})"

    @property
    def codes(self) -> np.ndarray:
        """Codes of the texts of `fit`, uint8 ``[N, ceil(bits / 8)]``, packed as `pack_bits` does."""
        return self._codes(self._documents)

    @property
    def vectors(self) -> np.ndarray:
        """Real rows of the texts of `fit`, float32 ``[N, real_dim or bits]``: a view, not to be written to."""
        return self._documents.numpy()

    def fit(self, texts: Sequence[str], show_progress_bar: bool | None = None) -> BinaryParagraphVector:
        """Learn vocabulary, words and codes from the texts, anew. An interrupted fit leaves the model as it was.

        Args:
            texts: any number of strings; empty ones are fine.
            show_progress_bar: None shows one when this package's logger is at INFO or DEBUG, and in a terminal once
                the work has taken two seconds.

        Raises:
            ValueError: texts are not strings, or none of their words is seen ``min_count`` times.
        """
        texts = _as_texts("fit", texts)
        options = self.options
        vocabulary = Vocabulary.of(texts, options.min_count, options.uses_bigrams)
        if not len(vocabulary):
            raise ValueError(
                f"fit: texts must hold words seen at least {options.min_count} times (min_count), got {len(texts)} "
                "texts with none: give more texts or a lower min_count"
            )
        generator = torch.Generator().manual_seed(options.seed)
        documents = _Rows.drawn(len(texts), self._row_width, generator)
        tables = self._new_tables(vocabulary, generator)
        self._train(vocabulary, vocabulary.pack(texts), documents, tables, True, "Training", show_progress_bar)
        self.vocabulary, self._documents, self._tables = vocabulary, documents.values, tables
        return self

    def infer(self, texts: Sequence[str], show_progress_bar: bool | None = None) -> Inferred:
        """Codes and real rows of new texts: the words stay as `fit` left them. The same for the same texts and seed.

        Raises:
            ValueError: the model has not been fitted, or texts are not strings.
        """
        if self.vocabulary is None:
            raise ValueError("infer: the model must have learned first (fit, or load), got one that has not")
        texts = _as_texts("infer", texts)
        generator = torch.Generator().manual_seed(self.options.seed)
        documents = _Rows.drawn(len(texts), self._row_width, generator)
        packed = self.vocabulary.pack(texts)
        self._train(self.vocabulary, packed, documents, self._tables, False, "Inferring", show_progress_bar)
        return Inferred(self._codes(documents.values), documents.values.numpy())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one safetensors file, all or nothing: an interrupted save leaves an older file as it was.

        Raises:
            ValueError: the model has not been fitted.
        """
        if self.vocabulary is None:
            raise ValueError("save: the model must have learned first (fit), got one that has not")
        tensors = {"documents": self._documents, **self._tables, **self.vocabulary.tensors()}
        write_tensors(path, tensors, {"format": _FORMAT, "version": _VERSION}, asdict(self.options))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BinaryParagraphVector:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no such model, is truncated, or has been altered.
        """
        tensors, options = read_tensors(path, {"format": _FORMAT, "version": _VERSION})
        try:
            model = cls(**options)
            model.vocabulary = Vocabulary.from_tensors(tensors, model.options.uses_bigrams)
            expected = model._new_tables(model.vocabulary, torch.Generator())
            model._tables = {name: tensors.pop(name) for name in expected}
            model._documents = tensors.pop("documents")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"load: {os.fspath(path)} has been altered: {error}") from error
        shapes = {name: tuple(table.shape) for name, table in model._tables.items()}
        if shapes != {name: tuple(table.shape) for name, table in expected.items()}:
            raise ValueError(f"load: {os.fspath(path)} has been altered: its tensors do not fit its options")
        return model

    @property
    def _row_width(self) -> int:
        return self.options.real_dim or self.options.bits

    def _codes(self, documents: Tensor) -> np.ndarray:
        projection = self._tables.get("projection")
        return pack_bits(documents if projection is None else documents @ projection).numpy()

    def _new_tables(self, vocabulary: Vocabulary, generator: torch.Generator) -> dict[str, Tensor]:
        """What is learned beside the documents, by its name among the step's arguments."""
        options, count = self.options, len(vocabulary)
        context_dim = options.context_dim if options.kind == "dm" else 0
        probabilities = vocabulary.counts.double() / vocabulary.counts.sum()
        tables = {
            "words": torch.zeros(count, options.bits + context_dim),
            "bias": probabilities.log().float(),  # the model starts from the words' frequencies
            "word_squares": torch.full((count,), _START_SQUARES),
        }
        if options.real_dim is not None:
            scale = options.real_dim**-0.5 / _START_SCALE
            tables["projection"] = torch.randn(options.real_dim, options.bits, generator=generator) * scale
            tables["projection_squares"] = torch.full((options.real_dim,), _START_SQUARES)
        if context_dim:
            tables["context"] = torch.randn(count, context_dim, generator=generator) * _START_SCALE
            tables["context_squares"] = torch.full((count,), _START_SQUARES)
        return tables

    def _train(
        self,
        vocabulary: Vocabulary,
        texts: PackedTexts,
        documents: _Rows,
        tables: Mapping[str, Tensor],
        update_words: bool,
        what: str,
        show: bool | None,
    ) -> None:
        options = self.options
        draws = np.random.default_rng(options.seed)
        noise = vocabulary.counts.double() ** _NOISE_POWER
        noise = noise / noise.sum()
        log_expected = (noise * options.negatives).log().float()
        cumulative = noise.cumsum(0).numpy()
        total, done = options.epochs * len(texts.tokens), 0
        with progress_bar(what, total, "word", show, logger) as bar:
            for _ in range(options.epochs):
                for rows, tokens, cu_seqlens in texts.batches(_BATCH_TOKENS, draws):
                    negatives = np.searchsorted(cumulative, draws.random(options.negatives)).clip(max=len(noise) - 1)
                    paragraph_vector_step(
                        documents.values, documents.squares, tables["words"], tables["bias"], tables["word_squares"],
                        rows, tokens, cu_seqlens, torch.from_numpy(negatives.astype(np.int32)), log_expected,
                        options.learning_rate * (1 - done / total), options.binary, update_words,
                        tables.get("projection"), tables.get("projection_squares"), tables.get("context"),
                        tables.get("context_squares"), options.window if options.kind == "dm" else 0,
                    )  # fmt: skip
                    done += len(tokens)
                    bar.update(len(tokens))


def _as_texts(op: str, texts: Any) -> list[str]:
    expected = f"{op}: texts must be a sequence of strings"
    if isinstance(texts, (str, bytes, Mapping)) or not hasattr(texts, "__iter__"):
        raise ValueError(f"{expected}, got {type(texts).__name__}")
    texts = list(texts)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{expected}, got {type(text).__name__} in place {place}")
    return texts
