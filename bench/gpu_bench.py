"""One family's benchmarks on a GPU, for `gpu.py`: every case of its own, written after each, whatever becomes of it.

Ours runs as the device chooses, which is CUDA C++ where the library has a kernel; beside it, where it has one, ours by
Triton, as one of the peers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file: its package is the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import embedding_kernels as ek
from bench import results
from bench.harness import OURS, Case, Contender, Protocol, Room, admit
from bench.run import cases_for, header, paced, time_case
from embedding_kernels.demo_data import MissingDemoPackageError
from embedding_kernels.ops._registry import OPERATORS, has_cuda_kernel

TRITON = "ours, Triton"
BROKEN_DEVICE = 3  # the exit code: an illegal access ends every later call of the process


class WithBackend(Contender):
    """A contender whose public functions run one backend; chosen outside what is timed."""

    def __init__(self, name: str, ours: Contender, backend: str) -> None:
        super().__init__(name, ours.call, ours.verify, work=ours.work, note=f"backend={backend!r}")
        self.backend = backend

    def timed(self, calls: int, turn: int, room: Room) -> float:
        with ek.use_backend(self.backend):
            return super().timed(calls, turn, room)

    def check(self) -> None:
        with ek.use_backend(self.backend):
            super().check()


def contenders(case: Case, room: Room) -> list[Contender]:
    """The case's own, and ours by Triton where CUDA C++ is what runs."""
    built = case.build(room)
    if room.device.type != "cuda" or case.op not in OPERATORS or not has_cuda_kernel(case.op):
        return built
    ours = next(contender for contender in built if contender.name == OURS)
    return [*built, WithBackend(TRITON, ours, "triton")]


class Record:
    """The family's result file: what was measured, what failed, what is not here, what time did not allow."""

    def __init__(self, path: Path, whole: dict[str, Any]) -> None:
        kept = results.read(path) if path.exists() else {}
        self.path, self.whole = path, whole
        for kind in ("cases", "failed", "absent"):
            whole[kind] = kept.get(kind, [])
        whole["left"] = []
        # a process that was ended within a case: the next goes on behind it
        if begun := kept.get("begun"):
            whole["failed"].append({**begun, "reason": "ended its process, or said nothing for long"})
        whole["wall_seconds"] = self._before = kept.get("wall_seconds", 0.0)
        self._started = time.monotonic()

    def has(self, case: Case) -> bool:
        known = (entry for kind in ("cases", "failed", "absent") for entry in self.whole[kind])
        return any((entry["op"], entry["title"]) == (case.op, case.title) for entry in known)

    def begin(self, case: Case) -> None:
        self.whole["begun"] = {"op": case.op, "title": case.title}
        self.write()

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        self.whole.pop("begun", None)
        self.whole[kind].append(entry)
        self.write()

    def write(self) -> None:
        self.whole["wall_seconds"] = round(self._before + time.monotonic() - self._started, 1)
        results.write(self.whole, self.path)


def _named(case: Case, reason: object) -> dict[str, Any]:
    return {"op": case.op, "title": case.title, "reason": str(reason)[:2000]}


def _works(room: Room) -> bool:
    try:
        if room.device.type == "cuda":
            torch.cuda.synchronize()
            torch.zeros(1, device=room.device).item()
    except RuntimeError:
        return False
    return True


def measure_all(cases: list[Case], room: Room, protocol: Protocol, seconds: float, record: Record) -> int:
    """An exit code: 0, or BROKEN_DEVICE where the rest wants another process."""
    deadline = time.monotonic() + seconds
    for place, case in enumerate(cases):
        if record.has(case):
            continue
        if time.monotonic() > deadline:
            record.add("left", _named(case, "no time"))
            continue
        record.begin(case)
        try:
            patient = replace(protocol, seconds=case.patience * protocol.seconds)
            shares = sum(other.patience for other in cases[place:]) / case.patience
            pace = paced(patient, deadline, shares, least=0.2 * case.patience)
            record.add("cases", time_case(case, contenders(case, room), room, pace))
        except (ImportError, MissingDemoPackageError) as error:
            record.add("absent", _named(case, error))
        except Exception as error:
            record.add("failed", _named(case, f"{type(error).__name__}: {error}"))
            if not _works(room):
                return BROKEN_DEVICE
    record.write()
    return 0


def warm_all(cases: list[Case], room: Room) -> Iterator[str]:
    """Build and check every contender, and time none; yields what went wrong."""
    for case in cases:
        try:
            admit(contenders(case, room))
        except Exception as error:
            yield f"{case.op}, {case.title}: {type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--file", type=Path, required=True, help="results; cases that it holds are not measured again")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm", action="store_true", help="compile and check, time nothing")
    parser.add_argument("--dry-run", action="store_true", help="one quick case, and one for a GPU made small")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    cases = cases_for(arguments.family, arguments.device, quick=False)
    if arguments.dry_run:
        cases = [case for case in cases if not case.levels]
        cases = sorted(cases, key=lambda case: not case.quick)[:1]
        on_gpu = cases_for(arguments.family, torch.device("cuda"), quick=False)
        cases += [case.small for case in on_gpu if case.small is not None][:1]
    if arguments.warm:
        wrong = list(warm_all(cases, Room(arguments.device, threads, cold_bytes=1)))
        print("\n".join(wrong) or f"{len(cases)} cases checked")
        return 1 if wrong else 0
    protocol = Protocol.quick() if arguments.dry_run else Protocol(repetitions=9, fewest=5, seconds=1.0)
    room = Room(arguments.device, threads, arguments.dry_run, cold_bytes=(64 << 20) if arguments.dry_run else 1 << 30)
    record = Record(arguments.file, header(arguments.family, room, protocol))
    return measure_all(cases, room, protocol, arguments.seconds, record)


if __name__ == "__main__":
    sys.exit(main())
