"""`make gpu` without a GPU: refused in one sentence, gone through in a dry run; what is kept, skipped and mended."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "bench" / "gpu.py"

pytestmark = pytest.mark.skipif(not COMMAND.exists(), reason="the benchmarks are not in this tree")


@pytest.fixture
def modules(monkeypatch):
    """The command's own modules: they stand beside it and belong to no package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(COMMAND.parent))
    yield {name: importlib.import_module(name) for name in ("gpu", "gpu_run", "gpu_parts", "gpu_report")}
    for name in set(sys.modules) - before:
        if (COMMAND.parent / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def bench(monkeypatch):
    """The package of the benchmarks, as the worker of a family imports it."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("bench.gpu_bench")
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        del sys.modules[name]


@pytest.fixture
def run(modules, tmp_path):
    return modules["gpu_run"].Run(tmp_path, dry_run=True, slow=False, minutes=1.0, cores=2)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, COMMAND, *arguments], capture_output=True, text=True)


def test_is_refused_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command()
    assert done.returncode == 2
    assert "sees no GPU; ARGS=--dry-run goes through everything but launches" in done.stderr


def test_unknown_parts_are_named(tmp_path):
    done = command("--dry-run", "--parts", "warmth", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "none of machine, build, rates, ceilings, tests" in done.stderr


@pytest.mark.slow
def test_dry_run_from_end_to_end(tmp_path):
    """All parts but the build, which would replace the libraries that are under test."""
    parts = "machine,rates,ceilings,tests,conformance,sanitizer,warm,bench:anchor_scores"
    done = command("--dry-run", "--parts", parts, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert set(whole["parts"]) == set(parts.split(","))
    assert {part["state"] for part in whole["parts"].values()} == {"done"}
    (case,) = whole["families"]["anchor_scores"]["cases"]
    assert case["ratios"]
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# Dry run on the CPU: nothing here ran on a GPU")
    assert case["title"] in summary
    archive = tmp_path / "all.tar.gz"
    again = command("--dry-run", "--parts", parts, "--output", str(tmp_path), "--archive", str(archive))
    assert again.returncode == 0
    # the machine is looked at in every run
    assert again.stdout.count("done before") == len(parts.split(",")) - 1
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert {"gpu.json", "summary.md", "logs/conformance.log", "families/anchor_scores.json"} <= names
    assert not [name for name in names if name.startswith("tensor_rates/")]


def parts_of(modules, works: dict, **options) -> dict:
    part = modules["gpu_run"].Part
    return {name: part(name, stage, work, **options) for stage, (name, work) in enumerate(works.items())}


def test_what_is_done_is_kept_when_a_later_part_fails(modules, monkeypatch, tmp_path, capsys):
    gpu, outcome = modules["gpu"], modules["gpu_run"].Outcome
    ran = []

    def works(run):
        ran.append("works")
        return outcome("done", "well", {"answer": 42})

    def breaks(run):
        ran.append("breaks")
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu, "PARTS", parts_of(modules, {"works": works, "breaks": breaks}))
    for _ in range(2):
        assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 1
    assert ran == ["works", "breaks", "breaks"]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["works"]["found"] == {"answer": 42}
    assert parts["breaks"] | {"seconds": 0} == {
        "state": "failed",
        "seconds": 0,
        "what": "RuntimeError: out of luck",
        "found": {},
    }
    assert gpu.main(["--dry-run", "--again", "--parts", "works", "--output", str(tmp_path)]) == 0
    assert ran[3:] == ["works"]
    # other sources: nothing of before holds
    monkeypatch.setattr(gpu, "fingerprint", lambda patterns: "other")
    assert gpu.main(["--dry-run", "--parts", "works", "--output", str(tmp_path)]) == 0
    assert ran[4:] == ["works"]
    assert "all anew" in capsys.readouterr().out


def test_what_may_be_lost_is_gone_through_in_every_run(modules, monkeypatch, tmp_path):
    gpu, outcome = modules["gpu"], modules["gpu_run"].Outcome
    ran = []

    def works(run):
        ran.append(sorted(path.name for path in run.folder.glob("*/half")))
        run.path("tests", "half").touch()
        return outcome("done", "well")

    monkeypatch.setattr(gpu, "PARTS", parts_of(modules, {"build": works}, lasts=False))
    for _ in range(2):
        assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    # halves are gone on from, but not with other sources
    monkeypatch.setattr(gpu, "fingerprint", lambda patterns: "other")
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    assert ran == [[], ["half"], []]


def test_libraries_built_before_are_known_again(modules, monkeypatch, run, tmp_path):
    gpu_parts, device = modules["gpu_parts"], modules["gpu_run"].Device("a GPU", (9, 0))
    monkeypatch.setattr(gpu_parts, "_PACKAGE", tmp_path)
    monkeypatch.setattr(gpu_parts, "_STAMP", tmp_path / "_built.json")
    library, listing = tmp_path / "_cuda.so", tmp_path / "_cuda.architectures"
    library.write_bytes(b"built")
    listing.write_text("80;90a")
    assert not gpu_parts._is_built(device)
    gpu_parts._STAMP.write_text(json.dumps(gpu_parts._stamp()))
    assert gpu_parts._is_built(device)
    assert gpu_parts._is_built("torch sees no GPU")
    listing.write_text("80")
    assert not gpu_parts._is_built(device)
    listing.write_text("90a")
    library.write_bytes(b"built by others")
    assert not gpu_parts._is_built(device)


def test_nothing_follows_a_failed_build(modules, monkeypatch, tmp_path):
    gpu, outcome = modules["gpu"], modules["gpu_run"].Outcome
    ran = []
    works = {"build": lambda run: outcome("failed", "no"), "tests": lambda run: ran.append(1)}
    monkeypatch.setattr(gpu, "PARTS", parts_of(modules, works, needed=True))
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 1
    assert not ran


def test_timed_parts_run_alone(modules):
    gpu, parts = modules["gpu"], modules["gpu_parts"].PARTS
    stages = gpu._stages(list(parts.values()))
    assert [part.name for part in stages[2]] == ["ceilings"]
    assert [part.name for part in stages[3]] == ["tests", "sanitizer", "warm"]
    assert all(len(stage) == 1 for stage in stages[4:-1])
    assert [part.name for part in stages[-1]] == ["conformance", "others"]
    assert sum(map(len, stages)) == len(parts)


def test_every_family_of_the_default_benchmarks_is_measured(modules):
    listed = command_output("from bench import DEFAULT; print(*DEFAULT)").split()
    # a family without GPU kernels has nothing to measure
    assert set(listed) - set(modules["gpu_parts"].FAMILIES) == {"paragraph_vector"}
    assert set(modules["gpu_parts"].FAMILIES) <= set(listed)


def command_output(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_what_is_missing_is_named_with_its_mending(modules, monkeypatch, run):
    gpu_run = modules["gpu_run"]
    monkeypatch.setitem(gpu_run.NEEDS, "ninja", (lambda: False, "pip install ninja"))
    monkeypatch.setitem(gpu_run.NEEDS, "nvcc", (lambda: False, "the CUDA toolkit"))
    part = gpu_run.Part("build", 0, lambda run: gpu_run.Outcome("done", ""), ("ninja",), ("nvcc",))
    assert part.attempt(run).what.startswith("needs ninja: pip install ninja")
    run.dry_run = False
    assert part.attempt(run).what.startswith("needs ninja, nvcc: the CUDA toolkit; pip install ninja")


def test_a_process_ends_at_its_limit_with_what_it_started(run, tmp_path):
    program = "import subprocess, sys, time; print('begun', flush=True); subprocess.run(['sleep', '600.125'])"
    started = time.monotonic()
    done = run.process("sleeps", [sys.executable, "-c", program], 8)
    assert time.monotonic() - started < 30
    assert (done.cut_off, done.ok, done.last_line) == (True, False, "begun")
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
    if running.returncode == 0:
        assert "sleep 600.125" not in running.stdout.splitlines()


def test_a_signal_ends_processes_and_keeps_what_was_found(modules, monkeypatch, tmp_path, capsys):
    gpu, outcome = modules["gpu"], modules["gpu_run"].Outcome

    def waits(run):
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        done = run.process("waits", ["sleep", "600.375"], 300)
        return outcome("cut off" if done.cut_off else "failed", f"ended with {done.code}", {"half": 21})

    monkeypatch.setattr(gpu, "PARTS", parts_of(modules, {"waits": waits, "never": lambda run: outcome("done", "")}))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    started = time.monotonic()
    try:
        assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert time.monotonic() - started < 30
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == ["waits"]
    assert (parts["waits"]["state"], parts["waits"]["found"]) == ("cut off", {"half": 21})
    assert "stopped" in capsys.readouterr().out


def test_a_silent_process_is_ended(run, monkeypatch, tmp_path):
    """Also one that has spoken before this one, on a busy machine, comes to listen."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: (start(*given, **more), time.sleep(1))[0])
    program = f"import time; open({str(tmp_path / 'heard')!r}, 'w').close(); time.sleep(600.25)"
    started = time.monotonic()
    done = run.process("waits", [sys.executable, "-c", program], 300, alive=tmp_path / "heard", silent=2)
    assert time.monotonic() - started < 60
    assert (done.hung, done.cut_off, done.ok) == (True, False, False)


@pytest.mark.parametrize(("starting", "hung"), [(3.0, True), (200.0, False)])
def test_the_first_word_may_take_longer(run, modules, monkeypatch, tmp_path, starting, hung):
    """Silence of before the start, here a word of an earlier process, is not its own."""
    monkeypatch.setattr(modules["gpu_run"], "STARTING_SECONDS", starting)
    heard = tmp_path / "heard"
    heard.touch()
    waits = ["sleep", "600.5" if hung else "5"]
    done = run.process("waits", waits, 300, alive=heard, silent=1)
    assert (done.hung, done.cut_off, done.ok) == (hung, False, not hung)


def test_sanitizer_is_asked_for_our_kernels_alone(modules, monkeypatch, run, tmp_path):
    gpu_parts = modules["gpu_parts"]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\n[ "$2" != racecheck ] || exit 9\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_parts, "program", lambda *names: str(tool))
    run.dry_run = False
    outcome = gpu_parts._sanitizer(run)
    assert outcome.state == "failed"
    assert outcome.what.startswith("racecheck (1 of 3 not clean) ended with code 9")
    assert outcome.found["memcheck"]["ok"]
    assert "--kernel-name kns=embedding_kernels" in outcome.found["memcheck"]["tail"]
    assert outcome.found["memcheck"]["tail"].endswith("run_samples.py cuda")


# ---- the worker of a family ----


def cases(bench, builds: dict) -> list:
    work = bench.time_case.__globals__["ceilings"].Work(1, 1, "things")
    return [bench.Case("made_up", name, {}, ("peer",), build, work) for name, build in builds.items()]


def two(bench):
    role = {"role": "ours"}
    return [bench.Contender(bench.OURS, lambda turn: turn, **role), bench.Contender("peer", lambda turn: turn)]


def test_a_case_that_fails_keeps_the_others(bench, tmp_path):
    import torch

    def fails(room):
        raise RuntimeError("no kernel image")

    def lacks(room):
        raise ModuleNotFoundError("No module named 'x'")

    def is_wrong(room):
        found = two(bench)

        def verify(answer):
            raise AssertionError("42 is not 43")

        found[0].verify = verify
        return found

    builds = {"fails": fails, "lacks": lacks, "wrong": is_wrong, "works": lambda room: two(bench)}
    room, protocol = bench.Room(torch.device("cpu"), 1, True, 1), bench.Protocol(repetitions=1, fewest=1, seconds=0.1)
    path = tmp_path / "family.json"
    record = bench.Record(path, {"family": "made_up"})
    assert bench.measure_all(cases(bench, builds), room, protocol, 60, record) == 0
    whole = json.loads(path.read_text())
    assert [case["title"] for case in whole["cases"]] == ["works"]
    assert [case["title"] for case in whole["absent"]] == ["lacks"]
    reasons = {case["title"]: case["reason"] for case in whole["failed"]}
    assert reasons == {
        "fails": "RuntimeError: no kernel image",
        "wrong": "WrongAnswerError: embedding-kernels: 42 is not 43",
    }
    # what the file holds is not measured again; what time does not allow is named
    builds = {"works": fails, "late": lambda room: two(bench)}
    record = bench.Record(path, {"family": "made_up"})
    assert bench.measure_all(cases(bench, builds), room, protocol, -1, record) == 0
    whole = json.loads(path.read_text())
    assert len(whole["failed"]) == 2
    assert [case["title"] for case in whole["left"]] == ["late"]


def test_a_peer_that_cannot_be_made_is_refused(bench):
    def make():
        raise MemoryError("too large")

    harness = importlib.import_module("bench.harness")
    assert harness.prepared("none", lambda: None) is None
    admitted, refused = harness.admit([*two(bench), harness.prepared("large", make)])
    assert [contender.name for contender in admitted] == [bench.OURS, "peer"]
    assert refused == {"large": "MemoryError: too large"}


def test_a_case_that_ended_its_process_is_not_begun_again(bench, tmp_path):
    import torch

    class EndedError(BaseException):
        pass

    def ends(room):
        raise EndedError

    room, protocol = bench.Room(torch.device("cpu"), 1, True, 1), bench.Protocol(repetitions=1, fewest=1, seconds=0.1)
    path, builds = tmp_path / "family.json", {"ends": ends, "works": lambda room: two(bench)}
    with pytest.raises(EndedError):
        bench.measure_all(cases(bench, builds), room, protocol, 60, bench.Record(path, {"family": "made_up"}))
    assert bench.measure_all(cases(bench, builds), room, protocol, 60, bench.Record(path, {"family": "made_up"})) == 0
    whole = json.loads(path.read_text())
    assert [case["title"] for case in whole["failed"]] == ["ends"]
    assert [case["title"] for case in whole["cases"]] == ["works"]
    assert "begun" not in whole


def test_a_backend_is_chosen_around_what_is_timed(bench):
    import torch

    from embedding_kernels.ops.backend import requested

    seen = []
    ours = bench.Contender(bench.OURS, lambda turn: seen.append(requested(None, "op")), role="ours")
    contender = bench.WithBackend(bench.TRITON, ours, "triton")
    room = bench.Room(torch.device("cpu"), 1)
    contender.check()
    assert contender.timed(2, 0, room) >= 0
    assert seen == ["triton"] * 3
    assert contender.role == "peer"
    ours.timed(1, 0, room)
    assert seen[3] is None


def test_gpu_times_are_taken_between_events(bench, monkeypatch):
    import torch

    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock) ** 2

        def elapsed_time(self, later):
            return float(later.at - self.at)

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waited.append(1))
    turns = []
    contender = bench.Contender("ours", turns.append)
    room = bench.Room(torch.device("cuda"), 1)
    # 1, 3 and 5 milliseconds
    assert contender.timed(3, 7, room) == pytest.approx(3e-3)
    assert turns == [7, 8, 9]
    assert len(waited) == 2
