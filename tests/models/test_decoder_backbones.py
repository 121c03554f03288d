"""Packed decoders of our own and plugged ones, in either direction, against transformers' eager attention, padded."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

hf = pytest.importorskip("transformers")

from embedding_kernels.models.backbones import (  # noqa: E402
    BertBackbone,
    DecoderBackbone,
    PluggedBackbone,
    decoder,
    packed_backbone,
    padding_only_mask,
)
from embedding_kernels.models.backbones.decoder import supports  # noqa: E402
from integrations.families import FAMILIES, VOCABULARY, Family, pad  # noqa: E402

from .test_backbones import Adapted, assert_same  # noqa: E402

GEMMA = Family("GemmaConfig", "GemmaModel", {**FAMILIES["Llama"].options, "head_dim": 16})
# whose scale is then not the one of its heads' width
GEMMA_2 = replace(FAMILIES["Gemma 2"], options={**FAMILIES["Gemma 2"].options, "query_pre_attn_scalar": 24})
OURS = {name: FAMILIES[name] for name in ("Llama", "Mistral", "Qwen2", "Qwen3")} | {"Gemma": GEMMA, "Gemma 2": GEMMA_2}
ALL = {**OURS, **{name: FAMILIES[name] for name in ("Phi", "Phi-3")}}
#: some longer than every window, some empty
LENGTHS = (5, 1, 0, 33, 2, 17, 0)
LONGEST = max(LENGTHS)
LAYERS = 2
#: the model's own direction, and both
directions = pytest.mark.parametrize("both", (False, True), ids=("own", "bidirectional"))
ours = pytest.mark.parametrize("name", OURS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The family's model with eager attention, far from uniform, and norms that are not those of a fresh model."""
    torch.manual_seed(0)
    config = getattr(hf, ALL[name].config)(**{**ALL[name].options, **changes})
    model = getattr(hf, ALL[name].model)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
            parameter += 0.1 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    rotary = copy.deepcopy(model.rotary_emb)
    model = model.eval().to(dtype)
    model.rotary_emb = rotary  # whose frequencies a model loaded in half precision keeps in float32
    return model


def ids_of(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def packed(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, int]:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat(ids_of(lengths)), cu_seqlens, max(lengths)


def padded(model: Any, both: bool, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> Any:
    """transformers' output, and its mask as the place of each token: eager[mask] is packed."""
    ids, mask = pad(ids_of(lengths), "right", 0)
    seen = padding_only_mask(mask.bool(), model.dtype) if both else mask
    return model(input_ids=ids, attention_mask=seen, use_cache=False, **options), mask.bool()


def eager(model: Any, both: bool, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    out, mask = padded(model, both, lengths)
    return out.last_hidden_state[mask]


def some_rows() -> tuple[Tensor, Tensor]:
    """Two rows of the first text, none of the fifth."""
    return torch.tensor([0, 4, 5, 8, 20, 38, 41, 57]), torch.tensor([0, 2, 3, 3, 6, 6, 8, 8], dtype=torch.int32)


# ---- the padded peer ----


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("name", ALL)
def test_padding_only_mask_is_the_model_without_causality_and_windows(name: str, attention: str) -> None:
    """Against each text alone, in both directions, with a window beyond every text."""
    if (name, attention) == ("Gemma 2", "sdpa"):
        pytest.skip("transformers has no sdpa attention for it")
    model = tiny(name)
    model.set_attn_implementation(attention)
    family = ALL[name]
    free = tiny(name, **({family.window: 1000} if family.window else {}))
    with torch.no_grad():
        alone = [free(text[None], is_causal=False).last_hidden_state[0] for text in ids_of() if len(text)]
        assert_same(eager(model, True), torch.cat(alone))
        assert (eager(model, True) - eager(model, False)).abs().max() > 0.1, "the direction must matter here"


# ---- outputs ----


@ours
@directions
def test_hidden_states(name: str, both: bool) -> None:
    model = tiny(name)
    assert supports(model)
    with torch.no_grad():
        assert_same(DecoderBackbone(model, both)(*packed()), eager(model, both))


@pytest.mark.parametrize("name", ALL)
@directions
def test_plugged_models(name: str, both: bool) -> None:
    model = tiny(name)
    with torch.no_grad():
        expected = eager(model, both)
        assert_same(PluggedBackbone(model, both)(*packed()), expected)


@ours
@directions
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_every_layer(name: str, both: bool, layer: int) -> None:
    model = tiny(name)
    with torch.no_grad():
        backbone = DecoderBackbone(model, both)
        got = backbone(*packed(), layer=layer)
        trimmed = backbone(*packed(), layer=layer, last_rows=some_rows())
        out, mask = padded(model, both, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    assert_same(got, out.hidden_states[layer][mask])
    assert_same(trimmed, got[some_rows()[0]])


def test_early_exit_runs_no_further_layer() -> None:
    model = tiny("Llama")
    with torch.no_grad():
        first = DecoderBackbone(model)(*packed(), layer=1)
        model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
        model.norm.weight.fill_(torch.nan)
        assert torch.equal(DecoderBackbone(model)(*packed(), layer=1), first)


@ours
@directions
def test_last_rows(name: str, both: bool) -> None:
    backbone = DecoderBackbone(tiny(name), both)
    rows, offsets = some_rows()
    with torch.no_grad():
        whole = backbone(*packed())
        assert_same(backbone(*packed(), last_rows=(rows, offsets)), whole[rows])
        none = backbone(*packed(), last_rows=(rows[:0], torch.zeros_like(offsets)))
    assert none.shape == (0, 64)


@directions
def test_no_tokens(both: bool) -> None:
    with torch.no_grad():
        none = DecoderBackbone(tiny("Llama"), both)(torch.zeros(0, dtype=torch.long), torch.zeros(3).int(), 0)
    assert none.shape == (0, 64)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("Llama", "Qwen3", "Gemma 2"))
@directions
def test_half_precision_errs_no_more_than_transformers(name: str, both: bool, dtype: torch.dtype) -> None:
    model, lengths = tiny(name, dtype), (33,) * 20
    with torch.no_grad():
        got = DecoderBackbone(model, both)(*packed(lengths))
        theirs = eager(model, both, lengths)
        exact = eager(copy.deepcopy(model).double(), both, lengths)
    assert got.dtype == dtype
    errors, their_errors = ((each.double() - exact).abs() for each in (got, theirs))
    assert errors.mean() <= 1.1 * their_errors.mean()
    assert errors.max() <= 2 * their_errors.max()


@ours
@directions
def test_gradients(name: str, both: bool) -> None:
    model = tiny(name)
    peer = copy.deepcopy(model)
    backbone = DecoderBackbone(model, both)
    with torch.inference_mode():
        backbone(*packed())  # what is kept from it must not be used below
    weights = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(2))
    for hidden in (backbone(*packed()), eager(peer, both)):
        (hidden * weights).sum().backward()
    pairs = {key: (one.grad, other.grad) for (key, one), other in zip(
        model.named_parameters(), peer.parameters(), strict=True
    )}  # fmt: skip
    largest = max(float(theirs.abs().max()) for _, theirs in pairs.values())
    for key, (got, theirs) in pairs.items():
        # that of a key's bias is 0 but for rounding
        assert (got - theirs).abs().max() <= 2e-5 * max(float(theirs.abs().max()), 1e-3 * largest), key


@directions
def test_trimmed_gradients(both: bool) -> None:
    rows, offsets = some_rows()
    grads = []
    for trim in (False, True):
        model = tiny("Mistral")
        backbone = DecoderBackbone(model, both)
        hidden = backbone(*packed(), last_rows=(rows, offsets)) if trim else backbone(*packed())[rows]
        hidden.square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for got, expected in zip(*grads, strict=True):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ("Llama", "Mistral"))
@pytest.mark.parametrize("trim", (False, True))
@directions
def test_positions_move_the_rotation_alone(name: str, both: bool, trim: bool) -> None:
    """Falling positions: what comes before what stays the order of the rows, as under transformers' masks."""
    model, text = tiny(name), ids_of((30,))[0]
    positions = torch.arange(30).flip(0) * 3
    rows = torch.tensor([2, 29])
    mask = torch.ones(1, 30, dtype=torch.long)
    seen = padding_only_mask(mask.bool(), model.dtype) if both else mask
    with torch.no_grad():
        expected = model(text[None], attention_mask=seen, position_ids=positions[None]).last_hidden_state[0]
        last_rows = (rows, torch.tensor([0, 2], dtype=torch.int32)) if trim else None
        cu_seqlens = torch.tensor([0, 30], dtype=torch.int32)
        got = DecoderBackbone(model, both)(text, cu_seqlens, 30, position_ids=positions, last_rows=last_rows)
    assert_same(got, expected[rows] if trim else expected)


@pytest.mark.parametrize("name", ("Llama", "Mistral", "Qwen2"))
def test_a_config_that_is_not_causal_is_the_models_own_direction(name: str) -> None:
    model = tiny(name)
    model.config.is_causal = False
    with torch.no_grad():
        assert_same(DecoderBackbone(model)(*packed()), eager(model, False))


@pytest.mark.parametrize(
    "rope",
    (
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    ids=lambda rope: rope["rope_type"],
)
def test_kinds_of_rotation(rope: dict[str, Any]) -> None:
    model = tiny("Llama", rope_parameters={"rope_theta": 10000.0, **rope})
    assert supports(model)
    with torch.no_grad():
        assert_same(DecoderBackbone(model)(*packed()), eager(model, False))


@directions
def test_shape_of_smollm2(both: bool) -> None:
    """Nine heads of queries, three of keys, 64 wide; texts longer than the first tables of the rotation."""
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    model = tiny("Llama", **shape, max_position_embeddings=2048)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.1)  # as wide as this, the weights of `tiny` would make attention pick single tokens
        backbone = DecoderBackbone(model, both)
        for lengths in ((9, 40), (700, 3)):
            assert_same(backbone(*packed(lengths)), eager(model, both, lengths))


# ---- the weights ----


def linears(backbone: DecoderBackbone) -> list[Any]:
    return [getattr(block, name) for block in backbone._blocks for name in ("qkv", "mixed", "gate", "up", "down")]


def test_changed_weights_are_honoured() -> None:
    model = tiny("Qwen2")
    backbone = DecoderBackbone(model)
    with torch.no_grad():
        before = backbone(*packed())
        assert None not in [linear._packed for linear in linears(backbone)]
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert (backbone(*packed()) - before).abs().max() > 0.1
        assert_same(backbone(*packed()), eager(model, False))
    backbone.forget()
    assert not any(linear._packed for linear in linears(backbone))


def test_large_models_keep_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "MOST_PREPACKED_BYTES", 1000)
    for name in ("Qwen2", "Gemma"):
        model = tiny(name)
        backbone = DecoderBackbone(model)
        with torch.no_grad():
            assert_same(backbone(*packed()), eager(model, False))
            assert_same(backbone(*packed(), last_rows=some_rows()), eager(model, False)[some_rows()[0]])
        assert not any(linear._packed for linear in linears(backbone))


def test_copies_pack_their_own() -> None:
    model = tiny("Llama")
    backbone = DecoderBackbone(model)
    with torch.no_grad():
        before = backbone(*packed())
        twin = copy.deepcopy(backbone)
        for parameter in twin.model.parameters():
            parameter.mul_(1.1)
        assert torch.equal(backbone(*packed()), before)
        assert_same(twin(*packed()), eager(twin.model, False))


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    model = tiny("Llama")
    with torch.no_grad():
        exact = eager(model, False)
        with torch.autocast("cpu", torch.bfloat16):
            got, theirs = DecoderBackbone(model)(*packed()), eager(model, False)
    assert got.dtype == theirs.dtype == torch.float32
    assert (got - exact).abs().max() <= 2 * (theirs - exact).abs().max()


# ---- directions ----


class AmidForwardError(Exception):
    """Raised amid a forward."""


def interrupt(*args: Any) -> None:
    raise AmidForwardError


@pytest.mark.parametrize("name", ("Mistral", "Qwen2", "Phi-3"))
@pytest.mark.parametrize("kind", (DecoderBackbone, PluggedBackbone))
def test_the_models_direction_stays(name: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is DecoderBackbone and name not in OURS:
        pytest.skip("runs plugged")
    model = tiny(name)
    config = model.config.to_dict()
    with torch.no_grad():
        expected = eager(model, False)
        backbone = kind(model, True)
        both = backbone(*packed())
        for _ in range(2):
            assert_same(kind(model)(*packed()), expected)
            assert_same(eager(model, False), expected)  # plugged or not
            assert torch.equal(backbone(*packed()), both)
            with monkeypatch.context() as patch:
                patch.setattr(type(model.layers[1].mlp), "forward", interrupt)
                patch.setattr(decoder._Block, "_attend", interrupt)
                with pytest.raises(AmidForwardError):
                    backbone(*packed())
    changed = {key for key, value in model.config.to_dict().items() if config.get(key) != value}
    assert changed <= {"_attn_implementation"}


# ---- which road ----


def adapted() -> Any:
    model = tiny("Llama")
    model.layers[1].mlp.down_proj = Adapted(96, 64)
    return model


def hooked() -> Any:
    model = tiny("Llama")
    model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None)
    return model


def wrapped() -> Any:
    """As libraries do that move weights to the device when a module runs."""
    model = tiny("Llama")
    forward = model.layers[0].forward
    model.layers[0].forward = lambda *args, **options: forward(*args, **options)
    return model


def mixed_dtypes() -> Any:
    model = tiny("Llama")
    model.norm.to(torch.bfloat16)
    return model


def longrope() -> Any:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
    return tiny("Llama", rope_parameters={"rope_theta": 10000.0, "rope_type": "longrope", "factor": 4.0, **factors})


@pytest.mark.parametrize(
    "make",
    [
        adapted,
        hooked,
        wrapped,
        mixed_dtypes,
        longrope,
        lambda: tiny("Llama", rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}),
        lambda: tiny("Llama", hidden_act="gelu"),
        lambda: tiny("Llama", num_attention_heads=8),  # heads of 8
        lambda: tiny("Llama", dtype=torch.float64),
        lambda: tiny("Gemma 2", use_bidirectional_attention=True),
        lambda: tiny("Phi"),
        lambda: tiny("Phi-3"),
        lambda: hf.LlamaForCausalLM(tiny("Llama").config).eval(),
    ],
    ids=[
        "adapted", "hooked", "wrapped", "mixed dtypes", "longrope", "dynamic", "gelu", "narrow heads", "float64",
        "bidirectional config", "Phi", "Phi-3", "with a head",
    ],
)  # fmt: skip
def test_what_is_not_supported(make: Any) -> None:
    assert not supports(make())


@directions
def test_roads(both: bool) -> None:
    assert isinstance(packed_backbone(tiny("Gemma 2"), both), DecoderBackbone)
    bert = hf.BertModel(hf.BertConfig(**FAMILIES["BERT"].options)).eval()
    assert isinstance(packed_backbone(bert, both), BertBackbone)
    for make in (hooked, lambda: tiny("Phi-3")):
        backbone = packed_backbone(make(), both)
        assert isinstance(backbone, PluggedBackbone)
        with torch.no_grad():
            assert_same(backbone(*packed()), eager(make(), both))


def test_bad_calls_are_refused() -> None:
    model = tiny("Llama")
    backbone = DecoderBackbone(model)
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 3"):
        backbone(*packed(), layer=3)
    with pytest.raises(ValueError, match="token_type_ids must be None"):
        backbone(*packed(), token_type_ids=packed()[0])
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        backbone(*packed())
    model.eval()
    model.layers[0].self_attn.q_proj = Adapted(64, 64)
    with pytest.raises(ValueError, match="must have the layers that it was made with"):
        backbone(*packed())
