"""What the attention family is compared with. Padded peers are given padded rows, as a padded model has them; bucketed
ones the buckets. Nothing is timed but attention itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as sdpa

import embedding_kernels as ek

from .harness import Contender, Room

PADDED = "torch SDPA, padded"
LOOP = "torch SDPA, a call a text"
BUCKETS = "torch SDPA, length-sorted buckets"
NESTED = "torch SDPA, nested tensor"
FLEX = "FlexAttention, compiled"
WITHOUT_BIAS = "ours without bias"
MERGE = "torch, eager"

Verify = Callable[[Sequence[Tensor]], None]
Attend = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class Texts:
    """q, k and v of a ragged batch as one projection gives them, ``[T, 3, H, D]``, in rotating copies."""

    fused: list[Tensor]
    lengths: Tensor  # int64 [texts]
    grad: Tensor  # [T, H, D]: gradient of the output
    table: Tensor | None  # [H, 2R + 1]
    gradient: bool

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def cu_seqlens(self) -> Tensor:
        return functional.pad(self.lengths.cumsum(0), (1, 0)).int()

    @cached_property
    def mask(self) -> Tensor:
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def padded_copies(self) -> list[Tensor]:
        return [self.padded(rows) for rows in self.fused]

    def padded(self, rows: Tensor) -> Tensor:
        return ek.unpack_padded(rows.detach(), self.mask)

    def bias(self, table: Tensor | None, longest: int, mask: Tensor) -> Tensor:
        """What SDPA is told: which keys are tokens, and with a table the dense bias too, as T5 forms it."""
        keys = mask[:, None, None]
        if table is None:
            return keys
        places = torch.arange(longest, device=mask.device)
        reach = table.shape[1] // 2
        dense = table[:, (places[None] - places[:, None]).clamp(-reach, reach) + reach]
        hidden = torch.zeros(keys.shape, device=mask.device).masked_fill(~keys, -torch.inf)
        return (dense + hidden).to(self.fused[0].dtype)


def over(texts: Texts, copies: list[Tensor], attend: Attend, grad: Tensor) -> Callable[[int], Sequence[Tensor]]:
    """A contender's call: the output of one copy, or with gradients those of its rows and of the table."""
    leaves = [rows.detach().requires_grad_(texts.gradient) for rows in copies]
    table = None if texts.table is None else texts.table.detach().requires_grad_(texts.gradient)

    def forward(turn: int) -> Sequence[Tensor]:
        with torch.no_grad():
            return (attend(leaves[turn % len(leaves)], table),)

    def both(turn: int) -> Sequence[Tensor]:
        inputs = [leaves[turn % len(leaves)], *([] if table is None else [table])]
        return torch.autograd.grad(attend(inputs[0], table), inputs, grad)

    return both if texts.gradient else forward


def ours(texts: Texts, with_bias: bool = True) -> Callable[[int], Sequence[Tensor]]:
    """varlen_attention on the packed rows."""
    offsets = [texts.cu_seqlens] * 2
    longest = [texts.longest] * 2

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        return ek.varlen_attention(*rows.unbind(1), *offsets, *longest, bias_table=table)

    plain = texts if with_bias else Texts(texts.fused, texts.lengths, texts.grad, None, texts.gradient)
    return over(plain, texts.fused, attend, texts.grad)


def heads_first(rows: Tensor) -> tuple[Tensor, ...]:
    """``[B, S, 3, H, D]`` to q, k and v ``[B, H, S, D]``."""
    return rows.permute(2, 0, 3, 1, 4).unbind(0)


def packed_answer(texts: Texts, verify: Verify) -> Verify:
    """Padded answers, with whatever stands in the padding, against the packed ones."""

    def check(answer: Sequence[Tensor]) -> None:
        verify([answer[0][texts.mask], *answer[1:]])

    return check


def _padded(texts: Texts, verify: Verify) -> Contender:
    known = None if texts.gradient else texts.bias(texts.table, texts.longest, texts.mask)

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        bias = texts.bias(table, texts.longest, texts.mask) if known is None else known
        return sdpa(*heads_first(rows), attn_mask=bias).transpose(1, 2)

    note = "padded inputs given; " + ("mask and bias formed in the call" if known is None else "mask and bias given")
    call = over(texts, texts.padded_copies, attend, texts.padded(texts.grad))
    return Contender(PADDED, call, packed_answer(texts, verify), note=note)


def _loop(texts: Texts, verify: Verify) -> Contender:
    lengths = texts.lengths.tolist()
    masks = {n: torch.ones(1, n, dtype=torch.bool, device=texts.lengths.device) for n in set(lengths)}

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        outs = []
        for part in rows.split(lengths):
            q, k, v = part.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            bias = None if table is None else texts.bias(table, len(part), masks[len(part)])
            outs.append(sdpa(q, k, v, attn_mask=bias)[0].transpose(0, 1))
        return torch.cat(outs)

    return Contender(LOOP, over(texts, texts.fused, attend, texts.grad), verify)


def _bucketed(texts: Texts, count: int) -> tuple[Callable[[int], Sequence[Tensor]], Callable[[Tensor], Tensor]]:
    """Texts sorted by length, in ``count`` buckets, each padded to its longest: the call, and its answer packed."""
    order = texts.lengths.argsort()
    members = [part.sort().values for part in order.chunk(count)]
    masks = [texts.mask[m, : int(texts.lengths[m].max())] for m in members]
    sizes = [mask.numel() for mask in masks]

    def fill(rows: Tensor) -> Tensor:
        padded = texts.padded(rows)
        return torch.cat([padded[m, : mask.shape[1]].flatten(0, 1) for m, mask in zip(members, masks, strict=True)])

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        outs = []
        for part, mask in zip(rows.split(sizes), masks, strict=True):
            heads = heads_first(part.unflatten(0, mask.shape))
            bias = texts.bias(table, mask.shape[1], mask)
            outs.append(sdpa(*heads, attn_mask=bias).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)

    def packed(answer: Tensor) -> Tensor:
        whole = answer.new_zeros(*texts.mask.shape, *answer.shape[1:])
        for part, m, mask in zip(answer.split(sizes), members, masks, strict=True):
            whole[m, : mask.shape[1]] = part.unflatten(0, mask.shape)
        return whole[texts.mask]

    return over(texts, [fill(rows) for rows in texts.fused], attend, fill(texts.grad)), packed


def _buckets(texts: Texts, verify: Verify) -> Contender:
    """With as many buckets as do best, of a few numbers tried beforehand."""
    best: tuple[float, int] | None = None
    room = Room(texts.lengths.device, torch.get_num_threads())
    for count in (2, 4, 8, 16, 32):
        call, _ = _bucketed(texts, count)
        call(0)
        seconds = Contender(BUCKETS, call).timed(1, 1, room)
        best = min(best or (seconds, count), (seconds, count))
    assert best is not None
    call, packed = _bucketed(texts, best[1])
    note = f"{best[1]} buckets, best of 2 to 32; buckets given"
    return Contender(BUCKETS, call, lambda answer: verify([packed(answer[0]), *answer[1:]]), note=note)


def _nested(texts: Texts, verify: Verify) -> Contender | None:
    offsets = texts.cu_seqlens.long()

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        jagged = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in rows.unbind(0)]
        return sdpa(*jagged).transpose(1, 2).values()

    # it takes no slices of a projection
    call = over(texts, [rows.transpose(0, 1).contiguous() for rows in texts.fused], attend, texts.grad)
    try:
        call(0)
    except (RuntimeError, NotImplementedError):  # torch has no such kernel for this device
        return None
    return Contender(NESTED, call, verify, note="q, k and v given apart")


def _flex(texts: Texts, verify: Verify) -> Contender | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    text_of_row = torch.repeat_interleave(texts.lengths)
    total = len(text_of_row)
    assert texts.table is None

    def same_text(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return text_of_row[query] == text_of_row[key]

    try:
        block_mask = create_block_mask(same_text, None, None, total, total, device=str(texts.lengths.device))
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend(rows: Tensor, table: Tensor | None) -> Tensor:
            return compiled(*heads_first(rows[None]), block_mask=block_mask)[0].transpose(0, 1)

        call = over(texts, texts.fused, attend, texts.grad)
        call(0)
    except Exception:  # Inductor raises many kinds; what does not compile here is listed as absent
        return None
    return Contender(FLEX, call, verify, note="packed, one block mask for the texts, compiled and masked beforehand")


def _without_bias(texts: Texts, verify: Verify) -> Contender:
    del verify  # another answer; the case without a table checks it
    return Contender(WITHOUT_BIAS, ours(texts, with_bias=False))


MAKERS: dict[str, Callable[[Texts, Verify], Contender | None]] = {
    PADDED: _padded,
    LOOP: _loop,
    BUCKETS: _buckets,
    NESTED: _nested,
    FLEX: _flex,
    WITHOUT_BIAS: _without_bias,
}


def merge_eager(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in torch, at float32."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).mT.unsqueeze(-1) for x in (lse_a, lse_b))
    return (weight_a * out_a.float() + weight_b * out_b.float()).to(out_a.dtype), lse
