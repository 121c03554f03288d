"""The scan of many queries on Hopper: that its kernel runs, on shapes that reach each of its ways. The rest of the
family's suite runs through it too (backends cuda_host_hopper and cuda_hopper)."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import embedding_kernels as ek
from cuda_host import backend as cuda_host
from hamming.made_codes import MAKERS, codes, distances
from hamming.test_hamming import brute_force
from hamming.test_range import brute_force as brute_force_range
from operators import assert_same

# products of 256 bits, chunks of 1024, pieces of 128 and their tails
WIDTHS = (
    1,
    15,
    16,
    17,
    31,
    32,
    33,
    64,
    65,
    96,
    97,
    127,
    128,
    129,
    161,
    193,
    255,
    256,
    257,
    352,
    384,
    385,
    448,
    511,
    512,
)

# (queries, codes, bytes, k): a tile has 256 codes, a warpgroup 64 queries at a time
TOPK = {
    "last_of_a_tile_missing": (5, 255, 16, 7),
    "one_tile": (64, 256, 32, 256),
    "one_code_past_a_tile": (65, 257, 128, 3),
    "second_warpgroup_has_two_queries": (66, 513, 48, 20),
    "five_groups_of_rows": (300, 700, 128, 4),
    "two_blocks_of_queries": (600, 300, 16, 2),
    "two_chunks": (140, 600, 200, 5),
    "three_chunks": (70, 520, 300, 5),
    "four_chunks": (70, 700, 400, 2),
    "one_code": (6, 1, 40, 3),
    # a part of the codes, half of them, and all
    "three_rounds": (5, 58_500, 16, 1),
}


@pytest.fixture(autouse=True)
def _on_hopper(backend):
    if backend not in ("cuda_host", "cuda") or os.environ.get("EMBEDDING_KERNELS_HOPPER") != "all":
        pytest.skip("other backends have other roads")


def in_rows(base: torch.Tensor) -> torch.Tensor:
    """The same codes in rows of whole pieces of 16 bytes, as the copy engine wants them."""
    rows = torch.randint(0, 256, (base.shape[0], (base.shape[1] + 15) // 16 * 16), dtype=torch.uint8)
    rows[:, : base.shape[1]] = base
    return rows[:, : base.shape[1]]


def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """On the device with the same strides."""
    if device == "cpu":
        return tensor
    if 0 in tensor.stride():
        return tensor[:1].to(device).expand(tensor.shape)
    storage = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device=device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


def asked_of(base: torch.Tensor, queries: int) -> torch.Tensor:
    near = base[: queries // 2]
    return torch.cat([near, codes(queries - len(near), base.shape[1])])


def forget_launches(backend: str) -> None:
    if backend == "cuda_host":  # a GPU needs no emulation, which takes minutes to build
        cuda_host.launched()


def assert_ran(backend: str, on_hopper: bool = True) -> None:
    """The kernel for Hopper was launched, or another scan."""
    if backend == "cuda_host":
        launched = {line.split()[-1].split("<")[0] for line in cuda_host.launched()}
        assert launched & {"hamming_hopper_kernel", "scan_kernel"} == {
            "hamming_hopper_kernel" if on_hopper else "scan_kernel"
        }


def assert_distances(asked, base, backend, device, on_hopper=True):
    forget_launches(backend)
    got = ek.hamming_distance(asked.to(device), moved(base, device), backend=backend)
    assert_ran(backend, on_hopper)
    assert_same(got, torch.from_numpy(distances(asked, base).astype(np.int32)))


def assert_topk(asked, base, k, backend, device, allowed=None, on_hopper=True):
    forget_launches(backend)
    there = None if allowed is None else allowed.to(device)
    got = ek.hamming_topk(asked.to(device), moved(base, device), k, allowed=there, backend=backend)
    assert_ran(backend, on_hopper)
    assert_same(got, brute_force(asked, base, k, allowed))


def test_every_width(backend, device):
    for width in WIDTHS if backend == "cuda_host" else range(1, 513):
        assert_distances(codes(7, width), in_rows(codes(37, width)), backend, device)


@pytest.mark.parametrize("shape", TOPK)
def test_topk(backend, device, shape):
    queries, count, width, k = TOPK[shape]
    base = in_rows(MAKERS["clustered"](count, width))
    assert_topk(asked_of(base, queries), base, k, backend, device)


@pytest.mark.parametrize("kind", ("random", "equal"))
def test_topk_of_some(backend, device, kind):
    base = in_rows(MAKERS[kind](600, 128).contiguous())
    allowed = torch.from_numpy(np.packbits(np.random.default_rng(0).random(600) < 0.1))
    assert_topk(asked_of(base, 9), base, 70, backend, device, allowed)


@pytest.mark.parametrize("width", (128, 130, 512))
def test_range_in_few_tiles(backend, device, width):
    """Both warpgroups find something in some tiles, one of them in two that follow, and most are passed over."""
    base = in_rows(codes(1300, width))
    asked = torch.cat([base[5:6], codes(63, width), base[[5, 1030, 1290]], codes(3, width)])
    for radius in (1, 4 * width):
        forget_launches(backend)
        got = ek.hamming_range(asked.to(device), moved(base, device), radius, backend=backend)
        assert_ran(backend)
        assert_same(got, brute_force_range(asked, base, radius))


@pytest.mark.parametrize("order", range(4))
def test_orders_of_threads(backend, device, order):
    if backend != "cuda_host":
        pytest.skip("a GPU has its own")
    cuda_host.set_options(order=order, seed=1, latest=order % 2 == 0, architecture=90)
    base = in_rows(MAKERS["clustered"](530, 300))
    assert_topk(asked_of(base, 70), base, 3, backend, device)


@pytest.mark.parametrize("why", ("few_queries", "longer", "stride", "base", "overlapping"))
def test_other_roads(backend, device, why):
    """What the copy engine or the kernel does not take."""
    width = 513 if why == "longer" else 40 if why == "stride" else 48
    base = codes(40, width)
    if why == "longer":
        base = in_rows(base)
    elif why == "base":
        base = torch.cat([codes(1, 48).flatten()[:4], base.flatten(), codes(1, 48).flatten()[:12]])
        base = base[4 : 4 + 40 * 48].view(40, 48)
    elif why == "overlapping":
        base = base[:1].expand(40, 48)
    queries = 4 if why == "few_queries" else 6
    assert_topk(codes(queries, width), base, 3, backend, device, on_hopper=False)
