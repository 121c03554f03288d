"""The float64 answers that attention of a GPU's size is held against: every text, head and row, on the device.

The definition in pieces: texts of one length go together, and never are there more than `_SCORES` scores. A GPU with
tensor cores for float64 is done in half a second with 16 heads of 16,384 tokens, gradients among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .attention_peers import Texts, Verify

_SCORES = 1 << 27  # a gibibyte of them
#: the error that a row may have, in roundings of the dtype, relative to its length or, where that is more, to the
#: rows' root mean square of it: leaving out a thousandth of the weights is beyond that
_ROUNDINGS = 4


@dataclass
class _Group:
    """Texts of one length, a pair a text and head, in float64."""

    rows: Tensor  # int64 [texts, n]: which of all rows
    head: Tensor  # int64 [pairs]
    q: Tensor  # [pairs, n, D], as all below
    k: Tensor
    v: Tensor
    grad: Tensor  # of the output

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """(pairs, queries) of few enough scores."""
        pairs, length = self.q.shape[:2]
        many = max(1, _SCORES // length**2)
        for pair in range(0, pairs, many):
            queries = max(1, _SCORES // (min(many, pairs - pair) * length))
            for query in range(0, length, queries):
                yield slice(pair, min(pair + many, pairs)), slice(query, min(query + queries, length))


def _groups(texts: Texts) -> Iterator[_Group]:
    starts, heads = texts.cu_seqlens[:-1].long(), texts.grad.shape[1]
    for length in texts.lengths.unique().tolist():
        members = (texts.lengths == length).nonzero()[:, 0]
        rows = starts[members, None] + torch.arange(length, device=starts.device)
        all_rows = (*texts.fused[0].detach().unbind(1), texts.grad)
        apart = [part[rows].double().transpose(1, 2).flatten(0, 1) for part in all_rows]
        yield _Group(rows, torch.arange(heads, device=starts.device).repeat(len(members)), *apart)


def _weights(group: _Group, pair: slice, query: slice, table: Tensor | None) -> Tensor:
    scores = group.q[pair, query] @ group.k[pair].mT / group.q.shape[-1] ** 0.5
    if table is not None:
        reach, places = table.shape[1] // 2, torch.arange(group.q.shape[1], device=table.device)
        scores += table[group.head[pair]][:, (places - places[query, None]).clamp(-reach, reach) + reach]
    return scores.softmax(-1)


def _output(group: _Group, table: Tensor | None) -> Tensor:
    out = torch.empty_like(group.v)
    for pair, query in group.pieces():
        out[pair, query] = _weights(group, pair, query, table) @ group.v[pair]
    return out


def _along_offsets(scores: Tensor) -> Tensor:
    """``[pairs, queries, keys]`` summed where key − query is the same, from the least on."""
    queries, keys = scores.shape[1:]
    # rows from the last query on, each shifted by one against the row above
    shifted = functional.pad(scores.flip(1), (0, queries)).flatten(1)[:, : queries * (queries + keys - 1)]
    return shifted.unflatten(1, (queries, -1)).sum(1)


def _gradients(group: _Group, table: Tensor | None, table_gradient: Tensor | None) -> list[Tensor]:
    """Of q, k and v; the table's is added to."""
    dq, dk, dv = (torch.zeros_like(part) for part in (group.q, group.k, group.v))
    scale = group.q.shape[-1] ** -0.5
    for pair, query in group.pieces():
        q, k, v, grad = group.q[pair, query], group.k[pair], group.v[pair], group.grad[pair, query]
        weights = _weights(group, pair, query, table)
        dv[pair] += weights.mT @ grad
        of_weights = grad @ v.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        dq[pair, query] = of_scores @ k * scale
        dk[pair] += of_scores.mT @ q * scale
        if table_gradient is not None:
            reach = table_gradient.shape[1] // 2
            offsets = torch.arange(1 - query.stop, k.shape[1] - query.start, device=q.device)
            of_offsets = q.new_zeros(len(q), 2 * reach + 1)
            of_offsets.index_add_(1, offsets.clamp(-reach, reach) + reach, _along_offsets(of_scores))
            table_gradient.index_add_(0, group.head[pair], of_offsets)
    return [dq, dk, dv]


def answers(texts: Texts) -> dict[str, Tensor]:
    """The output ``[T, H, D]``, or the gradients of q, k and v, and of the table; kept in float32."""
    table = None if texts.table is None else texts.table.double()
    names = ("gradient of q", "gradient of k", "gradient of v") if texts.gradient else ("output",)
    found = {name: torch.empty_like(texts.grad, dtype=torch.float32) for name in names}
    table_gradient = torch.zeros_like(table) if table is not None and texts.gradient else None
    for group in _groups(texts):
        parts = _gradients(group, table, table_gradient) if texts.gradient else [_output(group, table)]
        for whole, part in zip(found.values(), parts, strict=True):
            whole[group.rows] = part.float().unflatten(0, (len(group.rows), -1)).transpose(1, 2)
    if table_gradient is not None:
        found["gradient of the table"] = table_gradient.float()
    return found


def verifier(texts: Texts) -> Verify:
    """No row of an answer may be further off than a few roundings of the dtype."""
    expected = answers(texts)
    allowed = _ROUNDINGS * torch.finfo(texts.fused[0].dtype).eps

    def verify(answer: Sequence[Tensor]) -> None:
        parts = [*answer[0].unbind(1), *answer[1:]] if texts.gradient else answer
        for got, (name, want) in zip(parts, expected.items(), strict=True):
            assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            worst = worst_row(got, want)
            assert worst <= allowed, f"{name}: a row's error is {worst:.3g} of its length, allowed {allowed:.3g}"

    return verify


def worst_row(got: Tensor, want: Tensor) -> float:
    """The largest error of a row, relative to its length or, where that is more, their root mean square."""
    lengths = want.norm(dim=-1)
    typical = lengths.square().mean().sqrt()
    return float(((got.float() - want).norm(dim=-1) / lengths.clamp_min(typical)).max())
