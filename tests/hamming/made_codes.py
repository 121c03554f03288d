"""Codes for the tests of the Hamming family, and their distances by NumPy."""

from __future__ import annotations

import numpy as np
import torch


def codes(rows: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


def clustered(rows: int, width: int) -> torch.Tensor:
    """Many equal codes and near neighbours, so that ties decide."""
    centres = codes(3, width)
    flips = (torch.rand(rows, width) < 0.05) * codes(rows, width)
    return centres[torch.randint(0, 3, (rows,))] ^ flips


def equal(rows: int, width: int) -> torch.Tensor:
    return codes(1, width).expand(rows, width)


MAKERS = {"random": codes, "clustered": clustered, "equal": equal}


def distances(queries: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    """Independent of the reference: int64 [queries, codes]."""
    differing = np.unpackbits(queries.numpy()[:, None] ^ base.numpy()[None], axis=-1)
    return differing.sum(-1, dtype=np.int64).reshape(len(queries), len(base))
