"""Asks CMake to build the libraries and puts them into the package; sources and flags stand in CMakeLists.txt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "embedding_kernels"
MIN_TORCH = (2, 11)
# environment variables that CMake is given, with what is meant where they are not set
PASSED_ON = {
    "EMBEDDING_KERNELS_CUDA": "AUTO",
    "EMBEDDING_KERNELS_CUDA_ARCHS": "80;90a",
    "EMBEDDING_KERNELS_SANITIZE": "OFF",
}
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}


def fail(message: str) -> None:
    sys.exit(f"\nembedding-kernels: {message}\n")


def program(name: str) -> str:
    """The environment's own program before the system's: an environment that is not activated is not on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        fail(f"building needs {name}; run: pip install 'cmake>=3.26' ninja pybind11 'setuptools>=77,<82'")
    return found  # type: ignore[return-value]


def find_torch() -> tuple[Path, str]:
    """Folder and version of torch, without paying for its import."""
    from importlib import metadata, util

    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("building needs torch >= 2.11 in this environment; install it, then: pip install --no-build-isolation .")
    version = metadata.version("torch")
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
    if (major, minor) < MIN_TORCH:
        fail(f"building needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, found {version}")
    return Path(spec.origin).parent, version  # type: ignore[union-attr, arg-type]


def require_compiler() -> None:
    compiler = os.environ.get("CXX", "")
    if shutil.which(compiler.split()[0] if compiler else "c++") is None and shutil.which("g++") is None:
        fail(f"building needs a C++20 compiler, found none{f' (CXX={compiler})' if compiler else ''}")


class BuildPy(build_py):
    """Starts from an empty folder, so that a file deleted from the sources does not reach a wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        import pybind11

        torch_directory, torch_version = find_torch()
        # one folder an environment, kept between builds: an editable install recompiles only what changed
        tag = f"{sys.implementation.cache_tag}-torch{torch_version}".replace("+", "-")
        if os.environ.get("EMBEDDING_KERNELS_SANITIZE", "OFF") != "OFF":
            tag += "-sanitize"
        build = ROOT / "build" / f"cmake-{tag}"
        options = {
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "TORCH_DIRECTORY": torch_directory,
            "TORCH_VERSION": torch_version,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            **{name: os.environ.get(name) or default for name, default in PASSED_ON.items()},
        }
        cmake = program("cmake")
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        self.cmake([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        self.cmake([cmake, "--build", str(build)])
        target = ROOT / "python" / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        self.cmake([cmake, "--install", str(build), "--prefix", str(target)])

    def cmake(self, command: list[str]) -> None:
        if subprocess.run(command, check=False).returncode != 0:
            fail(f"`{' '.join(command[:3])} …` failed; its messages stand above")


if BUILD_COMMANDS & set(sys.argv[1:]):
    find_torch()
    require_compiler()

setup(
    # named so that setuptools knows the wheel is not pure Python; CMake decides what is built
    ext_modules=[Extension(f"{PACKAGE}._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
