"""The backend "cuda_host" of the tests: operators of the CUDA library in the host emulation, on CPU tensors."""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from embedding_kernels.ops import _registry, cuda_table

from . import build

NAMESPACE = "embedding_kernels_cuda_host"


def why_not() -> str | None:
    """Why the emulation cannot run here, or None."""
    if platform.machine() != "x86_64":
        return "the emulation switches stacks in x86-64 assembly"
    return None if shutil.which("g++") else "the emulation needs g++"


@cache
def library() -> ctypes.CDLL:
    path = str(build.build_library())
    torch.ops.load_library(path)
    opened = ctypes.CDLL(path)
    opened.embedding_kernels_emulation_launched.restype = ctypes.c_char_p
    return opened


def has_kernel(op: str) -> bool:
    """Whether the CUDA library has a kernel of an operator."""
    library()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU")


def launched() -> list[str]:
    """Kernels launched since the last call: "file:line name"."""
    return library().embedding_kernels_emulation_launched().decode().splitlines()


def set_options(order: int = 0, seed: int = 0, latest: bool = False, architecture: int = 80) -> None:
    """How threads take turns: 0 forward, 1 reverse, 2 random, 3 one warp as far as it goes; `latest`: asynchronous
    copies land and products are made as late as they may; `architecture`: the compute capability, 80 or 90."""
    library().embedding_kernels_emulation_options(order, ctypes.c_uint64(seed), int(latest))
    library().embedding_kernels_emulation_architecture(architecture)


@contextmanager
def architecture(chosen: int) -> Iterator[None]:
    """Operators run as on this compute capability, 80 or 90."""
    library().embedding_kernels_emulation_architecture(chosen)
    try:
        yield
    finally:
        library().embedding_kernels_emulation_architecture(80)


def _run(op: _registry.Operator, *args: Any) -> Any:
    if not has_kernel(op.name):
        pytest.skip(f"{op.name} has no CUDA C++ kernel")
    if op.name in cuda_table.TABLE and cuda_table.row_for(op.name, op.argument_names, args) is None:
        pytest.skip(f"{op.name}: the table leaves this call to Triton")
    return getattr(getattr(torch.ops, NAMESPACE), op.name)(*args)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public functions asked for backend "cuda_host" run in the emulation, their gradients too."""
    library()
    requested = _registry.requested

    def requested_or_emulated(backend: str | None, op: str) -> str | None:
        return "triton" if backend == "cuda_host" else requested(backend, op)

    monkeypatch.setattr(_registry, "requested", requested_or_emulated)
    monkeypatch.setattr(_registry.Operator, "run_triton", _run)
    # values of offsets are looked at, as on the CPU
    monkeypatch.setenv("EMBEDDING_KERNELS_CHECK", "1")
