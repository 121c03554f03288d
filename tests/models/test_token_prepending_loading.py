"""Loading a `TokenPrependingEmbedder`: layers left out, presets, what ``repr`` says and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import embedding_kernels
from embedding_kernels import TokenPrependingEmbedder
from embedding_kernels.models.directory import DirectorySpec
from embedding_kernels.models.token_prepending import TOKEN_PREPENDING_PRESETS
from integrations.families import make

from .test_token_prepending import LAYERS, TEXTS, assert_close, byte_tokenizer, embedder, model_of


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---- directories ----


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for family in ("Llama", "Gemma 2", "Mistral", "Phi", "GPT-2"):
        path = paths[family] = tmp_path_factory.mktemp(family.replace(" ", ""))
        layers = {"n_layer" if family == "GPT-2" else "num_hidden_layers": LAYERS}
        longest = {"n_positions" if family == "GPT-2" else "max_position_embeddings": 1024}
        make(family, vocab_size=300, **layers, **longest).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return paths


@pytest.mark.parametrize("family", ("Llama", "Gemma 2", "Mistral", "Phi", "GPT-2"))
def test_layers_past_the_exit_are_not_loaded(
    family: str, directories: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel
    from transformers.utils import logging as hf_logging

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    hf_logging.add_handler(handler)
    try:
        ours = TokenPrependingEmbedder.from_pretrained(directories[family], exit_layer=2)
    finally:
        hf_logging.remove_handler(handler)
    assert said == [] and "UNEXPECTED" not in capfd.readouterr().err
    whole = AutoModel.from_pretrained(directories[family])
    names = {name for name, _ in ours.model.named_parameters()}
    assert names < {name for name, _ in whole.named_parameters()}
    assert not any(f".{layer}." in f".{name}" for name in names for layer in (2, 3))
    expected = TokenPrependingEmbedder(whole, ours.tokenizer, ours._spec, exit_layer=2)
    assert_close(ours.encode(TEXTS), expected.encode(TEXTS))
    normed = TokenPrependingEmbedder.from_pretrained(directories[family], exit_layer=2, final_norm=True)
    assert not np.allclose(normed.encode(TEXTS), ours.encode(TEXTS), atol=1e-3)


def test_defaults_and_presets(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = directories["Llama"]
    ours = TokenPrependingEmbedder.from_pretrained(path)
    assert (ours.exit_layer, ours.max_seq_length) == (LAYERS - 1, 512)
    assert "before layers 2 to 7" in repr(ours)
    # a published preset at the size of the tests' models
    preset = TOKEN_PREPENDING_PRESETS["llama3-8b"]
    monkeypatch.setitem(TOKEN_PREPENDING_PRESETS, "tiny", type(preset)(1, 3, 2))
    for prompt, layer in (("prompt_eol", 2), ("knowledge_enhancement", 3), ("knowledge_enhancement_plain", 3)):
        ours = TokenPrependingEmbedder.from_pretrained(path, preset="tiny", prompt=prompt, max_seq_length=400)
        assert (ours.exit_layer, ours.max_seq_length) == (layer, 400)
        assert "before layers 2 to 3" in repr(ours)
    ours = TokenPrependingEmbedder.from_pretrained(path, preset="tiny", exit_layer=1, start_layer=0)
    assert ours.exit_layer == 1 and "before layers 1 to 3" in repr(ours)
    with pytest.raises(ValueError, match="exit_layer must be from 1 to 4, got 27"):
        TokenPrependingEmbedder.from_pretrained(path, preset="llama2-7b")
    with pytest.raises(ValueError, match=r"preset must be one of llama2-7b, .*smollm2-135m, tiny, got 'llama'"):
        TokenPrependingEmbedder.from_pretrained(path, preset="llama")


def test_half_precision(directories: dict[str, Path]) -> None:
    exact = TokenPrependingEmbedder.from_pretrained(directories["Llama"], normalize=True).encode(TEXTS)
    ours = TokenPrependingEmbedder.from_pretrained(directories["Llama"], normalize=True, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert (ours.encode(TEXTS) * exact).sum(1).min() > 0.99


def test_package_exports() -> None:
    assert embedding_kernels.TokenPrependingEmbedder is embedding_kernels.models.TokenPrependingEmbedder
    assert issubclass(TokenPrependingEmbedder, embedding_kernels.Embedder)


def test_repr_states_what_a_text_costs() -> None:
    for word in (
        "LlamaModel",
        "prompt_eol",
        "before layers 2 to 3",
        "exit_layer=3",
        "beginning computed once",
        "last token",
    ):
        assert word in repr(embedder())
    assert "copies='none'" in repr(embedder(copy=False))
    assert "whole prompt in each text" in repr(embedder(reuse_prefix=False))
    for word in ("with our attention", "hooks", "whole prompt in each text", "all tokens"):
        assert word in repr(embedder("Phi"))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layer": 0}, "exit_layer must be from 1 to 4, got 0"),
        ({"exit_layer": 5}, "exit_layer must be from 1 to 4, got 5"),
        ({"exit_layer": True}, "exit_layer must be from 1 to 4, got True"),
        ({"start_layer": -1}, "start_layer must be an integer of at least 0, got -1"),
        ({"stop_layer": 0}, "stop_layer must be an integer of at least 1, got 0"),
        ({"stop_layer": 2.0}, "stop_layer must be an integer"),
        ({"prompt": "prompt"}, "prompt must be one of prompt_eol, .*, got 'prompt'"),
        ({"prompt": "{S} or {S}"}, "prompt must hold {S} once"),
        ({"prompt": "{S} <PST>"}, "<PST> at most once and before it"),
        ({"prompt": "<PST> <PST> {S}"}, "<PST> at most once and before it"),
        ({"prompt": ()}, "prompt must be at least one text"),
        ({"prompt": ("prompt_eol",)}, "prompt must hold {S} once"),
        ({"max_seq_length": 30}, "max_seq_length must be at least 42, so that a token fits"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder(**options)


def test_the_least_max_seq_length_works() -> None:
    ours = embedder(max_seq_length=42)
    vectors = ours.encode(["sun", "moon", "s"])
    assert np.isfinite(vectors).all()
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
    assert_close(vectors[0], vectors[2])


@pytest.mark.parametrize("family", ("BERT", "ModernBERT", "EmbeddingGemma", "MPNet"))
def test_models_that_are_no_causal_decoders(family: str) -> None:
    import transformers

    if family == "MPNet":
        model: Any = transformers.MPNetModel(transformers.MPNetConfig(vocab_size=300, num_hidden_layers=2))
    else:
        model = make(family, vocab_size=300)
    with pytest.raises(ValueError, match="model must be a causal decoder"):
        TokenPrependingEmbedder(model, byte_tokenizer(), DirectorySpec(Path(), ("mean",)))


def test_other_refusals(directories: dict[str, Path], tmp_path: Path) -> None:
    spec = DirectorySpec(Path(), ("mean",), bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional must be None"):
        TokenPrependingEmbedder(model_of("Llama"), byte_tokenizer(), spec)
    with pytest.raises(ValueError, match="final_norm needs a PhiModel of 3 layers"):
        embedder("Phi", final_norm=True)
    ours = embedder()
    with pytest.raises(ValueError, match="output_value must be 'sentence_embedding' here"):
        ours.encode(TEXTS, output_value="token_embeddings")
    for layer in (4, -1, True):
        with pytest.raises(ValueError, match=f"layer must be from 0 to 3 \\(the exit layer\\), got {layer}"):
            ours.encode(TEXTS, layer=layer)
    with pytest.raises(ValueError, match="prompt_name must be one of the stored prompts"):
        ours.encode(TEXTS, prompt_name="query")
    with pytest.raises(FileNotFoundError):
        TokenPrependingEmbedder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="max_seq_length must be at least 1, got 0"):
        TokenPrependingEmbedder.from_pretrained(directories["Llama"], max_seq_length=0)
