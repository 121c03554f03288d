"""What torch asks of an operator: opcheck, compile, export, autocast, gradients, FLOPs; over every sample."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from embedding_kernels.ops._registry import OPERATORS
from operators import (
    DATA_DEPENDENT,
    DIFFERENTIABLE,
    SAMPLES,
    assert_same,
    call_public,
    everything,
    fresh,
    is_float,
    outputs,
)


@pytest.fixture(autouse=True)
def _forget_compilations():
    torch._dynamo.reset()


by_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
by_differentiable = pytest.mark.parametrize("sample", DIFFERENTIABLE, ids=str)


@by_sample
def test_opcheck(sample):
    op = OPERATORS[sample.op]
    torch.library.opcheck(op.overload, sample.args(requires_grad=op.gradient is not None))
    if op.gradient:
        torch.library.opcheck(op.forward_overload, sample.args())


@by_sample
def test_fake_gives_shape_dtype_and_strides(sample):
    op = OPERATORS[sample.op]
    if sample.op in DATA_DEPENDENT:
        pytest.skip("meta tensors have no values: see the next test")
    real = outputs(op.overload(*sample.args()))
    meta = op.overload(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in sample.args()))
    for a, b in zip(real, outputs(meta), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.op in DATA_DEPENDENT], ids=str)
def test_fake_of_unknown_size(sample):
    """Sizes that depend on values are symbols, the same in every output that shares them; the rest is as it is."""
    op = OPERATORS[sample.op]
    real = outputs(op.overload(*sample.args()))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        args = [mode.from_tensor(a, static_shapes=True) if isinstance(a, torch.Tensor) else a for a in sample.args()]
        fake = outputs(op.overload(*args))
    assert len(real) == len(fake)
    symbols = {}
    for a, b in zip(real, fake, strict=True):
        assert (a.dtype, a.dim(), a.stride()) == (b.dtype, b.dim(), b.stride())
        for size, symbol in zip(a.shape, b.shape, strict=True):
            assert size == (symbol if isinstance(symbol, int) else symbols.setdefault(str(symbol), size))
    assert symbols
    with pytest.raises(RuntimeError, match="data-dependent shape"):
        op.overload(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in sample.args()))


@by_sample
def test_compiles_whole(sample):
    compiled = torch.compile(lambda *args: call_public(sample, args), fullgraph=True, backend="aot_eager")
    traced, eager = sample.args(), sample.args()
    assert_same(
        everything(sample.op, traced, compiled(*traced)), everything(sample.op, eager, call_public(sample, eager))
    )


@by_differentiable
def test_compiled_gradient(sample):
    def eager(*args):
        return call_public(sample, args)

    grads = []
    for function in (torch.compile(eager, fullgraph=True, backend="aot_eager"), eager):
        args = sample.args(requires_grad=True)
        outs = outputs(function(*args))
        slopes = [torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype) for out in outs]
        torch.autograd.backward(outs, slopes)
        grads.append(tuple(a.grad for a in args if is_float(a) and a.requires_grad))
    assert_same(*grads)


@by_sample
def test_no_autograd_where_nothing_requires_grad(sample):
    """The public function takes the operator without autograd, which costs a third of a call."""
    op = OPERATORS[sample.op]
    if sample.op.endswith("_backward"):
        pytest.skip("not public")
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Record():
        call_public(sample, sample.args())
    assert op.forward_overload in seen
    if op.gradient:
        seen.clear()
        with Record():
            call_public(sample, sample.args(requires_grad=True))
        assert op.overload in seen


@by_differentiable
def test_second_derivative_is_refused_or_right(sample):
    op = OPERATORS[sample.op]
    args = sample.args(requires_grad=True)
    variables = [a for a in args if is_float(a) and a.requires_grad]
    # a gradient that itself depends on the input, so that a second derivative exists
    squares = sum((out.float() ** 2).sum() for out in outputs(op.overload(*args)))
    grads = torch.autograd.grad(squares, variables, create_graph=True)
    loss = sum((g.float() ** 2).sum() for g in grads)
    if op.gradient.backward_op.endswith("_backward"):
        with pytest.raises(RuntimeError, match=f"{sample.op}: second derivatives are not supported"):
            loss.backward()
        return
    # a copy of rows: the gradient of sum(y^2) is 2 y, so loss = 4 sum(y^2) and its gradient is 4 times the first
    second = torch.autograd.grad(loss, variables)
    assert_same(tuple(second), tuple(4 * g.detach() for g in grads))


@by_sample
def test_autocast_casts_activations_alone(sample):
    op = OPERATORS[sample.op]
    args = sample.args()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = outputs(op.overload(*fresh(sample.op, args)))
    plain = outputs(op.overload(*fresh(sample.op, args)))
    if not op.autocast:
        assert_same(under, plain)
        return
    named = zip(op.argument_names, args, strict=False)
    moved = [a.bfloat16() if name in op.autocast and a is not None else a for name, a in named]
    assert_same(under, op.overload(*moved))


@by_sample
def test_flops_are_counted(sample):
    from torch.utils.flop_counter import FlopCounterMode

    op, args = OPERATORS[sample.op], sample.args()
    with FlopCounterMode(display=False) as counter:
        op.overload(*args)
    shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
    assert counter.get_total_flops() == op.flops(*shapes)


def test_flops_grow_with_the_work():
    assert OPERATORS["hamming_distance"].flops((2, 16), (10, 16)) == 2 * 2 * 10 * 128
    assert OPERATORS["hamming_range"].flops((2, 16), (10, 16), 5) == 2 * 2 * 10 * 128
    assert OPERATORS["rescore_topk"].flops((3, 100), (3, 20), (999, 100), 10) == 2 * 3 * 20 * 100
    assert OPERATORS["segment_pool"].flops((7, 5), (3,), "mean") == 35
    assert OPERATORS["anchor_attention"].flops((7, 4, 6), (2, 4, 3, 6), (3,)) == 4 * 3 * 7 * 4 * 6
    assert OPERATORS["anchor_scores"].flops((7, 4, 6), (2, 4, 6), (3,)) == 2 * 7 * 4 * 6
    assert OPERATORS["grouped_softmax"].flops((7, 6), 3) == 5 * 42
    assert OPERATORS["geglu_segment_pool"].flops((7, 6), None, (3,)) == 7 * 42
    assert OPERATORS["add_rms_norm"].flops((7, 5), None, (5,)) == 5 * 35
    assert OPERATORS["add_layer_norm"].flops((7, 5), (7, 5), (5,)) == 8 * 35
    assert OPERATORS["token_prepend"].flops((7, 5), (2,), (2,)) == 0
    assert OPERATORS["token_prepend_backward"].flops((7, 5), (2,), (2,)) == 2 * 5
    assert OPERATORS["token_prepend_rms_norm"].flops((7, 5), (7, 5), (2,), (2,), (5,)) == 5 * 35
    # one sequence: a multiplication and an addition for each query, key and dimension, of keys and of values
    assert OPERATORS["varlen_attention"].flops((7, 2, 16), (5, 1, 16), (5, 1, 24), (2,)) == 2 * 2 * 7 * 5 * (16 + 24)
    merged = (7, 2, 16), (2, 7), (7, 2, 16), (2, 7)
    assert OPERATORS["merge_attention"].flops(*merged) == 3 * 7 * 2 * 16
