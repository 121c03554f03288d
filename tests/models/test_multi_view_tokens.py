"""Inputs of the reranker, token by token: those of the published code, which runs T5's sentencepiece model as it is."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

sentencepiece = pytest.importorskip("sentencepiece", reason="T5's tokenizer files need sentencepiece")
pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece models by protobuf")

import transformers as hf  # noqa: E402

from embedding_kernels import MultiViewReranker  # noqa: E402

from .conftest import edit_json, texts_of  # noqa: E402
from .multi_view import make_t5  # noqa: E402

TEXTS = texts_of(300, 30, 7)
SENTINELS = 100
ODD = [
    "  leading",
    "trailing  ",
    "tab\tand\r\nnewline",
    "two  spaces",
    "",
    "   ",
    "ﬁ ½ ① ㎏ ｜",
    "e\u0301 é Å",
    "🙂 汉字",
]
ODD += [
    "\ufeffmark\u200bof\u00a0no width",
    "\u3000ideographic space",
    "soft\u00adhyphen",
    "| Query: x | Context: y",
    "▁",
]


def pieces_of(directory: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 with the files that its tokenizer of that time wrote: a sentencepiece model, no tokenizer.json."""
    path = tmp_path_factory.mktemp("sentencepiece")
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False, "minloglevel": 2}
    sentences = [f"| Query: {text} | Context: {odd}" for text in TEXTS for odd in ODD]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(path / "spiece"), vocab_size=200, num_threads=1, **special
    )
    make_t5(pieces_of(path).get_piece_size() + SENTINELS).save_pretrained(path)
    names = [f"<extra_id_{number}>" for number in range(SENTINELS)]
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": names}
    for file, content in (
        ("special_tokens_map.json", tokens),
        ("tokenizer_config.json", {**tokens, "extra_ids": SENTINELS, "tokenizer_class": "T5Tokenizer"}),
    ):
        (path / file).write_text("{}")
        edit_json(path / file, lambda _, content=content: content)
    return path


def published_ids(pieces: Any, query: str, title: str, text: str, views: int, max_length: int) -> list[int]:
    """Split at the special tokens; pieces of what is between, stripped; cut, with the end token kept."""
    context = f"{title} {text}".strip()
    sentinels = "".join(f"<extra_id_{view}>" for view in range(views))
    ids: list[int] = []
    for part in re.split(r"(<extra_id_\d+>)", f"{sentinels} | Query: {query} | Context: {context}"):
        if part.startswith("<extra_id_"):
            ids.append(pieces.get_piece_size() + SENTINELS - 1 - int(part[10:-1]))
        else:
            ids += pieces.encode(part.lstrip())
    return [*ids[: max_length - 1], pieces.eos_id()]


@pytest.mark.parametrize(("views", "max_length"), [(4, 256), (4, 24), (1, 40), (6, 512)])
def test_tokens_are_the_published(directory: Path, tmp_path: Path, views: int, max_length: int) -> None:
    assert not (directory / "tokenizer.json").exists()
    reranker = MultiViewReranker.from_pretrained(directory, views=views, max_length=max_length, device="cpu")
    reranker.save_pretrained(tmp_path / "again")
    again = MultiViewReranker.from_pretrained(tmp_path / "again", max_length=max_length, device="cpu")
    pieces = pieces_of(directory)
    draw = random.Random(views)
    queries = [*TEXTS[:20], *ODD]
    documents = [
        [{"title": draw.choice(["", *ODD, *TEXTS]), "text": draw.choice([*ODD, *TEXTS])} for _ in range(8)]
        for _ in queries
    ]
    expected = [
        published_ids(pieces, query, **one, views=views, max_length=max_length)
        for query, held in zip(queries, documents, strict=True)
        for one in held
    ]
    for loaded in (reranker, again):
        ids, cu_seqlens, longest, _ = loaded.tokenize(queries, documents)
        assert [ids[start:end].tolist() for start, end in pairwise(cu_seqlens.tolist())] == expected
    assert longest == max(map(len, expected)) <= max_length
    # a string is a passage without a title, spaces around it and all
    plain = reranker.tokenize(["sun"], [ODD])
    assert torch.equal(plain[0], reranker.tokenize(["sun"], [[{"text": text.strip()} for text in ODD]])[0])


def test_the_decoder_starts_from_padding(directory: Path) -> None:
    """As the published inference does, whatever config.json calls its start token."""
    t5 = hf.T5Model.from_pretrained(directory)
    reranker = MultiViewReranker.from_pretrained(directory, max_length=64, device="cpu")
    expected = reranker.score_batch(["sun"], [TEXTS[:5]])[0]
    changed = MultiViewReranker.from_pretrained(directory, max_length=64, device="cpu")
    changed.model.t5.config.decoder_start_token_id = 5
    changed.model.forget()
    assert changed.score_batch(["sun"], [TEXTS[:5]])[0].tolist() == expected.tolist()
    with torch.no_grad():
        changed.model.t5.shared.weight[t5.config.pad_token_id] += 1
    changed.model.forget()
    assert changed.score_batch(["sun"], [TEXTS[:5]])[0].tolist() != expected.tolist()
