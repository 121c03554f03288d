"""Refusals of `Embedder`: every one names what is wrong in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedding_kernels import Embedder

from .conftest import HIDDEN, edit_json, make_tokenizer

BAD_CALLS = [
    ({"inputs": 3}, "inputs must be a string or a sequence of strings, got int"),
    ({"inputs": None}, "got NoneType"),
    ({"inputs": b"sun"}, "got bytes"),
    ({"inputs": {"text": "sun"}}, "got dict"),
    ({"inputs": ["sun", 3]}, "got int in place 1"),
    ({"inputs": [["sun", "moon"]]}, "got list in place 0"),
    ({"precision": "float16"}, "precision must be one of float32, int8"),
    ({"precision": "int8", "inputs": "sun"}, "at least 2 texts for precision 'int8', got 1"),
    ({"prompt_name": "query"}, r"prompt_name must be one of the stored prompts \(none\), got 'query'"),
    ({"prompt": 3}, "prompt must be a string, got int"),
    ({"truncate_dim": HIDDEN + 1}, f"truncate_dim must be from 1 to {HIDDEN}, got {HIDDEN + 1}"),
    ({"truncate_dim": 0}, "truncate_dim must be from 1"),
    ({"truncate_dim": 1.5}, "truncate_dim must be from 1"),
    ({"batch_size": 0}, "batch_size must be a positive integer or None, got 0"),
    ({"batch_size": 2.5}, "batch_size must be"),
    ({"output_value": None}, "output_value must be one of sentence_embedding, token_embeddings, got None"),
    ({"device": ["cpu", "cpu"]}, "device must be one device"),
    ({"normalise": True}, "arguments must be those of its signature, got normalise"),
    ({"pool": {"input": 1}}, "got pool"),
]


@pytest.fixture(scope="module")
def embedder(bert: Path) -> Embedder:
    return Embedder.from_pretrained(bert)


@pytest.mark.parametrize(("options", "message"), BAD_CALLS, ids=lambda value: str(value)[:40])
def test_bad_calls(embedder: Embedder, options: dict[str, Any], message: str) -> None:
    arguments = {"inputs": ["sun", "moon"], **options}
    with pytest.raises(ValueError, match=message) as refusal:
        embedder.encode(**arguments)
    assert str(refusal.value).startswith("encode: ")
    assert "\n" not in str(refusal.value)


def test_unset_options_of_sentence_transformers_pass(embedder: Embedder) -> None:
    assert embedder.encode("sun", pool=None, chunk_size=None).shape == (HIDDEN,)


@pytest.fixture
def model(build: Callable[..., Any], tmp_path: Path) -> Path:
    from sentence_transformers.sentence_transformer.modules import Dense

    build("mean", Dense(HIDDEN, 8))
    return tmp_path / "model"


def refused(model: Path, *words: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as refusal:
        Embedder.from_pretrained(model)
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    [
        "sentence_transformers.models.LSTM",
        "sentence_transformers.models.WeightedLayerPooling",
        "sentence_transformers.models.StaticEmbedding",
        "modeling_custom.Pooling",
    ],
)
def test_unknown_module_is_named(model: Path, name: str) -> None:
    edit_json(model / "modules.json", lambda modules: modules[2].update(type=name))
    refused(model, name, "Dense", "segment_pool")


def test_modules_in_another_order(model: Path) -> None:
    edit_json(model / "modules.json", lambda modules: [modules[0], modules[2], modules[1]])
    refused(model, "Transformer -> Dense -> Pooling")
    edit_json(model / "modules.json", lambda modules: modules[:1])
    refused(model, "got Transformer;")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("sentence_bert_config.json", "query_length", 32),
        ("sentence_bert_config.json", "transformer_task", "fill-mask"),
        ("sentence_bert_config.json", "module_output_name", "sentence_embedding"),
        ("sentence_bert_config.json", "modality_config", {"message": {}}),
        ("1_Pooling/config.json", "pooling_mode", "median"),
        ("2_Dense/config.json", "activation_function", "os.system"),
        ("2_Dense/config.json", "activation_function", "torch.nn.init"),
        ("2_Dense/config.json", "module_input_name", "token_embeddings"),
        ("config_sentence_transformers.json", "default_prompt_name", "lost"),
        ("config_sentence_transformers.json", "truncate_dim", 9),
    ],
)
def test_unsupported_options_are_named(model: Path, file: str, key: str, value: Any) -> None:
    edit_json(model / file, lambda config: config.update({key: value}))
    refused(model, key, str(value).split("'")[0])


def test_missing_files(model: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    refused(model / "config.json", "not a model directory", error=FileNotFoundError)
    for name, word in (
        ("2_Dense/model.safetensors", "model.safetensors"),
        ("1_Pooling/config.json", "Pooling"),
        ("tokenizer.json", "tokenizer"),
        ("model.safetensors", "weights"),
        ("config.json", "config.json"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(model, copy)
        (copy / name).unlink()
        refused(copy, word, error=FileNotFoundError)
        shutil.rmtree(copy)


def test_pickled_weights_are_refused_by_name(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, "pytorch_model.bin", "safetensors", error=FileNotFoundError)


def test_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'org/model' is neither a directory nor a model .*: no connection$"):
        Embedder.from_pretrained("org/model")


def test_hub_name_is_fetched(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: {"org/model": str(bert)}[name])
    assert Embedder.from_pretrained("org/model").encode("sun").shape == (HIDDEN,)


def test_damaged_files(model: Path) -> None:
    (model / "2_Dense" / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    refused(model, "2_Dense", "does not fit")
    (model / "modules.json").write_text("[{")
    refused(model, "modules.json", "not valid JSON")


def test_weights_that_lack_a_parameter(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert, tmp_path / "copy")
    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "copy", "encoder.layer.1.output.dense.weight")


def test_truncated_weights(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(tmp_path / "copy", str(tmp_path / "copy"))


def test_encoder_decoder_without_an_encoder_of_its_own(tmp_path: Path) -> None:
    from transformers import BartConfig, BartModel

    tokenizer = make_tokenizer()
    config = BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2)  # fmt: skip
    torch.manual_seed(0)
    BartModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "encoder-decoder 'bart'")


def test_bad_construction(bert: Path) -> None:
    for options, message in (
        ({"token_budget": 0}, "token_budget must be at least 1, got 0"),
        ({"max_seq_length": 0}, "max_seq_length must be at least 1, got 0"),
        ({"truncate_dim": HIDDEN + 1}, "truncate_dim must be from 1"),
        ({"default_prompt_name": "lost"}, "prompt_name must be one of"),
        ({"pooling": "median"}, "pooling_mode must be one or more of cls"),
    ):
        with pytest.raises(ValueError, match=message):
            Embedder.from_pretrained(bert, **options)
