"""What the machine can do at that moment: multiply-adds, memory, matrix products.

They run as contenders in the same repetitions as the kernels, and are reported beside them.
"""

from __future__ import annotations

import torch

from .harness import Contender, Room, Work

# of a processor, and of a GPU, which smaller ones would not fill
_FMA_SIZES = {"cpu": 256, "cuda": 2048}
_MATMUL_SIZES = {"cpu": 1024, "cuda": 8192}
_MEMORY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_GEMM_ROWS, _GEMM_COLUMNS = 256, 16384

_made: dict[tuple[str, torch.device], Contender] = {}


def fma(room: Room) -> Contender:
    """Calibration: a float32 product small enough for the caches, whose speed is that of multiply-add units."""

    def make() -> Contender:
        size = _FMA_SIZES[room.device.type]
        a, b = (torch.randn(size, size, device=room.device) for _ in range(2))
        out = torch.empty_like(a)
        work = Work(0, 2 * size**3, "float32 operations")
        return Contender("FMA", lambda turn: torch.mm(a, b, out=out), role="ceiling", work=work)

    return _once("fma", room, make)


def read(room: Room, size: int | None = None) -> Contender:
    """Reading ``size`` bytes: a threaded dot product of two halves of memory far larger than a cache of ours alone."""
    size = _MEMORY_BYTES[room.device.type] if size is None else size

    def make() -> Contender:
        left, right = torch.ones(size // 4, device=room.device).chunk(2)
        work = Work(size, 0, "")
        return Contender("read bandwidth", lambda turn: torch.dot(left, right), role="ceiling", work=work)

    return _once(f"read{size}", room, make)


def copy(room: Room) -> Contender:
    """Reading and writing: a threaded memory copy; bytes count both ways."""

    def make() -> Contender:
        size = _MEMORY_BYTES[room.device.type]
        source = torch.ones(size // 8, device=room.device)
        target = torch.empty_like(source)
        work = Work(size, 0, "")
        return Contender("copy bandwidth", lambda turn: target.copy_(source), role="ceiling", work=work)

    return _once("copy", room, make)


def gemm(room: Room, bits: int) -> Contender:
    """The matrix product that Hamming distances are, over ±1 in bfloat16: one operation for each bit compared."""

    def make() -> Contender:
        queries = torch.ones(_GEMM_ROWS, bits, dtype=torch.bfloat16, device=room.device)
        codes = torch.ones(_GEMM_COLUMNS, bits, dtype=torch.bfloat16, device=room.device).T
        out = torch.empty(_GEMM_ROWS, _GEMM_COLUMNS, dtype=torch.bfloat16, device=room.device)
        work = Work(0, _GEMM_ROWS * _GEMM_COLUMNS * bits, "bits compared")
        return Contender("bfloat16 GEMM", lambda turn: torch.mm(queries, codes, out=out), role="ceiling", work=work)

    return _once(f"gemm{bits}", room, make)


def matmul(room: Room, dtype: torch.dtype) -> Contender:
    """A product of square matrices that fills the machine: what attention would reach if it were nothing else."""
    kind, size = str(dtype).removeprefix("torch."), _MATMUL_SIZES[room.device.type]

    def make() -> Contender:
        a, b = (torch.randn(size, size, device=room.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        work = Work(0, 2 * size**3, f"{kind} operations")
        return Contender(f"{kind} matrix product", lambda turn: torch.mm(a, b, out=out), role="ceiling", work=work)

    return _once(f"matmul{kind}", room, make)


def _once(name: str, room: Room, make: object) -> Contender:
    key = (name, room.device)
    if key not in _made:
        _made[key] = make()  # type: ignore[operator]
    return _made[key]
