"""Definitions of the anchor scores family in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def anchor_attention(views: Tensor, queries: Tensor, cu_passages: Tensor) -> Tensor:
    """Of each query, view and head the mean of that view of its passages, weighted by the softmax of products."""
    mixed = []
    for query, (start, end) in zip(_wide(queries), pairwise(cu_passages.tolist()), strict=True):
        own = _wide(views[start:end])
        # a softmax over no passages is empty, and the sum over it 0
        weights = torch.softmax(torch.einsum("mhd,nmd->mhn", query, own), -1)
        mixed.append(torch.einsum("mhn,nmd->mhd", weights, own))
    return (torch.stack(mixed) if mixed else torch.zeros_like(_wide(queries))).to(views.dtype)


def anchor_scores(views: Tensor, anchors: Tensor, cu_passages: Tensor, *, per_view: bool = False) -> Tensor:
    """Inner product of each passage's views with its query's anchors, and their mean over the views."""
    lengths = cu_passages.diff().long()
    own = _wide(anchors).repeat_interleave(lengths, 0, output_size=views.shape[0])
    products = (_wide(views) * own).sum(-1)
    return products if per_view else products.mean(-1)


def anchor_topk(views: Tensor, anchors: Tensor, cu_passages: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each query and their places among its passages."""
    scores = anchor_scores(views, anchors, cu_passages)
    best = scores.new_full((anchors.shape[0], k), -torch.inf)
    places = torch.full(best.shape, -1, dtype=torch.int64, device=views.device)
    for query, (start, end) in enumerate(pairwise(cu_passages.tolist())):
        own = scores[start:end]
        # a score that is not a number stands where -inf would
        order = torch.sort(own.nan_to_num(-torch.inf, torch.inf, -torch.inf), descending=True, stable=True).indices[:k]
        best[query, : len(order)] = own[order]
        places[query, : len(order)] = order
    return best, places


__all__ = ["anchor_attention", "anchor_scores", "anchor_topk"]
