"""Fragment maps, descriptors and places in tiles, of the emulation and of the kernels, against CuTe's, NVIDIA's own:
kernel and emulation have one author, and could share a misreading."""

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


def compiled(name: str, folder: Path, *includes: Path) -> Path:
    target = folder / f"{name}.o"
    command = ["g++", "-std=c++20", "-O1", "-w", *(f"-I{include}" for include in (*includes, build.HERE))]
    subprocess.run([*command, "-c", build.HERE / f"{name}.cpp", "-o", target], check=True)
    return target


def linked(*objects: Path) -> Path:
    program = objects[0].with_suffix("")
    subprocess.run(["g++", *objects, "-o", program], check=True)
    return program


def with_cute() -> tuple[Path, ...]:
    return (cutlass(), toolkit(), toolkit() / "cccl")


def last_line(program: Path, *arguments: str) -> str:
    run = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert run.returncode == (not run.stdout.endswith(" 0 differ\n")), run.stdout[-2000:]
    return run.stdout.splitlines()[-1]


def test_maps_equal_cute(tmp_path):
    program = linked(compiled("fragments_cute", tmp_path, *with_cute()))
    assert last_line(program) == "9024 compared, 0 differ"


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper")
    kernels = compiled("fragments_cute_kernels", folder, build.ROOT / "csrc" / "cuda")
    return linked(compiled("fragments_cute_hopper", folder, *with_cute()), kernels)


def test_warpgroups_and_tiles_equal_cute(hopper):
    assert last_line(hopper) == "1683212 compared, 0 differ"


@pytest.mark.parametrize(
    ("bit", "differ"),
    [
        pytest.param(0, 1569028, id="start: descriptors and places"),
        pytest.param(3, 1569028, id="start, by a row"),
        pytest.param(16, 168196, id="leading: counts where columns lie along the sum"),
        pytest.param(32, 1336580, id="stride"),
        pytest.param(49, 520, id="base offset: no place is known"),
        pytest.param(62, 520, id="no swizzle"),
        pytest.param(63, 520, id="another swizzle"),
    ],
)
def test_a_wrong_bit_of_descriptors_is_found(hopper, bit, differ):
    assert last_line(hopper, str(bit)) == f"1683212 compared, {differ} differ"
