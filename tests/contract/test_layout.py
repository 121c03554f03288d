"""Strides, offsets, poison and memory bounds, over every sample."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedding_kernels.numpy import _host
from embedding_kernels.ops._registry import OPERATORS
from operators import SAMPLES, assert_same, everything, written

by_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def strided_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, rows further apart, last dimension dense."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
    wide[..., 1 : 1 + tensor.shape[-1]] = tensor.detach()
    return wide[..., 1 : 1 + tensor.shape[-1]]


def sparse_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().repeat_interleave(2, -1)[..., ::2]


def leading_swapped(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the first two of three dimensions stored the other way round, as heads before tokens."""
    return tensor.detach().transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 2 else tensor.detach()


@by_sample
@pytest.mark.parametrize("relayout", (strided_rows, sparse_last, leading_swapped))
def test_any_strides(sample, relayout):
    op = OPERATORS[sample.op]
    args = [relayout(a) if isinstance(a, torch.Tensor) and a.dim() else a for a in sample.args()]
    dense = sample.args()
    results = (everything(sample.op, a, op.forward_overload(*a)) for a in (args, dense))
    assert_same(*results)


@by_sample
def test_inputs_are_left_alone_and_outputs_are_new(sample):
    args, untouched = sample.args(), sample.args()
    results = OPERATORS[sample.op].forward_overload(*args)
    read = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i not in written(sample.op)]
    assert_same(tuple(args[i] for i in read), tuple(untouched[i] for i in read))
    pointers = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor) and a.numel()}
    for result in results if isinstance(results, tuple) else (results,):
        assert result.is_contiguous()
        assert result.numel() == 0 or result.untyped_storage().data_ptr() not in pointers


@by_sample
def test_same_bits_for_any_thread_count(sample):
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        args = sample.args()
        results.append(everything(sample.op, args, OPERATORS[sample.op].forward_overload(*args)))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("level", _host.isa_levels())
def test_nothing_is_touched_past_a_buffer(level):
    """Every buffer ends, then begins, at a page that must not be touched: sanitizers are blind to masked vectors."""
    script = Path(__file__).with_name("guard_pages.py")
    environment = {**os.environ, "EMBEDDING_KERNELS_ISA": level, "PYTHONPATH": str(script.parents[1])}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, f"{run.returncode} after {run.stdout.splitlines()[-1:]}\n{run.stderr[-2000:]}"
    assert run.stdout.splitlines()[-1].startswith("calls: ")
