"""Runs every operator once on each of its samples, gradients too: small shapes for compute-sanitizer to watch.

``python tests/run_samples.py cuda`` runs those that have a CUDA C++ kernel; ``cpu`` runs all of them on the CPU.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from embedding_kernels.ops._registry import OPERATORS, has_cuda_kernel
from operators import SAMPLES, Sample, call_public, is_float, outputs


def _moved(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


def run(sample: Sample, device: str) -> None:
    """Forward and, of an operator that has a gradient, backward."""
    differentiable = OPERATORS[sample.op].gradient is not None
    args = sample.args(requires_grad=differentiable)
    found = outputs(call_public(sample, _moved(args, device)))
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    answers = [out for out in found if is_float(out) and out.requires_grad]
    if leaves and answers:
        torch.autograd.grad(answers, leaves, [torch.ones_like(out) for out in answers], allow_unused=True)


def main(device: str) -> int:
    chosen = [sample for sample in SAMPLES if device == "cpu" or has_cuda_kernel(sample.op)]
    for sample in chosen:
        run(sample, device)
    if device == "cuda":
        # attention in float32 is Triton's
        with torch.autocast(device, torch.bfloat16):
            for sample in chosen:
                if OPERATORS[sample.op].autocast:
                    run(sample, device)
        if torch.cuda.get_device_capability()[0] == 9:
            # samples are too small to go there unasked
            os.environ["EMBEDDING_KERNELS_HOPPER"] = "all"
            for sample in chosen:
                if "attention" in sample.op or "hamming" in sample.op:
                    run(sample, device)
        torch.cuda.synchronize()
    ops = {sample.op for sample in chosen}
    print(f"{len(chosen)} samples of {len(ops)} operators ran on {device}")
    return 0 if chosen else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
