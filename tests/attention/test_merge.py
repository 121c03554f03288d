"""merge_attention and its gradient on every backend under the error rule, for each head; and what it is for: attention
over a shared prefix and a tail."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import attention.definition
import embedding_kernels as ek
from attention.definition import FLOATS, Case, assert_gradients, assert_results, gradient_magnitudes, skip_if_slow
from error_rule import assert_within_rule
from operators import assert_same

OPERATOR = "merge_attention"
SIZES = ((1, 1, 16), (40, 3, 24), (7, 2, 256), (130, 1, 33), (0, 2, 16), (5, 12, 1))


def partial_results(rows: int, heads: int, dim: int, dtype: torch.dtype, spread: float = 3.0) -> list[torch.Tensor]:
    """Two partial results; one side, the other side and both without keys in some rows."""
    out_a, out_b = torch.randn(2, rows, heads, dim).to(dtype)
    lse_a, lse_b = torch.randn(2, heads, rows) * spread
    lse_a[:, 1:3], lse_b[:, 2:5] = -torch.inf, -torch.inf
    return [out_a, lse_a, out_b, lse_b]


def merged(tensors, backend="reference"):
    return ek.merge_attention(*tensors, backend=backend)


def plain(out_a, lse_a, out_b, lse_b):
    """The formula in float32, rounded once."""
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [torch.exp(x - lse).nan_to_num(0).mT[..., None] for x in (lse_a, lse_b)]
    return (weights[0] * out_a.float() + weights[1] * out_b.float()).to(out_a.dtype), lse


def magnitudes_of(tensors):
    """Weights whose logarithms are rounded too, w (1 + |lse|); Σ w |out|; |lse| + Σ w."""
    out_a, lse_a, out_b, lse_b = (x.double() for x in tensors)
    _, lse = merged((out_a, lse_a, out_b, lse_b))
    m_a, m_b = (torch.where(x.isinf(), 0, torch.exp(x - lse) * (1 + x.abs() + lse.abs())) for x in (lse_a, lse_b))
    out = m_a.mT[..., None] * out_a.abs() + m_b.mT[..., None] * out_b.abs()
    sums = torch.where(lse.isinf(), 0, lse.abs()) + m_a + m_b
    return (m_a, m_b), out, sums


def by_head(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1) if x.dim() == 3 else x


@pytest.mark.parametrize("spread", (0.1, 3.0, 60.0))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(backend, device, size, dtype, spread):
    tensors = partial_results(*size, dtype, spread)
    out, lse = (x.cpu() for x in merged([x.to(device) for x in tensors], backend))
    exact = merged([x.double() for x in tensors])
    expected = plain(*tensors)
    _, out_magnitude, lse_magnitude = magnitudes_of(tensors)
    assert_within_rule(by_head(out), by_head(exact[0]), by_head(expected[0]), by_head(out_magnitude))
    assert_within_rule(lse, exact[1], expected[1], lse_magnitude)


def gradients(run, tensors, grad_out, grad_lse):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = run(leaves)
    outs, grads = [out], [grad_out.to(out.device, out.dtype)]
    if grad_lse is not None:
        outs, grads = [out, lse], [*grads, grad_lse.to(lse.device, lse.dtype)]
    return torch.autograd.grad(outs, leaves, grads)


def plain_gradients(tensors, grad_out, grad_lse):
    """The gradient's formula in float32: w grad; w (grad · (out − merged) + grad_lse)."""
    out_a, lse_a, out_b, lse_b = tensors
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [torch.exp(x - lse).nan_to_num(0) for x in (lse_a, lse_b)]
    dots = [(grad_out.float() * x.float()).sum(-1).mT for x in (out_a, out_b)]
    mean = weights[0] * dots[0] + weights[1] * dots[1]
    found = []
    for weight, dot in zip(weights, dots, strict=True):
        found.append((weight.mT[..., None] * grad_out.float()).to(out_a.dtype))
        found.append(weight * (dot - mean + (0 if grad_lse is None else grad_lse)))
    return found


@pytest.mark.parametrize("with_lse", (False, True))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient(backend, device, size, dtype, with_lse):
    tensors = partial_results(*size, dtype)
    grad_out = torch.randn(*size).to(dtype)
    grad_lse = torch.randn(size[1], size[0]) if with_lse else None
    got = gradients(lambda x: merged(x, backend), [x.to(device) for x in tensors], grad_out, grad_lse)
    exact = gradients(merged, [x.double() for x in tensors], grad_out, grad_lse)
    expected = plain_gradients(tensors, grad_out, grad_lse)
    (m_a, m_b), _, _ = magnitudes_of(tensors)
    dots = [(grad_out.double().abs() * x.double().abs()).sum(-1).mT for x in (tensors[0], tensors[2])]
    mean = m_a * dots[0] + m_b * dots[1] + (0 if grad_lse is None else grad_lse.double().abs())
    magnitudes = []
    for m, dot in ((m_a, dots[0]), (m_b, dots[1])):
        magnitudes += [m.mT[..., None] * grad_out.double().abs(), m * (dot + mean)]
    for answers in zip([x.cpu() for x in got], exact, expected, magnitudes, strict=True):
        assert_within_rule(*map(by_head, answers))


def test_gradcheck_of_the_definition():
    tensors = [x.double() for x in partial_results(6, 2, 3, torch.float64)]
    seen = [0, 3, 5]  # rows with keys on both sides: −∞ has no finite differences

    def run(*values):
        out, lse = merged([v[seen] if v.dim() == 3 else v[:, seen] for v in values])
        return out, lse

    tensors[3] = tensors[3].masked_fill(tensors[3].isinf(), 0.5)
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in tensors])


def test_rows_without_keys(backend, device):
    """One side's rows are the other's, to the bit; both sides' are 0 and −∞, with gradient 0."""
    tensors = [x.to(device).requires_grad_() for x in partial_results(8, 2, 24, torch.float32)]
    out, lse = merged(tensors, backend)
    assert_same(out[1], tensors[2][1])
    assert_same(out[3:5], tensors[0][3:5])
    assert not out[2].any() and bool((lse[:, 2] == -torch.inf).all())
    grads = torch.autograd.grad([out, lse], tensors, [torch.randn_like(out), torch.randn_like(lse)])
    for grad in grads:
        assert bool(grad.isfinite().all())
        assert not (grad[2] if grad.dim() == 3 else grad[:, 2]).any()


def test_what_stands_in_rows_without_keys_does_not_count(backend, device):
    tensors = [x.to(device) for x in partial_results(8, 2, 24, torch.float32)]
    clean = merged(tensors, backend)
    tensors[0][1:3] = float("nan")
    assert_same(merged(tensors, backend), clean)


def test_a_nan_stays_in_its_row_and_head(backend, device):
    tensors = [x.to(device) for x in partial_results(8, 2, 24, torch.float32)]
    clean = merged(tensors, backend)
    tensors[0][6, 1, 3] = float("nan")
    out, lse = merged(tensors, backend)
    assert_same(lse, clean[1])
    wrong = torch.nonzero(~((out == clean[0]) | (out.isnan() & clean[0].isnan())))
    assert wrong.tolist() == [[6, 1, 3]]


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_prefix_and_tail_are_the_whole(backend, device, dtype):
    """Keys of each text split in two: the merged halves are attention over all of them, gradients included."""
    skip_if_slow(backend, dtype)
    lengths, cuts = (30, 5, 17), (12, 5, 0)
    whole = Case(lengths, heads=4, kv_heads=2, dtype=dtype)
    halves = []
    for parts in (cuts, [n - cut for n, cut in zip(lengths, cuts, strict=True)]):
        halves.append(Case(lengths, tuple(parts), heads=4, kv_heads=2, dtype=dtype))
    bounds = [(a, a + cut, b) for (a, b), cut in zip(pairwise(whole.cu_k.tolist()), cuts, strict=True)]
    rows = [torch.cat([torch.arange(bound[i], bound[i + 1]) for bound in bounds]) for i in (0, 1)]

    def split(attend, merge):
        def run(tensors):
            tensors = {name: tensors.get(name, x) for name, x in whole.tensors.items()}
            sides = []
            for half, chosen in zip(halves, rows, strict=True):
                kept = {name: tensors[name][chosen.to(tensors[name].device)] for name in ("k", "v")}
                sides += attend(half, tensors | kept)
            return merge(sides)

        return run

    kernel = split(lambda half, x: half.run(backend, device, x), lambda sides: merged(sides, backend))
    plainly = split(lambda half, x: half.plain(x), lambda sides: plain(*sides))
    on_device = {name: x.to(device) for name, x in whole.tensors.items()}
    assert_results(whole, kernel(on_device), whole.definition(whole.doubled()), plainly({}))
    grads = whole.drawn_gradients()
    found = [
        attention.definition.gradients(run, inputs, *grads)
        for run, inputs in ((kernel, on_device), (whole.definition, whole.doubled()), (plainly, whole.tensors))
    ]
    assert_gradients(whole, *found, gradient_magnitudes(whole, *grads))
