"""Attention at sizes of a GPU: ragged texts as embedders meet them, T5's bias, dense batches as others publish them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import attention_gpu_peers as peers
from . import ceilings
from .attention_peers import Texts, ours
from .attention_truth import verifier
from .harness import OURS, Case, Contender, Room, Work, copies, prepared
from .within import other_roads

_DTYPE = torch.bfloat16
_REACH = 91  # R of T5's table for encoders
_SM_80, _HOPPER = "ours, kernels of sm_80", "ours, Hopper's kernels throughout"


@dataclass(frozen=True)
class Batch:
    """Texts of ``shortest`` to ``longest`` tokens, drawn evenly or, as sentences are, with many short ones."""

    kind: str
    texts: int
    shortest: int
    longest: int
    heads: int
    dim: int
    skewed: bool = False
    bias: bool = False

    def lengths(self) -> Tensor:
        """The same in every run; skewed ones have a mean of about 80, where they may reach 512."""
        seeded = torch.Generator().manual_seed(self.texts)
        if self.skewed:
            drawn = (torch.randn(self.texts, generator=seeded) * 0.65).exp() * 65
            return drawn.long().clamp(self.shortest, self.longest)
        return torch.randint(self.shortest, self.longest + 1, (self.texts,), generator=seeded)

    def small(self) -> Batch:
        """For a processor: a few texts, of two heads, some longer than the table reaches."""
        longest = min(self.longest, 200)
        shortest = longest if self.shortest == self.longest else min(self.shortest, 16)
        return replace(self, texts=min(self.texts, 6), shortest=shortest, longest=longest, heads=2)


@lru_cache(maxsize=1)
def _rows(room: Room, batch: Batch) -> list[Tensor]:
    """Rotating copies of the rows; cases that follow each other share them."""
    seeded = torch.Generator(room.device).manual_seed(0)
    shape = (int(batch.lengths().sum()), 3, batch.heads, batch.dim)
    fused = torch.randn(shape, generator=seeded, device=room.device, dtype=_DTYPE)
    # a quarter of what others rotate through: still five times the cache
    return copies(fused, replace(room, cold_bytes=room.cold_bytes // 4))


def _build(batch: Batch, gradient: bool, names: tuple[str, ...], room: Room) -> list[Contender]:
    rows = _rows(room, batch)
    seeded = torch.Generator(room.device).manual_seed(1)
    grad = torch.randn(rows[0][:, 0].shape, generator=seeded, device=room.device, dtype=_DTYPE)
    table = None
    if batch.bias:
        table = torch.randn(batch.heads, 2 * _REACH + 1, generator=seeded, device=room.device)
    texts = Texts(rows, batch.lengths().to(room.device), grad, table, gradient)
    verify = verifier(texts)
    mine = Contender(OURS, ours(texts), verify, role="ours")
    chosen = {name: make for name, make in peers.MAKERS.items() if name in names}
    found = [prepared(name, partial(make, texts, verify)) for name, make in chosen.items()]
    others = [contender for contender in found if contender is not None]
    return [mine, *other_roads(mine, names, room), *others, ceilings.matmul(room, _DTYPE)]


def _made(batch: Batch, gradient: bool, names: tuple[str, ...]) -> Case:
    lengths = batch.lengths()
    width = batch.heads * batch.dim
    row_bytes = int(lengths.sum()) * width * _DTYPE.itemsize
    # two products forward; five backward, scores again among them
    operations = (14 if gradient else 4) * int((lengths**2).sum()) * width
    even = batch.shortest == batch.longest
    spread = f"{batch.longest}" if even else f"{batch.shortest} to {batch.longest}"
    parameters = {
        "texts": batch.texts, "lengths": spread, "mean length": round(float(lengths.float().mean()), 1),
        "heads": batch.heads, "head_dim": batch.dim, "dtype": "bfloat16",
        "bias": f"table, R = {_REACH}" if batch.bias else "none",
        "pass": "forward and backward" if gradient else "forward",
    }  # fmt: skip
    return Case(
        "varlen_attention",
        f"{batch.kind} {batch.texts} × {spread}, {batch.heads} × {batch.dim}" + " forward+backward" * gradient,
        parameters,
        names,
        partial(_build, batch, gradient, names),
        Work((12 if gradient else 4) * row_bytes, operations, "bfloat16 operations"),
    )


def _case(batch: Batch, gradient: bool, *names: str) -> Case:
    # where a peer takes tens of milliseconds, or several do
    patience = 2.0 if gradient or batch.texts > 1000 else 1.0
    small = _made(batch.small(), gradient, names)
    return replace(_made(batch, gradient, names), where="cuda", small=small, patience=patience)


_PACKED = (_SM_80, peers.VARLEN)  # of 4,096 texts: padded ones would be six times as large as packed
_PADDED = (*_PACKED, peers.EFFICIENT, peers.CUDNN)
_RAGGED = (*_PADDED, peers.BUCKETS, peers.FLEX)
_SHORT = (_HOPPER, peers.VARLEN, peers.EFFICIENT, peers.CUDNN)
_BIASED = (_SM_80, peers.WITHOUT_BIAS, peers.FLEX, peers.EFFICIENT, peers.CUDNN)
_DENSE = (_SM_80, peers.FLASH, peers.CUDNN, peers.EFFICIENT, peers.VARLEN)


def _ragged(texts: int) -> Batch:
    return Batch("ragged", texts, 16, 512, 12, 64, skewed=True)


def _dense(tokens: int, heads: int, dim: int) -> Batch:
    return Batch("dense", 16384 // tokens, tokens, tokens, heads, dim)


_T5 = Batch("T5 bias", 64, 256, 1024, 12, 64, bias=True)
_TO_128 = Batch("ragged", 512, 16, 128, 12, 64, skewed=True)
_FIRST = [_dense(tokens, heads, dim) for heads, dim in ((32, 64), (16, 128)) for tokens in (2048, 16384)]
_REST = [_dense(tokens, heads, dim) for heads, dim in ((32, 64), (16, 128)) for tokens in (4096, 8192)]

#: by importance: where time ends, the rest is left; cases that share a batch stand together
CASES: list[Case] = [
    _case(_ragged(512), False, *_RAGGED),
    _case(_ragged(512), True, *_RAGGED),
    _case(_T5, False, *_BIASED),
    _case(_T5, True, *_BIASED),
    *(_case(batch, gradient, *_DENSE) for batch in _FIRST for gradient in (False, True)),
    _case(_TO_128, False, *_SHORT),
    _case(_TO_128, True, *_SHORT),
    _case(_ragged(4096), False, *_PACKED, peers.FLEX),
    _case(_ragged(4096), True, *_PACKED),
    _case(_ragged(64), False, *_PADDED, peers.BUCKETS),
    _case(_ragged(64), True, *_PADDED, peers.BUCKETS),
    *(_case(batch, gradient, *_DENSE) for batch in _REST for gradient in (False, True)),
]
