"""Whom attention of a GPU's size meets: torch's backends one by one, its packed attention, FlexAttention."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from . import attention_peers
from .attention_peers import BUCKETS, FLEX, WITHOUT_BIAS, Texts, Verify, heads_first, over, packed_answer
from .harness import Contender, compiled
from .within import Within

FLASH = "torch SDPA, flash"
CUDNN = "torch SDPA, cuDNN"
EFFICIENT = "torch SDPA, memory-efficient"
VARLEN = "torch varlen_attn"

_BLOCK = 128  # rows of FlexAttention's blocks


def _on_gpu(texts: Texts) -> bool:
    return texts.lengths.device.type == "cuda"


# ---- one backend of SDPA ----


def _one_backend(name: str, backend: SDPBackend, texts: Texts, verify: Verify) -> Contender:
    """Dense where all texts are of one length, else padded, with a mask. A processor has no such backends, so there
    the definition runs, for the forms of inputs and answers."""
    allowed = backend if _on_gpu(texts) else SDPBackend.MATH
    if bool((texts.lengths == texts.longest).all()) and texts.table is None:
        call, check = _dense(texts, verify)
        note = "no mask"
    else:
        call, check, note = *_padded(texts, verify), "padded inputs given"
        note += "; mask and bias " + ("given" if _given(texts) else "formed in the call")
    return Within(name, call, check, partial(sdpa_kernel, allowed), note)


def _dense(texts: Texts, verify: Verify) -> tuple[Callable, Verify]:
    shape = (len(texts.lengths), texts.longest)

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        return sdpa(*heads_first(rows)).transpose(1, 2)

    call = over(texts, [rows.unflatten(0, shape) for rows in texts.fused], attend, texts.grad.unflatten(0, shape))
    return call, lambda answer: verify([answer[0].flatten(0, 1)])


def _given(texts: Texts) -> bool:
    """A model makes its dense bias once for all layers, but where the table is trained."""
    return texts.table is None or not texts.gradient


def _padded(texts: Texts, verify: Verify) -> tuple[Callable, Verify]:
    known = texts.bias(texts.table, texts.longest, texts.mask) if _given(texts) else None

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        bias = texts.bias(table, texts.longest, texts.mask) if known is None else known
        return sdpa(*heads_first(rows), attn_mask=bias).transpose(1, 2)

    return over(texts, texts.padded_copies, attend, texts.padded(texts.grad)), packed_answer(texts, verify)


# ---- packed ----


def _varlen(texts: Texts, verify: Verify) -> Contender | None:
    if not _on_gpu(texts) or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = texts.cu_seqlens, texts.longest

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        return varlen_attn(*rows.unbind(1), offsets, offsets, longest, longest)

    return Contender(VARLEN, over(texts, texts.fused, attend, texts.grad), verify, note="flash attention, packed")


def _text_of_row(texts: Texts) -> Tensor:
    return torch.repeat_interleave(texts.lengths)


def block_ranges(texts: Texts) -> tuple[Tensor, Tensor]:
    """For each block of queries how many blocks of keys its texts reach into, and which: those first in each row.
    `create_block_mask` forms all pairs of rows, 100 GB of them with 4,096 texts."""
    offsets, text = texts.cu_seqlens.long(), _text_of_row(texts)
    first_row = torch.arange(0, len(text), _BLOCK, device=text.device)
    last_row = (first_row + _BLOCK - 1).clamp_max(len(text) - 1)
    first = offsets[text[first_row]] // _BLOCK
    last = (offsets[text[last_row] + 1] - 1) // _BLOCK
    blocks = len(first_row)
    which = (first[:, None] + torch.arange(blocks, device=text.device)) % blocks
    return (last - first + 1).int(), which.int()


def _flex(texts: Texts, verify: Verify) -> Contender | None:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if texts.gradient and not _on_gpu(texts):
        return None  # a processor has no backward of it
    text_of_row = _text_of_row(texts)

    def same_text(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return text_of_row[query] == text_of_row[key]

    many, which = (part[None, None] for part in block_ranges(texts))
    lengths = (len(text_of_row),) * 2
    mask = BlockMask.from_kv_blocks(many, which, BLOCK_SIZE=_BLOCK, mask_mod=same_text, seq_lengths=lengths)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, mask: BlockMask) -> Tensor:
        if table is None:
            return flex_attention(q, k, v, block_mask=mask)
        reach = table.shape[1] // 2

        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + table[head, torch.clamp(key - query, -reach, reach) + reach]

        return flex_attention(q, k, v, score_mod=biased, block_mask=mask)

    # on a processor in plain torch: compiling takes longer than all the rest
    fast = compiled(run) if _on_gpu(texts) else run

    def attend(rows: Tensor, table: Tensor | None) -> Tensor:
        return fast(*heads_first(rows[None]), table, mask)[0].transpose(0, 1)

    note = "packed, one block mask for the texts, compiled and masked beforehand"
    return Contender(FLEX, over(texts, texts.fused, attend, texts.grad), verify, note=note)


MAKERS: dict[str, Callable[[Texts, Verify], Contender | None]] = {
    FLASH: partial(_one_backend, FLASH, SDPBackend.FLASH_ATTENTION),
    CUDNN: partial(_one_backend, CUDNN, SDPBackend.CUDNN_ATTENTION),
    EFFICIENT: partial(_one_backend, EFFICIENT, SDPBackend.EFFICIENT_ATTENTION),
    VARLEN: _varlen,
    FLEX: _flex,
    **{name: attention_peers.MAKERS[name] for name in (BUCKETS, WITHOUT_BIAS)},
}
