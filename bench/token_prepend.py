"""More cases of the norm family: each text's last row copied over its first, alone and between addition and norm."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import embedding_kernels as ek

from . import ceilings
from .harness import OURS, Case, Contender, Room, Work, compiled
from .norm import Norm, drawn_rows, verifier

EAGER = "torch: index_put"
COMPILED = "torch.compile: index_put"
EAGER_NORM = "torch: add, index_put, then norm"
COMPILED_NORM = "torch.compile: add, index_put, then norm"
WITHOUT_COPIES = "ours without copies"

_TEXTS = 64
_EPS = 1e-6


def _texts(rows: int, room: Room) -> tuple[Tensor, Tensor]:
    """The last row of each text, and its first."""
    first = torch.arange(0, rows, rows // _TEXTS, device=room.device)
    return first + rows // _TEXTS - 1, first


# ---- whom it meets ----


def _copy(sources: Tensor, targets: Tensor, backend: str | None = None) -> Norm:
    return lambda hidden: (ek.token_prepend(hidden, sources, targets, backend=backend),)


def _copy_and_norm(sources: Tensor, targets: Tensor, backend: str | None = None) -> Norm:
    return lambda x, residual, weight: ek.token_prepend_rms_norm(
        x, residual, sources, targets, weight, eps=_EPS, backend=backend
    )


def _index_put(sources: Tensor, targets: Tensor) -> Norm:
    def run(hidden: Tensor) -> tuple[Tensor]:
        return (hidden.index_put((targets,), hidden[sources]),)

    return run


def _index_put_and_norm(sources: Tensor, targets: Tensor) -> Norm:
    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        summed = summed.index_put((targets,), summed[sources])
        return functional.rms_norm(summed, weight.shape, weight, _EPS), summed

    return run


# ---- cases ----


def _build(rows: int, dim: int, dtype: torch.dtype, gradient: bool, normed: bool, room: Room) -> list[Contender]:
    ours, theirs = (_copy_and_norm, _index_put_and_norm) if normed else (_copy, _index_put)
    names = (EAGER_NORM, COMPILED_NORM) if normed else (EAGER, COMPILED)
    sizes = {"inputs": 2, "vectors": 1} if normed else {"inputs": 1, "vectors": 0}
    inputs, texts = drawn_rows(room, (rows, dim), dtype, gradient, **sizes), _texts(rows, room)
    verify = verifier(ours(*texts, "reference"), inputs, gradient)
    contenders = [
        Contender(OURS, inputs.call(ours(*texts), gradient), verify, role="ours"),
        Contender(names[0], inputs.call(theirs(*texts), gradient), verify),
        Contender(names[1], inputs.call(compiled(theirs(*texts)), gradient), verify, note="compiled before timing"),
        ceilings.copy(room),
    ]
    if normed:
        # another answer; the cases of add_rms_norm check it
        alone = inputs.call(lambda x, residual, weight: ek.add_rms_norm(x, residual, weight, eps=_EPS), gradient)
        contenders.append(Contender(WITHOUT_COPIES, alone))
    return contenders


def _case(rows: int, dim: int, dtype: torch.dtype, gradient: bool, normed: bool) -> Case:
    kind, passes = str(dtype).removeprefix("torch."), "forward+backward" if gradient else "forward"
    peers = (EAGER_NORM, COMPILED_NORM) if normed else (EAGER, COMPILED)
    # tensors read and written: two forward and two backward; with the norm four and, as it reads the sum again, four
    moved = (2 if gradient else 1) * (4 if normed else 2) * rows * dim * dtype.itemsize
    shared = {"rows": rows, "dim": dim, "texts": _TEXTS, "dtype": kind, "pass": passes.replace("+", " and ")}
    return Case(
        "token_prepend_rms_norm" if normed else "token_prepend",
        f"{_TEXTS} texts of {rows} × {dim} {kind} {passes}",
        {**shared, "memory": "cold"},
        (*peers, WITHOUT_COPIES) if normed else peers,
        partial(_build, rows, dim, dtype, gradient, normed),
        Work(moved, rows * dim, "values normed" if normed else "values copied"),
        dict.fromkeys(peers, 1.0),
        quick=(dim, dtype) == (1024, torch.float32),
    )


def _cases(normed: bool) -> list[Case]:
    return [
        _case(rows, dim, dtype, gradient, normed)
        for rows, dim in ((4096, 1024), (2048, 4096))
        for dtype in (torch.float32, torch.bfloat16)
        for gradient in (False, True)
    ]


BENCHMARKS: dict[str, list[Case]] = {"token_prepend": _cases(False), "token_prepend_rms_norm": _cases(True)}
