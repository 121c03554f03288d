"""Definition of the paragraph-vector family in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: keeps AdaGrad from dividing by 0
SQUARES_FLOOR = 1e-12


class Gradients(NamedTuple):
    """Gradients of the summed loss: of the rows of ``documents`` in the batch, and of whole tables."""

    documents: Tensor
    words: Tensor
    bias: Tensor
    projection: Tensor | None
    context: Tensor | None


def binary_code(z: Tensor) -> tuple[Tensor, Tensor]:
    """2 round(y) - 1 for y = sigmoid(z), and 2 y (1 - y), the slope that its gradient pretends."""
    y = torch.sigmoid(z)
    return torch.where(z > 0, 1.0, -1.0).to(z.dtype), 2 * y * (1 - y)


def context_weights(cu_seqlens: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """``[T, T]``: 1 / (the number of tokens in t's window) where s is one of them: same document, not t, near."""
    total = int(cu_seqlens[-1])
    place = torch.arange(total)
    document = torch.bucketize(place, cu_seqlens[1:].long(), right=True)
    near = (place[:, None] - place[None]).abs() <= window
    inside = (near & (document[:, None] == document[None]) & (place[:, None] != place[None])).to(dtype)
    return inside / inside.sum(1, keepdim=True).clamp(min=1)


def sampled_softmax(logits: Tensor, negative_logits: Tensor, hits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses ``[T]`` of tokens among themselves ``[T]`` and the negatives ``[T, K]`` that are not ``hits``; and the
    gradients of both kinds of logits."""
    every = torch.cat([logits[:, None], negative_logits.masked_fill(hits, -torch.inf)], dim=1)
    probabilities = torch.softmax(every, dim=1)
    return torch.logsumexp(every, dim=1) - logits, probabilities[:, 0] - 1, probabilities[:, 1:]


def loss_and_gradients(
    documents: Tensor,
    words: Tensor,
    bias: Tensor,
    rows: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    negatives: Tensor,
    log_expected: Tensor,
    binary: bool,
    projection: Tensor | None,
    context: Tensor | None,
    window: int,
) -> tuple[Tensor, Gradients]:
    """The loss of each document ``[B]`` and the gradients of their sum, written out."""
    dtype = documents.dtype
    tokens, negatives = tokens.long(), negatives.long()
    z = documents[rows] if projection is None else documents[rows] @ projection
    codes, slopes = binary_code(z) if binary else (z, torch.ones_like(z))
    document_of = torch.repeat_interleave(torch.arange(len(rows)), (cu_seqlens[1:] - cu_seqlens[:-1]).long())
    features = codes[document_of]
    if context is not None:
        nearby = context_weights(cu_seqlens, window, dtype)
        features = torch.cat([features, nearby @ context[tokens]], dim=1)
    shift = bias - log_expected.to(dtype)
    hits = tokens[:, None] == negatives[None]
    losses, missing, probabilities = sampled_softmax(
        (features * words[tokens]).sum(1) + shift[tokens], features @ words[negatives].T + shift[negatives], hits
    )
    feature_gradients = missing[:, None] * words[tokens] + probabilities @ words[negatives]
    bits = codes.shape[1]
    code_gradients = slopes * torch.zeros_like(codes).index_add(0, document_of, feature_gradients[:, :bits])
    word_gradients = torch.zeros_like(words).index_add(0, tokens, missing[:, None] * features)
    word_gradients.index_add_(0, negatives, probabilities.T @ features)
    bias_gradients = torch.zeros_like(bias).index_add(0, tokens, missing)
    bias_gradients.index_add_(0, negatives, probabilities.sum(0))
    context_gradients = None
    if context is not None:
        context_gradients = torch.zeros_like(context).index_add(0, tokens, nearby.T @ feature_gradients[:, bits:])
    if projection is None:
        gradients = Gradients(code_gradients, word_gradients, bias_gradients, None, context_gradients)
    else:
        document_gradients = code_gradients @ projection.T
        projection_gradients = documents[rows].T @ code_gradients
        gradients = Gradients(
            document_gradients, word_gradients, bias_gradients, projection_gradients, context_gradients
        )
    return torch.zeros_like(z[:, 0]).index_add(0, document_of, losses), gradients


def adagrad(rows: Tensor, squares: Tensor, gradient: Tensor, learning_rate: float, touched: Tensor) -> None:
    """In place: squares += mean(gradient^2), row -= learning_rate gradient / sqrt(squares), of the rows ``touched``."""
    squares[touched] += gradient.square().mean(1)
    rows[touched] -= learning_rate * gradient / (squares[touched, None] + SQUARES_FLOOR).sqrt()


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
) -> Tensor:
    """`loss_and_gradients`, then `adagrad` of every row that took part, each once."""
    loss, gradients = loss_and_gradients(
        documents, words, bias, rows, tokens, cu_seqlens, negatives, log_expected, binary, projection, context, window
    )
    adagrad(documents, document_squares, gradients.documents, learning_rate, rows)
    if not update_words:
        return loss
    touched = torch.cat([tokens, negatives]).long().unique()
    # a word's bias is one more column of its row
    row_and_bias = torch.cat([words, bias[:, None]], dim=1)
    gradient = torch.cat([gradients.words, gradients.bias[:, None]], dim=1)[touched]
    adagrad(row_and_bias, word_squares, gradient, learning_rate, touched)
    words.copy_(row_and_bias[:, :-1])
    bias.copy_(row_and_bias[:, -1])
    if projection is not None:
        assert projection_squares is not None and gradients.projection is not None
        adagrad(projection, projection_squares, gradients.projection, learning_rate, torch.arange(len(projection)))
    if context is not None:
        assert context_squares is not None and gradients.context is not None
        seen = tokens.long().unique()
        adagrad(context, context_squares, gradients.context[seen], learning_rate, seen)
    return loss
