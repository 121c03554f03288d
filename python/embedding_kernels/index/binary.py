"""`BinaryIndex`: exact search over one-bit-a-dimension codes, with rescoring, kept in a directory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._progress import progress_bar
from ..ops.hamming import pack_bits
from . import directory, faiss, layout
from .checks import as_tensor, check_array, check_ids, check_integer, check_new_ids, check_scale, check_width
from .searching import Searched
from .segments import VECTOR_TYPES, Snapshot, Tail, groups, merged, moved
from .vectors import int8_scale as scale_of
from .vectors import to_kept

logger = logging.getLogger(__name__)

_ADD_BLOCK = 1 << 16  # vectors binarised at once: they may come from a file larger than memory
_QUERY_BLOCK = 4096  # queries searched in one call

_MOST_SMALL = 256  # segments that merging would save: each takes a file descriptor
_LARGEST_ID = 2**63 - 1

Array = TypeVar("Array", np.ndarray, Tensor)


class BinaryIndex:
    """An exact index of binary codes: ``dim`` bits a vector, Hamming distance, optional rescoring by float queries.

    Vectors are binarised by sign (`pack_bits`); codes are FAISS's (`IndexBinaryFlat`) and sentence-transformers'
    (``precision="ubinary"``), and so are the answers: distances int32 and ids int64 ``[Q, k]``, nearest first, ties to
    the row added first, 2147483647 and -1 past the last code. An id is what `add` was given, else the number of the
    row, counted from 0; no number is given twice.

    Any thread may search while another one changes the index: a search answers for what the index held when it began.

    Args:
        dim: bits of a code; None takes it from the first `add`.
        rescore_vectors: "float32", "bfloat16", "float16" or "int8" keeps the vectors too, at that precision, for
            `search` to rescore with; None keeps the codes only.
        int8_scale: float32 ``[dim]``, the value of 1 in each dimension of int8 vectors; larger values are clipped to
            127. None takes the largest magnitude in the first `add`, divided by 127.
        device: where codes are kept and searched.

    Raises:
        ValueError: a bad argument.
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        rescore_vectors: str | None = None,
        int8_scale: np.ndarray | Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or dim < 1):
            raise ValueError(f"BinaryIndex: dim must be a positive integer or None, got {dim!r}")
        if rescore_vectors is not None and rescore_vectors not in VECTOR_TYPES:
            raise ValueError(
                f"BinaryIndex: rescore_vectors must be None, {', '.join(map(repr, VECTOR_TYPES))}, "
                f"got {rescore_vectors!r}"
            )
        scale = check_scale(int8_scale, dim, rescore_vectors)
        self._kept = rescore_vectors
        self._device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._lock = threading.RLock()  # one writer at a time; readers take the snapshot and need no lock
        self._snapshot = Snapshot(len(scale) if scale is not None else None if dim is None else int(dim), scale)
        self._tail: Tail | None = None  # where the snapshot's last segment grows, if it does
        self._home: Path | None = None  # the directory last loaded from or saved to
        self._known: dict[Path, set[str]] = {}  # manifests that are states of this index, which it may replace

    @property
    def dim(self) -> int | None:
        """Bits of a code; None before the first `add` where it was not given."""
        return self._snapshot.dim

    @property
    def ntotal(self) -> int:
        """How many codes the index holds, without those removed (FAISS's name for ``len``)."""
        return self._snapshot.ntotal

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._device

    @property
    def rescore_vectors(self) -> str | None:
        """The precision of the vectors kept for rescoring; None where none are."""
        return self._kept

    @property
    def ids(self) -> np.ndarray:
        """The ids, int64 ``[ntotal]``, in the order of adding: a copy."""
        return self._snapshot.ids()

    @property
    def codes(self) -> Tensor:
        """The codes, uint8 ``[ntotal, ceil(dim / 8)]``, in the order of adding: not to be written to. A view of one
        whole segment; a copy in memory of several, or of one with removed rows."""
        snapshot = self._snapshot
        if len(snapshot.segments) == 1 and snapshot.segments[0].alive is None:
            return snapshot.segments[0].codes
        blocks = [block for part in snapshot.segments for block in part.blocks("codes", every=False)]
        return torch.cat([torch.empty(0, ((snapshot.dim or 0) + 7) // 8, dtype=torch.uint8), *blocks]).to(self._device)

    def __len__(self) -> int:
        return self.ntotal

    def __repr__(self) -> str:
        snapshot = self._snapshot
        size = snapshot.ntotal * (((snapshot.dim or 0) + 7) // 8)
        kept = "" if self._kept is None else f", rescore_vectors={self._kept!r}"
        return f"BinaryIndex(dim={snapshot.dim}, ntotal={snapshot.ntotal}, bytes={size}{kept}, device={self._device})"

    # --- writers ----------------------------------------------------------------------------------------------------

    def add(self, vectors: np.ndarray | Tensor, ids: Any = None) -> None:
        """Append vectors, float ``[N, dim]``, binarised here, or codes, uint8 ``[N, ceil(dim / 8)]``.

        The input is copied, never kept or changed. Appending costs O(N) however often it is called; with ids of any
        order, O(N log N). An error or an interruption adds nothing.

        Args:
            ids: integers from 0, one for each vector; None counts on from the highest ever given.

        Raises:
            ValueError: another dtype, rank or width; ids that are negative, not one a vector, or in the index; codes
                where rescore_vectors are kept; values that are not finite where they are kept as int8.
        """
        kind = check_array("add", "vectors", vectors)
        if kind == "uint8" and self._kept is not None:
            raise ValueError(f"add: vectors must be floats, of which {self._kept} is kept, got uint8 codes")
        count = len(vectors)
        given = None if ids is None else check_new_ids(ids, count)
        with self._lock:
            snapshot = self._snapshot
            dim = snapshot.dim or vectors.shape[1] * (8 if kind == "uint8" else 1)
            if dim == 0:
                raise ValueError("add: vectors must have at least one dimension, got none")
            check_width("add", "vectors", vectors, kind, dim)
            if given is not None:
                _check_absent(snapshot, given)
            if given is None:
                next_id = snapshot.next_id + count
            else:
                next_id = max(snapshot.next_id, int(given.max(initial=-1)) + 1)
            if given is None and next_id > _LARGEST_ID:
                raise ValueError("add: ids must be given: the highest one in use leaves no room to count on")
            scale = scale_of(vectors, snapshot.scale, _ADD_BLOCK) if self._kept == "int8" else None
            snapshot = replace(snapshot, dim=dim, scale=scale, next_id=next_id)
            self._append(snapshot, vectors, given)

    def _append(self, snapshot: Snapshot, vectors: np.ndarray | Tensor, ids: np.ndarray | None) -> None:
        """Write rows behind those of the tail and make ``snapshot``, with these rows, the index's."""
        assert snapshot.dim is not None
        count = len(vectors)
        if not count:
            self._snapshot = snapshot
            return
        first_id = None if ids is not None else snapshot.next_id - count
        tail, segments = self._tail_of(snapshot), snapshot.segments
        if tail is not None and tail.takes(first_id):
            segments = segments[:-1]
        else:
            tail = Tail.empty((snapshot.dim + 7) // 8, snapshot.dim, self._kept, first_id, self._device)
        codes, kept = tail.room(count)
        for start in range(0, count, _ADD_BLOCK):
            block = as_tensor(vectors[start : start + _ADD_BLOCK]).detach()
            rows = slice(start, start + len(block))
            codes[rows] = self._to_codes(block)
            if kept is not None:
                kept[rows] = to_kept(block, kept.dtype, snapshot.scale)
        given = ids if ids is not None or tail.ids is None else np.arange(snapshot.next_id - count, snapshot.next_id)
        segment = tail.grown(count, given)
        tail.segment, self._tail = segment, tail
        self._snapshot = replace(snapshot, segments=(*segments, segment))

    def remove_ids(self, ids: Any) -> int:
        """Remove rows by their ids, int64 ``[M]``; ids that are not in the index are passed over.

        The rows are marked; `compact` frees their room.

        Returns:
            How many rows were removed.
        """
        wanted = np.unique(check_ids("remove_ids", "ids", ids))
        with self._lock:
            snapshot, removed, segments = self._snapshot, 0, []
            for segment in snapshot.segments:
                rows = segment.find(wanted)
                rows = rows[rows >= 0]
                segments.append(segment.without(rows) if len(rows) else segment)
                removed += len(rows)
            changed = replace(snapshot, segments=tuple(segments))
            tail = self._tail_of(snapshot)
            if tail is not None:
                tail.segment = changed.segments[-1]
            self._snapshot = changed
        return removed

    def compact(self) -> None:
        """Rewrite the segments that have removed rows without them, and merge small segments that stand together.

        Answers stay the same. What an index loaded or saved rewrites goes to a file in its directory, not to memory;
        `save` makes the change last.
        """
        with self._lock:
            snapshot, segments = self._snapshot, []
            for group in groups(snapshot.segments):
                if len(group) == 1 and group[0].ntotal == len(group[0]):
                    segments.append(group[0])
                elif self._home is not None and self._home.is_dir() and self._device.type == "cpu":
                    segments.append(layout.spilled(group, self._home))
                else:
                    segments.append(merged(group))
            whole = replace(snapshot, segments=tuple(segments))
            self._tail = None
            self._snapshot = whole

    def _tail_of(self, snapshot: Snapshot) -> Tail | None:
        """The tail in which the last segment grows; None where an interruption has left another one behind."""
        grows = self._tail is not None and snapshot.segments and self._tail.segment is snapshot.segments[-1]
        return self._tail if grows else None

    # --- readers ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(
        self,
        queries: Array,
        k: int,
        rescore_multiplier: int | None = None,
        *,
        truncate_dim: int | None = None,
        allowed_ids: Any = None,
        show_progress_bar: bool | None = None,
    ) -> tuple[Array, Array]:
        """The ``k`` nearest codes of each query.

        With ``rescore_multiplier`` m, the ``k * m`` nearest codes are put in order by the inner product of the float
        query with the vectors kept, or with their bits (0 or 1) where none are, and the first ``k`` kept; ties go to
        the row added first (Yamada et al., "Efficient Passage Retrieval with Hashing", 2021; sentence-transformers'
        `semantic_search_faiss`).

        Args:
            queries: float ``[Q, dim]``, or codes uint8 ``[Q, ceil(dim / 8)]``, which cannot be rescored.
            k: answers a query, at least 1; may exceed the number of codes.
            rescore_multiplier: candidates an answer; None searches without rescoring.
            truncate_dim: search the first bits only, a multiple of 8 (Matryoshka); queries may be as short.
            allowed_ids: integers ``[M]``: only rows with these ids answer; those not in the index are passed over.
                None allows all.
            show_progress_bar: None shows one in a terminal once the work has taken two seconds.

        Returns:
            ``(distances, ids)``: int32 and int64 ``[Q, k]``, nearest first; with rescoring ``(scores, ids)``, scores
            float32, highest first. Places past the last code hold 2147483647 (-inf) and -1. NumPy arrays for NumPy
            queries, tensors on the device of the queries for tensors.

        Raises:
            ValueError: bad dtype, rank, width, k, rescore_multiplier, truncate_dim or allowed_ids.
        """
        kind = check_array("search", "queries", queries)
        k = check_integer("search", "k", k)
        if rescore_multiplier is not None:
            rescore_multiplier = check_integer("search", "rescore_multiplier", rescore_multiplier)
            if kind == "uint8":
                raise ValueError("search: queries must be float vectors to be rescored, got uint8 codes")
        allowed = None if allowed_ids is None else check_ids("search", "allowed_ids", allowed_ids)
        snapshot = self._snapshot  # what is searched, whatever writers do meanwhile
        dim = _searched_dim(snapshot, queries.shape[1] * (8 if kind == "uint8" else 1), truncate_dim)
        tensor = _cut(as_tensor(queries).to(self._device), snapshot.dim, dim)
        check_width("search", "queries", tensor, kind, dim)
        searched = Searched(snapshot, (dim + 7) // 8, allowed)

        def answer(block: Tensor, advance: Callable[[int], None]) -> tuple[Tensor, ...]:
            codes = self._to_codes(block)
            if rescore_multiplier is None:
                values, positions = searched.nearest(codes, k, advance)
            else:
                candidates = min(k * rescore_multiplier, max(1, snapshot.ntotal))
                _, positions = searched.nearest(codes, candidates, advance)
                floats = block.float() if block.dtype == torch.float64 else block
                values, positions = searched.rescored(floats, positions, k)
            return values, searched.ids_at(positions)

        return _as(queries, *_by_block(tensor, searched, show_progress_bar, answer))

    @torch.no_grad()
    def range_search(
        self, queries: Array, radius: int, *, show_progress_bar: bool | None = None
    ) -> tuple[Array, Array, Array]:
        """All codes nearer to a query than ``radius`` bits, as FAISS's ``range_search``.

        Args:
            queries: float ``[Q, dim]``, or codes uint8 ``[Q, ceil(dim / 8)]``.
            radius: at least 0; a code at a distance below it is an answer.
            show_progress_bar: as in `search`.

        Returns:
            ``(lims, distances, ids)``: int64 ``[Q + 1]``, int32 and int64 ``[M]``: the answers of query q are
            ``lims[q]`` to ``lims[q + 1]``, in the order of adding.

        Raises:
            ValueError: bad dtype, rank, width or radius.
        """
        kind = check_array("range_search", "queries", queries)
        radius = check_integer("range_search", "radius", radius, 0)
        snapshot = self._snapshot
        dim = snapshot.dim or queries.shape[1] * (8 if kind == "uint8" else 1)
        check_width("range_search", "queries", queries, kind, dim)
        searched = Searched(snapshot, (dim + 7) // 8, None)

        def answer(block: Tensor, advance: Callable[[int], None]) -> tuple[Tensor, ...]:
            counts, distances, positions = searched.within(self._to_codes(block), radius, advance)
            return counts, distances, searched.ids_at(positions)

        tensor = as_tensor(queries).to(self._device)
        counts, distances, ids = _by_block(tensor, searched, show_progress_bar, answer)
        return _as(queries, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), distances, ids)

    def reconstruct(self, ids: Any) -> Tensor:
        """The codes of rows, uint8 ``[M, ceil(dim / 8)]``, by their ids, integers ``[M]``.

        Raises:
            ValueError: an id that is not in the index.
        """
        wanted = check_ids("reconstruct", "ids", ids)
        snapshot = self._snapshot
        width = ((snapshot.dim or 0) + 7) // 8
        codes = torch.empty(len(wanted), width, dtype=torch.uint8, device=self._device)
        missing = np.ones(len(wanted), bool)
        for segment in snapshot.segments:
            rows = segment.find(wanted)
            here = rows >= 0
            if here.any():
                places = torch.from_numpy(np.flatnonzero(here)).to(self._device)
                codes[places] = segment.codes[torch.from_numpy(rows[here]).to(self._device)]
                missing &= ~here
        if missing.any():
            raise ValueError(f"reconstruct: ids must be in the index, got {int(wanted[missing][0])}")
        return codes

    # --- FAISS and the disk -----------------------------------------------------------------------------------------

    def to_faiss(self) -> Any:
        """The codes as a FAISS ``IndexBinaryFlat``, in an ``IndexBinaryIDMap2`` where ids are not 0, 1, 2, …

        Raises:
            ImportError: FAISS is not installed.
            ValueError: dim is not a multiple of 8.
        """
        return faiss.to_faiss(self._snapshot)

    @classmethod
    def from_faiss(cls, index: Any, *, device: str | torch.device = "cpu") -> BinaryIndex:
        """An index of the codes and ids of a FAISS ``IndexBinaryFlat``, or an id map over one.

        Raises:
            ImportError: FAISS is not installed.
            ValueError: another kind of index, or ids that `add` refuses.
        """
        dim, codes, ids = faiss.from_faiss(index)
        made = cls(dim, device=device)
        made.add(codes, ids)
        return made

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the index to a directory, all or nothing; again to the same one, only what is new.

        What is written is memory-mapped from then on (on a CPU), so that an index larger than memory can be built by
        adding and saving in turns. Each save of new rows adds a file; when there are many, `compact` merges them first.
        An interrupted save leaves the state saved before. Processes that have loaded the index keep what they have.

        Args:
            overwrite: replace whatever index ``path`` holds, one that this index does not come from too.

        Raises:
            ValueError: the index has no ``dim`` yet, or ``path`` is a file.
            RuntimeError: another writer is saving to ``path``, or it holds what this index does not know.
            OSError: the disk is full, or fails: the index is as before, and `save` may be called again.
        """
        target = Path(os.path.realpath(path))
        with self._lock:
            if self._snapshot.dim is None:
                raise ValueError("save: the index must have a dim (add vectors, or give it), got an index without")
            parts = self._snapshot.segments
            if len(parts) - len(groups(parts)) >= _MOST_SMALL:
                self.compact()
            known = self._known.setdefault(target, set())
            on_cpu = self._device.type == "cpu"
            saved, manifest = directory.write(target, self._snapshot, self._kept, known, overwrite, known.add, on_cpu)
            self._snapshot, self._tail, self._home = saved, None, target
            self._known[target] = {manifest.digest}

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], verify: bool = True, *, device: str | torch.device = "cpu"
    ) -> BinaryIndex:
        """Open a saved index. On a CPU it is memory-mapped: read from its files when it is searched.

        Args:
            path: a directory written by `save`.
            verify: read all files once and compare their checksums. False opens at once, after a look at the files'
                headers and sizes.
            device: where to search.

        Raises:
            FileNotFoundError: there is no such directory.
            ValueError: the directory holds no index, or a file is missing, truncated or altered.
        """
        home = Path(os.path.realpath(path))
        if not home.is_dir():
            if home.exists():
                raise ValueError(f"load: path must be a directory written by save, got the file {os.fspath(path)}")
            raise FileNotFoundError(f"load: there is no directory {os.fspath(path)}")
        snapshot, manifest = directory.read(home, verify)
        index = cls(snapshot.dim, rescore_vectors=manifest.kept, device=device)
        if index._device.type != "cpu":
            snapshot = replace(snapshot, segments=tuple(moved(part, index._device) for part in snapshot.segments))
        index._snapshot, index._home = snapshot, home
        index._known[home] = {manifest.digest}
        return index

    def _to_codes(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(self._device)
        if tensor.dtype == torch.uint8:
            return tensor
        # pack_bits takes no float64, and a tiny float64 would round to 0 on the way to float32
        return pack_bits((tensor > 0).float() if tensor.dtype == torch.float64 else tensor)


def _check_absent(snapshot: Snapshot, ids: np.ndarray) -> None:
    for segment in snapshot.segments:
        present = ids[segment.find(ids) >= 0]
        if len(present):
            raise ValueError(f"add: ids must not be in the index (remove_ids frees them), got {int(present[0])}")


def _searched_dim(snapshot: Snapshot, query_dim: int, truncate_dim: int | None) -> int:
    """The bits to compare."""
    if snapshot.dim is None:
        return query_dim  # an index that has seen nothing answers queries of any width
    if truncate_dim is None:
        return snapshot.dim
    truncate_dim = check_integer("search", "truncate_dim", truncate_dim)
    if truncate_dim > snapshot.dim or (truncate_dim % 8 and truncate_dim != snapshot.dim):
        raise ValueError(f"search: truncate_dim must be a multiple of 8 up to {snapshot.dim}, got {truncate_dim}")
    return truncate_dim


def _cut(queries: Tensor, whole_dim: int | None, dim: int) -> Tensor:
    """Queries as long as the index, cut to ``dim``; others as they are."""
    whole = whole_dim
    if queries.dtype == torch.uint8:
        whole, dim = ((whole_dim or 0) + 7) // 8, (dim + 7) // 8
    return queries[:, :dim] if queries.shape[1] == whole else queries


def _by_block(
    queries: Tensor,
    searched: Searched,
    show: bool | None,
    answer: Callable[[Tensor, Callable[[int], None]], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Answers to blocks of queries, one after the other."""
    starts = range(0, max(len(queries), 1), _QUERY_BLOCK)  # once for no queries: gives the empty answer
    with progress_bar("Searching", len(starts) * searched.steps(), "block", show, logger) as bar:
        parts = [answer(queries[start : start + _QUERY_BLOCK], bar.update) for start in starts]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _as(queries: Any, *results: Tensor) -> Any:
    """Results as the queries came: arrays, or tensors on their device."""
    if isinstance(queries, np.ndarray):
        return tuple(result.cpu().numpy() for result in results)
    return tuple(result.to(queries.device) for result in results)
