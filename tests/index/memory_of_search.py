"""Builds an index of many codes by adding and saving in turns, or searches it; prints what memory that took, as JSON.

python memory_of_search.py build|search|compact DIRECTORY ROWS
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embedding_kernels import BinaryIndex

DIM, PART = 384, 1_000_000


def memory() -> tuple[int, int]:
    """Private and resident MiB of this process now."""
    lines = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/self/smaps_rollup").read_text()))
    return (int(lines["Private_Clean"]) + int(lines["Private_Dirty"])) // 1024, int(lines["Rss"]) // 1024


def measured(work: Callable[[], Any]) -> dict[str, int]:
    """The most memory that ``work`` held at once, above what was held before, and what it left."""
    before, samples, done = memory(), [], threading.Event()

    def sample() -> None:
        while not done.wait(0.003):
            samples.append(memory())

    thread = threading.Thread(target=sample)
    thread.start()
    work()
    done.set()
    thread.join()
    after = memory()
    return {
        "before": before[0],
        "private": max(s[0] for s in samples) - before[0],
        "resident": max(s[1] for s in samples) - before[1],
        "left": after[0] - before[0],
        "samples": len(samples),
    }


def codes_of(part: int) -> np.ndarray:
    return np.random.default_rng(part).integers(0, 256, (PART, DIM // 8), dtype=np.uint8)


def build(path: Path, rows: int) -> None:
    index = BinaryIndex(DIM)
    for part in range(rows // PART):
        index.add(codes_of(part))
        index.save(path)


def search(path: Path, rows: int, queries: np.ndarray, compact: bool) -> None:
    index = BinaryIndex.load(path, verify=False)
    distances, ids = index.search(queries, 10)
    assert (distances[:, 0] == 0).all()
    assert ids[:, 0].tolist() == [0] * 8 + [rows - 1] * 8
    floats = np.unpackbits(queries, axis=1).astype(np.float32) - 0.5
    assert (index.search(floats, 10, rescore_multiplier=4)[1][:, 0] == ids[:, 0]).all()
    assert index.range_search(queries, 1)[2].tolist() == ids[:, 0].tolist()
    if compact:
        index.compact()
        index.save(path)
        assert (BinaryIndex.load(path, verify=True).search(queries, 10)[1] == ids).all()


def main(task: str, path: Path, rows: int) -> None:
    warm = BinaryIndex(DIM)
    warm.add(codes_of(0)[:100_000])
    warm.search(codes_of(1)[:16], 10)  # starts the threads
    del warm
    if task == "build":
        print(json.dumps(measured(lambda: build(path, rows))))
        return
    queries = np.concatenate([codes_of(0)[:1], codes_of(rows // PART - 1)[-1:]]).repeat(8, axis=0)
    print(json.dumps(measured(lambda: search(path, rows, queries, task == "compact"))))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
