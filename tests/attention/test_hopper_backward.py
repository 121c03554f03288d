"""The gradient of varlen_attention by the kernels for Hopper in the emulation: that they run, and shapes that reach
each of their ways. The rest of the family's suite runs through them too (backend cuda_host_hopper)."""

from __future__ import annotations

import pytest
import torch

from attention.definition import DIFFERENTIABLE, Case, Gradients, assert_backward, gradients
from cuda_host import backend as cuda_host

pytestmark = pytest.mark.usefixtures("on_hopper")
HALVES = (torch.bfloat16, torch.float16)
#: of q and k, and of v: padded to 64, 96, 128 and 256 columns
DIMS = ((64, 64), (40, 24), (96, 88), (128, 128), (16, 104), (256, 200))
PASSES = {"attention_shares_kernel", "attention_gradient_hopper_kernel"}
BESIDE = {
    *("attention_hopper_kernel", "attention_rotate_kernel"),
    *("attention_bias_kernel", "attention_sum_tables_kernel"),
}

BACKWARD = {
    # a block has 128 rows, a tile 64 queries or 128 keys
    "tails": {"lengths": (1, 64, 65, 129), "lengths_k": (257, 129, 127, 1)},
    "causal": {"lengths": (200, 3), "options": {"causal": True}},
    # more tiles of a group's queries than stages; a sequence of no rows
    "groups": {"lengths": (70, 0, 30), "heads": 6, "kv_heads": 2},
    "causal_in_groups": {"lengths": (70, 0, 5), "heads": 4, "kv_heads": 2, "rotated": 48, "options": {"causal": True}},
    # a warpgroup needs none of the tiles that the other one needs first, or last
    "window": {"lengths": (300,), "options": {"window_left": 20, "window_right": 7}},
    "window_of_narrow_tiles": {"lengths": (140,), "dim": 256, "options": {"window_left": 0, "window_right": 3}},
    "softcap": {"lengths": (70, 3), "lengths_k": (140, 3), "options": {"softcap": 3.0, "scale": 0.6}},
    "bias_table": {"lengths": (70, 3), "lengths_k": (140, 3), "heads": 2, "reach": 9},
    "positions": {"lengths": (140,), "positions": "drawn", "options": {"window_left": 40, "window_right": 60}},
    "seqused_k": {"lengths": (70, 3), "lengths_k": (290, 5), "used": 0.6},
    "seqused_none": {"lengths": (70,), "lengths_k": (150,), "used": 0.0},
    "no_pairs": {"lengths": (70, 3, 0), "lengths_k": (0, 5, 70)},
    "many": {"lengths": (1, 3, 0, 2) * 5, "heads": 2},
}
EVERYTHING = {
    "lengths": (70, 3, 0), "lengths_k": (150, 40, 5), "heads": 2, "kv_heads": 1, "reach": 5, "rotated": 24,
    "positions": "drawn", "used": 0.8,
    "options": {"causal": True, "window_left": 130, "window_right": 2, "softcap": 6.0, "scale": 0.3},
}  # fmt: skip
#: order of threads and blocks, seed, whether copies and products come late; by dim
SCHEDULES = {64: ((1, 0, False), (2, 5, True), (3, 0, True)), 128: ((3, 0, False), (2, 6, True)), 200: ((1, 0, True),)}


def launched() -> set[str]:
    return {line.split()[-1] for line in cuda_host.launched()}


def assert_sums(case: Case, through: str = "out and lse") -> None:
    launched()
    assert_backward(case, "cuda_host", "cpu", through)
    assert launched() - BESIDE == PASSES


def run(case: Case, grads: tuple[torch.Tensor, torch.Tensor]) -> Gradients:
    inputs = {name: case.tensors[name] for name in DIFFERENTIABLE if name in case.tensors}
    return gradients(case.kernel("cuda_host", "cpu"), inputs, *grads)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(dims, dtype):
    """Several tiles and one of few rows, several items, a warpgroup without rows."""
    assert_sums(Case((70, 1), lengths_k=(140, 3), heads=1, dim=dims[0], dim_v=dims[1], dtype=dtype))


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name):
    assert_sums(Case(dtype=torch.bfloat16, **{"heads": 1, "dim": 64} | BACKWARD[name]))


@pytest.mark.parametrize("through", ("out", "lse"))
def test_one_result_alone(through):
    assert_sums(Case((70, 3), heads=1, dim=64, dtype=torch.bfloat16), through)


@pytest.mark.parametrize("dim", SCHEDULES)
def test_everything_in_any_order(dim):
    """Every option at once, while threads and blocks run in other orders and copies and products come late; always the
    same bits."""
    case = Case(dim=dim, dtype=torch.bfloat16, **EVERYTHING)
    assert_sums(case)
    grads = case.drawn_gradients()
    first = run(case, grads)
    for order, seed, latest in SCHEDULES[dim]:
        cuda_host.set_options(order=order, seed=seed, latest=latest, architecture=90)
        again = run(case, grads)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_positions_from_any_address():
    """The copy engine wants multiples of 16 bytes."""
    case = Case(dim=64, dtype=torch.bfloat16, **EVERYTHING)
    for name in ("positions_q", "positions_k"):
        longer = torch.cat([torch.zeros(1, dtype=torch.int32), case.tensors[name]])
        case.tensors[name] = longer[1:]
        assert case.tensors[name].data_ptr() % 16 != 0
    assert_sums(case)


def test_gradients_of_any_layout():
    """Rows of a transposed gradient are read where they lie; those of one value for all are copied."""
    case = Case((70, 3), heads=2, dim=64, dtype=torch.bfloat16)
    grad_out, grad_lse = case.drawn_gradients()
    for laid_out in (grad_out.transpose(0, 1).contiguous().transpose(0, 1), grad_out[:1, :1, :1].expand_as(grad_out)):
        expected, got = run(case, (laid_out.contiguous(), grad_lse)), run(case, (laid_out, grad_lse))
        assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("dim", (64, 200))
def test_what_does_not_count_is_not_seen(dim):
    """Rows of other sequences and keys past seqused_k share tiles with those that count; they may hold anything, and
    what does not count has gradient 0."""
    case = Case((70, 9, 5), heads=1, dim=dim, dtype=torch.bfloat16, used=0.6)
    grads = case.drawn_gradients()
    expected = run(case, grads)
    queries, keys = (torch.zeros(sum(case.lengths), dtype=torch.bool) for _ in range(2))
    queries[:79] = True
    unused = torch.ones_like(keys)
    for s in range(3):
        start = int(case.cu_k[s])
        used = slice(start, start + int(case.tensors["seqused_k"][s]))
        unused[used] = False
        keys[used] = s < 2
    case.tensors["q"][~queries] = torch.nan
    grads[0][~queries] = torch.inf
    grads[1][:, ~queries] = torch.nan
    for name, value in (("k", torch.nan), ("v", torch.inf)):
        case.tensors[name][~keys] = value
    got = run(case, grads)
    assert torch.equal(got["q"][queries], expected["q"][queries])
    for name in ("k", "v"):
        assert torch.equal(got[name][keys], expected[name][keys])
        assert not got[name][unused].any()
