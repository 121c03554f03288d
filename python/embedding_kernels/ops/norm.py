"""Residual addition and norm in one pass over the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS, check_same_device, check_size, check_tensor, dtype_name, refuse, values_readable
from ._registry import Gradient, call, register

_ROWS = 'a float32, bfloat16 or float16 tensor [T, D] (float64 runs with backend="reference")'


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    one_plus_weight: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``summed = x + residual`` and its RMS norm, ``summed / sqrt(mean(summed²) + eps) * weight``, in one pass.

    The sum is rounded to the dtype before it is normed, as where a model adds and then norms; the norm is formed in
    float32 and rounded once (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019). Differentiable.

    Args:
        x: float32, bfloat16 or float16 ``[T, D]``, rows of any stride; float64 with ``backend="reference"``.
        residual: as ``x``; None where there is nothing to add.
        weight: ``[D]``, float32 or as ``x``.
        eps: at least 0.
        one_plus_weight: multiply by ``1 + weight`` (Gemma).
        backend: as in `pack_bits`.

    Returns:
        ``(normed, summed)``, both ``[T, D]`` in the dtype of ``x``; without a residual, summed is ``x`` itself.

    Raises:
        ValueError: bad dtype, rank or size, or eps < 0.
    """
    normed, summed = call(_ADD_RMS_NORM, backend, x, residual, weight, eps, one_plus_weight)
    return normed, x if residual is None else summed


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``summed = x + residual`` and its layer norm, ``(summed - mean) / sqrt(variance + eps) * weight + bias``.

    The sum is rounded to the dtype before it is normed; mean and variance (of D values) are formed in float32 (Ba et
    al., "Layer Normalization", 2016). Differentiable.

    Args:
        x: float32, bfloat16 or float16 ``[T, D]``, rows of any stride; float64 with ``backend="reference"``.
        residual: as ``x``; None where there is nothing to add.
        weight: ``[D]``, float32 or as ``x``.
        bias: as ``weight``; None adds nothing.
        eps: at least 0.
        backend: as in `pack_bits`.

    Returns:
        ``(normed, summed)``, both ``[T, D]`` in the dtype of ``x``; without a residual, summed is ``x`` itself.

    Raises:
        ValueError: bad dtype, rank or size, or eps < 0.
    """
    normed, summed = call(_ADD_LAYER_NORM, backend, x, residual, weight, bias, eps)
    return normed, x if residual is None else summed


def token_prepend(hidden: Tensor, source_rows: Tensor, target_rows: Tensor, *, backend: str | None = None) -> Tensor:
    """The rows of ``hidden`` with those at ``target_rows`` replaced by those at ``source_rows``.

    ``out[target_rows[i]] = hidden[source_rows[i]]``, and ``hidden`` elsewhere: all sources are read before any target
    is written. Token prepending (Fu et al., "Token Prepending", 2024) copies the last token's state over that of a
    placeholder before each of the first layers. Differentiable: a target's gradient goes to its source.

    Args:
        hidden: float32, bfloat16 or float16 ``[T, D]``, rows of any stride; float64 with ``backend="reference"``.
        source_rows: int64 ``[N]``, rows of ``hidden``; one may occur several times.
        target_rows: int64 ``[N]``, distinct rows of ``hidden``.
        backend: as in `pack_bits`.

    Returns:
        ``[T, D]``, a tensor of its own.

    Raises:
        ValueError: bad dtype, rank, size or rows (rows on CUDA only under EMBEDDING_KERNELS_CHECK=1; without it a copy
            from or to a row that does not exist is left out).
    """
    return call(_TOKEN_PREPEND, backend, hidden, source_rows, target_rows)


def token_prepend_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    source_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    one_plus_weight: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_prepend` of ``x + residual`` and its RMS norm, in the one pass of `add_rms_norm`.

    Args:
        x: float32, bfloat16 or float16 ``[T, D]``, rows of any stride; float64 with ``backend="reference"``.
        residual: as ``x``; None where there is nothing to add.
        source_rows: as in `token_prepend`.
        target_rows: as in `token_prepend`.
        weight: ``[D]``, float32 or as ``x``.
        eps: at least 0.
        one_plus_weight: multiply by ``1 + weight`` (Gemma).
        backend: as in `pack_bits`.

    Returns:
        ``(normed, summed)``, both ``[T, D]`` in the dtype of ``x``, after the copies.

    Raises:
        ValueError: as `add_rms_norm` and `token_prepend`.
    """
    return call(_TOKEN_PREPEND_RMS_NORM, backend, x, residual, source_rows, target_rows, weight, eps, one_plus_weight)


# ---- checks, in the order and the words of csrc/cpu/norm.cpp and token_prepend.cpp ----


def _check_like(op: str, argument: str, tensor: Tensor | None, rows: Tensor, name: str) -> None:
    if tensor is None:
        return
    check_tensor(op, argument, tensor, f"a {dtype_name(rows.dtype)} tensor [T, D], as {name}", (rows.dtype,), 2)
    check_size(op, argument, tensor, 0, rows.shape[0], f"the rows of {name}")
    check_size(op, argument, tensor, 1, rows.shape[1], f"the width of {name}")
    check_same_device(op, name, rows, **{argument: tensor})


def _check_vector(op: str, argument: str, tensor: Tensor | None, rows: Tensor, name: str) -> None:
    if tensor is None:
        return
    expected = f"a float32 tensor [D], or {dtype_name(rows.dtype)} as {name}"
    check_tensor(op, argument, tensor, expected, (torch.float32, rows.dtype), 1)
    check_size(op, argument, tensor, 0, rows.shape[1], f"the width of {name}")
    check_same_device(op, name, rows, **{argument: tensor})


def _check_eps(op: str, eps: float) -> None:
    if not eps >= 0:
        refuse(op, "eps", "at least 0", f"{eps:f}")


def _check_forward(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> None:
    check_tensor(op, "x", x, _ROWS, FLOATS, 2)
    _check_like(op, "residual", residual, x, "x")
    _check_vector(op, "weight", weight, x, "x")
    _check_vector(op, "bias", bias, x, "x")
    _check_eps(op, eps)


def _check_places(op: str, argument: str, places: Tensor, rows: Tensor, name: str) -> None:
    check_tensor(op, argument, places, "an int64 tensor [N]", (torch.int64,), 1)
    check_same_device(op, name, rows, **{argument: places})
    if values_readable(places) and places.numel():
        wrong = places[(places < 0) | (places >= rows.shape[0])]
        if wrong.numel():
            refuse(op, argument, f"rows of {name} (0 to {rows.shape[0] - 1})", str(int(wrong[0])))


def _check_copies(op: str, sources: Tensor, targets: Tensor, rows: Tensor, name: str) -> None:
    _check_places(op, "source_rows", sources, rows, name)
    _check_places(op, "target_rows", targets, rows, name)
    check_size(op, "target_rows", targets, 0, sources.shape[0], "one for each of source_rows")
    if values_readable(targets):
        ordered = targets.sort()[0]
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if twice.numel():
            refuse(op, "target_rows", "distinct", f"{int(twice[0])} twice")


def _check_token_prepend(op: str, name: str, rows: Tensor, sources: Tensor, targets: Tensor) -> None:
    check_tensor(op, name, rows, _ROWS, FLOATS, 2)
    _check_copies(op, sources, targets, rows, name)


def _check_token_prepend_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    sources: Tensor,
    targets: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    one_plus_weight: bool = False,
) -> None:
    _check_token_prepend("token_prepend_rms_norm", "x", x, sources, targets)
    _check_forward("token_prepend_rms_norm", x, residual, weight, None, eps)


def _check_token_prepend_rms_norm_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    sources: Tensor,
    targets: Tensor,
    weight: Tensor,
    eps: float,
    one_plus_weight: bool,
) -> None:
    _check_token_prepend("token_prepend_rms_norm_backward", "summed", summed, sources, targets)
    _check_backward("token_prepend_rms_norm_backward", grad_normed, grad_summed, summed, weight, None, eps)


def _check_backward(
    op: str,
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> None:
    check_tensor(op, "summed", summed, _ROWS, FLOATS, 2)
    _check_like(op, "grad_normed", grad_normed, summed, "summed")
    _check_like(op, "grad_summed", grad_summed, summed, "summed")
    _check_vector(op, "weight", weight, summed, "summed")
    _check_vector(op, "bias", bias, summed, "summed")
    _check_eps(op, eps)


# ---- shapes, gradients, counts ----


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], bias: Tensor | None) -> None:
    x, residual, weight = inputs[:3]
    ctx.save_for_backward(x if residual is None else output[1], weight, bias)
    ctx.has_residual = residual is not None
    # either output may go unused: None then, not zeros
    ctx.set_materialize_grads(False)


def _arguments_of_backward(
    ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    summed = ctx.saved_tensors[0]
    grad_normed = torch.zeros_like(summed) if grad_normed is None else grad_normed
    return grad_normed, grad_summed if ctx.has_residual else None, summed


def _setup_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _setup(ctx, inputs, output, None)
    # torch leaves out the last arguments of a call where they equal their defaults
    ctx.plain = (*inputs[3:], *(1e-6, False)[len(inputs) - 3 :])


def _backward_rms(run: Any, ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None) -> tuple[Any, ...]:
    weight = ctx.saved_tensors[1]
    grad_x, grad_weight = run(*_arguments_of_backward(ctx, grad_normed, grad_summed), weight, *ctx.plain)
    grads = (grad_x, grad_x, grad_weight.to(weight.dtype), None, None)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _setup(ctx, inputs, output, inputs[3] if len(inputs) > 3 else None)
    ctx.eps = inputs[4] if len(inputs) > 4 else 1e-5


def _backward_layer(run: Any, ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None) -> tuple[Any, ...]:
    _, weight, bias = ctx.saved_tensors
    found = run(*_arguments_of_backward(ctx, grad_normed, grad_summed), weight, bias, ctx.eps)
    grad_bias = None if bias is None else found[2].to(bias.dtype)
    grads = (found[0], found[0], found[1].to(weight.dtype), grad_bias, None)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))


def _setup_token_prepend(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_token_prepend(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return run(grad, *ctx.saved_tensors), None, None


def _setup_token_prepend_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, sources, targets, weight = inputs[:5]
    ctx.save_for_backward(output[1], sources, targets, weight)
    ctx.set_materialize_grads(False)
    # torch leaves out the last arguments of a call where they equal their defaults
    ctx.plain = (*inputs[5:], *(1e-6, False)[len(inputs) - 5 :])


def _backward_token_prepend_rms_norm(
    run: Any, ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None
) -> tuple[Any, ...]:
    summed, sources, targets, weight = ctx.saved_tensors
    grad_normed = torch.zeros_like(summed) if grad_normed is None else grad_normed
    grad_x, grad_weight = run(grad_normed, grad_summed, summed, sources, targets, weight, *ctx.plain)
    grads = (grad_x, grad_x, None, None, grad_weight.to(weight.dtype), None, None)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))


def _vector(summed: Tensor, size: int) -> Tensor:
    return summed.new_empty(size, dtype=torch.float32)


_ADD_RMS_NORM_BACKWARD = register(
    "add_rms_norm_backward",
    family="norm",
    check=lambda grad_normed, grad_summed, summed, weight, eps, one_plus_weight: _check_backward(
        "add_rms_norm_backward", grad_normed, grad_summed, summed, weight, None, eps
    ),
    fake=lambda grad_normed, grad_summed, summed, *rest: (
        summed.new_empty(summed.shape),
        _vector(summed, summed.shape[1]),
    ),
    flops=lambda grad_normed, *rest: 12 * grad_normed[0] * grad_normed[1],
)
_ADD_RMS_NORM = register(
    "add_rms_norm",
    family="norm",
    check=lambda x, residual, weight, eps=1e-6, one_plus_weight=False: _check_forward(
        "add_rms_norm", x, residual, weight, None, eps
    ),
    fake=_fake_forward,
    flops=lambda x, *rest: 5 * x[0] * x[1],
    autocast=("x", "residual"),
    gradient=Gradient("add_rms_norm_backward", _setup_rms, _backward_rms),
)
_ADD_LAYER_NORM_BACKWARD = register(
    "add_layer_norm_backward",
    family="norm",
    check=lambda *args: _check_backward("add_layer_norm_backward", *args),
    fake=lambda grad_normed, grad_summed, summed, weight, bias, eps: (
        summed.new_empty(summed.shape),
        _vector(summed, summed.shape[1]),
        _vector(summed, 0 if bias is None else summed.shape[1]),
    ),
    flops=lambda grad_normed, *rest: 14 * grad_normed[0] * grad_normed[1],
)
_ADD_LAYER_NORM = register(
    "add_layer_norm",
    family="norm",
    check=lambda x, residual, weight, bias=None, eps=1e-5: _check_forward(
        "add_layer_norm", x, residual, weight, bias, eps
    ),
    fake=_fake_forward,
    flops=lambda x, *rest: 8 * x[0] * x[1],
    autocast=("x", "residual"),
    gradient=Gradient("add_layer_norm_backward", _setup_layer, _backward_layer),
)
_TOKEN_PREPEND_BACKWARD = register(
    "token_prepend_backward",
    family="norm",
    check=lambda grad, *places: _check_token_prepend("token_prepend_backward", "grad", grad, *places),
    fake=lambda grad, *places: grad.new_empty(grad.shape),
    flops=lambda grad, sources, *rest: sources[0] * grad[1],
)
_TOKEN_PREPEND = register(
    "token_prepend",
    family="norm",
    check=lambda hidden, *places: _check_token_prepend("token_prepend", "hidden", hidden, *places),
    fake=lambda hidden, *places: hidden.new_empty(hidden.shape),
    flops=lambda *shapes: 0,
    autocast=("hidden",),
    gradient=Gradient("token_prepend_backward", _setup_token_prepend, _backward_token_prepend),
)
_TOKEN_PREPEND_RMS_NORM_BACKWARD = register(
    "token_prepend_rms_norm_backward",
    family="norm",
    check=_check_token_prepend_rms_norm_backward,
    fake=lambda grad_normed, grad_summed, summed, *rest: (
        summed.new_empty(summed.shape),
        _vector(summed, summed.shape[1]),
    ),
    flops=lambda grad_normed, *rest: 12 * grad_normed[0] * grad_normed[1],
)
_TOKEN_PREPEND_RMS_NORM = register(
    "token_prepend_rms_norm",
    family="norm",
    check=_check_token_prepend_rms_norm,
    fake=lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)),
    flops=lambda x, *rest: 5 * x[0] * x[1],
    autocast=("x", "residual"),
    gradient=Gradient(
        "token_prepend_rms_norm_backward", _setup_token_prepend_rms_norm, _backward_token_prepend_rms_norm
    ),
)
