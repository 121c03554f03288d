"""Sample calls of the pooling operators for the contract tests."""

import torch

CU_SEQLENS = torch.tensor([0, 3, 3, 20, 61], dtype=torch.int32)
TOTAL = 61
MASK = torch.arange(9)[None] < torch.tensor([4, 0, 9, 2])[:, None]


def hidden(dim: int = 37, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(TOTAL, dim).to(dtype)


def pool(mode: str, m: int = 1, weighted: bool = False, normalize: bool = False, truncate_dim=None, out_dtype=None):
    return lambda: (
        hidden(),
        CU_SEQLENS.clone(),
        mode,
        m,
        torch.rand(TOTAL) if weighted else None,
        normalize,
        truncate_dim,
        out_dtype,
    )


def pool_backward(mode: str, m: int = 1, weighted: bool = False, normalize: bool = False, reads: bool = True):
    def make():
        grad = torch.randn(4, m, 30) if mode == "first_m" else torch.randn(4, 30)
        weights = torch.rand(TOTAL) if weighted else None
        rows = hidden() if reads else None
        return grad, rows, CU_SEQLENS.clone(), TOTAL, 37, torch.float32, mode, m, weights, normalize

    return make


SAMPLES = {
    "segment_pool": {
        "mean": pool("mean"),
        "mean_weights": pool("mean", weighted=True, normalize=True),
        "weighted_mean": pool("weighted_mean", truncate_dim=20),
        "mean_sqrt_len": pool("mean_sqrt_len", out_dtype=torch.bfloat16),
        "max": pool("max", normalize=True),
        "first": pool("first"),
        "first_m": pool("first_m", m=4, normalize=True),
        "last": pool("last", truncate_dim=8),
    },
    "segment_pool_backward": {
        "mean": pool_backward("mean", reads=False),
        "mean_weights": pool_backward("mean", weighted=True),
        "max": pool_backward("max", normalize=True),
        "first_m": pool_backward("first_m", m=2),
        "last": pool_backward("last", reads=False),
    },
    "segment_pool_pack_bits": {
        "mean": lambda: (hidden(), CU_SEQLENS.clone(), "mean", 1, None, None),
        "weights": lambda: (hidden(), CU_SEQLENS.clone(), "mean", 1, torch.rand(TOTAL), 19),
        "first_m": lambda: (hidden(), CU_SEQLENS.clone(), "first_m", 3, None, None),
    },
    "pack_padded": {
        "hidden": lambda: (torch.randn(4, 9, 5), MASK.clone(), 15),
        "heads": lambda: (torch.randn(4, 9, 2, 8).bfloat16(), MASK.long(), 15),
        "scalars": lambda: (torch.randn(4, 9), MASK.to(torch.uint8), 15),
    },
    "unpack_padded": {
        "hidden": lambda: (torch.randn(15, 5), MASK.clone()),
        "heads": lambda: (torch.randn(15, 2, 8).half(), MASK.int()),
    },
}
