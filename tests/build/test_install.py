"""Installs from a copy of the tree: what a wheel holds, what a stranger without torch or a compiler is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "kernels", "python")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


def tree_copy(target: Path) -> Path:
    target.mkdir()
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "_cuda.architectures")
    for name in BUILD:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=skip)
        elif source.exists():
            shutil.copy(source, target / name)
    return target


def build_wheel(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tree / "dist", tree]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "EMBEDDING_KERNELS_CUDA": "OFF", **environment}
    )


#: the compiler, for which every source of ours is empty: what a wheel holds does not wait for loops to be optimised
HASTY = """#!/bin/bash
source="${@: -1}"
case "$source" in
  */csrc/*.cpp) exec ${COMPILER:-c++} "${@:1:$#-1}" -x c++ /dev/null ;;
  *) exec ${COMPILER:-c++} "$@" ;;
esac
"""


@pytest.mark.slow
def test_a_wheel_holds_the_sources_of_now_and_no_others(tmp_path):
    tree = tree_copy(tmp_path / "tree")
    hasty = tmp_path / "hasty"
    hasty.write_text(HASTY)
    hasty.chmod(0o755)
    compilers = {"CXX": str(hasty), "COMPILER": os.environ.get("CXX", "")}
    stale = tree / "kernels" / "stale.py"
    stale.write_text("raise ImportError\n")
    assert build_wheel(tree, **compilers).returncode == 0
    stale.unlink()
    shutil.rmtree(tree / "dist")
    result = build_wheel(tree, **compilers)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (wheel,) = (tree / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert "embedding_kernels/kernels/stale.py" not in held
    packages = {str(p.relative_to(tree / "python")) for p in (tree / "python" / "embedding_kernels").rglob("*.py")}
    packages |= {f"embedding_kernels/kernels/{path.name}" for path in (tree / "kernels").glob("*.py")}
    assert packages <= held
    assert {"embedding_kernels/_cpu.so", "embedding_kernels/py.typed"} <= held
    assert any(name.startswith("embedding_kernels/_host.") for name in held)
    python = {name for name in held if name.endswith(".py")}
    assert python == packages


def test_without_a_compiler(tmp_path):
    result = build_wheel(tree_copy(tmp_path / "tree"), CXX="no-such-compiler", PATH=str(tmp_path))
    assert result.returncode != 0
    assert "embedding-kernels: building needs a C++20 compiler, found none (CXX=no-such-compiler)" in (
        result.stdout + result.stderr
    )


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "building needs torch >= 2.11 in this environment"),
        ("2.9.1", "building needs torch >= 2.11, found 2.9.1"),
    ],
)
def test_without_a_torch_that_serves(tmp_path, version, message):
    """setup.py finds torch by its metadata; a stand-in shows what it says of one that is missing or too old."""
    tree = tree_copy(tmp_path / "tree")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import importlib.metadata as m, importlib.util as u\n"
        f"version = {version!r}\n"
        "find, ask = u.find_spec, m.version\n"
        "u.find_spec = lambda n, *a: (None if version is None and n == 'torch' else find(n, *a))\n"
        "m.version = lambda n: version if n == 'torch' and version else ask(n)\n"
    )
    result = build_wheel(tree, PYTHONPATH=str(site))
    assert result.returncode != 0
    assert f"embedding-kernels: {message}" in result.stdout + result.stderr


def test_an_edit_of_a_triton_file_takes_effect_at_once():
    """The package's kernels are the top-level folder itself, not a copy."""
    import embedding_kernels

    installed = Path(embedding_kernels.__file__).parent
    if installed.parent != ROOT / "python":
        pytest.skip("not an editable install")
    assert (installed / "kernels").resolve() == ROOT / "kernels"


def test_the_room_of_kernels_does_not_shadow_hugging_face():
    assert not (ROOT / "kernels" / "__init__.py").exists()
