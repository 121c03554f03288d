"""The CUDA library by its table: which operators it serves, which calls its kernels take, and where the others go."""

from __future__ import annotations

import pytest
import torch

from cuda_host import backend as cuda_host
from embedding_kernels.ops import cuda_table
from embedding_kernels.ops._registry import OPERATORS, native_or_triton

pytestmark = pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not()))
ATTENTION = [op for op in cuda_table.TABLE if "attention" in op]
SCANS = [op for op in cuda_table.TABLE if "hamming" in op]
EVERY_DTYPE = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (16, 64, 72, 136, 256)
HOPPER = "EMBEDDING_KERNELS_HOPPER"


def attention(dtype: torch.dtype, head_dim: int, value_dim: int) -> tuple[torch.Tensor, ...]:
    q, k = torch.randn(2, 5, 2, head_dim).to(dtype)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    return q, k, torch.randn(5, 2, value_dim).to(dtype), offsets, offsets, 3, 3


def calls(op: str, dtype: torch.dtype, head_dim: int, value_dim: int):
    """Arguments of one call."""
    if op == "varlen_attention":
        return attention(dtype, head_dim, value_dim)
    inputs = attention(dtype, head_dim, value_dim)
    out, lse = OPERATORS["varlen_attention"].overload(*inputs)
    rest = (None, False, -1, -1, 0.0, None, None, None, None, None, None)
    return (torch.randn(out.shape).to(dtype), None, out, lse, *inputs, *rest)


@pytest.mark.parametrize("name", [name for name, op in OPERATORS.items() if not op.cpu_only])
def test_every_operator_has_a_kernel(name):
    for registered in OPERATORS[name].registered_names:
        assert cuda_host.has_kernel(registered), f"csrc/ops.cpp registers no CUDA kernel of {registered}"


@pytest.fixture(params=(80, 90))
def architecture(request):
    cuda_host.set_options(architecture=request.param)
    yield request.param
    cuda_host.set_options()


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("op", ATTENTION)
def test_rows_hold_what_the_kernels_take(op, dtype, architecture, monkeypatch):
    """Inside a row the kernel of its name runs; outside, the C++ code refuses."""
    monkeypatch.setenv(HOPPER, "all")
    run = getattr(getattr(torch.ops, cuda_host.NAMESPACE), op)
    for width in WIDTHS:
        for value_width in {width, 64}:
            args = calls(op, dtype, width, value_width)
            row = cuda_table.row_for(op, OPERATORS[op].argument_names, args, architecture, whenever=True)
            cuda_host.launched()
            if row is None:
                with pytest.raises(ValueError, match="bfloat16 or float16 tensor in the CUDA"):
                    run(*args)
                assert not cuda_host.launched()
            else:
                run(*args)
                names = [line.split()[-1] for line in cuda_host.launched()]
                assert any(name.startswith(row.kernel) for name in names), (names, row)
                assert row.only == any("hopper" in name for name in names), (names, row)


def rows_of_codes(count: int, width: int, stride: int, offset: int = 0) -> torch.Tensor:
    held = torch.randint(0, 256, (64 + count * max(stride, 1) + width,), dtype=torch.uint8)
    return held[offset:].as_strided((count, width), (stride, 1))


@pytest.mark.parametrize(
    ("queries", "codes", "by_hopper"),
    [
        (5, rows_of_codes(9, 48, 48), True),
        (4, rows_of_codes(9, 48, 48), False),
        (5, rows_of_codes(9, 45, 48), True),
        (5, rows_of_codes(9, 45, 45), False),
        (5, rows_of_codes(9, 48, 64, offset=16), True),
        (5, rows_of_codes(9, 48, 48, offset=4), False),
        (5, rows_of_codes(9, 48, 0), False),
        (5, rows_of_codes(1, 45, 45), True),
        (5, rows_of_codes(9, 48, 48).T.contiguous().T, True),
        (5, rows_of_codes(9, 512, 512), True),
        (5, rows_of_codes(9, 513, 528), False),
    ],
)
@pytest.mark.parametrize("op", SCANS)
def test_scans_of_codes_by_the_table(op, queries, codes, by_hopper, architecture):
    args = (torch.randint(0, 256, (queries, codes.shape[1]), dtype=torch.uint8), codes, 3)[: 2 + ("distance" not in op)]
    row = cuda_table.row_for(op, OPERATORS[op].argument_names, args, architecture)
    assert row is not None
    assert row.only == (by_hopper and architecture == 90)
    cuda_host.launched()
    getattr(getattr(torch.ops, cuda_host.NAMESPACE), op)(*args)
    names = {line.split()[-1] for line in cuda_host.launched()}
    assert names & {"scan_kernel", "hamming_hopper_kernel"} == {row.kernel}


@pytest.mark.parametrize(
    ("lengths", "architecture", "kernel"),
    [
        ((128, 128), 90, "attention_kernel"),
        ((129, 65), 90, "attention_hopper_kernel"),
        ((129, 1, 1, 1), 90, "attention_kernel"),
        ((400, 300), 80, "attention_kernel"),
        ((400, 300), 86, "attention_kernel"),
        ((400, 300), 100, "attention_kernel"),
    ],
)
def test_long_sequences_go_to_hopper_kernels(lengths, architecture, kernel):
    q = torch.empty(sum(lengths), 2, 64, dtype=torch.bfloat16)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    args = (q, q, q, offsets, offsets, max(lengths), max(lengths))
    row = cuda_table.row_for("varlen_attention", OPERATORS["varlen_attention"].argument_names, args, architecture)
    assert row is not None
    assert row.kernel == kernel


@pytest.mark.parametrize("asked", (None, "", "none", "all"))
@pytest.mark.parametrize("lengths", ((128, 128), (129, 65), (129, 1, 1, 1)))
def test_the_variable_has_the_last_word(lengths, asked, monkeypatch):
    """The C++ code goes by the table where nothing is asked for."""
    monkeypatch.delenv(HOPPER, raising=False)
    if asked is not None:
        monkeypatch.setenv(HOPPER, asked)
    q = torch.randn(sum(lengths), 1, 16).to(torch.bfloat16)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    args = (q, q, q, offsets, offsets, max(lengths), max(lengths))
    architecture = 80 if asked == "none" else 90
    names = OPERATORS["varlen_attention"].argument_names
    row = cuda_table.row_for("varlen_attention", names, args, architecture, whenever=asked == "all")
    assert row is not None
    with cuda_host.architecture(90):
        cuda_host.launched()
        getattr(torch.ops, cuda_host.NAMESPACE).varlen_attention(*args)
    assert {line.split()[-1] for line in cuda_host.launched()} == {row.kernel}


@pytest.mark.parametrize("op", cuda_table.TABLE)
def test_an_unknown_value_of_the_variable_is_refused(op, architecture, monkeypatch):
    monkeypatch.setenv(HOPPER, "both")
    codes = rows_of_codes(9, 48, 48)
    args = calls(op, torch.bfloat16, 64, 64) if op in ATTENTION else (codes, codes, 3)[: 2 + ("distance" not in op)]
    cuda_host.launched()
    with pytest.raises(ValueError, match=r"^EMBEDDING_KERNELS_HOPPER must be none or all, got both$"):
        getattr(getattr(torch.ops, cuda_host.NAMESPACE), op)(*args)
    assert not {"attention_kernel", "scan_kernel"} & {line.split()[-1] for line in cuda_host.launched()}


@pytest.mark.parametrize("stride", (0, 3, 64))
def test_the_stride_of_a_single_row_counts_for_nothing(stride, architecture, monkeypatch):
    monkeypatch.setenv(HOPPER, "all")
    q, k, v = torch.randn(3, 1, 2, 32).to(torch.bfloat16)
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    run = getattr(torch.ops, cuda_host.NAMESPACE).varlen_attention
    strided = [rows.as_strided(rows.shape, (stride, 32, 1)) for rows in (q, k, v)]
    out, lse = run(*strided, offsets, offsets, 1, 1)
    assert torch.equal(out, v)
    assert torch.equal(lse, run(q, k, v, offsets, offsets, 1, 1)[1])


def test_more_rows_than_maps_count_go_elsewhere():
    offsets = torch.tensor([0, 2**30, 2**30 + 1], dtype=torch.int32)
    names = OPERATORS["varlen_attention"].argument_names
    for rows, kernel in ((2**30, "attention_hopper_kernel"), (2**30 + 1, "attention_kernel")):
        k = torch.empty(1, 1, 16, dtype=torch.bfloat16).expand(rows, 1, 16)
        row = cuda_table.row_for("varlen_attention", names, (k[:400], k, k, offsets, offsets, 400, rows), 90)
        assert row is not None
        assert row.kernel == kernel


def test_both_sides_of_the_table_are_tried():
    for op in ATTENTION:
        fits = {
            cuda_table.row_for(op, OPERATORS[op].argument_names, calls(op, dtype, width, width)) is not None
            for dtype in EVERY_DTYPE
            for width in WIDTHS
        }
        assert fits == {True, False}, op


def test_operators_with_a_kernel_for_every_call_do_not_ask():
    assert [op for op in cuda_table.TABLE if cuda_table.leaves_some(op)] == ATTENTION


def test_calls_outside_go_to_triton(monkeypatch):
    op = OPERATORS["varlen_attention"]
    monkeypatch.setattr(type(op), "run_triton", lambda self, *args: "triton")
    run = native_or_triton(op, lambda keyset, *args: f"C++ with {keyset}")
    assert run("keys", *attention(torch.bfloat16, 64, 64)) == "C++ with keys"
    assert run("keys", *attention(torch.float32, 64, 64)) == "triton"
