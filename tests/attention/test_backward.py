"""The gradient of varlen_attention on every backend under the error rule, for each sequence and head; the table's for
each head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import embedding_kernels as ek
from attention.cases import DIMS, HEADS, LONG, MANY, OPTIONS, RAGGED, TILES, cases, option_case
from attention.definition import (
    DIFFERENTIABLE,
    FLOATS,
    Case,
    assert_backward,
    emulated,
    interpreted,
    main_dtype,
    offsets,
    skip_if_slow,
    some_floats,
)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lengths(backend, device, dtype):
    skip_if_slow(backend, dtype, FLOATS[1:2])
    assert_backward(Case(TILES, heads=1, dtype=dtype, reach=20), backend, device)


LONG_OPTIONS = ({"causal": True}, {"window_left": 40, "window_right": 70})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", LONG)
def test_long(backend, device, length, dtype):
    skip_if_slow(backend, dtype, FLOATS)
    if interpreted(backend) or (emulated(backend) and length > LONG[0]):
        pytest.skip("too long for the interpreter and the emulation")
    for options in LONG_OPTIONS[emulated(backend) :]:
        case = Case((length, 3), heads=1, dim=64, dtype=dtype, reach=91, rotated=64, options=options)
        assert_backward(case, backend, device)


def test_many_sequences(backend, device):
    for dtype in some_floats(backend):
        assert_backward(Case(MANY, heads=1, dtype=dtype, reach=2), backend, device)


@pytest.mark.parametrize("dims", ((136, 72), (104, 128)), ids=str)
def test_wide_heads_with_every_option(backend, device, dims):
    spec = OPTIONS["everything"] | {"dim": dims[0], "dim_v": dims[1]}
    assert_backward(Case(dtype=torch.bfloat16, **spec), backend, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(backend, device, dims, dtype):
    # here float16 has a way of its own through the emulation
    if dtype != torch.float16 or not emulated(backend):
        skip_if_slow(backend, dtype, FLOATS[1:2])
    assert_backward(Case((5, 33, 1), heads=1, dim=dims[0], dim_v=dims[1], dtype=dtype), backend, device)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_groups_of_heads(backend, device, heads):
    """The gradient of a key is a sum over the heads of its group."""
    case = Case((5, 20), heads=heads[0], kv_heads=heads[1], dtype=torch.bfloat16, reach=3, rotated=16)
    assert_backward(case, backend, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, device, name, dtype):
    skip_if_slow(backend, dtype, FLOATS[:1])
    assert_backward(option_case(name, dtype), backend, device)


@pytest.mark.parametrize("through", ("out", "lse"))
@pytest.mark.parametrize("name", ("softcap", "everything"))
def test_one_result_alone(backend, device, name, through):
    """A loss without lse, as most are; and one of lse alone: v has gradient 0 then."""
    for dtype in some_floats(backend):
        assert_backward(option_case(name, dtype), backend, device, through)


@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window_left": 3, "window_right": 4}), ids=str)
def test_ragged(backend, device, options):
    for dtype in some_floats(backend):
        assert_backward(
            Case(RAGGED, heads=1 if emulated(backend) else 2, dtype=dtype, reach=4, options=options), backend, device
        )


def test_drawn(backend, device):
    few = interpreted(backend) or emulated(backend) or backend == "reference"
    # on a GPU each example has kernels of Triton's of its own, which are compiled
    examples = 4 if few or backend == "triton" else 16

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=cases(30 if few else 100, 3 if few else 4, some_floats(backend, FLOATS)))
    def check(case):
        assert_backward(case, backend, device)

    check()


def test_only_what_is_wanted(backend, device):
    """An input that requires no gradient gets none."""
    case = option_case("everything", main_dtype(backend))
    for wanted in DIFFERENTIABLE:
        leaf = case.tensors[wanted].to(device).requires_grad_()
        out, _ = case.run(backend, device, {wanted: leaf})
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
        assert bool(grad.any())


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_the_definition(name):
    """Kernels' gradients are compared with the reference's; the reference's with finite differences."""
    spec = {"lengths": (3, 1, 4), "heads": 2, "dim": 16, "dtype": torch.float64, **OPTIONS[name]}
    spec |= {key: tuple(min(n, 5) for n in spec[key]) for key in ("lengths", "lengths_k") if key in spec}
    case = Case(**{**spec, "rotated": min(spec.get("rotated", 0), 16)})
    inputs = case.doubled()

    def run(*values):
        out, lse = case.definition(dict(zip(inputs, values, strict=True)))
        # −∞ of a query without keys has no derivative
        return out, lse.masked_fill(lse.isinf(), 0)

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_no_sequences(backend, device):
    if backend == "reference":
        pytest.skip("nothing was computed: the reference's result has no graph")
    none = torch.zeros(0, 2, 16, device=device, dtype=main_dtype(backend))
    leaves = [none.clone().requires_grad_() for _ in range(3)]
    table = torch.randn(2, 5, device=device, requires_grad=True)
    cu_seqlens = offsets(()).to(device)
    out = ek.varlen_attention(*leaves, cu_seqlens, cu_seqlens, 0, 0, bias_table=table, backend=backend)
    out.sum().backward()
    assert all(leaf.grad.shape == (0, 2, 16) for leaf in leaves)
    assert table.grad.shape == (2, 5) and not table.grad.any()
