"""Every family's suite at every level of instruction set that this processor has; the level is chosen at load, so each
runs in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from embedding_kernels.numpy import _host

ROOT = Path(__file__).parents[2]
LEVELS = _host.isa_levels()
FAMILIES = ("anchor_scores", "attention", "hamming", "latent_attention", "norm", "paragraph_vector", "pooling")
#: with loops for the tile unit (TILE_LOOPS of CMakeLists.txt); the others have no other loops at amx than at avx512
FAMILIES_WITH_TILES = ("anchor_scores", "attention", "hamming")


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EMBEDDING_KERNELS_ISA": level}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_families_with_loops_for_the_tile_unit():
    found = re.search(r"set\(TILE_LOOPS (.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.S)
    assert found
    families = {re.sub(r"(_attention|_backward)?_loops$", "", Path(source).stem) for source in found.group(1).split()}
    assert families == set(FAMILIES_WITH_TILES)


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in LEVELS if level != _host.isa()])
def test_suites(level):
    tiles_apart = {level, _host.isa()} == {"avx512", "amx"}
    suites = [f"tests/{family}" for family in (FAMILIES_WITH_TILES if tiles_apart else FAMILIES)]
    # of codes of every width one kind: the others take the same loops; definitions, and what plays a GPU, have none
    left_out = "not (test_every_width and not random) and not gradcheck and not hopper"
    chosen = ("-m", "not slow", "--backend", "cpu", "-k", left_out)
    result = run(level, "-m", "pytest", "-q", *chosen, "-p", "no:cacheprovider", *suites)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("level", LEVELS)
def test_forcing(level):
    assert run(level, "-c", "from embedding_kernels import _host; print(_host.isa())").stdout.strip() == level


def test_unknown_level():
    script = "import torch, embedding_kernels as ek; ek.pack_bits(torch.ones(1, 8))"
    last = run("sse9", "-c", script).stderr.splitlines()[-1]
    assert last == "ValueError: EMBEDDING_KERNELS_ISA must be portable, avx2, avx512 or amx, got sse9"
