"""The conformance programs: every wrapper of csrc/cuda/ptx.cuh and ptx_hopper.cuh on random operands, in the emulation
and on a GPU.

``python tests/cuda_host/conformance.py`` builds `conformance.cu` and `conformance_hopper.cu` by g++ with the emulation
and, where nvcc and a GPU are, by nvcc; holds what comes out of each against a definition in NumPy, written from the PTX
ISA's words, and the two against each other: bit for bit, or, for approximations and for sums in floating point, within
the bounds that the ISA states (`tolerance` below). Hopper's wrappers run on GPUs of compute capability 9.0 alone. It
ends with 0 only if all agree, and says which half ran.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

if __package__ in (None, ""):  # run as a file: its package is the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cuda_host import build
from cuda_host.conformance_definitions import INSTRUCTIONS as GENERAL
from cuda_host.conformance_definitions import Instruction, Words
from cuda_host.conformance_definitions_hopper import HOPPER

HEADERS = build.ROOT / "csrc" / "cuda"
INSTRUCTIONS = GENERAL | HOPPER


@dataclass(frozen=True)
class Source:
    """A program's file, the header whose wrappers it tries, their definitions, the architecture, and nvcc's name of
    a GPU that the program is for."""

    file: Path
    header: Path
    instructions: dict[str, Instruction]
    architecture: int
    target: str


SOURCES = {
    "general": Source(build.HERE / "conformance.cu", HEADERS / "ptx.cuh", GENERAL, 80, "-arch=native"),
    "hopper": Source(
        build.HERE / "conformance_hopper.cu",
        HEADERS / "ptx_hopper.cuh",
        HOPPER,
        90,
        "-gencode=arch=compute_90a,code=sm_90a",
    ),
}


@dataclass(frozen=True)
class Case:
    """A kernel of the program: threads of a block, words of operands and of results of a thread."""

    number: int
    name: str
    threads: int
    operands: int
    results: int


class Program:
    """The program built one way: its kernels, run on operands of [blocks, threads, words]."""

    def __init__(self, path: Path, architecture: int | None = None) -> None:
        """`architecture`: the one that the emulation plays."""
        self.library = ctypes.CDLL(str(path))
        self.library.conformance_case.restype = ctypes.c_char_p
        self.library.conformance_run.restype = ctypes.c_char_p
        if architecture is not None:
            self.library.embedding_kernels_emulation_architecture(architecture)

    def cases(self) -> list[Case]:
        numbers = (ctypes.c_int * 3)()
        found = []
        for number in range(self.library.conformance_count()):
            name = self.library.conformance_case(number, numbers).decode()
            found.append(Case(number, name, *numbers))
        return found

    def run(self, case: Case, operands: Words) -> Words:
        """Results [blocks, threads, results]; raises RuntimeError with what the emulation or CUDA reports."""
        assert operands.shape[1:] == (case.threads, case.operands)
        operands, results = _aligned(operands), _aligned(np.full((len(operands), case.threads, case.results), _POISON))
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (operands, results)]
        report = self.library.conformance_run(case.number, *pointers, len(operands)).decode()
        if report:
            raise RuntimeError(f"{case.name}: {report}")
        return results


_POISON = np.uint32(0xFFFFFFFF)


def _aligned(words: Words) -> Words:
    """A copy at a multiple of 16 bytes, as CUDA's memory is."""
    room = np.empty(words.size + 4, dtype=np.uint32)
    first = -room.ctypes.data // 4 % 4
    placed = room[first : first + words.size].reshape(words.shape)
    placed[...] = words
    return placed


# ---- building ----


def nvcc() -> str | None:
    return shutil.which("nvcc") or next(map(str, Path("/usr/local/cuda/bin").glob("nvcc")), None)


def compile_for_gpu(source: Source, target: Path, *options: str) -> Path:
    """By nvcc, which needs no GPU unless ``-arch=native`` is among the options."""
    program = nvcc()
    assert program, "nvcc is not installed"
    command = [program, "-std=c++20", "-O3", *options, f"-I{HEADERS}", str(source.file), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc refuses {source.file.name}:\n{done.stderr[-6000:]}")
    return target


@cache
def emulated(name: str) -> Program:
    return Program(build.build_kernels(SOURCES[name].file), SOURCES[name].architecture)


@cache
def on_gpu(name: str) -> Program:
    build.OUTPUT.mkdir(parents=True, exist_ok=True)
    target = build.OUTPUT / f"{SOURCES[name].file.stem}_gpu.so"
    return Program(compile_for_gpu(SOURCES[name], target, "-shared", "-Xcompiler", "-fPIC", SOURCES[name].target))


def capability() -> tuple[int, int] | None:
    """Of the first GPU, None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    steps = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    return (major.value, minor.value) if all(step() == 0 for step in steps) else None


# ---- comparing ----


def differences(instruction: Instruction, results: Words, expected: Words, allowed: NDArray[np.float64] | None) -> int:
    """How many results differ, beyond what is allowed where something is."""
    if allowed is None:
        return int((instruction.canonical(results) != instruction.canonical(expected)).sum())
    got, wanted = (words.view(np.float32).astype(np.float64) for words in (results, expected))
    with np.errstate(invalid="ignore"):
        same = (got == wanted) | (np.isnan(got) & np.isnan(wanted)) | (np.abs(got - wanted) <= allowed)
    return int((~same).sum())


def check(case: Case, programs: dict[str, Program], blocks: int, seed: int = 0) -> list[str]:
    """What is wrong with a case: every program against the definition, and the last against the first."""
    wrong = []
    instruction = INSTRUCTIONS[case.name]
    for kind, draw in instruction.operands.items():
        seeded = np.random.default_rng(seed)
        operands = draw(seeded, (blocks, case.threads, case.operands))
        expected = instruction.definition(operands)
        results = {name: program.run(case, operands) for name, program in programs.items()}
        allowed = instruction.allowed(kind, operands)
        for name, got in results.items():
            if count := differences(instruction, got, expected, allowed):
                wrong.append(f"{case.name}, {kind}: {name} differs from the definition in {count} of {got.size}")
        first, *others = results.items()
        for name, got in others:
            # each may be off by what is allowed, in its own direction
            twice = None if allowed is None else 2 * allowed
            if count := differences(instruction, got, first[1], twice):
                wrong.append(f"{case.name}, {kind}: {name} differs from {first[0]} in {count} of {got.size}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Every PTX wrapper, in the emulation and on a GPU.")
    parser.add_argument("--blocks", type=int, default=32, help="of random operands for each wrapper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--require-gpu", action="store_true", help="fail where no GPU takes part")
    arguments = parser.parse_args(argv)
    gpu = capability() if nvcc() else None
    if gpu is None and arguments.require_gpu:
        print(f"conformance: no {'GPU' if nvcc() else 'nvcc'} here", file=sys.stderr)
        return 2
    wrong, tried = [], []
    for name in SOURCES:
        programs: dict[str, Program] = {"the emulation": emulated(name)}
        if gpu is not None and (name == "general" or gpu == (9, 0)):
            programs["the GPU"] = on_gpu(name)
        cases = emulated(name).cases()
        for case in cases:
            found = check(case, programs, arguments.blocks, arguments.seed)
            print(f"  {case.name:<28} {'WRONG' if found else 'agrees'}", flush=True)
            wrong += found
        tried.append(f"{len(cases)} of {SOURCES[name].header.name} in {' and '.join(programs)}")
    print(f"conformance of the wrappers, {'; '.join(tried)}: {len(wrong)} disagreements")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
