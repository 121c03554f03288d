"""Every family's suite at every level of instruction set that this processor has; the level is chosen at load, so each
runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedding_kernels.numpy import _host

ROOT = Path(__file__).parents[2]
LEVELS = _host.isa_levels()


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EMBEDDING_KERNELS_ISA": level}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in LEVELS if level != _host.isa()])
def test_suites(level):
    families = ("anchor_scores", "attention", "hamming", "latent_attention", "norm", "paragraph_vector", "pooling")
    suites = [f"tests/{family}" for family in families]
    result = run(level, "-m", "pytest", "-q", "-m", "not slow", "--backend", "cpu", "-p", "no:cacheprovider", *suites)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("level", LEVELS)
def test_forcing(level):
    assert run(level, "-c", "from embedding_kernels import _host; print(_host.isa())").stdout.strip() == level


def test_unknown_level():
    script = "import torch, embedding_kernels as ek; ek.pack_bits(torch.ones(1, 8))"
    last = run("sse9", "-c", script).stderr.splitlines()[-1]
    assert last == "ValueError: EMBEDDING_KERNELS_ISA must be portable, avx2, avx512 or amx, got sse9"
