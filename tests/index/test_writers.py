"""Threads and processes: searches beside changes, two writers, readers beside a writer, and killed writers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_model import Model, compare, filled, vectors_of

from embedding_kernels import BinaryIndex
from embedding_kernels.index import directory as saved
from embedding_kernels.index import searching, storage

DIM = 64


def beside(work: Callable[[], None], reading: Callable[[], None], readers: int = 2) -> None:
    """Run ``work`` while threads repeat ``reading``; raises what any of them raises."""
    done, errors = threading.Event(), []

    def repeat() -> None:
        try:
            while not done.is_set():
                reading()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat) for _ in range(readers)]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def test_a_search_answers_for_the_state_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer that threads get is that of a state the index went through, whole."""
    monkeypatch.setattr(searching, "_BLOCK_BYTES", 64 * 8)
    monkeypatch.setattr(storage, "flush", lambda descriptor: None)
    queries = vectors_of(3, DIM, seed=99)
    index, model = BinaryIndex(DIM), Model(DIM)
    expected: set[bytes] = {b"".join(part.tobytes() for part in model.search(queries, 40))}
    answers: list[bytes] = []

    def work() -> None:
        for step in range(60):
            vectors = vectors_of(30, DIM, seed=step)
            model.add(vectors)
            expected.add(b"".join(part.tobytes() for part in model.search(queries, 40)))
            index.add(vectors)
            gone = np.arange(step * 29, step * 29 + 7)
            model.remove(gone)
            expected.add(b"".join(part.tobytes() for part in model.search(queries, 40)))
            index.remove_ids(gone)
            if step % 3 == 1:
                index.save(tmp_path / "index")
            if step % 7 == 2:
                index.compact()

    def reading() -> None:
        answers.append(b"".join(part.tobytes() for part in index.search(queries, 40)))

    beside(work, reading)
    assert set(answers) <= expected
    assert len(set(answers)) > 5, "the readers saw the index change"
    model.check(index, queries)


def test_a_search_that_has_begun_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All changes happen between the first block of a search and its second."""
    monkeypatch.setattr(searching, "_BLOCK_BYTES", 64 * 8)
    vectors, queries = vectors_of(500, DIM), vectors_of(3, DIM, seed=99)
    index, model = filled(vectors), Model(DIM)
    model.add(vectors)
    index.save(tmp_path / "index")
    index.remove_ids([450])
    model.remove(np.array([450]))
    real, calls = searching.hamming_topk, []

    def disturbed(*arguments: Any, **others: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            index.add(queries)
            index.remove_ids(range(0, 500, 2))
            index.compact()
            index.save(tmp_path / "index")
        return real(*arguments, **others)

    monkeypatch.setattr(searching, "hamming_topk", disturbed)
    got = index.search(queries, 20)
    compare(got, model.search(queries, 20))
    model.remove(np.arange(0, 500, 2))
    model.add(queries)
    model.check(index, queries)


def test_writers_of_one_index_exclude_each_other() -> None:
    index = BinaryIndex(DIM)
    vectors = vectors_of(20, DIM)

    def add() -> None:
        for _ in range(50):
            index.add(vectors)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(index.ids, np.arange(4 * 50 * 20))
    np.testing.assert_array_equal(index.codes.numpy(), np.tile(np.packbits(vectors > 0, axis=1), (200, 1)))


def test_the_second_writer_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "index"
    first = filled(vectors_of(20, DIM))
    first.save(path)
    second = BinaryIndex.load(path)
    first.add(vectors_of(5, DIM, seed=1))
    first.save(path)
    second.add(vectors_of(7, DIM, seed=2))
    message = "load it and repeat the changes, save to another path, or replace it"
    for other in (second, filled(vectors_of(3, DIM))):
        with pytest.raises(RuntimeError, match=message) as refusal:
            other.save(path)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert (len(BinaryIndex.load(path)), len(second)) == (25, 27)
    second.save(tmp_path / "another")
    assert len(BinaryIndex.load(tmp_path / "another")) == 27
    mended = BinaryIndex.load(path)
    mended.add(vectors_of(7, DIM, seed=2))
    mended.save(path)
    assert len(BinaryIndex.load(path)) == 32
    with pytest.raises(RuntimeError, match=message):
        first.save(path)


def test_another_index_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "index"
    first = BinaryIndex(rescore_vectors="int8")
    first.add(vectors_of(20, DIM))
    first.save(path)
    second = BinaryIndex(rescore_vectors="int8")
    second.add(3 * vectors_of(7, DIM, seed=1))
    with pytest.raises(RuntimeError, match="overwrite=True"):
        second.save(path)
    assert len(BinaryIndex.load(path)) == 20
    second.save(path, overwrite=True)
    loaded, queries = BinaryIndex.load(path), vectors_of(3, DIM, seed=99)
    compare(loaded.search(queries, 5, 2), second.search(queries, 5, 2))
    with pytest.raises(RuntimeError, match="not loaded from"):
        first.save(path)
    second.remove_ids([0])
    second.save(path)
    assert len(BinaryIndex.load(path)) == 6


_HOLDS_THE_LOCK = """
import sys
from pathlib import Path
from embedding_kernels.index import storage
with storage.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_writing_at_once(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = filled(vectors_of(20, DIM))
    index.save(path)
    index.add(vectors_of(5, DIM))
    command = [sys.executable, "-c", _HOLDS_THE_LOCK, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match=r"index is being written by another writer: wait for it"):
            index.save(path)
        assert len(BinaryIndex.load(path)) == 20, "reading needs no lock"
        other.stdin.write("\n")
    index.save(path)
    assert len(BinaryIndex.load(path)) == 25


def test_readers_go_on_while_a_writer_saves_and_compacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "flush", lambda descriptor: None)
    path, queries = tmp_path / "index", vectors_of(3, DIM, seed=99)
    writer = filled(vectors_of(200, DIM))
    writer.save(path)
    early = BinaryIndex.load(path)
    expected = early.search(queries, 10)
    loads: list[int] = []

    def work() -> None:
        for step in range(80):
            writer.add(vectors_of(50, DIM, seed=step))
            writer.remove_ids(writer.ids[:50])
            if step % 2:
                writer.compact()
            writer.save(path)

    def reading() -> None:
        loaded = BinaryIndex.load(path)
        assert loaded.ntotal == 200
        loads.append(int(loaded.ids[0]))

    beside(work, reading)
    assert len(set(loads)) > 5
    assert not {part.saved.name for part in early._snapshot.segments if part.saved} & set(os.listdir(path))
    compare(early.search(queries, 10), expected)


def test_a_loader_that_loses_the_race_reads_the_manifest_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    writer = filled(vectors_of(200, DIM))
    writer.save(path)
    real, races = saved.open_segment, []

    def overtaken(*arguments: Any) -> Any:
        if len(races) < 3:
            races.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(saved, "open_segment", real)
                writer.remove_ids([len(races)])
                writer.compact()
                writer.save(path)
        return real(*arguments)

    monkeypatch.setattr(saved, "open_segment", overtaken)
    assert len(BinaryIndex.load(path)) == 197
    assert len(races) == 3


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_hundred_killed_writers(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_writer.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "index"), "200", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    print(result)
    assert result["kills"] == 200
    assert result["saves"] > 100, "the writers had time to save"
    assert result["left behind"] > 10, "many were killed in the middle of a save"


def test_saved_elsewhere_and_back(tmp_path: Path) -> None:
    """An index may be saved to several directories in turns, and to each again."""
    index, queries = filled(vectors_of(20, DIM)), vectors_of(3, DIM, seed=99)
    model = Model(DIM)
    model.add(vectors_of(20, DIM))
    for step in range(6):
        vectors = vectors_of(4, DIM, seed=step)
        index.add(vectors)
        model.add(vectors)
        index.save(tmp_path / str(step % 2))
        model.check(BinaryIndex.load(tmp_path / str(step % 2)), queries)
    assert torch.equal(index.codes, BinaryIndex.load(tmp_path / "1").codes)
