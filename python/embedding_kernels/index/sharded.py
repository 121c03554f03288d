"""`ShardedBinaryIndex`: one index spread over the processes of torch.distributed, with the answers of a whole one."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._progress import progress_bar
from ..ops.hamming import rescore_topk
from ..reference.hamming import NO_DISTANCE, NO_INDEX
from .binary import BinaryIndex
from .checks import as_tensor
from .ranks import Part, Ranks
from .shards import MANIFEST, new_token, publish, read_manifest, shard_name

logger = logging.getLogger(__name__)

_QUERY_BLOCK = 4096  # queries searched and merged at once
_CANDIDATES = 1 << 20  # and no more than so many of their candidates
_HASH_BLOCK = 1 << 24
_ARGUMENTS = "the queries and the other arguments"

Array = TypeVar("Array", np.ndarray, Tensor)


class ShardedBinaryIndex:
    """A `BinaryIndex` whose rows are spread over the ranks of torch.distributed (started by torchrun).

    Each rank holds the rows that it has added. The position of a row is the number of rows on lower ranks plus its
    number on its own: that of one index to which the rows of all ranks were added, rank after rank. The answers are
    those of that index too, bit for bit. Adding moves the positions of the rows on higher ranks.

    All methods are collective: every rank makes the same calls in the same order. An error on one rank is raised on
    all: its own exception there, a RuntimeError that names the rank and the error elsewhere. A rank that has died, or
    does not answer in time, is a RuntimeError too; after that the index can no longer be used. The properties, ``len``
    and ``repr`` need no other rank.

    The ranks talk through gloo, in a process group of their own; answers on GPUs are exchanged through NCCL, whose
    watchdog ends a process if another one dies in the very exchange.

    Args:
        dim: bits of a code; None takes it from the first `add`.
        device: where this rank's codes are kept and searched, of one type on all ranks.
        timeout: seconds that a rank waits for the others: longer than any of them takes for its part of a call, which
            is to search 4096 queries, to add, to save or to load.

    Raises:
        ValueError: a bad argument, or ranks that differ in dim or in the type of their device.
        RuntimeError: there is no process group.
    """

    def __init__(self, dim: int | None = None, *, device: str | torch.device = "cpu", timeout: float = 60.0) -> None:
        op = "ShardedBinaryIndex"
        self._ranks = Ranks(op, timeout)

        def make() -> Part[BinaryIndex]:
            shard = BinaryIndex(dim, device=device)
            return Part(shard, same=shard.device.type, told=shard.dim)

        with self._ranks.call(op):
            self._shard, dims = self._ranks.together(op, make, "the type of device")
            self._device = self._shard.device
            self._dim = self._ranks.agreed(op, "dim", dims)
            self._counts = [0] * self._ranks.size
            if self._dim != self._shard.dim:
                self._shard = BinaryIndex(self._dim, device=device)
            self._ranks.use(op, self._device)

    @property
    def dim(self) -> int | None:
        """Bits of a code; None before the first `add` where it was not given."""
        return self._dim

    @property
    def ntotal(self) -> int:
        """How many codes all ranks hold (FAISS's name for ``len``)."""
        return sum(self._counts)

    @property
    def counts(self) -> list[int]:
        """How many codes each rank holds."""
        return list(self._counts)

    @property
    def offset(self) -> int:
        """The position of this rank's first row: how many codes lower ranks hold."""
        return sum(self._counts[: self._ranks.rank])

    @property
    def device(self) -> torch.device:
        """Where this rank's codes are."""
        return self._device

    def __len__(self) -> int:
        return self.ntotal

    def __repr__(self) -> str:
        return (
            f"ShardedBinaryIndex(dim={self._dim}, ntotal={self.ntotal}, rank={self._ranks.rank}, "
            f"counts={self._counts}, device={self._device})"
        )

    def add(self, vectors: np.ndarray | Tensor) -> None:
        """Append vectors, float ``[N, dim]``, binarised here, or codes, uint8 ``[N, ceil(dim / 8)]``, to this rank's
        rows.

        Each rank passes its own, as many as it likes; one that has no more passes none: ``[0, dim]``.

        Raises:
            ValueError: another dtype, rank or width; then no rank has added anything.
        """

        def check() -> Part[None]:
            probe = BinaryIndex(self._dim)
            probe.add(vectors[:0] if getattr(vectors, "ndim", 0) == 2 else vectors)
            return Part(None, told=probe.dim)

        def add() -> Part[None]:
            self._shard.add(vectors)
            return Part(None, told=len(self._shard))

        with self._ranks.call("add"):
            _, dims = self._ranks.together("add", check)
            dim = self._ranks.agreed("add", "dim", dims)
            try:
                _, counts = self._ranks.together("add", add)
            except Exception:
                self._ranks.part()  # some ranks have added and others not
                raise
            self._dim, self._counts = dim, counts

    @torch.no_grad()
    def search(
        self,
        queries: Array,
        k: int,
        rescore_multiplier: int | None = None,
        *,
        truncate_dim: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> tuple[Array, Array]:
        """The ``k`` nearest codes of each query among the rows of all ranks: `BinaryIndex.search`.

        Every rank passes the same queries and gets the whole answer. With ``rescore_multiplier`` m, the ``k * m``
        nearest of all ranks are put in order, each on the rank that holds it.

        Args:
            queries: float ``[Q, dim]``, or codes uint8 ``[Q, ceil(dim / 8)]``, which cannot be rescored.
            k: answers a query, at least 1; may exceed the number of codes.
            rescore_multiplier: candidates an answer; None searches without rescoring.
            truncate_dim: search the first bits only, a multiple of 8 (Matryoshka); queries may be as short.
            show_progress_bar: None shows one on rank 0, in a terminal, once the work has taken two seconds.

        Returns:
            ``(distances, positions)``: int32 and int64 ``[Q, k]``, nearest first, ties to the lowest position; with
            rescoring ``(scores, positions)``, scores float32, highest first. Places past the last code hold 2147483647
            (-inf) and -1. NumPy arrays for NumPy queries, tensors on the device of the queries for tensors.

        Raises:
            ValueError: bad dtype, rank, width, k, rescore_multiplier or truncate_dim, or ranks that do not pass the
                same.
            RuntimeError: another rank failed or does not answer.
        """

        def check() -> Part[Tensor]:
            few = queries[:0] if getattr(queries, "ndim", 0) == 2 else queries
            self._shard.search(few, k, rescore_multiplier, truncate_dim=truncate_dim, show_progress_bar=False)
            same = _digest(queries, k, rescore_multiplier, truncate_dim)
            return Part(as_tensor(queries).to(self._device), same=same)

        parts = []
        with self._ranks.call("search"):
            tensor, _ = self._ranks.together("search", check, _ARGUMENTS)
            candidates = min(k * (rescore_multiplier or 1), max(self.ntotal, 1))
            size = max(1, min(_QUERY_BLOCK, _CANDIDATES // candidates))
            for block in self._blocks(tensor, size, show_progress_bar):
                values, positions = self._nearest(block, candidates, truncate_dim)
                if rescore_multiplier is not None:
                    values, positions = self._rescored(block, positions, k, truncate_dim)
                parts.append((_filled(values, k), _filled(positions, k)))
        return _as(queries, *(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.no_grad()
    def range_search(
        self, queries: Array, radius: int, *, show_progress_bar: bool | None = None
    ) -> tuple[Array, Array, Array]:
        """All codes of all ranks nearer to a query than ``radius`` bits: `BinaryIndex.range_search`.

        Every rank passes the same queries and gets the whole answer.

        Args:
            queries: float ``[Q, dim]``, or codes uint8 ``[Q, ceil(dim / 8)]``.
            radius: at least 0; a code at a distance below it is an answer.
            show_progress_bar: as in `search`.

        Returns:
            ``(lims, distances, positions)``: int64 ``[Q + 1]``, int32 and int64 ``[M]``: the answers of query q are
            ``lims[q]`` to ``lims[q + 1]``, in ascending order of position.

        Raises:
            ValueError: bad dtype, rank, width or radius, or ranks that do not pass the same.
            RuntimeError: another rank failed or does not answer.
        """

        def check() -> Part[Tensor]:
            few = queries[:0] if getattr(queries, "ndim", 0) == 2 else queries
            self._shard.range_search(few, radius)
            return Part(as_tensor(queries).to(self._device), same=_digest(queries, radius))

        with self._ranks.call("range_search"):
            tensor, _ = self._ranks.together("range_search", check, _ARGUMENTS)
            blocks = self._blocks(tensor, _QUERY_BLOCK, show_progress_bar)
            counts, *found = zip(*[self._within(block, radius) for block in blocks], strict=True)
        lims = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
        return _as(queries, lims, *(torch.cat(column) for column in found))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the index to a directory that all ranks see, each rank its shard to a directory in it, all or nothing.

        The file that names the shards is replaced, in one step, after all ranks have written theirs: an interrupted
        save leaves the state saved before. Older shards are deleted then. A shard is an index that `BinaryIndex.load`
        opens.

        Raises:
            ValueError: the index has no ``dim`` yet.
            OSError: the disk is full, or fails.
            RuntimeError: another rank failed or does not answer.
        """
        home, rank = Path(os.path.realpath(directory)), self._ranks.rank

        def check() -> Part[None]:
            if self._dim is None:
                raise ValueError("save: the index must have a dim (add vectors, or give it), got an index without")
            home.mkdir(parents=True, exist_ok=True)
            return Part(None, told=new_token())

        def write() -> Part[None]:
            self._shard.save(home / names[rank])
            return Part(None)

        def name() -> Part[None]:
            if rank == 0:
                publish(home, self._dim, names, self._counts)
            return Part(None)

        with self._ranks.call("save"):
            _, tokens = self._ranks.together("save", check)
            names = [shard_name(number, self._ranks.size, tokens[0]) for number in range(self._ranks.size)]
            try:
                self._ranks.together("save", write)
            except BaseException:
                shutil.rmtree(home / names[rank], ignore_errors=True)
                raise
            self._ranks.together("save", name)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        verify: bool = True,
        *,
        device: str | torch.device = "cpu",
        timeout: float = 60.0,
    ) -> ShardedBinaryIndex:
        """Open an index saved by as many ranks as there are now; each opens its own shard.

        Args:
            directory: a directory written by `save`.
            verify: as in `BinaryIndex.load`: read all files once and compare their checksums.
            device: where to search.
            timeout: as in `ShardedBinaryIndex`.

        Raises:
            FileNotFoundError: there is no such directory.
            ValueError: the directory holds no sharded index, one of another number of shards, or an altered one.
            RuntimeError: another rank failed or does not answer.
        """
        index = cls(device=device, timeout=timeout)
        home, rank, size = Path(os.path.realpath(directory)), index._ranks.rank, index._ranks.size

        def read() -> Part[BinaryIndex]:
            manifest = read_manifest(home, size)
            shard = BinaryIndex.load(home / manifest["shards"][rank], verify, device=device)
            if (shard.dim, len(shard)) != (manifest["dim"], manifest["counts"][rank]):
                raise ValueError(f"load: {home / manifest['shards'][rank]} does not hold what {MANIFEST} says")
            return Part(shard, same=manifest["shards"][0], told=len(shard))

        with index._ranks.call("load"):
            index._shard, told = index._ranks.together("load", read, f"the shards in {MANIFEST}")
            index._dim, index._counts = index._shard.dim, told
        return index

    def _blocks(self, queries: Tensor, size: int, show: bool | None) -> Any:
        """Blocks of the queries, one of none for none: it gives the empty answer."""
        shown = show if self._ranks.rank == 0 else False
        with progress_bar("Searching", len(queries), "query", shown, logger) as bar:
            for start in range(0, max(len(queries), 1), size):
                block = queries[start : start + size]
                yield block
                bar.update(len(block))

    def _nearest(self, queries: Tensor, count: int, truncate_dim: int | None) -> tuple[Tensor, Tensor]:
        """The nearest rows of all ranks, up to ``count`` a query: distances and positions."""
        most = min(count, max(*self._counts, 1))  # of one rank

        def work() -> Part[tuple[Tensor, Tensor]]:
            return Part(self._shard.search(queries, most, truncate_dim=truncate_dim, show_progress_bar=False))

        (distances, rows), _ = self._ranks.together("search", work)
        distances, positions = self._gather("search", distances, self._positions(rows))
        # the ranks stand in the order of positions: a stable sort by distance is enough
        distances, order = distances.sort(dim=1, stable=True)
        return distances[:, :count], positions.gather(1, order[:, :count])

    def _rescored(self, queries: Tensor, positions: Tensor, k: int, truncate_dim: int | None) -> tuple[Tensor, Tensor]:
        """The best ``k`` of the candidates by inner product with their bits: scores and positions."""
        if self.ntotal == 0:
            return queries.new_empty(len(queries), 0, dtype=torch.float32), positions[:, :0]
        rows = positions - self.offset
        mine = (rows >= 0) & (rows < len(self._shard)) & (positions != NO_INDEX)

        def work() -> Part[tuple[Tensor, Tensor]]:
            return Part(self._score(queries, rows.masked_fill(~mine, NO_INDEX), k, truncate_dim))

        (scores, rows_found), _ = self._ranks.together("search", work)
        return _best(*self._gather("search", scores, self._positions(rows_found)))

    def _score(self, queries: Tensor, rows: Tensor, k: int, truncate_dim: int | None) -> tuple[Tensor, Tensor]:
        """The best ``k`` of this rank's candidates: scores and rows."""
        dim = truncate_dim or self._dim
        floats = (queries.float() if queries.dtype == torch.float64 else queries)[:, :dim]
        # ascending, so that ties go to the lowest row here too; the absent, -1, come first
        chosen, places = torch.cat((rows.new_full((1,), NO_INDEX), rows.flatten())).unique(return_inverse=True)
        codes = self._shard.reconstruct(chosen[1:])[:, : (floats.shape[1] + 7) // 8]
        scores, found = rescore_topk(floats, places[1:].reshape(rows.shape) - 1, codes, min(k, rows.shape[1]))
        return scores, chosen[found + 1]

    def _within(self, queries: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
        """All rows of all ranks nearer than ``radius``: answers a query, then distances and positions of all."""

        def work() -> Part[tuple[Tensor, Tensor, Tensor]]:
            lims, distances, rows = self._shard.range_search(queries, radius, show_progress_bar=False)
            return Part((lims, distances, rows), told=len(rows))

        (lims, distances, rows), sizes = self._ranks.together("range_search", work)
        missing = (0, max(sizes) - len(rows))
        pad = torch.nn.functional.pad
        gather, op = self._ranks.gather, "range_search"
        counts = gather(op, lims.diff())
        found = [gather(op, pad(part, missing)) for part in (distances, self._positions(rows))]
        asked = torch.arange(len(queries), device=self._device)
        query = torch.cat([asked.repeat_interleave(count) for count in counts])
        order = query.argsort(stable=True)  # a query's answers are in the order of ranks, and so of positions
        every = [torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])[order] for parts in found]
        return torch.stack(counts).sum(0), every[0], every[1]

    def _positions(self, rows: Tensor) -> Tensor:
        return torch.where(rows == NO_INDEX, rows, rows + self.offset)

    def _gather(self, op: str, *tensors: Tensor) -> list[Tensor]:
        """Every rank's columns side by side."""
        return [torch.cat(self._ranks.gather(op, tensor), dim=1) for tensor in tensors]


def _digest(queries: np.ndarray | Tensor, *arguments: Any) -> str:
    """A checksum of what a search is given; an array and a tensor of the same values have the same."""
    tensor = as_tensor(queries).detach().cpu().contiguous()
    digest = hashlib.blake2b(
        f"{tensor.dtype} {list(tensor.shape)} {list(map(str, arguments))}".encode(), digest_size=16
    )
    content = tensor.view(torch.uint8).reshape(-1).numpy() if tensor.numel() else np.empty(0, np.uint8)
    for start in range(0, len(content), _HASH_BLOCK):
        digest.update(content[start : start + _HASH_BLOCK].data)
    return digest.hexdigest()


def _best(scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """In the order of `rescore_topk`: by (-score, position), what is not a number as -inf, the absent last."""
    last = torch.iinfo(positions.dtype).max
    positions, order = positions.masked_fill(positions == NO_INDEX, last).sort(dim=1)
    scores = scores.gather(1, order)
    order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
    positions = positions.gather(1, order)
    return scores.gather(1, order), positions.masked_fill(positions == last, NO_INDEX)


def _filled(tensor: Tensor, k: int) -> Tensor:
    """``k`` columns; places past the last code hold what says so."""
    value = {torch.int32: NO_DISTANCE, torch.int64: NO_INDEX, torch.float32: -torch.inf}[tensor.dtype]
    return torch.nn.functional.pad(tensor[:, :k], (0, max(k - tensor.shape[1], 0)), value=value)


def _as(queries: Any, *results: Tensor) -> Any:
    """Results as the queries came: arrays, or tensors on their device."""
    if isinstance(queries, np.ndarray):
        return tuple(result.cpu().numpy() for result in results)
    return tuple(result.to(queries.device) for result in results)
