"""Vectors read after a layer, on every road, against the hidden states that transformers gives."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedding_kernels import Embedder
from embedding_kernels.models.backbones import BertBackbone, PluggedBackbone, packed_backbone
from embedding_kernels.models.backbones.block_hooks import block_stack, hidden_after
from embedding_kernels.models.directory import DirectorySpec
from integrations.families import FAMILIES, make

from .conftest import make_tokenizer, texts_of
from .test_backbones import packed, tiny

TEXTS = texts_of(13)
LAYERS = 3
#: family -> a word of its road
ROADS = {
    "BERT": "packed BERT blocks",
    "RoBERTa": "packed BERT blocks",
    "Llama": "packed decoder blocks",
    "Gemma 2": "packed decoder blocks",
    "Phi": "with our attention",
    "GPT-2": "with our attention",
    "ModernBERT": "with our attention",
    "T5": "packed T5 blocks",
    "DistilBERT": "with our attention",
}
#: padded on transformers' own blocks
PADDED = ("BERT", "Llama", "Phi", "Gemma 2", "T5", "GPT-2", "ModernBERT")
CASES = [(family, True) for family in ROADS] + [(family, False) for family in PADDED]
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model_of(family: str) -> Any:
    options = FAMILIES[family].options
    names = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"} & {*options}
    longest = {"max_position_embeddings": 128} if "max_position_embeddings" in options else {}
    return make(family, **dict.fromkeys(names, LAYERS), **longest)


def embedder(family: str, is_packed: bool = True, pooling: str = "mean") -> Embedder:
    spec = DirectorySpec(Path(), (pooling,), max_seq_length=64)
    return Embedder(model_of(family), make_tokenizer(), spec, packed=is_packed)


def states_of(family: str, text: str) -> list[torch.Tensor]:
    """transformers' hidden states of one text, [tokens, H] each."""
    ids = torch.tensor([make_tokenizer()(text, truncation=True, max_length=64)["input_ids"]])
    with torch.no_grad():
        states = model_of(family)(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    return [state[0] for state in states]


@pytest.mark.parametrize(("family", "is_packed"), CASES)
def test_hidden_states(family: str, is_packed: bool) -> None:
    ours = embedder(family, is_packed)
    assert (ROADS[family] if is_packed else "padded, eager attention") in ours.road
    expected = [states_of(family, text) for text in TEXTS]
    scale = max(float(state.abs().max()) for states in expected for state in states)
    for layer in range(LAYERS + 1):
        tokens = ours.encode(TEXTS, output_value="token_embeddings", layer=layer)
        for got, states in zip(tokens, expected, strict=True):
            assert got.shape == states[layer].shape
            assert (got - states[layer]).abs().max() <= TOLERANCE * scale
        means = torch.stack([states[layer].mean(0) for states in expected])
        assert (torch.tensor(ours.encode(TEXTS, layer=layer)) - means).abs().max() <= TOLERANCE * scale
    assert np.array_equal(ours.encode(TEXTS, layer=LAYERS), ours.encode(TEXTS))
    assert not np.allclose(ours.encode(TEXTS, layer=1), ours.encode(TEXTS), atol=0.01)


@pytest.mark.parametrize(("family", "is_packed"), [("BERT", True), ("Llama", True), ("Phi", True), ("Phi", False)])
@pytest.mark.parametrize("pooling", ("lasttoken", "cls"))
def test_layers_and_trimming(family: str, is_packed: bool, pooling: str) -> None:
    ours = embedder(family, is_packed, pooling)
    place = -1 if pooling == "lasttoken" else 0
    for layer in range(LAYERS + 1):
        expected = torch.stack([states_of(family, text)[layer][place] for text in TEXTS])
        assert (
            torch.tensor(ours.encode(TEXTS, layer=layer)) - expected
        ).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("family", ("BERT", "Llama", "Phi"))
def test_layer_and_dimension(family: str) -> None:
    """2D Matryoshka's inference: cut, then normalised, then bits."""
    ours = embedder(family)
    cut = ours.encode(TEXTS, layer=2)[:, :24]
    got = ours.encode_document(TEXTS, layer=2, truncate_dim=24, normalize_embeddings=True)
    np.testing.assert_allclose(got, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    bits = ours.encode_query(TEXTS, layer=2, truncate_dim=24, precision="ubinary")
    np.testing.assert_array_equal(bits, np.packbits(cut > 0, axis=1))


@pytest.mark.parametrize(("family", "is_packed"), [("Phi", True), ("Phi", False), ("Llama", False), ("T5", False)])
def test_later_blocks_do_not_run(family: str, is_packed: bool) -> None:
    ours = embedder(family, is_packed)
    ran: list[int] = []
    blocks = block_stack(ours.model)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    others = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in ours.model.modules()]
    for layer in range(LAYERS + 1):
        ran.clear()
        ours.encode(TEXTS[0], layer=layer)
        assert ran == list(range(layer))
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in ours.model.modules()] == others


@pytest.mark.parametrize("family", ("BERT", "Llama", "T5"))
def test_later_blocks_of_our_own_do_not_run(family: str) -> None:
    ours = embedder(family)
    first = ours.encode(TEXTS, layer=1)
    with torch.no_grad():
        for parameter in block_stack(ours.model)[1:].parameters():
            parameter.fill_(torch.nan)
    np.testing.assert_array_equal(ours.encode(TEXTS, layer=1), first)
    assert not np.isfinite(ours.encode(TEXTS, layer=2)).any()


def test_hooks_are_removed_after_an_error() -> None:
    model = model_of("Phi")
    backbone = PluggedBackbone(model)

    def interrupt(*args: Any) -> None:
        raise ZeroDivisionError

    handle = block_stack(model)[0].register_forward_hook(interrupt)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        backbone(torch.arange(3), torch.tensor([0, 3], dtype=torch.int32), 3, layer=2)
    handle.remove()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in block_stack(model))
    from embedding_kernels.integrations import transformers as plug

    assert id(getattr(model, plug._PLUG)) not in plug._forwards(), "the guard must not take the next forward for this"


@pytest.mark.parametrize("layer", (0, 2))
def test_other_threads_forwards_go_on(layer: int) -> None:
    model = model_of("Phi")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    found: list[torch.Tensor] = []

    def elsewhere() -> None:
        with torch.no_grad():
            found.append(model(ids).last_hidden_state)

    def forward() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        model(ids)

    with torch.no_grad():
        hidden_after(model, layer, forward)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize(("family", "is_packed"), [("BERT", True), ("Llama", True), ("Phi", True), ("T5", False)])
@pytest.mark.parametrize("layer", (-1, LAYERS + 1, True, 1.0, "1"))
def test_layers_out_of_range(family: str, is_packed: bool, layer: Any) -> None:
    with pytest.raises(ValueError, match=f"encode: layer must be from 0 to {LAYERS}, got {layer!r}"):
        embedder(family, is_packed).encode("sun", layer=layer)


def test_backbones_check_the_layer_too() -> None:
    ids, cu_seqlens = packed()
    for backbone in (BertBackbone(tiny()), PluggedBackbone(make("Phi")), packed_backbone(make("Llama"))):
        assert backbone is not None
        with pytest.raises(ValueError, match="layer must be from 0 to 2, got 3"):
            backbone(ids, cu_seqlens, 33, layer=3)


def test_models_without_one_stack_of_blocks_are_refused() -> None:
    """ALBERT runs one block several times."""
    ours = embedder("ALBERT")
    with pytest.raises(ValueError, match="encode: layer must be None for AlbertModel, whose blocks are not one list"):
        ours.encode("sun", layer=1)
    twice = model_of("Llama")
    twice.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(LAYERS))
    with pytest.raises(ValueError, match="not one list of 3 modules"):
        block_stack(twice)


def test_the_outermost_list_is_the_stack() -> None:
    """T5's block is itself a list, of two parts, in a model of two blocks."""
    model = make("T5")
    assert block_stack(model) is model.encoder.block
