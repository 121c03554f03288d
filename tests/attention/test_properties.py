"""What holds of varlen_attention whatever the values, mostly to the bit: threads, order of sequences, slices, strides,
NaN; and that its memory grows with the tokens, not with their square."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import embedding_kernels as ek
from attention.cases import RAGGED, option_case
from attention.definition import (
    DIFFERENTIABLE,
    Case,
    assert_gradients,
    assert_results,
    by_pair,
    emulated,
    forward_magnitudes,
    gradient_magnitudes,
    gradients,
    main_dtype,
    offsets,
)
from error_rule import assert_within_rule
from operators import assert_same


def seeded_gradients(case: Case):
    torch.manual_seed(1)
    return case.drawn_gradients()


def results(case: Case, backend: str, device: str, tensors=None, grads=None):
    """Output, lse and the gradient of each input."""
    inputs = {name: x.to(device) for name, x in (case.tensors | (tensors or {})).items()}
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in DIFFERENTIABLE if name in inputs}
    outs = case.run(backend, device, inputs | leaves)
    found = torch.autograd.grad(outs, list(leaves.values()), [x.to(device) for x in grads or seeded_gradients(case)])
    return {"out": outs[0].detach(), "lse": outs[1].detach(), **dict(zip(leaves, found, strict=True))}


# ---- the same bits ----

THREADED = {
    "one_long": Case((700,), heads=2, dim=32, reach=9, rotated=16),
    "ragged": Case((*RAGGED, 150), heads=6, kv_heads=2, dim=24, reach=9, options={"causal": True}),
    "many_short": Case((9, 1, 17) * 20, heads=3, dim=40, dim_v=24, dtype=torch.bfloat16, reach=20),
}


@pytest.mark.parametrize("name", THREADED)
def test_same_bits_for_any_thread_count(name):
    expected = None
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        got = results(THREADED[name], "cpu", "cpu")
        expected = expected or got
        assert_same(tuple(got.values()), tuple(expected.values()))


def permuted_rows(lengths, order) -> torch.Tensor:
    starts = offsets(lengths).tolist()
    return torch.cat([torch.arange(starts[s], starts[s + 1]) for s in order])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_same_bits_in_any_order_of_sequences(dtype):
    """Each sequence's, wherever it stands; the table's gradient, a sum over the sequences, under the error rule."""
    lengths, order = RAGGED, [6, 2, 0, 9, 1, 11, 3, 5, 4, 10, 8, 7]
    case = Case(lengths, heads=2, dtype=dtype, reach=9, rotated=16, options={"window_left": 40})
    rows = permuted_rows(lengths, order)
    moved = Case(tuple(lengths[s] for s in order), heads=2, dtype=dtype, reach=9, rotated=16, options=case.options)
    moved.tensors = case.tensors | {name: case.tensors[name][rows] for name in ("q", "k", "v")}
    grads = case.drawn_gradients()
    first = results(case, "cpu", "cpu", grads=grads)
    second = results(moved, "cpu", "cpu", grads=(grads[0][rows], grads[1][:, rows]))
    for name in ("out", "q", "k", "v"):
        assert_same(first[name][rows], second[name])
    assert_same(first["lse"][:, rows], second["lse"])
    exact = gradients(case.definition, case.doubled(), *grads)
    plain = gradients(case.plain, case.tensors, *grads)
    table = {"bias_table": second["bias_table"]}
    assert_gradients(case, table, exact, plain, gradient_magnitudes(case, *grads))


def test_same_bits_in_any_order_of_heads(backend, device):
    case = Case((20, 3, 33), heads=6, kv_heads=2, dtype=main_dtype(backend), reach=5)
    # groups stay together: queries 3 to 5 first, so key head 1 first
    order = {"q": [3, 5, 4, 0, 2, 1], "k": [1, 0], "v": [1, 0]}
    moved = {name: case.tensors[name][:, heads] for name, heads in order.items()}
    moved["bias_table"] = case.tensors["bias_table"][order["q"]]
    for a, b in zip(case.run(backend, device), case.run(backend, device, moved), strict=True):
        heads_last = a.dim() == 3
        assert_same(a[:, order["q"]] if heads_last else a[order["q"]], b)


# ---- rows and slices ----


@pytest.mark.parametrize("side", ("first", "last"))
@pytest.mark.parametrize("name", ("plain", "causal", "window", "bias_table", "rope"))
def test_some_queries_give_their_rows_of_all(backend, device, side, name):
    """Only the first or the last rows of each text are asked for, at their positions."""
    case = option_case(name, main_dtype(backend))
    keep = [min(n, 4) for n in case.lengths]
    starts = case.cu_q.tolist()
    ends = [a if side == "first" else b - n for a, b, n in zip(starts, starts[1:], keep, strict=False)]
    rows = torch.cat([torch.arange(a, a + n) for a, n in zip(ends, keep, strict=True)])
    counted = torch.cat([torch.arange(n, dtype=torch.int32) for n in case.lengths])
    some = case.arguments(device=device) | {
        "q": case.tensors["q"][rows].to(device),
        "cu_seqlens_q": offsets(keep).to(device),
        "max_seqlen_q": 4,
    }
    if side == "last":
        some |= {"positions_q": counted[rows].to(device), "positions_k": counted.to(device)}
    out, lse = ek.varlen_attention(**some, return_lse=True, backend=backend)
    answers = [(out.cpu(), lse.cpu())]
    for whole in (case.definition(case.doubled()), case.plain({}), forward_magnitudes(case)):
        answers.append((whole[0][rows], whole[1][:, rows]))
    assert_within_rule(*(by_pair(out, offsets(keep)) for out, _ in answers))
    assert_within_rule(*(by_pair(lse.mT[..., None], offsets(keep)) for _, lse in answers))


@pytest.mark.parametrize("name", ("causal", "window", "bias_table", "rope", "causal_other_keys"))
def test_counted_positions_are_the_implicit_ones(backend, device, name):
    case = option_case(name, main_dtype(backend))
    positions = {
        f"positions_{side}": torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
        for side, lengths in (("q", case.lengths), ("k", case.lengths_k))
    }
    # given positions tell a kernel nothing of which tiles to leave out, so the order of sums may differ
    assert_results(case, case.run(backend, device, positions), case.definition(case.doubled()), case.plain({}))


@pytest.mark.parametrize("name", ("no_keys", "seqused_none", "window_past_the_keys", "positions_causal"))
def test_rows_that_see_no_key(backend, device, name):
    """Output 0, lse −∞, gradient 0, whatever gradient comes in."""
    case = option_case(name, main_dtype(backend))
    blind = case.definition({})[1].isneginf()
    assert bool(blind.any())
    grad_out, grad_lse = case.drawn_gradients()
    grad_lse[blind] = float("inf")
    got = results(case, backend, device, grads=(grad_out, grad_lse) if backend != "reference" else None)
    assert torch.equal(got["lse"].cpu().isneginf(), blind)
    assert not got["out"].cpu()[blind.T].any()
    assert not got["q"].cpu()[blind.T].any()
    assert all(bool(got[key].isfinite().all()) for key in ("q", "k", "v"))


def assert_results_and_gradients(case: Case, got: dict[str, torch.Tensor], rows=slice(0)) -> None:
    """Under the error rule; ``rows`` and the table, to which their gradient flows, are not looked at."""
    grads = seeded_gradients(case)
    plain = [x.clone() for x in case.plain({})]
    found = gradients(case.plain, case.tensors, *grads)
    got = {name: x.cpu().clone() for name, x in got.items()}
    got["out"][rows], got["lse"][:, rows] = plain[0][rows], plain[1][:, rows]
    assert_results(case, (got["out"], got["lse"]), case.definition(case.doubled()), tuple(plain))
    for name in ("q", "k", "v"):
        got[name][rows] = found[name][rows]
    kernel = {name: got[name] for name in ("q", "k", "v")}
    exact = gradients(case.definition, case.doubled(), *grads)
    assert_gradients(case, kernel, exact, found, gradient_magnitudes(case, *grads))


@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", ("q", "k", "v"))
def test_a_nan_stays_in_its_sequence_and_head(backend, device, where, poison):
    """Short texts share a tile; a NaN in one does not reach the next, forward or backward."""
    if emulated(backend) and poison != poison:
        pytest.skip("infinity is enough for the emulation: it becomes NaN on the way")
    case = Case((3, 5, 2, 40, 7), heads=2, dtype=main_dtype(backend), reach=4, rotated=16)
    for sick, row in ((1, 4), (2, 9), (3, 20)):
        dirty = {where: case.tensors[where].clone()}
        dirty[where][row, 0, 1] = poison
        got = results(case, backend, device, dirty)
        rows = slice(*case.cu_q[sick : sick + 2].tolist())
        assert_results_and_gradients(case, got, rows)
        for name in ("out", "q"):
            assert not got[name].cpu()[rows, 0].isfinite().all()
        for name in ("out", "q", "k", "v"):
            assert got[name].cpu()[rows, 1].isfinite().all()


def test_a_nan_of_a_key_that_does_not_count_is_not_seen(backend, device):
    case = option_case("seqused_k", main_dtype(backend))
    unused = torch.ones(sum(case.lengths_k), dtype=torch.bool)
    for start, used in zip(case.cu_k.tolist(), case.tensors["seqused_k"].tolist(), strict=False):
        unused[start : start + used] = False
    dirty = {name: case.tensors[name].masked_fill(unused[:, None, None], float("nan")) for name in ("k", "v")}
    got = results(case, backend, device, dirty)
    assert_results_and_gradients(case, got)
    assert not got["k"].cpu()[unused].any() and not got["v"].cpu()[unused].any()


# ---- layout ----


def test_strided_views_of_a_fused_projection(backend, device):
    """q, k and v as a model hands them over: slices of one matrix product, and heads first."""
    case = Case((5, 33, 2), heads=4, kv_heads=2, dtype=main_dtype(backend), reach=3)
    rows = 40
    fused = torch.cat([case.tensors[name].flatten(1) for name in ("q", "k", "v")], 1)
    views = {name: part.view(rows, -1, 32) for name, part in zip("qkv", fused.split([128, 64, 64], 1), strict=True)}
    heads_first = {name: case.tensors[name].transpose(0, 1).contiguous().transpose(0, 1) for name in "qkv"}
    # rows, and a whole tensor, that begin at no multiple of 16 bytes
    odd = {name: torch.nn.functional.pad(case.tensors[name], (1, 0))[..., 1:] for name in "qkv"}
    shifted = {name: torch.nn.functional.pad(case.tensors[name].flatten(), (1, 0))[1:] for name in "qkv"}
    shifted = {name: rows.view(case.tensors[name].shape) for name, rows in shifted.items()}
    expected = tuple(results(case, backend, device).values())
    for tensors in (views, heads_first, odd, shifted):
        assert tensors is shifted or not tensors["q"].is_contiguous()
        outs = case.run(backend, device, tensors)
        assert_same(tuple(x.detach() for x in outs), expected[:2])
        leaves = {name: tensors[name].to(device).requires_grad_() for name in "qkv"}
        table = {"bias_table": case.tensors["bias_table"].to(device).requires_grad_()}
        outs = case.run(backend, device, leaves | table)
        grads = [x.to(device) for x in seeded_gradients(case)]
        assert_same(torch.autograd.grad(outs, [*leaves.values(), *table.values()], grads), expected[2:])


def test_gradient_of_any_stride(backend, device):
    """The gradient of a sum has stride 0."""
    case = Case((5, 20), dtype=main_dtype(backend), reach=3)
    found = []
    for expanded in (True, False):
        leaves = {name: case.tensors[name].to(device).requires_grad_() for name in DIFFERENTIABLE}
        outs = case.run(backend, device, leaves)
        one = torch.ones((), device=device)
        grads = [one.expand_as(x) if expanded else torch.ones_like(x) for x in outs]
        found.append(torch.autograd.grad(outs, list(leaves.values()), grads))
    assert_same(*found)


def test_lengths_may_be_called_longer(backend, device):
    """max_seqlen is an upper bound."""
    case = Case((5, 20, 1), dtype=main_dtype(backend), reach=3)
    arguments = case.arguments(device=device) | {"max_seqlen_q": 500, "max_seqlen_k": 300}
    longer = ek.varlen_attention(**arguments, return_lse=True, backend=backend)
    assert_same(longer, case.run(backend, device))


@pytest.mark.parametrize("name", ("plain", "everything"))
def test_second_derivative_is_refused(backend, device, name):
    if backend == "reference":
        pytest.skip("the reference has second derivatives")
    case = option_case(name, main_dtype(backend))
    leaf = case.tensors["q"].to(device).requires_grad_()
    out, _ = case.run(backend, device, {"q": leaf})
    (first,) = torch.autograd.grad(out.pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives are not supported|once_differentiable"):
        first.sum().backward()


# ---- memory ----

MEMORY = """
import re, sys, torch
import embedding_kernels as ek
torch.set_num_threads(2)
def step(n):
    q, k, v = (torch.randn(n, 4, 64, requires_grad=True) for _ in range(3))
    table = torch.randn(4, 183, requires_grad=True)
    cu = torch.tensor([0, n], dtype=torch.int32)
    ek.varlen_attention(q, k, v, cu, cu, n, n, bias_table=table).sum().backward()
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
step(64)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
step(int(sys.argv[1]))
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_linear_in_the_tokens():
    """Forward and backward with a bias over one text; a single head's scores at 8,192 tokens would be 256 MiB."""
    peaks = {}
    for tokens in (2048, 4096, 8192):
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tokens)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert run.returncode == 0, run.stderr[-2000:]
        peaks[tokens] = int(run.stdout) / 1024
    print({tokens: f"{peak:.0f} MiB" for tokens, peak in peaks.items()})
    tensor = 8192 * 4 * 64 * 4 / 2**20
    # inputs, output and their gradients there must be; working space may be as much again
    assert 6 * tensor <= peaks[8192] <= 2 * 8 * tensor
    assert peaks[8192] - peaks[4096] <= 2.5 * (peaks[4096] - peaks[2048])
