"""token_prepend and token_prepend_rms_norm with their gradients on every backend; copies to the bit, the rest under the
error rule."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embedding_kernels as ek
from error_rule import assert_within_rule
from norm.definition import FLOATS, Case, answers
from operators import assert_same

KINDS = ("rms", "one_plus_weight")
SIZES = ((21, 37), (1, 1), (0, 24), (5, 0), (300, 16), (9, 1024), (4, 5000))
GRADIENT_SIZES = (*SIZES[:4], (50, 130), (7, 1100))


@pytest.fixture(autouse=True)
def _has_kernel(request):
    if "backend" in request.fixturenames:
        for name in ("token_prepend", "token_prepend_rms_norm"):
            request.getfixturevalue("require_kernel")(name)


# ---- copies of so many rows ----


def last_over_first(rows):
    """Of texts of seven rows, as token prepending has it."""
    first = torch.arange(0, rows, 7)
    return (first + 6).clamp(max=rows - 1), first


def one_to_many(rows):
    targets = torch.arange(rows)[1::2]
    return torch.full_like(targets, rows // 2), targets


def chain(rows):
    """Every row over the next: all but the ends are sources and targets."""
    return torch.arange(rows)[:-1], torch.arange(rows)[1:]


def reversal(rows):
    """Nothing stays but the row in the middle, copied onto itself."""
    return torch.arange(rows - 1, -1, -1), torch.arange(rows)


def none(rows):
    return torch.arange(0), torch.arange(0)


PATTERNS = (last_over_first, one_to_many, chain, reversal, none)
by_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)


def copied(rows, sources, targets):
    return rows.index_copy(0, targets, rows[sources])


def returned(grad, sources, targets):
    """The gradient of the rows before the copies, given that after them."""
    return grad.index_fill(0, targets, 0).index_add(0, sources, grad[targets])


class Prepended(Case):
    """The norm of a sum in which rows have been copied over others."""

    def __init__(self, rows, dim, pattern=last_over_first, **options):
        super().__init__(rows, dim, **options)
        self.sources, self.targets = pattern(rows)

    def kernel(self, backend, device, tensors=None):
        moved = {name: tensor.to(device) for name, tensor in (tensors or self.tensors).items()}
        return ek.token_prepend_rms_norm(
            moved["x"],
            moved.get("residual"),
            self.sources.to(device),
            self.targets.to(device),
            moved["weight"],
            eps=self.eps,
            one_plus_weight=self.kind == "one_plus_weight",
            backend=backend,
        )

    def summed(self):
        return copied(super().summed(), self.sources, self.targets)

    def of_the_inputs(self, grad):
        return returned(grad.to(torch.promote_types(grad.dtype, torch.float32)), self.sources, self.targets).to(
            grad.dtype
        )


# ---- the copies alone ----


@by_pattern
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_copies(backend, device, size, dtype, pattern):
    hidden, copies = torch.randn(size).to(dtype), pattern(size[0])
    out = ek.token_prepend(hidden.to(device), *(c.to(device) for c in copies), backend=backend)
    assert_same(out, copied(hidden, *copies))


@by_pattern
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", GRADIENT_SIZES, ids=str)
def test_gradient_of_copies(backend, device, size, dtype, pattern):
    hidden, copies = torch.randn(size).to(dtype).to(device).requires_grad_(), pattern(size[0])
    grad = torch.randn(size).to(dtype)
    out = ek.token_prepend(hidden, *(c.to(device) for c in copies), backend=backend)
    (found,) = torch.autograd.grad(out, hidden, grad.to(device))
    exact, plain = returned(grad.double(), *copies), returned(grad.float(), *copies).to(dtype)
    assert_within_rule(found.cpu(), exact, plain, returned(grad.double().abs(), *copies))


def test_a_source_is_read_before_it_is_overwritten(backend, device):
    hidden = torch.arange(5.0, device=device)[:, None]
    rows = torch.tensor([0, 1, 4, 4], device=device), torch.tensor([1, 0, 2, 3], device=device)
    out = ek.token_prepend(hidden, *rows, backend=backend)
    assert out.flatten().tolist() == [1, 0, 4, 4, 4]


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -0.0))
def test_values_are_not_computed_with(backend, device, value):
    hidden = torch.full((3, 20), value, device=device)
    hidden[1] = 1
    out = ek.token_prepend(hidden, *(torch.tensor([row], device=device) for row in (0, 1)), backend=backend)
    assert_same(out, torch.full((3, 20), value))
    assert torch.equal(out.cpu().signbit(), torch.full((3, 20), value).signbit())


# ---- the norm under the error rule ----


@by_pattern
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(backend, device, size, dtype, pattern):
    Prepended(*size, pattern, dtype=dtype).check_forward(backend, device)


@by_pattern
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", GRADIENT_SIZES, ids=str)
def test_gradient(backend, device, size, dtype, pattern):
    Prepended(*size, pattern, dtype=dtype).check_gradients(backend, device, *torch.randn(2, *size).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pattern", (reversal, one_to_many))
def test_gradient_of_many_copies(backend, device, dtype, pattern):
    """More than one program takes down, or of one row."""
    case = Prepended(300, 8, pattern, dtype=dtype)
    case.check_gradients(backend, device, *torch.randn(2, *case.tensors["x"].shape).to(dtype))


@by_pattern
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_one_plus_a_float32_weight_of_narrow_rows(backend, device, dtype, pattern):
    case = Prepended(40, 70, pattern, kind="one_plus_weight", dtype=dtype, wide=True)
    case.check_forward(backend, device)
    case.check_gradients(backend, device, *torch.randn(2, 40, 70).to(dtype))


@by_pattern
def test_without_residual(backend, device, pattern):
    case, (grad, grad_summed) = Prepended(30, 50, pattern, residual=False), torch.randn(2, 30, 50)
    case.check_forward(backend, device)
    case.check_gradients(backend, device, grad, grad_summed)
    case.check_gradients(backend, device, grad, None)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("eps", (0.0, 1e-12, 1e6))
def test_eps(backend, device, eps):
    """Without eps a row that is gone, and whose gradient is 0, must not be divided by its length."""
    case = Prepended(20, 33, chain, eps=eps)
    case.check_forward(backend, device)
    case.check_gradients(backend, device, *torch.randn(2, 20, 33))


# ---- beside add_rms_norm ----


@by_pattern
@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("dtype", FLOATS)
def test_is_the_norm_of_the_copied_sum_to_the_bit(backend, device, dtype, residual, pattern):
    case = Prepended(30, 70, pattern, dtype=dtype, residual=residual)
    normed, summed = case.kernel(backend, device)
    alone = ek.add_rms_norm(summed, None, case.tensors["weight"].to(device), eps=case.eps, backend=backend)[0]
    assert_same(normed, alone)


def test_rows_without_copies_have_the_gradients_of_add_rms_norm(backend, device):
    case, grads = Prepended(40, 33, last_over_first), torch.randn(2, 40, 33)
    plain = Case(40, 33)
    plain.tensors = {**case.tensors, "x": case.summed(), "residual": torch.zeros(40, 33)}
    found, expected = (answers(c, backend, device, lambda t: t, grads) for c in (case, plain))
    # normed, summed, the gradients of x and residual, and of the weight
    elsewhere = [row for row in range(40) if row not in {*case.sources.tolist(), *case.targets.tolist()}]
    assert elsewhere
    for a, b in zip(found[2:4], expected[2:4], strict=True):
        assert_same(a[elsewhere], b[elsewhere])
    if backend != "reference":
        # by the definition autograd adds up to the same in another order
        assert_same(found[4], expected[4])


# ---- layouts ----


def wide(tensor):
    room = torch.full((tensor.shape[0], tensor.shape[1] + 5), 7.0, dtype=tensor.dtype, device=tensor.device)
    room[:, 2:-3] = tensor
    return room[:, 2:-3]


def sparse(tensor):
    return tensor.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize("layout", (wide, sparse, lambda t: t.T.contiguous().T), ids=("wide", "sparse", "transposed"))
def test_any_stride(backend, device, layout):
    case, grads = Prepended(23, 18, reversal), torch.randn(2, 23, 18)
    if backend == "reference" and layout is not wide:
        pytest.skip("plain torch sums in the order in which values lie")
    dense = answers(case, backend, device, lambda t: t, grads)
    case.sources, case.targets = (rows.repeat_interleave(3)[::3] for rows in (case.sources, case.targets))
    assert_same(answers(case, backend, device, layout, grads), dense)


def test_expanded_rows_and_gradients(backend, device):
    """A row that repeats itself, as broadcasting leaves it; and slopes of a sum."""
    case, ones = Prepended(9, 24), torch.ones(()).expand(2, 9, 24)
    case.tensors |= {name: torch.randn(24).expand(9, 24) for name in ("x", "residual")}
    expected = answers(case, backend, device, torch.Tensor.contiguous, ones.contiguous())
    assert_same(answers(case, backend, device, lambda t: t, ones), expected)


def test_rows_past_two_to_the_31_elements():
    import numpy as np

    apart = 3 << 29
    storage = torch.from_numpy(np.memmap("/dev/zero", dtype=np.float32, mode="c", shape=(2 * apart + 4,)))
    far = storage.as_strided((3, 4), (apart, 1))
    far[2] = 3.0
    rows = torch.tensor([2]), torch.tensor([0])
    expected = torch.tensor([[3.0], [0], [3]]).expand(3, 4)
    assert_same(ek.token_prepend(far, *rows), expected.contiguous())
    normed, summed = ek.token_prepend_rms_norm(far, far, *rows, torch.ones(4), eps=0.25)
    assert_same(summed, 2 * expected)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(summed, (4,), eps=0.25))


# ---- what rows have to do with each other ----


# triton's interpreter is numpy, which warns of what is tested here
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("value", (float("nan"), float("inf"), 3e38))
@pytest.mark.parametrize("row", (0, 6, 9, 13))
def test_what_is_not_finite_reaches_only_copies(backend, device, row, value):
    """Rows 6 and 13 are copied over 0 and 7; what was in a target is gone, and its gradient is that of its source."""
    case, grads = Prepended(14, 40), torch.randn(2, 14, 40)
    clean = answers(case, backend, device, lambda t: t, grads)
    case.tensors["x"][row, 3] = value
    dirty = answers(case, backend, device, lambda t: t, grads)
    holders = {0: [], 6: [0, 6], 9: [9], 13: [7, 13]}[row]
    others = [other for other in range(14) if other not in holders]
    for a, b in zip(dirty[:2], clean[:2], strict=True):
        assert_same(a[others], b[others])
        assert value == 3e38 or not a[holders].isfinite().all(1).any()
    others = [other for other in range(14) if other != row or not holders]
    for a, b in zip(dirty[2:4], clean[2:4], strict=True):
        assert_same(a[others], b[others])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("row", (0, 6, 9))
def test_a_gradient_that_is_not_finite_reaches_only_its_source(backend, device, row):
    case, grads = Prepended(14, 40), torch.randn(2, 14, 40)
    clean = answers(case, backend, device, lambda t: t, grads)
    grads[:, row, 3] = float("nan")
    dirty = answers(case, backend, device, lambda t: t, grads)
    source = 6 if row == 0 else row
    others = [other for other in range(14) if other != source]
    for a, b in zip(dirty[2:4], clean[2:4], strict=True):
        assert_same(a[others], b[others])
        assert a[source, 3].isnan()


def test_an_overwritten_row_has_no_gradient(backend, device):
    case, grads = Prepended(30, 20, one_to_many), torch.randn(2, 30, 20)
    gone = [row for row in case.targets.tolist() if row not in case.sources.tolist()]
    for grad in answers(case, backend, device, lambda t: t, grads)[2:4]:
        assert not grad[gone].any()
        assert grad[case.sources[0]].any()


@by_pattern
def test_same_in_every_run(backend, device, pattern):
    case, grads = Prepended(50, 24, pattern), torch.randn(2, 50, 24)
    assert_same(*(answers(case, backend, device, lambda t: t, grads) for _ in range(2)))


@pytest.mark.parametrize("threads", (2, 3))
def test_same_bits_for_any_thread_count(threads):
    for rows, dim, pattern in ((5000, 33, last_over_first), (9, 9000, chain), (130, 384, one_to_many)):
        case, grads = Prepended(rows, dim, pattern), torch.randn(2, rows, dim)
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(answers(case, "cpu", "cpu", lambda t: t, grads))
        assert_same(*results)


# ---- gradients as autograd asks for them ----


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_only_where_they_are_wanted(backend, device, kind):
    case, grads = Prepended(20, 33, kind=kind), torch.randn(2, 20, 33, device=device)
    whole = dict(zip(case.tensors, answers(case, backend, device, lambda t: t, grads)[2:], strict=True))
    for wanted in case.tensors:
        leaves = {name: t.detach().to(device).requires_grad_(name == wanted) for name, t in case.tensors.items()}
        normed, summed = case.kernel(backend, device, leaves)
        outs = (normed, summed) if summed.requires_grad else (normed,)
        torch.autograd.backward(outs, list(grads[: len(outs)]))
        assert_same(leaves[wanted].grad, whole[wanted])
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


def test_one_output_unused(backend, device):
    """The sum alone returns its gradient through the copies; the norm alone is as with a gradient of 0 for the sum."""
    case, (grad, grad_summed) = Prepended(20, 33), torch.randn(2, 20, 33, device=device)
    leaves = {name: t.detach().to(device).requires_grad_() for name, t in case.tensors.items()}
    _, summed = case.kernel(backend, device, leaves)
    found = torch.autograd.grad(summed, list(leaves.values()), grad_summed, allow_unused=True)
    expected = returned(grad_summed.cpu(), case.sources, case.targets)
    assert_same(found[:2], (expected, expected))
    assert found[2] is None or not found[2].any()
    normed, _ = case.kernel(backend, device, leaves)
    alone = torch.autograd.grad(normed, list(leaves.values()), grad)
    zeros = torch.stack([grad, torch.zeros_like(grad)])
    assert_same(alone, answers(case, backend, device, lambda t: t, zeros)[2:])


@by_pattern
def test_gradcheck_of_the_definition(pattern):
    case = Prepended(5, 4, pattern)
    values = [tensor.double().requires_grad_() for tensor in case.tensors.values()]
    names = list(case.tensors)
    assert torch.autograd.gradcheck(
        lambda *given: case.kernel("reference", "cpu", dict(zip(names, given, strict=True))), values
    )
    rows = case.sources, case.targets
    assert torch.autograd.gradcheck(lambda x: ek.token_prepend(x, *rows, backend="reference"), values[:1])


# ---- rows that do not exist ----

HIDDEN = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("sources", "targets", "sentence"),
    (
        ([0, 6], [1, 2], r"source_rows must be rows of hidden \(0 to 5\), got 6"),
        ([0, -1], [1, 2], r"source_rows must be rows of hidden \(0 to 5\), got -1"),
        ([0, 1], [2, 6], r"target_rows must be rows of hidden \(0 to 5\), got 6"),
        ([0, 1], [-6, 2], r"target_rows must be rows of hidden \(0 to 5\), got -6"),
        ([0, 1], [3, 3], r"target_rows must be distinct, got 3 twice"),
        ([0, 1], [3], r"target_rows must be of size 2 in dimension 0 \(one for each of source_rows\), got int64 \[1\]"),
        ([0.0], [3], r"source_rows must be an int64 tensor \[N\], got float32 \[1\]"),
        ([0], [[3]], r"target_rows must be an int64 tensor \[N\], got int64 \[1, 1\]"),
    ),
)
def test_bad_rows_are_refused(backend, device, sources, targets, sentence):
    if device == "cuda":
        pytest.skip("checked under EMBEDDING_KERNELS_CHECK=1 alone")
    rows = torch.tensor(sources), torch.tensor(targets)
    with pytest.raises(ValueError, match=f"^token_prepend: {sentence}$"):
        ek.token_prepend(HIDDEN, *rows, backend=backend)
    with pytest.raises(ValueError, match=f"^token_prepend_rms_norm: {sentence.replace('hidden', 'x')}$"):
        ek.token_prepend_rms_norm(HIDDEN, HIDDEN, *rows, torch.ones(4), backend=backend)


def test_rows_of_nothing_are_refused(backend, device):
    row = torch.tensor([0])
    if device == "cuda":
        pytest.skip("checked under EMBEDDING_KERNELS_CHECK=1 alone")
    with pytest.raises(ValueError, match=r"source_rows must be rows of hidden \(0 to -1\), got 0"):
        ek.token_prepend(HIDDEN[:0], row, row, backend=backend)


def test_what_does_not_exist_is_left_out(backend, device, monkeypatch):
    """Kernels of a GPU look at no values on the host."""
    if backend == "triton":
        kernels = importlib.import_module("embedding_kernels.kernels.norm")
    elif backend == "cuda_host":
        kernels = torch.ops.embedding_kernels_cuda_host
        monkeypatch.delenv("EMBEDDING_KERNELS_CHECK")
    else:
        pytest.skip("refused on the CPU; on a GPU the emulation and Triton cover it")
    bad = 1 << 40
    sources = torch.tensor([5, -1, 5, bad, 2, 2, 6, 0], device=device)
    targets = torch.tensor([-1, 0, 1, 3, bad, 5, -bad, 6], device=device)
    good = sources[[2, 5]], targets[[2, 5]]
    x, residual, weight, *grads = (torch.randn(size, device=device) for size in ((6, 9), (6, 9), 9, (6, 9), (6, 9)))
    summed = copied(x + residual, *good)
    calls = {
        "token_prepend": ((x,), ()),
        "token_prepend_backward": ((x,), ()),
        "token_prepend_rms_norm": ((x, residual), (weight, 1e-6, False)),
        "token_prepend_rms_norm_backward": ((*grads, summed), (weight, 1e-6, False)),
    }
    for name, (before, after) in calls.items():
        run = getattr(kernels, f"{name}_triton" if backend == "triton" else name)
        assert_same(run(*before, sources, targets, *after), run(*before, *good, *after))


# ---- drawn ----


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_drawn(data):
    rows, dim = data.draw(st.integers(0, 70), "rows"), data.draw(st.integers(1, 200), "dim")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    count, most = data.draw(st.integers(0, rows), "copies"), data.draw(st.integers(1, max(rows, 1)), "sources")
    case = Prepended(
        rows,
        dim,
        lambda rows: (torch.randint(0, most, (count,)), torch.randperm(rows)[:count]),
        kind=data.draw(st.sampled_from(KINDS), "kind"),
        dtype=data.draw(st.sampled_from(FLOATS), "dtype"),
        residual=data.draw(st.booleans(), "residual"),
        wide=data.draw(st.booleans(), "wide"),
        eps=data.draw(st.sampled_from((1e-12, 1e-5, 0.1)), "eps"),
    )
    case.check_forward("cpu", "cpu")
    grad, grad_summed = torch.randn(2, rows, dim).to(case.tensors["x"].dtype)
    case.check_gradients("cpu", "cpu", grad, grad_summed if data.draw(st.booleans(), "both") else None)
