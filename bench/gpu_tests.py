"""The tests as parts of `gpu.py`: shares that run beside each other, whose outcomes outlive what ends their process."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from gpu_run import ROOT, Finished, Outcome, Run, not_done

#: whose rows run on a GPU
ROWS = (
    *("tests/anchor_scores", "tests/attention", "tests/hamming", "tests/index", "tests/latent_attention"),
    *("tests/norm", "tests/pooling", "tests/contract/test_backends.py"),
)
#: whose models take a GPU where there is one
OTHERS = ("tests/models", "tests/integrations", "tests/nn")
_BACKENDS = ("cuda", "cuda_hopper", "triton")
#: exit codes of pytest: all passed, some failed, nothing left to run; and the plugin's own
_ENDED = (0, 1, 5)
BROKEN_DEVICE = 17
#: longer than any test is, its compilations included
SILENT_SECONDS = 60.0
#: processes of one share: each but the last has lost a test
_ATTEMPTS = 30


def _command(run: Run, folder: Path, paths: Sequence[str], *more: str) -> list[str]:
    chosen = [part for backend in _BACKENDS for part in ("--backend", backend)]
    marks = [] if run.slow else ["-m", "not slow"]
    plugins = [
        "-p",
        "gpu_rows",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        f"--gpu-outcomes={folder}",
    ]
    return [sys.executable, "-m", "pytest", "-q", *plugins, *chosen, *marks, *more, *paths]


def known(folder: Path) -> dict[str, dict[str, Any]]:
    """As the plugin reads what it wrote."""
    sys.path.append(str(ROOT / "tests"))
    from gpu_rows import known

    return known(folder)


def tests(part: str, paths: Sequence[str], run: Run, limit: float, *more: str) -> Outcome:
    """In as many shares as leave each a core; outcomes of an earlier run that was not forgotten are kept."""
    folder = run.path(part, "0.jsonl").parent
    command = partial(_command, run, folder, paths, *more)
    if run.dry_run:
        return _collected(run.process(f"{part}-collected", command("--collect-only"), 600))
    until, shares = time.monotonic() + limit, max(1, run.cores - 3)
    with ThreadPoolExecutor(shares) as pool:
        ends = list(pool.map(partial(_share, run, folder, command, until, shares), range(shares)))
    return _outcome(known(folder), ends)


def _share(
    run: Run, folder: Path, command: Callable[[str], list[str]], until: float, shares: int, share: int
) -> Finished:
    """Processes one after the other, until nothing is left of the share or of the time."""
    path = folder / f"{share}.jsonl"
    for attempt in range(_ATTEMPTS):
        name = f"{folder.name}-{share}" + f"-{attempt}" * (attempt > 0)
        left = until - time.monotonic()
        asked = command(f"--gpu-share={share}/{shares}")
        done = run.process(name, asked, left, {"OMP_NUM_THREADS": "1"}, path, SILENT_SECONDS)
        if done.cut_off or not (_took_a_test_along(path, done) or done.code == BROKEN_DEVICE):
            break
    return done


def _took_a_test_along(path: Path, done: Finished) -> bool:
    """Whether the process ended within a test, which is then noted as failed."""
    lines = path.read_text().splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines else {"outcome": "none"}
    if "outcome" in last:
        return False
    why = f"said nothing for {SILENT_SECONDS:.0f} s" if done.hung else f"ended its process with code {done.code}"
    line = {**last, "outcome": "failed", "seconds": 0.0, "message": f"{why}\n{done.tail(30)}"}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return True


def backend(test: str) -> str:
    """By the name of its row."""
    words = re.split(r"[\[\]-]", test.partition("[")[2])
    return next((name for name in _BACKENDS if name in words), "others")


def _outcome(lines: Mapping[str, Mapping[str, Any]], ends: Sequence[Finished]) -> Outcome:
    ended = {test: line for test, line in lines.items() if "outcome" in line}
    counts: dict[str, Counter[str]] = {}
    for test, line in ended.items():
        counts.setdefault(backend(test), Counter())[line["outcome"]] += 1
    failures = [line for line in ended.values() if line["outcome"] == "failed"]
    skips = Counter(line["message"] for line in ended.values() if line["outcome"] == "skipped")
    what = "; ".join(
        f"{name}: " + ", ".join(f"{counted[kind]} {kind}" for kind in ("passed", "failed", "skipped") if counted[kind])
        for name, counted in sorted(counts.items())
    )
    found = {"counts": counts, "failures": failures, "skips": skips, "slowest": _slowest(ended)}
    lost = [done for done in ends if not done.cut_off and done.code not in (*_ENDED, BROKEN_DEVICE)]
    if lost:
        what += f"; {len(lost)} processes ended with code {lost[0].code}: {lost[0].last_line}"
    if any(done.cut_off for done in ends):
        return Outcome("cut off", f"{what}; the rest is left for want of time", found)
    return Outcome("failed" if failures or lost else "done", what or "no test", found)


def _slowest(ended: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    return sorted(((test, line.get("seconds", 0.0)) for test, line in ended.items()), key=lambda pair: -pair[1])[:20]


def _collected(done: Finished) -> Outcome:
    """Where nothing is launched."""
    found = re.search(r"^(?:(\d+)/\d+|(\d+)) tests collected", done.tail(3), re.M)
    if not done.ok or not found:
        return not_done(done, "collecting tests")
    return Outcome("done", f"{found.group(1) or found.group(2)} tests would run")
