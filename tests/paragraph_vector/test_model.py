"""`BinaryParagraphVector`: learns topics, repeats itself to the bit, keeps and finds what it has learned."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import embedding_kernels as ek
from embedding_kernels import BinaryParagraphVector
from embedding_kernels.models import paragraph_vector
from embedding_kernels.models.vocabulary import Vocabulary, words_of

TOPICS, TEXTS_A_TOPIC = 4, 40


def corpus(seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts of ten words, eight of their topic's own thirty and two of everybody's; and their topics."""
    draws = np.random.default_rng(seed)
    topics = np.arange(TOPICS * TEXTS_A_TOPIC) % TOPICS
    texts = []
    for topic in topics:
        own = [f"topic{topic}word{i}" for i in draws.integers(30, size=8)]
        texts.append(" ".join([*own, *(f"common{i}" for i in draws.integers(20, size=2))]))
    return texts, topics


def distances(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return ek.hamming_distance(torch.from_numpy(queries), torch.from_numpy(codes)).numpy()


def model(**options) -> BinaryParagraphVector:
    return BinaryParagraphVector(
        **{"bits": 24, "epochs": 40, "negatives": 20, "bigrams": False, "min_count": 2, **options}
    )


KINDS = {
    "dbow": {},
    "dm": {"kind": "dm", "bigrams": None, "context_dim": 8},
    "real_binary": {"real_dim": 40},
    "real": {"binary": False},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def fitted() -> dict[str, BinaryParagraphVector]:
    return {kind: model(**options).fit(corpus()[0]) for kind, options in KINDS.items()}


def topic_gap(codes: np.ndarray, topics: np.ndarray) -> float:
    """Mean distance between topics over that within them, 1 where codes know nothing of topics."""
    apart = distances(codes, codes)
    same = topics[:, None] == topics[None]
    np.fill_diagonal(same, False)
    other = topics[:, None] != topics[None]
    return float(apart[other].mean() / apart[same].mean())


@by_kind
def test_topics_are_learned(fitted, kind):
    texts, topics = corpus()
    assert topic_gap(fitted[kind].codes, topics) > 1.5
    fresh, fresh_topics = corpus(seed=1)
    found = fitted[kind].infer(fresh)
    nearest = distances(found.codes, fitted[kind].codes).argmin(1)
    assert (topics[nearest] == fresh_topics).mean() > 0.8
    assert len(texts) == len(fitted[kind].codes)


def test_without_learning_there_are_no_topics():
    """What the test above measures comes from the training."""
    idle = model(learning_rate=1e-9).fit(corpus()[0])
    assert topic_gap(idle.codes, corpus()[1]) < 1.1


def test_a_wrong_sign_would_be_seen(fitted, monkeypatch):
    step = paragraph_vector.paragraph_vector_step

    def uphill(documents, *rest):
        before = documents.clone()
        loss = step(documents, *rest)
        documents.copy_(2 * before - documents)
        return loss

    monkeypatch.setattr(paragraph_vector, "paragraph_vector_step", uphill)
    texts, topics = corpus()
    nearest = distances(fitted["dbow"].infer(texts).codes, fitted["dbow"].codes).argmin(1)
    assert (topics[nearest] == topics).mean() < 0.3


@by_kind
def test_the_loss_falls(kind, monkeypatch):
    losses = []
    step = paragraph_vector.paragraph_vector_step

    def recorded(*args):
        losses.append(float(step(*args).mean()))

    monkeypatch.setattr(paragraph_vector, "paragraph_vector_step", recorded)
    model(**KINDS[kind], learning_rate=1.0).fit(corpus()[0])
    assert losses[-1] < 0.9 * losses[0]


@by_kind
def test_inferred_training_texts_find_themselves(fitted, kind):
    texts, topics = corpus()
    nearest = distances(fitted[kind].infer(texts).codes, fitted[kind].codes).argmin(1)
    assert (topics[nearest] == topics).mean() > 0.9


@by_kind
def test_same_bits_again_and_for_any_thread_count(fitted, kind):
    texts, _ = corpus()
    torch.set_num_threads(3)
    again = model(**KINDS[kind]).fit(texts)
    assert np.array_equal(again.vectors, fitted[kind].vectors)
    torch.set_num_threads(1)
    for left, right in zip(again.infer(texts[:9]), fitted[kind].infer(texts[:9]), strict=True):
        assert np.array_equal(left, right)


def test_another_seed_draws_otherwise(fitted):
    assert not np.array_equal(model(seed=1).fit(corpus()[0]).vectors, fitted["dbow"].vectors)


@by_kind
def test_inference_leaves_the_model_alone(fitted, kind):
    before = {name: table.clone() for name, table in fitted[kind]._tables.items()}
    codes = fitted[kind].codes
    fitted[kind].infer(corpus(seed=2)[0])
    assert all(torch.equal(table, before[name]) for name, table in fitted[kind]._tables.items())
    assert np.array_equal(fitted[kind].codes, codes)


@by_kind
def test_shapes(fitted, kind):
    width = KINDS[kind].get("real_dim", 24)
    assert fitted[kind].codes.dtype == np.uint8 and fitted[kind].codes.shape == (TOPICS * TEXTS_A_TOPIC, 3)
    assert fitted[kind].vectors.dtype == np.float32
    assert fitted[kind].vectors.shape == (TOPICS * TEXTS_A_TOPIC, width)
    none = fitted[kind].infer([])
    assert none.codes.shape == (0, 3) and none.vectors.shape == (0, width)


def test_codes_are_signs(fitted):
    bits = np.unpackbits(fitted["dbow"].codes, axis=1)[:, :24]
    assert np.array_equal(bits, fitted["dbow"].vectors > 0)


def test_empty_texts_and_unknown_words(fitted):
    found = fitted["dbow"].infer(["", "never seen before", "!?", "topic1word1 unheard"])
    assert np.isfinite(found.vectors).all()
    texts = ["", "a b a b", "   ", "a b"]
    codes = BinaryParagraphVector(8, epochs=2, negatives=3, min_count=2).fit(texts).codes
    assert codes.shape == (4, 1)


@by_kind
def test_save_and_load(fitted, kind, tmp_path):
    path = tmp_path / "model.safetensors"
    fitted[kind].save(path)
    loaded = BinaryParagraphVector.load(path)
    assert loaded.options == fitted[kind].options
    assert np.array_equal(loaded.codes, fitted[kind].codes)
    texts = corpus(seed=3)[0][:20]
    for left, right in zip(loaded.infer(texts), fitted[kind].infer(texts), strict=True):
        assert np.array_equal(left, right)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_interrupted_save_leaves_the_older_file(fitted, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    fitted["dbow"].save(path)
    before = path.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("embedding_kernels.models.paragraph_vector_file.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted["real"].save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_files_that_are_no_model(fitted, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"load: .* is not a file"):
        BinaryParagraphVector.load(path)
    fitted["dbow"].save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"load: .* is truncated or no safetensors file"):
        BinaryParagraphVector.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"load: .* has been altered"):
        BinaryParagraphVector.load(path)
    save_file({"codes": torch.zeros(1)}, path, metadata={"format": "something else"})
    with pytest.raises(ValueError, match=r"load: .* must have format"):
        BinaryParagraphVector.load(path)


def test_an_interrupted_fit_leaves_the_model_as_it_was(monkeypatch):
    learned = model(epochs=2).fit(corpus()[0])
    before = learned.codes

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(paragraph_vector, "paragraph_vector_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learned.fit(["other texts other texts"])
    assert np.array_equal(learned.codes, before)
    assert "topic0word0" in learned.vocabulary.words


def test_progress_is_shown_in_words(capsys):
    model(epochs=2).fit(corpus()[0], show_progress_bar=True)
    assert re.search(r"Training: 100%.* 3200/3200 .*word/s", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits must be an integer of at least 1, got 0"),
        ({"kind": "cbow"}, "kind must be one of dbow, dm, got 'cbow'"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"real_dim": 1.5}, "real_dim must be an integer"),
        ({"kind": "dm", "bigrams": True}, "bigrams must be None or False for kind 'dm'"),
        ({"lr": 1}, "arguments must be among .*learning_rate.*, got lr"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"BinaryParagraphVector: {message}"):
        BinaryParagraphVector(**options)


def test_bad_calls():
    fresh = BinaryParagraphVector(8)
    for call in (fresh.infer, lambda texts: fresh.save("unused")):
        with pytest.raises(ValueError, match="the model must have learned first"):
            call(["a"])
    with pytest.raises(ValueError, match="fit: texts must be a sequence of strings, got str"):
        fresh.fit("one text")
    with pytest.raises(ValueError, match="fit: texts must be a sequence of strings, got int in place 1"):
        fresh.fit(["a", 3])
    with pytest.raises(ValueError, match=r"seen at least 5 times \(min_count\).*lower min_count"):
        fresh.fit(["each word once"])
    assert "words=0" in repr(fresh)


def test_words():
    assert words_of("Don't stop—the 2nd café_bar's o' 'quote'!") == (
        ["don't", "stop", "the", "2nd", "café", "bar's", "o", "quote"]
    )
    known = Vocabulary.of(["a b a b", "b a"], 2, bigrams=True)
    assert known.words == ["a", "b", "a b", "b a"]
    assert known.counts.tolist() == [3, 3, 2, 2]
    packed = known.pack(["b a x b", "", "x"])
    assert packed.tokens.tolist() == [1, 0, 1, 3]
    assert packed.offsets.tolist() == [0, 4, 4, 4]


def test_batches_hold_every_text_once():
    packed = Vocabulary.of(["a b c d"] * 2, 1, bigrams=False).pack(["a b", "", "c", "d a b c a a", "b"])
    seen = {}
    for rows, tokens, cu_seqlens in packed.batches(4, np.random.default_rng(0)):
        assert len(tokens) <= 4 or len(rows) == 1
        for row, start, end in zip(rows.tolist(), cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            assert row not in seen
            seen[row] = tokens[start:end].tolist()
    assert seen == {0: [0, 1], 2: [2], 3: [3, 0, 1, 2, 0, 0], 4: [1]}
