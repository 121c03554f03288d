"""The one mechanism by which an operator gets its fake, gradient, autocast rule, Triton kernel and FLOP count.

A family's file declares each operator once with `register`; `call` is the body of every public function. Schemas
and C++ kernels stand in ``csrc/ops.cpp``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from .. import _library as _library
from .. import reference
from . import cuda_table
from .backend import requested

NAMESPACE = "embedding_kernels"
_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")
_library_of_impls = torch.library.Library(NAMESPACE, "IMPL")


@dataclass(frozen=True)
class Gradient:
    """How an operator is differentiated; the two functions are torch's autograd protocol.

    ``backward`` runs the operator named by ``backward_op`` through ``ctx.run`` so that every backend shares it.
    """

    backward_op: str
    setup_context: Callable[..., None]
    backward: Callable[..., Any]


class Operator:
    """One registered operator: what the public function, the tests and `doctor` need to know of it.

    Plain attributes, filled at once: torch.compile traces through them and cannot enter a cached property's lock.
    """

    def __init__(
        self,
        name: str,
        family: str,
        check: Callable[..., Any],
        flops: Callable[..., int],
        autocast: Sequence[str],
        gradient: Gradient | None,
        cpu_only: bool,
    ) -> None:
        packets = getattr(torch.ops, NAMESPACE)
        self.name, self.family, self.check, self.flops, self.gradient = name, family, check, flops, gradient
        #: no GPU kernel, by design: CUDA tensors are refused
        self.cpu_only = cpu_only
        #: names of the arguments that autocast casts
        self.autocast = tuple(autocast)
        self.registered_names = [name] + ([f"{name}_forward"] if gradient else [])
        self.overload = getattr(packets, name).default
        #: the operator without autograd, which costs a third of a call
        self.forward_overload = getattr(packets, self.registered_names[-1]).default
        self.argument_names = tuple(argument.name for argument in self.overload._schema.arguments)

    @property
    def definition(self) -> Callable[..., Any]:
        """The function of the same name in `reference`."""
        return getattr(reference, self.name)

    @property
    def triton(self) -> Callable[..., Any]:
        """The Triton kernel's launcher ``<name>_triton``; imports triton on first use."""
        module = importlib.import_module(f"{__package__.rpartition('.')[0]}.kernels.{self.family}")
        return getattr(module, f"{self.name}_triton")

    def run_reference(self, *args: Any) -> Any:
        self.check(*map(_at_kernel_dtype, args))
        return self.definition(**dict(zip(self.argument_names, args, strict=False)))

    def run_triton(self, *args: Any) -> Any:
        if self.cpu_only:
            raise ValueError(f"{self.name}: backend must be 'cpu' or 'reference' (it has no GPU kernel), got 'triton'")
        self.check(*args)
        return self.triton(*args)


def _at_kernel_dtype(value: Any) -> Any:
    """float64 is for the reference alone: a float32 stand-in of the same shape (checks read no float values)."""
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        return torch.empty_strided(value.shape, [0] * value.dim(), dtype=torch.float32, device=value.device)
    return value


OPERATORS: dict[str, Operator] = {}
_triton_serves_cuda: set[str] = set()


def register(
    name: str,
    *,
    family: str,
    check: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    autocast: Sequence[str] = (),
    gradient: Gradient | None = None,
    cpu_only: bool = False,
) -> Operator:
    """Declare operator ``name``.

    check(*args) raises ValueError for bad input; fake(*args) returns empty outputs; flops(*shapes) counts;
    autocast names the arguments that autocast casts; cpu_only declares a family without GPU kernels.
    """
    op = OPERATORS[name] = Operator(name, family, check, flops, autocast, gradient, cpu_only)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    for registered in op.registered_names:
        qualified = f"{NAMESPACE}::{registered}"
        torch.library.register_fake(qualified, checked_fake)
        packet = getattr(getattr(torch.ops, NAMESPACE), registered)
        register_flop_formula(packet)(_without_out_shape(flops))
        # a C++ kernel for the key is kept: registering over it would replace it in silence
        if cpu_only:
            _library_of_impls.impl(registered, _refuse_cuda(op), "CUDA", allow_override=False)
        elif not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
            _library_of_impls.impl(registered, op.run_triton, "CUDA", allow_override=False)
            _triton_serves_cuda.add(registered)
        elif name in cuda_table.TABLE and cuda_table.leaves_some(name):
            _share_with_triton(op, registered)
        if autocast:
            _register_autocast(packet.default, registered, autocast)
    if gradient:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}",
            _backward_through(gradient, len(op.argument_names)),
            setup_context=gradient.setup_context,
        )
    elif name.endswith("_backward"):
        torch.library.register_autograd(f"{NAMESPACE}::{name}", _refuse_second_derivative(name))
    return op


def _share_with_triton(op: Operator, registered: str) -> None:
    """Calls that fit no row of the table go to Triton, the others to the kernel that C++ has registered."""
    native = torch.library.get_kernel(f"{NAMESPACE}::{registered}", "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the kernel is replaced on purpose
        _library_of_impls.impl(
            registered, native_or_triton(op, native.call_boxed), "CUDA", with_keyset=True, allow_override=True
        )


def native_or_triton(op: Operator, native: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for the dispatcher that asks the table; ``native`` takes the dispatch keys first."""

    def run(keyset: Any, *args: Any) -> Any:
        fits = cuda_table.row_for(op.name, op.argument_names, args) is not None
        return native(keyset, *args) if fits else op.run_triton(*args)

    return run


def _refuse_cuda(op: Operator) -> Callable[..., Any]:
    def refused(*args: Any) -> Any:
        name, tensor = next((n, a) for n, a in zip(op.argument_names, args, strict=False) if _is_cuda(a))
        raise ValueError(f"{op.name}: {name} must be on the CPU (there is no GPU kernel), got {tensor.device}")

    return refused


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _backward_through(gradient: Gradient, arguments: int) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        # torch leaves out the last arguments of a call where they equal their defaults
        ctx.wanted = ctx.needs_input_grad + (False,) * (arguments - len(ctx.needs_input_grad))
        return gradient.backward(OPERATORS[gradient.backward_op].overload, ctx, *grads)

    return backward


def _refuse_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        op = name.removesuffix("_backward")
        raise RuntimeError(f"{op}: second derivatives are not supported by the kernels; use backend='reference'")

    return backward


def _without_out_shape(flops: Callable[..., int]) -> Callable[..., int]:
    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        del out_shape
        return flops(*args, **kwargs)

    return formula


def _register_autocast(overload: Any, registered: str, arguments: Sequence[str]) -> None:
    """torch's own `register_autocast` would cast every floating tensor: tables and weights too."""
    positions = {i for i, argument in enumerate(overload._schema.arguments) if argument.name in arguments}
    for key in _AUTOCAST_KEYS:
        device = "cuda" if key.endswith("CUDA") else "cpu"
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(tensor: Any, device: str = device) -> Any:
            narrowed = isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
            return tensor.to(torch.get_autocast_dtype(device)) if narrowed else tensor

        def kernel(*args: Any, keyset: Any = keyset, cast: Any = cast) -> Any:
            moved = [cast(value) if place in positions else value for place, value in enumerate(args)]
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return overload(*moved)

        _library_of_impls.impl(registered, kernel, key, allow_override=False)


def _wants_gradient(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args)


class _TritonFunction(torch.autograd.Function):
    """The Triton kernel of an operator with the operator's own gradient, its backward in Triton too."""

    @staticmethod
    def forward(ctx: Any, op: Operator, *args: Any) -> Any:
        output = op.run_triton(*args)
        assert op.gradient is not None
        ctx.gradient = op.gradient
        op.gradient.setup_context(ctx, args, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        run = OPERATORS[ctx.gradient.backward_op].run_triton
        # the operator itself is the first input of this function
        ctx.wanted = ctx.needs_input_grad[1:]
        return (None, *ctx.gradient.backward(run, ctx, *grads))


def call(op: Operator, backend: str | None, *args: Any) -> Any:
    """Run ``op`` on the backend that the caller, the context, the environment or the device asks for."""
    backend = requested(backend, op.name)
    if backend == "reference":
        return op.run_reference(*args)
    differentiable = op.gradient is not None and _wants_gradient(args)
    if backend == "triton":
        return _TritonFunction.apply(op, *args) if differentiable else op.run_triton(*args)
    if backend is not None:
        _require_device(op, backend, args[0])
    return op.overload(*args) if differentiable else op.forward_overload(*args)


def _require_device(op: Operator, backend: str, tensor: Any) -> None:
    device = tensor.device.type if isinstance(tensor, Tensor) else type(tensor).__name__
    if device != backend:
        raise ValueError(f"{op.name}: backend must be one that runs on {device}, got {backend!r}")
    if backend == "cuda" and not op.cpu_only and not has_cuda_kernel(op.name):
        raise ValueError(
            f"{op.name}: backend must be 'triton' here (the CUDA library has no kernel for it), got 'cuda'"
        )


def has_cuda_kernel(name: str) -> bool:
    """Whether the C++ library's kernel, not Triton's, serves CUDA tensors."""
    return name not in _triton_serves_cuda and not OPERATORS[name.removesuffix("_forward")].cpu_only
