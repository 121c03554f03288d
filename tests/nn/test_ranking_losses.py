"""The losses of listwise rerankers: published values, gradients, ragged lists against a loop, bad input."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from embedding_kernels.nn import listnet, listnet_double, orthogonality, rank_targets

LOSSES = (listnet, listnet_double)
FIVE = torch.arange(1, 6)[None]
OFFSETS = torch.tensor([0, 3, 3, 4, 9, 9], dtype=torch.int32)  # empty ones amid and at the end


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged_targets() -> torch.Tensor:
    return rank_targets(torch.tensor([2.0, 1, 3, 1, 5, 4, 3, 2, 1], dtype=torch.float64), OFFSETS)


# ---- values ----


def test_targets_of_five_ranks():
    expected = torch.tensor([[0.3664, 0.1961, 0.1592, 0.1435, 0.1348]])
    torch.testing.assert_close(rank_targets(FIVE), expected, rtol=0, atol=5e-5)


def test_targets_follow_the_ranks_and_the_temperature():
    ranks = torch.tensor([[3, 1, 2], [1, 1, 2]])
    targets = rank_targets(ranks, temperature=0.5)
    for row, own in zip(ranks.tolist(), targets.tolist(), strict=True):
        parts = [math.exp(1 / rank / 0.5) for rank in row]
        assert own == pytest.approx([part / sum(parts) for part in parts], rel=1e-6)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (0.8 * rank_targets(FIVE.double()).log(), 1.576),
        (1e3 * torch.eye(5)[:1].double(), 1.538),
        (torch.zeros(1, 5), 1.609),
    ],
)
def test_published_values_of_the_double_softmax(scores, expected):
    """At p = t, with all on the best, and with p uniform."""
    assert float(listnet_double(scores, rank_targets(FIVE))) == pytest.approx(expected, abs=5e-4)


def test_listnet_is_least_at_the_targets():
    targets = rank_targets(FIVE.double())
    scores = (0.8 * targets.log()).requires_grad_()
    loss = listnet(scores, targets)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.529, abs=5e-4)
    assert float(loss.detach()) == pytest.approx(float(-(targets * targets.log()).sum()), rel=1e-12)
    assert float(scores.grad.abs().max()) < 1e-15


def test_the_double_softmax_is_not_least_at_the_targets():
    targets = rank_targets(FIVE.double())
    scores = (0.8 * targets.log()).requires_grad_()
    listnet_double(scores, targets).backward()
    assert float(scores.grad[0, 0]) < -1e-3


def test_orthogonality_counts_squared_cosines():
    anchors = double(3, 4, 16)
    cosines = torch.nn.functional.cosine_similarity(anchors[:, :, None], anchors[:, None], dim=-1)
    cosines[:, range(4), range(4)] = 0
    assert float(orthogonality(anchors)) == pytest.approx(float(cosines.square().sum() / 3), rel=1e-12)


def test_orthogonality_of_simple_anchors():
    assert float(orthogonality(3 * torch.eye(4)[None])) == 0
    assert float(orthogonality(torch.ones(2, 4, 8))) == pytest.approx(12, rel=1e-6)  # all twelve ordered pairs
    assert float(orthogonality(torch.zeros(1, 2, 8))) == 2
    assert float(orthogonality(torch.zeros(0, 2, 8))) == 0


# ---- ragged lists ----


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", (0.8, 2.0))
def test_ragged_is_a_loop_over_queries(loss, temperature):
    scores = double(9).requires_grad_()
    targets = ragged_targets()
    ours = loss(scores, targets, OFFSETS, temperature=temperature)
    bounds = [(start, end) for start, end in pairwise(OFFSETS.tolist()) if end > start]
    parts = [loss(scores[None, a:b], targets[None, a:b], temperature=temperature) for a, b in bounds]
    expected = torch.stack(parts).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
    (grad,) = torch.autograd.grad(ours, scores)
    (same,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(grad, same, rtol=1e-12, atol=1e-15)


def test_ragged_targets_are_a_loop_over_queries():
    ranks = torch.tensor([2, 1, 3, 1, 5, 4, 3, 2, 1])
    targets = rank_targets(ranks.double(), OFFSETS)
    for start, end in pairwise(OFFSETS.tolist()):
        expected = rank_targets(ranks[None, start:end].double())[0]
        torch.testing.assert_close(targets[start:end], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_lists_of_one_length_are_both(loss):
    scores, targets = double(4, 5), rank_targets(FIVE.double()).expand(4, 5)
    offsets = torch.arange(0, 21, 5, dtype=torch.int32)
    ragged = loss(scores.flatten(), targets.flatten(), offsets)
    torch.testing.assert_close(ragged, loss(scores, targets), rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", (1e4, -1e4))
def test_large_scores_stay_finite(loss, scale):
    scores = (scale * double(9)).requires_grad_()
    value = loss(scores, ragged_targets(), OFFSETS)
    value.backward()
    assert bool(value.isfinite()) and bool(scores.grad.isfinite().all())


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_rank_is_zero(loss):
    for lists in (1, 4):
        offsets = torch.zeros(lists, dtype=torch.int32)
        scores = torch.zeros(0, requires_grad=True)
        value = loss(scores, torch.zeros(0), offsets)
        value.backward()
        assert float(value.detach()) == 0 and scores.grad.shape == (0,)
    for shape in ((0, 5), (3, 0)):
        assert float(loss(torch.zeros(shape), torch.zeros(shape))) == 0


# ---- gradients and dtypes ----


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    scores, targets = double(3, 5).requires_grad_(), rank_targets(FIVE.double()).repeat(3, 1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (scores, targets))
    assert torch.autograd.gradgradcheck(loss, (scores, targets))
    flat, own = double(9, seed=1).requires_grad_(), ragged_targets().requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, OFFSETS), (flat, own))


def test_gradients_of_orthogonality():
    assert torch.autograd.gradcheck(orthogonality, (double(2, 3, 5).requires_grad_(),))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_half_precision_is_formed_in_float32(dtype):
    scores, anchors = double(9).to(dtype), double(2, 4, 8).to(dtype)
    targets = ragged_targets().float()
    for loss in LOSSES:
        value = loss(scores, targets, OFFSETS)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(scores.float(), targets, OFFSETS))
    assert torch.equal(orthogonality(anchors), orthogonality(anchors.float()))
    assert listnet(double(2, 3), double(2, 3)).dtype == torch.float64


def test_autocast_rounds_nothing():
    scores, anchors = double(9).float(), double(2, 4, 8).float()
    targets = ragged_targets().float()
    plain = [*(loss(scores, targets, OFFSETS) for loss in LOSSES), orthogonality(anchors)]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [*(loss(scores, targets, OFFSETS) for loss in LOSSES), orthogonality(anchors)]
    assert cast == plain


# ---- bad input ----

SCORES, TARGETS = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SCORES.int(), TARGETS), r"scores must be a float tensor \[B, n\], or .*, got int32 \[2, 3\]"),
        ((SCORES[0], TARGETS[0]), r"scores must be a float tensor \[B, n\].*, got float32 \[3\]"),
        (
            (SCORES, TARGETS[:, :2]),
            r"targets must be of the shape of scores \(float32 \[2, 3\]\), got float32 \[2, 2\]",
        ),
        ((SCORES, TARGETS.long()), r"targets must be a float tensor .*, got int64 \[2, 3\]"),
        ((SCORES, None), r"targets must be a float tensor .*, got NoneType"),
        (
            (SCORES, TARGETS, OFFSETS),
            r"scores must be a float tensor \[P\], as cu_passages is given, got float32 \[2, 3\]",
        ),
        (
            (SCORES[0], TARGETS[0], torch.tensor([0, 3])),
            r"cu_passages must be an int32 tensor \[Q \+ 1\], got int64 \[2\]",
        ),
        (
            (SCORES[0], TARGETS[0], torch.zeros(0).int()),
            r"cu_passages must be an int32 tensor \[Q \+ 1\], got int32 \[0\]",
        ),
        ((SCORES[0], TARGETS[0], torch.tensor([0, 2]).int()), r"cu_passages must be 3 in its last place .*, got 2"),
    ],
)
def test_bad_lists(loss, arguments, message):
    with pytest.raises(ValueError, match=rf"^{loss.__name__}: {message}$"):
        loss(*arguments)


@pytest.mark.parametrize("temperature", (0.0, -1.0, math.inf, math.nan))
def test_bad_temperature(temperature):
    for loss in LOSSES:
        with pytest.raises(ValueError, match=rf"^{loss.__name__}: temperature must be a positive number, got "):
            loss(SCORES, TARGETS, temperature=temperature)
    with pytest.raises(ValueError, match=r"^rank_targets: temperature must be a positive number, got "):
        rank_targets(FIVE, temperature=temperature)


def test_bad_ranks_and_anchors():
    with pytest.raises(ValueError, match=r"^rank_targets: ranks must be at least 1 everywhere, got 0\.0$"):
        rank_targets(torch.tensor([[1, 0, 2]]))
    with pytest.raises(ValueError, match=r"^rank_targets: ranks must be at least 1 everywhere, got nan$"):
        rank_targets(torch.tensor([[1, math.nan]]))
    with pytest.raises(
        ValueError, match=r"^rank_targets: ranks must be an integer or float tensor .*, got bool \[1, 5\]$"
    ):
        rank_targets(FIVE > 2)
    with pytest.raises(
        ValueError, match=r"^orthogonality: anchors must be a float tensor \[B, m, D\], got float32 \[2, 3\]$"
    ):
        orthogonality(SCORES)
