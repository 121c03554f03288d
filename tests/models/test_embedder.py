"""`Embedder.encode` against `SentenceTransformer.encode`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from embedding_kernels import Embedder

from .conftest import HIDDEN, make_tokenizer, save_bert, texts_of

Build = Callable[..., tuple[Embedder, Any]]

TEXTS = texts_of(37)
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
TOLERANCE = 1e-5


def assert_close(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert np.abs(np.asarray(theirs)).max() > 0.01, "a peer of zeros would prove nothing"
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= TOLERANCE


def test_minilm_equals_sentence_transformers(minilm: Embedder, minilm_path: Path) -> None:
    texts = [
        "In the beginning God created the heavens and the earth.",
        "",
        "Jesus wept.",
        "long " * 400,
        "Ein Satz — 漢字, émigré!",
        "Seek your servant, for I don't forget your commandments. " * 3,
    ]
    peer = SentenceTransformer(str(minilm_path), device="cpu")
    assert_close(minilm.encode(texts), peer.encode(texts))
    assert_close(minilm.encode(texts[0]), peer.encode(texts[0]))
    # the bits may differ only where a coordinate is nothing but rounding
    sure = np.abs(peer.encode(texts)) > TOLERANCE
    bits = np.unpackbits(minilm.encode(texts, precision="ubinary"), axis=1)
    assert (bits == np.unpackbits(peer.encode(texts, precision="ubinary"), axis=1))[sure].all()


@pytest.mark.parametrize("mode", [*MODES, ("cls", "mean"), ("max", "weightedmean", "lasttoken")], ids=str)
def test_pooling_modes(build: Build, mode: Any) -> None:
    ours, theirs = build(mode)
    assert_close(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert ours.get_embedding_dimension() == theirs.get_embedding_dimension()


@pytest.mark.parametrize("mode", [*MODES, ("mean", "max")], ids=str)
def test_prompt_left_out_of_the_pool(build: Build, mode: Any) -> None:
    ours, theirs = build(mode, include_prompt=False, prompts={"query": "query: moon "})
    assert_close(ours.encode(TEXTS, prompt_name="query"), theirs.encode(TEXTS, prompt_name="query"))
    assert_close(ours.encode(TEXTS), theirs.encode(TEXTS))


@pytest.mark.parametrize("special", [True, False])
def test_prompt_that_fills_the_window(build: Build, tmp_path: Path, special: bool) -> None:
    # nothing but [SEP] is left to pool, or nothing at all
    ours, theirs = build("mean", include_prompt=False, base=save_bert(tmp_path, make_tokenizer(special)))
    ours._texts.max_seq_length = theirs.max_seq_length = 4
    got, expected = (model.encode(["sun"], prompt="moon moon moon moon moon ") for model in (ours, theirs))
    assert expected.any() == special
    assert np.abs(got - expected).max() <= TOLERANCE


def test_prompts(build: Build) -> None:
    prompts = {"query": "query: ", "passage": "document: ", "sun": "sunlight "}
    ours, theirs = build("mean", prompts=prompts, default_prompt_name="sun")
    plain = theirs.encode(TEXTS, prompt="")
    for options in ({}, {"prompt_name": "query"}, {"prompt": "moons "}, {"prompt": ""}):
        assert_close(ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options))
    assert not np.allclose(ours.encode(TEXTS), plain, atol=1e-3)
    for name in ("encode_query", "encode_document"):
        assert_close(getattr(ours, name)(TEXTS), getattr(theirs, name)(TEXTS))
        assert_close(getattr(ours, name)(TEXTS, prompt="sun "), getattr(theirs, name)(TEXTS, prompt="sun "))
    assert not np.allclose(ours.encode_query(TEXTS), ours.encode_document(TEXTS), atol=1e-3)


def test_heads(build: Build) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize

    dense = Dense(2 * HIDDEN, 24, activation_function=torch.nn.GELU(), use_residual=True)
    square = Dense(24, 24, bias=False, activation_function=None, use_residual=True)
    norm = LayerNorm(24)
    torch.nn.init.normal_(norm.norm.weight)
    ours, theirs = build(("mean", "cls"), Normalize(), dense, Dropout(0.5), norm, square, Dense(24, 20), Normalize())
    assert_close(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert ours.get_embedding_dimension() == 20
    sure = np.abs(theirs.encode(TEXTS)) > TOLERANCE
    bits = np.unpackbits(ours.encode(TEXTS, precision="ubinary"), axis=1, count=20)
    assert (bits == (theirs.encode(TEXTS) > 0))[sure].all()


def test_old_form_of_the_pooling_config(build: Build, tmp_path: Path) -> None:
    from .conftest import edit_json

    build("mean")
    old = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    old |= {"pooling_mode_max_tokens": True, "pooling_mode_mean_sqrt_len_tokens": False}
    edit_json(tmp_path / "model" / "1_Pooling" / "config.json", lambda _: old)
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert_close(Embedder.from_pretrained(tmp_path / "model").encode(TEXTS), theirs.encode(TEXTS))


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("dim", [1, 20, HIDDEN])
def test_truncation_comes_before_normalisation(build: Build, normalizes: bool, dim: int) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    ours, theirs = build("mean", *([Normalize()] if normalizes else []))
    raw = theirs.encode(TEXTS, truncate_dim=dim)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert_close(ours.encode(TEXTS, truncate_dim=dim, normalize_embeddings=True), unit)
    assert_close(ours.encode(TEXTS, truncate_dim=dim), unit if normalizes else raw)


def test_stored_truncation(build: Build) -> None:
    ours, theirs = build("mean", truncate_dim=12)
    assert ours.get_embedding_dimension() == 12
    assert_close(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert_close(ours.encode(TEXTS, truncate_dim=16), theirs.encode(TEXTS, truncate_dim=16))


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("dim", [13, HIDDEN])
def test_precisions(build: Build, precision: str, dim: int) -> None:
    ours, _ = build("mean")
    floats = ours.encode(TEXTS, truncate_dim=dim)
    expected = quantize_embeddings(floats, precision)
    got = ours.encode(TEXTS, truncate_dim=dim, precision=precision)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    assert ours.encode([], truncate_dim=dim, precision=precision).shape == (0, expected.shape[1])
    assert ours.encode([], truncate_dim=dim, precision=precision).dtype == expected.dtype
    if precision in ("binary", "ubinary"):
        np.testing.assert_array_equal(ours.encode(TEXTS[3], truncate_dim=dim, precision=precision), expected[3])


def test_order_and_batching_do_not_matter(build: Build) -> None:
    ours, _ = build("mean")
    texts = texts_of(23, seed=3)
    expected = np.stack([ours.encode(text) for text in texts])
    for batch_size in (None, 1, 7, 1000):
        for budget in (1, 50, 100_000):
            ours.token_budget = budget
            assert np.abs(ours.encode(texts, batch_size=batch_size) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("packed", [True, False])
def test_batches_hold_real_tokens(build: Build, packed: bool) -> None:
    ours, _ = build("mean")
    texts = [*texts_of(100, seed=4), *["sun"] * 60]
    real = sum(len(text.split()) + 2 for text in texts)
    shapes: list[tuple[int, int]] = []  # texts and tokens of each batch
    backbone, forward = ours._backbone, ours.model.forward
    if packed:
        ours._backbone = lambda ids, cu, *args, **kwargs: (  # type: ignore[assignment]
            shapes.append((len(cu) - 1, len(ids))) or backbone(ids, cu, *args, **kwargs)
        )
        ours._backbone.trims = False
    else:
        ours._backbone = None
        ours.model.forward = lambda *args, **kwargs: (
            shapes.append((len(kwargs["input_ids"]), kwargs["input_ids"].numel())) or forward(*args, **kwargs)
        )
    ours.token_budget = 128
    ours.encode(texts)
    assert max(tokens for _, tokens in shapes) <= 128
    assert max(rows for rows, _ in shapes) > 32, "short texts make larger batches"
    assert sum(tokens for _, tokens in shapes) <= (real if packed else 1.15 * real)
    shapes.clear()
    ours.encode(texts, batch_size=5)
    assert max(rows for rows, _ in shapes) == 5


def test_windows_join_seamlessly(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = build("mean")
    whole = ours.encode(TEXTS), ours.encode(TEXTS, output_value="token_embeddings")
    monkeypatch.setattr("embedding_kernels.models.embedder._WINDOW", 8)
    assert np.abs(ours.encode(TEXTS) - whole[0]).max() <= TOLERANCE
    for ours_tokens, expected in zip(ours.encode(TEXTS, output_value="token_embeddings"), whole[1], strict=True):
        assert_close(ours_tokens, expected)


def test_one_many_none(build: Build) -> None:
    ours, theirs = build("mean")
    assert ours.encode(TEXTS[0]).shape == (HIDDEN,)
    assert ours.encode([TEXTS[0]]).shape == (1, HIDDEN)
    assert ours.encode([]).shape == (0, HIDDEN)
    assert ours.encode(tuple(TEXTS)).shape == ours.encode(np.array(TEXTS)).shape == (len(TEXTS), HIDDEN)
    assert ours.encode([], output_value="token_embeddings") == []
    for options in ({"convert_to_tensor": True}, {"convert_to_numpy": False}):
        for texts in (TEXTS, TEXTS[0]):
            got, expected = ours.encode(texts, **options), theirs.encode(texts, **options)
            assert type(got) is type(expected)
            for one, other in zip(got, expected, strict=True):
                assert (one - other).abs().max() <= TOLERANCE
    assert ours.encode([], convert_to_tensor=True).shape == (0, HIDDEN)
    assert ours.encode([], convert_to_numpy=False) == []


def test_tensors_may_be_used_under_autograd(build: Build) -> None:
    ours, _ = build("mean")
    scale = torch.ones(HIDDEN, requires_grad=True)
    (ours.encode(TEXTS, convert_to_tensor=True) * scale).sum().backward()
    assert scale.grad is not None


def test_token_embeddings(build: Build) -> None:
    ours, theirs = build("mean")
    got, expected = (model.encode(TEXTS, output_value="token_embeddings") for model in (ours, theirs))
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
    assert_close(ours.encode(TEXTS[1], output_value="token_embeddings"), expected[1])


def test_text_without_tokens_is_the_zero_vector(tmp_path: Path) -> None:
    ours = Embedder.from_pretrained(save_bert(tmp_path, make_tokenizer(special=False)))
    vectors = ours.encode(["sun", "", "moon"])
    assert not vectors[1].any()
    assert vectors[0].any()
    assert vectors[2].any()
    assert [len(tokens) for tokens in ours.encode(["sun", "", "moon"], output_value="token_embeddings")] == [1, 0, 1]
    assert not ours.encode("").any()


def test_max_seq_length_and_lower_case(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "base", make_tokenizer(lower=False))
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 7, "do_lower_case": true}')
    (base / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},'
        ' {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
    )
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(
        f'{{"word_embedding_dimension": {HIDDEN}, "pooling_mode_mean_tokens": true}}'
    )
    ours, theirs = Embedder.from_pretrained(base), SentenceTransformer(str(base), device="cpu")
    assert ours.max_seq_length == 7
    assert_close(ours.encode(["Stone Birds", *TEXTS]), theirs.encode(["Stone Birds", *TEXTS]))
    assert_close(ours.encode("Stone Birds"), ours.encode("stone birds"))
    longer = Embedder.from_pretrained(base, max_seq_length=20)
    assert not np.allclose(longer.encode(TEXTS), ours.encode(TEXTS), atol=1e-3)


def test_plain_directories(bert: Path, tmp_path: Path) -> None:
    assert_close(
        Embedder.from_pretrained(bert).encode(TEXTS), SentenceTransformer(str(bert), device="cpu").encode(TEXTS)
    )
    first = Embedder.from_pretrained(bert, pooling="cls", normalize=True, truncate_dim=8, prompts={"query": "sun "})
    vectors = first.encode_query(TEXTS)
    assert vectors.shape == (len(TEXTS), 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_decoder_takes_the_last_token(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = Embedder.from_pretrained(tmp_path), SentenceTransformer(str(tmp_path), device="cpu")
    assert "lasttoken" in repr(ours)
    assert_close(ours.encode(TEXTS), theirs.encode(TEXTS))


def test_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, initializer_factor=1.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = Embedder.from_pretrained(tmp_path), SentenceTransformer(str(tmp_path), device="cpu")
    assert_close(ours.encode(TEXTS), theirs.encode(TEXTS))


def test_progress_bar(build: Build, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    ours, _ = build("mean")
    capsys.readouterr()
    ours.encode(TEXTS)
    ours.encode(TEXTS, show_progress_bar=False)
    assert capsys.readouterr().err == "", "silent unless asked, where there is no terminal"
    ours.encode(TEXTS, show_progress_bar=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    with caplog.at_level("INFO", logger="embedding_kernels"):
        ours.encode(TEXTS)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


def test_repr_says_what_runs(minilm: Embedder, bert: Path) -> None:
    for word in ("BertModel", "mean", "Normalize", "384", "256", "cpu", "float32", "packed BERT blocks"):
        assert word in repr(minilm)
    assert "padded, eager attention" in repr(Embedder.from_pretrained(bert, attn_implementation="eager"))


def test_half_precision_model_gives_float32_vectors(bert: Path) -> None:
    ours = Embedder.from_pretrained(bert, dtype=torch.bfloat16, normalize=True)
    vectors = ours.encode(TEXTS)
    assert ours.dtype == torch.bfloat16
    assert vectors.dtype == np.float32
    # normalised in float32: a bfloat16 norm would be off by 1e-3
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
