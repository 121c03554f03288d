"""Walks the registered schemas: an operator that lacks a reference, a fake, a sample, a Triton kernel, a benchmark with
a peer or a README row fails here."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import embedding_kernels
from embedding_kernels import reference
from embedding_kernels.ops._registry import NAMESPACE, OPERATORS
from operators import SAMPLES

ROOT = Path(__file__).parents[2]


def registered_schemas() -> list[str]:
    prefix = f"{NAMESPACE}::"
    return sorted(
        schema.name.removeprefix(prefix) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(prefix)
    )


def base_name(schema: str) -> str:
    """<op>, <op>_forward and <op>_backward are one operator."""
    return re.sub(r"_(forward|backward)$", "", schema)


PUBLIC = sorted({base_name(schema) for schema in registered_schemas()})


def test_schemas_and_declarations_are_the_same_set():
    declared = {name for op in OPERATORS.values() for name in op.registered_names}
    assert set(registered_schemas()) == declared


@pytest.mark.parametrize("name", PUBLIC)
def test_is_public_and_documented(name):
    function = getattr(embedding_kernels, name)
    assert name in embedding_kernels.__all__
    for part in ("Args:" if "Arguments" not in function.__doc__ else "Arguments", "Returns:"):
        assert part in function.__doc__, f"{name}'s docstring lacks {part}"


@pytest.mark.parametrize("name", PUBLIC)
def test_has_a_reference(name):
    assert callable(getattr(reference, name))


@pytest.mark.parametrize("name", registered_schemas())
def test_has_kernels_and_a_fake(name):
    qualified = f"{NAMESPACE}::{name}"
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key), f"{name} has no kernel for {key}"


@pytest.mark.parametrize("name", registered_schemas())
def test_sizes_are_symbolic(name):
    """A plain int in a schema recompiles for every value."""
    schema = str(getattr(getattr(torch.ops, NAMESPACE), name).default._schema)
    assert not re.findall(r"\bint\b\??", schema), schema


@pytest.mark.parametrize("name", [n for n in registered_schemas() if not n.endswith("_forward")])
def test_has_samples(name):
    assert [sample for sample in SAMPLES if sample.op == name], f"tests/*/samples.py has no call of {name}"


@pytest.mark.parametrize("name", PUBLIC)
def test_differentiable_operators_have_a_forward_twin(name):
    twin = f"{name}_forward" in registered_schemas()
    assert twin == (OPERATORS[name].gradient is not None)


@pytest.mark.parametrize("name", [n for n in registered_schemas() if not n.endswith("_forward")])
def test_has_a_triton_kernel(name):
    if OPERATORS[name].cpu_only:
        assert not (ROOT / "kernels" / f"{OPERATORS[name].family}.py").exists(), f"{name} is declared as cpu_only"
        return
    source = (ROOT / "kernels" / f"{OPERATORS[name].family}.py").read_text()
    assert re.search(rf"^def {name}_triton\(", source, re.M)


@pytest.mark.parametrize("name", PUBLIC)
def test_has_a_row_in_the_readme(name):
    assert re.search(rf"^\| `{name}`", (ROOT / "README.md").read_text(), re.M)


@cache
def benchmarks() -> dict:
    """bench/ is a folder of the tree, not of the installed package."""
    init = ROOT / "bench" / "__init__.py"
    spec = importlib.util.spec_from_file_location("bench", init, submodule_search_locations=[str(init.parent)])
    sys.modules["bench"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BENCHMARKS


@pytest.mark.parametrize("name", PUBLIC)
def test_has_a_benchmark_with_a_peer(name):
    assert any(case.peers for case in benchmarks().get(name, []))


@pytest.mark.parametrize("name", sorted({op.family for op in OPERATORS.values()}))
def test_a_family_has_the_same_name_in_every_room(name):
    for place in (
        f"csrc/cpu/{name}.cpp",
        f"csrc/cpu/{name}.h",
        f"csrc/cpu/{name}_driver.h",
        f"csrc/cpu/{name}_loops.cpp",
        f"kernels/{name}.py",
        f"python/embedding_kernels/ops/{name}.py",
        f"python/embedding_kernels/reference/{name}.py",
        f"tests/{name}",
        f"bench/{name}.py",
    ):
        if place.startswith("kernels/") and all(op.cpu_only for op in OPERATORS.values() if op.family == name):
            continue
        assert (ROOT / place).exists(), place
