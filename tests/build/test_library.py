"""When the CUDA library is loaded, and what is said where it is not; GPUs are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from embedding_kernels import _library

KIB = 1024


@pytest.mark.parametrize(
    ("capability", "shared", "reason"),
    [
        ((8, 0), 163 * KIB, None),
        ((8, 7), 163 * KIB, None),
        ((9, 0), 227 * KIB, None),
        ((8, 6), 99 * KIB, "GPU 0 gives a block 101376 bytes of shared memory and kernels take up to 166912"),
        ((7, 5), 64 * KIB, "GPU 0 is sm_75 and the library holds code for sm_80, sm_90"),
        ((10, 0), 227 * KIB, "GPU 0 is sm_100 and the library holds code for sm_80, sm_90"),
    ],
)
def test_gpus(monkeypatch, capability, shared, reason):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    properties = SimpleNamespace(shared_memory_per_block=48 * KIB, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(_library, "built_cuda_architectures", lambda: (80, 90))
    assert _library._cuda_refusal() == reason
