"""grouped_softmax and its gradient on every backend under the error rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embedding_kernels as ek
from embedding_kernels import reference
from error_rule import assert_within_rule
from operators import assert_same

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# rows, groups, columns of a group
SIZES = (
    *((21, 8, 5), (1, 1, 1), (0, 4, 3), (5, 3, 0), (9, 7, 1), (3, 1, 1031), (4, 8, 512), (300, 2, 16), (6, 5, 77)),
    *((2, 1, 4099), (1, 2, 4200)),  # past what a block of the CUDA kernels holds
)

# triton's interpreter is numpy, which warns of infinities and NaN
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _has_kernel(request):
    if "backend" in request.fixturenames:
        request.getfixturevalue("require_kernel")("grouped_softmax")


def plain(scores, groups):
    """torch's own softmax, which keeps the rounded probabilities for its gradient."""
    return torch.softmax(scores.unflatten(1, (groups, -1)) if scores.numel() else scores, -1).reshape(scores.shape)


def lines(tensor, groups):
    """One row for each group: the rule holds in each."""
    return tensor.reshape(tensor.shape[0] * groups, tensor.shape[1] // groups)


def check_forward(scores, groups, backend, device):
    out = ek.grouped_softmax(scores.to(device), groups, backend=backend).cpu()
    exact = reference.grouped_softmax(scores.double(), groups)
    # an exponential times a scale, which is rounded itself; all are positive
    magnitude = 2 * exact.nan_to_num()
    assert_within_rule(*(lines(t, groups) for t in (out, exact, plain(scores, groups), magnitude)))


def gradient(softmax, scores, grad):
    leaf = scores.detach().clone().requires_grad_()
    return torch.autograd.grad(softmax(leaf), leaf, grad)[0]


def check_gradient(scores, groups, grad, backend, device):
    found = gradient(lambda x: ek.grouped_softmax(x, groups, backend=backend), scores.to(device), grad.to(device)).cpu()
    exact = gradient(lambda x: reference.grouped_softmax(x, groups), scores.double(), grad.double())
    near = gradient(lambda x: plain(x, groups), scores, grad)
    p = lines(reference.grouped_softmax(scores.double(), groups), groups)
    g = lines(grad.double().abs(), groups)
    # a term with the n-th power of a probability, which is rounded itself, counts 1 + n times
    magnitude = p * (2 * g + 3 * (g * p).sum(1, keepdim=True))
    assert found.dtype == scores.dtype
    assert_within_rule(*(lines(t, groups) for t in (found, exact, near)), magnitude)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size(backend, device, size, dtype):
    rows, groups, columns = size
    scores, grad = torch.randn(2, rows, groups * columns).to(dtype)
    check_forward(3 * scores, groups, backend, device)
    check_gradient(3 * scores, groups, grad, backend, device)


@pytest.mark.parametrize("scores", ("offset", "scaled", "largest", "equal"))
@pytest.mark.parametrize("sign", (1, -1))
def test_large_scores(backend, device, sign, scores):
    """Only differences count; they are formed before anything is multiplied."""
    drawn = torch.randn(20, 96)
    values = {
        "offset": drawn + 1e4,
        "scaled": drawn * 1e4,
        "largest": torch.where(drawn > 1, 3.3e38, drawn),
        "equal": torch.full((20, 96), 1e4),
    }[scores]
    check_forward(sign * values, 4, backend, device)
    check_gradient(sign * values, 4, torch.randn(20, 96), backend, device)


def test_columns_of_minus_infinity_are_zero(backend, device):
    """As a mask sets them; the gradient there is 0 too."""
    scores, grad = torch.randn(2, 12, 40)
    hidden = torch.rand(12, 40) < 0.5
    hidden[:, ::10] = False
    scores[hidden] = float("-inf")
    check_forward(scores, 4, backend, device)
    check_gradient(scores, 4, grad, backend, device)
    assert not ek.grouped_softmax(scores.to(device), 4, backend=backend).cpu()[hidden].any()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), "nothing but -inf"))
def test_what_is_not_finite_stays_in_its_group(backend, device, value):
    scores, grad = torch.randn(2, 30, 4 * 21)
    dirty, touched = scores.clone(), torch.zeros(30, 4, dtype=torch.bool)
    for row, group in ((3, 1), (29, 3)):
        touched[row, group] = True
        place = dirty[row, 21 * group : 21 * (group + 1)]
        if value == "nothing but -inf":
            place[:] = float("-inf")
        else:
            place[20] = value
    results = []
    for given_scores in (scores, dirty):
        leaf = given_scores.to(device).requires_grad_()
        out = ek.grouped_softmax(leaf, 4, backend=backend)
        (slope,) = torch.autograd.grad(out, leaf, grad.to(device))
        results.append([t.detach().cpu().unflatten(1, (4, 21)) for t in (out, slope)])
    for clean, found in zip(*results, strict=True):
        assert_same(found[~touched], clean[~touched])
        assert found[touched].isnan().all()


def answers(scores, groups, grad, backend):
    leaf = scores.detach().requires_grad_()
    out = ek.grouped_softmax(leaf, groups, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaf, grad)


def test_any_stride(backend, device):
    """Rows further apart, every second column, columns stored first; and the same of the gradient."""
    scores, grad = torch.randn(2, 20, 24, device=device)
    expected = answers(scores, 3, grad, backend)
    for layout in (
        lambda t: torch.cat([t, t], 1)[:, :24],
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
        lambda t: t.T.contiguous().T,
    ):
        assert_same(answers(layout(scores), 3, layout(grad), backend), expected)


def test_repeated_rows(backend, device):
    """Stride 0, of rows and, as the gradient of a sum, of the gradient."""
    scores, ones = torch.randn(1, 24, device=device).expand(9, 24), torch.ones((), device=device).expand(9, 24)
    expected = answers(scores.contiguous(), 3, ones.contiguous(), backend)
    assert_same(answers(scores, 3, ones, backend), expected)


def test_groups_do_not_depend_on_each_other(backend, device):
    scores, grad = torch.randn(2, 7, 5 * 33, device=device)
    whole = answers(scores, 5, grad, backend)
    parts = [answers(x, 1, g, backend) for x, g in zip(scores.split(33, 1), grad.split(33, 1), strict=True)]
    assert_same(whole, tuple(torch.cat(outs, 1) for outs in zip(*parts, strict=True)))


@pytest.mark.parametrize("threads", (2, 3))
def test_same_bits_for_any_thread_count(threads):
    for rows, groups, columns in ((5000, 3, 11), (3, 8, 1031), (130, 8, 64)):
        scores, grad = torch.randn(2, rows, groups * columns)
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(answers(scores, groups, grad, "cpu"))
        assert_same(*results)


def test_second_derivative_is_refused(backend, device):
    if backend == "reference":
        pytest.skip("the definition has one")
    scores = torch.randn(3, 8, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(
        ek.grouped_softmax(scores, 2, backend=backend).square().sum(), scores, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"second derivatives|once_differentiable"):
        grad.sum().backward()


def test_gradcheck_of_the_definition():
    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.grouped_softmax(x, 2), scores)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_drawn(data):
    rows, groups, columns = (data.draw(st.integers(*bounds)) for bounds in ((0, 40), (1, 9), (0, 90)))
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    dtype = data.draw(st.sampled_from(FLOATS), "dtype")
    scores, grad = torch.randn(2, rows, groups * columns)
    scores = (scores * data.draw(st.sampled_from((0.1, 3.0, 100.0)), "scale")).to(dtype)
    check_forward(scores, groups, "cpu", "cpu")
    check_gradient(scores, groups, grad.to(dtype), "cpu", "cpu")
