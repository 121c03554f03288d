"""A saved index: a directory of segment files, which never change, and a manifest, which names them.

The manifest is replaced in one step, after all that it names is on the disk, and what it no longer names is deleted
after that: at every moment the directory holds one whole state."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import storage
from .layout import (
    Column,
    check_byte_order,
    kind_of,
    new_name,
    open_segment,
    read_array,
    segment_columns,
    write_segment,
    write_tensor,
)
from .segments import VECTOR_TYPES, CountedIds, SavedFile, Segment, Snapshot

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = "embedding_kernels.BinaryIndex"
_VERSION = 2
_OURS = re.compile(r"(segment|alive|scale)-[0-9a-f]{16}\.safetensors|manifest-[0-9a-f]{16}\.partial")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a manifest says."""

    generation: int
    dim: int
    next_id: int
    kept: str | None
    scale: SavedFile | None
    segments: tuple[dict[str, Any], ...]  # as in the file, checked
    digest: str

    def names(self) -> set[str]:
        """The files that belong to this state."""
        names = {entry[part]["file"] for entry in self.segments for part in ("data", "alive") if entry[part]}
        return names | ({self.scale.name} if self.scale else set())


def encode(content: dict[str, Any]) -> bytes:
    """A manifest's bytes: the content, and its checksum."""
    text = json.dumps(content, sort_keys=True)
    document = {"index": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(directory: Path, op: str = "load") -> Manifest | None:
    """The manifest of a directory, None where there is none. ValueError naming the file where it is not whole."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        document = json.loads(data)
        content = document["index"]
        whole = encode(content) == data
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{op}: {path} is truncated or no manifest of an index") from error
    if not whole:
        raise ValueError(f"{op}: {path} has been altered: it does not have the checksum stored in it")
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        found = f"{content.get('format')!r} {content.get('version')!r}"
        raise ValueError(f"{op}: {path} must be of format {_FORMAT!r} {_VERSION}, got {found}")
    try:
        return _parsed(content, document["sha256"], directory)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{op}: {path} has been altered: its entries do not fit each other") from error


def _parsed(content: dict[str, Any], digest: str, directory: Path) -> Manifest:
    for name, least in (("generation", 1), ("dim", 1), ("next_id", 0)):
        _require(type(content[name]) is int and content[name] >= least)
    kept = content["rescore_vectors"]
    _require(kept is None or kept in VECTOR_TYPES)
    for entry in content["segments"]:
        _require(type(entry["rows"]) is int and entry["rows"] > 0 and entry["ids"] in ("counted", "ascending", "any"))
        first = entry["first_id"]
        _require((type(first) is int and first >= 0) if entry["ids"] == "counted" else first is None)
        _saved(entry["data"], "segment", directory)
        if entry["alive"] is not None:
            _saved(entry["alive"], "alive", directory)
    scale = None if content["scale"] is None else _saved(content["scale"], "scale", directory)
    _require(scale is None or kept == "int8")
    numbers = content["generation"], content["dim"], content["next_id"]
    return Manifest(*numbers, kept, scale, tuple(content["segments"]), digest)


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError


def _saved(entry: dict[str, Any], kind: str, directory: Path) -> SavedFile:
    name, sha256 = entry["file"], entry["sha256"]
    _require(bool(_OURS.fullmatch(name)) and name.startswith(kind) and bool(_SHA256.fullmatch(sha256)))
    return SavedFile(str(directory), name, sha256)


# --- loading --------------------------------------------------------------------------------------------------------


def read(directory: Path, verify: bool) -> tuple[Snapshot, Manifest]:
    """Map the state that a directory holds."""
    check_byte_order("load")
    manifest = read_manifest(directory)
    while True:
        if manifest is None:
            raise ValueError(f"load: {directory / MANIFEST} is missing: {directory} holds no index")
        try:
            return _opened(directory, manifest, verify), manifest
        except FileNotFoundError as error:
            # a writer may have replaced the manifest, and deleted files, since it was read
            latest = read_manifest(directory)
            if latest is not None and latest.digest == manifest.digest:
                name = os.path.basename(error.filename)
                raise ValueError(f"load: {directory / name} is missing: the manifest names it") from error
            manifest = latest


def _opened(directory: Path, manifest: Manifest, verify: bool) -> Snapshot:
    segments = tuple(_opened_segment(directory, manifest, entry, verify) for entry in manifest.segments)
    scale: Tensor | None = None
    if manifest.scale is not None:
        path = directory / manifest.scale.name
        mapped, array = read_array(path, Column("scale", torch.float32, (manifest.dim,)))
        if verify:
            _check_sum(path, mapped, manifest.scale.sha256)
        scale = torch.from_numpy(array)
    return Snapshot(manifest.dim, scale, segments, manifest.next_id)


def _opened_segment(directory: Path, manifest: Manifest, entry: dict[str, Any], verify: bool) -> Segment:
    data = _saved(entry["data"], "segment", directory)
    path = directory / data.name
    columns = segment_columns(entry["rows"], manifest.dim, manifest.kept, entry["ids"])
    segment = replace(open_segment(path, columns, entry["first_id"]), saved=data)
    assert segment.mapped is not None
    if verify:
        _check_sum(path, segment.mapped, data.sha256)
    if entry["alive"] is None:
        return segment
    alive = _saved(entry["alive"], "alive", directory)
    path = directory / alive.name
    mapped, mask = read_array(path, Column("alive", torch.uint8, ((entry["rows"] + 7) // 8,)))
    if verify:
        _check_sum(path, mapped, alive.sha256)
    return replace(segment, alive=mask, saved_alive=alive)


def _check_sum(path: Path, mapped: storage.MappedFile, expected: str) -> None:
    if mapped.sha256() != expected:
        raise ValueError(f"load: {path} has been altered: it does not have the checksum in the manifest")


# --- saving ---------------------------------------------------------------------------------------------------------


def write(
    directory: Path,
    snapshot: Snapshot,
    kept: str | None,
    known: Collection[str],
    overwrite: bool,
    announce: Callable[[str], None],
    keep_mapped: bool,
) -> tuple[Snapshot, Manifest]:
    """Make ``snapshot`` the state of a directory: write what is not there yet, replace the manifest, tidy up.

    Args:
        known: digests of the manifests that are states this index has gone through.
        overwrite: whether it may replace others.
        announce: called with the new manifest's digest before it takes its place.
        keep_mapped: whether segments written are to be mapped from now on.

    Returns:
        The snapshot over the saved files, and the manifest.
    """
    check_byte_order("save")
    if not directory.is_dir():
        if directory.exists():
            raise ValueError(f"save: path must be a directory or not exist, got the file {directory}")
        with contextlib.suppress(FileExistsError):
            storage.make_directory(directory)
    with storage.locked(directory):
        old = read_manifest(directory, "save")
        if old is None:
            storage.flush_directory(directory.parent)
        own = old is not None and old.digest in known
        if old is not None and not own and not overwrite:
            raise RuntimeError(
                f"save: {directory} holds an index that this one was not loaded from, or another writer has saved it "
                "since: load it and repeat the changes, save to another path, or replace it with overwrite=True"
            )
        written: list[Path] = []
        try:
            generation = old.generation + 1 if old else 1
            reused = old if own else None
            saved, data = _write_files(directory, snapshot, kept, reused, generation, keep_mapped, written)
            storage.flush_directory(directory)
            partial = directory / new_name("manifest", "partial")
            written.append(partial)
            storage.write_file(partial, [data])
            manifest = _parsed_again(data, directory)
        except BaseException:
            for path in written:
                with contextlib.suppress(OSError):
                    storage.unlink(path)
            raise
        announce(manifest.digest)
        storage.replace(partial, directory / MANIFEST)
        storage.flush_directory(directory)
        _tidy(directory, manifest)
    return saved, manifest


def _parsed_again(data: bytes, directory: Path) -> Manifest:
    document = json.loads(data)
    return _parsed(document["index"], document["sha256"], directory)


def _write_files(
    directory: Path,
    snapshot: Snapshot,
    kept: str | None,
    old: Manifest | None,
    generation: int,
    keep_mapped: bool,
    written: list[Path],
) -> tuple[Snapshot, bytes]:
    """Write the files of a state that the old one does not have; the state over them, and its manifest's bytes."""
    assert snapshot.dim is not None
    there = old.names() if old else set()

    def is_there(file: SavedFile | None) -> bool:
        return file is not None and file.directory == str(directory) and file.name in there

    def named(kind: str) -> Path:
        written.append(directory / new_name(kind))
        return written[-1]

    segments, entries = [], []
    for segment in snapshot.segments:
        if not len(segment):
            continue
        if not is_there(segment.saved):
            segment = _write_segment(named("segment"), segment, snapshot.dim, kept, keep_mapped)
        if segment.alive is not None and not is_there(segment.saved_alive):
            path = named("alive")
            digest = write_tensor(path, "alive", segment.alive)
            segment = replace(segment, saved_alive=SavedFile(str(directory), path.name, digest))
        segments.append(segment)
        entries.append(_entry(segment))
    scale = old.scale if old else None
    if scale is None and snapshot.scale is not None:
        path = named("scale")
        digest = write_tensor(path, "scale", snapshot.scale.numpy())
        scale = SavedFile(str(directory), path.name, digest)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "generation": generation,
        "dim": snapshot.dim,
        "next_id": snapshot.next_id,
        "rescore_vectors": kept,
        "scale": None if scale is None else _file(scale),
        "segments": entries,
    }
    return replace(snapshot, segments=tuple(segments)), encode(content)


def _write_segment(path: Path, segment: Segment, dim: int, kept: str | None, keep_mapped: bool) -> Segment:
    digest, written = write_segment(path, segment)
    saved = SavedFile(str(path.parent), path.name, digest)
    if not keep_mapped:
        return replace(written, saved=saved)
    first_id = written.ids.first if isinstance(written.ids, CountedIds) else None
    columns = segment_columns(len(segment), dim, kept, kind_of(written.ids))
    return replace(open_segment(path, columns, first_id), alive=segment.alive, saved=saved)


def _entry(segment: Segment) -> dict[str, Any]:
    assert segment.saved is not None
    return {
        "rows": len(segment),
        "ids": kind_of(segment.ids),
        "first_id": segment.ids.first if isinstance(segment.ids, CountedIds) else None,
        "data": _file(segment.saved),
        "alive": None if segment.alive is None or segment.saved_alive is None else _file(segment.saved_alive),
    }


def _file(saved: SavedFile) -> dict[str, str]:
    return {"file": saved.name, "sha256": saved.sha256}


def _tidy(directory: Path, manifest: Manifest) -> None:
    """Delete what the manifest, now on the disk, does not name. What cannot be deleted waits for the next save."""
    for name in sorted(set(os.listdir(directory)) - manifest.names()):
        if _OURS.fullmatch(name):
            try:
                storage.unlink(directory / name)
            except OSError as error:
                logger.warning("%s could not be deleted and is left to the next save: %s", directory / name, error)
