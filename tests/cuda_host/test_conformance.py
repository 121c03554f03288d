"""The conformance program without a GPU: it tries every wrapper, the emulation agrees with the definitions, nvcc takes
it. What a GPU gives is compared where there is one (`make gpu`)."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

from cuda_host import backend, build, conformance
from cuda_host.conformance_definitions import INSTRUCTIONS

HEADER = (build.ROOT / "csrc" / "cuda" / "ptx.cuh").read_text()
PROGRAM = conformance.SOURCE.read_text()
BLOCKS = 6
SCHEDULES = list(product(range(4), (0, 1)))

emulates = pytest.mark.skipif(backend.why_not() is not None, reason=str(backend.why_not()))
compiles = pytest.mark.skipif(conformance.nvcc() is None, reason="nvcc is not installed")


def wrappers() -> list[str]:
    """Names of the header's functions, as often as they are overloaded."""
    return re.findall(r"^__device__ inline [\w ]+?[ *](\w+)\(", HEADER, re.M)


def texts() -> list[str]:
    """Every text of PTX in the header, pieces joined."""
    found = re.findall(r'EK_PTX(?:_PURE)?\(\s*((?:"[^"]*"\s*)+),', HEADER)
    return ["".join(re.findall(r'"([^"]*)"', text)) for text in found]


def opcodes(text: str) -> set[str]:
    """Opcodes of PTX, as `mma.sync.aligned…`; declarations of registers are none."""
    found = (re.match(r"[\s{}]*([a-z][\w.]*)", statement) for statement in text.split(";"))
    return {match.group(1) for match in found if match}


def test_the_header_is_read_whole():
    assert len(wrappers()) == len(texts()) == len(re.findall(r"EK_PTX(?:_PURE)?\(\s*\"", HEADER))
    assert len(wrappers()) > 45


def test_every_wrapper_is_tried():
    cases = re.findall(r'_warps?<.*>\("([^"]+)"\)', PROGRAM)
    assert set(cases) == set(INSTRUCTIONS)
    assert Counter(case.split()[0] for case in cases) == Counter(wrappers())
    called = set(re.findall(r"ptx::(\w+)", PROGRAM))
    assert not set(wrappers()) - called


@emulates
@pytest.mark.parametrize(("order", "latest"), SCHEDULES)
def test_the_emulation_agrees_with_the_definitions(order, latest):
    program = conformance.emulated()
    cases = program.cases()
    program.library.embedding_kernels_emulation_options(order, ctypes.c_uint64(order + 1), latest)
    try:
        wrong = {case.name: conformance.check(case, {"the emulation": program}, BLOCKS, seed=order) for case in cases}
    finally:
        program.library.embedding_kernels_emulation_options(0, ctypes.c_uint64(0), 0)
    assert not [name for name, found in wrong.items() if found], wrong


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
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_wrong_result_is_found(name):
    program = conformance.emulated()
    altered = Altered(build.build_kernels(conformance.SOURCE))
    case = next(case for case in program.cases() if case.name == name)
    found = conformance.check(case, {"the emulation": program, "the GPU": altered}, BLOCKS)
    kinds = INSTRUCTIONS[name].operands
    for kind in kinds:
        assert f"{name}, {kind}: the GPU differs from the definition in 1 of" in "\n".join(found)
        assert f"{name}, {kind}: the GPU differs from the emulation in 1 of" in "\n".join(found)
    assert len(found) == 2 * len(kinds)


@compiles
@pytest.mark.parametrize("architecture", ("80", "90a"))
def test_nvcc_assembles_every_text(architecture, tmp_path):
    options = (f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-cubin", "--keep")
    conformance.compile_for_gpu(tmp_path / "conformance.cubin", *options, f"--keep-dir={tmp_path}")
    written = (tmp_path / "conformance.ptx").read_text()
    inline = re.findall(r"// begin inline asm\n(.*?)// end inline asm", written, re.S)
    assembled, wanted = (set().union(*map(opcodes, pieces)) for pieces in (inline, texts()))
    assert len(wanted) > 40
    assert not wanted - assembled
