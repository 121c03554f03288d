"""Rows of the CUDA library run where it has a kernel for the module's operator; and Hopper, emulated."""

import pytest

from cuda_host import backend as cuda_host


@pytest.fixture(autouse=True)
def _has_kernel(request):
    if "backend" in request.fixturenames:
        request.getfixturevalue("require_kernel")(getattr(request.module, "OPERATOR", "varlen_attention"))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch):
    """Backend "cuda_host" plays Hopper, whose kernels take every call that they can."""
    if reason := cuda_host.why_not():
        pytest.skip(reason)
    cuda_host.install(monkeypatch)
    monkeypatch.setenv("EMBEDDING_KERNELS_HOPPER", "all")
    cuda_host.set_options(architecture=90)
    yield
    cuda_host.set_options()
