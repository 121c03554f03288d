"""`RotaryEmbedding` against the rotary embedding of transformers' models."""

from __future__ import annotations

import pytest
import torch

import embedding_kernels as ek
from embedding_kernels.nn import RotaryEmbedding

hf = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 128}
PARAMETERS = {
    "default": {"rope_theta": 1e5},
    "linear": {"factor": 4.0, "rope_theta": 1e4},
    "yarn": {"factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "rope_theta": 5e5,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def assert_tables(rope, module, positions, *layer_type):
    """Bits of the same float32 expression."""
    cos, sin = module(torch.zeros(1), positions[None], *layer_type)
    half = rope.cos.shape[1]
    assert (rope.cos.dtype, rope.cos.shape) == (torch.float32, (positions.shape[0], half))
    assert torch.equal(rope.cos, cos[0, :, :half])
    assert torch.equal(rope.sin, sin[0, :, :half])


@pytest.mark.parametrize("kind", PARAMETERS)
def test_equals_llama(kind):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": kind, **PARAMETERS[kind]})
    assert_tables(RotaryEmbedding.from_config(config), LlamaRotaryEmbedding(config), torch.arange(128))


def test_equals_phi_whose_heads_are_rotated_in_part():
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    config = hf.PhiConfig(**SIZES, partial_rotary_factor=0.5)
    rope = RotaryEmbedding.from_config(config)
    assert rope.dim == 8
    assert_tables(rope, PhiRotaryEmbedding(config), torch.arange(128))


@pytest.mark.parametrize("layer_type", ("full_attention", "sliding_attention"))
def test_equals_gemma3_of_each_layer_type(layer_type):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    config = hf.Gemma3TextConfig(**SIZES, head_dim=16, layer_types=["sliding_attention", "full_attention"])
    rope = RotaryEmbedding.from_config(config, layer_type=layer_type)
    assert_tables(rope, Gemma3RotaryEmbedding(config), torch.arange(128), layer_type)


def test_theta_and_rows():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = hf.LlamaConfig(**SIZES)
    assert_tables(RotaryEmbedding(16, 50), LlamaRotaryEmbedding(config), torch.arange(50))
    assert RotaryEmbedding.from_config(config, 7).cos.shape == (7, 8)


def test_rotation_equals_llama_and_varlen_attention():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rope = RotaryEmbedding(16, 40, theta=100.0)
    q, k, v = torch.randn(3, 30, 2, 24)
    positions = torch.randint(0, 40, (30,))
    angles = torch.cat((rope.cos, rope.cos), 1)[positions][None], torch.cat((rope.sin, rope.sin), 1)[positions][None]
    heads = (x[None, ..., :16].transpose(1, 2) for x in (q, k))
    turned_q, turned_k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*heads, *angles))
    assert torch.allclose(rope.rotate(k, positions)[..., :16], turned_k, atol=1e-6)
    ours = rope.rotate(q, positions)
    assert torch.allclose(ours[..., :16], turned_q, atol=1e-6)
    assert torch.equal(ours[..., 16:], q[..., 16:])

    cu_seqlens = torch.tensor([0, 30], dtype=torch.int32)
    place = positions.int()
    fused = ek.varlen_attention(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        30,
        30,
        rope_cos=rope.cos,
        rope_sin=rope.sin,
        positions_q=place,
        positions_k=place,
        backend="reference",
    )
    plain = ek.varlen_attention(ours, rope.rotate(k, positions), v, cu_seqlens, cu_seqlens, 30, 30, backend="reference")
    assert torch.allclose(fused, plain, atol=1e-5)


def test_tables_stay_float32():
    rope = RotaryEmbedding(16, 8)
    cos = rope.cos.clone()
    assert torch.equal(rope.half().cos, cos)
    assert rope.to("meta").cos.device.type == "meta"
    assert rope.state_dict() == {}


def test_errors():
    with pytest.raises(ValueError, match="dim must be even and at least 2, got 7"):
        RotaryEmbedding(7, 8)
    with pytest.raises(ValueError, match="max_positions must be at least 1, got 0"):
        RotaryEmbedding(8, 0)
    with pytest.raises(ValueError, match=r"inv_freq must be \[4\], got \[3\]"):
        RotaryEmbedding(8, 8, inv_freq=torch.ones(3))
    with pytest.raises(ValueError, match="BertConfig must have rope_parameters"):
        RotaryEmbedding.from_config(hf.BertConfig())
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'dynamic' changes with each batch"):
        RotaryEmbedding.from_config(hf.LlamaConfig(**SIZES, rope_parameters=dynamic))
