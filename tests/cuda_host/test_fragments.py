"""Fragment maps of the emulation against CuTe's, NVIDIA's own: kernel and emulation have one author, and could share a
misreading."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from cuda_host import backend, build

pytestmark = pytest.mark.skipif(backend.why_not() is not None, reason=str(backend.why_not()))


def cutlass() -> Path:
    """CUTLASS's headers, from the package nvidia-cutlass."""
    try:
        files = metadata.files("nvidia-cutlass") or []
    except metadata.PackageNotFoundError:
        pytest.skip("nvidia-cutlass is not installed")
    header = next(file for file in files if str(file).endswith("include/cute/layout.hpp"))
    return Path(str(header.locate())).parents[1]


def toolkit() -> Path:
    """Headers of the CUDA toolkit."""
    places = (
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        Path(shutil.which("nvcc") or "/bin/nvcc").resolve().parents[1],
    )
    for headers in (Path(place) / "include" for place in places if place):
        if (headers / "cuda_runtime_api.h").exists():
            return headers
    pytest.skip("the CUDA toolkit's headers are not installed")


def test_maps_equal_cute(tmp_path):
    program = tmp_path / "compare"
    folders = (cutlass(), toolkit(), toolkit() / "cccl", build.HERE)
    command = ["g++", "-std=c++20", "-O1", "-w", *(f"-I{folder}" for folder in folders)]
    subprocess.run([*command, build.HERE / "fragments_cute.cpp", "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "9024 compared, 0 differ", run.stdout[:2000]
