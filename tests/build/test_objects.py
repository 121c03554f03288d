"""What the compiler made: which instructions stand where, no weak symbols in loops, only stable symbols of torch."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from embedding_kernels import _library

ROOT = Path(__file__).parents[2]
LOOPS = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*_loops.cpp"))
LEVELS = ("portable", "avx2", "avx512", "amx")

# instructions that the level's loops must hold, and registers that only a higher one may use
MARKS = {
    "anchor_scores_attention_loops": {
        "avx2": ("vfmadd.*ymm",),
        "avx512": ("vfmadd.*zmm", "vdpbf16ps.*zmm"),
        "amx": ("tdpbf16ps",),
    },
    "anchor_scores_loops": {"avx2": ("vfmadd.*ymm",), "avx512": ("vfmadd.*zmm", "vscalefps.*zmm")},
    "attention_loops": {"avx2": ("vfmadd.*ymm",), "avx512": ("vfmadd.*zmm", "vdpbf16ps.*zmm"), "amx": ("tdpbf16ps",)},
    "attention_backward_loops": {"avx2": ("vfmadd.*ymm",), "avx512": ("vfmadd.*zmm",), "amx": ("vfmadd.*zmm",)},
    "hamming_loops": {
        "avx2": ("vpshufb.*ymm",),
        "avx512": ("vpopcntq.*zmm",),
        "amx": ("tdpbssd", "tileloaddt1", "vgf2p8affineqb.*zmm"),
    },
    "latent_attention_loops": {"avx2": ("vfmadd.*ymm",), "avx512": ("vfmadd.*zmm", "vscalefps.*zmm")},
    "norm_loops": {"avx2": ("vcvtph2ps.*ymm",), "avx512": ("vcvtph2ps.*zmm",)},
    "paragraph_vector_loops": {"avx2": ("vfmadd.*ymm",), "avx512": ("vfmadd.*zmm",)},
    "pooling_loops": {"avx2": ("vcvtph2ps.*ymm",), "avx512": ("vcvtph2ps.*zmm",)},
    "rescore_loops": {"avx2": ("vfmadd.*ymm", "vpmovsxbd.*ymm"), "avx512": ("vfmadd.*zmm", "vpmovsxbd.*zmm")},
}
FORBIDDEN = {"portable": r"%[yzt]mm", "avx2": r"%[zt]mm", "avx512": r"%tmm", "amx": r"(?!)"}
# other families have no products for tiles
OBJECTS = [(level, name) for name in LOOPS for level in LEVELS if level != "amx" or "amx" in MARKS.get(name, ())]

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="one level on this processor"),
]


def newest_build() -> Path:
    built = [path for path in (ROOT / "build").glob("cmake-*") if "sanitize" not in path.name]
    if not built:
        pytest.skip("the package was not built from this tree")
    return max(built, key=lambda path: path.stat().st_mtime)


def loops_object(level: str, name: str) -> Path:
    return newest_build() / "CMakeFiles" / f"loops_{level}.dir" / "csrc" / "cpu" / f"{name}.cpp.o"


@cache
def disassembly(path: Path) -> str:
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout


@cache
def symbols(path: Path) -> str:
    return subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout


def test_every_loops_file_has_its_marks():
    assert set(MARKS) == set(LOOPS)


@pytest.mark.parametrize(("level", "name"), OBJECTS)
def test_loops_hold_no_weak_or_foreign_symbols(name, level):
    """A weak function compiled with AVX-512 could be the copy that the linker gives to everybody."""
    listing = symbols(loops_object(level, name))
    assert not re.findall(r"^.* [WVu] .*$", listing, re.M)
    undefined = set(re.findall(r"^ +U (\S+)$", listing, re.M))
    # what the compiler itself calls for copies and, without the instruction, for counting bits
    assert undefined <= {"memcpy", "memset", "memmove", "__popcountdi2", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}


@pytest.mark.parametrize(("level", "name"), OBJECTS)
def test_instructions_are_where_they_belong(name, level):
    text = disassembly(loops_object(level, name))
    assert not re.search(FORBIDDEN[level], text)
    for mark in MARKS[name].get(level, ()):
        assert re.search(mark, text), mark


def test_other_objects_hold_no_vector_instructions():
    others = [p for p in newest_build().glob("CMakeFiles/*.dir/**/*.cpp.o") if "loops_" not in str(p)]
    assert len(others) >= 5
    for path in others:
        assert not re.search(r"%[yz]mm", disassembly(path)), path


@pytest.mark.parametrize("library", ("_cpu.so", "_cuda.so"))
def test_only_the_stable_interface_of_torch_is_used(library):
    path = _library.CPU.path.with_name(library)
    if not path.exists():
        pytest.skip(f"{library} was not built")
    listing = subprocess.run(["nm", "-DC", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^ +U (.+?)(?:@.*)?$", listing, re.M)
    assert not [name for name in names if re.match(r"(at|c10|torch)::", name)]
    ours = [name for name in names if name.startswith(("aoti_torch_", "torch_"))]
    assert len(ours) > 10  # test_cuda_kernels.py holds them against the oldest torch


@pytest.mark.parametrize("name", [*LOOPS, "isa", "dispatch"])
def test_portable_level_compiles_for_aarch64(name, tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no compiler for aarch64")
    source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
    command = [compiler, "-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", "-c", source, "-o", tmp_path / "out.o"]
    subprocess.run(command, check=True)
