"""Linear layers of a frozen model: several of the same input as one product, prepacked by oneDNN on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

#: hidden_act of a transformers config -> oneDNN's name of the function and its algorithm
FUSED_ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
# measured: oneDNN's float32 product on packed weights is 1.0 to 1.3 times torch's, and from here on .89 to .99
_MANY_ROWS, _WIDE = 512, 4096


@dataclass(frozen=True)
class _Packed:
    """oneDNN's copy of the weights, and the state of the parameters that it was made from."""

    state: tuple[Any, ...]
    #: the parameters' memory, kept so that no other can come to lie at the addresses in ``state``
    sources: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None


class FusedLinear:
    """One or several `nn.Linear` of the same input, with an activation after them.

    The parameters stay those of the modules. Where no gradient is recorded, on a CPU, the product runs on a copy of
    the weights in oneDNN's blocked layout, several modules as one matrix and the activation inside it: the one copy
    of parameters that is ever made, of the size of the weights. It is made again when a parameter was replaced,
    moved, cast or changed in place; changes through ``parameter.data`` and those of torch's fused optimizers bypass its
    version counters, and want `forget`. Everywhere else, and with ``prepack=False``, which makes no copy, the modules
    themselves run; so they do for many float32 rows of great width, where torch's own product is the faster one.

    oneDNN's fused residual ("binary") is not used: it builds its primitive anew at every call, 1 to 3 ms each.
    """

    def __init__(
        self,
        modules: Sequence[nn.Linear],
        activation: str | None = None,
        activation_module: Callable[[Tensor], Tensor] | None = None,
        *,
        prepack: bool = True,
    ) -> None:
        self._prepack = prepack
        self._modules = tuple(modules)
        self._sizes = [module.out_features for module in modules]
        self._attribute, self._algorithm = FUSED_ACTIVATIONS[activation] if activation else ("none", "")
        self._activation_module = activation_module
        self._packed: _Packed | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, in]`` to ``[T, sum of out]``."""
        packed = self._up_to_date(x)
        if packed is not None:
            return self._product(x, packed)
        out = torch.cat(self._apart(x), -1) if len(self._modules) > 1 else self._modules[0](x)
        return out if self._activation_module is None else self._activation_module(out)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """The output of each module, ``[T, out]``: strided views of one matrix where the product is fused."""
        packed = self._up_to_date(x)
        return self._apart(x) if packed is None else self._product(x, packed).split(self._sizes, -1)

    def forget(self) -> None:
        """Drop the prepacked copy."""
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's layout can be neither pickled nor copied
        return {**self.__dict__, "_packed": None}

    def _product(self, x: Tensor, packed: _Packed) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, self._attribute, [], self._algorithm)

    def _apart(self, x: Tensor) -> list[Tensor]:
        return [module(x) for module in self._modules]

    def _up_to_date(self, x: Tensor) -> _Packed | None:
        """The prepacked weights, made now if need be; None where the modules shall run."""
        if not self._prepack:
            return None
        if not _may_prepack(x):
            if not x.is_cpu:
                self.forget()
            return None
        state: list[Any] = [x.dtype]
        for module in self._modules:
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                # an inference tensor counts no versions, so its changes would go unseen
                if parameter.dtype != x.dtype or parameter.device != x.device or parameter.is_inference():
                    return None
                state += (parameter.data_ptr(), parameter._version)
        packed = self._packed
        if packed is None or packed.state != tuple(state):
            packed = self._packed = self._pack(tuple(state))
        return packed

    def _pack(self, state: tuple[Any, ...]) -> _Packed:
        weights = [module.weight.detach() for module in self._modules]
        biases = [None if module.bias is None else module.bias.detach() for module in self._modules]
        sources = (*weights, *(one for one in biases if one is not None))
        bias = None
        if len(sources) > len(weights):
            zeros = [weight.new_zeros(weight.shape[0]) for weight in weights]
            whole: list[Tensor] = [zero if one is None else one for one, zero in zip(biases, zeros, strict=True)]
            bias = torch.cat(whole)
        return _Packed(state, sources, torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights)), bias)


def _count_prepacked(x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Two for each multiplication and addition, as torch counts its own linear layers."""
    return 2 * x[0] * x[1] * weight[0]


if torch.backends.mkldnn.is_available():
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_count_prepacked)


def _may_prepack(x: Tensor) -> bool:
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.shape[0] > 0
        and not (x.dtype == torch.float32 and x.shape[0] >= _MANY_ROWS and x.shape[1] >= _WIDE)
        and bool(torch.backends.mkldnn.enabled)
        and _onednn_runs(x.dtype)
    )


@cache
def _onednn_runs(dtype: torch.dtype) -> bool:
    """Whether this processor and this build of torch have the product in ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32
