"""The conformance program without a GPU: it tries every wrapper, the emulation agrees with the definitions, nvcc takes
it. What a GPU gives is compared where there is one (`make gpu`)."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import Counter
from itertools import product

import numpy as np
import pytest

from cuda_host import backend, build, conformance
from cuda_host.conformance import INSTRUCTIONS

BLOCKS = 6
SCHEDULES = list(product(range(4), (0, 1)))

emulates = pytest.mark.skipif(backend.why_not() is not None, reason=str(backend.why_not()))
compiles = pytest.mark.skipif(conformance.nvcc() is None, reason="nvcc is not installed")
programs = pytest.mark.parametrize("name", conformance.SOURCES)


def wrappers(name: str) -> list[str]:
    """Names of a header's functions that are PTX, as often as they are overloaded."""
    found = re.findall(r"^__device__ inline [\w ]+?[ *](\w+)\(", conformance.SOURCES[name].header.read_text(), re.M)
    return [function for function in found if function != "settle"]


def texts(name: str) -> list[str]:
    """Every text of PTX in a header, put together by the preprocessor, and the places of its operands as `%`."""
    options = ("-std=c++20", "-E", "-P", "-x", "c++", f"-I{build.HERE}", f"-I{conformance.HEADERS}")
    command = ["g++", *options, str(conformance.SOURCES[name].header)]
    whole = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if name != "general":  # what it includes is the other program's
        whole = whole[whole.rindex("begin_barrier(") :]
    found = re.findall(r'::emulation::execute\(\s*((?:"[^"]*"\s*)+),', whole)
    return ["".join(re.findall(r'"([^"]*)"', text)) for text in found]


@programs
def test_the_header_is_read_whole(name):
    source = conformance.SOURCES[name].header.read_text()
    assert len(wrappers(name)) == len(texts(name)) == len(re.findall(r"EK_PTX(?:_PURE)?\((?!text)", source))
    assert len(wrappers(name)) > {"general": 45, "hopper": 29}[name]


@programs
def test_every_wrapper_is_tried(name):
    source = conformance.SOURCES[name]
    program = source.file.read_text()
    cases = re.findall(r'>\(\s*"([^"]+)"', program)
    assert sorted(cases) == sorted(source.instructions)
    called = set(re.findall(r"ptx::(\w+)", program))
    assert not set(wrappers(name)) - called
    # several functions of one name have a case each; other cases are further operands of one function
    tried = Counter(case.split()[0] for case in cases)
    assert set(tried) == set(wrappers(name))
    assert all(tried[function] >= count for function, count in Counter(wrappers(name)).items())


@emulates
@programs
@pytest.mark.parametrize(("order", "latest"), SCHEDULES)
def test_the_emulation_agrees_with_the_definitions(name, order, latest):
    program = conformance.emulated(name)
    cases = program.cases()
    program.library.embedding_kernels_emulation_options(order, ctypes.c_uint64(order + 1), latest)
    try:
        wrong = {case.name: conformance.check(case, {"the emulation": program}, BLOCKS, seed=order) for case in cases}
    finally:
        program.library.embedding_kernels_emulation_options(0, ctypes.c_uint64(0), 0)
    assert not [case for case, found in wrong.items() if found], wrong


class Altered(conformance.Program):
    """The emulation with one result changed: in its last bit, or, where a tolerance holds, by a hundredth."""

    def run(self, case, operands):
        results = super().run(case, operands)
        values = results.view(np.float32)
        if INSTRUCTIONS[case.name].tolerance is None:
            results[-1, -1, -1] ^= 1
        else:
            values[-1, -1, -1] = values[-1, -1, -1] * 1.01 + 0.01
        return results


@emulates
@pytest.mark.parametrize(
    ("name", "wrapper"), [(name, case) for name, source in conformance.SOURCES.items() for case in source.instructions]
)
def test_a_wrong_result_is_found(name, wrapper):
    program = conformance.emulated(name)
    source = conformance.SOURCES[name]
    altered = Altered(build.build_kernels(source.file), source.architecture)
    case = next(case for case in program.cases() if case.name == wrapper)
    found = conformance.check(case, {"the emulation": program, "the GPU": altered}, BLOCKS)
    kinds = INSTRUCTIONS[wrapper].operands
    for kind in kinds:
        assert f"{wrapper}, {kind}: the GPU differs from the definition in 1 of" in "\n".join(found)
        assert f"{wrapper}, {kind}: the GPU differs from the emulation in 1 of" in "\n".join(found)
    assert len(found) == 2 * len(kinds)


def without_spaces(text: str) -> str:
    return re.sub(r"\s", "", text)


def as_assembled(text: str) -> re.Pattern[str]:
    """What nvcc makes of a text: registers, or a number, where its operands stand."""
    return re.compile(r"(?:%\w+|-?\d+)".join(map(re.escape, re.split(r"%\d+", without_spaces(text)))))


@compiles
@pytest.mark.parametrize(
    ("name", "target"), [("general", "80"), ("general", "90a"), ("hopper", "90a")], ids=lambda value: value
)
def test_nvcc_assembles_every_text(name, target, tmp_path):
    options = (f"-gencode=arch=compute_{target},code=sm_{target}", "-cubin", "--keep", f"--keep-dir={tmp_path}")
    source = conformance.SOURCES[name]
    conformance.compile_for_gpu(source, tmp_path / "conformance.cubin", *options)
    written = (tmp_path / f"{source.file.stem}.ptx").read_text()
    inline = {
        without_spaces(text) for text in re.findall(r"// begin inline asm\n(.*?)// end inline asm", written, re.S)
    }
    missing = [text for text in texts(name) if not any(map(as_assembled(text).fullmatch, inline))]
    assert not missing
    assert len(inline) >= len(set(texts(name)))
