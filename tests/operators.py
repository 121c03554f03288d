"""Every registered operator with sample arguments: what the contract tests run over. A family adds its own list in
``tests/<family>/samples.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import embedding_kernels
import embedding_kernels.ops
from embedding_kernels.ops._registry import OPERATORS

TESTS = Path(__file__).parent
DATA_DEPENDENT = ("hamming_range",)  # the size of their outputs depends on values
CONSTANTS = ("rope_cos", "rope_sin")  # float arguments to which no gradient flows


@dataclass(frozen=True)
class Sample:
    """One call of an operator, by the positional arguments of its schema."""

    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]

    def args(self, requires_grad: bool = False) -> tuple[Any, ...]:
        torch.manual_seed(0)
        args = self.make()
        if requires_grad:
            names = OPERATORS[self.op].argument_names
            for name, a in zip(names, args, strict=False):
                if is_float(a) and name not in CONSTANTS:
                    a.requires_grad_()
        return args

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def call_public(sample: Sample, args: tuple[Any, ...], **options: Any) -> Any:
    """The public function of the sample's operator; a backward, which has none, as the operator itself."""
    op = OPERATORS[sample.op]
    if not hasattr(embedding_kernels, sample.op):
        return op.overload(*args)
    return getattr(embedding_kernels, sample.op)(**dict(zip(op.argument_names, args, strict=False)), **options)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def written(op: str) -> tuple[int, ...]:
    """Places of the arguments that the operator writes to."""
    arguments = OPERATORS[op].overload._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def fresh(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, copies where the operator writes to them: so they may serve again."""
    places = written(op)
    return tuple(a.clone() if i in places and isinstance(a, Tensor) else a for i, a in enumerate(args))


def everything(op: str, args: tuple[Any, ...], result: Any) -> tuple[Tensor, ...]:
    """The outputs of a call, and what it left in the arguments that it writes to."""
    return (*outputs(result), *(args[i] for i in written(op) if i < len(args) and args[i] is not None))


def _load_samples() -> list[Sample]:
    samples: list[Sample] = []
    for path in sorted(TESTS.glob("*/samples.py")):
        spec = importlib.util.spec_from_file_location(f"samples_{path.parent.name}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        samples += [Sample(op, name, make) for op, cases in module.SAMPLES.items() for name, make in cases.items()]
    return samples


SAMPLES = _load_samples()
DIFFERENTIABLE = [sample for sample in SAMPLES if OPERATORS[sample.op].gradient]


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_same(left: Any, right: Any) -> None:
    """Equal to the bit, NaN included."""
    for a, b in zip(outputs(left), outputs(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)
