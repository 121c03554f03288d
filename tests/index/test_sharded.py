"""`ShardedBinaryIndex` on real processes: equal to one index, and an error on one rank is one on all."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedding_kernels import ShardedBinaryIndex

SCRIPT = Path(__file__).with_name("sharded_ranks.py")
CASES = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(mark, "id", "") == "case" for mark in node.decorator_list)
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_all(directory: Path, size: int, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    run = subprocess.run(
        [*command, str(SCRIPT), str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((directory / f"outcomes-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    """What each rank says of each case, by the number of ranks; three find what two have saved."""
    home = tmp_path_factory.mktemp("sharded")
    return {size: run_all(home / str(size), size) for size in (2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_ranks(outcomes: dict[int, list[dict[str, str]]], name: str, size: int) -> None:
    for rank, said in enumerate(outcomes[size]):
        assert said.get(name, "not run: a case before it failed") == "", f"rank {rank}: {said.get(name)}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_gpus(tmp_path: Path) -> None:
    """Through NCCL; with one GPU, one rank."""
    for rank, said in enumerate(run_all(tmp_path / "gpus", min(2, torch.cuda.device_count()), "cuda")):
        assert len(said) >= 5, f"rank {rank}: {said}"
        assert not any(said.values()), f"rank {rank}: {said}"


def run_by_hand(mode: str) -> list[list]:
    """Two processes without torchrun, which would end one when the other dies; what rank 0 reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), mode],
            env={**address, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        out, errors = ranks[0].communicate(timeout=180)
        assert ranks[0].returncode == 0, errors[-3000:]
        return [json.loads(line) for line in out.splitlines()]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_killed_rank_is_an_error() -> None:
    (kind, message, seconds), (later_kind, later, later_seconds) = run_by_hand("killed")
    assert kind == "RuntimeError"
    assert message.startswith("search: rank(s) died or did not answer rank 0 of 2 within 30 s: ")
    assert seconds < 30
    assert (later_kind, later_seconds < 1) == ("RuntimeError", True)
    assert later == "search: the ranks lost each other in an earlier call; start all processes anew"


def test_a_silent_rank_is_an_error_in_time() -> None:
    for (kind, message, seconds), op in zip(run_by_hand("silent"), ("search", "ShardedBinaryIndex"), strict=True):
        assert kind == "RuntimeError"
        assert message.startswith(f"{op}: rank(s) died or did not answer rank 0 of 2 within 4 s: ")
        assert 3 < seconds < 30


def test_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="start the script with torchrun"):
        ShardedBinaryIndex(64)
    with pytest.raises(RuntimeError, match="start the script with torchrun"):
        ShardedBinaryIndex.load("nowhere")


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "60", True, None])
def test_bad_timeout(timeout: object) -> None:
    with pytest.raises(ValueError, match="ShardedBinaryIndex: timeout must be a number of seconds above 0, got"):
        ShardedBinaryIndex(64, timeout=timeout)
