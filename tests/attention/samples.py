"""Sample calls of the attention operators for the contract tests."""

import torch

from embedding_kernels import reference

HEADS = 4
LENGTHS = (3, 0, 17, 5)
LENGTHS_K = (20, 4, 0, 9)
ROWS_OF_ROPE = 64


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attention(
    lengths_k=LENGTHS,
    kv_heads: int = HEADS,
    dim: int = 16,
    dim_v: int = 16,
    dtype: torch.dtype = torch.float32,
    reach: int | None = None,
    rotated: int = 0,
    positions: bool = False,
    used=None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
):
    def make():
        rows, rows_k = sum(LENGTHS), sum(lengths_k)
        angles = torch.rand(ROWS_OF_ROPE, rotated // 2) if rotated else None
        return (
            torch.randn(rows, HEADS, dim).to(dtype),
            torch.randn(rows_k, kv_heads, dim).to(dtype),
            torch.randn(rows_k, kv_heads, dim_v).to(dtype),
            offsets(LENGTHS),
            offsets(lengths_k),
            max(LENGTHS),
            max(lengths_k),
            scale,
            causal,
            *window,
            softcap,
            None if reach is None else torch.randn(HEADS, 2 * reach + 1),
            None if angles is None else angles.cos(),
            None if angles is None else angles.sin(),
            torch.randint(0, ROWS_OF_ROPE, (rows,), dtype=torch.int32) if positions else None,
            torch.randint(0, ROWS_OF_ROPE, (rows_k,), dtype=torch.int32) if positions else None,
            None if used is None else torch.tensor(used, dtype=torch.int32),
        )

    return make


def attention_backward(with_lse: bool = False, **options):
    def make():
        args = attention(**options)()
        # a gradient is taken at what the forward gave
        out, lse = reference.varlen_attention(*args)
        return torch.randn_like(out), torch.randn_like(lse) if with_lse else None, out, lse, *args

    return make


def partial_results(dtype: torch.dtype = torch.float32, empty: bool = False):
    rows, dim = 21, 24
    lse_a, lse_b = torch.randn(2, HEADS, rows) * 3
    if empty:
        lse_a[:, 3:9], lse_b[:, 6:12] = -torch.inf, -torch.inf
    return torch.randn(rows, HEADS, dim).to(dtype), lse_a, torch.randn(rows, HEADS, dim).to(dtype), lse_b


def merge_backward(with_lse: bool, **options):
    def make():
        saved = partial_results(**options)
        return torch.randn_like(saved[0]), torch.randn_like(saved[1]) if with_lse else None, *saved

    return make


EVERYTHING = {
    "lengths_k": LENGTHS_K,
    "kv_heads": 2,
    "dim": 24,
    "dim_v": 32,
    "reach": 4,
    "rotated": 8,
    "positions": True,
    "used": (11, 0, 0, 9),
    "scale": 0.3,
    "window": (20, 30),
    "softcap": 5.0,
}

SAMPLES = {
    "varlen_attention": {
        "plain": attention(),
        "bfloat16": attention(dim=32, dim_v=32, dtype=torch.bfloat16),
        "grouped_heads": attention(kv_heads=2),
        "causal": attention(causal=True),
        "window": attention(window=(3, 2)),
        "softcap": attention(softcap=2.0, scale=1.0),
        "bias_table": attention(reach=4),
        "rope_partial": attention(dim=24, rotated=16),
        "positions": attention(reach=4, rotated=16, positions=True, causal=True),
        "seqused_k": attention(used=(1, 0, 17, 0)),
        "other_keys": attention(lengths_k=LENGTHS_K, dim_v=40),
        "everything": attention(**EVERYTHING),
    },
    "varlen_attention_backward": {
        "plain": attention_backward(),
        "bfloat16": attention_backward(dim=32, dim_v=32, dtype=torch.bfloat16),
        "grouped_heads": attention_backward(kv_heads=2, with_lse=True),
        "causal": attention_backward(causal=True),
        "bias_table": attention_backward(reach=4, window=(3, 2)),
        "rope_partial": attention_backward(dim=24, rotated=16),
        "everything": attention_backward(with_lse=True, **EVERYTHING),
    },
    "merge_attention": {
        "plain": partial_results,
        "no_keys": lambda: partial_results(empty=True),
        "bfloat16": lambda: partial_results(torch.bfloat16),
    },
    "merge_attention_backward": {
        "out": merge_backward(False),
        "out_and_lse": merge_backward(True, empty=True),
        "bfloat16": merge_backward(True, dtype=torch.bfloat16),
    },
}
