"""Search over the segments of a snapshot, block by block; lists of answers are merged exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ops.hamming import hamming_range, hamming_topk, rescore_topk
from ..reference.hamming import NO_DISTANCE, NO_INDEX
from .segments import Segment, Snapshot

_BLOCK_BYTES = 32 << 20  # codes read at once; an index mapped from larger files gives each block back


@dataclass(frozen=True)
class Block:
    """Some rows of a segment: their codes, who may answer (None: all), and the position of the first."""

    first: int
    codes: Tensor
    allowed: Tensor | None


class Searched:
    """A snapshot with the codes cut to ``width`` bytes, and the rows that may answer."""

    def __init__(self, snapshot: Snapshot, width: int, allowed_ids: np.ndarray | None) -> None:
        self.snapshot = snapshot
        self.width = width
        # an index that fits in a block stays in memory
        mapped = sum(segment.bytes for segment in snapshot.segments if segment.mapped is not None)
        self._gives_back = mapped > _BLOCK_BYTES
        self._masks = [segment.alive for segment in snapshot.segments]
        self._rows = snapshot.ntotal
        if allowed_ids is not None:
            found = [segment.find(allowed_ids) for segment in snapshot.segments]
            rows = [places[places >= 0] for places in found]
            self._masks = [part.mask(row, True) for part, row in zip(snapshot.segments, rows, strict=True)]
            self._rows = sum(len(np.unique(row)) for row in rows)

    def steps(self) -> int:
        """How many blocks there are."""
        return sum(-(-len(part) // self._step(part)) for part in self.snapshot.segments)

    def _step(self, segment: Segment) -> int:
        if segment.codes.device.type != "cpu":
            return max(1, len(segment))
        return max(8, _BLOCK_BYTES // segment.codes.shape[1] // 8 * 8)  # whole bytes of the mask

    def _blocks(self) -> Iterator[Block]:
        for (first, segment), mask in zip(self.snapshot.placed(), self._masks, strict=True):
            for start in range(0, len(segment), self._step(segment)):
                codes = segment.codes[start : start + self._step(segment)]
                allowed = None
                if mask is not None:
                    bits = torch.from_numpy(mask[start // 8 : (start + len(codes) + 7) // 8])
                    allowed = bits.to(codes.device)
                yield Block(first + start, codes[:, : self.width], allowed)
                self._give_back(segment, codes)

    def _give_back(self, segment: Segment, tensor: Tensor) -> None:
        if self._gives_back and segment.mapped is not None:
            segment.mapped.give_back(tensor)

    def ids_at(self, positions: Tensor) -> Tensor:
        """The ids of positions, int64; -1 stays."""
        ids = self.snapshot.ids_at(positions)
        if self._gives_back:
            for segment in self.snapshot.segments:
                if segment.mapped is not None:
                    segment.mapped.give_back_all()
        return ids

    def nearest(self, queries: Tensor, k: int, advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest rows: distances int32 and positions int64 ``[Q, k]``, by (distance, position)."""
        kept = min(k, max(1, self._rows))
        distances = queries.new_empty(len(queries), 0, dtype=torch.int32)
        positions = queries.new_empty(len(queries), 0, dtype=torch.int64)
        for block in self._blocks():
            found, rows = hamming_topk(queries, block.codes, min(kept, len(block.codes)), allowed=block.allowed)
            rows = torch.where(rows == NO_INDEX, rows, rows + block.first)
            if distances.shape[1]:
                # both lists are sorted and this block lies behind the others: a stable sort by distance is enough
                found, order = torch.cat((distances, found), 1).sort(dim=1, stable=True)
                rows = torch.cat((positions, rows), 1).gather(1, order)
            distances, positions = found[:, :kept], rows[:, :kept]
            advance(1)
        return _filled(distances, k, NO_DISTANCE), _filled(positions, k, NO_INDEX)

    def within(self, queries: Tensor, radius: int, advance: Callable[[int], None]) -> tuple[Tensor, Tensor, Tensor]:
        """All rows nearer than ``radius``: answers a query int64 ``[Q]``, then distances int32 and positions int64 of
        all, query after query, by position."""
        every = [(queries.new_empty(0, dtype=dtype)) for dtype in (torch.int64, torch.int32, torch.int64)]
        asked, distances, positions = ([part] for part in every)
        numbers = torch.arange(len(queries), device=queries.device)
        for block in self._blocks():
            offsets, found, rows = hamming_range(queries, block.codes, radius, allowed=block.allowed)
            asked.append(numbers.repeat_interleave(offsets.diff(), output_size=len(found)))
            distances.append(found)
            positions.append(rows + block.first)
            advance(1)
        # blocks came in the order of positions
        query, order = torch.cat(asked).sort(stable=True)
        counts = torch.bincount(query, minlength=len(queries))
        return counts, torch.cat(distances)[order], torch.cat(positions)[order]

    def rescored(self, queries: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` best of the rows at ``positions [Q, C]`` by inner product with the vectors kept, or with the bits:
        scores float32 and positions int64 ``[Q, k]``, highest first, ties by position."""
        scores = queries.new_empty(len(queries), 0, dtype=torch.float32)
        best = positions.new_empty(len(queries), 0)
        for first, segment in self.snapshot.placed():
            inside = (positions >= first) & (positions < first + len(segment))
            if bool(inside.any()):
                candidates = torch.where(inside, positions - first, NO_INDEX)
                found, rows = self._rescored_segment(segment, queries, candidates, k)
                rows = torch.where(rows == NO_INDEX, rows, rows + first)
                scores, best = _best(torch.cat((scores, found), 1), torch.cat((best, rows), 1), k)
        return _filled(scores, k, -torch.inf), _filled(best, k, NO_INDEX)

    def _rescored_segment(self, segment: Segment, queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
        dim = queries.shape[1]
        stored = segment.codes if segment.vectors is None else segment.vectors
        rows = stored[:, : self.width if segment.vectors is None else dim]
        scale = None
        if stored.dtype == torch.int8:
            assert self.snapshot.scale is not None
            scale = self.snapshot.scale[:dim].to(queries.device)
        if not self._gives_back or segment.mapped is None:
            return rescore_topk(queries, candidates, rows, k, scale=scale)
        step = max(1, _BLOCK_BYTES // (candidates.shape[1] * rows.shape[1] * rows.element_size()))
        scores, best = [], []
        for start in range(0, len(queries), step):
            block = slice(start, start + step)
            # -1 first, whether it stands among the candidates or not; places ascend with the rows, so that ties go
            # to the first row
            wanted = torch.cat((candidates.new_full((1,), NO_INDEX), candidates[block].flatten())).unique()
            places = torch.searchsorted(wanted, candidates[block].contiguous()) - 1
            gathered = self._gathered(segment, rows, wanted[1:])
            found, place = rescore_topk(queries[block], places, gathered, k, scale=scale)
            scores.append(found)
            best.append(wanted[place + 1])
        return torch.cat(scores), torch.cat(best)

    def _gathered(self, segment: Segment, column: Tensor, wanted: Tensor) -> Tensor:
        """Some rows of a mapped column, ascending, copied: a block of the file is given back before the next is read,
        because one row brings in up to 2 MiB around it."""
        gathered = torch.empty(len(wanted), column.shape[1], dtype=column.dtype)
        step = max(1, _BLOCK_BYTES // (column.stride(0) * column.element_size()))
        blocks, counts = torch.unique_consecutive(wanted // step, return_counts=True)
        stop = 0
        for number, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            start, stop = stop, stop + count
            gathered[start:stop] = column[wanted[start:stop]]
            self._give_back(segment, column[number * step : (number + 1) * step])
        return gathered


def _best(scores: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Put two lists, one behind the other in position and each in order, in the order of `rescore_topk`."""
    # what is not a number counts as -inf, and the absent come last
    order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
    absent = (positions == NO_INDEX).to(torch.int8).gather(1, order)
    order = order.gather(1, absent.argsort(dim=1, stable=True))[:, :k]
    return scores.gather(1, order), positions.gather(1, order)


def _filled(tensor: Tensor, k: int, value: float) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, k - tensor.shape[1]), value=value)
