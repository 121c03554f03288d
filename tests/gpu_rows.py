"""A plugin of pytest for `make gpu`: one share of the tests that count on a GPU, every outcome written at once.

``pytest -p gpu_rows --gpu-outcomes FOLDER --gpu-share 3/13 tests/norm``. What FOLDER's files hold is not run again: a
process that was ended, by a kernel that waits for ever or by one that broke its GPU, is followed by one that goes on.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

#: the CUDA library's first: Triton's kernels are compiled, for half a second each
BACKENDS = ("cuda", "triton")
#: the exit code where an illegal access has ended all later work of the process
BROKEN_DEVICE = 17


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-outcomes", type=Path, help="folder of the outcomes, a file a share")
    parser.addoption("--gpu-share", default="0/1", help="which of how many shares")
    parser.addoption("--gpu-others", action="store_true", help="tests that have no row a backend, instead of the rows")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu-outcomes") and not config.getoption("--collect-only"):
        config.pluginmanager.register(Outcomes(config), "outcomes-on-a-gpu")


def known(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line about each test; one without an outcome was begun and has not ended."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        # a process that was ended may leave half a line
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        found |= {line["test"]: line for line in map(json.loads, lines)}
    return found


def _rank(item: pytest.Item, others: bool) -> int | None:
    """When a test's turn is; None where it is not asked for."""
    values = getattr(getattr(item, "callspec", None), "params", {})
    if others:
        return None if "backend" in values or item.get_closest_marker("gpu") else 0
    if item.get_closest_marker("gpu"):
        return 0
    return BACKENDS.index(values["backend"]) if values.get("backend") in BACKENDS else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shares are drawn by name, the same in every process."""
    if not (folder := config.getoption("--gpu-outcomes")):
        return
    share, shares = map(int, config.getoption("--gpu-share").split("/"))
    done = {name for name, line in known(folder).items() if "outcome" in line}
    mine = [item for item in items if zlib.crc32(item.nodeid.encode()) % shares == share and item.nodeid not in done]
    ranked = [(rank, item) for item in mine if (rank := _rank(item, config.getoption("--gpu-others"))) is not None]
    chosen = [item for _, item in sorted(ranked, key=lambda pair: pair[0])]
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


def _device_works() -> bool:
    """Where no test has imported torch there is nothing to be broken, and nothing to wait for."""
    try:
        if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Outcomes:
    """Writes a line when a test begins and a line when it has ended."""

    def __init__(self, config: pytest.Config) -> None:
        share = config.getoption("--gpu-share").partition("/")[0]
        self._path = config.getoption("--gpu-outcomes") / f"{share}.jsonl"
        self._now: dict[str, Any] = {}

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read, or that wants a package which is not here."""
        if report.outcome != "passed":
            self._write({"test": report.nodeid, "outcome": report.outcome, "message": _message(report)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._now = {"test": nodeid, "outcome": "passed", "seconds": 0.0}
        self._write({"test": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._now["seconds"] = round(self._now["seconds"] + report.duration, 3)
        if report.outcome != "passed" and self._now["outcome"] != "failed":
            self._now |= {"outcome": report.outcome, "message": _message(report)}

    def pytest_runtest_logfinish(self) -> None:
        broken = self._now["outcome"] == "failed" and not _device_works()
        self._write(self._now)
        if broken:
            os._exit(BROKEN_DEVICE)


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped; what failed, before where it did."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return (f"{crash.message[:1000]}\n" if crash else "") + report.longreprtext[-1500:]
