"""Every Triton kernel as the GPU will run it: compiled to sm_80 and sm_90 cubins with no GPU here, and inspected."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

#: most registers a thread may take: past 128, four warps a block leave half of the processor's threads unused
REGISTERS = {"pack_padded_kernel": 168, "unpack_padded_kernel": 144}
#: products hold their tiles in registers
REGISTERS |= dict.fromkeys(("attention_kernel", "query_gradient_kernel", "key_gradient_kernel"), 255)
REGISTERS |= {"bias_gradient_kernel": 255, "rotate_kernel": 144, "anchor_attention_kernel": 208}
MOST_REGISTERS = 128
WIDE = {"LDG.E.128", "LDGSTS.E.BYPASS.128"}
SCRIPT = Path(__file__).with_name("compile_kernels.py")


def _why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import numpy

    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        return "triton 3.6 is tested with numpy < 2.4"
    return None


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


@cache
def _compiled() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    # the interpreter, which the other tests run under, replaces triton.jit
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, timeout=1200)
    assert run.returncode == 0, run.stderr[-4000:]
    summary, *kernels = map(json.loads, run.stdout.splitlines())
    return summary, kernels


def _failing(condition: Any) -> list[str]:
    return [f"{k['kernel']} sm_{k['sm']} {k['variant']}: {condition(k)}" for k in _compiled()[1] if condition(k)]


def test_every_kernel_is_compiled():
    assert _compiled()[0]["never_compiled"] == []


def test_both_architectures():
    built = {(kernel["kernel"], kernel["sm"]) for kernel in _compiled()[1]}
    names = {name for name, _ in built}
    assert names
    assert built == {(name, sm) for name in names for sm in (80, 90)}


def test_no_spills():
    def spills(kernel: dict[str, Any]) -> list[str]:
        codes = [code for code in kernel["opcodes"] if re.match("(LDL|STL)", code)]
        return [*codes, *(f"{kernel[memory]} bytes of {memory}" for memory in ("stack", "local") if kernel[memory])]

    assert _failing(spills) == []


def test_registers():
    def excess(kernel: dict[str, Any]) -> int:
        return max(kernel["registers"] - REGISTERS.get(kernel["kernel"], MOST_REGISTERS), 0)

    assert _failing(excess) == []


def test_no_atomics_on_floats():
    assert _failing(lambda k: [c for c in k["opcodes"] if re.match(r"(RED|ATOM)[GS]?\..*F(16|32|64)", c)]) == []


def test_scans_of_codes_use_popc():
    scans = [kernel for kernel in _compiled()[1] if "CODES" in kernel["constants"] and kernel["opcodes"]]
    scanning = {"histogram_kernel", "select_kernel", "range_count_kernel", "range_write_kernel"}
    assert {kernel["kernel"] for kernel in scans} == {"_distance_kernel", *scanning}
    assert [k["variant"] for k in scans if "POPC" not in k["opcodes"] or k["leftover_popcount"]] == []


def test_attention_uses_tensor_cores():
    """sm_90's own instructions forward, where a tile has the 64 rows that they need."""

    def lacking(kernel: dict[str, Any]) -> bool:
        wanted = (
            "HGMMA" if kernel["kernel"] == "attention_kernel" and kernel["constants"]["BLOCK_Q"] >= 64 else "H.*MMA"
        )
        return not any(re.match(wanted, code) for code in kernel["opcodes"])

    narrow = [k for k in _compiled()[1] if "VALUE_DIM" in k["constants"] and re.search("bf16|fp16", k["variant"])]
    products = [k for k in narrow if k["opcodes"] and k["kernel"] != "row_products_kernel"]
    assert len({kernel["kernel"] for kernel in products}) == 4
    assert [f"{k['kernel']} {k['variant']}" for k in products if lacking(k)] == []


def test_products_of_anchors_use_tensor_cores():
    products = {"anchor_attention_kernel", "products_kernel", "mix_kernel", "view_gradient_kernel"}
    narrow = [k for k in _compiled()[1] if k["kernel"] in products and re.search("bf16|fp16", k["variant"])]
    read = [k for k in narrow if k["opcodes"]]
    assert {kernel["kernel"] for kernel in read} == products
    assert [k["variant"] for k in read if not any(code.startswith("HMMA.16816") for code in k["opcodes"])] == []
    # and read 16 bytes at a time where the rows allow it
    assert [k["variant"] for k in read if "('DIM', 77)" not in k["variant"] and WIDE.isdisjoint(k["opcodes"])] == []


def test_wide_loads():
    """384 dimensions, and 384 bits, are read 16 bytes at a time."""
    readers = ("_pack_bits_kernel", "_distance_kernel", "score_kernel", "pool_kernel", "row_gradient_kernel")
    readers += ("norm_kernel", "norm_gradient_kernel", "grouped_softmax_kernel", "grouped_softmax_gradient_kernel")
    readers += ("gated_pool_kernel", "gated_gradient_kernel", "copy_rows_kernel", "return_gradients_kernel")
    readers += ("score_views_kernel", "score_gradient_kernel")
    for kernel in readers:
        assert [k for k in _compiled()[1] if k["kernel"] == kernel and "LDG.E.128" in k["opcodes"]], kernel


def test_offsets_are_64_bit():
    assert _failing(lambda kernel: kernel["narrow_products"]) == []


def test_error_without_gpu_or_interpreter():
    code = (
        "import torch, embedding_kernels as ek\n"
        "try: ek.pack_bits(torch.ones(1, 8), backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == (
        "pack_bits: backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 set before triton is imported, got cpu"
    ), run.stderr
