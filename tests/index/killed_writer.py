"""Kills a writer many times at random moments and looks at what it left. Prints one line of JSON.

The writers are forked from this process, which therefore uses one thread only; a fork is a millisecond where a new
process would be seconds.

    python killed_writer.py DIRECTORY KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from index_model import Model, vectors_of

from embedding_kernels import BinaryIndex
from embedding_kernels.index import storage

DIM = 64
LONGEST = {True: 0.25, False: 0.04}  # seconds a writer lives after it has begun, with and without waiting for the disk
ROUNDS = 8  # then the rows are removed, so that the index stays small


def changed(target: BinaryIndex | Model, step: int) -> None:
    """The change number ``step``, the same for an index and its model; what it does follows from the number."""
    codes = vectors_of(50, DIM, step)
    ids = np.random.default_rng(step).permutation(50) + step * 100 if step % 2 else None
    if isinstance(target, Model):
        target.add(codes, ids)
        target.remove(np.arange(step * 37 % 200))
        if step % ROUNDS == 0:
            target.remove(target.ids[:-20])
    else:
        target.add(np.packbits(codes > 0, axis=1), ids)
        target.remove_ids(np.arange(step * 37 % 200))
        if step % ROUNDS == 0:
            target.remove_ids(target.ids[:-20])
        if step % 3 == 0:
            target.compact()


def write_until_killed(path: Path, step: int, report: int, waits: bool) -> None:
    """Change and save for ever, from the state after ``step`` changes; report each save that is complete."""
    if not waits:  # most of the time is spent in flush, so the other steps are met more often without
        storage.flush = lambda descriptor: None  # type: ignore[assignment]
    index = BinaryIndex.load(path, verify=False) if step else BinaryIndex(DIM)
    os.write(report, b"ready\n")
    while True:
        step += 1
        changed(index, step)
        index.save(path)
        os.write(report, f"{step}\n".encode())


def killed_once(path: Path, step: int, delay: float, waits: bool) -> int:
    """Let a writer go on from ``step`` and kill it; the last step that it reported."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            write_until_killed(path, step, writing, waits)
        finally:
            os._exit(1)  # only an error comes here
    os.close(writing)
    with os.fdopen(reading) as lines:
        assert lines.readline() == "ready\n"
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the writer failed before it was killed"
        return max([step, *map(int, lines.read().split())])


def main(path: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    model, step = Model(DIM), 0
    result = {"kills": 0, "saves": 0, "kept": 0, "in flight": 0, "left behind": 0}
    for number in range(kills):
        waits = number % 2 == 0
        last = killed_once(path, step, draw.uniform(0, LONGEST[waits]), waits)
        result["kills"] += 1
        result["saves"] += last - step
        for done in range(step + 1, last + 1):
            changed(model, done)
        step = last
        if not (path / "manifest.json").exists():
            assert step == 0, "a completed save is gone"
            continue
        loaded = BinaryIndex.load(path, verify=True)
        named = sum(1 + (part.alive is not None) for part in loaded._snapshot.segments)
        result["left behind"] += len([name for name in os.listdir(path) if "-" in name]) > named
        if loaded._snapshot.next_id != model.next_id or not same(loaded, model):
            changed(model, step + 1)
            step += 1
            result["in flight"] += 1
        else:
            result["kept"] += 1
        assert same(loaded, model), f"neither the state after {step - 1} changes nor after {step}"
    print(json.dumps(result))


def same(index: BinaryIndex, model: Model) -> bool:
    return (
        index._snapshot.next_id == model.next_id
        and np.array_equal(index.ids, model.ids)
        and np.array_equal(index.codes.numpy(), model.codes())
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
