"""The disk: the few steps that a saved index is made of, each a function of its own, and files mapped into memory."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LOCK = "lock"
_HASH_BLOCK = 1 << 24
# a private mapping is writable; unreserved it may be larger than the memory of the machine
_UNRESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0


# --- what can fail: everything that changes the disk goes through these ----------------------------------------------


def create(path: Path) -> int:
    """Open a new file for writing and mapping; its descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write(descriptor: int, data: memoryview) -> int:
    """Write some of ``data``; how many bytes."""
    return os.write(descriptor, data)


def flush(descriptor: int) -> None:
    """Wait until what was written is on the disk."""
    os.fsync(descriptor)


def replace(source: Path, target: Path) -> None:
    """Move a file over another, at once."""
    os.replace(source, target)


def unlink(path: Path) -> None:
    """Delete a file; those who have mapped it keep it."""
    os.unlink(path)


def make_directory(path: Path) -> None:
    """Make one directory."""
    os.mkdir(path)


# --- made of these --------------------------------------------------------------------------------------------------


def write_blocks(descriptor: int, blocks: Iterable[Any]) -> str:
    """Write blocks of bytes one after the other; their sha256."""
    digest = hashlib.sha256()
    for block in blocks:
        whole = memoryview(block)
        if whole.nbytes == 0:  # which no cast takes
            continue
        rest = whole.cast("B")
        digest.update(rest)
        while len(rest):
            rest = rest[write(descriptor, rest) :]
    return digest.hexdigest()


def write_file(path: Path, blocks: Iterable[Any]) -> str:
    """Write a new file and wait until its content is on the disk; its sha256."""
    descriptor = create(path)
    try:
        digest = write_blocks(descriptor, blocks)
        flush(descriptor)
    finally:
        os.close(descriptor)
    return digest


def flush_directory(path: Path) -> None:
    """Wait until the entries of a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory's writer; RuntimeError where another one holds it."""
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"save: {directory} is being written by another writer: wait for it, then load the index again"
            ) from None
        yield
    finally:
        os.close(descriptor)  # which lets the lock go, as the end of the process would


class MappedFile:
    """A file in memory, read when it is touched; lives as long as a tensor over it, even when the file is deleted."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(
            descriptor, 0, flags=mmap.MAP_PRIVATE | _UNRESERVED, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self._address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Map a file by name."""
        with open(path, "rb") as file:
            return cls(file.fileno())

    def __len__(self) -> int:
        return len(self._map)

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of some bytes."""
        return self._map[start:stop]

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor over the file's bytes from ``start``; not to be written to."""
        count = 1
        for size in shape:
            count *= size
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def sha256(self) -> str:
        """Checksum of the whole file."""
        digest = hashlib.sha256()
        view = memoryview(self._map)
        for start in range(0, len(view), _HASH_BLOCK):
            digest.update(view[start : start + _HASH_BLOCK])
            self._give_back(start, min(start + _HASH_BLOCK, len(view)))
        return digest.hexdigest()

    def give_back(self, tensor: Tensor) -> None:
        """Let go of the memory under the rows of a tensor over this file, which is read again when it is touched."""
        start = tensor.data_ptr() - self._address
        self._give_back(start, min(start + len(tensor) * tensor.stride(0) * tensor.element_size(), len(self)))

    def give_back_all(self) -> None:
        """Let go of the memory under the whole file."""
        self._give_back(0, len(self))

    def _give_back(self, start: int, stop: int) -> None:
        start -= start % mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
