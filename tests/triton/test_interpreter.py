"""What makes Triton's interpreter quicker changes no result: every operator before and after, in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")

_BOTH = """
import torch
from triton.runtime import interpreter

from embedding_kernels.ops._registry import OPERATORS
from interpreter import hasten
from operators import SAMPLES, call_public, outputs

chosen = {s.op: s for s in SAMPLES if not s.op.endswith("_backward") and not OPERATORS[s.op].cpu_only}

def results():
    return {op: outputs(call_public(sample, sample.args(), backend="triton")) for op, sample in chosen.items()}

patch, before = interpreter._patch_lang, results()
hasten()
assert interpreter._patch_lang is not patch
for op, found in results().items():
    for a, b in zip(found, before[op], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=op)
print(len(before))
"""


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="other versions are left as they are")
@pytest.mark.skipif(
    numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="triton 3.6's interpreter needs numpy < 2.4"
)
def test_results_are_the_same():
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", _BOTH], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 10
