"""Everything that a GPU machine has to show, in one command and about eight minutes: ``make gpu``.

Builds from source against the torch that is there, without the network; measures what the machine can do; tests every
kernel on small shapes, under compute-sanitizer too; measures every benchmark on the GPU; then the conformance program
and the tests of models. Writes one JSON, pictures and a table, after each part. Each part has its own time limit and is
kept when another fails; what is done is not done again (``--again`` forgets it). Without a GPU, ``--dry-run`` goes
through all parts on the CPU: everything but launches.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_report
import results
from gpu_parts import PARTS
from gpu_run import ROOT, Outcome, Part, Run, device_of_torch, fingerprint, stop, stopped

SOURCES = (
    "csrc",
    "kernels",
    "python",
    "tests",
    "bench/*.py",
    "bench/*.cu",
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
)
#: minutes that parts may take beyond theirs
OVERTIME = 1.2
PARTIAL = ("families", "logs", "tests", "others")


class State:
    """What was done, in ``state.json``, of the same sources on the same device, else forgotten; and its report."""

    def __init__(self, folder: Path, device: str, arguments: argparse.Namespace) -> None:
        self.path = folder / "state.json"
        self._dry_run, self._archive = arguments.dry_run, arguments.archive
        self._lock = threading.Lock()
        self._key = {"sources": fingerprint(SOURCES), "device": device}
        kept = gpu_report.read_state(self.path)
        fits = not arguments.again and all(kept.get(name) == value for name, value in self._key.items())
        self.parts: dict[str, dict[str, Any]] = kept["parts"] if fits else {}
        self.forgot = bool(kept) and not fits
        if not fits:
            for name in PARTIAL:  # what parts that were cut off go on from
                shutil.rmtree(folder / name, ignore_errors=True)

    def is_done(self, part: str) -> bool:
        return self.parts.get(part, {}).get("state") == "done"

    def record(self, part: str, outcome: Outcome) -> None:
        with self._lock:
            self.parts[part] = outcome.entry()
            results.write({**self._key, "parts": self.parts}, self.path)
            gpu_report.write_tables(self.path.parent, self.parts, self._dry_run)
            if self._archive is not None:
                gpu_report.pack(self.path.parent, self._archive)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build, test and measure on this machine's GPU.")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: everything but launches")
    parser.add_argument("--parts", default="*", help=f"patterns, separated by commas, of: {', '.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="forget what was done before")
    parser.add_argument("--output", type=Path, help="folder for everything; default: build/gpu, build/gpu-dry-run")
    parser.add_argument(
        "--archive", type=Path, help="a file of everything there, .tar.gz, renewed after each part: to carry it away"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all parts together; benchmarks take what is left"
    )
    parser.add_argument("--slow", action="store_true", help="also tests marked slow, however long they take")
    return parser.parse_args(argv)


def _say(line: str, since: float) -> None:
    print(f"[{time.monotonic() - since:5.0f} s] {line}", flush=True)


def _do(part: Part, run: Run, state: State) -> None:
    started = time.monotonic()
    outcome = part.attempt(run)
    outcome.seconds = round(time.monotonic() - started, 1)
    state.record(part.name, outcome)
    _say(f"{part.name}: {outcome.line()}", run.started)


def _stages(chosen: Sequence[Part]) -> list[list[Part]]:
    """Parts that may run beside each other, stage by stage; what is timed runs alone."""
    found: dict[int, list[Part]] = {}
    for part in chosen:
        found.setdefault(part.stage, []).append(part)
    together = [found[stage] for stage in sorted(found)]
    return [group for stage in together for group in ([[part] for part in stage] if stage[0].alone else [stage])]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    device = "cpu (dry run)" if arguments.dry_run else device_of_torch()
    if isinstance(device, str) and not arguments.dry_run:
        print(f"make gpu: {device}; ARGS=--dry-run goes through everything but launches", file=sys.stderr)
        return 2
    name = device if isinstance(device, str) else device.name
    patterns = arguments.parts.split(",")
    chosen = [part for part in PARTS.values() if any(fnmatch.fnmatch(part.name, pattern) for pattern in patterns)]
    if not chosen:
        print(f"make gpu: --parts: none of {', '.join(PARTS)} fits {arguments.parts}", file=sys.stderr)
        return 2
    folder = arguments.output or ROOT / "build" / ("gpu-dry-run" if arguments.dry_run else "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    state = State(folder, name, arguments)
    run = Run(folder.resolve(), arguments.dry_run, arguments.slow, arguments.minutes, os.cpu_count() or 1)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    if not arguments.dry_run and not arguments.slow:
        signal.alarm(round(60 * (arguments.minutes + OVERTIME)))
    _say(
        f"{name}; results in {folder}" + (" (other sources or device than before: all anew)" * state.forgot),
        run.started,
    )
    for group in _stages(chosen):
        left = [part for part in group if not (part.lasts and state.is_done(part.name))]
        for part in group:
            if part not in left:
                _say(f"{part.name}: done before", run.started)
        with ThreadPoolExecutor(max(len(left), 1)) as pool:
            list(pool.map(lambda part: _do(part, run, state), left))
        if stopped.is_set():
            _say("stopped: time is up, or so it was asked", run.started)
            break
        if any(part.needed and not state.is_done(part.name) for part in group):
            _say("the rest needs that: stopped here", run.started)
            break
    files = gpu_report.write_all(folder, state.parts, arguments.dry_run, arguments.archive)
    print("\n" + (folder / "summary.md").read_text())
    print("\n".join(map(str, files)))
    # once more, and last: of much output the end is what is seen
    print("\n".join(f"{name}: {part['state']}: {part['what'][:200]}" for name, part in state.parts.items()))
    return 0 if all(state.is_done(part.name) for part in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
