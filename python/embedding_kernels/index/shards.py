"""The file that names the shards of a saved `ShardedBinaryIndex`."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from . import storage

MANIFEST = "shards.json"
_FORMAT = "embedding_kernels.ShardedBinaryIndex"
_VERSION = 1
_SHARD = re.compile(r"shard-[0-9]{5}-of-[0-9]{5}-[0-9a-f]{8}")


def new_token() -> str:
    """What sets the shards of one save apart from those of another."""
    return secrets.token_hex(4)


def shard_name(rank: int, size: int, token: str) -> str:
    """The directory of one rank's shard."""
    return f"shard-{rank:05}-of-{size:05}-{token}"


def publish(home: Path, dim: int | None, names: list[str], counts: list[int]) -> None:
    """Name the shards of the index, at once and for good, and delete all others."""
    manifest = {"format": _FORMAT, "version": _VERSION, "dim": dim, "counts": counts, "shards": names}
    partial = home / f".{MANIFEST}.{secrets.token_hex(4)}.partial"
    try:
        storage.write_file(partial, [(json.dumps(manifest, indent=1) + "\n").encode()])
        storage.flush_directory(home)  # the shards' own entries are on the disk before their names
        storage.replace(partial, home / MANIFEST)
    except BaseException:
        with contextlib.suppress(OSError):
            storage.unlink(partial)
        raise
    storage.flush_directory(home)
    for entry in home.iterdir():
        if _SHARD.fullmatch(entry.name) and entry.name not in names:
            shutil.rmtree(entry, ignore_errors=True)


def read_manifest(home: Path, size: int) -> dict[str, Any]:
    """What the file that names the shards says, checked; there must be ``size`` of them."""
    path = home / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"load: {home} must be a directory written by save, got one without {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load: {path} is truncated or altered: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"load: {path} is no sharded index: it does not say {_FORMAT!r}")
    if manifest.get("version") != _VERSION:
        raise ValueError(f"load: {path} must have format version {_VERSION}, got {manifest.get('version')!r}")
    shards, counts = manifest.get("shards"), manifest.get("counts")
    if not isinstance(shards, list) or not isinstance(counts, list) or not len(shards) == len(counts) > 0:
        raise ValueError(f"load: {path} has been altered: it must have as many counts as shards")
    if not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in shards):
        raise ValueError(f"load: {path} has been altered: its shards have other names than save gives")
    if len(shards) != size:
        raise ValueError(
            f"load: {home} holds {len(shards)} shards and must be loaded by as many processes, got {size}; start "
            f"torchrun with --nproc_per_node={len(shards)}, or add the codes of each shard (BinaryIndex.load) to a new "
            "index"
        )
    return manifest
