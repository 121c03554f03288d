"""Every single step on the disk fails in turn: what loads is a completed state, and trying again succeeds."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_model import Model, vectors_of

from embedding_kernels import BinaryIndex
from embedding_kernels.index import storage

DIM = 24
STEPS = ("create", "write", "flush", "replace", "unlink", "make_directory")
State = tuple[bytes, ...]


class Faults:
    """Lets the n-th step on the disk fail, and counts steps."""

    def __init__(self, flavour: str) -> None:
        self.flavour = flavour
        self.count, self.at, self.happened = 0, -1, False

    def wrapped(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*arguments: Any) -> Any:
            self.count += 1
            if self.at < 0 or self.count < self.at or (self.count > self.at and self.flavour != "from then on"):
                return step(*arguments)
            self.happened = True
            if self.flavour == "disk full" and name == "write":
                descriptor, data = arguments
                step(descriptor, data[: len(data) // 2])
            if self.flavour == "done, but an error":
                step(*arguments)
            if self.flavour == "interrupt":
                raise KeyboardInterrupt
            raise OSError(errno.ENOSPC, "No space left on device")

        return faulty

    def heal(self) -> None:
        self.at = -1


def state_of(index: BinaryIndex) -> State:
    """All that an index holds."""
    snapshot = index._snapshot
    columns = [index.ids.tobytes(), index.codes.numpy().tobytes(), str(snapshot.next_id).encode()]
    for part in snapshot.segments:
        columns += [block.numpy().tobytes() for block in part.blocks("vectors", every=False)]
    return (*columns[:3], b"".join(columns[3:]), b"" if snapshot.scale is None else snapshot.scale.numpy().tobytes())


def loaded_state(path: Path) -> State | None:
    """What the directory holds; None where no save has been completed in it."""
    if not (path / "manifest.json").exists():
        return None
    return state_of(BinaryIndex.load(path))


def scenario(index: BinaryIndex, path: Path) -> list[tuple[str, Callable[[], Any]]]:
    """What is done, in order."""

    def add(seed: int, ids: Any = None) -> Callable[[], Any]:
        return lambda: index.add(vectors_of(20, DIM, seed), ids)

    def save() -> None:
        index.save(path)

    return [
        ("add", add(1)),
        ("save", save),
        ("add", add(2, np.arange(20)[::-1] + 100)),
        ("remove", lambda: index.remove_ids([3, 4, 107])),
        ("save", save),
        ("compact", index.compact),
        ("save", save),
        ("add", add(3)),
        ("remove", lambda: index.remove_ids([8])),
        ("save", save),
    ]


def run(path: Path, faults: Faults) -> list[str]:
    """Do the scenario; after a fault look at what is left, and try again. The names of the steps that failed."""
    index = BinaryIndex(DIM, rescore_vectors="int8")
    completed: State | None = None
    failed = []
    for name, step in scenario(index, path):
        before = state_of(index)
        try:
            step()
        except (OSError, KeyboardInterrupt):
            failed.append(name)
            faults.heal()
            assert state_of(index) == before, f"{name} failed and changed the index"
            allowed = (completed, before) if name == "save" else (completed,)
            assert loaded_state(path) in allowed, f"{name} failed and left a mixture"
            step()
        if faults.happened:
            faults.heal()
        if name == "save":
            assert state_of(index) == before
            completed = before
        assert loaded_state(path) == completed
    faults.heal()
    index.save(path)
    assert len(list(path.glob("segment-*"))) == len(index._snapshot.segments), "nothing is left behind"
    assert not list(path.glob("*.partial"))
    return failed


@pytest.mark.parametrize(
    "flavour", ["error", "disk full", "done, but an error", "interrupt", "from then on"], ids=lambda text: text
)
def test_every_step_fails_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str) -> None:
    faults = Faults(flavour)
    monkeypatch.setattr(storage, "flush", lambda descriptor: None)  # waiting for the disk proves nothing here
    for name in STEPS:
        monkeypatch.setattr(storage, name, faults.wrapped(name, getattr(storage, name)))
    assert run(tmp_path / "whole", faults) == []
    failures = []
    for n in itertools.count(1):
        faults.count, faults.at, faults.happened = 0, n, False
        failures += run(tmp_path / str(n), faults)
        if not faults.happened:
            break
    print(f"{flavour}: {n - 1} steps failed in turn, {len(failures)} calls raised")
    assert n > 60
    assert {"save", "compact"} == set(failures)
    # only a file that cannot be deleted after the save is no error
    assert len(failures) > (n - 1) * (1 if flavour == "interrupt" else 0.8) - 1


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = storage.write, []

    def short(descriptor: int, data: memoryview) -> int:
        calls.append(1)
        return write(descriptor, data[: max(1, len(data) // 3)])

    monkeypatch.setattr(storage, "write", short)
    assert run(tmp_path / "index", Faults("error")) == []
    assert len(calls) > 100


def test_what_could_not_be_deleted_is_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index, model = BinaryIndex(DIM), Model(DIM)
    for seed in (1, 2):
        index.add(vectors_of(20, DIM, seed))
        model.add(vectors_of(20, DIM, seed))
        index.save(tmp_path / "index")

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    index.compact()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "unlink", refuse)
        index.save(tmp_path / "index")
    assert "is left to the next save" in caplog.text
    assert len(list((tmp_path / "index").glob("segment-*"))) == 3
    index.save(tmp_path / "index")
    assert len(list((tmp_path / "index").glob("segment-*"))) == 1
    model.check(BinaryIndex.load(tmp_path / "index"), vectors_of(5, DIM))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")
def test_what_a_power_cut_would_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest takes its place when all files it names, and their entries, are on the disk; files are deleted when
    the manifest is."""
    events: list[tuple[str, str]] = []

    def recorded(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            result = step(*arguments)
            if name in ("write", "flush"):
                events.append((name, os.path.basename(os.path.realpath(f"/proc/self/fd/{arguments[0]}"))))
            else:
                events.append((name, arguments[-1].name))
            return result

        return record

    for name in STEPS:
        monkeypatch.setattr(storage, name, recorded(name, getattr(storage, name)))
    index = BinaryIndex(DIM, rescore_vectors="int8")
    saves = 0
    for name, step in scenario(index, tmp_path / "index"):
        events.clear()
        step()
        if name != "save":
            continue
        saves += 1
        moved = events.index(("replace", "manifest.json"))
        before, after = events[:moved], events[moved + 1 :]
        made = [path for kind, path in before if kind == "create"]
        assert len(made) > 1
        for path in made:
            last_write = max(place for place, event in enumerate(before) if event == ("write", path))
            assert ("flush", path) in before[last_write:], f"{path} is flushed after its last write"
        named = [path for path in made if not path.endswith(".partial")]
        last = max(before.index(("flush", path)) for path in named)
        assert ("flush", "index") in before[last:], "the directory is flushed when it has all entries"
        assert after[0] == ("flush", "index"), "and again before anything is deleted"
        assert all(kind == "unlink" for kind, _ in after[1:])
    assert saves == 4
