"""Which implementation a public function runs: argument, then `use_backend`, then the environment, then the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("reference", "cpu", "triton", "cuda")


def _named(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _from_environment() -> str | None:
    value = os.environ.get("EMBEDDING_KERNELS_BACKEND", "")
    return _named(value, "EMBEDDING_KERNELS_BACKEND") if value else None


_chosen: list[str | None] = [_from_environment()]


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Make public functions run ``backend`` ("reference", "cpu", "triton" or "cuda") inside the block.

    The choice is made when a public function is called or traced and holds for the whole process, not for one
    thread; a ``backend=`` argument wins over it. Raises ValueError for another name.
    """
    _chosen.append(_named(backend, "use_backend: backend"))
    try:
        yield
    finally:
        _chosen.pop()


def requested(backend: str | None, op: str) -> str | None:
    """The backend asked for by argument, context or environment; None leaves it to the device."""
    return _chosen[-1] if backend is None else _named(backend, f"{op}: backend")
