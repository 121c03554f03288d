"""Both ways to compute attention here: the definition, and the kernel of the processor."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import embedding_kernels


@pytest.fixture(params=["reference", "cpu"])
def kernel(request: pytest.FixtureRequest):
    with embedding_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def reranker():
    """A tiny `MultiViewReranker` with random weights, which knows the words of `models.conftest.texts_of`."""
    from models.multi_view import make_reranker

    return make_reranker()


@pytest.fixture(autouse=True)
def _one_thread(_poisoned_memory):
    # the models are tiny: threads would only cost
    torch.set_num_threads(1)
