"""The program that measures what a GPU's units do at most: its loops hold the instructions that are counted and no
access to memory; what comes out of it is read and told. No GPU takes part."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"

pytestmark = pytest.mark.skipif(not (BENCH / "tensor_rates.cu").exists(), reason="the benchmarks are not in this tree")

#: the unit's name in the program; its instruction, and how many a round has
LOOPS = {
    "MultiplyBfloat16": (r"HMMA\.16816\.F32\.BF16", 32),
    "MultiplyBits": (r"BMMA\.168256\.AND\.POPC", 32),
    "CountBits": (r"POPC", 64),
    "Exp2": (r"MUFU\.EX2", 64),
    "FusedMultiplyAdd": (r"FFMA", 64),
}
HOPPER_LOOPS = {
    "MultiplyTilesBfloat16": (r"HGMMA\.64x128x16\.F32\.BF16", 16),
    "MultiplyHeldBfloat16": (r"HGMMA\.64x256x16\.F32\.BF16", 16),
    "CountCommonBits": (r"BGMMA\.64x256x256\.AND\.POPC", 16),
}
# besides: the counter, the branch, and what products of warpgroups are begun and waited for by
BESIDE = r"(U?IADD3|VIADD|U?ISETP|BRA|NOP|U?MOV|R2UR|WARPGROUP|WARPSYNC)\b"
CASES = [("80", name) for name in LOOPS] + [("90a", name) for name in LOOPS | HOPPER_LOOPS]


@pytest.fixture
def modules(monkeypatch):
    """Modules of `make gpu`: they stand beside it and belong to no package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield {name: importlib.import_module(name) for name in ("gpu_run", "gpu_report", "tensor_rates", "gpu_parts")}
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


@cache
def listing(command: tuple[str, ...], target: Path) -> str:
    """The program's instructions, of nvcc's command that makes it."""
    triton = pytest.importorskip("triton")
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    built = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    said = built.stdout + built.stderr
    assert "warning" not in said.lower(), said
    assert set(re.findall(r"(\d+) bytes spill stores", said)) == {"0"}
    return subprocess.run([program, "--dump-sass", target], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rates")


def instructions_of(listing: str, unit: str) -> list[tuple[int, str, str]]:
    """(address, name, operands) of the kernel of a unit."""
    found = [body for body in listing.split("Function : ")[1:] if f"{len(unit)}{unit}E" in body.split(maxsplit=1)[0]]
    assert len(found) == 1
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", found[0], re.M)
    return [(int(address, 16), name, operands) for address, name, operands in lines]


def loops_of(instructions: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """First and last address of what a branch goes back over; a program's last one, to itself, is none."""
    back = [(int(operands.split("0x")[1].split()[0], 16), at) for at, name, operands in instructions if name == "BRA"]
    return [(first, last) for first, last in back if first < last]


@pytest.mark.parametrize(("architecture", "unit"), CASES)
def test_the_loop_is_what_is_counted(modules, folder, architecture, unit):
    if not modules["gpu_run"].program("nvcc", modules["gpu_run"].CUDA_BIN):
        pytest.skip("nvcc is not installed")
    target = folder / f"sm_{architecture}"
    command = modules["tensor_rates"].command(architecture, target)
    instructions = instructions_of(listing(tuple(command), target), unit)
    pattern, count = (LOOPS | HOPPER_LOOPS)[unit]
    first, last = loops_of(instructions)[-1]
    held = Counter(name for at, name, _ in instructions if first <= at <= last)
    counted = {name: number for name, number in held.items() if re.match(pattern, name)}
    assert sum(counted.values()) == count, held
    assert not [name for name in held.keys() - counted.keys() if not re.match(BESIDE, name)], held
    # none of it stands outside the loop, which is timed from before to behind
    assert not [name for at, name, _ in instructions if not first <= at <= last and re.match(pattern, name)]
    clocks = [at for at, name, operands in instructions if name == "CS2R" and "CLOCK" in operands]
    assert [at < first for at in clocks] == [True, False]


def test_what_must_not_be_in_a_loop_would_be_found():
    for wrong in ("LDG.E", "STS.128", "LDS", "LDL", "STL.64", "BAR.SYNC.DEFER_BLOCKING", "IMAD.MOV.U32"):
        assert not re.match(BESIDE, wrong), wrong


FOUND = {
    "gpu": "a GPU", "compute_capability": "9.0", "multiprocessors": 132, "megahertz_at_most": 1980,
    "rates": [
        {"name": "popc.b32", "operations_are": "words counted", "warps": warps, "operations_per_second": rate,
         "operations_per_clock_and_multiprocessor": rate / 2.4e11, "megahertz": 1815, "milliseconds": 10.0}
        for warps, rate in ((4, 2e12), (8, 4e12), (16, 3e12))
    ],
    "launch_microseconds": {"back_to_back": 2.1, "synchronised": 7.5},
}  # fmt: skip


def test_the_best_number_of_warps_is_told(modules):
    (best,) = modules["tensor_rates"].best(FOUND)
    assert best["warps"] == 8
    text = "\n".join(modules["gpu_report"]._ceilings({"rates": FOUND}))
    assert "| popc.b32 | 4 words counted | 16.7 | 8 | 1815 |" in text
    assert "An empty kernel: 2.1 µs behind another, 7.5 µs waited for" in text


def test_the_part_reads_what_the_program_prints(modules, monkeypatch, tmp_path):
    """A program that prints numbers takes the place of nvcc's; torch's ceilings are a processor's."""
    gpu_parts, gpu_run = modules["gpu_parts"], modules["gpu_run"]
    made = tmp_path / "prints.py"
    made.write_text(f"#!{sys.executable}\nprint({json.dumps(FOUND)!r})\n")
    made.chmod(0o755)
    monkeypatch.setattr(modules["tensor_rates"], "command", lambda architecture, target: ["cp", str(made), str(target)])
    monkeypatch.setattr(gpu_parts, "missing", lambda names: {})
    monkeypatch.setattr(gpu_parts, "device_of_torch", lambda: gpu_run.Device("a GPU", (9, 0)))
    monkeypatch.setattr(gpu_run.Run, "device", "cpu")
    run = gpu_run.Run(tmp_path, dry_run=False, slow=False, minutes=1.0, cores=2)
    assert gpu_parts._rates_program(run).state == "done"
    outcome = gpu_parts._ceilings(run)
    assert outcome.state == "done", outcome
    assert outcome.what.startswith("3 rates at 1815 to 1815 MHz; read bandwidth ")
    assert outcome.found["rates"] == FOUND
    names = [one["name"] for one in outcome.found["torch"]]
    assert names == ["read bandwidth", "copy bandwidth", "bfloat16 matrix product"]
    assert all(one["gigabytes_per_second"] or one["giga_operations_per_second"] for one in outcome.found["torch"])


def test_a_program_that_fails_is_the_parts_outcome(modules, monkeypatch, tmp_path):
    gpu_parts, gpu_run = modules["gpu_parts"], modules["gpu_run"]
    monkeypatch.setattr(gpu_parts, "missing", lambda names: {})
    monkeypatch.setattr(
        modules["tensor_rates"], "command", lambda architecture, target: ["cp", "/bin/false", str(target)]
    )
    run = gpu_run.Run(tmp_path, dry_run=False, slow=False, minutes=1.0, cores=2)
    assert gpu_parts._rates_program(run).state == "done"
    outcome = gpu_parts._tensor_rates(run, run.path("tensor_rates", "sm_90a.bin"))
    assert outcome.state == "failed"
    assert outcome.what.startswith("the program of rates ended with code 1")
