"""embedding_kernels.numpy: the same answers as the operators, without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import embedding_kernels as ek
import embedding_kernels.numpy as ekn


def test_imports_without_torch():
    script = (
        "import sys, numpy as np; sys.modules['torch'] = None\n"
        "import embedding_kernels.numpy as ekn\n"
        "codes = ekn.pack_bits(np.eye(9, dtype=np.float32))\n"
        "print(ekn.hamming_topk(codes, codes, 2)[1][:, 0].tolist())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(list(range(9)))


@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@pytest.mark.parametrize("shape", ((0, 5), (7, 0), (3, 9), (4000, 100)))
def test_pack_bits(dtype, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    assert np.array_equal(ekn.pack_bits(x), np.packbits(x > 0, axis=1))
    strided = np.random.default_rng(0).standard_normal((shape[0], 2 * shape[1])).astype(dtype)[:, ::2]
    assert np.array_equal(ekn.pack_bits(strided), np.packbits(strided > 0, axis=1))


@pytest.mark.parametrize("threads", (1, 2, 5))
@pytest.mark.parametrize("queries", (1, 6))
def test_search_equals_the_operator(queries, threads):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (40_000, 12), dtype=np.uint8)
    asked = rng.integers(0, 256, (queries, 12), dtype=np.uint8)
    allowed = rng.integers(0, 256, (5000,), dtype=np.uint8)
    for mask in (None, allowed):
        got = ekn.hamming_topk(asked, base, 30, allowed=mask, threads=threads)
        tensor_mask = None if mask is None else torch.from_numpy(mask)
        expected = ek.hamming_topk(torch.from_numpy(asked), torch.from_numpy(base), 30, allowed=tensor_mask)
        assert np.array_equal(got[0], expected[0].numpy())
        assert np.array_equal(got[1], expected[1].numpy())
    got = ekn.hamming_distance(asked, base[:999], threads=threads)
    assert np.array_equal(got, ek.hamming_distance(torch.from_numpy(asked), torch.from_numpy(base[:999])).numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ekn.pack_bits(np.zeros((2, 2))), "pack_bits: x must be a float32 or float16 array"),
        (lambda: ekn.pack_bits(np.zeros(2, np.float32)), "pack_bits: x must be a float32 or float16 array"),
        (
            lambda: ekn.hamming_topk(np.zeros((1, 2), np.uint8), np.zeros((1, 3), np.uint8), 1),
            "codes must be of size 2",
        ),
        (lambda: ekn.hamming_topk(np.zeros((1, 2), np.int8), np.zeros((1, 2), np.uint8), 1), "queries must be a uint8"),
        (lambda: ekn.hamming_topk(np.zeros((1, 2), np.uint8), np.zeros((1, 2), np.uint8), 0), "k must be at least 1"),
        (
            lambda: ekn.hamming_topk(
                np.zeros((1, 2), np.uint8), np.zeros((9, 2), np.uint8), 1, allowed=np.zeros(1, np.uint8)
            ),
            r"allowed must be a uint8 array \[2\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
