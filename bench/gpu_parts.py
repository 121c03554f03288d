"""The parts of `gpu.py`: what each runs, how long it may take, and what it makes of the answer."""

from __future__ import annotations

import json
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import tensor_rates
from gpu_run import CUDA_BIN, NEEDS, PEERS, ROOT, Finished, Outcome, Part, Run, device_of_torch, mend, missing, program

BACKENDS = ("reference", "cpu", "triton", "cuda", "cuda_hopper")
#: of no use on a GPU: they build the package, try this command, or emulate
LEFT_OUT = ("tests/build/test_install.py", "tests/build/test_gpu_command.py", "tests/cuda_host/")
#: a family's share of the time that is left for benchmarks
FAMILIES = {
    "norm": 4, "pooling": 3, "hamming": 6, "attention": 10, "latent_attention": 4, "anchor_scores": 2,
    "latent_attention_head": 2, "multi_view": 2, "embedder": 3, "token_prepending": 1,
}  # fmt: skip
CHECKS = ("memcheck", "racecheck", "synccheck")
#: what runs beside the tests ends with them
_UNTIMED_SECONDS = 190


# ---- the machine, and the build ----


def _machine(run: Run) -> Outcome:
    """What is here, and all that is missing, at once."""
    import importlib.util

    lacking = missing(tuple(NEEDS))
    peers = [name for name in PEERS if importlib.util.find_spec(name) is None]
    device = device_of_torch()
    found: dict[str, Any] = {"python": sys.version.split()[0], "missing": lacking, "absent_peers": peers}
    if not isinstance(device, str):
        found |= {"gpu": device.name, "architecture": device.architecture}
    for name, command in {"driver": ["nvidia-smi"], "nvcc": [program("nvcc", CUDA_BIN) or "nvcc", "--version"]}.items():
        try:
            found[name] = run.process(name, command, 30).tail(20)
        except OSError as error:
            found[name] = str(error)
    here = device if isinstance(device, str) else f"{device.name}, sm_{device.architecture}"
    absent = f"; peers not installed: {', '.join(peers)}" if peers else ""
    return Outcome("done", here + (f"; {mend(lacking)}" if lacking else "") + absent, found)


def _build(run: Run) -> Outcome:
    """The libraries beside the Python files, by setup.py: nothing is installed, nothing fetched."""
    device = device_of_torch()
    environment, limit = {"EMBEDDING_KERNELS_CUDA": "AUTO"}, 3600
    if not isinstance(device, str):
        environment = {"EMBEDDING_KERNELS_CUDA": "ON", "EMBEDDING_KERNELS_CUDA_ARCHS": device.architecture}
        limit = 240
    done = run.process("build", [sys.executable, "setup.py", "build_ext", "--inplace"], limit, environment)
    if not done.ok:
        return _not_done(done, "the build")
    doctor = "from embedding_kernels.doctor import report; import json; print(json.dumps(report()))"
    asked = run.process("doctor", [sys.executable, "-c", doctor], 60)
    if not asked.ok:
        return _not_done(asked, "doctor")
    sections = dict(json.loads(asked.last_line))
    cuda = dict(sections["GPU"])["CUDA library"]
    if not run.dry_run and not cuda.startswith("loaded"):
        return Outcome("failed", f"the CUDA library: {cuda}", {"doctor": sections})
    return Outcome("done", f"CUDA library: {cuda}", {"doctor": sections})


def _not_done(done: Finished, what: str) -> Outcome:
    state = "cut off" if done.cut_off else "failed"
    why = "at its limit" if done.cut_off else f"with code {done.code}"
    return Outcome(state, f"{what} ended {why}: {done.last_line}", {"log": str(done.log), "tail": done.tail(30)})


# ---- what the machine can do ----


def _ceilings(run: Run) -> Outcome:
    """The units alone, by a program without torch; memory and a large product, by torch."""
    device = device_of_torch()
    rates = _tensor_rates(run, ("90a", "80") if isinstance(device, str) else (device.architecture,))
    if rates.state != "done":
        return rates
    done = run.process("ceilings", [sys.executable, "bench/gpu_ceilings.py", "--device", run.device], 60)
    if not done.ok:
        outcome = _not_done(done, "reading, copying and multiplying")
        return Outcome(outcome.state, f"{rates.what}; {outcome.what}", {**rates.found, **outcome.found})
    reached = json.loads(done.last_line)
    each = [
        f"{one['name']} {one['gigabytes_per_second'] or one['giga_operations_per_second']:.0f} G" for one in reached
    ]
    return Outcome("done", f"{rates.what}; {', '.join(each)}", {**rates.found, "torch": reached})


def _tensor_rates(run: Run, architectures: tuple[str, ...]) -> Outcome:
    if missing(("nvcc",)):  # asked for where there is a GPU
        return Outcome("done", "no nvcc: the program of rates was not compiled")
    for architecture in architectures:
        target = run.path("tensor_rates", f"sm_{architecture}")
        built = run.process(f"tensor-rates-{architecture}", tensor_rates.command(architecture, target), 120)
        if not built.ok:
            return _not_done(built, "nvcc, of the program of rates,")
    if run.dry_run:
        return Outcome("done", f"the program of rates compiles for sm_{', sm_'.join(architectures)}; nothing ran")
    done = run.process("tensor-rates", [str(target)], 60)
    if not done.ok:
        return _not_done(done, "the program of rates")
    found = json.loads(done.log.read_text())
    clocks = [rate["megahertz"] for rate in found["rates"]]
    return Outcome("done", f"{len(clocks)} rates at {min(clocks)} to {max(clocks)} MHz", {"rates": found})


# ---- the tests ----


def _test_files() -> list[Path]:
    """The largest first, so that none begins last."""
    found = [path.relative_to(ROOT) for path in (ROOT / "tests").glob("*/test_*.py")]
    kept = [path for path in found if not str(path).startswith(LEFT_OUT)]
    return sorted(kept, key=lambda path: -(ROOT / path).stat().st_size)


def _tests(run: Run) -> Outcome:
    """A process a file, as many at once as leave each a core; where nothing is launched, they are only collected."""
    if run.dry_run:
        return _collected(run)
    until = time.monotonic() + (10_000 if run.slow else _UNTIMED_SECONDS)
    with ThreadPoolExecutor(max(1, run.cores - 3)) as pool:
        reports = list(pool.map(partial(_test_file, run, until), _test_files()))
    counts = {
        kind: sum(report["counts"].get(kind, 0) for report in reports) for kind in ("passed", "failed", "skipped")
    }
    broken = [report for report in reports if report["state"] not in ("passed", "absent")]
    absent = [report["file"] for report in reports if report["state"] == "absent"]
    what = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    if absent:
        what += f"; {len(absent)} files need packages that are not here"
    if broken:
        what += "; not passed: " + ", ".join(f"{report['file']} ({report['state']})" for report in broken)
    state = "done" if not broken else "cut off" if all(r["state"] == "cut off" for r in broken) else "failed"
    return Outcome(state, what, {"counts": counts, "files": reports})


def _pytest(run: Run, *arguments: str) -> list[str]:
    chosen = [part for backend in BACKENDS for part in ("--backend", backend)]
    marks = [] if run.slow else ["-m", "not slow"]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *marks, *arguments]


def _test_file(run: Run, until: float, path: Path) -> dict[str, Any]:
    name = str(path).replace("/", "-").removesuffix(".py")
    record = run.path("tests", f"{name}.xml")
    record.unlink(missing_ok=True)
    alone = {"OMP_NUM_THREADS": "1"}
    done = run.process(name, _pytest(run, f"--junitxml={record}", str(path)), until - time.monotonic(), alone)
    report: dict[str, Any] = {"file": str(path), "counts": {}, "failures": []}
    if record.exists():
        report |= read_junit(record)
    if done.last_line.startswith("Skipped: could not import"):
        report["state"] = "absent"  # a folder's conftest says so of all its files
    else:
        # 5: nothing was collected, where all of a file is marked slow
        report["state"] = "cut off" if done.cut_off else "passed" if done.code in (0, 5) else "failed"
    if report["state"] != "passed":
        report["tail"] = done.tail(30)
    return report


def read_junit(path: Path) -> dict[str, Any]:
    """How many passed, failed and were skipped, and the names and messages of those that failed."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        kind = "failed" if wrong else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if wrong:
            failures.append({"test": case.get("name"), "message": (wrong[0].get("message") or "")[:500]})
    return {"counts": counts, "failures": failures}


def _collected(run: Run) -> Outcome:
    ignored = [f"--ignore={path}" for path in LEFT_OUT]
    done = run.process("collect", _pytest(run, "--collect-only", *ignored, "tests"), 600)
    found = re.search(r"^(?:(\d+)/)?(\d+) tests collected", done.tail(3), re.M)
    if not done.ok or not found:
        return _not_done(done, "collecting tests")
    count = int(found.group(1) or found.group(2))
    return Outcome("done", f"{count} tests would run", {"collected": count})


# ---- what is not timed either ----


def _conformance(run: Run) -> Outcome:
    required = [] if run.dry_run else ["--require-gpu"]
    done = run.process("conformance", [sys.executable, "tests/cuda_host/conformance.py", *required], _UNTIMED_SECONDS)
    line = next((x for x in done.tail(200).splitlines() if x.startswith("conformance of")), "")
    if not done.ok:
        return _not_done(done, "the conformance program")
    return Outcome("done", line)


def _sanitizer(run: Run) -> Outcome:
    """Our kernels alone are watched; memory comes from CUDA itself, so that its ends are seen."""
    samples = [sys.executable, "tests/run_samples.py", run.device]
    if run.dry_run:
        done = run.process("samples", samples, _UNTIMED_SECONDS)
        return Outcome("done", done.last_line) if done.ok else _not_done(done, "the samples")
    tool = program("compute-sanitizer", CUDA_BIN)
    assert tool
    options = ["--kernel-name", "kns=embedding_kernels", "--error-exitcode", "9", "--print-limit", "20"]

    def check(kind: str) -> Finished:
        command = [tool, "--tool", kind, *options, *samples]
        return run.process(f"sanitizer-{kind}", command, _UNTIMED_SECONDS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    with ThreadPoolExecutor(len(CHECKS)) as pool:
        done = dict(zip(CHECKS, pool.map(check, CHECKS), strict=True))
    found = {kind: {"ok": each.ok, "cut_off": each.cut_off, "tail": each.tail(20)} for kind, each in done.items()}
    wrong = [kind for kind, each in done.items() if not each.ok]
    if wrong:
        outcome = _not_done(done[wrong[0]], f"{wrong[0]} ({len(wrong)} of {len(CHECKS)} not clean)")
        return Outcome(outcome.state, outcome.what, found)
    return Outcome("done", f"clean: {', '.join(CHECKS)}", found)


# ---- the benchmarks ----


def _worker(run: Run, family: str, *more: str) -> list[str]:
    found = run.path("families", f"{family}.json")
    dry = ["--dry-run"] if run.dry_run else []
    return [sys.executable, "bench/gpu_bench.py", family, "--device", run.device, "--file", str(found), *dry, *more]


def _warm(run: Run) -> Outcome:
    """Everything is compiled and checked once, all families at once, so that timing finds it in the caches."""
    if run.dry_run:
        return Outcome("done", "nothing to compile without a GPU")

    def warm(family: str) -> Finished:
        return run.process(f"warm:{family}", _worker(run, family, "--warm"), _UNTIMED_SECONDS, {"OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(max(1, run.cores // 3)) as pool:
        done = dict(zip(FAMILIES, pool.map(warm, FAMILIES), strict=True))
    unfinished = [family for family, each in done.items() if not each.ok]
    # what is missing here is compiled, or fails, when it is timed
    return Outcome("done", "compiled" + (f"; not all of {', '.join(unfinished)}" if unfinished else ""))


def _bench(family: str, run: Run) -> Outcome:
    """The worker writes after every case, so that what was measured is kept; a GPU that an illegal access has broken
    is opened anew by another process, which goes on with the next case."""
    waiting = list(FAMILIES)[list(FAMILIES).index(family) :]
    share = FAMILIES[family] / sum(FAMILIES[name] for name in waiting)
    seconds = max(run.seconds_left() * share, 8.0)
    found = run.path("families", f"{family}.json")
    if run.before.get(f"bench:{family}") != "cut off":  # else it goes on with the next case
        found.unlink(missing_ok=True)
    limit = 1.5 * seconds + 20 if not run.dry_run else 300
    for attempt in range(4):
        worker = _worker(run, family, "--seconds", str(round(seconds, 1)))
        done = run.process(f"bench:{family}" + f"-{attempt}" * (attempt > 0), worker, limit)
        if done.ok or done.cut_off or not found.exists():
            break
    if not found.exists():
        return _not_done(done, "the benchmark")
    whole = json.loads(found.read_text())
    kinds = {"cases": "measured", "failed": "failed", "absent": "not here", "left": "left for want of time"}
    what = ", ".join(f"{len(whole[kind])} {name}" for kind, name in kinds.items() if whole[kind])
    state = "cut off" if done.cut_off or whole["left"] else "failed" if whole["failed"] else "done"
    if not done.ok:
        outcome = _not_done(done, "the benchmark")
        state, what = outcome.state, f"{what}; {outcome.what}"
    return Outcome(state, what, {"file": f"families/{family}.json"})


_BUILDS = ("torch", "setuptools", "pybind11", "cmake", "ninja", "a C++ compiler", "numpy")
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("machine", 0, _machine),
        Part("build", 1, _build, _BUILDS, ("nvcc",), needed=True),
        Part("ceilings", 2, _ceilings, ("torch", "numpy"), ("nvcc",), alone=True),
        Part("tests", 3, _tests, ("pytest", "hypothesis"), ("triton",)),
        Part("conformance", 3, _conformance, ("a C++ compiler", "numpy"), ("nvcc",)),
        Part("sanitizer", 3, _sanitizer, ("torch",), ("compute-sanitizer",)),
        Part("warm", 3, _warm, ("tqdm",)),
        *(Part(f"bench:{name}", 4, partial(_bench, name), ("tqdm", "numpy"), alone=True) for name in FAMILIES),
    )
}
