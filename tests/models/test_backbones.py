"""Packed forwards against transformers' own, text by text."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from embedding_kernels import Embedder  # noqa: E402
from embedding_kernels.models.backbones import BertBackbone, PluggedBackbone, packed_backbone  # noqa: E402
from embedding_kernels.models.backbones.bert import supports  # noqa: E402

from .conftest import HIDDEN, make_tokenizer, texts_of  # noqa: E402

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
LENGTHS = (5, 1, 0, 33, 2, 17, 0)
VOCABULARY = 50
PAD = 1


def tiny(family: str = "bert", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model of two layers with random weights."""
    torch.manual_seed(0)
    name = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
            "type_vocab_size": 2,
            "initializer_range": 0.3,
            "pad_token_id": PAD,
            **options,
        }
    )
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():  # fresh norms and biases would hide a forgotten one
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval().to(dtype)


def packed(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, pads: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and offsets; with ``pads`` some tokens inside the texts are the padding token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0 if pads else 2, 4 if pads else VOCABULARY, (sum(lengths),), generator=generator)
    return ids, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def own_forward(model: Any, ids: Tensor, cu_seqlens: Tensor, **inputs: Tensor) -> Tensor:
    """Each text alone through transformers."""
    bounds = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
    parts = [
        model(ids[None, start:end], **{name: value[None, start:end] for name, value in inputs.items()})
        for start, end in bounds
        if end > start
    ]
    return torch.cat([part.last_hidden_state[0] for part in parts])


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def check(model: Any, backbone: BertBackbone | None = None) -> None:
    """The backbone, a fresh one by default, computes what the model does now."""
    ids, cu_seqlens = packed()
    with torch.inference_mode():
        got = (backbone or BertBackbone(model))(ids, cu_seqlens, max(LENGTHS))
        assert_same(got, own_forward(model, ids, cu_seqlens))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = tiny(family)
    assert supports(model)
    check(model)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(act: str) -> None:
    check(tiny(hidden_act=act))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_tokens_inside_a_text(family: str) -> None:
    model = tiny(family)
    ids, cu_seqlens = packed(pads=True)
    assert (ids == PAD).sum() > 5
    with torch.inference_mode():
        mask = torch.ones_like(ids)  # else transformers would not attend to them
        expected = own_forward(model, ids, cu_seqlens, attention_mask=mask)
        assert_same(BertBackbone(model)(ids, cu_seqlens, max(LENGTHS)), expected)


def test_types_and_positions() -> None:
    model = tiny()
    ids, cu_seqlens = packed()
    inputs = {"token_type_ids": ids % 2, "position_ids": ids % 40}
    with torch.inference_mode():
        got = BertBackbone(model)(ids, cu_seqlens, max(LENGTHS), **inputs)
        assert_same(got, own_forward(model, ids, cu_seqlens, **inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_transformers(dtype: torch.dtype) -> None:
    model = tiny(dtype=dtype)
    ids, cu_seqlens = packed((40,) * 20)
    with torch.inference_mode():
        got = BertBackbone(model)(ids, cu_seqlens, 40)
        theirs = own_forward(model, ids, cu_seqlens)
        exact = own_forward(model.double(), ids, cu_seqlens)
    assert got.dtype == dtype
    errors, their_errors = ((each.double() - exact).abs() for each in (got, theirs))
    assert errors.mean() <= 1.1 * their_errors.mean()
    assert errors.max() <= 2 * their_errors.max()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_last_rows(family: str) -> None:
    backbone = BertBackbone(tiny(family))
    ids, cu_seqlens = packed()
    rows = torch.tensor([0, 4, 5, 8, 38, 40])  # two of the first text, none of the fifth
    offsets = torch.tensor([0, 2, 3, 3, 5, 5, 6, 6], dtype=torch.int32)
    rows[4:] = torch.tensor([20, 45])
    with torch.inference_mode():
        whole = backbone(ids, cu_seqlens, max(LENGTHS))
        assert_same(backbone(ids, cu_seqlens, max(LENGTHS), last_rows=(rows, offsets)), whole[rows])


def test_no_tokens() -> None:
    with torch.inference_mode():
        none = BertBackbone(tiny())(torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.int32), 0)
    assert none.shape == (0, HIDDEN)


# ---- prepacked weights ----


def linears(backbone: BertBackbone) -> list[Any]:
    return [linear for layer in backbone._layers for linear in (layer.qkv, layer.mixed, layer.up, layer.down)]


def in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.1)


def one_bias(model: Any) -> None:
    with torch.no_grad():
        model.encoder.layer[1].attention.self.value.bias += 1


def state_dict(model: Any) -> None:
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def replaced(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.output.dense.weight = nn.Parameter(layer.output.dense.weight * 0.5)


def swapped_data(model: Any) -> None:
    for parameter in model.encoder.parameters():
        new = parameter.data * 1.1
        parameter.data = torch.empty(0)  # may free the old memory, which the next may get
        parameter.data = new.clone()


def there_and_back(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def optimizer_step(model: Any) -> None:
    model(torch.tensor([[2, 3, 4]])).last_hidden_state.square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()


@pytest.mark.parametrize(
    "change",
    [in_place, one_bias, state_dict, replaced, swapped_data, there_and_back, optimizer_step],
    ids=lambda f: f.__name__,
)
def test_changed_weights_are_honoured(change: Any) -> None:
    model = tiny()
    backbone = BertBackbone(model)
    ids, cu_seqlens = packed()
    with torch.inference_mode():
        before = backbone(ids, cu_seqlens, max(LENGTHS))
    change(model)
    with torch.inference_mode():
        assert not torch.allclose(backbone(ids, cu_seqlens, max(LENGTHS)), before, atol=1e-4)
    check(model, backbone)


def test_packed_once_and_on_request_again() -> None:
    model = tiny()
    backbone = BertBackbone(model)
    check(model, backbone)
    kept = [linear._packed for linear in linears(backbone)]
    assert None not in kept
    check(model, backbone)
    assert all(linear._packed is one for linear, one in zip(linears(backbone), kept, strict=True))
    for parameter in model.encoder.parameters():
        parameter.data.mul_(1.1)  # bypasses the version counters, as the docstring says
    backbone.forget()
    assert not any(linear._packed for linear in linears(backbone))
    check(model, backbone)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_gradients(family: str) -> None:
    ours, theirs = tiny(family), tiny(family)
    ids, cu_seqlens = packed()
    backbone = BertBackbone(ours)
    with torch.inference_mode():
        backbone(ids, cu_seqlens, max(LENGTHS))  # what is prepacked must not be used below
    weights = torch.linspace(-1, 1, HIDDEN)
    for hidden in (backbone(ids, cu_seqlens, max(LENGTHS)), own_forward(theirs, ids, cu_seqlens)):
        (hidden * weights).square().sum().backward()
    largest = max(float(each.grad.abs().max()) for each in theirs.parameters() if each.grad is not None)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            # that of a key's bias is 0 but for rounding
            assert (one.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max() + 1e-7 * largest, name


def test_autocast_runs_the_modules() -> None:
    model = tiny()
    backbone = BertBackbone(model)
    ids, cu_seqlens = packed()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        got, theirs = backbone(ids, cu_seqlens, max(LENGTHS)), own_forward(model, ids, cu_seqlens)
    with torch.inference_mode():
        exact = own_forward(model, ids, cu_seqlens)
    assert not any(linear._packed for linear in linears(backbone))
    assert (got - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_copies_pack_their_own() -> None:
    model = tiny()
    backbone = BertBackbone(model)
    check(model, backbone)
    twin = copy.deepcopy(backbone)
    state_dict(twin.model)
    check(model, backbone)
    check(twin.model, twin)


def test_operations_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tokens = 20
    ids, cu_seqlens = packed((tokens,))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        BertBackbone(tiny())(ids, cu_seqlens, tokens)
    linear = 2 * tokens * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * 48)
    assert counter.get_total_flops() == 2 * (linear + 4 * tokens * tokens * HIDDEN)


# ---- which road ----


def decoder(**options: Any) -> Any:
    return tiny(is_decoder=True, **options)


class Adapted(nn.Linear):
    """What an adapter library puts in a layer's place."""


def adapted() -> Any:
    model = tiny()
    model.encoder.layer[1].output.dense = Adapted(48, HIDDEN)
    return model


def hooked() -> Any:
    model = tiny()
    model.encoder.layer[0].register_forward_hook(lambda module, args, output: output)
    return model


@pytest.mark.parametrize(
    "make",
    [
        decoder,
        adapted,
        hooked,
        lambda: tiny(hidden_act="silu"),
        lambda: tiny(num_attention_heads=4),  # heads of 8
        lambda: tiny(dtype=torch.float64),
        lambda: transformers.DistilBertModel(transformers.DistilBertConfig(n_layers=1, dim=32, n_heads=2)),
    ],
    ids=["decoder", "adapted", "hooked", "silu", "narrow heads", "float64", "distilbert"],
)
def test_what_is_not_supported(make: Any) -> None:
    assert not supports(make())


def test_roads(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(packed_backbone(tiny()), BertBackbone)
    model = tiny(hidden_act="silu")
    plugged = packed_backbone(model)
    assert isinstance(plugged, PluggedBackbone)
    ids, cu_seqlens = packed()
    with torch.inference_mode():
        assert_same(plugged(ids, cu_seqlens, max(LENGTHS)), own_forward(tiny(hidden_act="silu"), ids, cu_seqlens))
        with pytest.raises(ValueError, match="last_rows must be None"):
            plugged(ids, cu_seqlens, max(LENGTHS), last_rows=(ids, cu_seqlens))
    with caplog.at_level(logging.INFO, logger="embedding_kernels"):
        narrow = tiny(num_attention_heads=4)
        attention = narrow.config._attn_implementation
        assert packed_backbone(narrow) is None
    assert "BertModel runs padded" in caplog.text
    assert narrow.config._attn_implementation == attention, "a refused model is as it was"


def test_model_that_bypasses_the_interface(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    tokenizer = make_tokenizer()
    config = transformers.MPNetConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=70, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    transformers.MPNetModel(config).eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = Embedder.from_pretrained(tmp_path), SentenceTransformer(str(tmp_path), device="cpu")
    assert "padded" in repr(ours)
    texts = texts_of(30)
    assert np.abs(ours.encode(texts) - theirs.encode(texts)).max() <= 1e-5
    for one, other in zip(
        ours.encode(texts, output_value="token_embeddings"),
        theirs.encode(texts, output_value="token_embeddings"),
        strict=True,
    ):
        assert (one.cpu() - other).abs().max() <= 1e-5


def test_training_mode_and_replaced_layers_are_refused() -> None:
    model = tiny()
    backbone = BertBackbone(model)
    ids, cu_seqlens = packed()
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        backbone(ids, cu_seqlens, max(LENGTHS))
    model.eval()
    model.encoder.layer[0].attention.self.query = Adapted(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match="must have the layers that it was made with"):
        backbone(ids, cu_seqlens, max(LENGTHS))


# ---- the real model ----


def test_minilm_tokens(minilm: Embedder) -> None:
    model = minilm.model
    ids, cu_seqlens = packed((200, 3, 64, 1, 17))
    ids = ids * 500 + 1000
    with torch.inference_mode():
        got = BertBackbone(model)(ids, cu_seqlens, 200)
        assert_same(got, own_forward(model, ids, cu_seqlens), 2e-6)


def test_a_text_alone_is_the_text_in_a_batch(minilm: Embedder) -> None:
    texts = [*texts_of(40, longest=60, seed=5), "", "In the beginning God created the heavens and the earth."]
    together = minilm.encode(texts)
    alone = np.stack([minilm.encode(text) for text in texts])
    assert np.abs(together - alone).max() <= 1e-6


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "mean"])
def test_minilm_trimmed(minilm_path: Path, mode: str) -> None:
    texts = texts_of(20, seed=6)
    ours = Embedder.from_pretrained(minilm_path, device="cpu", pooling=mode)
    padded = Embedder.from_pretrained(minilm_path, device="cpu", pooling=mode, attn_implementation="sdpa")
    assert "padded, sdpa attention" in repr(padded)
    assert np.abs(ours.encode(texts) - padded.encode(texts)).max() <= 1e-5
