"""The kernels of varlen_attention for Hopper in the emulation: that they run, and shapes that reach each of their ways.
The rest of the family's suite runs through them too (backend cuda_host_hopper)."""

from __future__ import annotations

import pytest
import torch

from attention.definition import Case, assert_forward
from cuda_host import backend as cuda_host

pytestmark = pytest.mark.usefixtures("on_hopper")
HALVES = (torch.bfloat16, torch.float16)
#: of q and k, and of v: padded to 64, 96, 128 and 256 columns
DIMS = ((64, 64), (40, 24), (96, 88), (128, 128), (16, 104), (256, 200))

FORWARD = {
    # a block has 128 queries, a tile 128 keys
    "tails": {"lengths": (1, 64, 65, 129, 128), "lengths_k": (257, 129, 127, 1, 128)},
    "causal": {"lengths": (200, 3), "options": {"causal": True}},
    "causal_in_groups": {"lengths": (70, 0, 5), "heads": 4, "kv_heads": 2, "rotated": 48, "options": {"causal": True}},
    # a warpgroup needs none of the tiles that the other one needs first, or last
    "window": {"lengths": (300,), "options": {"window_left": 20, "window_right": 7}},
    "window_of_narrow_tiles": {"lengths": (140,), "dim": 256, "options": {"window_left": 0, "window_right": 3}},
    "formed": {"lengths": (70, 3), "lengths_k": (140, 3), "reach": 9, "options": {"softcap": 3.0, "scale": 0.6}},
    "positions": {"lengths": (140,), "positions": "drawn", "options": {"window_left": 40, "window_right": 60}},
    # a tile whose rows' numbers all pair, and positions do not
    "positions_of_few": {
        "lengths": (1,) * 4,
        "lengths_k": (260,) * 4,
        "positions": "drawn",
        "options": {"causal": True},
    },
    "seqused_k": {"lengths": (70, 3), "lengths_k": (290, 5), "used": 0.6},
    "no_keys": {"lengths": (70, 3, 70), "lengths_k": (0, 5, 3), "used": 0.4},
    "many": {"lengths": (1, 3, 0, 2) * 5, "heads": 2},
}
EVERYTHING = {
    "lengths": (70, 3, 0, 17), "lengths_k": (150, 40, 5, 33), "heads": 2, "kv_heads": 1, "reach": 5, "rotated": 24,
    "positions": "drawn", "used": 0.8,
    "options": {"causal": True, "window_left": 130, "window_right": 2, "softcap": 6.0, "scale": 0.3},
}  # fmt: skip


def launched() -> set[str]:
    return {line.split()[-1] for line in cuda_host.launched()}


def assert_attends(case: Case) -> None:
    launched()
    assert_forward(case, "cuda_host", "cpu")
    assert launched() - {"attention_rotate_kernel"} == {"attention_hopper_kernel"}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(dims, dtype):
    """Several tiles and one of few rows, several items, a warpgroup without rows."""
    assert_attends(Case((130, 1), lengths_k=(260, 70), heads=1, dim=dims[0], dim_v=dims[1], dtype=dtype))


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    assert_attends(Case(dtype=torch.bfloat16, **{"heads": 1, "dim": 64} | FORWARD[name]))


@pytest.mark.parametrize("schedule", ((1, False), (2, True), (3, True)), ids=str)
@pytest.mark.parametrize("dim", (64, 200))
def test_forward_in_any_order(dim, schedule):
    """Every option at once, and a warpgroup that passes many tiles by, while threads run in other orders and copies and
    products come late."""
    cuda_host.set_options(order=schedule[0], seed=5, latest=schedule[1], architecture=90)
    assert_attends(Case(dim=dim, dtype=torch.bfloat16, **EVERYTHING))
    assert_attends(Case((3,), lengths_k=(600,), heads=1, dim=dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("dim", (64, 200))
def test_what_does_not_count_is_not_seen(dim):
    """Rows of other sequences and keys past seqused_k share tiles with those that count; they may hold anything."""
    case = Case((70, 9, 5), heads=1, dim=dim, dtype=torch.bfloat16, used=0.6)
    expected = case.run("cuda_host")
    queries, keys = (torch.zeros(sum(case.lengths), dtype=torch.bool) for _ in range(2))
    queries[:79] = True
    for s in range(2):
        start = int(case.cu_k[s])
        keys[start : start + int(case.tensors["seqused_k"][s])] = True
    case.tensors["q"][~queries] = torch.nan
    for name, value in (("k", torch.nan), ("v", torch.inf)):
        case.tensors[name][~keys] = value
    out, lse = case.run("cuda_host")
    assert torch.equal(out[queries], expected[0][queries])
    assert torch.equal(lse[:, queries], expected[1][:, queries])


def test_strides_that_the_copy_engine_does_not_take():
    """Keys of one head for all, and one row in the middle of a wider tensor."""
    case = Case((9,), lengths_k=(70,), heads=2, dim=64, dtype=torch.bfloat16)
    case.tensors["k"], case.tensors["v"] = (case.tensors[name][:, :1].expand(-1, 2, -1) for name in ("k", "v"))
    out, _ = case.run("cuda_host")
    case.tensors["k"], case.tensors["v"] = (case.tensors[name].contiguous() for name in ("k", "v"))
    assert torch.equal(out, case.run("cuda_host")[0])
    row = Case((1,), heads=1, dim=64, dtype=torch.bfloat16)
    row.tensors["q"] = torch.randn(1, 3, 65, dtype=torch.bfloat16).flatten(1)[:, :64].unsqueeze(1)
    assert row.tensors["q"].stride(0) % 8 != 0
    assert_attends(row)
