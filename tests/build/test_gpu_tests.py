"""The tests as `make gpu` runs them: which, in which order, and what outlives a process that ends or waits for ever."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"

pytestmark = pytest.mark.skipif(not (BENCH / "gpu_tests.py").exists(), reason="the benchmarks are not in this tree")

CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--backend", action="append")
"""
#: a test of each fate, and rows that are not asked for
MADE_UP = """
import os, time
import pytest

@pytest.mark.parametrize("backend", ["triton", "cuda", "cpu"])
def test_passes(backend): pass

@pytest.mark.parametrize("backend", ["cuda"], ids=["cuda_hopper"])
def test_fails(backend): assert 1 == 2, "one is not two"

@pytest.mark.parametrize("backend", ["cuda"])
def test_is_skipped(backend): pytest.skip("no kernel")

@pytest.mark.parametrize("backend", ["triton"])
def test_ends(backend): os._exit(5)

@pytest.mark.parametrize("backend", ["triton"])
def test_waits(backend): time.sleep(600)

@pytest.mark.gpu
def test_marked(): pass

def test_other(): pass
"""


@pytest.fixture
def modules(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield {name: importlib.import_module(name) for name in ("gpu_run", "gpu_tests")}
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def made_up(tmp_path) -> Path:
    folder = tmp_path / "made_up"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_fates.py").write_text(MADE_UP)
    return folder


def test_every_fate_is_told(modules, monkeypatch, made_up, tmp_path):
    monkeypatch.setattr(modules["gpu_tests"], "SILENT_SECONDS", 15.0)
    run = modules["gpu_run"].Run(tmp_path / "out", dry_run=False, slow=False, minutes=5.0, cores=5)
    outcome = modules["gpu_tests"].tests("tests", [str(made_up)], run, 500)
    assert outcome.state == "failed", outcome
    assert outcome.what == (
        "cuda: 1 passed, 1 skipped; cuda_hopper: 1 failed; others: 1 passed; triton: 1 passed, 2 failed"
    )
    failures = {failure["test"].partition("::")[2]: failure["message"] for failure in outcome.found["failures"]}
    assert failures.keys() == {"test_fails[cuda_hopper]", "test_ends[triton]", "test_waits[triton]"}
    assert failures["test_fails[cuda_hopper]"].startswith("AssertionError: one is not two")
    assert failures["test_ends[triton]"].startswith("ended its process with code 5")
    assert failures["test_waits[triton]"].startswith("said nothing for 15 s")
    assert outcome.found["skips"] == {"Skipped: no kernel": 1}
    # nothing is run again
    logs = {path: path.stat().st_mtime_ns for path in (run.folder / "tests").glob("*.jsonl")}
    again = modules["gpu_tests"].tests("tests", [str(made_up)], run, 500)
    assert again.what == outcome.what
    assert logs == {path: path.stat().st_mtime_ns for path in (run.folder / "tests").glob("*.jsonl")}


def test_the_plugin_and_the_part_mean_the_same_code(modules):
    assert importlib.import_module("gpu_rows").BROKEN_DEVICE == modules["gpu_tests"].BROKEN_DEVICE


def test_what_time_does_not_allow_is_left(modules, made_up, tmp_path):
    run = modules["gpu_run"].Run(tmp_path / "out", dry_run=False, slow=False, minutes=5.0, cores=1)
    outcome = modules["gpu_tests"].tests("tests", [str(made_up)], run, 8)
    assert outcome.state == "cut off"
    assert outcome.what.endswith("the rest is left for want of time")


def test_others_are_those_without_a_row(modules, made_up, tmp_path):
    run = modules["gpu_run"].Run(tmp_path / "out", dry_run=False, slow=False, minutes=5.0, cores=1)
    outcome = modules["gpu_tests"].tests("others", [str(made_up)], run, 300, "--gpu-others")
    assert (outcome.state, outcome.what) == ("done", "others: 1 passed")


def test_rows_of_the_cuda_library_come_first_and_the_rest_is_left_out(tmp_path):
    options = ["-p", "gpu_rows", f"--gpu-outcomes={tmp_path}", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "tests/latent_attention", "tests/index/test_index.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(("python", "tests"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    kinds = ("cuda", "triton", "on_a_gpu")
    places = {kind: [place for place, name in enumerate(names) if kind in name] for kind in kinds}
    assert all(places.values()), done.stdout[-2000:]
    assert max(places["cuda"] + places["on_a_gpu"]) < min(places["triton"])
    assert len(names) == sum(map(len, places.values()))


def test_every_file_with_rows_is_among_those_that_are_run(modules):
    """A file whose tests take a device has rows of a GPU."""
    with_rows = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("*/test_*.py")
        if re.search(r"^def test_\w+\(.*\bdevice\b", path.read_text(), re.M)
    }
    assert len(with_rows) > 10
    assert [path for path in with_rows if not path.startswith(modules["gpu_tests"].ROWS)] == []
