"""What the units of this GPU do at most: builds tensor_rates.cu by nvcc, runs it and prints its JSON. No torch.

``python bench/tensor_rates.py`` on the first GPU; ``--architecture 90a --build-only`` where there is none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_run import CUDA_BIN, ROOT, program

SOURCE = ROOT / "bench" / "tensor_rates.cu"


def command(architecture: str, target: Path) -> list[str]:
    """nvcc's, for an architecture as nvcc names it ("80", "90a")."""
    hopper = ["-DEMBEDDING_KERNELS_HOPPER"] if architecture == "90a" else []
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    nvcc = program("nvcc", CUDA_BIN) or "nvcc"
    return [nvcc, "-std=c++20", "-O3", code, *hopper, f"-I{ROOT / 'csrc' / 'cuda'}", str(SOURCE), "-o", str(target)]


def best(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each unit, the number of warps that got most out of it."""
    rates: dict[str, dict[str, Any]] = {}
    for rate in found["rates"]:
        before = rates.get(rate["name"])
        if before is None or rate["operations_per_second"] > before["operations_per_second"]:
            rates[rate["name"]] = rate
    return list(rates.values())


def rows(found: Mapping[str, Any]) -> Iterator[str]:
    """A table for people."""
    yield "| unit, operands in registers | 10¹² a second | a clock and multiprocessor | warps | MHz |"
    yield "|---|---|---|---|---|"
    for rate in best(found):
        rate_of = f"{rate['operations_per_second'] / 1e12:.4g} {rate['operations_are']}"
        each = f"{rate['operations_per_clock_and_multiprocessor']:.1f}"
        yield f"| {rate['name']} | {rate_of} | {each} | {rate['warps']} | {rate['megahertz']} |"
    launch = found["launch_microseconds"]
    yield ""
    yield (
        f"An empty kernel: {launch['back_to_back']} µs behind another, {launch['synchronised']} µs waited for; "
        f"{found['multiprocessors']} multiprocessors, at most {found['megahertz_at_most']} MHz."
    )


def _architecture() -> str:
    """Of the first GPU, by the driver's own program."""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    major, minor = map(int, done.stdout.strip().split("."))
    return f"{major}{minor}" + "a" * (major >= 9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", help="as nvcc names it; default: the first GPU's")
    parser.add_argument("--target", type=Path, default=ROOT / "build" / "tensor_rates", help="the program")
    parser.add_argument("--build-only", action="store_true")
    arguments = parser.parse_args()
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(command(arguments.architecture or _architecture(), arguments.target), check=True)
    if not arguments.build_only:
        done = subprocess.run([arguments.target], stdout=subprocess.PIPE, text=True, check=True)
        print(json.dumps(json.loads(done.stdout), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
