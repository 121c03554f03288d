"""Builds the host emulation: the CUDA sources compiled by g++ with every memory access instrumented, the emulation, and
the operators under a namespace of their own. Recompiles what changed; `python build.py` prints the library's path."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "cuda_host"

COMMON = ("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-MMD")
# -O1: loads and stores stay as they are written; patterns in variables that nobody set; no runtime of a sanitizer
INSTRUMENTED = (
    *("-O1", "-x", "c++", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
    *("-fsanitize=alignment,bounds", "-ftrivial-auto-var-init=pattern", "-fno-threadsafe-statics"),
    # a variable's place is not given to another, which a product under way could still be using
    "-fstack-reuse=none",
    # contraction off: multiplications and additions are fused only where the source says so
    *("-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-unused-parameter", f"-I{HERE}"),
)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    return Path(spec.origin).parent


def _torch_flags() -> tuple[str, ...]:
    return (
        *("-DEMBEDDING_KERNELS_CUDA_HOST", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
        *("-isystem", str(_torch() / "include")),
    )


@contextmanager
def _alone() -> Iterator[None]:
    """Several test processes may want the library at once."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_fresh(target: Path, command: Sequence[str]) -> bool:
    record, dependencies = target.with_suffix(".command"), target.with_suffix(".d")
    if not (target.exists() and record.exists() and record.read_text() == "\n".join(command)):
        return False
    names = dependencies.read_text().replace("\\\n", " ").split()[1:]
    made = target.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime <= made for name in names)


def _compile(source: Path, flags: Sequence[str]) -> Path:
    target = OUTPUT / f"{source.parent.name}_{source.name}.o"
    command = ["g++", *COMMON, *flags, "-c", str(source), "-o", str(target), "-MF", str(target.with_suffix(".d"))]
    if _is_fresh(target, command):
        return target
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"g++ refuses {source}:\n{run.stderr[-6000:]}")
    target.with_suffix(".command").write_text("\n".join(command))
    return target


def _link(name: str, work: Sequence[tuple[Path, Sequence[str]]], libraries: Sequence[str]) -> Path:
    with _alone(), ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        objects = list(pool.map(lambda pair: _compile(*pair), work))
        target = OUTPUT / name
        if target.exists() and all(path.stat().st_mtime <= target.stat().st_mtime for path in objects):
            return target
        # beside and then renamed: a process that has the old one mapped keeps it
        fresh = target.with_suffix(".new")
        # the emulation first: of an inline function that several objects hold, its own copy is kept
        objects.sort(key=lambda path: not (path.name.startswith(HERE.name) and path.name.endswith(".cpp.o")))
        command = ["g++", "-shared", *map(str, objects), *libraries, "-o", str(fresh), "-Wl,--no-undefined", "-ldl"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"the emulation does not link:\n{run.stderr[-6000:]}")
        fresh.rename(target)
        return target


def _emulation() -> list[tuple[Path, Sequence[str]]]:
    flags = ("-O2", "-fvect-cost-model=dynamic")  # products are loops for vector instructions
    return [(path, flags) for path in sorted(HERE.glob("*.cpp")) if not path.name.startswith("fragments_cute")]


def build_library() -> Path:
    """The operators of csrc/cuda as ``torch.ops.embedding_kernels_cuda_host``, on CPU tensors."""
    sources = [(path, (*INSTRUMENTED, *_torch_flags())) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    ops = [(ROOT / "csrc" / "ops.cpp", ("-O1", *_torch_flags()))]
    # the slowest first
    work = sorted(sources, key=lambda pair: -pair[0].stat().st_size) + ops + _emulation()
    return _link("_cuda_host.so", work, [str(_torch() / "lib" / "libtorch_cpu.so")])


def build_kernels(source: Path) -> Path:
    """Kernels of a test, which export C functions of their own, without torch."""
    flags = (*INSTRUMENTED, f"-I{ROOT / 'csrc' / 'cuda'}")
    return _link(f"{source.stem}.so", [(source, flags), *_emulation()], [])


if __name__ == "__main__":
    print(build_library())
    sys.exit(0)
