"""One process for each level of instruction set: the level is read from the environment once, when the library loads.

`Workers` keeps a process a level alive and hands out contenders whose timing happens there, so that the harness
alternates between levels as between any other contenders. The worker side is ``python -m bench.levels``: one JSON
message a line, in on stdin, out on stdout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from .harness import Case, Contender, Room, WrongAnswerError


class LevelContender(Contender):
    """Ours at one level; checked and timed in that level's process."""

    def __init__(self, level: str, case: Case, ask: Callable[..., Any]) -> None:
        super().__init__(level, call=lambda turn: None, role="level")
        self._case, self._ask = case, ask

    def check(self) -> None:
        """The worker builds the case and verifies its answer."""
        self._ask(do="build", op=self._case.op, title=self._case.title)

    def timed(self, calls: int, turn: int, room: Room) -> float:
        """Seconds a call, by the worker's clock."""
        return float(self._ask(do="time", calls=calls, turn=turn))


class Workers:
    """The processes; a context manager, so that none outlives the run."""

    def __init__(self, levels: list[str], room: Room) -> None:
        self._levels, self._room = levels, room
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
            process.wait()

    def contenders(self, case: Case) -> list[Contender]:
        """One for each level that the case's loops are compiled for, lowest first."""
        levels = [level for level in self._levels if level != "amx" or case.tiles]
        return [LevelContender(level, case, self._asker(level)) for level in levels]

    def _asker(self, level: str) -> Callable[..., Any]:
        def ask(**message: Any) -> Any:
            if level not in self._processes:
                self._processes[level] = self._start(level)
            process = self._processes[level]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the worker of level {level} ended with code {process.wait()}")
            reply = json.loads(line)
            if "wrong" in reply:
                raise WrongAnswerError(f"level {level}: {reply['wrong']}")
            return reply["value"]

        return ask

    def _start(self, level: str) -> subprocess.Popen[str]:
        root = str(Path(__file__).resolve().parent.parent)
        pace = "quick" if self._room.quick else "full"
        command = [sys.executable, "-m", "bench.levels", str(self._room.threads), pace]
        environment = {**os.environ, "EMBEDDING_KERNELS_ISA": level}
        return subprocess.Popen(
            command, cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )


def serve(room: Room, messages: IO[str], replies: IO[str]) -> None:
    """The worker: builds the case it is told, then times it as often as it is asked."""
    from . import BENCHMARKS

    current: Contender | None = None
    for line in messages:
        message = json.loads(line)
        reply: dict[str, Any] = {"value": None}
        if message["do"] == "build":
            case = next(case for case in BENCHMARKS[message["op"]] if case.title == message["title"])
            try:
                current = case.build(room)[0]
                current.check()
            except WrongAnswerError as error:
                reply = {"wrong": str(error)}
        else:
            assert current is not None
            reply["value"] = current.timed(message["calls"], message["turn"], room)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not enter the conversation
    threads_asked = int(sys.argv[1])
    torch.set_num_threads(threads_asked)
    serve(Room(torch.device("cpu"), threads_asked, quick=sys.argv[2] == "quick"), sys.stdin, answers)
