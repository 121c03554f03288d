"""What every test runs under: which backends, poisoned memory, the interpreter where there is no GPU.

Backend "cuda_host" is the CUDA library in the host emulation (tests/cuda_host), which needs no GPU. "cuda_host_hopper"
and "cuda_hopper" send all that they can serve to the kernels for Hopper, where a family has any.
"""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # read when triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter  # noqa: E402
from cuda_host import backend as cuda_host  # noqa: E402
from embedding_kernels.ops._registry import has_cuda_kernel  # noqa: E402

BACKENDS = ("reference", "cpu", "triton", "cuda_host", "cuda_host_hopper", "cuda", "cuda_hopper")
FAMILIES_WITH_HOPPER = ("attention", "hamming")


class OnHopper(str):
    """Backend "cuda_host" or "cuda" to the tests, with Hopper's kernels."""

    __slots__ = ()


def _why_not(backend: str) -> str | None:
    """Why a backend cannot be tested here, or None."""
    if backend.startswith("cuda") and not backend.startswith("cuda_host") and not HAS_GPU:
        return "no GPU"
    if backend == "cuda_hopper" and torch.cuda.get_device_capability()[0] != 9:
        return "no Hopper GPU"
    if backend.startswith("cuda_host"):
        return cuda_host.why_not()
    if backend == "triton":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        import numpy

        if not HAS_GPU and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
            return "triton 3.6's interpreter needs numpy < 2.4"
        if not HAS_GPU:
            interpreter.hasten()
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", choices=BACKENDS, help="run only these backends' rows")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--backend") or BACKENDS
    rows = []
    for backend in chosen:
        hopper = backend.endswith("_hopper")
        if hopper and metafunc.definition.path.parent.name not in FAMILIES_WITH_HOPPER:
            continue
        reason = _why_not(backend)
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        rows.append(
            pytest.param(OnHopper(backend.removesuffix("_hopper")) if hopper else backend, id=backend, marks=marks)
        )
    metafunc.parametrize("backend", rows)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter, thousands of times slower than a GPU, takes float16 the same way as bfloat16."""
    interpreted = pytest.mark.skip(reason="interpreted: float16 takes the way of bfloat16")
    for item in items:
        values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if not HAS_GPU and values.get("backend") == "triton" and any(v is torch.float16 for v in values.values()):
            item.add_marker(interpreted)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that a kernel allocates and forgets to write holds NaN, or the largest integer."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _cuda_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    if isinstance(backend, OnHopper):
        monkeypatch.setenv("EMBEDDING_KERNELS_HOPPER", "all")
    if backend != "cuda_host":
        yield
        return
    cuda_host.install(monkeypatch)
    cuda_host.set_options(architecture=90 if isinstance(backend, OnHopper) else 80)
    yield
    cuda_host.set_options()


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if HAS_GPU and backend in ("triton", "cuda") else "cpu"


@pytest.fixture
def require_kernel(backend: str):
    """Skips a row whose operator has no kernel in the CUDA library: Triton's row covers it."""

    def check(op: str) -> None:
        if (backend == "cuda" and not has_cuda_kernel(op)) or (backend == "cuda_host" and not cuda_host.has_kernel(op)):
            pytest.skip(f"{op} has no CUDA C++ kernel")

    return check
