"""Segments as safetensors files. What a file must begin with follows from its entry in the manifest, so a header is
compared and never parsed."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import storage
from .segments import VECTOR_TYPES, CountedIds, Ids, Segment, StoredIds, TailIds, merged_ids
from .storage import MappedFile

_NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ALIGNMENT = 64
_ID_BLOCK = 1 << 21


@dataclass(frozen=True)
class Column:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def segment_columns(rows: int, dim: int, kept: str | None, ids: str) -> list[Column]:
    """The tensors of a segment's file; ``ids`` is "counted", "ascending" or "any". The widest types come first, so
    that all are aligned."""
    columns = []
    if ids != "counted":
        columns.append(Column("ids", torch.int64, (rows,)))
    if ids == "any":
        columns.append(Column("id_order", torch.int64, (rows,)))
    if kept is not None:
        columns.append(Column("vectors", VECTOR_TYPES[kept], (rows, dim)))
    return [*columns, Column("codes", torch.uint8, (rows, (dim + 7) // 8))]


def kind_of(ids: Ids) -> str:
    """How a segment's ids are stored."""
    if isinstance(ids, CountedIds):
        return "counted"
    return "ascending" if isinstance(ids, StoredIds) and ids.order is None else "any"


def header(columns: list[Column]) -> bytes:
    """What a safetensors file of these tensors begins with."""
    place, entries = 0, {}
    for column in columns:
        entries[column.name] = {
            "dtype": _NAMES[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [place, place + column.size],
        }
        place += column.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def new_name(kind: str, suffix: str = "safetensors") -> str:
    """A file name that no other file has."""
    return f"{kind}-{secrets.token_hex(8)}.{suffix}"


def check_byte_order(op: str) -> None:
    """Refuse a machine that stores numbers the other way round than safetensors."""
    if sys.byteorder != "little":
        raise RuntimeError(f"{op}: a saved index needs a little-endian machine, got a {sys.byteorder}-endian one")


def write_tensor(path: Path, name: str, array: np.ndarray) -> str:
    """Write one small array as a file of its own; its sha256."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    columns = [Column(name, tensor.dtype, tuple(tensor.shape))]
    return storage.write_file(path, [header(columns), array.tobytes()])


def write_segment(path: Path, segment: Segment) -> tuple[str, Segment]:
    """Write a segment as it stands; sha256 and the same segment with its ids in order, as they were written."""
    ids = StoredIds.of(segment.ids.values) if isinstance(segment.ids, TailIds) else segment.ids
    columns = _columns_of([segment], ids, len(segment))
    digest = storage.write_file(path, _content(columns, [segment], ids, every=True))
    return digest, Segment(segment.codes, segment.vectors, ids, segment.alive)


def spilled(parts: list[Segment], directory: Path) -> Segment:
    """One segment of the rows alive in ``parts``, in a file without a name: it takes no memory, and its room on the
    disk is free again when the segment is."""
    ids = merged_ids(parts)
    columns = _columns_of(parts, ids, sum(part.ntotal for part in parts))
    path = directory / new_name("segment")
    descriptor = storage.create(path)
    try:
        storage.unlink(path)
        storage.write_blocks(descriptor, _content(columns, parts, ids, every=False))
        mapped = MappedFile(descriptor)
    finally:
        os.close(descriptor)
    tensors = _tensors(mapped, columns)
    return Segment(tensors["codes"], tensors.get("vectors"), _ids_from(tensors, ids), mapped=mapped)


def open_segment(path: Path, columns: list[Column], first_id: int | None) -> Segment:
    """Map a segment's file. ValueError naming it where its header or its size is not what it must be."""
    mapped = open_checked(path, columns)
    tensors = _tensors(mapped, columns)
    ids = CountedIds(first_id, len(tensors["codes"])) if first_id is not None else None
    return Segment(tensors["codes"], tensors.get("vectors"), _ids_from(tensors, ids), mapped=mapped)


def read_array(path: Path, column: Column) -> tuple[MappedFile, np.ndarray]:
    """A small file's one tensor, copied, and the file."""
    mapped = open_checked(path, [column])
    return mapped, _tensors(mapped, [column])[column.name].numpy().copy()


def open_checked(path: Path, columns: list[Column]) -> MappedFile:
    """Map a file after a look at its size and header."""
    expected = header(columns)
    size = len(expected) + sum(column.size for column in columns)
    found = os.stat(path).st_size
    if found != size:
        what = "is truncated" if found < size else "has been altered"
        raise ValueError(f"load: {path} {what}: it must have {size} bytes, got {found}")
    mapped = MappedFile.open(path)
    if mapped.bytes(0, len(expected)) != expected:
        raise ValueError(f"load: {path} has been altered: its header does not fit the manifest")
    return mapped


def _columns_of(parts: list[Segment], ids: Ids, rows: int) -> list[Column]:
    vectors, codes = parts[0].vectors, parts[0].codes
    columns = segment_columns(rows, 8 * codes.shape[1], None, kind_of(ids))
    if vectors is not None:
        columns.insert(-1, Column("vectors", vectors.dtype, (rows, vectors.shape[1])))
    return columns


def _content(columns: list[Column], parts: list[Segment], ids: Ids, every: bool) -> Iterator[Any]:
    """The bytes of a segment's file, block by block."""
    yield header(columns)
    for column in columns:
        if column.name in ("codes", "vectors"):
            for part in parts:
                yield from (block.view(torch.uint8).numpy() for block in part.blocks(column.name, every))
        else:
            assert isinstance(ids, StoredIds)
            values = ids.values if column.name == "ids" else ids.order
            assert values is not None
            yield from _pieces(values)


def _pieces(values: np.ndarray) -> Iterable[np.ndarray]:
    for start in range(0, len(values), _ID_BLOCK):
        yield np.ascontiguousarray(values[start : start + _ID_BLOCK], dtype=np.int64)


def _tensors(mapped: MappedFile, columns: list[Column]) -> dict[str, Tensor]:
    place, tensors = len(header(columns)), {}
    for column in columns:
        tensors[column.name] = mapped.tensor(place, column.dtype, column.shape)
        place += column.size
    return tensors


def _ids_from(tensors: dict[str, Tensor], counted: Ids | None) -> Ids:
    if isinstance(counted, CountedIds):
        return counted
    order = tensors.get("id_order")
    return StoredIds(tensors["ids"].numpy(), None if order is None else order.numpy())
