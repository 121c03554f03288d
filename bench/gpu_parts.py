"""The parts of `gpu.py`: what each runs, how long it may take, and what it makes of the answer."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gpu_tests
import results
import tensor_rates
from gpu_run import (
    CUDA_BIN,
    NEEDS,
    PEERS,
    ROOT,
    Device,
    Finished,
    Outcome,
    Part,
    Run,
    device_of_torch,
    fingerprint,
    mend,
    missing,
    not_done,
    program,
)

#: a family's share of the time that is left for benchmarks; what is claimed most stands first
FAMILIES = {
    "attention": 10, "hamming": 6, "norm": 4, "pooling": 3, "latent_attention": 4, "anchor_scores": 2,
    "latent_attention_head": 2, "multi_view": 2, "embedder": 3, "token_prepending": 1,
}  # fmt: skip
CHECKS = ("memcheck", "racecheck", "synccheck")
#: what runs beside the tests ends with them
_UNTIMED_SECONDS = 190
#: kept for what stands behind the benchmarks
_LAST_SECONDS = 45.0
#: longer than any case is, its compilations included
_SILENT_SECONDS = 75.0


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


_PACKAGE = ROOT / "python" / "embedding_kernels"
_STAMP = _PACKAGE / "_built.json"


def _stamp() -> dict[str, Any]:
    """Of what the libraries were built, and that they are those: they may have been built elsewhere."""
    libraries = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(_PACKAGE.glob("*.so"))}
    return {
        "sources": fingerprint(("csrc", "CMakeLists.txt", "setup.py")),
        "python": sys.implementation.cache_tag,
        "libraries": libraries,
    }


def _is_built(device: Device | str) -> bool:
    if not _STAMP.exists() or json.loads(_STAMP.read_text()) != _stamp():
        return False
    listing = _PACKAGE / "_cuda.architectures"
    built = listing.read_text().split(";") if listing.exists() else []
    return isinstance(device, str) or device.architecture in built


def _build(run: Run) -> Outcome:
    """The libraries beside the Python files, by setup.py: nothing is installed, nothing fetched."""
    device = device_of_torch()
    if _is_built(device):
        outcome = _doctor(run, "as built before")
        if outcome.state == "done":
            return outcome
    environment, limit = {"EMBEDDING_KERNELS_CUDA": "AUTO"}, 3600
    if not isinstance(device, str):
        environment = {"EMBEDDING_KERNELS_CUDA": "ON", "EMBEDDING_KERNELS_CUDA_ARCHS": device.architecture}
        limit = 240
    done = run.process("build", [sys.executable, "setup.py", "build_ext", "--inplace"], limit, environment)
    if not done.ok:
        return not_done(done, "the build")
    outcome = _doctor(run, "built")
    if outcome.state == "done":
        results.write(_stamp(), _STAMP)
    return outcome


def _doctor(run: Run, how: str) -> Outcome:
    """What the package says of its libraries."""
    doctor = "from embedding_kernels.doctor import report; import json; print(json.dumps(report()))"
    asked = run.process("doctor", [sys.executable, "-c", doctor], 60)
    if not asked.ok:
        return not_done(asked, "doctor")
    sections = dict(json.loads(asked.last_line))
    cuda = dict(sections["GPU"])["CUDA library"]
    state = "done" if run.dry_run or cuda.startswith("loaded") else "failed"
    return Outcome(state, f"{how}; CUDA library: {cuda}", {"doctor": sections})


# ---- what the machine can do ----


def _rates_program(run: Run) -> Outcome:
    """Compiled beside the libraries; it runs alone."""
    if missing(("nvcc",)):  # asked for where there is a GPU
        return Outcome("done", "no nvcc: the program of rates was not compiled")
    device = device_of_torch()
    architectures = ("90a", "80") if isinstance(device, str) else (device.architecture,)
    for architecture in architectures:
        target = run.path("tensor_rates", f"sm_{architecture}.bin")
        built = run.process(f"tensor-rates-{architecture}", tensor_rates.command(architecture, target), 120)
        if not built.ok:
            return not_done(built, "nvcc, of the program of rates,")
    return Outcome("done", f"the program of rates compiles for sm_{', sm_'.join(architectures)}")


def _ceilings(run: Run) -> Outcome:
    """The units alone, by a program without torch; memory and a large product, by torch: each whatever becomes of the
    other."""
    device = device_of_torch()
    rates = Outcome("done", "no rates without a GPU")
    if not isinstance(device, str):
        rates = _tensor_rates(run, run.path("tensor_rates", f"sm_{device.architecture}.bin"))
    done = run.process("ceilings", [sys.executable, "bench/gpu_ceilings.py", "--device", run.device], 60)
    if not done.ok:
        outcome = not_done(done, "reading, copying and multiplying")
        return Outcome(outcome.state, f"{rates.what}; {outcome.what}", {**rates.found, **outcome.found})
    reached = json.loads(done.last_line)
    each = [
        f"{one['name']} {one['gigabytes_per_second'] or one['giga_operations_per_second']:.0f} G" for one in reached
    ]
    return Outcome(rates.state, f"{rates.what}; {', '.join(each)}", {**rates.found, "torch": reached})


def _tensor_rates(run: Run, built: Path) -> Outcome:
    if not built.exists():
        return Outcome("failed", "the program of rates was not compiled")
    done = run.process("tensor-rates", [str(built)], 60)
    if not done.ok:
        return not_done(done, "the program of rates")
    found = json.loads(done.log.read_text())
    clocks = [rate["megahertz"] for rate in found["rates"]]
    return Outcome("done", f"{len(clocks)} rates at {min(clocks)} to {max(clocks)} MHz", {"rates": found})


# ---- the tests ----


def _tests(run: Run) -> Outcome:
    """Every kernel on small shapes: the rows of the CUDA library first, then Triton's."""
    return gpu_tests.tests("tests", gpu_tests.ROWS, run, 10_000 if run.slow else _UNTIMED_SECONDS)


def _others(run: Run) -> Outcome:
    """Models and modules, which take a GPU where there is one."""
    return gpu_tests.tests("others", gpu_tests.OTHERS, run, 10_000 if run.slow else _last(run), "--gpu-others")


def _last(run: Run) -> float:
    """What stands last has its own time where the benchmarks took theirs."""
    return max(run.seconds_left(), _LAST_SECONDS)


# ---- what is not timed either ----


def _conformance(run: Run) -> Outcome:
    required = [] if run.dry_run else ["--require-gpu"]
    done = run.process("conformance", [sys.executable, "tests/cuda_host/conformance.py", *required], _last(run))
    line = next((x for x in done.tail(200).splitlines() if x.startswith("conformance of")), "")
    if not done.ok:
        return not_done(done, "the conformance program")
    return Outcome("done", line)


def _sanitizer(run: Run) -> Outcome:
    """Our kernels alone are watched; memory comes from CUDA itself, so that its ends are seen."""
    samples = [sys.executable, "tests/run_samples.py", run.device]
    if run.dry_run:
        done = run.process("samples", samples, _UNTIMED_SECONDS)
        return Outcome("done", done.last_line) if done.ok else not_done(done, "the samples")
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
        outcome = not_done(done[wrong[0]], f"{wrong[0]} ({len(wrong)} of {len(CHECKS)} not clean)")
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
        # torch.compile would start a process a core, each of which imports torch
        few = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        return run.process(f"warm:{family}", _worker(run, family, "--warm"), _UNTIMED_SECONDS, few)

    with ThreadPoolExecutor(max(1, run.cores // 4)) as pool:
        done = dict(zip(FAMILIES, pool.map(warm, FAMILIES), strict=True))
    unfinished = [family for family, each in done.items() if not each.ok]
    # what is missing here is compiled, or fails, when it is timed
    return Outcome("done", "compiled" + (f"; not all of {', '.join(unfinished)}" if unfinished else ""))


def _bench(family: str, run: Run) -> Outcome:
    """The worker writes after every case, so that what was measured is kept; a GPU that an illegal access has broken
    is opened anew by another process, which goes on with the next case."""
    waiting = list(FAMILIES)[list(FAMILIES).index(family) :]
    share = FAMILIES[family] / sum(FAMILIES[name] for name in waiting)
    seconds = max((run.seconds_left() - _LAST_SECONDS) * share, 8.0)
    found = run.path("families", f"{family}.json")
    until = time.monotonic() + (1.5 * seconds + 20 if not run.dry_run else 300)
    for attempt in range(4):
        worker = _worker(run, family, "--seconds", str(round(seconds, 1)))
        name = f"bench:{family}" + f"-{attempt}" * (attempt > 0)
        alive = None if run.dry_run else found
        done = run.process(name, worker, until - time.monotonic(), alive=alive, silent=_SILENT_SECONDS)
        if done.ok or done.cut_off or not found.exists():
            break
    if not found.exists():
        return not_done(done, "the benchmark")
    whole = results.read(found)
    if begun := whole.pop("begun", None):
        reason = "no time" if done.cut_off else f"ended its process: {done.last_line}"
        whole["left" if done.cut_off else "failed"].append({**begun, "reason": reason})
        results.write(whole, found)
    kinds = {"cases": "measured", "failed": "failed", "absent": "not here", "left": "left for want of time"}
    what = ", ".join(f"{len(whole[kind])} {name}" for kind, name in kinds.items() if whole[kind])
    state = "cut off" if done.cut_off or whole["left"] else "failed" if whole["failed"] else "done"
    if not done.ok:
        outcome = not_done(done, "the benchmark")
        state, what = outcome.state, f"{what}; {outcome.what}"
    return Outcome(state, what, {"file": f"families/{family}.json"})


_BUILDS = ("torch", "setuptools", "pybind11", "cmake", "ninja", "a C++ compiler", "numpy")
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("machine", 0, _machine, lasts=False),
        Part("build", 1, _build, _BUILDS, ("nvcc",), needed=True, lasts=False),
        Part("rates", 1, _rates_program, (), ("nvcc",)),
        Part("ceilings", 2, _ceilings, ("torch", "numpy"), alone=True),
        Part("tests", 3, _tests, ("pytest", "hypothesis"), ("triton",)),
        Part("sanitizer", 3, _sanitizer, ("torch",), ("compute-sanitizer",)),
        Part("warm", 3, _warm, ("tqdm",)),
        *(Part(f"bench:{name}", 4, partial(_bench, name), ("tqdm", "numpy"), alone=True) for name in FAMILIES),
        Part("conformance", 5, _conformance, ("a C++ compiler", "numpy"), ("nvcc",)),
        Part("others", 5, _others, ("pytest", "hypothesis")),
    )
}
