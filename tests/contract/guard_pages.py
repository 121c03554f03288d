"""Runs every sample, and many odd sizes, on buffers that touch forbidden pages; a stray access kills the process.

Started by test_layout.py, once a level of instruction set, since the level is chosen at load.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch

from embedding_kernels.ops._registry import OPERATORS
from operators import SAMPLES, assert_same, everything, fresh

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_kept: list[mmap.mmap] = []


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy between two forbidden pages, against the upper or the lower one."""
    tensor = tensor.detach().contiguous()
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    inner = (size + PAGE - 1) // PAGE * PAGE
    area = mmap.mmap(-1, inner + 2 * PAGE)
    _kept.append(area)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for forbidden in (address, address + PAGE + inner):
        if _libc.mprotect(forbidden, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE + (inner - size if at_end else 0)
    copy = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=start).view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


def attention():
    """Heads of every size, texts that end at every place of a tile, with everything that is read beside q, k and v."""
    sizes = [(dim, max(16, 264 - dim), 5) for dim in range(16, 257, 8)] + [(24, 40, length) for length in range(1, 71)]
    for dim, dim_v, length in sizes:
        offsets = torch.tensor([0, length, length + 2], dtype=torch.int32)
        rows = length + 2
        angles, table = torch.rand(length + 2, dim // 4), torch.randn(2, 7)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k = torch.randn(2, rows, 2, dim).to(dtype)
            args = q, k[:, :1], torch.randn(rows, 1, dim_v).to(dtype), offsets, offsets, rows, rows
            options = None, False, 40, -1, 0.0, table, angles.cos(), angles.sin(), None, None, None
            yield "varlen_attention", (*args, *options)
            out, lse = OPERATORS["varlen_attention"].forward_overload(*args, *options)
            yield "varlen_attention_backward", (torch.randn_like(out), lse, out, lse, *args, *options)
            yield "merge_attention", (out, lse, out, lse)
            yield "merge_attention_backward", (out, lse, out, lse, out, lse)


def rescoring():
    """Vectors of every kind, and their queries, of every size."""
    candidates = torch.tensor([[0, 6, -1, 3], [6, 6, 5, 0]])
    for dim in range(1, 140):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            queries = torch.randn(2, dim).to(dtype)
            yield "rescore_topk", (queries, candidates, torch.randn(7, dim).to(dtype), 5, None)
        codes = torch.randint(0, 256, (7, (dim + 7) // 8), dtype=torch.uint8)
        yield "rescore_topk", (queries, candidates, codes, 2, None)
        yield "rescore_topk", (queries, candidates, codes.repeat(1, 8)[:, :dim].view(torch.int8), 2, torch.rand(dim))


def odd_sizes():
    """Calls whose rows end at every place of a vector."""
    torch.manual_seed(1)
    for dim in range(1, 140):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(3, dim).to(dtype)
            yield "pack_bits", (x,)
            offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
            for mode in ("mean", "max", "last"):
                yield "segment_pool", (x, offsets, mode, 1, None, True, None, None)
                yield "segment_pool_backward", (x[:2], x, offsets, 3, dim, dtype, mode, 1, None, True)
            hidden, bias = torch.cat([x, -x], 1), x[:2].flatten().float()
            yield "grouped_softmax", (hidden, 2)
            yield "grouped_softmax_backward", (hidden, hidden, 2)
            yield "geglu_segment_pool", (hidden, bias, offsets, bias[:1].expand(3), None)
            yield "geglu_segment_pool_backward", (x[:2], hidden, bias, offsets, bias[:1].expand(3))
            views = x[:, None].expand(3, 2, dim)
            queries = x[:2, None, None].expand(2, 2, 5, dim)
            yield "anchor_attention", (views, queries, offsets)
            yield "anchor_attention_backward", (queries, views, queries, offsets)
            yield "anchor_scores", (views, queries[:, :, 0], offsets, False)
            yield "anchor_scores_backward", (bias[:1].expand(3), views, queries[:, :, 0], offsets, False)
            yield "anchor_topk", (views, queries[:, :, 0], offsets, 2)
            yield "add_rms_norm", (x, x, x[0], 1e-6, True)
            yield "add_rms_norm_backward", (x, None, x, x[0], 1e-6, True)
            yield "add_layer_norm", (x, x, x[0], x[1], 1e-5)
            yield "add_layer_norm_backward", (x, x, x, x[0], x[1], 1e-5)
            copies = torch.tensor([2, 2, 1]), torch.tensor([0, 1, 2])
            yield "token_prepend", (x, *copies)
            yield "token_prepend_backward", (x, *copies)
            yield "token_prepend_rms_norm", (x, x, *copies, x[0], 1e-6, True)
            yield "token_prepend_rms_norm_backward", (x, x, x, *copies, x[0], 1e-6, True)
    yield from attention()
    yield from rescoring()
    for width in range(1, 140):
        codes = torch.randint(0, 256, (21, width), dtype=torch.uint8)
        for queries in (1, 5):
            yield "hamming_distance", (codes[:queries], codes)
            yield "hamming_topk", (codes[:queries], codes, 4, None, None)
            yield "hamming_range", (codes[:queries], codes, 4 * width + 1, codes[0, :1].expand(3))


def main() -> None:
    calls = 0
    cases = [(sample.op, sample.args()) for sample in SAMPLES]
    for name, args in (*cases, *odd_sizes()):
        overload = OPERATORS[name].forward_overload
        copies = fresh(name, args)
        expected = everything(name, copies, overload(*copies))
        for at_end in (True, False):
            print(name, [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args], at_end, flush=True)
            inputs = tuple(guarded(a, at_end) if isinstance(a, torch.Tensor) else a for a in args)
            assert_same(everything(name, inputs, overload(*inputs)), expected)
            calls += 1
            # the areas go with their last views: a process may have 65,530 of them
            _kept.clear()
    print("calls:", calls, os.environ.get("EMBEDDING_KERNELS_ISA", ""), flush=True)
    # the views keep the areas alive in no order that an interpreter's exit respects
    os._exit(0)


if __name__ == "__main__":
    main()
