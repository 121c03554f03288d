"""`T5RelativeBias` against transformers' bucket function and its dense bias."""

from __future__ import annotations

import pytest
import torch

import embedding_kernels as ek
from embedding_kernels.nn import T5RelativeBias, t5_relative_buckets

transformers = pytest.importorskip("transformers")

SETTINGS = [(32, 128), (8, 12), (16, 40), (64, 500), (32, 20)]


def bucket_of(positions, bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    return T5Attention._relative_position_bucket(positions, bidirectional, num_buckets, max_distance)


@pytest.mark.parametrize(("num_buckets", "max_distance"), SETTINGS)
@pytest.mark.parametrize("bidirectional", (True, False))
def test_buckets_equal_transformers(num_buckets, max_distance, bidirectional):
    positions = torch.arange(-1024, 1025)
    theirs = bucket_of(positions, bidirectional, num_buckets, max_distance)
    ours = t5_relative_buckets(num_buckets, max_distance, bidirectional)
    reach = ours.shape[0] // 2
    assert torch.equal(ours[positions.clamp(-reach, reach) + reach], theirs)
    # the least reach that will do
    assert theirs[1024 - reach] != theirs[1024 - reach + 1]


def test_reach_of_the_defaults():
    assert T5RelativeBias(4).reach == 91
    assert T5RelativeBias(4, bidirectional=False).reach == 113


@pytest.mark.parametrize("bidirectional", (True, False))
def test_table_equals_the_dense_bias(bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(d_model=64, num_heads=4, d_kv=16, is_decoder=not bidirectional)
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    bias = T5RelativeBias.from_embedding(attention.relative_attention_bias, bidirectional=bidirectional)
    length = 300
    dense = attention.compute_bias(length, length)[0]
    offset = torch.arange(length)[None] - torch.arange(length)[:, None]
    table = bias()
    assert (table.dtype, table.shape) == (torch.float32, (4, 2 * bias.reach + 1))
    assert torch.equal(table[:, offset.clamp(-bias.reach, bias.reach) + bias.reach], dense)
    weight = torch.randn(dense.shape)
    (grad,) = torch.autograd.grad((dense * weight).sum(), attention.relative_attention_bias.weight)
    (ours,) = torch.autograd.grad(
        (table[:, offset.clamp(-bias.reach, bias.reach) + bias.reach] * weight).sum(), bias.weight
    )
    assert bias.weight is attention.relative_attention_bias.weight
    # sums of up to 90,000 float32 terms in another order
    assert (grad - ours).abs().max() <= 1e-4 * grad.abs().max()


def test_in_attention():
    bias = T5RelativeBias(2, 8, 12)
    torch.nn.init.normal_(bias.weight)
    q, k, v = torch.randn(3, 30, 2, 16)
    cu_seqlens = torch.tensor([0, 30], dtype=torch.int32)
    out = ek.varlen_attention(
        q, k, v, cu_seqlens, cu_seqlens, 30, 30, scale=1.0, bias_table=bias(), backend="reference"
    )
    buckets = bucket_of(torch.arange(30)[None] - torch.arange(30)[:, None], True, 8, 12)
    scores = torch.einsum("ihd,jhd->hij", q, k) + bias.weight[buckets].permute(2, 0, 1)
    assert torch.allclose(out, torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), atol=1e-5)


def test_saved_and_moved():
    bias = T5RelativeBias(2)
    assert set(bias.state_dict()) == {"weight"}
    assert bias.bfloat16()().dtype == torch.float32
    assert "bidirectional=True" in repr(bias)


def test_errors():
    with pytest.raises(ValueError, match="num_buckets must be at least 4, got 3"):
        T5RelativeBias(2, 3)
    with pytest.raises(ValueError, match="max_distance must be more than 8, got 8"):
        T5RelativeBias(2, 32, 8)
