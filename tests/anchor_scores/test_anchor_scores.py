"""anchor_attention, anchor_scores and anchor_topk under the error rule, and what passages may not do to each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import embedding_kernels as ek
from embedding_kernels import reference
from embedding_kernels.ops._registry import OPERATORS
from error_rule import assert_within_rule

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: passages of each query, views, heads, width
SIZES = (
    ((3, 0, 7), 2, 12, 768),
    ((130, 40), 3, 5, 37),
    ((1000,), 1, 8, 64),
    ((5,), 6, 1, 7),
    ((1, 1), 2, 9, 1),
    ((40, 2), 3, 18, 100),
    ((2, 300), 1, 2, 37),
    ((20, 3), 1, 17, 1000),
    ((5,), 1, 3, 1032),
    # more heads than are worked on at once; the latter also where there are fewer lists than threads
    ((33, 2), 2, 40, 32),
    ((50,), 1, 20, 64),
    ((0,), 2, 1, 8),
    ((), 2, 2, 8),
    ((4,), 2, 3, 0),
)


@pytest.fixture(autouse=True)
def _has_kernel(request):
    if "backend" in request.fixturenames:
        request.getfixturevalue("require_kernel")("anchor_attention")


def drawn(lengths, views, heads, dim, dtype):
    """Scores of some units: a softmax that is neither flat nor a choice."""
    torch.manual_seed(0)
    cu_passages = torch.tensor((0, *lengths)).cumsum(0).int()
    scale = max(dim, 1) ** -0.25
    own = (scale * torch.randn(sum(lengths), views, dim)).to(dtype)
    return own, (scale * torch.randn(len(lengths), views, heads, dim)).to(dtype), cu_passages


def plain_attention(views, queries, cu_passages):
    """torch's products at the dtype of the views, the softmax in float32; weights are rounded for the second one."""
    mixed = []
    for query, (start, end) in zip(queries, pairwise(cu_passages.tolist()), strict=True):
        own = views[start:end].transpose(0, 1)
        weights = torch.softmax((query @ own.transpose(1, 2)).float(), -1).to(views.dtype)
        mixed.append(weights @ own)
    return torch.stack(mixed) if mixed else torch.zeros_like(queries)


def attention_magnitude(views, queries, cu_passages):
    """Σ p (1 + Σ |q v|) |v|: a rounding of a score moves its weight."""
    views, queries, mixed = views.double(), queries.double(), []
    for query, (start, end) in zip(queries, pairwise(cu_passages.tolist()), strict=True):
        own = views[start:end].transpose(0, 1)
        weights = torch.softmax(query @ own.transpose(1, 2), -1)
        weights = weights * (1 + query.abs() @ own.abs().transpose(1, 2))
        mixed.append(weights @ own.abs())
    return torch.stack(mixed) if mixed else torch.zeros_like(queries)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(backend, device, size, dtype):
    views, queries, cu_passages = drawn(*size, dtype)
    out = ek.anchor_attention(views.to(device), queries.to(device), cu_passages.to(device), backend=backend).cpu()
    exact = reference.anchor_attention(views.double(), queries.double(), cu_passages)
    near, magnitude = (each(views, queries, cu_passages) for each in (plain_attention, attention_magnitude))
    assert_within_rule(*(each.flatten(0, 2) for each in (out, exact, near, magnitude)))


def gradients(function, views, other, *rest, grad):
    views, other = (each.detach().clone().requires_grad_() for each in (views, other))
    return torch.autograd.grad(function(views, other, *rest), (views, other), grad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES[:9], ids=str)
def test_attention_gradients(backend, device, size, dtype):
    views, queries, cu_passages = drawn(*size, dtype)
    grad = torch.randn(queries.shape).to(dtype)
    found = gradients(
        lambda *args: ek.anchor_attention(*args, backend=backend),
        views.to(device), queries.to(device), cu_passages.to(device), grad=grad.to(device),
    )  # fmt: skip
    exact = gradients(reference.anchor_attention, views.double(), queries.double(), cu_passages, grad=grad.double())
    near = gradients(plain_attention, views, queries, cu_passages, grad=grad)
    for ours, expected, plain, magnitude in zip(
        found, exact, near, gradient_magnitudes(views, queries, cu_passages, grad), strict=True
    ):
        assert ours.dtype == dtype
        assert_within_rule(*(each.flatten(0, -2) for each in (ours.cpu(), expected, plain, magnitude)))


def gradient_magnitudes(views, queries, cu_passages, grad):
    """The formulas of both gradients over absolute values; a weight counts as in `attention_magnitude`."""
    views, queries, grad = views.double(), queries.double(), grad.double()
    of_views, of_queries = torch.zeros_like(views), torch.zeros_like(queries)
    for place, (start, end) in enumerate(pairwise(cu_passages.tolist())):
        own, query, slope = views[start:end].transpose(0, 1), queries[place], grad[place].abs()
        weights = torch.softmax(query @ own.transpose(1, 2), -1)
        weights = weights * (1 + query.abs() @ own.abs().transpose(1, 2))
        products = slope @ own.abs().transpose(1, 2)
        slopes = weights * (products + (weights * products).sum(-1, keepdim=True))
        of_queries[place] = slopes @ own.abs()
        of_views[start:end] = (weights.transpose(1, 2) @ slope + slopes.transpose(1, 2) @ query.abs()).transpose(0, 1)
    return of_views, of_queries


def plain_scores(views, anchors, cu_passages, per_view=False):
    """Products at the dtype of the views, summed in float32."""
    own = anchors.repeat_interleave(cu_passages.diff().long(), 0)
    products = (views[:, :, None].float() @ own[..., None].float())[:, :, 0, 0]
    return products if per_view else products.mean(1)


@pytest.mark.parametrize("per_view", (False, True))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores_and_their_gradients(backend, device, size, dtype, per_view):
    views, queries, cu_passages = drawn(*size, dtype)
    anchors = queries[:, :, 0]  # a strided view
    arguments = views.to(device), anchors.to(device), cu_passages.to(device)
    found = ek.anchor_scores(*arguments, per_view=per_view, backend=backend)
    assert found.dtype == torch.float32
    exact = reference.anchor_scores(views.double(), anchors.double(), cu_passages, per_view=per_view)
    magnitude = reference.anchor_scores(views.double().abs(), anchors.double().abs(), cu_passages, per_view=per_view)
    near = plain_scores(views, anchors, cu_passages, per_view)
    assert_within_rule(found.cpu(), exact, near, magnitude)
    if not sum(size[0]):
        return
    grad = torch.randn(exact.shape)
    ours = gradients(
        lambda v, a, cu: ek.anchor_scores(v, a, cu, per_view=per_view, backend=backend),
        *arguments, grad=grad.to(device),
    )  # fmt: skip

    def by(function, wide, of=lambda x: x):
        return gradients(
            lambda v, a, cu: function(v, a, cu, per_view=per_view),
            *(of(each.double() if wide else each) for each in (views, anchors)), cu_passages,
            grad=of(grad.double() if wide else grad),
        )  # fmt: skip

    expected, plain, largest = (
        by(reference.anchor_scores, True),
        by(plain_scores, False),
        by(reference.anchor_scores, True, torch.abs),
    )
    for parts in zip((each.cpu() for each in ours), expected, plain, largest, strict=True):
        assert_within_rule(*(each.flatten(0, 1) for each in parts))


def test_gradcheck_of_the_definitions():
    views, queries, cu_passages = (
        each.double() if each.is_floating_point() else each for each in drawn((3, 0, 2), 2, 3, 4, torch.float32)
    )
    views, queries = views.requires_grad_(), queries.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, q: reference.anchor_attention(v, q, cu_passages), (views, queries))
    anchors = queries[:, :, 0].detach().requires_grad_()
    for per_view in (False, True):
        assert torch.autograd.gradcheck(
            lambda v, a, per_view=per_view: reference.anchor_scores(v, a, cu_passages, per_view=per_view),
            (views, anchors),
        )


def test_one_query_for_all_views_needs_no_copy(backend, device):
    views, queries, cu_passages = drawn((3, 70), 4, 6, 33, torch.float32)
    queries = queries[:1, :1].expand(2, 4, -1, -1)
    found = ek.anchor_attention(views.to(device), queries.to(device), cu_passages.to(device), backend=backend)
    whole = ek.anchor_attention(
        views.to(device), queries.contiguous().to(device), cu_passages.to(device), backend=backend
    )
    assert torch.equal(found, whole)


def test_a_score_depends_on_its_passage_alone(backend, device):
    views, queries, cu_passages = drawn((200, 131), 4, 1, 50, torch.float32)
    anchors = queries[:, :, 0].to(device)
    scores = ek.anchor_scores(views.to(device), anchors, cu_passages.to(device), backend=backend).cpu()
    order = torch.cat((torch.randperm(200), 200 + torch.randperm(131)))
    moved = ek.anchor_scores(views[order].to(device), anchors, cu_passages.to(device), backend=backend).cpu()
    if backend == "reference":
        torch.testing.assert_close(moved, scores[order])
    else:
        assert torch.equal(moved, scores[order])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_any_strides(backend, device, dtype):
    """Views stored view by view, heads before queries, a gradient of stride 0: as the same values stored densely."""
    views, queries, cu_passages = (each.to(device) for each in drawn((9, 0, 25), 3, 5, 48, dtype))
    grad = torch.randn(1, 1, 1, 48, device=device, dtype=dtype).expand(queries.shape)
    found, dense = [], (views, queries)
    for other in (dense, [each.transpose(0, 1).contiguous().transpose(0, 1) for each in dense]):
        own = [each.detach().requires_grad_() for each in other]
        out = ek.anchor_attention(*own, cu_passages, backend=backend)
        scores = ek.anchor_scores(own[0], own[1][:, :, 2], cu_passages, backend=backend)
        parts = torch.autograd.grad((out, scores), own, (grad, torch.ones_like(scores[:1]).expand(34)))
        found.append((out, scores, *parts, *ek.anchor_topk(own[0], own[1][:, :, 1], cu_passages, 9, backend=backend)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("offsets", ((5, 0, 900, 2, -4), (0, 2**31 - 1, -(2**31), 9, 13), (-3, 4, 4, 4, 50)))
def test_bad_offsets_reach_nothing_outside(backend, device, monkeypatch, offsets):
    """A GPU's kernels clamp the offsets: what stands before and after the views is not a number, and is not read."""
    if backend in ("reference", "cpu"):
        pytest.skip("every other backend refuses them")
    if backend == "cuda_host" and offsets[1] > 2**30:
        pytest.skip("two queries with one passage: the emulation reports that both write its gradient")
    monkeypatch.delenv("EMBEDDING_KERNELS_CHECK", raising=False)

    def run(name, *arguments):
        if backend == "triton":
            return OPERATORS[name].triton(*arguments)
        namespace = "embedding_kernels" if backend == "cuda" else "embedding_kernels_cuda_host"
        return getattr(getattr(torch.ops, namespace), name)(*arguments)

    views, queries, _ = drawn((13, 0, 0, 0), 3, 5, 48, torch.bfloat16)
    room = torch.full((40, *views.shape[1:]), float("nan"), dtype=views.dtype, device=device)
    room[13:26] = views
    arguments = room[13:26], queries.to(device), torch.tensor(offsets, dtype=torch.int32, device=device)
    assert run("anchor_attention", *arguments).isfinite().all()
    run("anchor_attention_backward", arguments[1], *arguments)
    own, anchors = (arguments[0], arguments[1][:, :, 0], arguments[2]), torch.ones(13, device=device)
    assert run("anchor_scores_backward", anchors, *own, False)[1].isfinite().all()
    run("anchor_scores", *own, False)
    run("anchor_topk", *own, 20)
    assert room[:13].isnan().all() and room[26:].isnan().all()


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_stays_with_its_query_and_view(backend, device, value):
    views, queries, cu_passages = drawn((9, 20, 4), 3, 5, 18, torch.float32)
    dirty = views.clone()
    dirty[15, 1, 7] = value
    outs = [
        ek.anchor_attention(each.to(device), queries.to(device), cu_passages.to(device), backend=backend).cpu()
        for each in (views, dirty)
    ]
    touched = torch.zeros(3, 3, dtype=torch.bool)
    touched[1, 1] = True
    torch.testing.assert_close(outs[1][~touched], outs[0][~touched], rtol=0, atol=0)
    assert not outs[1][touched].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", (1, 5, 400))
def test_topk(backend, device, dtype, k):
    """Ties by the lower place, NaN where -inf would stand, -inf and -1 past the passages."""
    views, queries, cu_passages = drawn((300, 0, 7), 2, 1, 16, dtype)
    anchors = queries[:, :, 0].contiguous()
    views[20:60] = views[0]  # ties
    views[[5, 303]] = float("nan")
    views[[9, 304], 0] = float("-inf")
    arguments = views.to(device), anchors.to(device), cu_passages.to(device)
    scores = ek.anchor_scores(*arguments, backend=backend).cpu()
    best, places = (each.cpu() for each in ek.anchor_topk(*arguments, k, backend=backend))
    assert best.shape == places.shape == (3, k)
    for query, (start, end) in enumerate(pairwise(cu_passages.tolist())):
        own = scores[start:end]
        keys = [(-float("inf") if score != score else score) for score in own.tolist()]
        order = sorted(range(len(keys)), key=lambda place: (-keys[place], place))[:k]
        assert places[query].tolist() == order + [-1] * (k - len(order))
        torch.testing.assert_close(best[query, : len(order)], own[order], rtol=0, atol=0, equal_nan=True)
        assert (best[query, len(order) :] == -float("inf")).all()


BAD = {
    r"anchor_attention: views must be a float32, bfloat16 or float16 tensor \[P, m, D\]": ("views", lambda v: v[0]),
    r"anchor_attention: queries must be a float32 tensor \[Q, m, H, D\], as views, got bfloat16": (
        "queries",
        lambda q: q.bfloat16(),
    ),
    r"queries must be of size 3 in dimension 1 \(the views\), got float32 \[2, 2, 5, 18\]": (
        "queries",
        lambda q: q[:, :2],
    ),
    r"queries must be of size 18 in dimension 3 \(the width of views\)": ("queries", lambda q: q[..., :7]),
    r"cu_passages must be an int32 tensor \[Q \+ 1\], got int64 \[3\]": ("cu_passages", lambda c: c.long()),
    r"cu_passages must be of size 3 in dimension 0 \(one more than queries\)": ("cu_passages", lambda c: c[:2]),
    r"cu_passages must be 0 in its first place, got 1": ("cu_passages", lambda c: c + 1),
    r"cu_passages must be 13 in its last place \(the number of rows\), got 12": (
        "cu_passages",
        lambda c: c - torch.tensor([0, 0, 1], dtype=torch.int32),
    ),
    r"cu_passages must be non-decreasing, got 13 after 20 in place 2": (
        "cu_passages",
        lambda c: torch.tensor([0, 20, 13], dtype=torch.int32),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(backend, device, message):
    names = ("views", "queries", "cu_passages")
    arguments = dict(zip(names, drawn((9, 4), 3, 5, 18, torch.float32), strict=True))
    name, change = BAD[message]
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        ek.anchor_attention(**{key: value.to(device) for key, value in arguments.items()}, backend=backend)


def test_bad_numbers(backend, device):
    views, queries, cu_passages = (each.to(device) for each in drawn((9, 4), 3, 5, 18, torch.float32))
    with pytest.raises(ValueError, match="anchor_topk: k must be at least 1, got 0"):
        ek.anchor_topk(views, queries[:, :, 0], cu_passages, 0, backend=backend)
    with pytest.raises(ValueError, match=r"anchor_scores: views.shape\[1\] must be at least 1, got 0"):
        ek.anchor_scores(views[:, :0], queries[:, :0, 0], cu_passages, backend=backend)
