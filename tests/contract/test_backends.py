"""Which implementation runs: by argument, context, environment and device; and that nothing falls back in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import embedding_kernels as ek
from embedding_kernels.ops import _registry
from operators import SAMPLES, assert_same, call_public, outputs

X = torch.randn(3, 20)


@pytest.fixture
def record(monkeypatch):
    """Names of the implementations that run."""
    ran = []
    monkeypatch.setattr(_registry.Operator, "run_reference", lambda self, *args: ran.append("reference"))
    monkeypatch.setattr(_registry.Operator, "run_triton", lambda self, *args: ran.append("triton"))
    return ran


def test_argument_wins_over_context(record):
    with ek.use_backend("triton"):
        ek.pack_bits(X)
        ek.pack_bits(X, backend="reference")
        with ek.use_backend("reference"):
            ek.pack_bits(X)
        ek.pack_bits(X)
    assert record == ["triton", "reference", "reference", "triton"]
    assert ek.pack_bits(X).dtype == torch.uint8


def test_context_ends_with_an_exception():
    with pytest.raises(KeyError), ek.use_backend("reference"):
        raise KeyError
    assert _registry.requested(None, "pack_bits") is None


def test_environment():
    def run(value: str) -> subprocess.CompletedProcess[str]:
        script = (
            f"import os; os.environ['EMBEDDING_KERNELS_BACKEND'] = {value!r}\n"
            "import torch, embedding_kernels as ek\n"
            "print(ek.pack_bits(torch.ones(1, 8, dtype=torch.float64)).tolist())"
        )
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert run("reference").stdout.strip() == "[[255]]"
    assert "EMBEDDING_KERNELS_BACKEND must be one of reference, cpu, triton, cuda, got 'gpu'" in run("gpu").stderr


@pytest.mark.parametrize("name", ("gpu", "CPU", ""))
def test_unknown_names(name):
    with pytest.raises(ValueError, match="backend must be one of"), ek.use_backend(name):
        pass
    with pytest.raises(ValueError, match="pack_bits: backend must be one of"):
        ek.pack_bits(X, backend=name)


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(ValueError, match="pack_bits: backend must be one that runs on cpu, got 'cuda'"):
        ek.pack_bits(X, backend="cuda")


def test_triton_without_interpreter_says_what_to_do():
    script = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, embedding_kernels as ek\n"
        "ek.pack_bits(torch.ones(1, 8), backend='triton')"
    )
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "TRITON_INTERPRET=1" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("sample", [s for s in SAMPLES if not s.op.endswith("_backward")], ids=str)
def test_every_backend_answers_every_sample(backend, device, require_kernel, sample):
    if backend not in ("reference", "cpu") and _registry.OPERATORS[sample.op].cpu_only:
        pytest.skip(f"{sample.op} runs on the CPU alone")
    require_kernel(sample.op)
    moved = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in sample.args())
    got = call_public(sample, moved, backend=backend)
    expected = call_public(sample, sample.args(), backend="reference")
    for a, b in zip(outputs(got), outputs(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not a.is_floating_point():
            assert_same(a, b)


def test_choice_is_made_when_traced():
    with ek.use_backend("reference"):
        compiled = torch.compile(lambda x: ek.pack_bits(x), fullgraph=True, backend="aot_eager")
        seen = []
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: ek.pack_bits(x))(X)
        seen = [str(node.target) for node in graph.graph.nodes]
        assert not [name for name in seen if "embedding_kernels" in name]
        assert_same(compiled(X), ek.pack_bits(X))
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: ek.pack_bits(x))(X)
    assert "embedding_kernels.pack_bits.default" in [str(node.target) for node in graph.graph.nodes]


def test_context_under_compile():
    def both(x):
        with ek.use_backend("reference"):
            first = ek.pack_bits(x)
        return first, ek.pack_bits(x)

    first, second = torch.compile(both, backend="aot_eager")(X)
    assert_same(first, second)
