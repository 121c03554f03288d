"""The one tolerance of the project: a kernel's error against the float64 definition.

For each row, the largest error may be twice that of plain torch (inputs and matmuls at the kernel's dtype, the rest in
float32), plus two roundings of the largest value of the same expression over absolute values: without that floor
correct float32 kernels fail by luck of cancellation. A non-finite value where the definition is finite fails.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to the dtype."""
    return torch.finfo(dtype).eps / 2


def assert_within_rule(kernel: Tensor, exact: Tensor, plain: Tensor, magnitude: Tensor) -> None:
    """All ``[rows, ...]``: the kernel's output, the float64 definition, plain torch's output at the kernel's dtype, and
    the definition over absolute values."""
    assert kernel.shape == exact.shape == plain.shape
    assert plain.dtype == kernel.dtype, "plain torch must end at the kernel's dtype"
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(kernel), finite), "non-finite values stand elsewhere than in the definition"
    rows = exact.shape[0]
    if exact.numel() == 0:
        return

    def largest(values: Tensor) -> Tensor:
        return torch.where(finite, values.double(), 0).abs().reshape(rows, -1).amax(1)

    error = largest(kernel.double() - exact)
    allowed = 2 * largest(plain.double() - exact) + 2 * unit_roundoff(kernel.dtype) * largest(magnitude)
    # results below the smallest normal number of a dtype are rounded to multiples of its smallest subnormal
    allowed += torch.finfo(kernel.dtype).tiny * torch.finfo(kernel.dtype).eps
    worst = int((error - allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"row {worst}: error {error[worst]:.3e} exceeds {allowed[worst]:.3e} "
        f"(plain torch {largest(plain.double() - exact)[worst]:.3e})"
    )
