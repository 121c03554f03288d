"""One call of varlen_attention with what the error rule needs: the float64 definition, plain torch at the kernel's
dtype, and the same expressions over absolute values; forward and backward, for each sequence and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import embedding_kernels as ek
from error_rule import assert_within_rule, unit_roundoff

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("q", "k", "v", "bias_table")
Gradients = dict[str, Tensor]
Results = tuple[Tensor, Tensor]  # out and lse


def interpreted(backend: str) -> bool:
    """Whether Triton's interpreter runs the kernel, thousands of times slower than a GPU."""
    return backend == "triton" and not torch.cuda.is_available()


def emulated(backend: str) -> bool:
    """Whether the host emulation runs the CUDA kernel, a hundred times slower than C++."""
    return backend == "cuda_host"


def main_dtype(backend: str) -> torch.dtype:
    """For what holds in any dtype. The CUDA C++ kernel leaves float32 to Triton."""
    return torch.bfloat16 if backend in ("cuda", "cuda_host") else torch.float32


def some_floats(backend: str, dtypes: tuple[torch.dtype, ...] = FLOATS[:1]) -> tuple[torch.dtype, ...]:
    """The dtypes to try; a few where a kernel is interpreted or emulated: float16 takes bfloat16's way."""
    if interpreted(backend):
        return dtypes
    return FLOATS[1:2] if emulated(backend) else FLOATS


def skip_if_slow(backend: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = FLOATS[:2]) -> None:
    if emulated(backend) and dtype == torch.float32:
        pytest.skip("the CUDA C++ kernel leaves float32 to Triton")
    if dtype not in some_floats(backend, dtypes):
        pytest.skip("the interpreter and the emulation try fewer dtypes")


def offsets(lengths) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


@dataclass
class Case:
    """What is asked of varlen_attention; the tensors are drawn when it is made."""

    lengths: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None
    heads: int = 2
    kv_heads: int | None = None
    dim: int = 32
    dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    reach: int | None = None  # R of the bias table
    rotated: int = 0  # Dr of the rotation
    positions: str = ""  # "": counted; "shifted": the last rows of a longer text; "drawn": in any order
    used: float | None = None  # share of the keys that count
    options: dict[str, Any] = field(default_factory=dict)  # scale, causal, window_left, window_right, softcap
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.lengths_k = self.lengths if self.lengths_k is None else self.lengths_k
        self.kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        self.dim_v = self.dim if self.dim_v is None else self.dim_v
        rows, rows_k = sum(self.lengths), sum(self.lengths_k)
        self.tensors = {
            "q": torch.randn(rows, self.heads, self.dim).to(self.dtype),
            "k": torch.randn(rows_k, self.kv_heads, self.dim).to(self.dtype),
            "v": torch.randn(rows_k, self.kv_heads, self.dim_v).to(self.dtype),
        }
        self.cu_q, self.cu_k = offsets(self.lengths), offsets(self.lengths_k)
        if self.reach is not None:
            self.tensors["bias_table"] = torch.randn(self.heads, 2 * self.reach + 1)
        if self.positions:
            self.tensors |= self._draw_positions()
        if self.rotated:
            last = max([*self.lengths, *self.lengths_k, 0, *(int(t.max()) + 1 for t in self._position_tensors())])
            rates = 100.0 ** -torch.linspace(0, 1, self.rotated // 2)
            angles = torch.arange(last)[:, None] * rates
            self.tensors |= {"rope_cos": angles.cos(), "rope_sin": angles.sin()}
        if self.used is not None:
            self.tensors["seqused_k"] = torch.tensor([int(n * self.used) for n in self.lengths_k], dtype=torch.int32)

    def _position_tensors(self) -> list[Tensor]:
        return [t for name, t in self.tensors.items() if name.startswith("positions") and t.numel()]

    def _draw_positions(self) -> dict[str, Tensor]:
        if self.positions == "drawn":
            most = 2 * max([*self.lengths_k, 1])
            return {
                "positions_q": torch.randint(0, most, (sum(self.lengths),), dtype=torch.int32),
                "positions_k": torch.randint(0, most, (sum(self.lengths_k),), dtype=torch.int32),
            }
        # the queries are the last rows of their text, as after a prefix
        pairs = zip(self.lengths, self.lengths_k, strict=True)
        starts = [torch.arange(max(k - q, 0), max(k - q, 0) + q) for q, k in pairs]
        counts = [torch.arange(k) for k in self.lengths_k]
        empty = torch.zeros(0, dtype=torch.int64)
        return {
            "positions_q": torch.cat([empty, *starts]).to(torch.int32),
            "positions_k": torch.cat([empty, *counts]).to(torch.int32),
        }

    def arguments(self, tensors: dict[str, Tensor] | None = None, device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of the public function; ``tensors`` stand in for those of the same names."""
        moved = {name: tensor.to(device) for name, tensor in (self.tensors | (tensors or {})).items()}
        lengths = {
            "cu_seqlens_q": self.cu_q.to(device),
            "cu_seqlens_k": self.cu_k.to(device),
            "max_seqlen_q": max([*self.lengths, 0]),
            "max_seqlen_k": max([*self.lengths_k, 0]),
        }
        return moved | lengths | self.options

    def run(self, backend: str | None, device: str = "cpu", tensors: dict[str, Tensor] | None = None) -> Results:
        return ek.varlen_attention(**self.arguments(tensors, device), return_lse=True, backend=backend)

    # ---- who answers: the kernel, the definition, plain torch ----

    def kernel(self, backend: str, device: str) -> Callable[[dict[str, Tensor]], Results]:
        return lambda tensors: self.run(backend, device, tensors)

    def definition(self, tensors: dict[str, Tensor]) -> Results:
        return self.run("reference", tensors=tensors)

    def plain(self, tensors: dict[str, Tensor]) -> Results:
        """Products at the dtype of the inputs, softmax in float32 (float64 for float64), sequence by sequence."""
        tensors = self.tensors | tensors
        parts = [attend(self, sequence, tensors) for sequence in sequences(self)]
        return torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts], 1)

    def doubled(self) -> dict[str, Tensor]:
        return {name: self.tensors[name].double() for name in DIFFERENTIABLE if name in self.tensors}

    def drawn_gradients(self, through: str = "out and lse") -> tuple[Tensor | None, Tensor | None]:
        grad_out = torch.randn(sum(self.lengths), self.heads, self.dim_v).to(self.dtype)
        grad_lse = torch.randn(self.heads, sum(self.lengths))
        return grad_out if "out" in through else None, grad_lse if "lse" in through else None


@dataclass
class Sequence:
    """One sequence of a case: its rows, their positions, and who sees whom."""

    rows_q: slice
    rows_k: slice
    at_q: Tensor
    at_k: Tensor
    visible: Tensor  # [Lq, Lk]


@dataclass
class Attended:
    """What attention of one sequence goes through; heads first."""

    q: Tensor  # rotated, [Hq, Lq, Dh]
    k: Tensor  # rotated, repeated for the heads of a group, [Hq, Lk, Dh]
    v: Tensor  # [Hq, Lk, Dv]
    tanh: Tensor | None  # of the scores over softcap
    weights: Tensor  # [Hq, Lq, Lk]
    out: Tensor  # [Lq, Hq, Dv]
    lse: Tensor  # [Hq, Lq]


def sequences(case: Case) -> Iterator[Sequence]:
    for s in range(len(case.lengths)):
        start_q, end_q = case.cu_q[s : s + 2].tolist()
        start_k, end_k = case.cu_k[s : s + 2].tolist()
        if "seqused_k" in case.tensors:
            end_k = start_k + int(case.tensors["seqused_k"][s])
        rows_q, rows_k = slice(start_q, end_q), slice(start_k, end_k)
        at_q, at_k = torch.arange(end_q - start_q), torch.arange(end_k - start_k)
        if case.positions:
            at_q, at_k = case.tensors["positions_q"][rows_q].long(), case.tensors["positions_k"][rows_k].long()
        apart = at_k[None] - at_q[:, None]
        left, right = (case.options.get(name, -1) for name in ("window_left", "window_right"))
        lowest = -left if left >= 0 else -(2**40)
        highest = min(right if right >= 0 else 2**40, 0 if case.options.get("causal") else 2**40)
        yield Sequence(rows_q, rows_k, at_q, at_k, (apart >= lowest) & (apart <= highest))


def rotate(x: Tensor, at: Tensor, tensors: dict[str, Tensor], sign: int = -1) -> Tensor:
    """RoPE of ``x [n, H, D]``; with sign 1 and absolute values, the magnitude of its terms."""
    if "rope_cos" not in tensors:
        return x
    tables = [tensors[name][at][:, None] for name in ("rope_cos", "rope_sin")]
    cos, sin = (table.to(x.dtype) if sign < 0 else table.to(x.dtype).abs() for table in tables)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos + sign * second * sin, second * cos + first * sin, rest), -1)


def buckets(case: Case, sequence: Sequence) -> Tensor:
    """Column of the bias table for each query and key."""
    apart = sequence.at_k[None] - sequence.at_q[:, None]
    return apart.clamp(-case.reach, case.reach) + case.reach


def attend(case: Case, sequence: Sequence, tensors: dict[str, Tensor]) -> Attended:
    dtype = tensors["q"].dtype
    group = case.heads // case.kv_heads
    q = rotate(tensors["q"][sequence.rows_q], sequence.at_q, tensors).transpose(0, 1)
    k = rotate(tensors["k"][sequence.rows_k], sequence.at_k, tensors).repeat_interleave(group, 1).transpose(0, 1)
    v = tensors["v"][sequence.rows_k].repeat_interleave(group, 1).transpose(0, 1)
    scale = case.options.get("scale")
    scores = (q @ k.mT).to(torch.promote_types(dtype, torch.float32)) * (case.dim**-0.5 if scale is None else scale)
    softcap, tanh = case.options.get("softcap", 0.0), None
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores = softcap * tanh
    if case.reach is not None:
        scores = scores + tensors["bias_table"].to(scores.dtype)[:, buckets(case, sequence)]
    sees = sequence.visible.any(1)[:, None]
    # rows without a key: any finite scores, then weight 0, so that their gradient is 0
    scores = scores.masked_fill(sees & ~sequence.visible, -torch.inf)
    weights = torch.softmax(scores, -1) * sees
    # torch refuses the logarithm of a sum over no keys
    sums = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.sum(-1)
    lse = sums.masked_fill(~sees[:, 0], -torch.inf)
    out = (weights.to(dtype) @ v).transpose(0, 1)
    return Attended(q, k, v, tanh, weights, out, lse)


def gradients(
    answer: Callable[[dict[str, Tensor]], Results],
    inputs: dict[str, Tensor],
    *grads: Tensor | None,
) -> Gradients:
    """Of every differentiable input, for a loss through the output and lse where those have a gradient."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in DIFFERENTIABLE if name in inputs}
    pairs = [(out, grad) for out, grad in zip(answer(leaves), grads, strict=True) if grad is not None]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        list(leaves.values()),
        [grad.to(out.device, out.dtype) for out, grad in pairs],
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))


# ---- the same expressions over absolute values ----


def forward_magnitudes(case: Case) -> Results:
    """Σ p |v| for the output; |lse| + Σ p |score| for lse."""
    tensors = case.tensors | case.doubled()
    outs, lses = [], []
    for sequence in sequences(case):
        part = attend(case, sequence, tensors)
        scores = _score_magnitudes(case, sequence, part, tensors)
        outs.append((_weight_magnitudes(part, scores, _score_rounding(case)) @ part.v.abs()).transpose(0, 1))
        finite = part.lse.masked_fill(part.lse.isinf(), 0).abs()
        # lse is float32: counted in its roundings
        roundings = _score_rounding(case) * unit_roundoff(case.dtype) / unit_roundoff(torch.float32)
        lses.append(finite + (part.weights * scores).sum(-1) * roundings)
    return torch.cat(outs), torch.cat(lses, 1)


def _score_rounding(case: Case) -> float:
    """A rounding of a score, in roundings of the case's dtype. Scores are float32, but of rotated rows, which a product
    takes at the dtype."""
    return 1.0 if case.rotated else unit_roundoff(torch.float32) / unit_roundoff(case.dtype)


def _weight_magnitudes(part: Attended, scores: Tensor, rounding: float) -> Tensor:
    """p (1 + |score|): a rounding of a score is one of its weight."""
    return part.weights * (1 + rounding * scores)


def _absolute_heads(case: Case, rows: Tensor, at: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """|x| rotated, repeated for the heads of a group, heads first."""
    turned = rotate(rows.abs(), at, tensors, sign=1)
    return turned.repeat_interleave(case.heads // rows.shape[1], 1).transpose(0, 1)


def _score_magnitudes(case: Case, sequence: Sequence, part: Attended, tensors: dict[str, Tensor]) -> Tensor:
    q = _absolute_heads(case, tensors["q"][sequence.rows_q], sequence.at_q, tensors)
    k = _absolute_heads(case, tensors["k"][sequence.rows_k], sequence.at_k, tensors)
    scale = case.options.get("scale")
    scores = q @ k.mT * (case.dim**-0.5 if scale is None else abs(scale))
    if part.tanh is not None:
        # a rounding of a score passes by the slope where the score lies: tanh of absolute values would hide it
        scores = (1 - part.tanh**2) * scores + case.options["softcap"] * part.tanh.abs()
    if case.reach is not None:
        scores = scores + tensors["bias_table"].abs()[:, buckets(case, sequence)]
    return scores


def _slope_magnitudes(part: Attended, weights: Tensor, grad: Tensor, grad_lse: Tensor | None, share: float) -> Tensor:
    """|dS| ≤ P (|dP| + |δ|) with dP = dO·V and δ = dO·O − dlse; ``share`` of a rounding for each term of dP."""
    terms = share * (grad.abs() @ part.v.abs().mT)
    delta = (grad * part.out.transpose(0, 1)).abs().sum(-1) + (part.weights * terms).sum(-1)
    if grad_lse is not None:
        delta = delta + grad_lse.abs()
    return weights * ((grad @ part.v.mT).abs() + terms + delta[..., None])


def gradient_magnitudes(case: Case, grad_out: Tensor | None, grad_lse: Tensor | None) -> Gradients:
    """|dV| ≤ Pᵀ|dO|; dQ, dK and the table's gradient are sums of dS."""
    if grad_out is None:
        grad_out = torch.zeros(sum(case.lengths), case.heads, case.dim_v)
    tensors = case.tensors | case.doubled()
    sums = {name: torch.zeros_like(tensor) for name, tensor in case.doubled().items()}
    scale = case.options.get("scale")
    scale = case.dim**-0.5 if scale is None else abs(scale)
    narrow = unit_roundoff(torch.float32) / unit_roundoff(case.dtype)
    for sequence in sequences(case):
        part = attend(case, sequence, tensors)
        scores = _score_magnitudes(case, sequence, part, tensors)
        weights = _weight_magnitudes(part, scores, _score_rounding(case))
        grad = grad_out[sequence.rows_q].double().transpose(0, 1)
        lse = None if grad_lse is None else grad_lse[:, sequence.rows_q].double()
        if case.reach is not None:  # in roundings of float32, which the table's gradient is
            wide = _weight_magnitudes(part, scores, _score_rounding(case) / narrow)
            changes = _slope_magnitudes(part, wide, grad, lse, 1.0)
            # but the output in δ was rounded to the dtype
            changes += part.weights * (grad * part.out.transpose(0, 1)).abs().sum(-1, keepdim=True) / narrow
            sums["bias_table"].scatter_add_(
                1, buckets(case, sequence).flatten().expand(case.heads, -1), changes.flatten(1)
            )
        changes = scale * _slope_magnitudes(part, weights, grad, lse, narrow)
        if part.tanh is not None:
            changes = changes * (1 + part.tanh**2)
        keys = _absolute_heads(case, tensors["k"][sequence.rows_k], sequence.at_k, tensors)
        queries = _absolute_heads(case, tensors["q"][sequence.rows_q], sequence.at_q, tensors)
        sums["q"][sequence.rows_q] += rotate((changes @ keys).transpose(0, 1), sequence.at_q, tensors, sign=1)
        turned_back = rotate((changes.mT @ queries).transpose(0, 1), sequence.at_k, tensors, sign=1)
        sums["k"][sequence.rows_k] += _over_groups(turned_back, case.kv_heads)
        sums["v"][sequence.rows_k] += _over_groups((weights.mT @ grad.abs()).transpose(0, 1), case.kv_heads)
    return sums


def _over_groups(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, -1)).sum(2)


# ---- the rule ----


def by_pair(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[T, H, D]`` as one row for each sequence and head, ends filled with zeros."""
    starts = cu_seqlens.tolist()
    longest = max([b - a for a, b in pairwise(starts)], default=0)
    rows = x.new_zeros(len(starts) - 1, longest, *x.shape[1:])
    for s, (start, end) in enumerate(pairwise(starts)):
        rows[s, : end - start] = x[start:end]
    return rows.transpose(1, 2).flatten(0, 1)


def assert_forward(case: Case, backend: str, device: str) -> None:
    """Output and lse of a backend under the error rule."""
    assert_results(case, case.run(backend, device), case.definition(case.doubled()), case.plain({}))


def assert_results(case: Case, kernel: Results, exact: Results, plain: Results) -> None:
    answers = ([x.cpu() for x in kernel], exact, plain, forward_magnitudes(case))
    assert_within_rule(*(by_pair(out, case.cu_q) for out, _ in answers))
    assert_within_rule(*(by_pair(lse.mT[..., None], case.cu_q) for _, lse in answers))


def assert_backward(case: Case, backend: str, device: str, through: str = "out and lse") -> None:
    """Gradients of a backend under the error rule."""
    grads = case.drawn_gradients(through)
    inputs = {name: case.tensors[name] for name in DIFFERENTIABLE if name in case.tensors}
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    kernel = gradients(case.kernel(backend, device), on_device, *grads)
    exact = gradients(case.definition, case.doubled(), *grads)
    plain = gradients(case.plain, inputs, *grads)
    assert_gradients(case, kernel, exact, plain, gradient_magnitudes(case, *grads))


def assert_gradients(case: Case, kernel: Gradients, exact: Gradients, plain: Gradients, magnitudes: Gradients) -> None:
    for name, got in kernel.items():
        answers = (got.cpu(), exact[name], plain[name], magnitudes[name])
        if name == "bias_table":  # a row for each head, summed over the sequences
            assert_within_rule(*answers)
        else:
            cu_seqlens = case.cu_q if name == "q" else case.cu_k
            assert_within_rule(*(by_pair(x, cu_seqlens) for x in answers))
