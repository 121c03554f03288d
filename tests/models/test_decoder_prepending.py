"""What the packed decoder adds to transformers' forward: row copies, a shared prefix, embeddings as input, its norm."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from embedding_kernels.models.backbones import DecoderBackbone, Prepend, decoder
from embedding_kernels.ops.backend import use_backend
from integrations.families import VOCABULARY

from .test_backbones import assert_same
from .test_decoder_backbones import LENGTHS, OURS, eager, packed, some_rows, tiny
from .token_prepending_published import hidden_states

LAYERS = 4
#: beyond the windows of the tiny models
PREFIX = 9
#: of tokens that stand behind a prefix
TAILS = (3, 17, 1, 0, 8)
ours = pytest.mark.parametrize("name", OURS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def deep(name: str, **changes: Any) -> Any:
    """Four layers; of those with windows some have one."""
    model = tiny(name, num_hidden_layers=LAYERS, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.5)
    return model


def prepend_of(lengths: tuple[int, ...], start: int, stop: int) -> Prepend:
    """The last token of each text is copied over its second, where it has three."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    long = [place for place, length in enumerate(lengths) if length >= 3]
    return Prepend(starts[1:][long] - 1, starts[:-1][long] + 1, start, stop)


# ---- copies ----


@ours
@pytest.mark.parametrize(("start", "stop"), [(1, 3), (0, 1), (2, 9)])
def test_rows_before_the_target_are_the_plain_models_bit_for_bit(name: str, start: int, stop: int) -> None:
    backbone = DecoderBackbone(deep(name))
    prepend = prepend_of(LENGTHS, start, stop)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    changed = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    for target, end in zip(prepend.target_rows, prepend.source_rows, strict=True):
        changed[target : end + 1] = True
    assert not changed[starts[:-1][[0, 3, 5]]].any()
    with torch.no_grad():
        for layer in range(LAYERS + 1):
            plain, got = backbone(*packed(), layer=layer), backbone(*packed(), layer=layer, prepend=prepend)
            assert torch.equal(got[~changed], plain[~changed])
            # a block's input is changed, not its output
            assert torch.equal(got, plain) == (layer <= start)


@ours
@pytest.mark.parametrize("empty", [(2, 2), (3, 1), (LAYERS, 9)])
def test_an_empty_range_changes_no_bit(name: str, empty: tuple[int, int]) -> None:
    backbone = DecoderBackbone(deep(name))
    with torch.no_grad():
        for options in ({}, {"layer": 3}, {"last_rows": some_rows()}):
            got = backbone(*packed(), prepend=prepend_of(LENGTHS, *empty), **options)
            assert torch.equal(got, backbone(*packed(), **options))


def test_copies_are_made_inside_the_first_norm_of_the_blocks_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    kernel = decoder.token_prepend_rms_norm

    def counted(x: Tensor, residual: Tensor | None, *rest: Any, **options: Any) -> Any:
        normed, summed = kernel(x, residual, *rest, **options)
        calls.append(summed)
        return normed, summed

    monkeypatch.setattr(decoder, "token_prepend_rms_norm", counted)
    backbone, prepend = DecoderBackbone(deep("Llama")), prepend_of(LENGTHS, 1, 3)
    with torch.no_grad():
        backbone(*packed(), prepend=prepend)
        inputs = [backbone(*packed(), prepend=prepend, layer=layer) for layer in (1, 2)]
        assert len(calls) == 2 + 0 + 1
        for summed, before in zip(calls[:2], inputs, strict=True):
            expected = before.clone()
            expected[prepend.target_rows] = before[prepend.source_rows]
            assert torch.equal(summed, expected)


@ours
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_published_hidden_states(name: str, layer: int) -> None:
    """Of texts of three tokens and more, their second one a random vector."""
    model, lengths = deep(name), (5, 33, 3, 17)
    ids, cu_seqlens, longest = packed(lengths)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    prepend = prepend_of(lengths, 1, 3)
    with torch.no_grad():
        embeds = model.embed_tokens(ids)
        embeds[prepend.target_rows] = vector
        backbone = DecoderBackbone(model)
        got = backbone(None, cu_seqlens, longest, inputs_embeds=embeds, prepend=prepend, layer=layer, final_norm=False)
        texts = [text.tolist() for text in ids.split(list(lengths))]
        expected = hidden_states(model, texts, [1] * 4, vector, 1, 3)[layer]
    assert_same(got, torch.cat([row[-length:] for row, length in zip(expected, lengths, strict=True)]))


@ours
def test_gradients_through_copies(name: str) -> None:
    model, lengths = deep(name), (5, 33, 3, 17)
    peer = copy.deepcopy(model)
    ids, cu_seqlens, longest = packed(lengths)
    vectors = [torch.zeros(64, requires_grad=True) for _ in range(2)]
    prepend = prepend_of(lengths, 1, 3)
    embeds = model.embed_tokens(ids).index_copy(0, prepend.target_rows, vectors[0].expand(4, -1))
    last = prepend.source_rows, torch.arange(5, dtype=torch.int32)
    got = DecoderBackbone(model)(
        None, cu_seqlens, longest, inputs_embeds=embeds, prepend=prepend, last_rows=last, final_norm=False
    )
    texts = [text.tolist() for text in ids.split(list(lengths))]
    expected = hidden_states(peer, texts, [1] * 4, vectors[1], 1, 3)[-1][:, -1]
    assert_same(got, expected)
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(one.grad, other.grad) for one, other in zip(model.parameters(), peer.parameters(), strict=True)]
    assert pairs.pop(-1) == (None, None), "the last norm did not run"
    pairs.append((vectors[0].grad, vectors[1].grad))
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    for ours_, theirs in pairs:
        assert (ours_ - theirs).abs().max() <= 2e-5 * max(float(theirs.abs().max()), 1e-3 * largest)


# ---- prefix ----


def with_prefix(tails: tuple[int, ...] = TAILS) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...], Tensor]:
    """A prefix, texts behind it, the same with the prefix in each, and the rows of the former in the latter."""
    prefix = torch.randint(3, VOCABULARY, (PREFIX,), generator=torch.Generator().manual_seed(4))
    ids, cu_seqlens, longest = packed(tails)
    whole = torch.cat([torch.cat((prefix, tail)) for tail in ids.split(list(tails))])
    all_cu = cu_seqlens + PREFIX * torch.arange(len(tails) + 1, dtype=torch.int32)
    rows = torch.cat([torch.arange(s + PREFIX, e) for s, e in pairwise(all_cu.tolist())])
    return prefix, (ids, cu_seqlens, longest), (whole, all_cu, longest + PREFIX), rows


@ours
def test_a_prefix_is_as_if_given_with_each_text(name: str) -> None:
    backbone = DecoderBackbone(deep(name))
    ids, tails, whole, rows = with_prefix()
    some = torch.tensor([1, 2, 12, 19, 28]), torch.tensor([0, 2, 4, 4, 4, 5], dtype=torch.int32)
    with torch.no_grad():
        prefix = backbone.prefix(ids)
        assert [key.shape for key in prefix.keys] == [(PREFIX, 2, 16)] * LAYERS
        for layer in range(LAYERS + 1):
            expected = backbone(*whole, layer=layer)[rows]
            assert_same(backbone(*tails, layer=layer, prefix=prefix), expected)
            early = backbone.prefix(ids, layer)
            assert len(early.keys) == layer
            assert_same(backbone(*tails, layer=layer, prefix=early, last_rows=some), expected[some[0]])
        for one, other in zip(backbone.prefix(ids, 2).keys, prefix.keys[:2], strict=True):
            assert torch.equal(one, other)
        nothing = backbone.prefix(ids[:0])
        assert_same(backbone(*tails, prefix=nothing), backbone(*tails))
        none = torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.int32), 0
        assert backbone(*none, prefix=prefix).shape == (0, 64)


@ours
def test_gradients_through_a_prefix(name: str) -> None:
    ids, tails, whole, rows = with_prefix((3, 17, 1, 8))
    grads = []
    for reuse in (True, False):
        model = deep(name)
        backbone = DecoderBackbone(model)
        hidden = backbone(*tails, prefix=backbone.prefix(ids)) if reuse else backbone(*whole)[rows]
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        (hidden * weights).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    largest = max(float(theirs.abs().max()) for theirs in grads[1])
    for got, theirs in zip(*grads, strict=True):
        assert (got - theirs).abs().max() <= 3e-5 * max(float(theirs.abs().max()), 1e-3 * largest)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("Llama", "Gemma 2"))
def test_half_precision_with_prefix_and_copies(name: str, dtype: torch.dtype) -> None:
    """No further from float32 than half precision without either, but for the two parts' own rounding."""
    exact_model = deep(name)
    model = copy.deepcopy(exact_model).to(dtype)
    ids, tails, whole, rows = with_prefix((17,) * 12)
    with torch.no_grad():
        exact = DecoderBackbone(exact_model.load_state_dict(model.state_dict()) and exact_model)(*whole)[rows]
        backbone = DecoderBackbone(model)
        plain, got = backbone(*whole)[rows], backbone(*tails, prefix=backbone.prefix(ids))
    assert got.dtype == dtype
    errors, others = ((each.float() - exact).abs() for each in (got, plain))
    assert errors.mean() <= 1.15 * others.mean()
    assert errors.max() <= 2 * others.max()


def test_prefix_and_copies_on_the_reference_backend() -> None:
    backbone = DecoderBackbone(deep("Mistral"))
    ids, tails, *_ = with_prefix()
    options = {"prepend": prepend_of(TAILS, 1, 3)}
    with torch.no_grad():
        got = backbone(*tails, prefix=backbone.prefix(ids), **options)
        with use_backend("reference"):
            expected = backbone(*tails, prefix=backbone.prefix(ids), **options)
    assert_same(got, expected)


def test_autocast_with_prefix_and_copies() -> None:
    backbone = DecoderBackbone(deep("Llama"))
    ids, tails, whole, rows = with_prefix()
    prepend = prepend_of(TAILS, 1, 3)
    with torch.no_grad():
        exact = backbone(*tails, prefix=backbone.prefix(ids), prepend=prepend)
        plain = backbone(*whole)[rows]
        with torch.autocast("cpu", torch.bfloat16):
            got = backbone(*tails, prefix=backbone.prefix(ids), prepend=prepend)
            theirs = backbone(*whole)[rows]
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= 2 * (theirs - plain).abs().max()


# ---- the rest of a call ----


@ours
def test_embeddings_in_place_of_tokens(name: str) -> None:
    model = tiny(name)
    ids, *rest = packed()
    with torch.no_grad():
        backbone = DecoderBackbone(model)
        assert torch.equal(backbone(None, *rest, inputs_embeds=model.embed_tokens(ids)), backbone(ids, *rest))


@ours
def test_final_norm(name: str) -> None:
    model = tiny(name)
    backbone = DecoderBackbone(model)
    with torch.no_grad():
        assert_same(backbone(*packed(), final_norm=True), eager(model, False))
        for layer in range(3):
            for last_rows in (None, some_rows()):
                bare = backbone(*packed(), layer=layer, final_norm=False, last_rows=last_rows)
                normed = backbone(*packed(), layer=layer, final_norm=True, last_rows=last_rows)
                assert_same(normed, model.norm(bare))
                chosen = backbone(*packed(), layer=layer, last_rows=last_rows)
                assert torch.equal(chosen, normed if layer == 2 else bare)


def test_bad_calls_are_refused() -> None:
    backbone = DecoderBackbone(tiny("Llama"))
    ids, cu_seqlens, longest = packed()
    prefix = backbone.prefix(ids[:3], 1)
    for given, word in (({"inputs_embeds": torch.zeros(len(ids), 64)}, "both"), ({}, "neither")):
        with pytest.raises(ValueError, match=f"one of input_ids and inputs_embeds must be given, got {word}"):
            backbone(ids if given else None, cu_seqlens, longest, **given)
    with pytest.raises(ValueError, match="prefix must hold 2 layers, got 1"):
        backbone(*packed(), prefix=prefix)
    with pytest.raises(ValueError, match="position_ids must be None with a prefix"):
        backbone(*packed(), prefix=prefix, layer=1, position_ids=torch.zeros(len(ids)).int())
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 3"):
        backbone.prefix(ids, 3)
    both = DecoderBackbone(tiny("Llama"), bidirectional=True)
    not_causal = tiny("Llama")
    not_causal.config.is_causal = False
    for other in (both, DecoderBackbone(not_causal)):
        for call in (lambda other=other: other.prefix(ids), lambda other=other: other(*packed(), prefix=prefix)):
            with pytest.raises(ValueError, match="prefix must be None where tokens see those after them"):
                call()
    beyond = Prepend(torch.tensor([0]), torch.tensor([len(ids)]), 0, 1)
    with pytest.raises(ValueError, match="target_rows must be rows of x"):
        backbone(*packed(), prepend=beyond)
