"""Losses of listwise rerankers: ListNet in its two published forms, targets from ranks, and orthogonal anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._checks import (
    check_offsets,
    check_same_device,
    check_tensor,
    describe,
    refuse,
    values_readable,
)

#: τ of the published multi-view reranker, for targets and scores
PUBLISHED_TEMPERATURE = 0.8

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = (torch.int64, torch.int32, *_FLOATS)


def rank_targets(
    ranks: Tensor, cu_passages: Tensor | None = None, *, temperature: float = PUBLISHED_TEMPERATURE
) -> Tensor:
    """What each passage of a query should get of its probability, from its rank alone.

    ``t_i = exp(1 / (τ rank_i)) / Σ_j exp(1 / (τ rank_j))`` over the passages of one query: .366, .196, .159, .143, .135
    for five at τ = .8. As the published code of MVP forms them ("Multi-view-guided Passage Reranking with Large
    Language Models", arXiv 2509.07485, 2025).

    Args:
        ranks: integers or floats ``[B, n]``, 1 the best; or ``[P]`` with ``cu_passages``. Equal ranks are allowed.
        cu_passages: int32 ``[Q + 1]``, from 0, never falling, to P: the passages of each query.
        temperature: τ, positive.

    Returns:
        In the shape of ``ranks``, each query's summing to 1: float32, or float64 for float64.

    Raises:
        ValueError: bad dtype, rank, offsets or τ, or a rank below 1 (offsets and ranks on CUDA only under
            EMBEDDING_KERNELS_CHECK=1).
    """
    _check_lists("rank_targets", "ranks", ranks, _NUMBERS, cu_passages, temperature)
    if values_readable(ranks) and ranks.numel() and not bool((ranks >= 1).all()):
        refuse("rank_targets", "ranks", "at least 1 everywhere", str(float(ranks[~(ranks >= 1)][0])))
    return _log_softmax(_wide(ranks).reciprocal() / temperature, cu_passages).exp()


def listnet(
    scores: Tensor,
    targets: Tensor,
    cu_passages: Tensor | None = None,
    *,
    temperature: float = PUBLISHED_TEMPERATURE,
) -> Tensor:
    """ListNet's cross-entropy of the best place, averaged over the queries that have passages.

    ``L = −Σ_i t_i log p_i`` with ``p = softmax(s / τ)`` over the passages of a query; least where p = t (Cao et al.,
    "Learning to Rank: From Pairwise Approach to Listwise Approach", 2007). Without τ in the targets, which come ready
    (`rank_targets`). Formed in float32, float64 for float64. Differentiable in both, also twice.

    Args:
        scores: float ``[B, n]``, or ``[P]`` with ``cu_passages``.
        targets: float, of the shape of ``scores``; of each query they should be at least 0 and sum to 1.
        cu_passages: int32 ``[Q + 1]``, from 0, never falling, to P: the passages of each query.
        temperature: τ, positive.

    Returns:
        A scalar; 0 where no query has passages.

    Raises:
        ValueError: bad dtype, shape, offsets or τ (offsets on CUDA only under EMBEDDING_KERNELS_CHECK=1).
    """
    _check_targets("listnet", scores, targets, cu_passages, temperature)
    return _cross_entropy(_log_softmax(_wide(scores) / temperature, cu_passages), targets, cu_passages)


def listnet_double(
    scores: Tensor,
    targets: Tensor,
    cu_passages: Tensor | None = None,
    *,
    temperature: float = PUBLISHED_TEMPERATURE,
) -> Tensor:
    """The loss that the released multi-view rerankers were trained with: a softmax of the softmax.

    ``L = −Σ_i t_i log softmax(p)_i`` with ``p = softmax(s / τ)``: the published code of MVP (arXiv 2509.07485, 2025)
    hands probabilities to a cross-entropy that takes logits. Its least value is not at p = t but with all of p on the
    best passage, and its range is narrow: 1.538 to 1.609 around 1.576 at p = t, for five passages in order at τ = .8.
    Arguments, return and errors are those of `listnet`.
    """
    _check_targets("listnet_double", scores, targets, cu_passages, temperature)
    probabilities = _log_softmax(_wide(scores) / temperature, cu_passages).exp()
    return _cross_entropy(_log_softmax(probabilities, cu_passages), targets, cu_passages)


def orthogonality(anchors: Tensor) -> Tensor:
    """How far the anchors of a query are from being at right angles to each other, averaged over the queries.

    ``L = 1/B Σ_b ‖Â_b Â_bᵀ − I‖²_F`` with rows ``â_k = a_k / ‖a_k‖₂``: the sum of the squared cosines of all ordered
    pairs of views ("MVP", arXiv 2509.07485, 2025). Formed in float32, float64 for float64. Differentiable.

    Args:
        anchors: float ``[B, m, D]``. An anchor of zeros is at right angles to all others, and 1 from its own norm.

    Returns:
        A scalar; 0 for B = 0.

    Raises:
        ValueError: bad dtype or rank.
    """
    check_tensor("orthogonality", "anchors", anchors, "a float tensor [B, m, D]", _FLOATS, 3)
    with torch.autocast(anchors.device.type, enabled=False):  # which would round the cosines
        unit = torch.nn.functional.normalize(_wide(anchors), dim=-1)
        identity = torch.eye(anchors.shape[1], dtype=unit.dtype, device=unit.device)
        return (unit @ unit.transpose(1, 2) - identity).square().sum() / max(anchors.shape[0], 1)


# ---- over lists of one length, or of any ----


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _query_of(cu_passages: Tensor, total: int) -> Tensor:
    """int64 ``[P]``, without a sync."""
    queries = torch.arange(cu_passages.shape[0] - 1, device=cu_passages.device)
    return queries.repeat_interleave(cu_passages.diff().long(), output_size=total)


def _log_softmax(scores: Tensor, cu_passages: Tensor | None) -> Tensor:
    if cu_passages is None:
        return scores.log_softmax(-1)
    query = _query_of(cu_passages, scores.shape[0])
    lists = cu_passages.shape[0] - 1
    # the largest only keeps exp within range: what it adds, it takes away again
    largest = scores.detach().new_zeros(lists).scatter_reduce(0, query, scores.detach(), "amax", include_self=False)
    shifted = scores - largest[query]
    return shifted - shifted.new_zeros(lists).index_add(0, query, shifted.exp()).log()[query]


def _cross_entropy(logarithms: Tensor, targets: Tensor, cu_passages: Tensor | None) -> Tensor:
    if cu_passages is None:
        lists = logarithms.shape[0] if logarithms.shape[1] else 0
        return -(_wide(targets) * logarithms).sum() / max(lists, 1)
    asked = (cu_passages.diff() > 0).sum().clamp(min=1)
    return -(_wide(targets) * logarithms).sum() / asked


# ---- checks ----


def _check_lists(
    op: str,
    name: str,
    lists: Tensor,
    dtypes: tuple[torch.dtype, ...],
    cu_passages: Tensor | None,
    temperature: float,
) -> None:
    kind = "an integer or float" if dtypes is _NUMBERS else "a float"
    if cu_passages is None:
        check_tensor(op, name, lists, f"{kind} tensor [B, n], or [P] with cu_passages", dtypes, 2)
    else:
        check_tensor(op, name, lists, f"{kind} tensor [P], as cu_passages is given", dtypes, 1)
        check_tensor(op, "cu_passages", cu_passages, "an int32 tensor [Q + 1]", (torch.int32,), 1)
        if cu_passages.shape[0] == 0:
            refuse(op, "cu_passages", "an int32 tensor [Q + 1]", describe(cu_passages))
        check_same_device(op, name, lists, cu_passages=cu_passages)
        check_offsets(op, "cu_passages", cu_passages, lists.shape[0])
    if not 0 < temperature < float("inf"):
        refuse(op, "temperature", "a positive number", str(temperature))


def _check_targets(op: str, scores: Tensor, targets: Tensor, cu_passages: Tensor | None, temperature: float) -> None:
    _check_lists(op, "scores", scores, _FLOATS, cu_passages, temperature)
    check_tensor(op, "targets", targets, "a float tensor of the shape of scores", _FLOATS, scores.dim())
    if targets.shape != scores.shape:
        refuse(op, "targets", f"of the shape of scores ({describe(scores)})", describe(targets))
    check_same_device(op, "scores", scores, targets=targets)


__all__ = ["PUBLISHED_TEMPERATURE", "listnet", "listnet_double", "orthogonality", "rank_targets"]
