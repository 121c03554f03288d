"""Searches of half a gigabyte of codes: not part of an ordinary run, since FAISS takes seconds a call.

``python bench/run.py --family hamming_large``
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

import embedding_kernels as ek

from . import ceilings, hamming
from . import hamming_peers as peers
from .harness import OURS, Case, Contender, Room, Work

_BYTES = 512 << 20
_ROOT = Path(__file__).resolve().parent.parent

READ = "reading as many bytes"
SCAN = "the same search without selection"


@cache
def _library() -> Any | None:
    """`hamming_scan.cpp`, built in the newest build folder of this tree; None where there is none."""
    folders = [path.parent for path in (_ROOT / "build").glob("cmake-*/CMakeCache.txt") if "sanitize" not in str(path)]
    # pip puts it beside this interpreter
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not folders or cmake is None:
        return None
    folder = max(folders, key=lambda path: path.stat().st_mtime)
    subprocess.run([cmake, "--build", folder, "--target", "hamming_scan"], check=True, capture_output=True)
    return ctypes.CDLL(str(next(folder.glob("libhamming_scan.*"))))


def _scan(corpus: peers.Corpus, room: Room) -> Contender | None:
    library = _library()
    if library is None:
        return None

    def run(turn: int) -> None:
        queries, codes = corpus.query(turn), corpus.code(turn)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (queries, codes)]
        sizes = map(ctypes.c_int64, (*codes.shape, room.threads))
        library.hamming_scan(pointers[0], ctypes.c_int64(len(queries)), pointers[1], *sizes)

    return Contender(SCAN, run, note="bench/hamming_scan.cpp; it gives no answer that could be checked")


def _build(bits: int, queries: int, k: int, room: Room) -> list[Contender]:
    corpus = hamming.make_corpus(room, _BYTES // (bits // 8), bits, queries, cold=False)
    distances, indices = peers.exact_topk(corpus, k)

    def verify(answer: tuple[Tensor, Tensor]) -> None:
        hamming.asserting_equal(distances, "distances")(answer[0])
        hamming.asserting_equal(indices, "indices")(answer[1])

    ours = Contender(OURS, lambda turn: ek.hamming_topk(corpus.query(turn), corpus.code(turn), k), verify, role="ours")
    read = ceilings.read(room, _BYTES)
    others: list[Callable[[], Contender | None]] = [
        peers.topk_makers(corpus, k, verify, verify)[peers.FAISS],
        lambda: Contender(READ, read.call, note=read.note) if queries == 1 else None,
        lambda: _scan(corpus, room),
    ]
    made = [make() for make in others]
    return [ours, *[contender for contender in made if contender is not None], ceilings.read(room)]


def _case(bits: int, queries: int, k: int) -> Case:
    count = _BYTES // (bits // 8)
    names = (peers.FAISS, READ, SCAN) if queries == 1 else (peers.FAISS, SCAN)
    many = 2.0 if bits <= 256 else 2.5 if bits <= 384 else 3.5
    one = {384: 2.4, 768: 1.4, 1024: 1.4}.get(bits, 1.0)
    targets = {peers.FAISS: one if queries == 1 else many}
    if k == 100:
        targets[SCAN] = 1 / 1.15
    if queries == 1 and bits >= 384:
        targets[READ] = 0.85
    return Case(
        "hamming_topk",
        f"{queries} of 512 MiB, {bits} bits, k={k}",
        {"queries": queries, "codes": count, "bits": bits, "k": k, "memory": "cold" if queries == 1 else "as it comes"},
        names,
        partial(_build, bits, queries, k),
        Work((count + queries) * bits // 8 + 12 * queries * k, queries * count * bits, "bits compared"),
        targets,
    )


BENCHMARKS: dict[str, list[Case]] = {
    "hamming_topk": [
        *[_case(bits, queries, 100) for bits in (1024, 768, 384, 256, 128) for queries in (1, 32)],
        *[_case(bits, 256, 100) for bits in (1024, 768, 384)],
        _case(1024, 32, 10_000),
    ],
}
