"""Training of paragraph vectors: one step for a batch of documents, in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import (
    check_offsets,
    check_range,
    check_same_device,
    check_size,
    check_tensor,
    describe,
    refuse,
    values_readable,
)
from ._registry import call, register

_OP = "paragraph_vector_step"
_F32 = (torch.float32,)


def paragraph_vector_step(
    documents: Tensor,
    document_squares: Tensor,
    words: Tensor,
    bias: Tensor,
    word_squares: Tensor,
    rows: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    negatives: Tensor,
    log_expected: Tensor,
    learning_rate: float,
    binary: bool = True,
    update_words: bool = True,
    projection: Tensor | None = None,
    projection_squares: Tensor | None = None,
    context: Tensor | None = None,
    context_squares: Tensor | None = None,
    window: int = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """One training step of (binary) paragraph vectors on a batch of documents. Writes to the learned tensors.

    Document i of the batch is row ``rows[i]`` of ``documents`` and holds the words ``tokens[cu_seqlens[i]]`` to
    ``tokens[cu_seqlens[i + 1]]``. From its row comes ``z = documents[rows[i]]``, or ``documents[rows[i]] @ projection``
    (Real-Binary), and from that the features x of its code:

    - ``binary``: x = 2 round(y) - 1 with y = sigmoid(z), so 1 where z > 0, else -1; its gradient pretends no rounding,
      ∂L/∂z = ∂L/∂x · 2 y (1 - y). The paper's W round(y) + β is the same model with other W and β; over bits 0 and 1
      every row of W has a common direction to learn, in which AdaGrad drifts until all codes are zeros;
    - else x = z (plain paragraph vectors).

    The features of a token are x (PV-DBOW), or, with ``context``, x followed by the mean of the rows of ``context`` of
    the words at most ``window`` places away in the same document (PV-DM; 0 where there are none). The logit of word w
    is ``words[w] · features + bias[w] - log_expected[w]``; a token's loss is that of a softmax over its word and the
    ``negatives``, those equal to its word left out (sampled softmax). Gradients are summed over the batch. Each row
    that took part is then changed once, by AdaGrad with one rate a row (g its gradient, a word's bias counting as one
    more column):

        squares += mean(g²);  row -= learning_rate · g / sqrt(squares + 1e-12)

    Nothing of size tokens × vocabulary is formed; the result is the same, to the bit, for any number of threads. On the
    CPU only.

    Grzegorczyk and Kurdziel, "Binary Paragraph Vectors", 2017 (arXiv 1611.01116); Le and Mikolov, "Distributed
    Representations of Sentences and Documents", 2014; Jean et al., "On Using Very Large Target Vocabulary for Neural
    Machine Translation", 2015 (sampled softmax).

    Args:
        documents: float32 ``[N, D]``, written to: rows of ``rows``.
        document_squares: float32 ``[N]``, written to.
        words: float32 ``[V, F]``, written to, F = code width + context width.
        bias: float32 ``[V]``, written to.
        word_squares: float32 ``[V]``, written to.
        rows: int64 ``[B]``, distinct.
        tokens: int32 ``[T]``, rows of ``words``.
        cu_seqlens: int32 ``[B + 1]``, from 0 to T; documents may be empty.
        negatives: int32 ``[K]``, K ≥ 1, drawn words; may repeat.
        log_expected: float32 ``[V]``: the logarithm of how often each word is expected among the negatives, K q(w).
        learning_rate: at least 0.
        binary: whether codes are rounded.
        update_words: False changes ``documents`` and ``document_squares`` alone: inference for new documents.
        projection: float32 ``[D, code width]`` or None, written to; without it the code width is D.
        projection_squares: float32 ``[D]``, written to; given with ``projection``.
        context: float32 ``[V, context width]`` or None, written to.
        context_squares: float32 ``[V]``, written to; given with ``context``.
        window: with ``context`` at least 1, else 0.
        backend: "cpu" or "reference", which takes float64 too; None takes the kernel.

    Returns:
        float32 ``[B]``: the loss of each document before the step, summed over its tokens, in nats.

    Raises:
        ValueError: bad shape, dtype, device or value, before anything is written.
    """
    args = (
        *(documents, document_squares, words, bias, word_squares, rows, tokens, cu_seqlens, negatives, log_expected),
        *(learning_rate, binary, update_words, projection, projection_squares, context, context_squares, window),
    )
    return call(_STEP, backend, *args)


def _check_squares(name: str, squares: Any, of: str, rows: Tensor) -> None:
    check_tensor(_OP, name, squares, "a float32 tensor [rows]", _F32, 1)
    check_size(_OP, name, squares, 0, rows.shape[0], f"the rows of {of}")


def _check_pair(name: str, rows: Tensor | None, squares_name: str, squares: Tensor | None) -> None:
    if rows is None:
        if squares is not None:
            refuse(_OP, squares_name, f"None without {name}", describe(squares))
        return
    check_tensor(_OP, name, rows, "a float32 tensor of rank 2", _F32, 2)
    if squares is None:
        refuse(_OP, squares_name, f"given with {name}", "None")
    _check_squares(squares_name, squares, name, rows)


def _check_rows(rows: Tensor, documents: int) -> None:
    if not values_readable(rows):
        return
    outside = rows[(rows < 0) | (rows >= documents)]
    if outside.numel():
        refuse(_OP, "rows", f"from 0 to {documents - 1} (the rows of documents)", str(int(outside[0])))
    ordered = rows.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.numel():
        refuse(_OP, "rows", "distinct", f"{int(twice[0])} twice")


def _check_words(name: str, words: Tensor, vocabulary: int) -> None:
    if not values_readable(words):
        return
    outside = words[(words < 0) | (words >= vocabulary)]
    if outside.numel():
        refuse(_OP, name, f"from 0 to {vocabulary - 1} (the rows of words)", str(int(outside[0])))


def _check_shapes(
    documents: Tensor, words: Tensor, projection: Tensor | None, context: Tensor | None, window: int
) -> None:
    if projection is not None:
        check_size(_OP, "projection", projection, 0, documents.shape[1], "the width of documents")
    if context is not None:
        check_size(_OP, "context", context, 0, words.shape[0], "the rows of words")
    bits = documents.shape[1] if projection is None else projection.shape[1]
    check_range(_OP, "the width of the code", bits, 1)
    width = bits + (0 if context is None else context.shape[1])
    check_size(_OP, "words", words, 1, width, "the widths of code and context together")
    if context is None:
        check_range(_OP, "window", window, 0, 0)
    else:
        check_range(_OP, "window", window, 1)


def _check_step(
    documents: Tensor,
    document_squares: Tensor,
    words: Tensor,
    bias: Tensor,
    word_squares: Tensor,
    rows: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    negatives: Tensor,
    log_expected: Tensor,
    learning_rate: float,
    binary: bool = True,
    update_words: bool = True,
    projection: Tensor | None = None,
    projection_squares: Tensor | None = None,
    context: Tensor | None = None,
    context_squares: Tensor | None = None,
    window: int = 0,
) -> None:
    expected = 'a float32 tensor [N, D] (float64 runs with backend="reference")'
    check_tensor(_OP, "documents", documents, expected, _F32, 2)
    _check_squares("document_squares", document_squares, "documents", documents)
    check_tensor(_OP, "words", words, "a float32 tensor [V, F]", _F32, 2)
    check_tensor(_OP, "bias", bias, "a float32 tensor [V]", _F32, 1)
    check_size(_OP, "bias", bias, 0, words.shape[0], "the rows of words")
    _check_squares("word_squares", word_squares, "words", words)
    check_tensor(_OP, "rows", rows, "an int64 tensor [B]", (torch.int64,), 1)
    check_tensor(_OP, "tokens", tokens, "an int32 tensor [T]", (torch.int32,), 1)
    check_tensor(_OP, "cu_seqlens", cu_seqlens, "an int32 tensor [rows + 1]", (torch.int32,), 1)
    check_size(_OP, "cu_seqlens", cu_seqlens, 0, rows.shape[0] + 1, "one more than rows")
    check_tensor(_OP, "negatives", negatives, "an int32 tensor [K]", (torch.int32,), 1)
    check_range(_OP, "the size of negatives", negatives.shape[0], 1)
    check_tensor(_OP, "log_expected", log_expected, "a float32 tensor [V]", _F32, 1)
    check_size(_OP, "log_expected", log_expected, 0, words.shape[0], "the rows of words")
    if not (learning_rate >= 0 and math.isfinite(learning_rate)):
        refuse(_OP, "learning_rate", "a finite number of at least 0", f"{learning_rate:g}")
    _check_pair("projection", projection, "projection_squares", projection_squares)
    _check_pair("context", context, "context_squares", context_squares)
    _check_shapes(documents, words, projection, context, window)
    check_same_device(
        _OP, "documents", documents, document_squares=document_squares, words=words, bias=bias,
        word_squares=word_squares, rows=rows, tokens=tokens, cu_seqlens=cu_seqlens, negatives=negatives,
        log_expected=log_expected, projection=projection, projection_squares=projection_squares, context=context,
        context_squares=context_squares,
    )  # fmt: skip
    check_offsets(_OP, "cu_seqlens", cu_seqlens, tokens.shape[0])
    _check_rows(rows, documents.shape[0])
    _check_words("tokens", tokens, words.shape[0])
    _check_words("negatives", negatives, words.shape[0])


def _flops(*shapes: Any) -> int:
    """A multiplication and an addition for each feature: of every token's and negative's logit, once forward, twice
    (features and words) backward; of the projection the same."""
    documents, words, rows, tokens, negatives = (shapes[i] for i in (0, 2, 5, 6, 8))
    projection, context = (shapes[i] if len(shapes) > i else None for i in (13, 15))
    passes = 3 if len(shapes) <= 12 or shapes[12] else 2
    # in PV-DBOW the tokens of a document share their negatives' logits
    examples = rows[0] if context is None else tokens[0]
    logits = (tokens[0] + examples * negatives[0]) * words[1]
    projected = 0 if projection is None else rows[0] * documents[1] * projection[1]
    return 2 * passes * (logits + projected)


_STEP = register(
    _OP,
    family="paragraph_vector",
    check=_check_step,
    fake=lambda documents, *rest: documents.new_empty((rest[4].shape[0],)),
    flops=_flops,
    cpu_only=True,
)
