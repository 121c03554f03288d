"""`TokenPrependingEmbedder` against the published computation, and what it saves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

from embedding_kernels import TokenPrependingEmbedder
from embedding_kernels.models.backbones import DecoderBackbone
from embedding_kernels.models.directory import DirectorySpec
from embedding_kernels.models.sentence_prompts import PROMPTS, PromptTemplate, PromptTokens, published_form

from .conftest import texts_of
from .test_decoder_backbones import tiny
from .token_prepending_published import hidden_states

TEXTS = [*texts_of(9, longest=12), "Why?", 'He said "no"', "two\nlines\r\n", "a 😀 and 漢字", "", "it's 'so'", " "]
LAYERS = 4
OURS = ("Llama", "Mistral", "Qwen2", "Gemma 2")
HOOKED = ("Phi", "Phi-3")
TOLERANCE = 2e-5
START, STOP = 1, 3
WINDOW = 30


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def byte_tokenizer(start: bool = True, end: bool = False) -> Any:
    """A token for each byte, and one for `."`, which merges across the end of a sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: place for place, piece in enumerate(["<pad>", "<s>", "</s>", *letters, '."'])}
    backend = Tokenizer(models.BPE(vocabulary, [(".", '"')]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    single = ["<s>"] * start + ["$A"] + ["</s>"] * end
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def model_of(family: str) -> Any:
    """Sliding windows hide the beginning of most prompts from the last token, but not all that was copied to it."""
    window = {} if family in ("Llama", "Phi") else {"sliding_window": WINDOW}
    model = tiny(family, num_hidden_layers=LAYERS, vocab_size=300, max_position_embeddings=1024, **window)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.5)
    return model


def embedder(
    family: str = "Llama", *, start: bool = True, end: bool = False, **options: Any
) -> TokenPrependingEmbedder:
    kept = {name: options.pop(name) for name in ("max_seq_length", "normalize", "truncate_dim") if name in options}
    spec = DirectorySpec(Path(), ("mean",), **{"max_seq_length": 512, **kept})
    options = {"exit_layer": 3, "start_layer": START, "stop_layer": STOP, **options}
    return TokenPrependingEmbedder(model_of(family), byte_tokenizer(start, end), spec, **options)


def hooked(family: str, **options: Any) -> TokenPrependingEmbedder:
    """On transformers' own blocks, a family that has blocks of ours too."""
    spec = DirectorySpec(Path(), ("mean",), max_seq_length=512)
    model = model_of(family)
    model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None)  # of which ours would know nothing
    options = {"exit_layer": 3, "start_layer": START, "stop_layer": STOP, **options}
    return TokenPrependingEmbedder(model, byte_tokenizer(), spec, **options)


def tokens_of(template: str, text: str, tokenizer: Any) -> tuple[list[int], int | None]:
    """A prompt's tokens where the placeholder is an added token, as published, and the placeholder's place."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<PST>"])
    ids = tokenizer(template.replace("{S}", published_form(text)))["input_ids"]
    ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    added = tokenizer.convert_tokens_to_ids("<PST>")
    place = ids.index(added) if added in ids else None
    return [0 if each == added else each for each in ids], place


def published(
    family: str,
    texts: list[str],
    prompt: str = PROMPTS["prompt_eol"][0],
    *,
    layer: int = 3,
    start: int = START,
    stop: int = STOP,
    seed: int = 0,
    tokenizer: Any = None,
) -> Tensor:
    """Embeddings without the final norm, ``[texts, H]``."""
    model = model_of(family)
    found = [tokens_of(prompt, text, tokenizer or byte_tokenizer()) for text in texts]
    vector = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    if "Gemma" in family:
        vector = vector * 64**0.5
    ids, places = ([each[part] for each in found] for part in (0, 1))
    with torch.no_grad():
        return hidden_states(model, ids, places, vector, start, stop)[layer][:, -1]


def assert_close(got: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


# ---- the published computation ----


@pytest.mark.parametrize("reuse", (True, False))
@pytest.mark.parametrize("family", OURS)
def test_published_embeddings(family: str, reuse: bool) -> None:
    for exit_layer in (1, 3, LAYERS):
        ours = embedder(family, exit_layer=exit_layer, reuse_prefix=reuse)
        assert isinstance(ours._backbone, DecoderBackbone)
        expected = published(family, TEXTS, layer=exit_layer)
        assert_close(ours.encode(TEXTS), expected)
        if exit_layer > START:
            assert (expected - published(family, TEXTS, layer=exit_layer, start=0, stop=0)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "make_embedder"), [(family, embedder) for family in HOOKED] + [("Llama", hooked), ("Gemma 2", hooked)]
)
def test_published_embeddings_by_hooks(family: str, make_embedder: Any) -> None:
    ours = make_embedder(family)
    assert "hooks" in ours.road
    assert_close(ours.encode(TEXTS), published(family, TEXTS))
    assert_close(make_embedder(family, copy=False).encode(TEXTS), published(family, TEXTS, start=0, stop=0))
    for layer in range(3):
        assert_close(ours.encode(TEXTS, layer=layer), published(family, TEXTS, layer=layer))
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in ours.model.layers)
    assert not ours.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("family", ("Llama", "Phi"))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts(family: str, prompt: str) -> None:
    texts = TEXTS[7:]
    vectors = [published(family, texts, template) for template in PROMPTS[prompt]]
    assert_close(embedder(family, prompt=prompt).encode(texts), torch.stack(vectors).mean(0))


@pytest.mark.parametrize("family", ("Llama", "Phi"))
def test_prompts_of_ones_own(family: str) -> None:
    own = ('<PST>{S}"', "In short, {S} <end>", 'Say "<PST>{S}": ')
    for prompt in own:
        assert_close(embedder(family, prompt=prompt).encode(TEXTS), published(family, TEXTS, prompt))
    average = torch.stack([published(family, TEXTS, prompt) for prompt in own]).mean(0)
    assert_close(embedder(family, prompt=own).encode(TEXTS), average)


@pytest.mark.parametrize("family", ("Qwen2", "Phi"))
def test_copying_changes_the_vectors_and_no_range_is_no_copying(family: str) -> None:
    copied, kept = (embedder(family, copy=copy).encode(TEXTS) for copy in (True, False))
    assert np.abs(copied - kept).max() > 0.01 * np.abs(kept).max()
    np.testing.assert_array_equal(embedder(family, start_layer=2, stop_layer=2).encode(TEXTS), kept)
    np.testing.assert_array_equal(embedder(family, start_layer=3, stop_layer=LAYERS).encode(TEXTS), kept)


@pytest.mark.parametrize(("start", "end"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("prompt", ("prompt_eol", "prompt_eol_plain"))
def test_special_tokens(start: bool, end: bool, prompt: str) -> None:
    """Those at the beginning are kept, none comes after the prompt's last token."""
    expected = published("Llama", TEXTS, PROMPTS[prompt][0], tokenizer=byte_tokenizer(start, end))
    assert_close(embedder(start=start, end=end, prompt=prompt).encode(TEXTS), expected)


@pytest.mark.parametrize("make_embedder", (embedder, hooked))
def test_order_and_batching_do_not_matter(make_embedder: Any) -> None:
    ours = make_embedder("Llama")
    expected = np.stack([ours.encode(text) for text in TEXTS])
    for batch_size in (None, 1, 5):
        for budget in (1, 100, 100_000):
            ours.token_budget = budget
            assert_close(ours.encode(TEXTS, batch_size=batch_size), expected)


def test_final_norm() -> None:
    for family in ("Gemma 2", "Llama"):
        model = model_of(family)
        normed = model.norm(published(family, TEXTS)).detach()
        assert_close(embedder(family, final_norm=True).encode(TEXTS), normed)
        # before the exit there is none
        assert_close(embedder(family, final_norm=True).encode(TEXTS, layer=2), published(family, TEXTS, layer=2))
    for family in HOOKED:
        last = published(family, TEXTS, layer=LAYERS)
        norm = getattr(model_of(family), "final_layernorm", None) or model_of(family).norm
        assert_close(embedder(family, exit_layer=LAYERS, final_norm=True).encode(TEXTS), norm(last).detach())
        assert_close(embedder(family, exit_layer=LAYERS).encode(TEXTS), last)


@pytest.mark.parametrize("family", ("Llama", "Phi"))
def test_seeds(family: str) -> None:
    first, again, other = (embedder(family, seed=seed).encode(TEXTS) for seed in (0, 0, 7))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-4)
    assert_close(other, published(family, TEXTS, seed=7))
    plain = [embedder(family, prompt="prompt_eol_plain", seed=seed).encode(TEXTS) for seed in (0, 7)]
    np.testing.assert_array_equal(*plain)


# ---- texts ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man sings", "A man sings."),
        ("A man sings.", "A man sings."),
        ("Who sings?", "Who sings."),
        ('He said "no"', "He said 'no'"),
        ("it is 'so'", "it is 'so'"),
        ('"Who?" she asked', "'Who?' she asked."),
        ("Stop!", "Stop!."),
        ("two lines\n", "two lines\n."),
        ("", ""),
        ("?", "."),
        ("end 😀", "end 😀."),
    ],
)
def test_published_form(text: str, expected: str) -> None:
    assert published_form(text) == expected


@pytest.mark.parametrize("family", ("Llama", "Phi"))
def test_text_that_spells_the_placeholder(family: str) -> None:
    """It is text like any other."""
    text = "a <PST> {S} b"
    got, other = embedder(family).encode([text, "a b"])
    assert np.isfinite(got).all()
    assert not np.allclose(got, other, atol=1e-3)


@pytest.mark.parametrize("prompt", ("prompt_eol", "prompt_eol_plain", "meta_eol"))
def test_long_texts_lose_their_end_and_the_prompt_nothing(prompt: str) -> None:
    limit = 260
    long = "sun " * 2000 + "moon."
    assert len(long) > 8000
    tokens = PromptTokens(byte_tokenizer(), PromptTemplate.parse(PROMPTS[prompt][0]))
    closing = byte_tokenizer()('." means in one word:"', add_special_tokens=False)["input_ids"]
    ids = next(tokens([long], limit, True).batches(10**6, None)).inputs["input_ids"].tolist()
    whole = next(tokens([long], None, True).batches(10**6, None)).inputs["input_ids"].tolist()
    assert len(ids) == limit
    assert ids[-len(closing) :] == whole[-len(closing) :] == closing
    assert ids[: limit - len(closing)] == whole[: limit - len(closing)]
    ours = embedder(prompt=prompt, max_seq_length=limit)
    # what is cut away does not count
    assert_close(ours.encode(["sun " * 100 + text for text in ("a.", "b.")])[:1], ours.encode(["sun " * 100 + "b."]))


def test_texts_of_8000_tokens() -> None:
    long = "sun and moon, " * 600
    assert len(long) > 8000
    for family in ("Llama", "Phi"):
        model = model_of(family)
        spec = DirectorySpec(Path(), ("mean",))
        free = TokenPrependingEmbedder(model, byte_tokenizer(), spec, exit_layer=2)
        vectors = free.encode(["short", long, "", "short"])
        assert np.isfinite(vectors).all()
        np.testing.assert_allclose(vectors[0], vectors[3], atol=1e-5)


def test_results_are_those_of_an_embedder() -> None:
    ours = embedder()
    floats = ours.encode(TEXTS)
    assert floats.dtype == np.float32 and floats.shape == (len(TEXTS), 64)
    assert_close(ours.encode(TEXTS[3]), floats[3])
    assert ours.encode([]).shape == (0, 64)
    cut = ours.encode(TEXTS, truncate_dim=24, normalize_embeddings=True)
    assert_close(cut, floats[:, :24] / np.linalg.norm(floats[:, :24], axis=1, keepdims=True))
    assert_close(embedder(normalize=True, truncate_dim=24).encode(TEXTS), cut)
    np.testing.assert_array_equal(ours.encode(TEXTS, precision="ubinary"), np.packbits(floats > 0, axis=1))
    assert ours.encode(TEXTS, precision="int8").dtype == np.int8
    tensors = ours.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensors, Tensor) and torch.equal(tensors, torch.tensor(floats))
    assert all(isinstance(row, Tensor) for row in ours.encode(TEXTS, convert_to_numpy=False))
    prompted = ours.encode([f"sun: {text}" for text in TEXTS])
    assert_close(ours.encode_query(TEXTS, prompt="sun: "), prompted)
    assert ours.get_embedding_dimension() == 64


def test_several_prompts_are_averaged_before_anything_else() -> None:
    ours = embedder(prompt="meta_eol")
    floats = ours.encode(TEXTS)
    cut = ours.encode(TEXTS, truncate_dim=24, normalize_embeddings=True)
    assert_close(cut, floats[:, :24] / np.linalg.norm(floats[:, :24], axis=1, keepdims=True))
    np.testing.assert_array_equal(ours.encode(TEXTS, precision="ubinary"), np.packbits(floats > 0, axis=1))


def test_windows_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = embedder(prompt="meta_eol")
    whole = ours.encode(TEXTS)
    monkeypatch.setattr("embedding_kernels.models.embedder._WINDOW", 5)
    assert_close(ours.encode(TEXTS), whole)


@pytest.mark.parametrize("family", ("Mistral", "Gemma 2"))
def test_read_out_before_the_exit(family: str) -> None:
    ours = embedder(family)
    for layer in range(4):
        assert_close(ours.encode(TEXTS, layer=layer), published(family, TEXTS, layer=layer))
    np.testing.assert_array_equal(ours.encode(TEXTS, layer=3), ours.encode(TEXTS))


# ---- what is computed once ----


def counted_prefixes(ours: TokenPrependingEmbedder, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    made: list[list[int]] = []
    backbone = ours._backbone
    assert isinstance(backbone, DecoderBackbone)
    prefix = backbone.prefix
    monkeypatch.setattr(backbone, "prefix", lambda ids, layer: (made.append(ids.tolist()), prefix(ids, layer))[1])
    return made


def test_the_prompts_beginning_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = embedder(prompt="meta_eol")
    made = counted_prefixes(ours, monkeypatch)
    ours.token_budget = 300
    for layer in (None, 2):
        ours.encode(TEXTS, layer=layer)
    heads = [text.split("<PST>")[0] for text in PROMPTS["meta_eol"]]
    assert made == [byte_tokenizer()(head)["input_ids"] for head in heads]


def test_it_is_computed_again_when_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = embedder()
    made = counted_prefixes(ours, monkeypatch)
    ours.encode(TEXTS)
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.mul_(1.1)
    fresh = TokenPrependingEmbedder(
        copy.deepcopy(ours.model), byte_tokenizer(), ours._spec, exit_layer=3, start_layer=START, stop_layer=STOP
    )
    assert_close(ours.encode(TEXTS), fresh.encode(TEXTS))
    assert len(made) == 2
    for parameter in ours.model.parameters():
        parameter.data.mul_(0.9)  # torch does not count this change
    ours.forget()
    ours.encode(TEXTS)
    assert len(made) == 3
    ours.encode(TEXTS)
    assert len(made) == 3
    ours.to("cpu").encode(TEXTS)
    assert len(made) == 4
    ours.model.to(torch.bfloat16)
    assert np.isfinite(ours.encode(TEXTS)).all()
    assert len(made) == 5


def test_autocast_has_a_prefix_of_its_own() -> None:
    ours = embedder()
    plain = ours.encode(TEXTS)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(ours.encode(TEXTS), plain, 0.1)
        np.testing.assert_array_equal(ours.encode(TEXTS), plain)


@pytest.mark.parametrize("prompt", ("prompt_eol", "knowledge_enhancement"))
def test_operations_are_those_that_the_shapes_say(prompt: str) -> None:
    width, inner, heads, kv_heads, head_dim, exit_layer = 576, 1536, 9, 3, 64, 4
    shape = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    model = tiny("Llama", num_hidden_layers=5, intermediate_size=inner, vocab_size=300, **shape)
    texts = ["sun " * 9 + "moon."] * 8  # of one length: attention is counted as over the mean length
    spec = DirectorySpec(Path(), ("mean",))
    ours = TokenPrependingEmbedder(model, byte_tokenizer(), spec, prompt=prompt, exit_layer=exit_layer)
    ours.encode(texts)
    with FlopCounterMode(display=False) as counter:
        ours.encode(texts)
    tail, prefix = len(' "' + texts[0] + '" means in one word:"'), len("<" + PROMPTS[prompt][0].split("<PST>")[0])
    length, rows = 1 + tail - 1, len(texts)  # the placeholder; `."` is one token
    tokens = rows * length

    def block(queries: int) -> int:
        """Of so many rows that go through queries, output projection and feed-forward; keys and values are of all."""
        projections = 2 * heads * head_dim * width * queries + 2 * kv_heads * head_dim * width * tokens
        attention = 2 * heads * head_dim * queries * (length + prefix)
        return 2 * (projections + attention + 3 * width * inner * queries)

    predicted = (exit_layer - 1) * block(tokens) + block(rows)
    assert abs(counter.get_total_flops() / predicted - 1) < 0.02
