"""pack_padded and unpack_padded: copies, so equal or wrong; and each is the other's gradient."""

from __future__ import annotations

import importlib

import pytest
import torch

import embedding_kernels as ek
from operators import assert_same

MASKS = {
    "right": torch.arange(7)[None] < torch.tensor([3, 7, 0, 1])[:, None],
    "left": torch.arange(7)[None] >= torch.tensor([3, 7, 0, 1])[:, None],
    "holes": torch.tensor([[1, 0, 1, 0, 0, 1, 1]] * 4).bool(),
    "nothing": torch.zeros(4, 7, dtype=torch.bool),
    "everything": torch.ones(4, 7, dtype=torch.bool),
    "no_batch": torch.zeros(0, 7, dtype=torch.bool),
    "no_length": torch.zeros(4, 0, dtype=torch.bool),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trailing", ((), (5,), (2, 3), (0,)))
def test_round_trip(backend, device, require_kernel, trailing, dtype, mask):
    require_kernel("pack_padded")
    mask = MASKS[mask].to(device)
    padded = (torch.randn(*mask.shape, *trailing) * 9).to(dtype).to(device)
    total = int(mask.sum())
    packed = ek.pack_padded(padded, mask, total, backend=backend)
    assert_same(packed, padded[mask])
    zeroed = torch.zeros_like(padded)
    zeroed[mask] = padded[mask]
    assert_same(ek.unpack_padded(packed, mask, backend=backend), zeroed)


@pytest.mark.parametrize("dtype", (torch.bool, torch.uint8, torch.int32, torch.int64))
def test_mask_dtypes(backend, device, dtype):
    mask = MASKS["holes"].to(dtype)
    if dtype != torch.bool:
        mask = mask * 2  # any value but 0 keeps a row
    padded = torch.randn(4, 7, 3)
    packed = ek.pack_padded(padded.to(device), mask.to(device), 16, backend=backend)
    assert_same(packed, padded[MASKS["holes"]])


def test_gradients(backend, device):
    mask = MASKS["right"].to(device)
    padded = torch.randn(4, 7, 6, device=device, requires_grad=True)
    packed = ek.pack_padded(padded, mask, 11, backend=backend)
    weights = torch.randn_like(packed)
    (grad,) = torch.autograd.grad((packed * weights).sum(), padded)
    assert_same(grad, ek.unpack_padded(weights, mask, backend="reference"))

    rows = torch.randn(11, 6, device=device, requires_grad=True)
    out = ek.unpack_padded(rows, mask, backend=backend)
    # a gradient of stride 0, as a sum gives
    (grad,) = torch.autograd.grad(out.sum(), rows)
    assert_same(grad, torch.ones_like(grad))


def test_strided_batch(backend, device):
    mask = MASKS["right"].to(device)
    wide = torch.randn(7, 4, 10, device=device)
    for view in (wide.transpose(0, 1), wide.transpose(0, 1)[..., 2:8], wide.transpose(0, 1)[..., ::2]):
        assert_same(ek.pack_padded(view, mask, 11, backend=backend), view[mask])


@pytest.mark.parametrize("shape", ((3, 600), (300, 5)))
def test_more_entries_than_a_block_takes(backend, device, shape):
    mask = torch.rand(shape) < 0.7
    padded = torch.randn(*shape, 9)
    packed = ek.pack_padded(padded.to(device), mask.to(device), int(mask.sum()), backend=backend)
    assert_same(packed, padded[mask])
    assert_same(ek.unpack_padded(packed, mask.to(device), backend=backend), padded * mask[..., None])


@pytest.mark.parametrize("total", (9, 11, 14))
def test_a_wrong_total_that_nobody_checks(backend, device, monkeypatch, total):
    """As on a GPU, where the mask is not read on the host: rows past the total are dropped, missing ones are 0."""
    if backend == "triton":
        kernels = importlib.import_module("embedding_kernels.kernels.pooling")
        pack, unpack = kernels.pack_padded_triton, kernels.unpack_padded_triton
    elif backend == "cuda_host":
        pack, unpack = (getattr(torch.ops.embedding_kernels_cuda_host, f"{name}_padded") for name in ("pack", "unpack"))
        monkeypatch.delenv("EMBEDDING_KERNELS_CHECK")
    else:
        pytest.skip("refused on the CPU; on a GPU the emulation and Triton cover it")
    mask, padded = MASKS["right"], torch.randn(4, 7, 6)
    packed = torch.cat([padded[mask], torch.zeros(5, 6)])[:total]
    assert_same(pack(padded.to(device), mask.to(device), total), packed)
    back = padded * mask[..., None]
    back.view(-1, 6)[mask.flatten().nonzero().flatten()[total:]] = 0
    assert_same(unpack(packed.to(device), mask.to(device)), back)


@pytest.mark.parametrize("mask", MASKS)
def test_cu_seqlens_from_mask(mask):
    mask = MASKS[mask]
    cu_seqlens, longest, total = ek.cu_seqlens_from_mask(mask)
    lengths = mask.sum(1).tolist()
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert (longest, total) == (max(lengths, default=0), sum(lengths))


def test_cu_seqlens_from_mask_refuses():
    with pytest.raises(ValueError, match="cu_seqlens_from_mask: mask must be"):
        ek.cu_seqlens_from_mask(torch.ones(3))
