"""Rows of the CUDA library run where it has a kernel for the module's operator."""

import pytest


@pytest.fixture(autouse=True)
def _has_kernel(request):
    if "backend" in request.fixturenames:
        request.getfixturevalue("require_kernel")(getattr(request.module, "OPERATOR", "varlen_attention"))
