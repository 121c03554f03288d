"""Cases of the pooling family: packed rows into vectors, with gradients, and padded to packed and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import embedding_kernels as ek

from . import ceilings
from . import pooling_peers as peers
from .harness import OURS, Case, Contender, Room, Work, copies

_SHORTEST, _LONGEST = 8, 256
_ADDS = "values added"


def _lengths(texts: int, shortest: int = _SHORTEST) -> Tensor:
    """Tokens of each text, the same in every run."""
    return torch.randint(shortest, _LONGEST + 1, (texts,), generator=torch.Generator().manual_seed(texts))


@lru_cache(maxsize=1)
def _rows(
    room: Room, texts: int, dim: int, dtype: torch.dtype, shortest: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Mask, packed rows and padded rows, in rotating copies; cases that follow each other share them."""
    seeded = torch.Generator().manual_seed(0)
    lengths = _lengths(texts, shortest)
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(room.device)
    # drawn finely, so that float32 maxima are not tied: peers share a gradient between ties
    fine = torch.float64 if dtype == torch.float32 else torch.float32
    padded = torch.randn(*mask.shape, dim, generator=seeded, dtype=fine).to(dtype).to(room.device)
    return mask, copies(padded[mask], room), copies(padded, room)


def _batch(room: Room, texts: int, dim: int, dtype: torch.dtype, shortest: int, gradient: bool) -> peers.Batch:
    """Token rows of texts of uniformly drawn lengths, packed and padded."""
    mask, packed, padded = _rows(room, texts, dim, dtype, shortest)
    grad = torch.randn(texts, dim, generator=torch.Generator().manual_seed(1)).to(dtype).to(room.device)
    return peers.Batch(
        packed=[rows.detach().requires_grad_(gradient) for rows in packed],
        padded=[rows.detach().requires_grad_(gradient) for rows in padded],
        mask=mask,
        lengths=mask.sum(1),
        grad=grad,
    )


# ---- answers ----


def _close_to(expected: Tensor, scale: float, dtype: torch.dtype, roundings: int) -> Callable[[Tensor], None]:
    """Errors of at most so many roundings of the largest value that the expression takes over absolute values."""
    allowed = roundings * torch.finfo(dtype).eps * scale

    def verify(answer: Tensor) -> None:
        assert answer.shape == expected.shape, f"shape {tuple(answer.shape)}, expected {tuple(expected.shape)}"
        worst = float((answer.double() - expected).abs().max())
        assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"

    return verify


def _definition(batch: peers.Batch, mode: str, normalize: bool) -> Callable[[Tensor], Tensor]:
    return lambda rows: ek.segment_pool(rows, batch.cu_seqlens, mode, normalize=normalize, backend="reference")


def _texts(batch: peers.Batch, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows of each text."""
    return rows.split(batch.lengths.tolist())


def _gradient(rows: Tensor, grad: Tensor, mode: str, normalize: bool) -> Tensor:
    """By the definition, for one text: the reference's gradient of a whole batch takes minutes."""
    rows = rows.clone().requires_grad_()
    offsets = torch.tensor([0, len(rows)], dtype=torch.int32, device=rows.device)
    pooled = ek.segment_pool(rows, offsets, mode, normalize=normalize, backend="reference")
    return torch.autograd.grad(pooled, rows, grad.double().unsqueeze(0))[0]


def _verifiers(batch: peers.Batch, mode: str, normalize: bool, gradient: bool) -> dict[str, Callable[[Tensor], None]]:
    """For packed and for padded answers; in forward both give the pooled vectors, in backward their rows' gradient."""
    dtype, pool = batch.packed[0].dtype, _definition(batch, mode, normalize)
    rows = batch.packed[0].detach().double()
    if not gradient:
        scale = float(_definition(batch, mode, False)(rows.abs()).max()) if not normalize else 1.0
        verify = _close_to(pool(rows), scale, dtype, roundings=8)
        return {"packed": verify, "padded": verify}
    expected = torch.cat(
        [_gradient(*pair, mode, normalize) for pair in zip(_texts(batch, rows), batch.grad, strict=True)]
    )
    padded = torch.zeros(*batch.mask.shape, rows.shape[1], dtype=torch.float64, device=rows.device)
    padded[batch.mask] = expected
    scale = float(expected.abs().max())
    return {
        "packed": _close_to(expected, scale, dtype, roundings=8),
        "padded": _close_to(padded, scale, dtype, roundings=8),
    }


# ---- segment_pool ----


def _build_pool(
    texts: int, dim: int, dtype: torch.dtype, mode: str, normalize: bool, gradient: bool, shortest: int,
    names: tuple[str, ...], room: Room,
) -> list[Contender]:  # fmt: skip
    batch = _batch(room, texts, dim, dtype, shortest, gradient)
    verify = _verifiers(batch, mode, normalize, gradient)

    def pool(rows: Tensor) -> Tensor:
        return ek.segment_pool(rows, batch.cu_seqlens, mode, normalize=normalize)

    ours = Contender(OURS, peers.over(batch.packed, pool, batch.grad, gradient), verify["packed"], role="ours")
    found = [peers.MAKERS[name](batch, mode, normalize, gradient, verify) for name in names]
    bandwidth = ceilings.copy(room) if gradient else ceilings.read(room)
    return [ours, *(contender for contender in found if contender is not None), bandwidth]


def _pool_case(
    texts: int,
    dim: int,
    dtype: torch.dtype,
    *names: str,
    mode: str = "mean",
    normalize: bool = False,
    gradient: bool = False,
    shortest: int = _SHORTEST,
    targets: Mapping[str, float] | None = None,
    quick: bool = False,
) -> Case:
    names = (peers.PADDED, *names)
    kind = str(dtype).removeprefix("torch.")
    size = int(_lengths(texts, shortest).sum()) * dim
    read = texts * dim if mode == "last" else size
    reads_again = gradient and (mode == "max" or normalize)  # the gradient needs the rows themselves
    moved = read + texts * dim + gradient * (size + texts * dim) + reads_again * read
    parameters = {
        "texts": texts, "lengths": f"{shortest} to {_LONGEST}", "dim": dim, "dtype": kind, "mode": mode,
        "normalize": normalize, "pass": "forward and backward" if gradient else "forward", "memory": "cold",
    }  # fmt: skip
    extras = [*(["normalised"] if normalize else []), *([f"lengths ≥ {shortest}"] if shortest > _SHORTEST else [])]
    title = f"{mode} {texts} × {dim} {kind} " + ("forward+backward" if gradient else "forward")
    return Case(
        "segment_pool",
        ", ".join([title, *extras]),
        parameters,
        names,
        partial(_build_pool, texts, dim, dtype, mode, normalize, gradient, shortest, names),
        Work(moved * dtype.itemsize, read + gradient * size, _ADDS),
        {peers.PADDED: 3.0} if targets is None else targets,
        quick=quick,
    )


# ---- segment_pool_pack_bits ----


def _build_pool_bits(texts: int, dim: int, dtype: torch.dtype, names: tuple[str, ...], room: Room) -> list[Contender]:
    batch = _batch(room, texts, dim, dtype, _SHORTEST, False)
    pooled = _definition(batch, "mean", False)(batch.packed[0].double())
    certain = (pooled.abs() > 1e-5).cpu().numpy()  # the sign of a smaller mean is a matter of rounding
    expected = (pooled > 0).cpu().numpy()

    def verify(answer: Any) -> None:
        packed = np.asarray(answer.cpu() if isinstance(answer, Tensor) else answer)
        bits = np.unpackbits(packed, axis=1)[:, : expected.shape[1]].astype(bool)
        wrong = int(((bits != expected) & certain).sum())
        assert wrong == 0, f"{wrong} of {bits.size} bits are wrong"

    def call(turn: int) -> Tensor:
        return ek.segment_pool_pack_bits(batch.row(turn), batch.cu_seqlens)

    ours = Contender(OURS, call, verify, role="ours")
    found = [peers.BIT_MAKERS[name](batch, verify) for name in names]
    return [ours, *(contender for contender in found if contender is not None), ceilings.read(room)]


def _pool_bits_case(texts: int, dim: int, dtype: torch.dtype, quick: bool = False) -> Case:
    names = (peers.PADDED_QUANTIZE, peers.FLAT_QUANTIZE, peers.TWO_OPS)
    kind = str(dtype).removeprefix("torch.")
    size = int(_lengths(texts).sum()) * dim
    return Case(
        "segment_pool_pack_bits",
        f"mean {texts} × {dim} {kind}",
        {"texts": texts, "lengths": f"{_SHORTEST} to {_LONGEST}", "dim": dim, "dtype": kind, "memory": "cold"},
        names,
        partial(_build_pool_bits, texts, dim, dtype, names),
        Work(size * dtype.itemsize + texts * dim // 8, size, _ADDS),
        quick=quick,
    )


# ---- pack_padded, unpack_padded ----


def _build_moves(
    op: str, texts: int, dim: int, dtype: torch.dtype, names: tuple[str, ...], room: Room
) -> list[Contender]:
    batch = _batch(room, texts, dim, dtype, _SHORTEST, False)
    expected = batch.packed[0]
    if op == "unpack_padded":
        expected = torch.zeros_like(batch.padded[0])
        expected[batch.mask] = batch.packed[0]

    def verify(answer: Tensor) -> None:
        assert torch.equal(answer, expected), "rows are not where they belong"

    def pack(turn: int) -> Tensor:
        return ek.pack_padded(batch.padding(turn), batch.mask, batch.total)

    def unpack(turn: int) -> Tensor:
        return ek.unpack_padded(batch.row(turn), batch.mask)

    ours = Contender(OURS, pack if op == "pack_padded" else unpack, verify, role="ours")
    return [ours, *(peers.MOVE_MAKERS[op][name](batch, verify) for name in names), ceilings.copy(room)]


def _moves_case(op: str, texts: int, dim: int, dtype: torch.dtype, quick: bool = False) -> Case:
    names = tuple(peers.MOVE_MAKERS[op])
    kind = str(dtype).removeprefix("torch.")
    lengths = _lengths(texts)
    rows = int(lengths.sum())
    written = rows if op == "pack_padded" else texts * int(lengths.max())
    return Case(
        op,
        f"{texts} × {dim} {kind}",
        {"texts": texts, "lengths": f"{_SHORTEST} to {_LONGEST}", "dim": dim, "dtype": kind, "memory": "cold"},
        names,
        partial(_build_moves, op, texts, dim, dtype, names),
        Work((rows + written) * dim * dtype.itemsize, 0, ""),
        quick=quick,
    )


# ---- the same at each level of instruction set, on inputs that stay in the caches ----


def _level_pool(mode: str, dtype: torch.dtype, quick: bool = False) -> Case:
    texts, dim = 8, 384

    def build(room: Room) -> list[Contender]:
        small = Room(room.device, room.threads, room.quick, cold_bytes=1)
        return _build_pool(texts, dim, dtype, mode, False, False, _SHORTEST, (), small)

    kind = str(dtype).removeprefix("torch.")
    size = int(_lengths(texts).sum()) * dim
    title = f"levels: {mode} {texts} × {dim} {kind}"
    work = Work(size * dtype.itemsize, size, _ADDS)
    return Case("segment_pool", title, {"memory": "in cache"}, (), build, work, quick=quick, levels=True)


_F32, _BF16 = torch.float32, torch.bfloat16
_ALL_FORWARD = (peers.FLAT, peers.INDEX_ADD, peers.EMBEDDING_BAG)
_MOST = (peers.FLAT, peers.INDEX_ADD)
_NO_TARGET: dict[str, float] = {}

# cases that share a batch stand together
BENCHMARKS: dict[str, list[Case]] = {
    "segment_pool": [
        _pool_case(64, 384, _F32, *_ALL_FORWARD, peers.SEGMENT_REDUCE, peers.NESTED, quick=True),
        _pool_case(64, 384, _F32, *_MOST, normalize=True),
        _pool_case(64, 384, _F32, peers.FLAT, mode="max"),
        _pool_case(64, 384, _F32, peers.FLAT, mode="last"),
        _pool_case(64, 384, _F32, *_MOST, gradient=True, quick=True),
        _pool_case(64, 384, _F32, *_MOST, normalize=True, gradient=True),
        _pool_case(64, 384, _F32, peers.FLAT, mode="max", gradient=True),
        _pool_case(64, 384, _F32, peers.FLAT, mode="last", gradient=True),
        _pool_case(64, 384, _BF16, *_ALL_FORWARD),
        _pool_case(64, 384, _BF16, *_MOST, gradient=True),
        _pool_case(64, 1024, _F32, *_ALL_FORWARD, peers.COMPILED),
        _pool_case(64, 1024, _BF16, *_MOST, normalize=True),
        _pool_case(64, 1024, _BF16, peers.FLAT, mode="max"),
        _pool_case(64, 1024, _BF16, *_MOST, gradient=True),
        _pool_case(512, 384, _F32, *_ALL_FORWARD),
        _pool_case(512, 384, _F32, *_MOST, gradient=True),
        _pool_case(512, 1024, _BF16, *_MOST),
        _pool_case(512, 1024, _BF16, *_MOST, gradient=True),
        _pool_case(64, 384, _F32, *_MOST, shortest=224, targets=_NO_TARGET),
        _level_pool("mean", _F32, quick=True),
        _level_pool("mean", _BF16),
        _level_pool("max", _F32),
    ],
    "segment_pool_pack_bits": [
        _pool_bits_case(64, 384, _F32, quick=True),
        _pool_bits_case(64, 1024, _BF16),
    ],
    "pack_padded": [_moves_case("pack_padded", 64, 384, _F32, quick=True), _moves_case("pack_padded", 64, 1024, _BF16)],
    "unpack_padded": [
        _moves_case("unpack_padded", 64, 384, _F32, quick=True),
        _moves_case("unpack_padded", 64, 1024, _BF16),
    ],
}
