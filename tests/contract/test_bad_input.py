"""Bad input, drawn: whatever is done to one argument of a good call, every backend either gives the same answer or
refuses with the same clean sentence."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding_kernels.ops._registry import OPERATORS
from operators import SAMPLES, Sample, assert_same, call_public, fresh, is_float, outputs

SENTENCE = r"^{op}(_backward)?: [^\n]+ must be [^\n]+, got [^\n]+$"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
FLOATS = st.sampled_from((-1.5, -0.0, 0.0, 2.0, 1e30, float("inf"), float("-inf"), float("nan")))
PUBLIC_SAMPLES = [sample for sample in SAMPLES if not sample.op.endswith("_backward")]


def draw_tensor(data: st.DataObject, tensor: torch.Tensor) -> torch.Tensor:
    kind = data.draw(st.sampled_from(("dtype", "rank", "size", "device", "values", "strides")), "change")
    if kind == "dtype":
        return tensor.detach().to(data.draw(st.sampled_from(DTYPES), "dtype"))
    if kind == "device":
        return tensor.to("meta")
    if kind == "rank":
        dim = data.draw(st.integers(0, tensor.dim()), "dim")
        return tensor.unsqueeze(dim) if data.draw(st.booleans(), "grow") or tensor.dim() == 0 else tensor.new_zeros(())
    if kind == "strides":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if kind == "size" or is_float(tensor) or tensor.numel() == 0:
        dim = data.draw(st.integers(0, tensor.dim() - 1), "dim")
        wanted = max(0, tensor.shape[dim] + data.draw(st.integers(-2, 2), "by"))
        rows = torch.arange(wanted) % max(tensor.shape[dim], 1)
        return (
            tensor.index_select(dim, rows)
            if tensor.shape[dim]
            else tensor.new_zeros([*tensor.shape[:dim], wanted, *tensor.shape[dim + 1 :]])
        )
    place = data.draw(st.integers(0, tensor.numel() - 1), "place")
    changed = tensor.clone()
    if tensor.dtype in (torch.bool, torch.uint8):
        changed.flatten()[place] ^= True
    else:
        changed.flatten()[place] += data.draw(st.sampled_from((-100, -3, -1, 1, 2, 1000)), "by")
    return changed


def made_up(data: st.DataObject, kind: str) -> object:
    """A value for an optional argument that the sample leaves out."""
    if kind == "Tensor":
        size = data.draw(st.lists(st.integers(0, 4), max_size=3), "size")
        return torch.zeros(size, dtype=data.draw(st.sampled_from(DTYPES), "dtype"))
    if kind == "float":
        return data.draw(FLOATS, "float")
    return data.draw(st.sampled_from((-1, 0, 1, 20)), "int") if kind in ("int", "SymInt") else None


def draw_value(data: st.DataObject, value: object, kind: object) -> object:
    """Something else for an argument; ``kind`` is its type in the schema."""
    if isinstance(kind, torch.OptionalType):
        if value is None:
            return made_up(data, str(kind.getElementType()))
        if data.draw(st.integers(0, 3), "left out") == 0:
            return None
    if isinstance(value, torch.Tensor):
        return draw_tensor(data, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + data.draw(st.sampled_from((-(2**40), -100, -2, -1, 1, 2, 50)), "by")
    if isinstance(value, float):
        return data.draw(FLOATS, "float")
    if isinstance(value, str):
        return data.draw(st.sampled_from(("", "median", "mean ", "first", "first_m", "max", "weighted_mean")), "mode")
    return value


def attempt(sample: Sample, args: tuple, backend: str) -> tuple[str, object]:
    try:
        return "answer", call_public(sample, fresh(sample.op, args), backend=backend)
    except ValueError as error:
        return "refusal", str(error)


@pytest.mark.parametrize("sample", PUBLIC_SAMPLES, ids=str)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_backends_refuse_alike(sample, data):
    args = list(sample.args())
    place = data.draw(st.integers(0, len(args) - 1), "argument")
    args[place] = draw_value(data, args[place], OPERATORS[sample.op].overload._schema.arguments[place].real_type)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    backends = ["reference"] if any(t.is_meta for t in tensors) else ["reference", "cpu"]
    results = {backend: attempt(sample, tuple(args), backend) for backend in backends}
    (kind, expected) = results["reference"]
    if any(t.is_meta for t in tensors):
        results["cpu"] = attempt_op(sample, tuple(args))
        if kind == "answer" or results["cpu"][0] == "answer":
            assert all(t.is_meta for t in tensors), "a mix of devices must be refused"
            return
    for backend, (other_kind, other) in results.items():
        assert other_kind == kind, f"{backend}: {other}, reference: {expected}"
        if kind == "refusal":
            assert other == expected
            assert re.match(SENTENCE.format(op=sample.op), other), other
    if kind == "answer" and not any(is_float(t) for t in outputs(expected)):
        assert_same(results["cpu"][1], expected)


def attempt_op(sample: Sample, args: tuple) -> tuple[str, object]:
    try:
        return "answer", OPERATORS[sample.op].forward_overload(*args)
    except ValueError as error:
        return "refusal", str(error)


def activations(op: str) -> tuple[str, ...]:
    """What autocast casts; of an operator that it leaves alone, rows whose dtype matters."""
    names = OPERATORS[op].argument_names
    return OPERATORS[op].autocast or tuple(name for name in names if name in ("x", "hidden", "queries"))


def float64_args(sample: Sample) -> tuple:
    named = zip(OPERATORS[sample.op].argument_names, sample.args(), strict=False)
    return tuple(a.double() if name in activations(sample.op) and is_float(a) else a for name, a in named)


def has_float64(sample: Sample) -> bool:
    return any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in float64_args(sample))


FLOAT_SAMPLES = [sample for sample in PUBLIC_SAMPLES if has_float64(sample)]


@pytest.mark.parametrize("sample", FLOAT_SAMPLES, ids=str)
def test_float64_is_for_the_reference(sample):
    args = float64_args(sample)
    with pytest.raises(ValueError, match=r'float64 runs with backend="reference"\), got float64'):
        call_public(sample, args)
    assert outputs(call_public(sample, args, backend="reference"))


def test_a_bad_shape_is_wrapped_by_compile():
    sample = next(s for s in SAMPLES if s.op == "segment_pool")
    args = sample.args()
    compiled = torch.compile(lambda x: call_public(sample, (x, *args[1:])), backend="aot_eager")
    with pytest.raises(Exception, match="segment_pool: hidden must be a float32"):
        compiled(torch.randn(3, 4, 5))
