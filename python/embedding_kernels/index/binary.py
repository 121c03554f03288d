"""`BinaryIndex`: exact search over one-bit-a-dimension codes, with rescoring, kept in one safetensors file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import secrets
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._progress import progress_bar
from ..ops.hamming import hamming_topk, pack_bits
from ..reference.hamming import NO_INDEX

logger = logging.getLogger(__name__)

_FORMAT = "embedding_kernels.BinaryIndex"
_VERSION = "1"
_GROWTH = 1.5  # capacity is enlarged by half, so that n codes added one by one are copied O(n) times in all
_ADD_BLOCK = 1 << 16  # vectors binarised at once: they may come from a file larger than memory
_QUERY_BLOCK = 4096  # queries searched in one call: a step of the progress bar
_RESCORE_BYTES = 64 << 20  # unpacked candidate bits held at once
_HASH_BLOCK = 1 << 24

Array = TypeVar("Array", np.ndarray, Tensor)


class BinaryIndex:
    """An exact index of binary codes: ``dim`` bits a vector, Hamming distance, optional rescoring by float queries.

    Vectors are binarised by sign (`pack_bits`); codes are FAISS's (`IndexBinaryFlat`) and sentence-transformers'
    (``precision="ubinary"``), and so are the answers: distances int32 and indices int64 ``[Q, k]``, nearest first,
    ties to the lowest index, 2147483647 and -1 past the last code.

    Args:
        dim: bits of a code; None takes it from the first `add`.
        device: where codes are kept and searched.
    """

    def __init__(self, dim: int | None = None, *, device: str | torch.device = "cpu") -> None:
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or dim < 1):
            raise ValueError(f"BinaryIndex: dim must be a positive integer or None, got {dim!r}")
        self._dim = None if dim is None else int(dim)
        self._count = 0
        # codes with room to grow; a loaded index views its file here until something is added
        self._buffer = torch.empty(0, self._width or 0, dtype=torch.uint8, device=device)

    @property
    def dim(self) -> int | None:
        """Bits of a code; None before the first `add` where it was not given."""
        return self._dim

    @property
    def ntotal(self) -> int:
        """How many codes the index holds (FAISS's name for ``len``)."""
        return self._count

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._buffer.device

    @property
    def codes(self) -> Tensor:
        """The codes, uint8 ``[N, ceil(dim / 8)]``: a view, not to be written to."""
        return self._buffer[: self._count]

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        size = self._count * (self._width or 0)
        return f"BinaryIndex(dim={self._dim}, ntotal={self._count}, bytes={size}, device={self.device})"

    def add(self, vectors: np.ndarray | Tensor) -> None:
        """Append vectors, float ``[N, dim]``, binarised here, or codes, uint8 ``[N, ceil(dim / 8)]``.

        The input is copied, never kept or changed. Appending costs O(N) however often it is called.

        Raises:
            ValueError: another dtype, rank or width.
        """
        kind = _check_array("add", "vectors", vectors)
        dim = self._dim or vectors.shape[1] * (8 if kind == "uint8" else 1)
        if dim == 0:
            raise ValueError("add: vectors must have at least one dimension, got none")
        _check_width("add", "vectors", vectors, kind, dim)
        self._dim = dim
        self._reserve(self._count + len(vectors))
        added = self._buffer[self._count :]
        for start in range(0, len(vectors), _ADD_BLOCK):
            codes = self._to_codes(_as_tensor(vectors[start : start + _ADD_BLOCK]))
            added[start : start + len(codes)] = codes
        self._count += len(vectors)  # at the end: an interrupted add adds nothing

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
        """The ``k`` nearest codes of each query.

        With ``rescore_multiplier`` m, the ``k * m`` nearest codes are put in order by the inner product of the float
        query with their bits (0 or 1), and the first ``k`` kept; ties go to the lowest index (Yamada et al.,
        "Efficient Passage Retrieval with Hashing", 2021; sentence-transformers' `semantic_search_faiss`).

        Args:
            queries: float ``[Q, dim]``, or codes uint8 ``[Q, ceil(dim / 8)]``, which cannot be rescored.
            k: answers a query, at least 1; may exceed the number of codes.
            rescore_multiplier: candidates an answer; None searches without rescoring.
            truncate_dim: search the first bits only, a multiple of 8 (Matryoshka); queries may be as short.
            show_progress_bar: None shows one in a terminal once the work has taken two seconds.

        Returns:
            ``(distances, indices)``: int32 and int64 ``[Q, k]``, nearest first; with rescoring ``(scores, indices)``,
            scores float32, highest first. Places past the last code hold 2147483647 (-inf) and -1. NumPy arrays for
            NumPy queries, tensors on the device of the queries for tensors.

        Raises:
            ValueError: bad dtype, rank, width, k, rescore_multiplier or truncate_dim.
        """
        kind = _check_array("search", "queries", queries)
        _check_positive("search", "k", k)
        if rescore_multiplier is not None:
            _check_positive("search", "rescore_multiplier", rescore_multiplier)
            if kind == "uint8":
                raise ValueError("search: queries must be float vectors to be rescored, got uint8 codes")
        dim, codes = self._searched(queries.shape[1] * (8 if kind == "uint8" else 1), truncate_dim)
        tensor = self._cut(_as_tensor(queries).to(self.device), dim)
        _check_width("search", "queries", tensor, kind, dim)
        query_codes = self._to_codes(tensor)
        values: list[Tensor] = []
        indices: list[Tensor] = []
        with progress_bar("Searching", len(tensor), "query", show_progress_bar, logger) as bar:
            for start in range(0, max(len(tensor), 1), _QUERY_BLOCK):  # once for no queries: gives the empty answer
                block = slice(start, start + _QUERY_BLOCK)
                if rescore_multiplier is None:
                    value, index = hamming_topk(query_codes[block], codes, k)
                else:
                    _, candidates = hamming_topk(query_codes[block], codes, k * rescore_multiplier)
                    value, index = _rescore(tensor[block], candidates, codes, k)
                values.append(value)
                indices.append(index)
                bar.update(len(value))
        result = torch.cat(values), torch.cat(indices)
        if isinstance(queries, np.ndarray):
            return result[0].cpu().numpy(), result[1].cpu().numpy()
        return result[0].to(queries.device), result[1].to(queries.device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one safetensors file, all or nothing.

        The file is written beside its place, flushed to the disk and moved there: an interrupted save leaves an older
        file as it was. Only a killed process or a power cut leaves the unfinished ``.<name>.<random>.partial`` behind.

        Raises:
            ValueError: the index has no ``dim`` yet.
        """
        save_file = _safetensors("safetensors.numpy").save_file
        if self._dim is None:
            raise ValueError("save: the index must have a dim (add vectors, or give it), got an index without")
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        codes = self.codes.cpu().numpy()
        header = {"format": _FORMAT, "version": _VERSION, "dim": str(self._dim), "sha256": _digest(self._dim, codes)}
        try:
            partial.touch(exist_ok=False)
            rights = partial.stat().st_mode & 0o777
            save_file({"codes": codes}, partial, metadata=header)
            partial.chmod(rights)  # safetensors makes files that only their owner can read
            _flush(partial)
            os.replace(partial, target)
            _flush(target.parent)  # the directory's entry is not durable before
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], verify: bool = True, *, device: str | torch.device = "cpu"
    ) -> BinaryIndex:
        """Open a saved index. On a CPU its codes are memory-mapped: read from the file when they are searched.

        Args:
            path: a file written by `save`.
            verify: read all codes once and compare their checksum. False opens at once and checks the header only.
            device: where to search.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not an index, is truncated, or has been altered.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"load: {os.fspath(path)} is not a file")
        dim, checksum, codes = _read(path)
        if verify and _digest(dim, codes.numpy()) != checksum:
            raise ValueError(f"load: {os.fspath(path)} has been altered: its codes do not have the checksum stored")
        index = cls(dim)
        index._buffer = codes.to(device)
        index._count = len(codes)
        return index

    @property
    def _width(self) -> int | None:
        return None if self._dim is None else (self._dim + 7) // 8

    def _reserve(self, count: int) -> None:
        if count <= len(self._buffer) and self._buffer.shape[1] == self._width:
            return
        grown = max(count, int(len(self._buffer) * _GROWTH))
        buffer = torch.empty(grown, self._width or 0, dtype=torch.uint8, device=self.device)
        if self._count:
            buffer[: self._count] = self.codes
        self._buffer = buffer

    def _searched(self, query_dim: int, truncate_dim: int | None) -> tuple[int, Tensor]:
        """The bits to compare and a view of the codes cut to them."""
        if self._dim is None:
            # an index that has seen nothing answers queries of any width
            return query_dim, torch.empty(0, (query_dim + 7) // 8, dtype=torch.uint8, device=self.device)
        if truncate_dim is None:
            return self._dim, self.codes
        _check_positive("search", "truncate_dim", truncate_dim)
        if truncate_dim > self._dim or (truncate_dim % 8 and truncate_dim != self._dim):
            raise ValueError(f"search: truncate_dim must be a multiple of 8 up to {self._dim}, got {truncate_dim}")
        return truncate_dim, self.codes[:, : (truncate_dim + 7) // 8]

    def _cut(self, queries: Tensor, dim: int) -> Tensor:
        """Queries as long as the index, cut to ``dim``; others as they are."""
        is_codes = queries.dtype == torch.uint8
        whole = self._width if is_codes else self._dim
        return queries[:, : (dim + 7) // 8 if is_codes else dim] if queries.shape[1] == whole else queries

    def _to_codes(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(self.device)
        if tensor.dtype == torch.uint8:
            return tensor
        # pack_bits takes no float64, and a tiny float64 would round to 0 on the way to float32
        return pack_bits((tensor > 0).float() if tensor.dtype == torch.float64 else tensor)


def _rescore(queries: Tensor, candidates: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Order candidates ``[Q, C]`` by query · bits and keep ``k``: float32 scores and int64 indices ``[Q, k]``."""
    # in the order of indices a stable sort by score leaves ties to the lowest; missing ones (-1) come first, at -inf
    candidates = candidates.sort(dim=1).values
    scores = torch.empty(candidates.shape, dtype=torch.float32, device=codes.device)
    bits = codes.shape[1] * 8
    padded = torch.nn.functional.pad(queries.double(), (0, bits - queries.shape[1]))
    rows = max(1, _RESCORE_BYTES // max(1, candidates.shape[1] * bits * padded.element_size()))
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    for start in range(0, len(queries) if len(codes) else 0, rows):
        block = slice(start, start + rows)
        chosen = codes[candidates[block].clamp(min=0)]
        unpacked = (chosen.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(-2).to(padded.dtype)
        scores[block] = torch.bmm(unpacked, padded[block].unsqueeze(-1)).squeeze(-1)
    scores.masked_fill_(candidates == NO_INDEX, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], candidates.gather(1, order)[:, :k]


def _check_array(op: str, argument: str, array: Any) -> str:
    """Refuse what is neither float vectors nor uint8 codes; returns the name of the dtype."""
    if not isinstance(array, (np.ndarray, Tensor)):
        raise ValueError(f"{op}: {argument} must be a NumPy array or a tensor, got {type(array).__name__}")
    if array.ndim != 2:
        raise ValueError(f"{op}: {argument} must have 2 dimensions, got shape {list(array.shape)}")
    kind = str(array.dtype).removeprefix("torch.")
    if kind not in ("uint8", "float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"{op}: {argument} must be float vectors or uint8 codes, got {kind}")
    return kind


def _check_width(op: str, argument: str, array: np.ndarray | Tensor, kind: str, dim: int) -> None:
    width = (dim + 7) // 8 if kind == "uint8" else dim
    if array.shape[1] != width:
        what = f"codes of {width} bytes" if kind == "uint8" else f"vectors of {dim} dimensions"
        raise ValueError(f"{op}: {argument} must be {what}, got shape {list(array.shape)}")


def _as_tensor(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array
    # torch takes neither negative strides nor, without a warning, read-only memory
    usable = array.flags.writeable and min(array.strides) >= 0
    return torch.from_numpy(array if usable else array.copy())


def _check_positive(op: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{op}: {argument} must be an integer of at least 1, got {value!r}")


def _digest(dim: int, codes: np.ndarray) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {_VERSION} {dim} {codes.shape[0]} {codes.shape[1]}\n".encode())
    flat = np.ascontiguousarray(codes).reshape(-1)
    for start in range(0, len(flat), _HASH_BLOCK):
        digest.update(flat[start : start + _HASH_BLOCK].data)
    return digest.hexdigest()


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            'an index is kept in safetensors, which is not installed: pip install "embedding-kernels[models]"'
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: str | os.PathLike[str]) -> tuple[int, str, Tensor]:
    """Header and mapped codes of a saved index: dim, checksum, uint8 ``[N, ceil(dim / 8)]``."""
    safetensors = _safetensors("safetensors")
    name = os.fspath(path)
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            codes = file.get_tensor("codes") if "codes" in file.keys() else None  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"load: {name} is truncated or no safetensors file: {error}") from error
    if header.get("format") != _FORMAT or codes is None:
        raise ValueError(f"load: {name} is no index: its header does not say {_FORMAT!r}")
    if header.get("version") != _VERSION:
        raise ValueError(f"load: {name} must have format version {_VERSION}, got {header.get('version')!r}")
    dim = header.get("dim", "")
    fits = dim.isascii() and dim.isdigit() and int(dim) > 0 and codes.shape[1:] == ((int(dim) + 7) // 8,)
    if not fits or codes.dtype != torch.uint8 or "sha256" not in header:
        raise ValueError(f"load: {name} has been altered: its header does not fit its codes")
    return int(dim), header["sha256"], codes
