"""add_rms_norm and add_layer_norm with their gradients on every backend under the error rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embedding_kernels as ek
from error_rule import assert_within_rule
from norm.definition import FLOATS, Case, answers
from operators import assert_same

KINDS = ("rms", "one_plus_weight", "layer", "layer_without_bias")
SIZES = ((21, 37), (1, 1), (0, 24), (5, 0), (3, 130), (300, 16), (9, 1024), (2, 5000))
GRADIENT_SIZES = (*SIZES[:5], (300, 16), (1100, 24), (7, 1100))


@pytest.fixture(autouse=True)
def _has_kernel(request):
    if "backend" in request.fixturenames:
        for name in ("add_rms_norm", "add_layer_norm"):
            request.getfixturevalue("require_kernel")(name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(backend, device, size, residual, dtype, kind):
    Case(*size, kind, dtype, residual).check_forward(backend, device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("used", ("both", "normed"))
@pytest.mark.parametrize("size", GRADIENT_SIZES, ids=str)
def test_gradient(backend, device, size, used, dtype, kind):
    case = Case(*size, kind, dtype)
    grad, grad_summed = torch.randn(2, *size).to(dtype)
    case.check_gradients(backend, device, grad, grad_summed if used == "both" else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "dtype"), ((8200, torch.bfloat16), (8321, torch.float32)))
def test_rows_wider_than_a_block_holds(backend, device, dim, dtype, kind):
    case = Case(3, dim, kind, dtype)
    case.check_forward(backend, device)
    case.check_gradients(backend, device, *torch.randn(2, 3, dim).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_float32_vectors_of_narrow_rows(backend, device, dtype, kind):
    case = Case(40, 70, kind, dtype, wide=True)
    case.check_forward(backend, device)
    case.check_gradients(backend, device, *torch.randn(2, 40, 70).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_without_residual(backend, device, kind):
    """The sum is x itself, and its gradient is added by autograd."""
    case = Case(30, 50, kind, residual=False)
    case.check_gradients(backend, device, *torch.randn(2, 30, 50))


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_the_vectors_gradients_does_not_grow_with_the_rows(backend, device, kind):
    """Positive terms, where a running sum loses a digit for every hundredfold."""
    case = Case(6000, 24, kind, residual=False)
    case.tensors["x"] = case.tensors["x"].abs() + 1
    case.check_gradients(backend, device, torch.rand(6000, 24) + 1, None)


@pytest.mark.parametrize("kind", ("layer", "layer_without_bias"))
@pytest.mark.parametrize("mean", (1e2, 1e4, -1e4))
def test_large_offsets_are_taken_off_before_squaring(backend, device, mean, kind):
    """The mean square less the squared mean would have no digit of the variance left."""
    case = Case(30, 200, kind, residual=False)
    case.tensors["x"] = case.tensors["x"] + mean
    case.check_forward(backend, device)
    case.check_gradients(backend, device, torch.randn(30, 200), None)
    normal = case.kernel(backend, device, case.tensors | {"weight": torch.ones(200)})[0].cpu()
    normal = normal - case.tensors.get("bias", 0)
    torch.testing.assert_close(normal.square().mean(-1), torch.ones(30), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", (0.0, 1.0, 0.1, -3e4))
def test_constant_rows_are_their_bias(backend, device, value):
    """Nothing is left of a row without variance, but for the rounding of its mean."""
    case = Case(4, 96, "layer", residual=False)
    case.tensors["x"] = torch.full((4, 96), value)
    case.check_forward(backend, device)
    case.check_gradients(backend, device, torch.randn(4, 96), None)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", (0.0, 1e-12, 1.0, 1e6))
def test_eps(backend, device, eps, kind):
    case = Case(20, 33, kind, eps=eps)
    case.check_forward(backend, device)
    case.check_gradients(backend, device, *torch.randn(2, 20, 33))


def test_zero_rows_with_eps_are_zero(backend, device):
    """And have a gradient: that of rows divided by a constant."""
    x, weight = torch.zeros(2, 40, device=device, requires_grad=True), torch.ones(40, device=device)
    normed, _ = ek.add_rms_norm(x, None, weight, eps=0.25, backend=backend)
    assert not normed.any()
    (grad,) = torch.autograd.grad(normed.sum(), x)
    assert_same(grad, torch.full((2, 40), 2.0))


@pytest.mark.parametrize("bias", (True, False))
def test_equals_layer_norm_of_torch(backend, device, bias):
    module = torch.nn.LayerNorm(130, eps=1e-6, bias=bias)
    torch.nn.init.normal_(module.weight)
    case = Case(40, 130, "layer" if bias else "layer_without_bias", eps=1e-6)
    case.tensors["weight"] = module.weight.detach()
    if bias:
        torch.nn.init.normal_(module.bias)
        case.tensors["bias"] = module.bias.detach()
    expected = module(case.summed()).detach()
    assert_within_rule(case.kernel(backend, device)[0].cpu(), case.exact(), expected, case.magnitude())


@pytest.mark.parametrize("kind", ("rms", "one_plus_weight"))
def test_equals_norms_of_transformers(backend, device, kind):
    """Llama's norm multiplies by the weight, Gemma's by 1 + weight."""
    if kind == "rms":
        module = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(130, eps=1e-5)
    else:
        module = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(130, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    case = Case(40, 130, kind)
    case.tensors["weight"] = module.weight.detach()
    expected = module(case.summed()).detach()
    assert_within_rule(case.kernel(backend, device)[0].cpu(), case.exact(), expected, case.magnitude())


@pytest.mark.parametrize("kind", KINDS)
def test_any_stride(backend, device, kind):
    """Rows further apart, every second column, columns stored first; and the same of the gradients."""
    if backend == "reference":
        pytest.skip("plain torch sums in the order in which values lie")
    case, grads = Case(20, 24, kind), torch.randn(2, 20, 24)
    layouts = (
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
        lambda t: t.T.contiguous().T,
    )
    expected = answers(case, backend, device, lambda t: t, grads)
    for layout in layouts:
        assert_same(answers(case, backend, device, layout, grads), expected)


def test_repeated_rows(backend, device):
    """Stride 0, of rows and, as the gradient of a sum, of gradients."""
    case = Case(1, 24, "layer")
    case.tensors |= {name: case.tensors[name].expand(9, 24) for name in ("x", "residual")}
    ones = torch.ones(()).expand(2, 9, 24)
    expected = answers(case, backend, device, torch.Tensor.contiguous, ones.contiguous())
    assert_same(answers(case, backend, device, lambda t: t, ones), expected)


# triton's interpreter is numpy, which warns of what is tested here
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 3e38))
def test_what_is_not_finite_stays_in_its_row(backend, device, value, kind):
    case, grads = Case(50, 40, kind), torch.randn(2, 50, 40)
    others = [row for row in range(50) if row not in (3, 30)]
    clean = answers(case, backend, device, lambda t: t, grads)
    case.tensors["x"][3, 7], case.tensors["residual"][30, 39] = value, value
    dirty = answers(case, backend, device, lambda t: t, grads)
    # normed, summed and the gradients of x and of the residual
    for a, b in zip(dirty[:4], clean[:4], strict=True):
        assert_same(a[others], b[others])
    if value != 3e38:
        assert not dirty[0][[3, 30]].isfinite().all(1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_only_where_they_are_wanted(backend, device, kind):
    case, grads = Case(20, 33, kind), torch.randn(2, 20, 33, device=device)
    whole = dict(zip(case.tensors, answers(case, backend, device, lambda t: t, grads)[2:], strict=True))
    for wanted in case.tensors:
        leaves = {name: t.detach().to(device).requires_grad_(name == wanted) for name, t in case.tensors.items()}
        normed, summed = case.kernel(backend, device, leaves)
        if summed.requires_grad:
            torch.autograd.backward([normed, summed], list(grads))
        else:
            normed.backward(grads[0])
        assert_same(leaves[wanted].grad, whole[wanted])
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


@pytest.mark.parametrize("kind", KINDS)
def test_one_output_unused(backend, device, kind):
    """The sum alone hands its gradient through, and no other; the norm alone is as with a gradient of 0 for the sum."""
    case, (grad, grad_summed) = Case(20, 33, kind), torch.randn(2, 20, 33, device=device)
    leaves = {name: t.detach().to(device).requires_grad_() for name, t in case.tensors.items()}
    _, summed = case.kernel(backend, device, leaves)
    found = torch.autograd.grad(summed, list(leaves.values()), grad_summed, allow_unused=True)
    assert_same(found[:2], (grad_summed, grad_summed))
    assert all(vector is None or not vector.any() for vector in found[2:])
    normed, _ = case.kernel(backend, device, leaves)
    alone = torch.autograd.grad(normed, list(leaves.values()), grad)
    zeros = torch.stack([grad, torch.zeros_like(grad)])
    assert_same(alone, answers(case, backend, device, lambda t: t, zeros)[2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_is_rounded_before_it_is_normed(backend, device, dtype, kind):
    """What is normed is what is handed on, to the bit."""
    case = Case(30, 70, kind, dtype)
    normed, summed = case.kernel(backend, device)
    alone = {name: tensor for name, tensor in case.tensors.items() if name != "residual"}
    assert_same(case.kernel(backend, device, alone | {"x": summed.cpu()})[0], normed)


def test_the_sum_without_a_residual_is_the_input(backend, device):
    x, weight = torch.randn(5, 9, device=device), torch.ones(9, device=device)
    assert ek.add_rms_norm(x, None, weight, backend=backend)[1] is x
    assert ek.add_layer_norm(x, None, weight, backend=backend)[1] is x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", (2, 3))
def test_same_bits_for_any_thread_count(threads, kind):
    for rows, dim in ((5000, 33), (3, 9000), (130, 384)):
        case, grads = Case(rows, dim, kind), torch.randn(2, rows, dim)
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(answers(case, "cpu", "cpu", lambda t: t, grads))
        assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", (True, False))
def test_gradcheck_of_the_definition(residual, kind):
    case = Case(4, 6, kind, residual=residual)
    names = list(case.tensors)

    def run(*values):
        return case.kernel("reference", "cpu", dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(run, [tensor.double().requires_grad_() for tensor in case.tensors.values()])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_drawn(data):
    rows, dim = data.draw(st.integers(0, 70), "rows"), data.draw(st.integers(1, 200), "dim")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    case = Case(
        rows,
        dim,
        data.draw(st.sampled_from(KINDS), "kind"),
        data.draw(st.sampled_from(FLOATS), "dtype"),
        data.draw(st.booleans(), "residual"),
        data.draw(st.booleans(), "wide"),
        data.draw(st.sampled_from((1e-12, 1e-5, 0.1)), "eps"),
    )
    case.check_forward("cpu", "cpu")
    grad, grad_summed = torch.randn(2, rows, dim).to(case.tensors["x"].dtype)
    case.check_gradients("cpu", "cpu", grad, grad_summed if data.draw(st.booleans(), "both") else None)
