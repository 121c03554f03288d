"""Directories that are there whole or not at all, and work that one process at a time does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_PARTIAL = ".partial"


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A new directory beside ``target``, which takes its name when the block ends well and is removed when it does not.

    Raises:
        FileExistsError: ``target`` exists and is not an empty directory.
    """
    _check_absent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}")
    partial.mkdir()
    try:
        yield partial
        for file in (path for path in partial.rglob("*") if path.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # a name that outlives a power failure must not lead to empty files
        try:
            os.rename(partial, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                _check_absent(target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partial(target: Path) -> None:
    """Remove what killed processes left of ``target``; only for who holds the lock under which it is written."""
    for partial in target.parent.glob(f".{target.name}.*{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def exclusive(lock: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock between processes, a file that stays; ``on_wait`` is called once where another one holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which lets the lock go, as the end of the process would


def _check_absent(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists already: expected a directory that is yet to be made")
