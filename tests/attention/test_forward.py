"""varlen_attention on every backend under the error rule, for each sequence and head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.functional import scaled_dot_product_attention

import embedding_kernels as ek
from attention.cases import DIMS, HEADS, LONG, MANY, OPTIONS, RAGGED, TILES, cases, option_case
from attention.definition import (
    FLOATS,
    Case,
    assert_forward,
    attend,
    emulated,
    interpreted,
    main_dtype,
    offsets,
    sequences,
    skip_if_slow,
    some_floats,
)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lengths(backend, device, dtype):
    skip_if_slow(backend, dtype)
    assert_forward(Case(TILES, heads=1, dtype=dtype), backend, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", LONG)
def test_long(backend, device, length, dtype):
    """Every option that a tile may be left out for, over several tiles."""
    skip_if_slow(backend, dtype, FLOATS)
    if interpreted(backend) or (emulated(backend) and length > LONG[0]):
        pytest.skip("too long for the interpreter and the emulation")
    for options in ({"causal": True}, {"window_left": 40, "window_right": 70}):
        case = Case((length, 3), heads=1, dim=64, dtype=dtype, reach=91, rotated=64, options=options)
        assert_forward(case, backend, device)


@pytest.mark.parametrize("extra", ({}, {"reach": 91, "rotated": 48}), ids=str)
@pytest.mark.parametrize("dim", (64, 128))
def test_long_and_plain(backend, device, dim, extra):
    """The shapes of long texts, with nothing but causality and with the rest."""
    if interpreted(backend):
        pytest.skip("too long for the interpreter")
    case = Case((150, 3), heads=1, dim=dim, dtype=torch.bfloat16, options={"causal": True}, **extra)
    assert_forward(case, backend, device)


def test_many_sequences(backend, device):
    for dtype in some_floats(backend):
        assert_forward(Case(MANY, heads=1, dtype=dtype, reach=2), backend, device)


@pytest.mark.parametrize("dims", ((136, 72), (104, 128)), ids=str)
def test_wide_heads_with_every_option(backend, device, dims):
    spec = OPTIONS["everything"] | {"dim": dims[0], "dim_v": dims[1]}
    assert_forward(Case(dtype=torch.bfloat16, **spec), backend, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(backend, device, dims, dtype):
    # here float16 has a way of its own through the emulation
    if dtype != torch.float16 or not emulated(backend):
        skip_if_slow(backend, dtype, FLOATS[1:2])
    assert_forward(Case((5, 33, 1), heads=1, dim=dims[0], dim_v=dims[1], dtype=dtype), backend, device)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_groups_of_heads(backend, device, heads):
    assert_forward(Case((5, 20), heads=heads[0], kv_heads=heads[1], dtype=torch.bfloat16), backend, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, device, name, dtype):
    skip_if_slow(backend, dtype)
    assert_forward(option_case(name, dtype), backend, device)


@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window_left": 3, "window_right": 4}), ids=str)
def test_ragged(backend, device, options):
    for dtype in some_floats(backend):
        assert_forward(
            Case(RAGGED, heads=1 if emulated(backend) else 2, dtype=dtype, reach=4, options=options), backend, device
        )


def test_large_scores(backend, device):
    """Scores of hundreds: exponentials of their differences only."""
    for dtype in some_floats(backend):
        case = Case((40, 7), dtype=dtype, options={"scale": 40.0})
        assert_forward(case, backend, device)


def test_drawn(backend, device):
    few = interpreted(backend) or emulated(backend) or backend == "reference"
    # on a GPU each example has kernels of Triton's of its own, which are compiled
    examples = 6 if few else 10 if backend == "triton" else 40

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=cases(30 if few else 100, 3 if few else 4, some_floats(backend, FLOATS)))
    def check(case):
        assert_forward(case, backend, device)

    check()


# ---- the definition against others' ----


def sdpa(case: Case) -> torch.Tensor:
    """torch's attention with what it lacks as a mask, in float64."""
    tensors, outs = case.tensors | case.doubled(), []
    for sequence in sequences(case):
        part = attend(case, sequence, tensors)
        mask = torch.zeros(sequence.visible.shape, dtype=torch.float64).masked_fill(~sequence.visible, -torch.inf)
        q, k, v = (x[rows].transpose(0, 1) for x, rows in _packed(tensors, sequence))
        if case.rotated:
            q, k = part.q, part.k
        out = scaled_dot_product_attention(q, k, v, mask, scale=case.options.get("scale"), enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def _packed(tensors, sequence):
    return zip((tensors["q"], tensors["k"], tensors["v"]), (sequence.rows_q, *[sequence.rows_k] * 2), strict=True)


@pytest.mark.parametrize("name", ["plain", "causal", "window", "causal_window", "seqused_k", "other_keys", "scale"])
def test_the_definition_is_torchs_attention(name):
    case = option_case(name, torch.float64)
    torch.testing.assert_close(case.definition({})[0], sdpa(case), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_definition_is_plain_torch(name):
    """Two programs of the same formula, to the roundings of float64."""
    case = option_case(name, torch.float64)
    for a, b in zip(case.definition({}), case.plain({}), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("bidirectional", "reach"), ((True, 91), (False, 113)))
def test_the_bias_of_t5_is_a_table(bidirectional, reach):
    """Its buckets of key − query, as transformers computes them, are constant past R, and no smaller R will do."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    apart = torch.arange(-600, 601)
    found = t5._relative_position_bucket(apart, bidirectional=bidirectional, num_buckets=32, max_distance=128)
    for r, same in ((reach, True), (reach - 1, False)):
        table = found[600 - r : 601 + r]
        assert torch.equal(table[apart.clamp(-r, r) + r], found) == same


def test_rotation_is_that_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    case = Case((9, 4), dtype=torch.float64, rotated=32)
    cos, sin = (case.tensors[name].double().repeat(1, 2) for name in ("rope_cos", "rope_sin"))
    at = torch.cat([torch.arange(9), torch.arange(4)])
    q, k = llama.apply_rotary_pos_emb(case.tensors["q"], case.tensors["k"], cos[at], sin[at])
    rotated = ek.varlen_attention(q, k, case.tensors["v"], case.cu_q, case.cu_k, 9, 9, backend="reference")
    torch.testing.assert_close(case.definition({})[0], rotated, rtol=0, atol=1e-14)


def test_no_sequences(backend, device):
    none = torch.zeros(0, 2, 16, device=device, dtype=main_dtype(backend))
    out, lse = ek.varlen_attention(
        none, none, none, *[offsets(()).to(device)] * 2, 0, 0, return_lse=True, backend=backend
    )
    assert (out.shape, lse.shape) == ((0, 2, 16), (2, 0))


def test_dropout_is_refused():
    q = torch.zeros(3, 1, 16)
    with pytest.raises(ValueError, match="varlen_attention: dropout_p must be 0"):
        ek.varlen_attention(q, q, q, offsets((3,)), offsets((3,)), 3, 3, dropout_p=0.1)
