"""Shapes that send the CUDA kernels down each of their roads, in the emulation and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import embedding_kernels as ek
from hamming.made_codes import MAKERS, codes, distances
from hamming.test_hamming import brute_force
from hamming.test_range import brute_force as brute_force_range
from operators import assert_same

# (queries, codes, bytes, k)
SHAPES = {
    # 65,536 codes and more are bounded by a histogram of some before that of all; of 5 queries and more, 16,384
    "rounds_by_xor": (2, 65_700, 4, 10),
    "rounds_by_product": (6, 16_500, 16, 4),
    # 64 queries and more share tiles, of two warps or three; 190 and more are two groups
    "two_sharers": (70, 70, 24, 5),
    "three_sharers_of_long_codes": (130, 40, 140, 3),
    "two_groups": (200, 33, 48, 3),
    # queries of long codes: fewer at a time, and past 4,096 bytes by XOR
    "fewer_rows": (48, 9, 1100, 4),
    "past_shared_memory": (6, 35, 4100, 4),
    # more counts than the histogram has room for
    "turns": (520, 2, 4096, 2),
}


@pytest.fixture(autouse=True)
def _on_cuda(backend):
    if backend not in ("cuda_host", "cuda"):
        pytest.skip("other backends have other roads")


def ask(base: torch.Tensor, queries: int) -> torch.Tensor:
    near = base[: queries // 2]
    return torch.cat([near, codes(queries - len(near), base.shape[1])])


@pytest.mark.parametrize("shape", SHAPES)
def test_topk(backend, device, shape):
    if shape == "turns" and backend == "cuda_host":
        pytest.skip("takes minutes in the emulation")
    queries, count, width, k = SHAPES[shape]
    base = codes(count, width)
    asked = ask(base, queries)
    got = ek.hamming_topk(asked.to(device), base.to(device), k, backend=backend)
    assert_same(got, brute_force(asked, base, k))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("queries", "count"), [(1, 65_600), (5, 16_400)])
def test_topk_after_rounds(backend, device, queries, count, kind):
    """Bounds from a part of the codes, with ties beyond counting, and few of the codes allowed."""
    base = MAKERS[kind](count, 2)
    asked = ask(base, queries)
    allowed = torch.from_numpy(np.packbits(np.random.default_rng(0).random(count) < 0.01))
    for mask in (None, allowed):
        moved = None if mask is None else mask.to(device)
        got = ek.hamming_topk(asked.to(device), base.to(device), 12, allowed=moved, backend=backend)
        assert_same(got, brute_force(asked, base, 12, mask))


@pytest.mark.parametrize("shape", ("two_sharers", "three_sharers_of_long_codes", "two_groups", "past_shared_memory"))
def test_distances_and_range(backend, device, shape):
    queries, count, width, _ = SHAPES[shape]
    base = codes(count, width)
    asked = ask(base, queries)
    got = ek.hamming_distance(asked.to(device), base.to(device), backend=backend)
    assert_same(got, torch.from_numpy(distances(asked, base).astype(np.int32)))
    for radius in (1, 4 * width - 4):  # few tiles are looked at again, and most
        found = ek.hamming_range(asked.to(device), base.to(device), radius, backend=backend)
        assert_same(found, brute_force_range(asked, base, radius))
