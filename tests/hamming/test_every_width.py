"""Every width from 8 to 4096 bits in steps of 8 against FAISS, which orders ties by id: equal or wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import embedding_kernels as ek
from hamming.made_codes import MAKERS, codes
from operators import assert_same

faiss = pytest.importorskip("faiss")


def tied(rows: int, width: int) -> torch.Tensor:
    """All codes at one distance of the zero code but the last ones, which are nearer: ties that must give way."""
    base = torch.zeros(rows, width, dtype=torch.uint8)
    base[:, 0] = 0b11
    base[-rows // 10 :, 0] = 0b1
    return base


KINDS = {**MAKERS, "tied": tied}
EIGHTHS = [range(8 + 512 * eighth, 8 + 512 * (eighth + 1), 8) for eighth in range(8)]


def faiss_index(base: torch.Tensor):
    index = faiss.IndexBinaryFlat(8 * base.shape[1])
    index.add(base.contiguous().numpy())
    return index


def check_topk(base: torch.Tensor, asked: torch.Tensor, k: int) -> None:
    expected = faiss_index(base).search(asked.numpy(), k)
    assert_same(ek.hamming_topk(asked, base, k), tuple(map(torch.from_numpy, expected)))


def check_filtered(base: torch.Tensor, asked: torch.Tensor, k: int) -> None:
    """FAISS has no filter for binary codes: it is given those that are allowed."""
    keep = np.random.default_rng(0).random(len(base)) < 0.3
    distances, places = faiss_index(base[keep]).search(asked.numpy(), k)
    ids = np.append(np.flatnonzero(keep), -1)[places]
    allowed = torch.from_numpy(np.packbits(keep))
    assert_same(ek.hamming_topk(asked, base, k, allowed=allowed), (torch.from_numpy(distances), torch.from_numpy(ids)))


def check_range(base: torch.Tensor, asked: torch.Tensor) -> None:
    radius = 4 * base.shape[1] + 1
    limits, distances, ids = faiss_index(base).range_search(asked.numpy(), radius)
    order = np.lexsort((ids, np.repeat(np.arange(len(asked)), np.diff(limits.astype(np.int64)))))
    expected = (limits.astype(np.int64), distances.astype(np.int32)[order], ids[order])
    assert_same(ek.hamming_range(asked, base, radius), tuple(map(torch.from_numpy, expected)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", EIGHTHS, ids=lambda widths: f"{widths[0]} to {widths[-1]}")
def test_equals_faiss(widths, kind):
    for bits in widths:
        width = bits // 8
        base = KINDS[kind](150, width)
        # one query, which reads the codes as they lie, and many, for which they are laid out
        asked = torch.cat([base[:3], torch.zeros(1, width, dtype=torch.uint8), codes(14, width)])
        check_topk(base, asked, 20)
        check_topk(base, asked[3:4], 20)
        check_filtered(base, asked, 20)
        check_range(base, asked)
        check_range(base, asked[:1])
