"""What an index is made of: segments that never change, the tail that grows, and the ids of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .storage import MappedFile

_GROWTH = 1.5  # capacity is enlarged by half, so that n codes added one by one are copied O(n) times in all
_COPY_BYTES = 1 << 24  # copied or written at once
_LARGE_FILE = 32 << 20  # what was read of a mapped file up to this size stays in memory
_MERGED_BYTES = 1 << 30  # small segments are merged up to this size

VECTOR_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


class Ids(Protocol):
    """The ids of a segment's rows."""

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The last row of each wanted id, int64; -1 for an id that is not here."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The ids of some rows, int64."""


@dataclass(frozen=True)
class CountedIds:
    """Row i has the id ``first + i``."""

    first: int
    rows: int

    def find(self, wanted: np.ndarray) -> np.ndarray:
        inside = (wanted >= self.first) & (wanted < self.first + self.rows)
        return np.where(inside, wanted - self.first, -1)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return rows + self.first


@dataclass(frozen=True)
class StoredIds:
    """Ids in an array, and the rows in the order of their ids; None where the ids themselves ascend."""

    values: np.ndarray
    order: np.ndarray | None

    @classmethod
    def of(cls, values: np.ndarray) -> StoredIds:
        """The ids ``values``, put in order once."""
        ascending = bool((values[1:] > values[:-1]).all())
        return cls(values, None if ascending else np.argsort(values, kind="stable"))

    def find(self, wanted: np.ndarray) -> np.ndarray:
        if not len(self.values):
            return np.full(len(wanted), -1)
        if self.order is None:
            rows = np.searchsorted(self.values, wanted, "right") - 1
        else:
            rows = self.order[np.maximum(self._bisect(self.order, wanted) - 1, 0)]
        rows = np.maximum(rows, 0)
        return np.where(self.values[rows] == wanted, rows, -1)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.values[rows]

    def _bisect(self, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """How many ids are not above each wanted one: reads a few places of a mapped file, never all."""
        low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(order))
        for _ in range(len(order).bit_length()):
            middle = np.minimum((low + high) // 2, len(order) - 1)
            below = self.values[order[middle]] <= wanted
            low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
        return low


@dataclass(frozen=True)
class TailIds:
    """Ids of the tail, also in sorted runs, each more than twice as long as the next: ids added one by one are
    sorted O(log n) times each."""

    values: np.ndarray
    runs: tuple[tuple[np.ndarray, np.ndarray], ...] = ()  # (ids ascending, their rows), oldest first

    def grown(self, values: np.ndarray) -> TailIds:
        """With ``values``, which begin with the ids here."""
        added = values[len(self.values) :]
        order = np.argsort(added, kind="stable")
        ids, rows = added[order], order + len(self.values)
        runs = list(self.runs)
        while runs and len(runs[-1][0]) <= 2 * len(ids):
            older = runs.pop()
            ids, rows = np.concatenate((older[0], ids)), np.concatenate((older[1], rows))
            order = np.argsort(ids, kind="stable")  # the later of two equal ids stays behind the earlier
            ids, rows = ids[order], rows[order]
        return TailIds(values, (*runs, (ids, rows)))

    def find(self, wanted: np.ndarray) -> np.ndarray:
        found = np.full(len(wanted), -1)
        for ids, rows in self.runs:
            if len(ids):
                place = np.maximum(np.searchsorted(ids, wanted, "right") - 1, 0)
                found = np.where(ids[place] == wanted, rows[place], found)
        return found

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.values[rows]


@dataclass(frozen=True)
class SavedFile:
    """A file of a saved index."""

    directory: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Segment:
    """Rows that never change: codes uint8 ``[n, B]``, their ids, the vectors kept for rescoring ``[n, dim]``, and which
    of them are alive, a bit each as `pack_bits` packs (None: all)."""

    codes: Tensor
    vectors: Tensor | None
    ids: Ids
    alive: np.ndarray | None = None
    mapped: MappedFile | None = None
    saved: SavedFile | None = None
    saved_alive: SavedFile | None = None

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def ntotal(self) -> int:
        """How many rows are alive."""
        return len(self) if self.alive is None else int(np.unpackbits(self.alive, count=len(self)).sum())

    @property
    def bytes(self) -> int:
        """Of codes and vectors."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.vectors) if t is not None)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The row of each wanted id, int64; -1 where no row alive has it."""
        rows = self.ids.find(wanted)
        self._let_go()
        if self.alive is None:
            return rows
        place = np.maximum(rows, 0)
        living = (self.alive[place >> 3] >> (7 - (place & 7)).astype(np.uint8)) & 1
        return np.where(living == 1, rows, -1)

    def mask(self, rows: np.ndarray, value: bool) -> np.ndarray:
        """A bit a row: ``value`` at ``rows``; elsewhere the contrary, or for ``value=False`` what is alive now."""
        if value:
            bits = np.zeros(len(self), bool)
        elif self.alive is None:
            bits = np.ones(len(self), bool)
        else:
            bits = np.unpackbits(self.alive, count=len(self)).view(bool)
        bits[rows] = value
        return np.packbits(bits)

    def without(self, rows: np.ndarray) -> Segment:
        """The segment with some rows dead."""
        return replace(self, alive=self.mask(rows, False), saved_alive=None)

    def living_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from ``start``, a multiple of 8, to ``stop`` that are alive."""
        if self.alive is None:
            return np.arange(start, stop)
        return start + np.flatnonzero(np.unpackbits(self.alive[start // 8 : (stop + 7) // 8], count=stop - start))

    def living_ids(self) -> np.ndarray:
        """The ids of the rows that are alive: a copy."""
        ids = self.ids.take(self.living_rows(0, len(self)))
        self._let_go()
        return ids

    def _let_go(self) -> None:
        """Give back what was read of a large file."""
        if self.mapped is not None and len(self.mapped) > _LARGE_FILE:
            self.mapped.give_back_all()

    def blocks(self, name: str, every: bool) -> Iterator[Tensor]:
        """``codes`` or ``vectors`` a few rows at a time, on the CPU, without the dead unless ``every``."""
        column: Tensor = getattr(self, name)
        step = max(8, _COPY_BYTES // max(1, column.shape[1] * column.element_size()) // 8 * 8)
        for start in range(0, len(self), step):
            block = column[start : start + step]
            rows = None if every or self.alive is None else self.living_rows(start, start + len(block))
            yield (block if rows is None else block[torch.from_numpy(rows - start).to(block.device)]).cpu().contiguous()
            if self.mapped is not None:
                self.mapped.give_back(block)


@dataclass(frozen=True)
class Snapshot:
    """All that an index holds at one moment; every change makes a new one."""

    dim: int | None
    scale: Tensor | None = None  # float32 [dim]: the value of 1 in int8 vectors
    segments: tuple[Segment, ...] = ()
    next_id: int = 0  # above every id ever given

    @cached_property
    def ntotal(self) -> int:
        """How many rows are alive."""
        return sum(segment.ntotal for segment in self.segments)

    def placed(self) -> Iterator[tuple[int, Segment]]:
        """Segments and the position of their first row."""
        first = 0
        for segment in self.segments:
            yield first, segment
            first += len(segment)

    @cached_property
    def positions_are_ids(self) -> bool:
        """Whether every row's id is its position."""
        return all(isinstance(part.ids, CountedIds) and part.ids.first == first for first, part in self.placed())

    def ids_at(self, positions: Tensor) -> Tensor:
        """The ids of positions, int64; -1 stays."""
        if self.positions_are_ids:
            return positions
        places = positions.cpu().numpy()
        ids = np.full(places.shape, -1)
        for first, segment in self.placed():
            inside = (places >= first) & (places < first + len(segment))
            ids[inside] = segment.ids.take(places[inside] - first)
        return torch.from_numpy(ids).to(positions.device)

    def ids(self) -> np.ndarray:
        """The ids of all rows alive, int64, in the order of adding."""
        return np.concatenate([np.empty(0, np.int64), *(segment.living_ids() for segment in self.segments)])


@dataclass
class Tail:
    """The room in which the last segment grows. Rows once given out are never written again, so that a snapshot
    taken before an addition stays as it was."""

    codes: Tensor
    vectors: Tensor | None
    ids: np.ndarray | None  # None: ids are counted
    segment: Segment = field(init=False)

    @classmethod
    def empty(cls, width: int, dim: int, kept: str | None, first_id: int | None, device: torch.device) -> Tail:
        """Without rows; ids are counted from ``first_id``, or given where it is None."""
        vectors = None if kept is None else torch.empty(0, dim, dtype=VECTOR_TYPES[kept], device=device)
        tail = cls(torch.empty(0, width, dtype=torch.uint8, device=device), vectors, None)
        ids: Ids = TailIds(np.empty(0, np.int64)) if first_id is None else CountedIds(first_id, 0)
        tail.ids = np.empty(0, np.int64) if first_id is None else None
        tail.segment = Segment(tail.codes, tail.vectors, ids)
        return tail

    def takes(self, first_id: int | None) -> bool:
        """Whether rows with given ids (None), or counted from ``first_id``, can stand here."""
        ids = self.segment.ids
        return not isinstance(ids, CountedIds) or ids.first + ids.rows == first_id

    def room(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Where the codes and vectors of ``count`` more rows are to be written, before `grown`."""
        held = len(self.segment)
        if held + count > len(self.codes):
            size = max(held + count, int(len(self.codes) * _GROWTH))
            # all three or none: an interruption leaves the old room in use
            codes = _enlarged(self.codes, held, size)
            vectors = None if self.vectors is None else _enlarged(self.vectors, held, size)
            if self.ids is not None:
                self.ids = np.concatenate((self.ids[:held], np.empty(size - held, np.int64)))
            self.codes, self.vectors = codes, vectors
        stop = held + count
        return self.codes[held:stop], None if self.vectors is None else self.vectors[held:stop]

    def grown(self, count: int, ids: np.ndarray | None) -> Segment:
        """The segment with the ``count`` rows written to `room`."""
        held, stop = len(self.segment), len(self.segment) + count
        old = self.segment.ids
        new: Ids
        if isinstance(old, TailIds):
            assert self.ids is not None and ids is not None
            self.ids[held:stop] = ids
            new = old.grown(self.ids[:stop])
        else:
            assert isinstance(old, CountedIds)
            new = CountedIds(old.first, stop)
        vectors = None if self.vectors is None else self.vectors[:stop]
        alive = None if self.segment.alive is None else _longer_mask(self.segment.alive, held, stop)
        return Segment(self.codes[:stop], vectors, new, alive)


def _enlarged(buffer: Tensor, held: int, size: int) -> Tensor:
    larger = torch.empty(size, buffer.shape[1], dtype=buffer.dtype, device=buffer.device)
    larger[:held] = buffer[:held]
    return larger


def _longer_mask(alive: np.ndarray, held: int, stop: int) -> np.ndarray:
    """The mask of ``held`` rows, with the rows up to ``stop`` alive."""
    longer = np.full((stop + 7) // 8, 255, np.uint8)
    if stop % 8:
        longer[-1] = 0xFF << (8 - stop % 8) & 0xFF
    whole = held // 8
    longer[:whole] = alive[:whole]
    if held % 8:
        longer[whole] = alive[whole] | (longer[whole] & (0xFF >> held % 8))
    return longer


def merged(parts: list[Segment]) -> Segment:
    """One segment in memory of the rows alive in ``parts``."""
    count = sum(part.ntotal for part in parts)
    columns: list[Tensor | None] = []
    for name in ("codes", "vectors"):
        column: Tensor | None = getattr(parts[0], name)
        if column is not None:
            whole = torch.empty(count, column.shape[1], dtype=column.dtype, device=column.device)
            start = 0
            for part in parts:
                for block in part.blocks(name, every=False):
                    whole[start : start + len(block)] = block
                    start += len(block)
            column = whole
        columns.append(column)
    assert columns[0] is not None
    return Segment(columns[0], columns[1], merged_ids(parts))


def merged_ids(parts: list[Segment]) -> Ids:
    """The ids of the rows alive in ``parts``."""
    first = parts[0].ids
    if isinstance(first, CountedIds):
        expected = first.first
        for part in parts:
            if not isinstance(part.ids, CountedIds) or part.ids.first != expected or part.ntotal != len(part):
                break
            expected += len(part)
        else:
            return CountedIds(first.first, expected - first.first)
    return StoredIds.of(np.concatenate([part.living_ids() for part in parts]))


def groups(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Segments that become one: neighbours up to `_MERGED_BYTES` together; one that is larger stays alone."""
    groups: list[list[Segment]] = []
    size = 0
    for segment in segments:
        if not segment.ntotal:
            continue
        living = segment.bytes // len(segment) * segment.ntotal
        if groups and size + living <= _MERGED_BYTES:
            groups[-1].append(segment)
            size += living
        else:
            groups.append([segment])
            size = living
    return groups


def moved(segment: Segment, device: torch.device) -> Segment:
    vectors = None if segment.vectors is None else segment.vectors.to(device)
    return replace(segment, codes=segment.codes.to(device), vectors=vectors, mapped=None)
